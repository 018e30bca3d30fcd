"""Figures of a run: the loss curve and the heat map of expert and code usage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor


def plot_loss(path: Path, rows: list[dict[str, Any]]) -> None:
    """Training and validation bits per byte (nats a token where bytes are unknown) against steps, as PNG."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4))
    unit, name, valid_name = "bits per byte", "bits_per_byte", "validation_bits_per_byte"
    if all(r.get(name) is None for r in rows):
        unit, name, valid_name = "nats per token", "loss", "validation_loss"
    train = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
    valid = [(r["step"], r[valid_name]) for r in rows if r.get(valid_name) is not None]
    if train:
        axes.plot(*zip(*train, strict=True), label="training", linewidth=1)
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", label="validation", markersize=4)
    axes.set(xlabel="step", ylabel=unit, title="Loss")
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_usage(path: Path, counts_LN: Tensor, usage_LK: Tensor | None) -> None:
    """Share of tokens by layer and expert, and by layer and code, each relative to its mean, as PNG."""
    plt = _pyplot()
    parts = [("expert", counts_LN)] + ([("code", usage_LK)] if usage_LK is not None else [])
    figure, all_axes = plt.subplots(len(parts), 1, figsize=(9, 2.4 * len(parts)), squeeze=False)
    for axes, (name, counts) in zip(all_axes[:, 0], parts, strict=True):
        relative = counts.double() / counts.double().mean(dim=1, keepdim=True).clamp_min(1e-9)
        image = axes.imshow(relative.numpy(), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        axes.set(xlabel=name, ylabel="MoE layer", title=f"Tokens by {name}, relative to the mean")
        axes.set_yticks(range(len(counts)))
        figure.colorbar(image, ax=axes)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    _pyplot().close(figure)
