"""Several jobs in a row, in one process: what `make demo` does.

A step is the command line of a job without `python jobs/`: `score configs/score_digits.yaml --decision.q 0.05`. The
steps meet in files, each does only what its output folder still lacks, so a pipeline can be stopped and run again.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from dede_ray import simclr
from dede_ray.activation import MeasureConfig, measure_victim
from dede_ray.amplification import AmplifyConfig, amplify_manifest
from dede_ray.attacks.attack import AttackConfig, attack
from dede_ray.attacks.poison import PoisonConfig, poison
from dede_ray.benchmark import BenchmarkConfig, benchmark
from dede_ray.check import CheckConfig, check
from dede_ray.config import Config, Mistake, load
from dede_ray.detectors import decree
from dede_ray.ingest import IngestConfig, ingest
from dede_ray.report import EvaluateConfig, evaluate
from dede_ray.scoring import ScoreConfig, score
from dede_ray.session import start_ray
from dede_ray.sift import SiftConfig, sift
from dede_ray.training import TrainConfig, train

logger = logging.getLogger(__name__)

STEPS: dict[str, tuple[type[Config], Callable[[Any], str]]] = {
    "ingest": (IngestConfig, ingest),
    "poison": (PoisonConfig, poison),
    "train_clip": (TrainConfig, train),
    "train_simclr": (simclr.SimclrConfig, simclr.train),
    "attack": (AttackConfig, attack),
    "measure": (MeasureConfig, measure_victim),
    "check": (CheckConfig, check),
    "decree": (decree.DecreeConfig, decree.run),
    "score": (ScoreConfig, lambda config: score(config).summary()),
    "amplify": (AmplifyConfig, amplify_manifest),
    "sift": (SiftConfig, sift),
    "evaluate": (EvaluateConfig, evaluate),
    "benchmark": (BenchmarkConfig, benchmark),
}

SMALLEST = Path(__file__).parent.parent / "configs" / "demo_smoke.yaml"


class PipelineConfig(Config):
    """Settings of jobs/demo.py: command lines of jobs, in order."""

    steps: list[str] = Field(min_length=1)
    """Such as `poison configs/poison_digits.yaml --rate 0.05`."""


@dataclass(frozen=True)
class Step:
    """One job with its settings, ready to run."""

    line: str
    name: str
    settings: Config

    def run(self) -> str:
        """Do the work; Ray must be running. Returns what the job says."""
        return STEPS[self.name][1](self.settings)


def parse_steps(config: PipelineConfig) -> list[Step]:
    """Read every step's config and overrides; nothing runs.

    Raises:
        Mistake: a step is no job's command line, or its settings are wrong.
    """
    steps = []
    for line in config.steps:
        name, *arguments = shlex.split(line)
        if name not in STEPS or not arguments:
            raise Mistake(f"step {line!r} is no job's command line; expected one of {', '.join(STEPS)} and a config")
        steps.append(Step(line, name, load(STEPS[name][0], arguments)))
    return steps


def run_steps(config: PipelineConfig, until: str | None = None) -> str:
    """Run the steps, or those up to the first one of the job `until`; returns what the last one says.

    Raises:
        Mistake: whatever the jobs raise; a wrong step is found before the first one runs.
    """
    steps = parse_steps(config)
    if until is not None:
        steps = steps[: [step.name for step in steps].index(until) + 1]
    start_ray(*(step.settings for step in steps))
    said = ""
    for number, step in enumerate(steps, 1):
        logger.info("[%d/%d] %s", number, len(steps), step.line)
        started = time.monotonic()
        said = step.run()
        logger.info("[%d/%d] %.0f s: %s", number, len(steps), time.monotonic() - started, said.splitlines()[0])
    return said


def run_up_to(job: str, path: str | None = None) -> str:
    """Run a demo up to its first step of a job, so that the job has what it needs: by default the smallest one."""
    if path is None and not SMALLEST.is_file():
        raise Mistake(f"no config given, and {SMALLEST} is not there; name a config")
    return run_steps(load(PipelineConfig, [path or str(SMALLEST)]), job)
