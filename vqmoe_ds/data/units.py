"""Units of work over sources of text, the pieces of documents that they hold, and what is left out.

A *unit* is what one worker does at a time: a few megabytes of one or more sources. A document arrives as *pieces* of at
most 64 KiB of UTF-8, so that memory does not grow with its length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

from vqmoe_ds.data.compressed import DAMAGES, open_plain
from vqmoe_ds.runtime.errors import DataError, one_line, reason_of

PIECE_BYTES = 64 << 10
"""Longest piece of a document, in bytes of UTF-8."""

Document = Literal["file", "paragraph", "line"]
OnError = Literal["fail", "skip"]

LONGEST_JSON = 32 << 20
"""Bytes of a JSON line, at most: its values can take 25 times as many in memory."""

TEXT, JSON, PARQUET, HUB, STREAM = "text", "json", "parquet", "hub", "stream"

EMPTY, BAD_UTF8, DAMAGED = "empty document", "not UTF-8", "damaged file"
HALF, TOO_DEEP, WINDOW = "half of a surrogate pair", "JSON nested too deeply", "compressed with too large a window"
MISNAMED = "bytes of another kind than its name says"
NOT_JSON, NO_KEY, NO_COLUMN, NOT_TEXT = "not a JSON object", "without the key", "without the column", "not a string"
TOO_LONG = f"a line of more than {LONGEST_JSON >> 20} MiB"
_HINTS = {
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

BREAKS: list[tuple[bytes, ...]] = [(b"\n",), (b" ",)]
"""Marks at which a document that is too long for one piece is cut, the preferred ones first."""


class Piece(NamedTuple):
    """Text of one document, or a part of it; the last part says that the document ends here."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class SourceOptions:
    """Rules that turn sources into documents.

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
    """Whether it reaches the end of the source."""
    size: int
    """Bytes of the source it stands for."""
    stamp: str
    """Mark of the source's state, which changes with the source."""
    rows_before: int = 0
    """Rows of a parquet file before ``start``."""


@dataclass(frozen=True)
class Unit:
    """Spans that one worker reads at a time."""

    spans: tuple[Span, ...]
    options: SourceOptions
    limit: int | None = None
    """Tokens to take of it, at most."""

    @property
    def size(self) -> int:
        """Bytes of the sources it stands for."""
        return sum(span.size for span in self.spans)

    def fingerprint(self, *more: object) -> str:
        """Hex digest of what is read and how; two units with the same one give the same pieces."""
        how = (self.options.text_key, self.options.document)  # what is skipped or cached changes no piece
        what = [[asdict(s) for s in self.spans], how, more, *([] if self.limit is None else [self.limit])]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


class Place(NamedTuple):
    """Place of something wrong: byte ``number`` of a text file, or row ``number`` of a table (from 0)."""

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
    """Counts of what was left out, by reason, with the first place of each; or a refusal at the first, if so asked."""

    on_error: OnError = "fail"
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, Place] = field(default_factory=dict)

    def add(self, reason: str, place: Place, detail: str = "") -> None:
        """Count one that is left out.

        Raises:
            DataError: with ``on_error="fail"``; but an empty document holds nothing that could be lost.
        """
        if self.on_error == "fail" and reason != EMPTY:
            more = f" ({detail})" if detail else ""
            raise DataError(f"{place}: {reason}{more}; {_HINTS[reason]}, or leave such text out with --on_error skip")
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, place)


def pieces_of(value: object, place: Place, skips: Skips) -> Iterator[Piece]:
    """Pieces of one document, a value of a JSON line or of a table."""
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
        end, _ = cut(data[:PIECE_BYTES], BREAKS)
        yield Piece(data[:end].decode(), False)
        data = data[end:]
    yield Piece(data.decode(), True)


def cut(block: bytes, marks: list[tuple[bytes, ...]]) -> tuple[int, int]:
    """(offset at which a block is cut, level of the mark): after its last mark of the first group that it holds.

    Without any it is cut after its last whole character, at level ``len(marks)``.
    """
    for level, group in enumerate(marks):
        end = max((block.rfind(mark) + len(mark) for mark in group if mark in block), default=0)
        if end:
            return end, level
    end = len(block)
    # At most three bytes follow the first of a character.
    while end > len(block) - 4 and (block[end - 1] & 0xC0) == 0x80:
        end -= 1
    first = block[end - 1]  # the last byte that begins a character, whole only if all its bytes are here
    length = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    return (len(block) if end - 1 + length == len(block) else end - 1), len(marks)


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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters."""
    return one_line(str(getattr(error, "strerror", None) or reason_of(error)), 300)


def some_of(names: Iterable[str]) -> str:
    """The first few names, as far as a sentence can hold them."""
    return ", ".join(one_line(name, 40) for name in list(names)[:8])
