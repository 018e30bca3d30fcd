"""Reading ``.pt`` files without executing anything from them, and without loading them.

A ``.pt`` file is a zip of one pickle and one raw, uncompressed record per storage. The pickle is read by an unpickler
that knows the dozen names and the few opcodes a checkpoint needs and maps each name to something inert; tensors come
back as ``Stored``, a place in a file, from which any stretch can be read later. Nothing is allocated because a file
asks for it: memory is bounded by the limits below, whatever the file says.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqmoe_ds.runtime.errors import CheckpointError
from vqmoe_ds.runtime.files import open_regular
from vqmoe_ds.runtime.memory import check_room

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
RECORDS = {
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
}

ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
"""Members of ``ZeroStageEnum`` of DeepSpeed 0.19.8."""

OPCODES = b"".join(
    [
        *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
        *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
        *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8, pickle.SHORT_BINBYTES, pickle.BINBYTES),
        *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
        *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
        *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID),
    ]
)
"""Opcodes that the pickles of ``torch.save`` are made of (protocols 2 to 4)."""

LONGEST_PICKLE = 8 << 20
"""Bytes of a pickle: some 40,000 tensors. Each byte costs up to about 100 bytes of objects."""
LONGEST_DIRECTORY = 32 << 20
"""Bytes of a zip's directory: some 300,000 storages."""
LARGEST_TREE = 10_000_000
"""Objects one meets on a walk through what a pickle holds; few that refer to each other can be met without end."""
DEEPEST_TREE = 100
MOST_DIMENSIONS = 64
_LARGE = 64 << 20  # bytes from which memory is asked about first


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
        if count * self.dtype.itemsize > _LARGE:  # a file may have holes of any size
            remedy = "use a machine with more, or another checkpoint"
            check_room(count * self.dtype.itemsize, f"a tensor of {self.path}", remedy, CheckpointError)
        out = torch.empty(count, dtype=self.dtype)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: Tensor) -> None:
        """Fill a flat tensor of the file's type with values from ``start`` on, which lie in memory order.

        Raises:
            CheckpointError: the file is shorter than it said, or cannot be read.
        """
        _read_bytes(self.path, self.offset + start * self.dtype.itemsize, out)

    def whole(self) -> Tensor:
        """The tensor in its own shape and type."""
        if self.stride is None:
            return self.read().view(self.shape)
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        values = Stored(self.path, self.offset, self.dtype, (span,)).read()
        return values.as_strided(self.shape, self.stride).contiguous()


def raw_bytes(flat: Tensor) -> memoryview:
    """The bytes of a flat tensor in memory order, without a copy."""
    # Through bytes, as NumPy has no bfloat16.
    return flat.view(torch.uint8).numpy().data


def _read_bytes(path: str, offset: int, out: Tensor) -> None:
    if not out.numel():
        return
    view = raw_bytes(out)
    try:
        with open_regular(path, links=True) as file:
            file.seek(offset)
            # A buffered readinto goes on after a short read (Linux gives 2 GiB at most): less is the end of the file.
            if file.readinto(view) < len(view):
                raise CheckpointError(f"{path} is cut short: copy it again, or take an earlier checkpoint")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


class Record:
    """Stands in for a small DeepSpeed object; holds what the pickle says of it and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def load_archive(path: Path, inert: Callable[[str, str], bool] = lambda module, name: False) -> Any:
    """The object a ``.pt`` file holds, with ``Stored`` for tensors and ``Record`` for DeepSpeed's objects.

    Args:
        path: the file.
        inert: further names ``(module, name)`` that become a ``Record`` instead of a refusal.

    Raises:
        CheckpointError: missing, damaged, or asking for a name that is not on the list.
    """
    try:
        # Before it is opened: opening a FIFO waits for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            records = _records(archive, file, os.path.getsize(path))
            pickles = [name for name in records if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(f"{path} is not a file that torch.save wrote")
            folder = pickles[0].removesuffix("data.pkl")
            if folder + "byteorder" in records and _small(archive, folder + "byteorder", 16) != b"little":
                raise CheckpointError(f"{path} was written on a big-endian machine, which is not supported")
            content = _small(archive, pickles[0], LONGEST_PICKLE)
        tree = _Unpickler(content, path, folder, records, inert).load()
        _measure(tree, path, {})
        return tree
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (zipfile.BadZipFile, EOFError):
        raise CheckpointError(f"{path} is cut short or is not a checkpoint file") from None
    except Exception as error:  # whatever a crafted pickle can bring about
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{path} is not a sound checkpoint file ({reason})") from None


class _Bounded(io.FileIO):
    """A file of which ``zipfile``, which believes what it reads, can ask no more than a directory at a time."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = max(0, os.fstat(self.fileno()).st_size - self.tell())
        if size > LONGEST_DIRECTORY:
            raise CheckpointError(f"{self.name} is refused: the directory of its records claims {size} bytes")
        return super().read(size)


def _small(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A record that is read into memory."""
    size = archive.getinfo(name).file_size
    if size > limit:
        raise CheckpointError(f"{archive.filename} is refused: its record {name[:200]} has {size} bytes")
    return archive.read(name)


def _measure(thing: Any, path: Path, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Objects met on a walk from ``thing`` on, and how deep it goes.

    Args:
        thing: of a tree that a pickle held.
        path: its file.
        known: answers by ``id``; (0, 0) while the answer is not known yet.

    Raises:
        CheckpointError: the tree is too large or too deep to be walked, or leads back into itself.
    """
    if type(thing) in (dict, OrderedDict):
        parts = list(thing.values())
    elif type(thing) in (list, tuple):
        parts = thing
    elif type(thing) is Record:
        parts = list(thing.__dict__.values())
    else:
        parts = []
    if not parts:
        return 1, 1
    if id(thing) not in known:
        known[id(thing)] = 0, 0
        size, depth = 1, 0
        for part in parts:
            more, below = _measure(part, path, known)
            size, depth = size + more, max(depth, below)
            if not more or size > LARGEST_TREE or depth >= DEEPEST_TREE:
                raise CheckpointError(f"{path} is refused: its pickle holds a tree without end; nothing was executed")
        known[id(thing)] = size, depth + 1
    return known[id(thing)]


def _records(archive: zipfile.ZipFile, file: Any, size: int) -> dict[str, tuple[int, int]]:
    """Name -> (offset, length) of every record; a local header repeats the name and adds padding."""
    places = {}
    for info in archive.infolist():
        file.seek(info.header_offset)
        header = file.read(30)
        # Not from the directory's lengths: torch.save aligns records by an extra field in their local headers alone.
        offset = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
        offset += int.from_bytes(header[28:30], "little")
        # A compressed record cannot be read from the middle, and may unpack to any size.
        if info.compress_type != zipfile.ZIP_STORED or offset + info.file_size > size:
            raise CheckpointError(f"{archive.filename}: record {info.filename} is compressed or of a mismatched size")
        places[info.filename] = (offset, info.file_size)
    return places


class _Unpickler(pickle._Unpickler):
    """The unpickler in Python: its memo is a dict, where the compiled one allocates whatever index a pickle names."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(
        self,
        content: bytes,
        path: Path,
        folder: str,
        records: dict[str, tuple[int, int]],
        inert: Callable[[str, str], bool],
    ) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.path, self.folder, self.records, self.inert = str(path), folder, records, inert
        self.functions: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): self._ordered,
            ("torch", "Size"): self._size,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): self._subclass,
            ("builtins", "getattr"): self._enum_member,
            ("__builtin__", "getattr"): self._enum_member,
        }

    # ------------------------------------------------------------------ names

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.functions:
            return self.functions[module, name]
        if (module, name) in RECORDS or self.inert(module, name):
            return Record
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise self._refuse(f"{module[:100]}.{name[:100]}")

    def _refuse(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is refused: its pickle asks for {what}, which no checkpoint needs; nothing of it was executed"
        )

    def _ordered(self) -> OrderedDict[Any, Any]:
        return OrderedDict()

    def _size(self, shape: Any) -> tuple[Any, ...]:
        return tuple(shape)

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data

    def _subclass(self, rebuild: Any, kind: Any, args: Any, state: Any) -> Any:
        if rebuild not in (self._tensor, self._parameter):
            raise pickle.UnpicklingError("it makes a tensor in an unknown way")
        return rebuild(*args)

    def _enum_member(self, owner: Any, name: Any) -> Record:
        """Stand-in for what early Python 3.11 (3.11.2 for one) writes for ``ZeroStageEnum(2)``: the member's name.

        Nothing else is looked up.
        """
        if owner is not Record or type(name) is not str or name not in ZERO_STAGES:
            raise self._refuse(f"an attribute {name[:100]!r}" if type(name) is str else "an attribute without a name")
        return Record(ZERO_STAGES[name])

    # ------------------------------------------------------------------ opcodes that call, or change an object

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        if function is not Record and function not in self.functions.values():
            raise pickle.UnpicklingError("it calls what is no function")
        self.stack[-1] = function(*args)

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if kind is not Record:
            raise pickle.UnpicklingError("it makes an object of an unknown kind")
        self.append(Record(*args))

    def load_build(self) -> None:
        """Sets attributes of a ``Record`` alone; those of an OrderedDict (a module's ``_metadata``) are left out."""
        state, thing = self.stack.pop(), self.stack[-1]
        if type(thing) is Record and type(state) is dict:
            thing.__dict__.update(state)
        elif type(thing) not in (Record, OrderedDict):
            raise pickle.UnpicklingError(f"it sets attributes of a {type(thing).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise pickle.UnpicklingError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, float, bool, type(None)):  # a tuple of tuples can take for ever to hash
                raise pickle.UnpicklingError(f"it uses a {type(key).__name__} as a key")
            target[key] = value

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError(f"it appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def load_long1(self) -> None:
        digits = self.read(self.read(1)[0])
        if len(digits) > 9:  # 64 bits and a sign
            raise pickle.UnpicklingError("it holds an integer of more than 64 bits")
        self.append(int.from_bytes(digits, "little", signed=True))

    # ------------------------------------------------------------------ tensors

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, int, int]:
        # The device that is named is passed over: values are read into the memory of the host.
        kind, dtype, key, _, numel = pid
        if (kind, type(key), type(numel)) != ("storage", str, int) or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it names a storage in an unknown way")
        offset, size = self.records[f"{self.folder}data/{key}"]
        if numel < 0 or numel * dtype.itemsize > size:
            raise CheckpointError(f"{self.path} is refused: size mismatch of storage {key[:100]}")
        return dtype, offset, numel

    def _tensor(self, storage: Any, start: int, shape: Any, stride: Any, *_: Any) -> Stored:
        dtype, offset, numel = storage
        shape, stride = tuple(shape), tuple(stride)
        numbers = (start, *shape, *stride)
        if len(shape) > MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise CheckpointError(f"{self.path} is refused: the shape or the strides of a tensor are not numbers")
        count = math.prod(shape)
        last = start + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if count else start
        # With strides of 0 few stored values could stand for more than any memory holds.
        if count and (last >= numel or count > numel):
            raise CheckpointError(f"{self.path} is refused: a tensor of shape {list(shape)} lies outside its storage")
        dense = not count or stride == _dense(shape) or all(n == 1 for n in shape)
        return Stored(self.path, offset + start * dtype.itemsize, dtype, shape, None if dense else stride)


# pickle looks an opcode up in this table of functions, not by a method's name: overriding a method alone changes
# nothing. An opcode that is not in it ends in a KeyError.
_Unpickler.dispatch = {
    code: getattr(_Unpickler, load.__name__) for code, load in pickle._Unpickler.dispatch.items() if code in OPCODES
}


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
