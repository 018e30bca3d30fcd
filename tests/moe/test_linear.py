"""Our linear map against ``nn.Linear``."""

from __future__ import annotations

import pytest
import torch

from vqmoe_ds.moe.linear import Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_nn_linear(dtype):
    ours, plain = Linear(24, 40).to(dtype), torch.nn.Linear(24, 40, bias=False).to(dtype)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 24, dtype=dtype)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    g = torch.randn(3, 5, 40, dtype=dtype)
    for module, x in zip((ours, plain), xs, strict=True):
        module(x).backward(g)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours(xs[0]), plain(xs[1]), **tolerance)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, **tolerance)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, **tolerance)


def test_a_frozen_input_or_weight_needs_no_gradient():
    layer = Linear(8, 8)
    layer(torch.randn(4, 8)).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert layer(torch.randn(0, 8)).shape == (0, 8)


def test_no_rows_give_a_gradient_of_nothing():
    layer, x = Linear(8, 6), torch.randn(1, 0, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (1, 0, 8) and torch.equal(layer.weight.grad, torch.zeros(6, 8))
