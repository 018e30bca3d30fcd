"""No experts: the baseline of every comparison."""

from __future__ import annotations

from vqmoe_ds.config.routers import RouterFacts, register_router
from vqmoe_ds.config.schema import RunConfig


@register_router("dense")
class Dense(RouterFacts):
    """A model of dense MLPs, as wide as the experts that a token would use."""

    has_experts = False
    needs_top_k = False
    exported_as = "dense"

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        return 0
