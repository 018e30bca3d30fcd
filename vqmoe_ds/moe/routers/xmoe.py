"""Cosine routing on a low-dimensional sphere.

Legend: T tokens, D width, P low dimension, N experts, k experts chosen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.config.fields import LARGEST_WEIGHT, MOST_FEATURES, option
from vqmoe_ds.config.routers import register_router
from vqmoe_ds.config.schema import MoEConfig, RunConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import (
    Router,
    Routing,
    RoutingContext,
    TopKOptions,
    auxiliary_loss,
    choose,
    drawn,
    softmax_over_all,
)


class CosineScores(nn.Module):
    """``cos(A x, e_i) / tau`` in float32, with learned A, e and tau."""

    def __init__(self, width: int, low_dim: int, num_experts: int, temperature: float, seed: int, layer: int) -> None:
        super().__init__()
        numbers = drawn((low_dim, width + num_experts), 1.0, seed, layer, "scores")
        # Contiguous, and the temperature no scalar: DeepSpeed broadcasts a parameter's bytes (`view(torch.uint8)`),
        # which PyTorch refuses of transposed tensors and of those without dimensions.
        self.projection_PD = nn.Parameter((numbers[:, :width] * width**-0.5).contiguous())
        self.experts_NP = nn.Parameter((numbers[:, width:].t() * low_dim**-0.5).contiguous())
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(temperature)))

    def forward(self, x_TD: Tensor) -> Tensor:
        low_TP = F.normalize(F.linear(x_TD.float(), self.projection_PD.float()), dim=-1)
        cosines_TN = low_TP @ F.normalize(self.experts_NP.float(), dim=-1).t()
        # A temperature near 0 would make the choice as hard as an argmax and its gradient vanish.
        return cosines_TN / self.log_temperature.float().exp().clamp_min(0.01)


@register_router("xmoe")
class XMoERouter(Router):
    """X-MoE (Chi 2022): TopK of ``softmax(cos(A x, e_i) / tau)``, ``A`` to a low dimension, tau learned.

    Both sides are normalised and tau is learned, as the paper has it; the baseline in the VQMoE release normalises
    the expert side only and has no temperature.
    """

    class Options(TopKOptions):
        low_dim: int = option(0, "width of the routing space; 0: half the experts", "features", ge=0, le=MOST_FEATURES)
        temperature: float = option(0.3, "of the cosines, at the start (it is learned)", gt=0, le=LARGEST_WEIGHT)

    structure = ("softmax_over", "low_dim")

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        low_dim, options = _low_dim(self.moe, self.options), self.options
        self.over_all = softmax_over_all(options.softmax_over, self.moe.top_k)
        self.scores = CosineScores(
            config.width, low_dim, self.moe.num_experts, options.temperature, config.seed, config.layer
        )

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        return 2 * _low_dim(run.moe, run.router) * (run.model.width + run.moe.num_experts)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TN = self.scores(x_TD)
        ids_Tk, weights_Tk = choose(logits_TN, self.moe.top_k, self.over_all)
        return Routing(ids_Tk, weights_Tk, auxiliary_loss(logits_TN, ids_Tk, self.moe, context))


def _low_dim(moe: MoEConfig, options: Any) -> int:
    return options.low_dim or max(1, moe.num_experts // 2)
