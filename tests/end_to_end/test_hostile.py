"""Hostile input, the cases of hostile.py, ends as documented: a row, a reason, a Mistake; nothing runs or swells."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hostile import FILES, LARGEST, SHARDS, Case, FileCase

from dede_ray.data.captions import read_classes
from dede_ray.data.images import decode_image
from dede_ray.data.passes import PassResources, run_pass
from dede_ray.data.shards import (
    REASONS,
    BadSample,
    Limits,
    Sample,
    Shard,
    ShardEnd,
    iter_samples,
    list_shards,
    open_shard,
    write_shard,
)
from dede_ray.evaluation.evaluate import evaluate
from dede_ray.models.clip import model_description
from dede_ray.models.decoder import load_decoder
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.models.weights import read_tensors
from dede_ray.runtime.config import Config, Mistake, claim, finish, load, write_json
from dede_ray.scan.manifest import Manifest, read_manifest, write_manifest
from dede_ray.scan.score import ScoreConfig, score
from dede_ray.training import dataloader
from dede_ray.training.clip import ClipTrain, _ClipRecipe

pytestmark = pytest.mark.filterwarnings("ignore")  # what Pillow says of such images would fill pages

LIMITS = Limits()
READABLE = [case for case in SHARDS if not case.is_refused]
LONGEST_S = 60  # for one case, on a slow and busy machine


def named(cases: list[Any]) -> dict[str, Any]:
    return {"argvalues": cases, "ids": [getattr(case, "kind", "shard") + "-" + case.name for case in cases]}


@pytest.fixture(autouse=True)
def nothing_runs():
    yield
    if hostile.SENTINEL.exists():
        hostile.SENTINEL.rmdir()
        pytest.fail("something of a hostile file was executed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All hostile shards that can be listed."""
    folder = tmp_path_factory.mktemp("hostile") / "shards"
    folder.mkdir()
    for case in READABLE:
        (folder / f"{case.name}.{case.suffix}").write_bytes(case.build())
    return folder


def shard_of(folder: Path, case: Case) -> Shard:
    [shard] = list_shards(str(folder / f"{case.name}.{case.suffix}"))
    return shard


def outcome(sample: Sample) -> str:
    try:
        if sample.error is None:
            assert sample.image is not None
            assert decode_image(sample.image, LIMITS, 32).shape == (32, 32, 3)
    except BadSample as bad:
        return bad.reason
    return sample.error or ", ".join(["scored", *sample.notes])


def as_expected(found: list[tuple[str, str]], case: Case) -> list[tuple[str, str]]:
    """What was found, with the expected outcome where any will do."""
    free = {key for key, expected in case.samples if not expected}
    return [(key, "" if key in free else how) for key, how in found]


# --- shards


def test_there_are_enough_cases_of_every_reason_that_a_shard_can_give():
    names = [case.name for case in SHARDS]
    assert len(names) == len(set(names)) >= 150
    given = {part for case in SHARDS for _, how in case.samples for part in how.split(", ")} - {"", "scored"}
    assert given == set(REASONS) - {"caption_missing", "not_finite", "process_died"}  # of training and victims


@pytest.mark.parametrize("case", **named(READABLE))
def test_a_hostile_shard_gives_these_samples_and_these_reasons_soon(folder, case):
    started, end = time.monotonic(), ShardEnd()
    with open_shard(shard_of(folder, case)) as stream:
        found = [(sample.key, outcome(sample)) for sample in iter_samples(stream, LIMITS, end=end)]
    assert as_expected(found, case) == [*case.samples]
    assert {part for _, how in found for part in how.split(", ")} <= {*REASONS, "scored"}
    assert (end.num_samples, end.is_complete) == (len(found), case.is_complete)
    assert time.monotonic() - started < LONGEST_S


@pytest.mark.parametrize("case", **named([case for case in SHARDS if case.is_refused]))
def test_a_file_that_is_no_shard_is_named_in_a_mistake(tmp_path, case):
    (tmp_path / f"{case.name}.{case.suffix}").write_bytes(case.build())
    with pytest.raises(Mistake, match=rf"1 shards (cannot be read as tar:\n|are empty).*{case.name}"):
        list_shards(str(tmp_path))


def test_jobs_that_copy_samples_keep_no_more_of_one_than_the_largest_member(tmp_path):
    members = [("k.png", hostile.PNG), *[(f"k.{i}", bytes(1000)) for i in range(50)], ("m.png", hostile.PNG)]
    (tmp_path / "s.tar").write_bytes(hostile.tar(*members))
    with open(tmp_path / "s.tar", "rb") as stream:
        one, other = iter_samples(stream, Limits(max_member_bytes=20_000), keep_others=True)
    assert (one.error, other.error) == ("member_too_large", None)
    assert sum(map(len, one.others.values())) < 20_000


# --- memory


def _peak_bytes() -> int:
    """Of this process; unlike `getrusage`, not of the one it was started from."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _decode_all(images: dict[str, bytes], limits: Limits) -> dict[str, tuple[int, str]]:
    """Decode at full size and say by how much each raised the process's peak; in a process of its own."""
    found = {}
    for name, content in images.items():
        before = _peak_bytes()
        try:
            how = str(decode_image(content, limits).shape)
        except BadSample as bad:
            how = bad.reason
        found[name] = (_peak_bytes() - before, how)
    return found


def test_an_image_takes_no_more_memory_than_its_pixels_allow_whatever_is_in_the_file():
    side = 3000
    limits = Limits(max_pixels=side * side)
    images = {name: build() for name, (_, build, _) in hostile.IMAGES.items()}
    images |= {f"largest_{name}": build(side) for name, build in LARGEST.items()}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before = pool.apply(_peak_bytes)
        found = pool.apply(_decode_all, (images, limits))
        after = pool.apply(_peak_bytes)
    assert {how for name, (_, how) in found.items() if name.startswith("largest")} == {"(3000, 3000, 3)"}
    assert after - before < 32 * limits.max_pixels + 512 * 2**20, sorted((b, n) for n, (b, _) in found.items())[-3:]


def _read_all(paths: list[Path]) -> int:
    """Read without keeping anything; the peak, in bytes."""
    for path in paths:
        with open(path, "rb") as stream:
            for _ in iter_samples(stream, LIMITS):
                pass
    return _peak_bytes()


def test_reading_takes_no_more_memory_than_two_members_whatever_is_in_the_tars(folder):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before = pool.apply(_peak_bytes)
        after = pool.apply(_read_all, (sorted(folder.iterdir()),))
    assert after - before < 2 * LIMITS.max_member_bytes + 64 * 2**20


# --- scoring


@pytest.fixture(scope="module")
def score_job(folder, victim_folder, decoder_folder):
    """Run the scoring job on a folder of shards, as a person would."""

    def run(shards: Path, output: str, **more: Any) -> subprocess.CompletedProcess:
        settings = {
            "shards": str(shards), "output": output, "victim": {"path": str(victim_folder)},
            "detectors": [{"kind": "dede", "decoder": str(decoder_folder)}, {"kind": "image_statistics"}],
            "decision": {"kind": "assumed_rate", "rate": 0.1}, "chunk_size": 4,
            "resources": {"min_actors": 1, "cpus_per_actor": 0.5, "decode_cpus": 0.5}, **more,
        }  # fmt: skip
        path = folder.parent / f"{output}.yaml"
        path.write_text(yaml.safe_dump(settings))
        job = Path(__file__).parents[2] / "jobs" / "score.py"
        return subprocess.run([sys.executable, job, path], cwd=folder.parent, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def cases(request) -> list[Case]:
    """Every tenth case, so that the default tests are quick; or all of them."""
    return READABLE if request.param == "all" else READABLE[::10]


@pytest.fixture(scope="module")
def scored(folder, cases, score_job) -> Manifest:
    shards, output = folder.parent / f"{len(cases)}_shards", f"{len(cases)}_scores"
    shards.mkdir()
    for case in cases:
        name = f"{case.name}.{case.suffix}"
        (shards / name).hardlink_to(folder / name)
    job = score_job(shards, output, max_error_fraction=1)
    assert job.returncode == 0, job.stderr
    assert f"{sum(not case.is_complete for case in cases)} shards end early" in job.stdout
    return read_manifest(folder.parent / output)


def test_hostile_shards_are_scored_in_one_run_and_every_sample_has_its_row(scored, cases):
    rows: dict[str, list[tuple[str, str]]] = {f"{case.name}.{case.suffix}": [] for case in cases}
    for row in sorted(scored.table.to_pylist(), key=lambda row: (row["shard"], row["index"])):
        key = row["sample_id"].removeprefix(row["shard"] + "/")
        rows[row["shard"]].append((key, row["error"] or ", ".join(["scored", *(row["notes"] or ())])))
        has_score = [row[name] is not None for name in scored.score_columns]
        assert has_score == [row["error"] is None] * len(has_score)
        assert row["error"] is None or row["flagged"] is False
    for case in cases:
        assert as_expected(rows[f"{case.name}.{case.suffix}"], case) == [*case.samples], case.name
    ids = scored.table["sample_id"].to_pylist()
    assert len(ids) == len(set(ids))
    cut = [f"{case.name}.{case.suffix}" for case in cases if not case.is_complete]
    assert sorted(scored.info["counts"]["truncated_shards"]) == sorted(cut)


def test_good_samples_score_the_same_with_hostile_neighbours_as_alone(scored, local_ray, tmp_path):
    numbers = {"before": 1, "after": 2}
    samples = [Sample(key, 0, hostile.good(key, number)[0][1], "png") for key, number in numbers.items()]
    write_shard(tmp_path / "alone" / "a.tar", samples)
    settings = {**scored.settings, "shards": str(tmp_path / "alone"), "output": str(tmp_path / "scores")}
    manifest = score(ScoreConfig.model_validate({**settings, "resources": PASS["resources"]}))
    alone = {row["sample_id"]: row for row in manifest.table.to_pylist()}
    rows = [row for row in scored.table.to_pylist() if row["sample_id"].split("/", 1)[1] in numbers]
    rows = [row for row in rows if row["error"] is None]
    assert len(rows) > len(scored.info["shards"])
    for row in rows:  # at this mask ratio the decoder sees no patch, so scores do not depend on the id
        expected = alone["a.tar/" + row["sample_id"].split("/", 1)[1]]
        for name in {*scored.score_columns} - {"dede_reverse"}:  # which looks through masks drawn by the id
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), row["sample_id"]


def test_too_many_bad_samples_end_the_job_with_their_reasons(scored):
    settings = {**scored.settings, "output": str(scored.folder), "max_error_fraction": 0.05}
    config = ScoreConfig.model_validate(settings)
    with pytest.raises(
        Mistake, match=r"samples cannot be used \(.*image_unreadable \d+.*more than max_error_fraction 0.05"
    ):
        score(config)


class NotANumber:
    """Work that computes nothing of dark images."""

    image_size = 32

    def __init__(self) -> None:
        self.columns = {"brightness": pa.float32(), "vector": pa.list_(pa.float32(), 2)}

    def __call__(self, chunk: Any) -> dict[str, Any]:
        mean = chunk.image_BHWC.mean(axis=(1, 2, 3))
        vector = np.stack([mean, np.where(mean == 9, np.inf, mean)], axis=1)
        return {"brightness": np.where(mean == 0, np.nan, mean), "vector": [*vector.astype(np.float32)]}


PASS: dict[str, Any] = {
    "image_size": 32, "made_with": {}, "chunk_size": 4, "limits": LIMITS, "max_error_fraction": 1, "name": "test",
    "resources": PassResources(min_actors=1, cpus_per_actor=0.5, decode_cpus=0.5),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(local_ray, tmp_path_factory) -> Path:
    """A finished pass over a shard of four images: dark, grey, of a brightness that gives infinity, and light."""
    folder = tmp_path_factory.mktemp("pass")
    image = [hostile.encode_image(np.full((32, 32, 3), level, np.uint8), "png") for level in (0, 5, 9, 200)]
    write_shard(folder / "a.tar", [Sample(f"k{i}", i, image[i], "png") for i in range(4)])
    run_pass(list_shards(str(folder / "a.tar")), folder / "pass", NotANumber, {}, **PASS)
    return folder


def test_a_sample_of_which_no_number_is_computed_is_an_error_and_not_a_sample_that_is_never_flagged(finished):
    rows = pq.read_table(finished / "pass" / "parts" / "a.tar" / "000000.parquet").to_pylist()
    assert [row["error"] for row in rows] == ["not_finite", None, "not_finite", None]
    assert [row["brightness"] for row in rows] == [None, 5, None, 200]
    assert [row["vector"] for row in rows] == [None, [5, 5], None, [200, 200]]


# --- training


def test_training_finds_the_same_samples_in_hostile_shards_from_any_chunk(folder, clip_config):
    section = ClipTrain(model=str(clip_config), shards="")
    recipe = _ClipRecipe(section, model_description(section.model), LIMITS, 0, 1, 1.0, None)
    for case in READABLE:
        shard = shard_of(folder, case)
        with open_shard(shard) as stream:
            whole = [(sample.key, outcome(sample)) for sample in iter_samples(stream, LIMITS)]
        if case.name.startswith("gzip"):
            with pytest.raises(Mistake, match="is compressed"):
                dataloader._index_one(shard, 2)
            continue
        refs = dataloader._index_one(shard, 2)
        assert sum(ref.num_samples for ref in refs) == len(whole), case.name
        found: list[str] = []
        for ref in refs:
            samples = dataloader.read_samples(ref, 0, ref.num_samples, LIMITS)
            columns, errors = recipe.decode(ref, 0, 0, samples)
            assert len(columns["image"]) == errors.count(None)
            found += [error or "scored" for error in errors]
        # A key that came before is not known from the middle of a shard, and a caption is needed here.
        for (key, expected), got in zip(whole, found, strict=True):
            how, *notes = expected.split(", ")
            without_caption = {"caption_missing", *({"caption_unreadable"} & {*notes})}
            assert got in {how, *without_caption} or how == "duplicate_key", (case.name, key)


# --- other files


class RunSettings(Config):
    output: str


@pytest.fixture(scope="module")
def models(tmp_path_factory, victim_folder, decoder_folder, finished, world) -> Path:
    """A good folder of each kind."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "checkpoint").mkdir()
    shutil.copytree(victim_folder, folder / "victim")
    shutil.copytree(decoder_folder, folder / "decoder")
    shutil.copytree(finished / "pass", folder / "pass")
    row = {"sample_id": ["a.tar/k"], "dede": pa.array([1.0], pa.float32()), "flagged": [True]}
    table = pa.table({**row, "error": pa.array([None], pa.string())})
    about = {"settings": {}, "victim": {"path": "", "fingerprint": ""}, "decision": {}, "score_columns": ["dede"]}
    write_manifest(folder / "manifest", [("a.tar", table)], about)
    write_json(folder / "classes" / "classes.json", {"names": ["cat"], "templates": ["a {}"]})
    finish(folder / "run", RunSettings(output="x"), {})
    write_json(folder / "config" / "run.yaml", {"output": "x"})
    (folder / "truth").mkdir()
    shutil.copy(world / "truth.parquet", folder / "truth")
    return folder


def use(kind: str, folder: Path, finished: Path, world: Path) -> None:
    """Open a folder of this kind as our jobs do."""
    if kind == "checkpoint":
        read_tensors(min(folder.iterdir()))
    elif kind == "victim":
        load_victim(OpenClipVictim(path=str(folder)))
    elif kind == "decoder":
        load_decoder(folder)
    elif kind == "manifest":
        assert read_manifest(folder).table.num_rows == 1
    elif kind == "pass":
        run_pass(list_shards(str(finished / "a.tar")), folder, NotANumber, {}, **PASS)
    elif kind == "classes":
        read_classes([Shard("a.tar", str(folder / "a.tar"), 0)])
    elif kind == "config":
        load(RunSettings, [str(folder / "run.yaml")])
    elif kind == "run":
        claim(folder, RunSettings(output="x"))
    else:
        import evaluation

        evaluate(evaluation.config(world, truth=folder / "truth.parquet", output=folder / "report"))


@pytest.mark.parametrize("kind", sorted({case.kind for case in FILES} - {"checkpoint", "truth"}))
def test_the_good_file_from_which_hostile_ones_are_made_is_accepted(models, finished, world, kind):
    use(kind, models / kind, finished, world)


@pytest.mark.parametrize("case", **named(FILES))
def test_a_hostile_file_is_a_mistake(models, finished, world, tmp_path, case: FileCase):
    shutil.copytree(models / case.kind, tmp_path / "there")
    case.tamper(tmp_path / "there")
    started, before = time.monotonic(), _peak_bytes()
    with pytest.raises(Mistake) as mistake:
        use(case.kind, tmp_path / "there", finished, world)
    assert len(str(mistake.value)) < 5000
    assert time.monotonic() - started < LONGEST_S
    assert _peak_bytes() - before < 512 * 2**20
    json.dumps(str(mistake.value)).encode()
