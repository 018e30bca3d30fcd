"""Sorts, counts and permutations of whole numbers: Triton kernels and PyTorch's operations."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import by_each
from vqmoe_ds.moe.kernels import integers
from vqmoe_ds.moe.kernels.integers import count_ids, invert, sort_by_kind

# (L, M, K): below, at and above a block of 256 rows and one of 32 kinds; more kinds than rows; one kind
SHAPES = [(1, 1, 1), (2, 7, 40), (3, 256, 32), (2, 257, 33), (1, 700, 5), (2, 300, 1)]
_by = by_each()


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_by_kind_stand_as_they_came(shape: tuple[int, int, int]) -> None:
    layers, rows, kinds = shape
    ids_LM = torch.randint(0, kinds, (rows, layers)).t()  # a view
    order_LM, inverse_LM, ends_LK = sort_by_kind(ids_LM, kinds)
    assert torch.equal(order_LM, ids_LM.argsort(dim=1, stable=True)) and order_LM.dtype == torch.int64
    assert torch.equal(inverse_LM, order_LM.argsort(dim=1)) and inverse_LM.dtype == torch.int64
    assert torch.equal(ends_LK, count_ids(ids_LM, kinds).cumsum(dim=1)) and ends_LK.dtype == torch.int32
    assert ends_LK.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
def test_kinds_of_which_counts_would_fill_the_memory_are_sorted_alike(
    shape: tuple[int, int, int], _by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, rows, kinds = shape
    outside = 0 if _by == "pytorch" else 3  # kernels take the nearest kind there is
    ids_LM = torch.randint(-outside, kinds + outside, (layers, rows))
    wanted = sort_by_kind(ids_LM, kinds)
    monkeypatch.setattr(integers, "_MOST_COUNTS", 0)
    for found, expected in zip(sort_by_kind(ids_LM, kinds), wanted, strict=True):
        assert torch.equal(found, expected) and found.dtype == expected.dtype


def test_all_rows_of_the_last_kind() -> None:
    order_LM, inverse_LM, ends_LK = sort_by_kind(torch.full((2, 300), 6), 7)
    assert torch.equal(order_LM, torch.arange(300).expand(2, -1)) and torch.equal(inverse_LM, order_LM)
    assert ends_LK.tolist() == [[0] * 6 + [300]] * 2


def test_no_rows() -> None:
    order_LM, inverse_LM, ends_LK = sort_by_kind(torch.zeros(2, 0, dtype=torch.int64), 3)
    assert order_LM.shape == inverse_LM.shape == (2, 0) and ends_LK.tolist() == [[0, 0, 0]] * 2
    assert torch.equal(count_ids(torch.zeros(2, 0, dtype=torch.int64), 3), torch.zeros(2, 3, dtype=torch.int64))


def test_a_kind_that_does_not_exist_still_gives_a_permutation(_by: str) -> None:
    if _by == "pytorch":
        pytest.skip("torch.sort takes any number")
    ids_LM = torch.tensor([[2, -5, 9, 0, 2**40, 1]])
    order_LM, inverse_LM, ends_LK = sort_by_kind(ids_LM, 3)
    assert order_LM.tolist() == [[1, 3, 5, 0, 2, 4]] and ends_LK.tolist() == [[2, 3, 6]]
    assert torch.equal(invert(order_LM), inverse_LM)


@pytest.mark.parametrize("shape", SHAPES)
def test_counts(shape: tuple[int, int, int]) -> None:
    layers, rows, kinds = shape
    ids_LM = torch.randint(0, kinds, (layers, rows))
    want_LK = torch.stack([torch.bincount(ids_M, minlength=kinds) for ids_M in ids_LM])
    assert torch.equal(count_ids(ids_LM, kinds), want_LK)
