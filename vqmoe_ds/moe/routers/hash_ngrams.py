"""Experts from hashes of the last token, the last two, and so on: all known before the first block.

Legend: B batch, S sequence, L MoE layers, V vocabulary, N experts, P tables of a layer, R routed rows per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.config.fields import option
from vqmoe_ds.config.routers import register_router
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.moe.routers.hash_context import hash_of_window, tables_by_place
from vqmoe_ds.moe.routers.known import KnownExpertsRouter


@register_router("hash_ngrams")
class HashNGramsRouter(KnownExpertsRouter):
    """``y = sum_n g_n E_{h_n}(x)`` with ``g = softmax(W x)`` and ``h_n`` a hash of the last n tokens, n = 1 to R.

    ``h_n = (sum_j T_{n,j}[token_{t-j}]) mod N`` over ``j < n``, with random balanced tables of every layer's and n's
    own (simple tabulation hashing, Carter and Wegman 1979). The expert of the single token is ``hash_token``'s, or that
    of the table of ``router.path``.
    """

    class Options(KnownExpertsRouter.Options):
        ngrams: int = option(
            2, "experts per token: by a hash of the token, of it and the one before, and so on", "experts", ge=1, le=8
        )

    structure = (*KnownExpertsRouter.structure, "ngrams")
    exported_as = "hash_ngrams"

    @classmethod
    def told_rows(cls, options: Any) -> int:
        return int(getattr(options, "ngrams", 2))

    @classmethod
    def looks_back(cls, run: RunConfig) -> int:
        return cls.told_rows(run.router) - 1

    @classmethod
    def table_shape(cls, run: RunConfig, layers: int) -> tuple[int, ...]:
        rows = cls.told_rows(run.router)
        return layers, rows * (rows + 1) // 2, run.model.vocab_size

    @classmethod
    def token_table(cls, run: RunConfig, layers: int) -> Tensor:
        tables = tables_by_place(run, cls.table_shape(run, layers))
        tables[:, 0] = cls.by_token(run).token_table(run, layers)
        return tables

    @classmethod
    def experts_of(cls, table: Tensor, ids_BS: Tensor, num_experts: int, positions_BS: Tensor | None = None) -> Tensor:
        """Experts by tables ``[L, P, V]``, int64 ``[L, B, S, R]``; those of n tokens are n in a row."""
        rows = int((2 * table.shape[1]) ** 0.5)  # P = R (R + 1) / 2
        tables = table.split(list(range(1, rows + 1)), dim=1)
        sums = [hash_of_window(table_LWV, ids_BS, positions_BS) for table_LWV in tables]
        return torch.stack(sums, dim=-1) % num_experts
