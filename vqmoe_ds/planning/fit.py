"""Checks whether the layout of a run fits the memory of a GPU that is there, and advice where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.planning import memory
from vqmoe_ds.planning.hardware import GB
from vqmoe_ds.planning.layouts import USABLE
from vqmoe_ds.planning.parameters import Parameters, count

CERTAIN = 0.95
"""Share of the planned bytes that a run holds for sure: the plan was compared with real runs (docs/planning.md)."""

Change = tuple[str, EngineConfig]
"""Setting that the user would write, and the layout that it gives."""


def too_large(config: EngineConfig, rank: int, capacity: int) -> str | None:
    """A sentence on why a run cannot fit a GPU of ``capacity`` bytes, and which layout would; None if it may fit.

    Counted are weights, optimizer, and the larger of gradients and what one forward pass keeps; buckets, rows in flight
    and allocator are not. A fine-tuning, part of whose weights may be frozen, is left to be tried.
    """
    if config.run.finetune.checkpoint is not None:
        return None
    parameters = count(config.run)
    need = memory.estimate(parameters, config, rank, imbalance=1.0)
    kept = memory.kept(config)
    least = CERTAIN * (need.weights + need.optimizer + max(need.gradients, kept))
    if least <= capacity:
        return None
    return (
        f"rank {rank} needs at least {least / GB:.1f} GB ({CERTAIN:.0%} of weights {need.weights / GB:.1f} + optimizer "
        f"{need.optimizer / GB:.1f} + the larger of gradients {need.gradients / GB:.1f} and activations "
        f"{kept / GB:.1f}), but its GPU has {capacity / GB:.1f} GB; {_advice(parameters, config, rank, capacity)}"
    )


def least_bytes(config: EngineConfig, rank: int) -> int:
    """Bytes that ``rank`` surely holds: ``CERTAIN`` of weights, optimizer, and the larger of gradients and activations,
    wherever the optimizer lies."""
    need = memory.estimate(count(config.run), config, rank, imbalance=1.0)
    return round(CERTAIN * (need.weights + need.optimizer + need.host + max(need.gradients, memory.kept(config))))


def advice(config: EngineConfig, rank: int, capacity: int) -> str:
    """Changes that would make a run fit ``capacity`` bytes on ``rank``, by the plan, as the end of a sentence."""
    if config.run.finetune.checkpoint is not None:
        return "take a smaller micro-batch or train.activation_checkpointing=true"
    return _advice(count(config.run), config, rank, capacity)


def _advice(parameters: Parameters, config: EngineConfig, rank: int, capacity: int) -> str:
    def fits(changed: EngineConfig) -> bool:
        # Advice counts all parts, with room to spare; a refusal only what is certain. Between them a run may be tried.
        return memory.estimate(parameters, changed, rank).device <= USABLE * capacity

    kinds = (_smaller_micro_batches, _recomputing, _spread_experts, _higher_stages)
    mildest = (next((text for text, changed in kind(config) if fits(changed)), None) for kind in kinds)
    alone = [text for text in mildest if text is not None]
    if alone:
        return f"what would fit: {', or '.join(alone)}"
    changed, texts = config, []
    for kind in kinds:
        for text, stronger in list(kind(changed))[-1:]:
            texts.append(text)
            changed = stronger
    if fits(changed):
        return f"what would fit: {', and '.join(texts)}"
    return (
        "no micro-batch, recomputation, expert parallelism or ZeRO stage would do on these ranks: take more or larger "
        "GPUs (tools/plan.py)"
    )


def _smaller_micro_batches(config: EngineConfig) -> Iterator[Change]:
    micro, rounds = config.micro_batch, config.accumulation_steps
    while micro % 2 == 0:
        micro, rounds = micro // 2, 2 * rounds
        yield f"train_micro_batch_size_per_gpu {micro}", replace(config, micro_batch=micro, accumulation_steps=rounds)


def _recomputing(config: EngineConfig) -> Iterator[Change]:
    train = config.run.train
    if not train.activation_checkpointing:
        run = config.run.model_copy(update={"train": train.model_copy(update={"activation_checkpointing": True})})
        yield "train.activation_checkpointing=true", replace(config, run=run)


def _spread_experts(config: EngineConfig) -> Iterator[Change]:
    size, experts = 2 * config.ep_size, config.run.moe.num_experts
    while config.run.moe.facts.has_experts and config.world_size % size == 0 and experts % size == 0:
        yield f"expert-parallel size {size}", replace(config, ep_size=size)
        size *= 2


def _higher_stages(config: EngineConfig) -> Iterator[Change]:
    for stage in range(config.zero_stage + 1, 4) if config.world_size > 1 else ():
        zero: dict[str, Any] = {**config.deepspeed.get("zero_optimization", {}), "stage": stage}
        yield f"ZeRO stage {stage}", replace(config, deepspeed={**config.deepspeed, "zero_optimization": zero})
