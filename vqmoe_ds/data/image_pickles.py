"""CIFAR-10's original pickles, read without running anything: listed opcodes, and inert stand-ins for three names."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.data.image_splits import bytes_of
from vqmoe_ds.data.units import first_line
from vqmoe_ds.runtime.errors import DataError, one_line

OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "SHORT_BINUNICODE", "BINUNICODE"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
}
"""Opcodes that arrays of bytes, lists and dicts are pickled with (protocols 2 to 4)."""
_MEMO = 1 << 20
"""Objects that a pickle may keep for later: more would be memory for the asking."""


def read_pickle(file: Path) -> Any:
    """Plain values and arrays of uint8 of a pickle; everything that it names is one of three inert stand-ins.

    Raises:
        DataError: it asks for anything else, or is damaged. Nothing of it is executed.
        OSError: the file cannot be read.
    """
    data = bytes_of(file)
    try:
        # Before anything is loaded: find_class refuses names, but no memo index that asks for gigabytes.
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in OPCODES or (opcode.name.endswith("PUT") and int(argument or 0) > _MEMO):
                raise pickle.UnpicklingError(f"it asks for {opcode.name}")
        # CIFAR-10 was pickled by Python 2, whose texts (keys, pixels) are bytes; ASCII, the default, fails on pixels.
        return _plain(_Arrays(io.BytesIO(data), encoding="bytes").load())
    except Exception as error:  # a pickle can raise anything
        raise DataError(
            f"{file} is refused: it is no pickle of images, or damaged ({first_line(error)}); nothing of it was "
            "executed"
        ) from None


class _Dtype:
    """Stand-in for ``numpy.dtype``."""

    def __init__(self, kind: Any, *_: Any) -> None:
        self.kind = kind.decode() if isinstance(kind, bytes) else kind

    def __setstate__(self, state: Any) -> None: ...


class _Array:
    """Stand-in for an array: (version, shape, type, order, bytes)."""

    state: Any = None

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand_ins = {
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy._core.multiarray", "_reconstruct"): _Array,
            ("numpy", "ndarray"): "ndarray",  # only named: nothing can call a text, or give it attributes
            ("numpy", "dtype"): _Dtype,
        }
        if (module, name) not in stand_ins:
            raise pickle.UnpicklingError(f"it asks for {one_line(f'{module}.{name}', 80)}")
        return stand_ins[module, name]


def _plain(value: Any) -> Any:
    """The top of a pickle with its stand-ins as arrays."""
    if isinstance(value, dict):
        return {key: _plain(entry) if isinstance(entry, _Array) else entry for key, entry in value.items()}
    if not isinstance(value, _Array):
        return value
    _, shape, kind, fortran, data = value.state
    if type(kind) is not _Dtype or kind.kind != "u1" or fortran or type(data) is not bytes:
        raise ValueError("an array that is not of bytes in C order")
    return np.frombuffer(data, np.uint8).reshape([int(n) for n in shape])
