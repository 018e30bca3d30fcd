"""Raw text, trained on byte by byte: windows of a corpus, held out and shuffled.

Legend: B windows, S positions of a window (``sequence_length``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from vqmoe_ds.config.schema import RunConfig
from vqmoe_ds.data.batches import Batch, ShuffledBatches, positions_in_documents
from vqmoe_ds.data.corpus import Corpus, FilePiece, open_corpus
from vqmoe_ds.runtime.errors import DataError

STRETCH = 64
"""Windows in one stretch of text; stretches are dealt to training and validation whole."""


@dataclass(frozen=True)
class Split:
    """Windows of one corpus for one purpose.

    Attributes:
        separate: whether batches tell the files apart (``data.separate_documents``).
    """

    corpus: Corpus
    sequence_length: int
    indices: np.ndarray
    separate: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: np.ndarray) -> np.ndarray:
        """Windows at ``positions``, int64 ``[len(positions), sequence_length + 1]``."""
        rows = [self.corpus.window(int(self.indices[p]), self.sequence_length) for p in positions]
        return np.stack(rows).astype(np.int64)

    def read(self, positions: np.ndarray) -> Batch:
        """Windows at ``positions`` with their targets."""
        batch = byte_batch(self.batch(positions))
        if not self.separate:
            return batch
        starts = [self.corpus.starts(int(self.indices[p]), self.sequence_length) for p in positions]
        return batch._replace(positions_BS=positions_in_documents(np.stack(starts)))


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
    # Text resembles what stands beside it: a single window held out would be half known from its neighbours.
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


class TrainingBatches(ShuffledBatches):
    """Shuffled training windows of raw text."""

    def __init__(self, split: Split, batch_size: int, seed: int) -> None:
        super().__init__(len(split), batch_size, seed)
        self.split = split

    def _batch(self, first: int, rows: np.ndarray) -> Batch:
        return self.split.read(rows)


def byte_batch(windows: np.ndarray) -> Batch:
    """Inputs and targets of windows of bytes, ``[B, S + 1]``; nothing is masked."""
    targets_BS = windows[:, 1:]
    return Batch(windows[:, :-1], targets_BS, np.full(len(windows), targets_BS.shape[1]))


@dataclass(frozen=True)
class RawText:
    """Text that is trained on as it is, byte by byte: the ids are the bytes."""

    train: Split
    valid: Split
    holdout_every: int = 0
    """One in so many stretches of one text is held out; 0: ``valid`` is another text."""
    vocab_size: ClassVar[int | None] = 256
    tokenizer_sha256: ClassVar[str | None] = None

    @property
    def note(self) -> str | None:
        """Line for the user where bytes are probably not what was meant; None elsewhere."""
        paths = [piece.path for piece in self.train.corpus.pieces if isinstance(piece, FilePiece)]
        tables = [path for path in paths if path.endswith((".jsonl", ".ndjson"))]
        if not tables:
            return None
        return f"{tables[0]} is read byte by byte, keys and all; name a tokenizer (--tokenizer bytes) for its texts"

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
        # model.vocab_size may be set above 256, and a model may draw any of its ids.
        return bytes(i % 256 for i in ids).decode(errors="replace")


def open_raw_text(config: RunConfig) -> RawText:
    """Training and validation windows of raw text as the configuration asks.

    Raises:
        DataError: nothing there, unreadable, or too short.
    """
    data, length = config.data, config.model.sequence_length
    # A list is of prepared corpora alone: open_indexed_text, which is asked first, takes or refuses it.
    assert not isinstance(data.path, list) and not isinstance(data.valid_path, list)
    # 0 where the field has no effect: it is in the fingerprint (of_data), and would end a resume for nothing.
    corpus, every = open_corpus(data.path), data.holdout_every if data.valid_path is None else 0
    if data.valid_path is None:
        splits = split_corpus(corpus, length, every)
    else:
        splits = whole_corpus(corpus, length), whole_corpus(open_corpus(data.valid_path), length)
    train, valid = (replace(split, separate=data.separate_documents) for split in splits)
    return RawText(train, valid, every)
