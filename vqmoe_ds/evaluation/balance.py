"""Measures of how evenly experts or codes are used.

Legend: ... any leading dimensions (layers), N experts or codes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def perplexity(counts: Tensor) -> list[float]:
    """``exp`` of the entropy of each row of counts: how many entries are in effective use."""
    # A layer that has counted nothing yet has a perplexity of 1: 0 / 0 would reach the metrics as NaN.
    shares = counts.double() / counts.sum(dim=-1, keepdim=True).clamp_min(1)
    return [float(v) for v in torch.special.entr(shares).sum(dim=-1).exp()]


def busiest(counts: Tensor) -> Tensor:
    """Largest count over the mean, ``[..., N]`` -> ``[...]``; 1 is even, N is everything in one place."""
    return counts.amax(dim=-1) / counts.double().mean(dim=-1).clamp_min(1e-9)


def variation(counts: Tensor) -> Tensor:
    """Coefficient of variation: standard deviation over all N (not N - 1) by the mean; 0 is even, sqrt(N - 1) the most.

    Its square is the "importance loss" of Shazeer 2017.
    """
    counts = counts.double()
    return counts.std(dim=-1, correction=0) / counts.mean(dim=-1).clamp_min(1e-9)


def gini(counts: Tensor) -> Tensor:
    """Gini coefficient, ``sum_ij |c_i - c_j| / (2 N sum_i c_i)``; 0 is even, 1 - 1/N everything in one place."""
    rising = counts.double().sort(dim=-1).values
    number = rising.shape[-1]
    ranks = torch.arange(1, number + 1, dtype=torch.float64, device=counts.device)
    # The sum over pairs by ranks: the i-th smallest is the larger one of i - 1 pairs and the smaller one of N - i.
    pairs = (rising * (2 * ranks - number - 1)).sum(dim=-1)
    return pairs / (number * rising.sum(dim=-1).clamp_min(1e-9))
