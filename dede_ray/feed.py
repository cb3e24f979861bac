"""The order in which a training run sees its samples: a pure function of seed and step.

A global batch is cut into a fixed number of *lanes*. Each epoch the chunks are shuffled, strung together and divided
evenly over the lanes; a lane walks through its part of epoch after epoch and gives `batch_size / lanes` samples to
every step, shuffled within windows of several steps. Rank r serves the lanes r, r + world, ... So which samples make
up batch t depends on nothing but the settings: a run that resumes at step t, with any number of workers that divides
the lanes, goes on exactly where it was, and no sample is lost or seen twice in an epoch. (The up to `lanes - 1`
samples that do not divide evenly sit out one epoch; the shuffle makes them others each time.)

Ray Data reads ahead: one read task per window and rank, decoding on the cluster's CPUs, in order.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from dede_ray.config import Mistake
from dede_ray.shards import Limits, Sample, Shard, iter_samples, open_shard, split_name

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class ChunkRef:
    """Where one chunk begins: enough to read it without reading what stands before it."""

    shard: Shard
    number: int
    offset: int
    num_samples: int


def index_shards(shards: list[Shard], chunk_size: int) -> list[ChunkRef]:
    """Find every chunk's place by reading the tar headers only, shards in parallel on Ray.

    Raises:
        Mistake: a compressed shard, which cannot be read from the middle.
    """
    for shard in shards:
        if not shard.name.endswith(".tar"):
            raise _compressed(shard)
    index_one = ray.remote(num_cpus=1)(_index_one)
    return [ref for refs in ray.get([index_one.remote(shard, chunk_size) for shard in shards]) for ref in refs]


def _compressed(shard: Shard) -> Mistake:
    return Mistake(
        f"{shard.url} is compressed; training reads shards at many places, so it needs plain .tar files "
        "(gunzip it, or write shards with jobs/ingest.py)"
    )


def _index_one(shard: Shard, chunk_size: int) -> list[ChunkRef]:
    refs: list[ChunkRef] = []
    key, count, offset = None, 0, 0
    with open_shard(shard) as stream:
        try:
            tar = tarfile.open(fileobj=stream, mode="r:")
        except tarfile.ReadError:  # `list_shards` found a tar in it, but none that begins with a header
            raise _compressed(shard) from None
        try:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would remember every member
                if not member.isfile() or split_name(member.name)[0] == key:
                    continue
                key = split_name(member.name)[0]
                if count == chunk_size:
                    refs.append(ChunkRef(shard, len(refs), offset, count))
                    count = 0
                if count == 0:
                    offset = member.offset
                count += 1
        except tarfile.ReadError:
            pass  # a truncated shard: what stands before the cut is trained on, the score pass reports the rest
    return [*refs, ChunkRef(shard, len(refs), offset, count)] if count else refs


@dataclass(frozen=True)
class Plan:
    """Everything that decides which samples make up which batch."""

    index: list[ChunkRef]
    batch_size: int
    lanes: int
    seed: int
    shuffle: bool
    steps_per_window: int

    def __post_init__(self) -> None:
        if self.batch_size % self.lanes:
            raise Mistake(f"batch_size {self.batch_size} must be a multiple of lanes {self.lanes}")
        if self.num_samples < self.lanes:
            raise Mistake(f"{self.num_samples} training samples are fewer than the {self.lanes} lanes of a batch")

    @property
    def num_samples(self) -> int:
        return sum(ref.num_samples for ref in self.index)

    def pieces(self, lane: int, first: int, count: int) -> Iterator[tuple[int, ChunkRef, int, int]]:
        """Samples `first ... first + count` of an endless lane, as (epoch, chunk, start, stop) pieces."""
        per_epoch = self.num_samples // self.lanes
        while count > 0:
            epoch, within = divmod(first, per_epoch)
            take = min(count, per_epoch - within)
            order = self._chunk_order(epoch)
            ends = np.cumsum([self.index[i].num_samples for i in order])
            begin = lane * per_epoch + within
            place = int(np.searchsorted(ends, begin, side="right"))
            first, count = first + take, count - take
            while take > 0:
                ref = self.index[order[place]]
                start = begin - int(ends[place] - ref.num_samples)
                stop = min(ref.num_samples, start + take)
                yield epoch, ref, start, stop
                begin, take, place = begin + stop - start, take - (stop - start), place + 1

    def _chunk_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.index))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.index))


# Turns samples `start ... start + len(samples)` of a chunk, in some epoch, into columns; leaves out what it cannot use.
Decode = Callable[[ChunkRef, int, int, list[Sample]], Columns]


def read_window(plan: Plan, lanes: list[int], window: int, limits: Limits, decode: Decode) -> Iterator[Columns]:
    """Read one window for some lanes; yields one batch of columns per step.

    A sample that cannot be used leaves a gap; the gap is filled by the usable samples of the same lane and window, in
    turn, so that batches keep their size. `num_unusable` counts the gaps.
    """
    share = plan.batch_size // plan.lanes
    count = share * plan.steps_per_window
    by_lane: list[Columns] = []
    for lane in lanes:
        parts: list[Columns] = []
        for epoch, ref, start, stop in plan.pieces(lane, window * count, count):
            samples = read_samples(ref, start, stop, limits)
            parts.append(decode(ref, epoch, start, samples))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        usable = len(next(iter(joined.values())))
        if usable == 0:
            raise Mistake(f"none of {count} training samples in a row can be used; score the shards to see the reasons")
        order = np.arange(count) % usable
        if plan.shuffle:
            order = np.random.default_rng([plan.seed, lane, window]).permutation(count) % usable
        joined = {name: column[order] for name, column in joined.items()}
        joined["num_unusable"] = np.full(count, (count - usable) / count, np.float32)
        by_lane.append(joined)
    for step in range(plan.steps_per_window):
        rows = slice(step * share, (step + 1) * share)
        yield {name: np.concatenate([lane[name][rows] for lane in by_lane]) for name in by_lane[0]}


def read_samples(ref: ChunkRef, start: int, stop: int, limits: Limits) -> list[Sample]:
    """Samples `start ... stop` of a chunk, read from the chunk's place in its shard."""
    with open_shard(ref.shard) as stream:
        stream.seek(ref.offset)
        return list(itertools.islice(iter_samples(stream, limits), start, stop))


def batches(
    plan: Plan,
    first_step: int,
    num_steps: int,
    rank: int,
    world: int,
    limits: Limits,
    decode: Decode,
    read_cpus: float = 1,
    readers: int = 2,
) -> Iterator[tuple[int, Columns]]:
    """This rank's share of every global batch from `first_step` on: (step, columns).

    Args:
        readers: windows that are read at once.
        read_cpus: CPUs that each of them reserves.
    """
    if plan.lanes % world:
        raise Mistake(f"lanes {plan.lanes} must be a multiple of the {world} training workers")
    lanes = list(range(rank, plan.lanes, world))
    first_window, skip = divmod(first_step, plan.steps_per_window)
    windows = range(first_window, -(-num_steps // plan.steps_per_window))
    source = _Windows(partial(_packed_window, plan, lanes, limits, decode), windows)
    data = ray.data.read_datasource(source, override_num_blocks=len(windows), num_cpus=read_cpus, concurrency=readers)
    data.context.execution_options.preserve_order = True
    steps = iter(range(first_window * plan.steps_per_window, num_steps))
    for batch in data.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=4):
        step = next(steps, None)
        if step is None:
            break  # the last window reaches beyond the last step
        if skip:
            skip -= 1
            continue
        yield step, _unpack(batch)


class _Windows(Datasource):
    """Ray Data source with one read task per window."""

    def __init__(self, read: Callable[[int], Iterator[pa.Table]], windows: range):
        super().__init__()
        self._read, self._windows = read, windows

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(self._read, window), metadata) for window in self._windows]


def _packed_window(plan: Plan, lanes: list[int], limits: Limits, decode: Decode, window: int) -> Iterator[pa.Table]:
    for columns in read_window(plan, lanes, window, limits, decode):
        yield _pack(columns)


def _pack(columns: Columns) -> pa.Table:
    """One batch as one row of bytes: Ray Data then moves it without looking inside."""
    row: dict[str, Any] = {}
    for name, column in columns.items():
        row[name] = pa.array([np.ascontiguousarray(column).tobytes()], pa.large_binary())
        row[f"{name}/like"] = [f"{column.dtype.str} {' '.join(map(str, column.shape))}"]
    return pa.table(row)


def _unpack(row: pa.Table) -> Columns:
    columns = {}
    for name in row.column_names:
        if name.endswith("/like"):
            continue
        dtype, *shape = row[f"{name}/like"][0].as_py().split()
        buffer = row[name].chunk(0)[0].as_buffer()
        columns[name] = np.frombuffer(buffer, dtype).reshape([int(side) for side in shape])
    return columns
