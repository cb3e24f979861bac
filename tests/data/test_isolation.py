"""What ends the processes that touch it is found and named; everything else is done as if it were not there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from passes import run, snapshot

from dede_ray.data.ledger import PassSummary, read_parts
from dede_ray.data.shards import list_shards


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
