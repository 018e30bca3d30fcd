#!/usr/bin/env python
"""Training steps of ranks that share every sequence and the experts: what travels, and how long a step takes.

    python benchmarks/sequence_parallel.py                  # 2 ranks, then 4; about five minutes on two cores
    python benchmarks/sequence_parallel.py --ranks 2 --sequence 4096 --json out.json

Four models of one size train through the real loop on the text that comes with the package, taking turns step by step:
top-2 and top-1 with a learned router, and codes whose tokens stay at their positions or go to the rank of their experts
(``train.sp_placement``). Bytes are counted where they are sent, of all ranks, without what a rank keeps for itself.
*Busiest rank*: expert rows of the rank that computes most, in units of the mean, over the steps that are timed.
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

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import table, write_json
from peers import free_port
from small_training import add_sizes, build_trainer, configure, set_up

import vqmoe_ds.moe.dispatch as dispatch
from vqmoe_ds.train.loop import Trainer

CODES = {"moe.router": "vq", "moe.top_k": 0, "codebook.code_map": "balanced"}
VARIANTS: dict[str, dict[str, Any]] = {
    "top-2": {"moe.router": "topk", "moe.top_k": 2},
    "top-1": {"moe.router": "topk", "moe.top_k": 1},
    "codes, tokens at their positions": CODES,
    "codes, tokens at their experts": {**CODES, "train.sp_placement": "expert"},
}
WARM_UP = 4
"""Steps before the first that is timed: codes are initialized at the end of the first."""


def main() -> None:
    options = parse()
    runs = []
    for ranks in options.ranks:
        context = mp.get_context("spawn")
        answers = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_rank, (ranks, free_port(), folder, options, answers), nprocs=ranks, join=True)
            runs.append({"ranks": ranks, "variants": answers.get()})
        print(report(runs[-1]), flush=True)
    write_json(options.json, runs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, layers=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--json", help="write the figures to a file, or to the terminal with -")
    return parser.parse_args()


def run_rank(rank: int, ranks: int, port: int, folder: str, options: argparse.Namespace, answers: Any) -> None:
    """Body of one process: every variant in turn, step by step; rank 0 answers."""
    set_up(rank, port, ranks)
    sent = Sent(options.width)
    trainers = {name: build(name, rank, ranks, folder, options) for name in VARIANTS}
    times, crossed = defaultdict[str, list[float]](list), defaultdict[str, list[list[int]]](list)
    for step in range(WARM_UP + options.repeats):
        for name, trainer in trainers.items():
            if step == WARM_UP:
                for layer in trainer.session.model.moe_layers():
                    layer.tokens_per_expert.zero_()
            sent.bytes = {"attention": 0, "experts": 0}
            dist.barrier()
            start = time.perf_counter()
            trainer.train_step()
            dist.barrier()
            if step >= WARM_UP:
                times[name].append((time.perf_counter() - start) * 1e3)
                crossed[name].append(list(sent.bytes.values()))
    found = {}
    for name, trainer in trainers.items():
        bytes_2 = torch.tensor(crossed[name], dtype=torch.float64).mean(0)
        dist.all_reduce(bytes_2)
        found[name] = {"ms": times[name], "bytes": bytes_2.tolist(), "busiest": busiest(trainer, ranks)}
    if rank == 0:
        answers.put(found)


def build(name: str, rank: int, ranks: int, folder: str, options: argparse.Namespace) -> Trainer:
    """The loop of one variant, with ``ranks`` ranks that share sequences and experts."""
    shared = {"model.heads": 8, "codebook.num_codes": 4 * options.experts, "codebook.groups": ranks}
    shared |= {"train.sequence_parallel_size": ranks, **VARIANTS[name]}
    config, path = configure(folder, options, 1, ranks, options.sequence, options.batch, ranks, shared)
    return build_trainer(config, path, rank)


class Sent:
    """Counts bytes that this rank sends to others in all-to-alls: of attention's exchange, and of experts' rows."""

    def __init__(self, width: int) -> None:
        self.bytes, self._width = {"attention": 0, "experts": 0}, width
        self._send = dispatch._all_to_all
        dispatch._all_to_all = self._counted

    def _counted(
        self, rows: torch.Tensor, send: list[int], receive: list[int], group: Any, works: list[Any] | None = None
    ) -> torch.Tensor:
        # Experts get whole states; what attention exchanges has a rank's heads alone, or many positions in a row.
        purpose = "experts" if rows.shape[1] == self._width else "attention"
        crossing = sum(send) - send[dist.get_rank(group)]
        self.bytes[purpose] += crossing * rows.shape[1] * rows.element_size()
        return self._send(rows, send, receive, group, works)


def busiest(trainer: Trainer, ranks: int) -> float:
    """Rows of the rank whose experts got most, over the mean; the largest of all layers."""
    shares = []
    for layer in trainer.session.model.moe_layers():
        rows_N = trainer.session.sum_over_ranks(layer.tokens_per_expert.clone())
        rows_P = rows_N.view(ranks, -1).sum(1)
        shares.append(float(rows_P.max() / rows_P.mean()))
    return max(shares)


def report(run: dict[str, Any]) -> str:
    columns = ["", "step, ms (median)", "best", "MB to other ranks, attention", "experts", "busiest rank"]
    rows = []
    for name, found in run["variants"].items():
        attention, experts = (f"{size / 1e6:.1f}" for size in found["bytes"])
        times = [f"{statistics.median(found['ms']):.0f}", f"{min(found['ms']):.0f}"]
        rows.append([name, *times, attention, experts, f"{found['busiest']:.2f}"])
    return f"{run['ranks']} ranks\n\n{table(columns, rows)}\n"


if __name__ == "__main__":
    main()
