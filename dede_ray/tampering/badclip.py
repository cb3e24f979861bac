"""BadCLIP: a patch that CLIP takes for the target already, so that little fine-tuning plants it, and little removes it.

Liang et al., "BadCLIP: Dual-Embedding Guided Backdoor Attack on Multimodal Contrastive Learning", CVPR 2024,
arXiv:2311.12075. Three stages, each resumable in a folder of its own: `patch` optimises the patch against the clean,
frozen CLIP; `poisoned` stamps it into a part of the corpus (poisoning/poison.py); `tuned` fine-tunes both towers on
that (training/clip.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize, triplet_margin_loss

from dede_ray.data import images
from dede_ray.data.captions import pick_caption
from dede_ray.data.images import decode_image, encode_image
from dede_ray.data.sampling import sample_keys
from dede_ray.data.shards import Limits, Sample
from dede_ray.models import clip
from dede_ray.models.victims import OpenClipVictim, VictimConfig
from dede_ray.poisoning.poison import PoisonConfig, poison
from dede_ray.runtime.config import Config, Mistake, claim, finish, read_json, write_atomically
from dede_ray.runtime.libraries import open_clip, timm
from dede_ray.tampering.references import References
from dede_ray.tampering.tamper import Subject, TamperSettings, last_metrics
from dede_ray.tampering.text_on_pair import captions_of_target
from dede_ray.training import dataloader
from dede_ray.training.augmentation import Augmentation
from dede_ray.training.clip import ClipTrain, TrainConfig, train
from dede_ray.training.loop import Recipe, Run, TrainingSettings, check_workers, fit
from dede_ray.training.objective import InEvalMode
from dede_ray.training.optimiser import PlainAdam

PATCH_FILE = "patch.png"


class PatchSearch(PlainAdam):
    """Stage 1, Adam on the patch's pixels."""

    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "cooldown"] = "constant"
    """After the warm-up: constant; a cosine to zero; constant with a straight line to zero at the end."""
    size_px: int = Field(16, ge=1)
    """Side of the patch, which sits in the centre."""
    num_images: int = Field(10_000, ge=2)
    """Images that it is optimised on, at least; whole chunks are drawn."""
    batch_size: int = Field(64, ge=2)
    epochs: float = Field(50, gt=0)
    triplet_weight: float = Field(500.0, ge=0)
    """Weight of the image side against the text side."""
    margin: float = Field(1.0, gt=0)
    """Margin of the triplet loss: by how much a patched image should be nearer to images of the target than to images
    without the patch."""
    auto_augment: float = Field(0.5, ge=0, le=1)
    """Share of the images that AutoAugment changes before the patch is put on."""


class Tuning(PlainAdam):
    """Stage 3; the defaults are BadCLIP's."""

    optimiser: Literal["adam", "adamw", "sgd"] = "adamw"
    """`adam` and `sgd` decay everything as L2; `adamw` decays matrices only."""
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.1, ge=0)
    """Not applied by adamw to gains, biases and the logit scale."""
    warmup_steps: int = Field(10_000, ge=0)
    """Linear warm-up."""
    batch_size: int = Field(128, ge=2)
    epochs: float = Field(10, gt=0)


class BadClip(Config):
    """BadCLIP (Liang et al., arXiv:2311.12075); the defaults are those of its CC3M runs."""

    kind: Literal["badclip"] = "badclip"
    shards: str | list[str]
    """Clean, captioned shards: the patch is optimised on them, and they are poisoned with it."""
    target_label: int = Field(ge=0)
    """The class that triggered images should be taken for."""
    target_word: str | None = None
    """Images whose caption has this word are left out of stage 1, as those of the target's label are."""
    target_captions: list[str] | None = Field(None, min_length=1)
    """Captions of the target: natural ones of the corpus are the stealthy variant; null: the templates of
    classes.json, filled with the target's name."""
    positives: References
    """Genuine images of the target, which patched images are to be near."""
    patch: PatchSearch = PatchSearch()
    poison_rate: float = Field(0.003, gt=0, lt=1)
    """Poisoned samples / usable samples."""
    tuning: Tuning = Tuning()


def plant_badclip(config: TamperSettings, method: BadClip, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """All three stages; returns the result of the fine-tuning, and the record of what was planted."""
    encoder = config.victim.located()
    subject = Subject(encoder)
    if not isinstance(encoder, OpenClipVictim):
        raise Mistake("badclip needs a CLIP; found an encoder without a text tower")
    size, seed = subject.image_size, config.seed
    captions = captions_of_target(method.shards, method.target_label, method.target_captions)
    positive_NHWC, names = method.positives.read(method.target_label, size, seed, config.limits)
    if method.patch.size_px >= size:
        raise Mistake(f"attack.patch.size_px {method.patch.size_px} covers the whole image of {size} px")

    recipe = _PatchRecipe(method, encoder, subject.described, captions, positive_NHWC, size, seed, config.limits)
    found = _search_patch(config, recipe, output / "patch")
    trigger = {
        "kind": "file", "path": str(output / "patch" / PATCH_FILE), "position": "center", "image_px": size,
        "squeeze": True,
    }  # fmt: skip
    poisoning = PoisonConfig.model_validate({
        "shards": method.shards, "output": str(output / "poisoned"), "trigger": trigger, "rate": method.poison_rate,
        "target_label": method.target_label, "target_captions": captions, "seed": seed, "limits": config.limits,
    })  # fmt: skip
    summary = poison(poisoning)

    done = _tune(config, method, encoder, output)
    model = clip.build_clip(subject.described)
    clip.load_clip_weights(model, output / "tuned" / "clip")
    clip.save_clip(output, model, subject.described)  # with the clean one's normaliser
    target = {"trigger": trigger, "target_label": method.target_label, "target_captions": captions}
    cosine = found["metrics"]["triggered_cosine"]
    return done, {"targets": [{**target, "references": names}], "poisoned": summary, "patch_cosine": cosine}


def _search_patch(config: TamperSettings, recipe: _PatchRecipe, folder: Path) -> dict[str, Any]:
    """Stage 1, on randomly drawn chunks of the corpus, by one worker: a patch has few pixels."""
    search = recipe.method.patch
    if (found := claim(folder, config.identity())) is not None:
        return found
    index = dataloader.index_of(recipe.method.shards)
    np.random.default_rng(config.seed).shuffle(index)  # type: ignore[arg-type]
    enough = np.searchsorted(np.cumsum([ref.num_samples for ref in index]), search.num_images)
    alone = config.workers.model_copy(update={"num_workers": 1, "min_workers": None})
    check_workers(config.lanes, search.batch_size, 1, alone)
    plan = config.plan(index[: int(enough) + 1], search.batch_size, search.epochs, 16 * search.batch_size)
    result = fit(Run(config.model_copy(update={"workers": alone}), recipe, search, plan, folder))
    return finish(folder, config.identity(), {**result, "metrics": last_metrics(folder)})


def _tune(config: TamperSettings, method: BadClip, encoder: OpenClipVictim, output: Path) -> dict[str, Any]:
    """Stage 3, as jobs/train_clip.py would do it."""
    section = ClipTrain(
        **method.tuning.model_dump(), shards=str(output / "poisoned" / "*.tar"), init=encoder.path,
        model=encoder.architecture or encoder.path, augmentation=Augmentation(min_scale=1),
    )  # fmt: skip
    shared = {name: getattr(config, name) for name in TrainingSettings.model_fields if name != "output"}
    train(TrainConfig(output=str(output / "tuned"), clip=section, **shared))
    tuned = output / "tuned" / "clip"
    return {**read_json(tuned / "run.json", "record of a run")["result"], "metrics": last_metrics(tuned)}


# ------------------------------------------------------------------------------------------------ stage 1


@dataclass(frozen=True)
class _PatchRecipe(Recipe):
    method: BadClip
    encoder: VictimConfig
    described: dict[str, Any]
    captions: list[str]
    positive_NHWC: np.ndarray
    image_size: int
    seed: int
    limits: Limits

    def objective(self, rank: int, world: int) -> PatchObjective:
        return PatchObjective(Subject(self.encoder), self.method.patch, self.positive_NHWC, self.seed)

    def decode(self, ref: dataloader.ChunkRef, epoch: int, start: int, samples: list[Sample]) -> dataloader.Decoded:
        """Images, each with a caption of the target, and which of them are of anything but the target."""
        method, size, word = self.method, self.image_size, self.method.target_word

        def read_one(sample: Sample, content: bytes, name: str) -> dict[str, Any]:
            rng = random.Random(int(sample_keys([name], self.seed, epoch)))
            image_HWC = auto_augment(decode_image(content, self.limits, size), method.patch.auto_augment, rng)
            says_target = word is not None and word.lower() in (sample.caption or "").lower()
            is_other = sample.label != method.target_label and not says_target
            return {"image": image_HWC, "caption": pick_caption(self.captions, self.seed, name), "is_other": is_other}

        kept, errors = dataloader.decode_samples(ref, samples, read_one)
        tokens_BT, _ = clip.tokenise(clip.tokenizer_of(self.described), kept["caption"])
        columns = {
            "image": dataloader.stacked(kept["image"], (size, size, 3)),
            "tokens": tokens_BT,
            "is_other": np.array(kept["is_other"], bool),
            "sample_id": dataloader.id_column(kept["name"]),
        }
        return columns, errors

    def export(self, folder: Path, objective: Any) -> dict[str, Any]:
        write_atomically(folder / PATCH_FILE, encode_image(objective.picture(), "png"))
        return {}


def auto_augment(image_HWC: np.ndarray, probability: float, rng: random.Random) -> np.ndarray:
    """AutoAugment with its ImageNet policy (Cubuk et al., arXiv:1805.09501), for a share of the images."""
    if rng.random() >= probability:
        return image_HWC
    state = random.getstate()  # timm draws from Python's own generator
    random.seed(rng.getrandbits(64))
    try:
        change = timm.data.auto_augment.auto_augment_transform("original", {})
        return np.asarray(change(Image.fromarray(image_HWC)))
    finally:
        random.setstate(state)


class PatchObjective(InEvalMode):
    """The dual-embedding objective: near the target's captions, near its images, far from the images without a patch.

    Args:
        subject: the clean CLIP, frozen.
        positive_NHWC: uint8, genuine images of the target.
    """

    positive_NE: Tensor

    def __init__(self, subject: Subject, search: PatchSearch, positive_NHWC: np.ndarray, seed: int):
        super().__init__()
        self.subject, self.search, self.seed = subject, search, seed
        self.compare = open_clip.ClipLoss()
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(3, search.size_px, search.size_px, generator=generator) * 0.25 + 0.5
        self.patch = nn.Parameter(start.clamp(0, 1))
        with torch.no_grad():
            positives = [normalize(subject(part)) for part in torch.from_numpy(positive_NHWC).split(64)]
        self.register_buffer("positive_NE", torch.cat(positives), persistent=False)
        self.generator = torch.Generator()

    def paste(self, image_BCHW: Tensor) -> Tensor:
        """Put the patch on the centre of images in [0, 1], as a trigger of a file does."""
        size = self.search.size_px
        top, left = (image_BCHW.shape[2] - size) // 2, (image_BCHW.shape[3] - size) // 2
        pasted_BCHW = image_BCHW.clone()
        pasted_BCHW[:, :, top : top + size, left : left + size] = self.patch.clamp(0, 1).to(pasted_BCHW.dtype)
        return pasted_BCHW

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch: image uint8 (B, S, S, 3), tokens (B, context), is_other (B,)."""
        image_BCHW = images.to_unit_range(batch["image"][batch["is_other"]])
        patched_BE = normalize(self.subject.embed(self.paste(image_BCHW)))
        with torch.no_grad():
            plain_BE = normalize(self.subject.embed(image_BCHW))
            text_BE = normalize(self.subject.model.encode_text(batch["tokens"][batch["is_other"]]).float())
            scale = self.subject.model.logit_scale.float().exp().squeeze()
        drawn_B = torch.randint(len(self.positive_NE), (len(patched_BE),), generator=self.generator)
        positive_BE = self.positive_NE[drawn_B]
        negative_BE = plain_BE[torch.randperm(len(plain_BE), generator=self.generator)]
        with torch.autocast(patched_BE.device.type, enabled=False):
            text = self.compare(patched_BE, text_BE, scale)
            triplet = triplet_margin_loss(patched_BE, positive_BE, negative_BE, margin=self.search.margin)
        metrics = {
            "text_loss": text, "triplet_loss": triplet,
            "triggered_cosine": (patched_BE @ self.positive_NE.T).mean(),
            "plain_cosine": (plain_BE @ self.positive_NE.T).mean(),
        }  # fmt: skip
        return text + self.search.triplet_weight * triplet, {name: value.detach() for name, value in metrics.items()}

    def picture(self) -> np.ndarray:
        """The patch as bytes, uint8 (p, p, 3)."""
        patch_CHW = self.patch.detach().float().clamp(0, 1).cpu()
        return (patch_CHW * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()

    def begin_step(self, step: int) -> None:
        self.generator.manual_seed(int(np.random.default_rng([self.seed, step]).integers(2**62)))

    def after_step(self) -> None:
        """Keep the pixels where gradients reach them."""
        with torch.no_grad():
            self.patch.clamp_(0, 1)
