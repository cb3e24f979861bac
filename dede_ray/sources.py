"""Sources: where clean images come from, and what is drawn from them by chance: splits, samples, captions.

A source is one class with one method, `read`, which names its splits and yields their samples; a new source is
such a class and its name in the union `Source` of ingest.py.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import ClassVar, Literal, Protocol, TypeVar

import numpy as np
from PIL import Image
from pydantic import Field, ValidationError, model_validator

from dede_ray.config import Config, Mistake, explain, parse_json
from dede_ray.shards import (
    BadSample,
    Limits,
    Sample,
    Shard,
    decode_image,
    encode_image,
    iter_samples,
    list_shards,
    open_shard,
)

logger = logging.getLogger(__name__)


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

    def read(self, seed: int, limits: Limits) -> dict[str, Iterator[Sample]]:
        """Yield the samples of `train`, `calibration` and `test`, in the order of the data set."""
        from sklearn.datasets import load_digits  # a second of import that other sources need not pay

        digits = load_digits()
        labels = [int(label) for label in digits.target]
        if self.calibration + self.test >= len(labels):
            raise Mistake(
                f"calibration {self.calibration} + test {self.test} leaves nothing to train on: there are "
                f"{len(labels):,} digits"
            )
        calibration = draw_by_class(labels, self.calibration, seed)
        rest = [i for i in range(len(labels)) if i not in calibration]
        test = {rest[i] for i in draw_by_class([labels[i] for i in rest], self.test, seed)}

        def samples(chosen: Iterable[int]) -> Iterator[Sample]:
            for i in sorted(chosen):
                image_HWC = _enlarge(digits.images[i])
                yield Sample(
                    f"digit_{i:04d}", i, image=encode_image(image_HWC, "png"), image_suffix="png", label=labels[i]
                )

        train = set(rest) - test
        return {"train": samples(train), "calibration": samples(calibration), "test": samples(test)}


def _enlarge(levels_HW: np.ndarray) -> np.ndarray:
    grey = Image.fromarray(np.rint(levels_HW * 255 / 16).astype(np.uint8))
    return np.asarray(grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))


class LabelledShards(Config):
    """WebDataset shards whose samples carry a class label (`cls`), plain or gzipped; image bytes are kept as they are.

    So are keys, unless two shards of a split use the same one: the later becomes `<key>@<shard>`.
    Which images calibrate is a choice with a price: out of `train` they are lost for training and scoring, out of
    `test` every training sample is still trained on and scored.
    """

    kind: Literal["labelled_shards"] = "labelled_shards"
    splits: dict[str, str | list[str]] = Field(min_length=1)
    """Split name -> its shards: a pattern, a folder or a list of them."""
    class_names: list[str] = Field(min_length=1)
    """Name of class 0, 1, 2 ..."""
    calibration: int = Field(0, ge=0)
    """Samples that become the split `calibration`, drawn class by class; 0: none is drawn."""
    calibration_from: str = "train"
    """The split that gives them away."""
    limit: int | None = Field(None, gt=0)
    """Take only the first so many samples of each split, for a quick try; null: all."""

    @model_validator(mode="after")
    def _calibration_has_a_source(self) -> LabelledShards:
        if self.calibration and self.calibration_from not in self.splits:
            raise ValueError(f"calibration_from is {self.calibration_from!r}, but the splits are {[*self.splits]}")
        if self.calibration and "calibration" in self.splits:
            raise ValueError("there is a split named calibration already; set calibration to 0")
        return self

    def read(self, seed: int, limits: Limits) -> dict[str, Iterator[Sample]]:
        """Yield the samples of each split in their order; a first pass over labels settles who calibrates."""
        shards = {split: list_shards(pattern) for split, pattern in self.splits.items()}
        samples = {split: self._pairs(shards[split], limits) for split in shards}
        if self.calibration:
            giver = self.calibration_from
            usable = {  # decoded here and once more when written: the split gets exactly what was asked for
                (shard.name, sample.key): sample.label or 0
                for shard, sample in self._pairs(shards[giver], limits)
                if why_unusable(sample, limits) is None
            }
            if self.calibration >= len(usable):
                raise Mistake(
                    f"calibration is to get {self.calibration:,} samples of `{giver}`, which has {len(usable):,} "
                    "usable ones; ask for less"
                )
            names = sorted(usable)
            drawn = {names[i] for i in draw_by_class([usable[name] for name in names], self.calibration, seed)}
            samples["calibration"] = (s for s in self._pairs(shards[giver], limits) if (s[0].name, s[1].key) in drawn)
            samples[giver] = (s for s in self._pairs(shards[giver], limits) if (s[0].name, s[1].key) not in drawn)
        return {split: self._checked(pairs) for split, pairs in samples.items()}

    def _pairs(self, shards: list[Shard], limits: Limits) -> Iterator[tuple[Shard, Sample]]:
        return islice(_read_shards(shards, limits), self.limit)

    def _checked(self, pairs: Iterable[tuple[Shard, Sample]]) -> Iterator[Sample]:
        seen: set[str] = set()
        for shard, sample in pairs:
            if sample.key in seen:  # in another shard, where it was another sample; here they might share one
                sample.key = f"{sample.key}@{shard.name.partition('.')[0]}"
            seen.add(sample.key)
            if sample.label is not None and not 0 <= sample.label < len(self.class_names):
                raise Mistake(
                    f"{shard.url} holds label {sample.label} (key {sample.key}), but class_names names classes "
                    f"0 to {len(self.class_names) - 1}; complete class_names"
                )
            yield sample


def _read_shards(shards: list[Shard], limits: Limits) -> Iterator[tuple[Shard, Sample]]:
    for shard in shards:
        with open_shard(shard) as stream:
            for sample in iter_samples(stream, limits):
                yield shard, sample


def why_unusable(sample: Sample, limits: Limits) -> str | None:
    """Say why a sample cannot become a labelled one: its error, its image's, or `no_label`; None where it can."""
    if sample.error is not None:
        return sample.error
    assert sample.image is not None, sample.key
    try:  # at 32 pixels: reads all of the file, at a fraction of the work for large JPEGs
        decode_image(sample.image, limits, size_px=32)
    except BadSample as bad:
        return bad.reason
    return "no_label" if sample.label is None else None


# ---------------------------------------------------------------------------------- chance, classes, captions


def keyed_generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers that belong to one sample: the same wherever, and in whatever order, it is met."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, "<u4")])


def draw_by_class(labels: Sequence[int], num: int, seed: int) -> set[int]:
    """Draw exactly `num` positions of `labels` without replacement, each class by its share.

    Walking through each shuffled class at a speed that finishes all classes together, the first `num` are drawn.
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


class Classes(Config):
    """The content of `classes.json`."""

    names: list[str]
    """Class names in the order of their labels."""
    templates: list[str]
    """Captions, `{}` standing for the class name."""


def read_classes(shards: Sequence[Shard]) -> Classes | None:
    """Read the `classes.json` beside the first of the shards, local or remote; None where there is none.

    Raises:
        Mistake: it is not what `ingest` writes.
    """
    url = shards[0].url.rpartition("/")[0] + "/classes.json"
    try:
        with open_shard(Shard("classes.json", url, 0)) as stream:
            content = parse_json(stream)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Mistake(f"{url} should be JSON, but cannot be read: {error}") from None
    try:
        return Classes.model_validate(content)
    except ValidationError as error:
        raise Mistake(f"{url} does not describe classes:\n{explain(error, Classes)}") from None


def class_captions(templates: Sequence[str], name: str) -> list[str]:
    """Fill each template with a class name; a plain replacement, as templates may come from strangers."""
    return [template.replace("{}", name) for template in templates]


def pick_caption(captions: Sequence[str], seed: int, name: str) -> str:
    """Pick one caption for the sample called `name`."""
    return captions[int(keyed_generator(seed, name).integers(len(captions)))]
