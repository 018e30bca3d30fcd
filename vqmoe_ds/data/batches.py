"""Windows of text for training and validation, and batches as a pure function of (seed, samples consumed).

So there is nothing to save, and nothing to fast-forward on resume.

Legend: B windows, S positions of a window (``sequence_length``).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

MASKED = -100
"""A target that is not to be learned; ``torch.nn.functional.cross_entropy`` ignores it."""


PADDING = -1
"""Id after the end of a text that is shorter than the longest of its batch; no token has it."""


class Batch(NamedTuple):
    """Windows of text and the token that follows each of theirs; of labelled texts or images also labels ``[B]``."""

    inputs_BS: np.ndarray
    """int64; of images uint8 ``[B, H, H, channels]``"""
    targets_BS: np.ndarray
    """int64; ``MASKED`` where a document starts; of images that are mixed float32 ``[B, classes]``, shares of labels"""
    bytes_B: np.ndarray | None
    """UTF-8 bytes that the targets of each window stand for; None where that is unknown, or targets are labels"""
    patches: int = 0
    """Tokens that an image becomes; 0: inputs are tokens"""
    positions_BS: np.ndarray | None = None
    """int64, of ``positions_in_documents``; None: a window is read as one text"""

    @property
    def tokens(self) -> int:
        """Tokens read, padding not counted."""
        return self.patches * len(self.inputs_BS) or int((self.inputs_BS != PADDING).sum())


def positions_in_documents(starts_BS: np.ndarray) -> np.ndarray:
    """Position of each token in its document, int64 ``[B, S]``; in one that began before the window, in its rest.

    Args:
        starts_BS: whether a token is the first of a document.
    """
    places_S = np.arange(starts_BS.shape[1])
    answer: np.ndarray = places_S - np.maximum.accumulate(np.where(starts_BS, places_S, 0), axis=1)
    return answer


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
        """Number of epochs in ``samples`` samples."""


class ShuffledBatches:
    """Training samples in another order every epoch, dealt out by global sample number (``Batches``).

    Sample ``i`` is entry ``i mod n`` of the order of epoch ``i div n``, which follows from (seed, epoch) alone, so a
    resumed run needs no state of a generator. Micro-batch ``m`` of rank ``r`` takes block ``m * world + r`` of the
    step's samples, so the global batch does not depend on how many ranks and accumulation steps share it.

    Args:
        count: samples n of an epoch.
        batch_size: samples of a step.
        seed: of the orders.
    """

    masked = False

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._orders: dict[int, np.ndarray] = {}

    def micro_batches(self, first: int, rank: int, world: int, size: int) -> list[Batch]:
        """All micro-batches of one rank, of the global batch from sample ``first`` on."""
        starts = range(first + rank * size, first + self.batch_size, world * size)
        return [self._batch(start, self.rows(start, size)) for start in starts]

    def epoch(self, samples: int) -> float:
        """Number of epochs in ``samples`` samples."""
        return samples / self.count

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows of the samples from ``first`` on, int64."""
        places = [divmod(sample, self.count) for sample in range(first, first + count)]
        return np.array([self._order(epoch)[place] for epoch, place in places], dtype=np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # A step across the end of an epoch goes to and fro between two orders; older ones, 8 bytes a sample, go.
            self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) <= 1}
            self._orders[epoch] = self._draw(epoch)
        return self._orders[epoch]

    def _draw(self, epoch: int) -> np.ndarray:
        # Mixed, not added up: else the second epoch of one seed would be the first epoch of the next. NumPy does not
        # promise that a later release draws the same permutation (NEP 19).
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def _batch(self, first: int, rows: np.ndarray) -> Batch:
        """The samples from number ``first`` on, which stand at these rows of the data."""
        raise NotImplementedError
