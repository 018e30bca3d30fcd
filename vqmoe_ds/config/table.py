"""The table of all fields in docs/config.md: ``python -m vqmoe_ds.config.table docs/config.md`` writes it anew."""

from __future__ import annotations

import sys
from pathlib import Path

from vqmoe_ds.config.load import FieldRow, field_table
from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.runtime.files import write_atomically

BEGIN, END = "<!-- fields: begin -->", "<!-- fields: end -->"
"""Lines between which the table stands."""


def markdown() -> str:
    """A table for each section: name, default of the schema, unit and meaning of every field."""
    rows, parts = field_table(), []
    for section, info in RunConfig.model_fields.items():
        about = (info.annotation.__doc__ or "").splitlines()[0] if info.annotation else ""
        lines = [f"**{section}**: {_escaped(about)}", "", "| field | default | unit | meaning |", "|---|---|---|---|"]
        lines += [_line(row) for row in rows if row.name.startswith(f"{section}.")]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(row: FieldRow) -> str:
    return f"| `{row.name}` | {_escaped(row.default)} | {row.unit} | {_escaped(row.told)} |"


def _escaped(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


def updated(page: str) -> str:
    """A page with the table of today between ``BEGIN`` and ``END``.

    Raises:
        ValueError: it does not have both.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_atomically(target, updated(target.read_text("utf-8")))
