"""Routers: from tokens to expert indices and weights. One interface, so that all run on the same experts.

docs/routers.md has their equations, their state, and what differs from the released code of their papers.
"""

from __future__ import annotations

from torch import nn

from vqmoe_ds.config.schema import CodebookConfig, MoEConfig, Router, RouterConfig
from vqmoe_ds.moe.routers.abilities import (
    require_causal,
    routes_ahead,
    rows_per_token,
    why_not_causal,
    why_not_exported,
)
from vqmoe_ds.moe.routers.adaptive_clustering import AdaptiveClusteringRouter
from vqmoe_ds.moe.routers.base import Float32Linear, KnownRoute, Routing, StatefulRouter
from vqmoe_ds.moe.routers.expert_bias import ExpertBiasRouter
from vqmoe_ds.moe.routers.expert_choice import ExpertChoiceRouter
from vqmoe_ds.moe.routers.frozen import RandomFrozenRouter, SMoEDropoutRouter
from vqmoe_ds.moe.routers.hash_token import hash_of_tokens
from vqmoe_ds.moe.routers.online_kmeans import OnlineKMeansRouter
from vqmoe_ds.moe.routers.stablemoe import StableMoERouter
from vqmoe_ds.moe.routers.topk import TopKRouter
from vqmoe_ds.moe.routers.vq import VQRouter
from vqmoe_ds.moe.routers.xmoe import XMoERouter

__all__ = [
    "AdaptiveClusteringRouter",
    "ExpertBiasRouter",
    "ExpertChoiceRouter",
    "Float32Linear",
    "KnownRoute",
    "OnlineKMeansRouter",
    "RandomFrozenRouter",
    "Routing",
    "SMoEDropoutRouter",
    "StableMoERouter",
    "StatefulRouter",
    "TopKRouter",
    "VQRouter",
    "XMoERouter",
    "build_router",
    "hash_of_tokens",
    "require_causal",
    "routes_ahead",
    "rows_per_token",
    "why_not_causal",
    "why_not_exported",
]


def build_router(
    width: int,
    layer: int,
    config: MoEConfig,
    book: CodebookConfig,
    options: RouterConfig | None = None,
    seed: int = 0,
    vocab_size: int = 0,
    steps: int = 1,
) -> nn.Module | None:
    """The router of one MoE layer; None where the route is known from the tokens alone.

    Args:
        width: model width D.
        layer: index among the MoE layers.
        options: of the routers beside vq.
        seed: of weights and state drawn here; each layer has its own numbers.
        vocab_size: of the model (read by stablemoe).
        steps: optimizer steps of the run, by which schedules go that are not given in steps.
    """
    options = options or RouterConfig()
    router = config.router
    if router is Router.VQ:
        return VQRouter(width, layer, config, book, options)
    if router is Router.TOPK or (router is Router.ADAPTIVE_CLUSTERING and layer == 0):
        return TopKRouter(width, config, options)
    if router is Router.EXPERT_BIAS:
        return ExpertBiasRouter(width, config, options)
    if router is Router.EXPERT_CHOICE:
        return ExpertChoiceRouter(width, config)
    if router is Router.SMOE_DROPOUT:
        return SMoEDropoutRouter(width, config, options, seed, layer, steps)
    if router is Router.STABLEMOE:
        return StableMoERouter(width, config, options, seed, layer, vocab_size, steps)
    drawn_here = {
        Router.XMOE: XMoERouter,
        Router.RANDOM_FROZEN: RandomFrozenRouter,
        Router.ONLINE_KMEANS: OnlineKMeansRouter,
        Router.ADAPTIVE_CLUSTERING: AdaptiveClusteringRouter,
    }
    return drawn_here[router](width, config, options, seed, layer) if router in drawn_here else None
