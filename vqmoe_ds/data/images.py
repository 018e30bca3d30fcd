"""Labelled images for training and validation, and batches as a pure function of (seed, samples consumed).

Legend: N images, B images of a batch, H pixels a side, C channels, m pixels of the margin.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vqmoe_ds.config.schema import Augment, RunConfig
from vqmoe_ds.data.batches import Batch, ShuffledBatches
from vqmoe_ds.data.image_augment import Mixing, rand_augment
from vqmoe_ds.data.image_files import find_images
from vqmoe_ds.data.image_splits import ImageFiles, Split, Wanted, remedy
from vqmoe_ds.runtime.errors import ConfigError, DataError
from vqmoe_ds.runtime.extras import library

MARGIN = 8
"""Images are shifted by up to this part of their size: 4 pixels of 32, as is usual for CIFAR-10."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, readable by row (``Windows`` of images).

    Attributes:
        images_NHHC: anything that gives uint8 ``[B, H, H, C]`` for an array of indices.
        labels_N: int64, of the same images.
        rows: the images that belong to the split, by index.
        patches: tokens of an image.
    """

    images_NHHC: Any
    labels_N: np.ndarray
    rows: np.ndarray
    classes: tuple[str, ...]
    patches: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sequence_length(self) -> int:
        return self.patches

    @property
    def labels(self) -> np.ndarray:
        """int64 ``[len(self)]``"""
        return self.labels_N[self.rows]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each image, int64: all alike."""
        return np.full(len(self), self.patches, np.int64)

    def read(self, positions: np.ndarray) -> Batch:
        """The images at ``positions``, and their labels."""
        rows = self.rows[positions]
        return Batch(self.images_NHHC[rows], self.labels_N[rows], None, self.patches)

    def take(self, positions: np.ndarray) -> ImageSet:
        """The images at ``positions`` alone."""
        return replace(self, rows=self.rows[positions])

    def evenly(self, most: int) -> ImageSet:
        """At most so many of the images, evenly spaced."""
        return self.take(np.linspace(0, len(self) - 1, min(len(self), most)).astype(int))


class ImageBatches(ShuffledBatches):
    """Shuffled training images; what becomes of a sample follows from (seed, its number), whatever its micro-batch.

    Args:
        mixing: mixes every sample with the one that follows it in the order of all samples.
    """

    def __init__(
        self, images: ImageSet, batch_size: int, seed: int, augment: Augment, mixing: Mixing | None = None
    ) -> None:
        super().__init__(len(images), batch_size, seed)
        self.images, self.augment, self.mixing = images, augment, mixing

    def _batch(self, first: int, rows: np.ndarray) -> Batch:
        if self.mixing is None:
            return self._augmented(first, rows)
        # The partner of the last sample is changed as under its own number: it does not matter where batches are cut.
        more = self._augmented(first, np.append(rows, self.rows(first + len(rows), 1)))
        draws = [self._draws(first, len(rows), stream) for stream in ("shares", "places")]
        images_BHHC, targets_BK = self.mixing(more.inputs_BS, more.targets_BS, *draws)
        return more._replace(inputs_BS=images_BHHC, targets_BS=targets_BK)

    def _augmented(self, first: int, rows: np.ndarray) -> Batch:
        batch = self.images.read(rows)
        if self.augment is Augment.NONE:
            return batch
        images_BHHC = shifted(batch.inputs_BS, self._draws(first, len(rows), "shifts"), self.augment)
        if self.augment is Augment.RAND:
            images_BHHC = rand_augment(images_BHHC, self._draws(first, len(rows), "operations"))
        return batch._replace(inputs_BS=images_BHHC)

    def _draws(self, first: int, count: int, stream: str) -> np.ndarray:
        """A number for each sample from ``first`` on, uint64; those of several streams are independent."""
        # Numbers of samples stay below 2^48, so that no two streams share a number.
        return mixed(self.seed, np.arange(first, first + count) + (_STREAMS.index(stream) << 48))


# Places in this tuple are part of every draw: append only, or resumed runs see other images.
_STREAMS = ("shifts", "operations", "shares", "places")


def shifted(images_BHHC: np.ndarray, draws_B: np.ndarray, augment: Augment) -> np.ndarray:
    """Images cut at a place of their own out of a frame of zeros; unless told ``crop``, every second one is mirrored.

    Args:
        draws_B: uint64, uniform and independent.
    """
    batch, size = images_BHHC.shape[:2]
    margin = size // MARGIN
    framed = np.zeros((batch, size + 2 * margin, size + 2 * margin, images_BHHC.shape[3]), np.uint8)
    framed[:, margin : margin + size, margin : margin + size] = images_BHHC
    places = np.uint64(2 * margin + 1)
    top_B = (draws_B % places).astype(np.int64)
    left_B = ((draws_B >> np.uint64(24)) % places).astype(np.int64)
    columns_BH = left_B[:, None] + np.arange(size)
    if augment is not Augment.CROP:
        flips_B = (draws_B >> np.uint64(63)).astype(bool)
        columns_BH[flips_B] = columns_BH[flips_B, ::-1]
    rows_BH = top_B[:, None] + np.arange(size)
    return framed[np.arange(batch)[:, None, None], rows_BH[:, :, None], columns_BH[:, None, :]]


def mixed(seed: int, numbers: np.ndarray) -> np.ndarray:
    """Uniform uint64 from (seed, number), one by one: SplitMix64 (Steele 2014)."""
    # The products are meant modulo 2^64; NumPy warns of that for scalars (the seed), not for arrays.
    with np.errstate(over="ignore"):
        # One step on, as what follows leaves 0 as it is.
        z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z ^= np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


# ---------------------------------------------------------------- the data of a run


@dataclass(frozen=True)
class ImageData:
    """Images that were found good, before they are decoded (``TrainingData``).

    ``notes`` are sentences for the user on what was found while they were.
    """

    files: ImageFiles
    wanted: Wanted
    holdout_every: int
    notes: list[str] = field(default_factory=list)
    tokenizer_sha256: ClassVar[str | None] = None

    @property
    def vocab_size(self) -> int:
        """Number of classes."""
        return len(self.files.classes)

    @cached_property
    def held_out(self) -> np.ndarray:
        """Training images that are held out where there is no test set: by a hash of their index, bool ``[N]``."""
        count = len(self.files.train.labels_N)
        if self.files.test is not None:
            return np.zeros(count, bool)
        # Seed 0, not the run's: runs with other seeds validate on the same images.
        return mixed(0, np.arange(count)) % np.uint64(self.holdout_every) == 0

    def summary(self) -> str:
        """Name and size, for the user."""
        held = int(self.held_out.sum()) if self.files.test is None else len(self.files.test.labels_N)
        training = len(self.held_out) - int(self.held_out.sum())
        side = f"{self.wanted.size} x {self.wanted.size}"
        return (
            f"{self.files.name}, {training:,} training and {held:,} held-out images of {side}, "
            f"{len(self.files.classes)} classes"
        )

    def fingerprint(self) -> dict[str, str]:
        """Fingerprints of all that is read, by name."""
        every = self.holdout_every if self.files.test is None else 0
        return {"images": f"{self.files.fingerprint()} {self.wanted} {every}"}

    def open(self, config: RunConfig, cache: Path) -> tuple[ImageBatches, ImageSet]:
        """Training batches and held-out images, decoded once into ``cache``; all ranks call it together.

        Raises:
            DataError: images are broken, or of another size; or the cache cannot be written.
        """
        from vqmoe_ds.data.image_cache import decoded  # with torch, which is not needed to refuse bad input

        arrays, notes = decoded(self.files, self.wanted, cache)
        self.notes.extend(notes)
        train, held = self.sets(config.model.sequence_length, arrays["train"], arrays.get("test"))
        data = config.data
        mixing = Mixing(data.mixup, data.cutmix, config.model.vocab_size) if data.mixup or data.cutmix else None
        return ImageBatches(train, config.train.batch_size, config.train.seed, data.augment, mixing), held

    def sets(self, patches: int, train: Any, test: Any) -> tuple[ImageSet, ImageSet]:
        """Training and held-out images, given what decoded ones are read from."""
        classes, labels_N = self.files.classes, self.files.train.labels_N
        training = ImageSet(train, labels_N, np.flatnonzero(~self.held_out), classes, patches)
        if self.files.test is None:
            return training, replace(training, rows=np.flatnonzero(self.held_out))
        return training, ImageSet(test, self.files.test.labels_N, np.arange(len(test)), classes, patches)

    def encode(self, text: str) -> list[int] | None:
        return None

    def decode(self, ids: list[int]) -> str:
        raise NotImplementedError("images have no text")


class DecodedWhenRead:
    """Images of a split that are decoded as they are read, for who reads each once."""

    def __init__(self, split: Split, wanted: Wanted) -> None:
        self.split, self.wanted = split, wanted

    def __len__(self) -> int:
        return len(self.split.labels_N)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([self._image(int(row)) for row in rows])

    def _image(self, row: int) -> np.ndarray:
        try:
            return self.split.pixels(row).fit(self.wanted)[0]
        except ValueError as error:
            raise DataError(f"{self.split.name(row)} cannot be used: {error}; {remedy(self.split)}") from None


def open_images(config: RunConfig) -> ImageData:
    """The images that the configuration names; the first is decoded, the others are counted.

    Raises:
        ConfigError: no images are named, or options that are for text.
        DataError: nothing there, damaged, of one class or of another size.
    """
    data, model = config.data, config.model
    if not isinstance(data.path, str) or data.valid_path is not None or data.tokenizer is not None:
        raise ConfigError(
            "model.image_size asks for images: give one file or folder with --data, without data.valid_path and "
            "data.tokenizer (a folder test beside train is validated on)"
        )
    if data.augment is Augment.RAND:
        library("PIL.Image", "data.augment=rand", DataError)  # else the first batch would tell
    files = find_images(data.path)
    found = ImageData(files, Wanted(model.image_size, model.channels, data.resize), data.holdout_every)
    for split in filter(None, (files.train, files.test)):
        try:
            split.pixels(0).fit(found.wanted)
        except ValueError as error:
            raise DataError(f"{split.name(0)} cannot be used: {error}; {remedy(split)}") from None
    if found.held_out.all() or (files.test is None and not found.held_out.any()):
        raise DataError(
            f"images {files.name} have no test set, and of {len(found.held_out)} images data.holdout_every="
            f"{data.holdout_every} leaves none on one side; give more, or a folder test beside train"
        )
    return found
