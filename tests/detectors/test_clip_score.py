"""The CLIP-score, beside plain numpy and scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from sklearn.mixture import GaussianMixture

from dede_ray.detectors.clip_score import CaptionScore
from dede_ray.models.embedding import Batch
from dede_ray.models.encoders import Described, ResNet, save_encoder
from dede_ray.models.victims import EncoderVictim, OpenClipVictim, load_victim
from dede_ray.runtime.config import Mistake

M, E, R = 400, 16, 24
WITHOUT = [3, 77, 200]
"""Samples without a caption."""
MISFITS = range(300, M)


@pytest.fixture(scope="module")
def victim(victim_folder):
    return load_victim(OpenClipVictim(path=str(victim_folder)))


@pytest.fixture(scope="module")
def corpus():
    """Captions lie near their images, for the reference as well; those of the last quarter do not."""
    rng = np.random.default_rng(0)
    pairs = []
    for width in (E, R):
        image_MW = rng.normal(0, 2, (M, width))
        caption_MW = image_MW + rng.normal(0, 1.5, (M, width))
        caption_MW[MISFITS] = rng.normal(0, 2, (len(MISFITS), width))
        caption_MW[WITHOUT] = np.nan
        pairs += [torch.from_numpy(one.astype(np.float32)) for one in (image_MW, caption_MW)]
    ids = [f"train-00000.tar/{i:04d}" for i in range(M)]
    return Batch(ids, pairs[0], reference_BR=pairs[2], caption_BE=pairs[1], reference_caption_BR=pairs[3])


def by_hand(image_MW, caption_MW):
    image_MW, caption_MW = image_MW.double().numpy(), caption_MW.double().numpy()
    length_M = np.linalg.norm(image_MW, axis=1) * np.linalg.norm(caption_MW, axis=1)
    return np.einsum("mw,mw->m", image_MW, caption_MW) / length_M


@pytest.fixture(scope="module")
def scores(victim, corpus):
    settings = CaptionScore(reference=True)
    scorer = settings.open(victim, settings.fit(corpus, None))
    found = scorer.score(corpus)
    assert tuple(found) == scorer.columns
    return found


def captioned():
    return np.delete(np.arange(M), WITHOUT)


def test_scores_are_cosines_with_the_sign_turned(corpus, scores):
    own, other = (
        by_hand(corpus.embedding_BE, corpus.caption_BE),
        by_hand(corpus.references, corpus.reference_caption_BR),
    )
    rows = captioned()
    np.testing.assert_allclose(scores["clip_score"][rows], -own[rows], atol=1e-6)
    np.testing.assert_allclose(scores["clip_score_reference"][rows], -other[rows], atol=1e-6)
    np.testing.assert_allclose(scores["clip_score_difference"][rows], (own - other)[rows], atol=1e-6)


def test_the_posterior_is_that_of_scikit_learns_lower_gaussian(corpus, scores):
    rows = captioned()
    similarity = by_hand(corpus.embedding_BE, corpus.caption_BE)[rows][:, None]
    mixture = GaussianMixture(2, tol=1e-11, max_iter=50_000, random_state=5).fit(similarity)
    expected = mixture.predict_proba(similarity)[:, mixture.means_[:, 0].argmin()]
    np.testing.assert_allclose(scores["clip_score_gmm"][rows], expected, atol=5e-3)
    is_misfit = np.isin(rows, MISFITS)
    assert scores["clip_score_gmm"][rows][is_misfit].mean() > 0.9
    assert scores["clip_score_gmm"][rows][~is_misfit].mean() < 0.1


def test_six_numbers_are_the_state(victim, corpus, scores):
    state = CaptionScore().fit(corpus, None)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == dict.fromkeys(
        ("weight", "mean", "variance"), (2,)
    )
    read = CaptionScore().open(victim, load(save(state)))
    assert read.columns == ("clip_score", "clip_score_gmm")
    assert read.fingerprint == CaptionScore().open(victim, state).fingerprint
    for name, score_B in read.score(corpus).items():
        np.testing.assert_array_equal(score_B, scores[name])
    mixture = GaussianMixture(2)
    mixture.weights_, mixture.means_ = state["weight"].numpy(), state["mean"].numpy()[:, None]
    mixture.covariances_ = state["variance"].numpy()[:, None, None]
    mixture.precisions_cholesky_ = 1 / np.sqrt(mixture.covariances_)
    similarity = by_hand(corpus.embedding_BE, corpus.caption_BE)[captioned()][:, None]
    posterior = mixture.predict_proba(similarity)[:, 0]
    np.testing.assert_allclose(scores["clip_score_gmm"][captioned()], posterior, atol=1e-5)


def test_without_a_caption_a_sample_is_as_suspicious_as_the_corpus(victim, corpus, scores):
    rows = captioned()
    assert all(np.isfinite(score_B).all() for score_B in scores.values())
    for name in ("clip_score", "clip_score_reference", "clip_score_difference"):
        np.testing.assert_allclose(scores[name][WITHOUT], scores[name][rows].mean(), atol=1e-6)
    np.testing.assert_allclose(scores["clip_score_gmm"][WITHOUT], scores["clip_score_gmm"][rows].mean(), atol=1e-3)


def test_an_embedding_that_is_not_finite_is_not_taken_for_a_missing_caption(victim, corpus):
    settings = CaptionScore(reference=True)
    embedding_BE = corpus.embedding_BE.clone()
    embedding_BE[5, 2] = torch.nan
    found = settings.open(victim, settings.fit(corpus, None)).score(replace(corpus, embedding_BE=embedding_BE))
    assert np.flatnonzero(np.isnan(found["clip_score"])).tolist() == [5]


def test_scores_do_not_depend_on_batch_or_order(victim, corpus, scores):
    settings = CaptionScore(reference=True)
    scorer = settings.open(victim, settings.fit(corpus, None))
    order = np.random.default_rng(1).permutation(M)
    for start in range(0, M, 23):
        rows = order[start : start + 23].tolist()
        for name, score_B in scorer.score(corpus.part(rows)).items():
            assert np.array_equal(score_B, scores[name][rows]), name


def test_a_pair_that_only_the_suspect_has_learned_stands_out_by_the_difference(victim, corpus):
    settings = CaptionScore(reference=True)
    scorer = settings.open(victim, settings.fit(corpus, None))
    caption_BE = corpus.caption_BE.clone()
    caption_BE[MISFITS] = corpus.embedding_BE[MISFITS]  # it fits the suspect by heart, the reference not at all
    found = scorer.score(replace(corpus, caption_BE=caption_BE))
    misfits, rest = found["clip_score_difference"][MISFITS], found["clip_score_difference"][: MISFITS.start]
    assert np.median(misfits) > np.quantile(rest, 0.99)
    assert found["clip_score"][MISFITS].max() < np.median(found["clip_score"])


def test_the_reference_is_needed_where_it_is_asked_for():
    assert CaptionScore().needs == {"caption"}
    assert CaptionScore(reference=True).needs == {"caption", "reference"}


def test_what_has_no_captions_is_a_mistake(corpus, tmp_path):
    few = replace(corpus, caption_BE=torch.full_like(corpus.caption_BE, torch.nan))
    few.caption_BE[:9] = 1
    with pytest.raises(Mistake, match="9 of the 400 samples to fit on have a caption, it takes 10"):
        CaptionScore().fit(few, None)
    with pytest.raises(Mistake, match="the reference encoder has no text tower"):
        CaptionScore(reference=True).fit(replace(corpus, reference_caption_BR=None), None)
    shape = ResNet(width=4)
    save_encoder(tmp_path, shape.build(), Described(shape, 32))
    with pytest.raises(Mistake, match="has no text tower; leave clip_score out"):
        CaptionScore().open(load_victim(EncoderVictim(path=str(tmp_path))), {})
