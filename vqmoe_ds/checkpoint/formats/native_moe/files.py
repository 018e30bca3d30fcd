"""The files of a native ``deepspeed.moe.layer.MoE`` checkpoint: found, counted, opened, checked against each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from vqmoe_ds.checkpoint.formats.deepspeed.reader import adam_of
from vqmoe_ds.checkpoint.formats.native_moe.names import expert_name, numbered, pattern_of, prefix_of
from vqmoe_ds.checkpoint.io.archive import Stored, load_archive
from vqmoe_ds.checkpoint.reader import MOMENTS
from vqmoe_ds.runtime.errors import CheckpointError

MODEL = "mp_rank_00_model_states.pt"
EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class NativeFiles:
    """The opened files of one tag; tensors stay where they are.

    Attributes:
        path: folder of the tag.
        model: the model file.
        weights: every tensor of the weight files, experts by global number.
        experts: number of experts by layer prefix, in the order of the layers.
        patterns: of every tensor in the expert files.
        optimizers: the optimizer files by rank (by expert-parallel rank at stage 0); empty where there are none.
        flat: whether they hold flat stretches (stages 1 and 2).
        world, stage, precision, data_first: of the run that wrote them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = load_archive(path / MODEL)
        self.weights, self.experts = self._find_weights()
        self._find_layout()

    @property
    def buffer_patterns(self) -> set[str]:
        return set(map(pattern_of, self.model["buffer_names"]))

    def _find_weights(self) -> tuple[dict[str, Stored], dict[str, int]]:
        """Every tensor of the weight files by its global name, and the number of experts by layer prefix."""
        found: dict[str, Stored] = dict(self.model["module"])
        counts = self.model["num_experts"]
        if not isinstance(counts, list):
            raise CheckpointError(f"{self.path} is of a DeepSpeed before 0.6, which kept experts in other files")
        experts: dict[str, int] = {}
        self.patterns: list[str] = []
        self._check_files(counts)
        # In the order of DeepSpeed's layer numbers, which the writer gives by the order of self.experts.
        for layer, count in enumerate(counts):
            for expert in range(count):
                file = load_archive(self.path / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt")
                self._check_expert(layer, expert, file)
                found.update(file)
                if expert == 0:
                    self.patterns += [pattern_of(name) for name in file]
                    experts[prefix_of(next(iter(file)))] = count
        return found, experts

    def _check_files(self, counts: list[int]) -> None:
        """The expert files are those that the model file counts, none missing and none too many."""
        there = {
            (int(m[1]), int(m[2]))
            for path in self.path.iterdir()
            if (m := EXPERT_FILE.fullmatch(path.name)) is not None
        }
        if any(path.name.count("mp_rank_01") for path in self.path.iterdir()):
            raise CheckpointError(f"{self.path} is split by tensor parallelism, which is not supported")
        if not all(type(count) is int and count >= 0 for count in counts):
            raise CheckpointError(f"{self.path / MODEL} has numbers of experts that are none; copy it again")
        # No further than the files go, whatever number of experts is claimed.
        wanted = {(n, expert) for n, count in enumerate(counts) for expert in range(min(count, len(there) + 1))}
        for layer, expert in sorted(wanted - there):
            name = f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
            raise CheckpointError(f"{self.path}: {name} is missing; copy it again, or take an earlier checkpoint")
        for layer, expert in sorted(there - wanted):
            number = counts[layer] if layer < len(counts) else 0
            raise CheckpointError(
                f"{self.path} mixes tags: it has a file of expert {expert} of layer {layer}, but its model has "
                f"{number} experts there"
            )

    def _check_expert(self, layer: int, expert: int, file: Any) -> None:
        """An expert file holds this expert with the parameters of all others."""
        names = [expert_name(name) for name in file]
        mine = all(parts is not None and parts.number == str(expert) for parts in names)
        known = expert == 0 or {pattern_of(name) for name in file} <= set(self.patterns)
        if not mine or not known or not names:
            raise CheckpointError(
                f"{self.path}: layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt does not hold expert {expert}; "
                "copy it again"
            )

    def _find_layout(self) -> None:
        """Find the optimizer files, and the number of ranks and the stage that wrote them."""
        world = int(self.model["dp_world_size"])
        config = self.model.get("ds_config") or {}
        stage = int((config.get("zero_optimization") or {}).get("stage") or 0)
        names = [path.name for path in self.path.glob("*optim_states.pt")]
        self.flat = any("zero_pp_rank" in name for name in names)
        # DeepSpeed puts it before the names of ZeRO's files in a bfloat16 run.
        half = "bf16_" if any(name.startswith("bf16_") for name in names) else ""
        if self.flat and world < 1:
            raise CheckpointError(f"{self.path} has the optimizer files of {len(names)} ranks, not of {world}")
        count = min(world, len(names) + 1) if self.flat else len(names)  # one that is missing is enough to name
        stem = f"{half}zero_pp" if self.flat else "expp"
        files = [self.path / f"{stem}_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(count)]
        self.optimizers: list[Any] = [load_archive(file) for file in files] if names else []
        if len(names) > count:
            raise CheckpointError(f"{self.path} mixes tags: it has {len(names)} optimizer files for {count} ranks")
        self.data_first = bool(config.get("use_data_before_expert_parallelism"))
        # Of a parameter: DeepSpeed casts those, and leaves buffers in their type.
        still = self.buffer_patterns
        expert = self.weights[numbered(next(p for p in self.patterns if p not in still), 0)]
        self.world, self.stage, self.precision = world, stage, PRECISIONS.get(expert.dtype, str(expert.dtype))

    # ------------------------------------------------------------------ optimizer

    def optimizer(self, rank: int) -> dict[str, Any]:
        key = "optimizer_state_dict" if self.flat else "optimizer"
        state: dict[str, Any] = self.optimizers[rank][key]
        return state

    def adam(self, rank: int) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
        """Adam's state by number and its parameter groups."""
        inner = adam_of(self.optimizer(rank), self.path)
        state = inner["state"]
        for entry in state.values():
            if not all(kind in entry for kind in MOMENTS):
                raise CheckpointError(
                    f"{self.path} has an optimizer that is not of the Adam family, which cannot be moved"
                )
        return state, inner["param_groups"]

    def clip_grad(self) -> float:
        return float(self.optimizer(0).get("clip_grad") or 0.0) if self.optimizers else 0.0

    def masters(self, rank: int = 0) -> list[list[Stored]] | None:
        """Stage 0 in half precision keeps float32 copies of every parameter, by group."""
        masters: list[list[Stored]] | None = self.optimizer(rank).get("fp32_groups")
        return masters
