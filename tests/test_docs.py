"""The documentation points at things that exist."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from vqmoe_ds.config.load import field_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_commands_name_files_that_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: link to {target}"
    for script in re.findall(r"(?:launchers|tools|benchmarks|ds_configs|tests)/[\w\-]+\.(?:py|json|sh|yaml)", text):
        assert (ROOT / script).exists(), f"{page.name}: {script}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_that_are_named_exist(page):
    known = {row[0] for row in field_table()}
    sections = {name.split(".")[0] for name in known} - {"model"}
    for section, field in re.findall(r"`(\w+)\.(\w+)[=`]", page.read_text()):
        if section in sections and field not in ("py", "sbatch", "yaml"):  # a file of that name
            assert f"{section}.{field}" in known, f"{page.name}: {section}.{field}"


def test_figures_of_the_readme_are_those_of_the_pages_that_show_how_they_were_measured():
    readme = (ROOT / "README.md").read_text("utf-8")
    results, performance = ((ROOT / "docs" / name).read_text("utf-8") for name in ("results.md", "performance.md"))
    intervals = re.findall(r"[+−][\d.]+ \[[^\]]+\]", readme)
    assert len(intervals) == 3 and all(interval in results for interval in intervals)
    speed = re.search(r"\*\*Speed\.\*\*(.*?)\n\n", readme, re.DOTALL)
    ratios = re.findall(r"\d\.\d\d", speed[1] if speed else "")
    assert len(ratios) == 5 and all(f"| {ratio} |" in performance for ratio in ratios)


def test_the_readme_begins_with_results_a_picture_and_five_lines():
    head, _, rest = (ROOT / "README.md").read_text("utf-8").partition("## Quick start")
    assert "![" in head and len(head.splitlines()) < 25
    commands = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("    ")]
    assert len(commands) == 5


def test_the_architecture_has_the_rooms_in_the_order_that_is_linted():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rooms = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    picture, _, page = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("## The rooms")
    assert re.findall(r"^    (\w+) {3,}", picture, re.MULTILINE) == rooms
    assert re.findall(r"^\*\*`(\w+)`\*\*", page, re.MULTILINE) == rooms


def test_the_glossary_names_files_that_exist():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (.+) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    files = [re.findall(r"^`([\w/]+\.py)`$", place) for term, _, place in rows if term not in ("term", "room")]
    assert len(files) > 25 and all(len(found) == 1 for found in files)
    for (file,) in files:
        assert (ROOT / "vqmoe_ds" / file).is_file(), file


def test_the_way_of_a_batch_names_functions_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    steps = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \| `([\w.]+)` \|", page, re.MULTILINE)
    assert len(steps) == 14
    for file, name in steps:
        scope = ast.parse((ROOT / "vqmoe_ds" / file).read_text("utf-8")).body
        for part in name.split("."):
            found = [node for node in scope if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
            assert found, f"{file} has no {name}"
            scope = found[0].body
