"""Balance without a loss: a bias on the choice.

Legend: T tokens, D width, N experts, k experts chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqmoe_ds.config.schema import MoEConfig, RouterConfig, SoftmaxOver
from vqmoe_ds.moe.routers.base import Float32Linear, KnownRoute, Routing, StatefulRouter, count_experts


class ExpertBiasRouter(StatefulRouter):
    """Loss-free balancing (Wang 2024, DeepSeek-V3).

    ``s = sigmoid(W x)``; the experts are TopK of ``s_i + b_i``, their weights ``s_i / sum_chosen s``. Once an optimizer
    step, from the loads of all ranks, ``b_i <- b_i + u sign(mean load - load_i)``. The bias takes part in the choice
    alone; it has no gradient, and no balance loss is added.

    At k = 1 the normalised weight would be the constant 1 and the gate would never learn: there it is ``s_i``.
    """

    bias_N: Tensor

    def __init__(self, width: int, config: MoEConfig, options: RouterConfig) -> None:
        super().__init__(config.num_experts)
        self.config, self.rate = config, options.bias_rate
        over = options.softmax_over
        self.normalised = config.top_k > 1 if over is SoftmaxOver.AUTO else over is SoftmaxOver.CHOSEN
        self.gate = Float32Linear(width, config.num_experts)
        self.register_buffer("bias_N", torch.zeros(config.num_experts))

    def forward(self, x_TD: Tensor, known: KnownRoute | None = None) -> Routing:
        config = self.config
        logits_TN = self.gate(x_TD)
        scores_TN = logits_TN.sigmoid()
        ids_Tk = (scores_TN.detach() + self.bias_N).topk(config.top_k, dim=-1).indices
        weights_Tk = scores_TN.gather(1, ids_Tk)
        if self.normalised:
            weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
        if self.observing:
            self.observe(count_experts(ids_Tk, config.num_experts))
        aux = logits_TN.new_zeros(())
        if config.z_loss_weight:
            aux = config.z_loss_weight * logits_TN.logsumexp(dim=-1).square().mean()
        return Routing(ids_Tk, weights_Tk, aux)

    def learn(self, statistics: Tensor) -> None:
        self.bias_N += self.rate * (statistics.mean() - statistics).sign().to(self.bias_N.dtype)
