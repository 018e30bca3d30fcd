"""English that is on every machine with Python: the standard library's own documentation.

Bytes, in this order: the texts of ``pydoc_data.topics`` (the language reference as ``help()`` shows it) by key, then
the docstrings of every module, class and function in the ``.py`` files of the standard library, by path and
position, tests and site-packages left out. Files are parsed, never imported, so the bytes depend on the Python
version alone. Texts are separated by one blank line; docstrings are dedented, and repeated ones kept once.
"""

from __future__ import annotations

import ast
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from vqmoe_ds.runtime.files import own_mark, user_cache, write_atomically

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__", "turtledemo"}


RECIPE = 1
"""Raised whenever the bytes change, so that no old cache file is read."""


def stdlib_text() -> bytes:
    """The corpus as UTF-8 bytes, 2.2 MB for CPython 3.11; built once (4 s) and kept in the user's cache folder."""
    name = f"stdlib-{platform.python_version()}-{RECIPE}.txt"
    try:
        return (user_cache() / name).read_bytes()
    except OSError:
        text = build_stdlib_text()
    try:
        kept = user_cache() / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, as all ranks of a machine may build it at once.
        temporary = kept.with_suffix(f".{own_mark()}.tmp")
        write_atomically(temporary, text)
        temporary.replace(kept)
    except OSError:  # no home, no room: build again next time
        pass
    return text


def build_stdlib_text() -> bytes:
    """Read the documentation out of the running Python, whatever the cache holds."""
    seen: set[str] = set()
    texts = []
    for text in _texts():
        cleaned = inspect.cleandoc(text).strip()
        if len(cleaned) >= 40 and cleaned not in seen:
            seen.add(cleaned)
            texts.append(cleaned)
    return "\n\n".join(texts).encode()


def _texts() -> Iterator[str]:
    from pydoc_data.topics import topics

    for key in sorted(topics):
        yield topics[key]
    root = Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    # rglob gives the order of the file system. _sysconfigdata is of one build, not of a version.
    for path in sorted(files, key=lambda p: p.as_posix()):
        if not _LEFT_OUT.intersection(path.parts) and not path.name.startswith("_sysconfigdata"):
            yield from _docstrings(root / path)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # As bytes, so that a coding line in the file is heeded.
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    # ast.walk goes level by level, not line by line.
    for node in sorted(nodes, key=lambda n: getattr(n, "lineno", 0)):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield text
