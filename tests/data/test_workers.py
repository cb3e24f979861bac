"""Readers and actors: every chunk once, whoever reads it; where time goes; what Prometheus sees."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request

import pytest
import ray
from passes import Brightness, run

from dede_ray.data.ledger import End, read_end
from dede_ray.data.shards import Limits, list_shards
from dede_ray.data.workers import (
    JOURNAL,
    Laps,
    Reading,
    Share,
    Worker,
    find_end,
    packed,
    read_and_decode,
    read_or_report,
    unpacked,
)


@pytest.fixture
def shard(write_pictures, tmp_path):
    write_pictures(tmp_path / "shards", range(23))
    return list_shards(str(tmp_path / "shards" / "train-00000.tar"))[0]  # 20 samples


@pytest.fixture
def reading(tmp_path):
    return Reading(tmp_path / "pass", 32, 3, Limits(), None)


@pytest.mark.ray
def test_a_process_that_reads_shards_starts_without_torch():
    code = "import sys, dede_ray.data.workers; print(sorted({'torch', 'open_clip', 'timm'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


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


def test_the_end_of_a_shard_is_found_without_decoding_it(shard, reading):
    assert find_end(shard, reading) == 7
    assert read_end(reading.folder, shard.name) == End(20, 7, True)


def test_a_shard_that_is_gone_is_reported_in_a_row_and_what_was_read_stays(shard, reading, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    rows = read_or_report(shard, set(), reading, Share())
    first = next(rows)
    assert (first["number"][0].as_py(), first["failure"][0].as_py()) == (0, None)
    rows.close()
    (reading.folder.parent / "shards" / shard.name).unlink()
    [row] = read_or_report(shard, set(), reading, Share())
    assert isinstance(unpacked(row["failure"][0].as_py()), FileNotFoundError)


def test_an_exception_travels_as_text_even_where_it_cannot_be_pickled():
    class Odd(Exception):
        def __reduce__(self):
            raise TypeError("cannot be pickled")

    error = unpacked(packed(FileNotFoundError(2, "gone", "a.tar")))
    assert (type(error), error.filename) == (FileNotFoundError, "a.tar")
    assert str(unpacked(packed(Odd("too large")))) == "Odd: too large"


def test_a_journal_names_every_chunk_that_is_begun(shard, reading, monkeypatch, tmp_path):
    monkeypatch.setenv(JOURNAL, str(tmp_path / "journal.txt"))
    worker = Worker(reading.folder, Brightness, {}, 1, "a pass")
    for _ in range(2):  # the second time all chunks are done, and nothing is begun
        for table in read_and_decode(shard, (), reading, Share()):
            worker(table)
    lines = [line.split("\t")[2:] for line in (tmp_path / "journal.txt").read_text().splitlines()]
    assert lines == [["a pass", shard.name, str(number)] for number in range(7)]


def scraped() -> str:
    """What the node's Prometheus endpoint shows."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_prometheus_sees_samples_reasons_and_stages_of_a_pass(local_ray, write_tar, png, tmp_path):
    write_tar("shards/a.tar", [(f"{i:04d}.png", b"rubbish" if i == 3 else png(i)) for i in range(10)])
    run(tmp_path / "shards", tmp_path / "pass", name="seen by prometheus")
    deadline, lines = time.monotonic() + 40, []
    while time.monotonic() < deadline and not any('reason="image_unreadable"' in line for line in lines):
        time.sleep(0.5)
        lines = [line for line in scraped().splitlines() if 'pass="seen by prometheus"' in line]
    total = sum(float(line.rpartition(" ")[2]) for line in lines if "dede_ray_samples" in line)
    unusable = [line for line in lines if "dede_ray_unusable_samples" in line]
    assert total == 10
    assert [float(line.rpartition(" ")[2]) for line in unusable] == [1]
    stages = {
        stage for stage in ("read", "decode", "work", "write") if any(f'stage="{stage}"' in line for line in lines)
    }
    assert stages == {"read", "decode", "work", "write"}


def test_laps_book_every_second_once():
    laps = Laps()
    time.sleep(0.02)
    laps.mark("sleep")
    laps.mark("nothing")
    taken = laps.take()
    assert taken["sleep"] >= 0.02 > taken["nothing"]
    assert laps.take() == {}
