#!/usr/bin/env python
"""How long saving a checkpoint keeps training waiting, by part, on two ranks (docs/cluster.md).

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

import torch
import torch.multiprocessing as mp
from measuring import table, write_json
from peers import free_port, join_group

from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.data.batches import TrainingBatches
from vqmoe_ds.data.corpus import open_corpus, split_corpus
from vqmoe_ds.train.allocator import tune_allocator

RANKS = 2


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
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512, help="hidden width of an expert")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--writer", metavar="JSON", help="DeepSpeed's checkpoint.writer to try")
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", help="write the figures to a file, or to the terminal with -")
    return parser.parse_args()


def run_rank(rank: int, port: int, folder: str, options: argparse.Namespace, answers: Any) -> None:
    """Body of one process: train, save, train while it is sealed; rank 0 answers with bytes and seconds by part."""
    from vqmoe_ds.checkpoint import sealing
    from vqmoe_ds.checkpoint.session import begin_save
    from vqmoe_ds.train.engine import build_session
    from vqmoe_ds.train.loop import Trainer
    from vqmoe_ds.train.ranks import Place

    torch.set_num_threads(1)
    tune_allocator()
    join_group(rank, RANKS, port)
    path = Path(folder) / f"deepspeed-{rank}.json"
    optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
    path.write_text(json.dumps({"optimizer": optimizer, "zero_optimization": {"stage": 2}}))
    fields = {
        **{"model.layers": options.layers, "model.width": options.width, "model.sequence_length": 64},
        **{"moe.num_experts": options.experts, "moe.expert_hidden": options.hidden, "train.batch_size": 4},
        **{"codebook.code_map": "mod"},
    }
    config = resolve(str(path), load_config("tiny", None, fields), RANKS, RANKS)
    if options.writer:  # refused in a training's JSON
        config.deepspeed["checkpoint"] = {"writer": json.loads(options.writer)}
    session = build_session(config, Place(rank, RANKS, rank, RANKS), str(path))
    split, _ = split_corpus(open_corpus(None), 64, 10)
    trainer = Trainer(session, TrainingBatches(split, 4, 0), [])
    times: dict[str, list[float]] = defaultdict(list)
    step, save = timed(times, "a step", trainer.train_step), timed(times, "training waits", begin_save)
    while_sealing = timed(times, "a step while it is sealed", trainer.train_step)
    session.engine.save_checkpoint = timed(times, "  DeepSpeed writes its files", session.engine.save_checkpoint)
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
    torch.distributed.barrier()


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
