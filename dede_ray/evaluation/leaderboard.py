"""The benchmark's tables and figures, and one Parquet file of their numbers, made from the scores of its cells.

Everything is computed from the cells' files: no model runs here. Table rows are means over the seeds. Whatever is
fitted to scores (normalisation by difficulty, fusion) is fitted to the clean calibration half alone; every list is
decided without labels.

Two kinds of columns are computed here from others: `<score>_fair`, a score without the part that image statistics
explain (scan/fusion.py, `Difficulty`), and `combined`, the fusion of some columns. Nothing is fitted to attacks, so
there is no attack to leave out.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats

from dede_ray.data.ledger import write_parquet
from dede_ray.data.sampling import by_halves
from dede_ray.metrics import auroc, average_precision, false_discovery_proportion, tpr_at_fpr
from dede_ray.runtime.config import Config, Mistake, read_json, write_atomically
from dede_ray.scan.decisions import Conformal
from dede_ray.scan.fusion import Difficulty, Fusion

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Scores = NDArray[np.float64]

PAPER = "dede_mean"
"""The published detector: `dede_sum` over a constant."""
DEFAULT = "dede_reverse"
"""The score that decisions are made on by default."""
SHOWN = (PAPER, DEFAULT, "xc_misplaced", "dao", "combined")
"""Scores whose lists are shown; all are judged."""
NO_SCORES = {"set", "sample_id", "label", "is_judged", "probe", "compat_head"}


FITTED_PARTS = ("clean", "triggered", "patch", "shuffled_clean", "shuffled_triggered")
"""Sets that have all streaming columns, so that others can be computed from them."""


class LeaderboardSettings(Config):
    """Which poison rates, lists and derived columns the tables show."""

    poison_rates: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.01, 0.001)
    """Poison rates of the mixtures; the tables quote these three, and leave out a rate for which clean images
    are too few. Lists are also decided on a corpus without poison."""
    num_mixtures: int = Field(20, ge=1)
    """Draws of each rare mixture and each seed."""
    num_lists: int = Field(20, ge=2)
    """Draws of calibration set and corpus, over all seeds, for the error of decided lists."""
    q: float = Field(0.1, gt=0, lt=1)
    false_alarm: float | None = Field(0.05, gt=0, lt=1)
    fair: tuple[str, ...] = ("dede_mean", "dede_reverse")
    """Columns that are also shown without the part that image statistics explain."""
    combined: Fusion = Fusion(columns=("dede_reverse", "xc_misplaced", "dao"))
    """Those of its columns that the run has are combined."""


# ------------------------------------------------------------------------------------------------ scores of a cell


@dataclass(frozen=True)
class _Cell:
    """The scores of one encoder under one seed."""

    case: str
    role: str
    seed: int
    table: pa.Table
    settings: LeaderboardSettings
    num_lists: int

    @cached_property
    def columns(self) -> list[str]:
        """Streaming scores; those computed here come last."""
        return [*self._found, *self._states]

    @cached_property
    def _found(self) -> list[str]:
        clean = self._set("clean")
        names = [name for name in self.table.column_names if name not in NO_SCORES]
        return [name for name in names if clean[name].null_count < len(clean)]

    def _covariates(self, found: Iterable[str]) -> list[str]:
        return [name for name in found if name.startswith("stat_")]

    def _combined(self, found: Iterable[str]) -> list[str]:
        return [name for name in self.settings.combined.columns if name in set(found)]

    def _set(self, name: str) -> pa.Table:
        return self.table.filter(pc.equal(self.table["set"], name))

    def has(self, part: str, name: str) -> bool:
        """Whether a set has a column."""
        table = self._set(part)
        return bool(len(table)) and name in table.column_names and not table[name].null_count

    def _plain(self, part: str, name: str) -> Scores:
        return self._set(part)[name].to_numpy(zero_copy_only=False).astype(np.float64)

    @cached_property
    def is_judged(self) -> NDArray[np.bool_]:
        """Which clean samples are judged: those that do not calibrate."""
        return self._set("clean")["is_judged"].to_numpy(zero_copy_only=False).astype(bool)

    @cached_property
    def clean_ids(self) -> list[str]:
        return self._set("clean")["sample_id"].to_pylist()

    @cached_property
    def is_fitted_on(self) -> NDArray[np.bool_]:
        """Which clean samples normalisation and fusion are fitted to: a part of the calibration half."""
        return by_halves(self.clean_ids, self.seed) & ~self.is_judged

    @cached_property
    def _states(self) -> dict[str, Any]:
        """Fitted state of each column computed here, by name; columns with too few samples are left out."""
        states: dict[str, Any] = {}
        rows, covariates = self.is_fitted_on, self._covariates(self._found)
        for base in self.settings.fair if covariates else ():
            if base in self._found:
                with contextlib.suppress(Mistake):
                    scores = self._plain("clean", base)[rows]
                    states[f"{base}_fair"] = Difficulty().fit(scores, self._matrix("clean", covariates)[rows])
        if members := self._combined(self._found):
            fusion = self.settings.combined.model_copy(update={"columns": tuple(members)})
            states["combined"] = fusion.fit({one: self._plain("clean", one)[rows] for one in members})
        return states

    def _matrix(self, part: str, names: Sequence[str]) -> Scores:
        return np.stack([self._plain(part, name) for name in names], axis=1)

    def scores(self, part: str, name: str) -> Scores:
        """A column of one set, computed here if it has to be; empty where the cell lacks the set."""
        key = (part, name)
        if key not in self._cache:
            self._cache[key] = self._score(part, name)
        return self._cache[key]

    @cached_property
    def _cache(self) -> dict[tuple[str, str], Scores]:
        return {}

    def _score(self, part: str, name: str) -> Scores:
        if not len(self._set(part)):
            return np.empty(0)
        if name not in self._states or part not in FITTED_PARTS:
            return self._plain(part, name)
        if name == "combined":
            members = self._combined(self._found)
            fusion = self.settings.combined.model_copy(update={"columns": tuple(members)})
            return fusion.apply(self._states[name], {one: self._plain(part, one) for one in members})
        base = self._plain(part, name.removesuffix("_fair"))
        return Difficulty().apply(self._states[name], base, self._matrix(part, self._covariates(self._found)))

    def explained(self, name: str) -> tuple[float, float]:
        """R^2 of the image statistics on clean samples, before and after normalisation."""
        state = self._states[name]
        return float(state["r2_before"]), float(state["r2_after"])


# ------------------------------------------------------------------------------------------------ numbers


Row = dict[str, Any]


def _numbers(cell: _Cell) -> Iterator[Row]:
    """Every number of one cell: mixture, column, metric, value."""
    settings, judged = cell.settings, cell.is_judged
    for name in cell.columns:
        clean, triggered = cell.scores("clean", name)[judged], cell.scores("triggered", name)
        for rate in dict.fromkeys((0.5, *settings.poison_rates)):
            for metric, value in _of_mixture(clean, triggered, rate, cell.seed, settings.num_mixtures).items():
                yield {"mixture": f"{rate:g}", "column": name, "metric": metric, "value": value}
        patch = cell.scores("patch", name)
        yield {"mixture": "patch", "column": name, "metric": "auroc", "value": _auroc(clean, patch)}
        shuffled = [cell.scores(f"shuffled_{kind}", name) for kind in ("clean", "triggered")]
        yield {"mixture": "shuffled", "column": name, "metric": "auroc", "value": _auroc(*shuffled)}
        if cell.has("misstamped", name):
            missed = cell.scores("misstamped", name)
            yield {"mixture": "misstamped", "column": name, "metric": "auroc", "value": _auroc(clean, missed)}
        if name in cell._states and name != "combined":
            for metric, value in zip(("r2_before", "r2_after"), cell.explained(name), strict=True):
                yield {"mixture": "clean", "column": name, "metric": metric, "value": value}
    yield from _small_sets(cell)
    yield from _decided(cell)


def _auroc(clean: Scores, poisoned: Scores) -> float:
    if not len(clean) or not len(poisoned):
        return math.nan
    return auroc(np.concatenate([clean, poisoned]), _labels(clean, poisoned)).value


def _labels(clean: Scores, poisoned: Scores) -> NDArray[np.bool_]:
    return np.concatenate([np.zeros(len(clean), bool), np.ones(len(poisoned), bool)])


def _of_mixture(clean: Scores, triggered: Scores, rate: float, seed: int, num_draws: int) -> dict[str, float]:
    """Metrics at a poison rate; where it takes only some of the triggered images, the mean over draws of them.

    Empty where there are too few clean images for one poisoned sample at this rate.
    """
    num = round(rate * len(clean) / (1 - rate))
    if not num:
        return {}
    if num >= len(triggered):
        kept = clean[: round(len(triggered) * (1 - rate) / rate)]
        draws = [(kept, triggered)]
    else:
        rng = np.random.default_rng([seed, num])
        draws = [(clean, triggered[rng.permutation(len(triggered))[:num]]) for _ in range(num_draws)]
    found = []
    for some_clean, some in draws:
        scores, labels = np.concatenate([some_clean, some]), _labels(some_clean, some)
        one = {
            "auroc": auroc(scores, labels).value,
            "average_precision": average_precision(scores, labels),
            "tpr_at_fpr_1pct": tpr_at_fpr(scores, labels, 0.01),
        }
        if len(some_clean) >= 1000:
            one["tpr_at_fpr_0_1pct"] = tpr_at_fpr(scores, labels, 0.001)
        found.append(one)
    return {metric: float(np.mean([one[metric] for one in found])) for metric in found[0]}


def _small_sets(cell: _Cell) -> Iterator[Row]:
    """Second-stage detectors, and those that judge a half-poisoned pool at once."""
    for kind, mixture in (("second", "second_stage"), ("pool", "compat_pool"), ("asset", "compat_pool")):
        table = cell._set(f"{kind}_clean")
        for name in table.column_names if len(table) else []:
            if name in NO_SCORES or table[name].null_count:
                continue
            clean, triggered = cell.scores(f"{kind}_clean", name), cell.scores(f"{kind}_triggered", name)
            yield {"mixture": mixture, "column": name, "metric": "auroc", "value": _auroc(clean, triggered)}


def _decided(cell: _Cell) -> Iterator[Row]:
    """Lists decided without labels: calibration set and corpus drawn anew each time from the clean test images."""
    settings = cell.settings
    rule = Conformal(q=settings.q, false_alarm=settings.false_alarm)
    for name in cell.columns:
        clean, triggered = cell.scores("clean", name), cell.scores("triggered", name)
        if name == "combined" or name.endswith("_fair"):  # samples that these were fitted to cannot give p-values
            clean = clean[~cell.is_fitted_on]
        for draw in range(cell.num_lists):
            rng = np.random.default_rng([cell.seed, draw])
            order, half = rng.permutation(len(clean)), len(clean) // 2
            calibration, corpus = clean[order[:half]], clean[order[half:]]
            for rate in (0.01, 0.0):
                num = min(round(rate * len(corpus) / (1 - rate)), len(triggered))
                if rate and not num:
                    continue  # so small a corpus has no poison at this rate
                some = triggered[rng.permutation(len(triggered))[:num]]
                scores = np.concatenate([corpus, some])
                verdict = rule.decide(scores, calibration, [f"{draw}/{i}" for i in range(len(scores))])
                labels = _labels(corpus, some)
                found = {"flagged": float(verdict.flagged.sum()), "is_empty": float(not verdict.flagged.any())}
                if rate:
                    found["fdp"] = false_discovery_proportion(verdict.flagged, labels)
                    found["recall"] = float(verdict.flagged[labels].mean())
                for metric, value in found.items():
                    yield {"mixture": f"list {rate:g}", "column": name, "metric": metric, "value": value, "draw": draw}


# ------------------------------------------------------------------------------------------------ writing the tables


@dataclass(frozen=True)
class Rows:
    """All numbers, with look-ups by case, role, mixture, column and metric."""

    rows: Sequence[Row]

    @cached_property
    def _by_key(self) -> dict[tuple[str, str, str, str, str], list[float]]:
        found: dict[tuple[str, str, str, str, str], list[float]] = {}
        for row in self.rows:
            key = (row["case"], row["role"], row["mixture"], row["column"], row["metric"])
            found.setdefault(key, []).append(row["value"])
        return found

    def values(self, case: str, role: str, mixture: str, column: str, metric: str) -> Scores:
        """One value per seed, or per seed and draw."""
        found = np.array(self._by_key.get((case, role, mixture, column, metric), []), np.float64)
        return found[~np.isnan(found)]

    def mean(self, case: str, role: str, mixture: str, column: str, metric: str) -> float:
        found = self.values(case, role, mixture, column, metric)
        return float(found.mean()) if len(found) else math.nan

    def columns(self, case: str, mixture: str) -> list[str]:
        """Columns of a case's victim, in the order of the cells."""
        here = (
            r["column"] for r in self.rows if r["case"] == case and r["mixture"] == mixture and r["role"] == "victim"
        )
        return list(dict.fromkeys(here))


@dataclass(frozen=True)
class About:
    """What the tables need to know about a case."""

    roles: Sequence[str]
    """`victim` and `honest` first."""
    target_label: int


def write_leaderboard(
    settings: LeaderboardSettings, output: Path, cases: Mapping[str, About], seeds: Sequence[int]
) -> str:
    """Read every cell; write results.parquet, table.md and the figures.

    Args:
        settings: which rates, lists and derived columns to show.
        output: the benchmark's folder.
        cases: by name.
        seeds: the seeds of the cells.

    Returns:
        The tables.
    """
    num_lists = -(-settings.num_lists // len(seeds))
    numbers: list[Row] = []
    compat: dict[str, dict[str, Row]] = {}
    for case, about in cases.items():
        for role in about.roles:
            for seed in seeds:
                table = pq.read_table(output / "cells" / f"{case}-{role}-{seed}.parquet")
                cell = _Cell(case, role, seed, table, settings, num_lists)
                numbers += [{"case": case, "role": role, "seed": seed, "draw": 0, **row} for row in _numbers(cell)]
                if seed == seeds[0] and PAPER in cell.columns:
                    compat.setdefault(case, {})[role] = _published_protocol(cell, about.target_label)
    names = ("case", "role", "seed", "mixture", "column", "metric", "draw", "value")
    write_parquet(pa.table({name: [row[name] for row in numbers] for name in names}), output / "results.parquet")
    rows = Rows(numbers)
    gates = {case: read_json(output / "gates" / f"{case}.json", "verdict of a gate") for case in cases}
    valid = [case for case in cases if gates[case]["passes"]]
    parts = [
        _about(cases, seeds, gates, settings),
        _best(rows, valid),
        _lists(rows, valid, settings),
        *(_of_case(rows, case, about.roles, gates[case], output) for case, about in cases.items()),
        _compat(rows, valid, compat),
    ]
    said = "\n\n".join(parts)
    write_atomically(output / "table.md", said + "\n")
    for name, picture in figures(rows, valid, settings).items():
        write_atomically(output / "figures" / f"{name}.png", picture)
    return said


def _spread(values: Scores) -> str:
    """Mean over the seeds, and its 95 % t-interval."""
    if not len(values):
        return "–"
    mean = float(values.mean())
    if len(values) < 2:
        return f"{mean:.3f}"
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return f"{mean:.3f} ± {half:.3f}"


def _standard_error(values: Scores) -> float:
    """Standard error of the mean; 0 where there is one value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _about(
    cases: Mapping[str, Any], seeds: Sequence[int], gates: Mapping[str, Any], settings: LeaderboardSettings
) -> str:
    void = [case for case in cases if not gates[case]["passes"]]
    return (
        f"{len(cases)} cases, {len(seeds)} seeds (of draw, decoder, fits and masks; the victims are the same ones). "
        "Means over the seeds ± half of the 95 % t-interval. Honest: the same images, an encoder without a backdoor. "
        + (f"VOID, because the backdoor does not work: {', '.join(void)}." if void else "All victims pass their gate.")
    )


def _is_control(column: str) -> bool:
    """Columns that detectors must beat, whatever `name` they end in."""
    is_null = column == "dede_null" or (column.startswith("dede_null_") and not column.startswith("dede_null_ratio"))
    return column.startswith("stat_") or is_null


def _best(rows: Rows, cases: Sequence[str]) -> str:
    """Plain DeDe, our default and the best score, which only an oracle could choose."""
    lines = [
        "| victim | score | AUROC | honest | TPR at FPR 1 % | AP at 1 % poison |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases:
        best = best_column(rows, case)
        for column, words in ((PAPER, "DeDe"), (DEFAULT, DEFAULT), (best, f"{best} (oracle: the best here)")):
            if column is None or (column == best and best in (PAPER, DEFAULT) and words.endswith("here)")):
                continue
            if column not in rows.columns(case, "0.5"):
                continue
            cells = [
                _spread(rows.values(case, "victim", "0.5", column, "auroc")),
                _spread(rows.values(case, "honest", "0.5", column, "auroc")),
                f"{rows.mean(case, 'victim', '0.5', column, 'tpr_at_fpr_1pct'):.3f}",
                f"{rows.mean(case, 'victim', '0.01', column, 'average_precision'):.3f}",
            ]
            lines.append(f"| {case} | {words} | {' | '.join(cells)} |")
    return "## Plain DeDe, the default, the best\n\n" + "\n".join(lines)


def best_column(rows: Rows, case: str, honest: tuple[float, float] = (0.45, 0.6)) -> str | None:
    """The streaming score of highest AUROC among those that leave the honest victim's images alone."""
    candidates = [
        (rows.mean(case, "victim", "0.5", column, "auroc"), column)
        for column in rows.columns(case, "0.5")
        if not _is_control(column) and honest[0] <= rows.mean(case, "honest", "0.5", column, "auroc") <= honest[1]
    ]
    return max(candidates)[1] if candidates else None


def _lists(rows: Rows, cases: Sequence[str], settings: LeaderboardSettings) -> str:
    num_drawn = max((len(rows.values(case, "victim", "list 0", PAPER, "is_empty")) for case in cases), default=0)
    lines = [
        f"Lists decided by conformal p-values and Benjamini-Hochberg at q = {settings.q:g}, false alarm "
        f"{settings.false_alarm}, without labels; calibration set and corpus drawn anew {num_drawn} times. "
        "FDP: realised share of clean samples among the flagged, 1 % poison, mean and standard error. Empty: share of "
        "the lists without an entry where nothing is poisoned.\n",
        "| victim | score | FDP | recall | empty without poison |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in cases:
        for column in SHOWN:
            fdp = rows.values(case, "victim", "list 0.01", column, "fdp")
            if not len(fdp):
                continue
            error = _standard_error(fdp)
            recall = rows.mean(case, "victim", "list 0.01", column, "recall")
            empty = rows.mean(case, "victim", "list 0", column, "is_empty")
            lines.append(f"| {case} | {column} | {fdp.mean():.3f} ± {error:.3f} | {recall:.3f} | {empty:.0%} |")
    broken = list(broken_promises(rows, cases, settings))
    num_scores = len({column for case in cases for column in rows.columns(case, "list 0.01")})
    if not num_scores:
        return "## What the lists promise\n\nNo list was decided: no victim is valid, or there are too few images."
    verdict = f"not kept by {', '.join(broken)}" if broken else "kept everywhere"
    lines.append(
        f"\nOver all {num_scores} scores and {len(cases)} victims, the promise (FDP at most q plus two standard "
        f"errors, at least 90 % of the lists empty without poison) is {verdict}."
    )
    return "## What the lists promise\n\n" + "\n".join(lines)


def broken_promises(rows: Rows, cases: Iterable[str], settings: LeaderboardSettings) -> Iterator[str]:
    """Victims and scores whose lists are worse than declared."""
    for case in cases:
        for column in rows.columns(case, "list 0.01"):
            fdp = rows.values(case, "victim", "list 0.01", column, "fdp")
            if fdp.mean() > settings.q + 2 * _standard_error(fdp):
                yield f"{case}/{column} (FDP {fdp.mean():.3f})"
            empty = rows.mean(case, "victim", "list 0", column, "is_empty")
            if empty < 0.9:
                yield f"{case}/{column} ({empty:.0%} empty)"


def _of_case(rows: Rows, case: str, roles: Sequence[str], gate: Mapping[str, Any], output: Path) -> str:
    """The section of one case."""
    lines = [f"## {case}", "", f"Gate: {'passed' if gate['passes'] else 'VOID'}; {gate['reason']}.", ""]
    if not gate["passes"]:
        return "\n".join([*lines, "No number of a detector is quoted; results.parquet has them."])
    others = [role for role in roles if role != "victim"]
    head = [
        "score",
        "victim AUROC",
        *others,
        "unlearned patch",
        "shuffled",
        "TPR at FPR 1 %",
        "0.1 %",
        "AP, 1 %",
        "0.1 %",
    ]
    lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for column in rows.columns(case, "0.5"):
        cells = [
            f"{column} (control)" if _is_control(column) else column,
            *(_spread(rows.values(case, role, "0.5", column, "auroc")) for role in ("victim", *others)),
            *(f"{rows.mean(case, 'victim', mixture, column, 'auroc'):.3f}" for mixture in ("patch", "shuffled")),
            *(f"{rows.mean(case, 'victim', '0.5', column, f'tpr_at_fpr_{fpr}pct'):.3f}" for fpr in ("1", "0_1")),
            *(f"{rows.mean(case, 'victim', rate, column, 'average_precision'):.3f}" for rate in ("0.01", "0.001")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    second = rows.columns(case, "second_stage")
    if second:
        lines += ["", f"| many forward passes, few images | victim AUROC | {' | '.join(others)} |"]
        lines.append("| --- | --- |" + " --- |" * len(others))
        for column in second:
            found = [f"{rows.mean(case, role, 'second_stage', column, 'auroc'):.3f}" for role in ("victim", *others)]
            lines.append(f"| {column} | {' | '.join(found)} |")
    stamps = {role: output / "stamps" / f"{case}-{role}.json" for role in roles}
    found = [f"{role} {read_json(path, 'stamp')['pl1']:.3f}" for role, path in stamps.items() if path.is_file()]
    if found:
        lines += ["", f"DECREE, one inversion each: PL1 {', '.join(found)} (below 0.1 is taken for backdoored)."]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ compat


def _published_protocol(cell: _Cell, target: int) -> Row:
    """DeDe's Tables 1, 2 and P1 on our scores: a pool cut at its median, and what that does downstream."""
    judged = cell.is_judged
    num = min(int(judged.sum()), len(cell.scores("triggered", PAPER)))
    clean, triggered = cell.scores("clean", PAPER)[judged][:num], cell.scores("triggered", PAPER)[:num]
    cut = float(np.median(np.concatenate([clean, triggered])))
    is_kept, is_found = clean <= cut, triggered > cut
    is_right = (cell._plain("clean", "compat_head") == cell._plain("clean", "label"))[judged][:num]
    is_target = cell._plain("triggered", "compat_head")[:num] == target
    rare = triggered[: max(1, len(clean) // 100)]
    tenth = float(np.quantile(np.concatenate([clean, rare]), 0.9))
    return {
        "tpr": is_found.mean(), "fpr": (~is_kept).mean(), "auroc": _auroc(clean, triggered),
        "p1_tpr": (rare > tenth).mean(), "p1_fpr": (clean > tenth).mean(),
        "ca": (is_right.mean(), is_right[is_kept].mean()), "asr": (is_target.mean(), (is_target & ~is_found).mean()),
    }  # fmt: skip


def _compat(rows: Rows, cases: Sequence[str], protocol: Mapping[str, Mapping[str, Row]]) -> str:
    """The published protocols, artefacts included."""
    lines = [
        "## compat: published protocols, artefacts included",
        "",
        "None of these numbers is evidence. *Mis-stamped*: image, mask and patch are normalised and then laid over "
        "each other, as in published code. The mask's zeros become about -2.4, so the whole picture turns into a "
        "negative, far outside of what pixels can be: any score that looks at pixels tells it from a picture, on the "
        "honest victim just as well, and so does the energy of the image alone. **Void.** *Median* (oracle): half of "
        "the pool is poisoned and the threshold is its median, so TPR + FPR = 100 % whatever is detected. *P1* "
        "(oracle): 1 % poison, the highest tenth of the pool is flagged. *CA, ASR*: two-layer classifier, before and "
        "after dropping what the median flags; the CA leaves out that the clean images above it are lost. *Pool*: "
        "scores that depend on who else is in the batch (DAO as published, half of it poisoned), or on labels that "
        "give the trigger away (ASSET).",
        "",
        "| victim | role | mis-stamped AUROC | median TPR / FPR / AUROC | P1 TPR / FPR | CA | ASR | DAO | ASSET |",
        "| --- " * 9 + "|",
    ]
    for case in cases:
        for role, found in protocol.get(case, {}).items():
            dao, asset = (rows.mean(case, role, "compat_pool", one, "auroc") for one in ("compat_dao", "compat_asset"))
            cells = [
                case,
                role,
                _spread(rows.values(case, role, "misstamped", PAPER, "auroc")),
                f"{found['tpr']:.1%} / {found['fpr']:.1%} / {found['auroc']:.3f}",
                f"{found['p1_tpr']:.1%} / {found['p1_fpr']:.1%}",
                " → ".join(f"{share:.1%}" for share in found["ca"]),
                " → ".join(f"{share:.1%}" for share in found["asr"]),
                f"{dao:.3f}",
                f"{asset:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ figures


def figures(rows: Rows, cases: Sequence[str], settings: LeaderboardSettings) -> dict[str, bytes]:
    """PNG files by name: AUROC of victims and honest twins, and how well the lists kept their promise."""
    if not cases:
        return {}
    found = {"auroc": _auroc_figure(rows, cases)}
    shown = {column for case in cases for column in rows.columns(case, "list 0.01")}
    if columns := [name for name in SHOWN if name in shown]:
        found["lists"] = _lists_figure(rows, cases, columns, settings)
    return found


def _auroc_figure(rows: Rows, cases: Sequence[str]) -> bytes:
    columns = list(dict.fromkeys(column for case in cases for column in rows.columns(case, "0.5")))
    roles = ("victim", "honest")
    figure, axes = plt.subplots(1, 2, figsize=(3 + 1.1 * 2 * len(cases), 1.2 + 0.27 * len(columns)), sharey=True)
    for axis, role in zip(axes, roles, strict=True):
        area = np.array([[rows.mean(case, role, "0.5", column, "auroc") for case in cases] for column in columns])
        image = axis.imshow(area, cmap="RdBu_r", vmin=0, vmax=1, aspect="auto")
        for (row, place), value in np.ndenumerate(area):
            shade = "white" if abs(value - 0.5) > 0.35 else "black"
            axis.text(place, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
        axis.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=8)
        axis.set_title({"victim": "backdoored victim", "honest": "honest twin, same images"}[role], fontsize=10)
    axes[0].set_yticks(range(len(columns)), columns, fontsize=8)
    figure.colorbar(image, ax=axes, label="AUROC, triggered against clean", fraction=0.03)
    return _png(figure)


def _lists_figure(rows: Rows, cases: Sequence[str], columns: Sequence[str], settings: LeaderboardSettings) -> bytes:
    figure, axes = plt.subplots(1, 2, figsize=(3 + 1.3 * len(cases), 3.6))
    width = 0.8 / len(columns)
    for place, column in enumerate(columns):
        for axis, metric in zip(axes, ("fdp", "recall"), strict=True):
            found = [rows.values(case, "victim", "list 0.01", column, metric) for case in cases]
            there = [number for number, one in enumerate(found) if len(one) > 1]
            axis.bar(
                np.array(there) + place * width, [found[i].mean() for i in there], width, label=column,
                yerr=[2 * _standard_error(found[i]) for i in there], error_kw={"linewidth": 0.8},
            )  # fmt: skip
    axes[0].axhline(settings.q, color="black", linestyle="--", linewidth=1)
    for axis, title in zip(
        axes, (f"false-discovery proportion, q = {settings.q:g}", "recall at 1 % poison"), strict=True
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xticks(np.arange(len(cases)) + 0.4 - width / 2, cases, rotation=30, ha="right", fontsize=8)
    axes[1].legend(fontsize=7)
    return _png(figure)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()
