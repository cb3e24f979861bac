"""Calibration where nobody has clean samples: the corpus calibrates itself, as far as people look.

    FromCorpus(from_corpus=5000, reviewed="reviews.jsonl")   the settings, in the place of clean shards
    judge_by_itself(judging, decision, corpus, ...)          a verdict on the whole corpus, and what to look at next

What a run may claim depends on who looked, and is named in the manifest (`decision.mode`), in falling strength:

- **certified**: calibration samples are known to be clean; here, where a person looked at all that were drawn.
- **trimmed**: calibration samples are drawn from the corpus by key, blind to scores, and a person looked at the
  `looks` highest of them and struck out the poisoned ones (Bashari, Sesia & Romano, "Robust conformal outlier detection
  under contaminated reference data", ICML 2025, arXiv:2502.04807). Why that is enough: let c clean and u overlooked
  poisoned ones be left. The p-value counted among all c + u is at least (c + 1) / (c + u + 1) times the one counted
  among the clean, whatever the overlooked score, and that one is exact, as clean samples drawn and not drawn are
  exchangeable. So P(p <= t) <= t (1 + u / (c + 1)) for a clean sample, and the list's false discovery rate is at most
  q (1 + u / (c + 1)), even against an adversary: 0.101 for q = 0.1 where 1 % was overlooked; and at most q where the
  overlooked score as high as clean samples do, or higher. (Who is among the highest depends on who was drawn, by one
  sample at the border; nothing else does.)
  Overlooked poison makes the list shorter. Striking out *clean* samples is what breaks the promise: each lets about
  N / n clean samples of the corpus onto the list. So whoever is in doubt keeps a sample (`unsure`), and `doubts` warns
  of strikes that look like that.
- **audited**: nobody has clean samples nor has looked at the highest; the list is made by an empirical null, which
  promises nothing. Then a person looks at a sample of the list, drawn by key before anybody looked, and the
  Clopper-Pearson bound says how much of the list is clean, at most; likewise how much poison is below the cut. Looks at
  other samples change nothing. As the size of the sample is declared, too, and samples not yet looked at count against
  the list, it does not matter in which order people look or when they stop: a bound only falls towards the one of the
  finished sample, which is exact.
- **ranked**: nobody looked. A ranking, and an estimated local false discovery rate.

A sample that a person calls clean calibrates from then on only if it is one of those drawn from the whole corpus blind
to scores. Samples of the list, or from below the cut, were drawn by their scores: clean ones among them are odder, or
less odd, than clean samples are, and would shift all p-values. What calibrates is drawn by content: copies of a picture
are on one side. Whoever knows the seed knows the draw: where attackers may know this program, set one of your own.

Nothing that is learnt knows any of this: detectors are fitted to the whole corpus, columns are made of all of it in one
heap, struck samples included, and reviews change who calibrates and what is on the list, never a score.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag
from scipy.special import betaincinv
from tyro.constructors import PrimitiveConstructorSpec

from dede_ray.data.sampling import sample_keys
from dede_ray.runtime.config import Config, Mistake
from dede_ray.scan.decisions import Conformal, Decision, EmpiricalNull, Verdict
from dede_ray.scan.groups import copies
from dede_ray.scan.judge import Judged, Judging, Scored, findings_of, judge, with_made
from dede_ray.scan.reviews import Reviews

logger = logging.getLogger(__name__)

# Shapes: N samples of the corpus.

CONFIDENCE = 0.95
"""Probability that a bound from an audit holds."""
UNFAIR = 1e-4
"""Chance below which a draw that holds so many of the highest was not left to chance."""
LEAST_ALIKE = 10
"""Samples with which others can be compared."""
Rows = NDArray[np.int64]
Mode = Literal["certified", "trimmed", "audited", "ranked"]
MODES: dict[str, str] = {
    "certified": "calibrated by samples that are known to be clean",
    "trimmed": "calibrated by samples of the corpus, of which a person struck out the poisoned ones among the highest",
    "audited": "an estimate; a person looked at a random sample of it, which bounds how much of it is clean",
    "ranked": "an order and an estimate, without any promise",
}
"""What each mode means, for pages and summaries."""


class FromCorpus(Config):
    """Calibration samples drawn from the corpus itself, and what people said of samples that they looked at."""

    from_corpus: int = Field(5000, ge=0)
    """So many pictures are drawn by key to calibrate, at most half of the corpus; they are not judged. 0 draws none,
    and the list is made by an empirical null."""
    reviewed: str | list[str] | None = None
    """Files of looks, one JSON line each: sample_id, verdict (poisoned, clean, unsure), who, when."""
    looks: int = Field(100, ge=1)
    """Of those drawn, the highest, that a person looks at before anything is certified."""
    audit: int = Field(30, ge=1)
    """Samples of the list, and as many from below the cut, that bound what is clean and what was missed. Choose it
    before looking: 30 poisoned of 30 say that at most 9.5 % of the list is clean, 59 say 5 %."""
    seed: int = 0
    """Draws them."""


def _from_words(words: list[str]) -> Any:
    """What `--calibration` says on a command line: shards, or YAML such as {from_corpus: 5000}."""
    if words in ([], ["None"]):
        return None
    if not words[0].startswith("{"):
        return words[0] if len(words) == 1 else words
    try:
        return yaml.safe_load(" ".join(words))
    except yaml.YAMLError as error:
        raise ValueError(f"{words[0]!r} is not valid YAML: {error}") from None


def _as_words(setting: str | list[str] | FromCorpus | None) -> list[str]:
    if isinstance(setting, FromCorpus):
        return [json.dumps(setting.model_dump(mode="json"))]
    return ["None"] if setting is None else [setting] if isinstance(setting, str) else setting


_Given = Annotated[
    Annotated[str, Tag("path")] | Annotated[list[str], Tag("paths")] | Annotated[FromCorpus, Tag("drawn")],
    Discriminator(lambda given: "path" if isinstance(given, str) else "paths" if isinstance(given, list) else "drawn"),
]
CalibrationConfig = Annotated[
    _Given | None,
    PrimitiveConstructorSpec(
        nargs="*", metavar="SHARDS|{from_corpus: INT, ...}", instance_from_str=_from_words,
        is_instance=lambda given: given is None or isinstance(given, str | list | FromCorpus),
        str_from_instance=_as_words,
    ),
]  # fmt: skip
"""Clean shards, or `FromCorpus`; written out for tyro, which makes no option of a union of both kinds."""


@dataclass(frozen=True)
class Audit:
    """What a sample drawn by key, of a list or of what is below its cut, says of all of it."""

    kind: Literal["list", "below"]
    size: int
    """How many there are in all."""
    num_drawn: int
    num_looked_at: int
    num_found: int
    """Clean ones of the list, or poisoned ones below; those that a person is unsure of among them."""
    at_most: float
    """With `CONFIDENCE` no larger share of all is clean, or poisoned."""

    @property
    def is_done(self) -> bool:
        return self.num_looked_at == self.num_drawn

    def __str__(self) -> str:
        looked = f"{self.num_looked_at:,} of {self.num_drawn:,} drawn looked at"
        if self.kind == "list":
            return (
                f"{looked}, {self.num_found:,} clean or unsure: at most {self.at_most:.1%} of this list of "
                f"{self.size:,} is clean ({CONFIDENCE:.0%})"
            )
        return (
            f"{looked}, {self.num_found:,} poisoned or unsure: at most {self.at_most:.1%} of the {self.size:,} samples "
            f"below the cut are poisoned ({CONFIDENCE:.0%})"
        )


def most_share(num_found: int, num_looks: int, confidence: float = CONFIDENCE) -> float:
    """The largest share that is no surprise: upper Clopper-Pearson bound, one-sided and exact.

    The largest p for which num_found or fewer of num_looks independent samples come with a probability of at least
    1 - confidence. For a draw without replacement, as here, it errs on the safe side.
    """
    return 1.0 if num_found >= num_looks else float(betaincinv(num_found + 1, num_looks - num_found, confidence))


def drawn_by_content(names: Sequence[str | None], num: int, seed: int) -> NDArray[np.bool_]:
    """Draw `num` pictures by key, at most half of them, bool (N,): with all their copies, in whatever order they come.

    Args:
        names: what copies share, their content hashes; None for what is not to be drawn.
    """
    distinct = sorted({name for name in names if name})
    key = sample_keys(distinct, seed, 4).numpy()
    chosen = {distinct[i] for i in np.argsort(key, kind="stable")[: min(num, len(distinct) // 2)].tolist()}
    return np.array([name in chosen for name in names], bool)


@dataclass(frozen=True, eq=False)
class _Corpus:
    """A scored corpus, and what people said of its samples."""

    scored: Scored
    settings: FromCorpus
    score_N: NDArray[np.float64]
    """What is decided on; what candidates alone have is lowest for others."""
    groups: Sequence[str]
    """What copies share, as far as the score sees."""
    said: NDArray[np.str_]
    """(N,): poisoned, clean, unsure, or nothing. A look at one copy is a look at all of them."""

    def by_key(self, among: NDArray[np.bool_], salt: int) -> Rows:
        """Rows in the order of their keys, which nobody's look changes."""
        rows = np.flatnonzero(among)
        key = sample_keys([self.scored.sample_ids[row] for row in rows.tolist()], self.settings.seed, salt).numpy()
        return rows[np.argsort(key, kind="stable")]

    def highest(self, among: NDArray[np.bool_]) -> Rows:
        """One of each group of copies, the highest scores first, equal ones by key."""
        rows = self.by_key(among & ~np.isnan(self.score_N), 6)
        rows = rows[np.argsort(-self.score_N[rows], kind="stable")]
        first: dict[str, int] = {}
        for row in rows.tolist():
            first.setdefault(self.groups[row], row)
        return np.array([*first.values()], np.int64)

    def audit(self, kind: Literal["list", "below"], among: NDArray[np.bool_]) -> tuple[Audit, Rows]:
        """Bound how much of a list is clean, or how much of what is below its cut is poisoned; and whom to look at."""
        rows = self.by_key(among, 5)
        drawn, good = rows[: self.settings.audit], "poisoned" if kind == "list" else "clean"
        looked, num_bad = int((self.said[drawn] != "").sum()), int((self.said[drawn] != good).sum())
        at_most = num_bad / max(1, drawn.size) if drawn.size == rows.size else most_share(num_bad, drawn.size)
        return Audit(kind, rows.size, drawn.size, looked, num_bad - (drawn.size - looked), at_most), drawn


def judge_by_itself(
    judging: Judging,
    decision: Decision,
    corpus: Scored,
    settings: FromCorpus,
    reviews: Reviews,
    covariates: Sequence[str],
    looks_at_captions: bool,
) -> Judged:
    """Judge a corpus without clean samples; arguments as those of `judge`.

    Returns:
        A verdict on all samples: what calibrates has no p-value and no rank. On the list are those that the rule flags
        and no person calls clean, and those that a person calls poisoned. `to_review` says what to look at, in order.
    """
    names = _names(corpus)
    is_drawn = drawn_by_content(names, settings.from_corpus, settings.seed)
    is_scored = np.array([name is not None for name in names], bool)
    others, drawn, facts = with_made(judging, *_divided(corpus, is_drawn), covariates)
    corpus = _together(corpus, others, drawn, is_drawn)
    whole = _looked_at(corpus, decision.score, settings, reviews, looks_at_captions)
    plain = Judging(difficulty=judging.difficulty, shift=None, grouping=None)
    rest = (covariates, looks_at_captions)
    null = judge(plain, EmpiricalNull(score=decision.score, q=getattr(decision, "q", 0.1)), corpus, None, *rest).verdict
    to_look, is_struck = whole.highest(is_drawn)[: settings.looks], is_drawn & (whole.said == "poisoned")
    is_trimmed = to_look.size > 0 and bool((whole.said[to_look] != "").all())
    verdict, is_judged, why = null, np.ones(len(corpus), bool), "nobody has clean samples"
    if not decision.needs_calibration:
        verdict, why = judge(plain, decision, corpus, None, *rest).verdict, ""
    elif is_trimmed or not isinstance(decision, Conformal):
        kept = None if drawn is None else drawn.part(~is_struck[is_drawn])
        tried = judge(plain, decision, others, kept, *rest).verdict
        why = tried.report["message"]
        if tried.report["certified"] or not isinstance(decision, Conformal):
            verdict, is_judged, why = _widened(tried, ~is_drawn), ~is_drawn, ""
    on_list = verdict.flagged
    audits = {
        "list": whole.audit("list", on_list),
        "below": whole.audit("below", is_judged & ~on_list & ~np.isnan(whole.score_N)),
    }
    mode = _mode(verdict, audits, bool((whole.said[whole.highest(is_drawn)] != "").all()))
    warnings = doubts(whole, null, is_drawn, to_look)
    for warning in warnings:
        logger.warning(warning)
    flagged = (on_list | (is_scored & (whole.said == "poisoned"))) & (whole.said != "clean")
    report = {
        **verdict.report,
        "certified": mode in ("certified", "trimmed"),
        "mode": mode,
        "message": _message(verdict, mode, why, whole, to_look, is_struck, audits, warnings),
        "num_flagged": int(flagged.sum()),
        "calibration": {
            "from_corpus": settings.from_corpus,
            "drawn": int(is_drawn.sum()),
            "to_look_at": int(to_look.size),
            "looked_at": int((whole.said[to_look] != "").sum()),
            "struck": int(is_struck.sum()),
            "warnings": warnings,
        },
        "reviews": {
            **reviews.report(corpus.sample_ids),
            "added_to_list": int((flagged & ~on_list).sum()),
            "taken_off_list": int((on_list & ~flagged).sum()),
        },
        "audit": {
            name: {**asdict(audit), "confidence": CONFIDENCE, "said": str(audit)} for name, (audit, _) in audits.items()
        },
        "shift": None,
        "made": facts,
    }
    verdict = replace(verdict, flagged=flagged, report=report)
    extra: dict[str, pa.Array] = {
        "local_fdr": pa.array(null.local_fdr, pa.float64(), from_pandas=True),
        "calibrates": pa.array(is_drawn & ~is_struck & ~is_judged, pa.bool_()),
        "reviewed": pa.array([one or None for one in whole.said.tolist()], pa.string()),
    }
    wanted = {"calibration": to_look, **{name: rows for name, (_, rows) in audits.items()}}
    to_review = [
        {"sample_id": corpus.sample_ids[row], "why": role, "place": place, "verdict": str(whole.said[row]) or None}
        for role, rows in wanted.items()
        for place, row in enumerate(rows.tolist(), 1)
    ]
    made = {name: corpus.columns[name] for name in judging.made}
    return Judged(
        verdict, corpus.columns[decision.score], made, copies(corpus.content_hash),
        findings_of(judging, corpus, verdict), extra, to_review,
    )  # fmt: skip


def doubts(whole: _Corpus, null: Verdict, is_drawn: NDArray[np.bool_], to_look: Rows) -> list[str]:
    """Reasons to believe that clean samples were struck out, or that the draw was not left to chance; in words.

    1. More of those looked at were struck out than the scores of the corpus explain: the estimated number of poisoned
       samples among them is the sum of 1 - local false discovery rate.
    2. What was struck out points nowhere in particular. Poisoned samples of the corpus point where poisoned drawn ones
       do, and as many of each are to be expected: so each is compared with the highest of the corpus that was not
       drawn, as many as were looked at in proportion, by the mean cosine to the nearest of them. A struck sample is in
       doubt that is no more alike than nine in ten of those kept, or than halfway from their median to that of the
       struck.
    3. Of the highest of all, more were drawn than chance allows: who knows the seed can put poison where it is not
       judged.

    None of it is proof, and none of it changes the verdict.
    """
    from scipy.stats import hypergeom  # slow to import

    found: list[str] = []
    if not to_look.size:
        return found
    said = whole.said[to_look]
    struck, kept = to_look[said == "poisoned"], to_look[(said == "clean") | (said == "unsure")]
    drawn, others = whole.highest(is_drawn), whole.highest(~is_drawn)
    stands_for = max(1.0, others.size / max(1, drawn.size))
    risk = (
        f"each clean one among them lets about {stands_for:.3g} clean ones of the corpus onto the list; look again, "
        "and keep what is in doubt"
    )
    assert null.local_fdr is not None
    explained = float((1 - null.local_fdr[to_look]).sum())
    if struck.size > 2 * explained + 3 * np.sqrt(max(explained, 1.0)):  # the estimate errs on the low side
        found.append(
            f"{struck.size:,} of {to_look.size:,} calibration samples were struck out, where the scores of the corpus "
            f"explain about {explained:.0f}: {risk}"
        )
    like = others[: max(LEAST_ALIKE, round(to_look.size * stands_for))]
    for name, residual_NR in sorted(whole.scored.residuals.items()):
        if struck.size < 2 or kept.size < LEAST_ALIKE:
            break
        near_struck, near_kept = (_nearness(residual_NR, rows, like) for rows in (struck, kept))
        halfway = (np.nanmedian(near_struck) + np.nanmedian(near_kept)) / 2
        in_doubt = struck[near_struck <= max(halfway, np.nanquantile(near_kept, 0.9))]
        if in_doubt.size >= max(2, 0.1 * struck.size):
            ids = [whole.scored.sample_ids[row] for row in in_doubt.tolist()]
            found.append(
                f"{in_doubt.size:,} of {struck.size:,} calibration samples that were struck out point no more where "
                f"others do ({name}) than those kept, such as {', '.join(ids[:3])}: {risk}"
            )
    num_top = min(drawn.size + others.size, round(to_look.size * (1 + stands_for)))
    score = np.concatenate([whole.score_N[drawn], whole.score_N[others]])
    num_drawn = int((np.argsort(-score, kind="stable")[:num_top] < drawn.size).sum())
    if hypergeom.sf(num_drawn - 1, score.size, drawn.size, num_top) < UNFAIR:
        found.append(
            f"{num_drawn:,} of the {num_top:,} highest samples were drawn to calibrate, where chance gives about "
            f"{num_top * drawn.size / score.size:.0f}: somebody may have known the draw, and what is drawn is not "
            "judged; set another calibration.seed"
        )
    return found


def _nearness(residual_NR: NDArray[np.floating], rows: Rows, others: Rows, k: int = 5) -> NDArray[np.float64]:
    """Mean cosine of each sample's residual to the k nearest of others."""
    unit_NR, other_MR = (
        one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-30)
        for one in (np.asarray(residual_NR[some], np.float64) for some in (rows, others))
    )
    other_MR = other_MR[np.isfinite(other_MR).all(axis=1)]
    return np.sort(unit_NR @ other_MR.T, axis=1)[:, -k:].mean(axis=1)


def _mode(verdict: Verdict, audits: Mapping[str, tuple[Audit, Rows]], is_whole: bool) -> Mode:
    """How strong a claim the verdict may make."""
    if verdict.report["certified"]:
        return "certified" if is_whole else "trimmed"
    audit, _ = audits["list" if audits["list"][0].size else "below"]
    return "audited" if audit.num_drawn and audit.is_done else "ranked"


def _message(
    verdict: Verdict,
    mode: Mode,
    why: str,
    whole: _Corpus,
    to_look: Rows,
    is_struck: NDArray[np.bool_],
    audits: Mapping[str, tuple[Audit, Rows]],
    warnings: list[str],
) -> str:
    """What the verdict says in words: what it is, and what to look at for more."""
    said = [verdict.report["message"]]
    num_left = int((whole.said[to_look] == "").sum())
    if mode in ("certified", "trimmed"):
        said.append(
            f"{mode}: calibrated by {verdict.report['num_calibration']:,} samples of the corpus itself, after a person "
            f"looked at the {to_look.size:,} highest of them and struck out {int(is_struck[to_look].sum()):,}"
        )
    else:
        if why and why != said[0]:
            said.insert(0, why)
        claims = {"audited": "a person looked at a sample of it", "ranked": "too few looks for any promise"}
        said.append(f"{mode}: {claims[mode]}")
    said += [str(audit) for audit, _ in audits.values() if audit.num_drawn and audit.num_looked_at]
    if num_left:
        said.append(
            f"for a list with a declared error rate look at {num_left:,} more of the {to_look.size:,} calibration "
            "samples at the top of to_review.jsonl, and decide again"
        )
    elif mode == "ranked" and not to_look.size:
        said.append("for a bound look at the samples of to_review.jsonl, and decide again")
    return "; ".join([*said, *(f"warning: {one}" for one in warnings)])


def _names(corpus: Scored) -> list[str | None]:
    """What copies share, of samples with any score at all."""
    is_scored = np.zeros(len(corpus), bool)
    for column in corpus.columns.values():
        is_scored |= ~np.isnan(column)
    rows = zip(corpus.content_hash, corpus.sample_ids, is_scored.tolist(), strict=True)
    return [(name or own) if scored else None for name, own, scored in rows]


def _divided(corpus: Scored, is_drawn: NDArray[np.bool_]) -> tuple[Scored, Scored | None]:
    return (corpus.part(~is_drawn), corpus.part(is_drawn)) if is_drawn.any() else (corpus, None)


def _together(corpus: Scored, others: Scored, drawn: Scored | None, is_drawn: NDArray[np.bool_]) -> Scored:
    """The corpus with the columns that were made of its parts."""
    columns = dict(others.columns)
    for name in columns if drawn is not None else ():
        columns[name] = np.empty(len(corpus))
        columns[name][~is_drawn], columns[name][is_drawn] = others.columns[name], drawn.columns[name]  # type: ignore[union-attr]
    return replace(corpus, columns=columns)


def _looked_at(corpus: Scored, score: str, settings: FromCorpus, reviews: Reviews, looks_at_captions: bool) -> _Corpus:
    if score not in corpus.columns:
        raise Mistake(f"decision.score is {score!r}; there are {', '.join(corpus.columns)}")
    score_N = corpus.columns[score]
    if score in corpus.late:
        score_N = np.where(corpus.is_beneath, -np.inf, score_N)
    shared = copies(corpus.content_hash, corpus.captions if looks_at_captions else None)
    groups = [name or own for name, own in zip(shared, corpus.sample_ids, strict=True)]
    said: dict[str, set[str]] = {}
    for group, own in zip(groups, corpus.sample_ids, strict=True):
        if own in reviews.verdicts:
            said.setdefault(group, set()).add(reviews.verdicts[own])
    one = {group: next(iter(verdicts)) if len(verdicts) == 1 else "unsure" for group, verdicts in said.items()}
    return _Corpus(corpus, settings, score_N, groups, np.array([one.get(group, "") for group in groups], "U8"))


def _widened(verdict: Verdict, is_judged: NDArray[np.bool_]) -> Verdict:
    """The verdict on some samples as one on all; the others have neither p-value nor rank and are not flagged."""

    def wide(values: NDArray[Any], others: Any) -> NDArray[Any]:
        all_values = np.full(is_judged.size, others, values.dtype)
        all_values[is_judged] = values
        return all_values

    return replace(
        verdict,
        p_value=wide(verdict.p_value, np.nan),
        flagged=wide(verdict.flagged, False),
        rank=wide(verdict.rank, 0),
        poisoned_at_least=wide(verdict.poisoned_at_least, 0),
    )
