"""Sums by code and the running means that codes follow: Triton kernels and PyTorch's own operations.

Legend: L layers, K codes, C code width, T tokens; R rows, B* sizes of a block.

Results do not change from run to run: no float is added atomically. On a GPU a step makes many small tensors here, and
each launch costs more than its work, so what belongs together is one kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.moe.kernels.integers import count_ids, sort_by_kind
from vqmoe_ds.moe.kernels.triton_support import block_size, kernel, tl, use_triton

_ROWS = 64
_LARGEST_BLOCK = 1024  # columns a program of `_follow` holds


def sum_by_code(z_TC: Tensor, codes_LT: Tensor, num_codes: int) -> Tensor:
    """Sums of the vectors of each code, float32 ``[L, K, C]``, in an order that never changes; zeros where none is.

    Args:
        z_TC: float32 vectors.
        codes_LT: int64 code of each vector in every layer.
        num_codes: codes K of a layer.
    """
    sums_LKC = z_TC.new_zeros(len(codes_LT), num_codes, z_TC.shape[1])
    if use_triton(z_TC):
        _add_rows(sums_LKC, z_TC, codes_LT, counted=False)
    elif z_TC.is_cuda:  # index_add_ would add in any order
        for sums_KC, codes_T in zip(sums_LKC, codes_LT, strict=True):
            torch.mm(F.one_hot(codes_T, num_codes).to(z_TC.dtype).t(), z_TC, out=sums_KC)
    else:
        for sums_KC, codes_T in zip(sums_LKC, codes_LT, strict=True):
            sums_KC.index_add_(0, codes_T, z_TC)
    return sums_LKC


def add_by_code(statistics_LKC1: Tensor, z_TC: Tensor, codes_LT: Tensor) -> None:
    """Add the sum of the vectors of each code, rounded to float32, and in the last column their number.

    Args:
        statistics_LKC1: contiguous float64 ``[L, K, C + 1]``, added to in place.
        z_TC: float32 vectors.
        codes_LT: int64 code of each vector in every layer.
    """
    if use_triton(z_TC):
        _add_rows(statistics_LKC1, z_TC, codes_LT, counted=True)
        return
    num_codes = statistics_LKC1.shape[1]
    statistics_LKC1[..., -1] += count_ids(codes_LT, num_codes)
    statistics_LKC1[..., :-1] += sum_by_code(z_TC, codes_LT, num_codes)


def follow_means(codes_LKC: Tensor, sums_LKC: Tensor, counts_LK: Tensor, statistics_LKC1: Tensor, decay: float) -> None:
    """Move running sums and counts toward a step's, and codes to their quotient, all in place.

    Computed in float64 and rounded once. A code whose running count has all but vanished keeps its place, for its mean
    is a quotient of two vanishing numbers.

    Args:
        codes_LKC: contiguous float32 codes, as all that follows but the statistics.
        sums_LKC: running sums of vectors.
        counts_LK: running counts.
        statistics_LKC1: sums of this step and, in the last column, counts; contiguous float64.
        decay: weight of what has been running.
    """
    if use_triton(codes_LKC):
        decay_ = torch.full((), decay, dtype=torch.float64, device=codes_LKC.device)  # an argument would be float32
        width = codes_LKC.shape[2]
        block = block_size(width, _LARGEST_BLOCK)
        _follow[(counts_LK.numel(),)](codes_LKC, sums_LKC, counts_LK, statistics_LKC1, decay_, width, block)
        return
    counts_LK.copy_(counts_LK.double() * decay + statistics_LKC1[..., -1] * (1 - decay))
    sums_LKC.copy_(sums_LKC.double() * decay + statistics_LKC1[..., :-1] * (1 - decay))
    means_LKC = sums_LKC / counts_LK.clamp_min(1e-12).unsqueeze(-1)
    codes_LKC.copy_(torch.where((counts_LK > 1e-6).unsqueeze(-1), means_LKC, codes_LKC))


def _add_rows(out_LKX: Tensor, z_TC: Tensor, codes_LT: Tensor, counted: bool) -> None:
    (layers, codes, row), (tokens, width) = out_LKX.shape, z_TC.shape
    if tokens:
        # Sorted first, so that a program adds the rows of one code alone and nothing is added atomically.
        order_LT, _, ends_LK = sort_by_kind(codes_LT, codes)
        block_C = block_size(width, 128, 16)
        grid = (layers * codes, -(-width // block_C))
        sizes = (tokens, codes, width, row, counted, _ROWS, block_C)
        _sum_by_code[grid](z_TC.contiguous(), order_LT, ends_LK, out_LKX, *sizes)


@kernel
def _sum_by_code(
    z_ptr: tl.tensor,
    order_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_codes: tl.constexpr,
    width: tl.constexpr,
    row: tl.constexpr,
    COUNTED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    # All layers and codes of one block of columns run before the next block: its part of the vectors stays in L2.
    segment = tl.program_id(0).to(tl.int64)
    c_C = tl.program_id(1) * BC + tl.arange(0, BC)
    # Ends count from the first row of a layer: its first code starts at 0, not where the layer before ends.
    start = tl.load(ends_ptr + segment - 1, mask=segment % num_codes > 0, other=0)
    end = tl.load(ends_ptr + segment)
    order_ptr += segment // num_codes * num_tokens
    sums_RC = tl.zeros((BR, BC), tl.float32)
    for first in range(start, end, BR):
        r_R = first + tl.arange(0, BR)
        rows_R = tl.load(order_ptr + r_R, mask=r_R < end, other=0)
        is_RC = (r_R < end)[:, None] & (c_C < width)[None, :]
        sums_RC += tl.load(z_ptr + rows_R[:, None] * width + c_C[None, :], mask=is_RC, other=0.0)
    out_ptr += segment * row
    out_C = tl.load(out_ptr + c_C, mask=c_C < width, other=0.0)
    tl.store(out_ptr + c_C, out_C + tl.sum(sums_RC, axis=0).to(out_C.dtype), mask=c_C < width)
    if COUNTED:
        counts = tl.load(out_ptr + width) + (end - start).to(tl.float64)
        # By one program of a code alone: each block of columns would add the same rows again.
        tl.store(out_ptr + width, counts, mask=tl.program_id(1) == 0)


@kernel
def _follow(
    codes_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    decay_ptr: tl.tensor,
    width: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    # One program per code, for all of its columns need the count that it replaces.
    code = tl.program_id(0).to(tl.int64)
    decay = tl.load(decay_ptr)
    codes_ptr += code * width
    sums_ptr += code * width
    statistics_ptr += code * (width + 1)
    count = tl.load(counts_ptr + code).to(tl.float64) * decay + tl.load(statistics_ptr + width) * (1 - decay)
    count = count.to(tl.float32)
    tl.store(counts_ptr + code, count)
    for first in range(0, width, BC):
        c_C = first + tl.arange(0, BC)
        sums_C = tl.load(sums_ptr + c_C, mask=c_C < width, other=0.0).to(tl.float64) * decay
        sums_C += tl.load(statistics_ptr + c_C, mask=c_C < width, other=0.0) * (1 - decay)
        sums_C = sums_C.to(tl.float32)
        tl.store(sums_ptr + c_C, sums_C, mask=c_C < width)
        counts_C = tl.zeros((BC,), tl.float32) + count
        # Rounded as PyTorch divides; Triton's own division of float32 is approximate.
        means_C = tl.div_rn(sums_C, tl.maximum(counts_C, 1e-12))
        tl.store(codes_ptr + c_C, means_C, mask=(c_C < width) & (counts_C > 1e-6))
