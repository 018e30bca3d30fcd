"""DeepSpeed's own checkpoint files, of any ZeRO stage, expert-parallel size and world size, as whole tensors.

What lies where (DeepSpeed 0.19.8, experts as AutoEP layers):

* stage 0: weights in ``mp_rank_00_model_states.pt`` and one file an expert, optimizer in one file an expert-parallel
  rank (numbered in the order of its groups: matrices, vectors, experts), in half precision with the master weights.
* stages 1 and 2: one file a rank with a flat stretch of each group; ``param_slice_mappings`` names its fragments.
* stage 3: one file a rank with a flat row of each group, every parameter cut into equal parts, the last one padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vqmoe_ds.checkpoint.formats.portable import STATE
from vqmoe_ds.checkpoint.io.archive import Record, Stored, load_archive
from vqmoe_ds.checkpoint.reader import CheckpointReader, Piece, check_covered, register_format
from vqmoe_ds.models.parameter_groups import decays
from vqmoe_ds.runtime.errors import CheckpointError

COUNTERS = ("global_steps", "global_samples", "skipped_steps", "lr_scheduler")
# What DeepSpeedEngine itself puts into a model file (_common_checkpoint_state, _save_moe_checkpoint): all else there is
# client state.
DEEPSPEED_KEYS = {
    *COUNTERS,
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"),
    *("frozen_param_fragments", "data_sampler", "random_ltd", "dp_world_size", "mp_world_size", "ds_config"),
    *("checkpoint_parallel_dimensions", "ds_version", "num_experts", "ds_autoep_layers", "universal_checkpoint_info"),
}


class _Fragment(NamedTuple):
    """``length`` values at ``begin`` of one rank's flat group: those of ``name`` from ``start`` on (whole tensor)."""

    name: str
    rank: int
    group: int
    begin: int
    start: int
    length: int


class TagReader(CheckpointReader):
    """A sealed tag folder. Args: the folder and its manifest."""

    kind = "deepspeed"

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.step = path, int(manifest["step"])
        self.config, self.layout = manifest["config"], manifest["layout"]
        self._world, self._ep = int(self.layout["world_size"]), int(self.layout["ep_size"])
        self._stage = int(self.layout["zero_stage"])
        self._archives: dict[str, Any] = {}
        self._pieces: dict[str, dict[str, list[Piece]]] = {}
        first = "zero_pp_rank_0_mp_rank_00_model_states.pt" if self._stage == 3 else "mp_rank_00_model_states.pt"
        self._model = self._load(first)
        self.client_state = {key: value for key, value in self._model.items() if key not in DEEPSPEED_KEYS}
        self.counters = {key: self._model.get(key) for key in COUNTERS}
        self.frozen = frozenset(self.client_state.get("vqmoe_ds", {}).get("frozen", ()))
        self._experts = _expert_shapes(self._model.get("ds_autoep_layers") or [])
        self._check_same_run()
        self._shapes = self._find_shapes()
        self._check_shards(range(1))
        self.counters["adam"] = self._adam_options()

    # ------------------------------------------------------------------ what there is

    @property
    def has_optimizer(self) -> bool:
        states = self._adam(0)["state"].values()
        return bool(states) and all("exp_avg_sq" in state for state in states)  # else it is no Adam's

    def optimizer_step(self) -> int:
        return adam_step(self._adam(0))

    def _adam_options(self) -> dict[str, Any]:
        """Options of the optimizer itself; what the run configuration sets is not among them."""
        group = self._adam(0)["param_groups"][0]
        ours = ("params", "name", "moe", "lr", "weight_decay", "step")
        return {k: v for k, v in group.items() if k not in ours and not isinstance(v, (dict, Stored))}

    def buffers(self) -> dict[str, Tensor]:
        return {name: self._model["module"][name].whole() for name in self._model["buffer_names"]}

    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        if kind not in self._pieces:
            self._pieces[kind] = self._flat_pieces(kind) if self._flat else self._stage0_pieces(kind)
            for each in self.names_of(kind):
                pieces = self._pieces[kind].get(each, [])
                check_covered(self.path, f"{kind} of {each}", pieces, math.prod(self.shape(each)))
        if kind != "fp32" and name in self.frozen:
            raise CheckpointError(f"{self.path} holds no {kind} of {name}, which was frozen")
        return self._pieces[kind][name]

    def _find_shapes(self) -> dict[str, tuple[int, ...]]:
        module, buffers = self._model["module"], set(self._model["buffer_names"])
        groups = [*(self._model.get("param_shapes") or []), self._model.get("frozen_param_shapes") or {}]
        recorded = {n: tuple(s) for group in groups for n, s in group.items()}
        # At stage 3 the module's tensors are empty, and param_shapes has their shapes.
        dense = {name: recorded.get(name, stored.shape) for name, stored in module.items() if name not in buffers}
        dense = {name: shape for name, shape in dense.items() if name not in self._experts}
        # The optimizer numbers parameters in this order, and DeepSpeed takes experts out of the module's state.
        return _in_model_order(dense, self._experts)

    def _check_same_run(self) -> None:
        """One tag's files agree on the step and the experts."""
        saved = self.client_state.get("vqmoe_ds", {}).get("step", self.step)
        if saved != self.step:
            raise CheckpointError(
                f"{self.path} mixes tags: its manifest is of step {self.step}, its weights of step {saved}"
            )
        experts = self.config.get("moe", {}).get("num_experts")
        for name, shape in self._experts.items():
            if shape[0] != experts:
                raise CheckpointError(
                    f"{self.path} contradicts itself: {name} has {shape[0]} experts, its configuration says {experts}"
                )

    # ------------------------------------------------------------------ files

    def _load(self, name: str) -> Any:
        if name not in self._archives:
            self._archives[name] = load_archive(self.path / name)
        return self._archives[name]

    @property
    def _flat(self) -> bool:
        # At stage 0 with float32 accumulation bfloat16 has BF16_Optimizer, which saves like stage 1.
        return self._stage > 0 or (self.path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").exists()

    def _optimizer(self, rank: int) -> dict[str, Any]:
        """Optimizer state written by a data-parallel rank, or at stage 0 by an expert-parallel one."""
        if self._flat:
            prefix = "" if (self.path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").exists() else "bf16_"
            name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            state: dict[str, Any] = self._load(name)["optimizer_state_dict"]
            return state
        if not self._experts:
            plain: dict[str, Any] = self._model["optimizer"]
            return plain
        alone: dict[str, Any] = self._load(f"expp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer"]
        return alone

    def _adam(self, rank: int) -> dict[str, Any]:
        return adam_of(self._optimizer(rank), self.path)

    def _check_shards(self, ranks: range) -> None:
        for rank in ranks:
            check_shard(self.path, rank, self._optimizer(rank), self._optimizer(0), self._stage, self._world)

    # ------------------------------------------------------------------ stage 0

    def _stage0_pieces(self, kind: str) -> dict[str, list[Piece]]:
        plain = self.layout["precision"] == "fp32"
        found: dict[str, list[Piece]] = {name: [] for name in self.names()}
        if kind == "fp32":
            # In float32 the weights are their own masters; frozen ones have no other in any precision.
            for name in self.names() if plain else self.frozen:
                found[name] = self._weights(name)
        if kind == "fp32" and plain:
            return found
        ranks = range(self._ep if self._experts else 1)
        self._check_shards(ranks)
        for rank in ranks:
            places = self._by_number(self._optimizer(rank), self._adam(rank), kind)
            for name, place in zip(self._optimizer_order(), places, strict=True):
                stored, begin, count = place
                # The dense states are the same in every rank's file.
                if name in self._experts or rank == 0:
                    found[name].append(Piece(rank * count if name in self._experts else 0, count, stored, begin))
        return found

    def _weights(self, name: str) -> list[Piece]:
        """The weights that the model ran on, which at stage 3 only frozen parameters have beside their masters."""
        if name in self._experts:
            return self._expert_files(name)
        if self._stage < 3:
            return [_all_of(self._model["module"][name])]
        # Dense ones alone: DeepSpeed refuses to save frozen experts at stage 3.
        pieces, total = [], math.prod(self.shape(name))
        part = -(-total // self._world)
        for rank in range(self._world):
            file = self._load(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            mine = max(0, min(part, total - rank * part))
            if mine:
                pieces.append(Piece(rank * part, mine, file["frozen_param_fragments"][name], 0))
        return pieces

    def _expert_files(self, name: str) -> list[Piece]:
        prefix, total = name.rsplit(".", 1)[0], math.prod(self._experts[name])
        # DeepSpeed numbers the files by layer in the order of this list.
        layer = [entry["expert_key_prefix"] for entry in self._model["ds_autoep_layers"]].index(prefix)
        count = self._experts[name][0]
        each = total // count
        pieces = []
        for expert in range(count):
            file = self._load(f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt")
            pieces.append(Piece(expert * each, each, file[f"{name}.{expert}"], 0))
        return pieces

    def _optimizer_order(self) -> list[str]:
        """Names as the optimizer numbers them, see ``vqmoe_ds.models.parameter_groups``."""
        learned = self.names_of("exp_avg")
        dense = [name for name in learned if name not in self._experts]
        gates = self.config.get("train", {}).get("decay_gates", True)
        matrices = [name for name in dense if decays(name, len(self.shape(name)), gates)]
        vectors = [name for name in dense if name not in matrices]
        return [*matrices, *vectors, *(name for name in learned if name in self._experts)]

    def _by_number(
        self, optimizer: dict[str, Any], adam: dict[str, Any], kind: str
    ) -> Iterator[tuple[Stored, int, int]]:
        """(file place, first value, number of values) of each parameter in the optimizer's order."""
        counts = [self._local_count(name) for name in self._optimizer_order()]
        if "fp32_groups_flat" in optimizer:  # fused half-precision optimizer: one flat row a group
            tensors = optimizer["fp32_groups_flat"]
            if kind != "fp32":
                tensors = [adam["state"][number][kind] for number in sorted(adam["state"])]
            yield from _cut(tensors, counts)
            return
        if kind == "fp32":
            tensors = [tensor for group in optimizer["fp32_groups"] for tensor in group]
        else:
            tensors = [adam["state"][number][kind] for number in sorted(adam["state"])]
        if [tensor.numel for tensor in tensors] != counts:
            raise CheckpointError(f"{self.path}: the optimizer's parameters are not those of the model")
        yield from ((tensor, 0, tensor.numel) for tensor in tensors)

    def _local_count(self, name: str) -> int:
        return math.prod(self.shape(name)) // (self._ep if name in self._experts else 1)

    # ------------------------------------------------------------------ stages 1 to 3

    def _flat_pieces(self, kind: str) -> dict[str, list[Piece]]:
        found: dict[str, list[Piece]] = {name: [] for name in self.names()}
        self._check_shards(range(self._world))
        fragments = self._stage3_fragments() if self._stage == 3 else self._stage12_fragments()
        for f in fragments:
            if f.name not in found:
                raise CheckpointError(f"{self.path}: {f.name} has an optimizer but no weight")
            if kind == "fp32":
                masters = self._optimizer(f.rank)[
                    "fp32_flat_groups" if self._stage == 3 else "single_partition_of_fp32_groups"
                ]
                stored = masters[f.group]
            else:
                stored = self._adam(f.rank)["state"][f.group][kind]
            found[f.name].append(Piece(f.start, f.length, stored, f.begin))
        for name in self.frozen if kind == "fp32" else ():
            found[name] = self._weights(name)
        return {name: sorted(pieces, key=lambda piece: piece.start) for name, pieces in found.items()}

    def _ep_rank(self, rank: int) -> int:
        data_first = bool(self._model["ds_config"].get("use_data_before_expert_parallelism"))
        return ep_place(rank, self._world, self._ep, data_first)[0]

    def _base(self, name: str, rank: int) -> int:
        """First value of a rank's experts in the whole tensor."""
        return self._ep_rank(rank) * self._local_count(name) if name in self._experts else 0

    def _stage12_fragments(self) -> Iterator[_Fragment]:
        reached: dict[tuple[str, int], int] = {}
        for rank in range(self._world):
            for group, mapping in enumerate(self._optimizer(rank)["param_slice_mappings"]):
                for name, address in mapping.items():
                    base = self._base(name, rank)
                    # An address is a place in the rank's row, and tells nothing of the place in the parameter.
                    done = reached.get((name, base), 0)  # ranks hold consecutive stretches
                    yield _Fragment(name, rank, group, address.start, base + done, address.numel)
                    reached[name, base] = done + address.numel

    def _stage3_fragments(self) -> Iterator[_Fragment]:
        for rank in range(self._world):
            partitions = self._optimizer(rank).get("ds_zero_partition_groups")
            for group, shapes in enumerate(self._model["param_shapes"]):
                count, place = self._world, rank
                if partitions is not None:
                    count, place = partitions[group]["partition_count"], partitions[group]["partition_rank"]
                begin = 0
                for name, shape in shapes.items():
                    total = math.prod(shape)
                    part = -(-total // count)
                    mine = max(0, min(part, total - place * part))
                    if mine:
                        yield _Fragment(name, rank, group, begin, self._base(name, rank) + place * part, mine)
                    # A part has its whole room in the row, however little of it is filled.
                    begin += part


def ep_place(rank: int, world: int, ep_size: int, data_first: bool) -> tuple[int, int]:
    """A rank's place among the ranks that share experts, and among those that hold the same ones.

    Args:
        data_first: the engine's ``use_data_before_expert_parallelism``.
    """
    # As EngineConfig.ep_rank, by which the experts were dealt out.
    replicas = world // ep_size
    return (rank // replicas, rank % replicas) if data_first else (rank % ep_size, rank // ep_size)


def _is_tag(path: Path) -> bool:
    return any(path.glob("*_states.pt")) and not (path / STATE).exists()


register_format("deepspeed", _is_tag, TagReader, sealed=True)


def adam_of(optimizer: dict[str, Any], path: Path) -> dict[str, Any]:
    """Adam's own state in that of ZeRO or of the half-precision optimizer of stage 0, or the whole.

    Raises:
        CheckpointError: it was saved in a form of its own.
    """
    inner: Any = optimizer.get("base_optimizer_state", optimizer.get("optimizer_state_dict", optimizer))
    if isinstance(inner, list):
        raise CheckpointError(
            f"{path} was saved with zero_optimization.elastic_checkpoint, which is not supported; take a checkpoint of "
            "a run without it"
        )
    adam: dict[str, Any] = inner
    return adam


def adam_step(adam: dict[str, Any]) -> int:
    """Adam's count of steps, which its state or its parameter groups have; 0 where there is no state."""
    if not adam["state"]:
        return 0
    step = next(iter(adam["state"].values())).get("step", adam["param_groups"][0].get("step", 0))
    return int(step.whole()) if isinstance(step, Stored) else int(step)


def check_shard(
    path: Path, rank: int, optimizer: dict[str, Any], first: dict[str, Any], stage: int, world: int
) -> None:
    """Refuse a rank's optimizer that is not of this stage, one of this many, and at the same step as the first one.

    Raises:
        CheckpointError: it is not.
    """
    record, count = optimizer.get("zero_stage"), optimizer.get("partition_count") or world
    found = record.args[0] if isinstance(record, Record) else stage
    # The first group, matrices, is shared by all ranks; those of experts have fewer partitions.
    count = count[0] if isinstance(count, list) else count
    if (found, count) != (stage, world):
        raise CheckpointError(
            f"{path} mixes tags: rank {rank}'s optimizer is of ZeRO stage {found} and {count} ranks, the model of "
            f"stage {stage} and {world} ranks; copy it again"
        )
    step, expected = (adam_step(adam_of(each, path)) for each in (optimizer, first))
    if step != expected:
        raise CheckpointError(
            f"{path} mixes tags: the optimizer of rank {rank} is at step {step}, that of rank 0 at {expected}; copy it "
            "again"
        )


def _all_of(stored: Stored) -> Piece:
    return Piece(0, stored.numel, stored, 0)


def _cut(flat: list[Stored], counts: list[int]) -> Iterator[tuple[Stored, int, int]]:
    group, begin = 0, 0
    for count in counts:
        # No parameter is spread over two groups, which are read in the order of the optimizer's.
        if begin + count > flat[group].numel:
            group, begin = group + 1, 0
        yield flat[group], begin, count
        begin += count


def _expert_shapes(layers: list[dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    """Whole shape ``[N, …]`` of every stacked expert weight, from DeepSpeed's record of its expert layers."""
    shapes = {}
    for entry in layers:
        for name, record in entry["affine_maps"]["params"].items():
            shapes[name] = tuple(int(n) for n in record["logical_shape"])
    return shapes


def _in_model_order(
    dense: dict[str, tuple[int, ...]], experts: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Experts stand first in their layer, as in ``named_parameters``, after what comes before it in the block."""
    names = list(dense)
    for name in experts:
        layer = name.rsplit(".experts.", 1)[0] + "."
        block = layer.rsplit(".", 2)[0] + "."
        later = [i for i, other in enumerate(names) if other.startswith(layer) and ".experts." not in other]
        same = [i for i, other in enumerate(names) if other.startswith(block)]
        names.insert(later[0] if later else same[-1] + 1, name)
    return {name: experts.get(name, dense.get(name, ())) for name in names}
