"""Mutual information of labels and routes, freed of the bias that finite samples have.

Legend: M observations, A labels, B routes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Information(NamedTuple):
    """Share of one classification that another one explains, in bits."""

    bits: float
    """Plug-in mutual information ``I(A; B)``; biased upward, about ``(|A| - 1)(|B| - 1) / (2 M ln 2)``."""
    shuffled_bits: float
    """Mean of ``bits`` over shuffled labels: all of it is bias."""
    route_bits: float
    """Entropy ``H(B)`` of the routes, the most there is to explain."""
    label_bits: float
    """Entropy ``H(A)`` of the labels: they cannot explain more than this."""

    @property
    def explained(self) -> float | None:
        """``(I - I_shuffled) / (H(B) - I_shuffled)``: 0 if the label says nothing, 1 if it decides the route.

        Theil's uncertainty coefficient, adjusted for chance as Vinh (2010) adjusts mutual information, but with the
        route's own entropy below the line. None where the routes are all one.
        """
        room = self.route_bits - self.shuffled_bits
        return (self.bits - self.shuffled_bits) / room if room > 1e-9 else None


def information(labels_M: Tensor, routes_M: Tensor, shuffles: int = 5, seed: int = 0) -> Information:
    """Mutual information of labels and routes, both int64 from 0 on, with a shuffled baseline.

    Args:
        labels_M: what is known (token ids, positions, parts of speech).
        routes_M: what is to be explained (experts, codes).
        shuffles: permutations of the labels that the baseline is averaged over.
        seed: of the permutations.
    """
    labels_M, routes_M = _dense(labels_M), _dense(routes_M)
    generator = torch.Generator().manual_seed(seed)
    # A permutation keeps both entropies and takes every dependence away: the information that is left is bias.
    orders = [torch.randperm(len(labels_M), generator=generator) for _ in range(shuffles)]
    shuffled = sum(_bits(labels_M[order], routes_M) for order in orders) / max(1, shuffles)
    entropies = (_entropy_bits(torch.bincount(values_M)) for values_M in (routes_M, labels_M))
    return Information(_bits(labels_M, routes_M), shuffled, *entropies)


def _bits(labels_M: Tensor, routes_M: Tensor) -> float:
    routes = int(routes_M.max()) + 1 if len(routes_M) else 1
    pairs = torch.unique(labels_M * routes + routes_M, return_counts=True)[1]
    return _entropy_bits(torch.bincount(labels_M)) + _entropy_bits(torch.bincount(routes_M)) - _entropy_bits(pairs)


def _entropy_bits(counts: Tensor) -> float:
    shares = counts.double() / counts.sum().clamp_min(1)
    return float(torch.special.entr(shares).sum()) / math.log(2)


def _dense(values_M: Tensor) -> Tensor:
    """The same classes numbered without gaps."""
    return torch.unique(values_M, return_inverse=True)[1].flatten()
