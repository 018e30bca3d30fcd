"""Labelled images as they are published: found and checked, without running anything that they hold.

A source is a folder of image files (``train/CLASS/name.png`` and ``test/CLASS/name.png``, or ``CLASS/name.png``), the
original pickles of CIFAR-10, the idx files of MNIST and Fashion-MNIST, Parquet files with a column of images, or
CIFAR-10 packed as JPEG.

Legend: N images, H pixels of height, W of width, C channels.
"""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.data.image_pickles import read_pickle
from vqmoe_ds.data.image_splits import Encoded, ImageFiles, Split, Stored, bytes_of
from vqmoe_ds.data.image_tables import HUB, HubSplit, ImageTable, hub_splits, parts_of
from vqmoe_ds.data.units import first_line
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.files import list_tree, open_regular, why_missing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm")
UNREAD = (".gif", ".tif", ".tiff", ".jfif", ".jp2", ".avif", ".heic")
"""Images of kinds that are not read: they are refused by name, not left out."""
MOST_CLASSES = 1 << 16
"""Classes of a table that has no names for them."""
HELD_OUT_NAMES = ("test", "val", "valid", "validation")
"""Folders of the test set beside ``train``; the first that is there counts."""
LARGEST_ARRAYS = 1 << 30
"""Bytes that an archive or an idx file may unpack to."""


def find_images(path: str) -> ImageFiles:
    """The images of a file or folder, or of ``hub:NAME``.

    Raises:
        DataError: nothing is there that is known, it is damaged, or there are fewer than two classes.
    """
    if path.startswith(HUB):
        return _sound(_hub(path))
    place = Path(path)
    if not os.path.exists(path):
        raise DataError(f"images {path} do not exist; give a folder of images, of CIFAR-10 or of idx files")
    try:
        for find in (_packed, _pickles, _idx, _folders, _tables):
            found = find(place)
            if found is not None:
                return _sound(found)
    except (OSError, EOFError, zlib.error) as error:
        file = getattr(error, "filename", None) or path
        raise DataError(f"images {file} cannot be read: {first_line(error)}; copy them again") from None
    raise DataError(
        f"{path} holds no labelled images that are known: give a folder with a folder of {', '.join(SUFFIXES[:3])} "
        "files for each class, CIFAR-10's data_batch_* files, *-images-idx3-ubyte files, or *.parquet files"
    )


def _sound(found: ImageFiles) -> ImageFiles:
    _several(found.name, found.classes)
    # Of a file system's bytes that are no UTF-8 Python makes half surrogates, which no report could be written with.
    unnamed = [name for name in found.classes if name.encode(errors="ignore").decode() != name]
    if unnamed:
        raise DataError(f"images {found.name} have a class whose name is no UTF-8, {unnamed[0]!r}; rename it")
    for split in filter(None, (found.train, found.test)):
        labels = split.labels_N
        if not len(labels):
            raise DataError(f"images {found.name} have a split without images; add some")
        if labels.min() < 0 or labels.max() >= len(found.classes):
            raise DataError(f"images {found.name} have labels beyond their {len(found.classes)} classes: damaged")
    return found


def _several(name: str, classes: tuple[str, ...]) -> None:
    if len(classes) < 2:
        raise DataError(f"images {name} are all of one class ({', '.join(classes)}); give a folder for each class")


# ---------------------------------------------------------------- folders of files


def _folders(place: Path) -> ImageFiles | None:
    """``train/CLASS/FILE`` with a test set beside, or ``CLASS/FILE``."""
    if not place.is_dir():
        return None
    parts = [place / "train", *(place / name for name in HELD_OUT_NAMES)]
    splits = [part for part in parts if part.is_dir()] if parts[0].is_dir() else [place]
    classes = tuple(entry.name for entry in class_entries(splits[0]) if image_files(entry.path))
    if not classes:
        return None
    _several(str(place), classes)  # before the test set is found to have others
    found = [class_folders(split, classes) for split in splits[:2]]
    files = tuple(file for _, some in found for file in some)
    return ImageFiles(str(place), classes, found[0][0], found[1][0] if len(found) > 1 else None, files)


def class_folders(place: Path, classes: tuple[str, ...]) -> tuple[Split, list[Path]]:
    """The images of ``CLASS/FILE`` and their files, class by class.

    Raises:
        DataError: there are images of another class, of a kind or in a place that is not read, or a class without any.
        OSError: the folder cannot be read.
    """
    entries = class_entries(place)
    found = {entry.name: image_files(entry.path) for entry in entries}
    unread = [file for files in found.values() for file in files if file.suffix.lower() in UNREAD]
    if unread:
        raise DataError(f"{unread[0]} is no image of a kind that is read; convert {unread[0].suffix} files to PNG")
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise DataError(
            f"{place / empty[0]} holds no images and would be a class without any; add some, or move the folder away"
        )
    for entry in entries:
        if other := _passed_over(entry.path):
            raise DataError(f"{other} is not where the other images of {entry.path} are; move all into one folder")
    strangers = [name for name, files in found.items() if files and name not in classes]
    if strangers:
        raise DataError(f"{place} has images of a class that training lacks: {strangers[0]!r}; remove it, or add some")
    files = [file for name in classes for file in found.get(name, [])]
    labels = [number for number, name in enumerate(classes) for _ in found.get(name, [])]
    return Encoded(np.array(labels, np.int64), lambda i: str(files[i]), lambda i: bytes_of(files[i])), files


def class_entries(place: Path) -> list[os.DirEntry[str]]:
    """Folders by name, but for hidden ones, as file managers and notebooks leave them.

    Raises:
        DataError: a link leads nowhere, which may have been a class.
    """
    # Sorted: the numbers of the labels follow, and scandir has the order of the file system.
    shown = sorted((entry for entry in os.scandir(place) if entry.name[0] != "."), key=lambda entry: entry.name)
    lost = [entry.path for entry in shown if entry.is_symlink() and not os.path.exists(entry.path)]
    if lost:
        raise DataError(f"{lost[0]} {why_missing(lost[0])}; remove it, or copy what it led to")
    return [entry for entry in shown if entry.is_dir()]


def image_files(folder: str) -> list[Path]:
    """Image files of a class, also unread ones, in order, without hidden ones; Tiny ImageNet has them in ``images``."""
    place = Path(folder, _place(folder))
    return [place / name for name in sorted(os.listdir(place)) if _is_image(name) and not name.startswith(".")]


def _passed_over(folder: str) -> Path | None:
    """An image file of a class that ``image_files`` does not find; None where there is none."""
    place = _place(folder)
    files = (file for file in list_tree(folder)[0] if _is_image(file) and os.path.dirname(file) != place)
    return next((Path(folder, file) for file in files), None)


def _place(folder: str) -> str:
    return "images" if os.path.isdir(os.path.join(folder, "images")) else ""


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES + UNREAD)


# ---------------------------------------------------------------- CIFAR-10, packed as JPEG

PACKED = ("cifar10_jpeg_train.npz", "cifar10_jpeg_test.npz")
_ARRAYS = {"prefix": "u", "payload": "u", "offsets": "u", "labels": "u", "classes": "U"}


def _packed(place: Path) -> ImageFiles | None:
    """JPEG files end to end, with a header that they share: ``prefix + payload[offsets[k]:offsets[k + 1]]``."""
    files = tuple(place / name for name in PACKED) if place.is_dir() else (place,)
    if not files[0].is_file() or files[0].suffix != ".npz":
        return None
    found = [_unpacked(file) for file in files if file.exists()]
    (classes, train), test = found[0], found[1][1] if len(found) > 1 else None
    if any(other != classes for other, _ in found):
        raise DataError(f"{files[1]} has other classes than {files[0]}; copy both again")
    return ImageFiles(str(place), classes, train, test, tuple(file for file in files if file.exists()))


def _unpacked(file: Path) -> tuple[tuple[str, ...], Split]:
    try:
        with zipfile.ZipFile(file) as members:
            if sum(member.file_size for member in members.infolist()) > LARGEST_ARRAYS:
                raise ValueError(f"it unpacks to more than {LARGEST_ARRAYS >> 20} MiB")
        with np.load(file) as archive:  # arrays of objects, which are pickles, are refused
            arrays = {name: archive[name] for name in _ARRAYS}
        whole = all(array.ndim == 1 and array.dtype.kind == _ARRAYS[name] for name, array in arrays.items())
        # Signed, so that offsets that fall have negative differences; those of unsigned numbers wrap around.
        offsets = arrays["offsets"].astype(np.int64)
        ends = [int(offsets[0]), int(offsets[-1])]
        if not whole or len(offsets) != len(arrays["labels"]) + 1 or ends != [0, len(arrays["payload"])]:
            raise ValueError("its arrays do not fit each other")
        if (np.diff(offsets) < 0).any() or any(arrays[name].dtype != np.uint8 for name in ("prefix", "payload")):
            raise ValueError("its offsets do not rise")
    except OSError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds
        raise DataError(f"{file} is no archive of packed images ({first_line(error)}); copy it again") from None
    prefix, payload = arrays["prefix"].tobytes(), arrays["payload"]
    split = Encoded(
        arrays["labels"].astype(np.int64),
        lambda i: f"image {i} of {file}",
        lambda i: prefix + payload[offsets[i] : offsets[i + 1]].tobytes(),
    )
    return tuple(map(str, arrays["classes"])), split


# ---------------------------------------------------------------- CIFAR-10's pickles


def _pickles(place: Path) -> ImageFiles | None:
    """``data_batch_1`` to ``data_batch_5``, ``test_batch`` and ``batches.meta``, also one folder deeper."""
    for folder in (place, place / "cifar-10-batches-py"):
        if (folder / "data_batch_1").is_file():
            break
    else:
        return None
    batches = sorted(folder.glob("data_batch_[1-9]"))
    files = (*batches, folder / "test_batch", folder / "batches.meta")
    names = _entry(read_pickle(files[-1]), "label_names", files[-1])
    if not isinstance(names, list) or not all(isinstance(name, (bytes, str)) for name in names):
        raise DataError(f"{files[-1]} has no list of names under label_names: it is damaged, copy it again")
    classes = tuple(name.decode("latin-1") if isinstance(name, bytes) else name for name in names)
    return ImageFiles(str(place), classes, _batches(batches), _batches([folder / "test_batch"]), files)


def _batches(files: list[Path]) -> Split:
    parts = [read_pickle(file) for file in files]
    images, labels = [], []
    for file, part in zip(files, parts, strict=True):
        data, numbers = _entry(part, "data", file), _entry(part, "labels", file)
        fits = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape == (len(numbers), 3072)
        if not fits or not all(type(number) is int for number in numbers):
            raise DataError(f"{file} holds no images of 32 x 32 x 3 with a label each: it is damaged, copy it again")
        # Stored as a plane of red, one of green and one of blue.
        images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += numbers
    return Stored(np.array(labels, np.int64), np.concatenate(images), " and ".join(file.name for file in files))


def _entry(part: Any, key: str, file: Path) -> Any:
    found = part.get(key.encode(), part.get(key)) if isinstance(part, dict) else None
    if found is None or not hasattr(found, "__len__"):
        raise DataError(f"{file} has no entry {key}: it is not of CIFAR-10, or damaged; copy it again")
    return found


# ---------------------------------------------------------------- idx files of MNIST and Fashion-MNIST


def _idx(place: Path) -> ImageFiles | None:
    """``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, those of ``t10k``, plain or ``.gz``."""
    train, test = _idx_pair(place, "train"), _idx_pair(place, "t10k")
    if train is None:
        return None
    splits = [_idx_split(*pair) for pair in (train, test) if pair is not None]
    classes = tuple(map(str, range(int(splits[0].labels_N.max(initial=0)) + 1)))
    files = (*train, *(test or ()))
    return ImageFiles(str(place), classes, splits[0], splits[1] if len(splits) > 1 else None, files)


def _idx_pair(place: Path, split: str) -> tuple[Path, Path] | None:
    for end in ("", ".gz"):
        pair = place / f"{split}-images-idx3-ubyte{end}", place / f"{split}-labels-idx1-ubyte{end}"
        if pair[0].is_file():
            return pair
    return None


def _idx_split(images: Path, labels: Path) -> Split:
    images_NHW, labels_N = _idx_array(images, 3), _idx_array(labels, 1)
    if len(images_NHW) != len(labels_N):
        raise DataError(
            f"{images} has {len(images_NHW):,} images, and {labels} {len(labels_N):,} labels; copy both again"
        )
    return Stored(labels_N.astype(np.int64), images_NHW[..., None], str(images))


def _idx_array(file: Path, dimensions: int) -> np.ndarray:
    """uint8 of the shape in the header: 0, 0, 8 (unsigned bytes), the number of dimensions, then each in 4 bytes."""
    with open_regular(file, links=True) as raw, gzip.open(raw) if file.suffix == ".gz" else raw as opened:
        header = opened.read(4 + 4 * dimensions)
        shape = [int(n) for n in np.frombuffer(header[4:], ">u4")] if len(header) == 4 + 4 * dimensions else []
        # In Python's integers: the product of three 32-bit sizes may pass int64.
        size = int(np.prod(shape, dtype=object)) if shape else 0
        # One byte more than it may have, to notice one that is longer.
        data = opened.read(size + 1) if header[:4] == bytes([0, 0, 8, dimensions]) and size < LARGEST_ARRAYS else b""
    if not shape or len(data) != size or not size:
        raise DataError(f"{file} is no idx file of {dimensions} dimension(s), or it is cut off; copy it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


# ---------------------------------------------------------------- Parquet files


def _tables(place: Path) -> ImageFiles | None:
    """``train-*.parquet`` and those of a test set, or files without such names, also in ``data``; or one file."""
    parts = parts_of(place)
    if not parts:
        return None
    chosen = [parts[name] for name in _named(parts)] or [[file for some in parts.values() for file in some]]
    tables = [ImageTable(files) for files in chosen]
    return _of_tables(str(place), tables, tuple(file for some in chosen for file in some))


def _hub(path: str) -> ImageFiles:
    """A data set of the hub, of which a split alone is not told from a training split."""
    splits = hub_splits(path)
    tables = [HubSplit(splits[name], f"{path}, {name}") for name in _named(splits) or list(splits)[:1]]
    return replace(_of_tables(path, tables, ()), mark=" ".join(table.mark for table in tables))


def _named(splits: Collection[str]) -> list[str]:
    """The training split and the first test split; nothing where there is no training split."""
    return ["train", *[name for name in HELD_OUT_NAMES if name in splits][:1]] if "train" in splits else []


def _of_tables(name: str, tables: Sequence[ImageTable | HubSplit], files: tuple[Path, ...]) -> ImageFiles:
    train, *test = tables
    most = int(train.labels_N.max(initial=0))
    if train.names is None and most >= MOST_CLASSES:  # a name for each would fill the memory
        raise DataError(f"{name} has a label {most:,}; number the classes 0, 1, 2, …, {MOST_CLASSES:,} at most")
    classes = train.names or tuple(map(str, range(most + 1)))
    if test and test[0].names != train.names:
        raise DataError(f"{name} has other classes in its test set than in its training set; copy both again")
    splits = [Encoded(table.labels_N, table.name, table.blob) for table in tables]
    return ImageFiles(name, classes, splits[0], splits[1] if test else None, files)
