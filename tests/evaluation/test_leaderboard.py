"""The leaderboard: the benchmark's numbers, recomputed plainly from cells that were made up for it."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from dede_ray.data.ledger import write_parquet
from dede_ray.evaluation.leaderboard import (
    DECIDED,
    WHERE,
    About,
    LeaderboardSettings,
    Rows,
    _Cell,
    _decided,
    best_column,
    broken_promises,
    figures,
    list_of,
    write_leaderboard,
)
from dede_ray.runtime.config import write_json
from dede_ray.scan.fusion import Fusion
from dede_ray.scan.judge import Judging
from dede_ray.scan.pool import Classifier, Company

pytestmark = pytest.mark.trains

SEEDS = (0, 1)
CASES = {"works": About(["victim", "honest"], 2), "idle": About(["victim", "honest"], 2)}
LISTS = {
    "dede_reverse": Judging(),
    "clear": Judging(),
    "combined": Judging(combined=Fusion(columns=("dede_reverse", "clear"))),
}
MADE = {
    "dede_mean_fair": Judging(fair=["dede_mean"], num_knots=2),
    "company": Judging(company=Company()),
    "classifier": Judging(classifier=Classifier(repeats=1)),
    "company_xc": Judging(company=Company(of="xc_misplaced", residual="xc_residual")),  # no cell has these
}
SETTINGS = LeaderboardSettings(
    num_mixtures=4, num_lists=4, list_rates=(0.01,), calibration_sizes=(1100,), corpus_size=1100, false_alarm=None,
    lists=LISTS, chosen_from=("dede_reverse", "clear"),
)  # fmt: skip
GRID = SETTINGS.model_copy(
    update={"lists": {**LISTS, **MADE}, "list_rates": (0.01, 0.003), "calibration_sizes": (1100, 300, 5000)}
)
NUM_CLEAN, NUM_TRIGGERED, NUM_SUSPECTED, WIDTH = 2300, 400, 2430, 8
LIST, NOTHING = (list_of("unseen", 1100, rate) for rate in (0.01, 0))

SHIFT = {
    # by how much the trigger raises a score, on the victim and on its honest twin
    "dede_mean": (1.5, 0), "dede_reverse": (2.5, 0), "clear": (60, 0), "loud": (9, 9), "backwards": (-60, 0),
    "stat_contrast": (9, 0),
}  # fmt: skip


def cell(role: str, seed: int) -> pa.Table:
    """What the benchmark's cells look like, with numbers from a generator; `flat` is a constant score."""
    rng = np.random.default_rng([seed, role == "honest"])
    sizes = {
        "suspected": NUM_SUSPECTED, "clean": NUM_CLEAN, "triggered": NUM_TRIGGERED, "patch": 90, "shuffled_clean": 80,
        "shuffled_triggered": 80, "misstamped": 90,
    }  # fmt: skip
    tables = []
    for part, num in sizes.items():
        is_stamped = np.full(num, part in ("triggered", "misstamped"))
        if part == "suspected":
            is_stamped = np.arange(num) % 100 == 7
        columns = {name: rng.normal(0, 1, num) + is_stamped * shift[role == "honest"] for name, shift in SHIFT.items()}
        # How hard a picture is drives the published score, too.
        columns["dede_mean"] += 2 * (columns["stat_contrast"] - is_stamped * SHIFT["stat_contrast"][role == "honest"])
        columns["flat"] = np.zeros(num)
        table = {name: value.astype(np.float32) for name, value in columns.items()}
        table |= {"label": rng.integers(0, 4, num), "probe": rng.integers(0, 4, num)}
        if seed == SEEDS[0]:
            table["compat_head"] = rng.integers(0, 4, num)
        ids = [f"clean/{i}+patch" if part == "triggered" else f"{part}/{i}" for i in range(num)]
        if part in DECIDED:
            vectors = rng.normal(0, 1, (num, WIDTH)) + is_stamped[:, None] * (role == "victim") * np.arange(WIDTH)
            values = {"dede_residual": vectors, "embedding": rng.normal(0, 1, (num, WIDTH))}
            table |= {
                name: pa.FixedSizeListArray.from_arrays(rows.astype(np.float16).ravel(), WIDTH)
                for name, rows in values.items()
            }
            table |= {"content_hash": ids, "perceptual_hash": pa.array(rng.integers(0, 2**63, num), pa.uint64())}
        if part == "suspected":
            table["is_poisoned"] = is_stamped
        tables.append(pa.table({"set": [part] * num, "sample_id": ids, **table}))
    for part, raised in (("second_clean", 0), ("second_triggered", 3)):
        scores = (rng.normal(0, 1, 30) + raised).astype(np.float32)
        names = [f"{part}/{i}" for i in range(30)]
        label = np.zeros(30, np.int64)
        tables.append(pa.table({"set": [part] * 30, "sample_id": names, "label": label, "mt_jump": scores}))
    return pa.concat_tables(tables, promote_options="default")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("leaderboard")
    for case in CASES:
        reason = "the probe's words"
        write_json(output / "gates" / f"{case}.json", {"passes": case == "works", "reason": reason})
        for role in ("victim", "honest"):
            for seed in SEEDS:
                write_parquet(cell(role, seed), output / "cells" / f"{case}-{role}-{seed}.parquet")
    return output, write_leaderboard(SETTINGS, output, CASES, SEEDS)


@pytest.fixture(scope="module")
def rows(written) -> Rows:
    return Rows(pq.read_table(written[0] / "results.parquet").to_pylist())


def scores(written, role: str, seed: int, part: str, column: str) -> np.ndarray:
    """A column of a set as it is in the file."""
    table = pq.read_table(written[0] / "cells" / f"works-{role}-{seed}.parquet", columns=["set", column]).to_pylist()
    return np.array([row[column] for row in table if row["set"] == part])


def area(clean: np.ndarray, poisoned: np.ndarray) -> float:
    return roc_auc_score(np.r_[np.zeros(len(clean)), np.ones(len(poisoned))], np.r_[clean, poisoned])


# --- mixtures


@pytest.mark.parametrize("role", ["victim", "honest"])
@pytest.mark.parametrize("column", [*SHIFT, "flat"])
def test_aurocs_are_those_of_clean_images_and_of_each_set(written, rows, role, column):
    def expected(clean_set: str, other: str) -> list[float]:
        found = [(scores(written, role, s, clean_set, column), scores(written, role, s, other, column)) for s in SEEDS]
        return [area(clean, poisoned) for clean, poisoned in found]

    for mixture in ("patch", "misstamped"):
        there = rows.values("works", role, mixture, column, "auroc")
        np.testing.assert_allclose(there, expected("clean", mixture), atol=1e-9)
    there = rows.values("works", role, "shuffled", column, "auroc")
    np.testing.assert_allclose(there, expected("shuffled_clean", "shuffled_triggered"), atol=1e-9)
    for rate in ("0.5", "0.01", "0.001"):  # of some of them
        there = rows.values("works", role, rate, column, "auroc")
        error = 0.5 / np.sqrt(4 if rate == "0.001" else 400 if rate == "0.5" else 92)
        np.testing.assert_allclose(there, expected("clean", "triggered"), atol=4 * error)


def test_a_balanced_mixture_takes_as_many_clean_images_as_triggered_ones(written, rows):
    clean, triggered = (scores(written, "victim", 1, part, "dede_mean") for part in ("clean", "triggered"))
    chosen = clean[:NUM_TRIGGERED]
    found = rows.values("works", "victim", "0.5", "dede_mean", "auroc")[1]
    assert found == pytest.approx(area(chosen, triggered))
    labels = np.r_[np.zeros(NUM_TRIGGERED), np.ones(NUM_TRIGGERED)]
    precision = average_precision_score(labels, np.r_[chosen, triggered])
    assert rows.values("works", "victim", "0.5", "dede_mean", "average_precision")[1] == pytest.approx(precision)
    threshold = np.sort(chosen)[-5]  # four of 400 are 1 %
    tpr = rows.values("works", "victim", "0.5", "dede_mean", "tpr_at_fpr_1pct")[1]
    assert tpr == pytest.approx((triggered > threshold).mean())


def test_mixtures_have_the_poison_rate_of_their_name(rows):
    """A score that says nothing has the poison rate as its average precision."""
    for rate, poisoned, clean in (("0.5", 400, 400), ("0.01", 23, 2300), ("0.001", 2, 2300)):
        found = rows.values("works", "victim", rate, "flat", "average_precision")
        np.testing.assert_allclose(found, [poisoned / (poisoned + clean)] * 2)


def test_a_score_that_ranks_everything_backwards_has_an_auroc_of_0_and_is_shown(written, rows):
    for mixture in ("0.5", "0.01", "misstamped"):
        assert rows.values("works", "victim", mixture, "backwards", "auroc").tolist() == [0, 0]
        assert rows.values("works", "victim", mixture, "clear", "auroc").tolist() == [1, 1]
    assert "| backwards | 0.000 ± 0.000 |" in written[1]


def test_an_fpr_is_quoted_only_where_there_are_images_enough_to_see_it(rows):
    assert len(rows.values("works", "victim", "0.5", "clear", "tpr_at_fpr_0_1pct")) == 0  # 400 clean images
    assert rows.values("works", "victim", "0.01", "clear", "tpr_at_fpr_0_1pct").tolist() == [1, 1]


def test_second_stages_are_judged_on_their_own_images(written, rows):
    expected = [
        area(*(scores(written, "victim", seed, f"second_{kind}", "mt_jump") for kind in ("clean", "triggered")))
        for seed in SEEDS
    ]
    np.testing.assert_allclose(rows.values("works", "victim", "second_stage", "mt_jump", "auroc"), expected)
    assert rows.columns("works", "0.5") == [*SHIFT, "flat"]


def test_a_corpus_too_small_for_a_poison_rate_is_not_judged_at_another(tmp_path):
    table = cell("victim", 0)
    rows = table.to_pylist()
    is_kept = [row["set"] != "suspected" and (row["set"] != "clean" or int(row["sample_id"][6:]) < 30) for row in rows]
    for role in ("victim", "honest"):
        write_parquet(table.filter(pa.array(is_kept)), tmp_path / "cells" / f"works-{role}-0.parquet")
    write_json(tmp_path / "gates" / "works.json", {"passes": True, "reason": "so"})
    said = write_leaderboard(SETTINGS, tmp_path, {"works": CASES["works"]}, [0])
    found = Rows(pq.read_table(tmp_path / "results.parquet").to_pylist())
    assert set(SHIFT) < set(found.columns("works", "0.5"))
    for rate in ("0.01", "0.001", LIST):
        assert found.columns("works", rate) == []
    assert "No list was decided" in said
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["auroc.png"]


# --- lists


def test_what_a_list_flags_is_its_true_and_its_false_entries(rows):
    for column in [name for name in rows.columns("works", LIST) if name != "shift"]:
        fdp, recall, flagged = (
            rows.values("works", "victim", LIST, column, metric) for metric in ("fdp", "recall", "flagged")
        )
        np.testing.assert_allclose(recall * 11 + fdp * flagged, flagged, atol=1e-9)  # 1 % of 1,100 clean ones
        for mixture in (NOTHING, LIST):
            empty, flagged = (rows.values("works", "victim", mixture, column, one) for one in ("is_empty", "flagged"))
            assert len(empty) == SETTINGS.num_lists
            assert ((flagged == 0) == (empty == 1)).all()


def test_lists_find_what_stands_out_and_nothing_in_what_says_nothing(rows):
    for where in WHERE:
        mixture = list_of(where, 1100, 0.01)
        assert (rows.values("works", "victim", mixture, "clear", "recall") == 1).all()
        assert rows.mean("works", "victim", mixture, "clear", "fdp") < 0.3
        assert rows.mean("works", "victim", mixture, "clear", "average_precision") == 1
        for column in ("flat", "backwards"):
            assert rows.mean("works", "victim", mixture, column, "recall") == 0
        assert (rows.values("works", "victim", list_of(where, 1100, 0), "flat", "is_empty") == 1).all()


def test_lists_are_decided_on_what_the_product_makes_and_on_what_was_chosen(written):
    """What is shown has all poison rates and sizes for which there are images, all other scores the first ones."""
    table = pq.read_table(written[0] / "cells" / "works-victim-0.parquet")
    found = [*_decided(_Cell(0, table, GRID, 1))]
    made = [*LISTS, "dede_mean_fair", "company", "classifier"]
    others = ["dede_mean", "loud", "backwards", "stat_contrast", "flat"]
    for where in WHERE:

        def columns(size: int, rate: float, where: str = where) -> list[str]:
            return list(dict.fromkeys(row["column"] for row in found if row["mixture"] == list_of(where, size, rate)))

        assert columns(1100, 0.01) == [*made, *others, "chosen", "shift"]
        assert columns(1100, 0) == [*made, *others, "chosen"]
        assert columns(1100, 0.003) == columns(300, 0.003) == [*made, "chosen"]
        assert columns(5000, 0) == []
        value = {
            (row["column"], row["metric"]): row["value"]
            for row in found
            if row["mixture"] == list_of(where, 1100, 0.01)
        }
        assert value["company", "average_precision"] > value["dede_reverse", "average_precision"]
        # These triggers raise the covariate itself, so that taking its part out of the score takes them with it.
        assert value["dede_mean_fair", "average_precision"] < value["dede_mean", "average_precision"]
        assert value["chosen", "is clear"] == 1
        assert value["shift", "is_refused"] == 0


@pytest.mark.parametrize("where", WHERE)
def test_corpora_and_calibration_samples_are_apart_and_as_poisoned_as_they_say(written, where):
    table = pq.read_table(written[0] / "cells" / "works-victim-0.parquet")
    population = _Cell(0, table, GRID, 1).drawn_from(where)
    rates = []
    for drawn in population.draws(GRID, np.random.default_rng(0)):
        corpus, calibration = (
            {name.partition("+")[0] for name in one.sample_ids} for one in (drawn.corpus, drawn.calibration)
        )
        assert not corpus & calibration  # nor the image that a stamped one was made from
        assert len(corpus) == len(drawn.corpus)
        assert len(calibration) == drawn.size
        assert drawn.is_poisoned.sum() == round(drawn.rate / (1 - drawn.rate) * (~drawn.is_poisoned).sum())
        stamped = [
            "+" in name if where == "unseen" else int(name.partition("/")[2]) % 100 == 7
            for name in drawn.corpus.sample_ids
        ]
        assert drawn.is_poisoned.tolist() == stamped
        rates.append((drawn.size, drawn.rate))
    assert rates == [(size, rate) for size in (1100, 300) for rate in (0.01, 0.003, 0)]


def lists(fdp: list[float], empty: list[float], case: str = "works", column: str = "xc") -> list[dict]:
    common = {"case": case, "role": "victim", "seed": 0, "column": column}
    found = [{"mixture": LIST, "metric": "fdp", "draw": i, "value": one} for i, one in enumerate(fdp)]
    found += [{"mixture": NOTHING, "metric": "is_empty", "draw": i, "value": one} for i, one in enumerate(empty)]
    return [{**common, **one} for one in found]


@pytest.mark.parametrize(
    ("fdp", "empty", "said"),
    [
        ([0.0, 0.1, 0.05, 0.05], [1, 1, 1, 1], []),
        ([0.5, 0.6, 0.5, 0.6], [1, 1, 1, 1], ["works/xc (unseen, 1,100 to compare with, 1.0% poison: FDP 0.550)"]),
        ([0.0, 0.6, 0.0, 0.0], [1, 1, 1, 1], []),  # 0.15, within two standard errors
        ([0.0] * 4, [1, 0, 1, 1], ["works/xc (unseen, 1,100 to compare with, 0.0% poison: 75% empty)"]),
        (
            [0.5, 0.6, 0.5, 0.6],
            [0, 0, 1, 1],
            [
                "works/xc (unseen, 1,100 to compare with, 1.0% poison: FDP 0.550)",
                "works/xc (unseen, 1,100 to compare with, 0.0% poison: 50% empty)",
            ],
        ),
    ],
)
def test_a_score_whose_lists_are_worse_than_declared_is_named(fdp, empty, said):
    kept = lists([0.0] * 4, [1] * 4, column="dao")
    assert list(broken_promises(Rows([*kept, *lists(fdp, empty)]), ["works"], SETTINGS)) == said
    assert list(broken_promises(Rows(lists(fdp, empty, "idle")), ["works"], SETTINGS)) == []


# --- the best, the void


def aurocs(column: str, victim: float, honest: float) -> list[dict]:
    common = {"case": "works", "seed": 0, "draw": 0, "mixture": "0.5", "column": column, "metric": "auroc"}
    return [{**common, "role": role, "value": value} for role, value in (("victim", victim), ("honest", honest))]


def test_the_best_score_is_the_highest_of_those_that_leave_the_honest_twin_alone(rows):
    assert best_column(rows, "works") == "clear"  # loud and the control separate as well
    plain = [*aurocs("xc", 0.8, 0.5), *aurocs("dao", 0.7, 0.6)]
    for column, victim, honest in (
        ("loud", 0.99, 0.61), ("upset", 0.99, 0.44), ("stat_edges", 0.99, 0.5), ("dede_null", 0.99, 0.5),
        ("dede_null_far", 0.99, 0.5), ("silent", 0.99, math.nan),
    ):  # fmt: skip
        assert best_column(Rows([*plain, *aurocs(column, victim, honest)]), "works") == "xc", column
    assert best_column(Rows([*plain, *aurocs("dede_null_ratio", 0.99, 0.45)]), "works") == "dede_null_ratio"
    assert best_column(Rows(aurocs("loud", 0.99, 0.99)), "works") is None


def test_of_a_victim_whose_backdoor_does_not_work_no_number_is_quoted(written, rows):
    assert len(rows.values("idle", "victim", "0.5", "clear", "auroc")) == 2  # they are kept
    for said in (written[1], (written[0] / "table.md").read_text()):
        assert "VOID, because the backdoor does not work: idle." in said
        assert "| idle |" not in said
        [section] = [part for part in said.split("\n## ") if part.startswith("idle\n")]
        assert "Gate: VOID; the probe's words." in section
        assert "|" not in section
        [valid] = [part for part in said.split("\n## ") if part.startswith("works\n")]
        assert "| stat_contrast (control) |" in valid


def test_where_nothing_is_valid_nothing_is_promised(written, tmp_path):
    for path in written[0].glob("cells/idle*"):
        write_parquet(pq.read_table(path), tmp_path / "cells" / path.name)
    write_json(tmp_path / "gates" / "idle.json", {"passes": False, "reason": "no"})
    said = write_leaderboard(SETTINGS, tmp_path, {"idle": CASES["idle"]}, SEEDS)
    assert "kept" not in said.partition("## What the lists promise")[2].partition("##")[0]
    assert not (tmp_path / "figures").exists()


def test_the_published_protocol_cuts_the_pool_at_its_median(written):
    clean, triggered = (
        scores(written, "victim", 0, part, "dede_mean")[:NUM_TRIGGERED] for part in ("clean", "triggered")
    )
    cut = np.median(np.r_[clean, triggered])
    tpr, fpr = (triggered > cut).mean(), (clean > cut).mean()
    assert tpr + fpr == pytest.approx(1)
    assert f"{tpr:.1%} / {fpr:.1%} / {area(clean, triggered):.3f}" in written[1]


# --- what is written


def test_writing_again_gives_the_same_bytes_and_figures_open(written):
    files = [written[0] / "results.parquet", written[0] / "table.md", *sorted((written[0] / "figures").iterdir())]
    assert [path.name for path in files[2:]] == ["auroc.png", "lists.png"]
    before = [path.read_bytes() for path in files]
    assert write_leaderboard(SETTINGS, written[0], CASES, SEEDS) == written[1]
    assert [path.read_bytes() for path in files] == before
    for picture in before[2:]:
        with Image.open(io.BytesIO(picture)) as image:
            assert image.format == "PNG"
            assert min(image.size) > 100


def test_a_run_without_the_published_detector_is_shown_without_it(written, tmp_path):
    for path in written[0].glob("cells/works*"):
        write_parquet(pq.read_table(path).drop_columns(["dede_mean", "dede_reverse"]), tmp_path / "cells" / path.name)
    write_json(tmp_path / "gates" / "works.json", {"passes": True, "reason": "so"})
    said = write_leaderboard(SETTINGS, tmp_path, {"works": CASES["works"]}, SEEDS)
    assert "| works | clear (oracle: the best here) | 1.000 ± 0.000 |" in said
    assert "dede_reverse" not in said


def test_no_figure_is_drawn_of_nothing(rows):
    assert figures(rows, [], SETTINGS) == {}
