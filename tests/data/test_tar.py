"""Tars from strangers: wherever one is cut or damaged, what comes before is read, and the damage shows."""

from __future__ import annotations

import io
import tarfile

import pytest
from tars import read, triple

from dede_ray.data.shards import ShardEnd


def test_folders_and_links_are_not_samples(png, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        folder, link = tarfile.TarInfo("a"), tarfile.TarInfo("b.png")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(folder)
        tar.addfile(link)
        image = tarfile.TarInfo("c.png")
        image.size = len(png())
        tar.addfile(image, io.BytesIO(png()))
    assert [s.key for s in read(tmp_path / "s.tar")] == ["c"]


def test_a_gzipped_shard_reads_like_a_plain_one(write_tar, png):
    members = triple("a", png(0)) + triple("b", png(1))
    assert read(write_tar("s.tar.gz", members)) == read(write_tar("s.tar", members))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_wherever_a_shard_is_cut_what_was_whole_is_read_and_the_cut_shows(write_tar, png, tmp_path, suffix):
    path = write_tar(f"s.{suffix}", [m for i in range(4) for m in triple(f"k{i}", png(i))])
    content, whole = path.read_bytes(), read(path)
    for size in range(600, len(content) - 1, 997):
        path.write_bytes(content[:size])
        end = ShardEnd()
        samples = read(path, end=end)
        assert end.num_samples == len(samples) <= 4
        assert samples[:-1] == whole[: len(samples) - 1]
        assert samples[-1:] == [] or samples[-1].error in (None, "shard_truncated")
        last_is_whole = len(samples) == 4 and samples[-1] == whole[-1]  # only tar's own end may be missing
        assert not end.is_complete or last_is_whole
    path.write_bytes(content[:2000])  # inside an image, or before any
    assert read(path)[-1:] in ([], [s for s in read(path) if s.error == "shard_truncated"])


def test_a_sample_whose_image_was_cut_away_is_not_one_without_an_image(write_tar, png):
    path = write_tar("s.tar", [*triple("a", png()), ("b.txt", b"words"), ("b.png", png())])
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"b.png")])
    assert [(sample.key, sample.error) for sample in read(path)] == [("a", None), ("b", "shard_truncated")]


def test_rubbish_in_the_middle_ends_the_shard_and_is_not_taken_for_its_end(write_tar, png):
    path = write_tar("s.tar", [m for i in range(4) for m in triple(f"k{i}", png(i))])
    content = bytearray(path.read_bytes())
    third = bytes(content).index(b"k2.png")
    content[third : third + 512] = b"\x07" * 512
    path.write_bytes(content)
    end = ShardEnd()
    samples = read(path, end=end)
    assert [s.key for s in samples] == ["k0", "k1"]
    assert not end.is_complete
