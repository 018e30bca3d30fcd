"""Every valid stream of the formats is read whole, and a refusal names the true reason."""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vqmoe_ds.data import corpus
from vqmoe_ds.data.compressed import DAMAGES, check_content, open_plain
from vqmoe_ds.data.corpus import open_corpus
from vqmoe_ds.data.documents import plan_units, read_unit
from vqmoe_ds.data.labelled import open_labelled
from vqmoe_ds.data.units import DAMAGED, WINDOW, OnError, Skips, SourceOptions
from vqmoe_ds.evaluation import generate_command
from vqmoe_ds.finetune import predict
from vqmoe_ds.runtime.errors import DataError

ONE, TWO = b"first\n" * 70_000, np.random.default_rng(0).bytes(300_000)
SKIPPED = struct.pack("<II", 0x184D2A53, 5) + b"aside"
RAW_BLOCK = (5 << 3 | 1).to_bytes(3, "little") + b"hello"


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def frame(window_log: int) -> bytes:
    """A zstd frame of one raw block, as of a stream whose length was not known."""
    return b"\x28\xb5\x2f\xfd" + bytes([0, (window_log - 10) << 3]) + RAW_BLOCK


STREAMS = {
    "members.gz": gzip.compress(ONE) + gzip.compress(TWO),
    "padded.gz": gzip.compress(ONE) + bytes(700) + gzip.compress(TWO) + bytes(9),
    "empty_between.gz": gzip.compress(ONE) + gzip.compress(b"") + gzip.compress(TWO),
    "streams.bz2": bz2.compress(ONE) + bz2.compress(b"") + bz2.compress(TWO),
    "empty_first.bz2": bz2.compress(b"") + bz2.compress(ONE + TWO),
    "padded.bz2": bz2.compress(ONE) + bytes(8) + bz2.compress(TWO),
    "padded.xz": lzma.compress(ONE) + bytes(100_000) + lzma.compress(TWO) + bytes(4),
    "old.xz": lzma.compress(ONE + TWO, lzma.FORMAT_ALONE),
    "frames.zst": zstd(ONE) + zstd(TWO),
    "skippable.zst": SKIPPED + zstd(ONE) + SKIPPED + zstd(TWO) + SKIPPED,
}


@pytest.mark.parametrize("name", STREAMS)
def test_every_valid_stream_is_read_to_its_end(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(STREAMS[name])
    check_content(tmp_path / name)
    with open_plain(tmp_path / name) as stream:
        assert stream.read(3) + stream.read() == ONE + TWO  # in more than one call
    assert open_corpus(str(tmp_path / name)).num_bytes == len(ONE + TWO)


@pytest.mark.parametrize(
    "name, after", [("a.gz", b"x"), ("a.bz2", b"x" * 20), ("a.xz", b"xyzw" * 9), ("a.zst", b"xyzw")]
)
def test_no_damage_passes_for_an_end(name: str, after: bytes, tmp_path: Path) -> None:
    whole = {"a.gz": gzip.compress, "a.bz2": bz2.compress, "a.xz": lzma.compress, "a.zst": zstd}[name](ONE)
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole + after, whole + whole[:-1]):
        (tmp_path / name).write_bytes(damaged)
        with open_plain(tmp_path / name) as stream, pytest.raises(DAMAGES):
            stream.read()


def _pieces(path: Path, skips: Skips | None = None) -> list[str]:
    return [piece.text for unit in plan_units([str(path)], SourceOptions()) for piece in read_unit(unit, skips)]


def test_a_window_too_large_is_not_called_damage(tmp_path: Path) -> None:
    path = tmp_path / "long.txt.zst"
    path.write_bytes(frame(27))
    assert _pieces(path) == ["hello"]
    path.write_bytes(frame(27) + frame(31))
    for read in (_pieces, lambda path: open_corpus(str(path))):
        with pytest.raises(DataError, match=r"too large a window.*128 MiB.*--long=28.*(compress it anew|unpack it)"):
            read(path)
    skips = Skips("skip")
    _pieces(path, skips)
    assert skips.counts[WINDOW] == 1 and DAMAGED not in skips.counts


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.jsonl", gzip.compress(b"{}"), "holds gzip data, which its name does not say; rename it .*ends in .gz"),
        ("a.txt", zstd(b"x"), "holds zstd data.*ends in .zst"),
        ("a.txt.gz", bz2.compress(b"x"), "holds bzip2 data.*ends in .bz2"),
        ("a.csv", b"PAR1....", "holds parquet data.*ends in .parquet"),
        ("a.csv.xz", b"text,label\n", "is not xz data, as its name says.*take .xz off its name"),
        ("a.tsv", b"PK\x03\x04", "is compressed ..zip., which is not read; unpack it"),
        ("a.txt", b"\x04\x22\x4d\x18", "is compressed ..lz4."),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer.*git lfs pull"),
    ],
    ids=["gzip", "zstd", "bzip2", "parquet", "plain", "zip", "lz4", "lfs"],
)
def test_bytes_under_another_name_are_named(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    readers: list[Callable[[Path], object]] = [_pieces, lambda path: open_corpus(str(path))]
    readers += [lambda path: open_labelled(f"{path}"), lambda path: list(predict._rows(str(path), "text"))]
    for read in readers:
        with pytest.raises(DataError, match=sentence):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "name, sentence",
    [
        *((f"a.{end}", "is an archive of files; unpack it and give its folder") for end in ("tar.bz2", "tgz", "zip")),
        ("a.parquet.gz", "is a table that was compressed once more; unpack it"),
    ],
)
def test_archives_are_not_read_as_text(name: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"x"))
    for read in (_pieces, lambda path: open_corpus(str(path))):
        with pytest.raises(DataError, match=sentence):
            read(tmp_path / name)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_missing_package_is_no_fault_of_a_file(
    on_error: OnError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, path = SourceOptions(on_error=on_error), tmp_path / "a.txt.zst"
    path.write_bytes(zstd(ONE))
    (unit,) = plan_units([str(path)], options)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for read in (lambda: plan_units([str(path)], options), lambda: list(read_unit(unit))):
        with pytest.raises(DataError, match=r"^reading Zstandard needs pyarrow, .*pip install 'vqmoe_ds\[data\]'$"):
            read()


def test_dangling_links_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").symlink_to(tmp_path / "gone")
    for read in (_pieces, lambda path: open_corpus(str(path)), lambda path: open_labelled(str(path))):
        with pytest.raises(DataError, match=r"t.jsonl is a link to .*gone, which does not exist"):
            read(tmp_path / "t.jsonl")


def test_raw_text_larger_than_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.gz").write_bytes(gzip.compress(bytes(10 << 20)))
    monkeypatch.setattr(corpus, "free_bytes", lambda: 4 << 20)
    with pytest.raises(DataError, match=r"t.gz holds more text than this machine has memory for.*prepare_data"):
        open_corpus(str(tmp_path))


def test_labelled_sets_and_texts_to_classify(tmp_path: Path) -> None:
    rows = b"".join(json.dumps({"text": f"t{i}", "label": i % 2}).encode() + b"\n" for i in range(9))
    (tmp_path / "train.jsonl.zst").write_bytes(zstd("\ufeff".encode() + rows[:99]) + zstd(rows[99:]))
    texts = [text for _, text in predict._rows(str(tmp_path / "train.jsonl.zst"), "text")]
    assert texts == open_labelled(str(tmp_path)).texts == [f"t{i}" for i in range(9)]


@pytest.mark.parametrize("packed", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_a_prompt_may_be_compressed(packed: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = argparse.Namespace(buffer=io.BytesIO(packed("\ufeffEin Anfang é".encode())))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert generate_command._piped() == "Ein Anfang é"
    stdin.buffer = io.BytesIO(packed(ONE)[:-9])
    with pytest.raises(DataError, match="cannot be decompressed"):
        generate_command._piped()


@pytest.mark.parametrize("inner", [".gz", ".bz2", ".xz", ".parquet"])
def test_what_was_compressed_twice_is_named_as_that(tmp_path, inner):
    text = b'{"text": "some words"}\n'
    data = {".gz": gzip.compress(text), ".bz2": bz2.compress(text), ".xz": lzma.compress(text), ".parquet": b"PAR1" * 9}
    path = tmp_path / "twice.jsonl.gz"
    path.write_bytes(gzip.compress(data[inner]))
    with pytest.raises(DataError, match=rf"compressed twice; unpack it once, to a name that ends in \{inner}$"):
        check_content(path)
    path.write_bytes(gzip.compress(text)[:-9])
    check_content(path)
