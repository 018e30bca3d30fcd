"""megatron-core's indices in ``data.cache_dir``: verified before they are taken, and read without its pickles.

A finished index is a folder of arrays (``.npy``) and texts with a sidecar, which has the size and SHA-256 of each file
and a checksum of itself. The checksums find damage; whoever may write the folder can forge them, and then decides the
order of the data, but nothing more: no file is read that could hold anything but numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.data.arrays import mapped_array
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.files import own_mark, read_small, sha256_of, write_atomically
from vqmoe_ds.runtime.lock import has_ended

SIDECAR = "sealed.json"
FORMAT = 1
_LONGEST_SIDECAR = 16 << 20
_SILENT = 600
"""Seconds for which nothing has been written where no process is at work."""

Shapes = dict[str, list[tuple[int, ...]]]
"""End of a file's name (``shuffle_index``) -> the shapes of all arrays so named."""


def read_array(path: str | Path, **_: Any) -> np.ndarray:
    """An array of numbers, mapped from a ``.npy`` file: ``numpy.load`` as megatron-core calls it, that knows no pickle.

    Raises:
        DataError: anything else.
        OSError: the file cannot be read.
    """
    try:
        # The cache holds files of its own: a link would have what lies elsewhere taken for an index.
        return mapped_array(path, links=False)
    except ValueError as error:
        sentence = f"{path} is not an array of numbers ({error}); remove its folder, and it is made again"
        raise DataError(sentence, local=True) from None


def work_folder(final: Path) -> Path:
    """A new folder beside ``final`` to make it in; what is there already is removed, and what a kill left behind."""
    # Beside it, since a rename stays within one file system.
    work = final.with_name(f".{final.name}.{own_mark()}")
    of_this_host = final.parent.glob(f".{final.name}.{socket.gethostname()}.*")
    for stale in (final, work, *filter(_left_behind, of_this_host)):
        shutil.rmtree(stale, ignore_errors=True)
    work.mkdir(parents=True)  # ours: what others put there would be taken for an index
    return work


def _left_behind(work: Path) -> bool:
    """Whether a folder that ``work_folder`` made on this host is of a process that has ended."""
    pid = work.suffix[1:]
    if not pid.isdecimal() or not has_ended({"host": socket.gethostname(), "pid": pid}):
        return False
    # Containers may share the name of their host and not its processes: theirs still write.
    try:
        return all(time.time() - path.stat().st_mtime > _SILENT for path in (work, *work.iterdir()))
    except OSError:
        return False


def seal(folder: Path) -> None:
    """Write the sidecar of a folder whose files are finished."""
    # Files need not be flushed to disk: what a power cut takes of them no longer has its checksum, and the folder is
    # made again.
    files = {path.name: [path.stat().st_size, sha256_of(path)] for path in sorted(folder.iterdir())}
    write_atomically(folder / SIDECAR, json.dumps({"format": FORMAT, "files": files, "sha256": _digest(files)}))


def publish(work: Path, final: Path) -> bool:
    """Seal a folder whose files are finished and give it its name, and whether it has it: it goes where something is
    there already, such as what another run with the same cache made.

    Raises:
        OSError: it cannot be written.
    """
    # Sealed before it is renamed: under its final name a folder is whole, whenever the process is killed.
    seal(work)
    try:
        work.rename(final)
    except OSError:
        shutil.rmtree(work, ignore_errors=True)
        return False
    return True


def why_unsound(folder: Path, shapes: Shapes) -> str | None:
    """A clause on why an index must be made again; None where every file is as it was sealed and of ``shapes``."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is not there"
    try:
        # Before anything is opened: lstat neither follows links nor waits for FIFOs.
        if any(not stat.S_ISREG(os.lstat(path).st_mode) for path in folder.iterdir()):
            return "it holds more than files"
        files = _sealed_files(folder)
        if files is None or {*files, SIDECAR} != {path.name for path in folder.iterdir()}:
            return f"its files are not those that {SIDECAR} names"
        found: Shapes = {}
        for name, entry in files.items():
            if entry != [os.path.getsize(folder / name), sha256_of(folder / name)]:
                return f"{name} was altered"
            if name.endswith(".npy"):
                array = read_array(folder / name)
                if array.dtype.kind not in "iu":
                    return f"{name} holds other things than whole numbers"
                found.setdefault(name.removesuffix(".npy").rpartition("-")[2], []).append(array.shape)
    except (OSError, DataError) as error:
        return str(error)
    # Sorted: names begin with megatron-core's hashes, so which of several arrays belongs to which corpus is not known.
    if {name: sorted(some) for name, some in found.items()} != {name: sorted(some) for name, some in shapes.items()}:
        return "it is of other data"
    return None


def _sealed_files(folder: Path) -> dict[str, Any] | None:
    """The sidecar's entry for each file; None where it is missing or damaged."""
    try:
        sidecar = json.loads(read_small(folder / SIDECAR, _LONGEST_SIDECAR))
        files = sidecar["files"]
        known = sidecar["format"] == FORMAT and sidecar["sha256"] == _digest(files)
        return files if known and isinstance(files, dict) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
