"""Keeps routers with state in step on all ranks: one fused all-reduce per optimizer step, for all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqmoe_ds.moe.codebook_sync import SumOverRanks, broadcast_all, equal_on_all_ranks
from vqmoe_ds.moe.routers.base import StatefulRouter


class RouterSync:
    """Applies the statistics of all data-parallel ranks to every ``StatefulRouter`` at the optimizer-step boundary.

    The counterpart of ``CodebookSync`` for routers whose state lives in their layers.

    Args:
        routers: in the same order on all ranks.
        group: ranks that see different tokens (all of them under expert parallelism; None: the default group).
    """

    def __init__(self, routers: list[StatefulRouter], group: Any = None) -> None:
        self.routers, self.group = routers, group
        self._sum = SumOverRanks(group)

    @classmethod
    def of(cls, model: nn.Module) -> RouterSync | None:
        """That of a model; None if none of its routers has state."""
        routers = [module for module in model.modules() if isinstance(module, StatefulRouter)]
        return cls(routers) if routers else None

    def broadcast(self) -> None:
        """Give every rank the state of rank 0; to be called once after ``deepspeed.initialize``."""
        broadcast_all(self._buffers(), self.group)

    def start(self) -> None:
        """Begin the all-reduce of the statistics while the host goes on; as ``CodebookSync.start``."""
        if not self._sum.begun:
            self._sum.begin(torch.cat([router.pending.flatten() for router in self.routers]))

    def step(self) -> None:
        """All-reduce the statistics in float64, and let every router learn from them."""
        self.start()
        mine = [router.pending for router in self.routers]
        parts = self._sum.finish().split([statistics.numel() for statistics in mine])
        for router, statistics, part in zip(self.routers, mine, parts, strict=True):
            router.update(part.view_as(statistics))

    def skip(self) -> None:
        """Drop the statistics of a step that the optimizer did not take, also where their all-reduce has begun."""
        if self._sum.begun:
            self._sum.finish()
        for router in self.routers:
            router.clear_statistics()

    def in_step(self) -> bool:
        """Whether all ranks hold bit-identical state (one small all-reduce)."""
        return equal_on_all_ranks(self._buffers(), self.group)

    def _buffers(self) -> list[Tensor]:
        return [buffer for router in self.routers for buffer in router.buffers()]
