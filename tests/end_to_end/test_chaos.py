"""Scoring under fire, and on an object store: whatever is killed, the same bytes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dede_ray.runtime.store import place, write_atomically
from tests.benchmarks.chaos import ChaosConfig

JOB = Path(__file__).parents[2] / "jobs" / "score.py"


def in_its_own_process(code: str, folder: Path) -> str:
    """Clusters are started and left by one process; the tests' own Ray must not meet them."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.slow
def test_kills_of_driver_actors_readers_and_a_node_change_no_byte(clip_config, tmp_path):
    settings = {
        "output": str(tmp_path / "chaos"), "num_samples": 6000, "samples_per_shard": 1000, "chunk_size": 64,
        "drivers": 1, "actors": 2, "readers": 1, "nodes": 1, "pause_s": 0.7, "model": str(clip_config),
    }  # fmt: skip
    code = f"from dede_ray.chaos import *; print(chaos(ChaosConfig.model_validate({settings!r})))"
    said = in_its_own_process(code, tmp_path)
    assert "6,000 samples, 96 chunks, 5 SIGKILLs" in said
    report = json.loads((tmp_path / "chaos" / "chaos.json").read_text())
    assert {kind: of["kills"] for kind, of in report["by_kind"].items()} == {
        "driver": 1, "actor": 2, "reader": 1, "node": 1
    }  # fmt: skip


def test_whom_to_kill_follows_the_settings_and_the_seed():
    order = ChaosConfig(drivers=2, actors=3, readers=1, nodes=1).kills()
    assert sorted(order) == ["actor"] * 3 + ["driver"] * 2 + ["node", "reader"]
    assert order == ChaosConfig(drivers=2, actors=3, readers=1, nodes=1).kills()
    assert order != ChaosConfig(drivers=2, actors=3, readers=1, nodes=1, seed=1).kills()


def start(folder: Path, settings: dict) -> subprocess.Popen:
    (folder / "score.yaml").write_text(yaml.safe_dump(settings))
    with (folder / "score.log").open("a") as log:
        return subprocess.Popen([sys.executable, str(JOB), "score.yaml"], cwd=folder, stdout=log, stderr=log)


def objects(folder) -> dict[str, bytes]:
    """Name and content of everything below a folder on a store."""
    found = {}
    for path in folder.iterdir():
        if path.is_dir():
            found |= {f"{path.name}/{name}": content for name, content in objects(path).items()}
        else:
            found[path.name] = path.read_bytes()
    return found


@pytest.mark.slow
def test_a_run_that_is_killed_on_a_store_goes_on_there_to_the_same_bytes(
    s3, write_pictures, victim_folder, decoder_folder, tmp_path
):
    home = place(f"{s3}/{tmp_path.name}")
    for path in [
        *write_pictures(tmp_path / "shards", range(300), per_shard=100),
        *write_pictures(tmp_path / "shards", range(1000, 1100), "calibration", per_shard=100),
    ]:
        write_atomically(home / "shards" / path.name, path.read_bytes())
    settings = {
        "shards": str(home / "shards" / "train-*.tar"), "calibration": str(home / "shards" / "calibration-00000.tar"),
        "output": str(home / "scores"), "victim": {"path": str(victim_folder)}, "chunk_size": 5,
        "detectors": [{"kind": "dede", "decoder": str(decoder_folder)}, {"kind": "density", "num_references": 100}],
        "resources": {"min_actors": 1, "max_actors": 1},
    }  # fmt: skip
    assert start(tmp_path, settings).wait() == 0, (tmp_path / "score.log").read_text()[-3000:]
    whole = objects(home / "scores")
    for name in whole:
        (home / "scores" / name).unlink()
    assert not objects(home / "scores")

    process = start(tmp_path, settings)
    parts = home / "scores" / "scores" / "parts" / "train-00001.tar"
    while process.poll() is None and not list(parts.glob("*.parquet")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    finished = {name for name in objects(home / "scores") if name.startswith("scores/parts") and "parquet" in name}
    assert 20 < len(finished) < 60
    assert start(tmp_path, settings).wait() == 0, (tmp_path / "score.log").read_text()[-3000:]
    clocks = re.compile(r".*timing\.json")
    disturbed = objects(home / "scores")
    assert disturbed.keys() == whole.keys()
    assert [name for name in whole if whole[name] != disturbed[name] and not clocks.fullmatch(name)] == []
    assert "scores: resuming; 1 of 3 shards are done" in (tmp_path / "score.log").read_text()
