"""Compiles ``experts.cpp`` at its first use and keeps the library in the user's cache.

No headers of Python or PyTorch are needed, so it takes a C++ compiler and three seconds. Whatever is missing, training
goes on with PyTorch's own products (moe/products.py), and one sentence says why.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("experts.cpp")
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-w"]
_FLAGS += [f"-m{name}" for name in ("fma", "avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512bf16")]
_TIMEOUT = 300  # seconds


class KernelUnavailable(Exception):
    """Why the compiled kernel cannot be used here, as a clause."""


def load_kernel() -> ctypes.CDLL | None:
    """The library of ``experts.cpp``, compiled if need be; None where it cannot be used (``why_no_kernel``)."""
    return _load()[0]


def why_no_kernel() -> str | None:
    """The reason for which ``load_kernel`` gave None, as a clause; None if there is a kernel."""
    return _load()[1]


def describe() -> str:
    """A sentence for the log: what computes the experts on this CPU."""
    reason = why_no_kernel()
    if reason is None:
        return "experts run in the compiled kernel (VQMOE_CPU_KERNEL=0 leaves them to PyTorch)"
    return f"experts run in PyTorch's own products: {reason}"


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return ctypes.CDLL(str(_library())), None
    except (KernelUnavailable, OSError) as error:
        return None, str(error)


def _library() -> Path:
    if os.environ.get("VQMOE_CPU_KERNEL") == "0":
        raise KernelUnavailable("VQMOE_CPU_KERNEL=0")
    if platform.machine() not in ("x86_64", "AMD64") or not torch.cpu._is_avx512_bf16_supported():
        raise KernelUnavailable("this processor has no AVX-512 with bfloat16")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise KernelUnavailable("there is no C++ compiler")
    key = hashlib.sha256("\0".join([_SOURCE.read_text(), compiler, *_FLAGS]).encode()).hexdigest()[:16]
    library = _cache_folder() / f"experts-{key}.so"
    if not library.exists():
        _compile(compiler, library)
    return library


def _cache_folder() -> Path:
    """The user's cache, or a folder that lives as long as this process where that cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqmoe_ds"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    private = tempfile.TemporaryDirectory(prefix="vqmoe_ds-", ignore_cleanup_errors=True)
    atexit.register(private.cleanup)
    return Path(private.name)


def _compile(compiler: str, library: Path) -> None:
    """Compile to a temporary name and rename: ranks may do so at the same time, a killed one leaves no half file."""
    temporary = library.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(temporary)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
        temporary.replace(library)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise KernelUnavailable(f"{compiler} could not compile {_SOURCE.name} ({lines[0]})") from error
    except subprocess.TimeoutExpired as error:
        raise KernelUnavailable(f"{compiler} took more than {_TIMEOUT} s") from error
    finally:
        temporary.unlink(missing_ok=True)
