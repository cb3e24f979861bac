"""Ingest: a source of images becomes captioned WebDataset shards.

The source lists where its samples lie; a shard is a slice of that list, and making it (read, check that the image
decodes, caption, write) is one piece of work for one core. A shard is absent or whole, and a receipt beside it counts
the samples in it and those left out, with the reason. So a run that was killed resumes, and the bytes depend neither on
that nor on how many shards are made at once.

    <output>/train-00000.tar ...      the samples; fewer than `samples_per_shard` where some are unusable
    <output>/classes.json             names and templates, where the source has classes
    <output>/.ingest/                 while it runs: plan.json, receipts, and unpacked archives
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from dede_ray.data.captions import Classes, class_captions, pick_caption
from dede_ray.data.shards import Limits, Sample, write_shard
from dede_ray.ingest.datasets import (
    GTSRB,
    STL10,
    SVHN,
    Caltech101,
    Cifar10,
    Cifar100,
    Folders,
    HuggingFace,
    ImageNet,
    Parquet,
)
from dede_ray.ingest.links import UrlList, ingest_urls
from dede_ray.ingest.sources import Digits, Item, Listing, WebDataset, in_turn, why_unusable
from dede_ray.runtime.config import Config, Mistake, claim, finish, read_json, write_json
from dede_ray.runtime.lease import leased
from dede_ray.runtime.session import check_output, start_ray

logger = logging.getLogger(__name__)

Local = (
    Digits
    | WebDataset
    | Folders
    | HuggingFace
    | Parquet
    | ImageNet
    | Cifar10
    | Cifar100
    | STL10
    | GTSRB
    | SVHN
    | Caltech101
)
Source = Annotated[Local | UrlList, Field(discriminator="kind")]


class IngestConfig(Config):
    """Settings of `dede-ray ingest`: what to turn into shards, and where to put them."""

    source: Source
    """Where the images come from."""
    output: str
    """Folder for the shards and classes.json."""
    templates: list[str] = Field(["a photo of a {}"], min_length=1)
    """Captions for samples that have a class but no caption, with `{}` for the class name; each draws one."""
    samples_per_shard: int = Field(1000, gt=0)
    """Samples in one tar: the unit in which later jobs share out their work. For a list of links: links per tar."""
    seed: int = Field(0, ge=0)
    """Draws the splits and the captions."""
    limits: Limits = Limits()
    """What one sample may cost."""
    workers: int | None = Field(None, ge=1)
    """Shards made at once; null: one on each CPU of the Ray cluster, 1: all in this process. No byte depends on it."""

    @field_validator("templates")
    @classmethod
    def _templates_have_a_place(cls, templates: list[str]) -> list[str]:
        if lacking := [template for template in templates if "{}" not in template]:
            raise ValueError(f"a template needs `{{}}` where the class name goes; {lacking[0]!r} has none")
        return templates


def run(config: IngestConfig) -> str:
    """The job: `ingest` on Ray, or in this process where one worker does all."""
    if config.workers == 1:
        check_output(config)
    else:
        start_ray(config)
    return ingest(config)


def ingest(config: IngestConfig) -> str:
    """Write a source's splits as shards, or what remains of them; on all of Ray where it runs, or in this process.

    A sample keeps its own caption, or gets one from the templates if it has a named class; with neither it stays
    without. Samples whose image cannot be used are left out and counted; where it is the caption or the label, that
    alone is left aside.

    Returns:
        One line: the samples of each split, what was left aside of them, and how many were left out for which reason.

    Raises:
        Mistake: the output folder belongs to another run, the source is not where the settings say, or the splits
            they ask for cannot be drawn from it.
    """
    output = Path(config.output).absolute()
    with leased(output):
        return _ingest(config, output)


def _ingest(config: IngestConfig, output: Path) -> str:
    source, state = config.source, output / ".ingest"
    run = config.model_copy(update={"workers": None})  # the number of workers does not change the output
    done = claim(output, run)
    if isinstance(source, UrlList):
        if done is None or source.retry_failed:
            result = ingest_urls(source, output, config.limits, config.samples_per_shard)
            done = finish(output, run, result)
        return done["summary"]
    if done:
        shutil.rmtree(state, ignore_errors=True)
        return done["summary"]
    each = partial(_each, workers=config.workers)
    listing = source.find(config.seed, config.limits, state / "unpacked", each)
    _plan(state, run, listing)
    for note in listing.notes:
        logger.info("%s", note)

    slices = [
        (output, f"{split}-{number:05d}", items[start : start + config.samples_per_shard])
        for split, items in listing.splits.items()
        for number, start in enumerate(range(0, len(items), config.samples_per_shard))
    ]
    todo = [these for these in slices if not _receipt(output, these[1]).is_file()]
    if len(todo) < len(slices):
        logger.info("resuming: %d of %d shards are done", len(slices) - len(todo), len(slices))
    _report(each(partial(_make_shard, run, source, listing.class_names), todo), len(todo))

    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for _, name, _ in slices:
        receipt = read_json(_receipt(output, name), "receipt of a shard")
        counts[name.rpartition("-")[0]] += receipt["samples"]
        left_out.update(receipt["left_out"])
        notes.update(receipt.get("notes", {}))
    if not sum(counts.values()):
        shutil.rmtree(state)
        raise Mistake(f"not one sample of the source can be used: {_listing(left_out) or 'it has none'}")
    if listing.class_names is not None:
        write_json(output / "classes.json", Classes(names=listing.class_names, templates=config.templates).model_dump())
    said = "".join(f"; {note}" for note in [*listing.notes, *([f"notes: {_listing(notes)}"] if notes else [])])
    summary = f"{_listing(counts)} samples in {config.output}{said}; left out: {_listing(left_out) or 'none'}"
    finish(output, run, {"counts": dict(counts), "left_out": dict(left_out), "notes": dict(notes), "summary": summary})
    shutil.rmtree(state, ignore_errors=True)
    return summary


def _plan(state: Path, run: IngestConfig, listing: Listing) -> None:
    """Record what is to be done; in a run that resumes, make sure that it is still the same."""
    digest = hashlib.sha256()
    for split, items in listing.splits.items():
        for item in items:
            digest.update(repr((split, item._replace(file=""))).encode())
    settings = run.model_dump(mode="json")
    plan = {"settings": settings, "items": digest.hexdigest()}
    there = read_json(state / "plan.json", "plan of a run") if (state / "plan.json").is_file() else None
    if there is not None and there.get("settings") != settings:  # `claim` allowed the change: nothing had been written
        for receipt in state.glob("*.json"):
            receipt.unlink()
    elif there is not None and there != plan:
        raise Mistake(
            f"the source has changed since this run began: {state.parent} holds shards of what it was; "
            "restore it, or delete the folder to start afresh"
        )
    for half in state.parent.glob(".*.tar.tmp-*"):  # of a process that was killed
        half.unlink()
    write_json(state / "plan.json", plan)


def _receipt(output: Path, name: str) -> Path:
    return output / ".ingest" / f"{name}.json"


def _make_shard(
    config: IngestConfig, source: Local, names: list[str] | None, output: Path, name: str, items: Sequence[Item]
) -> int:
    """Make one shard and its receipt; returns the number of samples. No tar is written where none can be used."""
    left_out: Counter[str] = Counter()
    notes: Counter[str] = Counter()

    def usable() -> Iterator[Sample]:
        for sample in source.load(items, config.limits):
            if reason := why_unusable(sample, config.limits):
                left_out[reason] += 1
                continue
            notes.update(sample.notes)
            if not (sample.caption or "").strip():
                sample.caption = None
                if names is not None and sample.label is not None:
                    captions = class_captions(config.templates, names[sample.label])
                    sample.caption = pick_caption(captions, config.seed, sample.key)
            yield sample

    samples = usable()
    first = next(samples, None)
    count = 0 if first is None else write_shard(output / f"{name}.tar", itertools.chain([first], samples))
    receipt = {"samples": count, "left_out": dict(sorted(left_out.items())), "notes": dict(sorted(notes.items()))}
    write_json(_receipt(output, name), receipt)
    return count


def _each(function: Callable[..., Any], arguments: Sequence[tuple], workers: int | None) -> Iterator[tuple[int, Any]]:
    """Call a function with each tuple of arguments, in Ray tasks if Ray runs; yield (position, result) as done."""
    if workers == 1 or len(arguments) < 2:
        yield from in_turn(function, arguments)
        return
    import ray  # a second, which a small run on one core need not pay

    if not ray.is_initialized():
        yield from in_turn(function, arguments)
        return
    task, shared = ray.remote(num_cpus=1)(_call), ray.put(function)
    at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(enumerate(arguments))
    running: dict[Any, int] = {}
    while True:
        for position, these in itertools.islice(waiting, at_once - len(running)):
            running[task.remote(shared, *these)] = position
        if not running:
            return
        (done,), _ = ray.wait(list(running))
        yield running.pop(done), ray.get(done)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _report(made: Iterator[tuple[int, int]], num_shards: int) -> None:
    started = last = time.monotonic()
    num_samples = 0
    for number, (_, count) in enumerate(made, 1):
        num_samples += count
        now = time.monotonic()
        if now - last > 5 or number == num_shards:
            said = f"{num_samples:,} samples, {num_samples / max(now - started, 1e-9):,.0f} samples/s"
            logger.info("%d/%d shards: %s", number, num_shards, said)
            last = now


def _listing(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
