"""What company and the classifier add to deciding, beside the time of the pass that scored the samples.

The samples are made up, as the times depend on their number only. Deciding runs as in the score job, in a task of one
core; the pass runs on all of them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
from pydantic import Field

from dede_ray.detectors.contract import WIDEST_RESIDUAL
from dede_ray.runtime.config import Config
from dede_ray.scan.decisions import Conformal
from dede_ray.scan.judge import Judging, Scored, judge
from dede_ray.scan.pool import Classifier, Company
from tests.benchmarks.speed_scoring import ScoringSpeed, pass_rate

WAYS = {
    "dede_reverse": Judging(),
    "company": Judging(company=Company()),
    "classifier": Judging(classifier=Classifier()),
}


class DecidingSpeed(Config):
    """Deciding on a column that the pool teaches beside deciding on a plain one."""

    scoring: ScoringSpeed = ScoringSpeed()
    """The pass whose time a sample is compared with; one turn."""
    num_samples: int = Field(100_000, ge=1)
    num_calibration: int = Field(5_000, ge=1)
    width: int = Field(WIDEST_RESIDUAL, ge=1)
    """Components of a residual."""
    repeats: int = Field(3, ge=1)
    """Turns each; the median counts."""


def compare_deciding(config: DecidingSpeed) -> str:
    """Measure; Ray must be running.

    Returns:
        A line for each way to decide: its seconds, and what it adds to the pass.
    """
    with tempfile.TemporaryDirectory() as name:
        rate = pass_rate(config.scoring, Path(name))
    seconds = ray.get(ray.remote(num_cpus=1)(times).remote(config))
    pass_s, plain_s = config.num_samples / rate, seconds["dede_reverse"]
    lines = [
        f"{config.num_samples:,} samples, {config.num_calibration:,} calibration samples; the pass: {pass_s:.1f} s"
    ]
    for way, taken in seconds.items():
        added = f", {(taken - plain_s) / pass_s:+.1%} of the pass" if way != "dede_reverse" else ""
        lines.append(f"deciding on {way}: {taken:.2f} s{added}")
    return "\n".join(lines)


def times(config: DecidingSpeed) -> dict[str, float]:
    """Seconds of `judge` by what is decided on, the median of some turns; findings and domain shift are left out."""
    corpus, calibration = (
        _made_up(num, seed, config) for seed, num in enumerate((config.num_samples, config.num_calibration))
    )
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(config.repeats + 1):
        for way, judging in WAYS.items():
            quiet = judging.model_copy(update={"shift": None, "grouping": None})
            began = time.perf_counter()
            judge(quiet, Conformal(score=way), corpus, calibration, [], False)
            taken[way].append(time.perf_counter() - began)
    return {way: statistics.median(turns[1:]) for way, turns in taken.items()}  # the first one imports


def _made_up(num: int, seed: int, config: DecidingSpeed) -> Scored:
    """Samples whose residuals have directions of very different length, as real ones do; a hundredth agrees."""
    rng = np.random.default_rng(seed)
    mixed_RR = np.random.default_rng(9).normal(size=(config.width, config.width)) * np.linspace(0.2, 3, config.width)
    residual_NR = (rng.standard_t(5, size=(num, config.width)) @ mixed_RR).astype(np.float32)
    if seed == 0:
        residual_NR[: num // 100] += 3 * mixed_RR[0].astype(np.float32)
    ids = [f"{seed}.tar/{i:08d}" for i in range(num)]
    return Scored(
        ids, ids, [None] * num, rng.integers(0, 2**63, num).tolist(),
        {"dede_reverse": np.linalg.norm(residual_NR, axis=1).astype(np.float64)}, [], None,
        residuals={"dede_residual": residual_NR},
    )  # fmt: skip
