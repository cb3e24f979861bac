"""What scoring a corpus will cost: a model made from small runs, and a larger run that checks it.

    python -m tests.benchmarks.scale --num-samples 10000 100000 1000000

The score job runs over the same few real images under ever more distinct keys. The smaller runs give the model: a cost
for the start, and seconds, bytes and memory for every sample. The largest run is predicted from them, then done, and
both figures are shown side by side; then the model predicts larger ones. Meanwhile the memory of the driver and of
every worker is watched.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import yaml
from pydantic import Field

from dede_ray.data.shards import Sample, write_shard
from dede_ray.runtime.cli import run_job
from dede_ray.runtime.config import Config, Mistake, read_json, write_atomically, write_json
from dede_ray.runtime.session import start_ray
from dede_ray.scan.manifest import read_manifest
from dede_ray.training.reconstruction import PRESETS
from tests.benchmarks.speed_scoring import digits, repeated, write_decoder, write_victim

logger = logging.getLogger(__name__)

SIZES = (10**6, 10**8, 10**9)
"""Numbers of samples that the last table predicts."""


class ScaleConfig(Config):
    """Settings of `python -m tests.benchmarks.scale`."""

    output: str = "runs/scale"
    num_samples: list[int] = Field([10_000, 100_000, 1_000_000], min_length=3)
    """Samples of each run, rising; the model is made from all but the last, which checks it."""
    samples_per_shard: int = Field(10_000, ge=1)
    chunk_size: int = Field(256, ge=1)
    model: str = "configs/models/clip_digits.json"
    """The victim's architecture; its weights, and the decoder's, are random."""
    num_masks: int = Field(1, ge=1)
    """Masks of the dede detector, which multiply its forward passes."""


@dataclass(frozen=True)
class Measured:
    """One run of the score job."""

    num_samples: int
    seconds: float
    """From start to end."""
    scoring_s: float
    """The part that the pass over the corpus takes."""
    deciding_s: float
    """The part after the pass."""
    ledger_bytes: int
    """On disk, under scores/."""
    ledger_files: int
    manifest_bytes: int
    driver_peak_bytes: int
    """Peak resident memory of the driver; shared pages, those of the object store, are not counted."""
    workers_growth: float
    """An actor's mean resident memory in the last quarter of the pass divided by that in the second; the largest."""
    decider_peak_bytes: int
    """Peak resident memory of the task that decides."""


def scale(config: ScaleConfig) -> str:
    """Run the score job at every size, and report its costs.

    Raises:
        Mistake: sizes that do not rise.
    """
    if sorted(set(config.num_samples)) != config.num_samples:
        raise Mistake(f"num_samples {config.num_samples} must rise")
    output = Path(config.output).absolute()
    torch.manual_seed(0)
    if not (output / "decoder").is_dir():
        victim = write_victim(output / "victim", config.model)
        write_decoder(output / "decoder", victim, PRESETS["tiny"].shape)
    _write(config, output)
    runs = [_run(config, output, num) for num in config.num_samples]
    table = _table(runs)
    write_atomically(output / "scale.md", table + "\n")
    return table


def _write(config: ScaleConfig, output: Path) -> None:
    """Write the shards of the largest run; smaller runs take the first of them."""
    start_ray()
    images = digits()
    write = ray.remote(_write_one)
    per_shard = config.samples_per_shard
    todo = []
    for number in range(-(-config.num_samples[-1] // per_shard)):
        path = output / "shards" / f"train-{number:06d}.tar"
        if not path.is_file():
            num = min(per_shard, config.num_samples[-1] - number * per_shard)
            todo.append(write.remote(images, path, number * per_shard, num))
    ray.get(todo)
    calibration = output / "shards" / "calibration.tar"
    if not calibration.is_file():
        write_shard(calibration, repeated(images[:500], 500))
    ray.shutdown()


def _write_one(images: list[Sample], path: Path, first: int, num: int) -> None:
    write_shard(path, repeated(images, num, first))


def _run(config: ScaleConfig, output: Path, num: int) -> Measured:
    """One run of the job in a process of its own, watched; a finished one is used again."""
    record, watched = output / f"measured-{num}.json", output / f"memory-{num}.json"
    if record.is_file():
        return Measured(**{**read_json(record, "record of a run"), **_peaks(read_json(watched, "what was watched"))})
    folder = output / f"scores-{num}"
    last = -(-num // config.samples_per_shard) - 1
    settings: dict[str, Any] = {
        "shards": str(output / "shards" / f"train-{{000000..{last:06d}}}.tar"),
        "calibration": str(output / "shards" / "calibration.tar"),
        "output": str(folder),
        "victim": {"path": str(output / "victim")},
        "detectors": [{"kind": "dede", "decoder": str(output / "decoder"), "num_masks": config.num_masks}],
        "chunk_size": config.chunk_size,
    }
    (output / f"score-{num}.yaml").write_text(yaml.safe_dump(settings))
    logger.info("scoring %s samples", f"{num:,}")
    job, started = Path(__file__).parents[2] / "jobs" / "score.py", time.monotonic()
    with (output / f"score-{num}.log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, str(job), str(output / f"score-{num}.yaml")], stdout=log, stderr=log, cwd=output
        )
        memory = _watch(driver)
    took_s = time.monotonic() - started
    if driver.returncode:
        raise RuntimeError((output / f"score-{num}.log").read_text()[-3000:])
    manifest = read_manifest(folder)
    assert manifest.info["counts"]["scored"] == num, manifest.info["counts"]
    parts = [path for path in (folder / "scores").rglob("*") if path.is_file()]
    passed_at = max(path.stat().st_mtime for path in parts)
    files = [*(folder / "manifest").iterdir(), folder / "manifest.json", folder / "findings.json"]
    measured = Measured(
        num_samples=num,
        seconds=took_s,
        scoring_s=read_json(folder / "scores" / "timing.json", "timing")["seconds"],
        deciding_s=(folder / "manifest.json").stat().st_mtime - passed_at,
        ledger_bytes=sum(path.stat().st_size for path in parts),
        ledger_files=len(parts),
        manifest_bytes=sum(path.stat().st_size for path in files),
        **_peaks(memory),
    )
    write_json(watched, memory)
    write_json(record, asdict(measured))
    return measured


def _watch(driver: subprocess.Popen) -> dict[str, list[int]]:
    """Resident bytes of the driver and of what Ray runs for it, about twice a second, until it ends."""
    seen: dict[str, list[int]] = {"driver": []}
    process = psutil.Process(driver.pid)
    while driver.poll() is None:
        for one in [process, *_children(process)]:
            try:
                title = (one.cmdline() or [""])[0]
                name = "driver" if one == process else f"{title} {one.pid}"
                if one == process or title.startswith("ray::"):
                    seen.setdefault(name, []).append(one.memory_info().rss - _shared(one))
            except psutil.Error:
                continue
        time.sleep(0.5)
    return seen


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _shared(process: psutil.Process) -> int:
    """Bytes of memory that it shares, such as pages of the object store that it has looked at; not its own."""
    return getattr(process.memory_info(), "shared", 0)


def _peaks(memory: dict[str, list[int]]) -> dict[str, Any]:
    """Summarise the watched memory in three numbers; 0 where no process lived long enough."""
    growth = [0.0]
    for name, seen in memory.items():
        if name.startswith("ray::MapWorker") and len(seen) >= 20:
            quarter = len(seen) // 4
            growth.append(sum(seen[-quarter:]) / sum(seen[quarter : 2 * quarter]))
    deciding = [max(seen) for name, seen in memory.items() if name.startswith("ray::manifest ")]
    return {
        "driver_peak_bytes": max(memory["driver"]),
        "workers_growth": max(growth),
        "decider_peak_bytes": max(deciding, default=0),
    }


# ------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Line:
    """A cost with a part for the start and a part for each sample."""

    start: float
    each: float

    @classmethod
    def through(cls, points: list[tuple[int, float]]) -> Line:
        """The line through the first and the last of some points."""
        (n0, y0), (n1, y1) = points[0], points[-1]
        each = (y1 - y0) / (n1 - n0)
        return cls(y0 - each * n0, each)

    def at(self, num_samples: int) -> float:
        return self.start + self.each * num_samples


def _table(runs: list[Measured]) -> str:
    model = {
        name: Line.through([(run.num_samples, getattr(run, name)) for run in runs[:-1]])
        for name in ("seconds", "scoring_s", "ledger_bytes", "ledger_files", "manifest_bytes", "decider_peak_bytes")
    }
    last, first = runs[-1], runs[0]
    cores = os.cpu_count() or 1
    lines = [f"{cores} cores; real images under distinct keys", "", _heading([run.num_samples for run in runs])]
    rows = [
        ("images/s of the pass", [f"{run.num_samples / run.scoring_s:,.0f}" for run in runs]),
        ("seconds, start to manifest", [f"{run.seconds:,.0f}" for run in runs]),
        ("of which deciding", [f"{run.deciding_s:,.1f}" for run in runs]),
        ("ledger, files", [f"{run.ledger_files:,}" for run in runs]),
        ("ledger, MB", [f"{run.ledger_bytes / 1e6:,.1f}" for run in runs]),
        ("manifest, MB", [f"{run.manifest_bytes / 1e6:,.1f}" for run in runs]),
        ("driver's memory, MB at most", [f"{run.driver_peak_bytes / 1e6:,.0f}" for run in runs]),
        (
            "an actor's memory, end / beginning",
            [f"{run.workers_growth:.2f}" if run.workers_growth else "–" for run in runs],
        ),
        ("deciding task's memory, MB at most", [f"{run.decider_peak_bytes / 1e6:,.0f}" for run in runs]),
    ]
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in rows]
    lines += ["", f"{last.num_samples:,} samples, as the smaller runs predict them, and as they were:", ""]
    for name, line in model.items():
        value = getattr(last, name)
        predicted = line.at(last.num_samples)
        beside = f", ratio {value / predicted:.2f}" if predicted else ""
        lines.append(f"- {name}: {predicted:,.0f} predicted, {value:,.0f} measured{beside}")
    ratio = last.driver_peak_bytes / first.driver_peak_bytes
    lines += [f"- the driver's memory is {ratio:.2f} times that at {first.num_samples:,} samples", ""]
    lines += ["The model, from all but the first run's start:", "", _heading(list(SIZES))]
    final = {
        name: Line.through([(run.num_samples, getattr(run, name)) for run in runs[1:]]) for name in model
    }  # fmt: skip
    each_s = final["scoring_s"].each
    costs = [
        ("core-hours of the pass", [f"{each_s * num * cores / 3600:,.1f}" for num in SIZES]),
        ("ledger, files", [f"{final['ledger_files'].at(num):,.0f}" for num in SIZES]),
        ("ledger, GB", [f"{final['ledger_bytes'].at(num) / 1e9:,.2f}" for num in SIZES]),
        ("manifest, GB", [f"{final['manifest_bytes'].at(num) / 1e9:,.2f}" for num in SIZES]),
        ("deciding task's memory, GB", [f"{final['decider_peak_bytes'].at(num) / 1e9:,.1f}" for num in SIZES]),
    ]
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in costs]
    return "\n".join(lines)


def _heading(sizes: list[int]) -> str:
    return f"| samples | {' | '.join(f'{num:,}' for num in sizes)} |\n| --- |{' ---: |' * len(sizes)}"


if __name__ == "__main__":
    run_job(ScaleConfig, scale, "python -m tests.benchmarks.scale", sys.argv[1:], ScaleConfig())
