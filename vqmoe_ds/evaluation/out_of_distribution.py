"""Images of something else: how well a classifier's sureness tells them from those that it knows.

Legend: N images, H pixels a side, C channels, T images of both sets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vqmoe_ds.checkpoint.load_model import LoadedModel
from vqmoe_ds.data.image_files import find_images
from vqmoe_ds.data.image_splits import MODES, Pixels, Split, Wanted
from vqmoe_ds.data.images import DecodedWhenRead, ImageSet
from vqmoe_ds.evaluation.classification import ClassScore
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.extras import library

NOISE = "noise"
SPREAD = 0.25
"""Standard deviation of the values of noise, around 0.5 and cut off at 0 and 1 (Hendrycks 2019, arXiv 1812.04606)."""


@dataclass(frozen=True)
class OtherImages:
    """Images that a model was not trained for.

    Attributes:
        changes: what was done to make them such as the model reads, for the user; empty: nothing.
    """

    name: str
    images: ImageSet
    changes: str

    def about(self) -> dict[str, Any]:
        return {"images": self.name, "count": len(self.images), "changes": self.changes}


def open_others(loaded: LoadedModel, name: str, most: int) -> OtherImages:
    """``noise``, or the test set (else all) of a path, at most ``most`` images evenly spaced; converted if need be.

    Raises:
        DataError: as ``find_images``, or the first image is broken.
    """
    config = loaded.config
    wanted = Wanted(config.model.image_size, config.model.channels, resize=True)
    about = config.data.classes, config.model.sequence_length
    if name == NOISE:
        return OtherImages(NOISE, ImageSet(Noise(wanted), np.zeros(most, np.int64), np.arange(most), *about), "")
    files = find_images(name)
    split = files.test or files.train
    labels_N = np.zeros(len(split.labels_N), np.int64)  # their classes are none of the model's
    every = ImageSet(DecodedWhenRead(Converted(split, wanted), wanted), labels_N, np.arange(len(labels_N)), *about)
    images = every.evenly(most)
    # A set that cannot be used is refused before the model scores anything.
    images.read(np.zeros(1, int))
    return OtherImages(files.name, images, _changes(split.pixels(0), wanted))


class Noise:
    """Images of normal noise, each by its number: uint8 ``[N, H, H, C]`` (``ImageSet.images_NHHC``)."""

    def __init__(self, wanted: Wanted) -> None:
        self.shape = (wanted.size, wanted.size, wanted.channels)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        x = np.stack([np.random.default_rng(int(row)).normal(0.5, SPREAD, self.shape) for row in rows])
        return np.rint(x.clip(0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Converted:
    """A split whose images are made grey or coloured as wanted; ``Pixels.fit`` scales them."""

    split: Split
    wanted: Wanted

    @property
    def labels_N(self) -> np.ndarray:
        return self.split.labels_N

    def name(self, index: int) -> str:
        return self.split.name(index)

    def pixels(self, index: int) -> Pixels:
        found = self.split.pixels(index)
        image = found.encoded
        if image is None:
            assert found.array_HWC is not None
            plain = found.array_HWC.squeeze(-1) if found.array_HWC.shape[-1] == 1 else found.array_HWC
            image = library("PIL.Image", "converting images", DataError).fromarray(plain)
        return replace(found, encoded=image.convert("RGB" if self.wanted.channels == 3 else "L"))


def _changes(found: Pixels, wanted: Wanted) -> str:
    """How an image differs from what is wanted."""
    if found.encoded is not None:
        (width, height), channels = found.encoded.size, MODES[found.encoded.mode]
    else:
        assert found.array_HWC is not None
        height, width, channels = found.array_HWC.shape
    if (width, height, channels) == (wanted.size, wanted.size, wanted.channels):
        return ""
    return f"made {wanted.size} x {wanted.size} x {wanted.channels} from {width} x {height} x {channels}"


def told_apart(known: ClassScore, unknown: ClassScore) -> dict[str, dict[str, float]]:
    """How well two scores tell known images from others: ``probability`` (Hendrycks 2017) and ``energy`` (Liu 2020).

    ``probability`` is that of the predicted class (maximum softmax probability), ``energy`` the log-sum-exp of the
    logits. ``auroc``: the chance that a known image scores higher than another one, a tie counting half. ``aupr_in``
    and ``aupr_out``: average precision, ``sum (R_n - R_n-1) P_n``, of finding the known by high scores, and the others
    by low ones; by guessing they are the shares of the two sets.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    known_T = np.repeat([1, 0], [len(known.labels_T), len(unknown.labels_T)])
    scores = {
        "probability": (known.probabilities_T, unknown.probabilities_T),
        "energy": (known.energies_T, unknown.energies_T),
    }
    answer = {}
    for name, both in scores.items():
        score_T = np.concatenate(both)
        answer[name] = {
            "auroc": float(roc_auc_score(known_T, score_T)),
            "aupr_in": float(average_precision_score(known_T, score_T)),
            "aupr_out": float(average_precision_score(1 - known_T, -score_T)),
        }
    return answer


def line_of(row: dict[str, Any]) -> str:
    """A set's figures for the user."""
    changes = f" ({row['changes']})" if row["changes"] else ""
    parts = [
        f"by {name} AUROC {row[name]['auroc']:.2%}, AUPR {row[name]['aupr_in']:.2%} in, {row[name]['aupr_out']:.2%} out"
        for name in ("probability", "energy")
    ]
    return f"told from {row['count']:,} images of {row['images']}{changes}: {'; '.join(parts)}"
