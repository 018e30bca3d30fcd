"""Dispatch: move routed rows to their experts and back, deterministically, without drops or padding.

Legend: T tokens, R routed rows per token, M = T * R rows here, P rows received, N experts, E local experts,
G ranks of the expert-parallel group, L layers planned together, D width.

A *plan* is everything that follows from the routes alone: the stable sort, its inverse, where each expert's rows end,
and what the ranks exchange. It is made on the device, and the host does not wait for it; only at G > 1 do row counts
come to the host, by one pinned copy for all layers planned together, read when the first of them sends its rows. Rows
are gathered by a permutation and gathered back by its inverse; there is no scatter-add, so results do not depend on
thread timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqmoe_ds.moe.communication import comm
from vqmoe_ds.moe.derivatives import first_derivative_only
from vqmoe_ds.moe.kernels import combine as kernels
from vqmoe_ds.moe.kernels.combine import PermuteRows
from vqmoe_ds.moe.kernels.experts import check_counts
from vqmoe_ds.moe.kernels.integers import invert, sort_by_kind
from vqmoe_ds.moe.kernels.triton_support import use_triton
from vqmoe_ds.moe.state import recomputing


class SortedRows(NamedTuple):
    """The rows of L layers sorted by expert; rows of one expert keep the order of their tokens."""

    routes: int
    """Rows R per token."""
    experts_LM: Tensor
    """The expert of each row ``token * R + slot``, int64."""
    inverse_LM: Tensor
    """Row -> its place among the sorted rows, int64."""
    ends_LN: Tensor
    """End of the rows of each expert among the sorted rows, int32."""
    order_LM: Tensor
    """Inverse of the inverse: place -> row, int64."""

    def layer(self, index: int) -> SortedRows:
        """One of the layers, with L = 1."""
        return SortedRows(self.routes, *(tensor[index : index + 1] for tensor in self[1:]))


@dataclass(frozen=True)
class DispatchPlan:
    """The way of one layer's rows to their experts and back. All tensors are on the device of the tokens."""

    routes: int
    """Rows R per token."""
    order_M: Tensor
    """Rows in the order of their experts: position in the sorted list -> row ``token * R + slot``, int64."""
    inverse_M: Tensor
    """Row -> position in the sorted list, int64."""
    sent_ends_N: Tensor
    """End of the rows of each of the N experts in the sorted list, int32."""
    ends_E: Tensor
    """End of the rows of each local expert among the rows that this rank receives, int32."""
    exchange: Exchange | None = None
    """The all-to-all between the ranks; None where all rows stay at home."""

    @property
    def sent_counts_N(self) -> Tensor:
        """Rows that go from here to each of the N experts, int32."""
        return torch.diff(self.sent_ends_N, prepend=self.sent_ends_N.new_zeros(1))


class Exchange:
    """The all-to-all of one layer's rows.

    Args:
        sizes: returns the rows sent to and received from each rank of the group; may wait for the device.
        received_GE: rows that each rank sends to each local expert, on the device.
    """

    def __init__(self, sizes: Callable[[], tuple[list[int], list[int]]], received_GE: Tensor) -> None:
        self._sizes, self._received_GE = sizes, received_GE

    @cached_property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Rows sent to, and received from, each rank."""
        return self._sizes()

    @cached_property
    def regrouping(self) -> tuple[Tensor, Tensor]:
        """Received rows, grouped by source rank, in the order of local experts: permutation and inverse, int64 ``[P]``.

        Rows of one (rank, expert) pair stay together, so a row's new place is its old one and the shift of its pair.
        """
        counts_GE, rows = self._received_GE, sum(self.sizes[1])
        starts_GE = _starts(counts_GE.flatten()).view_as(counts_GE)
        by_expert_EG = counts_GE.t().contiguous()
        goals_GE = _starts(by_expert_EG.flatten()).view_as(by_expert_EG).t()
        # Rows of an expert stand in the order of their source ranks, so its weight gradient is summed in one order.
        shifts = (goals_GE - starts_GE).flatten()
        # Without output_size the host would wait for the sum of the counts.
        shift_P = torch.repeat_interleave(shifts, counts_GE.flatten(), output_size=rows)
        inverse_P = torch.arange(rows, device=counts_GE.device) + shift_P
        return invert(inverse_P.unsqueeze(0)).squeeze(0), inverse_P


@dataclass
class Kept:
    """Results that a forward pass keeps for its recomputation in backward, which then exchanges no rows."""

    plan: DispatchPlan | None = None
    rows: dict[str, Tensor] = field(default_factory=dict)
    """Rows as they came out of an all-to-all."""


@dataclass(frozen=True)
class Ahead:
    """The part of a layer's dispatch that is known before the states of its tokens are."""

    plan: DispatchPlan | None = None
    """The whole of it, where the router adds no rows of its own."""
    rows: SortedRows | None = None
    """The discrete rows, sorted, where it does."""
    kept: Kept | None = None
    """Place for what other ranks told a forward that will be recomputed."""


# ---------------------------------------------------------------- plans


@torch.no_grad()
def make_plans(
    expert_ids_LTR: Tensor, num_experts: int, group: Any = None, local: slice = slice(None)
) -> list[DispatchPlan]:
    """Plans of L layers from their routes.

    Args:
        expert_ids_LTR: the expert of each row, int64 in ``[0, num_experts)``.
        num_experts: experts N of a layer, split evenly over the group in rank order.
        group: expert-parallel process group; None or of size 1 keeps rows at home.
        local: without a group, the experts that this rank holds: all rows are for them.
    """
    return plans_of(sort_rows(expert_ids_LTR, num_experts), group, local)


@torch.no_grad()
def sort_rows(expert_ids_LTR: Tensor, num_experts: int) -> SortedRows:
    """Sort the rows of L layers by expert, int64 ``[L, T, R]`` with values in ``[0, num_experts)``."""
    layers, tokens, routes = expert_ids_LTR.shape
    flat_LM = expert_ids_LTR.reshape(layers, tokens * routes)
    # Stable: which of two rows of an expert comes first decides the last bits of its weight gradient.
    order_LM, inverse_LM, ends_LN = sort_by_kind(flat_LM, num_experts)
    return SortedRows(routes, flat_LM, inverse_LM, ends_LN, order_LM)


@torch.no_grad()
def merge_rows(first: SortedRows, second: SortedRows) -> SortedRows:
    """Sort the rows of two paths together from the sort of each: within an expert, those of ``first`` come first.

    So the rows of a path that is known ahead are sorted ahead. A token's slots are those of ``first``, then ``second``.
    """
    # A row moves behind the other path's rows of all experts before its own; second's also behind first's of its own.
    before_LN = torch.cat([second.ends_LN.new_zeros(len(second.ends_LN), 1), second.ends_LN[:, :-1]], dim=1)
    first_LM = first.inverse_LM + _of_each_row(before_LN, first)
    second_LM = second.inverse_LM + _of_each_row(first.ends_LN, second)
    inverse_LM = _side_by_side(first, first_LM, second, second_LM)
    experts_LM = _side_by_side(first, first.experts_LM, second, second.experts_LM)
    ends_LN = first.ends_LN + second.ends_LN
    return SortedRows(first.routes + second.routes, experts_LM, inverse_LM, ends_LN, invert(inverse_LM))


def _of_each_row(values_LN: Tensor, rows: SortedRows) -> Tensor:
    """The value of each row's expert, int64 ``[L, M]``.

    Raises:
        IndexError: on a CPU, there is no such expert.
    """
    experts_LM, experts = rows.experts_LM, values_LN.shape[1]
    if use_triton(experts_LM):  # as the kernels that sorted them took them: out of bounds, a GPU ends the process
        experts_LM = experts_LM.clamp(0, experts - 1)
    try:
        return values_LN.long().gather(1, experts_LM)
    except RuntimeError:
        for ends_N in rows.ends_LN:
            check_counts(ends_N.diff(prepend=ends_N.new_zeros(1)).tolist(), experts, experts_LM.shape[1])
        raise


def _side_by_side(first: SortedRows, a_LM: Tensor, second: SortedRows, b_LM: Tensor) -> Tensor:
    """Entries of the rows of both paths, token by token."""
    layers, tokens = len(a_LM), a_LM.shape[1] // first.routes
    parts = [a_LM.reshape(layers, tokens, first.routes), b_LM.reshape(layers, tokens, second.routes)]
    return torch.cat(parts, dim=2).flatten(1)


@torch.no_grad()
def plans_of(rows: SortedRows, group: Any = None, local: slice = slice(None)) -> list[DispatchPlan]:
    """``make_plans`` of sorted rows, with one exchange of counts for all layers if ``group`` has several ranks."""
    ranks = comm().get_world_size(group=group) if group is not None else 1
    layers = zip(rows.order_LM, rows.inverse_LM, rows.ends_LN, strict=True)
    if ranks == 1:
        # Ends of `local` experts count from 0 as they should: those before have no rows.
        return [DispatchPlan(rows.routes, order, inverse, ends, ends[local]) for order, inverse, ends in layers]
    # Every rank of the group comes here for the same layers, be it without a row: who skips a collective stops all.
    send_LGE = torch.diff(rows.ends_LN, prepend=rows.ends_LN.new_zeros(len(rows.ends_LN), 1)).unflatten(1, (ranks, -1))
    # Ranks first: an all-to-all without sizes deals the first dimension out evenly.
    received_GLE = _exchange_counts(send_LGE.transpose(0, 1).contiguous(), group)
    received_LGE = received_GLE.transpose(0, 1)
    # int32, the only type in which torch._grouped_mm takes ends.
    ends_LE = received_LGE.sum(1).cumsum(1, dtype=torch.int32)
    sizes = _HostCopy(torch.stack([send_LGE.sum(2), received_LGE.sum(2)], dim=1))
    exchanges = [Exchange(sizes.of(layer), received_LGE[layer]) for layer in range(len(ends_LE))]
    return [
        DispatchPlan(rows.routes, order, inverse, sent_ends, ends, exchange)
        for (order, inverse, sent_ends), ends, exchange in zip(layers, ends_LE, exchanges, strict=True)
    ]


def _exchange_counts(send_GLE: Tensor, group: Any) -> Tensor:
    received_GLE = torch.empty_like(send_GLE)
    comm().all_to_all_single(received_GLE, send_GLE, group=group)
    return received_GLE


class _HostCopy:
    """Rows per rank ``[L, 2, G]`` on their way to the host; the first who reads them waits."""

    def __init__(self, sizes_L2G: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._lists: list[tuple[list[int], list[int]]] | None = None
        self._host = sizes_L2G
        if sizes_L2G.is_cuda:
            # The copy is over when the event is, not when copy_ returns: an earlier read would see old memory.
            # Pinned, for the host would wait for a copy into memory that is not.
            self._host = torch.empty(sizes_L2G.shape, dtype=sizes_L2G.dtype, pin_memory=True)
            self._host.copy_(sizes_L2G, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def of(self, layer: int) -> Callable[[], tuple[list[int], list[int]]]:
        """Reader of one layer's (sent, received)."""
        return lambda: self._read()[layer]

    def _read(self) -> list[tuple[list[int], list[int]]]:
        if self._lists is None:
            if self._event is not None:
                self._event.synchronize()
            self._lists = [(sent, received) for sent, received in self._host.tolist()]
        return self._lists


def _starts(counts: Tensor) -> Tensor:
    """Start of each of several runs of so many rows, int64."""
    ends = counts.cumsum(0)
    return ends - counts


# ---------------------------------------------------------------- rows


def expand_rows(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Tokens ``[T, D]`` copied R times and sorted by expert, ``[M, D]``."""
    return kernels.expand_rows(x_TD, plan.order_M, plan.inverse_M, plan.routes)


def send_rows(rows_MD: Tensor, plan: DispatchPlan, group: Any = None, kept: Kept | None = None) -> Tensor:
    """Sorted rows ``[M, D]`` -> rows of the local experts ``[P, D]``.

    Args:
        kept: where the exchanged rows are left for a recomputation, and taken from in one.
    """
    if plan.exchange is None:
        return rows_MD
    send, receive = plan.exchange.sizes
    check_counts(send, len(send), len(rows_MD))
    received = _AllToAll.apply(rows_MD, send, receive, group, kept, "sent")
    return PermuteRows.apply(received, *plan.exchange.regrouping)


def send_rows_during(
    work: Callable[[], Tensor], rows_MD: Tensor, plan: DispatchPlan, group: Any = None, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """``send_rows``, and what ``work`` gives, which is computed while the rows travel, and so is its backward.

    Autograd runs nodes that are ready from the last made to the first: the backward of ``work``, made between the start
    of the exchange and its end, runs between the same two on the way back.
    """
    if plan.exchange is None:
        return rows_MD, work()
    send, receive = plan.exchange.sizes
    check_counts(send, len(send), len(rows_MD))
    way = _Way(send, receive, group)
    underway_PD = _Departure.apply(rows_MD, way, kept)
    result = work()
    return PermuteRows.apply(_Arrival.apply(underway_PD, way), *plan.exchange.regrouping), result


def return_rows(
    rows_PD: Tensor, plan: DispatchPlan, group: Any = None, kept: Kept | None = None, asked_again: bool = True
) -> Tensor:
    """Inverse of ``send_rows``: expert outputs ``[P, D]`` -> sorted rows ``[M, D]`` on the ranks they came from.

    Args:
        kept: as of ``send_rows``.
        asked_again: whether backward needs these rows, as the gradient of weights does; else a recomputation gives
            zeros.
    """
    if plan.exchange is None:
        return rows_PD
    send, receive = plan.exchange.sizes
    order_P, inverse_P = plan.exchange.regrouping
    name = "returned" if asked_again else None
    return _AllToAll.apply(PermuteRows.apply(rows_PD, inverse_P, order_P), receive, send, group, kept, name)


def combine(rows_MD: Tensor, plan: DispatchPlan, weights_TR: Tensor | None) -> Tensor:
    """Weighted sum of each token's R sorted rows, ``[M, D]`` -> ``[T, D]``; weights None: 1 everywhere."""
    return kernels.combine_rows(rows_MD, plan.order_M, plan.inverse_M, weights_TR, plan.routes)


def exchange_parts(parts_P: Tensor, group: Any) -> Tensor:
    """Even all-to-all of the P parts ``[P, ...]`` of a contiguous tensor: rank p gets part p, its own stands there."""
    one_each = [1] * len(parts_P)
    return exchange_rows(parts_P.flatten(1), one_each, one_each, group).view_as(parts_P)


def exchange_rows(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    """Uneven all-to-all of rows: so many in turn to each rank, and so many from each; the gradient travels back."""
    received: Tensor = _AllToAll.apply(rows, send, receive, group, None, None)
    return received


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows; the gradient travels the same road back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Any, kept: Kept | None, name: str | None
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        if kept is None:
            return _all_to_all(rows, send, receive, group)
        # All ranks recompute the same blocks, so all take the same branch and none waits for a collective alone.
        if recomputing() and name is None:  # values that nobody reads
            return rows.new_zeros(sum(receive), rows.shape[1])
        if recomputing() and name in kept.rows:  # once: a second backward through the graph asks the ranks again
            return kept.rows.pop(str(name))
        out = _all_to_all(rows, send, receive, group)
        if name is not None and not recomputing():
            kept.rows[name] = out.detach()  # with its history it would keep the graph that checkpointing frees
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None, None, None


@dataclass
class _Way:
    """An uneven all-to-all in two halves, its start and its end, and what is underway between them."""

    send: list[int]
    receive: list[int]
    group: Any
    rows: Tensor | None = None
    """Those that arrive, which nobody may read before ``wait``."""
    works: list[Any] = field(default_factory=list)

    def start(self, rows: Tensor, back: bool = False) -> Tensor:
        """Let rows depart, or a gradient travel back; what arrives is to be waited for."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        self.rows = _all_to_all(rows, send, receive, self.group, self.works)
        return self.rows

    def wait(self) -> Tensor:
        """The rows that have arrived."""
        while self.works:
            self.works.pop().wait()
        # Let go of them: the graph keeps the way until backward, and would keep the rows with it.
        rows, self.rows = self.rows, None
        assert rows is not None
        return rows


class _Departure(torch.autograd.Function):
    """First half of the all-to-all of ``send_rows``; second half of that of its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: _Way, kept: Kept | None) -> Tensor:
        ctx.way = way
        if kept is not None and recomputing() and "sent" in kept.rows:
            # Nothing is underway now, so _Arrival waits for nothing.
            way.rows = kept.rows.pop("sent")
            return way.rows
        out = way.start(rows)
        if kept is not None and not recomputing():
            kept.rows["sent"] = out.detach()
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # _Arrival.backward has let the gradient depart; what autograd hands over is its placeholder.
        return ctx.way.wait(), None, None


class _Arrival(torch.autograd.Function):
    """Second half of the all-to-all of ``send_rows``; first half of that of its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: _Way) -> Tensor:
        ctx.way, ctx.shape = way, rows.shape
        return way.wait().view_as(rows)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.way.start(grads[0], back=True)
        # What arrives is taken from the way itself: autograd must not look into a tensor that is still being filled.
        return grads[0].new_zeros(()).expand(ctx.shape), None


def _all_to_all(
    rows: Tensor, send: list[int], receive: list[int], group: Any, works: list[Any] | None = None
) -> Tensor:
    """Rows that arrive; with ``works`` they are underway until the one that is appended has been waited for."""
    # Also without a row to send or receive: the others of the group wait for this rank.
    out = rows.new_empty(sum(receive), rows.shape[1])
    splits = {"output_split_sizes": receive, "input_split_sizes": send}
    work = comm().all_to_all_single(out, rows.contiguous(), **splits, group=group, async_op=works is not None)
    if works is not None:
        works.append(work)
    return out
