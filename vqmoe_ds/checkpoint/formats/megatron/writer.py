"""Writing a checkpoint of any kind in Megatron-LM's ``torch`` format (``reader`` shows the folder).

Files are written tensor by tensor; of stacked experts, one expert at a time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from vqmoe_ds.checkpoint.formats.huggingface.folder import DTYPES, run_config
from vqmoe_ds.checkpoint.formats.huggingface.names import shapes_of
from vqmoe_ds.checkpoint.formats.megatron.names import (
    dense_names,
    megatron_args,
    padded_vocab,
    share,
    share_shape,
    sparse_blocks,
    why_not_megatron,
)
from vqmoe_ds.checkpoint.formats.megatron.reader import EXTRA, EXTRA_TENSORS, FILE, FORMAT, LATEST, inert
from vqmoe_ds.checkpoint.io.safetensors_io import write_safetensors
from vqmoe_ds.checkpoint.io.shards import entry_of
from vqmoe_ds.checkpoint.io.skeleton import Skeleton
from vqmoe_ds.checkpoint.reader import CheckpointReader
from vqmoe_ds.checkpoint.whereabouts import without_paths
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import new_folder, write_atomically, write_json


@dataclass(frozen=True)
class MegatronOptions:
    """Options of ``export_megatron``.

    Attributes:
        tp: tensor-parallel size, of experts too.
        ep: expert-parallel size.
        experts: ``sequential`` (``local_experts.E.linear_fc1``) or ``grouped`` (``weight1``, the legacy grouped GEMM).
        dtype: ``float32``, with which the way back is exact, or ``bfloat16``.
        force: replace a folder that exists.
    """

    tp: int = 1
    ep: int = 1
    experts: str = "sequential"
    dtype: str = "float32"
    force: bool = False


def export_megatron(reader: CheckpointReader, dst: str | Path, options: MegatronOptions | None = None) -> list[str]:
    """Write a checkpoint for Megatron-LM.

    Args:
        reader: of any checkpoint of this trainer.
        dst: the folder (Megatron's ``--load``); it appears whole or not at all.
        options: see there.

    Returns:
        Remarks for the user, one sentence each.

    Raises:
        CheckpointError: sizes that do not divide the model, another model than its configuration says, DST exists.
    """
    dst, options = Path(dst), options or MegatronOptions()
    writer = _Writer(reader, options)
    with (
        new_folder(dst, options.force) as folder,
        tqdm(total=writer.nbytes(), unit="B", unit_scale=True, desc=f"writing {dst.name}", disable=None) as bar,
    ):
        iteration = folder / f"iter_{reader.step:07d}"
        for tp in range(options.tp):
            for ep in range(options.ep):
                writer.file(tp, ep).write(iteration, bar.update, inert)
        writer.write_extra(iteration)
        write_atomically(folder / LATEST, str(reader.step))
    return _remarks(writer.config)


def _remarks(config: RunConfig) -> list[str]:
    lines = ["load it with --finetune, or --no-load-optim --no-load-rng: Megatron-LM gets weights, not Adam's moments"]
    facts = config.moe.facts
    if config.moe.norm is not None:
        lines.append(f"Megatron has no norm before or after an expert: it computes the model without {config.moe.norm}")
    if facts.has_experts and not facts.is_stock:
        which = "one of zeros" if facts.linear_gate(config.moe) is None else "its own continuous router"
        lines.append(
            f"Megatron has no moe.router={config.moe.router}: it computes this model with a linear router alone, "
            f"{which}"
        )
    return lines


class _Writer:
    def __init__(self, reader: CheckpointReader, options: MegatronOptions) -> None:
        self.reader, self.options = reader, options
        if "model" not in reader.config:
            raise CheckpointError(f"{reader.path} is not of a model of this trainer, so --to megatron cannot write it")
        self.config = run_config(reader.config, reader.path)
        self.dtype = DTYPES[options.dtype]
        self._check()
        self.names = dense_names(self.config)
        taken = {name for sources in self.names.values() for name in sources}
        self.left = [name for name in reader.names() if name not in taken and ".experts." not in name]

    def _check(self) -> None:
        config, options, path = self.config, self.options, self.reader.path
        if reason := why_not_megatron(config):
            raise CheckpointError(f"--to megatron cannot write {path}: {reason}")
        have = {name: tuple(self.reader.shape(name)) for name in self.reader.names()}
        for name, want in shapes_of(config).items():  # routers may have more, for the side file
            if want != have.get(name):
                raise CheckpointError(f"{path}: {name} is {have.get(name)}, its configuration asks for {want}")
        sparse = sparse_blocks(config)
        widths = {"heads": config.model.heads, "key-value heads": config.model.kv_heads or config.model.heads}
        if len(sparse) < config.model.layers:
            widths["values of a dense MLP's hidden width"] = config.dense_hidden
        if sparse:
            widths["values of an expert's hidden width"] = config.moe.expert_hidden
        for what, count in widths.items():
            if options.tp < 1 or count % options.tp:
                raise CheckpointError(f"--tp {options.tp} does not divide the {count} {what} of {path}")
        experts = config.moe.num_experts if sparse else 1
        if options.ep < 1 or experts % options.ep:
            raise CheckpointError(f"--ep {options.ep} does not divide the {experts} experts of {path}")

    def nbytes(self) -> int:
        values = sum(math.prod(shape) for shape in self.reader.shapes.values())
        experts = sum(math.prod(shape) for name, shape in self.reader.shapes.items() if ".experts." in name)
        return (experts + (values - experts) * self.options.ep) * self.dtype.itemsize

    def file(self, tp: int, ep: int) -> Skeleton:
        """The file of a rank; what is not an expert stands in every expert-parallel rank's."""
        options, config = self.options, self.config
        folder = f"mp_rank_{tp:02d}" + (f"_{ep:03d}" if options.ep > 1 else "")
        file = Skeleton(f"{folder}/{FILE}")
        model: OrderedDict[str, Any] = OrderedDict()
        for name, sources in self.names.items():
            shape = share_shape(name, config, options.tp)
            model[name] = file.tensor(("model", name), shape, self.dtype, partial(self._share, name, sources, tp))
            # Megatron's parallel linear layers have an extra state, None, and strict loading asks for its name.
            if name.endswith(("linear_qkv.weight", "linear_proj.weight", "fc1.weight", "fc2.weight", "layer.weight")):
                model[name.removesuffix("weight") + "_extra_state"] = None
            if name.endswith("router.weight"):
                model.update(self._experts(file, int(name.split(".")[2]), tp, ep))
        args = megatron_args(config, options.tp, options.ep, options.experts == "grouped", self.dtype)
        # Megatron-LM re-orders the rows of linear_qkv in files of a version below 2, and takes a missing one for 0.
        file.tree = {"args": args, "checkpoint_version": 3.0, "iteration": self.reader.step, "model": model}
        return file

    def _share(self, name: str, sources: tuple[str, ...], rank: int) -> Iterable[Tensor]:
        if not sources:
            return  # a router that is not there stays zero
        config, tp = self.config, self.options.tp
        if name.startswith(("embedding.", "output_layer.")):  # the largest tensors: only this rank's rows
            yield from self._vocabulary(sources[0], rank)
            return
        yield share(name, [self.reader.tensor(source) for source in sources], config.model, tp, rank)

    def _vocabulary(self, source: str, rank: int) -> Iterator[Tensor]:
        rows = padded_vocab(self.config.model.vocab_size, self.options.tp) // self.options.tp
        # As many values as stream() reads at a time.
        width, step = self.config.model.width, max(1, (1 << 20) // self.config.model.width)
        last = min((rank + 1) * rows, self.config.model.vocab_size)  # rows that pad stay zero
        for first in range(rank * rows, last, step):
            yield self.reader.read(source, "fp32", first * width, (min(first + step, last) - first) * width)

    def _experts(self, file: Skeleton, block: int, tp: int, ep: int) -> Iterator[tuple[str, Any]]:
        moe, width, shares = self.config.moe, self.config.model.width, self.options.tp
        count, hidden = moe.num_experts // self.options.ep, moe.expert_hidden // shares
        prefix, first = f"decoder.layers.{block}.mlp.experts.", ep * count
        if self.options.experts == "grouped":
            for number, shape in ((1, (width, count * 2 * hidden)), (2, (count * hidden, width))):
                name = f"{prefix}weight{number}"
                values = partial(self._grouped, block, number, range(first, first + count), tp)
                yield name, file.tensor(("model", name), shape, self.dtype, values)
            return
        for local in range(count):
            for number, shape in ((1, (2 * hidden, width)), (2, (width, hidden))):
                name = f"{prefix}local_experts.{local}.linear_fc{number}."
                alone = partial(self._expert, block, number, first + local, tp)
                yield f"{name}weight", file.tensor(("model", f"{name}weight"), shape, self.dtype, alone)
                yield f"{name}_extra_state", None

    def _expert(self, block: int, number: int, expert: int, rank: int) -> list[Tensor]:
        tensors = []
        for name in ("w1", "w3") if number == 1 else ("w2",):
            source = f"blocks.{block}.mlp.experts.{name}"
            shape = self.reader.shape(source)[1:]
            tensors.append(self.reader.read(source, "fp32", expert * math.prod(shape), math.prod(shape)).view(shape))
        return [share(f"linear_fc{number}.weight", tensors, self.config.model, self.options.tp, rank)]

    def _grouped(self, block: int, number: int, experts: range, rank: int) -> Iterator[Tensor]:
        for expert in experts:  # the kernel views weight1 as [E, D, 2H] and weight2 as [E, H, D]
            yield self._expert(block, number, expert, rank)[0].t().contiguous()

    def write_extra(self, folder: Path) -> None:
        """Write what Megatron has no place for: path gates, codebooks, tables, the run configuration without paths."""
        run, names = without_paths(self.reader.config), {"names": self.reader.names(), "parameters": self.left}
        write_json(folder / EXTRA, {"format": FORMAT, "step": self.reader.step, "config": run, **names}, indent=2)
        tensors = {name: self.reader.tensor(name) for name in self.left} | self.reader.buffers()
        if tensors:
            write_safetensors(folder / EXTRA_TENSORS, [entry_of(*item) for item in tensors.items()])
