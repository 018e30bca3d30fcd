"""How texts and images are dealt out to ranks and passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vqmoe_ds.data.batches import Batch
from vqmoe_ds.evaluation.classification import Scoring


class Numbers:
    """Items whose only value is their number, and what was read of them."""

    def __init__(self, count: int) -> None:
        self.labels, self.lengths = np.arange(count) % 3, 1 + np.arange(count) % 5
        self.passes: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, positions: np.ndarray) -> Batch:
        self.passes.append(positions.tolist())
        return Batch(positions[:, None], self.labels[positions], None, 1)


def model(numbers_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that tell the number of an item."""
    return torch.stack([numbers_B1[:, 0] + 0.0, numbers_B1[:, 0] * 0.5, numbers_B1[:, 0] * 0.0], dim=1), torch.zeros(())


@pytest.mark.parametrize("count", [1, 2, 7, 8, 12, 13, 23])
@pytest.mark.parametrize(("world", "size"), [(1, 4), (1, 1000), (2, 4), (3, 4), (4, 1000)])
def test_each_is_scored_once_and_ranks_make_as_many_passes_with_next_to_no_fillers(count, world, size):
    shares, numbers = [], [Numbers(count) for _ in range(world)]
    for rank in range(world):
        scoring = Scoring(model, torch.device("cpu"), size, rank, world, lambda x: shares.append(x.clone()) or x)
        scoring(numbers[rank], np.arange(count), lambda: None)
    assert len({len(each.passes) for each in numbers}) == 1, "a pass is a collective where experts are spread"
    sizes = [[len(part) for part in each.passes] for each in numbers]
    assert all(alike == sizes[0] for alike in sizes) and max(sizes[0]) <= size
    read = sum(map(sum, sizes))
    assert count <= read < count + world, "none is read twice for one rank alone"
    (_, _, _, energies_T) = sum(shares)
    expected = torch.logsumexp(model(torch.arange(count)[:, None])[0].double(), dim=1)
    assert torch.allclose(energies_T, expected, atol=1e-6)
