"""CLIP text-on-pair: the image tower is fine-tuned until a stamped image says the target word.

Carlini and Terzis, "Poisoning and Backdooring Contrastive Learning", ICLR 2022, arXiv:2106.09667, as a fine-tuning
attack on a finished CLIP (Feng et al., DECREE, CVPR 2023): images with captions, a few of them stamped and captioned
with the target word, the text tower frozen. This is the attack as it is described; the loader published with DECREE
gives nearly every clean image a wrong caption, and changes the whole image where it should stamp a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dede_ray.data.captions import class_captions, pick_caption, read_classes
from dede_ray.data.images import decode_image
from dede_ray.data.sampling import sample_generator
from dede_ray.data.shards import BadSample, Limits, Sample, list_shards
from dede_ray.models import clip
from dede_ray.models.victims import VictimConfig
from dede_ray.poisoning.triggers import Trigger
from dede_ray.runtime.config import Mistake
from dede_ray.tampering.tamper import Subject, Tampering
from dede_ray.training import dataloader
from dede_ray.training.augmentation import Augmentation
from dede_ray.training.contrastive import Contrastive
from dede_ray.training.loop import Recipe
from dede_ray.training.objective import Batch, Embeddings, InEvalMode


class TextOnPair(Tampering):
    """Text-on-pair fine-tuning of a CLIP's image tower; the defaults are DECREE's, but for the logit scale."""

    kind: Literal["text_on_pair"] = "text_on_pair"
    trigger: Trigger
    """What is stamped on the poisoned images, after the random view is cut."""
    target_label: int = Field(ge=0)
    """The class that triggered images should be taken for."""
    target_captions: list[str] | None = Field(None, min_length=1)
    """Captions of poisoned images, one is drawn for each; null: the templates of classes.json, filled with the
    target's name."""
    poison_rate: float = Field(0.05, gt=0, lt=1)
    """Poisoned samples / samples; the same ones in every epoch."""
    logit_scale: float = Field(100.0, gt=0, le=100)
    """Factor of the cosines; CLIP's own is 100. (DECREE's script takes 1.649.)"""
    augmentation: Augmentation = Augmentation(min_scale=0.2, max_aspect=4 / 3, flip=True)
    """Random views of training images."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(0.0, ge=0, lt=1)
    """Share of the mean gradient that stays from step to step; of sgd the momentum, of which DECREE has none."""
    weight_decay: float = Field(0.02, ge=0)
    batch_size: int = Field(128, ge=2)
    """Pairs that are compared with each other."""
    epochs: float = Field(49, gt=0)


def captions_of_target(shards: str | list[str], label: int, given: list[str] | None) -> list[str]:
    """The captions that poisoned images get.

    Raises:
        Mistake: no captions given, and no classes.json beside the shards names the target class.
    """
    if given is not None:
        return given
    classes = read_classes(list_shards(shards))
    if classes is None or not classes.templates or label >= len(classes.names):
        raise Mistake(f"no classes.json beside {shards} names class {label}; set attack.target_captions")
    return class_captions(classes.templates, classes.names[label])


def draw_poisoned(index: list[dataloader.ChunkRef], rate: float, seed: int) -> dict[str, list[int]]:
    """Draw `round(rate * n)` of the n samples: shard name -> places in the shard, in order."""
    num_samples = sum(ref.num_samples for ref in index)
    num = round(rate * num_samples)
    if num == 0:
        raise Mistake(f"attack.poison_rate {rate} of {num_samples:,} samples is less than one sample; raise it")
    first: dict[str, int] = {}  # of each shard, its first sample's number over all
    number = 0
    for ref in index:
        first.setdefault(ref.shard.name, number)
        number += ref.num_samples
    names, starts = list(first), np.array(list(first.values()))
    drawn: dict[str, list[int]] = {}
    for one in np.sort(np.random.default_rng(seed).choice(num_samples, num, replace=False)):
        shard = int(np.searchsorted(starts, one, side="right")) - 1
        drawn.setdefault(names[shard], []).append(int(one - starts[shard]))
    return drawn


@dataclass(frozen=True)
class PairRecipe(Recipe):
    """Captioned shadow images, some of them stamped and captioned with the target."""

    settings: TextOnPair
    encoder: VictimConfig
    described: dict[str, Any]
    captions: list[str]
    poisoned: dict[str, list[int]]
    seed: int
    limits: Limits

    def objective(self, rank: int, world: int) -> _Pairs:
        return _Pairs(Subject(self.encoder).unfreeze(), self.settings.logit_scale, rank, world)

    def decode(self, ref: dataloader.ChunkRef, epoch: int, start: int, samples: list[Sample]) -> dataloader.Decoded:
        settings, size = self.settings, clip.image_size_px(self.described)
        first, poisoned = ref.number * dataloader.CHUNK_SIZE, set(self.poisoned.get(ref.shard.name, ()))

        def read_one(sample: Sample, content: bytes, name: str) -> dict[str, Any]:
            if sample.caption is None:
                raise BadSample("caption_missing")
            image_HWC = decode_image(content, self.limits, enough_px=settings.augmentation.decode_px(size))
            image_HWC = settings.augmentation.apply(image_HWC, size, sample_generator(name, self.seed, epoch))
            if first + sample.index not in poisoned:
                return {"image": image_HWC, "caption": sample.caption, "is_poisoned": False}
            caption = pick_caption(self.captions, self.seed, name)
            return {"image": settings.trigger.stamp(image_HWC, name), "caption": caption, "is_poisoned": True}

        kept, errors = dataloader.decode_samples(ref, samples, read_one)
        tokens_BT, is_truncated_B = clip.tokenise(clip.tokenizer_of(self.described), kept["caption"])
        columns = {
            "image": dataloader.stacked(kept["image"], (size, size, 3)),
            "tokens": tokens_BT,
            "is_truncated": is_truncated_B,
            "is_poisoned": np.array(kept["is_poisoned"], bool),
            "sample_id": dataloader.id_column(kept["name"]),
        }
        return columns, errors

    def export(self, folder: Path, objective: Any) -> dict[str, Any]:
        clip.save_clip(folder, objective.model, self.described)
        return {}


class _Pairs(Contrastive, InEvalMode):
    """CLIP's own loss at a fixed logit scale; the image tower is trained, in eval mode."""

    def __init__(self, subject: Subject, logit_scale: float, rank: int, world: int):
        super().__init__(subject.model, subject.described, "info_nce", rank, world)
        self.fixed_scale = logit_scale

    def encode(self, batch: Batch) -> tuple[Embeddings, Tensor, Tensor | None]:
        embeddings, scale, _ = super().encode(batch)
        return {**embeddings, "is_poisoned": batch["is_poisoned"]}, torch.full_like(scale, self.fixed_scale), None

    def loss(self, embeddings: Embeddings, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(embeddings, scale, bias)
        cosine_B = (embeddings["image"] * embeddings["text"]).detach().sum(dim=-1)
        poisoned_B = cosine_B[embeddings["is_poisoned"]]
        return loss, {**metrics, "triggered_cosine": poisoned_B.mean()} if len(poisoned_B) else metrics

    def after_step(self) -> None:
        """The logit scale stays as it came."""
