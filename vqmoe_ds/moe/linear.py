"""A linear map without bias that takes the fastest product for its number type on CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqmoe_ds.moe.derivatives import first_derivative_only
from vqmoe_ds.moe.products import products_for


class Linear(nn.Linear):
    """``nn.Linear(bias=False)``; in float32 on CPU its three products are those of ``products_for``.

    ``nn.Linear`` calls MKL there, half as fast on AMD processors (docs/performance.md). Elsewhere nothing differs.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        # Autocast casts what nn.Linear multiplies, and does not look into functions of our own.
        if x.device.type == "cpu" and x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu"):
            y: Tensor = _CPULinear.apply(x, self.weight)
            return y
        return super().forward(x)


class _CPULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = products_for(x.dtype).mm(x.flatten(0, -2), weight.t())
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        products, rows, g = products_for(x.dtype), x.flatten(0, -2), grads[0].flatten(0, -2)
        g_x = g_weight = None
        if ctx.needs_input_grad[1]:
            g_weight = torch.empty_like(weight)
            products.mm_into(g_weight, g.t(), rows)
        if ctx.needs_input_grad[0]:
            g_x = products.mm(g, weight).view_as(x)
        return g_x, g_weight
