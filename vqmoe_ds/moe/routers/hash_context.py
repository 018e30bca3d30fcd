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
    def token_table(cls, run: RunConfig, layers: int) -> Tensor:
        generator = torch.Generator().manual_seed(run.train.seed)
        vocab, experts, window = run.model.vocab_size, run.moe.num_experts, cls.looks_back(run) + 1
        # The tables of the token itself come first, as those of hash_token.
        tables = [torch.randperm(vocab, generator=generator) % experts for _ in range(window * layers)]
        return torch.stack(tables).view(window, layers, vocab).transpose(0, 1).contiguous()

    @classmethod
    def experts_of(cls, table: Tensor, ids_BS: Tensor, num_experts: int, positions_BS: Tensor | None = None) -> Tensor:
        """Experts by a table ``[L, W, V]``, int64 ``[L, B, S]``; of places before a document nothing is added."""
        # Indexing by a tensor copies, so the sums below leave the table as it is.
        sums_LBS = table[:, 0][:, ids_BS]
        for back in range(1, min(table.shape[1], ids_BS.shape[1])):
            added_LBS = table[:, back][:, ids_BS[:, :-back]]
            sums_LBS[..., back:] += added_LBS if positions_BS is None else added_LBS * positions_BS[:, back:].ge(back)
        return sums_LBS % num_experts

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        if context.expert_ids_T is None:
            raise ValueError(
                "the hash_context router needs RoutingContext.expert_ids_T: the row of its layer in "
                "HashContextRouter.experts_of(HashContextRouter.token_table(run, layers), token_ids, num_experts)"
            )
        aux = x_TD.new_zeros((), dtype=torch.float32)
        return self.beside(x_TD, context, Routing(context.expert_ids_T.unsqueeze(1), aux_loss=aux))
