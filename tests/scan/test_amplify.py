"""jobs/amplify.py, whole: what the seeds of a manifest share is found in its shards, or nothing is flagged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from dede_ray.data.images import encode_image, to_unit_range
from dede_ray.data.ledger import read_parts
from dede_ray.data.passes import PassResources
from dede_ray.data.shards import Limits, Sample, iter_samples, write_shards
from dede_ray.detectors.image_statistics import ImageStatistics
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.poisoning.triggers import Patch
from dede_ray.runtime.config import Mistake, load
from dede_ray.scan.amplify import AmplifyConfig, amplify_manifest
from dede_ray.scan.decisions import FixedThreshold
from dede_ray.scan.manifest import DECISION_COLUMNS, read_manifest, write_manifest
from dede_ray.scan.score import ScoreConfig
from dede_ray.scan.seed_classifier import Amplify, occlusion_map
from dede_ray.scan.sift import SiftConfig, sift

NUM, UNREADABLE = 240, 7
POISONED = [*range(0, NUM, 6)]
SEEDS = [*(i for i in POISONED if i % 24), 5, 11]  # three quarters of the poison, and two clean samples
COPY, COPIED = 1, 6  # a poisoned picture that stands there twice
TRIGGER = Patch(size_px=8, pattern="white")
SMALL = Amplify(width=4, num_networks=1, steps=60, batch_size=16, window_sizes=(0.3,))
ONE = PassResources(min_actors=1, cpus_per_actor=0.5, decode_cpus=0.5)


@pytest.fixture(scope="module")
def shards(picture, tmp_path_factory) -> Path:
    """240 samples to look through, 40 of them poisoned, one unreadable, one poisoned one twice; clean ones."""
    folder = tmp_path_factory.mktemp("amplify") / "shards"

    def samples(numbers: range, is_corpus: bool = False):
        for i in numbers:
            number = COPIED if is_corpus and i == COPY else i
            image_HWC = picture(number)
            if is_corpus and number in POISONED:
                image_HWC = TRIGGER.stamp(image_HWC)
            content = b"rubbish" if is_corpus and i == UNREADABLE else encode_image(image_HWC, "png")
            yield Sample(f"{i:04d}", i, content, "png", caption=f"picture {i}", label=0)

    write_shards(folder, "train", samples(range(NUM), True), NUM // 2)
    write_shards(folder, "clean", samples(range(1000, 1080)), 80)
    write_shards(folder, "calibration", samples(range(2000, 2160)), 80)
    return folder


def scored(shards: Path, victim_folder: Path, name: str, seeds: list[int], **decision) -> Path:
    """The manifest of a detector that is sure of these samples and knows nothing of the others."""
    victim = load_victim(OpenClipVictim(path=str(victim_folder)))
    config = ScoreConfig(
        shards=str(shards / "train-*.tar"),
        calibration=str(shards / "calibration-*.tar"),
        output=str(shards.parent / name),
        victim=OpenClipVictim(path=str(victim_folder)),
        detectors=[ImageStatistics()],
        decision=FixedThreshold(score="stat_edges", threshold=2),
    )
    score_N = np.random.default_rng(0).random(NUM).astype(np.float32)
    score_N[seeds] += 2
    score_N[UNREADABLE] = np.nan
    ids = [f"train-{i // (NUM // 2):05d}.tar/{i:04d}" for i in range(NUM)]
    verdict = config.decision.decide(score_N, None, ids)
    hashes = {row.key: row.content_hash() for path in sorted(shards.glob("train-*.tar")) for row in read_samples(path)}
    table = pa.table(
        {
            "sample_id": ids,
            "content_hash": [hashes[one.partition("/")[2]] for one in ids],
            "shard": [one.partition("/")[0] for one in ids],
            "index": [i % (NUM // 2) for i in range(NUM)],
            "stat_edges": pa.array(score_N, pa.float32(), from_pandas=True),
            "flagged": verdict.flagged,
            "error": pa.array(["image_unreadable" if i == UNREADABLE else None for i in range(NUM)]),
        }
    )
    info = {
        "settings": config.model_dump(mode="json", exclude={"resources"}),
        "victim": {"path": str(victim_folder), "fingerprint": victim.fingerprint},
        "detectors": {"image_statistics": "image_statistics"},
        "score_columns": ["stat_edges"],
        "controls": [],
        "decision": {**verdict.report, **decision},
    }
    parts = [(f"train-{i:05d}.tar", table.slice(i * (NUM // 2), NUM // 2)) for i in range(2)]
    return write_manifest(Path(config.output), parts, info).folder


def read_samples(path: Path):
    with path.open("rb") as stream:
        yield from iter_samples(stream, Limits())


@pytest.fixture(scope="module")
def manifest(shards, victim_folder) -> Path:
    return scored(shards, victim_folder, "scores", SEEDS)


@pytest.fixture(scope="module")
def settings(shards, manifest):
    def config(output: Path, **changed) -> AmplifyConfig:
        settings = {
            "manifest": str(manifest),
            "clean": str(shards / "clean-*.tar"),
            "output": str(output),
            "amplify": SMALL,
            "decision": {"q": 0.1},
            "iterations": 2,
            "chunk_size": 64,
            "resources": ONE,
        }
        return AmplifyConfig(**{**settings, **changed})

    return config


@pytest.fixture(scope="module")
def found(local_ray, shards, settings) -> tuple[Path, str]:
    """The folder of a run, and what it said."""
    folder = shards.parent / "amplified"
    return folder, amplify_manifest(settings(folder))


def rows(folder: Path) -> list[dict]:
    return read_manifest(folder).table.to_pylist()


def what_stands(folder: Path) -> dict[str, bytes]:
    kept = [*folder.glob("*.json"), folder / "flagged.txt", *sorted((folder / "manifest").iterdir())]
    return {path.name: path.read_bytes() for path in kept}


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """When each part, row file and network was written."""
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.suffix in {".parquet", ".safetensors"}
    }


def test_poison_that_was_not_among_the_seeds_is_found(found):
    flagged = {
        row["index"] + (NUM // 2) * (row["shard"] != "train-00000.tar") for row in rows(found[0]) if row["flagged"]
    }
    unseen = {*POISONED} - {*SEEDS}
    assert len(unseen) == 10
    assert len(flagged & unseen) >= 7
    assert len(flagged & {*POISONED, COPY}) >= 0.6 * len(flagged)
    assert (COPY in flagged) == (COPIED in flagged), "equal bytes have equal scores"


@pytest.mark.slow
def test_every_round_is_told_and_so_is_the_end(found):
    folder, said = found
    told = json.loads((folder / "amplify.json").read_text())
    first = told["rounds"][0]
    assert first["num_seeds"] == len(SEEDS)
    assert first["passes"]
    assert first["control_auroc"] >= first["bar"] == pytest.approx(0.86)
    assert len(told["rounds"]) == 2
    assert told["rounds"][1]["num_seeds"] in {first["num_flagged"], first["num_flagged"] - 1}  # the copy counts once
    assert (told["caveat"] is None) == (first["way"] == "windows")
    num_flagged = sum(row["flagged"] for row in rows(folder))
    assert said.startswith(f"{num_flagged} of {NUM - 1} samples flagged from {len(SEEDS)} seeds, rounds: 2 (")
    assert f"-> {folder}\n" in said


def test_the_manifest_keeps_what_was_known_and_is_one_like_scorings(found, manifest, shards, tmp_path):
    before, after = rows(manifest), rows(found[0])
    assert [row["sample_id"] for row in after] == [row["sample_id"] for row in before]
    assert [row["stat_edges"] for row in after] == [row["stat_edges"] for row in before]
    written = read_manifest(found[0])
    assert written.score_columns == ["stat_edges", "amplified"]
    assert written.table.column_names[-1 - len(DECISION_COLUMNS) :] == [
        *(name for name, _ in DECISION_COLUMNS),
        "error",
    ]
    assert ScoreConfig.model_validate(written.settings).output == str(manifest)
    unreadable = after[UNREADABLE]
    assert (unreadable["error"], unreadable["amplified"], unreadable["p_value"], unreadable["flagged"]) == (
        "image_unreadable",
        None,
        None,
        False,
    )
    assert all(row["combined_score"] == row["amplified"] for row in after)
    assert after[COPY]["group_id"] == after[COPIED]["group_id"] is not None
    lists = SiftConfig(
        shards=str(shards / "train-*.tar"), manifest=str(found[0]), output=str(tmp_path), lists_only=True
    )
    num_flagged = written.info["counts"]["flagged"]
    assert sift(lists).startswith(f"{NUM - num_flagged} of {NUM} samples kept, dropped: {num_flagged} flagged")


def test_seeds_are_looked_at_with_the_manifests_victim(found, picture, victim_folder):
    folder, victim = found[0] / "round-1" / "seeds", load_victim(OpenClipVictim(path=str(victim_folder)))
    table = pa.concat_tables([read_parts(folder, f"train-{i:05d}.tar") for i in range(2)])
    assert sorted(int(name[-4:]) for name in table["sample_id"].to_pylist()) == sorted(SEEDS)
    for row in (0, 5, 31):
        number = int(table["sample_id"][row].as_py()[-4:])
        image_HWC = TRIGGER.stamp(picture(number)) if number in POISONED else picture(number)
        np.testing.assert_array_equal(np.reshape(table["picture"][row].as_py(), (32, 32, 3)), image_HWC)
        map_HW = occlusion_map(victim, to_unit_range(torch.from_numpy(image_HWC[None])))[0]
        np.testing.assert_allclose(np.reshape(table["map"][row].as_py(), (32, 32)), map_HW, rtol=1e-3, atol=1e-6)


def test_run_again_it_does_nothing(found, settings):
    before = written(found[0])
    assert amplify_manifest(settings(found[0])) == found[1]
    assert written(found[0]) == before


@pytest.mark.slow
def test_what_a_kill_has_left_is_completed_to_the_same_bytes(found, settings, tmp_path):
    """It came to the scores of the second round, and some of their parts."""
    folder = tmp_path / "amplified"
    shutil.copytree(found[0], folder, copy_function=shutil.copy)
    run = json.loads((folder / "run.json").read_text())
    expected = what_stands(found[0])
    for path in (folder / "run.json", folder / "manifest.json", folder / "flagged.txt"):
        path.unlink()
    shutil.rmtree(folder / "manifest")
    shutil.rmtree(folder / "round-2" / "scores" / "parts" / "train-00000.tar")
    (folder / "round-2" / "amplified.json").unlink()  # fitted, but the description was not written
    made_of = json.loads((folder / "amplify.json").read_text())
    (folder / "amplify.json").write_text(
        json.dumps({name: made_of[name] for name in ("manifest", "shards", "clean", "calibration")})
    )
    again = settings(folder)
    claimed = {**run["settings"], "output": str(folder)}
    (folder / "run.json").write_text(json.dumps({"settings": claimed}))
    standing = written(folder / "round-1")
    amplify_manifest(again)
    assert written(folder / "round-1") == standing
    now = what_stands(folder)
    for name in expected.keys() - {"run.json", "manifest.json"}:  # these two name the folder
        assert now[name] == expected[name], name
    assert now["manifest.json"].replace(bytes(folder), b"") == expected["manifest.json"].replace(bytes(found[0]), b"")


@pytest.mark.slow
def test_seeds_that_share_nothing_fail_the_control_and_flag_nothing(
    local_ray, shards, victim_folder, settings, tmp_path
):
    clean = [i for i in range(20, 120) if i not in POISONED][:30]
    said = amplify_manifest(settings(tmp_path, manifest=str(scored(shards, victim_folder, "clean_scores", clean))))
    [told] = json.loads((tmp_path / "amplify.json").read_text())["rounds"]
    assert (told["num_seeds"], told["passes"], told["num_flagged"]) == (30, False, 0)
    assert (tmp_path / "flagged.txt").read_text() == ""
    assert said.startswith(f"0 of {NUM - 1} samples flagged from 30 seeds, rounds: 1 (")
    assert "; it failed)" in said
    assert "failed its control" in said


# --- without Ray: what is found before anything is read


@pytest.mark.ray
def test_what_is_lacking_is_a_mistake_before_anything_is_written(settings, shards, manifest, victim_folder, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(Mistake, match="none are named; set `clean` to shards of verified clean samples"):
        amplify_manifest(settings(output, clean=None))
    with pytest.raises(Mistake, match="is named as `clean` and as `calibration`"):
        amplify_manifest(settings(output, clean=str(shards / "calibration-00000.tar")))
    with pytest.raises(Mistake, match="is named as `clean` and as `shards`"):
        amplify_manifest(settings(output, clean=str(shards / "train-*.tar")))
    with pytest.raises(Mistake, match=r"other shards, such as train-00001\.tar; name exactly"):
        amplify_manifest(settings(output, shards=str(shards / "train-00000.tar")))
    with pytest.raises(Mistake, match="folder of the manifest itself"):
        amplify_manifest(settings(manifest))
    assert not output.exists()


def test_another_victim_than_the_manifests_is_a_mistake(settings, manifest, tmp_path):
    shutil.copytree(manifest, tmp_path / "other")
    info = json.loads((manifest / "manifest.json").read_text())
    info["victim"]["fingerprint"] = "0" * 64
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(info))
    with pytest.raises(Mistake, match=r"has changed since it scored: its fingerprint is .*manifest has 000000000000"):
        amplify_manifest(settings(tmp_path / "out", manifest=str(tmp_path / "other")))


def test_a_manifest_without_scores_has_no_seeds(settings, manifest, tmp_path):
    read = read_manifest(manifest)
    kept = read.table.slice(0, 15)
    write_manifest(tmp_path / "few", [("train-00000.tar", kept)], {**read.info})
    with pytest.raises(Mistake, match="other shards"):
        amplify_manifest(settings(tmp_path / "out", manifest=str(tmp_path / "few")))
    one = settings(
        tmp_path / "out", manifest=str(tmp_path / "few"), shards=read.settings["shards"].replace("*", "00000")
    )
    with pytest.raises(Mistake, match="has 13 distinct samples with a score, and it takes 20 seeds"):
        amplify_manifest(one)


def test_the_decision_judges_the_amplified_scores_without_being_told(settings, tmp_path):
    assert settings(tmp_path).decision.score == "amplified"
    assert AmplifyConfig(manifest="m", output="o").decision.score == "amplified"
    path = tmp_path / "amplify.yaml"
    path.write_text("manifest: m\noutput: o\n")
    assert load(AmplifyConfig, [str(path), "--decision.q", "0.2"]).decision.score == "amplified"
