"""Grouped products against a loop over the experts in float64: outputs, gradients, what is kept."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels import DEVICES, kernels_on
from vqmoe_ds.moe.kernels.grouped import GroupedExperts, grouped_experts

ROWS = {
    "odd counts": [3, 1, 7],
    "empty experts": [0, 5, 0, 2, 0],
    "one expert has all": [0, 9, 0],
    "one row": [0, 1],
    "no rows": [0, 0, 0],
    "many rows": [1021, 3],
}
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
PLACES = [pytest.param("plain", id="plain"), *DEVICES]
WIDTH, HIDDEN = 16, 24


def _draw(counts_E: list[int], dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows and weights, ends and the gradient of the output."""
    experts, rows = len(counts_E), sum(counts_E)
    shapes = [(rows, WIDTH), (experts, HIDDEN, WIDTH), (experts, WIDTH, HIDDEN), (experts, HIDDEN, WIDTH)]
    scales = [1, WIDTH**-0.5, HIDDEN**-0.5, WIDTH**-0.5]
    leaves = [(torch.randn(s) * f).to(device, dtype).requires_grad_() for s, f in zip(shapes, scales, strict=True)]
    ends_E = torch.tensor(counts_E).cumsum(0).to(device, torch.int32)
    return leaves, ends_E, torch.randn(rows, WIDTH).to(device, dtype)


def _expected(leaves: list[Tensor], counts_E: list[int], g_PD: Tensor) -> list[Tensor]:
    x_PD, w1, w2, w3 = wide = [t.detach().double().requires_grad_() for t in leaves]
    parts = [(F.silu(x @ w1[e].t()) * (x @ w3[e].t())) @ w2[e].t() for e, x in enumerate(x_PD.split(counts_E))]
    y_PD = torch.cat(parts)
    return [y_PD.detach(), *torch.autograd.grad(y_PD, wide, g_PD.double())]


def _compare(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("y", "x", "w1", "w2", "w3"), got, want, strict=True):
        assert a.shape == b.shape
        if a.numel():
            error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)
            assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_output_and_gradients(rows: str, dtype: torch.dtype, place: str) -> None:
    counts_E = ROWS[rows]
    leaves, ends_E, g_PD = _draw(counts_E, dtype, "cuda" if place == "cuda" else "cpu")
    with nullcontext() if place == "plain" else kernels_on(place):
        y_PD = GroupedExperts.apply(*leaves, ends_E)
        got = [y_PD.detach(), *torch.autograd.grad(y_PD, leaves, g_PD)]
    assert all(t.dtype == dtype for t in got)
    _compare(got, _expected(leaves, counts_E, g_PD), TOLERANCE[dtype])
    for gradient in got[2:]:
        for e, count in enumerate(counts_E):
            assert count or not gradient[e].any(), "an expert without rows has a gradient of exactly zero"


def test_expanded_gradient() -> None:
    """The gradient of a sum is one number with strides of zero, which the grouped products refuse."""
    leaves, ends_E, g_PD = _draw([3, 0, 6], torch.float32)
    y_PD = GroupedExperts.apply(*leaves, ends_E)
    got = [y_PD.detach(), *torch.autograd.grad(y_PD.sum(), leaves)]
    _compare(got, _expected(leaves, [3, 0, 6], torch.ones_like(g_PD)), TOLERANCE[torch.float32])


def test_rows_that_are_not_contiguous() -> None:
    leaves, ends_E, g_PD = _draw([3, 6], torch.float32)
    wide = leaves[0].detach().t().contiguous().t().requires_grad_()
    y_PD = GroupedExperts.apply(wide, *leaves[1:], ends_E)
    got = [y_PD.detach(), *torch.autograd.grad(y_PD, [wide, *leaves[1:]], g_PD)]
    _compare(got, _expected(leaves, [3, 6], g_PD), TOLERANCE[torch.float32])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2, 3)], ids=str)
def test_only_the_products_that_are_asked_for(wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, ends_E, g_PD = _draw([3, 0, 6], torch.float32)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    y_PD = GroupedExperts.apply(*leaves, ends_E)
    products, run = [], torch._grouped_mm
    monkeypatch.setattr(torch, "_grouped_mm", lambda *args, **kwargs: products.append(1) or run(*args, **kwargs))
    got = torch.autograd.grad(y_PD, [leaves[i] for i in wanted], g_PD)
    assert len(products) == 1 + len(wanted) + (0 in wanted)  # the first for the hidden activations, two for the rows
    want = _expected(leaves, [3, 0, 6], g_PD)
    for i, gradient in zip(wanted, got, strict=True):
        torch.testing.assert_close(gradient.double(), want[1 + i], rtol=1e-5, atol=1e-5)


def test_float64_by_numeric_differentiation() -> None:
    leaves, ends_E, _ = _draw([2, 0, 3], torch.float64)
    assert torch.autograd.gradcheck(lambda *t: GroupedExperts.apply(*t, ends_E), leaves, fast_mode=True)


def _kept(leaves: list[Tensor], ends_E: Tensor) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps beside the weights."""
    kept = []
    weights = {leaf.data_ptr() for leaf in leaves[1:]} - {0}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_meta or tensor.data_ptr() not in weights:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        GroupedExperts.apply(*leaves, ends_E)
    return kept


def test_rows_gate_and_up_alone_are_kept() -> None:
    leaves, ends_E, _ = _draw([3, 0, 6], torch.bfloat16)
    assert sorted(_kept(leaves, ends_E)) == sorted([(9, WIDTH), (9, HIDDEN), (9, HIDDEN), (3,)])


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
def test_shapes_on_meta(dtype: torch.dtype) -> None:
    """The planner asks for shapes of every type."""
    leaves, ends_E, _ = _draw([3, 0, 6], dtype)
    leaves = [leaf.detach().to("meta").requires_grad_() for leaf in leaves]
    y_PD = GroupedExperts.apply(*leaves, ends_E.to("meta"))
    assert (y_PD.shape, y_PD.dtype, y_PD.device.type) == ((9, WIDTH), dtype, "meta")
    gradients = torch.autograd.grad(y_PD.sum(), leaves)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
    assert _kept(leaves, ends_E.to("meta")).count((9, HIDDEN)) == 2


def test_autocast_decides_the_type() -> None:
    leaves, ends_E, _ = _draw([3, 0, 6], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_PD = grouped_experts(*leaves, ends_E)
    assert y_PD.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y_PD.sum(), leaves))
    same = GroupedExperts.apply(*(leaf.bfloat16() for leaf in leaves), ends_E)
    assert torch.equal(y_PD, same)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's products read the ends on CPU")
@pytest.mark.gpu
def test_no_host_waits() -> None:
    leaves, ends_E, g_PD = _draw([3, 0, 6], torch.bfloat16, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(GroupedExperts.apply(*leaves, ends_E), leaves, g_PD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
