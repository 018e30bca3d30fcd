"""The part of every sequence that a rank holds under sequence parallelism.

Legend: P ranks of a group, B batch, S positions of a whole sequence, T = B * S / P tokens here, C width of a vector,
M vectors sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.moe.communication import comm


@dataclass(frozen=True)
class SequenceShare:
    """This rank's place in a group whose ranks each hold S / P consecutive positions of the same sequences."""

    group: Any
    rank: int
    size: int
    length: int
    """Positions S of a whole sequence; ``size`` divides it."""

    @property
    def span(self) -> slice:
        """The positions that this rank holds."""
        here = self.length // self.size
        return slice(self.rank * here, (self.rank + 1) * here)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean of a tensor over the group, without gradient."""
        total = tensor.detach().clone()
        comm().all_reduce(total, group=self.group)
        return total / self.size

    def sample(self, z_TC: Tensor, most: int) -> Tensor:
        """At most ``most`` evenly spaced vectors ``[M, C]`` of the whole sequences, zero where another rank holds them.

        So the sum over the group is what one rank with whole sequences would sample, to the bit.
        """
        here, whole = self.length // self.size, len(z_TC) * self.size
        places_M = torch.arange(whole, device=z_TC.device)
        if whole > most:
            places_M = torch.linspace(0, whole - 1, most, device=z_TC.device).long()
        sequences_M, positions_M = places_M // self.length, places_M % self.length
        mine_M1 = (positions_M // here == self.rank).unsqueeze(1)
        return torch.where(mine_M1, z_TC[sequences_M * here + positions_M % here], z_TC.new_zeros(()))
