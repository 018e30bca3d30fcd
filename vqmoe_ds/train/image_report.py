"""The end of a training on images."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from vqmoe_ds.data.images import ImageSet
from vqmoe_ds.evaluation.classification import ClassScore, classify, judge, plot_confusion
from vqmoe_ds.evaluation.plots import NoPictures
from vqmoe_ds.models.session import Session
from vqmoe_ds.train.callbacks import FinalReport


class ImageReport(FinalReport):
    """``FinalReport`` of held-out images: accuracy, scores by class and the confusion matrix."""

    things, target = "images", "image"

    def _validate(self, session: Session, most: int) -> ClassScore:
        assert isinstance(self.windows, ImageSet)
        return classify(session, self.windows.evenly(most))

    def _about(self, score: ClassScore) -> dict[str, Any]:
        assert isinstance(self.windows, ImageSet)
        with suppress(NoPictures):  # said where the losses are drawn
            plot_confusion(self.run_dir / "confusion.png", score, self.windows.classes, "held-out images")
        found = judge(score, self.windows.classes, "images")
        return {**score.row(), **{f"validation_{name}": value for name, value in found.items()}}
