"""Two experts per token by two hashes: what ``hash_and_code`` must beat for its codes to be worth anything.

A plug-in, for benchmarks/grids/second-expert.yaml:

python tools/compare_routers.py benchmarks/grids/second-expert.yaml --plugin benchmarks/two_hashes.py --out runs/second
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqmoe_ds.config.schema import MoEConfig, RunConfig
from vqmoe_ds.moe import LayerConfig, Router, RouterOptions, Routing, RoutingContext, option, register_router
from vqmoe_ds.moe.routers.hash_token import hash_of_tokens


@register_router("two_hashes")
class TwoHashesRouter(Router):
    """``hash_and_code`` with another random balanced hash in the place of the code, weighed by the same gate."""

    class Options(RouterOptions):
        window: int = option(1, "tokens that the second hash looks at, the current one included", "tokens", ge=1, le=2)

    needs_top_k = False
    needs_token_ids = True
    tables_PWV: Tensor

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.width, 2)
        # P: of the first expert and of the second; W: by the current token and by the one before it.
        seed = 4 * (config.seed * 1000 + config.layer)
        tables = [hash_of_tokens(config.vocab_size, config.moe.num_experts, 2, seed + place) for place in range(2)]
        self.register_buffer("tables_PWV", torch.stack(tables))

    @classmethod
    def rows_per_token(cls, moe: MoEConfig, options: Any) -> int:
        return 2

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        return 4 * run.model.width

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        ids_T = context.token_ids_T
        assert ids_T is not None and context.sequence is not None
        first_T, second_T = self.tables_PWV[:, 0, ids_T]
        if self.options.window == 2:
            earlier_BS = self.tables_PWV[1, 1, ids_T].view(-1, context.sequence)
            second_T = second_T + nn.functional.pad(earlier_BS[:, :-1], (1, 0)).flatten()
        ids_TR = torch.stack([first_T, second_T % self.moe.num_experts], dim=1)
        return Routing(ids_TR, self.gate(x_TD).float().softmax(dim=-1))
