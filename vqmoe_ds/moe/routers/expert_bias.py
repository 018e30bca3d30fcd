"""Balance without a loss: a bias on the choice.

Legend: T tokens, D width, N experts, k experts chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqmoe_ds.config.fields import LARGEST_WEIGHT, option
from vqmoe_ds.config.routers import register_router
from vqmoe_ds.config.schema import SoftmaxOver
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import (
    Float32Linear,
    Routing,
    RoutingContext,
    StatefulRouter,
    TopKOptions,
    count_experts,
    z_loss,
)


@register_router("expert_bias")
class ExpertBiasRouter(StatefulRouter):
    """Loss-free balancing (Wang 2024, DeepSeek-V3).

    ``s = sigmoid(W x)``; the experts are TopK of ``s_i + b_i``, their weights ``s_i / sum_chosen s``. Once an optimizer
    step, from the loads of all ranks, ``b_i <- b_i + u sign(mean load - load_i)``. The bias takes part in the choice
    alone; it has no gradient, and no balance loss is added.

    At k = 1 the normalised weight would be the constant 1 and the gate would never learn: there it is ``s_i``.
    """

    class Options(TopKOptions):
        bias_rate: float = option(0.001, "how far the bias of an expert moves per step", gt=0, le=LARGEST_WEIGHT)

    structure = ("softmax_over",)
    bias_N: Tensor

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config, config.moe.num_experts)
        over = self.options.softmax_over
        self.normalised = self.moe.top_k > 1 if over is SoftmaxOver.AUTO else over is SoftmaxOver.CHOSEN
        self.gate = Float32Linear(config.width, self.moe.num_experts)
        self.register_buffer("bias_N", torch.zeros(self.moe.num_experts, dtype=torch.float32))

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TN = self.gate(x_TD)
        scores_TN = logits_TN.sigmoid()
        ids_Tk = (scores_TN.detach() + self.bias_N).topk(self.moe.top_k, dim=-1).indices
        weights_Tk = scores_TN.gather(1, ids_Tk)
        if self.normalised:
            weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
        if self.observing:
            self.observe(count_experts(ids_Tk, self.moe.num_experts))
        return Routing(ids_Tk, weights_Tk, z_loss(logits_TN, self.moe, context.mean_tokens))

    def learn(self, statistics: Tensor) -> None:
        # Counts are exact in float64 in whatever order they were added, so the sign is the same in every layout.
        self.bias_N += self.options.bias_rate * (statistics.mean() - statistics).sign().to(self.bias_N.dtype)
