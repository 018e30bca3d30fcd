"""silu(gate) * up and its gradients, in kernels and in PyTorch, against float64 autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels import DEVICES, kernels_on
from vqmoe_ds.moe.kernels.swiglu import swiglu, swiglu_backward

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of one rounding to the nearest
INTERPRETER = {**TOLERANCE, torch.bfloat16: 8e-3}  # which cuts bfloat16 off


def _draw(rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Gradient, gate and up; some gates saturate."""
    g, gate, up = (torch.randn(rows, width).to(dtype).to(device) for _ in range(3))
    gate.view(-1)[::7] *= 20
    return [g, gate, up]


def _expected(g: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
    gate, up = gate.double().requires_grad_(), up.double().requires_grad_()
    hidden = F.silu(gate) * up
    return [*torch.autograd.grad(hidden, [gate, up], g.double()), hidden.detach()]


def _check(inputs: list[Tensor], tolerance: float) -> None:
    g, gate, up = inputs
    dtype, want = g.dtype, _expected(g, gate, up)
    hidden, got = swiglu(gate, up), swiglu_backward(g.clone(), gate, up)
    for name, a, b in zip(("gate", "up", "hidden", "forward"), [*got, hidden], [*want, want[2]], strict=True):
        assert a.dtype == dtype and a.shape == gate.shape
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 24), (17, 121)], ids=str)  # the last takes more than one block
def test_kernels(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    with kernels_on(device):
        _check(_draw(*shape, dtype, device), (INTERPRETER if device == "cpu" else TOLERANCE)[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_triton(dtype: torch.dtype) -> None:
    _check(_draw(17, 121, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    with kernels_on(device):
        empty = torch.empty(0, 24, device=device)
        assert swiglu(empty, empty).shape == (0, 24)
        assert [t.shape for t in swiglu_backward(empty, empty, empty)] == [(0, 24)] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_missing_numbers_stay_missing(device: str) -> None:
    with kernels_on(device):
        g, gate, up = _draw(2, 8, torch.float32, device)
        gate[1, 3] = float("nan")
        for result in (swiglu(gate, up), *swiglu_backward(g, gate, up)):
            assert result[1, 3].isnan() and result.isnan().sum() == 1


def test_the_gradient_of_the_gate_takes_the_memory_of_its_own() -> None:
    g, gate, up = _draw(2, 8, torch.float32)
    assert swiglu_backward(g, gate, up)[0].data_ptr() == g.data_ptr()
