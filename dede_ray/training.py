"""Training on Ray Train and DeepSpeed: one loop, two objectives.

`train(config)` runs the `clip:` section (contrastive CLIP on shards) and then the `decoder:` section (the DeDe decoder
against the frozen CLIP, or against any other victim). Ray Data feeds (feed.py), Ray Train places the workers, restarts
them and keeps the checkpoints, DeepSpeed owns optimiser, precision and ZeRO. The decoder sees images as they are, so a
sample's embedding is constant: it is computed once, as a pass over the shards, and the trainer never holds a victim.

Each section leaves, in its folder: `metrics.jsonl` (one JSON object per logged step), `checkpoints/` (what resuming
needs) and a tensor-only export that the other jobs read. Running the same command again resumes.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from pydantic import Field
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn

from dede_ray import clip, feed
from dede_ray.augmentation import Augmentation
from dede_ray.config import Config, Mistake, claim, finish, write_json
from dede_ray.contrastive import Contrastive
from dede_ray.decoder import (
    PRESETS,
    DecoderPreset,
    MaskedDecoder,
    Reconstruction,
    embedding_use,
    sample_keys,
    save_decoder,
)
from dede_ray.ledger import Chunk, PassResources, part_path, run_pass
from dede_ray.shards import BadSample, Limits, Sample, decode_image, list_shards, sample_id
from dede_ray.victims import OpenClipVictim, Victim, VictimConfig, load_victim

logger = logging.getLogger(__name__)

CHUNK_SIZE = 256  # samples of a shard that are read, embedded and recovered together


class ClipTrain(Config):
    """Contrastive CLIP training (Radford et al., arXiv:2103.00020) on image-caption shards."""

    shards: str | list[str]
    """Shards with captions."""
    model: str = "RN50"
    """An open_clip name, a JSON model config in open_clip's format, or a folder exported by this job."""
    init: str | None = None
    """Checkpoint to start from (.safetensors or tensor-only .pt); None starts at random."""
    augmentation: Augmentation = Augmentation()
    """What happens to training images; scoring never augments."""
    batch_size: int = Field(256, ge=2)
    """Global batch: the number of images that each caption is told apart from."""
    epochs: float = Field(10, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.2, ge=0)
    """Not applied to gains, biases and the logit scale."""
    warmup_steps: int = Field(100, ge=0)
    """Linear warm-up; a cosine to zero follows."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 switches clipping off."""


class DecoderTrain(Config):
    """DeDe decoder training against a frozen victim; unset fields come from the preset."""

    shards: str | list[str]
    """The suspected data itself (in distribution), or any public set (out of distribution)."""
    holdout: str | list[str] | None = None
    """Clean shards on which the decoder's use of the embedding is checked; None checks on training samples."""
    victim: VictimConfig | None = None
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

    def resolved(self) -> DecoderPreset:
        own = self.model_dump(include={"epochs", "batch_size", "learning_rate", "mask_ratio", "null_rate", "trim_rate"})
        return PRESETS[self.preset].model_copy(update={k: v for k, v in own.items() if v is not None})


class Workers(Config):
    """Where training runs, and how it is spread and saved. Changing it does not make it another run."""

    num_workers: int = Field(1, ge=1)
    """Data-parallel workers; must divide `lanes`."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs each worker reserves; the rest is free for reading and decoding."""
    threads_per_worker: int | None = Field(None, ge=1)
    """Threads of a worker's arithmetic; None takes the machine's cores divided by the workers on it."""
    gpus_per_worker: float = Field(0, ge=0)
    readers: int = Field(2, ge=1)
    """Windows of samples that each worker has read and decoded at once."""
    read_cpus: float = Field(1, gt=0)
    """CPUs that each reader reserves."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO. CLIP at scale needs it; the decoder's 7 M parameters do not."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints."""
    max_failures: int = Field(3, ge=0)
    """Worker failures that a run survives, each time from the last checkpoint."""


class TrainConfig(Config):
    """Settings of jobs/train_clip.py."""

    output: str
    """Folder for both sections' results: <output>/clip and <output>/decoder."""
    clip: ClipTrain | None = None
    decoder: DecoderTrain | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of training; bf16 and fp16 keep float32 master weights."""
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


def train(config: TrainConfig) -> str:
    """Run the sections that the config has; Ray must be running.

    Returns:
        One line per section: what was trained and where it lies.

    Raises:
        Mistake: nothing to train, or settings, shards or checkpoints that do not fit.
    """
    if config.clip is None and config.decoder is None:
        raise Mistake("nothing to train: the config needs a `clip:` section, a `decoder:` section, or both")
    lines = []
    if config.clip is not None:
        lines.append(_train_clip(config, config.clip))
    if config.decoder is not None:
        lines.append(_train_decoder(config, config.decoder))
    return "\n".join(lines)


def _train_clip(config: TrainConfig, section: ClipTrain) -> str:
    folder = Path(config.output).absolute() / "clip"
    own = config.model_copy(update={"decoder": None, "workers": Workers(), "embedding": PassResources()})
    done = claim(folder, own)
    if done is None:
        described = clip.model_description(section.model)
        index = feed.index_shards(list_shards(section.shards), CHUNK_SIZE)
        plan = _plan(config, index, section.batch_size)
        with torch.random.fork_rng():  # what cannot be built or loaded is a mistake to report here, not in a worker
            model = clip.build_clip(described)
            if section.init is not None:
                clip.load_clip_weights(model, section.init)
        init = None if section.init is None else str(Path(section.init).absolute())
        recipe = _ClipRecipe(section.model_copy(update={"init": init}), described, config.limits, config.seed)
        optimisation = _Optimisation(
            "adamw", section.learning_rate, section.weight_decay, section.warmup_steps, "cosine", section.clip_norm
        )
        done = finish(folder, own, _fit(folder, config, recipe, optimisation, plan, section.epochs))
    return f"clip: {done['steps']:,} steps on {done['num_samples']:,} samples, loss {done['loss']:.3f} -> {folder}"


def _train_decoder(config: TrainConfig, section: DecoderTrain) -> str:
    output = Path(config.output).absolute()
    folder = output / "decoder"
    if section.victim is None and config.clip is None and not (output / "clip").is_dir():
        raise Mistake("decoder.victim is not set, and this run trains no CLIP to take its place")
    victim_config = section.victim or OpenClipVictim(path=str(output / "clip"))
    # A decoder depends on its victim, not on the settings that once trained it.
    victim = load_victim(victim_config)
    own = config.model_copy(update={"clip": None, "workers": Workers(), "embedding": PassResources()})
    done = claim(folder, own)
    if done is not None and done["victim"] != victim.fingerprint:
        raise Mistake(f"{folder} was trained against another victim than {victim_config.path}; choose another output")
    if done is None:
        preset = section.resolved()
        shards = list_shards(section.shards)
        index = feed.index_shards(shards, CHUNK_SIZE)
        plan = _plan(config, index, preset.batch_size, preset.shuffle)
        holdout = list_shards(section.holdout) if section.holdout else [index[0].shard]
        held_index = feed.index_shards(holdout, CHUNK_SIZE)
        for kind, pass_shards in (("train", shards), ("holdout", holdout)):
            run_pass(
                pass_shards, folder / "embeddings" / kind, EmbedWork, {"victim_config": victim_config.located()},
                image_size=victim.image_size, made_with={"victim": victim.fingerprint}, chunk_size=CHUNK_SIZE,
                limits=config.limits, resources=config.embedding, max_error_fraction=config.max_error_fraction,
                name=f"embedding {kind}",
            )  # fmt: skip
        recipe = decoder_recipe(preset, config.seed, victim, folder, held_index, config.limits)
        optimisation = _Optimisation(
            preset.optimiser, preset.learning_rate, preset.weight_decay, preset.warmup_steps, preset.schedule,
            preset.clip_norm,
        )  # fmt: skip
        result = _fit(folder, config, recipe, optimisation, plan, preset.epochs)
        done = finish(folder, own, {**result, "victim": victim.fingerprint})
    use = done["export"]
    return (
        f"decoder: {done['steps']:,} steps on {done['num_samples']:,} samples, held-out error {use['error_true']:.4f} "
        f"with the image's own embedding, {use['error_shuffled']:.4f} with another's -> {folder}"
    )


def decoder_recipe(
    preset: DecoderPreset, seed: int, victim: Victim, folder: Path, held_index: list[feed.ChunkRef], limits: Limits
) -> _DecoderRecipe:
    """The decoder's objective and data, once the folder holds the embeddings of training and held-out samples."""
    parts = folder / "embeddings" / "train"
    scale = _embedding_scale(parts)
    return _DecoderRecipe(
        preset, seed, victim.image_size, victim.embedding_dim, victim.fingerprint, scale, parts,
        folder / "embeddings" / "holdout", held_index, limits,
    )  # fmt: skip


class EmbedWork:
    """The pass that embeds: one float32 vector of width E per sample."""

    def __init__(self, victim_config: VictimConfig):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.victim = load_victim(victim_config).to(self.device)
        self.image_size = self.victim.image_size
        self.columns = {"embedding": pa.list_(pa.float32(), self.victim.embedding_dim)}

    def __call__(self, chunk: Chunk) -> dict[str, Any]:
        image_BCHW = clip.to_unit_range(torch.tensor(chunk.image_BHWC).to(self.device))
        return {"embedding": list(self.victim(image_BCHW).cpu().numpy())}


def _embedding_scale(parts: Path) -> float:
    """One over the root mean square of the embeddings of the first chunk that has any."""
    for path in sorted(parts.glob("parts/*/[0-9]*.parquet")):
        embeddings = pq.read_table(path)["embedding"].drop_null()
        if len(embeddings):
            break
    else:
        raise Mistake("not one sample of the decoder's shards can be used; score them to see the reasons")
    values = np.stack(embeddings.to_numpy())
    return float(1 / max(np.sqrt(np.mean(np.square(values))), 1e-6))


# ------------------------------------------------------------------------------------------------ recipes


@dataclass(frozen=True)
class _ClipRecipe:
    """What the loop needs to know of CLIP training; travels to the workers."""

    section: ClipTrain
    described: dict[str, Any]
    limits: Limits
    seed: int

    def objective(self, rank: int, world: int) -> Contrastive:
        objective = Contrastive(clip.build_clip(self.described), self.described, rank=rank, world=world)
        if self.section.init is not None:
            clip.load_clip_weights(objective.model, self.section.init)
        return objective

    def decode(self, ref: feed.ChunkRef, epoch: int, start: int, samples: list[Sample]) -> feed.Columns:
        images, captions, ids = [], [], []
        size, augmentation = clip.image_size_px(self.described), self.section.augmentation
        for sample in samples:
            if sample.error is None and sample.caption is not None and sample.image is not None:
                try:
                    image_HWC = decode_image(sample.image, self.limits, enough_px=augmentation.decode_px(size))
                except BadSample:
                    continue
                name = sample_id(ref.shard.name, sample.key)
                rng = np.random.default_rng(sample_keys([name], self.seed, epoch).numpy().view(np.uint64))
                images.append(augmentation.apply(image_HWC, size, rng))
                captions.append(sample.caption)
                ids.append(name)
        text_cfg = self.described["model_cfg"]["text_cfg"]
        context_length, described_text = text_cfg.get("context_length", 77), json.dumps(text_cfg)
        tokens = [_tokens(described_text, caption) for caption in captions]
        return {
            "image": np.stack(images) if images else np.empty((0, size, size, 3), np.uint8),
            "tokens": np.stack(tokens) if tokens else np.empty((0, context_length), np.int64),
            "sample_id": np.array([name.encode() for name in ids], "S"),
        }

    def export(self, folder: Path, objective: nn.Module) -> dict[str, Any]:
        clip.save_clip(folder, objective.model, self.described)  # type: ignore[arg-type]
        return {}


@functools.lru_cache(maxsize=100_000)
def _tokens(text_cfg: str, caption: str) -> np.ndarray:
    return _tokenizer(text_cfg)([caption])[0].numpy()


@functools.lru_cache(maxsize=4)
def _tokenizer(text_cfg: str) -> Any:
    return clip.tokenizer({"model_cfg": {"text_cfg": json.loads(text_cfg)}})


@dataclass(frozen=True)
class _DecoderRecipe:
    """What the loop needs to know of decoder training; travels to the workers."""

    preset: DecoderPreset
    seed: int
    image_size: int
    embedding_dim: int
    victim: str
    embedding_scale: float
    train_parts: Path
    holdout_parts: Path
    holdout_index: list[feed.ChunkRef]
    limits: Limits

    def objective(self, rank: int, world: int) -> Reconstruction:
        decoder = MaskedDecoder(self.preset.shape, self.image_size, self.embedding_dim, self.embedding_scale)
        decoder.victim, decoder.has_null = self.victim, self.preset.null_rate > 0
        return Reconstruction(decoder, self.preset.mask_ratio, self.preset.null_rate, self.preset.trim_rate)

    def decode(self, ref: feed.ChunkRef, epoch: int, start: int, samples: list[Sample]) -> feed.Columns:
        return self._columns(self.train_parts, ref, epoch, start, samples)

    def _columns(self, parts: Path, ref: feed.ChunkRef, epoch: int, start: int, samples: list[Sample]) -> feed.Columns:
        stored = pq.read_table(part_path(parts, ref.shard.name, ref.number), columns=["sample_id", "embedding"])
        stored = stored.slice(start, len(samples))
        is_usable = stored["embedding"].is_valid().to_numpy(zero_copy_only=False)
        ids = [name for name, usable in zip(stored["sample_id"].to_pylist(), is_usable, strict=True) if usable]
        size = self.image_size
        images = [
            decode_image(sample.image, self.limits, size)  # type: ignore[arg-type]
            for sample, usable in zip(samples, is_usable, strict=True)
            if usable
        ]
        embeddings = stored["embedding"].combine_chunks().drop_null().flatten().to_numpy(zero_copy_only=False)
        return {
            "image": np.stack(images) if images else np.empty((0, size, size, 3), np.uint8),
            "embedding": embeddings.astype(np.float32, copy=False).reshape(-1, self.embedding_dim),
            "key": sample_keys(ids, self.seed, epoch).numpy(),
            "sample_id": np.array([name.encode() for name in ids], "S"),
        }

    def export(self, folder: Path, objective: nn.Module) -> dict[str, Any]:
        """Write the decoder, and check on held-out samples that it reads the embedding."""
        decoder = objective.decoder
        assert isinstance(decoder, MaskedDecoder)
        decoder.float().eval()
        save_decoder(folder, decoder, {"preset": self.preset.model_dump()})
        held: list[feed.Columns] = []
        for ref in self.holdout_index[:2]:
            samples = feed.read_samples(ref, 0, ref.num_samples, self.limits)
            held.append(self._columns(self.holdout_parts, ref, -1, 0, samples))
        batch = {k: torch.from_numpy(np.concatenate([part[k] for part in held])) for k in ("image", "embedding", "key")}
        return embedding_use(decoder, batch, self.preset.mask_ratio)


# ------------------------------------------------------------------------------------------------ the loop


@dataclass(frozen=True)
class _Optimisation:
    optimiser: Literal["adam", "adamw"]
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    schedule: Literal["constant", "cosine"]
    clip_norm: float

    def rate(self, step: int, num_steps: int) -> float:
        """Learning rate of a step: linear warm-up, then constant or a cosine to zero. A function of the step alone."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimiser == "adam":  # the paper's: L2 on everything
            return torch.optim.Adam(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        decayed = [p for p in model.parameters() if p.ndim >= 2 and p.requires_grad]
        spared = [p for p in model.parameters() if p.ndim < 2 and p.requires_grad]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.98), eps=1e-6)


@dataclass(frozen=True)
class _Run:
    """One complete description of a training run, as the workers get it."""

    recipe: _ClipRecipe | _DecoderRecipe
    optimisation: _Optimisation
    plan: feed.Plan
    num_steps: int
    folder: Path
    precision: str
    log_every: int
    seed: int
    limits: Limits
    workers: Workers
    threads: int


def _plan(config: TrainConfig, index: list[feed.ChunkRef], batch_size: int, shuffle: bool = True) -> feed.Plan:
    """Which samples make up which batch; settings that do not divide are found here, before anything is computed."""
    if config.lanes % config.workers.num_workers:
        raise Mistake(f"lanes {config.lanes} must be a multiple of workers.num_workers {config.workers.num_workers}")
    steps_per_window = max(1, round(1024 / (batch_size / config.lanes)))
    return feed.Plan(index, batch_size, config.lanes, config.seed, shuffle, min(steps_per_window, 16))


def _fit(
    folder: Path,
    config: TrainConfig,
    recipe: _ClipRecipe | _DecoderRecipe,
    optimisation: _Optimisation,
    plan: feed.Plan,
    epochs: float,
) -> dict[str, Any]:
    """Train one section to its end; resumes from the folder's last checkpoint."""
    workers = config.workers
    num_steps = max(1, round(plan.num_samples * epochs / plan.batch_size))
    threads = workers.threads_per_worker or max(1, (os.cpu_count() or 1) // workers.num_workers)
    use_gpu = workers.gpus_per_worker > 0
    cpus = ray.cluster_resources().get("CPU", 1)
    if cpus < 2 and workers.num_workers == 1:  # a single CPU is shared by the worker and its reader
        workers = workers.model_copy(update={"cpus_per_worker": 0.5, "read_cpus": 0.5})
    elif cpus < workers.num_workers * workers.cpus_per_worker + workers.read_cpus:
        raise Mistake(
            f"workers: {workers.num_workers} workers with {workers.cpus_per_worker:g} CPUs each and a reader with "
            f"{workers.read_cpus:g} do not fit into the cluster's {cpus:g} CPUs"
        )
    run = _Run(recipe, optimisation, plan, num_steps, folder, config.precision, config.log_every, config.seed,
               config.limits, workers, threads)  # fmt: skip
    environment = {"OMP_NUM_THREADS": str(threads)}
    if not use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"  # before deepspeed is imported; its backend is then gloo
    trainer = TorchTrainer(
        functools.partial(_train_loop, run),  # type: ignore[arg-type]  # Ray's hint forgets return values
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={
                "CPU": workers.cpus_per_worker,
                **({"GPU": workers.gpus_per_worker} if use_gpu else {}),
            },
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(  # type: ignore[call-arg]  # typed as the former RunConfig
            name="checkpoints",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    with _Progress(folder, num_steps):
        try:
            outcome = trainer.fit().return_value  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            raise _mistake_in(error) or error from None
    if "mistake" in outcome:
        raise Mistake(outcome["mistake"])
    return {**outcome, "num_samples": plan.num_samples, "steps": num_steps}


def _mistake_in(error: Any) -> Mistake | None:
    for failure in getattr(error, "worker_failures", {}).values():
        if isinstance(getattr(failure, "cause", failure), Mistake):
            return Mistake(str(getattr(failure, "cause", failure)))
    return None


def _train_loop(run: _Run) -> dict[str, Any]:
    """Runs in every worker: batches in, optimiser steps, checkpoints out. Rank 0's return value is the result."""
    import deepspeed

    # Its one C++ operator on CPU serves inference; without this line every machine would need a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)
    deepspeed.init_distributed()
    objective = run.recipe.objective(rank, world)
    engine, optimiser, *_ = deepspeed.initialize(
        model=objective, optimizer=run.optimisation.build(objective), config=_deepspeed_config(run, world)
    )
    if run.workers.zero_stage == 0:  # faster convolutions; the flat buffers of the other stages forbid it
        engine.module.to(memory_format=torch.channels_last)
    first_step = _restore(engine, run, world)
    outcome: dict[str, Any] = {"loss": math.nan}
    log = _MetricsLog(run, first_step) if rank == 0 else None
    rows = feed.batches(
        run.plan, first_step, run.num_steps, rank, world, run.limits, run.recipe.decode,
        run.workers.read_cpus, run.workers.readers,
    )  # fmt: skip
    waited = time.monotonic()
    for step, columns in rows:
        got = time.monotonic()
        # All randomness of a step, dropout say, follows from seed, step and rank: resuming repeats it.
        torch.manual_seed(hash((run.seed, step, rank)))
        batch = {
            name: torch.from_numpy(column.copy()).to(engine.device, non_blocking=True)
            for name, column in columns.items()
            if name not in {"sample_id", "num_unusable"}
        }
        loss, metrics = engine(batch)
        if not _all_finite(loss, world):
            return {"mistake": _non_finite(run, step, loss, columns, rank, world)}
        engine.backward(loss)
        for group in optimiser.param_groups:
            group["lr"] = run.optimisation.rate(step, run.num_steps)
        engine.step()
        engine.module.after_step()
        if log is not None:
            log.step(step, loss, metrics, columns, got - waited)
            outcome["loss"] = log.loss
        if (step + 1) % run.workers.checkpoint_every == 0 and step + 1 < run.num_steps:
            _checkpoint(engine, step + 1, rank, world)
        waited = time.monotonic()
    outcome["export"] = _export(engine, run, rank)
    return outcome


def _deepspeed_config(run: _Run, world: int) -> dict[str, Any]:
    return {
        "train_batch_size": run.plan.batch_size,
        "train_micro_batch_size_per_gpu": run.plan.batch_size // world,
        "gradient_clipping": run.optimisation.clip_norm,  # written out: DeepSpeed's own default is 1.0
        "zero_optimization": {"stage": run.workers.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": run.precision == "bf16"},
        "fp16": {"enabled": run.precision == "fp16"},
        "steps_per_print": 10**9,
    }


def _restore(engine: Any, run: _Run, world: int) -> int:
    """Load the last checkpoint, if there is one; returns the step to go on with."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        meta = json.loads((Path(folder) / "meta.json").read_text())
        if meta["world"] != world and run.workers.zero_stage > 0:
            raise Mistake(
                f"the checkpoint was written by {meta['world']} workers under ZeRO {run.workers.zero_stage}; "
                f"resume with workers.num_workers {meta['world']}"
            )
        engine.load_checkpoint(str(Path(folder) / "engine"), tag="state")
    return meta["step"]


def _checkpoint(engine: Any, step: int, rank: int, world: int) -> None:
    """All ranks save and report; Ray Train merges their files and commits when every rank has reported."""
    folder = tempfile.mkdtemp()
    try:
        engine.save_checkpoint(f"{folder}/engine", tag="state")
        if rank == 0:
            (Path(folder) / "meta.json").write_text(json.dumps({"step": step, "world": world}))
        ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _all_finite(loss: torch.Tensor, world: int) -> bool:
    is_finite = torch.isfinite(loss.detach()).float()
    if world > 1:
        torch.distributed.all_reduce(is_finite, op=torch.distributed.ReduceOp.MIN)
    return bool(is_finite)


def _non_finite(run: _Run, step: int, loss: torch.Tensor, columns: feed.Columns, rank: int, world: int) -> str:
    """Name the samples of all ranks whose loss is not finite; called by every rank."""
    mine = (float(loss), [name.decode() for name in columns["sample_id"].tolist()])
    everyone: list[Any] = [mine] * world
    if world > 1:
        torch.distributed.all_gather_object(everyone, mine)
    bad = [(value, ids) for value, ids in everyone if not math.isfinite(value)]
    path, ids = run.folder / f"non_finite_step_{step}.json", [name for _, names in bad for name in names]
    if rank == 0:
        write_json(path, {"step": step, "sample_ids": ids})
    return (
        f"the loss of step {step} is {bad[0][0]}; stopped before the step. The batch began with {ids[:3]}, all its "
        f"sample ids are in {path}. Lower learning_rate, or train in fp32"
    )


def _export(engine: Any, run: _Run, rank: int) -> dict[str, Any]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=run.workers.zero_stage == 3):
        if rank == 0:
            return run.recipe.export(run.folder, engine.module)
    return {}


# ------------------------------------------------------------------------------------------------ what is shown


class _MetricsLog:
    """Rank 0's metrics.jsonl: one JSON object every `log_every` steps; steps done again replace what they wrote."""

    def __init__(self, run: _Run, first_step: int):
        self.run, self.path, self.loss = run, run.folder / "metrics.jsonl", math.nan
        kept = []
        if first_step and self.path.is_file():
            kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] < first_step]
        self.path.write_text("".join(f"{line}\n" for line in kept))
        self._reset()

    def _reset(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.since, self.wait_s, self.unusable = time.monotonic(), 0.0, 0.0

    def step(
        self, step: int, loss: torch.Tensor, metrics: dict[str, Any], columns: feed.Columns, wait_s: float
    ) -> None:
        self.losses.append(loss.detach())
        self.wait_s += wait_s
        self.unusable += float(columns["num_unusable"].mean())
        if (step + 1) % self.run.log_every and step + 1 != self.run.num_steps:
            return
        elapsed = time.monotonic() - self.since
        self.loss = float(torch.stack(self.losses).mean())
        line = {
            "step": step,
            "loss": self.loss,
            "learning_rate": self.run.optimisation.rate(step, self.run.num_steps),
            "samples_per_s": len(self.losses) * self.run.plan.batch_size / elapsed,
            "input_wait_share": self.wait_s / elapsed,
            "unusable_share": self.unusable / len(self.losses),
            "samples_seen": (step + 1) * self.run.plan.batch_size,
            **{name: float(value) for name, value in metrics.items()},
        }
        with self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self._reset()


class _Progress:
    """Follows metrics.jsonl from the driver and logs a line now and then: step, loss, samples/s, time left."""

    def __init__(self, folder: Path, num_steps: int):
        self.folder, self.num_steps = folder, num_steps
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        logger.info("%s: %d steps", self.folder.name, self.num_steps)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        shown = -1
        while not self._stop.wait(5):
            try:
                last = json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])
            except (OSError, IndexError, ValueError):
                continue  # not written yet, or being written
            if last["step"] <= shown:
                continue
            shown = last["step"]
            left_s = (self.num_steps - shown - 1) * self._seconds_per_step(last)
            logger.info(
                "%s: step %d/%d, loss %.4f, %s samples/s, waiting for input %.0f %%, %s left",
                self.folder.name, shown + 1, self.num_steps, last["loss"], f"{last['samples_per_s']:,.0f}",
                100 * last["input_wait_share"], f"{left_s / 60:.1f} min" if left_s > 90 else f"{left_s:.0f} s",
            )  # fmt: skip

    @staticmethod
    def _seconds_per_step(last: dict[str, Any]) -> float:
        return last["samples_seen"] / (last["step"] + 1) / last["samples_per_s"]
