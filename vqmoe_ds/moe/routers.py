"""Routers: from tokens to expert indices and weights. One interface, so that all run on the same experts.

Legend: T tokens, D width, N experts, K codes, R routed rows a token, k rows of the linear router.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.config.schema import CodebookConfig, CodeSource, MoEConfig, Router
from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.dispatch import DispatchPlan


@dataclass(frozen=True)
class KnownRoute:
    """What is known of a layer's routing before its own state is: codes or experts, perhaps the whole plan."""

    expert_ids_T: Tensor | None = None
    plan: DispatchPlan | None = None


@dataclass(frozen=True)
class Routing:
    """A router's answer.

    ``weights_TR`` None means 1 everywhere. ``discrete_offset_TD``, without gradient, is added to the input of the
    last of the R rows: with straight-through the discrete expert sees ``x + c sg(v - x)``.
    """

    expert_ids_TR: Tensor
    weights_TR: Tensor | None = None
    aux_loss: Tensor | None = None
    discrete_offset_TD: Tensor | None = None


class Float32Linear(nn.Linear):
    """A bias-free product in float32 whatever the weights' type.

    A module of its own because ZeRO-3 gathers weights around a module's forward and backward, by its tensors.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD.float(), self.weight.float())


class TopKRouter(nn.Module):
    """Linear router: the k largest of ``softmax(W x)`` (Shazeer 2017; Switch for k = 1).

    The weight is the full-softmax probability at k = 1, so that the router learns, and the softmax over the chosen
    at k > 1. The balance loss is Switch's ``N sum_e f_e P_e``; the z-loss ST-MoE's ``mean(logsumexp^2)``.
    """

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Float32Linear(width, config.num_experts)

    def forward(self, x_TD: Tensor) -> Routing:
        config = self.config
        logits_TN = self.gate(x_TD)
        probs_TN = logits_TN.softmax(dim=-1)
        top_probs_Tk, ids_Tk = probs_TN.topk(config.top_k, dim=-1)
        weights_Tk = top_probs_Tk if config.top_k == 1 else top_probs_Tk / top_probs_Tk.sum(-1, keepdim=True)
        aux = logits_TN.new_zeros(())
        if config.balance_weight:
            share_N = torch.bincount(ids_Tk.flatten(), minlength=config.num_experts) / ids_Tk.numel()
            aux = aux + config.balance_weight * config.num_experts * (share_N * probs_TN.mean(dim=0)).sum()
        if config.z_loss_weight:
            aux = aux + config.z_loss_weight * logits_TN.logsumexp(dim=-1).square().mean()
        return Routing(ids_Tk, weights_Tk, aux)


class VQRouter(nn.Module):
    """Discrete codes beside an optional linear router (paper Eq. 4).

    ``y = g_c f_SMoE(x) + g_d E_{map(k)}(q)`` with ``k`` the nearest code, ``g = softmax(W_g x)`` and
    ``q = x + c sg(v_k - x)``. With ``top_k = 0`` only the discrete path remains, ``y = E_{map(k)}(q)``.
    """

    def __init__(self, width: int, layer: int, config: MoEConfig, book: CodebookConfig) -> None:
        super().__init__()
        self.layer, self.config, self.book = layer, config, book
        self.continuous = TopKRouter(width, config) if config.top_k else None
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


def build_router(width: int, layer: int, config: MoEConfig, book: CodebookConfig) -> nn.Module | None:
    """The router of one MoE layer; None where the route is known from the tokens alone."""
    if config.router is Router.VQ:
        return VQRouter(width, layer, config, book)
    if config.router is Router.TOPK:
        return TopKRouter(width, config)
    return None


def hash_of_tokens(vocab_size: int, num_experts: int, num_layers: int, seed: int) -> Tensor:
    """Random balanced table of Hash Layers (Roller 2021): token id -> expert, int64 ``[L, V]``."""
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randperm(vocab_size, generator=generator) % num_experts for _ in range(num_layers)]
    return torch.stack(tables)


def routes_ahead(config: MoEConfig, book: CodebookConfig) -> bool:
    """Whether codes of all layers are known before the first block."""
    if config.router is Router.HASH_TOKEN:
        return True
    sources_of_layers = (CodeSource.LAYER_STATE, CodeSource.EARLY_BLOCK)
    return config.router is Router.VQ and book.source not in sources_of_layers
