"""The order in which a training run sees its samples: a pure function of seed and step.

A global batch is cut into a fixed number of *lanes*. Each epoch the chunks are shuffled, strung together and divided
over the lanes; a lane walks through its part of epoch after epoch and gives `batch_size / lanes` samples to every step,
shuffled within windows of several steps. Rank r serves the lanes r, r + world, ... So which samples make up batch t
depends on nothing but the settings: a run that resumes at step t, with any number of workers that divides the lanes,
continues exactly where it was, and every epoch holds every sample exactly once. (A batch may hold the end of one epoch
and the start of the next; a run's last batch is filled up from the epoch after its last.)

In order of running: `index_of` finds the chunks, `Plan` says which samples make up which batch, `decode_samples` turns
samples into columns, `batches` has Ray Data read ahead (one read task per window and rank, decoding on the cluster's
CPUs, in order), and `Seen` checks the plan from the other end: it marks what was trained on, sample by sample.
"""

from __future__ import annotations

import itertools
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from dede_ray.data.shards import (
    BadSample,
    Grouping,
    Limits,
    Reason,
    Sample,
    Shard,
    iter_samples,
    list_shards,
    open_shard,
    sample_id,
)
from dede_ray.data.tar import open_tar
from dede_ray.runtime.config import Mistake

Columns = dict[str, np.ndarray]

CHUNK_SIZE = 256  # samples of a shard that are read together

# Ray Data's executor keeps a core busy for as long as readers wait for room, in the very process that trains. So a
# dataset holds no more samples than are read ahead at once, and the next one begins when half of it is used.
BYTES_PER_DATASET = 512 * 2**20
BYTES_PER_BLOCK = 32 * 2**20  # each block costs Ray Data's executor some milliseconds, in that process, too


@dataclass(frozen=True)
class ChunkRef:
    """Where one chunk begins: enough to read it without reading what comes before it."""

    shard: Shard
    number: int
    offset: int
    num_samples: int


def index_of(shards: str | list[str]) -> list[ChunkRef]:
    """The chunks that a trainer reads of shards, given as settings name them; Ray must be running."""
    return index_shards(list_shards(shards))


def index_shards(shards: list[Shard], chunk_size: int = CHUNK_SIZE) -> list[ChunkRef]:
    """Find every chunk's place by reading the tar headers only, shards in parallel on Ray.

    Raises:
        Mistake: a compressed shard, which cannot be read from the middle.
    """
    for shard in shards:
        if not shard.name.lower().endswith(".tar"):
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
    grouping, count, offset = Grouping(), 0, 0
    with open_shard(shard) as stream:
        try:
            tar = open_tar(stream)
            if tar.is_gzipped:
                raise _compressed(shard)
            for member in tar:
                place = grouping.place(member.name) if member.isfile() else None
                if place is None or not place.is_first:
                    continue
                if count == chunk_size:
                    refs.append(ChunkRef(shard, len(refs), offset, count))
                    count = 0
                if count == 0:
                    offset = member.offset
                count += 1
        except tarfile.ReadError:
            pass  # a damaged shard: what comes before the cut is trained on, the score pass reports the rest
    return [*refs, ChunkRef(shard, len(refs), offset, count)] if count else refs


class Piece(NamedTuple):
    """Samples `start ... stop` of a chunk, as some epoch sees them."""

    epoch: int
    ref: ChunkRef
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Everything that decides which samples make up which batch.

    `index` holds the chunks of all shards one after the other, `weights` one per chunk: the times that an epoch holds
    it. 2 doubles a chunk, 0.5 takes it every other epoch, half of the chunks in each. None: each once.
    """

    index: list[ChunkRef]
    batch_size: int
    lanes: int
    seed: int
    shuffle: bool
    steps_per_window: int
    epochs: float
    weights: list[float] | None = None
    _orders: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)
    _starts: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)
    _bases: dict[ChunkRef, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch_size % self.lanes:
            raise Mistake(f"batch_size {self.batch_size} must be a multiple of lanes {self.lanes}")
        if self.num_samples < self.lanes:
            raise Mistake(f"{self.num_samples} training samples are fewer than the {self.lanes} lanes of a batch")

    def __getstate__(self) -> dict[str, Any]:
        looked_up = {"_orders": {}, "_starts": [0], "_bases": {}}  # which need not travel
        return {**self.__dict__, **looked_up}

    @property
    def num_samples(self) -> int:
        return sum(ref.num_samples for ref in self.index)

    def bases(self) -> dict[ChunkRef, int]:
        """The number of each chunk's first sample."""
        if not self._bases:
            ends = np.cumsum([ref.num_samples for ref in self.index])
            self._bases.update((ref, int(end) - ref.num_samples) for ref, end in zip(self.index, ends, strict=True))
        return self._bases

    @property
    def num_steps(self) -> int:
        """Steps until every lane has seen its part of all epochs."""
        whole = int(self.epochs)
        end = self.epoch_start(whole)
        end += round((self.epochs - whole) * (self.epoch_start(whole + 1) - end))
        return max(1, -(-self._lane_start(0, end) // (self.batch_size // self.lanes)))

    def epoch_start(self, epoch: int) -> int:
        """Samples that all epochs before this one hold."""
        while len(self._starts) <= epoch:
            _, ends = self._order(len(self._starts) - 1)
            self._starts.append(self._starts[-1] + int(ends[-1]))
        return self._starts[epoch]

    def open_epoch(self, step: int) -> int:
        """The first epoch of which something may come after `step` steps."""
        position, epoch = step // self.steps_per_window * self.steps_per_window * self.batch_size, 0
        while self.epoch_start(epoch + 1) + self.lanes <= position:
            epoch += 1
        return epoch

    def steps_of(self, window: int) -> int:
        """Steps of a window: all have the same number, except the run's last."""
        return max(0, min(self.steps_per_window, self.num_steps - window * self.steps_per_window))

    def pieces(self, lane: int, first: int, count: int) -> Iterator[Piece]:
        """Samples `first ... first + count` of an endless lane, in the lane's order."""
        epoch, position, end = 0, first, first + count
        while position < end:
            begins, ends = (self._lane_start(lane, self.epoch_start(e)) for e in (epoch, epoch + 1))
            stop = min(end, ends)
            if position < stop:
                place = self._lanes_before(lane, epoch) + position - begins
                yield from self._pieces_of_epoch(epoch, place, place + stop - position)
                position = stop
            epoch += 1

    def _pieces_of_epoch(self, epoch: int, start: int, stop: int) -> Iterator[Piece]:
        """Samples `start ... stop` of one epoch's order."""
        order, ends = self._order(epoch)
        for number in range(int(np.searchsorted(ends, start, side="right")), len(order)):
            ref = self.index[order[number]]
            begins = int(ends[number]) - ref.num_samples
            if begins >= stop:
                return
            yield Piece(epoch, ref, max(start - begins, 0), min(stop - begins, ref.num_samples))

    def _lanes_before(self, lane: int, epoch: int) -> int:
        """Samples of an epoch that the lanes before this one get: its order is cut into one part per lane."""
        begins, ends = self.epoch_start(epoch), self.epoch_start(epoch + 1)
        return sum(self._lane_start(other, ends) - self._lane_start(other, begins) for other in range(lane))

    def _lane_start(self, lane: int, position: int) -> int:
        """How many of the first `position` samples of all epochs are a lane's: lanes differ by at most one."""
        return (position + self.lanes - 1 - lane) // self.lanes

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunks of an epoch in their order, and where each ends."""
        if epoch not in self._orders:
            order = np.arange(len(self.index))
            if self.weights is not None:
                order = np.repeat(order, self._times(epoch))
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch]).permutation(order)
            if not len(order):
                raise Mistake(f"epoch {epoch} holds no sample: the weights of all sources are too small for so few")
            ends = np.cumsum([self.index[i].num_samples for i in order])
            for old in [e for e in self._orders if e < epoch - 2]:
                del self._orders[old]
            self._orders[epoch] = order, ends
        return self._orders[epoch]

    def _times(self, epoch: int) -> np.ndarray:
        """How often an epoch holds each chunk: w times on average over the epochs, in turn where w is no integer."""
        weight = np.asarray(self.weights)
        turn = (np.random.default_rng([self.seed]).permutation(len(weight)) + 0.5) / len(weight)
        return np.floor(weight * (epoch + 1) + turn).astype(int) - np.floor(weight * epoch + turn).astype(int)


SetAside = Literal["outside_ball"]
"""Why a sample without any fault is not trained on: its embedding is long (`decoder.ood_fill`)."""
SET_ASIDE: tuple[SetAside, ...] = get_args(SetAside)
Unused = Reason | SetAside
Decoded = tuple[Columns, Sequence[Unused | None]]
"""Columns of the samples that can be used, and for each sample the reason why it cannot be used, or None."""
Decode = Callable[[ChunkRef, int, int, list[Sample]], Decoded]
"""Decodes samples `start ... start + len(samples)` of a chunk in some epoch: (chunk, epoch, start, samples)."""


def decode_samples(
    ref: ChunkRef, samples: list[Sample], read_one: Callable[[Sample, bytes, str], dict[str, Any]]
) -> tuple[dict[str, list[Any]], list[Reason | None]]:
    """Read the samples of a chunk one by one, and note why some cannot be used.

    Args:
        read_one: (sample, its image's bytes, its id) -> what is kept of it, by name; raises BadSample with the reason
            if it cannot be used.

    Returns:
        The values of the usable samples by name, in order, and their ids as `name`; a name that no sample has gives an
        empty list. For each sample the reason why it cannot be used, or None.
    """
    kept: dict[str, list[Any]] = defaultdict(list)
    errors: list[Reason | None] = []
    for sample in samples:
        name, error = sample_id(ref.shard.name, sample.key), sample.error
        try:
            if error is None and sample.image is None:
                error = "no_image"
            if error is None and sample.image is not None:
                for column, value in {**read_one(sample, sample.image, name), "name": name}.items():
                    kept[column].append(value)
        except BadSample as bad:
            error = bad.reason
        errors.append(error)
    return kept, errors


def stacked(images: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Images of one shape as one array, even if there are none."""
    return np.stack(images) if images else np.empty((0, *shape), np.uint8)


def id_column(names: list[str]) -> np.ndarray:
    """Sample ids as a column of bytes."""
    return np.array([name.encode() for name in names], "S")


def read_window(plan: Plan, lanes: list[int], window: int, limits: Limits, decode: Decode) -> Iterator[Columns]:
    """Read one window for some lanes; yields one batch of columns per step.

    Beside the columns of `decode` a batch has `epoch` and `place` (which sample this is: its number over all chunks).
    A sample that cannot be used leaves a gap; the gap is filled by the usable samples of the same lane and window, in
    turn, so that batches keep their size. `unusable` lists the gaps, all in the window's first batch: JSON,
    [[epoch, reason, count], ...].
    """
    yield from _read(_Window.of(plan, lanes, window), limits, decode)


@dataclass(frozen=True)
class _Window:
    """The input of one read task: the pieces of each lane, each with the number of its chunk's first sample."""

    pieces: list[list[tuple[Piece, int]]]
    shuffles: list[list[int] | None]
    share: int
    num_steps: int

    @classmethod
    def of(cls, plan: Plan, lanes: list[int], window: int) -> _Window:
        share, steps = plan.batch_size // plan.lanes, plan.steps_of(window)
        first = window * plan.steps_per_window * share
        base = plan.bases()
        pieces = [[(piece, base[piece.ref]) for piece in plan.pieces(lane, first, share * steps)] for lane in lanes]
        shuffles = [[plan.seed, lane, window] if plan.shuffle else None for lane in lanes]
        return cls(pieces, shuffles, share, steps)


def _read(window: _Window, limits: Limits, decode: Decode) -> Iterator[Columns]:
    count = window.share * window.num_steps
    by_lane: list[Columns] = []
    unusable: Counter[tuple[int, str]] = Counter()
    for pieces, shuffle in zip(window.pieces, window.shuffles, strict=True):
        parts: list[Columns] = []
        for piece, base in pieces:
            samples = read_samples(piece.ref, piece.start, piece.stop, limits)
            columns, errors = decode(piece.ref, piece.epoch, piece.start, samples)
            usable = np.flatnonzero([error is None for error in errors])
            unusable.update((piece.epoch, error) for error in errors if error is not None)
            columns["place"] = base + piece.start + usable
            columns["epoch"] = np.full(len(usable), piece.epoch, np.int32)
            parts.append(columns)
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        found = len(joined["place"])
        if found == 0:
            raise Mistake(f"none of {count} training samples in a row can be used ({in_words(unusable)})")
        order = np.arange(found)
        if shuffle is not None:  # each epoch's samples among themselves
            mixed = np.random.default_rng(shuffle).permutation(found)
            order = mixed[np.argsort(joined["epoch"][mixed], kind="stable")]
        order = order[np.arange(count) % found]
        by_lane.append({name: column[order] for name, column in joined.items()})
    notes = json.dumps([[epoch, reason, n] for (epoch, reason), n in sorted(unusable.items())]).encode()
    for step in range(window.num_steps):
        rows = slice(step * window.share, (step + 1) * window.share)
        batch = {name: np.concatenate([lane[name][rows] for lane in by_lane]) for name in by_lane[0]}
        yield {**batch, "unusable": np.frombuffer(notes if step == 0 else b"[]", np.uint8)}


def in_words(unusable: Counter[tuple[int, str]]) -> str:
    """The most common reasons, over all epochs."""
    reasons: Counter[str] = Counter()
    for (_, reason), num in unusable.items():
        reasons[reason] += num
    return ", ".join(f"{reason}: {num:,}" for reason, num in reasons.most_common(3))


def read_samples(ref: ChunkRef, start: int, stop: int, limits: Limits) -> list[Sample]:
    """Samples `start ... stop` of a chunk, read from the chunk's place in its shard."""
    with open_shard(ref.shard) as stream:
        stream.seek(ref.offset)
        return list(itertools.islice(iter_samples(stream, limits), start, stop))


def batches(
    plan: Plan,
    first_step: int,
    rank: int,
    world: int,
    limits: Limits,
    decode: Decode,
    read_cpus: float = 1,
    readers: int = 2,
) -> Iterator[tuple[int, Columns]]:
    """This rank's share of every global batch from `first_step` to the plan's last: (step, columns).

    Args:
        readers: windows that are read at once.
        read_cpus: CPUs that each of them reserves.
    """
    if plan.lanes % world:
        raise Mistake(f"lanes {plan.lanes} must be a multiple of the {world} training workers")
    lanes = list(range(rank, plan.lanes, world))
    windows = range(first_step // plan.steps_per_window, -(-plan.num_steps // plan.steps_per_window))
    step = windows.start * plan.steps_per_window
    with ThreadPoolExecutor(1) as starter:
        num_windows = 1
        started: Future[Iterator[pa.Table]] | None = starter.submit(
            _start, plan, windows[:1], lanes, limits, decode, read_cpus, readers
        )
        windows = windows[1:]
        while started is not None:
            rows, last = started.result(), step + num_windows * plan.steps_per_window
            middle, started = (step + last) // 2, None
            for row in rows:
                columns = _unpack(row)
                if step >= first_step:
                    yield step, columns
                step += 1
                if step >= middle and started is None and windows:
                    num_bytes = sum(column.nbytes for column in columns.values()) * plan.steps_per_window
                    num_windows = max(1, min(BYTES_PER_DATASET // num_bytes, len(windows)))
                    started = starter.submit(
                        _start, plan, windows[:num_windows], lanes, limits, decode, read_cpus, readers
                    )
                    windows = windows[num_windows:]


def _start(
    plan: Plan, windows: range, lanes: list[int], limits: Limits, decode: Decode, read_cpus: float, readers: int
) -> Iterator[pa.Table]:
    """Let Ray Data begin to read some windows; returns when their first batch is there."""
    source = _Windows([_ReadWindow(_Window.of(plan, lanes, window), limits, decode) for window in windows])
    data = ray.data.read_datasource(source, override_num_blocks=len(windows), num_cpus=read_cpus, concurrency=readers)
    data.context.execution_options.preserve_order = True
    rows = iter(data.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=4))
    return itertools.chain([next(rows)], rows)


@dataclass(frozen=True)
class _ReadWindow:
    """The function that a read task runs."""

    window: _Window
    limits: Limits
    decode: Decode
    __name__ = "read_window"  # Ray Data calls it by its name when it finds a task large

    def __call__(self) -> Iterator[pa.Table]:
        rows: list[pa.Table] = []
        for columns in _read(self.window, self.limits, self.decode):
            rows.append(_pack(columns))
            if sum(row.nbytes for row in rows) > BYTES_PER_BLOCK:
                yield pa.concat_tables(rows)
                rows = []
        if rows:
            yield pa.concat_tables(rows)


class _Windows(Datasource):
    """Ray Data source with one read task per window."""

    def __init__(self, windows: list[_ReadWindow]):
        super().__init__()
        self._windows = windows

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(window, metadata) for window in self._windows]


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


# ------------------------------------------------------------------------------------------------ accounting


class Seen:
    """Account of what was trained on: one bit per sample and epoch, on each rank its own.

    Independent of the plan, so that it can contradict it. `fold` brings the ranks' bits together on rank 0, at
    checkpoints and at the end; what was trained on after the last checkpoint is forgotten with the steps themselves.
    """

    def __init__(self, num_samples: int):
        self.num_samples = num_samples
        self.bits: dict[int, np.ndarray] = {}
        self.repeated: Counter[int] = Counter()
        self.unusable: Counter[tuple[int, str]] = Counter()
        self.counts: Counter[str] = Counter()
        self.closed: dict[int, int] = {}

    def add(self, columns: Columns) -> None:
        """Mark one batch: `epoch` (B,), `place` (B,), `unusable`, and every boolean column as a count."""
        for epoch in np.unique(columns["epoch"]).tolist():
            self._mark(epoch, columns["place"][columns["epoch"] == epoch])
        self.unusable.update({(epoch, reason): n for epoch, reason, n in json.loads(columns["unusable"].tobytes())})
        self.counts.update({name: int(column.sum()) for name, column in columns.items() if column.dtype == np.bool_})
        self.counts["samples"] += len(columns["place"])

    def _mark(self, epoch: int, places: np.ndarray) -> None:
        bits = self.bits.setdefault(epoch, np.zeros(-(-self.num_samples // 8), np.uint8))
        places, times = np.unique(places, return_counts=True)
        self.repeated[epoch] += int((times - 1).sum())
        byte, bit = places >> 3, (1 << (places & 7)).astype(np.uint8)
        self.repeated[epoch] += int(np.count_nonzero(bits[byte] & bit))
        np.bitwise_or.at(bits, byte, bit)

    def fold(self, rank: int, world: int, open_epoch: int) -> None:
        """Collective: rank 0 takes over what the others marked; epochs before `open_epoch` become mere numbers."""
        if world > 1:
            everyone: list[Any] = [None] * world
            torch.distributed.gather_object(self, everyone if rank == 0 else None)
            if rank > 0:
                self.__init__(self.num_samples)  # type: ignore[misc]
                return
            for other in everyone[1:]:
                self._take(other)
        for epoch in [e for e in self.bits if e < open_epoch]:
            self.closed[epoch] = _count(self.bits.pop(epoch))

    def _take(self, other: Seen) -> None:
        for epoch, bits in other.bits.items():
            mine = self.bits.setdefault(epoch, np.zeros_like(bits))
            self.repeated[epoch] += _count(mine & bits)
            mine |= bits
        for name in ("repeated", "unusable", "counts"):
            getattr(self, name).update(getattr(other, name))

    def report(self) -> dict[str, Any]:
        """For each range of alike epochs: samples seen, seen again, neither seen nor unusable, unusable by reason."""
        seen = {**self.closed, **{epoch: _count(bits) for epoch, bits in self.bits.items()}}
        epochs: list[dict[str, Any]] = []
        for epoch in sorted(seen):
            reasons = {reason: n for (e, reason), n in sorted(self.unusable.items()) if e == epoch}
            unseen = self.num_samples - seen[epoch] - sum(reasons.values())
            line = {"seen": seen[epoch], "repeated": self.repeated[epoch], "unseen": unseen, "unusable": reasons}
            if epochs and {**epochs[-1], "epochs": 0} == {"epochs": 0, **line}:
                epochs[-1]["epochs"][1] = epoch
            else:
                epochs.append({"epochs": [epoch, epoch], **line})
        return {**self.counts, "by_epoch": epochs}

    def save(self, path: Path) -> None:
        """Write rank 0's state: arrays and JSON."""
        about = {
            "repeated": list(self.repeated.items()),
            "unusable": [[*key, n] for key, n in self.unusable.items()],
            "counts": self.counts,
            "closed": list(self.closed.items()),
        }
        arrays: Any = {str(epoch): bits for epoch, bits in self.bits.items()}
        np.savez(path, about=np.array(json.dumps(about)), **arrays)

    def load(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            self.bits = {int(epoch): stored[epoch] for epoch in stored.files if epoch != "about"}
        self.repeated = Counter(dict(about["repeated"]))
        self.unusable = Counter({(epoch, reason): n for epoch, reason, n in about["unusable"]})
        self.counts, self.closed = Counter(about["counts"]), dict(about["closed"])


def _count(bits: np.ndarray) -> int:
    return int(np.unpackbits(bits).sum())
