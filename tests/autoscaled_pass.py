"""A score pass on a cluster that grows, in a process of its own: `python autoscaled_pass.py <shards> <folder>`.

Prints, as JSON, how many nodes were alive at the beginning, at most, and how the pass ended; then waits until the idle
nodes are gone, and prints how many are left.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import ray

from dede_ray.actors import Chunk
from dede_ray.passing import PassResources, run_pass
from dede_ray.session import start_ray
from dede_ray.shards import Limits, list_shards


class Slow:
    """Half a second for a chunk: long enough that asking for more nodes pays."""

    def __init__(self):
        self.image_size, self.columns = 32, {"brightness": pa.float32(), "node": pa.string()}
        self.node = ray.get_runtime_context().get_node_id()

    def __call__(self, chunk: Chunk) -> dict[str, np.ndarray]:
        time.sleep(0.5)
        brightness = chunk.image_BHWC.mean(axis=(1, 2, 3))
        return {"brightness": brightness, "node": np.array([self.node] * len(brightness))}


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def main(shards: str, folder: str) -> None:
    start_ray()
    begun, most, is_done = alive(), [0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.5):
            most[0] = max(most[0], alive())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    summary = run_pass(
        list_shards(shards), folder, Slow, {}, image_size=32, made_with={}, chunk_size=4, limits=Limits(),
        resources=PassResources(max_actors=2, gpus_per_actor=1), max_error_fraction=0, name="autoscaled",
    )  # fmt: skip
    took_s = time.monotonic() - started
    is_done.set()
    watcher.join()
    deadline = time.monotonic() + 90
    while alive() > 1 and time.monotonic() < deadline:
        time.sleep(0.5)
    left_s = time.monotonic() - started - took_s
    print(json.dumps({
        "begun": begun, "most": most[0], "left": alive(), "num_samples": summary.num_samples,
        "took_s": round(took_s), "left_s": round(left_s),
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
