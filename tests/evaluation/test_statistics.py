"""Means, paired intervals and verdicts against numbers worked out by hand."""

from __future__ import annotations

import pytest

from vqmoe_ds.evaluation.statistics import Difference, holm, mean_of, paired_difference


def test_the_standard_error_is_that_of_the_mean():
    mean = mean_of([1.0, 2.0, 3.0, 6.0])
    assert mean.mean == 3.0
    assert mean.error == pytest.approx((14 / 3) ** 0.5 / 2), "sum of squares 14, 3 degrees of freedom, 4 values"
    assert mean_of([2.5]).error is None


def test_a_paired_interval_worked_out_by_hand():
    ours = {1: 2.00, 2: 2.10, 3: 1.90, 9: 7.0}
    theirs = {1: 2.05, 2: 2.12, 3: 1.98, 8: 0.0}
    found = paired_difference(ours, theirs)
    # differences -0.05, -0.02, -0.08: mean -0.05, s = 0.03, t(0.975; 2) = 4.302653
    assert found.pairs == 3, "seeds that only one of them has do not count"
    assert found.mean == pytest.approx(-0.05)
    reach = 4.302653 * 0.03 / 3**0.5
    assert (found.low, found.high) == (pytest.approx(-0.05 - reach), pytest.approx(-0.05 + reach))
    assert found.verdict == "cannot be told", "the interval reaches over zero though every seed was better"
    t = 0.05 / (0.03 / 3**0.5)
    assert found.p == pytest.approx(1 - t / (t**2 + 2) ** 0.5), "Student's t of two degrees of freedom, by hand: 0.102"


def test_p_values_agree_with_their_intervals():
    same = paired_difference({1: 20.1, 2: 20.3, 3: 19.9}, {1: 20.3, 2: 20.5, 3: 20.1})
    assert (same.p, same.low, same.verdict) == (None, None, "cannot be told"), "equal differences tell no error"
    assert same.show(1) == "-0.2 (the same at every seed)" and same.pairs == 3
    assert paired_difference({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}).p == 1.0
    # t(0.975; 1) = 12.7062: an interval that ends at zero has a p-value of 0.05
    apart = 12.7062 * 0.01
    ends_at_zero = paired_difference({1: apart - 0.01, 2: apart + 0.01}, {1: 0.0, 2: 0.0})
    assert ends_at_zero.p == pytest.approx(0.05, abs=1e-6) and ends_at_zero.low == pytest.approx(0, abs=1e-6)
    assert ends_at_zero.verdict == "cannot be told"


def test_holm_worked_out_by_hand():
    # 0.005 x 4 = 0.02, 0.01 x 3 = 0.03, 0.03 x 2 = 0.06, and 0.04 x 1 = 0.04 counts as much as the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04]) == [0.04] and holm([]) == []
    assert holm([0.9, 0.5, 0.0]) == [1.0, 1.0, 0.0], "no probability is over 1"
    assert holm([float("nan"), 0.02]) == [1.0, 0.04]


def test_pairs_decide_what_means_alone_could_not():
    ours, theirs = {1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.1, 2: 2.11, 3: 3.09}
    assert paired_difference(ours, theirs).verdict == "better"
    assert paired_difference(theirs, ours).verdict == "worse"
    assert mean_of(list(ours.values())).error > 0.5, "five times the difference"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-2.0, -1.0, "better"),
        (1.0, 2.0, "worse"),
        (-1.0, 1.0, "cannot be told"),
        (0.0, 1.0, "cannot be told"),
        (-1.0, 0.0, "cannot be told"),
        (-1.0, -0.00004, "cannot be told"),
        (0.00004, 1.0, "cannot be told"),
        (-1.0, -0.00006, "better"),
        (None, None, "cannot be told"),
        (float("nan"), float("nan"), "cannot be told"),
    ],
)
def test_nobody_wins_where_the_interval_contains_zero(low, high, verdict):
    assert Difference(-1.0, low, high, 3).verdict == verdict


def test_one_pair_has_no_interval_and_none_no_difference():
    assert paired_difference({1: 1.0}, {1: 2.0}) == Difference(-1.0, None, None, 1)
    assert paired_difference({1: 1.0}, {2: 2.0}) is None
