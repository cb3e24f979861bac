"""Shards in the WebDataset format: what a sample is; listing, reading and writing shards that strangers made.

    list_shards("corpus/*.tar") -> [Shard, ...]       open_shard, iter_samples, iter_chunks -> Sample, Sample, ...
    write_shards(folder, "train", samples, 10_000)    count_samples(shards) -> 1_000_000

A shard is a tar whose neighbouring members form samples: `000042.jpg`, `000042.txt`, `000042.cls` are the image,
caption and label of key `000042` (the name up to the first dot after the last slash). The unit in which samples
travel, are scored and are recovered is the *chunk*: `chunk_size` consecutive samples of one shard.

Nothing from a shard is ever unpickled or executed: by their suffix, captions and labels are decoded here, images in
images.py, and every other member is ignored. What cannot be used becomes an error with a reason from `REASONS`; it
keeps its place, so that every sample of a shard appears exactly once in whatever is written about it.

Time and memory are bounded by a shard's bytes on disk (tar.py); those of one sample by `Limits`.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, get_args
from typing import Literal as L

from pydantic import Field

from dede_ray.data.tar import Tar, add_member, open_tar, write_whole
from dede_ray.runtime.config import Config, Mistake
from dede_ray.runtime.store import ObjectPath

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")
CAPTION_SUFFIXES = ("txt", "caption")
LABEL_SUFFIXES = ("cls", "label")

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
    "duplicate_key",  # the key occurs earlier in this shard, or one of its members comes twice
    "shard_truncated",  # the shard ends inside this sample
    "process_died",  # decoding it, or computing something of it, ended the process that did, or never came to an end
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
    digest: str = field(default="", compare=False)
    """What it holds, as far as that was looked at (identity.py)."""


@dataclass
class Sample:
    """One sample as the shard holds it, its image not yet decoded; `error` says why it cannot be used."""

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


# -------------------------------------------------------------------------------------------------------------- listing


def list_shards(patterns: str | Sequence[str]) -> list[Shard]:
    """Expand folders, globs, `{00000..00004}` ranges and URLs to shards, sorted by name.

    Args:
        patterns: local paths, or URLs that pyarrow opens (`s3://bucket/prefix/train-00000.tar`).

    Raises:
        Mistake: nothing found, two shards of one file name (their sample ids would clash), or a file that
            cannot be opened as a tar.

    Example:
        >>> import dede_ray
        >>> [shard.name for shard in dede_ray.list_shards("runs/digits/poisoned/train-*.tar")][:1]
        ['train-00000.tar']
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
    unreadable = [f"{shard.url}: {problem}" for shard in shards if (problem := why_unreadable(shard))]
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


def why_unreadable(shard: Shard) -> str | None:
    """What is wrong with the first header, or None; what is wrong further in is for the reader to count."""
    try:
        with open_shard(shard) as stream:
            return None if open_tar(stream).next() is not None else "holds no members"
    except (tarfile.TarError, OSError) as error:
        return f"{type(error).__name__}: {error}"


# -------------------------------------------------------------------------------------------------------------- reading


def open_shard(shard: Shard) -> IO[bytes]:
    """Open a shard for reading from its start, local or remote."""
    if "://" not in shard.url:
        return open(shard.url, "rb")
    return ObjectPath(shard.url).open()


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


def split_name(name: str) -> tuple[str, str]:
    r"""Split a member's name into WebDataset key and suffix: `a/b.seg.PNG` -> (`a/b`, `seg.png`).

    Bytes that are not UTF-8, which `tarfile` hands over as lone surrogates, become `\xff`, so that any key can be
    written to a file.
    """
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def count_samples(shards: list[Shard]) -> int:
    """Count samples, readable or not, by the headers of the tars alone; shards in parallel on Ray."""
    import ray  # a second of import that listing and reading shards need not pay

    count = ray.remote(num_cpus=1)(_count)
    return sum(ray.get([count.remote(shard) for shard in shards]))


_DECODED = frozenset((*IMAGE_SUFFIXES, *CAPTION_SUFFIXES, *LABEL_SUFFIXES))
_LABEL = re.compile(rb"\s*([+-]?\d+)\s*")  # without what int() takes besides: 1_000


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


def _finish(sample: Sample, seen: set[bytes]) -> Sample:
    if _digest(sample.key) in seen:
        sample.error = "duplicate_key"
        while _digest(sample.key) in seen:  # ids stay unique, also where another sample's key is `k#3`
            sample.key = f"{sample.key}#{sample.index}"
    seen.add(_digest(sample.key))
    if sample.error is None and sample.image is None:
        sample.error = "no_image"
    return sample


def _digest(key: str) -> bytes:
    """A key in 16 bytes, as a shard's worth of long ones would not fit into memory."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _count(shard: Shard) -> int:
    count, key = 0, None
    with open_shard(shard) as stream:
        try:
            for member in open_tar(stream):
                if member.isfile() and split_name(member.name)[0] != key:
                    count, key = count + 1, split_name(member.name)[0]
        except tarfile.ReadError:
            pass  # what comes before the damage counts, as `iter_samples` reads it
    return count


# -------------------------------------------------------------------------------------------------------------- writing


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
