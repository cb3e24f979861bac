"""What the tests share: one local Ray, tars written on the spot, small images, one evaluated world."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before numpy, torch and ray read them; Ray's workers inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests hold with any number: OMP_NUM_THREADS=4 make test
os.environ.update(
    PYTHONPATH=os.pathsep.join(
        [str(Path(__file__).parents[1]), str(Path(__file__).parent / "fixtures")]
    ),  # this checkout, in any cwd
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="10",
    RAY_USAGE_STATS_ENABLED="0",
)

import numpy as np
import pytest

from dede_ray.data.images import encode_image
from dede_ray.data.shards import Sample, write_shards

if TYPE_CHECKING:
    from dede_ray.evaluation.results import Scan

Members = Iterable[tuple[str, bytes]]


# A store of our own speaks S3; what reaches it has to be in the environment before Ray's processes start.
S3_PORT = 20_000 + os.getpid() % 10_000
os.environ.update(
    AWS_ENDPOINT_URL=f"http://127.0.0.1:{S3_PORT}",
    AWS_ACCESS_KEY_ID="test",
    AWS_SECRET_ACCESS_KEY="test",
    AWS_DEFAULT_REGION="us-east-1",
)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of an empty bucket on a local server that speaks S3."""
    pytest.importorskip("moto.server", reason="moto and flask, of the dev extra, are not installed")
    from pyarrow import fs

    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(S3_PORT)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    store = fs.S3FileSystem(allow_bucket_creation=True, endpoint_override=f"127.0.0.1:{S3_PORT}", scheme="http")
    deadline = time.monotonic() + 60
    while True:
        try:
            store.create_dir("bucket")
            break
        except OSError:
            assert server.poll() is None, "the S3 server ended"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.1)
    yield "s3://bucket"
    server.terminate()
    server.wait()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are no names: gzip's hold the time, and two processes would collect different tests."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses Ray, or starts jobs that do, is left out by `make test-fast`; it comes first otherwise, so that short
    tests are left at the end to share between processes."""
    for item in items:
        starts_jobs = {"cluster", "end_to_end", "jobs"} & set(item.path.relative_to(Path(__file__).parent).parts)
        if starts_jobs or {"local_ray", "s3", "ward"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("ray")
    long = {item.path for item in items if item.get_closest_marker("ray") or item.get_closest_marker("trains")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def what_is_waited_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that waits for Ray to place something says what, every 20 seconds."""
    if "local_ray" not in request.fixturenames:
        yield
        return
    done = threading.Event()
    reporter, capture = (
        request.config.pluginmanager.get_plugin(name) for name in ("terminalreporter", "capturemanager")
    )

    def watch() -> None:
        started = time.monotonic()
        while not done.wait(20):
            waiting = _not_placed()
            if waiting:
                took = time.monotonic() - started
                with capture.global_and_fixture_disabled():
                    reporter.write_line(f"\n{request.node.nodeid}: {took:.0f} s so far; Ray cannot place {waiting}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()


def _not_placed() -> str:
    """What tasks and actors of the local Ray ask for and have not got; empty where nothing waits."""
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    state = get_cluster_resource_state(global_worker.gcs_client)
    asked = [f"{one.count} x {dict(one.request.resources_bundle)}" for one in state.pending_resource_requests]
    free = [dict(node.available_resources).get("CPU", 0) for node in state.node_states]
    return f"{', '.join(asked)} ({sum(free):g} CPUs are free)" if asked else ""


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One small Ray for the whole test run; starting it takes seconds."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # pytest would show pages of it beside a failure
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def write_tar_in() -> Callable[[Path, Members], Path]:
    """Write a tar (gzipped if its name ends in gz) with these members, in this order."""

    def write(path: Path, members: Members) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for member, content in members:
                header = tarfile.TarInfo(member)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
        content = buffer.getvalue()
        path.write_bytes(gzip.compress(content) if path.name.endswith("gz") else content)
        return path

    return write


@pytest.fixture
def write_tar(write_tar_in: Callable[[Path, Members], Path], tmp_path: Path) -> Callable[[str, Members], Path]:
    """The same, under the test's own folder."""
    return lambda name, members: write_tar_in(tmp_path / name, members)


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
def write_pictures(png: Callable[..., bytes]) -> Callable[..., list[Path]]:
    """Write shards of numbered pictures, each with a caption and a label: `<split>-00000.tar` ..."""

    def write(
        folder: Path, numbers: Iterable[int] = range(40), split: str = "train", per_shard: int = 20
    ) -> list[Path]:
        samples = (Sample(f"{n:04d}", 0, png(n), "png", caption=f"picture {n}", label=n % 4) for n in numbers)
        return write_shards(folder, split, samples, per_shard)

    return write


@pytest.fixture(scope="session")
def clip_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model config of a CLIP that trains in seconds: 32-px images, 16-wide embeddings."""
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    path = tmp_path_factory.mktemp("clip") / "tiny.json"
    path.write_text(json.dumps(model))
    return path


@pytest.fixture(scope="session")
def victim_folder(clip_config: Path) -> Path:
    """That CLIP, exported with random weights."""
    import torch

    from dede_ray.models.clip import build_clip, model_description, save_clip

    torch.manual_seed(0)
    described = model_description(str(clip_config))
    save_clip(clip_config.parent / "victim", build_clip(described), described)
    return clip_config.parent / "victim"


@pytest.fixture(scope="session")
def reference_folder(clip_config: Path) -> Path:
    """Another CLIP with random weights, of another width and for larger images: somebody else's encoder."""
    import torch

    from dede_ray.models.clip import build_clip, model_description, save_clip

    model = json.loads(clip_config.read_text())
    model["embed_dim"], model["vision_cfg"]["image_size"] = 12, 64
    config = clip_config.parent / "reference.json"
    config.write_text(json.dumps(model))
    torch.manual_seed(5)
    described = model_description(str(config))
    save_clip(clip_config.parent / "reference", build_clip(described), described)
    return clip_config.parent / "reference"


@pytest.fixture(scope="session")
def decoder_folder(victim_folder: Path) -> Path:
    """A decoder of one block per side for that victim, exported with random weights, null embedding, reverse head."""
    import torch

    from dede_ray.models.decoder import DecoderShape, MaskedDecoder, save_decoder
    from dede_ray.models.victims import OpenClipVictim, load_victim

    victim = load_victim(OpenClipVictim(path=str(victim_folder)))
    torch.manual_seed(1)
    shape = DecoderShape(patch_px=4, width=32, heads=2, encoder_depth=1, decoder_depth=1)
    decoder = MaskedDecoder(shape, victim.image_size, victim.embedding_dim, has_reverse=True)
    decoder.victim, decoder.has_null = victim.fingerprint, True
    save_decoder(victim_folder.parent / "decoder", decoder, {})
    return victim_folder.parent / "decoder"


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

    from dede_ray.evaluation.evaluate import evaluate

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

    from dede_ray.evaluation.results import join
    from dede_ray.scan.manifest import read_manifest

    manifest, honest = read_manifest(world / "victim_scores"), read_manifest(world / "honest_scores")
    return join(manifest, honest, pq.read_table(world / "truth.parquet"), "truth.parquet")
