"""Building the kernel: kept in the cache, and every reason for which there is none is said."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vqmoe_ds.moe.kernels.build import why_no_kernel

_SHOW = "from vqmoe_ds.moe.kernels import build; build.load_kernel(); print(build.describe())"
_COUNT = """
import torch
from vqmoe_ds.moe.experts import StackedExperts
print(StackedExperts(32, 32, 2)(torch.ones(3, 32), torch.tensor([1, 3])).shape)
"""


def _python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.skipif(why_no_kernel() is not None, reason=str(why_no_kernel()))
def test_compiled_once_and_kept(tmp_path: Path) -> None:
    for _ in range(2):
        assert "compiled kernel" in _python(_SHOW, XDG_CACHE_HOME=str(tmp_path))
        kept = sorted((tmp_path / "vqmoe_ds").iterdir())
        assert [path.suffix for path in kept] == [".so"]
    before = kept[0].stat().st_mtime_ns
    _python(_SHOW, XDG_CACHE_HOME=str(tmp_path))
    assert kept[0].stat().st_mtime_ns == before


@pytest.mark.skipif(why_no_kernel() is not None, reason=str(why_no_kernel()))
def test_a_cache_that_cannot_be_made_costs_a_compilation_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    assert "compiled kernel" in _python(_SHOW, **environment)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left behind"


def test_switched_off() -> None:
    assert "PyTorch's own products: VQMOE_CPU_KERNEL=0" in _python(_SHOW, VQMOE_CPU_KERNEL="0")


@pytest.mark.skipif(why_no_kernel() is not None, reason=str(why_no_kernel()))
def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path) -> None:
    broken = _compiler(tmp_path, "echo no such flag >&2; exit 1")
    said = _python(f"{_SHOW}\n{_COUNT}", XDG_CACHE_HOME=str(tmp_path / "cache"), CXX=broken)
    assert "could not compile experts.cpp (no such flag)" in said
    assert "[3, 32]" in said, "the experts run all the same"
    assert list((tmp_path / "cache" / "vqmoe_ds").iterdir()) == []
