"""The public library: an MoE layer for any training loop, its routers, and what keeps their state in step.

docs/use-the-layer.md shows it in plain PyTorch, under DDP, FSDP2 and DeepSpeed, with and without expert parallelism;
docs/add-a-router.md how to write a router. Importing it imports PyTorch and nothing heavier.
"""

from __future__ import annotations

from vqmoe_ds.config.fields import option
from vqmoe_ds.config.routers import RouterOptions, register_router
from vqmoe_ds.config.schema import CodebookConfig, CodeSource, MoEConfig
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.gradients import clip_gradients, sync_gradients
from vqmoe_ds.moe.health import CodebookHealth, codebook_health
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.moe.routers.base import Router, Routing, RoutingContext, StatefulRouter
from vqmoe_ds.moe.state_sync import StateSync

__all__ = [
    "CodeSource",
    "CodebookBank",
    "CodebookConfig",
    "CodebookHealth",
    "LayerConfig",
    "MoEConfig",
    "MoELayer",
    "Router",
    "RouterOptions",
    "Routing",
    "RoutingContext",
    "StateSync",
    "StatefulRouter",
    "clip_gradients",
    "codebook_health",
    "option",
    "register_router",
    "sync_gradients",
]
