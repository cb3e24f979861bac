"""Several jobs in a row, in one process: what `make demo` does.

A step is the command line of a job without `python jobs/`: `score configs/score_digits.yaml --decision.q 0.05`. The
steps meet in files, each does only what its output folder still lacks, so a pipeline can be stopped and run again.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from dede_ray.attacks import PoisonConfig, poison
from dede_ray.config import Config, Mistake, load
from dede_ray.report import EvaluateConfig, evaluate
from dede_ray.scoring import ScoreConfig, score
from dede_ray.session import start_ray
from dede_ray.sources import IngestConfig, ingest
from dede_ray.training import TrainConfig, train

logger = logging.getLogger(__name__)

STEPS: dict[str, tuple[type[Config], Callable[[Any], str]]] = {
    "ingest": (IngestConfig, ingest),
    "poison": (PoisonConfig, poison),
    "train_clip": (TrainConfig, train),
    "score": (ScoreConfig, lambda config: score(config).summary()),
    "evaluate": (EvaluateConfig, evaluate),
}

SMALLEST = Path(__file__).parent.parent / "configs" / "demo_smoke.yaml"


class PipelineConfig(Config):
    """Settings of jobs/demo.py: command lines of jobs, in order."""

    steps: list[str] = Field(min_length=1)
    """Such as `poison configs/poison_digits.yaml --rate 0.05`."""


def run_steps(config: PipelineConfig, until: str | None = None) -> str:
    """Run the steps, or those up to the first one of the job `until`; returns what the last one says.

    Raises:
        Mistake: whatever the jobs raise; a wrong step is found before the first one runs.
    """
    parsed = []
    for line in config.steps:
        name, *arguments = shlex.split(line)
        if name not in STEPS or not arguments:
            raise Mistake(f"step {line!r} is no job's command line; expected one of {', '.join(STEPS)} and a config")
        kind, job = STEPS[name]
        parsed.append((line, job, load(kind, arguments)))
        if name == until:
            break
    start_ray()
    said = ""
    for number, (line, job, settings) in enumerate(parsed, 1):
        logger.info("[%d/%d] %s", number, len(parsed), line)
        started = time.monotonic()
        said = job(settings)
        logger.info("[%d/%d] %.0f s: %s", number, len(parsed), time.monotonic() - started, said.splitlines()[0])
    return said


def smallest(until: str) -> str:
    """The embedded configuration that a job runs when it is given none: small, real, done in a minute or two."""
    if not SMALLEST.is_file():
        raise Mistake(f"no config given, and {SMALLEST} is not there; name a config")
    return run_steps(load(PipelineConfig, [str(SMALLEST)]), until)
