"""Trainings of a small model that benchmarks put through the real loop, on ranks of one thread each (two, mostly)."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peers import join_group

from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.data.corpus import open_corpus
from vqmoe_ds.data.raw_text import TrainingBatches, split_corpus
from vqmoe_ds.runtime.allocator import tune_allocator
from vqmoe_ds.runtime.ranks import Place
from vqmoe_ds.train.engine import build_session
from vqmoe_ds.train.loop import Trainer

RANKS = 2


def add_sizes(parser: argparse.ArgumentParser, layers: int) -> None:
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512, help="hidden width of an expert")
    parser.add_argument("--layers", type=int, default=layers)


def configure(
    folder: str,
    options: argparse.Namespace,
    stage: int,
    ep: int,
    sequence_length: int,
    batch: int,
    ranks: int = RANKS,
    more: dict[str, Any] | None = None,
) -> tuple[EngineConfig, str]:
    """The configuration of one layout, through the same checks as a training, and its DeepSpeed JSON.

    Args:
        more: further fields.
    """
    path = Path(folder) / f"zero{stage}-{time.time_ns()}.json"
    optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
    path.write_text(
        json.dumps({"optimizer": optimizer, "zero_optimization": {"stage": stage, "overlap_comm": False}}),
        encoding="utf-8",
    )
    fields = {
        "model.layers": options.layers,
        "model.width": options.width,
        "model.sequence_length": sequence_length,
        "moe.num_experts": options.experts,
        "moe.expert_hidden": options.hidden,
        "moe.output_norm": False,
        "train.learning_rate": 0.003,
        "codebook.num_codes": 0,
        "train.batch_size": batch,
        "codebook.code_map": "mod",
    }
    return resolve(str(path), load_config("tiny", None, fields | (more or {})), ranks, ep), str(path)


def set_up(rank: int, port: int, ranks: int = RANKS) -> None:
    """One of the ranks' processes, before its first trainer."""
    torch.set_num_threads(1)
    tune_allocator()
    join_group(rank, ranks, port)


def build_trainer(config: EngineConfig, path: str, rank: int) -> Trainer:
    """An engine of ``configure``'s, and the loop over the text that comes with the package."""
    run = config.run
    session = build_session(config, Place(rank, config.world_size, rank, config.world_size), path)
    split, _ = split_corpus(open_corpus(None), run.model.sequence_length, 10)
    return Trainer(session, TrainingBatches(split, run.train.batch_size, 0), [])
