"""Untrusted bytes to uint8 RGB pixels, and back.

    decode_image(content, limits) -> uint8 (H, W, 3), upright; with `size_px` a square of that side
    encode_image(image_HWC, "png") -> bytes
    square(content, sample_id, size_px, limits, trigger)    decode, stamp, make square: how pictures are evaluated
    to_unit_range(image_BHWC)                               what encoders take: float32 (B, 3, H, W) in [0, 1]

Whatever a file says, decoding it costs bounded time and memory: only `IMAGE_FORMATS` are tried, and the number of
pixels, JPEG scans and bytes of EXIF data is checked before anything is decoded; a PNG's notes and colour profile are
stepped over. What cannot be used raises `BadSample`
with its reason. Processes that only read shards import this module, so it imports no torch.
"""

from __future__ import annotations

import io
import warnings
import zlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from dede_ray.data.shards import BadSample, Limits

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # what Pillow may try, whatever the suffix says
MAX_EXIF_BYTES = 65_536  # what a JPEG segment holds; Pillow before 13 unfolds EXIF data to some thousand times its size
MAX_CHUNKS = 100_000  # of a PNG that are looked at
MAX_SCANS = 32  # passes over all pixels that a JPEG of `max_pixels` may ask for

# Pillow warns about damaged metadata with numbers from the file: a hostile corpus would fill memory and log with them.
warnings.filterwarnings("ignore", module=r"PIL\.")


# ------------------------------------------------------------------------------------------------------ bytes to pixels


def decode_image(
    content: bytes, limits: Limits, size_px: int | None = None, enough_px: int | None = None
) -> np.ndarray:
    """Decode an untrusted image to uint8 HWC RGB, upright, at its own size or as a square of `size_px`.

    To a square: the shorter side is resized to `size_px` (bicubic, antialiased), then the centre is cropped;
    an image of that size already passes untouched. CMYK, palette, 16-bit and grey images become RGB, an alpha
    channel is dropped, of an animation the first frame is taken, EXIF rotation is applied where it can be read.
    Takes at most 32 bytes per pixel of `max_pixels` and half a GB, whatever the file says.

    Args:
        content: the encoded image.
        limits: bounds on it.
        size_px: side of the square; None keeps the image's own shape.
        enough_px: a JPEG may be decoded at half, a quarter ... of its size, which is faster, where both sides stay at
            least twice this long; by default `size_px`, or never.

    Raises:
        BadSample: `image_unreadable`, `image_truncated` or `image_too_large`.
    """
    try:
        with Image.open(io.BytesIO(without_notes(content)), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > limits.max_pixels or _is_painted_over(content, width * height, limits):
                raise BadSample("image_too_large")
            if min(width, height) < 1 or image.info.get("compression") in _BMP_RLE:
                raise BadSample("image_unreadable")
            enough_px = enough_px or size_px
            if enough_px is not None:
                image.draft("RGB", (2 * enough_px, 2 * enough_px))
            image.load()
            turn = _TURNS.get(orientation(image))
            rgb: Image.Image = image if turn is None else image.transpose(turn)
            if rgb.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to 255, not scale it
                rgb = Image.fromarray((np.asarray(rgb) >> 8).clip(0, 255).astype(np.uint8))
            if rgb.mode != "RGB":
                rgb = rgb.convert("RGB")
            return np.asarray(rgb if size_px is None else _square(rgb, size_px))
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample("image_too_large") from None
    except Exception as error:  # Pillow raises whatever its decoders meet: OSError, SyntaxError, struct.error ...
        raise BadSample("image_truncated" if "truncated" in str(error).lower() else "image_unreadable") from None


def without_notes(content: bytes) -> bytes:
    """Hide from Pillow what of a JPEG or PNG is no picture and might cost too much."""
    if content.startswith(_PNG) and any(kind in content for kind in _PNG_NOTES):
        return _png_without_notes(content)
    return _with_one_exif(content)


def _png_without_notes(content: bytes) -> bytes:
    """A PNG without its texts, colour profile and large EXIF data; what says how it is turned stays.

    Pillow refuses the whole image where a text or profile unfolds to more than 1 MB, or texts to more than 64.
    """
    kept, start = [_PNG], len(_PNG)
    seen: set[bytes] = set()
    for _ in range(MAX_CHUNKS):
        size, kind = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8]
        end = start + 12 + size
        if len(kind) < 4 or end > len(content):
            break
        name = kind if kind == b"eXIf" else content[start + 8 : start + 88].partition(b"\0")[0]
        if kind not in _PNG_NOTES or (name not in seen and _says_turn(kind, name, content[start + 8 : end - 4])):
            kept.append(content[start:end])
            seen.add(name)
        start = end
        if kind == b"IEND":
            break
    return b"".join([*kept, content[start:]])


def _says_turn(kind: bytes, name: bytes, data: bytes) -> bool:
    """Whether a chunk with notes is small, and might hold an orientation."""
    if len(data) > MAX_EXIF_BYTES:
        return False
    if kind == b"eXIf" or (kind == b"tEXt" and name in _ABOUT_TURN):
        return True
    if name not in _ABOUT_TURN or kind not in (b"zTXt", b"iTXt"):
        return False
    packed = data[len(name) + 2 :]
    if kind == b"iTXt":
        if data[len(name) + 1 : len(name) + 2] != b"\1":  # as it is
            return True
        packed = packed[1:].split(b"\0", 2)[-1]
    try:
        unfold = zlib.decompressobj()
        unfold.decompress(packed, 2 * MAX_EXIF_BYTES)
        return not unfold.unconsumed_tail
    except zlib.error:
        return False


def _with_one_exif(content: bytes) -> bytes:
    """Hide all EXIF data of a JPEG but the first.

    Pillow joins the EXIF segments of a JPEG as it opens it, and before version 13 copies the whole for each of their
    entries: 64 MB could become terabytes. More than one is rare, and belongs to further images in the file.
    """
    if not content.startswith(b"\xff\xd8") or (first := content.find(_EXIF)) < 0:
        return content
    rest = first + len(_EXIF)
    if content.find(_EXIF, rest) < 0:
        return content
    return content[:rest] + content[rest:].replace(_EXIF, b"Exif\0_")


def orientation(image: Image.Image) -> Any:
    """EXIF's orientation; damaged EXIF data say nothing."""
    if any(len(image.info.get(name) or "") > MAX_EXIF_BYTES for name in ("exif", "Raw profile type exif")):
        return None
    try:
        return image.getexif().get(0x0112)
    except Exception:  # Pillow raises whatever damage makes it meet: SyntaxError, struct.error, TypeError ...
        return None


_BMP_RLE = (1, 2)  # compressed bitmaps: rare, and Pillow decodes them byte by byte in Python
_EXIF = b"Exif\0\0"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf")
_ABOUT_TURN = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _is_painted_over(content: bytes, num_pixels: int, limits: Limits) -> bool:
    """Whether a JPEG has so many scans that decoding it takes minutes: each of 10 bytes may go over all its pixels."""
    allowed = MAX_SCANS * limits.max_pixels
    if not content.startswith(b"\xff\xd8") or num_pixels * len(content) // 10 <= allowed:
        return False
    return num_pixels * content.count(b"\xff\xda") > allowed


# ------------------------------------------------------------------------------------------- squares, and back to bytes


def to_square(image_HWC: np.ndarray, size_px: int) -> np.ndarray:
    """Resize and crop a decoded image as `decode_image` does, for jobs that change it between the two."""
    return np.asarray(_square(Image.fromarray(image_HWC), size_px))


def _square(image: Image.Image, size_px: int) -> Image.Image:
    width, height = image.size
    if (width, height) == (size_px, size_px):
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box)


def encode_image(image_HWC: np.ndarray, suffix: str, quality: int = 95) -> bytes:
    """Encode uint8 HWC RGB by suffix: `png` and `bmp` are exact, `jpg`, its like (4:2:0) and `webp` take `quality`."""
    buffer = io.BytesIO()
    image = Image.fromarray(image_HWC)
    if suffix == "png":
        image.save(buffer, "PNG", compress_level=6)
    elif suffix == "bmp":
        image.save(buffer, "BMP")
    elif suffix == "webp":
        image.save(buffer, "WEBP", quality=quality)
    else:
        assert suffix in ("jpg", "jpeg", "jpe", "jfif"), suffix
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ pictures for encoders


def to_unit_range(image_BHWC: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [0, 1], stored channels last."""
    return image_BHWC.permute(0, 3, 1, 2).float() / 255


class Stamp(Protocol):
    """What every trigger can do."""

    def stamp(self, image_HWC: np.ndarray, sample_id: str = "") -> np.ndarray: ...


def square(content: bytes, sample_id: str, size_px: int, limits: Limits, trigger: Stamp | None = None) -> np.ndarray:
    """Decode, stamp or not, then bring to size: one path, so that the stamp is the only difference.

    A trigger with `image_px` equal to `size_px` is stamped on what a clean image ends as.

    Returns:
        uint8 (size_px, size_px, 3).

    Raises:
        BadSample: the image cannot be decoded.
        Mistake: the trigger does not fit it.
    """
    image_HWC = decode_image(content, limits)
    if trigger is not None:
        image_HWC = trigger.stamp(image_HWC, sample_id)
    return to_square(image_HWC, size_px)
