"""Tensors in safetensors files with an index (``PART-00001-of-0000N.safetensors``), and JSON beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from vqmoe_ds.checkpoint.io.archive import Stored
from vqmoe_ds.checkpoint.io.safetensors_io import Entry, Sealed, read_header, split_shards, write_safetensors
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import read_small, write_json

SINGLE = "model.safetensors"


def entry_of(name: str, tensor: Tensor) -> Entry:
    """An entry for a tensor that is in memory."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def index_of(folder: Path, part: str) -> Path:
    """The index of a part (``model``, ``optimizer``)."""
    return folder / f"{part}.safetensors.index.json"


def write_shards(
    folder: Path, part: str, shards: list[list[Entry]], tell: Callable[[int], Any] | None = None
) -> dict[str, Sealed]:
    """Write the files of a part and their index; size and checksum of each but the index."""
    files: dict[str, Sealed] = {}
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{part}-{number:05d}-of-{len(shards):05d}.safetensors"
        files[name] = write_safetensors(folder / name, shard, tell=tell)
        places |= {entry.name: name for entry in shard}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    # Last, so that an index never names a file that is not whole.
    write_json(index_of(folder, part), {"metadata": {"total_size": total}, "weight_map": places}, indent=2)
    return files


def check_inside(folder: Path, name: str) -> None:
    """Refuse a file name, read from an index, that leads out of its folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{folder} is refused: its index names {name!r}, which lies outside the folder")


def read_shards(folder: Path, part: str) -> dict[str, Stored]:
    """Read the index of a part: the place of each tensor.

    Raises:
        CheckpointError: a shard that is missing, damaged or outside the folder, or an index that is missing or wrong.
    """
    index = index_of(folder, part)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map of file names; copy it again")
    for name in places.values():
        check_inside(folder, name)
    shards = {name: read_header(folder / name) for name in sorted(set(places.values()))}
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise CheckpointError(f"{index} places {tensor} in {name}, which lacks it; copy both again")
    return {tensor: shards[name][tensor] for tensor, name in places.items()}


def write_weights(folder: Path, entries: list[Entry], limit: int, tell: Callable[[int], Any]) -> None:
    """Write ``model.safetensors``, or shards of at most ``limit`` bytes (a larger tensor fills one) and their index.

    Raises:
        OSError: no space.
    """
    # Wide types first, so that every tensor starts at a multiple of its item size.
    shards = [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in split_shards(entries, limit)]
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0], tell=tell)
    else:
        write_shards(folder, "model", shards, tell)


def read_weights(folder: Path) -> dict[str, Stored]:
    """Find the place of each weight of a Hugging Face folder, in one file or in shards.

    Raises:
        CheckpointError: no safetensors there, damaged, or as in ``read_shards``.
    """
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    index = index_of(folder, "model")
    if not index.exists():
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {index.name}; only safetensors are read, pickles are not"
        )
    return read_shards(folder, "model")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: missing, or something else.
    """
    try:
        content = json.loads(read_small(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON; copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; copy it again")
    return content
