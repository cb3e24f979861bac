"""Sources: where clean images come from, and how their splits are drawn. Bundled digits and WebDataset shards are here.

A source is one class with two methods: `find` names its splits and lists where their samples lie, `load` reads some of
them, in any process. A new source is such a class and its name in the union `Source` of ingest.py; the standard data
sets are in datasets.py, lists of links in links.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image
from pydantic import Field

from dede_ray.data.images import decode_image, encode_image
from dede_ray.data.sampling import draw_by_class
from dede_ray.data.shards import BadSample, Limits, Reason, Sample, Shard, iter_samples, list_shards, open_shard
from dede_ray.data.unread import hint
from dede_ray.ingest.archives import Piece
from dede_ray.runtime.config import Config, Mistake

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """Where one sample lies, and what is known of it before its image is read: what may be listed by the million."""

    key: str
    file: str = ""
    place: int = 0
    """Byte, row or position in the file: its source's `load` knows which."""
    num_bytes: int = 0
    label: int | None = None
    caption: str | Piece | None = None
    """The source's own caption, or the small file that holds it."""
    error: Reason | None = None


@dataclass
class Listing:
    """What a source has: the items of each split in their order, and the names of classes 0, 1, 2 ... if any."""

    splits: dict[str, list[Item]]
    class_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    """What the summary should say of how the source was read."""


class Each(Protocol):
    """Calls a function with each tuple of arguments, perhaps several at once; yields (position, result) as done."""

    def __call__(self, function: Callable[..., Any], arguments: Sequence[tuple]) -> Iterator[tuple[int, Any]]: ...


def in_turn(function: Callable[..., Any], arguments: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
    """The plainest `Each`: one after the other, here."""
    for position, these in enumerate(arguments):
        yield position, function(*these)


class Dataset(Config):
    """What all sources share: `find` lists the items of each split, `load` reads the samples of some of them.

    Which images calibrate is a choice with a price: out of `train` they are lost for training and scoring, out of
    `test` every training sample is still trained on and scored.
    """

    calibration: int = Field(0, ge=0)
    """Samples that become the split `calibration`, drawn class by class; 0: none is drawn."""
    calibration_from: str = "train"
    """The split that they are taken from."""
    limit: int | None = Field(None, gt=0)
    """Take only the first so many samples of each split, for a quick try; null: all."""

    def find(self, seed: int, limits: Limits, scratch: Path, each: Each = in_turn) -> Listing:
        """List the splits' items: the same ones, in the same order, each time.

        Args:
            seed: draws the calibration samples, and shuffles where the source is sorted by class.
            limits: bounds on one sample.
            scratch: folder for what must be unpacked; it has to stay as long as the items are used.
            each: spreads work on many files.

        Raises:
            Mistake: a file is missing or is not what it should be, or the splits cannot be drawn.
        """
        listing = self._find(seed, limits, scratch, each)
        splits = {split: items[: self.limit] for split, items in listing.splits.items()}
        if strange := [split for split in splits if not re.fullmatch(r"\w[\w.-]*", split)]:
            raise Mistake(
                f"a split becomes part of file names, so {strange[0]!r} cannot be used; use letters, digits, _ and -"
            )
        if self.calibration:
            giver = self.calibration_from
            if giver not in splits or "calibration" in splits:
                raise Mistake(
                    f"{self.calibration:,} calibration samples are to come from the split {giver!r}, but the splits "
                    f"are {', '.join(splits)}; correct calibration_from, or set calibration to 0"
                )
            usable = sorted((item for item in splits[giver] if item.error is None), key=lambda item: item.key)
            if self.calibration >= len(usable):
                raise Mistake(
                    f"calibration is to get {self.calibration:,} samples of `{giver}`, which has {len(usable):,} "
                    "usable ones; ask for less"
                )
            labels = [-1 if item.label is None else item.label for item in usable]
            drawn = {usable[i].key for i in draw_by_class(labels, self.calibration, seed)}
            splits["calibration"] = [item for item in splits[giver] if item.key in drawn]
            splits[giver] = [item for item in splits[giver] if item.key not in drawn]
        names = None if listing.class_names is None else [*map(_writable, listing.class_names)]
        return Listing(splits, names, [*map(_writable, listing.notes)])

    def _find(self, seed: int, limits: Limits, scratch: Path, each: Each) -> Listing:
        raise NotImplementedError

    def load(self, items: Sequence[Item], limits: Limits) -> Iterator[Sample]:
        """Yield the sample of each item, unusable ones with their error.

        Args:
            items: some of one split, in the order of the listing.
        """
        raise NotImplementedError


def _writable(text: str) -> str:
    """Names of files and folders may hold bytes that are no text."""
    return text.encode("utf-8", "backslashreplace").decode()


class Digits(Config):
    """The 1,797 handwritten digits of scikit-learn: real 8x8 scans (UCI, Alpaydin and Kaynak), no download.

    Enlarged to 32x32 (bicubic) with grey levels 0..16 spread over 0..255. `train` is what the other two splits
    leave, 1,200 images with the defaults; all three hold each digit by its share.
    """

    kind: Literal["digits"] = "digits"
    calibration: int = Field(300, ge=0)
    """Images for calibration: clean, and never trained on."""
    test: int = Field(297, ge=0)
    """Images for testing."""

    class_names: ClassVar[list[str]] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

    def find(self, seed: int, limits: Limits, scratch: Path, each: Each = in_turn) -> Listing:
        """List `train`, `calibration` and `test`, each in the order of the data set."""
        labels = [int(label) for label in _load_digits().target]
        if self.calibration + self.test >= len(labels):
            raise Mistake(
                f"calibration {self.calibration} + test {self.test} leaves nothing to train on: there are "
                f"{len(labels):,} digits"
            )
        calibration = draw_by_class(labels, self.calibration, seed)
        rest = [i for i in range(len(labels)) if i not in calibration]
        test = {rest[i] for i in draw_by_class([labels[i] for i in rest], self.test, seed)}
        splits = {"train": set(rest) - test, "calibration": calibration, "test": test}
        return Listing(
            {
                split: [Item(f"digit_{i:04d}", place=i, label=labels[i]) for i in sorted(chosen)]
                for split, chosen in splits.items()
            },
            self.class_names,
        )

    def load(self, items: Sequence[Item], limits: Limits) -> Iterator[Sample]:
        """Yield the digits as PNG."""
        images = _load_digits().images
        for item in items:
            image = encode_image(_enlarge(images[item.place]), "png")
            yield Sample(item.key, item.place, image=image, image_suffix="png", label=item.label)

    def read(self, seed: int, limits: Limits) -> dict[str, Iterator[Sample]]:
        """Yield the samples of each split, here and now."""
        splits = self.find(seed, limits, Path()).splits
        return {split: self.load(items, limits) for split, items in splits.items()}


def _load_digits() -> Any:
    from sklearn.datasets import load_digits  # a second of import that other sources need not pay

    return load_digits()


def _enlarge(levels_HW: np.ndarray) -> np.ndarray:
    grey = Image.fromarray(np.rint(levels_HW * 255 / 16).astype(np.uint8))
    return np.asarray(grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))


class WebDataset(Dataset):
    """WebDataset shards, plain or gzipped, with captions (`txt`), labels (`cls`), both or neither.

    Image bytes, captions and labels stay as they are; other members are left behind. Keys stay, too, unless two shards
    of a split use the same one: the later becomes `<key>@<shard>`. Each shard is read once to list its samples, and
    from its start to each part that is wanted.
    """

    kind: Literal["webdataset"] = "webdataset"
    splits: dict[str, str | list[str]] = Field(min_length=1)
    """Split name -> its shards: a pattern, a folder or a list of them."""
    class_names: list[str] | None = Field(None, min_length=1)
    """Name of class 0, 1, 2 ...; null: the labels, if there are any, have no names."""

    def _find(self, seed: int, limits: Limits, scratch: Path, each: Each) -> Listing:
        shards = [(split, shard) for split, pattern in self.splits.items() for shard in list_shards(pattern)]
        # Candidates for calibration are decoded here and again when written: the split gets exactly what was asked for.
        checked = {self.calibration_from} if self.calibration else set()
        arguments = [(shard, limits, self.limit, split in checked) for split, shard in shards]
        listed = dict(each(_list_shard, arguments))
        splits: dict[str, list[Item]] = {split: [] for split in self.splits}
        seen: dict[str, set[str]] = {split: set() for split in self.splits}
        for i, (split, shard) in enumerate(shards):
            for item in listed[i]:
                if item.key in seen[split]:  # in another shard, where it was another sample; here they might share one
                    item = item._replace(key=f"{item.key}@{shard.name.partition('.')[0]}")
                seen[split].add(item.key)
                splits[split].append(self._checked(item))
        elsewhere = hint(shards[0][1], limits, "caption").removeprefix("; ")
        return Listing(splits, self.class_names, [elsewhere] if elsewhere else [])

    def _checked(self, item: Item) -> Item:
        if item.label is not None and self.class_names and not 0 <= item.label < len(self.class_names):
            raise Mistake(
                f"{item.file} holds label {item.label} (key {item.key}), but class_names names classes "
                f"0 to {len(self.class_names) - 1}; complete class_names"
            )
        return item

    def load(self, items: Sequence[Item], limits: Limits) -> Iterator[Sample]:
        """Yield the samples under the keys of the listing."""
        for url, group in groupby(items, key=lambda item: item.file):
            wanted = {item.place: item.key for item in group}
            with open_shard(Shard("", url, 0)) as stream:
                for sample in islice(iter_samples(stream, limits), max(wanted) + 1):
                    if sample.index in wanted:
                        sample.key = wanted[sample.index]
                        yield sample


def _list_shard(shard: Shard, limits: Limits, limit: int | None, is_decoded: bool) -> list[Item]:
    with open_shard(shard) as stream:
        return [
            Item(
                sample.key, shard.url, sample.index, label=sample.label,
                error=why_unusable(sample, limits) if is_decoded else sample.error,
            )
            for sample in islice(iter_samples(stream, limits), limit)
        ]  # fmt: skip


def why_unusable(sample: Sample, limits: Limits) -> Reason | None:
    """Say why a sample's image cannot be used: its error, or what decoding meets; None where it can."""
    if sample.error is not None:
        return sample.error
    assert sample.image is not None, sample.key
    try:  # at 32 pixels: reads all of the file, at a fraction of the work for large JPEGs
        decode_image(sample.image, limits, size_px=32)
    except BadSample as bad:
        return bad.reason
    return None
