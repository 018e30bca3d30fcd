"""The MoE layer: router -> dispatcher -> experts -> weighted sum.

Legend: B batch, S sequence, T = B * S tokens, D width, R routed rows per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vqmoe_ds.config.schema import CodebookConfig, MoEConfig, Router, RouterConfig
from vqmoe_ds.moe.codebook import CodebookBank, recomputing
from vqmoe_ds.moe.deepspeed_layer import ExpertParallelLayer
from vqmoe_ds.moe.dispatch import (
    DispatchPlan,
    combine,
    expand_rows,
    merge_rows,
    plans_of,
    return_rows,
    send_rows,
    sort_rows,
)
from vqmoe_ds.moe.experts import StackedExperts
from vqmoe_ds.moe.routers import KnownRoute, Routing, SMoEDropoutRouter, VQRouter, build_router


class MoELayer(ExpertParallelLayer):
    """Sparse SwiGLU experts under any router of ``build_router``.

    Args:
        width: model width D.
        layer: index among the MoE layers; part of the experts' seed and the codebook's index in the bank.
        config: experts and router.
        book: codebook options (read by the vq router).
        seed: of the run; experts are drawn from (seed, layer, global expert id).
        ep_size: expert-parallel ranks; must divide ``config.num_experts``.
        ep_rank: this rank's place among them.
        out_scale: factor on the initial down projections.
        options: of the routers beside vq.
        vocab_size: of the model (read by stablemoe).
        steps: optimizer steps of the run (read by routers with a schedule).
    """

    def __init__(
        self,
        width: int,
        layer: int,
        config: MoEConfig,
        book: CodebookConfig,
        seed: int = 0,
        ep_size: int = 1,
        ep_rank: int = 0,
        out_scale: float = 1.0,
        options: RouterConfig | None = None,
        vocab_size: int = 0,
        steps: int = 1,
    ) -> None:
        num_local = config.num_experts // ep_size
        experts = StackedExperts(
            width, config.expert_hidden, num_local, ep_rank * num_local, layer, seed, width**-0.5, out_scale
        )
        super().__init__(experts, config.num_experts, ep_size, ep_rank)
        self.layer = layer
        self.router = build_router(width, layer, config, book, options, seed, vocab_size, steps)
        self.watch = False
        self.watched: Tensor | None = None
        self.tells_first_choice = config.router is Router.ADAPTIVE_CLUSTERING
        self.first_choice_T: Tensor | None = None

    def forward(
        self, x_BSD: Tensor, known: KnownRoute | None = None, bank: CodebookBank | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the layer's output ``[B, S, D]`` and its auxiliary loss (scalar, or None).

        Args:
            x_BSD: normalised hidden states.
            known: the part of the route that is known ahead, if any.
            bank: codebooks; needed by the vq router when codes are looked up in the layer's own state.
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        known = replace(known or KnownRoute(), sequence=x_BSD.shape[1])
        routing = self.route(x_TD, known, bank)
        plan = self._plan(routing, known)
        if self.watch:  # diagnostics ask which experts each token went to
            self.watched = self._experts_of_tokens(routing, len(x_TD))
        if self.tells_first_choice:
            self.first_choice_T = routing.expert_ids_TR[:, 0]
        if self.training and not recomputing():
            self.tokens_per_expert += plan.sent_counts_N
        chosen = routing.tokens_M
        rows_MD = expand_rows(x_TD if chosen is None else x_TD.index_select(0, chosen), plan)
        if routing.discrete_offset_TD is not None:
            rows_MD = rows_MD + _offset_rows(routing.discrete_offset_TD, plan)
        group, kept = self.exchange_group, known.kept
        rows_PD = self.experts(send_rows(rows_MD, plan, group, kept), plan.ends_E)
        rows_MD = return_rows(rows_PD, plan, group, kept, asked_again=routing.weights_TR is not None)
        y_TD = combine(rows_MD, plan, routing.weights_TR)
        if chosen is not None:  # sequential on CPU, PyTorch's deterministic kernel elsewhere
            y_TD = torch.zeros_like(x_TD).index_add(0, chosen, y_TD)
        return y_TD.view_as(x_BSD), routing.aux_loss

    def _plan(self, routing: Routing, known: KnownRoute) -> DispatchPlan:
        """The plan that is known ahead or kept from the first forward; else made here, from what is sorted ahead."""
        kept = known.kept
        if known.plan is not None:
            return known.plan
        if kept is not None and kept.plan is not None and recomputing():
            return kept.plan
        ids_LTR = routing.expert_ids_TR.unsqueeze(0)
        if isinstance(self.router, VQRouter) and self.router.continuous is not None:
            discrete = known.rows or sort_rows(ids_LTR[..., -1:], self.num_experts)
            rows = merge_rows(sort_rows(ids_LTR[..., :-1], self.num_experts), discrete)
        else:
            rows = sort_rows(ids_LTR, self.num_experts)
        plan = plans_of(rows, self.exchange_group)[0]
        if kept is not None:
            kept.plan = plan
        return plan

    def route(self, x_TD: Tensor, known: KnownRoute, bank: CodebookBank | None) -> Routing:
        """The router's answer alone; arguments as of ``forward``, with ``known.sequence`` filled in."""
        if isinstance(self.router, VQRouter):
            if bank is None:
                raise ValueError("the vq router needs the CodebookBank of its model")
            return self.router(x_TD, known, bank)
        if self.router is None:
            if known.expert_ids_T is None:
                raise ValueError("this layer has no router, so its experts must be known ahead")
            return Routing(known.expert_ids_T.unsqueeze(1))
        routing: Routing = self.router(x_TD, known)
        return routing

    def _experts_of_tokens(self, routing: Routing, tokens: int) -> Tensor:
        """Experts of each token, of one shape over the whole run.

        Of a k that grows, the first ``moe.top_k``; of experts that choose, all N columns, -1 where not chosen.
        """
        ids_TR = routing.expert_ids_TR
        if routing.tokens_M is not None:
            experts_TN = ids_TR.new_full((tokens, self.num_experts), -1)
            experts_TN[routing.tokens_M, ids_TR[:, 0]] = ids_TR[:, 0]
            return experts_TN
        return ids_TR[:, : self.router.config.top_k] if isinstance(self.router, SMoEDropoutRouter) else ids_TR


def _offset_rows(offset_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """The offset of each sorted row: that of its token on the discrete (last) slot, zero elsewhere."""
    tokens_M, slots_M = plan.order_M // plan.routes, plan.order_M % plan.routes
    discrete_M1 = (slots_M == plan.routes - 1).unsqueeze(1)
    return torch.where(discrete_M1, offset_TD[tokens_M], offset_TD.new_zeros(()))
