#!/usr/bin/env python
"""Whole steps of one model on two ranks in several layouts, beside what the planner expects of them (docs/planning.md).

    python benchmarks/layouts.py                       # about a minute on two cores
    python benchmarks/layouts.py --experts 64 --hidden 512 --json out.json

Every layout trains the same model in its own DeepSpeed engine through the real loop; layouts take turns step by step.
All planned times are scaled by one factor, which makes the first right: the table shows the shape of the model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vqmoe_ds  # noqa: F401  before torch: it sets how long idle OpenMP threads spin

# isort: split

import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import table, write_json
from peers import free_port
from scipy.stats import spearmanr
from small_training import RANKS, add_sizes, build_trainer, configure, set_up

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.planning.hardware import PROCESSORS, Cluster
from vqmoe_ds.planning.layouts import measure
from vqmoe_ds.planning.parameters import count

LAYOUTS = [(stage, ep) for stage in (0, 2, 3) for ep in (1, 2)]


def main() -> None:
    options = parse()
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (free_port(), folder, options, answers), nprocs=RANKS, join=True)
        measured = answers.get()
        expected = planned(folder, options, measured)
    rows = [[f"ZeRO-{s}, EP {e}", f"{measured[s, e]:.0f}", f"{expected[s, e]:.0f}"] for s, e in LAYOUTS]
    print(table(["layout", "ms measured", "ms planned"], rows))
    order = spearmanr([measured[x] for x in LAYOUTS], [expected[x] for x in LAYOUTS]).statistic
    print(f"\nrank correlation {order:.2f}")
    write_json(options.json, [{"layout": row[0], "measured": row[1], "planned": row[2]} for row in rows])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, layers=2)
    parser.add_argument("--batch", type=int, default=4, help="sequences of 256 tokens per step, over both ranks")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--json", help="write the figures to a file, or to the terminal with -")
    return parser.parse_args()


def configured(folder: str, options: argparse.Namespace, layout: tuple[int, int]) -> tuple[EngineConfig, str]:
    return configure(folder, options, *layout, sequence_length=256, batch=options.batch)


def run_rank(rank: int, port: int, folder: str, options: argparse.Namespace, answers: Any) -> None:
    """Body of one process: build a trainer of every layout, take turns, and have rank 0 answer."""
    set_up(rank, port)
    trainers = {layout: build_trainer(*configured(folder, options, layout), rank) for layout in LAYOUTS}
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    for repetition in range(options.repeats + 3):  # three to warm up: codes are initialized at the end of the first
        for layout, trainer in trainers.items():
            dist.barrier()
            start = time.perf_counter()
            trainer.train_step()
            dist.barrier()
            if repetition >= 3:
                times[layout].append((time.perf_counter() - start) * 1e3)
    if rank == 0:
        answers.put({layout: statistics.median(row) for layout, row in times.items()})
    dist.barrier()


def planned(folder: str, options: argparse.Namespace, measured: dict[tuple[int, int], float]) -> dict[Any, float]:
    """Milliseconds of each layout, scaled by one factor so that the first is right."""
    cluster = Cluster(1, RANKS, PROCESSORS["cpu"], 1.0)
    plans = {}
    for layout in LAYOUTS:
        config, _ = configured(folder, options, layout)
        plans[layout] = measure(count(config.run), config, cluster, 1.0).speed.step_seconds * 1e3
    scale = measured[LAYOUTS[0]] / plans[LAYOUTS[0]]
    return {layout: value * scale for layout, value in plans.items()}


if __name__ == "__main__":
    main()
