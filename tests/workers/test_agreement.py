"""What judges said, counted: by hand, and Krippendorff's alpha as its author publishes it."""

import numpy as np
import pytest

from workers.agreement import acceptance_rate, krippendorff_alpha, predicted

GROUPS = [f"g{i}" for i in range(8)]


def test_rates_by_hand():
    """Proxy 1 on four, judges accept three of these and one more."""
    accepted = [1, 1, 1, 0, 1, 0, 0, 0]
    proxy = [1, 1, 1, 1, 0, 0, 0, 0]
    found = predicted(GROUPS, accepted, proxy)
    assert found.completions == 8
    assert found.proxy["value"] == 4 / 8
    assert found.precision["value"] == 3 / 4
    assert found.recall["value"] == 3 / 4
    assert found.agreement["value"] == 6 / 8
    assert acceptance_rate(GROUPS, accepted)["value"] == 4 / 8


def test_several_judges_are_one_drawn_at_random():
    """Half accept: the proxy is right for half of them, whatever it says."""
    found = predicted(["a", "b"], [0.5, 1], [1, 1])
    assert found.precision["value"] == 0.75
    assert found.recall["value"] == 1
    assert found.agreement["value"] == 0.75


def test_what_is_undefined_is_none():
    """No precision where the proxy accepts nothing, no recall where judges accept nothing."""
    found = predicted(GROUPS, [0] * 8, [0] * 8)
    assert found.precision["value"] is None
    assert found.recall["value"] is None
    assert found.agreement["value"] == 1


def test_intervals_are_over_source_groups():
    """Many completions of one file say as much as one of them."""
    rng = np.random.default_rng(0)
    accepted = rng.integers(0, 2, 40).astype(float)
    alone = acceptance_rate([str(i) for i in range(40)], accepted.tolist())
    tenfold = acceptance_rate([str(i) for i in range(40)] * 10, accepted.tolist() * 10)
    assert alone["low"] < alone["value"] < alone["high"]
    assert (tenfold["low"], tenfold["high"]) == pytest.approx((alone["low"], alone["high"]))
    assert acceptance_rate(["one"] * 40, accepted.tolist())["low"] is None


def naive_alpha(ratings):
    """By the definition: 1 - observed over expected disagreement, over pairs within items."""
    by_item = {}
    for item, _, said in ratings:
        by_item.setdefault(item, []).append(said)
    shared = [said for said in by_item.values() if len(said) > 1]
    n = sum(map(len, shared))
    observed = sum(
        sum(a != b for i, a in enumerate(said) for j, b in enumerate(said) if i != j) / (len(said) - 1)
        for said in shared
    )
    everything = [value for said in shared for value in said]
    ones = sum(everything)
    return 1 - (n - 1) * observed / (2 * ones * (n - ones))


def test_alpha_by_hand():
    """Krippendorff's own example for two observers and a binary variable: ten items, alpha 0.095."""
    anna = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    ben = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    ratings = [(i, "anna", bool(said)) for i, said in enumerate(anna)]
    ratings += [(i, "ben", bool(said)) for i, said in enumerate(ben)]
    assert krippendorff_alpha(ratings) == pytest.approx(0.095, abs=0.001)


def test_alpha_where_judges_have_judged_some_only():
    """Three judges, gaps, items of one judge that count for nothing."""
    rng = np.random.default_rng(1)
    ratings = [
        (item, judge, bool(rng.random() < 0.2 + 0.6 * (item % 2)))
        for item in range(60)
        for judge in ("anna", "ben", "cleo")
        if rng.random() < 0.6
    ]
    assert krippendorff_alpha(ratings) == pytest.approx(naive_alpha(ratings))
    lonely = [(100 + i, "anna", bool(i % 2)) for i in range(9)]
    assert krippendorff_alpha(ratings + lonely) == pytest.approx(naive_alpha(ratings))


def test_alpha_where_there_is_nothing_to_disagree_about():
    assert krippendorff_alpha([(1, "anna", True), (2, "ben", False)]) is None
    assert krippendorff_alpha([(1, "anna", True), (1, "ben", True)]) is None
    both = [(item, judge, item == 1) for item in (1, 2) for judge in ("anna", "ben")]
    assert krippendorff_alpha(both) == 1
