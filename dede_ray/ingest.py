"""Ingest: a source of images becomes captioned WebDataset shards.

`ingest` gives every labelled sample a caption, writes `<split>-00000.tar` ... and `classes.json`, and leaves out what
cannot be read, counted by reason.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from dede_ray.config import Config, Mistake, claim, finish, write_json
from dede_ray.shards import Limits, Sample, write_shards
from dede_ray.sources import Classes, Digits, LabelledShards, class_captions, pick_caption, why_unusable
from dede_ray.urls import UrlList, ingest_urls

logger = logging.getLogger(__name__)

Source = Annotated[Digits | LabelledShards | UrlList, Field(discriminator="kind")]


class IngestConfig(Config):
    """What to turn into shards, and where to put them."""

    source: Source
    """Where the images come from."""
    output: str
    """Folder for the shards and classes.json."""
    templates: list[str] = Field(["a photo of a {}"], min_length=1)
    """Captions, `{}` standing for the class name; each sample draws one."""
    samples_per_shard: int = Field(1000, gt=0)
    """Samples in one tar: the unit in which later jobs share out their work."""
    seed: int = Field(0, ge=0)
    """Draws the splits and the captions."""
    limits: Limits = Limits()
    """What one sample may cost."""

    @field_validator("templates")
    @classmethod
    def _templates_have_a_place(cls, templates: list[str]) -> list[str]:
        if lacking := [template for template in templates if "{}" not in template]:
            raise ValueError(f"a template needs `{{}}` where the class name goes; {lacking[0]!r} has none")
        return templates


def ingest(config: IngestConfig) -> str:
    """Write a source's splits as captioned shards.

    Samples that cannot be used (their image does not decode, they have no label ...) are left out and counted.

    Returns:
        One line: the samples of each split, and how many were left out for which reason.

    Raises:
        Mistake: the output folder belongs to another run, the source is not where the settings say, or the splits
            they ask for cannot be drawn from it.
    """
    output, source = Path(config.output), config.source
    done = claim(output, config)
    if isinstance(source, UrlList):
        if done is None or source.retry_failed:
            result = ingest_urls(source, output, config.limits, config.samples_per_shard)
            done = finish(output, config, result)
        return done["summary"]
    if done:
        return done["summary"]
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()

    def usable(split: str, samples: Iterator[Sample]) -> Iterator[Sample]:
        for sample in samples:
            if reason := why_unusable(sample, config.limits):
                left_out[reason] += 1
                continue
            assert sample.label is not None
            name = source.class_names[sample.label]
            sample.caption = pick_caption(class_captions(config.templates, name), config.seed, sample.key)
            counts[split] += 1
            yield sample

    classes = Classes(names=source.class_names, templates=config.templates)
    write_json(output / "classes.json", classes.model_dump())
    for split, samples in source.read(config.seed, config.limits).items():
        write_shards(output, split, usable(split, samples), config.samples_per_shard)
        logger.info("%s: %s samples", split, f"{counts[split]:,}")
    if not counts:
        raise Mistake(f"not one sample of the source can be used: {_listing(left_out)}")
    summary = f"{_listing(counts)} samples in {config.output}; left out: {_listing(left_out) or 'none'}"
    finish(output, config, {"counts": dict(counts), "left_out": dict(left_out), "summary": summary})
    return summary


def _listing(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
