"""Two experts per token by two hashes: what ``hash_and_code`` must beat for its codes to be worth anything.

A plug-in, for benchmarks/grids/second-expert.yaml:

python tools/compare_routers.py benchmarks/grids/second-expert.yaml --plugin benchmarks/two_hashes.py --out runs/second
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqmoe_ds.config.schema import MoEConfig, RunConfig
from vqmoe_ds.moe import LayerConfig, Router, Routing, RoutingContext, register_router
from vqmoe_ds.moe.routers.hash_token import hash_of_tokens


@register_router("two_hashes")
class TwoHashesRouter(Router):
    """``hash_and_code`` with another random balanced hash in the place of the code, weighed by the same gate."""

    needs_top_k = False
    needs_token_ids = True
    tables_PV: Tensor

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.width, 2)
        seed = 4 * (config.seed * 1000 + config.layer)
        tables = [hash_of_tokens(config.vocab_size, config.moe.num_experts, 1, seed + place) for place in range(2)]
        self.register_buffer("tables_PV", torch.cat(tables))

    @classmethod
    def rows_per_token(cls, moe: MoEConfig, options: Any) -> int:
        return 2

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        return 4 * run.model.width

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        assert context.token_ids_T is not None
        return Routing(self.tables_PV[:, context.token_ids_T].T, self.gate(x_TD).float().softmax(dim=-1))
