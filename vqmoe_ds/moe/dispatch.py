"""Dispatch: move routed rows to their experts and back, deterministically, without drops or padding.

Legend: T tokens, R routed rows a token, M = T * R rows here, P rows received, N experts, E local experts,
G ranks of the expert-parallel group, L layers planned together, D width.

A *plan* is everything that follows from the routes alone: the stable sort, its inverse, counts and split
sizes. Where routes are known ahead, ``make_plans`` builds the plans of all layers at once with one counts
exchange and one device-to-host copy. Rows are gathered by a permutation and gathered back by its inverse;
there is no scatter-add, so results do not depend on thread timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """Where the rows of one layer go. Lists are host integers; tensors live with the tokens."""

    routes: int
    """Rows R a token."""
    order_M: Tensor
    """Rows in the order of their experts: position in the sorted list -> row ``token * R + slot``."""
    inverse_M: Tensor
    """Row -> position in the sorted list."""
    local_counts_E: list[int]
    """Rows each local expert receives from all ranks."""
    send_splits_G: list[int]
    receive_splits_G: list[int]
    receive_order_P: Tensor | None
    """Received rows, grouped by source rank, in the order of local experts (None: already so)."""
    receive_inverse_P: Tensor | None


@torch.no_grad()
def make_plans(expert_ids_LTR: Tensor, num_experts: int, group: Any = None) -> list[DispatchPlan]:
    """Plans of L layers from their routes, int64 ``[L, T, R]``.

    Args:
        expert_ids_LTR: the expert of each row, in ``[0, num_experts)``.
        num_experts: experts N of a layer, split evenly over the group in rank order.
        group: expert-parallel process group; None or of size 1 keeps rows at home.
    """
    layers, tokens, routes = expert_ids_LTR.shape
    flat_LM = expert_ids_LTR.reshape(layers, tokens * routes)
    # int16 keys sort several times faster than int64 on CPU; stable keeps rows of one expert in token order.
    keys_LM = flat_LM.to(torch.int16) if num_experts < 2**15 else flat_LM
    order_LM = torch.argsort(keys_LM, dim=1, stable=True)
    positions_M = torch.arange(tokens * routes, device=flat_LM.device).expand(layers, -1)
    inverse_LM = torch.empty_like(order_LM).scatter_(1, order_LM, positions_M)
    offsets_L1 = torch.arange(layers, device=flat_LM.device).unsqueeze(1) * num_experts
    counts_LN = torch.bincount((flat_LM + offsets_L1).flatten(), minlength=layers * num_experts)
    counts_LN = counts_LN.view(layers, num_experts)
    ranks = dist.get_world_size(group=group) if group is not None else 1
    if ranks == 1:
        whole = [tokens * routes]
        return [
            DispatchPlan(routes, order_M, inverse_M, counts_N, whole, whole, None, None)
            for order_M, inverse_M, counts_N in zip(order_LM, inverse_LM, counts_LN.tolist(), strict=True)
        ]
    return _exchange_counts(order_LM, inverse_LM, counts_LN.view(layers, ranks, -1), routes, group)


def _exchange_counts(
    order_LM: Tensor, inverse_LM: Tensor, send_LGE: Tensor, routes: int, group: Any
) -> list[DispatchPlan]:
    send_GLE = send_LGE.transpose(0, 1).contiguous()
    received_GLE = torch.empty_like(send_GLE)
    dist.all_to_all_single(received_GLE, send_GLE, group=group)
    received_LGE = received_GLE.transpose(0, 1)
    # One copy to the host for all layers.
    host = torch.stack([send_LGE, received_LGE]).cpu()
    send_host, received_host = host[0], host[1]
    plans = []
    for layer in range(len(order_LM)):
        to_experts_P, back_P = _regroup(received_host[layer], order_LM.device)
        plans.append(
            DispatchPlan(
                routes,
                order_LM[layer],
                inverse_LM[layer],
                received_host[layer].sum(0).tolist(),
                send_host[layer].sum(1).tolist(),
                received_host[layer].sum(1).tolist(),
                to_experts_P,
                back_P,
            )
        )
    return plans


def _regroup(counts_GE: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Permutation of received rows from (source rank, expert) to (expert, source rank) order, and its inverse."""
    ranks, local = counts_GE.shape
    blocks = torch.arange(local).repeat(ranks)  # expert of each (rank, expert) block as received
    expert_of_row_P = torch.repeat_interleave(blocks, counts_GE.flatten())
    order_P = torch.argsort(expert_of_row_P.to(torch.int16), stable=True)
    inverse_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P)))
    return order_P.to(device), inverse_P.to(device)


def dispatch(x_TD: Tensor, plan: DispatchPlan, group: Any = None) -> Tensor:
    """Copy each token to its routed rows, sort them by expert and send them to the experts' ranks, ``[P, D]``."""
    return send_rows(expand_rows(x_TD, plan), plan, group)


def send_rows(rows_MD: Tensor, plan: DispatchPlan, group: Any = None) -> Tensor:
    """Sorted rows ``[M, D]`` -> rows of the local experts ``[P, D]``."""
    if plan.receive_order_P is None:
        return rows_MD
    received = _AllToAll.apply(rows_MD, plan.send_splits_G, plan.receive_splits_G, group)
    return _Permute.apply(received, plan.receive_order_P, plan.receive_inverse_P)


def collect(rows_PD: Tensor, plan: DispatchPlan, group: Any = None) -> Tensor:
    """Inverse of ``dispatch`` without the combination: expert outputs as ``[T, R, D]``."""
    rows = rows_PD
    if plan.receive_order_P is not None:
        rows = _Permute.apply(rows, plan.receive_inverse_P, plan.receive_order_P)
        rows = _AllToAll.apply(rows, plan.receive_splits_G, plan.send_splits_G, group)
    rows = _Permute.apply(rows, plan.inverse_M, plan.order_M)
    return rows.view(-1, plan.routes, rows.shape[-1])


def expand_rows(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Tokens ``[T, D]`` copied R times and sorted by expert, ``[M, D]``."""
    return _Expand.apply(x_TD, plan.order_M, plan.inverse_M, plan.routes)


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient is a gather by the inverse order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Expand(torch.autograd.Function):
    """Each token to R sorted rows; the gradient gathers the R rows of a token and adds them in slot order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_M: Tensor, inverse_M: Tensor, routes: int) -> Tensor:
        ctx.save_for_backward(inverse_M)
        ctx.routes = routes
        return x_TD.index_select(0, order_M // routes if routes > 1 else order_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_M,) = ctx.saved_tensors
        rows = grads[0].index_select(0, inverse_M)
        if ctx.routes > 1:
            rows = rows.view(-1, ctx.routes, rows.shape[-1]).sum(dim=1)
        return rows, None, None, None


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows; the gradient travels the same road back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), output_split_sizes=receive, input_split_sizes=send, group=group)
    return out
