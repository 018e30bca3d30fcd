"""Sums by code and running means: Triton kernels and PyTorch's operations against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels import by_each
from vqmoe_ds.moe.kernels.statistics import add_by_code, follow_means, sum_by_code

# (T, L, K, C): below, at and above the sizes of blocks, which are 256 rows of a sort, 64 of a sum, and 128 columns
SHAPES = [(5, 2, 7, 9), (130, 3, 33, 70), (1, 1, 1, 1), (40, 2, 150, 33), (300, 1, 1, 140), (256, 2, 64, 32)]
_by = by_each()


def _members(codes_LT: Tensor, num_codes: int) -> Tensor:
    return (codes_LT.unsqueeze(1) == torch.arange(num_codes).view(1, -1, 1)).double()


@pytest.mark.parametrize("shape", SHAPES)
def test_sums(shape: tuple[int, int, int, int]) -> None:
    tokens, layers, codes, width = shape
    z_TC, codes_LT = torch.randn(tokens, width), torch.randint(0, codes, (layers, tokens))
    sums_LKC = sum_by_code(z_TC, codes_LT, codes)
    assert sums_LKC.dtype == torch.float32 and sums_LKC.shape == (layers, codes, width)
    assert (sums_LKC - _members(codes_LT, codes) @ z_TC.double()).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_counts_are_added_to_the_layers_that_are_given(shape: tuple[int, int, int, int]) -> None:
    tokens, layers, codes, width = shape
    z_TC, codes_LT = torch.randn(tokens, width), torch.randint(0, codes, (layers, tokens))
    got = torch.randn(layers + 2, codes, width + 1, dtype=torch.float64)
    want, members_LKT = got.clone(), _members(codes_LT, codes)
    for _ in range(2):
        add_by_code(got[1:-1], z_TC, codes_LT)
        want[1:-1] += torch.cat([members_LKT @ z_TC.double(), members_LKT.sum(dim=2, keepdim=True)], dim=2)
    assert (got[..., :-1] - want[..., :-1]).abs().max() < 1e-4
    assert (got[..., -1] - want[..., -1]).abs().max() < 1e-9  # whole numbers on top of what was there
    assert torch.equal(got[[0, -1]], want[[0, -1]])


def test_views_are_taken_as_they_are() -> None:
    z_TC, codes_LT = torch.randn(12, 40).t()[:, ::2], torch.randint(0, 5, (40, 3)).t()
    assert (sum_by_code(z_TC, codes_LT, 5) - _members(codes_LT, 5) @ z_TC.double()).abs().max() < 1e-5


def test_codes_without_tokens_have_zero_sums() -> None:
    z_TC, codes_LT = torch.randn(70, 5), torch.full((2, 70), 3)
    codes_LT[1] = 0  # the first code follows on codes of another layer
    sums_LKC = sum_by_code(z_TC, codes_LT, 6)
    assert torch.equal(sums_LKC.abs().sum(dim=2) > 0, torch.eye(6)[[3, 0]] > 0)
    assert torch.allclose(sums_LKC[[0, 1], [3, 0]], z_TC.sum(dim=0).expand(2, -1), atol=1e-4)


def test_no_tokens() -> None:
    z_TC, codes_LT = torch.randn(0, 8), torch.zeros(2, 0, dtype=torch.int64)
    assert torch.equal(sum_by_code(z_TC, codes_LT, 4), torch.zeros(2, 4, 8))
    statistics_LKC1 = torch.ones(2, 4, 9, dtype=torch.float64)
    add_by_code(statistics_LKC1, z_TC, codes_LT)
    assert torch.equal(statistics_LKC1, torch.ones(2, 4, 9, dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 33, 1030])
def test_codes_follow_their_running_means(width: int) -> None:
    codes_LKC, sums_LKC = torch.randn(2, 3, width), torch.randn(2, 3, width)
    counts_LK = torch.tensor([[5.0, 1e-7, 0.3], [0.0, 2.0, 1.0]])
    statistics_LKC1 = torch.randn(2, 3, width + 1, dtype=torch.float64)
    statistics_LKC1[..., -1] = torch.tensor([[4, 0, 0], [0, 7, 1]])
    decay = 1 - 1e-9  # float32 takes it for 1
    want_counts = (counts_LK.double() * decay + statistics_LKC1[..., -1] * (1 - decay)).float()
    want_sums = (sums_LKC.double() * decay + statistics_LKC1[..., :-1] * (1 - decay)).float()
    want_codes = torch.where(want_counts.unsqueeze(2) > 1e-6, want_sums / want_counts.unsqueeze(2), codes_LKC)
    follow_means(codes_LKC, sums_LKC, counts_LK, statistics_LKC1, decay)
    assert torch.equal(counts_LK, want_counts) and torch.equal(sums_LKC, want_sums)
    assert torch.equal(codes_LKC, want_codes)
    follow_means(codes_LKC, sums_LKC, counts_LK, statistics_LKC1, 0.25)
    moved_LK = counts_LK > 1e-6
    want_LK = 0.25 * want_counts.double() + 0.75 * statistics_LKC1[..., -1]
    want_LKC = (0.25 * want_sums.double() + 0.75 * statistics_LKC1[..., :-1]) / want_LK.unsqueeze(2)
    assert moved_LK.sum() == 4 and (codes_LKC - want_LKC)[moved_LK].abs().max() < 1e-4
