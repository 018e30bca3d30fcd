"""Writing checkpoints of native ``deepspeed.moe.layer.MoE`` models for a layout of choice, without starting a rank.

The files are DeepSpeed 0.19.8's own and ``engine.load_checkpoint`` takes them, with optimizer, for the expert-parallel
size, world size, ZeRO stage and number type they were written for.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.formats.deepspeed.writer import ALIGNMENT, TagLayout
from vqmoe_ds.checkpoint.formats.native_moe.files import MODEL
from vqmoe_ds.checkpoint.formats.native_moe.names import LARGEST_GROUP, ep_place, expand, expert_name, numbered
from vqmoe_ds.checkpoint.formats.portable import Tell
from vqmoe_ds.checkpoint.io.skeleton import Skeleton
from vqmoe_ds.checkpoint.reader import CHUNK, KINDS, CheckpointReader
from vqmoe_ds.checkpoint.resume.store import tag_name
from vqmoe_ds.runtime.errors import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def native_layout(
    reader: CheckpointReader,
    zero_stage: int | None = None,
    ep_size: int | None = None,
    world_size: int | None = None,
    precision: str | None = None,
) -> TagLayout:
    """A layout to write, by default that of the source.

    Raises:
        CheckpointError: the source is not of a native model, or the sizes do not fit it or each other.
    """
    if "native" not in reader.config:
        raise CheckpointError(
            f"{reader.path} is not of a model with deepspeed.moe.layer.MoE layers, so --to native cannot write it; "
            "use --to deepspeed"
        )
    old, native = reader.layout, reader.config["native"]
    stage = old.get("zero_stage", 2) if zero_stage is None else zero_stage
    layout = TagLayout(
        stage, ep_size or old.get("ep_size", 1), world_size or old.get("world_size", 1), precision or old["precision"]
    )
    if layout.zero_stage > 2:
        raise CheckpointError("DeepSpeed has no ZeRO stage 3 for native MoE layers; give --zero 0, 1 or 2")
    if layout.precision not in DTYPES:
        raise CheckpointError(
            f"{layout.precision} cannot be written (its loss scale is not moved); give --precision bf16 or fp32"
        )
    if layout.world_size % layout.ep_size:
        raise CheckpointError(f"--ep {layout.ep_size} does not divide --world {layout.world_size}")
    for prefix, count in native["experts"].items():
        if count % layout.ep_size:
            raise CheckpointError(
                f"--ep {layout.ep_size} does not divide the {count} experts of {prefix.split('.deepspeed_moe')[0]}"
            )
    if not native["groups"][0]["options"]:
        raise CheckpointError(f"{reader.path} holds weights alone, and DeepSpeed loads those at any --ep as they are")
    return layout


def write_native(reader: CheckpointReader, folder: Path, layout: TagLayout, tell: Tell | None = None) -> None:
    """Write a tag and DeepSpeed's ``latest`` into an empty folder.

    Args:
        reader: of a native checkpoint, or of a portable one made from it.
        folder: that ``load_checkpoint`` is to be given.
        layout: of ``native_layout``.
        tell: called with the number of bytes after each stretch.
    """
    tag = folder / tag_name(reader.step)
    for file in _NativeWriter(reader, layout).files():
        file.write(tag, tell, lambda module, name: False)
    (folder / "latest").write_text(tag.name, encoding="utf-8")


class _Run(NamedTuple):
    """``length`` values of ``name`` from ``start`` on, to stand at ``begin``; ``local`` is its name on the rank."""

    local: str
    name: str
    start: int
    length: int
    begin: int


class _NativeWriter:
    """Lays out every file of a tag."""

    def __init__(self, reader: CheckpointReader, layout: TagLayout) -> None:
        self.reader, self.layout, self.native = reader, layout, reader.config["native"]
        self.dtype = DTYPES[layout.precision]
        self.buffers = reader.buffers()
        self.local = {prefix: count // layout.ep_size for prefix, count in self.native["experts"].items()}
        self.data_first = bool((self.native["ds_config"] or {}).get("use_data_before_expert_parallelism"))
        self.step = torch.tensor(float(reader.optimizer_step()))

    def files(self) -> Iterator[Skeleton]:
        yield self._model_file()
        for layer, (prefix, count) in enumerate(self.native["experts"].items()):
            for expert in range(count):
                yield self._expert_file(layer, prefix, expert)
        stage = self.layout.zero_stage
        for rank in range(self.layout.world_size if stage else self.layout.ep_size):
            yield self._flat_file(rank) if stage else self._whole_file(rank)

    # ------------------------------------------------------------------ weights

    def _values(self, name: str, kind: str, start: int, length: int) -> Iterator[Tensor]:
        if kind != "fp32" and not self.reader.has_optimizer:
            return  # zeros, as the skeleton has them, at step 0: Adam starts anew
        for first in range(start, start + length, CHUNK):
            yield self.reader.read(name, kind, first, min(CHUNK, start + length - first))

    def _whole(self, name: str, kind: str = "fp32") -> partial[Iterator[Tensor]]:
        return partial(self._values, name, kind, 0, math.prod(self.reader.shape(name)))

    def _weight(self, file: Skeleton, place: tuple[Any, ...], name: str) -> Tensor:
        name = self.native["tied"].get(name, name)
        if name not in self.buffers:
            return file.tensor(place, self.reader.shape(name), self.dtype, self._whole(name))
        value = self.buffers[name]
        frozen = name not in self.native["buffers"] and value.is_floating_point()
        return file.small(place, value.to(self.dtype) if frozen and expert_name(name) is None else value)

    def _model_file(self) -> Skeleton:
        import deepspeed

        file, layout, counters = Skeleton(MODEL), self.layout, self.reader.counters
        config = copy.deepcopy(self.native["ds_config"] or {})
        config["zero_optimization"] = {**(config.get("zero_optimization") or {}), "stage": layout.zero_stage}
        config["bf16"] = {**(config.get("bf16") or {}), "enabled": layout.precision == "bf16"}
        shapes = [
            OrderedDict((local, torch.Size(self.reader.shape(name))) for local, name in members)
            for _, members in self._groups(0)
        ]
        stage = layout.zero_stage
        frozen: OrderedDict[str, Any] | None = OrderedDict() if stage > 1 else None
        file.tree = {
            "module": OrderedDict((name, self._weight(file, ("module", name), name)) for name in self.native["dense"]),
            **{"buffer_names": self.native["buffers"], "optimizer": None, "param_shapes": shapes if stage else None},
            **{"frozen_param_shapes": frozen, "frozen_param_fragments": frozen},
            **{"shared_params": self.native["tied"] if stage else None, "lr_scheduler": counters.get("lr_scheduler")},
            **{"data_sampler": None, "random_ltd": None, "skipped_steps": counters.get("skipped_steps") or 0},
            **{"global_steps": self.reader.step, "global_samples": counters.get("global_samples") or 0},
            **{"dp_world_size": layout.world_size, "mp_world_size": 1, "ds_config": config},
            **{"checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1}},
            **{"ds_version": deepspeed.__version__, "num_experts": list(self.native["experts"].values())},
            **{"ds_autoep_layers": None, **self.reader.client_state},
        }
        return file

    def _expert_file(self, layer: int, prefix: str, expert: int) -> Skeleton:
        file = Skeleton(f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt", {})
        for pattern in self.native["patterns"]:
            if pattern.startswith(prefix):
                name = numbered(pattern, expert)
                file.tree[name] = self._weight(file, (name,), name)
        return file

    # ------------------------------------------------------------------ optimizer

    def _groups(self, place: int) -> list[tuple[dict[str, Any], list[tuple[str, str]]]]:
        """Options and (local, global) names of every group of an expert-parallel rank, cut where DeepSpeed cuts."""
        rows = []
        for group in self.native["groups"]:
            names = list(expand(group["names"], self.local, place))
            for part in self._cut(names) if group["moe"] else [names]:
                rows.append((group, part))
        return rows

    def _cut(self, names: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
        parts: list[list[tuple[str, str]]] = [[]]
        size = 0
        for local, name in names:
            count = math.prod(self.reader.shape(name))
            if parts[-1] and size + count > LARGEST_GROUP:
                parts.append([])
                size = 0
            parts[-1].append((local, name))
            size += count
        return parts

    def _param_groups(self, params: list[list[int]], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        for numbers, group in zip(params, groups, strict=True):
            options = {key: tuple(v) if key == "betas" else v for key, v in group["options"].items()}
            kind = {"name": f"ep_size_{self.layout.ep_size}", "moe": True} if group["moe"] else {}
            rows.append({**options, **kind, "params": numbers})
        return rows

    def _whole_file(self, rank: int) -> Skeleton:
        """Stage 0: every parameter of an expert-parallel rank by number."""
        file, half = Skeleton(f"expp_rank_{rank}_mp_rank_00_optim_states.pt"), self.dtype is not torch.float32
        inner = ("optimizer", "optimizer_state_dict") if half else ("optimizer",)
        state: dict[int, Any] = {}
        numbers: list[list[int]] = []
        masters: list[list[Tensor]] = []
        groups = []
        for g, (group, members) in enumerate(self._groups(rank)):
            numbers.append(list(range(len(state), len(state) + len(members))))
            masters.append([])
            groups.append(group)
            for i, (_, name) in enumerate(members):
                number, shape = len(state), self.reader.shape(name)
                state[number] = {"step": file.small((*inner, "state", number, "step"), self.step)}
                for kind in KINDS[1:]:
                    place = (*inner, "state", number, kind)
                    state[number][kind] = file.tensor(place, shape, torch.float32, self._whole(name, kind))
                if half:
                    place = ("optimizer", "fp32_groups", g, i)
                    masters[g].append(file.tensor(place, shape, torch.float32, self._whole(name)))
        adam = {"state": state, "param_groups": self._param_groups(numbers, groups)}
        scale = {"dynamic_loss_scale": False, "cur_scale": 1.0, "cur_iter": self.reader.step}
        file.tree = {"optimizer": {**scale, "optimizer_state_dict": adam, "fp32_groups": masters} if half else adam}
        return file

    def _flat_file(self, rank: int) -> Skeleton:
        """Stages 1 and 2: a stretch of every group."""
        import deepspeed
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        half = "bf16_" if self.layout.precision == "bf16" else ""
        file = Skeleton(f"{half}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        ep_rank, replica = ep_place(rank, self.layout.world_size, self.layout.ep_size, self.data_first)
        state, masters, mappings, paddings, counts = {}, [], [], [], []
        groups = self._groups(ep_rank)
        for g, (group, members) in enumerate(groups):
            ranks = self.layout.world_size // (self.layout.ep_size if group["moe"] else 1)
            total = sum(math.prod(self.reader.shape(name)) for _, name in members)
            length = -(-total // (ALIGNMENT * ranks)) * ALIGNMENT
            start = (replica if group["moe"] else rank) * length
            runs = list(self._stretch(members, start, length))
            paddings.append(length - max(0, min(length, total - start)))
            counts.append(ranks)
            mappings.append(OrderedDict((run.local, fragment_address(run.length, run.begin)) for run in runs))
            at: tuple[Any, ...] = ("optimizer_state_dict", "single_partition_of_fp32_groups", g)
            masters.append(self._row(file, at, length - paddings[-1], runs, "fp32"))
            at = ("optimizer_state_dict", "base_optimizer_state", "state", g)
            state[g] = {"step": file.small((*at, "step"), self.step)}
            state[g].update({kind: self._row(file, (*at, kind), length, runs, kind) for kind in KINDS[1:]})
        adam = {
            "state": state,
            "param_groups": self._param_groups([[g] for g in state], [group for group, _ in groups]),
        }
        optimizer = {
            **{"loss_scaler": LossScaler(scale=1.0), "dynamic_loss_scale": False, "overflow": False},
            **{"clip_grad": self.native["clip_grad"], "base_optimizer_state": adam},
            **{"single_partition_of_fp32_groups": masters, "zero_stage": ZeroStageEnum(self.layout.zero_stage)},
            **{"group_paddings": paddings, "param_alignment_paddings": [[0] * len(m) for _, m in groups]},
            **{"partition_count": counts, "ds_version": deepspeed.__version__, "param_slice_mappings": mappings},
        }
        file.tree = {"optimizer_state_dict": optimizer, "ds_config": {}, "ds_version": deepspeed.__version__}
        return file

    def _row(self, file: Skeleton, place: tuple[Any, ...], length: int, runs: list[_Run], kind: str) -> Tensor:
        for run in runs:
            file.fill(place, run.begin, partial(self._values, run.name, kind, run.start, run.length))
        return file.empty(place, (length,), torch.float32)

    def _stretch(self, members: list[tuple[str, str]], start: int, length: int) -> Iterator[_Run]:
        """What of a group, laid end to end, falls into ``length`` values from ``start`` on."""
        reached = 0
        for local, name in members:
            count = math.prod(self.reader.shape(name))
            first, last = max(start, reached), min(start + length, reached + count)
            if first < last:
                yield _Run(local, name, first - reached, last - first, first - start)
            reached += count
