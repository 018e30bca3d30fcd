"""Nearest codes and statistics by code, without a copy to the host: Triton kernels and PyTorch's own operations.

Legend: L layers, K codes, C code width, T tokens; R rows, B* sizes of a block.

Results do not change from run to run: nothing is added atomically but integers. Kernels and PyTorch's operations add
floats in another order, so a token half-way between two codes may go to either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.moe.kernels.integers import sort_by_kind
from vqmoe_ds.moe.kernels.triton_support import block_size, interpreting, kernel, tl, use_triton

_LARGEST_ROW = 4096
"""Columns of a vector that a program holds."""


def nearest_codes(z_TC: Tensor, codes_LKC: Tensor) -> Tensor:
    """Index of the nearest code of every layer by Euclidean distance, int64 ``[L, T]``; ties go to the lowest index.

    ``||v||^2 / 2 - z.v`` orders codes as the squared distance does. The kernel never writes the distances down, which
    take ``[T, L K]`` otherwise; tensor cores multiply three times in TF32, close to float32.

    Args:
        z_TC: float32 vectors.
        codes_LKC: float32 codes.
    """
    layers, codes, width = codes_LKC.shape
    if not use_triton(z_TC):
        flat_KC = codes_LKC.flatten(0, 1)
        half_norms_K = flat_KC.square().sum(dim=-1) / 2
        # The square of z is the same for all codes and left out; it would only cost digits.
        distances = torch.addmm(half_norms_K, z_TC, flat_KC.t(), alpha=-1)
        return distances.view(-1, layers, codes).argmin(dim=-1).t().contiguous()
    z_TC, codes_LKC = z_TC.contiguous(), codes_LKC.contiguous()
    nearest_LT = torch.zeros(layers, len(z_TC), dtype=torch.int64, device=z_TC.device)
    if len(z_TC):
        block_T, block_K, block_C = 128, block_size(codes, 64, 16), block_size(width, 32, 16)
        grid = (layers * -(-len(z_TC) // block_T),)
        precision = "ieee" if interpreting() else "tf32x3"
        sizes = (len(z_TC), layers, codes, width, block_T, block_K, block_C)
        _nearest_codes[grid](z_TC, codes_LKC, nearest_LT, *sizes, precision, num_warps=8)
    return nearest_LT


def normalized(x_TC: Tensor, eps: float = 1e-6) -> Tensor:
    """Vectors over their root mean square, float32 whatever their type, in one pass over memory."""
    if not use_triton(x_TC):
        return F.rms_norm(x_TC.float(), x_TC.shape[-1:], eps=eps)
    x_TC, (tokens, width) = x_TC.contiguous(), x_TC.shape
    z_TC = torch.empty_like(x_TC, dtype=torch.float32)
    if tokens:
        _normalize[(tokens,)](x_TC, z_TC, width, eps, block_size(width, _LARGEST_ROW))
    return z_TC


def sum_by_code(z_TC: Tensor, codes_LT: Tensor, num_codes: int) -> Tensor:
    """Sums of the vectors of each code, float32 ``[L, K, C]``, in an order that never changes; zeros where none is.

    Args:
        z_TC: float32 vectors.
        codes_LT: int64 code of each vector in every layer.
        num_codes: codes K of a layer.
    """
    layers, (tokens, width) = len(codes_LT), z_TC.shape
    sums_LKC = z_TC.new_zeros(layers, num_codes, width)
    if use_triton(z_TC):
        if tokens:
            # Sorted first, so that a program adds the rows of one code alone and nothing is added atomically.
            order_LT, ends_LK = sort_by_kind(codes_LT, num_codes)
            block_R, block_C = 64, block_size(width, 128, 16)
            grid = (layers * num_codes, -(-width // block_C))
            sizes = (tokens, num_codes, width, block_R, block_C)
            _sum_by_code[grid](z_TC.contiguous(), order_LT, ends_LK, sums_LKC, *sizes)
    elif z_TC.is_cuda:  # index_add_ would add in any order
        for sums_KC, codes_T in zip(sums_LKC, codes_LT, strict=True):
            torch.mm(F.one_hot(codes_T, num_codes).to(z_TC.dtype).t(), z_TC, out=sums_KC)
    else:
        for sums_KC, codes_T in zip(sums_LKC, codes_LT, strict=True):
            sums_KC.index_add_(0, codes_T, z_TC)
    return sums_LKC


@kernel
def _normalize(x_ptr: tl.tensor, z_ptr: tl.tensor, width: tl.constexpr, eps: tl.constexpr, BC: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64) * width
    squares_C = tl.zeros((BC,), tl.float32)
    for first in range(0, width, BC):
        c_C = first + tl.arange(0, BC)
        x_C = tl.load(x_ptr + row + c_C, mask=c_C < width, other=0.0).to(tl.float32)
        squares_C += x_C * x_C
    scale = 1 / tl.sqrt(tl.sum(squares_C, axis=0) / width + eps)
    for first in range(0, width, BC):  # a row of one block is in the cache
        c_C = first + tl.arange(0, BC)
        x_C = tl.load(x_ptr + row + c_C, mask=c_C < width, other=0.0).to(tl.float32)
        tl.store(z_ptr + row + c_C, x_C * scale, mask=c_C < width)


@kernel
def _nearest_codes(
    z_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    nearest_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_layers: tl.tensor,
    num_codes: tl.constexpr,
    width: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    # Neighbours in the grid have the same tokens in other layers: vectors are read from memory once, codes stay in L2.
    layer = tl.program_id(0) % num_layers
    rows_T = (tl.program_id(0) // num_layers * BT + tl.arange(0, BT)).to(tl.int64)
    codes_ptr += layer.to(tl.int64) * num_codes * width
    shortest_T = tl.full((BT,), float("inf"), tl.float32)
    nearest_T = tl.zeros((BT,), tl.int32)
    for first_code in range(0, num_codes, BK):
        k_K = first_code + tl.arange(0, BK)
        dots_TK = tl.zeros((BT, BK), tl.float32)
        squares_KC = tl.zeros((BK, BC), tl.float32)
        for first_column in range(0, width, BC):
            c_C = first_column + tl.arange(0, BC)
            is_TC = (rows_T < num_tokens)[:, None] & (c_C < width)[None, :]
            is_KC = (k_K < num_codes)[:, None] & (c_C < width)[None, :]
            z_TC = tl.load(z_ptr + rows_T[:, None] * width + c_C[None, :], mask=is_TC, other=0.0)
            v_KC = tl.load(codes_ptr + k_K[:, None] * width + c_C[None, :], mask=is_KC, other=0.0)
            dots_TK = tl.dot(z_TC, tl.trans(v_KC), acc=dots_TK, input_precision=precision)
            squares_KC += v_KC * v_KC
        distances_TK = tl.sum(squares_KC, axis=1)[None, :] / 2 - dots_TK
        distances_TK = tl.where((k_K < num_codes)[None, :], distances_TK, float("inf"))
        least_T, which_T = tl.min(distances_TK, axis=1, return_indices=True, return_indices_tie_break_left=True)
        nearest_T = tl.where(least_T < shortest_T, first_code + which_T, nearest_T)  # equal: the lower index stays
        shortest_T = tl.where(least_T < shortest_T, least_T, shortest_T)
    out_ptr = nearest_ptr + layer.to(tl.int64) * num_tokens
    tl.store(out_ptr + rows_T, nearest_T.to(tl.int64), mask=rows_T < num_tokens)


@kernel
def _sum_by_code(
    z_ptr: tl.tensor,
    order_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_codes: tl.constexpr,
    width: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    # All layers and codes of one block of columns run before the next block: its part of the vectors stays in L2.
    segment = tl.program_id(0).to(tl.int64)
    c_C = tl.program_id(1) * BC + tl.arange(0, BC)
    start = tl.load(ends_ptr + segment - 1, mask=segment % num_codes > 0, other=0)
    end = tl.load(ends_ptr + segment)
    order_ptr += segment // num_codes * num_tokens
    sums_RC = tl.zeros((BR, BC), tl.float32)
    for first in range(start, end, BR):
        r_R = first + tl.arange(0, BR)
        rows_R = tl.load(order_ptr + r_R, mask=r_R < end, other=0)
        is_RC = (r_R < end)[:, None] & (c_C < width)[None, :]
        sums_RC += tl.load(z_ptr + rows_R[:, None] * width + c_C[None, :], mask=is_RC, other=0.0)
    tl.store(sums_ptr + segment * width + c_C, tl.sum(sums_RC, axis=0), mask=c_C < width)
