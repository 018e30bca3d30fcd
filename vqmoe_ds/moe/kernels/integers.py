"""Sorts, counts and permutations of whole numbers, whose results no order of writing can change.

Legend: L layers, M rows, K kinds; B blocks of rows, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from vqmoe_ds.moe.kernels.triton_support import kernel, tl, triton, use_triton

_BLOCK_ROWS, _BLOCK_KINDS, _COMPARED = 256, 32, 32
_MOST_COUNTS = 1 << 24
"""Counts of kinds by block that the kernels may write: 64 MiB, and as much for their running sum."""


class ByKind(NamedTuple):
    """The rows of L layers in the order of their kinds; rows of one kind stand as they came."""

    order_LM: Tensor
    """Sorted place -> row, int64."""
    inverse_LM: Tensor
    """Row -> sorted place, int64."""
    ends_LK: Tensor
    """Where the rows of each kind end, int32."""


def sort_by_kind(ids_LM: Tensor, kinds: int) -> ByKind:
    """Sort the rows of each layer by kind.

    Args:
        ids_LM: int64 in ``[0, kinds)``. Kernels take others for the nearest, so that no row is without a place;
            elsewhere they stand behind all kinds and are counted with none, which ``check_counts`` refuses.
        kinds: number of kinds K.
    """
    if use_triton(ids_LM) and ids_LM.numel():
        if len(ids_LM) * kinds * triton.cdiv(ids_LM.shape[1], _BLOCK_ROWS) <= _MOST_COUNTS:
            return _counting_sort(ids_LM.contiguous(), kinds)
        ids_LM = ids_LM.clamp(0, kinds - 1)
    keys_LM = torch.where((ids_LM >= 0) & (ids_LM < kinds), ids_LM, kinds)
    if kinds < 2**15:  # int16 keys sort several times faster than int64
        keys_LM = keys_LM.to(torch.int16)
    sorted_LM, order_LM = torch.sort(keys_LM, dim=1, stable=True)
    all_LK = torch.arange(kinds, device=ids_LM.device, dtype=keys_LM.dtype).repeat(len(ids_LM), 1)
    # Counting by the sorted keys needs neither atomics nor, as bincount does, the host.
    ends_LK = torch.searchsorted(sorted_LM, all_LK, right=True, out_int32=True)
    return ByKind(order_LM, invert(order_LM), ends_LK)


def invert(order_LM: Tensor) -> Tensor:
    """The inverse of each layer's permutation, int64 ``[L, M]``."""
    places_LM = torch.arange(order_LM.shape[1], device=order_LM.device).expand_as(order_LM)
    with _any_order(order_LM):  # every place is written once
        return torch.empty_like(order_LM).scatter_(1, order_LM, places_LM)


def count_ids(ids_LM: Tensor, kinds: int) -> Tensor:
    """Occurrences of each kind in each layer, int64 ``[L, K]``; ids are int64 in ``[0, kinds)``."""
    counts_LK = ids_LM.new_zeros(len(ids_LM), kinds)
    with _any_order(ids_LM):  # sums of whole numbers are exact
        return counts_LK.scatter_add_(1, ids_LM, torch.ones_like(ids_LM))


@contextmanager
def _any_order(tensor: Tensor) -> Iterator[None]:
    """Let CUDA scatter directly: its deterministic mode sorts the indices first, which costs more than the rest."""
    mode = torch.get_deterministic_debug_mode()
    if not tensor.is_cuda or not mode:
        yield
        return
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


# ---------------------------------------------------------------- the sort as three kernels


def _counting_sort(ids_LM: Tensor, kinds: int) -> ByKind:
    """Count the kinds of each block of rows, add up before each kind and block, and place the rows.

    ``torch.sort``, the search for the ends and the inverse are a dozen launches; that many cost more than the work.
    """
    layers, rows = ids_LM.shape
    blocks = triton.cdiv(rows, _BLOCK_ROWS)
    # Kinds before blocks: then a running sum gives each block its start within each kind.
    counts_LKB = ids_LM.new_empty(layers, kinds, blocks, dtype=torch.int32)
    order_LM, inverse_LM = torch.empty_like(ids_LM), torch.empty_like(ids_LM)
    ends_LK = ids_LM.new_empty(layers, kinds, dtype=torch.int32)
    grid, sizes = (blocks, layers), (rows, kinds, blocks, _BLOCK_ROWS)
    _count_kinds[grid](ids_LM, counts_LKB, *sizes, _BLOCK_KINDS)
    # Over all layers at once, for a scan of one row is the fast one; each layer before adds its rows.
    ends_LKB = counts_LKB.flatten().cumsum(0, dtype=torch.int32)
    _place_rows[grid](ids_LM, ends_LKB, order_LM, inverse_LM, ends_LK, *sizes, _BLOCK_KINDS, _COMPARED)
    return ByKind(order_LM, inverse_LM, ends_LK)


@kernel
def _load_kinds(ids_ptr: tl.tensor, r_R: tl.tensor, num_rows: tl.tensor, num_kinds: tl.tensor) -> tl.tensor:
    ids_R = tl.load(ids_ptr + r_R, mask=r_R < num_rows, other=0)
    # -1 beyond the last row is no kind: such rows are counted nowhere.
    return tl.where(r_R < num_rows, tl.minimum(tl.maximum(ids_R, 0), num_kinds - 1).to(tl.int32), -1)


@kernel
def _count_kinds(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_kinds: tl.tensor,
    num_blocks: tl.tensor,
    BR: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    block, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r_R = block * BR + tl.arange(0, BR)
    ids_R = _load_kinds(ids_ptr + layer * num_rows, r_R, num_rows, num_kinds)
    for first in range(0, num_kinds, BK):
        k_K = first + tl.arange(0, BK)
        counts_K = tl.sum((ids_R[:, None] == k_K[None, :]).to(tl.int32), axis=0)
        tl.store(counts_ptr + (layer * num_kinds + k_K) * num_blocks + block, counts_K, mask=k_K < num_kinds)


@kernel
def _place_rows(
    ids_ptr: tl.tensor,
    running_ptr: tl.tensor,
    order_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_kinds: tl.tensor,
    num_blocks: tl.tensor,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BJ: tl.constexpr,
) -> None:
    block, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    before = (layer * num_rows).to(tl.int32)  # rows of the layers before; both may wrap around, their difference not
    r_R = block * BR + tl.arange(0, BR)
    inside_R = r_R < num_rows
    ids_R = _load_kinds(ids_ptr + layer * num_rows, r_R, num_rows, num_kinds)
    # A row stands as far before the end of its kind in this block as rows of its kind stand from it on.
    ends_R = tl.load(running_ptr + (layer * num_kinds + ids_R) * num_blocks + block, mask=inside_R, other=0)
    from_here_R = tl.zeros((BR,), tl.int32)
    for first in range(0, BR, BJ):
        j_J = block * BR + first + tl.arange(0, BJ)
        ids_J = _load_kinds(ids_ptr + layer * num_rows, j_J, num_rows, num_kinds)
        alike_RJ = (ids_R[:, None] == ids_J[None, :]) & (r_R[:, None] <= j_J[None, :])
        from_here_R += tl.sum(alike_RJ.to(tl.int32), axis=1)
    places_R = ends_R - before - from_here_R
    tl.store(inverse_ptr + layer * num_rows + r_R, places_R.to(tl.int64), mask=inside_R)
    tl.store(order_ptr + layer * num_rows + places_R, r_R.to(tl.int64), mask=inside_R)
    if block == 0:
        for first in range(0, num_kinds, BK):
            k_K = first + tl.arange(0, BK)
            last_K = (layer * num_kinds + k_K + 1) * num_blocks - 1
            ends_K = tl.load(running_ptr + last_K, mask=k_K < num_kinds, other=0) - before
            tl.store(ends_ptr + layer * num_kinds + k_K, ends_K, mask=k_K < num_kinds)
