"""Text as bytes: a file, a folder, or the documentation that every CPython carries.

Files are never read whole, and few are open at a time; only the bytes of a batch are touched.
"""

from __future__ import annotations

import bisect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import ClassVar

import numpy as np

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.batches import Batch, TrainingBatches, byte_batch
from vqmoe_ds.data.compressed import DAMAGES, WindowTooLarge, check_content, open_plain, suffix_of
from vqmoe_ds.runtime.errors import DataError, one_line
from vqmoe_ds.runtime.files import list_tree, open_regular, why_missing
from vqmoe_ds.runtime.memory import free_bytes

_BLOCK = 1 << 20
STRETCH = 64
"""Windows in one stretch of text; stretches are dealt to training and validation whole."""


@dataclass(frozen=True)
class FilePiece:
    """The bytes of a file, read where they are asked for: a file that is mapped and cut short kills its reader."""

    path: str
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> np.ndarray:
        """Bytes of a stretch, uint8.

        Raises:
            DataError: the file can no longer be read, or has become shorter.
        """
        first, last, _ = part.indices(self.size)
        try:
            content = os.pread(_opened(self.path).fileno(), last - first, first)
        except OSError as error:
            raise _lost(f"data file {self.path} can no longer be read ({error.strerror}); restore it") from None
        if len(content) != last - first:
            raise _lost(f"data file {self.path} became shorter while it was in use; restore it")
        return np.frombuffer(content, dtype=np.uint8)

    def tobytes(self) -> bytes:
        return self[:].tobytes()


@lru_cache(maxsize=64)
def _opened(path: str) -> BufferedReader:
    return open_regular(path, links=True)


def _lost(sentence: str) -> DataError:
    error = DataError(sentence)
    error.local = True
    return error


@dataclass(frozen=True)
class Corpus:
    """Pieces of bytes, read as if they stood end to end.

    Windows of ``sequence_length + 1`` bytes start every ``sequence_length`` bytes, so that every byte but the first
    is a target once an epoch.
    """

    name: str
    pieces: Sequence[np.ndarray | FilePiece]
    ends: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.ends[-1] if self.ends else 0

    def num_windows(self, sequence_length: int) -> int:
        return max(0, (self.num_bytes - 1) // sequence_length)

    def window(self, index: int, sequence_length: int) -> np.ndarray:
        """Bytes of one window, uint8 ``[sequence_length + 1]``."""
        start, length = index * sequence_length, sequence_length + 1
        parts, piece = [], bisect.bisect_right(self.ends, start)
        while length > 0:
            begin = start - (self.ends[piece - 1] if piece else 0)
            part = self.pieces[piece][begin : begin + length]
            parts.append(part)
            start, length, piece = start + len(part), length - len(part), piece + 1
        return np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])


def open_corpus(path: str | None) -> Corpus:
    """The corpus at ``path``: a file, or every file of a folder in the order of their paths.

    None gives the documentation of the running Python (``stdlib_text``).

    Raises:
        DataError: nothing there, unreadable, or empty.
    """
    if path is None:
        from vqmoe_ds.data.stdlib_text import stdlib_text

        text = np.frombuffer(stdlib_text(), dtype=np.uint8)
        version = ".".join(map(str, sys.version_info[:3]))
        return Corpus(f"documentation of CPython {version}'s standard library", (text,), (len(text),))
    if not os.path.exists(path):
        raise DataError(f"data path {path} {why_missing(path)}; give a text file or a folder of text files with --data")
    files, others = _files_of(path) if os.path.isdir(path) else ([path], [])
    pieces = [piece for piece in map(_piece, files) if len(piece)]
    passed_over = f" ({len(others):,} that are no regular files passed over, {others[0]} the first)" if others else ""
    if not pieces:
        raise DataError(
            f"data path {path} holds no bytes{passed_over}; give a text file or a folder of text files with --data"
        )
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return Corpus(f"{path}{passed_over}", tuple(pieces), tuple(ends.tolist()))


def _files_of(folder: str) -> tuple[list[str], list[str]]:
    """Files in the order of their paths, and what was passed over; hidden ones are left out."""
    try:
        files, others = list_tree(folder)
    except OSError as error:
        raise DataError(f"data folder {error.filename} cannot be listed ({error.strerror}); give another") from None
    return [os.path.join(folder, file) for file in sorted(files, key=lambda file: file.split(os.sep))], sorted(others)


def _piece(path: str) -> FilePiece | np.ndarray:
    try:
        check_content(path)
        if path.endswith(".parquet"):
            raise DataError(f"data file {path} is a table, not text; prepare it (tools/prepare_data.py)")
        if suffix_of(path):
            return _decompressed(path)
        with open_regular(path, links=True) as file:
            return FilePiece(path, os.fstat(file.fileno()).st_size)
    except WindowTooLarge as error:
        raise DataError(f"data file {path} has too large a window, {error}; unpack it, and give the text") from None
    except DAMAGES as error:
        reason = one_line(str(getattr(error, "strerror", None) or error or "no memory is left"), 200)
        raise DataError(f"data file {path} cannot be read ({reason}); check what it is") from None


def _decompressed(path: str) -> np.ndarray:
    """The text of a compressed file, uint8: only so it can be read from any place."""
    text, most = bytearray(), free_bytes() // 2  # growing, it is copied
    with open_plain(path) as stream:
        while block := stream.read(_BLOCK):
            text += block
            if len(text) > most:
                raise DataError(
                    f"data file {path} holds more text than this machine has memory for; unpack it, or prepare it "
                    "(tools/prepare_data.py)"
                )
    return np.frombuffer(text, dtype=np.uint8)


@dataclass(frozen=True)
class Split:
    """Windows of one corpus for one purpose."""

    corpus: Corpus
    sequence_length: int
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: np.ndarray) -> np.ndarray:
        """Windows at ``positions``, int64 ``[len(positions), sequence_length + 1]``."""
        rows = [self.corpus.window(int(self.indices[p]), self.sequence_length) for p in positions]
        return np.stack(rows).astype(np.int64)

    def read(self, positions: np.ndarray) -> Batch:
        """Windows at ``positions`` with their targets."""
        return byte_batch(self.batch(positions))


def split_corpus(corpus: Corpus, sequence_length: int, holdout_every: int) -> tuple[Split, Split]:
    """(training, validation): every ``holdout_every``-th stretch of 64 windows is held out.

    Small corpora use shorter stretches, so that there are at least ``holdout_every`` of them.

    Raises:
        DataError: too short for one window of each kind.
    """
    count = corpus.num_windows(sequence_length)
    if count < holdout_every:
        raise DataError(
            f"{corpus.name} has {corpus.num_bytes} bytes, fewer than the {holdout_every * sequence_length + 1} that "
            f"data.holdout_every={holdout_every} windows of model.sequence_length={sequence_length} take; "
            "give more text or a shorter sequence"
        )
    stretch = max(1, min(STRETCH, count // holdout_every))
    windows = np.arange(count)
    held_out = (windows // stretch) % holdout_every == holdout_every - 1
    return (
        Split(corpus, sequence_length, windows[~held_out]),
        Split(corpus, sequence_length, windows[held_out]),
    )


def whole_corpus(corpus: Corpus, sequence_length: int) -> Split:
    """All windows of a corpus."""
    count = corpus.num_windows(sequence_length)
    if count == 0:
        raise DataError(f"{corpus.name} has {corpus.num_bytes} bytes, too few for one window of {sequence_length + 1}")
    return Split(corpus, sequence_length, np.arange(count))


@dataclass(frozen=True)
class RawText:
    """Text that is trained on as it is, byte by byte: the ids are the bytes."""

    train: Split
    valid: Split
    vocab_size: ClassVar[int | None] = 256
    tokenizer_sha256: ClassVar[str | None] = None

    def summary(self) -> str:
        """Name and size, for the user."""
        windows = f"{len(self.train)} training and {len(self.valid)} held-out windows of {self.train.sequence_length}"
        return f"{self.train.corpus.name}, {self.train.corpus.num_bytes:,} bytes ({windows})"

    def open(self, config: RunConfig, cache: Path) -> tuple[TrainingBatches, Split]:
        """Training batches and held-out windows; nothing is cached."""
        return TrainingBatches(self.train, config.train.batch_size, config.train.seed), self.valid

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i % 256 for i in ids).decode(errors="replace")


def open_raw_text(config: RunConfig) -> RawText:
    """Training and validation windows of raw text as the configuration asks.

    Raises:
        DataError: nothing there, unreadable, or too short.
    """
    data, length = config.data, config.model.sequence_length
    assert not isinstance(data.path, list) and not isinstance(data.valid_path, list)
    corpus = open_corpus(data.path)
    if data.valid_path is None:
        return RawText(*split_corpus(corpus, length, data.holdout_every))
    return RawText(whole_corpus(corpus, length), whole_corpus(open_corpus(data.valid_path), length))
