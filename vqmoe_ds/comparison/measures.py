"""What is read out of a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]

CLEAN = "clean"
EVALUATION = "evaluation.json"


def _worst_layer(rows: Rows, name: str, worst: Callable[..., Any]) -> float | None:
    """Mean over the second half of the run, layer by layer, and of these the worst."""
    values = [row[name] for row in rows if row.get(name)]
    return float(worst(np.mean(values[len(values) // 2 :], axis=0))) if values else None


HEALTH: dict[str, Callable[[Rows], float | None]] = {
    "tokens_per_second": lambda rows: float(np.median([row["tokens_per_second"] for row in rows])),
    "busiest_expert": lambda rows: _worst_layer(rows, "busiest_expert", np.max),
    "load_variation": lambda rows: _worst_layer(rows, "load_variation", np.max),
    "code_perplexity": lambda rows: _worst_layer(rows, "code_perplexity", np.min),
    "fluctuation": lambda rows: _worst_layer(rows, "fluctuation", np.max),
}
"""Measures beside the losses; those of routing are of the layer where they are worst."""


def losses(folder: Path) -> tuple[dict[str, float], str]:
    """Clean and corrupted losses of a run, and their unit: bits a byte, or nats a token where bytes are unknown."""
    summary = json.loads((folder / "summary.json").read_text())
    known = summary["validation_bits_per_byte"] is not None
    clean = summary["validation_bits_per_byte" if known else "validation_loss"]
    return {CLEAN: clean, **corrupted(folder, known)}, "bits/byte" if known else "nats/token"


def corrupted(folder: Path, in_bits: bool) -> dict[str, float]:
    """Losses on damaged text that ``launchers/evaluate.py`` left in the run folder, and their rise, by name."""
    file = folder / EVALUATION
    if not file.exists():
        return {}
    unit, values = "bits_per_byte" if in_bits else "nats_per_token", {}
    for row in json.loads(file.read_text())["corrupted"]:
        name = f"{row['kind']} {row['rate']:g}, {row['mode'].replace('_', ' ')}"
        values[name], values[f"{name}: rise"] = row["mean"][unit], row["mean"][f"{unit}_rise"]
    return values


def health(folder: Path) -> dict[str, float]:
    """The measures of ``HEALTH`` that the run has."""
    rows = [row for row in metrics(folder) if "tokens_per_second" in row]
    values = {name: measure(rows) for name, measure in HEALTH.items()} if rows else {}
    return {name: value for name, value in values.items() if value is not None}


def curve(folder: Path, in_bits: bool) -> dict[int, float]:
    """Training loss by step."""
    name = "bits_per_byte" if in_bits else "loss"
    return {row["step"]: row[name] for row in metrics(folder) if row.get(name) is not None}


def metrics(folder: Path) -> Rows:
    """The rows of ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
