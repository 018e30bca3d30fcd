"""Sorts, counts and permutations of whole numbers, whose results no order of writing can change.

Legend: L layers, M rows, K kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def sort_by_kind(ids_LM: Tensor, kinds: int) -> tuple[Tensor, Tensor]:
    """Rows by kind, those of one kind as they came, int64 ``[L, M]``, and where each kind ends, int32 ``[L, K]``.

    Args:
        ids_LM: int64 in ``[0, kinds)``.
    """
    # int16 keys sort several times faster than int64.
    keys_LM = ids_LM.to(torch.int16) if kinds < 2**15 else ids_LM
    sorted_LM, order_LM = torch.sort(keys_LM, dim=1, stable=True)
    all_LK = torch.arange(kinds, device=ids_LM.device, dtype=keys_LM.dtype).repeat(len(ids_LM), 1)
    # Counting by the sorted keys needs neither atomics nor, as bincount does, the host.
    return order_LM, torch.searchsorted(sorted_LM, all_LK, right=True, out_int32=True)


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
