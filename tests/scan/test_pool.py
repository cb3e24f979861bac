"""What the pool teaches finds more, and does not know who calibrates."""

import math

import numpy as np
import pytest

from dede_ray.metrics import false_discovery_proportion
from dede_ray.scan.decisions import Conformal, conformal_p_values
from dede_ray.scan.pool import Amplify, Classifier, Company, Looks

NUM, CLEAN, WIDTH = 600, 600, 16


def looks(num, content=None, perceptual=None):
    ids = [f"a.tar/{i:05d}" for i in range(num)]
    return Looks(ids, content or [f"hash {i}" for i in range(num)], perceptual or [None] * num)


def pool(rng, num_poisoned, lift=1.0, strength=1.2):
    """Corpus, then calibration: a base score that poison raises a little, residuals that it turns one way."""
    is_poisoned = np.arange(NUM + CLEAN) < num_poisoned
    residual_NR = rng.normal(size=(NUM + CLEAN, WIDTH))
    residual_NR[is_poisoned] += strength * rng.normal(size=WIDTH)
    base_N = np.linalg.norm(residual_NR, axis=1) + lift * is_poisoned + 1.5 * rng.normal(size=NUM + CLEAN)
    return base_N, residual_NR, is_poisoned[:NUM]


def flagged(score_N, seed):
    ids = [f"a.tar/{i:05d}" for i in range(NUM)]
    return Conformal(q=0.1, seed=seed).decide(score_N[:NUM], score_N[NUM:], ids).flagged


def test_who_is_exchanged_for_whom_changes_nothing_but_whose_score_is_whose():
    rng = np.random.default_rng(0)
    base_N, residual_NR, _ = pool(rng, 30)
    content = [f"hash {i // 2}" for i in range(NUM + CLEAN)]  # copies, some across the border
    perceptual = [int(h) for h in rng.integers(0, 2**63, NUM + CLEAN)]
    perceptual[1:400:3] = perceptual[0:399:3]
    given = looks(NUM + CLEAN, content, perceptual)
    order = rng.permutation(NUM + CLEAN)
    moved = Looks([given.sample_ids[i] for i in order], [content[i] for i in order], [perceptual[i] for i in order])
    before = Company().score(base_N, residual_NR, given)
    np.testing.assert_allclose(Company().score(base_N[order], residual_NR[order], moved), before[order], atol=1e-12)
    before = Amplify().score(base_N, residual_NR, given)
    np.testing.assert_allclose(Amplify().score(base_N[order], residual_NR[order], moved), before[order], atol=1e-3)
    learner_MR = rng.normal(size=(200, WIDTH))
    before = Classifier(repeats=1).score(residual_NR, learner_MR, given)
    after = Classifier(repeats=1).score(residual_NR[order], learner_MR, moved)
    np.testing.assert_allclose(after, before[order], atol=1e-3)  # as far as the optimiser goes


@pytest.mark.parametrize("which", ["company", "amplified", "classifier"])
def test_p_values_of_clean_samples_are_as_rare_as_they_say(which):
    rng = np.random.default_rng(1)
    p_value = []
    for trial in range(12 if which == "classifier" else 40):
        base_N, residual_NR, is_poisoned = pool(rng, 12 * (trial % 2))  # with and without poison
        given = looks(NUM + CLEAN)
        if which == "company":
            score_N = Company().score(base_N, residual_NR, given)
        elif which == "amplified":
            score_N = Amplify().score(base_N, residual_NR, given)
        else:
            score_N = Classifier(repeats=1).score(residual_NR, rng.normal(size=(200, WIDTH)), given)
        p = conformal_p_values(score_N[:NUM], score_N[NUM:], given.sample_ids[:NUM], seed=trial)
        p_value.append(p[~is_poisoned])
    for t in (0.01, 0.1):
        share = [(one <= t).mean() for one in p_value]
        assert np.mean(share) <= t + 3 * np.std(share) / math.sqrt(len(share)) + 1e-9, t


@pytest.mark.parametrize("which", ["company", "classifier"])
def test_what_stands_together_is_found_where_each_alone_is_not(which):
    rng = np.random.default_rng(2)
    alone, together, proportions = [], [], []
    for trial in range(8):
        base_N, residual_NR, is_poisoned = pool(rng, 30, strength=1.2 if which == "company" else 2.0)
        base_N += 3 * rng.normal(size=NUM + CLEAN) * (which == "classifier")
        if which == "company":
            score_N = Company(share=0.15).score(base_N, residual_NR, looks(NUM + CLEAN))
        else:
            score_N = Classifier(repeats=1).score(residual_NR, rng.normal(size=(400, WIDTH)), looks(NUM + CLEAN))
        alone.append(flagged(base_N, trial)[is_poisoned].mean())
        together.append(flagged(score_N, trial)[is_poisoned].mean())
        proportions.append(false_discovery_proportion(flagged(score_N, trial), is_poisoned))
    assert np.mean(together) > np.mean(alone) + 0.3, (alone, together)
    assert np.mean(proportions) <= 0.1 + 2 * np.std(proportions) / math.sqrt(8)


def test_what_the_highest_share_is_found_far_below_them():
    """Half of the poison is not high by the first score at all, so that it is no candidate for company."""
    rng = np.random.default_rng(5)
    share = []
    for trial in range(6):
        base_N, residual_NR, is_poisoned = pool(rng, 40, strength=2.0)
        base_N[:20] += 6
        base_N[20:40] = rng.normal(size=20)
        found = flagged(Amplify(share=0.025).score(base_N, residual_NR, looks(NUM + CLEAN)), trial)
        share.append((found[20:40].mean(), false_discovery_proportion(found, is_poisoned)))
        company = flagged(Company().score(base_N, residual_NR, looks(NUM + CLEAN)), trial)
        assert not company[20:40].any()
    assert np.mean(share, axis=0)[0] > 0.8
    assert np.mean(share, axis=0)[1] < 0.2


def test_seeds_that_are_all_clean_are_no_higher_for_having_been_seeds():
    """They share a direction, as pictures of one subject do: then all who share it stand high, seed or not."""
    rng = np.random.default_rng(6)
    proportions, levels = [], []
    for trial in range(40):
        base_N, residual_NR, _ = pool(rng, 0)
        is_subject = rng.random(NUM + CLEAN) < 0.1
        residual_NR[is_subject] += 2 * rng.normal(size=WIDTH)
        base_N[is_subject] += 2
        score_N = Amplify().score(base_N, residual_NR, looks(NUM + CLEAN))
        ids = [f"a.tar/{i:05d}" for i in range(NUM)]
        verdict = Conformal(q=0.1, false_alarm=None, seed=trial).decide(score_N[:NUM], score_N[NUM:], ids)
        proportions.append(float(verdict.flagged.any()))  # of a clean corpus, any list is wrong
        levels.append((verdict.p_value <= 0.01).mean())
    assert np.mean(proportions) <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / 40)
    assert np.mean(levels) <= 0.01 + 3 * np.std(levels) / math.sqrt(40)


def test_copies_and_almost_equal_pictures_are_no_company():
    rng = np.random.default_rng(3)
    base_N, residual_NR, _ = pool(rng, 0)
    residual_NR[:20], base_N[:20] = residual_NR[0], 99.0  # twenty times one picture
    same = [f"hash {max(0, i - 19)}" for i in range(NUM + CLEAN)]
    near = [0x0123456789ABCDEF ^ (1 << (i % 2)) if i < 20 else int(rng.integers(0, 2**63)) for i in range(NUM + CLEAN)]
    residual_NR /= np.linalg.norm(residual_NR, axis=1, keepdims=True)
    for way in (Company(), Amplify(share=0.05)):
        assert way.score(base_N, residual_NR, looks(NUM + CLEAN))[:20].min() > 0.99
        for given in (looks(NUM + CLEAN, content=same), looks(NUM + CLEAN, perceptual=near)):
            assert way.score(base_N, residual_NR, given)[:20].max() < 0.9


def test_only_candidates_have_company_and_the_others_keep_their_order():
    rng = np.random.default_rng(4)
    base_N, residual_NR, _ = pool(rng, 0)
    base_N[5] = np.nan
    score_N = Company(share=0.05).score(base_N, residual_NR, looks(NUM + CLEAN))
    rest = np.flatnonzero(score_N < -1.5)
    assert np.isnan(score_N[5])
    assert (score_N > -1.5).sum() == round(0.05 * (NUM + CLEAN - 1))
    assert base_N[rest].max() < base_N[score_N > -1.5].min()
    np.testing.assert_array_equal(np.argsort(score_N[rest]), np.argsort(base_N[rest]))


def test_few_candidates_are_little_company():
    base_N, residual_NR = np.arange(40.0), np.ones((40, 4))
    score_N = Company(share=0.1, k=10).score(base_N, residual_NR, looks(40))
    assert score_N[-4:].tolist() == pytest.approx([0.3] * 4)  # three others, all in one direction, of ten
    score_N = Amplify(k=40).score(base_N, residual_NR, looks(40))  # twenty seeds
    assert score_N.tolist() == pytest.approx([2 * 20 / 40] * 20 + [2 * 19 / 40] * 20)
    assert np.isnan(Amplify().score([np.nan] * 3, np.ones((3, 4)), looks(3))).all()
    assert np.isnan(Amplify().score([np.nan, 1.0], np.ones((2, 4)), looks(2))).tolist() == [True, False]


def test_features_are_normal_scores_and_residuals():
    feature_NF = Classifier().features([[3.0, np.nan, 1.0, 2.0]], np.arange(8.0).reshape(4, 2))
    assert feature_NF.shape == (4, 5)
    assert feature_NF[3, 0] == pytest.approx(0)
    assert np.isnan(feature_NF[1, 0])
    assert feature_NF[1, 3] == pytest.approx((2**2 + 3**2) / 2)
