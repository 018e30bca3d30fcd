"""Notice of operators that DeepSpeed compiles for minutes at their first use, and removal of locks left by a kill.

A build that was killed leaves its lock file (``torch.utils.file_baton``), for which every later one waits for ever.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqmoe_ds.runtime.errors import ConfigError

_ON_DEVICE = {"adam": "fused_adam", "adamw": "fused_adam", "lamb": "fused_lamb", "lion": "fused_lion"}
_ON_HOST = {"adam": "cpu_adam", "adamw": "cpu_adam", "adagrad": "cpu_adagrad", "lion": "cpu_lion"}
_SHARED = ("nfs", "lustre", "beegfs", "gpfs", "ceph", "fuse", "glusterfs", "afs", "9p")
"""Prefixes of the types of file systems that other hosts may write, too."""
_LONGEST = 900.0
"""Seconds that a build takes, at most."""


def operator_of(values: dict[str, Any]) -> str | None:
    """The operator that the optimizer of a DeepSpeed JSON needs; None: it is PyTorch's."""
    optimizer = values["optimizer"]
    offload = values.get("zero_optimization", {}).get("offload_optimizer") or {}
    if optimizer.get("params", {}).get("torch_adam"):
        return None
    table = _ON_HOST if offload.get("device", "none") != "none" else _ON_DEVICE
    return table.get(str(optimizer["type"]).lower())


def before_compiling(values: dict[str, Any]) -> str | None:
    """Break the lock of a build that was killed; a sentence if there is something to compile."""
    name = operator_of(values)
    if name is None:
        return None
    from torch.utils.cpp_extension import _get_build_directory

    # PyTorch's own answer: its version of CUDA, that of Python and TORCH_EXTENSIONS_DIR are in it.
    folder = Path(_get_build_directory(name, False))
    if (folder / f"{name}.so").exists():
        return None
    _break_stale_lock(folder)
    torchs = ' ("torch_adam": true in optimizer.params takes PyTorch\'s, which needs none)' if "adam" in name else ""
    return f"DeepSpeed compiles its {name} in {folder}, which takes some minutes, once{torchs}"


def check_nvme(values: dict[str, Any], path: str) -> None:
    """Refuse to offload to a disk where DeepSpeed's operator for it cannot be compiled.

    Args:
        values: DeepSpeed JSON.
        path: of it, for the sentence.

    Raises:
        ConfigError: libaio is not there.
    """
    zero = values.get("zero_optimization", {})
    if "nvme" not in [(zero.get(name) or {}).get("device") for name in ("offload_optimizer", "offload_param")]:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            f"DeepSpeed config {path}: to offload to nvme DeepSpeed compiles its async_io, which needs libaio with its "
            "headers (libaio-dev or libaio-devel) and a compiler; install them, or offload to cpu"
        )


def _break_stale_lock(folder: Path) -> None:
    lock = folder / "lock"
    # Mostly there is none, and every rank comes here: another may have removed it in between.
    with suppress(OSError):
        age = time.time() - lock.stat().st_mtime
        if age > _LONGEST or (not _is_shared(folder) and not _is_built_in(folder)):
            lock.unlink()


def _is_built_in(folder: Path) -> bool:
    """Whether a process of this host works there, as ninja does; of those that may be looked at."""
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if cwd.samefile(folder):
                return True
    return False


def _is_shared(folder: Path) -> bool:
    # Where nothing is known the folder counts as shared: another host may be compiling in it.
    best, kind = "", "nfs"
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
            place, of = line.split()[1:3]
            if len(place) > len(best) and folder.resolve().is_relative_to(place):
                best, kind = place, of
    return kind.startswith(_SHARED)
