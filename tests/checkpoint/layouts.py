"""Small engines of every layout, trained on a counting machine: what the checkpoint tests move between."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vqmoe_ds.checkpoint.open import open_checkpoint
from vqmoe_ds.config.deepspeed_json import resolve
from vqmoe_ds.config.load import load_config

BATCH, SAVED_AT = 8, 3
MODEL = {
    **{"model.vocab_size": 61, "model.layers": 2, "model.width": 16, "model.heads": 2, "model.sequence_length": 16},
    **{"moe.num_experts": 4, "moe.expert_hidden": 12, "moe.top_k": 1, "codebook.num_codes": 8},
    **{"codebook.source_momentum": 0.9, "codebook.kmeans_samples": 64, "train.batch_size": BATCH, "train.steps": 60},
    **{"train.warmup_steps": 4, "train.learning_rate": 0.01},
}


@dataclass(frozen=True)
class Layout:
    """One way to spread a model. ``extra``: ``o`` optimizer on the CPU, ``p`` nothing persistent at ZeRO-3."""

    stage: int
    ep: int
    world: int
    precision: str = "fp32"
    extra: str = ""

    def __str__(self) -> str:
        return f"zero{self.stage}{self.extra}-ep{self.ep}-world{self.world}-{self.precision}"

    def deepspeed(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        values: dict[str, Any] = {"zero_optimization": zero, "gradient_clipping": 1.0}
        values["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True, "eps": 1e-7}}
        values["train_micro_batch_size_per_gpu"] = 2
        if "o" in self.extra:
            zero["offload_optimizer"] = {"device": "cpu"}
            values["zero_force_ds_cpu_optimizer"] = False
        if "p" in self.extra:
            zero["stage3_param_persistence_threshold"] = 0
        if self.precision == "bf16":
            values["bf16"] = {"enabled": True}
        return values


ALL = [Layout(stage, ep, world) for stage in range(4) for world in (1, 2, 4) for ep in (1, 2, 4) if ep <= world]


def save(session: Any, folder: Path, step: int, keep_last: int, samples: int | None = None) -> Path:
    """``begin_save``, and wait until the checkpoint is sealed; returns its path."""
    from vqmoe_ds.checkpoint.resume.session import begin_save

    sealing = begin_save(session, folder, step, keep_last, samples)
    sealing.finish()
    return sealing.tag


class Training:
    """A session and its loop; every global batch is the same on every layout."""

    def __init__(self, folder: str, layout: Layout, rank: int, **changes: Any) -> None:
        from vqmoe_ds.runtime.ranks import Place
        from vqmoe_ds.train.engine import build_session

        path = Path(folder) / f"deepspeed-{rank}.json"
        path.write_text(json.dumps(layout.deepspeed()))
        config = resolve(str(path), load_config("tiny", None, {**MODEL, **changes}), layout.world, layout.ep)
        self.session = build_session(config, Place(rank, layout.world, rank, layout.world), str(path))
        self.layout, self.rank, self.step = layout, rank, 0

    def train(self, steps: int) -> list[float]:
        return [self._train_step() for _ in range(steps)]

    def _train_step(self) -> float:
        from vqmoe_ds.train.engine import apply_step, set_learning_rate
        from vqmoe_ds.train.loop import full_embedding
        from vqmoe_ds.train.schedule import learning_rate

        session, rounds = self.session, self.session.config.accumulation_steps
        set_learning_rate(session.engine, learning_rate(self.step, session.config.run.train))
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(rounds):
            first = (micro * self.layout.world + self.rank) * 2
            tokens, targets = _sequences(self.step, first, 2)
            loss, aux = session.engine(tokens, targets)
            session.engine.backward(loss + aux)
            total += loss.detach().double()
            if micro < rounds - 1:
                session.engine.step()
        assert apply_step(session.engine, True)
        if session.sync is not None:
            session.sync.step()
        if session.model.source is not None:
            session.model.source.follow(full_embedding(session))
        self.step += 1
        if self.layout.world > 1:
            dist.all_reduce(total)
        return float(total) / (rounds * self.layout.world)

    def save(self, folder: str | Path) -> Path:
        return save(self.session, Path(folder), self.step, 1)

    def restore(self, path: str | Path) -> None:
        from vqmoe_ds.checkpoint.resume.restore import restore_any_layout

        self.step = restore_any_layout(self.session, open_checkpoint(path))

    def close(self) -> None:
        self.session.engine.destroy()


def _sequences(step: int, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 * step + number)
        start, stride = torch.randint(1, 61, (2,), generator=generator).tolist()
        noise = torch.rand(17, generator=generator) < 0.1
        rows.append((start + (stride % 3 + 1) * torch.arange(17) + 17 * noise) % 61)
    tokens = torch.stack(rows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def write_one(rank: int, world: int, folder: str, layout: Layout, changes: dict[str, Any]) -> list[str]:
    """Save a model with other options after one step; returns the names of its parameters."""
    training = Training(folder, layout, rank, **changes)
    training.train(1)
    training.save(folder)
    return [name for name, _ in training.session.model.named_parameters()]


def load_natively(
    rank: int,
    world: int,
    folder: str,
    tags: list[tuple[str, Layout]],
    steps: int,
    changes: dict[str, Any] | None = None,
) -> list[list[float]]:
    """Losses after DeepSpeed's own ``load_checkpoint`` of each tag folder under ``folder``."""
    losses = []
    for name, layout in tags:
        training = Training(folder, layout, rank, **changes or {})
        tag = open_checkpoint(Path(folder) / name).path
        training.session.engine.load_checkpoint(str(tag.parent), tag=tag.name)
        training.step = SAVED_AT
        losses.append(training.train(steps))
        training.close()
    return losses


def write_sources(
    rank: int, world: int, folder: str, layouts: list[Layout], steps: int, changes: dict[str, Any] | None = None
) -> dict[Layout, list[float]]:
    """Train, save after ``SAVED_AT`` steps, go on for ``steps``: the losses of the run that never moved."""
    losses = {}
    for layout in layouts:
        training = Training(folder, layout, rank, **changes or {})
        training.train(SAVED_AT)
        training.save(Path(folder) / str(layout))
        losses[layout] = training.train(steps)
        training.close()
    return losses


def move(
    rank: int,
    world: int,
    folder: str,
    jobs: list[tuple[str, Layout]],
    steps: int,
    save_to: str = "",
    changes: dict[str, Any] | None = None,
) -> list[list[float]]:
    """Restore each source (a folder under ``folder``) on its target, optionally save it at once, and go on."""
    losses = []
    for source, target in jobs:
        training = Training(folder, target, rank, **changes or {})
        training.restore(Path(folder) / source)
        if save_to:
            training.save(Path(folder) / save_to / f"{source}-to-{target}")
        losses.append(training.train(steps))
        training.close()
    return losses
