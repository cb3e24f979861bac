"""Almost equal pictures among millions: a hash of what a picture shows, and groups of hashes that hardly differ."""

from __future__ import annotations

import itertools
import math

import numpy as np
import scipy.fft
from PIL import Image

THUMBNAIL_PX = 32  # side of what is hashed; an image need not be decoded at much more than that
_MIN_CONTRAST = 3.0  # standard deviation of the grey thumbnail, in levels of 0..255; below it is the encoder's noise


def perceptual_hash(image_HWC: np.ndarray) -> int | None:
    """Hash a picture so that almost equal pictures get almost equal bits: pHash.

    The 8x8 lowest frequencies of the DCT of the grey 32x32 thumbnail give one bit each, set where it is above their
    median. Encoding it anew, scaling it, changing its colours, brightness or contrast leave a picture near itself;
    mirroring, turning, or cropping more than a sliver do not. Within 4 bits are 98 to 100 % of photographs after the
    former, and two thirds after a crop of 2 % at each side; unrelated photographs are not, but catalogue pictures of
    similar objects on white may be.

    Args:
        image_HWC: uint8 RGB, of any size.

    Returns:
        64 bits; None if the picture is nearly uniform, and its bits would be noise.

    Source: Zauner, Implementation and benchmarking of perceptual image hash functions, 2010, section 3.2.1, who leaves
    out the first row and column; with them a third fewer cropped pictures are missed.
    """
    grey = Image.fromarray(image_HWC).convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    grey_HW = np.asarray(grey, np.float32)
    if grey_HW.std() < _MIN_CONTRAST:
        return None
    low_HW = scipy.fft.dctn(grey_HW, norm="ortho")[:8, :8]
    return int.from_bytes(np.packbits(low_HW > np.median(low_HW)).tobytes(), "big")


_BITS_SET = np.array([bin(number).count("1") for number in range(1 << 16)], np.uint8)


def hamming(one_N: np.ndarray, other_N: np.ndarray) -> np.ndarray:
    """In how many bits two arrays of uint64 differ, element by element: int32 (N,)."""
    words_N4 = np.ascontiguousarray(one_N ^ other_N).view(np.uint16).reshape(-1, 4)
    return _BITS_SET[words_N4].sum(axis=1, dtype=np.int32)


def first_equal(*columns: np.ndarray) -> np.ndarray:
    """For each row, the number of the first row that equals it in all columns: its own, if it is the first."""
    order = np.lexsort(columns)  # stable: equal rows keep their order
    is_new = np.ones(len(order), bool)
    is_new[1:] = np.logical_or.reduce([column[order][1:] != column[order][:-1] for column in columns])
    first_N = np.empty_like(order)
    first_N[order] = order[is_new][np.cumsum(is_new) - 1]
    return first_N


def first_near(
    hash_N: np.ndarray, distance: int, most_neighbours: int = 500, most_pairs: int = 10_000_000
) -> tuple[np.ndarray, int]:
    """For each hash, the number of the first one that leads a group and is near it: its own, if it leads or is alone.

    Near: at most `distance` bits differ. The first hash leads; each later one joins the first leader near it, or leads.
    So every member is near its leader, no two leaders are near each other, and groups do not grow into chains.

    Cut into `distance + k` blocks, two near hashes agree in at least k of them; so for each choice of k blocks those
    that agree there are compared. k is the smallest for which hashes seldom agree by chance.
    Source: Manku, Jain, Das Sarma, Detecting near-duplicates for web crawling, WWW 2007, section 3.

    Args:
        hash_N: uint64; of equal ones only the first is compared with others.
        most_neighbours: of hashes that agree in the chosen blocks, each is compared with so many of the next.
        most_pairs: near pairs after which no more are looked for. Both bound what made-up hashes can cost.

    Returns:
        int64 (N,) as above; and how many different hashes have others that they were not compared with.
    """
    equal_N = first_equal(hash_N)
    distinct_M = np.flatnonzero(equal_N == np.arange(len(hash_N)))
    leader_M, num_cut = _lead(hash_N[distinct_M], distance, most_neighbours, most_pairs)
    first_N = np.empty(len(hash_N), np.int64)
    first_N[distinct_M] = distinct_M[leader_M]
    return first_N[equal_N], num_cut


def _lead(hash_M: np.ndarray, distance: int, most_neighbours: int, most_pairs: int) -> tuple[np.ndarray, int]:
    """`first_near` for M hashes that are all different."""
    num = len(hash_M)
    leader_M = np.arange(num)
    if distance == 0 or num < 2:
        return leader_M, 0
    wanted_bits = min(math.log2(num) - 3, 40)  # then eight hashes agree by chance, if hashes were random
    num_chosen = next(k for k in itertools.count(1) if 64 * k / (distance + k) >= wanted_bits)
    borders = np.linspace(0, 64, distance + num_chosen + 1).round().astype(int).tolist()
    blocks = [(1 << high) - (1 << low) for low, high in itertools.pairwise(borders)]
    is_cut_M = np.zeros(num, bool)
    pairs = np.empty(0, np.int64)
    for chosen in itertools.combinations(blocks, num_chosen):
        key_M = hash_M & np.uint64(sum(chosen))
        order = np.argsort(key_M, kind="stable")  # of hashes that agree, the earlier one comes first
        key_M, sorted_M = key_M[order], hash_M[order]
        found = [pairs]
        starts = np.arange(num)
        for step in itertools.count(1):
            starts = starts[: np.searchsorted(starts, num - step)]
            starts = starts[key_M[starts] == key_M[starts + step]]
            if not len(starts):
                break
            if step > most_neighbours or sum(map(len, found)) > most_pairs:
                is_cut_M[order[starts]] = True
                break
            near = starts[hamming(sorted_M[starts], sorted_M[starts + step]) <= distance]
            found.append(order[near + step] * num + order[near])
        pairs = np.unique(np.concatenate(found))
    # By their later hash, so that what is earlier has found its place; then by the earlier one.
    for later, earlier in zip(*(part.tolist() for part in np.divmod(pairs, num)), strict=True):
        if leader_M[later] == later and leader_M[earlier] == earlier:
            leader_M[later] = earlier
    return leader_M, int(is_cut_M.sum())
