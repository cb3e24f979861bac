"""Places on file systems and object stores: the same manners, absent or whole."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dede_ray.data.shards import list_shards, open_shard, write_shard
from dede_ray.runtime.config import Mistake, claim, finish, read_json, write_json
from dede_ray.runtime.store import ObjectPath, StoreError, is_url, place, write_atomically


@pytest.fixture(params=["folder", "store"])
def home(request, tmp_path):
    """A place that is empty: here, and on a store."""
    if request.param == "folder":
        return tmp_path / "home"
    return place(f"{request.getfixturevalue('s3')}/{tmp_path.name}")


def test_what_is_written_is_read_listed_replaced_and_removed(home):
    assert not (home / "a.txt").exists()
    for content in ("old", "naïve"):
        write_atomically(home / "a.txt", content)
    write_atomically(home / "deep" / "er" / "b.bin", bytes(range(256)) * 40_000)
    assert (home / "a.txt").read_text() == "naïve"
    assert (home / "deep/er/b.bin").read_bytes() == bytes(range(256)) * 40_000
    assert (home / "deep").is_dir()
    assert not (home / "deep").is_file()
    assert sorted(path.name for path in home.iterdir()) == ["a.txt", "deep"]
    assert [path.name for path in home.glob("[a-c]*.txt")] == ["a.txt"]
    (home / "a.txt").unlink()
    (home / "a.txt").unlink(missing_ok=True)
    assert not (home / "a.txt").is_file()
    with pytest.raises(FileNotFoundError):
        (home / "a.txt").read_bytes()


def test_a_run_of_our_own_is_known_again(home):
    from dede_ray.ingest.sources import Digits

    assert claim(home, Digits()) is None
    assert finish(home, Digits(), {"found": 3}) == claim(home, Digits())
    write_json(home / "more.json", {"a": [1, 2]})
    assert read_json(home / "more.json", "file") == {"a": [1, 2]}
    with pytest.raises(Mistake, match=r"no manifest at .*nothing\.json"):
        read_json(home / "nothing.json", "manifest")


def test_shards_are_found_by_folder_pattern_and_name(home, png, tmp_path):
    from dede_ray.data.shards import Sample

    for number in range(3):
        write_shard(tmp_path / "one.tar", [Sample("a", 0, png(number), "png")])
        write_atomically(home / f"train-{number:05d}.tar", (tmp_path / "one.tar").read_bytes())
    write_atomically(home / "classes.json", "[]")
    write_atomically(home / "._train-00000.tar", "hidden, as macOS leaves them")
    names = [f"train-{number:05d}.tar" for number in range(3)]
    ways = (home, home / "train-*.tar", f"{home}/train-{{00000..00002}}.tar", f"{home.parent}/{home.name[:-1]}?/*.tar")
    for pattern in ways:
        found = list_shards(str(pattern))
        assert [shard.name for shard in found] == names
        assert {shard.num_bytes for shard in found} == {(tmp_path / "one.tar").stat().st_size}
    with open_shard(found[2]) as stream:
        assert stream.read() == (tmp_path / "one.tar").read_bytes()
    with pytest.raises(Mistake, match="no shards at"):
        list_shards(f"{home}/test-*.tar")
    with pytest.raises(Mistake, match=r"2 of the 5 names .* do not exist: .*train-00003\.tar"):
        list_shards(f"{home}/train-{{00000..00004}}.tar")
    write_atomically(home / "list.txt", f"{home}/train-00001.tar")
    assert [shard.name for shard in list_shards(f"{home}/list.txt")] == names[1:2]
    write_atomically(home / "run#1" / "a?.tar", (tmp_path / "one.tar").read_bytes())
    assert [shard.name for shard in list_shards(f"{home}/run#1/a?.tar")] == ["a?.tar"]


def test_a_place_travels_and_says_its_name():
    there = ObjectPath("s3://bucket/a/b.parquet?scheme=http")
    assert str(there.parent / "c.json") == "s3://bucket/a/c.json?scheme=http"
    assert (there.name, there.stem) == ("b.parquet", "b")
    assert str(there.with_suffix(".json")) == "s3://bucket/a/b.json?scheme=http"
    assert pickle.loads(pickle.dumps(there)) == there
    assert place(str(there)) == there
    assert place("file:///tmp/x") == Path("/tmp/x")
    assert not is_url(Path("a/b"))


def test_a_store_may_be_named_in_the_url(s3, monkeypatch):
    server = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    write_atomically("s3://bucket/named/a.txt", "here")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    there = place(f"s3://bucket/named?endpoint_override={server.netloc}&scheme={server.scheme}")
    assert (there / "a.txt").read_text() == "here"
    assert [path.name for path in there.iterdir()] == ["a.txt"]
    with pytest.raises(StoreError, match="colour"):
        (place("s3://bucket/named?colour=red") / "a.txt").read_text()


def test_a_store_that_refuses_says_what_it_was_asked_for(s3):
    with pytest.raises(StoreError, match=r"s3://nobodys/x/a\.json"):
        write_atomically("s3://nobodys/x/a.json", "{}")
    with pytest.raises(StoreError, match="floppy://a/b"):
        write_atomically("floppy://a/b", "")


def test_a_job_that_cannot_write_to_a_store_says_so_before_it_works():
    from dede_ray.runtime.config import Config
    from dede_ray.runtime.session import check_output

    class Writes(Config):
        output: str

    class WritesAnywhere(Writes):
        writes_to_stores = True

    check_output(WritesAnywhere(output="s3://bucket/run"), Writes(output="runs/here"))
    with pytest.raises(Mistake, match=r"output 's3://bucket/run' is on an object store"):
        check_output(Writes(output="s3://bucket/run"))
