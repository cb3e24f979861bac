"""One resumable pass over shards: read, decode on a CPU pool, work on actors, one Parquet part per chunk.

What stands is a matter of files (ledger.py); here is how the rest gets done. Ray Data streams chunks from readers,
which also decode, to a pool of actors, which work and commit each part themselves; only receipts travel on. Whatever
dies (a reader, an actor, a node, the driver), the chunks that stand stand, and the others are done by whoever is left,
or by the next run of the same command. A sample that ends whatever process touches it is found by trying the samples of
its chunk one by one, in a process of their own; it becomes a row with the reason `process_died`.

What the work is (scoring with detectors, embedding for the decoder's training) is a class given by the caller.
"""

from __future__ import annotations

import base64
import itertools
import json
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
from pydantic import Field
from ray import cloudpickle
from ray.data import ActorPoolStrategy, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.util import metrics

from dede_ray.config import Config, Mistake, write_json
from dede_ray.ledger import (
    BASE_SCHEMA,
    End,
    PassSummary,
    Select,
    claim_parts,
    end_path,
    is_done,
    part_path,
    read_end,
    read_part,
    standing_chunks,
    summarise,
    too_many_errors,
    write_parquet,
)
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
from dede_ray.store import Named, Place, place

logger = logging.getLogger(__name__)

BYTES_PER_BLOCK = 8 * 2**20
"""Chunks travel together up to so many bytes, and at least one: each journey costs Ray's driver some milliseconds."""
TRIES = 3
"""Of a task that keeps dying, before its chunks are taken for what kills it; and of a read that fails."""


class PassResources(Config):
    """What one pass asks of the cluster."""

    min_actors: int | None = Field(None, ge=1)
    """Actors to begin with; None takes all the cluster has room for now: one per GPU share, or per CPU."""
    max_actors: int | None = Field(None, ge=1)
    """Actors that the pool may grow to on an autoscaling cluster; None stays at `min_actors`."""
    cpus_per_actor: float | None = Field(None, gt=0)
    """CPUs each actor reserves; None takes 1 beside a GPU, else 0.75, so that readers and actors share the cores."""
    gpus_per_actor: float = Field(0, ge=0)
    """GPUs each actor reserves; a fraction shares one."""
    threads_per_actor: int | None = Field(None, ge=1)
    """Threads of an actor's arithmetic; None takes its CPUs. Part of what makes two runs' bytes equal."""
    decode_cpus: float | None = Field(None, gt=0)
    """CPUs each read-and-decode task reserves; None takes 1 where actors have GPUs, and else 0.25."""
    memory_per_actor: int = Field(0, ge=0)
    """Bytes of memory that each actor reserves, so that Ray places no more of them on a node than it holds."""

    def on(self, cluster: dict[str, float]) -> PassResources:
        """Fill in what depends on the cluster: shares of a CPU, and the size of the pool.

        Raises:
            Mistake: the cluster has no room for an actor and a reader, and is not said to grow (`max_actors`).
        """
        cpus, gpus = cluster.get("CPU", 0), cluster.get("GPU", 0)
        per_actor = self.cpus_per_actor or (1 if self.gpus_per_actor else 0.75)
        decode = self.decode_cpus or (1 if self.gpus_per_actor else 0.25)
        if cpus < per_actor + decode and self.max_actors is None:
            if cpus > 1:
                raise Mistake(
                    f"resources: an actor's {per_actor:g} CPUs and a decode task's {decode:g} do not fit into the "
                    f"cluster's {cpus:g}; lower them, or give max_actors where the cluster grows"
                )
            per_actor, decode = 0.5, 0.5
        if self.gpus_per_actor > gpus and self.max_actors is None:
            raise Mistake(
                f"resources: an actor needs {self.gpus_per_actor:g} GPUs, the cluster has {gpus:g}; give max_actors "
                "where the cluster grows"
            )
        room = (cpus - decode) / per_actor
        if self.cpus_per_actor is None and self.decode_cpus is None and not self.gpus_per_actor:
            room = cpus  # actors and readers share the cores
        if self.gpus_per_actor > 0:
            room = min(room, gpus / self.gpus_per_actor)
        smallest = self.min_actors or max(1, int(room + 1e-9))
        return self.model_copy(
            update={
                "cpus_per_actor": per_actor,
                "decode_cpus": decode,
                "min_actors": smallest,
                "max_actors": max(smallest, self.max_actors or 0),
                "threads_per_actor": self.threads_per_actor or max(1, int(per_actor)),
            }
        )

    def of_actor(self) -> dict[str, Any]:
        """What Ray is asked for."""
        asked: dict[str, Any] = {"num_cpus": self.cpus_per_actor, "num_gpus": self.gpus_per_actor}
        return asked | ({"memory": self.memory_per_actor} if self.memory_per_actor else {})


@dataclass
class Chunk:
    """What the work gets: the readable samples of one chunk, decoded."""

    sample_ids: list[str]
    image_BHWC: np.ndarray
    captions: list[str | None]


class Laps:
    """Where time goes: each `mark` books the seconds since the last one under a name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """The seconds booked so far, once."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


class Work(Protocol):
    """Made once per actor; `columns` names and types what it returns, one value per sample.

    A work that has an attribute `laps` gets the actor's, and may mark its own stages there; what it does not mark is
    booked under `work`.
    """

    image_size: int
    columns: dict[str, pa.DataType]

    def __call__(self, chunk: Chunk) -> dict[str, Any]: ...


class PartWork(Protocol):
    """The same for a pass over parts: gets the rows of one part that have no error."""

    columns: dict[str, pa.DataType]

    def __call__(self, table: pa.Table) -> dict[str, Any]: ...


def run_pass(
    shards: list[Shard],
    folder: Named,
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
        folder: where the parts go; on several machines a folder that all of them see, or a URL.
        work: built in each actor as `work(**work_arguments)`, then called with one `Chunk` at a time.
        image_size: images are decoded to squares of this side.
        made_with: everything that the rows depend on; stored, and compared when a pass is continued.
        max_error_fraction: stop when more than this share of the samples cannot be used.
        name: for the log.
        select: leave out the samples for which it says False; None takes all. `made_with` has to tell it.

    Raises:
        Mistake: the folder holds parts of another pass, or too many samples are unusable.
    """
    folder = place(folder)
    made_with = {**made_with, "chunk_size": chunk_size, "limits": limits.model_dump(), "image_size": image_size}
    claim_parts(folder, made_with, shards)
    reading = _Reading(folder, image_size, chunk_size, limits, select)
    todo = _unfinished(folder, shards)
    if todo:
        skipped = len(shards) - len(todo)
        if skipped or any(todo.values()):
            logger.info("%s: continuing; %d of %d shards stand", name, skipped, len(shards))
        pool = resources.on(ray.cluster_resources())
        by_name = {shard.name: shard for shard in shards}
        open_shards = [by_name[shard] for shard in todo]
        watch = _Watch(name, len(open_shards), max_error_fraction, place(folder) / "timing.json")
        actor = partial(_Worker, folder, work, work_arguments, pool.threads_per_actor or 1, name)
        try:
            watch.follow(_stream(open_shards, todo, reading, actor, pool))
            left = {by_name[shard]: standing for shard, standing in _unfinished(folder, open_shards).items()}
            if left:
                watch.follow(_one_by_one(left, reading, actor, pool, name))
        finally:
            watch.tell()
        unfinished = [shard.name for shard in open_shards if not is_done(folder, shard)]
        if unfinished:
            raise RuntimeError(f"{name}: chunks are missing in {unfinished[:5]}; run the same command again")
    return summarise(shards, folder, max_error_fraction, name)


def run_over_parts(
    shards: list[Shard],
    source: Place,
    folder: Named,
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
    folder = place(folder)
    claim_parts(folder, made_with, shards)
    unfinished = [shard.name for shard in shards if not is_done(source, shard)]
    if unfinished:
        raise Mistake(f"{source} is not finished: {unfinished[0]} lacks parts; run the job that wrote it again")
    todo = [
        {"shard": shard.name, "number": number}
        for shard in shards
        if not is_done(folder, shard)
        for number in sorted(standing_chunks(source, shard) - standing_chunks(folder, shard))
    ]
    if todo:
        pool = resources.on(ray.cluster_resources())
        data = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            _PartWorker,
            fn_constructor_args=(source, folder, work, work_arguments, pool.threads_per_actor, name),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
            **pool.of_actor(),
        )
        watch = _Watch(name, len(shards), max_error_fraction, None)
        watch.follow(_receipts(data))
        watch.tell()
    for shard in shards:
        write_json(end_path(folder, shard.name), asdict(read_end(source, shard.name)))
    return summarise(shards, folder, max_error_fraction, name)


def _unfinished(folder: Place, shards: Sequence[Shard]) -> dict[str, set[int]]:
    """Shards that lack something, with the chunks that stand; stores are asked for many at once."""

    def look(shard: Shard) -> set[int] | None:
        return None if is_done(folder, shard) else standing_chunks(folder, shard)

    with ThreadPoolExecutor(16) as threads:
        found = zip(shards, threads.map(look, shards), strict=True)
        return {shard.name: standing for shard, standing in found if standing is not None}


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class _Reading:
    """How shards are read."""

    folder: Place
    image_size: int
    chunk_size: int
    limits: Limits
    select: Select | None


@dataclass(frozen=True)
class _Share:
    """Which chunks of a shard one reader is for; a shard has several readers where there are fewer shards than CPUs."""

    number: int = 0
    of: int = 1

    def __contains__(self, chunk: int) -> bool:
        return chunk % self.of == self.number


class _ChunkSource(Datasource):
    """Ray Data source whose rows are chunks: `chunk_size` consecutive samples of one shard, decoded.

    One row, one chunk: Ray Data may merge and split blocks, never a row, so a chunk stays whole through every stage.
    """

    def __init__(self, shards: list[Shard], todo: dict[str, set[int]], reading: _Reading, readers_per_shard: int):
        super().__init__()
        shares = [_Share(number, readers_per_shard) for number in range(readers_per_shard)]
        self._arguments = [(shard, todo[shard.name], reading, share) for shard in shards for share in shares]

    def __len__(self) -> int:
        return len(self._arguments)

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
            tasks.append(ReadTask(partial(_read_or_tell, *arguments), metadata))
        return tasks


def _read_or_tell(shard: Shard, standing: set[int], reading: _Reading, share: _Share) -> Iterator[pa.Table]:
    """Chunks; where reading fails for good, one row that says so instead, as Ray would take an exception for a loss."""
    done = set(standing)
    for attempt in range(1, TRIES + 1):
        try:
            for table in _read_and_decode(shard, done, reading, share):
                done.add(table["number"][0].as_py())
                yield table
            return
        except Exception as error:
            if not isinstance(error, OSError) or attempt == TRIES:
                yield _row(shard.name, -1, [], [], [], {}, _packed(error))
                return
            time.sleep(attempt)  # a store's hiccup; what was passed on is not read again


def _read_and_decode(shard: Shard, standing: Container[int], reading: _Reading, share: _Share) -> Iterator[pa.Table]:
    """Chunks of the selected samples; a shard without any still has one part, without rows."""
    end = ShardEnd()
    num_selected, number = 0, 0
    for number, chunk in _numbered_chunks(shard, reading, end):
        if number in share and number not in standing:  # else its bytes pass by; nothing is decoded
            yield _decode(shard, number, chunk, reading)
        num_selected += chunk.finish()
    if share.number > 0:
        return
    if num_selected == 0 and 0 not in standing:
        yield _decode(shard, 0, [], reading)
    write_json(end_path(reading.folder, shard.name), asdict(End(num_selected, number + 1, end.is_complete)))


def _numbered_chunks(shard: Shard, reading: _Reading, end: ShardEnd) -> Iterator[tuple[int, _Counted]]:
    select = reading.select
    with open_shard(shard) as stream:
        samples = iter_samples(stream, reading.limits, end=end)
        selected = (s for s in samples if select is None or select(sample_id(shard.name, s.key)))
        for number, chunk in itertools.groupby(enumerate(selected), lambda one: one[0] // reading.chunk_size):
            yield number, _Counted(sample for _, sample in chunk)


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


def _decode(
    shard: Shard, number: int, samples: Iterable[Sample], reading: _Reading, lethal: Container[int] = ()
) -> pa.Table:
    """One chunk as a row; holds one encoded image at a time, as 256 of them may be 16 GB.

    `lethal` are the places within the chunk of samples that must not be touched.
    """
    laps = Laps()
    images, hashes, places = [], [], []
    rows: list[tuple[str, str | None, str | None]] = []
    for at, sample in enumerate(samples):
        laps.mark("read")
        if at in lethal:
            sample.error = sample.error or "process_died"
        if sample.error is None:
            try:
                images.append(decode_image(sample.image or b"", reading.limits, reading.image_size).tobytes())
            except BadSample as bad:
                sample.error = bad.reason
        hashes.append(sample.content_hash())
        places.append(sample.index)
        rows.append((sample.key, sample.caption, sample.error))
        laps.mark("decode")
    return _row(shard.name, number, images, list(zip(places, hashes, strict=True)), rows, laps.take())


def _row(
    shard: str,
    number: int,
    images: list[bytes],
    placed: list[tuple[int, str]],
    rows: list[tuple[str, str | None, str | None]],
    seconds: dict[str, float],
    failure: str | None = None,
) -> pa.Table:
    return pa.table(
        {
            "shard": [shard],
            "number": [number],
            "index": pa.array([[index for index, _ in placed]], pa.list_(pa.int64())),
            "key": _strings(key for key, _, _ in rows),
            "caption": _strings(caption for _, caption, _ in rows),
            "error": _strings(error for _, _, error in rows),
            "content_hash": _strings(content_hash for _, content_hash in placed),
            "seconds": [json.dumps(seconds)],
            "failure": pa.array([failure], pa.string()),
            # The readable samples' pixels, uint8, one block: Ray Data then moves them without looking inside.
            "pixels": pa.array([b"".join(images)], pa.large_binary()),
        }
    )


def _strings(values: Iterable[str | None]) -> pa.Array:
    """One row that is a list of strings."""
    return pa.array([list(values)], pa.list_(pa.string()))


# ------------------------------------------------------------------------------------------------ working


@dataclass
class Receipt:
    """What an actor tells of a chunk that stands."""

    shard: str
    number: int
    num_samples: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage: of the reader that decoded it (read, decode) and of the actor (the others)."""
    failure: str | None = None
    """An exception, packed."""

    def as_table(self) -> pa.Table:
        return pa.table({"receipt": [json.dumps(asdict(self))]})


def _packed(error: Exception) -> str:
    """An exception as text: Ray would take one that is raised for a lost block, and go on."""
    try:
        return base64.b64encode(cloudpickle.dumps(error)).decode()
    except Exception:  # some cannot travel
        return base64.b64encode(cloudpickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))).decode()


class _Actor:
    """What actors have in common: where their time goes, counters, and receipts in the place of exceptions."""

    def __init__(self, threads: int, name: str, make: Callable[[], Any]):
        """`make` makes the work."""
        import torch

        torch.set_num_threads(threads)
        self.laps, self.counters, self.broken = Laps(), _Counters(name), ""
        try:
            self.work = make()
            if hasattr(self.work, "laps"):
                self.work.laps = self.laps
        except Exception as error:
            logger.exception("an actor cannot start")
            self.broken = _packed(error)
        self.laps.mark("start")

    def _told(self, receipts: Iterable[Receipt]) -> pa.Table:
        """What goes back to the driver, with the seconds since it was told last."""
        receipts = list(receipts)
        for receipt in receipts:
            self.counters.count(receipt.num_samples, receipt.errors)
        if receipts:
            receipts[-1].seconds = {**receipts[-1].seconds, **self.laps.take()}
            for receipt in receipts:
                self.counters.spend(receipt.seconds)
        return pa.table({"receipt": pa.array([json.dumps(asdict(one)) for one in receipts], pa.string())})


class _Worker(_Actor):
    """The actor: does the caller's work on each chunk and commits the part itself; only a receipt travels on."""

    def __init__(self, folder: Place, work: type[Work], work_arguments: dict[str, Any], threads: int, name: str):
        super().__init__(threads, name, lambda: work(**work_arguments))
        self.folder = folder
        # Where an actor died Ray has its whole block done again, also the chunks that stand. Asking a store costs.
        self.looks = isinstance(folder, Path) or ray.get_runtime_context().was_current_actor_reconstructed
        self.committing = ThreadPoolExecutor(2)  # commits overlap with the next chunk's arithmetic

    def __call__(self, rows: pa.Table) -> pa.Table:
        self.laps.mark("wait")
        begun = [self.begin(rows.slice(place, 1).to_pylist()[0]) for place in range(len(rows))]
        receipts = [commit.result() for commit in begun]
        self.laps.mark("write")
        return self._told(receipts)

    def begin(self, row: dict[str, Any]) -> Future[Receipt]:
        """Work on a chunk, and start to commit it."""
        receipt = Receipt(row["shard"], row["number"], seconds=json.loads(row["seconds"]))
        receipt.failure = row["failure"] or self.broken
        try:
            path = part_path(self.folder, row["shard"], row["number"])
            if not receipt.failure and not (self.looks and path.is_file()):
                return self.committing.submit(_commit, self.compute(row), path, receipt)
        except Exception as error:
            logger.exception("chunk %d of %s", row["number"], row["shard"])
            receipt.failure = _packed(error)
        done: Future[Receipt] = Future()
        done.set_result(receipt)
        return done

    def compute(self, row: dict[str, Any]) -> pa.Table:
        errors = row["error"]
        good = [i for i, error in enumerate(errors) if error is None]
        ids = [sample_id(row["shard"], key) for key in row["key"]]
        size = self.work.image_size
        columns: dict[str, Any] = {}
        if good:
            image_BHWC = np.frombuffer(row["pixels"], np.uint8).reshape(len(good), size, size, 3)
            chunk = Chunk([ids[i] for i in good], image_BHWC, [row["caption"][i] for i in good])
            self.laps.mark("transfer")
            columns = self.work(chunk)
            self.laps.mark("work")
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
        return _completed(base, columns, self.work.columns)


class _PartWorker(_Actor):
    """The same over parts that stand."""

    def __init__(
        self,
        source: Place,
        folder: Place,
        work: type[PartWork],
        work_arguments: dict[str, Any],
        threads: int,
        name: str,
    ):
        super().__init__(threads, name, lambda: work(**work_arguments))
        self.source, self.folder = source, folder

    def __call__(self, rows: pa.Table) -> pa.Table:
        self.laps.mark("wait")
        return self._told([self._one(row["shard"], row["number"]) for row in rows.to_pylist()])

    def _one(self, shard: str, number: int) -> Receipt:
        receipt = Receipt(shard, number, failure=self.broken)
        if self.broken:
            return receipt
        try:
            stored = read_part(self.source, shard, number)
            self.laps.mark("read")
            good = stored.filter(stored["error"].is_null())
            columns = self.work(good) if len(good) else {}
            table = _completed(stored.select(BASE_SCHEMA.names), columns, self.work.columns)
            self.laps.mark("work")
            receipt = _commit(table, part_path(self.folder, shard, number), receipt)
            self.laps.mark("write")
        except Exception as error:
            logger.exception("part %d of %s", number, shard)
            receipt.failure = _packed(error)
        return receipt


def _commit(table: pa.Table, path: Place, receipt: Receipt) -> Receipt:
    try:
        write_parquet(table, path)
        receipt.num_samples, receipt.errors = len(table), table["error"].drop_null().to_pylist()
    except Exception as error:
        logger.exception("writing %s", path)
        receipt.failure = _packed(error)
    return receipt


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


def _are_finite(columns: list[Any], num: int) -> np.ndarray:
    """Which of the samples got numbers only, or nothing; a score that is none would never be flagged."""
    is_finite = np.ones(num, bool)
    for column in columns:
        if any(value is None for value in column):
            is_finite &= [value is None or bool(np.isfinite(value).all()) for value in column]
        else:
            is_finite &= np.isfinite(np.asarray(column)).reshape(num, -1).all(axis=1)
    return is_finite


class _Counters:
    """What Ray's Prometheus endpoint on each node shows of a pass."""

    def __init__(self, name: str):
        self.tags = {"pass": name}
        self.samples = metrics.Counter("dede_ray_samples", "Samples that stand, by pass.", ("pass",))
        self.unusable = metrics.Counter("dede_ray_unusable_samples", "Of them, by reason.", ("pass", "reason"))
        self.seconds = metrics.Counter("dede_ray_stage_seconds", "Where time went, by stage.", ("pass", "stage"))

    def count(self, num_samples: int, errors: list[str]) -> None:
        if num_samples:
            self.samples.inc(num_samples, self.tags)
        for reason, num in Counter(errors).items():
            self.unusable.inc(num, {**self.tags, "reason": reason})

    def spend(self, seconds: Mapping[str, float]) -> None:
        for stage, duration in seconds.items():
            if duration > 0:
                self.seconds.inc(duration, {**self.tags, "stage": stage})


# ------------------------------------------------------------------------------------------------ the stream


def _stream(
    shards: list[Shard],
    todo: dict[str, set[int]],
    reading: _Reading,
    actor: partial[_Worker],
    pool: PassResources,
) -> Iterator[Receipt]:
    """Read, decode and work, overlapping. Chunks that keep ending the processes that touch them are left out."""
    readers = max(1, math.ceil(2 * ray.cluster_resources().get("CPU", 1) / len(shards)))
    source = _ChunkSource(shards, todo, reading, readers if readers > 2 else 1)
    context = ray.data.DataContext.get_current()
    kept = context.target_max_block_size, context.max_errored_blocks
    # Chunks leave a shard's read task as soon as there are a few, not when the shard is through.
    chunk_bytes = reading.chunk_size * reading.image_size**2 * 3
    context.target_max_block_size = max(chunk_bytes, min(BYTES_PER_BLOCK, 8 * chunk_bytes))
    context.max_errored_blocks = -1
    try:
        data = ray.data.read_datasource(
            source,
            override_num_blocks=len(source),
            num_cpus=pool.decode_cpus,
            ray_remote_args={"max_retries": TRIES - 1},
        )
        data = data.map_batches(
            actor.func,
            fn_constructor_args=actor.args,
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
            max_restarts=-1,
            max_task_retries=TRIES - 1,
            **pool.of_actor(),
        )
        yield from _receipts(data)
    finally:
        context.target_max_block_size, context.max_errored_blocks = kept


def _receipts(data: ray.data.Dataset) -> Iterator[Receipt]:
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for told in batch["receipt"].to_pylist():  # type: ignore[union-attr, call-overload]
            yield Receipt(**json.loads(told))


class _Watch:
    """Counts receipts, logs progress, and stops a pass that fails or is reading rubbish."""

    def __init__(self, name: str, num_shards: int, max_error_fraction: float, timing: Place | None):
        self.name, self.num_shards, self.max_error_fraction, self.timing = name, num_shards, max_error_fraction, timing
        self.started = self.last = time.monotonic()
        self.num_samples = self.num_chunks = 0
        self.errors: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def follow(self, receipts: Iterable[Receipt]) -> None:
        for receipt in receipts:
            if receipt.failure:
                raise cloudpickle.loads(base64.b64decode(receipt.failure))
            self.num_chunks += 1
            self.num_samples += receipt.num_samples
            self.errors.update(receipt.errors)
            self.seconds.update(receipt.seconds)
            num_errors = sum(self.errors.values())
            if self.num_samples >= 1000 and num_errors > self.max_error_fraction * self.num_samples:
                raise Mistake(too_many_errors(self.errors, self.num_samples, self.max_error_fraction, self.name))
            now = time.monotonic()
            if now - self.last > 5:
                self.last = now
                logger.info(
                    "%s: %s samples in %d chunks of %d shards, %d unreadable, %s samples/s; %s",
                    self.name, f"{self.num_samples:,}", self.num_chunks, self.num_shards, num_errors,
                    f"{self.num_samples / (now - self.started):,.0f}", stage_shares(self.seconds),
                )  # fmt: skip

    def tell(self) -> None:
        """The last line, and timing.json."""
        took_s = time.monotonic() - self.started
        logger.info(
            "%s: %s samples done in %.1f s, %d unreadable; %s",
            self.name, f"{self.num_samples:,}", took_s, sum(self.errors.values()), stage_shares(self.seconds),
        )  # fmt: skip
        if self.timing is not None:
            stages = {stage: round(duration, 3) for stage, duration in sorted(self.seconds.items())}
            write_json(self.timing, {"num_samples": self.num_samples, "seconds": round(took_s, 3), "stages": stages})


READER_STAGES = ("read", "decode")


def stage_shares(seconds: Mapping[str, float]) -> str:
    """`actors: encode 61 %, score 30 %, ...; readers: decode 80 %, read 20 %, 0.4 as busy`, of their time each."""
    parts = []
    spent = {who: {s: t for s, t in seconds.items() if (s in READER_STAGES) == (who == "readers") and s != "start"}
             for who in ("actors", "readers")}  # fmt: skip
    for who, own in spent.items():
        total = sum(own.values())
        if total > 0:
            shares = sorted(own.items(), key=lambda one: -one[1])
            parts.append(f"{who}: " + ", ".join(f"{stage} {duration / total:.0%}" for stage, duration in shares))
    busy = sum(spent["actors"].values()) - spent["actors"].get("wait", 0.0)
    if len(parts) == 2 and busy > 0:
        parts[1] += f", {sum(spent['readers'].values()) / busy:.2f} s for each second that actors work"
    return "; ".join(parts)


# ------------------------------------------------------------------------------------------------ one by one

_DEATHS = (RayActorError, OutOfMemoryError)


def _one_by_one(
    left: dict[Shard, set[int]], reading: _Reading, actor: partial[_Worker], pool: PassResources, name: str
) -> Iterator[Receipt]:
    """Do the chunks that are still missing, as what touched them kept dying, each shard in a process that may die."""
    logger.warning("%s: processes kept dying in %d shards; trying one by one what they lack", name, len(left))
    start = partial(ray.remote(_Alone).options(**pool.of_actor()).remote, reading, actor)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(pool.min_actors) as threads:
        for receipts in threads.map(lambda one: _Careful(start, *one).finish(), left.items()):
            yield from receipts


class _Careful:
    """Finishes one shard from outside of the process that does it."""

    def __init__(self, start: Callable[[], Any], shard: Shard, standing: set[int]):
        self.start, self.shard, self.standing = start, shard, standing
        self.actor: Any = None

    def finish(self) -> list[Receipt]:
        """Do what is missing; lethal samples become rows with that reason."""
        [num_chunks] = self._ask("end") or [None]
        if num_chunks is None:
            raise RuntimeError(
                f"reading {self.shard.url} to its end ends the process that does it; leave that shard out"
            )
        return [self._chunk(number) for number in range(num_chunks) if number not in self.standing]

    def _chunk(self, number: int) -> Receipt:
        told = self._ask("chunk", number, (), tries=1)
        if not told:
            lethal = self._lethal(number)
            logger.warning("chunk %d of %s: %d samples end the process that touches them", number, self.shard.name,
                           len(lethal))  # fmt: skip
            told = self._ask("chunk", number, lethal) or self._ask("chunk", number, _ALL)
        if not told:
            raise RuntimeError(f"chunk {number} of {self.shard.url} cannot be read; leave that shard out")
        return Receipt(**json.loads(told[0]))

    def _lethal(self, number: int) -> list[int]:
        """Places within a chunk of the samples that twice ended the process that had nothing else to do."""
        lethal: list[int] = []
        suspected = first = 0
        is_suspected = False
        while True:
            for survived in self._survived(number, first, lethal):
                if survived < 0:
                    return lethal
                first = survived + 1
            if first in lethal:
                raise RuntimeError(f"chunk {number} of {self.shard.url}: processes die before they touch a sample")
            if is_suspected and first == suspected:
                lethal.append(first)
            is_suspected, suspected = True, first

    def _survived(self, number: int, first: int, lethal: list[int]) -> Iterator[int]:
        """The places that were survived, then -1 if it was the last."""
        try:
            places = self._living().samples.options(
                num_returns="streaming", _generator_backpressure_num_objects=1
            ).remote(self.shard, number, first, lethal)  # fmt: skip
            for at in places:
                yield ray.get(at)
        except _DEATHS:
            self.actor = None

    def _living(self) -> Any:
        self.actor = self.actor or self.start()
        return self.actor

    def _ask(self, method: str, *arguments: Any, tries: int = 2) -> list[Any] | None:
        """What the process answers; None where it died of the question."""
        for _ in range(tries):
            try:
                return ray.get(getattr(self._living(), method).remote(self.shard, *arguments))
            except _DEATHS:
                self.actor = None
        return None


class _Alone:
    """Does one chunk at a time in a process that may die of it."""

    def __init__(self, reading: _Reading, actor: partial[_Worker]):
        self.reading, self.worker = reading, actor()

    def end(self, shard: Shard) -> list[int]:
        """Read a shard to its end, which writes its end marker; how many chunks there are."""
        for _ in _read_and_decode(shard, _ALL, self.reading, _Share()):
            pass
        return [read_end(self.reading.folder, shard.name).num_chunks]

    def chunk(self, shard: Shard, number: int, lethal: Container[int]) -> list[str]:
        """Do a chunk but for its lethal samples; its receipt."""
        told = self.worker(_decode(shard, number, self._samples(shard, number), self.reading, lethal))
        return told["receipt"].to_pylist()

    def samples(self, shard: Shard, number: int, first: int, lethal: list[int]) -> Iterator[int]:
        """Try the samples of a chunk one by one from the `first` on; yields the place of each it survived, then -1."""
        for at, sample in enumerate(self._samples(shard, number)):
            if at >= first:
                if at not in lethal and not self.worker.broken:
                    [row] = _decode(shard, number, [sample], self.reading).to_pylist()
                    self.worker.compute(row)
                yield at
        yield -1

    def _samples(self, shard: Shard, number: int) -> Iterator[Sample]:
        for found, chunk in _numbered_chunks(shard, self.reading, ShardEnd()):
            if found == number:
                yield from chunk
                return
            chunk.finish()


class _All:
    """Contains every chunk, and every place."""

    def __contains__(self, chunk: object) -> bool:
        return True


_ALL = _All()
