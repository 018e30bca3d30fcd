"""Stacked SwiGLU experts and the grouped kernels that run them.

Legend: P rows sorted by expert, E local experts, D model width, H expert hidden width.

Weights are stacked as DeepSpeed's ``GroupedExperts`` stacks them (``w1`` gate, ``w3`` up ``[E, H, D]``, ``w2`` down
``[E, D, H]``), so its checkpoints and its universal conversion apply. On CPU one autograd function walks the
experts: indexing a stacked weight under autograd would build a full-size gradient per expert. Elsewhere grouped
products do the work (kernels/grouped.py). What was measured and what did not help: docs/performance.md.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_ds.moe.derivatives import first_derivative_only
from vqmoe_ds.moe.kernels.experts import CompiledExperts, check_counts, supports
from vqmoe_ds.moe.kernels.grouped import grouped_experts
from vqmoe_ds.moe.products import Products, products_for
from vqmoe_ds.moe.workers import run_experts


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

    mesh: Any = None
    """The mesh of ranks over which FSDP2 shards the weights, from ``fully_shard`` on."""

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
                # In this order, as the three share a generator: another one would be another model of the same seed.
                self.w1[local].normal_(0, std, generator=generator)
                self.w2[local].normal_(0, std * out_scale, generator=generator)
                self.w3[local].normal_(0, std, generator=generator)

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 puts whole weights here for each forward, and a forward could not tell that they were sharded before.
        mesh = getattr(value, "device_mesh", None)
        if mesh is not None:
            self.__dict__["mesh"] = mesh
        super().__setattr__(name, value)

    def forward(self, x_PD: Tensor, ends_E: Tensor) -> Tensor:
        """Run row ``p`` through its expert, ``[P, D]`` -> ``[P, D]``.

        Every expert's weights take part in the graph even with no row, so that all ranks reduce the same
        gradients in the same order.

        Args:
            x_PD: rows sorted by expert.
            ends_E: where the rows of each expert end, int32 ``[E]``, with the rows; on a GPU the host never reads it.
        """
        w1: Tensor = self.w1
        w2: Tensor = self.w2
        w3: Tensor = self.w3
        if not x_PD.is_cpu:
            return grouped_experts(x_PD, w1, w2, w3, ends_E)
        counts_E = [end - start for start, end in pairwise([0, *ends_E.tolist()])]
        run = _run_uncompiled if torch.compiler.is_compiling() else run_on_cpu
        return run(x_PD, w1, w2, w3, counts_E)


def run_on_cpu(x_PD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts_E: list[int]) -> Tensor:
    """Run rows sorted by expert through stacked experts with so many rows each, ``[P, D]`` -> ``[P, D]``."""
    if torch.is_autocast_enabled("cpu"):  # autocast does not look into functions of our own
        dtype = torch.get_autocast_dtype("cpu")
        x_PD, w1, w2, w3 = x_PD.to(dtype), w1.to(dtype), w2.to(dtype), w3.to(dtype)
    experts = CompiledExperts if supports(x_PD.dtype, *w2.shape[1:]) else _PlainExperts
    return experts.apply(x_PD, w1, w2, w3, counts_E)


# Every step has other counts, and the products are not those that torch.compile's default backend knows how to lower.
# Not ``torch.compiler.disable``, which imports the compiler, seconds that no other caller shall wait for.
_run_uncompiled = torch._disable_dynamo(run_on_cpu)


def _expert_seed(seed: int, layer: int, expert: int) -> int:
    # Other numbers would be another model of the same seed: runs are compared by it.
    return ((seed * 1_000_003 + layer) * 1_000_003 + expert + 17) % 2**64


class _PlainExperts(torch.autograd.Function):
    """SwiGLU of every expert's slice; weight gradients are written straight into one stacked tensor each.

    Elementwise work is done expert by expert while it is in cache. Saved for backward: the rows and the two projections
    of each expert; their product is recomputed.
    """

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts_E: list[int]) -> Tensor:
        check_counts(counts_E, len(w1), len(x_PD))
        x_PD, products = x_PD.contiguous(), products_for(x_PD.dtype)
        out_PD = torch.empty_like(x_PD)
        x_E, out_E = x_PD.split(counts_E), out_PD.split(counts_E)
        weights_E = list(zip(w1.unbind(), w2.unbind(), w3.unbind(), strict=True))
        # Threads write to the places of their own experts alone: they need no lock, and their order shows nowhere.
        gate_E: list[Tensor | None] = [None] * len(counts_E)
        up_E = gate_E.copy()

        def run(e: int) -> None:
            if counts_E[e]:
                gate_E[e], up_E[e] = _expert_forward(products, x_E[e], *weights_E[e], out_E[e])

        run_experts(run, counts_E)
        ctx.save_for_backward(x_PD, w1, w2, w3, *gate_E, *up_E)
        ctx.counts_E = counts_E
        return out_PD

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, w1, w2, w3, *projections = ctx.saved_tensors
        counts_E, products = ctx.counts_E, products_for(x_PD.dtype)
        gate_E, up_E = projections[: len(counts_E)], projections[len(counts_E) :]
        # Not zeroed, for below every row and every expert's gradient is written.
        gx_PD, gw1, gw2, gw3 = (torch.empty_like(t) for t in (x_PD, w1, w2, w3))
        slices = (t.split(counts_E) for t in (x_PD, grads[0].contiguous(), gx_PD))
        stacks = (t.unbind() for t in (w1, w2, w3, gw1, gw2, gw3))
        inputs_E = list(zip(gate_E, up_E, *slices, *stacks, strict=True))

        def run(e: int) -> None:
            if counts_E[e]:
                _expert_backward(products, *inputs_E[e])
            else:
                # Zeros and not nothing: every rank reduces the gradients of all its experts.
                for gradient in inputs_E[e][-3:]:
                    gradient.zero_()

        run_experts(run, counts_E)
        return gx_PD, gw1, gw2, gw3, None


def _expert_forward(
    products: Products, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write one expert's rows of ``out`` and return its gate and up projections, padded."""
    x = _pad(x, products.padded(len(x)))
    gate, up = products.mm(x, w1.t()), products.mm(x, w3.t())
    out.copy_(products.mm(F.silu(gate).mul_(up), w2.t())[: len(out)])
    return gate, up


def _expert_backward(
    products: Products,
    gate: Tensor,
    up: Tensor,
    x: Tensor,
    g: Tensor,
    gx: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    gw1: Tensor,
    gw2: Tensor,
    gw3: Tensor,
) -> None:
    """Write one expert's rows of ``gx`` and its weight gradients. Padding rows are zero throughout and add nothing."""
    x, g = _pad(x, len(gate)), _pad(g, len(gate))
    silu = F.silu(gate)
    products.mm_into(gw2, g.t(), silu * up)
    g_hidden = products.mm(g, w2)
    g_gate = torch.ops.aten.silu_backward(g_hidden * up, gate)
    # In place only now: the gradient of the gate has read it.
    g_up = g_hidden.mul_(silu)
    gx.copy_(products.mm(g_gate, w1).add_(products.mm(g_up, w3))[: len(gx)])
    products.mm_into(gw1, g_gate.t(), x)
    products.mm_into(gw3, g_up.t(), x)


def _pad(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))
