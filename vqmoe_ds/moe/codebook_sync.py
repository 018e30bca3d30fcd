"""Keeps the codebooks of all ranks in step: one fused all-reduce per optimizer step, for all layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vqmoe_ds.moe.codebook import CodebookBank


class CodebookSync:
    """Applies the statistics of all data-parallel ranks to a ``CodebookBank`` at the optimizer-step boundary.

    How a batch is split over ranks and accumulation steps does not change the codes: sums travel in float64 and
    samples are taken by global micro-batch number ``m * world + rank``.

    Args:
        bank: the codebooks.
        accumulation_steps: micro-batches each rank runs an optimizer step.
        group: ranks that see different tokens (all of them under expert parallelism; None: the default group).
    """

    def __init__(self, bank: CodebookBank, accumulation_steps: int = 1, group: Any = None) -> None:
        self.bank, self.accumulation_steps, self.group = bank, accumulation_steps, group
        self.world = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0

    def broadcast(self) -> None:
        """Give every rank the codes of rank 0; to be called once after ``deepspeed.initialize``."""
        if self.world > 1:
            for buffer in self.bank.buffers():
                dist.broadcast(buffer, src=self._global_rank(0), group=self.group)

    def step(self) -> None:
        """All-reduce the statistics, learn, and where due give birth or re-seed dead codes."""
        bank = self.bank
        stats_LKC1 = bank.pending if bank.moving else bank.pending[..., -1:].contiguous()
        if self.world > 1:
            dist.all_reduce(stats_LKC1, group=self.group)
        if stats_LKC1.shape[-1] == 1:  # frozen: only the counts were needed
            bank.usage_LK += stats_LKC1[..., 0]
            bank.updates += 1
        elif bank.birth_due:
            self._give_birth(stats_LKC1)
        else:
            halving_due = bank.halving_due
            bank.update(stats_LKC1)
            if halving_due and bool(bank.crowded_codes().any()):  # the same answer on every rank
                bank.halve_crowded(self._all_samples())
                self.broadcast()
            self._reseed_dead()
        bank.clear_statistics()

    def skip(self) -> None:
        """Drop the statistics of a step that the optimizer did not take."""
        self.bank.clear_statistics()

    def in_step(self) -> bool:
        """Whether all ranks hold bit-identical codes and tables (one small all-reduce)."""
        if self.world == 1:
            return True
        mark = self.bank.fingerprint()
        both = torch.cat([mark, -mark])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        return bool((both[: len(mark)] == -both[len(mark) :]).all())

    def _give_birth(self, stats_LKC1: Tensor) -> None:
        bank = self.bank
        bank.give_birth(self._all_samples())
        bank.usage_LK += stats_LKC1[..., -1]
        bank.updates += 1
        self.broadcast()  # ranks on unlike processors may round k-means differently

    def _all_samples(self) -> Tensor:
        """This step's samples of all ranks, float32 ``[L, S, C]``."""
        bank = self.bank
        per_batch = -(-bank.config.kmeans_samples // (self.world * self.accumulation_steps))
        mine_LASC = torch.stack([bank.samples(m, per_batch) for m in range(self.accumulation_steps)], dim=1)
        gathered = [torch.empty_like(mine_LASC) for _ in range(self.world)]
        if self.world > 1:
            dist.all_gather(gathered, mine_LASC, group=self.group)
        else:
            gathered = [mine_LASC]
        # Global micro-batch order (m, rank), whatever the split.
        return torch.stack(gathered, dim=2).flatten(1, 3)

    def _reseed_dead(self) -> None:
        bank, step = self.bank, int(self.bank.updates)
        limit = bank.config.reseed_until
        if bank.config.dead_below == 0 or not bank.moving or (limit and step > limit):
            return
        dead_LK = bank.dead_codes()
        if not bool(dead_LK.any()):  # the same answer on every rank
            return
        # One micro-batch, another at every step, offers the new places; its rank sends them round.
        micro_batch = step % (self.world * self.accumulation_steps)
        rank = micro_batch % self.world
        most = int(dead_LK.sum(dim=1).max())
        shape = (bank.num_layers, most, bank.codes_LKC.shape[2])
        if self.rank == rank:
            candidates_LSC = bank.samples(micro_batch // self.world, most).contiguous()
        else:
            candidates_LSC = torch.empty(shape, device=bank.codes_LKC.device)
        if self.world > 1:
            dist.broadcast(candidates_LSC, src=self._global_rank(rank), group=self.group)
        bank.reseed(dead_LK, candidates_LSC)

    def _global_rank(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)
