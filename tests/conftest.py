"""What the tests share: one local Ray, tars written on the spot, small images, one evaluated world."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.update(  # before numpy, torch and ray read them; Ray's workers inherit them
    OMP_NUM_THREADS="1",
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="10",
    RAY_USAGE_STATS_ENABLED="0",
)

import numpy as np
import pytest

from dede_ray.shards import encode_image

if TYPE_CHECKING:
    from dede_ray.findings import Scan

Members = Iterable[tuple[str, bytes]]


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One small Ray for the whole test run; starting it takes seconds."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[[str, Members], Path]:
    """Write `name` (gzipped if it ends in gz) with these members, in this order, under the test's own folder."""

    def write(name: str, members: Members) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for member, content in members:
                header = tarfile.TarInfo(member)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
        content = buffer.getvalue()
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        return path

    return write


@pytest.fixture(scope="session")
def picture() -> Callable[..., np.ndarray]:
    """Make a small uint8 HWC image, smooth and of natural contrast, a different one for each number."""

    def make(number: int = 0, height: int = 32, width: int = 32) -> np.ndarray:
        rng = np.random.default_rng(number)
        y, x = np.mgrid[:height, :width] / 32
        waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(0, 1.5, (3, 3))]
        return np.rint(128 + 70 * np.stack(waves, axis=2)).astype(np.uint8)

    return make


@pytest.fixture(scope="session")
def png(picture: Callable[..., np.ndarray]) -> Callable[..., bytes]:
    """The same pictures as PNG files."""
    return lambda number=0, height=32, width=32: encode_image(picture(number, height, width), "png")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; the test is skipped where there is none."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data is not there: expected in ../shared/data, beside the checkout")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted world of evaluation.py."""
    import evaluation

    folder = tmp_path_factory.mktemp("world")
    evaluation.plant(folder)
    return folder


@pytest.fixture(scope="session")
def report(world: Path) -> Path:
    """The folder of its evaluation."""
    import evaluation

    from dede_ray.report import evaluate

    evaluate(evaluation.config(world))
    return world / "report"


@pytest.fixture(scope="session")
def metrics(report: Path) -> dict[str, Any]:
    """What that evaluation found."""
    return json.loads((report / "metrics.json").read_text())


@pytest.fixture(scope="session")
def scan(world: Path) -> Scan:
    """Its manifests and its truth, joined."""
    import pyarrow.parquet as pq

    from dede_ray.findings import join
    from dede_ray.manifest import read_manifest

    manifest, honest = read_manifest(world / "victim_scores"), read_manifest(world / "honest_scores")
    return join(manifest, honest, pq.read_table(world / "truth.parquet"), "truth.parquet")
