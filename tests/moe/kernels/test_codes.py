"""Nearest codes and sums by code: Triton kernels, in its interpreter, and PyTorch's operations against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.kernels import why_not_interpreted
from vqmoe_ds.moe.kernels.codes import nearest_codes, normalized, sum_by_code
from vqmoe_ds.moe.kernels.integers import count_ids
from vqmoe_ds.moe.kernels.triton_support import interpreted

# (T, L, K, C): below, at and above the sizes of blocks, which are 128 tokens, 64 codes, 32 and 128 columns, 64 rows
SHAPES = [(5, 2, 7, 9), (130, 3, 33, 70), (1, 1, 1, 1), (40, 2, 150, 33), (200, 1, 1, 140), (128, 2, 64, 32)]


@pytest.fixture(params=["pytorch", "triton"], autouse=True)
def _by(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton" and why_not_interpreted() is not None:
        pytest.skip(str(why_not_interpreted()))
    with interpreted() if request.param == "triton" else nullcontext():
        yield request.param


def _nearest(z_TC: Tensor, codes_LKC: Tensor) -> Tensor:
    return torch.stack([torch.cdist(z_TC.double(), codes_KC.double()).argmin(dim=1) for codes_KC in codes_LKC])


def _sums(z_TC: Tensor, codes_LT: Tensor, num_codes: int) -> Tensor:
    member_LKT = codes_LT.unsqueeze(1) == torch.arange(num_codes).view(1, -1, 1)
    return member_LKT.double() @ z_TC.double()


@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_code(shape: tuple[int, int, int, int]) -> None:
    tokens, layers, codes, width = shape
    z_TC, codes_LKC = torch.randn(tokens, width), torch.randn(layers, codes, width)
    got_LT = nearest_codes(z_TC, codes_LKC)
    assert got_LT.dtype == torch.int64 and got_LT.is_contiguous()
    assert torch.equal(got_LT, _nearest(z_TC, codes_LKC))


def test_length_counts_and_not_the_direction_alone() -> None:
    codes_LKC = torch.tensor([[[1.0, 0.0], [10.0, 0.0], [0.0, 3.0]]])
    z_TC = torch.tensor([[2.0, 0.0], [6.0, 0.0], [1.0, 1.9], [0.0, 0.0]])
    assert nearest_codes(z_TC, codes_LKC).tolist() == [[0, 1, 2, 0]]


def test_ties_go_to_the_lowest_index_within_a_block_and_across() -> None:
    codes_LKC = torch.randn(2, 150, 20)
    codes_LKC[0, [9, 63, 64, 149]] = codes_LKC[0, 3].clone()
    codes_LKC[1, [70, 140]] = codes_LKC[1, 65].clone()
    z_TC = torch.cat([codes_LKC[0, 3:4], codes_LKC[1, 65:66]])
    got_LT = nearest_codes(z_TC, codes_LKC)
    assert got_LT[0, 0] == 3 and got_LT[1, 1] == 65


def test_vectors_that_are_no_numbers_get_a_code_that_exists() -> None:
    z_TC = torch.randn(6, 8)
    z_TC[2], z_TC[4] = float("nan"), float("inf")
    got_LT = nearest_codes(z_TC, torch.randn(1, 5, 8))
    assert ((got_LT >= 0) & (got_LT < 5)).all()


def test_views_are_taken_as_they_are() -> None:
    z_TC, codes_LKC = torch.randn(12, 40).t()[:, ::2], torch.randn(3, 5, 12)[1:, :, ::2]
    codes_LT = nearest_codes(z_TC, codes_LKC)
    assert torch.equal(codes_LT, _nearest(z_TC, codes_LKC))
    assert (sum_by_code(z_TC, codes_LT, 5) - _sums(z_TC, codes_LT, 5)).abs().max() < 1e-5


@pytest.mark.parametrize("width", [1, 33, 64, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_over_their_root_mean_square(width: int, dtype: torch.dtype) -> None:
    x_TC = (3 * torch.randn(2 * width, 3).to(dtype)).t()[:, ::2]
    x_TC[1] = 0.0
    want_TC = x_TC.double() / (x_TC.double().square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    got_TC = normalized(x_TC)
    assert got_TC.dtype == torch.float32 and got_TC.is_contiguous()
    assert (got_TC - want_TC).abs().max() < 1e-5
    assert normalized(x_TC[:0]).shape == (0, width)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_counts(shape: tuple[int, int, int, int]) -> None:
    tokens, layers, codes, width = shape
    z_TC, codes_LT = torch.randn(tokens, width), torch.randint(0, codes, (layers, tokens))
    sums_LKC = sum_by_code(z_TC, codes_LT, codes)
    assert sums_LKC.dtype == torch.float32 and sums_LKC.shape == (layers, codes, width)
    assert (sums_LKC - _sums(z_TC, codes_LT, codes)).abs().max() < 1e-4
    want_LK = torch.stack([torch.bincount(codes_T, minlength=codes) for codes_T in codes_LT])
    assert torch.equal(count_ids(codes_LT, codes), want_LK)


def test_codes_without_tokens_have_zero_sums() -> None:
    z_TC, codes_LT = torch.randn(70, 5), torch.full((2, 70), 3)
    codes_LT[1] = 0  # the first code follows on codes of another layer
    sums_LKC = sum_by_code(z_TC, codes_LT, 6)
    assert torch.equal(sums_LKC.abs().sum(dim=2) > 0, torch.eye(6)[[3, 0]] > 0)
    assert torch.allclose(sums_LKC[[0, 1], [3, 0]], z_TC.sum(dim=0).expand(2, -1), atol=1e-4)


def test_no_tokens() -> None:
    z_TC, codes_LKC = torch.randn(0, 8), torch.randn(2, 4, 8)
    codes_LT = nearest_codes(z_TC, codes_LKC)
    assert codes_LT.shape == (2, 0) and codes_LT.dtype == torch.int64
    assert torch.equal(sum_by_code(z_TC, codes_LT, 4), torch.zeros(2, 4, 8))
    assert torch.equal(count_ids(codes_LT, 4), torch.zeros(2, 4, dtype=torch.int64))
