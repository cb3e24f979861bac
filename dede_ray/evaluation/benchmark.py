"""The benchmark: attack x victim x detector over several seeds, every number beside its controls.

A *cell* is one encoder of one case (the backdoored victim, its honest twin, or another control) under one seed. It
trains the DeDe decoder and fits the detectors on a heap of training images, some of them poisoned, scores its sets of
images, in one Ray task with one thread, and writes a Parquet file. So a benchmark that was stopped resumes, and the
tables (leaderboard.py) are made without running a model. No threshold sees a label.

The sets:

    suspected    that heap: corpora and calibration samples are drawn from it afterwards, in sample as a user has them

and, from test images, which neither the victim nor anything that was fitted has seen:

    clean        as they are
    triggered    some of them, stamped with the attacker's trigger: the positives
    patch        some with a patch of the same size and place that no victim has learnt
    shuffled     clean and triggered ones with the embedding of another image of the same kind
    misstamped   stamped after normalisation, with a normalised mask: the artefact of published code
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dede_ray.data.images import decode_image, square, to_square, to_unit_range
from dede_ray.data.ledger import write_parquet
from dede_ray.data.near_duplicates import perceptual_hash
from dede_ray.data.sampling import draw
from dede_ray.data.shards import BadSample, Limits, list_shards
from dede_ray.data.workers import Chunk
from dede_ray.detectors.asset import PublishedAsset, asset_published
from dede_ray.detectors.contract import DetectorSettings, Scorer, everything_of, open_scorer
from dede_ray.detectors.decree import Decree, Inversion, invert, save_stamp
from dede_ray.detectors.dede import DeDe
from dede_ray.detectors.density import compat_scores
from dede_ray.detectors.kinds import Detector
from dede_ray.evaluation.evaluate import read_truth
from dede_ray.evaluation.leaderboard import DECIDED, About, LeaderboardSettings, write_leaderboard
from dede_ray.evaluation.measure import Examination
from dede_ray.models.clip import Normalise
from dede_ray.models.decoder import save_decoder
from dede_ray.models.embedding import Batch, Encoders, Encoding, in_one_heap
from dede_ray.models.published import NORMALISERS
from dede_ray.models.victims import OptionalVictimConfig, VictimConfig, best_device, load_victim
from dede_ray.poisoning.triggers import AnyTrigger, Patch, Trigger
from dede_ray.runtime.config import Config, Mistake, Seeds, claim, finish, write_json
from dede_ray.runtime.lease import leased
from dede_ray.runtime.session import start_ray
from dede_ray.runtime.store import write_atomically
from dede_ray.training.downstream import Labelled, TwoLayerClassifier, draw_labelled
from dede_ray.training.reconstruction import DecoderPreset, changed_preset, fit_decoder

logger = logging.getLogger(__name__)

BATCH_SIZE = 256
COMPAT_SMALLEST = 65
"""A batch of the published code has to have more samples than this, for its 64 neighbours."""


class Case(Config):
    """One attack on one encoder."""

    attack: str
    """Its name, which also chooses the minimum ASR of the gate."""
    victim: VictimConfig
    honest: VictimConfig
    """The same architecture without a backdoor."""
    others: dict[str, VictimConfig] = Field({})
    """Further controls, such as a victim whose backdoor was erased."""
    trigger: Trigger
    """As the attacker stamps it at test time."""
    training_trigger: Trigger | None = None
    """As it is stamped on the poisoned samples of the corpus; None is the same as `trigger`."""
    learnt: str | None = None
    """Folder of the poisoned shards that the victim learnt, as `dede-ray poison` left it: in-sample corpora are drawn
    from these, poisoned as they are. None stamps some of `train_shards`."""
    target_label: int = Field(ge=0)

    @model_validator(mode="after")
    def _roles_differ(self) -> Case:
        if taken := {"victim", "honest"} & self.others.keys():
            raise ValueError(f"others may not be called {min(taken)}")
        return self

    def roles(self) -> dict[str, VictimConfig]:
        return {"victim": self.victim, "honest": self.honest, **self.others}


class DecoderTraining(Config):
    """How each cell's decoder is trained, in memory."""

    preset: Literal["tiny", "paper", "fast"] = "tiny"
    epochs: float | None = Field(None, gt=0)
    """None is the preset's."""
    batch_size: int | None = Field(None, ge=2)
    mask_ratio: float | None = Field(None, gt=0, lt=1)
    null_rate: float | None = Field(None, ge=0, lt=1)
    trim_rate: float | None = Field(None, ge=0, lt=1)
    reverse_weight: float | None = Field(None, ge=0)

    def resolved(self) -> DecoderPreset:
        return changed_preset(self.preset, self.model_dump(exclude={"preset"}))


class BenchmarkConfig(Examination):
    """Settings of `dede-ray benchmark`; `test_shards`, `probe_shards`, `gate` and `heads` decide what is void."""

    output: str
    cases: dict[str, Case] = Field(min_length=1)
    """By name; the tables have their order."""
    train_shards: str | list[str]
    """Clean labelled images that suspected corpora are made of."""
    reference: OptionalVictimConfig = None
    """The independent encoder for the detectors that compare the victim with one."""
    detectors: list[Detector] = Field(min_length=1)
    """Streaming detectors. The `decoder` of dede is trained in each cell, whatever it says here."""
    second_stage: list[Detector] = Field([])
    """Detectors that take many forward passes: scored on `num_second_stage` images, under the first seed."""
    inversion: Inversion | None = None
    """DECREE, under the first seed: the stamp of each encoder, and the scores that it gives samples."""
    decoder: DecoderTraining = DecoderTraining()
    seeds: Seeds = Field([0, 1, 2])
    num_suspected: int = Field(10_000, ge=100)
    """Training images of each heap: decoders and statistics are fitted on it, in-sample corpora and calibration samples
    are drawn from it."""
    poison_rate: float = Field(0.01, ge=0, lt=0.5)
    """Share of it that is poisoned; a corpus then holds this much or less."""
    num_clean: int = Field(1000, ge=1)
    """Other training images, known to be clean, for the detectors that want some."""
    num_triggered: int = Field(2500, ge=1)
    num_controls: int = Field(1000, ge=1)
    """Images of the sets patch, shuffled and misstamped."""
    num_second_stage: int = Field(100, ge=1)
    """Clean images, and as many triggered ones."""
    compat_asset: PublishedAsset | None = None
    """ASSET as published, on `num_controls` clean and triggered images of each victim, under the first seed."""
    standing: LeaderboardSettings | None = None
    """What the tables show, at no cost; None takes its defaults."""
    limits: Limits = Limits()


def benchmark(config: BenchmarkConfig) -> str:
    """Fill the table. A rerun does what remains.

    Returns:
        The tables as Markdown; they and all numbers are in the output folder.

    Raises:
        Mistake: settings or files that do not fit.
    """
    _check(config)
    start_ray(config)
    output = Path(config.output).absolute()
    with leased(output):
        return _benchmark(config, output)


def _benchmark(config: BenchmarkConfig, output: Path) -> str:
    done = claim(output, config.model_copy(update={"standing": None}))
    cells = [
        Cell(name, role, seed) for seed in config.seeds for name, case in config.cases.items() for role in case.roles()
    ]
    gates = [name for name in config.cases if not (output / "gates" / f"{name}.json").is_file()]
    lacking = [cell for cell in cells if not cell.path(output).is_file()]
    todo: list[Any] = []
    if gates or lacking:
        here = ray.put((config, _images(config)))
        gate, fill = ray.remote(num_cpus=1)(_judge), ray.remote(num_cpus=1)(_fill)
        todo = [
            *(gate.remote(here, name, output) for name in gates),
            *(fill.remote(here, one, output) for one in lacking),
        ]
    total = len(todo)
    while todo:
        ready, todo = ray.wait(todo)
        for said in ray.get(ready):
            logger.info("[%d/%d] %s", total - len(todo), total, said)
    about = {name: About(list(case.roles()), case.target_label) for name, case in config.cases.items()}
    said = write_leaderboard(config.standing or LeaderboardSettings(), output, about, config.seeds, _side_by_side)
    if left_out := _left_out(cells, output):
        said += left_out
        write_atomically(output / "table.md", said + "\n")
    if done is None:
        finish(output, config.model_copy(update={"standing": None}), {"cells": len(cells)})
    return said


def _side_by_side(work: Callable[..., Any], many: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Call a function with each of many arguments, one core each."""
    task = ray.remote(num_cpus=1)(work)
    return ray.get([task.remote(*one) for one in many])


def _left_out(cells: Sequence[Cell], output: Path) -> str:
    """Which detectors could not be fitted in which cells, and why; nothing where all could."""
    lines: dict[str, str] = {}
    for cell in cells:
        about = json.loads((pq.read_schema(cell.path(output)).metadata or {}).get(b"about", b"{}"))
        for label, why in about.get("left_out", {}).items():
            lines.setdefault(label, f"- {label}, in {cell.case}, {cell.role}, seed {cell.seed}: {why}")
    if not lines:
        return ""
    return "\n\nLeft out of cells in which it could not be fitted, such as\n" + "\n".join(lines.values())


def _check(config: BenchmarkConfig) -> None:
    """Refuse at once what no cell could do."""
    for one in (*config.detectors, *config.second_stage):
        if "caption" in one.needs:
            raise Mistake(f"{one.label} looks at captions, and the benchmark's images have none; leave it out")
        if "reference" in one.needs and config.reference is None:
            raise Mistake(f"{one.label} compares the victim with an independent encoder; name one as `reference`")
    urls = ({shard.url for shard in list_shards(shards)} for shards in (config.train_shards, config.test_shards))
    if shared := set.intersection(*urls):
        raise Mistake(f"{len(shared)} shards are both train_shards and test_shards, such as {min(shared)}; split them")


@dataclass(frozen=True)
class Cell:
    """One encoder under one seed."""

    case: str
    role: str
    seed: int

    def path(self, output: Path) -> Path:
        return output / "cells" / f"{self.case}-{self.role}-{self.seed}.parquet"


# --------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class _Images:
    """The images that all cells draw from, still encoded."""

    train: list[Labelled]
    test: list[Labelled]


def _images(config: BenchmarkConfig) -> _Images:
    train = draw_labelled(
        list_shards(config.train_shards), 4 * (config.num_suspected + config.num_clean), 0, config.limits
    )
    test = draw_labelled(list_shards(config.test_shards), config.max_test_samples, 0, config.limits)
    if len(train) < config.num_suspected + config.num_clean:
        raise Mistake(
            f"{len(train):,} labelled training images, {config.num_suspected + config.num_clean:,} are needed; name "
            "more train_shards, or lower num_suspected"
        )
    return _Images(train, test)


@dataclass(frozen=True)
class _Pictures:
    """Decoded images with what is known of them."""

    sample_ids: list[str]
    content: list[bytes]
    """Still encoded, as triggers are stamped on an image of its own size."""
    image_NHWC: np.ndarray
    label_N: np.ndarray

    def part(self, rows: Sequence[int] | NDArray[Any]) -> _Pictures:
        index = np.asarray(rows, np.int64)
        ids, content = ([whole[i] for i in index] for whole in (self.sample_ids, self.content))
        return _Pictures(ids, content, self.image_NHWC[index], self.label_N[index])

    def looks(self) -> dict[str, Any]:
        """What tells copies and almost equal pictures."""
        content = [hashlib.blake2b(image_HWC.tobytes(), digest_size=16).hexdigest() for image_HWC in self.image_NHWC]
        perceptual = [perceptual_hash(image_HWC) for image_HWC in self.image_NHWC]
        return {"content_hash": np.array(content), "perceptual_hash": pa.array(perceptual, pa.uint64())}

    def stamped(self, trigger: AnyTrigger, limits: Limits) -> _Pictures:
        """The same images with a trigger, stamped as the gate does, before the victim's size; the ids name it."""
        size, named = self.image_NHWC.shape[1], zip(self.content, self.sample_ids, strict=True)
        images = [square(content, name, size, limits, trigger) for content, name in named]
        ids = [f"{name}+{trigger.kind}" for name in self.sample_ids]
        return replace(self, image_NHWC=np.stack(images), sample_ids=ids)


def _decode(images: Sequence[Labelled], size: int, limits: Limits) -> _Pictures:
    """Images that cannot be decoded are left out."""
    found: list[tuple[Labelled, np.ndarray]] = []
    for image in images:
        with contextlib.suppress(BadSample):
            found.append((image, square(image.content, image.sample_id, size, limits)))
    if not found:
        raise Mistake(f"none of {len(images):,} images can be read, such as {images[0].sample_id}")
    return _Pictures(
        [image.sample_id for image, _ in found],
        [image.content for image, _ in found],
        np.stack([pixels for _, pixels in found]),
        np.array([image.label for image, _ in found]),
    )


def _judge(here: tuple[BenchmarkConfig, _Images], name: str, output: Path) -> str:
    """Decide whether the case's victim passes its gate, and record it; returns a line for the log."""
    torch.set_num_threads(1)
    config, case = here[0], here[0].cases[name]
    device = best_device()
    victim, honest = (load_victim(one).to(device) for one in (case.victim, case.honest))
    verdict = config.examine(victim, honest, case.trigger, case.target_label, case.attack).verdict
    write_json(output / "gates" / f"{name}.json", verdict.as_json())
    return f"{name}: {'passes' if verdict.passes else 'VOID'}, {verdict.reason}"


# ----------------------------------------------------------------------------------------------------- cells


def _fill(here: tuple[BenchmarkConfig, _Images], cell: Cell, output: Path) -> str:
    """Train, fit and score one cell, and write its Parquet file."""
    torch.set_num_threads(1)
    config, images = here
    return _Filling(config, images, cell, output).run()


class _Filling:
    def __init__(self, config: BenchmarkConfig, images: _Images, cell: Cell, output: Path):
        self.config, self.images, self.cell, self.output = config, images, cell, output
        self.case = config.cases[cell.case]
        self.is_first = cell.seed == config.seeds[0]
        self.left_out: dict[str, str] = {}
        everyone: list[DetectorSettings] = [*config.detectors, *config.second_stage]
        needs = frozenset().union(*(one.needs for one in everyone))
        self.encoders = Encoders(Encoding(self.case.roles()[cell.role], config.reference, needs))
        self.victim, size = self.encoders.victim, self.encoders.image_size
        self.suspected, self.is_poisoned = (
            self._learnt(self.case.learnt, size) if self.case.learnt else self._stamped(size)
        )
        seen = {*self.suspected.content}
        others = [one for one in images.train if one.content not in seen]
        self.known = _decode(draw(others, config.num_clean, cell.seed), size, config.limits)
        self.test = _decode(images.test, size, config.limits)

    def _stamped(self, size: int) -> tuple[_Pictures, NDArray[np.bool_]]:
        """A heap of clean training images, a share of them stamped here; the others keep their bytes."""
        drawn = draw(self.images.train, self.config.num_suspected, self.cell.seed)
        pictures = _decode(sorted(drawn, key=lambda one: one.sample_id), size, self.config.limits)
        rng, num = np.random.default_rng(self.cell.seed), len(pictures.sample_ids)
        rows = np.sort(rng.permutation(num)[: round(self.config.poison_rate * num)])
        is_poisoned = np.zeros(num, bool)
        is_poisoned[rows] = True
        image_NHWC = pictures.image_NHWC.copy()
        if len(rows):
            trigger = self.case.training_trigger or self.case.trigger
            image_NHWC[rows] = pictures.part(rows).stamped(trigger, self.config.limits).image_NHWC
        return replace(pictures, image_NHWC=image_NHWC), is_poisoned

    def _learnt(self, folder: str, size: int) -> tuple[_Pictures, NDArray[np.bool_]]:
        """A heap of what the victim learnt, with the same share of poisoned samples."""
        config, path = self.config, f"{folder}/truth.parquet"
        truth = read_truth(path)
        poisoned = {*truth.filter(truth["is_poisoned"])["sample_id"].to_pylist()}
        num_poisoned, drawn = round(config.poison_rate * config.num_suspected), []
        everyone = draw_labelled(list_shards(folder), 10**9, 0, config.limits)
        for wanted, num in ((True, num_poisoned), (False, config.num_suspected - num_poisoned)):
            drawn += draw([one for one in everyone if (one.sample_id in poisoned) == wanted], num, self.cell.seed)
        if len(drawn) < config.num_suspected:
            raise Mistake(
                f"{folder}: {len(drawn):,} samples of {num_poisoned:,} poisoned and "
                f"{config.num_suspected - num_poisoned:,} clean ones; lower num_suspected or poison_rate"
            )
        pictures = _decode(sorted(drawn, key=lambda one: one.sample_id), size, config.limits)
        return pictures, np.array([name in poisoned for name in pictures.sample_ids])

    def run(self) -> str:
        config, cell = self.config, self.cell
        suspected, known = self._embedded(self.suspected), self._embedded(self.known)
        decoder = fit_decoder(
            self.suspected.image_NHWC, suspected.embedding_BE.cpu().numpy(), suspected.sample_ids,
            config.decoder.resolved(), self.victim.fingerprint, cell.seed,
        )  # fmt: skip
        folder = self.output / "decoders" / f"{cell.case}-{cell.role}-{cell.seed}"
        save_decoder(folder, decoder, {})
        self.decoder_folder, self.known_batch, self.heap = folder, known, in_one_heap(suspected)
        self.fitted, self.scorers = self._opened(config.detectors)
        heads = {}
        if self.is_first:
            published = TwoLayerClassifier(epochs=100, learning_rate=0.01, batch_size=256)
            is_clean = ~self.is_poisoned
            heads["compat_head"] = published.fit(
                suspected.embedding_BE.numpy()[is_clean], self.suspected.label_N[is_clean]
            )
        order = np.random.default_rng([cell.seed, 1]).permutation(len(self.test.sample_ids))
        few = np.sort(order[: config.num_controls])
        sets = {
            "suspected": self.suspected,
            "clean": self.test,
            "triggered": self.test.part(np.sort(order[: config.num_triggered])).stamped(
                self.case.trigger, config.limits
            ),
            "patch": self.test.part(few).stamped(self._unlearned(), config.limits),
        }
        tables = []
        for name, pictures in sets.items():
            batch = suspected if name == "suspected" else self._embedded(pictures)
            columns: dict[str, Any] = self._scored(pictures, batch, with_vectors=name in DECIDED)
            if name in DECIDED:
                seen_BE = batch.embedding_BE if batch.reference_BR is None else batch.reference_BR
                columns |= {"embedding": seen_BE.numpy(), **pictures.looks()}
            if name == "suspected":
                columns["is_poisoned"] = self.is_poisoned
            else:
                columns |= {head: use(batch.embedding_BE.numpy()).astype(np.int64) for head, use in heads.items()}
            tables.append(_table(name, pictures, columns))
            if name in ("clean", "triggered"):
                some = np.arange(len(pictures.sample_ids))[: config.num_controls]
                shuffled = replace(batch.part(some.tolist()), embedding_BE=batch.embedding_BE[some].roll(1, dims=0))
                tables.append(
                    _table(f"shuffled_{name}", pictures.part(some), self._scored(pictures.part(some), shuffled))
                )
        tables.append(self._misstamped(few, self._plain_scorers()))
        if self.is_first:
            tables += self._slow(sets)
        about = {"victim": self.victim.fingerprint, "case": cell.case, "role": cell.role, "seed": cell.seed}
        about |= {"left_out": self.left_out} if self.left_out else {}
        table = pa.concat_tables(tables, promote_options="default").replace_schema_metadata(
            {"about": json.dumps(about)}
        )
        write_parquet(table, cell.path(self.output))
        return f"{cell.case}, {cell.role}, seed {cell.seed}" + "".join(f"; without {one}" for one in self.left_out)

    def _opened(self, detectors: Sequence[DetectorSettings]) -> tuple[list[DetectorSettings], list[Scorer]]:
        """Fit detectors to the heap and open them; those that cannot be fitted are left out of this cell, and named."""
        kept: list[tuple[DetectorSettings, Scorer]] = []
        for detector in detectors:
            if isinstance(detector, DeDe):
                detector = detector.model_copy(update={"decoder": str(self.decoder_folder)})
            try:
                state = detector.fit(self.heap, self.known_batch) if detector.fits else {}
            except (Mistake, np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:
                self.left_out[detector.label] = str(error)
            else:
                kept.append((detector, open_scorer(detector, self.victim, state)))
        return [detector for detector, _ in kept], [scorer for _, scorer in kept]

    def _plain_scorers(self) -> list[Scorer]:
        """Scorers of the detectors that look at the picture and fit nothing."""
        plain = [not one.fits and one.needs == {"image"} for one in self.fitted]
        return [scorer for scorer, is_plain in zip(self.scorers, plain, strict=True) if is_plain]

    def _embedded(self, pictures: _Pictures) -> Batch:
        """Embed pictures; the batch holds no pixels."""
        batches = []
        for start in range(0, len(pictures.sample_ids), BATCH_SIZE):
            ids = pictures.sample_ids[start : start + BATCH_SIZE]
            batches.append(
                self.encoders(Chunk(ids, pictures.image_NHWC[start : start + BATCH_SIZE], [None] * len(ids)))
            )
        references = [one.reference_BR for one in batches if one.reference_BR is not None]
        return Batch(
            pictures.sample_ids,
            torch.cat([one.embedding_BE for one in batches]),
            reference_BR=torch.cat(references) if references else None,
        )

    def _scored(self, pictures: _Pictures, batch: Batch, with_vectors: bool = False) -> dict[str, np.ndarray]:
        parts: list[dict[str, np.ndarray]] = []
        score = everything_of if with_vectors else lambda scorer, one: scorer.score(one)
        for start in range(0, len(batch), BATCH_SIZE):
            rows = range(start, min(start + BATCH_SIZE, len(batch)))
            image_BCHW = to_unit_range(torch.from_numpy(pictures.image_NHWC[rows.start : rows.stop]))
            one = replace(batch.part(rows), image_BCHW=image_BCHW)
            parts.append({name: column for scorer in self.scorers for name, column in score(scorer, one).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _unlearned(self) -> Patch:
        """A patch of noise as large as the trigger and about where it is, or in the corner where it is everywhere."""
        before = np.zeros_like(decode_image(self.test.content[0], self.config.limits))
        after = [self.case.trigger.stamp(before + level, "0") for level in (np.uint8(0), np.uint8(128))]
        is_covered = (after[0] == after[1]).all(axis=2)
        height = min(is_covered.shape)
        side = int(np.clip(round(np.sqrt(is_covered.sum())), 3, height // 2))
        rows = np.flatnonzero(is_covered.any(axis=1)) if is_covered.any() else np.array([height - 1])
        is_central = bool(is_covered.any()) and rows.max() < height * 3 // 4
        return Patch(
            size_px=side, pattern="random", position="center" if is_central else "bottom_right",
            margin_px=0 if is_central else int(max(0, height - 1 - rows.max())), seed=1000 + self.cell.seed,
        )  # fmt: skip

    def _misstamped(self, rows: np.ndarray, scorers: Sequence[Scorer]) -> pa.Table:
        """Published code's path: image, mask and patch are normalised, then the patch is laid over.

        The mask is 1 on the patch and 0 elsewhere, so normalised it multiplies the whole picture by about -2.4. The
        normaliser is that code's, whatever the victim's own. Scored by the detectors that look at the picture and fit
        nothing.
        """
        pictures, size = self.test.part(rows), self.encoders.image_size
        native = np.zeros_like(decode_image(pictures.content[0], self.config.limits))
        on_black, on_white = (
            to_square(self.case.trigger.stamp(native + level, "0"), size) for level in (np.uint8(0), np.uint8(255))
        )
        mask_HWC = (on_black == on_white).all(axis=2, keepdims=True).repeat(3, axis=2)
        normalise = Normalise(*map(list, NORMALISERS["cifar"]))
        mask, patch = (
            normalise(to_unit_range(torch.from_numpy(one[None])))
            for one in (np.where(mask_HWC, np.uint8(255), np.uint8(0)), np.where(mask_HWC, on_black, np.uint8(0)))
        )
        normalised_BCHW = normalise(to_unit_range(torch.from_numpy(pictures.image_NHWC))) * mask + patch
        # The pixels that the victim's own normaliser would turn into what that code gives the victim.
        pixels_BCHW = normalised_BCHW * self.victim.normalise.std + self.victim.normalise.mean
        found: list[dict[str, np.ndarray]] = []
        for start in range(0, len(pixels_BCHW), BATCH_SIZE):
            some_BCHW = pixels_BCHW[start : start + BATCH_SIZE]
            batch = Batch(pictures.sample_ids[start : start + BATCH_SIZE], self.victim(some_BCHW), some_BCHW)
            found.append({name: score_B for scorer in scorers for name, score_B in scorer.score(batch).items()})
        return _table("misstamped", pictures, {name: np.concatenate([one[name] for one in found]) for name in found[0]})

    def _slow(self, sets: dict[str, _Pictures]) -> list[pa.Table]:
        """Score the few images of second-stage detectors and published protocols, under the first seed only."""
        config, tables = self.config, []
        _, scorers = self._opened(config.second_stage)
        if config.inversion is not None:
            stamp = invert(self.victim, self.known.image_NHWC, config.inversion, self.cell.seed)
            folder = self.output / "stamps" / f"{self.cell.case}-{self.cell.role}"
            save_stamp(folder, stamp)
            scorers += self._opened([Decree(stamp=str(folder), displacement=True)])[1]
            verdict = {"pl1": stamp.pl1, "is_collapsing": stamp.is_collapsing, "cosine": stamp.cosine}
            write_json(self.output / "stamps" / f"{self.cell.case}-{self.cell.role}.json", verdict)
        if scorers:
            for name in ("clean", "triggered"):
                pictures = sets[name].part(range(min(config.num_second_stage, len(sets[name].sample_ids))))
                image_BCHW = to_unit_range(torch.from_numpy(pictures.image_NHWC))
                batch = replace(self._embedded(pictures), image_BCHW=image_BCHW)
                columns = {column: found for scorer in scorers for column, found in scorer.score(batch).items()}
                tables.append(_table(f"second_{name}", pictures, columns))
        tables += self._compat(sets)
        return tables

    def _compat(self, sets: dict[str, _Pictures]) -> list[pa.Table]:
        """Scores that depend on the other samples of the pool, which is half poisoned as published."""
        num = min(self.config.num_triggered, len(sets["triggered"].sample_ids))
        clean = sets["clean"].part(range(num))
        pool = [clean, sets["triggered"].part(range(num))]
        columns: dict[str, np.ndarray] = {}
        if 2 * num > COMPAT_SMALLEST:
            size = 2048  # as published, or batches of one size where a small rest would be left
            if 0 < 2 * num % size <= COMPAT_SMALLEST:
                size = -(-2 * num // -(-2 * num // size))
            embedding_NE = np.concatenate([self._embedded(one).embedding_BE.numpy() for one in pool])
            columns = {f"compat_{name}": found for name, found in compat_scores(embedding_NE, size).items()}
        tables = [
            _table(
                f"pool_{name}", one, {column: found[half * num : (half + 1) * num] for column, found in columns.items()}
            )
            for half, (name, one) in enumerate(zip(("clean", "triggered"), pool, strict=True))
        ]
        if self.config.compat_asset is not None and self.cell.role == "victim":
            num = min(num, self.config.num_controls)
            some = [one.part(range(num)) for one in pool]
            image_NHWC = np.concatenate([one.image_NHWC for one in some])
            label_N = np.concatenate([some[0].label_N, np.full(num, self.case.target_label)])
            features = [self._embedded(one).embedding_BE.numpy() for one in (*some, self.known)]
            found = asset_published(
                image_NHWC,
                label_N,
                np.concatenate(features[:2]),
                self.known.image_NHWC,
                features[2],
                self.config.compat_asset,
            )
            tables += [
                _table(f"asset_{name}", one, {"compat_asset": found.score_N[half * num : (half + 1) * num]})
                for half, (name, one) in enumerate(zip(("clean", "triggered"), some, strict=True))
            ]
        return tables


def _table(name: str, pictures: _Pictures, columns: Mapping[str, Any]) -> pa.Table:
    """The rows of a set; vectors are kept as float16."""
    given = {"set": [name] * len(pictures.sample_ids), "sample_id": pictures.sample_ids, "label": pictures.label_N}
    vectors = {
        column: pa.FixedSizeListArray.from_arrays(values.astype(np.float16).ravel(), values.shape[1])
        for column, values in columns.items()
        if getattr(values, "ndim", 1) == 2
    }
    return pa.table({**given, **columns, **vectors})
