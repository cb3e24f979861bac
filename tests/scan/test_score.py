"""Scoring, whole: shards to manifest, the same bytes however often it is killed, and one clear message per mistake."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from dede_ray.data.images import to_unit_range
from dede_ray.data.ledger import KeyedShare, claim_parts, read_parts
from dede_ray.data.passes import PassResources, run_pass
from dede_ray.data.sampling import sample_keys
from dede_ray.data.shards import list_shards
from dede_ray.data.workers import Chunk
from dede_ray.detectors.clip_score import CaptionScore
from dede_ray.detectors.consistency import Consistency
from dede_ray.detectors.contract import open_scorer
from dede_ray.detectors.dede import DeDe
from dede_ray.detectors.density import Density
from dede_ray.detectors.image_statistics import ImageStatistics
from dede_ray.detectors.isolation_forest import Forest
from dede_ray.detectors.masking_trajectory import MaskingTrajectory
from dede_ray.models.decoder import load_decoder, save_decoder
from dede_ray.models.embedding import Batch, EmbedWork, Encoders, Encoding, in_one_heap, restored
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.models.weights import read_tensors
from dede_ray.runtime import lease
from dede_ray.runtime.config import Mistake
from dede_ray.runtime.lease import leased
from dede_ray.scan import overlap
from dede_ray.scan.decisions import AssumedPoisonRate, CleanQuantile, Conformal, FixedThreshold, PoolMedian
from dede_ray.scan.fusion import Fusion
from dede_ray.scan.judge import Judging
from dede_ray.scan.manifest import Manifest, read_manifest
from dede_ray.scan.pool import Amplify, Classifier, Company
from dede_ray.scan.score import Fitting, ScoreConfig, SecondStage, highest, resolve, score, settings_of

STATISTICS = [
    f"stat_{name}"
    for name in ("contrast", "edges", "texture", "texture_spread", "range", "bright", "dark", "entropy", "colour")
]
JOB = Path(__file__).parents[2] / "jobs" / "score.py"
ONE = PassResources(min_actors=1, cpus_per_actor=0.5, decode_cpus=0.5)
TWO = PassResources(min_actors=2, max_actors=2, cpus_per_actor=0.5, decode_cpus=0.5)


@pytest.fixture(scope="module")
def shards(write_pictures, write_tar_in, png, tmp_path_factory) -> Path:
    """Three shards to score, one with faults and images that come twice; and 60 calibration samples."""
    folder = tmp_path_factory.mktemp("scoring") / "shards"
    write_pictures(folder, range(40), per_shard=20)
    odd = [("twin.png", png(7)), ("bad.png", b"rubbish"), ("no.txt", b"words"), ("10.png", png(50)), ("9.png", png(51))]
    write_tar_in(folder / "train-odd.tar", odd)
    write_pictures(folder, range(100, 160), "calibration", per_shard=30)
    return folder


@pytest.fixture(scope="module")
def settings(shards, victim_folder, decoder_folder):
    def config(output: Path, **changed) -> ScoreConfig:
        settings = {
            "shards": str(shards / "train-*.tar"),
            "calibration": str(shards / "calibration-*.tar"),
            "output": str(output),
            "victim": OpenClipVictim(path=str(victim_folder)),
            "detectors": [DeDe(decoder=str(decoder_folder), score_mask_ratio=0.9), ImageStatistics()],
            "decision": Conformal(q=0.5),
            "findings": None,  # test_findings.py looks for groups
            "chunk_size": 8,
            "resources": ONE,
        }
        return ScoreConfig(**{**settings, **changed})

    return config


@pytest.fixture(scope="module")
def scored(local_ray, shards, settings) -> Manifest:
    return score(settings(shards.parent / "scores"))


def rows(manifest: Manifest) -> list[dict]:
    return manifest.table.to_pylist()


# --- the manifest


def test_every_sample_has_one_row_sorted_by_its_id(scored, shards):
    ids = [row["sample_id"] for row in rows(scored)]
    expected = [f"train-{i // 20:05d}.tar/{i:04d}" for i in range(40)]
    expected += [f"train-odd.tar/{key}" for key in ("twin", "bad", "no", "10", "9")]
    assert ids == sorted(expected)
    assert rows(read_manifest(scored.folder)) == rows(scored)
    assert scored.info["shards"] == [shard.name for shard in list_shards(str(shards / "train-*.tar"))]


def test_a_row_without_a_score_says_why_and_is_never_flagged(scored):
    errors = {row["sample_id"]: row for row in rows(scored) if row["error"] is not None}
    assert {name: row["error"] for name, row in errors.items()} == {
        "train-odd.tar/bad": "image_unreadable",
        "train-odd.tar/no": "no_image",
    }
    for row in errors.values():
        assert {row[name] for name in [*scored.score_columns, "combined_score", "p_value"]} == {None}
        assert row["flagged"] is False
    for row in rows(scored):
        if row["error"] is None:
            assert all(np.isfinite(row[name]) for name in [*scored.score_columns, "combined_score", "p_value"])


def test_another_decision_is_made_without_scoring_again_and_never_flags_a_row_without_a_score(scored, settings):
    before, parts_before = files(scored.folder), parts(scored.folder)
    manifest = score(settings(scored.folder, decision=AssumedPoisonRate(rate=0.999)))
    flagged = [row["sample_id"] for row in rows(manifest) if row["flagged"]]
    assert len(flagged) == 43
    assert (manifest.folder / "flagged.txt").read_text().splitlines() == flagged
    score(settings(scored.folder))
    assert files(scored.folder) == before
    assert parts(scored.folder) == parts_before


def test_equal_images_share_a_group_and_others_have_none(scored):
    groups = {row["sample_id"]: row["group_id"] for row in rows(scored) if row["group_id"] is not None}
    assert set(groups) == {"train-00000.tar/0007", "train-odd.tar/twin"}
    assert len(set(groups.values())) == 1
    assert scored.info["counts"]["duplicated_images"] == 2


def test_the_counts_and_the_summary_are_those_of_the_rows(scored):
    counts = scored.info["counts"]
    assert (counts["samples"], counts["scored"]) == (45, 43)
    assert counts["unreadable"] == {"image_unreadable": 1, "no_image": 1}
    assert counts["flagged"] == sum(row["flagged"] for row in rows(scored))
    assert scored.info["decision"]["num_calibration"] == 60
    assert scored.info["controls"] == ["dede_null", *STATISTICS]
    said = f"{counts['flagged']} of 43 samples flagged by dede_reverse (conformal, certified); 2 unreadable"
    assert scored.summary().startswith(said)


def test_p_values_compare_with_the_calibration_samples(scored):
    paths = sorted((scored.folder / "calibration" / "parts").glob("*/*.parquet"))
    calibration = [value for path in paths for value in pq.read_table(path)["dede_reverse"].to_pylist()]
    assert len(calibration) == 60
    for row in rows(scored):
        if row["error"] is None:
            above = sum(value >= row["combined_score"] for value in calibration)
            assert row["p_value"] == pytest.approx((1 + above) / 61)
            assert row["combined_score"] == row["dede_reverse"]


def test_the_manifest_says_what_made_it_and_holds_no_clock_time(scored, settings):
    text = (scored.folder / "manifest.json").read_text()
    info = json.loads(text)
    assert ScoreConfig.model_validate(info["settings"]) == settings(scored.folder, resources=PassResources())
    assert {len(info["victim"]["fingerprint"]), len(info["detectors"]["dede"])} == {64}
    assert {"torch", "open_clip_torch", "pillow"} <= info["versions"].keys()
    year = time.strftime("%Y")
    assert not re.search(rf"{year}-\d\d|\d\d:\d\d:\d\d|{str(int(time.time()))[:5]}\d{{5}}", text)


# --- what a score depends on


@pytest.mark.slow
def test_scores_do_not_depend_on_chunks_order_of_shards_or_number_of_actors(scored, settings, shards, tmp_path):
    backwards = [str(path) for path in sorted(shards.glob("train-*.tar"), reverse=True)]
    other = score(settings(tmp_path / "scores", shards=backwards, chunk_size=5, resources=TWO))
    assert other.table.column_names == scored.table.column_names
    for name in scored.table.column_names:
        one, two = scored.table[name].to_pylist(), other.table[name].to_pylist()
        if name in (*scored.score_columns, "combined_score"):
            assert [value is None for value in one] == [value is None for value in two]
            as_numbers = [np.array(column, np.float64) for column in (one, two)]
            np.testing.assert_allclose(*as_numbers, rtol=1e-6, atol=1e-6, err_msg=name)
        else:
            assert one == two, name


@pytest.fixture(scope="module")
def embedded(local_ray, shards, settings) -> Path:
    """What a decoder's training leaves: its folder, with the embeddings of the shards."""
    config, folder = settings(shards.parent / "nowhere"), shards.parent / "known"
    victim = load_victim(config.victim)
    run_pass(
        list_shards(config.shards), folder / "embeddings" / "train", EmbedWork,
        {"encoding": Encoding(config.victim.located(), None, frozenset())}, image_size=victim.image_size,
        made_with={"victim": victim.fingerprint}, chunk_size=8, limits=config.limits, resources=ONE,
        max_error_fraction=0.5, name="embedding",
    )  # fmt: skip
    return folder


@pytest.mark.slow
def test_embeddings_known_from_training_change_nothing(scored, embedded, settings, tmp_path):
    again = score(settings(tmp_path / "scores", known_embeddings=str(embedded)))
    assert again.table.equals(scored.table)


def test_embeddings_are_known_of_the_very_same_samples_only(embedded, victim_folder, picture):
    victim = OpenClipVictim(path=str(victim_folder))
    encoders = Encoders(Encoding(victim, None, frozenset(), str(embedded / "embeddings" / "train")))
    rows = read_parts(embedded / "embeddings" / "train", "train-00000.tar").slice(8, 8)
    ids, hashes = rows["sample_id"].to_pylist(), rows["content_hash"].to_pylist()
    dark_BHWC = np.zeros((8, 32, 32, 3), np.uint8)  # whatever the picture, what is known is not computed
    known = encoders(Chunk(ids, dark_BHWC, [None] * 8, ("train-00000.tar", 1), hashes)).embedding_BE
    np.testing.assert_array_equal(known.numpy(), restored(rows).embedding_BE.numpy())
    dark = load_victim(victim)(to_unit_range(torch.from_numpy(dark_BHWC)))
    for chunk in (
        Chunk(ids, dark_BHWC, [None] * 8, ("train-00000.tar", 1), ["another", *hashes[1:]]),
        Chunk(ids, dark_BHWC, [None] * 8, ("train-00000.tar", 0), hashes),
        Chunk(ids, dark_BHWC, [None] * 8, ("train-00007.tar", 1), hashes),
        Chunk(ids, dark_BHWC, [None] * 8),
    ):
        assert torch.equal(encoders(chunk).embedding_BE, dark)


def test_embeddings_of_another_victim_or_chunk_size_are_a_mistake(embedded, settings, tmp_path):
    with pytest.raises(Mistake, match="chunks of 8 samples, this run scores chunks of 16"):
        score(settings(tmp_path, known_embeddings=str(embedded), chunk_size=16))
    with pytest.raises(Mistake, match="record of the pass"):
        score(settings(tmp_path, known_embeddings=str(tmp_path)))
    made_with = json.loads((embedded / "embeddings" / "train" / "pass.json").read_text())
    (tmp_path / "embeddings" / "train").mkdir(parents=True)
    (tmp_path / "embeddings" / "train" / "pass.json").write_text(json.dumps({**made_with, "victim": "another"}))
    with pytest.raises(Mistake, match="embeddings of another victim: 'another' there"):
        score(settings(tmp_path, known_embeddings=str(tmp_path)))


def test_scores_of_the_manifest_are_what_the_models_give_by_hand(scored, settings, picture):
    config = settings(scored.folder)
    victim = load_victim(config.victim)
    image_BCHW = to_unit_range(torch.from_numpy(picture(3)[None]))
    batch = Batch(["train-00000.tar/0003"], victim(image_BCHW), image_BCHW)
    [row] = [row for row in rows(scored) if row["sample_id"] == "train-00000.tar/0003"]
    for detector in config.detectors:
        for name, value in detector.open(victim, {}).score(batch).items():
            assert row[name] == pytest.approx(float(value[0]), rel=1e-5, abs=1e-6), name


@pytest.mark.slow
def test_a_decision_on_company_takes_the_residuals_that_the_pass_wrote(local_ray, settings, tmp_path):
    judging = Judging(company=Company(share=0.2, k=2), amplified=Amplify(k=2))
    wanted = {"judging": judging, "decision": Conformal(score="company", q=0.5, false_alarm=None)}
    manifest = score(settings(tmp_path / "scores", **wanted))
    assert {"company", "amplified"} <= {*manifest.score_columns}
    assert all((row["amplified"] is None) == (row["error"] is not None) for row in rows(manifest))
    assert "dede_residual" not in manifest.table.column_names
    assert [row["company"] is None for row in rows(manifest)] == [row["error"] is not None for row in rows(manifest)]
    assert manifest.info["decision"]["num_calibration"] == 60
    written = read_parts(tmp_path / "scores" / "scores", "train-00000.tar", ["dede_residual"])["dede_residual"]
    assert written.type.list_size == load_victim(settings(tmp_path).victim).embedding_dim
    company = Judging(company=Company(residual="xc_residual"))
    with pytest.raises(Mistake, match=r"residuals xc_residual, and the detectors of this run give dede_residual"):
        score(settings(tmp_path / "other", **{**wanted, "judging": company}))


@pytest.mark.slow
def test_relative_paths_begin_where_the_job_was_started_also_for_workers_that_run_elsewhere(
    scored, settings, shards, victim_folder, monkeypatch, tmp_path
):
    shutil.copytree(victim_folder.parent, tmp_path / "models")
    shutil.copytree(shards, tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    one_shard = {"shards": "shards/train-00000.tar", "calibration": "shards/calibration-00000.tar"}
    models = {"victim": OpenClipVictim(path="models/victim"), "detectors": [DeDe(decoder="models/decoder")]}
    manifest = score(settings(Path("scores"), **one_shard, **models))
    assert manifest.info["victim"] == {"path": "models/victim", "fingerprint": scored.info["victim"]["fingerprint"]}
    assert len(rows(manifest)) == 20


# --- killed


def files(folder: Path) -> dict[str, bytes]:
    kept = [folder / "manifest.json", folder / "flagged.txt", *sorted((folder / "manifest").iterdir())]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def parts(folder: Path) -> dict[str, tuple[int, int]]:
    found = sorted(folder.glob("*/parts/*/[0-9]*.parquet"))
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def scoring(folder: Path, config: str = "score.yaml") -> subprocess.Popen:
    """Run the job in a folder, as a person would, with paths that begin there."""
    command = [sys.executable, str(JOB), config]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_job_run_again_gives_the_same_bytes_and_redoes_nothing(
    write_pictures, victim_folder, decoder_folder, tmp_path
):
    settings = {
        "shards": "shards/train-*.tar", "calibration": "shards/calibration-*.tar", "output": "scores",
        "victim": {"path": "victim"}, "detectors": [{"kind": "dede", "decoder": "decoder"}],
        "decision": {"kind": "conformal", "q": 0.5}, "chunk_size": 2, "resources": {"min_actors": 1},
    }  # fmt: skip
    for name in ("killed", "undisturbed"):
        folder = tmp_path / name
        write_pictures(folder / "shards", range(300), per_shard=100)
        write_pictures(folder / "shards", range(700, 720), "calibration")
        shutil.copytree(victim_folder, folder / "victim")
        shutil.copytree(decoder_folder, folder / "decoder")
        (folder / "score.yaml").write_text(yaml.safe_dump(settings))
    killed, output = tmp_path / "killed", tmp_path / "killed" / "scores"

    undisturbed, job = scoring(tmp_path / "undisturbed"), scoring(killed)
    while len(parts(output)) < 12 and job.poll() is None:
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    finished = wait_until_still(output)
    assert 12 <= len(finished) < 160
    assert not (output / "manifest.json").exists()
    some_part = output / next(iter(finished))
    some_part.with_name(f".{some_part.name}.1.tmp").write_bytes(b"half a part")

    for job in (scoring(killed), undisturbed):
        out, err = job.communicate()
        assert job.returncode == 0, err
        assert "samples flagged by dede_reverse" in out
    assert parts(output).items() >= finished.items()
    assert len(parts(output)) == 160
    assert files(output) == files(tmp_path / "undisturbed" / "scores")


def wait_until_still(folder: Path) -> dict[str, tuple[int, int]]:
    """The driver's death ends its Ray, a moment later."""
    while True:
        before = parts(folder)
        time.sleep(2)
        if parts(folder) == before:
            return before


# --- the shards are what they were


@pytest.fixture
def small(write_pictures, settings, tmp_path):
    """Settings of a run over two shards and a calibration set of its own, which may be changed."""
    write_pictures(tmp_path / "here", range(20), per_shard=10)
    write_pictures(tmp_path / "clean", range(100, 120), "calibration")

    def config(**changed) -> ScoreConfig:
        defaults = {"shards": str(tmp_path / "here"), "calibration": str(tmp_path / "clean")}
        return settings(tmp_path / "scores", **{**defaults, **changed})

    return config


@pytest.mark.slow
def test_a_corpus_that_was_replaced_is_not_given_the_old_scores_and_what_changed_is_scored_again(
    local_ray, small, write_pictures, tmp_path
):
    first = score(small())
    one, before, shard = rows(first), parts(first.folder), tmp_path / "here" / "train-00001.tar"
    size = shard.stat().st_size
    write_pictures(tmp_path / "others", range(30, 50), per_shard=10)
    other = (tmp_path / "others" / "train-00001.tar").read_bytes()
    shard.write_bytes(other[:size].ljust(size, b"\0"))
    with pytest.raises(Mistake, match=r"1 have changed since .*\n  train-00001\.tar: (.|\n)*rescore_changed"):
        score(small())
    again = score(small(rescore_changed=True))
    now = parts(first.folder)
    assert {name.split("/")[2] for name in now if now[name] != before[name]} == {"train-00001.tar"}
    two = rows(again)
    same = ("sample_id", "content_hash", "index", "dede_reverse", "error")
    assert [[row[name] for name in same] for row in one[:10]] == [[row[name] for name in same] for row in two[:10]]
    assert {row["content_hash"] for row in one[10:]}.isdisjoint(row["content_hash"] for row in two[10:])
    assert rows(score(small())) == two  # and is not a change any more


@pytest.mark.slow
def test_a_pass_goes_on_with_its_shards_under_another_path(local_ray, small, tmp_path):
    first = score(small())
    before = parts(first.folder)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = score(small(shards=str(tmp_path / "there")))
    assert moved.table.equals(first.table)
    assert parts(first.folder) == before
    urls = json.loads((first.folder / "scores" / "pass.json").read_text())["shards"]
    assert {entry["url"].split("/")[-2] for entry in urls.values()} == {"there"}


def test_pictures_of_the_corpus_in_the_calibration_are_refused_with_their_number_before_the_pass(
    local_ray, small, write_pictures, tmp_path
):
    shutil.copy(tmp_path / "here" / "train-00000.tar", tmp_path / "clean" / "calibration-00009.tar")
    with pytest.raises(Mistake, match=r"1 shards \(such as calibration-00009\.tar\) are in `shards` and in `calib"):
        score(small())  # before anything
    shutil.rmtree(tmp_path / "clean")
    write_pictures(tmp_path / "clean", [*range(100, 120), 3, 4, 5], "calibration")
    with pytest.raises(Mistake, match=r"3 pictures are in `shards` and in `calibration`.*overlap: leave_out"):
        score(small())
    assert not parts(tmp_path / "scores")
    manifest = score(small(overlap="leave_out"))
    assert manifest.info["decision"]["num_calibration"] == 20
    assert manifest.info["decision"]["num_calibration_in_corpus"] == 3
    write_pictures(tmp_path / "other", range(200, 220), "calibration")
    fitting = Fitting(clean=str(tmp_path / "clean"))
    with pytest.raises(Mistake, match=r"3 pictures are in `shards` and in `fitting\.clean`"):
        score(small(calibration=str(tmp_path / "other"), fitting=fitting, detectors=[FROM_CLEAN], decision=DAO))


@pytest.mark.slow
def test_of_a_large_corpus_the_first_chunk_that_has_a_calibration_picture_stops_the_pass(
    local_ray, small, write_pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(overlap, "MOST_BYTES", 0)
    shutil.rmtree(tmp_path / "clean")
    write_pictures(tmp_path / "clean", [*range(100, 120), 19], "calibration")
    with pytest.raises(Mistake, match="1 pictures are in `shards` and in `calibration`"):
        score(small())
    assert not (tmp_path / "scores" / "manifest.json").exists()


def test_the_second_job_on_an_output_folder_stops(local_ray, small, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    with leased(tmp_path / "scores"), pytest.raises(Mistake, match=r"another job is writing to .*scores"):
        score(small())


# --- what cannot be fitted, and later stages


DAO = Conformal(score="dao_clean", q=0.5)


@pytest.mark.slow
def test_a_detector_that_cannot_be_fitted_is_left_out_unless_the_decision_needs_it(local_ray, small, decoder_folder):
    wide, dede = Forest(name="wide", pca=10_000), DeDe(decoder=str(decoder_folder))
    manifest = score(small(detectors=[dede, wide]))
    assert manifest.info["left_out"].keys() == {"isolation_forest_wide"}
    assert "10000 principal components" in manifest.info["left_out"]["isolation_forest_wide"]
    assert "left out, as they could not be fitted: isolation_forest_wide" in manifest.summary()
    assert score(small(detectors=[dede])).table.equals(manifest.table)
    fused = Judging(combined=Fusion(columns=("dede_reverse", "isolation_forest_wide")))
    made = score(small(detectors=[dede, wide], judging=fused)).info["decision"]["made"]
    assert made["combined"]["columns"] == ["dede_reverse"]
    with pytest.raises(Mistake, match=r"is 'isolation_forest_wide', and what gives it cannot be fitted: .*10000 princ"):
        score(small(detectors=[dede, wide], decision=Conformal(score="isolation_forest_wide", q=0.5)))


@pytest.mark.slow
def test_a_decision_may_use_the_second_stage_and_then_the_calibration_goes_through_it(local_ray, small):
    second = SecondStage(detectors=[MaskingTrajectory(num_pictures=4)], num_candidates=12)
    manifest = score(small(second_stage=second, decision=Conformal(score="mt_jump", q=0.9, false_alarm=None)))
    found = rows(manifest)
    paths = sorted((manifest.folder / "second_stage_calibration").glob("parts/*/*.parquet"))
    clean = [row for path in paths for row in pq.read_table(path).to_pylist()]
    first = read_parts(manifest.folder / "calibration", "calibration-00000.tar").to_pylist()
    least = sorted((row["dede_sum"] for row in [*found, *first]), reverse=True)[11]
    candidates = {row["sample_id"] for row in found if row["mt_jump"] is not None}
    assert candidates == {row["sample_id"] for row in found if row["dede_sum"] >= least}
    assert {row["sample_id"] for row in clean} == {row["sample_id"] for row in first if row["dede_sum"] >= least}
    assert 0 < len(candidates) < 12 == len(candidates) + len(clean)
    assert (manifest.info["decision"]["num_calibration"], manifest.info["decision"]["num_scored"]) == (20, 20)
    for row in found:
        if row["sample_id"] in candidates:
            equal = sum(other["mt_jump"] == row["mt_jump"] for other in clean)
            above = sum(other["mt_jump"] > row["mt_jump"] for other in clean)
            assert (1 + above) / 21 - 1e-9 <= row["p_value"] <= (1 + above + equal) / 21 + 1e-9
        else:  # all candidates come before it
            assert row["combined_score"] is None
            assert row["p_value"] > (1 + len(clean)) / 21 - 1e-9
            assert row["rank"] > len(candidates)
    fused = Judging(combined=Fusion(columns=("dede_sum", "mt_jump")))
    both = score(small(second_stage=second, judging=fused, decision=Conformal(score="combined", q=0.9)))
    assert both.info["decision"]["num_calibration"] == 20  # what is fitted is fitted to the pool


def test_without_calibration_there_is_a_ranking(local_ray, small):
    manifest = score(small(calibration=None, decision=AssumedPoisonRate(rate=0.1)))
    by_score = sorted(rows(manifest), key=lambda row: (-row["combined_score"], row["sample_id"]))
    assert [row["rank"] for row in by_score] == [*range(1, 21)]
    assert {row["p_value"] for row in by_score} == {None}
    assert {row["poisoned_at_least"] for row in by_score} == {0}


def test_without_clean_samples_looks_decide_again_and_nothing_is_scored_again(local_ray, small, tmp_path):
    looks, about = tmp_path / "looks.jsonl", {"from_corpus": 10, "looks": 4, "audit": 3}
    config = {"calibration": about, "decision": Conformal(q=0.5), "shards": [small().shards, small().calibration]}
    before = score(small(**config))
    parts_before = parts(before.folder)
    decision = before.info["decision"]
    assert (decision["mode"], decision["certified"]) == ("ranked", False)
    assert "(empirical_null, ranked)" in before.summary()
    assert "certified" not in before.summary()
    to_review = [json.loads(line) for line in (before.folder / "to_review.jsonl").read_text().splitlines()]
    assert [row["place"] for row in to_review if row["why"] == "calibration"] == [1, 2, 3, 4]
    assert {row["verdict"] for row in to_review} == {None}
    assert {row["calibrates"] for row in rows(before)} == {False}  # in an estimate all are judged

    said = {"who": "ada", "when": "2026-03-01T10:00:00Z"}
    lines = [{"sample_id": row["sample_id"], "verdict": "clean", **said} for row in to_review[:4]]
    lines[0]["verdict"] = "poisoned"
    looks.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    after = score(small(**{**config, "calibration": {**about, "reviewed": str(looks)}}))
    assert parts(after.folder) == parts_before
    decision = after.info["decision"]
    assert (decision["mode"], decision["num_calibration"], decision["calibration"]["struck"]) == ("trimmed", 9, 1)
    assert sum(row["calibrates"] for row in rows(after)) == 9
    assert lines[0]["sample_id"] in after.flagged
    assert (after.folder / "flagged.txt").read_text().splitlines() == after.flagged
    assert {row["reviewed"] for row in rows(after)} == {None, "clean", "poisoned"}
    assert settings_of(after).calibration.reviewed == str(looks)

    score(small(shards=config["shards"], calibration=None, decision=AssumedPoisonRate(rate=0.1)))
    assert not (after.folder / "to_review.jsonl").exists()


# --- mistakes


def test_a_folder_scored_with_other_settings_is_not_continued(
    scored, settings, victim_folder, decoder_folder, tmp_path
):
    before = files(scored.folder)
    with pytest.raises(Mistake, match="chunk_size: 8 there, 9 now"):
        score(settings(scored.folder, chunk_size=9))
    with pytest.raises(Mistake, match="detectors: "):
        score(settings(scored.folder, detectors=[DeDe(decoder=str(decoder_folder), score_mask_ratio=0.75)]))
    decoder = load_decoder(decoder_folder)
    other = OpenClipVictim(path=str(victim_folder), mean=[0.1, 0.1, 0.1])
    decoder.victim = load_victim(other).fingerprint
    save_decoder(tmp_path, decoder, {})
    with pytest.raises(Mistake, match="victim: "):
        score(settings(scored.folder, victim=other, detectors=[DeDe(decoder=str(tmp_path))]))
    assert files(scored.folder) == before


def test_a_decision_that_nothing_supports_is_a_mistake(local_ray, settings, decoder_folder, tmp_path):
    with pytest.raises(Mistake, match="needs dede_reverse scores of calibration samples, found none"):
        score(settings(tmp_path / "scores", calibration=None))
    with pytest.raises(
        Mistake, match=r"decision\.score is 'dede_nul'.*give dede_sum, dede_mean, dede_reverse, dede_null_ratio$"
    ):
        score(settings(tmp_path / "other", decision=Conformal(score="dede_nul")))
    with pytest.raises(Mistake, match=r"decision\.score is 'stat_edges'"):  # a control decides nothing
        score(settings(tmp_path / "other", decision=Conformal(score="stat_edges")))
    with pytest.raises(Mistake, match="two detectors of this run are called dede; set `name` of one"):
        score(settings(tmp_path / "other", detectors=[DeDe(decoder=str(decoder_folder))] * 2))


def test_settings_are_resolved_and_refused_before_a_victim_is_loaded(shards, tmp_path):
    def config(**changed) -> ScoreConfig:
        settings = {
            "shards": str(shards / "train-*.tar"), "output": str(tmp_path / "scores"), "detectors": [Density(k=5)],
            "victim": OpenClipVictim(path=str(tmp_path / "absent")),
            "decision": FixedThreshold(score="dao", threshold=1),
        }  # fmt: skip
        return ScoreConfig(**{**settings, **changed})

    statistics = SecondStage(detectors=[ImageStatistics()])
    inputs = resolve(config(calibration=str(shards / "calibration-*.tar"), second_stage=statistics))
    assert [shard.name for shard in inputs.shards] == ["train-00000.tar", "train-00001.tar", "train-odd.tar"]
    assert len(inputs.calibration) == 2
    assert [one.label for one in inputs.all_detectors] == ["density", "image_statistics"]
    assert inputs.needs == {"image"}

    with pytest.raises(Mistake, match="nothing to score: name `shards`"):
        resolve(config(shards=[]))
    with pytest.raises(Mistake, match="two detectors of this run are called density; set `name` of one"):
        resolve(config(second_stage=SecondStage(detectors=[Density(k=7)])))
    with pytest.raises(Mistake, match="image_statistics look at images, and stored embeddings have none"):
        resolve(config(embeddings=str(tmp_path / "earlier"), second_stage=statistics))
    claim_parts(tmp_path / "earlier" / "scores", {}, inputs.shards)
    stored = resolve(config(embeddings=str(tmp_path / "earlier")))
    assert (stored.shards, stored.calibration, stored.source) == (inputs.shards, [], tmp_path / "earlier")

    late = SecondStage(detectors=[MaskingTrajectory()])
    for wrong, message in (
        ({"decision": Conformal(score="dao")}, "needs dao scores of calibration samples, found none"),
        ({"decision": CleanQuantile(score="dao")}, "needs dao scores of calibration samples, found none"),
        ({"decision": FixedThreshold(score="xc", threshold=1)}, "is 'xc'; the detectors of this run give k_distance"),
        ({"decision": FixedThreshold(score="combined", threshold=1)}, "is 'combined'; the detectors of this run give"),
        ({"judging": Judging(combined=Fusion(columns=("dao", "lof")))}, r"judging\.combined names lof; "),
        ({"judging": Judging(fair=["lof"])}, r"judging\.fair names lof; "),
        ({"judging": Judging(company=Company(of="lof"))}, r"judging\.company\.of names lof; "),
        (
            {
                "judging": Judging(classifier=Classifier(columns=("dao",), splits=2)),
                "decision": Conformal(score="classifier", storey=True),
            },
            "takes neither bins nor Storey; set mondrian_bins to 1 and storey to false",
        ),
        ({"judging": Judging(amplified=Amplify(of="lof"))}, r"judging\.amplified\.of names lof; "),
        ({"judging": Judging(classifier=Classifier(columns=("dao",)))}, "half of the calibration samples, and there"),
        ({"detectors": [Density(drawn_from="clean")]}, "density takes clean samples, and the run has none"),
        (
            {"second_stage": SecondStage(detectors=[MaskingTrajectory()], by="mt_jump")},
            r"second_stage\.by is 'mt_j",
        ),
        (
            {
                "detectors": [ImageStatistics()],
                "second_stage": late,
                "decision": FixedThreshold(score="mt_jump", threshold=1),
            },
            "the first stage gives controls only",
        ),
        (
            {"second_stage": late, "decision": PoolMedian(score="mt_jump")},
            "only candidates of the second stage have",
        ),
    ):
        with pytest.raises(Mistake, match=message):
            resolve(config(**wrong))


def test_models_that_do_not_fit_are_a_mistake_before_anything_is_read(settings, decoder_folder, tmp_path):
    other = load_decoder(decoder_folder)
    other.victim = "0123456789abcdef"
    save_decoder(tmp_path / "decoder", other, {})
    with pytest.raises(Mistake, match="trained against another victim"):
        score(settings(tmp_path / "scores", detectors=[DeDe(decoder=str(tmp_path / "decoder"))]))
    with pytest.raises(Mistake, match="no exported decoder"):
        score(settings(tmp_path / "scores", detectors=[DeDe(decoder=str(tmp_path / "absent"))]))
    with pytest.raises(Mistake, match="no victim at"):
        score(settings(tmp_path / "scores", victim=OpenClipVictim(path=str(tmp_path / "absent"))))
    assert not (tmp_path / "scores").exists()


@pytest.mark.slow
def test_shards_that_are_rubbish_stop_the_job(local_ray, settings, write_tar, tmp_path):
    write_tar("shards/a.tar", [(f"{i}.png", b"rubbish") for i in range(9)])
    write_tar("clean/b.tar", [(f"{i}.png", b"other rubbish") for i in range(9)])
    rubbish = {"shards": str(tmp_path / "shards"), "calibration": str(tmp_path / "clean")}
    with pytest.raises(Mistake, match=r"9 of 9 samples cannot be used \(image_unreadable 9\)"):
        score(settings(tmp_path / "scores", **rubbish))
    with pytest.raises(Mistake, match="found 9, all without a score"):
        score(settings(tmp_path / "scores", **rubbish, max_error_fraction=1))


@pytest.mark.slow
def test_a_mistake_ends_the_job_with_one_message_and_exit_code_2(
    write_pictures, victim_folder, decoder_folder, clip_config, tmp_path
):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    write_pictures(tmp_path / "shards", range(4))
    (tmp_path / "garbage.tar").write_bytes(b"garbage" * 200)
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    settings = {
        "shards": "shards", "output": "scores", "victim": {"path": str(victim_folder)},
        "detectors": [{"kind": "dede", "decoder": str(decoder_folder)}],
        "decision": {"kind": "assumed_rate", "rate": 0.1},
    }  # fmt: skip
    mistakes = {
        r"error: no shards at nowhere/\*\.tar": {"shards": "nowhere/*.tar"},
        r"error: 1 of 1 shards cannot be read as tar:\n  .*garbage\.tar: ReadError": {"shards": "garbage.tar"},
        r"error: .*bomb\.pt holds more than tensors": {"victim": {"path": "bomb.pt", "architecture": str(clip_config)}},
    }
    jobs = []
    for changed in mistakes.values():
        (tmp_path / f"{len(jobs)}.yaml").write_text(yaml.safe_dump({**settings, **changed}))
        jobs.append(scoring(tmp_path, f"{len(jobs)}.yaml"))
    for job, message in zip(jobs, mistakes, strict=True):
        out, err = job.communicate()
        assert (job.returncode, out) == (2, ""), err
        said = "\n".join(line for line in err.splitlines() if not re.match(r"\d{4}-\d\d-\d\d", line))  # the log
        assert re.match(message, said), err
        assert said.count("error: ") == 1
        assert "Traceback" not in err
    assert not (tmp_path / "exploded").exists()


# --- detectors that fit, a reference encoder, a second stage, stored embeddings

FITTED = [
    Density(k=3, lid_k=4),
    Forest(num_trees=20, num_samples=16),
    Consistency(forms=["closed", "overlap"], k=3, num_references=32, min_agreement=0),
    CaptionScore(reference=True),
]
FROM_CLEAN = Density(name="clean", drawn_from="clean", k=3, lid_k=4)
SHARE = 60 / 75  # of the corpus and the second shard of calibration samples


@pytest.fixture(scope="module")
def everything(shards, settings, decoder_folder, reference_folder):
    """Settings of a run of many detectors beside dede."""

    def config(output: Path, **changed) -> ScoreConfig:
        defaults = {
            "reference": OpenClipVictim(path=str(reference_folder)),
            "detectors": [DeDe(decoder=str(decoder_folder)), *FITTED, FROM_CLEAN, ImageStatistics()],
            "fitting": Fitting(num_samples=60, seed=3, clean=str(shards / "calibration-00000.tar")),
            "calibration": str(shards / "calibration-00001.tar"),
            "second_stage": SecondStage(detectors=[MaskingTrajectory(num_pictures=4)], num_candidates=5),
            "decision": Conformal(score="dao", q=0.5, false_alarm=None),
            "store_embeddings": True,
        }
        return settings(output, **{**defaults, **changed})

    return config


@pytest.fixture(scope="module")
def attached(local_ray, shards, everything) -> Manifest:
    return score(everything(shards.parent / "attached"))


@pytest.fixture(scope="module")
def by_hand(everything, picture) -> tuple[Encoders, Batch]:
    """The encoders of that run, and what they make of the samples whose name is their picture's number."""
    config = everything(Path("unused"))
    encoders = Encoders(Encoding(config.victim, config.reference, frozenset({"reference", "caption"})))
    ids = [f"train-{i // 20:05d}.tar/{i:04d}" for i in range(40)]
    captions = [f"picture {i}" for i in range(40)]
    return encoders, encoders(Chunk(ids, np.stack([picture(i) for i in range(40)]), captions))


def states(folder: Path) -> dict[str, tuple[int, int]]:
    found = sorted((folder / "fitting").glob("*.safetensors"))
    return {path.stem: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def test_detectors_that_fit_score_beside_dede_what_they_score_by_hand(attached, by_hand):
    encoders, everyone = by_hand
    # Number 7 comes twice: between the copies lies the rounding of the forward pass, which is another in each batch.
    batch = everyone.part([i for i in range(40) if i != 7])
    found = {row["sample_id"]: row for row in rows(attached)}
    assert {row["error"] for row in found.values()} == {None, "image_unreadable", "no_image"}
    for detector in (*FITTED, FROM_CLEAN):
        state = read_tensors(attached.folder / "fitting" / f"{detector.label}.safetensors")
        scorer = open_scorer(detector, encoders.victim, state)
        assert set(scorer.columns) <= set(attached.score_columns)
        for name, score_B in scorer.score(batch).items():
            there = [found[one][name] for one in batch.sample_ids]
            # The embeddings of a victim of random weights hardly differ, so that the rounding of a forward shows.
            np.testing.assert_allclose(there, score_B, rtol=2e-2, atol=2e-3, err_msg=name)
            assert all((row[name] is None) == (row["error"] is not None) for row in found.values())


def test_each_is_fitted_on_a_share_of_the_samples_drawn_by_their_keys(attached, by_hand):
    _, batch = by_hand
    share = KeyedShare(SHARE, 3)
    odd = {f"train-odd.tar/{key}" for key in ("twin", "10", "9")}
    calibration = {f"calibration-00001.tar/{i:04d}" for i in range(130, 160)}
    drawn = sorted(name for name in {*batch.sample_ids, *odd, *calibration} if share(name))
    assert 0 < len(drawn) < 73
    assert calibration & {*drawn}
    state = read_tensors(attached.folder / "fitting" / "density.safetensors")
    keys = dict(zip(sample_keys(drawn, 0).tolist(), drawn, strict=True))
    used = [keys[key] for key in state["key"].tolist()]  # in the order of the keys, which hides who calibrates
    assert state["key"].tolist() == sorted(state["key"].tolist())
    assert len(used) == len(drawn) - round(0.2 * len(drawn))  # the loneliest are left out
    rows_by_hand = dict(zip(batch.sample_ids, batch.embedding_BE, strict=True))
    for name, embedding_E in zip(used, state["reference"], strict=True):
        if name in rows_by_hand:
            torch.testing.assert_close(embedding_E, rows_by_hand[name], rtol=1e-4, atol=1e-6)


def test_clean_samples_for_fitting_come_from_the_shards_named_for_it(attached, settings, tmp_path):
    state = read_tensors(attached.folder / "fitting" / "density_clean.safetensors")
    every = {key: f"calibration-00000.tar/{key:04d}" for key in range(100, 130)}
    assert set(state["key"].tolist()) <= set(sample_keys(list(every.values()), 0).tolist())
    with pytest.raises(Mistake, match=r"density_clean takes clean samples.*none; name some as fitting\.clean"):
        score(settings(tmp_path / "scores", detectors=[FROM_CLEAN], fitting=Fitting(num_samples=60)))


def test_a_rerun_fits_and_scores_nothing_again_and_gives_the_same_bytes(attached, everything):
    before = files(attached.folder), parts(attached.folder), states(attached.folder)
    assert len(before[2]) == len(FITTED) + 1
    score(everything(attached.folder))
    assert (files(attached.folder), parts(attached.folder), states(attached.folder)) == before


def test_the_second_stage_scores_the_samples_that_look_worst_and_no_other(attached, by_hand):
    encoders, batch = by_hand
    scored = [row for row in rows(attached) if row["error"] is None]
    worst = sorted(scored, key=lambda row: (-row["dao"], row["sample_id"]))[:5]
    columns = attached.info["second_stage_columns"]
    assert columns == ["mt_jump", "mt_clusters", "mt_stability"]
    assert not set(columns) & set(attached.score_columns)
    for name in columns:
        there = {row["sample_id"] for row in rows(attached) if row[name] is not None}
        assert there == {row["sample_id"] for row in worst}
    known = [row for row in worst if row["sample_id"] in batch.sample_ids]
    part = batch.part([batch.sample_ids.index(row["sample_id"]) for row in known])
    found = MaskingTrajectory(num_pictures=4).open(encoders.victim, {}).score(part)
    assert known
    np.testing.assert_allclose([row["mt_stability"] for row in known], found["mt_stability"], rtol=1e-4)


@pytest.fixture(scope="module")
def rescored(attached, everything, shards) -> Manifest:
    return score(everything(shards.parent / "rescored", **rescoring(attached)))


def rescoring(attached: Manifest) -> dict:
    fitting = Fitting(num_samples=60, seed=3)
    return {
        "shards": [], "embeddings": str(attached.folder), "detectors": FITTED, "second_stage": None,
        "fitting": fitting, "calibration": None, "store_embeddings": False,
    }  # fmt: skip


def test_stored_embeddings_give_the_same_rows_and_the_same_scores_but_for_their_rounding(attached, rescored, by_hand):
    one, two = rows(attached), rows(rescored)
    for name in ("sample_id", "content_hash", "shard", "index", "error"):
        assert [row[name] for row in one] == [row[name] for row in two], name
    assert set(rescored.score_columns) < set(attached.score_columns)
    keys = [
        read_tensors(run.folder / "fitting" / "density.safetensors")["key"].tolist() for run in (attached, rescored)
    ]
    # The same samples were drawn to fit on; at the border of trimming, rounding decides.
    assert len({*keys[0]} ^ {*keys[1]}) <= 4
    judged = [i for i, row in enumerate(one) if row["error"] is None]
    _, batch = by_hand
    moved_B = (batch.embedding_BE.half().float() - batch.embedding_BE).norm(dim=1)
    difference = {name: max(abs(one[i][name] - two[i][name]) for i in judged) for name in rescored.score_columns}
    assert 0 < difference["k_distance"] < 3 * float(moved_B.max())  # a sample and its neighbour, both moved
    assert 0 < difference["clip_score"] < 2**-9
    assert 0 < difference["clip_score_reference"] < 2**-9
    assert rescored.info["decision"]["num_calibration"] == attached.info["decision"]["num_calibration"] == 30


def test_what_stored_embeddings_are_scored_is_what_detectors_score_of_them_by_hand(attached, rescored, by_hand):
    batch = restored(
        pa.concat_tables([read_parts(attached.folder / "scores", shard) for shard in attached.info["shards"]])
    )
    found = {row["sample_id"]: row for row in rows(rescored)}
    drawn = KeyedShare(SHARE, 3)
    clean = restored(read_parts(attached.folder / "calibration", "calibration-00001.tar"))
    pool = in_one_heap(
        *(one.part([i for i, name in enumerate(one.sample_ids) if drawn(name)]) for one in (batch, clean))
    )
    for detector in FITTED:
        scorer = open_scorer(detector, by_hand[0].victim, detector.fit(pool, None))
        for name, score_B in scorer.score(batch).items():
            there = [found[one][name] for one in batch.sample_ids]
            np.testing.assert_allclose(there, score_B, rtol=1e-5, atol=1e-6, err_msg=name)


def test_rescoring_refuses_what_the_embeddings_do_not_fit(attached, scored, everything, decoder_folder, tmp_path):
    def refused(message: str, **changed) -> None:
        with pytest.raises(Mistake, match=message):
            score(everything(tmp_path / "other", **{**rescoring(attached), **changed}))
        assert not (tmp_path / "other").exists()

    refused("image_statistics look at images, and stored embeddings have none", detectors=[ImageStatistics()])
    trajectory = SecondStage(detectors=[MaskingTrajectory()])
    refused("masking_trajectory look at images", second_stage=trajectory)
    refused("nothing to score: name `shards` to read, or `embeddings`", embeddings=None)
    refused("no record of a pass|record of a pass", embeddings=str(tmp_path / "absent"))
    few = tmp_path / "few"
    shutil.copytree(attached.folder, few)
    record = json.loads((few / "scores" / "pass.json").read_text())
    (few / "scores" / "pass.json").write_text(json.dumps({**record, "embeddings_kept": 0.25}))
    refused("keeps the embeddings of 25% of its samples only", embeddings=str(few))
    refused("embeddings of another reference encoder: None there", embeddings=str(scored.folder))
    path = everything(tmp_path / "other").victim.path
    refused("embeddings of another victim encoder", victim=OpenClipVictim(path=path, mean=[0.1, 0.1, 0.1]))
    other = OpenClipVictim(path=everything(tmp_path / "other").reference.path, mean=[0.1, 0.1, 0.1])
    refused("embeddings of another reference encoder", reference=other)


def test_detectors_that_compare_need_a_reference_and_those_of_one_kind_a_name(everything, tmp_path):
    def refused(message: str, **changed) -> None:
        with pytest.raises(Mistake, match=message):
            score(everything(tmp_path / "other", **changed))
        assert not (tmp_path / "other").exists()

    refused("name one that you trust as `reference`", reference=None)
    one, other = Consistency(forms=["closed"]), Consistency(forms=["overlap"])  # no column in common, one state file
    refused("two detectors of this run are called consistency; set `name` of one", detectors=[one, other])
    second = SecondStage(detectors=[Density(k=5)])
    refused("two detectors of this run are called density; set `name` of one", second_stage=second)


def test_embeddings_are_those_that_the_encoders_give(attached, by_hand):
    _, batch = by_hand
    stored = read_parts(attached.folder / "scores", "train-00000.tar")
    assert stored["sample_id"].to_pylist() == batch.sample_ids[:20]
    there = np.array(stored["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(there, batch.embedding_BE[:20].numpy(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("names", [("a", "z"), ("z", "a")])
def test_among_equal_scores_nobody_is_a_candidate_for_his_name(names):
    """The candidates of a tie are drawn: in the order of ids, corpus or calibration samples would be favoured."""
    ids = [f"{names[i % 2]}.tar/{i:04d}" for i in range(400)]
    table = pa.table({"sample_id": ids, "dao": [9.0] * 20 + [1.0] * 380, "pass": [i % 2 for i in range(400)]})
    found = highest(table, "dao", 120)
    assert {*ids[:20]} <= {*found["sample_id"].to_pylist()}
    assert 45 <= sum(found["pass"].to_pylist()) <= 75  # of 120, half of them; six standard deviations
    again = highest(table.take(list(range(399, -1, -1))), "dao", 120)
    assert {*again["sample_id"].to_pylist()} == {*found["sample_id"].to_pylist()}
