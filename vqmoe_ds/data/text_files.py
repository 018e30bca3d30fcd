"""Plain text as documents: whole files, paragraphs or lines."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vqmoe_ds.data.compressed import DAMAGES, Misnamed, WindowTooLarge, check_content, open_plain
from vqmoe_ds.data.units import (
    BAD_UTF8,
    BREAKS,
    DAMAGED,
    EMPTY,
    MISNAMED,
    PIECE_BYTES,
    WINDOW,
    Document,
    Piece,
    Place,
    Skips,
    SourceOptions,
    Span,
    cut,
    first_line,
)
from vqmoe_ds.runtime.files import open_regular

# Units and blocks may end after these. Those of a paragraph have to match _BLANK_LINES, else a cut would end one that
# goes on.
_BORDERS: dict[str, tuple[bytes, ...]] = {"file": (), "paragraph": (b"\n\n", b"\n\r\n"), "line": (b"\n",)}
_LINE_BREAK = re.compile(r"\n")
_FIRST_BLANK = re.compile(r"\A(?:[ \t\r]*\n)+")
_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")


def read_text(span: Span, options: SourceOptions, skips: Skips) -> Iterator[Piece]:
    """The pieces of a stretch of a text file."""
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
    # Of lines the border is the first of BREAKS: left out, so that level 0 means a border whatever a document is.
    marks: list[tuple[bytes, ...]] = [_BORDERS[document], *BREAKS][document == "line" :]
    rest, offset = b"", span.start
    for more in chunks(span, PIECE_BYTES, skips):
        rest += more
        while len(rest) >= PIECE_BYTES:
            end, level = cut(rest[:PIECE_BYTES], marks)
            yield offset, rest[:end], level == 0 and document != "file"
            rest, offset = rest[end:], offset + end
    if rest:
        yield offset, rest, True


def snap(path: str, offset: int, size: int, document: Document) -> int:
    """First offset from ``offset`` on at which a unit may end."""
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
            # The longest mark has three bytes, of which two may end this block.
            tail = block[-2:] if document == "paragraph" else b""
    return size


def chunks(span: Span, size: int, skips: Skips) -> Iterator[bytes]:
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
    except Misnamed:
        skips.add(MISNAMED, Place(span.path, 0, "file"))
        return
    except DAMAGES as error:
        reason = WINDOW if isinstance(error, WindowTooLarge) else DAMAGED
        skips.add(reason, Place(span.path, 0, "file"), first_line(error))
        return
    if left:
        skips.add(DAMAGED, Place(span.path, 0, "file"), "it became shorter while it was read")
