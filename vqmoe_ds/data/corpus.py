"""Text as bytes: a file, a folder, or the documentation that every CPython carries.

Files are memory-mapped, never read whole; only the bytes of a batch are touched.
"""

from __future__ import annotations

import bisect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.batches import Batch, TrainingBatches, byte_batch
from vqmoe_ds.errors import DataError

STRETCH = 64
"""Windows in one stretch of text; stretches are dealt to training and validation whole."""


@dataclass(frozen=True)
class Corpus:
    """Pieces of bytes, read as if they stood end to end.

    Windows of ``sequence_length + 1`` bytes start every ``sequence_length`` bytes, so that every byte but the first
    is a target once an epoch.
    """

    name: str
    pieces: tuple[np.ndarray, ...]
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
    root = Path(path)
    if not root.exists():
        raise DataError(f"data path {path} does not exist; give a text file or a folder of text files with --data")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file() and not _hidden(p, root))
    pieces = [piece for piece in map(_map_file, files) if len(piece)]
    if not pieces:
        raise DataError(f"data path {path} holds no bytes; give a text file or a folder of text files with --data")
    return Corpus(str(path), tuple(pieces), tuple(np.cumsum([len(p) for p in pieces]).tolist()))


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _map_file(path: Path) -> np.ndarray:
    if path.suffix in (".gz", ".bz2", ".xz", ".zst", ".zip"):
        raise DataError(f"data file {path} is compressed; unpack it first")
    try:
        if path.stat().st_size == 0:
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise DataError(f"data file {path} cannot be read ({error.strerror}); check its permissions") from error


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
