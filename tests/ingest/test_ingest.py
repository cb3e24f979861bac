"""Ingestion is killed, resumes, and is shared by any number of workers; the shards are the same to the byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dede_ray.ingest.ingest import IngestConfig, ingest
from dede_ray.runtime.config import Mistake

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, png):
    """120 pictures of three classes, every tenth of them damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(120):
        path = folder / f"class {i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        content = png(i, 200, 200)
        path.write_bytes(content[: len(content) // 2] if i % 10 == 0 else content)
    return folder


def settings(pictures: Path, output: Path, **changes) -> dict:
    source = {"kind": "folders", "splits": {"train": str(pictures)}, "calibration": 20}
    return {"source": source, "output": str(output), "samples_per_shard": 7, **changes}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


def result(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())["result"]


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    """An ingestion from start to end in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ingest(IngestConfig.model_validate(settings(pictures, folder, workers=1)))
    return folder


def test_every_picture_is_in_a_shard_or_counted(undisturbed):
    counts = result(undisturbed)
    assert sum(counts["counts"].values()) == 108
    assert counts["left_out"] == {"image_truncated": 12}
    assert len(shards(undisturbed)) == 15 + 3 + 1  # 100 and 20 pictures, 7 in each shard, and classes.json


@pytest.mark.parametrize("workers", [None, 2, 3])
def test_the_number_of_workers_changes_no_byte(pictures, undisturbed, tmp_path, local_ray, workers):
    ingest(IngestConfig.model_validate(settings(pictures, tmp_path, workers=workers)))
    assert shards(tmp_path) == shards(undisturbed)
    assert result(tmp_path)["counts"] == result(undisturbed)["counts"]
    assert result(tmp_path)["left_out"] == result(undisturbed)["left_out"]


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_run_again_it_gives_the_same_shards(pictures, undisturbed, tmp_path, workers):
    config = tmp_path / "ingest.json"  # which is YAML, too
    output = tmp_path / "out"
    config.write_text(json.dumps(settings(pictures, output, workers=workers)))
    command = [sys.executable, "jobs/ingest.py", str(config)]
    for wanted in (1, 6, 12):  # killed with so many shards there
        job = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
        while job.poll() is None and len(list(output.glob("*.tar"))) < wanted:
            time.sleep(0.001)
        job.send_signal(signal.SIGKILL)
        job.communicate()
    receipts = {path.stem for path in (output / ".ingest").glob("*-*.json")}
    finished = {path: path.stat().st_mtime_ns for path in output.glob("*.tar") if path.stem in receipts}
    assert 12 - workers <= len(finished) < 18

    (output / ".train-00099.tar.tmp-1").write_bytes(b"half")  # as a kill within a shard leaves it
    ingest(IngestConfig.model_validate(settings(pictures, output, workers=1)))
    assert shards(output) == shards(undisturbed)
    assert result(output)["counts"] == result(undisturbed)["counts"]
    assert result(output)["left_out"] == result(undisturbed)["left_out"]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # none was made again


def stop_after(monkeypatch, num_shards: int):
    """Let an ingestion in this process stop, as if killed, when so many shards are done."""
    import dede_ray.ingest.ingest as module

    write, written = module.write_shard, []

    def failing(path, samples):
        if len(written) == num_shards:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, samples)

    monkeypatch.setattr(module, "write_shard", failing)


def test_a_run_that_is_continued_with_more_workers_is_the_same_run(
    pictures, undisturbed, tmp_path, local_ray, monkeypatch
):
    stop_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        ingest(IngestConfig.model_validate(settings(pictures, tmp_path, workers=1)))
    monkeypatch.undo()
    ingest(IngestConfig.model_validate(settings(pictures, tmp_path, workers=2)))
    assert shards(tmp_path) == shards(undisturbed)


def test_a_source_that_changes_while_a_run_is_interrupted_is_a_mistake(png, tmp_path, monkeypatch):
    for i in range(20):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.png").write_bytes(png(i))
    source = {"kind": "folders", "splits": {"train": str(tmp_path / "in")}}
    config = IngestConfig.model_validate(settings(tmp_path / "in", tmp_path / "out", source=source, workers=1))
    stop_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        ingest(config)
    monkeypatch.undo()
    (tmp_path / "in" / "new.png").write_bytes(png(99))
    with pytest.raises(Mistake, match="source has changed since this run began"):
        ingest(config)
    (tmp_path / "in" / "new.png").unlink()
    assert ingest(config).startswith("train 20 samples")


def test_a_run_that_found_nothing_usable_leaves_the_folder_to_the_next_one(png, tmp_path):
    (tmp_path / "in" / "class").mkdir(parents=True)
    picture = tmp_path / "in" / "class" / "a.png"
    picture.write_bytes(png()[:50])
    source = {"kind": "folders", "splits": {"train": str(tmp_path / "in")}}
    config = IngestConfig.model_validate({"source": source, "output": str(tmp_path / "out")})
    with pytest.raises(Mistake, match="not one sample of the source can be used: image_"):
        ingest(config)
    picture.write_bytes(png())
    assert ingest(config.model_copy(update={"seed": 1})).startswith("train 1 samples")


@pytest.mark.slow
def test_the_comparison_with_webdatasets_shard_writer_runs(local_ray, write_pictures, tmp_path):
    pytest.importorskip("webdataset")
    from tests.benchmarks.speed import IngestSpeed, SpeedConfig, measure_speed

    write_pictures(tmp_path)
    ingestion = IngestSpeed(shards=str(tmp_path), num_samples=100, samples_per_shard=20, repeats=1)
    table = measure_speed(SpeedConfig(ingest=ingestion))
    assert "100 files" in table
    assert "webdataset.ShardWriter" in table
    assert "ratio" in table
