"""Sources of text -> work units -> documents.

A *unit* is what one worker does at a time: a few megabytes of one or more sources. Units are cut from the sources
alone, so they do not depend on how many workers or ranks share them, and read one after the other they give every
document of every source in order. A document arrives as *pieces* of at most 64 KiB of UTF-8, so that memory does not
grow with its length.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vqmoe_ds.data.compressed import DAMAGES, WindowTooLarge, check_content, open_plain, without_suffix
from vqmoe_ds.data.libraries import library
from vqmoe_ds.runtime.errors import DataError, one_line
from vqmoe_ds.runtime.files import list_tree, open_regular, why_missing

PIECE_BYTES = 64 << 10
"""Longest piece of a document, in bytes of UTF-8."""

Document = Literal["file", "paragraph", "line"]
OnError = Literal["fail", "skip"]

LONGEST_JSON = 32 << 20
"""Bytes of a JSON line: what it holds can take 25 times as many in memory."""

TEXT, JSON, PARQUET, HUB, STREAM = "text", "json", "parquet", "hub", "stream"
_JSON_LINES = (".jsonl", ".ndjson", ".json")

EMPTY, BAD_UTF8, DAMAGED = "empty document", "not UTF-8", "damaged file"
HALF, TOO_DEEP, WINDOW = "half of a surrogate pair", "JSON nested too deeply", "compressed with too large a window"
MISNAMED = "bytes of another kind than its name says"
NOT_JSON, NO_KEY, NO_COLUMN, NOT_TEXT = "not a JSON object", "without the key", "without the column", "not a string"
TOO_LONG = f"a line of more than {LONGEST_JSON >> 20} MiB"
_MENDS = {
    BAD_UTF8: "convert the file to UTF-8 (iconv -t UTF-8)",
    HALF: "write the character itself, or both halves of its escape",
    DAMAGED: "fetch it again",
    MISNAMED: "give it the name of what it is",
    WINDOW: "compress it anew (zstd -dc --long=31 OLD | zstd > NEW, or xz -6)",
    NOT_JSON: "give one JSON object per line",
    TOO_DEEP: "take out what is nested",
    TOO_LONG: "give one JSON object per line",
    NO_KEY: "name the key that holds the text with --text_key",
    NO_COLUMN: "name the column that holds the text with --text_key",
    NOT_TEXT: "make the value a string",
}


class Piece(NamedTuple):
    """Text of one document, or a part of it; the last part says that the document ends here."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class SourceOptions:
    """How sources become documents.

    ``document`` is for plain text only. The default, one document per file, joins nothing that was apart and cuts
    nothing that was together: a file is the only border that every plain text has. Blank lines end a document with
    ``paragraph``, line breaks with ``line``.
    """

    text_key: str = "text"
    document: Document = "file"
    on_error: OnError = "fail"
    streaming: bool = False
    cache_dir: str | None = None


@dataclass(frozen=True)
class Span:
    """One stretch of one source: bytes of a text or JSON file, row groups of a parquet file, rows of a data set."""

    kind: str
    path: str
    start: int
    end: int
    last: bool
    """It reaches the end of the source."""
    size: int
    """Bytes of the source it stands for."""
    stamp: str
    """Another one when the source has changed."""
    rows_before: int = 0
    """Rows of a parquet file before ``start``."""


@dataclass(frozen=True)
class Unit:
    """Spans that one worker reads at a time."""

    spans: tuple[Span, ...]
    options: SourceOptions

    @property
    def size(self) -> int:
        """Bytes of the sources it stands for."""
        return sum(span.size for span in self.spans)

    def fingerprint(self, *more: object) -> str:
        """Hex digest of what is read and how; two units with the same one give the same pieces."""
        how = (self.options.text_key, self.options.document)  # what is skipped or cached changes no piece
        return hashlib.sha256(json.dumps([[asdict(s) for s in self.spans], how, more]).encode()).hexdigest()[:32]


class Place(NamedTuple):
    """Where something is wrong: byte ``number`` of a text file, or row ``number`` of a table (from 0)."""

    path: str
    number: int
    unit: str = "row"

    def __str__(self) -> str:
        if self.unit == "file":
            return self.path
        number = _lines_before(self.path, self.number) if self.unit == "byte" else self.number
        return f"{self.path}, {'line' if self.unit == 'byte' else 'row'} {number + 1}"


@dataclass
class Skips:
    """What was left out, by reason, with the first place of each; or a refusal at the first, if so asked."""

    on_error: OnError = "fail"
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, Place] = field(default_factory=dict)

    def add(self, reason: str, place: Place, detail: str = "") -> None:
        """Count it.

        Raises:
            DataError: with ``on_error="fail"``; but an empty document holds nothing that could be lost.
        """
        if self.on_error == "fail" and reason != EMPTY:
            more = f" ({detail})" if detail else ""
            raise DataError(f"{place}: {reason}{more}; {_MENDS[reason]}, or leave such text out with --on_error skip")
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, place)


def plan_units(sources: Iterable[str], options: SourceOptions) -> list[Unit]:
    """Cut sources into units, in the order given; folders and globs in the order of their paths.

    Units hold 1 to 16 MiB, a 64th of the whole if that lies between: small enough for many workers to end together,
    large enough for few files. A compressed file and a row group stay whole.

    Raises:
        DataError: a source that is missing, empty, unreadable or unknown; a parquet file without the column.
    """
    paths = [path for source in sources for path in _expand(source, options)]
    try:
        total = sum(os.path.getsize(path) for path in paths if not path.startswith("hub:"))
        unit_bytes = min(16 << 20, max(1 << 20, total // 64))
        return _fill([span for path in paths for span in _spans(path, options, unit_bytes)], options, unit_bytes)
    except OSError as error:
        raise DataError(
            f"source {error.filename or 'file'} changed or went away ({error.strerror}); try again"
        ) from None


def _fill(spans: list[Span], options: SourceOptions, unit_bytes: int) -> list[Unit]:
    """Units of the spans, in order, none larger than asked unless a single span is."""
    units: list[Unit] = []
    waiting: list[Span] = []
    size = 0
    for span in spans:
        if waiting and size + span.size > unit_bytes:
            units.append(Unit(tuple(waiting), options))
            waiting, size = [], 0
        waiting.append(span)
        size += span.size
    return [*units, Unit(tuple(waiting), options)] if waiting else units


def read_unit(unit: Unit, skips: Skips | None = None) -> Iterator[Piece]:
    """The pieces of a unit, in order; what cannot be read is refused or counted in ``skips``.

    Raises:
        DataError: text that cannot be read, with ``on_error="fail"``, with file, line or row and the mend.
    """
    skips = Skips(unit.options.on_error) if skips is None else skips
    readers = {TEXT: _read_text, JSON: _read_json, PARQUET: _read_parquet, HUB: _read_hub, STREAM: _read_hub}
    for span in unit.spans:
        yield from readers[span.kind](span, unit.options, skips)


def text_before(unit: Unit) -> str:
    """The last character before a unit that begins inside a document (any, if it is none of ASCII); "" otherwise."""
    span = unit.spans[0]
    if span.kind != TEXT or unit.options.document != "file" or not span.start:
        return ""
    try:
        with open_plain(span.path) as stream:
            stream.seek(span.start - 1)
            return stream.read(1).decode("ascii", errors="replace") or "\n"
    except DAMAGES:  # reading on will say so
        return "\n"


# ---------------------------------------------------------------- sources


def _expand(source: str, options: SourceOptions) -> list[str]:
    """Paths of files, and hub names, behind one source."""
    if source.startswith("hub:"):
        return [source]
    if source.startswith("recipe:"):
        from vqmoe_ds.data.recipes import fetch_recipe

        found = fetch_recipe(source.removeprefix("recipe:"), options.cache_dir)
        found = [found] if isinstance(found, str | Path) else found
        return [path for item in found for path in _expand(str(item), options)]
    if os.path.isdir(source):
        files = _files_of(source)
    else:
        files = [source] if os.path.exists(source) else sorted(_matches(source))
    if not files:
        what = "holds no files" if os.path.isdir(source) else why_missing(source)
        raise DataError(f"source {source} {what}; give files, folders, globs, recipe:NAME or hub:NAME")
    for path in files:
        _check_file(path, options)
    return files


def _files_of(folder: str) -> list[str]:
    """Files of a folder at any depth, hidden ones left out, in the order of their paths; says what it passes over."""
    try:
        files, others = list_tree(folder)
    except OSError as error:
        raise DataError(f"source {error.filename} cannot be listed ({error.strerror}); give another folder") from None
    if others:
        first = os.path.join(folder, min(others))
        print(f"{folder}: passed over {len(others):,} that are no files, {first} the first", file=sys.stderr)
    return [os.path.join(folder, file) for file in sorted(files)]


def _matches(pattern: str) -> list[str]:
    """The files that a pattern matches, with ``**`` as many folders as there are.

    ``glob`` would follow links round in a circle, and end after some hundred levels.
    """
    parts = os.path.normpath(pattern).split(os.sep)
    if "**" not in parts:
        try:
            return [path for path in glob.glob(pattern) if os.path.isfile(path)]
        except (ValueError, RecursionError, re.error):
            return []
    root = os.sep.join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))]) or (
        os.sep if os.path.isabs(pattern) else ""
    )
    if not os.path.isdir(root or os.curdir):
        return []
    below = parts[len(root.rstrip(os.sep).split(os.sep)) if root else 0 :]
    hidden = any(part.startswith(".") for part in below)
    files, _ = list_tree(root or os.curdir, hidden)
    return [os.path.join(root, file) for file in files if _fits(file.split(os.sep), below)]


def _fits(names: list[str], pattern: list[str]) -> bool:
    """Whether a path matches a pattern, part by part."""
    places = {0}  # parts of the pattern that may come next
    for name in names:
        places |= {place + 1 for place in sorted(places) if pattern[place : place + 1] == ["**"]}
        after = set()
        for place in places:
            part = pattern[place] if place < len(pattern) else ""
            if part == "**" and not name.startswith("."):
                after.add(place)
            elif fnmatch.fnmatchcase(name, part) and (part.startswith(".") or not name.startswith(".")):
                after.add(place + 1)
        places = after
    return len(pattern) in places or (len(pattern) - 1 in places and pattern[-1] == "**")


def _check_file(path: str, options: SourceOptions) -> None:
    try:
        check_content(path)
    except OSError as error:
        raise DataError(f"source {path} cannot be read ({error.strerror}); check what it is") from error
    except DataError as error:  # counted by whoever reads it, if it is to be left out
        if options.on_error == "fail":
            raise DataError(f"{error}, or leave such text out with --on_error skip") from None


def _spans(path: str, options: SourceOptions, unit_bytes: int) -> Iterator[Span]:
    if path.startswith("hub:"):
        yield from _hub_spans(path, options, unit_bytes)
        return
    status = os.stat(path)
    stamp, size = f"{status.st_size}.{status.st_mtime_ns}", status.st_size
    name = without_suffix(path)
    if path.endswith(".parquet"):
        yield from _parquet_spans(path, options, unit_bytes, stamp)
        return
    kind = JSON if name.endswith(_JSON_LINES) else TEXT
    if name != path:
        yield Span(kind, path, 0, -1, True, size, stamp)
        return
    wanted = "line" if kind == JSON else options.document
    start = 0
    while start < size or start == 0:
        end = _snap(path, start + unit_bytes, size, wanted)
        yield Span(kind, path, start, end, end == size, end - start, stamp)
        if end == size:
            return
        start = end


def _snap(path: str, offset: int, size: int, document: Document) -> int:
    """First place at or after ``offset`` where a unit may end."""
    if offset >= size:
        return size
    with open_regular(path, links=True) as stream:
        stream.seek(offset)
        if document == "file":
            window = stream.read(PIECE_BYTES)
            for mark in (b"\n", b" "):
                if mark in window:
                    return offset + window.index(mark) + 1
            while window and (window[0] & 0xC0) == 0x80:  # inside a character
                window, offset = window[1:], offset + 1
            return offset
        marks, tail = _BORDERS[document], b""
        while block := stream.read(1 << 20):
            block = tail + block
            ends = [block.index(mark) + len(mark) for mark in marks if mark in block]
            if ends:
                return stream.tell() - len(block) + min(ends)
            tail = block[-2:] if document == "paragraph" else b""
    return size


# ---------------------------------------------------------------- plain text

_BORDERS: dict[str, tuple[bytes, ...]] = {"file": (), "paragraph": (b"\n\n", b"\n\r\n"), "line": (b"\n",)}
_BREAKS: list[tuple[bytes, ...]] = [(b"\n",), (b" ",)]  # where a document is cut that is too long for one piece
_LINE_BREAK = re.compile(r"\n")
_FIRST_BLANK = re.compile(r"\A(?:[ \t\r]*\n)+")
_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")


def _read_text(span: Span, options: SourceOptions, skips: Skips) -> Iterator[Piece]:
    blocks = _decoded(_blocks(span, options.document, skips), span, options.document, skips)
    if options.document == "file":
        yield from _whole_file(blocks, span, skips)
    else:
        yield from _split(blocks, options.document)


def _split(blocks: Iterator[tuple[str, bool]], document: Document) -> Iterator[Piece]:
    """Paragraphs or lines; blank ones separate and are no documents."""
    split = _BLANK_LINES.split if document == "paragraph" else _LINE_BREAK.split
    unfinished = broken = False  # a document goes on from the block before, which ended with a line break
    for text, at_border in blocks:
        straddling = unfinished and broken and document == "paragraph"
        *ended, rest = split("\n" + text if straddling else text)  # sees a blank line that straddles two blocks
        if straddling:
            ended, rest = ([ended[0][1:], *ended[1:]], rest) if ended else (ended, rest[1:])
        for part in [*ended, rest] if at_border else ended:
            if unfinished or part.strip():
                yield Piece((part if unfinished else _FIRST_BLANK.sub("", part)).rstrip("\r\n"), True)
            unfinished = False
        if not at_border and rest:
            yield Piece(rest if unfinished else _FIRST_BLANK.sub("", rest), False)
            unfinished, broken = True, rest.endswith("\n")
    if unfinished:
        yield Piece("", True)


def _whole_file(blocks: Iterator[tuple[str, bool]], span: Span, skips: Skips) -> Iterator[Piece]:
    """All text of the span; the document ends with the file, which may be in a later span."""
    before: str | None = None  # held back: only what follows tells whether it ends the document
    count = 0
    for text, _ in blocks:
        if before is not None:
            yield Piece(before, False)
        before, count = text, count + 1
    alone = span.start == 0 and span.last
    if alone and count < 2 and not (before or "").strip():
        skips.add(EMPTY, Place(span.path, 0, "file"))
    elif before is not None or span.last:
        yield Piece(before or "", span.last)


def _decoded(
    blocks: Iterator[tuple[int, bytes, bool]], span: Span, document: Document, skips: Skips
) -> Iterator[tuple[str, bool]]:
    """Blocks as text; a line that is not UTF-8 is refused or left out, and the lines around it stay."""
    gap = "\n" if document == "line" else ""  # an empty line is no line of its own, but an empty paragraph splits one
    for offset, block, at_border in blocks:
        try:
            text = block.decode()
        except UnicodeDecodeError:
            text = "".join(_good_lines(offset, block, span.path, gap, skips))
        yield text.removeprefix("\ufeff") if offset == 0 else text, at_border


def _good_lines(offset: int, block: bytes, path: str, gap: str, skips: Skips) -> Iterator[str]:
    for line in block.splitlines(keepends=True):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            skips.add(BAD_UTF8, Place(path, offset, "byte"), f"byte 0x{line[error.start]:02x}")
            yield gap
        offset += len(line)


def _blocks(span: Span, document: Document, skips: Skips) -> Iterator[tuple[int, bytes, bool]]:
    """(offset, block of at most 64 KiB, whether a document ends with it).

    Blocks are cut after the last border of a document in them; without one, after the last line break, the last
    space, or the last whole character.
    """
    marks: list[tuple[bytes, ...]] = [_BORDERS[document], *_BREAKS][document == "line" :]
    rest, offset = b"", span.start
    for more in _chunks(span, PIECE_BYTES, skips):
        rest += more
        while len(rest) >= PIECE_BYTES:
            end, level = _cut(rest[:PIECE_BYTES], marks)
            yield offset, rest[:end], level == 0 and document != "file"
            rest, offset = rest[end:], offset + end
    if rest:
        yield offset, rest, True


def _cut(block: bytes, marks: list[tuple[bytes, ...]]) -> tuple[int, int]:
    for level, group in enumerate(marks):
        end = max((block.rfind(mark) + len(mark) for mark in group if mark in block), default=0)
        if end:
            return end, level
    end = len(block)
    while end > len(block) - 4 and (block[end - 1] & 0xC0) == 0x80:
        end -= 1
    first = block[end - 1]  # the last byte that begins a character, whole only if all its bytes are here
    length = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    return (len(block) if end - 1 + length == len(block) else end - 1), len(marks)


# ---------------------------------------------------------------- JSON lines


def _read_json(span: Span, options: SourceOptions, skips: Skips) -> Iterator[Piece]:
    for offset, line in _json_lines(span, skips):
        place = Place(span.path, offset, "byte")
        try:
            record = read_json(line.decode().removeprefix("\ufeff") if offset == 0 else line.decode())
        except UnicodeDecodeError as error:
            skips.add(BAD_UTF8, place, f"byte 0x{line[error.start]:02x}")
        except RecursionError:
            skips.add(TOO_DEEP, place)
        except ValueError as error:
            skips.add(NOT_JSON, place, str(error))
        else:
            if not isinstance(record, dict):
                skips.add(NOT_JSON, place, f"it is a {type(record).__name__}")
            elif options.text_key not in record:
                skips.add(NO_KEY, place, f"no {options.text_key!r}; it has {_shown(record) or 'none'}")
            else:
                yield from _pieces(record[options.text_key], place, skips)


def read_json(text: str) -> Any:
    """As ``json.loads``, which refuses whole numbers of more than 4,300 digits: they are read as floats."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 1000 else float(digits))


def _shown(names: Iterable[str]) -> str:
    """The first few names, as far as a sentence can hold them."""
    return ", ".join(one_line(name, 40) for name in list(names)[:8])


def _json_lines(span: Span, skips: Skips) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of a span, blank lines left out."""
    parts: list[bytes] = []  # of a line that goes on
    offset, held = span.start, 0
    for chunk in _chunks(span, 1 << 20, skips):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            whole = b"".join([*parts, line])
            if held + len(line) > LONGEST_JSON:
                skips.add(TOO_LONG, Place(span.path, offset, "byte"))
            elif whole.strip():
                yield offset, whole
            offset += held + len(line) + 1
            parts, held = [], 0
        held += len(rest)
        parts = [*parts, rest] if held <= LONGEST_JSON else []
    if held > LONGEST_JSON:
        skips.add(TOO_LONG, Place(span.path, offset, "byte"))
    elif b"".join(parts).strip():
        yield offset, b"".join(parts)


def _pieces(value: object, place: Place, skips: Skips) -> Iterator[Piece]:
    """One document out of a JSON line or a table."""
    if not isinstance(value, str):
        skips.add(NOT_TEXT, place, f"it is {'null' if value is None else type(value).__name__}")
        return
    if not value.strip():
        skips.add(EMPTY, place)
        return
    try:
        data = value.encode()
    except UnicodeEncodeError:
        skips.add(HALF, place)
        return
    if len(data) <= PIECE_BYTES:
        yield Piece(value, True)
        return
    while len(data) > PIECE_BYTES:
        end, _ = _cut(data[:PIECE_BYTES], _BREAKS)
        yield Piece(data[:end].decode(), False)
        data = data[end:]
    yield Piece(data.decode(), True)


# ---------------------------------------------------------------- tables


def _parquet_spans(path: str, options: SourceOptions, unit_bytes: int, stamp: str) -> Iterator[Span]:
    """Row groups, as many in a span as fit."""
    skips, key = Skips(options.on_error), options.text_key
    try:
        with _parquet(path) as file:
            groups, names = _row_groups(file, os.path.getsize(path)), file.schema_arrow.names
        if key not in names:
            skips.add(NO_COLUMN, Place(path, 0, "file"), f"no {key!r}; it has {_shown(names)}")
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file brings about
        skips.add(DAMAGED, Place(path, 0, "file"), _first_line(error))
    if skips.counts:  # counted by whoever reads it
        yield Span(PARQUET, path, 0, 0, True, os.path.getsize(path), stamp)
        return
    start = size = rows = rows_before = 0
    for group, (own, count) in enumerate(groups):
        if size and size + own > unit_bytes:
            yield Span(PARQUET, path, start, group, False, size, stamp, rows_before)
            start, size, rows_before = group, 0, rows
        size, rows = size + own, rows + count
    yield Span(PARQUET, path, start, len(groups), True, size, stamp, rows_before)


def _row_groups(file: Any, size: int) -> list[tuple[int, int]]:
    """(bytes, by its share of the rows, rows) of each row group of a file of ``size`` bytes.

    pyarrow's metadata of row groups and columns would end the process where they are damaged: it throws what Python
    cannot catch. Reading no columns says how many rows there are, and raises.
    """
    rows = [file.read_row_group(group, columns=[]).num_rows for group in range(file.num_row_groups)]
    return [(size * count // max(1, sum(rows)), count) for count in rows]


def _read_parquet(span: Span, options: SourceOptions, skips: Skips) -> Iterator[Piece]:
    row = span.rows_before
    try:
        with _parquet(span.path) as file:
            if options.text_key not in file.schema_arrow.names:
                skips.add(NO_COLUMN, Place(span.path, 0, "file"), f"no {options.text_key!r}")
                return
            groups = list(range(span.start, span.end))
            for batch in file.iter_batches(1024, row_groups=groups, columns=[options.text_key], use_threads=False):
                yield from _column(batch.column(0), span.path, row, skips)
                row += len(batch)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file brings about
        skips.add(DAMAGED, Place(span.path, row), _first_line(error))


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with open_regular(path, links=True) as stream, pq.ParquetFile(stream) as file:
        yield file


def _column(column: Any, path: str, row: int, skips: Skips) -> Iterator[Piece]:
    """The values of an Arrow column, one document each."""
    for index, value in enumerate(column):
        place = Place(path, row + index)
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            skips.add(BAD_UTF8, place)
        else:
            yield from _pieces(text, place, skips)


def _hub_spans(path: str, options: SourceOptions, unit_bytes: int) -> Iterator[Span]:
    data = _hub_data(path, options.streaming, options.cache_dir)
    names = data.column_names
    if names is not None and options.text_key not in names:
        raise DataError(f"{path}: no column {options.text_key!r}; name one of {', '.join(names)} with --text_key")
    if options.streaming:
        for shard in range(data.num_shards):  # of unknown size: one a unit
            yield Span(STREAM, path, shard, shard + 1, shard + 1 == data.num_shards, unit_bytes, str(data.num_shards))
        return
    rows = max(1, len(data) * unit_bytes // max(1, data.data.nbytes))
    for start in range(0, len(data), rows):
        end = min(len(data), start + rows)
        size = data.data.nbytes * (end - start) // len(data)
        yield Span(HUB, path, start, end, end == len(data), size, str(data._fingerprint), start)


def _read_hub(span: Span, options: SourceOptions, skips: Skips) -> Iterator[Piece]:
    data, key = _hub_data(span.path, span.kind == STREAM, options.cache_dir), options.text_key
    if span.kind == STREAM:
        for row, record in enumerate(data.shard(data.num_shards, span.start)):
            place = Place(f"{span.path} shard {span.start}", row)
            if key in record:
                yield from _pieces(record[key], place, skips)
            else:
                skips.add(NO_COLUMN, place, f"no {key!r}; it has {_shown(record)}")
        return
    table = data.select_columns([key]).with_format("arrow")
    for start in range(span.start, span.end, 1024):
        column = table[start : min(start + 1024, span.end)].column(key)
        yield from _column(column, span.path, start, skips)


@lru_cache(maxsize=4)
def _hub_data(path: str, streaming: bool, cache_dir: str | None) -> Any:
    datasets = library("datasets", "datasets<6", "reading from the Hugging Face hub")
    name, config, split = [*path.removeprefix("hub:").split(":", 2), "", ""][:3]
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            name, config or None, split=split or "train", streaming=streaming, cache_dir=cache_dir
        )
    except Exception as error:  # a library of many back ends: whatever it raises, the user named what it cannot load
        raise DataError(
            f"{path} cannot be loaded ({type(error).__name__}: {_first_line(error)}); check name, configuration and "
            "split (hub:NAME:CONFIG:SPLIT) and that the hub can be reached"
        ) from error


# ---------------------------------------------------------------- bytes


def _chunks(span: Span, size: int, skips: Skips) -> Iterator[bytes]:
    """The bytes of a span; a damaged compressed file gives what comes before the damage."""
    left = span.end - span.start if span.end >= 0 else None
    try:
        check_content(span.path)
        with open_plain(span.path) as stream:
            if span.start:
                stream.seek(span.start)
            while left is None or left > 0:
                data = stream.read1(size if left is None else min(size, left))  # what precedes damage is given
                if not data:
                    break
                left = None if left is None else left - len(data)
                yield data
    except DataError:
        skips.add(MISNAMED, Place(span.path, 0, "file"))
        return
    except DAMAGES as error:
        reason = WINDOW if isinstance(error, WindowTooLarge) else DAMAGED
        skips.add(reason, Place(span.path, 0, "file"), _first_line(error))
        return
    if left:
        skips.add(DAMAGED, Place(span.path, 0, "file"), "it became shorter while it was read")


def _lines_before(path: str, offset: int) -> int:
    """Line breaks before byte ``offset`` of the text; 0 where the file can no longer be read."""
    lines = 0
    try:
        with open_plain(path) as stream:
            while offset > 0 and (block := stream.read(min(1 << 20, offset))):
                lines, offset = lines + block.count(b"\n"), offset - len(block)
    except DAMAGES:
        return 0
    return lines


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return one_line((str(text).strip() or type(error).__name__).splitlines()[0], 300)
