"""Optimizer files as DeepSpeed 0.19.8's ZeRO stages 0 to 2 write them, laid out without starting a rank.

Which parameters there are, what they are called and how they are grouped is for the writer of a format to say
(``ZeroWriter.groups``). Each file is first saved as a skeleton, all structure and no values, and the values are then
poured in a few megabytes at a time; memory stays flat whatever the size of a rank's share.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.formats.deepspeed.reader import ep_place
from vqmoe_ds.checkpoint.io.skeleton import Skeleton
from vqmoe_ds.checkpoint.reader import MOMENTS, CheckpointReader
from vqmoe_ds.runtime.errors import CheckpointError

# nccl_start_alignment_factor of DeepSpeedZeroOptimizer.
ALIGNMENT = 2
"""ZeRO 1 and 2 pad a group to a multiple of this times its ranks."""
LARGEST_GROUP = 178_956_971
"""Values at which DeepSpeed cuts a group of experts in two (``max_group_size`` of its
``split_params_into_different_moe_groups_for_optimizer``)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TagLayout:
    """Layout that a tag is to be resumed on. ``precision`` is ``fp32`` or ``bf16`` (with float32 master weights)."""

    zero_stage: int
    ep_size: int
    world_size: int
    precision: str = "fp32"

    @classmethod
    def chosen(cls, saved: dict[str, Any], **chosen: Any) -> TagLayout:
        """A layout of the fields that are not None, and else of those of a ``CheckpointReader.layout``."""
        known: dict[str, Any] = {"zero_stage": 2, "ep_size": 1, "world_size": 1, "precision": "fp32"}
        values = known | saved | {name: value for name, value in chosen.items() if value is not None}
        return cls(**{name: values[name] for name in known})

    def __str__(self) -> str:
        return f"ZeRO-{self.zero_stage}, EP {self.ep_size}, {self.world_size} ranks, {self.precision}"

    def check(self) -> None:
        """Raises: CheckpointError: sizes that cannot be or do not divide, or a precision that is not written."""
        for option, size in (("--ep", self.ep_size), ("--world", self.world_size)):
            if size < 1:
                raise CheckpointError(f"{option} {size} is no number of ranks; give 1 or more")
        if self.world_size % self.ep_size:
            raise CheckpointError(f"--ep {self.ep_size} does not divide --world {self.world_size}")
        if self.precision not in DTYPES:
            raise CheckpointError(
                f"{self.precision} cannot be written (its loss scale is not moved); give --precision bf16 or fp32"
            )

    def as_dict(self) -> dict[str, Any]:
        return {
            "world_size": self.world_size,
            "ep_size": self.ep_size,
            "zero_stage": self.zero_stage,
            "precision": self.precision,
        }


class Member(NamedTuple):
    """A parameter as a rank has it before ZeRO cuts it.

    Attributes:
        local: its name on the rank.
        source: its name in the checkpoint that is read.
        first: where the rank's share begins in the values of ``source``.
        shape: of the share.
    """

    local: str
    source: str
    first: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Group(NamedTuple):
    """An optimizer group of a rank: its options as the optimizer saves them, what is in it, whether that is experts."""

    options: dict[str, Any]
    members: list[Member]
    moe: bool


class Run(NamedTuple):
    """``length`` values of ``member`` from value ``start`` of its share on, to stand at ``begin``."""

    member: Member
    start: int
    length: int
    begin: int


def whole(member: Member) -> Run:
    """All values of a member, to stand alone."""
    return Run(member, 0, member.numel, 0)


class ZeroWriter(ABC):
    """Lays out the optimizer files of a tag; a format adds its groups and the files of the model.

    Args:
        reader: of the checkpoint to write.
        layout: to write.
        clip_grad: gradient clipping, which the optimizer's files record.
        data_first: the engine's ``use_data_before_expert_parallelism``.
    """

    def __init__(self, reader: CheckpointReader, layout: TagLayout, clip_grad: float, data_first: bool = False) -> None:
        self.reader, self.layout, self.clip_grad, self.data_first = reader, layout, clip_grad, data_first
        self.dtype = DTYPES[layout.precision]
        self.half = self.dtype is not torch.float32
        # PyTorch's Adam counts in a float32 tensor.
        self.step = torch.tensor(float(reader.optimizer_step()))
        self.buffers = reader.buffers()

    @abstractmethod
    def groups(self, ep_rank: int) -> list[Group]:
        """The optimizer groups of an expert-parallel rank, in the order of its optimizer."""

    # ------------------------------------------------------------------ tensors

    def tensor(
        self, file: Skeleton, place: tuple[Any, ...], shape: tuple[int, ...], runs: list[Run], kind: str | None = None
    ) -> Tensor:
        """A tensor with these values in it; moments that the reader lacks stay zero, as Adam starts anew at step 0.

        Args:
            kind: of ``KINDS``, in float32; None: a weight, in the precision of the layout.
        """
        dtype = torch.float32 if kind else self.dtype
        for run in runs:
            if kind in (None, "fp32") or self.reader.has_optimizer:
                stretch = run.member.first + run.start, run.length
                file.fill(place, run.begin, partial(self.reader.stream, run.member.source, kind or "fp32", *stretch))
                file.nbytes += run.length * dtype.itemsize
        return file.empty(place, shape, dtype)

    def _adam_state(
        self, file: Skeleton, place: tuple[Any, ...], shape: tuple[int, ...], runs: list[Run]
    ) -> dict[str, Tensor]:
        state = {"step": file.small((*place, "step"), self.step)}
        return state | {kind: self.tensor(file, (*place, kind), shape, runs, kind) for kind in MOMENTS}

    # ------------------------------------------------------------------ files

    def engine_state(self) -> dict[str, Any]:
        """Entries of the model file that describe the engine."""
        counters = self.reader.counters
        steps = counters.get("global_steps") or self.reader.step
        batch = self.reader.config.get("train", {}).get("batch_size", 0)
        return {
            "lr_scheduler": counters.get("lr_scheduler"),
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": counters.get("skipped_steps") or 0,
            "global_steps": steps,
            "global_samples": counters.get("global_samples") or steps * batch,
            "dp_world_size": self.layout.world_size,
            "mp_world_size": 1,
        }

    def param_shapes(self) -> list[OrderedDict[str, torch.Size]]:
        """Names and shapes of every group, as the model file of stages 1 to 3 has them."""
        return [OrderedDict((m.local, torch.Size(m.shape)) for m in group.members) for group in self.filled_groups(0)]

    def filled_groups(self, ep_rank: int) -> list[Group]:
        """The groups that have members: ZeRO has no others."""
        return [group for group in self.groups(ep_rank) if group.members]

    def ranks_of(self, group: Group) -> int:
        """Number of ranks that share a group."""
        return self.layout.world_size // (self.layout.ep_size if group.moe else 1)

    def ep_place(self, rank: int) -> tuple[int, int]:
        """A rank's place among the expert-parallel ranks, and among those that hold the same experts."""
        return ep_place(rank, self.layout.world_size, self.layout.ep_size, self.data_first)

    def optimizer_file(self, rank: int) -> Skeleton:
        """Stages 1 to 3: the file of a rank, empty."""
        return Skeleton(f"{'bf16_' if self.half else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")

    def whole_file(self, ep_rank: int) -> Skeleton:
        """Stage 0: the optimizer of an expert-parallel rank."""
        file = Skeleton(f"expp_rank_{ep_rank}_mp_rank_00_optim_states.pt")
        file.tree = {"optimizer": self.whole_optimizer(file, ep_rank)}
        return file

    def whole_optimizer(self, file: Skeleton, ep_rank: int) -> dict[str, Any]:
        """Every parameter by number, to stand at ``optimizer`` in a file."""
        inner = ("optimizer", "optimizer_state_dict") if self.half else ("optimizer",)
        state: dict[int, Any] = {}
        rows: list[dict[str, Any]] = []
        masters: list[list[Tensor]] = []
        for g, group in enumerate(self.groups(ep_rank)):
            # Numbers run on from group to group, as in Optimizer.state_dict.
            rows.append({**group.options, "params": list(range(len(state), len(state) + len(group.members)))})
            masters.append([])
            for i, member in enumerate(group.members):
                number, runs = len(state), [whole(member)]
                state[number] = self._adam_state(file, (*inner, "state", number), member.shape, runs)
                if self.half:
                    place = ("optimizer", "fp32_groups", g, i)
                    masters[g].append(self.tensor(file, place, member.shape, runs, "fp32"))
        adam = {"state": state, "param_groups": rows}
        # The keys of FP16_UnfusedOptimizer.state_dict, which stage 0 uses for bfloat16, too.
        scale = {"dynamic_loss_scale": False, "cur_scale": 1.0, "cur_iter": self.reader.step}
        return {**scale, "optimizer_state_dict": adam, "fp32_groups": masters} if self.half else adam

    def flat_adam(
        self, file: Skeleton, key: str, groups: list[Group], rows: list[tuple[int, list[Run]]]
    ) -> dict[str, Any]:
        """Adam's state over one flat row for each group, given by its length and what stands in it."""
        place = ("optimizer_state_dict", key, "state")
        state = {g: self._adam_state(file, (*place, g), (length,), runs) for g, (length, runs) in enumerate(rows)}
        return {"state": state, "param_groups": [{**group.options, "params": [g]} for g, group in enumerate(groups)]}

    def flat_file(self, rank: int) -> Skeleton:
        """Stages 1 and 2: a rank's stretch of every group."""
        import deepspeed
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        file, (ep_rank, replica) = self.optimizer_file(rank), self.ep_place(rank)
        groups = self.filled_groups(ep_rank)
        rows, mappings, paddings, masters = [], [], [], []
        for g, group in enumerate(groups):
            total = sum(member.numel for member in group.members)
            # Only the end of a group is padded: its last ranks may hold nothing else.
            length = -(-total // (ALIGNMENT * self.ranks_of(group))) * ALIGNMENT
            # The partitions of a group follow each other in the order of its ranks.
            start = (replica if group.moe else rank) * length
            runs = list(_stretch(group.members, start, length))
            rows.append((length, runs))
            mappings.append(OrderedDict((run.member.local, fragment_address(run.length, run.begin)) for run in runs))
            paddings.append(length - max(0, min(length, total - start)))
            # DeepSpeed saves masters without the padding, and Adam's rows with it.
            place = ("optimizer_state_dict", "single_partition_of_fp32_groups", g)
            masters.append(self.tensor(file, place, (length - paddings[-1],), runs, "fp32"))
        state = {
            "loss_scaler": LossScaler(scale=1.0),
            "dynamic_loss_scale": False,
            "overflow": False,
            "clip_grad": self.clip_grad,
            "base_optimizer_state": self.flat_adam(file, "base_optimizer_state", groups, rows),
            "single_partition_of_fp32_groups": masters,
            "zero_stage": ZeroStageEnum(self.layout.zero_stage),
            "group_paddings": paddings,
            # No zero_optimization.parameter_alignment: DeepSpeed refuses to load where the setting differs.
            "param_alignment_paddings": [[0] * len(group.members) for group in groups],
            "partition_count": [self.ranks_of(group) for group in groups],
            "ds_version": deepspeed.__version__,
            "param_slice_mappings": mappings,
        }
        file.tree = {"optimizer_state_dict": state, "ds_config": {}, "ds_version": deepspeed.__version__}
        return file


def cut_experts(members: list[Member]) -> list[list[Member]]:
    """Experts as DeepSpeed cuts them into groups of at most ``LARGEST_GROUP`` values."""
    parts: list[list[Member]] = []
    room = 0
    for member in members:
        # As DeepSpeed cuts: in order, and never within a parameter.
        if member.numel > room:
            parts.append([])
            room = max(LARGEST_GROUP, member.numel)
        parts[-1].append(member)
        room -= member.numel
    return parts


def _stretch(members: list[Member], start: int, length: int) -> Iterator[Run]:
    """Runs of a group, laid end to end, that fall into ``length`` values from ``start`` on."""
    reached = 0
    for member in members:
        first, last = max(start, reached), min(start + length, reached + member.numel)
        if first < last:
            yield Run(member, first - reached, last - first, first - start)
        reached += member.numel
