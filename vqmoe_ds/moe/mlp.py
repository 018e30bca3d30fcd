"""One SwiGLU MLP for all tokens: a dense feed-forward part, or the shared experts of an MoE layer.

Legend: T tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.linear import Linear
from vqmoe_ds.moe.routers.base import drawn


class DenseMLP(nn.Module):
    """One SwiGLU MLP: an expert without a router."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SharedExperts(DenseMLP):
    """Experts that every token passes beside those of its router (DeepSeekMoE, Dai 2024, arXiv 2401.06066).

    Their SwiGLU MLPs add up to one of their widths together, weighted by a sigmoid of the token's state where
    ``moe.shared_gate`` asks for it. Every rank holds them, and no row travels to them. Weights follow from the seed and
    the layer alone.

    Args:
        config: of the layer; ``config.moe.shared_experts`` is at least 1.
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config.width, config.moe.shared_experts * config.moe.expert_hidden)
        self.scale = Linear(config.width, 1) if config.moe.shared_gate else None
        with torch.no_grad():
            for name, weight in self.named_parameters():
                scale = weight.shape[1] ** -0.5 * (config.out_scale if name == "down.weight" else 1.0)
                # The weights are drawn from this name: with another one, the same seed is another model.
                place = f"layers.{config.layer}.shared.{name}"
                weight.copy_(drawn(tuple(weight.shape), scale, config.seed, place))

    def forward(self, x_TD: Tensor) -> Tensor:
        """``[T, D]`` -> ``[T, D]``."""
        y_TD = super().forward(x_TD)
        return y_TD if self.scale is None else y_TD * self.scale(x_TD).sigmoid()
