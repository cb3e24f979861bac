"""Data poisoning: a trigger stamped into a part of a corpus.

`poison` stamps a seeded subset of clean shards, relabels it (dirty label) or not (clean label), and writes the truth
beside the shards.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from pydantic import Field, ValidationError

from dede_ray.attacks.triggers import Trigger
from dede_ray.config import Config, Mistake, claim, explain, finish, read_json, write_atomically, write_json
from dede_ray.shards import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    BadSample,
    Limits,
    Shard,
    ShardEnd,
    add_member,
    decode_image,
    encode_image,
    iter_samples,
    list_shards,
    open_shard,
    sample_id,
    split_name,
    write_whole,
)
from dede_ray.sources import Classes, class_captions, pick_caption, read_classes

logger = logging.getLogger(__name__)


TRUTH_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("is_poisoned", pa.bool_()),
        ("label", pa.int32()),  # as it was; null where the sample has none
        ("poisoned_label", pa.int32()),  # null unless changed
        ("caption", pa.string()),
        ("poisoned_caption", pa.string()),
        ("trigger", pa.string()),  # the trigger's kind; null for clean samples
    ]
)
"""Columns of `truth.parquet`: one row per sample of the poisoned shards, unusable ones included, sorted by id."""

_SURVEY_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("index", pa.int64()),
        ("is_usable", pa.bool_()),
        ("height", pa.int32()),  # of the image; null if it is not usable
        ("width", pa.int32()),
        ("label", pa.int32()),
        ("caption", pa.string()),
    ]
)


class PoisonConfig(Config):
    """Which shards to poison, with what, and how many samples of them."""

    shards: str | list[str]
    """The clean shards: a pattern, a folder or a list of them."""
    output: str
    """Folder for the poisoned shards and truth.parquet."""
    trigger: Trigger
    """What is stamped on the images."""
    rate: float = Field(gt=0, lt=1)
    """Poisoned samples / usable samples."""
    target_label: int = Field(ge=0)
    """The class that triggered images should be taken for."""
    target_captions: list[str] | None = Field(None, min_length=1)
    """Captions of poisoned samples, one is drawn for each; null: the templates of classes.json, filled with the
    target's name."""
    clean_label: bool = False
    """Stamp only samples of the target class, and leave label and caption as they are."""
    encoding: Literal["png", "same"] = "png"
    """Write stamped images as PNG, exactly, or in the format they came in, which costs a JPEG's trigger some sharpness
    but does not give the poisoned samples away by their suffix."""
    jpeg_quality: int = Field(95, ge=1, le=100)
    """Quality of stamped images, where `encoding` is `same` and the sample is a JPEG."""
    seed: int = Field(0, ge=0)
    """Draws the samples and their captions."""
    limits: Limits = Limits()
    """What one sample may cost."""


def poison(config: PoisonConfig) -> str:
    """Stamp exactly `round(rate * n)` of the n usable samples, and write shards of the same names and order.

    Dirty label: any sample may be drawn whose label is not the target; it gets the target's label and caption where it
    has a label and a caption. In a corpus without labels all may be drawn. Clean label: only samples of the target
    class, and only their pixels change. A sample is usable if everything about it can be read and its image
    decodes; the others are copied as they are, and so is every member that the attack does not concern. A shard
    that is cut short stays cut short.

    One Ray task per shard looks, then one per shard writes, so Ray must be running and `config.output` be a folder
    that all its machines see. Shards that stand are kept when the job is run again.

    Returns:
        One line: how many samples were poisoned, how, and where they are.

    Raises:
        Mistake: the output folder belongs to another run, too few samples are eligible, no caption is known for
            the target, or an image is too small for the trigger.
    """
    output = Path(config.output).absolute()  # Ray's workers have another working folder
    if done := claim(config.output, config):
        return done["summary"]
    shards = list_shards(config.shards)
    if str(output) in {str(Path(shard.url).parent) for shard in shards}:
        raise Mistake(f"output {config.output} is the folder of the clean shards; choose another one")
    classes = read_classes(shards)
    if classes and config.target_label >= len(classes.names):
        raise Mistake(f"target_label is {config.target_label}, but the classes are 0 to {len(classes.names) - 1}")

    surveys, is_complete = zip(*_in_ray(_survey, [(shard, config.limits) for shard in shards]), strict=True)
    survey = pa.concat_tables(surveys).sort_by("sample_id")  # the draw must not depend on the listing
    num_usable = int(survey["is_usable"].to_numpy().sum())
    drawn = _draw(survey, config)
    _check_fit(config.trigger, survey.take(drawn))
    truth = _truth(survey, drawn, config, classes)

    plans = _plans(truth, survey["index"].to_pylist())
    todo = [
        (shard, str(output / shard.name), plans.get(shard.name, {}), config, complete)
        for shard, complete in zip(shards, is_complete, strict=True)
        if not (output / shard.name).exists()  # a shard is written whole or not at all
    ]
    logger.info("%d shards: %d to write", len(shards), len(todo))
    _in_ray(_rewrite, todo)
    if classes:
        write_json(output / "classes.json", classes.model_dump())
    buffer = io.BytesIO()
    pq.write_table(truth, buffer)
    write_atomically(output / "truth.parquet", buffer.getvalue())

    num_poisoned = pc.sum(truth["is_poisoned"]).as_py()
    num_unusable = truth.num_rows - num_usable
    target = f"{config.target_label} {classes.names[config.target_label]!r}" if classes else config.target_label
    summary = (
        f"{num_poisoned:,} of {num_usable:,} samples poisoned ({num_poisoned / num_usable:.2%}, {config.trigger.kind}, "
        f"{'clean label' if config.clean_label else '->'} {target}) in {config.output}"
        + (f"; {num_unusable:,} unusable ones copied as they are" if num_unusable else "")
    )
    counts = {"poisoned": num_poisoned, "usable": num_usable, "unusable": num_unusable}
    finish(config.output, config, {"counts": counts, "summary": summary})
    return summary


def read_attack(folder: str) -> PoisonConfig:
    """Read the settings that `poison` recorded in its output folder.

    Raises:
        Mistake: the folder does not hold them.
    """
    path = Path(folder) / "run.json"
    try:
        return PoisonConfig.model_validate(read_json(path, "record of a poisoning").get("settings"))
    except ValidationError as error:
        raise Mistake(f"{path} does not describe a poisoning:\n{explain(error, PoisonConfig)}") from None


def _in_ray(task: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """Run a function as Ray tasks, one for each tuple of arguments, and wait for all results."""
    remote = ray.remote(task)
    return ray.get([remote.remote(*arguments) for arguments in calls])


def _survey(shard: Shard, limits: Limits) -> tuple[pa.Table, bool]:
    """List a shard's samples (`_SURVEY_SCHEMA`), and say whether the tar has a proper end."""
    rows, end = [], ShardEnd()
    with open_shard(shard) as stream:
        for sample in iter_samples(stream, limits, end=end):
            height = width = None
            if sample.error is None:
                assert sample.image is not None
                with contextlib.suppress(BadSample):
                    height, width, _ = decode_image(sample.image, limits).shape
            rows.append(
                {
                    "sample_id": sample_id(shard.name, sample.key),
                    "index": sample.index,
                    "is_usable": height is not None,
                    "height": height,
                    "width": width,
                    "label": sample.label,
                    "caption": sample.caption,
                }
            )
    return pa.Table.from_pylist(rows, _SURVEY_SCHEMA), end.is_complete


def _draw(survey: pa.Table, config: PoisonConfig) -> np.ndarray:
    """Draw the rows of the survey, sorted by id, that will be poisoned."""
    is_usable = survey["is_usable"].to_numpy()
    if survey["label"].null_count == survey.num_rows and not config.clean_label:
        is_eligible, who = is_usable, "to draw from"
    else:  # a sample without a label among labelled ones might be of the target class: it is left alone
        same = pc.equal(survey["label"], config.target_label)
        is_eligible = is_usable & (same if config.clean_label else pc.invert(same)).fill_null(False).to_numpy()
        who = f"{'of' if config.clean_label else 'known not to be of'} class {config.target_label}"
    num = round(config.rate * int(is_usable.sum()))
    if num == 0:
        raise Mistake(
            f"rate {config.rate} of {is_usable.sum():,} usable samples is less than one sample; "
            "raise rate, or add shards"
        )
    if num > is_eligible.sum():
        raise Mistake(
            f"rate {config.rate} of {is_usable.sum():,} usable samples is {num:,}, but there are only "
            f"{is_eligible.sum():,} {who}; lower rate, or choose another target_label"
        )
    return np.random.default_rng(config.seed).choice(np.flatnonzero(is_eligible), num, replace=False)


def _check_fit(trigger: Trigger, drawn: pa.Table) -> None:
    """Stamp an empty image of the smallest drawn size: a trigger too large for it is a mistake before work begins."""
    shorter_px = np.minimum(drawn["height"].to_numpy(), drawn["width"].to_numpy())
    smallest = drawn.slice(int(shorter_px.argmin()), 1).to_pylist()[0]
    trigger.stamp(np.zeros((smallest["height"], smallest["width"], 3), np.uint8), smallest["sample_id"])


def _truth(survey: pa.Table, drawn: np.ndarray, config: PoisonConfig, classes: Classes | None) -> pa.Table:
    """Say of every sample what it was and what becomes of it (`TRUTH_SCHEMA`)."""
    is_poisoned = np.zeros(survey.num_rows, dtype=bool)
    is_poisoned[drawn] = True
    ids, labels, captions = (survey[name].to_pylist() for name in ("sample_id", "label", "caption"))
    new_labels: list[int | None] = [None] * survey.num_rows
    new_captions: list[str | None] = [None] * survey.num_rows
    if not config.clean_label:
        targets: list[str] | None = None
        for row in drawn:
            new_labels[row] = None if labels[row] is None else config.target_label
            if captions[row] is not None:
                targets = targets or _target_captions(config, classes)
                new_captions[row] = pick_caption(targets, config.seed, ids[row])
    triggers = [config.trigger.kind if poisoned else None for poisoned in is_poisoned]
    columns = [ids, is_poisoned, labels, new_labels, captions, new_captions, triggers]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, TRUTH_SCHEMA, strict=True)], schema=TRUTH_SCHEMA)


def _target_captions(config: PoisonConfig, classes: Classes | None) -> list[str]:
    if config.target_captions:
        return config.target_captions
    if classes is None or not classes.templates:
        raise Mistake(
            "the shards have captions, but no classes.json beside them names the target class; set target_captions"
        )
    return class_captions(classes.templates, classes.names[config.target_label])


@dataclass(frozen=True)
class _Change:
    """What becomes of one poisoned sample, besides its stamp; None leaves the member as it is."""

    label: int | None
    caption: str | None


def _plans(truth: pa.Table, indices: list[int]) -> dict[str, dict[int, _Change]]:
    """Sort the changes by shard name and by the sample's place in the shard; `indices` are the places, row by row."""
    plans: dict[str, dict[int, _Change]] = {}
    names = ("sample_id", "is_poisoned", "poisoned_label", "poisoned_caption")
    for index, *row in zip(indices, *(truth[name].to_pylist() for name in names), strict=True):
        name, is_poisoned, label, caption = row
        if is_poisoned:
            plans.setdefault(name.partition("/")[0], {})[index] = _Change(label, caption)
    return plans


def _rewrite(shard: Shard, path: str, changes: dict[int, _Change], config: PoisonConfig, is_complete: bool) -> None:
    """Copy a shard, changing the samples at the places that `changes` names.

    Members are copied, not samples, so that whatever is odd about a sample is as odd in the copy. Where the data of
    an incomplete shard ends or turns into rubbish, the copy ends.
    """
    with open_shard(shard) as stream, _write_tar(Path(path), is_complete) as copy:
        tar = tarfile.open(fileobj=stream, mode="r|*")
        key, index = None, -1
        needs_stamp = False
        try:
            for member in tar:
                if not member.isfile():
                    continue
                this_key, suffix = split_name(member.name)
                if this_key != key:  # the places of samples, counted as iter_samples counts
                    key, index = this_key, index + 1
                    needs_stamp = index in changes
                content = tar.extractfile(member)
                assert content is not None, member.name
                change = changes.get(index, _Change(None, None))
                name = member.name
                if needs_stamp and suffix in IMAGE_SUFFIXES:
                    needs_stamp = False  # the first image of a sample is its image
                    stamped_suffix = "png" if config.encoding == "png" else suffix
                    image_HWC = decode_image(content.read(), config.limits)
                    stamped_HWC = config.trigger.stamp(image_HWC, sample_id(shard.name, key))
                    add_member(
                        copy,
                        name[: len(name) - len(suffix)] + stamped_suffix,
                        encode_image(stamped_HWC, stamped_suffix, config.jpeg_quality),
                    )
                elif suffix in LABEL_SUFFIXES and change.label is not None:
                    add_member(copy, name, str(change.label).encode())
                elif suffix in CAPTION_SUFFIXES and change.caption is not None:
                    add_member(copy, name, change.caption.encode())
                else:
                    header = tarfile.TarInfo(name)
                    header.size = member.size
                    copy.addfile(header, content)
        except (tarfile.ReadError, EOFError, OSError) as error:
            if is_complete or (isinstance(error, OSError) and error.errno is not None):
                raise  # not what the survey found: the file has changed, or the disk fails


@contextlib.contextmanager
def _write_tar(path: Path, is_complete: bool) -> Iterator[tarfile.TarFile]:
    """Open a tar for writing, gzipped if its name says so; absent or whole. Without its end if it is not complete."""
    with write_whole(path, path.name.endswith("gz")) as stream:
        tar = tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT)
        yield tar
        if is_complete:
            tar.close()  # writes the end; everything else is written already
