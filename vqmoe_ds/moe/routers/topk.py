"""The learned linear router.

Legend: T tokens, D width, N experts, k experts chosen.
"""

from __future__ import annotations

from torch import Tensor

from vqmoe_ds.config.routers import register_router
from vqmoe_ds.config.schema import MoEConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import (
    Float32Linear,
    Router,
    Routing,
    RoutingContext,
    TopKOptions,
    auxiliary_loss,
    choose,
    softmax_over_all,
)


@register_router("topk")
class TopKRouter(Router):
    """Linear router: the k largest of ``softmax(W x)`` (Shazeer 2017; Switch, Fedus 2021: k = 1; GLaM, Du 2021: k = 2).

    Unless ``router.softmax_over`` says otherwise, the weight is the full-softmax probability at k = 1, so that the
    router learns, and the softmax over the chosen at k > 1. The balance loss is Switch's ``N sum_e f_e P_e``; the
    z-loss ST-MoE's ``mean(logsumexp^2)``.
    """

    Options = TopKOptions
    structure = ("softmax_over",)
    is_stock = True
    exported_as = "topk"

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.over_all = softmax_over_all(self.options.softmax_over, self.moe.top_k)
        self.gate = Float32Linear(config.width, self.moe.num_experts)

    @classmethod
    def linear_gate(cls, moe: MoEConfig) -> str | None:
        return "gate.weight"

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TN = self.gate(x_TD)
        ids_Tk, weights_Tk = choose(logits_TN, self.moe.top_k, self.over_all)
        return Routing(ids_Tk, weights_Tk, auxiliary_loss(logits_TN, ids_Tk, self.moe, context))
