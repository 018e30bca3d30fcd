"""Small trainings through the package's own session, loop and checkpoints, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqmoe_ds.checkpoint.resume import session as checkpoints
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.data.corpus import open_corpus
from vqmoe_ds.data.raw_text import TrainingBatches, split_corpus
from vqmoe_ds.train.engine import build_session
from vqmoe_ds.train.loop import Trainer

from .frame import Bench

PRECISIONS = ("bf16", "fp32", "fp16")


def fields(bench: Bench, **more: Any) -> dict[str, Any]:
    """Fields of the run configuration; in ``more``, section and field are joined by two underscores."""
    width, hidden, length = (32, 32, 32) if bench.small else (128, 192, 256)
    base = {
        "model.layers": 2,
        "model.width": width,
        "model.heads": 2,
        "model.sequence_length": length,
        "moe.num_experts": 8,
        "moe.expert_hidden": hidden,
        # As the layers and steps that it is timed beside
        "moe.output_norm": False,
        "train.learning_rate": 0.003,
        "train.batch_size": 8,
        "train.steps": 100,
        "train.warmup_steps": 2,
        "codebook.kmeans_samples": 256,
    }
    return {**base, **{name.replace("__", "."): value for name, value in more.items()}}


def settings(stage: int, precision: str, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    """A DeepSpeed JSON in which every precision is said, so that no default stands in for one."""
    kinds = {name: {"enabled": name == precision} for name in ("bf16", "fp16")}
    return {
        **kinds,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": stage},
        **more,
    }


@contextmanager
def trainer(
    bench: Bench, run: dict[str, Any], deepspeed: dict[str, Any], resume: Path | None = None
) -> Iterator[Trainer]:
    """The loop over a text that can be learned, from the start or from a checkpoint."""
    path = bench.folder / "deepspeed.json"
    path.write_text(json.dumps(deepspeed), encoding="utf-8")
    config = resolve(str(path), load_config("tiny", None, run), 1)
    session = build_session(config, bench.place, str(path))
    at = (0, 0)
    if resume is not None:
        at = checkpoints.load(session, resume), checkpoints.consumed_samples(resume)
    train, _ = split_corpus(open_corpus(str(_text(bench))), config.run.model.sequence_length, 10)
    batches = TrainingBatches(train, config.run.train.batch_size, config.run.train.seed)
    session.engine.train()
    try:
        yield Trainer(session, batches, [], at[0], at)
    finally:
        session.engine.destroy()
        del session
        bench.free()


def losses(loop: Trainer, steps: int) -> list[float]:
    return [float(loop.train_step().loss) for _ in range(steps)]


def state(loop: Trainer) -> dict[str, Tensor]:
    """Copies of what a checkpoint holds of the model, on the CPU; not at ZeRO-3, where weights are in pieces."""
    return {name: tensor.detach().cpu().clone() for name, tensor in loop.session.model.state_dict().items()}


def save(loop: Trainer, folder: Path) -> Path:
    sealing = checkpoints.begin_save(loop.session, folder, loop.step, 0, loop.samples)
    sealing.finish()
    return sealing.tag


def _text(bench: Bench) -> Path:
    """Bytes of a noisy counting machine."""
    path = bench.folder / "text.bin"
    if not path.exists():
        generator = np.random.default_rng(0)
        strides = generator.integers(1, 4, 2000).repeat(50)
        noise = (generator.random(len(strides)) < 0.05) * generator.integers(0, 64, len(strides))
        path.write_bytes((32 + (strides.cumsum() + noise) % 64).astype(np.uint8).tobytes())
    return path


def same_state(here: dict[str, Tensor], there: dict[str, Tensor]) -> bool:
    return here.keys() == there.keys() and all(torch.equal(tensor, there[name]) for name, tensor in here.items())
