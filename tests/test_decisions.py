"""The list keeps the promise that was declared, and says so when it cannot."""

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy import stats

from dede_ray.config import Config, Mistake, load
from dede_ray.decisions import (
    AssumedPoisonRate,
    CleanQuantile,
    Conformal,
    Decision,
    FixedThreshold,
    conformal_p_values,
)
from dede_ray.metrics import false_discovery_proportion

RULES = [Conformal(q=0.2), CleanQuantile(fpr=0.05), FixedThreshold(threshold=1.0), AssumedPoisonRate(rate=0.1)]
REPORT_KEYS = {
    *("rule", "score", "declared", "num_calibration", "num_calibration_unscored", "num_scored", "num_unscored"),
    *("num_flagged", "threshold", "how", "achievable_q", "achievable_poison_rate", "certified", "message"),
}


def names(count, prefix="train-00000.tar"):
    return [f"{prefix}/{i:06d}" for i in range(count)]


# --- conformal p-values


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_a_p_value_lies_between_strictly_above_and_at_or_above(scores, calibration):
    p_value = conformal_p_values(scores, calibration, names(len(scores)))
    rank = p_value * (len(calibration) + 1)
    np.testing.assert_allclose(rank, rank.round(), atol=1e-9)
    for s, r in zip(scores, rank.round(), strict=True):
        assert 1 + sum(c > s for c in calibration) <= r <= 1 + sum(c >= s for c in calibration)


@pytest.mark.parametrize("decimals", [None, 0], ids=["continuous", "many ties"])
def test_p_values_of_clean_samples_are_uniform(decimals):
    rng = np.random.default_rng(0)
    rank = []
    for trial in range(4000):
        scores = rng.normal(size=10)
        if decimals is not None:
            scores = scores.round(decimals)
        rank.append(10 * conformal_p_values(scores[:1], scores[1:], names(1, f"trial-{trial}"))[0])
    counts = np.bincount(np.rint(rank).astype(int), minlength=11)[1:]
    assert counts.sum() == 4000
    assert stats.chisquare(counts).pvalue > 0.001


def test_equal_scores_everywhere_still_give_uniform_p_values():
    rank = np.rint(100 * conformal_p_values(np.ones(20_000), np.ones(99), names(20_000))).astype(int)
    assert stats.chisquare(np.bincount(rank, minlength=101)[1:]).pvalue > 0.001


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 29), st.integers(1, 5), st.integers(0, 9))
def test_raising_a_calibration_score_never_lowers_a_p_value(calibration, which, lift, seed):
    """The monotonicity that makes p-values positively dependent, also where they tie."""
    raised = np.array(calibration)
    raised[which % raised.size] += lift
    scores, ids = np.arange(12) % 6, names(12)
    before = conformal_p_values(scores, calibration, ids, seed)
    assert (conformal_p_values(scores, raised, ids, seed) >= before).all()


def test_a_p_value_depends_on_the_sample_and_the_calibration_only():
    rng = np.random.default_rng(1)
    scores, calibration, ids = rng.integers(0, 20, 500) / 7, rng.integers(0, 20, 300) / 7, names(500)
    whole = conformal_p_values(scores, calibration, ids)
    order, some = rng.permutation(500), rng.permutation(500)[:40]
    shuffled = conformal_p_values(scores[order], rng.permutation(calibration), [ids[i] for i in order])
    np.testing.assert_array_equal(shuffled, whole[order])
    np.testing.assert_array_equal(conformal_p_values(scores[some], calibration, [ids[i] for i in some]), whole[some])
    np.testing.assert_array_equal(conformal_p_values(scores, calibration, ids), whole)
    assert (conformal_p_values(scores, calibration, ids, seed=1) != whole).any()
    assert (conformal_p_values(scores, calibration, names(500, "other.tar")) != whole).any()


def test_a_million_scores_take_about_a_second():
    rng = np.random.default_rng(2)
    scores, ids = rng.normal(size=1_000_000).astype(np.float32), names(1_000_000)
    calibration = rng.normal(size=100_000).astype(np.float32)
    start = time.process_time()
    Conformal().decide(scores, calibration, ids)
    assert time.process_time() - start < 3  # 0.3 s; generous, because other work may share the machine


# --- the promise of the conformal rule


@pytest.mark.parametrize("decimals", [None, 1], ids=["continuous", "ties"])
@pytest.mark.parametrize("num_poisoned", [0, 30])
@pytest.mark.parametrize("q", [0.1, 0.3])
def test_the_realised_false_discovery_rate_keeps_to_q(q, num_poisoned, decimals):
    rng = np.random.default_rng(3)
    is_poisoned = np.arange(1000) < num_poisoned
    proportions, found = [], []
    for trial in range(300):
        scores, calibration = rng.normal(size=1000) + 3.5 * is_poisoned, rng.normal(size=999)
        if decimals is not None:
            scores, calibration = scores.round(decimals), calibration.round(decimals)
        verdict = Conformal(q=q, seed=trial).decide(scores, calibration, names(1000))
        proportions.append(false_discovery_proportion(verdict.flagged, is_poisoned))
        found.append(verdict.flagged[is_poisoned].sum())
    standard_error = np.std(proportions, ddof=1) / math.sqrt(len(proportions))
    assert np.mean(proportions) <= q + 2 * standard_error
    if num_poisoned:
        assert np.mean(found) > 0.4 * num_poisoned  # and it does find poison
        assert np.mean(proportions) > q / 4  # the promise is used, not merely kept


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.integers(20, 200), st.sampled_from([0.05, 0.1, 0.2, 0.5]))
def test_flags_are_the_benjamini_hochberg_rejections_of_scipy(seed, size, num_calibration, q):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=size) + 3 * (rng.random(size) < 0.3)
    verdict = Conformal(q=q).decide(scores, rng.normal(size=num_calibration), names(size))
    np.testing.assert_array_equal(verdict.flagged, stats.false_discovery_control(verdict.p_value) <= q * (1 + 1e-9))


def test_a_poison_rate_is_certified_from_exactly_as_many_calibration_samples_as_it_takes():
    rule = Conformal(q=0.1, expected_poison_rate=0.01)
    scores = np.concatenate([np.full(10, 9.0), np.zeros(990)])
    calibration = np.random.default_rng(4).normal(size=999)
    enough = rule.decide(scores, calibration, names(1000))  # ten p-values of 1/1000 = 0.1 * 10 / 1000
    assert enough.report["certified"]
    np.testing.assert_array_equal(enough.flagged, scores == 9)
    assert enough.threshold == 9

    short = rule.decide(scores, calibration[:998], names(1000))
    assert not short.flagged.any()
    assert (short.report["certified"], short.threshold) == (False, None)
    assert "cannot certify: need at least 999 calibration samples, have 998" in short.report["message"]
    assert short.report["achievable_q"] == pytest.approx(0.1, rel=0.01)
    assert np.isfinite(short.p_value).all()  # they are true all the same

    # Without the expectation the same samples are judged as they are: ten p-values of 1/999 are just too many.
    blind = Conformal(q=0.1).decide(scores, calibration[:998], names(1000))
    assert not blind.flagged.any()
    assert blind.report["certified"]
    assert "a poison rate of 0.01 or more" in blind.report["message"]
    assert blind.report["achievable_poison_rate"] == pytest.approx(1 / (0.1 * 999))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 99), st.integers(1, 400))
def test_the_needed_calibration_is_not_off_by_one(percent, per_thousand):
    """Checked in whole numbers: 1/(n+1) <= (percent/100) (per_thousand/1000)."""
    needed = next(n for n in range(10**6) if (n + 1) * percent * per_thousand >= 100_000)
    rule = Conformal(q=percent / 100, expected_poison_rate=per_thousand / 1000)
    assert rule.decide([0.0], np.zeros(max(1, needed)), ["a"]).report["certified"]
    if needed > 1:
        report = rule.decide([0.0], np.zeros(needed - 1), ["a"]).report
        assert not report["certified"]
        assert f"at least {needed:,} calibration samples, have {needed - 1:,}" in report["message"]


def test_what_is_exactly_enough_is_enough():
    scores = np.where(np.arange(300) < 3, 9.0, -9.0)
    verdict = Conformal(q=0.01).decide(scores, np.zeros(9999), names(300))
    assert verdict.p_value[0] * 300 > 0.01 * 3  # by a rounding error: 1/10000 = 0.01 * 3 / 300
    assert verdict.flagged.sum() == 3


def test_a_calibration_that_could_certify_nothing_says_so_even_without_an_expected_rate():
    verdict = Conformal(q=0.1).decide(np.full(50, 9.0), np.zeros(8), names(50))
    assert not verdict.flagged.any()
    assert not verdict.report["certified"]
    assert "need at least 9 calibration samples, have 8" in verdict.report["message"]
    assert verdict.report["achievable_poison_rate"] is None
    assert Conformal(q=0.1).decide(np.full(50, 9.0), np.zeros(9), names(50)).flagged.all()


# --- what all rules share


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_samples_without_a_score_are_as_if_they_were_not_there(rule):
    rng = np.random.default_rng(5)
    scores, calibration, ids = rng.normal(size=400), rng.normal(size=300), names(400)
    scores[:40] += 5
    scores[::7] = np.nan
    kept = ~np.isnan(scores)
    verdict = rule.decide(scores, np.concatenate([calibration, [np.nan] * 3]), ids)
    alone = rule.decide(scores[kept], calibration, [i for i, k in zip(ids, kept, strict=True) if k])
    assert not verdict.flagged[~kept].any()
    assert np.isnan(verdict.p_value[~kept]).all()
    assert verdict.flagged.any()
    np.testing.assert_array_equal(verdict.flagged[kept], alone.flagged)
    np.testing.assert_array_equal(verdict.p_value[kept], alone.p_value)
    assert verdict.threshold == alone.threshold
    counts = {"num_scored": kept.sum(), "num_unscored": (~kept).sum(), "num_calibration": 300}
    assert {key: verdict.report[key] for key in counts} == counts
    assert verdict.report["num_calibration_unscored"] == 3


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_the_order_of_the_samples_does_not_matter(rule):
    rng = np.random.default_rng(6)
    scores, calibration, ids = rng.integers(0, 15, 300) / 5, rng.integers(0, 12, 200) / 5, names(300)
    order = rng.permutation(300)
    verdict = rule.decide(scores, calibration, ids)
    shuffled = rule.decide(scores[order], rng.permutation(calibration), [ids[i] for i in order])
    np.testing.assert_array_equal(shuffled.flagged, verdict.flagged[order])
    np.testing.assert_array_equal(shuffled.p_value, verdict.p_value[order])
    assert shuffled.report == verdict.report


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("size", [0, 1, 200])
def test_a_report_is_json_and_agrees_with_the_verdict(rule, size):
    rng = np.random.default_rng(7)
    verdict = rule.decide(rng.normal(1.0, size=size).astype(np.float32), rng.normal(size=100), names(size))
    assert verdict.p_value.dtype == np.float64
    assert verdict.flagged.dtype == bool
    assert json.loads(json.dumps(verdict.report, allow_nan=False)) == verdict.report
    assert verdict.report.keys() == REPORT_KEYS
    assert verdict.report["rule"] == rule.kind
    assert verdict.report["num_flagged"] == verdict.flagged.sum()
    assert verdict.report["threshold"] == verdict.threshold


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_the_threshold_parts_the_flagged_from_the_rest(rule):
    rng = np.random.default_rng(8)
    scores = (rng.normal(size=500) + 4 * (rng.random(500) < 0.1)).round(1)
    verdict = rule.decide(scores, rng.normal(size=400).round(1), names(500))
    assert verdict.flagged.any()
    assert (scores[verdict.flagged] >= verdict.threshold).all()
    assert (scores[~verdict.flagged] <= verdict.threshold).all()


@pytest.mark.parametrize("rule", [Conformal(), CleanQuantile()], ids=lambda rule: rule.kind)
@pytest.mark.parametrize("calibration", [None, [], [math.nan]], ids=["none", "empty", "unscored"])
def test_missing_calibration_is_a_mistake_that_says_what_to_do(rule, calibration):
    with pytest.raises(Mistake, match="score a set of clean samples"):
        rule.decide([1.0, 2.0], calibration, names(2))


@pytest.mark.parametrize("rule", RULES[2:], ids=lambda rule: rule.kind)
def test_rules_that_need_no_calibration_give_p_values_when_they_get_one(rule):
    assert np.isnan(rule.decide([0.5, 2.0], None, names(2)).p_value).all()
    np.testing.assert_allclose(rule.decide([0.5, 2.0], [0.0, 1.0, 1.5], names(2)).p_value, [3 / 4, 1 / 4])


def test_only_the_conformal_rule_certifies():
    rng = np.random.default_rng(9)
    scores, calibration = rng.normal(size=100), rng.normal(size=100)
    certified = [rule.decide(scores, calibration, names(100)).report["certified"] for rule in RULES]
    assert certified == [True, False, False, False]


# --- the simpler rules


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.sampled_from([0.01, 0.1, 0.29, 0.5]))
def test_a_clean_quantile_flags_no_more_of_its_calibration_than_declared_and_all_it_may(calibration, fpr):
    clean = np.array(calibration, float)
    threshold = CleanQuantile(fpr=fpr).decide(clean, clean, names(clean.size)).threshold
    assert (clean >= threshold).sum() <= fpr * clean.size + 1e-9
    assert (clean >= np.nextafter(threshold, -np.inf)).sum() > fpr * clean.size + 1e-9


def test_a_clean_quantile_that_cannot_be_resolved_admits_its_true_rate():
    report = CleanQuantile(fpr=0.01).decide([0.0], np.arange(9.0), ["a"]).report
    assert "with probability at most 0.1;" in report["message"]


def test_a_fixed_threshold_includes_itself():
    verdict = FixedThreshold(threshold=1.0).decide([0.9, 1.0, np.nan, 1.1], None, names(4))
    assert verdict.flagged.tolist() == [False, True, False, True]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, math.nan]), max_size=40),
    st.sampled_from([0.01, 0.1, 0.5, 0.9]),
    st.randoms(),
)
def test_an_assumed_rate_flags_exactly_that_many_the_highest_first_then_by_id(scores, rate, random):
    ids = names(len(scores))
    random.shuffle(ids)
    verdict = AssumedPoisonRate(rate=rate).decide(scores, None, ids)
    ranked = sorted((-s, sample_id) for s, sample_id in zip(scores, ids, strict=True) if not math.isnan(s))
    expected = {sample_id for _, sample_id in ranked[: round(rate * len(ranked))]}
    assert {sample_id for sample_id, flagged in zip(ids, verdict.flagged, strict=True) if flagged} == expected


# --- settings


def test_a_decision_is_chosen_by_its_kind_and_overridden_from_the_command_line(tmp_path):
    class JobConfig(Config):
        decision: Decision = Conformal()

    (tmp_path / "run.yaml").write_text("decision: {kind: conformal, q: 0.05, score: lid}")
    config = load(JobConfig, [str(tmp_path / "run.yaml"), "--decision.expected-poison-rate", "0.001"])
    assert config.decision == Conformal(q=0.05, score="lid", expected_poison_rate=0.001)
    assert JobConfig().decision.score == "dede_null_ratio"
    adapter = TypeAdapter(Decision)
    for rule in RULES:
        assert adapter.validate_python(rule.model_dump(mode="json")) == rule


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "conformal", "q": 0},
        {"kind": "conformal", "expected_poison_rate": 1.5},
        {"kind": "fixed", "threshold": math.inf},
        {"kind": "assumed_rate"},
        {"kind": "median"},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(Decision).validate_python(wrong)
