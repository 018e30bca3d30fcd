"""Writing a DeepSpeed tag of a layout of choice from any checkpoint, without starting a rank.

The files are DeepSpeed 0.19.8's own, and ``engine.load_checkpoint`` takes them. Each is first saved as a skeleton, all
structure and no values, and the values are then poured in a few megabytes at a time; memory stays flat whatever the
size of a rank's share.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.formats.deepspeed.reader import DEEPSPEED_KEYS
from vqmoe_ds.checkpoint.formats.portable import Tell, seal
from vqmoe_ds.checkpoint.io.safetensors_io import Sealed
from vqmoe_ds.checkpoint.io.skeleton import Skeleton
from vqmoe_ds.checkpoint.reader import CHUNK, KINDS, CheckpointReader
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import sha256_of

ALIGNMENT = 2
"""ZeRO 1 and 2 pad a group to a multiple of this times its ranks."""
LARGEST_EXPERT_GROUP = 178_956_971
LARGEST_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class TagLayout:
    """Where a tag is to be resumed. ``precision`` is ``fp32`` or ``bf16`` (with float32 master weights)."""

    zero_stage: int
    ep_size: int
    world_size: int
    precision: str = "fp32"

    def check(self, reader: CheckpointReader) -> None:
        """Raises: CheckpointError: sizes that divide nothing, or frozen weights."""
        if reader.frozen:
            raise CheckpointError(
                f"{reader.path} is of a fine-tuning that froze {len(reader.frozen)} parameters, which tags written "
                "without an engine cannot hold; it resumes on any layout as it is, or take --to portable"
            )
        experts = reader.config["moe"]["num_experts"]
        if self.world_size % self.ep_size:
            raise CheckpointError(f"--ep {self.ep_size} does not divide --world {self.world_size}")
        if any(".experts." in name for name in reader.names()) and experts % self.ep_size:
            raise CheckpointError(f"--ep {self.ep_size} does not divide the {experts} experts of {reader.path}")

    def as_dict(self) -> dict[str, Any]:
        return {
            **{"world_size": self.world_size, "ep_size": self.ep_size},
            **{"zero_stage": self.zero_stage, "precision": self.precision},
        }


class _Run(NamedTuple):
    """Values of one stretch: ``length`` values of ``name`` from ``start`` on, to stand at ``begin``."""

    name: str
    kind: str
    start: int
    length: int
    begin: int


class _File(Skeleton):
    """A file whose large tensors are stretches of the reader's."""

    def __init__(self, name: str, reader: CheckpointReader, tree: Any = None) -> None:
        super().__init__(name, tree)
        self.reader, self.nbytes = reader, 0

    def planned(self, place: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype, runs: list[_Run]) -> Tensor:
        """A tensor with these stretches in it; moments the reader lacks stay zero, as Adam starts anew at step 0."""
        for run in runs:
            if run.kind == "fp32" or self.reader.has_optimizer:
                self.fill(place, run.begin, partial(_stretch_of, self.reader, run))
                self.nbytes += run.length * dtype.itemsize
        return self.empty(place, shape, dtype)

    def small(self, place: tuple[Any, ...], value: Tensor) -> Tensor:
        self.nbytes += value.numel() * value.dtype.itemsize
        return super().small(place, value)


def _stretch_of(reader: CheckpointReader, run: _Run) -> Iterator[Tensor]:
    for done in range(0, run.length, CHUNK):
        yield reader.read(run.name, run.kind, run.start + done, min(CHUNK, run.length - done))


def write_tag(reader: CheckpointReader, folder: Path, layout: TagLayout, tell: Tell | None = None) -> None:
    """Write a sealed tag into an empty folder.

    Raises:
        CheckpointError: ``TagLayout.check``, or a model too large for one ZeRO-3 sub-group.
    """
    layout.check(reader)
    with ThreadPoolExecutor(1) as hashing:  # while the next file is written
        sums = {}
        for file in _TagWriter(reader, layout).files():
            file.write(folder, tell, lambda module, name: False)
            sums[file.name] = hashing.submit(sha256_of, folder / file.name)
        files = {name: Sealed((folder / name).stat().st_size, job.result()) for name, job in sums.items()}
    seal(folder, reader, files, layout.as_dict())


def bytes_told(reader: CheckpointReader, layout: TagLayout) -> int:
    """What ``tell`` of ``write_tag`` will have been told at the end."""
    return sum(file.nbytes for file in _TagWriter(reader, layout).files())


class _TagWriter:
    """Lays out every file of a tag."""

    def __init__(self, reader: CheckpointReader, layout: TagLayout) -> None:
        self.reader, self.layout = reader, layout
        self.dtype = torch.bfloat16 if layout.precision == "bf16" else torch.float32
        self.step = torch.tensor(float(reader.optimizer_step()))
        self.experts = [name for name in reader.names() if ".experts." in name]
        self.buffers = reader.buffers()
        self.groups = self._groups()

    def _groups(self) -> list[list[str]]:
        """Names of each optimizer group: matrices, vectors, experts (``parameter_groups``, then DeepSpeed)."""
        dense = [name for name in self.reader.names() if name not in self.experts]
        groups = [
            [n for n in dense if len(self.reader.shape(n)) >= 2],
            [n for n in dense if len(self.reader.shape(n)) < 2],
        ]
        room = 0
        for name in self.experts:
            count = self._count(name)
            if count > room:
                groups.append([])
                room = max(LARGEST_EXPERT_GROUP, count)
            groups[-1].append(name)
            room -= count
        return groups

    def _count(self, name: str) -> int:
        """Values a rank has of a parameter before ZeRO cuts it."""
        return math.prod(self.reader.shape(name)) // (self.layout.ep_size if name in self.experts else 1)

    def _first(self, name: str, rank: int) -> int:
        return (rank % self.layout.ep_size) * self._count(name) if name in self.experts else 0

    def _ranks(self, group: list[str]) -> int:
        """Ranks that share a group."""
        return self.layout.world_size // (self.layout.ep_size if group and group[0] in self.experts else 1)

    def _place(self, group: list[str], rank: int) -> int:
        return rank // self.layout.ep_size if group and group[0] in self.experts else rank

    def files(self) -> Iterator[_File]:
        from torch._subclasses.fake_tensor import FakeTensorMode

        makers: list[Callable[[], _File]] = []
        stage, world = self.layout.zero_stage, self.layout.world_size
        if stage == 3:
            makers += [partial(self._model_file, rank) for rank in range(world)]
            makers += [partial(self._stage3_file, rank) for rank in range(world)]
        else:
            makers += [partial(self._model_file, 0)]
            makers += [partial(self._expert_file, p, e) for p in self._layers() for e in range(self._num_experts())]
            shared = range(world) if stage else range(self.layout.ep_size if self.experts else 0)
            makers += [partial(self._stage12_file if stage else self._stage0_file, rank) for rank in shared]
        for make in makers:
            with FakeTensorMode(allow_non_fake_inputs=True):
                file = make()
            yield file

    def _num_experts(self) -> int:
        return int(self.reader.config["moe"]["num_experts"])

    def _layers(self) -> list[str]:
        return list(dict.fromkeys(name.rsplit(".", 1)[0] for name in self.experts))

    # ------------------------------------------------------------------ weights

    def _model_file(self, rank: int) -> _File:
        stage = self.layout.zero_stage
        file = _File(f"{f'zero_pp_rank_{rank}_' if stage == 3 else ''}mp_rank_00_model_states.pt", self.reader)
        module: OrderedDict[str, Tensor] = OrderedDict()
        for name in self.reader.names():
            if name in self.experts:
                continue
            shape = (0,) if stage == 3 else self.reader.shape(name)
            runs = [] if stage == 3 else [_Run(name, "fp32", 0, math.prod(shape), 0)]
            module[name] = file.planned(("module", name), shape, self.dtype, runs)
        for name, buffer in self.buffers.items():
            module[name] = file.small(("module", name), buffer)
        layers = self._layer_records(rank)
        file.tree = {"module": module, "buffer_names": list(self.buffers), "optimizer": None, **self._facts()}
        if not stage and not self.experts:
            file.tree["optimizer"] = self._stage0_optimizer(file, 0, ("optimizer",))
        if stage:
            shapes = [
                OrderedDict((n, torch.Size(self._local_shape(n))) for n in group) for group in self.groups if group
            ]
            file.tree.update(param_shapes=shapes, frozen_param_shapes=OrderedDict() if stage > 1 else None)
            file.tree.update(shared_params={}, frozen_param_fragments=OrderedDict() if stage > 1 else None)
        if layers:
            file.tree["num_experts"] = [self._num_experts()] * len(layers)
            file.tree["ds_autoep_layers"] = layers
            file.tree["universal_checkpoint_info"] = {
                **{"universal_checkpoint_version": 0.4, "ds_autoep_layers": layers},
                "expert_parameter_patterns": [r".*\.experts\.w[123]$"],
            }
        return file

    def _facts(self) -> dict[str, Any]:
        import deepspeed

        layout, counters = self.layout, self.reader.counters
        steps = counters.get("global_steps") or self.reader.step
        state = dict(self.reader.client_state)
        state["vqmoe_ds"] = {**state.get("vqmoe_ds", {}), "step": self.reader.step, "layout": layout.as_dict()}
        config: dict[str, Any] = {"zero_optimization": {"stage": layout.zero_stage}}
        if layout.precision == "bf16":
            config["bf16"] = {"enabled": True}
        return {
            **{
                "param_shapes": None,
                "frozen_param_shapes": None,
                "shared_params": None,
                "frozen_param_fragments": None,
            },
            **{"lr_scheduler": counters.get("lr_scheduler"), "data_sampler": None, "random_ltd": None},
            **{"skipped_steps": counters.get("skipped_steps") or 0, "global_steps": steps},
            **{"global_samples": counters.get("global_samples") or steps * self.reader.config["train"]["batch_size"]},
            **{"dp_world_size": layout.world_size, "mp_world_size": 1},
            **{"checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1}},
            **{"ds_config": config, "ds_version": deepspeed.__version__},
            **{key: value for key, value in state.items() if key not in DEEPSPEED_KEYS},
        }

    def _local_shape(self, name: str) -> tuple[int, ...]:
        first, *rest = self.reader.shape(name)
        return (first // self.layout.ep_size if name in self.experts else first, *rest)

    def _layer_records(self, rank: int) -> list[dict[str, Any]]:
        from deepspeed.checkpoint.autoep_affine import (
            autoep_placement_to_affine_map,
            legacy_uniform_autoep_placement_descriptor,
        )

        ep, stage, experts = self.layout.ep_size, self.layout.zero_stage, self._num_experts()
        local, ep_rank = experts // ep, rank % ep
        records = []
        for number, prefix in enumerate(self._layers()):
            placement = legacy_uniform_autoep_placement_descriptor(experts, local, ep)
            shapes = {n: list(self.reader.shape(n)) for n in self.experts if n.startswith(prefix + ".")}
            maps = {name: autoep_placement_to_affine_map(placement, shape).to_dict() for name, shape in shapes.items()}
            records.append(
                {
                    **{"moe_layer_id": number, "module_path": prefix.removesuffix(".experts"), "num_experts": experts},
                    **{"num_local_experts": local, "ep_size": ep, "expert_placement": placement},
                    **{"affine_maps": {"version": 1, "params": maps}, "expert_key_prefix": prefix},
                    "checkpoint_format": "zero3_partitioned" if stage == 3 else "per_expert_files",
                    "checkpoint_format_version": 1 if stage == 3 else None,
                    **{"ep_group_name": f"ep_size_{ep}", "ep_rank": ep_rank},
                    "expert_data_parallel_rank": rank // ep,
                    "expert_data_parallel_world_size": self.layout.world_size // ep,
                    **{"global_expert_start": ep_rank * local, "global_expert_end": (ep_rank + 1) * local},
                }
            )
        return records

    def _expert_file(self, prefix: str, expert: int) -> _File:
        file = _File(
            f"layer_{self._layers().index(prefix)}_expert_{expert}_mp_rank_00_model_states.pt", self.reader, {}
        )
        for name in self.experts:
            if name.startswith(prefix + "."):
                shape = self.reader.shape(name)[1:]
                count, key = math.prod(shape), f"{name}.{expert}"
                runs = [_Run(name, "fp32", expert * count, count, 0)]
                file.tree[key] = file.planned((key,), shape, self.dtype, runs)
        return file

    # ------------------------------------------------------------------ optimizer

    def _adam(self, params: list[list[int]], groups: list[list[str]]) -> list[dict[str, Any]]:
        """Parameter groups as the optimizer would save them."""
        train = self.reader.config["train"]
        # Not under the fake mode: this one tensor is only there to ask PyTorch for its defaults.
        options = {"lr": train["learning_rate"], "betas": (train["beta1"], train["beta2"])}
        blank = torch.optim.AdamW([torch.zeros(())], **options).state_dict()["param_groups"][0]
        blank.update({k: tuple(v) if k == "betas" else v for k, v in (self.reader.counters.get("adam") or {}).items()})
        rows = []
        for number, (names, group) in enumerate(zip(params, groups, strict=True)):
            decay = 0.0 if number == 1 else train["weight_decay"]
            expert = {"moe": True} if group and group[0] in self.experts else {}
            name = f"ep_size_{self.layout.ep_size}" if expert else ("matrices", "vectors")[min(number, 1)]
            rows.append({**blank, "weight_decay": decay, "name": name, **expert, "params": names})
        return rows

    def _stage0_file(self, rank: int) -> _File:
        file = _File(f"expp_rank_{rank}_mp_rank_00_optim_states.pt", self.reader)
        file.tree = {"optimizer": self._stage0_optimizer(file, rank, ("optimizer",))}
        return file

    def _stage0_optimizer(self, file: _File, rank: int, path: tuple[Any, ...]) -> dict[str, Any]:
        half = self.layout.precision != "fp32"
        inner = (*path, "optimizer_state_dict") if half else path
        state: dict[int, Any] = {}
        numbers: list[list[int]] = []
        masters: list[list[Tensor]] = []
        for g, group in enumerate(self.groups):
            numbers.append(list(range(len(state), len(state) + len(group))))
            masters.append([])
            for i, name in enumerate(group):
                number, shape, count = len(state), self._local_shape(name), self._count(name)
                run = _Run(name, "fp32", self._first(name, rank), count, 0)
                state[number] = {"step": file.small((*inner, "state", number, "step"), self.step)}
                for kind in KINDS[1:]:
                    place = (*inner, "state", number, kind)
                    state[number][kind] = file.planned(place, shape, torch.float32, [run._replace(kind=kind)])
                if half:
                    masters[g].append(file.planned((*path, "fp32_groups", g, i), shape, torch.float32, [run]))
        adam = {"state": state, "param_groups": self._adam(numbers, self.groups)}
        if not half:
            return adam
        scale = {"dynamic_loss_scale": False, "cur_scale": 1.0, "cur_iter": self.reader.step}
        return {**scale, "optimizer_state_dict": adam, "fp32_groups": masters}

    def _optimizer_file(self, rank: int) -> _File:
        half = "bf16_" if self.dtype is torch.bfloat16 else ""
        return _File(f"{half}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", self.reader)

    def _flat_state(self, file: _File, key: str, rows: list[tuple[int, list[_Run]]]) -> dict[str, Any]:
        """Adam's state over flat rows, each given by its length and what stands in it."""
        state = {}
        for g, (length, runs) in enumerate(rows):
            place = ("optimizer_state_dict", key, "state", g)
            state[g] = {"step": file.small((*place, "step"), self.step)}
            for kind in KINDS[1:]:
                renamed = [run._replace(kind=kind) for run in runs]
                state[g][kind] = file.planned((*place, kind), (length,), torch.float32, renamed)
        groups = [group for group in self.groups if group]
        return {"state": state, "param_groups": self._adam([[g] for g in range(len(rows))], groups)}

    def _stage12_file(self, rank: int) -> _File:
        import deepspeed
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        file = self._optimizer_file(rank)
        rows, mappings, paddings, masters = [], [], [], []
        for g, group in enumerate(group for group in self.groups if group):
            ranks, place = self._ranks(group), self._place(group, rank)
            total = sum(self._count(name) for name in group)
            length = -(-total // (ALIGNMENT * ranks)) * ALIGNMENT
            runs = self._stretch(group, rank, place * length, length)
            padding = length * ranks - total if place == ranks - 1 else 0
            rows.append((length, runs))
            mappings.append(OrderedDict((run.name, fragment_address(run.length, run.begin)) for run in runs))
            paddings.append(padding)
            at = ("optimizer_state_dict", "single_partition_of_fp32_groups", g)
            masters.append(file.planned(at, (max(0, length - padding),), torch.float32, runs))
        groups = [group for group in self.groups if group]
        state = {
            **{"loss_scaler": LossScaler(scale=1.0), "dynamic_loss_scale": False, "overflow": False},
            "clip_grad": self.reader.config["train"]["grad_clip"],
            "base_optimizer_state": self._flat_state(file, "base_optimizer_state", rows),
            **{"single_partition_of_fp32_groups": masters, "zero_stage": ZeroStageEnum(self.layout.zero_stage)},
            **{"group_paddings": paddings, "param_alignment_paddings": [[0] * len(group) for group in groups]},
            "partition_count": [self._ranks(group) for group in groups],
            **{"ds_version": deepspeed.__version__, "param_slice_mappings": mappings},
        }
        file.tree = {"optimizer_state_dict": state, "ds_config": {}, "ds_version": deepspeed.__version__}
        return file

    def _stretch(self, group: list[str], rank: int, start: int, length: int) -> list[_Run]:
        """What of a group, laid end to end, falls into ``length`` values from ``start`` on."""
        runs, reached = [], 0
        for name in group:
            count = self._count(name)
            first, last = max(start, reached), min(start + length, reached + count)
            if first < last:
                runs.append(_Run(name, "fp32", self._first(name, rank) + first - reached, last - first, first - start))
            reached += count
        return runs

    def _stage3_file(self, rank: int) -> _File:
        import deepspeed
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum

        file = self._optimizer_file(rank)
        rows, records, masters = [], [], []
        for g, group in enumerate(group for group in self.groups if group):
            ranks, place = self._ranks(group), self._place(group, rank)
            runs, begin = [], 0
            for name in group:
                part = -(-self._count(name) // ranks)
                count = max(0, min(part, self._count(name) - place * part))
                if count:
                    runs.append(_Run(name, "fp32", self._first(name, rank) + place * part, count, begin))
                begin += part
            if begin > LARGEST_SUB_GROUP:
                raise CheckpointError(
                    f"a rank's share of {begin:,} values is more than DeepSpeed puts into one ZeRO-3 sub-group; raise "
                    "--world, or resume from the checkpoint as it is"
                )
            rows.append((begin, runs))
            records.append(self._partition_record(g, group, rank))
            masters.append(file.planned(("optimizer_state_dict", "fp32_flat_groups", g), (begin,), torch.float32, runs))
        state = {
            **{"zero_stage": ZeroStageEnum.weights, "loss_scaler": LossScaler(scale=1.0), "dynamic_loss_scale": False},
            **{"overflow": False, "partition_count": self.layout.world_size},
            **({"ds_zero_partition_groups": records} if self.experts else {}),
            "optimizer_state_dict": self._flat_state(file, "optimizer_state_dict", rows),
            "fp32_flat_groups": masters,
        }
        file.tree = {"optimizer_state_dict": state, "ds_config": {}, "ds_version": deepspeed.__version__}
        return file

    def _partition_record(self, number: int, group: list[str], rank: int) -> dict[str, Any]:
        expert = group[0] in self.experts
        ranks = list(range(self.layout.world_size))
        return {
            **{"sub_group": number, "partition_count": self._ranks(group), "partition_rank": self._place(group, rank)},
            "partition_ranks": ranks[rank % self.layout.ep_size :: self.layout.ep_size] if expert else ranks,
            "families": ["autoep_expert" if expert else "replicated"],
            "group_names": [f"ep_size_{self.layout.ep_size}" if expert else "replicated"],
        }
