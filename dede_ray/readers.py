"""Readers of a pass: chunks of shards, decoded, one row each.

A row is a chunk: `chunk_size` consecutive samples of one shard. Ray Data may merge and split blocks, never a row, so a
chunk stays whole through every stage.
"""

from __future__ import annotations

import base64
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from ray import cloudpickle
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from dede_ray.config import write_json
from dede_ray.ledger import End, Select, end_path
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
from dede_ray.store import Place

TRIES = 3
"""Of a task that keeps dying, before its chunks are taken for what kills it; and of a read that fails."""


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


def packed(error: Exception) -> str:
    """An exception as text: Ray would take one that is raised for a lost block, and go on."""
    try:
        return base64.b64encode(cloudpickle.dumps(error)).decode()
    except Exception:  # some cannot travel
        return base64.b64encode(cloudpickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))).decode()


@dataclass(frozen=True)
class Reading:
    """How shards are read."""

    folder: Place
    image_size: int
    chunk_size: int
    limits: Limits
    select: Select | None


@dataclass(frozen=True)
class Share:
    """Which chunks of a shard one reader is for; a shard has several readers where there are fewer shards than CPUs."""

    number: int = 0
    of: int = 1

    def __contains__(self, chunk: int) -> bool:
        return chunk % self.of == self.number


class ChunkSource(Datasource):
    """Ray Data source whose rows are chunks: `chunk_size` consecutive samples of one shard, decoded.

    One row, one chunk: Ray Data may merge and split blocks, never a row, so a chunk stays whole through every stage.
    """

    def __init__(self, todo: dict[Shard, set[int]], reading: Reading, readers_per_shard: int):
        super().__init__()
        shares = [Share(number, readers_per_shard) for number in range(readers_per_shard)]
        self._arguments = [(shard, standing, reading, share) for shard, standing in todo.items() for share in shares]

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


def _read_or_tell(shard: Shard, standing: set[int], reading: Reading, share: Share) -> Iterator[pa.Table]:
    """Chunks; where reading fails for good, one row that says so instead, as Ray would take an exception for a loss."""
    done = set(standing)
    for attempt in range(1, TRIES + 1):
        try:
            for table in read_and_decode(shard, done, reading, share):
                done.add(table["number"][0].as_py())
                yield table
            return
        except Exception as error:
            if not isinstance(error, OSError) or attempt == TRIES:
                yield _row(shard.name, -1, [], [], [], {}, packed(error))
                return
            time.sleep(attempt)  # a store's hiccup; what was passed on is not read again


def read_and_decode(shard: Shard, standing: Container[int], reading: Reading, share: Share) -> Iterator[pa.Table]:
    """Chunks of the selected samples; a shard without any still has one part, without rows."""
    end = ShardEnd()
    num_selected, number = 0, 0
    for number, chunk in numbered_chunks(shard, reading, end):
        if number in share and number not in standing:  # else its bytes pass by; nothing is decoded
            yield decode(shard, number, chunk, reading)
        num_selected += chunk.finish()
    if share.number > 0:
        return
    if num_selected == 0 and 0 not in standing:
        yield decode(shard, 0, [], reading)
    write_json(end_path(reading.folder, shard.name), asdict(End(num_selected, number + 1, end.is_complete)))


def numbered_chunks(shard: Shard, reading: Reading, end: ShardEnd) -> Iterator[tuple[int, _Counted]]:
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


def decode(
    shard: Shard, number: int, samples: Iterable[Sample], reading: Reading, lethal: Container[int] = ()
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
