"""Decisions: from scores to a list of flagged samples whose error rate was declared before.

Every rule answers `decide(scores, calibration, sample_ids)` with a `Verdict`. `scores` is float (N,), higher means
more likely poisoned, NaN where a sample has no score: such samples are never flagged and not counted in N.
`calibration` is float (n,), the scores of clean samples that nothing was fitted on, under the same detector and in
the same precision. No rule ever sees a label.

`Conformal` is the rule that keeps a promise about the list: among what it flags, the expected share of clean samples
is at most q, as long as the clean samples of the corpus look like the calibration samples (exchangeability; domain
shift between the two is what breaks it) and near-duplicates count once. The other rules are simpler and promise less.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from dede_ray.config import Config, Mistake
from dede_ray.metrics import ROUNDING_SLACK, threshold_at_fpr

# Shapes: N samples to judge, n calibration samples.


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a rule made of the scores."""

    p_value: NDArray[np.float64]
    """(N,): how often a clean sample scores as high, by `conformal_p_values`; NaN without a score or without
    calibration, which the last two rules can do without."""
    flagged: NDArray[np.bool_]
    """(N,): True for the samples on the list."""
    threshold: float | None
    """No sample below it is flagged and every sample above it is. None where no threshold exists, for example when
    nothing was flagged. Samples exactly at it may fall on either side under the two rules that break ties,
    `Conformal` and `AssumedPoisonRate`."""
    report: dict[str, Any]
    """The same in numbers and words, ready for JSON: rule, score, declared (the rule's settings), counts, threshold,
    how (it was found), certified (the declared false discovery rate holds for this list), message, and the smallest
    achievable_q (at the expected poison rate, or where everything is poisoned if none is expected) and
    achievable_poison_rate (at the declared q) of this many calibration samples; None where nothing is."""


class Rule(Config):
    """What the rules share: the score they judge."""

    score: str = "dede_null_ratio"
    """Score column to judge."""


class Conformal(Rule):
    """Conformal p-values, then Benjamini-Hochberg: a declared false discovery rate.

    Benjamini-Hochberg can reject only where 1 / (n + 1) <= q R / N for R rejections, so finding a poison rate r needs
    n + 1 >= 1 / (q r) calibration samples. With fewer, nothing is flagged and the verdict says how many it takes.

    Source: Bates et al., Testing for outliers with conformal p-values, Ann. Stat. 2023, arXiv:2104.08279; they show
    that p-values which share a calibration set depend positively, which is what Benjamini-Hochberg needs.
    """

    kind: Literal["conformal"] = "conformal"
    q: float = Field(0.1, gt=0, lt=1)
    """False discovery rate: the expected share of clean samples among the flagged, at most."""
    expected_poison_rate: float | None = Field(None, gt=0, lt=1)
    """Smallest poison rate that must be found; a calibration set too small for it is refused."""
    seed: int = 0
    """Seed of the tie-breaking."""

    def decide(self, scores: ArrayLike, calibration: ArrayLike | None, sample_ids: Sequence[str]) -> Verdict:
        evidence = _weigh(self, scores, calibration, sample_ids, self.seed)
        num_calibration = evidence.require_calibration()
        needed = _num_needed(self.q, self.expected_poison_rate or 1.0)
        least_q = _least_achievable(self.expected_poison_rate or 1.0, num_calibration)
        least_rate = _least_achievable(self.q, num_calibration)
        if num_calibration < needed:
            rate = f" and a poison rate of {self.expected_poison_rate:g}" if self.expected_poison_rate else ""
            larger_q = f", or declare a q of about {least_q:.2g} or more" if least_q and least_q < 1 else ""
            return evidence.verdict(
                np.zeros(evidence.scores.size, bool),
                threshold=None,
                how="none: refused, because no score could reach the declared q with so few calibration samples",
                message=f"cannot certify: need at least {needed:,} calibration samples, have {num_calibration:,} (for "
                f"q = {self.q:g}{rate}); score more clean samples that nothing was fitted on{larger_q}",
                achievable_q=least_q,
                achievable_poison_rate=least_rate,
            )
        cutoff = _benjamini_hochberg_cutoff(evidence.p_value, self.q)
        flagged = evidence.p_value <= cutoff
        if flagged.any():
            how = f"lowest score that Benjamini-Hochberg rejects at q = {self.q:g}: p-values up to {cutoff:.3g}"
            message = (
                f"flagged {flagged.sum():,} of {evidence.num_scored:,} samples; on average at most {self.q:g} of such "
                "a list is clean, if the clean samples of the corpus resemble the calibration samples"
            )
        else:
            how = f"none: Benjamini-Hochberg rejects no p-value at q = {self.q:g}"
            message = (
                f"flagged none of {evidence.num_scored:,} samples; {num_calibration:,} calibration samples can certify "
                f"a poison rate of {least_rate:.2g} or more at q = {self.q:g}, so rarer poison would have gone unseen; "
                "more calibration samples see further"
            )
        return evidence.verdict(
            flagged,
            threshold=float(evidence.scores[flagged].min()) if flagged.any() else None,
            how=how,
            message=message,
            certified=True,
            achievable_q=least_q,
            achievable_poison_rate=least_rate,
        )


class CleanQuantile(Rule):
    """A false positive rate, set on clean samples.

    It bounds the share of the clean samples that is flagged, not the share of the list that is clean: at a poison rate
    below `fpr`, most of the list is clean.
    """

    kind: Literal["clean_quantile"] = "clean_quantile"
    fpr: float = Field(0.01, gt=0, lt=1)
    """Share of the calibration samples at or above the threshold, at most."""

    def decide(self, scores: ArrayLike, calibration: ArrayLike | None, sample_ids: Sequence[str]) -> Verdict:
        evidence = _weigh(self, scores, calibration, sample_ids)
        num_calibration = evidence.require_calibration()
        threshold = threshold_at_fpr(evidence.clean, self.fpr)
        num_above = int((evidence.clean >= threshold).sum())
        # A new clean sample is equally likely to take any rank among the calibration samples.
        chance = (num_above + 1) / (num_calibration + 1)
        return evidence.verdict(
            evidence.scores >= threshold,
            threshold=threshold,
            how=f"smallest threshold with at most {self.fpr:g} of the calibration samples at or above it: "
            f"{num_above:,} of {num_calibration:,} are",
            message=f"flags a further clean sample with probability at most {chance:.2g}; promises nothing about the "
            "share of clean samples in the list",
        )


class FixedThreshold(Rule):
    """A threshold that somebody chose."""

    kind: Literal["fixed"] = "fixed"
    threshold: float = Field(allow_inf_nan=False)
    """Samples with this score or more are flagged."""

    def decide(self, scores: ArrayLike, calibration: ArrayLike | None, sample_ids: Sequence[str]) -> Verdict:
        evidence = _weigh(self, scores, calibration, sample_ids)
        return evidence.verdict(
            evidence.scores >= self.threshold,
            threshold=self.threshold,
            how="given in the settings",
            message="promises nothing about errors: the threshold was given",
        )


class AssumedPoisonRate(Rule):
    """The highest scores, as many as the poison rate that somebody assumes.

    Flags `round(rate * N)` samples even where there is no poison at all. Equal scores go by sample id.
    """

    kind: Literal["assumed_rate"] = "assumed_rate"
    rate: float = Field(gt=0, lt=1)
    """Share of the scored samples to flag."""

    def decide(self, scores: ArrayLike, calibration: ArrayLike | None, sample_ids: Sequence[str]) -> Verdict:
        evidence = _weigh(self, scores, calibration, sample_ids)
        scores, count = evidence.scores, round(self.rate * evidence.num_scored)
        flagged, threshold = np.zeros(scores.size, bool), None
        if count:
            threshold = float(np.partition(-scores, count - 1)[count - 1] * -1)  # NaN sorts last
            flagged = scores > threshold
            at_threshold = sorted(np.flatnonzero(scores == threshold).tolist(), key=lambda i: sample_ids[i])
            flagged[at_threshold[: count - int(flagged.sum())]] = True
        return evidence.verdict(
            flagged,
            threshold=threshold,
            how=f"the {count:,} highest of {evidence.num_scored:,} scores, equal scores by sample id",
            message="promises nothing about errors: the length of the list was given",
        )


Decision = Annotated[Conformal | CleanQuantile | FixedThreshold | AssumedPoisonRate, Field(discriminator="kind")]


def conformal_p_values(
    scores: ArrayLike, calibration: ArrayLike, sample_ids: Sequence[str], seed: int = 0
) -> NDArray[np.float64]:
    """p = (1 + how many of n calibration samples score at least as high) / (n + 1); ties are broken at random.

    A score that equals t calibration scores takes one of the t + 1 places around them, drawn from (seed, sample_id):
    p depends on the sample and the calibration set, not on their order nor on what else is judged.

    Clean p-values are then uniform on the grid k / (n + 1), ties or not. They also stay positively dependent: a higher
    calibration score never lowers any p, whatever was drawn, and that is all the proof for continuous scores uses.

    Args:
        scores: (N,), NaN where a sample has no score.
        calibration: (n,), NaN are ignored.
        sample_ids: N of them.
        seed: of the tie-breaking.

    Returns:
        float64 (N,) in [1 / (n + 1), 1]; NaN where the score is NaN.

    Source: Bates et al., Ann. Stat. 2023, arXiv:2104.08279.
    """
    scores, clean = np.asarray(scores, np.float64), np.asarray(calibration, np.float64)
    clean = np.sort(clean[~np.isnan(clean)])
    above = clean.size - np.searchsorted(clean, scores, side="right")
    num_equal = clean.size - np.searchsorted(clean, scores, side="left") - above
    tied = np.flatnonzero(num_equal)  # few; only they need a draw, and drawing is what costs
    draw = np.array([_uniform(seed, sample_ids[i]) for i in tied.tolist()], np.float64)
    above[tied] += np.floor(draw * (num_equal[tied] + 1)).astype(np.int64)
    return np.where(np.isnan(scores), np.nan, (1 + above) / (clean.size + 1))


def _uniform(seed: int, sample_id: str) -> float:
    """A number in [0, 1), uniform, the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {sample_id}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _benjamini_hochberg_cutoff(p_value: NDArray[np.float64], q: float) -> float:
    """Largest p-value that is rejected at false discovery rate q, or -1; NaN are not hypotheses.

    Source: Benjamini & Hochberg, JRSS B 1995: the largest p_(k) with p_(k) <= q k / N.
    """
    p_value = np.sort(p_value[~np.isnan(p_value)])
    rank = np.arange(1, p_value.size + 1)
    passes = np.flatnonzero(p_value * p_value.size <= q * rank * (1 + ROUNDING_SLACK))
    return float(p_value[passes[-1]]) if passes.size else -1.0


def _num_needed(q: float, poison_rate: float) -> int:
    """Smallest n with 1 / (n + 1) <= q * poison_rate."""
    return math.ceil(1 / (q * poison_rate)) - 1


def _least_achievable(given: float, num_calibration: int) -> float | None:
    """The smallest q at a given poison rate, or poison rate at a given q; None where even 1 is too little."""
    least = 1 / (given * (num_calibration + 1))
    return min(least, 1.0) if least <= 1 + ROUNDING_SLACK else None


@dataclass(frozen=True, eq=False)
class _Evidence:
    """What a rule looks at, checked and cleaned, and the one place where verdicts are written."""

    rule: Rule
    scores: NDArray[np.float64]  # (N,)
    p_value: NDArray[np.float64]  # (N,)
    clean: NDArray[np.float64]  # (n,) without NaN
    num_unscored_calibration: int

    @property
    def num_scored(self) -> int:
        return int((~np.isnan(self.scores)).sum())

    def require_calibration(self) -> int:
        """Number of calibration samples, if there are any."""
        if not self.clean.size:
            found = (
                f"{self.num_unscored_calibration:,}, all without a score" if self.num_unscored_calibration else "none"
            )
            raise Mistake(
                f"this decision needs {self.rule.score} scores of calibration samples, found {found}; score a set of "
                "clean samples that nothing was fitted on and name it as calibration, or choose a decision that needs "
                "none: kind fixed (a threshold) or assumed_rate (a poison rate)"
            )
        return self.clean.size

    def verdict(
        self,
        flagged: NDArray[np.bool_],
        threshold: float | None,
        how: str,
        message: str,
        certified: bool = False,
        achievable_q: float | None = None,
        achievable_poison_rate: float | None = None,
    ) -> Verdict:
        settings = self.rule.model_dump(mode="json")
        report = {
            "rule": settings.pop("kind"),
            "score": settings.pop("score"),
            "declared": settings,
            "num_calibration": self.clean.size,
            "num_calibration_unscored": self.num_unscored_calibration,
            "num_scored": self.num_scored,
            "num_unscored": self.scores.size - self.num_scored,
            "num_flagged": int(flagged.sum()),
            "threshold": threshold,
            "how": how,
            "achievable_q": achievable_q,
            "achievable_poison_rate": achievable_poison_rate,
            "certified": certified,
            "message": message,
        }
        return Verdict(self.p_value, flagged, threshold, report)


def _weigh(
    rule: Rule, scores: ArrayLike, calibration: ArrayLike | None, sample_ids: Sequence[str], seed: int = 0
) -> _Evidence:
    scores = np.asarray(scores, np.float64)
    given = np.empty(0) if calibration is None else np.asarray(calibration, np.float64)
    assert scores.ndim == given.ndim == 1, (scores.shape, given.shape)
    assert len(sample_ids) == scores.size, (len(sample_ids), scores.size)
    assert not np.isinf(scores).any(), "a detector gives finite scores, or NaN where it has none"
    assert not np.isinf(given).any(), "a detector gives finite scores, or NaN where it has none"
    clean = given[~np.isnan(given)]
    p_value = conformal_p_values(scores, clean, sample_ids, seed) if clean.size else np.full(scores.size, np.nan)
    return _Evidence(rule, scores, p_value, clean, given.size - clean.size)
