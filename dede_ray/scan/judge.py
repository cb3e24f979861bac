"""From the scores of a corpus to a verdict on it: made columns, calibration, copies, bins, domain shift, findings.

`Judging` holds what a user may ask for beside the decision's rule. Whatever learns from scores here learns from one
half of the calibration samples, by their keys, and p-values come from the other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dede_ray.runtime.config import Config, Mistake
from dede_ray.scan.decisions import About, Conformal, Decision, FixedThreshold, Verdict
from dede_ray.scan.fusion import Difficulty, Fusion, State, split_calibration
from dede_ray.scan.groups import Finding, Grouping, Rows, copies, findings
from dede_ray.scan.shift import ShiftCheck

Scores = NDArray[np.float64]

COMBINED = "combined"
FAIR = "_fair"


class Judging(Config):
    """Preparation of the scores before the decision rule, and checks on its promise."""

    fair: list[str] = Field([])
    """Columns that are also given as `<column>_fair`, without what the run's image statistics explain: what is left is
    less about how hard an image is."""
    num_knots: int = Field(5, ge=2)
    """Knots of the splines that take difficulty out of `fair` columns; fewer need fewer calibration samples."""
    combined: Fusion | None = None
    """Several columns in one, `combined`."""
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
        return [*(name + FAIR for name in self.fair), *([COMBINED] if self.combined else [])]


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
    made, clean_made, fitted_on, facts = _made(judging, corpus, calibration, covariates)
    columns = {**corpus.columns, **made}
    if decision.score not in columns:
        raise Mistake(f"decision.score is {decision.score!r}; there are {', '.join(columns)}")
    score_N, clean, group_id = columns[decision.score], None, copies(corpus.content_hash)
    about: About = {}
    if calibration is not None:
        clean_columns, clean_groups = {**calibration.columns, **clean_made}, copies(calibration.content_hash)
        kept = ~fitted_on if decision.score in made else np.ones(len(calibration), bool)
        clean = clean_columns[decision.score]
        if decision.score in corpus.late:
            clean = np.where(calibration.is_beneath, _floor(decision, score_N, clean), clean)
        clean = clean[kept].astype(np.float32)
        about = {
            "groups": copies(corpus.content_hash, corpus.captions) if looks_at_captions else group_id,
            "calibration_groups": [clean_groups[row] for row in np.flatnonzero(kept).tolist()],
        }
        if isinstance(decision, Conformal) and decision.mondrian_bins > 1:
            about = {**about, **_strata(judging, decision, columns, clean_columns, kept)}
    judged_N = score_N
    if decision.score in corpus.late:
        others = np.empty(0) if calibration is None else calibration.columns[decision.score]
        judged_N = np.where(corpus.is_beneath, _floor(decision, score_N, others), score_N)
    verdict = decision.decide(judged_N.astype(np.float32), clean, corpus.sample_ids, **about)
    verdict, shift = _shifted(judging, decision, verdict, corpus, calibration)
    verdict = replace(verdict, report={**verdict.report, "shift": shift, "made": facts})
    return Judged(verdict, score_N, made, group_id, _findings(judging, corpus, verdict))


def _floor(decision: Decision, *scores: Scores) -> float:
    """A score below those of all candidates, for samples that were none."""
    known = [float(np.nanmin(one)) for one in scores if not np.isnan(one).all()]
    threshold = [decision.threshold] if isinstance(decision, FixedThreshold) else []
    return float(np.floor(min([0.0, *known, *threshold]))) - 1


def _made(
    judging: Judging, corpus: Scored, calibration: Scored | None, covariates: Sequence[str]
) -> tuple[dict[str, Scores], dict[str, Scores], NDArray[np.bool_], dict[str, Any]]:
    """Columns made of others, for the corpus and the calibration samples; who was fitted on; what normalising did."""
    wanted = [*judging.fair, *([COMBINED] if judging.combined else [])]
    if not wanted:
        return {}, {}, np.zeros(0 if calibration is None else len(calibration), bool), {}
    if calibration is None:
        raise Mistake(
            f"{', '.join(wanted)}: scores are brought to a common scale by calibration samples, and there are none; "
            "name some"
        )
    fitted_on = split_calibration(_names(calibration), 0)
    made: dict[str, Scores] = {}
    clean_made: dict[str, Scores] = {}
    facts: dict[str, Any] = {}
    for name in judging.fair:
        if name not in corpus.columns:
            raise Mistake(f"fair: no column {name}; there are {', '.join(corpus.columns)}")
        if not covariates:
            raise Mistake("fair: there is nothing to say how hard an image is; attach {kind: image_statistics}")
        difficulty = Difficulty(num_knots=judging.num_knots)
        clean_NC = np.stack([calibration.columns[one] for one in covariates], axis=1)
        state: State = difficulty.fit(calibration.columns[name][fitted_on], clean_NC[fitted_on])
        corpus_NC = np.stack([corpus.columns[one] for one in covariates], axis=1)
        made[name + FAIR] = difficulty.apply(state, corpus.columns[name], corpus_NC)
        clean_made[name + FAIR] = difficulty.apply(state, calibration.columns[name], clean_NC)
        facts[name + FAIR] = {"r2_before": float(state["r2_before"]), "r2_after": float(state["r2_after"])}
    if judging.combined:
        both = [{**corpus.columns, **made}, {**calibration.columns, **clean_made}]
        state = judging.combined.fit({name: column[fitted_on] for name, column in both[1].items()})
        made[COMBINED], clean_made[COMBINED] = (judging.combined.apply(state, columns) for columns in both)
        facts[COMBINED] = judging.combined.model_dump(mode="json")
    return made, clean_made, fitted_on, {**facts, "fitted_on": int(fitted_on.sum())}


def _names(calibration: Scored) -> list[str]:
    """One name for all copies of a picture, so that they fall into the same half."""
    return [group or name for group, name in zip(copies(calibration.content_hash), calibration.sample_ids, strict=True)]


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


def _findings(judging: Judging, corpus: Scored, verdict: Verdict) -> list[Finding]:
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
