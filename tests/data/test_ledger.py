"""The ledger: what a folder records of its pass, and which chunks it takes for done."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pytest

from dede_ray.data.ledger import (
    claim_parts,
    end_path,
    forget_changed,
    part_path,
    shards_of_pass,
    unfinished,
    write_parquet,
)
from dede_ray.data.shards import Shard
from dede_ray.runtime.config import Mistake, write_json

SHARDS = [
    Shard("b.tar", "/data/b.tar", 1234567, "blocks:b1"),
    Shard("a.tar", "s3://bucket/a, the first.tar", 99, "etag:a1"),
]


def test_a_pass_records_its_settings_and_shards(tmp_path):
    claim_parts(tmp_path, {"victim": "one"}, SHARDS)
    assert json.loads((tmp_path / "pass.json").read_text()) == {
        "victim": "one",
        "shards": {
            "b.tar": {"url": "/data/b.tar", "num_bytes": 1234567, "digest": "blocks:b1"},
            "a.tar": {"url": "s3://bucket/a, the first.tar", "num_bytes": 99, "digest": "etag:a1"},
        },
    }
    assert shards_of_pass(tmp_path) == sorted(SHARDS, key=lambda shard: shard.name)


def test_a_record_of_an_earlier_version_is_read_and_resumed(tmp_path):
    earlier = {"b.tar": "/data/b.tar, 1,234,567 bytes", "a.tar": "s3://bucket/a, the first.tar, 99 bytes"}
    write_json(tmp_path / "pass.json", {"victim": "one", "shards": earlier})
    assert shards_of_pass(tmp_path) == sorted(SHARDS, key=lambda shard: shard.name)
    claim_parts(tmp_path, {"victim": "one"}, SHARDS)
    claim_parts(tmp_path / "new", {"victim": "one"}, SHARDS)
    assert (tmp_path / "pass.json").read_text() == (tmp_path / "new" / "pass.json").read_text()


@pytest.mark.parametrize("changed", [{"num_bytes": 100}, {"digest": "etag:a2"}])
def test_an_exchanged_shard_is_a_mistake_until_it_is_forgotten_and_a_further_one_is_not(tmp_path, changed):
    claim_parts(tmp_path, {}, SHARDS)
    further = Shard("c.tar", "/data/c.tar", 5, "blocks:c1")
    claim_parts(tmp_path, {}, [further])
    assert [shard.name for shard in shards_of_pass(tmp_path)] == ["a.tar", "b.tar", "c.tar"]
    other = replace(SHARDS[1], **changed)
    for name in ("a.tar", "b.tar"):
        write_parquet(pa.table({"error": pa.array([], pa.string())}), part_path(tmp_path, name, 0))
        write_json(end_path(tmp_path, name), {"num_samples": 0, "num_chunks": 1, "is_complete": True})
    with pytest.raises(
        Mistake, match=r"1 have changed since they were read:\n  a\.tar: .* there, .* now\n.*rescore_ch"
    ):
        claim_parts(tmp_path, {}, [SHARDS[0], other])
    assert forget_changed(tmp_path, [SHARDS[0], other]) == ["a.tar"]
    assert forget_changed(tmp_path, [SHARDS[0], other]) == []
    assert unfinished(tmp_path, [SHARDS[0], other]) == {other: set()}
    claim_parts(tmp_path, {}, [SHARDS[0], other])
    assert shards_of_pass(tmp_path)[0].digest == other.digest


def test_a_shard_may_move(tmp_path):
    claim_parts(tmp_path, {}, SHARDS)
    claim_parts(tmp_path, {}, [replace(SHARDS[0], url="/elsewhere/b.tar")])
    assert shards_of_pass(tmp_path)[1].url == "/elsewhere/b.tar"


@pytest.mark.parametrize(
    "shards", [[], {"a.tar": 1}, {"a.tar": {"url": "x"}}, {"a.tar": "no size"}, {"a.tar": {"url": 1, "num_bytes": "?"}}]
)
def test_a_damaged_record_is_a_mistake_that_names_it(tmp_path, shards):
    write_json(tmp_path / "pass.json", {"shards": shards})
    for look in (lambda: shards_of_pass(tmp_path), lambda: claim_parts(tmp_path, {}, SHARDS)):
        with pytest.raises(Mistake, match=r"pass\.json is damaged"):
            look()


def test_a_shard_is_finished_when_its_end_is_known_and_all_its_chunks_are_there(tmp_path):
    shard, empty = SHARDS[0], pa.table({"error": pa.array([], pa.string())})
    assert unfinished(tmp_path, SHARDS) == {one: set() for one in SHARDS}
    for number in (0, 2):
        write_parquet(empty, part_path(tmp_path, shard.name, number))
    assert unfinished(tmp_path, [shard]) == {shard: {0, 2}}
    write_json(end_path(tmp_path, shard.name), {"num_samples": 0, "num_chunks": 3, "is_complete": True})
    assert unfinished(tmp_path, [shard]) == {shard: {0, 2}}
    write_parquet(empty, part_path(tmp_path, shard.name, 1))
    assert unfinished(tmp_path, [shard]) == {}
    write_json(end_path(tmp_path, shard.name), {"num_samples": 0, "num_chunks": 10**12, "is_complete": True})
    assert unfinished(tmp_path, [shard]) == {shard: {0, 1, 2}}
