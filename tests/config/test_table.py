"""docs/config.md lists every field as the schema has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqmoe_ds.config import table
from vqmoe_ds.config.load import field_table

PAGE = Path(__file__).resolve().parents[2] / "docs/config.md"


def test_the_page_is_up_to_date():
    text = PAGE.read_text("utf-8")
    assert table.updated(text) == text, "run: python -m vqmoe_ds.config.table docs/config.md"


def test_every_field_has_a_row_of_four_cells():
    lines = [line for line in table.markdown().splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == [row.name for row in field_table()]
    assert {len(line.replace("\\|", "").split("|")) for line in lines} == {6}


def test_a_page_without_its_marks_is_left_alone():
    with pytest.raises(ValueError, match="fields: begin"):
        table.updated("no table here")
