"""The list keeps the promise that was declared, and says so when it cannot."""

import itertools
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy import stats

from dede_ray.evaluation.results import rule_text
from dede_ray.metrics import false_discovery_proportion
from dede_ray.runtime.config import Config, Mistake, load
from dede_ray.scan.decisions import (
    AssumedPoisonRate,
    CleanMean,
    CleanQuantile,
    Conformal,
    Decision,
    FixedThreshold,
    PoolMedian,
    _polya_urn,
    _rank_envelope,
    _tops,
    conformal_p_values,
    e_benjamini_hochberg,
    e_values,
    rank_gate,
    true_discoveries,
)

WITH_CALIBRATION = [Conformal(q=0.2), CleanQuantile(fpr=0.05), CleanMean()]
WITHOUT_CALIBRATION = [FixedThreshold(threshold=1.0), AssumedPoisonRate(rate=0.1), PoolMedian()]
RULES = [*WITH_CALIBRATION, *WITHOUT_CALIBRATION]
REPORT_KEYS = {
    *("rule", "score", "declared", "num_calibration", "num_calibration_unscored", "num_scored", "num_unscored"),
    *("num_flagged", "threshold", "how", "achievable_q", "achievable_poison_rate", "certified", "message"),
    *("num_calibration_unused", "bins", "num_distinct", "poisoned_at_least", "alarm", "null_share"),
    *("oracle", "mode"),
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
        rank.append(10 * conformal_p_values(scores[:1], scores[1:], names(1), seed=trial)[0])
    counts = np.bincount(np.rint(rank).astype(int), minlength=11)[1:]
    assert counts.sum() == 4000
    assert stats.chisquare(counts).pvalue > 0.001


def test_equal_scores_everywhere_still_give_uniform_p_values():
    rank = [10 * conformal_p_values([1.0], np.ones(9), names(1), seed)[0] for seed in range(4000)]
    assert stats.chisquare(np.bincount(np.rint(rank).astype(int), minlength=11)[1:]).pvalue > 0.001


def test_tied_samples_stand_in_one_random_order_with_the_calibration_samples():
    """Two of five equal ones are corpus samples: each of the ten orders is as likely as any other."""
    orders = [
        tuple(sorted(np.rint(4 * conformal_p_values(np.ones(2), np.ones(3), names(2), seed)).astype(int)))
        for seed in range(5000)
    ]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 0.001


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
        verdict = Conformal(q=q, false_alarm=None, seed=trial).decide(scores, calibration, names(1000))
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
    verdict = Conformal(q=q, false_alarm=None).decide(scores, rng.normal(size=num_calibration), names(size))
    np.testing.assert_array_equal(verdict.flagged, stats.false_discovery_control(verdict.p_value) <= q * (1 + 1e-9))


def test_a_poison_rate_is_certified_from_exactly_as_many_calibration_samples_as_it_takes():
    rule = Conformal(q=0.1, false_alarm=None, expected_poison_rate=0.01)
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
    blind = Conformal(q=0.1, false_alarm=None).decide(scores, calibration[:998], names(1000))
    assert not blind.flagged.any()
    assert blind.report["certified"]
    assert "a poison rate of 0.01 or more" in blind.report["message"]
    assert blind.report["achievable_poison_rate"] == pytest.approx(1 / (0.1 * 999))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 99), st.integers(1, 400))
def test_the_needed_calibration_is_not_off_by_one(percent, per_thousand):
    """Checked in whole numbers: 1/(n+1) <= (percent/100) (per_thousand/1000)."""
    needed = next(n for n in range(10**6) if (n + 1) * percent * per_thousand >= 100_000)
    rule = Conformal(q=percent / 100, false_alarm=None, expected_poison_rate=per_thousand / 1000)
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
    verdict = Conformal(q=0.1, false_alarm=None).decide(np.full(50, 9.0), np.zeros(8), names(50))
    assert not verdict.flagged.any()
    assert not verdict.report["certified"]
    assert "need at least 9 calibration samples, have 8" in verdict.report["message"]
    assert verdict.report["achievable_poison_rate"] is None
    assert Conformal(q=0.1, false_alarm=None).decide(np.full(50, 9.0), np.zeros(9), names(50)).flagged.all()


# --- no list without poison


def share_of_alarms(rule, draw, trials=300):
    """How often a rule flags anything; `draw(rng)` gives scores, calibration and what is known about them."""
    rng = np.random.default_rng(20)
    alarms = 0
    for trial in range(trials):
        scores, calibration, about = draw(rng)
        rule = rule.model_copy(update={"seed": trial})
        alarms += rule.decide(scores, calibration, names(len(scores)), **about).flagged.any()
    return alarms / trials


def clean_only(rng):
    return rng.normal(size=300), rng.normal(size=499), {}


def test_a_corpus_without_poison_seldom_gets_a_list_whatever_q_is():
    alarm = 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)
    assert share_of_alarms(Conformal(q=0.5), clean_only) <= alarm
    assert share_of_alarms(Conformal(q=0.5, storey=True), clean_only) <= alarm
    assert share_of_alarms(Conformal(q=0.5, false_alarm=None), clean_only) > 0.2  # it is not q that does it


def test_a_list_is_whole_or_withheld_with_the_reason():
    scores = np.r_[np.full(5, 9.0), np.zeros(95)]
    calibration = np.linspace(-1, 1, 199)
    free = Conformal(q=0.2, false_alarm=None).decide(scores, calibration, names(100))
    chance = 6 * stats.hypergeom.sf(4, 299, 100, 5)  # the highest five of 299 are all of the corpus
    assert free.flagged.sum() == 5
    assert free.report["alarm"] == pytest.approx(chance)
    lenient = Conformal(q=0.2, false_alarm=1.01 * chance).decide(scores, calibration, names(100))
    strict = Conformal(q=0.2, false_alarm=0.99 * chance).decide(scores, calibration, names(100))
    np.testing.assert_array_equal(lenient.flagged, free.flagged)
    assert not strict.flagged.any()
    assert "5 would be on a list" in strict.report["message"]
    assert strict.report["certified"]
    assert strict.report["poisoned_at_least"] == 0


def test_the_gate_alone_takes_no_more_calibration_samples():
    rule = Conformal(q=0.1, false_alarm=0.01, expected_poison_rate=0.1)
    message = rule.decide(np.zeros(50), np.zeros(98), names(50)).report["message"]
    assert "need at least 99 calibration samples, have 98 (for q = 0.1 and a poison rate of 0.1)" in message
    assert rule.decide(np.zeros(50), np.zeros(99), names(50)).report["certified"]


# --- Storey


def test_storey_keeps_to_q_and_finds_more_where_much_is_poisoned():
    rng = np.random.default_rng(21)
    is_poisoned = np.arange(500) < 250
    proportions, found = {False: [], True: []}, {False: [], True: []}
    for trial in range(200):
        scores, calibration = rng.normal(size=500) + 1.5 * is_poisoned, rng.normal(size=499)
        for storey in (False, True):
            flagged = Conformal(q=0.2, storey=storey, seed=trial).decide(scores, calibration, names(500)).flagged
            proportions[storey].append(false_discovery_proportion(flagged, is_poisoned))
            found[storey].append(flagged[is_poisoned].mean())
    for storey, values in proportions.items():
        assert np.mean(values) <= 0.2 + 2 * np.std(values) / math.sqrt(200), storey
    assert np.mean(found[True]) > np.mean(found[False]) + 0.1


def test_the_share_of_clean_samples_is_counted_above_lambda():
    scores, calibration = np.r_[np.full(60, 9.0), np.full(40, -9.0)], np.zeros(99)
    rule = Conformal(storey=True, storey_lambda=0.2)
    assert rule.decide(scores, calibration, names(100)).report["null_share"] == pytest.approx(41 / 80)
    assert rule.decide(-np.abs(scores), calibration, names(100)).report["null_share"] == 1
    assert Conformal().decide(scores, calibration, names(100)).report["null_share"] is None


# --- copies


def test_copies_in_the_calibration_cause_false_alarms_unless_they_count_once():
    def draw(rng, known):
        copies = np.where(np.arange(300) < 10, 200, 1)  # ten calibration samples that come 200 times each
        calibration = np.repeat(rng.normal(size=300), copies)
        groups = [str(i) if copies[i] > 1 else None for i in np.repeat(np.arange(300), copies)]
        return rng.normal(size=300), calibration, {"calibration_groups": groups} if known else {}

    alarm = 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)
    assert share_of_alarms(Conformal(q=0.3), lambda rng: draw(rng, True), 200) <= alarm
    assert share_of_alarms(Conformal(q=0.3), lambda rng: draw(rng, False), 200) > 0.15


def test_with_copies_in_the_corpus_the_list_keeps_to_q_and_copies_share_their_fate():
    rng = np.random.default_rng(22)
    copies = np.where(np.arange(400) % 20 == 0, 8, 1)  # of poisoned and clean samples alike
    who = np.repeat(np.arange(400), copies)
    groups = [f"picture {i}" if copies[i] > 1 else None for i in who]
    first = np.unique(who, return_index=True)[1]
    proportions, found = [], []
    for trial in range(200):
        scores = (rng.normal(size=400) + 3.5 * (np.arange(400) < 40))[who] + 1e-3 * rng.normal(size=who.size)
        rule = Conformal(q=0.2, seed=trial)
        verdict = rule.decide(scores, rng.normal(size=999), names(who.size), groups=groups)
        assert verdict.report["num_distinct"] == 400
        for values in (verdict.flagged, verdict.p_value, verdict.rank, verdict.poisoned_at_least):
            np.testing.assert_array_equal(values, values[first][who])
        proportions.append(false_discovery_proportion(verdict.flagged[first], np.arange(400) < 40))
        found.append(verdict.flagged[first][:40].mean())
    assert np.mean(proportions) <= 0.2 + 2 * np.std(proportions) / math.sqrt(200)
    assert np.mean(found) > 0.4


def test_who_represents_a_group_is_drawn_without_a_look_at_the_scores():
    """Each of three copies with three scores is the one that counts a third of the time, whatever tie-breaking does."""
    scores, ids = np.tile([0.5, 1.5, 2.5], 600), names(1800)
    groups = [str(i // 3) for i in range(1800)]
    verdict = Conformal().decide(scores, [0.0, 1.0, 2.0, 3.0], ids, groups=groups)
    counts = np.unique(verdict.p_value[::3], return_counts=True)[1]
    assert stats.chisquare(counts).pvalue > 0.001
    order = np.random.default_rng(23).permutation(1800)
    again = Conformal().decide(scores[order], range(4), [ids[i] for i in order], groups=[groups[i] for i in order])
    np.testing.assert_array_equal(again.p_value, verdict.p_value[order])
    ties = [Conformal(seed=seed).decide(np.ones(3), np.ones(1), ids[:3], groups=groups[:3]) for seed in range(600)]
    above = np.mean([one.p_value[0] == 0.5 for one in ties])
    assert 0.42 < above < 0.58  # its draw among equal scores is a fair one, too


def test_a_copy_without_a_score_neither_counts_nor_is_flagged():
    scores = [np.nan, 9.0, 9.0, -9.0]
    verdict = Conformal(false_alarm=None).decide(scores, np.zeros(99), names(4), groups=["a", "a", "a", None])
    assert verdict.flagged.tolist() == [False, True, True, False]
    assert (verdict.report["num_scored"], verdict.report["num_distinct"]) == (3, 2)
    assert "copies counted once" in verdict.report["message"]


# --- bins of difficulty


def test_bins_keep_the_promise_where_the_corpus_is_more_difficult_than_the_calibration():
    def draw(rng):
        level, given = rng.permutation(np.arange(400) % 3), rng.permutation(np.repeat([0, 1, 2], [2700, 180, 120]))
        scores, calibration = rng.normal(size=400) * (1 + level), rng.normal(size=3000) * (1 + given)
        return scores, calibration, {"strata": level, "calibration_strata": given}

    assert share_of_alarms(Conformal(mondrian_bins=3), draw, 200) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)
    assert share_of_alarms(Conformal(), draw, 200) > 0.1  # without bins it is broken


def test_bins_find_what_is_odd_only_for_its_kind_and_keep_to_q():
    rng = np.random.default_rng(24)
    is_poisoned = np.arange(600) < 40
    proportions, found, unbinned = [], [], []
    for trial in range(200):
        difficulty, given = rng.random(600), rng.random(4000)
        difficulty[is_poisoned] /= 4
        scores = rng.normal(size=600) * (0.2 + difficulty) + 2 * is_poisoned
        calibration = rng.normal(size=4000) * (0.2 + given)
        rule = Conformal(mondrian_bins=4, seed=trial)
        strata, calibration_strata = rule.strata(difficulty, given)
        about = {"strata": strata, "calibration_strata": calibration_strata}
        flagged = rule.decide(scores, calibration, names(600), **about).flagged
        proportions.append(false_discovery_proportion(flagged, is_poisoned))
        found.append(flagged[is_poisoned].mean())
        unbinned.append(Conformal().decide(scores, calibration, names(600)).flagged[is_poisoned].mean())
    assert np.mean(proportions) <= 0.1 + 2 * np.std(proportions) / math.sqrt(200)
    assert np.mean(found) > np.mean(unbinned) + 0.2


def test_a_p_value_in_a_bin_is_the_one_that_the_bin_alone_would_give():
    rng = np.random.default_rng(25)
    scores, calibration = rng.integers(0, 30, 300) / 3, rng.integers(0, 30, 600) / 3
    strata, given = rng.integers(0, 3, 300), rng.integers(-1, 3, 600)
    ids = names(300)
    verdict = Conformal(mondrian_bins=3).decide(scores, calibration, ids, strata=strata, calibration_strata=given)
    for stratum in range(3):
        here = np.flatnonzero(strata == stratum)
        alone = conformal_p_values(scores[here], calibration[given == stratum], [ids[i] for i in here])
        np.testing.assert_array_equal(verdict.p_value[here], alone)
    assert verdict.report["bins"] == [{"strata": [b], "num_calibration": int((given == b).sum())} for b in range(3)]
    assert verdict.report["num_calibration_unused"] == (given == -1).sum()


def test_bins_are_quantiles_of_the_calibration_and_their_borders_take_no_part():
    rng = np.random.default_rng(26)
    given = rng.random(1003)
    strata, calibration_strata = Conformal(mondrian_bins=5).strata([-1.0, 0.5, 2.0], given)
    assert strata.tolist() == [0, 2, 4]
    values, counts = np.unique(calibration_strata, return_counts=True)
    assert values.tolist() == [-1, 0, 1, 2, 3, 4]
    assert counts[0] == 4
    assert counts[1:].min() >= 199
    for stratum in range(4):
        assert given[calibration_strata == stratum].max() < given[calibration_strata == stratum + 1].min()


@pytest.mark.parametrize(
    ("counts", "merged"),
    [
        ([99, 99, 99], [[0], [1], [2]]),
        ([98, 99, 99], [[0, 1], [2]]),
        ([99, 10, 98], [[0], [1, 2]]),
        ([99, 99, 10], [[0], [1, 2]]),
        ([40, 40, 40], [[0, 1, 2]]),
    ],
)
def test_bins_with_too_few_calibration_samples_join_a_neighbour_and_the_verdict_says_so(counts, merged):
    rule = Conformal(mondrian_bins=3, expected_poison_rate=0.1)  # 99 = 1 / (0.1 * 0.1) - 1
    given = np.repeat(range(3), counts)
    report = rule.decide(np.zeros(9), np.zeros(sum(counts)), names(9), strata=[1] * 9, calibration_strata=given).report
    assert [one["strata"] for one in report["bins"]] == merged
    assert report["certified"]
    verdict = rule.decide([9.0] * 9, np.zeros(sum(counts)), names(9), strata=[1] * 9, calibration_strata=given)
    assert verdict.flagged.all()
    assert (verdict.threshold is None) == (len(merged) > 1)  # bins have their own
    assert ("merged until each had the 99 it takes" in report["how"]) == (len(merged) < 3)


def test_bins_that_cannot_be_made_are_refused():
    rule = Conformal(mondrian_bins=3, expected_poison_rate=0.1)
    report = rule.decide([0.0], np.zeros(98), ["a"], strata=[2], calibration_strata=[0] * 50 + [1] * 48).report
    assert "need at least 99 calibration samples, have 98" in report["message"]
    with pytest.raises(Mistake, match="set mondrian_bins to 1"):
        rule.decide([0.0], np.zeros(98), ["a"])


# --- lower bounds for every prefix


def shuffled_pools(seed, num, num_calibration, times):
    """Pools of clean samples in random order: of each corpus sample, the calibration samples above it."""
    rng = np.random.default_rng(seed)
    is_corpus = np.arange(num + num_calibration) < num
    for _ in range(times):
        shuffled = rng.permutation(is_corpus)
        yield np.cumsum(~shuffled)[shuffled]


@pytest.mark.parametrize(("num", "num_calibration"), [(30, 40), (300, 50), (50, 400)])
def test_the_bounds_hold_at_once_for_clean_samples_as_often_as_declared(num, num_calibration):
    """Against the definition: shuffled pools of clean samples, 20,000 of them, that know nothing of urns."""
    pools = shuffled_pools(27, num, num_calibration, 20_000)
    too_high = sum(true_discoveries(above, num_calibration).max() > 0 for above in pools)
    assert 0.05 < too_high / 20_000 <= 0.1  # the promise is kept, and used


@pytest.mark.parametrize(("num", "num_calibration"), [(5, 3), (40, 7), (3, 30)])
def test_the_urn_draws_from_the_negative_hypergeometric_distribution(num, num_calibration):
    """How many of M stand before the j-th of n, counted out: scipy's law, whose chances for (5, 3) are enumerated."""
    ranks = np.arange(1, num_calibration + 1)
    found_BJ = np.concatenate([_polya_urn(np.random.default_rng(i), num, num_calibration, ranks) for i in range(2)])
    assert len(found_BJ) == 20_000
    for j, found_B in zip(ranks, found_BJ.T, strict=True):
        chance = stats.nhypergeom(num + num_calibration, num, j).pmf(np.arange(num + 1))
        share = np.bincount(found_B, minlength=num + 1) / len(found_B)
        assert np.abs(share - chance).max() < 5 * math.sqrt(0.25 / len(found_B)), j
        if (num, num_calibration) == (5, 3):
            orders = [*itertools.combinations(range(8), 3)]  # where the calibration samples stand
            counted = np.bincount([order[j - 1] - (j - 1) for order in orders], minlength=6) / len(orders)
            np.testing.assert_allclose(chance, counted, atol=1e-12)


def test_each_bound_is_what_its_definition_says():
    ranks, most = _rank_envelope(6, 4, 0.8)
    above = np.array([0, 0, 0, 0, 1, 2])
    expected = []
    for prefix in range(1, 7):
        standing = {int(j): int((above < j).sum()) for j in ranks}
        clean = min(int(u) + max(0, prefix - standing[int(j)]) for j, u in zip(ranks, most, strict=True))
        whole = [
            standing[int(j)] - int(u) - max(0, standing[int(j)] - prefix) for j, u in zip(ranks, most, strict=True)
        ]
        assert clean >= 0
        expected.append(max(0, *whole))
    assert true_discoveries(above, 4, 0.8).tolist() == expected


# --- the gate


def chance_by_counting(num, num_calibration, tops, observed):
    """P-value of the gate from its definition, by going through all orders of a small pool."""
    orders = list(itertools.combinations(range(num + num_calibration), num))
    at_least = [
        sum(sum(p < k for p in order) >= x for order in orders) / len(orders)
        for k, x in zip(tops, observed, strict=True)
    ]
    return min(1.0, len(tops) * min(at_least))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 7), st.integers(1, 7), st.randoms())
def test_the_gate_is_the_hypergeometric_chance_counted_out(num, num_calibration, random):
    is_corpus = [True] * num + [False] * num_calibration
    random.shuffle(is_corpus)
    above = np.cumsum(~np.array(is_corpus))[is_corpus]
    tops = _tops(num, num_calibration)
    observed = [sum(is_corpus[:k]) for k in tops]
    expected = chance_by_counting(num, num_calibration, tops, observed)
    assert rank_gate(random.sample(above.tolist(), num), num_calibration) == pytest.approx(expected)


def test_the_tops_that_the_gate_looks_at():
    assert _tops(2500, 2500).tolist() == [8, 16, 32, 64, 128, 256]
    assert _tops(100, 2500).tolist() == [2, 4, 8, 16, 32, 64]
    first = _tops(1_000_000, 5000)[0]  # a calibration sample is missing there with probability e^-5
    assert stats.hypergeom.pmf(first, 1_005_000, 1_000_000, first) == pytest.approx(math.exp(-5), rel=0.01)


@pytest.mark.parametrize(("num", "num_calibration"), [(2500, 2500), (3000, 300), (300, 3000)])
def test_the_gate_lets_a_clean_corpus_through_no_more_often_than_declared(num, num_calibration):
    pools = shuffled_pools(28, num, num_calibration, 2000)
    passed = sum(rank_gate(above, num_calibration) <= 0.05 for above in pools)
    assert passed / 2000 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)
    assert passed  # it is no wall


def test_the_gate_sees_eight_where_simes_needs_twenty():
    rng = np.random.default_rng(29)
    scores = np.r_[np.full(12, 9.0), rng.normal(size=2488)]
    verdict = Conformal().decide(scores, rng.normal(size=2500), names(2500))
    assert verdict.flagged[:12].all()
    assert rank_gate([], 5) is None
    assert rank_gate([0], 0) is None


@pytest.mark.parametrize("num_poisoned", [0, 20, 200])
def test_all_bounds_hold_at_once_nine_times_out_of_ten(num_poisoned):
    rng = np.random.default_rng(28)
    is_poisoned = np.arange(600) < num_poisoned
    held, reached = [], []
    for trial in range(300):
        scores, calibration = rng.normal(size=600) + 3 * is_poisoned, rng.normal(size=999)
        verdict = Conformal(seed=trial).decide(scores, calibration, names(600))
        order = np.argsort(verdict.rank)
        assert (np.diff(verdict.p_value[order]) >= 0).all()
        bound = verdict.poisoned_at_least[order]
        held.append((bound <= is_poisoned[order].cumsum()).all())
        reached.append(bound.max())
    assert np.mean(held) >= 0.9 - 2 * math.sqrt(0.09 / 300)
    if num_poisoned:
        assert np.mean(reached) > 0.2 * num_poisoned


def test_equal_p_values_are_ranked_by_score_and_equal_scores_by_id():
    verdict = Conformal().decide([5.0, 7.0, np.nan, 5.0, -1.0, 6.0], [0.0, 1.0], ["b", "e", "d", "a", "f", "c"])
    assert verdict.p_value[[0, 1, 3, 5]].tolist() == [1 / 3] * 4
    assert verdict.rank.tolist() == [4, 1, 0, 3, 5, 2]


def test_no_p_values_have_no_bounds_and_hopeless_ones_prove_nothing():
    assert true_discoveries([], 9).tolist() == []
    assert true_discoveries([0, 0], 0).tolist() == [0, 0]
    assert true_discoveries(np.full(5, 9), 9).tolist() == [0] * 5
    assert true_discoveries(np.zeros(50), 10_000).tolist() == list(range(1, 51))


def test_the_report_proves_as_much_poison_as_the_last_rank_of_the_list():
    rng = np.random.default_rng(29)
    scores = rng.normal(size=1000) + 5 * (np.arange(1000) < 100)
    verdict = Conformal().decide(scores, rng.normal(size=2000), names(1000))
    last = np.flatnonzero(verdict.flagged)[verdict.rank[verdict.flagged].argmax()]
    assert verdict.rank[last] == verdict.flagged.sum()
    assert 50 < verdict.report["poisoned_at_least"] == verdict.poisoned_at_least[last] <= 100


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
    np.testing.assert_array_equal(shuffled.rank, verdict.rank[order])
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


@pytest.mark.parametrize("rule", WITH_CALIBRATION, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("calibration", [None, [], [math.nan]], ids=["none", "empty", "unscored"])
def test_missing_calibration_is_a_mistake_that_says_what_to_do(rule, calibration):
    with pytest.raises(Mistake, match="score a set of clean samples"):
        rule.decide([1.0, 2.0], calibration, names(2))


@pytest.mark.parametrize("rule", WITHOUT_CALIBRATION, ids=lambda rule: rule.kind)
def test_rules_that_need_no_calibration_give_p_values_when_they_get_one(rule):
    assert np.isnan(rule.decide([0.5, 2.0], None, names(2)).p_value).all()
    np.testing.assert_allclose(rule.decide([0.5, 2.0], [0.0, 1.0, 1.5], names(2)).p_value, [3 / 4, 1 / 4])


def test_only_the_conformal_rule_certifies():
    rng = np.random.default_rng(9)
    scores, calibration = rng.normal(size=100), rng.normal(size=100)
    reports = [rule.decide(scores, calibration, names(100)).report for rule in RULES]
    assert [report["rule"] for report in reports if report["certified"]] == ["conformal"]
    assert [report["rule"] for report in reports if report["oracle"]] == ["compat_median"]


def test_every_rule_has_words_of_its_own():
    words = [rule_text(rule.decide([0.5, 2.0], [0.0, 1.0], names(2)).report) for rule in RULES]
    assert len(set(words)) == len(RULES)
    assert not any("_" in text for text in words), "a kind is no words"
    assert "oracle" in words[-1]


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


# --- the thresholds of DeDe's publication


def test_the_papers_mean_is_that_of_the_calibration_scores_and_not_of_what_is_judged():
    verdict = CleanMean().decide([0.0, 2.9, 3.0, 50.0, math.nan], [1.0, 2.0, 6.0, math.nan], names(5))
    assert verdict.threshold == 3.0
    assert verdict.flagged.tolist() == [False, False, True, True, False]
    assert "flags about 33% of the clean samples" in verdict.report["message"]


def test_the_median_of_the_pool_flags_half_whatever_is_in_it_and_admits_to_be_an_oracle():
    rng = np.random.default_rng(10)
    clean, triggered = rng.normal(size=200), rng.normal(size=200) + 1.5
    for pool in (clean, np.concatenate([clean, triggered])):
        verdict = PoolMedian().decide(pool, None, names(pool.size))
        assert verdict.flagged.sum() == pool.size / 2
        assert verdict.report["oracle"]
        assert "half" in verdict.report["message"]
    caught, alarms = verdict.flagged[200:].mean(), verdict.flagged[:200].mean()
    assert caught + alarms == pytest.approx(1)  # the mark that this threshold leaves in the publication's tables
    assert PoolMedian().decide([math.nan], None, ["a"]).threshold is None


# --- settings


def test_a_decision_is_chosen_by_its_kind_and_overridden_from_the_command_line(tmp_path):
    class JobConfig(Config):
        decision: Decision = Conformal()

    (tmp_path / "run.yaml").write_text("decision: {kind: conformal, q: 0.05, score: lid}")
    config = load(JobConfig, [str(tmp_path / "run.yaml"), "--decision.expected-poison-rate", "0.001"])
    assert config.decision == Conformal(q=0.05, score="lid", expected_poison_rate=0.001)
    assert JobConfig().decision.score == "dede_reverse"
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


def test_a_refused_verdict_claims_nothing_and_its_ranking_stays():
    draw = np.random.default_rng(0)
    scores, ids = np.r_[draw.normal(size=50), draw.normal(9, 1, size=50)], [str(i) for i in range(100)]
    few = Conformal(q=0.1).decide(scores, draw.normal(size=8), ids)
    unlike = Conformal(q=0.1).decide(scores, draw.normal(size=500), ids).refused("they are unlike")
    for verdict in (few, unlike):
        assert not verdict.flagged.any()
        assert not verdict.poisoned_at_least.any()
        for name in ("poisoned_at_least", "threshold", "alarm", "null_share"):
            assert verdict.report[name] is None
        assert verdict.report["certified"] is False
        assert verdict.report["how"].startswith("none: refused")
        assert not any("certified" in text for text in (verdict.report["how"], verdict.report["message"]))
        assert set(verdict.rank.tolist()) == set(range(1, 101))


@pytest.mark.parametrize("rule", [FixedThreshold(threshold=0.5), AssumedPoisonRate(rate=0.1), PoolMedian()])
def test_rules_that_need_no_calibration_rank_by_the_score_without_any(rule):
    verdict = rule.decide([0.1, np.nan, 0.9, 0.9, 0.5], None, ["a", "b", "d", "c", "e"])
    assert verdict.rank.tolist() == [4, 0, 2, 1, 3]
    assert np.isnan(verdict.p_value).all()
    assert not verdict.poisoned_at_least.any()


# --- e-values


def mean_e_of_clean(num_clean, poisoned_ranks, num_calibration, q):
    """E-values of clean samples, summed over them and averaged over all orders of clean and calibration samples, for
    poison that stands at the given places of the ranking."""
    num = num_clean + len(poisoned_ranks) + num_calibration
    places = [place for place in range(num) if place not in poisoned_ranks]
    total, count = 0.0, 0
    for clean in itertools.combinations(places, num_clean):
        corpus = sorted([*clean, *poisoned_ranks])
        above = np.array([sum(1 for i in range(place) if i in places and i not in clean) for place in corpus])
        e = e_values((1 + above) / (num_calibration + 1), num_calibration, q)
        total += e[[place in clean for place in corpus]].sum()
        count += 1
    return total / count


@pytest.mark.parametrize("q", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("poisoned_ranks", [(), (0,), (0, 1), (1, 4), (0, 1, 2, 3)])
def test_e_values_of_clean_samples_are_one_on_average_at_most(poisoned_ranks, q):
    """By going through all orders of exchangeable samples: what e-values mean, without a theorem."""
    for num_clean, num_calibration in ((1, 4), (3, 3), (4, 6)):
        mean = mean_e_of_clean(num_clean, poisoned_ranks, num_calibration, q)
        assert mean <= num_clean + 1e-9, (num_clean, num_calibration)
    assert mean_e_of_clean(5, (), 5, 0.7) > 0.3  # they are no nothing


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.1, 0.3, 0.7]), st.randoms())
def test_an_e_value_is_what_its_definition_says(num, num_calibration, q, random):
    """(n + 1) 1{s >= T} / (1 + #{calibration >= T}), T the lowest of all scores where the ratio is at most q."""
    pool = random.sample(range(1000), num + num_calibration)
    scores, calibration = np.array(pool[:num]), np.array(pool[num:])
    low_enough = [
        t
        for t in sorted(pool)
        if num * (1 + (calibration >= t).sum()) <= q * (num_calibration + 1) * (scores >= t).sum() * (1 + 1e-9)
    ]
    t = low_enough[0] if low_enough else np.inf
    expected = (scores >= t) * (num_calibration + 1) / (1 + (calibration >= t).sum())
    found = e_values(conformal_p_values(scores, calibration, names(num)), num_calibration, q)
    np.testing.assert_allclose(found, expected)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0, 10.0, 40.0]), max_size=9), st.sampled_from([0.1, 0.3, 0.7]))
def test_e_values_are_rejected_as_their_rule_says(e_value, q):
    """All sets of samples whose members each have at least M / (q size); the largest is what is rejected."""
    num = len(e_value)
    self_consistent = [k for k in range(1, num + 1) if sorted(e_value, reverse=True)[k - 1] >= num / (q * k) - 1e-9]
    found = e_benjamini_hochberg(e_value, q)
    assert found.sum() == max(self_consistent, default=0)
    assert min([e for e, f in zip(e_value, found, strict=True) if f], default=99) >= max(
        [e for e, f in zip(e_value, found, strict=True) if not f], default=0
    )


def test_one_division_at_the_same_q_is_benjamini_hochberg():
    rng = np.random.default_rng(30)
    for seed in range(30):
        scores = rng.normal(size=200) + 4 * (np.arange(200) < 20)
        verdict = Conformal(q=0.2, false_alarm=None, seed=seed).decide(scores, rng.normal(size=150), names(200))
        e = e_values(verdict.p_value, 150, 0.2)
        np.testing.assert_array_equal(e_benjamini_hochberg(e, 0.2), verdict.flagged)


def test_lists_by_averaged_e_values_keep_to_q_and_depend_less_on_the_division():
    rng = np.random.default_rng(31)
    is_poisoned, ids = np.arange(300) < 30, names(300)
    proportions, found = [], []
    for trial in range(100):
        signal = rng.normal(size=300) + 4 * is_poisoned
        clean = rng.normal(size=400)
        redraws = []
        for _ in range(5):
            half = rng.permutation(400) < 200
            redraws.append((signal + 0.5 * rng.normal(size=300), (clean + 0.5 * rng.normal(size=400))[half], None))
        first, *more = redraws
        verdict = Conformal(q=0.2, seed=trial).decide(first[0], first[1], ids, redraws=more)
        assert verdict.report["how"].endswith("e-values averaged over 5 divisions of the calibration samples")
        assert verdict.threshold is None
        proportions.append(false_discovery_proportion(verdict.flagged, is_poisoned))
        found.append(verdict.flagged[is_poisoned].mean())
    assert np.mean(proportions) <= 0.2
    assert np.mean(found) > 0.5


def test_copies_share_their_fate_by_e_values_too():
    scores, calibration = np.r_[np.full(12, 9.0), np.zeros(88)], np.linspace(-1, 1, 199)
    groups = ["one", "one", *[None] * 98]
    about = {"groups": groups, "redraws": [(scores, calibration, None)]}
    verdict = Conformal(q=0.2).decide(scores, calibration, names(100), **about)
    np.testing.assert_array_equal(verdict.flagged, scores == 9)
    assert verdict.report["num_distinct"] == 99
    with pytest.raises(Mistake, match="takes neither bins nor Storey"):
        Conformal(storey=True).decide(scores, calibration, names(100), **about)
