"""The pictures that an encoder is measured on while it trains: found once, then read ahead whenever they are needed.

This module imports nothing heavy, such as open_clip: its Ray tasks run in processes of their own, which should start
fast.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ray
from PIL import Image

from dede_ray.data.images import IMAGE_FORMATS, Stamp, square, without_notes
from dede_ray.data.sampling import draw
from dede_ray.data.shards import BadSample, Limits, Shard, iter_samples, open_shard, sample_id
from dede_ray.runtime.config import Mistake
from dede_ray.training.dataloader import ChunkRef, index_shards, read_samples

CHUNK_SIZE = 32  # samples that are read, at most, to get at one of them
PART_SIZE = 64  # images that one Ray task reads and decodes
READ_AHEAD = 4  # tasks under way


@dataclass(frozen=True)
class Picture:
    """One sample, and where it is."""

    ref: ChunkRef
    place: int
    """Which sample of the chunk it is."""
    sample_id: str
    label: int | None
    caption: str | None
    size_px: tuple[int, int] | None
    """Width and height, as the image's header has them; None if it cannot be read."""


def find_pictures(
    shards: list[Shard], needs: Literal["label", "caption"], num: int | None, seed: int, limits: Limits
) -> list[Picture]:
    """Find the samples that have an image and what else is needed, in the shards' order; Ray must be running.

    Args:
        num: how many are drawn, by id as `draw` does; None: all.

    Raises:
        Mistake: a compressed shard, or no such sample.
    """
    survey = ray.remote(num_cpus=1)(_survey)
    by_shard = itertools.groupby(index_shards(shards, CHUNK_SIZE), key=lambda ref: ref.shard.name)
    found = ray.get([survey.remote([*refs], needs, num, seed, limits) for _, refs in by_shard])
    pictures = [picture for some in found for picture in some]
    if not pictures:
        member = {"label": "a label (a .cls member)", "caption": "a caption (a .txt member)"}[needs]
        names = ", ".join(shard.name for shard in shards[:3])
        raise Mistake(f"no sample with an image and {member} in {names}; name other shards")
    return _drawn(pictures, num, seed)


def _survey(
    refs: list[ChunkRef], needs: Literal["label", "caption"], num: int | None, seed: int, limits: Limits
) -> list[Picture]:
    """The pictures of one shard; those that are drawn of all shards are among those drawn of it."""
    shard, pictures = refs[0].shard, []
    with open_shard(shard) as stream:
        for sample in iter_samples(stream, limits):
            needed = sample.label is not None if needs == "label" else bool(sample.caption)
            if sample.error is None and sample.image is not None and needed:
                ref, place = refs[sample.index // CHUNK_SIZE], sample.index % CHUNK_SIZE
                name, size_px = sample_id(shard.name, sample.key), _size_px(sample.image)
                pictures.append(Picture(ref, place, name, sample.label, sample.caption, size_px))
    return _drawn(pictures, num, seed)


def _drawn(pictures: list[Picture], num: int | None, seed: int) -> list[Picture]:
    if num is None or num >= len(pictures):
        return pictures
    return sorted(draw(pictures, num, seed), key=lambda one: (one.ref.shard.name, one.ref.number, one.place))


def _size_px(content: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(without_notes(content)), formats=IMAGE_FORMATS) as image:
            return image.size
    except Exception:  # whatever is wrong with it, decoding will find and count it
        return None


def read_ahead(
    pictures: Sequence[Picture], size_px: int, limits: Limits, trigger: Stamp | None = None
) -> Iterator[np.ndarray | None]:
    """Yield the pictures in order, uint8 (size_px, size_px, 3), stamped if there is a trigger; None: cannot be decoded.

    Ray tasks read and decode, a few ahead of what is taken. They reserve no CPUs: training workers may have reserved
    all there are, and wait for these tasks.
    """
    read = ray.remote(num_cpus=0)(_read)
    pending: deque[Any] = deque()
    for start in range(0, len(pictures), PART_SIZE):
        pending.append(read.remote(pictures[start : start + PART_SIZE], size_px, limits, trigger))
        if len(pending) > READ_AHEAD:
            yield from ray.get(pending.popleft())
    while pending:
        yield from ray.get(pending.popleft())


def _read(pictures: Sequence[Picture], size_px: int, limits: Limits, trigger: Stamp | None) -> list[np.ndarray | None]:
    images: list[np.ndarray | None] = []
    for ref, group in itertools.groupby(pictures, key=lambda picture: picture.ref):
        wanted = [*group]
        samples = read_samples(ref, 0, wanted[-1].place + 1, limits)
        for picture in wanted:
            content = samples[picture.place].image
            assert content is not None, picture.sample_id
            image_HWC = None
            with contextlib.suppress(BadSample):
                image_HWC = square(content, picture.sample_id, size_px, limits, trigger)
            images.append(image_HWC)
    return images
