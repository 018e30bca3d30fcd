"""Routing to running means of what was routed there.

Legend: T tokens, D width, N experts, k experts chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.config.fields import LARGEST_WEIGHT, option
from vqmoe_ds.config.routers import register_router
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import (
    Routing,
    RoutingContext,
    StatefulRouter,
    TopKOptions,
    choose,
    drawn,
    softmax_over_all,
    sum_by_expert,
)


@register_router("online_kmeans")
class OnlineKMeansRouter(StatefulRouter):
    """Online k-means (Ahrac, Hochwald and Geva 2026, arXiv 2605.12476): TopK of ``cos(x, c_i)``; no parameters.

    ``c_i`` is the running mean of the states routed to expert i. Once an optimizer step
    ``m_i <- d m_i + (1 - d) sum of the states routed to i``; an expert without tokens keeps its place. A cosine does
    not feel the length of a mean, so its sum serves. Weights are the softmax of ``cos / router.temperature`` over the
    chosen; our choice, as only the paper's abstract was read.
    """

    class Options(TopKOptions):
        temperature: float = option(0.3, "of the cosines in the weights", gt=0, le=LARGEST_WEIGHT)
        decay: float = option(0.99, "decay of running statistics per step", ge=0, lt=1)

    structure = ("softmax_over",)
    means_ND: Tensor

    def __init__(self, config: LayerConfig) -> None:
        shape = (config.moe.num_experts, config.width)
        super().__init__(config, *shape)
        self.over_all = softmax_over_all(self.options.softmax_over, self.moe.top_k, learned=False)
        means_ND = drawn(shape, config.width**-0.5, config.seed, config.layer, "means", dtype=torch.float32)
        self.register_buffer("means_ND", means_ND)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        # Weights carry a gradient to x; the choice and the means have none.
        cosines_TN = F.normalize(x_TD.float(), dim=-1) @ F.normalize(self.means_ND.float(), dim=-1).t()
        ids_Tk, weights_Tk = choose(cosines_TN / self.options.temperature, self.moe.top_k, self.over_all)
        if self.observing:
            states_MD = x_TD.detach().float().repeat_interleave(self.moe.top_k, dim=0)
            self.observe(sum_by_expert(states_MD, ids_Tk.flatten(), self.moe.num_experts))
        return Routing(ids_Tk, weights_Tk)

    def learn(self, statistics: Tensor) -> None:
        decay = self.averaging(self.options.decay)
        moved_ND = decay * self.means_ND.double() + (1 - decay) * statistics
        # Moved too, the mean of an expert without tokens would be zero after the first step, whose decay is 0, and its
        # cosine with every state 0.
        used_N1 = (statistics != 0).any(dim=1, keepdim=True)
        self.means_ND.copy_(torch.where(used_N1, moved_ND, self.means_ND.double()))
