"""Corpora: bytes of files in order, windows across their borders, and a split that loses and leaks nothing."""

from __future__ import annotations

import inspect
import json
import os
import resource
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vqmoe_ds.data import corpus as corpus_module
from vqmoe_ds.data.corpus import Corpus, open_corpus
from vqmoe_ds.data.raw_text import STRETCH, split_corpus, whole_corpus
from vqmoe_ds.runtime.errors import DataError


def _corpus(sizes: list[int]) -> tuple[Corpus, np.ndarray]:
    text = np.arange(sum(sizes)) % 251
    text = text.astype(np.uint8)
    ends = np.cumsum(sizes).tolist()
    pieces = tuple(text[end - size : end] for size, end in zip(sizes, ends, strict=True))
    return Corpus("test", pieces, tuple(ends)), text


@pytest.mark.parametrize("sizes", [[103], [10, 93], [1, 1, 1, 50, 1, 49], [8, 8, 8, 8, 71], [33, 70]])
def test_windows_read_across_file_boundaries(sizes: list[int]) -> None:
    corpus, text = _corpus(sizes)
    for length in (2, 8, 25):
        count = corpus.num_windows(length)
        assert count == (103 - 1) // length
        for index in range(count):
            want = text[index * length : index * length + length + 1]
            got = corpus.window(index, length)
            assert got.tolist() == want.tolist() and len(got) == length + 1


def test_every_byte_but_the_first_is_a_target_once() -> None:
    corpus, text = _corpus([40, 61])
    targets = np.concatenate([corpus.window(index, 10)[1:] for index in range(corpus.num_windows(10))])
    assert targets.tolist() == text[1:101].tolist()


@pytest.mark.parametrize("windows, every", [(10, 10), (11, 10), (130, 2), (1283, 10), (5000, 7), (64 * 40, 10)])
def test_split_is_disjoint_and_complete(windows: int, every: int) -> None:
    corpus, _ = _corpus([windows * 3 + 1])
    train, valid = split_corpus(corpus, 3, every)
    assert len(train) > 0 and len(valid) > 0
    assert sorted([*train.indices, *valid.indices]) == list(range(windows))
    assert len(valid) / windows == pytest.approx(1 / every, rel=0.5)
    assert train.indices.tolist() == sorted(train.indices)


def test_whole_stretches_are_held_out() -> None:
    corpus, _ = _corpus([STRETCH * 30 * 2 + 1])
    _, valid = split_corpus(corpus, 2, 10)
    assert valid.indices.tolist() == [w for s in (9, 19, 29) for w in range(s * STRETCH, (s + 1) * STRETCH)]


def test_batches_are_int64_windows() -> None:
    corpus, text = _corpus([100, 101])
    train, _ = split_corpus(corpus, 4, 10)
    batch = train.batch(np.array([0, 7]))
    assert batch.dtype == np.int64 and batch.shape == (2, 5)
    start = int(train.indices[7]) * 4
    assert batch[1].tolist() == text[start : start + 5].tolist()
    assert len(whole_corpus(corpus, 4)) == 50


def test_texts_of_the_hub_stand_end_to_end_and_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    texts = ["Grüße", "", None, *(f"{number} little words. " * (number % 3) for number in range(300)), "end"]
    table = datasets.Dataset.from_dict({"text": texts, "number": list(range(len(texts)))})
    (tmp_path / "set").mkdir()
    table.select(range(200)).to_parquet(str(tmp_path / "set/train-00000-of-00002.parquet"), batch_size=30)
    table.select(range(200, len(texts))).to_parquet(str(tmp_path / "set/train-00001-of-00002.parquet"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split, wanted in (("", texts), ("::train[10:250]", texts[10:250])):
        corpus = open_corpus(f"hub:{tmp_path / 'set'}{split}")
        assert [piece.tobytes().decode() for piece in corpus.pieces] == [text for text in wanted if text]
        assert corpus.num_bytes == sum(len(text.encode()) for text in wanted if text)
    for column in ("number", "body"):
        (tmp_path / column).mkdir()
        odd = (
            table.select(range(9)).select_columns(["number"]).rename_column("number", column.replace("number", "text"))
        )
        odd.to_parquet(str(tmp_path / column / "train.parquet"))
        with pytest.raises(DataError, match="no column 'text' of strings, only .*prepare it"):
            open_corpus(f"hub:{tmp_path / column}")


def test_folder_is_read_in_path_order_without_hidden_files(tmp_path: Path) -> None:
    files = {"b.txt": b"BB", "a/z.txt": b"ZZZ", "a/c/k.txt": b"K", ".hidden": b"no", ".git/config": b"no", "e.txt": b""}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    corpus = open_corpus(str(tmp_path))
    assert b"".join(piece.tobytes() for piece in corpus.pieces) == b"KZZZBB"
    assert corpus.num_bytes == 6
    single = open_corpus(str(tmp_path / "a" / "z.txt"))
    assert single.window(0, 2).tobytes() == b"ZZZ"


def test_a_file_that_is_cut_short_or_replaced_is_a_sentence(tmp_path: Path) -> None:
    """A mapped file would end the process with a signal here."""
    path = tmp_path / "big.txt"
    path.write_bytes(b"x" * 10_000)
    corpus = open_corpus(str(tmp_path))
    assert corpus.window(8, 1000).tobytes() == b"x" * 1001
    path.write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="big.txt became shorter while it was in use"):
        corpus.window(8, 1000)
    later = open_corpus(str(tmp_path))
    path.unlink()
    os.mkfifo(path)
    corpus_module._opened.cache_clear()
    with pytest.raises(DataError, match="big.txt can no longer be read .it is a FIFO"):
        later.window(0, 10)


def test_a_stretch_is_whole_however_little_the_system_gives_at_a_time(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda file, size, place: pread(file, min(size, 30), place))
    monkeypatch.setattr(os, "preadv", lambda file, views, place: preadv(file, [views[0][:30]], place))
    piece = open_corpus(str(tmp_path)).pieces[0]
    assert piece.tobytes() == bytes(range(100)) and piece[5:75].tobytes() == bytes(range(5, 75)) and not len(piece[9:3])


def test_many_files_take_few_descriptors(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number:03d}.txt").write_bytes(b"%03d" % number)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        corpus = open_corpus(str(tmp_path))
        text = b"".join(corpus.window(index, 10)[:-1].tobytes() for index in range(corpus.num_windows(10)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert text == b"".join(b"%03d" % number for number in range(300))[:890]


def test_what_is_no_file_is_passed_over_in_a_sentence_and_never_opened(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (tmp_path / "elsewhere.txt").write_bytes(b"linked")
    (folder / "file.txt").write_bytes(b"text")
    (folder / "link.txt").symlink_to(tmp_path / "elsewhere.txt")  # stands for its file, as in caches of data sets
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "round").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    corpus = open_corpus(str(folder))
    assert b"".join(piece.tobytes() for piece in corpus.pieces) == b"textlinked"
    assert "(5 that are no regular files passed over, itself the first)" in corpus.name
    for name in ("pipe", "zero", "/dev/zero"):
        with pytest.raises(DataError, match="it is a (FIFO|device), not a regular file"):
            open_corpus(str(folder / name))


@pytest.fixture
def deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with 1,200 levels and a text at the bottom, where the test is left."""
    folder = tmp_path / "deep"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    Path("text.txt").write_bytes(b"at the bottom")
    yield folder
    os.chdir(folder)
    subprocess.run(["rm", "-rf", str(folder)], check=True)  # Python's own way of removing it is recursive


def test_folders_of_any_depth_up_to_what_the_system_opens(deep: Path) -> None:
    assert open_corpus(str(deep)).num_bytes == 13
    for _ in range(12):
        os.mkdir("e" * 200)
        os.chdir("e" * 200)
    with pytest.raises(DataError, match="cannot be listed .File name too long"):
        open_corpus(str(deep))


def test_errors_name_the_path_and_the_mend(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.txt").write_bytes(b"")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "text.zip").write_bytes(b"PK\x03\x04text")
    (tmp_path / "short.txt").write_bytes(b"x" * 80)
    for name, reason in {
        "nothing": "does not exist",
        "empty": "holds no bytes",
        "zero.txt": "holds no bytes",
        "packed": "is an archive of files; unpack it",
    }.items():
        with pytest.raises(DataError, match=f"{name}.*{reason}"):
            open_corpus(str(tmp_path / name))
    corpus = open_corpus(str(tmp_path / "short.txt"))
    with pytest.raises(DataError, match=r"short.txt has 80 bytes, fewer than the 81 .*sequence_length=8"):
        split_corpus(corpus, 8, 10)
    with pytest.raises(DataError, match="too few for one window of 101"):
        whole_corpus(corpus, 100)
    (tmp_path / "short.txt").write_bytes(b"x" * 81)
    train, valid = split_corpus(open_corpus(str(tmp_path / "short.txt")), 8, 10)
    assert (len(train), len(valid)) == (9, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked.txt").write_bytes(b"text")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(corpus_module, "open_regular", refuse)
    with pytest.raises(DataError, match=r"locked.txt cannot be read \(Permission denied\)"):
        open_corpus(str(tmp_path))


def test_documentation_of_the_standard_library() -> None:
    corpus = open_corpus(None)
    assert "CPython" in corpus.name
    assert 1_000_000 < corpus.num_bytes < 20_000_000
    text = bytes(corpus.pieces[0]).decode()
    assert text == text.strip() and "\n\n\n\n" not in text
    assert "assert statement" in text.replace('"', ""), "the language reference is missing"
    for documented in (json, textwrap.TextWrapper, textwrap.TextWrapper.fill):
        assert inspect.cleandoc(documented.__doc__).strip() in text, documented
