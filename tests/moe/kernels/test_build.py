"""Building the kernel: kept in the cache, and every reason for which there is none is said."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from vqmoe_ds.moe.kernels.build import KernelUnavailable, _cached, _compile, why_no_kernel, why_unsafe

_SHOW = "from vqmoe_ds.moe.kernels import build; build.load_kernel(); print(build.describe())"
_COUNT = """
import torch
from vqmoe_ds.moe.experts import StackedExperts
print(StackedExperts(32, 32, 2)(torch.ones(3, 32), torch.tensor([1, 3])).shape)
"""


def _python(code: str, start: Any = warm.run, **environment: str) -> str:
    place = {**os.environ, **environment}
    done = start([sys.executable, "-c", code], env=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


_needs_kernel = pytest.mark.skipif(why_no_kernel() is not None, reason=str(why_no_kernel()))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library as it is kept, whose name every cache on this machine has for it."""
    folder = tmp_path_factory.mktemp("compiled")
    assert "compiled kernel" in _python(_SHOW, subprocess.run, XDG_CACHE_HOME=str(folder))
    [library] = folder.glob("vqmoe_ds/*")
    return library


@pytest.fixture(scope="module")
def quick(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that makes the library as the real one did, and sooner."""
    return _compiler(tmp_path_factory.mktemp("quick"), f'for last; do :; done; cat {compiled} > "$last"')


def test_the_temporary_name_tells_host_and_process(tmp_path: Path) -> None:
    compiler = _compiler(tmp_path, 'for last; do :; done; echo "$last" >&2; exit 1')
    with pytest.raises(KernelUnavailable, match=rf"experts-1\.{socket.gethostname()}\.{os.getpid()}\.tmp"):
        _compile(compiler, tmp_path / "experts-1.so")


@_needs_kernel
def test_compiled_once_and_kept(compiled: Path) -> None:
    before = compiled.stat().st_mtime_ns
    assert "compiled kernel" in _python(_SHOW, XDG_CACHE_HOME=str(compiled.parent.parent))
    assert compiled.suffix == ".so" and list(compiled.parent.iterdir()) == [compiled]
    assert compiled.stat().st_mtime_ns == before


@_needs_kernel
def test_a_cache_that_cannot_be_made_costs_a_compilation_only(quick: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path), "CXX": quick}
    assert "compiled kernel" in _python(_SHOW, **environment)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left behind"


def test_switched_off() -> None:
    assert "PyTorch's own products: VQMOE_CPU_KERNEL=0" in _python(_SHOW, VQMOE_CPU_KERNEL="0")


@_needs_kernel
def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path) -> None:
    broken = _compiler(tmp_path, "echo no such flag >&2; exit 1")
    said = _python(f"{_SHOW}\n{_COUNT}", XDG_CACHE_HOME=str(tmp_path / "cache"), CXX=broken)
    assert "could not compile experts.cpp (no such flag)" in said
    assert "[3, 32]" in said, "the experts run all the same"
    assert list((tmp_path / "cache" / "vqmoe_ds").iterdir()) == []


# ---------------------------------------------------------------- libraries of somebody else

_needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
_STRANGER = 54321


def _hostile(folder: Path, trap: Path) -> bytes:
    """A library that leaves a mark when it is loaded and has none of our functions, with a checksum that fits."""
    source = folder / "hostile.c"
    source.write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void run(void) {{ fclose(fopen("{trap}", "w")); }}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(folder / "hostile.so")], check=True)
    content = (folder / "hostile.so").read_bytes()
    return content + hashlib.sha256(content).digest()


@pytest.fixture(scope="module")
def name(quick: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a library of the quick compiler."""
    folder = tmp_path_factory.mktemp("name")
    assert "compiled kernel" in _python(_SHOW, XDG_CACHE_HOME=str(folder), CXX=quick)
    [library] = folder.glob("vqmoe_ds/*.so")
    return library.name


@pytest.fixture
def planted(name: str, tmp_path: Path) -> tuple[Path, Path]:
    """A cache in which a hostile library has our name, and where its mark would be."""
    library = tmp_path / "cache" / "vqmoe_ds" / name
    library.parent.mkdir(mode=0o700, parents=True)
    library.write_bytes(_hostile(tmp_path, tmp_path / "executed"))
    library.chmod(0o755)
    return library, tmp_path / "executed"


def _shared_file(library: Path) -> None:
    library.chmod(0o775)


def _shared_folder(library: Path) -> None:
    library.parent.chmod(0o777)


def _shared_above(library: Path) -> None:
    library.parent.parent.chmod(0o770)


def _link(library: Path) -> None:
    library.rename(library.with_suffix(".other"))
    library.symlink_to(library.with_suffix(".other"))
    library.parent.chmod(0o777)


def _link_above(library: Path) -> None:
    """The cache is a link into a folder that others can write."""
    folder = library.parent
    shared = folder.parent.parent / "shared"
    shared.mkdir()
    folder.rename(shared / "theirs")
    folder.symlink_to(shared / "theirs")
    shared.chmod(0o777)


def _strangers_file(library: Path) -> None:
    os.chown(library, _STRANGER, -1)


def _strangers_folder(library: Path) -> None:
    os.chown(library.parent, _STRANGER, -1)


_OTHERS = [_shared_file, _shared_folder, _shared_above, _link, _link_above]


@_needs_kernel
@pytest.mark.parametrize(
    "how", [*_OTHERS, *(pytest.param(how, marks=_needs_root) for how in (_strangers_file, _strangers_folder))]
)
def test_a_library_that_others_can_have_put_there_is_not_loaded(
    how: Callable[[Path], None], planted: tuple[Path, Path]
) -> None:
    library, trap = planted
    how(library)
    assert _cached(library) is None
    assert not trap.exists()


@_needs_kernel
def test_the_mark_tells_a_library_that_was_loaded(planted: tuple[Path, Path]) -> None:
    assert _cached(planted[0]) is None, "it has none of our functions"
    assert planted[1].exists(), "in a folder of this user alone it is this user's"


@_needs_kernel
def test_beside_a_shared_cache_it_is_compiled_anew(planted: tuple[Path, Path], quick: str, tmp_path: Path) -> None:
    _shared_folder(planted[0])
    said = _python(f"{_SHOW}\n{_COUNT}", XDG_CACHE_HOME=str(tmp_path / "cache"), TMPDIR=str(tmp_path), CXX=quick)
    assert not planted[1].exists()
    assert "compiled kernel" in said and "[3, 32]" in said
    assert not list(tmp_path.glob("vqmoe_ds-*")), "nothing is left behind"


@_needs_kernel
def test_nowhere_safe_is_a_clause(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    said = _python(_SHOW, XDG_CACHE_HOME=str(tmp_path / "shared"), TMPDIR=str(tmp_path / "shared"))
    assert f"could be replaced while it is loaded: others can write {tmp_path / 'shared'}" in said


@_needs_kernel
@pytest.mark.parametrize("damage", ["half", "a bit", "nothing", "text"])
def test_a_damaged_library_is_not_loaded(damage: str, compiled: Path, tmp_path: Path) -> None:
    whole = bytearray(compiled.read_bytes())
    library = tmp_path / compiled.name
    library.write_bytes(whole)
    assert _cached(library) is not None
    library.unlink()  # to write into a file that is mapped ends this process at its exit
    if damage == "a bit":
        whole[len(whole) // 2] ^= 1
    library.write_bytes({"half": whole[: len(whole) // 2], "a bit": whole, "nothing": b"", "text": b"text"}[damage])
    assert _cached(library) is None


@_needs_kernel
def test_our_own_library_without_our_functions_is_compiled_anew(
    planted: tuple[Path, Path], quick: str, tmp_path: Path
) -> None:
    assert "[3, 32]" in _python(_COUNT, XDG_CACHE_HOME=str(tmp_path / "cache"), CXX=quick)
    assert b"expert_forward_float32" in planted[0].read_bytes()


@_needs_kernel
def test_a_compiler_that_makes_something_else_is_a_clause(tmp_path: Path) -> None:
    (tmp_path / "empty.c").write_text("")
    script = f'for last; do :; done; cc -shared -fPIC {tmp_path}/empty.c -o "$last"'
    said = _python(f"{_SHOW}\n{_COUNT}", XDG_CACHE_HOME=str(tmp_path / "cache"), CXX=_compiler(tmp_path, script))
    assert "was compiled without expert_forward_float32" in said and "[3, 32]" in said
    assert list((tmp_path / "cache" / "vqmoe_ds").iterdir()) == []


@_needs_kernel
def test_a_lax_umask_still_gives_a_cache_that_is_taken(quick: str, tmp_path: Path) -> None:
    lax, cache = f"import os; os.umask(0)\n{_SHOW}", str(tmp_path / "a/b")
    assert "compiled kernel" in _python(lax, XDG_CACHE_HOME=cache, CXX=quick)
    [library] = (tmp_path / "a/b/vqmoe_ds").iterdir()
    assert _cached(library) is not None


def test_a_sticky_folder_will_do_above_but_not_as_the_cache(tmp_path: Path) -> None:
    (tmp_path / "sticky" / "cache").mkdir(mode=0o700, parents=True)
    (tmp_path / "sticky").chmod(0o1777)
    assert why_unsafe(tmp_path / "sticky" / "cache") is None
    assert why_unsafe(tmp_path / "sticky") == f"others can write {tmp_path / 'sticky'}"


def test_links_are_followed_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "safe").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "shared" / "way").symlink_to(tmp_path / "safe")
    (tmp_path / "direct").symlink_to(tmp_path / "safe")
    (tmp_path / "detour").symlink_to(tmp_path / "shared" / "way")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    assert why_unsafe(tmp_path / "safe") is None
    assert why_unsafe(tmp_path / "direct") is None
    assert why_unsafe(tmp_path / "direct" / ".." / "safe") is None
    assert why_unsafe(tmp_path / "detour") == f"others can write {tmp_path / 'shared'}", "though it ends in a safe one"
    assert "too many links" in str(why_unsafe(tmp_path / "ring"))
    with pytest.raises(OSError):
        why_unsafe(tmp_path / "nothing")
