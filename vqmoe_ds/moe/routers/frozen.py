"""Routers that never learn: a random gate, alone or with more and more experts per token.

Legend: T tokens, D width, N experts, k experts chosen.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vqmoe_ds.config.fields import MOST_EXPERTS, MOST_STEPS, option
from vqmoe_ds.config.routers import register_router
from vqmoe_ds.config.schema import MoEConfig, RunConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import (
    Routing,
    RoutingContext,
    StatefulRouter,
    TopKOptions,
    choose,
    drawn,
    softmax_over_all,
)


@register_router("random_frozen")
class RandomFrozenRouter(StatefulRouter):
    """TopK of ``softmax(W x)`` with a random ``W`` that stays: the control of every learned router (Chen 2023).

    Weights are the softmax over the chosen, so 1 at k = 1: there is no gate to teach. ``W`` is a float32 buffer, so
    bfloat16, the optimizer and its weight decay leave it alone.
    """

    Options: ClassVar[type[TopKOptions]] = TopKOptions
    structure = ("softmax_over",)
    gate_ND: Tensor

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        shape = (self.moe.num_experts, config.width)
        self.register_buffer("gate_ND", drawn(shape, config.width**-0.5, config.seed, config.layer, "gate"))

    @property
    def top_k(self) -> int:
        """Experts a token is sent to now."""
        return self.moe.top_k

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TN = x_TD.float() @ self.gate_ND.t()
        over_all = softmax_over_all(self.options.softmax_over, self.top_k, learned=False)
        return Routing(*choose(logits_TN, self.top_k, over_all))


@register_router("smoe_dropout")
class SMoEDropoutRouter(RandomFrozenRouter):
    """SMoE-Dropout (Chen 2023): a frozen random gate whose k grows linearly over training.

    ``k(t) = round(k_0 + (k_1 - k_0) t / steps)`` with ``k_0 = moe.top_k`` and ``k_1 = router.final_top_k``, t the
    optimizer steps taken, which is kept in the checkpoint. Evaluation uses the k of its moment.
    """

    class Options(TopKOptions):
        final_top_k: int = option(0, "moe.top_k grows to this; 0: all experts", "experts", ge=0, le=MOST_EXPERTS)
        growth_steps: int = option(0, "steps over which it grows; 0: the whole run", "steps", ge=0, le=MOST_STEPS)

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.growth_steps = self.options.growth_steps or config.steps

    @classmethod
    def check(cls, run: RunConfig) -> None:
        first, last = run.moe.top_k, cls._final(run.moe, run.router)
        if not first <= last <= run.moe.num_experts:
            raise ValueError(
                f"router.final_top_k={last} must lie between moe.top_k={first} and "
                f"moe.num_experts={run.moe.num_experts}"
            )

    @classmethod
    def rows_per_token(cls, moe: MoEConfig, options: Any) -> int:
        return -(-(moe.top_k + cls._final(moe, options)) // 2)

    @classmethod
    def with_schedules(cls, options: Any, steps: int) -> Any:
        return options.model_copy(update={"growth_steps": options.growth_steps or steps})

    @staticmethod
    def _final(moe: MoEConfig, options: Any) -> int:
        """Experts per token at the end of the growth."""
        return options.final_top_k or moe.num_experts

    def experts_of_tokens(self, routing: Routing, tokens: int) -> Tensor:
        return routing.expert_ids_TR[:, : self.moe.top_k]

    @property
    def top_k(self) -> int:
        first, last = self.moe.top_k, self._final(self.moe, self.options)
        done = min(1.0, self.steps_taken / max(1, self.growth_steps))
        return int(first + (last - first) * done + 0.5)
