"""Safetensors files written and read piece by piece, so that no whole tensor needs to be in memory.

A file is eight bytes of header length, a JSON header (name -> type, shape, place) and the raw values.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.io.archive import MOST_DIMENSIONS, Stored, raw_bytes
from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import open_regular

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
OTHER_DTYPES = {
    *("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("C64", "U16", "U32", "U64"),
}
"""The other types of the format, with which nothing here computes."""
TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 32 << 20
"""Bytes of a header: some 300,000 tensors. Each byte costs up to 20 bytes of objects."""


class Entry(NamedTuple):
    """A tensor to be written: ``values`` yields its flattened values in order, in stretches of any length."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Sealed(NamedTuple):
    """Size and checksum of a written file, as a manifest records them."""

    size: int
    sha256: str


def split_shards(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Entries in order, in files of at most ``shard_bytes`` (a larger tensor has a file to itself)."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def write_safetensors(path: Path, entries: list[Entry], tell: Callable[[int], Any] | None = None) -> Sealed:
    """Write a file one stretch of values at a time; flushed to disk, not renamed.

    Args:
        path: file to write.
        entries: its tensors in order.
        tell: called with the number of bytes written after each stretch.
    """
    # As save_pretrained writes it: many releases of transformers refuse a file without it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for entry in entries:
        offsets = [place, place + entry.nbytes]
        header[entry.name] = {"dtype": TYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        place += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # Values begin at a multiple of 8, as in files of the safetensors library; JSON may end in spaces.
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hashing:
        start = len(text).to_bytes(8, "little") + text
        digest.update(start)
        file.write(start)
        for entry in entries:
            for block in _blocks(entry):
                job = hashing.submit(digest.update, block)  # both leave Python's lock to others
                file.write(block)
                # Before the next stretch is made: one at a time is in memory.
                job.result()
                if tell is not None:
                    tell(len(block))
        file.flush()
        os.fsync(file.fileno())
    return Sealed(8 + len(text) + place, digest.hexdigest())


def _blocks(entry: Entry) -> Iterator[memoryview]:
    written = 0
    for values in entry.values():
        block = raw_bytes(values.detach().to(entry.dtype).contiguous().view(-1))
        written += len(block)
        yield block
    # The header is on disk and promises that many: all later tensors would be shifted.
    if written != entry.nbytes:
        raise AssertionError(f"{entry.name}: {written} bytes were given, {entry.nbytes} promised")


def read_header(path: Path) -> dict[str, Stored]:
    """Read the header of a file: the place of every tensor; nothing else of it is read.

    Raises:
        CheckpointError: no such file, cut short, or a header whose sizes cannot be true.
    """
    try:
        with open_regular(path, links=True) as file:
            size = os.fstat(file.fileno()).st_size
            if file.peek(64).startswith(b"version https://git-lfs."):
                raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; fetch them with git lfs pull")
            length = int.from_bytes(file.read(8), "little")
            # Before the header is read: a length may claim any memory.
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise CheckpointError(f"{path} is refused: its header claims {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is refused: its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is refused: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    reached = 8 + length
    # Empty tensors first, which lie where the next one begins.
    for stored in sorted(tensors.values(), key=lambda s: (s.offset, s.numel)):
        if stored.offset != reached:
            raise CheckpointError(f"{path} is refused: its header lets tensors overlap or leaves gaps between them")
        reached += stored.numel * stored.dtype.itemsize
    # As in the safetensors library: bytes of no tensor could be another file.
    if reached != size:
        raise CheckpointError(f"{path} is refused: its header describes {reached} bytes, the file has {size}")
    return tensors


def _stored(path: Path, name: str, entry: Any, base: int) -> Stored:
    if isinstance(entry, dict) and str(entry.get("dtype")) in OTHER_DTYPES:
        raise CheckpointError(
            f"{path} holds {name[:200]} as {entry['dtype']}, which is not read here; save the model as bfloat16 "
            "(a quantised one after it was dequantised), such as with transformers' save_pretrained"
        )
    try:
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, first, last))
        if whole and len(shape) <= MOST_DIMENSIONS and last - first == math.prod(shape) * dtype.itemsize:
            return Stored(str(path), base + first, dtype, tuple(shape))
    except (KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(f"{path} is refused: mismatch of type, shape or size of {name[:200]} in its header")
