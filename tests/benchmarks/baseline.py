"""open_clip's own trainer beside ours: the same shards, model, batch size, precision and number of cores.

`compare_trainers` runs both in turn and reads the speed of each from its log, without the start. Theirs is
`open_clip_train`, which comes with open_clip, unchanged, in a process of its own. The settings name variants of it, and
the one that is fastest in a short trial counts. Everything stays in the output folder, so that both commands, which are
printed, can be run again.

`python -m tests.benchmarks.baseline <arguments of open_clip_train.main>` runs theirs; `--model` also takes a JSON model
config.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
import yaml
from pydantic import Field

from dede_ray.data.images import encode_image
from dede_ray.data.shards import Limits, Sample, iter_samples, list_shards, open_shard, write_shards
from dede_ray.ingest.sources import Digits
from dede_ray.models import clip
from dede_ray.runtime.config import Config, Mistake, to_install
from dede_ray.training.clip import ClipTrain, TrainConfig, train
from dede_ray.training.contrastive import Contrastive
from dede_ray.training.flops import flop_per_sample, matmul_rate
from dede_ray.training.loop import Workers

logger = logging.getLogger(__name__)

NUM_SHARDS = 8  # open_clip wants one for each of its data-loader workers


class Variant(Config):
    """A way to run open_clip's trainer."""

    workers: int = Field(1, ge=1)
    """Its data-loader processes."""
    precision: str | None = None
    """Its `--precision`; null takes the comparison's."""
    threads: int | None = Field(None, ge=1)
    """Threads of its arithmetic; null takes as many as ours has."""
    idle_threads: Literal["sleep", "spin"] = "sleep"
    """What OpenMP threads without work do: ours sleep, the library's default is to spin for a while."""


class TrainerSpeed(Config):
    """One comparison: a model on some images."""

    model: str
    """A JSON model config, or an open_clip name."""
    shards: str | list[str] | None = None
    """Captioned shards; null makes them: digits for images up to 64 px, JPEGs with a photograph's spectrum above."""
    batch_size: int = Field(256, ge=2)
    steps: int = Field(60, ge=1)
    """Steps that are measured."""
    skipped_steps: int = Field(20, ge=1)
    """Steps before them, in which buffers fill and memory is first touched."""
    log_every: int = Field(5, ge=1)
    """Steps between two looks at the clock, the same for both."""
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    repeats: int = Field(3, ge=1)
    """Turns each; the median of their ratios counts."""
    workers: Workers = Workers()
    """How ours is run; with `device: cuda` it gets one GPU."""
    variants: list[Variant] = Field([Variant(workers=1), Variant(workers=2)], min_length=1)
    """Ways to run theirs, of which the fastest counts."""
    trial_steps: int = Field(10, ge=1)
    """Measured steps of the trial that finds it."""


def compare_trainers(config: TrainerSpeed, folder: Path) -> str:
    """Measure both trainers; Ray must be running.

    Returns:
        The two commands, each turn's speeds and ratio, and their medians.

    Raises:
        Mistake: open_clip's trainer lacks a package, or there is no such model, shard or device.
    """
    absent = [name for name in ("webdataset", "pandas") if importlib.util.find_spec(name) is None]
    if absent:
        raise Mistake(f"open_clip's trainer needs {' and '.join(absent)}; {to_install('baseline')}")
    described = clip.model_description(config.model)
    name = f"{Path(config.model).stem}-{config.precision}-{config.device}"
    folder = folder.absolute() / name
    for part in ("shards", "ours", "theirs"):
        shutil.rmtree(folder / part, ignore_errors=True)
    num_steps = config.skipped_steps + config.steps
    _write_shards(folder / "shards", config, clip.image_size_px(described), num_steps * config.batch_size)

    ours, theirs = _Ours(config, folder), _fastest(config, folder)
    turns: list[tuple[float, float]] = []
    waits: list[float] = []
    for turn in range(config.repeats):
        # The first of a turn finds the machine as the other left it, so they take turns in going first as well.
        rate = theirs.run(config.steps) if turn % 2 else 0.0
        own, wait = ours.run()
        turns.append((own, rate or theirs.run(config.steps)))
        waits.append(wait)
        logger.info("%s, turn %d: ours %.1f, open_clip %.1f images/s", name, turn + 1, *turns[-1])
    lines = [
        f"{name}: batch {config.batch_size}, {config.steps} steps, {ours.threads} threads",
        f"  ours:      {ours.command}",
        f"  open_clip: {theirs.command}",
        *(
            f"  turn {i + 1}: {a:,.1f} images/s, open_clip {b:,.1f}, ratio {a / b:.3f}"
            for i, (a, b) in enumerate(turns)
        ),
        f"  median ratio {statistics.median(a / b for a, b in turns):.3f}; "
        f"ours waits for input {100 * statistics.median(waits):.1f} % of the time",
        _share_of_peak(config, described, statistics.median(a for a, _ in turns), ours.threads),
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ images


def _write_shards(folder: Path, config: TrainerSpeed, size_px: int, num_samples: int) -> None:
    """As many samples as both will see, under distinct keys; images are repeated if there are fewer."""
    if config.shards is not None:
        source = [s for shard in list_shards(config.shards) for s in iter_samples(open_shard(shard), Limits())]
        source = [sample for sample in source if sample.error is None]
    else:
        source = list(_digits() if size_px <= 64 else photographs())
    samples = (
        Sample(f"{i:08d}", i, image=like.image, image_suffix=like.image_suffix, caption=like.caption or f"picture {i}")
        for i, like in ((i, source[i % len(source)]) for i in range(num_samples))
    )
    write_shards(folder, "train", samples, -(-num_samples // NUM_SHARDS))


def _digits() -> Iterable[Sample]:
    return Digits(calibration=0, test=0).read(0, Limits())["train"]


def photographs(count: int = 64, height: int = 256, width: int = 341) -> Iterator[Sample]:
    """Noise whose amplitude falls as one over the frequency, as that of photographs does: JPEGs of natural size."""
    rng = np.random.default_rng(0)
    frequency_HW = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency_HW[0, 0] = np.inf
    for i in range(count):
        white_HWC = rng.standard_normal((height, width, 3)) @ np.array([[1, 1, 1], [0.3, 0, -0.3], [0.1, -0.2, 0.1]])
        spectrum = np.fft.rfft2(white_HWC, axes=(0, 1)) / frequency_HW[..., None]
        grey_HWC = np.fft.irfft2(spectrum, s=(height, width), axes=(0, 1))
        image_HWC = np.clip(128 + 60 * grey_HWC / grey_HWC.std(), 0, 255).astype(np.uint8)
        yield Sample(f"{i}", i, image=encode_image(image_HWC, "jpg", quality=75), image_suffix="jpg")


# ------------------------------------------------------------------------------------------------ the two


class _Ours:
    """Our trainer, run as `dede-ray train_clip` runs it."""

    def __init__(self, config: TrainerSpeed, folder: Path):
        self.config, self.folder = config, folder
        workers = config.workers
        if config.device == "cuda":
            workers = workers.model_copy(update={"gpus_per_worker": 1})
        self.threads = workers.threads_per_worker or os.cpu_count() or 1
        self.settings = TrainConfig(
            output=str(folder / "ours"),
            clip=ClipTrain(
                shards=str(folder / "shards"), model=config.model, batch_size=config.batch_size, epochs=1,
                warmup_steps=config.skipped_steps,
            ),
            precision=config.precision, log_every=config.log_every, workers=workers,
        )  # fmt: skip
        path = folder / "ours.yaml"
        path.write_text(yaml.safe_dump(self.settings.model_dump(mode="json", exclude_defaults=True), sort_keys=False))
        self.command = f"python jobs/train_clip.py {path}"

    def run(self) -> tuple[float, float]:
        """Images/s and the share of the time that it waited for input."""
        shutil.rmtree(self.folder / "ours", ignore_errors=True)
        train(self.settings)
        text = (self.folder / "ours" / "clip" / "metrics.jsonl").read_text()
        # A line is about the steps since the line before.
        lines = [
            line
            for line in map(json.loads, text.splitlines())
            if line["step"] + 1 - self.config.log_every >= self.config.skipped_steps
        ]
        rate = len(lines) / sum(1 / line["samples_per_s"] for line in lines)
        return rate, statistics.mean(line["input_wait_share"] for line in lines)


class _Theirs:
    """open_clip_train.main in a process of its own."""

    def __init__(self, config: TrainerSpeed, variant: Variant, folder: Path):
        self.config, self.variant, self.folder = config, variant, folder
        # OpenMP reads these before the first line of Python.
        self.environment = {
            "OMP_NUM_THREADS": str(variant.threads or config.workers.threads_per_worker or os.cpu_count() or 1),
            "OMP_WAIT_POLICY": "passive" if variant.idle_threads == "sleep" else "active",
        }
        if variant.idle_threads == "spin":
            del self.environment["OMP_WAIT_POLICY"]
        self.arguments = self._arguments(config.steps)
        self.command = shlex.join([*(f"{k}={v}" for k, v in self.environment.items()), "python", *self.arguments])

    def _arguments(self, num_measured: int) -> list[str]:
        config = self.config
        num_samples = (config.skipped_steps + num_measured) * config.batch_size
        flags = {
            "dataset-type": "webdataset",
            "train-data": f"{self.folder}/shards/train-{{00000..{NUM_SHARDS - 1:05d}}}.tar",
            "train-num-samples": num_samples,
            "model": config.model,
            "batch-size": config.batch_size,
            "epochs": 1,
            "lr": 1e-3,
            "wd": 0.2,
            "warmup": config.skipped_steps,
            "grad-clip-norm": 1.0,
            "precision": self.variant.precision or config.precision,
            "workers": self.variant.workers,
            "device": config.device,
            "log-every-n-steps": config.log_every,
            "logs": self.folder / "theirs",
        }
        return ["-m", "tests.benchmarks.baseline", *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]

    def run(self, num_measured: int) -> float:
        """Images/s, by the clock between two of its lines."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | self.environment
        command = [sys.executable, *self._arguments(num_measured)]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        said, seen = [], []
        for line in process.stdout:
            said.append(line)
            counted = re.search(r"Train Epoch: \d+ \[\s*(\d+)/", line)
            if counted and int(counted[1]) > self.config.skipped_steps * self.config.batch_size:
                seen.append((time.monotonic(), int(counted[1])))
        if process.wait() or len(seen) < 2:
            raise Mistake(f"open_clip's trainer did not train: {shlex.join(command)}\n{''.join(said[-15:])}")
        return (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])


def _fastest(config: TrainerSpeed, folder: Path) -> _Theirs:
    candidates = [_Theirs(config, variant, folder) for variant in config.variants]
    if len(candidates) == 1:
        return candidates[0]
    rates = [candidate.run(config.trial_steps) for candidate in candidates]
    for candidate, rate in zip(candidates, rates, strict=True):
        logger.info("open_clip with %s: %.1f images/s", candidate.variant.model_dump(exclude_defaults=True), rate)
    return max(zip(rates, candidates, strict=True), key=lambda pair: pair[0])[1]


# ------------------------------------------------------------------------------------------------ arithmetic


def _share_of_peak(config: TrainerSpeed, described: dict[str, Any], images_per_s: float, threads: int) -> str:
    """Our arithmetic per second beside what the device reaches when it does nothing but multiply matrices."""
    measure = ray.remote(num_cpus=1, num_gpus=1 if config.device == "cuda" else 0, max_calls=1)(_peak)
    peak = ray.get(measure.remote(config.device, config.precision, threads))
    work = _flop_per_image(described)
    return (
        f"  {work / 1e9:.3g} GFLOP per image: ours reaches {images_per_s * work / 1e12:.3g} TFLOP/s, "
        f"{100 * images_per_s * work / peak:.0f} % of the {peak / 1e12:.3g} of {config.precision} matrix products"
    )


def _peak(device: str, precision: str, threads: int) -> float:
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    return matmul_rate(device, precision, limit_s=2)


def _flop_per_image(described: dict[str, Any]) -> float:
    """Floating-point operations of one pair's forward and backward pass."""
    size = clip.image_size_px(described)
    length = described["model_cfg"]["text_cfg"].get("context_length", 77)
    batch = {"image": np.zeros((0, size, size, 3), np.uint8), "tokens": np.zeros((0, length), np.int64)}
    return flop_per_sample(lambda: Contrastive(clip.build_clip(described), described), batch)


# ------------------------------------------------------------------------------------------------ theirs


def _run_open_clip(arguments: list[str]) -> None:
    import open_clip_train.data
    import open_clip_train.main

    from dede_ray.runtime.libraries import open_clip  # first: it repairs torchvision, which theirs imports

    # webdataset 0.2.96 marks the end of a shard with an entry that open_clip's grouping of members does not expect.
    if "eof_value" in open_clip_train.data.tar_file_expander.__code__.co_varnames:
        open_clip_train.data.tar_file_expander = functools.partial(
            open_clip_train.data.tar_file_expander, eof_value=None
        )
    at = arguments.index("--model") + 1
    if arguments[at].endswith(".json"):
        open_clip.add_model_config(arguments[at])
        arguments[at] = Path(arguments[at]).stem
    open_clip_train.main.main(arguments)


if __name__ == "__main__":
    _run_open_clip(sys.argv[1:])
