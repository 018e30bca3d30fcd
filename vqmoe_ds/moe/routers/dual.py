"""One discrete expert per token, known without a gradient, beside a linear router.

Legend: T tokens, R routed rows per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vqmoe_ds.config.schema import MoEConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import Router, Routing, RoutingContext, TopKOptions
from vqmoe_ds.moe.routers.topk import TopKRouter


class DualRouter(Router):
    """Base of routers with two paths, ``y = g_c f_SMoE(x) + g_d E(x)`` with ``g = softmax(W_g x)`` (VQMoE Eq. 4).

    A subclass names the expert E of each token; ``beside`` adds the linear router. ``moe.top_k = 0`` leaves E alone.
    """

    Options = TopKOptions
    structure: ClassVar[tuple[str, ...]] = ("softmax_over",)
    needs_top_k = False

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.continuous = TopKRouter(config) if self.moe.top_k else None
        self.path_gate = nn.Linear(config.width, 2) if self.moe.top_k else None

    @classmethod
    def rows_per_token(cls, moe: MoEConfig, options: Any) -> int:
        return moe.top_k + 1

    @classmethod
    def linear_gate(cls, moe: MoEConfig) -> str | None:
        return "continuous.gate.weight" if moe.top_k else None

    def beside(self, x_TD: Tensor, context: RoutingContext, discrete: Routing) -> Routing:
        """The rows of the linear router and the one discrete row of each token, weighted by the gate.

        Args:
            x_TD: as of ``route``.
            context: as of ``route``.
            discrete: the discrete rows alone, with an auxiliary loss.
        """
        normed: Literal["last"] | None = "last" if self.moe.output_norm else None
        discrete = replace(discrete, input_norm=self.moe.input_norm, output_norm=normed)
        if self.continuous is None or self.path_gate is None:
            return discrete
        # The discrete row stands last, in ids as in weights: its sort is made ahead and merged behind that of the
        # others (`MoELayer._plan`), and its offset and norms are those of the last slot.
        smoe = self.continuous(x_TD, context)
        gates_T2 = self.path_gate(x_TD).float().softmax(dim=-1)
        weight_T1 = gates_T2[:, 1:] if discrete.weights_TR is None else gates_T2[:, 1:] * discrete.weights_TR
        return replace(
            discrete,
            expert_ids_TR=torch.cat([smoe.expert_ids_TR, discrete.expert_ids_TR], dim=1),
            weights_TR=torch.cat([gates_T2[:, :1] * smoe.weights_TR, weight_T1], dim=1),
            aux_loss=discrete.aux_loss + smoe.aux_loss,
            last_is_discrete=True,
        )
