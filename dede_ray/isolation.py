"""What ends the processes that touch it: found by trying it alone.

Chunks that keep ending the processes of a pass are done here, each shard by a process that may die of it. Where one
does, the chunk's samples are tried one by one; those that end their process twice become rows with the reason
`process_died`, and the others are done as if nothing had been.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError

from dede_ray.actors import Receipt, Worker
from dede_ray.ledger import read_end
from dede_ray.readers import Reading, Share, decode, numbered_chunks, read_and_decode
from dede_ray.shards import Sample, Shard, ShardEnd

logger = logging.getLogger(__name__)

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
        left: the shards that lack chunks, with those that stand.
        actor: makes what works.
        asked: the resources that each process reserves.
        at_once: shards that are done at the same time.
    """
    logger.warning("%s: processes kept dying in %d shards; trying one by one what they lack", name, len(left))
    start = partial(ray.remote(_Alone).options(**asked).remote, reading, actor)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(at_once) as threads:
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

    def __init__(self, reading: Reading, actor: partial[Worker]):
        self.reading, self.worker = reading, actor()

    def end(self, shard: Shard) -> list[int]:
        """Read a shard to its end, which writes its end marker; how many chunks there are."""
        for _ in read_and_decode(shard, _ALL, self.reading, Share()):
            pass
        return [read_end(self.reading.folder, shard.name).num_chunks]

    def chunk(self, shard: Shard, number: int, lethal: Container[int]) -> list[str]:
        """Do a chunk but for its lethal samples; its receipt."""
        told = self.worker(decode(shard, number, self._samples(shard, number), self.reading, lethal))
        return told["receipt"].to_pylist()

    def samples(self, shard: Shard, number: int, first: int, lethal: list[int]) -> Iterator[int]:
        """Try the samples of a chunk one by one from the `first` on; yields the place of each it survived, then -1."""
        for at, sample in enumerate(self._samples(shard, number)):
            if at >= first:
                if at not in lethal and not self.worker.broken:
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


class _All:
    """Contains every chunk, and every place."""

    def __contains__(self, chunk: object) -> bool:
        return True


_ALL = _All()
