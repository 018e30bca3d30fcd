"""The language-model loss without a float32 copy of all logits.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.data.batches import MASKED
from vqmoe_ds.moe.derivatives import first_derivative_only
from vqmoe_ds.moe.kernels.triton_support import block_size, kernel, tl, triton, use_triton

_CPU_CHUNK, _GPU_CHUNK = (
    2**20,
    2**26,
)  # bytes of logits in float32 at a time without Triton: a core's cache; few launches
_LARGEST_BLOCK = 8192  # columns a program holds


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the targets that are not ``MASKED``, in float32; 0 where all are.

    Two-byte logits, and all logits on a GPU, are not copied to float32 as a whole and are **overwritten by their own
    gradient** in backward: nothing else may need them after that (PyTorch raises an error where something does).

    Args:
        logits_TV: contiguous.
        targets_T: int64 in ``[0, V)`` or ``MASKED``.
        count: number that the sum is divided by instead, where these are a part of the tokens.
    """
    # Sums of all tokens, divided once below: a mean over the means of chunks would count masked tokens.
    if logits_TV.device.type == "cpu" and logits_TV.element_size() >= 4 and not use_triton(logits_TV):
        total = F.cross_entropy(logits_TV, targets_T, ignore_index=MASKED, reduction="sum")
    else:
        total = _Total.apply(logits_TV, targets_T)
    return total / (targets_T.ne(MASKED).sum().clamp_min(1) if count is None else count)


class _Total(torch.autograd.Function):
    """Sum of the losses of all tokens, float32; computed once more, row by row, for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        if use_triton(logits_TV):
            losses_T, norms_T2 = _losses(logits_TV, targets_T)
            ctx.save_for_backward(logits_TV, targets_T, norms_T2)
            return losses_T.sum()
        ctx.save_for_backward(logits_TV, targets_T)
        total = logits_TV.new_zeros((), dtype=torch.float32)
        for rows, targets in _chunks(logits_TV, targets_T):
            total += F.cross_entropy(rows.float(), targets, ignore_index=MASKED, reduction="sum")
        return total

    @staticmethod
    # The gradient takes the place of the logits: what a second derivative would need is gone.
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits_TV, targets_T, *norms = ctx.saved_tensors
        if norms:
            _write_gradient(logits_TV, targets_T, norms[0], grads[0])
            return logits_TV, None
        for rows, targets in _chunks(logits_TV, targets_T):
            g = torch.softmax(rows.float(), dim=1)
            # Masked targets point at column 0 here; the factor 0 below clears their rows.
            g[torch.arange(len(rows), device=rows.device), targets.clamp_min(0)] -= 1
            rows.copy_(g.mul_((targets.ne(MASKED) * grads[0]).unsqueeze(1)))
        return logits_TV, None


def _chunks(logits_TV: Tensor, targets_T: Tensor) -> zip[tuple[Tensor, Tensor]]:
    chunk = _CPU_CHUNK if logits_TV.is_cpu else _GPU_CHUNK
    rows = max(1, chunk // (4 * max(1, logits_TV.shape[1])))
    # Views, for backward writes the gradient into them.
    return zip(logits_TV.split(rows), targets_T.split(rows), strict=True)


def _losses(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each token, 0 where masked, and the maximum and the log of the sum of exp(logits - maximum), float32.

    The two are kept apart: added, they would round away the small digits of the second.
    """
    tokens, vocabulary = logits_TV.shape
    losses_T = logits_TV.new_empty(tokens, dtype=torch.float32)
    norms_T2 = losses_T.new_empty(tokens, 2)
    if tokens:
        sizes = {"MASK": MASKED, "BLOCK": block_size(vocabulary, _LARGEST_BLOCK), "num_warps": 8}
        _loss_kernel[(tokens,)](logits_TV, targets_T, losses_T, norms_T2, vocabulary, **sizes)
    return losses_T, norms_T2


def _write_gradient(logits_TV: Tensor, targets_T: Tensor, norms_T2: Tensor, g: Tensor) -> None:
    tokens, vocabulary = logits_TV.shape
    if tokens:
        block = block_size(vocabulary, _LARGEST_BLOCK)
        grid = (tokens, triton.cdiv(vocabulary, block))
        sizes = {"MASK": MASKED, "BLOCK": block, "num_warps": 8}
        _gradient_kernel[grid](logits_TV, targets_T, norms_T2, g, vocabulary, **sizes)
        torch.autograd.graph.increment_version(logits_TV)  # PyTorch did not see the kernel write


@kernel
def _loss_kernel(
    logits_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    losses_ptr: tl.tensor,
    norms_ptr: tl.tensor,
    vocabulary: tl.tensor,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # 64 bits: token * vocabulary reaches 2^31, as with 16,384 tokens and 131,072 ids.
    token = tl.program_id(0).to(tl.int64)
    largest = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        x = tl.load(logits_ptr + token * vocabulary + column, mask=inside, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(x, axis=0))
        # While all columns so far are minus infinity, -inf - -inf would be nan.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(x - shift), axis=0)
    log_total = tl.log(total)
    target = tl.load(targets_ptr + token)
    known = (target >= 0) & (target < vocabulary)  # a target out of range is no address: its loss is nan
    chosen = tl.load(logits_ptr + token * vocabulary + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(losses_ptr + token, tl.where(target != MASK, log_total - (chosen - largest), 0.0))
    tl.store(norms_ptr + 2 * token, largest)
    tl.store(norms_ptr + 2 * token + 1, log_total)


@kernel
def _gradient_kernel(
    logits_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    norms_ptr: tl.tensor,
    g_ptr: tl.tensor,
    vocabulary: tl.tensor,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    x = tl.load(logits_ptr + token * vocabulary + column, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(targets_ptr + token)
    scale = tl.where(target != MASK, tl.load(g_ptr).to(tl.float32), 0.0)
    log_share = x - tl.load(norms_ptr + 2 * token) - tl.load(norms_ptr + 2 * token + 1)
    g = tl.exp(log_share) - tl.where(column == target, 1.0, 0.0)
    tl.store(logits_ptr + token * vocabulary + column, g * scale, mask=inside)
