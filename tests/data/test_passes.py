"""Passes: one row per sample, nothing done twice, nothing lost, whatever dies."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from passes import RESOURCES, Brightness, run, snapshot
from ray._private.internal_api import memory_summary

from dede_ray.data.images import decode_image, encode_image
from dede_ray.data.ledger import Chosen, KeyedShare, PassSummary, part_path, read_parts, shards_of_pass
from dede_ray.data.passes import PassResources, run_over_parts, run_pass, stage_shares
from dede_ray.data.shards import Limits, list_shards
from dede_ray.data.workers import Worker
from dede_ray.runtime.config import Mistake


@pytest.fixture(scope="module")
def shards(write_pictures, tmp_path_factory) -> Path:
    """22 samples in shards of 10, 10 and 2."""
    folder = tmp_path_factory.mktemp("pass") / "shards"
    write_pictures(folder, range(22), per_shard=10)
    return folder


@pytest.fixture(scope="module")
def finished(local_ray, shards) -> Path:
    run(shards, shards.parent / "finished")
    return shards.parent / "finished"


@pytest.fixture(scope="module")
def odd(local_ray, write_tar_in, png, tmp_path_factory) -> tuple[Path, PassSummary]:
    """A finished pass over one shard with every fault, one that is cut, and one without a sample."""
    folder = tmp_path_factory.mktemp("odd")
    good = [(f"{i:02d}.png", png(i)) for i in range(9)]
    bad = [("no.txt", b"words"), ("rubbish.png", b"rubbish"), ("cut.png", png(0)[:-40]), ("01.txt", b"stray")]
    sizes = [("wide.png", png(0, 40, 60)), ("small.png", png(1, 9, 9))]
    write_tar_in(folder / "shards" / "bad.tar", [*good[:2], *bad[:2], *good[2:], *bad[2:], *sizes])
    cut = write_tar_in(folder / "shards" / "cut.tar", good)
    content = cut.read_bytes()
    cut.write_bytes(content[: content.index(b"04.png") + 700])
    with tarfile.open(folder / "shards" / "empty.tar", "w") as tar:
        member = tarfile.TarInfo("folder")
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
    return folder / "pass", run(folder / "shards", folder / "pass")


def test_every_sample_has_one_row_in_the_order_of_its_shard(odd, picture):
    rows = read_parts(odd[0], "bad.tar").to_pylist()
    keys = ["00", "01", "no", "rubbish", "02", "03", "04", "05", "06", "07", "08", "cut", "01#12", "wide", "small"]
    assert [row["sample_id"] for row in rows] == [f"bad.tar/{key}" for key in keys]
    assert [row["index"] for row in rows] == list(range(15))
    for key, row in zip(keys, rows, strict=True):
        assert row["shard"] == "bad.tar"
        if key.isdigit():
            assert row["brightness"] == pytest.approx(picture(int(key)).mean(), rel=1e-6)


def test_what_cannot_be_used_is_a_row_with_a_reason_and_counted(odd):
    folder, summary = odd
    rows = read_parts(folder, "bad.tar").to_pylist()
    errors = {row["sample_id"].split("/")[1]: row["error"] for row in rows if row["error"]}
    assert errors == {
        "no": "no_image", "rubbish": "image_unreadable", "cut": "image_truncated", "01#12": "duplicate_key"
    }  # fmt: skip
    assert {row["brightness"] is None for row in rows if row["error"]} == {True}
    assert summary.num_samples == 15 + 5 + 0
    assert summary.errors == dict.fromkeys(sorted([*errors.values(), "shard_truncated"]), 1)


def test_images_of_other_sizes_reach_the_work_as_squares_of_its_size(odd, png):
    squares = [decode_image(png(0, 40, 60), Limits(), 32), decode_image(png(1, 9, 9), Limits(), 32)]
    brightness = read_parts(odd[0], "bad.tar")["brightness"].to_pylist()[-2:]
    np.testing.assert_allclose(brightness, [square.mean() for square in squares], rtol=1e-6)


def test_a_cut_shard_is_read_up_to_the_cut_and_named(odd):
    folder, summary = odd
    assert summary.truncated_shards == ["cut.tar"]
    assert read_parts(folder, "cut.tar")["error"].to_pylist() == [None] * 4 + ["shard_truncated"]


def test_a_shard_without_a_sample_has_no_rows(odd):
    rows = read_parts(odd[0], "empty.tar")
    assert (len(rows), rows.schema) == (0, read_parts(odd[0], "bad.tar").schema)


def test_a_finished_pass_has_nothing_left_to_do(finished, shards):
    before = snapshot(finished)
    assert len(before) == 3 + 3 + 1 + 3  # parts of three shards, three end markers
    assert run(shards, finished) == PassSummary(22, {}, [])
    assert snapshot(finished) == before


def test_finished_chunks_are_kept_and_missing_ones_are_done(finished, shards, tmp_path):
    whole, folder = snapshot(finished), tmp_path / "pass"
    shutil.copytree(finished, folder)
    part_path(folder, "train-00000.tar", 1).unlink()  # a hole, with the end marker in place
    shutil.rmtree(folder / "parts" / "train-00001.tar")  # a shard never begun
    (folder / "parts" / "train-00002.tar" / "end.json").unlink()  # killed before the end was known
    part_path(folder, "train-00000.tar", 0).with_name(".000001.parquet.123.tmp").write_bytes(b"half a part")
    before = snapshot(folder)
    assert run(shards, folder) == PassSummary(22, {}, [])
    after = snapshot(folder)
    assert {name: part[2] for name, part in after.items()} == {name: part[2] for name, part in whole.items()}
    parts = [name for name in before if name.endswith(".parquet")]
    assert len(parts) == 2 + 0 + 1
    assert {name: after[name] for name in parts} == {name: before[name] for name in parts}


def test_rows_do_not_depend_on_chunks_actors_or_how_shards_are_named(finished, shards, tmp_path):
    two = PassResources(min_actors=2, max_actors=2, cpus_per_actor=0.5, decode_cpus=0.5)
    backwards = list_shards([str(path) for path in sorted(shards.glob("*.tar"), reverse=True)])
    run_pass(
        backwards, tmp_path / "other", Brightness, {}, image_size=32, made_with={}, chunk_size=3, limits=Limits(),
        resources=two, max_error_fraction=0, name="test",
    )  # fmt: skip
    for shard in backwards:
        assert read_parts(tmp_path / "other", shard.name).equals(read_parts(finished, shard.name))


def test_an_actor_that_dies_is_replaced_and_its_chunk_done(finished, shards, tmp_path):
    run(shards, tmp_path / "pass", {"die_once_at": str(tmp_path / "died")})
    assert (tmp_path / "died").exists()
    one, other = ({name: part[2] for name, part in snapshot(f).items()} for f in (tmp_path / "pass", finished))
    assert one == other


def test_what_is_wrong_in_a_worker_is_raised_as_it_is(local_ray, shards, tmp_path):
    with pytest.raises(TypeError, match="colour"):
        run(shards, tmp_path / "pass", {"colour": "red"})
    (tmp_path / "shards").mkdir()
    shutil.copy(shards / "train-00000.tar", tmp_path / "shards")
    listed = list_shards(str(tmp_path / "shards"))
    (tmp_path / "shards" / "train-00000.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00000\.tar"):
        run_pass(
            listed, tmp_path / "other", Brightness, {}, image_size=32, made_with={}, chunk_size=4, limits=Limits(),
            resources=RESOURCES, max_error_fraction=0, name="test",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"made_with": {"victim": "another"}}, "victim: 'one' there, 'another' now"),
        ({"chunk_size": 5}, "chunk_size: 4 there, 5 now"),
        ({"limits": Limits(max_pixels=7)}, "limits: .*'max_pixels': 7"),
    ],
)
def test_a_pass_with_other_settings_may_not_continue_and_hears_which(finished, shards, changed, named):
    before = snapshot(finished)
    with pytest.raises(Mistake, match=named):
        run(shards, finished, **changed)
    assert snapshot(finished) == before


def test_other_shards_of_the_same_names_are_not_taken_for_done(finished, shards, write_pictures, tmp_path):
    write_pictures(tmp_path / "others", range(100, 122), per_shard=10)
    with pytest.raises(Mistake, match=r"train-00000\.tar"):
        run(tmp_path / "others", finished)


def test_further_shards_can_join_a_pass(finished, shards, write_pictures, tmp_path):
    shutil.copytree(finished, tmp_path / "pass")
    before = snapshot(tmp_path / "pass")
    write_pictures(shards.parent / "more", range(30, 33), "extra")
    both = list_shards([str(shards), str(shards.parent / "more")])
    summary = run_pass(
        both, tmp_path / "pass", Brightness, {}, image_size=32, made_with={"victim": "one"}, chunk_size=4,
        limits=Limits(), resources=RESOURCES, max_error_fraction=0, name="test",
    )  # fmt: skip
    assert summary.num_samples == 25
    assert snapshot(tmp_path / "pass").items() >= before.items()


@pytest.mark.parametrize("num_samples", [8, 1500])  # judged at the end, and on the way
def test_a_pass_that_reads_rubbish_stops_and_says_what_it_read(local_ray, write_tar, png, tmp_path, num_samples):
    members = [(f"{i:04d}.png", b"rubbish" if i % 4 == 0 else png(i % 7)) for i in range(num_samples)]
    write_tar("shards/a.tar", members)
    with pytest.raises(Mistake, match=r"image_unreadable \d+.*max_error_fraction 0.2"):
        run(tmp_path / "shards", tmp_path / "pass", max_error_fraction=0.2, chunk_size=50)
    assert (
        run(tmp_path / "shards", tmp_path / "pass", max_error_fraction=0.25, chunk_size=50).num_samples == num_samples
    )


# --- a pass over some samples


def test_selected_samples_keep_their_ids_places_and_values(finished, shards, tmp_path):
    whole = [row for shard in list_shards(str(shards)) for row in read_parts(finished, shard.name).to_pylist()]
    wanted = {row["sample_id"] for row in whole[1:17:3]}  # of the first two shards
    summary = run(shards, tmp_path / "some", select=Chosen(frozenset(wanted | {"elsewhere.tar/0001"})))
    assert summary == PassSummary(len(wanted), {}, [])
    found = [row for shard in list_shards(str(shards)) for row in read_parts(tmp_path / "some", shard.name).to_pylist()]
    assert found == [row for row in whole if row["sample_id"] in wanted]
    assert read_parts(tmp_path / "some", "train-00002.tar").schema == read_parts(finished, "train-00002.tar").schema
    before = snapshot(tmp_path / "some")  # the shard of which nothing is selected is finished, too
    assert run(shards, tmp_path / "some", select=Chosen(frozenset(wanted))) == summary
    assert snapshot(tmp_path / "some") == before


def test_a_pass_over_a_share_that_was_killed_is_completed_to_the_same_bytes(local_ray, shards, tmp_path):
    share = KeyedShare(0.6, 3)
    summary = run(shards, tmp_path / "some", select=share)
    chosen = {f"train-{i // 10:05d}.tar/{i:04d}" for i in range(22)}
    assert summary.num_samples == sum(share(name) for name in chosen)
    whole = snapshot(tmp_path / "some")
    part_path(tmp_path / "some", "train-00001.tar", 0).unlink()
    (tmp_path / "some" / "parts" / "train-00000.tar" / "end.json").unlink()
    assert run(shards, tmp_path / "some", select=share) == summary
    assert {name: part[2] for name, part in snapshot(tmp_path / "some").items()} == {
        name: part[2] for name, part in whole.items()
    }


# --- a pass over parts


class Doubled:
    """The work of a pass over parts; where it should, it gives one sample no number."""

    def __init__(self, lost: str = ""):
        self.columns, self.lost = {"doubled": pa.float32()}, lost

    def __call__(self, table):
        assert table["error"].null_count == len(table) > 0
        doubled = 2 * table["brightness"].to_numpy()
        return {"doubled": np.where(np.array(table["sample_id"].to_pylist()) == self.lost, np.nan, doubled)}


def over_parts(source: Path, folder: Path, work_arguments=None, **changed) -> PassSummary:
    settings = {"made_with": {"detector": "one"}, "resources": RESOURCES, "max_error_fraction": 0.5, "name": "test"}
    return run_over_parts(
        shards_of_pass(source), source, folder, Doubled, work_arguments or {}, **{**settings, **changed}
    )


def test_a_pass_over_parts_has_the_same_rows_and_carries_errors_over(odd, tmp_path):
    source, summary = odd
    assert over_parts(source, tmp_path / "pass") == summary
    assert [shard.name for shard in shards_of_pass(source)] == ["bad.tar", "cut.tar", "empty.tar"]
    for shard in ("bad.tar", "cut.tar", "empty.tar"):
        before, after = read_parts(source, shard), read_parts(tmp_path / "pass", shard)
        assert after.drop_columns(["doubled"]).equals(before.drop_columns(["brightness"]))
        for brightness, doubled in zip(before["brightness"].to_pylist(), after["doubled"].to_pylist(), strict=True):
            assert (doubled is None) == (brightness is None)
            assert doubled is None or doubled == 2 * brightness


def test_a_pass_over_parts_redoes_only_what_is_missing(finished, tmp_path):
    over_parts(finished, tmp_path / "pass")
    whole = snapshot(tmp_path / "pass")
    part_path(tmp_path / "pass", "train-00000.tar", 1).unlink()
    shutil.rmtree(tmp_path / "pass" / "parts" / "train-00002.tar")
    before = snapshot(tmp_path / "pass")
    assert over_parts(finished, tmp_path / "pass") == PassSummary(22, {}, [])
    after = snapshot(tmp_path / "pass")
    assert {name: part[2] for name, part in after.items()} == {name: part[2] for name, part in whole.items()}
    kept = [name for name in before if name.endswith(".parquet")]
    assert {name: after[name][:2] for name in kept} == {name: whole[name][:2] for name in kept}
    with pytest.raises(Mistake, match="detector: 'one' there, 'two' now"):
        over_parts(finished, tmp_path / "pass", made_with={"detector": "two"})


def test_a_sample_that_loses_its_number_is_an_error_and_too_many_stop_a_pass_over_parts(finished, tmp_path):
    lost = {"lost": "train-00001.tar/0013"}
    summary = over_parts(finished, tmp_path / "pass", lost)
    assert summary == PassSummary(22, {"not_finite": 1}, [])
    [row] = [row for row in read_parts(tmp_path / "pass", "train-00001.tar").to_pylist() if row["error"]]
    assert (row["sample_id"], row["doubled"]) == (lost["lost"], None)
    with pytest.raises(Mistake, match=r"1 of 22 samples cannot be used \(not_finite 1\)"):
        over_parts(finished, tmp_path / "pass", lost, max_error_fraction=0.04)


def test_parts_of_an_unfinished_pass_are_not_passed_over(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "half")
    part_path(tmp_path / "half", "train-00001.tar", 2).unlink()
    with pytest.raises(Mistake, match=r"half is not finished: train-00001\.tar lacks parts"):
        over_parts(tmp_path / "half", tmp_path / "pass")
    with pytest.raises(Mistake, match="record of a pass"):
        shards_of_pass(tmp_path / "absent")


# --- slow actors


class Slow(Brightness):
    """Takes its time, so that readers would run far ahead."""

    def __call__(self, chunk):
        time.sleep(0.15)
        return super().__call__(chunk)


def spilled() -> list[str]:
    """What Ray says that the object store has written to disk so far."""
    # By its address: another process of these tests may run a Ray of its own.
    summary = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    assert "Plasma memory usage" in summary
    return [line for line in summary.splitlines() if "Spilled" in line]


@pytest.mark.slow
def test_readers_wait_for_slow_actors_and_nothing_is_spilled(local_ray, write_tar, picture, tmp_path):
    """540 MB of pixels through an object store of 200."""
    before, jpeg = spilled(), encode_image(picture(0, 256, 256), "jpg")
    for shard in range(4):
        write_tar(f"shards/{shard}.tar", [(f"{i:04d}.jpg", jpeg) for i in range(700)])
    summary = run_pass(
        list_shards(str(tmp_path / "shards")), tmp_path / "pass", Slow, {"image_size": 256}, image_size=256,
        made_with={}, chunk_size=50, limits=Limits(), resources=RESOURCES, max_error_fraction=0, name="slow",
    )  # fmt: skip
    assert summary == PassSummary(2800, {}, [])
    assert spilled() == before


# --- what a pass takes and reports


def test_the_time_of_a_pass_is_reported_by_stage(local_ray, write_pictures, tmp_path, caplog):
    write_pictures(tmp_path / "shards", range(10))
    with caplog.at_level("INFO"):
        run(tmp_path / "shards", tmp_path / "pass")
    timing = json.loads((tmp_path / "pass" / "timing.json").read_text())
    assert timing["num_samples"] == 10
    assert timing["stages"].keys() >= {"read", "decode", "wait", "transfer", "work", "write"}
    assert "test: 10 samples done in" in caplog.text
    assert "readers: " in caplog.text


def test_shares_are_of_the_actors_and_of_the_readers_time():
    said = stage_shares({"wait": 1, "encode": 6, "score": 3, "start": 50, "read": 1, "decode": 3})
    actors, readers = said.split("; ")
    assert actors == "actors: encode 60%, score 30%, wait 10%"
    assert readers == "readers: decode 75%, read 25%, 0.44 s for each second that actors work"
    assert stage_shares({}) == ""


def test_an_actor_takes_its_share_of_whatever_the_cluster_is():
    auto = PassResources()
    four, gpu = auto.on({"CPU": 4}), PassResources(gpus_per_actor=0.5).on({"CPU": 16, "GPU": 2})
    assert (four.min_actors, four.cpus_per_actor, four.decode_cpus, four.threads_per_actor) == (4, 0.75, 0.25, 1)
    assert (gpu.min_actors, gpu.cpus_per_actor, gpu.decode_cpus) == (4, 1, 1)
    assert auto.on({"CPU": 1}).min_actors == 1
    growing = PassResources(min_actors=1, max_actors=8, gpus_per_actor=1).on({"CPU": 0})
    assert (growing.min_actors, growing.max_actors, growing.cpus_per_actor) == (1, 8, 1)
    assert PassResources(memory_per_actor=10).on({"CPU": 4}).of_actor()["memory"] == 10


# --- what ends the processes that touch it is found and named; everything else is done as if it were not there


def test_samples_that_kill_their_process_are_named_and_their_neighbours_scored(finished, shards, tmp_path):
    lethal = ("train-00000.tar/0001", "train-00000.tar/0002")
    summary = run(shards, tmp_path / "pass", {"die_of": lethal})
    assert summary == PassSummary(22, {"process_died": 2}, [])
    for shard in list_shards(str(shards)):
        there, whole = (read_parts(folder, shard.name).to_pylist() for folder in (tmp_path / "pass", finished))
        for row, usual in zip(there, whole, strict=True):
            is_lethal = row["sample_id"] in lethal
            assert row == (usual | {"error": "process_died", "brightness": None} if is_lethal else usual)
    before = snapshot(tmp_path / "pass")
    assert run(shards, tmp_path / "pass", {"die_of": lethal}) == summary
    assert snapshot(tmp_path / "pass") == before


@pytest.mark.slow
def test_a_sample_that_hangs_its_process_is_named_and_its_neighbours_are_scored(finished, shards, tmp_path):
    hanging = "train-00000.tar/0001"
    patience = RESOURCES.model_copy(update={"sample_timeout_s": 2})
    summary = run(shards, tmp_path / "pass", {"hang_at": hanging}, resources=patience)
    assert summary == PassSummary(22, {"process_died": 1}, [])
    for shard in list_shards(str(shards)):
        there, whole = (read_parts(folder, shard.name).to_pylist() for folder in (tmp_path / "pass", finished))
        for row, usual in zip(there, whole, strict=True):
            is_hanging = row["sample_id"] == hanging
            assert row == (usual | {"error": "process_died", "brightness": None} if is_hanging else usual)


def test_a_slow_machine_has_its_time(local_ray, tmp_path):
    worker = Worker(tmp_path, Brightness, {}, 1, "slow", timeout_s=10)
    assert (worker._may_take(1), worker._may_take(64), worker._may_take(256)) == (10, 10, 40)
    worker.longest_s = 30  # what other chunks took is no sign of a sample that hangs
    assert worker._may_take(256) == 600
    worker.is_patient = True  # each of them was done alone
    assert worker._may_take(256) == 2560
    worker.timeout_s = 0
    assert worker._may_take(256) == 0


@pytest.mark.slow
def test_shards_whose_readers_keep_dying_by_chance_are_done_to_the_same_bytes(finished, shards, tmp_path):
    run(shards, tmp_path / "pass", select=DiesOften(str(tmp_path / "deaths"), "train-00001.tar/0015", times=4))
    assert len(list((tmp_path / "deaths").iterdir())) == 4
    one, other = ({name: part[2] for name, part in snapshot(f).items()} for f in (tmp_path / "pass", finished))
    assert one == other


@dataclass(frozen=True)
class DiesOften:
    """Takes every sample, and ends its process at one of them, the first few times."""

    folder: str
    sample_id: str
    times: int

    def __call__(self, sample_id: str) -> bool:
        deaths = Path(self.folder)
        deaths.mkdir(exist_ok=True)
        if sample_id == self.sample_id and len(list(deaths.iterdir())) < self.times:
            (deaths / str(os.getpid())).touch()
            os._exit(1)
        return True
