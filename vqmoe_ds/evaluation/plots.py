"""Figures of a run: the loss curve and the heat map of expert and code usage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def plot_loss(path: Path, rows: list[dict[str, Any]], target: str = "token") -> None:
    """Training and validation bits per byte (nats a ``target`` where bytes are unknown) against steps, as PNG."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4))
    unit, name, valid_name = "bits per byte", "bits_per_byte", "validation_bits_per_byte"
    if all(r.get(name) is None for r in rows):
        unit, name, valid_name = f"nats per {target}", "loss", "validation_loss"
    train = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
    valid = [(r["step"], r[valid_name]) for r in rows if r.get(valid_name) is not None]
    if train:
        axes.plot(*zip(*train, strict=True), label="training", linewidth=1)
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", label="validation", markersize=4)
    axes.set(xlabel="step", ylabel=unit, title="Loss")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


def plot_usage(path: Path, counts_LN: Tensor, usage_LK: Tensor | None) -> None:
    """``draw_usage`` as PNG."""
    save(draw_usage(counts_LN, usage_LK), path)


def draw_usage(counts_LN: Tensor, usage_LK: Tensor | None) -> Any:
    """Figure of the share of tokens by layer and expert, and by layer and code, each relative to its mean."""
    plt = pyplot()
    parts = [("expert", counts_LN)] + ([("code", usage_LK)] if usage_LK is not None else [])
    figure, all_axes = plt.subplots(len(parts), 1, figsize=(9, 2.4 * len(parts)), squeeze=False)
    for axes, (name, counts) in zip(all_axes[:, 0], parts, strict=True):
        relative = counts.double() / counts.double().mean(dim=1, keepdim=True).clamp_min(1e-9)
        image = axes.imshow(relative.numpy(), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        axes.set(xlabel=name, ylabel="MoE layer", title=f"Tokens by {name}, relative to the mean")
        axes.set_yticks(range(len(counts)))
        figure.colorbar(image, ax=axes)
    return figure


def plot_curves(path: Path, curves: dict[str, list[tuple[int, float, float]]], unit: str) -> None:
    """Lines of (step, mean, standard error) by name, the errors as bands, as PNG."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 5))
    shown = [value for points in curves.values() for _, value, _ in points[len(points) // 4 :]]
    for number, (name, points) in enumerate(curves.items()):
        steps, means, errors = np.array(points).T
        (line,) = axes.plot(steps, means, linewidth=1, label=name, linestyle=("-", "--", ":")[number // 10 % 3])
        axes.fill_between(steps, means - errors, means + errors, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="step", ylabel=f"training loss, {unit}")
    if shown:  # the first quarter is steep and would hide all differences
        axes.set_ylim(min(shown) * 0.99, max(shown) * 1.01)
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)
    save(figure, path)


def plot_differences(path: Path, rows: dict[str, dict[str, Any]], label: str) -> None:
    """Mean differences with their confidence intervals (``mean``, ``low``, ``high``) by name, as PNG."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(rows)))
    ordered = sorted(rows.items(), key=lambda item: -item[1]["mean"])
    for place, (_, row) in enumerate(ordered):
        low, high = (row["mean"] if row[end] is None else row[end] for end in ("low", "high"))
        axes.plot([low, high], [place, place], color="C0", linewidth=2)
        axes.plot(row["mean"], place, "o", color="C0", markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8)
    axes.set(xlabel=label)
    axes.grid(alpha=0.3, axis="x")
    save(figure, path)


def pyplot() -> Any:
    """Matplotlib, loaded at its first use and without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    figure.tight_layout()
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    pyplot().close(figure)
