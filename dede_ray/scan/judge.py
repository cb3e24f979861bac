"""From the scores of a corpus to a verdict on it: made columns, calibration, copies, bins, domain shift, findings.

`Judging` holds what a user may ask for beside the decision's rule. Whatever learns from scores here learns from the
pool, corpus and calibration samples in one heap, and does not know who calibrates; so all calibration samples give
p-values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from dede_ray.data.sampling import by_halves, sample_keys
from dede_ray.runtime.config import Config, Mistake
from dede_ray.scan.decisions import About, Conformal, Decision, EmpiricalNull, FixedThreshold, Redraw, Verdict
from dede_ray.scan.fusion import Difficulty, Fusion, State
from dede_ray.scan.groups import Finding, Grouping, Rows, copies, findings
from dede_ray.scan.pool import NO_COMPANY, Amplify, Classifier, Company, Looks
from dede_ray.scan.shift import ShiftCheck

Scores = NDArray[np.float64]

COMBINED, COMPANY, CLASSIFIER, AMPLIFIED = "combined", "company", "classifier", "amplified"
FAIR = "_fair"
MOST_FITTED = 50_000
"""Samples of the pool that difficulty and fusion learn from, at most."""


class Judging(Config):
    """Preparation of the scores before the decision rule, and checks on its promise."""

    fair: list[str] = Field([])
    """Columns that are also given as `<column>_fair`, without what the run's image statistics explain: what is left is
    less about how hard an image is."""
    num_knots: int = Field(5, ge=2)
    """Knots of the splines that take difficulty out of `fair` columns; fewer need fewer calibration samples."""
    combined: Fusion | None = None
    """Several columns in one, `combined`."""
    company: Company | None = None
    """Whether what looks worst is led astray in one direction, `company`."""
    classifier: Classifier | None = None
    """What tells the pool from clean learners, `classifier`: half of the calibration samples, which then give no
    p-values."""
    amplified: Amplify | None = None
    """What the worst of the pool share, looked for in all of it, `amplified`."""
    difficulty: str | None = None
    """Column that says how hard an image is, such as stat_texture or dede_null: what `mondrian_bins` of the decision
    are made of."""
    shift: ShiftCheck | None = ShiftCheck()
    """Compare corpus and calibration samples, and certify nothing where they are too unlike; None does not look."""
    grouping: Grouping | None = Grouping()
    """Report copies, near-copies and clumps of one caption as one finding each; None does not look."""

    @property
    def made(self) -> list[str]:
        """Columns that are made of others."""
        asked = {COMBINED: self.combined, COMPANY: self.company, CLASSIFIER: self.classifier, AMPLIFIED: self.amplified}
        return [*(name + FAIR for name in self.fair), *(name for name, wanted in asked.items() if wanted)]

    def made_of(self, name: str) -> list[str]:
        """The detectors' columns that a column is made of: itself, where it is not made here."""
        parts: Sequence[str] = ()
        if name == COMBINED and self.combined:
            parts = self.combined.columns
        elif name == COMPANY and self.company:
            parts = [self.company.of]
        elif name == AMPLIFIED and self.amplified:
            parts = [self.amplified.of]
        elif name == CLASSIFIER and self.classifier:
            parts = self.classifier.columns
        elif name in self.made:
            parts = [name.removesuffix(FAIR)]
        return [one for part in parts for one in self.made_of(part)] if parts else [name]

    @property
    def residuals(self) -> list[str]:
        """Columns of vectors that it takes."""
        asked = (self.company, self.classifier, self.amplified)
        return sorted({one.residual for one in asked if one and one.residual})


@dataclass(frozen=True, eq=False)
class Scored:
    """All that is known of samples after scoring; NaN where a sample has no score."""

    sample_ids: Sequence[str]
    content_hash: Sequence[str | None]
    captions: Sequence[str | None]
    perceptual_hash: Sequence[int | None]
    columns: Mapping[str, Scores]
    embedding_ids: Sequence[str]
    """Ids of a keyed draw of the samples."""
    embedding_ME: NDArray[np.floating] | None
    """Embeddings of that draw, by the reference encoder where there is one."""
    late: frozenset[str] = frozenset()
    """Columns that candidates alone have."""
    is_beneath: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """(N,): whether a sample was scored and is no candidate; where there are late columns."""
    residuals: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    """Columns of vectors, (N, R) each; NaN where a sample has no score."""

    @property
    def looks(self) -> Looks:
        return Looks(self.sample_ids, self.content_hash, self.perceptual_hash)

    def with_others(self, others: Scored) -> Scored:
        """These and others in one heap, as far as what is made of scores goes."""
        return replace(
            self,
            sample_ids=[*self.sample_ids, *others.sample_ids],
            content_hash=[*self.content_hash, *others.content_hash],
            perceptual_hash=[*self.perceptual_hash, *others.perceptual_hash],
            captions=[*self.captions, *others.captions],
            columns={name: np.concatenate([column, others.columns[name]]) for name, column in self.columns.items()},
            residuals={name: np.concatenate([rows, others.residuals[name]]) for name, rows in self.residuals.items()},
        )

    def beneath(self, name: str, score_N: Scores) -> NDArray[np.bool_] | None:
        """Which samples are no candidates of a column that tells candidates apart, bool (N,); None of other columns."""
        if name in self.late:
            return self.is_beneath
        return score_N < NO_COMPANY if name == COMPANY else None

    def part(self, kept: NDArray[np.bool_]) -> Scored:
        """Some of the samples."""
        rows = np.flatnonzero(kept).tolist()
        ids = {self.sample_ids[row] for row in rows}
        drawn = [row for row, name in enumerate(self.embedding_ids) if name in ids]
        return Scored(
            sample_ids=[self.sample_ids[row] for row in rows],
            content_hash=[self.content_hash[row] for row in rows],
            captions=[self.captions[row] for row in rows],
            perceptual_hash=[self.perceptual_hash[row] for row in rows],
            columns={name: column[kept] for name, column in self.columns.items()},
            embedding_ids=[self.embedding_ids[row] for row in drawn],
            embedding_ME=None if self.embedding_ME is None else self.embedding_ME[drawn],
            late=self.late,
            is_beneath=self.is_beneath[kept] if self.late else self.is_beneath,
            residuals={name: rows[kept] for name, rows in self.residuals.items()},
        )

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True, eq=False)
class Judged:
    """The verdict on a corpus, and what was made on the way."""

    verdict: Verdict
    score_N: Scores
    """The column that was judged."""
    made: dict[str, Scores]
    """Columns made here."""
    group_id: list[str | None]
    """The content hash of copies of one picture."""
    findings: list[Finding]
    extra: Mapping[str, pa.Array] = field(default_factory=dict)
    """More columns of the manifest's rows: who calibrates, what people said, an estimate."""
    to_review: list[dict[str, Any]] | None = None
    """What a person should look at, in order."""

    @property
    def report(self) -> dict[str, Any]:
        """The verdict's report, with the domain shift and the made columns."""
        return self.verdict.report


def judge(
    judging: Judging,
    decision: Decision,
    corpus: Scored,
    calibration: Scored | None,
    covariates: Sequence[str],
    looks_at_captions: bool,
) -> Judged:
    """Judge a corpus.

    Args:
        covariates: the run's image statistics.
        looks_at_captions: whether a score depends on the caption, so that copies of a picture are copies only under
            the same one.

    Raises:
        Mistake: a column, or calibration samples, that the settings need and the run lacks.
    """
    made, clean_made, divided, facts = _made(judging, corpus, calibration, covariates)
    columns = {**corpus.columns, **made}
    if decision.score not in columns:
        raise Mistake(f"decision.score is {decision.score!r}; there are {', '.join(columns)}")
    score_N, clean, group_id = columns[decision.score], None, copies(corpus.content_hash)
    about: About = {}
    if calibration is not None:
        clean_columns, clean_groups = {**calibration.columns, **clean_made}, copies(calibration.content_hash)
        kept = divided[0][1] if decision.score == CLASSIFIER else np.ones(len(calibration), bool)
        clean = clean_columns[decision.score]
        if decision.score in corpus.late:
            clean = np.where(calibration.is_beneath, _floor(decision, score_N, clean), clean)
        clean = clean[kept].astype(np.float32)
        about = {
            "groups": copies(corpus.content_hash, corpus.captions) if looks_at_captions else group_id,
            "calibration_groups": _kept(clean_groups, kept),
        }
        if decision.score == CLASSIFIER:
            about["redraws"] = [_redraw(pool_N, some, len(corpus), clean_groups) for pool_N, some in divided[1:]]
        if isinstance(decision, Conformal) and decision.mondrian_bins > 1:
            about = {**about, **_strata(judging, decision, columns, clean_columns, kept)}
    judged_N = score_N
    if decision.score in corpus.late:
        others = np.empty(0) if calibration is None else calibration.columns[decision.score]
        judged_N = np.where(corpus.is_beneath, _floor(decision, score_N, others), score_N)
    if isinstance(decision, EmpiricalNull):
        about = {"groups": copies(corpus.content_hash, corpus.captions) if looks_at_captions else group_id}
        if (beneath := corpus.beneath(decision.score, score_N)) is not None:
            about["beneath"] = beneath
    verdict = decision.decide(judged_N.astype(np.float32), clean, corpus.sample_ids, **about)
    verdict, shift = _shifted(judging, decision, verdict, corpus, calibration)
    verdict = replace(verdict, report={**verdict.report, "shift": shift, "made": facts})
    return Judged(verdict, score_N, made, group_id, findings_of(judging, corpus, verdict))


def with_made(
    judging: Judging, corpus: Scored, calibration: Scored | None, covariates: Sequence[str]
) -> tuple[Scored, Scored | None, dict[str, Any]]:
    """Both with the columns that are made of others among their own, and what normalising did.

    Calibration samples that taught the classifier have no score by it.
    """
    made, clean_made, _, facts = _made(judging, corpus, calibration, covariates)
    corpus = replace(corpus, columns={**corpus.columns, **made})
    if calibration is not None:
        calibration = replace(calibration, columns={**calibration.columns, **clean_made})
    return corpus, calibration, facts


def choose(
    candidates: Mapping[str, Judging],
    decision: Conformal,
    corpus: Scored,
    calibration: Scored,
    covariates: Sequence[str],
    seed: int = 0,
) -> tuple[str, Judging, Scored]:
    """Choose one of several ways to decide; the decided column is what its settings make, or the one of its name.

    Half of the calibration samples, by key, are scouts: with them each candidate judges all others, corpus and
    calibration samples in one heap, and the longest list wins; of equal ones the one with most poison for sure, then
    the one least like a clean corpus, then the first. Given the scouts, the choice does not change where a clean corpus
    sample and another calibration sample are exchanged, so those calibrate as if it had been made beforehand. Scouts
    calibrate no more, but may teach the classifier, which needs as many anyhow.

    Returns:
        Name and settings of the chosen one, and the calibration samples to `judge` with.
    """
    is_scout = by_halves(_pictures(calibration), seed)
    others, longest, best = calibration.part(~is_scout), (-1, -1, -1.0), ""
    heap, scouts = corpus.with_others(others), calibration.part(is_scout)
    for name, judging in candidates.items():
        column = judging.made[-1] if judging.made else name
        judged = judge(
            _seeded(judging, seed + 1), decision.model_copy(update={"score": column}), heap, scouts, covariates, False
        )
        bound, alarm = judged.verdict.poisoned_at_least.max(initial=0), judged.report["alarm"]
        length = int(judged.verdict.flagged.sum()), int(bound), -1.0 if alarm is None else -float(alarm)
        if length > longest or not best:
            longest, best = length, name
    return best, _seeded(candidates[best], seed), calibration if candidates[best].classifier else others


def _seeded(judging: Judging, seed: int) -> Judging:
    """The same with this division into learners of the classifier and calibration samples."""
    if judging.classifier is None:
        return judging
    return judging.model_copy(update={"classifier": judging.classifier.model_copy(update={"seed": seed})})


def _pictures(scored: Scored) -> list[str]:
    """Names that copies share."""
    return [name or own for name, own in zip(scored.content_hash, scored.sample_ids, strict=True)]


def _floor(decision: Decision, *scores: Scores) -> float:
    """A score below those of all candidates, for samples that were none."""
    known = [float(np.nanmin(one)) for one in scores if not np.isnan(one).all()]
    threshold = [decision.threshold] if isinstance(decision, FixedThreshold) else []
    return float(np.floor(min([0.0, *known, *threshold]))) - 1


def _kept(names: Sequence[str | None], kept: NDArray[np.bool_]) -> list[str | None]:
    return [names[row] for row in np.flatnonzero(kept).tolist()]


def _redraw(pool_N: Scores, kept: NDArray[np.bool_], num_corpus: int, clean_groups: Sequence[str | None]) -> Redraw:
    """What another division of the calibration samples gives a decision."""
    return pool_N[:num_corpus], pool_N[num_corpus:][kept], _kept(clean_groups, kept)


Divided = list[tuple[Scores, NDArray[np.bool_]]]
"""The classifier's column of the pool, and which calibration samples give p-values, for each division of the latter."""


def _made(
    judging: Judging, corpus: Scored, calibration: Scored | None, covariates: Sequence[str]
) -> tuple[dict[str, Scores], dict[str, Scores], Divided, dict[str, Any]]:
    """Columns made of others, for the corpus and the calibration samples; the classifier's divisions; and what
    normalising did."""
    divided: Divided = []
    if not judging.made:
        return {}, {}, divided, {}
    pool = corpus if calibration is None else corpus.with_others(calibration)
    drawn = _drawn(pool)
    columns: dict[str, Scores] = dict(pool.columns)
    facts: dict[str, Any] = {"fitted_on": int(drawn.size)}
    for name in judging.fair:
        if name not in columns:
            raise Mistake(f"fair: no column {name}; there are {', '.join(columns)}")
        if not covariates:
            raise Mistake("fair: there is nothing to say how hard an image is; attach {kind: image_statistics}")
        difficulty = Difficulty(num_knots=judging.num_knots)
        covariate_NC = np.stack([columns[one] for one in covariates], axis=1)
        state: State = difficulty.fit(columns[name][drawn], covariate_NC[drawn])
        columns[name + FAIR] = difficulty.apply(state, columns[name], covariate_NC)
        facts[name + FAIR] = {"r2_before": float(state["r2_before"]), "r2_after": float(state["r2_after"])}
    if judging.combined:
        state = judging.combined.fit({name: column[drawn] for name, column in columns.items()})
        columns[COMBINED] = judging.combined.apply(state, columns)
        facts[COMBINED] = judging.combined.model_dump(mode="json")
    if judging.company:
        base_N = _column(columns, judging.company.of, "company.of")
        columns[COMPANY] = judging.company.score(base_N, pool.residuals[judging.company.residual], pool.looks)
        facts[COMPANY] = judging.company.model_dump(mode="json")
    if judging.classifier:
        for split in range(judging.classifier.splits):
            taught = judging.classifier.model_copy(update={"seed": judging.classifier.seed + split})
            pool_N, is_learner = _classified(taught, pool, columns, len(corpus))
            divided.append((pool_N, ~is_learner))
        columns[CLASSIFIER], calibrates = divided[0]
        facts[CLASSIFIER] = {**judging.classifier.model_dump(mode="json"), "num_learners": int((~calibrates).sum())}
    if judging.amplified:
        base_N = _column(columns, judging.amplified.of, "amplified.of")
        columns[AMPLIFIED] = judging.amplified.score(base_N, pool.residuals[judging.amplified.residual], pool.looks)
        facts[AMPLIFIED] = judging.amplified.model_dump(mode="json")
    made = {name: columns[name][: len(corpus)] for name in judging.made}
    return made, {name: columns[name][len(corpus) :] for name in judging.made}, divided, facts


def _drawn(pool: Scored) -> NDArray[np.int64]:
    """Rows to learn from: one of each picture, by key, and of these no more than `MOST_FITTED`."""
    order = sample_keys(pool.sample_ids, 0, 1).argsort().numpy()
    first: dict[Any, int] = {}
    for row in order.tolist():
        first.setdefault(pool.content_hash[row] or row, row)
    return np.array(sorted([*first.values()][:MOST_FITTED]), np.int64)


def _column(columns: Mapping[str, Scores], name: str, role: str) -> Scores:
    if name not in columns:
        raise Mistake(f"{role} is {name!r}; there are {', '.join(columns)}")
    return columns[name]


def _classified(
    classifier: Classifier, pool: Scored, columns: Mapping[str, Scores], num_corpus: int
) -> tuple[Scores, NDArray[np.bool_]]:
    """The classifier's column, and which calibration samples were its clean learners: half of them, copies together."""
    is_learner = by_halves(_pictures(pool), classifier.seed)
    is_learner[:num_corpus] = False
    residual_NR = pool.residuals[classifier.residual] if classifier.residual else None
    feature_NF = classifier.features([_column(columns, one, "classifier") for one in classifier.columns], residual_NR)
    rows = np.flatnonzero(~is_learner)
    score_N = np.full(len(pool), np.nan)
    score_N[rows] = classifier.score(feature_NF[rows], feature_NF[is_learner], pool.looks.part(rows))
    return score_N, is_learner[num_corpus:]


def _strata(
    judging: Judging,
    decision: Conformal,
    columns: Mapping[str, Scores],
    clean_columns: Mapping[str, Scores],
    kept: NDArray[np.bool_],
) -> About:
    name = judging.difficulty
    if name is None or name not in columns:
        raise Mistake(
            f"decision.mondrian_bins is {decision.mondrian_bins}, and judging.difficulty is {name!r}; name a column to "
            f"make the bins of: {', '.join(columns)}"
        )
    strata, calibration_strata = decision.strata(columns[name], clean_columns[name][kept])
    return {"strata": strata, "calibration_strata": calibration_strata}


def _shifted(
    judging: Judging, decision: Decision, verdict: Verdict, corpus: Scored, calibration: Scored | None
) -> tuple[Verdict, dict[str, Any] | None]:
    """Withdraw the list where the calibration samples are unlike the corpus; the verdict, and a report of the shift."""
    if judging.shift is None or calibration is None or not isinstance(decision, Conformal):
        return verdict, None
    if corpus.embedding_ME is None or calibration.embedding_ME is None:
        return verdict, None
    shift = judging.shift.compare(
        corpus.embedding_ME, corpus.embedding_ids, calibration.embedding_ME, calibration.embedding_ids
    )
    report = {
        **{key: _number(value) for key, value in asdict(shift.auroc).items()},
        "limit": shift.limit,
        "said": str(shift),
    }
    if not shift.is_refused:
        return verdict, report
    return verdict.refused(f"cannot certify: {shift}; choose clean samples from where the corpus comes from"), report


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def findings_of(judging: Judging, corpus: Scored, verdict: Verdict) -> list[Finding]:
    """What belongs together, as `Judging.grouping` asks; nothing without it."""
    if judging.grouping is None:
        return []
    rows = Rows(
        corpus.sample_ids,
        verdict.flagged,
        verdict.p_value,
        corpus.content_hash,
        corpus.perceptual_hash,
        corpus.captions,
    )
    return findings(rows, judging.grouping)
