"""Keeps the state of routers and codebooks in step on all ranks: one fused all-reduce per optimizer step."""

from __future__ import annotations

from functools import reduce
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from vqmoe_ds.moe.codebook import CodebookBank
from vqmoe_ds.moe.placement import initialize_codes, placed, split_overused_codes
from vqmoe_ds.moe.routers.base import Router, StatefulRouter
from vqmoe_ds.moe.state import warn_once
from vqmoe_ds.runtime.errors import ConfigError, shown


class StateSync:
    """Applies the statistics of all data-parallel ranks to codebooks and routers at the optimizer-step boundary.

    To be made once; then ``step`` follows every step of the optimizer:

    Examples:
        >>> import torch
        >>> from vqmoe_ds.moe import LayerConfig, MoEConfig, MoELayer, StateSync
        >>> layer = MoELayer(LayerConfig(width=16, moe=MoEConfig(router="expert_bias", num_experts=4, top_k=2)))
        >>> optimizer, sync = torch.optim.AdamW(layer.parameters()), StateSync(layer)
        >>> y, aux_loss, _ = layer(torch.randn(2, 8, 16))
        >>> (y.square().mean() + aux_loss).backward()
        >>> optimizer.step()
        >>> sync.step()
        >>> layer.router.steps_taken
        1

    How a batch is split over ranks and accumulation steps does not change what is learned: sums travel in float64 and
    a codebook's samples are taken by global micro-batch number ``m * readers + reader``, ranks that share sequences as
    one reader. The device is waited for once per step, to learn how many codes are dead or overused, and not at all in
    steps that look for neither.

    Args:
        model: any module; the ``CodebookBank`` and every ``StatefulRouter`` in it are kept in step.
        accumulation_steps: micro-batches that each rank runs per optimizer step.
        group: ranks that see different tokens (all of them under expert parallelism; None: the default group).

    Raises:
        ConfigError: ``accumulation_steps`` is no number of micro-batches.
    """

    def __init__(self, model: nn.Module, accumulation_steps: int = 1, group: Any = None) -> None:
        number = isinstance(accumulation_steps, Real) and not isinstance(accumulation_steps, bool)
        if not number or not accumulation_steps >= 1 or accumulation_steps % 1:  # NaN fails the second, inf the third
            text = shown(accumulation_steps)
            raise ConfigError(f"accumulation_steps={text} is no number of micro-batches; give 1 or more")
        accumulation_steps = int(accumulation_steps)
        self.group = group
        self._states: list[_Codebooks | _Router] = []
        # In the order of registration, which is the same on every rank, as the fused all-reduce needs it.
        for module in model.modules():
            if isinstance(module, CodebookBank):
                self._states.append(_Codebooks(module, accumulation_steps, group))
            elif isinstance(module, StatefulRouter):
                self._states.append(_Router(module))
        for state in self._states:
            state.module.accumulation_steps = accumulation_steps
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        self._sum = SumOverRanks(group)

    def broadcast(self) -> None:
        """Give every rank the state of rank 0; to be called once, after ``deepspeed.initialize`` or its like."""
        broadcast_all([buffer for state in self._states for buffer in state.module.buffers()], self.group)

    def start(self) -> None:
        """Begin the all-reduce of the statistics while the host goes on to backward; ``step`` or ``skip`` ends it.

        To be called after the last forward of an optimizer step, by all ranks or by none, at the same place among the
        collectives of the group. It takes its turn on the group's own communicator, ahead of the gradients: same order,
        same bits as ``step`` alone, and no memory for a second communicator.
        """
        if self._states and not self._sum.begun:
            mine = [state.statistics() for state in self._states]
            # The statistics of a single state are summed where they lie: `pending` is that of all ranks from here on,
            # and nothing may be observed before `step` or `skip`.
            self._sum.begin(mine[0] if len(mine) == 1 else torch.cat([part.flatten() for part in mine]))

    def step(self) -> None:
        """All-reduce the statistics, and let every router and codebook learn from them.

        Raises:
            ConfigError: codes are to be placed, and a rank ran fewer micro-batches than ``accumulation_steps``.
        """
        if not self._states:
            return
        if any(state.module.idle for state in self._states):
            warn_once(
                "StateSync.step() was called and this rank has run no forward pass in training since the last call: "
                "call it once after every optimizer.step()"
            )
        elif self._never_used():
            warn_once(
                "StateSync.step() was called, and no forward pass in training has ever gone through the routers of its "
                "model on this rank: make it of the model that is trained, not of one that this is a copy of"
            )
        self.start()
        # Before any state learns: what a codebook sends depends on whether its codes still move.
        shapes = [state.statistics().shape for state in self._states]
        parts = self._sum.finish().flatten().split([shape.numel() for shape in shapes])
        for state, shape, part in zip(self._states, shapes, parts, strict=True):
            state.learn(part.view(shape))

    def _never_used(self) -> bool:
        """Whether no router saw tokens in training although all could have."""
        # One that ran is enough: others may be used later. In evaluation, or without routers, nothing can be told.
        used = any(router.ran or not router.training for router in self._routers)
        return bool(self._routers) and not used and not any(state.module.has_observed for state in self._states)

    def skip(self) -> None:
        """Drop the statistics of a step that the optimizer did not take, also where their all-reduce has begun."""
        # A sum that is left begun would pass for that of the next step.
        if self._sum.begun:
            self._sum.finish()
        for state in self._states:
            state.module.clear_statistics()

    def in_step(self) -> bool:
        """Whether all ranks hold bit-identical state (one small all-reduce)."""
        compared = [tensor for state in self._states for tensor in state.compared()]
        return not compared or equal_on_all_ranks(compared, self.group)


class _Router:
    """A router with state, as ``StateSync`` sees it."""

    def __init__(self, module: StatefulRouter) -> None:
        self.module = module

    def statistics(self) -> Tensor:
        return self.module.pending

    def learn(self, total: Tensor) -> None:
        self.module.update(total)

    def compared(self) -> list[Tensor]:
        return list(self.module.buffers())


class _Codebooks:
    """The codebooks of a model, as ``StateSync`` sees them; placing codes takes samples of all ranks besides."""

    def __init__(self, module: CodebookBank, accumulation_steps: int, group: Any) -> None:
        self.module = self.bank = module
        self.accumulation_steps, self.group = accumulation_steps, group
        self.world = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0

    @property
    def sharing(self) -> int:
        """Consecutive ranks that share sequences, of which each samples the same places."""
        return 1 if self.bank.share is None else self.bank.share.size

    def statistics(self) -> Tensor:
        pending_LKC1 = self.bank.pending
        # Steps are equal on all ranks, so all change to the smaller message at the same one.
        return pending_LKC1 if self.bank.moving else pending_LKC1[..., -1:].contiguous()

    def learn(self, total: Tensor) -> None:
        """Learn; and where due initialize all codes, split overused ones or re-seed dead ones."""
        bank = self.bank
        if not bank.moving:
            bank.count(total[..., -1])
        elif bank.initialization_due:
            bank.pending.copy_(total)  # the counts of all ranks, which it reads
            samples_LSC = self._all_samples()
            # A step without tokens on any rank does not count: codes would freeze at `freeze_step` unplaced.
            if samples_LSC is not None:
                initialize_codes(bank, samples_LSC, self._my_layers())
                self._broadcast_layers()
                bank.count(total[..., -1])
        else:
            # Asked before the update, which counts the step.
            splitting_due, reseeding_due = bank.splitting_due, bank.reseeding_due
            bank.update(total)
            self._rescue(splitting_due, reseeding_due)
        bank.clear_statistics()

    def compared(self) -> list[Tensor]:
        # Routes follow from these alone.
        return [self.bank.codes_LKC, self.bank.code_map_LK]

    def _rescue(self, splitting_due: bool, reseeding_due: bool) -> None:
        """Split overused codes and re-seed dead ones: the same on every rank, for all see the same counts."""
        if not (splitting_due or reseeding_due):
            return
        bank = self.bank
        seen = [bank.overused_codes().any().long()] if splitting_due else []
        seen.append(bank.dead_codes().sum(dim=1).max())
        *overused, most_dead = torch.stack(seen).tolist()  # the one copy to the host
        samples_LSC = self._all_samples() if any(overused) else None
        if samples_LSC is not None:
            split_overused_codes(bank, samples_LSC, self._my_layers())
            self._broadcast_layers()
            # Counts have moved with the split codes, so others are dead than before.
            most_dead = int(bank.dead_codes().sum(dim=1).max())
        if reseeding_due and most_dead:
            candidates_LSC, filled = self._candidates(most_dead)
            bank.reseed(bank.dead_codes() & filled.bool(), candidates_LSC)

    def _candidates(self, count: int) -> tuple[Tensor, Tensor]:
        """New places for dead codes, float32 ``[L, count, C]``: from one micro-batch, another at every step; and 1, or
        0 where it had no tokens to give: a scalar on the device, for which the host does not wait."""
        bank = self.bank
        # Steps are equal on all ranks, so all agree on whose samples are taken, and join the same broadcast.
        readers = self.world // self.sharing
        micro_batch = bank.steps_taken % (readers * self.accumulation_steps)
        first, parts = micro_batch % readers * self.sharing, []
        for rank in range(first, first + self.sharing):
            if self.rank == rank:
                part_LSC = bank.samples(micro_batch // readers, count)
                filled = part_LSC.new_full((), bank.has_tokens(micro_batch // readers))
            else:
                shape = (bank.num_layers, count, bank.codes_LKC.shape[2])
                part_LSC = bank.codes_LKC.new_empty(shape, dtype=torch.float32)
                filled = part_LSC.new_empty(())
            broadcast_all([part_LSC, filled], self.group, rank)
            parts.append(part_LSC)
        # Each vector is zero in all but one; ranks that share sequences have tokens of them together, or none.
        return reduce(torch.add, parts), filled

    def _filled(self) -> list[int]:
        """Numbers ``m * readers + reader`` of this step's micro-batches that had tokens, the same on every rank.

        Raises:
            ConfigError: on all ranks, where one of them ran fewer micro-batches than ``accumulation_steps``.
        """
        refusal, marks = None, []
        for micro_batch in range(self.accumulation_steps):
            try:
                marks.append(int(self.bank.has_tokens(micro_batch)))
            except ConfigError as error:  # raised once the others know: they would wait for this rank
                refusal = refusal or error
                marks.append(-1)
        mine_A = torch.tensor(marks, device=self.bank.codes_LKC.device)
        marks_AW = torch.stack(self._gathered(mine_A), dim=1).tolist()
        if min(map(min, marks_AW)) < 0:
            raise refusal or ConfigError(
                "codes are to be placed in this optimizer step, and another rank has seen no tokens in one of "
                f"accumulation_steps={self.accumulation_steps} micro-batches: run as many in training on every rank"
            )
        of_readers = [mark for marks_W in marks_AW for mark in marks_W[:: self.sharing]]
        return [number for number, filled in enumerate(of_readers) if filled]

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        """A tensor of every rank."""
        if self.world == 1:
            return [mine]
        gathered = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(gathered, mine, group=self.group)
        return gathered

    def _all_samples(self) -> Tensor | None:
        """This step's samples of all ranks, float32 ``[L, S, C]``; None where no rank had tokens."""
        bank, filled = self.bank, self._filled()
        if not filled:
            return None
        readers = self.world // self.sharing
        per_batch = -(-bank.config.kmeans_samples // (readers * self.accumulation_steps))
        mine_LASC = torch.stack([bank.samples(m, per_batch) for m in range(self.accumulation_steps)], dim=1)
        # Global micro-batch order (m, rank), whatever the split.
        all_LAWSC = torch.stack(self._gathered(mine_LASC), dim=2)
        if self.sharing > 1:
            all_LAWSC = all_LAWSC.unflatten(2, (readers, self.sharing)).sum(3)  # each vector is zero in all but one
        all_LMSC = all_LAWSC.flatten(1, 2)
        # The zeros of empty batches are no samples.
        return (all_LMSC if len(filled) == all_LMSC.shape[1] else all_LMSC[:, filled]).flatten(1, 2)

    def _my_layers(self) -> slice:
        """The layers whose codes this rank clusters: ranks share them out, for clustering on the host takes long."""
        return slice(self.rank, None, self.world)

    def _broadcast_layers(self) -> None:
        """Every layer from the rank that clustered it: ranks on different processors may round k-means differently."""
        for tensor in placed(self.bank):
            for layer, part in enumerate(tensor):
                # `part` is a view, so the buffer itself is written.
                broadcast_all([part], self.group, layer % self.world)


class SumOverRanks:
    """One all-reduce at a time, in the background from ``begin`` to ``finish``."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self._total: Tensor | None = None
        self._work: Any = None

    @property
    def begun(self) -> bool:
        return self._total is not None

    def begin(self, tensor: Tensor) -> None:
        """Start to sum a tensor over the ranks, in place."""
        self._total = tensor
        # Shapes are equal on all ranks: those without statistics skip the collective together.
        if tensor.numel() and dist.is_initialized() and dist.get_world_size(self.group) > 1:
            self._work = dist.all_reduce(tensor, group=self.group, async_op=True)

    def finish(self) -> Tensor:
        """The sum; on a GPU the stream waits for it and not the host."""
        assert self._total is not None
        if self._work is not None:
            self._work.wait()
        total, self._total, self._work = self._total, None, None
        return total


def broadcast_all(tensors: list[Tensor], group: Any, source: int = 0) -> None:
    """Overwrite tensors by those of one rank of the group."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    for tensor in tensors:
        # The source is a global rank, whatever the group.
        dist.broadcast(tensor, src=source if group is None else dist.get_global_rank(group, source), group=group)
        increment_version(tensor)  # collectives do not, and mirrors of numbers on the host go by it


def equal_on_all_ranks(tensors: list[Tensor], group: Any) -> bool:
    """Whether tensors hold the same bits on every rank (one small all-reduce, one copy to the host)."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return True
    mark = torch.stack([fingerprint(tensor) for tensor in tensors])
    # The largest of x and of -x over the ranks are opposite only where all x are equal: one collective tells.
    both = torch.cat([mark, -mark])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return bool((both[: len(mark)] == -both[len(mark) :]).all())


def fingerprint(tensor: Tensor) -> Tensor:
    """An int64 number that differs whenever one bit does."""
    types = {1: torch.int8, 2: torch.int16}
    # Weighted by place, so that exchanged values show; int64 wraps around alike on every device. Numbers of 8 bytes in
    # halves, as the highest bit times an even place would be lost.
    bits = tensor.flatten().view(types.get(tensor.element_size(), torch.int32)).long()
    return (bits * torch.arange(1, bits.numel() + 1, device=bits.device)).sum()
