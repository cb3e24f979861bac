"""Numbers for evaluation: how well scores separate poisoned from clean samples, each with its uncertainty.

Poisoned is the positive class and a higher score means more likely poisoned, everywhere. `scores` is float (N,)
without NaN (samples that have no score are left out, and counted, by the caller), `is_poisoned` is bool (N,).
With one class missing, nothing can be said and the answer is NaN, or None where it goes into JSON.

`detection_metrics` is the row of a results table; the other functions are its cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray
from scipy import special

# 0.29 * 100 is 28.999999999999996 in floating point. Where a share times a count is compared with a count,
# this relative slack keeps the answer that the person who wrote 0.29 expects.
ROUNDING_SLACK = 1e-12


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence limits; all three NaN where nothing was observed."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def detection_metrics(scores: ArrayLike, is_poisoned: ArrayLike) -> dict[str, float | int | None]:
    """Describe one detector on one mixture, ready for JSON.

    Average precision depends on the poison rate, so it is only comparable between rows of equal counts, which
    are given beside it. An FPR of 0.1 % is reported from 1000 clean samples on; fewer cannot resolve it.
    """
    clean, poisoned = _split(scores, is_poisoned)
    area = auroc(scores, is_poisoned)
    numbers = {
        "auroc": area.value,
        "auroc_low": area.low,
        "auroc_high": area.high,
        "average_precision": average_precision(scores, is_poisoned),
        "tpr_at_fpr_1pct": tpr_at_fpr(scores, is_poisoned, 0.01),
        "tpr_at_fpr_0_1pct": tpr_at_fpr(scores, is_poisoned, 0.001) if clean.size >= 1000 else math.nan,
    }
    counts = {"num_poisoned": int(poisoned.size), "num_clean": int(clean.size)}
    return {name: None if math.isnan(number) else number for name, number in numbers.items()} | counts


def auroc(scores: ArrayLike, is_poisoned: ArrayLike, confidence: float = 0.95) -> Interval:
    """Area under the ROC curve: how often a poisoned sample outscores a clean one, ties counting half.

    The variance is DeLong's, from midranks in O(N log N). The limits are set on the logit scale, which keeps them
    inside (0, 1) and serves better near 1, where detectors live: with 20 poisoned and 200 clean normal scores at a
    true AUROC of 0.98, nominal 95 % limits cover 89 % of the time, the symmetric ones 78 %.

    A separation that is perfect, or scores that are all equal, give DeLong a variance of zero, and a class of one
    sample gives none at all. There the interval is Wilson's with the smaller class as the number of trials: it
    inverts the bound var <= AUROC (1 - AUROC) / min(num_poisoned, num_clean), which holds for any two
    distributions, so it is wide rather than wrong.

    Source: DeLong et al., Biometrics 1988; midranks: Sun & Xu, IEEE SPL 2014; logit: Pepe, The Statistical
    Evaluation of Medical Tests, 2003; the bound: Birnbaum & Klose, Ann. Math. Stat. 1957.
    """
    clean, poisoned = _split(scores, is_poisoned)
    if not clean.size or not poisoned.size:
        return Interval(math.nan, math.nan, math.nan)
    rank = scipy.stats.rankdata(np.concatenate([poisoned, clean]))
    # For each poisoned sample, how many clean ones it outscores; for each clean one, how many outscore it.
    num_beaten = rank[: poisoned.size] - scipy.stats.rankdata(poisoned)
    num_above = poisoned.size - (rank[poisoned.size :] - scipy.stats.rankdata(clean))
    value = float(num_beaten.sum() / (poisoned.size * clean.size))
    variance = _variance_of_mean(num_beaten / clean.size) + _variance_of_mean(num_above / poisoned.size)
    if not 0 < value < 1 or not variance > 0:  # the last also catches NaN
        return _wilson(value, min(poisoned.size, clean.size), confidence)
    reach = _normal_quantile(confidence) * math.sqrt(variance) / (value * (1 - value))
    low, high = special.expit(special.logit(value) + np.array([-reach, reach]))
    return Interval(value, float(low), float(high))


def auroc_difference(
    scores: NDArray[np.float64], others: NDArray[np.float64], is_poisoned: NDArray[np.bool_]
) -> Interval:
    """AUROC of one score minus that of another on the same samples, with 95 % limits.

    Scores of the same images rise and fall together, so the limits are narrower than those of the two AUROCs suggest.
    They are NaN where a class has fewer than two samples, or where both scores separate alike and show no variance.

    Source: DeLong et al., Biometrics 1988, for correlated curves.
    """
    num_poisoned, num_clean = int(is_poisoned.sum()), int((~is_poisoned).sum())
    if not num_poisoned or not num_clean:
        return Interval(math.nan, math.nan, math.nan)

    def beaten(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each poisoned sample the share of clean ones below it; for each clean one, of poisoned ones above."""
        rank, poisoned, clean = scipy.stats.rankdata(values), values[is_poisoned], values[~is_poisoned]
        below = (rank[is_poisoned] - scipy.stats.rankdata(poisoned)) / num_clean
        return below, 1 - (rank[~is_poisoned] - scipy.stats.rankdata(clean)) / num_poisoned

    of_poisoned, of_clean = (one - other for one, other in zip(beaten(scores), beaten(others), strict=True))
    value = float(of_poisoned.mean())
    if min(num_poisoned, num_clean) < 2:
        return Interval(value, math.nan, math.nan)
    reach = 1.96 * math.sqrt(of_poisoned.var(ddof=1) / num_poisoned + of_clean.var(ddof=1) / num_clean)
    return Interval(value, value - reach, value + reach) if reach else Interval(value, math.nan, math.nan)


def average_precision(scores: ArrayLike, is_poisoned: ArrayLike) -> float:
    """Precision averaged over the ranks of the poisoned samples; its floor is the poison rate, not one half."""
    clean, poisoned = _split(scores, is_poisoned)
    if not clean.size or not poisoned.size:
        return math.nan
    from sklearn.metrics import average_precision_score  # seconds of import, which scoring actors need not pay

    return float(average_precision_score(np.asarray(is_poisoned), np.asarray(scores)))


def tpr_at_fpr(scores: ArrayLike, is_poisoned: ArrayLike, fpr: float) -> float:
    """Share of the poisoned samples at or above `threshold_at_fpr` of the clean ones.

    Nothing is interpolated: this is the best that one threshold achieves while the FPR on these very samples stays
    at most `fpr`. Clean samples that tie are kept or flagged together, so ties only lower it.
    """
    clean, poisoned = _split(scores, is_poisoned)
    if not clean.size or not poisoned.size:
        return math.nan
    return float((poisoned >= threshold_at_fpr(clean, fpr)).mean())


def threshold_at_fpr(clean_scores: ArrayLike, fpr: float) -> float:
    """Find the smallest float64 threshold with at most `fpr * n` of the n clean scores at or above it.

    It is the next number above the (floor(fpr * n) + 1)-th largest clean score, and above all of them where
    `fpr * n < 1`. At `fpr = 1` it is minus infinity.
    """
    assert 0 <= fpr <= 1, fpr
    clean = _floats(clean_scores)
    assert clean.size, "no clean scores"
    num_allowed = math.floor(fpr * clean.size * (1 + ROUNDING_SLACK))
    if num_allowed >= clean.size:
        return -math.inf
    kth_smallest = clean.size - 1 - num_allowed
    return float(np.nextafter(np.partition(clean, kth_smallest)[kth_smallest], np.inf))


def false_discovery_proportion(flagged: ArrayLike, is_poisoned: ArrayLike) -> float:
    """Share of the flagged samples that are clean; 0 when nothing is flagged."""
    flagged, is_poisoned = np.asarray(flagged, bool), np.asarray(is_poisoned, bool)
    assert flagged.shape == is_poisoned.shape, (flagged.shape, is_poisoned.shape)
    return float((flagged & ~is_poisoned).sum() / max(1, flagged.sum()))


def proportion(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """A share with Wilson's score interval (JASA 1927), which stays sensible at 0 of n and n of n."""
    assert 0 <= successes <= total, (successes, total)
    return _wilson(successes / total, total, confidence) if total else Interval(math.nan, math.nan, math.nan)


def roc_curve(
    scores: ArrayLike, is_poisoned: ArrayLike, max_points: int = 500
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Trace the ROC curve with few enough points to plot, whatever the number of samples.

    The points are corners of the true curve, kept on both sides of evenly spaced FPRs, of log-spaced FPRs (so that
    the low end survives a logarithmic axis) and of evenly spaced TPRs. Lines drawn between them leave the true curve
    by no more than one step of TPR, that is about 6 / max_points.

    Returns:
        FPR and TPR, float64, rising from (0, 0) to (1, 1); both empty with one class missing.
    """
    from sklearn.metrics import roc_curve as exact_curve

    assert max_points >= 8, max_points
    clean, poisoned = _split(scores, is_poisoned)
    if not clean.size or not poisoned.size:
        return np.empty(0), np.empty(0)
    fpr, tpr, _ = exact_curve(np.asarray(is_poisoned), np.asarray(scores), drop_intermediate=True)
    if fpr.size <= max_points:
        return fpr, tpr
    num_steps = (max_points - 2) // 6
    even, log = np.linspace(0, 1, num_steps), np.geomspace(1 / clean.size, 1, num_steps)
    after = np.concatenate([np.searchsorted(fpr, even), np.searchsorted(fpr, log), np.searchsorted(tpr, even)])
    kept = np.unique(np.concatenate([[0, fpr.size - 1], after, after - 1]).clip(0, fpr.size - 1))
    return fpr[kept], tpr[kept]


def _split(scores: ArrayLike, is_poisoned: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores of the clean samples, scores of the poisoned ones."""
    scores, is_poisoned = _floats(scores), np.asarray(is_poisoned)
    assert is_poisoned.dtype == bool or not is_poisoned.size, is_poisoned.dtype
    assert scores.shape == is_poisoned.shape, (scores.shape, is_poisoned.shape)
    is_poisoned = is_poisoned.astype(bool)
    return scores[~is_poisoned], scores[is_poisoned]


def _floats(scores: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(scores, np.float64)
    assert scores.ndim == 1, scores.shape
    assert not np.isnan(scores).any(), f"{np.isnan(scores).sum()} of {scores.size} scores are NaN"
    return scores


def _variance_of_mean(values: NDArray[np.float64]) -> float:
    return float(values.var(ddof=1) / values.size) if values.size > 1 else math.nan


def _wilson(value: float, total: int, confidence: float) -> Interval:
    z = _normal_quantile(confidence)
    centre = (value + z**2 / (2 * total)) / (1 + z**2 / total)
    reach = z / (1 + z**2 / total) * math.sqrt(value * (1 - value) / total + z**2 / (4 * total**2))
    # The limits contain the value; rounding must not push 0 of n, or n of n, out of its own interval.
    return Interval(value, max(0.0, min(value, centre - reach)), min(1.0, max(value, centre + reach)))


def _normal_quantile(confidence: float) -> float:
    assert 0 < confidence < 1, confidence
    return float(special.ndtri((1 + confidence) / 2))
