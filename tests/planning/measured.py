"""What a rank of a real run holds and sends: tensors and collectives counted while two steps are trained."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.utils import groups
from torch import Tensor

from tests.checkpoint.layouts import MODEL, Layout
from vqmoe_ds.config.deepspeed_json import EngineConfig, resolve
from vqmoe_ds.config.load import load_config
from vqmoe_ds.data.corpus import open_corpus
from vqmoe_ds.data.raw_text import TrainingBatches, split_corpus

SKIPPED = 2
"""Steps before the counted one: codes are initialized at the end of the first, the second looks for dead ones."""

SIZED_BY = {
    "all_reduce": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 1,
    "all_to_all_single": 1,
    "broadcast": 0,
    "reduce": 0,
}
"""Collectives, and which of their arguments is the whole that travels."""


def observe(rank: int, world: int, folder: str, cases: list[tuple[Layout, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One run after the other on these ranks: bytes held by part, and the collectives of one whole step."""
    return [_observe(rank, world, f"{folder}/{number}", *case) for number, case in enumerate(cases)]


def _observe(rank: int, world: int, folder: str, layout: Layout, changes: dict[str, Any]) -> dict[str, Any]:
    from vqmoe_ds.train import loop

    trainer = build(rank, world, folder, layout, changes)
    for _ in range(SKIPPED):
        trainer.train_step()
    held: dict[str, int] = {}  # at the moment of the step
    apply_step = loop.apply_step

    def watching(engine: Any, finite: bool) -> bool:
        parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer_states, "host": offloaded}
        held.update({name: storage_bytes(part(engine)) for name, part in parts.items()})
        return apply_step(engine, finite)

    loop.apply_step = watching
    sent: Counter[tuple[str, int, int]] = Counter()
    try:
        with counted(sent):
            trainer.train_step()
    finally:
        loop.apply_step = apply_step
    close(trainer)
    return {"held": held, "sent": dict(sent)}


def close(trainer: Any) -> None:
    """Make room for the next trainer on these ranks, whose expert-parallel groups may be others."""
    trainer.session.engine.destroy()
    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()


def weights(engine: Any) -> list[Tensor]:
    """What forward and backward read, ZeRO-3's partitions and what it keeps whole included."""
    parts = [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
    return parts + [p.data for p in engine.module.parameters() if not hasattr(p, "ds_tensor") or p.ds_persist]


def gradients(engine: Any) -> list[Tensor]:
    """Gradients at the moment of the step, wherever the engine's optimizer keeps them."""
    own = [p.grad for p in engine.module.parameters() if p.grad is not None]
    names = ("averaged_gradients", "grad_partitions_flat_buffer", "fp32_groups_gradients_flat")
    kept = [getattr(engine.optimizer, name, None) for name in names]
    return own + [tensor for part in kept for tensor in _tensors(part)]


def optimizer_states(engine: Any) -> list[Tensor]:
    """Moments and float32 copies of weights; copies that are the weights themselves do not count."""
    optimizer = engine.optimizer
    names = ["single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"]  # ZeRO-1 and 2, ZeRO-3
    names += ["fp32_groups_flat_partition", "fp32_groups"]  # bf16 at stage 1 with float32 sums, and at stage 0
    copies = [tensor for name in names for tensor in _tensors(getattr(optimizer, name, None))]
    known = {tensor.untyped_storage().data_ptr() for tensor in weights(engine)}
    moments = _tensors(dict(getattr(optimizer, "optimizer", optimizer).state))
    return moments + [tensor for tensor in copies if tensor.untyped_storage().data_ptr() not in known]


def offloaded(engine: Any) -> list[Tensor]:
    """What an engine with its optimizer on the host keeps there."""
    optimizer = engine.optimizer
    names = ["param_buffer_of_bit16_for_cpu_offload_groups", "accumulated_grads_in_cpu", "grad_partitions_flat_buffer"]
    kept = [tensor for name in names for tensor in _tensors(getattr(optimizer, name, None))]
    partitions = getattr(optimizer, "single_partition_of_fp32_groups", None) or []
    partitions = partitions or getattr(optimizer, "fp32_partitioned_groups_flat", None) or []
    return optimizer_states(engine) + kept + [part.grad for part in partitions if part.grad is not None]


def _tensors(holder: Any) -> list[Tensor]:
    if isinstance(holder, Tensor):
        return [holder]
    if isinstance(holder, dict):
        holder = list(holder.values())
    return [tensor for part in holder for tensor in _tensors(part)] if isinstance(holder, (list, tuple)) else []


def configure(folder: Path, layout: Layout, changes: dict[str, Any]) -> tuple[EngineConfig, str]:
    """The configuration of a small run of ``layout``, and its DeepSpeed JSON, written to an own ``folder``."""
    folder.mkdir(parents=True)
    path = folder / f"{layout}.json"
    path.write_text(json.dumps({**layout.deepspeed(), **changes.get("deepspeed", {})}))
    (folder / "text.txt").write_bytes(bytes(range(32, 122)) * 200)
    values = {**MODEL, "model.vocab_size": 256, "data.path": f"{folder}/text.txt", **changes}
    values.pop("deepspeed", None)
    return resolve(str(path), load_config("tiny", None, values), layout.world, layout.ep), str(path)


def build(rank: int, world: int, folder: str, layout: Layout, changes: dict[str, Any]) -> Any:
    """The trainer of one rank, on bytes."""
    from vqmoe_ds.runtime.ranks import Place
    from vqmoe_ds.train.engine import build_session
    from vqmoe_ds.train.loop import Trainer

    mine = Path(folder) / f"rank{rank}"
    config, path = configure(mine, layout, changes)
    session = build_session(config, Place(rank, world, rank, world), path)
    split, _ = split_corpus(open_corpus(str(mine / "text.txt")), config.run.model.sequence_length, 10)
    return Trainer(session, TrainingBatches(split, config.run.train.batch_size, 0), [])


@contextmanager
def counted(sent: Counter[tuple[str, int, int]]) -> Iterator[None]:
    """Count bytes by (collective, ranks of its group, distance between them); groups of one rank send nothing."""
    backend = comm.cdb
    kept = [(dist, name, name) for name in SIZED_BY]  # DeepSpeed asks for two of them once and keeps them
    kept += [(backend, "all_gather_function", "all_gather_into_tensor")]
    kept += [(backend, "reduce_scatter_function", "reduce_scatter_tensor")]
    originals = [getattr(owner, attribute) for owner, attribute, _ in kept]

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            members = dist.get_process_group_ranks(kwargs.get("group") or dist.group.WORLD)
            if len(members) > 1:
                tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
                sent[name, len(members), members[1] - members[0]] += tensors[SIZED_BY[name]].nbytes
            return function(*args, **kwargs)

        return call

    for (owner, attribute, name), function in zip(kept, originals, strict=True):
        setattr(owner, attribute, counting(name, function))
    try:
        yield
    finally:
        for (owner, attribute, _), function in zip(kept, originals, strict=True):
            setattr(owner, attribute, function)


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())
