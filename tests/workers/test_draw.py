"""Draws: the same everywhere, spread over the groups."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from workers.benchmarks.draw import choose, draw

SIZES = st.dictionaries(st.text(max_size=6), st.integers(0, 12), max_size=12)


@given(SIZES, st.none() | st.integers(1, 40), st.integers(0, 2**31))
def test_a_draw_is_spread_and_in_order(sizes, count, seed):
    """As many as asked for, each place once, in the groups' order, no group two ahead of one that could give more."""
    groups = list(sizes)
    drawn = draw(groups, sizes.__getitem__, count, seed)
    total = sum(sizes.values())
    assert len(drawn) == (total if count is None else min(count, total))
    assert len(set(drawn)) == len(drawn)
    assert drawn == sorted(drawn, key=lambda place: (groups.index(place[0]), place[1]))
    taken = Counter(group for group, _ in drawn)
    unexhausted = [taken[group] for group in groups if taken[group] < sizes[group]]
    assert not unexhausted or max(taken.values(), default=0) <= min(unexhausted) + 1


@given(SIZES, st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**31))
def test_a_larger_draw_contains_the_smaller(sizes, count, more, seed):
    """`samples: 1000` holds the samples of `samples: 500`, so that a first look is a part of the whole."""
    smaller = draw(list(sizes), sizes.__getitem__, count, seed)
    assert set(smaller) <= set(draw(list(sizes), sizes.__getitem__, count + more, seed))


def test_a_draw_does_not_depend_on_the_groups_order():
    """Only the seed and the names decide what is drawn."""
    sizes = {f"file{i}.py": 10 for i in range(20)}
    forward = draw(list(sizes), sizes.__getitem__, 7, 0)
    backward = draw(list(sizes)[::-1], sizes.__getitem__, 7, 0)
    assert sorted(forward) == sorted(backward)


def test_known_draw():
    """The ranks are SHA-256 and nothing else: these very places on every machine and Python."""
    assert draw(["a", "b", "ä"], lambda _: 5, 4, 7) == [("a", 3), ("b", 4), ("ä", 3), ("ä", 4)]
    assert [choose(1, 100, 7, "a", i) for i in range(5)] == [29, 64, 93, 37, 68]


def test_sizes_are_asked_only_where_needed():
    """A draw of two from a thousand files does not tokenise them all."""
    asked = []

    def size(group):
        asked.append(group)
        return 3

    draw([str(i) for i in range(1000)], size, 2, 0)
    assert len(asked) <= 3


@given(st.integers(-5, 5), st.integers(0, 9), st.integers())
def test_choose_stays_within(low, width, key):
    assert low <= choose(low, low + width, key) <= low + width


def test_choose_reaches_both_ends_evenly():
    """Both ends included, and no end favoured."""
    counts = Counter(choose(50, 59, "cut", i) for i in range(5000))
    assert set(counts) == set(range(50, 60))
    assert all(400 < count < 600 for count in counts.values())
