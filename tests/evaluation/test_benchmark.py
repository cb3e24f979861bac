"""The benchmark, whole, at toy size: cells that are made once, what they hold, and what it refuses."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from dede_ray.data.images import to_unit_range
from dede_ray.detectors.clip_score import CaptionScore
from dede_ray.detectors.consistency import Consistency
from dede_ray.detectors.decree import Inversion
from dede_ray.detectors.dede import DeDe
from dede_ray.detectors.density import Density
from dede_ray.detectors.image_statistics import ImageStatistics
from dede_ray.detectors.isolation_forest import Forest
from dede_ray.detectors.masking_trajectory import MaskingTrajectory
from dede_ray.evaluation.benchmark import BenchmarkConfig, Case, Cell, DecoderTraining, _Filling, _images, benchmark
from dede_ray.evaluation.leaderboard import DECIDED, LeaderboardSettings, list_of
from dede_ray.evaluation.measure import ActivationGate
from dede_ray.models.embedding import Batch
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.poisoning.poison import PoisonConfig, poison
from dede_ray.poisoning.triggers import Blend, Patch
from dede_ray.runtime.config import Mistake, read_json

pytestmark = pytest.mark.trains

SEEDS = [0, 1]
STANDING = LeaderboardSettings(
    num_mixtures=2, num_lists=2, list_rates=(0.03,), calibration_sizes=(10,), corpus_size=110
)
ROLES = ["victim", "honest", "other"]
TRIGGER = Patch(size_px=6, pattern="white", margin_px=2)
NUM_TEST, NUM_SUSPECTED, NUM_TRIGGERED, NUM_CONTROLS, NUM_SECOND = 120, 120, 36, 12, 5


@pytest.fixture(scope="module")
def shards(write_pictures, write_tar_in, tmp_path_factory) -> Path:
    """Labelled pictures to train on, to test and to fit heads on; one of the first two kinds cannot be read."""
    folder = tmp_path_factory.mktemp("benchmark") / "shards"
    write_pictures(folder, range(160), "train", per_shard=80)
    write_pictures(folder, range(1000, 1000 + NUM_TEST), "test", per_shard=120)
    write_pictures(folder, range(2000, 2040), "probe", per_shard=40)
    for split in ("train", "test"):
        write_tar_in(folder / f"{split}-odd.tar", [("bad.png", b"rubbish"), ("bad.cls", b"1")])
    return folder


@pytest.fixture(scope="module")
def other_folder(clip_config) -> Path:
    """One more CLIP of the victim's architecture."""
    from dede_ray.models.clip import build_clip, model_description, save_clip

    torch.manual_seed(7)
    described = model_description(str(clip_config))
    save_clip(clip_config.parent / "other", build_clip(described), described)
    return clip_config.parent / "other"


@pytest.fixture(scope="module")
def settings(shards, victim_folder, other_folder, reference_folder):
    def config(output: Path, **changed) -> BenchmarkConfig:
        victim, other = (OpenClipVictim(path=str(folder)) for folder in (victim_folder, other_folder))
        # An encoder that is its own honest twin shows that nothing but the encoder is between two roles.
        case = Case(
            attack="badnets", victim=victim, honest=victim, others={"other": other}, trigger=TRIGGER, target_label=1
        )
        defaults = {
            "output": str(output),
            "cases": {"toy": case},
            "train_shards": str(shards / "train-*.tar"),
            "test_shards": str(shards / "test-*.tar"),
            "probe_shards": str(shards / "probe-*.tar"),
            "gate": ActivationGate(min_asr=0, min_asr_gain=0, max_ca_loss=1),
            "reference": OpenClipVictim(path=str(reference_folder)),
            "detectors": [
                DeDe(decoder="trained in each cell"),
                Density(k=3, lid_k=4),
                Consistency(k=3, num_references=64, min_agreement=0),
                Forest(name="wide", pca=10_000),  # more components than embeddings have: it cannot be fitted
                ImageStatistics(),
            ],
            "second_stage": [MaskingTrajectory(num_pictures=4)],
            "decoder": DecoderTraining(epochs=1, batch_size=32),
            "seeds": SEEDS,
            "num_suspected": NUM_SUSPECTED,
            "poison_rate": 0.05,
            "num_clean": 41,
            "num_triggered": NUM_TRIGGERED,
            "num_controls": NUM_CONTROLS,
            "num_second_stage": NUM_SECOND,
            "standing": STANDING,
        }
        return BenchmarkConfig(**{**defaults, **changed})

    return config


@pytest.fixture(scope="module")
def done(local_ray, shards, settings) -> tuple[Path, str]:
    return shards.parent / "output", benchmark(settings(shards.parent / "output"))


def cell(done, role: str = "victim", seed: int = 0) -> pa.Table:
    return pq.read_table(Cell("toy", role, seed).path(done[0]))


def part(table: pa.Table, name: str) -> list[dict]:
    return [row for row in table.to_pylist() if row["set"] == name]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    paths = sorted([*folder.glob("cells/*"), *folder.glob("gates/*")])
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


# --- what it leaves


def test_every_encoder_and_seed_has_a_cell_and_every_case_a_gate_a_table_and_figures(done):
    output, said = done
    assert {path.stem for path in (output / "cells").iterdir()} == {f"toy-{role}-{s}" for role in ROLES for s in SEEDS}
    assert read_json(output / "gates" / "toy.json", "gate")["passes"] is True
    assert (output / "table.md").read_text() == said + "\n"
    numbers = pq.read_table(output / "results.parquet").to_pylist()
    assert {(row["case"], row["role"], row["seed"]) for row in numbers} == {("toy", r, s) for r in ROLES for s in SEEDS}
    assert {"dede_mean", "dao", "xc", "stat_entropy", "mt_jump", "compat_dao"} <= {row["column"] for row in numbers}
    for where in ("in sample", "unseen"):
        decided = {row["column"] for row in numbers if row["mixture"] == list_of(where, 10, 0.03)}
        assert {"dede_reverse", "combined", "company", "company_xc", "classifier", "chosen", "dede_mean"} <= decided
    for name in ("auroc", "lists"):
        with Image.open(io.BytesIO((output / "figures" / f"{name}.png").read_bytes())) as image:
            assert image.format == "PNG"


def test_a_detector_that_cannot_be_fitted_is_left_out_and_named(done):
    output, said = done
    assert "isolation_forest_wide, in toy, victim, seed 0: isolation_forest: 10000 principal components" in said
    assert (output / "table.md").read_text() == said + "\n"
    assert not [name for name in cell(done).column_names if name.startswith("isolation_forest")]


def test_between_two_roles_of_one_encoder_there_is_no_difference(done):
    for seed in SEEDS:
        victim, honest, other = (cell(done, role, seed) for role in ROLES)
        assert victim.equals(honest)
        same = [name for name in victim.column_names if victim[name].equals(other[name])]
        statistics = {name for name in victim.column_names if name.startswith("stat_")}
        assert set(same) >= {"set", "sample_id", "label", "is_poisoned", "content_hash"} | statistics  # the same images
        assert not {"dede_mean", "dao", "xc", "mt_jump"} & set(same)


def test_seeds_draw_other_images_to_stamp_and_to_suspect(done):
    for name in ("triggered", "suspected"):
        drawn = [{row["sample_id"] for row in part(cell(done, seed=s), name)} for s in SEEDS]
        assert drawn[0] != drawn[1]
    assert "compat_head" not in cell(done, seed=1).column_names
    assert part(cell(done, seed=1), "second_clean") == []


def test_sets_are_of_the_size_and_the_images_that_they_promise(done):
    table = cell(done)
    sizes = {  # one suspected image cannot be read
        "suspected": NUM_SUSPECTED - 1, "clean": NUM_TEST, "triggered": NUM_TRIGGERED, "patch": NUM_CONTROLS,
        "misstamped": NUM_CONTROLS, "shuffled_clean": NUM_CONTROLS, "shuffled_triggered": NUM_CONTROLS,
        "pool_clean": NUM_TRIGGERED, "pool_triggered": NUM_TRIGGERED, "second_clean": NUM_SECOND,
        "second_triggered": NUM_SECOND,
    }  # fmt: skip
    assert {name: len(part(table, name)) for name in {row["set"] for row in table.to_pylist()}} == sizes
    clean = {row["sample_id"] for row in part(table, "clean")}
    for name in ("triggered", "patch"):
        assert {row["sample_id"].removesuffix("+patch") for row in part(table, name)} <= clean
    assert sum(row["is_poisoned"] for row in part(table, "suspected")) == 6  # 5 % of 120
    for name in DECIDED:  # all that deciding takes
        for row in part(table, name):
            assert np.isfinite([*row["dede_residual"], *row["xc_residual"], *row["embedding"]]).all()
            assert row["content_hash"]
            assert row["perceptual_hash"] is not None
    scores = ["dede_mean", "dede_reverse", "k_distance", "xc", "stat_contrast"]
    for name in (*DECIDED, "patch", "shuffled_clean", "shuffled_triggered"):
        assert all(np.isfinite([row[score] for score in scores]).all() for row in part(table, name)), name
    looks = ["dede_mean", "dede_reverse", "stat_contrast"]
    assert all(np.isfinite([row[score] for score in looks]).all() for row in part(table, "misstamped"))
    assert all(row["k_distance"] is None for row in part(table, "misstamped"))
    labels = {row["sample_id"]: row["label"] for row in part(table, "clean")}
    assert all(label == int(name[-4:]) % 4 for name, label in labels.items())


def test_scores_are_those_of_stamped_pictures_under_the_cells_own_decoder(done, settings, picture):
    config = settings(done[0])
    victim = load_victim(config.cases["toy"].victim)
    decoder = done[0] / "decoders" / "toy-victim-1"
    scorers = [one.open(victim, {}) for one in (DeDe(decoder=str(decoder)), ImageStatistics())]
    rows = part(cell(done, seed=1), "triggered")
    plain = [picture(int(row["sample_id"].removesuffix("+patch")[-4:])) for row in rows]
    for row, image_HWC in zip(rows, plain, strict=True):
        stamped_HWC = image_HWC.copy()
        stamped_HWC[24:30, 24:30] = 255
        image_BCHW = to_unit_range(torch.from_numpy(stamped_HWC[None]))
        batch = Batch([row["sample_id"]], victim(image_BCHW), image_BCHW)
        for scorer in scorers:
            for name, score_B in scorer.score(batch).items():
                assert row[name] == pytest.approx(float(score_B[0]), rel=1e-3, abs=1e-5), name


def test_shuffled_images_keep_their_pixels_and_change_their_embedding(done):
    plain = {row["sample_id"]: row for row in part(cell(done), "clean")}
    shuffled = part(cell(done), "shuffled_clean")
    for row in shuffled:
        before = plain[row["sample_id"]]
        for name, value in row.items():
            if name.startswith("stat_") or name == "dede_null":
                assert value == pytest.approx(before[name], rel=1e-4, abs=1e-6), name
        assert row["dede_reverse"] != pytest.approx(before["dede_reverse"], rel=1e-4)


def test_a_picture_stamped_after_normalisation_is_far_outside_of_what_pixels_can_be(done):
    plain = {row["sample_id"]: row["stat_contrast"] for row in part(cell(done), "clean")}
    assert all(row["stat_contrast"] > 1.5 * plain[row["sample_id"]] for row in part(cell(done), "misstamped"))


# --- again


def test_a_lost_cell_is_made_again_to_the_same_bytes_and_no_other(done, settings, tmp_path):
    shutil.copytree(done[0], tmp_path / "output")
    run = tmp_path / "output" / "run.json"
    run.write_text(run.read_text().replace(str(done[0]), str(tmp_path / "output")))
    before = snapshot(tmp_path / "output")
    Cell("toy", "other", 1).path(tmp_path / "output").unlink()
    assert benchmark(settings(tmp_path / "output")) == done[1]
    after = snapshot(tmp_path / "output")
    assert {name: content for name, (_, content) in after.items()} == {name: one for name, (_, one) in before.items()}
    assert {name for name in after if after[name] != before[name]} == {"toy-other-1.parquet"}
    others = STANDING.model_copy(update={"q": 0.3})  # what is asked of the scores runs no model
    assert "q = 0.3" in benchmark(settings(tmp_path / "output", standing=others))
    assert snapshot(tmp_path / "output") == after
    with pytest.raises(Mistake, match=r"poison_rate: 0\.05 there, 0\.1 here"):
        benchmark(settings(tmp_path / "output", poison_rate=0.1))


# --- one cell


@pytest.fixture(scope="module")
def filling(settings, tmp_path_factory):
    """Begin a cell, as a task does, of a case with another trigger."""

    def begin(seed: int = 0, num_suspected: int = NUM_SUSPECTED, **changed) -> _Filling:
        output = tmp_path_factory.mktemp("cell")
        config = settings(output, num_suspected=num_suspected, num_clean=20)
        case = config.cases["toy"].model_copy(update=changed)
        config = config.model_copy(update={"cases": {"toy": case}})
        return _Filling(config, _images(config), Cell("toy", "victim", seed), output)

    return begin


def test_a_suspected_corpus_bears_the_training_trigger_on_its_share_and_nowhere_else(filling, picture):
    one = filling(training_trigger=Patch(size_px=4, pattern="yellow", position="top_left"))
    assert one.is_poisoned.sum() == 6  # 5 % of 120
    assert one.suspected.sample_ids == sorted(one.suspected.sample_ids)
    assert not set(one.suspected.sample_ids) & set(one.known.sample_ids)
    for name, image_HWC, is_poisoned in zip(
        one.suspected.sample_ids, one.suspected.image_NHWC, one.is_poisoned, strict=True
    ):
        expected_HWC = picture(int(name[-4:]))
        if is_poisoned:
            expected_HWC[:4, :4] = [255, 255, 0]
        np.testing.assert_array_equal(image_HWC, expected_HWC)
    again, other = filling(), filling(seed=1)
    assert again.suspected.sample_ids == one.suspected.sample_ids
    assert (again.is_poisoned == one.is_poisoned).all()
    assert other.suspected.sample_ids != one.suspected.sample_ids


@pytest.mark.parametrize(
    ("trigger", "place"),
    [
        (TRIGGER, (slice(24, 30), slice(24, 30))),
        (Patch(size_px=8, pattern="checkerboard", position="center"), (slice(12, 20), slice(12, 20))),
        (Blend(), (slice(29, 32), slice(29, 32))),
    ],
)
def test_the_unlearned_patch_is_as_large_as_the_trigger_where_it_is_and_another_one(filling, trigger, place):
    one = filling(trigger=trigger)
    image_HWC = np.full((32, 32, 3), 77, np.uint8)
    stamped_HWC = one._unlearned().stamp(image_HWC, "0")
    is_changed = (stamped_HWC != image_HWC).any(axis=2)
    inside = np.zeros((32, 32), bool)
    inside[place] = True
    assert not is_changed[~inside].any()
    assert is_changed[place].mean() > 0.9
    assert (stamped_HWC != trigger.stamp(image_HWC, "0"))[place].mean() > 0.5


def test_a_trigger_is_stamped_on_the_image_at_its_own_size(
    filling, settings, victim_folder, tmp_path, reference_folder
):
    """For a victim of larger images, the patch grows with the picture, as it does when the victim's gate is judged."""
    one = filling(victim=OpenClipVictim(path=str(reference_folder)))  # 64 px
    stamped = one.test.stamped(Patch(size_px=8, pattern="white"), one.config.limits)
    difference = (stamped.image_NHWC.astype(int) - one.test.image_NHWC).any(axis=(0, 3))
    assert stamped.image_NHWC.shape[1:] == (64, 64, 3)
    assert (stamped.image_NHWC[:, 52:, 52:] > 240).all()
    assert not difference[:44].any()
    assert not difference[:, :44].any()


def test_the_misstamped_patch_keeps_its_colours(filling):
    """Where the mask is 1 the normalised patch is laid over, whatever its colours are; the normaliser is CIFAR-10's."""
    one, seen = filling(trigger=Patch(size_px=6, pattern="random", seed=3)), []

    class Looks:
        def score(self, batch):
            seen.append(batch.image_BCHW)
            return {"nothing": np.zeros(len(batch))}

    one._misstamped(np.arange(3), [Looks()])
    patch_HWC = one.case.trigger.stamp(np.zeros((32, 32, 3), np.uint8), "0")
    mean, std = (torch.tensor(three).view(1, 3, 1, 1) for three in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)))
    plain_BCHW = (to_unit_range(torch.from_numpy(one.test.image_NHWC[:3])) - mean) / std
    laid_BCHW = (to_unit_range(torch.from_numpy(patch_HWC[None])) - mean) / std
    expected_BCHW = plain_BCHW * (0 - mean) / std + (0 - mean) / std
    expected_BCHW[:, :, 26:, 26:] = (plain_BCHW * (1 - mean) / std + laid_BCHW)[:, :, 26:, 26:]
    torch.testing.assert_close(one.victim.normalise(seen[0]), expected_BCHW, rtol=1e-3, atol=1e-3)


def test_what_the_victim_learnt_is_suspected_as_it_was_poisoned(local_ray, filling, shards, tmp_path):
    poison(
        PoisonConfig(
            shards=str(shards / "train-0000*.tar"),
            output=str(tmp_path / "poisoned"),
            trigger=TRIGGER,
            rate=0.25,
            target_label=1,
            target_captions=["one"],
        )
    )
    truth = pq.read_table(tmp_path / "poisoned" / "truth.parquet").to_pylist()
    poisoned = {row["sample_id"] for row in truth if row["is_poisoned"]}
    one = filling(learnt=str(tmp_path / "poisoned"))
    assert one.is_poisoned.sum() == 6
    assert {name for name, is_one in zip(one.suspected.sample_ids, one.is_poisoned, strict=True) if is_one} <= poisoned
    for image_HWC, is_poisoned in zip(one.suspected.image_NHWC, one.is_poisoned, strict=True):
        assert (image_HWC[24:30, 24:30] > 250).all() == is_poisoned
    assert not {*one.suspected.content} & {*one.known.content}
    with pytest.raises(Mistake, match="lower num_suspected or poison_rate"):
        filling(learnt=str(tmp_path / "poisoned"), num_suspected=140)


# --- mistakes


def test_what_no_cell_could_do_is_a_mistake_before_anything_is_made(local_ray, settings, shards, tmp_path):
    def refused(message: str, **changed) -> None:
        with pytest.raises(Mistake, match=message):
            benchmark(settings(tmp_path / "output", **changed))
        assert not (tmp_path / "output" / "cells").exists()

    refused("consistency compares the victim with an independent encoder; name one as `reference`", reference=None)
    refused("clip_score looks at captions, and the benchmark's images have none", detectors=[CaptionScore()])
    refused("1 shards are both train_shards and test_shards", test_shards=str(shards / "train-00001.tar"))
    refused("161 labelled training images, 241 are needed", num_suspected=200)
    with pytest.raises(ValidationError, match="seeds must be different"):
        settings(tmp_path / "output", seeds=[0, 0])
    encoder = settings(tmp_path / "output").cases["toy"].victim
    with pytest.raises(ValidationError, match="others may not be called honest"):
        Case(
            attack="a", victim=encoder, honest=encoder, others={"honest": encoder}, trigger=TRIGGER, target_label=0
        )  # fmt: skip


@pytest.mark.slow
def test_a_stamp_is_inverted_and_published_asset_runs_under_the_first_seed(local_ray, settings, tmp_path):
    from dede_ray.detectors.asset import PublishedAsset

    slow = {"inversion": Inversion(epochs=2, batch_size=16), "compat_asset": PublishedAsset(width=4, epochs=1)}
    said = benchmark(settings(tmp_path / "output", seeds=[0], num_triggered=20, **slow))
    assert "DECREE, one inversion each: PL1 victim" in said
    numbers = pq.read_table(tmp_path / "output" / "results.parquet").to_pylist()
    columns = {row["column"] for row in numbers}
    assert "compat_asset" in columns
    assert any(name.startswith("decree") for name in columns)
    assert "compat_dao" not in columns  # 40 images have no 64 neighbours
