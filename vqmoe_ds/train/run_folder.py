"""Folders of runs: names that are free, and places in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vqmoe_ds.checkpoint.whereabouts import INDEX_FOLDER
from vqmoe_ds.config.deepspeed_json import EngineConfig


def first_free(wanted: Path, taken: Callable[[Path], bool]) -> Path:
    """The first of ``NAME``, ``NAME-2``, … that is not taken."""
    number, folder = 1, wanted
    while taken(folder):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def in_folder(config: EngineConfig, folder: Path) -> EngineConfig:
    """The configuration of the run in a folder, which may be another than the one that was asked for."""
    output = config.run.run.model_copy(update={"run_dir": str(folder)})
    return replace(config, run=config.run.model_copy(update={"run": output}))


def has_run(folder: Path) -> bool:
    # Not Path.exists, which raises for a name that no folder can have: what makes the folder says so.
    return os.path.exists(folder / "metrics.jsonl") or os.path.exists(folder / "checkpoints")


def index_folder(config: EngineConfig, run_dir: Path) -> Path:
    """Folder in which the order of prepared data is kept, and data that are prepared when the run starts."""
    return Path(config.run.data.cache_dir or run_dir / INDEX_FOLDER)
