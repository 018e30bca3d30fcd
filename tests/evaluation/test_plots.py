"""What figures say: names, numbers and units on them, and colours that the colour-blind tell apart."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from vqmoe_ds.evaluation import classification, page, plots
from vqmoe_ds.evaluation.classification import ClassScore, plot_confusion
from vqmoe_ds.evaluation.page import data_uri


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, kept open."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    monkeypatch.setattr(classification, "save", lambda figure, path: figures.append(figure))
    yield figures
    plots.pyplot().close("all")


def test_the_loss_names_its_run_and_data(drawn, tmp_path):
    rows = [{"step": step, "bits_per_byte": 8 / step, "validation_bits_per_byte": 9 / step} for step in (1, 2)]
    folder = tmp_path / "costs_$5" / "seed-$1"
    plots.plot_loss(folder / "loss.png", rows, data="my text, 12 bytes")
    (axes,) = drawn[0].axes
    assert axes.get_title() == "costs_$5/seed-$1\nmy text, 12 bytes"
    assert [line.get_color() for line in axes.lines] == list(plots.OKABE_ITO[:2])
    plots.plot_loss(folder / "loss.png", [], data="words " * 10_000)
    drawn[1].tight_layout()
    width = drawn[1].axes[0].title.get_window_extent().width
    assert width < drawn[1].bbox.width, "nothing is cut off"


@pytest.mark.parametrize(
    "counts_LN", [torch.tensor([[1, 3], [2, 2]]), torch.tensor([[0, 90, 0, 0]]), torch.zeros(2, 4)]
)
def test_usage_is_white_at_the_mean_and_fills_its_width(counts_LN):
    figure = plots.draw_usage(counts_LN, counts_LN)
    assert len(figure.axes) == 4, "two maps and their bars"
    image = figure.axes[0].images[0]
    assert image.cmap(image.norm(1.0)) == pytest.approx(image.cmap(0.5))
    assert float(image.norm(0.0)) == 0 and float(image.norm(image.norm.vmax)) == 1
    assert image.norm.vmax >= image.get_array().max()
    figure.tight_layout()
    figure.canvas.draw()
    right = max(axes.get_tightbbox().x1 for axes in figure.axes)
    assert right > 0.97 * figure.bbox.width, "no empty margin"
    plots.pyplot().close(figure)


def test_spectra_have_labelled_axes_and_one_legend():
    terms = {"total": [2.0, 1.0, 0.5], "experts": [1.0, 0.1, 0.0], "router": [0.0, 0.0, 0.0]}
    layer = {name: {"singular_values": values} for name, values in terms.items()}
    models = [{"name": "one_$a$", "layers": [layer] * 2}, {"name": "two_$b$", "layers": [layer]}]
    figure = plots.draw_spectra(models)
    legends = [axes for axes in figure.axes if axes.get_legend() is not None]
    assert [text.get_text() for text in legends[0].get_legend().get_texts()] == ["one_$a$", "two_$b$"]
    assert len(legends) == 1 and not legends[0].axison, "over no line"
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == 6
    assert {axes.get_xlabel() for axes in panels} == {"index of the singular value"}
    assert {axes.get_ylabel() for axes in panels} == {"singular value"}
    assert [len(axes.lines) for axes in panels] == [2, 2, 0, 1, 1, 0]
    figure.canvas.draw()
    shown = [label.get_text() for axes in panels for label in axes.get_yticklabels()]
    assert not any("$" in text for text in shown), "no formula as text"
    assert data_uri(figure).startswith("data:image/png")


@pytest.mark.parametrize("count", [2, 3, 13])
def test_a_confusion_matrix_shows_counts_and_its_whole_title(count, drawn, tmp_path):
    truth = np.array([0, 0, 0, 0, 1, 1])
    score = ClassScore(0.5, truth, np.array([0, 0, 0, 1, 1, 1]), np.full(6, 0.75))
    plot_confusion(tmp_path / "confusion.png", score, [f"${n}_$" for n in range(count)])
    figure, axes = drawn[0], drawn[0].axes[0]
    cells = [text.get_text() for text in axes.texts]
    names = [label.get_text() for label in axes.get_yticklabels()]
    if count == 2:
        assert cells == ["3", "1", "0", "2"]
    if count == 13:
        assert not cells and names[:3] == ["$0_$ (4)", "$1_$ (2)", "$2_$ (0)"]
    assert axes.get_title() == "6 test texts\naccuracy 83.33%"
    figure.tight_layout()
    figure.canvas.draw()
    box = axes.title.get_window_extent()
    assert box.x0 > 0 and box.x1 < figure.bbox.width and box.y1 < figure.bbox.height


def test_more_lines_than_colours_differ_in_their_style(drawn, tmp_path):
    curves = {f"entry {n}": [(1, 2.0, 0.1), (2, 1.0, 0.1)] for n in range(20)}
    plots.plot_curves(tmp_path / "curves.png", curves, "bits/byte")
    (axes,) = drawn[0].axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 20
    drawn[0].tight_layout()
    drawn[0].canvas.draw()
    legend, area = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert legend.x0 > area.x1 and legend.x1 <= drawn[0].bbox.width, "beside the lines, and whole"


def test_rows_of_differences_lie_within_the_frame(drawn, tmp_path):
    rows = {name: {"mean": mean, "low": mean - 0.1, "high": None} for name, mean in (("a", 0.2), ("b", -0.3))}
    plots.plot_differences(tmp_path / "differences.png", rows, "bits/byte")
    (axes,) = drawn[0].axes
    low, high = axes.get_ylim()
    assert (low, high) == (-0.5, 1.5) and list(axes.get_yticks()) == [0, 1], "half a row above and below"


def test_ranks_by_layer_lie_within_the_frame():
    def part(rank: float) -> dict[str, object]:
        return {"effective_rank": rank, "expert": {"between_share": rank / 200}}

    layers = [{"collapse": {"before": part(rank), "after": part(rank), "output": part(rank)}} for rank in (90.0, 97.0)]
    for axes in page._draw_collapse(layers).axes:
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1.05 * axes.dataLim.ymax


def test_a_backend_that_does_not_exist_is_not_asked_for(tmp_path):
    code = "import sys; from vqmoe_ds.evaluation.plots import plot_loss; from pathlib import Path\n"
    code += "plot_loss(Path(sys.argv[1]), [{'step': 1, 'bits_per_byte': 8}])"
    environ = {**os.environ, "MPLBACKEND": "module://nowhere"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "loss.png"], env=environ, check=True)
    assert (tmp_path / "loss.png").is_file()
