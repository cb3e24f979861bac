"""One resumable pass over shards: read, decode on a CPU pool, work on actors, one Parquet part per chunk.

    run_pass(shards, folder, work, ...)                  over the images of shards
    run_over_parts(shards, source, folder, work, ...)    over the parts of a finished pass

Files say which chunks are done (ledger.py); here the others get done. Ray Data streams chunks from readers to a pool
of actors, which work and commit each part themselves (workers.py); only receipts travel on, and `_Progress` counts
them. Whatever dies (a reader, an actor, a node, the driver), finished chunks are kept, and the others are done by the
remaining processes or by the next run of the same command.

A sample that ends every process that touches it is found by `one_by_one`: it tries the samples of the chunk one after
the other in a process of its own, and the sample becomes a row with the reason `process_died`. So does one that never
comes to an end: after `sample_timeout_s` its process is ended.

What the work is (scoring with detectors, embedding for the decoder's training) is a class given by the caller.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import ray
from pydantic import Field
from ray.data import ActorPoolStrategy
from ray.exceptions import OutOfMemoryError, RayActorError

from dede_ray.data.ledger import (
    Hint,
    PassSummary,
    Select,
    claim_parts,
    counted,
    done_chunks,
    end_path,
    read_end,
    summarise,
    too_many_errors,
    unfinished,
)
from dede_ray.data.shards import Limits, Sample, Shard, ShardEnd
from dede_ray.data.unread import why_no_image
from dede_ray.data.workers import (
    TRIES,
    ChunkSource,
    PartWork,
    PartWorker,
    Reading,
    Receipt,
    Work,
    Worker,
    decode,
    find_end,
    numbered_chunks,
    read_receipts,
    unpacked,
)
from dede_ray.runtime.config import Config, Mistake, write_json
from dede_ray.runtime.store import Named, Place, place

logger = logging.getLogger(__name__)

BYTES_PER_BLOCK = 8 * 2**20
"""Chunks travel together up to so many bytes, and at least one: each block costs Ray's driver some milliseconds."""

READER_STAGES = ("read", "decode")
"""Stages of a receipt's seconds that readers spent; actors spent the others."""


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
    sample_timeout_s: float = Field(300, ge=0)
    """Seconds that decoding or scoring one sample may take, alone, before it is taken for one that never ends, and left
    out as `process_died`; 0 waits for ever. A chunk of 256 samples has four times as long before its samples are tried
    one by one, so that a slow machine loses time and no sample."""
    memory_per_actor: int = Field(0, ge=0)
    """Bytes of memory that each actor reserves, so that Ray places no more of them on a node than it holds."""

    def on(self, cluster: dict[str, float]) -> PassResources:
        """Fill in what depends on the cluster: shares of a CPU, and the size of the pool.

        A cluster that grows on demand (`max_actors` is set, or it has no CPU at all so far) is asked for what it lacks.

        Raises:
            Mistake: another one has no room for an actor and a reader.
        """
        cpus, gpus = cluster.get("CPU", 0), cluster.get("GPU", 0)
        per_actor = self.cpus_per_actor or (1 if self.gpus_per_actor else 0.75)
        decode = self.decode_cpus or (1 if self.gpus_per_actor else 0.25)
        if self.max_actors is None and cpus > 0:
            if cpus < per_actor + decode:
                if cpus > 1:
                    raise Mistake(
                        f"resources: an actor's {per_actor:g} CPUs and a decode task's {decode:g} do not fit into the "
                        f"cluster's {cpus:g}; lower them, or set max_actors if the cluster grows"
                    )
                per_actor, decode = 0.5, 0.5
            if self.gpus_per_actor > gpus:
                raise Mistake(
                    f"resources: an actor needs {self.gpus_per_actor:g} GPUs, the cluster has {gpus:g}; "
                    "set max_actors if the cluster grows"
                )
        room = (cpus - decode) / per_actor
        if self.cpus_per_actor is None and self.decode_cpus is None and not self.gpus_per_actor:
            room = cpus  # actors and readers share the cores
        if self.gpus_per_actor > 0:
            room = min(room, gpus / self.gpus_per_actor)
        smallest = self.min_actors or min(max(1, int(room + 1e-9)), self.max_actors or sys.maxsize)
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
        """The resources of one actor, in Ray's words."""
        asked: dict[str, Any] = {"num_cpus": self.cpus_per_actor, "num_gpus": self.gpus_per_actor}
        return asked | ({"memory": self.memory_per_actor} if self.memory_per_actor else {})


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
        made_with: everything that the rows depend on; recorded, and compared when a pass is resumed.
        max_error_fraction: stop when more than this share of the samples cannot be used.
        name: for the log.
        select: leave out the samples for which it says False; None takes all. `made_with` must describe it.

    Raises:
        Mistake: the folder holds parts of another pass, or too many samples are unusable.
    """
    folder = place(folder)
    made_with = {**made_with, "chunk_size": chunk_size, "limits": limits.model_dump(), "image_size": image_size}
    claim_parts(folder, made_with, shards)
    reading = Reading(folder, image_size, chunk_size, limits, select, resources.sample_timeout_s)
    todo = unfinished(folder, shards)
    why = partial(why_no_image, shards, limits)
    if todo:
        skipped = len(shards) - len(todo)
        if skipped or any(todo.values()):
            logger.info("%s: resuming; %d of %d shards are done", name, skipped, len(shards))
        pool = resources.on(ray.cluster_resources())
        progress = _Progress(name, len(todo), max_error_fraction, folder / "timing.json", why)
        threads = pool.threads_per_actor or 1
        actor = partial(Worker, folder, work, work_arguments, threads, name, resources.sample_timeout_s)
        try:
            progress.follow(_stream(todo, reading, actor, pool))
            left = unfinished(folder, todo)
            if left:
                progress.follow(one_by_one(left, reading, actor, pool.of_actor(), pool.min_actors or 1, name))
                left = unfinished(folder, left)
        finally:
            progress.report()
        if left:
            lacking = [shard.name for shard in left][:5]
            raise RuntimeError(f"{name}: chunks are missing in {lacking}; run the same command again")
    return summarise(shards, folder, max_error_fraction, name, why)


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
        shards: those of the finished pass, see `shards_of_pass`.
        source: its folder.
        work: built in each actor as `work(**work_arguments)`, then called with one part's readable rows at a time.

    Raises:
        Mistake: the source is not finished, the folder holds parts of another pass, or too many samples are unusable.
    """
    folder = place(folder)
    claim_parts(folder, made_with, shards, look=False)  # the images may be gone
    for shard in unfinished(source, shards):
        raise Mistake(f"{source} is not finished: {shard.name} lacks parts; run the job that wrote it again")
    todo = [
        {"shard": shard.name, "number": number}
        for shard, done in unfinished(folder, shards).items()
        for number in sorted(done_chunks(source, shard) - done)
    ]
    if todo:
        pool = resources.on(ray.cluster_resources())
        data = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            PartWorker,
            fn_constructor_args=(source, folder, work, work_arguments, pool.threads_per_actor, name),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
            **pool.of_actor(),
        )
        progress = _Progress(name, len(shards), max_error_fraction, None)
        progress.follow(_receipts(data))
        progress.report()
    for shard in shards:
        write_json(end_path(folder, shard.name), asdict(read_end(source, shard.name)))
    return summarise(shards, folder, max_error_fraction, name)


# ----------------------------------------------------------------------------------------------------------- the stream


def _stream(
    todo: dict[Shard, set[int]],
    reading: Reading,
    actor: partial[Worker],
    pool: PassResources,
) -> Iterator[Receipt]:
    """Read, decode and work, overlapping; leaves out chunks that keep ending the processes that touch them."""
    readers = max(1, math.ceil(2 * ray.cluster_resources().get("CPU", 1) / len(todo)))
    source = ChunkSource(todo, reading, readers if readers > 2 else 1)
    context = ray.data.DataContext.get_current()
    kept = context.target_max_block_size, context.max_errored_blocks
    # Chunks leave a shard's read task as soon as there are a few, not when the whole shard is read.
    chunk_bytes = reading.chunk_size * reading.image_size**2 * 3
    context.target_max_block_size = max(chunk_bytes, min(BYTES_PER_BLOCK, 8 * chunk_bytes))
    context.max_errored_blocks = -1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about `ray_remote_args`, for which Ray has no successor yet
            data = ray.data.read_datasource(
                source,
                override_num_blocks=len(source),
                num_cpus=pool.decode_cpus,
                ray_remote_args={"max_retries": TRIES - 1},
            ).map_batches(
                actor.func,
                fn_constructor_args=actor.args,
                batch_size=1 if pool.gpus_per_actor else None,  # Ray demands a number beside GPUs
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
        yield from read_receipts(batch)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- progress


class _Progress:
    """Counts receipts, logs progress, and stops a pass that fails or is reading rubbish."""

    def __init__(
        self, name: str, num_shards: int, max_error_fraction: float, timing: Place | None, hint: Hint = lambda _: ""
    ):
        """`hint` has more to say about reasons, see `summarise`."""
        self.name, self.num_shards, self.max_error_fraction, self.timing = name, num_shards, max_error_fraction, timing
        self.hint = hint
        self.started = self.last = time.monotonic()
        self.num_samples = self.num_chunks = 0
        self.errors: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def follow(self, receipts: Iterable[Receipt]) -> None:
        for receipt in receipts:
            if receipt.failure:
                raise unpacked(receipt.failure)
            self.num_chunks += 1
            self.num_samples += receipt.num_samples
            self.errors.update(receipt.errors)
            self.notes.update(receipt.notes)
            self.seconds.update(receipt.seconds)
            num_errors = sum(self.errors.values())
            if self.num_samples >= 1000 and num_errors > self.max_error_fraction * self.num_samples:
                said = too_many_errors(self.errors, self.num_samples, self.max_error_fraction, self.name)
                raise Mistake(said + self.hint(self.errors))
            now = time.monotonic()
            if now - self.last > 5:
                self.last = now
                logger.info(
                    "%s: %s samples in %d chunks of %d shards, %d unreadable, %s samples/s; %s",
                    self.name, f"{self.num_samples:,}", self.num_chunks, self.num_shards, num_errors,
                    f"{self.num_samples / (now - self.started):,.0f}", stage_shares(self.seconds),
                )  # fmt: skip

    def report(self) -> None:
        """Log the last line, and write timing.json."""
        took_s = time.monotonic() - self.started
        if self.notes:
            logger.info("%s: notes: %s", self.name, counted(self.notes))
        logger.info(
            "%s: %s samples done in %.1f s, %d unreadable; %s",
            self.name, f"{self.num_samples:,}", took_s, sum(self.errors.values()), stage_shares(self.seconds),
        )  # fmt: skip
        if self.timing is not None:
            stages = {stage: round(duration, 3) for stage, duration in sorted(self.seconds.items())}
            write_json(self.timing, {"num_samples": self.num_samples, "seconds": round(took_s, 3), "stages": stages})


def stage_shares(seconds: Mapping[str, float]) -> str:
    """Each stage's share of the actors' or of the readers' time.

    `actors: encode 61%, score 30%, wait 9%; readers: decode 80%, read 20%, 0.18 s for each second that actors work`
    """
    reader_s = {stage: s for stage, s in seconds.items() if stage in READER_STAGES}
    actor_s = {stage: s for stage, s in seconds.items() if stage not in (*READER_STAGES, "start")}
    parts = []
    for who, own_s in (("actors", actor_s), ("readers", reader_s)):
        total_s = sum(own_s.values())
        if total_s > 0:
            shares = sorted(own_s.items(), key=lambda one: -one[1])
            parts.append(f"{who}: " + ", ".join(f"{stage} {s / total_s:.0%}" for stage, s in shares))
    busy_s = sum(actor_s.values()) - actor_s.get("wait", 0.0)
    if len(parts) == 2 and busy_s > 0:
        parts[1] += f", {sum(reader_s.values()) / busy_s:.2f} s for each second that actors work"
    return "; ".join(parts)


# ----------------------------------------------------------------------- samples that end the process that touches them

_DEATHS = (RayActorError, OutOfMemoryError)


def one_by_one(
    left: dict[Shard, set[int]],
    reading: Reading,
    actor: partial[Worker],
    asked: dict[str, Any],
    at_once: int,
    name: str,
) -> Iterator[Receipt]:
    """Do the chunks that are still missing.

    Args:
        left: the shards that lack chunks, with the numbers of those that are done.
        actor: makes what works.
        asked: the resources that each process reserves.
        at_once: shards that are worked on at the same time.
    """
    logger.warning("%s: processes kept dying in %d shards; trying their missing chunks one by one", name, len(left))
    start = partial(ray.remote(_Alone).options(**asked).remote, reading, actor)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(at_once) as threads:
        for receipts in threads.map(lambda one: _Careful(start, *one).finish(), left.items()):
            yield from receipts


class _Careful:
    """Finishes one shard, and survives the process that does the work (`_Alone`): it is started anew when it dies."""

    def __init__(self, start: Callable[[], Any], shard: Shard, done: set[int]):
        self.start, self.shard, self.done = start, shard, done
        self.process: Any = None

    def finish(self) -> list[Receipt]:
        """Do what is missing; lethal samples become rows with that reason."""
        num_chunks = self._ask(lambda process: process.count_chunks.remote(self.shard))
        if num_chunks is None:
            raise RuntimeError(
                f"reading {self.shard.url} to its end ends the process that does it; leave that shard out"
            )
        return [self._chunk(number) for number in range(num_chunks) if number not in self.done]

    def _chunk(self, number: int) -> Receipt:
        receipt = self._do_chunk(number, (), tries=1)
        if receipt is None:
            lethal = self._lethal(number)
            logger.warning("chunk %d of %s: %d samples end the process that touches them, or hold it up", number,
                           self.shard.name, len(lethal))  # fmt: skip
            receipt = self._do_chunk(number, lethal) or self._do_chunk(number, None)
        if receipt is None:
            raise RuntimeError(f"chunk {number} of {self.shard.url} cannot be read; leave that shard out")
        return receipt

    def _do_chunk(self, number: int, skip: Collection[int] | None, tries: int = 2) -> Receipt | None:
        return self._ask(lambda process: process.do_chunk.remote(self.shard, number, skip), tries)

    def _lethal(self, number: int) -> list[int]:
        """Places within a chunk of the samples that twice ended a process with nothing else to do."""
        lethal: list[int] = []
        suspected, first = -1, 0
        while True:
            for survived in self._survived(number, first, lethal):
                if survived < 0:
                    return lethal
                first = survived + 1
            if first in lethal:
                raise RuntimeError(f"chunk {number} of {self.shard.url}: processes die before they touch a sample")
            if first == suspected:
                lethal.append(first)
            suspected = first

    def _survived(self, number: int, first: int, lethal: list[int]) -> Iterator[int]:
        """The places that were survived, then -1 if it was the last."""
        try:
            places = self._running().try_samples.options(
                num_returns="streaming", _generator_backpressure_num_objects=1
            ).remote(self.shard, number, first, lethal)  # fmt: skip
            for at in places:
                yield ray.get(at)
        except _DEATHS:
            self.process = None

    def _ask(self, question: Callable[[Any], Any], tries: int = 2) -> Any:
        """What the process answers; None where it died of the question each time."""
        for _ in range(tries):
            try:
                return ray.get(question(self._running()))
            except _DEATHS:
                self.process = None
        return None

    def _running(self) -> Any:
        self.process = self.process or self.start()
        return self.process


class _Alone:
    """Does one chunk at a time in a process that may die of it."""

    def __init__(self, reading: Reading, actor: partial[Worker]):
        self.reading, self.worker = reading, actor()

    def count_chunks(self, shard: Shard) -> int:
        """Read a shard to its end, which writes its end marker; how many chunks there are."""
        return find_end(shard, self.reading)

    def do_chunk(self, shard: Shard, number: int, skip: Collection[int] | None) -> Receipt:
        """Do a chunk but for the samples at the places `skip`, None for all; its receipt.

        What is left once the samples were tried one by one has all the time that they may take alone.
        """
        self.worker.is_patient = skip != ()
        [receipt] = read_receipts(self.worker(decode(shard, number, self._samples(shard, number), self.reading, skip)))
        return receipt

    def try_samples(self, shard: Shard, number: int, first: int, skip: Collection[int]) -> Iterator[int]:
        """Try the samples of a chunk one by one, from place `first` on; yields each survived place, then -1."""
        for at, sample in enumerate(self._samples(shard, number)):
            if at >= first:
                if at not in skip and not self.worker.broken:
                    [row] = decode(shard, number, [sample], self.reading).to_pylist()
                    self.worker.compute(row)
                yield at
        yield -1

    def _samples(self, shard: Shard, number: int) -> Iterator[Sample]:
        for found, chunk in numbered_chunks(shard, self.reading, ShardEnd()):
            if found == number:
                yield from chunk
                return
            chunk.finish()
