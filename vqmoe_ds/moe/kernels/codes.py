"""What codes are compared with, and the nearest of them, without a copy to the host: Triton kernels and PyTorch's own.

Legend: L layers, K codes, C code width, T tokens, B batch, S sequence, D width; B* sizes of a block.

Kernels and PyTorch's operations add floats in another order, so a token half-way between two codes may go to either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.moe.kernels.triton_support import block_size, interpreting, kernel, tl, triton, use_triton
from vqmoe_ds.moe.state import without_autocast

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
        with without_autocast(z_TC.device):
            distances = torch.addmm(half_norms_K, z_TC, flat_KC.t(), alpha=-1)
        # Of equals argmin takes the first, as the kernel does.
        return distances.view(-1, layers, codes).argmin(dim=-1).t().contiguous()
    z_TC, codes_LKC = z_TC.contiguous(), codes_LKC.contiguous()
    nearest_LT = torch.empty(layers, len(z_TC), dtype=torch.int64, device=z_TC.device)
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


def mix_context(x_BSD: Tensor, window: int, decay: float, positions_BS: Tensor | None = None) -> Tensor:
    """``sum_j decay^j roll(u_{t-j}, j)`` over the last ``window`` tokens, float32 ``[B, S, D]``.

    ``u`` is a token's vector over its root mean square; features roll by one place per token back.

    Args:
        x_BSD: vectors of any float type.
        window: tokens that a token looks at, itself included.
        decay: weight of a token against that of the one behind it.
        positions_BS: place of each token in its document, past whose start none looks; None: place in the sequence.
    """
    batch, length, width = x_BSD.shape
    if use_triton(x_BSD):
        x_BSD = x_BSD.contiguous()
        mixed_BSD = torch.empty_like(x_BSD, dtype=torch.float32)
        places = None if positions_BS is None else positions_BS.contiguous()
        if x_BSD.numel():
            block = triton.next_power_of_2(width)  # a whole row
            _mix_context[(batch * length,)](
                x_BSD, places, mixed_BSD, length, width, window, decay, 1e-6, block, num_warps=8 if block > 2048 else 4
            )
        return mixed_BSD
    unit_BSD = F.rms_norm(x_BSD.float(), (width,), eps=1e-6)
    mixed_BSD = unit_BSD.clone()
    for back in range(1, min(window, length)):
        earlier = torch.roll(unit_BSD[:, :-back], shifts=back, dims=-1)
        if positions_BS is not None:
            earlier = earlier * positions_BS[:, back:, None].ge(back)
        mixed_BSD[:, back:] += decay**back * earlier
    return mixed_BSD


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
            v_KC = tl.load(codes_ptr + k_K.to(tl.int64)[:, None] * width + c_C[None, :], mask=is_KC, other=0.0)
            dots_TK = tl.dot(z_TC, tl.trans(v_KC), acc=dots_TK, input_precision=precision)
            squares_KC += v_KC * v_KC
        distances_TK = tl.sum(squares_KC, axis=1)[None, :] / 2 - dots_TK
        # Codes beyond the last were loaded as zeros, and would be the nearest of many vectors.
        distances_TK = tl.where((k_K < num_codes)[None, :], distances_TK, float("inf"))
        least_T, which_T = tl.min(distances_TK, axis=1, return_indices=True, return_indices_tie_break_left=True)
        # A NaN is less than nothing: its vector keeps code 0, which exists.
        nearest_T = tl.where(least_T < shortest_T, first_code + which_T, nearest_T)  # equal: the lower index stays
        shortest_T = tl.where(least_T < shortest_T, least_T, shortest_T)
    out_ptr = nearest_ptr + layer.to(tl.int64) * num_tokens
    tl.store(out_ptr + rows_T, nearest_T.to(tl.int64), mask=rows_T < num_tokens)


@kernel
def _mix_context(
    x_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    mixed_ptr: tl.tensor,
    length: tl.tensor,
    width: tl.constexpr,
    window: tl.constexpr,
    decay: tl.constexpr,
    eps: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    place = token % length
    if positions_ptr is not None:  # none stands further into its document than into the sequence that is at hand
        place = tl.minimum(place, tl.load(positions_ptr + token))
    mixed_D, weight = tl.zeros((BD,), tl.float32), 1.0
    if window <= 16:
        for back in tl.static_range(window):
            mixed_D += weight * _unit_before(x_ptr, token, place, back, width, eps, BD)
            weight = weight * decay
    else:  # written out, a few hundred steps take Triton minutes to compile
        for back in range(tl.minimum(window, place + 1).to(tl.int32)):
            mixed_D += weight * _unit_before(x_ptr, token, place, back, width, eps, BD)
            weight = weight * decay
    d_D = tl.arange(0, BD)
    tl.store(mixed_ptr + token * width + d_D, mixed_D, mask=d_D < width)


@kernel
def _unit_before(
    x_ptr: tl.tensor,
    token: tl.tensor,
    place: tl.tensor,
    back: tl.tensor,
    width: tl.constexpr,
    eps: tl.constexpr,
    BD: tl.constexpr,
) -> tl.tensor:
    """The vector of the token so many places back, over its root mean square and rolled; zero before the first."""
    d_D = tl.arange(0, BD)
    rolled_D = (d_D + width - back % width) % width
    seen_D = (d_D < width) & (place >= back)
    x_D = tl.load(x_ptr + (token - back) * width + rolled_D, mask=seen_D, other=0.0).to(tl.float32)
    return x_D / tl.sqrt(tl.sum(x_D * x_D, axis=0) / width + eps)
