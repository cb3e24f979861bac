"""Jobs that are submitted to a cluster: they run, report how they ended, and can be stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import throwaway
import yaml
from ray.job_submission import JobSubmissionClient

from dede_ray.runtime.cli import Steps, parse_steps
from dede_ray.runtime.config import Config
from dede_ray.runtime.session import check_output

ROOT = Path(__file__).parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))


class Submitter:
    """`ray job ...`, from a copy of the checkout, as a person would call it from their laptop."""

    def __init__(self, checkout: Path, head: throwaway.Head):
        self.checkout, self.head = checkout, head

    def ray_job(self, *argv: str, timeout_s: float = 500) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
        environment["RAY_API_SERVER_ADDRESS"] = self.head.dashboard
        return subprocess.run(
            [throwaway.RAY, "job", *argv], cwd=self.checkout, env=environment,
            capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip

    def submit(self, name: str, *command: str, wait: bool = True) -> str:
        """What the job and the command line say, until it ends."""
        options = ["--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml", "--submission-id", name]
        said = self.ray_job("submit", *options, *([] if wait else ["--no-wait"]), "--", "python", *command)
        return said.stdout + said.stderr

    def status(self, name: str) -> str:
        """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
        return JobSubmissionClient(self.head.dashboard).get_job_status(name).value

    def ended(self, name: str, limit_s: float = 120) -> str:
        """Its status once it has ended."""
        deadline = time.monotonic() + limit_s
        while (status := self.status(name)) in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline, self.logs(name)
            time.sleep(1)
        return status

    def logs(self, name: str) -> str:
        return self.ray_job("logs", name).stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Submitter]:
    checkout = tmp_path_factory.mktemp("laptop") / "checkout"
    for name in ("configs", "jobs", "dede_ray", "cluster"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    # The head knows the project through what is uploaded only.
    with throwaway.head("--num-cpus=2", PYTHONPATH="") as head:
        yield Submitter(checkout, head)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The folder that all machines see."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def configs(cluster, shared) -> list[str]:
    """The steps of the smallest demo, one config each, with absolute paths; the names of the jobs."""
    names = []
    os.chdir(ROOT)
    for step in parse_steps(Steps(**yaml.safe_load((ROOT / "configs/smoke.yaml").read_text()))):
        text = json.dumps(step.settings.model_dump(mode="json")).replace('"runs/', f'"{shared}/')
        (cluster.checkout / f"{step.name}.yaml").write_text(text)
        names.append(step.name)
    return names


LAST_LINE = {
    "ingest": r"\d+ samples",
    "poison": r"poisoned",
    "train_clip": r"decoder: .* steps .*/smoke/victim/decoder",
    "score": r"flagged|cannot certify",
    "evaluate": r"page: \S+/smoke/report/report\.html",
}


@pytest.mark.slow
def test_training_scoring_and_evaluation_succeed_as_submitted_jobs_and_say_what_they_did(cluster, configs, shared):
    assert configs == [*LAST_LINE]
    for name in configs:
        said = cluster.submit(f"smoke-{name}", f"jobs/{name}.py", f"{name}.yaml")
        assert cluster.status(f"smoke-{name}") == "SUCCEEDED", said
        logs = cluster.logs(f"smoke-{name}")
        assert re.search(LAST_LINE[name], logs), logs
        assert "is relative" not in logs
        print(name, "|", logs.strip().splitlines()[-1])
    assert (shared / "smoke/scores/manifest.json").is_file()
    assert (shared / "smoke/report/report.html").is_file()
    assert not (cluster.checkout / "runs").exists()


@pytest.mark.slow
def test_every_job_can_be_submitted(cluster):
    """Four at a time: each needs half a GB to list its settings."""
    assert len(JOBS) >= 16
    for begin in range(0, len(JOBS), 4):
        for job in JOBS[begin : begin + 4]:
            cluster.submit(f"help-{job}", f"jobs/{job}.py", "--help", wait=False)
        for job in JOBS[begin : begin + 4]:
            assert cluster.ended(f"help-{job}") == "SUCCEEDED", cluster.logs(f"help-{job}")
            assert f"usage: python jobs/{job}.py <config.yaml>" in cluster.logs(f"help-{job}")


@pytest.mark.slow
def test_a_running_job_can_be_stopped_and_goes_on_when_it_is_submitted_again(
    cluster, write_pictures, clip_config, tmp_path
):
    write_pictures(tmp_path / "shards", range(64), per_shard=32)
    config = {
        "output": str(tmp_path / "victim"),
        "log_every": 1,
        "lanes": 1,
        "clip": {
            "shards": str(tmp_path / "shards"), "model": str(clip_config), "batch_size": 16, "shuffle_buffer": 32,
            "epochs": 100_000, "learning_rate": 1e-3,
        },
        "workers": {"readers": 1, "threads_per_worker": 1, "checkpoint_every": 5},
    }  # fmt: skip
    (cluster.checkout / "endless.yaml").write_text(yaml.safe_dump(config))
    metrics = tmp_path / "victim/clip/metrics.jsonl"

    def steps() -> list[int]:
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def run_until(name: str, step: int) -> None:
        cluster.submit(name, "jobs/train_clip.py", "endless.yaml", wait=False)
        deadline = time.monotonic() + 180
        while max(steps(), default=-1) < step:
            assert cluster.status(name) in ("PENDING", "RUNNING"), cluster.logs(name)
            assert time.monotonic() < deadline, cluster.logs(name)
            time.sleep(0.5)
        cluster.ray_job("stop", name)
        assert cluster.status(name) == "STOPPED"

    run_until("endless", 40)
    before = steps()
    run_until("endless-again", max(before) + 10)
    assert steps() == list(range(max(steps()) + 1)), "no step is missing, none was logged twice"


@pytest.mark.slow
def test_a_submitted_mistake_fails_with_one_message(cluster):
    said = cluster.submit("mistaken", "jobs/score.py", "configs/digits/score.yaml", "--chunk-sise", "3")
    assert cluster.status("mistaken") == "FAILED", said
    assert "--chunk-sise" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_relative_output_is_warned_about_where_one_machine_does_it_all(cluster):
    said = cluster.submit("relative", "jobs/ingest.py", "configs/digits/ingest.yaml")
    assert cluster.status("relative") == "SUCCEEDED", said
    assert "output 'runs/digits/clean' is relative" in said
    assert "--output /shared/runs/digits/clean" in said


@pytest.mark.slow
def test_a_relative_output_is_a_mistake_where_other_machines_do_the_work(cluster, tmp_path):
    """A head without CPUs: whatever works will be another machine."""
    with throwaway.head("--num-cpus=0", PYTHONPATH="") as head:
        elsewhere = Submitter(cluster.checkout, head)
        said = elsewhere.submit("relative", "jobs/score.py", "configs/digits/score.yaml")
        assert elsewhere.status("relative") == "FAILED", said
    assert "error: output 'runs/digits/scores' is relative" in said
    assert "Traceback" not in said


class Writes(Config):
    """Settings of a job that writes."""

    output: str
    writes_to_stores: ClassVar[bool] = True


@pytest.mark.parametrize("output", ["/shared/run", "s3://my-bucket/run"])
def test_outputs_that_all_machines_see_are_fine_in_rays_copy_of_the_working_folder(
    tmp_path, monkeypatch, caplog, output
):
    (tmp_path / "_ray_pkg_0123abcd").mkdir()
    monkeypatch.chdir(tmp_path / "_ray_pkg_0123abcd")
    check_output(Writes(output=output))
    assert not caplog.records


def test_relative_outputs_are_fine_in_folders_of_ones_own(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    check_output(Writes(output="runs/here"))
    assert not caplog.records


def test_a_relative_output_in_rays_copy_is_told_of(tmp_path, monkeypatch, caplog):
    (tmp_path / "_ray_pkg_0123abcd").mkdir()
    monkeypatch.chdir(tmp_path / "_ray_pkg_0123abcd")
    check_output(Writes(output="runs/here"))
    assert "'runs/here' is relative" in caplog.text
