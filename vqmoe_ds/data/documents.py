"""Sources of text -> work units -> documents.

Units are cut from the sources alone, so they do not depend on how many workers or ranks share them, and read one after
the other they give every document of every source in order.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator

from vqmoe_ds.config.training import hub_source
from vqmoe_ds.data.compressed import DAMAGES, Misnamed, check_content, open_plain, without_suffix
from vqmoe_ds.data.json_lines import read_json_lines
from vqmoe_ds.data.tables import hub_spans, parquet_spans, read_hub, read_parquet
from vqmoe_ds.data.text_files import read_text, snap
from vqmoe_ds.data.units import HUB, JSON, PARQUET, STREAM, TEXT, Piece, Skips, SourceOptions, Span, Unit
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.files import list_tree, why_missing

logger = logging.getLogger(__name__)

_JSON_LINES = (".jsonl", ".ndjson", ".json")


def plan_units(sources: Iterable[str], options: SourceOptions) -> list[Unit]:
    """Cut sources into units, in the order given; folders and globs in the order of their paths.

    Units hold 1 to 16 MiB, a 64th of the whole if that lies between: small enough for many workers to end together,
    large enough for few files. A compressed file and a row group stay whole.

    Raises:
        DataError: a source that is missing, empty, unreadable or unknown; a parquet file without the column.
    """
    paths = [path for source in sources for path in files_of(source, options)]
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
        DataError: text that cannot be read, with ``on_error="fail"``, with file, line or row and the remedy.
    """
    skips = Skips(unit.options.on_error) if skips is None else skips
    readers = {TEXT: read_text, JSON: read_json_lines, PARQUET: read_parquet, HUB: read_hub, STREAM: read_hub}
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


def files_of(source: str, options: SourceOptions) -> list[str]:
    """Paths of files, and hub names, behind one source.

    Raises:
        DataError: a source that is missing, empty, unreadable or unknown.
    """
    source = hub_source(source)
    if source.startswith("hub:"):
        return [source]
    if source.startswith("recipe:"):
        from vqmoe_ds.data.recipes import fetch_recipe

        found = fetch_recipe(source.removeprefix("recipe:"), options.cache_dir)
        return [path for item in found for path in files_of(str(item), options)]
    if os.path.isdir(source):
        files = _files_of(source)
    else:
        # A name that is there is no pattern, whatever brackets it has. Sorted, as glob gives the order of the file
        # system, which differs between machines.
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
        logger.warning(f"{folder}: passed over {len(others):,} that are no files, {first} the first")
    return [os.path.join(folder, file) for file in sorted(files)]


def _matches(pattern: str) -> list[str]:
    """The files that a pattern matches, with ``**`` as many folders as there are.

    ``glob`` would follow links round in a circle, and end after some hundred levels.
    """
    every = os.path.normpath(pattern).split(os.sep)
    # A ** that follows another says nothing more.
    parts = [part for part, before in zip(every, ["", *every], strict=False) if part != "**" or before != "**"]
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
    # As in a shell, hidden names match only a pattern that spells the dot, and need not be listed without one.
    hidden = any(part.startswith(".") for part in below)
    files, _ = list_tree(root or os.curdir, hidden)
    return [os.path.join(root, file) for file in files if _fits(file.split(os.sep), below)]


def _fits(names: list[str], pattern: list[str]) -> bool:
    """Whether a path matches a pattern, part by part."""
    places = {0}  # parts of the pattern that may come next
    for name in names:
        # ** may stand for no folder at all
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
    except Misnamed as error:  # counted by whoever reads it, if it is to be left out
        if options.on_error == "fail":
            raise DataError(f"{error}, or leave such text out with --on_error skip") from None


def _spans(path: str, options: SourceOptions, unit_bytes: int) -> Iterator[Span]:
    if path.startswith("hub:"):
        yield from hub_spans(path, options, unit_bytes)
        return
    status = os.stat(path)
    # The stamp is part of a unit's fingerprint, so that no part made of an older state of the file is taken.
    stamp, size = f"{status.st_size}.{status.st_mtime_ns}", status.st_size
    name = without_suffix(path)
    if path.endswith(".parquet"):
        yield from parquet_spans(path, options, unit_bytes, stamp)
        return
    kind = JSON if name.endswith(_JSON_LINES) else TEXT
    if name != path:
        yield Span(kind, path, 0, -1, True, size, stamp)
        return
    wanted = "line" if kind == JSON else options.document
    start = 0
    while start < size or start == 0:  # an empty file is a span too, to be refused or counted by whoever reads it
        end = snap(path, start + unit_bytes, size, wanted)
        yield Span(kind, path, start, end, end == size, end - start, stamp)
        if end == size:
            return
        start = end
