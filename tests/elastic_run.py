"""An elastic run on a cluster of three raylets on this machine: a node is killed, one is added, one is drained.

python tests/elastic_run.py <folder> <ZeRO stage>: trains on the folder's shards with two workers, of which one may be
lost, and writes what happened to <folder>/outcome.json. A process of its own, because it brings its own cluster.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="10",
    RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1",
    RAY_USAGE_STATS_ENABLED="0",
)

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from dede_ray.training import TrainConfig, train


def main(folder: Path, stage: int) -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("dede_ray").setLevel(logging.INFO)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 150 * 2**20})
    node = {"num_cpus": 1, "object_store_memory": 150 * 2**20}  # room for one worker and its readers
    nodes = [cluster.add_node(**node) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    config = TrainConfig.model_validate(
        {
            "output": str(folder / "elastic"), "lanes": 4, "log_every": 1,
            "clip": {
                "shards": str(folder / "shards"), "model": str(folder / "vit.json"), "batch_size": 16, "epochs": 400,
                "learning_rate": 5e-4, "warmup_steps": 5, "shuffle_buffer": 512,
            },
            "workers": {
                "num_workers": 2, "min_workers": 1, "cpus_per_worker": 0.7, "read_cpus": 0.1, "threads_per_worker": 1,
                "zero_stage": stage, "checkpoint_every": 100, "max_failures": 8, "resize_check_s": 3,
            },
        }
    )  # fmt: skip
    outcome: dict = {"events": []}

    def run() -> None:
        try:
            outcome["said"] = train(config)
        except BaseException as error:
            outcome["error"] = repr(error)

    def last() -> dict:
        try:
            return json.loads((folder / "elastic" / "clip" / "metrics.jsonl").read_text().splitlines()[-1])
        except (OSError, IndexError, ValueError):
            return {"step": -1, "num_workers": 0}

    def wait_for(num_workers: int, steps: int) -> None:
        """Until so many workers have made so many steps."""
        first = None
        while thread.is_alive():
            line = last()
            if line["num_workers"] == num_workers:
                first = line["step"] if first is None else first
                if line["step"] >= first + steps:
                    outcome["events"].append([line["step"], num_workers])
                    return
            time.sleep(0.05)
        raise SystemExit(f"the run ended before {num_workers} workers trained: {outcome}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_for(2, steps=150)
    cluster.remove_node(nodes[1], allow_graceful=False)
    wait_for(1, steps=50)
    added = cluster.add_node(**node)
    wait_for(2, steps=50)
    before = last()["step"]
    client = GcsClient(address=cluster.address)
    deadline_ms = int((time.time() + 8) * 1000)
    drained = client.drain_node(
        added.node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", deadline_ms
    )
    saved_at = None
    while time.time() * 1000 < deadline_ms:
        time.sleep(0.1)
        try:
            snapshot = json.loads((folder / "elastic/clip/checkpoints/checkpoint_manager_snapshot.json").read_text())
        except ValueError:  # being written
            continue
        steps = [r["metrics"]["step"] for r in snapshot["checkpoint_results"]]
        if steps and max(steps) > before and max(steps) % 100:
            saved_at = max(steps)  # not one of the regular ones
    cluster.remove_node(added, allow_graceful=False)
    wait_for(1, steps=50)
    thread.join()
    outcome.update(drained=drained, drained_after=before, saved_at=saved_at)
    (folder / "outcome.json").write_text(json.dumps(outcome))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]))
