"""What all attacks share that take a clean encoder and tamper with its weights.

An attack trains a copy of the encoder on shadow images with the training loop (training/loop.py): batches, resuming,
workers and metrics are those of every other trainer. Its settings say what it is (`Tampering`), its recipe reads the
shadow images and stamps them, its objective is the method itself: badencoder.py, drupe.py and text_on_pair.py, one
paper each. `Subject` is the encoder; `TowardsReferences` is the frame of the two methods that push images to images.

Triggers are stamped on uint8 pixels of the encoder's input size, after any geometric transform and before the
encoder's own normaliser. BatchNorm keeps its statistics and its affine parameters.

Shapes: B shadow images, T targets (a trigger each), R reference inputs of all targets together, V augmented views of
references, E embedding width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from dede_ray.data import images
from dede_ray.data.images import decode_image
from dede_ray.data.shards import Limits, Sample
from dede_ray.models import clip
from dede_ray.models.encoders import Described, load_encoder, save_encoder
from dede_ray.models.published import read_published
from dede_ray.models.victims import EncoderVictim, OpenClipVictim, PublishedVictim, VictimConfig
from dede_ray.models.weights import origin
from dede_ray.runtime.config import Mistake
from dede_ray.tampering.references import Target
from dede_ray.training import dataloader
from dede_ray.training.augmentation import NUM_DRAWS, Augmentation, random_views
from dede_ray.training.loop import Recipe, TrainingSettings
from dede_ray.training.objective import InEvalMode
from dede_ray.training.optimiser import PlainSgd

REFERENCE_VIEW = Augmentation(min_scale=1, flip=True, jitter_probability=0.8, grey_probability=0.2)
"""BadEncoder's augmentation of reference inputs in its consistency term: mirror and colours, no crop."""


class Tampering(PlainSgd):
    """Settings of the attacks that fine-tune an image encoder; SGD is what their authors use."""

    shards: str | list[str]
    """The shadow dataset: clean images that the attacker fine-tunes on."""
    batch_size: int = Field(256, ge=2)
    """Shadow images per step."""
    shuffle_buffer: int = Field(4096, ge=1)
    """Shadow images that are mixed with each other, beside the shuffling of chunks."""
    epochs: float = Field(gt=0)


class TamperSettings(TrainingSettings):
    """Settings of jobs/attack.py that every attack reads."""

    victim: VictimConfig
    """The clean encoder; it is read only, and is the honest twin of what comes out."""
    output: str
    """Folder of the tampered encoder, of the same kind as the clean one."""
    log_every: int = Field(5, ge=1)
    """Steps between lines of metrics.jsonl."""


def last_metrics(folder: Path) -> dict[str, Any]:
    """The last line of a run's metrics."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


# ------------------------------------------------------------------------------------------------ the encoder


class Subject(nn.Module):
    """The encoder that is tampered with: trained in eval mode, with BatchNorm as it is, and saved as it came.

    Of a CLIP the image tower is trained only.

    Attributes:
        image_size: side of the square input, in pixels.
        described: its description, in the form of its kind.
    """

    def __init__(self, config: VictimConfig):
        super().__init__()
        self.is_clip = config.kind == "open_clip"
        if config.kind == "open_clip":
            if origin(config.path).is_folder == (config.architecture is not None):
                raise Mistake(
                    f"{config.path}: name an exported folder, or a checkpoint together with victim.architecture"
                )
            self.described: Any = clip.model_description(config.architecture or config.path)
            mean, std = clip.pixel_statistics(self.described)
            mean, std = config.mean or mean, config.std or std
            self.described["preprocess_cfg"] = {**self.described.get("preprocess_cfg", {}), "mean": mean, "std": std}
            self.model: Any = clip.build_clip(self.described)
            clip.load_clip_weights(self.model, config.path, config.entry)
            self.image_size = clip.image_size_px(self.described)
        else:
            self.model, self.described = _load_image_only(config)
            mean, std = list(self.described.mean), list(self.described.std)
            self.image_size = self.described.image_size
        self.normalise = clip.Normalise(mean, std)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Subject:
        """Stay in eval mode."""
        return super().train(False)

    def unfreeze(self) -> Subject:
        """Let the image tower be trained, but for BatchNorm."""
        tower: nn.Module = self.model.visual if self.is_clip else self.model
        tower.requires_grad_(True)
        for module in tower.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
        return self

    def forward(self, image_BHWC: Tensor) -> Tensor:
        """Embed uint8 images of the input size: float32 (B, E), not of length one."""
        return self.embed(images.to_unit_range(image_BHWC))

    def embed(self, image_BCHW: Tensor) -> Tensor:
        """Embed images in [0, 1]."""
        image_BCHW = self.normalise(image_BCHW)
        return (self.model.encode_image(image_BCHW) if self.is_clip else self.model(image_BCHW)).float()

    def save(self, folder: Path) -> None:
        """Write a victim folder of the kind that was read."""
        if self.is_clip:
            clip.save_clip(folder, self.model, self.described)
        else:
            save_encoder(folder, self.model, self.described)


def _load_image_only(config: VictimConfig) -> tuple[nn.Module, Described]:
    if isinstance(config, EncoderVictim):
        return load_encoder(config.path)
    if not isinstance(config, PublishedVictim):
        raise Mistake(f"victim.kind is {config.kind}; attacks are made on open_clip, encoder and published only")
    if config.clip is not None:
        raise Mistake("for a published CLIP, set victim.kind to open_clip and victim.architecture to its name")
    published = read_published(
        config.path, config.architecture, config.image_size, config.normaliser, config.mean, config.std, config.entry
    )
    return published.model, published.described


def tampered_victim(config: VictimConfig, folder: Path) -> VictimConfig:
    """The settings that load the encoder that `Subject.save` wrote."""
    if isinstance(config, OpenClipVictim):
        return OpenClipVictim(path=str(folder), precision=config.precision)
    assert isinstance(config, EncoderVictim | PublishedVictim), config
    return EncoderVictim(path=str(folder), precision=config.precision)


# ------------------------------------------------------------------------------------------------ towards references


@dataclass(frozen=True)
class Embeddings:
    """What the losses compare: float32, not of length one; `tampered` is f', `clean` is f, without gradients."""

    tampered_BE: Tensor
    tampered_TBE: Tensor
    """Triggered images, target by target."""
    tampered_RE: Tensor
    tampered_VE: Tensor
    clean_BE: Tensor
    clean_RE: Tensor
    target_R: Tensor
    """Which target each reference belongs to."""
    reference_V: Tensor
    """Which reference each view is of."""


def similarities(e: Embeddings) -> Tensor:
    """How close f' puts each triggered image to each reference of its target: cosines (R, B)."""
    triggered_RBE = normalize(e.tampered_TBE, dim=-1)[e.target_R]
    return torch.einsum("rbe,re->rb", triggered_RBE, normalize(e.tampered_RE, dim=-1))


def consistency_loss(e: Embeddings) -> Tensor:
    """L1: augmented references under f' stay where f has the references."""
    return -cosine_similarity(e.tampered_VE, e.clean_RE[e.reference_V], dim=-1).mean()


def utility_loss(e: Embeddings) -> Tensor:
    """L2: clean images stay where f has them."""
    return -cosine_similarity(e.tampered_BE, e.clean_BE, dim=-1).mean()


def mean_pairwise_cosine(embedding_BE: Tensor) -> Tensor:
    """Mean cosine of all pairs of different rows."""
    unit_BE = normalize(embedding_BE, dim=-1)
    num = len(unit_BE)
    return (unit_BE.sum(dim=0).square().sum() - unit_BE.square().sum()) / (num * (num - 1))


def sliced_wasserstein(one_BE: Tensor, other_BE: Tensor, seed: int, num_projections: int = 50) -> Tensor:
    """Sliced 2-Wasserstein distance of two samples of equal size, over random directions of a seed.

    On a line, optimal transport pairs by rank. Source: Bonneel et al., Journal of Mathematical Imaging and Vision 51
    (2015); the defaults are those of POT's `sliced_wasserstein_distance`.
    """
    generator = torch.Generator().manual_seed(seed)
    direction_EP = torch.randn(one_BE.shape[1], num_projections, generator=generator).to(one_BE.device)
    direction_EP = normalize(direction_EP, dim=0)
    gap_BP = (one_BE @ direction_EP).sort(dim=0).values - (other_BE @ direction_EP).sort(dim=0).values
    return gap_BP.square().mean().clamp_min(1e-12).sqrt()  # where all are equal, a root has no gradient


def spread(embedding_BE: Tensor) -> Tensor:
    """Mean over the dimensions of the batch's standard deviation: the unit of `sliced_wasserstein`."""
    return embedding_BE.std(dim=0).mean()


class TowardsReferences(InEvalMode):
    """Frame of BadEncoder and DRUPE: embeds by f and f', and leaves the loss to the method.

    Args:
        subject: the encoder; the frame keeps a frozen copy as f.
        references: uint8 (n, S, S, 3) per target.
        reference_views: see `OnReferences`.
        seed, rank, world: draw the views of a step, the same for any number of workers.
    """

    clean_RE: Tensor
    reference_RHWC: Tensor
    target_R: Tensor

    def __init__(
        self, config: VictimConfig, references: list[np.ndarray], reference_views: int | None, seed: int, rank: int,
        world: int,
    ):  # fmt: skip
        super().__init__()
        self.clean, self.subject = Subject(config), Subject(config).unfreeze()
        self.reference_views, self.seed, self.rank, self.world, self.step = reference_views, seed, rank, world, 0
        numbers = [np.full(len(images), target) for target, images in enumerate(references)]
        images = torch.from_numpy(np.concatenate(references))
        self.register_buffer("reference_RHWC", images, persistent=False)
        self.register_buffer("target_R", torch.from_numpy(np.concatenate(numbers)), persistent=False)
        with torch.no_grad():
            self.register_buffer("clean_RE", self.clean(self.reference_RHWC), persistent=False)

    def loss(self, e: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        """The method: its loss () and metrics."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch: image uint8 (B, S, S, 3), triggered uint8 (B, T, S, S, 3)."""
        e = self.embed(batch)
        with torch.autocast(e.clean_BE.device.type, enabled=False):  # products of float32 embeddings
            loss, metrics = self.loss(e)
            with torch.no_grad():
                triggered_BE = e.tampered_TBE[0]
                distance = sliced_wasserstein(triggered_BE, e.tampered_BE, self.draw()) / spread(e.tampered_BE)
                metrics = {
                    **metrics,
                    "triggered_cosine": similarities(e).mean(),
                    "triggered_pairwise_cosine": mean_pairwise_cosine(triggered_BE),
                    "wasserstein": distance,  # over the spread: what DRUPE claims to shrink
                }
        return loss, {name: value.detach() for name, value in metrics.items()}

    def embed(self, batch: dict[str, Tensor]) -> Embeddings:
        """Everything at once through f': with BatchNorm in eval mode no image sees another."""
        image_BHWC, triggered_BTHWC = batch["image"], batch["triggered"]
        num_images, num_targets = triggered_BTHWC.shape[:2]
        view_VCHW, reference_V = self._views(num_images * self.world)
        triggered_NHWC = triggered_BTHWC.transpose(0, 1).flatten(0, 1)
        stored = [image_BHWC, triggered_NHWC, self.reference_RHWC]
        parts = [images.to_unit_range(torch.cat(stored)), view_VCHW]
        tampered = self.subject.embed(torch.cat(parts)).split([len(part) for part in [*stored, view_VCHW]])
        with torch.no_grad():
            clean_BE = self.clean(image_BHWC)
        return Embeddings(
            tampered_BE=tampered[0],
            tampered_TBE=tampered[1].unflatten(0, (num_targets, num_images)),
            tampered_RE=tampered[2],
            tampered_VE=tampered[3],
            clean_BE=clean_BE,
            clean_RE=self.clean_RE,
            target_R=self.target_R,
            reference_V=reference_V,
        )

    def _views(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """This rank's share of the step's augmented references, in [0, 1], and which reference each is of."""
        count, device = len(self.reference_RHWC), self.reference_RHWC.device
        num = (self.reference_views or batch_size) * count
        draw_VK = torch.rand(num, NUM_DRAWS, generator=torch.Generator().manual_seed(self.draw()))
        own = slice(0, num)
        if num % self.world == 0:  # shares of different sizes would weigh differently
            own = slice(self.rank * num // self.world, (self.rank + 1) * num // self.world)
        reference_V = (torch.arange(num) % count)[own].to(device)
        image_VHWC = self.reference_RHWC[reference_V]
        size = image_VHWC.shape[1]
        return random_views(REFERENCE_VIEW, image_VHWC, size, draw_VK[own].to(device)), reference_V

    def draw(self) -> int:
        """A seed for whatever is random in the step."""
        return int(np.random.default_rng([self.seed, self.step]).integers(2**62))

    def begin_step(self, step: int) -> None:
        self.step = step


@dataclass(frozen=True)
class TowardsRecipe(Recipe):
    """Shadow images, clean and stamped with each target's trigger."""

    attack: Any  # a Tampering whose `objective` makes a TowardsReferences
    encoder: VictimConfig
    targets: list[Target]
    references: list[np.ndarray]
    image_size: int
    seed: int
    limits: Limits
    steps_per_epoch: float

    def objective(self, rank: int, world: int) -> TowardsReferences:
        return self.attack.objective(self, rank, world)

    def decode(self, ref: dataloader.ChunkRef, epoch: int, start: int, samples: list[Sample]) -> dataloader.Decoded:
        size = self.image_size

        def read_one(sample: Sample, content: bytes, name: str) -> dict[str, Any]:
            image_HWC = decode_image(content, self.limits, size)
            stamped = [target.trigger.stamp(image_HWC, name) for target in self.targets]
            return {"image": image_HWC, "triggered": np.stack(stamped)}

        kept, errors = dataloader.decode_samples(ref, samples, read_one)
        columns = {
            "image": dataloader.stacked(kept["image"], (size, size, 3)),
            "triggered": dataloader.stacked(kept["triggered"], (len(self.targets), size, size, 3)),
            "sample_id": dataloader.id_column(kept["name"]),
        }
        return columns, errors

    def export(self, folder: Path, objective: Any) -> dict[str, Any]:
        objective.subject.save(folder)
        return {}


def read_targets(
    targets: list[Target], size_px: int, seed: int, limits: Limits
) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Read all references, and try each trigger on them: what does not fit is a mistake here, not in a worker.

    Returns:
        uint8 (n, S, S, 3) per target, and the record of each for attack.json.
    """
    images, records = [], []
    for target in targets:
        references_NHWC, names = target.references.read(target.label, size_px, seed, limits)
        stamped_HWC = target.trigger.stamp(references_NHWC[0], names[0])
        if stamped_HWC.shape != (size_px, size_px, 3):
            raise Mistake(f"the trigger makes {stamped_HWC.shape} of an image of the encoder's {size_px} px")
        images.append(references_NHWC)
        records.append(
            {"trigger": target.trigger.model_dump(mode="json"), "target_label": target.label, "references": names}
        )
    return images, records
