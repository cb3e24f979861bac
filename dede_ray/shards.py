"""WebDataset shards: listing, reading and writing tars that strangers made.

A shard is a tar whose neighbouring members form samples: `000042.jpg`, `000042.txt`, `000042.cls` are the image,
caption and label of key `000042` (the name up to the first dot after the last slash). The unit in which samples
travel, are scored and are recovered is the *chunk*: `chunk_size` consecutive samples of one shard.

Nothing from a shard is ever unpickled or executed: members are decoded by the explicit decoders below, by
suffix, and every other member is ignored. What cannot be used becomes an error with a reason from `REASONS`;
it keeps its place, so that every sample of a shard appears exactly once in whatever is written about it.

A shard costs no more than it weighs: time and memory are bounded by the bytes on disk (a gzipped one may unfold to
`MAX_UNFOLDING` times its own), an image by `max_pixels`, a tar header by `MAX_EXTENSION_BYTES`.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import os
import re
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast, get_args
from typing import Literal as L

import numpy as np
from PIL import Image
from pydantic import Field

from dede_ray.config import Config, Mistake
from dede_ray.store import ObjectPath

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # what Pillow may try, whatever the suffix says
CAPTION_SUFFIXES = ("txt", "caption")
LABEL_SUFFIXES = ("cls", "label")

MAX_MEMBER_SPAN = 2**40  # a member that claims more bytes is rubbish; no file system would let us step over it
MAX_UNFOLDING = 50  # where a gzipped shard exceeds 64 MB and this many times its own bytes, it ends, as rubbish
MAX_EXTENSION_BYTES = 16_384  # a member's long name or pax header: tarfile needs the square of it, in time and memory
MAX_EXTENSIONS = 8  # such headers before one member
MAX_EXIF_BYTES = 65_536  # what a JPEG segment holds; Pillow before 13 unfolds EXIF data to some thousand times its size
MAX_SCANS = 32  # passes over all pixels that a JPEG of `max_pixels` may ask for

# Pillow warns about damaged metadata with numbers from the file: a hostile corpus would fill memory and log with them.
warnings.filterwarnings("ignore", module=r"PIL\.")

Reason = L[
    "no_image",  # no member with an image suffix
    "image_unreadable",  # not one of IMAGE_FORMATS, or damaged
    "image_truncated",  # the image data ends early
    "image_too_large",  # more pixels than `max_pixels`, or a JPEG that paints them `MAX_SCANS` times
    "member_too_large",  # a member longer than `max_member_bytes`, or copied members that are so together
    "member_sparse",  # a member stored with holes (tar -S), which might unfold to terabytes
    "caption_missing",  # no caption where training needs one
    "caption_unreadable",  # not UTF-8
    "caption_too_long",  # longer than `max_caption_chars`
    "label_unreadable",  # not an integer of at most 31 bits in plain digits
    "duplicate_key",  # the key already stood in this shard, or one of its members comes twice
    "shard_truncated",  # the shard ends inside this sample
    "process_died",  # decoding it, or computing something of it, ended the process that did
    "not_finite",  # what was computed of it, a score or an embedding, is not a number
]
REASONS: tuple[Reason, ...] = get_args(Reason)


class BadSample(Exception):
    """One sample cannot be used; carries the reason that its row will show."""

    def __init__(self, reason: Reason):
        super().__init__(reason)
        self.reason = reason


class Limits(Config):
    """Bounds on what one sample of an untrusted shard may cost."""

    max_pixels: int = Field(64_000_000, gt=0)
    """Largest image, in pixels, checked before anything is decoded."""
    max_member_bytes: int = Field(64_000_000, gt=0)
    """Largest member that is read into memory."""
    max_caption_chars: int = Field(10_000, gt=0)
    """Longest caption."""


@dataclass(frozen=True)
class Shard:
    """One tar: `name` is its file name, the first half of its samples' ids."""

    name: str
    url: str
    num_bytes: int


@dataclass
class Sample:
    """One sample as it stands in the shard, not yet decoded; `error` says why it cannot be used."""

    key: str
    index: int
    image: bytes | None = None
    image_suffix: str = ""
    caption: str | None = None
    label: int | None = None
    error: Reason | None = None
    others: dict[str, bytes] = field(default_factory=dict)
    others_bytes: int = field(default=0, repr=False, compare=False)

    def content_hash(self) -> str:
        """SHA-256 of the encoded image bytes, hexadecimal; empty without an image."""
        return hashlib.sha256(self.image).hexdigest() if self.image is not None else ""


def sample_id(shard_name: str, key: str) -> str:
    """`"<shard file name>/<WebDataset key>"`: unique and stable, the same in every file we write."""
    return f"{shard_name}/{key}"


# ---------------------------------------------------------------------------------------------- listing


def list_shards(patterns: str | Sequence[str]) -> list[Shard]:
    """Expand folders, globs, `{00000..00004}` ranges and URLs to shards, sorted by name.

    Args:
        patterns: local paths, or URLs that pyarrow opens (`s3://bucket/prefix/train-00000.tar`).

    Raises:
        Mistake: nothing found, two shards of one file name (their sample ids would clash), or a file that
            cannot be opened as a tar.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise Mistake("the list of shards is empty; name .tar files, a folder of them, or a pattern")
    shards: list[Shard] = []
    for pattern in patterns:
        found = find_shards(pattern)
        if not found:
            raise Mistake(
                f"no shards at {pattern} (looked from {Path.cwd()}); expected .tar or .tar.gz files, "
                "a folder of them, or a pattern such as shards/train-*.tar"
            )
        shards += found
    shards = in_order(shards)
    unreadable = [f"{shard.url}: {problem}" for shard in shards if (problem := _why_unreadable(shard))]
    if unreadable:
        listing = "\n  ".join(unreadable[:10])
        raise Mistake(
            f"{len(unreadable)} of {len(shards)} shards cannot be read as tar:\n  {listing}\n"
            "repair or remove them, or name the readable ones"
        )
    return shards


def find_shards(pattern: str) -> list[Shard]:
    """Expand one pattern as `list_shards` does; nothing is opened, and perhaps nothing found."""
    return [shard for part in _expand_braces(pattern) for shard in _list_one(part)]


def in_order(shards: Iterable[Shard]) -> list[Shard]:
    """Sort shards by the ids of their samples.

    Raises:
        Mistake: two have one name.
    """
    ordered = sorted(shards, key=lambda shard: shard.name + "/")
    for one, other in itertools.pairwise(ordered):
        if one.name == other.name:
            raise Mistake(
                f"two shards are named {one.name}: {one.url} and {other.url}; sample ids are "
                "<shard name>/<key>, so rename one or handle them in two runs"
            )
    return ordered


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [pattern[: match.start()] + f"{n:0{len(first)}d}" + pattern[match.end() :] for n in numbers]


def _list_one(pattern: str) -> list[Shard]:
    if "://" in pattern:
        there = ObjectPath(pattern)
        if glob.has_magic(there.name):
            found = list(there.parent.glob(there.name))
        else:
            found = list(there.iterdir()) if there.is_dir() else [there]
        files = [(str(path), path.num_bytes()) for path in found if path.is_file()]
    else:
        if os.path.isdir(pattern):
            pattern = os.path.join(glob.escape(pattern), "*")
        paths = [path for path in glob.glob(pattern) if os.path.isfile(path)]
        files = [(os.path.abspath(path), os.path.getsize(path)) for path in paths]
    return [
        Shard(name, url, size)
        for url, size in files
        if (name := url.partition("?")[0].rpartition("/")[2]).endswith((".tar", ".tar.gz", ".tgz"))
    ]


def _why_unreadable(shard: Shard) -> str | None:
    """Look at the first header only; what is wrong further in is for the reader to count."""
    try:
        with open_shard(shard) as stream:
            return None if open_tar(stream).next() is not None else "holds no members"
    except (tarfile.TarError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def open_shard(shard: Shard) -> IO[bytes]:
    """Open a shard for reading from its start, local or remote."""
    if "://" not in shard.url:
        return open(shard.url, "rb")
    return ObjectPath(shard.url).open()


# ---------------------------------------------------------------------------------------------- reading


class Tar(tarfile.TarFile):
    """A tar of a stranger's, read front to back: forgets the members behind it, and fails in one way, by ReadError.

    `is_closed`: whether its end was a real one; `tarfile` takes a file that stops without the closing zero block for
    a complete one.
    """

    is_closed = False
    num_extensions = 0

    def next(self) -> tarfile.TarInfo | None:
        try:
            member = super().next()
        except OSError as error:
            raise _of_shard(error) from None
        except (ValueError, LookupError, ArithmeticError, struct.error) as error:  # whatever a damaged header gives
            raise tarfile.ReadError(f"bad header: {error!r}") from None
        self.members.clear()  # type: ignore[attr-defined]
        return member

    def read(self, member: tarfile.TarInfo) -> bytes:
        """The content of a member that is not sparse; ReadError where the data end inside."""
        stream: Any = self.fileobj
        try:
            stream.seek(member.offset_data)
            content: bytes = stream.read(member.size)
        except OSError as error:
            raise _of_shard(error) from None
        if len(content) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        return content

    @property
    def is_gzipped(self) -> bool:
        return isinstance(self.fileobj, _Unfolding)


def _of_shard(error: OSError) -> Exception:
    """What to raise: the error itself where it is the disk's or the network's, not the shard's."""
    return error if error.errno is not None else tarfile.ReadError(str(error))


def open_tar(stream: IO[bytes], tap: Callable[[Any], Any] = lambda source: source) -> Tar:
    """Open a tar, plain or gzipped, at the stream's place.

    Args:
        stream: can seek back what was read of it first.
        tap: gives what stands between the tar and its unfolded bytes.

    Raises:
        tarfile.ReadError: something else begins there.
    """
    start = stream.read(tarfile.BLOCKSIZE)
    stream.seek(-len(start), os.SEEK_CUR)
    is_gzipped = False
    if start.startswith(b"\x1f\x8b"):  # as a name may, too
        try:
            tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
        except tarfile.HeaderError:  # type: ignore[attr-defined]
            is_gzipped = True
    source: Any = _Unfolding(stream) if is_gzipped else stream
    return Tar(fileobj=tap(source), tarinfo=TarHeader, encoding="utf-8", errors="surrogateescape")


class TarHeader(tarfile.TarInfo):
    """A tar header that asks for no more than a bounded number of bytes, and never to go back.

    Global pax headers are stepped over: what a member is must not depend on where reading began.
    """

    @classmethod
    def fromtarfile(cls, tar: Any) -> TarHeader:
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.is_closed = True
            raise
        if not 0 <= member.size <= MAX_MEMBER_SPAN:
            raise tarfile.ReadError(f"bad header: a member of {member.size} bytes")
        return member  # type: ignore[return-value]

    def _proc_member(self, tar: Any) -> Any:
        if self.type not in _EXTENSIONS:
            tar.num_extensions = 0
            return super()._proc_member(tar)  # type: ignore[misc]
        tar.num_extensions += 1
        if not 0 <= self.size <= MAX_EXTENSION_BYTES or tar.num_extensions > MAX_EXTENSIONS:
            raise tarfile.ReadError(f"bad header: {tar.num_extensions}. extension, {self.size:,} bytes")
        if self.type != tarfile.XGLTYPE:
            return super()._proc_member(tar)  # type: ignore[misc]
        tar.fileobj.read(self._block(self.size))  # type: ignore[attr-defined]
        try:
            return self.fromtarfile(tar)
        except tarfile.HeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None

    def _proc_sparse(self, tar: Any) -> TarHeader:
        """Step over the map of a file with holes."""
        _, is_extended, _ = self._sparse_structs  # type: ignore[attr-defined]
        while is_extended:
            block = tar.fileobj.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("unexpected end of data")
            is_extended = block[504]
        self.offset_data = tar.fileobj.tell()
        tar.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        self._mark_sparse(self)
        return self

    def _mark_sparse(self, member: Any, *_: Any) -> None:
        member.sparse = []

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _mark_sparse


_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Unfolding:
    """The content of a gzipped stream, front to back; a cut simply ends it, rubbish and bombs raise ReadError."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self._start = stream, stream.tell()
        self._inflate, self._pending = zlib.decompressobj(31), b""
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("bad header: points backwards")
        while position > self._position and self.read(min(position - self._position, 1 << 20)):
            pass

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        missing = size
        while missing > 0:
            if self._inflate.eof:  # gzip files may stand one after the other
                self._inflate, self._pending = zlib.decompressobj(31), self._inflate.unused_data
            folded = self._pending or self._stream.read(1 << 14)
            if not folded:
                break
            try:
                parts.append(self._inflate.decompress(folded, missing))
            except zlib.error as error:
                if not any(parts):
                    raise tarfile.ReadError(f"bad gzip data: {error}") from None
                self._pending = folded  # for the next call to fail on
                break
            self._pending = self._inflate.unconsumed_tail
            missing -= len(parts[-1])
        content = b"".join(parts)
        self._position += len(content)
        if self._position > max(64_000_000, MAX_UNFOLDING * (self._stream.tell() - self._start)):
            raise tarfile.ReadError(f"gzip data unfold to more than {MAX_UNFOLDING} times their size")
        return content


@dataclass
class ShardEnd:
    """What a whole reading of a shard found: its number of samples, and whether the tar was complete."""

    num_samples: int = 0
    is_complete: bool = False


def iter_samples(
    stream: IO[bytes],
    limits: Limits,
    *,
    end: ShardEnd | None = None,
    keep_others: bool = False,
) -> Iterator[Sample]:
    """Yield the samples of a tar in their order, bad ones included.

    Args:
        stream: the tar, plain or gzipped.
        limits: bounds on one sample.
        end: filled in when the tar has been read to its end.
        keep_others: keep the bytes of members we do not decode, for jobs that copy samples.
    """
    end = end if end is not None else ShardEnd()
    seen: set[bytes] = set()
    current: Sample | None = None
    suffixes: set[str] = set()
    index = 0
    try:
        tar = open_tar(stream)
        for member in tar:
            if not member.isfile():
                continue
            key, suffix = split_name(member.name)
            if current is None or key != current.key:
                if current is not None:
                    yield _finish(current, seen)
                current, suffixes = Sample(key, index), set()
                index += 1
            if suffix in _DECODED or keep_others:
                if suffix in suffixes:  # readers would differ on which of the two they take
                    current.error = current.error or "duplicate_key"
                suffixes.add(suffix)
                _read_member(tar, member, suffix, current, limits)
        end.is_complete = tar.is_closed
    except tarfile.ReadError:
        pass  # the data stops, or turns into rubbish
    if current is not None:
        if not end.is_complete and current.error is None and current.image is None:
            current.error = "shard_truncated"
        yield _finish(current, seen)
    end.num_samples = index


def split_name(name: str) -> tuple[str, str]:
    r"""Split a member's name into WebDataset key and suffix: `a/b.seg.PNG` -> (`a/b`, `seg.png`).

    Bytes that are not UTF-8, which `tarfile` hands over as lone surrogates, become `\xff`, so that any key can be
    written to a file.
    """
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


_DECODED = frozenset((*IMAGE_SUFFIXES, *CAPTION_SUFFIXES, *LABEL_SUFFIXES))


def _read_member(tar: Tar, member: tarfile.TarInfo, suffix: str, sample: Sample, limits: Limits) -> None:
    """Read one member into its sample."""
    if member.issparse():
        sample.error = sample.error or "member_sparse"
        return
    is_other = suffix not in _DECODED
    if member.size + sample.others_bytes * is_other > limits.max_member_bytes:
        sample.error = sample.error or "member_too_large"
        return
    try:
        content = tar.read(member)
    except tarfile.ReadError:
        sample.error = "shard_truncated"
        raise
    if suffix in IMAGE_SUFFIXES:
        if sample.image is None:
            sample.image, sample.image_suffix = content, suffix
    elif suffix in CAPTION_SUFFIXES:
        try:
            sample.caption = content.decode("utf-8")
        except UnicodeDecodeError:
            sample.error = sample.error or "caption_unreadable"
        else:
            if len(sample.caption) > limits.max_caption_chars:
                sample.caption, sample.error = None, sample.error or "caption_too_long"
    elif suffix in LABEL_SUFFIXES:
        digits = _LABEL.fullmatch(content) if len(content) <= 32 else None
        sample.label = int(digits[1]) if digits else None
        if sample.label is None or abs(sample.label) >= 2**31:
            sample.label, sample.error = None, sample.error or "label_unreadable"
    else:
        sample.others[suffix] = content
        sample.others_bytes += len(content) + 128  # and what a dictionary needs for it


_LABEL = re.compile(rb"\s*([+-]?\d+)\s*")  # without what int() takes besides: 1_000


def _finish(sample: Sample, seen: set[bytes]) -> Sample:
    if _digest(sample.key) in seen:
        sample.error = "duplicate_key"
        while _digest(sample.key) in seen:  # ids stay unique, one row per sample, also where `k#3` is somebody's key
            sample.key = f"{sample.key}#{sample.index}"
    seen.add(_digest(sample.key))
    if sample.error is None and sample.image is None:
        sample.error = "no_image"
    return sample


def _digest(key: str) -> bytes:
    """Stands for a key in memory, where a shard's worth of long ones would not fit."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def iter_chunks(shard: Shard, chunk_size: int, limits: Limits, end: ShardEnd | None = None) -> Iterator[list[Sample]]:
    """Yield the shard's samples in lists of `chunk_size`; the last one may be shorter."""
    with open_shard(shard) as stream:
        chunk: list[Sample] = []
        for sample in iter_samples(stream, limits, end=end):
            chunk.append(sample)
            if len(chunk) == chunk_size:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


# --------------------------------------------------------------------------------------------- decoding


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
        with Image.open(io.BytesIO(with_one_exif(content)), formats=IMAGE_FORMATS) as image:
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


_BMP_RLE = (1, 2)  # compressed bitmaps, which nobody writes any more, and which Pillow decodes byte by byte in Python
_EXIF = b"Exif\0\0"
_TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def with_one_exif(content: bytes) -> bytes:
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


def _is_painted_over(content: bytes, num_pixels: int, limits: Limits) -> bool:
    """Whether a JPEG has so many scans that decoding it takes minutes: each of 10 bytes may go over all its pixels."""
    allowed = MAX_SCANS * limits.max_pixels
    if not content.startswith(b"\xff\xd8") or num_pixels * len(content) // 10 <= allowed:
        return False
    return num_pixels * content.count(b"\xff\xda") > allowed


def _square(image: Image.Image, size_px: int) -> Image.Image:
    width, height = image.size
    if (width, height) == (size_px, size_px):
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box)


def to_square(image_HWC: np.ndarray, size_px: int) -> np.ndarray:
    """Resize and crop a decoded image as `decode_image` does, for jobs that change it between the two."""
    return np.asarray(_square(Image.fromarray(image_HWC), size_px))


def encode_image(image_HWC: np.ndarray, suffix: str, quality: int = 95) -> bytes:
    """Encode uint8 HWC RGB by suffix: `png` and `bmp` are exact, `jpg`, `jpeg` (4:2:0) and `webp` take `quality`."""
    buffer = io.BytesIO()
    image = Image.fromarray(image_HWC)
    if suffix == "png":
        image.save(buffer, "PNG", compress_level=6)
    elif suffix == "bmp":
        image.save(buffer, "BMP")
    elif suffix == "webp":
        image.save(buffer, "WEBP", quality=quality)
    else:
        assert suffix in ("jpg", "jpeg"), suffix
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def write_whole(path: Path, is_gzipped: bool, buffering: int = -1) -> Iterator[IO[bytes]]:
    """Open a file for writing that is absent or whole, whatever is killed; the same bytes for the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb", buffering) as file:
        if is_gzipped:
            with gzip.GzipFile("", "wb", 6, file, mtime=0) as zipped:  # neither clock time nor name in the header
                yield cast(IO[bytes], zipped)
        else:
            yield file
    temporary.replace(path)


def write_shard(path: str | os.PathLike[str], samples: Iterable[Sample]) -> int:
    """Write one tar; equal samples give equal bytes. Absent or whole, whatever is killed.

    Returns:
        The number of samples written.
    """
    path = Path(path)
    num_samples = 0
    with write_whole(path, False) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            num_samples += 1
            if sample.image is not None:
                add_member(tar, f"{sample.key}.{sample.image_suffix}", sample.image)
            if sample.caption is not None:
                add_member(tar, f"{sample.key}.txt", sample.caption.encode())
            if sample.label is not None:
                add_member(tar, f"{sample.key}.cls", str(sample.label).encode())
            for suffix, content in sorted(sample.others.items()):
                add_member(tar, f"{sample.key}.{suffix}", content)
    return num_samples


def write_shards(
    folder: str | os.PathLike[str], split: str, samples: Iterable[Sample], samples_per_shard: int
) -> list[Path]:
    """Write `<split>-00000.tar`, `<split>-00001.tar` ... of `samples_per_shard` samples each."""
    paths: list[Path] = []
    pending: list[Sample] = []
    for sample in samples:
        pending.append(sample)
        if len(pending) == samples_per_shard:
            paths.append(_write_numbered(folder, split, len(paths), pending))
            pending = []
    if pending:
        paths.append(_write_numbered(folder, split, len(paths), pending))
    return paths


def _write_numbered(folder: str | os.PathLike[str], split: str, number: int, samples: list[Sample]) -> Path:
    path = Path(folder) / f"{split}-{number:05d}.tar"
    write_shard(path, samples)
    return path


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file to a tar, under a header without owner and clock time."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    header.mode = 0o644
    tar.addfile(header, io.BytesIO(content))
