"""Pages: wide tables in parts."""

from __future__ import annotations

import re

from vqmoe_ds.experiments.page import LETTER, PADDING, PAGE_WIDTH, Page, Table


def test_a_wide_table_is_shown_in_parts_that_fit_and_repeat_the_first_column(tmp_path):
    head = ["entry", *(f"word_swap 0.025, inputs and targets: rise {n}" for n in range(7)), "x" * 400]
    table = Table(head, [["codes", *("+0.0390 [+0.0010, +0.0750]" for _ in head[1:])]])
    page = Page("wide", [table])
    shown = [re.findall(r"<th>(.*?)</th>", text) for text in page.html(tmp_path).split("<table>")[1:]]
    assert [part[0] for part in shown] == ["entry"] * len(shown) and len(shown) > 3
    assert [name for part in shown for name in part[1:]] == head[1:]
    for part in shown[:-1]:
        assert sum(LETTER * len(name) + PADDING for name in part) <= PAGE_WIDTH
    assert shown[-1] == ["entry", "x" * 400], "too wide by itself"
    assert page.markdown().count("| entry |") == 1, "whole in Markdown"


def test_a_narrow_table_stays_whole():
    table = Table(["entry", "clean"], [["codes", "1.0"], ["top-2", "2.0"]])
    assert table.fitted() == [table]
