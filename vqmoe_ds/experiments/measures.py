"""Figures read out of a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.runtime.errors import DataError, UserError, one_line, shown
from vqmoe_ds.runtime.files import read_small

Rows = list[dict[str, Any]]

CLEAN = "clean"
ERRORS = "% wrong"
"""Unit of classifiers of images."""
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


LARGEST_METRICS = 1 << 28
"""Bytes of a run's metrics that are read."""


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Context in which files of a run folder that hold anything else than a run writes are one sentence.

    Raises:
        DataError: it is.
    """
    try:
        yield
    # A reader further in has said what is wrong, and where, in a better sentence.
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(str(error), 200)}"
        raise DataError(f"the results in {folder} cannot be read ({reason}); make them again") from error


def read_json(path: Path) -> Any:
    """Content of a JSON file of a run.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read.
    """
    return json.loads(read_small(path))


def number(value: Any) -> float:
    """A number; of a run that diverged it may be infinite or NaN.

    Raises:
        ValueError: something else.
    """
    # By type, for True is an instance of int; bounded, for JSON has whole numbers that ``float`` cannot take.
    if type(value) not in (int, float) or (type(value) is int and abs(value) >= 1 << 63):
        raise ValueError(f"{shown(value)} is no number")
    return float(value)


def whole(value: Any) -> int:
    """A whole number.

    Raises:
        ValueError: something else.
    """
    if not number(value).is_integer():
        raise ValueError(f"{shown(value)} is no whole number")
    return int(value)


def losses(folder: Path) -> tuple[dict[str, float], str]:
    """Clean and damaged losses of a run, and their unit.

    Of text bits per byte, or nats per token where bytes are unknown; of images the share of errors in percent.
    """
    with readable(folder):
        summary = read_json(folder / "summary.json")
        if "validation_accuracy" in summary:
            return {CLEAN: _error(summary["validation_accuracy"]), **damaged_images(folder)}, ERRORS
        known = summary["validation_bits_per_byte"] is not None
        clean = number(summary["validation_bits_per_byte" if known else "validation_loss"])
        return {CLEAN: clean, **corrupted(folder, known)}, "bits/byte" if known else "nats/token"


def corrupted(folder: Path, in_bits: bool) -> dict[str, float]:
    """Losses on damaged text and other domains that ``launchers/evaluate.py`` left in a run folder, and their rise."""
    file = folder / EVALUATION
    if not file.exists():
        return {}
    unit, values = "bits_per_byte" if in_bits else "nats_per_token", {}
    recorded = read_json(file)
    for row in recorded["corrupted"]:
        # As ``evaluate.table`` names its rows.
        name = f"{row['kind']} {row['rate']:g}, {row['mode'].replace('_', ' ')}"
        values[name], values[f"{name}: rise"] = number(row["mean"][unit]), number(row["mean"][f"{unit}_rise"])
    for row in recorded.get("shifted", []):
        # Not by the path alone, which may be any name, ``clean`` among them.
        name = f"shift {row['text']}"
        values[name], values[f"{name}: rise"] = number(row[unit]), number(row[f"{unit}_rise"])
    return values


def damaged_images(folder: Path) -> dict[str, float]:
    """Errors on damaged and attacked images in percent, means of groups of damage, and their rise, by name."""
    file = folder / EVALUATION
    if not file.exists():
        return {}
    recorded, accuracies = read_json(file), dict[str, list[float]]()
    clean, by_kind = _error(recorded["clean"]["accuracy"]), dict[tuple[str, str], list[float]]()
    for row in recorded["corrupted"]:
        by_kind.setdefault((row["group"], row["kind"]), []).append(number(row["accuracy"]))
    # Severities first: a kind that was scored at more of them weighs no more.
    for (group, _), some in by_kind.items():
        for name in (group, "all damage"):
            accuracies.setdefault(name, []).append(float(np.mean(some)))
    for row in recorded["attacked"]:
        accuracies[f"{row['attack']} {row['eps']:g}/255"] = [row["accuracy"]]
    errors = {name: _error(float(np.mean([number(value) for value in some]))) for name, some in accuracies.items()}
    return {key: value for name, e in errors.items() for key, value in ((name, e), (f"{name}: rise", e - clean))}


def _error(accuracy: Any) -> float:
    return 100 * (1 - number(accuracy))


def health(folder: Path) -> dict[str, float]:
    """The measures of ``HEALTH`` that the run has."""
    with readable(folder):
        rows = [row for row in metrics(folder) if "tokens_per_second" in row]
        values = {name: measure(rows) for name, measure in HEALTH.items()} if rows else {}
        return {name: value for name, value in values.items() if value is not None}


def curve(folder: Path, in_bits: bool) -> dict[int, float]:
    """Training loss by step."""
    name = "bits_per_byte" if in_bits else "loss"
    with readable(folder):
        rows = [row for row in metrics(folder) if row.get(name) is not None]
        return {whole(row["step"]): number(row[name]) for row in rows}


def metrics(folder: Path) -> Rows:
    """The rows of ``metrics.jsonl``."""
    rows = [json.loads(line) for line in read_small(folder / "metrics.jsonl", LARGEST_METRICS).decode().splitlines()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("metrics.jsonl has rows that are no objects")
    return rows
