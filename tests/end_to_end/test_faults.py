"""Training under fire: whatever is killed, the run ends with the weights of the undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from dede_ray.models import clip
from dede_ray.runtime.store import place, write_atomically

JOB = Path(__file__).parents[2] / "jobs" / "train_clip.py"
NUM_SAMPLES = 100  # not a multiple of the batch, nor of the lanes
VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def job(write_pictures, tmp_path) -> Job:
    write_pictures(tmp_path / "shards", range(NUM_SAMPLES), per_shard=40)
    (tmp_path / "vit.json").write_text(json.dumps(VIT))
    return Job(tmp_path)


class Job:
    """`dede-ray train_clip` on two workers, 16 samples a step, in a process of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(
        self, output: str, precision: str, stage: int, epochs: float = 16, shards: str = "shards", **workers
    ) -> subprocess.Popen:
        settings = {
            "output": output, "precision": precision, "lanes": 4, "log_every": 1,
            "clip": {
                "shards": shards, "model": "vit.json", "batch_size": 16, "epochs": epochs, "learning_rate": 2e-3,
                "warmup_steps": 5, "shuffle_buffer": 64,
            },
            "workers": {
                "num_workers": 2, "cpus_per_worker": 0.5, "read_cpus": 0.25, "threads_per_worker": 1,
                "zero_stage": stage, "checkpoint_every": 4, "max_failures": 4, **workers,
            },
        }  # fmt: skip
        (self.folder / f"{output}.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, str(JOB), f"{output}.yaml"]
        return subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, process: subprocess.Popen, output: str) -> dict:
        said, _ = process.communicate()
        assert process.returncode == 0, said[-4000:]
        return self.result(output)

    def result(self, output: str) -> dict:
        return json.loads((self.folder / output / "clip" / "run.json").read_text())["result"]

    def lines(self, output: str) -> list[dict]:
        try:
            text = (self.folder / output / "clip" / "metrics.jsonl").read_text()
        except OSError:
            return []
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def wait_for_step(self, process: subprocess.Popen, output: str, step: int) -> None:
        while process.poll() is None and not any(line["step"] >= step for line in self.lines(output)[-3:]):
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()[0][-4000:]

    def weights(self, output: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / output / "clip" / clip.WEIGHTS_FILE)


def actors(driver: subprocess.Popen, kind: str) -> list[psutil.Process]:
    """The processes of the driver's actors of a kind: RayTrainWorker trains, TrainController looks after them."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if process.cmdline() and kind in process.cmdline()[0]:
                found.append(process)
        except psutil.Error:  # gone already
            continue
    return found


def kill_at(
    job: Job, process: subprocess.Popen, output: str, step: int, victim: str, restart: dict
) -> subprocess.Popen:
    """Kill the driver, its controller or a training worker at a step, and wait until the run has gone back."""
    job.wait_for_step(process, output, step)
    metrics = job.folder / output / "clip" / "metrics.jsonl"
    before = metrics.stat().st_ino
    if victim == "driver":
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process = job.start(output, **restart)
    else:
        random.choice(actors(process, "TrainController" if victim == "controller" else "RayTrainWorker")).kill()
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and metrics.stat().st_ino == before:
        time.sleep(0.005)  # a run that resumes from a checkpoint begins by writing the file anew
    return process


def assert_same_run(job: Job, result: dict, undisturbed: dict) -> None:
    whole, killed = job.weights("whole"), job.weights("killed")
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []
    assert [line["loss"] for line in job.lines("killed")] == [line["loss"] for line in job.lines("whole")]
    assert result["samples"] == undisturbed["samples"]
    first, last = result["samples"]["by_epoch"][0].pop("epochs")
    assert (first, last) == (0, undisturbed["steps"] * 16 // NUM_SAMPLES - 1)
    assert result["samples"]["by_epoch"][0] == {"seen": NUM_SAMPLES, "repeated": 0, "unseen": 0, "unusable": {}}


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_driver_change_no_bit_where_shards_and_checkpoints_are_on_a_store(job, s3):
    store = f"{s3}/{job.folder.name}"
    for shard in (job.folder / "shards").iterdir():
        write_atomically(f"{store}/shards/{shard.name}", shard.read_bytes())
    settings = {"precision": "bf16", "stage": 2, "epochs": 8}
    undisturbed = job.finish(job.start("whole", **settings), "whole")
    settings |= {"shards": f"{store}/shards", "storage_path": f"{store}/checkpoints"}
    process = job.start("killed", **settings)
    process = kill_at(job, process, "killed", 10, "worker", settings)
    job.wait_for_step(process, "killed", 25)
    process.kill()
    process.wait()
    before = job.lines("killed")
    (own,) = place(f"{store}/checkpoints").iterdir()
    orphan = own / "checkpoints" / "checkpoint_2026-01-01_00-00-00.000000"
    write_atomically(orphan / "meta.json", "half uploaded")
    assert_same_run(job, job.finish(job.start("killed", **settings), "killed"), undisturbed)
    assert job.lines("killed")[:4] == before[:4]  # the same to the microsecond: these were not done again
    assert not orphan.exists()
    assert not (job.folder / "killed" / "clip" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_killed_workers_and_a_killed_driver_change_no_bit(job, precision, stage):
    settings = {"precision": precision, "stage": stage}
    undisturbed = job.finish(job.start("whole", **settings), "whole")
    rng = random.Random(f"{precision}{stage}")
    victims = rng.sample(["worker", "worker", "worker", "driver"], 4)
    process = job.start("killed", **settings)
    for step, victim in zip(sorted(rng.sample(range(5, undisturbed["steps"] - 25), 4)), victims, strict=True):
        process = kill_at(job, process, "killed", step, victim, settings)
    assert_same_run(job, job.finish(process, "killed"), undisturbed)


@pytest.mark.slow
def test_a_killed_controller_changes_no_bit(job):
    settings = {"precision": "fp32", "stage": 1}
    undisturbed = job.finish(job.start("whole", **settings), "whole")
    process = kill_at(job, job.start("killed", **settings), "killed", 20, "controller", settings)
    assert_same_run(job, job.finish(process, "killed"), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resuming_with_four_workers_and_then_with_one_changes_the_loss_by_rounding_only(job, stage):
    settings = {"precision": "fp32", "stage": stage}
    undisturbed = job.finish(job.start("whole", **settings), "whole")
    process = job.start("killed", **settings)
    process = kill_at(job, process, "killed", 15, "driver", {**settings, "num_workers": 4})
    process = kill_at(job, process, "killed", 40, "driver", {**settings, "num_workers": 1})
    result = job.finish(process, "killed")
    assert result["loss"] == pytest.approx(undisturbed["loss"], rel=1e-6)
    losses = [[line["loss"] for line in job.lines(output)] for output in ("killed", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert result["samples"] == undisturbed["samples"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_four_workers_that_lose_a_worker_the_controller_and_a_node_change_no_bit(job, stage):
    outcome = on_a_cluster(job, "killed", stage)
    assert [num_workers for _, num_workers in outcome["events"]] == [4, 4, 4, 4]
    assert {line["num_workers"] for line in job.lines("killed")} == {4}
    assert_same_run(job, job.result("killed"), job.result("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_four_workers_that_lose_a_node_for_good_go_on_as_three_up_to_rounding(job, stage):
    outcome = on_a_cluster(job, "smaller", stage)
    assert [num_workers for _, num_workers in outcome["events"]] == [4, 3]
    assert job.lines("killed")[-1]["num_workers"] == 3
    losses = [[line["loss"] for line in job.lines(output)] for output in ("killed", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert job.result("killed")["samples"] == job.result("whole")["samples"]


@pytest.mark.slow
def test_an_elastic_run_shrinks_with_killed_and_drained_nodes_and_grows_with_added_ones(job):
    outcome = on_a_cluster(job, "spot", 2)
    assert [num_workers for _, num_workers in outcome["events"]] == [2, 1, 2, 1]
    assert outcome["saved_at"] > outcome["drained_after"]  # the notice led to a checkpoint, which is no regular one
    assert outcome["saved_at"] % 100
    once = {"epochs": [0, 399], "seen": NUM_SAMPLES, "repeated": 0, "unseen": 0, "unusable": {}}
    assert job.result("elastic")["samples"] == {"samples": 400 * NUM_SAMPLES, "is_truncated": 0, "by_epoch": [once]}
    losses = [line["loss"] for line in job.lines("elastic")]
    assert len(losses) == 2500
    assert max(losses[-100:]) < 0.1 < min(losses[:20])


def on_a_cluster(job: Job, story: str, stage: int) -> dict:
    """Let one of elastic_run.py's stories happen, in a process of its own; returns what it noted."""
    script = Path(__file__).parents[1] / "fixtures" / "elastic_run.py"
    command = [sys.executable, str(script), str(job.folder), story, str(stage)]
    done = subprocess.run(command, cwd=JOB.parents[1], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((job.folder / "outcome.json").read_text())
