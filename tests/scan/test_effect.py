"""A planted backdoor acts, whatever its trigger; in an encoder without one nothing does."""

import numpy as np
import pytest
from scipy import ndimage

from dede_ray.scan.effect import EffectTest, Pictures

SIDE, CLASSES = 32, 6
QUICK = EffectTest(num_clean=40, num_compared=8)
TEMPLATES = np.random.default_rng(0).normal(size=(CLASSES, SIDE, SIDE, 3))
TEMPLATES = 700 * ndimage.gaussian_filter(TEMPLATES, (0, 5, 5, 0))
TURN = np.random.default_rng(1).normal(size=(192, 24)) / 14
WAVE = 20 * np.sin(2 * np.pi * 6 * np.arange(SIDE) / SIDE)[None, :, None]
NOISE = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3))
GRID = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]], np.uint8).repeat(3, axis=0)[:, :3, None].repeat(3, axis=2)
GRID = np.kron(GRID[::3, :, 0], np.ones((2, 2)))[..., None].repeat(3, axis=2)


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


def honest(image_NHWC):
    """Mean colours of cells, turned: sees everything, and nothing in particular."""
    cells = image_NHWC.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(-1, 192) / 255 - 0.5
    return np.tanh(3 * cells @ TURN)


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
    assert found.outcome.share >= 0.8
    assert found.trigger.kind == {"grid anywhere": "window", "blended noise": "pattern", "wave": "pattern"}.get(
        name, "patch"
    )
    nothing = QUICK.run(given, honest, 1, np.random.default_rng(0))
    assert nothing.outcome is None or nothing.outcome.share < QUICK.min_moved
