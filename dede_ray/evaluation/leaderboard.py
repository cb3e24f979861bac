"""The benchmark's tables and figures, and one Parquet file of their numbers, made from the scores of its cells.

Everything is computed from the cells' files: no model runs here. Table rows are means over the seeds. Every list is
decided without labels and as `dede-ray score` decides: by `scan.judge.judge`, on corpus and calibration samples that
are drawn anew each time, from what the detectors were fitted on (in sample, as a user has them) and from what nothing
has seen. Whatever a list is made of, such as `combined` or `company`, is made there.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product, starmap
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
from dede_ray.metrics import auroc, average_precision, false_discovery_proportion, tpr_at_fpr
from dede_ray.models.embedding import matrix
from dede_ray.runtime.config import Config, read_json, write_atomically
from dede_ray.scan.decisions import Conformal
from dede_ray.scan.fusion import Fusion
from dede_ray.scan.judge import Judged, Judging, Scored, choose, judge
from dede_ray.scan.pool import Classifier, Company

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Scores = NDArray[np.float64]

PAPER = "dede_mean"
"""The published detector: `dede_sum` over a constant."""
DEFAULT = "dede_reverse"
"""The score that decisions are made on by default."""
CHOSEN = "chosen"
"""The list whose column `scan.judge.choose` chose."""
DECIDED = ("suspected", "clean", "triggered")
"""Sets that corpora and calibration samples are drawn from."""
NO_SCORES = {"set", "sample_id", "label", "compat_head"}
WHERE = ("in sample", "unseen")
LEAST_CORPUS = 100
"""Clean samples that a corpus has at least."""

LISTS: dict[str, Judging] = {
    "dede_reverse": Judging(),
    "xc_misplaced": Judging(),
    "combined": Judging(combined=Fusion(columns=("dede_reverse", "xc_misplaced"))),
    "company": Judging(company=Company()),
    "company_xc": Judging(company=Company(of="xc_misplaced", residual="xc_residual")),
    "classifier": Judging(classifier=Classifier()),
}


class LeaderboardSettings(Config):
    """Which poison rates and lists the tables show."""

    poison_rates: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.01, 0.001)
    """Poison rates of the mixtures; the tables quote these three, and leave out a rate for which clean images
    are too few."""
    num_mixtures: int = Field(20, ge=1)
    """Draws of each rare mixture and each seed."""
    num_lists: int = Field(21, ge=2)
    """Draws of calibration samples and corpus, over all seeds, for the error of decided lists."""
    list_rates: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((0.01, 0.003, 0.001), min_length=1)
    """Poison rates of decided corpora, beside corpora without poison; the tables are about the first."""
    calibration_sizes: tuple[Annotated[int, Field(gt=0)], ...] = Field((2500, 500, 5000), min_length=1)
    """Numbers of calibration samples; the tables are about the first, at which every score is decided on."""
    corpus_size: int = Field(5000, ge=LEAST_CORPUS)
    """Clean samples of a corpus, at most."""
    q: float = Field(0.1, gt=0, lt=1)
    false_alarm: float | None = Field(0.05, gt=0, lt=1)
    lists: dict[str, Judging] = LISTS
    """By name, what is decided on at every poison rate and number of calibration samples: the column that the settings
    make, or the one of this name where they make none. Lists that need what a run lacks are left out."""
    chosen_from: tuple[str, ...] = ("combined", "company", "company_xc", "dede_reverse", "xc_misplaced")
    """Lists of which `chosen` is one, chosen anew for each corpus without labels; of equal ones the
    first."""


# ------------------------------------------------------------------------------------------------ scores of a cell


@dataclass(frozen=True)
class _Cell:
    """The scores of one encoder under one seed."""

    seed: int
    table: pa.Table
    settings: LeaderboardSettings
    num_lists: int

    @cached_property
    def columns(self) -> list[str]:
        """Streaming scores."""
        clean = self._set("clean")
        numbers = [one.name for one in clean.schema if pa.types.is_floating(one.type)]
        return [name for name in numbers if clean[name].null_count < len(clean)]

    @cached_property
    def _sets(self) -> dict[str, pa.Table]:
        names = self.table["set"].unique().to_pylist()
        return {name: self.table.filter(pc.equal(self.table["set"], name)) for name in names}

    def _set(self, name: str) -> pa.Table:
        return self._sets.get(name, self.table.slice(0, 0))

    def has(self, part: str, name: str) -> bool:
        """Whether a set has a column."""
        table = self._set(part)
        return bool(len(table)) and name in table.column_names and not table[name].null_count

    def scores(self, part: str, name: str) -> Scores:
        """A column of one set; empty where the cell lacks the set."""
        return self._set(part)[name].to_numpy(zero_copy_only=False).astype(np.float64)

    def drawn_from(self, where: str) -> _Population | None:
        """What corpora and calibration samples are drawn from; None where the cell lacks it."""
        parts = [self._set(name) for name in (("suspected",) if where == "in sample" else ("clean", "triggered"))]
        table = pa.concat_tables(parts)
        if not len(table):
            return None
        ids, is_stamped = table["sample_id"].to_pylist(), np.arange(len(table)) >= len(parts[0])
        vectors = [one.name for one in table.schema if pa.types.is_fixed_size_list(one.type)]
        rows = {name: matrix(table[name]).numpy() for name in vectors}
        scored = Scored(
            sample_ids=ids,
            content_hash=table["content_hash"].to_pylist(),
            captions=[None] * len(ids),
            perceptual_hash=table["perceptual_hash"].to_pylist(),
            columns={name: table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in self.columns},
            embedding_ids=ids,
            embedding_ME=rows.pop("embedding"),
            residuals=rows,
        )
        is_poisoned = is_stamped if where == "unseen" else np.asarray(table["is_poisoned"])
        # An image is judged as it is or stamped, not both.
        own = [name.rpartition("+")[0] if is_one else name for name, is_one in zip(ids, is_stamped, strict=True)]
        return _Population(scored, is_poisoned, np.array(own, np.str_))


@dataclass(frozen=True, eq=False)
class _Population:
    """Scored images of which some are poisoned."""

    scored: Scored
    is_poisoned: NDArray[np.bool_]
    own: NDArray[np.str_]
    """The image that each was made from."""

    def draws(self, settings: LeaderboardSettings, rng: np.random.Generator) -> Iterator[_Draw]:
        """One draw of a corpus and calibration samples, at every size and rate; smaller ones are part of larger ones.

        What cannot be drawn is left out: too few clean images, or not one poisoned image at this rate.
        """
        poisoned, clean = (rng.permutation(np.flatnonzero(is_one)) for is_one in (self.is_poisoned, ~self.is_poisoned))
        highest = max(settings.list_rates)
        poisoned = poisoned[: round(highest * settings.corpus_size / (1 - highest))]
        clean = clean[~np.isin(self.own[clean], self.own[poisoned])]
        for size in settings.calibration_sizes:
            corpus = clean[size : size + settings.corpus_size]
            if len(corpus) < LEAST_CORPUS:
                continue
            calibration = self._part(clean[:size])
            for rate in (*settings.list_rates, 0.0):
                num = round(rate / (1 - rate) * len(corpus))
                if num > len(poisoned) or (rate and not num):
                    continue
                rows = np.append(corpus, poisoned[:num])
                yield _Draw(size, rate, self._part(rows), calibration, self.is_poisoned[np.sort(rows)])

    def _part(self, rows: NDArray[np.int64]) -> Scored:
        kept = np.zeros(len(self.scored), bool)
        kept[rows] = True
        return self.scored.part(kept)


@dataclass(frozen=True, eq=False)
class _Draw:
    size: int
    rate: float
    corpus: Scored
    calibration: Scored
    is_poisoned: NDArray[np.bool_]
    """(N,), of the corpus."""


# ------------------------------------------------------------------------------------------------ numbers


Row = dict[str, Any]


def _numbers(cell: _Cell) -> Iterator[Row]:
    """Every number of one cell: mixture, column, metric, value."""
    settings = cell.settings
    for name in cell.columns:
        clean, triggered = cell.scores("clean", name), cell.scores("triggered", name)
        for rate in dict.fromkeys((0.5, *settings.poison_rates)):
            for metric, value in _of_mixture(clean, triggered, rate, cell.seed, settings.num_mixtures).items():
                yield {"mixture": f"{rate:g}", "column": name, "metric": metric, "value": value}
        shuffled = [cell.scores(f"shuffled_{kind}", name) for kind in ("clean", "triggered")]
        pairs = {"patch": (clean, cell.scores("patch", name)), "shuffled": shuffled}
        if cell.has("misstamped", name):
            pairs["misstamped"] = (clean, cell.scores("misstamped", name))
        for mixture, (one, other) in pairs.items():
            yield {"mixture": mixture, "column": name, "metric": "auroc", "value": _auroc(one, other)}
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
    """Lists decided without labels, and whether the first one's check of the domain refuses it."""
    settings = cell.settings
    rule = Conformal(q=settings.q, false_alarm=settings.false_alarm)
    covariates = [name for name in cell.columns if name.startswith("stat_")]
    most = settings.calibration_sizes[0], settings.list_rates[0]
    for where in WHERE:
        population = cell.drawn_from(where)
        if population is None:
            continue
        there = {*cell.columns, *population.scored.residuals}
        shown = {
            name: one.model_copy(update={"shift": None, "grouping": None})
            for name, one in settings.lists.items()
            if {*one.made_of(column_of(name, one)), *one.residuals} <= there and (covariates or not one.fair)
        }
        others = {name: Judging(shift=None, grouping=None) for name in cell.columns if name not in shown}
        among = {name: shown[name] for name in settings.chosen_from if name in shown}
        first = next(iter(shown), None)
        for number in range(cell.num_lists):
            for drawn in population.draws(settings, np.random.default_rng([cell.seed, number])):

                def judged(name: str, one: Judging, calibration: Scored, drawn: _Draw = drawn) -> Judged:
                    decision = rule.model_copy(update={"score": column_of(name, one)})
                    return judge(one, decision, drawn.corpus, calibration, covariates, False)

                is_most = (drawn.size, drawn.rate) == most
                lists = {**shown, **(others if is_most or (drawn.size, drawn.rate) == (most[0], 0) else {})}
                if is_most and first:
                    lists[first] = settings.lists[first]
                found = {name: judged(name, one, drawn.calibration) for name, one in lists.items()}
                numbers = {name: _of_list(one, drawn.is_poisoned) for name, one in found.items()}
                if len(among) > 1:
                    name, one, calibration = choose(among, rule, drawn.corpus, drawn.calibration, covariates)
                    numbers[CHOSEN] = _of_list(judged(name, one, calibration), drawn.is_poisoned) | {f"is {name}": 1.0}
                shift = found[first].report["shift"] if first else None
                if shift and shift["value"] is not None:
                    numbers["shift"] = {"auroc": shift["value"], "is_refused": float(shift["value"] > shift["limit"])}
                said = {"mixture": list_of(where, drawn.size, drawn.rate), "draw": number}
                for column, metrics in numbers.items():
                    yield from ({**said, "column": column, "metric": m, "value": value} for m, value in metrics.items())


def column_of(name: str, judging: Judging) -> str:
    """The column that a list is decided on."""
    return judging.made[-1] if judging.made else name


def list_of(where: str, size: int, rate: float) -> str:
    """The name of the lists of one kind among the mixtures."""
    return f"list, {where}, {size}, {rate:g}"


def _of_list(judged: Judged, is_poisoned: NDArray[np.bool_]) -> dict[str, float]:
    flagged = judged.verdict.flagged
    found = {"flagged": float(flagged.sum()), "is_empty": float(not flagged.any())}
    if is_poisoned.any():
        found["fdp"] = false_discovery_proportion(flagged, is_poisoned)
        found["recall"] = float(flagged[is_poisoned].mean())
        found["average_precision"] = average_precision(np.nan_to_num(judged.score_N, nan=-1e300), is_poisoned)
        claimed = judged.report["poisoned_at_least"] or 0
        found["overclaims"] = float(claimed > (flagged & is_poisoned).sum())
    return found


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
        return [*self._columns.get((case, mixture), ())]

    @cached_property
    def _columns(self) -> dict[tuple[str, str], dict[str, None]]:
        found: dict[tuple[str, str], dict[str, None]] = {}
        for case, role, mixture, column, _ in self._by_key:
            if role == "victim":
                found.setdefault((case, mixture), {})[column] = None
        return found


@dataclass(frozen=True)
class About:
    """What the tables need to know about a case."""

    roles: Sequence[str]
    """`victim` and `honest` first."""
    target_label: int


def write_leaderboard(
    settings: LeaderboardSettings,
    output: Path,
    cases: Mapping[str, About],
    seeds: Sequence[int],
    call: Callable[..., list[Any]] = lambda do, many: [*starmap(do, many)],
) -> str:
    """Read every cell; write results.parquet, table.md and the figures.

    Args:
        settings: which rates and lists to show.
        output: the benchmark's folder.
        cases: by name.
        seeds: the seeds of the cells.
        call: calls a function with each of many arguments, side by side where it can.

    Returns:
        The tables.
    """
    num_lists = -(-settings.num_lists // len(seeds))
    cells = [(case, role, seed) for case, about in cases.items() for role in about.roles for seed in seeds]
    work = []
    for case, role, seed in cells:
        target = cases[case].target_label if seed == seeds[0] else None
        work.append((output / "cells" / f"{case}-{role}-{seed}.parquet", seed, target, settings, num_lists))
    numbers: list[Row] = []
    compat: dict[str, dict[str, Row]] = {}
    for (case, role, seed), (found, protocol) in zip(cells, call(_of_cell, work), strict=True):
        numbers += [{"case": case, "role": role, "seed": seed, "draw": 0, **row} for row in found]
        if protocol:
            compat.setdefault(case, {})[role] = protocol
    names = ("case", "role", "seed", "mixture", "column", "metric", "draw", "value")
    write_parquet(pa.table({name: [row[name] for row in numbers] for name in names}), output / "results.parquet")
    rows = Rows(numbers)
    gates = {case: read_json(output / "gates" / f"{case}.json", "verdict of a gate") for case in cases}
    valid = [case for case in cases if gates[case]["passes"]]
    parts = [
        _about(cases, seeds, gates, settings),
        _best(rows, valid),
        _lists(rows, valid, settings),
        *(_of_case(rows, case, about.roles, gates[case], output, settings) for case, about in cases.items()),
        _compat(rows, valid, compat),
    ]
    said = "\n\n".join(parts)
    write_atomically(output / "table.md", said + "\n")
    for name, picture in figures(rows, valid, settings).items():
        write_atomically(output / "figures" / f"{name}.png", picture)
    return said


def _of_cell(
    path: Path, seed: int, target: int | None, settings: LeaderboardSettings, num_lists: int
) -> tuple[list[Row], Row | None]:
    """The numbers of one cell, and, where there is a target, those of the published protocol."""
    cell = _Cell(seed, pq.read_table(path), settings, num_lists)
    protocol = None if target is None or PAPER not in cell.columns else _published_protocol(cell, target)
    return [*_numbers(cell)], protocol


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
    size, rate = settings.calibration_sizes[0], settings.list_rates[0]
    poisoned, clean = ({one: list_of(one, size, r) for one in WHERE} for r in (rate, 0.0))
    shown = (*settings.lists, CHOSEN)
    lines = [
        f"Lists decided as `dede-ray score` does: conformal p-values and Benjamini-Hochberg at q = {settings.q:g}, "
        f"false alarm {settings.false_alarm}, without labels; {size:,} calibration samples and a corpus of at most "
        f"{settings.corpus_size:,} clean images, drawn anew {settings.num_lists} times, {rate:.1%} of it poisoned. "
        "FDP: realised share of clean samples among the flagged, mean and standard error. Empty: share of the lists "
        "without an entry where nothing is poisoned. Twin: the same for the honest twin on the same images, stamped "
        "ones included.\n",
        f"| victim | list | {' | '.join(f'{where}: recall | FDP | empty | twin' for where in WHERE)} |",
        "| --- | --- |" + " --- |" * 4 * len(WHERE),
    ]
    for case in cases:
        for column in shown:
            if any(len(rows.values(case, "victim", poisoned[where], column, "fdp")) for where in WHERE):
                cells = (_list_cells(rows, case, poisoned[one], clean[one], column) for one in WHERE)
                lines.append(f"| {case} | {column} | {' | '.join(cells)} |")
    num_scores = len({column for case in cases for one in WHERE for column in rows.columns(case, poisoned[one])})
    if len(lines) == 3:
        return "## What the lists promise\n\nNo list was decided: no victim is valid, or there are too few images."
    broken = list(broken_promises(rows, cases, settings))
    lines.append(
        f"\nOver all {num_scores} scores, {len(cases)} victims, poison rates and numbers of calibration samples, the "
        "promise (FDP at most q plus two standard errors, at least 90 % of the lists empty without poison) is "
        + (f"not kept by {', '.join(broken)}." if broken else "kept everywhere.")
    )
    return "## What the lists promise\n\n" + "\n".join(lines)


def _list_cells(rows: Rows, case: str, poisoned: str, clean: str, column: str) -> str:
    fdp = rows.values(case, "victim", poisoned, column, "fdp")
    if not len(fdp):
        return "– | – | – | –"
    twin = np.append(*(rows.values(case, "honest", one, column, "is_empty") for one in (poisoned, clean)))
    recall = rows.mean(case, "victim", poisoned, column, "recall")
    empty = rows.mean(case, "victim", clean, column, "is_empty")
    said = f"{recall:.3f} | {fdp.mean():.3f} ± {_standard_error(fdp):.3f} | {empty:.0%}"
    return f"{said} | {twin.mean():.0%}" if len(twin) else f"{said} | –"


def broken_promises(rows: Rows, cases: Iterable[str], settings: LeaderboardSettings) -> Iterator[str]:
    """Victims, lists and scores that are worse than declared."""
    for case, where, size, rate in product(cases, WHERE, settings.calibration_sizes, (*settings.list_rates, 0.0)):
        mixture = list_of(where, size, rate)
        for column in rows.columns(case, mixture):
            said = f"{case}/{column} ({where}, {size:,} to compare with, {rate:.1%} poison: "
            fdp = rows.values(case, "victim", mixture, column, "fdp")
            if len(fdp) and fdp.mean() > settings.q + 2 * _standard_error(fdp):
                yield f"{said}FDP {fdp.mean():.3f})"
            empty = rows.mean(case, "victim", mixture, column, "is_empty")
            if not rate and empty < 0.9:
                yield f"{said}{empty:.0%} empty)"


def _grid(rows: Rows, case: str, settings: LeaderboardSettings) -> list[str]:
    """Recall and FDP of each list by poison rate and number of calibration samples."""
    kinds = [*product(sorted(settings.calibration_sizes), (*settings.list_rates, 0.0))]
    lines = []
    for where, column in product(WHERE, (*settings.lists, CHOSEN)):
        cells = []
        for size, rate in kinds:
            metrics = ("recall", "fdp") if rate else ("is_empty",)
            found = [rows.mean(case, "victim", list_of(where, size, rate), column, metric) for metric in metrics]
            cells.append("–" if np.isnan(found).any() else " / ".join(f"{value:.2f}" for value in found))
        if {*cells} != {"–"}:
            lines.append(f"| {where} | {column} | {' | '.join(cells)} |")
    if not lines:
        return []
    head = (f"{size:,}, {rate:.1%}" if rate else f"{size:,}, none" for size, rate in kinds)
    intro = "Recall / FDP by number of calibration samples and poison rate; without poison, share of empty lists."
    return ["", intro, "", f"| images | list | {' | '.join(head)} |", "| --- " * (2 + len(kinds)) + "|", *lines]


def _of_case(
    rows: Rows, case: str, roles: Sequence[str], gate: Mapping[str, Any], output: Path, settings: LeaderboardSettings
) -> str:
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
    lines += _grid(rows, case, settings)
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
    num = min(len(cell.scores("clean", PAPER)), len(cell.scores("triggered", PAPER)))
    clean, triggered = cell.scores("clean", PAPER)[:num], cell.scores("triggered", PAPER)[:num]
    cut = float(np.median(np.concatenate([clean, triggered])))
    is_kept, is_found = clean <= cut, triggered > cut
    is_right = (cell.scores("clean", "compat_head") == cell.scores("clean", "label"))[:num]
    is_target = cell.scores("triggered", "compat_head")[:num] == target
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
    mixture = list_of(WHERE[0], settings.calibration_sizes[0], settings.list_rates[0])
    shown = {column for case in cases for column in rows.columns(case, mixture)}
    if columns := [name for name in (*settings.lists, CHOSEN) if name in shown]:
        found["lists"] = _lists_figure(rows, cases, columns, mixture, settings)
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


def _lists_figure(
    rows: Rows, cases: Sequence[str], columns: Sequence[str], mixture: str, settings: LeaderboardSettings
) -> bytes:
    figure, axes = plt.subplots(1, 2, figsize=(3 + 1.3 * len(cases), 3.6))
    width = 0.8 / len(columns)
    for place, column in enumerate(columns):
        for axis, metric in zip(axes, ("fdp", "recall"), strict=True):
            found = [rows.values(case, "victim", mixture, column, metric) for case in cases]
            there = [number for number, one in enumerate(found) if len(one) > 1]
            axis.bar(
                np.array(there) + place * width, [found[i].mean() for i in there], width, label=column,
                yerr=[2 * _standard_error(found[i]) for i in there], error_kw={"linewidth": 0.8},
            )  # fmt: skip
    axes[0].axhline(settings.q, color="black", linestyle="--", linewidth=1)
    for axis, title in zip(
        axes,
        (
            f"false-discovery proportion, q = {settings.q:g}",
            f"recall at {settings.list_rates[0]:.1%} poison, in sample",
        ),
        strict=True,
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
