"""Text files are read and written as UTF-8, whatever the locale of the machine is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [path for folder in ("vqmoe_ds", "tools", "launchers", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
MODES = set("rwaxt+")


def _without_encoding(source: str) -> Iterator[int]:
    """Lines of calls that open a text file in the encoding of the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(each.arg in ("encoding", None) for each in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        asked = {each.arg: each.value for each in node.keywords}
        if name in ("read_text", "write_text") and len(node.args) == (name == "write_text"):
            yield node.lineno
        if name == "open":
            yield from _opened_as_text(node, asked, isinstance(node.func, ast.Attribute))


def _opened_as_text(node: ast.Call, asked: dict[str | None, ast.expr], method: bool) -> Iterator[int]:
    places = node.args if method else node.args[1:]
    modes = [asked["mode"]] if "mode" in asked else places[:1]
    written = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    is_mode = [mode for mode in written if set(mode) <= MODES]
    if is_mode or (not modes and not (method and asked)):
        yield node.lineno


@pytest.mark.parametrize(
    "line",
    ["p.read_text()", "p.write_text(x)", "open(p)", "open(p, 'w')", "p.open()", "p.open(mode='a')"],
)
def test_what_is_found(line: str) -> None:
    assert list(_without_encoding(line)) == [1]


@pytest.mark.parametrize(
    "line",
    [
        "p.read_text('utf-8')",
        "p.write_text(x, encoding='utf-8')",
        "open(p, 'rb')",
        "p.open('r+b')",
        "os.open(p, flags)",
    ],
)
def test_what_is_not(line: str) -> None:
    assert not list(_without_encoding(line))


def test_every_text_file_has_its_encoding_named() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in _without_encoding(path.read_text("utf-8"))
    ]
    assert not found
