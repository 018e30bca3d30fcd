"""The exchange around attention under sequence parallelism (DeepSpeed-Ulysses, Jacobs 2023, arXiv 2309.14509).

Outside attention a rank holds a part of the positions with all heads, inside it all positions of a part of the heads.

Where a rank's positions are no stretch but wherever its M tokens stand (``Homes``), rows are put in the order of the
sequences on arrival.

Legend: P ranks of a group, B batch, S positions of a whole sequence, s = S / P of one rank, A heads, K key-value heads,
a = A / P and k = K / P of one rank, n = a + 2 k, H width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.moe.derivatives import first_derivative_only
from vqmoe_ds.moe.dispatch import exchange_parts, exchange_rows
from vqmoe_ds.moe.kernels.combine import PermuteRows
from vqmoe_ds.moe.sequence import Homes, SequenceShare


def sequence_share(run: RunConfig, rank: int) -> SequenceShare | None:
    """The part of every sequence that a rank holds, None where it holds whole ones; all ranks make the groups together.

    Ranks that share sequences are consecutive, so they fill nodes one after the other.
    """
    size = run.train.sequence_parallel_size
    if size == 1:
        return None
    # `Session.reader` and the samples of `StateSync` go by consecutive ranks, too.
    group, _ = dist.new_subgroups(size)
    return SequenceShare(group, rank % size, size, run.model.sequence_length)


def to_heads(q_BAsH: Tensor, k_BKsH: Tensor, v_BKsH: Tensor, share: SequenceShare) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all heads at this rank's positions -> of this rank's at all, ``[B, a or k, S, H]``.

    They travel together, for one call costs less than three.
    """
    # Heads are dealt out in order, queries as keys: query heads meet the key-value head that they share on one rank.
    by_rank = [x.unflatten(1, (share.size, -1)) for x in (q_BAsH, k_BKsH, v_BKsH)]
    received_PBnsH = exchange_parts(torch.cat(by_rank, dim=2).transpose(0, 1).contiguous(), share.group)
    # A group's ranks stand in the order of their positions, so what they sent laid end to end is the sequence.
    heads_BnSH = received_PBnsH.permute(1, 2, 0, 3, 4).flatten(2, 3)
    q, k, v = heads_BnSH.split([x.shape[2] for x in by_rank], dim=1)
    return q, k, v


def to_positions(y_BaSH: Tensor, share: SequenceShare) -> Tensor:
    """Outputs of this rank's heads at all positions -> of all heads at this rank's positions, ``[B, A, s, H]``."""
    by_rank = y_BaSH.unflatten(2, (share.size, -1)).permute(2, 0, 1, 3, 4).contiguous()
    return exchange_parts(by_rank, share.group).transpose(0, 1).flatten(1, 2)


def sum_over_positions(x: Tensor, share: SequenceShare) -> Tensor:
    """Sum of tensors that each rank made of its positions, the same on all ranks of a group.

    All of them go on with the sum in the same way: where a rank computes the loss of whole sequences from it, gradients
    averaged over the group are those of that loss.
    """
    total: Tensor = _Sum.apply(x, share)
    return total


class _Sum(torch.autograd.Function):
    """The gradient of a rank's part is the sum of those of all ranks, which are alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: SequenceShare) -> Tensor:
        ctx.size = share.size
        return share.total(x)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.size, None


def from_homes(q_1AMH: Tensor, k_1KMH: Tensor, v_1KMH: Tensor, homes: Homes) -> tuple[Tensor, Tensor, Tensor]:
    """``to_heads`` of this rank's tokens, wherever they stand."""
    share, count = homes.share, homes.counts[homes.share.rank]
    by_rank = [x.squeeze(0).unflatten(0, (share.size, -1)) for x in (q_1AMH, k_1KMH, v_1KMH)]
    by_rank_PMnH = torch.cat(by_rank, dim=1).transpose(1, 2)
    heads = by_rank_PMnH.shape[2:]
    sent = by_rank_PMnH.flatten(0, 1).flatten(1)  # not reshaped: a rank may have no tokens
    received = exchange_rows(sent, [count] * share.size, homes.counts, share.group)
    # Rows arrive rank by rank and ascending within a rank, which is the order of `Homes.order_T`.
    rows_T = PermuteRows.apply(received, homes.inverse_T, homes.order_T)
    q, k, v = rows_T.view(-1, share.length, *heads).transpose(1, 2).split([x.shape[1] for x in by_rank], dim=1)
    return q, k, v


def to_homes(y_BaSH: Tensor, homes: Homes) -> Tensor:
    """``to_positions`` of this rank's tokens, wherever they stand: ``[1, A, M, H]``."""
    share, count = homes.share, homes.counts[homes.share.rank]
    heads, width = y_BaSH.shape[1], y_BaSH.shape[3]
    rows_T = PermuteRows.apply(y_BaSH.transpose(1, 2).flatten(0, 1).flatten(1), homes.order_T, homes.inverse_T)
    received = exchange_rows(rows_T, homes.counts, [count] * share.size, share.group)
    return received.view(share.size, count, heads, width).transpose(1, 2).flatten(0, 1).unsqueeze(0)
