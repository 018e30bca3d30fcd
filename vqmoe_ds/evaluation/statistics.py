"""Means over seeds, differences of pairs of runs that share a seed, and verdicts on many of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

LEVEL = 0.05
"""Chance of at least one false verdict in a family, and one minus the confidence of an interval."""
DIGITS = 4
"""Decimals of an interval as it is shown, and as its verdict sees it."""
Pair = TypeVar("Pair", int, tuple[str, int])
"""Key that two runs have in common: a seed, or a corpus and a seed."""


@dataclass(frozen=True)
class Mean:
    """Mean over seeds and its standard error (None with one seed)."""

    mean: float
    error: float | None
    seeds: int

    def show(self, layout: str, error_layout: str | None = None) -> str:
        """Mean ± error, each in a format such as ``.2f``; the error in that of the mean unless it has its own."""
        value = format(self.mean, layout)
        return value if self.error is None else f"{value} ± {format(self.error, error_layout or layout)}"


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences, the confidence interval of that mean and its p-value.

    None with one pair, and with pairs that all differ by the same, as shares of few images may: they tell no error.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int
    p: float | None = None
    """Two-sided, of Student's t test that the mean is zero."""

    @property
    def verdict(self) -> str:
        """Which side is better, less being better; neither where there is no interval (NaN of runs that
        diverged is none) or it contains zero as shown.

        An interval that is shown as ending at zero is level: no reader should rest on its fifth decimal.
        """
        if self.low is not None and round(self.low, DIGITS) > 0:
            return "worse"
        return "better" if self.high is not None and round(self.high, DIGITS) < 0 else "cannot be told"

    def show(self, digits: int = DIGITS) -> str:
        """Mean and interval, with so many decimals."""
        mean = f"{self.mean:+.{digits}f}"
        if self.low is None:
            return f"{mean} ({'one seed' if self.pairs == 1 else 'the same at every seed'})"
        return f"{mean} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error, ``s / sqrt(n)`` with n - 1 degrees of freedom."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(float(np.mean(values)), error, len(values))


def paired_difference(ours: Mapping[Pair, float], theirs: Mapping[Pair, float]) -> Difference | None:
    """``ours - theirs`` over the seeds (or other keys) that both have, with Student's 95% interval; None without any.

    At one seed both started from the same weights and saw the same data, so what they share cancels.
    """
    from scipy import stats  # half a second, which means alone need not wait for

    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    mean = mean_of([ours[seed] - theirs[seed] for seed in seeds])
    # Not an error of zero, with which the smallest difference would be sure; equal but for the rounding of floats.
    if mean.error is None or mean.error < 1e-12 * abs(mean.mean):
        return Difference(mean.mean, None, None, mean.seeds)
    reach = float(stats.t.ppf(1 - LEVEL / 2, mean.seeds - 1)) * mean.error
    t = abs(mean.mean) / mean.error if mean.error else 0.0
    p = 2 * float(stats.t.sf(t, mean.seeds - 1))
    return Difference(mean.mean, mean.mean - reach, mean.mean + reach, mean.seeds, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number by Holm's step-down method, in the same order (Holm 1979).

    The i-th smallest of m counts ``m - i + 1`` times, at least as much as the one before and at most 1. Verdicts at
    ``LEVEL`` on the adjusted values err at all with that chance at most, whatever the dependence between the tests. A
    NaN, of runs that diverged, counts as 1.
    """
    known = [1.0 if math.isnan(p) else p for p in p_values]
    adjusted, least = [0.0] * len(known), 0.0
    for rank, place in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        least = max(least, min(1.0, (len(known) - rank) * known[place]))
        adjusted[place] = least
    return adjusted
