"""Tables from token ids to experts: balanced by frequency, of random numbers, ranks, embeddings or another's routes.

Legend: L MoE layers, V vocabulary, N experts, D width of an embedding, S sampled tokens.

A table is a pure function of counts, embeddings and seed: the same on every machine whose floating point is the same.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_ds.moe.clustering import kmeans

SLACK = 0.05
"""Share of the mean load by which an expert may be fuller."""
SMOOTHING = 0.5
"""Added to every count: tokens that the corpus lacks are spread like rare ones."""
SAMPLES, ROUNDS = 1 << 14, 3
"""Tokens that k-means sees, and times that centres move to the tokens that found room with them."""


def random_table(counts_V: np.ndarray, num_experts: int, layers: int, seed: int) -> Tensor:
    """Experts drawn at random among those that have room, int64 ``[L, V]``."""
    tables = []
    for layer in range(layers):
        preferences_VN = np.random.default_rng([seed, layer]).random((len(counts_V), num_experts), dtype=np.float32)
        tables.append(_with_room(preferences_VN, counts_V))
    return torch.from_numpy(np.stack(tables))


def round_robin_table(counts_V: np.ndarray, num_experts: int, layers: int) -> Tensor:
    """Experts dealt out by rank of frequency, one place on in every layer, int64 ``[L, V]``.

    Frequent tokens share no expert, but the first expert is the fullest: there is no bound on its load.
    """
    rank_V = np.empty(len(counts_V), dtype=np.int64)
    rank_V[_by_frequency(counts_V)] = np.arange(len(counts_V))
    return torch.from_numpy(np.stack([(rank_V + layer) % num_experts for layer in range(layers)]))


@torch.no_grad()
def embedding_table(embeddings_VD: Tensor, counts_V: np.ndarray, num_experts: int, layers: int, seed: int) -> Tensor:
    """Tokens of like embeddings together, as far as experts have room, int64 ``[L, V]``.

    k-means over embeddings of unit length, sampled by frequency to the power 3/4; then every token, the frequent ones
    first, goes to the nearest centre with room, and the centres move to what they got. Each layer starts from other
    samples.
    """
    unit_VD = F.normalize(embeddings_VD.float(), dim=-1)
    weights_V = torch.from_numpy(counts_V + SMOOTHING).double().pow(0.75)
    tables = []
    for layer in range(layers):
        generator = torch.Generator().manual_seed(seed * 1000003 + layer)
        sample_S = weights_V.multinomial(min(SAMPLES, len(unit_VD)), generator=generator)
        centres_ND, _ = kmeans(unit_VD[sample_S], num_experts, 10, generator)
        for _ in range(ROUNDS):
            table_V = torch.from_numpy(_with_room(torch.cdist(unit_VD, centres_ND).numpy(), counts_V))
            # Sequential on the CPU: a table has the same bits in every run.
            sums_ND = torch.zeros_like(centres_ND).index_add_(0, table_V, unit_VD * weights_V.float().unsqueeze(1))
            mass_N1 = torch.zeros(num_experts, dtype=torch.float64).index_add_(0, table_V, weights_V).unsqueeze(1)
            centres_ND = torch.where(mass_N1 > 0, sums_ND / mass_N1.clamp_min(1e-12).float(), centres_ND)
        tables.append(table_V)
    return torch.stack(tables)


def routes_table(shares_LVN: Tensor, counts_V: np.ndarray, seed: int) -> Tensor:
    """Each token with the expert that it went to most in another model, as far as experts have room, int64 ``[L, V]``.

    Args:
        shares_LVN: weight of each expert over all that a token was seen; tokens that were not seen have zeros, and go
            to an expert at random.
    """
    tables = []
    for layer, shares_VN in enumerate(shares_LVN.numpy()):
        # Smaller than any share: a draw decides between equals alone.
        ties_VN = 1e-9 * np.random.default_rng([seed, layer]).random(shares_VN.shape)
        tables.append(_with_room(ties_VN - shares_VN, counts_V))
    return torch.from_numpy(np.stack(tables))


def _with_room(costs_VN: np.ndarray, counts_V: np.ndarray) -> np.ndarray:
    """Each token to its cheapest expert with room, the frequent ones first; where none has room, to the emptiest.

    A token that is more than an expert's share gets an empty one, where later tokens find no room; the others share
    the rest evenly.
    """
    loads_V = counts_V + SMOOTHING
    experts = costs_VN.shape[1]
    load_N, table_V = np.zeros(experts), np.empty(len(loads_V), dtype=np.int64)
    order_V = _by_frequency(counts_V)
    rest, sharing = loads_V.sum(), experts
    # One expert at least is left to the others: `sharing` stays above 0.
    for token in order_V[: experts - 1]:
        if loads_V[token] <= rest / sharing:
            break
        rest, sharing = rest - loads_V[token], sharing - 1
    limit = (1 + SLACK) * rest / sharing
    for token in order_V:
        fits_N = load_N + loads_V[token] <= limit
        expert = np.where(fits_N, costs_VN[token], np.inf).argmin() if fits_N.any() else load_N.argmin()
        table_V[token] = expert
        load_N[expert] += loads_V[token]
    return table_V


def _by_frequency(counts_V: np.ndarray) -> np.ndarray:
    """Token ids, the most frequent first; of equally frequent ones the lowest."""
    return np.argsort(-counts_V, kind="stable")


def busiest(table_LV: Tensor, counts_V: np.ndarray, num_experts: int) -> list[float]:
    """Load of the busiest expert of each layer, as a multiple of the mean."""
    counts = torch.from_numpy(counts_V).double()
    loads_LN = torch.stack([torch.bincount(table_V, counts, num_experts) for table_V in table_LV])
    return [float(value) for value in loads_LN.amax(dim=1) / loads_LN.mean(dim=1).clamp_min(1e-12)]
