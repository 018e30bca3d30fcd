"""Labelled images in Parquet files, as ``datasets`` writes them, and in data sets of the Hugging Face hub.

Legend: N rows of all files of a split.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_ds.data.tables import from_hub, parquet_file, row_groups
from vqmoe_ds.data.units import first_line, some_of
from vqmoe_ds.runtime.errors import DataError

IMAGES, LABELS = ("image", "img"), ("label", "labels", "fine_label")
"""Names that the columns of images and of labels may have; the first that is there counts."""
HUB = "hub:"
_KEPT = 2
"""Row groups that are kept: threads ask for images one after the other, some a little ahead."""


class ImageTable:
    """Images and labels of one split, spread over some files.

    Attributes:
        labels_N: int64.
        names: of the classes, where the files have them.

    Raises:
        DataError: a file is damaged, or lacks one of the columns.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files, self.names = files, _names(files[0])
        self._groups: list[tuple[Path, int]] = []
        labels, sizes = [_labels(file) for file in files], [0]
        for file in files:
            with _opened(file) as opened:
                _column_of(IMAGES, file, opened.schema_arrow.names)
                counts = [count for _, count in row_groups(opened, file.stat().st_size)]
            self._groups += [(file, group) for group in range(len(counts))]
            sizes += counts
        self.labels_N = np.concatenate(labels)
        self._starts = np.cumsum(sizes)
        if self._starts[-1] != len(self.labels_N):
            raise DataError(f"{files[0].parent} has Parquet files with more rows than labels; copy them again")
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def name(self, index: int) -> str:
        group, row = self._place(index)
        return f"image {row} in row group {self._groups[group][1]} of {self._groups[group][0]}"

    def blob(self, index: int) -> bytes:
        """The encoded image of a row.

        Raises:
            ValueError: there is none.
        """
        group, row = self._place(index)
        return _bytes_in(self._column(group)[row].as_py())

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return group, index - int(self._starts[group])

    def _column(self, group: int) -> Any:
        """The images of a row group."""
        # Threads of image_cache ask for neighbours: without the lock each would read and unpack the row group itself.
        with self._lock:
            if group not in self._kept:
                file, number = self._groups[group]
                with _opened(file) as opened:
                    column = _column_of(IMAGES, file, opened.schema_arrow.names)
                    self._kept[group] = opened.read_row_group(number, columns=[column]).column(0)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return self._kept[group]


class HubSplit:
    """Images and labels of one split of a data set of the hub (``ImageTable``).

    Args:
        rows: a ``datasets.Dataset``.
        told: its name, for the user.

    Raises:
        DataError: it lacks one of the columns.
    """

    def __init__(self, rows: Any, told: str) -> None:
        import datasets

        self._told = told
        self._image = _column_of(IMAGES, told, rows.column_names)
        label = _column_of(LABELS, told, rows.column_names)
        # As they are stored: ``datasets`` would decode them, by any reader that Pillow has.
        self._rows = rows.cast_column(self._image, datasets.Image(decode=False))
        self.labels_N = _whole_numbers(rows.select_columns([label]).with_format("arrow")[:].column(label), told)
        self.names = _listed(getattr(rows.features[label], "names", None))
        self.mark = str(rows._fingerprint)

    def name(self, index: int) -> str:
        return f"image {index} of {self._told}"

    def blob(self, index: int) -> bytes:
        """As that of ``ImageTable``."""
        return _bytes_in(self._rows[index][self._image])


def hub_splits(path: str) -> dict[str, Any]:
    """The splits of ``hub:NAME`` or ``hub:NAME:CONFIGURATION``, each a ``datasets.Dataset``.

    Raises:
        DataError: it cannot be loaded.
    """
    name, _, configuration = path.removeprefix(HUB).partition(":")
    remedy = (
        "check name and configuration (hub:NAME:CONFIGURATION) and that the hub can be reached, or give a folder with "
        "its Parquet files"
    )
    with from_hub(path, remedy) as datasets:
        return dict(datasets.load_dataset(name, configuration or None))


def parts_of(place: Path) -> dict[str, list[Path]]:
    """The Parquet files of a folder, or of ``data`` in it, by split (``train-00000-of-00002.parquet``), or one file.

    Raises:
        DataError: parts of a split are missing.
    """
    if place.is_file():
        return {"train": [place]} if place.suffix == ".parquet" else {}
    files = sorted(place.glob("*.parquet")) or sorted(place.glob("data/*.parquet"))
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(re.split(r"[-.]", file.name)[0], []).append(file)
    for name, some in splits.items():
        parts = re.search(r"-of-0*(\d+)\.parquet$", some[0].name)
        if parts and int(parts[1]) != len(some):
            raise DataError(f"{place} has {len(some)} of the {parts[1]} files {name}-*.parquet; copy the others")
    return splits


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A Parquet file; whatever a damaged one brings about is one sentence."""
    try:
        with parquet_file(str(file)) as opened:
            yield opened
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{file} cannot be read ({first_line(error)}); copy it again") from None


def _column_of(names: tuple[str, ...], told: Any, there: list[str]) -> str:
    found = next((name for name in names if name in there), None)
    if found is None:
        raise DataError(f"{told} has no column {' or '.join(names)}, only {some_of(there)}; rename one")
    return found


def _labels(file: Path) -> np.ndarray:
    """The labels of a file, int64."""
    with _opened(file) as opened:
        column = _column_of(LABELS, file, opened.schema_arrow.names)
        return _whole_numbers(opened.read(columns=[column]).column(0), file)


def _whole_numbers(column: Any, told: Any) -> np.ndarray:
    """An Arrow column as int64."""
    # A column with gaps is refused below as an array of floats: Arrow would give it with NaN in them.
    values = column.to_numpy() if not column.null_count else np.zeros(0)
    if values.dtype.kind not in "iu" or len(values) != len(column):
        raise DataError(f"{told} has labels that are no whole numbers; give a number to each class")
    return values.astype(np.int64)


def _bytes_in(value: Any) -> bytes:
    """The encoded image of a cell, which ``datasets`` keeps as ``bytes`` beside ``path``."""
    found = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(found, bytes):
        raise ValueError("its row has no bytes of an image")
    return found


def _names(file: Path) -> tuple[str, ...] | None:
    """Names of the classes, which ``datasets`` keeps in the schema; None where they are unknown."""
    with _opened(file) as opened:
        column = _column_of(LABELS, file, opened.schema_arrow.names)
        try:
            about = json.loads((opened.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            return _listed(about["info"]["features"][column]["names"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


def _listed(names: Any) -> tuple[str, ...] | None:
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
