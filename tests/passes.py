"""A pass of the tests: a small work, and what it left."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pyarrow as pa

from dede_ray.ledger import PassSummary
from dede_ray.passing import PassResources, run_pass
from dede_ray.shards import Limits, list_shards

RESOURCES = PassResources(min_actors=1, cpus_per_actor=0.5, decode_cpus=0.5)


class Brightness:
    """The work of these passes: the mean pixel of each image."""

    def __init__(self, image_size: int = 32, die_once_at: str = "", die_of: tuple[str, ...] = ()):
        self.image_size, self.columns, self.die_once_at = image_size, {"brightness": pa.float32()}, die_once_at
        self.die_of = die_of

    def __call__(self, chunk):
        if any(name in self.die_of for name in chunk.sample_ids):
            signal.raise_signal(signal.SIGSEGV)
        if self.die_once_at and not Path(self.die_once_at).exists():
            Path(self.die_once_at).touch()
            os._exit(1)
        assert chunk.image_BHWC.shape == (len(chunk.sample_ids), self.image_size, self.image_size, 3)
        return {"brightness": chunk.image_BHWC.mean(axis=(1, 2, 3))}


def run(shards: Path, folder: Path, work_arguments=None, **changed) -> PassSummary:
    settings = {
        "image_size": 32, "made_with": {"victim": "one"}, "chunk_size": 4, "limits": Limits(), "resources": RESOURCES,
        "max_error_fraction": 0.5, "name": "test",
    }  # fmt: skip
    return run_pass(list_shards(str(shards)), folder, Brightness, work_arguments or {}, **{**settings, **changed})


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Identity, time and content of every part and end marker."""
    paths = sorted(path for path in folder.glob("parts/*/*") if not path.name.startswith("."))
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in paths}
