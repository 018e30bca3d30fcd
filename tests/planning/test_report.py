"""The figure of a plan."""

from __future__ import annotations

import pytest

from vqmoe_ds.evaluation.plots import pyplot
from vqmoe_ds.planning import report
from vqmoe_ds.planning.command import build_parser, main


@pytest.mark.parametrize("top", ["1", "12"])
def test_the_legend_covers_no_bar_and_no_line(top, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, path: drawn.append(figure))
    told = ["--gpus_per_node", "4", "--micro_batch", "2", "--top", top, "--figure", str(tmp_path / "plan.png")]
    assert main(build_parser("").parse_args(told)) == 0
    (figure,) = drawn
    figure.tight_layout()
    figure.canvas.draw()
    axes = figure.axes[0]
    box, area = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert box.y0 >= area.y1 and box.x0 >= 0 and box.x1 <= figure.axes[1].get_window_extent().x0
    title = figure._suptitle.get_window_extent()
    assert title.y0 >= box.y1 and title.y1 <= figure.bbox.height
    pyplot().close(figure)
