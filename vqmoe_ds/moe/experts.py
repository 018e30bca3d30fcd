"""Stacked SwiGLU experts and the grouped kernels that run them.

Legend: P rows sorted by expert, E local experts, D model width, H expert hidden width.

Weights are stacked as DeepSpeed's ``GroupedExperts`` stacks them (``w1`` gate, ``w3`` up ``[E, H, D]``, ``w2`` down
``[E, D, H]``), so its checkpoints and its universal conversion apply. On CPU one autograd function walks the
experts: indexing a stacked weight under autograd would build a full-size gradient per expert. On CUDA
``torch._grouped_mm`` does the work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StackedExperts(nn.Module):
    """The local experts of one rank.

    Every expert is drawn from (seed, layer, global expert id) alone, so that all layouts start from one model.

    Args:
        width: model width D.
        hidden: hidden width H of an expert.
        num_local: experts E held here.
        first_expert: global id of the first of them.
        layer: index of the MoE layer, part of the seed.
        seed: of the run.
        std: standard deviation of the initial weights; that of ``w2`` is multiplied by ``out_scale``.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_local: int,
        first_expert: int = 0,
        layer: int = 0,
        seed: int = 0,
        std: float = 0.02,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.width, self.hidden, self.num_local = width, hidden, num_local
        self.w1 = nn.Parameter(torch.empty(num_local, hidden, width))
        self.w2 = nn.Parameter(torch.empty(num_local, width, hidden))
        self.w3 = nn.Parameter(torch.empty(num_local, hidden, width))
        with torch.no_grad():
            for local in range(num_local):
                generator = torch.Generator().manual_seed(_expert_seed(seed, layer, first_expert + local))
                self.w1[local].normal_(0, std, generator=generator)
                self.w2[local].normal_(0, std * out_scale, generator=generator)
                self.w3[local].normal_(0, std, generator=generator)

    def forward(self, x_PD: Tensor, counts_E: list[int]) -> Tensor:
        """Run row ``p`` through its expert, ``[P, D]`` -> ``[P, D]``; rows are sorted by expert.

        Every expert's weights take part in the graph even with no row, so that all ranks reduce the same
        gradients in the same order.
        """
        if x_PD.is_cuda:
            return _grouped_mm(x_PD, self.w1, self.w2, self.w3, counts_E)
        return _ExpertLoop.apply(x_PD, self.w1, self.w2, self.w3, counts_E)


def _expert_seed(seed: int, layer: int, expert: int) -> int:
    return (seed * 1_000_003 + layer) * 1_000_003 + expert + 17


class _ExpertLoop(torch.autograd.Function):
    """SwiGLU of every expert's slice, one block of weight gradients written in place.

    Elementwise work is done slice by slice while it is in cache. Saved for backward: the rows and the two
    projections; the product is recomputed.
    """

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts_E: list[int]) -> Tensor:
        x_PD = x_PD.contiguous()
        gate_PH, up_PH = x_PD.new_empty(len(x_PD), w1.shape[1]), x_PD.new_empty(len(x_PD), w1.shape[1])
        out_PD = torch.empty_like(x_PD)
        start = 0
        for e, count in enumerate(counts_E):
            if count == 0:
                continue
            rows = slice(start, start + count)
            gate, up = gate_PH[rows], up_PH[rows]
            torch.mm(x_PD[rows], w1[e].t(), out=gate)
            torch.mm(x_PD[rows], w3[e].t(), out=up)
            torch.mm(F.silu(gate).mul_(up), w2[e].t(), out=out_PD[rows])
            start += count
        ctx.save_for_backward(x_PD, w1, w2, w3, gate_PH, up_PH)
        ctx.counts_E = counts_E
        return out_PD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, w1, w2, w3, gate_PH, up_PH = ctx.saved_tensors
        grad_PD = grads[0].contiguous()
        gx_PD = torch.empty_like(x_PD)
        gw1, gw2, gw3 = torch.empty_like(w1), torch.empty_like(w2), torch.empty_like(w3)
        start = 0
        for e, count in enumerate(ctx.counts_E):
            if count == 0:
                gw1[e].zero_(), gw2[e].zero_(), gw3[e].zero_()
                continue
            rows = slice(start, start + count)
            x, gate, up, g = x_PD[rows], gate_PH[rows], up_PH[rows], grad_PD[rows]
            silu = F.silu(gate)
            torch.mm(g.t(), silu * up, out=gw2[e])
            g_hidden = torch.mm(g, w2[e])
            g_gate = torch.ops.aten.silu_backward(g_hidden * up, gate)
            g_up = g_hidden.mul_(silu)
            torch.mm(g_gate.t(), x, out=gw1[e])
            torch.mm(g_up.t(), x, out=gw3[e])
            gx = gx_PD[rows]
            torch.mm(g_gate, w1[e], out=gx)
            gx.addmm_(g_up, w3[e])
            start += count
        return gx_PD, gw1, gw2, gw3, None


def _grouped_mm(x_PD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts_E: list[int]) -> Tensor:
    """The CUDA path: three grouped products. Never run on a GPU by this project so far (docs/gpu.md)."""
    ends_E = torch.tensor(counts_E, device=x_PD.device).cumsum(0).to(torch.int32)
    gate_PH = torch._grouped_mm(x_PD, w1.transpose(-2, -1), offs=ends_E)
    up_PH = torch._grouped_mm(x_PD, w3.transpose(-2, -1), offs=ends_E)
    return torch._grouped_mm(F.silu(gate_PH) * up_PH, w2.transpose(-2, -1), offs=ends_E)
