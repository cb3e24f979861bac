"""One picture in two of corpus, calibration and clean fitting data: where that is, the promise of a list is not.

A calibration sample that is also judged was chosen together with what it is compared with, and a detector that learnt
a sample as clean calls it clean. What is the same is said by the bytes of the encoded picture (`content_hash`), and it
is looked for as early as costs little:

    require_other_shards(roles)       before anything: whole shards, by their digests
    require_apart(roles, ...)         before the passes, where all that is compared has at most 2 GB
    ScoreWork's `known` pictures      in the pass over a larger corpus: its first chunk that has a calibration sample
    refuse_common(...)                before a decision, from what the passes wrote: nothing is left out
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Literal

import ray

from dede_ray.data.first_bytes import NUM_BYTES, what_is
from dede_ray.data.ledger import read_parts
from dede_ray.data.shards import Limits, Shard, iter_samples, open_shard
from dede_ray.runtime.config import Mistake, read_json, write_json
from dede_ray.runtime.store import Place

logger = logging.getLogger(__name__)

MOST_BYTES = 2 * 10**9
"""What is read before the passes, at most; they read it again."""

Overlap = Literal["refuse", "leave_out"]


def picture(content_hash: str | None) -> bytes | None:
    """The name of a picture in sets: the first 16 bytes of its SHA-256."""
    return bytes.fromhex(content_hash[:32]) if content_hash else None


def pictures(content_hashes: Iterable[str | None]) -> set[bytes]:
    """The names of several; samples without a picture have none."""
    return {name for one in content_hashes if (name := picture(one)) is not None}


def known_pictures(folder: Place, shards: list[Shard]) -> frozenset[bytes]:
    """The readable pictures of a finished pass."""
    found: set[bytes] = set()
    for shard in shards:
        table = read_parts(folder, shard.name, ["content_hash", "error"])
        found |= pictures(table.filter(table["error"].is_null())["content_hash"].to_pylist())
    return frozenset(found)


def refuse_common(seen: Mapping[str, set[bytes] | frozenset[bytes]], overlap: Overlap) -> None:
    """Stop where two of these have a picture in common, unless those of the calibration are to be left out.

    Raises:
        Mistake: they have; with the count.
    """
    for one, other in _pairs(seen, overlap):
        if both := seen[one] & seen[other]:
            raise Mistake(_message(one, other, f"{len(both):,} pictures", overlap))


def require_other_shards(roles: Mapping[str, list[Shard]], overlap: Overlap) -> None:
    """Stop where one shard, by its digest, is named in two roles.

    Raises:
        Mistake: it is.
    """
    for one, other in _pairs(roles, overlap):
        digests = {(shard.num_bytes, shard.digest) for shard in roles[one]}
        both = [shard.name for shard in roles[other] if (shard.num_bytes, shard.digest) in digests]
        if both:
            raise Mistake(_message(one, other, f"{len(both):,} shards (such as {both[0]})", overlap))


def require_apart(
    roles: Mapping[str, list[Shard]], folders: Mapping[str, Place], overlap: Overlap, limits: Limits, record: Place
) -> None:
    """Compare all pictures of these roles, if reading them costs little; once for the same shards.

    Args:
        folders: finished passes over some of the roles, which say what they saw.
        record: where is written that it was done.

    Raises:
        Mistake: a picture is in two of them.
    """
    roles = {role: shards for role, shards in roles.items() if shards}
    is_small = sum(shard.num_bytes for role in roles.keys() - folders for shard in roles[role]) <= MOST_BYTES
    looked_at = dict(roles) if is_small else {role: shards for role, shards in roles.items() if role != "shards"}
    made_of = [[r, *sorted((s.name, s.num_bytes, s.digest) for s in shards)] for r, shards in looked_at.items()]
    done = {"compared": hashlib.sha256(json.dumps([overlap, made_of]).encode()).hexdigest()}
    if len(looked_at) < 2 or (record.is_file() and read_json(record, "record of a comparison") == done):
        return
    look = ray.remote(num_cpus=1)(pictures_of_shard)
    asked = {
        role: [look.remote(shard, limits) for shard in shards]
        for role, shards in looked_at.items()
        if role not in folders
    }
    seen: dict[str, set[bytes] | frozenset[bytes]] = {
        role: known_pictures(folders[role], shards) if role in folders else set().union(*ray.get(asked[role]))
        for role, shards in looked_at.items()
    }
    refuse_common(seen, overlap)
    write_json(record, done)


def pictures_of_shard(shard: Shard, limits: Limits) -> set[bytes]:
    """The pictures of a shard, as far as their first bytes are a picture's: rubbish is not one, and often the same."""
    with open_shard(shard) as stream:
        return {
            name
            for sample in iter_samples(stream, limits)
            if sample.error is None and (what_is((sample.image or b"")[:NUM_BYTES]) or "").startswith(PICTURES)
            if (name := picture(sample.content_hash())) is not None
        }


CALIBRATED = ("shards", "calibration")
PICTURES = ("a JPEG", "a PNG", "a WebP", "a BMP")


def _pairs(roles: Iterable[str], overlap: Overlap) -> list[tuple[str, str]]:
    return [pair for pair in itertools.combinations(roles, 2) if overlap == "refuse" or pair != CALIBRATED]


def _message(one: str, other: str, what: str, overlap: Overlap) -> str:
    hint = ""
    if (one, other) == CALIBRATED and overlap == "refuse":
        hint = ", or set overlap: leave_out, which calibrates without these"
    return (
        f"{what} are in `{one}` and in `{other}`, and nothing could be promised with them in both; take them out of "
        f"one of the two{hint}"
    )
