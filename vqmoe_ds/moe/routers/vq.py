"""The router of discrete codes.

Legend: T tokens, D width, C code width, K codes, R routed rows per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqmoe_ds.config.schema import CodebookConfig, MoEConfig, RouterConfig
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.routers.base import KnownRoute, Routing
from vqmoe_ds.moe.routers.topk import TopKRouter


class VQRouter(nn.Module):
    """Discrete codes beside an optional linear router (paper Eq. 4).

    ``y = g_c f_SMoE(x) + g_d E_{map(k)}(q)`` with ``k`` the nearest code, ``g = softmax(W_g x)`` and
    ``q = x + c sg(v_k - x)``. With ``top_k = 0`` only the discrete path remains, ``y = E_{map(k)}(q)``.
    """

    def __init__(
        self, width: int, layer: int, config: MoEConfig, book: CodebookConfig, options: RouterConfig | None = None
    ) -> None:
        super().__init__()
        self.layer, self.config, self.book = layer, config, book
        self.continuous = TopKRouter(width, config, options) if config.top_k else None
        self.path_gate = nn.Linear(width, 2) if config.top_k else None

    def forward(self, x_TD: Tensor, known: KnownRoute | None, bank: CodebookBank) -> Routing:
        offset, aux, soft_T = None, x_TD.new_zeros((), dtype=torch.float32), None
        if known is not None and known.expert_ids_T is not None:
            discrete_T = known.expert_ids_T
        else:
            discrete_T, codes_TC = self._lookup(x_TD, bank)
            if self.config.code_blend:
                offset = (self.config.code_blend * (codes_TC - x_TD.detach().float())).to(x_TD.dtype)
            if self.book.commitment_weight:
                aux = aux + self.book.commitment_weight * (x_TD.float() - codes_TC).square().mean()
            if self.book.soft_output:
                soft_T = self._soft_weight(x_TD, bank)
        if self.continuous is None or self.path_gate is None:
            weights_TR = None if soft_T is None else soft_T.unsqueeze(1)
            return Routing(discrete_T.unsqueeze(1), weights_TR, aux, offset)
        smoe = self.continuous(x_TD)
        gates_T2 = self.path_gate(x_TD).float().softmax(dim=-1)
        discrete_weight_T1 = gates_T2[:, 1:] if soft_T is None else gates_T2[:, 1:] * soft_T.unsqueeze(1)
        weights_TR = torch.cat([gates_T2[:, :1] * smoe.weights_TR, discrete_weight_T1], dim=1)
        ids_TR = torch.cat([smoe.expert_ids_TR, discrete_T.unsqueeze(1)], dim=1)
        return Routing(ids_TR, weights_TR, aux + smoe.aux_loss, offset)

    @torch.no_grad()
    def _lookup(self, x_TD: Tensor, bank: CodebookBank) -> tuple[Tensor, Tensor]:
        z_TC = bank.prepare(x_TD)
        codes_T = bank.lookup(self.layer, z_TC)
        bank.observe(self.layer, z_TC, codes_T)
        return bank.code_map_LK[self.layer][codes_T], bank.codes_LKC[self.layer][codes_T]

    def _soft_weight(self, x_TD: Tensor, bank: CodebookBank) -> Tensor:
        """Softmax probability of the nearest code: the road on which gradients reach the code choice."""
        distances_TK = torch.cdist(bank.compared(x_TD), bank.codes_LKC[self.layer]).square()
        return (-distances_TK / self.book.soft_output).softmax(dim=-1).amax(dim=-1)
