"""Accuracy of a classifier of images.

Legend: C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from vqmoe_ds.checkpoint.load_model import LoadedModel
from vqmoe_ds.data.image_files import are_images
from vqmoe_ds.data.images import DecodedWhenRead, ImageSet, open_images
from vqmoe_ds.evaluation.classification import Scoring, judge
from vqmoe_ds.evaluation.evaluate import about_model
from vqmoe_ds.runtime.errors import ConfigError, DataError

TOGETHER = 128
"""Images of a forward pass."""


@dataclass
class ImageEvaluation:
    """Results of an evaluation, ready for JSON.

    Attributes:
        model: checkpoint, step, router and sizes.
        setting: data and split.
        clean: images, loss in nats, accuracy, macro-F1, scores by class, and the confusion matrix ``[C, C]`` (true by
            predicted class).
    """

    model: dict[str, Any]
    setting: dict[str, Any]
    clean: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """Figures for the user."""
        clean, model = self.clean, self.model
        worst, score = min(clean["by_class"].items(), key=lambda entry: entry[1]["recall"])
        return [
            f"{model['checkpoint']}, step {model['step']}: {model['router']}, {model['experts']} experts",
            f"{clean['images']:,} images of {self.setting['images']}, {len(clean['by_class'])} classes",
            f"accuracy {clean['accuracy']:.2%}, loss {clean['loss']:.4f} nats, macro-F1 {clean['macro_f1']:.4f}; "
            f"the hardest class is {worst}, of which {score['recall']:.2%} are found",
        ]


def refuse_images(loaded: LoadedModel, data: Sequence[str] | None) -> None:
    """Refuse images for a model of text, which would read their files as text.

    Raises:
        DataError: they are.
    """
    for path in data or ():
        if are_images(path):
            raise DataError(
                f"{path} holds images, and {loaded.path} is a model of text; give text, or a model of images"
            )


def open_split(loaded: LoadedModel, data: Sequence[str] | None, split: str) -> tuple[ImageSet, str]:
    """The images to score, and their name for the user.

    Args:
        data: one path; None: the run's own.
        split: ``valid``: the test set, or what is held out where there is none; ``all``: of images without a test set
            all; ``auto``: ``all`` of such images that are named, else ``valid``.

    Raises:
        ConfigError: several paths, or ``all`` of images that have a test set.
        DataError: as ``open_images``, or other classes than the model's.
    """
    config = loaded.config
    if data is not None:
        if len(data) > 1:
            raise ConfigError("--data takes one file or folder of images")
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": data[0]})})
    found = open_images(config)
    files = found.files
    if files.classes != config.data.classes:
        raise DataError(
            f"images {files.name} are of other classes ({', '.join(files.classes[:3])}, …) than {loaded.path} knows "
            f"({', '.join(config.data.classes[:3])}, …); give images of these, all of them"
        )
    train, test = (part and DecodedWhenRead(part, found.wanted) for part in (files.train, files.test))
    training, held = found.sets(config.model.sequence_length, train, test)
    if files.test is not None:
        if split == "all":
            raise ConfigError(f"images {files.name} have a test set; --split all is for images without one")
        return held, f"the test set of {files.name}"
    if split == "all" or (split == "auto" and data is not None):
        return replace(training, rows=np.arange(len(training.labels_N))), files.name
    return held, f"the held-out share of {files.name}"


def evaluate_images(
    loaded: LoadedModel,
    images: ImageSet,
    name: str,
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    tell: Callable[[int], Any] | None = None,
) -> ImageEvaluation:
    """Score images; deterministic, and the same on all ranks.

    Args:
        loaded: of ``load_model``; with experts on several ranks all of them call this together.
        name: of the images, for the user.
        batch_size: images per forward pass; None: ``TOGETHER``.
        rank, world: this process among those that share the images.
        tell: told of images done.
    """
    from sklearn.metrics import confusion_matrix

    def total(tensor: Tensor) -> Tensor:
        if world > 1:
            dist.all_reduce(tensor)
        return tensor

    size = batch_size or TOGETHER
    scoring = Scoring(loaded.model, loaded.device, size, rank, world, total)
    score = scoring(images, np.arange(len(images)), lambda: tell and tell(size * world))
    counts_CC = confusion_matrix(score.labels_T, score.predictions_T, labels=range(len(images.classes)))
    clean = {
        "images": len(images),
        "loss": score.loss,
        **judge(score, images.classes, "images"),
        "confusion": counts_CC.tolist(),
    }
    return ImageEvaluation(about_model(loaded), {"images": name}, clean)
