"""ZeRO 1 and 2 without the passes over the gradients that change nothing (DeepSpeed 0.19.8).

On a CPU a step of the optimizer is memory traffic, and experts are most of the memory: each pass over their gradients
costs as much as a seventh of Adam. docs/performance.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from vqmoe_ds.runtime.device import uses_gpu
from vqmoe_ds.runtime.importing import quickly, step_without_dynamo, uncompiled

BLOCK, CHUNK = 4096, 65536
"""Gradient values per block of the norm, and per copy in float32 on a CPU."""


def import_optimizers(chosen: str) -> None:
    """Import what ``deepspeed.initialize`` imports for ZeRO's sake, sooner and in two thirds of the time.

    It asks of every optimizer whether it is Muon, whose kernels ``torch.compile`` decorates at their import. They stay
    compiled where Muon is chosen, on a GPU: a CPU would compile for minutes to save little.

    Args:
        chosen: ``optimizer.type`` of the DeepSpeed JSON.
    """
    with quickly(), nullcontext() if chosen.lower() == "muon" and uses_gpu() else uncompiled():
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    step_without_dynamo()


@contextmanager
def frozen_experts_allowed() -> Iterator[None]:
    """While it lasts, ZeRO 1 and 2 take models whose experts are all frozen, at which DeepSpeed asserts."""
    configure = DeepSpeedZeroOptimizer._configure_moe_settings

    def configure_if_any_learn(optimizer: Any) -> None:
        if any(map(optimizer.is_moe_group, optimizer.optimizer.param_groups)):
            configure(optimizer)
        else:
            optimizer.has_moe_layers = False  # in what it optimizes

    # On the class, for the object is made inside of ``deepspeed.initialize``.
    DeepSpeedZeroOptimizer._configure_moe_settings = configure_if_any_learn
    try:
        yield
    finally:
        DeepSpeedZeroOptimizer._configure_moe_settings = configure


def spare_passes(engine: Any) -> None:
    """Replace methods of the engine's ZeRO 1 or 2 optimizer by ones with the same results; leave other engines alone.

    Each replacement leaves to DeepSpeed's own method what is not its case.
    """
    optimizer = engine.optimizer
    # On the object, not on the class: other engines of the process keep DeepSpeed's own methods.
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    if dist.get_world_size(group=optimizer.dp_process_group) == 1:
        optimizer.gradient_average = False  # divides every gradient by 1
    _reduce_no_group_of_one(optimizer)
    _copy_no_gradient_that_owns_its_memory(optimizer)
    _take_the_norm_once(optimizer)
    _clip_only_above_the_limit(optimizer)
    _flatten_into_float32(optimizer)


def _reduce_no_group_of_one(optimizer: Any) -> None:
    """Skip the reduction in a group of one rank, where DeepSpeed would copy gradients onto themselves."""
    reduce = optimizer.allreduce_no_retain

    def reduce_if_shared(
        bucket: list[Tensor], *args: Any, process_group: Any = None, output_bucket: Any = None, **options: Any
    ) -> None:
        group = optimizer.dp_process_group if process_group is None else process_group
        if dist.get_world_size(group=group) > 1:
            return reduce(bucket, *args, process_group=process_group, output_bucket=output_bucket, **options)
        # The sum into the partition's buffer stays: micro-batches accumulate there, reduced or not.
        for gradient, output in zip(bucket, output_bucket or [None] * len(bucket), strict=True):
            optimizer._add_to_grad_partition_buffer(output, gradient)

    optimizer.allreduce_no_retain = reduce_if_shared


def _copy_no_gradient_that_owns_its_memory(optimizer: Any) -> None:
    """Skip the copy of gradients larger than a bucket, which are reduced in place: no later bucket overwrites them."""
    copy = optimizer.copy_grads_in_partition

    def copy_out_of_buckets(param: Tensor, group_idx: int | None = None) -> None:
        gradient = optimizer.get_gradient_for_reduction(param)
        large = optimizer.contiguous_gradients and param.numel() > optimizer.reduce_bucket_size
        if optimizer.cpu_offload or not large or gradient is None or group_idx is None:
            return copy(param, group_idx)
        if optimizer._use_compact_grad_partition_buffer(group_idx):
            return copy(param, group_idx)
        # Else there is nothing to copy.

    optimizer.copy_grads_in_partition = copy_out_of_buckets


def _take_the_norm_once(optimizer: Any) -> None:
    """Find overflow and norm in one pass over the gradients; DeepSpeed makes three, and writes float64 copies."""
    known: dict[int, Tensor] = {}

    def overflow() -> Tensor:
        gradients = [g for i in range(len(optimizer.bit16_groups)) for g in optimizer.averaged_gradients[i]]
        gradients = [g for g in gradients if g is not None]
        squares = sums_of_squares(gradients)
        # Of a step that was dropped: its gradients are freed, and new ones may get their ids.
        known.clear()
        # A tensor's id is its own until the step frees it, and the norm is taken before.
        known.update(zip(map(id, gradients), squares, strict=True))
        return torch.stack(squares).isfinite().all().logical_not().view(1) if squares else torch.zeros(1).bool()

    def norm(gradients: list[Tensor], params: list[Tensor], norm_type: float = 2) -> Tensor:
        assert norm_type == 2
        gradients = [g for g in gradients if not getattr(g, "_zero_padding", False)]
        # Not known where overflow is not looked for, or not among gradients that are on the device.
        squares = [known.pop(id(g), None) for g in gradients]
        missing = iter(sums_of_squares([g for g, square in zip(gradients, squares, strict=True) if square is None]))
        zero = torch.zeros((), dtype=torch.float64, device=optimizer.device)
        # float32 before the all-reduce, as in DeepSpeed's own norm: else results would differ from its.
        total = sum((next(missing) if square is None else square for square in squares), zero).float()
        # DeepSpeed sums over its model-parallel group as well, which our engines (no ``mpu``) do not have.
        dist.all_reduce(total, group=optimizer.dp_process_group)
        total = total.sqrt()
        return torch.where(total.isfinite(), total, -1.0)  # -1, by which step() knows it

    optimizer.has_overflow_partitioned_grads_serial = overflow
    optimizer.get_grad_norm_direct = norm


def sums_of_squares(gradients: list[Tensor]) -> list[Tensor]:
    """Sum of the squares of each gradient, float64 scalars on its device; not finite where one of them is not."""
    if not gradients:
        return []
    if gradients[0].is_cpu:
        return [block_norms(gradient).square().sum() for gradient in gradients]
    # A few launches for all; its sums are trees, which keep the digits that a long float32 sum would lose.
    norms = torch._foreach_norm([gradient.detach() for gradient in gradients], 2, torch.float32)
    return list(torch.stack(list(norms)).double().square().unbind())


def block_norms(gradient: Tensor) -> Tensor:
    """Norms of consecutive blocks of a gradient, float64 ``[blocks]``.

    Short blocks, since float32 sums of millions of squares lose three digits.
    """
    flat = gradient.detach().flatten()
    # PyTorch widens bfloat16 into a copy first, which stays in a CPU's cache if it is short.
    chunks = flat.split(CHUNK) if flat.is_cpu else [flat]
    return torch.cat([norms for chunk in chunks for norms in _norms(chunk)]).double()


def _norms(chunk: Tensor) -> list[Tensor]:
    whole = len(chunk) // BLOCK * BLOCK
    parts = [chunk[:whole].view(-1, BLOCK), chunk[whole:].view(1, -1)]
    return [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts]


def _clip_only_above_the_limit(optimizer: Any) -> None:
    """Skip clipping at a norm within the limit, which would scale gradients by 1; read the norm once for all groups.

    DeepSpeed waits for the device in every group, to test a norm that ``step`` has tested.
    """
    clip = optimizer.unscale_and_clip_grads
    read: list[tuple[Tensor, float]] = []

    def clip_if_needed(gradients: list[Any], norm: Any) -> None:
        limit, scale = optimizer.clip_grad, optimizer.loss_scale
        if limit <= 0 or not torch.is_tensor(norm):
            return clip(gradients, norm)
        if not read or read[0][0] is not norm:
            read[:] = [(norm, float(norm))]
        value = read[0][1]
        # DeepSpeed's test, (norm + 1e-6) / limit <= 1; NaN, and -1 for a bad norm, are left to DeepSpeed.
        if not 0 <= value < float("inf"):
            return clip(gradients, norm)
        if scale == 1.0 and value <= limit - 1e-6:
            return None
        factor = 1.0 / (((norm / scale + 1e-6) / limit).clamp(min=1.0) * scale)
        for group in gradients:
            for gradient in group if isinstance(group, list) else [group]:
                gradient.data.mul_(factor)

    optimizer.unscale_and_clip_grads = clip_if_needed


def _flatten_into_float32(optimizer: Any) -> None:
    """Copy the gradients of a group into its float32 partition at once; DeepSpeed makes a flat copy in bf16 first."""
    flattened = optimizer._get_preflattened_grad_partition

    def flatten(group: int) -> Tensor | None:
        flat = flattened(group)
        gradients = [gradient.detach().flatten() for gradient in optimizer.averaged_gradients[group]]
        like, size = optimizer.single_partition_of_fp32_groups[group], int(optimizer.partition_size[group])
        if flat is not None or any(gradient.device != like.device for gradient in gradients):
            return flat
        flat = torch.empty(size, dtype=like.dtype, device=like.device)
        sizes = [len(gradient) for gradient in gradients]
        *parts, padding = flat.split([*sizes, size - sum(sizes)])
        # As DeepSpeed pads the last partition: what torch.empty found there would end in Adam's moments.
        padding.zero_()
        torch._foreach_copy_(parts, gradients)
        return flat

    optimizer._get_preflattened_grad_partition = flatten
