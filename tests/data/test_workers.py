"""Actors: what they tell, to the driver and to Prometheus."""

from __future__ import annotations

import json
import time
import urllib.request

import ray
from passes import run

from dede_ray.data.passes import PassResources, stage_shares


def scraped() -> str:
    """What the node's Prometheus endpoint shows."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_prometheus_sees_samples_reasons_and_stages_of_a_pass(local_ray, write_tar, png, tmp_path):
    write_tar("shards/a.tar", [(f"{i:04d}.png", b"rubbish" if i == 3 else png(i)) for i in range(10)])
    run(tmp_path / "shards", tmp_path / "pass", name="seen by prometheus")
    deadline, lines = time.monotonic() + 40, []
    while time.monotonic() < deadline and not any('reason="image_unreadable"' in line for line in lines):
        time.sleep(0.5)
        lines = [line for line in scraped().splitlines() if 'pass="seen by prometheus"' in line]
    total = sum(float(line.rpartition(" ")[2]) for line in lines if "dede_ray_samples" in line)
    unusable = [line for line in lines if "dede_ray_unusable_samples" in line]
    assert total == 10
    assert [float(line.rpartition(" ")[2]) for line in unusable] == [1]
    stages = {
        stage for stage in ("read", "decode", "work", "write") if any(f'stage="{stage}"' in line for line in lines)
    }
    assert stages == {"read", "decode", "work", "write"}


def test_the_time_of_a_pass_is_told_by_stage(local_ray, write_pictures, tmp_path, caplog):
    write_pictures(tmp_path / "shards", range(10))
    with caplog.at_level("INFO"):
        run(tmp_path / "shards", tmp_path / "pass")
    timing = json.loads((tmp_path / "pass" / "timing.json").read_text())
    assert timing["num_samples"] == 10
    assert timing["stages"].keys() >= {"read", "decode", "wait", "transfer", "work", "write"}
    assert "test: 10 samples done in" in caplog.text
    assert "readers: " in caplog.text


def test_shares_are_of_the_actors_and_of_the_readers_time():
    said = stage_shares({"wait": 1, "encode": 6, "score": 3, "start": 50, "read": 1, "decode": 3})
    actors, readers = said.split("; ")
    assert actors == "actors: encode 60%, score 30%, wait 10%"
    assert readers == "readers: decode 75%, read 25%, 0.44 s for each second that actors work"
    assert stage_shares({}) == ""


def test_a_journal_names_every_chunk_that_is_begun(write_pictures, tmp_path, monkeypatch, picture):
    from passes import Brightness

    from dede_ray.data.shards import Limits, list_shards
    from dede_ray.data.workers import JOURNAL, Reading, Share, Worker, read_and_decode

    write_pictures(tmp_path / "shards", range(10))
    monkeypatch.setenv(JOURNAL, str(tmp_path / "journal.txt"))
    [shard] = list_shards(str(tmp_path / "shards"))
    worker = Worker(tmp_path / "pass", Brightness, {}, 1, "a pass")
    reading = Reading(tmp_path / "pass", 32, 4, Limits(), None)
    for _ in range(2):  # the second time nothing is begun: what stands, stands
        for table in read_and_decode(shard, (), reading, Share()):
            worker(table)
    lines = [line.split("\t")[2:] for line in (tmp_path / "journal.txt").read_text().splitlines()]
    assert lines == [["a pass", shard.name, str(number)] for number in range(3)]


def test_an_actor_takes_its_share_of_whatever_the_cluster_is():
    auto = PassResources()
    four, gpu = auto.on({"CPU": 4}), PassResources(gpus_per_actor=0.5).on({"CPU": 16, "GPU": 2})
    assert (four.min_actors, four.cpus_per_actor, four.decode_cpus, four.threads_per_actor) == (4, 0.75, 0.25, 1)
    assert (gpu.min_actors, gpu.cpus_per_actor, gpu.decode_cpus) == (4, 1, 1)
    assert auto.on({"CPU": 1}).min_actors == 1
    growing = PassResources(min_actors=1, max_actors=8, gpus_per_actor=1).on({"CPU": 0})
    assert (growing.min_actors, growing.max_actors, growing.cpus_per_actor) == (1, 8, 1)
    assert PassResources(memory_per_actor=10).on({"CPU": 4}).of_actor()["memory"] == 10
