"""How fast our passes are beside other programs that do the same work, in one run on one machine.

    python -m tests.benchmarks.speed tests/benchmarks/speed.yaml

A config has one section for each comparison, of which it may hold several:

    trainers    our CLIP trainer beside open_clip's own (baseline.py): speed_clip.yaml, speed_clip_gpu.yaml
    loops       the decoder's training beside a bare PyTorch loop over the same batches in memory: speed.yaml
    scoring     the score pass beside bare loops on the same cores (speed_scoring.py): speed.yaml
    deciding    what company and the classifier add to the pass (speed_deciding.py): speed.yaml
    ingest      the writing of shards beside webdataset's ShardWriter: a config of the line `ingest: {}`
    sift        sifting beside the plain copying of the same shards: speed_sift.yaml
    detectors   embedding with five detectors attached beside embedding alone: speed_detectors.yaml
    reference   training and scoring beside the code of DeDe's authors (speed_reference.py): speed_dede.yaml

Ours and theirs take turns, because machines drift; the figures that count are the ratios. The images are the bundled
digits, repeated under distinct keys, unless a section names shards; the weights are random, which does not change the
speed.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from pydantic import Field

from dede_ray.data.images import decode_image
from dede_ray.data.ledger import BASE_SCHEMA
from dede_ray.data.shards import (
    Limits,
    Sample,
    Shard,
    iter_chunks,
    iter_samples,
    list_shards,
    open_shard,
    sample_id,
    write_shards,
)
from dede_ray.data.workers import Chunk
from dede_ray.detectors.asset import Asset
from dede_ray.detectors.clip_score import CaptionScore
from dede_ray.detectors.consistency import Consistency
from dede_ray.detectors.contract import DetectorSettings
from dede_ray.detectors.dede import DeDe
from dede_ray.detectors.density import Density
from dede_ray.detectors.isolation_forest import Forest
from dede_ray.ingest.ingest import IngestConfig, ingest
from dede_ray.ingest.sources import Digits
from dede_ray.models.decoder import DecoderShape
from dede_ray.models.embedding import Batch, EmbedWork, Encoding, Need
from dede_ray.models.encoders import Described, Timm, build_encoder, save_encoder
from dede_ray.models.victims import EncoderVictim, OpenClipVictim, load_victim
from dede_ray.runtime.cli import run_job
from dede_ray.runtime.config import Config, Mistake
from dede_ray.runtime.session import start_ray
from dede_ray.scan.manifest import DECISION_COLUMNS, write_manifest
from dede_ray.scan.score import ScoreWork, fit_state
from dede_ray.scan.sift import SiftConfig, sift, sift_shard
from dede_ray.training import dataloader
from dede_ray.training.clip import TrainConfig, train
from dede_ray.training.dataloader import CHUNK_SIZE
from dede_ray.training.decoder import DecoderTrain, decoder_recipe
from dede_ray.training.reconstruction import PRESETS, Reconstruction
from tests.benchmarks.baseline import TrainerSpeed, compare_trainers, photographs
from tests.benchmarks.speed_deciding import DecidingSpeed, compare_deciding
from tests.benchmarks.speed_reference import ReferenceSpeed, compare_with_reference
from tests.benchmarks.speed_scoring import ScoringSpeed, compare_scoring, digits, repeated, write_decoder, write_victim


class LoopSpeed(Config):
    """Decoder training beside a bare loop."""

    model: str = "configs/models/clip_digits.json"
    """The victim's architecture."""
    preset: Literal["tiny", "paper", "fast"] = "tiny"
    """The decoder's preset."""
    num_samples: int = Field(20_000, ge=1000)
    steps: int = Field(120, ge=40)
    """Training steps of one turn."""
    repeats: int = Field(3, ge=1)
    """Turns of each side; the median counts."""


class IngestSpeed(Config):
    """Ingestion of image files beside webdataset's ShardWriter in as many processes."""

    shards: str | None = None
    """Shards whose images are laid out as files; null makes JPEGs with a photograph's spectrum."""
    num_samples: int = Field(6000, ge=100)
    """Files; the images are repeated to make so many."""
    samples_per_shard: int = Field(250, ge=1)
    repeats: int = Field(3, ge=1)


class SiftSpeed(Config):
    """Sifting beside the plain copying of the same shards, which are in the page cache."""

    num_shards: int = Field(8, ge=1)
    samples_per_shard: int = Field(2_000, ge=1)
    sample_bytes: int = Field(50_000, ge=1)
    """Size of one image, random bytes; each has a caption and a .json beside it."""
    drop: float = Field(0.06, gt=0, lt=1)
    """Share of the samples that are dropped, scattered over the shards."""
    reaches_disk: bool = False
    """A turn ends when its bytes are on the disk, not in the page cache."""
    repeats: int = Field(5, ge=1)
    """Turns each; the median counts."""


class DetectorSpeed(Config):
    """The score pass's work on one core with five detectors attached beside that of embedding alone.

    The detectors are dede, density, isolation_forest, consistency (closed form) and a fifth. The times of
    the reference encoder and of the text tower, which no other part needs, are shown separately. All weights are random
    and detectors are fitted to random embeddings, which does not change their speed.
    """

    model: str = "configs/models/clip_cifar10.json"
    """The victim's architecture."""
    reference: str = "mobilenetv3_small_100"
    """The reference encoder, by timm's name."""
    decoder: DecoderShape = PRESETS["tiny"].shape
    """DeDe's network."""
    fifth: Literal["clip_score", "asset"] = "clip_score"
    """One that needs the text tower, or one that needs no other encoder."""
    dede_masks: int = Field(4, ge=1)
    """DeDe's `num_masks`."""
    shards: str | None = None
    """Captioned shards to score; null makes up digits, for images of more than 64 px JPEGs with a photograph's
    spectrum, and captions of a dozen words."""
    num_samples: int = Field(1024, ge=1)
    """Samples of one turn."""
    chunk_size: int = Field(256, ge=1)
    repeats: int = Field(5, ge=1)
    """Turns each; the median counts."""


class SpeedConfig(Config):
    """Settings of `python -m tests.benchmarks.speed`; None or an empty list leaves a comparison out."""

    output: str = "runs/speed"
    """Folder for shards, settings and logs of `trainers`; the commands that are printed can be run again there."""
    trainers: list[TrainerSpeed] = Field([])
    loops: LoopSpeed | None = None
    scoring: list[ScoringSpeed] = Field([])
    deciding: DecidingSpeed | None = None
    ingest: IngestSpeed | None = None
    sift: SiftSpeed | None = None
    detectors: list[DetectorSpeed] = Field([])
    reference: ReferenceSpeed | None = None


def measure_speed(config: SpeedConfig) -> str:
    """Measure what the config names.

    Returns:
        A few lines per comparison: ours, the other's, and their ratio.
    """
    start_ray(config)
    if all(not getattr(config, name) for name in SpeedConfig.model_fields if name != "output"):
        raise Mistake(
            "nothing to measure: the config needs one of "
            + ", ".join(f"`{name}:`" for name in SpeedConfig.model_fields if name != "output")
        )
    tables = [compare_trainers(trainers, Path(config.output)) for trainers in config.trainers]
    if config.loops is not None:
        tables.append(_compare_loops(config.loops))
    tables += [compare_scoring(scoring) for scoring in config.scoring]
    if config.deciding is not None:
        tables.append(compare_deciding(config.deciding))
    if config.ingest is not None:
        tables.append(_compare_ingest(config.ingest))
    if config.sift is not None:
        tables.append(_compare_sifting(config.sift, Path(config.output)))
    tables += [_compare_attached(detectors) for detectors in config.detectors]
    if config.reference is not None:
        tables.append(compare_with_reference(config.reference, Path(config.output)))
    return "\n\n".join(tables)


def _compare_loops(config: LoopSpeed) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = _write_shards(folder / "shards", config.num_samples)
        victim = write_victim(folder / "victim", config.model)
        line = _compare_training(config, folder, shards, victim)
    about = f"{os.cpu_count()} CPUs, {config.num_samples:,} images, preset {config.preset}"
    return f"{about}, median of {config.repeats} turns\n{line}"


def _write_shards(folder: Path, num_samples: int) -> list[Shard]:
    write_shards(folder, "train", repeated(digits(), num_samples), max(1000, num_samples // 8))
    return list_shards(str(folder))


def _line(what: str, ours: list[float], bare: list[float]) -> str:
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    return (
        f"{what}: {statistics.median(ours):,.0f} images/s, bare loop {statistics.median(bare):,.0f}, ratio {ratio:.2f} "
        f"(turns: {', '.join(f'{a / b:.2f}' for a, b in zip(ours, bare, strict=True))})"
    )


# ------------------------------------------------------------------------------------------------ training


def _compare_training(config: LoopSpeed, folder: Path, shards: list[Shard], victim_config: OpenClipVictim) -> str:
    preset = PRESETS[config.preset]
    batch_size = preset.batch_size
    index = dataloader.index_shards(shards, CHUNK_SIZE)
    num_samples = sum(ref.num_samples for ref in index)
    ours, bare = [], []
    for turn in range(config.repeats):
        output = folder / f"run-{turn}"
        settings = TrainConfig(
            output=str(output),
            decoder=DecoderTrain(
                shards=str(folder / "shards"),
                victim=victim_config,
                preset=config.preset,
                epochs=config.steps * batch_size / num_samples,
            ),
            log_every=10,
        )
        train(settings)
        lines = [json.loads(line) for line in (output / "decoder" / "metrics.jsonl").read_text().splitlines()]
        ours.append(_rate([line["samples_per_s"] for line in lines[1:-1]]))  # neither the start nor a short last one
        bare.append(_bare_training(config, settings, output, index, load_victim(victim_config)))
    return _line("decoder training, Ray Train + DeepSpeed", ours, bare)


def _rate(rates: list[float]) -> float:
    """Rate over equal numbers of samples: the harmonic mean."""
    return len(rates) / sum(1 / rate for rate in rates)


def _bare_training(
    config: LoopSpeed, settings: TrainConfig, output: Path, index: list[dataloader.ChunkRef], victim: object
) -> float:
    """Forward, backward, clip, step, over batches that are in memory already."""
    preset, seed = PRESETS[config.preset], settings.seed
    recipe = decoder_recipe(preset, seed, victim, output / "decoder", index, settings.limits)  # type: ignore[arg-type]
    plan = dataloader.Plan(index, preset.batch_size, settings.lanes, seed, preset.shuffle, 4, preset.epochs)
    windows = (
        dataloader.read_window(plan, list(range(plan.lanes)), w, settings.limits, recipe.decode) for w in range(8)
    )
    batches = [
        {
            name: torch.from_numpy(column.copy())
            for name, column in columns.items()
            if name in {"image", "embedding", "key"}
        }
        for columns in itertools.chain.from_iterable(windows)
    ]
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(seed)
    objective: Reconstruction = recipe.objective(0, 1)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=preset.learning_rate, weight_decay=preset.weight_decay)
    warm_up, started = 10, 0.0
    for step in range(config.steps):
        if step == warm_up:
            started = time.monotonic()
        loss, _ = objective(batches[step % len(batches)])
        optimiser.zero_grad()
        loss.backward()
        if preset.clip_norm:
            torch.nn.utils.clip_grad_norm_(objective.parameters(), preset.clip_norm)
        optimiser.step()
    return (config.steps - warm_up) * preset.batch_size / (time.monotonic() - started)


# ------------------------------------------------------------------------------------------------ detectors


def _compare_attached(config: DetectorSpeed) -> str:
    """In this process, on one thread and in its own seconds of computing: the machine may have other work."""
    num_threads, laps = torch.get_num_threads(), Counter[str]()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            alone = EmbedWork(Encoding(write_victim(folder / "victim", config.model), None, frozenset()))
            attached = _attach(config, folder, laps)
            samples = _captioned(config, alone.image_size)
            turns: list[tuple[float, float, Counter[str]]] = []
            for _ in range(1 + config.repeats):  # the first one only warms up
                embed_s = _lasts(config, samples, alone)
                laps.clear()
                turns.append((embed_s, _lasts(config, samples, attached), Counter(laps)))
    finally:
        torch.set_num_threads(num_threads)
    turns = turns[1:]
    rate, ratio = (
        statistics.median(len(samples) / embed_s for embed_s, _, _ in turns),
        statistics.median(embed_s / score_s for embed_s, score_s, _ in turns),
    )
    bare = statistics.median(
        embed_s / (score_s - sum(spent[name] for name in ENCODERS)) for embed_s, score_s, spent in turns
    )
    shares = {
        name: statistics.median(spent[name] / embed_s for embed_s, _, spent in turns) for name in turns[0][2]
    }  # fmt: skip
    return "\n".join(
        [
            f"{config.model}, {attached.image_size} px, reference {config.reference}, one thread, chunks of "
            f"{config.chunk_size}, median of {config.repeats} turns of {len(samples):,} images, random weights",
            f"embedding alone, JPEG to float32: {rate:,.1f} images/s; with five detectors ratio {ratio:.3f} "
            f"(turns: {', '.join(f'{embed_s / score_s:.3f}' for embed_s, score_s, _ in turns)})",
            f"without what other encoders take, the five alone: ratio {bare:.3f}, cost {1 - bare:.1%} of the rate",
            "time in units of the embedding's: "
            + ", ".join(f"{name} {share:.1%}" for name, share in sorted(shares.items(), key=lambda one: -one[1])),
        ]
    )


ENCODERS = ("reference encoder", "text tower")


def _attach(config: DetectorSpeed, folder: Path, laps: Counter[str]) -> ScoreWork:
    """The victim with five detectors, and stopwatches in whatever they add."""
    victim = OpenClipVictim(path=str(folder / "victim"))
    architecture = Timm(name=config.reference)
    encoder, size = build_encoder(architecture), load_victim(victim).image_size
    save_encoder(folder / "reference", encoder, Described(architecture, size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    write_decoder(folder / "decoder", victim, config.decoder)
    detectors: list[DetectorSettings] = [
        DeDe(decoder=str(folder / "decoder"), num_masks=config.dede_masks),
        Density(),
        Forest(),
        Consistency(min_agreement=0),
        CaptionScore() if config.fifth == "clip_score" else Asset(epochs=1),
    ]
    widths = load_victim(victim).embedding_dim, int(encoder.embedding_dim)  # type: ignore[arg-type]
    suspected, states = _made_up(*widths), []
    for one in detectors:
        path = folder / f"{one.label}.safetensors"
        fit_state(one, suspected, suspected.part(range(256)), "", path)
        states.append(str(path) if one.fits else None)
    needs: frozenset[Need] = frozenset().union(*(one.needs for one in detectors))
    work = ScoreWork(Encoding(victim, EncoderVictim(path=str(folder / "reference")), needs), detectors, states)
    encoders: Any = work.encoders
    encoders.reference.forward = _stopwatch(laps, ENCODERS[0], encoders.reference.forward)
    if "caption" in needs:
        encoders.victim.encode_text = _stopwatch(laps, ENCODERS[1], encoders.victim.encode_text)
    for one, scorer in zip(detectors, work.scorers, strict=True):
        scorer.score = _stopwatch(laps, one.label, scorer.score)  # type: ignore[method-assign]
    return work


def _made_up(width: int, reference_width: int) -> Batch:
    """A fitting set of normal noise in which one encoder's embeddings partly predict the other's."""
    rng, num = torch.Generator().manual_seed(0), max(4096, 2 * reference_width)
    reference_NR = torch.randn(num, reference_width, generator=rng)
    noise_NE, caption_NE = torch.randn(2, num, width, generator=rng)
    embedding_NE = reference_NR @ torch.randn(reference_width, width, generator=rng) / reference_width**0.5 + noise_NE
    return Batch([f"{i}" for i in range(num)], embedding_NE, None, reference_NR, caption_NE)


def _stopwatch(laps: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        started = time.thread_time()
        result = function(*arguments)
        laps[name] += time.thread_time() - started  # type: ignore[assignment]
        return result

    return timed


def _captioned(config: DetectorSpeed, size_px: int) -> list[Sample]:
    """As many samples as a turn takes, each with a caption; images are repeated if there are fewer."""
    if config.shards is not None:
        found = (s for shard in list_shards(config.shards) for s in iter_samples(open_shard(shard), Limits()))
        images = [s for s in itertools.islice(found, config.num_samples) if s.error is None and s.image is not None]
    else:
        images = [*(Digits(calibration=0, test=0).read(0, Limits())["train"] if size_px <= 64 else photographs())]
    return [
        replace(like, key=f"{i:06d}", caption=like.caption or f"photograph {i} of two people at a table in a kitchen")
        for i, like in ((i, images[i % len(images)]) for i in range(config.num_samples))
    ]


def _lasts(config: DetectorSpeed, samples: list[Sample], work: EmbedWork | ScoreWork) -> float:
    """Seconds that this thread computes: decode, embed, score, one chunk after the other."""
    started = time.thread_time()
    for start in range(0, len(samples), config.chunk_size):
        chunk = samples[start : start + config.chunk_size]
        images = [decode_image(sample.image or b"", Limits(), work.image_size) for sample in chunk]
        work(Chunk([f"s.tar/{s.key}" for s in chunk], np.stack(images), [s.caption for s in chunk]))
    return time.thread_time() - started


# ------------------------------------------------------------------------------------------------ ingestion


def _compare_ingest(config: IngestSpeed) -> str:
    """Both read files, check that they decode, and write captioned, labelled shards; their processes run already."""
    num_cpus = len(os.sched_getaffinity(0))
    ours, plain = [], []
    with tempfile.TemporaryDirectory() as name, _plain_processes(num_cpus) as pool:
        folder = Path(name)
        files = _write_files(folder / "files", config)
        for turn in range(-1, config.repeats):  # the first one only warms up
            out = folder / f"{turn}"
            started = time.monotonic()
            source = {"kind": "folders", "splits": {"train": str(folder / "files")}}
            settings = {"source": source, "output": str(out / "ours"), "samples_per_shard": config.samples_per_shard}
            ingest(IngestConfig.model_validate(settings | {"workers": num_cpus}))
            between = time.monotonic()
            parts = [(str(out / f"plain-{i}"), files[i::num_cpus], config.samples_per_shard) for i in range(num_cpus)]
            written = sum(pool.map(_plain_ingest, parts))
            ended = time.monotonic()
            assert written == len(files), (written, len(files))
            if turn >= 0:
                ours.append(len(files) / (between - started))
                plain.append(len(files) / (ended - between))
    num_bytes = sum(size for _, _, size in files) / len(files)
    about = f"{num_cpus} CPUs, {len(files):,} files of {num_bytes / 1000:.0f} kB, median of {config.repeats} turns"
    return f"{about}\n{_line('ingestion', ours, plain).replace('bare loop', 'webdataset.ShardWriter')}"


def _plain_processes(num_cpus: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(num_cpus, multiprocessing.get_context("spawn"))


def _write_files(folder: Path, config: IngestSpeed) -> list[tuple[str, int, int]]:
    """Lay out images in ten class folders; returns path, label and size of each."""
    if config.shards is not None:
        images = [s for shard in list_shards(config.shards) for s in iter_samples(open_shard(shard), Limits())]
    else:
        images = list(photographs())
    files = []
    for i in range(config.num_samples):
        like = images[i % len(images)]
        path = folder / f"class {i % 10}" / f"{i:07d}.{like.image_suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(like.image or b"")
        files.append((str(path), i % 10, len(like.image or b"")))
    return files


def _plain_ingest(part: tuple[str, list[tuple[str, int, int]], int]) -> int:
    """The same work as a plain script does it."""
    import webdataset

    folder, files, samples_per_shard = part
    os.makedirs(folder)
    with webdataset.ShardWriter(f"{folder}/train-%05d.tar", maxcount=samples_per_shard, maxsize=1e12, verbose=0) as out:
        for path, label, _ in files:
            image = Path(path).read_bytes()
            decode_image(image, Limits(), size_px=32)
            stem, _, suffix = os.path.basename(path).partition(".")
            out.write({"__key__": stem, suffix: image, "txt": f"a photo of a class {label}", "cls": label})
    return len(files)


# ------------------------------------------------------------------------------------------------ sifting


def _compare_sifting(config: SiftSpeed, output: Path) -> str:
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as name:
        folder = Path(name)
        shards = _write_scored_shards(folder, config)
        num_bytes = sum(shard.num_bytes for shard in shards)
        rates: dict[str, list[float]] = {"copy": []}
        for turn in range(config.repeats):
            rates["copy"].append(
                num_bytes / _timed(config, folder / "copy", partial(_copy_shards, shards, folder / "copy"))
            )
            for what, work in (("one task after the other", _sift_here), ("the job", sift)):
                for verify in (False, True):
                    settings = SiftConfig(
                        shards=str(folder / "shards"),
                        manifest=str(folder / "scores"),
                        output=str(folder / f"sifted-{turn}"),
                        verify=verify,
                    )
                    lasted = _timed(config, Path(settings.output), partial(work, settings))
                    kept = num_bytes * (1 - config.drop)  # samples are of one size
                    rates.setdefault(f"{what}{', verify: true' if verify else ''}", []).append(kept / lasted)
    copy = rates.pop("copy")
    lines = [
        f"{num_bytes / 1e9:.1f} GB in {len(shards)} shards, {config.sample_bytes:,} bytes an image, {config.drop:.0%} "
        f"dropped, {ray.cluster_resources()['CPU']:g} CPUs, "
        f"{'onto the disk' if config.reaches_disk else 'within the page cache'}, median of {config.repeats} turns"
    ]
    for what, ours in rates.items():
        ratios = [a / b for a, b in zip(ours, copy, strict=True)]
        lines.append(
            f"sift, {what}: {statistics.median(ours) / 1e6:,.0f} MB/s kept, copy {statistics.median(copy) / 1e6:,.0f}, "
            f"ratio {statistics.median(ratios):.2f} (turns: {', '.join(f'{ratio:.2f}' for ratio in ratios)})"
        )
    return "\n".join(lines)


def _write_scored_shards(folder: Path, config: SiftSpeed) -> list[Shard]:
    """Shards of noise, and a manifest that flags a part of them."""
    rng = np.random.default_rng(0)
    note = {"json": b'{"url": "http://localhost/x.jpg", "width": 256, "height": 256}'}
    num = config.num_shards * config.samples_per_shard
    samples = (
        Sample(f"{i:08d}", i, rng.bytes(config.sample_bytes), "jpg", caption="a photo of noise", others=note)
        for i in range(num)
    )
    write_shards(folder / "shards", "train", samples, config.samples_per_shard)
    shards = list_shards(str(folder / "shards"))
    flagged = np.zeros(num, bool)
    flagged[rng.choice(num, round(config.drop * num), replace=False)] = True
    schema = pa.schema([*BASE_SCHEMA, *(pa.field(*column) for column in DECISION_COLUMNS)])
    tables = []
    for number, shard in enumerate(shards):
        rows = [
            {
                "sample_id": sample_id(shard.name, sample.key),
                "content_hash": sample.content_hash(),
                "shard": shard.name,
                "index": sample.index,
                "flagged": bool(flagged[number * config.samples_per_shard + sample.index]),
            }
            for chunk in iter_chunks(shard, config.samples_per_shard, Limits())
            for sample in chunk
        ]
        tables.append((shard.name, pa.Table.from_pylist(rows, schema)))
    info = {
        "settings": {"limits": Limits().model_dump()},
        "victim": {},
        "score_columns": [],
        "decision": {"certified": True, "message": ""},
        "counts": {"flagged": int(flagged.sum())},
    }
    write_manifest(folder / "scores", tables, info)
    return shards


def _sift_here(settings: SiftConfig) -> None:
    """Sift without Ray, in this process, on one core."""
    for shard in list_shards(settings.shards):
        rows_path = Path(settings.manifest) / "manifest" / f"{shard.name}.parquet"
        rows = pq.read_table(rows_path, columns=["index", "flagged"])
        sift_shard(shard, rows_path, rows.filter(rows["flagged"])["index"].to_pylist(), Limits(), settings)


def _copy_shards(shards: list[Shard], folder: Path) -> None:
    for shard in shards:
        shutil.copyfile(shard.url, folder / shard.name)


def _timed(config: SiftSpeed, folder: Path, work: Callable[[], object]) -> float:
    """Seconds of work that fills a folder; the folder is removed afterwards."""
    os.sync()  # what was written before is not part of it
    folder.mkdir()
    started = time.monotonic()
    work()
    if config.reaches_disk:
        for path in folder.glob("*.tar"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    lasted = time.monotonic() - started
    shutil.rmtree(folder)
    return lasted


if __name__ == "__main__":
    run_job(SpeedConfig, measure_speed, "python -m tests.benchmarks.speed", sys.argv[1:])
