"""Results of several runs of one command: means over seeds, a table, and a curve over shots."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqmoe_ds.evaluation.plots import NoPictures, pyplot, save
from vqmoe_ds.evaluation.statistics import Mean, mean_of
from vqmoe_ds.runtime.files import write_atomically, write_json

MEASURES = {
    "test_accuracy": ("test accuracy", ".2%"),
    "test_macro_f1": ("test macro-F1", ".4f"),
    "test_loss": ("test loss", ".4f"),
    "validation_accuracy": ("validation accuracy", ".2%"),
    "validation_loss": ("validation loss", ".4f"),
    "validation_bits_per_byte": ("validation bits/byte", ".4f"),
    "best_step": ("best step", ".0f"),
    "tokens_per_second": ("tokens/s", ".0f"),
}
"""Numbers of a run's summary that are averaged: title and layout."""


def write_report(folder: Path, names: list[str]) -> list[str]:
    """``summary.json``, ``table.md`` and, for several numbers of shots, ``shots.png``; returns the table's lines.

    Args:
        folder: of all runs.
        names: of their folders inside it, all finished.
    """
    summaries = [json.loads((folder / name / "summary.json").read_text(encoding="utf-8")) for name in names]
    groups: dict[int, list[dict[str, Any]]] = {}
    for summary in summaries:
        groups.setdefault(summary["finetune"]["shots"], []).append(summary)
    means = {shots: average(group) for shots, group in sorted(groups.items())}
    rows = [
        {"shots": shots, "seeds": [s["seed"] for s in groups[shots]], **{k: vars(m) for k, m in found.items()}}
        for shots, found in means.items()
    ]
    first = summaries[0]
    facts = {name: first[name] for name in ("task", "router", "parameters", "layout", "finetune")}
    write_json(folder / "summary.json", {**facts, "runs": names, "rows": rows})
    lines = table(means)
    write_atomically(folder / "table.md", "\n".join(lines) + "\n")
    if len(means) > 1:
        with suppress(NoPictures):  # which every run has said
            plot_shots(folder / "shots.png", means)
    return lines


def average(summaries: list[dict[str, Any]]) -> dict[str, Mean]:
    """Mean and standard error over seeds of every measure that all runs have."""
    found = {}
    for name in MEASURES:
        values = [float(summary[name]) for summary in summaries if summary.get(name) is not None]
        if len(values) == len(summaries):
            found[name] = mean_of(values)
    return found


def table(means: dict[int, dict[str, Mean]]) -> list[str]:
    """Markdown: a row for each number of shots."""
    names = [name for name in MEASURES if all(name in found for found in means.values())]
    head = ["texts a class", "seeds", *(MEASURES[name][0] for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for shots, found in means.items():
        seeds = next(iter(found.values())).seeds
        cells = [str(shots or "all"), str(seeds), *(found[name].show(MEASURES[name][1]) for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot_shots(path: Path, means: dict[int, dict[str, Mean]]) -> None:
    """Test accuracy, with its standard error, over the number of training texts of each class, as PNG."""
    figure, axes = pyplot().subplots(figsize=(7, 4))
    draw_means(axes, {shots: found["test_accuracy"] for shots, found in means.items()})
    over_shots(axes, list(means))
    axes.grid(alpha=0.3)
    save(figure, path)


def draw_means(axes: Any, means: dict[int, Mean], label: str | None = None) -> None:
    """A line through means over seeds, with their standard errors."""
    found = means.values()
    errors = [mean.error or 0.0 for mean in found]
    axes.errorbar(list(means), [mean.mean for mean in found], yerr=errors, marker="o", capsize=3, label=label)


def over_shots(axes: Any, shots: list[int]) -> None:
    """Names and scales the axes of an accuracy over the training texts of each class."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(number) for number in shots])
    axes.set(xlabel="training texts of each class", ylabel="test accuracy")
