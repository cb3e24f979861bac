"""An isolation forest as tensors, beside scikit-learn's own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from sklearn.ensemble import IsolationForest
from sklearn.tree import DecisionTreeRegressor

from dede_ray.detectors.isolation_forest import Forest, expected_path_length, export_trees
from dede_ray.models.embedding import Batch
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.runtime.config import Mistake

M, E = 700, 12


@pytest.fixture(scope="module")
def victim(victim_folder):
    return load_victim(OpenClipVictim(path=str(victim_folder)))


def batch_of(embedding_BE, name="q"):
    return Batch([f"{name}{i:04d}" for i in range(len(embedding_BE))], torch.from_numpy(embedding_BE))


@pytest.fixture(scope="module")
def corpus():
    """Samples whose dimensions differ in scale, and repeat values, so that leaves of many samples occur."""
    rng = np.random.default_rng(0)
    embedding_ME = rng.normal(2, rng.uniform(0.1, 5, E), (M, E))
    embedding_ME[:300] = np.round(embedding_ME[:300])
    return batch_of(embedding_ME.astype(np.float32), "r")


@pytest.fixture(scope="module")
def queries():
    rng = np.random.default_rng(1)
    return batch_of(np.concatenate([rng.normal(2, 3, (150, E)), rng.normal(12, 1, (50, E))]).astype(np.float32))


def score(settings, victim, corpus, queries):
    return settings.open(victim, settings.fit(corpus, None)).score(queries)["isolation_forest"]


@pytest.mark.parametrize(("num_trees", "num_samples"), [(100, 256), (7, 33), (20, 4096)])
def test_scores_are_those_of_scikit_learn_with_the_sign_turned(victim, corpus, queries, num_trees, num_samples):
    settings = Forest(num_trees=num_trees, num_samples=num_samples, seed=3)
    forest = IsolationForest(n_estimators=num_trees, max_samples=min(num_samples, M), random_state=3)
    forest.fit(corpus.embedding_BE.numpy())
    for judged in (queries, corpus):
        expected = -forest.score_samples(judged.embedding_BE.numpy())
        np.testing.assert_allclose(score(settings, victim, corpus, judged), expected, rtol=0, atol=1e-6)


def test_a_value_on_a_cut_goes_where_scikit_learn_sends_it(victim):
    """A tree of one cut at 0.5, with leaves of two and of three samples; queries on the cut and a step beside it."""
    tree = DecisionTreeRegressor(max_depth=1).fit([[0], [0], [1], [1], [1]], [0, 0, 1, 1, 1])
    assert tree.tree_.threshold[0] == 0.5
    state = export_trees(SimpleNamespace(estimators_=[tree]), 5)
    queries = np.array([[np.nextafter(np.float32(0.5), np.float32(end))] for end in (0, 0.5, 1)], np.float32)
    num_B = tree.tree_.n_node_samples[tree.apply(queries)]
    assert num_B.tolist() == [2, 2, 3]
    scores = Forest().open(victim, state).score(batch_of(queries))["isolation_forest"]
    lengths = [1 + expected_path_length(num) for num in num_B]
    np.testing.assert_allclose(scores, [2 ** -(length / expected_path_length(5)) for length in lengths], rtol=1e-6)


def test_far_samples_score_higher(victim, corpus, queries):
    scores = score(Forest(), victim, corpus, queries)
    assert scores[150:].min() > np.quantile(scores[:150], 0.9)


def test_scores_do_not_depend_on_batch_or_order(victim, corpus, queries):
    for settings in (Forest(), Forest(pca=4)):
        scorer = settings.open(victim, settings.fit(corpus, None))
        whole = scorer.score(queries)["isolation_forest"]
        order = np.random.default_rng(2).permutation(len(queries))
        for start in range(0, len(queries), 17):
            rows = order[start : start + 17].tolist()
            assert np.array_equal(scorer.score(queries.part(rows))["isolation_forest"], whole[rows])


def test_components_are_those_of_largest_variance(victim, corpus, queries):
    """Against scikit-learn's PCA, whose components may point the other way: turned back, the forests agree."""
    from sklearn.decomposition import PCA

    settings = Forest(pca=4)
    state = settings.fit(corpus, None)
    pca = PCA(4, svd_solver="full").fit(corpus.embedding_BE.double().numpy())
    turn = np.sign((pca.components_ * state["component"].numpy()).sum(axis=1))
    np.testing.assert_allclose(state["component"].numpy(), pca.components_ * turn[:, None], atol=1e-6)
    seen, judged = (
        (pca.transform(one.embedding_BE.double().numpy()) * turn).astype(np.float32) for one in (corpus, queries)
    )
    forest = IsolationForest(n_estimators=100, max_samples=256, random_state=0).fit(seen)
    scores = settings.open(victim, state).score(queries)["isolation_forest"]
    # Thresholds are drawn between float32 extremes that two ways of projecting round differently.
    np.testing.assert_allclose(scores, -forest.score_samples(judged), atol=1e-2)
    assert np.median(abs(scores + forest.score_samples(judged))) < 1e-5


def test_a_state_file_is_enough_and_seeds_count(victim, corpus, queries):
    settings = Forest(num_trees=20)
    state = settings.fit(corpus, None)
    read = settings.open(victim, load(save(state)))
    assert read.fingerprint == settings.open(victim, settings.fit(corpus, None)).fingerprint
    np.testing.assert_array_equal(
        read.score(queries)["isolation_forest"], settings.open(victim, state).score(queries)["isolation_forest"]
    )
    other = Forest(num_trees=20, seed=1)
    assert other.open(victim, other.fit(corpus, None)).fingerprint != read.fingerprint
    assert not np.allclose(score(other, victim, corpus, queries), read.score(queries)["isolation_forest"])


def test_equal_embeddings_grow_no_tree_and_score_alike(victim):
    scores = score(Forest(), victim, batch_of(np.ones((30, E), np.float32)), batch_of(np.eye(E, dtype=np.float32)))
    np.testing.assert_allclose(scores, 0.5)  # the one leaf holds everything: c(n) / c(n)


def test_what_it_cannot_grow_on_is_a_mistake(corpus):
    with pytest.raises(Mistake, match="no clean samples"):
        Forest(drawn_from="clean").fit(corpus, None)
    with pytest.raises(Mistake, match="13 principal components of 700 embeddings of width 12"):
        Forest(pca=13).fit(corpus, None)
    with pytest.raises(Mistake, match="2 samples or more, found 1"):
        Forest().fit(corpus.part([0]), None)


def test_clean_samples_can_grow_it(victim, corpus, queries):
    clean = corpus.part(range(100))
    settings = Forest(drawn_from="clean")
    scores = settings.open(victim, settings.fit(corpus, clean)).score(queries)["isolation_forest"]
    np.testing.assert_array_equal(scores, score(Forest(), victim, clean, queries))
