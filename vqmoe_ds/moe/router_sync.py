"""Keeps routers with state in step on all ranks: one fused all-reduce per optimizer step, for all layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
        self.world = dist.get_world_size(group) if dist.is_initialized() else 1

    @classmethod
    def of(cls, model: nn.Module) -> RouterSync | None:
        """That of a model; None if none of its routers has state."""
        routers = [module for module in model.modules() if isinstance(module, StatefulRouter)]
        return cls(routers) if routers else None

    def broadcast(self) -> None:
        """Give every rank the state of rank 0; to be called once after ``deepspeed.initialize``."""
        if self.world > 1:
            first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            for buffer in self._buffers():
                dist.broadcast(buffer, src=first, group=self.group)

    def step(self) -> None:
        """All-reduce the statistics in float64, and let every router learn from them."""
        mine = [router.pending for router in self.routers]
        total = torch.cat([statistics.flatten() for statistics in mine])
        if self.world > 1 and total.numel():
            dist.all_reduce(total, group=self.group)
        parts = total.split([statistics.numel() for statistics in mine])
        for router, statistics, part in zip(self.routers, mine, parts, strict=True):
            router.update(part.view_as(statistics))

    def skip(self) -> None:
        """Drop the statistics of a step that the optimizer did not take."""
        for router in self.routers:
            router.clear_statistics()

    def in_step(self) -> bool:
        """Whether all ranks hold bit-identical state (one small all-reduce)."""
        if self.world == 1:
            return True
        mark = torch.stack([_fingerprint(buffer) for buffer in self._buffers()])
        both = torch.cat([mark, -mark])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        return bool((both[: len(mark)] == -both[len(mark) :]).all())

    def _buffers(self) -> list[Tensor]:
        return [buffer for router in self.routers for buffer in router.buffers()]


def _fingerprint(buffer: Tensor) -> Tensor:
    """An int64 number that differs whenever one bit does."""
    types = {4: torch.int32, 8: torch.int64}
    bits = buffer.view(types[buffer.element_size()]).long().flatten()
    return (bits * torch.arange(1, bits.numel() + 1, device=bits.device)).sum()
