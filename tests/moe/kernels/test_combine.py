"""Tokens to sorted rows and back, in kernels and in PyTorch, against indexing in float64."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from tests.kernels import DEVICES, kernels_on
from vqmoe_ds.moe.kernels import combine as module
from vqmoe_ds.moe.kernels.combine import PermuteRows, combine_rows, expand_rows

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}  # the interpreter cuts off; PyTorch rounds every step
PLACES = [pytest.param("plain", id="plain"), *DEVICES]
SHAPES = [(1, 1, 8), (5, 1, 24), (5, 2, 24), (3, 4, 7)]  # T, R, D


def _on(place: str) -> tuple[str, AbstractContextManager[None]]:
    return ("cpu", nullcontext()) if place == "plain" else (place, kernels_on(place))


def _order(rows: int, device: str) -> tuple[Tensor, Tensor]:
    order_M = torch.randperm(rows)
    return order_M.to(device), order_M.argsort().to(device)


def _close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain sum", "weighted"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combine(shape: tuple[int, int, int], dtype: torch.dtype, weighted: bool, place: str) -> None:
    tokens, routes, width = shape
    device, scope = _on(place)
    order_M, inverse_M = _order(tokens * routes, device)
    rows_MD = torch.randn(tokens * routes, width).to(device, dtype).requires_grad_()
    weights_TR = torch.rand(tokens, routes, device=device).requires_grad_() if weighted else None
    leaves = [t for t in (rows_MD, weights_TR) if t is not None]
    g_TD = torch.randn(tokens, width).to(device, dtype)
    with scope:
        y_TD = combine_rows(rows_MD, order_M, inverse_M, weights_TR, routes)
        got = torch.autograd.grad(y_TD, leaves, g_TD)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    rows_TRD = wide[0][inverse_M].view(tokens, routes, width)
    want_TD = (rows_TRD * wide[1].unsqueeze(-1) if weighted else rows_TRD).sum(1)
    assert y_TD.dtype == dtype
    _close(y_TD.detach(), want_TD.detach(), dtype)
    for a, leaf, b in zip(got, leaves, torch.autograd.grad(want_TD, wide, g_TD.double()), strict=True):
        assert a.dtype == leaf.dtype
        _close(a, b, dtype)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expand(shape: tuple[int, int, int], dtype: torch.dtype, place: str) -> None:
    tokens, routes, width = shape
    device, scope = _on(place)
    order_M, inverse_M = _order(tokens * routes, device)
    x_TD = torch.randn(tokens, width).to(device, dtype).requires_grad_()
    g_MD = torch.randn(tokens * routes, width).to(device, dtype)
    with scope:
        rows_MD = expand_rows(x_TD, order_M, inverse_M, routes)
        (got,) = torch.autograd.grad(rows_MD, x_TD, g_MD)
    assert torch.equal(rows_MD, x_TD[order_M // routes])
    _close(got, g_MD.double()[inverse_M].view(tokens, routes, width).sum(1), dtype)


@pytest.mark.parametrize("place", PLACES)
def test_permute(place: str) -> None:
    device, scope = _on(place)
    order, inverse = _order(7, device)
    rows = torch.randn(7, 5, device=device, requires_grad=True)
    g = torch.randn(7, 5, device=device)
    with scope:
        out = PermuteRows.apply(rows, order, inverse)
        (got,) = torch.autograd.grad(out, rows, g)
    assert torch.equal(out, rows[order])
    assert torch.equal(got, g[inverse])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_wider_than_a_block(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGEST_BLOCK", 16)
    test_combine((3, 2, 43), torch.float32, True, device)
    test_expand((3, 2, 43), torch.float32, device)


@pytest.mark.parametrize("place", PLACES)
def test_no_tokens(place: str) -> None:
    device, scope = _on(place)
    empty_M = torch.empty(0, dtype=torch.int64, device=device)
    with scope:
        rows_MD = expand_rows(torch.empty(0, 8, device=device, requires_grad=True), empty_M, empty_M, 2)
        weights_TR = torch.empty(0, 2, device=device, requires_grad=True)
        y_TD = combine_rows(rows_MD, empty_M, empty_M, weights_TR, 2)
        y_TD.sum().backward()
    assert (rows_MD.shape, y_TD.shape, weights_TR.grad.shape) == ((0, 8), (0, 8), (0, 2))


@pytest.mark.parametrize("place", PLACES)
def test_gradients_and_rows_that_are_not_contiguous(place: str) -> None:
    """The gradient of a sum is an expanded number; views come from the all-to-all and from transposes."""
    device, scope = _on(place)
    order_M, inverse_M = _order(6, device)
    rows_MD = torch.randn(8, 6, device=device, requires_grad=True)
    weights_TR = torch.rand(2, 3, device=device, requires_grad=True)
    with scope:
        y_TD = combine_rows(rows_MD.t(), order_M, inverse_M, weights_TR.t(), 2)
        got = torch.autograd.grad(y_TD.sum(), [rows_MD, weights_TR])
    rows_TRD = rows_MD.t()[inverse_M].view(3, 2, 8)
    want_TD = (rows_TRD * weights_TR.t().unsqueeze(-1)).sum(1)
    torch.testing.assert_close(y_TD, want_TD)
    torch.testing.assert_close(got, torch.autograd.grad(want_TD.sum(), [rows_MD, weights_TR]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("learned", [False, True])
def test_rows_are_kept_only_for_the_gradient_of_the_weights(learned: bool, device: str) -> None:
    order_M, inverse_M = _order(6, device)
    rows_MD = torch.randn(6, 8, device=device, requires_grad=True)
    weights_TR = torch.rand(3, 2, device=device, requires_grad=learned)
    kept: list[int] = []
    with (
        kernels_on(device),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t),
    ):
        combine_rows(rows_MD, order_M, inverse_M, weights_TR, 2)
    assert (rows_MD.data_ptr() in kept) == learned


def test_numeric_differentiation() -> None:
    order_M, inverse_M = _order(6, "cpu")
    rows_MD = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights_TR = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: combine_rows(r, order_M, inverse_M, w, 2), (rows_MD, weights_TR))
