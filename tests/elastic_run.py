"""Runs on a cluster of several raylets on this machine, of which some die: a process of its own, with its own cluster.

    python tests/elastic_run.py <folder> <story> <ZeRO stage>

trains on the folder's shards as the story wants it, and writes what happened to <folder>/outcome.json:

spot      two workers, of which one may be lost: a node is killed, one is added, one is drained
killed    four workers, undisturbed in "whole"; again in "killed", where a worker, the controller and a node are killed
          and another node comes
smaller   four workers, undisturbed in "whole"; again in "killed", where a node is killed and none comes
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="10",
    RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1",
    RAY_USAGE_STATS_ENABLED="0",
)

import psutil
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from dede_ray.training import TrainConfig, train

# Room for one worker and its readers; Ray keeps as many idle processes per node as it has CPUs, and starting one anew
# for each window takes seconds.
NODE = {"num_cpus": 2, "object_store_memory": 150 * 2**20}


class Run:
    """A training run in a thread, and the look of somebody who watches it."""

    def __init__(self, folder: Path, output: str, clip: dict[str, Any], workers: dict[str, Any], lanes: int = 4):
        self.folder, self.outcome = folder / output / "clip", {"events": []}
        config = TrainConfig.model_validate(
            {
                "output": str(folder / output), "lanes": lanes, "log_every": 1,
                "clip": {
                    "shards": str(folder / "shards"), "model": str(folder / "vit.json"), "batch_size": 16,
                    "warmup_steps": 5, **clip,
                },
                "workers": {
                    "cpus_per_worker": 1.4, "read_cpus": 0.2, "threads_per_worker": 1, "max_failures": 8, **workers,
                },
            }
        )  # fmt: skip
        self.thread = threading.Thread(target=self._run, args=(config,), daemon=True)
        self.thread.start()

    def _run(self, config: TrainConfig) -> None:
        try:
            self.outcome["said"] = train(config)
        except BaseException as error:
            self.outcome["error"] = repr(error)

    def last(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])
        except (OSError, IndexError, ValueError):
            return {"step": -1, "num_workers": 0}

    def wait_for(self, num_workers: int, steps: int = 0, step: int = 0) -> None:
        """Until so many workers have made so many steps, and have reached this one."""
        first = None
        while self.thread.is_alive():
            line = self.last()
            if line["num_workers"] == num_workers:
                first = line["step"] if first is None else first
                if line["step"] >= max(first + steps, step):
                    self.outcome["events"].append([line["step"], num_workers])
                    return
            time.sleep(0.02)
        raise SystemExit(f"the run ended before {num_workers} workers trained: {self.outcome}")

    def until_it_goes_back(self, kill: Callable[[], None]) -> None:
        """Kill something, and wait until the run goes on from a checkpoint: it then writes its metrics anew."""
        metrics = self.folder / "metrics.jsonl"
        before = metrics.stat().st_ino
        kill()
        while self.thread.is_alive() and metrics.stat().st_ino == before:
            time.sleep(0.02)

    def end(self) -> dict[str, Any]:
        self.thread.join()
        if "error" in self.outcome:
            raise SystemExit(self.outcome["error"])
        return self.outcome


def kill_actor(kind: str) -> None:
    """SIGKILL for one actor of this machine's Ray: RayTrainWorker or TrainController."""
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and kind in process.cmdline()[0]:
                process.kill()
                return
        except psutil.Error:  # gone already
            continue
    raise SystemExit(f"no process of a {kind}")


def kill_node(cluster: Cluster, node: Any) -> None:
    """SIGKILL for a raylet and for every process below it, all at once."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    cluster.remove_node(node, allow_graceful=False)


def spot(folder: Path, stage: int, cluster: Cluster) -> dict[str, Any]:
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    run = Run(
        folder, "elastic", {"epochs": 400, "learning_rate": 5e-4, "shuffle_buffer": 512},
        {"num_workers": 2, "min_workers": 1, "zero_stage": stage, "checkpoint_every": 100, "resize_check_s": 3},
    )  # fmt: skip
    run.wait_for(2, steps=150)
    cluster.remove_node(nodes[1], allow_graceful=False)
    run.wait_for(1, steps=50)
    added = cluster.add_node(**NODE)
    run.wait_for(2, steps=50)
    before = run.last()["step"]
    client = GcsClient(address=cluster.address)
    deadline_ms = int((time.time() + 8) * 1000)
    drained = client.drain_node(
        added.node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", deadline_ms
    )
    saved_at = None
    while time.time() * 1000 < deadline_ms:
        time.sleep(0.1)
        try:
            snapshot = json.loads((run.folder / "checkpoints/checkpoint_manager_snapshot.json").read_text())
        except ValueError:  # being written
            continue
        steps = [r["metrics"]["step"] for r in snapshot["checkpoint_results"]]
        if steps and max(steps) > before and max(steps) % 100:
            saved_at = max(steps)  # not one of the regular ones
    cluster.remove_node(added, allow_graceful=False)
    run.wait_for(1, steps=50)
    return {**run.end(), "drained": drained, "drained_after": before, "saved_at": saved_at}


def killed(folder: Path, stage: int, cluster: Cluster) -> dict[str, Any]:
    nodes = [cluster.add_node(**NODE) for _ in range(4)]
    clip = {"epochs": 40, "learning_rate": 2e-3, "shuffle_buffer": 512}  # 250 steps
    workers = {"num_workers": 4, "readers": 1, "zero_stage": stage, "checkpoint_every": 10}
    Run(folder, "whole", clip, workers).end()
    run = Run(folder, "killed", clip, workers)

    def replace_a_node() -> None:
        kill_node(cluster, nodes[2])
        cluster.add_node(**NODE)

    run.wait_for(4, step=34)
    run.until_it_goes_back(lambda: kill_actor("RayTrainWorker"))
    run.wait_for(4, step=88)
    run.until_it_goes_back(lambda: kill_actor("TrainController"))
    run.wait_for(4, step=147)
    run.until_it_goes_back(replace_a_node)
    run.wait_for(4, steps=5)
    return run.end()


def smaller(folder: Path, stage: int, cluster: Cluster) -> dict[str, Any]:
    nodes = [cluster.add_node(**NODE) for _ in range(4)]
    clip = {"epochs": 40, "batch_size": 24, "learning_rate": 5e-4, "shuffle_buffer": 768}  # 167 steps
    workers = {"num_workers": 4, "readers": 1, "zero_stage": stage, "checkpoint_every": 20, "resize_check_s": 3}
    Run(folder, "whole", clip, workers, lanes=12).end()
    run = Run(folder, "killed", clip, {**workers, "min_workers": 2}, lanes=12)
    run.wait_for(4, step=70)
    run.until_it_goes_back(lambda: kill_node(cluster, nodes[1]))
    run.wait_for(3, steps=20)
    return run.end()


def main(folder: Path, story: str, stage: int) -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("dede_ray").setLevel(logging.INFO)
    head = {"num_cpus": 0, "object_store_memory": 150 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    outcome = {"spot": spot, "killed": killed, "smaller": smaller}[story](folder, stage, cluster)
    (folder / "outcome.json").write_text(json.dumps(outcome))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2], int(sys.argv[3]))
