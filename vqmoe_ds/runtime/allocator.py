"""Keeps glibc's malloc from returning large buffers to the system after every use, on CPU runs.

glibc maps a large buffer afresh at each allocation and unmaps it at each release (or trims the heap), so a training
step pays page faults for all activations and gradients again. Two ``mallopt`` calls keep the memory in the process.
"""

from __future__ import annotations

import ctypes
import os
import sys

from vqmoe_ds.runtime.device import uses_gpu

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_OTHER_MALLOCS = ("tcmalloc", "jemalloc", "mimalloc")


def tune_allocator() -> str | None:
    """Tell glibc to neither map large buffers one by one nor trim the heap; call it before the model is built.

    Returns:
        A sentence for the log, or None where nothing was changed: ``VQMOE_KEEP_MALLOC=1``, a GPU, another malloc
        (preloaded, or musl, macOS, Windows), or malloc options the user has set in the environment.
    """
    environment = os.environ
    if environment.get("VQMOE_KEEP_MALLOC") == "1" or not sys.platform.startswith("linux") or uses_gpu():
        return None
    chosen = any(name.startswith("MALLOC_") and name.endswith("_") for name in environment)
    if chosen or "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return None
    if any(name in environment.get("LD_PRELOAD", "") for name in _OTHER_MALLOCS):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallopt"):
        return None
    # Not M_MMAP_THRESHOLD: glibc refuses values above 32 MiB, and gradients of stacked experts are larger.
    if not libc.mallopt(_M_MMAP_MAX, 0) or not libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1):
        return None
    return "glibc malloc keeps large buffers for reuse (VQMOE_KEEP_MALLOC=1 leaves it alone)"
