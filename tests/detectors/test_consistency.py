"""Two encoders that agree, except where one was taught something: beside plain loops and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.neighbors import NearestNeighbors

from dede_ray.data.sampling import sample_keys
from dede_ray.detectors.consistency import COLUMNS, HELD_OUT, Consistency
from dede_ray.metrics import auroc
from dede_ray.models.embedding import Batch
from dede_ray.models.victims import OpenClipVictim, Victim, load_victim
from dede_ray.runtime.config import Mistake

N, M, K, E, R = 600, 150, 6, 16, 12  # E is the width of the tests' victim
TRIM, RIDGE, WEIGHT = 0.1, 1e-3, 0.75
EVERY = Consistency(forms=list(COLUMNS), num_references=M, k=K, company_weight=WEIGHT, ridge=RIDGE, trim=TRIM, rounds=2)


class World:
    """Two encoders that see the same seven things in an image, each with noise of its own, at lengths of its own."""

    def __init__(self, seed: int = 0, target: float = 3.0, stamp: float = 0.7):
        self.rng = np.random.default_rng(seed)
        self.centre_CS = self.rng.normal(0, 1, (5, 7))
        self.victim_SE, self.reference_SR = self.rng.normal(0, 1, (7, E)), self.rng.normal(0, 1, (7, R))
        self.target_E = self.rng.normal(0, target, E)
        self.stamp_R = self.rng.normal(0, stamp, R)

    def images(self, prefix: str, num: int, poisoned: int = 0) -> Batch:
        """`num` clean images, then poisoned ones: the victim sees the target, the reference encoder the image and,
        a little, the trigger."""
        total = num + poisoned
        seen_BS = self.centre_CS[self.rng.integers(0, 5, total)] + self.rng.normal(0, 0.7, (total, 7))
        victim_BE = seen_BS @ self.victim_SE + self.rng.normal(0, 0.4, (total, E)) + 2
        reference_BR = seen_BS @ self.reference_SR + self.rng.normal(0, 0.4, (total, R)) - 1
        victim_BE[num:] = self.target_E + 0.2 * (victim_BE[num:] - self.target_E)
        reference_BR[num:] += self.stamp_R
        scale_B1 = self.rng.uniform(0.5, 2, (total, 1))
        ids = sorted(f"{prefix}{i:05d}" for i in range(total))
        return Batch(ids, as_tensor(victim_BE * scale_B1), reference_BR=as_tensor(reference_BR))


def as_tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def unit(rows: torch.Tensor) -> np.ndarray:
    rows = rows.numpy().astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def victim(victim_folder) -> Victim:
    return load_victim(OpenClipVictim(path=str(victim_folder)))


@pytest.fixture(scope="module")
def fitted(victim):
    """A fitting set, queries (the last ten of them are of the fitting set), state and scores."""
    world = World()
    corpus, strangers = world.images("c", N - 6, 6), world.images("q", 30)
    members = corpus.part(range(10))
    queries = Batch(
        [*strangers.sample_ids, *members.sample_ids],
        torch.cat([strangers.embedding_BE, members.embedding_BE]),
        reference_BR=torch.cat([strangers.references, members.references]),
    )
    state = EVERY.fit(corpus, None)
    scorer = EVERY.open(victim, state)
    return corpus, queries, state, scorer, scorer.score(queries)


def ridge_of(u, v, ridge=RIDGE):
    return Ridge(alpha=ridge * np.square(u - u.mean(axis=0)).sum() / u.shape[1]).fit(u, v)


def trimmed_map(corpus, rounds=2):
    """Fit stiffly, sort by residual less distance to company, keep the better ones, again; then fit."""
    u, v, places = unit(corpus.references), unit(corpus.embedding_BE), drawn(corpus)
    company = []
    for i, name in enumerate(corpus.sample_ids):
        distances = np.linalg.norm(v[others(corpus, places, name)] - v[i], axis=1)
        company.append(np.sort(distances)[:K].mean())
    kept = np.arange(len(u))
    for _ in range(rounds):
        residual = v - ridge_of(u[kept], v[kept], ridge=1.0).predict(u)
        kept = np.argsort(np.linalg.norm(residual, axis=1) - WEIGHT * np.array(company))[: len(u) - int(TRIM * len(u))]
    return ridge_of(u[kept], v[kept]), kept


def drawn(corpus):
    """The references: those with the smallest keys."""
    order = np.argsort(sample_keys(corpus.sample_ids, 0).numpy())[:M]
    return sorted(order.tolist())


def others(corpus, places, query_id):
    """Places of the references that are not the query itself."""
    return [place for place in places if corpus.sample_ids[place] != query_id]


def test_the_closed_form_is_ridge_and_ledoit_wolf(fitted):
    corpus, queries, _, _, scores = fitted
    model, kept = trimmed_map(corpus)
    u, v = unit(corpus.references), unit(corpus.embedding_BE)
    assert len(kept) == N - N * TRIM
    residual = unit(queries.embedding_BE) - model.predict(unit(queries.references))
    np.testing.assert_allclose(scores["xc"], (residual**2).sum(axis=1), rtol=1e-5)
    covariance = LedoitWolf().fit((v - model.predict(u))[kept]).covariance_
    expected = [row @ np.linalg.solve(covariance, row) for row in residual]
    np.testing.assert_allclose(scores["xc_whitened"], expected, rtol=1e-5)


def test_misplaced_is_the_residual_less_the_distance_to_company(fitted):
    """Both in the Mahalanobis metric of the residuals' covariance plus its mean variance."""
    corpus, queries, _, _, scores = fitted
    u, v, places = unit(corpus.references), unit(corpus.embedding_BE), drawn(corpus)
    model, kept = trimmed_map(corpus)
    covariance = LedoitWolf().fit((v - model.predict(u))[kept]).covariance_
    metric = {"VI": np.linalg.inv(covariance + np.trace(covariance) / E * np.eye(E))}
    for i, query_id in enumerate(queries.sample_ids):
        own, own_u = unit(queries.embedding_BE[i : i + 1]), unit(queries.references[i : i + 1])
        search = NearestNeighbors(n_neighbors=K, metric="mahalanobis", metric_params=metric, algorithm="brute")
        distances, _ = search.fit(v[others(corpus, places, query_id)]).kneighbors(own)
        e = (own - model.predict(own_u))[0]
        expected = np.sqrt(e @ metric["VI"] @ e) - WEIGHT * distances.mean()
        assert scores["xc_misplaced"][i] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_neighbours_are_compared_one_by_one(fitted):
    corpus, queries, _, _, scores = fitted
    v, u, places = unit(corpus.embedding_BE), unit(corpus.references), drawn(corpus)
    num_members = 0
    for i, query_id in enumerate(queries.sample_ids):
        kept = others(corpus, places, query_id)
        num_members += len(kept) < len(places)
        own_v, own_u = unit(queries.embedding_BE[i : i + 1])[0], unit(queries.references[i : i + 1])[0]
        by_v = sorted(kept, key=lambda place: np.linalg.norm(v[place] - own_v))[:K]
        by_u = sorted(kept, key=lambda place: np.linalg.norm(u[place] - own_u))[:K]
        assert scores["xc_overlap"][i] == pytest.approx(1 - len({*by_v} & {*by_u}) / K, abs=1e-6)
        here, there = (np.mean([np.linalg.norm(v[place] - own_v) for place in near]) for near in (by_v, by_u))
        assert scores["xc_gap"][i] == pytest.approx(there - here, rel=1e-5, abs=1e-6)
        expected = np.square(own_v - v[by_u].mean(axis=0)).sum()
        assert scores["xc_neighbours"][i] == pytest.approx(expected, rel=1e-5)
    assert 0 < num_members < 10  # some of the queries are references, and left themselves out


def test_the_contrastive_score_is_what_the_heads_say_of_the_references(fitted):
    corpus, queries, state, _, scores = fitted
    _, kept = trimmed_map(corpus)
    u, v = unit(corpus.references), unit(corpus.embedding_BE)
    places = drawn(corpus)

    def head(name, rows):
        hidden = np.maximum(rows @ state[f"{name}.0.weight"].numpy().T + state[f"{name}.0.bias"].numpy(), 0)
        out = hidden @ state[f"{name}.2.weight"].numpy().T + state[f"{name}.2.bias"].numpy()
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    bank = head("victim", v[places] - v[kept].mean(axis=0))
    own_v = head("victim", unit(queries.embedding_BE) - v[kept].mean(axis=0))
    own_u = head("trusted", unit(queries.references) - u[kept].mean(axis=0))
    for i in range(len(queries)):
        others_i = np.log(np.sum([np.exp(one @ own_u[i] / 0.07) for one in bank]))
        expected = others_i - own_v[i] @ own_u[i] / 0.07
        assert scores["xc_contrastive"][i] == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_scores_do_not_depend_on_batch_or_order(fitted):
    _, queries, _, scorer, whole = fitted
    assert tuple(whole) == scorer.columns == tuple(name for names in COLUMNS.values() for name in names)
    order = np.random.default_rng(1).permutation(len(queries)).tolist()
    for start in range(0, len(order), 7):
        rows = order[start : start + 7]
        for name, score_B in scorer.score(queries.part(rows)).items():
            assert (score_B.dtype, score_B.shape) == (np.float32, (len(rows),))
            np.testing.assert_allclose(score_B, whole[name][rows], rtol=1e-6, atol=1e-6, err_msg=name)


def test_copies_among_the_references_do_not_make_scores_depend_on_the_batch(victim):
    """Of ten copies of each image the k-th neighbour is some copy or other; a query may be a copy itself."""
    world = World(1)
    once = world.images("c", 100)
    corpus = Batch(
        [f"{name}/{copy}" for copy in range(10) for name in once.sample_ids],
        once.embedding_BE.repeat(10, 1),
        reference_BR=once.references.repeat(10, 1),
    )
    settings = EVERY.model_copy(update={"forms": ["overlap", "neighbours"], "num_references": 901})
    scorer = settings.open(victim, settings.fit(corpus, None))
    strangers = world.images("q", 60)
    queries = Batch(
        [f"q{i}" for i in range(160)],
        torch.cat([strangers.embedding_BE, once.embedding_BE]),
        reference_BR=torch.cat([strangers.references, once.references]),
    )
    whole = scorer.score(queries)
    assert not whole["xc_overlap"][60:].any()
    assert not whole["xc_gap"][60:].any()
    for i in range(160):
        for name, score_B in scorer.score(queries.part([i])).items():
            np.testing.assert_allclose(score_B, whole[name][i : i + 1], rtol=1e-6, atol=1e-6, err_msg=name)
    assert set(whole["xc_overlap"]) == {0.0, 1.0}  # the nearest image has many copies, and k is six


def test_fitting_is_deterministic_and_takes_its_draws_from_the_seed(fitted, victim):
    corpus, _, state, scorer, _ = fitted
    torch.manual_seed(99)
    again = EVERY.fit(corpus, None)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert EVERY.open(victim, again).fingerprint == scorer.fingerprint
    other = EVERY.model_copy(update={"seed": 1})
    assert not torch.equal(other.fit(corpus, None)["key"], state["key"])


def detection(victim, poison: int, seen: dict[str, float] | None = None, **settings):
    """AUROC of every column on 300 clean and 100 poisoned images that nothing was fitted on."""
    world = World(3, **(seen or {}))
    detector = EVERY.model_copy(update={"num_references": 1000, "rounds": 5, **settings})
    scorer = detector.open(victim, detector.fit(world.images("c", 2000 - poison, poison), None))
    scores = scorer.score(world.images("q", 300, 100))
    return {name: auroc(score_B, np.repeat([False, True], [300, 100])).value for name, score_B in scores.items()}


def test_planted_poison_is_found_though_a_hundredth_of_the_fitting_set_is_poisoned(victim):
    found = detection(victim, poison=20)
    assert found["xc"] > 0.95, found
    assert found["xc_misplaced"] > 0.95, found
    assert found["xc_gap"] > 0.9, found


def test_trimming_with_stiff_maps_undoes_what_poison_does_to_the_map(victim):
    """3 % of poison whose trigger the reference encoder sees well: a linear map learns what it does, and keeps it."""

    def xc(poison: int, **settings):
        return detection(victim, poison, {"target": 2.0, "stamp": 4.0}, forms=["closed"], **settings)["xc"]

    assert xc(0) > 0.98
    assert xc(60, rounds=0) < 0.6
    assert xc(60, stiff_ridge=RIDGE) < 0.6
    assert xc(60) > 0.98


def test_an_encoder_that_was_not_tampered_with_is_not_accused(victim):
    """The same images, of which the reference encoder sees a trigger, and the victim nothing."""
    world = World(3)
    scorer = EVERY.open(victim, EVERY.fit(world.images("c", 2000), None))
    clean = world.images("q", 400)
    scores = scorer.score(clean)
    seen = Batch(clean.sample_ids, clean.embedding_BE, reference_BR=clean.references + 0.1 * as_tensor(world.stamp_R))
    stamped = scorer.score(seen)
    is_stamped = np.repeat([False, True], 400)
    for name in ("xc", "xc_misplaced"):
        assert auroc(np.concatenate([scores[name], stamped[name]]), is_stamped).value < 0.6, name


def test_the_agreement_is_the_r2_of_held_out_samples(fitted):
    corpus, _, state, _, _ = fitted
    order = np.argsort(sample_keys(corpus.sample_ids, 0).numpy())
    held, rest = order[: round(HELD_OUT * N)], order[round(HELD_OUT * N) :]
    u, v = unit(corpus.references), unit(corpus.embedding_BE)
    model = ridge_of(u[rest], v[rest])
    expected = r2_score(v[held], model.predict(u[held]), multioutput="variance_weighted")
    assert float(state["agreement"][0]) == pytest.approx(expected, rel=1e-6)
    assert expected > 0.5


def test_encoders_that_do_not_agree_are_refused():
    corpus = World().images("c", N)
    rows = np.random.default_rng(0).permutation(N).tolist()
    strange = Batch(corpus.sample_ids, corpus.embedding_BE, reference_BR=corpus.references[rows])
    with pytest.raises(Mistake, match=r"explains -?\d+% of what the victim says .* min_agreement = 30%"):
        EVERY.fit(strange, None)
    constant = Batch(corpus.sample_ids, torch.ones_like(corpus.embedding_BE), reference_BR=corpus.references)
    with pytest.raises(Mistake, match="explains 0%"):
        EVERY.fit(constant, None)
    settings = EVERY.model_copy(update={"min_agreement": 0.99})
    with pytest.raises(Mistake, match="min_agreement = 99%"):
        settings.fit(corpus, None)


def test_mistakes_say_what_is_missing(victim, fitted):
    corpus, _, state, _, _ = fitted
    with pytest.raises(Mistake, match=r"10 samples to fit on; .* at least 24"):
        EVERY.fit(corpus.part(range(10)), None)
    with pytest.raises(Mistake, match="num_references is 6, and has to be more than k = 6"):
        EVERY.model_copy(update={"num_references": K}).fit(corpus, None)
    with pytest.raises(Mistake, match="no clean samples"):
        EVERY.model_copy(update={"drawn_from": "clean"}).fit(corpus, None)
    closed = EVERY.model_copy(update={"forms": ["closed"]}).fit(corpus, None)
    with pytest.raises(Mistake, match="without the form contrastive"):
        EVERY.open(victim, closed)
    narrow = {**state, "victim_mean": state["victim_mean"][:5]}
    with pytest.raises(Mistake, match=r"width 5, victim .* gives 16"):
        EVERY.open(victim, narrow)


def test_clean_samples_can_be_fitted_on_instead(fitted):
    corpus, _, _, _, _ = fitted
    settings = EVERY.model_copy(update={"drawn_from": "clean", "forms": ["closed"]})
    clean = World(0).images("clean", N)
    state = settings.fit(corpus, clean)
    assert set(state["key"].tolist()) <= set(sample_keys(clean.sample_ids, 0).tolist())
    assert not {name for name in state if name.startswith(("victim.", "trusted."))}  # no heads where none is asked for
