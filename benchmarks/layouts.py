#!/usr/bin/env python
"""Whole steps of one model on two ranks in several layouts, beside what the planner expects of them (docs/planning.md).

    python benchmarks/layouts.py                       # about a minute on two cores
    python benchmarks/layouts.py --experts 64 --hidden 512 --json out.json

Every layout trains the same model in its own DeepSpeed engine through the real loop; layouts take turns step by step.
All planned times are scaled by one factor, which makes the first right: the table shows the shape of the model.
"""

from __future__ import annotations

import argparse
import json
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

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import table, write_json
from peers import free_port, join_group
from scipy.stats import spearmanr

from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.data.batches import TrainingBatches
from vqmoe_ds.data.corpus import open_corpus, split_corpus
from vqmoe_ds.planning.hardware import PROCESSORS, Cluster
from vqmoe_ds.planning.layouts import measure
from vqmoe_ds.planning.parameters import count
from vqmoe_ds.train.allocator import tune_allocator

RANKS = 2
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
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512, help="hidden width of an expert")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="sequences of 256 tokens a step, over both ranks")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--json", help="write the figures to a file, or to the terminal with -")
    return parser.parse_args()


def configure(folder: str, options: argparse.Namespace, stage: int, ep: int) -> tuple[EngineConfig, str]:
    """The configuration of one layout, through the same checks as a training."""
    path = Path(folder) / f"zero{stage}-{time.time_ns()}.json"
    optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
    path.write_text(json.dumps({"optimizer": optimizer, "zero_optimization": {"stage": stage, "overlap_comm": False}}))
    fields = {
        **{"model.layers": options.layers, "model.width": options.width, "model.sequence_length": 256},
        **{"moe.num_experts": options.experts, "moe.expert_hidden": options.hidden, "codebook.num_codes": 0},
        **{"train.batch_size": options.batch, "codebook.code_map": "mod"},
    }
    return resolve(str(path), load_config("tiny", None, fields), RANKS, ep), str(path)


def run_rank(rank: int, port: int, folder: str, options: argparse.Namespace, answers: Any) -> None:
    """Body of one process: build a trainer of every layout, take turns, and have rank 0 answer."""
    from vqmoe_ds.train.engine import build_session
    from vqmoe_ds.train.loop import Trainer
    from vqmoe_ds.train.ranks import Place

    torch.set_num_threads(1)
    tune_allocator()
    join_group(rank, RANKS, port)
    trainers = {}
    for stage, ep in LAYOUTS:
        config, path = configure(folder, options, stage, ep)
        session = build_session(config, Place(rank, RANKS, rank, RANKS), path)
        split, _ = split_corpus(open_corpus(None), 256, 10)
        trainers[stage, ep] = Trainer(session, TrainingBatches(split, options.batch, 0), [])
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    for repetition in range(options.repeats + 3):  # three to warm up: codes are born at the end of the first
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
    for stage, ep in LAYOUTS:
        config, _ = configure(folder, options, stage, ep)
        plans[stage, ep] = measure(count(config.run), config, cluster, 1.0).speed.step_seconds * 1e3
    scale = measured[LAYOUTS[0]] / plans[LAYOUTS[0]]
    return {layout: value * scale for layout, value in plans.items()}


if __name__ == "__main__":
    main()
