"""Hooks of mkdocs: files of the repository outside ``docs/`` that the pages link to become part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

OUTSIDE = {
    "README.md": "index.md",
    "tools/README.md": "commands.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/grids/routers.yaml": "grids/routers.yaml",
}
"""Path in the repository -> path in the site."""


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, content=(root / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, **context: Any) -> str:
    """The page, with links as they are in the site: ``docs/`` is its root."""
    for source, target in OUTSIDE.items():
        markdown = markdown.replace(f"](../{source})", f"]({target})")
    return re.sub(r"\]\((\.\./)?docs/", "](", markdown)
