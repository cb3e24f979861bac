"""DECREE: search for the smallest stamp that makes all images look alike to an encoder; a small one means a backdoor.

Feng et al., "Detecting Backdoors in Pre-trained Encoders", CVPR 2023. Only triggers like patches are in its scope. It
judges an encoder, not samples; `invert` and `decide` are that. `Decree`, the detector, turns the stamp it found into
scores of samples. `run` is jobs/decree.py, one inversion per encoder and seed:

    <output>/<encoder>/seed_<n>/stamp.safetensors   mask, patch, and the direction of stamped embeddings
    <output>/<encoder>/seed_<n>/metrics.jsonl       cosine, norm and weight of every step
    <output>/<encoder>/seed_<n>/time.json           seconds it took
    <output>/<encoder>/seed_<n>/stamp.json          written last: this inversion has been made
    <output>/<encoder>/stamp.{json,safetensors}     the smallest over the seeds
    <output>/<encoder>/stamp.png                    its mask, the mask times the patch, an image before and after
    <output>/decree.json                            one row per encoder

Shapes: B samples, N shadow images, H, W image, C = 3 channels, E embedding width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import ray
import torch
from pydantic import Field, field_validator
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from dede_ray.data.images import encode_image, square, to_unit_range
from dede_ray.data.sampling import draw
from dede_ray.data.shards import BadSample, Limits, Shard, iter_chunks, list_shards, sample_id
from dede_ray.detectors.contract import DetectorSettings, Scorer, State, as_scores, state_fingerprint
from dede_ray.models.embedding import Batch, Need
from dede_ray.models.victims import Victim, VictimConfig, best_device, load_victim
from dede_ray.models.weights import read_tensors
from dede_ray.runtime.config import Config, Mistake, Seeds, claim, finish, read_json, write_atomically, write_json
from dede_ray.runtime.session import start_ray

logger = logging.getLogger(__name__)

EPSILON = 1e-7  # keeps arctanh finite
COLLAPSED = 0.99  # mean cosine of stamped images above which they look alike
LARGEST_SMALL_PX = 64  # the publication has settings for encoders of 32 px, and for those of 224 px

Word = Literal["backdoored", "clean", "no small collapsing stamp found"]


# ------------------------------------------------------------------------------------------------- the search


class Inversion(Config):
    """How the stamp is searched for; null takes the publication's number for encoders of this image size.

    Up to 64 px these are those for CIFAR-10 and STL-10, above those for 224 px.
    """

    epochs: int = Field(1000, ge=1)
    """Over the shadow images, at most."""
    batch_size: int = Field(128, ge=2)
    """The publication takes 32 for CLIP."""
    learning_rates: tuple[float, float, float] = (0.5, 0.1, 0.05)
    """Learning rates of Adam: at first, and after each of the two epochs below."""
    drops: tuple[int, int] | None = None
    """Epochs at which the learning rate falls: 30 and 50, or 200 and 500."""
    min_weight: float | None = Field(None, gt=0)
    """The weight of the stamp's size falls no more once it is below: 1e-5, or 1e-7."""
    patience: int | None = Field(None, ge=0)
    """Steps without a smaller stamp before it stops early: 10, or 35."""

    def of_size(self, image_px: int) -> Inversion:
        """These settings, with the numbers for an image size where none are given."""
        is_small = image_px <= LARGEST_SMALL_PX
        family = {
            "drops": (30, 50) if is_small else (200, 500),
            "min_weight": 1e-5 if is_small else 1e-7,
            "patience": 10 if is_small else 35,
        }
        return self.model_copy(update={name: value for name, value in family.items() if getattr(self, name) is None})


class SizeWeight:
    """What the size of the stamp weighs against the cosine: more while images collapse, less while they do not.

    Six successes in a row multiply it by 5, six failures divide it by 5; the count then starts anew. Once below its
    least it stays there until eleven successes in a row bring it back to where it began.

    The publication lets the last two rules overlap: its growth would always come before its return. Ours waits.
    """

    START, FACTOR, MOST = 1e-3, 5.0, 1e5

    def __init__(self, least: float):
        self.value, self.least = self.START, least
        self.successes = self.failures = 0

    def update(self, is_success: bool) -> None:
        """Count a step."""
        self.successes = self.successes + 1 if is_success else 0
        self.failures = 0 if is_success else self.failures + 1
        if self.value < self.least:
            if self.successes > 10:
                self.value, self.successes = self.START, 0
        elif self.successes > 5:
            self.value, self.successes = min(self.value * self.FACTOR, self.MOST), 0
        elif self.failures > 5:
            self.value, self.failures = self.value / self.FACTOR, 0


@dataclass(frozen=True, eq=False)
class InvertedStamp:
    """The smallest stamp under which an encoder's images collapsed; where they never did, the one that came closest."""

    mask_HW: Tensor
    """float32 in [0, 1]: how much of the patch covers each pixel, the same in all channels."""
    patch_CHW: Tensor
    """float32 in [0, 1]."""
    direction_E: Tensor
    """float32: the mean of the stamped shadow images' embeddings of length one."""
    is_collapsing: bool
    """Whether success was ever reached."""
    norm: float
    """R*: the mask summed over pixels and channels."""
    cosine: float
    """C: mean cosine of two stamped images, in the batch where it was found."""
    cosine_of_all: float
    """Mean cosine over all shadow images."""
    cosine_before: float
    """Mean cosine of all shadow images without the stamp."""
    num_steps: int
    seed: int
    victim: str
    """Fingerprint of the encoder."""
    images: str
    """SHA-256 of the shadow images."""
    trace: Sequence[dict[str, float]] = ()
    """Cosine, norm and weight of every step."""

    @property
    def pl1(self) -> float:
        """R* as a share of what the whole image would be; 1 where success was never reached."""
        return self.norm / (3 * self.mask_HW.numel()) if self.is_collapsing else 1.0

    def stamp(self, image_BCHW: Tensor) -> Tensor:
        """Stamp images in [0, 1], on their device."""
        mask_HW, patch_CHW = self.mask_HW.to(image_BCHW.device), self.patch_CHW.to(image_BCHW.device)
        return _stamped(image_BCHW, mask_HW, patch_CHW)


def invert(victim: Victim, image_NHWC: np.ndarray, inversion: Inversion, seed: int) -> InvertedStamp:
    """Search for the smallest stamp under which an encoder's embeddings collapse.

    Mask and patch are tanh of free float64 parameters; the loss is -C + weight * R. Equal arguments give equal stamps
    on one kind of machine.

    Args:
        victim: the encoder, on the device to work on.
        image_NHWC: shadow images, uint8, at the victim's size; two or more.
        inversion: the search.
        seed: of the first mask and patch, and of the order of images.

    Raises:
        Mistake: too few images, or an encoder that gives no numbers.

    Source: Feng et al., CVPR 2023, sections 4 and 5, and their published constants.
    """
    num, size, device = len(image_NHWC), victim.image_size, victim.device
    assert (image_NHWC.dtype, image_NHWC.shape[1:]) == (np.uint8, (size, size, 3)), image_NHWC.shape
    if num < 2:
        raise Mistake(f"{num} shadow images; the search compares two or more, the publication 1,000: name more shards")
    inversion = inversion.of_size(size)
    assert inversion.drops is not None
    assert inversion.min_weight is not None
    assert inversion.patience is not None
    image_NHWC_t, generator = torch.from_numpy(image_NHWC), torch.Generator().manual_seed(seed)
    raw_mask_HW, raw_patch_CHW = (
        _to_raw(torch.rand(shape, generator=generator, dtype=torch.float64)).to(device).requires_grad_()
        for shape in ((size, size), (3, size, size))
    )
    optimiser = torch.optim.Adam([raw_mask_HW, raw_patch_CHW], inversion.learning_rates[0], betas=(0.5, 0.9))
    weight, trace = SizeWeight(inversion.min_weight), list[dict[str, float]]()
    best: _Step | None = None
    for epoch in range(inversion.epochs):
        for group in optimiser.param_groups:
            group["lr"] = inversion.learning_rates[sum(epoch >= drop for drop in inversion.drops)]
        cosines = []
        for rows in torch.randperm(num, generator=generator).split(inversion.batch_size):
            if len(rows) < 2:
                continue
            mask_HW, patch_CHW = _from_raw(raw_mask_HW), _from_raw(raw_patch_CHW)
            image_BCHW = to_unit_range(image_NHWC_t[rows].to(device))
            with torch.enable_grad():
                embedding_BE = victim.embed_with_gradient(_stamped(image_BCHW, mask_HW.float(), patch_CHW.float()))
                mean_cosine, size_of_mask = mean_other_cosine(embedding_BE), 3 * mask_HW.abs().sum()
                loss = -mean_cosine + weight.value * size_of_mask
            cosine, norm = float(mean_cosine.detach()), float(size_of_mask.detach())
            if not np.isfinite(cosine):
                raise Mistake(f"victim {victim.name} gives NaN or infinity for stamped images; examine its weights")
            is_success = cosine > COLLAPSED  # not of |C|, which two opposite images would reach
            trace.append({"cosine": cosine, "norm": norm, "weight": weight.value})
            cosines.append(cosine)
            here = _Step(len(trace), is_success, norm, cosine, mask_HW.detach().float(), patch_CHW.detach().float())
            best = here if best is None or here.rank > best.rank else best
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            weight.update(is_success)
        assert best is not None
        if np.mean(cosines) > COLLAPSED and best.is_success and len(trace) - best.number > inversion.patience:
            break
    assert best is not None
    _, cosine_before = _direction(victim, image_NHWC_t, None)
    direction_E, cosine_of_all = _direction(victim, image_NHWC_t, (best.mask_HW, best.patch_CHW))
    return InvertedStamp(
        best.mask_HW.cpu(), best.patch_CHW.cpu(), direction_E.cpu(), best.is_success, best.norm, best.cosine,
        cosine_of_all, cosine_before, len(trace), seed, victim.fingerprint,
        hashlib.sha256(image_NHWC.tobytes()).hexdigest(), trace,
    )  # fmt: skip


class _Step(NamedTuple):
    number: int
    is_success: bool
    norm: float
    cosine: float
    mask_HW: Tensor
    patch_CHW: Tensor

    @property
    def rank(self) -> tuple[bool, float]:
        """The smallest that collapses is best; where none does, the one that came closest."""
        return self.is_success, -self.norm if self.is_success else self.cosine


def mean_other_cosine(embedding_BE: Tensor) -> Tensor:
    """C: mean cosine of two different rows, the off-diagonal of the matrix of all cosines, without making that."""
    unit_BE = normalize(embedding_BE.double(), dim=1)
    return (unit_BE.sum(dim=0).square().sum() - unit_BE.square().sum()) / (len(unit_BE) * (len(unit_BE) - 1))


def _to_raw(share: Tensor) -> Tensor:
    return torch.atanh((share - 0.5) * (2 - EPSILON))


def _from_raw(raw: Tensor) -> Tensor:
    return (torch.tanh(raw) / (2 - EPSILON) + 0.5).clamp(0, 1)


def _stamped(image_BCHW: Tensor, mask_HW: Tensor, patch_CHW: Tensor) -> Tensor:
    """Cover images in [0, 1]; what the publication does in 0..255, divided by 255."""
    return ((1 - mask_HW) * image_BCHW + mask_HW * patch_CHW).clamp(0, 1)


@torch.inference_mode()
def _direction(victim: Victim, image_NHWC: Tensor, stamp: tuple[Tensor, Tensor] | None) -> tuple[Tensor, float]:
    """The mean (E,) of the images' embeddings of length one, and the mean cosine of two of them."""
    parts = []
    for image_BHWC in image_NHWC.split(256):
        image_BCHW = to_unit_range(image_BHWC.to(victim.device))
        parts.append(victim(_stamped(image_BCHW, *stamp) if stamp else image_BCHW))
    embedding_NE = torch.cat(parts)
    mean_E = normalize(embedding_NE.double(), dim=1).mean(dim=0)
    return mean_E.float(), float(mean_other_cosine(embedding_NE))


# ------------------------------------------------------------------------------------------------- the decision


@dataclass(frozen=True)
class StampVerdict:
    """What a stamp says about its encoder."""

    word: Word
    """By the published threshold of PL1; `clean` promises nothing about triggers that are no patches."""
    anomaly_index: float | None
    """How far R* lies below the bank's median, in its scaled median absolute deviations."""
    is_outlier: bool | None
    """Whether that is above 2; None without a bank."""


def decide(
    stamp: InvertedStamp, bank_norms: Sequence[float] = (), threshold: float = 0.1, most_index: float = 2.0
) -> StampVerdict:
    """Judge an encoder by its smallest stamp.

    Args:
        stamp: what was found.
        bank_norms: R* of encoders of the same family that are known to be clean, found with the same settings: the
            published threshold does not hold for every family. Three or more.
        threshold: of PL1; the publication's.
        most_index: of the anomaly index; the usual one (Hampel; Wang et al., Neural Cleanse, S&P 2019).

    Raises:
        Mistake: a bank of one or two.
    """
    word: Word = "clean" if stamp.pl1 >= threshold else "backdoored"
    word = word if stamp.is_collapsing else "no small collapsing stamp found"
    if not bank_norms:
        return StampVerdict(word, None, None)
    if len(bank_norms) < 3:
        raise Mistake(f"a bank of {len(bank_norms)} clean encoders has no spread; give three or more, or none")
    median = float(np.median(bank_norms))
    spread = 1.4826 * float(np.median(np.abs(np.asarray(bank_norms) - median)))  # the deviation of a normal law
    norm = stamp.pl1 * 3 * stamp.mask_HW.numel()
    index = (median - norm) / max(spread, 1e-9 * median)
    return StampVerdict(word, index, index > most_index)


# ---------------------------------------------------------------------------------------------- stamps as files


def save_stamp(folder: str | Path, stamp: InvertedStamp) -> None:
    """Write `stamp.safetensors`, then `stamp.json`: tensors and numbers, nothing executable."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"mask": stamp.mask_HW, "patch": stamp.patch_CHW, "direction": stamp.direction_E}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ".stamp.safetensors")
    (folder / ".stamp.safetensors").replace(folder / "stamp.safetensors")
    numbers = {name: getattr(stamp, name) for name in _NUMBERS}
    write_json(folder / "stamp.json", {**numbers, "pl1": stamp.pl1})


_NUMBERS = {
    "victim": str, "images": str, "seed": int, "is_collapsing": bool, "norm": float, "cosine": float,
    "cosine_of_all": float, "cosine_before": float, "num_steps": int,
}  # fmt: skip


def load_stamp(folder: str | Path) -> InvertedStamp:
    """Read what `save_stamp` wrote, without the trace.

    Raises:
        Mistake: nothing there, not ours, or damaged.
    """
    folder = Path(folder)
    content = read_json(folder / "stamp.json", "inverted stamp (stamp.json)")
    tensors = read_tensors(folder / "stamp.safetensors")
    try:
        numbers: dict[str, Any] = {name: kind(content[name]) for name, kind in _NUMBERS.items()}
        mask_HW, patch_CHW, direction_E = (tensors[name] for name in ("mask", "patch", "direction"))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Mistake(f"{folder} holds no inverted stamp: {error!r}; name a folder that jobs/decree.py wrote") from None
    is_whole = mask_HW.ndim == 2 and patch_CHW.shape == (3, *mask_HW.shape) and direction_E.ndim == 1
    for name, tensor in tensors.items():
        is_share = name == "direction" or bool(((tensor >= 0) & (tensor <= 1)).all())
        is_whole &= tensor.dtype == torch.float32 and bool(torch.isfinite(tensor).all()) and is_share
    if not is_whole:
        raise Mistake(f"{folder / 'stamp.safetensors'} is damaged: no mask, patch and direction; invert it again")
    return InvertedStamp(mask_HW, patch_CHW, direction_E, **numbers)


# -------------------------------------------------------------------------------------------------- the detector


class Decree(DetectorSettings):
    """How close a sample is to the stamp that was inverted from the victim.

    `decree_stamp` is minus the distance of image and patch under the mask, as the root of the mean square in [0, 1]
    pixels: closer is more suspicious. (DeDe's paper compares itself with this; its AUROCs below one half show that it
    scored the opposite.) `decree_direction`, ours, is the cosine of the embedding with the mean embedding of stamped
    images: a sample that carries the trigger lies there, and it costs nothing once embeddings exist.
    `decree_displacement`, ours, is minus how far the stamp moves the embedding: a triggered image is there already.

    All three trust that the stamp leads where the trigger does. Nothing promises that: an encoder may have stamps to
    several places, and the smallest that was found need not be the attacker's. Then the columns mean nothing, or the
    opposite. The folder of another seed may hold a stamp to another place.

    Source: Feng et al., CVPR 2023; Hou et al., arXiv:2411.16154, for the first column.
    """

    kind: Literal["decree"] = "decree"
    needs: ClassVar[frozenset[Need]] = frozenset({"image"})
    stamp: str
    """Folder of one encoder, or of one of its seeds, in the output of jobs/decree.py."""
    displacement: bool = False
    """Give `decree_displacement`, too, for one more forward pass."""

    @property
    def gives(self) -> tuple[str, ...]:
        more = ("decree_displacement",) if self.displacement else ()
        return ("decree_stamp", "decree_direction", *more)

    def open(self, victim: Victim, state: State) -> Scorer:
        return _DecreeScorer(self, victim)

    def located(self) -> Decree:
        """The same with an absolute path, for Ray's workers, whose working folder may be another."""
        return self.model_copy(update={"stamp": str(Path(self.stamp).absolute())})


class _DecreeScorer:
    controls: tuple[str, ...] = ()

    def __init__(self, config: Decree, victim: Victim):
        stamp = load_stamp(config.stamp)
        if stamp.victim != victim.fingerprint:
            raise Mistake(
                f"the stamp at {config.stamp} was inverted from another victim (fingerprint {stamp.victim[:12]}) than "
                f"{victim.name} ({victim.fingerprint[:12]}), so closeness to it would mean nothing; run jobs/decree.py "
                "on this victim"
            )
        sides, width = (victim.image_size, victim.image_size), victim.embedding_dim
        if stamp.mask_HW.shape != sides or len(stamp.direction_E) != width or not stamp.mask_HW.any():
            raise Mistake(f"the stamp at {config.stamp} is damaged: it does not fit its victim; invert it again")
        if not stamp.is_collapsing:
            logger.warning("the stamp at %s never collapsed %s; it is the closest one", config.stamp, victim.name)
        tensors = {"mask": stamp.mask_HW, "patch": stamp.patch_CHW, "direction": stamp.direction_E}
        self.fingerprint = state_fingerprint(config.model_copy(update={"stamp": ""}), tensors)
        self.inverted, self.victim = stamp, victim
        self.mask_HW = stamp.mask_HW.to(victim.device).double()
        self.patch_CHW = stamp.patch_CHW.to(victim.device).double()
        self.direction_E = normalize(stamp.direction_E.to(victim.device).double(), dim=0)
        self.shows_displacement = config.displacement
        self.columns = config.gives

    @torch.inference_mode()
    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        square_BCHW = self.mask_HW * (batch.images - self.patch_CHW).square()  # float64, as patch and mask are
        distance_B = (square_BCHW.sum(dim=(1, 2, 3)) / (3 * self.mask_HW.sum())).sqrt()
        cosine_B = (normalize(batch.embedding_BE.double(), dim=1) * self.direction_E).sum(dim=1)
        scores = {"decree_stamp": -distance_B, "decree_direction": cosine_B}
        if self.shows_displacement:
            moved_BE = self.victim(self.inverted.stamp(batch.images)) - batch.embedding_BE
            scores["decree_displacement"] = -moved_BE.norm(dim=1)
        return as_scores(scores)


# ------------------------------------------------------------------------------------------------------- the job


class InversionResources(Config):
    """What one inversion occupies; so many run side by side as the cluster has room for."""

    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    """A share of one lets several inversions use the same GPU."""


class DecreeConfig(Config):
    """Settings of jobs/decree.py."""

    victims: list[VictimConfig] = Field(min_length=1)
    """The encoders to judge."""
    bank: list[VictimConfig] = Field([])
    """Encoders of the same family that are known to be clean, three or more, for a test that knows what is usual."""
    shards: str | list[str]
    """Shadow images, clean ones; labels are not needed."""
    output: str
    num_images: int = Field(1000, ge=2)
    """Shadow images to draw, at most. The publication takes 1,000 of CIFAR-10 or STL-10, or 10,000 of ImageNet."""
    seeds: Seeds = Field([0])
    """One inversion each; an encoder is judged by the smallest stamp of all."""
    images_seed: int = Field(0, ge=0)
    """Draws the shadow images, the same for all."""
    threshold: float = Field(0.1, gt=0, le=1)
    """PL1 below which an encoder is called backdoored; the publication's."""
    inversion: Inversion = Inversion()
    limits: Limits = Limits()
    resources: InversionResources = InversionResources()

    @field_validator("bank")
    @classmethod
    def _has_a_spread(cls, bank: list[VictimConfig]) -> list[VictimConfig]:
        if len(bank) in (1, 2):
            raise ValueError("one or two encoders have no spread; name three or more, or none")
        return bank


def run(config: DecreeConfig) -> str:
    """Invert a stamp for every encoder and seed, as Ray tasks, and judge the encoders.

    Finished inversions are kept. One unusable encoder does not stop the others.

    Returns:
        A table, one row per encoder.

    Raises:
        Mistake: weights or images that cannot be used, or other ones than those that the output folder was made with.
    """
    start_ray(config)
    output = Path(config.output).absolute()  # Ray's workers have another working folder
    shards = list_shards(config.shards)
    if done := claim(output, config):
        return done["table"]
    drawn = _draw_images(shards, config)
    if len(drawn) < 2:
        raise Mistake(f"{len(drawn)} images in {len(shards)} shards; the search compares two or more, name more shards")
    images = ray.put(drawn)
    names = _folder_names([*config.victims, *config.bank])
    encoders = dict(zip(names, [*config.victims, *config.bank], strict=True))
    task: Any = ray.remote(num_cpus=config.resources.cpus, num_gpus=config.resources.gpus)(_invert_one)
    pending = {
        task.remote(victim.located(), images, config.inversion, seed, output / name / f"seed_{seed}", config.limits): (
            f"{name}, seed {seed}"
        )
        for name, victim in encoders.items()
        for seed in config.seeds
    }
    failed: list[str] = []
    while pending:
        [ready], _ = ray.wait(list(pending))
        what = pending.pop(ready)
        try:
            logger.info("%s: %s", what, ray.get(ready))
        except Mistake as mistake:
            failed.append(f"{what}: {getattr(mistake, 'cause', mistake)}")
    if failed:
        listing = "\n  ".join(sorted(failed))
        raise Mistake(f"{len(failed)} inversions were not made, the others are:\n  {listing}")
    table = _report(config, output, names, drawn)
    finish(output, config, {"table": table})
    return table


class _Image(NamedTuple):
    sample_id: str
    content: bytes


def _draw_images(shards: Sequence[Shard], config: DecreeConfig) -> list[_Image]:
    """Shadow images, still encoded, the same ones in any order of the shards."""

    def readable() -> Iterator[_Image]:
        for shard in shards:
            for chunk in iter_chunks(shard, 256, config.limits):
                for sample in chunk:
                    if sample.error is None and sample.image is not None:
                        yield _Image(sample_id(shard.name, sample.key), sample.image)

    return sorted(draw(readable(), config.num_images, config.images_seed))


def _decode(images: Sequence[_Image], size_px: int, limits: Limits) -> np.ndarray:
    """uint8 (N, size, size, 3), unreadable ones left out."""
    squares = [np.empty((0, size_px, size_px, 3), np.uint8)]
    for image in images:
        with contextlib.suppress(BadSample):
            squares.append(square(image.content, image.sample_id, size_px, limits)[None])
    return np.concatenate(squares)


def _folder_names(encoders: Sequence[VictimConfig]) -> list[str]:
    """A folder per encoder, named after its path: those that would be equal are numbered."""
    names: list[str] = []
    for encoder in encoders:
        name = re.sub(r"[^\w.-]+", "_", "_".join(Path(encoder.path).parts[-2:])).strip("._") or "encoder"
        numbered, number = name, 1
        while numbered in names:
            number += 1
            numbered = f"{name}~{number}"
        names.append(numbered)
    return names


def _invert_one(
    config: VictimConfig, images: Sequence[_Image], inversion: Inversion, seed: int, folder: Path, limits: Limits
) -> str:
    """Make one inversion, unless it is done; returns a line about it."""
    victim = load_victim(config).to(best_device())
    image_NHWC = _decode(images, victim.image_size, limits)
    if (folder / "stamp.json").is_file():
        stamp = load_stamp(folder)
        here = hashlib.sha256(image_NHWC.tobytes()).hexdigest()
        if (stamp.victim, stamp.images) != (victim.fingerprint, here):
            what = "weights" if stamp.victim != victim.fingerprint else "images"
            raise Mistake(f"{folder} was made with other {what}; delete it, or choose another output folder")
        return f"done before, PL1 {stamp.pl1:.3f}"
    started = time.monotonic()
    stamp = invert(victim, image_NHWC, inversion, seed)
    seconds = time.monotonic() - started
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(step) + "\n" for step in stamp.trace))
    write_json(folder / "time.json", {"seconds": round(seconds, 1)})
    save_stamp(folder, stamp)
    return f"PL1 {stamp.pl1:.3f}, cosine {stamp.cosine:.3f}, {stamp.num_steps:,} steps in {seconds:.0f} s"


def _report(config: DecreeConfig, output: Path, names: Sequence[str], images: Sequence[_Image]) -> str:
    """Choose each encoder's smallest stamp, draw it, judge, and write `decree.json`; returns the table."""
    stamps = {name: [load_stamp(output / name / f"seed_{seed}") for seed in config.seeds] for name in names}
    smallest = {name: min(stamps[name], key=lambda stamp: (stamp.pl1, -stamp.cosine)) for name in names}
    bank = [stamp.pl1 * 3 * stamp.mask_HW.numel() for stamp in map(smallest.get, names[len(config.victims) :]) if stamp]
    lines = [
        "| encoder | PL1 | PL1 of each seed | R* | cosine | unstamped | anomaly index | verdict | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = []
    for number, name in enumerate(names):
        stamp, is_bank = smallest[name], number >= len(config.victims)
        save_stamp(output / name, stamp)
        write_atomically(output / name / "stamp.png", encode_image(_picture(stamp, images[0], config.limits), "png"))
        verdict = decide(stamp, () if is_bank else bank, config.threshold)
        each = [one.pl1 for one in stamps[name]]
        rows.append({
            "encoder": name, "victim": stamp.victim, "is_bank": is_bank, "pl1": stamp.pl1, "pl1_of_seeds": each,
            "norm": stamp.norm, "cosine": stamp.cosine, "cosine_of_all": stamp.cosine_of_all,
            "cosine_before": stamp.cosine_before, "is_collapsing": stamp.is_collapsing,
            "num_steps": [one.num_steps for one in stamps[name]], "verdict": verdict.word,
            "anomaly_index": verdict.anomaly_index, "is_outlier": verdict.is_outlier,
        })  # fmt: skip
        index = "" if verdict.anomaly_index is None else f"{verdict.anomaly_index:.1f}"
        word = verdict.word + (" (outlier)" if verdict.is_outlier else "") + (" (bank)" if is_bank else "")
        paths = [output / name / f"seed_{seed}" / "time.json" for seed in config.seeds]
        minutes = sum(read_json(path, "time of an inversion")["seconds"] for path in paths) / 60
        lines.append(
            f"| {name} | {stamp.pl1:.3f} | {' '.join(f'{one:.3f}' for one in each)} | {stamp.norm:,.0f} | "
            f"{stamp.cosine:.3f} | {stamp.cosine_before:.3f} | {index} | {word} | {minutes:.1f} |"
        )
    write_json(output / "decree.json", {"threshold": config.threshold, "encoders": rows})
    return "\n".join(lines)


def _picture(stamp: InvertedStamp, image: _Image, limits: Limits) -> np.ndarray:
    """Side by side: the mask, the mask times the patch, an image before and after stamping; uint8 (H, 4W, 3)."""
    size_px = len(stamp.mask_HW)
    image_CHW = to_unit_range(torch.from_numpy(_decode([image], size_px, limits)))[0]
    mask_CHW = stamp.mask_HW.expand(3, -1, -1)
    tiles = [mask_CHW, mask_CHW * stamp.patch_CHW, image_CHW, stamp.stamp(image_CHW[None])[0]]
    picture_HWC = (torch.cat(tiles, dim=2) * 255).round().byte().permute(1, 2, 0).numpy()
    scale = max(1, 128 // size_px)
    return picture_HWC.repeat(scale, axis=0).repeat(scale, axis=1)
