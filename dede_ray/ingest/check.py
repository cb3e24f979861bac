"""The shard doctor: examines shards before they are trained on or scored, and changes nothing.

One Ray task per shard reads it twice, side by side: `iter_samples` and `decode_image` give the verdict of every other
job, and a walk over the tar's headers sees what they skip silently. What concerns several shards, equal pictures or
keys, is then found from hashes alone (data/near_duplicates.py).

    <output>/findings/<shard>.parquet      one row per finding, of the kinds listed in `FINDINGS`
    <output>/findings/all-shards.parquet   those that only several shards together show
    <output>/samples/<shard>.parquet       one row per sample: sizes, formats, hashes
    <output>/duplicates.parquet            one row per sample of a group of equal or almost equal pictures
    <output>/shards/<shard>.json           written last: this shard has been examined
    <output>/summary.json                  counts and distributions

Equal shards give equal bytes, whatever the number of workers. Nothing from a shard is unpickled or executed.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import itertools
import logging
import os
import re
import tarfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image
from pydantic import Field, field_validator
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

from dede_ray.data.captions import read_classes
from dede_ray.data.first_bytes import NUM_BYTES, what_is
from dede_ray.data.images import IMAGE_FORMATS, decode_image, orientation, without_notes
from dede_ray.data.near_duplicates import THUMBNAIL_PX, first_equal, first_near, hamming, perceptual_hash
from dede_ray.data.shards import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    NOTES,
    OTHER_IMAGE_SUFFIXES,
    REASONS,
    BadSample,
    Grouping,
    Limits,
    Sample,
    Shard,
    ShardEnd,
    find_shards,
    iter_samples,
    open_shard,
    sample_id,
)
from dede_ray.data.tar import EMPTY, TarHeader, open_tar, why_no_tar
from dede_ray.data.unread import Unread
from dede_ray.runtime.config import Config, Mistake, claim, finish, parse_json, read_json, write_json
from dede_ray.runtime.session import start_ray
from dede_ray.runtime.store import ObjectPath, is_url

logger = logging.getLogger(__name__)

LEVELS = ("error", "warning", "note")

FINDINGS: dict[str, tuple[str, str]] = {
    # error: every other job leaves this out, or refuses to start on it
    **dict.fromkeys([reason for reason in REASONS if reason not in NOTES], ("error", "an error row in every pass")),
    "shard_unreadable": ("error", "not a tar; other jobs refuse to start on it"),
    "shard_ends_early": ("error", "stops within a member, or turns into rubbish; what followed is lost"),
    # warning: it is used, but perhaps not as intended
    "caption_missing": ("warning", "scored, but left out of CLIP training"),
    "caption_unreadable": ("warning", "left aside: not UTF-8, or not the text it should be; scored without it"),
    "caption_too_long": ("warning", "its beginning is used"),
    "label_unreadable": ("warning", "left aside: not a plain integer; scored and trained on without it"),
    "shard_empty": ("warning", "no samples; passed over where it has no members"),
    "shard_without_end": ("warning", "no end mark behind the last member; perhaps cut between two"),
    "shard_data_after_end": ("warning", "data behind the tar's end, never read (two tars joined?)"),
    "special_member": ("warning", "a link, device or the like; ignored"),
    "stray_members": ("warning", "files of no sample: hidden, or with no dot in their name; no reader looks at them"),
    "image_elsewhere": ("warning", "read as no image"),
    "caption_elsewhere": ("warning", "read as no caption"),
    "dangerous_member": ("warning", "general loaders would unpickle or run it; never opened here"),
    "key_again": ("warning", "the key occurs earlier in this shard; scored and trained on, as <key>#<place>"),
    "several_images": ("warning", f"one is used: the first of .{', .'.join(IMAGE_SUFFIXES)}; others are not scored"),
    "repeated_member": ("warning", "several captions or labels; .txt and .cls are used"),
    "interleaved_members": ("warning", "members of one sample are not adjacent; sort the tar by name"),
    "key_empty": ("warning", "a name that begins with a dot, in a folder; readers make samples of those"),
    "key_not_utf8": ("warning", "bytes that are not UTF-8 are escaped"),
    "key_odd_characters": ("warning", "control or invisible characters"),
    "key_path_like": ("warning", "absolute, or with .. or backslashes; dangerous to unpack"),
    "key_too_long": ("warning", "longer than max_key_bytes"),
    "key_in_other_shard": ("warning", "two samples to us, but not to tools that join by key alone"),
    "image_wrong_suffix": ("warning", "read as what it is, not as what its name says"),
    "image_small": ("warning", "shorter side below min_side_px"),
    "image_elongated": ("warning", "beyond max_aspect; more of it is cropped away than kept"),
    "image_uniform": ("warning", "shows next to nothing"),
    "caption_json": ("warning", "a JSON list or object; read and trained on as it stands, brackets and all"),
    "caption_empty": ("warning", "nothing but white space"),
    "caption_control_characters": ("warning", "control characters, or marks of a failed decoding"),
    "caption_hidden_characters": ("warning", "bidirectional or invisible characters"),
    "label_without_name": ("warning", "not a class of classes.json"),
    "classes_unreadable": ("warning", "jobs that need class names will stop"),
    "exact_duplicate": ("warning", "the bytes of an earlier image"),
    "near_duplicate": ("warning", "almost the picture of an earlier image"),
    "duplicate_relabelled": ("warning", "one picture, or almost, and two labels"),
    "search_capped": ("warning", "too many look-alikes; not all pairs were compared"),
    # note: harmless; how it is read
    "shard_gzipped": ("note", "slower to read"),
    "shard_size_odd": ("note", "less than a quarter, or more than four times, of the usual number of samples"),
    "ignored_members": ("note", "not read by any job"),
    "image_animated": ("note", "its first picture is taken"),
    "image_cmyk": ("note", "turned into RGB"),
    "image_16bit": ("note", "the upper 8 bits are taken"),
    "image_palette": ("note", "turned into RGB"),
    "image_alpha": ("note", "transparency is dropped"),
    "image_rotated": ("note", "turned upright as EXIF says"),
    "caption_not_nfc": ("note", "not in Unicode's composed form; differs from what looks the same"),
    "caption_url": ("note", "holds a web address"),
    "caption_repeated": ("note", "one row for each caption that several samples share"),
}
"""Every kind of finding: its level and what it means."""

# fmt: off
DANGEROUS_SUFFIXES = frozenset([
    "pyd", "pickle", "pth", "npy", "npz",  # WebDataset's own decoders open these
    "pkl", "dill", "joblib", "pt", "ckpt", "bin", "h5", "hdf5",
    "py", "pyc", "pyo", "so", "dll", "dylib", "exe", "sh", "bash", "bat", "ps1", "js", "jar",
])
# fmt: on
"""Members that common loaders unpickle, or that could be run by mistake."""

FINDING_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),  # null where the finding is about the shard
        ("shard", pa.string()),  # null where it is about all of them
        ("index", pa.int64()),
        ("kind", pa.string()),
        ("level", pa.string()),
        ("detail", pa.string()),  # printable, whatever the shard holds
    ]
)

SAMPLE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("shard", pa.string()),
        ("index", pa.int64()),
        ("error", pa.string()),  # the score pass's
        ("format", pa.string()),  # this and the next three as the image's header says; null where it says nothing
        ("mode", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image_bytes", pa.int64()),
        ("label", pa.int64()),
        ("caption_chars", pa.int32()),
        ("caption_start", pa.string()),  # printable
        ("caption_hash", pa.uint64()),
        ("key_hash", pa.uint64()),
        ("content_hash", pa.string()),  # the score pass's
        ("perceptual_hash", pa.uint64()),  # null where not decoded, or nearly uniform
    ]
)

DUPLICATE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("group_id", pa.string()),  # id of the group's first sample
        ("likeness", pa.string()),  # to that one: `exact`, the same bytes (it itself, too), or `near`
        ("distance", pa.int32()),  # bits in which the perceptual hashes differ; null where there is none
    ]
)

_SCREEN_CHARS = 160  # of a line, about
_ADVICE = ("shard_unreadable", "image_elsewhere", "caption_elsewhere")  # findings that say what to do
_ROWS = 4096  # held, then written together
_LISTED = 20  # groups listed in summary.json
_MOST_PER_GROUP = 50  # findings about the members of one sample, or about the special members of one shard
_MOST_SUFFIXES = 1000  # different suffixes counted separately in a shard


class CheckConfig(Config):
    """Settings of `dede-ray check`."""

    shards: str | list[str]
    """What to examine: paths, folders, patterns or URLs."""
    output: str
    """Folder for the findings; on several machines one that all of them see."""
    limits: Limits = Limits()
    """What one sample may cost: as in the jobs to come."""
    captions: bool = True
    """Report samples without a caption, which CLIP training leaves out."""
    near_distance: int | None = Field(4, ge=0, le=10)
    """Pictures are almost equal where at most so many of 64 hash bits differ; null: only equal bytes are duplicates."""
    min_side_px: int = Field(32, gt=0)
    """Images with a shorter side are reported."""
    max_aspect: float = Field(4, ge=1)
    """Images with one side longer than so many times the other are reported."""
    max_key_bytes: int = Field(200, gt=0)
    """Longer keys are reported; a file name may have 255, suffix included."""
    fail_on: list[str] = Field([])
    """Kinds of findings, or levels (error, warning, note), that make the job fail once all is written: for CI."""
    workers: int | None = Field(None, gt=0)
    """Shards examined at once; null: as many as the cluster has CPUs."""

    @field_validator("fail_on")
    @classmethod
    def _kinds_exist(cls, kinds: list[str]) -> list[str]:
        known = [*LEVELS, *FINDINGS]
        for kind in kinds:
            if kind not in known:
                near = difflib.get_close_matches(kind, known, 1) or known
                raise ValueError(f"no finding is called {kind!r}; did you mean {' or '.join(near)}?")
        return kinds


def check(config: CheckConfig) -> str:
    """Examine every shard and write down what is odd about it.

    However bad the shards are, the job ends with a report. A rerun examines what remains, and what has since changed.

    Returns:
        One screen: what was found, most serious first, with an example of each kind.

    Raises:
        Mistake: no shards, two of one name, an output folder that is theirs or another run's, a shard that killed
            the process that read it; or, after everything is written, something was found that `fail_on` names.
    """
    start_ray(config)
    output = Path(config.output).absolute()  # Ray's workers have another working folder
    shards = find_shards(config.shards)
    if str(output) in {str(Path(shard.url).parent) for shard in shards}:
        raise Mistake(f"output {config.output} is the folder of the shards, which stay as they are; choose another")
    num_classes, problem = _count_classes(shards)
    versions = {shard.name: f"{_version(shard)}, classes {num_classes}" for shard in shards}
    listing = hashlib.sha256(repr((versions, problem)).encode()).hexdigest()
    settings = config.model_copy(update={"workers": None, "fail_on": []})  # neither changes what is found
    result = claim(config.output, settings)
    if result is None or result["listing"] != listing:
        todo = [shard for shard in shards if not _is_done(output, shard, versions[shard.name])]
        if len(todo) < len(shards):
            logger.info("resuming; %d of %d shards are done", len(shards) - len(todo), len(shards))
        calls = [(shard, output, settings, versions[shard.name], num_classes) for shard in todo]
        _examine_all(calls, config.workers)
        _tidy(output, shards)
        summary = _compare_all(output, shards, settings, problem)
        write_json(output / "summary.json", summary)
        counts = {kind: found["count"] for kind, found in summary["findings"].items()}
        result = {"listing": listing, "findings": counts, "summary": _screen(config.output, summary)}
        finish(config.output, settings, result)
    named = [kind for kind in result["findings"] if {kind, FINDINGS[kind][0]} & set(config.fail_on)]
    if named:
        raise Mistake(f"{result['summary']}\nfail_on names what was found: {', '.join(named)}")
    return result["summary"]


# ------------------------------------------------------------------------------------------- all the shards


def _version(shard: Shard) -> str:
    """A text that changes when a shard is repaired between two runs."""
    if is_url(shard.url):
        return f"{shard.url}, {ObjectPath(shard.url).version()}"
    return f"{shard.url}, {shard.num_bytes} bytes, {os.stat(shard.url).st_mtime_ns}"


def _count_classes(shards: list[Shard]) -> tuple[int | None, str]:
    """Count the classes of the classes.json beside the shards (None: there is none), or say what is wrong with it."""
    try:
        classes = read_classes(shards)
    except Mistake as mistake:
        return None, str(mistake)
    return (None if classes is None else len(classes.names)), ""


def _record_path(output: Path, shard: Shard) -> Path:
    return output / "shards" / f"{shard.name}.json"


def _is_done(output: Path, shard: Shard, version: str) -> bool:
    path = _record_path(output, shard)
    return path.is_file() and read_json(path, "record of an examined shard")["version"] == version


def _tidy(output: Path, shards: list[Shard]) -> None:
    """Remove what killed tasks left, and what was written about shards that have gone since."""
    names = {shard.name for shard in shards}
    for folder in ("samples", "findings", "shards"):
        for path in (output / folder).iterdir():
            if path.name.startswith(".") or path.stem not in names:
                path.unlink()


def _examine_all(calls: list[tuple[Shard, Path, CheckConfig, str, int | None]], workers: int | None) -> None:
    """Run `_examine` as Ray tasks, so many at a time."""
    remote = ray.remote(num_cpus=1)(_examine)
    queue, pending = iter(calls), dict[Any, Shard]()
    died: list[str] = []
    started = last = time.monotonic()
    num_shards = num_samples = num_unusable = 0
    while True:
        for call in itertools.islice(queue, (workers or 1000) - len(pending)):
            pending[remote.remote(*call)] = call[0]
        if not pending:
            break
        [done], _ = ray.wait(list(pending), num_returns=1)
        shard = pending.pop(done)
        try:
            num, unusable = ray.get(done)
        except (WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:  # Ray has tried several times
            died.append(f"{shard.url}: {type(error).__name__}")
            continue
        num_shards, num_samples, num_unusable = num_shards + 1, num_samples + num, num_unusable + unusable
        now = time.monotonic()
        if now - last > 5 or num_shards == len(calls):
            logger.info(
                "%d/%d shards: %s samples, %s unusable, %s samples/s", num_shards, len(calls), f"{num_samples:,}",
                f"{num_unusable:,}", f"{num_samples / (now - started):,.0f}",
            )  # fmt: skip
            last = now
    if died:
        listing = "\n  ".join(died[:10])
        raise Mistake(
            f"{len(died)} shards killed the process that read them; the others are examined:\n  {listing}\n"
            "run the same command again if the machine was short of memory; otherwise leave them out"
        )


# -------------------------------------------------------------------------------------------- one shard


def _examine(shard: Shard, output: Path, config: CheckConfig, version: str, num_classes: int | None) -> tuple[int, int]:
    """Examine one shard and write its three files; returns the number of its samples, and of the unusable ones."""
    end, num_unusable = ShardEnd(), 0
    formats: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    with (
        _rows_to(output / "samples" / f"{shard.name}.parquet", SAMPLE_SCHEMA) as write_sample,
        _findings_to(output / "findings" / f"{shard.name}.parquet") as findings,
        open_shard(shard) as stream,
        open_shard(shard) as headers,
    ):
        walk = _Walk(headers, config.max_key_bytes, config.limits)
        groups = iter(walk)
        for sample in iter_samples(stream, config.limits, end=end):
            name = sample_id(shard.name, sample.key)
            facts, oddities = _facts(sample, config, num_classes)
            write_sample({**facts, "sample_id": name, "shard": shard.name})
            group = next(groups, None)
            for kind, detail in oddities + (group.oddities if group else []):
                if kind in ("no_image", "image_of_other_format") and group and not detail:
                    detail = _instead(group.suffixes)
                findings.add(kind, detail, shard.name, name, sample.index)
            num_unusable += facts["error"] is not None
            formats[facts["format"] or "none"] += 1
            modes[facts["mode"] or "none"] += 1
        for _ in groups:  # to the tar's end, and what is behind it
            pass
        for kind, detail in walk.verdict(end):
            findings.add(kind, detail, shard.name)
    record = {
        "version": version,
        "num_bytes": shard.num_bytes,
        "num_samples": end.num_samples,
        "num_unusable": num_unusable,
        "formats": formats,
        "modes": modes,
        "findings": findings.counts,
        "first": findings.first,
    }
    write_json(_record_path(output, shard), record)
    return end.num_samples, num_unusable


@contextlib.contextmanager
def _rows_to(path: Path, schema: pa.Schema) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write rows to a Parquet file as they come; absent or whole, and the same bytes for equal rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:

        def write(row: dict[str, Any] | None) -> None:
            if row is not None:
                rows.append(row)
            if row is None or len(rows) == _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()

        yield write
        write(None)
    temporary.replace(path)


@dataclass
class _Findings:
    """Writes findings, and counts them by kind."""

    write: Callable[[dict[str, Any]], None]
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # where each kind was met first

    def add(
        self, kind: str, detail: str, shard: str | None = None, sample: str | None = None, index: int | None = None
    ) -> None:
        row = (sample, shard, index, kind, FINDINGS[kind][0], printable(detail))
        self.write(dict(zip(FINDING_SCHEMA.names, row, strict=True)))
        self.counts[kind] += 1
        self.first.setdefault(kind, sample or ": ".join(filter(None, [shard, printable(detail)])))


@contextlib.contextmanager
def _findings_to(path: Path) -> Iterator[_Findings]:
    with _rows_to(path, FINDING_SCHEMA) as write:
        yield _Findings(write)


def printable(text: str, most: int = 200) -> str:
    r"""Shorten a stranger's text, and escape what a terminal would obey or hide: `a\x1b[2J`."""
    return repr(text[:most])[1:-1] + "..." * (len(text) > most)


# ------------------------------------------------------------------------------------------- its headers


class _Header(TarHeader):
    """A tar header that notes what the reader met where it expected the next one."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)  # type: ignore[return-value]
        except tarfile.HeaderError as error:
            tar.ending = type(error).__name__  # type: ignore[attr-defined]
            raise


@dataclass
class _Group:
    """Facts from the headers of one sample."""

    key: str
    suffixes: set[str] = field(default_factory=set)
    oddities: list[tuple[str, str]] = field(default_factory=list)

    def add(self, kind: str, detail: str) -> None:
        if len(self.oddities) < _MOST_PER_GROUP:
            self.oddities.append((kind, detail))


class _Walk:
    """A walk over a tar's headers: one `_Group` for each sample of `iter_samples`, in its order.

    Of the contents only small JSON is looked at, for captions.
    """

    def __init__(self, stream: IO[bytes], max_key_bytes: int, limits: Limits):
        self._stream, self._max_key_bytes = stream, max_key_bytes
        self._captions, self._unread = limits.caption.suffixes, Unread(limits)
        self._is_gzipped, self._start = False, b""
        self._last: str | None = None  # member
        self._position = 0
        self._problem = ""
        self._ending = (
            ""  # tarfile's name for what was found instead of a next header; EOFHeaderError is as it should be
        )
        self._has_data_after_end = False
        self._special: list[str] = []
        self._first_stray, self._num_strays = "", 0
        self._ignored: dict[str, list[int]] = {}  # suffix -> members, bytes
        self._suffixes_of: dict[int, frozenset[str]] = {}  # hash of a key -> suffixes so far
        self._interned: dict[frozenset[str], frozenset[str]] = {}

    def __iter__(self) -> Iterator[_Group]:
        group: _Group | None = None
        grouping = Grouping()
        try:
            self._start = self._stream.read(NUM_BYTES)
            self._stream.seek(0)
            tar = open_tar(self._stream)
            tar.tarinfo = _Header
            self._is_gzipped = tar.is_gzipped
            while (member := tar.next()) is not None:
                self._last, self._position = member.name, member.offset
                if not member.isfile():
                    if not member.isdir() and len(self._special) < _MOST_PER_GROUP:
                        self._special.append(" -> ".join(filter(None, [member.name, member.linkname])))
                    continue
                place = grouping.place(member.name)
                if place is None:
                    self._first_stray = self._first_stray or member.name
                    self._num_strays += 1
                    continue
                key, suffix, is_first = place
                if group is None or is_first:
                    if group is not None:
                        yield self._finish(group)
                    group = _Group(key)
                    for kind in _odd_key(key, member.name, self._max_key_bytes):
                        group.add(kind, member.name)
                self._note(member, suffix, group)
                if not member.issparse():
                    self._unread.add(member.name, suffix, member.size, partial(tar.read, member))
            self._ending, self._position = getattr(tar, "ending", ""), tar.offset
            if self._ending == "EOFHeaderError":
                rest: Any = tar.fileobj
                self._has_data_after_end = any(block.strip(b"\0") for block in iter(lambda: rest.read(1 << 20), b""))
        except tarfile.ReadError as error:
            self._problem = str(error)
        if group is not None:
            yield self._finish(group)

    def _note(self, member: tarfile.TarInfo, suffix: str, group: _Group) -> None:
        for what, suffixes in (("image", IMAGE_SUFFIXES), ("caption", self._captions), ("label", LABEL_SUFFIXES)):
            if suffix in suffixes:
                if what != "image" and not group.suffixes.isdisjoint(suffixes):  # of images the sample has a note
                    group.add("repeated_member", f"another {what}: {member.name}")
                break
        else:
            if suffix.rpartition(".")[2] in DANGEROUS_SUFFIXES:
                group.add("dangerous_member", f"{member.name}, {member.size:,} bytes")
            kept = suffix if suffix in self._ignored or len(self._ignored) < _MOST_SUFFIXES else "(others)"
            ignored = self._ignored.setdefault(kept, [0, 0])
            ignored[0] += 1
            ignored[1] += member.size
        if len(group.suffixes) < _MOST_SUFFIXES:
            group.suffixes.add(suffix)

    def _finish(self, group: _Group) -> _Group:
        self._unread.end()
        key, here = _hash64(group.key), frozenset(group.suffixes)
        earlier = self._suffixes_of.get(key, frozenset())
        if earlier and earlier.isdisjoint(here):
            group.add("interleaved_members", f"{_listing(here)} here, {_listing(earlier)} before")
        self._suffixes_of[key] = self._interned.setdefault(here | earlier, here | earlier)
        return group

    def verdict(self, end: ShardEnd) -> Iterator[tuple[str, str]]:
        """Findings about the shard as a whole, in addition to what `iter_samples` found."""
        where = f"at byte {self._position:,}, in or behind {self._last}"
        if self._last is None:
            problem = why_no_tar(self._start) or self._problem or EMPTY
            yield ("shard_empty" if problem == EMPTY else "shard_unreadable"), problem
        elif not end.is_complete:
            is_between = self._ending == "EmptyHeaderError"
            detail = f"{where}: {self._problem}" if self._problem else where
            yield "shard_without_end" if is_between else "shard_ends_early", detail
        elif not end.num_samples:
            yield "shard_empty", ""
        if self._has_data_after_end:
            yield "shard_data_after_end", where
        if self._is_gzipped:
            yield "shard_gzipped", ""
        for name in self._special:
            yield "special_member", name
        if self._num_strays:
            yield "stray_members", f"{self._first_stray}, {self._num_strays:,} in all"
        for part, sentence in itertools.islice(self._unread.sentences(), _MOST_PER_GROUP):
            yield f"{part}_elsewhere", sentence
        for suffix, (num, num_bytes) in sorted(self._ignored.items()):
            yield "ignored_members", f".{suffix}: {num:,} members, {num_bytes:,} bytes"


def _listing(suffixes: frozenset[str]) -> str:
    return ", ".join(f".{suffix}" for suffix in sorted(suffixes))


def _instead(suffixes: set[str]) -> str:
    """What a sample without an image has that looks like one."""
    compound = sorted(suffix for suffix in suffixes if suffix.rpartition(".")[2] in IMAGE_SUFFIXES)
    if compound:
        return f"but .{compound[0]}: keys end at the first dot of a name, so this is no image's suffix"
    return "; ".join(f"but .{suffix}, which is not read" for suffix in sorted(suffixes & OTHER_IMAGE_SUFFIXES)[:1])


def _odd_key(key: str, name: str, max_bytes: int) -> Iterator[str]:
    if key.endswith("/"):
        yield "key_empty"
    if any("\udc80" <= character <= "\udcff" for character in name):  # tarfile's way to hand over what is not UTF-8
        yield "key_not_utf8"
    if not key.isprintable():
        yield "key_odd_characters"
    if key.startswith("/") or "\\" in name or re.match("[A-Za-z]:", key) or ".." in key.split("/"):
        yield "key_path_like"
    if len(key.encode()) > max_bytes:
        yield "key_too_long"


# ------------------------------------------------------------------------------------------- its samples


def _facts(
    sample: Sample, config: CheckConfig, num_classes: int | None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Decode a sample as scoring does; returns its row of `SAMPLE_SCHEMA` but for the ids, and what is odd about it."""
    facts: dict[str, Any] = {
        "index": sample.index,
        "error": sample.error,
        "format": None,
        "mode": None,
        "label": sample.label,
        "key_hash": _hash64(sample.key),
        "content_hash": sample.content_hash(),
    }
    oddities: list[tuple[str, str]] = []
    what = ""
    if sample.image is not None:
        header, oddities = _header(sample.image, sample.image_suffix)
        facts |= {"image_bytes": len(sample.image), **header}
        what = f"{header['width']:,} x {header['height']:,} px" if header else _guess(sample.image)
        if facts["error"] is None:
            try:  # a large JPEG at reduced size: that is faster, but all of the file is read all the same
                image_HWC = decode_image(sample.image, config.limits, enough_px=THUMBNAIL_PX)
            except BadSample as bad:
                facts["error"] = bad.reason
            else:
                shorter, longer = sorted((header["width"], header["height"]))
                facts["perceptual_hash"] = perceptual_hash(image_HWC)
                is_so = {
                    "image_small": shorter < config.min_side_px,
                    "image_elongated": longer > config.max_aspect * shorter,
                    "image_uniform": facts["perceptual_hash"] is None,
                }
                oddities += [(kind, what) for kind, is_it in is_so.items() if is_it]
    if facts["error"] is not None:
        oddities.insert(0, (facts["error"], what))
    oddities += [(note, "") for note in sample.notes]
    if sample.caption is not None:
        text = sample.caption.strip()
        facts |= {"caption_chars": len(sample.caption), "caption_hash": _hash64(text)}
        facts["caption_start"] = printable(text, 80)
        oddities += [(kind, facts["caption_start"]) for kind in _odd_caption(sample.caption)]
    elif config.captions and facts["error"] is None and "caption_unreadable" not in sample.notes:
        oddities.append(("caption_missing", ""))
    if sample.label is not None and num_classes is not None and not 0 <= sample.label < num_classes:
        oddities.append(("label_without_name", f"{sample.label}; the classes are 0 to {num_classes - 1}"))
    return facts, oddities


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


_FORMATS = {**dict.fromkeys(("jpg", "jpeg", "jpe", "jfif"), "JPEG"), "png": "PNG", "webp": "WEBP", "bmp": "BMP"}
_ABOUT_ROTATION = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")


def _header(content: bytes, suffix: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What an image's header says before anything is decoded, and what of it is odd; nothing if it cannot be read."""
    facts: dict[str, Any] = {}
    oddities: list[tuple[str, str]] = []
    try:
        with Image.open(io.BytesIO(without_notes(content)), formats=IMAGE_FORMATS) as image:
            kind = "JPEG" if image.format == "MPO" else image.format  # several JPEGs in one file
            mode, info = image.mode, image.info
            facts = {"format": kind, "mode": mode, "width": image.width, "height": image.height}
            # Pillow would decode a PNG to look for EXIF at its end.
            turn = orientation(image) if any(name in info for name in _ABOUT_ROTATION) else 1
            is_so = {
                "image_wrong_suffix": kind != _FORMATS.get(suffix),
                "image_animated": getattr(image, "is_animated", False),
                "image_cmyk": mode == "CMYK",
                "image_16bit": mode.startswith("I") or (kind == "PNG" and content[24:25] == b"\x10"),
                "image_palette": mode in ("P", "PA"),
                "image_alpha": mode in ("RGBA", "LA", "PA") or "transparency" in info,
                "image_rotated": turn in range(2, 9),
            }
            oddities = [(odd, f"{kind} {mode} named .{suffix}") for odd, is_it in is_so.items() if is_it]
    except Exception:  # whatever Pillow's parsers meet; whether the image can be used is for decode_image to say
        pass
    return facts, oddities


def _guess(content: bytes) -> str:
    """Name what was found in place of an image, if it is a familiar format."""
    return what_is(content[:NUM_BYTES]) or "of no known format"


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ue000-\uf8ff\ufffd-\uffff]")
# Bidirectional controls, zero widths (but for the joiners that Indic scripts, Persian and emoji need) and tags.
_HIDDEN = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_URL = re.compile(r"(?:https?|ftp)://|\bwww\.\w", re.IGNORECASE)


def _is_json(text: str) -> bool:
    try:
        return isinstance(parse_json(io.BytesIO(text.encode())), list | dict)
    except ValueError:
        return False


def _odd_caption(caption: str) -> Iterator[str]:
    if not caption.strip():
        yield "caption_empty"
    if caption.lstrip().startswith(("[", "{")) and _is_json(caption):
        yield "caption_json"
    if _CONTROL.search(caption):
        yield "caption_control_characters"
    if _HIDDEN.search(caption):
        yield "caption_hidden_characters"
    if not unicodedata.is_normalized("NFC", caption):
        yield "caption_not_nfc"
    if _URL.search(caption):
        yield "caption_url"


# ------------------------------------------------------------------------------------------ all together


class _Samples:
    """The rows of all shards' `samples` as one table, read column by column."""

    def __init__(self, output: Path, shards: list[Shard], num_samples: list[int]):
        self._paths = [output / "samples" / f"{shard.name}.parquet" for shard in shards]
        self.starts = [0, *itertools.accumulate(num_samples)]  # first row of each shard

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Values, 0 where there is none, and where there is one."""
        parts = [pq.read_table(path, columns=[name])[name] for path in self._paths]
        values_N = np.concatenate([part.fill_null(0).to_numpy() for part in parts])
        return values_N, np.concatenate([part.is_valid().to_numpy() for part in parts])

    def content_hashes(self) -> np.ndarray:
        """The first half of each content hash: uint64 (2, N), zeros without an image."""
        parts = []
        for path in self._paths:
            texts = pq.read_table(path, columns=["content_hash"])["content_hash"].to_pylist()
            digits = "".join(text[:32] or "0" * 32 for text in texts)
            parts.append(np.frombuffer(bytes.fromhex(digits), np.uint64).reshape(-1, 2))
        return np.ascontiguousarray(np.concatenate(parts).T)

    def texts(self, number: int) -> list[tuple[str, str]]:
        """Id and beginning of the caption of each sample of one shard."""
        table = pq.read_table(self._paths[number], columns=["sample_id", "caption_start"])
        return list(zip(table["sample_id"].to_pylist(), table["caption_start"].to_pylist(), strict=True))


def _compare_all(output: Path, shards: list[Shard], config: CheckConfig, classes_problem: str) -> dict[str, Any]:
    """Find what only several shards together show, write it, and sum everything up: the content of `summary.json`."""
    records = [read_json(_record_path(output, shard), "record of an examined shard") for shard in shards]
    num_samples = [record["num_samples"] for record in records]
    samples = _Samples(output, shards, num_samples)
    num = samples.starts[-1]
    row_N = np.arange(num)

    # Each of these holds, row by row, the first row that is like it: itself where there is none before.
    content_2N = samples.content_hashes()
    same_bytes_N = np.where(content_2N.any(axis=0), first_equal(*content_2N), row_N)
    hash_N, has_hash_N = samples.column("perceptual_hash")
    look_alike_N, num_cut = same_bytes_N.copy(), 0
    if config.near_distance is not None:
        hashed = np.flatnonzero(has_hash_N & (same_bytes_N == row_N))
        near, num_cut = first_near(hash_N[hashed], config.near_distance)
        look_alike_N[hashed] = hashed[near]
        look_alike_N = look_alike_N[same_bytes_N]  # a copy of a copy belongs to the first of the group
    same_key_N = first_equal(samples.column("key_hash")[0])
    caption_N, has_caption_N = samples.column("caption_hash")
    same_caption_N = np.where(has_caption_N, first_equal(caption_N, has_caption_N), row_N)
    sizes = [np.bincount(first_N, minlength=num) for first_N in (look_alike_N, same_key_N, same_caption_N)]
    num_look_alike_N, num_same_key_N, num_same_caption_N = sizes
    label_N, has_label_N = samples.column("label")
    is_relabelled_N = has_label_N & has_label_N[look_alike_N] & (label_N != label_N[look_alike_N])
    is_concerned_N = (num_look_alike_N[look_alike_N] > 1) | (num_same_key_N > 1) | (num_same_caption_N > 1)

    groups, repeated = _largest(num_look_alike_N), _largest(num_same_caption_N)
    ids: dict[int, str] = {}  # of rows that later ones refer to
    captions: dict[int, str] = {}
    with (
        _findings_to(output / "findings" / "all-shards.parquet") as findings,
        _rows_to(output / "duplicates.parquet", DUPLICATE_SCHEMA) as write_duplicate,
    ):
        if classes_problem:
            findings.add("classes_unreadable", classes_problem)
        if num_cut:
            findings.add("search_capped", f"near-duplicate search was capped for {num_cut:,} pictures")
        usual = np.median(num_samples)
        for shard, there in zip(shards, num_samples, strict=True):
            if not usual / 4 <= there <= usual * 4:
                findings.add("shard_size_odd", f"{there:,} samples; the median is {usual:,.0f}", shard.name)
        for number, shard in enumerate(shards):
            start, stop = samples.starts[number : number + 2]
            here = (start + np.flatnonzero(is_concerned_N[start:stop])).tolist()
            texts = samples.texts(number) if here else []
            for row in here:
                index = row - start
                name, caption = texts[index]
                add = partial(findings.add, shard=shard.name, sample=name, index=index)
                leader, copied = int(look_alike_N[row]), int(same_bytes_N[row])
                if num_look_alike_N[leader] > 1:
                    if copied == row:
                        ids[row] = name
                    has_bits = has_hash_N[row] and has_hash_N[leader]
                    bits = int(hamming(hash_N[[row]], hash_N[[leader]])[0]) if has_bits else None
                    likeness = "exact" if copied == leader else "near"
                    values = (name, ids[leader], likeness, bits)
                    write_duplicate(dict(zip(DUPLICATE_SCHEMA.names, values, strict=True)))
                    if copied != row:
                        add("exact_duplicate", f"of {ids[copied]}")
                    elif leader != row:
                        add("near_duplicate", f"of {ids[leader]}; {bits} of 64 bits differ")
                    if is_relabelled_N[row]:
                        add("duplicate_relabelled", f"label {label_N[row]}, but {label_N[leader]} at {ids[leader]}")
                if num_same_key_N[row] > 1:
                    add("key_in_other_shard", f"in {num_same_key_N[row]:,} shards")
                if num_same_caption_N[row] > 1:
                    add("caption_repeated", f"{num_same_caption_N[row]:,} samples: {caption}")
                    if row in repeated:
                        captions[row] = caption
    counts, first = findings.counts, findings.first
    for record in records:
        counts.update(record["findings"])
        first = {**record["first"], **first}
    return {
        "shards": len(shards),
        "bytes": sum(record["num_bytes"] for record in records),
        "samples": num,
        "usable": num - sum(record["num_unusable"] for record in records),
        "with_caption": int(has_caption_N.sum()),
        "with_label": int(has_label_N.sum()),
        "findings": {
            kind: {"level": FINDINGS[kind][0], "count": counts[kind], "first": first[kind]}
            for kind in sorted(counts, key=lambda kind: (LEVELS.index(FINDINGS[kind][0]), -counts[kind], kind))
        },
        "formats": _total(record["formats"] for record in records),
        "modes": _total(record["modes"] for record in records),
        **{
            name: _distribution(*samples.column(column))
            for name, column in (
                ("width_px", "width"),
                ("height_px", "height"),
                ("image_bytes", "image_bytes"),
                ("caption_chars", "caption_chars"),
            )
        },
        "samples_per_shard": _distribution(np.array(num_samples)),
        "shard_bytes": _distribution(np.array([record["num_bytes"] for record in records])),
        "look_alikes": {
            "groups": int((num_look_alike_N > 1).sum()),
            "samples": int(num_look_alike_N[num_look_alike_N > 1].sum()),
            "largest": [{"first": ids[row], "samples": int(num_look_alike_N[row])} for row in groups],
        },
        "repeated_captions": {
            "captions": int((num_same_caption_N > 1).sum()),
            "samples": int(num_same_caption_N[num_same_caption_N > 1].sum()),
            "largest": [{"caption": captions[row], "samples": int(num_same_caption_N[row])} for row in repeated],
        },
    }


def _largest(size_N: np.ndarray) -> list[int]:
    """The first rows of the largest groups, largest first."""
    rows = np.flatnonzero(size_N > 1)
    return rows[np.argsort(-size_N[rows], kind="stable")[:_LISTED]].tolist()


def _total(counters: Iterable[dict[str, int]]) -> dict[str, int]:
    together: Counter[str] = Counter()
    for counter in counters:
        together.update(counter)
    return dict(sorted(together.items(), key=lambda item: (-item[1], item[0])))


def _distribution(values_N: np.ndarray, is_known_N: np.ndarray | None = None) -> dict[str, int] | None:
    values_N = values_N if is_known_N is None else values_N[is_known_N]
    if not len(values_N):
        return None
    percents = {"min": 0, "p1": 1, "p25": 25, "median": 50, "p75": 75, "p99": 99, "max": 100}
    found = np.percentile(values_N, list(percents.values()), method="nearest")
    return {name: int(value) for name, value in zip(percents, found, strict=True)}


def _screen(output: str, summary: dict[str, Any]) -> str:
    """What a person should know, on one screen."""
    num, usable = summary["samples"], summary["usable"]
    lines = [f"{num:,} samples in {summary['shards']:,} shards: {usable:,} can be used, {num - usable:,} cannot"]
    for level in LEVELS:
        kinds = [(kind, found) for kind, found in summary["findings"].items() if found["level"] == level]
        lines += [f"{level}s"] * bool(kinds)
        for kind, found in kinds[:10]:
            line = f"{found['count']:>9,} {kind}: {FINDINGS[kind][1]}"
            if kind in _ADVICE and len(line) + len(found["first"]) > _SCREEN_CHARS:  # which should not be cut
                lines += [f"{line}; first", f"          {printable(found['first'], _SCREEN_CHARS)}"]
                continue
            example = printable(found["first"], _SCREEN_CHARS - len(line))
            lines.append(f"{line}; first {example}" if found["first"] else line)
        if len(kinds) > 10:
            lines.append(f"          and {len(kinds) - 10} more kinds")
    if groups := summary["look_alikes"]["largest"]:
        lines.append(
            f"{summary['look_alikes']['groups']:,} groups of look-alikes; the largest has {groups[0]['samples']:,}, "
            f"first {printable(groups[0]['first'], 60)}"
        )
    for name, what in (("width_px", "width"), ("height_px", "height"), ("caption_chars", "characters of a caption")):
        if spread := summary[name]:
            lines.append(f"{what}: {spread['min']:,} to {spread['max']:,}, median {spread['median']:,}")
    lines.append(f"more in {output}: summary.json, findings/, samples/, duplicates.parquet")
    return "\n".join(lines)
