"""Batches as a pure function of (seed, step): nothing to save, nothing to fast-forward on resume."""

from __future__ import annotations

import numpy as np

from vqmoe_ds.data.corpus import Split


class TrainingBatches:
    """Shuffled training windows, dealt out by global sample number.

    Sample ``i`` is entry ``i mod n`` of the permutation of epoch ``i div n``, drawn from (seed, epoch). Micro-batch
    ``m`` of rank ``r`` takes block ``m * world + r`` of the step's samples, so the global batch does not depend on
    how many ranks and accumulation steps share it.
    """

    def __init__(self, split: Split, batch_size: int, seed: int) -> None:
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def micro_batch(self, step: int, micro: int, rank: int, world: int, size: int) -> np.ndarray:
        """Windows of one micro-batch, int64 ``[size, sequence_length + 1]``; ``step`` counts from 0."""
        first = step * self.batch_size + (micro * world + rank) * size
        return self.split.batch(np.array([self._position(i) for i in range(first, first + size)]))

    def epoch(self, step: int) -> float:
        """Epochs finished before ``step``."""
        return step * self.batch_size / len(self.split)

    def _position(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self.split))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.split))
        return int(self._order[place])
