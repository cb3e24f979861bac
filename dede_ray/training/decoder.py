"""Training the DeDe decoder against a frozen victim: the `decoder:` section of train_clip and train_simclr.

The decoder sees images as they are, never augmented, so a sample's embedding is constant: `train_decoder` computes all
embeddings once, as a pass over the shards, and the trainer never holds a victim. The objective and its presets are in
reconstruction.py, the network in models/decoder.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field

from dede_ray.data.images import decode_image, encode_image
from dede_ray.data.ledger import read_part
from dede_ray.data.passes import PassResources, run_pass
from dede_ray.data.sampling import sample_keys
from dede_ray.data.shards import Limits, Sample, Shard, list_shards, write_shards
from dede_ray.models.decoder import MaskedDecoder, save_decoder
from dede_ray.models.embedding import EmbedWork, Encoding, matrix
from dede_ray.models.victims import OptionalVictimConfig, Victim, VictimConfig, load_victim
from dede_ray.runtime.config import Config, Mistake, claim, finish
from dede_ray.training import dataloader
from dede_ray.training.loop import Recipe, Run, TrainingSettings, check_workers, fit
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


class DecoderTrain(Config):
    """DeDe decoder training against a frozen victim; unset fields come from the preset."""

    shards: str | list[str]
    """The suspected data itself (in distribution), or any public set (out of distribution)."""
    holdout: str | list[str] | None = None
    """Clean shards on which the decoder's use of the embedding is checked; None checks on training samples."""
    victim: OptionalVictimConfig = None
    """Whose embeddings to invert; None takes the CLIP that this run's `clip:` section trained."""
    preset: Literal["tiny", "paper", "fast", "vit_b16"] = "tiny"
    """Network and optimisation: see PRESETS in reconstruction.py."""
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


class SectionSettings(TrainingSettings):
    """Settings of the jobs that train an encoder and then the decoder, each a section of the YAML."""

    output: str
    """Folder for the sections' results, each in a folder of its own."""
    decoder: DecoderTrain | None = None
    """The DeDe decoder, trained after the encoder, in <output>/decoder."""
    embedding: PassResources = PassResources()
    """Resources of the pass that embeds the decoder's samples."""

    def identity(self: S, **changes: Any) -> S:
        """The settings that make a run what it is: not where it runs, nor where it can be watched."""
        return super().identity(embedding=PassResources(), **changes)


S = TypeVar("S", bound=SectionSettings)


def train_decoder(config: SectionSettings, section: DecoderTrain, trained: VictimConfig, own: SectionSettings) -> str:
    """Train the decoder in <output>/decoder, against the section's victim or the one just trained.

    Args:
        own: the settings that make the decoder what it is, for its run.json.

    Returns:
        One line: how long it trained, how well it reads the embedding, where it is.
    """
    if section.ood_fill == "split":
        raise Mistake(
            "decoder.ood_fill is split, which takes samples apart by their embeddings; what trains here reads whole "
            "chunks, in an order that is fixed before anything is embedded. Set it to noise or none, or train in "
            "memory (fit_decoder in reconstruction.py)"
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
        index = dataloader.index_shards(shards)
        holdout = list_shards(section.holdout) if section.holdout else [index[0].shard]
        noise: list[Shard] = []
        if preset.ood_fill == "noise":
            noise = _noise_shards(folder / "noise", preset, index, victim.image_size, config.seed)
            if clashing := {shard.name for shard in shards} & {shard.name for shard in noise}:
                raise Mistake(f"a shard is called {min(clashing)}, as one of noise will be; rename it")
            index += dataloader.index_shards(noise)
        plan = config.plan(index, preset.batch_size, preset.epochs, shuffle=preset.shuffle)
        held_index = dataloader.index_shards(holdout)
        encoding = Encoding(victim_config.located(), None, frozenset())
        for kind, pass_shards in (("train", [*shards, *noise]), ("holdout", holdout)):
            run_pass(
                pass_shards, folder / "embeddings" / kind, EmbedWork, {"encoding": encoding},
                image_size=victim.image_size, made_with={"victim": victim.fingerprint},
                chunk_size=dataloader.CHUNK_SIZE, limits=config.limits, resources=config.embedding,
                max_error_fraction=config.max_error_fraction, name=f"embedding {kind}",
            )  # fmt: skip
        recipe = decoder_recipe(preset, config.seed, victim, folder, held_index, config.limits, noise)
        result = fit(Run(config, recipe, preset, plan, folder))
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
        preset, seed, limits, victim.image_size, victim.fingerprint, spread, train_parts=parts,
        holdout_parts=folder / "embeddings" / "holdout", holdout_index=held_index, radius=radius, noise=names,
    )  # fmt: skip


def _paths(parts: Path) -> list[Path]:
    return sorted(parts.glob("parts/*/[0-9]*.parquet"))


def _rows(path: Path) -> np.ndarray:
    """A part's embeddings (n, E), of the samples that have one."""
    return matrix(pq.read_table(path, columns=["embedding"])["embedding"].drop_null()).numpy()


def _embedding_spread(parts: Path, radius: float, noise: frozenset[str], most_chunks: int = 64) -> Spread:
    """The spread of what is trained on, measured on some chunks, evenly spaced."""
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
    limits: Limits
    image_size: int
    victim: str
    spread: Spread
    train_parts: Path
    holdout_parts: Path
    holdout_index: list[dataloader.ChunkRef]
    radius: float = math.inf
    """Training samples with a longer embedding are set aside, unless they are noise."""
    noise: frozenset[str] = frozenset()
    """Names of the shards of noise."""

    def objective(self, rank: int, world: int) -> Reconstruction:
        return reconstruction(self.preset, self.image_size, self.spread, self.victim)

    def decode(self, ref: dataloader.ChunkRef, epoch: int, start: int, samples: list[Sample]) -> dataloader.Decoded:
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
    ) -> dataloader.Decoded:
        """Columns of the samples that the embedding pass could use; of the others it has the reasons."""
        part = read_part(parts, ref.shard.name, ref.number, ["sample_id", "embedding", "error"])
        part = part.slice(start, len(samples))
        assert len(part) == len(samples), ref
        embedding_NE, errors = matrix(part["embedding"]).numpy(), part["error"].to_pylist()
        for row in np.flatnonzero(lengths(embedding_NE) > radius).tolist():
            errors[row] = "outside_ball"
        usable = [row for row, error in enumerate(errors) if error is None]
        names, size = part["sample_id"].take(pa.array(usable, pa.int64())).to_pylist(), self.image_size
        images_BHWC = [decode_image(samples[row].image or b"", self.limits, size) for row in usable]
        columns = {
            "image": dataloader.stacked(images_BHWC, (size, size, 3)),
            "embedding": embedding_NE[usable],
            "key": sample_keys(names, self.seed, epoch).numpy(),
            "sample_id": dataloader.id_column(names),
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
