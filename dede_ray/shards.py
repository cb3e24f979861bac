"""WebDataset shards: listing, reading and writing tars that strangers made.

A shard is a tar whose neighbouring members form samples: `000042.jpg`, `000042.txt`, `000042.cls` are the image,
caption and label of key `000042` (the name up to the first dot after the last slash). The unit in which samples
travel, are scored and are recovered is the *chunk*: `chunk_size` consecutive samples of one shard.

Nothing from a shard is ever unpickled or executed: members are decoded by the explicit decoders below, by
suffix, and every other member is ignored. What cannot be used becomes an error with a reason from `REASONS`;
it keeps its place, so that every sample of a shard appears exactly once in whatever is written about it.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, get_args
from typing import Literal as L

import numpy as np
from PIL import Image, ImageOps
from pyarrow import fs
from pydantic import Field

from dede_ray.config import Config, Mistake

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # what Pillow may try, whatever the suffix says
CAPTION_SUFFIXES = ("txt", "caption")
LABEL_SUFFIXES = ("cls", "label")

Reason = L[
    "no_image",  # no member with an image suffix
    "image_unreadable",  # not one of IMAGE_FORMATS, or damaged
    "image_truncated",  # the image data ends early
    "image_too_large",  # more pixels than `max_pixels`
    "member_too_large",  # a member longer than `max_member_bytes`
    "caption_missing",  # no caption where training needs one
    "caption_unreadable",  # not UTF-8
    "caption_too_long",  # longer than `max_caption_chars`
    "label_unreadable",  # not an integer
    "duplicate_key",  # the key already stood in this shard
    "shard_truncated",  # the shard ends inside this sample
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
        found = [shard for part in _expand_braces(pattern) for shard in _list_one(part)]
        if not found:
            raise Mistake(
                f"no shards at {pattern} (looked from {Path.cwd()}); expected .tar or .tar.gz files, "
                "a folder of them, or a pattern such as shards/train-*.tar"
            )
        shards += found
    shards.sort(key=lambda shard: shard.name + "/")  # the order of their sample ids
    for one, other in itertools.pairwise(shards):
        if one.name == other.name:
            raise Mistake(
                f"two shards are named {one.name}: {one.url} and {other.url}; sample ids are "
                "<shard name>/<key>, so rename one or handle them in two runs"
            )
    unreadable = [f"{shard.url}: {problem}" for shard in shards if (problem := _why_unreadable(shard))]
    if unreadable:
        listing = "\n  ".join(unreadable[:10])
        raise Mistake(
            f"{len(unreadable)} of {len(shards)} shards cannot be read as tar:\n  {listing}\n"
            "repair or remove them, or name the readable ones"
        )
    return shards


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    return [pattern[: match.start()] + f"{n:0{len(first)}d}" + pattern[match.end() :] for n in numbers]


def _list_one(pattern: str) -> list[Shard]:
    if "://" in pattern:
        filesystem, path = fs.FileSystem.from_uri(pattern)
        infos = filesystem.get_file_info([path])
        if infos[0].type == fs.FileType.Directory:
            infos = filesystem.get_file_info(fs.FileSelector(path))
        scheme = pattern.split("://")[0]
        files = [(f"{scheme}://{info.path}", info.size) for info in infos if info.type == fs.FileType.File]
    else:
        if os.path.isdir(pattern):
            pattern = os.path.join(glob.escape(pattern), "*")
        paths = [path for path in glob.glob(pattern) if os.path.isfile(path)]
        files = [(os.path.abspath(path), os.path.getsize(path)) for path in paths]
    return [
        Shard(url.rsplit("/", 1)[-1], url, size) for url, size in files if url.endswith((".tar", ".tar.gz", ".tgz"))
    ]


def _why_unreadable(shard: Shard) -> str | None:
    """Look at the first header only; what is wrong further in is for the reader to count."""
    try:
        with open_shard(shard) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            return None if tar.next() is not None else "holds no members"
    except (tarfile.TarError, OSError, EOFError) as error:
        return f"{type(error).__name__}: {error}"


def open_shard(shard: Shard) -> IO[bytes]:
    """Open a shard for reading from its start, local or remote."""
    if "://" not in shard.url:
        return open(shard.url, "rb")
    filesystem, path = fs.FileSystem.from_uri(shard.url)
    return filesystem.open_input_file(path)


# ---------------------------------------------------------------------------------------------- reading


class _Member(tarfile.TarInfo):
    """A tar header that notes whether the archive's end was a real end.

    `tarfile` treats a file that stops without the closing zero block like a complete one.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tar)  # type: ignore[return-value]
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.closed_properly = True  # type: ignore[attr-defined]
            raise


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
    seen: set[str] = set()
    current: Sample | None = None
    index = 0
    tar = tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member)
    try:
        for member in tar:
            if not member.isfile():
                continue
            key, suffix = split_name(member.name)
            if current is None or key != current.key:
                if current is not None:
                    yield _finish(current, seen)
                current = Sample(key, index)
                index += 1
            _read_member(tar, member, suffix, current, limits, keep_others)
        end.is_complete = getattr(tar, "closed_properly", False)
    except (tarfile.ReadError, EOFError, OSError) as error:  # the data stops, or turns into rubbish
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk or the network, not the shard
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


def _read_member(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    suffix: str,
    sample: Sample,
    limits: Limits,
    keep_others: bool,
) -> None:
    """Read one member into its sample, if it is one that we decode."""
    is_image = suffix in IMAGE_SUFFIXES
    if not (is_image or suffix in CAPTION_SUFFIXES or suffix in LABEL_SUFFIXES or keep_others):
        return
    if member.size > limits.max_member_bytes:
        sample.error = sample.error or "member_too_large"
        return
    reader = tar.extractfile(member)
    assert reader is not None, member.name
    try:
        content = reader.read()
    except (tarfile.ReadError, EOFError):
        sample.error = "shard_truncated"
        raise
    if len(content) < member.size:
        sample.error = "shard_truncated"
        raise tarfile.ReadError("unexpected end of data")
    if is_image:
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
        try:
            sample.label = int(content[:32])
        except ValueError:
            sample.error = sample.error or "label_unreadable"
        else:
            if abs(sample.label) >= 2**31:
                sample.label, sample.error = None, sample.error or "label_unreadable"
    else:
        sample.others[suffix] = content


def _finish(sample: Sample, seen: set[str]) -> Sample:
    if sample.key in seen:
        sample.error = "duplicate_key"
        sample.key = f"{sample.key}#{sample.index}"  # ids stay unique: one row per sample
    seen.add(sample.key)
    if sample.error is None and sample.image is None:
        sample.error = "no_image"
    return sample


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
    channel is dropped, of an animation the first frame is taken, EXIF rotation is applied.

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
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                raise BadSample("image_too_large")
            if min(width, height) < 1:
                raise BadSample("image_unreadable")
            enough_px = enough_px or size_px
            if enough_px is not None:
                image.draft("RGB", (2 * enough_px, 2 * enough_px))
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to 255, not scale it
                grey = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                upright = Image.fromarray(grey)
            rgb = upright.convert("RGB")
            return np.asarray(rgb if size_px is None else _square(rgb, size_px))
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample("image_too_large") from None
    except Exception as error:  # Pillow raises whatever its decoders meet: OSError, SyntaxError, struct.error ...
        raise BadSample("image_truncated" if "truncated" in str(error).lower() else "image_unreadable") from None


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


def write_shard(path: str | os.PathLike[str], samples: Iterable[Sample]) -> int:
    """Write one tar; equal samples give equal bytes. Absent or whole, whatever is killed.

    Returns:
        The number of samples written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    num_samples = 0
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            num_samples += 1
            if sample.image is not None:
                _add(tar, f"{sample.key}.{sample.image_suffix}", sample.image)
            if sample.caption is not None:
                _add(tar, f"{sample.key}.txt", sample.caption.encode())
            if sample.label is not None:
                _add(tar, f"{sample.key}.cls", str(sample.label).encode())
            for suffix, content in sorted(sample.others.items()):
                _add(tar, f"{sample.key}.{suffix}", content)
    temporary.replace(path)
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


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    header.mode = 0o644
    tar.addfile(header, io.BytesIO(content))
