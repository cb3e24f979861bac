"""Readers: every chunk once, whoever reads it; where time goes."""

from __future__ import annotations

import base64
import time

import pytest
from ray import cloudpickle

from dede_ray.data.ledger import End, read_end
from dede_ray.data.shards import Limits, list_shards
from dede_ray.data.workers import Laps, Reading, Share, _read_or_tell, read_and_decode


@pytest.fixture
def shard(write_pictures, tmp_path):
    write_pictures(tmp_path / "shards", range(23))
    return list_shards(str(tmp_path / "shards" / "train-00000.tar"))[0]  # 20 samples


@pytest.fixture
def reading(tmp_path):
    return Reading(tmp_path / "pass", 32, 3, Limits(), None)


def test_several_readers_of_a_shard_share_its_chunks_and_one_ends_it(shard, reading):
    numbers = []
    for number in (2, 1, 0):
        found = [table["number"][0].as_py() for table in read_and_decode(shard, {3}, reading, Share(number, 3))]
        assert all(chunk % 3 == number for chunk in found)
        numbers += found
        assert (reading.folder / "parts" / shard.name / "end.json").is_file() == (number == 0)
    assert sorted(numbers) == [0, 1, 2, 4, 5, 6]
    assert read_end(reading.folder, shard.name) == End(20, 7, True)


def test_what_one_reader_finds_several_find_too(shard, reading):
    whole = {t["number"][0].as_py(): t.drop_columns(["seconds"]) for t in read_and_decode(shard, (), reading, Share())}
    for number in range(2):
        for table in read_and_decode(shard, (), reading, Share(number, 2)):
            assert table.drop_columns(["seconds"]).equals(whole.pop(table["number"][0].as_py()))
    assert not whole


def test_a_shard_that_is_gone_is_told_in_a_row_and_what_was_read_stays(shard, reading, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    rows = _read_or_tell(shard, set(), reading, Share())
    first = next(rows)
    assert (first["number"][0].as_py(), first["failure"][0].as_py()) == (0, None)
    rows.close()
    (reading.folder.parent / "shards" / shard.name).unlink()
    [row] = _read_or_tell(shard, set(), reading, Share())
    error = cloudpickle.loads(base64.b64decode(row["failure"][0].as_py()))
    assert isinstance(error, FileNotFoundError)


def test_laps_book_every_second_once():
    laps = Laps()
    time.sleep(0.02)
    laps.mark("sleep")
    laps.mark("nothing")
    taken = laps.take()
    assert taken["sleep"] >= 0.02 > taken["nothing"]
    assert laps.take() == {}
