"""Damaged images as they are published: folders like CIFAR-10-C and ImageNet-C (Hendrycks 2019).

Legend: N images of all severities of a kind, H pixels of height, W of width, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from vqmoe_ds.data.arrays import mapped_array
from vqmoe_ds.data.image_files import PACKED, SUFFIXES, UNREAD, class_entries, class_folders, image_files
from vqmoe_ds.data.image_splits import Split, Stored
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.files import list_tree

EXTRA = "extra"
"""Group of the kinds that the published means leave out."""
PUBLISHED = {
    **dict.fromkeys(("gaussian_noise", "shot_noise", "impulse_noise"), "noise"),
    **dict.fromkeys(("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"), "blur"),
    **dict.fromkeys(("snow", "frost", "fog", "brightness"), "weather"),
    **dict.fromkeys(("contrast", "elastic_transform", "pixelate", "jpeg_compression"), "digital"),
    **dict.fromkeys(("speckle_noise", "gaussian_blur", "spatter", "saturate"), EXTRA),
}
"""Published kind -> its group."""
SEVERITIES = range(1, 6)
LABELS = "labels.npy"
_STORED = {"data_batch_1", "cifar-10-batches-py/data_batch_1", "train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"}


def are_images(path: str) -> bool:
    """Whether a path holds images, also such as are refused, and no text: by the names of its files.

    Four in five are those of images, for text may have pictures beside it; or they are those of images in arrays.
    """
    try:
        files = list_tree(path)[0] if os.path.isdir(path) else [os.path.basename(path)] * os.path.isfile(path)
    except OSError:  # who reads it says so
        return False
    pictures = sum(file.lower().endswith(SUFFIXES + UNREAD) for file in files)
    damaged = LABELS in files and not {f"{kind}.npy" for kind in PUBLISHED}.isdisjoint(files)
    return damaged or not _STORED.union(PACKED).isdisjoint(files) or 0 < 4 * len(files) <= 5 * pictures


@dataclass(frozen=True)
class PublishedSplit:
    """Images of one kind and severity."""

    kind: str
    severity: int
    load: Callable[[], Split]
    """Finds the images; of folders their files are listed then, which may be some millions in all."""

    @property
    def group(self) -> str:
        return PUBLISHED[self.kind]


def find_published(path: str, classes: tuple[str, ...]) -> list[PublishedSplit] | None:
    """The kinds and severities of a published folder, in the order of ``PUBLISHED``; None where a path is none.

    A folder like CIFAR-10-C has ``KIND.npy`` (uint8 ``[N, H, W, C]``, the severities one after the other) and
    ``labels.npy`` (``[N]``); one like ImageNet-C has ``KIND/SEVERITY/CLASS/FILE``, also one folder deeper.

    Args:
        classes: those that a model knows.

    Raises:
        DataError: arrays are damaged or of other shapes, labels are missing, or the classes are others.
    """
    place = Path(path)
    if not os.path.isdir(path):
        return None
    try:
        if any((place / f"{kind}.npy").exists() for kind in PUBLISHED):
            return _arrays(place, classes)
        folders: dict[tuple[str, int], Path] = {}
        for kind in PUBLISHED:
            # All places of a kind are found at once: a search by severity would list the folder five times as often.
            for severity, of_kind in product(SEVERITIES, [place / kind, *sorted(place.glob(f"*/{kind}"))]):
                folder = of_kind / str(severity)
                if folder.is_dir() and folders.setdefault((kind, severity), folder) != folder:
                    both = f"{folders[kind, severity]} and {folder}"
                    raise DataError(f"{path} has {kind} {severity} twice: {both}; move one elsewhere")
        found = [PublishedSplit(*which, _folder(folder, classes)) for which, folder in folders.items()]
    except OSError as error:
        raise DataError(f"images {error.filename or path} cannot be read: {error.strerror}; copy them again") from None
    return found or None


def _arrays(place: Path, classes: tuple[str, ...]) -> list[PublishedSplit]:
    """Five severities of every ``KIND.npy``."""
    names = sorted(file.stem for file in place.glob("*.npy") if file.name != LABELS)
    strange = [name for name in names if name not in PUBLISHED]
    if strange:
        raise DataError(f"{place / strange[0]}.npy is none of the {len(PUBLISHED)} published kinds; move it elsewhere")
    if not (place / LABELS).exists():
        raise DataError(f"{place} has images of damage and no {LABELS}; copy it there too")
    labels_N = _array(place / LABELS)
    if labels_N.ndim != 1 or labels_N.dtype.kind not in "iu" or not len(labels_N):
        raise DataError(f"{place / LABELS} holds no list of whole numbers; copy it again")
    first, last = int(labels_N.min()), int(labels_N.max())
    if first < 0 or last + 1 != len(classes):
        raise DataError(
            f"{place / LABELS} has labels {first} to {last}, and the model {len(classes)} classes; "
            "give the damaged images of its own classes"
        )
    return [
        PublishedSplit(kind, severity, opens)
        for kind in PUBLISHED
        if kind in names
        for severity, opens in zip(SEVERITIES, _severities(place / f"{kind}.npy", labels_N), strict=True)
    ]


def _severities(file: Path, labels_N: np.ndarray) -> list[Callable[[], Split]]:
    images_NHWC = _array(file)
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or len(images_NHWC) % len(SEVERITIES):
        raise DataError(
            f"{file} is {images_NHWC.dtype} of shape {images_NHWC.shape}, and not uint8 images [N, height, width, "
            f"channels] of {len(SEVERITIES)} severities one after the other; copy it again"
        )
    if len(images_NHWC) != len(labels_N):
        raise DataError(f"{file} has {len(images_NHWC):,} images, and {LABELS} {len(labels_N):,}; copy both again")
    each = len(labels_N) // len(SEVERITIES)

    # A function, so that each lambda keeps its own severity: in a loop all would see the last one.
    def opening(severity: int) -> Callable[[], Split]:
        part = slice((severity - 1) * each, severity * each)
        return lambda: Stored(labels_N[part].astype(np.int64), images_NHWC[part], f"{file}, severity {severity}")

    return [opening(severity) for severity in SEVERITIES]


def _array(file: Path) -> np.ndarray:
    try:
        return mapped_array(file, links=True)
    except ValueError as error:
        raise DataError(f"{file} is no array of numbers ({error}); copy it again") from None


def _folder(folder: Path, classes: tuple[str, ...]) -> Callable[[], Split]:
    """``CLASS/FILE``, of the model's classes and of all of them."""
    there = {entry.name for entry in class_entries(folder)}
    if there != set(classes):
        odd = sorted(there.symmetric_difference(classes))[0]
        raise DataError(
            f"{folder} has {len(there)} classes and the model {len(classes)}; {odd!r} is only on one side: give the "
            "damaged images of the model's own classes"
        )
    if not any(image_files(str(folder / name)) for name in classes):
        raise DataError(f"{folder} holds no images; unpack them again")
    return lambda: class_folders(folder, classes)[0]
