"""A page of headings, paragraphs, tables and pictures, as Markdown and as one HTML file."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path

from vqmoe_ds.evaluation.page import render

PAGE_WIDTH, LETTER, PADDING = 1100, 9, 20
"""Pixels of the text of a page, of a letter at most, and beside a cell (``templates/base.html``)."""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]

    def fitted(self) -> list[Table]:
        """Tables no wider than a page that have these columns between them, each with the first column.

        A column that is too wide by itself still gets its own.
        """
        widths = [LETTER * max(map(len, column)) + PADDING for column in zip(self.head, *self.rows, strict=True)]
        groups: list[list[int]] = [[0]]
        for column in range(1, len(widths)):
            wide = widths[column] + sum(widths[place] for place in groups[-1]) > PAGE_WIDTH
            if wide and len(groups[-1]) > 1:
                groups.append([0])
            groups[-1].append(column)
        return [
            Table([self.head[i] for i in group], [[row[i] for i in group] for row in self.rows]) for group in groups
        ]


@dataclass(frozen=True)
class Picture:
    """A PNG file beside the page."""

    file: str
    caption: str


Part = str | Heading | Table | Picture
"""A plain string is a paragraph."""


@dataclass
class Page:
    """Parts in order."""

    title: str
    parts: list[Part] = field(default_factory=list)

    def add(self, part: Part) -> None:
        self.parts.append(part)

    def markdown(self) -> str:
        return "\n\n".join([f"# {self.title}", *map(_markdown, self.parts)]) + "\n"

    def html(self, folder: Path) -> str:
        """Pictures, read from ``folder``, are inside the file; wide tables are shown in several parts."""
        files = [part.file for part in self.parts if isinstance(part, Picture)]
        figures = {file: base64.b64encode((folder / file).read_bytes()).decode() for file in files}
        shown = [piece for part in self.parts for piece in (part.fitted() if isinstance(part, Table) else [part])]
        parts = [(type(part).__name__, part) for part in shown]
        return render("comparison", {"title": self.title, "parts": parts}, figures)


def _markdown(part: Part) -> str:
    if isinstance(part, Heading):
        return f"## {part.text}"
    if isinstance(part, Picture):
        return f"![{part.caption}]({part.file})"
    if isinstance(part, Table):
        lines = [part.head, ["---"] * len(part.head), *part.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return part
