"""Labelled images of a split, encoded or as they are, and the check that they are such as a model reads.

Legend: N images, H pixels of height, W of width, C channels.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vqmoe_ds.data.corpus import FilePiece
from vqmoe_ds.data.fingerprint import WHOLE, of_pieces
from vqmoe_ds.data.units import first_line
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.files import open_regular

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
"""What Pillow may take a file for: others of its readers start programs."""
LARGEST_FILE = 256 << 20
"""Bytes of a file of one image, or of pickles."""
MOST_PIXELS = 1 << 26
"""Of an image: a file of some kilobytes may unpack to more."""
MODES = {"RGB": 3, "P": 3, "CMYK": 3, "L": 1, "1": 1}
"""Modes of Pillow that are read, and their channels; others are transparent or of more than 8 bits."""


class Split(Protocol):
    """Images of one split, which may be damaged: ``pixels`` says so."""

    @property
    def labels_N(self) -> np.ndarray:
        """int64"""

    @property
    def name(self) -> Callable[[int], str]:
        """File of an image, for messages."""

    def pixels(self, index: int) -> Pixels:
        """One image.

        Raises:
            ValueError: it cannot be read; the message is the reason.
        """


@dataclass(frozen=True)
class Wanted:
    """Size and channels of the images that a model reads."""

    size: int
    channels: int
    resize: bool
    """Scale what is of another size, and cut out the centre."""


@dataclass(frozen=True)
class Pixels:
    """One image as it is stored: uint8 ``[H, W, C]``, and its Pillow image where it is encoded."""

    array_HWC: np.ndarray | None
    encoded: Any = None

    def fit(self, wanted: Wanted) -> tuple[np.ndarray, bool]:
        """uint8 ``[size, size, channels]``, and whether a grey-scale image was made one of colours.

        Raises:
            ValueError: another size, or colours where a grey-scale image is wanted.
        """
        if self.encoded is None:
            assert self.array_HWC is not None
            return _checked(self.array_HWC, wanted), False
        image = self.encoded
        grey = MODES[image.mode] < wanted.channels
        if MODES[image.mode] > wanted.channels:
            raise ValueError("it has 3 channels, and model.channels=1")
        if wanted.resize and image.size != (wanted.size, wanted.size):
            ops = library("PIL.ImageOps", "scaling images", DataError)
            # Converted first: Pillow scales palettes and bits by the nearest pixel, whatever filter is asked for.
            image = ops.fit(image.convert("RGB"), (wanted.size, wanted.size))
        array_HWC = np.asarray(image.convert("RGB" if wanted.channels == 3 else "L"))
        return _checked(array_HWC.reshape(*array_HWC.shape[:2], wanted.channels), wanted), grey


def _checked(array_HWC: np.ndarray, wanted: Wanted) -> np.ndarray:
    height, width, channels = array_HWC.shape
    if (height, width) != (wanted.size, wanted.size):
        raise ValueError(f"it is {width} x {height} pixels, and model.image_size={wanted.size}")
    if channels != wanted.channels:
        raise ValueError(f"it has {channels} channel(s), and model.channels={wanted.channels}")
    return array_HWC


@dataclass(frozen=True)
class Encoded:
    """Images that Pillow decodes."""

    labels_N: np.ndarray
    name: Callable[[int], str]
    blob: Callable[[int], bytes]

    def pixels(self, index: int) -> Pixels:
        pillow = library("PIL.Image", "reading images", DataError)
        try:
            image = pillow.open(io.BytesIO(self.blob(index)), formats=FORMATS)
            # Between the two calls: open reads the header alone, load unpacks.
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, too many to unpack")
            deep = _is_deep(image)
            image.load()
            if deep or image.mode not in MODES or "transparency" in image.info:
                raise ValueError(f"it is transparent or of more than 8 bits (Pillow's mode {image.mode})")
        except pillow.UnidentifiedImageError:  # whose own words quote an address in memory
            raise ValueError(f"it is no image of {', '.join(FORMATS)}") from None
        except Exception as error:  # Pillow raises a dozen kinds for damaged files
            raise ValueError(first_line(error)) from None
        return Pixels(None, image)


@dataclass(frozen=True)
class Stored:
    """Images that are stored as they are: uint8 ``[N, H, W, C]``."""

    labels_N: np.ndarray
    images_NHWC: np.ndarray
    file: str

    def name(self, index: int) -> str:
        return f"image {index} of {self.file}"

    def pixels(self, index: int) -> Pixels:
        return Pixels(self.images_NHWC[index])


def _is_deep(image: Any) -> bool:
    """Whether an image of colours that is not unpacked yet has more than 8 bits, of which Pillow drops the lower."""
    layout = image.tile[0].args if image.tile else ""  # "RGB;16B" of PNG; of PPM ("RGB", the largest value)
    return "16B" in layout or (image.format == "PPM" and isinstance(layout, tuple) and layout[-1] > 255)


def remedy(split: Split) -> str:
    """The end of sentences on images of a split that cannot be used."""
    if isinstance(split, Stored):
        return "set model.image_size and model.channels to those of the images: data.resize is of encoded ones"
    return (
        "give images of model.image_size and model.channels, or set data.resize=true; convert transparent and deeper "
        "ones to 8-bit RGB; a broken file must go"
    )


@dataclass(frozen=True)
class ImageFiles:
    """Labelled images of a source."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split | None
    """None where the source has no test set of its own."""
    files: tuple[Path, ...]
    mark: str = ""
    """Fingerprint of what is in no files."""

    def fingerprint(self) -> str:
        """Fingerprint of all files, of their names within the source, of the classes, and of labels of many files.

        Raises:
            DataError: a file cannot be read.
        """
        names = [os.path.relpath(file, self.name) for file in self.files] if os.path.isdir(self.name) else []
        sizes = [size for size, _ in self._stamps()]
        content = of_pieces([FilePiece(str(file), size) for file, size in zip(self.files, sizes, strict=True)])
        # With names, for in folders they are the labels: a file that moves to another class has the same bytes. An
        # empty mark is left out, for caches and checkpoints know the digest of files without one.
        told: list[Any] = [self.classes, names, content, *([self.mark] if self.mark else [])]
        if sum(sizes) > WHOLE:  # the content is sampled, and the samples may miss the labels
            told += [hashlib.sha256(split.labels_N.tobytes()).digest() for split in (self.train, self.test) if split]
        return _short(told)

    def stamp(self) -> str:
        """Digits of the files' sizes and times, which notice a change where ``fingerprint`` reads samples.

        Raises:
            DataError: as ``fingerprint``.
        """
        return _short(self._stamps())

    def _stamps(self) -> list[tuple[int, int]]:
        try:
            return [(found.st_size, found.st_mtime_ns) for found in map(os.stat, self.files)]
        except OSError as error:
            raise DataError(f"image {error.filename} cannot be read ({error.strerror}); remove it") from None


def _short(told: list[Any]) -> str:
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def bytes_of(file: Path) -> bytes:
    """Content of a file of one image, or of pickles.

    Raises:
        DataError: it is larger than any such file.
        OSError: it cannot be read.
    """
    with open_regular(file, links=True) as opened:
        data = opened.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise DataError(f"{file} has more than {LARGEST_FILE >> 20} MiB, which no such file has; leave it out")
    return data
