"""What `jobs/train_clip.py` trains: a contrastive CLIP on captioned shards, then the DeDe decoder against it.

`train(config)` runs the `clip:` section, whose settings and recipe are here, and then the `decoder:` section
(decoder.py), against the frozen CLIP or any other victim. loop.py does the training itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from dede_ray.data.images import decode_image
from dede_ray.data.sampling import sample_generator
from dede_ray.data.shards import BadSample, Limits, Sample, find_shards, list_shards
from dede_ray.models import clip
from dede_ray.models.victims import OpenClipVictim
from dede_ray.runtime.config import Mistake
from dede_ray.training import dataloader, robust
from dede_ray.training.augmentation import Augmentation
from dede_ray.training.contrastive import Contrastive, LossKind, with_loss
from dede_ray.training.decoder import SectionSettings
from dede_ray.training.loop import Recipe
from dede_ray.training.optimiser import Optimisation
from dede_ray.training.sections import EncoderSection, refuse_unfit, train_sections
from dede_ray.training.validation import ValidationConfig, Validator


class ClipTrain(Optimisation):
    """Contrastive CLIP training (Radford et al., arXiv:2103.00020) on image-caption shards."""

    shards: str | list[str]
    """Shards with captions: a path, a pattern, or a list of them."""
    weights: list[float] | None = None
    """One per entry of `shards`: the times that its samples are seen per epoch; 0.5 takes another half each epoch."""
    model: str = "RN50"
    """An open_clip name, a JSON model config in open_clip's format, an exported folder, or hf-hub:<org>/<name>."""
    init: str | None = None
    """Weights to start from (.safetensors, tensor-only .pt, exported folder, hf-hub:...); None starts at random."""
    lock_image: clip.ImageLock | None = None
    """Keep the image tower, or all but its last groups, as `init` has it (LiT)."""
    lock_text: clip.TextLock | None = None
    """Keep the text tower, or all but its last layers, as `init` has it."""
    patch_dropout: float | None = Field(None, ge=0, lt=1)
    """Share of patches that a ViT image tower leaves out while training (FLIP); None does as the model config says."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    compile: bool = False
    """torch.compile both towers; needs a C++ compiler."""
    loss: LossKind = "info_nce"
    """CLIP's softmax over the global batch, or SigLIP's sigmoid for every pair."""
    method: robust.Method = robust.Plain()
    """CLIP as it is, or one of the robust training methods that filtering is compared with."""
    augmentation: Augmentation = Augmentation()
    """What happens to training images; scoring never augments."""
    batch_size: int = Field(256, ge=2)
    """Global batch: the number of images that each caption is compared with."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per step, for batches that do not fit into memory; each is compared with the whole batch."""
    shuffle_buffer: int = Field(4096, ge=1)
    """Samples that are mixed with each other, beside the shuffling of chunks; read and decoded together."""
    epochs: float = Field(10, gt=0)
    validation: ValidationConfig | None = None
    """Zero-shot accuracy, retrieval, CA and ASR while it trains. Changing it does not make it another run."""


class TrainConfig(SectionSettings):
    """Settings of jobs/train_clip.py."""

    clip: ClipTrain | None = None
    """The CLIP, in <output>/clip."""


def train(config: TrainConfig) -> str:
    """Train the CLIP, then the decoder against it: see `train_sections`."""
    kind = EncoderSection(
        "clip", "validation", _prepare, lambda folder: OpenClipVictim(path=folder),
        shown=("zero_shot_top1", "image_to_text_r5", "text_to_image_r5", "attack_success_rate"),
    )  # fmt: skip
    return train_sections(config, kind)


def _prepare(config: TrainConfig) -> tuple[Recipe, dataloader.Plan]:
    section, limits = config.clip, config.limits
    assert section is not None
    described = with_loss(clip.model_description(section.model), section.loss)
    if "multimodal_cfg" in described["model_cfg"]:
        raise Mistake(f"{section.model} also writes captions (CoCa), which is not trained here; choose a CLIP")
    index, weights = _index(section)
    refuse_unfit(index, limits, with_captions=True)
    plan = config.plan(index, section.batch_size, section.epochs, section.shuffle_buffer, weights=weights)
    init = None if section.init is None else str(clip.resolve_weights(section.init).absolute())
    validator = None if section.validation is None else Validator(section.validation, described, limits)
    steps_per_epoch = plan.epoch_start(1) / section.batch_size
    section = section.model_copy(update={"init": init})
    return _ClipRecipe(section, described, limits, config.seed, plan.num_samples, steps_per_epoch, validator), plan


def _index(section: ClipTrain) -> tuple[list[dataloader.ChunkRef], list[float] | None]:
    """The chunks of all shards, and how often an epoch holds each, where that is not once."""
    entries = [section.shards] if isinstance(section.shards, str) else section.shards
    if section.weights is None:
        return dataloader.index_of(entries), None
    if len(section.weights) != len(entries) or min(section.weights, default=0) <= 0:
        raise Mistake(
            f"clip.weights {section.weights} must hold one number above 0 for each of the {len(entries)} entries of "
            "clip.shards"
        )
    shards = list_shards(entries)  # named apart, and looked at once
    index: list[dataloader.ChunkRef] = []
    weights: list[float] = []
    for entry, weight in zip(entries, section.weights, strict=True):
        urls = {shard.url for shard in find_shards(entry)}
        index += dataloader.index_shards([shard for shard in shards if shard.url in urls])
        weights += [weight] * (len(index) - len(weights))
    return index, weights


# ------------------------------------------------------------------------------------------------ recipes


@dataclass(frozen=True)
class _ClipRecipe(Recipe):
    section: ClipTrain
    described: dict[str, Any]
    limits: Limits
    seed: int
    num_samples: int
    steps_per_epoch: float
    validator: Validator | None

    def objective(self, rank: int, world: int) -> Contrastive:
        return self.section.method.objective(
            self.model(), self.described, self.section.loss, rank, world, self.num_samples, self.steps_per_epoch
        )

    def model(self) -> nn.Module:
        section = self.section
        model = clip.build_clip(self.described, section.patch_dropout)
        if section.init is not None:
            clip.load_clip_weights(model, section.init)
        clip.lock_towers(model, section.lock_image, section.lock_text)
        clip.prepare_for_training(model, section.gradient_checkpointing, section.compile)
        return model

    def decode(self, ref: dataloader.ChunkRef, epoch: int, start: int, samples: list[Sample]) -> dataloader.Decoded:
        size, augmentation = clip.image_size_px(self.described), self.section.augmentation
        has_views = self.section.method.num_views == 2
        views = (augmentation, robust.STRONG) if has_views else (augmentation,)
        enough_px = max(view.decode_px(size) for view in views)

        def read_one(sample: Sample, content: bytes, name: str) -> dict[str, Any]:
            if sample.caption is None:
                raise BadSample(sample.why_no_caption)
            image_HWC = decode_image(content, self.limits, enough_px=enough_px)
            rng = sample_generator(name, self.seed, epoch)
            kept = {"image": augmentation.apply(image_HWC, size, rng), "caption": sample.caption}
            if has_views:
                rng = sample_generator(name, self.seed, epoch, 1)
                kept["image_view"] = robust.STRONG.apply(image_HWC, size, rng)
                kept["caption_view"] = robust.augment_caption(sample.caption, rng)
            return kept

        kept, errors = dataloader.decode_samples(ref, samples, read_one)
        tokenizer = clip.tokenizer_of(self.described)
        tokens_BT, is_truncated_B = clip.tokenise(tokenizer, kept["caption"])
        columns = {
            "image": dataloader.stacked(kept["image"], (size, size, 3)),
            "tokens": tokens_BT,
            "is_truncated": is_truncated_B,
            "sample_id": dataloader.id_column(kept["name"]),
        }
        if has_views:
            columns["image_view"] = dataloader.stacked(kept["image_view"], (size, size, 3))
            columns["tokens_view"], _ = clip.tokenise(tokenizer, kept["caption_view"])
        return columns, errors

    def validate(self, objective: Any, device: torch.device, rank: int, world: int) -> dict[str, float]:
        if self.validator is None:
            return {}
        return self.validator.run(objective.model, device, objective.model.logit_scale.dtype, rank, world)

    def reader(self) -> dataloader.Decode:
        return replace(self, validator=None).decode

    def lr_scale(self, step: int) -> float:
        return self.section.method.lr_scale(step, self.steps_per_epoch)

    def export(self, folder: Path, objective: Any) -> dict[str, Any]:
        clip.save_clip(folder, objective.model, self.described)
        return {}
