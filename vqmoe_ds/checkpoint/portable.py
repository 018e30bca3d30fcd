"""The portable folder: a checkpoint without a layout, in safetensors, written and read in a stream.

model-00001-of-0000N.safetensors      float32 master weights, experts stacked over all global experts
model.safetensors.index.json          weight_map: name -> file
optimizer-00001-of-0000N.safetensors  exp_avg.NAME, exp_avg_sq.NAME (absent in an export of weights)
optimizer.safetensors.index.json
buffers.safetensors                   codebooks, code map, averaged embeddings
state.json                            format, step, optimizer step, configuration, counters, client state
manifest.json                         size and SHA-256 of all of them, written last
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.archive import Stored
from vqmoe_ds.checkpoint.reader import KINDS, CheckpointReader, Piece, check_inside
from vqmoe_ds.checkpoint.safetensors_io import Entry, Sealed, read_header, split_shards, write_safetensors
from vqmoe_ds.checkpoint.store import FORMAT, MANIFEST, sha256_of, write_atomically
from vqmoe_ds.errors import CheckpointError

STATE = "state.json"
STATE_FORMAT = 1
SHARD_BYTES = 4 << 30
Tell = Callable[[int], Any]


class PortableReader(CheckpointReader):
    """A portable folder. Args: the folder and its manifest."""

    kind = "portable"

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        state = _read_json(path / STATE)
        if state.get("format", 0) > STATE_FORMAT:
            raise CheckpointError(
                f"{path} is of format {state['format']}; this version reads up to {STATE_FORMAT}: update vqmoe_ds"
            )
        self.step, self.config = int(state["step"]), state["config"]
        self.layout = state.get("layout", manifest.get("layout", {}))
        self.client_state, self.counters = state.get("client_state", {}), state.get("counters", {})
        self._optimizer_step = int(state.get("optimizer_step", 0))
        self._places = {"fp32": self._index("model")}
        if (path / "optimizer.safetensors.index.json").exists():
            moments = self._index("optimizer")
            for kind in KINDS[1:]:
                prefix = f"{kind}."
                self._places[kind] = {n.removeprefix(prefix): s for n, s in moments.items() if n.startswith(prefix)}

    def _index(self, part: str) -> dict[str, Stored]:
        weight_map = _read_json(self.path / f"{part}.safetensors.index.json").get("weight_map", {})
        found: dict[str, Stored] = {}
        for file in dict.fromkeys(weight_map.values()):
            check_inside(self.path, file)
            tensors = read_header(self.path / file)
            found.update({name: stored for name, stored in tensors.items() if weight_map.get(name) == file})
        for name, file in weight_map.items():
            if name not in found:
                raise CheckpointError(f"{self.path}: {file} does not hold {name}, which the index puts there")
        return {name: found[name] for name in weight_map}

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


def write_portable(
    reader: CheckpointReader, folder: Path, tell: Tell | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a reader's checkpoint into an empty folder (see ``new_folder``), a few megabytes at a time."""
    files = _write_shards(folder, "model", [_entry(reader, n, "fp32", n) for n in reader.names()], shard_bytes, tell)
    if reader.has_optimizer:
        moments = [_entry(reader, n, kind, f"{kind}.{n}") for n in reader.names() for kind in KINDS[1:]]
        files |= _write_shards(folder, "optimizer", moments, shard_bytes, tell)
    buffers = [Entry(n, b.dtype, tuple(b.shape), partial(_whole, b)) for n, b in reader.buffers().items()]
    files["buffers.safetensors"] = write_safetensors(folder / "buffers.safetensors", buffers)
    state = {
        **{"format": STATE_FORMAT, "step": reader.step, "optimizer_step": reader.optimizer_step()},
        **{"layout": reader.layout, "config": reader.config, "counters": reader.counters},
        "client_state": reader.client_state,
    }
    _write_json(folder / STATE, state)
    seal(folder, reader, files)


def seal(
    folder: Path, reader: CheckpointReader, files: dict[str, Sealed], layout: dict[str, Any] | None = None
) -> None:
    """Write the manifest; files whose checksum is not known yet are read again."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files:
            files[name] = Sealed(path.stat().st_size, sha256_of(path))
    manifest = {
        **{"format": FORMAT, "step": reader.step, "samples": reader.samples},
        **{"layout": layout or reader.layout, "config": reader.config},
        "files": {name: {"bytes": sealed.size, "sha256": sealed.sha256} for name, sealed in sorted(files.items())},
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))


def total_bytes(reader: CheckpointReader) -> int:
    """Bytes of weights and moments as float32."""
    values = sum(math.prod(shape) for shape in reader.shapes.values())
    return 4 * values * (3 if reader.has_optimizer else 1)


@contextmanager
def new_folder(target: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name at the end, and vanishes if there is none.

    Raises:
        CheckpointError: ``target`` exists and ``force`` is not set; or the disk is full.
    """
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists; choose another folder, or give --force to replace it")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            temporary.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written ({error.strerror}); nothing was left behind") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _entry(reader: CheckpointReader, name: str, kind: str, key: str) -> Entry:
    return Entry(key, torch.float32, reader.shape(name), partial(reader.stream, name, kind))


def _whole(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _write_shards(
    folder: Path, part: str, entries: list[Entry], shard_bytes: int, tell: Tell | None
) -> dict[str, Sealed]:
    shards = split_shards(entries, shard_bytes)
    files, weight_map = {}, {}
    for number, shard in enumerate(shards, 1):
        name = f"{part}-{number:05d}-of-{len(shards):05d}.safetensors"
        files[name] = write_safetensors(folder / name, shard, tell=tell)
        weight_map.update({entry.name: name for entry in shard})
    index = {"metadata": {"total_size": sum(e.nbytes for e in entries)}, "weight_map": weight_map}
    _write_json(folder / f"{part}.safetensors.index.json", index)
    return files


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value
