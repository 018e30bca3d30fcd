"""The portable folder: a checkpoint without a layout, in safetensors, written and read in a stream.

model-00001-of-0000N.safetensors      float32 master weights, experts stacked over all global experts
model.safetensors.index.json          weight_map: name -> file
optimizer-00001-of-0000N.safetensors  exp_avg.NAME, exp_avg_sq.NAME (absent in an export of weights)
optimizer.safetensors.index.json
buffers.safetensors                   codebooks, code map, averaged embeddings
state.json                            format, step, optimizer step, configuration, counters, client state
config.yaml                           model and training of that configuration, for --config
manifest.json                         size and SHA-256 of all of them, written last
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vqmoe_ds.checkpoint.io.safetensors_io import Entry, Sealed, read_header, split_shards, write_safetensors
from vqmoe_ds.checkpoint.io.shards import entry_of, index_of, read_json, read_shards, write_shards
from vqmoe_ds.checkpoint.io.store import write_manifest
from vqmoe_ds.checkpoint.reader import MOMENTS, CheckpointReader, Piece, register_format
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import sha256_of, write_atomically, write_json

# A folder with this file is portable; TagReader's recognition asks for its absence.
STATE = "state.json"
STATE_FORMAT = 1
SHARD_BYTES = 4 << 30
Tell = Callable[[int], Any]


class PortableReader(CheckpointReader):
    """A portable folder. Args: the folder and its manifest."""

    kind = "portable"

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        state = read_json(path / STATE)
        if state.get("format", 0) > STATE_FORMAT:
            raise CheckpointError(
                f"{path} is of format {state['format']}; this version reads up to {STATE_FORMAT}: update vqmoe_ds"
            )
        self.step, self.config = int(state["step"]), state["config"]
        self.layout = state.get("layout", manifest.get("layout", {}))
        self.client_state, self.counters = state.get("client_state", {}), state.get("counters", {})
        self.frozen = frozenset(self.client_state.get("vqmoe_ds", {}).get("frozen", ()))
        self._optimizer_step = int(state.get("optimizer_step", 0))
        self._places = {"fp32": read_shards(path, "model")}
        if index_of(path, "optimizer").exists():
            moments = read_shards(path, "optimizer")
            for kind in MOMENTS:
                prefix = f"{kind}."
                self._places[kind] = {n.removeprefix(prefix): s for n, s in moments.items() if n.startswith(prefix)}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self._places["fp32"].items()}

    @property
    def has_optimizer(self) -> bool:
        return "exp_avg" in self._places

    def optimizer_step(self) -> int:
        return self._optimizer_step

    def buffers(self) -> dict[str, Tensor]:
        path = self.path / "buffers.safetensors"
        return {name: stored.whole() for name, stored in read_header(path).items()}

    def pieces(self, name: str, kind: str = "fp32") -> list[Piece]:
        stored = self._places.get(kind, {}).get(name)
        if stored is None or stored.shape != self.shape(name):
            raise CheckpointError(f"{self.path} holds no {kind} of {name} in its shape")
        return [Piece(0, stored.numel, stored, 0)]


register_format("portable", lambda path: (path / STATE).exists(), PortableReader, sealed=True)


def write_portable(
    reader: CheckpointReader, folder: Path, tell: Tell | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a reader's checkpoint into an empty folder (see ``new_folder``), a few megabytes at a time."""
    weights = [_entry(reader, n, "fp32", n) for n in reader.names()]
    files = write_shards(folder, "model", split_shards(weights, shard_bytes), tell)
    if reader.has_optimizer:
        moments = [_entry(reader, n, kind, f"{kind}.{n}") for n in reader.names_of(MOMENTS[0]) for kind in MOMENTS]
        files |= write_shards(folder, "optimizer", split_shards(moments, shard_bytes), tell)
    buffers = [entry_of(name, buffer) for name, buffer in reader.buffers().items()]
    files["buffers.safetensors"] = write_safetensors(folder / "buffers.safetensors", buffers)
    state = {
        **{"format": STATE_FORMAT, "step": reader.step, "optimizer_step": reader.optimizer_step()},
        **{"layout": reader.layout, "config": reader.config, "counters": reader.counters},
        "client_state": reader.client_state,
    }
    write_json(folder / STATE, state, indent=2)
    # For --config of a run that goes on from here, whose data, run folder and fine-tuning are its own.
    kept = {name: value for name, value in reader.config.items() if name not in ("data", "run", "finetune")}
    write_atomically(folder / "config.yaml", yaml.safe_dump(kept, sort_keys=False))
    seal(folder, reader, files)


def seal(
    folder: Path, reader: CheckpointReader, files: dict[str, Sealed], layout: dict[str, Any] | None = None
) -> None:
    """Write the manifest; files whose checksum is not known yet are read again."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files:
            files[name] = Sealed(path.stat().st_size, sha256_of(path))
    # consumed_samples of a resume reads the manifest alone.
    state = {
        **{"step": reader.step, "samples": reader.samples},
        **{"layout": layout or reader.layout, "config": reader.config},
    }
    entries = {name: {"bytes": sealed.size, "sha256": sealed.sha256} for name, sealed in sorted(files.items())}
    write_manifest(folder, state, entries)


def total_bytes(reader: CheckpointReader) -> int:
    """Bytes of weights and moments as float32."""
    values = sum(math.prod(shape) for shape in reader.shapes.values())
    return 4 * values * (3 if reader.has_optimizer else 1)


def _entry(reader: CheckpointReader, name: str, kind: str, key: str) -> Entry:
    return Entry(key, torch.float32, reader.shape(name), partial(reader.stream, name, kind))
