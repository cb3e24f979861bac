"""Sift: shards without the samples that a manifest flags, and lists that leave them out elsewhere.

    <output>/<shard>.tar               the shard, its kept samples byte for byte; not there if none is left
    <output>/exclude/samples.txt       ids of the dropped samples, one a line, written as in flagged.txt
    <output>/exclude/keys.json         {"<shard name>": ["<key>", ...]}
    <output>/exclude/samples.parquet   the dropped rows of the manifest, with key, url and reason
    <output>/sift.json                 which manifest it was, and the counts
    <output>/parts/<shard>.json        a shard's receipt: it is done and is not made again

With webdataset, and all that reads through it, this leaves the dropped samples out:

    dropped = {(shard, key) for shard, keys in json.load(open("exclude/keys.json")).items() for key in keys}
    data = data.select(lambda sample: (sample["__url__"].rpartition("/")[2], sample["__key__"]) not in dropped)

img2dataset has no list of exclusions, so the links are left out of its input (all links of a dropped image's url):

    dropped = pandas.read_parquet("exclude/samples.parquet")["url"].dropna()
    links = links[~links["url"].isin(dropped)]

open_clip's trainer reads tars: give it the sifted ones. Where a key occurs twice in a shard, its second sample has an
id of its own (`<key>#<index>`), and the sifted shards leave out that one alone; keys.json and a link leave out both.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from errno import EINVAL, ENOSYS, EOPNOTSUPP, EPERM, EXDEV
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field

from dede_ray.data.captions import read_classes
from dede_ray.data.identity import identified, shard_entry
from dede_ray.data.ledger import read_parquet, write_parquet
from dede_ray.data.shards import (
    IMAGE_SUFFIXES,
    Grouping,
    Limits,
    Note,
    Shard,
    list_shards,
    open_shard,
    sample_id,
    split_name,
)
from dede_ray.data.tar import Tar, open_tar, write_whole
from dede_ray.runtime.config import (
    Config,
    Mistake,
    as_settings,
    claim,
    finish,
    parse_json,
    read_json,
    write_atomically,
    write_json,
)
from dede_ray.runtime.lease import leased
from dede_ray.runtime.session import start_ray
from dede_ray.runtime.store import Place
from dede_ray.scan.decisions import AssumedPoisonRate, FixedThreshold
from dede_ray.scan.manifest import Manifest, read_manifest, require_made_of

logger = logging.getLogger(__name__)

BLOCK = 512  # bytes: what a tar is made of
RECORD = 20 * BLOCK  # bytes: what its length is filled up to
READ_BYTES = 1 << 20


class Flagged(Config):
    """What the manifest's decision flagged."""

    kind: Literal["flagged"] = "flagged"


class Listed(Config):
    """What a file lists."""

    kind: Literal["listed"] = "listed"
    path: str
    """Sample ids, one a line, written as in flagged.txt."""


Drop = Annotated[Flagged | FixedThreshold | AssumedPoisonRate | Listed, Field(discriminator="kind")]


class SiftConfig(Config):
    """Settings of jobs/sift.py."""

    shards: str | list[str]
    """The shards that were scored, all of them."""
    manifest: str
    """Folder that jobs/score.py wrote."""
    output: str
    drop: Drop = Flagged()
    """Which samples go: those flagged, the scores from a threshold on, a share of the highest ones, or a list."""
    duplicates: bool = False
    """Drop every copy of a dropped image, too (the manifest's group_id)."""
    unreadable: bool = False
    """Drop the samples that could not be scored, too, and those with several images, of which one was scored."""
    lists_only: bool = False
    """Write the lists, but no shards."""
    full_digest: bool = False
    """Know shards again by all of their bytes, which are read for it, and not by some."""
    verify: bool = False
    """Compare every image with the content hash of the manifest, not only those of the dropped samples; names are
    compared anyhow. SHA-256 nearly halves the speed."""


def sift(config: SiftConfig | dict[str, Any] | str | Path) -> str:
    """Copy shards without the samples to drop, and list those. A rerun does what remains.

    Kept samples keep their order and their bytes: tar headers, contents and members of unknown kinds. With a dropped
    sample all of its members go, those that strayed from it included; files of no sample stay. A shard that is cut
    short stays cut short, a gzipped one stays gzipped. What follows the end of a tar is not copied. One Ray task per
    shard, so manifest and output must be folders that all machines see.

    Returns:
        One line: how many samples were kept and dropped, and where they are. A second one if the manifest's decision
        promised nothing.

    Raises:
        Mistake: the shards are not those of the manifest, the output folder is theirs or belongs to another run, or
            the list names samples that do not exist.

    Example:
        >>> import dede_ray
        >>> said = dede_ray.sift({
        ...     "shards": "runs/digits/poisoned/train-*.tar", "manifest": "runs/digits/scores", "output": "runs/sifted"
        ... })
        >>> len(dede_ray.list_shards("runs/sifted")) > 0
        True
    """
    config = as_settings(SiftConfig, config)
    start_ray(config)
    output = Path(config.output).absolute()  # Ray's workers have another working folder
    shards = identified(list_shards(config.shards), config.full_digest)
    manifest = read_manifest(config.manifest)
    if not config.lists_only and output.resolve() in {Path(shard.url).parent.resolve() for shard in shards}:
        raise Mistake(f"output {config.output} is the folder of the shards themselves; choose another one")
    _check_names(shards, manifest)
    manifest.require_same_shards(shards)
    with leased(output):
        return _sift(config, output, shards, manifest)


def _sift(config: SiftConfig, output: Path, shards: list[Shard], manifest: Manifest) -> str:
    done = claim(output, config, places=("shards", "manifest"))
    made_of = _made_of(shards, manifest, output)
    if done:
        return done["summary"]
    dropped = _choose(manifest, config)

    todo = [shard for shard in shards if not _is_done(output, shard)]
    for litter in output.glob(".*.tmp-*"):  # of a run that was killed
        litter.unlink()
    logger.info("%d shards: %d to sift, %s samples to drop", len(shards), len(todo), f"{dropped.num_rows:,}")
    places: dict[str, list[int]] = {shard.name: [] for shard in shards}
    for name, index in zip(dropped["shard"].to_pylist(), dropped["index"].to_pylist(), strict=True):
        places[name].append(index)
    task, limits = ray.remote(sift_shard), Limits.model_validate(manifest.settings["limits"])
    ray.get([task.remote(s, manifest.rows_path(s.name), places[s.name], limits, config) for s in todo])

    receipts = {shard.name: _receipt(output, shard) for shard in shards}
    _write_lists(output / "exclude", dropped, receipts)
    if not config.lists_only and (classes := read_classes(shards)):
        write_json(output / "classes.json", classes.model_dump())
    num_samples = sum(receipt["num_samples"] for receipt in receipts.values())
    counts = {
        "samples": num_samples,
        "kept": num_samples - dropped.num_rows,
        "dropped": dict(sorted(Counter(dropped["reason"].to_pylist()).items())),
        "shards": len(shards),
        "shards_without_samples": [name for name, receipt in receipts.items() if receipt["is_empty"]],
        "bytes": sum(receipt["num_bytes"] for receipt in receipts.values()),
        "bytes_kept": sum(receipt["num_bytes_kept"] for receipt in receipts.values()),
    }
    write_json(output / "sift.json", {**made_of, "decision": manifest.info["decision"], "counts": counts})
    summary = _summarise(config, counts, manifest)
    finish(output, config, {"counts": counts, "summary": summary})
    return summary


def _summarise(config: SiftConfig, counts: dict[str, Any], manifest: Manifest) -> str:
    reasons = ", ".join(f"{num:,} {reason}" for reason, num in counts["dropped"].items())
    summary = f"{counts['kept']:,} of {counts['samples']:,} samples kept, dropped: {reasons or 'none'}"
    if config.lists_only:
        summary += f"; lists in {config.output}/exclude"
    else:
        if empty := counts["shards_without_samples"]:
            summary += f"; {len(empty):,} of {counts['shards']:,} shards have no sample left and are not written"
        summary += f" -> {config.output}"
    decision = manifest.info["decision"]
    if config.drop.kind == "flagged" and not decision["certified"]:
        mode = f" ({decision['mode']})" if decision.get("mode") else ""
        summary += f"\nwarning: the manifest's decision{mode} certifies nothing: {decision['message']}"
    elif config.drop.kind == "flagged" and not manifest.info["counts"]["flagged"]:
        summary += "\nthe manifest flags nothing"
    return summary


def _check_names(shards: list[Shard], manifest: Manifest) -> None:
    given, scored = {shard.name for shard in shards}, set(manifest.info["shards"])
    for names, what in ((given - scored, "given, but not in the manifest"), (scored - given, "in it, but not given")):
        if names:
            listing = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
            raise Mistake(
                f"the manifest at {manifest.folder} is one of other shards: {listing} {what}; "
                "name exactly the shards that were scored"
            )


def _made_of(shards: list[Shard], manifest: Manifest, output: Path) -> dict[str, Any]:
    """Record what the output is made of, and stop if the folder was made of something else."""
    made_of: dict[str, Any] = {
        "manifest": {"path": str(manifest.folder), "fingerprint": manifest.fingerprint()},
        "shards": {shard.name: shard_entry(shard) for shard in shards},
    }
    path = output / "sift.json"
    if path.is_file():
        require_made_of(read_json(path, "record of a sifting"), made_of, {"shards": shards}, output)
    if not path.is_file():
        write_json(path, made_of)
    return made_of


# ------------------------------------------------------------------------------------------------ what goes


def _choose(manifest: Manifest, config: SiftConfig) -> pa.Table:
    """Rows of the manifest that are to go, sorted by sample id, with columns `key` and `reason`."""
    table = manifest.table
    ids, index = table["sample_id"].to_pylist(), table["index"].to_pylist()
    reason = np.full(table.num_rows, "", object)  # of those that stay

    def add(mask: np.ndarray, name: str) -> None:
        reason[mask & (reason == "")] = name

    add(_chosen(table, ids, manifest, config.drop), config.drop.kind)
    if config.duplicates:
        groups = pc.unique(table.filter(pa.array(reason != ""))["group_id"].drop_null())
        add(pc.is_in(table["group_id"], value_set=groups).to_numpy(), "duplicate")
    if config.unreadable:
        add(pc.is_valid(table["error"]).to_numpy(), "unreadable")
        add(_noted(table, "several_images"), "several_images")
    # A key that comes again without an image is what strayed from a sample, in an archive whose members are shuffled.
    keys = [each.partition("/")[2] for each in ids]
    is_again = pc.equal(table["error"], "duplicate_key").fill_null(False).to_numpy() | _noted(table, "key_again")
    keys = [
        key.removesuffix(f"#{place}") if again else key for key, place, again in zip(keys, index, is_again, strict=True)
    ]
    raw = [*zip(table["shard"].to_pylist(), keys, strict=True)]
    gone = {raw[row] for row in np.flatnonzero(reason)}
    for row in np.flatnonzero(pc.equal(table["content_hash"], "").to_numpy()):
        if not reason[row] and raw[row] in gone:
            reason[row] = "fragment"
    table = table.append_column("key", pa.array(keys, pa.string()))
    table = table.append_column("reason", pa.array(reason, pa.string()))
    return table.filter(pa.array(reason != ""))


def _noted(table: pa.Table, note: Note) -> np.ndarray:
    """bool (N,): which rows have a note."""
    if "notes" not in table.column_names:  # of an earlier version
        return np.zeros(table.num_rows, bool)
    return np.array([note in (notes or ()) for notes in table["notes"].to_pylist()], bool)


def _chosen(table: pa.Table, ids: list[str], manifest: Manifest, drop: Drop) -> np.ndarray:
    """bool (N,): what the rule itself picks."""
    if isinstance(drop, Flagged):
        return table["flagged"].fill_null(False).to_numpy()
    if isinstance(drop, Listed):
        listed = _read_ids(drop.path)
        if unknown := sorted(listed - set(ids)):
            raise Mistake(
                f"{len(unknown):,} of the {len(listed):,} ids in {drop.path} are not in the manifest at "
                f"{manifest.folder}, the first of them {unknown[0]!r}; expected <shard file name>/<key>, one a line"
            )
        return np.array([each in listed for each in ids], bool)
    if drop.score not in manifest.score_columns:
        raise Mistake(f"drop.score is {drop.score!r}; the manifest has {', '.join(manifest.score_columns)}")
    scores = table[drop.score].to_numpy().astype(np.float32)
    return drop.decide(scores, None, ids).flagged


def _read_ids(path: str) -> set[str]:
    try:
        lines = Path(path).read_text().split("\n")
        return {json.loads(f'"{line}"') for line in lines if line}
    except (OSError, ValueError) as error:
        raise Mistake(f"{path} should list sample ids as flagged.txt does, but cannot be read: {error}") from None


def _write_lists(folder: Path, dropped: pa.Table, receipts: dict[str, dict[str, Any]]) -> None:
    ids, shards, keys = (dropped[name].to_pylist() for name in ("sample_id", "shard", "key"))
    write_atomically(folder / "samples.txt", "".join(f"{json.dumps(each)[1:-1]}\n" for each in ids))
    by_shard: dict[str, list[str]] = {}
    for shard, key in dict.fromkeys(zip(shards, keys, strict=True)):
        by_shard.setdefault(shard, []).append(key)
    write_json(folder / "keys.json", by_shard)
    urls = [
        receipts[shard]["urls"].get(str(index))
        for shard, index in zip(shards, dropped["index"].to_pylist(), strict=True)
    ]
    write_parquet(dropped.append_column("url", pa.array(urls, pa.string())), folder / "samples.parquet")


# ------------------------------------------------------------------------------------------------ one shard


def sift_shard(shard: Shard, rows_path: Place, places: list[int], limits: Limits, config: SiftConfig) -> None:
    """Copy one shard without the samples at the given places, then write its receipt.

    Args:
        shard: what to copy.
        rows_path: its rows of the manifest.
        places: of the samples to drop, counted from 0 as the manifest's `index`.
        limits: those of the scoring.
        config: of the job.
    """
    output = Path(config.output).absolute()
    rows = read_parquet(rows_path, ["sample_id", "index", "content_hash"])
    judge = _Judge(shard, rows.sort_by("index"), frozenset(places), limits, config.verify)
    is_empty = len(judge.dropped) == rows.num_rows
    path = None if config.lists_only or is_empty else output / shard.name
    with open_shard(shard) as stream:
        is_zipped = open_tar(stream).is_gzipped
    sift_tar = _sift_stream if is_zipped or "://" in shard.url else _sift_file
    # Unbuffered: the kernel copies into it directly.
    with write_whole(path, is_zipped, buffering=0) if path else contextlib.nullcontext() as sink:
        num_bytes_kept = sift_tar(shard, judge, sink)
        judge.finish()
    receipt = {
        "num_samples": rows.num_rows,
        "num_bytes": shard.num_bytes,
        "num_bytes_kept": num_bytes_kept,
        "is_empty": is_empty,
        "urls": judge.urls,
    }
    write_json(_receipt_path(output, shard), receipt)


def _receipt_path(output: Path, shard: Shard) -> Path:
    return output / "parts" / f"{shard.name}.json"


def _receipt(output: Path, shard: Shard) -> dict[str, Any]:
    return read_json(_receipt_path(output, shard), "receipt of a sifted shard")


def _is_done(output: Path, shard: Shard) -> bool:
    return _receipt_path(output, shard).is_file()  # it is written after the shard


class _Judge:
    """Follows the members of a shard, finds the samples in them as `iter_samples` does, and says what is kept.

    Raises (all methods):
        Mistake: the samples are not those of the manifest.
    """

    def __init__(self, shard: Shard, rows: pa.Table, dropped: frozenset[int], limits: Limits, verify: bool):
        self.shard, self.dropped, self.limits, self.verify = shard, dropped, limits, verify
        self.ids, self.hashes = rows["sample_id"].to_pylist(), rows["content_hash"].to_pylist()
        self.urls: dict[int, str] = {}
        self._dropped_keys = {self.ids[i].partition("/")[2].removesuffix(f"#{i}") for i in dropped}
        self._key: str | None = None
        self._index = -1
        self._awaits_image, self._image = False, (len(IMAGE_SUFFIXES), "")
        self._grouping = Grouping()

    def keeps(self, member: _Member) -> bool:
        """Decide about the next member."""
        if not member.is_file:  # a link, a folder: of no sample, but it may name one
            return split_name(member.name)[0] not in self._dropped_keys
        place = self._grouping.place(member.name)
        if place is None:
            return True
        suffix = place.suffix
        if place.is_first:
            self._close()
            self._key, self._index = place.key, self._index + 1
            self._open()
        is_small = not member.is_sparse and member.size <= self.limits.max_member_bytes
        if self._awaits_image and suffix in IMAGE_SUFFIXES[: self._image[0]]:
            content = member.read() if is_small else b""
            is_whole = is_small and len(content) == member.size
            self._image = IMAGE_SUFFIXES.index(suffix), hashlib.sha256(content).hexdigest() if is_whole else ""
        if self._index not in self.dropped:
            return True
        if suffix == "json" and is_small and (url := _url_in(member.read())):
            self.urls[self._index] = url
        return False

    def finish(self) -> None:
        """Say that the shard has ended."""
        self._close()
        self._awaits_image = False
        if self._index + 1 < len(self.ids):
            self._complain(f"it has {self._index + 1:,} samples, the manifest {len(self.ids):,}")

    def _open(self) -> None:
        if self._index >= len(self.ids):
            self._complain(f"it has more samples than the manifest, which has {len(self.ids):,}")
        found, scored = sample_id(self.shard.name, cast(str, self._key)), self.ids[self._index]
        is_again = scored.startswith(f"{found}#") and scored.endswith(f"#{self._index}")  # a repeated key
        if scored != found and not is_again:
            self._complain(f"sample {self._index:,} is {found}, in the manifest {scored}")
        self._awaits_image, self._image = self.verify or self._index in self.dropped, (len(IMAGE_SUFFIXES), "")

    def _close(self) -> None:
        if self._awaits_image:
            self._compare(self._image[1])

    def _compare(self, found: str) -> None:
        scored = self.hashes[self._index]
        if found != scored:
            self._complain(
                f"the image of {self.ids[self._index]} has the SHA-256 {found[:12] or '(no image)'}, "
                f"the one scored {scored[:12] or '(no image)'}"
            )

    def _complain(self, what: str) -> None:
        raise Mistake(
            f"{self.shard.url} is not the shard that was scored: {what}; name the shards that were scored, "
            "or score these"
        )


def _url_in(content: bytes) -> str | None:
    """The url in a .json member as img2dataset writes it; None unless it is there and can be written to a file."""
    try:
        found = parse_json(io.BytesIO(content), nan=True)
        url = found.get("url") if isinstance(found, dict) else None
        return url if isinstance(url, str) and url.encode() else None
    except ValueError:
        return None


def _write_end(sink: IO[bytes] | None, num_bytes: int) -> None:
    if sink is not None:
        sink.write(bytes(2 * BLOCK + -(num_bytes + 2 * BLOCK) % RECORD))


class _Member(NamedTuple):
    """A member of a tar and its place there, in bytes: from `start`, where its headers begin, to `end`."""

    name: str
    size: int
    is_file: bool
    is_sparse: bool
    start: int
    end: int
    read: Callable[[], bytes]
    """Its content, shorter than `size` where the data end inside; not for sparse ones."""


def _described(tar: Tar, info: tarfile.TarInfo) -> _Member:
    """The member that a tar has just come to."""

    def read() -> bytes:
        try:
            return tar.read(info)
        except tarfile.ReadError:
            return b""

    return _Member(info.name, info.size, info.isfile(), info.issparse(), info.offset, tar.offset, read)


# ------------------------------------------------------------------------------------- a tar in a local file


def _sift_file(shard: Shard, judge: _Judge, sink: IO[bytes] | None) -> int:
    """Copy what is kept of a plain local tar, in as few and large pieces as it comes in; returns its bytes."""
    with open(shard.url, "rb", buffering=0) as file:
        tar = open_tar(cast(IO[bytes], file))
        num_bytes = os.fstat(file.fileno()).st_size
        kept, start, end = 0, 0, 0

        def keep_until(stop: int) -> None:
            nonlocal kept
            if start < stop:
                kept += stop - start
                if sink is not None:
                    _copy(file.fileno(), sink, start, stop)

        for member in _members(tar, file):
            end = min(member.end, num_bytes)
            if not judge.keeps(member):
                keep_until(member.start)
                start = end
        keep_until(end)
        if tar.is_closed:
            _write_end(sink, kept)
    return kept


def _copy(source: int, sink: IO[bytes], start: int, stop: int) -> None:
    """Append a part of a file, inside the kernel if it can."""
    in_kernel = isinstance(sink, io.FileIO) and hasattr(os, "copy_file_range")
    while start < stop:
        if in_kernel:
            try:
                num = os.copy_file_range(source, sink.fileno(), min(stop - start, 1 << 30), offset_src=start)
            except OSError as error:
                if error.errno not in (EINVAL, ENOSYS, EOPNOTSUPP, EPERM, EXDEV):
                    raise
                in_kernel = False
                continue
        else:
            num = sink.write(os.pread(source, min(stop - start, READ_BYTES), start))
        if num == 0:
            raise RuntimeError("a shard became shorter while it was read")
        start += num


# A header as nearly all are: a regular file, its name ASCII and shorter than 100 bytes, no prefix, octal numbers.
_COMMON_HEADER = re.compile(
    rb"(?=([\x20-\x7e]{1,99})\0).{100}"
    rb"(?:[0-7]{6}[0-7 ][\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})[\0 ]{2}0"
    rb".{172}(?:[0-7]{7}\0|\0{8}){2}\0.{166}",
    re.DOTALL,
)


def _members(tar: Tar, file: io.FileIO) -> Iterator[_Member]:
    """List a tar's members without reading them, as far as `tar` itself goes.

    Its 20 us a member would be most of the work, so common headers are parsed here, and all others by it.
    """
    tar.next()  # it has read the first one; from here on it reads where we send it
    position = 0
    while True:
        header = os.pread(file.fileno(), BLOCK, position)
        common = _COMMON_HEADER.match(header)
        if common and int(common[3], 8) == sum(header.translate(None, b"\0")) - sum(header[148:156]) + 8 * ord(" "):
            size, data = int(common[2], 8), position + BLOCK
            read = partial(os.pread, file.fileno(), size, data)
            member = _Member(common[1].decode(), size, True, False, position, data + size + -size % BLOCK, read)
        else:
            file.seek(position)
            tar.offset = position
            try:
                info = tar.next()
            except tarfile.ReadError:  # the data stop, or turn into rubbish
                return
            if info is None:
                return
            member = _described(tar, info)
        yield member
        position = member.end


# ------------------------------------------------------------------------------------- any other tar, a stream


def _sift_stream(shard: Shard, judge: _Judge, sink: IO[bytes] | None) -> int:
    """Copy what is kept of a tar that is compressed or far away, reading it once; returns its bytes, unpacked."""
    with open_shard(shard) as stream:
        tar = open_tar(stream, _Tap)
        tap = cast(_Tap, tar.fileobj)
        tap.sink = sink
        with contextlib.suppress(tarfile.ReadError):  # the data stop, or turn into rubbish
            for info in tar:
                member = _described(tar, info)
                tap.settle(member.start, member.end, judge.keeps(member))
    if tar.is_closed:
        _write_end(sink, tap.num_bytes_kept)
    return tap.num_bytes_kept


class _Tap:
    """Stands between `tarfile` and its stream: holds what was read until it is known whether it is kept."""

    def __init__(self, source: IO[bytes]):
        self.source = source
        self.sink: IO[bytes] | None = None
        self.num_bytes_kept = 0
        self.held = bytearray()
        self._position = self._settled_until = 0
        self._keeps = False

    def settle(self, start: int, end: int, keeps: bool) -> None:
        """Decide about the member from `start` to `end`; what is held before it is of no member and kept."""
        held_from = self._position - len(self.held)
        self._pass(bytes(self.held[: start - held_from]))
        if keeps:
            self._pass(bytes(self.held[start - held_from :]))
        self.held.clear()
        self._settled_until, self._keeps = end, keeps

    def read(self, size: int) -> bytes:
        content = self.source.read(size)
        if self._position >= self._settled_until:
            self.held += content
        elif self._keeps:
            self._pass(content)
        self._position += len(content)
        return content

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("bad header: points backwards")
        while self._position < position and self.read(min(READ_BYTES, position - self._position)):
            pass

    def tell(self) -> int:
        return self._position

    def _pass(self, content: bytes) -> None:
        self.num_bytes_kept += len(content)
        if self.sink is not None:
            self.sink.write(content)
