"""Imports of large libraries, which are nearly all that a start costs (docs/reliability.md)."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quickly() -> Iterator[None]:
    """Inside, for imports alone, Python does not look for garbage: it would walk all modules again and again.

    Nor does it afterwards: what is there after an import counts as permanent (``gc.freeze``).
    """
    known, looking = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looking:
            gc.enable()
        if looking and len(sys.modules) > known:
            gc.freeze()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, ``torch.compile`` returns functions as they are (PyTorch's own switch), and Inductor is not imported."""
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
