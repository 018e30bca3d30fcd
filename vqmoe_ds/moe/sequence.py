"""The part of every sequence that a rank holds under sequence parallelism.

Legend: P ranks of a group, B batch, S positions of a whole sequence, T = B * S / P tokens here, C width of a vector,
M vectors sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.moe.communication import comm
from vqmoe_ds.moe.kernels.integers import sort_by_kind


@dataclass(frozen=True)
class SequenceShare:
    """This rank's place in a group whose ranks each hold S / P consecutive positions of the same sequences."""

    group: Any
    rank: int
    size: int
    length: int
    """Positions S of a whole sequence; ``size`` divides it."""
    real_BS: Tensor | None = None
    """False where a token of the whole sequences is padding; None: all are real."""

    @property
    def span(self) -> slice:
        """The positions that this rank holds."""
        here = self.length // self.size
        return slice(self.rank * here, (self.rank + 1) * here)

    def of(self, real_BS: Tensor) -> SequenceShare:
        """The place among ranks that share these sequences, which may be padded."""
        return replace(self, length=real_BS.shape[1], real_BS=real_BS)

    @property
    def mean_tokens(self) -> float | None:
        """Real tokens per rank where ranks hold more or fewer of them; None where all hold as many."""
        return None if self.real_BS is None else int(self.real_BS.sum()) / self.size

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over the group, without gradient."""
        total = tensor.detach().clone()
        comm().all_reduce(total, group=self.group)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean of a tensor over the group, without gradient."""
        return self.total(tensor) / self.size

    def gather(self, ids_LT: Tensor) -> Tensor:
        """Whole numbers of this rank's tokens -> those of all ranks in the order of the sequences, ``[L, B * S]``."""
        # All ranks hold equally many positions, and all_gather takes tensors of one shape alone.
        parts = [torch.empty_like(ids_LT) for _ in range(self.size)]
        comm().all_gather(parts, ids_LT.contiguous(), group=self.group)
        return torch.cat([part.unflatten(1, (-1, self.length // self.size)) for part in parts], dim=2).flatten(1)

    def sample(self, z_TC: Tensor, most: int) -> Tensor:
        """At most ``most`` evenly spaced vectors ``[M, C]`` of the whole sequences, zero where another rank holds them.

        So the sum over the group is what one rank with whole sequences would sample, to the bit. Padding is none of
        them, neither here nor there.
        """
        here, device = self.length // self.size, z_TC.device
        if self.real_BS is None:
            tokens_T = torch.arange(len(z_TC) * self.size, device=device)
        else:
            tokens_T = self.real_BS.flatten().nonzero().squeeze(1)
        mine_T = tokens_T % self.length // here == self.rank
        # Tokens before the first of this rank's get row 0, which where() below drops.
        rows_T = (mine_T.cumsum(0) - 1).clamp_min(0)
        places_M = evenly(len(rows_T), most, device) if len(rows_T) > most else torch.arange(len(rows_T), device=device)
        # A rank may hold padding alone, and then has no row 0.
        if not len(z_TC):
            return z_TC.new_zeros(len(places_M), z_TC.shape[1])
        return torch.where(mine_T[places_M].unsqueeze(1), z_TC[rows_T[places_M]], z_TC.new_zeros(()))


def evenly(length: int, count: int, device: torch.device) -> Tensor:
    """``count`` evenly spaced places of so many, int64."""
    return torch.linspace(0, length - 1, count, device=device).long()


class Homes:
    """The rank of a group that computes each token of its sequences between attentions, where it is not by position.

    Args:
        share: the group.
        ranks_T: place in the group of the rank of each token ``b * S + s`` of the whole sequences.
    """

    def __init__(self, share: SequenceShare, ranks_T: Tensor) -> None:
        order_1T, inverse_1T, ends_1P = sort_by_kind(ranks_T.unsqueeze(0), share.size)
        # The one wait of the host here: exchanges of uneven parts take their sizes as numbers.
        ends = ends_1P[0].tolist()
        self.share, self.order_T, self.inverse_T = share, order_1T[0], inverse_1T[0]
        self.counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        """Tokens of each rank."""
        self.mine_M = self.order_T[ends[share.rank] - self.counts[share.rank] : ends[share.rank]]
        """This rank's tokens, ascending."""

    @property
    def positions_M(self) -> Tensor:
        """Where this rank's tokens stand in their sequences."""
        return self.mine_M % self.share.length

    def mine(self, x_BS: Tensor) -> Tensor:
        """Values of this rank's tokens, as of one sequence: ``[1, M]``."""
        return x_BS.flatten()[self.mine_M].unsqueeze(0)
