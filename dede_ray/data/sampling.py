"""Every random choice is a function of a seed and a sample's id.

So it is the same in whatever order samples are met, on however many workers, and after any interruption.

    keyed_generator(seed, sample_id)           a NumPy generator of one sample's own
    draw(samples, num, seed)                   some samples, by their ids
    draw_by_class(labels, num, seed)           some positions, each class by its share
    sample_keys, keyed_uniform                 the same for a batch at once, on the batch's device
    by_halves(names, seed)                     two halves

Processes that only read shards import this module, so torch is imported by the two functions that give tensors.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# ------------------------------------------------------------------------------------------ one sample, or some of them


def keyed_generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers that belong to one sample: the same wherever, and in whatever order, it is met."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, "<u4")])


def draw_by_class(labels: Sequence[int], num: int, seed: int) -> set[int]:
    """Draw exactly `num` positions of `labels` without replacement, each class by its share.

    Going along each shuffled class at a speed that finishes all classes together, the first `num` are drawn.
    """
    assert num <= len(labels), (num, len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    size = Counter(labels)
    met: Counter[int] = Counter()
    progress = np.empty(len(labels))
    for place, i in enumerate(order):
        progress[place] = (met[labels[i]] + 0.5) / size[labels[i]]
        met[labels[i]] += 1
    return {int(i) for i in order[np.argsort(progress, kind="stable")[:num]]}


class Identified(Protocol):
    """Whatever carries a sample's id."""

    @property
    def sample_id(self) -> str: ...


S = TypeVar("S", bound=Identified)


def draw(samples: Iterable[S], num: int, seed: int) -> list[S]:
    """Draw up to `num` samples by id, the same ones in whatever order they come; keeps only `num` in memory."""
    return heapq.nsmallest(num, samples, key=lambda sample: keyed_generator(seed, sample.sample_id).random())


# --------------------------------------------------------------------------------------- batches of samples, as tensors


def sample_keys(sample_ids: Sequence[str], seed: int, *more: int) -> Tensor:
    """One 64-bit key per sample, int64 (B,), for everything random about it: never worker state, never the batch."""
    import torch

    salt = ("/".join(str(number) for number in (seed, *more)) + "/").encode()
    digests = b"".join(hashlib.blake2b(salt + name.encode(), digest_size=8).digest() for name in sample_ids)
    return torch.frombuffer(bytearray(digests), dtype=torch.int64) if digests else torch.zeros(0, dtype=torch.int64)


def by_halves(names: Sequence[str], seed: int) -> np.ndarray:
    """Part samples by their keys: bool (N,), True for one half.

    Give the names of groups in the place of ids where there are copies, so that copies fall into the same half.
    """
    return sample_keys(names, seed, 2).numpy() >= 0


def sample_generator(name: str, seed: int, *more: int) -> np.random.Generator:
    """A generator by one sample's key, where `more` (an epoch, a view) asks for other numbers than `seed` alone."""
    return np.random.default_rng(sample_keys([name], seed, *more).numpy().view(np.uint64))


def keyed_uniform(keys_B: Tensor, count: int) -> Tensor:
    """`count` numbers in [0, 1) per key, float64 (B, count), by a counter-based generator (SplitMix64)."""
    import torch

    counter = torch.arange(1, count + 1, device=keys_B.device, dtype=torch.int64)
    x = keys_B.unsqueeze(1) + counter * -7046029254386353131  # 0x9E3779B97F4A7C15; int64 wraps around
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() * 2.0**-53


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 as if unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
