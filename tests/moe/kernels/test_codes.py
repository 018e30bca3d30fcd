"""Nearest codes and what they are compared with: Triton kernels and PyTorch's, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels import by_each
from vqmoe_ds.moe.kernels.codes import mix_context, nearest_codes, normalized

# (T, L, K, C): below, at and above the sizes of blocks, which are 128 tokens, 64 codes, 32 and 128 columns, 64 rows
SHAPES = [(5, 2, 7, 9), (130, 3, 33, 70), (1, 1, 1, 1), (40, 2, 150, 33), (200, 1, 1, 140), (128, 2, 64, 32)]
_by = by_each()


def _nearest(z_TC: Tensor, codes_LKC: Tensor) -> Tensor:
    return torch.stack([torch.cdist(z_TC.double(), codes_KC.double()).argmin(dim=1) for codes_KC in codes_LKC])


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
    assert torch.equal(nearest_codes(z_TC, codes_LKC), _nearest(z_TC, codes_LKC))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "width"), [(1, 8), (3, 7), (5, 33), (9, 4), (40, 5)])
@pytest.mark.parametrize("documents", [False, True])
def test_context(dtype: torch.dtype, window: int, width: int, documents: bool) -> None:
    x_BSD = torch.randn(2, width, 7).to(dtype).transpose(1, 2)
    x_BSD[1, 2] = 0.0
    starts_BS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [4, 5, 6, 7, 8, 0, 0]])  # the second goes on from what is not here
    got_BSD = mix_context(x_BSD, window, 0.7, starts_BS if documents else None)
    unit_BSD = x_BSD.double() / (x_BSD.double().square().mean(dim=2, keepdim=True) + 1e-6).sqrt()
    assert got_BSD.dtype == torch.float32 and got_BSD.is_contiguous()
    for b in range(2):
        for s in range(7):
            seen = min(window - 1, s, int(starts_BS[b, s]) if documents else s)
            want_D = sum(0.7**back * unit_BSD[b, s - back].roll(back) for back in range(seen + 1))
            assert (got_BSD[b, s] - want_D).abs().max() < 1e-5, (b, s)


def test_context_of_no_tokens() -> None:
    assert mix_context(torch.randn(0, 4, 8), 3, 0.5).shape == (0, 4, 8)
    assert mix_context(torch.randn(2, 0, 8), 3, 0.5).shape == (2, 0, 8)


def test_no_tokens() -> None:
    z_TC, codes_LKC = torch.randn(0, 8), torch.randn(2, 4, 8)
    codes_LT = nearest_codes(z_TC, codes_LKC)
    assert codes_LT.shape == (2, 0) and codes_LT.dtype == torch.int64
