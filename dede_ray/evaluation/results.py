"""What an evaluation found: manifest and truth joined, the numbers this gives, and these numbers in words.

`join` refuses what is not about the same samples, `measure` counts, `table` and `reading` put the counts into words.
The numbers are ready for JSON and all words are made from them, so table and page cannot disagree.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.stats import binom

from dede_ray.evaluation.measure import Verdict
from dede_ray.metrics import auroc_difference, detection_metrics, false_discovery_proportion, proportion
from dede_ray.runtime.config import Mistake
from dede_ray.scan.manifest import Manifest

# Shapes: N samples of the manifest.

Numbers = dict[str, Any]  # JSON-ready


@dataclass(frozen=True)
class Scan:
    """Manifest, honest manifest and truth, row by row the same samples, sorted by id."""

    table: pa.Table
    honest: pa.Table | None
    is_poisoned: NDArray[np.bool_]
    captions: list[str | None]
    """Captions as they are in the poisoned shards."""

    @property
    def is_scored(self) -> NDArray[np.bool_]:
        """(N,): samples that both victims have a score for."""
        tables = [self.table] if self.honest is None else [self.table, self.honest]
        return np.logical_and.reduce([one["error"].is_null().to_numpy() for one in tables])

    def scores(self, name: str, role: str = "victim") -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Scores and truth of the samples that have scores."""
        source = self.table if role == "victim" else self.honest
        assert source is not None, role
        column = source[name].to_numpy(zero_copy_only=False).astype(np.float64)
        return column[self.is_scored], self.is_poisoned[self.is_scored]


def join(manifest: Manifest, honest: Manifest | None, truth: pa.Table, where: str) -> Scan:
    """Put manifest, honest manifest and truth side by side; every row must be in all of them.

    Raises:
        Mistake: they are not about the same samples, or the honest victim was not given the same scores.
    """
    truth = truth.sort_by("sample_id")
    _same_samples(manifest.table, truth, f"the truth {where}")
    if honest is not None:
        _same_samples(manifest.table, honest.table, "the honest victim's manifest")
        changed = pc.sum(pc.not_equal(manifest.table["content_hash"], honest.table["content_hash"])).as_py()
        if changed:
            raise Mistake(
                f"{changed:,} samples had other image bytes when the honest victim scored them; score both victims on "
                "the same poisoned shards"
            )
        missing = [name for name in manifest.score_columns if name not in honest.score_columns]
        if missing:
            raise Mistake(
                f"the honest victim's manifest lacks the scores {', '.join(missing)}; score it with the same detectors"
            )
    captions = pc.coalesce(truth["poisoned_caption"], truth["caption"]).to_pylist()
    return Scan(
        manifest.table, honest.table if honest else None, truth["is_poisoned"].to_numpy(zero_copy_only=False), captions
    )


def _same_samples(table: pa.Table, other: pa.Table, what: str) -> None:
    ids, others = table["sample_id"].to_pylist(), other["sample_id"].to_pylist()
    if ids == others:
        return
    sides = [("manifest", sorted({*ids} - {*others})), (what, sorted({*others} - {*ids}))]
    found = "; ".join(f"{len(only):,} only in {name}, such as {only[0]}" for name, only in sides if only)
    raise Mistake(
        f"the manifest ({len(ids):,} samples) and {what} ({len(others):,}) are not about the same samples: "
        f"{found or 'some appear twice'}; evaluate the scores of the very shards that the truth belongs to"
    )


# --------------------------------------------------------------------------------------------------------- numbers


def measure(scan: Scan, info: Numbers, verdict: Verdict) -> Numbers:
    """All numbers of table and page about a manifest (whose `info` this is), ready for JSON."""
    scored, poisoned = scan.is_scored, scan.is_poisoned
    reasons = Counter(scan.table["error"].drop_null().to_pylist())
    decision, controls = info["decision"], info["controls"]
    # The judged score first, controls last, else in the order of the detectors.
    names = sorted(info["score_columns"], key=lambda name: (name != decision["score"], name in controls))
    metrics = {
        "void": None if verdict.passes else verdict.reason,
        "gate": verdict.as_json(),
        "counts": {
            "samples": len(poisoned),
            "poisoned": int(poisoned.sum()),
            "clean": int((~poisoned).sum()),
            "scored": int(scored.sum()),
            "unreadable": dict(sorted(reasons.items())),
            "unreadable_poisoned": int((~scored & poisoned).sum()),
        },
        "decision": {**decision, **_decided(scan, "victim"), "honest": scan.honest and _decided(scan, "honest")},
        "scores": {name: {"is_control": name in controls, **_score_row(scan, name)} for name in names},
    }
    return _without_nan(metrics)


def _decided(scan: Scan, role: str) -> Numbers:
    """What a manifest flags, against the truth; samples without a score count neither way."""
    source = scan.table if role == "victim" else scan.honest
    assert source is not None
    flagged = source["flagged"].fill_null(False).to_numpy(zero_copy_only=False)[scan.is_scored]
    poisoned = scan.is_poisoned[scan.is_scored]
    num_flagged, num_found = int(flagged.sum()), int((flagged & poisoned).sum())
    realised = proportion(num_flagged - num_found, num_flagged)
    return {
        "num_flagged": num_flagged,
        "num_flagged_poisoned": num_found,
        "false_discovery_proportion": {**asdict(realised), "value": false_discovery_proportion(flagged, poisoned)},
        "recall": asdict(proportion(num_found, int(poisoned.sum()))),
    }


def _score_row(scan: Scan, name: str) -> Numbers:
    row: Numbers = {"victim": detection_metrics(*scan.scores(name))}
    if scan.honest is None:
        return {**row, "honest": None, "difference": None}
    scores, poisoned = scan.scores(name)
    honest, _ = scan.scores(name, "honest")
    return {
        **row,
        "honest": detection_metrics(honest, poisoned),
        "difference": asdict(auroc_difference(scores, honest, poisoned)),
    }


def _without_nan(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


# ----------------------------------------------------------------------------------------------------- words and table


REFUSED = "no number of the detector is quoted, as it would say nothing about the detector; metrics.json has them all"


def table(metrics: Numbers) -> str:
    """The short Markdown table: the gate, the decision, one row per score with its honest control.

    Where the victim did not pass its gate there is nothing that a detector could have found, and no number to quote.
    """
    lines = [f"**VOID: {metrics['void']}.**\n"] if metrics["void"] else []
    for head, one in metrics["gate"]["victim"].items():
        control = (metrics["gate"]["honest"] or {}).get(head)
        lines.append(
            f"- {head.replace('_', '-')}: CA {share_text(one['ca'])}, ASR {share_text(one['asr'])}; "
            + (
                f"honest victim: CA {share_text(control['ca'])}, ASR {share_text(control['asr'])}"
                if control
                else "no honest victim"
            )
        )
    lines.append(f"- activation gate: {'passed' if metrics['gate']['passes'] else 'NOT passed'}")
    if metrics["void"]:
        lines.append(f"- {REFUSED}")
        return "\n".join(lines)
    lines.append(f"- decision: {decision_in_words(metrics)}")
    if said := promise_in_words(metrics):
        lines.append(f"- {said}")
    lines.append("")
    lines.append("| score | victim AUROC | honest AUROC | difference | AP | TPR at FPR 1 % | TPR at FPR 0.1 % |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in metrics["scores"].items():
        cells = [
            f"{name} (control)" if row["is_control"] else name,
            auroc_text(row["victim"]),
            auroc_text(row["honest"]),
            difference_text(row["difference"]),
            *(number_text(row["victim"][key]) for key in ("average_precision", "tpr_at_fpr_1pct", "tpr_at_fpr_0_1pct")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    counts = metrics["counts"]
    unreadable = sum(counts["unreadable"].values())
    lines.append(
        f"\n{counts['poisoned']:,} poisoned of {counts['samples']:,} samples, {unreadable:,} unreadable. Brackets: "
        "95 % intervals. Honest: the same images scored with a victim that has no backdoor."
    )
    return "\n".join(lines)


def decision_in_words(metrics: Numbers) -> str:
    """The rule, what it declared, and what it turned out to be."""
    decision = metrics["decision"]
    words = f"{rule_text(decision)} on {decision['score']}: {decision['num_flagged']:,} flagged"
    if decision["num_flagged"]:
        words += (
            f", {decision['num_flagged_poisoned']:,} of them poisoned; realised false-discovery proportion "
            f"{share_text(decision['false_discovery_proportion'])}"
        )
    words += f"; recall {share_text(decision['recall'])}; "
    if decision["certified"]:
        return words + decision.get("mode", "certified")
    return words + (decision["message"] if decision["rule"] == "conformal" else "promises no error rate for the list")


def promise_in_words(metrics: Numbers) -> str:
    """What a certified rate means for this one list; empty where there is none."""
    decision = metrics["decision"]
    q, num = decision["declared"].get("q"), decision["num_flagged"]
    if q is None or not num or not decision["certified"]:
        return ""
    usual = int(binom.ppf(0.975, num, q))
    return (
        f"The declared {q:.0%} is about the average of such lists, over draws of the calibration samples: of a single "
        f"list of {num:,}, {usual:,} clean samples ({usual / num:.0%}) are no surprise; here it is "
        f"{num - decision['num_flagged_poisoned']:,}"
    )


def rule_text(decision: Numbers) -> str:
    declared = decision["declared"]
    name, value = {
        "conformal": ("conformal, false-discovery rate declared at most", declared.get("q")),
        "clean_quantile": ("clean quantile, FPR", declared.get("fpr")),
        "empirical_null": ("empirical null, share of clean samples estimated at most", declared.get("q")),
        "fixed": ("fixed threshold", declared.get("threshold")),
        "assumed_rate": ("assumed poison rate", declared.get("rate")),
        "paper_mean": ("mean of the calibration scores (DeDe's text)", None),
        "compat_median": ("median of the judged scores (DeDe's code; an oracle, right where half is poisoned)", None),
    }.get(decision["rule"], (decision["rule"], None))
    return name if value is None else f"{name} {value:g}"


def reading(metrics: Numbers) -> list[str]:
    """Say in sentences whether the judged score sees the backdoor, from the numbers alone."""
    judged = metrics["decision"]["score"]
    row = metrics["scores"].get(judged)
    if row is None or row["victim"]["auroc"] is None:
        return ["With no poisoned or no clean samples there is nothing to separate."]
    auroc = row["victim"]["auroc"]
    said = [
        f"Decisions were made on {judged}. It ranks a poisoned sample above a clean one {auroc:.1%} of the time "
        "(AUROC; 50% is guessing)."
    ]
    if row["honest"] is None:
        said.append("There is no honest victim beside it, so a visible stamp may explain all of this.")
    else:
        difference = row["difference"]
        sees = difference["low"] is not None and difference["low"] > 0
        said.append(
            f"With the honest victim, on the same images, it is {row['honest']['auroc']:.1%}: "
            + (
                "the difference is what the backdoored victim adds."
                if sees
                else "no clear difference, so what it sees, if anything, is the stamp and not the backdoor."
            )
        )
    controls = {n: abs(r["victim"]["auroc"] - 0.5) for n, r in metrics["scores"].items() if r["is_control"]}
    if controls:
        best = max(controls, key=lambda name: controls[name])
        value = metrics["scores"][best]["victim"]["auroc"]
        verb = "separates at least as well" if controls[best] >= auroc - 0.5 else "separates less"
        said.append(f"The strongest control, {best}, which never sees the victim, {verb} (AUROC {value:.3f}).")
    return said


def share_text(interval: Numbers | None) -> str:
    if interval is None or interval["value"] is None:
        return "–"
    if interval["low"] is None:
        return f"{interval['value']:.1%}"
    return f"{interval['value']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"


def auroc_text(row: Numbers | None) -> str:
    if row is None or row["auroc"] is None:
        return "–"
    return f"{row['auroc']:.3f} [{row['auroc_low']:.3f}, {row['auroc_high']:.3f}]"


def difference_text(interval: Numbers | None) -> str:
    if interval is None or interval["value"] is None:
        return "–"
    limits = "" if interval["low"] is None else f" [{interval['low']:+.3f}, {interval['high']:+.3f}]"
    return f"{interval['value']:+.3f}{limits}"


def number_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
