"""The learned linear router.

Legend: T tokens, D width, N experts, k experts chosen.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.config.routers import register_router
from vqmoe_ds.config.schema import CodeSource, MoEConfig, RunConfig
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
    exported_as: ClassVar[str | None] = "topk"

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


@register_router("topk_context")
class TopKContextRouter(TopKRouter):
    """The learned linear router with the vectors that codes look at in place of its layer's state.

    ``softmax(W s)`` with ``s`` the vector of ``codebook.source`` at unit root mean square; the embeddings get no
    gradient from it. The control that says whether codes lead by what they look at: experts still see the state.
    """

    is_stock = False
    exported_as = None
    reads_source = True
    needs_token_ids = True

    @classmethod
    def check(cls, run: RunConfig) -> None:
        if run.codebook.source in (CodeSource.LAYER_STATE, CodeSource.EARLY_BLOCK):
            raise ValueError(
                f"moe.router=topk_context reads what is known before the first block, not codebook.source="
                f"{run.codebook.source.value}; set it to context, token_embedding or position_embedding"
            )

    @classmethod
    def linear_gate(cls, moe: MoEConfig) -> str | None:
        return None

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        if context.source_TD is None:
            raise ValueError(
                "the topk_context router needs RoutingContext.source_TD: the vectors of codebook.source for its tokens"
            )
        return super().route(F.rms_norm(context.source_TD, context.source_TD.shape[-1:], eps=1e-6), context)
