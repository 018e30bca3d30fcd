"""Checkpoints of engines with native ``deepspeed.moe.layer.MoE`` layers, of anyone's models, as whole tensors.

DeepSpeed itself cannot move them: with an optimizer they load on the layout that wrote them and no other.
Here every parameter has one name with the *global* number of its expert, its float32 master weights and Adam's moments,
whatever ZeRO stage (0 to 2), expert-parallel size and world size wrote it. What lies where (DeepSpeed 0.19):

* ``mp_rank_00_model_states.pt``: all but experts, in the number type of training; buffers; counters.
* ``layer_L_expert_E_mp_rank_00_model_states.pt``: an expert, by its global number.
* stages 1 and 2: ``[bf16_]zero_pp_rank_R_…``, one a rank: a flat stretch of each group, experts by *local* numbers.
* stage 0: ``expp_rank_R_…``, one an expert-parallel rank: the whole optimizer, without names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.formats.deepspeed.reader import (
    COUNTERS,
    DEEPSPEED_KEYS,
    adam_of,
    adam_step,
    check_shard,
    ep_place,
)
from vqmoe_ds.checkpoint.formats.native_moe.files import MODEL, NativeFiles
from vqmoe_ds.checkpoint.formats.native_moe.names import (
    expand,
    expert_name,
    match_names,
    merge_split,
    numbered,
    pattern_of,
)
from vqmoe_ds.checkpoint.io.archive import load_archive
from vqmoe_ds.checkpoint.reader import CheckpointReader, Piece, check_covered, register_format, sound
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import read_small

SAMPLED = 64
"""Values of each weight that are compared with its master weights, to find files of another tag."""


def native_folder(path: Path) -> Path | None:
    """The tag folder of a native checkpoint at ``path``: that folder, or the one that its ``latest`` names."""
    if (path / "latest").is_file() and not any(path.glob("*_states.pt")):
        path = path / Path(read_small(path / "latest", 4096).decode(errors="replace").strip()).name
    experts = next(iter(sorted(path.glob("layer_*_expert_*_model_states.pt"))), None)
    if experts is None or not (path / MODEL).exists():
        return None
    # Tags of AutoEP layers have files of these names, too, with other keys.
    return path if any(map(expert_name, load_archive(experts))) else None


def open_native(path: str | Path) -> NativeReader:
    """Open a native checkpoint: a tag folder, or the folder above it with DeepSpeed's ``latest``.

    Raises:
        CheckpointError: none there, incomplete, damaged, or laid out in a way that is not known.
    """
    folder = native_folder(Path(path))
    if folder is None:
        raise CheckpointError(f"{path} holds no checkpoint of a model with deepspeed.moe.layer.MoE layers")
    with sound(folder):
        return NativeReader(folder)


class NativeReader(CheckpointReader):
    """A native tag. ``config["native"]`` tells what a writer needs to know of the model (``_describe``)."""

    kind = "native"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = files = NativeFiles(path)
        self._raw_groups: list[dict[str, Any]] = []
        self._places: dict[str, dict[str, list[Piece]]] = {}
        self.dropped: list[str] = []
        self.layout = {"world_size": files.world, "zero_stage": files.stage, "precision": files.precision}
        # Each step reads what the one before has set: _ep and _tied, then _moved.
        groups = self._local_groups() if self._files.optimizers else [self._weights_alone()]
        self._groups = self._patterns(groups)
        self._shapes = self._find_shapes()
        self.step = int(self._files.model.get("global_steps") or 0)
        self.counters = self._kept({key: files.model.get(key) for key in COUNTERS})
        self.client_state = self._kept({key: files.model[key] for key in files.model if key not in DEEPSPEED_KEYS})
        self.config = {"native": self._describe()}
        self._check_same_tag()

    # ------------------------------------------------------------------ what there is

    @property
    def has_optimizer(self) -> bool:
        return bool(self._files.optimizers) and bool(self._files.adam(0)[0])

    def optimizer_step(self) -> int:
        return adam_step(adam_of(self._files.optimizer(0), self.path)) if self.has_optimizer else 0

    def buffers(self) -> dict[str, Tensor]:
        """Buffers, and parameters that no optimizer moves (frozen), by global names."""
        still = self._still()
        return {name: stored.whole() for name, stored in self._files.weights.items() if name in still}

    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        if kind not in self._places:
            self._places[kind] = self._find_pieces(kind)
        return self._places[kind][name]

    def _describe(self) -> dict[str, Any]:
        """``experts`` (layer prefix -> number), ``groups`` (options, moe, patterns), names of all other tensors."""
        still, tied = self._still(), self._tied
        dense = [name for name in self._files.model["module"] if expert_name(name) is None]
        return {
            **{"experts": self._files.experts, "groups": self._groups, "tied": tied},
            **{"dense": dense, "buffers": [name for name in self._files.model["buffer_names"] if name in still]},
            **{"patterns": self._files.patterns, "clip_grad": self._files.clip_grad()},
            "ds_config": self._kept(self._files.model.get("ds_config") or {}),
        }

    def _kept(self, values: dict[str, Any]) -> dict[str, Any]:
        """Those of some values that JSON can hold; the names of the others come to ``dropped``."""
        kept = {}
        for key, value in values.items():
            with suppress(TypeError, ValueError):
                kept[key] = json.loads(json.dumps(value))
        self.dropped = sorted({*self.dropped, *(values.keys() - kept.keys())})
        return kept

    # ------------------------------------------------------------------ optimizer groups

    def _weights_alone(self) -> dict[str, Any]:
        """Without optimizer files: one group of everything that is no buffer."""
        still = set(self._files.model["buffer_names"])
        self._ep, self._tied = 1, self._recorded_ties()
        others = still | self._tied.keys()
        buffers = self._files.buffer_patterns
        names = [n for n in self._files.weights if n not in others and pattern_of(n) not in buffers]
        self.layout["ep_size"] = 1
        self._moved = set(names)
        # No options: by that native_layout knows a checkpoint of weights alone.
        return {"options": {}, "moe": False, "names": names}

    def _local_groups(self) -> list[dict[str, Any]]:
        """Options, kind and names (local to a rank) of every optimizer group, as the first rank has them."""
        _, groups = self._files.adam(0)
        self._ep = self._expert_parallel_size(groups)
        self.layout["ep_size"] = self._ep
        self._tied = self._recorded_ties()
        # One entry for each group of the optimizer, in its order; of rank 0, but local numbers are alike on all.
        recorded = self._files.model.get("param_shapes")
        names = [list(group) for group in recorded] if recorded else self._names_by_shape(groups)
        rows: list[dict[str, Any]] = []
        for group, members in zip(groups, names, strict=True):
            options = self._kept({key: group[key] for key in group if key not in ("params", "name", "moe")})
            # An expert group is called by its layout (ep_size_2): the writer names it anew.
            name = {} if group.get("moe") else {"name": group.get("name", "dense-params")}
            rows.append({"options": {**options, **name}, "moe": bool(group.get("moe")), "names": members})
        self._raw_groups = rows  # as the files number them
        return rows

    def _expert_parallel_size(self, groups: list[dict[str, Any]]) -> int:
        sizes = {int(m[1]) for g in groups if (m := re.fullmatch(r"ep_size_(\d+)", str(g.get("name")))) is not None}
        if len(sizes) > 1:
            raise CheckpointError(f"{self.path} has layers of expert-parallel sizes {sorted(sizes)}; one is supported")
        size = sizes.pop() if sizes else len(self._files.optimizers)
        for prefix, count in self._files.experts.items():
            if count % size or self.layout["world_size"] % size:
                raise CheckpointError(
                    f"{self.path} contradicts itself: {count} experts of {prefix} and {self.layout['world_size']} "
                    f"ranks cannot be shared by {size} expert-parallel ranks"
                )
        there = len(self._files.optimizers)
        if not self._files.flat and there != size:
            raise CheckpointError(f"{self.path}: {there} expp_rank files are there, {size} were written; copy it again")
        return size

    def _recorded_ties(self) -> dict[str, str]:
        """Names that share another parameter's values: name -> that one."""
        shared = self._files.model.get("shared_params") or {}
        return {str(name): str(other) for name, other in shared.items() if name in self._files.model["module"]}

    def _names_by_shape(self, groups: list[dict[str, Any]]) -> list[list[str]]:
        """ZeRO stage 0 records no names: deal the model's out in order."""
        state, _ = self._files.adam(0)
        masters = self._files.masters()
        wanted: list[list[tuple[int, ...]]] = []
        for g, group in enumerate(groups):
            tensors = masters[g] if masters else [state[number]["exp_avg"] for number in group["params"]]
            wanted.append([tensor.shape for tensor in tensors])
        still = set(self._files.model["buffer_names"])
        local = {prefix: count // self._ep for prefix, count in self._files.experts.items()}
        experts = [p for p in self._files.patterns if p not in self._files.buffer_patterns]
        dense = [n for n in self._files.model["module"] if n not in still and n not in self._tied]
        shapes = {name: self._files.weights[name].shape for name in dense}
        number = sum(len(w) for w, group in zip(wanted, groups, strict=True) if not group.get("moe"))
        # A state dict has both names of a tied weight, the optimizer one parameter.
        if len(dense) > number:
            dense = self._without_ties(dense)
        members = [name for name, _ in expand(experts, local)]
        shapes.update({name: self._files.weights[numbered(name, 0)].shape for name in members})
        where = f"{self.path}/expp_rank_0_mp_rank_00_optim_states.pt"
        dealt: list[list[str]] = [[] for _ in groups]
        for moe, names in ((False, dense), (True, members)):
            numbers = [g for g, group in enumerate(groups) if bool(group.get("moe")) is moe]
            for g, some in zip(numbers, match_names(names, shapes, [wanted[g] for g in numbers], where), strict=True):
                dealt[g] = some
        return dealt

    def _without_ties(self, names: list[str]) -> list[str]:
        """Names without those whose values equal an earlier one's: tied weights, which stage 0 does not record."""
        weights, kept = self._files.weights, list[str]()
        for name in names:
            mine = weights[name]
            # Vectors may be equal without being tied: biases still at 0, norms at 1.
            like = [n for n in kept if weights[n].shape == mine.shape and len(mine.shape) > 1]
            twin = next((n for n in like if torch.equal(weights[n].whole(), mine.whole())), None)
            if twin is None:
                kept.append(name)
            else:
                self._tied[name] = twin
        return kept

    def _patterns(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups without DeepSpeed's cuts, experts as patterns; sees that nothing else is hidden in their order."""
        counts = {n: self._files.weights[numbered(n, 0)].numel for g in groups for n in g["names"]}
        if not self._files.optimizers:
            patterns = list(dict.fromkeys(map(pattern_of, groups[0]["names"])))
            return [{**groups[0], "names": patterns}]
        local = {prefix: count // self._ep for prefix, count in self._files.experts.items()}
        merged = merge_split(groups, counts)
        for group in merged:
            names = group["names"]
            if group["moe"]:
                group["names"] = [pattern_of(n) for n in names if (parts := expert_name(n)) and parts.number == "0"]
                if [name for name, _ in expand(group["names"], local)] != names:
                    raise CheckpointError(f"{self.path} has its experts' parameters in an order that is not supported")
        ranks = range(self._ep)
        self._moved = {name for group in merged for r in ranks for _, name in expand(group["names"], local, r)}
        return merged

    def _still(self) -> set[str]:
        return self._files.weights.keys() - self._moved - self._tied.keys()

    def _find_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self._files.weights.items() if name in self._moved}

    # ------------------------------------------------------------------ places

    def _find_pieces(self, kind: str) -> dict[str, list[Piece]]:
        found: dict[str, list[Piece]] = {name: [] for name in self.names()}
        if kind != "fp32" and not self.has_optimizer:
            raise CheckpointError(f"{self.path} holds no {kind}: its optimizer files are not there")
        if not self._files.optimizers or (kind == "fp32" and not self._files.flat and self._files.masters() is None):
            return {name: [Piece(0, math.prod(self.shape(name)), self._files.weights[name], 0)] for name in found}
        for name, piece in self._flat_pieces(kind) if self._files.flat else self._stage0_pieces(kind):
            found[name].append(piece)
        for name, pieces in found.items():
            check_covered(self.path, f"{kind} of {name}", pieces, math.prod(self.shape(name)))
        return found

    def _flat_pieces(self, kind: str) -> Iterator[tuple[str, Piece]]:
        reached: dict[str, int] = {}
        for rank in range(len(self._files.optimizers)):  # ranks hold consecutive stretches
            optimizer, (state, _) = self._files.optimizer(rank), self._files.adam(rank)
            for g, mapping in enumerate(optimizer["param_slice_mappings"]):
                stored = optimizer["single_partition_of_fp32_groups"][g] if kind == "fp32" else state[g][kind]
                for local_name, address in mapping.items():
                    name = self._global_name(local_name, rank)
                    start = reached.get(name, 0)
                    reached[name] = start + address.numel
                    yield name, Piece(start, address.numel, stored, address.start)

    def _stage0_pieces(self, kind: str) -> Iterator[tuple[str, Piece]]:
        for rank in range(len(self._files.optimizers)):
            masters = self._files.masters(rank)
            state, groups = self._files.adam(rank)
            for g, group in enumerate(self._raw_groups):
                # The file of every expert-parallel rank has all that is dense.
                if rank and not group["moe"]:
                    continue
                for i, local_name in enumerate(group["names"]):
                    stored = masters[g][i] if kind == "fp32" and masters else state[groups[g]["params"][i]][kind]
                    yield self._global_name(local_name, rank), Piece(0, stored.numel, stored, 0)

    def _global_name(self, name: str, rank: int) -> str:
        parts = expert_name(name)
        if parts is None:
            return name
        # Files of stage 0 are numbered by expert-parallel rank, those of ZeRO by rank of the world.
        files, place = self._files, rank
        if files.flat:
            place, _ = ep_place(rank, files.world, self._ep, files.data_first)
        return numbered(name, place * (files.experts[parts.prefix] // self._ep) + int(parts.number))

    def _check_same_tag(self) -> None:
        """Weights are their master weights, rounded: a few values of each show a file of another tag."""
        files = self._files
        for rank in range(len(files.optimizers)):
            check_shard(self.path, rank, files.optimizer(rank), files.optimizer(0), files.stage, files.world)
        if not self._files.optimizers or (not self._files.flat and self._files.masters() is None):
            # Stage 0 in float32 keeps no master weights: there is nothing to compare with.
            return
        for name in self.names():
            weight = self._files.weights[name]
            count = min(SAMPLED, weight.numel)
            if not torch.equal(self.read(name, "fp32", 0, count).to(weight.dtype), weight.read(0, count)):
                raise CheckpointError(
                    f"{self.path} mixes tags: the weights of {name} are not those of its optimizer; copy it again"
                )


register_format("native", lambda path: native_folder(path) is not None, open_native)
