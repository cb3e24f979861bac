"""Distances to a frozen reference set, beside plain loops and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from dede_ray.data.sampling import sample_keys
from dede_ray.detectors.density import COMPAT_COLUMNS, EPSILON, Density, Neighbourhood, compat_scores
from dede_ray.metrics import auroc
from dede_ray.models.embedding import Batch
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.runtime.config import Mistake

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
    scores = neighbourhood(reference_ME).score(torch.from_numpy(query_BE), sample_keys(["q"] * len(query_BE), 0))
    assert scores.keys() == expected.keys()
    for name, score_B in scores.items():
        score_B = score_B.float().numpy()
        np.testing.assert_allclose(score_B, expected[name], rtol=1e-5, err_msg=name)
    nearest = NearestNeighbors(n_neighbors=K).fit(reference_ME).kneighbors(query_BE)[0]
    np.testing.assert_allclose(scores["k_distance"].numpy(), nearest[:, -1], rtol=1e-5)


def test_scores_do_not_depend_on_batch_or_order(world):
    reference_ME, query_BE = world
    model, ids = neighbourhood(reference_ME), [f"q{i}" for i in range(len(query_BE))]
    whole = model.score(torch.from_numpy(query_BE), sample_keys(ids, 0))
    order = np.random.default_rng(1).permutation(len(ids))
    for start in range(0, len(ids), 7):
        rows = order[start : start + 7]
        part = model.score(torch.from_numpy(query_BE[rows]), sample_keys([ids[row] for row in rows], 0))
        for name, score_B in part.items():
            assert torch.equal(score_B.float(), whole[name].float()[rows]), name


def test_a_reference_is_not_its_own_neighbour(world):
    reference_ME, _ = world
    model = neighbourhood(reference_ME)
    own = model.score(torch.from_numpy(reference_ME[:5]), sample_keys([f"r{i}" for i in range(5)], 0))["k_distance"]
    stranger = model.score(torch.from_numpy(reference_ME[:5]), sample_keys(["a", "b", "c", "d", "e"], 0))["k_distance"]
    np.testing.assert_allclose(own, model.k_distance_M[:5], rtol=1e-6)
    assert (stranger < own).all()


def test_equal_embeddings_have_finite_scores():
    model = neighbourhood(np.ones((20, E), np.float32))
    scores = model.score(torch.ones(3, E), sample_keys(["x", "y", "z"], 0))
    assert all(np.isfinite(score_B).all() for score_B in scores.values())


def test_a_copy_of_a_reference_has_the_same_scores_in_any_batch(world):
    """Its distance is a difference of products, and zero only up to how they round."""
    reference_ME = np.tile(world[0], (K + 3, 1))[:-1]
    model, copies = neighbourhood(reference_ME), torch.from_numpy(world[0])
    whole = model.score(copies, sample_keys(["q"] * M, 0))
    assert not whole["k_distance"].any()
    for i in range(M):
        for name, score_B in model.score(copies[i : i + 1], sample_keys(["q"], 0)).items():
            assert torch.equal(score_B.float(), whole[name][i : i + 1].float()), name


def test_the_reference_set_is_a_keyed_draw(world, victim_folder):
    reference_ME, query_BE = world
    settings, victim = Density(num_references=50, k=4, lid_k=8), load_victim(OpenClipVictim(path=str(victim_folder)))
    corpus = Batch([f"r{i}" for i in range(M)], torch.from_numpy(reference_ME))
    state = settings.fit(corpus, None)
    assert state["reference"].shape == (40, E)  # without the loneliest fifth
    rows = np.random.default_rng(0).permutation(M).tolist()
    shuffled = settings.fit(corpus.part(rows), None)
    assert set(shuffled["key"].tolist()) == set(state["key"].tolist())
    queries = Batch([f"q{i}" for i in range(len(query_BE))], torch.from_numpy(query_BE))
    scorer = settings.open(victim, state)
    scores = scorer.score(queries)
    assert tuple(scores) == scorer.columns
    near, far = (Neighbourhood(state["reference"], state["key"], k) for k in (4, 8))
    by_hand = near.score(queries.embedding_BE, queries.keys(0))
    for name in ("k_distance", "slof", "dao"):
        assert np.array_equal(scores[name], by_hand[name].float().numpy())
    lid = far.score(queries.embedding_BE, queries.keys(0))["lid"]
    assert np.array_equal(scores["lid"], lid.float().numpy())


def test_more_references_than_neighbours_are_needed(world):
    few = Batch([f"r{i}" for i in range(64)], torch.from_numpy(world[0][:64]))
    with pytest.raises(Mistake, match="51 reference embeddings for k = 64"):
        Density().fit(few, None)
    with pytest.raises(Mistake, match="no clean samples"):
        Density(drawn_from="clean").fit(few, None)


# ------------------------------------------------------------------------------------ how much poison may be in the set


def mixture_auroc(num_poisoned_references, trim, seed=0, far=1.2, num_references=2048, k=16, width=64):
    """AUROC of one tight clump against a mixture of 20 classes, with so much of the clump among the references."""
    rng = np.random.default_rng(seed)
    centre_CE = rng.normal(0, 1, (20, width))
    direction_E = rng.normal(0, 1, width)

    def clean(num):
        return centre_CE[rng.integers(0, 20, num)] + rng.normal(0, 0.5, (num, width))

    def poisoned(num):  # as far out as the classes' own centres, of a tenth of their spread
        return far * direction_E + rng.normal(0, 0.05, (num, width))

    reference_ME = np.concatenate([clean(num_references - num_poisoned_references), poisoned(num_poisoned_references)])
    pool = Batch([f"r{i}" for i in range(num_references)], torch.from_numpy(reference_ME.astype(np.float32)))
    state = Density(trim=trim).fit(pool, None)
    model = Neighbourhood(state["reference"], state["key"], k)
    query_BE = torch.from_numpy(np.concatenate([clean(300), poisoned(100)]))
    scores = model.score(query_BE, sample_keys(["q"] * 400, 0))
    is_poisoned = np.repeat([False, True], [300, 100])
    return {name: auroc(scores[name].numpy(), is_poisoned).value for name in ("k_distance", "dao")}


def test_poison_in_the_references_turns_no_score_around_unless_they_are_left_untrimmed():
    for num_poisoned, far in ((0, 1.2), (4, 1.2), (20, 1.2), (60, 1.2), (204, 1.6)):  # up to 10 %, two classes' worth
        for name, value in mixture_auroc(num_poisoned, Density().trim, far=far).items():
            assert value > 0.9, (num_poisoned, name, value)
    assert all(value < 0.5 for value in mixture_auroc(60, trim=0).values())


# ------------------------------------------------------------------------------------------------------------- compat


def compat_by_hand(embedding_NE, batch_size, k, lid_k, caption_NE, compat_index, seed):
    """One sample, one list at a time, with the quirks as the specification words them."""
    order = np.random.default_rng(seed).permutation(len(embedding_NE))
    expected = {name: np.zeros(len(order)) for name in COMPAT_COLUMNS}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        references = [*embedding_NE[rows], *(caption_NE[rows] if caption_NE is not None else [])]
        kd, lid = [], []
        for one in references:
            a = sorted(np.linalg.norm(np.float64(one) - np.float64(other)) for other in references)
            assert a[0] == 0  # oneself
            kd.append(a[k])
            lid.append(-k / sum(np.log(a[i] / a[k] + 1e-4) for i in range(k)))
        for i, row in enumerate(rows):
            own = {i, i + len(rows)}
            kept = [j for j in range(len(references)) if j not in own]
            a = [np.linalg.norm(np.float64(embedding_NE[row]) - np.float64(references[j])) for j in kept]
            places = sorted(range(len(kept)), key=lambda place: a[place])
            a = [a[place] for place in places]
            read = [place if compat_index else kept[place] for place in places[:k]]
            m = sum(a[:lid_k]) / lid_k
            expected["k_distance"][row] = a[k]
            expected["lid"][row] = -lid_k / sum(np.log(a[i] / a[lid_k] + 1e-4) for i in range(lid_k))
            expected["lid_mom"][row] = m / (a[lid_k] - m)
            expected["slof"][row] = np.mean([a[k] / kd[o] for o in read])
            expected["dao"][row] = np.mean([lid[o] * np.log(a[k] / kd[o]) for o in read])
    return expected


@pytest.mark.parametrize("with_captions", [False, True])
@pytest.mark.parametrize("compat_index", [False, True])
def test_compat_scores_are_the_published_ones(with_captions, compat_index):
    rng = np.random.default_rng(3)
    embedding_NE, caption_NE = (rng.normal(0, 1, (70, E)).astype(np.float32) for _ in range(2))
    caption_NE = caption_NE if with_captions else None
    arguments = (embedding_NE, 40, 5, 9, caption_NE, compat_index, 4)
    scores, expected = compat_scores(*arguments), compat_by_hand(*arguments)
    assert tuple(scores) == COMPAT_COLUMNS
    for name, score_N in scores.items():
        np.testing.assert_allclose(score_N, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_index_defect_moves_only_what_looks_neighbours_up():
    embedding_NE = np.random.default_rng(3).normal(0, 1, (70, E)).astype(np.float32)
    defect, right = (compat_scores(embedding_NE, 40, 5, 9, compat_index=index) for index in (True, False))
    moved = {name for name in COMPAT_COLUMNS if not np.array_equal(defect[name], right[name])}
    assert moved == {"slof", "dao"}


def test_compat_scores_are_finite_and_depend_on_the_batch():
    equal = compat_scores(np.ones((20, E), np.float32), 20, 5, 9)  # all distances are 0, all ratios 0 / 0
    assert all((score_N == 1000).all() for name, score_N in equal.items() if name in ("lid", "lid_mom", "slof", "dao"))
    embedding_NE = np.random.default_rng(3).normal(0, 1, (40, E)).astype(np.float32)
    one, other = (compat_scores(embedding_NE, 20, 5, 9, seed=seed)["dao"] for seed in (0, 1))
    assert not np.array_equal(one, other)
    with pytest.raises(Mistake, match="batch of 5 samples for 9 neighbours"):
        compat_scores(embedding_NE[:25], 20, 5, 9)
