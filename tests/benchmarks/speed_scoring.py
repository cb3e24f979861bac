"""How near the score pass comes to its limit: the rate of bare loops on the same cores that do nothing else.

The limit is one process a core, each of which reads, decodes, and computes with one thread, from the first image to the
last: no cluster, no ledger, no waiting for other processes. Ours and the limit take turns, because machines drift; both
are timed when all of their processes are busy. The weights are random, which does not change the speed.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from dede_ray.data.images import decode_image
from dede_ray.data.ledger import KeyedShare
from dede_ray.data.passes import PassResources, run_pass, stage_shares
from dede_ray.data.shards import Limits, Sample, Shard, count_samples, iter_chunks, list_shards, sample_id, write_shards
from dede_ray.data.workers import Chunk
from dede_ray.detectors.dede import DeDe
from dede_ray.ingest.sources import Digits
from dede_ray.models import clip
from dede_ray.models.decoder import DecoderShape, MaskedDecoder, save_decoder
from dede_ray.models.embedding import Encoding
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.runtime.config import Config, read_json
from dede_ray.scan.score import NUM_KEPT, ScoreWork
from dede_ray.training.reconstruction import PRESETS
from tests.benchmarks.baseline import photographs


class ScoringSpeed(Config):
    """The score pass beside bare loops on the same cores."""

    model: str = "configs/models/clip_cifar10.json"
    """The victim's architecture."""
    decoder: DecoderShape = PRESETS["tiny"].shape
    """DeDe's network."""
    shards: str | None = None
    """Shards to score; null makes up digits, for images of more than 64 px JPEGs with a photograph's spectrum."""
    num_samples: int = Field(20_000, ge=1)
    """Samples of one turn, if they are made up."""
    chunk_size: int = Field(256, ge=1)
    repeats: int = Field(3, ge=1)
    """Turns each; the median counts."""
    actors: list[int] = Field([1])
    """Numbers of single-threaded actors whose rates are compared with that of one for each core."""


def compare_scoring(config: ScoringSpeed) -> str:
    """Measure; Ray must be running.

    Returns:
        A few lines: ours, the limit, their ratio; how the rate grows with the actors; where the time goes.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_cpus = os.cpu_count() or 1
        shards, arguments, image_px = _prepared(config, folder, num_cpus)
        numbers = [num for num in config.actors if num != num_cpus]
        ours: dict[int, list[float]] = {num: [] for num in (*numbers, num_cpus)}
        limits, shares = [], ""
        for turn in range(config.repeats):
            for num, rates in ours.items():
                rate, shares = _ours(config, shards, arguments, image_px, folder / f"{turn}-{num}", num)
                rates.append(rate)
            limits.append(_limit(config, shards, arguments, num_cpus))
    ratios = [a / b for a, b in zip(ours[num_cpus], limits, strict=True)]
    lines = [
        f"{config.model}, {image_px} px, dede of {config.decoder.encoder_depth} + {config.decoder.decoder_depth} "
        f"blocks, {num_cpus} cores, median of {config.repeats} turns",
        f"score pass: {statistics.median(ours[num_cpus]):,.1f} images/s, limit {statistics.median(limits):,.1f}, "
        f"ratio {statistics.median(ratios):.3f} (turns: {', '.join(f'{ratio:.3f}' for ratio in ratios)})",
    ]
    for num in numbers:
        growth = [a / b for a, b in zip(ours[num_cpus], ours[num], strict=True)]
        lines.append(
            f"{num_cpus} actors give {statistics.median(growth):.2f} x the rate of {num} "
            f"(turns: {', '.join(f'{ratio:.2f}' for ratio in growth)})"
        )
    return "\n".join([*lines, shares])


def pass_rate(config: ScoringSpeed, folder: Path) -> float:
    """Samples a second of one turn of the pass on all cores."""
    num_cpus = os.cpu_count() or 1
    shards, arguments, image_px = _prepared(config, folder, num_cpus)
    return _ours(config, shards, arguments, image_px, folder / "pass", num_cpus)[0]


def _prepared(config: ScoringSpeed, folder: Path, num_cpus: int) -> tuple[list[Shard], dict[str, Any], int]:
    """Shards, the arguments of `ScoreWork`, and the victim's image size."""
    victim = write_victim(folder / "victim", config.model)
    write_decoder(folder / "decoder", victim, config.decoder)
    image_px = load_victim(victim).image_size
    shards = list_shards(config.shards) if config.shards else _made_up(folder / "shards", config, image_px, num_cpus)
    arguments = {
        "encoding": Encoding(victim, None, frozenset({"image"})),
        "detectors": [DeDe(decoder=str(folder / "decoder"))],
        "states": [None],
    }
    return shards, arguments, image_px


def write_victim(folder: Path, model: str) -> OpenClipVictim:
    """A CLIP of random weights."""
    described = clip.model_description(model)
    clip.save_clip(folder, clip.build_clip(described), described)
    return OpenClipVictim(path=str(folder))


def write_decoder(folder: Path, victim_config: Any, shape: DecoderShape) -> None:
    """A decoder of random weights for a victim."""
    victim = load_victim(victim_config)
    decoder = MaskedDecoder(shape, victim.image_size, victim.embedding_dim, has_reverse=True)
    decoder.victim, decoder.has_null = victim.fingerprint, True
    save_decoder(folder, decoder, {})


def repeated(images: list[Sample], num_samples: int, first: int = 0) -> Iterator[Sample]:
    """So many samples of a few images, under keys of their own."""
    for i in range(first, first + num_samples):
        image = images[i % len(images)]
        yield Sample(f"{i:09d}", i, image=image.image, image_suffix=image.image_suffix, caption="a picture")


def digits() -> list[Sample]:
    """The bundled digits."""
    return list(Digits(calibration=0, test=0).read(0, Limits())["train"])


def _made_up(folder: Path, config: ScoringSpeed, image_px: int, num_cpus: int) -> list[Shard]:
    images = digits() if image_px <= 64 else list(photographs())
    per_shard = -(-config.num_samples // (2 * num_cpus))
    write_shards(folder, "train", repeated(images, config.num_samples), per_shard)
    return list_shards(str(folder))


def _ours(
    config: ScoringSpeed, shards: list[Shard], arguments: dict[str, Any], image_px: int, output: Path, num_actors: int
) -> tuple[float, str]:
    """The whole pass, as the score job does it: from when all actors have begun to the last part of all."""
    keep = KeyedShare(min(1.0, NUM_KEPT / max(1, count_samples(shards))), 0)
    run_pass(
        shards, output, ScoreWork, {**arguments, "keep": keep}, image_size=image_px, made_with={},
        chunk_size=config.chunk_size, limits=Limits(), max_error_fraction=0.0, name=f"{num_actors} actors",
        resources=PassResources(min_actors=num_actors, threads_per_actor=1),
    )  # fmt: skip
    times = np.sort([path.stat().st_mtime for path in output.glob("parts/*/*.parquet")])
    skip = min(2 * num_actors, len(times) // 4)  # while actors still start
    rate = (len(times) - 1 - skip) * config.chunk_size / (times[-1] - times[skip])
    return float(rate), stage_shares(read_json(output / "timing.json", "timing")["stages"])


def _limit(config: ScoringSpeed, shards: list[Shard], arguments: dict[str, Any], num_cpus: int) -> float:
    """The sum of the rates of one process a core, each with the same number of samples."""
    context = multiprocessing.get_context("spawn")
    start, finished = context.Barrier(num_cpus), context.SimpleQueue()
    processes = [
        context.Process(target=_bare, args=(shards[i::num_cpus], config.chunk_size, arguments, start, finished.put))
        for i in range(num_cpus)
    ]
    for process in processes:
        process.start()
    counts = [finished.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(done / seconds for done, seconds in counts)


def _bare(
    shards: list[Shard], chunk_size: int, arguments: dict[str, Any], start: Barrier, report: Callable[[Any], None]
) -> None:
    """Read, decode, forward, score: one chunk after the other, with one thread."""
    torch.set_num_threads(1)
    work = ScoreWork(**arguments)

    def do(shard: Shard, chunk: list[Sample]) -> None:
        images = [decode_image(sample.image or b"", Limits(), work.image_size) for sample in chunk]
        work(Chunk([sample_id(shard.name, s.key) for s in chunk], np.stack(images), [s.caption for s in chunk]))

    first = next(iter_chunks(shards[0], chunk_size, Limits()))
    do(shards[0], first)  # warms up
    start.wait()
    done, began = 0, time.monotonic()
    for shard in shards:
        for chunk in iter_chunks(shard, chunk_size, Limits()):
            do(shard, chunk)
            done += len(chunk)
    report((done, time.monotonic() - began))
