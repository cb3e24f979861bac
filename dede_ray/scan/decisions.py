"""Decisions: from scores to a list of flagged samples whose error rate was declared before.

Every rule answers `decide(scores, calibration, sample_ids)` with a `Verdict`. `scores` is float (N,), higher means
more likely poisoned, NaN where a sample has no score: such samples are never flagged and not counted in N.
`calibration` is float (n,), the scores of clean samples that nothing was fitted on, under the same detector and in
the same precision. No rule ever sees a label; a rule that still knows what only labels could show, such as how much
of the pool is poisoned, says `oracle` in its report.

`Conformal` is the rule that keeps a promise about the list: among what it flags, the expected share of clean samples
is at most q, as long as the clean samples of the corpus look like the calibration samples (exchangeability; domain
shift between the two is what breaks it, see shift.py) and copies count once (`About.groups`). Beside the list, a
verdict ranks all samples and says of each prefix of the ranking how many poisoned samples it holds at least, for
readers who choose their own threshold afterwards. The other rules are simpler and promise less; `CleanMean` and
`PoolMedian` are the two thresholds of DeDe's publication, to compare with its tables.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy import special

from dede_ray.metrics import ROUNDING_SLACK, threshold_at_fpr
from dede_ray.runtime.config import Config, Mistake
from dede_ray.scan.fusion import Fusion

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.10 lacks it

# Shapes: N samples to judge, n calibration samples, M distinct samples among the N: those with a score, copies once.

CONFIDENCE = 0.9
"""Probability that all lower bounds on the number of poisoned samples hold at once."""
NO_BINS = (
    "averaging e-values over several divisions of the calibration samples takes neither bins nor Storey; set "
    "mondrian_bins to 1 and storey to false, or judging.classifier.splits to 1"
)
NUM_URNS = 10_000
"""Draws of a simulation that bounds come from."""
LEAST_BULK = 50
"""Samples from which an empirical null can be learnt."""


class About(TypedDict, total=False):
    """What a caller may know of the samples beside their scores. Only `Conformal` uses it; the simpler rules judge
    every sample by itself."""

    groups: Sequence[str | None] | None
    """N names, equal for copies of one sample and None for others. Copies must be equal in all that the score looks at
    (`groups.copies`): whoever makes a poisoned sample a "copy" of a clean one hides it."""
    calibration_groups: Sequence[str | None] | None
    """n names, likewise; of each group only the first is used."""
    strata: ArrayLike | None
    """int (N,): the number of the bin that each sample is compared in, see `Conformal.strata`."""
    calibration_strata: ArrayLike | None
    """int (n,), likewise; -1 for those that are not used."""
    redraws: Sequence[Redraw]
    """The same samples as other divisions of the calibration samples score them: then `Conformal` decides by the
    average of all divisions' e-values, and p-values and ranks are the first one's."""
    beneath: NDArray[np.bool_]
    """bool (N,): what is no candidate of a column that tells candidates apart; for `EmpiricalNull`."""


Redraw = tuple[ArrayLike, ArrayLike, Sequence[str | None] | None]
"""Scores (N,), calibration scores (n,), and the names of copies among the latter (`About.calibration_groups`)."""


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a rule made of the scores."""

    p_value: NDArray[np.float64]
    """(N,): how often a clean sample scores as high, by `conformal_p_values`; NaN without a score or without
    calibration, which the rules that set no threshold by it can do without."""
    flagged: NDArray[np.bool_]
    """(N,): True for the samples on the list."""
    threshold: float | None
    """No sample below it is flagged and every sample above it is; copies follow their group's representative. None
    where no threshold exists, for example when nothing was flagged, or where bins have their own. Samples exactly at it
    may fall on either side under the two rules that break ties, `Conformal` and `AssumedPoisonRate`."""
    rank: NDArray[np.int64]
    """(N,): place in the ranking by p-value, then score, then id, from 1; copies share theirs; 0 without a score. The
    scores alone rank where there is no calibration."""
    poisoned_at_least: NDArray[np.int64]
    """(N,): of the distinct samples up to this rank, at least so many are poisoned (`true_discoveries`); 0 without
    p-value. With probability `CONFIDENCE` this is true of all ranks at once, so of any that is chosen afterwards."""
    report: dict[str, Any]
    """The same in numbers and words, ready for JSON: rule, score, declared (the rule's settings), counts, threshold,
    how (it was found), certified (the declared false discovery rate holds for this list), mode (what kind of list it
    is: certified or ranked; `calibration.py` knows two more), oracle (the rule knows what only labels show), message,
    and the smallest achievable_q (at the expected poison rate, or where everything is poisoned if none is expected) and
    achievable_poison_rate (at the declared q and false_alarm) of this many calibration samples; None where nothing is.
    `num_distinct` counts M, and `num_calibration_unused` the calibration samples left out as copies or as borders of
    bins; `alarm` is the p-value of there being no poison at all, `null_share` Storey's estimate of the share of clean
    samples, `bins` the strata and calibration samples of each bin, `poisoned_at_least` the bound for the flagged."""
    local_fdr: NDArray[np.float64] | None = None
    """(N,): estimated probability that a sample with this score is clean, by `EmpiricalNull` alone."""

    def refused(self, message: str, how: str = "none: refused") -> Verdict:
        """The same without a list and without any bound, because what they rest on does not hold; `message` says why.

        P-values and ranks stay: they are the order of the scores, and no claim.
        """
        nothing = dict.fromkeys(("threshold", "poisoned_at_least", "alarm", "null_share"))
        report = {**self.report, **nothing, "num_flagged": 0, "certified": False, "mode": "ranked"}
        report |= {"how": how, "message": message}
        return replace(
            self,
            flagged=np.zeros_like(self.flagged),
            threshold=None,
            poisoned_at_least=np.zeros_like(self.poisoned_at_least),
            report=report,
        )


class Rule(Config):
    """What the rules share: the score they judge."""

    needs_calibration: ClassVar[bool] = True
    """Whether it compares with clean samples."""
    is_oracle: ClassVar[bool] = False
    """Whether it knows what only labels could show; its lists are no evidence that a detector works."""
    score: str = "dede_reverse"
    """Score column to judge."""


class Conformal(Rule):
    """Conformal p-values, then Benjamini-Hochberg: a declared false discovery rate.

    Benjamini-Hochberg can reject only where 1 / (n + 1) <= q R / N for R rejections, so finding a poison rate r needs
    n + 1 >= 1 / (q r) calibration samples. With fewer, nothing is flagged and the verdict says how many it takes.

    Source: Bates et al., Testing for outliers with conformal p-values, Ann. Stat. 2023, arXiv:2104.08279; they show
    that p-values which share a calibration set depend positively, which is what Benjamini-Hochberg needs.

    Example:
        >>> import dede_ray, numpy
        >>> draw = numpy.random.default_rng(0)
        >>> calibration, scores = draw.normal(size=2000), draw.normal(size=500)
        >>> scores[:50] += 9  # the poisoned ones
        >>> verdict = dede_ray.Conformal(q=0.1).decide(scores, calibration, [str(i) for i in range(500)])
        >>> int(verdict.flagged[:50].sum()), bool(verdict.flagged[50:].mean() < 0.05)
        (50, True)
    """

    kind: Literal["conformal"] = "conformal"
    q: float = Field(0.1, gt=0, lt=1)
    """False discovery rate: the expected share of clean samples among the flagged, at most."""
    false_alarm: float | None = Field(0.05, gt=0, lt=1)
    """Chance that a corpus without poison gets a list at all, at most (`rank_gate`). Without it that chance is q."""
    expected_poison_rate: float | None = Field(None, gt=0, lt=1)
    """Smallest poison rate that must be found; a calibration set too small for it is refused."""
    storey: bool = False
    """Estimate the share of clean samples and use q to the full; matters where much is poisoned."""
    storey_lambda: float = Field(0.5, gt=0, lt=1)
    """P-values above it are taken to be of clean samples."""
    mondrian_bins: int = Field(1, ge=1, le=20)
    """Bins of difficulty within which samples are compared with calibration samples, so that the odd but clean ones
    of a difficult bin are not held against it. Each bin needs as many calibration samples as one would alone."""
    seed: int = 0
    """Seed of the tie-breaking, and of which copy represents its group."""

    def decide(
        self, scores: ArrayLike, calibration: ArrayLike | None, sample_ids: Sequence[str], **about: Unpack[About]
    ) -> Verdict:
        redraws = about.get("redraws") or ()
        q = self.q / 2 if redraws else self.q  # of one division
        needed = _num_needed(q, self.expected_poison_rate or 1.0)
        if self.mondrian_bins > 1 and (about.get("strata") is None or about.get("calibration_strata") is None):
            raise Mistake(
                f"mondrian_bins is {self.mondrian_bins}, and there is no difficulty to make bins of; give this "
                "decision the strata of samples and calibration samples, or set mondrian_bins to 1"
            )
        if self.mondrian_bins == 1:
            about = {**about, "strata": None}
        evidence = _weigh(self, scores, calibration, sample_ids, about, self.seed, needed)
        evidence.require_calibration()
        num_calibration = min(num for _, num in evidence.bins)
        least_q = _least_achievable(self.expected_poison_rate or 1.0, num_calibration)
        least_rate = _least_achievable(q, num_calibration)
        distinct_p = evidence.p_value[evidence.is_distinct]
        if least_rate and self.false_alarm is not None and distinct_p.size:
            least_rate = min(1.0, max(least_rate, int(_tops(distinct_p.size, num_calibration)[0]) / distinct_p.size))
        null_share = _storey(distinct_p, self.storey_lambda) if self.storey else None
        facts: dict[str, float | None] = {
            "alarm": evidence.alarm(),
            "null_share": null_share,
            "achievable_q": least_q,
            "achievable_poison_rate": least_rate,
        }
        nothing = np.zeros(evidence.scores.size, bool)
        declared = f"q = {self.q:g}"
        if num_calibration < needed:
            rate = f" and a poison rate of {self.expected_poison_rate:g}" if self.expected_poison_rate else ""
            larger_q = f", or declare a q of about {least_q:.2g} or more" if least_q and least_q < 1 else ""
            return evidence.verdict(nothing, threshold=None, how="", message="", facts=facts).refused(
                f"cannot certify: need at least {needed:,} calibration samples, have {num_calibration:,} (for "
                f"{declared}{rate}); score more clean samples that nothing was fitted on{larger_q}",
                how="none: refused, because no score could reach the declared q with so few calibration samples",
            )
        sizes = [num for _, num in evidence.bins]
        within = f", within {len(sizes)} bins of {min(sizes):,} to {max(sizes):,} calibration samples"
        if len(sizes) < self.mondrian_bins:
            within += (
                f" (not the {self.mondrian_bins} declared: they were merged until each had the {needed:,} it takes)"
            )
        within = within if self.mondrian_bins > 1 else ""
        cutoff = _benjamini_hochberg_cutoff(distinct_p, self.q / (null_share or 1.0))
        flagged, by = evidence.p_value <= cutoff, f"p-values up to {cutoff:.3g}"
        if redraws:
            flagged = self._agreed(evidence, redraws, sample_ids, about)
            by = f"e-values averaged over {1 + len(redraws)} divisions of the calibration samples"
        alarm = facts["alarm"]
        if flagged.any() and self.false_alarm is not None and alarm is not None and alarm > self.false_alarm:
            num_withheld, flagged = int(flagged.sum()), nothing
            how = (
                f"none: the list is withheld, because the rank gate does not reject at false_alarm = "
                f"{self.false_alarm:g}{within}"
            )
            message = (
                f"flagged none of {evidence.num_scored:,} samples: {num_withheld:,} would be on a list at "
                f"q = {self.q:g}, but a corpus without any poison looks like this with probability "
                f"{alarm:.2g}, and at most {self.false_alarm:g} is allowed (false_alarm)"
            )
        elif flagged.any():
            copies = ", copies counted once" if distinct_p.size < evidence.num_scored else ""
            how = f"lowest score that Benjamini-Hochberg rejects at q = {self.q:g}: {by}{within}"
            message = (
                f"flagged {flagged.sum():,} of {evidence.num_scored:,} samples; on average at most {self.q:g} of such "
                f"a list is clean{copies}, if the clean samples of the corpus resemble the calibration samples"
            )
        else:
            how = f"none: Benjamini-Hochberg rejects no p-value at q = {self.q:g}{within}"
            message = (
                f"flagged none of {evidence.num_scored:,} samples; {num_calibration:,} calibration samples can certify "
                f"a poison rate of {least_rate:.2g} or more at {declared}, so rarer poison would have gone unseen; "
                "more calibration samples see further"
            )
        judged = flagged & evidence.is_distinct
        return evidence.verdict(
            flagged,
            threshold=float(evidence.scores[judged].min())
            if judged.any() and len(evidence.bins) == 1 and not redraws
            else None,
            how=how,
            message=message,
            certified=True,
            facts=facts,
        )

    def _agreed(
        self, evidence: _Evidence, redraws: Sequence[Redraw], sample_ids: Sequence[str], about: About
    ) -> NDArray[np.bool_]:
        """Flag by the average of the e-values of several divisions of the calibration samples, bool (N,).

        Each is made at q / 2: at q itself a sample would have to be found in every division.
        """
        if len(evidence.bins) > 1 or self.storey:
            raise Mistake(NO_BINS)
        distinct = evidence.is_distinct
        total_M = e_values(evidence.p_value[distinct], evidence.clean.size, self.q / 2)
        for scores, calibration, groups in redraws:
            other = _weigh(self, scores, calibration, sample_ids, {**about, "calibration_groups": groups}, self.seed)
            total_M += e_values(other.p_value[distinct], other.clean.size, self.q / 2)
        flagged = np.zeros(evidence.scores.size, bool)
        flagged[distinct] = e_benjamini_hochberg(total_M / (1 + len(redraws)), self.q)
        return flagged[evidence.representative] & ~np.isnan(evidence.scores)

    def strata(
        self, difficulty: ArrayLike, calibration_difficulty: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Number the `mondrian_bins` bins of samples and calibration samples, the least difficult first.

        Borders are calibration samples at even quantiles. Given the borders, those in between are a fair sample of
        their bin, but the borders themselves are not, so they get -1 and take no part.

        Args:
            difficulty: (N,), any number that is not the score; without ties, if the above is to be exact.
            calibration_difficulty: (n,).

        Returns:
            int64 (N,) and (n,), for `decide`, which merges bins of too few calibration samples with their neighbours.

        Source: Vovk et al., Mondrian confidence machine, 2003.
        """
        clean = np.asarray(calibration_difficulty, np.float64)
        place = np.arange(1, self.mondrian_bins) * clean.size // self.mondrian_bins
        borders = np.argsort(clean, kind="stable")[place] if clean.size else np.empty(0, np.int64)
        edges = clean[borders]
        calibration_strata = np.searchsorted(edges, clean, side="right")
        calibration_strata[borders] = -1
        return np.searchsorted(edges, np.asarray(difficulty, np.float64), side="right"), calibration_strata


class CleanQuantile(Rule):
    """A false positive rate, set on clean samples.

    It bounds the share of the clean samples that is flagged, not the share of the list that is clean: at a poison rate
    below `fpr`, most of the list is clean.
    """

    kind: Literal["clean_quantile"] = "clean_quantile"
    fpr: float = Field(0.01, gt=0, lt=1)
    """Share of the calibration samples at or above the threshold, at most."""

    def decide(
        self, scores: ArrayLike, calibration: ArrayLike | None, sample_ids: Sequence[str], **about: Unpack[About]
    ) -> Verdict:
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
    """A threshold that was chosen beforehand."""

    kind: Literal["fixed"] = "fixed"
    needs_calibration: ClassVar[bool] = False
    threshold: float = Field(allow_inf_nan=False)
    """Samples with this score or more are flagged."""

    def decide(
        self, scores: ArrayLike, calibration: ArrayLike | None, sample_ids: Sequence[str], **about: Unpack[About]
    ) -> Verdict:
        evidence = _weigh(self, scores, calibration, sample_ids)
        return evidence.verdict(
            evidence.scores >= self.threshold,
            threshold=self.threshold,
            how="given in the settings",
            message="promises nothing about errors: the threshold was given",
        )


class AssumedPoisonRate(Rule):
    """The highest scores, as many as an assumed poison rate gives.

    Flags `round(rate * N)` samples even where there is no poison at all. Equal scores go by sample id.
    """

    kind: Literal["assumed_rate"] = "assumed_rate"
    needs_calibration: ClassVar[bool] = False
    rate: float = Field(gt=0, lt=1)
    """Share of the scored samples to flag."""

    def decide(
        self, scores: ArrayLike, calibration: ArrayLike | None, sample_ids: Sequence[str], **about: Unpack[About]
    ) -> Verdict:
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


class CleanMean(Rule):
    """The threshold of DeDe's text: the decoder's average error on what it was trained on.

    Taken literally the rule compares unlike things: training hides fewer patches than scoring and divides by their
    share, a score may be a sum. Here it is the mean *score* of the calibration samples: held-out, under the masks that
    scores are made with. Errors lean to the right, so somewhat less than half of all clean samples are flagged.

    Source: Hou et al., DeDe, CVPR 2025, arXiv:2411.16154.
    """

    kind: Literal["paper_mean"] = "paper_mean"
    score: str = "dede_mean"
    """Score column to judge; the publication's is the reconstruction error."""

    def decide(
        self, scores: ArrayLike, calibration: ArrayLike | None, sample_ids: Sequence[str], **about: Unpack[About]
    ) -> Verdict:
        evidence = _weigh(self, scores, calibration, sample_ids)
        num_calibration = evidence.require_calibration()
        threshold = math.fsum(evidence.clean.tolist()) / num_calibration  # in any order
        num_above = int((evidence.clean >= threshold).sum())
        return evidence.verdict(
            evidence.scores >= threshold,
            threshold=threshold,
            how=f"mean of {num_calibration:,} calibration scores, {num_above:,} of which are at or above it",
            message=f"flags about {num_above / num_calibration:.0%} of the clean samples; promises nothing about the "
            "share of clean samples in the list",
        )


class PoolMedian(Rule):
    """The threshold of DeDe's published evaluation: the median of the scores that it judges.

    It always flags half. There the pool was as many triggered as clean test images, so that half was the right answer,
    known beforehand: the rates of true and false positives in the publication's tables add up to one. Marked `oracle`,
    and for comparing with those tables only.

    Source: Hou et al., DeDe, CVPR 2025, arXiv:2411.16154, their published code.
    """

    kind: Literal["compat_median"] = "compat_median"
    needs_calibration: ClassVar[bool] = False
    is_oracle: ClassVar[bool] = True
    score: str = "dede_mean"
    """Score column to judge; the publication's is the reconstruction error."""

    def decide(
        self, scores: ArrayLike, calibration: ArrayLike | None, sample_ids: Sequence[str], **about: Unpack[About]
    ) -> Verdict:
        evidence = _weigh(self, scores, calibration, sample_ids)
        threshold = float(np.nanmedian(evidence.scores)) if evidence.num_scored else None
        return evidence.verdict(
            np.zeros(evidence.scores.size, bool) if threshold is None else evidence.scores >= threshold,
            threshold=threshold,
            how=f"median of the {evidence.num_scored:,} scores that are judged",
            message="an oracle: it flags half of any pool, which is right only where half of it is known to be "
            "poisoned; promises nothing about errors",
        )


class EmpiricalNull(Rule):
    """A list without calibration samples: the bulk of the corpus says how clean samples score. An estimate, no promise.

    Of most columns, the share above a score falls beyond the highest 5 % as it did from 25 to 5 % (`Fusion`'s tail).
    Where a column tells candidates apart (company, the second stage), much of it may be poison: the clean ones are the
    lower of two normal groups if there are two, or else one group that is normal in its middle (Efron's central
    matching, by quantiles).
    P-values come from that null, the list from Benjamini-Hochberg, and the local false discovery rate is the null's
    density over that of all, as the p-values' falling density estimates it (Grenander). All of it hangs on the shape
    of the tail, which nothing here can check: look at a random sample of the list.

    Source: Efron, Large-scale simultaneous hypothesis testing, JASA 2004; Strimmer, fdrtool, Bioinformatics 2008.
    """

    kind: Literal["empirical_null"] = "empirical_null"
    needs_calibration: ClassVar[bool] = False
    q: float = Field(0.1, gt=0, lt=1)
    """Estimated share of clean samples on the list, at most."""

    def decide(
        self, scores: ArrayLike, calibration: ArrayLike | None, sample_ids: Sequence[str], **about: Unpack[About]
    ) -> Verdict:
        evidence = _weigh(self, scores, None, sample_ids, about)
        beneath = about.get("beneath")
        is_judged = evidence.is_distinct if beneath is None else evidence.is_distinct & ~beneath
        p_value = np.full(evidence.scores.size, np.nan)
        p_value[is_judged] = null_p_values(evidence.scores[is_judged], beneath is not None)
        cutoff = _benjamini_hochberg_cutoff(p_value, self.q)
        local_fdr = np.where(np.isnan(evidence.scores), np.nan, 1.0)
        local_fdr[is_judged] = local_false_discovery_rate(p_value[is_judged])
        flagged = (p_value <= cutoff)[evidence.representative] & ~np.isnan(evidence.scores)
        judged = flagged & evidence.is_distinct
        verdict = evidence.verdict(
            flagged,
            threshold=float(evidence.scores[judged].min()) if judged.any() else None,
            how=f"empirical null of {int(is_judged.sum()):,} samples, Benjamini-Hochberg at q = {self.q:g}",
            message=f"flagged {flagged.sum():,} of {evidence.num_scored:,} samples, of which about {self.q:g} may be "
            "clean by an estimate from the bulk of the corpus; promises nothing about errors",
        )
        return replace(verdict, local_fdr=local_fdr[evidence.representative])


Decision = Annotated[
    Conformal | CleanQuantile | FixedThreshold | AssumedPoisonRate | CleanMean | PoolMedian | EmpiricalNull,
    Field(discriminator="kind"),
]


def lacks_calibration(score: str, found: str = "none") -> Mistake:
    """The mistake of a rule that compares with clean samples and has none."""
    return Mistake(
        f"this decision needs {score} scores of calibration samples, found {found}; score a set of clean samples that "
        "nothing was fitted on and name it as calibration, or have some drawn from the corpus, calibration: "
        "{from_corpus: 5000}, and look at them; or choose a decision that needs none: kind fixed (a threshold) or "
        "assumed_rate (a poison rate)"
    )


def conformal_p_values(
    scores: ArrayLike, calibration: ArrayLike, sample_ids: Sequence[str], seed: int = 0
) -> NDArray[np.float64]:
    """p = (1 + how many of n calibration samples score at least as high) / (n + 1); ties are broken at random.

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
    clean = clean[~np.isnan(clean)]
    above = num_above(scores, clean, sample_ids, seed)
    return np.where(np.isnan(scores), np.nan, (1 + above) / (clean.size + 1))


def num_above(
    scores: NDArray[np.float64], clean: NDArray[np.float64], sample_ids: Sequence[str], seed: int
) -> NDArray[np.int64]:
    """How many of n calibration samples rank above each of N samples, int64 (N,) in [0, n].

    Of equal scores those with the larger draw rank above. A sample's draw comes from its id, those of t equal
    calibration scores from the score and 1 to t: so the count depends on the sample and the calibration set, not on
    their order nor on what else is judged, and all clean samples, corpus and calibration alike, stay exchangeable. A
    higher calibration score never lowers a count, whatever was drawn, which is the positive dependence that
    Benjamini-Hochberg needs.
    """
    clean = np.sort(clean)
    above = clean.size - np.searchsorted(clean, scores, side="right")
    num_equal = clean.size - np.searchsorted(clean, scores, side="left") - above
    tied = np.flatnonzero(num_equal)  # few; only they need a draw, and drawing is what costs
    draw = np.array([_uniform(seed, sample_ids[i]) for i in tied.tolist()], np.float64)
    value, which = np.unique(scores[tied], return_inverse=True)
    for v, score in enumerate(value.tolist()):
        here = np.flatnonzero(which == v)
        names = [f"calibration {score!r} {k}" for k in range(num_equal[tied[here[0]]])]
        others = np.sort(np.array([_uniform(seed, name) for name in names]))
        above[tied[here]] += others.size - np.searchsorted(others, draw[here])
    return above


def rank_gate(above: ArrayLike, num_calibration: int) -> float | None:
    """P-value of there being no poison at all: do corpus samples crowd the top of the pool of corpus and calibration?

    Without poison the M corpus and n calibration samples are exchangeable, so how many of the K highest are corpus
    samples is hypergeometric. Six tops are tested, each twice as large as the last: K = 8, 16 ... 256 where M is about
    n. The smallest of their p-values counts six times (Bonferroni).

    Where Simes' test needs 20 M / n samples above all calibration samples to reject at 5 %, eight are enough here.

    Args:
        above: (M,), of each distinct sample, the number of calibration samples above it.
        num_calibration: n.
    """
    from scipy.stats import hypergeom  # slow to import

    above = np.sort(np.asarray(above, np.int64))
    num = above.size
    if not num or not num_calibration:
        return None
    tops = _tops(num, num_calibration)
    place = np.searchsorted(above, np.arange(num_calibration), side="right") + np.arange(1, num_calibration + 1)
    num_corpus = tops - np.searchsorted(place, tops, side="right")
    p_value = hypergeom.sf(num_corpus - 1, num + num_calibration, num, tops)
    return float(min(1.0, tops.size * p_value.min()))


def _tops(num: int, num_calibration: int) -> NDArray[np.int64]:
    """The K of `rank_gate`: the first has clean corpus samples alone with a probability of about e^-5."""
    first = math.ceil(5 / math.log1p(num_calibration / num))
    tops = first * 2 ** np.arange(6)
    return np.unique(np.minimum(tops, num + num_calibration))


def true_discoveries(above: ArrayLike, num_calibration: int, confidence: float = CONFIDENCE) -> NDArray[np.int64]:
    """Lower bounds on the number of poisoned samples among the 1, 2, ..., M highest, all valid at once.

    Among M clean samples, at most u_j rank before the j-th calibration sample, for all j at once, with the declared
    probability (`_rank_envelope`). So of the corpus samples that rank before it, all but u_j are poisoned; and what a
    prefix holds at least, a longer one holds, too, and one shorter by d holds all but d of it.

    Args:
        above: (M,), of each distinct sample, the number of calibration samples above it, in any order.
        num_calibration: n.
        confidence: probability that all bounds hold.

    Returns:
        int64 (M,), rising; the k-th is for the k highest.
    """
    above = np.sort(np.asarray(above, np.int64))
    bound = np.zeros(above.size, np.int64)
    if above.size and num_calibration:
        ranks, most_clean = _rank_envelope(above.size, num_calibration, confidence)
        standing = np.searchsorted(above, ranks)  # corpus samples before the j-th calibration sample
        some = standing > 0
        np.maximum.at(bound, standing[some] - 1, standing[some] - most_clean[some])
        place = np.arange(above.size)
        bound = np.maximum.accumulate(bound)
        bound = np.maximum(bound, np.maximum.accumulate((bound - place)[::-1])[::-1] + place)
    return np.maximum(bound, 0)


@functools.lru_cache(maxsize=64)
def _rank_envelope(num: int, num_calibration: int, confidence: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Some j in 1 ... n, and u_j: how many of M clean samples rank before the j-th of n clean ones, at most.

    The count is a Polya urn's. Its quantiles, all at one level, and the level at which all of them hold at once with
    the declared probability, come from two independent simulations.
    """
    ranks = np.unique(np.minimum(2 ** np.arange(num_calibration.bit_length() + 1), num_calibration))
    draw = np.random.default_rng(0)
    sorted_BJ, tried_BJ = (_polya_urn(draw, num, num_calibration, ranks) for _ in range(2))
    sorted_BJ.sort(axis=0)
    # Of the first simulation's draws, how many are as high: the rarest of each draw of the second one.
    as_high_BJ = [NUM_URNS - np.searchsorted(sorted_BJ[:, j], tried_BJ[:, j]) for j in range(ranks.size)]
    rarest_B = np.sort(np.min(as_high_BJ, axis=0))
    allowed = 1 - confidence
    num_beyond = math.floor(NUM_URNS * allowed - 2 * math.sqrt(NUM_URNS * allowed * (1 - allowed)))
    level = int(rarest_B[max(0, num_beyond)]) - 1  # so many draws, at most, are beyond some quantile of this level
    return ranks, sorted_BJ[NUM_URNS - 1 - max(0, level)]


def _polya_urn(
    draw: np.random.Generator, num: int, num_calibration: int, ranks: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many of `num` uniform numbers lie below the j-th smallest of n others, for some j, int64 (NUM_URNS, J)."""
    steps = np.diff(np.append(np.insert(ranks, 0, 0), num_calibration + 1))
    part_BJ = draw.gamma(steps, size=(NUM_URNS, steps.size))
    left_BJ = np.cumsum(part_BJ[:, ::-1], axis=1)[:, ::-1]
    count_BJ = np.zeros((NUM_URNS, ranks.size), np.int64)
    before_B = np.zeros(NUM_URNS, np.int64)
    for j in range(ranks.size):
        before_B = before_B + draw.binomial(num - before_B, part_BJ[:, j] / left_BJ[:, j])
        count_BJ[:, j] = before_B
    return count_BJ


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


def e_values(p_value: ArrayLike, num_calibration: int, q: float) -> NDArray[np.float64]:
    """Evidence against each of M samples being clean, in expectation at most 1 on average over clean ones.

    (n + 1) 1{s >= T} / (1 + how many calibration samples are >= T), with T as low as Benjamini-Hochberg allows at q:
    R samples and floor(q R (n + 1) / M) - 1 calibration samples score T or more.

    Args:
        p_value: (M,), conformal, of distinct samples.
        num_calibration: n.

    Source: Bashari, Epstein, Romano & Sesia, NeurIPS 2023, arXiv:2302.07294.
    """
    p_value = np.asarray(p_value, np.float64)
    is_above = p_value <= _benjamini_hochberg_cutoff(p_value, q)
    allowed = math.floor(q * is_above.sum() * (num_calibration + 1) / max(1, p_value.size) * (1 + ROUNDING_SLACK))
    return is_above * (num_calibration + 1) / max(1, min(num_calibration + 1, allowed))


def e_benjamini_hochberg(e_value: ArrayLike, q: float) -> NDArray[np.bool_]:
    """The k highest e-values, for the largest k whose k-th is at least M / (q k): a false discovery rate of q, however
    they depend on each other. bool (M,).

    Source: Wang & Ramdas, JRSS B 2022, arXiv:2009.02824.
    """
    e_value = np.asarray(e_value, np.float64)
    falling = -np.sort(-e_value)
    enough = np.flatnonzero(q * falling * np.arange(1, falling.size + 1) * (1 + ROUNDING_SLACK) >= falling.size)
    return e_value >= falling[enough[-1]] if enough.size else np.zeros(e_value.size, bool)


def null_p_values(score: ArrayLike, are_candidates: bool) -> NDArray[np.float64]:
    """How often a clean sample would score as high, if the bulk is clean; see `EmpiricalNull`. (M,), 1 for all where
    the bulk has one score."""
    score = np.asarray(score, np.float64)
    if score.size < LEAST_BULK or not np.ptp(np.quantile(score, [0.1, 0.6])):
        return np.ones(score.size)
    if not are_candidates:
        tail = Fusion(columns=("score",))
        return special.ndtr(-tail.normal_score(tail.fit({"score": score}), "score", score))
    from sklearn.mixture import GaussianMixture  # slow to import

    column, starts = score[:, None], np.quantile(score, [0.25, 0.95])[:, None]
    one, two = GaussianMixture(1).fit(column), GaussianMixture(2, means_init=starts, random_state=0).fit(column)
    centres, spreads = two.means_[:, 0], np.sqrt(two.covariances_[:, 0, 0])
    are_apart = np.ptp(centres) > 3 * np.sqrt(np.square(spreads).mean())  # Ashman's D
    if are_apart and two.bic(column) < one.bic(column):
        lower = int(centres.argmin())
        return special.ndtr(-(score - centres[lower]) / spreads[lower])
    share = np.linspace(0.05, 0.6, 23)
    spread, centre = np.polyfit(special.ndtri(share), np.quantile(score, share), 1)
    return special.ndtr(-(score - centre) / spread)


def local_false_discovery_rate(p_value: ArrayLike) -> NDArray[np.float64]:
    """Density of clean samples' p-values, which is 1, over the falling density that fits all p-values best; at most 1.

    Source: Grenander 1956; all samples count as clean in the numerator, which errs on the safe side.
    """
    from sklearn.isotonic import isotonic_regression  # slow to import

    p_value = np.asarray(p_value, np.float64)
    if not p_value.size:
        return p_value
    edge, count = np.unique(p_value, return_counts=True)
    width = np.diff(edge, prepend=0.0)
    width[0] = max(width[0], np.finfo(np.float64).tiny)
    density = isotonic_regression(count / p_value.size / width, sample_weight=width, increasing=False)
    return np.minimum(1.0, 1 / density)[np.searchsorted(edge, p_value)]


def _storey(p_value: NDArray[np.float64], bound: float) -> float:
    """Share of clean samples, from the p-values above a bound: (1 + #{p > bound}) / (N (1 - bound)), at most 1.

    Source: Storey, JRSS B 2002; Bates et al. show that with it the false discovery rate of conformal p-values holds.
    """
    return min(1.0, float((1 + (p_value > bound).sum()) / (max(1, p_value.size) * (1 - bound))))


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
    sample_ids: Sequence[str]
    scores: NDArray[np.float64]  # (N,)
    p_value: NDArray[np.float64]  # (N,), copies have that of their group's representative
    above: NDArray[np.int64]  # (N,), calibration samples of the own bin that rank above; of no use without a score
    bin_of: NDArray[np.int64]  # (N,), place in `bins`
    representative: NDArray[np.int64]  # (N,), the row that represents its group: its own, if in none
    clean: NDArray[np.float64]  # calibration scores that are used
    bins: list[tuple[list[int], int]]  # strata of each bin, and its calibration samples
    num_unscored_calibration: int
    num_unused_calibration: int

    @property
    def num_scored(self) -> int:
        return int((~np.isnan(self.scores)).sum())

    @property
    def is_distinct(self) -> NDArray[np.bool_]:
        """(N,), M True: those with a score, one of each group."""
        return ~np.isnan(self.scores) & (self.representative == np.arange(self.scores.size))

    def alarm(self) -> float | None:
        """P-value of there being no poison, by the `rank_gate` of each bin (Bonferroni)."""
        p_value = [
            p
            for number, (_, num) in enumerate(self.bins)
            if (p := rank_gate(self.above[self.is_distinct & (self.bin_of == number)], num)) is not None
        ]
        return min(1.0, len(p_value) * min(p_value)) if p_value else None

    def require_calibration(self) -> int:
        """Number of calibration samples, if there are any."""
        if not self.clean.size:
            num = self.num_unscored_calibration
            raise lacks_calibration(self.rule.score, f"{num:,}, all without a score" if num else "none")
        return self.clean.size

    def verdict(
        self,
        flagged: NDArray[np.bool_],
        threshold: float | None,
        how: str,
        message: str,
        certified: bool = False,
        facts: dict[str, float | None] | None = None,
    ) -> Verdict:
        rank, at_least = self._ranking()
        settings = self.rule.model_dump(mode="json")
        report = {
            "rule": settings.pop("kind"),
            "score": settings.pop("score"),
            "declared": settings,
            "num_calibration": self.clean.size,
            "num_calibration_unscored": self.num_unscored_calibration,
            "num_calibration_unused": self.num_unused_calibration,
            "bins": [{"strata": strata, "num_calibration": num} for strata, num in self.bins],
            "num_scored": self.num_scored,
            "num_unscored": self.scores.size - self.num_scored,
            "num_distinct": int(self.is_distinct.sum()),
            "num_flagged": int(flagged.sum()),
            "poisoned_at_least": int(at_least[flagged].max(initial=0)) if self.clean.size else None,
            "threshold": threshold,
            "how": how,
            **dict.fromkeys(("achievable_q", "achievable_poison_rate", "alarm", "null_share")),
            **(facts or {}),
            "certified": certified,
            "mode": "certified" if certified else "ranked",
            "oracle": self.rule.is_oracle,
            "message": message,
        }
        return Verdict(self.p_value, flagged, threshold, rank, at_least, report)

    def _ranking(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`Verdict.rank` and `Verdict.poisoned_at_least`."""
        rank, at_least = np.zeros(self.scores.size, np.int64), np.zeros(self.scores.size, np.int64)
        distinct = np.flatnonzero(self.is_distinct)
        names = np.array([self.sample_ids[i] for i in distinct.tolist()], dtype=np.str_)
        ranked = distinct[np.lexsort((names, -self.scores[distinct], self.p_value[distinct]))]
        rank[ranked] = np.arange(1, ranked.size + 1)
        found = np.zeros(ranked.size, np.int64)
        for number, (_, num) in enumerate(self.bins):
            here = np.flatnonzero(self.bin_of[ranked] == number)
            bound = true_discoveries(self.above[ranked[here]], num, 1 - (1 - CONFIDENCE) / len(self.bins))
            found[here] = np.diff(bound, prepend=0)
        at_least[ranked] = np.cumsum(found)
        return rank[self.representative], at_least[self.representative]


def _weigh(
    rule: Rule,
    scores: ArrayLike,
    calibration: ArrayLike | None,
    sample_ids: Sequence[str],
    about: About | None = None,
    seed: int = 0,
    least_in_bin: int = 1,
) -> _Evidence:
    about = about or {}
    scores = np.asarray(scores, np.float64)
    given = np.empty(0) if calibration is None else np.asarray(calibration, np.float64)
    assert scores.ndim == given.ndim == 1, (scores.shape, given.shape)
    assert len(sample_ids) == scores.size, (len(sample_ids), scores.size)
    assert not np.isinf(scores).any(), "a detector gives finite scores, or NaN where it has none"
    assert not np.isinf(given).any(), "a detector gives finite scores, or NaN where it has none"
    strata, given_strata = np.zeros(scores.size, np.int64), np.zeros(given.size, np.int64)
    if about.get("strata") is not None and about.get("calibration_strata") is not None:
        strata, given_strata = np.asarray(about["strata"]), np.asarray(about["calibration_strata"])
        assert strata.shape == scores.shape, (strata.shape, scores.shape)
        assert given_strata.shape == given.shape, (given_strata.shape, given.shape)

    is_scored = ~np.isnan(given)
    is_used = is_scored & (given_strata >= 0)
    is_used[is_used] = _is_first_of_its_group(about.get("calibration_groups"), np.flatnonzero(is_used), given.size)
    clean, clean_strata = given[is_used], given_strata[is_used]
    representative = _representatives(about.get("groups"), scores, sample_ids, seed)

    bins = _merge_bins(clean_strata, least_in_bin)
    last_stratum = np.array([numbers[-1] for numbers, _ in bins], np.int64)
    bin_of = np.searchsorted(last_stratum[:-1], strata)
    p_value, above = np.full(scores.size, np.nan), np.zeros(scores.size, np.int64)
    for number in range(len(bins)):
        here = np.flatnonzero(bin_of == number)
        reference = clean[np.searchsorted(last_stratum[:-1], clean_strata) == number]
        names = sample_ids if here.size == scores.size else [sample_ids[i] for i in here.tolist()]
        above[here] = num_above(scores[here], reference, names, seed)
        p_value[here] = (1 + above[here]) / (reference.size + 1)
    num_unused = int(is_scored.sum()) - clean.size
    p_value = np.where(np.isnan(scores), np.nan, p_value[representative])
    return _Evidence(
        rule, sample_ids, scores, p_value, above, bin_of, representative, clean, bins, int((~is_scored).sum()),
        num_unused,
    )  # fmt: skip


def _is_first_of_its_group(
    groups: Sequence[str | None] | None, rows: NDArray[np.int64], size: int
) -> NDArray[np.bool_]:
    """Whether no earlier one of these rows is in the same group."""
    if groups is None:
        return np.ones(rows.size, bool)
    assert len(groups) == size, (len(groups), size)
    first: dict[str, int] = {}
    return np.array([(name := groups[i]) is None or first.setdefault(name, i) == i for i in rows.tolist()], bool)


def _representatives(
    groups: Sequence[str | None] | None, scores: NDArray[np.float64], sample_ids: Sequence[str], seed: int
) -> NDArray[np.int64]:
    """For each sample the row that represents its group: its own if alone, else one drawn by id, not by score."""
    representative = np.arange(scores.size)
    if groups is None:
        return representative
    assert len(groups) == scores.size, (len(groups), scores.size)
    members: dict[str, list[int]] = {}
    for i in np.flatnonzero(~np.isnan(scores)).tolist():
        if (name := groups[i]) is not None:
            members.setdefault(name, []).append(i)
    for rows in members.values():
        if len(rows) > 1:
            # Not the draw that breaks ties, or a representative would break them in its favour.
            representative[rows] = min(
                rows, key=lambda i: (_uniform(seed, f"stands in: {sample_ids[i]}"), sample_ids[i])
            )
    return representative


def _merge_bins(strata: NDArray[np.int64], least: int) -> list[tuple[list[int], int]]:
    """Strata of each bin and its number of calibration samples: neighbours together until there are enough."""
    bins: list[tuple[list[int], int]] = []
    for stratum, num in zip(*(part.tolist() for part in np.unique(strata, return_counts=True)), strict=True):
        if bins and bins[-1][1] < least:
            bins[-1] = ([*bins[-1][0], stratum], bins[-1][1] + num)
        else:
            bins.append(([stratum], num))
    if len(bins) > 1 and bins[-1][1] < least:
        (before, num_before), (last, num_last) = bins[-2:]
        bins[-2:] = [(before + last, num_before + num_last)]
    return bins
