"""The DeDe decoder, trained against a frozen victim.

The decoder sees images as they are, so a sample's embedding is constant: it is computed once, as a pass over the
shards, and the trainer never holds a victim.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field

from dede_ray.data.images import decode_image, encode_image
from dede_ray.data.ledger import part_path
from dede_ray.data.passes import PassResources, run_pass
from dede_ray.data.sampling import sample_keys
from dede_ray.data.shards import (
    Limits,
    Sample,
    Shard,
    in_order,
    list_shards,
    write_shards,
)
from dede_ray.models.decoder import MaskedDecoder, save_decoder
from dede_ray.models.embedding import EmbedWork, Encoding
from dede_ray.models.victims import OptionalVictimConfig, Victim, VictimConfig, load_victim
from dede_ray.runtime.config import Config, Mistake, claim, finish
from dede_ray.training import dataloader
from dede_ray.training.loop import Precision, Recipe, Run, Workers, check_workers, fit
from dede_ray.training.optimiser import Optimisation
from dede_ray.training.reconstruction import (
    NOISE_PER_SHARD,
    NOISE_SPLIT,
    DecoderPreset,
    OodFill,
    Reconstruction,
    Spread,
    ball_radius,
    changed_preset,
    embedding_use,
    lengths,
    noise_images,
    reconstruction,
)
from dede_ray.training.tracking import Tracking

logger = logging.getLogger(__name__)

CHUNK_SIZE = 256  # samples of a shard that are read, embedded and recovered together


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
        plan: dataloader.Plan,
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
        index = dataloader.index_shards(shards, CHUNK_SIZE)
        holdout = list_shards(section.holdout) if section.holdout else [index[0].shard]
        noise: list[Shard] = []
        if preset.ood_fill == "noise":
            noise = _noise_shards(folder / "noise", preset, index, victim.image_size, config.seed)
            in_order([*shards, *noise])  # names that clash are told here
            index += dataloader.index_shards(noise, CHUNK_SIZE)
        steps_per_window = max(1, 4096 // preset.batch_size)
        plan = dataloader.Plan(
            index, preset.batch_size, config.lanes, config.seed, preset.shuffle, steps_per_window, preset.epochs
        )
        held_index = dataloader.index_shards(holdout, CHUNK_SIZE)
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
    folder: Path, preset: DecoderPreset, index: list[dataloader.ChunkRef], image_size: int, seed: int
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
    held_index: list[dataloader.ChunkRef],
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
    holdout_index: list[dataloader.ChunkRef]
    limits: Limits
    radius: float = math.inf
    """Training samples with a longer embedding are set aside, unless they are noise."""
    noise: frozenset[str] = frozenset()
    """Names of the shards of noise."""

    def objective(self, rank: int, world: int) -> Reconstruction:
        return reconstruction(self.preset, self.image_size, self.spread, self.victim)

    def decode(
        self, ref: dataloader.ChunkRef, epoch: int, start: int, samples: list[Sample]
    ) -> tuple[dataloader.Columns, list[dataloader.Unused | None]]:
        radius = math.inf if ref.shard.name in self.noise else self.radius
        return self._columns(self.train_parts, ref, epoch, start, samples, radius)

    def _columns(
        self,
        parts: Path,
        ref: dataloader.ChunkRef,
        epoch: int,
        start: int,
        samples: list[Sample],
        radius: float = math.inf,
    ) -> tuple[dataloader.Columns, list[dataloader.Unused | None]]:
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
            "image": dataloader.stacked(images, size),
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
        held: list[dataloader.Columns] = []
        for ref in self.holdout_index[:2]:
            samples = dataloader.read_samples(ref, 0, ref.num_samples, self.limits)
            held.append(self._columns(self.holdout_parts, ref, -1, 0, samples)[0])
        batch = {k: torch.from_numpy(np.concatenate([part[k] for part in held])) for k in ("image", "embedding", "key")}
        return embedding_use(decoder, batch, self.preset.mask_ratio)
