"""Means over seeds, and differences of pairs of runs that share a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

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
    """Mean of the paired differences, and the confidence interval of that mean (None with one pair)."""

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def verdict(self) -> str:
        """Which side is better, less being better; neither where the interval contains zero or there is none."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "cannot be told"
        return "better" if self.high < 0 else "worse"

    def show(self, digits: int = 4) -> str:
        """Mean and interval, with so many decimals."""
        mean = f"{self.mean:+.{digits}f}"
        return f"{mean} (one seed)" if self.low is None else f"{mean} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error, ``s / sqrt(n)`` with n - 1 degrees of freedom."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(float(np.mean(values)), error, len(values))


def paired_difference(ours: Mapping[Pair, float], theirs: Mapping[Pair, float]) -> Difference | None:
    """``ours - theirs`` over the seeds (or other keys) that both have, with Student's 95% interval; None without any.

    At one seed both started from the same weights and saw the same data, so what they share cancels.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    mean = mean_of([ours[seed] - theirs[seed] for seed in seeds])
    if mean.error is None:
        return Difference(mean.mean, None, None, 1)
    reach = float(stats.t.ppf(0.975, mean.seeds - 1)) * mean.error
    return Difference(mean.mean, mean.mean - reach, mean.mean + reach, mean.seeds)
