"""k-means and the balanced table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.moe.clustering import balanced_map, kmeans, split_overused


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _loss(samples_SC: Tensor, codes_KC: Tensor) -> float:
    return torch.cdist(samples_SC, codes_KC).square().amin(dim=1).mean().item()


def test_separated_clusters_are_found_with_their_sizes() -> None:
    centres_KC = 10 * torch.eye(6, 8)
    sizes = [20, 17, 25, 23, 28, 21]
    samples_SC = torch.cat([centres_KC[k] + 0.1 * torch.randn(size, 8) for k, size in enumerate(sizes)])
    codes_KC, sizes_K = kmeans(samples_SC, 6, 10, _generator())
    owner_K = torch.cdist(centres_KC, codes_KC).argmin(dim=1)
    assert sorted(owner_K.tolist()) == list(range(6))
    assert torch.cdist(centres_KC, codes_KC).amin(dim=1).max() < 0.3
    assert sizes_K[owner_K].tolist() == sizes


def test_overused_clusters_are_split() -> None:
    """A code's share of the tokens is its expert's load, so no code starts with far more than its share."""
    crowd_SC = 0.3 * torch.randn(800, 6)
    far_SC = 3 * torch.randn(6, 6).repeat_interleave(33, dim=0) + 0.1 * torch.randn(198, 6)
    samples_SC = torch.cat([crowd_SC, far_SC])
    for seed in range(5):
        _, seeded_K = kmeans(samples_SC, 16, 0, _generator(seed))
        codes_KC, sizes_K = kmeans(samples_SC, 16, 10, _generator(seed))
        assert seeded_K.max() > 120, "nothing was overused to begin with"
        assert sizes_K.max() <= 1.5 * 998 / 16
        owner_S = torch.cdist(samples_SC, codes_KC).argmin(dim=1)
        assert torch.equal(sizes_K, torch.bincount(owner_S, minlength=16).float()), "sizes are those of the lookup"


def test_a_crowd_of_equal_samples_cannot_be_split() -> None:
    samples_SC = torch.cat([torch.ones(500, 4), 5 * torch.randn(100, 4)])
    codes_KC, sizes_K = kmeans(samples_SC, 12, 5, _generator())
    assert sizes_K.max() >= 500 and sizes_K.sum() == 600
    assert (codes_KC - 1).abs().amax(dim=1).min() < 1


def test_copies_of_one_vector_take_no_code_from_others() -> None:
    """Their mean differs from them by rounding, which must not pass for two places; frequent tokens are such copies."""
    generator = _generator()
    words_KC = F.normalize(torch.randn(40, 128, generator=generator), dim=1)
    counts_K = torch.tensor([351] + [5] * 39)
    codes_KC, sizes_K = split_overused(words_KC.repeat_interleave(counts_K, dim=0), words_KC, 4.0)
    assert torch.equal(codes_KC, words_KC) and torch.equal(sizes_K, counts_K.float())


def test_rounding_does_not_part_copies_of_the_vector_at_the_median() -> None:
    """Layouts differ in the last bits of their vectors; the codes that they are given must not differ by more."""
    generator = torch.Generator().manual_seed(3)
    vectors_VC = torch.randn(5, 32, generator=generator)
    samples_SC = vectors_VC.repeat_interleave(torch.tensor([3, 4, 30, 4, 3]), dim=0)
    start_KC = torch.stack([samples_SC.mean(dim=0), 100 + vectors_VC[0]])
    want_KC, _ = split_overused(samples_SC, start_KC, 1.5)
    assert not torch.equal(want_KC, start_KC)
    for _ in range(20):
        noise_SC = 1e-7 * torch.randn(samples_SC.shape, generator=generator)
        got_KC, _ = split_overused(samples_SC * (1 + noise_SC), start_KC, 1.5)
        assert (got_KC - want_KC).abs().max() < 1e-4


def test_lloyd_steps_lower_the_loss_of_the_seeds() -> None:
    samples_SC = torch.randn(400, 5)
    seeds_KC, _ = kmeans(samples_SC, 12, 0, _generator(3))
    codes_KC, _ = kmeans(samples_SC, 12, 10, _generator(3))
    assert _loss(samples_SC, codes_KC) < 0.9 * _loss(samples_SC, seeds_KC)
    assert (torch.cdist(seeds_KC, samples_SC).amin(dim=1) < 1e-3).all(), "seeds must be samples"


def test_seeds_are_spread_by_distance_not_drawn_uniformly() -> None:
    """One far sample among many near ones: k-means++ takes it as good as always, a uniform draw hardly ever."""
    samples_SC = torch.cat([0.01 * torch.randn(300, 4), torch.full((1, 4), 50.0)])
    hits = sum(bool((kmeans(samples_SC, 3, 0, _generator(s))[0] > 25).any()) for s in range(20))
    assert hits >= 19


def test_equal_generators_give_equal_bits() -> None:
    samples_SC = torch.randn(200, 6)
    first, second = (kmeans(samples_SC, 16, 5, _generator(9)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], kmeans(samples_SC, 16, 5, _generator(10))[0])


@pytest.mark.parametrize("samples, distinct, num_codes", [(1, 1, 4), (6, 1, 22), (46, 1, 12), (16, 4, 23), (3, 3, 28)])
def test_fewer_distinct_samples_than_codes(samples: int, distinct: int, num_codes: int) -> None:
    base = torch.randn(distinct, 7)
    samples_SC = base[torch.arange(samples) % distinct]
    for seed in range(20):
        codes_KC, sizes_K = kmeans(samples_SC, num_codes, 5, _generator(seed))
        assert sizes_K.sum() == samples
        assert torch.cdist(samples_SC, codes_KC).amin(dim=1).max() < 1e-2
        assert torch.isfinite(codes_KC).all()


def test_no_code_starts_out_dead() -> None:
    for seed in range(40):
        generator = _generator(seed)
        samples_SC = torch.randn(64, 3, generator=generator) ** 3  # heavy tails make Lloyd steps empty clusters
        _, sizes_K = kmeans(samples_SC, 24, 8, generator)
        assert (sizes_K > 0).all(), f"seed {seed}"


def test_balanced_map_evens_out_a_skewed_load_and_leaves_no_expert_out() -> None:
    sizes_K = torch.tensor([100.0, 1, 1, 1, 90, 1, 1, 1, 80, 1, 1, 1])  # k mod 4 piles 270 of 279 on expert 0
    table_K = balanced_map(sizes_K, 4)
    load_N = torch.zeros(4).index_add_(0, table_K, sizes_K)
    assert load_N.max() == 102, "three codes an expert: 100 + 1 + 1 is the best there is"
    assert torch.bincount(table_K, minlength=4).tolist() == [3, 3, 3, 3]


def test_balanced_map_looks_at_load_before_numbers() -> None:
    sizes_K = torch.tensor([5.0, 30, 5, 30, 100, 5, 30, 5])
    table_K = balanced_map(sizes_K, 2)
    assert torch.zeros(2).index_add_(0, table_K, sizes_K).tolist() == [115, 95]


@pytest.mark.parametrize("num_codes, num_experts", [(8, 8), (9, 8), (7, 3), (64, 5), (3, 8), (16, 1)])
def test_balanced_map_holds_its_room(num_codes: int, num_experts: int) -> None:
    for sizes_K in (torch.rand(num_codes), torch.zeros(num_codes), torch.ones(num_codes)):
        held_N = torch.bincount(balanced_map(sizes_K, num_experts), minlength=num_experts)
        assert len(held_N) == num_experts
        assert held_N.max() <= -(-num_codes // num_experts)
        assert (held_N > 0).sum() == min(num_codes, num_experts)


def test_balanced_map_breaks_ties_by_index() -> None:
    assert balanced_map(torch.ones(6), 3).tolist() == [0, 1, 2, 0, 1, 2]


def test_a_crowd_is_split_although_outliers_are_many() -> None:
    """Far members must not take the free codes one after another while the crowd stays whole."""
    far = [0.1 * torch.randn(10, 8) + 50 * torch.randn(8) for _ in range(20)]
    samples = torch.cat([torch.randn(800, 8), *far])
    _, sizes_K = kmeans(samples, 16, 10, torch.Generator().manual_seed(0))
    assert sizes_K.max() < 2 * len(samples) / 16
