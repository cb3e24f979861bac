"""How the detectors stand: from the scores of the benchmark's cells to tables, figures and one Parquet file of numbers.

Everything is a function of the cells' files: no model runs here. Rows are means over the seeds. What learns from scores
(normalisation by difficulty, fusion) learns from the clean calibration half alone; every list is decided without labels.

Columns that are made here of others: `<score>_fair`, which is without what image statistics explain (fusion.Difficulty),
and `combined`, the fusion of some columns. No column was fitted on any poison, so there is none to leave out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from dede_ray.config import Config
from dede_ray.decisions import Conformal
from dede_ray.fusion import Difficulty, Fusion, split_calibration
from dede_ray.ledger import write_parquet
from dede_ray.metrics import auroc, average_precision, false_discovery_proportion, tpr_at_fpr

Scores = NDArray[np.float64]

PAPER = "dede_mean"
"""The published detector: `dede_sum` over a constant."""
NO_SCORES = {"set", "sample_id", "label", "is_judged", "probe", "compat_head"}


FITTED_PARTS = ("clean", "triggered", "patch", "shuffled_clean", "shuffled_triggered", "misstamped")
"""Sets that have all streaming columns, so that others can be made of them."""


class Standing(Config):
    """What is asked of the scores."""

    poison_rates: tuple[float, ...] = (0.5, 0.01, 0.001)
    """Of the mixtures; lists are also decided on one without poison."""
    num_mixtures: int = Field(20, ge=1)
    """Draws of each rare mixture and each seed."""
    num_lists: int = Field(20, ge=2)
    """Draws of calibration set and corpus, over all seeds, for the error of decided lists."""
    q: float = Field(0.1, gt=0, lt=1)
    false_alarm: float | None = Field(0.05, gt=0, lt=1)
    fair: tuple[str, ...] = ("dede_mean", "dede_reverse")
    """Columns that are also given without what image statistics explain."""
    combined: Fusion = Fusion(columns=("dede_reverse", "xc", "dao"))
    """Columns are taken as far as the run has them."""


# ------------------------------------------------------------------------------------------------ scores of a cell


@dataclass(frozen=True)
class _Cell:
    """The scores of one encoder under one seed."""

    case: str
    role: str
    seed: int
    table: pa.Table
    standing: Standing
    num_lists: int

    @cached_property
    def columns(self) -> list[str]:
        """Streaming scores, those made here last."""
        clean = self._set("clean")
        found = [
            name for name in self.table.column_names if name not in NO_SCORES and clean[name].null_count < len(clean)
        ]
        made = [f"{name}_fair" for name in self.standing.fair if name in found and self._covariates(found)]
        combined = ["combined"] if self._combined(found) else []
        return [*found, *made, *combined]

    def _covariates(self, found: Iterable[str]) -> list[str]:
        return [name for name in found if name.startswith("stat_")]

    def _combined(self, found: Iterable[str]) -> list[str]:
        return [name for name in self.standing.combined.columns if name in set(found)]

    def _set(self, name: str) -> pa.Table:
        return self.table.filter(pa.compute.equal(self.table["set"], name))

    def _plain(self, part: str, name: str) -> Scores:
        return self._set(part)[name].to_numpy(zero_copy_only=False).astype(np.float64)

    @cached_property
    def is_judged(self) -> NDArray[np.bool_]:
        """Of the clean samples, those that do not calibrate."""
        return self._set("clean")["is_judged"].to_numpy(zero_copy_only=False).astype(bool)

    @cached_property
    def clean_ids(self) -> list[str]:
        return self._set("clean")["sample_id"].to_pylist()

    @cached_property
    def is_fitted_on(self) -> NDArray[np.bool_]:
        """Of the clean samples, the part of the calibration half that normalisation and fusion learn from."""
        return split_calibration(self.clean_ids, self.seed) & ~self.is_judged

    @cached_property
    def _states(self) -> dict[str, Any]:
        """By name, what each column made here has learnt; those for which there are too few samples are not made."""
        states: dict[str, Any] = {}
        rows, covariates = self.is_fitted_on, self._covariates(self._found)
        for base in self.standing.fair if covariates else ():
            if base in self._found:
                with contextlib.suppress(Mistake):
                    scores = self._plain("clean", base)[rows]
                    states[f"{base}_fair"] = Difficulty().fit(scores, self._matrix("clean", covariates)[rows])
        if members := self._combined(self._found):
            fusion = self.standing.combined.model_copy(update={"columns": tuple(members)})
            states["combined"] = fusion.fit({one: self._plain("clean", one)[rows] for one in members})
        return states

    def _matrix(self, part: str, names: Sequence[str]) -> Scores:
        return np.stack([self._plain(part, name) for name in names], axis=1)

    def scores(self, part: str, name: str) -> Scores:
        """A column of one set, made here where it has to be; empty where the set is not there."""
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
            fusion = self.standing.combined.model_copy(update={"columns": tuple(members)})
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
    standing, judged = cell.standing, cell.is_judged
    for name in cell.columns:
        clean, triggered = cell.scores("clean", name)[judged], cell.scores("triggered", name)
        for rate in standing.poison_rates:
            for metric, value in _of_mixture(clean, triggered, rate, cell.seed, standing.num_mixtures).items():
                yield {"mixture": f"{rate:g}", "column": name, "metric": metric, "value": value}
        patch = cell.scores("patch", name)
        yield {"mixture": "patch", "column": name, "metric": "auroc", "value": _auroc(clean, patch)}
        shuffled = [cell.scores(f"shuffled_{kind}", name) for kind in ("clean", "triggered")]
        yield {"mixture": "shuffled", "column": name, "metric": "auroc", "value": _auroc(*shuffled)}
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
    return auroc(np.concatenate([clean, poisoned]), _labels(clean, poisoned)).value or math.nan


def _labels(clean: Scores, poisoned: Scores) -> NDArray[np.bool_]:
    return np.concatenate([np.zeros(len(clean), bool), np.ones(len(poisoned), bool)])


def _of_mixture(clean: Scores, triggered: Scores, rate: float, seed: int, num_draws: int) -> dict[str, float]:
    """Metrics at a poison rate; where it takes only some of the triggered images, the mean over draws of them."""
    num = round(rate * len(clean) / (1 - rate))
    if num >= len(triggered):
        kept = clean[: round(len(triggered) * (1 - rate) / rate)]
        draws = [(kept, triggered)]
    else:
        rng = np.random.default_rng([seed, num])
        draws = [(clean, triggered[rng.permutation(len(triggered))[: max(1, num)]]) for _ in range(num_draws)]
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
    standing = cell.standing
    rule = Conformal(q=standing.q, false_alarm=standing.false_alarm)
    for name in cell.columns:
        clean, triggered = cell.scores("clean", name), cell.scores("triggered", name)
        if name == "combined" or name.endswith("_fair"):  # what these were fitted on gives no p-values
            clean = clean[~cell.is_fitted_on]
        for draw in range(cell.num_lists):
            rng = np.random.default_rng([cell.seed, draw])
            order, half = rng.permutation(len(clean)), len(clean) // 2
            calibration, corpus = clean[order[:half]], clean[order[half:]]
            for rate in (0.01, 0.0):
                num = min(round(rate * len(corpus) / (1 - rate)), len(triggered))
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


def _compat_rows(cells: Mapping[tuple[str, str, int], _Cell], case: str, seed: int, target: int) -> Row:
    """DeDe's published protocol on our scores: a half-poisoned pool, cut at its median, and the downstream task."""
    cell = cells[case, "victim", seed]
    judged = cell.is_judged
    num = min(int(judged.sum()), len(cell.scores("triggered", PAPER)))
    clean, triggered = cell.scores("clean", PAPER)[judged][:num], cell.scores("triggered", PAPER)[:num]
    cut = float(np.median(np.concatenate([clean, triggered])))
    is_clean_kept, is_found = clean <= cut, triggered > cut
    predicted = {part: cell._plain(part, "compat_head")[:num] for part in ("clean", "triggered")}
    labels = cell._plain("clean", "label")[judged][:num]
    is_right = cell._plain("clean", "compat_head")[judged][:num] == labels
    is_target = predicted["triggered"] == target
    return {
        "tpr": float(is_found.mean()), "fpr": float(1 - is_clean_kept.mean()), "auroc": _auroc(clean, triggered),
        "ca_before": float(is_right.mean()), "asr_before": float(is_target.mean()),
        "ca_after": float(is_right[is_clean_kept].mean()), "asr_after": float((is_target & ~is_found).mean()),
        "clean_lost": float(1 - is_clean_kept.mean()),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ telling


def tell(standing: Standing, output: Path, cases: Mapping[str, Sequence[str]], seeds: Sequence[int]) -> str:
    """Read every cell, and write results.parquet, table.md and the figures.

    Returns:
        The tables.
    """
    num_lists = -(-standing.num_lists // len(seeds))
    rows: list[Row] = []
    cells: dict[tuple[str, str, int], _Cell] = {}
    for case, roles in cases.items():
        for role in roles:
            for seed in seeds:
                table = pq.read_table(output / "cells" / f"{case}-{role}-{seed}.parquet")
                cell = cells[case, role, seed] = _Cell(case, role, seed, table, standing, num_lists)
                rows += [{"case": case, "role": role, "seed": seed, "draw": 0, **row} for row in _numbers(cell)]
    names = ("case", "role", "seed", "mixture", "column", "metric", "draw", "value")
    results = pa.table({name: [row[name] for row in rows] for name in names})
    write_parquet(results, output / "results.parquet")
    return ""
