"""The frame of jobs/train_clip.py and jobs/train_simclr.py: an encoder's section of the YAML, then the decoder's.

clip.py and simclr.py say what is particular about their encoder (`EncoderSection`), decoder.py trains the decoder, and
loop.py does the training itself. Each section leaves in its folder: `metrics.jsonl` (one JSON object per logged step),
`curve.png`, `checkpoints/` (what resuming needs) and a tensor-only export that the other jobs read. Running the same
command again resumes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dede_ray.data.shards import Limits
from dede_ray.data.unread import hint
from dede_ray.models.victims import VictimConfig
from dede_ray.runtime.config import Mistake, claim, finish
from dede_ray.runtime.lease import leased
from dede_ray.runtime.session import start_ray
from dede_ray.training import dataloader
from dede_ray.training.decoder import SectionSettings, train_decoder
from dede_ray.training.loop import Recipe, Run, check_workers, fit


@dataclass(frozen=True)
class EncoderSection:
    """What is particular about training one kind of encoder."""

    name: str
    """Name of its section, and of its folder."""
    monitor: str
    """The section's setting that measures while it trains; changing it does not make it another run."""
    prepare: Callable[[Any], tuple[Recipe, dataloader.Plan]]
    """Resolves the job's settings: what is trained, and on what."""
    victim: Callable[[str], VictimConfig]
    """Names the encoder in a folder."""
    samples: str = "samples"
    shown: tuple[str, ...] = ()
    """Measurements that the job's line ends with."""


def train_sections(config: SectionSettings, kind: EncoderSection) -> str:
    """Train the sections that the config has: the encoder's, then the decoder's against it.

    Returns:
        One line per section: what was trained and where it lies.

    Raises:
        Mistake: nothing to train, or settings, shards or checkpoints that do not fit.
    """
    start_ray(config)
    config.tracking.check()
    with leased(Path(config.output).absolute()):
        return _train_sections(config, kind)


def _train_sections(config: SectionSettings, kind: EncoderSection) -> str:
    section, folder, lines = getattr(config, kind.name), Path(config.output, kind.name), []
    if section is None and config.decoder is None:
        raise Mistake(f"nothing to train: the config needs a `{kind.name}:` section, a `decoder:` section, or both")
    if section is not None:
        lines.append(_train_encoder(config, kind, section))
    if config.decoder is not None:
        if config.decoder.victim is None and section is None and not folder.is_dir():
            raise Mistake(
                "decoder.victim is not set, and this run trains no encoder to take its place; set it, or add a "
                f"`{kind.name}:` section"
            )
        own = config.identity(**{kind.name: None})  # a decoder depends on its victim, not on what once trained it
        lines.append(train_decoder(config, config.decoder, kind.victim(str(folder)), own))
    return "\n".join(lines)


def _train_encoder(config: SectionSettings, kind: EncoderSection, section: Any) -> str:
    folder = Path(config.output).absolute() / kind.name
    own = config.identity(decoder=None, **{kind.name: section.model_copy(update={kind.monitor: None})})
    done = claim(folder, own)
    if done is None:
        check_workers(config.lanes, section.batch_size, section.accumulation, config.workers)
        recipe, plan = kind.prepare(config)
        with torch.random.fork_rng():  # what cannot be built or loaded is a mistake to report here, not in a worker
            recipe.objective(0, 1)
        monitor = getattr(section, kind.monitor)
        every = monitor.every if monitor else None
        done = finish(folder, own, fit(Run(config, recipe, section, plan, folder, section.accumulation, every)))
    numbers = [f"{name} {value:.1%}" for name, value in done.get("validation", {}).items() if name in kind.shown]
    listing = ", ".join([f"loss {done['loss']:.3f}", *numbers])
    return f"{kind.name}: {done['steps']:,} steps on {done['num_samples']:,} {kind.samples}, {listing} -> {folder}"


def refuse_unfit(index: list[dataloader.ChunkRef], limits: Limits, with_captions: bool = False) -> None:
    """Find at once, not after a start on a cluster, that shards are of the wrong kind: a look at the first chunk.

    Raises:
        Mistake: there is no sample, or none with an image (and a caption).
    """
    if not index:
        raise Mistake("the shards hold not one sample; write some with jobs/ingest.py")
    samples = dataloader.read_samples(index[0], 0, index[0].num_samples, limits)
    if any(sample.image is not None and (not with_captions or sample.caption is not None) for sample in samples):
        return
    reasons = Counter(one.error or ("no_image" if one.image is None else one.why_no_caption) for one in samples)
    listing = ", ".join(f"{reason}: {n}" for reason, n in reasons.most_common())
    what, advice = "an image", hint(index[0].shard, limits, "image")
    if with_captions:
        what = "an image and a caption"
        advice = (
            advice
            or hint(index[0].shard, limits, "caption")
            or ("; CLIP trains on images with a .txt beside them, which jobs/ingest.py writes, also from labels")
        )
    raise Mistake(f"none of the first {len(samples)} samples of {index[0].shard.name} has {what} ({listing}){advice}")
