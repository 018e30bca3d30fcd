"""The weight files of a Hugging Face folder: one safetensors file, or shards and an index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from vqmoe_ds.checkpoint.archive import Stored
from vqmoe_ds.checkpoint.reader import check_inside
from vqmoe_ds.checkpoint.safetensors_io import Entry, read_header, split_shards, write_safetensors
from vqmoe_ds.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def entry_of(name: str, tensor: Tensor) -> Entry:
    """An entry for a tensor that is in memory."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def write_weights(folder: Path, entries: list[Entry], limit: int, tell: Callable[[int], Any]) -> None:
    """Write ``model.safetensors``, or shards of at most ``limit`` bytes (a larger tensor fills one) and their index."""
    # Wide types first, so that every tensor starts at a multiple of its item size.
    shards = [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in split_shards(entries, limit)]
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0], tell=tell)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, tell=tell)
        places |= {entry.name: name for entry in shard}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": places}
    write_json(folder / INDEX, index)


def read_weights(folder: Path) -> dict[str, Stored]:
    """Where each weight of a folder lies.

    Raises:
        CheckpointError: no safetensors there, a shard that is missing, damaged or outside, or an index that is wrong.
    """
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; only safetensors are read, pickles are not")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of file names; copy it again")
    for name in places.values():
        check_inside(folder, name)
    shards = {name: read_header(folder / name) for name in sorted(set(places.values()))}
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise CheckpointError(f"{folder}: {INDEX} places {tensor} in {name}, which lacks it; copy both again")
    return {tensor: shards[name][tensor] for tensor, name in places.items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: missing, or something else.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not valid JSON; copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; copy it again")
    return content


def parse_size(text: str) -> int:
    """Bytes of ``"2GB"``, ``"500MB"`` or a plain number, as Hugging Face counts (powers of ten).

    Raises:
        CheckpointError: something else.
    """
    units = ("B", "KB", "MB", "GB", "TB")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** units.index((match[2] or "B").upper())) if match else 0
    if size <= 0:
        raise CheckpointError(f"shard size {text!r} is no size; write it like 2GB or 500MB")
    return size
