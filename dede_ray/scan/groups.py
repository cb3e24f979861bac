"""Samples that belong together: copies, almost equal pictures, and clumps of one caption, each one finding.

A list of flagged samples is read one by one, and the same picture 798 times is one thing to know, not 798. (There are
798 almost equal birthday cakes with one caption in CC3M; a public encoder that was trained on them behaves as if
backdoored.) `findings` turns rows of a manifest into what a person reads; `copies` gives a decision the groups that
count once.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from pydantic import Field
from scipy.sparse.csgraph import connected_components

from dede_ray.data.near_duplicates import first_near, hamming
from dede_ray.runtime.config import Config

logger = logging.getLogger(__name__)

# Shapes: N rows, E width of the embedding.

NEAR_DISTANCE = 4
"""Bits in which the perceptual hashes of almost equal pictures differ, at most."""
MOST_LEADERS = 300  # per caption; bounds what a caption of many different pictures, such as "photo", can cost


@dataclass(frozen=True, eq=False)
class Rows:
    """What is known of N samples; None where a sample lacks it, or all of them."""

    sample_ids: Sequence[str]
    flagged: NDArray[np.bool_]
    p_value: NDArray[np.float64]
    """NaN where there is none."""
    content_hash: Sequence[str | None]
    """Hash of the encoded picture's bytes."""
    perceptual_hash: Sequence[int | None] | None = None
    """64 bits, `near_duplicates.perceptual_hash`."""
    captions: Sequence[str | None] | None = None
    embedding_NE: NDArray[np.floating] | None = None
    """Embeddings by any encoder; a clump is then also what is near in its eyes."""


@dataclass(frozen=True)
class Finding:
    """Samples to be looked at together."""

    kind: Literal["clump", "near", "exact", "single"]
    """`clump`: one caption and pictures near each other; `near`: almost equal pictures; `exact`: equal bytes."""
    sample_ids: tuple[str, ...]
    """Sorted."""
    size: int
    caption: str | None
    """The commonest of them."""
    why: str
    share_flagged: float
    smallest_p: float | None


class Grouping(Config):
    """What counts as near."""

    near_distance: int = Field(NEAR_DISTANCE, ge=0, le=8)
    """Bits in which the perceptual hashes of almost equal pictures differ, at most."""
    min_cosine: float = Field(0.95, gt=0, le=1)
    """Cosine above which the embeddings of two samples of one caption are near; 1 for equal directions only."""
    min_clump: int = Field(3, ge=2)
    """Samples of one caption, near each other, that make a clump."""


def findings(rows: Rows, grouping: Grouping | None = None) -> list[Finding]:
    """Every group of two or more, and every flagged sample that is in none; the smallest p-value first, then the size.

    A sample is in one finding only: what shares a picture or a clump is one. Groups of which nothing is flagged are
    there as well: repeated content can act as a backdoor without anyone having planted it.
    """
    grouping = grouping or Grouping()
    num, order = len(rows.sample_ids), np.argsort(np.array(rows.sample_ids, dtype=np.str_), kind="stable")
    place_N = np.empty(num, np.int64)  # of each row when sorted by id, so that the order given does not matter
    place_N[order] = np.arange(num)
    assert num == len(rows.flagged) == len(rows.p_value) == len(rows.content_hash), num

    exact_N, near_N = first_copy(rows.content_hash, order), np.arange(num)
    if rows.perceptual_hash is not None:
        near_N = first_near_copy(rows.perceptual_hash, order, grouping.near_distance)
    clump_N = _first_of_clump(rows, exact_N, order, grouping)
    edges = np.concatenate([np.stack([np.arange(num), first_N]) for first_N in (exact_N, near_N, clump_N)], axis=1)
    graph = scipy.sparse.coo_array((np.ones(edges.shape[1], bool), (edges[0], edges[1])), shape=(num, num))
    group_N = connected_components(graph, directed=False)[1]

    found = []
    by_group = np.lexsort((place_N, group_N))
    borders = np.flatnonzero(np.diff(group_N[by_group])) + 1
    for members in np.split(by_group, borders) if num else []:
        if members.size > 1 or rows.flagged[members[0]]:
            found.append(_describe(rows, members, exact_N, clump_N))
    none_last = float("inf")
    return sorted(found, key=lambda f: (none_last if f.smallest_p is None else f.smallest_p, -f.size, f.sample_ids))


def copies(content_hash: Sequence[str | None], captions: Sequence[str | None] | None = None) -> list[str | None]:
    """Name the groups of equal pictures for `decide(groups=...)`; None for a sample that is alone.

    Give the captions where the score looks at them: the same picture with another caption is then another sample, and
    a poisoned pair cannot hide behind the clean one that it was made from. For the same reason almost equal pictures
    are no copies.
    """
    names = list(content_hash)
    if captions is not None:
        names = [
            name and hashlib.blake2b(f"{name} {caption}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
            for name, caption in zip(content_hash, captions, strict=True)
        ]
    count = Counter(names)
    return [name if name and count[name] > 1 else None for name in names]


def _describe(rows: Rows, members: NDArray[np.int64], exact_N: np.ndarray, clump_N: np.ndarray) -> Finding:
    captions = Counter(rows.captions[i] for i in members.tolist()) if rows.captions is not None else Counter()
    captions.pop(None, None)
    caption = min(captions, key=lambda text: -captions[text]) if captions else None
    num_files = np.unique(exact_N[members]).size
    kind: Literal["clump", "near", "exact", "single"]
    if members.size == 1:
        kind, why = "single", "flagged, and like no other sample"
    elif (clump_N[members] != members).any():
        kind = "clump"
        why = f"{captions[caption]:,} of {members.size:,} samples have one caption, and their pictures are near each"
        why += f" other ({num_files:,} different files)"
    elif num_files > 1:
        kind, why = "near", f"{members.size:,} samples of almost the same picture, in {num_files:,} different files"
    else:
        kind, why = "exact", f"{members.size:,} samples of the same picture, byte for byte"
    if kind != "single" and len(captions) > 1:
        why += f", under {len(captions):,} captions"
    p_value = rows.p_value[members]
    return Finding(
        kind,
        tuple(rows.sample_ids[i] for i in members.tolist()),
        int(members.size),
        caption,
        why,
        float(np.mean(rows.flagged[members])),
        None if np.isnan(p_value).all() else float(np.nanmin(p_value)),
    )


def first_copy(content_hash: Sequence[str | None], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row the first, in this order, of the same bytes."""
    first: dict[str, int] = {}
    first_N = np.arange(len(order))
    for row in order.tolist():
        name = content_hash[row]
        if name:
            first_N[row] = first.setdefault(name, row)
    return first_N


def first_near_copy(
    perceptual_hash: Sequence[int | None], order: NDArray[np.int64], distance: int
) -> NDArray[np.int64]:
    """For each row the first, in this order, of almost the same picture; itself where the picture is nearly uniform."""
    first_N = np.arange(len(order))
    hashed = np.array([row for row in order.tolist() if perceptual_hash[row] is not None], np.int64)
    if hashed.size:
        near, num_cut = first_near(np.array([perceptual_hash[row] for row in hashed.tolist()], np.uint64), distance)
        first_N[hashed] = hashed[near]
        if num_cut:
            logger.warning("near-duplicate search was capped for %s pictures", f"{num_cut:,}")
    return first_N


def _first_of_clump(
    rows: Rows, exact_N: NDArray[np.int64], order: NDArray[np.int64], grouping: Grouping
) -> NDArray[np.int64]:
    """For each row the one that leads its clump, itself where it is in none.

    As in `first_near`, who is near no leader leads, so clumps do not grow into chains.
    """
    first_N = np.arange(len(order))
    if rows.captions is None:
        return first_N
    by_caption: dict[str, list[int]] = {}
    for row in order.tolist():
        caption = rows.captions[row]
        if caption is not None and caption.strip():
            by_caption.setdefault(caption, []).append(row)
    num_cut = 0
    for listed in by_caption.values():
        members = np.array(listed)
        if members.size < grouping.min_clump:
            continue
        looks = _Looks(rows, exact_N, members, grouping)
        waiting = np.arange(members.size)
        for _ in range(MOST_LEADERS):
            if waiting.size < grouping.min_clump:
                break
            is_near = looks.near_first(waiting)
            if is_near.sum() >= grouping.min_clump:
                first_N[members[waiting[is_near]]] = members[waiting[0]]
            waiting = waiting[~is_near]
        else:
            num_cut += waiting.size
    if num_cut:
        logger.warning(
            "the search for clumps was capped: %s samples of very common captions were left out", f"{num_cut:,}"
        )
    return first_N


class _Looks:
    """What the samples of one caption look like: bytes, hashes and directions."""

    def __init__(self, rows: Rows, exact_N: NDArray[np.int64], members: NDArray[np.int64], grouping: Grouping):
        self.grouping = grouping
        self.exact = exact_N[members]
        hashes = rows.perceptual_hash or [None] * len(exact_N)
        self.has_hash = np.array([hashes[i] is not None for i in members.tolist()])
        self.hash = np.array([hashes[i] or 0 for i in members.tolist()], np.uint64)
        self.direction = None
        if rows.embedding_NE is not None:
            embedding = np.asarray(rows.embedding_NE[members], np.float32)
            self.direction = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-30)

    def near_first(self, some: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some are near the first of them; it is itself."""
        first = some[0]
        is_near = self.exact[some] == self.exact[first]
        if self.has_hash[first]:
            distance = hamming(self.hash[some], np.full(some.size, self.hash[first]))
            is_near |= self.has_hash[some] & (distance <= self.grouping.near_distance)
        if self.direction is not None:
            is_near |= self.direction[some] @ self.direction[first] >= self.grouping.min_cosine - 1e-6
        return is_near
