"""SwiGLU experts as grouped products: one kernel launch per product, however many experts; the host never waits.

Legend: P rows sorted by expert, E local experts, D model width, H expert hidden width, K and N inner and outer width of
a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.moe.derivatives import first_derivative_only
from vqmoe_ds.moe.kernels.swiglu import swiglu, swiglu_backward


def grouped_experts(x_PD: Tensor, w1_EHD: Tensor, w2_EDH: Tensor, w3_EHD: Tensor, ends_E: Tensor) -> Tensor:
    """``GroupedExperts`` in autocast's type where autocast is on, which does not reach into custom functions."""
    device = x_PD.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_PD, w1_EHD, w2_EDH, w3_EHD = (t.to(dtype) for t in (x_PD, w1_EHD, w2_EDH, w3_EHD))
    y_PD: Tensor = GroupedExperts.apply(x_PD, w1_EHD, w2_EDH, w3_EHD, ends_E)
    return y_PD


class GroupedExperts(torch.autograd.Function):
    """Row ``p`` through its expert, ``[P, D]`` -> ``[P, D]``; stacked weights as in ``StackedExperts``.

    ``ends_E`` (int32, on the rows' device) says where the rows of each expert end; the last end is P. Saved for
    backward: rows, gate, up and weights; the hidden activations are recomputed with the gradients of gate and up.
    Widths must be multiples of 16 bytes (``torch._grouped_mm`` says so in an error of its own), except in float64.
    """

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, w1_EHD: Tensor, w2_EDH: Tensor, w3_EHD: Tensor, ends_E: Tensor) -> Tensor:
        x_PD = x_PD.contiguous()
        gate_PH = _rows_by_weights(x_PD, w1_EHD.transpose(1, 2), ends_E)
        up_PH = _rows_by_weights(x_PD, w3_EHD.transpose(1, 2), ends_E)
        ctx.save_for_backward(x_PD, gate_PH, up_PH, w1_EHD, w2_EDH, w3_EHD, ends_E)
        return _rows_by_weights(swiglu(gate_PH, up_PH), w2_EDH.transpose(1, 2), ends_E)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, gate_PH, up_PH, w1_EHD, w2_EDH, w3_EHD, ends_E = ctx.saved_tensors
        needs_x, needs_w1, needs_w2, needs_w3 = ctx.needs_input_grad[:4]
        g_PD = grads[0].contiguous()  # the gradient of a sum is an expanded scalar
        g_hidden_PH = _rows_by_weights(g_PD, w2_EDH, ends_E)
        g_gate_PH, g_up_PH, hidden_PH = swiglu_backward(g_hidden_PH, gate_PH, up_PH)
        gw2 = _rows_by_rows(g_PD, hidden_PH, ends_E) if needs_w2 else None
        # Freed before the products that follow take memory of their own.
        del hidden_PH
        gx_PD = None
        if needs_x:
            gx_PD = _rows_by_weights(g_gate_PH, w1_EHD, ends_E).add_(_rows_by_weights(g_up_PH, w3_EHD, ends_E))
        gw1 = _rows_by_rows(g_gate_PH, x_PD, ends_E) if needs_w1 else None
        gw3 = _rows_by_rows(g_up_PH, x_PD, ends_E) if needs_w3 else None
        return gx_PD, gw1, gw2, gw3, None


def _rows_by_weights(x_PK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the weights of its expert, ``[P, N]``."""
    if x_PK.is_meta or not len(x_PK):
        return x_PK.new_empty(len(x_PK), w_EKN.shape[2])
    if x_PK.dtype is torch.float64:  # no kernel has it; for gradient checks
        return torch.cat([x @ w for x, w in zip(_split(x_PK, ends_E), w_EKN, strict=True)])
    return torch._grouped_mm(x_PK, aligned(w_EKN), offs=ends_E)


def aligned(weights: Tensor) -> Tensor:
    """The tensor, or a copy of the same strides where it starts at no multiple of 16 bytes, as CUDA's kernel wants it.

    ZeRO-3 packs gathered weights without gaps. The copy is not for saving: ZeRO-3 knows its own tensors only.
    """
    return weights.clone() if weights.data_ptr() % 16 and not weights.is_cpu else weights


def _rows_by_rows(a_PN: Tensor, b_PK: Tensor, ends_E: Tensor) -> Tensor:
    """Sum of outer products over the rows of each expert, ``[E, N, K]``; zero where it has none."""
    if a_PN.is_meta or not len(a_PN):
        # Zeros and not None: all ranks reduce the gradients of all their experts.
        return a_PN.new_zeros(len(ends_E), a_PN.shape[1], b_PK.shape[1])
    if a_PN.dtype is torch.float64:
        return torch.stack([a.t() @ b for a, b in zip(_split(a_PN, ends_E), _split(b_PK, ends_E), strict=True)])
    return torch._grouped_mm(a_PN.t(), b_PK, offs=ends_E)


def _split(x_PK: Tensor, ends_E: Tensor) -> tuple[Tensor, ...]:
    # The host waits here; only gradient checks, in float64, come this way.
    return x_PK.tensor_split(ends_E[:-1].cpu().long())
