"""The zoo: branches in their order, what fails and what continues, kills, and the table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from dede_ray.data.images import encode_image
from dede_ray.data.shards import Sample, write_shards
from dede_ray.evaluation.zoo import ZooConfig, build_zoo
from dede_ray.models.encoders import Described, ResNet, build_encoder, save_encoder
from dede_ray.runtime.config import Mistake, write_json

ROOT = Path(__file__).parents[2]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with labelled shards, an encoder, and a config that measures the encoder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split in ("test", "probe"):
        samples = [
            Sample(
                f"{i}", i, encode_image(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), "png"), "png", label=i % 2
            )
            for i in range(20)
        ]
        write_shards(tmp_path / "clean", split, samples, 100)
    torch.manual_seed(0)
    architecture = ResNet(width=4)
    save_encoder(tmp_path / "encoder", build_encoder(architecture), Described(architecture, 16))
    settings = {
        "victim": {"kind": "encoder", "path": "encoder"}, "test_shards": "clean/test-*.tar",
        "probe_shards": "clean/probe-*.tar",
    }  # fmt: skip
    (tmp_path / "measure.yaml").write_text(yaml.safe_dump(settings))
    poisoning = {"trigger": {"kind": "patch"}, "rate": 0.2, "target_label": 1}
    write_json(tmp_path / "poisoned" / "run.json", {"settings": {**poisoning, "shards": "clean", "output": "poisoned"}})
    return tmp_path


def zoo(**branches):
    return ZooConfig.model_validate({"output": "zoo", "at_once": 2, "branches": branches})


@pytest.mark.slow
def test_the_table_has_what_worked_and_the_mistake_says_what_did_not(work, capfd):
    branches = {
        "honest": {"steps": ["measure measure.yaml"], "victim": "encoder"},
        "broken": {"after": ["honest"], "steps": ["measure measure.yaml --made-by nowhere", "measure measure.yaml"]},
        "stranded": {"after": ["broken"], "steps": ["measure measure.yaml"], "victim": "nowhere"},
    }
    with pytest.raises(Mistake) as said:
        build_zoo(zoo(**branches))
    message = str(said.value)
    assert "2 of 3 branches did not finish" in message
    assert "broken: `measure measure.yaml --made-by nowhere` ended with exit code 2: error: no record of a" in message
    assert "see zoo/logs/broken.log" in message
    assert "stranded: it needs broken" in message
    assert "| honest | probe |" in message
    assert "no record of a poisoning" in (work / "zoo" / "logs" / "broken.log").read_text()
    assert "| honest | probe |" in (work / "zoo" / "zoo.md").read_text()

    branches["broken"]["steps"] = ["measure measure.yaml --made-by poisoned"]
    table = build_zoo(zoo(**branches))
    records = json.loads((work / "zoo" / "zoo.json").read_text())
    assert records["victims"].keys() == {"honest"}
    assert records["times"]["branches"].keys() == {"honest", "broken", "stranded"}
    assert records["times"]["elapsed"] == pytest.approx(sum(records["times"]["branches"].values()), abs=2)
    assert table in (work / "zoo" / "zoo.md").read_text()


def test_a_wrong_step_is_found_before_anything_runs(work):
    branches = {"good": {"steps": ["measure measure.yaml"]}, "bad": {"steps": ["measure measure.yaml --speed 3"]}}
    with pytest.raises((Mistake, SystemExit)):
        build_zoo(zoo(**branches))
    assert not (work / "zoo").exists()


@pytest.mark.parametrize("after", [["b"], ["nobody"], ["a"]])
def test_branches_that_wait_for_each_other_are_a_mistake(after):
    with pytest.raises(ValidationError, match="`after` names a branch that does not exist, or that waits for it"):
        zoo(a={"steps": ["measure m.yaml"], "after": after}, b={"steps": ["measure m.yaml"], "after": ["a"]})


def start(work: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "jobs" / "zoo.py"), "zoo.yaml"]
    return subprocess.Popen(command, cwd=work, env=environment, stdout=-1, stderr=-1, text=True)


def running(pid: int) -> list[int]:
    """Children of a process."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")  # by the thread that started them
    return [int(one) for children in lists for one in children.read_text().split()]


def wait_for(condition, seconds=60):
    started = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - started < seconds
        time.sleep(0.05)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the children of a process")
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_zoo_takes_its_jobs_along_and_a_killed_one_keeps_its_folder_until_they_end(work, how):
    config = zoo(honest={"steps": ["measure measure.yaml"], "victim": "encoder"})
    (work / "zoo.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    first = start(work)
    (job,) = wait_for(lambda: running(first.pid))
    os.kill(job, signal.SIGSTOP)  # so that it cannot end by itself
    os.kill(first.pid, how)
    if how == signal.SIGTERM:
        os.kill(job, signal.SIGCONT)
        assert first.wait(30) == 143
        wait_for(lambda: not Path(f"/proc/{job}").exists())
    else:
        first.wait(30)
        second = start(work)
        _, said = second.communicate(timeout=60)
        assert second.returncode == 2
        assert "another run, or a job that it left behind, is using zoo" in said
        os.kill(job, signal.SIGCONT)
        os.kill(job, signal.SIGKILL)
    third = start(work)
    said, _ = third.communicate(timeout=120)
    assert third.returncode == 0
    assert "| honest | probe |" in said
