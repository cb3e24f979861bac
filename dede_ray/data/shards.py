"""Shards in the WebDataset format: what a sample is; listing, reading and writing shards that strangers made.

    list_shards("corpus/*.tar") -> [Shard, ...]       open_shard, iter_samples, iter_chunks -> Sample, Sample, ...
    write_shards(folder, "train", samples, 10_000)    count_samples(shards) -> 1_000_000

A shard is a tar whose neighbouring members form samples: `000042.jpg`, `000042.txt`, `000042.cls` are the image,
caption and label of key `000042` (the name up to the first dot after the last slash). The unit in which samples
travel, are scored and are recovered is the *chunk*: `chunk_size` consecutive samples of one shard.

Nothing from a shard is ever unpickled or executed: by their suffix, captions and labels are decoded here, images in
images.py, and every other member is ignored. Reasons belong to parts. Where an image cannot be used, the sample becomes
an error with a reason from `REASONS`; it keeps its place, so that every sample of a shard appears exactly once in
whatever is written about it. Where a caption or a label cannot, it is left aside with a note from `NOTES`, and the
image is used as ever: other trainers do not look at a label, and cut a long caption. Whatever they read is a sample
here: a key that comes again, or a member that comes twice, begins another one, with an id of its own.

Time and memory are bounded by a shard's bytes on disk (tar.py); those of one sample by `Limits`.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, NamedTuple, get_args
from typing import Literal as L

from pydantic import Field, field_validator

from dede_ray.data.first_bytes import NUM_BYTES, what_is
from dede_ray.data.patterns import File, at_once, expand
from dede_ray.data.tar import EMPTY, Tar, add_member, open_tar, why_no_tar, write_whole
from dede_ray.runtime.config import Config, Mistake, parse_json
from dede_ray.runtime.store import ObjectPath, is_url

logger = logging.getLogger(__name__)

# Of several images (captions, labels) of one sample the first of these is used, as in open_clip's trainer.
IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp", "jpe", "jfif", "bmp")
OTHER_IMAGE_SUFFIXES = frozenset(
    ["gif", "tif", "tiff", "jp2", "j2k", "jpx", "jxl", "avif", "heic", "heif", "ico", "svg", "psd", "tga", "exr", "dng"]
) | {"ppm", "pgm", "pbm", "pnm"}  # fmt: skip
CAPTION_SUFFIXES = ("txt", "caption")
LABEL_SUFFIXES = ("cls", "label")

Reason = L[
    "no_image",  # no member with an image suffix
    "image_of_other_format",  # nor one, but a picture in a format that is not read, by its suffix: .gif, .tif, .avif
    "image_unreadable",  # not one of IMAGE_FORMATS, or damaged
    "image_truncated",  # the image data ends early
    "image_too_large",  # more pixels than `max_pixels`, or a JPEG that paints them `MAX_SCANS` times
    "member_too_large",  # a member longer than `max_member_bytes`, or copied members that are so together
    "member_sparse",  # a member stored with holes (tar -S), which might unfold to terabytes
    "caption_missing",  # no caption where training needs one
    "caption_unreadable",  # not UTF-8, or no text where `caption` says that it is
    "caption_too_long",  # longer than `max_caption_chars`; its beginning is used
    "label_unreadable",  # not an integer of at most 31 bits in plain digits
    "duplicate_key",  # no image, and the key occurs earlier in this shard: what strayed from that sample
    "key_again",  # the key occurs earlier in this shard, or a member comes twice: a sample of its own, `<key>#<index>`
    "several_images",  # images of several suffixes; one is used
    "shard_truncated",  # the shard ends inside this sample
    "process_died",  # decoding it, or computing something of it, ended the process that did, or never came to an end
    "not_finite",  # what was computed of it, a score or an embedding, is not a number
]
REASONS: tuple[Reason, ...] = get_args(Reason)
Note = L["caption_unreadable", "caption_too_long", "label_unreadable", "key_again", "several_images"]
NOTES: tuple[Note, ...] = get_args(Note)
"""Reasons for which an image is not left out: they are about what is beside it."""


class BadSample(Exception):
    """One sample cannot be used; carries the reason that its row will show."""

    def __init__(self, reason: Reason):
        super().__init__(reason)
        self.reason = reason


class CaptionFrom(Config):
    """Where captions are, if not in a member .txt or .caption."""

    member: str | None = None
    """Suffix of the members that hold them, such as `text` or `json`; null: txt or caption, or json with a `field`."""
    field: str | None = None
    """They are JSON, and this is the field of the caption (`a.b`: within another); of a list the first text counts."""

    @field_validator("member")
    @classmethod
    def _is_free(cls, member: str | None) -> str | None:
        member = member and member.lower().lstrip(".")
        if member in (*IMAGE_SUFFIXES, *LABEL_SUFFIXES):
            raise ValueError(f"members .{member} are read as images or labels")
        return member

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the members that hold captions."""
        return (self.member,) if self.member else ("json",) if self.field else CAPTION_SUFFIXES


class Limits(Config):
    """What is read of one sample of an untrusted shard, and what that may cost."""

    max_pixels: int = Field(64_000_000, gt=0)
    """Largest image, in pixels, checked before anything is decoded."""
    max_member_bytes: int = Field(64_000_000, gt=0)
    """Largest member that is read into memory."""
    max_caption_chars: int = Field(10_000, gt=0)
    """Longest caption; of a longer one the beginning is used."""
    caption: CaptionFrom = CaptionFrom()
    """Where captions are."""


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
    """One sample as the shard holds it, its image not yet decoded.

    `error` says why the image cannot be used, `notes` what is left aside of caption and label, or odd.
    """

    key: str
    index: int
    image: bytes | None = None
    image_suffix: str = ""
    caption: str | None = None
    label: int | None = None
    error: Reason | None = None
    notes: list[Note] = field(default_factory=list)
    others: dict[str, bytes] = field(default_factory=dict)
    others_bytes: int = field(default=0, repr=False, compare=False)

    def content_hash(self) -> str:
        """SHA-256 of the encoded image bytes, hexadecimal; empty without an image."""
        return hashlib.sha256(self.image).hexdigest() if self.image is not None else ""

    def note(self, note: Note) -> None:
        """Note what is left aside, or odd."""
        if note not in self.notes:
            self.notes.append(note)

    @property
    def is_again(self) -> bool:
        """Whether its key is one of an earlier sample of the shard; its index is put behind it here."""
        return self.error == "duplicate_key" or "key_again" in self.notes

    @property
    def why_no_caption(self) -> Reason:
        """The reason to give where a caption is needed and there is none."""
        return "caption_unreadable" if "caption_unreadable" in self.notes else "caption_missing"


def sample_id(shard_name: str, key: str) -> str:
    """`"<shard file name>/<WebDataset key>"`: unique and stable, the same in every file we write."""
    return f"{shard_name}/{key}"


# -------------------------------------------------------------------------------------------------------------- listing


def list_shards(patterns: str | Sequence[str]) -> list[Shard]:
    """Expand folders, patterns, ranges, lists and URLs (patterns.py) to shards, sorted by name.

    Shards without a member, such as a download leaves whose links have all failed, are passed over and counted in the
    log. Only the first block of each is looked at.

    Args:
        patterns: local paths, or URLs that pyarrow opens (`s3://bucket/prefix/train-00000.tar`).

    Raises:
        Mistake: nothing found, a name of a range that does not exist, a shard named twice, one that is no tar, or all
            of them are empty.

    Example:
        >>> import dede_ray
        >>> [shard.name for shard in dede_ray.list_shards("runs/digits/poisoned/train-*.tar")][:1]
        ['train-00000.tar']
    """
    shards = find_shards(patterns)
    problems = [*at_once(why_unreadable, shards)]
    looked_at = [*zip(shards, problems, strict=True)]
    unreadable = [f"{shard.url}: {why}" for shard, why in looked_at if why not in (None, EMPTY)]
    if unreadable:
        listing = "\n  ".join([*unreadable[:10], *["..."][: len(unreadable) - 10]])
        raise Mistake(
            f"{len(unreadable)} of {len(shards)} shards cannot be read as tar:\n  {listing}\n"
            "repair or remove them, or name the readable ones"
        )
    full = [shard for shard, why in looked_at if why is None]
    empty = [shard.url for shard, why in looked_at if why is not None]
    if not full:
        raise Mistake(f"all {len(shards)} shards are empty, such as {empty[0]}; name shards with samples")
    if empty:
        logger.warning("%d of %d shards are empty and passed over, such as %s", len(empty), len(shards), empty[0])
    return full


def find_shards(patterns: str | Sequence[str]) -> list[Shard]:
    """List shards as `list_shards` does, and also those that cannot be read; nothing is opened.

    Raises:
        Mistake: nothing found, a name of a range that does not exist, or a shard named twice.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise Mistake("the list of shards is empty; name .tar files, a folder of them, or a pattern")
    shards: list[Shard] = []
    for pattern in patterns:
        found = [file for file in expand(pattern) if _is_shard(file)]
        if not found:
            raise Mistake(
                f"no shards at {pattern} (looked from {Path.cwd()}); expected .tar or .tar.gz files, "
                f"a folder of them, or a pattern such as shards/train-*.tar{_below(pattern)}"
            )
        shards += [Shard(_name_of(file.url), file.url, file.num_bytes) for file in found]
    return _named_apart(shards)


def _below(folder: str) -> str:
    """What to write instead for a folder here whose sub-folders hold shards; or nothing."""
    if is_url(folder) or not os.path.isdir(folder) or not any(Path(folder).glob("*/*.tar")):
        return ""
    return f". Its sub-folders have some: write {os.path.join(folder, '*', '*.tar')}"


# Compressed tars that are not read: refused by name, as passing them over would leave a corpus half unseen.
_PACKED = (
    ".tar.zst", ".tar.zstd", ".tar.bz2", ".tar.xz", ".tar.lz4", ".tar.lzma", ".tar.br", ".tar.z", ".tzst", ".tbz",
    ".tbz2", ".txz",
)  # fmt: skip


def _is_shard(file: File) -> bool:
    if _name_of(file.url).lower().endswith((".tar", ".tar.gz", ".tgz", *_PACKED)):
        return True
    if file.is_named:
        kind = what_is(read_start(file.url)) or "of no known format"
        raise Mistake(f"{file.url} is no shard by its name, and its content is {kind}; expected .tar, .tar.gz or .tgz")
    return False


def _name_of(url: str) -> str:
    return ObjectPath(url).name if is_url(url) else os.path.basename(url)


def _named_apart(shards: list[Shard]) -> list[Shard]:
    """Sort shards by the ids of their samples; where names clash, folders come before them: `cc3m--00000.tar`.

    Each takes as many of its folders as make it different, so that no id changes where nothing clashes.

    Raises:
        Mistake: one is named twice.
    """
    twice = [url for url, num in Counter(shard.url for shard in shards).items() if num > 1]
    if twice:
        raise Mistake(f"{len(twice)} shards are named twice, such as {twice[0]}; name each once")
    depths = [0] * len(shards)
    names = [shard.name for shard in shards]
    while clashing := {name for name, num in Counter(names).items() if num > 1}:
        for at, shard in enumerate(shards):
            if names[at] in clashing:
                depths[at] += 1
                names[at] = _long_name(shard, depths[at])
    named = [replace(shard, name=name) for shard, name in zip(shards, names, strict=True)]
    return sorted(named, key=lambda shard: shard.name + "/")


def _long_name(shard: Shard, depth: int) -> str:
    """A shard's name behind so many of its folders; behind a digest of all where they are too few or too long."""
    *folders, _ = (ObjectPath(shard.url).base if is_url(shard.url) else shard.url).strip("/").split("/")
    name = "--".join([*filter(None, folders[-depth:]), shard.name])
    if depth <= len(folders) and len(name.encode()) <= 200:
        return name
    return f"{hashlib.sha256(shard.url.encode()).hexdigest()[:16]}--{shard.name}"


def why_unreadable(shard: Shard) -> str | None:
    """What is wrong with a shard as far as its first block shows, `EMPTY` where it has no member; None: nothing."""
    try:
        return why_no_tar(read_start(shard.url))
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def read_start(url: str) -> bytes:
    """The first bytes of a file, enough for `what_is` and for a tar's first header."""
    if is_url(url):
        return ObjectPath(url).read_start(NUM_BYTES)
    with open(url, "rb", buffering=0) as stream:
        return stream.read(NUM_BYTES)


# -------------------------------------------------------------------------------------------------------------- reading


def open_shard(shard: Shard) -> IO[bytes]:
    """Open a shard for reading from its start, local or remote."""
    if is_url(shard.url):
        return ObjectPath(shard.url).open()
    return open(shard.url, "rb")


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
    grouping = Grouping()
    ranks: dict[str, int] = {}  # of what the sample has so far
    parts = {
        suffix: (part, rank)
        for part, suffixes in (("image", IMAGE_SUFFIXES), ("label", LABEL_SUFFIXES), ("text", limits.caption.suffixes))
        for rank, suffix in enumerate(suffixes)
    }
    index = 0
    try:
        tar = open_tar(stream)
        for member in tar:
            place = grouping.place(member.name) if member.isfile() else None
            if place is None:
                continue
            if current is None or place.is_first:
                if current is not None:
                    yield _finish(current, seen)
                current, ranks = Sample(place.key, index), {}
                index += 1
            suffix = place.suffix
            part, rank = parts.get(suffix, ("", 0))
            if part == "image" and part in ranks:
                current.note("several_images")
            if part and rank <= ranks.get(part, rank):
                if part == "image":
                    current.image, current.error = None, None
                ranks[part] = rank
                _read_member(tar, member, suffix, current, limits)
            elif keep_others and not part:
                _read_member(tar, member, suffix, current, limits)
            if suffix in OTHER_IMAGE_SUFFIXES and current.image is None:
                current.image_suffix = suffix  # until there is an image
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
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def in_sample(name: str) -> tuple[str, str] | None:
    """Key and suffix of a regular file that belongs to a sample, by its name; None for one that belongs to none.

    The rule is that of webdataset, and so of the trainers built on it: a name without a dot after its last slash, or
    without anything before that dot (`LICENSE`, `.DS_Store`, `./._a.png`), and `__anything__`, stray among the samples;
    they neither begin one nor end one.
    """
    key, suffix = split_name(name)
    if "." not in name.rpartition("/")[2] or not key or _META.match(name):
        return None
    # What webdataset takes for the last part of the key has no dot. It begins behind a slash, on the first line.
    start = key.partition("\n")[0].rfind("/", 0, len(key) - 1) + 1
    return None if "." in key[start:] else (key, suffix)


_META = re.compile(r"__[^/]*__($|/)")


class Of(NamedTuple):
    """Which sample a member belongs to, and whether that one begins with it."""

    key: str
    suffix: str
    is_first: bool


class Grouping:
    """Follows the members of a tar and says which sample each belongs to: everything that walks over one asks here.

    Neighbours of one key are a sample (`in_sample`). A suffix that comes again under its key begins another sample, as
    in open_clip's trainer; webdataset's own reader stops there, or skips it.
    """

    def __init__(self) -> None:
        self._key: str | None = None
        self._suffixes: set[str] = set()

    def place(self, name: str) -> Of | None:
        """The place of the next regular file, by its name; None for one that belongs to no sample."""
        found = in_sample(name)
        if found is None:
            return None
        key, suffix = found
        is_first = key != self._key or suffix in self._suffixes
        if is_first:
            self._key, self._suffixes = key, set()
        self._suffixes.add(suffix)
        return Of(key, suffix, is_first)


def count_samples(shards: list[Shard]) -> int:
    """Count samples, readable or not, by the headers of the tars alone; shards in parallel on Ray."""
    import ray  # a second of import that listing and reading shards need not pay

    count = ray.remote(num_cpus=1)(_count)
    return sum(ray.get([count.remote(shard) for shard in shards]))


_LABEL = re.compile(rb"\s*([+-]?\d+)\s*")  # without what int() takes besides: 1_000
_MAX_JSON_BYTES = 1_000_000  # of a member that holds a caption


def _read_member(tar: Tar, member: tarfile.TarInfo, suffix: str, sample: Sample, limits: Limits) -> None:
    """Read one member into its sample."""
    if suffix in limits.caption.suffixes:
        sample.caption = None
        try:
            sample.caption = _caption(tar, member, sample, limits)
        except (ValueError, tarfile.ReadError) as error:
            sample.note("caption_unreadable")
            if isinstance(error, tarfile.ReadError):
                raise
    elif suffix in LABEL_SUFFIXES:
        sample.label = None
        try:
            digits = None if member.size > 32 or member.issparse() else _LABEL.fullmatch(tar.read(member))
        except tarfile.ReadError:
            sample.note("label_unreadable")
            raise
        if digits and abs(int(digits[1])) < 2**31:
            sample.label = int(digits[1])
        else:
            sample.note("label_unreadable")
    else:
        _read_whole(tar, member, suffix, sample, limits)


def _caption(tar: Tar, member: tarfile.TarInfo, sample: Sample, limits: Limits) -> str | None:
    """The caption in a member, or its beginning where it is too long; None where the JSON has none.

    Raises:
        ValueError: it is no text.
        tarfile.ReadError: the data end inside.
    """
    if member.issparse():
        raise ValueError("stored with holes")
    most = limits.max_caption_chars
    text: str | None
    if limits.caption.field is not None:
        if member.size > _MAX_JSON_BYTES:
            raise ValueError("too long")
        text, is_whole = text_in_json(tar.read(member), limits.caption.field), True
    else:
        content = tar.read(member, 4 * most)  # bytes: as many as UTF-8 takes at most
        is_whole = len(content) == member.size
        text = codecs.getincrementaldecoder("utf-8")().decode(content, final=is_whole)
    if text is None or (is_whole and len(text) <= most):
        return text
    sample.note("caption_too_long")
    return text[:most]


def text_in_json(content: bytes, name: str) -> str | None:
    """The text in a field of a JSON object, or the first one of a list there; None where there is no such field.

    Raises:
        ValueError: no JSON object, or something else in the field.
    """
    value = parse_json(io.BytesIO(content), nan=True)
    for part in name.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        value = value.get(part)
    if isinstance(value, list):
        value = next((one for one in value if isinstance(one, str) and one.strip()), "" if not value else value[0])
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} where text is expected")
    return value


def _read_whole(tar: Tar, member: tarfile.TarInfo, suffix: str, sample: Sample, limits: Limits) -> None:
    """Read an image, or a member that is kept as it is."""
    if member.issparse():
        sample.error = sample.error or "member_sparse"
        return
    is_image = suffix in IMAGE_SUFFIXES
    if member.size + sample.others_bytes * (not is_image) > limits.max_member_bytes:
        sample.error = sample.error or "member_too_large"
        return
    try:
        content = tar.read(member)
    except tarfile.ReadError:
        sample.error = "shard_truncated"
        raise
    if not is_image:
        sample.others[suffix] = content
        sample.others_bytes += len(content) + 128  # and what a dictionary needs for it
    else:
        sample.image, sample.image_suffix = content, suffix


def _finish(sample: Sample, seen: set[bytes]) -> Sample:
    if is_again := _digest(sample.key) in seen:
        sample.note("key_again")
        while _digest(sample.key) in seen:  # ids stay unique, also where another sample's key is `k#3`
            sample.key = f"{sample.key}#{sample.index}"
    seen.add(_digest(sample.key))
    if sample.error is None and sample.image is None and is_again:
        sample.notes.remove("key_again")
        sample.error = "duplicate_key"
    if sample.error is None and sample.image is None:
        sample.error = "image_of_other_format" if sample.image_suffix else "no_image"
    return sample


def _digest(key: str) -> bytes:
    """A key in 16 bytes, as a shard's worth of long ones would not fit into memory."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _count(shard: Shard) -> int:
    count, grouping = 0, Grouping()
    with open_shard(shard) as stream:
        try:
            for member in open_tar(stream):
                place = grouping.place(member.name) if member.isfile() else None
                count += place is not None and place.is_first
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
