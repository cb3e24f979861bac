"""Shards from strangers: every sample appears once, in its place, read or with a reason; nothing is executed."""

from __future__ import annotations

import io
import os
import pickle

import pytest
from PIL import Image
from tars import read, saved, triple

from dede_ray.data.images import decode_image
from dede_ray.data.shards import (
    REASONS,
    BadSample,
    Limits,
    Sample,
    ShardEnd,
    iter_chunks,
    list_shards,
    split_name,
    write_shard,
    write_shards,
)
from dede_ray.runtime.config import Mistake

LIMITS = Limits()


# --- reading


def test_samples_come_in_the_order_of_the_tar(write_tar, png):
    keys = ["b", "a", "c", "0"]
    samples = read(write_tar("s.tar", [m for key in keys for m in triple(key, png())]))
    assert [(s.key, s.index, s.label, s.caption, s.error) for s in samples] == [
        (key, i, 3, "a photo", None) for i, key in enumerate(keys)
    ]


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("a/b.seg.PNG", "a/b", "seg.png"),
        ("v1.2/x.jpg", "v1.2/x", "jpg"),
        ("../../etc/passwd.txt", "../../etc/passwd", "txt"),
        ("no_suffix", "no_suffix", ""),
        ("猫.jpg", "猫", "jpg"),
        (".hidden", "", "hidden"),
        ("caf\udce9.jpg", "caf\\xe9", "jpg"),  # Latin-1 bytes, as tarfile hands them over
    ],
)
def test_a_key_is_the_name_up_to_the_first_dot_after_the_last_slash(name, key, suffix):
    assert split_name(name) == (key, suffix)


def test_members_of_other_kinds_belong_to_their_sample_but_are_not_its_image(write_tar, png):
    [sample] = read(write_tar("s.tar", [("k.seg.png", b"mask"), *triple("k", png())]), keep_others=True)
    assert (sample.image, sample.others) == (png(), {"seg.png": b"mask"})


def test_a_key_that_comes_back_later_is_an_error_with_an_id_of_its_own(write_tar, png):
    samples = read(write_tar("s.tar", triple("k", png(0)) + triple("other", png(1)) + triple("k", png(2))))
    assert [s.error for s in samples] == [None, None, "duplicate_key"]
    assert len({s.key for s in samples}) == 3


def test_a_sample_without_an_image_says_so(write_tar):
    [sample] = read(write_tar("s.tar", [("k.txt", b"only words")]))
    assert sample.error == "no_image"


@pytest.mark.parametrize(
    ("member", "limits", "reason"),
    [
        (("k.txt", b"\xff\xfe\x00"), LIMITS, "caption_unreadable"),
        (("k.txt", b"word " * 10), Limits(max_caption_chars=20), "caption_too_long"),
        (("k.cls", b"cat"), LIMITS, "label_unreadable"),
        (("k.cls", b""), LIMITS, "label_unreadable"),
        (("k.cls", b"99999999999"), LIMITS, "label_unreadable"),
        (("k.txt", b"x" * 5000), Limits(max_member_bytes=4500), "member_too_large"),
    ],
)
def test_a_bad_member_is_a_reason_and_its_neighbours_are_read(write_tar, png, member, limits, reason):
    members = [*triple("before", png()), ("k.png", png()), member, *triple("z", png())]
    samples = read(write_tar("s.tar", members), limits)
    assert [s.error for s in samples] == [None, reason, None]
    assert reason in REASONS


def test_a_pickle_in_a_shard_is_never_opened(write_tar, png, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    bomb = pickle.dumps(Bomb())
    suffixes = ("pyd", "pickle", "pkl", "pt", "pth", "npy", "npz", "json", "jpg")
    samples = read(
        write_tar("s.tar", [m for s in suffixes for m in (("k_" + s + ".png", png()), ("k_" + s + "." + s, bomb))])
    )
    for sample in samples:
        decode_image(sample.image, LIMITS)
    with pytest.raises(BadSample):
        decode_image(bomb, LIMITS)
    assert len(samples) == len(suffixes)
    assert not (tmp_path / "exploded").exists()


def test_chunks_hold_every_sample_once(write_tar, png):
    path = write_tar("s.tar", [m for i in range(7) for m in triple(f"k{i}", png(i))])
    end = ShardEnd()
    [shard] = list_shards(str(path))
    chunks = list(iter_chunks(shard, 3, LIMITS, end))
    assert [[s.key for s in chunk] for chunk in chunks] == [["k0", "k1", "k2"], ["k3", "k4", "k5"], ["k6"]]
    assert end == ShardEnd(7, is_complete=True)


def test_every_sample_is_read_or_has_a_reason_from_the_closed_list(write_tar, png):
    jpeg = saved(Image.open(io.BytesIO(png())), "JPEG")
    members = [
        *triple("good", png()),
        ("no_image.txt", b"words"),
        ("cut.jpg", jpeg[:-50]),
        ("rubbish.jpg", b"not an image at all"),
        ("empty.jpg", b""),
        ("label.png", png()),
        ("label.cls", b"?"),
        *triple("good", png()),
    ]
    outcome = []
    for sample in read(write_tar("s.tar", members)):
        try:
            outcome.append(sample.error or decode_image(sample.image, LIMITS).shape)
        except BadSample as bad:
            outcome.append(bad.reason)
    assert outcome == [
        (32, 32, 3),
        "no_image",
        "image_truncated",
        "image_unreadable",
        "image_unreadable",
        "label_unreadable",
        "duplicate_key",
    ]
    assert {reason for reason in outcome if isinstance(reason, str)} <= set(REASONS)


# --- listing


def test_folders_globs_and_ranges_are_listed_by_name(write_tar, png, tmp_path):
    for name in ("b-00001.tar", "b-00000.tar", "a.tar.gz", "b-00002.tar"):
        write_tar(f"shards/{name}", triple("k", png()))
    (tmp_path / "shards" / "readme.txt").write_text("not a shard")
    folder = str(tmp_path / "shards")

    def names(*patterns):
        return [shard.name for shard in list_shards(list(patterns))]

    assert names(folder) == ["a.tar.gz", "b-00000.tar", "b-00001.tar", "b-00002.tar"]
    assert names(f"{folder}/b-*.tar") == ["b-00000.tar", "b-00001.tar", "b-00002.tar"]
    assert names(f"{folder}/b-{{00001..00002}}.tar", f"{folder}/a.tar.gz") == ["a.tar.gz", "b-00001.tar", "b-00002.tar"]


def test_a_url_reads_like_a_path(write_tar, png):
    path = write_tar("s.tar", triple("k", png()))
    [[sample]] = iter_chunks(list_shards(f"file://{path}")[0], 5, LIMITS)
    assert sample == read(path)[0]


def test_nothing_found_is_a_mistake_that_names_the_pattern(tmp_path):
    with pytest.raises(Mistake, match=r"no shards at .*train-\*\.tar"):
        list_shards(str(tmp_path / "train-*.tar"))


def test_two_shards_of_one_name_are_a_mistake(write_tar, png):
    paths = [str(write_tar(f"{folder}/s.tar", triple("k", png()))) for folder in ("one", "two")]
    with pytest.raises(Mistake, match=r"two shards are named s\.tar"):
        list_shards(paths)


@pytest.mark.parametrize("content", [b"", b"not a tar" * 200, b"\x1f\x8b rubbish"])
def test_a_file_that_is_no_tar_is_a_mistake_that_names_it(write_tar, png, tmp_path, content):
    write_tar("good.tar", triple("k", png()))
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(Mistake, match=r"1 of 2 shards.*\n.*bad\.tar"):
        list_shards(str(tmp_path))


# --- writing


def test_what_is_written_is_read_again_and_equal_samples_give_equal_bytes(write_tar, png, tmp_path):
    members = [m for i in range(3) for m in [*triple(f"folder/k{i}", png(i)), (f"folder/k{i}.json", b"{}")]]
    samples = read(write_tar("s.tar", members), keep_others=True)
    for name in ("one.tar", "two.tar"):
        assert write_shard(tmp_path / name, samples) == 3
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    assert read(tmp_path / "one.tar", keep_others=True) == samples


def test_keys_of_any_alphabet_and_length_survive(png, tmp_path):
    keys = ["猫/ねこ", "x" * 300, "sp ace", "new\nline", "quo'te\""]
    write_shard(tmp_path / "s.tar", (Sample(key, i, image=png(), image_suffix="png") for i, key in enumerate(keys)))
    assert [sample.key for sample in read(tmp_path / "s.tar")] == keys


def test_shards_are_cut_to_size_and_numbered(png, tmp_path):
    samples = (Sample(f"k{i}", i, image=png(), image_suffix="png") for i in range(5))
    paths = write_shards(tmp_path, "train", samples, 2)
    assert [path.name for path in paths] == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert [sample.key for path in paths for sample in read(path)] == ["k0", "k1", "k2", "k3", "k4"]
