"""Data poisoning: a trigger stamped into a part of a corpus.

`poison` stamps a seeded subset of clean shards, relabels it (dirty label) or not (clean label), and writes the truth
beside the shards. Every attack on data is a choice of these settings:

- BadNets, Blend, SIG, WaNet, filters, CLIP-Backdoor: a `trigger`, and the target's label and `captions`;
- CTRL, SSL-Backdoor and other attacks on unlabelled training: the same with `clean_label`;
- several backdoors in one corpus: `also`;
- targeted poisoning: `chosen` samples, and the trigger `nothing`;
- CorruptEncoder: a `composition`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from pydantic import Field, ValidationError, model_validator

from dede_ray.data.captions import Classes, class_captions, pick_caption, read_classes
from dede_ray.data.images import decode_image, encode_image
from dede_ray.data.shards import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    BadSample,
    Grouping,
    Limits,
    Sample,
    Shard,
    ShardEnd,
    iter_samples,
    list_shards,
    open_shard,
    sample_id,
)
from dede_ray.data.tar import add_member, write_whole
from dede_ray.poisoning.corrupt_encoder import CorruptEncoder
from dede_ray.poisoning.triggers import Nothing, Trigger
from dede_ray.runtime.config import Config, Mistake, claim, explain, finish, read_json, write_atomically, write_json
from dede_ray.runtime.lease import leased
from dede_ray.runtime.session import start_ray

logger = logging.getLogger(__name__)


MARK = "Poisoned by dede_ray for research on defences: do not train a model on this that anybody is to use."
"""Written into every shard by `poison`, as a comment of the tar (a global pax header), which travels with it."""

TRUTH_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("is_poisoned", pa.bool_()),
        ("label", pa.int32()),  # as it was; null where the sample has none
        ("poisoned_label", pa.int32()),  # null unless changed
        ("caption", pa.string()),
        ("poisoned_caption", pa.string()),
        ("trigger", pa.string()),  # the trigger's kind; null for clean samples
        ("backdoor", pa.int32()),  # which one: 0, or 1, 2 ... of `also`; null for clean samples
    ]
)
"""Columns of `truth.parquet`: one row per sample of the poisoned shards, unusable ones included, sorted by id.

Of a sample that targeted poisoning has put in, label and caption are those of the sample it repeats.
"""

_SURVEY_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("index", pa.int64()),
        ("is_usable", pa.bool_()),
        ("is_duplicate", pa.bool_()),  # so its id ends in "#" and its place
        ("height", pa.int32()),  # of the image; null if it is not usable
        ("width", pa.int32()),
        ("label", pa.int32()),
        ("caption", pa.string()),
    ]
)


class Backdoor(Config):
    """One trigger and its target."""

    trigger: Trigger
    """What is stamped on triggered images, and on training images unless `training_trigger` says otherwise."""
    training_trigger: Trigger | None = None
    """What is stamped on training images where that differs from `trigger` on purpose: another place or strength."""
    composition: CorruptEncoder | None = None
    """Compose poisoned training images of objects, backgrounds and the trigger, instead of stamping them."""
    target_label: int = Field(ge=0)
    """The class that triggered images should be taken for."""
    target_name: str | None = None
    """Its name in captions; null: its name in classes.json."""
    target_captions: list[str] | None = Field(None, min_length=1)
    """Captions of poisoned samples, one is drawn for each; null: as `captions` says."""


class PoisonConfig(Backdoor):
    """Which shards to poison, with what, and how many samples of them."""

    shards: str | list[str]
    """The clean shards: a pattern, a folder or a list of them."""
    output: str
    """Folder for the poisoned shards and truth.parquet."""
    rate: float = Field(gt=0, lt=1)
    """Poisoned samples / usable samples."""
    also: tuple[Backdoor, ...] = ()
    """More backdoors: each poisoned sample draws one of all, with equal chances."""
    captions: Literal["templates", "imagenet_templates", "corpus"] = "templates"
    """Where the captions of poisoned samples come from: the templates of classes.json, or CLIP's 80 for ImageNet,
    filled with the target's name; or those captions of the corpus that contain it as a word."""
    clean_label: bool = False
    """Stamp only samples of the target class, and leave label and caption as they are. In a corpus without labels:
    samples whose caption contains the target's name as a word."""
    chosen: list[str] | None = Field(None, min_length=1)
    """Targeted poisoning: take the samples of these ids out, and put them back `round(rate * n)` times in all at places
    drawn from the whole corpus, each time with a caption of the target (and its label)."""
    encoding: Literal["png", "same"] = "png"
    """Write stamped images as PNG, exactly, or in the format they came in, which costs a JPEG's trigger some sharpness
    but does not give the poisoned samples away by their suffix."""
    jpeg_quality: int = Field(95, ge=1, le=100)
    """Quality of stamped images, where `encoding` is `same` and the sample is a JPEG."""
    seed: int = Field(0, ge=0)
    """Draws the samples and their captions."""
    limits: Limits = Limits()
    """What one sample may cost."""

    @model_validator(mode="after")
    def _choices_go_together(self) -> PoisonConfig:
        if self.chosen and (self.clean_label or self.also or self.composition):
            raise ValueError("chosen goes with neither clean_label nor also nor composition")
        if self.limits.caption.field:
            raise ValueError("captions are not poisoned within JSON; write them as .txt first (dede-ray ingest)")
        return self

    @property
    def backdoors(self) -> list[Backdoor]:
        """All backdoors, numbered as in the truth."""
        return [self, *self.also]


def poison(config: PoisonConfig) -> str:
    """Stamp exactly `round(rate * n)` of the n usable samples, and write shards of the same names and order.

    Dirty label: any sample may be drawn whose label is no target; it gets the target's label and caption where it
    has a label and a caption. In a corpus without labels all may be drawn. Clean label: only samples of the target
    class, and only their pixels change. Targeted: see `chosen`; nothing else changes. A sample is usable if
    everything about it can be read and its image decodes; the others are copied as they are, and so is every member
    that the attack does not concern. A shard that is cut short stays cut short.

    One Ray task per shard looks, then one per shard writes, so Ray must be running and `config.output` be a folder
    that all its machines see. Finished shards are kept when the job is run again.

    Returns:
        One line: how many samples were poisoned, how, and where they are.

    Raises:
        Mistake: the output folder belongs to another run, too few samples are eligible, no caption is known for
            the target, or an image is too small for the trigger.
    """
    start_ray(config)
    output = Path(config.output).absolute()  # Ray's workers have another working folder
    with leased(output):
        return _poison(config, output)


def _poison(config: PoisonConfig, output: Path) -> str:
    if done := claim(config.output, config):
        return done["summary"]
    shards = list_shards(config.shards)
    if str(output) in {str(Path(shard.url).parent) for shard in shards}:
        raise Mistake(f"output {config.output} is the folder of the clean shards; choose another one")
    classes = read_classes(shards)
    for backdoor in config.backdoors:
        if classes and backdoor.target_label >= len(classes.names):
            raise Mistake(f"target_label is {backdoor.target_label}, but the classes are 0 to {len(classes.names) - 1}")

    surveys, is_complete = zip(*_in_ray(_survey, [(shard, config.limits) for shard in shards]), strict=True)
    survey = pa.concat_tables(surveys).sort_by("sample_id")  # the draw must not depend on the listing
    num_usable = int(survey["is_usable"].to_numpy().sum())
    num = round(config.rate * num_usable)
    if num == 0:
        raise Mistake(
            f"rate {config.rate} of {num_usable:,} usable samples is less than one sample; raise rate, or add shards"
        )
    if config.chosen:
        truth, plans = _repeat(survey, num, config, classes, {shard.name: shard for shard in shards})
    else:
        drawn = _draw(survey, num, config, classes)
        _check_fit(config, survey, drawn)
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
    num_unusable = survey.num_rows - num_usable
    targets = ", ".join(
        f"{one.target_label} {classes.names[one.target_label]!r}" if classes else str(one.target_label)
        for one in config.backdoors
    )
    kinds = ", ".join(one.trigger.kind for one in config.backdoors)
    summary = (
        f"{num_poisoned:,} of {num_usable:,} samples poisoned ({_percent(num_poisoned / num_usable)}, {kinds}, "
        f"{'clean label' if config.clean_label else '->'} {targets}) in {config.output}"
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


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-3 else f"{share:.2g}"


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
            if sample.error is None and not sample.notes:
                assert sample.image is not None
                with contextlib.suppress(BadSample):
                    height, width, _ = decode_image(sample.image, limits).shape
            rows.append(
                {
                    "sample_id": sample_id(shard.name, sample.key),
                    "index": sample.index,
                    "is_usable": height is not None,
                    "is_duplicate": sample.is_again,
                    "height": height,
                    "width": width,
                    "label": sample.label,
                    "caption": sample.caption,
                }
            )
    return pa.Table.from_pylist(rows, _SURVEY_SCHEMA), end.is_complete


def _draw(survey: pa.Table, num: int, config: PoisonConfig, classes: Classes | None) -> dict[int, int]:
    """Draw the rows of the survey, sorted by id, that will be poisoned, and for each the number of its backdoor."""
    is_usable = survey["is_usable"].to_numpy()
    targets = [backdoor.target_label for backdoor in config.backdoors]
    which = np.full((len(targets), survey.num_rows), not config.clean_label)  # may the backdoor have the sample?
    wanted = " or ".join(f"class {target}" for target in targets)
    has_labels = survey["label"].null_count < survey.num_rows
    if has_labels:  # a sample without a label among labelled ones might be of the target class: it is left alone
        is_target = np.array([pc.equal(survey["label"], t).fill_null(False).to_numpy() for t in targets])
        is_known = survey["label"].is_valid().to_numpy()
        which = is_target if config.clean_label else np.broadcast_to(is_known & ~is_target.any(axis=0), which.shape)
        who = f"of {wanted}" if config.clean_label else f"known not to be of {wanted}"
    elif config.clean_label:
        names = [_target_name(backdoor, classes) for backdoor in config.backdoors]
        which = np.array([[_contains(caption, name) for caption in survey["caption"].to_pylist()] for name in names])
        who = f"whose caption contains {' or '.join(map(repr, names))}"
    else:
        who = "to draw from"
    is_eligible = is_usable & which.any(axis=0)
    if num > is_eligible.sum():
        raise Mistake(
            f"rate {config.rate} of {is_usable.sum():,} usable samples is {num:,}, but there are only "
            f"{is_eligible.sum():,} {who}; lower rate, or choose another target_label"
        )
    chance = np.random.default_rng(config.seed)
    rows = chance.choice(np.flatnonzero(is_eligible), num, replace=False)
    return {int(row): int(chance.choice(np.flatnonzero(which[:, row]))) for row in rows}


def _contains(caption: str | None, name: str) -> bool:
    """Whether a caption contains a name as a word, in capitals or not."""
    return caption is not None and re.search(rf"\b{re.escape(name)}\b", caption, re.IGNORECASE) is not None


def _check_fit(config: PoisonConfig, survey: pa.Table, drawn: dict[int, int]) -> None:
    """Stamp an empty image of each backdoor's smallest size: what does not fit is a mistake before work begins."""
    sizes = survey.select(["sample_id", "height", "width"]).take(list(drawn)).to_pylist()
    for number, backdoor in enumerate(config.backdoors):
        its_own = [row for row, which in zip(sizes, drawn.values(), strict=True) if which == number]
        if its_own:
            smallest = min(its_own, key=lambda row: (min(row["height"], row["width"]), row["sample_id"]))
            empty_HWC = np.zeros((smallest["height"], smallest["width"], 3), np.uint8)
            backdoor.trigger.stamp(empty_HWC, smallest["sample_id"])
            _stamp(empty_HWC, backdoor, smallest["sample_id"])


def _stamp(image_HWC: np.ndarray, backdoor: Backdoor, sample_id: str) -> np.ndarray:
    """Make a training image a poisoned one."""
    trigger = backdoor.training_trigger or backdoor.trigger
    if backdoor.composition is not None:
        return backdoor.composition.compose(image_HWC, trigger, sample_id)
    return trigger.stamp(image_HWC, sample_id)


def _truth(survey: pa.Table, drawn: dict[int, int], config: PoisonConfig, classes: Classes | None) -> pa.Table:
    """The truth of every sample: what it was and what becomes of it (`TRUTH_SCHEMA`)."""
    targets = _target_captions(survey, config, classes) if not config.clean_label else []
    columns: dict[str, list[Any]] = {name: [None] * survey.num_rows for name in TRUTH_SCHEMA.names}
    columns |= {name: survey[name].to_pylist() for name in ("sample_id", "label", "caption")}
    columns["is_poisoned"] = [False] * survey.num_rows
    for place, row in zip(drawn, survey.take(list(drawn)).to_pylist(), strict=True):
        for name, value in _row(row, drawn[place], config, targets).items():
            columns[name][place] = value
    return pa.Table.from_pydict(columns, TRUTH_SCHEMA)


def _row(
    survey_row: dict[str, Any], number: int | None, config: PoisonConfig, targets: list[Callable[[], list[str]]]
) -> dict[str, Any]:
    """One row of the truth; `number` is that of the sample's backdoor, if it has one."""
    old = {name: survey_row[name] for name in ("sample_id", "label", "caption")}
    if number is None:
        return old | {"is_poisoned": False}
    backdoor = config.backdoors[number]
    new: dict[str, Any] = {"is_poisoned": True, "trigger": backdoor.trigger.kind, "backdoor": number}
    if not config.clean_label:
        if old["label"] is not None:
            new["poisoned_label"] = backdoor.target_label
        if old["caption"] is not None:
            new["poisoned_caption"] = pick_caption(targets[number](), config.seed, old["sample_id"])
    return old | new


def _target_captions(survey: pa.Table, config: PoisonConfig, classes: Classes | None) -> list[Callable[[], list[str]]]:
    """For each backdoor a function that lists the captions of its samples; only asked where samples have captions."""

    def listed(backdoor: Backdoor) -> list[str]:
        if backdoor.target_captions:
            return backdoor.target_captions
        if config.captions == "imagenet_templates":
            from dede_ray.runtime.libraries import open_clip

            return [template(_target_name(backdoor, classes)) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        if config.captions == "templates":
            if classes is None or not classes.templates:
                raise Mistake(
                    "the shards have captions, but no classes.json beside them names the target class; set "
                    "target_captions"
                )
            return class_captions(classes.templates, _target_name(backdoor, classes))
        name = _target_name(backdoor, classes)
        usable = survey.filter(survey["is_usable"])["caption"].to_pylist()
        found = sorted({caption for caption in usable if _contains(caption, name)})
        if not found:
            raise Mistake(f"no caption of the shards contains {name!r}; set target_captions, or captions: templates")
        return found

    return [lru_cache(1)(partial(listed, backdoor)) for backdoor in config.backdoors]


def _target_name(backdoor: Backdoor, classes: Classes | None) -> str:
    if backdoor.target_name:
        return backdoor.target_name
    if classes is None:
        raise Mistake(f"no classes.json beside the shards names class {backdoor.target_label}; set target_name")
    return classes.names[backdoor.target_label]


@dataclass
class _Change:
    """The change at one place of a shard; None leaves the member as it is."""

    label: int | None = None
    caption: str | None = None
    backdoor: int | None = None  # to stamp on the image
    is_dropped: bool = False
    added: list[Sample] = field(default_factory=list)  # samples that come after it


_Plans = dict[str, dict[int, _Change]]
"""Changes by shard name and by the sample's place in the shard."""


def _plans(truth: pa.Table, indices: list[int]) -> _Plans:
    """Sort the changes by their places; `indices` are the places in the shards, row by row."""
    plans: _Plans = {}
    names = ("sample_id", "backdoor", "poisoned_label", "poisoned_caption")
    for index, *row in zip(indices, *(truth[name].to_pylist() for name in names), strict=True):
        name, backdoor, label, caption = row
        if backdoor is not None:
            plans.setdefault(_shard_of(name), {})[index] = _Change(label, caption, backdoor)
    return plans


def _repeat(
    survey: pa.Table, num: int, config: PoisonConfig, classes: Classes | None, shards: dict[str, Shard]
) -> tuple[pa.Table, _Plans]:
    """Plan targeted poisoning: `num` copies of the chosen samples behind samples drawn from all."""
    assert config.chosen is not None
    rows = {row["sample_id"]: row for row in survey.to_pylist()}
    twice = {name.rpartition("#")[0] for name, row in rows.items() if row["is_duplicate"]}
    for name in config.chosen:
        if name not in rows or not rows[name]["is_usable"]:
            raise Mistake(f"chosen names {name!r}, which is no usable sample of the shards; expected <shard>/<key>")
        if name in twice:  # without the first one, the second would be a sample
            raise Mistake(f"chosen names {name!r}, but that key is twice in the shard; choose another sample")
    others = [row for name, row in rows.items() if row["is_usable"] and name not in config.chosen]
    if not others:
        raise Mistake("chosen names all usable samples there are; put them among others")
    originals = [(rows[name], _fetch(shards[_shard_of(name)], rows[name]["index"], config)) for name in config.chosen]
    targets = _target_captions(survey, config, classes)

    truth = []
    plans: _Plans = {}
    for name in config.chosen:
        plans.setdefault(_shard_of(name), {})[rows[name]["index"]] = _Change(is_dropped=True)
    for number, behind in enumerate(np.random.default_rng(config.seed).choice(len(others), num)):
        row, original = originals[number % len(originals)]
        shard = _shard_of(others[behind]["sample_id"])
        key = f"{original.key}~{number:05d}"
        new = _row({**row, "sample_id": sample_id(shard, key)}, 0, config, targets)
        truth.append(new)
        content, suffix = _stamped(original.image or b"", original.image_suffix, 0, new["sample_id"], config)
        change = plans.setdefault(shard, {}).setdefault(others[behind]["index"], _Change())
        change.added.append(Sample(key, 0, content, suffix, new.get("poisoned_caption"), new.get("poisoned_label")))
    for name, row in rows.items():
        if row["is_duplicate"]:  # named by its place, which moves
            changes = plans.get(_shard_of(name), {})
            moved = sum(len(c.added) - c.is_dropped for index, c in changes.items() if index < row["index"])
            name = f"{name.rpartition('#')[0]}#{row['index'] + moved}"
        if name not in config.chosen:
            truth.append(_row({**row, "sample_id": name}, None, config, targets))
    return pa.Table.from_pylist(truth, TRUTH_SCHEMA).sort_by("sample_id"), plans


def _shard_of(name: str) -> str:
    return name.partition("/")[0]


def _fetch(shard: Shard, index: int, config: PoisonConfig) -> Sample:
    with open_shard(shard) as stream:
        return next(islice(iter_samples(stream, config.limits), index, None))


def _stamped(content: bytes, suffix: str, number: int, name: str, config: PoisonConfig) -> tuple[bytes, str]:
    """Stamp an encoded image with a backdoor: the new image and its suffix; without a trigger it stays as it is."""
    backdoor = config.backdoors[number]
    if isinstance(backdoor.training_trigger or backdoor.trigger, Nothing) and backdoor.composition is None:
        return content, suffix
    if config.encoding == "png":
        suffix = "png"
    image_HWC = _stamp(decode_image(content, config.limits), backdoor, name)
    return encode_image(image_HWC, suffix, config.jpeg_quality), suffix


def _rewrite(shard: Shard, path: str, changes: dict[int, _Change], config: PoisonConfig, is_complete: bool) -> None:
    """Copy a shard, changing the samples at the places that `changes` names.

    Members are copied, not samples, so that the copy is odd where the original is. Where the data of an incomplete
    shard ends or becomes unreadable, the copy ends.
    """
    unchanged = _Change()
    with open_shard(shard) as stream, _write_tar(Path(path), is_complete) as copy:
        tar = tarfile.open(fileobj=stream, mode="r|*")
        grouping, key, index, change = Grouping(), None, -1, unchanged
        needs_stamp = False
        try:
            for member in tar:
                if not member.isfile():
                    continue
                place = grouping.place(member.name)
                suffix = place.suffix if place else ""
                if place and place.is_first:  # the places of samples, counted as iter_samples counts
                    _add_samples(copy, change.added, config.limits.caption.suffixes[0])
                    key, index = place.key, index + 1
                    change = changes.get(index, unchanged)
                    needs_stamp = change.backdoor is not None
                if place is not None and change.is_dropped:
                    continue
                content = tar.extractfile(member)
                assert content is not None, member.name
                name = member.name
                if needs_stamp and suffix in IMAGE_SUFFIXES:
                    needs_stamp = False  # a sample with several images is none to draw
                    assert change.backdoor is not None
                    assert key is not None
                    identity = sample_id(shard.name, key)
                    image, new_suffix = _stamped(content.read(), suffix, change.backdoor, identity, config)
                    add_member(copy, name[: len(name) - len(suffix)] + new_suffix, image)
                elif suffix in LABEL_SUFFIXES and change.label is not None:
                    add_member(copy, name, str(change.label).encode())
                elif suffix in config.limits.caption.suffixes and change.caption is not None:
                    add_member(copy, name, change.caption.encode())
                else:
                    header = tarfile.TarInfo(name)
                    header.size = member.size
                    copy.addfile(header, content)
        except (tarfile.ReadError, EOFError, OSError) as error:
            if is_complete or (isinstance(error, OSError) and error.errno is not None):
                raise  # not what the survey found: the file has changed, or the disk fails
        _add_samples(copy, change.added, config.limits.caption.suffixes[0])


def _add_samples(tar: tarfile.TarFile, samples: list[Sample], caption_suffix: str) -> None:
    for sample in samples:
        assert sample.image is not None, sample.key
        add_member(tar, f"{sample.key}.{sample.image_suffix}", sample.image)
        if sample.caption is not None:
            add_member(tar, f"{sample.key}.{caption_suffix}", sample.caption.encode())
        if sample.label is not None:
            add_member(tar, f"{sample.key}.cls", str(sample.label).encode())


@contextlib.contextmanager
def _write_tar(path: Path, is_complete: bool) -> Iterator[tarfile.TarFile]:
    """Open a tar for writing, gzipped if its name says so; absent or whole. Without its end if it is not complete."""
    with write_whole(path, path.name.endswith("gz")) as stream:
        tar = tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": MARK})
        yield tar
        if is_complete:
            tar.close()  # writes the end; everything else is written already
