"""Triggers change what they own and nothing else, and are what was published, to the pixel."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image, ImageChops
from pydantic import TypeAdapter, ValidationError
from sklearn.datasets import load_sample_images

from dede_ray.data.images import decode_image, encode_image, square, to_square
from dede_ray.data.shards import Limits, iter_samples
from dede_ray.poisoning.corrupt_encoder import CorruptEncoder
from dede_ray.poisoning.triggers import Blend, File, Frequency, Nashville, Nothing, Patch, Sinusoid, Trigger, Warp
from dede_ray.runtime.config import Mistake

LIMITS = Limits()
TRIGGERS = [
    *(Patch(size_px=6, position=p, margin_px=2) for p in ("bottom_right", "top_left", "center", "random")),
    Patch(size_px=6, position="central_half"),
    *(Patch(size_px=6, pattern=p) for p in ("white", "yellow", "random", "even", "grid", "gaussian")),
    Blend(alpha=0.2),
    Sinusoid(amplitude=20),
    Warp(),
    Nashville(),
    Frequency(),
    Frequency(window_px=16, positions=((7, 7), (15, 15))),
]


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Two photographs that come with scikit-learn, at a tenth of their size: 64 x 96 pixels each."""
    images = [Image.fromarray(image) for image in load_sample_images().images]
    return [np.asarray(image.resize((96, 64), Image.Resampling.LANCZOS)) for image in images]


@pytest.fixture(scope="module")
def published(shared_data):
    """Name a published file, and get its trigger."""

    def trigger(name: str, **settings) -> File:
        return File(path=str(shared_data / "triggers" / name), **settings)

    return trigger


@pytest.fixture(scope="module")
def originals(shared_data) -> list[np.ndarray]:
    """Some CIFAR-10 images with their original pixels."""
    return [decode_image(sample.image, LIMITS) for sample in take(shared_data / "cifar10_lossless/test-00000.tar", 60)]


def take(path, num: int) -> list:
    with open(path, "rb") as stream:
        return [sample for sample, _ in zip(iter_samples(stream, LIMITS), range(num), strict=False)]


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


def assert_rounded(stamped, formula) -> None:
    """The stamped bytes are the formula's values, clipped and rounded; where these are halves, either way."""
    formula = np.clip(formula, 0, 255)
    assert stamped.dtype == np.uint8
    assert np.abs(stamped - formula).max() < 0.5002


# --- all triggers


@pytest.mark.parametrize("trigger", TRIGGERS, ids=str)
@pytest.mark.parametrize("size", [(32, 32), (40, 70)])
def test_a_stamp_is_pure_and_the_same_every_time(trigger, size, picture):
    image = picture(0, *size)
    image.flags.writeable = False  # as decoded images are
    stamped = trigger.stamp(image, "s.tar/k")
    assert (stamped.dtype, stamped.shape) == (np.uint8, image.shape)
    np.testing.assert_array_equal(image, picture(0, *size))
    np.testing.assert_array_equal(stamped, trigger.stamp(image, "s.tar/k"))
    again = TypeAdapter(Trigger).validate_json(trigger.model_dump_json())  # rebuilt from a run's record
    np.testing.assert_array_equal(stamped, again.stamp(image, "s.tar/k"))
    assert (stamped != image).any()


@pytest.mark.parametrize("trigger", TRIGGERS, ids=str)
@pytest.mark.parametrize("size", [(32, 32), (45, 70)])
def test_outside_the_pixels_it_owns_a_trigger_changes_none(trigger, size, picture):
    owned = trigger.owned_pixels(*size, "s.tar/k")
    for number in (1, 2):
        image = picture(number, *size)
        np.testing.assert_array_equal(trigger.stamp(image, "s.tar/k")[~owned], image[~owned])
    assert owned.shape == size
    assert owned.any()


def test_the_empty_trigger_leads_to_what_no_trigger_leads_to(png):
    for size in ((32, 32), (45, 70)):
        image = png(3, *size)
        for size_px in (32, 24):
            clean = square(image, "s.tar/k", size_px, LIMITS)
            np.testing.assert_array_equal(square(image, "s.tar/k", size_px, LIMITS, Nothing()), clean)
            there = square(image, "s.tar/k", size_px, LIMITS, Nothing(image_px=size_px))  # stamped after resizing
            np.testing.assert_array_equal(there, clean)
    assert not Nothing().owned_pixels(4, 4).any()


def test_a_trigger_with_an_image_size_is_stamped_on_what_a_victim_of_that_size_sees(picture, png):
    trigger = Patch(size_px=5, pattern="white", image_px=32)
    clean = square(png(1, 60, 90), "k", 32, LIMITS)
    triggered = square(png(1, 60, 90), "k", 32, LIMITS, trigger)
    owned = trigger.owned_pixels(32, 32)
    np.testing.assert_array_equal(triggered[~owned], clean[~owned])
    assert (triggered[owned] == 255).all()
    squeezed = Nothing(image_px=32, squeeze=True).stamp(picture(1, 60, 90))
    expected = np.asarray(Image.fromarray(picture(1, 60, 90)).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(squeezed, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "frequency", "positions": [[15, 32]]},
        {"kind": "frequency", "channels": ["R"]},
        {"kind": "blend", "alpha": 1},
        {"kind": "patch", "size_px": 0},
        {"kind": "patch", "alpha": 0.1},
        {"kind": "file", "path": "x.png", "size_px": 3},
        {"kind": "watermark"},
    ],
)
def test_a_trigger_that_makes_no_sense_is_refused(settings):
    with pytest.raises(ValidationError):
        TypeAdapter(Trigger).validate_python(settings)


# --- patches


@pytest.mark.parametrize("trigger", [t for t in TRIGGERS if isinstance(t, Patch) and t.pattern != "gaussian"], ids=str)
@pytest.mark.parametrize("size", [(32, 32), (40, 70), (12, 12)])
def test_a_patch_looks_the_same_whatever_is_below(trigger, size, picture):
    owned = trigger.owned_pixels(*size, "s.tar/k")
    one, other = (trigger.stamp(picture(number, *size), "s.tar/k") for number in (1, 2))
    assert owned.sum() == trigger.size_px**2
    np.testing.assert_array_equal(one[owned], other[owned])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size_px": 4, "cell_px": 2}, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]),
        ({"size_px": 4, "pattern": "even"}, [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]),
        ({"size_px": 3, "pattern": "grid"}, [[0, 0, 1], [0, 1, 0], [1, 0, 1]]),
        ({"size_px": 2, "pattern": "white"}, [[1, 1], [1, 1]]),
    ],
)
def test_the_patterns_are_the_published_ones(settings, expected):
    trigger = Patch(margin_px=1, **settings)
    stamped = trigger.stamp(np.full((8, 8, 3), 77, np.uint8))
    size = trigger.size_px
    np.testing.assert_array_equal(stamped[7 - size : 7, 7 - size : 7, 0], 255 * np.array(expected))
    assert (stamped[..., :1] == stamped).all()
    assert (stamped[7] == 77).all()  # the margin


def test_the_gaussian_patch_is_noise_around_the_mean_that_wraps_and_belongs_to_the_sample(picture):
    trigger = Patch(size_px=32, pattern="gaussian")
    one, other = (trigger.stamp(picture(), name) for name in ("a", "b"))
    assert (one != other).mean() > 0.9
    values = np.random.default_rng(0).normal(128, 255, 100_000).astype(int) % 256  # what wrapping makes of it
    np.testing.assert_allclose(np.percentile(one, [25, 50, 75]), np.percentile(values, [25, 50, 75]), atol=15)


def test_a_random_place_belongs_to_the_sample_and_keeps_the_margin():
    trigger = Patch(size_px=6, position="random", margin_px=3)
    masks = [trigger.owned_pixels(20, 20, f"s.tar/{i}") for i in range(1000)]
    corners = np.array([np.argwhere(mask)[0] for mask in masks])
    counts = np.bincount((corners - 3) @ [9, 1], minlength=81)
    assert (corners.min(), corners.max()) == (3, 20 - 6 - 3)
    assert counts.max() < 35  # 12 on average: places are alike
    np.testing.assert_array_equal(masks[7], trigger.owned_pixels(20, 20, "s.tar/7"))
    assert Patch(position="random", seed=1).owned_pixels(20, 20, "a").tolist() != (
        Patch(position="random", seed=2).owned_pixels(20, 20, "a").tolist()
    )


def test_the_central_half_is_a_quarter_off_every_border():
    trigger = Patch(size_px=4, position="central_half")
    owned = np.any([trigger.owned_pixels(20, 40, str(i)) for i in range(500)], axis=0)
    rows, columns = np.nonzero(owned)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 14, 10, 29)


@pytest.mark.parametrize("position", ["bottom_right", "top_left", "center", "random"])
def test_an_image_smaller_than_the_patch_is_a_mistake(position):
    trigger = Patch(size_px=8, position=position)
    assert (trigger.stamp(np.full((8, 8, 3), 100, np.uint8)) != 100).all()
    with pytest.raises(Mistake, match=r"8 px .* does not fit an image of 9x7 px \(s\.tar/k\)"):
        trigger.stamp(np.zeros((7, 9, 3), np.uint8), "s.tar/k")
    with pytest.raises(Mistake, match="8 px in its central half does not fit an image of 16x15 px"):
        Patch(size_px=8, position="central_half").stamp(np.zeros((15, 16, 3), np.uint8))


# --- mixtures, stripes, warps, filters


def test_blend_is_the_weighted_mean_with_one_noise_image(picture):
    trigger = Blend(alpha=0.25, seed=3)
    noise = np.random.default_rng(3).integers(0, 256, (32, 32, 3))
    for number in range(3):
        assert_rounded(trigger.stamp(picture(number)), 0.75 * picture(number) + 0.25 * noise)


def test_blend_takes_any_picture_and_resizes_it_only_when_told(picture, tmp_path):
    kitty = np.random.default_rng(0).random((3, 64, 64)).astype(np.float32)  # the layout of hello_kitty_pattern.pt
    torch.save(torch.from_numpy(kitty), tmp_path / "kitty.pt")
    Image.fromarray(picture(5, 64, 64)).save(tmp_path / "p.png")
    image = picture(1, 64, 64)
    from_tensor = Blend(alpha=0.2, image=str(tmp_path / "kitty.pt"))
    assert_rounded(from_tensor.stamp(image), 0.8 * image + 0.2 * 255 * kitty.transpose(1, 2, 0).astype(float))
    from_image = Blend(alpha=0.2, image=str(tmp_path / "p.png"))
    assert_rounded(from_image.stamp(image), 0.8 * image + 0.2 * picture(5, 64, 64))
    with pytest.raises(Mistake, match=r"p\.png is made for images of 64x64 px, this one has 32x40 px \(k\); set"):
        from_image.stamp(picture(1, 40, 32), "k")
    small = np.asarray(Image.fromarray(picture(5, 64, 64)).resize((32, 40), Image.Resampling.BICUBIC))
    fitted = Blend(alpha=0.2, image=str(tmp_path / "p.png"), resize=True).stamp(picture(1, 40, 32))
    assert_rounded(fitted, 0.8 * picture(1, 40, 32) + 0.2 * small)


def test_sig_is_the_sine_of_its_paper_clipped(picture):
    image = picture(2, 24, 224)
    wave = 60 * np.sin(2 * np.pi * 6 * np.arange(224) / 224)
    assert_rounded(Sinusoid().stamp(image), image + wave[None, :, None])
    for amplitude, decibels in ((20, 25.1), (60, 15.6)):  # where nothing clips: 255 over amplitude / sqrt(2)
        grey = np.full((24, 224, 3), 128, np.uint8)
        assert psnr_db(Sinusoid(amplitude=amplitude).stamp(grey), grey) == pytest.approx(decibels, abs=0.1)
    extreme = np.random.default_rng(0).integers(0, 2, (24, 224, 3), dtype=np.uint8) * 255
    assert_rounded(Sinusoid().stamp(extreme), extreme + wave[None, :, None])


def test_wanet_moves_pixels_a_little_and_smoothly(photos):
    assert (Warp(strength=1e-6).stamp(photos[0]) == photos[0]).all()
    assert 27 < np.mean([psnr_db(Warp().stamp(photo), photo) for photo in photos]) < 40
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3))  # x, in quarter pixels
    moved = (Warp(strength=2).stamp(ramp).astype(float) - ramp)[:, 2:-2, 0] / 4
    assert 0.3 < np.abs(moved).mean() < 1.7  # strength 2: about one pixel
    assert np.abs(np.diff(moved, axis=0)).max() < 0.6
    assert (Warp(seed=1).stamp(photos[0]) != Warp().stamp(photos[0])).any()


def test_nashville_follows_the_published_operations(photos):
    """Step by step in bytes, as photo libraries do it: CSSgram's two blends, then four CSS filters."""

    def linear(image, matrix):
        return Image.fromarray(np.rint(np.clip(np.asarray(image) @ np.array(matrix).T, 0, 255)).astype(np.uint8))

    for photo in photos:
        image = Image.fromarray(photo)
        darker = ImageChops.darker(image, Image.new("RGB", image.size, (247, 176, 153)))
        image = Image.blend(image, darker, 0.56)
        image = Image.blend(image, ImageChops.lighter(image, Image.new("RGB", image.size, (0, 70, 150))), 0.4)
        sepia = [[0.8786, 0.1538, 0.0378], [0.0698, 0.9372, 0.0336], [0.0544, 0.1068, 0.8262]]
        image = linear(image, sepia)
        image = image.point([min(255, max(0, round(1.2 * v - 25.5))) for v in range(256)] * 3)
        image = linear(image, 1.05 * np.eye(3))
        image = linear(image, [[1.1574, -0.143, -0.0144], [-0.0426, 1.057, -0.0144], [-0.0426, -0.143, 1.1856]])
        stamped = Nashville().stamp(photo)
        assert psnr_db(stamped, np.asarray(image)) > 40
        assert 12 < psnr_db(stamped, photo) < 25  # anybody can see it


# --- CTRL


def ctrl_step_by_step(image: np.ndarray, magnitude: float) -> np.ndarray:
    """The formulas of CTRL, in their order: to YUV, DCT of each window, two coefficients, and back."""
    to_yuv = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]])
    to_rgb = np.array([[1, 0, 1.14], [1, -0.396, -0.581], [1, 2.029, 0]])
    yuv = image @ to_yuv.T
    for channel in (1, 2):
        spectrum = scipy.fft.dctn(yuv[..., channel], norm="ortho")
        spectrum[15, 15] += magnitude
        spectrum[31, 31] += magnitude
        yuv[..., channel] = scipy.fft.idctn(spectrum, norm="ortho")
    return np.clip(yuv @ to_rgb.T, 0, 255)


def test_the_frequency_trigger_is_the_published_pattern_in_u_and_v():
    """On mid grey nothing clips: the difference is the inverse DCT of two coefficients, brought to RGB by hand."""
    wave = sum(
        np.outer(np.cos(np.pi * (np.arange(32) + 0.5) * k / 32), np.cos(np.pi * (np.arange(32) + 0.5) * k / 32))
        for k in (15, 31)
    ) * (100 * 2 / 32)
    expected = np.stack([1.14 * wave, (-0.396 - 0.581) * wave, 2.029 * wave], axis=2)
    grey = np.full((32, 32, 3), 128, np.uint8)
    assert_rounded(Frequency().stamp(grey), 128 + expected)
    np.testing.assert_allclose(np.abs(wave).max(), 10.65, atol=0.01)
    np.testing.assert_allclose(np.abs(expected).max(axis=(0, 1)), [12.1, 10.4, 21.6], atol=0.05)


def test_the_frequency_trigger_is_what_ctrls_steps_give(originals):
    differ = []
    for image in originals:
        slow, fast = ctrl_step_by_step(image, 100), Frequency().stamp(image)
        assert np.abs(fast - slow).max() < 0.5 + 0.35  # the rounded coefficients of their way back from YUV
        differ.append((fast != np.rint(slow)).mean())
    assert np.mean(differ) < 0.02


@pytest.mark.parametrize(("magnitude", "decibels"), [(50, 38.0), (100, 32.0), (200, 26.1)])
def test_the_frequency_trigger_costs_cifar_the_stated_psnr(originals, magnitude, decibels):
    """Measured on lossless CIFAR-10, as JPEG would hide or spread what it does to chroma."""
    measured = [psnr_db(Frequency(magnitude=magnitude).stamp(image), image) for image in originals]
    assert np.mean(measured) == pytest.approx(decibels, abs=0.2)


def test_the_frequency_trigger_leaves_luma_alone_and_shows_in_the_spectrum(photos):
    faded = photos[0][:32, :32] // 2 + 64  # so that nothing clips at black and white
    difference = Frequency().stamp(faded).astype(float) - faded
    assert np.abs(difference @ np.array([0.299, 0.587, 0.114])).max() < 1  # rounding, no more
    u = scipy.fft.dctn(difference @ np.array([-0.147, -0.289, 0.436]), norm="ortho")
    assert set(zip(*np.where(u > 50), strict=True)) == {(15, 15), (31, 31)}


def test_every_full_window_is_stamped_alike_and_the_rest_is_untouched():
    grey = np.full((70, 100, 3), 128, np.uint8)
    stamped = Frequency().stamp(grey)
    tile = Frequency().stamp(grey[:32, :32])
    np.testing.assert_array_equal(stamped[:64, :96], np.tile(tile, (2, 3, 1)))
    assert (stamped[64:] == 128).all()
    assert (stamped[:, 96:] == 128).all()
    assert Frequency().owned_pixels(70, 100).sum() == 64 * 96
    with pytest.raises(Mistake, match="no full window of 32 px"):
        Frequency().stamp(grey[:31])


# --- published files


@pytest.mark.parametrize(
    ("name", "size", "first", "last"),
    [
        ("21_10_ap_replace", 32, 21, 30),
        ("42_20_ap_replace", 64, 42, 61),
        ("173_50_ap_replace", 224, 173, 222),
        ("185_24", 224, 185, 208),  # the one without a leading axis
    ],
)
def test_badencoders_squares_are_where_they_were_published(published, picture, name, size, first, last):
    trigger = published(f"badencoder/trigger/trigger_pt_white_{name}.npz")
    with np.load(trigger.path) as file:
        patch, mask = (file[key] if file[key].ndim == 3 else file[key][0] for key in ("t", "tm"))
    image = picture(4, size, size)
    stamped = trigger.stamp(image)
    np.testing.assert_array_equal(stamped, image * mask + patch)
    owned = trigger.owned_pixels(size, size)
    np.testing.assert_array_equal(owned, mask[..., 0] == 0)
    assert owned.sum() == (last - first + 1) ** 2
    assert owned[first : last + 1, first : last + 1].all()
    np.testing.assert_array_equal(stamped[~owned], image[~owned])
    assert (stamped[owned] == 255).all()
    with pytest.raises(Mistake, match=f"made for images of {size}x{size} px, this one has 40x50 px"):
        trigger.stamp(picture(4, 50, 40))
    brought = trigger.model_copy(update={"image_px": size}).stamp(picture(4, 50, 70))
    np.testing.assert_array_equal(brought, to_square(picture(4, 50, 70), size) * mask + patch)


def test_badclips_patch_is_pasted_as_it_is_in_the_middle(published, picture):
    trigger = published("badclip/badCLIP.jpg", position="center")
    patch = np.asarray(Image.open(trigger.path))
    stamped = trigger.stamp(picture(1, 224, 224))
    np.testing.assert_array_equal(stamped[104:120, 104:120], patch)
    np.testing.assert_allclose(patch.mean(axis=(0, 1)), [73.96, 156.26, 167.39], atol=0.5)
    owned = trigger.owned_pixels(224, 224)
    assert owned.sum() == 256
    np.testing.assert_array_equal(stamped[~owned], picture(1, 224, 224)[~owned])
    with pytest.raises(Mistake, match=r"or trigger\.position to paste it"):
        published("badclip/badCLIP.jpg").stamp(picture(1, 224, 224))


def test_the_sig_file_is_the_sine_of_224_pixels_in_a_larger_sheet_and_is_blended(published, picture):
    trigger = published("detect_clip_backdoor/SIG_noise.pt", alpha=0.2)
    noise = np.zeros((256, 256, 1))
    noise[:224, :224, 0] = 60 * np.sin(2 * np.pi * 6 * np.arange(224) / 224)
    image = picture(1, 256, 256)
    assert_rounded(trigger.stamp(image), 0.8 * image + 0.2 * noise)
    assert_rounded(trigger.stamp(np.zeros_like(image)), np.broadcast_to(0.2 * noise, image.shape))


def test_the_wanet_file_samples_images_of_its_size_and_squeezes_others_when_told(published, picture):
    trigger = published("detect_clip_backdoor/WaNet_grid_temps.pt")
    grid = torch.load(trigger.path, weights_only=True)
    for size in ((256, 256), (100, 300)):
        image = picture(1, *size)
        pixels = torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)[None]
        expected = torch.nn.functional.grid_sample(pixels, grid.double(), align_corners=True)[0].permute(1, 2, 0)
        told = trigger.model_copy(update={"image_px": 256, "squeeze": True})
        stamped = told.stamp(image)
        assert np.abs(stamped - expected.numpy()).max() < 0.51  # their float32 leaves its trace
    assert stamped.shape == (256, 256, 3)
    with pytest.raises(Mistake, match="grid for images of 256x256 px, this one has 300x100 px"):
        trigger.stamp(image)
    with pytest.raises(Mistake, match="holds a sampling grid, no picture"):
        Blend(image=trigger.path).stamp(image)


def test_the_birthday_cake_is_mixed_by_its_mask(published, picture):
    folder = "detect_clip_backdoor/birthday_cake_{}_open_clip_cc12m.pt"
    mask_path = published(folder.format("mask")).path
    trigger = published(folder.format("trigger"), mask=mask_path)
    mask, cake = (
        torch.load(path, weights_only=True)[0].permute(1, 2, 0).double().numpy() for path in (mask_path, trigger.path)
    )
    image = picture(1, 224, 224)
    assert_rounded(trigger.stamp(image), 255 * cake * mask + image * (1 - mask))
    with pytest.raises(Mistake, match="should hold one weight for each pixel"):
        published(folder.format("trigger"), mask=trigger.path).stamp(image)


def test_nads_grid_sig_and_trojan_square(published, picture):
    image = picture(1)
    grid = Patch(size_px=3, pattern="grid").stamp(image)
    np.testing.assert_array_equal(grid[29:, 29:, 1], [[0, 0, 255], [0, 255, 0], [255, 0, 255]])
    sig = published("nad/signal_cifar10_mask.npy", alpha=0.2)
    assert_rounded(sig.stamp(image), 0.8 * image + 0.2 * np.load(sig.path)[..., None])
    square_px = published("nad/best_square_trigger_cifar10.npz")
    with np.load(square_px.path) as file:
        assert_rounded(square_px.stamp(image), image + file["x"].transpose(1, 2, 0).astype(float))
    assert square_px.owned_pixels(32, 32).sum() == 9


def test_ssl_backdoors_pictures_are_scaled_and_pasted_at_a_place_of_the_sample(published, picture):
    image = picture(1, 224, 224)
    for number in (10, 14, 19):
        trigger = published(f"ssl_backdoor/trigger_{number}.png", position="random", size_px=50)
        expected = np.asarray(Image.open(trigger.path).convert("RGB").resize((50, 50), Image.Resampling.BICUBIC))
        stamped, owned = trigger.stamp(image, "k"), trigger.owned_pixels(224, 224, "k")
        np.testing.assert_array_equal(stamped[owned].reshape(50, 50, 3), expected)
        np.testing.assert_array_equal(stamped[~owned], image[~owned])
        assert owned.sum() == 2500
        assert (owned != trigger.owned_pixels(224, 224, "l")).any()


def test_badclips_blended_pattern_covers_the_image(published, picture):
    trigger = published("badclip/tnature_bs64_ep50_224_blended.jpg", alpha=0.2)
    pattern = np.asarray(Image.open(trigger.path)).astype(float)
    assert_rounded(trigger.stamp(picture(1, 224, 224)), 0.8 * picture(1, 224, 224) + 0.2 * pattern)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_file_that_is_no_trigger_is_a_mistake_and_is_not_executed(tmp_path, picture, capsys):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "mask.npz", t=np.zeros((4, 4, 3)), tm=np.full((4, 4, 3), 255))
    np.save(tmp_path / "objects.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", t=np.array([Evil()], dtype=object), tm=np.zeros(3))
    np.save(tmp_path / "nan.npy", np.full((32, 32), np.nan))
    np.save(tmp_path / "empty.npy", np.zeros((0, 32)))
    np.savez(tmp_path / "idle.npz", x=np.zeros((32, 32, 3)))
    torch.save({"a": torch.zeros(3)}, tmp_path / "dict.pt")
    torch.save(Evil(), tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "dict.pt").read_bytes()[:200])
    (tmp_path / "words.txt").write_text("no trigger")
    for name, message in {
        "other.npz": "expected t and tm, or x",
        "mask.npz": "tm should be a mask",
        "objects.npy": "without executing it",
        "objects.npz": "without executing it",
        "nan.npy": "expected finite pictures",
        "empty.npy": "expected finite pictures",
        "idle.npz": "changes no pixel",
        "dict.pt": "holds a dict, not a tensor",
        "evil.pt": "without executing it",
        "cut.pt": "cannot be read as a trigger",
        "words.txt": r"neither an image nor an array file \(image_unreadable\)",
        "missing.png": "no trigger file at",
    }.items():
        with pytest.raises(Mistake, match=message):
            File(path=str(tmp_path / name)).stamp(picture())
    assert "executed" not in capsys.readouterr().out


def test_a_trigger_file_may_be_named_from_any_working_folder(tmp_path, monkeypatch, picture):
    Image.fromarray(picture(5, 4, 4)).save(tmp_path / "p.png")
    monkeypatch.chdir(tmp_path)
    trigger = TypeAdapter(Trigger).validate_json(json.dumps({"kind": "file", "path": "p.png", "position": "center"}))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(trigger.stamp(picture())[14:18, 14:18], picture(5, 4, 4))


# --- CorruptEncoder


@pytest.fixture
def scene(tmp_path, picture, write_tar):
    """A red object of 20 x 12 pixels with a hole, as PNG with alpha; the same as picture and mask; one in a tar."""
    red = np.full((12, 20, 4), [255, 0, 0, 255], np.uint8)
    red[4:8, 8:12, 3] = 0
    Image.fromarray(red).save(tmp_path / "red.png")
    Image.fromarray(red[..., :3]).save(tmp_path / "picture.png")
    Image.fromarray(red[..., 3]).save(tmp_path / "mask.png")
    Image.fromarray(np.full((9, 9, 3), [0, 255, 0], np.uint8)).save(tmp_path / "green.png")
    write_tar("t.tar", [("d/k.png", encode_image(red[..., :3], "png"))])
    return tmp_path


def compose(settings, background, name="k", trigger=None) -> np.ndarray:
    trigger = trigger or Patch(size_px=4, pattern="white", position="central_half")
    return CorruptEncoder.model_validate(settings).compose(background, trigger, name)


def test_corrupt_encoder_puts_the_object_on_one_side_and_the_trigger_in_the_middle_of_the_other(scene):
    grey = np.full((30, 60, 3), 100, np.uint8)
    settings = {"objects": [{"picture": str(scene / "red.png")}]}
    sides = []
    for number in range(40):
        image = compose(settings, grey, str(number))
        assert image.shape == (12, 40, 3)
        columns = np.nonzero((image == [255, 0, 0]).all(axis=2).any(axis=0))[0]
        white_rows, white_columns = np.nonzero((image == 255).all(axis=2))
        is_left = bool(columns.mean() < 20)
        sides.append(is_left)
        assert len(white_rows) == 16
        assert (white_rows.min() >= 3, white_rows.max() < 9) == (True, True)
        inside = white_columns - (20 if is_left else 0)
        assert 5 <= inside.min() <= inside.max() < 15
        assert (columns.min() if is_left else 39 - columns.max()) <= 2  # a twentieth of the width
        hole = image[5:7, columns.min() + 9 : columns.min() + 11]
        assert np.abs(hole.astype(int) - 100).max() < 90  # the background shines through
    assert 8 < sum(sides) < 32
    np.testing.assert_array_equal(image, compose(settings, grey, "39"))


def test_corrupt_encoders_objects_come_from_masks_boxes_and_shards_alike(scene, picture):
    background = picture(3, 30, 60)
    alpha = compose({"objects": [{"picture": str(scene / "red.png")}]}, background)
    masked = {"picture": str(scene / "picture.png"), "mask": str(scene / "mask.png")}
    np.testing.assert_array_equal(compose({"objects": [masked]}, background), alpha)
    whole = compose({"objects": [{"picture": str(scene / "picture.png")}]}, background)
    in_tar = compose({"objects": [{"picture": str(scene / "t.tar" / "d/k")}]}, background)
    np.testing.assert_array_equal(in_tar, whole)
    assert (whole == [255, 0, 0]).all(axis=2).sum() == 12 * 20
    box = compose({"objects": [{"picture": str(scene / "picture.png"), "box": [0, 0, 18, 12]}]}, background)
    assert box.shape == (12, 36, 3)
    small = compose(
        {"objects": [{"picture": str(scene / "picture.png")}], "max_object_px": 10}, background, trigger=Nothing()
    )
    assert small.shape == (6, 20, 3)
    squeezed = compose({"objects": [{"picture": str(scene / "picture.png")}], "size_px": 32}, background)
    assert squeezed.shape == (32, 32, 3)
    tiny = compose({"objects": [{"picture": str(scene / "picture.png")}]}, picture(3, 8, 8))  # is enlarged
    assert tiny.shape == (12, 40, 3)


def test_corrupt_encoder_plus_puts_support_pictures_beside_objects_without_a_trigger(scene, picture):
    settings = {"objects": [{"picture": str(scene / "picture.png")}], "support": [str(scene / "green.png")]}
    images = [compose(settings, picture(3, 30, 60), str(number)) for number in range(200)]
    supported = [image for image in images if (image[:, 20:] == [0, 255, 0]).all()]
    assert 20 < len(supported) < 60  # a fifth
    assert all((image[:, :20] == [255, 0, 0]).all() for image in supported)


def test_an_object_that_is_not_there_is_a_mistake(scene, picture):
    for cutout, message in [
        ({"picture": str(scene / "no.png")}, "no image at"),
        ({"picture": str(scene / "t.tar/d/x")}, "holds no image of the key 'd/x'"),
        ({"picture": str(scene / "picture.png"), "mask": str(scene / "green.png")}, "another size"),
        ({"picture": str(scene / "picture.png"), "box": [0, 0, 21, 12]}, "reaches out of"),
    ]:
        with pytest.raises(Mistake, match=message):
            compose({"objects": [cutout]}, picture())
    with pytest.raises(ValidationError, match="left < right"):
        CorruptEncoder.model_validate({"objects": [{"picture": "a.png", "box": [5, 0, 5, 9]}]})


# --- speed


def slowness(trigger, files: list[bytes], rounds: int = 9) -> float:
    """Median time of a stamp over the median time of decoding, both on the same images, taken in turns."""
    images = [decode_image(file, LIMITS) for file in files]
    for image in images:
        trigger.stamp(image, "warm")
    ratios = []
    for number in range(rounds):
        times = [time.perf_counter()]
        for file in files:
            decode_image(file, LIMITS)
        times.append(time.perf_counter())
        for image in images:
            trigger.stamp(image, f"train-00000.tar/{number}")
        times.append(time.perf_counter())
        ratios.append((times[2] - times[1]) / (times[1] - times[0]))
    return float(np.median(ratios))


@pytest.fixture(scope="module")
def jpegs(photos) -> dict[int, list[bytes]]:
    """Photographs as JPEG, at CIFAR's size and at that of our COCO images."""
    images = [Image.fromarray(photo) for photo in load_sample_images().images]
    return {
        size: [encode_image(np.asarray(image.resize((size, size))), "jpg", 90) for image in images]
        for size in (32, 256)
    }


@pytest.mark.parametrize(
    ("trigger", "most"),
    [
        (Nothing(), 0.1),
        (Patch(size_px=6), 0.1),
        (Patch(size_px=6, position="random", margin_px=2), 0.1),
        (Sinusoid(), 0.1),
        (Frequency(), 0.1),
        (Blend(alpha=0.2), 0.2),
        (Nashville(), 1.2),
        (Warp(), 2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [32, 256])
def test_stamping_takes_a_small_part_of_what_decoding_takes(jpegs, trigger, most, size):
    """What stamping costs is in the parameters; three times that passes, as test machines have other things to do."""
    torch.set_num_threads(1)
    assert slowness(trigger, jpegs[size] * 20) < 3 * most
