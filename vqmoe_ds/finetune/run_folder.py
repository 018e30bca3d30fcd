"""Run folder of a fine-tuning: its name, and what it must already hold to be gone on with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vqmoe_ds.config.deepspeed_json import EngineConfig
from vqmoe_ds.config.load import LoadedConfig
from vqmoe_ds.config.reading import read_yaml
from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.train.run_folder import first_free, has_run

SAME = {
    "finetune": (
        "checkpoint",
        "task",
        "text_key",
        "label_key",
        "classes",
        "holdout",
        "shots",
        "discrete",
        "trainable",
        "lora_rank",
        "pool",
    ),
    "train": ("seed",),
    "data": ("path",),
}
"""Fields that a run keeps for as long as its folder lives: others would mix its splits, or are of another model."""


def choose_run_dir(loaded: LoadedConfig, resume: str) -> Path:
    """The run folder as given; for the default name the first of ``NAME``, ``NAME-2`` … without a finished run.

    Raises:
        ConfigError: the folder that was asked for is in the way of ``--resume never``.
    """
    wanted, afresh = Path(loaded.config.run.run_dir), resume == "never"
    if "run.run_dir" not in loaded.explicit:
        return first_free(wanted, lambda f: os.path.exists(f / "summary.json") or (afresh and _used(f)))
    if afresh and _used(wanted):
        raise ConfigError(f"run folder {wanted} already holds a run; choose another --run_dir, or --resume auto")
    return wanted


def _used(folder: Path) -> bool:
    return has_run(folder) or _has_several(folder)


def _has_several(folder: Path) -> bool:
    return os.path.isdir(folder) and (any(folder.glob("seed-*")) or any(folder.glob("shots-*")))


def check_kind(folder: Path, several: bool) -> None:
    """Refuse a single run in the folder of several, or several in that of a single one.

    Raises:
        ConfigError: ``folder`` is of the other kind.
    """
    if has_run(folder) if several else _has_several(folder):
        there = "a single run" if several else "several runs (--seeds or --shots)"
        raise ConfigError(f"{folder} holds {there}, which this command is not; choose another --run_dir")


def is_finished(folder: Path) -> bool:
    """Whether a run has written its summary there, its last file."""
    try:
        # Written last and by one rename (BestReport): where it can be read, all else of the run is there.
        return json.loads((folder / "summary.json").read_text(encoding="utf-8")) is not None
    except (OSError, ValueError):
        return False


def check_finished(folder: Path, config: EngineConfig) -> None:
    """Refuse a folder that holds a finished run of another fine-tuning.

    Raises:
        ConfigError: it does.
    """
    if is_finished(folder):
        saved = read_yaml(str(folder / "config.yaml"), "configuration of a finished run")
        if not isinstance(saved, dict) or not all(isinstance(saved.get(section), dict) for section in SAME):
            raise ConfigError(f"{folder / 'config.yaml'} is no configuration of a run; choose another --run_dir")
        check_same(folder, saved, config)


def check_same(folder: Path, saved: dict[str, Any], config: EngineConfig) -> None:
    """Refuse a folder whose run differs in one of ``SAME``.

    Args:
        saved: configuration of the run in it.

    Raises:
        ConfigError: names the first field that differs.
    """
    run = config.run.model_dump(mode="json")
    for section, names in SAME.items():
        for name in names:
            theirs, ours = saved.get(section, {}).get(name), run[section][name]
            if theirs != ours:
                raise ConfigError(
                    f"{folder} holds another fine-tuning: {section}.{name}={theirs} there, {ours} here; "
                    "choose another --run_dir"
                )
