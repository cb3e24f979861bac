"""A calibration set that is not like the corpus is refused, and one that is like it is not."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from dede_ray.runtime.config import Mistake
from dede_ray.scan.shift import ShiftCheck

WIDTH = 24


def names(count, shard="train-00000.tar"):
    return [f"{shard}/{i:06d}" for i in range(count)]


def draw(rng, count, offset=0.0):
    mixture = np.random.default_rng(0).normal(size=(5, WIDTH))
    centre = mixture[rng.integers(0, 5, count)]
    return (centre + rng.normal(size=(count, WIDTH)) + offset * np.eye(WIDTH)[0]).astype(np.float32)


def compare(corpus, calibration, **settings):
    return ShiftCheck(**settings).compare(corpus, names(len(corpus)), calibration, names(len(calibration), "clean.tar"))


def test_samples_of_one_source_cannot_be_separated_whatever_the_seed():
    values = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        shift = compare(draw(rng, 400), draw(rng, 300), seed=seed)
        assert not shift.is_refused
        shift.require()
        values.append(shift.auroc.value)
    assert abs(np.mean(values) - 0.5) < 0.03
    assert np.std(values) > 0


def test_samples_of_another_source_are_separated_and_refused():
    rng = np.random.default_rng(1)
    near, far = (compare(draw(rng, 1500), draw(rng, 1500, offset)).auroc for offset in (0.5, 2.0))
    assert near.low < near.value < near.high < far.low
    shift = compare(draw(rng, 1500), draw(rng, 1500, 2.0))
    assert shift.is_refused
    with pytest.raises(Mistake, match=r"AUROC 0\.9.*limit 0\.7.*choose clean samples from where the corpus comes"):
        shift.require()
    assert not compare(draw(rng, 1500), draw(rng, 1500, 2.0), max_auroc=1).is_refused


def test_a_per_cent_of_poison_is_no_shift():
    rng = np.random.default_rng(2)
    corpus = draw(rng, 2000)
    corpus[:20] += 20 * np.eye(WIDTH, dtype=np.float32)[3]
    assert not compare(corpus, draw(rng, 2000), max_auroc=0.55).is_refused


def test_copies_do_not_give_the_corpus_away():
    """A sample that comes ten times is known from training on its copies; counted once it is not."""
    rng = np.random.default_rng(3)
    few, wide = np.repeat(draw(rng, 60), 10, axis=0), np.random.default_rng(4).normal(size=(WIDTH, 200))
    shift = compare(few @ wide, draw(rng, 600) @ wide)
    assert shift.num_samples == 60
    assert shift.auroc.value < 0.65
    jittered = few + 1e-3 * rng.normal(size=few.shape)
    assert compare(jittered @ wide, draw(rng, 600) @ wide).auroc.value > shift.auroc.value


def test_the_order_of_the_samples_does_not_matter_and_the_seed_does():
    rng = np.random.default_rng(5)
    corpus, calibration = draw(rng, 300), draw(rng, 300, 0.5)
    order = rng.permutation(300)
    check, ids, clean = ShiftCheck(num_samples=100), names(300), names(300, "clean.tar")
    shift = check.compare(corpus, ids, calibration, clean)
    assert (shift.num_samples, shift.num_calibration) == (100, 100)
    assert check.compare(corpus[order], [ids[i] for i in order], calibration, clean) == shift
    assert check.model_copy(update={"seed": 1}).compare(corpus, ids, calibration, clean) != shift


def test_too_few_samples_are_not_judged_and_not_refused():
    rng = np.random.default_rng(6)
    shift = compare(draw(rng, 500), draw(rng, 49, 5.0))
    assert math.isnan(shift.auroc.value)
    assert not shift.is_refused
    assert "not judged" in str(shift)
    assert compare(draw(rng, 500), draw(rng, 50, 5.0)).is_refused
    assert math.isnan(compare(draw(rng, 0), draw(rng, 500)).auroc.value)


def test_a_limit_below_chance_is_refused():
    with pytest.raises(ValidationError):
        ShiftCheck(max_auroc=0.4)
