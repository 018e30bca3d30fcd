"""Sets of labelled texts: SST-2, SST-5, IMDB and BANKING77 by name, and any CSV, TSV or JSONL.

The hub's data sets were written down from their documentation on a machine that cannot reach the hub: the handling of
their rows is tested, the download itself is not.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vqmoe_ds.data.libraries import library
from vqmoe_ds.errors import DataError

Split = Literal["train", "validation", "test"]
OnError = Literal["fail", "skip"]

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""How the files of a folder are called."""
_FORMATS = r"csv|tsv|jsonl|ndjson|txt"

EMPTY, NO_LABEL, UNSEEN, BAD_UTF8 = "empty text", "no label", "label never seen in training", "not UTF-8"
BROKEN, NO_KEY, NOT_TEXT, DAMAGED = "broken row", "without the key", "not a string", "damaged archive"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class LabelledSet:
    """One split: ``texts[i]`` belongs to the class ``classes[labels[i]]``."""

    name: str
    texts: list[str]
    labels: np.ndarray
    """int64 ``[len(texts)]``"""
    classes: list[str]
    """In the order of their numbers: numbers by value, names by the alphabet; the same in every split."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason; only with ``on_error="skip"``."""

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class KnownSet:
    """A set of the literature, on the hub and in the files it is published as."""

    hub: str
    classes: tuple[str, ...] = ()
    """What the labels 0, 1, … mean; empty where the labels are names themselves."""
    label_key: str = "label"
    hub_label_key: str = "label"
    splits: tuple[Split, ...] = ("train", "validation", "test")


KNOWN_SETS = {
    # Copies of SST with the labels of the test split, which the GLUE form of SST-2 keeps secret.
    "sst2": KnownSet("SetFit/sst2", ("negative", "positive")),
    "sst5": KnownSet("SetFit/sst5", ("very negative", "negative", "neutral", "positive", "very positive")),
    "imdb": KnownSet("stanfordnlp/imdb", ("negative", "positive"), splits=("train", "test")),
    "banking77": KnownSet("mteb/banking77", label_key="category", hub_label_key="label_text", splits=("train", "test")),
}


class _Row(NamedTuple):
    """One sample as found: ``problem`` is set where it cannot be used."""

    place: str
    text: Any = None
    label: Any = None
    problem: str = ""


def open_labelled(
    spec: str,
    split: Split = "train",
    *,
    text_key: str = "text",
    label_key: str | None = None,
    classes: Sequence[str] | None = None,
    on_error: OnError = "fail",
    cache_dir: str | None = None,
) -> LabelledSet:
    """One split of a labelled set.

    Args:
        spec: ``sst2``, ``sst5``, ``imdb`` or ``banking77`` (from the hub); ``NAME=PATH`` with the folder or file that
            holds a set, known or not; or the path alone. A folder has files such as ``train.csv``, ``dev.txt`` or
            ``test-0-of-3.jsonl.bz2``; a ``.txt`` has lines of a label, a space and the text.
        text_key, label_key: columns of a CSV or TSV, keys of a JSONL (``text``, ``label``; ``category`` in BANKING77).
        classes: those of the training split, where ``spec`` is one file; otherwise they are found there.
        on_error: refuse the first bad row, or leave bad rows out and count them in ``skipped``.

    Raises:
        DataError: nothing there, a column that is missing, a damaged archive, bad rows with ``on_error="fail"``, or a
            label in another split that the training split never has.
    """
    name, equals, place = spec.partition("=")
    if not equals and spec not in KNOWN_SETS:
        name, place = Path(spec).name, spec
    known = KNOWN_SETS.get(name)
    key = label_key or (known.label_key if known else "label")

    def rows(wanted: Split) -> Iterator[_Row]:
        if not place and known:
            return _hub_rows(known, wanted, cache_dir)
        return _file_rows(Path(place), wanted, text_key, key)

    if known and known.classes:
        classes = known.classes
    elif classes is None and split != "train":
        if place and Path(place).is_file():
            raise DataError(f"{place} is one file: pass the classes of its training set to read its {split} split")
        classes = _collect(name, rows("train"), None, "skip").classes
    return _collect(name, rows(split), classes, on_error)


def has_split(spec: str, split: Split) -> bool:
    """Whether a set has files of a split; one that is a single file has the training split alone.

    Raises:
        DataError: nothing there.
    """
    _, equals, place = spec.partition("=")
    if not equals and spec in KNOWN_SETS:
        return split in KNOWN_SETS[spec].splits
    path = Path(place if equals else spec)
    if path.is_file():
        return split == "train"
    if not path.is_dir():
        raise DataError(f"labelled set {path} does not exist; known names are {', '.join(KNOWN_SETS)}")
    return any(re.match(rf"({'|'.join(SPLIT_NAMES[split])})[-.]", file.name) for file in path.iterdir())


def _collect(name: str, rows: Iterator[_Row], classes: Sequence[str] | None, on_error: OnError) -> LabelledSet:
    texts: list[str] = []
    labels: list[str] = []
    skipped: dict[str, int] = {}
    numbers = _numbers(name, classes) if classes else None
    for row in rows:
        problem, label = _judge(row, numbers)
        if not problem:
            texts.append(row.text)
            labels.append(label)
        elif on_error == "skip":
            reason = problem.partition(":")[0]
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            raise DataError(
                f"{row.place}: {problem}; mend it, or leave such rows out (finetune.skip_bad_rows=true, in Python "
                'on_error="skip")'
            )
    if not texts:
        more = "".join(f", {count} rows left out ({reason})" for reason, count in skipped.items())
        raise DataError(f"labelled set {name} has no rows{more}; give a file with texts and labels")
    found = list(classes) if classes else sorted(set(labels), key=_order)
    if len(found) < 2:
        raise DataError(f"labelled set {name} has only the class {found[0]!r}; a classifier takes two or more")
    numbers = numbers or _numbers(name, found)
    return LabelledSet(name, texts, np.array([numbers[label] for label in labels], dtype=np.int64), found, skipped)


def _numbers(name: str, classes: Sequence[str]) -> dict[str, int]:
    """The number of each class, by its name; in known sets with numbered labels also by the number itself."""
    numbered = name in KNOWN_SETS and KNOWN_SETS[name].classes
    by_number = {str(number): number for number in range(len(classes))} if numbered else {}
    return by_number | {label: number for number, label in enumerate(classes)}


def _order(label: str) -> tuple[float, str, str]:
    return (int(label), "", label) if re.fullmatch(r"-?\d+", label) else (float("inf"), label.casefold(), label)


def _judge(row: _Row, numbers: dict[str, int] | None) -> tuple[str, str]:
    """(what is wrong with a row or "", its label)."""
    label = row.label
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    written = "" if label is None else str(label).strip()
    if row.problem:
        return row.problem, ""
    if not isinstance(row.text, str):
        return (EMPTY if row.text is None else NOT_TEXT), ""
    if _SURROGATE.search(row.text) or _SURROGATE.search(written):
        return BAD_UTF8, ""
    if not row.text.strip():
        return EMPTY, ""
    if not written:
        return NO_LABEL, ""
    if numbers is not None and written not in numbers:
        return f"{UNSEEN}: {written!r}", ""
    return "", written


# ---------------------------------------------------------------- files


def _file_rows(path: Path, split: Split, text_key: str, label_key: str) -> Iterator[_Row]:
    for file in _files(path, split):
        yield from _one_file(file, text_key, label_key)


def _files(path: Path, split: Split) -> list[Path]:
    """The files of a split, all parts of it."""
    kind = rf"\.({_FORMATS})(\.gz|\.bz2|\.xz)?"
    if path.is_file():
        if not re.search(rf"{kind}$", path.name):
            raise DataError(f"labelled set {path} is neither CSV, TSV, JSONL nor .txt (.gz, .bz2 or .xz); convert it")
        return [path]
    if not path.is_dir():
        raise DataError(f"labelled set {path} does not exist; known names are {', '.join(KNOWN_SETS)}")
    names = "|".join(SPLIT_NAMES[split])
    files = sorted(file for file in path.iterdir() if re.fullmatch(rf"({names})(-\d+-of-\d+)?{kind}", file.name))
    if not files:
        raise DataError(
            f"labelled set {path} has no {split} split (no {split}.csv, .tsv, .jsonl or .txt); "
            "add the file, or hold out a part of the training split"
        )
    part = re.search(r"-of-(\d+)\.", files[0].name)
    if len(files) != (int(part[1]) if part else 1):
        there = ", ".join(file.name for file in files)
        raise DataError(f"the {split} split of {path} is {'not whole' if part else 'there twice'} ({there}); mend that")
    return files


def _one_file(path: Path, text_key: str, label_key: str) -> Iterator[_Row]:
    lines = _lines(path)
    kind = re.sub(r"\.(gz|bz2|xz)$", "", path.name).rpartition(".")[2]
    try:
        if kind == "txt":
            yield from _plain_rows(path, lines)
        elif kind in ("csv", "tsv"):
            yield from _csv_rows(path, lines, "," if kind == "csv" else "\t", text_key, label_key)
        else:
            yield from _json_rows(path, lines, text_key, label_key)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        yield _Row(str(path), problem=f"{DAMAGED}: {reason}")


def _lines(path: Path) -> Iterator[str]:
    """Lines; bytes that are not UTF-8 come as lone surrogates, so that only their row is lost."""
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rb") as stream:
        yield from io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _plain_rows(path: Path, lines: Iterator[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, 1):
        label, _, text = line.strip().partition(" ")
        if label:
            yield _Row(f"{path}, line {number}", text, label)


def _csv_rows(path: Path, lines: Iterator[str], delimiter: str, text_key: str, label_key: str) -> Iterator[_Row]:
    csv.field_size_limit(1 << 30)
    # Strict, as a quote that is never closed would otherwise swallow the rest of the file without a word.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = [column.strip() for column in next(reader, [])]
    for key in (text_key, label_key):
        if key not in header:
            raise DataError(
                f"{path} has no column {key!r}, only {', '.join(header) or 'nothing'}; "
                "name another with finetune.text_key or finetune.label_key"
            )
    text_column, label_column = header.index(text_key), header.index(label_key)
    while True:
        first = reader.line_num + 1
        place = f"{path}, line {first}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise DataError(f"{place}: a quotation mark that is never closed; close it") from error
            yield _Row(place, problem=f"{BROKEN}: {error}")
            continue
        if len(row) == len(header):
            yield _Row(place, row[text_column], row[label_column])
        elif row:
            yield _Row(place, problem=f"{BROKEN}: {len(row)} columns where the header has {len(header)}")


def _json_rows(path: Path, lines: Iterator[str], text_key: str, label_key: str) -> Iterator[_Row]:
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield _Row(place, problem=f"{BROKEN}: {error}")
            continue
        missing = [key for key in (text_key, label_key) if not isinstance(row, dict) or key not in row]
        if missing:
            yield _Row(place, problem=f"{NO_KEY}: {missing[0]!r}")
        else:
            yield _Row(place, row[text_key], row[label_key])


# ---------------------------------------------------------------- hub


def _hub_rows(known: KnownSet, split: Split, cache_dir: str | None) -> Iterator[_Row]:
    load_dataset = library("datasets", "datasets<6", "reading from the Hugging Face hub").load_dataset
    try:
        rows = load_dataset(known.hub, split=split, cache_dir=cache_dir)
    except (OSError, ValueError, RuntimeError) as error:  # huggingface_hub's and datasets' errors derive from these
        reason = str(error).strip().split("\n")[0][:200]
        raise DataError(
            f"the {split} split of {known.hub} cannot be had from the Hugging Face hub ({reason}); "
            "give NAME=FOLDER with its files instead"
        ) from error
    for number, row in enumerate(rows):
        yield _Row(f"{known.hub} {split}, row {number}", row["text"], row[known.hub_label_key])
