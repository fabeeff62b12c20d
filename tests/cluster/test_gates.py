"""What a gate says of differences whose truth is written down, and how CI reads it."""

from typing import Any
from xml.etree import ElementTree

import pytest
from invented import HOSTILE

from cluster.comparing import ci, words
from cluster.comparing.confirming import _settled
from cluster.comparing.model import Comparison, Difference, Floor, PairComparison, Side
from cluster.gates import Gate, Outcome, Verdict, decide, parse_gate
from cluster.reports.model import Estimate
from engine.errors import BadInput

NOTHING: dict[str, Any] = {
    "exact": 1.0,
    "tokens": 1.0,
    "diverging": 0,
    "median_divergence": None,
    "first_divergence": {},
}


def quality(change: float, half: float, p_worse: float = 0.0001, **fields: Any) -> Difference:
    """Of a metric that A has at 0.5; half: of the interval's width."""
    around = Estimate(value=change, low=change - half, high=change + half)
    share = Estimate(value=change / 0.5, low=(change - half) / 0.5, high=(change + half) / 0.5)
    made = {"metric": "es", "kind": "quality", "a": 0.5, "b": 0.5 + change, "units": 1000, "groups": 100}
    made |= {"change": around, "relative": share, "p_worse": p_worse, "p_value": 2 * p_worse, "p_holm": 2 * p_worse}
    return Difference(**made | fields)


def speed(gain: float, half: float, floor: Floor | None, p_worse: float = 0.0001) -> Difference:
    share = Estimate(value=gain, low=gain - half, high=gain + half)
    return Difference(
        metric="speedup_token",
        kind="speed",
        device_class="cpu",
        relative=share,
        p_worse=p_worse,
        p_holm=2 * p_worse,
        units=20,
        groups=20,
        floor=floor,
    )


def comparison(*differences: Difference, levels: dict[str, Estimate] | None = None, **fields: Any) -> Comparison:
    pair = {
        "benchmark": "lines", "content_hash": "c", "benchmark_id": 1, "job_a": 1, "job_b": 2, "run_a": 1, "run_b": 2,
        "policy_a": "sec", "policy_b": "sec", "same_spec": False, "samples": 1000, "unpaired": 0, "errors_a": 0,
        "errors_b": 0, "agreement": NOTHING, "differences": differences, "levels": levels or {}, "flips": [],
        "moved": [], "moved_metric": None, "notes": [],
    }  # fmt: skip
    sides = [Side(asked=str(n), job_id=n, name="n", finished_at=None) for n in (1, 2)]
    pairs = [PairComparison(**pair | fields)]
    return Comparison(a=sides[0], b=sides[1], confidence=0.98, pairs=pairs, changed=[], notes=[])


def gate(*rules: dict[str, Any], **fields: Any) -> Gate:
    return parse_gate({"rules": list(rules)} | fields)


def said(rule: dict[str, Any], one: Difference, **fields: Any) -> Verdict:
    return decide(gate(rule, **fields), comparison(one))


@pytest.mark.parametrize(
    ("change", "half", "outcome"),
    [
        (0.0, 0.005, Outcome.PASS),  # of 0.5 at most 1 % lost, and 2 % + 2 % would do
        (-0.005, 0.01, Outcome.PASS),
        (-0.011, 0.0005, Outcome.FAIL),  # 2.1 to 2.3 % lost: within the margin, and certainly more than is allowed
        (-0.03, 0.01, Outcome.FAIL),
        (-0.02, 0.012, Outcome.INCONCLUSIVE),
        (0.0, 0.05, Outcome.INCONCLUSIVE),
        (0.1, 0.05, Outcome.PASS),
    ],
)
def test_certainly_more_fails_and_certainly_no_more_passes(change: float, half: float, outcome: Outcome) -> None:
    assert said({"metric": "es", "max_loss": 0.02}, quality(change, half)).outcome is outcome


@pytest.mark.parametrize("field", ["max_loss", "min", "margin"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_limit_is_a_number(field: str, value: float) -> None:
    """Else a rule would hold, or tell nothing, whatever comes."""
    rule = {"metric": "es", "max_loss": 0.1} if field == "margin" else {"metric": "es"}
    with pytest.raises(BadInput, match=f"field 'rules.0.{field}' is (nan|inf); "):
        gate(rule | {field: value})


def test_absolute_losses_are_in_the_metrics_unit() -> None:
    one = quality(-0.03, 0.01)
    assert said({"metric": "es", "max_loss": 0.05, "scale": "absolute"}, one).outcome is Outcome.PASS
    assert (
        "a loss of 0.03 (0.02 to 0.04); 0.01 is"
        in said({"metric": "es", "max_loss": 0.01, "scale": "absolute"}, one).sentence
    )


def test_errors_count_the_other_way_round() -> None:
    more = quality(0.05, 0.01, metric="errors", more_is_better=False)
    assert said({"metric": "errors", "max_loss": 0.01}, more).outcome is Outcome.FAIL
    fewer = quality(-0.05, 0.01, metric="errors", more_is_better=False, p_worse=1.0)
    assert said({"metric": "errors", "max_loss": 0}, fewer).outcome is Outcome.PASS


def test_what_may_be_chance_is_no_failure() -> None:
    """The interval alone would fail it. With ten rules the same p-value is no finding any more."""
    rule = {"metric": "es", "max_loss": 0.0}
    assert said(rule, quality(-0.03, 0.01, p_worse=0.011)).outcome is Outcome.INCONCLUSIVE
    assert said(rule, quality(-0.03, 0.01, p_worse=0.009)).outcome is Outcome.FAIL
    ten = [quality(-0.03, 0.01, p_worse=0.009, metric=f"m{i}") for i in range(10)]
    verdict = decide(gate(*({"metric": one.metric, "max_loss": 0.0} for one in ten)), comparison(*ten))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "among all rules of the gate, p = 0.09." in verdict.sentence


def test_too_few_samples_say_how_many_would_do() -> None:
    """Half as wide takes four times as many: 1 % lost and 3 % uncertain, where 4 % decide."""
    verdict = said({"metric": "es", "max_loss": 0.02}, quality(-0.005, 0.03))
    [rule] = verdict.rules
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert rule.would_do == 4000
    assert "About 4,000 samples would do." in verdict.sentence


def test_too_few_groups_and_shares_of_nothing_are_told() -> None:
    few = quality(-0.1, 0.0, groups=3, relative=Estimate(value=-0.2))
    assert (
        "Samples from 3 source groups are too few; at least 6" in said({"metric": "es", "max_loss": 0.1}, few).sentence
    )
    nothing = quality(0.1, 0.01, a=0.0, relative=Estimate())
    assert "give the rule scale: absolute" in said({"metric": "es", "max_loss": 0.1}, nothing).sentence


@pytest.mark.parametrize(
    ("gain", "floor", "outcome"),
    [
        (-0.10, Floor(pairs=20, share=0.03), Outcome.FAIL),
        (-0.02, Floor(pairs=20, share=0.03), Outcome.INCONCLUSIVE),  # certain, and within what noise does
        (-0.02, Floor(pairs=0, share=0.0), Outcome.FAIL),  # in turns within one job
        (0.01, Floor(pairs=20, share=0.005), Outcome.PASS),
        (0.01, Floor(pairs=20, share=0.2), Outcome.INCONCLUSIVE),  # noise may hide a slowdown as well
        (-0.10, Floor(pairs=0, share=None), Outcome.INCONCLUSIVE),
        (-0.10, None, Outcome.INCONCLUSIVE),
    ],
)
def test_no_alarm_of_speed_lies_within_the_noise(gain: float, floor: Floor | None, outcome: Outcome) -> None:
    assert said({"metric": "speedup_token", "max_loss": 0}, speed(gain, 0.005, floor)).outcome is outcome


def test_a_speed_against_full_depth_says_what_the_clock_says() -> None:
    """Protects the reader of a loss where milliseconds fell: full depth became faster, and the policy did not."""
    one = speed(-0.1, 0.005, Floor(pairs=20, share=0.01)).model_copy(update={"paced": True, "a": 20.07, "b": 17.75})
    verdict = said({"metric": "speedup_token", "max_loss": 0}, one)
    assert verdict.outcome is Outcome.FAIL
    assert "against full depth of its own job (20.1 ms → 17.8 ms)" in verdict.sentence


def test_more_batches_do_not_help_against_noise() -> None:
    verdict = said({"metric": "speedup_token", "max_loss": 0}, speed(-0.02, 0.005, Floor(pairs=20, share=0.03)))
    assert "Two runs of one spec differ by up to 3.0% (20 pairs). Run the same spec more often" in verdict.sentence
    assert verdict.rules[0].would_do is None


def test_a_speed_that_was_not_timed_hides_no_other_rule() -> None:
    """Neither a loss of quality, nor that of two benchmarks one was timed and the other was not."""
    rules = [{"metric": "speedup_token", "max_loss": 0.05}, {"metric": "es", "max_loss": 0.02}]
    verdict = decide(gate(*rules), comparison(quality(-0.1, 0.01)))
    assert [one.outcome for one in verdict.rules] == [Outcome.FAIL, Outcome.INCONCLUSIVE]
    assert "No batch was timed on the same device class under both; run both on one" in verdict.rules[1].sentence
    timed = comparison(speed(0.01, 0.001, Floor(pairs=20, share=0.005)), quality(0.0, 0.001))
    other = comparison(quality(0.0, 0.001), benchmark="others").pairs
    both = timed.model_copy(update={"pairs": [*timed.pairs, *other]})
    assert decide(gate(*rules), timed).outcome is Outcome.PASS
    verdict = decide(gate(*rules), both)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.rules[0].benchmark == "others"
    alone = comparison(quality(0.0, 0.001), levels={"speedup_token": Estimate(value=1.3, low=1.2, high=1.4)})
    assert decide(gate({"metric": "speedup_token", "min": 1.1}), alone).outcome is Outcome.PASS


@pytest.mark.parametrize(
    ("level", "outcome"),
    [
        (Estimate(value=0.6, low=0.5, high=0.7), Outcome.PASS),
        (Estimate(value=0.6, low=0.49, high=0.7), Outcome.INCONCLUSIVE),
        (Estimate(value=0.4, low=0.3, high=0.49), Outcome.FAIL),
        (Estimate(value=0.9), Outcome.INCONCLUSIVE),
    ],
)
def test_min_looks_at_b_alone(level: Estimate, outcome: Outcome) -> None:
    found = comparison(quality(-0.3, 0.01), levels={"es": level})
    assert decide(gate({"metric": "es", "min": 0.5}), found).outcome is outcome


def test_the_worst_rule_decides_and_inconclusive_may_count_as_either() -> None:
    differences = [quality(0.1, 0.01), quality(0.0, 0.05, metric="em")]
    rules = [{"metric": "es", "max_loss": 0.02}, {"metric": "em", "max_loss": 0.02}]
    for counted, outcome, code in (
        ("inconclusive", Outcome.INCONCLUSIVE, 3),
        ("pass", Outcome.PASS, 0),
        ("fail", Outcome.FAIL, 1),
    ):
        verdict = decide(gate(*rules, on_inconclusive=counted), comparison(*differences))
        assert (verdict.outcome, verdict.outcome.exit_code) == (outcome, code)
        assert [one.outcome for one in verdict.rules] == [Outcome.INCONCLUSIVE, Outcome.PASS]


@pytest.mark.parametrize(
    ("change", "half", "p_worse", "outcome"),
    [
        (-0.05, 0.005, 0.0001, Outcome.FAIL),
        (-0.03, 0.04, 0.04, Outcome.FAIL),  # not certain alone; that it was found before speaks for it
        (-0.03, 0.04, 0.2, Outcome.INCONCLUSIVE),
        (0.01, 0.005, 1.0, Outcome.PASS),
    ],
)
def test_a_failure_that_does_not_show_again_is_none(
    change: float, half: float, p_worse: float, outcome: Outcome
) -> None:
    rule = {"metric": "es", "max_loss": 0.0}
    [first] = said(rule, quality(-0.05, 0.005)).rules
    second = said(rule, quality(change, half, p_worse)).rules
    assert _settled(first, second, "on fresh samples").outcome is outcome


def test_what_ci_reads_is_whole_whatever_things_are_called() -> None:
    hostile = f"{HOSTILE}\x00\x1b|`@everyone"
    found = comparison(quality(-0.1, 0.01), benchmark=hostile, policy_b="[x](https://evil.example)")
    verdict = decide(gate({"metric": "es", "max_loss": 0.02}), found)
    root = ElementTree.fromstring(ci.junit(verdict))
    [failure] = root.iter("failure")
    assert "a loss of 20.00 %" in (failure.text or "")
    written = ci.markdown(verdict)
    [row] = [line for line in written.splitlines() if "❌ fail |" in line]
    assert row.replace("\\|", "").count("|") == 6
    assert "](https" not in written.replace("\\]", "").replace("`[x](https://evil.example)`", "")
    assert "@everyone" not in written.replace("`", "").split("|")[-2]


def test_worse_and_better_are_only_said_beyond_chance_and_noise() -> None:
    assert words.standing(quality(-0.1, 0.01)) == "worse"
    assert words.standing(quality(0.1, 0.01, p_worse=0.0001)) == "better"
    assert words.standing(quality(-0.1, 0.01, p_worse=0.4)) == ""
    assert words.standing(speed(-0.02, 0.01, Floor(pairs=9, share=0.03))) == ""
    assert words.standing(speed(-0.05, 0.01, Floor(pairs=9, share=0.03))) == "worse"
    assert words.standing(speed(-0.05, 0.01, None)) == ""
    assert words.signed_percent(-0.0004) == "0.0%"
