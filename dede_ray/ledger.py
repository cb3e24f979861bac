"""One resumable pass over shards: read, decode on a CPU pool, work on actors, one Parquet part per chunk.

The parts are the ledger. A part's name is a function of shard and chunk only; it is written under a temporary name
and renamed, so it is absent or whole. A shard's end marker says how many chunks it has. A rerun lists what stands and
does the rest, so killing anything at any time loses nothing and counts nothing twice.

    <folder>/pass.json                              what the parts were made with and of; another pass may not continue
    <folder>/parts/<shard>/000003.parquet           one row per sample of chunk 3, unreadable ones included
    <folder>/parts/<shard>/end.json                 {"num_samples": 9873, "num_chunks": 20, "is_complete": true}

What the work is (scoring with detectors, embedding for the decoder's training) is a class given by the caller.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field
from ray.data import ActorPoolStrategy, Datasource, ReadTask
from ray.data.block import BlockMetadata

from dede_ray.config import Config, Mistake, read_json, write_json
from dede_ray.shards import (
    BadSample,
    Limits,
    Sample,
    Shard,
    ShardEnd,
    decode_image,
    iter_samples,
    open_shard,
    sample_id,
)
from dede_ray.sources import keyed_generator

logger = logging.getLogger(__name__)

BASE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("content_hash", pa.string()),
        ("shard", pa.string()),
        ("index", pa.int64()),
        ("error", pa.string()),
    ]
)


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


class PassResources(Config):
    """What one pass asks of the cluster."""

    min_actors: int | None = Field(None, ge=1)
    """Actors to begin with; None takes all the cluster has room for now: one per GPU share, or per CPU but one."""
    max_actors: int | None = Field(None, ge=1)
    """Actors that the pool may grow to on an autoscaling cluster; None stays at `min_actors`."""
    cpus_per_actor: float = Field(1, gt=0)
    """CPUs each actor reserves."""
    gpus_per_actor: float = Field(0, ge=0)
    """GPUs each actor reserves; a fraction shares one."""
    threads_per_actor: int | None = None
    """Threads of an actor's arithmetic; None takes its CPUs. Part of what makes two runs' bytes equal."""
    decode_cpus: float = Field(1, gt=0)
    """CPUs each read-and-decode task reserves."""

    def on(self, cluster: dict[str, float]) -> PassResources:
        """Fill in what depends on the cluster: the size of the pool, and shares that fit on a single CPU."""
        cpus, gpus = cluster.get("CPU", 1), cluster.get("GPU", 0)
        if cpus < self.cpus_per_actor + self.decode_cpus:
            if cpus > 1:
                raise Mistake(
                    f"resources: an actor's {self.cpus_per_actor:g} CPUs and a decode task's {self.decode_cpus:g} do "
                    f"not fit into the cluster's {cpus:g}; lower them"
                )
            return self.model_copy(update={"cpus_per_actor": 0.5, "decode_cpus": 0.5, "min_actors": 1, "max_actors": 1})
        if self.gpus_per_actor > gpus:
            raise Mistake(f"resources: an actor needs {self.gpus_per_actor:g} GPUs, the cluster has {gpus:g}")
        room = (cpus - self.decode_cpus) / self.cpus_per_actor
        if self.gpus_per_actor > 0:
            room = min(room, gpus / self.gpus_per_actor)
        smallest = self.min_actors or max(1, int(room))
        return self.model_copy(update={"min_actors": smallest, "max_actors": max(smallest, self.max_actors or 0)})


@dataclass
class Chunk:
    """What the work gets: the readable samples of one chunk, decoded."""

    sample_ids: list[str]
    image_BHWC: np.ndarray
    captions: list[str | None]
    place: tuple[str, int] | None = None
    """The shard's name and the chunk's number in it, by which another pass over the shards named its parts."""
    content_hashes: list[str] = field(default_factory=list)


class Work(Protocol):
    """Made once per actor; `columns` names and types what it returns, one value per sample."""

    image_size: int
    columns: dict[str, pa.DataType]

    def __call__(self, chunk: Chunk) -> dict[str, np.ndarray]: ...


class PartWork(Protocol):
    """The same for a pass over parts: gets the rows of one part that have no error."""

    columns: dict[str, pa.DataType]

    def __call__(self, table: pa.Table) -> dict[str, np.ndarray]: ...


@dataclass
class PassSummary:
    """Counts over all parts of a finished pass."""

    num_samples: int
    errors: dict[str, int]
    truncated_shards: list[str]


def run_pass(
    shards: list[Shard],
    folder: str | Path,
    work: type[Work],
    work_arguments: dict[str, Any],
    *,
    image_size: int,
    made_with: dict[str, Any],
    chunk_size: int,
    limits: Limits,
    resources: PassResources,
    max_error_fraction: float,
    name: str,
    select: Select | None = None,
) -> PassSummary:
    """Do a pass, or what remains of it; Ray must be running.

    Args:
        shards: what to read.
        folder: where the parts go; on several machines a folder that all of them see.
        work: built in each actor as `work(**work_arguments)`, then called with one `Chunk` at a time.
        image_size: images are decoded to squares of this side.
        made_with: everything that the rows depend on; stored, and compared when a pass is continued.
        max_error_fraction: stop when more than this share of the samples cannot be used.
        name: for the log.
        select: leave out the samples for which it says False; None takes all. `made_with` has to tell it.

    Raises:
        Mistake: the folder holds parts of another pass, or too many samples are unusable.
    """
    folder = Path(folder).absolute()
    made_with = {**made_with, "chunk_size": chunk_size, "limits": limits.model_dump(), "image_size": image_size}
    _claim_parts(folder, made_with, shards)
    todo = {shard.name: _standing_chunks(folder, shard) for shard in shards if not _is_done(folder, shard)}
    if todo:
        skipped = len(shards) - len(todo)
        if skipped or any(todo.values()):
            logger.info("%s: continuing; %d of %d shards stand", name, skipped, len(shards))
        open_shards = [shard for shard in shards if shard.name in todo]
        reading = _Reading(folder, image_size, chunk_size, limits, select)
        receipts = _stream(open_shards, todo, reading, work, work_arguments, resources)
        _watch(receipts, len(open_shards), max_error_fraction, name)
        unfinished = [shard.name for shard in open_shards if not _is_done(folder, shard)]
        if unfinished:
            raise RuntimeError(f"{name}: chunks are missing in {unfinished[:5]}; run the same command again")
    return _summarise(shards, folder, max_error_fraction, name)


def run_over_parts(
    shards: list[Shard],
    source: Path,
    folder: str | Path,
    work: type[PartWork],
    work_arguments: dict[str, Any],
    *,
    made_with: dict[str, Any],
    resources: PassResources,
    max_error_fraction: float,
    name: str,
) -> PassSummary:
    """Do a pass over the parts of a finished one instead of over images; a rerun does what remains.

    Args:
        shards: those of the finished pass, see `standing_shards`.
        source: its folder.
        work: built in each actor as `work(**work_arguments)`, then called with one part's readable rows at a time.

    Raises:
        Mistake: the source is not finished, the folder holds parts of another pass, or too many samples are unusable.
    """
    folder = Path(folder).absolute()
    _claim_parts(folder, made_with, shards)
    unfinished = [shard.name for shard in shards if not _is_done(source, shard)]
    if unfinished:
        raise Mistake(f"{source} is not finished: {unfinished[0]} lacks parts; run the job that wrote it again")
    todo = [
        {"shard": shard.name, "number": number}
        for shard in shards
        if not _is_done(folder, shard)
        for number in sorted(_standing_chunks(source, shard) - _standing_chunks(folder, shard))
    ]
    if todo:
        resources = resources.on(ray.cluster_resources())
        threads = resources.threads_per_actor or max(1, int(resources.cpus_per_actor))
        data = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            _PartWorker,
            fn_constructor_args=(source, folder, work, work_arguments, threads),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=resources.cpus_per_actor,
            num_gpus=resources.gpus_per_actor,
            compute=ActorPoolStrategy(min_size=resources.min_actors, max_size=resources.max_actors),
        )
        batches = data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        receipts = (row for batch in batches for row in batch.to_pylist())  # type: ignore[union-attr]
        _watch(receipts, len(shards), max_error_fraction, name)
    for shard in shards:
        write_json(folder / "parts" / shard.name / "end.json", asdict(_read_end(source, shard.name)))
    return _summarise(shards, folder, max_error_fraction, name)


def standing_shards(folder: Path) -> list[Shard]:
    """The shards that a pass was made of.

    Raises:
        Mistake: no pass there, or a damaged record.
    """
    path = folder / "pass.json"
    made_of: Any = read_json(path, "record of a pass").get("shards")
    try:
        shards = []
        for shard_name, told in made_of.items():
            url, _, size = told.rpartition(", ")
            shards.append(Shard(shard_name, url, int(size.removesuffix(" bytes").replace(",", ""))))
    except (AttributeError, ValueError):
        raise Mistake(f"{path} is damaged; run the job that wrote it again") from None
    return sorted(shards, key=lambda shard: shard.name)


def read_parts(folder: str | Path, shard_name: str, columns: list[str] | None = None) -> pa.Table:
    """All rows of one shard of a finished pass, in the shard's order."""
    tables = []
    for number in range(_read_end(folder, shard_name).num_chunks):
        path = part_path(folder, shard_name, number)
        try:
            tables.append(pq.read_table(path, columns=columns))
            if columns is not None and tables[-1].column_names != columns:
                raise ValueError(f"it lacks some of the columns {', '.join(columns)}")
        except (OSError, ValueError, pa.ArrowException) as error:
            raise Mistake(f"{path} is damaged: {error}; delete it and run the same command again") from None
    try:
        return pa.concat_tables(tables)
    except (ValueError, pa.ArrowException) as error:
        where = Path(folder) / "parts" / shard_name
        raise Mistake(f"the parts in {where} do not fit together: {error}; delete them and run again") from None


def part_path(folder: str | Path, shard_name: str, number: int) -> Path:
    return Path(folder) / "parts" / shard_name / f"{number:06d}.parquet"


# ------------------------------------------------------------------------------------------------ what stands


def _claim_parts(folder: Path, made_with: dict[str, Any], shards: list[Shard]) -> None:
    """Take a folder for a pass, or continue the same pass there; shards may be added, but not exchanged."""
    path = folder / "pass.json"
    standing = read_json(path, "record of a pass") if path.is_file() else made_with
    made_of = standing.pop("shards", {})
    if not isinstance(made_of, dict):
        raise Mistake(f"{path} is damaged: its shards are no JSON object; delete {folder}")
    changed = [(k, standing.get(k), made_with.get(k)) for k in sorted(standing.keys() | made_with.keys())]
    for shard in shards:
        now = f"{shard.url}, {shard.num_bytes:,} bytes"
        changed.append((shard.name, made_of.setdefault(shard.name, now), now))
    lines = [f"{name}: {there!r} there, {now!r} now" for name, there, now in changed if there != now]
    if lines:
        more = [f"and {len(lines) - 10:,} more"] if len(lines) > 10 else []
        raise Mistake(
            "\n  ".join([f"{folder} holds parts of another pass:", *lines[:10], *more])
            + "\nchoose another output folder, or delete this one"
        )
    write_json(path, {**made_with, "shards": made_of})


@dataclass(frozen=True)
class _End:
    """A shard's end marker."""

    num_samples: int
    num_chunks: int
    is_complete: bool


def _read_end(folder: str | Path, shard_name: str) -> _End:
    path = Path(folder) / "parts" / shard_name / "end.json"
    content = read_json(path, "end marker of a shard")
    kinds = {"num_samples": int, "num_chunks": int, "is_complete": bool}
    if {name: type(value) for name, value in content.items()} != kinds or content["num_chunks"] < 1:
        raise Mistake(f"{path} is damaged; delete it and run the same command again")
    return _End(**content)


def _standing_chunks(folder: Path, shard: Shard) -> set[int]:
    parts = folder / "parts" / shard.name
    return {int(path.stem) for path in parts.glob("[0-9]*.parquet")} if parts.is_dir() else set()


def _is_done(folder: Path, shard: Shard) -> bool:
    if not (folder / "parts" / shard.name / "end.json").is_file():
        return False
    num_chunks, standing = _read_end(folder, shard.name).num_chunks, _standing_chunks(folder, shard)
    return len(standing) >= num_chunks and standing >= set(range(num_chunks))


def _summarise(shards: list[Shard], folder: Path, max_error_fraction: float, name: str) -> PassSummary:
    """Count over all parts, and stop a pass that has read rubbish."""
    errors: Counter[str] = Counter()
    num_samples, truncated = 0, []
    for shard in shards:
        column = read_parts(folder, shard.name, ["error"])["error"]
        num_samples += len(column)
        errors.update(column.drop_null().to_pylist())
        if not _read_end(folder, shard.name).is_complete:
            truncated.append(shard.name)
    if truncated:
        logger.warning("%s: %d shards end early, such as %s", name, len(truncated), ", ".join(truncated[:3]))
    if sum(errors.values()) > max_error_fraction * num_samples:
        raise Mistake(_too_many_errors(errors, num_samples, max_error_fraction, name))
    return PassSummary(num_samples, dict(sorted(errors.items())), truncated)


# ------------------------------------------------------------------------------------------------ the stream


@dataclass(frozen=True)
class _Reading:
    """How shards are read."""

    folder: Path
    image_size: int
    chunk_size: int
    limits: Limits
    select: Select | None


class _ChunkSource(Datasource):
    """Ray Data source whose rows are chunks: `chunk_size` consecutive samples of one shard, decoded.

    One row, one chunk: Ray Data may merge and split blocks, never a row, so a chunk stays whole through every stage.
    """

    def __init__(self, shards: list[Shard], todo: dict[str, set[int]], reading: _Reading):
        super().__init__()
        self._arguments = [(shard, todo[shard.name], reading) for shard in shards]

    def estimate_inmemory_data_size(self) -> int:
        return sum(shard.num_bytes for shard, *_ in self._arguments)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        tasks = []
        for arguments in self._arguments:
            shard = arguments[0]
            metadata = BlockMetadata(
                num_rows=None, size_bytes=shard.num_bytes, input_files=(shard.url,), exec_stats=None
            )
            tasks.append(ReadTask(partial(_read_and_decode, *arguments), metadata))
        return tasks


def _read_and_decode(shard: Shard, standing: set[int], reading: _Reading) -> Iterator[pa.Table]:
    """Chunks of the selected samples; a shard without any still has one part, without rows."""
    end, select = ShardEnd(), reading.select
    num_selected, number = 0, 0
    with open_shard(shard) as stream:
        samples = iter_samples(stream, reading.limits, end=end)
        selected = (s for s in samples if select is None or select(sample_id(shard.name, s.key)))
        placed = enumerate(selected)
        for number, chunk in itertools.groupby(placed, lambda one: one[0] // reading.chunk_size):
            passed = _Counted(sample for _, sample in chunk)
            if number not in standing:  # else its bytes pass by; nothing is decoded
                yield _decode(shard, number, passed, reading)
            num_selected += passed.finish()
    if num_selected == 0 and 0 not in standing:
        yield _decode(shard, 0, [], reading)
    marker = _End(num_selected, number + 1, end.is_complete)
    write_json(reading.folder / "parts" / shard.name / "end.json", asdict(marker))


class _Counted:
    """Iterates, and knows how many there were, iterated over or not."""

    def __init__(self, samples: Iterable[Sample]):
        self._samples, self._num = iter(samples), 0

    def __iter__(self) -> Iterator[Sample]:
        for sample in self._samples:
            self._num += 1
            yield sample

    def finish(self) -> int:
        return self._num + sum(1 for _ in self._samples)


def _decode(shard: Shard, number: int, samples: Iterable[Sample], reading: _Reading) -> pa.Table:
    """One chunk as a row; holds one encoded image at a time, as 256 of them may be 16 GB."""
    images, hashes, places = [], [], []
    rows: list[tuple[str, str | None, str | None]] = []
    for sample in samples:
        if sample.error is None:
            try:
                images.append(decode_image(sample.image or b"", reading.limits, reading.image_size).tobytes())
            except BadSample as bad:
                sample.error = bad.reason
        hashes.append(sample.content_hash())
        places.append(sample.index)
        rows.append((sample.key, sample.caption, sample.error))
    return pa.table(
        {
            "shard": [shard.name],
            "number": [number],
            "index": pa.array([places], pa.list_(pa.int64())),
            "key": _strings(key for key, _, _ in rows),
            "caption": _strings(caption for _, caption, _ in rows),
            "error": _strings(error for _, _, error in rows),
            "content_hash": _strings(hashes),
            # The readable samples' pixels, uint8, one block: Ray Data then moves them without looking inside.
            "pixels": pa.array([b"".join(images)], pa.large_binary()),
        }
    )


def _strings(values: Iterable[str | None]) -> pa.Array:
    """One row that is a list of strings."""
    return pa.array([list(values)], pa.list_(pa.string()))


class _Worker:
    """The actor: does the caller's work on each chunk and writes the part itself; only a receipt travels on."""

    def __init__(self, folder: Path, work: type[Work], work_arguments: dict[str, Any], threads: int):
        import torch

        torch.set_num_threads(threads)
        self.folder, self.work = folder, work(**work_arguments)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._one(row) for row in rows.to_pylist()])

    def _one(self, row: dict[str, Any]) -> dict[str, Any]:
        errors = row["error"]
        good = [i for i, error in enumerate(errors) if error is None]
        ids = [sample_id(row["shard"], key) for key in row["key"]]
        size = self.work.image_size
        columns: dict[str, Any] = {}
        if good:
            image_BHWC = np.frombuffer(row["pixels"], np.uint8).reshape(len(good), size, size, 3)
            chunk = Chunk(
                [ids[i] for i in good],
                image_BHWC,
                [row["caption"][i] for i in good],
                (row["shard"], row["number"]),
                [row["content_hash"][i] for i in good],
            )
            columns = self.work(chunk)
        base = pa.table(
            {
                "sample_id": ids,
                "content_hash": row["content_hash"],
                "shard": [row["shard"]] * len(ids),
                "index": row["index"],
                "error": errors,
            },
            schema=BASE_SCHEMA,
        )
        table = _completed(base, columns, self.work.columns)
        write_parquet(table, part_path(self.folder, row["shard"], row["number"]))
        return _receipt(row["shard"], table)


class _PartWorker:
    """The same over parts that stand."""

    def __init__(self, source: Path, folder: Path, work: type[PartWork], work_arguments: dict[str, Any], threads: int):
        import torch

        torch.set_num_threads(threads)
        self.source, self.folder, self.work = source, folder, work(**work_arguments)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._one(row["shard"], row["number"]) for row in rows.to_pylist()])

    def _one(self, shard: str, number: int) -> dict[str, Any]:
        stored = pq.read_table(part_path(self.source, shard, number))
        good = stored.filter(stored["error"].is_null())
        columns = self.work(good) if len(good) else {}
        table = _completed(stored.select(BASE_SCHEMA.names), columns, self.work.columns)
        write_parquet(table, part_path(self.folder, shard, number))
        return _receipt(shard, table)


def _completed(base: pa.Table, columns: dict[str, Any], kinds: dict[str, pa.DataType]) -> pa.Table:
    """Put what the work gave for the rows without an error beside all rows; what is no number becomes an error."""
    errors = base["error"].to_pylist()
    good = [i for i, error in enumerate(errors) if error is None]
    if good:
        numbers = [column for name, column in columns.items() if not pa.types.is_string(kinds[name])]
        is_finite = _are_finite(numbers, len(good))
        for i in np.flatnonzero(~is_finite).tolist():
            errors[good[i]] = "not_finite"
        columns = {name: [*itertools.compress(column, is_finite)] for name, column in columns.items()}
        good = [*itertools.compress(good, is_finite)]
        base = base.set_column(base.schema.get_field_index("error"), "error", pa.array(errors, pa.string()))
    for name, kind in kinds.items():
        values: list[Any] = [None] * len(base)
        for i, value in zip(good, columns.get(name, ()), strict=True):
            values[i] = value
        base = base.append_column(pa.field(name, kind), pa.array(values, kind))
    return base


def _receipt(shard: str, table: pa.Table) -> dict[str, Any]:
    return {"shard": shard, "num_samples": len(table), "errors": table["error"].drop_null().to_pylist()}


def _are_finite(columns: list[Any], num: int) -> np.ndarray:
    """Which of the samples got numbers only, or nothing; a score that is none would never be flagged."""
    is_finite = np.ones(num, bool)
    for column in columns:
        if any(value is None for value in column):
            is_finite &= [value is None or bool(np.isfinite(value).all()) for value in column]
        else:
            is_finite &= np.isfinite(np.asarray(column)).reshape(num, -1).all(axis=1)
    return is_finite


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write atomically; equal tables give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{time.monotonic_ns()}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)


def _stream(
    shards: list[Shard],
    todo: dict[str, set[int]],
    reading: _Reading,
    work: type[Work],
    work_arguments: dict[str, Any],
    resources: PassResources,
) -> Iterable[dict[str, Any]]:
    """Read, decode and work, overlapping; yields receipts."""
    resources = resources.on(ray.cluster_resources())
    context = ray.data.DataContext.get_current()
    block_bytes = context.target_max_block_size
    # Chunks leave a shard's read task as soon as there are a few, not when the shard is through.
    context.target_max_block_size = max(2 * reading.chunk_size * reading.image_size**2 * 3, 1 << 20)
    try:
        threads = resources.threads_per_actor or max(1, int(resources.cpus_per_actor))
        data = ray.data.read_datasource(
            _ChunkSource(shards, todo, reading),
            override_num_blocks=len(shards),
            num_cpus=resources.decode_cpus,
        )
        data = data.map_batches(
            _Worker,
            fn_constructor_args=(reading.folder, work, work_arguments, threads),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=resources.cpus_per_actor,
            num_gpus=resources.gpus_per_actor,
            compute=ActorPoolStrategy(min_size=resources.min_actors, max_size=resources.max_actors),
        )
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch.to_pylist()
    finally:
        context.target_max_block_size = block_bytes


def _watch(receipts: Iterable[dict[str, Any]], num_shards: int, max_error_fraction: float, name: str) -> None:
    """Log progress and stop a pass that is reading rubbish."""
    started = last = time.monotonic()
    num_samples = 0
    errors: Counter[str] = Counter()
    for num_chunks, receipt in enumerate(receipts, 1):
        num_samples += receipt["num_samples"]
        errors.update(receipt["errors"])
        if num_samples >= 1000 and sum(errors.values()) > max_error_fraction * num_samples:
            raise Mistake(_too_many_errors(errors, num_samples, max_error_fraction, name))
        now = time.monotonic()
        if now - last > 5:
            rate = num_samples / (now - started)
            logger.info(
                "%s: %s samples in %d chunks of %d shards, %d unreadable, %s samples/s",
                name,
                f"{num_samples:,}",
                num_chunks,
                num_shards,
                sum(errors.values()),
                f"{rate:,.0f}",
            )
            last = now
    logger.info(
        "%s: %s samples done in %.1f s, %d unreadable",
        name,
        f"{num_samples:,}",
        time.monotonic() - started,
        sum(errors.values()),
    )


def _too_many_errors(errors: dict[str, int], num_samples: int, allowed: float, name: str) -> str:
    counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(errors.items()))
    return (
        f"{name}: {sum(errors.values()):,} of {num_samples:,} samples cannot be used ({counts}), more than "
        f"max_error_fraction {allowed:g} allows; check the shards, or raise it"
    )
