#!/usr/bin/env python
"""Savings of the discrete path alone: parameters, FLOPs, memory and speed, before and after (docs/finetuning.md).

    python benchmarks/discrete_path.py runs/vq runs/topk2                   # a vq run is also measured discrete alone
    python benchmarks/discrete_path.py runs/vq runs/topk2 --repeats 20 --json saves.json
    python benchmarks/discrete_path.py --presets base 64e large             # counts alone, nothing is built

Counted: parameters stored and used by a token, FLOPs of a token's forward pass (``models/flops.py``), bytes of weights.
Measured, each in a process of its own on held-out text of the first run: tokens per second and peak memory of a forward
pass, of text generated with a cache (``tools/generate.py``), and of a training step of all weights (AdamW, without
DeepSpeed). Models take turns, so that a busy machine slows all of them; speeds are medians. Memory is the peak resident
size, less that of the process before it loads the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from measuring import peak_bytes, seconds, table, write_json

from vqmoe_ds.config.load import load_config, preset_names
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.runtime.errors import DataError, reports_errors

TASKS = ("forward", "generate", "train")
AFTER = ", discrete alone"
SECTIONS: dict[str, dict[str, Any]] = {
    "vq, both paths": {"moe.router": "vq", "moe.top_k": 1},
    f"vq{AFTER}": {"moe.router": "vq", "moe.top_k": 0},
    "topk, two": {"moe.router": "topk", "moe.top_k": 2},
    "topk, one": {"moe.router": "topk", "moe.top_k": 1},
    "hash_token": {"moe.router": "hash_token", "moe.top_k": 1},
    "adaptive_clustering, two": {"moe.router": "adaptive_clustering", "moe.top_k": 2},
    "dense, as wide as two": {"moe.router": "dense", "moe.top_k": 2},
}


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.alone:
        print(json.dumps(measure(options)))
        return 0
    rows = [row for preset in options.presets for row in count_preset(preset)]
    with tempfile.TemporaryDirectory() as folder:
        rows += compare(options, Path(folder)) if options.checkpoints else []
    print(report(rows))
    write_json(options.json, rows)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="*", help="as launchers/evaluate.py takes them")
    parser.add_argument("--presets", nargs="+", default=[], choices=preset_names(), help="count these sizes")
    parser.add_argument("--windows", type=int, default=8, help="of a forward pass or training step (default 8)")
    parser.add_argument("--tokens", type=int, default=200, help="generated in one go (default 200)")
    parser.add_argument("--repeats", type=int, default=10, help="passes or steps timed in a turn (default 10)")
    parser.add_argument("--turns", type=int, default=3, help="processes a model and task (default 3)")
    parser.add_argument("--json", help="write the figures to a file, or to the terminal with -")
    parser.add_argument("--alone", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--text", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- counted


def count_preset(preset: str) -> list[dict[str, Any]]:
    """A preset with both paths, with the discrete one alone, and with a linear router."""
    return [count(f"{preset}: {name}", load_config(preset, None, changes).config) for name, changes in SECTIONS.items()]


def count(name: str, config: RunConfig) -> dict[str, Any]:
    """Parameters and FLOPs of a configuration; nothing is built."""
    from vqmoe_ds.models.flops import forward_flops
    from vqmoe_ds.planning.parameters import count as count_parameters

    parameters, flops = count_parameters(config), forward_flops(config)
    return {
        "name": name,
        "stored": parameters.stored,
        "active": parameters.active,
        "flops": flops.total,
        "weight_bytes": 4 * parameters.stored,
        "experts_share_of_blocks": (flops.experts + flops.dense) / (flops.total - flops.head),
        "experts_share": (flops.experts + flops.dense) / flops.total,
        "flops_of": flops._asdict(),
    }


# ---------------------------------------------------------------- measured


def compare(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of all checkpoints, vq ones a second time with their discrete path alone."""
    from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config
    from vqmoe_ds.checkpoint.open import open_checkpoint

    paths: dict[str, str] = {}
    for number, path in enumerate(options.checkpoints):
        paths[path] = path
        moe = open_checkpoint(path).config["moe"]
        if moe["router"] == "vq" and moe["top_k"]:
            paths[path + AFTER] = discrete(path, folder / str(number))
    rows = []
    for name, path in paths.items():
        reader = open_checkpoint(path)
        rows.append(count(name, run_config(reader.config, reader.path)))
    text = save_text(options.checkpoints[0], options.windows, folder / "tokens.npy")
    for _ in range(options.turns):
        for task in TASKS:
            for row in rows:
                found = in_a_process(task, paths[row["name"]], text, options)
                row.setdefault(f"{task}_tokens_per_second_all", []).extend(found["tokens_per_second"])
                row[f"{task}_peak_bytes"] = max(row.get(f"{task}_peak_bytes", 0), found["peak_bytes"])
    for row in rows:
        for task in TASKS:
            row[f"{task}_tokens_per_second"] = statistics.median(row.pop(f"{task}_tokens_per_second_all"))
    return rows


def discrete(path: str, target: Path) -> str:
    """The checkpoint with its discrete path alone, as ``tools/convert_checkpoint.py`` writes it."""
    from vqmoe_ds.checkpoint.convert import build_parser, convert

    convert(build_parser("").parse_args([path, str(target), "--to", "discrete-only"]))
    return str(target)


def save_text(path: str, windows: int, target: Path) -> str:
    """Windows of the run's held-out text, ``[B, S + 1]``, as a file."""
    from vqmoe_ds.checkpoint.load_model import load_model
    from vqmoe_ds.evaluation.texts import open_texts

    loaded = load_model(path)
    length = loaded.config.model.sequence_length + 1
    ids_N = np.concatenate([text.ids_N for text in open_texts(loaded, None, "valid", windows * length)])
    if len(ids_N) < length:
        raise DataError(f"the held-out text of {path} is shorter than one window of {length} tokens")
    np.save(target, ids_N[: len(ids_N) // length * length].reshape(-1, length))
    return str(target)


def in_a_process(task: str, path: str, text: str, options: argparse.Namespace) -> dict[str, Any]:
    told = [str(value) for name in ("tokens", "repeats") for value in (f"--{name}", getattr(options, name))]
    command = [sys.executable, __file__, path, "--alone", task, "--text", text, *told]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} of {path} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One task of one checkpoint, in this process."""
    import torch

    from vqmoe_ds.checkpoint.load_model import load_model
    from vqmoe_ds.runtime.allocator import tune_allocator

    tune_allocator()
    tokens_BS = torch.from_numpy(np.load(options.text))
    prepare = {"forward": _forward, "generate": _generate, "train": _train}[options.alone]
    before = peak_bytes()
    step = prepare(load_model(options.checkpoints[0]), tokens_BS, options)
    tokens = options.tokens if options.alone == "generate" else tokens_BS[:, 1:].numel()
    for _ in range(2):
        step()
    speeds = [tokens / seconds(step) for _ in range(1 if options.alone == "generate" else options.repeats)]
    return {"tokens_per_second": speeds, "peak_bytes": peak_bytes() - before}


def _forward(loaded: Any, tokens_BS: Any, options: argparse.Namespace) -> Callable[[], Any]:
    import torch

    @torch.no_grad()
    def step() -> None:
        loaded.model(tokens_BS[:, :-1])

    return step


def _generate(loaded: Any, tokens_BS: Any, options: argparse.Namespace) -> Callable[[], Any]:
    from vqmoe_ds.evaluation.generate import Sampling, generate

    model, prompt = loaded.config.model, tokens_BS[0, :8].tolist()

    def step() -> None:
        new = generate(
            loaded.model, prompt, Sampling(), model.sequence_length, model.vocab_size, loaded.model.new_cache
        )
        list(islice(new, options.tokens))

    return step


def _train(loaded: Any, tokens_BS: Any, options: argparse.Namespace) -> Callable[[], Any]:
    import torch

    from vqmoe_ds.moe.state_sync import StateSync

    model = loaded.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    sync = StateSync(model)

    def step() -> None:
        loss, aux_loss = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
        (loss + aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        sync.step()

    return step


# ---------------------------------------------------------------- the table

COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "stored": ("stored", lambda n: f"{n / 1e6:.2f} M"),
    "used by a token": ("active", lambda n: f"{n / 1e6:.2f} M"),
    "FLOPs per token": ("flops", lambda n: f"{n / 1e6:.2f} M"),
    "in experts": ("experts_share", lambda n: f"{n:.0%}"),
    "in experts, head left out": ("experts_share_of_blocks", lambda n: f"{n:.0%}"),
    "weights MB": ("weight_bytes", lambda n: f"{n / 1e6:.1f}"),
    "forward MB": ("forward_peak_bytes", lambda n: f"{n / 1e6:.0f}"),
    "training MB": ("train_peak_bytes", lambda n: f"{n / 1e6:.0f}"),
    "forward tokens/s": ("forward_tokens_per_second", lambda n: f"{n:,.0f}"),
    "generated tokens/s": ("generate_tokens_per_second", lambda n: f"{n:,.0f}"),
    "training tokens/s": ("train_tokens_per_second", lambda n: f"{n:,.0f}"),
}
SHARES = ("experts_share", "experts_share_of_blocks")


def report(rows: list[dict[str, Any]]) -> str:
    """One row per model, a discrete path with its difference from the model before it."""
    titles = [title for title, (key, _) in COLUMNS.items() if any(key in row for row in rows)]
    lines = [[row["name"], *(_cell(title, i, rows) for title in titles)] for i, row in enumerate(rows)]
    return table(["", *titles], lines)


def _cell(title: str, index: int, rows: list[dict[str, Any]]) -> str:
    (key, show), row = COLUMNS[title], rows[index]
    if key not in row:
        return "-"
    if not row["name"].endswith(AFTER) or key in SHARES:
        return show(row[key])
    return f"{show(row[key])} ({row[key] / rows[index - 1][key] - 1:+.1%})"


if __name__ == "__main__":
    sys.exit(main())
