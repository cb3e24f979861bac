"""The code that DeDe's authors released beside ours: decoder training and scoring, at one size, on the same images.

The released code is no part of this project and has no licence; `reference.path` names a checkout of it. Its
`train_decoder` and `MAE_error`, its network, dataset class and transform run unchanged, in a process of their own. It
was written for a GPU and for files that few people have; the replacements made here are never slower:

- `.cuda()` does nothing, so that everything stays on the CPU;
- packages of other attacks, which its scripts import and these two functions do not use, are empty;
- images come from memory, as CIFAR-10's do, and its trigger is drawn here: a white square of ten pixels;
- the victim is torchvision's ResNet-18, changed as its SimCLR changes it, with our victim's weights;
- its data loaders, which ask for 16 processes, have as many as are fastest in a short trial; so have its threads.

A step of its training computes the victim's forward pass, the decoder's step, and the victim's gradients, which are not
used: the code does not switch them off. So the speed without them is measured as well.

`python -m tests.benchmarks.speed_reference <settings as JSON>` is the process in which the released code runs.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import types
from argparse import Namespace
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import ray
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import nn

from dede_ray.data.images import decode_image, encode_image
from dede_ray.data.ledger import KeyedShare
from dede_ray.data.passes import PassResources, run_pass
from dede_ray.data.shards import Limits, Sample, iter_samples, list_shards, open_shard
from dede_ray.data.shards import write_shards as write_samples
from dede_ray.detectors.dede import DeDe
from dede_ray.models.decoder import MaskedDecoder, save_decoder
from dede_ray.models.embedding import Encoding
from dede_ray.models.encoders import WEIGHTS_FILE, Described, ResNet, build_encoder, save_encoder
from dede_ray.models.victims import EncoderVictim, load_victim
from dede_ray.runtime.config import Config, Mistake
from dede_ray.scan.score import NUM_KEPT, ScoreWork
from dede_ray.training.clip import TrainConfig, train
from dede_ray.training.decoder import DecoderTrain
from dede_ray.training.flops import counted, flop_per_sample
from dede_ray.training.loop import Workers
from dede_ray.training.reconstruction import PRESETS, Spread, reconstruction
from tests.benchmarks.baseline import photographs

logger = logging.getLogger(__name__)

SOURCES = ("main.py", "decoder_model.py", "utils.py")
IMAGE_PX, CHUNK_SIZE = 32, 256
REFERENCE_EPOCHS = 200
"""What the released code trains for, over which our embedding pass is spread."""
ABSENT = ("ASSET", "BadCLIP", "CTRL", "DECREE", "DRUPE", "matplotlib", "pandas", "seaborn", "sklearn", "thop")
"""Packages that the released scripts import and the two functions do not need."""
CIFAR_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Variant(Config):
    """A way to run the released code."""

    workers: int = Field(4, ge=1)
    """Its data-loader processes."""
    threads: int | None = Field(None, ge=1)
    """Threads of its arithmetic; null takes one per core."""
    idle_threads: Literal["sleep", "spin"] = "sleep"
    """What OpenMP threads without work do; the library's default is to spin for a while."""


class Way(Config):
    """A way to run ours."""

    preset: Literal["tiny", "paper", "fast"] = "paper"
    """`paper` is the released size and loss; the others are ours and do other work."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the victim, the decoder and its training."""
    workers: Workers = Workers(num_workers=1, cpus_per_worker=1, read_cpus=0.5, readers=1)
    """How training is spread."""
    resources: PassResources = PassResources()
    """Resources of the embedding pass and of the score pass."""

    @property
    def name(self) -> str:
        return f"{self.preset}, {self.precision}"


class ReferenceSpeed(Config):
    """Decoder training and scoring beside the released code of the DeDe paper."""

    path: str
    """A checkout of github.com/tardisblue9/DeDe."""
    shards: str | list[str] | None = None
    """Images; null makes pictures with a photograph's spectrum."""
    num_samples: int = Field(10_240, ge=512, multiple_of=256)
    """Images of the shards that both see; repeated if there are fewer."""
    batch_size: int = Field(256, ge=2)
    steps: int = Field(10, ge=1)
    """Steps of theirs that are measured in a turn."""
    skipped_steps: int = Field(3, ge=1)
    """Steps, or batches of the scoring, before them."""
    our_steps: int = Field(80, ge=40)
    """Steps of ours in a turn; the first and the last tenth do not count."""
    score_batches: int = Field(20, ge=1)
    """Batches of 128 that theirs scores, measured in a turn."""
    repeats: int = Field(3, ge=1)
    """Turns each; the median of their ratios counts."""
    variants: list[Variant] = Field([Variant()], min_length=1)
    """Ways to run theirs, of which the fastest counts, found apart for training and for scoring."""
    trial_steps: int = Field(3, ge=1)
    """Measured steps of the trial that finds it."""
    ways: list[Way] = Field([Way(), Way(precision="bf16")], min_length=1)
    """Ways to run ours, all of which are measured."""


def compare_with_reference(config: ReferenceSpeed, folder: Path) -> str:
    """Measure both, taking turns; Ray must be running.

    Returns:
        For training and scoring: images/s of the released code, and of each way of ours with its ratio to that.

    Raises:
        Mistake: no checkout at `path`, or the released code lacks a package or fails.
    """
    check_checkout(config.path)
    folder = folder.absolute() / "reference"
    shutil.rmtree(folder, ignore_errors=True)
    images_NHWC = _images(config)
    _write(folder, images_NHWC)
    theirs = _Theirs(config, folder)
    ours = [_Ours(config, way, folder / f"ours-{number}") for number, way in enumerate(config.ways)]
    published: dict[str, list[dict[str, float]]] = {"train": [], "score": []}
    own: dict[str, list[list[dict[str, float]]]] = {"train": [], "score": []}
    loads = []
    for turn in range(config.repeats):
        loads.append(os.getloadavg()[0])
        for what in ("train", "score"):
            # The first of a turn finds the machine as the other left it, so they take turns in going first as well.
            first = theirs.run(what) if turn % 2 else None
            own[what].append([getattr(way, what)() for way in ours])
            published[what].append(first or theirs.run(what))
            logger.info("turn %d, %s: %s; theirs %s", turn + 1, what, own[what][-1], published[what][-1])
    size = PRESETS["paper"].shape
    lines = [
        f"{os.cpu_count()} CPUs, {IMAGE_PX} px, patch {size.patch_px}, width {size.width}, {size.encoder_depth} + "
        f"{size.decoder_depth} blocks, ResNet-18; load before each turn: {', '.join(f'{load:.1f}' for load in loads)}",
        *_training_lines(config, theirs, published["train"], own["train"]),
        *_scoring_lines(config, theirs, published["score"], own["score"]),
    ]
    return "\n".join(lines)


def check_checkout(path: str) -> Path:
    """The folder of the released sources.

    Raises:
        Mistake: they are not there, or einops, which they need, is not installed.
    """
    source = Path(path).absolute() / "src"
    missing = [name for name in SOURCES if not (source / name).is_file()]
    if missing:
        raise Mistake(
            f"reference.path {path!r} is no checkout of the DeDe authors' code: {source / missing[0]} is missing. "
            "Run: git clone https://github.com/tardisblue9/DeDe, and name the folder that it makes"
        )
    absent = [name for name in ("einops", "tqdm") if importlib.util.find_spec(name) is None]
    if absent:
        raise Mistake(f"the DeDe authors' code needs {' and '.join(absent)}: pip install {' '.join(absent)}")
    return source


# ------------------------------------------------------------------------------------------------ what is printed

Rates = list[dict[str, float]]


def _training_lines(config: ReferenceSpeed, theirs: _Theirs, published: Rates, own: list[Rates]) -> list[str]:
    lines = [
        f"decoder training, batch {config.batch_size}, median of {config.repeats} turns",
        f"  released code: {_median(published, 'rate')} images/s, without the victim's gradients "
        f"{_median(published, 'kinder_rate')} ({theirs.shown('train')}; {published[0]['gflop']:.2f} and "
        f"{published[0]['kinder_gflop']:.2f} GFLOP an image)",
    ]
    for number, way in enumerate(config.ways):
        turns = [turn[number] for turn in own]
        kinder = [ours["amortised"] / one["kinder_rate"] for ours, one in zip(turns, published, strict=True)]
        lines += [
            f"  ours, {way.name}: {_beside(turns, published, 'rate')} ({_flop(way):.2f} GFLOP an image)",
            f"    with the embedding pass ({_median(turns, 'embedding')} images/s) over {REFERENCE_EPOCHS} epochs: "
            f"{_beside(turns, published, 'amortised')}; to theirs without the victim's gradients {_shown(kinder)}",
            f"    with the embedding pass in a single epoch: {_beside(turns, published, 'one_epoch')}",
        ]
    return lines


def _scoring_lines(config: ReferenceSpeed, theirs: _Theirs, published: Rates, own: list[Rates]) -> list[str]:
    lines = [
        f"scoring, mask ratio 0.99, median of {config.repeats} turns",
        f"  released code: {_median(published, 'rate')} images/s in the faster of its batches of 128 and 32 "
        f"({_median(published, 'rate_128')} and {_median(published, 'rate_32')}; {theirs.shown('score')}; "
        f"{published[0]['gflop']:.2f} GFLOP an image)",
    ]
    for number, way in enumerate(config.ways):
        turns = [turn[number] for turn in own]
        for name, key in (("", ""), (", embeddings known from the decoder's training", "known_")):
            whole = [ours[f"{key}whole"] / one["rate"] for ours, one in zip(turns, published, strict=True)]
            lines.append(
                f"  ours, {way.name}{name}: {_beside(turns, published, f'{key}rate')}; start of Ray's actors included "
                f"{_shown(whole)}"
            )
    return lines


def _beside(ours: Rates, published: Rates, key: str) -> str:
    """Our rate, its ratio to the published code's, and the ratio of what a core-second does."""
    core_key = f"known_core_{key.removeprefix('known_')}" if key.startswith("known_") else f"core_{key}"
    ratios = [own[key] / one["rate"] for own, one in zip(ours, published, strict=True)]
    core_ratios = [own[core_key] / one["core_rate"] for own, one in zip(ours, published, strict=True)]
    return f"{_median(ours, key)} images/s, ratio {_shown(ratios)}, per core-second {_shown(core_ratios)}"


def _median(turns: Rates, key: str) -> str:
    return f"{statistics.median(turn[key] for turn in turns):,.0f}"


def _shown(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} (turns: {', '.join(f'{ratio:.2f}' for ratio in ratios)})"


def _flop(way: Way) -> float:
    """GFLOP of one image's training step of ours, the victim left out."""
    spread = Spread(1.0, np.zeros(512, np.float32), np.ones(512, np.float32))
    batch: dict[str, np.ndarray] = {
        "image": np.zeros((0, IMAGE_PX, IMAGE_PX, 3), np.uint8),
        "embedding": np.zeros((0, 512), np.float32),
        "key": np.zeros(0, np.int64),
    }
    return flop_per_sample(lambda: reconstruction(PRESETS[way.preset], IMAGE_PX, spread, ""), batch) / 1e9


# ------------------------------------------------------------------------------------------------ images and victim


def _images(config: ReferenceSpeed) -> np.ndarray:
    """uint8 (N, 32, 32, 3); images are repeated if there are fewer."""
    if config.shards is not None:
        samples: Iterator[Sample] = (
            sample for shard in list_shards(config.shards) for sample in iter_samples(open_shard(shard), Limits())
        )
    else:
        samples = iter(photographs(512, IMAGE_PX, IMAGE_PX))
    images: list[np.ndarray] = []
    for sample in samples:
        if sample.error is None and sample.image is not None and len(images) < config.num_samples:
            images.append(decode_image(sample.image, Limits(), IMAGE_PX))
    if not images:
        raise Mistake(f"not one image in {config.shards}")
    return np.stack([images[i % len(images)] for i in range(config.num_samples)])


def _write(folder: Path, images_NHWC: np.ndarray) -> None:
    """Shards and a victim for ours, an array and a trigger for theirs."""
    folder.mkdir(parents=True)
    samples = (
        Sample(f"{i:08d}", i, image=encode_image(image_HWC, "png"), image_suffix="png")
        for i, image_HWC in enumerate(images_NHWC)
    )
    write_samples(folder / "shards", "train", samples, max(CHUNK_SIZE, len(images_NHWC) // 8))
    np.save(folder / "images.npy", images_NHWC)
    mask = np.ones((1, IMAGE_PX, IMAGE_PX, 3), np.uint8)
    mask[:, 21:31, 21:31] = 0
    np.savez(folder / "trigger.npz", t=255 * (1 - mask), tm=mask)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = ResNet(depth=18, stem="cifar")
        save_encoder(folder / "victim", build_encoder(shape), Described(shape, IMAGE_PX, *CIFAR_STATISTICS))


# ------------------------------------------------------------------------------------------------ clocks


def _computed_s() -> dict[int, float]:
    """Seconds of computing so far of this process and of each below it, by its number."""
    found = {}
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        with suppress(psutil.Error):  # it has ended meanwhile
            spent = process.cpu_times()
            found[process.pid] = spent.user + spent.system
    return found


class _Stopwatch:
    """Looks, a few times a second, at the wall clock, at what was computed here, and at how far something is."""

    def __init__(self, progress: Callable[[], int] = lambda: 0, every_s: float = 0.2):
        self.progress, self.every_s = progress, every_s
        self.looks: list[tuple[float, float, int]] = []
        self._spent: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Stopwatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.every_s):
            self._spent |= _computed_s()  # processes that ended keep what they had
            self.looks.append((time.time(), sum(self._spent.values()), self.progress()))

    def computed_s(self, start: float, end: float) -> float:
        """Seconds of computing between two times of `time.time`."""
        times, computed, _ = zip(*self.looks, strict=True)
        first, last = np.interp([start, end], times, computed)
        return float(last - first)

    def when(self, progress: int) -> float:
        """Time at which it was first seen to be this far."""
        return next(now for now, _, seen in self.looks if seen >= progress)


# ------------------------------------------------------------------------------------------------ ours


class _Ours:
    """Our passes, as `dede-ray train_clip` and `dede-ray score` run them."""

    def __init__(self, config: ReferenceSpeed, way: Way, folder: Path):
        self.config, self.way, self.folder = config, way, folder
        self.shards = folder.parent / "shards"
        self.victim = EncoderVictim(path=str(folder.parent / "victim"), precision=way.precision)

    def train(self) -> dict[str, float]:
        """Images/s of training, of the embedding pass before it, and of both together."""
        config, output = self.config, self.folder / "trained"
        shutil.rmtree(output, ignore_errors=True)
        every = config.our_steps // 10
        settings = TrainConfig(
            output=str(output),
            decoder=DecoderTrain(
                shards=str(self.shards), victim=self.victim, preset=self.way.preset, batch_size=config.batch_size,
                epochs=config.our_steps * config.batch_size / config.num_samples,
            ),
            precision=self.way.precision, log_every=every, workers=self.way.workers, embedding=self.way.resources,
        )  # fmt: skip
        log = output / "decoder" / "metrics.jsonl"
        with _Stopwatch(lambda: log.read_text().count("\n") if log.is_file() else 0) as watch:
            train(settings)
        rates = [json.loads(line)["samples_per_s"] for line in log.read_text().splitlines()][1:-1]
        rate = len(rates) / sum(1 / one for one in rates)
        computed_s = watch.computed_s(watch.when(1), watch.when(1 + len(rates)))
        embedding, embedding_core = _rates_of_parts(output / "decoder" / "embeddings" / "train", watch)
        found = {"embedding": embedding}
        for name, one, before in (
            ("", rate, embedding),
            ("core_", len(rates) * every * config.batch_size / computed_s, embedding_core),
        ):
            found[f"{name}rate"] = one
            found[f"{name}amortised"] = 1 / (1 / one + 1 / (REFERENCE_EPOCHS * before))
            found[f"{name}one_epoch"] = 1 / (1 / one + 1 / before)
        return found

    def score(self) -> dict[str, float]:
        """Images/s of the score pass, without and with the start of its processes; the same with known embeddings.

        Comes after `train`, whose embeddings are those that are known.
        """
        known = str(self.folder / "trained" / "decoder" / "embeddings" / "train")
        return self._score(None, "") | self._score(known, "known_")

    def _score(self, known: str | None, name: str) -> dict[str, float]:
        decoder_path, output = self.folder / "decoder", self.folder / "scored"
        victim = load_victim(self.victim)
        preset = PRESETS[self.way.preset]
        decoder = MaskedDecoder(preset.shape, IMAGE_PX, victim.embedding_dim, has_reverse=preset.reverse_weight > 0)
        decoder.victim, decoder.has_null = victim.fingerprint, preset.null_rate > 0
        save_decoder(decoder_path, decoder, {})
        shutil.rmtree(output, ignore_errors=True)
        detector = DeDe(decoder=str(decoder_path), precision=self.way.precision)
        arguments = {
            "encoding": Encoding(self.victim.located(), None, frozenset({"image"}), known),
            "detectors": [detector],
            "states": [None],
            "keep": KeyedShare(NUM_KEPT / 50_000, 0),  # as the score job keeps of CIFAR-10's training set
        }
        started = time.time()
        with _Stopwatch() as watch:
            run_pass(
                list_shards(str(self.shards)), output, ScoreWork, arguments, image_size=IMAGE_PX, made_with={},
                chunk_size=CHUNK_SIZE, limits=Limits(), resources=self.way.resources, max_error_fraction=0.0,
                name="score",
            )  # fmt: skip
        whole = self.config.num_samples / (time.time() - started)
        rate, core_rate = _rates_of_parts(output, watch)
        return {f"{name}rate": rate, f"{name}core_rate": core_rate, f"{name}whole": whole}


def _rates_of_parts(folder: Path, watch: _Stopwatch) -> tuple[float, float]:
    """Images/s from the first wave of parts on disk to the last part, and per core-second.

    A pass without the start of its processes.
    """
    times = np.sort([path.stat().st_mtime for path in folder.glob("parts/*/[0-9]*.parquet")])
    skip = min(int(ray.cluster_resources()["CPU"]), len(times) - 2)
    num = (len(times) - 1 - skip) * CHUNK_SIZE
    return float(num / (times[-1] - times[skip])), num / watch.computed_s(times[skip], times[-1])


# ------------------------------------------------------------------------------------------------ theirs, from outside


class _Task(Config):
    """Settings of the process that runs the released code."""

    what: Literal["train", "score"]
    source: str
    """Folder of its sources."""
    folder: str
    """Folder of images, trigger and victim."""
    workers: int
    threads: int
    batch_size: int
    steps: int
    skipped: int


class _Theirs:
    def __init__(self, config: ReferenceSpeed, folder: Path):
        self.config, self.folder, self.source = config, folder, check_checkout(config.path)
        self.fastest: dict[str, Variant] = {}

    def run(self, what: str) -> dict[str, float]:
        """Images/s, and GFLOP of an image; the first call finds the fastest variant."""
        config = self.config
        if what not in self.fastest:
            candidates = config.variants if len(config.variants) > 1 else []
            tried = [(self._run(what, one, config.trial_steps)["rate"], one) for one in candidates]
            for rate, one in tried:
                logger.info("released code, %s, with %s: %.1f images/s", what, one.model_dump(), rate)
            self.fastest[what] = max(tried, key=lambda pair: pair[0])[1] if tried else config.variants[0]
        return self._run(what, self.fastest[what], config.steps if what == "train" else config.score_batches)

    def shown(self, what: str) -> str:
        one = self.fastest[what]
        return f"{one.workers} data-loader processes, {self._threads(one)} threads that {one.idle_threads} when idle"

    @staticmethod
    def _threads(variant: Variant) -> int:
        return variant.threads or os.cpu_count() or 1

    def _run(self, what: str, variant: Variant, steps: int) -> dict[str, float]:
        config = self.config
        task = _Task(
            what=what, source=str(self.source), folder=str(self.folder), workers=variant.workers,
            threads=self._threads(variant), batch_size=config.batch_size, steps=steps, skipped=config.skipped_steps,
        )  # type: ignore[arg-type]  # fmt: skip
        # OpenMP reads these before the first line of Python.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
        environment |= {"OMP_NUM_THREADS": str(task.threads), "CUDA_VISIBLE_DEVICES": ""}
        if variant.idle_threads == "sleep":
            environment["OMP_WAIT_POLICY"] = "passive"
        command = [sys.executable, "-m", "tests.benchmarks.speed_reference", task.model_dump_json()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Mistake(f"the code at {self.source} did not run:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------ theirs, from inside


class _EmptyModule(types.ModuleType):
    """In place of a package that is imported and not used: every name is there, and nothing can be done with it."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: MutableSequence[str] = []  # makes it a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": _refuse})


def _refuse(self: object, *_: object, **__: object) -> None:
    raise NotImplementedError(f"{type(self).__name__} is not installed, and nothing here should need it")


class _EmptyFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder in line: supplies the packages of ABSENT that are not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in ABSENT else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Clocked:
    """Batches of a loader, when each was asked for and what had been computed by then; ends after `num` of them."""

    def __init__(self, loader: Any, num: int):
        self.loader, self.num = loader, num
        self.times: list[float] = []
        self.computed_s: list[float] = []

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        for _ in range(self.num):
            batch = next(batches)
            self._look()
            yield batch
        self._look()  # before the loader's processes are gone

    def _look(self) -> None:
        self.times.append(time.monotonic())
        self.computed_s.append(sum(_computed_s().values()))

    def rates(self, skipped: int, batch_size: int) -> tuple[float, float]:
        """Images/s from the batch after the skipped ones to the end, and per core-second."""
        num = (self.num - skipped) * batch_size
        return num / (self.times[-1] - self.times[skipped]), num / (self.computed_s[-1] - self.computed_s[skipped])


def _run_released(task: _Task) -> dict[str, float]:
    import dede_ray.runtime.libraries  # noqa: F401  # first: it repairs torchvision, which theirs imports

    torch.set_num_threads(task.threads)
    torch.manual_seed(21)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign,return-value]
    sys.meta_path.append(_EmptyFinder())
    sys.path.insert(0, task.source)
    released: Any = importlib.import_module("main")
    return (_train_released if task.what == "train" else _score_released)(task, released)


def _released_data(task: _Task, released: Any, num: int, poison_rate: float) -> Any:
    """Its dataset class over our images."""
    images_NHWC = np.load(Path(task.folder) / "images.npy")
    data = images_NHWC[np.arange(num) % len(images_NHWC)]
    released.utils.CIFAR10 = lambda **_: _InMemory(data)
    return released.utils.CIFAR10_BACKDOOR(
        root="", train=True, trigger_file=str(Path(task.folder) / "trigger.npz"),
        test_transform=released.utils.test_transform, poison_rate=poison_rate, lb_flag="",
    )  # fmt: skip


class _InMemory:
    def __init__(self, data: np.ndarray):
        self.data, self.targets = data, [0] * len(data)

    def __len__(self) -> int:
        return len(self.data)


def _released_victim(task: _Task) -> nn.Module:
    from torchvision.models.resnet import resnet18  # noqa: TID251  # as theirs does; it is repaired by now

    victim: Any = resnet18()
    victim.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    victim.maxpool, victim.fc = nn.Identity(), nn.Identity()
    victim.load_state_dict(load_file(Path(task.folder) / "victim" / WEIGHTS_FILE))
    return victim


def _train_released(task: _Task, released: Any) -> dict[str, float]:
    size = PRESETS["paper"].shape
    victim, released.epoch = _released_victim(task), 1
    model = released.DecoderModel(
        image_size=IMAGE_PX, patch_size=size.patch_px, mask_ratio=0.9, encoder_layer=size.encoder_depth,
        decoder_layer=size.decoder_depth, arch="resnet18",
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6)
    args = Namespace(batch_size=task.batch_size, mask_ratio=0.9, epochs=REFERENCE_EPOCHS)
    num = task.skipped + task.steps
    data = _released_data(task, released, num * task.batch_size, poison_rate=0.1)
    found: dict[str, float] = {}
    for name, is_published in (("", True), ("kinder_", False)):
        victim.requires_grad_(is_published)
        loader = torch.utils.data.DataLoader(
            data, batch_size=task.batch_size, shuffle=False, num_workers=task.workers, pin_memory=True, drop_last=True
        )
        clocked = _Clocked(loader, num)
        released.train_decoder(victim, model, clocked, optimizer, args)
        found[f"{name}rate"], found[f"{name}core_rate"] = clocked.rates(task.skipped, task.batch_size)
        pair = torch.stack([data[0][0], data[1][0]])
        with counted() as counter:
            released.train_decoder(victim, model, [(pair,)], optimizer, args)
        found[f"{name}gflop"] = counter.get_total_flops() / 2 / 1e9
    return found


def _score_released(task: _Task, released: Any) -> dict[str, float]:
    size = PRESETS["paper"].shape
    victim = _released_victim(task)
    model = released.DecoderModel(
        patch_size=size.patch_px, mask_ratio=0.99, encoder_layer=size.encoder_depth, decoder_layer=size.decoder_depth
    )
    found: dict[str, float] = {}
    load, loaders = released.utils.DataLoader, []

    def clocked(data: Any, **settings: Any) -> _Clocked:
        loader = load(data, **{**settings, "num_workers": task.workers})
        loaders.append((_Clocked(loader, len(loader)), settings["batch_size"]))
        return loaders[-1][0]

    released.utils.DataLoader = clocked
    for is_small in (False, True):
        data = _released_data(task, released, (task.skipped + task.steps) * 128, poison_rate=0.01)
        released.utils.MAE_error(victim, model, data, save_cuda=is_small)
        timed, batch_size = loaders[-1]
        rates = timed.rates(task.skipped * 128 // batch_size, batch_size)
        found[f"rate_{batch_size}"], found[f"core_rate_{batch_size}"] = rates
    for name in ("rate", "core_rate"):
        found[name] = max(found[f"{name}_128"], found[f"{name}_32"])
    pair = torch.stack([data[0][0], data[1][0]])
    released.utils.DataLoader = lambda data, **_: [(pair,)]
    with counted() as counter:
        released.utils.MAE_error(victim, model, data)
    found["gflop"] = counter.get_total_flops() / 2 / 1e9
    return found


if __name__ == "__main__":
    print(json.dumps(_run_released(_Task.model_validate_json(sys.argv[1]))))
