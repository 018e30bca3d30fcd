"""Ranks of known spectra, scatter as loops over tokens, likeness of experts that are alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vqmoe_ds.evaluation.collapse import (
    centred_spectrum,
    class_scatter,
    effective_rank,
    numerical_rank,
    output_likeness,
    run_expert,
    weight_likeness,
)
from vqmoe_ds.moe.experts import StackedExperts


def _matrix_with(spectrum: torch.Tensor, rows: int = 40, seed: int = 0) -> torch.Tensor:
    """Rows of mean zero with these singular values times sqrt(rows)."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, len(spectrum), generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(dim=0))[0]
    right = torch.linalg.qr(torch.randn(12, len(spectrum), generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag(spectrum * rows**0.5) @ right.t()


@pytest.mark.parametrize("count", [1, 3, 7])
def test_equal_singular_values_count_themselves(count):
    assert effective_rank(torch.full((count,), 0.3)) == pytest.approx(count)
    assert effective_rank(torch.tensor([2.0] * count + [0.0] * 5)) == pytest.approx(count)


def test_effective_rank_of_a_spectrum_by_hand():
    shares = [0.5, 0.25, 0.25]
    assert effective_rank(torch.tensor([4.0, 2.0, 2.0])) == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in shares))
    )
    assert effective_rank(torch.zeros(4)) == 0


def test_spectrum_of_states_forgets_their_mean():
    spectrum = torch.tensor([5.0, 1.0, 0.01], dtype=torch.float64)
    x_TD = _matrix_with(spectrum) + torch.linspace(-30, 30, 12)
    found = centred_spectrum(x_TD)
    assert torch.allclose(found[:3], spectrum, rtol=1e-9)
    assert numerical_rank(found, 1e-4) == 3 and numerical_rank(found, 0.1) == 2
    assert found.square().sum().item() == pytest.approx(x_TD.var(dim=0, correction=0).sum().item())


def test_scatter_against_a_loop_over_tokens():
    generator = torch.Generator().manual_seed(4)
    x_TD, classes_T = torch.randn(60, 5, generator=generator), torch.randint(-1, 4, (60,), generator=generator)
    known = [(x.double().numpy(), int(c)) for x, c in zip(x_TD, classes_T, strict=True) if c >= 0]
    everyone = np.mean([x for x, _ in known], axis=0)
    within, between = np.zeros((5, 5)), np.zeros((5, 5))
    means = {c: np.mean([x for x, k in known if k == c], axis=0) for _, c in known}
    for x, c in known:
        within += np.outer(x - means[c], x - means[c]) / len(known)
        between += np.outer(means[c] - everyone, means[c] - everyone) / len(known)
    found = class_scatter(x_TD, classes_T)
    assert (found.within, found.between) == pytest.approx((np.trace(within), np.trace(between)))
    pseudo_inverse = np.linalg.pinv(between, rcond=1e-10)
    assert found.collapse == pytest.approx(np.trace(within @ pseudo_inverse) / len(means), rel=1e-6)


def test_points_and_noise_are_the_ends_of_the_scale():
    centres_ND = torch.eye(4, 6)
    classes_T = torch.arange(200) % 4
    points = class_scatter(centres_ND[classes_T], classes_T)
    assert points.between_share == pytest.approx(1) and points.collapse == pytest.approx(0, abs=1e-9)
    noise = class_scatter(torch.randn(20000, 6, generator=torch.Generator().manual_seed(1)), torch.arange(20000) % 4)
    assert noise.between_share < 0.001 and noise.collapse > 100
    assert class_scatter(centres_ND, torch.zeros(4, dtype=torch.int64)).collapse is None


def test_experts_that_are_one_function_are_alike_whatever_the_order_of_their_hidden_units():
    experts, x_TD = StackedExperts(8, 32, 2, std=0.4), torch.randn(100, 8)
    assert abs(output_likeness(experts, x_TD).mean) < 0.3
    order = torch.randperm(32)
    with torch.no_grad():
        experts.w1[1], experts.w3[1] = experts.w1[0, order], experts.w3[0, order]
        experts.w2[1] = experts.w2[0][:, order]
    assert output_likeness(experts, x_TD).mean == pytest.approx(1, abs=1e-5)
    assert weight_likeness(experts).mean < 0.3
    with torch.no_grad():
        for weight in (experts.w1, experts.w2, experts.w3):
            weight[1] = weight[0]
    assert weight_likeness(experts).largest == pytest.approx(1, abs=1e-5)


def test_an_expert_by_plain_pytorch_is_the_layers_own():
    experts, x_PD = StackedExperts(8, 12, 3, std=0.4), torch.randn(10, 8)
    assert torch.allclose(experts(x_PD, torch.tensor([0, 10, 10])), run_expert(experts, 1, x_PD), atol=1e-6)
