"""VQMoE as the paper writes it: one process, float64, one token at a time. Slow and meant to be read.

Nothing of ``vqmoe_ds`` is imported, so that an error there cannot repeat itself here.
Legend: T tokens, D width, N experts, H expert hidden width, K codes, C code width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class OracleLayer:
    """Weights of one layer and the options that change its mathematics; all tensors float64."""

    w1_NHD: Tensor
    w2_NDH: Tensor
    w3_NHD: Tensor
    codes_KC: Tensor
    table_K: list[int]
    router_ND: Tensor | None = None
    gate_2D: Tensor | None = None
    gate_bias_2: Tensor | None = None
    top_k: int = 0
    code_blend: float = 0.0
    commitment_weight: float = 0.0
    balance_weight: float = 0.0
    z_loss_weight: float = 0.0
    soft_output: float = 0.0
    normalize_source: bool = False
    cosine: bool = False
    projection_DC: Tensor | None = None
    input_norm: bool = False
    output_norm: bool = False

    def expert(self, e: int, x_D: Tensor) -> Tensor:
        """SwiGLU: ``W2 (silu(W1 x) * W3 x)``."""
        return self.w2_NDH[e] @ (F.silu(self.w1_NHD[e] @ x_D) * (self.w3_NHD[e] @ x_D))

    def source(self, x_D: Tensor) -> Tensor:
        """What is compared with the codes."""
        z = x_D
        if self.normalize_source:
            z = z / (z.square().mean() + 1e-6).sqrt()
        if self.projection_DC is not None:
            z = z @ self.projection_DC
        return z / z.norm() if self.cosine else z

    def squared_distances(self, x_D: Tensor) -> Tensor:
        z_C = self.source(x_D)
        return torch.stack([(z_C - v_C).square().sum() for v_C in self.codes_KC])

    def nearest(self, x_D: Tensor) -> int:
        """The nearest code (paper Eq. 3); of equals the first."""
        distances = self.squared_distances(x_D.detach()).tolist()
        return distances.index(min(distances))

    def margin(self, x_D: Tensor) -> float:
        """How much further the second-nearest code is: lookups in float32 may only be compared if this is not tiny."""
        nearest, second = self.squared_distances(x_D.detach()).sort().values[:2].tolist()
        return second - nearest

    def chosen(self, x_D: Tensor) -> list[int]:
        """Experts of the continuous path, the most probable first."""
        assert self.router_ND is not None
        probs = (self.router_ND @ x_D).softmax(0).tolist()
        return sorted(range(len(probs)), key=lambda e: (-probs[e], e))[: self.top_k]

    def token(self, x_D: Tensor) -> Tensor:
        """``y = g_c sum_i w_i E_i(x) + g_d E_map(k)(q)``, ``q = x + c sg(v_k - x)`` (paper Eq. 4)."""
        k = self.nearest(x_D)
        q_D = x_D
        if self.code_blend:
            q_D = x_D + self.code_blend * (self.codes_KC[k] - x_D).detach()
        discrete_D = self.expert(self.table_K[k], layer_norm(q_D) if self.input_norm else q_D)
        if self.output_norm:
            discrete_D = layer_norm(discrete_D)
        if self.soft_output:
            discrete_D = discrete_D * (-self.squared_distances(x_D) / self.soft_output).softmax(0)[k]
        if self.top_k == 0:
            return discrete_D
        assert self.router_ND is not None and self.gate_2D is not None and self.gate_bias_2 is not None
        probs_N = (self.router_ND @ x_D).softmax(0)
        chosen = self.chosen(x_D)
        total = probs_N[chosen[0]] * 0 + 1 if self.top_k == 1 else sum(probs_N[e] for e in chosen)
        continuous_D = sum((probs_N[e] / total * self.expert(e, x_D) for e in chosen), torch.zeros_like(x_D))
        gate_continuous, gate_discrete = (self.gate_2D @ x_D + self.gate_bias_2).softmax(0)
        return gate_continuous * continuous_D + gate_discrete * discrete_D

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Output and auxiliary loss."""
        return torch.stack([self.token(x_D) for x_D in x_TD]), self.auxiliary(x_TD)

    def auxiliary(self, x_TD: Tensor) -> Tensor:
        loss = x_TD.new_zeros(())
        if self.commitment_weight:
            apart = [(x_D - self.codes_KC[self.nearest(x_D)]).square().mean() for x_D in x_TD]
            loss = loss + self.commitment_weight * sum(apart) / len(apart)
        if self.top_k == 0:
            return loss
        assert self.router_ND is not None
        experts = len(self.w1_NHD)
        probs_TN = torch.stack([(self.router_ND @ x_D).softmax(0) for x_D in x_TD])
        picks = [e for x_D in x_TD for e in self.chosen(x_D)]
        for e in range(experts):  # Switch Transformer Eq. 4: N sum_e f_e P_e
            loss = loss + self.balance_weight * experts * picks.count(e) / len(picks) * probs_TN[:, e].mean()
        log_sums = torch.stack([(self.router_ND @ x_D).logsumexp(0) for x_D in x_TD])
        return loss + self.z_loss_weight * log_sums.square().mean()


def layer_norm(x_D: Tensor) -> Tensor:
    """Zero mean and unit variance over the features, with PyTorch's epsilon; no scale and no shift."""
    apart_D = x_D - x_D.sum() / len(x_D)
    return apart_D / ((apart_D * apart_D).sum() / len(x_D) + 1e-5).sqrt()


def released(layer: OracleLayer, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The authors' layer line by line: ``class VQMoE`` around ``class VectorQuantizer`` with contrib_rate 0.05.

    The constant weight of the continuous expert is the softmax over one choice. Returns the outputs ``[T, D]`` and
    ``beta_vq = 0.08`` times the commitment term; the codes' own term is in ``OracleAdam``.
    """
    assert layer.router_ND is not None and layer.gate_2D is not None and layer.gate_bias_2 is not None
    outputs, commitment = [], x_TD.new_zeros(())
    for x_D in x_TD:
        k = layer.nearest(x_D)
        v_D = layer.codes_KC[k]
        commitment = commitment + 0.25 * (x_D - v_D).square().mean() / len(x_TD)
        quantized_D = 0.95 * x_D + 0.05 * (v_D - x_D).detach()
        discrete_D = layer_norm(layer.expert(k % len(layer.w1_NHD), layer_norm(quantized_D)))
        best = (layer.router_ND @ x_D).tolist()
        continuous_D = 1.0 * layer.expert(best.index(max(best)), x_D)
        gate_continuous, gate_discrete = (layer.gate_2D @ x_D + layer.gate_bias_2).softmax(0)
        outputs.append(gate_continuous * continuous_D + gate_discrete * discrete_D)
    return torch.stack(outputs), 0.08 * commitment


@dataclass
class OracleEMA:
    """VQ-VAE's moving-average codebook (van den Oord 2017, appendix A.1), without Laplace smoothing."""

    codes_KC: Tensor
    sums_KC: Tensor
    counts_K: Tensor

    def step(self, z_TC: Tensor, codes_T: list[int], decay: float) -> None:
        for k in range(len(self.codes_KC)):
            members = [z_C for z_C, code in zip(z_TC, codes_T, strict=True) if code == k]
            total_C = sum(members, torch.zeros_like(self.codes_KC[k]))
            self.sums_KC[k] = decay * self.sums_KC[k] + (1 - decay) * total_C
            self.counts_K[k] = decay * self.counts_K[k] + (1 - decay) * len(members)
            self.codes_KC[k] = self.sums_KC[k] / self.counts_K[k]


class OracleAdam:
    """The paper's learning rule: Adam on ``mean((sg[z] - v)^2)``, by PyTorch's own autograd and optimizer."""

    def __init__(self, codes_KC: Tensor, learning_rate: float) -> None:
        self.codes_KC = torch.nn.Parameter(codes_KC.clone())
        self.optimizer = torch.optim.Adam([self.codes_KC], lr=learning_rate)

    def step(self, z_TC: Tensor, codes_T: list[int]) -> None:
        self.optimizer.zero_grad()
        (z_TC.detach() - self.codes_KC[codes_T]).square().mean().backward()
        self.optimizer.step()
