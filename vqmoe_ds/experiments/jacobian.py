"""The averaged Jacobian of an MoE layer, whose rank is the number of directions in which its output can move.

Legend: T tokens, D width, H expert hidden width, E experts, R choices (slots) of a token, P rows of one expert.

With ``y = sum_r w_r(x) E_{i_r}(q_r)``, so without shared experts or an input norm, the Jacobian of one token is

    dy/dx = sum_r w_r J_E(q_r)  +  sum_r E_{i_r}(q_r) (dw_r/dx)^T

*Experts held as they are chosen*: the choice is piecewise constant, so this is the derivative wherever there is one.
The first sum, the **expert term**, is the ``J_1`` of the paper; the second, the **router term**, holds its
``c_j e_j^T`` and, of a dual path, the gate's ``g_m e_m^T``. The paper writes K further directions ``d_l e_l^T`` for
the codes. A nearest code is piecewise constant too, so they are not in the derivative of a layer.

With ``moe.code_blend = c > 0`` the discrete expert sees ``q = x + c (v - x)``. Straight-through, as gradients flow in
training, ``dq/dx = 1``; exactly, ``dq/dx = 1 - c``. With ``moe.output_norm`` the LayerNorm is a part of ``E``.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.evaluation.collapse import effective_rank, numerical_rank, run_expert
from vqmoe_ds.evaluation.probe import Rows, Visit, rows_of
from vqmoe_ds.moe.experts import StackedExperts
from vqmoe_ds.moe.layer import MoELayer
from vqmoe_ds.runtime.errors import ConfigError

RANK_THRESHOLDS = (1e-2, 1e-5)
"""Shares of the largest singular value above which one counts: what matters, and what is there at all in float32."""


class MeanJacobian:
    """Mean over tokens of one layer's Jacobian, added up visit by visit.

    Expert by expert the mean over tokens is ``W2 (diag(a) W3 + diag(b) W1)`` with the means ``a`` of ``w silu(W1 q)``
    and ``b`` of ``w (W3 q) silu'(W1 q)``: the average costs no more than a forward pass, and with a norm a backward
    pass more.

    Args:
        layer: whose visits will be added.
        straight_through: how the input of discrete experts is differentiated (module docstring).
    """

    def __init__(self, layer: MoELayer, straight_through: bool = True) -> None:
        self.straight_through, self._experts = straight_through, layer.experts
        experts, hidden, width = layer.experts.w1.shape
        self._tokens = 0
        # Of rows without and with a LayerNorm: one expert may have both, as in a dual path.
        self._slopes_2E2H = torch.zeros(2, experts, 2, hidden, dtype=torch.float64)
        self._along_DD, self._router_DD = torch.zeros(2, width, width, dtype=torch.float64)

    def add(self, visit: Visit) -> None:
        """Take the tokens of one forward pass of the layer into the mean."""
        self._tokens += len(visit.x_TD)
        rows, inputs_MD, factors_M = _rows_and_inputs(visit, self.straight_through)
        gradients_MD, normed_M = _weight_gradients(visit, rows), _normed(visit, rows)
        for expert, normed in product(rows.experts_M.unique().tolist(), (False, True)):
            mine_P = ((rows.experts_M == expert) & (normed_M == normed)).nonzero().flatten()
            if not len(mine_P):
                continue
            slopes_2H, along_DD, y_PD = _sums(self._experts, expert, inputs_MD[mine_P], factors_M[mine_P], normed)
            self._slopes_2E2H[int(normed), expert] += slopes_2H
            self._along_DD += along_DD
            self._router_DD += y_PD.double().t() @ gradients_MD[mine_P].double()

    def terms(self) -> dict[str, Tensor]:
        """``experts``, ``router`` and their sum ``total``, float64 ``[D, D]``."""
        sums_DD = -self._along_DD
        for normed, expert in product((False, True), range(len(self._experts.w1))):
            sums_DD += _expert_jacobian(self._experts, expert, self._slopes_2E2H[int(normed), expert], normed)
        experts_DD, router_DD = sums_DD / self._tokens, self._router_DD / self._tokens
        return {"total": experts_DD + router_DD, "experts": experts_DD, "router": router_DD}


def token_jacobians(visit: Visit, tokens: list[int], straight_through: bool = True) -> Tensor:
    """The Jacobians of single tokens, float64 ``[len(tokens), D, D]``."""
    rows, inputs_MD, factors_M = _rows_and_inputs(visit, straight_through)
    gradients_MD, normed_M = _weight_gradients(visit, rows), _normed(visit, rows)
    experts, width = visit.layer.experts, visit.x_TD.shape[1]
    answer = torch.zeros(len(tokens), width, width, dtype=torch.float64)
    for place, token in enumerate(tokens):
        for row in (rows.tokens_M == token).nonzero():
            expert, normed = int(rows.experts_M[row]), bool(normed_M[row])
            slopes_2H, along_DD, y_1D = _sums(experts, expert, inputs_MD[row], factors_M[row], normed)
            answer[place] += _expert_jacobian(experts, expert, slopes_2H, normed) - along_DD
            answer[place] += y_1D.double().t() @ gradients_MD[row].double()
    return answer


@torch.no_grad()
def _rows_and_inputs(visit: Visit, straight_through: bool) -> tuple[Rows, Tensor, Tensor]:
    """Routed rows, what their experts see ``[M, D]``, and weight times ``dq/dx`` of each ``[M]``."""
    if visit.routing.slots is not None:
        raise ConfigError(
            f"moe.router={visit.layer.config.moe.router} sends mixtures of tokens to its experts, so a layer has no "
            "Jacobian of one token; leave this checkpoint out"
        )
    rows, offset_TD = rows_of(visit.routing), visit.routing.discrete_offset_TD
    inputs_MD, factors_M = visit.x_TD[rows.tokens_M], rows.weights_M
    if offset_TD is not None:
        discrete_M = rows.slots_M == rows.slots_M.max()
        inputs_MD = inputs_MD + torch.where(discrete_M.unsqueeze(1), offset_TD[rows.tokens_M], 0.0)
        if not straight_through:
            blend = visit.layer.config.moe.code_blend
            factors_M = torch.where(discrete_M, (1 - blend) * factors_M, factors_M)
    return rows, inputs_MD, factors_M


def _weight_gradients(visit: Visit, rows: Rows) -> Tensor:
    """``dw/dx`` of every row ``[M, D]``: one backward pass through the router per slot, as tokens are independent."""
    gradients_MD = torch.zeros(len(rows.tokens_M), visit.x_TD.shape[1])
    with torch.enable_grad():
        x_TD = visit.x_TD.detach().clone().requires_grad_()
        weights_M = rows_of(visit.route(x_TD)).weights_M
        # Fixed routes have constant weights, and so no router term.
        if not weights_M.requires_grad:
            return gradients_MD
        for slot in rows.slots_M.unique().tolist():
            mine_P = (rows.slots_M == slot).nonzero().flatten()
            (slope_TD,) = torch.autograd.grad(weights_M[mine_P].sum(), x_TD, retain_graph=True)
            # A token has at most one row on a slot, so its gradient is that row's alone.
            gradients_MD[mine_P] = slope_TD[rows.tokens_M[mine_P]]
    return gradients_MD


def _normed(visit: Visit, rows: Rows) -> Tensor:
    """Whether a LayerNorm follows the expert of each row, bool ``[M]``."""
    norm = visit.routing.output_norm
    return rows.slots_M == rows.slots_M.max() if norm == "last" else torch.full_like(rows.slots_M, norm == "all").bool()


def _sums(
    experts: StackedExperts, expert: int, q_PD: Tensor, factors_P: Tensor, normed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the sum over rows of factor times ``J_E(q)`` is made of, and the outputs ``E(q)``, ``[P, D]``.

    A LayerNorm ``n`` of outputs of standard deviation ``s`` has ``J_n = (I - 1 1^T / D - n n^T / D) / s``: ``1 / s``
    joins the factors, and ``n n^T`` takes a backward pass.

    Returns:
        The summed slopes, float64 ``[2, H]``; the part along the outputs that a norm removes, float64 ``[D, D]``, zero
        without; the outputs.
    """
    y_PD, (gate_PH, up_PH) = run_expert(experts, expert, q_PD), _slopes(experts, expert, q_PD)
    along_DD = y_PD.new_zeros(y_PD.shape[1], y_PD.shape[1])
    if normed:
        # The epsilon of ``F.layer_norm``
        factors_P = factors_P * (y_PD.var(dim=1, unbiased=False) + 1e-5).rsqrt()
        y_PD = F.layer_norm(y_PD, y_PD.shape[1:])
        hidden_PH = y_PD @ experts.w2[expert]
        backward_PD = (hidden_PH * gate_PH) @ experts.w3[expert] + (hidden_PH * up_PH) @ experts.w1[expert]
        along_DD = (factors_P.unsqueeze(1) * y_PD).t() @ backward_PD / y_PD.shape[1]
    return torch.stack([factors_P @ gate_PH, factors_P @ up_PH]).double(), along_DD.double(), y_PD


def _slopes(experts: StackedExperts, expert: int, q_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of a SwiGLU expert's Jacobian: ``silu(W1 q)`` and ``(W3 q) silu'(W1 q)``, each ``[P, H]``."""
    gate_PH, up_PH = q_PD @ experts.w1[expert].t(), q_PD @ experts.w3[expert].t()
    sigmoid_PH = gate_PH.sigmoid()
    return F.silu(gate_PH), up_PH * (sigmoid_PH * (1 + gate_PH * (1 - sigmoid_PH)))


def _expert_jacobian(experts: StackedExperts, expert: int, slopes_2H: Tensor, normed: bool) -> Tensor:
    """``W2 (diag(slopes[0]) W3 + diag(slopes[1]) W1)``, float64 ``[D, D]``; normed: each column less its mean."""
    w1, w2, w3 = (w[expert].double() for w in (experts.w1, experts.w2, experts.w3))
    jacobian_DD = w2 @ (slopes_2H[0].unsqueeze(1) * w3 + slopes_2H[1].unsqueeze(1) * w1)
    return jacobian_DD - jacobian_DD.mean(dim=0) if normed else jacobian_DD


def gate_share(layer: MoELayer, router_DD: Tensor) -> float | None:
    """Share of a router term's squared norm along the one direction of the dual path's gate; None without a gate.

    Of ``g = softmax(W_g x)`` with two entries, both gradients are multiples of ``W_g[0] - W_g[1]``.
    """
    gate = getattr(layer.router, "path_gate", None)
    if gate is None or not router_DD.any():
        return None
    direction_D = F.normalize((gate.weight[0] - gate.weight[1]).double(), dim=0)
    return float((router_DD @ direction_D).square().sum() / router_DD.square().sum())


def spectrum(matrix_DD: Tensor) -> dict[str, Any]:
    """Singular values of a matrix, largest first, as a row for JSON: norm, effective rank, numerical ranks, values."""
    values = torch.linalg.svdvals(matrix_DD.double())
    return {
        "frobenius_norm": float(values.norm()),
        "effective_rank": effective_rank(values),
        "numerical_rank": {f"{threshold:g}": numerical_rank(values, threshold) for threshold in RANK_THRESHOLDS},
        "singular_values": values.tolist(),
    }
