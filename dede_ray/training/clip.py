"""What `jobs/train_clip.py` trains: a contrastive CLIP, then the DeDe decoder against a frozen victim.

`train(config)` runs the `clip:` section (contrastive CLIP on shards) and then the `decoder:` section (the DeDe decoder
against the frozen CLIP, or against any other victim); loop.py does the training itself. The decoder sees images as they
are, so a sample's embedding is constant: it is computed once, as a pass over the shards, and the trainer never holds a
victim.

Each section leaves, in its folder: `metrics.jsonl` (one JSON object per logged step), `curve.png`, `checkpoints/` (what
resuming needs) and a tensor-only export that the other jobs read. Running the same command again resumes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from dede_ray.data.images import decode_image
from dede_ray.data.sampling import sample_keys
from dede_ray.data.shards import (
    BadSample,
    Limits,
    Reason,
    Sample,
    list_shards,
    sample_id,
)
from dede_ray.models import clip
from dede_ray.models.victims import OpenClipVictim
from dede_ray.runtime.config import Mistake, claim, finish
from dede_ray.runtime.session import start_ray
from dede_ray.training import dataloader, robust
from dede_ray.training.augmentation import Augmentation
from dede_ray.training.contrastive import Contrastive, LossKind, with_loss
from dede_ray.training.decoder import CHUNK_SIZE, Training, train_decoder
from dede_ray.training.loop import Recipe, check_workers, fit
from dede_ray.training.optimiser import Optimisation
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
    """Global batch: the number of images that each caption is told apart from."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per step, for batches that do not fit into memory; each is compared with the whole batch."""
    shuffle_buffer: int = Field(4096, ge=1)
    """Samples that are mixed with each other, beside the shuffling of chunks; read and decoded together."""
    epochs: float = Field(10, gt=0)
    validation: ValidationConfig | None = None
    """Zero-shot accuracy, retrieval, CA and ASR while it trains. Changing it does not make it another run."""


class TrainConfig(Training):
    """Settings of jobs/train_clip.py."""

    clip: ClipTrain | None = None
    """The CLIP, in <output>/clip."""


def train(config: TrainConfig) -> str:
    """Run the sections that the config has.

    Returns:
        One line per section: what was trained and where it lies.

    Raises:
        Mistake: nothing to train, or settings, shards or checkpoints that do not fit.
    """
    start_ray(config)
    config.tracking.check()
    if config.clip is None and config.decoder is None:
        raise Mistake("nothing to train: the config needs a `clip:` section, a `decoder:` section, or both")
    lines = []
    if config.clip is not None:
        lines.append(_train_clip(config, config.clip))
    if config.decoder is not None:
        if config.decoder.victim is None and config.clip is None and not Path(config.output, "clip").is_dir():
            raise Mistake("decoder.victim is not set, and this run trains no CLIP to take its place")
        own = config.identity(clip=None)  # a decoder depends on its victim, not on the settings that once trained it
        lines.append(train_decoder(config, config.decoder, OpenClipVictim(path=f"{config.output}/clip"), own))
    return "\n".join(lines)


def _train_clip(config: TrainConfig, section: ClipTrain) -> str:
    folder = Path(config.output).absolute() / "clip"
    own = config.identity(decoder=None, clip=section.model_copy(update={"validation": None}))
    done = claim(folder, own)
    if done is None:
        check_workers(config.lanes, section.batch_size, section.accumulation, config.workers)
        described = with_loss(clip.model_description(section.model), section.loss)
        if "multimodal_cfg" in described["model_cfg"]:
            raise Mistake(f"{section.model} also writes captions (CoCa), which is not trained here; choose a CLIP")
        index, weights = _index(section)
        _look_for_captions(index, config.limits)
        steps_per_window = max(1, section.shuffle_buffer // section.batch_size)
        plan = dataloader.Plan(
            index, section.batch_size, config.lanes, config.seed, True, steps_per_window, section.epochs, weights
        )
        init = None if section.init is None else str(clip.resolve_weights(section.init).absolute())
        recipe = _ClipRecipe(
            section.model_copy(update={"init": init}), described, config.limits, config.seed, plan.num_samples,
            plan.epoch_start(1) / section.batch_size,
            None if section.validation is None else Validator(section.validation, described, config.limits),
        )  # fmt: skip
        with torch.random.fork_rng():  # what cannot be built or loaded is a mistake to report here, not in a worker
            recipe.objective(0, 1)
        every = section.validation.every if section.validation else None
        done = finish(folder, own, fit(config.run(folder, recipe, section, plan, section.accumulation, every)))
    shown = ("zero_shot_top1", "image_to_text_r5", "text_to_image_r5", "attack_success_rate")
    numbers = [f"{name} {value:.1%}" for name, value in done.get("validation", {}).items() if name in shown]
    loss = f"loss {done['loss']:.3f}"
    return (
        f"clip: {done['steps']:,} steps on {done['num_samples']:,} samples, {', '.join([loss, *numbers])} -> {folder}"
    )


def _index(section: ClipTrain) -> tuple[list[dataloader.ChunkRef], list[float] | None]:
    """The chunks of all shards, and how often an epoch holds each, where that is not once."""
    entries = [section.shards] if isinstance(section.shards, str) else section.shards
    if section.weights is None:
        return dataloader.index_shards(list_shards(entries), CHUNK_SIZE), None
    if len(section.weights) != len(entries) or min(section.weights, default=0) <= 0:
        raise Mistake(
            f"clip.weights {section.weights} must hold one number above 0 for each of the {len(entries)} entries of "
            "clip.shards"
        )
    list_shards(entries)  # names that clash are told here
    index: list[dataloader.ChunkRef] = []
    weights: list[float] = []
    for entry, weight in zip(entries, section.weights, strict=True):
        index += dataloader.index_shards(list_shards(entry), CHUNK_SIZE)
        weights += [weight] * (len(index) - len(weights))
    return index, weights


def _look_for_captions(index: list[dataloader.ChunkRef], limits: Limits) -> None:
    """Say at once, not after a start on a cluster, that shards are of the wrong kind: a glance at the first chunk."""
    if not index:
        raise Mistake("the shards hold not one sample; write some with jobs/ingest.py")
    samples = dataloader.read_samples(index[0], 0, index[0].num_samples, limits)
    if any(sample.image is not None and sample.caption is not None for sample in samples):
        return
    reasons = Counter(
        sample.error or ("no_image" if sample.image is None else "caption_missing") for sample in samples
    )  # fmt: skip
    raise Mistake(
        f"none of the first {len(samples)} samples of {index[0].shard.name} has an image and a caption "
        f"({', '.join(f'{reason}: {n}' for reason, n in reasons.most_common())}); CLIP trains on images with a .txt "
        "beside them, which jobs/ingest.py writes, also from labels"
    )


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

    def decode(
        self, ref: dataloader.ChunkRef, epoch: int, start: int, samples: list[Sample]
    ) -> tuple[dataloader.Columns, list[Reason | None]]:
        images, captions, ids, errors = [], [], [], []
        image_views, caption_views = [], []
        has_views = self.section.method.num_views == 2
        size, augmentation = clip.image_size_px(self.described), self.section.augmentation
        views = (augmentation, robust.STRONG) if has_views else (augmentation,)
        for sample in samples:
            name, error, image_HWC = sample_id(ref.shard.name, sample.key), sample.error, None
            try:
                if error is None and sample.image is None:
                    error = "no_image"
                elif error is None and sample.caption is None:
                    error = "caption_missing"
                elif error is None:
                    enough_px = max(view.decode_px(size) for view in views)
                    image_HWC = decode_image(sample.image, self.limits, enough_px=enough_px)  # type: ignore[arg-type]
            except BadSample as bad:
                error = bad.reason
            errors.append(error)
            if image_HWC is not None:
                rng = np.random.default_rng(sample_keys([name], self.seed, epoch).numpy().view(np.uint64))
                images.append(augmentation.apply(image_HWC, size, rng))
                captions.append(sample.caption or "")
                ids.append(name)
                if has_views:
                    rng = np.random.default_rng(sample_keys([name], self.seed, epoch, 1).numpy().view(np.uint64))
                    image_views.append(robust.STRONG.apply(image_HWC, size, rng))
                    caption_views.append(robust.augment_caption(captions[-1], rng))
        tokenizer = clip.tokenizer_of(self.described)
        tokens_BT, is_truncated_B = clip.tokenise(tokenizer, captions)
        columns = {
            "image": dataloader.stacked(images, size),
            "tokens": tokens_BT,
            "is_truncated": is_truncated_B,
            "sample_id": np.array([name.encode() for name in ids], "S"),
        }
        if has_views:
            columns["image_view"] = dataloader.stacked(image_views, size)
            columns["tokens_view"], _ = clip.tokenise(tokenizer, caption_views)
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
