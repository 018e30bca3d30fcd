"""Two experts per token, both known before the first block: one by the token's id, one by its code."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vqmoe_ds.config.routers import register_router
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.moe.routers.known import KnownExpertsRouter
from vqmoe_ds.moe.routers.vq import VQRouter


@register_router("hash_and_code")
class HashAndCodeRouter(KnownExpertsRouter):
    """``y = g_1 E_{hash(token)}(x) + g_2 E_{map(k)}(x)`` with ``g = softmax(W x)`` and ``k`` the token's code.

    ``hash_token``'s balanced table, or that of ``router.path`` as ``token_table`` reads it, names the first expert and
    ``vq``'s codebook the second; only their weights are learned. ``moe.top_k`` has no effect.
    """

    uses_codebook = True
    exported_as = "hash_and_code"
    told_by = "the expert by token_table(run, layers) of the class, and that of the code"

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
    def told_rows(cls, options: Any) -> int:
        return 2

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        return VQRouter.lookup_flops(run, layer) + super().flops(run, layer)

    @classmethod
    def token_table(cls, run: RunConfig, layers: int) -> Tensor:
        return cls.by_token(run).token_table(run, layers)
