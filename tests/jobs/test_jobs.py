"""The README's commands, as a person types them, on the smallest configuration: each test starts real processes."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dede_ray.runtime.cli import JOBS, Steps, main, parse_steps
from dede_ray.runtime.config import load
from tests.benchmarks.speed import SpeedConfig

ROOT = Path(__file__).parents[2]
SMOKE = "configs/smoke.yaml"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh copy of the repository, in which nothing has run yet."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "jobs", "dede_ray"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".gitignore", folder)
    return folder


def run_job(folder: Path, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python jobs/<argv>` in a checkout."""
    command = [sys.executable, f"jobs/{argv[0]}.py", *argv[1:]]
    environment = os.environ | {"PYTHONPATH": str(folder), **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def smoke(checkout: Path) -> subprocess.CompletedProcess[str]:
    """The smallest demo, run once for all tests; its output is in the checkout's runs/smoke."""
    return run_job(checkout, "demo", SMOKE)


def work_in(folder: Path) -> dict[str, int]:
    """When each shard, part and export was written: what no second run may do again."""
    done = [path for kind in ("tar", "parquet", "safetensors") for path in folder.rglob(f"*.{kind}")]
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in done if "scores/manifest" not in str(path)
    }


# ------------------------------------------------------------------------------------------------ configs


CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_loads_and_opens_with_its_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = re.search(rf"(?:python jobs/(\w+)\.py|dede-ray (\w+)) {path}", (ROOT / path).read_text().split("\n\n")[0])
    assert command, "a config opens with the command that runs it"
    job = command[1] or command[2]
    assert (ROOT / "jobs" / f"{job}.py").is_file()
    settings = load(JOBS[job].settings_class(), [path])
    if job == "demo":
        steps = parse_steps(settings)
        assert [step.name for step in steps][:3] == ["ingest", "poison", "train_clip"]
        assert steps[-1].name == "evaluate"
    if job == "zoo":
        for branch in settings.branches.values():
            parse_steps(Steps(steps=list(branch.steps)))


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "benchmarks").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_a_measurement_loads_and_opens_with_its_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert f"python -m tests.benchmarks.speed tests/benchmarks/{path.name}" in path.read_text().split("\n\n")[0]
    load(SpeedConfig, [str(path)])


# ------------------------------------------------------------------------------------------------ running


def test_the_smallest_demo_ends_with_a_page_of_real_pictures(smoke, checkout):
    assert smoke.returncode == 0, smoke.stderr
    assert "VOID: there is no honest victim" in smoke.stdout
    assert smoke.stdout.endswith("page: runs/smoke/report/report.html\n")
    page = (checkout / "runs/smoke/report/report.html").read_text()
    sources = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page)
    assert {alt for _, alt in sources} >= {"input", "what the decoder sees", "rebuilt with the embedding"}
    for content in [content for content, alt in sources if alt.startswith(("input", "rebuilt"))]:
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert image.size == (32, 32)
            low, high = image.convert("L").getextrema()
            assert low < high, "not one flat colour"


@pytest.mark.slow
@pytest.mark.parametrize("argv", [("demo", SMOKE), ("train_clip",)], ids=lambda argv: argv[0])
def test_finished_work_is_not_done_again(smoke, checkout, argv):
    """A job without a config runs its part of the smallest demo, which is finished here."""
    before = work_in(checkout / "runs/smoke")
    assert len(before) > 20
    job = run_job(checkout, *argv)
    assert job.returncode == 0, job.stderr
    assert work_in(checkout / "runs/smoke") == before
    expected = {"demo": "runs/smoke/report/report.html", "train_clip": "runs/smoke/victim/decoder"}
    assert expected[argv[0]] in job.stdout


@pytest.mark.slow
def test_the_examples_of_the_python_surface_run(smoke, checkout, tmp_path):
    (tmp_path / "runs").mkdir()
    for name in ("digits", "smoke"):  # the manifest names its victim as the smallest demo has it
        (tmp_path / "runs" / name).symlink_to(checkout / "runs" / "smoke")
    command = [sys.executable, str(ROOT / "tests" / "fixtures" / "examples.py")]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------ mistakes


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.fixture
def mistaken(local_ray, checkout: Path, smoke, tmp_path: Path, monkeypatch, capsys) -> Callable[..., str]:
    """Run a job of the finished smallest demo with one thing changed; returns its one message."""
    os.symlink(checkout / "runs", tmp_path / "runs")
    (tmp_path / "garbage.tar").write_bytes(b"garbage" * 200)
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"state_dict": Bomb()}))

    def run(job: str, **changes: object) -> str:
        write_settings(tmp_path / "mistaken.yaml", job, **changes)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", "mistaken.yaml"])
        with pytest.raises(SystemExit) as ended:
            main(job)
        said, complained = capsys.readouterr()
        assert (ended.value.code, said) == (2, "")
        assert not (tmp_path / "exploded").exists()
        return complained.partition("error: ")[2]

    return run


def write_settings(path: Path, job: str, **changes: object) -> None:
    """The settings of a job of the smallest demo, with one thing changed."""
    steps = parse_steps(load(Steps, [SMOKE]))
    settings = next(step for step in steps if step.name == job).settings.model_dump(mode="json")
    for key, value in {"output": "out", **changes}.items():
        *parents, last = key.split("__")
        place = settings
        for parent in parents:
            place = place[int(parent) if parent.isdecimal() else parent]
        place[last] = value
    path.write_text(yaml.safe_dump(settings))


def test_a_mistake_ends_a_process_with_one_message_before_ray_starts(checkout, monkeypatch):
    monkeypatch.chdir(ROOT)
    write_settings(checkout / "mistaken.yaml", "train_clip", clip__epoch=1)
    done = run_job(checkout, "train_clip", "mistaken.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "clip.epoch: unknown setting; did you mean `epochs`?" in done.stderr


@pytest.mark.parametrize(
    ("job", "changes", "expected"),
    [
        ("train_clip", {"clip__epoch": 1}, "clip.epoch: unknown setting; did you mean `epochs`?"),
        ("score", {"chunk_size": "many"}, "chunk_size: Input should be a valid integer"),
        ("score", {"victim__pth": "x"}, "victim.pth: unknown setting; did you mean `path`?"),
        ("train_clip", {"clip__shards": "nowhere/*.tar"}, "no shards at nowhere/*.tar"),
        ("train_clip", {"clip__shards": "garbage.tar"}, "garbage.tar"),
        ("train_clip", {"clip__init": "bomb.pt"}, "bomb.pt holds more than tensors"),
        ("score", {"shards": []}, "nothing to score: name `shards` to read"),
    ],
)
def test_a_mistake_is_one_message_and_no_traceback(mistaken, monkeypatch, job, changes, expected):
    monkeypatch.chdir(ROOT)
    assert expected in mistaken(job, **changes)


@pytest.mark.slow
def test_a_decoder_of_another_victim_does_not_score(mistaken, monkeypatch, tmp_path):
    from dede_ray.models.clip import build_clip, model_description, save_clip

    monkeypatch.chdir(ROOT)
    described = model_description("configs/models/clip_digits.json")
    save_clip(tmp_path / "other", build_clip(described), described)
    assert "another victim" in mistaken("score", victim__path="other")


# ------------------------------------------------------------------------------------------------ on a cluster


def free_ports(count: int) -> list[str]:
    """Ports without a listener, below those that the system gives away and above those of Ray's workers."""
    found: list[str] = []
    for port in range(20_000 + os.getpid() % 8000, 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.append(str(port))
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


@dataclass(frozen=True)
class Head:
    """Where a cluster is reached: by `ray job submit`, and by RAY_ADDRESS."""

    jobs: str
    ray: str


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A Ray head of our own, beside whatever Ray this machine runs."""
    python = Path(sys.executable)
    environment = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)  # jobs must run what was uploaded
    ports = free_ports(4)
    names = ("--port", "--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port")
    temporary = tempfile.mkdtemp(dir="/tmp", prefix="r")  # sockets lie in it, whose paths must be short
    with open(f"{temporary}/head.log", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
             "--object-store-memory=200000000", "--temp-dir", temporary, "--min-worker-port=0", "--max-worker-port=0",
             *(word for pair in zip(names, ports, strict=True) for word in pair)],
            cwd=temporary, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 90
            while "Ray runtime started" not in Path(log.name).read_text():
                assert process.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.2)
            yield Head(f"http://127.0.0.1:{ports[1]}", f"127.0.0.1:{ports[0]}")
        finally:
            stop(process.pid)
            process.wait()
            shutil.rmtree(temporary, ignore_errors=True)


def stop(pid: int) -> None:
    """Kill a process and everything it started, at once, and nothing else."""
    import psutil

    process = psutil.Process(pid)
    for one in [*process.children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)


def submit(head: Head, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit --working-dir . -- python jobs/<argv>`."""
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "job",
        "submit",
        "--address",
        head.jobs,
        "--working-dir",
        ".",
    ]
    command += ["--", "python", f"jobs/{argv[0]}.py", *argv[1:]]
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)


@pytest.mark.slow
def test_a_submitted_job_needs_no_config_and_names_what_it_exported(head, smoke, checkout):
    job = submit(head, checkout, "train_clip")
    assert job.returncode == 0, job.stdout
    folders = [Path(name) for name in re.findall(r"^(?:clip|decoder): .* -> (.*)$", job.stdout, re.MULTILINE)]
    assert [folder.parts[-4:] for folder in folders] == [
        ("runs", "smoke", "victim", "clip"),
        ("runs", "smoke", "victim", "decoder"),
    ]
    assert checkout not in folders[0].parents, "what was uploaded runs, not what lies here"
    assert not (folders[0].parents[1] / "scores").exists(), "runs/ stays here"
    assert all(list(folder.glob("*.safetensors")) for folder in folders)


@pytest.mark.slow
def test_a_submitted_job_takes_a_demo_and_goes_on_where_the_same_upload_stopped(head, smoke, checkout):
    job = submit(head, checkout, "train_clip", SMOKE)
    assert job.returncode == 0, job.stdout
    assert "/runs/smoke/victim/decoder" in job.stdout


@pytest.mark.slow
def test_a_submitted_job_takes_a_config_and_overrides(head, smoke, checkout, tmp_path):
    shards = checkout / "runs/smoke/poisoned/train-*.tar"  # a path that every machine of the cluster sees
    settings = {"output": "runs/else", "clip": {"shards": str(shards), "model": "configs/models/clip_digits.json"}}
    (checkout / "configs/mine.yaml").write_text(yaml.safe_dump(settings))
    overrides = ["--output", str(tmp_path), "--clip.epochs", "0.5"]
    job = submit(head, checkout, "train_clip", "configs/mine.yaml", *overrides)
    assert job.returncode == 0, job.stdout
    assert f"-> {tmp_path / 'clip'}" in job.stdout
    assert list((tmp_path / "clip").glob("*.safetensors"))


@pytest.mark.slow
def test_scoring_on_a_running_cluster_gives_the_same_manifest(head, smoke, checkout, tmp_path):
    """Without a config; the cluster's processes run in another folder than the job."""
    scores = checkout / "runs/smoke/scores"
    before = {path.relative_to(scores): path.read_bytes() for path in scores.rglob("*") if path.is_file()}
    shutil.move(scores, tmp_path / "scores")
    job = run_job(checkout, "score", RAY_ADDRESS=head.ray)
    assert job.returncode == 0, job.stderr
    assert re.match(r"\d+ of 1,000 samples flagged by dede_reverse \(conformal\); 0 unreadable -> ", job.stdout)
    assert "Ray with 2 CPUs" in job.stderr
    assert {path.relative_to(scores): path.read_bytes() for path in scores.rglob("*") if path.is_file()} == before
