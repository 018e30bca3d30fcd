"""k-means and the balanced code-to-expert table: pure functions of tensors on the host, which they often read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kmeans(samples_SC: Tensor, num_codes: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k-means++ seeds.

    A cluster that runs empty takes over a sample of the fullest one, so that no code starts out dead.

    Args:
        samples_SC: float32 samples; fewer than ``num_codes`` distinct ones give duplicate codes.
        num_codes: clusters K.
        iterations: Lloyd steps; 0 keeps the k-means++ seeds.
        generator: CPU generator of the seeding draws.

    Afterwards, unless ``iterations`` is 0, codes move from sparse to dense places (``split_overused``): Lloyd
    minimises distortion, which leaves frequent contexts to one code, and a code's share of tokens is its expert's load.

    Returns:
        Codes ``[K, C]`` and the number of samples of each, float32 ``[K]``.
    """
    codes_KC = _plus_plus_seeds(samples_SC, num_codes, generator)
    owner_S = torch.cdist(samples_SC, codes_KC).argmin(dim=1)
    for _ in range(iterations):
        sizes_K = torch.bincount(owner_S, minlength=num_codes)
        # Sequential on the CPU, in the order of the samples: the same bits in every run.
        sums_KC = torch.zeros_like(codes_KC).index_add_(0, owner_S, samples_SC)
        codes_KC = torch.where(sizes_K.unsqueeze(1) > 0, sums_KC / sizes_K.clamp_min(1).unsqueeze(1), codes_KC)
        for empty in (sizes_K == 0).nonzero().flatten().tolist():
            fullest = int(sizes_K.argmax())
            if sizes_K[fullest] == 0:  # nothing left to split: fewer distinct samples than codes
                break
            members = (owner_S == fullest).nonzero().flatten()
            # By the number of the empty code, so that several do not land on one sample.
            codes_KC[empty] = samples_SC[members[empty % len(members)]]
            # A guess that sends the next empty cluster elsewhere; the next round counts again.
            sizes_K[fullest] = sizes_K[fullest] // 2
        owner_S = torch.cdist(samples_SC, codes_KC).argmin(dim=1)
    if iterations:
        return split_overused(samples_SC, codes_KC, OVERUSED)
    return codes_KC, torch.bincount(owner_S, minlength=num_codes).float()


OVERUSED = 1.5
"""Times the mean size from which the initialization splits a cluster."""
ALIKE = 1e-6
"""Squared distance from their mean, by squared length, up to which members are one point: copies of a vector differ
from their mean by rounding, and lookup cannot tell apart what is as near as that."""
TIED = 1e-5
"""Distance along an axis, by the largest, up to which members stand at one place: copies of a vector differ by
rounding there, and layouts by that of their weights."""


def split_overused(samples_SC: Tensor, codes_KC: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Give the code of the smallest cluster to the largest, cut in two, until none exceeds ``limit`` mean sizes.

    Clusters of members all alike are left as they are. Stops after 2 K moves at the latest, as two clusters can take
    one code from each other again and again. Lookup stays that of the nearest code.

    Returns:
        Codes ``[K, C]`` and the number of samples of each, float32 ``[K]``.
    """
    num_codes, codes_KC = len(codes_KC), codes_KC.clone()
    distances_SK = torch.cdist(samples_SC, codes_KC)
    owner_S = distances_SK.argmin(dim=1)
    splittable_K = torch.ones(num_codes, dtype=torch.bool)
    for _ in range(2 * num_codes):
        sizes_K = torch.bincount(owner_S, minlength=num_codes)
        largest, smallest = int((sizes_K * splittable_K).argmax()), int(sizes_K.argmin())
        if sizes_K[largest] * num_codes <= limit * len(samples_SC):
            break
        pair_2C, both = _split_at_median(samples_SC[owner_S == largest]), [largest, smallest]
        if pair_2C is None:
            splittable_K[largest] = False
            continue
        codes_KC[both] = pair_2C
        # Its code is another one now, and so is its cluster.
        splittable_K[smallest] = True
        distances_SK[:, both] = torch.cdist(samples_SC, pair_2C)
        owner_S = _nearest_again(distances_SK, owner_S, both)
    return codes_KC, torch.bincount(owner_S, minlength=num_codes).float()


def _nearest_again(distances_SK: Tensor, owner_S: Tensor, both: list[int]) -> Tensor:
    """Nearest codes ``[S]`` after two codes moved: only samples that they had before look at all codes again."""
    codes_2 = torch.tensor(both)
    left_S = torch.isin(owner_S, codes_2)
    owner_S = owner_S.clone()
    owner_S[left_S] = distances_SK[left_S].argmin(dim=1)
    nearest_S = distances_SK.gather(1, owner_S.unsqueeze(1)).squeeze(1)
    nearer_S, which_S = distances_SK[:, codes_2].min(dim=1)
    return torch.where(nearer_S < nearest_S, codes_2[which_S], owner_S)


def _split_at_median(members_MC: Tensor) -> Tensor | None:
    """Means of the two parts of a cluster along its widest direction, ``[2, C]``; None where members are all alike.

    Cut at the median, so that a few members far off cannot take a code for themselves again and again. The direction
    is found by power iteration from the farthest member.
    """
    centred_MC = members_MC - members_MC.mean(dim=0)
    spread_M = centred_MC.square().sum(dim=1)
    if spread_M.max() <= ALIKE * members_MC[0].square().sum():
        return None
    axis_C = centred_MC[spread_M.argmax()]
    for _ in range(8):
        axis_C = F.normalize(centred_MC.t() @ (centred_MC @ axis_C), dim=0)
    place_M = centred_MC @ axis_C
    # Copies of the member at the median go with it: rounding must not part them, for it differs between layouts.
    median, tied = place_M.median(), TIED * place_M.abs().max()
    upper_M = place_M > median + tied
    if not bool(upper_M.any()):  # more than half of them at the top place
        upper_M = place_M >= median - tied
    if bool(upper_M.all()) or not bool(upper_M.any()):
        return None
    return torch.stack([members_MC[~upper_M].mean(dim=0), members_MC[upper_M].mean(dim=0)])


def _plus_plus_seeds(samples_SC: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """k-means++: each further seed is a sample drawn with weight of its squared distance to the seeds so far."""
    picks = [int(torch.randint(len(samples_SC), (1,), generator=generator))]
    nearest_S = (samples_SC - samples_SC[picks[0]]).square().sum(dim=1)
    for _ in range(num_codes - 1):
        # In float64: late terms of a float32 sum over thousands would vanish, and their samples could never be drawn.
        # The clamp leaves something to draw from where all samples are seeds already.
        cumulative_S = nearest_S.double().clamp_min(1e-12).cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative_S[-1]
        # Rounding may put the draw past the last sum.
        pick = min(int(torch.searchsorted(cumulative_S, draw)), len(samples_SC) - 1)
        picks.append(pick)
        nearest_S = torch.minimum(nearest_S, (samples_SC - samples_SC[pick]).square().sum(dim=1))
    return samples_SC[torch.tensor(picks)].clone()


def balanced_map(sizes_K: Tensor, num_experts: int) -> Tensor:
    """Code-to-expert table that evens out measured load, int64 ``[K]``.

    Codes in falling order of size go to the least loaded expert that still has room; experts hold at most
    ``ceil(K / N)`` codes, so none is left without one. Ties go to the lowest index.
    """
    num_codes = len(sizes_K)
    room = -(-num_codes // num_experts)
    load, held = [0.0] * num_experts, [0] * num_experts
    table = torch.zeros(num_codes, dtype=torch.int64)
    # Stable, and ties by the lowest index below: every rank must draw the same table.
    for code in torch.argsort(sizes_K, descending=True, stable=True).tolist():
        open_experts = [e for e in range(num_experts) if held[e] < room]
        expert = min(open_experts, key=lambda e: (load[e], held[e], e))
        table[code] = expert
        load[expert] += float(sizes_K[code])
        held[expert] += 1
    return table
