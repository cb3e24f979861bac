"""Shards from strangers: every sample appears once, in its place, read or with a reason; nothing is executed."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tars import packed, read, saved, triple

from dede_ray.data import shards
from dede_ray.data.first_bytes import NUM_BYTES
from dede_ray.data.images import decode_image, encode_image
from dede_ray.data.shards import (
    NOTES,
    REASONS,
    BadSample,
    CaptionFrom,
    Limits,
    Sample,
    Shard,
    ShardEnd,
    in_sample,
    iter_chunks,
    iter_samples,
    list_shards,
    read_start,
    split_name,
    write_shard,
    write_shards,
)
from dede_ray.data.workers import Reading, decode
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


# What a trainer's reader makes of a name that somebody's system has packed: samples, or strays between them.
NAMES = [
    "k.png", "k.txt", "./k.png", "./._k.png", "a/k.png", "a/._k.png", "a/.png", "v1.2/._k.png", "v1.2/k.png", "v1.2/k",
    ".DS_Store", "a/.DS_Store", "LICENSE", "a/MANIFEST", "k.", "....", "/.x", "//.x", "a.b/c/.x",
    "PaxHeaders.123/k.png", "__MACOSX/._k.png", "__meta__", "__meta__/k.png", "__a.b__", "k.input.jpg", "22.05.png",
    "22.10.png", "Thumbs.db", "a\nb.png", "v.1\n/b.png", "v.1\nc/b.png", "__a__\n.png", "K.PNG",
]  # fmt: skip


def by_webdataset(content: bytes) -> list[tuple[str, set[str]]]:
    """Key and suffixes of the samples that its reader finds."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    files = tar_file_expander([{"url": "s.tar", "stream": io.BytesIO(content)}])
    return [(s["__key__"], set(s) - {"__key__", "__url__"}) for s in group_by_keys(files)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(NAMES) | st.text("ab./_\n", min_size=1, max_size=9), max_size=6, unique_by=str.lower))
def test_samples_are_those_of_webdatasets_reader(names):
    content = packed([(name, name.encode()) for name in names if not name.endswith("/")])
    expected = by_webdataset(content)
    found = [*iter_samples(io.BytesIO(content), Limits(), keep_others=True)]
    assert [s.key.removesuffix(f"#{s.index}") for s in found] == [key for key, _ in expected]
    for sample, (_, suffixes) in zip(found, expected, strict=True):
        assert set(sample.others) <= suffixes


def test_strays_neither_begin_a_sample_nor_end_one(write_tar, png):
    strays = [(name, b"stray") for name in ("LICENSE", "./._k.png", ".DS_Store", "__meta__")]
    members = [*strays[:1], ("./k.png", png()), *strays[1:], ("./k.txt", b"a photo"), ("./k.cls", b"3")]
    [sample] = read(write_tar("s.tar", members))
    assert (sample.key, sample.error, sample.caption, sample.label) == ("./k", None, "a photo", 3)


@pytest.mark.parametrize("name", ["/" * 15_000 + ".", "a." * 8_000 + "/b", "a/" * 8_000 + "."])
def test_a_long_name_costs_little(name):
    started = time.monotonic()
    in_sample(name)
    assert time.monotonic() - started < 0.1


def test_members_of_other_kinds_belong_to_their_sample_but_are_not_its_image(write_tar, png):
    [sample] = read(write_tar("s.tar", [("k.seg.png", b"mask"), *triple("k", png())]), keep_others=True)
    assert (sample.image, sample.others) == (png(), {"seg.png": b"mask"})


@pytest.mark.parametrize("between", [[], ["other"]], ids=["in a row", "later"])
def test_a_key_that_comes_again_is_a_sample_with_an_id_of_its_own(write_tar, png, between):
    members = [*triple("k", png(0)), *(m for key in between for m in triple(key, png(1))), *triple("k", png(2))]
    samples = read(write_tar("s.tar", members))
    assert [(s.key, s.image, s.error, s.notes) for s in samples] == [
        ("k", png(0), None, []),
        *((key, png(1), None, []) for key in between),
        (f"k#{1 + len(between)}", png(2), None, ["key_again"]),
    ]
    assert [s.caption for s in samples] == ["a photo"] * len(samples)


def test_what_strays_from_a_sample_has_its_reason(write_tar, png):
    samples = read(write_tar("s.tar", [("k.png", png()), *triple("other", png(1)), ("k.txt", b"a photo")]))
    assert [(s.key, s.error) for s in samples] == [("k", None), ("other", None), ("k#2", "duplicate_key")]


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_images_or_captions_that_one_is_used_which_open_clip_takes(write_tar, png, order):
    members = [("k.jpg", png(0)), ("k.png", png(1)), ("k.txt", b"a photo"), ("k.caption", b"other"), ("k.cls", b"3")]
    [sample] = read(write_tar("s.tar", [*members, ("k.label", b"4")][::order]))
    assert (sample.image, sample.image_suffix, sample.caption, sample.label) == (png(0), "jpg", "a photo", 3)
    assert (sample.error, sample.notes) == (None, ["several_images"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["k.png", "k.jpg", "k.txt", "k.json", "m.png", "m.txt", "m.cls", "LICE"]), max_size=9))
def test_samples_are_those_of_open_clips_trainer_also_where_names_come_twice(names):
    importlib.import_module("dede_ray.runtime.libraries")  # repairs torchvision for the next line
    data = pytest.importorskip("open_clip_train.data")
    members = [(name, f"{name} {number}".encode()) for number, name in enumerate(names)]
    files = [{"fname": name, "data": content, "__url__": "s.tar"} for name, content in members]
    expected = [
        (s["__key__"], s.get("jpg", s.get("png")), s.get("txt", b"").decode() or None)
        for s in data.group_by_keys_nothrow(files)
    ]
    found = [*iter_samples(io.BytesIO(packed(members)), Limits())]
    assert [(s.key.removesuffix(f"#{s.index}"), s.image, s.caption) for s in found] == expected
    assert all((s.error is None) == (s.image is not None) for s in found)


def test_a_sample_without_an_image_says_so(write_tar):
    [sample] = read(write_tar("s.tar", [("k.txt", b"only words")]))
    assert sample.error == "no_image"


@pytest.mark.parametrize(
    ("member", "limits", "reason"),
    [
        (("k.txt", b"\xff\xfe\x00"), LIMITS, "caption_unreadable"),
        (("k.txt", "caf\u00e9".encode("latin-1")), LIMITS, "caption_unreadable"),
        (("k.txt", b"word " * 10), Limits(max_caption_chars=20), "caption_too_long"),
        (("k.txt", "\u732b".encode() * 30), Limits(max_caption_chars=20, max_member_bytes=4500), "caption_too_long"),
        (("k.cls", b"cat"), LIMITS, "label_unreadable"),
        (("k.cls", b""), LIMITS, "label_unreadable"),
        (("k.cls", b"99999999999"), LIMITS, "label_unreadable"),
        (("k.cls", b"3.0"), LIMITS, "label_unreadable"),
        (("k.cls", b"[3]"), LIMITS, "label_unreadable"),
        (("k.cls", b'{"label": 3}'), LIMITS, "label_unreadable"),
        (("k.cls", b"1" * 5000), Limits(max_member_bytes=4500), "label_unreadable"),
    ],
)
def test_a_bad_caption_or_label_is_a_note_and_the_image_is_used(write_tar, png, member, limits, reason):
    members = [*triple("before", png()), ("k.png", png()), member, *triple("z", png())]
    samples = read(write_tar("s.tar", members), limits)
    assert [(s.error, s.notes, s.image) for s in samples] == [(None, n, png()) for n in ([], [reason], [])]
    assert reason in NOTES
    assert set(NOTES) < set(REASONS)
    [_, sample, _] = samples
    assert sample.label is None
    if reason == "caption_too_long":
        assert (len(sample.caption), sample.caption) == (20, member[1].decode()[:20])


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(["cls", "txt", "json", "caption", "label"]), st.binary(max_size=60)), st.data())
def test_whatever_stands_beside_a_good_image_it_is_read_and_counted(beside, data):
    image = encode_image(np.zeros((8, 8, 3), np.uint8), "png")
    members = data.draw(st.permutations([("k.png", image), *((f"k.{name}", text) for name, text in beside.items())]))
    source = data.draw(st.sampled_from([CaptionFrom(), CaptionFrom(field="caption"), CaptionFrom(member="json")]))
    limits = Limits(max_caption_chars=20, caption=source)
    [sample] = iter_samples(io.BytesIO(packed(members)), limits)
    reading = Reading(Path("nowhere"), 8, 8, limits, None)
    [row] = decode(Shard("s.tar", "s.tar", 0), 0, [sample], reading).to_pylist()
    assert (row["error"], row["key"], len(row["pixels"])) == ([None], ["k"], 8 * 8 * 3)
    assert set(row["notes"][0] or ()) == set(sample.notes) <= set(NOTES)


def test_a_pickle_in_a_shard_is_never_opened(write_tar, png, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    bomb = pickle.dumps(Bomb())
    suffixes = ("pyd", "pickle", "pkl", "pt", "pth", "npy", "npz", "json", "bin")
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
        ("good.txt", b"once more"),
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
        (32, 32, 3),
        "duplicate_key",
    ]
    assert {reason for reason in outcome if isinstance(reason, str)} <= set(REASONS)


# --- listing


def test_of_many_shards_the_first_blocks_are_looked_at_together(write_tar, png, tmp_path, monkeypatch):
    path = write_tar("shards/00.tar", triple("k", png()))
    for number in range(1, 48):
        os.link(path, path.with_name(f"{number:02d}.tar"))
    asked: list[str] = []

    def slowly(url: str) -> bytes:  # as a store answers
        asked.append(url)
        time.sleep(0.1)
        return path.read_bytes()[:NUM_BYTES]

    monkeypatch.setattr(shards, "read_start", slowly)
    started = time.monotonic()
    assert len(list_shards(str(tmp_path / "shards"))) == len(asked) == 48
    assert time.monotonic() - started < 48 * 0.1 / 2


def test_a_folder_of_folders_is_not_looked_into_but_told_of(write_tar, png, tmp_path):
    write_tar("shards/cc3m/0.tar", triple("k", png()))
    with pytest.raises(Mistake, match=r"Its sub-folders have some: write .*shards/\*/\*\.tar$"):
        list_shards(str(tmp_path / "shards"))


def test_a_suffix_in_capitals_is_one(write_tar, png, tmp_path):
    for name in ("a.TAR", "b.Tar.GZ", "c.tar"):
        write_tar(f"shards/{name}", triple("k", png()))
    assert [shard.name for shard in list_shards(str(tmp_path / "shards"))] == ["a.TAR", "b.Tar.GZ", "c.tar"]


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


def test_where_names_clash_as_much_of_the_folders_as_makes_them_unique_comes_before(write_tar, png, tmp_path):
    names = ["cc3m/0.tar", "cc12m/0.tar", "cc12m/1.tar", "x/train/2.tar", "y/train/2.tar", "x/test/2.tar"]
    for name in names:
        write_tar(name, triple("k", png()))
    shards = list_shards([str(tmp_path / folder) for folder in ("cc3m", "cc12m", "x/train", "y/train", "x/test")])
    assert [shard.name for shard in shards] == [
        "1.tar", "cc12m--0.tar", "cc3m--0.tar", "test--2.tar", "x--train--2.tar", "y--train--2.tar"
    ]  # fmt: skip
    assert [Path(shard.url).relative_to(tmp_path).as_posix() for shard in shards] == [
        names[i] for i in (2, 1, 0, 5, 3, 4)
    ]
    with pytest.raises(Mistake, match=r"1 shards are named twice, such as .*cc3m/0\.tar"):
        list_shards([str(tmp_path / "cc3m"), str(tmp_path / "cc3m" / "0.tar")])


def test_names_that_clash_stay_file_names(write_tar, png, tmp_path):
    long = ["a" * 240 + "/s.tar", "b" * 240 + "/s.tar", "a/b--s.tar", "a--b/s.tar"]
    shards = list_shards([str(write_tar(name, triple("k", png()))) for name in long])
    names = [shard.name for shard in shards]
    assert len(set(names)) == 4
    assert all(len(name.encode()) <= 200 and "/" not in name and name.endswith("s.tar") for name in names)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"not a tar" * 200, "no tar"),
        (b"\x1f\x8b rubbish", "bad gzip data"),
        (gzip.compress(b"not a tar" * 200), "no tar"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>sign in</html>", "a web page"),
        (b"\x28\xb5\x2f\xfd rest", "compressed with Zstandard: unpack it first"),
        (bz2.compress(bytes(2000)), "compressed with bzip2"),
        (lzma.compress(bytes(2000)), "compressed with xz"),
        (b"PK\x03\x04 rest", "a ZIP archive"),
    ],
)
def test_a_file_that_is_no_tar_is_named_with_what_it_is(write_tar, png, tmp_path, content, what):
    write_tar("good.tar", triple("k", png()))
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(Mistake, match=rf"1 of 2 shards.*\n.*bad\.tar: .*{what}"):
        list_shards(str(tmp_path))


@pytest.mark.parametrize("name", ["a.tar.zst", "a.tar.bz2", "a.tar.xz", "a.txz", "a.TAR.ZST"])
def test_a_compressed_tar_is_found_and_refused_by_name(write_tar, png, tmp_path, name):
    write_tar("good.tar", triple("k", png()))
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd rest")
    for pattern in (tmp_path, tmp_path / "*", tmp_path / name):
        with pytest.raises(Mistake, match=rf"{name}: no tar, but compressed with Zstandard"):
            list_shards(str(pattern))
    assert len(list_shards(str(tmp_path / "*.tar"))) == 1


def test_a_file_named_that_is_no_shard_is_refused_with_what_it_is(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(Mistake, match=r"a\.parquet is no shard by its name, and its content is a Parquet file"):
        list_shards(str(tmp_path / "a.parquet"))


def test_empty_shards_are_passed_over_and_counted(write_tar, png, tmp_path, caplog):
    write_tar("c.tar", triple("k", png()))
    write_tar("a.tar", [])
    write_tar("e.tar.gz", [])
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "d.tar").write_bytes((tmp_path / "c.tar").read_bytes()[:700])  # a cut one is for the reader to count
    assert [shard.name for shard in list_shards(str(tmp_path))] == ["c.tar", "d.tar"]
    assert "3 of 5 shards are empty and passed over, such as" in caplog.text
    with pytest.raises(Mistake, match=r"all 2 shards are empty, such as .*a\.tar"):
        list_shards(str(tmp_path / "[ab].tar"))


def test_shards_are_looked_at_sixteen_at_a_time_and_a_block_each(monkeypatch, write_tar, png, tmp_path):
    import dede_ray.data.shards

    path = write_tar("s.tar", triple("k", png()))
    for number in range(64):
        (tmp_path / f"{number}.tar").hardlink_to(path)
    asked = []

    def slow(url):
        time.sleep(0.02)
        asked.append(len(read_start(url)))
        return read_start(url)

    monkeypatch.setattr(dede_ray.data.shards, "read_start", slow)
    started = time.monotonic()
    assert len(list_shards(str(tmp_path))) == 65
    assert time.monotonic() - started < 65 * 0.02
    assert asked == [512] * 65


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
