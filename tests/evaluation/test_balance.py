"""Measures of load against their definitions, written as loops."""

from __future__ import annotations

import math

import pytest
import torch

from vqmoe_ds.evaluation.balance import busiest, gini, perplexity, variation

COUNTS = torch.tensor([[3, 0, 9, 4, 4], [1, 2, 3, 4, 90], [7, 7, 7, 7, 7]])


def test_gini_is_the_mean_absolute_difference_of_pairs():
    for counts, found in zip(COUNTS.tolist(), gini(COUNTS).tolist(), strict=True):
        pairs = sum(abs(a - b) for a in counts for b in counts)
        assert found == pytest.approx(pairs / (2 * len(counts) * sum(counts)))


def test_variation_is_the_deviation_of_all_by_the_mean():
    for counts, found in zip(COUNTS.tolist(), variation(COUNTS).tolist(), strict=True):
        mean = sum(counts) / len(counts)
        assert found == pytest.approx(math.sqrt(sum((c - mean) ** 2 for c in counts) / len(counts)) / mean)


def test_even_use_and_one_for_all_are_the_ends_of_every_scale():
    even, one = torch.full((8,), 5), torch.tensor([0, 0, 40, 0, 0, 0, 0, 0])
    assert [float(f(even)) for f in (busiest, variation, gini)] == [1, 0, 0]
    assert [float(f(one)) for f in (busiest, variation, gini)] == pytest.approx([8, math.sqrt(7), 1 - 1 / 8])
    assert perplexity(torch.stack([even, one])) == pytest.approx([8, 1])


def test_no_use_at_all_is_a_number():
    assert all(math.isfinite(float(f(torch.zeros(4)))) for f in (busiest, variation, gini))
