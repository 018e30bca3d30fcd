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
    """int64; ``MASKED`` where a document starts"""
    bytes_B: np.ndarray | None
    """UTF-8 bytes that the targets of each window stand for; None where that is unknown, or targets are labels"""
    patches: int = 0
    """Tokens that an image becomes; 0: inputs are tokens"""

    @property
    def tokens(self) -> int:
        """Tokens read, padding not counted."""
        return self.patches * len(self.inputs_BS) or int((self.inputs_BS != PADDING).sum())


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
