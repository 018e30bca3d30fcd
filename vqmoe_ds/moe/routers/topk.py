"""The learned linear router.

Legend: T tokens, D width, N experts, k experts chosen.
"""

from __future__ import annotations

from torch import Tensor, nn

from vqmoe_ds.config.schema import MoEConfig, RouterConfig
from vqmoe_ds.moe.routers.base import (
    Float32Linear,
    KnownRoute,
    Routing,
    auxiliary_loss,
    choose,
    softmax_over_all,
)


class TopKRouter(nn.Module):
    """Linear router: the k largest of ``softmax(W x)`` (Shazeer 2017; Switch, Fedus 2021: k = 1; GLaM, Du 2021: k = 2).

    Unless ``router.softmax_over`` says otherwise, the weight is the full-softmax probability at k = 1, so that the
    router learns, and the softmax over the chosen at k > 1. The balance loss is Switch's ``N sum_e f_e P_e``; the
    z-loss ST-MoE's ``mean(logsumexp^2)``.
    """

    def __init__(self, width: int, config: MoEConfig, options: RouterConfig | None = None) -> None:
        super().__init__()
        self.config = config
        over = (options or RouterConfig()).softmax_over
        self.over_all = softmax_over_all(over, config.top_k)
        self.gate = Float32Linear(width, config.num_experts)

    def forward(self, x_TD: Tensor, known: KnownRoute | None = None) -> Routing:
        logits_TN = self.gate(x_TD)
        ids_Tk, weights_Tk = choose(logits_TN, self.config.top_k, self.over_all)
        return Routing(ids_Tk, weights_Tk, auxiliary_loss(logits_TN, ids_Tk, self.config))
