"""Cosine routing on a low-dimensional sphere.

Legend: T tokens, D width, P low dimension, N experts, k experts chosen.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.config.schema import MoEConfig, RouterConfig
from vqmoe_ds.moe.routers.base import KnownRoute, Routing, auxiliary_loss, choose, drawn, softmax_over_all


class CosineScores(nn.Module):
    """``cos(A x, e_i) / tau`` in float32, with learned A, e and tau."""

    def __init__(self, width: int, low_dim: int, num_experts: int, temperature: float, seed: int, layer: int) -> None:
        super().__init__()
        numbers = drawn((low_dim, width + num_experts), 1.0, seed, layer, "scores")
        self.projection_PD = nn.Parameter((numbers[:, :width] * width**-0.5).contiguous())
        self.experts_NP = nn.Parameter((numbers[:, width:].t() * low_dim**-0.5).contiguous())
        self.log_temperature = nn.Parameter(torch.full((1,), math.log(temperature)))

    def forward(self, x_TD: Tensor) -> Tensor:
        low_TP = F.normalize(F.linear(x_TD.float(), self.projection_PD.float()), dim=-1)
        cosines_TN = low_TP @ F.normalize(self.experts_NP.float(), dim=-1).t()
        # A temperature near 0 would make the choice as hard as an argmax and its gradient vanish.
        return cosines_TN / self.log_temperature.float().exp().clamp_min(0.01)


class XMoERouter(nn.Module):
    """X-MoE (Chi 2022): TopK of ``softmax(cos(A x, e_i) / tau)``, ``A`` to a low dimension, tau learned.

    Both sides are normalised and tau is learned, as the paper has it; the baseline in the VQMoE release normalises
    the expert side only and has no temperature.
    """

    def __init__(self, width: int, config: MoEConfig, options: RouterConfig, seed: int, layer: int) -> None:
        super().__init__()
        low_dim = options.low_dim or max(1, config.num_experts // 2)
        self.config = config
        self.over_all = softmax_over_all(options.softmax_over, config.top_k)
        self.scores = CosineScores(width, low_dim, config.num_experts, options.temperature, seed, layer)

    def forward(self, x_TD: Tensor, known: KnownRoute | None = None) -> Routing:
        logits_TN = self.scores(x_TD)
        ids_Tk, weights_Tk = choose(logits_TN, self.config.top_k, self.over_all)
        return Routing(ids_Tk, weights_Tk, auxiliary_loss(logits_TN, ids_Tk, self.config))
