"""Reports for a person: one HTML file with its figures inside, and the same numbers as JSON beside it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from vqmoe_ds.evaluation.plots import draw_usage, pyplot
from vqmoe_ds.runtime.errors import ConfigError, reports_errors
from vqmoe_ds.runtime.files import make_folder, write_atomically, write_json


@reports_errors
def make_report(
    name: str,
    out: str,
    measure: Callable[[], dict[str, Any]],
    draw: Callable[[dict[str, Any]], dict[str, Any]],
    summary: Callable[[dict[str, Any]], str],
) -> int:
    """Measure, write ``NAME.json`` and ``NAME.html`` and print a summary, or what is wrong; the exit code of a tool.

    Args:
        name: of the files and of the template, "routing" or "jacobian".
        out: folder of the files, made where it is not there.
        measure: gives the numbers; its ``UserError`` is printed as one sentence. Under ``pictures`` it may put URIs
            for the page alone.
        draw: makes figures of the numbers, by the names that the template has for them.
        summary: of the numbers, for the console.
    """
    folder = Path(out)
    pyplot()  # without which there is no page
    new = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    with _writable(folder):
        # Before the measurement, which may take minutes.
        make_folder(folder)
    try:
        report = measure()
    except BaseException:
        with suppress(OSError):  # what another process has put there meanwhile stays
            for place in new:
                place.rmdir()
        raise
    pictures = report.pop("pictures", {})
    figures = pictures | {title: data_uri(figure) for title, figure in draw(report).items()}
    with _writable(folder):
        write_json(folder / f"{name}.json", report)
        write_atomically(folder / f"{name}.html", render(name, report, figures))
    print(f"{summary(report)}\n{folder / name}.html")
    return 0


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written ({error.strerror}); choose another folder") from None


def render(name: str, report: dict[str, Any], figures: dict[str, Any]) -> str:
    """The page of a report; everything in it is escaped, token texts above all."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Strict: a name that a template has wrong is an error, not an empty cell.
    environment = Environment(
        loader=PackageLoader("vqmoe_ds.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["number"] = _number
    return environment.get_template(f"{name}.html").render(report=report, figures=figures)


def _number(value: float | None, digits: int = 3) -> str:
    # ``z``: what rounds to zero from below has no minus.
    return "–" if value is None else f"{value:z.{digits}f}"


def data_uri(figure: Any) -> str:
    """A figure as a PNG inside a URI; the figure is closed."""
    stream = io.BytesIO()
    figure.tight_layout()
    figure.savefig(stream, format="png", dpi=100)
    pyplot().close(figure)
    return png_uri(stream.getvalue())


def png_uri(png: bytes) -> str:
    """A PNG inside a URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


# ---------------------------------------------------------------- figures of a routing report


def routing_figures(report: dict[str, Any]) -> dict[str, Any]:
    layers = report["layers"]
    counts_LN = torch.tensor([row["experts"]["counts"] for row in layers])
    usage_LK = torch.tensor([row["codes"]["counts"] for row in layers]) if "codes" in layers[0] else None
    return {
        "load": draw_usage(counts_LN, usage_LK),
        "information": _draw_information(layers),
        "collapse": _draw_collapse(layers),
    }


def _draw_information(layers: list[dict[str, Any]]) -> Any:
    """Bars by layer: how much of the expert, and of the code, each label explains."""
    choices = list(layers[0]["information"])
    figure, all_axes = pyplot().subplots(1, len(choices), figsize=(4.5 * len(choices), 3), squeeze=False, sharey=True)
    for axes, choice in zip(all_axes[0], choices, strict=True):
        labels = list(layers[0]["information"][choice])
        for place, label in enumerate(labels):
            values = [row["information"][choice][label]["explained"] or 0.0 for row in layers]
            left = [layer + (place - len(labels) / 2 + 0.5) * 0.8 / len(labels) for layer in range(len(layers))]
            axes.bar(left, values, 0.8 / len(labels), label=label)
        axes.set(xlabel="MoE layer", title=f"share of the {choice} explained", xticks=range(len(layers)))
        axes.grid(alpha=0.3, axis="y")
    all_axes[0][0].legend(fontsize=7)
    return figure


def _draw_collapse(layers: list[dict[str, Any]]) -> Any:
    """Effective ranks by layer, and between-class shares of the stream before and after the layer."""
    figure, (ranks, shares) = pyplot().subplots(1, 2, figsize=(9, 3))
    for name in ("before", "after", "output"):
        ranks.plot([row["collapse"][name]["effective_rank"] for row in layers], "o-", label=name)
    for name in ("before", "after"):
        shares.plot([row["collapse"][name]["expert"]["between_share"] for row in layers], "o-", label=name)
    ranks.set(title="effective rank")
    shares.set(title="variance between experts' tokens")
    for axes in (ranks, shares):
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax or 1)  # else the highest points lie on the frame
        axes.set(xlabel="MoE layer", xticks=range(len(layers)))
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    return figure
