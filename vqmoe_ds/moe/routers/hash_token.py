"""Experts from a table of token ids.

Legend: T tokens, L MoE layers, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.config.routers import register_router
from vqmoe_ds.config.schema import MoEConfig, RunConfig
from vqmoe_ds.moe.routers.base import Router, Routing, RoutingContext


@register_router("hash_token")
class HashTokenRouter(Router):
    """Random balanced hash of the token id (Hash Layers, Roller 2021): a table per layer, drawn once."""

    needs_top_k = False
    uses_token_table = True
    needs_token_ids = True
    exported_as = "hash_token"

    @classmethod
    def rows_per_token(cls, moe: MoEConfig, options: Any) -> int:
        return 1

    @classmethod
    def weights_rows(cls, run: RunConfig) -> bool:
        return False

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        return 0

    @classmethod
    def known_ahead(cls, run: RunConfig) -> bool:
        return True

    @classmethod
    def token_table(cls, run: RunConfig, layers: int) -> Tensor:
        return hash_of_tokens(run.model.vocab_size, run.moe.num_experts, layers, run.train.seed)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        return Routing(self.told_experts(context))


def hash_of_tokens(vocab_size: int, num_experts: int, num_layers: int, seed: int) -> Tensor:
    """Random balanced table: token id -> expert, int64 ``[L, V]``."""
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randperm(vocab_size, generator=generator) % num_experts for _ in range(num_layers)]
    return torch.stack(tables)
