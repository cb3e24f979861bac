"""Views of whole batches: the same as Pillow's one by one, and decided by their draws alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dede_ray.training.augmentation import NUM_DRAWS, Augmentation, random_views

ALL = {"min_scale": 0.08, "max_aspect": 4 / 3, "flip": True, "jitter_probability": 0.8, "grey_probability": 0.2}


def drawn(seed: int) -> np.ndarray:
    """What `Augmentation.apply` draws from this seed's generator, as `random_views` takes it."""
    rng = np.random.default_rng(seed)
    first, second, strengths, order, blur = (
        rng.random(4),
        rng.random(3),
        rng.random(4),
        rng.permutation(4),
        rng.random(2),
    )
    return np.concatenate([first, second, strengths, np.argsort(order) / 4, blur])


def views_of(image_BHHC: np.ndarray, draw_BK: np.ndarray, size_px: int = 32, **settings) -> np.ndarray:
    """uint8 (B, S, S, 3)."""
    view_BCSS = random_views(Augmentation(**settings), torch.from_numpy(image_BHHC), size_px, torch.from_numpy(draw_BK))
    return np.rint(255 * view_BCSS.permute(0, 2, 3, 1).numpy()).astype(np.uint8)


@pytest.mark.parametrize(
    ("settings", "mean_levels", "worst_levels"),
    [
        ({"min_scale": 1, "flip": True}, 0, 0),
        ({"min_scale": 0.08, "max_aspect": 4 / 3}, 0.4, 2),
        ({"min_scale": 0.5, "grey_probability": 1}, 0.7, 3),
        ({"min_scale": 1, "jitter_probability": 1, "hue": 0}, 2, 6),
        # Pillow turns hues by steps of 1/256 and approximates the Gaussian.
        ({**ALL, "blur_probability": 0.5}, 2.5, 60),
    ],
)
@pytest.mark.parametrize("sides", [(32, 32), (80, 48)], ids=str)
def test_a_view_is_the_one_that_pillow_makes(picture, settings, mean_levels, worst_levels, sides):
    side, size = sides
    images = np.stack([picture(i, side, side) for i in range(60)])
    if sides[0] != sides[1] and settings["min_scale"] == 1:
        mean_levels, worst_levels = mean_levels + 0.5, worst_levels + 3  # resized
    ours = views_of(images, np.stack([drawn(i) for i in range(60)]), size, **settings)
    pillows = np.stack(
        [Augmentation(**settings).apply(image, size, np.random.default_rng(i)) for i, image in enumerate(images)]
    )
    levels = np.abs(ours.astype(int) - pillows)
    assert ours.shape == pillows.shape == (60, size, size, 3)
    assert levels.mean() <= mean_levels
    assert levels.max() <= worst_levels


def test_a_view_depends_on_its_own_draws_and_not_on_the_batch(picture):
    images = np.stack([picture(i) for i in range(40)])
    draws = np.random.default_rng(0).random((40, NUM_DRAWS))
    whole = views_of(images, draws, **ALL)
    order = np.random.default_rng(1).permutation(40)[:25]
    np.testing.assert_array_equal(views_of(images[order], draws[order], **ALL), whole[order])
    assert len({view.tobytes() for view in views_of(images[[0] * 40], draws, **ALL)}) == 40


def test_as_many_views_are_mirrored_grey_and_recoloured_as_was_asked(picture):
    images = np.stack([picture(5)] * 2000)
    draws = np.random.default_rng(0).random((2000, NUM_DRAWS))
    mirrored = (views_of(images, draws, min_scale=1, flip=True) == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert mirrored.mean() == pytest.approx(0.5, abs=0.04)
    grey = np.ptp(views_of(images, draws, min_scale=1, grey_probability=0.2), axis=3).max(axis=(1, 2)) <= 1
    assert grey.mean() == pytest.approx(0.2, abs=0.03)
    same = (views_of(images, draws, min_scale=1, jitter_probability=0.8) == images).all(axis=(1, 2, 3))
    assert same.mean() == pytest.approx(0.2, abs=0.03)


def test_16_bit_training_does_not_round_the_views(picture):
    images, draws = np.stack([picture(1)]), drawn(0)[None]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = views_of(images, draws, **ALL)
    np.testing.assert_array_equal(rounded, views_of(images, draws, **ALL))
