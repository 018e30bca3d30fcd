"""Writing checkpoints of native ``deepspeed.moe.layer.MoE`` models for a layout of choice, without starting a rank.

The files are DeepSpeed 0.19.8's own and ``engine.load_checkpoint`` takes them, with optimizer, for the expert-parallel
size, world size, ZeRO stage and number type they were written for.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vqmoe_ds.checkpoint.formats.deepspeed.zero import Group, Member, TagLayout, ZeroWriter, cut_experts, whole
from vqmoe_ds.checkpoint.formats.native_moe.files import MODEL
from vqmoe_ds.checkpoint.formats.native_moe.names import expand, expert_name, numbered
from vqmoe_ds.checkpoint.formats.portable import Tell
from vqmoe_ds.checkpoint.io.skeleton import Skeleton
from vqmoe_ds.checkpoint.io.store import tag_name
from vqmoe_ds.checkpoint.reader import CheckpointReader
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import write_atomically


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
    native = reader.config["native"]
    layout = TagLayout.chosen(
        reader.layout, zero_stage=zero_stage, ep_size=ep_size, world_size=world_size, precision=precision
    )
    if layout.zero_stage > 2:
        raise CheckpointError("DeepSpeed has no ZeRO stage 3 for native MoE layers; give --zero 0, 1 or 2")
    layout.check()
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
    write_atomically(folder / "latest", tag.name)


class _NativeWriter(ZeroWriter):
    """Lays out every file of a tag."""

    def __init__(self, reader: CheckpointReader, layout: TagLayout) -> None:
        self.native = native = reader.config["native"]
        data_first = bool((native["ds_config"] or {}).get("use_data_before_expert_parallelism"))
        super().__init__(reader, layout, native["clip_grad"], data_first)
        self.local = {prefix: count // layout.ep_size for prefix, count in native["experts"].items()}

    def files(self) -> Iterator[Skeleton]:
        yield self._model_file()
        for layer, (prefix, count) in enumerate(self.native["experts"].items()):
            for expert in range(count):
                yield self._expert_file(layer, prefix, expert)
        if self.layout.zero_stage:
            yield from map(self.flat_file, range(self.layout.world_size))
        else:
            yield from map(self.whole_file, range(self.layout.ep_size))

    def groups(self, ep_rank: int) -> list[Group]:
        """The groups of the source, cut where DeepSpeed cuts."""
        rows = []
        for group in self.native["groups"]:
            # A portable folder keeps options as JSON, which has no tuples.
            options = {key: tuple(v) if key == "betas" else v for key, v in group["options"].items()}
            if group["moe"]:
                # ZeRO looks the process group of the experts up by this name.
                options |= {"name": f"ep_size_{self.layout.ep_size}", "moe": True}
            names = expand(group["names"], self.local, ep_rank)
            members = [Member(local, name, 0, self.reader.shape(name)) for local, name in names]
            for part in cut_experts(members) if group["moe"] else [members]:
                rows.append(Group(options, part, group["moe"]))
        return rows

    # ------------------------------------------------------------------ weights

    def _weight(self, file: Skeleton, place: tuple[Any, ...], name: str) -> Tensor:
        name = self.native["tied"].get(name, name)
        if name not in self.buffers:
            shape = self.reader.shape(name)
            return self.tensor(file, place, shape, [whole(Member(name, name, 0, shape))])
        value = self.buffers[name]
        # Buffers keep their type, as under DeepSpeed; a frozen weight is cast like those that move. The recorded names
        # of buffers count experts locally, so of an expert the two cannot be told apart: both stay, and loading casts.
        frozen = name not in self.native["buffers"] and value.is_floating_point()
        return file.small(place, value.to(self.dtype) if frozen and expert_name(name) is None else value)

    def _model_file(self) -> Skeleton:
        import deepspeed

        file, layout = Skeleton(MODEL), self.layout
        config = copy.deepcopy(self.native["ds_config"] or {})
        config["zero_optimization"] = {**(config.get("zero_optimization") or {}), "stage": layout.zero_stage}
        config["bf16"] = {**(config.get("bf16") or {}), "enabled": self.half}
        shapes, stage = self.param_shapes(), layout.zero_stage
        # As DeepSpeed has them: from stage 2 on, and None below.
        frozen: OrderedDict[str, Any] | None = OrderedDict() if stage > 1 else None
        file.tree = {
            "module": OrderedDict((name, self._weight(file, ("module", name), name)) for name in self.native["dense"]),
            "buffer_names": self.native["buffers"],
            "optimizer": None,
            "param_shapes": shapes if stage else None,
            "frozen_param_shapes": frozen,
            "frozen_param_fragments": frozen,
            "shared_params": self.native["tied"] if stage else None,
            **self.engine_state(),
            "ds_config": config,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "ds_version": deepspeed.__version__,
            "num_experts": list(self.native["experts"].values()),
            "ds_autoep_layers": None,
            **self.reader.client_state,
        }
        return file

    def _expert_file(self, layer: int, prefix: str, expert: int) -> Skeleton:
        file = Skeleton(f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt", {})
        for pattern in self.native["patterns"]:
            if pattern.startswith(prefix):
                name = numbered(pattern, expert)
                file.tree[name] = self._weight(file, (name,), name)
        return file
