"""How sure a difference is: the figures by hand, and how often they err where the truth is known."""

import numpy as np
import pytest
from scipy.stats import bootstrap, kstest

from workers import differences
from workers.differences import (
    Clusters,
    chance,
    detectable,
    holm,
    interval,
    log_speed,
    mcnemar,
    mean_change,
    noise_floor,
    relative_change,
    speed_gain,
)


def grouped(rng: np.random.Generator, groups: int, size: int = 10, effect: float = 0.0) -> list[np.ndarray]:
    """Sums by group of a score under A and B: groups differ, and so do samples; [Σ a, n, Σ b, n]."""
    level = rng.normal(0.4, 0.1, groups)[:, None]
    a = level + rng.normal(0, 0.2, (groups, size))
    b = a + rng.normal(effect, 0.1, (groups, size)) + rng.normal(0, 0.03, groups)[:, None]
    n = np.full(groups, float(size))
    return [a.sum(1), n, b.sum(1), n]


def test_the_interval_is_scipys_bca_at_a_wider_level() -> None:
    sums = grouped(np.random.default_rng(1), 40)
    found = interval(mean_change, sums)
    level = differences._expanded(0.95, 40, differences._freedom(mean_change, sums))
    assert 0.95 < level < 0.97
    theirs = bootstrap(
        sums,
        mean_change,
        n_resamples=differences.RESAMPLES,
        paired=True,
        vectorized=True,
        axis=-1,
        method="BCa",
        confidence_level=level,
        rng=np.random.default_rng(differences.SEED),
    )
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval), rel=1e-9)
    assert found.value == pytest.approx((sums[2].sum() - sums[0].sum()) / 400)
    assert found.error == pytest.approx(theirs.standard_error)


def test_intervals_cover_the_truth_and_tests_are_not_too_eager() -> None:
    """A small version of `make bench-stats`: 300 draws, in which 95 % may come out as 91 to 98."""
    rng, covered, p_values = np.random.default_rng(2), 0, []
    for _ in range(300):
        sums = grouped(rng, 100)
        found = interval(mean_change, sums)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
        p_values.append(chance(mean_change, sums[:2], sums[2:]).two_sided)
    assert 0.91 <= covered / 300 <= 0.98
    assert kstest(p_values, "uniform", alternative="greater").pvalue > 0.001  # none too small too often


def test_groups_that_move_together_count_once() -> None:
    """A test that took samples as independent would be sure of what is one group's doing."""
    rng = np.random.default_rng(3)
    shared = np.repeat(rng.normal(0, 0.1, 12), 50)
    groups = np.repeat([f"g{i}" for i in range(12)], 50).astype(object)
    one, n = np.zeros(600), np.ones(600)
    together = Clusters(groups).sums(one, n, one + shared, n)
    alone = Clusters(np.arange(600).astype(object)).sums(one, n, one + shared, n)
    wide, narrow = interval(mean_change, together), interval(mean_change, alone)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)  # type: ignore[operator]
    assert chance(mean_change, together[:2], together[2:]).two_sided > 0.01


def test_chance_knows_the_side() -> None:
    sums = grouped(np.random.default_rng(4), 60, effect=-0.05)
    found = chance(mean_change, sums[:2], sums[2:])
    assert found.worse == found.two_sided == 1 / (differences.SWAPS + 1)
    assert chance(mean_change, sums[2:], sums[:2]).worse == 1.0


def test_chance_is_exact_where_all_swaps_can_be_counted() -> None:
    """Five groups that all got worse by the same: one swap in 32 is as bad."""
    a, n = np.full(5, 2.0), np.full(5, 4.0)
    found = chance(mean_change, [a, n], [a - 1, n])
    assert found.worse == pytest.approx(1 / 32, rel=0.1)
    assert found.two_sided == pytest.approx(2 / 32, rel=0.1)


def test_no_difference_at_all_is_certain() -> None:
    sums = grouped(np.random.default_rng(5), 30)
    same = [*sums[:2], *sums[:2]]
    assert interval(mean_change, same) == differences.Interval(0.0, 0.0, 0.0, 0.0)
    assert interval(relative_change, [sums[0], sums[0]]).high == 0.0
    assert chance(mean_change, same[:2], same[2:]) == differences.Chance(1.0, 1.0)


def test_too_few_groups_have_no_interval() -> None:
    five = interval(mean_change, grouped(np.random.default_rng(6), 5))
    assert (five.low, five.high) == (None, None)
    assert five.value is not None
    nothing = interval(mean_change, [np.zeros(0)] * 4)
    assert nothing.value is None


def test_a_share_of_nothing_is_unknown() -> None:
    assert interval(relative_change, [np.zeros(10), np.ones(10)]).value is None


def test_very_many_groups_are_put_together() -> None:
    """A hundred thousand groups cost what a thousand do, and the interval is as wide as it should be."""
    rng = np.random.default_rng(7)
    change, n = rng.normal(0, 1, 100_000), np.ones(100_000)
    clusters = Clusters(np.arange(100_000).astype(object))
    sums = clusters.sums(np.zeros(100_000), n, change, n)
    assert len(sums[0]) == differences.MOST_CLUSTERS
    assert clusters.groups == 100_000
    found = interval(mean_change, sums)
    assert found.error == pytest.approx(1 / np.sqrt(100_000), rel=0.1)


def test_speed_is_a_ratio_of_sums() -> None:
    a, tokens_a = np.array([10.0, 30.0]), np.array([1.0, 1.0])
    b, tokens_b = np.array([40.0, 10.0]), np.array([2.0, 2.0])
    assert speed_gain(a, tokens_a, b, tokens_b, axis=-1) == pytest.approx((40 / 2) / (50 / 4) - 1)
    forth = log_speed(a, tokens_a, b, tokens_b, axis=-1)
    assert log_speed(b, tokens_b, a, tokens_a, axis=-1) == pytest.approx(-forth)


def test_a_slow_hour_is_no_slow_policy() -> None:
    """Protects speeds of two jobs: where all that B's job did took twice as long, nothing changed."""
    a, b, tokens, full = np.array([10.0, 30.0]), np.array([20.0, 60.0]), np.array([2.0, 3.0]), np.array([20.0, 45.0])
    of_a, of_b = (a, tokens, full, tokens), (b, tokens, 2 * full, tokens)
    assert speed_gain(*of_a, *of_b, axis=-1) == pytest.approx(0)
    slower = (1.25 * b, tokens, 2 * full, tokens)
    assert speed_gain(*of_a, *slower, axis=-1) == pytest.approx(-0.2)
    assert log_speed(*slower, *of_a, axis=-1) == pytest.approx(-log_speed(*of_a, *slower, axis=-1))


def test_mcnemar_holm_and_what_could_be_found() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(9, 1) == pytest.approx(2 * 11 / 1024)  # both tails of ten coins
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert detectable(0.01) == pytest.approx(0.01 * (1.959964 + 0.841621), rel=1e-5)
    assert detectable(None) is None


def test_the_noise_floor_is_wide_where_little_is_known() -> None:
    assert noise_floor([]) is None
    assert noise_floor([0.01]) == pytest.approx(1 - np.exp(-0.6366), rel=1e-3)  # one pair tells next to nothing
    assert noise_floor([1.0]) == 0.9999
    many = np.random.default_rng(8).normal(0, 0.01, 200)
    assert noise_floor(list(many)) == pytest.approx(max(0.026, np.abs(many).max()), rel=0.1)
    assert noise_floor([0.001] * 20 + [0.2]) == pytest.approx(1 - np.exp(-0.2))  # never below what was seen


@pytest.mark.parametrize("pairs", [1, 3, 10])
def test_one_pair_in_a_hundred_lies_beyond_the_noise_floor(pairs: int) -> None:
    """However few pairs the floor is made of: that it is wide where they are few is what keeps the promise."""
    draws = np.random.default_rng(9).normal(0, 0.02, (2000, pairs + 1))
    beyond = [np.expm1(x) < -(noise_floor(list(others)) or 0) for x, *others in draws]
    assert sum(beyond) / 2000 <= 0.0085  # 0.5 % slower, give or take


def test_few_groups_that_move_are_as_few_groups() -> None:
    """Of 200 groups ten changed: an interval as of 200 that are normal would be too narrow."""
    rng = np.random.default_rng(10)
    a, n = rng.normal(5, 1, 200), np.full(200, 10.0)
    change = np.where(np.arange(200) < 10, rng.normal(0, 1, 200), 0.0)
    assert differences._freedom(mean_change, [a, n, a + rng.normal(0, 1, 200), n]) > 100
    assert differences._freedom(mean_change, [a, n, a + change, n]) < 20
