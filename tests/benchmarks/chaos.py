"""One scoring run under fire: whatever is killed, the manifest has the bytes of an undisturbed run.

    python -m tests.benchmarks.chaos --num-samples 20000 --pause-s 0.5

A Ray cluster of several nodes on this machine, `jobs/score.py` as its driver, and SIGKILL at random moments: for the
driver (which is started again, as a scheduler would do), for actors, for readers, and for a whole node, which another
one replaces. Actors keep a journal of the chunks that they begin; a chunk that is begun twice is the cost of a kill.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml
from pydantic import Field

from dede_ray.data.shards import write_shards
from dede_ray.data.workers import JOURNAL
from dede_ray.runtime.cli import run_job
from dede_ray.runtime.config import Config, Mistake, read_json, write_json
from dede_ray.scan.manifest import read_manifest
from dede_ray.training.reconstruction import PRESETS
from tests.benchmarks.speed_scoring import digits, repeated, write_decoder, write_victim

logger = logging.getLogger(__name__)

Victim = Literal["driver", "actor", "reader", "node"]
TITLES: dict[str, str] = {"actor": "ray::MapWorker", "reader": "ray::Read"}
"""How the titles of Ray's processes begin."""


class ChaosConfig(Config):
    """Settings of `python -m tests.benchmarks.chaos`."""

    output: str = "runs/chaos"
    """Folder for shards, both runs' manifests and the journal. A finished undisturbed run is used again."""
    num_samples: int = Field(150_000, ge=100)
    """The bundled digits, under distinct keys."""
    samples_per_shard: int = Field(5000, ge=1)
    chunk_size: int = Field(256, ge=1)
    num_nodes: int = Field(2, ge=1)
    """Ray nodes beside the head, which has no CPUs."""
    cpus_per_node: int = Field(2, ge=1)
    drivers: int = Field(6, ge=0)
    """SIGKILLs for the driver."""
    actors: int = Field(11, ge=0)
    readers: int = Field(8, ge=0)
    nodes: int = Field(1, ge=0)
    pause_s: float = Field(1.5, gt=0)
    """Mean time from the first chunk that is begun after a kill to the next kill."""
    seed: int = 0
    model: str = "configs/models/clip_digits.json"
    """The victim's architecture; its weights, and the decoder's, are random."""

    def kills(self) -> list[Victim]:
        """What to kill, in a random order."""
        kinds: list[tuple[Victim, int]] = [
            ("driver", self.drivers), ("actor", self.actors), ("reader", self.readers), ("node", self.nodes)
        ]  # fmt: skip
        order = [kind for kind, count in kinds for _ in range(count)]
        random.Random(self.seed).shuffle(order)
        return order


@dataclass(frozen=True)
class Kill:
    """One SIGKILL, and the actors that ended with it."""

    victim: Victim
    actors: frozenset[int]


def chaos(config: ChaosConfig) -> str:
    """Score once undisturbed and once under fire, and compare. Ray must not be running: this starts its own clusters.

    Returns:
        What was killed, and what it cost.

    Raises:
        Mistake: the run ended before all kills were done, so it takes more samples or shorter pauses.
        RuntimeError: the manifests differ, or a kill cost more than a chunk of each process that it ended.
    """
    output = Path(config.output).absolute()
    settings = _prepare(config, output)
    if not (output / "undisturbed").is_dir():
        logger.info("undisturbed run: scoring %s samples", f"{config.num_samples:,}")
        shutil.rmtree(output / "scores", ignore_errors=True)
        with _Fire(config, output, settings) as fire:
            fire.run([])
        (output / "scores").rename(output / "undisturbed")
    shutil.rmtree(output / "scores", ignore_errors=True)
    (output / "journal.txt").unlink(missing_ok=True)
    with _Fire(config, output, settings) as fire:
        kills = fire.run(config.kills())
    same = [read_manifest(output / name).fingerprint() for name in ("undisturbed", "scores")]
    if same[0] != same[1]:
        raise RuntimeError(f"the manifests {output}/undisturbed and {output}/scores differ")
    return _account(config, output, kills, fire.took_s)


def _prepare(config: ChaosConfig, output: Path) -> Path:
    """Write shards, victim, decoder and the score job's settings, once for the same ones."""
    path, record = output / "score.yaml", output / "prepared.json"
    kinds = {"drivers", "actors", "readers", "nodes", "pause_s"}
    made_of = config.model_dump(mode="json", exclude=kinds)
    if record.is_file() and read_json(record, "record of a preparation") == made_of:
        return path
    for name in ("undisturbed", "scores", "shards"):
        shutil.rmtree(output / name, ignore_errors=True)
    torch.manual_seed(config.seed)
    victim = write_victim(output / "victim", config.model)
    write_decoder(output / "decoder", victim, PRESETS["tiny"].shape)
    write_shards(output / "shards", "train", repeated(digits(), config.num_samples), config.samples_per_shard)
    write_shards(output / "shards", "calibration", repeated(digits()[:500], 500), 500)
    settings: dict[str, Any] = {
        "shards": str(output / "shards" / "train-*.tar"),
        "calibration": str(output / "shards" / "calibration-*.tar"),
        "output": str(output / "scores"),
        "victim": {"path": str(output / "victim")},
        "detectors": [{"kind": "dede", "decoder": str(output / "decoder")}, {"kind": "density", "num_references": 200}],
        "chunk_size": config.chunk_size,
        "fitting": {"num_samples": 1000},
        "resources": {"min_actors": config.num_nodes, "max_actors": 2 * config.num_nodes},
    }
    path.write_text(yaml.safe_dump(settings))
    write_json(record, made_of)
    return path


class _Fire:
    """A cluster on this machine, a driver, and the kills."""

    def __init__(self, config: ChaosConfig, output: Path, settings: Path):
        self.config, self.output, self.settings = config, output, settings
        self.random = random.Random(config.seed + 1)
        self.driver: subprocess.Popen | None = None
        self.took_s = 0.0

    def __enter__(self) -> _Fire:
        from ray.cluster_utils import Cluster

        os.environ[JOURNAL] = str(self.output / "journal.txt")  # Ray's nodes inherit it
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_health_check_period_ms", "1000")  # a node that is gone is missed within seconds
        os.environ.setdefault("RAY_health_check_failure_threshold", "3")
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": 150 * 2**20, "include_dashboard": False},
        )
        self.nodes = [self._node() for _ in range(self.config.num_nodes)]
        return self

    def __exit__(self, *exception: object) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        self.cluster.shutdown()

    def _node(self) -> Any:
        return self.cluster.add_node(num_cpus=self.config.cpus_per_node, object_store_memory=300 * 2**20)

    def run(self, order: list[Victim]) -> list[Kill]:
        """Let the job run to its end, killing on the way."""
        started, kills = time.monotonic(), []
        self._start()
        for victim in order:
            self._pause()
            kills.append(Kill(victim, self._kill(victim)))
            logger.info("killed %d of %d: %s", len(kills), len(order), victim)
        while self._is_running():
            time.sleep(0.1)
        self.took_s = time.monotonic() - started
        return kills

    def _start(self) -> None:
        job = Path(__file__).parents[2] / "jobs" / "score.py"
        with (self.output / "driver.log").open("a") as log:
            self.driver = subprocess.Popen(
                [sys.executable, str(job), str(self.settings)], stdout=log, stderr=log, cwd=self.output,
                env={**os.environ, "RAY_ADDRESS": self.cluster.address},
            )  # fmt: skip

    def _is_running(self) -> bool:
        assert self.driver is not None
        code = self.driver.poll()
        if code:
            log = (self.output / "driver.log").read_text()
            raise RuntimeError(f"the driver ended with exit code {code}, and not by a kill:\n{log[-3000:]}")
        return code is None

    def _pause(self) -> None:
        """Wait until something is being scored after the last kill, and then for a random time."""
        begun = self._begun()
        while self._begun() == begun:
            self._still_running()
            time.sleep(0.05)
        end = time.monotonic() + self.random.uniform(0, 2 * self.config.pause_s)
        while time.monotonic() < end and self._is_running():
            time.sleep(0.02)

    def _begun(self) -> int:
        """Size of the journal in bytes: it grows with each chunk that is begun."""
        journal = self.output / "journal.txt"
        return journal.stat().st_size if journal.is_file() else 0

    def _kill(self, victim: Victim) -> frozenset[int]:
        """Kill one; returns the process ids of the actors that end with it."""
        self._still_running()
        if victim == "driver":
            assert self.driver is not None
            ended = frozenset(process.pid for process in self._processes("actor", self.nodes))
            self.driver.kill()
            self.driver.wait()
            self._start()
            return ended
        if victim == "node":
            node = self.nodes.pop(self.random.randrange(len(self.nodes)))
            ended = frozenset(process.pid for process in self._processes("actor", [node]))
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self._node())
            return ended
        while True:
            process = self.random.choice(self._wait_for(victim))
            try:
                process.kill()
                return frozenset([process.pid] if victim == "actor" else [])
            except psutil.NoSuchProcess:
                continue

    def _still_running(self) -> None:
        if not self._is_running():
            raise Mistake("the run ended before all kills were done; raise num_samples or lower pause_s")

    def _wait_for(self, victim: Victim) -> list[psutil.Process]:
        while True:
            self._still_running()
            if found := self._processes(victim, self.nodes):
                return found
            time.sleep(0.05)

    def _processes(self, victim: Victim, nodes: list[Any]) -> list[psutil.Process]:
        """The nodes' processes of a kind, by the names that Ray gives them."""
        raylets = {node.all_processes["raylet"][0].process.pid for node in nodes}
        found = []
        for raylet in raylets:
            try:
                children = psutil.Process(raylet).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            for process in children:
                try:
                    if (process.cmdline() or [""])[0].startswith(TITLES[victim]):
                        found.append(process)
                except psutil.Error:  # gone already
                    continue
        return sorted(found, key=lambda process: process.pid)


def _account(config: ChaosConfig, output: Path, kills: list[Kill], took_s: float) -> str:
    """Count what was begun again, and after which kill."""
    begun: dict[tuple[str, str], list[int]] = {}
    for line in (output / "journal.txt").read_text().splitlines():
        _, process, name, shard, number = line.split("\t")
        if name == "scores":
            begun.setdefault((shard, number), []).append(int(process))
    sizes = [config.samples_per_shard] * (config.num_samples // config.samples_per_shard)
    sizes.append(config.num_samples % config.samples_per_shard)
    num_chunks = sum(-(-size // config.chunk_size) for size in sizes)
    again: Counter[int] = Counter()
    for processes in begun.values():
        for ended in processes[:-1]:  # processes that began a chunk which another had to begin again
            again[next((i for i, kill in enumerate(kills) if ended in kill.actors), -1)] += 1
    by_kind: dict[str, Any] = {}
    for kind in ("driver", "actor", "reader", "node"):
        costs = [again[i] for i, kill in enumerate(kills) if kill.victim == kind]
        by_kind[kind] = {"kills": len(costs), "begun_again": sum(costs), "most_after_one": max(costs, default=0)}
    total = sum(again.values())
    write_json(output / "chaos.json", {"kills": len(kills), "chunks": num_chunks, "by_kind": by_kind})
    lines = [
        f"{config.num_samples:,} samples, {num_chunks:,} chunks, {len(kills)} SIGKILLs in {took_s:.0f} s: the manifest "
        "has the bytes of the undisturbed run's",
        f"chunks begun again: {total} ({total / max(1, len(kills)):.2f} for each kill)",
    ]
    for kind, cost in by_kind.items():
        lines.append(
            f"  {cost['kills']} x {kind}: {cost['begun_again']} begun again, at most {cost['most_after_one']} after one"
        )
    if again[-1]:
        lines.append(f"  after no kill: {again[-1]}")
    if len(begun) != num_chunks:
        raise RuntimeError(f"{len(begun):,} chunks were begun, of {num_chunks:,}")
    if total > len(kills):
        raise RuntimeError("\n".join([*lines, f"more chunks were begun again ({total}) than there were kills"]))
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(ChaosConfig, chaos, "python -m tests.benchmarks.chaos", sys.argv[1:], ChaosConfig())
