"""Matrix products on CPU: the library that is fastest for each number type."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Products(NamedTuple):
    """The products of one number type, as this processor computes them best."""

    mm: Callable[[Tensor, Tensor], Tensor]
    """``a @ b``."""
    mm_into: Callable[[Tensor, Tensor, Tensor], None]
    """``out = a_t @ b`` for a transposed view ``a_t``."""
    padded: Callable[[int], int]
    """Row count an expert of so many rows is computed with."""


def products_for(dtype: torch.dtype) -> Products:
    """The products for CPU tensors of ``dtype``."""
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    # FlopCounterMode and its like know plain products only.
    if torch._C._len_torch_dispatch_stack() == 0 and onednn:
        if dtype is torch.float32:
            return Products(_mm_onednn, _mm_into_onednn, _padded_rows)
        # torch.mm calls oneDNN by itself for this type, so rounded row counts pay here too.
        if dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return Products(torch.mm, _mm_into, _padded_rows)
    return Products(torch.mm, _mm_into, int)


def _mm_into(out: Tensor, a_t: Tensor, b: Tensor) -> None:
    torch.mm(a_t, b, out=out)


def _mm_onednn(a: Tensor, b: Tensor) -> Tensor:
    """float32 by oneDNN, because ``torch.mm`` calls MKL, half as fast on AMD processors (no AVX-512 there)."""
    return _linear(a, b.t(), None, "none", [], "")


def _mm_into_onednn(out: Tensor, a_t: Tensor, b: Tensor) -> None:
    if not len(b):  # a sum over nothing, which oneDNN refuses: a rank that shares sequences may hold padding alone
        out.zero_()
        return
    # oneDNN is slow on float32 factors read across their rows; transposing them first costs less.
    out.copy_(_mm_onednn(a_t.contiguous(), b.t().contiguous().t()))


_linear = torch.ops.mkldnn._linear_pointwise.default


def _padded_rows(rows: int) -> int:
    """``rows`` rounded up to 8 steps an octave (at most 1/8 more, from 64 on).

    oneDNN compiles a kernel for every new shape (milliseconds) and keeps a thousand; experts have another number of
    rows at every step. Rounding leaves a few dozen shapes.
    """
    step = max(8, 1 << (rows - 1).bit_length() >> 4)
    return -(-rows // step) * step
