"""The two halves of a pass: readers that decode chunks, actors that work on them and commit.

    shard --> read_and_decode, in Ray's read tasks --> one row per chunk --> Worker, an actor --> part, and a receipt

A reader (`ChunkSource` makes them) opens a shard, decodes `chunk_size` samples at a time and gives each such chunk as
one row. An actor (`Worker`) hands the chunk's readable samples to the caller's `Work`, puts what it returns beside the
base columns, and writes the part (ledger.py); only a `Receipt` goes back to the driver, which counts and logs
(passes.py). `PartWorker` does the same with the parts of a finished pass in the place of shards.

What goes wrong travels as a row: Ray Data would take an exception for a lost block, and leave that block out. So a
sample that cannot be decoded is a row with a reason, and any other exception is packed into the receipt, for the driver
to raise.

Readers run in processes of their own, which must start quickly: importing this module imports no torch.
"""

from __future__ import annotations

import base64
import contextlib
import faulthandler
import itertools
import json
import logging
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray import cloudpickle
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.util import metrics

from dede_ray.data.images import decode_image
from dede_ray.data.ledger import BASE_SCHEMA, End, Select, end_path, part_path, read_part, write_parquet
from dede_ray.data.shards import BadSample, Limits, Sample, Shard, ShardEnd, iter_samples, open_shard, sample_id
from dede_ray.runtime.config import write_json
from dede_ray.runtime.store import Place

logger = logging.getLogger(__name__)
TRIES = 3
"""Attempts at a task whose process dies, before its chunks are taken for the cause; and at a read that fails."""
SAMPLES_PER_TIMEOUT = 64
"""Samples of a chunk that have together the time that one may take alone: a machine has to be very slow to need it."""
JOURNAL = "DEDE_RAY_JOURNAL"
"""Environment variable: a file on each machine to which actors add a line for each chunk that they begin."""


# ----------------------------------------------------------------------------------------------- what a pass is made of


@dataclass(frozen=True)
class Reading:
    """How shards are read."""

    folder: Place
    image_size: int
    chunk_size: int
    limits: Limits
    select: Select | None
    timeout_s: float = 0
    """Seconds that decoding one sample may take before its process is ended; 0 is for ever."""


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
    """Made once per actor; `columns` names and types what it returns, one value per sample.

    A work that has an attribute `laps` gets the actor's, and may mark its own stages there; what it does not mark is
    booked under `work`.
    """

    image_size: int
    columns: dict[str, pa.DataType]

    def __call__(self, chunk: Chunk) -> dict[str, Any]: ...


class PartWork(Protocol):
    """The work of a pass over parts: gets the rows of one part that have no error."""

    columns: dict[str, pa.DataType]

    def __call__(self, table: pa.Table) -> dict[str, Any]: ...


@dataclass
class Receipt:
    """What an actor reports of a chunk: done, or why not."""

    shard: str
    number: int
    num_samples: int = 0
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was left aside of captions and labels; no reason to stop."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage: of the reader that decoded it (read, decode) and of the actor (the others)."""
    failure: str | None = None
    """An exception, `packed`."""


def receipt_table(receipts: list[Receipt]) -> pa.Table:
    """Receipts as a block of Ray Data."""
    return pa.table({"receipt": pa.array([json.dumps(asdict(one)) for one in receipts], pa.string())})


def read_receipts(table: pa.Table) -> list[Receipt]:
    """What `receipt_table` wrote."""
    return [Receipt(**json.loads(line)) for line in table["receipt"].to_pylist()]


def packed(error: Exception) -> str:
    """An exception as text, which travels in a row."""
    try:
        return base64.b64encode(cloudpickle.dumps(error)).decode()
    except Exception:  # some cannot be pickled
        return base64.b64encode(cloudpickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))).decode()


def unpacked(failure: str) -> Exception:
    """The exception that `packed` made text of."""
    error: Exception = cloudpickle.loads(base64.b64decode(failure))
    return error


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


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """End this process, and write where it hangs to its stderr, if what is done here takes longer; 0 is for ever.

    By a thread that needs no interpreter, so that no extension's endless loop can stop it.
    """
    if not seconds:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


# -------------------------------------------------------------------------------------------------------------- readers


class ChunkSource(Datasource):
    """Ray Data source whose rows are chunks: `chunk_size` consecutive samples of one shard, decoded.

    One row, one chunk: Ray Data may merge and split blocks, never a row, so a chunk stays whole through every stage.

    `todo` names the shards, each with the numbers of its chunks that are done already.
    """

    def __init__(self, todo: dict[Shard, set[int]], reading: Reading, readers_per_shard: int):
        super().__init__()
        shares = [Share(number, readers_per_shard) for number in range(readers_per_shard)]
        self._arguments = [(shard, done, reading, share) for shard, done in todo.items() for share in shares]

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
            tasks.append(ReadTask(partial(read_or_report, *arguments), metadata))
        return tasks


@dataclass(frozen=True)
class Share:
    """Which chunks of a shard one reader is for; a shard has several readers where there are fewer shards than CPUs."""

    number: int = 0
    of: int = 1

    def __contains__(self, chunk: int) -> bool:
        return chunk % self.of == self.number


def read_or_report(shard: Shard, done: set[int], reading: Reading, share: Share) -> Iterator[pa.Table]:
    """`read_and_decode`, tried again after a store's hiccup; what fails for good becomes a last row that says so."""
    done = set(done)  # a chunk that was given is not read again
    for attempt in range(1, TRIES + 1):
        try:
            for table in read_and_decode(shard, done, reading, share):
                done.add(table["number"][0].as_py())
                yield table
            return
        except Exception as error:
            if not isinstance(error, OSError) or attempt == TRIES:
                yield _row(shard.name, -1, [], [], seconds={}, failure=packed(error))
                return
            time.sleep(attempt)


def read_and_decode(shard: Shard, done: Container[int], reading: Reading, share: Share) -> Iterator[pa.Table]:
    """Chunks of the selected samples that are not `done`; then, by one reader of each shard, its end marker.

    A shard without any selected sample has one chunk, without rows.
    """
    end = ShardEnd()
    num_selected, number = 0, 0
    for number, chunk in numbered_chunks(shard, reading, end):
        if number in share and number not in done:  # else its bytes pass by; nothing is decoded
            yield decode(shard, number, chunk, reading)
        num_selected += chunk.finish()
    if share.number > 0:
        return
    if num_selected == 0 and 0 not in done:
        yield decode(shard, 0, [], reading)
    _write_end(shard, reading, End(num_selected, number + 1, end.is_complete))


def find_end(shard: Shard, reading: Reading) -> int:
    """Read a shard to its end, decode nothing, and write its end marker; how many chunks it has."""
    end = ShardEnd()
    nums_selected = [chunk.finish() for _, chunk in numbered_chunks(shard, reading, end)]
    num_chunks = max(1, len(nums_selected))
    _write_end(shard, reading, End(sum(nums_selected), num_chunks, end.is_complete))
    return num_chunks


def _write_end(shard: Shard, reading: Reading, end: End) -> None:
    write_json(end_path(reading.folder, shard.name), asdict(end))


def numbered_chunks(shard: Shard, reading: Reading, end: ShardEnd) -> Iterator[tuple[int, _Counted]]:
    """The selected samples of a shard by chunk, not yet decoded; `finish` each chunk before taking the next."""
    select = reading.select
    with open_shard(shard) as stream:
        samples = iter_samples(stream, reading.limits, end=end)
        selected = (s for s in samples if select is None or select(sample_id(shard.name, s.key)))
        for number, chunk in itertools.groupby(enumerate(selected), lambda one: one[0] // reading.chunk_size):
            yield number, _Counted(sample for _, sample in chunk)


class _Counted:
    """A chunk's samples, to be iterated once; `finish` says how many there are, iterated over or not."""

    def __init__(self, samples: Iterable[Sample]):
        self._samples, self._num = iter(samples), 0

    def __iter__(self) -> Iterator[Sample]:
        for sample in self._samples:
            self._num += 1
            yield sample

    def finish(self) -> int:
        return self._num + sum(1 for _ in self._samples)


def decode(
    shard: Shard, number: int, samples: Iterable[Sample], reading: Reading, skip: Collection[int] | None = ()
) -> pa.Table:
    """One chunk as a row; holds one encoded image at a time, as 256 of them may be 16 GB.

    Args:
        skip: places within the chunk of samples that must not be touched, as they end the process; None skips all.
    """
    laps = Laps()
    rows: list[dict[str, Any]] = []
    images: list[bytes] = []
    for at, sample in enumerate(samples):
        laps.mark("read")
        if skip is None or at in skip:
            sample.error = sample.error or "process_died"
        if sample.error is None:
            try:
                with ended_after(reading.timeout_s):
                    images.append(decode_image(sample.image or b"", reading.limits, reading.image_size).tobytes())
            except BadSample as bad:
                sample.error = bad.reason
        row = {name: getattr(sample, name) for name in ("index", "key", "caption", "error")}
        rows.append({**row, "content_hash": sample.content_hash(), "notes": sample.notes or None})
        laps.mark("decode")
    return _row(shard.name, number, rows, images, seconds=laps.take())


def _row(
    shard_name: str,
    number: int,
    samples: list[dict[str, Any]],
    images: list[bytes],
    *,
    seconds: dict[str, float],
    failure: str | None = None,
) -> pa.Table:
    """A chunk, or with `failure` what ended the reading, as one row."""
    kinds = {"index": pa.int64(), **dict.fromkeys(("key", "caption", "error", "content_hash"), pa.string())}
    kinds["notes"] = pa.list_(pa.string())
    lists = {name: pa.array([[one[name] for one in samples]], pa.list_(kind)) for name, kind in kinds.items()}
    return pa.table(
        {
            "shard": [shard_name],
            "number": [number],
            **lists,
            "seconds": [json.dumps(seconds)],
            "failure": pa.array([failure], pa.string()),
            # The readable samples' pixels, uint8, one block: Ray Data then moves them without looking inside.
            "pixels": pa.array([b"".join(images)], pa.large_binary()),
        }
    )


# --------------------------------------------------------------------------------------------------------------- actors


class _Actor:
    """What actors have in common: where their time goes, counters, and receipts in the place of exceptions."""

    def __init__(self, threads: int, name: str, make: Callable[[], Any]):
        """`make` makes the work."""
        import torch

        torch.set_num_threads(threads)
        self.name, self.laps, self.counters, self.broken = name, Laps(), _Counters(name), ""
        try:
            self.work = make()
            if hasattr(self.work, "laps"):
                self.work.laps = self.laps
        except Exception as error:
            logger.exception("an actor cannot start")
            self.broken = packed(error)
        self.laps.mark("start")

    def _report(self, receipts: list[Receipt]) -> pa.Table:
        """The receipts as the driver reads them, the last one with the seconds spent since the last report."""
        for receipt in receipts:
            self.counters.count(receipt.num_samples, receipt.errors)
        if receipts:
            receipts[-1].seconds = {**receipts[-1].seconds, **self.laps.take()}
            for receipt in receipts:
                self.counters.spend(receipt.seconds)
        return receipt_table(receipts)


class Worker(_Actor):
    """An actor over shards: does the caller's work on each chunk and commits the part; only a receipt travels on."""

    def __init__(
        self,
        folder: Place,
        work: type[Work],
        work_arguments: dict[str, Any],
        threads: int,
        name: str,
        timeout_s: float = 0,
    ):
        """`timeout_s` is for one sample; `_may_take` says what a chunk gets."""
        super().__init__(threads, name, lambda: work(**work_arguments))
        self.folder, self.timeout_s, self.is_patient = folder, timeout_s, False
        self.longest_s = 0.0
        self.journal = os.environ.get(JOURNAL)
        # Where an actor died Ray repeats its whole block, finished chunks included. Asking a store takes time, so
        # only then are they looked for there.
        self.looks = isinstance(folder, Path) or ray.get_runtime_context().was_current_actor_reconstructed
        self.committing = ThreadPoolExecutor(2)  # commits overlap with the next chunk's arithmetic

    def __call__(self, rows: pa.Table) -> pa.Table:
        self.laps.mark("wait")
        begun = [self.begin(rows.slice(place, 1).to_pylist()[0]) for place in range(len(rows))]
        receipts = [commit.result() for commit in begun]
        self.laps.mark("write")
        return self._report(receipts)

    def begin(self, row: dict[str, Any]) -> Future[Receipt]:
        """Work on a chunk, and begin to commit it."""
        receipt = Receipt(row["shard"], row["number"], seconds=json.loads(row["seconds"]))
        receipt.failure = row["failure"] or self.broken
        try:
            path = part_path(self.folder, row["shard"], row["number"])
            if not receipt.failure and not (self.looks and path.is_file()):
                self._note(row)
                return self.committing.submit(_commit, self.compute(row), path, receipt)
        except Exception as error:
            logger.exception("chunk %d of %s", row["number"], row["shard"])
            receipt.failure = packed(error)
        done: Future[Receipt] = Future()
        done.set_result(receipt)
        return done

    def _note(self, row: dict[str, Any]) -> None:
        if self.journal:
            with open(self.journal, "a") as journal:
                journal.write(f"{time.time()}\t{os.getpid()}\t{self.name}\t{row['shard']}\t{row['number']}\n")

    def _may_take(self, num_samples: int) -> float:
        """Seconds for a chunk; `is_patient` gives each sample what it may take alone."""
        if not self.timeout_s:
            return 0
        if self.is_patient:
            return self.timeout_s * num_samples
        return max(self.timeout_s * math.ceil(num_samples / SAMPLES_PER_TIMEOUT), 20 * self.longest_s)

    def compute(self, row: dict[str, Any]) -> pa.Table:
        """The part of a chunk: all its samples, with what the work says of the readable ones."""
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
            self.laps.mark("transfer")
            began = time.monotonic()
            with ended_after(self._may_take(len(good))):
                columns = self.work(chunk)
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            self.laps.mark("work")
        base = pa.table(
            {
                "sample_id": ids,
                "content_hash": row["content_hash"],
                "shard": [row["shard"]] * len(ids),
                "index": row["index"],
                "error": errors,
                "notes": row["notes"],
            },
            schema=BASE_SCHEMA,
        )
        return _completed(base, columns, self.work.columns)


class PartWorker(_Actor):
    """An actor over the parts of a finished pass: works on each part's readable rows, and commits a part of its own."""

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
        return self._report([self._one(row["shard"], row["number"]) for row in rows.to_pylist()])

    def _one(self, shard: str, number: int) -> Receipt:
        receipt = Receipt(shard, number, failure=self.broken)
        if self.broken:
            return receipt
        try:
            stored = read_part(self.source, shard, number)
            self.laps.mark("read")
            good = stored.filter(stored["error"].is_null())
            columns = self.work(good) if len(good) else {}
            if "notes" not in stored.column_names:  # of an earlier version
                stored = stored.append_column(BASE_SCHEMA.field("notes"), pa.nulls(len(stored), pa.list_(pa.string())))
            table = _completed(stored.select(BASE_SCHEMA.names), columns, self.work.columns)
            self.laps.mark("work")
            receipt = _commit(table, part_path(self.folder, shard, number), receipt)
            self.laps.mark("write")
        except Exception as error:
            logger.exception("part %d of %s", number, shard)
            receipt.failure = packed(error)
        return receipt


def _commit(table: pa.Table, path: Place, receipt: Receipt) -> Receipt:
    try:
        write_parquet(table, path)
        receipt.num_samples, receipt.errors = len(table), table["error"].drop_null().to_pylist()
        receipt.notes = pc.list_flatten(table["notes"]).to_pylist()
    except Exception as error:
        logger.exception("writing %s", path)
        receipt.failure = packed(error)
    return receipt


def _completed(base: pa.Table, columns: dict[str, Any], kinds: dict[str, pa.DataType]) -> pa.Table:
    """Put what the work gave for the rows without an error beside all rows; a sample without numbers gets an error."""
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
    """Which of the samples got finite numbers only, or nothing; NaN would never be flagged."""
    is_finite = np.ones(num, bool)
    for column in columns:
        if any(value is None for value in column):
            is_finite &= [value is None or bool(np.isfinite(value).all()) for value in column]
        else:
            is_finite &= np.isfinite(np.asarray(column)).reshape(num, -1).all(axis=1)
    return is_finite


class _Counters:
    """Counters of a pass, as Ray's Prometheus endpoint on each node shows them."""

    def __init__(self, name: str):
        self.tags = {"pass": name}
        self.samples = metrics.Counter("dede_ray_samples", "Samples that are done, by pass.", ("pass",))
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
