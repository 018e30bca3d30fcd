"""Compiles ``experts.cpp`` at its first use and keeps the library in the user's cache.

No headers of Python or PyTorch are needed, so it takes a C++ compiler and three seconds. Whatever is missing, training
goes on with PyTorch's own products (moe/products.py), and one sentence says why.

To load a library is to run it. So one is loaded only where nobody but this user and root can have put it: every folder
and link on the way to it is checked, and the file itself; and it ends with its own SHA-256, for a file that a full disk
cut short would end the process. Otherwise it is compiled anew, in a folder of this process where the cache is not safe.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

from vqmoe_ds.runtime.files import own_mark, user_cache

_SOURCE = Path(__file__).with_name("experts.cpp")
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-w"]
# By name and not -march=native: unlike machines may share a cache, and its file names do not tell them apart.
_FLAGS += [f"-m{name}" for name in ("fma", "avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512bf16")]
_TIMEOUT = 300  # seconds
_FUNCTIONS = [
    f"expert_{name}_{dtype}"
    for name in ("forward", "backward_rows", "backward_weights")
    for dtype in ("float32", "bfloat16")
]
_DIGEST = hashlib.sha256().digest_size
_MOST_LINKS = 40


class KernelUnavailable(Exception):
    """The compiled kernel cannot be used here; the message is a clause that says why."""


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


# A failure is kept as well: the compiler is tried once per process, not in every forward pass.
@functools.lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        compiler = _compiler()
        folder = _cache_folder()
        key = hashlib.sha256("\0".join([_SOURCE.read_text(encoding="utf-8"), compiler, *_FLAGS]).encode()).hexdigest()[
            :16
        ]
        library = folder / f"experts-{key}.so"
        return _cached(library) or _compile(compiler, library), None
    except (KernelUnavailable, OSError) as error:
        return None, str(error)


def _compiler() -> str:
    if os.environ.get("VQMOE_CPU_KERNEL") == "0":
        raise KernelUnavailable("VQMOE_CPU_KERNEL=0")
    if platform.machine() not in ("x86_64", "AMD64") or not torch.cpu._is_avx512_bf16_supported():
        raise KernelUnavailable("this processor has no AVX-512 with bfloat16")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise KernelUnavailable("there is no C++ compiler")
    return compiler


# ---------------------------------------------------------------- a safe folder


def _cache_folder() -> Path:
    """The user's cache, or a folder that lives as long as this process where others or nobody can write that.

    Raises:
        KernelUnavailable: others can change what lies in the folder for temporary files too.
    """
    try:
        folder = user_cache()
        # One by one: mkdir(parents=True) leaves the mode of parents to the umask, and a lax one makes the cache unsafe.
        for place in (*reversed(folder.parents), folder):
            if not place.exists():
                place.mkdir(mode=0o700, exist_ok=True)
        if os.access(folder, os.W_OK) and why_unsafe(folder) is None:
            return folder
    except OSError:
        pass
    private = tempfile.TemporaryDirectory(prefix="vqmoe_ds-", ignore_cleanup_errors=True)
    # This also keeps the object, at whose end the folder would go.
    atexit.register(private.cleanup)
    reason = why_unsafe(Path(private.name))
    if reason is not None:
        raise KernelUnavailable(f"a library could be replaced while it is loaded: {reason}")
    return Path(private.name)


def why_unsafe(path: Path) -> str | None:
    """Who else could change what lies at ``path``, as a clause; None where only this user and root can.

    Each folder on the way must belong to one of them and be writable by its owner alone. A sticky one (``/tmp``) will
    do above: nobody can rename or replace in it what is not theirs. Links are followed one by one.

    Raises:
        OSError: there is no such path, or it cannot be looked at.
    """
    path = Path.cwd() / path  # with its "..", which mean another folder behind a link
    trusted = {0, os.getuid(), os.stat("/").st_uid}  # the last is root's number in a container
    for _ in range(_MOST_LINKS):
        for place in (*reversed(path.parents), path):
            status = os.lstat(place)
            if status.st_uid not in trusted:
                return f"{place} belongs to another user"
            if stat.S_ISLNK(status.st_mode):
                path = place.parent / os.readlink(place) / path.relative_to(place)
                break
            shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if shared and (place == path or not status.st_mode & stat.S_ISVTX):
                return f"others can write {place}"
        else:
            return None
    return f"{path} is behind too many links"


# ---------------------------------------------------------------- making and opening it


def _cached(library: Path) -> ctypes.CDLL | None:
    """The library that this user or root compiled earlier; None where it is not there, was changed or does not load."""
    try:
        if why_unsafe(library) is not None or not stat.S_ISREG(os.lstat(library).st_mode):
            return None
        content = library.read_bytes()
        whole = hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]
        return _open(library) if whole else None
    except (KernelUnavailable, OSError):
        return None


def _open(library: Path) -> ctypes.CDLL:
    kernel = ctypes.CDLL(str(library))
    missing = [name for name in _FUNCTIONS if not hasattr(kernel, name)]
    if missing:
        raise KernelUnavailable(f"{library.name} was compiled without {missing[0]}")
    return kernel


def _compile(compiler: str, library: Path) -> ctypes.CDLL:
    """Compile to a temporary name, open, and rename: ranks may do so at the same time, a killed one leaves no half."""
    temporary = library.with_suffix(f".{own_mark()}.tmp")
    command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(temporary)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
        temporary.chmod(0o755)  # whatever the umask is
        digest = hashlib.sha256(temporary.read_bytes()).digest()
        with temporary.open("ab") as file:  # what follows the sections of a library is not looked at
            file.write(digest)
        # Before it gets its name, under which it would be loaded by others.
        kernel = _open(temporary)
        temporary.replace(library)
        return kernel
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise KernelUnavailable(f"{compiler} could not compile {_SOURCE.name} ({lines[0]})") from error
    except subprocess.TimeoutExpired as error:
        raise KernelUnavailable(f"{compiler} took more than {_TIMEOUT} s") from error
    finally:
        temporary.unlink(missing_ok=True)
