"""Figures of runs and reports, with colours that the colour-blind tell apart."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vqmoe_ds.runtime.errors import ConfigError
from vqmoe_ds.runtime.extras import library

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito, Color Universal Design (2008); yellow last, for it is faint on white."""
LINES = ("-", "--", ":", "-.")
"""Line styles: the next one whenever the colours are used up."""


class NoPictures(ConfigError):
    """Matplotlib is not installed."""


@contextmanager
def drawing(say: Callable[[str], None]) -> Iterator[None]:
    """Context for drawing pictures; where Matplotlib is missing it says so, and they are left out."""
    try:
        yield
    except NoPictures as missing:
        say(f"pictures are left out: {missing}")


def plot_loss(path: Path, rows: list[dict[str, Any]], target: str = "token", data: str = "") -> None:
    """Training and validation bits per byte (nats per ``target`` where bytes are unknown) against steps, as PNG.

    Args:
        path: in the run folder, whose name is the title.
        rows: of ``metrics.jsonl``.
        target: unit that a loss is per.
        data: name of the training text, shown below the title.
    """
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
    axes.set(xlabel="step", ylabel=unit)
    told = textwrap.shorten(data, 180, placeholder=" …")
    axes.set_title("\n".join([_run_name(path.parent), *textwrap.wrap(told, 90)]), fontsize=9)
    if train or valid:
        axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


def _run_name(folder: Path) -> str:
    """The last two parts of a run folder's path: among several seeds, the last alone would say little."""
    return textwrap.shorten("/".join(folder.parts[-2:]), 90, placeholder=" …")


def draw_usage(counts_LN: Tensor, usage_LK: Tensor | None) -> Any:
    """Figure of the share of tokens by layer and expert, and by layer and code, each relative to its mean.

    White is the mean, red more and blue less; the deepest blue is a choice that no token takes.
    """
    plt = pyplot()
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    parts = [("expert", counts_LN)] + ([("code", usage_LK)] if usage_LK is not None else [])
    height = sum(1.2 + 0.3 * len(counts) for _, counts in parts)
    figure, all_axes = plt.subplots(len(parts), 2, figsize=(9, height), squeeze=False, width_ratios=(50, 1))
    for (axes, bar), (name, counts) in zip(all_axes, parts, strict=True):
        relative = counts.double() / counts.double().mean(dim=1, keepdim=True).clamp_min(1e-9)
        most = max(2.0, float(relative.max()) if relative.numel() else 0.0)
        # Its end must lie above its middle, which is why ``most`` is 2 at the least.
        norm = TwoSlopeNorm(1, 0, most)
        image = axes.imshow(relative.numpy(), aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
        axes.set(xlabel=name, ylabel="MoE layer", title=f"Tokens by {name}, relative to the mean")
        axes.set_yticks(range(len(counts)))
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        figure.colorbar(image, cax=bar, ticks=[0, 0.5, 1, (1 + most) / 2, most], format="{x:.2g}")
    return figure


def draw_spectra(models: list[dict[str, Any]]) -> Any:
    """Figure of the singular values of averaged Jacobians: a row per layer, a column per term, a line per checkpoint.

    Args:
        models: of a Jacobian report, each with its ``name`` and ``layers``.
    """
    terms, layers = ("total", "experts", "router"), max(len(model["layers"]) for model in models)
    head = 0.3 * (len(models) + 1)
    figure = pyplot().figure(figsize=(10, head + 2.4 * layers))
    grid = figure.add_gridspec(layers + 1, len(terms), height_ratios=[head, *[2.4] * layers])
    lines: dict[str, Any] = {}
    for layer in range(layers):
        for column, term in enumerate(terms):
            axes = figure.add_subplot(grid[layer + 1, column])
            for number, model in enumerate(models):
                found = model["layers"][layer][term]["singular_values"] if layer < len(model["layers"]) else ()
                values = [value for value in found if value > 0]
                if values:  # fixed routes have no router term
                    style = {"color": f"C{number}", "linestyle": LINES[number // len(OKABE_ITO) % len(LINES)]}
                    (lines[model["name"]],) = axes.semilogy(range(1, len(values) + 1), values, linewidth=1.5, **style)
            axes.set(title=f"layer {layer}, {term}", xlabel="index of the singular value", ylabel="singular value")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.grid(alpha=0.3)
    legend = figure.add_subplot(grid[0, :])
    legend.axis("off")
    legend.legend(lines.values(), lines.keys(), loc="center", fontsize=10, frameon=False)
    return figure


def plot_curves(path: Path, curves: dict[str, list[tuple[int, float, float]]], unit: str) -> None:
    """Lines of (step, mean, standard error) by name, the errors as bands, as PNG."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(10, 5))
    shown = [value for points in curves.values() for _, value, _ in points[len(points) // 4 :]]
    for number, (name, points) in enumerate(curves.items()):
        steps, means, errors = np.array(points).T
        style = LINES[number // len(OKABE_ITO) % len(LINES)]
        (line,) = axes.plot(steps, means, linewidth=1, label=name, linestyle=style)
        axes.fill_between(steps, means - errors, means + errors, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="step", ylabel=f"training loss, {unit}")
    if shown:  # the first quarter is steep and would hide all differences
        axes.set_ylim(min(shown) * 0.99, max(shown) * 1.01)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
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
    axes.set_ylim(-0.5, len(ordered) - 0.5)  # else the outer rows lie on the frame
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8)
    axes.set(xlabel=label)
    axes.grid(alpha=0.3, axis="x")
    save(figure, path)


def pyplot() -> Any:
    """Matplotlib, loaded at its first use and without a display, with the settings of all figures.

    No text is taken for a formula: names of runs, classes and files may have dollar signs.

    Raises:
        NoPictures: it is not installed.
    """
    os.environ["MPLBACKEND"] = "agg"  # another, even one that does not exist, would be loaded at the import
    library("matplotlib", "drawing", NoPictures).use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=OKABE_ITO)
    plt.rcParams["text.parse_math"] = False
    return plt


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    figure.tight_layout()
    # The suffix stays: by it Matplotlib chooses the format.
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    pyplot().close(figure)
