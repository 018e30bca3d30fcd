"""Reading ``.pt`` files without executing anything from them, and without loading them.

A ``.pt`` file is a zip of one pickle and one raw, uncompressed record per storage. The pickle is read by an unpickler
that knows the dozen names a checkpoint needs and maps each to something inert; tensors come back as ``Stored``, a
place in a file, from which any stretch can be read later.
"""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqmoe_ds.errors import CheckpointError

STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DEEPSPEED_RECORDS = {
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
}

ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
"""Members of ``ZeroStageEnum`` of DeepSpeed 0.19.8."""


class Stored(NamedTuple):
    """A tensor that lies in a file; immutable, so that no pickle can bend it.

    ``offset`` is in bytes. ``stride`` is None where the values follow each other in memory order.
    """

    path: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        """``count`` values from ``start`` on, flat and in the file's type.

        Raises:
            CheckpointError: the file is shorter than it said.
        """
        count = self.numel - start if count is None else count
        if self.stride is not None:
            return self.whole().flatten()[start : start + count]
        out = torch.empty(count, dtype=self.dtype)
        _read_bytes(self.path, self.offset + start * self.dtype.itemsize, out)
        return out

    def whole(self) -> Tensor:
        """The tensor in its own shape and type."""
        if self.stride is None:
            return self.read().view(self.shape)
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        values = Stored(self.path, self.offset, self.dtype, (span,)).read()
        return values.as_strided(self.shape, self.stride).contiguous()


def raw_bytes(flat: Tensor) -> memoryview:
    """The bytes of a flat tensor in memory order, without a copy."""
    return flat.view(torch.uint8).numpy().data


def _read_bytes(path: str, offset: int, out: Tensor) -> None:
    if not out.numel():
        return
    view = raw_bytes(out)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while view:
                got = file.readinto(view)
                if not got:
                    raise CheckpointError(f"{path} is cut short: copy it again, or take an earlier checkpoint")
                view = view[got:]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


class Record:
    """Stands in for a small DeepSpeed object; holds what the pickle says of it and does nothing."""

    def __new__(cls, *args: Any) -> Record:
        record = super().__new__(cls)
        record.__dict__["args"] = args
        return record


def load_archive(path: Path, inert: Callable[[str, str], bool] = lambda module, name: False) -> Any:
    """The object a ``.pt`` file holds, with ``Stored`` for tensors and ``Record`` for DeepSpeed's objects.

    Args:
        path: the file.
        inert: further names ``(module, name)`` that become a ``Record`` instead of a refusal.

    Raises:
        CheckpointError: missing, damaged, or asking for a name that is not on the list.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            records = _records(archive, file, os.path.getsize(path))
            pickles = [name for name in records if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(f"{path} is not a file that torch.save wrote")
            folder = pickles[0].removesuffix("data.pkl")
            if folder + "byteorder" in records and archive.read(folder + "byteorder") != b"little":
                raise CheckpointError(f"{path} was written on a big-endian machine, which is not supported")
            with archive.open(pickles[0]) as stream:
                return _Unpickler(stream, path, folder, records, inert).load()
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (zipfile.BadZipFile, EOFError):
        raise CheckpointError(f"{path} is cut short or is not a checkpoint file") from None
    except Exception as error:  # whatever a crafted pickle can bring about
        raise CheckpointError(f"{path} is not a sound checkpoint file ({type(error).__name__}: {error})") from None


def _records(archive: zipfile.ZipFile, file: Any, size: int) -> dict[str, tuple[int, int]]:
    """Name -> (offset, length) of every record; a local header repeats the name and adds padding."""
    places = {}
    for info in archive.infolist():
        file.seek(info.header_offset)
        header = file.read(30)
        offset = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
        offset += int.from_bytes(header[28:30], "little")
        if info.compress_type != zipfile.ZIP_STORED or offset + info.file_size > size:
            raise CheckpointError(f"{archive.filename}: record {info.filename} is compressed or lies about its size")
        places[info.filename] = (offset, info.file_size)
    return places


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        stream: Any,
        path: Path,
        folder: str,
        records: dict[str, tuple[int, int]],
        inert: Callable[[str, str], bool],
    ) -> None:
        super().__init__(stream, encoding="utf-8")
        self.path, self.folder, self.records, self.inert = str(path), folder, records, inert

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, kind, args, state: rebuild(*args),
            ("torch", "Tensor"): Record,
            ("torch.nn.parameter", "Parameter"): Record,
        }
        if (module, name) in known:
            return known[module, name]
        if name == "getattr" and module in ("__builtin__", "builtins"):
            return self._enum_member
        if (module, name) in DEEPSPEED_RECORDS or self.inert(module, name):
            return Record
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f"{self.path} is refused: its pickle asks for {module}.{name}, which no checkpoint needs; "
            "nothing of it was executed"
        )

    def _enum_member(self, owner: Any, name: Any) -> Record:
        """What early releases of Python 3.11 (3.11.2 for one) write for ``ZeroStageEnum(2)``: the member's name.

        Nothing else is looked up.
        """
        if owner is not Record or name not in ZERO_STAGES:
            raise CheckpointError(
                f"{self.path} is refused: its pickle asks for an attribute {name!r}, which no checkpoint needs; "
                "nothing of it was executed"
            )
        return Record(ZERO_STAGES[name])

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, int, int]:
        kind, dtype, key, _, numel = pid
        offset, size = self.records[f"{self.folder}data/{key}"]
        if kind != "storage" or numel < 0 or numel * dtype.itemsize > size:
            raise CheckpointError(f"{self.path} is refused: storage {key} lies about its size")
        return dtype, offset, numel

    def _tensor(self, storage: Any, start: int, shape: Any, stride: Any, *_: Any) -> Stored:
        dtype, offset, numel = storage
        shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
        count = math.prod(shape)
        last = start + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if count else start
        if start < 0 or min((*shape, *stride), default=0) < 0 or (count and last >= numel):
            raise CheckpointError(f"{self.path} is refused: a tensor of shape {list(shape)} lies outside its storage")
        dense = not count or stride == _dense(shape) or all(n == 1 for n in shape)
        return Stored(self.path, offset + start * dtype.itemsize, dtype, shape, None if dense else stride)


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
