#!/usr/bin/env python
"""Time that saving a checkpoint keeps training waiting, by part, on two ranks (docs/cluster.md).

python benchmarks/checkpoint.py                     # about 0.2 GB of weights and optimizer
python benchmarks/checkpoint.py --experts 160 --folder /fast/disk
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vqmoe_ds  # noqa: F401  before torch: it sets how long idle OpenMP threads spin

# isort: split

import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import table, write_json
from peers import free_port
from small_training import RANKS, add_sizes, build_trainer, configure, set_up

from vqmoe_ds.checkpoint.resume import sealing
from vqmoe_ds.checkpoint.resume.session import begin_save


def main() -> None:
    options = parse()
    answers = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        mp.spawn(run_rank, (free_port(), folder, options, answers), nprocs=RANKS, join=True)
        size, times = answers.get()
    rows = [[part, f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"] for part, seconds in times.items()]
    print(f"{size / 1e6:.0f} MB a checkpoint, {RANKS} ranks, {options.saves} saves")
    print(table(["part", "s median", "s most"], rows))
    write_json(options.json, [{"part": part, "bytes": size, "seconds": seconds} for part, seconds in times.items()])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, layers=1)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--writer", metavar="JSON", help="DeepSpeed's checkpoint.writer to try")
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", help="write the figures to a file, or to the terminal with -")
    return parser.parse_args()


def run_rank(rank: int, port: int, folder: str, options: argparse.Namespace, answers: Any) -> None:
    """Body of one process: train, save, train while it is sealed; rank 0 answers with bytes and seconds by part."""
    set_up(rank, port)
    config, path = configure(folder, options, stage=2, ep=RANKS, sequence_length=64, batch=4)
    if options.writer:  # refused in a training's JSON
        config.deepspeed["checkpoint"] = {"writer": json.loads(options.writer)}
    trainer = build_trainer(config, path, rank)
    session = trainer.session
    times: dict[str, list[float]] = defaultdict(list)
    step, save = timed(times, "a step", trainer.train_step), timed(times, "training waits", begin_save)
    while_sealing = timed(times, "a step while it is sealed", trainer.train_step)
    session.engine.save_checkpoint = timed(times, "  DeepSpeed writes its files", session.engine.save_checkpoint)
    sealing.sync_files = timed(times, "  sealing flushes it to disk", sealing.sync_files)
    sealing.checksums = timed(times, "  sealing reads it back (twice)", sealing.checksums)
    for _ in range(options.saves + 1):  # at the first nothing is removed
        step()
        started = time.perf_counter()
        pending = save(session, Path(folder) / "checkpoints", trainer.step, keep_last=1)
        while_sealing()
        pending.finish()
        times["sealed after"].append(time.perf_counter() - started)
    if rank == 0:
        size = sum(file.stat().st_size for file in pending.tag.rglob("*") if file.is_file())
        answers.put((size, {part: seconds[1:] for part, seconds in times.items()}))
    dist.barrier()


def timed(times: dict[str, list[float]], part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose calls write their seconds down under ``part``."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times[part].append(time.perf_counter() - started)

    return call


if __name__ == "__main__":
    main()
