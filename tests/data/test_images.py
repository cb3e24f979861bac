"""Untrusted pictures: any file becomes uint8 RGB of bounded cost, or has a reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from tars import saved

from dede_ray.data.images import decode_image, encode_image
from dede_ray.data.shards import BadSample, Limits

LIMITS = Limits()


def test_an_image_of_the_right_size_passes_untouched(picture, png):
    np.testing.assert_array_equal(decode_image(png(), LIMITS), picture())
    np.testing.assert_array_equal(decode_image(png(), LIMITS, size_px=32), picture())


def test_every_colour_mode_becomes_rgb_of_about_the_same_colours(picture):
    rgb = Image.fromarray(picture())
    grey = np.asarray(rgb.convert("L"))
    files = {
        "palette": (saved(rgb.quantize(256), "PNG"), picture()),
        "cmyk": (saved(rgb.convert("CMYK"), "JPEG", quality=95), picture()),
        "alpha": (saved(rgb.convert("RGBA"), "PNG"), picture()),
        "grey": (saved(rgb.convert("L"), "PNG"), np.stack([grey] * 3, axis=2)),
        "16 bit": (saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), np.stack([grey] * 3, axis=2)),
        "webp": (saved(rgb, "WEBP", quality=95), picture()),
        "bmp": (saved(rgb, "BMP"), picture()),
    }
    for name, (content, expected) in files.items():
        image = decode_image(content, LIMITS)
        assert (image.dtype, image.shape) == (np.uint8, (32, 32, 3)), name
        assert np.abs(image.astype(int) - expected).mean() < 6, name


def test_a_photo_taken_sideways_is_turned_upright(picture):
    sideways = Image.fromarray(picture(height=20, width=30))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to see it upright
    content = saved(sideways, "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(content, LIMITS), np.rot90(picture(height=20, width=30), -1))


def test_of_an_animation_the_first_picture_is_taken(picture):
    frames = [Image.fromarray(picture(i)) for i in range(3)]
    content = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(content, LIMITS), picture(0))


@pytest.mark.trains
def test_an_image_bomb_is_stopped_before_it_is_decoded():
    bomb = saved(Image.new("1", (30_000, 30_000)), "PNG")  # 900 megapixels in a small file
    assert len(bomb) < 500_000
    with pytest.raises(BadSample, match="image_too_large"):
        decode_image(bomb, LIMITS)
    with pytest.raises(BadSample, match="image_too_large"):
        decode_image(saved(Image.new("RGB", (33, 32)), "PNG"), Limits(max_pixels=32 * 32))


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PPM", "ICO"])
def test_formats_that_are_not_on_the_list_are_refused_whatever_their_suffix(picture, kind):
    with pytest.raises(BadSample, match="image_unreadable"):
        decode_image(saved(Image.fromarray(picture()), kind), LIMITS)


def test_a_large_image_is_scaled_and_its_centre_kept(picture):
    wide = np.zeros((64, 200, 3), np.uint8)
    wide[:, 68:132] = picture(height=64, width=64)
    square = decode_image(encode_image(wide, "png"), LIMITS, size_px=32)
    assert square.shape == (32, 32, 3)
    assert np.abs(square.astype(int) - picture(height=64, width=64)[::2, ::2]).mean() < 10


@pytest.mark.parametrize(("suffix", "tolerance"), [("png", 0), ("bmp", 0), ("jpg", 8), ("jpeg", 8), ("webp", 8)])
def test_an_image_is_encoded_as_what_its_suffix_says(picture, suffix, tolerance):
    content = encode_image(picture(), suffix)
    assert Image.open(io.BytesIO(content)).format == {"jpg": "JPEG"}.get(suffix, suffix.upper())
    assert np.abs(decode_image(content, LIMITS).astype(int) - picture()).mean() <= tolerance


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


NOTES = {
    "tEXt": chunk(b"tEXt", b"Comment\0" + b"a" * 2_000_000),
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 1_500_000)),
    "iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"a" * 1_500_000)),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"a" * 1_500_000)),
    "profile": chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2_000_000))),
    "eXIf": chunk(b"eXIf", bytes(100_000)),
    "EXIF in a text": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"0" * 3_000_000)),
    "wrong checksum": chunk(b"tEXt", b"Comment\0a")[:-4] + b"abcd",
    "a hundred": b"".join(chunk(b"zTXt", b"c%d\0\0" % i + zlib.compress(bytes(900_000))) for i in range(100)),
}


@pytest.mark.parametrize("name", NOTES)
def test_long_notes_and_large_profiles_of_a_png_are_stepped_over(picture, png, name):
    for place in (33, len(png()) - 12):  # behind the header, before the end
        content = png()[:place] + NOTES[name] + png()[place:]
        np.testing.assert_array_equal(decode_image(content, LIMITS), picture())


@pytest.mark.parametrize("how", ["eXIf", "zTXt", "xmp"])
def test_what_says_how_a_png_is_turned_stays(picture, how):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(Image.fromarray(picture(height=20, width=30)), "PNG")
    profile = b"\nexif\n%8d\n" % len(exif.tobytes()) + exif.tobytes().hex().encode() + b"\n"
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turn = {
        "eXIf": chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")),
        "zTXt": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }[how]
    bare = content[:33] + turn + content[33:]
    np.testing.assert_array_equal(decode_image(bare, LIMITS), np.rot90(picture(height=20, width=30), -1))
    noted = content[:33] + turn + NOTES["zTXt"] + NOTES["profile"] + content[33:]
    np.testing.assert_array_equal(decode_image(noted, LIMITS), np.rot90(picture(height=20, width=30), -1))


def test_a_png_that_is_damaged_is_handed_over_as_it_is(png):
    whole = png()[:33] + NOTES["tEXt"] + png()[33:]
    for content in (whole[:40], whole[:1000], whole[:-30], whole[:33] + b"\xff\xff\xff\xfftEXt" + whole[41:]):
        with pytest.raises(BadSample):
            decode_image(content, LIMITS)
