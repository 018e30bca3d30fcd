#!/usr/bin/env python
"""Recovery of models when the text they are trained on changes its domain, and how far their routes move.

    python benchmarks/online_shift.py --domains data/wikitext2 data/shakespeare --steps 60 --rounds 2 --seeds 3 \
        --model "VQ, frozen codebook=runs/vq" --model "VQ, moving codebook=runs/vq,codebook.learning=ema" \
        --model "top-2=runs/topk" --out runs/shift

Every model goes on from its checkpoint through a stream that takes its text from the domains in turn, --steps optimizer
steps from each, --rounds times around; the domain of pretraining comes first. Each window is seen once and its loss is
taken before it is learned from. After a change of domain the table has the loss of the first steps and of the last
ones, the steps until nine tenths of the fall between them are made, the share of fixed held-out tokens of that
domain whose expert moved meanwhile, and the perplexity of the codes of all tokens in between. The domains are prepared
with the tokenizer of the checkpoints.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measuring import table, write_json

from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.data.batches import Batch, Batches
from vqmoe_ds.evaluation.perplexity import bits_per_byte, validate
from vqmoe_ds.evaluation.plots import pyplot, save
from vqmoe_ds.evaluation.routing import RoutingHealth
from vqmoe_ds.evaluation.statistics import mean_of, paired_difference
from vqmoe_ds.models.session import Session
from vqmoe_ds.runtime.errors import ConfigError, UserError
from vqmoe_ds.runtime.ranks import find_place
from vqmoe_ds.runtime.torch_setup import set_up_torch
from vqmoe_ds.train.engine import build_session
from vqmoe_ds.train.loop import Callback, StepResult, Trainer

ROOT = Path(__file__).resolve().parent.parent
DS_CONFIG = str(ROOT / "ds_configs" / "zero0.json")
HELD_OUT = 8
"""Batches of held-out text that are scored at every change."""
ENDS = 5
"""Steps that count as the first of a stretch; three times as many count as its last."""
COLUMNS = {
    "first": f"first {ENDS} steps",
    "last": f"last {3 * ENDS} steps",
    "mean": "all steps",
    "recovery": "steps to recover",
    "moved": "routes moved",
    "codes": "codes in use",
}


@dataclass
class Stream:
    """Training batches of the domains in turn, each going on where it was left; a ``Batches``."""

    parts: Sequence[Batches]
    steps: int
    batch_size: int

    @property
    def masked(self) -> bool:
        return any(part.masked for part in self.parts)

    def domain(self, step: int) -> int:
        return step // self.steps % len(self.parts)

    def micro_batches(self, first: int, rank: int, world: int, size: int) -> list[Batch]:
        step = first // self.batch_size
        seen = step // (self.steps * len(self.parts)) * self.steps + step % self.steps
        return self.parts[self.domain(step)].micro_batches(seen * self.batch_size, rank, world, size)

    def epoch(self, samples: int) -> float:
        return self.parts[0].epoch(samples)


@dataclass
class Watch(Callback):
    """Loss of every step, and at every change of domain the routes of fixed tokens and the loss on all domains."""

    stream: Stream
    windows: Sequence[Any]
    losses: list[float] = field(default_factory=list)
    moved: list[list[float]] = field(default_factory=list)
    """Share of each domain's probe that changed an expert in each stretch, mean over layers, by stretch and domain."""
    codes: list[float] = field(default_factory=list)
    """Perplexity of the codes of each stretch's tokens, mean over layers, by stretch."""
    held_out: list[list[float | None]] = field(default_factory=list)

    def on_start(self, trainer: Trainer) -> None:
        self._probes = [RoutingHealth(trainer.session, windows, 4096) for windows in self.windows]
        self._look(trainer.session)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.losses.append(bits_per_byte(result.loss, result.bytes_per_token) or float("nan"))
        if result.step % self.stream.steps == 0:
            self._look(trainer.session)

    def _look(self, session: Session) -> None:
        found = [probe.measure() for probe in self._probes]
        if all("fluctuation" in row for row in found):  # not at the start, nor in a dense model
            self.moved.append([float(np.mean(row["fluctuation"])) for row in found])
            if "code_perplexity" in found[0]:  # the others come when the counts have been taken
                self.codes.append(float(np.mean(found[0]["code_perplexity"])))
        self.held_out.append([validate(session, windows, HELD_OUT).bits_per_byte for windows in self.windows])


def run(name: str, spec: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Send one model through the stream; its curve and what ``Watch`` saw."""
    from vqmoe_ds.checkpoint.open import open_checkpoint
    from vqmoe_ds.finetune.cli import build_parser
    from vqmoe_ds.finetune.config import language_model_config, starting_config
    from vqmoe_ds.finetune.run import begin

    path, *overrides = spec.split(",")
    steps = args.steps * len(args.domains) * args.rounds
    common = [
        "train.min_learning_rate_ratio=1",
        "train.warmup_steps=5",
        "train.batch_size=8",
        "finetune.trainable=all",
        *overrides,
    ]
    parsed = build_parser("", DS_CONFIG).parse_args(
        [
            f"--checkpoint={path}",
            "--task=lm",
            f"--data={args.domains[0]}",
            f"--train_steps={steps}",
            f"--seed={seed}",
            *(f"--set={text}" for text in common),
        ]
    )
    reader, place = open_checkpoint(path), find_place(None)
    loaded = starting_config(parsed, reader)
    texts = [_open(loaded, reader, domain) for domain in args.domains]
    config = resolve(DS_CONFIG, language_model_config(loaded, texts[0].tokenizer_sha256), place.world_size, None)
    opened = [
        text.open(_with_data(config.run, d), args.out / "index") for text, d in zip(texts, args.domains, strict=True)
    ]
    session = build_session(config, place, DS_CONFIG)
    begin(session, reader)
    stream = Stream([batches for batches, _ in opened], args.steps, config.run.train.batch_size)
    watch = Watch(stream, [windows for _, windows in opened])
    Trainer(session, stream, [watch]).run()
    session.engine.destroy()
    seen = {key: getattr(watch, key) for key in ("losses", "moved", "codes", "held_out")}
    return {"model": name, "seed": seed, **seen}


def _with_data(run_config: Any, domain: str) -> Any:
    return run_config.model_copy(update={"data": run_config.data.model_copy(update={"path": domain})})


def _open(loaded: Any, reader: Any, domain: str) -> Any:
    from dataclasses import replace

    from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config
    from vqmoe_ds.finetune.language import open_text

    one = replace(loaded, config=_with_data(loaded.config, domain))
    return open_text(one, run_config(reader.config, reader.path), reader).data


def stretches(found: dict[str, Any], steps: int, domains: int) -> dict[int, dict[str, float]]:
    """The measures of ``COLUMNS`` by domain, averaged over its stretches after the very first, which is no change."""
    rows: dict[int, list[dict[str, float]]] = {}
    for number in range(1, len(found["losses"]) // steps):
        losses = np.array(found["losses"][number * steps : (number + 1) * steps])
        first, last = losses[:ENDS].mean(), losses[-3 * ENDS :].mean()
        smooth = np.convolve(losses, np.ones(ENDS) / ENDS, mode="valid")
        below = np.flatnonzero(smooth <= last + 0.1 * (first - last))
        row = {
            "first": first,
            "last": last,
            "mean": losses.mean(),
            "recovery": float(below[0]) if len(below) else steps,
        }
        if found["moved"]:
            row["moved"] = found["moved"][number][number % domains]
        if found["codes"]:
            row["codes"] = found["codes"][number]
        rows.setdefault(number % domains, []).append(row)
    return {d: {key: float(np.mean([row[key] for row in some])) for key in some[0]} for d, some in rows.items()}


def report(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Markdown: a table for each domain, mean ± standard error over seeds, and differences to the first model."""
    lines = []
    measured = [(row["model"], row["seed"], stretches(row, args.steps, len(args.domains))) for row in results]
    for domain, where in enumerate(args.domains):
        values: dict[str, dict[int, dict[str, float]]] = {}
        for name, seed, found in measured:
            if domain in found:
                values.setdefault(name, {})[seed] = found[domain]
        if values:
            first = next(iter(values))
            rows = [[name, *_cells(seeds, values[first])] for name, seeds in values.items()]
            columns = ["model", *COLUMNS.values(), f"all steps, minus {first}"]
            lines += [f"### When the text changes to {Path(where).name}", "", table(columns, rows), ""]
    return "\n".join(lines)


def _cells(seeds: dict[int, dict[str, float]], base: dict[int, dict[str, float]]) -> list[str]:
    cells = [_cell([found[key] for found in seeds.values() if key in found]) for key in COLUMNS]
    ours, theirs = ({seed: found["mean"] for seed, found in each.items()} for each in (seeds, base))
    difference = paired_difference(ours, theirs)
    if seeds is base or difference is None or difference.low is None:
        return [*cells, ""]
    return [*cells, difference.show()]


def _cell(values: list[float]) -> str:
    return mean_of(values).show(".4g", ".2g") if values else "–"


def draw(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """The curves, mean over seeds, with the changes of domain."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 4))
    for name in dict.fromkeys(row["model"] for row in results):
        curves = np.array([row["losses"] for row in results if row["model"] == name])
        axes.plot(np.arange(1, curves.shape[1] + 1), curves.mean(axis=0), label=name, linewidth=1)
    for change in range(args.steps, args.steps * len(args.domains) * args.rounds, args.steps):
        axes.axvline(change + 0.5, color="grey", linewidth=0.5)
    axes.set(xlabel="optimizer step", ylabel="bits/byte before the step")
    axes.legend()
    save(figure, args.out / "shift.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--domains", nargs="+", required=True, metavar="DATA", help="prepared data or text, that of pretraining first")
    add("--model", action="append", required=True, metavar="NAME=CHECKPOINT[,SECTION.FIELD=VALUE,...]")
    add("--steps", type=int, default=60, help="optimizer steps on one domain before the next (default 60)")
    add("--rounds", type=int, default=2, help="times around all domains (default 2)")
    add("--seeds", type=int, default=3, help="orders of the text (default 3)")
    add("--out", type=Path, default=Path("runs/shift"), help="folder for report.md, report.json and shift.png")
    args = parser.parse_args()
    try:
        models = dict(model.split("=", 1) for model in args.model if "=" in model)
        if len(models) < len(args.model) or len(args.domains) < 2 or args.steps < 4 * ENDS:
            raise ConfigError(f"give two or more --domains, {4 * ENDS} or more --steps, and --model NAME=CHECKPOINT")
        (args.out / "index").mkdir(parents=True, exist_ok=True)
        set_up_torch(find_place(None))
        results = []
        for seed in range(1, args.seeds + 1):
            for name, spec in models.items():
                results.append(run(name, spec, seed, args))
                print(
                    f"{name}, seed {seed}: {json.dumps(stretches(results[-1], args.steps, len(args.domains)))}",
                    flush=True,
                )
    except UserError as error:
        return error.report()
    write_json(str(args.out / "report.json"), results)
    text = report(results, args)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    draw(results, args)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
