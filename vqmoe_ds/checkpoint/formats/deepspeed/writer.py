"""Writing a DeepSpeed tag of a layout of choice from any checkpoint, without starting a rank.

The files are DeepSpeed 0.19.8's own, and ``engine.load_checkpoint`` takes them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.formats.deepspeed.reader import DEEPSPEED_KEYS
from vqmoe_ds.checkpoint.formats.deepspeed.zero import Group, Member, Run, TagLayout, ZeroWriter, cut_experts, whole
from vqmoe_ds.checkpoint.formats.portable import Tell, seal
from vqmoe_ds.checkpoint.io.safetensors_io import Sealed
from vqmoe_ds.checkpoint.io.skeleton import Skeleton
from vqmoe_ds.checkpoint.reader import CheckpointReader
from vqmoe_ds.models.parameter_groups import decays
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import sha256_of

# The default of zero_optimization.sub_group_size: DeepSpeed would cut a larger row.
LARGEST_SUB_GROUP = 1_000_000_000


def check_layout(reader: CheckpointReader, layout: TagLayout) -> None:
    """Raises: CheckpointError: ``TagLayout.check``, experts that the ranks cannot share, or frozen weights."""
    if reader.frozen:
        raise CheckpointError(
            f"{reader.path} is of a fine-tuning that froze {len(reader.frozen)} parameters, which tags written "
            "without an engine cannot hold; it resumes on any layout as it is, or take --to portable"
        )
    layout.check()
    experts = reader.config["moe"]["num_experts"]
    if any(".experts." in name for name in reader.names()) and experts % layout.ep_size:
        raise CheckpointError(f"--ep {layout.ep_size} does not divide the {experts} experts of {reader.path}")


def write_tag(reader: CheckpointReader, folder: Path, layout: TagLayout, tell: Tell | None = None) -> None:
    """Write a sealed tag into an empty folder.

    Raises:
        CheckpointError: ``check_layout``, or a model too large for one ZeRO-3 sub-group.
    """
    check_layout(reader, layout)
    with ThreadPoolExecutor(1) as hashing:  # while the next file is written
        sums = {}
        for file in _TagWriter(reader, layout).files():
            file.write(folder, tell, lambda module, name: False)
            sums[file.name] = hashing.submit(sha256_of, folder / file.name)
        files = {name: Sealed((folder / name).stat().st_size, job.result()) for name, job in sums.items()}
    seal(folder, reader, files, layout.as_dict())


def bytes_told(reader: CheckpointReader, layout: TagLayout) -> int:
    """Bytes that ``tell`` of ``write_tag`` will have been told at the end."""
    return sum(file.nbytes for file in _TagWriter(reader, layout).files())


class _TagWriter(ZeroWriter):
    """Lays out every file of a tag."""

    def __init__(self, reader: CheckpointReader, layout: TagLayout) -> None:
        super().__init__(reader, layout, reader.config["train"]["grad_clip"])
        self.experts = [name for name in reader.names() if ".experts." in name]

    def groups(self, ep_rank: int) -> list[Group]:
        """Matrices, vectors, experts (``parameter_groups``, then DeepSpeed)."""
        dense = [self._member(name, 0) for name in self.reader.names() if name not in self.experts]
        experts = cut_experts([self._member(name, ep_rank) for name in self.experts])
        train = self.reader.config["train"]
        gates = train.get("decay_gates", True)
        decayed = {m.local for m in dense if decays(m.local, len(m.shape), gates)}
        decay, expert = train["weight_decay"], {"name": f"ep_size_{self.layout.ep_size}", "moe": True}
        adam = {"lr": train["learning_rate"], "betas": (train["beta1"], train["beta2"])}
        # Optimizer.load_state_dict takes the saved groups as they are: an option they lack is missing at the next step.
        blank = torch.optim.AdamW([torch.zeros(())], **adam).state_dict()["param_groups"][0]
        blank.update({k: tuple(v) if k == "betas" else v for k, v in (self.reader.counters.get("adam") or {}).items()})
        rows: list[tuple[dict[str, Any], list[Member], bool]] = [
            ({"weight_decay": decay, "name": "matrices"}, [m for m in dense if m.local in decayed], False),
            ({"weight_decay": 0.0, "name": "vectors"}, [m for m in dense if m.local not in decayed], False),
            *(({"weight_decay": decay, **expert}, part, True) for part in experts),
        ]
        return [Group({**blank, **options}, members, moe) for options, members, moe in rows]

    def _member(self, name: str, ep_rank: int) -> Member:
        first, *rest = self.reader.shape(name)
        shape = (first // self.layout.ep_size if name in self.experts else first, *rest)
        return Member(name, name, ep_rank * math.prod(shape) if name in self.experts else 0, shape)

    def files(self) -> Iterator[Skeleton]:
        world, stage = range(self.layout.world_size), self.layout.zero_stage
        if stage == 3:
            # The weights are in the optimizer files alone; a rank's model file has buffers and counters.
            yield from map(self._model_file, world)
            yield from map(self._stage3_file, world)
            return
        yield self._model_file(0)
        for prefix in self._layers():
            for expert in range(self._num_experts()):
                yield self._expert_file(prefix, expert)
        if stage:
            yield from map(self.flat_file, world)
        elif self.experts:
            yield from map(self.whole_file, range(self.layout.ep_size))

    def _num_experts(self) -> int:
        return int(self.reader.config["moe"]["num_experts"])

    def _layers(self) -> list[str]:
        return list(dict.fromkeys(name.rsplit(".", 1)[0] for name in self.experts))

    # ------------------------------------------------------------------ weights

    def _model_file(self, rank: int) -> Skeleton:
        stage = self.layout.zero_stage
        file = Skeleton(f"{f'zero_pp_rank_{rank}_' if stage == 3 else ''}mp_rank_00_model_states.pt")
        module: OrderedDict[str, Tensor] = OrderedDict()
        for name in self.reader.names():
            if name not in self.experts:
                member = self._member(name, 0)
                # What ZeRO-3 leaves of a parameter in its module.
                shape, runs = ((0,), []) if stage == 3 else (member.shape, [whole(member)])
                module[name] = self.tensor(file, ("module", name), shape, runs)
        for name, buffer in self.buffers.items():
            module[name] = file.small(("module", name), buffer)
        file.tree = {"module": module, "buffer_names": list(self.buffers), "optimizer": None, **self._facts()}
        # Of a model with experts, the files of the expert-parallel ranks have it.
        if not stage and not self.experts:
            file.tree["optimizer"] = self.whole_optimizer(file, 0)
        if stage:
            # DeepSpeed records frozen parameters at stages 2 and 3 only.
            frozen: OrderedDict[str, Any] | None = OrderedDict() if stage > 1 else None
            file.tree.update(param_shapes=self.param_shapes(), frozen_param_shapes=frozen)
            # A tied weight is one parameter, under the name that named_parameters meets first.
            tied = {} if "head.weight" in self.reader.names() else {"head.weight": "embed.weight"}
            file.tree.update(shared_params=tied, frozen_param_fragments=OrderedDict() if stage > 1 else None)
        layers = self._layer_records(rank)
        if layers:
            file.tree["num_experts"] = [self._num_experts()] * len(layers)
            file.tree["ds_autoep_layers"] = layers
            file.tree["universal_checkpoint_info"] = {
                "universal_checkpoint_version": 0.4,
                "ds_autoep_layers": layers,
                "expert_parameter_patterns": [r".*\.experts\.w[123]$"],
            }
        return file

    def _facts(self) -> dict[str, Any]:
        import deepspeed

        state = dict(self.reader.client_state)
        # TagReader compares this step with the manifest's.
        state["vqmoe_ds"] = {**state.get("vqmoe_ds", {}), "step": self.reader.step, "layout": self.layout.as_dict()}
        config: dict[str, Any] = {"zero_optimization": {"stage": self.layout.zero_stage}}
        if self.half:
            config["bf16"] = {"enabled": True}
        return {
            "param_shapes": None,
            "frozen_param_shapes": None,
            "shared_params": None,
            "frozen_param_fragments": None,
            **self.engine_state(),
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "ds_config": config,
            "ds_version": deepspeed.__version__,
            **{key: value for key, value in state.items() if key not in DEEPSPEED_KEYS},
        }

    def _layer_records(self, rank: int) -> list[dict[str, Any]]:
        from deepspeed.checkpoint.autoep_affine import (
            autoep_placement_to_affine_map,
            legacy_uniform_autoep_placement_descriptor,
        )

        ep, stage, experts = self.layout.ep_size, self.layout.zero_stage, self._num_experts()
        # The ds_config that is written has no use_data_before_expert_parallelism: neighbours share the experts.
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

    def _expert_file(self, prefix: str, expert: int) -> Skeleton:
        file = Skeleton(f"layer_{self._layers().index(prefix)}_expert_{expert}_mp_rank_00_model_states.pt", {})
        for name in self.experts:
            if name.startswith(prefix + "."):
                shape, key = self.reader.shape(name)[1:], f"{name}.{expert}"
                member = Member(key, name, expert * math.prod(shape), shape)
                file.tree[key] = self.tensor(file, (key,), shape, [whole(member)])
        return file

    # ------------------------------------------------------------------ optimizer of stage 3

    def _stage3_file(self, rank: int) -> Skeleton:
        import deepspeed
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum

        file, (ep_rank, replica) = self.optimizer_file(rank), self.ep_place(rank)
        groups = self.filled_groups(ep_rank)
        rows, records, masters = [], [], []
        for g, group in enumerate(groups):
            place = replica if group.moe else rank
            length, runs = self._parts(group, place)
            rows.append((length, runs))
            records.append(self._partition_record(g, group, rank, place))
            at = ("optimizer_state_dict", "fp32_flat_groups", g)
            masters.append(self.tensor(file, at, (length,), runs, "fp32"))
        state = {
            "zero_stage": ZeroStageEnum.weights,
            "loss_scaler": LossScaler(scale=1.0),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": self.layout.world_size,
            # DeepSpeed refuses to load where any entry of these differs from its own.
            **({"ds_zero_partition_groups": records} if self.experts else {}),
            "optimizer_state_dict": self.flat_adam(file, "optimizer_state_dict", groups, rows),
            "fp32_flat_groups": masters,
        }
        file.tree = {"optimizer_state_dict": state, "ds_config": {}, "ds_version": deepspeed.__version__}
        return file

    def _parts(self, group: Group, place: int) -> tuple[int, list[Run]]:
        """Length of a rank's row of a group and what stands in it: an equal part of every parameter, the last padded.

        Raises:
            CheckpointError: more values than DeepSpeed puts into one sub-group.
        """
        runs, begin = [], 0
        for member in group.members:
            part = -(-member.numel // self.ranks_of(group))
            count = max(0, min(part, member.numel - place * part))
            if count:
                runs.append(Run(member, place * part, count, begin))
            begin += part
        if begin > LARGEST_SUB_GROUP:
            raise CheckpointError(
                f"a rank's share of {begin:,} values is more than DeepSpeed puts into one ZeRO-3 sub-group; raise "
                "--world, or resume from the checkpoint as it is"
            )
        return begin, runs

    def _partition_record(self, number: int, group: Group, rank: int, place: int) -> dict[str, Any]:
        ranks, name = list(range(self.layout.world_size)), f"ep_size_{self.layout.ep_size}"
        return {
            "sub_group": number,
            "partition_count": self.ranks_of(group),
            "partition_rank": place,
            "partition_ranks": ranks[rank % self.layout.ep_size :: self.layout.ep_size] if group.moe else ranks,
            "families": ["autoep_expert" if group.moe else "replicated"],
            "group_names": [name if group.moe else "replicated"],
        }
