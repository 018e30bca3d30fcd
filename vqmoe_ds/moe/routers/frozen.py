"""Routers that never learn: a random gate, alone or with more and more experts a token.

Legend: T tokens, D width, N experts, k experts chosen.
"""

from __future__ import annotations

from torch import Tensor

from vqmoe_ds.config.schema import MoEConfig, RouterConfig
from vqmoe_ds.moe.routers.base import KnownRoute, Routing, StatefulRouter, choose, drawn, softmax_over_all


class RandomFrozenRouter(StatefulRouter):
    """TopK of ``softmax(W x)`` with a random ``W`` that stays: the control of every learned router (Chen 2023).

    Weights are the softmax over the chosen, so 1 at k = 1: there is no gate to teach. ``W`` is a float32 buffer, so
    bfloat16, the optimizer and its weight decay leave it alone.
    """

    gate_ND: Tensor

    def __init__(self, width: int, config: MoEConfig, options: RouterConfig, seed: int, layer: int) -> None:
        super().__init__(0)
        self.config, self.options = config, options
        self.register_buffer("gate_ND", drawn((config.num_experts, width), width**-0.5, seed, layer, "gate"))

    @property
    def top_k(self) -> int:
        """Experts a token is sent to now."""
        return self.config.top_k

    def forward(self, x_TD: Tensor, known: KnownRoute | None = None) -> Routing:
        logits_TN = x_TD.float() @ self.gate_ND.t()
        over_all = softmax_over_all(self.options.softmax_over, self.top_k, learned=False)
        return Routing(*choose(logits_TN, self.top_k, over_all))


class SMoEDropoutRouter(RandomFrozenRouter):
    """SMoE-Dropout (Chen 2023): a frozen random gate whose k grows linearly over training.

    ``k(t) = round(k_0 + (k_1 - k_0) t / steps)`` with ``k_0 = moe.top_k`` and ``k_1 = router.final_top_k``, t the
    optimizer steps taken, which is kept in the checkpoint. Evaluation uses the k of its moment.
    """

    def __init__(self, width: int, config: MoEConfig, options: RouterConfig, seed: int, layer: int, steps: int) -> None:
        super().__init__(width, config, options, seed, layer)
        self.growth_steps = options.growth_steps or steps

    @property
    def top_k(self) -> int:
        first, last = self.config.top_k, final_top_k(self.config, self.options)
        done = min(1.0, self.steps_taken / max(1, self.growth_steps))
        return int(first + (last - first) * done + 0.5)


def final_top_k(config: MoEConfig, options: RouterConfig) -> int:
    """Experts a token is sent to at the end of smoe_dropout's growth."""
    return options.final_top_k or config.num_experts
