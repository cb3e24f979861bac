"""Which chunks of a pass over shards are done: one Parquet part each.

The parts are the ledger. A part's name is a function of shard and chunk only, and it is absent or whole (store.py). A
shard's end marker says how many chunks it has. A rerun lists what is done and does the rest (passes.py), so killing
anything at any time loses nothing and counts nothing twice. All of it works on object stores as on file systems: it
needs no rename, no lock and no appending, and two runs that write one part write the same bytes (on machines of one
kind: another type of CPU or GPU, number of threads or version of a library rounds otherwise).

    <folder>/pass.json                              settings and shards of the pass; no other pass may resume here
    <folder>/parts/<shard>/000003.parquet           one row per sample of chunk 3, unreadable ones included
    <folder>/parts/<shard>/end.json                 {"num_samples": 9873, "num_chunks": 20, "is_complete": true}
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dede_ray.data.identity import compare, identified, recorded_shards, require_same, shard_entry
from dede_ray.data.sampling import keyed_generator
from dede_ray.data.shards import Shard
from dede_ray.runtime.config import Mistake, read_json, write_json
from dede_ray.runtime.store import Named, Place, is_url, place, write_atomically

T = TypeVar("T")
U = TypeVar("U")

logger = logging.getLogger(__name__)

BASE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("content_hash", pa.string()),
        ("shard", pa.string()),
        ("index", pa.int64()),
        ("error", pa.string()),
        ("notes", pa.list_(pa.string())),  # of `shards.NOTES`; null where there is none
    ]
)


# ---------------------------------------------------------------------------------------- which samples a pass is about

Select = Callable[[str], bool]
"""Which samples a pass is about, by their ids; must travel to Ray's workers."""


@dataclass(frozen=True)
class KeyedShare:
    """A share of all samples, each by its own id: the same ones in any order, and of any other shards."""

    share: float
    seed: int

    def __call__(self, sample_id: str) -> bool:
        return self.share >= 1 or keyed_generator(self.seed, sample_id).random() < self.share


@dataclass(frozen=True)
class Chosen:
    """These samples."""

    sample_ids: frozenset[str]

    def __call__(self, sample_id: str) -> bool:
        return sample_id in self.sample_ids


# ------------------------------------------------------------------------------------------------------ taking a folder


def claim_parts(folder: Place, made_with: dict[str, Any], shards: list[Shard], *, look: bool = True) -> None:
    """Take a folder for a pass, or resume the same pass there; shards may be added or moved, but not exchanged.

    Args:
        look: find the digests of shards that have none; False where their files need not be there.

    Raises:
        Mistake: the folder holds parts of a pass with other settings, or of shards that have changed since.
    """
    path = folder / "pass.json"
    record = read_json(path, "record of a pass") if path.is_file() else {**made_with, "shards": {}}
    recorded = _recorded_shards(record, path)
    settings = {name: value for name, value in record.items() if name != "shards"}
    there_and_now = [(k, settings.get(k), made_with.get(k)) for k in sorted(settings.keys() | made_with.keys())]
    lines = [f"{name}: {there!r} there, {now!r} now" for name, there, now in there_and_now if there != now]
    if lines:
        raise Mistake(
            "\n  ".join([f"{folder} holds parts of another pass:", *lines])
            + "\nchoose another output folder, or delete this one"
        )
    compared = require_same(
        recorded, identified(shards) if look else shards, str(folder),
        "do just these again, where the job is score (rescore_changed: true); or choose another output folder",
    )  # fmt: skip
    write_json(path, {**made_with, "shards": {name: shard_entry(shard) for name, shard in compared.record.items()}})


def forget_changed(folder: Place, shards: list[Shard]) -> list[str]:
    """Let go of the parts of shards that have changed since, so that the pass does those again; their names."""
    path = folder / "pass.json"
    if not path.is_file():
        return []
    record = read_json(path, "record of a pass")
    recorded = _recorded_shards(record, path)
    changed = [*compare(recorded, identified(shards)).changed]
    for name in changed:
        _remove_parts(folder, name)
    if changed:  # and not before: killed above, the next run finds them changed again
        kept = {name: shard_entry(shard) for name, shard in recorded.items() if name not in changed}
        write_json(path, {**record, "shards": kept})
        logger.info("%s: %s shards have changed and are done again: %s", folder, f"{len(changed):,}", named(changed))
    return changed


def forget_pass(folder: Place) -> None:
    """Let go of all that a pass has done."""
    path = folder / "pass.json"
    for name in _recorded_shards(read_json(path, "record of a pass"), path) if path.is_file() else ():
        _remove_parts(folder, name)
    path.unlink(missing_ok=True)


def _remove_parts(folder: Place, shard_name: str) -> None:
    end_path(folder, shard_name).unlink(missing_ok=True)
    parts: list[Place] = [*(folder / "parts" / shard_name).glob("[0-9]*.parquet")]
    for path in parts:
        path.unlink(missing_ok=True)


def named(names: Sequence[str]) -> str:
    """Some names for a message, the first three of them."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def shards_of_pass(folder: Place) -> list[Shard]:
    """The shards that a pass was made of.

    Raises:
        Mistake: no pass there, or a damaged record.
    """
    path = folder / "pass.json"
    recorded = _recorded_shards(read_json(path, "record of a pass"), path)
    return [shard for _, shard in sorted(recorded.items())]


def _recorded_shards(record: dict[str, Any], path: Place) -> dict[str, Shard]:
    try:
        return recorded_shards(record["shards"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise Mistake(
            f"{path} is damaged: expected a url and a number of bytes for each of its shards; "
            f"delete {path.parent} and run the job that wrote it again"
        ) from None


# --------------------------------------------------------------------------------------------------------- what is done


def done_chunks(folder: Place, shard: Shard) -> set[int]:
    """Numbers of the chunks of a shard that are done."""
    return {int(path.stem) for path in (folder / "parts" / shard.name).glob("[0-9]*.parquet")}


def unfinished(folder: Place, shards: Iterable[Shard]) -> dict[Shard, set[int]]:
    """Shards that lack something, with the numbers of their chunks that are done."""
    shards = list(shards)
    found = zip(shards, at_once(folder, lambda shard: _done_unless_all(folder, shard), shards), strict=True)
    return {shard: done for shard, done in found if done is not None}


def _done_unless_all(folder: Place, shard: Shard) -> set[int] | None:
    """The chunks of a shard that are done; None if it is finished."""
    done = done_chunks(folder, shard)
    if end_path(folder, shard.name).is_file():
        num_chunks = read_end(folder, shard.name).num_chunks
        if len(done) >= num_chunks and done >= set(range(num_chunks)):  # a damaged marker may name any number
            return None
    return done


@dataclass(frozen=True)
class End:
    """A shard's end marker."""

    num_samples: int
    num_chunks: int
    is_complete: bool


def read_end(folder: Named, shard_name: str) -> End:
    """Read an end marker.

    Raises:
        Mistake: it is missing or damaged.
    """
    path = end_path(folder, shard_name)
    content = read_json(path, "end marker of a shard")
    kinds = {"num_samples": int, "num_chunks": int, "is_complete": bool}
    if {name: type(value) for name, value in content.items()} != kinds or content["num_chunks"] < 1:
        raise Mistake(f"{path} is damaged; delete it and run the same command again")
    return End(**content)


def part_path(folder: Named, shard_name: str, number: int) -> Place:
    return place(folder) / "parts" / shard_name / f"{number:06d}.parquet"


def end_path(folder: Named, shard_name: str) -> Place:
    return place(folder) / "parts" / shard_name / "end.json"


# -------------------------------------------------------------------------------------------- reading and writing parts


def read_parts(folder: Named, shard_name: str, columns: list[str] | None = None) -> pa.Table:
    """All rows of one shard of a finished pass, in the shard's order."""
    numbers = range(read_end(folder, shard_name).num_chunks)
    tables = list(at_once(folder, lambda number: read_part(folder, shard_name, number, columns), numbers))
    try:
        return pa.concat_tables(tables)
    except (ValueError, pa.ArrowException) as error:
        where = place(folder) / "parts" / shard_name
        raise Mistake(f"the parts in {where} do not fit together: {error}; delete them and run again") from None


def read_part(folder: Named, shard_name: str, number: int, columns: list[str] | None = None) -> pa.Table:
    """The rows of one chunk."""
    path = part_path(folder, shard_name, number)
    try:
        table = read_parquet(path, columns)
        if columns is not None and table.column_names != columns:
            raise ValueError(f"it lacks some of the columns {', '.join(columns)}")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise Mistake(f"{path} is damaged: {error}; delete it and run the same command again") from None
    return table


def at_once(folder: Named, read: Callable[[T], U], things: Iterable[T]) -> Iterator[U]:
    """Read several things of a folder, in their order; a store answers many questions in the time of one."""
    if is_url(folder):
        with ThreadPoolExecutor(16) as threads:
            yield from threads.map(read, things)
    else:
        yield from map(read, things)


def read_parquet(path: Place, columns: list[str] | None = None) -> pa.Table:
    """Read a table from wherever it is."""
    with path.open("rb") as stream:
        return pq.read_table(stream, columns=columns)


def write_parquet(table: pa.Table, path: Named) -> None:
    """Write atomically; equal tables give equal bytes."""
    write_atomically(path, parquet_bytes(table))


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a file holds it."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue().to_pybytes()


# ---------------------------------------------------------------------------------------- the counts of a finished pass


@dataclass
class PassSummary:
    """Counts over all parts of a finished pass."""

    num_samples: int
    errors: dict[str, int]
    truncated_shards: list[str]
    notes: dict[str, int] = field(default_factory=dict)
    """What was left aside of captions and labels."""


Hint = Callable[[Counter[str]], str]
"""Given the counts of reasons, what to add to a message about them."""


def summarise(
    shards: list[Shard], folder: Place, max_error_fraction: float, name: str, hint: Hint = lambda _: ""
) -> PassSummary:
    """Count over all parts.

    Raises:
        Mistake: too many samples are unusable.
    """
    errors, notes = Counter[str](), Counter[str]()
    num_samples, truncated = 0, []
    for shard in shards:
        table = read_parts(folder, shard.name, ["error", "notes"])
        num_samples += len(table)
        errors.update(table["error"].drop_null().to_pylist())
        notes.update(pc.list_flatten(table["notes"]).to_pylist())
        if not read_end(folder, shard.name).is_complete:
            truncated.append(shard.name)
    if truncated:
        logger.warning("%s: %d shards end early, such as %s", name, len(truncated), ", ".join(truncated[:3]))
    if sum(errors.values()) > max_error_fraction * num_samples:
        raise Mistake(too_many_errors(errors, num_samples, max_error_fraction, name) + hint(errors))
    return PassSummary(num_samples, dict(sorted(errors.items())), truncated, dict(sorted(notes.items())))


def counted(reasons: dict[str, int]) -> str:
    """`image_truncated 3, no_image 12`"""
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))


def too_many_errors(errors: dict[str, int], num_samples: int, allowed: float, name: str) -> str:
    return (
        f"{name}: {sum(errors.values()):,} of {num_samples:,} samples cannot be used ({counted(errors)}), more than "
        f"max_error_fraction {allowed:g} allows; check the shards, or raise it"
    )
