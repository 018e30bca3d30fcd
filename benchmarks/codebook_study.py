#!/usr/bin/env python
"""The recorded study behind docs/codebook.md: one model, many routers and codebooks, plain PyTorch, one process.

    python benchmarks/codebook_study.py benchmarks/codebook_study.yaml --out study.jsonl
    python benchmarks/codebook_study.py --table study.jsonl

Every entry of the grid trains a preset (`tiny` unless it names another) on the standard library's documentation for
`steps` steps with one thread, so that entries differ in routing alone. Runs already in the output file
are skipped: the study can be interrupted and continued. A run takes about four minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vqmoe_ds  # noqa: F401  before torch: it sets how long idle OpenMP threads spin

# isort: split

import numpy as np
import torch
import yaml

from vqmoe_ds.config.load import load_config
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.batches import TrainingBatches
from vqmoe_ds.data.corpus import Split, open_corpus, split_corpus
from vqmoe_ds.evaluation.routing import perplexity
from vqmoe_ds.models.transformer import MoETransformer
from vqmoe_ds.moe.codebook_sync import CodebookSync
from vqmoe_ds.train.allocator import tune_allocator

HEALTH_EVERY = 100
HEALTH_FROM = 300


def train(entry: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train one entry with one seed; returns the row of the output file."""
    overrides = {**entry.get("set", {}), "train.seed": seed, "train.steps": entry["steps"]}
    config = load_config(entry.get("preset", "tiny"), None, overrides).config
    batch = config.train.batch_size
    splits = split_corpus(open_corpus(entry.get("data")), config.model.sequence_length, 10)
    model, batches = MoETransformer(config), TrainingBatches(splits[0], batch, seed)
    sync = CodebookSync(model.bank) if model.bank is not None else None
    optimizer = _optimizer(model, config)
    started, losses, health, watch = time.time(), [], [], Fluctuation(splits[1])
    for step in range(config.train.steps):
        losses.append(_step(model, optimizer, batches, sync, config, step))
        if (step + 1) % HEALTH_EVERY == 0:
            row = {**_health(model), "fluctuation": watch.measure(model)}
            health += [row] if step + 1 >= HEALTH_FROM else []
            print(
                f"{entry['name']} seed {seed} step {step + 1}: {np.mean(losses[-50:]) / math.log(2):.3f} {row}",
                flush=True,
            )
    return {
        "name": entry["name"],
        "seed": seed,
        "steps": config.train.steps,
        "bits_per_byte": _validate(model, splits[1], batch),
        "num_codes": model.bank.num_codes if model.bank is not None else 0,
        "min_code_perplexity": min((min(r["code_perplexity"]) for r in health if r["code_perplexity"]), default=None),
        "max_busiest_expert": max((max(r["busiest_expert"]) for r in health if r["busiest_expert"]), default=None),
        "fluctuation": health[-1]["fluctuation"] if health else None,
        "seconds": round(time.time() - started),
        "set": entry.get("set", {}),
    }


def _optimizer(model: MoETransformer, config: RunConfig) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1.0, betas=(config.train.beta1, config.train.beta2), foreach=True)


def _step(
    model: MoETransformer,
    optimizer: torch.optim.Optimizer,
    batches: TrainingBatches,
    sync: CodebookSync | None,
    config: RunConfig,
    step: int,
) -> float:
    tokens = torch.from_numpy(batches.micro_batch(step, 0, 0, 1, config.train.batch_size))
    rate = config.train.learning_rate * min(1.0, (step + 1) / 50)
    rate *= 0.1 + 0.45 * (1 + math.cos(math.pi * step / config.train.steps))
    for group in optimizer.param_groups:
        group["lr"] = rate
    lm_loss, aux_loss = model(tokens[:, :-1], tokens[:, 1:])
    (lm_loss + aux_loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if sync is not None:
        sync.step()
        if model.source is not None:
            model.source.follow(model.embed.weight)
    return float(lm_loss.detach())


def _health(model: MoETransformer) -> dict[str, list[float]]:
    loads = []
    for layer in model.moe_layers():
        loads.append(float(layer.tokens_per_expert.max() / layer.tokens_per_expert.mean()))
        layer.tokens_per_expert.zero_()
    codes = [] if model.bank is None else perplexity(model.bank.usage_LK)
    if model.bank is not None:
        model.bank.usage_LK.zero_()
    return {"busiest_expert": [round(v, 2) for v in loads], "code_perplexity": [round(v, 1) for v in codes]}


class Fluctuation:
    """Share of 2048 held-out tokens that changed an expert since the last measurement, by layer."""

    def __init__(self, split: Split) -> None:
        self.probe = torch.from_numpy(split.batch(np.linspace(0, len(split) - 1, 8).astype(int)))[:, :-1]
        self._last: list[torch.Tensor] = []

    @torch.no_grad()
    def measure(self, model: MoETransformer) -> list[float]:
        layers = model.moe_layers()
        for layer in layers:
            layer.watch = True
        model.eval()
        model(self.probe)
        model.train()
        for layer in layers:
            layer.watch = False
        routes = [layer.watched.sort(dim=-1).values for layer in layers if layer.watched is not None]
        changed = [(a != b).any(dim=-1).float().mean().item() for a, b in zip(routes, self._last, strict=False)]
        self._last = routes
        return [round(v, 3) for v in changed]


@torch.no_grad()
def _validate(model: MoETransformer, split: Split, batch: int) -> float:
    model.eval()
    positions = np.linspace(0, len(split) - 1, min(256, len(split))).astype(int)
    losses = []
    for start in range(0, len(positions), batch):
        tokens = torch.from_numpy(split.batch(positions[start : start + batch]))
        losses.append(float(model(tokens[:, :-1], tokens[:, 1:])[0]))
    return float(np.mean(losses)) / math.log(2)


def print_table(path: Path) -> None:
    """Mean over seeds of every entry, best first, as Markdown."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        runs[row["name"]].append(row)
    head = ("entry", "seeds", "bits/byte", "least code perplexity / K", "busiest expert", "fluctuation")
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for name, rows in sorted(runs.items(), key=lambda item: np.mean([r["bits_per_byte"] for r in item[1]])):
        bits = [r["bits_per_byte"] for r in rows]
        spread = f" ± {np.std(bits, ddof=1):.3f}" if len(bits) > 1 else ""
        codes = [r["min_code_perplexity"] for r in rows if r["min_code_perplexity"]]
        share = f"{min(codes):.1f} / {rows[0]['num_codes']}" if codes else "–"
        loads = [r["max_busiest_expert"] for r in rows if r["max_busiest_expert"]]
        load = f"{max(loads):.2f}" if loads else "–"
        moves = [m for r in rows for m in (r["fluctuation"] or [])]
        range_ = f"{min(moves):.2f}–{max(moves):.2f}" if moves else "–"
        print(f"| {name} | {len(rows)} | {np.mean(bits):.3f}{spread} | {share} | {load} | {range_} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="?", help="YAML: seeds, steps and entries")
    parser.add_argument("--only", default="", help="names of the entries to run, separated by commas")
    parser.add_argument("--out", default="study.jsonl", help="rows are appended here")
    parser.add_argument("--table", metavar="JSONL", help="print the table of an output file and stop")
    args = parser.parse_args()
    if args.table:
        print_table(Path(args.table))
        return
    torch.set_num_threads(1)
    tune_allocator()
    grid, out = yaml.safe_load(Path(args.grid).read_text()), Path(args.out)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["name"], row["seed"], row["steps"]) for row in rows}
    only = set(args.only.split(",")) if args.only else {entry["name"] for entry in grid["entries"]}
    for entry in ({"steps": grid["steps"], **entry} for entry in grid["entries"] if entry["name"] in only):
        for seed in entry.get("seeds", grid["seeds"]):
            if (entry["name"], seed, entry["steps"]) not in done:
                row = train(entry, seed)
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
