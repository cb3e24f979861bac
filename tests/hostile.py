"""Hostile shards and files: what an adversary, or a bad disk, may put where our jobs read. Nothing here is random.

`SHARDS` are whole tars. Each says which samples it holds, in order, and how each ends: `scored`, or an error row with a
reason of `shards.REASONS`; then how the shard ends. Most hold their oddity between two good samples, `before` and
`after`, which must not notice it.

    case                                              ends as
    image of too many pixels, declared or real        image_too_large, before a pixel is decoded
    JPEG that paints its pixels hundreds of times     image_too_large
    huge text or colour profile in a PNG              image_unreadable (Pillow's own limit)
    huge EXIF data, broken EXIF data                  scored, as if there were none
    run-length encoded BMP                            image_unreadable
    HTML, text, GIF, TIFF, PSD, EPS, SVG, PDF ...     image_unreadable, whatever the suffix; a PNG named .jpg is scored
    cut or empty image                                image_truncated, image_unreadable
    CMYK, 16 bit, palette, alpha, animated, rotated   scored: RGB, first frame, upright
    member longer than `max_member_bytes`             member_too_large
    member with holes (sparse)                        member_sparse
    links, devices, folders                           no samples
    pickles, code, arrays, JSON beside an image       scored; never opened
    a key that comes again, a member that comes twice duplicate_key, with an id of its own
    odd keys (paths, controls, not UTF-8, 10,000 characters)  scored under that key
    caption not UTF-8 (lone surrogates too), too long caption_unreadable, caption_too_long
    label not a plain integer of 31 bits              label_unreadable
    tar cut anywhere, rubbish or an impossible header what stands before is read; shard_truncated for a cut sample;
    in the middle, gzip that unfolds 50-fold         the manifest counts the shard among `truncated_shards`
    content after the tar's end                       not read, as by every tar reader
    not a tar at all, or one without members          a Mistake before the job begins, for the whole list

`FILES` are the other things that jobs open: checkpoints, exports, manifests, records of runs. All of them end in a
`Mistake`; none executes anything, or takes memory that the file itself does not fill.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from dede_ray.shards import encode_image

SENTINEL = Path(tempfile.gettempdir()) / f"dede_ray_hostile_{os.getpid()}"
"""Whatever executes something of the files below makes this folder."""

Members = list[tuple[str, bytes]]


class Bomb:
    """Unpickled, it goes off."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(SENTINEL),)


PICKLE = pickle.dumps({"state_dict": Bomb()}, protocol=2)


@dataclass(frozen=True)
class Case:
    """One shard."""

    name: str
    build: Callable[[], bytes]
    samples: tuple[tuple[str, str], ...]
    """Key and outcome of each sample, in order; an empty outcome: any."""
    is_complete: bool = True
    is_refused: bool = False
    suffix: str = "tar"


# ------------------------------------------------------------------------------------------------ images


def picture(number: int = 0, size: int = 32) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / 32
    waves = [np.sin(2 * np.pi * (x * (1 + c) + y * (number % 5) + c / 3)) for c in range(3)]
    return np.rint(128 + 70 * np.stack(waves, axis=2)).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RGB = Image.fromarray(picture())
PNG, JPEG, WEBP, BMP = (saved(RGB, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP"))
PROGRESSIVE = saved(RGB, "JPEG", progressive=True)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, depth: int, colour: int, *before: bytes, is_whole: bool = True) -> bytes:
    """A PNG of zeros, whose bytes are a thousandth of its pixels'."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = 1 + (width * depth * channels + 7) // 8
    deflate, parts, rows = zlib.compressobj(1), [], height if is_whole else 1
    for start in range(0, rows, 256):
        parts.append(deflate.compress(bytes(row * min(256, rows - start))))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    palette = [chunk(b"PLTE", bytes(768))] if colour == 3 else []
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *before,
            *palette,
            chunk(b"IDAT", b"".join([*parts, deflate.flush()])),
            chunk(b"IEND", b""),
        ]
    )


def with_chunks(*chunks: bytes) -> bytes:
    """A good PNG with further chunks after its header."""
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def zeros(num_bytes: int) -> bytes:
    return zlib.compress(bytes(num_bytes), 9)


def segments(marker: int, *contents: bytes) -> bytes:
    return b"".join(struct.pack(">BBH", 255, marker, 2 + len(content)) + content for content in contents)


def jpeg_with(*more: bytes, base: bytes = JPEG) -> bytes:
    """A good JPEG with further segments at its beginning, in place of JFIF's."""
    return base[:2] + b"".join(more) + base[20:]


def jpeg_declaring(width: int, height: int) -> bytes:
    place = JPEG.index(b"\xff\xc0")
    return JPEG[: place + 5] + struct.pack(">HH", height, width) + JPEG[place + 9 :]


def jpeg_of_scans(size: int, num_scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    content = saved(Image.new("L", (size, size)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * num_scans + content[-2:]


def exif(num_bytes: int, orientation: int = 1) -> bytes:
    """TIFF data all of whose entries point at the whole of it."""
    num = min(65_535, (num_bytes - 14) // 12)
    entries = [struct.pack("<HHII", 0x0112, 3, 1, orientation)]
    entries += [struct.pack("<HHII", 1000 + i % 60_000, 7, num_bytes - 16, 8) for i in range(num - 1)]
    data = b"II*\0" + struct.pack("<IH", 8, num) + b"".join(entries) + bytes(4)
    return data.ljust(num_bytes, b"\0")[:num_bytes]


def exif_segments(data: bytes) -> list[bytes]:
    return [segments(0xE1, b"Exif\0\0" + data[at : at + 65_000]) for at in range(0, len(data), 65_000)]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def bmp(width: int, height: int, depth: int, compression: int, data: bytes) -> bytes:
    palette = bytes(4 << depth) if depth <= 8 else b""
    start = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, depth, compression, len(data), 1, 1, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


def animated(kind: str, num_frames: int) -> bytes:
    frames = [Image.fromarray(picture(i % 4, 8)) for i in range(num_frames)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


def turned(kind: str, orientation: int = 6) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return saved(RGB, kind, exif=data)


def other_format(kind: str) -> bytes:
    return saved(RGB, kind)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(" + str(SENTINEL).encode() + b") (w) file\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
PSD = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 32, 32, 8, 3) + bytes(12) + bytes(2 + 3 * 1024)

IMAGES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    # name: suffix, bytes, outcome
    "png_declares_2.5_gigapixels": ("png", lambda: png_of(50_000, 50_000, 8, 2, is_whole=False), "image_too_large"),
    "png_bomb_20000_px": ("png", lambda: png_of(20_000, 20_000, 1, 0), "image_too_large"),
    "png_declares_no_pixels": ("png", lambda: png_of(0, 32, 8, 2), "image_unreadable"),
    "png_lies_about_its_size": ("png", lambda: png_of(4000, 4000, 8, 2, is_whole=False), "scored"),
    "jpeg_declares_4_gigapixels": ("jpg", lambda: jpeg_declaring(65_500, 65_500), "image_too_large"),
    "webp_declares_268_megapixels": (
        "webp",
        lambda: WEBP[:26] + struct.pack("<HH", 16_383, 16_383) + WEBP[30:],
        "image_too_large",
    ),
    "bmp_declares_3.6_gigapixels": ("bmp", lambda: bmp(60_000, 60_000, 24, 0, bytes(4096)), "image_too_large"),
    "bmp_of_negative_width": ("bmp", lambda: bmp(-32, 32, 24, 0, bytes(4096)), "image_too_large"),
    "bmp_run_lengths": ("bmp", lambda: bmp(32, 32, 8, 1, b"\x20\x01\0\0" * 32 + b"\0\1"), "image_unreadable"),
    "bmp_delta_bomb": ("bmp", lambda: bmp(32_000_000, 2, 8, 1, b"\0\2\xff\xff" * 99), "image_unreadable"),
    "png_itxt_bomb": (
        "png",
        lambda: with_chunks(chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros(20_000_000))),
        "image_unreadable",
    ),
    "png_ztxt_bomb": (
        "png",
        lambda: with_chunks(chunk(b"zTXt", b"Comment\0\0" + zeros(20_000_000))),
        "image_unreadable",
    ),
    "png_hundred_texts": (
        "png",
        lambda: with_chunks(*[chunk(b"zTXt", b"c%d\0\0" % i + zeros(1_000_000)) for i in range(100)]),
        "image_unreadable",
    ),
    "png_profile_bomb": (
        "png",
        lambda: with_chunks(chunk(b"iCCP", b"icc\0\0" + zeros(20_000_000))),
        "image_unreadable",
    ),
    "png_wrong_checksum": ("png", lambda: PNG[:29] + b"\0\0\0\0" + PNG[33:], "image_unreadable"),
    "png_exif_bomb": ("png", lambda: with_chunks(chunk(b"eXIf", exif(8_000_000))), "scored"),
    "png_exif_in_text_bomb": (
        "png",
        lambda: with_chunks(
            chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n1\n" + exif(400_000).hex().encode()))
        ),
        "scored",
    ),
    "webp_exif_bomb": (
        "webp",
        lambda: riff(
            (b"VP8X", struct.pack("<I", 8) + struct.pack("<I", 31)[:3] + struct.pack("<I", 31)[:3]),
            (b"VP8 ", WEBP[20 : 20 + struct.unpack("<I", WEBP[16:20])[0]]),
            (b"EXIF", exif(8_000_000)),
        ),
        "scored",
    ),
    "jpeg_exif_bomb": ("jpg", lambda: jpeg_with(*exif_segments(exif(8_000_000))), "scored"),
    "jpeg_profile_of_255_segments": (
        "jpg",
        lambda: jpeg_with(*[segments(0xE2, b"ICC_PROFILE\0" + bytes([i, 255]) + bytes(65_000)) for i in range(1, 256)]),
        "scored",
    ),
    "jpeg_of_many_pictures_bomb": ("jpg", lambda: jpeg_with(segments(0xE2, b"MPF\0" + exif(65_000))), ""),
    "jpeg_scan_bomb": ("jpg", lambda: jpeg_of_scans(4000, 2000), "image_too_large"),
    "webp_of_3000_frames": ("webp", lambda: animated("WEBP", 3000), "scored"),
    "png_of_3000_frames": ("png", lambda: animated("PNG", 3000), "scored"),
    "exif_rotated_jpeg": ("jpg", lambda: turned("JPEG"), "scored"),
    "exif_rotated_webp": ("webp", lambda: turned("WEBP", 5), "scored"),
    "exif_broken_jpeg": ("jpg", lambda: jpeg_with(segments(0xE1, b"Exif\0\0rubbish that is no TIFF")), "scored"),
    "exif_broken_png": ("png", lambda: with_chunks(chunk(b"eXIf", b"rubbish that is no TIFF")), "scored"),
    "exif_of_orientation_99": ("png", lambda: turned("PNG", 99), "scored"),
    "jpeg_cut": ("jpg", lambda: JPEG[:-100], "image_truncated"),
    "jpeg_cut_in_its_header": ("jpg", lambda: JPEG[:50], "image_truncated"),
    "png_cut": ("png", lambda: PNG[: len(PNG) // 2], "image_truncated"),
    "webp_cut": ("webp", lambda: WEBP[:-100], "image_unreadable"),
    "bmp_cut": ("bmp", lambda: BMP[:-1000], "image_truncated"),
    "zero_bytes": ("jpg", lambda: b"", "image_unreadable"),
    "html": ("jpg", lambda: b"<!DOCTYPE html><html><body>404 not found</body></html>", "image_unreadable"),
    "text": ("png", lambda: b"not an image at all", "image_unreadable"),
    "png_named_jpg": ("jpg", lambda: PNG, "scored"),
    "suffix_in_capitals": ("JPEG", lambda: JPEG, "scored"),
    **{
        f"{kind.lower()}_named_jpg": ("jpg", lambda kind=kind: other_format(kind), "image_unreadable")
        for kind in ("GIF", "TIFF", "ICO", "PDF", "PPM", "TGA", "PCX", "DDS", "JPEG2000")
    },
    "eps_named_jpg": ("jpg", lambda: EPS, "image_unreadable"),
    "psd_named_jpg": ("jpg", lambda: PSD, "image_unreadable"),
    "svg_named_png": ("png", lambda: SVG, "image_unreadable"),
    "pickle_named_jpg": ("jpg", lambda: PICKLE, "image_unreadable"),
    "cmyk": ("jpg", lambda: saved(RGB.convert("CMYK"), "JPEG"), "scored"),
    "grey_16_bit": ("png", lambda: saved(Image.fromarray(picture()[..., 0].astype(np.uint16) * 257), "PNG"), "scored"),
    "palette_with_transparency": (
        "png",
        lambda: saved(RGB.quantize(16), "PNG", transparency=bytes(range(16))),
        "scored",
    ),
    "alpha": ("png", lambda: saved(RGB.convert("RGBA"), "PNG"), "scored"),
    "grey_with_alpha": ("png", lambda: saved(RGB.convert("LA"), "PNG"), "scored"),
    "one_bit": ("png", lambda: saved(RGB.convert("1"), "PNG"), "scored"),
    "one_pixel": ("png", lambda: saved(RGB.resize((1, 1)), "PNG"), "scored"),
    "one_pixel_high": ("png", lambda: saved(RGB.resize((60_000, 1)), "PNG"), "scored"),
    "progressive": ("jpg", lambda: PROGRESSIVE, "scored"),
}

LARGEST: dict[str, Callable[[int], bytes]] = {
    "png_rgb": lambda side: png_of(side, side, 8, 2),
    "png_rgba": lambda side: png_of(side, side, 8, 6),
    "png_rgb_16_bit": lambda side: png_of(side, side, 16, 2),
    "png_grey_16_bit": lambda side: png_of(side, side, 16, 0),
    "png_palette": lambda side: png_of(side, side, 8, 3),
    "png_one_bit": lambda side: png_of(side, side, 1, 0),
    "png_turned": lambda side: png_of(side, side, 8, 2, chunk(b"eXIf", exif(38, orientation=6))),
    "jpeg": lambda side: saved(Image.new("RGB", (side, side)), "JPEG"),
    "jpeg_progressive_cmyk": lambda side: saved(Image.new("CMYK", (side, side)), "JPEG", progressive=True),
    "webp": lambda side: saved(Image.new("RGBA", (side, side)), "WEBP", method=0),
    "webp_turned": lambda side: saved(Image.new("RGBA", (side, side)), "WEBP", method=0, exif=exif(38, orientation=6)),
    "bmp_one_bit": lambda side: bmp(side, side, 1, 0, bytes((side + 31) // 32 * 4 * side)),
}
"""Images of a given side, each a small file, to be allowed by `max_pixels` and decoded at their full size."""


# ------------------------------------------------------------------------------------------------ tars


def good(key: str, number: int = 0) -> Members:
    image = encode_image(picture(number), "png")
    return [(f"{key}.png", image), (f"{key}.txt", b"a photo"), (f"{key}.cls", b"3")]


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def header(name: str | bytes, size: int | bytes = 0, kind: bytes = b"0", link: str = "", **fields: bytes) -> bytes:
    """A tar header; `size` as bytes is put there as it is."""
    info = tarfile.TarInfo("name")
    info.type, info.linkname = kind, link
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    name = name.encode() if isinstance(name, str) else name
    block[:100] = name[:100].ljust(100, b"\0")
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    for at, value in fields.items():
        start = int(at[1:])
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def binary(size: int) -> bytes:
    """A size field in base 256, which may be negative."""
    return (b"\x80" if size >= 0 else b"\xff") + (size % 256**11).to_bytes(11, "big")


def tar(*members: tuple[str | bytes, bytes], end: bool = True) -> bytes:
    blocks = b"".join(header(name, len(content)) + padded(content) for name, content in members)
    return blocks + bytes(1024 * end)


def pax(records: bytes | dict[str, str | bytes], kind: bytes = b"x") -> bytes:
    if isinstance(records, dict):
        lines = []
        for name, value in records.items():
            line = b" " + name.encode() + b"=" + (value.encode() if isinstance(value, str) else value) + b"\n"
            length = len(line)
            while length != len(line) + len(str(length)):
                length = len(line) + len(str(length))
            lines.append(str(length).encode() + line)
        records = b"".join(lines)
    return header("././@PaxHeader", len(records), kind) + padded(records)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    return header("././@LongLink", len(name) + 1, kind) + padded(name + b"\0")


def between(middle: bytes) -> bytes:
    """Tar blocks between two good samples."""
    return tar(*good("before", 1), end=False) + middle + tar(*good("after", 2))


def around(*samples: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return ("before", "scored"), *samples, ("after", "scored")


def odd(name: str, members: Callable[[], Members] | Members, *samples: tuple[str, str]) -> Case:
    """A case of odd members between good samples."""
    build = members if callable(members) else lambda: members
    return Case(name, lambda: between(tar(*build(), end=False)), around(*samples))


def blocks(name: str, middle: bytes | Callable[[], bytes], *samples: tuple[str, str], cut: bool = False) -> Case:
    """A case of odd tar blocks between good samples; `cut`: the second of them is lost."""
    build = middle if callable(middle) else lambda: middle
    expected = (("before", "scored"), *samples) if cut else around(*samples)
    return Case(name, lambda: between(build()), expected, is_complete=not cut)


def whole(name: str, content: Callable[[], bytes], *samples: tuple[str, str], **more: Any) -> Case:
    return Case(name, content, samples, **more)


def gzip_bomb(first: bytes, num_gigabytes: int) -> bytes:
    return gzip.compress(first, 1) + gzip.compress(bytes(100_000_000), 9) * (10 * num_gigabytes)


IMAGE = PNG
GOOD = tar(*good("before", 1), *good("k", 0), *good("after", 2))
K = ("k", "scored")
STORED = header("k.png", len(IMAGE)) + padded(IMAGE)


def with_image(*members: tuple[str, bytes]) -> Members:
    return [("k.png", IMAGE), *members]


def keyed(name: str, member: str, key: str | None = None) -> Case:
    return odd(f"key_{name}", [(member, IMAGE)], (member.partition(".")[0] if key is None else key, "scored"))


def captioned(name: str, caption: bytes, outcome: str = "scored") -> Case:
    return odd(f"caption_{name}", with_image(("k.txt", caption)), ("k", outcome))


def labelled(name: str, label: bytes, outcome: str = "label_unreadable") -> Case:
    return odd(f"label_{name}", with_image(("k.cls", label)), ("k", outcome))


def beside(suffix: str, content: bytes | Callable[[], bytes] = PICKLE) -> Case:
    build = content if callable(content) else lambda: content
    name = f"beside_{suffix}".replace(".", "_")
    return odd(name, lambda: [("k." + suffix, build()), ("k.png", IMAGE)], K)


def object_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], object), allow_pickle=True)
    return buffer.getvalue()


SHARDS: list[Case] = [
    *[
        odd(name, lambda suffix=suffix, build=build: [(f"k.{suffix}", build())], ("k", outcome))
        for name, (suffix, build, outcome) in IMAGES.items()
    ],
    # --- keys
    keyed("alphabets", "猫/ねこ.png"),
    keyed("emoji_and_marks", "e\u0301👩‍🚀.png"),
    keyed("bidi_controls", "a\u202egnp.png"),
    keyed("path_upwards", "../../etc/passwd.png", "../../etc/passwd"),
    keyed("absolute_path", "/etc/passwd.png"),
    keyed("empty_stem", "a/.png", "a/"),
    keyed("of_spaces_and_quotes", "' \"<b>.png"),
    keyed("with_hash", "before#1.png"),
    keyed("upper_case_suffix", "k.PNG"),
    odd("key_only_dots", [("....", IMAGE)], ("", "no_image")),
    odd("key_of_no_letters", [(".png", IMAGE)], ("", "scored")),
    blocks("key_not_utf_8", header(b"caf\xe9.png", len(IMAGE)) + padded(IMAGE), ("caf\\xe9", "scored")),
    blocks("key_like_gzip", header(b"\x1f\x8b\x08.png", len(IMAGE)) + padded(IMAGE), ("\x1f\\x8b\x08", "scored")),
    whole("key_like_gzip_first", lambda: tar((b"\x1f\x8b\x08.png", IMAGE)), ("\x1f\\x8b\x08", "scored")),
    blocks(
        "key_of_10000_characters",
        lambda: pax({"path": "x" * 10_000 + ".png"}) + STORED,
        ("x" * 10_000, "scored"),
    ),
    blocks(
        "key_with_nul_and_newline",
        lambda: pax({"path": "a\0b\nc.png"}) + STORED,
        ("a\0b\nc", "scored"),
    ),
    blocks(
        "key_with_invalid_utf_8_in_pax",
        lambda: pax({"path": b"\xff\xfe.png"}) + STORED,
        ("\\xff\\xfe", "scored"),
    ),
    odd(
        "key_again",
        [("k.png", IMAGE), ("m.png", IMAGE), ("k.png", IMAGE)],
        K,
        ("m", "scored"),
        ("k#3", "duplicate_key"),
    ),
    odd(
        "key_that_looks_like_a_renamed_one",
        [("k#4.png", IMAGE), ("k.png", IMAGE), ("m.png", IMAGE), ("k.png", IMAGE)],
        ("k#4", "scored"),
        K,
        ("m", "scored"),
        ("k#4#4", "duplicate_key"),
    ),
    odd("key_twice_in_a_row", [("k.png", IMAGE), ("k.txt", b""), ("k.png", JPEG)], ("k", "duplicate_key")),
    odd(
        "keys_interleaved",
        [("k.png", IMAGE), ("m.png", IMAGE), ("k.txt", b"a")],
        K,
        ("m", "scored"),
        ("k#3", "duplicate_key"),
    ),
    odd("two_spellings_of_one_key", [("a\\xe9.png", IMAGE)], ("a\\xe9", "scored")),
    # --- captions and labels
    captioned("missing_is_for_training_to_judge", b""),
    captioned("not_utf_8", b"\xff\xfe\0", "caption_unreadable"),
    captioned("with_lone_surrogates", b"\xed\xa0\x80", "caption_unreadable"),
    captioned("too_long", b"word " * 2001, "caption_too_long"),
    captioned("of_nuls", b"\0" * 50),
    captioned("with_bidi_controls", "\u202eabc\u2066\u200f".encode()),
    captioned("with_markup", b"<script>alert(1)</script>\x1b[2J"),
    captioned("with_byte_order_mark", "\ufeffa photo".encode()),
    odd("caption_without_image", [("k.txt", b"words")], ("k", "no_image")),
    labelled("huge", b"9" * 32),
    labelled("very_long", b"9" * 10_000),
    labelled("float", b"3.0"),
    labelled("empty", b""),
    labelled("with_underscore", b"1_000"),
    labelled("unicode_digits", "٣".encode()),
    labelled("two_numbers_far_apart", b"1" + b" " * 40 + b"2"),
    labelled("word", b"cat"),
    labelled("negative", b"-1", "scored"),
    labelled("with_newline", b" 7\r\n", "scored"),
    # --- members that are never opened
    *[beside(suffix) for suffix in ("pyd", "pickle", "pkl", "pt", "pth", "py", "so", "index.json.pickle")],
    beside("npy", object_array),
    beside("npz"),
    beside("json", b"[" * 100_000),
    beside("seg.json", b'{"a": NaN, "a": 1e999}'),
    # --- members of odd sizes and kinds
    odd("member_too_large", lambda: [("k.png", bytes(64_000_001))], ("k", "member_too_large")),
    odd("member_too_large_but_not_ours", lambda: [("k.mp4", bytes(64_000_001)), ("k.png", IMAGE)], K),
    odd("member_of_no_bytes", with_image(("k.json", b"")), K),
    odd("only_unknown_members", [("k.mp4", b"film")], ("k", "no_image")),
    blocks("symlink", header("k.png", 0, b"2", "/etc/passwd")),
    blocks("hardlink", header("k.png", 0, b"1", "before.png")),
    blocks("devices_and_pipe", b"".join(header("k.png", 0, kind) for kind in (b"3", b"4", b"6"))),
    blocks("folder", header("k.png/", 0, b"5")),
    blocks("member_of_unknown_type", header("k.png", len(IMAGE), b"Z") + padded(IMAGE)),
    blocks("member_contiguous", header("k.png", len(IMAGE), b"7") + padded(IMAGE), K),
    blocks(
        "sparse_gnu",
        header("k.png", 512, b"S", _386=b"%011o\0%011o\0" % (0, 512), _483=b"%011o\0" % (2**33 - 1)) + bytes(512),
        ("k", "member_sparse"),
    ),
    blocks(
        "sparse_gnu_with_endless_map",
        lambda: (
            header("k.png", 512, b"S", _482=b"\1") + (bytes(504) + b"\1" + bytes(7)) * 2000 + bytes(512) + bytes(512)
        ),
        ("k", "member_sparse"),
    ),
    *[
        blocks(f"sparse_pax_{name}", pax(records) + STORED, ("k", "member_sparse"))
        for name, records in {
            "0.0": {"GNU.sparse.size": "999999999999", "GNU.sparse.numblocks": "1"},
            "0.1": {"GNU.sparse.map": "0,10,x"},
            "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999"},
        }.items()
    ],
    blocks("sparse_of_no_number", pax({"GNU.sparse.size": "many"}) + header("k.png"), cut=True),
    blocks("pax_value_of_12000_bytes", lambda: pax({"comment": "x" * 12_000}) + STORED, K),
    blocks("pax_value_of_8_mb", lambda: pax({"comment": "x" * 8_000_000}) + STORED, cut=True),
    blocks("pax_backtracking", lambda: pax(b"2 " * 8000 + b"=") + STORED, K),
    blocks("pax_digits", lambda: pax(b"1" * 16_000) + STORED, K),
    blocks("pax_length_of_no_end", lambda: pax(b"9" * 5000 + b" path=k.png\n") + header("k.png"), cut=True),
    blocks("pax_length_zero", pax(b"0 path=x\n") + STORED, cut=True),
    blocks("pax_negative_size", pax({"size": "-512"}) + header("k.png", 512) + bytes(512), cut=True),
    blocks("pax_absurd_size", pax({"size": "9" * 30}) + header("k.png", 512) + bytes(512), cut=True),
    blocks("pax_after_pax", lambda: pax({"path": "x"}) * 1000 + STORED, cut=True),
    blocks(
        "pax_global_name",
        pax({"path": "all.png", "size": "3"}, b"g") + STORED,
        K,
    ),
    blocks(
        "gnu_long_name",
        long_name(b"x" * 300 + b".png") + header("k", len(IMAGE)) + padded(IMAGE),
        ("x" * 300, "scored"),
    ),
    blocks("gnu_long_link", long_name(b"x" * 300, b"K") + STORED, K),
    blocks("gnu_long_name_of_4_mb", lambda: long_name(b"x" * 4_000_000) + header("k.png"), cut=True),
    blocks("size_negative", header("k.png", binary(-1024)), cut=True),
    blocks("size_negative_extension", header("k.png", binary(-512), b"x"), cut=True),
    blocks("size_of_2_to_80", header("k.png", binary(2**80)), cut=True),
    blocks("size_of_10_gb", header("k.png", binary(10**10)), ("k", "member_too_large"), cut=True),
    blocks("size_of_500_gb_not_ours", header("k.mp4", binary(500 * 10**9)), ("k", "shard_truncated"), cut=True),
    blocks("size_of_60_mb_not_there", header("k.png", 60_000_000), ("k", "shard_truncated"), cut=True),
    blocks("size_of_no_digits", header("k.png", b"rubbish\0\0\0\0\0"), cut=True),
    # --- tars that break off
    blocks("bad_checksum", header("k.png", len(IMAGE))[:-1] + b"x" + padded(IMAGE), cut=True),
    blocks("rubbish", bytes(range(256)) * 8, cut=True),
    whole("cut_in_header", lambda: GOOD[: GOOD.index(b"after.png") + 100], ("before", "scored"), K, is_complete=False),
    whole(
        "cut_in_data",
        lambda: GOOD[: GOOD.index(b"after.png") + 600],
        ("before", "scored"),
        K,
        ("after", "shard_truncated"),
        is_complete=False,
    ),
    whole(
        "cut_in_padding",
        lambda: GOOD[: GOOD.index(b"after.png") + 512 + len(good("after", 2)[0][1]) + 1],
        ("before", "scored"),
        K,
        ("after", "scored"),
        is_complete=False,
    ),
    whole("without_end", lambda: tar(*good("before", 1), end=False), ("before", "scored"), is_complete=False),
    whole("end_of_one_block", lambda: tar(*good("before", 1), end=False) + bytes(512), ("before", "scored")),
    whole("two_tars_in_a_row", lambda: GOOD + tar(*good("hidden")), ("before", "scored"), K, ("after", "scored")),
    whole("rubbish_after_the_end", lambda: GOOD + b"\xff" * 9000, ("before", "scored"), K, ("after", "scored")),
    whole("only_a_folder", lambda: header("x/", 0, b"5") + bytes(1024)),
    whole("gzip", lambda: gzip.compress(GOOD), ("before", "scored"), K, ("after", "scored"), suffix="tar.gz"),
    whole("gzip_named_tar", lambda: gzip.compress(GOOD), ("before", "scored"), K, ("after", "scored")),
    whole(
        "gzip_in_two_pieces",
        lambda: gzip.compress(GOOD[:5000]) + gzip.compress(GOOD[5000:]),
        ("before", "scored"),
        K,
        ("after", "scored"),
        suffix="tar.gz",
    ),
    whole(
        "gzip_cut",
        lambda: gzip.compress(GOOD)[:-200],
        ("before", "scored"),
        ("k", ""),
        ("after", ""),
        is_complete=False,
        suffix="tar.gz",
    ),
    whole(
        "gzip_of_rubbish",
        lambda: gzip.compress(tar(*good("before", 1), end=False))[:-8] + b"\xff" * 4000,
        ("before", "scored"),
        is_complete=False,
        suffix="tgz",
    ),
    whole(
        "gzip_bomb_of_zeros",
        lambda: gzip_bomb(tar(*good("before", 1), end=False), 10),
        ("before", "scored"),
        suffix="tar.gz",
    ),
    whole(
        "gzip_bomb_of_10_gb",
        lambda: gzip_bomb(tar(*good("before", 1), end=False) + header("k.png", binary(10**10)), 10),
        ("before", "scored"),
        ("k", "member_too_large"),
        is_complete=False,
        suffix="tar.gz",
    ),
    whole(
        "gzip_bomb_of_members",
        lambda: (
            gzip.compress(tar(*good("before", 1), end=False))
            + gzip.compress(tar(("x.mp4", bytes(10**7)), end=False), 9) * 50
        ),
        ("before", "scored"),
        ("x", "shard_truncated"),
        is_complete=False,
        suffix="tar.gz",
    ),
    # --- what is no shard
    whole("zero_byte_file", lambda: b"", is_refused=True),
    whole("tar_of_nothing", lambda: bytes(10_240), is_refused=True),
    whole("text_file", lambda: b"not a tar" * 200, is_refused=True),
    whole("gzip_of_text", lambda: gzip.compress(b"not a tar" * 200), is_refused=True, suffix="tar.gz"),
    whole("zip_file", lambda: zipped({"k.png": IMAGE}), is_refused=True),
    whole("first_size_negative", lambda: header("k.png", binary(-512)) + bytes(1024), is_refused=True),
]


# ------------------------------------------------------------------------------------------------ other files


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@dataclass(frozen=True)
class FileCase:
    """A file, or a folder of them, that a job opens; `kind` says with what (test_hostile.py)."""

    kind: str
    name: str
    tamper: Callable[[Path], None]
    """Given a folder with a good one of its kind (an empty folder for a checkpoint), makes it hostile."""


def put(name: str, content: bytes | str | Callable[[], bytes]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        made = content() if callable(content) else content
        (folder / name).write_bytes(made.encode() if isinstance(made, str) else made)

    return tamper


def change(name: str, *keys: str, to: Any) -> Callable[[Path], None]:
    """Set one value in a JSON file; an Ellipsis removes it."""

    def tamper(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        if to is ...:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = to
        (folder / name).write_text(json.dumps(content))

    return tamper


def retensor(name: str, alter: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of a safetensors file."""

    def tamper(folder: Path) -> None:
        from safetensors.torch import load_file

        state = load_file(folder / name)
        alter(state)
        save_file(state, folder / name)

    return tamper


def first(state: dict[str, torch.Tensor]) -> str:
    return min(name for name, tensor in state.items() if tensor.is_floating_point() and tensor.ndim)


def set_first(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: state[first(state)].view(-1)[:1].fill_(value)


def safetensors(description: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [*offsets]}


def saved_by_torch(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def torch_archive(content: Any, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> bytes:
    """What torch.save writes, packed again with other records (`data_0` stands for data/0)."""
    with zipfile.ZipFile(io.BytesIO(saved_by_torch(content))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, record in changed.items():
        [full] = [other for other in members if other.endswith("/" + name.replace("_", "/"))]
        members[full] = record
    return zipped(members, compression)


def torchscript() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Identity()), buffer)
    return buffer.getvalue()


def expanded() -> bytes:
    return saved_by_torch({"weight": torch.zeros(1).expand(10**6, 10**6)})


DEEP = "[" * 200_000
NOT_JSON = {
    "empty": "",
    "cut": '{"a": ',
    "a_list": "[1, 2]",
    "too_deep": '{"a": ' + DEEP,
    "not_utf_8": b'{"a": "\xff"}',
    "not_a_number": '{"a": NaN}',
    "a_number_of_9000_digits": '{"a": ' + "9" * 9000 + "}",
    "binary": PICKLE,
}


LAUGHS = ["a0: &a0 [ha, ha]", *[f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40)]]
YAML = {
    "laughs": "\n".join([*LAUGHS, "output: *a39"]),
    "that_calls": f"output: !!python/object/apply:os.mkdir [{SENTINEL}]",
    "too_deep": "output: " + "[" * 5000,
    "day_45": "output: 2024-13-45",
    "not_utf_8": b"output: \xff",
    "number_of_9000_digits": "output: " + "9" * 9000,
}


def not_json(kind: str, file: str) -> list[FileCase]:
    return [FileCase(kind, f"{file}_{name}".replace("/", "_"), put(file, text)) for name, text in NOT_JSON.items()]


CLIP_JSON, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
DECODER_WEIGHTS = "decoder.safetensors"


def checkpoint(name: str, content: bytes | Callable[[], bytes]) -> FileCase:
    """Its suffix decides who reads it; the name begins with it."""
    return FileCase("checkpoint", name, put(f"weights.{name.split('_')[0]}", content))


def config(name: str, *keys: str, to: Any) -> FileCase:
    return FileCase("victim", f"config_{name}", change(CLIP_JSON, *keys, to=to))


def shape(name: str, *keys: str, to: Any) -> FileCase:
    return FileCase("decoder", f"json_{name}", change("decoder.json", *keys, to=to))


def manifest(name: str, *keys: str, to: Any) -> FileCase:
    return FileCase("manifest", f"json_{name}", change("manifest.json", *keys, to=to))


def reparquet(pattern: str, alter: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        path = min(folder.glob(pattern))
        pq.write_table(alter(pq.read_table(path)), path)

    return tamper


def spoil(pattern: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: min(folder.glob(pattern)).write_bytes(content)


FILES: list[FileCase] = [
    # --- checkpoints
    checkpoint("pt_pickle", PICKLE),
    checkpoint("pt_pickle_in_an_archive", lambda: saved_by_torch({"state_dict": Bomb()})),
    checkpoint("pt_pickle_of_old_torch", lambda: saved_by_torch({"a": Bomb()}, _use_new_zipfile_serialization=False)),
    checkpoint("pt_torchscript", torchscript),
    checkpoint("pt_object_array", object_array),
    checkpoint("pt_empty", b""),
    checkpoint("pt_text", b"<html>404</html>"),
    checkpoint("pt_image", PNG),
    checkpoint("pt_cut", lambda: saved_by_torch({"a": torch.zeros(999)})[:-500]),
    checkpoint("pt_expanded_to_4_terabytes", expanded),
    checkpoint("pt_zip_bomb", lambda: torch_archive({"a": torch.zeros(10**7)}, zipfile.ZIP_DEFLATED)),
    checkpoint("pt_record_shorter_than_its_tensor", lambda: torch_archive({"a": torch.zeros(10**6)}, data_0=bytes(8))),
    checkpoint("pt_sparse_tensor", lambda: saved_by_torch({"a": torch.eye(3).to_sparse()})),
    checkpoint("pt_tensor_without_data", lambda: saved_by_torch({"a": torch.empty(10**9, device="meta")})),
    checkpoint("pt_names_that_are_numbers", lambda: saved_by_torch({1: torch.zeros(1)})),
    checkpoint("pt_list", lambda: saved_by_torch([torch.zeros(1)])),
    checkpoint("pt_numbers", lambda: saved_by_torch({"a": 1, "b": "x"})),
    checkpoint("safetensors_pickle", PICKLE),
    checkpoint("safetensors_empty", b""),
    checkpoint("safetensors_header_of_exabytes", safetensors({}, length=2**60)),
    checkpoint("safetensors_header_longer_than_file", safetensors({}, length=10_000)),
    checkpoint("safetensors_header_no_json", safetensors(b"rubbish ")),
    checkpoint("safetensors_header_too_deep", safetensors(b'{"a":' + b"[" * 200_000)),
    checkpoint(
        "safetensors_overlapping", safetensors({"a": entry("F32", [16], 0, 64), "b": entry("F32", [8], 32, 64)})
    ),
    checkpoint("safetensors_behind_the_end", safetensors({"a": entry("F32", [10**12], 0, 4 * 10**12)})),
    checkpoint("safetensors_shape_overflows", safetensors({"a": entry("F32", [2**40, 2**40], 0, 64)})),
    checkpoint("safetensors_shape_negative", safetensors({"a": entry("F32", [-16], 0, 64)})),
    checkpoint("safetensors_unknown_dtype", safetensors({"a": entry("PICKLE", [16], 0, 64)})),
    # --- an exported CLIP as a victim
    *not_json("victim", CLIP_JSON),
    config("without_towers", "model_cfg", to={}),
    config("tower_is_a_list", "model_cfg", "vision_cfg", to=[1]),
    config("image_of_a_million_px", "model_cfg", "vision_cfg", "image_size", to=1_000_000),
    config("image_size_in_words", "model_cfg", "vision_cfg", "image_size", to="large"),
    config("width_of_a_million", "model_cfg", "text_cfg", "width", to=1_000_000),
    config("width_negative", "model_cfg", "text_cfg", "width", to=-16),
    config("vocabulary_of_10_to_12", "model_cfg", "text_cfg", "vocab_size", to=10**12),
    config("million_layers", "model_cfg", "text_cfg", "layers", to=10**6),
    config("no_heads", "model_cfg", "text_cfg", "heads", to=0),
    config("context_of_10_to_9", "model_cfg", "text_cfg", "context_length", to=10**9),
    config("embedding_in_words", "model_cfg", "embed_dim", to="wide"),
    config("embedding_of_10_to_30", "model_cfg", "embed_dim", to=10**30),
    config("unknown_setting", "model_cfg", "vision_cfg", "exec", to="import os"),
    config("statistics_of_two", "preprocess_cfg", "mean", to=[0.5, 0.5]),
    config("statistics_in_words", "preprocess_cfg", "std", to="wide"),
    config("statistics_of_zero", "preprocess_cfg", "std", to=[0, 0, 0]),
    config("preprocessing_is_a_list", "preprocess_cfg", to=[]),
    config("tower_from_the_hub", "model_cfg", "vision_cfg", to={"timm_model_name": "hf-hub:evil/tower"}),
    config("tower_from_a_folder", "model_cfg", "vision_cfg", to={"timm_model_name": "local-dir:/tmp"}),
    config(
        "tokenizer_with_code",
        "model_cfg",
        "text_cfg",
        "tokenizer_kwargs",
        to={"trust_remote_code": True},
    ),
    config("tokenizer_of_other_file", "model_cfg", "text_cfg", "tokenizer_kwargs", to={"bpe_path": "/etc/passwd"}),
    config("tokenizer_options_in_words", "model_cfg", "text_cfg", "tokenizer_kwargs", to="all"),
    FileCase("victim", "weights_nan", retensor(CLIP_WEIGHTS, set_first(float("nan")))),
    FileCase("victim", "weights_infinite", retensor(CLIP_WEIGHTS, set_first(float("inf")))),
    FileCase("victim", "weights_integers", retensor(CLIP_WEIGHTS, lambda s: s.update({first(s): s[first(s)].long()}))),
    FileCase("victim", "weights_missing", retensor(CLIP_WEIGHTS, lambda s: s.pop(first(s)))),
    FileCase(
        "victim", "weights_scalar", retensor(CLIP_WEIGHTS, lambda s: s.update(positional_embedding=torch.tensor(1.0)))
    ),
    FileCase(
        "victim",
        "weights_no_positions",
        retensor(CLIP_WEIGHTS, lambda s: s.update(positional_embedding=torch.zeros(0, 16))),
    ),
    FileCase("victim", "weights_pickle", put(CLIP_WEIGHTS, PICKLE)),
    FileCase("victim", "weights_gone", lambda folder: (folder / CLIP_WEIGHTS).unlink()),
    # --- an exported decoder
    *not_json("decoder", "decoder.json"),
    shape("patch_negative", "shape", "patch_px", to=-4),
    shape("width_of_10_to_7", "shape", "width", to=10**7),
    shape("width_of_10_to_30", "shape", "width", to=2 * 10**30),
    shape("million_blocks", "shape", "encoder_depth", to=10**6),
    shape("no_heads", "shape", "heads", to=0),
    shape("image_of_10_to_6_px", "image_size", to=10**6),
    shape("image_of_10_to_30_px", "image_size", to=10**30),
    shape("image_negative", "image_size", to=-32),
    shape("embedding_of_10_to_12", "embedding_dim", to=10**12),
    shape("embedding_negative", "embedding_dim", to=-16),
    shape("embedding_infinite_text", "embedding_dim", to="inf"),
    shape("without_shape", "shape", to=...),
    shape("unknown_setting", "shape", "code", to="import os"),
    FileCase("decoder", "weights_nan", retensor(DECODER_WEIGHTS, set_first(float("nan")))),
    FileCase(
        "decoder", "weights_integers", retensor(DECODER_WEIGHTS, lambda s: s.update({first(s): s[first(s)].long()}))
    ),
    FileCase("decoder", "weights_unexpected", retensor(DECODER_WEIGHTS, lambda s: s.update(more=torch.zeros(1)))),
    FileCase("decoder", "weights_pickle", put(DECODER_WEIGHTS, PICKLE)),
    FileCase("decoder", "weights_torchscript", put(DECODER_WEIGHTS, torchscript)),
    # --- a manifest
    *not_json("manifest", "manifest.json"),
    manifest("of_another_version", "manifest", to=2),
    manifest("without_shards", "shards", to=...),
    manifest("shard_elsewhere", "shards", to=["../../../etc/secrets"]),
    manifest("shards_are_numbers", "shards", to=[1]),
    manifest("columns_in_words", "score_columns", to="dede"),
    manifest("column_that_is_not_there", "score_columns", to=["dede", "rubbish"]),
    manifest("victim_is_a_list", "victim", to=[]),
    FileCase("manifest", "parquet_cut", spoil("manifest/*.parquet", b"PAR1" + bytes(20))),
    FileCase("manifest", "parquet_pickle", spoil("manifest/*.parquet", PICKLE)),
    FileCase("manifest", "parquet_gone", lambda folder: min(folder.glob("manifest/*.parquet")).unlink()),
    FileCase(
        "manifest", "parquet_without_ids", reparquet("manifest/*.parquet", lambda t: t.drop_columns(["sample_id"]))
    ),
    FileCase(
        "manifest",
        "parquet_flags_are_words",
        reparquet(
            "manifest/*.parquet",
            lambda t: t.set_column(t.column_names.index("flagged"), "flagged", pa.array(["no"] * len(t))),
        ),
    ),
    # --- a finished pass of scores or embeddings
    *not_json("pass", "pass.json"),
    *not_json("pass", "parts/a.tar/end.json"),
    FileCase("pass", "shards_are_a_list", change("pass.json", "shards", to=[])),
    FileCase("pass", "chunks_10_to_12", change("parts/a.tar/end.json", "num_chunks", to="1000000000000")),
    FileCase("pass", "chunks_negative", change("parts/a.tar/end.json", "num_chunks", to=-1)),
    FileCase("pass", "chunks_missing", change("parts/a.tar/end.json", "num_chunks", to=...)),
    FileCase("pass", "parquet_cut", spoil("parts/a.tar/*.parquet", b"PAR1" + bytes(20))),
    FileCase("pass", "parquet_pickle", spoil("parts/a.tar/*.parquet", PICKLE)),
    FileCase("pass", "parquet_without_errors", reparquet("parts/a.tar/*.parquet", lambda t: t.drop_columns(["error"]))),
    # --- classes.json, configs, run.json, truth.parquet
    *not_json("classes", "classes.json"),
    FileCase(
        "classes", "names_with_lone_surrogate", put("classes.json", '{"names": ["\\ud800"], "templates": ["{}"]}')
    ),
    FileCase("classes", "names_are_numbers", put("classes.json", '{"names": [1], "templates": ["{}"]}')),
    FileCase("classes", "more_than_classes", put("classes.json", '{"names": [], "templates": [], "code": "x"}')),
    *[FileCase("config", name, put("run.yaml", text)) for name, text in YAML.items()],
    *not_json("run", "run.json"),
    FileCase("run", "of_other_settings", change("run.json", "settings", to={"output": "/etc"})),
    FileCase("run", "settings_too_many", change("run.json", "settings", to={str(i): i for i in range(1000)})),
    FileCase("run", "result_is_a_list", change("run.json", "result", to=[1])),
    FileCase("truth", "pickle", put("truth.parquet", PICKLE)),
    FileCase("truth", "cut", put("truth.parquet", b"PAR1" + bytes(20))),
    FileCase(
        "truth", "of_other_columns", lambda folder: pq.write_table(pa.table({"a": [1]}), folder / "truth.parquet")
    ),
]
