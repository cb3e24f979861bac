"""How good an encoder is while it trains: zero-shot accuracy, retrieval, and what a backdoor does (CA and ASR).

`Measurement` is the frame, for any encoder; `Validator` measures a CLIP, and simclr.py has its own. The driver makes
one: it reads the shards and the classes, so that what does not fit is reported before training begins, and decides
which samples count. Every training worker then calls `run` at the same step. Each takes its share of the images and
captions, embeds as many batches as every other worker does (the last ones padded, because a partitioned model can only
be run by all together), and gets the same numbers back. Ray tasks read and decode ahead of the forward pass. Training
is not disturbed: no random number is drawn and no statistic moves.

Shapes: N samples, E embedding width, C classes, T templates, B batch, L context length.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from torch import nn

from dede_ray.data import images
from dede_ray.data.captions import Classes, class_captions, read_classes
from dede_ray.data.shards import Limits, Shard, list_shards
from dede_ray.models import clip
from dede_ray.poisoning.poison import read_attack
from dede_ray.poisoning.triggers import AnyTrigger
from dede_ray.runtime.config import Config, Mistake, explain, read_json
from dede_ray.runtime.libraries import open_clip
from dede_ray.training import downstream
from dede_ray.training.eval_images import Picture, find_pictures, read_ahead

logger = logging.getLogger(__name__)

CACHE_BYTES = 256 * 2**20  # a worker whose decoded images need no more than this keeps them after the first time
SEED = 0  # draws the samples; the same ones as those of the evaluation's default

Floats = NDArray[np.float32]
SetName = Literal["clean", "triggered", "captioned", "memory"]
"""The sets of images that are embedded."""


class ZeroShot(Config):
    """Classify images by the captions of their classes."""

    shards: str | list[str]
    """Clean shards with labels (.cls), plain .tar files."""
    classes: str | None = None
    """Path of a classes.json, or `imagenet` (the 1,000 names and 80 templates of open_clip); null: the classes.json
    beside the shards."""
    num_samples: int | None = Field(None, gt=0)
    """Images, at most, drawn by their ids; null: all."""


class Retrieval(Config):
    """Find the caption of an image among all captions, and the image of a caption among all images.

    Each image has one caption, that of its .txt. Images that share one word for word are all right answers to it.
    """

    shards: str | list[str]
    """Held-out shards with captions, plain .tar files; they are read as a whole."""
    num_samples: int = Field(5_000, gt=0)
    """Image-caption pairs, at most, drawn by their ids."""


class Backdoor(Config):
    """Stamp the images of `zero_shot`, and count which are taken for the target.

    Set either `poisoned`, or the other two.
    """

    poisoned: str | None = None
    """Folder that jobs/poison.py wrote; its run.json holds trigger and target."""
    trigger: AnyTrigger | None = Field(None, discriminator="kind")
    """The trigger that is stamped."""
    target_label: int | None = Field(None, ge=0)
    """The class that triggered images should be taken for."""

    @model_validator(mode="after")
    def _is_set_once(self) -> Backdoor:
        explicit = [self.trigger is not None, self.target_label is not None]
        if any(explicit) if self.poisoned is not None else not all(explicit):
            raise ValueError("set either `poisoned`, or both `trigger` and `target_label`")
        return self


class ValidationConfig(Config):
    """What to measure of the CLIP while it trains."""

    every: int = Field(500, ge=0)
    """Steps between evaluations; 0: only at the end."""
    batch_size: int = Field(256, ge=1)
    """Images or captions that each worker embeds at once."""
    zero_shot: ZeroShot | None = None
    """Zero-shot accuracy; null: not measured."""
    retrieval: Retrieval | None = None
    """Recall at 1, 5 and 10, both ways; null: not measured."""
    backdoor: Backdoor | None = None
    """Attack success rate on the images of `zero_shot`; null: not measured."""

    @model_validator(mode="after")
    def _has_something_to_measure(self) -> ValidationConfig:
        if self.zero_shot is None and self.retrieval is None:
            raise ValueError("nothing to measure; set zero_shot, retrieval or both")
        if self.backdoor is not None and self.zero_shot is None:
            raise ValueError("backdoor stamps the labelled images of zero_shot; set zero_shot, too")
        return self


class Measurement(ABC):
    """Measures one model in training, again and again, on the same pictures; the part that all models share.

    It is made in the driver, where Ray must be running, and travels to the workers.

    Args:
        pictures: the samples of each set.
        trigger: stamped on those of the set `triggered`.
        image_size: side of the model's input, in pixels.
        normalise: pixels in [0, 1] -> what the model takes.
        batch_size: images that each worker embeds at once.
        limits: bounds on what one sample may cost.
    """

    def __init__(
        self,
        pictures: dict[SetName, list[Picture]],
        trigger: AnyTrigger | None,
        image_size: int,
        normalise: clip.Normalise,
        batch_size: int,
        limits: Limits,
    ):
        self.pictures, self.trigger, self.image_size, self.limits = pictures, trigger, image_size, limits
        self._normalise, self._batch_size = normalise, batch_size
        self._kept_batches: dict[tuple[SetName, int, int], list[_Batch]] = {}
        counts = ", ".join(f"{len(some):,} {name}" for name, some in pictures.items())
        logger.info("validation on %s images", counts)

    @abstractmethod
    def measure(self, crew: Crew) -> dict[str, float]:
        """The measurements that `run` returns, the same on every worker; `embed` and `crew` make that easy."""

    @abstractmethod
    def forward(self, model: Any, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Embed normalised pixels with the model: (B, E)."""

    def run(
        self, model: nn.Module, device: torch.device | str, dtype: torch.dtype, rank: int = 0, world: int = 1
    ) -> dict[str, float]:
        """Measure; all `world` workers must call it together, each with its rank and the same weights.

        With more than one worker torch's default process group must exist. A partitioned model (ZeRO-3) is fine.

        Args:
            model: the model on `device`, in any mode; it is left as it was.
            dtype: of the pixels that the model takes.

        Returns:
            The same on every worker: what `measure` found; validation_unreadable, the number of images that could not
            be decoded and are left out; validation_s, how long it took.

        Raises:
            Mistake: not one image of a kind can be decoded.
        """
        started = time.monotonic()
        crew = Crew(model, torch.device(device), dtype, rank, world)
        with _undisturbed(model, crew.device):
            measured = self.measure(crew)
        # Triggered images were counted as clean ones.
        unreadable = [num for name, num in crew.unreadable.items() if name != "triggered"]
        measured["validation_unreadable"] = float(sum(unreadable))
        if rank == 0 and crew.unreadable:
            listing = ", ".join(f"{num:,} {name}" for name, num in crew.unreadable.items())
            logger.warning("validation leaves out images that cannot be decoded: %s", listing)
        measured["validation_s"] = max(crew.gather_numbers(time.monotonic() - started))
        return measured

    def embed(self, crew: Crew, name: SetName) -> tuple[Floats, NDArray[np.bool_]]:
        """Embed this worker's images: (N, E), and (N,) False where the image cannot be read and the row means nothing.

        Raises:
            Mistake: no worker could read any.
        """
        pictures = self.pictures[name]
        normalise = self._normalise.to(crew.device)
        rows, readable = [], []
        for batch in self._batches(crew, name):
            image_BCHW = normalise(images.to_unit_range(torch.from_numpy(batch.image_BHWC).to(crew.device)))
            rows.append(crew.rows(functools.partial(self.forward, crew.model), image_BCHW.to(crew.dtype)))
            readable.append(batch.readable_B)
        num_mine = len(crew.share(len(pictures)))
        readable_N = np.concatenate(readable)[:num_mine]
        (num_readable,) = crew.sums(int(readable_N.sum()))
        if num_readable < len(pictures):
            crew.unreadable[name] = len(pictures) - num_readable
        if num_readable == 0:
            raise Mistake(
                f"not one of the {len(pictures):,} {name} images for validation can be decoded, such as "
                f"{pictures[0].sample_id}; score their shards to see the reasons"
            )
        return np.concatenate(rows)[:num_mine], readable_N

    def _batches(self, crew: Crew, name: SetName) -> Iterator[_Batch]:
        """This worker's images, in batches of equal size and number on every worker; the rest is black."""
        key = (name, crew.rank, crew.world)
        if key in self._kept_batches:
            yield from self._kept_batches[key]
            return
        pictures = self.pictures[name]
        mine, most = crew.share(len(pictures)), crew.largest_share(len(pictures))
        width = min(self._batch_size, most)
        trigger = self.trigger if name == "triggered" else None
        images = read_ahead(pictures[mine.start : mine.stop], self.image_size, self.limits, trigger)
        num_bytes = 3 * self.image_size**2 * sum(crew.largest_share(len(some)) for some in self.pictures.values())
        kept = []
        for _ in range(0, most, width):
            batch = _Batch(np.zeros((width, self.image_size, self.image_size, 3), np.uint8), np.zeros(width, bool))
            for row, image_HWC in enumerate(itertools.islice(images, width)):
                if image_HWC is not None:
                    batch.image_BHWC[row], batch.readable_B[row] = image_HWC, True
            yield batch
            if num_bytes <= CACHE_BYTES:
                kept.append(batch)
        if kept:
            self._kept_batches[key] = kept


@dataclass(frozen=True)
class _Batch:
    """Images as they are, and which of them are images at all; the others are black."""

    image_BHWC: NDArray[np.uint8]
    readable_B: NDArray[np.bool_]


class Validator(Measurement):
    """Measures a CLIP.

    Its `run` returns zero_shot_top1 and zero_shot_top5; clean_accuracy (which is the former) and attack_success_rate;
    image_to_text_r1, _r5, _r10 and text_to_image_r1, _r5, _r10, all in [0, 1]; only what the settings ask for.

    Args:
        config: what to measure.
        described: the model's description (models/clip.py).
        limits: bounds on what one sample may cost.

    Raises:
        Mistake: shards without labels or captions, classes that do not fit them, a target that is no class, or a
            trigger that does not fit the images.
    """

    def __init__(self, config: ValidationConfig, described: dict[str, Any], limits: Limits):
        self.config, self.described = config, described
        pictures: dict[SetName, list[Picture]] = {}
        trigger = None
        if config.zero_shot is not None:
            shards = list_shards(config.zero_shot.shards)
            labelled = find_pictures(shards, "label", config.zero_shot.num_samples, SEED, limits)
            self._classes = _read_classes(config.zero_shot, shards)
            _check_labels(labelled, self._classes, config.zero_shot)
            pictures["clean"] = labelled
            if config.backdoor is not None:
                trigger, self._target, pictures["triggered"] = to_be_stamped(
                    config.backdoor, labelled, len(self._classes.names)
                )
        if config.retrieval is not None:
            shards = list_shards(config.retrieval.shards)
            captioned = find_pictures(shards, "caption", config.retrieval.num_samples, SEED, limits)
            pictures["captioned"] = captioned
        self._kept_tokens: dict[tuple[str, int, int], torch.Tensor] = {}
        size, normalise = clip.image_size_px(described), clip.normaliser(described)
        super().__init__(pictures, trigger, size, normalise, config.batch_size, limits)

    def measure(self, crew: Crew) -> dict[str, float]:
        return {**self._classification(crew), **self._retrieval(crew)}

    def forward(self, model: Any, image_BCHW: torch.Tensor) -> torch.Tensor:
        return model.encode_image(image_BCHW)

    def _classification(self, crew: Crew) -> dict[str, float]:
        if self.config.zero_shot is None:
            return {}
        text_CE = self._class_embeddings(crew)
        top1, top5 = self._hits(crew, "clean", text_CE, (1, 5))
        measured = {"zero_shot_top1": top1, "zero_shot_top5": top5}
        if self.trigger is not None:
            (success,) = self._hits(crew, "triggered", text_CE, (1,))
            measured |= {"clean_accuracy": top1, "attack_success_rate": success}
        return measured

    def _class_embeddings(self, crew: Crew) -> Floats:
        """Each worker embeds all captions of its classes, so that the sums do not depend on the number of workers."""
        names, templates = self._classes.names, self._classes.templates
        captions = [text for i in crew.share(len(names)) for text in class_captions(templates, names[i])]
        caption_NE = self._embed_captions(crew, "classes", captions, crew.largest_share(len(names)) * len(templates))
        return crew.gather(downstream.class_embeddings(caption_NE, len(templates)), len(names))

    def _hits(self, crew: Crew, name: SetName, text_CE: Floats, tops: tuple[int, ...]) -> list[float]:
        """Share of the images whose class, or whose target, is among the first so many; a rate for each of `tops`."""
        image_NE, readable_N = self.embed(crew, name)
        mine = [self.pictures[name][i] for i in crew.share(len(self.pictures[name]))]
        wanted = [self._target if name == "triggered" else one.label for one in mine]
        place_N = _place_of_class(image_NE @ text_CE.T, np.array(wanted, np.int64))[readable_N]
        num, *hits = crew.sums(len(place_N), *(int((place_N < top).sum()) for top in tops))
        return [count / num for count in hits]

    def _retrieval(self, crew: Crew) -> dict[str, float]:
        if self.config.retrieval is None:
            return {}
        pictures = self.pictures["captioned"]
        captions = [one.caption or "" for one in pictures]
        image_NE, readable_N = self.embed(crew, "captioned")
        mine = [captions[i] for i in crew.share(len(captions))]
        text_NE = self._embed_captions(crew, "captions", mine, crew.largest_share(len(captions)))
        readable_N = crew.gather(readable_N[:, None].astype(np.float32), len(pictures))[:, 0] > 0
        image_NE, text_NE = (
            downstream.unit(crew.gather(rows, len(pictures)))[readable_N] for rows in (image_NE, text_NE)
        )
        same_caption_N = np.unique([text.strip() for text in captions], return_inverse=True)[1][readable_N]
        rows = crew.share(len(image_NE))
        measured: dict[str, float] = {}
        for way, query_NE, found_NE in (("image_to_text", image_NE, text_NE), ("text_to_image", text_NE, image_NE)):
            rank_N = retrieval_ranks(query_NE, found_NE, same_caption_N, rows)
            hits = crew.sums(*(int((rank_N < k).sum()) for k in (1, 5, 10)))
            measured |= {f"{way}_r{k}": count / len(image_NE) for k, count in zip((1, 5, 10), hits, strict=True)}
        return measured

    def _embed_captions(self, crew: Crew, name: str, captions: list[str], largest_share: int) -> Floats:
        """Embed this worker's captions, in as many batches as the worker with the `largest_share` needs."""
        width = min(self.config.batch_size, largest_share)
        num_batches = -(-largest_share // width)
        key = (name, crew.rank, crew.world)
        if key not in self._kept_tokens:
            padding = [""] * (num_batches * width - len(captions))
            self._kept_tokens[key] = clip.tokenizer(self.described)([*captions, *padding])
        rows = [crew.rows(crew.model.encode_text, tokens_BL) for tokens_BL in self._kept_tokens[key].split(width)]
        return np.concatenate(rows)[: len(captions)]


# ------------------------------------------------------------------------------------------ workers, together


@dataclass
class Crew:
    """One worker among all that measure together: its part of the samples, and how the parts come together."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    rank: int
    world: int
    unreadable: dict[str, int] = field(default_factory=dict)

    def share(self, num: int) -> range:
        """Which of `num` things are this worker's; the shares differ by one at most."""
        return self._share_of(self.rank, num)

    def _share_of(self, rank: int, num: int) -> range:
        return range(num * rank // self.world, num * (rank + 1) // self.world)

    def largest_share(self, num: int) -> int:
        return -(-num // self.world)

    def rows(self, tower: Any, batch: torch.Tensor) -> Floats:
        return tower(batch.to(self.device)).float().cpu().numpy()

    def gather(self, mine_NE: Floats, num: int) -> Floats:
        """All workers' shares of `num` rows, in order."""
        if self.world == 1:
            return mine_NE
        padded = torch.zeros(self.largest_share(num), mine_NE.shape[1], dtype=torch.float32, device=self.device)
        padded[: len(mine_NE)] = torch.from_numpy(mine_NE)
        everyone = [torch.empty_like(padded) for _ in range(self.world)]
        torch.distributed.all_gather(everyone, padded)
        shares = [rows[: len(self._share_of(rank, num))] for rank, rows in enumerate(everyone)]
        return torch.cat(shares).cpu().numpy()

    def gather_numbers(self, *numbers: float) -> list[float]:
        """Every worker's numbers, one worker after the other."""
        if self.world == 1:
            return [*numbers]
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        torch.distributed.all_gather(everyone, mine)
        return torch.cat(everyone).tolist()

    def sums(self, *counts: int) -> list[int]:
        everyone = np.array(self.gather_numbers(*counts)).reshape(self.world, len(counts))
        return [round(total) for total in everyone.sum(axis=0)]


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in its former mode, and so is chance."""
    modes = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), _whole(model):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _whole(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Fetch the parameters that no module's own forward fetches, where ZeRO-3 has partitioned them."""
    partitioned = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


# ---------------------------------------------------------------------------------------------------- numbers


def _place_of_class(score_NC: Floats, label_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of classes that come before the wanted one; the first of equals comes first, as with argmax.

    A score that is not a number comes before any: a model that has lost its way has no accuracy.
    """
    own_N1 = np.take_along_axis(score_NC, label_N[:, None], axis=1)
    comes_later_NC = np.arange(score_NC.shape[1]) >= label_N[:, None]
    behind_NC = (score_NC < own_N1) | ((score_NC == own_N1) & comes_later_NC)
    return (~behind_NC).sum(axis=1)


def retrieval_ranks(
    query_NE: Floats, found_NE: Floats, group_N: NDArray[np.int64], rows: range, block: int = 256
) -> NDArray[np.int64]:
    """Rank of the best right answer to some of the queries: 0 is best, and recall at k is the share of ranks below k.

    Ties count against the model: the rank is the number of wrong answers that are as close as the best right one, or
    closer. Cosines less than 1e-6 apart are a tie, as that is float32's noise.

    Args:
        query_NE, found_NE: embeddings of length one; row i of the one belongs to row i of the other.
        group_N: right answers to query i are those of its own group.
        rows: the queries asked.
        block: how many are compared at once, with all N answers.

    Returns:
        int (len(rows),).
    """
    ranks = [np.empty(0, np.int64)]
    for start in range(0, len(rows), block):
        some = rows[start : start + block]
        cosine_BN = query_NE[some.start : some.stop] @ found_NE.T
        right_BN = group_N[some.start : some.stop, None] == group_N
        best_B1 = np.where(right_BN, cosine_BN, -np.inf).max(axis=1, keepdims=True)
        # Not "at least as close": a cosine that is not a number must count against the model, too.
        ranks.append((~(cosine_BN < best_B1 - 1e-6) & ~right_BN).sum(axis=1))
    return np.concatenate(ranks)


# ------------------------------------------------------------------------------------- what is to be measured


def _read_classes(config: ZeroShot, shards: Sequence[Shard]) -> Classes:
    if config.classes == "imagenet":
        templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        return Classes(names=list(open_clip.IMAGENET_CLASSNAMES), templates=templates)
    if config.classes is None:
        classes, where = read_classes(shards), "classes.json beside the shards"
        if classes is None:
            raise Mistake(
                f"no classes.json beside {shards[0].url}; name one in validation.zero_shot.classes, or say imagenet"
            )
    else:
        where = config.classes
        try:
            classes = Classes.model_validate(read_json(config.classes, "classes.json"))
        except ValidationError as error:
            raise Mistake(f"{where} does not describe classes:\n{explain(error, Classes)}") from None
    if not classes.names or not classes.templates:
        raise Mistake(f"{where} needs at least one name and one template; zero-shot makes its captions of them")
    return classes


def _check_labels(pictures: list[Picture], classes: Classes, config: ZeroShot) -> None:
    wrong = [picture for picture in pictures if not 0 <= (picture.label or 0) < len(classes.names)]
    if wrong:
        raise Mistake(
            f"{len(wrong):,} of {len(pictures):,} labels in validation.zero_shot.shards are no class, such as "
            f"{wrong[0].label} of {wrong[0].sample_id}: {config.classes or 'classes.json'} names classes 0 to "
            f"{len(classes.names) - 1}; name the classes of these shards in validation.zero_shot.classes"
        )


def to_be_stamped(
    backdoor: Backdoor, pictures: list[Picture], num_classes: int
) -> tuple[AnyTrigger, int, list[Picture]]:
    """Trigger and target of a backdoor, and the labelled pictures that are to be stamped: those of other classes.

    Raises:
        Mistake: a target that is no class, no pictures of other classes, or a trigger that does not fit them.
    """
    if backdoor.poisoned is not None:
        attack = read_attack(backdoor.poisoned)
        trigger, target = attack.trigger, attack.target_label
    else:
        assert backdoor.trigger is not None
        assert backdoor.target_label is not None
        trigger, target = backdoor.trigger, backdoor.target_label
    if target >= num_classes:
        raise Mistake(f"the backdoor's target_label is {target}, but the classes are 0 to {num_classes - 1}")
    others = [picture for picture in pictures if picture.label != target]
    _check_trigger(trigger, others, target)
    return trigger, target, others


def _check_trigger(trigger: AnyTrigger, pictures: list[Picture], target: int) -> None:
    """Stamp an empty image of the smallest size: a trigger too large for it is a mistake before work begins."""
    if not pictures:
        raise Mistake(
            f"all labelled images are of class {target}, the backdoor's target; name shards with images "
            "of other classes"
        )
    sized = [picture for picture in pictures if picture.size_px is not None]
    if sized:
        smallest = min(sized, key=lambda picture: min(picture.size_px or ()))
        assert smallest.size_px is not None
        width, height = smallest.size_px
        trigger.stamp(np.zeros((height, width, 3), np.uint8), smallest.sample_id)
