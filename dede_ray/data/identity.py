"""Which shard is which: its name, its size and its content. Where it is, is written down for people only.

    identified(shards) -> the same with `Shard.digest`       compare(recorded, shards) -> Compared

So a pass is continued where its shards were moved, and is not where others were put in their place. A digest says what
it is made of: `etag:` is what an object store calls the content; `blocks:` a SHA-256 over the first and the last block
of a file and blocks in between, which costs a megabyte of reading however long the file is, and sees every change of a
file up to that size; `sha256:` the SHA-256 of all of it, where the settings ask for that; `version:` size and time, of
stores that say no more.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, Any

from dede_ray.data.shards import Shard, open_shard
from dede_ray.runtime.config import Mistake
from dede_ray.runtime.store import ObjectPath, is_url

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 16
NUM_BLOCKS = 16  # between the first and the last
AT_ONCE = 16


def identified(shards: Iterable[Shard], full: bool = False) -> list[Shard]:
    """The shards with their digests; those that have one keep it.

    Args:
        full: read them whole. Else what the store says of them, or some blocks.
    """
    find = partial(_digest, kind="sha256" if full else None)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(lambda one: one if one.digest else replace(one, digest=find(one)), shards))


@dataclass(frozen=True)
class Compared:
    """Shards of now beside those on record."""

    record: dict[str, Shard]
    """What is to be recorded if nothing has changed: by name, those of the record first."""
    changed: dict[str, str]
    """Names of the shards whose size or content is another, with what was there and what is now."""
    moved: list[str]
    """Names of the shards that are elsewhere now."""


def compare(recorded: Mapping[str, Shard], shards: Iterable[Shard]) -> Compared:
    """Compare shards with those of the same names on record; the one place that says whether a shard is the same.

    Where digests are of different kinds, the recorded kind is found of the shard of now. Records of earlier versions
    have no digest: size decides then, and today's digest goes on record.
    """
    shards = list(shards)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        comparable = threads.map(lambda one: _like(one, recorded.get(one.name)), shards)
    compared = Compared(dict(recorded), {}, [])
    for shard, alike in zip(shards, comparable, strict=True):
        there = recorded.get(shard.name)
        if there is not None and (there.num_bytes, there.digest or alike.digest) != (alike.num_bytes, alike.digest):
            compared.changed[shard.name] = f"{_said(there)} there, {_said(alike)} now"
        elif there is not None and there.url != shard.url:
            compared.moved.append(shard.name)
        is_better = there is not None and there.digest.startswith("sha256:")
        compared.record[shard.name] = alike if is_better else shard
    return compared


def _like(shard: Shard, there: Shard | None) -> Shard:
    """A shard with a digest of the kind that the record has, if there is a need and a way."""
    if there is None or not there.digest or there.num_bytes != shard.num_bytes:
        return shard
    kind = there.digest.partition(":")[0]
    if kind == shard.digest.partition(":")[0]:
        return shard
    if is_url(shard.url) or kind in ("blocks", "sha256"):
        return replace(shard, digest=_digest(shard, kind))
    if re.fullmatch("etag:[0-9a-f]{32}", there.digest):  # of an object that was put in one piece it is the MD5
        with open_shard(shard) as stream:
            return replace(shard, digest=f"etag:{_whole(stream, hashlib.md5(usedforsecurity=False))}")
    return shard


def _digest(shard: Shard, kind: str | None) -> str:
    """The digest of one kind; None takes the cheapest that there is."""
    if is_url(shard.url) and kind in (None, "etag", "version"):
        there = ObjectPath(shard.url)
        etag = there.etag()
        return f"etag:{etag}" if etag else f"version:{there.version()}"
    if kind == "sha256":
        with open_shard(shard) as stream:
            return f"sha256:{_whole(stream, hashlib.sha256())}"
    digest = hashlib.sha256(str(shard.num_bytes).encode())
    with open_shard(shard) as stream:
        for start in _starts(shard.num_bytes):
            stream.seek(start)
            digest.update(stream.read(BLOCK_BYTES))
    return f"blocks:{digest.hexdigest()}"


def _whole(stream: IO[bytes], digest: Any) -> str:
    while content := stream.read(1 << 20):
        digest.update(content)
    return digest.hexdigest()


def _starts(num_bytes: int) -> list[int]:
    """Where the blocks of a file of this size begin: all of them where they are few, else by a key of the size."""
    if num_bytes <= (NUM_BLOCKS + 2) * BLOCK_BYTES:
        return [*range(0, num_bytes, BLOCK_BYTES)]
    last = num_bytes - BLOCK_BYTES
    keys = [hashlib.sha256(f"{num_bytes} {number}".encode()).digest()[:8] for number in range(NUM_BLOCKS)]
    return sorted({0, *(int.from_bytes(key, "big") % last for key in keys), last})


def _said(shard: Shard) -> str:
    kind, _, value = shard.digest.partition(":")
    return f"{shard.num_bytes:,} bytes" + (f" ({kind} {value[:12]})" if kind else "")


def require_same(recorded: Mapping[str, Shard], shards: Iterable[Shard], what: str, remedy: str) -> Compared:
    """`compare`, where a shard that has changed is a mistake.

    Args:
        what: whose record it is.
        remedy: what to do, for the message.

    Raises:
        Mistake: size or content of a shard is another than on record.
    """
    compared = compare(recorded, shards)
    if compared.changed:
        raise Mistake(
            f"{what} holds what came of other shards of the same names; {len(compared.changed):,} have changed since "
            f"they were read:\n  {listed(compared.changed)}\nput the former ones back; or {remedy}"
        )
    if compared.moved:
        logger.info(
            "%s: %s shards are elsewhere now, such as %s; names, sizes and contents are the same",
            what, f"{len(compared.moved):,}", compared.record[compared.moved[0]].url,
        )  # fmt: skip
    return compared


def shard_entry(shard: Shard) -> dict[str, Any]:
    """A shard as records keep it."""
    return {"url": shard.url, "num_bytes": shard.num_bytes, **({"digest": shard.digest} if shard.digest else {})}


def recorded_shards(entries: dict[str, Any]) -> dict[str, Shard]:
    """The shards on record by their names; early versions recorded `"<url>, 1,234 bytes"`, later ones no digest.

    Raises:
        AttributeError, KeyError, TypeError or ValueError: it is no such record.
    """
    shards = {}
    for name, entry in entries.items():
        if isinstance(entry, str):
            url, _, size = entry.rpartition(", ")
            entry = {"url": url, "num_bytes": size.removesuffix(" bytes").replace(",", "")}
        shards[name] = Shard(name, str(entry["url"]), int(entry["num_bytes"]), str(entry.get("digest", "")))
    return shards


def listed(changed: Mapping[str, str]) -> str:
    """Changed shards for a message: the first ten."""
    lines = [f"{name}: {how}" for name, how in changed.items()]
    more = [f"and {len(lines) - 10:,} more"] if len(lines) > 10 else []
    return "\n  ".join([*lines[:10], *more])
