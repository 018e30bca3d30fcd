"""Mutual information of joint distributions that are known."""

from __future__ import annotations

import math

import pytest
import torch

from vqmoe_ds.evaluation.information import information


def _observations(joint: dict[tuple[int, int], int]) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [pair for pair, count in joint.items() for _ in range(count)]
    labels, routes = zip(*pairs, strict=True)
    return torch.tensor(labels), torch.tensor(routes)


def _exact(joint: dict[tuple[int, int], int]) -> float:
    total = sum(joint.values())
    rows = {a: sum(n for (i, _), n in joint.items() if i == a) for a, _ in joint}
    columns = {b: sum(n for (_, j), n in joint.items() if j == b) for _, b in joint}
    return sum(n / total * math.log2(n * total / (rows[a] * columns[b])) for (a, b), n in joint.items() if n)


def test_bits_are_those_of_the_joint_distribution():
    joint = {(3, 0): 40, (3, 7): 10, (9, 0): 15, (9, 7): 35, (11, 7): 20}
    found = information(*_observations(joint))
    assert found.bits == pytest.approx(_exact(joint))
    assert found.route_bits == pytest.approx(-sum(p * math.log2(p) for p in (55 / 120, 65 / 120)))
    assert found.label_bits == pytest.approx(-sum(p * math.log2(p) for p in (50 / 120, 50 / 120, 20 / 120)))


def test_a_label_that_decides_explains_all_and_one_route_leaves_nothing_to_explain():
    labels = torch.randint(0, 300, (5000,), generator=torch.Generator().manual_seed(1))
    assert information(labels, labels % 7).explained == pytest.approx(1.0)
    assert information(labels, torch.zeros_like(labels)).explained is None


def test_labels_that_mean_nothing_explain_nothing_however_many_they_are():
    generator = torch.Generator().manual_seed(2)
    labels, routes = (
        torch.randint(0, 500, (4000,), generator=generator),
        torch.randint(0, 64, (4000,), generator=generator),
    )
    found = information(labels, routes)
    assert found.bits > 1.5  # of 6: nothing but bias
    assert abs(found.explained) < 0.01


def test_the_shuffled_baseline_is_the_known_bias_where_samples_are_many():
    generator = torch.Generator().manual_seed(3)
    labels, routes = (torch.randint(0, n, (40000,), generator=generator) for n in (20, 10))
    bias = 19 * 9 / (2 * 40000 * math.log(2))
    assert information(labels, routes, shuffles=20).shuffled_bits == pytest.approx(bias, rel=0.1)


def test_half_the_information_is_half_explained():
    """Four routes, of which the label knows the first bit."""
    labels = torch.arange(8000) % 2
    routes = labels * 2 + (torch.arange(8000) // 2) % 2
    assert information(labels, routes).explained == pytest.approx(0.5, abs=0.01)
