"""Routers: from tokens to expert indices and weights. One interface, so that all run on the same experts.

docs/routers.md has their equations, their state, and what differs from the released code of their papers;
docs/add-a-router.md how to write one. Importing this package registers the built-in ones.
"""

from __future__ import annotations

from typing import cast

from vqmoe_ds.moe.config import LayerConfig

from vqmoe_ds.moe.routers import (  # noqa: F401  # isort: skip  # in the order in which they are listed
    vq,
    topk,
    expert_bias,
    xmoe,
    stablemoe,
    frozen,
    hash_token,
    token_table,
    hash_context,
    hash_and_code,
    hash_ngrams,
    online_kmeans,
    expert_choice,
    adaptive_clustering,
    softmoe,
    dense,
)
from vqmoe_ds.moe.routers.base import Router, Routing, RoutingContext, StatefulRouter, draw_linear_maps

__all__ = ["Router", "Routing", "RoutingContext", "StatefulRouter", "build_router"]


def build_router(config: LayerConfig) -> Router:
    """The router of one MoE layer, with its initial weights."""
    router = cast(type[Router], config.moe.facts).build(config)
    draw_linear_maps(router, config.seed, config.layer)
    return router
