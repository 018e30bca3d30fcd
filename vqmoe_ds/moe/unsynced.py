"""A warning for training loops that forget to move state once per optimizer step."""

from __future__ import annotations

import warnings

PATIENCE = 1024
"""Micro-batches without an update; no usual accumulation has so many."""


class Unsynced:
    """Counts micro-batches whose statistics nobody has applied."""

    def __init__(self) -> None:
        self._seen = 0

    @property
    def given_up(self) -> bool:
        """Whether nobody seems to apply statistics: what grows with them need not be kept."""
        return self._seen > PATIENCE

    def count(self) -> None:
        """Note one micro-batch; warns once."""
        self._seen += 1
        if self._seen == PATIENCE:
            warnings.warn(
                f"{PATIENCE} forward passes in training, and routers or codebooks have never learned from them: make "
                "sync = vqmoe_ds.moe.StateSync(model) once, and call sync.step() after every optimizer.step()",
                stacklevel=2,
            )

    def clear(self) -> None:
        """Note an update."""
        self._seen = 0
