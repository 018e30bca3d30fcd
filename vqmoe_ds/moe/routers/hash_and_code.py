"""Two experts per token, both known before the first block: one by the token's id, one by its code.

Legend: T tokens, D width, R = 2 routed rows per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqmoe_ds.config.fields import option
from vqmoe_ds.config.routers import RouterOptions, register_router
from vqmoe_ds.config.schema import MoEConfig, RunConfig
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import Router, Routing, RoutingContext
from vqmoe_ds.moe.routers.hash_token import hash_of_tokens
from vqmoe_ds.moe.routers.token_table import given_table, read_table
from vqmoe_ds.moe.routers.vq import VQRouter


@register_router("hash_and_code")
class HashAndCodeRouter(Router):
    """``y = g_1 E_{hash(token)}(x) + g_2 E_{map(k)}(x)`` with ``g = softmax(W x)`` and ``k`` the token's code.

    ``hash_token``'s balanced table, or that of ``router.path`` as ``token_table`` reads it, names the first expert and
    ``vq``'s codebook the second; only their weights are learned. ``moe.top_k`` has no effect.
    """

    class Options(RouterOptions):
        gated: bool = option(True, "weigh both experts by a softmax of the state; false: each counts as 1")
        path: str | None = option(None, "safetensors file with a table of token ids in place of the hash")

    structure = ("gated",)
    needs_top_k = False
    uses_codebook = True
    uses_token_table = True
    told_rows = 2
    needs_token_ids = True
    exported_as = "hash_and_code"

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.width, 2) if self.options.gated else None

    @classmethod
    def check(cls, run: RunConfig) -> None:
        VQRouter.check(run)
        book = run.codebook
        if not VQRouter.known_ahead(run):
            raise ValueError(
                f"moe.router=hash_and_code knows both experts before the first block, and codebook.source="
                f"{book.source.value} looks at what comes later; use context, token_embedding or position_embedding"
            )
        if book.groups > 1:
            raise ValueError(
                f"codebook.groups={book.groups} puts all experts of a token into one group, and the token's hash knows "
                "no groups; set codebook.groups=1 or moe.router=vq"
            )

    @classmethod
    def rows_per_token(cls, moe: MoEConfig, options: Any) -> int:
        return 2

    @classmethod
    def weights_rows(cls, run: RunConfig) -> bool:
        return bool(getattr(run.router, "gated", True))

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        return VQRouter.lookup_flops(run, layer) + (4 * run.model.width if cls.weights_rows(run) else 0)

    @classmethod
    def known_ahead(cls, run: RunConfig) -> bool:
        return True

    @classmethod
    def check_start(cls, run: RunConfig, layers: int) -> None:
        if (path := getattr(run.router, "path", None)) is not None:
            read_table(path, layers, run.model.vocab_size, run.moe.num_experts)

    @classmethod
    def token_table(cls, run: RunConfig, layers: int) -> Tensor:
        if getattr(run.router, "path", None) is not None:
            return given_table(run, layers)
        return hash_of_tokens(run.model.vocab_size, run.moe.num_experts, layers, run.train.seed)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        ids = context.expert_ids_T
        if ids is None or ids.dim() != 2:
            raise ValueError(
                "the hash_and_code router needs RoutingContext.expert_ids_T of two columns: the experts by "
                "HashAndCodeRouter.token_table(run, layers) and by codes"
            )
        # Column by column as `MoETransformer._routes_ahead` stacks the experts: the hash, then the code.
        weights_TR = None if self.gate is None else self.gate(x_TD).float().softmax(dim=-1)
        return Routing(ids, weights_TR, x_TD.new_zeros((), dtype=torch.float32))
