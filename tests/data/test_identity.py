"""What makes a shard the same: its name, its size and its content, wherever it is."""

from __future__ import annotations

import os
import shutil

import pytest

from dede_ray.data.identity import BLOCK_BYTES, NUM_BLOCKS, compare, identified, require_same
from dede_ray.data.shards import Shard
from dede_ray.runtime.config import Mistake
from dede_ray.runtime.store import write_atomically

SMALL = BLOCK_BYTES * 3 + 17


def shard(path, content: bytes) -> Shard:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return Shard(path.name, str(path), len(content))


def test_a_shard_is_the_same_elsewhere_and_another_of_its_size_is_not(tmp_path, caplog):
    content = os.urandom(SMALL)
    [there] = identified([shard(tmp_path / "a" / "x.tar", content)])
    [moved] = identified([shard(tmp_path / "b" / "x.tar", content)])
    with caplog.at_level("INFO"):
        compared = require_same({"x.tar": there}, [moved], "the pass", "redo it")
    assert compared.moved == ["x.tar"]
    assert compared.record["x.tar"].url == moved.url
    assert "1 shards are elsewhere now, such as" in caplog.text
    for place in (0, BLOCK_BYTES + 5, SMALL - 1):  # one byte anywhere in a small one
        other = bytearray(content)
        other[place] ^= 1
        [replaced] = identified([shard(tmp_path / "a" / "x.tar", bytes(other))])
        with pytest.raises(Mistake, match=r"the pass .* 1 have changed .*\n  x\.tar: .* there, .* now\n.*redo it"):
            require_same({"x.tar": there}, [replaced], "the pass", "redo it")


def test_of_a_long_shard_some_blocks_are_read_and_all_of_it_where_that_is_asked_for(tmp_path):
    content = bytes((NUM_BLOCKS + 2) * BLOCK_BYTES * 8)
    whole = shard(tmp_path / "x.tar", content)
    other = [
        shard(tmp_path / str(i) / "x.tar", content[: len(content) - 1 - i] + b"1" + bytes(i)) for i in (0, 1 << 16)
    ]
    assert {one.digest for one in identified([whole])}.isdisjoint(one.digest for one in identified(other[:1]))
    assert all(one.digest.startswith("blocks:") for one in identified(other))
    full = [one.digest for one in identified([whole, *other], full=True)]
    assert len({*full}) == 3
    assert {digest.partition(":")[0] for digest in full} == {"sha256"}


def test_records_of_another_kind_are_compared_by_that_kind(tmp_path):
    content = os.urandom(SMALL)
    path = shard(tmp_path / "x.tar", content)
    [blocks], [full] = identified([path]), identified([path], full=True)
    for there, now in ((blocks, full), (full, blocks)):
        compared = compare({"x.tar": there}, [now])
        assert compared.changed == {}
        assert compared.record["x.tar"].digest == full.digest  # the better one is kept
    [other] = identified([shard(tmp_path / "o" / "x.tar", os.urandom(SMALL))])
    assert compare({"x.tar": full}, [other]).changed


def test_a_record_without_digests_takes_the_first_that_comes_and_size_decides(tmp_path):
    [now] = identified([shard(tmp_path / "x.tar", b"x" * 1024)])
    compared = compare({"x.tar": Shard("x.tar", "/elsewhere/x.tar", 1024)}, [now])
    assert (compared.changed, compared.record["x.tar"].digest) == ({}, now.digest)
    assert compare({"x.tar": Shard("x.tar", now.url, 1025)}, [now]).changed


def test_on_a_store_the_etag_counts_and_copies_on_disk_are_known_by_it(s3, tmp_path):
    content = os.urandom(SMALL)
    urls = [f"{s3}/{tmp_path.name}/{place}/x.tar" for place in ("a", "b")]
    for url in urls:
        write_atomically(url, content)
    one, same = identified([Shard("x.tar", url, SMALL) for url in urls])
    assert one.digest.startswith("etag:")
    assert compare({"x.tar": one}, [same]).changed == {}
    [local] = identified([shard(tmp_path / "x.tar", content)])
    assert compare({"x.tar": one}, [local]).changed == {}
    assert compare({"x.tar": local}, [one]).changed == {}
    write_atomically(urls[0], os.urandom(SMALL))
    [other] = identified([Shard("x.tar", urls[0], SMALL)])
    assert compare({"x.tar": one}, [other]).changed
    assert compare({"x.tar": local}, [other]).changed
    shutil.rmtree(tmp_path)
