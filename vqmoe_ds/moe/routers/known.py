"""What routers share that name several experts per token before the first block.

Legend: T tokens, D width, R routed rows per token, L MoE layers, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqmoe_ds.config.fields import option
from vqmoe_ds.config.routers import RouterOptions
from vqmoe_ds.config.schema import MoEConfig, RunConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import Router, Routing, RoutingContext
from vqmoe_ds.moe.routers.hash_token import HashTokenRouter
from vqmoe_ds.moe.routers.token_table import TokenTableRouter


class KnownExpertsRouter(Router):
    """Base of routers of R told experts per token, ``y = sum_r g_r E_r(x)`` with ``g = softmax(W x)``.

    The first is that of the token alone. Only the weights are learned; a single expert counts as 1. ``moe.top_k`` has
    no effect.
    """

    class Options(RouterOptions):
        gated: bool = option(True, "weigh the experts by a softmax of the state; false: each counts as 1")
        path: str | None = option(
            None, "safetensors file with a table of token ids in place of the token's hash; read where a run starts"
        )

    structure: ClassVar[tuple[str, ...]] = ("gated",)
    needs_top_k = False
    uses_token_table = True
    needs_token_ids = True

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        rows = self.told_rows(self.options)
        self.gate = nn.Linear(config.width, rows) if self._weighs(self.options) else None

    @classmethod
    def _weighs(cls, options: Any) -> bool:
        return bool(getattr(options, "gated", True)) and cls.told_rows(options) > 1

    @classmethod
    def rows_per_token(cls, moe: MoEConfig, options: Any) -> int:
        return cls.told_rows(options)

    @classmethod
    def weights_rows(cls, run: RunConfig) -> bool:
        return cls._weighs(run.router)

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        return 2 * run.model.width * cls.told_rows(run.router) if cls.weights_rows(run) else 0

    @classmethod
    def known_ahead(cls, run: RunConfig) -> bool:
        return True

    @classmethod
    def by_token(cls, run: RunConfig) -> type[HashTokenRouter]:
        """The router whose table ``[L, V]`` names the first expert: that of ``router.path``, where one is given."""
        return HashTokenRouter if getattr(run.router, "path", None) is None else TokenTableRouter

    @classmethod
    def check_start(cls, run: RunConfig, layers: int) -> None:
        cls.by_token(run).check_start(run, layers)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        # Column by column as `MoETransformer._routes_ahead` joins the experts, those of the table first.
        ids_TR = self.told_experts(context)
        weights_TR = None if self.gate is None else self.gate(x_TD).float().softmax(dim=-1)
        return Routing(ids_TR, weights_TR, x_TD.new_zeros((), dtype=torch.float32))
