"""docs/tutorial.md as one shell script, and as a notebook: ``python -m tests.tutorial`` writes docs/tutorial.ipynb."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs/tutorial.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")

_BLOCK = re.compile(r"((?:^    .*\n|^\n(?=    ))+)", re.MULTILINE)
START = """\
# In the folder of the repository, with the programs of this kernel's environment.
import os
import sys

os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
if not os.path.exists("launchers"):
    os.chdir("..")"""


def parts(page: str) -> list[str]:
    """Text and indented blocks of a page in turns, beginning with text; the blocks without their indentation."""
    found = _BLOCK.split(page)
    found[1::2] = [re.sub("^    ", "", block, flags=re.MULTILINE).lstrip("\n") for block in found[1::2]]
    return found


def script(page: str) -> str:
    """Every block of a page, as one shell script."""
    return "\n".join(parts(page)[1::2])


def notebook(page: str) -> dict[str, Any]:
    """A page as a notebook: a cell for every stretch of text, and one that bash runs for every block."""
    cells = []
    for place, part in enumerate(parts(page)):
        if place % 2:
            cells.append(_cell("code", f"%%bash -eu\n{part.rstrip()}", len(cells)))
        elif part.strip():
            cells.append(_cell("markdown", part.strip(), len(cells)))
        if not place:
            cells.append(_cell("code", START, len(cells)))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _cell(kind: str, source: str, number: int) -> dict[str, Any]:
    more = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source.splitlines(True), **more}


def written(page: str) -> str:
    """The notebook's file."""
    return json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(written(PAGE.read_text("utf-8")), encoding="utf-8")
