"""Views of training images: what a setting promises happens, and nothing else, and all of it by the generator."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from dede_ray.data.images import decode_image, encode_image, to_square
from dede_ray.data.shards import Limits
from dede_ray.runtime.config import Config
from dede_ray.training.augmentation import Augmentation

STILL = {"min_scale": 1, "flip": False}


def views_of(image_HWC: np.ndarray, number: int, size_px: int = 32, **settings) -> np.ndarray:
    augmentation = Augmentation(**settings)
    return np.stack([augmentation.apply(image_HWC, size_px, np.random.default_rng(seed)) for seed in range(number)])


def ramps(height: int, width: int) -> np.ndarray:
    """An image whose red is the column and whose green is the row, 256 steps each; blue is 100."""
    y, x = np.mgrid[:height, :width]
    channels = [255 * x / (width - 1), 255 * y / (height - 1), np.full((height, width), 100)]
    return np.rint(np.stack(channels, axis=2)).astype(np.uint8)


def test_a_view_is_decided_by_its_generator_and_has_the_models_shape(picture):
    colours = {"jitter_probability": 0.5, "grey_probability": 0.2}
    for shape in ((32, 32), (48, 80), (20, 24)):
        settings = {"min_scale": 0.5, "max_aspect": 4 / 3, "flip": True, **colours}
        views = views_of(picture(3, *shape), 20, **settings)
        assert (views.shape, views.dtype) == ((20, 32, 32, 3), np.uint8)
        np.testing.assert_array_equal(views, views_of(picture(3, *shape), 20, **settings))
        assert len({view.tobytes() for view in views}) == 20


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (375, 500), (40, 33)])
def test_without_augmentation_a_view_is_the_centre_square_that_scoring_sees(picture, shape):
    image_HWC = picture(1, *shape)
    for view in views_of(image_HWC, 3, **STILL):
        np.testing.assert_array_equal(view, to_square(image_HWC, 32))


def test_settings_that_were_not_asked_for_do_not_change_a_view(picture):
    """Views of square images, of the two settings that came first, as they were before there were others."""
    image_HWC = picture(7)
    views = views_of(image_HWC, 40, min_scale=0.6, flip=True)
    for seed, view in enumerate(views):
        scale, left, top, coin = np.random.default_rng(seed).random(4)
        share = np.sqrt(0.6 + 0.4 * scale)
        expected = _resized(image_HWC, (left * (1 - share) * 32, top * (1 - share) * 32), share * 32)
        np.testing.assert_array_equal(view, expected[:, ::-1] if coin < 0.5 else expected)
    unused = {"brightness": 2, "hue": 0.5, "jitter_probability": 0, "grey_probability": 0, "blur_probability": 0}
    np.testing.assert_array_equal(views_of(image_HWC, 40, min_scale=0.6, flip=True, **unused), views)


def _resized(image_HWC: np.ndarray, corner: tuple[float, float], side: float) -> np.ndarray:
    from PIL import Image

    (x, y), image = corner, Image.fromarray(image_HWC)
    return np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side)))


@pytest.mark.parametrize("shape", [(100, 100), (100, 180), (150, 100)])
@pytest.mark.parametrize(("min_scale", "max_aspect"), [(0.5, 1), (0.25, 4 / 3), (1, 2)])
def test_crops_have_the_promised_areas_and_shapes_and_reach_every_border(shape, min_scale, max_aspect):
    """The ramps of a view show where it was cut from."""
    views = views_of(ramps(*shape), 300, min_scale=min_scale, max_aspect=max_aspect).astype(float)
    height, width = shape
    # From the view's border pixels, whose centres lie half a pixel inside; in pixels of the image.
    left, right = views[:, 16, 0, 0] / 255 * width, views[:, 16, -1, 0] / 255 * width
    top, bottom = views[:, 0, 16, 1] / 255 * height, views[:, -1, 16, 1] / 255 * height
    crop_width, crop_height = (right - left) * 32 / 31, (bottom - top) * 32 / 31
    aspect = crop_width / crop_height
    largest_area = np.minimum(width, height * aspect) * np.minimum(height, width / aspect)
    share = crop_width * crop_height / largest_area
    assert share.min() > min_scale - 0.06
    assert share.max() < 1.06
    assert np.ptp(share) > 0.8 * (1 - min_scale)
    assert aspect.min() > 0.95 / max_aspect
    assert aspect.max() < 1.05 * max_aspect
    assert np.ptp(np.log(aspect)) > 1.6 * np.log(max_aspect)
    assert left.min() < 0.05 * width
    assert right.max() > 0.95 * width
    assert top.min() < 0.05 * height
    assert bottom.max() > 0.95 * height


def test_a_small_crop_of_a_large_image_keeps_the_detail_of_the_original():
    """A chequerboard as fine as the original's pixels: shrunk first, it would be a flat grey."""
    fine_HWC = np.repeat((255 * (np.indices((128, 128)).sum(axis=0) % 2)).astype(np.uint8)[:, :, None], 3, axis=2)
    assert to_square(fine_HWC, 32).std() < 5
    views = views_of(fine_HWC, 50, min_scale=1 / 16)
    assert max(view.std() for view in views) > 50


def test_half_of_the_images_are_mirrored(picture):
    views = views_of(picture(2), 200, min_scale=1, flip=True)
    mirrored = [np.array_equal(view, picture(2)[:, ::-1]) for view in views]
    assert all(now or np.array_equal(view, picture(2)) for now, view in zip(mirrored, views, strict=True))
    assert 70 < sum(mirrored) < 130


# --- colours


@pytest.mark.parametrize(
    ("setting", "most", "adjust"),
    [
        ("brightness", 0.5, "adjust_brightness"),
        ("brightness", 1.5, "adjust_brightness"),
        ("contrast", 0.8, "adjust_contrast"),
        ("saturation", 0.9, "adjust_saturation"),
        ("hue", 0.5, "adjust_hue"),
    ],
)
def test_each_colour_change_is_torchvisions_by_a_factor_of_its_range(picture, setting, most, adjust):
    from PIL import Image

    from dede_ray.runtime.libraries import open_clip  # before torchvision, which it repairs

    assert open_clip
    theirs = getattr(pytest.importorskip("torchvision.transforms.functional"), adjust)
    only = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, setting: most}
    views = views_of(picture(4), 60, **STILL, jitter_probability=1, **only)
    factors = []
    for seed, view in enumerate(views):
        rng = np.random.default_rng(seed)
        rng.random(7)
        strength = rng.random(4)[["brightness", "contrast", "saturation", "hue"].index(setting)]
        least, largest = (-most, most) if setting == "hue" else (max(0, 1 - most), 1 + most)
        factors.append(least + (largest - least) * strength)
        np.testing.assert_array_equal(view, np.asarray(theirs(Image.fromarray(picture(4)), factors[-1])))
    assert np.ptp(factors) > 0.8 * (largest - least)


def test_the_colour_wheel_is_turned_by_at_most_its_setting():
    red_HWC = np.full((8, 8, 3), (255, 0, 0), np.uint8)
    only = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0.2}
    views = views_of(red_HWC, 100, size_px=8, **STILL, jitter_probability=1, **only)
    turns = np.array([colorsys.rgb_to_hsv(*(view[0, 0] / 255.0))[0] for view in views])
    turns = np.where(turns > 0.5, turns - 1, turns)
    assert -0.21 < turns.min() < -0.15
    assert 0.15 < turns.max() < 0.21


def test_colours_change_and_vanish_in_the_share_that_was_asked_for(picture):
    still = views_of(picture(5), 1, **STILL)[0]
    jittered = views_of(picture(5), 400, **STILL, jitter_probability=0.3)
    grey = views_of(picture(5), 400, **STILL, grey_probability=0.2)
    assert 0.22 < np.mean([not np.array_equal(view, still) for view in jittered]) < 0.38
    is_grey = [(view == view[:, :, :1]).all() for view in grey]
    assert 0.14 < np.mean(is_grey) < 0.26
    assert all(now or np.array_equal(view, still) for now, view in zip(is_grey, grey, strict=True))


def test_a_share_of_the_images_is_blurred_some_more_than_others(picture):
    image_HWC = picture(6, 224, 224)
    views = views_of(image_HWC, 60, size_px=224, **STILL, blur_probability=0.5)
    edges = np.abs(np.diff(views.astype(float), axis=2)).mean(axis=(1, 2, 3))
    blurred = [not np.array_equal(view, image_HWC) for view in views]
    assert 18 < sum(blurred) < 42
    assert np.all(edges[blurred] <= edges[~np.array(blurred)].max())
    assert len(np.unique(edges[blurred].round(6))) > 10


def test_the_order_of_colour_changes_varies(picture):
    """Brightness before contrast clips other pixels than contrast before brightness."""
    from PIL import Image, ImageEnhance

    image = Image.fromarray(picture(6))
    only = {"brightness": 1, "contrast": 1, "saturation": 0, "hue": 0}
    first = []
    for seed, view in enumerate(views_of(picture(6), 60, **STILL, jitter_probability=1, **only)):
        rng = np.random.default_rng(seed)
        rng.random(7)
        bright, contrast = 2 * rng.random(4)[:2]
        one = ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(bright)).enhance(contrast)
        other = ImageEnhance.Brightness(ImageEnhance.Contrast(image).enhance(contrast)).enhance(bright)
        matches = [np.array_equal(view, np.asarray(one)), np.array_equal(view, np.asarray(other))]
        assert any(matches), seed
        first.append(matches)
    assert sum(one and not other for one, other in first) > 10
    assert sum(other and not one for one, other in first) > 10


# --- decoding for views


def test_a_large_jpeg_is_decoded_reduced_but_never_below_what_a_crop_needs(picture):
    content = encode_image(picture(8, 1200, 1600), "jpg")
    for settings, size_px, shape in (
        ({"min_scale": 1}, 224, (600, 800)),
        ({"min_scale": 0.9}, 224, (600, 800)),
        ({"min_scale": 0.3}, 224, (1200, 1600)),
        ({"min_scale": 0.9, "max_aspect": 4 / 3}, 224, (1200, 1600)),
        ({"min_scale": 0.9}, 32, (150, 200)),
    ):
        enough_px = Augmentation(**settings).decode_px(size_px)
        assert decode_image(content, Limits(), enough_px=enough_px).shape == (*shape, 3), settings
    assert decode_image(content, Limits()).shape == (1200, 1600, 3)


def test_a_view_without_augmentation_is_what_decode_image_makes_of_the_file(picture):
    still = Augmentation(**STILL)
    for shape in ((375, 500), (1200, 1600), (32, 32)):
        content = encode_image(picture(9, *shape), "jpg")
        decoded_HWC = decode_image(content, Limits(), enough_px=still.decode_px(64))
        view = still.apply(decoded_HWC, 64, np.random.default_rng(0))
        np.testing.assert_array_equal(view, decode_image(content, Limits(), 64))


def test_settings_out_of_range_are_refused():
    assert issubclass(Augmentation, Config)
    for wrong in ({"min_scale": 0}, {"min_scale": 1.1}, {"max_aspect": 0.9}, {"hue": 0.6}, {"jitter_probability": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Augmentation(**wrong)
