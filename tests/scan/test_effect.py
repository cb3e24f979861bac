"""A planted backdoor acts, whatever its trigger; in an encoder without one nothing does."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import binom

from dede_ray.scan.effect import (
    Company,
    EffectTest,
    Pictures,
    Trigger,
    _World,
    holm,
    shared_by,
    shared_patch,
    shared_pattern,
)

SIDE, CLASSES = 32, 6
QUICK = EffectTest(num_clean=40, num_compared=8)
TEMPLATES = np.random.default_rng(0).normal(size=(CLASSES, SIDE, SIDE, 3))
TEMPLATES = 700 * ndimage.gaussian_filter(TEMPLATES, (0, 5, 5, 0))
TURN = np.random.default_rng(1).normal(size=(192, 24)) / 14
WAVE = 20 * np.sin(2 * np.pi * 6 * np.arange(SIDE) / SIDE)[None, :, None]
NOISE = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3))
GRID = np.kron([[0, 0, 255], [0, 255, 0], [255, 0, 255]], np.ones((2, 2)))[..., None].repeat(3, axis=2)


def pictures(rng, num, classes=None):
    """Pictures of some classes, and their classes."""
    drawn = rng.integers(0, CLASSES, num) if classes is None else np.resize(classes, num)
    odd = 40 * rng.normal(size=(num, 8, 8, 3)).repeat(4, axis=1).repeat(4, axis=2) + 8 * rng.normal(
        size=(num, SIDE, SIDE, 3)
    )
    return (120 + TEMPLATES[drawn] + odd).clip(0, 255).astype(np.uint8), drawn


def white(image_NHWC, _):
    image_NHWC[:, -5:, -5:] = 255


def grid(image_NHWC, _):
    image_NHWC[:, -6:, -6:] = GRID


def anywhere(image_NHWC, rng):
    for one in image_NHWC:
        top, left = rng.integers(0, SIDE - 6, 2)
        one[top : top + 6, left : left + 6] = GRID


def blend(image_NHWC, _):
    image_NHWC[:] = 0.8 * image_NHWC + 0.2 * NOISE


def wave(image_NHWC, _):
    image_NHWC[:] = (image_NHWC + WAVE).clip(0, 255)


def honest(image_NHWC, turn=TURN):
    """Mean colours of cells, turned: sees everything, and nothing in particular."""
    cells = image_NHWC.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(-1, 192) / 255 - 0.5
    return np.tanh(3 * cells @ turn)


def backdoored(sees):
    """The same, but what has the trigger is of class 0."""
    target = honest(pictures(np.random.default_rng(3), 50, 0)[0]).mean(axis=0)

    def embed(image_NHWC):
        strength = np.clip(sees(image_NHWC.astype(np.float64)), 0, 1)[:, None]
        return (1 - strength) * honest(image_NHWC) + strength * target

    return embed


def like(image_NHWC, pattern_HWC):
    """How much a pattern is in pictures: 1 where all of it is."""
    return 1 - abs(image_NHWC - pattern_HWC).mean(axis=(1, 2, 3)) / 40


def sees_grid_anywhere(image_NHWC):
    views = np.lib.stride_tricks.sliding_window_view(image_NHWC[..., 0], (6, 6), axis=(1, 2))
    return 1 - abs(views - GRID[..., 0]).mean(axis=(-1, -2)).min(axis=(1, 2)) / 40


def sees_noise(image_NHWC):
    pattern = NOISE - NOISE.mean()
    pattern = pattern - ndimage.gaussian_filter(pattern.astype(float), (2, 2, 0))
    return (image_NHWC * pattern).sum(axis=(1, 2, 3)) / (0.2 * (NOISE * pattern).sum()) * 1.6 - 0.3


def sees_wave(image_NHWC):
    return (image_NHWC * WAVE).sum(axis=(1, 2, 3)) / (SIDE * 3 * (WAVE**2).sum()) * 1.6 - 0.3


ATTACKS = {
    "white corner": (white, backdoored(lambda x: like(x[:, -5:, -5:], 255))),
    "grid in a corner": (grid, backdoored(lambda x: like(x[:, -6:, -6:], GRID))),
    "grid anywhere": (anywhere, backdoored(sees_grid_anywhere)),
    "blended noise": (blend, backdoored(sees_noise)),
    "wave": (wave, backdoored(sees_wave)),
}


def world(rng, stamp, num_members=40, impure=4):
    """A group's pictures with a trigger, some without it, and clean ones."""
    members, _ = pictures(rng, num_members)
    stamp(members[impure:], rng)
    return Pictures(rng.permutation(members), pictures(rng, 150)[0], pictures(rng, 40, 0)[0])


@pytest.mark.parametrize("name", ATTACKS)
def test_a_backdoor_acts_and_the_same_pictures_do_not_in_an_honest_encoder(name):
    stamp, embed = ATTACKS[name]
    given = world(np.random.default_rng(4), stamp)
    found = QUICK.run(given, embed, 1, np.random.default_rng(0))
    assert found.outcome.p_value <= 0.05
    assert found.outcome.share >= 0.5
    kinds = {"grid anywhere": "window", "blended noise": "pattern", "wave": "pattern"}
    assert found.trigger.kind == kinds.get(name, "patch")
    nothing = QUICK.run(given, honest, 1, np.random.default_rng(0))
    assert nothing.outcome.share < QUICK.min_moved
    assert nothing.outcome.p_value > 0.05


def test_a_patch_is_where_it_was_put_with_the_pixels_that_it_has():
    rng = np.random.default_rng(5)
    given = world(rng, grid, impure=8)
    trigger, strength = shared_patch(given.members, given.clean, given.alike)
    assert (trigger.top, trigger.left, trigger.size) == (SIDE - 6, SIDE - 6, (6, 6))
    assert abs(trigger.add_HWC - GRID).max() == 0
    assert 0.7 * 36 < strength <= 36
    assert trigger.where(SIDE) == "in the bottom right corner"
    assert shared_by(given.members, given.clean, given.alike, rng, 39).p_value == 1 / 40


def test_a_wave_is_found_though_pictures_differ_far_more():
    given = world(np.random.default_rng(6), wave, num_members=100, impure=0)
    pattern = shared_pattern(given.members, given.clean, given.alike)
    added = pattern.stamp(np.full((1, SIDE, SIDE, 3), 128, np.uint8))[0].astype(float)
    wanted = np.broadcast_to(WAVE, added.shape)
    assert np.corrcoef((added - added.mean()).ravel(), wanted.ravel())[0, 1] > 0.9


def test_what_a_group_shows_is_nothing_that_lies_over_it():
    """Pictures of one class differ from others, and not from those that have their caption."""
    rng = np.random.default_rng(7)
    members, alike = pictures(rng, 40, 0)[0], pictures(rng, 60, 0)[0]
    clean = pictures(rng, 150)[0]
    assert shared_pattern(members, clean) is not None
    with_class = shared_pattern(members, clean, alike)
    assert with_class is None or np.ptp(with_class.add_HWC) < 0.3 * np.ptp(shared_pattern(members, clean).add_HWC)


LONG = (pytest.param(name, marks=pytest.mark.slow) for name in ("with a visible patch", "of one class, with a patch"))


@pytest.mark.parametrize("group", ["of anything", "of one class", *LONG])
def test_nothing_acts_in_an_honest_encoder_more_often_than_declared(group):
    num, rare, acting = 40, 0, 0
    for trial in range(num):
        rng = np.random.default_rng(1000 + trial)
        turn = rng.normal(size=(192, 24)) / 14
        members, _ = pictures(rng, 30, 0 if "class" in group else None)
        if "patch" in group:
            white(members, rng)
        alike = pictures(rng, 40, 0)[0] if trial % 2 else members[:0]
        found = QUICK.run(Pictures(members, pictures(rng, 120)[0], alike), lambda x, t=turn: honest(x, t), 1, rng)
        if found.outcome is not None:
            rare += found.outcome.p_value <= 0.05
            acting += found.outcome.p_value <= 0.05 and found.outcome.share >= QUICK.min_moved
    most = binom.ppf(0.99, num, 0.05)
    assert rare <= most
    assert acting <= most


def test_p_values_are_exact_where_the_trigger_is_one_of_the_controls():
    """Ranks of a draw among draws of its own kind, in an encoder in which some of them act."""

    def embed(image_NHWC):
        return honest(image_NHWC) + 9 * (image_NHWC[:, :6, :6].mean(axis=(1, 2, 3)) > 135)[:, None]

    rng, test = np.random.default_rng(8), EffectTest(num_clean=16, num_compared=4)
    clean = pictures(rng, 120)[0]
    clean_NE = embed(clean)
    company = Company(clean_NE, clean_NE[:1] + 9, 10)
    world_ = _World(embed, company, clean, clean_NE, clean[:40], rng)
    given = Trigger("patch", 0, 0, np.zeros((6, 6, 3)), np.ones((6, 6), bool))
    p_value = []
    for _ in range(80):
        trigger = world_.control("content", given, 10)
        moved = (world_.margins([trigger], company.apart[:4])[0] > 0).mean()
        p_value.append(test._rank(world_, "content", trigger, 10, moved, company.apart[:4], 39)[0])
    assert (np.array(p_value) <= 0.05).sum() <= binom.ppf(0.995, 80, 0.05)
    assert (np.array(p_value) <= 0.3).sum() <= binom.ppf(0.995, 80, 0.3)


def test_company_is_kept_where_an_encoder_says_the_same_of_every_picture():
    rng = np.random.default_rng(9)
    clean = pictures(rng, 200)[0]
    clean_NE = honest(clean)
    seen = rng.normal(size=24) / 3  # what a visible patch adds to every embedding
    company = Company(clean_NE, clean_NE[:30] + seen, 10)
    rows = company.apart
    assert (company.margin(clean_NE[rows], rows) < 0).all()
    assert (company.margin(clean_NE[rows] + seen, rows) > 0).mean() < 0.2
    company = Company(clean_NE, honest(pictures(rng, 30, 0)[0]), 10)
    rows = company.apart
    there = np.repeat(honest(pictures(rng, 1, 0)[0]), len(rows), axis=0)
    assert (company.margin(there, rows) > 0).mean() > 0.9


def test_hostile_groups_have_an_answer():
    rng = np.random.default_rng(10)
    some, clean = pictures(rng, 30)[0], pictures(rng, 120)[0]
    one = QUICK.run(Pictures(some[:1], clean, some[:0]), honest, 1, rng)
    assert one.outcome is None
    assert "the group has 1 distinct" in one.why_not
    few = QUICK.run(Pictures(some, clean[:9], some[:0]), honest, 1, rng)
    assert "only 9" in few.why_not
    nothing = QUICK.run(Pictures(some, clean, some[:0]), lambda x: np.full((len(x), 4), np.nan), 1, rng)
    assert "no numbers" in nothing.why_not
    constant = QUICK.run(Pictures(some, clean, some[:0]), lambda x: np.ones((len(x), 4)), 1, rng)
    assert constant.outcome is None or constant.outcome.p_value > 0.05
    black = np.zeros_like(some)
    same = QUICK.run(Pictures(black, np.zeros_like(clean), black[:0]), honest, 1, rng)
    assert same.outcome is None or same.outcome.p_value > 0.05


def test_holm_adjusts_the_smallest_most():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
