"""``.pt`` files of any size written without holding them: first all structure and no values, then the values."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqmoe_ds.checkpoint.io.archive import Stored, load_archive, raw_bytes

Values = Callable[[], Iterable[Tensor]]
"""Yields the values of a tensor in order, in stretches of any length and shape."""


@dataclass
class Skeleton:
    """A file in the making: its tree, in which tensors are empty, and what goes where in it.

    Attributes:
        name: of the file in its folder.
        tree: what ``torch.save`` is to write; built of ``empty`` tensors.
        nbytes: bytes of the values that whoever fills it in counts, and of ``small`` tensors.
    """

    name: str
    tree: Any = None
    nbytes: int = 0
    _jobs: list[tuple[tuple[Any, ...], int, Values]] = field(default_factory=list)

    def empty(self, place: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor to stand at ``place`` (keys from the root of the tree); zeros where nothing is filled in."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            return torch.empty(shape, dtype=dtype)

    def fill(self, place: tuple[Any, ...], begin: int, values: Values) -> None:
        """Let the tensor at ``place`` have these values from its flattened value ``begin`` on."""
        self._jobs.append((place, begin, values))

    def tensor(self, place: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype, values: Values) -> Tensor:
        """``empty`` and ``fill`` of a whole tensor."""
        self.fill(place, 0, values)
        return self.empty(place, shape, dtype)

    def small(self, place: tuple[Any, ...], value: Tensor) -> Tensor:
        """A tensor that is in memory."""
        self.nbytes += value.nbytes
        return self.tensor(place, tuple(value.shape), value.dtype, lambda: [value])

    def write(self, folder: Path, tell: Callable[[int], Any] | None, inert: Callable[[str, str], bool]) -> None:
        """Write the file.

        Args:
            folder: where.
            tell: called with the number of bytes after each stretch.
            inert: names in the tree's pickle beyond those of ``load_archive``.
        """
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Records have their full size and no bytes: holes, which read as zeros where no job fills them. Their CRC-32 is
        # not that of the values filled in: torch.load does not look at it, zipfile would.
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(self.tree, path)
        # Only the written file tells where torch.save put each record.
        skeleton = load_archive(path, inert)
        with open(path, "r+b") as stream:
            for place, begin, values in self._jobs:
                for written in _pour(stream, _at(skeleton, place), begin, values):
                    if tell is not None:
                        tell(written)
            stream.flush()
            os.fsync(stream.fileno())


def _at(tree: Any, place: tuple[Any, ...]) -> Stored:
    for key in place:
        tree = tree[key]
    stored: Stored = tree
    return stored


def _pour(stream: io.BufferedRandom, stored: Stored, begin: int, values: Values) -> Iterator[int]:
    for stretch in values():
        flat = stretch.to(stored.dtype).contiguous().view(-1)
        # The bytes behind it are those of the next record.
        if begin + flat.numel() > stored.numel:
            raise AssertionError(f"{stored.shape} was promised, more values were given")
        stream.seek(stored.offset + begin * stored.dtype.itemsize)
        stream.write(raw_bytes(flat))
        begin += flat.numel()
        yield flat.numel() * stored.dtype.itemsize
