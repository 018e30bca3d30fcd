"""Checkpoints in Megatron-LM's ``torch`` format, read as whole tensors.

    latest_checkpointed_iteration.txt
    iter_0000200/mp_rank_TT/model_optim_rng.pt              one a tensor-parallel rank
    iter_0000200/mp_rank_TT_EEE/model_optim_rng.pt          one a pair of tensor- and expert-parallel rank, where EP > 1
    iter_0000200/vqmoe.json, vqmoe.safetensors              what Megatron has no place for, of our own export alone

Weights alone, no optimizer. Files are read tensor by tensor; of stacked experts, one expert at a time.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.formats.huggingface.folder import run_config
from vqmoe_ds.checkpoint.formats.huggingface.names import shapes_of
from vqmoe_ds.checkpoint.formats.megatron.names import dense_names, join, sections_of_args, share_shape, sparse_blocks
from vqmoe_ds.checkpoint.io.archive import Record, Stored, load_archive
from vqmoe_ds.checkpoint.io.safetensors_io import read_header
from vqmoe_ds.checkpoint.io.shards import read_json
from vqmoe_ds.checkpoint.reader import Piece, WeightsReader, check_described, register_format, sound
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import read_small

LATEST, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
EXTRA, EXTRA_TENSORS, FORMAT = "vqmoe.json", "vqmoe.safetensors", 1
RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")


def megatron_folder(path: Path) -> Path | None:
    """The iteration folder of a Megatron checkpoint at ``path``: that folder, or the one that its latest file names."""
    if (path / LATEST).is_file():
        latest = read_small(path / LATEST, 4096).decode(errors="replace").strip()
        # Nothing of the file but digits becomes part of a path.
        return path / (f"iter_{int(latest):07d}" if re.fullmatch("[0-9]{1,18}", latest) else "release")
    return path if any(path.glob("mp_rank_*/model_optim_rng.pt")) else None


def open_megatron(path: str | Path) -> MegatronReader:
    """Open a Megatron-LM checkpoint: its folder (of ``--load``) or one iteration of it.

    Raises:
        CheckpointError: none there, of a kind that is not read, incomplete, damaged, or a model that is not ours.
    """
    folder = megatron_folder(Path(path))
    if folder is None:
        raise CheckpointError(f"{path} holds no Megatron checkpoint: neither {LATEST} nor mp_rank folders")
    with sound(folder):
        return MegatronReader(folder)


def inert(module: str, name: str) -> bool:
    """Names in Megatron's files that become inert records: its arguments, settings and random states."""
    known = {
        *(("argparse", "Namespace"), ("types", "SimpleNamespace"), ("_codecs", "encode"), ("_io", "BytesIO")),
        *(("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct")),
        ("numpy._core.multiarray", "_reconstruct"),
    }
    return (module, name) in known or module.startswith("megatron.core.")


class MegatronReader(WeightsReader):
    """A Megatron checkpoint as one without an optimizer."""

    kind = "megatron"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._files = self._open_files()
        self.layout = {"tp_size": len(self._files), "ep_size": len(self._files[0])}
        self._check_same_iteration()
        extra = read_json(path / EXTRA) if (path / EXTRA).exists() else None
        if extra and extra.get("format", 0) > FORMAT:
            raise CheckpointError(f"{path / EXTRA} is of a newer format; update vqmoe_ds")
        told = extra["config"] if extra else self._config_of_args()
        check_described(told, self._model(0, 0), path)
        self._run = run_config(told, path)
        self.config = self._run.model_dump(mode="json")
        self.step = int(extra["step"] if extra else self._files[0][0].get("iteration") or 0)
        self._shapes = shapes_of(self._run)
        self._names = dense_names(self._run)
        self._sources = {ours: (theirs, i) for theirs, some in self._names.items() for i, ours in enumerate(some)}
        self._extra = read_header(path / EXTRA_TENSORS) if (path / EXTRA_TENSORS).exists() else {}
        for name in extra.get("parameters", []) if extra else []:
            if name not in self._extra:
                raise CheckpointError(f"{path}: {EXTRA_TENSORS} lacks {name}; copy it again")
            self._shapes[name] = self._extra[name].shape
        if extra:  # optimizers number parameters in the model's order
            self._shapes = {name: self._shapes[name] for name in extra["names"]}
        self._kept: tuple[Any, list[Tensor]] = (None, [])
        self._check_tensors()

    def buffers(self) -> dict[str, Tensor]:
        return {name: stored.whole() for name, stored in self._extra.items() if name not in self._shapes}

    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        """Not how this reader works: parts of a tensor lie in columns; ``read`` puts them together."""
        if kind != "fp32" or name not in self._shapes:
            raise CheckpointError(f"{self.path} holds no {kind} of {name}: Megatron's weights alone are read")
        return []

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        self.pieces(name, kind)
        each = math.prod(self.shape(name)[1:]) if ".experts." in name else math.prod(self.shape(name))
        out = torch.empty(count)
        while count:  # a unit (an expert, or a whole tensor) at a time
            unit, first = divmod(start, each)
            length = min(count, each - first)
            out[len(out) - count :][:length].copy_(self._unit(name, unit).reshape(-1)[first : first + length])
            start, count = start + length, count - length
        return out

    # ------------------------------------------------------------------ files

    def _open_files(self) -> list[list[Any]]:
        """The files by tensor- and expert-parallel rank."""
        if (self.path / "metadata.json").exists() or (self.path / ".metadata").exists():
            raise CheckpointError(
                f"{self.path} is in Megatron's torch_dist format; convert it with Megatron-LM first "
                "(--ckpt-convert-format torch)"
            )
        places: dict[tuple[int, int], Path] = {}
        for folder in self.path.glob("mp_rank_*"):
            match = RANK.fullmatch(folder.name)
            if match is None or match[3] is not None:
                raise CheckpointError(
                    f"{folder} is of a pipeline-parallel model, which is not read; use pipeline size 1"
                )
            places[int(match[1]), int(match[2] or 0)] = folder / FILE
        if not places:
            raise CheckpointError(f"{self.path} holds no mp_rank folders")
        tp, ep = (max(place[i] for place in places) + 1 for i in (0, 1))
        for rank in ((t, e) for t in range(tp) for e in range(ep)):
            if rank not in places or not places[rank].exists():
                raise CheckpointError(
                    f"{self.path}: the file of tensor-parallel rank {rank[0]}, expert-parallel rank {rank[1]} is "
                    f"missing (of {tp} x {ep}); copy it again"
                )
        files = [[load_archive(places[t, e], inert) for e in range(ep)] for t in range(tp)]
        return files

    def _model(self, tp: int, ep: int) -> dict[str, Any]:
        model: dict[str, Any] = self._files[tp][ep]["model"]
        return model

    def _check_same_iteration(self) -> None:
        first = self._files[0][0].get("iteration")
        for tp, row in enumerate(self._files):
            for ep, file in enumerate(row):
                if file.get("iteration") != first:
                    raise CheckpointError(
                        f"{self.path} mixes tags: rank ({tp}, {ep}) is of iteration {file.get('iteration')}, "
                        f"rank (0, 0) of {first}"
                    )

    def _args(self) -> dict[str, Any]:
        args = self._files[0][0].get("args")
        return dict(args.__dict__) if isinstance(args, Record) else {}

    def _config_of_args(self) -> dict[str, Any]:
        args = self._args()
        if not args:
            raise CheckpointError(f"{self.path} records no arguments and has no {EXTRA}, so its model is not known")
        sizes = {"pipeline_model_parallel_size": 1, "tensor_model_parallel_size": self.layout["tp_size"]}
        for name, size in sizes.items():
            if args.get(name, size) != size:
                raise CheckpointError(f"{self.path} says {name}={args[name]}, its files are of {size}")
        check_described({"model": {"layers": args.get("num_layers", 0)}}, self._model(0, 0), self.path)
        return sections_of_args(args, str(self.path))

    def _check_tensors(self) -> None:
        """Every rank's file holds the tensors of this model in their shapes, and no others."""
        tp_size, ep_size = self.layout["tp_size"], self.layout["ep_size"]
        moe = self._run.moe
        blocks = sparse_blocks(self._run)
        local = self._local_experts(blocks)
        if blocks and local * ep_size != moe.num_experts:
            raise CheckpointError(
                f"{self.path} has {local} experts in each of {ep_size} expert-parallel ranks, its configuration says "
                f"{moe.num_experts}"
            )
        for tp in range(tp_size):
            for ep in range(ep_size):
                model = self._model(tp, ep)
                there = {name: t.shape for name, t in model.items() if isinstance(t, Stored)}
                self._check_names(there, self._wanted(tp_size, local, blocks), f"rank ({tp}, {ep})")

    def _check_names(self, there: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], where: str) -> None:
        for name in sorted(there.keys() | wanted.keys()):
            vocabulary = name.startswith(("embedding.", "output_layer.")) and name in there and name in wanted
            if vocabulary and there[name][1] == wanted[name][1]:
                continue  # padded by a rule of its own; seen to be long enough below
            if there.get(name) != wanted.get(name):
                state = f"has shape {list(there[name])}" if name in there else "is missing"
                need = f"should have {list(wanted[name])}" if name in wanted else "belongs to no model of this trainer"
                raise CheckpointError(f"{self.path}: {name} of {where} {state} and {need}")
        if there["embedding.word_embeddings.weight"][0] * self.layout["tp_size"] < self._run.model.vocab_size:
            raise CheckpointError(
                f"{self.path} has fewer embeddings than its vocabulary of {self._run.model.vocab_size}"
            )

    def _local_experts(self, blocks: list[int]) -> int:
        """Experts of a rank, by its first MoE layer; also finds out how they are named."""
        if not blocks:
            return 0
        prefix = f"decoder.layers.{blocks[0]}.mlp.experts."
        model = self._model(0, 0)
        self._grouped = f"{prefix}weight1" in model
        if self._grouped:
            # weight2 stacks the hidden rows of each expert that a tensor-parallel rank has.
            return int(model[f"{prefix}weight2"].shape[0] * self.layout["tp_size"]) // self._run.moe.expert_hidden
        return len({name.split(".")[6] for name in model if name.startswith(prefix + "local_experts.")})

    def _wanted(self, tp: int, local: int, blocks: list[int]) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a rank."""
        width, hidden = self._run.model.width, self._run.moe.expert_hidden // tp
        wanted = {name: share_shape(name, self._run, tp) for name in self._names}
        for prefix in (f"decoder.layers.{block}.mlp.experts." for block in blocks):
            if self._grouped:
                wanted[f"{prefix}weight1"] = (width, local * 2 * hidden)
                wanted[f"{prefix}weight2"] = (local * hidden, width)
                continue
            for expert in range(local):
                wanted[f"{prefix}local_experts.{expert}.linear_fc1.weight"] = (2 * hidden, width)
                wanted[f"{prefix}local_experts.{expert}.linear_fc2.weight"] = (width, hidden)
        return wanted

    # ------------------------------------------------------------------ values

    def _unit(self, name: str, unit: int) -> Tensor:
        """A whole tensor, or one expert of a stacked one, put together; the last is kept: reads come in stretches."""
        if ".experts." in name:
            block, ours = int(name.split(".")[1]), name.rsplit(".", 1)[1]
            theirs, place = {"w1": (1, 0), "w3": (1, 1), "w2": (2, 0)}[ours]
            key: Any = (block, theirs, unit)
            make: Any = partial(self._expert, block, theirs, unit)
        elif name in self._sources:
            key, place = self._sources[name]
            make = partial(self._dense, key)
        else:
            return self._extra[name].whole().float()
        kept = self._kept  # another thread may replace it
        if kept[0] != key:
            self._kept = (None, [])  # not two of them at a time
            kept = self._kept = (key, make())
        return kept[1][place]

    def _dense(self, name: str) -> list[Tensor]:
        # What is no expert stands in the file of every expert-parallel rank alike.
        shares = [self._model(tp, 0)[name].whole().float() for tp in range(self.layout["tp_size"])]
        joined = join(name, shares, self._run.model)
        if name.startswith(("embedding.", "output_layer.")):
            return [joined[0][: self._run.model.vocab_size]]
        return joined

    def _expert(self, block: int, number: int, expert: int) -> list[Tensor]:
        count = self._run.moe.num_experts // self.layout["ep_size"]
        ep, local = divmod(expert, count)
        prefix = f"decoder.layers.{block}.mlp.experts."
        shares = []
        for tp in range(self.layout["tp_size"]):
            model = self._model(tp, ep)
            if self._grouped:
                # The kernel views weight1 as [E, D, 2H] and weight2 as [E, H, D], whatever their shapes say: an expert
                # is one stretch, transposed, as the writer's _grouped lays it.
                stored = model[f"{prefix}weight{number}"]
                size = stored.numel // count
                rows = self._run.model.width if number == 1 else stored.shape[0] // count
                shares.append(stored.read(local * size, size).view(rows, -1).t().float())
            else:
                shares.append(model[f"{prefix}local_experts.{local}.linear_fc{number}.weight"].whole().float())
        return join(f"linear_fc{number}.weight", shares, self._run.model)


register_format("megatron", lambda path: megatron_folder(path) is not None, open_megatron)
