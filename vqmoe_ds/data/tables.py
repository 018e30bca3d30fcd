"""Tables as documents: a column of parquet files, and of data sets of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from vqmoe_ds.data.units import (
    BAD_UTF8,
    DAMAGED,
    HUB,
    NO_COLUMN,
    PARQUET,
    STREAM,
    Piece,
    Place,
    Skips,
    SourceOptions,
    Span,
    first_line,
    pieces_of,
    some_of,
)
from vqmoe_ds.runtime.errors import DataError
from vqmoe_ds.runtime.extras import library
from vqmoe_ds.runtime.files import open_regular


def parquet_spans(path: str, options: SourceOptions, unit_bytes: int, stamp: str) -> Iterator[Span]:
    """Row groups, as many in a span as fit."""
    skips, key = Skips(options.on_error), options.text_key
    try:
        with parquet_file(path) as file:
            groups, names = row_groups(file, os.path.getsize(path)), file.schema_arrow.names
        if key not in names:
            skips.add(NO_COLUMN, Place(path, 0, "file"), f"no {key!r}; it has {some_of(names)}")
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file brings about
        skips.add(DAMAGED, Place(path, 0, "file"), first_line(error))
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


def row_groups(file: Any, size: int) -> list[tuple[int, int]]:
    """(bytes, by its share of the rows, rows) of each row group of a file of ``size`` bytes.

    pyarrow's metadata of row groups and columns would end the process where they are damaged: it throws what Python
    cannot catch. Reading no columns says how many rows there are, and raises.
    """
    rows = [file.read_row_group(group, columns=[]).num_rows for group in range(file.num_row_groups)]
    return [(size * count // max(1, sum(rows)), count) for count in rows]


def read_parquet(span: Span, options: SourceOptions, skips: Skips) -> Iterator[Piece]:
    """The pieces of row groups of a parquet file, one document per row."""
    row = span.rows_before
    try:
        with parquet_file(span.path) as file:
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
        skips.add(DAMAGED, Place(span.path, row), first_line(error))


@contextmanager
def parquet_file(path: str) -> Iterator[Any]:
    """An open Parquet file.

    Raises:
        DataError: pyarrow is not installed.
        OSError: the file cannot be read; of a damaged one pyarrow may raise more.
    """
    pq = library("pyarrow.parquet", "reading Parquet", DataError)
    with open_regular(path, links=True) as stream, pq.ParquetFile(stream) as file:
        yield file


@contextmanager
def from_hub(what: str, remedy: str) -> Iterator[Any]:
    """The library ``datasets``; whatever it raises in this context is one sentence, of ``what`` and ``remedy``.

    Raises:
        DataError: it is not installed, or raised something.
    """
    datasets = library("datasets", "reading from the Hugging Face hub", DataError)
    datasets.disable_progress_bars()
    try:
        yield datasets
    except Exception as error:  # it has many back ends, with errors of their own
        raise DataError(f"{what} cannot be loaded ({type(error).__name__}: {first_line(error)}); {remedy}") from error


def _column(column: Any, path: str, row: int, skips: Skips) -> Iterator[Piece]:
    """The values of an Arrow column, one document each."""
    for index, value in enumerate(column):
        place = Place(path, row + index)
        try:
            # One by one: to_pylist would fail for all of them at the first that is not UTF-8.
            text = value.as_py()
        except UnicodeDecodeError:
            skips.add(BAD_UTF8, place)
        else:
            yield from pieces_of(text, place, skips)


def hub_spans(path: str, options: SourceOptions, unit_bytes: int) -> Iterator[Span]:
    """Rows of a data set, as many in a span as fit; of one that is streamed, a shard in each."""
    data = _hub_data(path, options.streaming, options.cache_dir)
    names = data.column_names
    if names is not None and options.text_key not in names:
        raise DataError(f"{path}: no column {options.text_key!r}; name one of {', '.join(names)} with --text_key")
    if options.streaming:
        for shard in range(data.num_shards):  # of unknown size: one per unit
            yield Span(STREAM, path, shard, shard + 1, shard + 1 == data.num_shards, unit_bytes, str(data.num_shards))
        return
    rows = max(1, len(data) * unit_bytes // max(1, data.data.nbytes))
    for start in range(0, len(data), rows):
        end = min(len(data), start + rows)
        size = data.data.nbytes * (end - start) // len(data)
        # datasets' own digest of the rows and of what was done to them stands for the size and time of a file.
        yield Span(HUB, path, start, end, end == len(data), size, str(data._fingerprint), start)


def read_hub(span: Span, options: SourceOptions, skips: Skips) -> Iterator[Piece]:
    """The pieces of rows of a data set, one document per row."""
    data, key = _hub_data(span.path, span.kind == STREAM, options.cache_dir), options.text_key
    if span.kind == STREAM:
        for row, record in enumerate(data.shard(data.num_shards, span.start)):
            place = Place(f"{span.path} shard {span.start}", row)
            if key in record:
                yield from pieces_of(record[key], place, skips)
            else:
                skips.add(NO_COLUMN, place, f"no {key!r}; it has {some_of(record)}")
        return
    table = data.select_columns([key]).with_format("arrow")
    for start in range(span.start, span.end, 1024):
        column = table[start : min(start + 1024, span.end)].column(key)
        yield from _column(column, span.path, start, skips)


def hub_texts(path: str) -> list[np.ndarray]:
    """UTF-8 bytes of the texts of a data set, uint8, empty ones left out; they stay where ``datasets`` keeps them.

    Raises:
        DataError: it cannot be loaded, or has no column ``text`` of strings.
    """
    pa, key = library("pyarrow", "reading from the Hugging Face hub", DataError), SourceOptions.text_key
    table = _hub_data(path, False, None).data
    kind = table.schema.field(key).type if key in table.column_names else None
    # Of these types alone the texts lie end to end in one buffer.
    if kind not in (pa.string(), pa.large_string()):
        raise DataError(
            f"{path}: no column {key!r} of strings, only {some_of(table.column_names)}; prepare it "
            "(tools/prepare_data.py --text_key)"
        )
    texts: list[np.ndarray] = []
    for chunk in table.column(key).chunks:
        # Cast for the offsets, which are int64 then. A slice shares the buffers of its parent, hence rows.offset.
        rows = (chunk.drop_null() if chunk.null_count else chunk).cast(pa.large_binary())
        _, offsets, content = (np.frombuffer(buffer or b"", dtype=np.uint8) for buffer in rows.buffers())
        offsets_N = offsets.view(np.int64)[rows.offset : rows.offset + len(rows) + 1].tolist()
        texts += [content[start:end] for start, end in pairwise(offsets_N) if start < end]
    return texts


# Every unit of a set opens it anew.
@lru_cache(maxsize=4)
def _hub_data(path: str, streaming: bool, cache_dir: str | None) -> Any:
    name, config, split = [*path.removeprefix("hub:").split(":", 2), "", ""][:3]
    remedy = "check name, configuration and split (hub:NAME:CONFIG:SPLIT) and that the hub can be reached"
    options = {"split": split or "train", "streaming": streaming, "cache_dir": cache_dir}
    with from_hub(path, remedy) as datasets:
        return datasets.load_dataset(name, config or None, **options)
