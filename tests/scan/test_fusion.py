"""One score from several: without what difficulty explains, in the units of clean ranks, one sample at a time."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from dede_ray.metrics import auroc, false_discovery_proportion
from dede_ray.runtime.config import Mistake
from dede_ray.scan.decisions import Conformal
from dede_ray.scan.fusion import Difficulty, Fusion

pytestmark = pytest.mark.trains


def names(count, shard="train-00000.tar"):
    return [f"{shard}/{i:06d}" for i in range(count)]


def pictures(rng, count, positive=True):
    """Scores that are mostly difficulty, and their covariates: a bent one, a linear one, a useless one, a few-valued
    one, a constant one."""
    covariate = np.stack(
        [rng.random(count), rng.normal(size=count), rng.normal(size=count), rng.integers(0, 3, count), np.ones(count)],
        axis=1,
    )
    location = np.sin(5 * covariate[:, 0]) + 0.5 * covariate[:, 1] + 0.3 * covariate[:, 3]
    value = location + rng.normal(size=count) * 0.2 * np.exp(covariate[:, 0])
    return np.exp(value) if positive else value, covariate


# --- difficulty


@pytest.mark.parametrize("positive", [True, False], ids=["in logarithms", "as they are"])
def test_difficulty_explains_clean_scores_before_and_hardly_after(positive):
    rng = np.random.default_rng(0)
    state = Difficulty().fit(*pictures(rng, 3000, positive))
    assert bool(state["is_log"]) is positive
    assert state["r2_before"] > 0.6
    assert state["r2_after"] < 0.05
    score, covariate = pictures(rng, 3000, positive)  # and on samples that were never seen
    normal = Difficulty().apply(state, score, covariate)
    assert Difficulty().explained(normal, covariate) < 0.05
    assert abs(np.median(normal)) < 0.1
    hard = covariate[:, 0] > 0.5
    for part in (normal[hard], normal[~hard]):
        assert 0.85 < np.median(np.abs(part)) / 0.6745 < 1.15  # the spread is one, for easy and difficult alike


def test_what_is_odd_for_its_difficulty_is_found_after_normalising_only():
    rng = np.random.default_rng(1)
    difficulty = Difficulty()
    state = difficulty.fit(*pictures(rng, 3000))
    score, covariate = pictures(rng, 2000)
    is_poisoned = np.arange(2000) < 100
    score = score * np.exp(1.0 * is_poisoned)
    before, after = auroc(score, is_poisoned), auroc(difficulty.apply(state, score, covariate), is_poisoned)
    assert before.high < 0.85 < after.low


def test_a_few_odd_samples_among_the_clean_ones_hardly_matter():
    rng = np.random.default_rng(2)
    score, covariate = pictures(rng, 2000)
    test = pictures(rng, 500)
    normal = Difficulty().apply(Difficulty().fit(score, covariate), *test)
    score[:40] *= 1e4
    tainted = Difficulty().apply(Difficulty().fit(score, covariate), *test)
    assert np.abs(tainted - normal).max() < 1.0
    assert np.abs(tainted - normal).mean() < 0.15


def test_normalising_looks_at_one_sample_at_a_time_and_rises_with_its_score():
    rng = np.random.default_rng(3)
    difficulty = Difficulty(num_knots=4)
    score, covariate = pictures(rng, 1000)
    state = difficulty.fit(score, covariate)
    again = difficulty.fit(score, covariate)
    assert {name: one.tobytes() for name, one in state.items()} == {name: one.tobytes() for name, one in again.items()}
    whole = difficulty.apply(state, score, covariate)
    parts = [difficulty.apply(state, score[i : i + 7], covariate[i : i + 7]) for i in range(0, 1000, 7)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-9)
    assert (difficulty.apply(state, score * 1.1, covariate) > whole).all()


def test_what_was_never_seen_has_a_finite_score_and_what_is_missing_has_none():
    rng = np.random.default_rng(4)
    score, covariate = pictures(rng, 1000)
    state = Difficulty().fit(np.r_[score, np.nan, 1.0], np.r_[covariate, covariate[:1], covariate[:1] * np.nan])
    odd = np.array([[9.0, -99, 99, -1, 5], [0.5, 0, 0, 1, 1], [0.5, 0, 0, 1, 1], [0.5, np.nan, 0, 1, 1]])
    normal = Difficulty().apply(state, [1.0, 0.0, np.nan, 1.0], odd)
    assert np.isfinite(normal).tolist() == [True, True, False, False]


def test_too_few_or_equal_clean_scores_are_a_mistake():
    score, covariate = pictures(np.random.default_rng(5), 309)
    with pytest.raises(Mistake, match=r"309 clean samples.*5 covariates take at least 310"):
        Difficulty().fit(score, covariate)
    with pytest.raises(Mistake, match="same score"):
        Difficulty().fit(np.ones(400), pictures(np.random.default_rng(5), 400)[1])


# --- combination


def test_clean_columns_become_normal_whatever_they_were():
    rng = np.random.default_rng(6)
    fusion = Fusion(columns=("a", "b"))
    state = fusion.fit({"a": rng.exponential(size=4000), "b": rng.normal(5, 100, size=4000).round(), "c": [0.0]})
    for name, score in (("a", rng.exponential(size=4000)), ("b", rng.normal(5, 100, size=4000).round())):
        normal = fusion.normal_score(state, name, score)
        assert stats.kstest(normal, "norm").statistic < 0.04
        assert (np.diff(normal[np.argsort(score)]) >= 0).all()
        assert np.unique(normal).size > 0.99 * np.unique(score).size  # only below all clean ones are some equal


def test_scores_beyond_all_clean_ones_still_rank_and_stay_finite():
    rng = np.random.default_rng(7)
    fusion = Fusion(columns=("a",))
    clean = rng.normal(size=2000)
    state = fusion.fit({"a": clean})
    score = clean.max() + np.array([0.0, 1e-6, 0.1, 1.0, 10.0, 1e6])
    normal = fusion.apply(state, {"a": score})
    assert np.isfinite(normal).all()
    assert (np.diff(normal) > 0).all()
    assert 0.2 < fusion.apply(state, {"a": [4.5]})[0] / 4.5 < 1.2  # the tail continues at a likely pace


def test_the_highest_column_or_the_mean_of_two_decides():
    rng = np.random.default_rng(8)
    clean = {name: rng.normal(size=1000) for name in "abc"}
    highest, two = Fusion(columns=tuple("abc")), Fusion(columns=tuple("abc"), rule="mean_top2")
    state = highest.fit(clean)
    columns = {"a": [3.0, 0.0, np.nan, np.nan], "b": [0.0, 2.0, np.nan, 2.0], "c": [0.0, 2.0, np.nan, np.nan]}
    normal = {name: highest.normal_score(state, name, columns[name]) for name in "abc"}
    one = highest.apply(state, columns)
    np.testing.assert_allclose(one[:2], [normal["a"][0], max(normal["b"][1], normal["c"][1])])
    both = two.apply(state, columns)
    np.testing.assert_allclose(both[1], (normal["b"][1] + normal["c"][1]) / 2)
    assert one[0] > one[1]
    assert both[0] < both[1]
    assert np.isnan([one[2], both[2]]).all()
    np.testing.assert_allclose([one[3], both[3]], [normal["b"][3], normal["b"][3] / 2])  # what is missing counts 0
    assert Fusion(columns=("a",), rule="mean_top2").apply(state, {"a": [3.0]}) == pytest.approx(normal["a"][0])


def test_combining_looks_at_one_sample_at_a_time():
    rng = np.random.default_rng(9)
    fusion = Fusion(columns=("a", "b"), rule="mean_top2")
    state = fusion.fit({name: rng.normal(size=500).astype(np.float32) for name in "ab"})
    columns = {name: rng.normal(size=300).astype(np.float32) for name in "ab"}
    alone = [fusion.apply(state, {name: column[i : i + 1] for name, column in columns.items()})[0] for i in range(300)]
    np.testing.assert_array_equal(alone, fusion.apply(state, columns))


def test_a_column_that_is_missing_or_tells_nothing_is_a_mistake():
    with pytest.raises(Mistake, match="no column b; there are a, c"):
        Fusion(columns=("b",)).fit({"a": [1.0], "c": [1.0]})
    with pytest.raises(Mistake, match="column a has 1 different scores among 3 clean samples"):
        Fusion(columns=("a",)).fit({"a": [2.0, 2.0, 2.0, np.nan]})
    state = Fusion(columns=("a",)).fit({"a": [0.0, 1.0, 1.0, 1.0]})  # no spread at the top
    assert np.isfinite(Fusion(columns=("a",)).apply(state, {"a": [5.0]})).all()


# --- the promise at the end


@pytest.mark.parametrize("rule", ["max", pytest.param("mean_top2", marks=pytest.mark.slow)])
def test_the_list_from_normalised_and_combined_scores_keeps_to_q(rule):
    """Detector `a` is mostly difficulty and sees half of the poison, `b` sees the other half."""
    is_poisoned = np.arange(400) < 30
    difficulty, fusion, ids = Difficulty(num_knots=3), Fusion(columns=("a", "b"), rule=rule), names(400)
    proportions, found, alarms = [], [], 0
    for trial in range(60):
        rng = np.random.default_rng(trial)
        for poison in (False, True):  # the corpus, then 1,200 calibration samples, in one heap
            score, covariate = pictures(rng, 1600)
            other = rng.normal(size=1600) + 0.3 * np.log(score)
            score[:15] *= np.exp(2.5 * poison)
            other[15:30] += 5 * poison
            a = difficulty.apply(difficulty.fit(score, covariate), score, covariate)
            combined = fusion.apply(fusion.fit({"a": a, "b": other}), {"a": a, "b": other})
            flagged = Conformal(seed=trial).decide(combined[:400], combined[400:], ids).flagged
            if poison:
                proportions.append(false_discovery_proportion(flagged, is_poisoned))
                found.append(flagged[is_poisoned].mean())
            else:
                alarms += flagged.any()
    assert np.mean(proportions) <= 0.1 + 2 * np.std(proportions) / math.sqrt(60)
    assert np.mean(found) > (0.6 if rule == "max" else 0.4)  # no two of them see the same
    assert alarms <= 60 * 0.1


def test_settings_of_a_fusion_are_json():
    fusion = Fusion(columns=("dao", "dede_null_ratio"), rule="mean_top2")
    assert Fusion.model_validate(json.loads(fusion.model_dump_json())) == fusion
