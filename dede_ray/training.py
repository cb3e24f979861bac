"""What `jobs/train_clip.py` trains: a contrastive CLIP, then the DeDe decoder against a frozen victim.

`train(config)` runs the `clip:` section (contrastive CLIP on shards) and then the `decoder:` section (the DeDe decoder
against the frozen CLIP, or against any other victim); loop.py does the training itself. The decoder sees images as they
are, so a sample's embedding is constant: it is computed once, as a pass over the shards, and the trainer never holds a
victim.

Each section leaves, in its folder: `metrics.jsonl` (one JSON object per logged step), `curve.png`, `checkpoints/` (what
resuming needs) and a tensor-only export that the other jobs read. Running the same command again resumes.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field
from torch import nn

from dede_ray import clip, feed, robust
from dede_ray.augmentation import Augmentation
from dede_ray.config import Config, Mistake, claim, finish
from dede_ray.contrastive import Contrastive, LossKind, with_loss
from dede_ray.decoder import (
    NOISE_PER_SHARD,
    NOISE_SPLIT,
    DecoderPreset,
    MaskedDecoder,
    OodFill,
    Reconstruction,
    Spread,
    ball_radius,
    changed_preset,
    embedding_use,
    lengths,
    noise_images,
    reconstruction,
    sample_keys,
    save_decoder,
)
from dede_ray.embedding import EmbedWork, Encoding
from dede_ray.ledger import part_path
from dede_ray.loop import Precision, Recipe, Run, Workers, check_workers, fit
from dede_ray.optimisation import Optimisation
from dede_ray.passing import PassResources, run_pass
from dede_ray.shards import (
    BadSample,
    Limits,
    Reason,
    Sample,
    Shard,
    decode_image,
    encode_image,
    in_order,
    list_shards,
    sample_id,
    write_shards,
)
from dede_ray.tracking import Tracking
from dede_ray.validation import ValidationConfig, Validator
from dede_ray.victims import OpenClipVictim, OptionalVictimConfig, Victim, VictimConfig, load_victim

logger = logging.getLogger(__name__)

CHUNK_SIZE = 256  # samples of a shard that are read, embedded and recovered together


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


class DecoderTrain(Config):
    """DeDe decoder training against a frozen victim; unset fields come from the preset."""

    shards: str | list[str]
    """The suspected data itself (in distribution), or any public set (out of distribution)."""
    holdout: str | list[str] | None = None
    """Clean shards on which the decoder's use of the embedding is checked; None checks on training samples."""
    victim: OptionalVictimConfig = None
    """Whose embeddings to invert; None takes the CLIP that this run's `clip:` section trained."""
    preset: Literal["tiny", "paper", "fast", "vit_b16"] = "tiny"
    """Network and optimisation: see PRESETS in decoder.py."""
    epochs: float | None = Field(None, gt=0)
    batch_size: int | None = Field(None, ge=2)
    learning_rate: float | None = Field(None, gt=0)
    mask_ratio: float | None = Field(None, gt=0, lt=1)
    """Hidden patches / patches while training."""
    null_rate: float | None = Field(None, ge=0, lt=1)
    """Share of samples trained with the null embedding, which the null-embedding ratio needs."""
    trim_rate: float | None = Field(None, ge=0, lt=1)
    """Worst rebuilt share of each batch that is left out of the loss, so that poisoned samples are never learnt."""
    reverse_weight: float | None = Field(None, ge=0)
    """Weight of the reverse direction, embeddings predicted from visible patches; 0 trains none."""
    reverse_mask_ratio: float | None = Field(None, gt=0, lt=1)
    """Hidden patches / patches in the reverse direction."""
    ood_fill: OodFill = "none"
    """What becomes of samples with long embeddings, against poison that makes embeddings long (CTRL). Publication and
    code disagree: `noise` (the text) puts images of random noise in their place; `split` (the code) trains on them in a
    pass of their own, which is for in-memory training only; `none` does nothing, as the publication's other rows."""
    ood_quantile: float = Field(0.99, gt=0.5, lt=1)
    """Share of the samples whose embeddings are not long; in the published code 1 - poison rate, which is 0.01."""

    def resolved(self) -> DecoderPreset:
        return changed_preset(self.preset, self.model_dump(include=DecoderPreset.model_fields.keys() - {"shape"}))


class Training(Config):
    """What every trainer is told beside the encoder that it trains."""

    output: str
    """Folder for the sections' results, each in a folder of its own."""
    decoder: DecoderTrain | None = None
    """The DeDe decoder, trained after the encoder, in <output>/decoder."""
    precision: Precision = "fp32"
    """Arithmetic of training; with bf16 and fp16 the weights stay float32 (torch's autocast)."""
    lanes: int = Field(8, ge=1)
    """Parts that a global batch is cut into; fixes which sample is in which batch (see feed.py)."""
    log_every: int = Field(20, ge=1)
    """Steps between lines of metrics.jsonl."""
    seed: int = 0
    limits: Limits = Limits()
    max_error_fraction: float = Field(0.1, ge=0, le=1)
    """Stop when more than this share of the samples cannot be used."""
    embedding: PassResources = PassResources()
    """Resources of the pass that embeds the decoder's samples."""
    workers: Workers = Workers()
    tracking: Tracking = Tracking()

    def identity(self: T, **changes: Any) -> T:
        """The settings that make a run what it is: not where it runs, nor where it can be watched."""
        nowhere: dict[str, Any] = {"workers": Workers(), "embedding": PassResources(), "tracking": Tracking()}
        return self.model_copy(update={**nowhere, **changes})

    def run(
        self,
        folder: Path,
        recipe: Recipe,
        optimisation: Optimisation,
        plan: feed.Plan,
        accumulation: int = 1,
        validate_every: int | None = None,
    ) -> Run:
        """The description of one section's run."""
        return Run(
            recipe, optimisation, plan, folder, self.precision, self.log_every, self.seed, self.limits,
            self.workers, self.max_error_fraction, accumulation, validate_every, self.tracking,
            self.model_dump(mode="json"),
        )  # fmt: skip


T = TypeVar("T", bound=Training)


class TrainConfig(Training):
    """Settings of jobs/train_clip.py."""

    clip: ClipTrain | None = None
    """The CLIP, in <output>/clip."""


def train(config: TrainConfig) -> str:
    """Run the sections that the config has; Ray must be running.

    Returns:
        One line per section: what was trained and where it lies.

    Raises:
        Mistake: nothing to train, or settings, shards or checkpoints that do not fit.
    """
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
        plan = feed.Plan(
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


def _index(section: ClipTrain) -> tuple[list[feed.ChunkRef], list[float] | None]:
    """The chunks of all shards, and how often an epoch holds each, where that is not once."""
    entries = [section.shards] if isinstance(section.shards, str) else section.shards
    if section.weights is None:
        return feed.index_shards(list_shards(entries), CHUNK_SIZE), None
    if len(section.weights) != len(entries) or min(section.weights, default=0) <= 0:
        raise Mistake(
            f"clip.weights {section.weights} must hold one number above 0 for each of the {len(entries)} entries of "
            "clip.shards"
        )
    list_shards(entries)  # names that clash are told here
    index: list[feed.ChunkRef] = []
    weights: list[float] = []
    for entry, weight in zip(entries, section.weights, strict=True):
        index += feed.index_shards(list_shards(entry), CHUNK_SIZE)
        weights += [weight] * (len(index) - len(weights))
    return index, weights


def _look_for_captions(index: list[feed.ChunkRef], limits: Limits) -> None:
    """Say at once, not after a start on a cluster, that shards are of the wrong kind: a glance at the first chunk."""
    if not index:
        raise Mistake("the shards hold not one sample; write some with jobs/ingest.py")
    samples = feed.read_samples(index[0], 0, index[0].num_samples, limits)
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


def train_decoder(config: Training, section: DecoderTrain, trained: VictimConfig, own: Training) -> str:
    """Train the decoder in <output>/decoder, against the section's victim or the one just trained.

    Args:
        own: the settings that make the decoder what it is, for its run.json.

    Returns:
        One line for people.
    """
    if section.ood_fill == "split":
        raise Mistake(
            "decoder.ood_fill is split, which takes samples apart by their embeddings; what trains here reads whole "
            "chunks, in an order that is fixed before anything is embedded. Set it to noise or none, or train in "
            "memory (fit_decoder in decoder.py)"
        )
    folder = Path(config.output).absolute() / "decoder"
    victim_config = section.victim or trained.model_copy(update={"path": str(Path(trained.path).absolute())})
    victim = load_victim(victim_config)
    done = claim(folder, own)
    if done is not None and done["victim"] != victim.fingerprint:
        raise Mistake(f"{folder} was trained against another victim than {victim_config.path}; choose another output")
    if done is None:
        preset = section.resolved()
        check_workers(config.lanes, preset.batch_size, 1, config.workers)
        shards = list_shards(section.shards)
        index = feed.index_shards(shards, CHUNK_SIZE)
        holdout = list_shards(section.holdout) if section.holdout else [index[0].shard]
        noise: list[Shard] = []
        if preset.ood_fill == "noise":
            noise = _noise_shards(folder / "noise", preset, index, victim.image_size, config.seed)
            in_order([*shards, *noise])  # names that clash are told here
            index += feed.index_shards(noise, CHUNK_SIZE)
        steps_per_window = max(1, 4096 // preset.batch_size)
        plan = feed.Plan(
            index, preset.batch_size, config.lanes, config.seed, preset.shuffle, steps_per_window, preset.epochs
        )
        held_index = feed.index_shards(holdout, CHUNK_SIZE)
        for kind, pass_shards in (("train", [*shards, *noise]), ("holdout", holdout)):
            run_pass(
                pass_shards, folder / "embeddings" / kind, EmbedWork,
                {"encoding": Encoding(victim_config.located(), None, frozenset())},
                image_size=victim.image_size, made_with={"victim": victim.fingerprint}, chunk_size=CHUNK_SIZE,
                limits=config.limits, resources=config.embedding, max_error_fraction=config.max_error_fraction,
                name=f"embedding {kind}",
            )  # fmt: skip
        recipe = decoder_recipe(preset, config.seed, victim, folder, held_index, config.limits, noise)
        result = fit(config.run(folder, recipe, preset, plan))
        done = finish(folder, own, {**result, "victim": victim.fingerprint})
    use = done["export"]
    return (
        f"decoder: {done['steps']:,} steps on {done['num_samples']:,} samples, held-out error {use['error_true']:.4f} "
        f"with the image's own embedding, {use['error_shuffled']:.4f} with another's -> {folder}"
    )


def _noise_shards(
    folder: Path, preset: DecoderPreset, index: list[feed.ChunkRef], image_size: int, seed: int
) -> list[Shard]:
    """Write shards of as many noise images as samples will be left out; a rerun finds them."""
    if not folder.is_dir():
        num = max(1, round((1 - preset.ood_quantile) * sum(ref.num_samples for ref in index)))
        samples = (
            Sample(name.split("/")[1], number % NOISE_PER_SHARD, encode_image(image_HWC, "png"), "png")
            for number, (name, image_HWC) in enumerate(noise_images(num, image_size, seed))
        )
        temporary = folder.with_name(f".{folder.name}")
        write_shards(temporary, NOISE_SPLIT, samples, NOISE_PER_SHARD)
        temporary.rename(folder)
    return list_shards(str(folder))


def decoder_recipe(
    preset: DecoderPreset,
    seed: int,
    victim: Victim,
    folder: Path,
    held_index: list[feed.ChunkRef],
    limits: Limits,
    noise: Sequence[Shard] = (),
) -> _DecoderRecipe:
    """The decoder's objective and data, once the folder holds the embeddings of training and held-out samples.

    Args:
        noise: those of the training shards that take the place of samples with long embeddings.
    """
    parts, names = folder / "embeddings" / "train", frozenset(shard.name for shard in noise)
    radius = math.inf
    if names:
        corpus = [path for path in _paths(parts) if path.parent.name not in names]
        radius = ball_radius(np.concatenate([lengths(_rows(path)) for path in corpus]), preset.ood_quantile)
    spread = _embedding_spread(parts, radius, names)
    return _DecoderRecipe(
        preset, seed, victim.image_size, victim.embedding_dim, victim.fingerprint, spread, parts,
        folder / "embeddings" / "holdout", held_index, limits, radius, names,
    )  # fmt: skip


def _paths(parts: Path) -> list[Path]:
    return sorted(parts.glob("parts/*/[0-9]*.parquet"))


def _rows(path: Path) -> np.ndarray:
    """A part's embeddings (n, E), of the samples that have one."""
    column = pq.read_table(path, columns=["embedding"])["embedding"].combine_chunks().drop_null()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1 if len(column) else 0)


def _embedding_spread(parts: Path, radius: float, noise: frozenset[str], most_chunks: int = 64) -> Spread:
    """Measure what is trained on in some chunks, evenly spaced."""
    paths = _paths(parts)
    chunks = []
    for path in paths[:: -(-len(paths) // most_chunks) or 1]:
        rows_NE = _rows(path)
        chunks.append(rows_NE if path.parent.name in noise else rows_NE[lengths(rows_NE) <= radius])
    chunks = [rows_NE for rows_NE in chunks if len(rows_NE)]
    if not chunks:
        raise Mistake("not one sample of the decoder's shards can be used; score them to see the reasons")
    return Spread.of(np.concatenate(chunks))


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
        self, ref: feed.ChunkRef, epoch: int, start: int, samples: list[Sample]
    ) -> tuple[feed.Columns, list[Reason | None]]:
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
            "image": feed.stacked(images, size),
            "tokens": tokens_BT,
            "is_truncated": is_truncated_B,
            "sample_id": np.array([name.encode() for name in ids], "S"),
        }
        if has_views:
            columns["image_view"] = feed.stacked(image_views, size)
            columns["tokens_view"], _ = clip.tokenise(tokenizer, caption_views)
        return columns, errors

    def validate(self, objective: Any, device: torch.device, rank: int, world: int) -> dict[str, float]:
        if self.validator is None:
            return {}
        return self.validator.run(objective.model, device, objective.model.logit_scale.dtype, rank, world)

    def reader(self) -> feed.Decode:
        return replace(self, validator=None).decode

    def lr_scale(self, step: int) -> float:
        return self.section.method.lr_scale(step, self.steps_per_epoch)

    def export(self, folder: Path, objective: Any) -> dict[str, Any]:
        clip.save_clip(folder, objective.model, self.described)
        return {}


@dataclass(frozen=True)
class _DecoderRecipe(Recipe):
    preset: DecoderPreset
    seed: int
    image_size: int
    embedding_dim: int
    victim: str
    spread: Spread
    train_parts: Path
    holdout_parts: Path
    holdout_index: list[feed.ChunkRef]
    limits: Limits
    radius: float = math.inf
    """Training samples with a longer embedding are set aside, unless they are noise."""
    noise: frozenset[str] = frozenset()
    """Names of the shards of noise."""

    def objective(self, rank: int, world: int) -> Reconstruction:
        return reconstruction(self.preset, self.image_size, self.spread, self.victim)

    def decode(
        self, ref: feed.ChunkRef, epoch: int, start: int, samples: list[Sample]
    ) -> tuple[feed.Columns, list[feed.Unused | None]]:
        radius = math.inf if ref.shard.name in self.noise else self.radius
        return self._columns(self.train_parts, ref, epoch, start, samples, radius)

    def _columns(
        self,
        parts: Path,
        ref: feed.ChunkRef,
        epoch: int,
        start: int,
        samples: list[Sample],
        radius: float = math.inf,
    ) -> tuple[feed.Columns, list[feed.Unused | None]]:
        """What the embedding pass could use is used here, and what it could not has its reason there."""
        part = part_path(parts, ref.shard.name, ref.number)
        stored = pq.read_table(part, columns=["sample_id", "embedding", "error"])
        stored = stored.slice(start, len(samples))
        is_usable = stored["embedding"].is_valid().to_numpy(zero_copy_only=False)
        errors = stored["error"].to_pylist()
        embeddings = stored["embedding"].combine_chunks().drop_null().flatten().to_numpy(zero_copy_only=False)
        embeddings = embeddings.astype(np.float32, copy=False).reshape(-1, self.embedding_dim)
        if radius < math.inf:
            is_inside = lengths(embeddings) <= radius
            for i in np.flatnonzero(is_usable)[~is_inside].tolist():
                is_usable[i], errors[i] = False, "outside_ball"
            embeddings = embeddings[is_inside]
        ids = [name for name, usable in zip(stored["sample_id"].to_pylist(), is_usable, strict=True) if usable]
        size = self.image_size
        images = [
            decode_image(sample.image, self.limits, size)  # type: ignore[arg-type]
            for sample, usable in zip(samples, is_usable, strict=True)
            if usable
        ]
        columns = {
            "image": feed.stacked(images, size),
            "embedding": embeddings,
            "key": sample_keys(ids, self.seed, epoch).numpy(),
            "sample_id": np.array([name.encode() for name in ids], "S"),
        }
        return columns, errors

    def export(self, folder: Path, objective: Any) -> dict[str, Any]:
        """Write the decoder, and check on held-out samples that it reads the embedding."""
        decoder = objective.decoder
        assert isinstance(decoder, MaskedDecoder)
        decoder.float().eval()
        save_decoder(folder, decoder, {"preset": self.preset.model_dump()})
        held: list[feed.Columns] = []
        for ref in self.holdout_index[:2]:
            samples = feed.read_samples(ref, 0, ref.num_samples, self.limits)
            held.append(self._columns(self.holdout_parts, ref, -1, 0, samples)[0])
        batch = {k: torch.from_numpy(np.concatenate([part[k] for part in held])) for k in ("image", "embedding", "key")}
        return embedding_use(decoder, batch, self.preset.mask_ratio)
