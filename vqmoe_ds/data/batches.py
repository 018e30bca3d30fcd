"""Batches as a pure function of (seed, samples consumed): nothing to save, nothing to fast-forward on resume.

Legend: B windows, S positions of a window (``sequence_length``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from vqmoe_ds.data.corpus import Split

MASKED = -100
"""A target that is not to be learned; what ``torch.nn.functional.cross_entropy`` ignores."""


PADDING = -1
"""Stands after the end of a text that is shorter than the longest of its batch; no token has this id."""


class Batch(NamedTuple):
    """Windows of text and what follows each of their tokens; of labelled texts, the texts and their labels ``[B]``."""

    inputs_BS: np.ndarray
    """int64"""
    targets_BS: np.ndarray
    """int64; ``MASKED`` where a document starts"""
    bytes_B: np.ndarray | None
    """UTF-8 bytes that the targets of each window stand for; None where that is unknown, or targets are labels"""

    @property
    def tokens(self) -> int:
        """Tokens read, padding not counted."""
        return int((self.inputs_BS != PADDING).sum())


class Windows(Protocol):
    """Text for validation, window by window."""

    @property
    def sequence_length(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, positions: np.ndarray) -> Batch: ...


class Batches(Protocol):
    """Text for training: a stream of samples, numbered from 0, that only data and seed decide."""

    @property
    def masked(self) -> bool:
        """Whether targets may be masked, so that micro-batches count by their targets."""

    def micro_batches(self, first: int, rank: int, world: int, size: int) -> list[Batch]:
        """This rank's micro-batches of ``size`` windows of the batch from sample ``first`` on; all ranks call it."""

    def epoch(self, samples: int) -> float:
        """Epochs that ``samples`` are."""


class TrainingBatches:
    """Shuffled training windows of raw text, dealt out by global sample number.

    Sample ``i`` is entry ``i mod n`` of the permutation of epoch ``i div n``, drawn from (seed, epoch). Micro-batch
    ``m`` of rank ``r`` takes block ``m * world + r`` of the step's samples, so the global batch does not depend on
    how many ranks and accumulation steps share it.
    """

    masked = False

    def __init__(self, split: Split, batch_size: int, seed: int) -> None:
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def micro_batches(self, first: int, rank: int, world: int, size: int) -> list[Batch]:
        """All micro-batches of one rank, of the global batch from sample ``first`` on."""
        starts = range(first + rank * size, first + self.batch_size, world * size)
        return [byte_batch(self._windows(start, size)) for start in starts]

    def micro_batch(self, step: int, micro: int, rank: int, world: int, size: int) -> np.ndarray:
        """Windows of one micro-batch, int64 ``[size, sequence_length + 1]``; ``step`` counts from 0."""
        return self._windows(step * self.batch_size + (micro * world + rank) * size, size)

    def epoch(self, samples: int) -> float:
        """Epochs that ``samples`` are."""
        return samples / len(self.split)

    def _windows(self, first: int, size: int) -> np.ndarray:
        return self.split.batch(np.array([self._position(i) for i in range(first, first + size)]))

    def _position(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self.split))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.split))
        return int(self._order[place])


def byte_batch(windows: np.ndarray) -> Batch:
    """Inputs and targets of windows of bytes, ``[B, S + 1]``; nothing is masked."""
    targets_BS = windows[:, 1:]
    return Batch(windows[:, :-1], targets_BS, np.full(len(windows), targets_BS.shape[1]))
