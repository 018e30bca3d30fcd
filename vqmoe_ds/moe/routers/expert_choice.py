"""Experts that choose their tokens. Not causal.

Legend: B sequences, S tokens of one, T = B S tokens, D width, N experts, C tokens an expert takes of a sequence,
M = B N C routed rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.config.routers import LooksAhead, register_router
from vqmoe_ds.moe.config import LayerConfig
from vqmoe_ds.moe.routers.base import Float32Linear, Router, Routing, RoutingContext, z_loss


@register_router("expert_choice")
class ExpertChoiceRouter(Router):
    """Expert Choice (Zhou 2022): expert i takes the C tokens with the largest ``P_ti``, ``P_t = softmax(W x_t)``.

    ``C = ceil(S k / N)``, so ``moe.top_k`` is the mean number of experts per token (the paper's capacity factor);
    a token may have none or all. The weight is ``P_ti``; load is equal by construction, so there is no balance loss.

    **Not causal**: whether a token is taken depends on later ones. Tokens compete within their own sequence, not within
    the whole batch as published, so that at least neighbours in a batch, its size and its split do not matter.
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.gate = Float32Linear(config.width, self.moe.num_experts)

    @classmethod
    def looks_ahead(cls, options: Any) -> LooksAhead | None:
        return LooksAhead(
            "moe.router=expert_choice lets experts choose among all tokens of a sequence, later ones included"
        )

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        length, lengths = context.sequence or len(x_TD), context.lengths
        logits_TN = self.gate(x_TD)
        probs_TN = logits_TN.softmax(dim=-1)
        if lengths is None:
            parts = [self._choose(probs_TN.unflatten(0, (len(x_TD) // max(1, length), length)), 0)]
        else:
            starts = [sum(lengths[:row]) for row in range(len(lengths))]
            parts = [self._choose(p.unsqueeze(0), s) for p, s in zip(probs_TN.split(lengths), starts, strict=True)]
        experts_M, weights_M, tokens_M = (torch.cat(column) for column in zip(*parts, strict=True))
        # `mean_tokens` is None here: routers that look ahead are refused where ranks share sequences
        # (`needs_whole_sequences`).
        aux_loss = z_loss(logits_TN, self.moe)
        return Routing(experts_M.unsqueeze(1), weights_M.unsqueeze(1), aux_loss, tokens_M)

    def _choose(self, probs_BSN: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Experts, weights and tokens of the rows of some sequences of one length, whose first token is ``first``."""
        rows, length, experts = probs_BSN.shape
        capacity = -(-length * self.moe.top_k // experts)
        weights_BCN, places_BCN = probs_BSN.topk(capacity, dim=1)
        starts_B11 = first + length * torch.arange(rows, device=probs_BSN.device).view(-1, 1, 1)
        experts_BCN = torch.arange(experts, device=probs_BSN.device).expand_as(places_BCN)
        return experts_BCN.flatten(), weights_BCN.flatten(), (places_BCN + starts_B11).flatten()
