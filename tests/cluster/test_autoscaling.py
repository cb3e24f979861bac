"""A pass on a cluster that grows and shrinks: nodes come while there is work, and go when there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import throwaway
import yaml

from dede_ray.data.ledger import read_parts
from dede_ray.data.passes import PassResources

HERE = Path(__file__).parent


def growing(tmp_path: Path, **kinds: dict[str, float]) -> AbstractContextManager[throwaway.Head]:
    """A head without CPUs whose autoscaler adds up to two nodes of each kind, and takes them away after nine seconds.

    Ray's fake provider makes each node a raylet on this machine.
    """
    [port] = throwaway.free_ports(1)
    memory = {"object_store_memory": 100 * 2**20}
    config = {
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": 0.15,
        "upscaling_speed": 10,
        "provider": {
            "type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
            "disable_launch_config_check": True, "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{
                kind: {"resources": {**shape, **memory}, "node_config": {}, "min_workers": 0, "max_workers": 2}
                for kind, shape in kinds.items()
            },
        },
        "head_node_type": "ray.head.default",
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [], "initialization_commands": [],
        "head_start_ray_commands": [], "worker_start_ray_commands": [], "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [], "auth": {}, "docker": {},
    }  # fmt: skip
    (tmp_path / "fake.yaml").write_text(yaml.safe_dump(config))
    return throwaway.head(
        "--num-cpus=0", "--num-gpus=0", "--include-dashboard=false", f"--autoscaling-config={tmp_path / 'fake.yaml'}",
        gcs_port=port, AUTOSCALER_UPDATE_INTERVAL_S="1", RAY_FAKE_CLUSTER="1",
        RAY_OVERRIDE_NODE_ID_FOR_TESTING="fffffffffffffffffffffffffffffffffffffffffffffffffff00000",
    )  # fmt: skip


@pytest.mark.slow
def test_the_score_pass_adds_nodes_to_a_head_without_cpus_and_gives_them_back(write_pictures, tmp_path):
    """A CPU pool that decodes, a GPU pool that scores."""
    shards = tmp_path / "shards"
    write_pictures(shards, range(480), per_shard=60)
    with growing(tmp_path, cpu_worker={"CPU": 1}, gpu_worker={"CPU": 1, "GPU": 1}) as head:
        command = [sys.executable, str(HERE / "autoscaled_pass.py"), str(shards), str(tmp_path / "pass")]
        done = subprocess.run(command, env=head.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["begun"] == 1, "the head alone"
    assert report["most"] >= 4, "the head, a node that decodes, two that score"
    assert report["left"] == 1, "idle nodes are given back"
    assert report["num_samples"] == 480
    rows = [row for n in range(8) for row in read_parts(tmp_path / "pass", f"train-{n:05d}.tar").to_pylist()]
    assert [row["sample_id"] for row in rows] == [f"train-{n // 60:05d}.tar/{n:04d}" for n in range(480)]
    assert len({row["node"] for row in rows}) == 2, "both of the nodes that score did"


@pytest.mark.slow
def test_training_waits_for_the_nodes_that_a_head_without_cpus_adds(write_pictures, clip_config, tmp_path):
    """The real job: two workers and a reader, on a cluster that has nothing when it starts."""
    write_pictures(tmp_path / "shards", range(64), per_shard=32)
    config = {
        "output": str(tmp_path / "victim"),
        "lanes": 2,
        "clip": {
            "shards": str(tmp_path / "shards"), "model": str(clip_config), "batch_size": 16, "shuffle_buffer": 32,
            "epochs": 2, "learning_rate": 1e-3,
        },
        "workers": {"num_workers": 2, "readers": 1, "threads_per_worker": 1},
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    with growing(tmp_path, cpu_worker={"CPU": 2}) as head:
        command = [sys.executable, str(HERE.parent / "jobs/train_clip.py"), str(tmp_path / "train.yaml")]
        done = subprocess.run(command, env=head.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Ray with 0 CPUs and 0 GPUs" in done.stderr
    assert "clip: 8 steps on 64 samples" in done.stdout
    assert (tmp_path / "victim/clip/metrics.jsonl").is_file()


def test_a_cluster_that_has_nothing_yet_but_grows_is_asked_all_the_same():
    """An empty head is what an autoscaling cluster looks like before its first job."""
    asked = PassResources(max_actors=8, gpus_per_actor=1, cpus_per_actor=4).on({"memory": 1e9})
    assert (asked.min_actors, asked.max_actors, asked.gpus_per_actor, asked.cpus_per_actor) == (1, 8, 1, 4)
    asked = PassResources().on({})
    assert (asked.min_actors, asked.max_actors, asked.cpus_per_actor) == (1, 1, 0.75)


def test_a_cluster_that_grows_begins_with_what_it_has_and_no_more_than_was_allowed():
    asked = PassResources(max_actors=8, gpus_per_actor=1, cpus_per_actor=4).on({"CPU": 33, "GPU": 4})
    assert (asked.min_actors, asked.max_actors) == (4, 8)
    asked = PassResources(max_actors=2).on({"CPU": 33})
    assert (asked.min_actors, asked.max_actors) == (2, 2)
