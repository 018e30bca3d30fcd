"""Experts from a hash of the last tokens: what codes over the same tokens must beat.

Legend: T tokens, B batch, S sequence, L MoE layers, V vocabulary, N experts, W tokens of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqmoe_ds.config.fields import option
from vqmoe_ds.config.routers import register_router
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.moe.routers.base import Routing, RoutingContext, TopKOptions
from vqmoe_ds.moe.routers.dual import DualRouter
from vqmoe_ds.moe.routers.hash_token import hash_of_tokens


@register_router("hash_context")
class HashContextRouter(DualRouter):
    """The router of codes with a hash in their place: the control that says what the codes themselves are worth.

    The discrete expert of a token is ``(sum_j T_j[token_{t-j}]) mod N`` over the last ``router.window`` tokens, with
    one random balanced table ``T_j`` per place and layer (simple tabulation hashing, Carter and Wegman 1979). A window
    of 3 hashes what ``codebook.source=context`` mixes, and 1 is ``hash_token``, table by table. Everything else (the
    linear router beside it, the gate, the norms) is that of ``vq``.
    """

    class Options(TopKOptions):
        window: int = option(3, "tokens that are hashed, the current one included", "tokens", ge=1, le=64)

    structure = ("softmax_over", "window")
    uses_token_table = True
    needs_token_ids = True

    @classmethod
    def weights_rows(cls, run: RunConfig) -> bool:
        return run.moe.top_k > 0

    @classmethod
    def flops(cls, run: RunConfig, layer: int) -> int:
        return super().flops(run, layer) + 4 * run.model.width if run.moe.top_k else 0

    @classmethod
    def known_ahead(cls, run: RunConfig) -> bool:
        return True

    @classmethod
    def looks_back(cls, run: RunConfig) -> int:
        return int(getattr(run.router, "window", 1)) - 1

    @classmethod
    def table_shape(cls, run: RunConfig, layers: int) -> tuple[int, ...]:
        return layers, cls.looks_back(run) + 1, run.model.vocab_size

    @classmethod
    def token_table(cls, run: RunConfig, layers: int) -> Tensor:
        return tables_by_place(run, cls.table_shape(run, layers))

    @classmethod
    def experts_of(cls, table: Tensor, ids_BS: Tensor, num_experts: int, positions_BS: Tensor | None = None) -> Tensor:
        """Experts by a table ``[L, W, V]``, int64 ``[L, B, S, 1]``; of places before a document nothing is added."""
        return hash_of_window(table, ids_BS, positions_BS).unsqueeze(-1) % num_experts

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        aux = x_TD.new_zeros((), dtype=torch.float32)
        return self.beside(x_TD, context, Routing(self.told_experts(context), aux_loss=aux))


def tables_by_place(run: RunConfig, shape: tuple[int, ...]) -> Tensor:
    """Random balanced tables of token ids, one per layer and place, int64 of shape ``[L, P, V]``."""
    # The tables of the first place are drawn first: they are those of hash_token.
    layers, places, vocab = shape
    tables = hash_of_tokens(vocab, run.moe.num_experts, places * layers, run.train.seed)
    return tables.unflatten(0, (places, layers)).transpose(0, 1).contiguous()


def hash_of_window(table_LWV: Tensor, ids_BS: Tensor, positions_BS: Tensor | None) -> Tensor:
    """Sums over the last W tokens of the same document, each by the table of its place, int64 ``[L, B, S]``."""
    # Indexing by a tensor copies, so the sums below leave the table as it is.
    sums_LBS = table_LWV[:, 0][:, ids_BS]
    for back in range(1, min(table_LWV.shape[1], ids_BS.shape[1])):
        added_LBS = table_LWV[:, back][:, ids_BS[:, :-back]]
        sums_LBS[..., back:] += added_LBS if positions_BS is None else added_LBS * positions_BS[:, back:].ge(back)
    return sums_LBS
