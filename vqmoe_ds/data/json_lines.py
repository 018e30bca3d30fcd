"""JSON lines as documents: the string under one key of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from vqmoe_ds.data.text_files import chunks
from vqmoe_ds.data.units import (
    BAD_UTF8,
    LONGEST_JSON,
    NO_KEY,
    NOT_JSON,
    TOO_DEEP,
    TOO_LONG,
    Piece,
    Place,
    Skips,
    SourceOptions,
    Span,
    pieces_of,
    some_of,
)


def read_json_lines(span: Span, options: SourceOptions, skips: Skips) -> Iterator[Piece]:
    """The pieces of a stretch of JSON lines, one document per line."""
    for offset, line in _json_lines(span, skips):
        place = Place(span.path, offset, "byte")
        try:
            # Decoded line by line, so that bytes that are not UTF-8 cost no more than their own line.
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
                skips.add(NO_KEY, place, f"no {options.text_key!r}; it has {some_of(record) or 'none'}")
            else:
                yield from pieces_of(record[options.text_key], place, skips)


def read_json(text: str) -> Any:
    """``json.loads``, except that whole numbers of more than 4,300 digits, which it refuses, are read as floats."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 1000 else float(digits))


def _json_lines(span: Span, skips: Skips) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of a span, blank lines left out."""
    parts: list[bytes] = []  # of a line that goes on
    offset, held = span.start, 0
    for chunk in chunks(span, 1 << 20, skips):
        # Where snap cuts units, and nowhere else: splitlines would also cut at \r, which is white space to JSON.
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
        # Past the limit a line is counted on but not kept: memory stays bounded, and the next line's offset right.
        parts = [*parts, rest] if held <= LONGEST_JSON else []
    if held > LONGEST_JSON:
        skips.add(TOO_LONG, Place(span.path, offset, "byte"))
    elif b"".join(parts).strip():
        yield offset, b"".join(parts)
