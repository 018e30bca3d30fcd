"""Tokens to sorted rows and back, with the weighted sum over the rows of a token, in one pass over memory each way.

Legend: T tokens, R routed rows per token, M = T * R rows sorted by expert, D width.

``order_M`` says which row ``token * R + slot`` stands at each sorted place, ``inverse_M`` at which place each row
stands. Two kernels do all four moves, for each is the other's gradient: *spread* writes every token to its R places,
*gather* adds the R places of every token in slot order. A place belongs to one token, so nothing is added atomically
and results do not depend on timing. Without Triton the same moves are PyTorch's, which are the faster ones on CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.moe.derivatives import first_derivative_only
from vqmoe_ds.moe.kernels.triton_support import block_size, kernel, tl, triton, use_triton

_LARGEST_BLOCK = 4096  # columns a program holds


def expand_rows(x_TD: Tensor, order_M: Tensor, inverse_M: Tensor, routes: int) -> Tensor:
    """Tokens ``[T, D]`` copied R times and sorted by expert, ``[M, D]``."""
    rows_MD: Tensor = _Expand.apply(x_TD, order_M, inverse_M, routes)
    return rows_MD


def combine_rows(rows_MD: Tensor, order_M: Tensor, inverse_M: Tensor, weights_TR: Tensor | None, routes: int) -> Tensor:
    """The sum of each token's rows, ``[T, D]``, weighted where there are weights (``[T, R]``, any float type).

    Kernels multiply and add in float32 in slot order and round once; the gradient of the weights is a float32 dot
    product.
    """
    if use_triton(rows_MD):
        y_TD: Tensor = _Combine.apply(rows_MD, inverse_M, weights_TR, routes)
        return y_TD
    rows_TRD = PermuteRows.apply(rows_MD, inverse_M, order_M).view(-1, routes, rows_MD.shape[-1])
    if routes == 1:
        y_TD = rows_TRD.squeeze(1)
        return y_TD if weights_TR is None else y_TD * weights_TR.to(y_TD.dtype)
    if weights_TR is None:
        return rows_TRD.sum(dim=1)
    # Not bmm: T products of a 1 x R by an R x D matrix cost four times as much on CPU.
    return (rows_TRD * weights_TR.to(rows_TRD.dtype).unsqueeze(-1)).sum(dim=1)


class PermuteRows(torch.autograd.Function):
    """Rows in another order; the gradient is a gather by the inverse order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        # The backward of PyTorch's own index_select is an index_add, which adds in any order on CUDA.
        ctx.save_for_backward(inverse)
        return _take(rows, order)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _take(grads[0], inverse), None, None


class _Expand(torch.autograd.Function):
    """``expand_rows``; its gradient gathers the R rows of a token and adds them in slot order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_M: Tensor, inverse_M: Tensor, routes: int) -> Tensor:
        ctx.save_for_backward(inverse_M)
        ctx.routes = routes
        if use_triton(x_TD):
            return _spread(x_TD, inverse_M, None, None, routes)[0]
        return x_TD.index_select(0, order_M // routes if routes > 1 else order_M)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_M,) = ctx.saved_tensors
        if use_triton(grads[0]):
            return _gather(grads[0], inverse_M, None, ctx.routes), None, None, None
        rows = grads[0].index_select(0, inverse_M)
        if ctx.routes > 1:
            rows = rows.view(-1, ctx.routes, rows.shape[-1]).sum(dim=1)
        return rows, None, None, None


class _Combine(torch.autograd.Function):
    """``combine_rows`` in kernels. The rows are kept only where the weights need a gradient."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, inverse_M: Tensor, weights_TR: Tensor | None, routes: int) -> Tensor:
        rows_MD = rows_MD.contiguous()
        # Rows are the largest tensors of a layer; without weights their gradient needs the permutation alone.
        ctx.save_for_backward(inverse_M, weights_TR, rows_MD if ctx.needs_input_grad[2] else None)
        ctx.routes = routes
        return _gather(rows_MD, inverse_M, weights_TR, routes)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        inverse_M, weights_TR, rows_MD = ctx.saved_tensors
        g_rows_MD, g_weights_TR = _spread(grads[0], inverse_M, weights_TR, rows_MD, ctx.routes)
        return g_rows_MD, None, g_weights_TR, None


def _take(rows: Tensor, order: Tensor) -> Tensor:
    return _gather(rows, order, None, 1) if use_triton(rows) else rows.index_select(0, order)


def _gather(rows_MD: Tensor, inverse_M: Tensor, weights_TR: Tensor | None, routes: int) -> Tensor:
    """y[t] = sum over r of weights[t, r] * rows[inverse[t * R + r]]."""
    rows_MD, tokens, width = rows_MD.contiguous(), len(inverse_M) // routes, rows_MD.shape[1]
    y_TD = rows_MD.new_empty(tokens, width)
    if tokens:
        weights = None if weights_TR is None else weights_TR.contiguous()
        block = block_size(width, _LARGEST_BLOCK)
        # Tokens in the first dimension of the grid, for CUDA's others end at 65,535.
        _gather_kernel[(tokens, triton.cdiv(width, block))](
            rows_MD, inverse_M, weights, y_TD, width, ROUTES=routes, WEIGHTED=weights is not None, BLOCK=block
        )
    return y_TD


def _spread(
    x_TD: Tensor, inverse_M: Tensor, weights_TR: Tensor | None, rows_MD: Tensor | None, routes: int
) -> tuple[Tensor, Tensor | None]:
    """out[inverse[t * R + r]] = weights[t, r] * x[t]; with rows, also the dot product of each and its x[t]."""
    x_TD, (tokens, width) = x_TD.contiguous(), x_TD.shape
    out_MD = x_TD.new_empty(tokens * routes, width)
    weights = None if weights_TR is None else weights_TR.contiguous()
    dots_TR = None if rows_MD is None or weights is None else torch.empty_like(weights)
    if tokens:
        flags = {
            "WEIGHTED": weights is not None,
            "DOTS": dots_TR is not None,
            "BLOCK": block_size(width, _LARGEST_BLOCK),
        }
        _spread_kernel[(tokens,)](x_TD, inverse_M, weights, rows_MD, out_MD, dots_TR, width, ROUTES=routes, **flags)
    return out_MD, dots_TR


@kernel
def _gather_kernel(
    rows_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    y_ptr: tl.tensor,
    width: tl.tensor,
    ROUTES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    # Slots in order, in float32, rounded once: the sum does not depend on the block size or the number of programs.
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(ROUTES):
        place = tl.load(inverse_ptr + token * ROUTES + slot).to(tl.int64)
        row = tl.load(rows_ptr + place * width + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(weights_ptr + token * ROUTES + slot).to(tl.float32)
        total += row
    tl.store(y_ptr + token * width + column, total, mask=inside)


@kernel
def _spread_kernel(
    x_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    dots_ptr: tl.tensor,
    width: tl.tensor,
    ROUTES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # A permutation: no two programs write to one place.
    token = tl.program_id(0).to(tl.int64)
    for slot in tl.static_range(ROUTES):
        place = tl.load(inverse_ptr + token * ROUTES + slot).to(tl.int64)
        products = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            x = tl.load(x_ptr + token * width + column, mask=inside, other=0.0).to(tl.float32)
            if DOTS:
                products += x * tl.load(rows_ptr + place * width + column, mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                x = x * tl.load(weights_ptr + token * ROUTES + slot).to(tl.float32)
            tl.store(out_ptr + place * width + column, x, mask=inside)
        if DOTS:
            tl.store(dots_ptr + token * ROUTES + slot, tl.sum(products, axis=0))
