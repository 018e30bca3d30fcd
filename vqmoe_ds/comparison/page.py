"""A page of headings, paragraphs, tables and pictures, as Markdown and as one HTML file."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path

from vqmoe_ds.evaluation.page import render


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]


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
        """Pictures, read from ``folder``, are inside the file."""
        files = [part.file for part in self.parts if isinstance(part, Picture)]
        figures = {file: base64.b64encode((folder / file).read_bytes()).decode() for file in files}
        parts = [(type(part).__name__, part) for part in self.parts]
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
