"""The numbers agree with those of others, and their intervals hold what they say."""

import json
import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dede_ray.metrics import (
    Interval,
    auroc,
    auroc_difference,
    average_precision,
    detection_metrics,
    false_discovery_proportion,
    proportion,
    roc_curve,
    threshold_at_fpr,
    tpr_at_fpr,
)


@st.composite
def mixtures(draw):
    """Scores with many ties, and at least one sample of each class."""
    size = draw(st.integers(2, 60))
    scores = draw(st.lists(st.sampled_from([-2.5, -1.0, 0.0, 0.1, 0.2, 3.0, 1e6]), min_size=size, max_size=size))
    rest = draw(st.lists(st.booleans(), min_size=size - 2, max_size=size - 2))
    return np.array(scores), np.array([True, False, *rest])


def normal_mixture(rng, num_clean, num_poisoned, shift):
    scores = np.concatenate([rng.normal(size=num_clean), rng.normal(shift, size=num_poisoned)])
    return scores, np.arange(scores.size) >= num_clean


@settings(max_examples=200, deadline=None, derandomize=True)
@given(mixtures())
def test_auroc_and_average_precision_agree_with_sklearn(mixture):
    scores, is_poisoned = mixture
    assert auroc(scores, is_poisoned).value == pytest.approx(
        sklearn.metrics.roc_auc_score(is_poisoned, scores), abs=1e-12
    )
    assert average_precision(scores, is_poisoned) == pytest.approx(
        sklearn.metrics.average_precision_score(is_poisoned, scores), abs=1e-12
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(mixtures())
def test_the_interval_holds_the_estimate_and_turns_with_the_sign_of_the_scores(mixture):
    scores, is_poisoned = mixture
    area, mirrored = auroc(scores, is_poisoned), auroc(-scores, is_poisoned)
    assert 0 <= area.low <= area.value <= area.high <= 1
    assert area.low < area.high
    np.testing.assert_allclose([mirrored.low, mirrored.high], [1 - area.high, 1 - area.low], atol=1e-9)


def test_the_variance_is_that_of_delong_by_its_definition():
    scores, is_poisoned = normal_mixture(np.random.default_rng(0), 40, 15, 1.0)
    scores = scores.round(1)  # ties
    wins = (scores[is_poisoned, None] > scores[None, ~is_poisoned]) + 0.5 * (
        scores[is_poisoned, None] == scores[None, ~is_poisoned]
    )
    error = math.sqrt(wins.mean(axis=1).var(ddof=1) / 15 + wins.mean(axis=0).var(ddof=1) / 40)
    area = auroc(scores, is_poisoned)
    reach = 1.959963984540054 * error / (area.value * (1 - area.value))
    odds = area.value / (1 - area.value)
    assert area.low == pytest.approx(1 - 1 / (1 + odds * math.exp(-reach)))
    assert area.high == pytest.approx(1 - 1 / (1 + odds * math.exp(reach)))


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_95_percent_intervals_cover_the_true_auroc_about_95_percent_of_the_time(shift):
    rng = np.random.default_rng(1)
    truth = stats.norm.cdf(shift / math.sqrt(2))
    areas = [auroc(*normal_mixture(rng, 150, 50, shift)) for _ in range(600)]
    assert 0.92 <= np.mean([area.low <= truth <= area.high for area in areas]) <= 0.98


def test_a_perfect_separation_is_not_certain():
    few = auroc([0.0, 0.1, 0.2, 0.9, 1.0], np.array([False, False, False, True, True]))
    many = auroc(np.arange(2000.0), np.arange(2000) >= 1000)
    assert few.value == few.high == many.value == many.high == 1
    assert few.low < 0.5
    assert 0.99 < many.low < 1
    inverse = auroc(-np.arange(2000.0), np.arange(2000) >= 1000)
    assert (inverse.value, inverse.low) == (0, 0)
    assert inverse.high == pytest.approx(1 - many.low)


def test_one_class_has_no_numbers_and_nan_scores_are_refused():
    scores = np.array([0.1, 0.2])
    assert str(auroc(scores, np.array([True, True]))) == "nan [nan, nan]"
    row = detection_metrics(scores, np.array([False, False]))
    assert (row["auroc"], row["average_precision"], row["tpr_at_fpr_1pct"], row["num_clean"]) == (None, None, None, 2)
    assert roc_curve(scores, np.array([False, False]))[0].size == 0
    for measure in (auroc, average_precision, detection_metrics, roc_curve):
        with pytest.raises(AssertionError, match="NaN"):
            measure([0.1, math.nan], np.array([True, False]))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(mixtures(), st.sampled_from([0.0, 0.01, 0.1, 0.29, 0.5, 1.0]))
def test_tpr_at_fpr_is_the_best_that_any_allowed_threshold_achieves(mixture, fpr):
    scores, is_poisoned = mixture
    clean, poisoned = scores[~is_poisoned], scores[is_poisoned]
    allowed = [t for t in [*scores, np.inf] if (clean >= t).sum() <= fpr * clean.size + 1e-9]
    assert tpr_at_fpr(scores, is_poisoned, fpr) == max((poisoned >= t).mean() for t in allowed)


def test_the_threshold_at_an_fpr_takes_the_share_as_it_is_written():
    clean = np.arange(100.0)
    assert (clean >= threshold_at_fpr(clean, 0.29)).sum() == 29  # 0.29 * 100 is 28.999999999999996
    assert (clean >= threshold_at_fpr(clean, 0.001)).sum() == 0
    assert (np.ones(100) >= threshold_at_fpr(np.ones(100), 0.5)).sum() == 0


def test_a_low_fpr_is_reported_only_where_it_can_be_resolved():
    rng = np.random.default_rng(2)
    assert detection_metrics(*normal_mixture(rng, 999, 50, 3.0))["tpr_at_fpr_0_1pct"] is None
    row = detection_metrics(*normal_mixture(rng, 1000, 50, 3.0))
    assert 0 < row["tpr_at_fpr_0_1pct"] <= row["tpr_at_fpr_1pct"] <= 1
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert list(row) == [
        *("auroc", "auroc_low", "auroc_high", "average_precision", "tpr_at_fpr_1pct", "tpr_at_fpr_0_1pct"),
        *("num_poisoned", "num_clean"),
    ]


def test_an_empty_list_has_no_false_discoveries():
    is_poisoned = np.array([True, False, False, True])
    assert false_discovery_proportion(np.zeros(4, bool), is_poisoned) == 0
    assert false_discovery_proportion(np.array([True, True, True, False]), is_poisoned) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (3, 10), (10, 10), (1, 1), (123, 4567)])
def test_proportions_have_the_interval_of_wilson(successes, total):
    theirs = stats.binomtest(successes, total).proportion_ci(0.9, method="wilson")
    ours = proportion(successes, total, confidence=0.9)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.low <= ours.value <= ours.high
    assert math.isnan(proportion(0, 0).value)


def test_an_interval_reads_well():
    assert str(Interval(0.98123, 0.975, 0.9861)) == "0.981 [0.975, 0.986]"


@pytest.mark.parametrize("shift", [0.0, 2.0, 4.0])
def test_a_thinned_roc_curve_keeps_its_shape_and_its_low_end(shift):
    scores, is_poisoned = normal_mixture(np.random.default_rng(3), 50_000, 5_000, shift)
    fpr, tpr = roc_curve(scores, is_poisoned, max_points=500)
    whole_fpr, whole_tpr, _ = sklearn.metrics.roc_curve(is_poisoned, scores)
    assert fpr.size <= 500
    assert whole_fpr.size > 500
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()
    corners = set(zip(whole_fpr, whole_tpr, strict=True))
    assert all(corner in corners for corner in zip(fpr, tpr, strict=True))
    assert sklearn.metrics.auc(fpr, tpr) == pytest.approx(sklearn.metrics.auc(whole_fpr, whole_tpr), abs=1e-3)
    kept = np.searchsorted(whole_fpr + whole_tpr, fpr + tpr)  # both rise, so their sum tells the corners' places
    assert (np.diff(tpr)[np.diff(kept) > 1] <= 6 / 490).all()  # no step is skipped that the eye would miss
    for low in np.geomspace(2e-5, 1, 100):  # on a logarithmic axis too, the curve turns where it should
        assert whole_fpr[whole_fpr <= low][-1] <= 1.2 * fpr[fpr <= low][-1]
        assert tpr[fpr <= low][-1] == pytest.approx(whole_tpr[whole_fpr <= low][-1], abs=0.013)


def test_a_short_roc_curve_is_kept_whole():
    scores, is_poisoned = normal_mixture(np.random.default_rng(4), 50, 20, 1.0)
    whole_fpr, whole_tpr, _ = sklearn.metrics.roc_curve(is_poisoned, scores)
    fpr, tpr = roc_curve(scores, is_poisoned)
    np.testing.assert_array_equal(fpr, whole_fpr)
    np.testing.assert_array_equal(tpr, whole_tpr)


def test_the_difference_of_two_aurocs_knows_that_they_share_their_images():
    rng = np.random.default_rng(0)
    is_poisoned = np.arange(400) < 80
    shared = rng.normal(size=400) + is_poisoned
    one, other = shared + rng.normal(size=400) / 4, shared + rng.normal(size=400) / 4 - is_poisoned / 2
    difference = auroc_difference(one, other, is_poisoned)
    assert difference.value == pytest.approx(auroc(one, is_poisoned).value - auroc(other, is_poisoned).value)
    alone = auroc(one, is_poisoned)
    assert difference.high - difference.low < alone.high - alone.low
    assert difference.low < difference.value < difference.high
    swapped = auroc_difference(other, one, is_poisoned)
    assert (swapped.low, swapped.high) == pytest.approx((-difference.high, -difference.low))
    assert auroc_difference(one, one, is_poisoned).value == 0


def test_the_difference_covers_what_it_promises():
    """Two equally good scores: 95 % limits hold zero about 95 % of the time."""
    rng = np.random.default_rng(0)
    is_poisoned = np.arange(230) < 30
    covered = 0
    for _ in range(300):
        shared = rng.normal(size=230) + is_poisoned
        limits = auroc_difference(shared + rng.normal(size=230), shared + rng.normal(size=230), is_poisoned)
        covered += limits.low <= 0 <= limits.high
    assert 0.91 < covered / 300 < 0.99
