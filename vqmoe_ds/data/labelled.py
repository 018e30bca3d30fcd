"""Sets of labelled texts: SST-2, SST-5, IMDB and BANKING77 by name, and any CSV, TSV or JSONL.

The hub's data sets were written down from their documentation on a machine that cannot reach the hub: the handling of
their rows is tested, the download itself is not.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vqmoe_ds.data.compressed import DAMAGES, check_content, open_plain, without_suffix
from vqmoe_ds.data.json_lines import read_json
from vqmoe_ds.data.tables import from_hub
from vqmoe_ds.data.units import BAD_UTF8, DAMAGED, HALF, NO_KEY, NOT_TEXT, OnError
from vqmoe_ds.runtime.errors import DataError, one_line, shown
from vqmoe_ds.runtime.files import why_missing
from vqmoe_ds.runtime.memory import free_bytes

Split = Literal["train", "validation", "test"]

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""Names of the files of each split in a folder."""
UTF_16 = ("\udcff\udcfe", "\udcfe\udcff")
"""How files of UTF-16 begin where they are read as UTF-8 with ``surrogateescape``."""
_KIND = r"\.(csv|tsv|jsonl|ndjson|txt)(\.gz|\.bz2|\.xz|\.zst)?"

EMPTY, NO_LABEL, UNSEEN, BROKEN = "empty text", "no label", "label never seen in training", "broken row"
LONGEST_LINE = 32 << 20
"""Characters, at most, of a line, and of a quoted field with its line breaks."""
_SAMPLE = 20  # lines that tell what separates the columns
_COARSE = ":coarse"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class LabelledSet:
    """One split: ``texts[i]`` belongs to the class ``classes[labels[i]]``."""

    name: str
    texts: list[str]
    labels: np.ndarray
    """int64 ``[len(texts)]``"""
    classes: list[str]
    """Names in the order of their labels: numbers by value, names by the alphabet; the same in every split."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason; only with ``on_error="skip"``."""

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class KnownSet:
    """A set of the literature, on the hub and in the files it is published as."""

    hub: str
    classes: tuple[str, ...] = ()
    """Names of the labels 0, 1, …; empty where the labels are names themselves."""
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


@dataclass(frozen=True)
class Columns:
    """Which columns of a table, or keys of a JSON row, hold the text and the label.

    Args:
        text: one name, or several between commas, whose texts are joined by line breaks.
        label: one name; ``NAME:coarse`` takes what stands before the first ``:`` of labels such as ``LOC:city``.

    Numbers count the columns of a table without a header, from 0.
    """

    text: str
    label: str

    def names(self, there: Container[str]) -> list[str]:
        """Columns of the texts, and last of the label; a name that is there is taken as it is, commas included."""
        texts = [self.text] if self.text in there else self.text.split(",")
        label = self.label if self.label in there else self.label.removesuffix(_COARSE)
        return [*(name.strip() for name in texts), label]

    def numbered(self, first: list[str]) -> bool:
        """Whether they are numbers, of a table whose first line is data."""
        return all(re.fullmatch(r"\d{1,4}", name) and name not in first for name in self.names(first))

    def row(self, place: str, texts: list[Any], label: Any) -> _Row:
        if self.label.endswith(_COARSE) and isinstance(label, str):
            label = label.partition(":")[0]
        return _Row(place, joined(texts), label)


def joined(texts: list[Any]) -> Any:
    """Several texts as one, those that are missing left out; a value that is no text where there is one."""
    if len(texts) == 1:
        return texts[0]
    other = next((value for value in texts if value is not None and not isinstance(value, str)), None)
    return "\n".join(value for value in texts if value) if other is None else other


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
        text_key, label_key: columns of a CSV or TSV, keys of a JSONL (``text``, ``label``; ``category`` in BANKING77),
            as of ``Columns``.
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
        return _file_rows(Path(place), wanted, Columns(text_key, key))

    if known and known.classes:
        classes = known.classes
    elif classes is None and split != "train":
        if place and os.path.isfile(place):
            raise DataError(f"{place} is one file: pass the classes of its training set to read its {split} split")
        # Skip, whatever on_error is: a bad row of the training split is refused where that split is read.
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
    if os.path.isfile(path):
        return split == "train"
    return bool(_names_of(path, split))


def _collect(name: str, rows: Iterator[_Row], classes: Sequence[str] | None, on_error: OnError) -> LabelledSet:
    texts: list[str] = []
    labels: list[str] = []
    skipped: dict[str, int] = {}
    numbers = _numbers(name, classes) if classes else None
    held, room = 0, free_bytes() // 16  # characters: they may take four bytes, and their ids eight more
    for row in rows:
        problem, label = _judge(row, numbers)
        if not problem:
            held += len(row.text)
            if held > room:
                raise DataError(f"labelled set {name} has more text than fits this machine's memory; give a part of it")
            texts.append(row.text)
            labels.append(label)
        elif on_error == "skip":
            reason = problem.partition(":")[0]
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            raise DataError(
                f"{row.place}: {problem}; correct it, or leave such rows out (finetune.skip_bad_rows=true, in Python "
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
    # Longer ones are names, as int() refuses more than 4,300 digits.
    return (int(label), "", label) if re.fullmatch(r"-?\d{1,18}", label) else (float("inf"), label.casefold(), label)


def _judge(row: _Row, numbers: dict[str, int] | None) -> tuple[str, str]:
    """(what is wrong with a row or "", its label)."""
    label = row.label
    # In JSON one row may have 1 and another 1.0, which are one class.
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
        return f"{UNSEEN}: {shown(written)}", ""
    return "", written


# ---------------------------------------------------------------- files


def _file_rows(path: Path, split: Split, columns: Columns) -> Iterator[_Row]:
    for file in _files(path, split):
        yield from _one_file(file, columns)


def _files(path: Path, split: Split) -> list[Path]:
    """The files of a split, all parts of it."""
    if os.path.isfile(path):
        if not re.search(rf"{_KIND}$", path.name):
            raise DataError(
                f"labelled set {path} is neither CSV, TSV, JSONL nor .txt (.gz, .bz2, .xz or .zst); convert it"
            )
        return [path]
    files = sorted(path / name for name in _names_of(path, split))
    if not files:
        raise DataError(
            f"labelled set {path} has no {split} split (no {split}.csv, .tsv, .jsonl or .txt); "
            "add the file, or hold out a part of the training split"
        )
    part = re.search(r"-of-0*(\d+)\.", files[0].name)
    if str(len(files)) != (part[1] if part else "1"):
        there = ", ".join(file.name for file in files)
        raise DataError(f"the {split} split of {path} is {'not whole' if part else 'there twice'} ({there}); fix that")
    return files


def _names_of(folder: Path, split: Split) -> list[str]:
    """Names of the files of a split in a folder."""
    if not os.path.isdir(folder):
        raise DataError(f"labelled set {folder} {why_missing(folder)}; known names are {', '.join(KNOWN_SETS)}")
    try:
        there = os.listdir(folder)
    except OSError as error:
        raise DataError(f"labelled set {folder} cannot be listed ({error.strerror}); check its permissions") from None
    pattern = rf"({'|'.join(SPLIT_NAMES[split])})(-\d+-of-\d+)?{_KIND}"
    return [name for name in there if re.fullmatch(pattern, name)]


def _one_file(path: Path, columns: Columns) -> Iterator[_Row]:
    kind = without_suffix(path).rpartition(".")[2]
    # The csv module finds the ends of rows by itself: a field in quotation marks keeps its line breaks.
    lines = _lines(path, newline="" if kind in ("csv", "tsv") else "\n")
    try:
        check_content(path)
        if kind == "txt":
            yield from _plain_rows(path, lines, columns)
        elif kind in ("csv", "tsv"):
            yield from _csv_rows(path, lines, "," if kind == "csv" else "\t", columns)
        else:
            yield from _json_rows(path, lines, columns)
    # A bad row and no refusal: what precedes the damage is used if on_error says so.
    except DAMAGES as error:
        reason = getattr(error, "strerror", None) or str(error) or "no memory is left"
        yield _Row(str(path), problem=f"{DAMAGED}: {reason}")


def _lines(path: Path, newline: str) -> Iterator[str]:
    """Lines that end as ``newline`` of ``open`` says; bytes that are not UTF-8 come as lone surrogates, so that only
    their row is lost."""
    with open_plain(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
        while line := text.readline(LONGEST_LINE):
            if line.startswith(UTF_16):
                raise DataError(f"{path} is UTF-16; write it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
            if len(line) == LONGEST_LINE:
                raise DataError(f"{path} has a line of more than {LONGEST_LINE >> 20} million characters; break it up")
            yield line


def _plain_rows(path: Path, lines: Iterator[str], columns: Columns) -> Iterator[_Row]:
    for number, line in enumerate(lines, 1):
        label, _, text = line.strip().partition(" ")
        if label:
            yield columns.row(f"{path}, line {number}", [text], label)


def _csv_rows(path: Path, lines: Iterator[str], delimiter: str, columns: Columns) -> Iterator[_Row]:
    # The module's own limit of 128 KiB is shorter than texts are. It holds for the whole process.
    csv.field_size_limit(LONGEST_LINE)
    # Put before the rest again, since a compressed stream cannot be rewound.
    sample = list(islice(lines, _SAMPLE))
    # Strict, as a quote that is never closed would otherwise swallow the rest of the file without a word.
    reader = csv.reader(chain(sample, lines), delimiter=_delimiter(sample, delimiter, columns), strict=True)
    try:
        first = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path}, line 1: the names of the columns cannot be read ({error}); write them anew") from None
    *texts, label = _places(path, first, columns)
    rows = _parsed(path, reader)
    if columns.numbered(first):
        rows = chain([(f"{path}, line 1", first, "")], rows)
    for place, row, problem in rows:
        if row and len(row) != len(first):
            problem = f"{BROKEN}: {len(row)} columns where the first line has {len(first)}"
        if row or problem:
            yield _Row(place, problem=problem) if problem else columns.row(place, [row[i] for i in texts], row[label])


def _parsed(path: Path, reader: Any) -> Iterator[tuple[str, list[str], str]]:
    """(place, columns, what is wrong with them) of the rows that are left."""
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            yield place, next(reader), ""
        except StopIteration:
            return
        except csv.Error as error:
            # The reader starts afresh at the next line, but an open quotation mark has swallowed all of them.
            if "end of data" in str(error):
                raise DataError(f"{place}: a quotation mark that is never closed; close it") from error
            yield place, [], f"{BROKEN}: {error}"


def _delimiter(sample: list[str], default: str, columns: Columns) -> str:
    """Separator of the columns: the default of the file's name, unless the columns asked for are found with another."""
    for delimiter in dict.fromkeys((default, *"\t,;|")):
        try:
            rows = [row for row in csv.reader(sample, delimiter=delimiter) if row]
        except csv.Error:
            continue
        wanted = columns.names(rows[0] if rows else ())
        if rows and not columns.numbered(rows[0]) and set(wanted) <= {name.strip() for name in rows[0]}:
            return delimiter
        if rows and columns.numbered(rows[0]):
            widths = {len(row) for row in rows[:-1] or rows}  # the last may go on after the sample
            if len(widths) == 1 and widths.pop() > max(map(int, wanted)):
                return delimiter
    return default


def _places(path: Path, first: list[str], columns: Columns) -> list[int]:
    """Positions of the columns of the text and of the label."""
    header, numbered = [name.strip() for name in first], columns.numbered(first)
    places = []
    for key in columns.names(first):
        if numbered and int(key) < len(first):
            places.append(int(key))
        elif not numbered and header.count(key) > 1:
            raise DataError(f"{path} has {header.count(key)} columns {key!r}; give each a name of its own")
        elif not numbered and key in header:
            places.append(header.index(key))
        else:
            there = ", ".join(one_line(name, 40) for name in header[:8])
            raise DataError(
                f"{path} has no column {key!r}, only {there or 'nothing'}; name another with finetune.text_key or "
                "finetune.label_key, by numbers (0, 1, ...) where the first line is data"
            )
    return places


def _json_rows(path: Path, lines: Iterator[str], columns: Columns) -> Iterator[_Row]:
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = read_json(line)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            yield _Row(place, problem=f"{BROKEN}: {reason}")
            continue
        *texts, label = columns.names(row if isinstance(row, dict) else ())
        missing = [key for key in (*texts, label) if not isinstance(row, dict) or key not in row]
        if missing:
            yield _Row(place, problem=f"{NO_KEY}: {missing[0]!r}")
        else:
            found = columns.row(place, [row[key] for key in texts], row[label])
            # Half a pair in the line itself is a byte that is not UTF-8 (surrogateescape), which _judge names.
            halves = any(_SURROGATE.search(value) for value in found[1:3] if isinstance(value, str))
            yield found._replace(problem=HALF) if halves and not _SURROGATE.search(line) else found


# ---------------------------------------------------------------- hub


def _hub_rows(known: KnownSet, split: Split, cache_dir: str | None) -> Iterator[_Row]:
    with from_hub(f"the {split} split of hub:{known.hub}", "give NAME=FOLDER with its files instead") as datasets:
        rows = datasets.load_dataset(known.hub, split=split, cache_dir=cache_dir)
    for number, row in enumerate(rows):
        yield _Row(f"{known.hub} {split}, row {number}", row["text"], row[known.hub_label_key])
