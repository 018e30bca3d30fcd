"""No experts: the baseline of every comparison."""

from __future__ import annotations

from typing import Any

from vqmoe_ds.config.routers import RouterFacts, register_router
from vqmoe_ds.config.schema import MoEConfig, RunConfig


@register_router("dense")
class Dense(RouterFacts):
    """A model of dense MLPs, as wide as the experts that a token would use."""

    has_experts = False
    needs_top_k = False
    exported_as = "dense"

    @classmethod
    def rows_per_token(cls, moe: MoEConfig, options: Any) -> int:
        return max(1, moe.top_k)

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        return 0
