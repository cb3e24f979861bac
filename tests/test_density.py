"""Distances to a frozen reference set, beside plain loops and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from dede_ray.config import Mistake
from dede_ray.decoder import sample_keys
from dede_ray.detectors.contract import Batch
from dede_ray.detectors.density import EPSILON, Density, Neighbourhood
from dede_ray.victims import OpenClipVictim, load_victim

K, M, E = 8, 120, 6


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    reference_ME, query_BE = (rng.normal(3, 1, (num, E)).astype(np.float32) for num in (M, 40))
    return reference_ME, query_BE


def neighbourhood(reference_ME, k=K):
    return Neighbourhood(torch.from_numpy(reference_ME), sample_keys([f"r{i}" for i in range(len(reference_ME))], 0), k)


def by_hand(query_E, reference_ME, k):
    """Nearest references of one query, sorted: distances and places."""
    distance_M = np.sqrt(((reference_ME.astype(np.float64) - query_E.astype(np.float64)) ** 2).sum(axis=1))
    order = np.argsort(distance_M)[:k]
    return distance_M[order], order


def dimension(distances):
    return -1 / np.mean([np.log(one / distances[-1] + EPSILON) for one in distances])


def test_every_score_is_its_definition(world):
    reference_ME, query_BE = world
    k_distance, lid = [], []
    for i in range(M):
        others = np.delete(reference_ME, i, axis=0)
        distances, _ = by_hand(reference_ME[i], others, K)
        k_distance.append(distances[-1])
        lid.append(dimension(distances))
    expected = {"k_distance": [], "lid": [], "slof": [], "dao": []}
    for query_E in query_BE:
        distances, places = by_hand(query_E, reference_ME, K)
        expected["k_distance"].append(distances[-1])
        expected["lid"].append(dimension(distances))
        expected["slof"].append(np.mean([distances[-1] / k_distance[o] for o in places]))
        expected["dao"].append(np.mean([lid[o] * np.log(distances[-1] / k_distance[o]) for o in places]))
    scores = neighbourhood(reference_ME).score(torch.from_numpy(query_BE), ["q"] * len(query_BE))
    assert scores.keys() == expected.keys()
    for name, score_B in scores.items():
        score_B = score_B.float().numpy()
        np.testing.assert_allclose(score_B, expected[name], rtol=1e-5, err_msg=name)
    nearest = NearestNeighbors(n_neighbors=K).fit(reference_ME).kneighbors(query_BE)[0]
    np.testing.assert_allclose(scores["k_distance"].numpy(), nearest[:, -1], rtol=1e-5)


def test_scores_do_not_depend_on_batch_or_order(world):
    reference_ME, query_BE = world
    model, ids = neighbourhood(reference_ME), [f"q{i}" for i in range(len(query_BE))]
    whole = model.score(torch.from_numpy(query_BE), ids)
    order = np.random.default_rng(1).permutation(len(ids))
    for start in range(0, len(ids), 7):
        rows = order[start : start + 7]
        part = model.score(torch.from_numpy(query_BE[rows]), [ids[row] for row in rows])
        for name, score_B in part.items():
            assert torch.equal(score_B.float(), whole[name].float()[rows]), name


def test_a_reference_is_not_its_own_neighbour(world):
    reference_ME, _ = world
    model = neighbourhood(reference_ME)
    own = model.score(torch.from_numpy(reference_ME[:5]), [f"r{i}" for i in range(5)])["k_distance"]
    stranger = model.score(torch.from_numpy(reference_ME[:5]), ["a", "b", "c", "d", "e"])["k_distance"]
    np.testing.assert_allclose(own, model.k_distance_M[:5], rtol=1e-6)
    assert (stranger < own).all()


def test_equal_embeddings_have_finite_scores():
    model = neighbourhood(np.ones((20, E), np.float32))
    scores = model.score(torch.ones(3, E), ["x", "y", "z"])
    assert all(np.isfinite(score_B).all() for score_B in scores.values())


def test_the_reference_set_is_a_keyed_draw(world, victim_folder):
    reference_ME, query_BE = world
    settings, victim = Density(num_references=50, k=4, lid_k=8), load_victim(OpenClipVictim(path=str(victim_folder)))
    corpus = Batch([f"r{i}" for i in range(M)], torch.from_numpy(reference_ME))
    state = settings.fit(corpus, None)
    assert state["reference"].shape == (50, E)
    rows = np.random.default_rng(0).permutation(M).tolist()
    shuffled = settings.fit(corpus.part(rows), None)
    assert set(shuffled["key"].tolist()) == set(state["key"].tolist())
    queries = Batch([f"q{i}" for i in range(len(query_BE))], torch.from_numpy(query_BE))
    scorer = settings.open(victim, state)
    scores = scorer.score(queries)
    assert tuple(scores) == scorer.columns
    near, far = (Neighbourhood(state["reference"], state["key"], k) for k in (4, 8))
    by_hand = near.score(queries.embedding_BE, queries.sample_ids)
    for name in ("k_distance", "slof", "dao"):
        assert np.array_equal(scores[name], by_hand[name].float().numpy())
    lid = far.score(queries.embedding_BE, queries.sample_ids)["lid"]
    assert np.array_equal(scores["lid"], lid.float().numpy())


def test_more_references_than_neighbours_are_needed(world):
    few = Batch([f"r{i}" for i in range(64)], torch.from_numpy(world[0][:64]))
    with pytest.raises(Mistake, match="64 reference embeddings for k = 64"):
        Density().fit(few, None)
    with pytest.raises(Mistake, match="no clean samples"):
        Density(drawn_from="clean").fit(few, None)
