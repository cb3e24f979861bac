"""In small, on made-up embeddings: what is fitted to the pool keeps its promise where it misses the poison."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from dede_ray.detectors.asset import Asset
from dede_ray.detectors.consistency import Consistency
from dede_ray.detectors.contract import DetectorSettings, State, as_scores
from dede_ray.detectors.density import Density
from dede_ray.detectors.isolation_forest import Forest
from dede_ray.models.embedding import Batch, in_one_heap
from dede_ray.scan.decisions import conformal_p_values
from tests.benchmarks.validity import LATE, Embedded, Row, judged, measured, scored, table, world

pytestmark = pytest.mark.trains

WIDTH, NUM = 8, 3000
SIZES = {"num": 500, "num_calibration": 500, "num_poisoned": 20}
SMALL = [
    Density(num_references=400, k=8, lid_k=16),
    Forest(num_trees=10, num_samples=64),
    Asset(hidden=16, epochs=2, batch_size=128),
    Consistency(forms=["closed", "neighbours"], num_references=400, k=8),
]


@pytest.fixture(scope="module")
def source() -> Embedded:
    """Ten classes that two encoders see, and a trigger that moves one of them in one direction."""
    rng = np.random.default_rng(0)
    picture_NE = rng.normal(size=(10, WIDTH))[rng.integers(0, 10, NUM)] + 0.5 * rng.normal(size=(NUM, WIDTH))
    mixed = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    victim_NE, reference_NR = (
        (one + 0.3 * rng.normal(size=one.shape)).astype(np.float32) for one in (picture_NE @ mixed, picture_NE)
    )
    triggered_NE = (victim_NE + 3 * rng.normal(size=WIDTH)).astype(np.float32)
    return Embedded(victim_NE, reference_NR, triggered_NE, reference_NR)


def test_lists_keep_to_q_and_p_values_to_their_levels_where_the_poison_is_missed(source):
    rows = measured(source, 5, 0.1, SMALL, **SIZES)
    made = {"late", "company", "amplified", "classifier", "combined"}
    assert {*rows} >= {"dao", "isolation_forest", "asset", "xc"} | made
    for name, row in rows.items():
        assert row.fdp[0] <= 0.1 + 3 * max(row.fdp[1], 0.1), name
        for t, (mean, error) in row.share.items():
            assert abs(mean - 1) <= 4 * max(error, 0.3 * (0.01 / t) ** 0.5), (name, t, mean, error)
    assert table(rows).count("\n") == len(rows) + 1


def test_the_same_columns_find_poison_that_they_do_not_miss(source):
    one = world(source, 0, 1.0, **SIZES)
    found = judged(*scored(one, SMALL), 0)
    assert found["amplified"].verdict.flagged[one.is_poisoned].mean() > 0.8
    assert {*found} >= {LATE, "late"}


class Memory(DetectorSettings):
    """A detector that has learnt by heart what it was fitted to, and says so."""

    kind: str = "memory"
    fits: ClassVar[bool] = True

    def fit(self, pool: Batch, clean: Batch | None) -> State:
        return {"key": pool.keys(0), "shift": torch.tensor(1.0)}

    def open(self, victim, state: State):
        def score(batch: Batch):
            known_B = torch.isin(batch.keys(0), state["key"]).double()
            return as_scores({"memory": known_B + batch.embedding_BE[:, 0]})

        return SimpleNamespace(score=score, columns=("memory",), controls=())


def test_what_learns_the_pool_by_heart_knows_nobody_who_calibrates_and_what_learns_the_corpus_does(source):
    share = {"pool": [], "corpus": []}
    for seed in range(5):
        one = world(source, seed, 0.0, **SIZES)
        pools = {"pool": in_one_heap(one.corpus, one.calibration), "corpus": in_one_heap(one.corpus)}
        for name, pool in pools.items():
            scorer = Memory().open(None, Memory().fit(pool, None))
            score_N, calibration = (scorer.score(batch)["memory"] for batch in (one.corpus, one.calibration))
            share[name].append((conformal_p_values(score_N, calibration, one.corpus.sample_ids) <= 0.1).mean())
    assert abs(np.mean(share["pool"]) - 0.1) < 0.03
    assert np.mean(share["corpus"]) > 0.2


def test_a_row_says_whether_its_promise_is_kept():
    level = {0.01: (1.0, 0.1)}
    assert Row((0.1, 0.02), 0.0, level).is_kept
    assert not Row((0.3, 0.02), 0.0, level).is_kept
    assert not Row((0.0, 0.0), 0.0, {0.01: (1.5, 0.1)}).is_kept
