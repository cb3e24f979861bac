"""The shard doctor finds what is odd, agrees with the score pass, and changes and executes nothing."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from dede_ray.data.images import decode_image
from dede_ray.data.ledger import read_parts
from dede_ray.data.near_duplicates import first_near, hamming, perceptual_hash
from dede_ray.data.passes import PassResources, run_pass
from dede_ray.data.shards import (
    NOTES,
    REASONS,
    BadSample,
    Limits,
    Sample,
    ShardEnd,
    iter_samples,
    list_shards,
    sample_id,
    write_shards,
)
from dede_ray.ingest.check import DUPLICATE_SCHEMA, FINDING_SCHEMA, FINDINGS, SAMPLE_SCHEMA, CheckConfig, check
from dede_ray.runtime.config import Mistake, load, read_json

ROOT = Path(__file__).parents[2]
LIMITS = Limits(max_pixels=90_000, max_member_bytes=300_000, max_caption_chars=300)


def saved(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def findings(output: Path) -> list[dict]:
    paths = sorted((output / "findings").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path, schema=FINDING_SCHEMA).to_pylist()]


def samples(output: Path) -> dict[str, dict]:
    paths = sorted((output / "samples").glob("*.parquet"))
    return {row["sample_id"]: row for p in paths for row in pq.read_table(p, schema=SAMPLE_SCHEMA).to_pylist()}


def groups(output: Path) -> dict[str, set[str]]:
    """First sample of each group of look-alikes -> all of them."""
    found: dict[str, set[str]] = {}
    for row in pq.read_table(output / "duplicates.parquet", schema=DUPLICATE_SCHEMA).to_pylist():
        found.setdefault(row["group_id"], set()).add(row["sample_id"])
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- one shard for each kind of finding


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def members_with(picture, bomb: bytes) -> dict[str, list[tuple[str, bytes]]]:
    """For each kind of finding about a sample: members that show it, of key k."""
    rgb = Image.fromarray(picture(1000))
    grey_HW = picture(1000)[:, :, 0]
    sideways = Image.Exif()
    sideways[0x0112] = 6
    frames = [Image.fromarray(picture(number)) for number in (1000, 1001)]
    image = saved(rgb)
    other = [("other.png", saved(picture(1001))), ("other.txt", b"another")]

    def with_image(content: bytes, suffix: str = "png") -> list[tuple[str, bytes]]:
        return [(f"k.{suffix}", content), ("k.txt", b"a picture")]

    def with_caption(text: str | bytes) -> list[tuple[str, bytes]]:
        return [("k.png", image), ("k.txt", text.encode() if isinstance(text, str) else text)]

    def with_name(name: str) -> list[tuple[str, bytes]]:
        return [(f"{name}.png", image), (f"{name}.txt", b"a picture")]

    return {
        "no_image": [("k.txt", b"words")],
        "image_of_other_format": [("k.gif", saved(rgb, "GIF")), ("k.txt", b"words")],
        "image_unreadable": with_image(b"<html>404</html>"),
        "image_truncated": with_image(saved(rgb, "JPEG")[:-80], "jpg"),
        "image_too_large": with_image(saved(Image.new("1", (400, 300)))),
        "member_too_large": with_image(bytes(400_000)),
        "caption_unreadable": with_caption(b"\xff\xfe\x00"),
        "caption_too_long": with_caption("word " * 100),
        "label_unreadable": [*with_image(image), ("k.cls", b"cat")],
        "duplicate_key": [*with_image(image), *other, ("k.txt", b"a picture again")],
        "key_again": [*with_image(image), *other, *with_image(image)],
        "several_images": [*with_image(image), ("k.jpg", saved(rgb, "JPEG"))],
        "caption_missing": [("k.png", image)],
        "dangerous_member": [*with_image(image), ("k.pyd", bomb)],
        "repeated_member": [*with_image(image), ("k.caption", b"another")],
        "interleaved_members": [("k.png", image), *other, ("k.txt", b"a picture")],
        "key_empty": [("a/.png", image), ("a/.txt", b"a picture")],
        "key_not_utf8": with_name("caf\udce9"),
        "key_odd_characters": with_name("a\u202eb\x1b[2J"),
        "key_path_like": with_name("../../etc/passwd"),
        "key_too_long": with_name("k" * 201),
        "image_wrong_suffix": with_image(image, "jpg"),
        "image_small": with_image(saved(picture(1000, 20, 60))),
        "image_elongated": with_image(saved(picture(1000, 40, 170))),
        "image_uniform": with_image(saved(Image.new("RGB", (64, 64), (250, 250, 250)))),
        "caption_empty": with_caption(" \n"),
        "caption_json": with_caption('["a photo", "of a thing"]'),
        "caption_control_characters": with_caption("a \x07 bell"),
        "caption_hidden_characters": with_caption("gpj\u202e.exe"),
        "label_without_name": [*with_image(image), ("k.cls", b"12")],
        "image_animated": with_image(saved(frames[0], save_all=True, append_images=frames[1:])),
        "image_cmyk": with_image(saved(rgb.convert("CMYK"), "JPEG"), "jpg"),
        "image_16bit": with_image(saved(grey_HW.astype(np.uint16) * 257)),
        "image_palette": with_image(saved(rgb.quantize(64))),
        "image_alpha": with_image(saved(rgb.convert("RGBA"))),
        "image_rotated": with_image(saved(rgb, "JPEG", exif=sideways), "jpg"),
        "caption_not_nfc": with_caption("cafe\u0301"),
        "caption_url": with_caption("see www.example.org"),
    }  # fmt: skip


ABOUT_SAMPLES = sorted(members_with(lambda *_: np.zeros((8, 8, 3), np.uint8), b""))
ABOUT_SHARDS = (
    "shard_unreadable", "shard_ends_early", "shard_without_end", "shard_data_after_end", "shard_gzipped", "shard_empty",
    "special_member", "ignored_members", "shard_truncated", "stray_members",
    "image_elsewhere", "caption_elsewhere",
)  # fmt: skip
ACROSS_SHARDS = (
    "classes_unreadable", "exact_duplicate", "near_duplicate", "duplicate_relabelled", "key_in_other_shard",
    "caption_repeated", "shard_size_odd", "search_capped",
)  # fmt: skip


@pytest.fixture(scope="module")
def ward(picture, png, write_tar_in, local_ray, tmp_path_factory) -> Path:
    """`shards/<kind>.tar`, one for each kind, between two good samples; `checked`, what the doctor says of them."""
    folder = tmp_path_factory.mktemp("ward")
    shards = folder / "shards"
    bomb = pickle.dumps(Bomb(folder / "exploded"))

    def good(number: int) -> list[tuple[str, bytes]]:
        return [(f"good{number}.png", png(number)), (f"good{number}.txt", b"a good one"), (f"good{number}.cls", b"1")]

    for number, (kind, members) in enumerate(members_with(picture, bomb).items()):
        write_tar_in(shards / f"{kind}.tar", [*good(2 * number), *members, *good(2 * number + 1)])
    three = [*good(100), *good(101), *good(102)]
    for kind in ABOUT_SHARDS:
        write_tar_in(shards / f"{kind}.tar", three)
    write_tar_in(shards / "shard_gzipped.tar.gz", three)
    (shards / "shard_gzipped.tar").unlink()
    write_tar_in(shards / "ignored_members.tar", [*three, ("good102.json", b"{}"), ("good102.npy", bomb)])
    compound = [m for i in range(3) for m in ((f"{i}.input.png", png(200 + i)), (f"{i}.txt", b"words"))]
    write_tar_in(shards / "image_elsewhere.tar", [*three, *compound])
    in_json = [m for i in range(3) for m in ((f"{i}.png", png(210 + i)), (f"{i}.json", b'{"caption": "a thing"}'))]
    write_tar_in(shards / "caption_elsewhere.tar", [*three, *in_json])
    write_tar_in(
        shards / "stray_members.tar", [("._good100.png", b"mac"), *three[:1], ("LICENSE", b"free"), *three[1:]]
    )
    (shards / "shard_unreadable.tar").write_bytes(b"<html>not here</html>" * 100)
    content = (shards / "shard_ends_early.tar").read_bytes()
    third = content.index(b"good102.png")
    (shards / "shard_ends_early.tar").write_bytes(content[:third] + b"\x07" * 512 + content[third + 512 :])
    (shards / "shard_truncated.tar").write_bytes(content[: third + 700])
    (shards / "shard_without_end.tar").write_bytes(content[:third])
    (shards / "shard_data_after_end.tar").write_bytes(content * 2)
    for kind in ("special_member", "shard_empty"):
        with tarfile.open(shards / f"{kind}.tar", "a" if kind == "special_member" else "w") as tar:
            member = tarfile.TarInfo("here")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)
    (shards / "classes.json").write_text('{"names": ["zero", "one"], "templates": ["a {}"]}')
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards.iterdir()}
    check(CheckConfig(shards=str(shards), output=str(folder / "checked"), limits=LIMITS, workers=2))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards.iterdir()} == before
    assert not (folder / "exploded").exists()
    return folder


def test_every_kind_of_finding_has_a_test():
    tested = {*ABOUT_SAMPLES, *ABOUT_SHARDS, *ACROSS_SHARDS}
    assert set(FINDINGS) - set(REASONS) <= tested <= set(FINDINGS)


@pytest.mark.parametrize("kind", ABOUT_SAMPLES)
def test_what_is_odd_about_a_sample_is_found_there_and_nowhere_else(ward, kind):
    shard = f"{kind}.tar"
    found = {(row["kind"], row["sample_id"]) for row in findings(ward / "checked") if row["shard"] == shard}
    [concerned] = {name for this, name in found if this == kind}
    assert "good" not in concerned
    across = {"caption_repeated", "key_in_other_shard", "exact_duplicate", "near_duplicate"}
    also = {  # what cannot come alone
        "interleaved_members": {"duplicate_key", "caption_missing"},
        "dangerous_member": {"ignored_members"},
        "image_of_other_format": {"ignored_members"},
    }
    assert {this for this, name in found if name is None or "good" not in name} - across <= {kind, *also.get(kind, ())}
    assert {this for this, name in found if name is not None and "good" in name} <= across


@pytest.mark.parametrize("kind", ABOUT_SHARDS)
def test_what_is_odd_about_a_shard_is_found_there(ward, kind):
    names = {row["shard"] for row in findings(ward / "checked") if row["kind"] == kind}
    assert {name.partition(".")[0] for name in names} >= {kind}
    assert len(names) <= 5  # members that no job reads stand in the shards of other findings, too


def test_the_verdict_on_every_sample_is_that_of_the_score_pass(ward):
    good = [str(path) for path in sorted((ward / "shards").glob("*.tar*")) if path.name != "shard_unreadable.tar"]
    run_pass(
        list_shards(good), ward / "scores", Nothing, {}, image_size=32, made_with={}, chunk_size=100, limits=LIMITS,
        resources=PassResources(min_actors=1, cpus_per_actor=0.5, decode_cpus=0.5), max_error_fraction=1, name="test",
    )  # fmt: skip
    columns = ["sample_id", "content_hash", "shard", "index", "error"]
    for path in good:
        name = Path(path).name
        scored = read_parts(ward / "scores", name, columns)
        checked = pq.read_table(ward / "checked" / "samples" / f"{name}.parquet", columns=columns)
        assert checked.select(columns).to_pylist() == scored.select(columns).to_pylist(), name
    errors = {row["error"] for row in samples(ward / "checked").values()}
    assert errors == {None, *REASONS} & {None, *ABOUT_SAMPLES, "shard_truncated"} - {"caption_missing", *NOTES}


class Nothing:
    """A score pass without detectors."""

    image_size = 32
    columns: dict[str, pa.DataType] = {}  # noqa: RUF012

    def __call__(self, chunk):
        return {}


def test_strays_are_named_and_split_no_sample(ward):
    [detail] = [row["detail"] for row in findings(ward / "checked") if row["kind"] == "stray_members"]
    assert detail == "._good100.png, 2 in all"
    assert [row["index"] for row in samples(ward / "checked").values() if row["shard"] == "stray_members.tar"] == [
        0,
        1,
        2,
    ]


def test_what_may_have_been_meant_is_named_on_the_screen(ward, local_ray, tmp_path):
    shards = [str(ward / "shards" / f"{part}_elsewhere.tar") for part in ("image", "caption")]
    screen = check(CheckConfig(shards=shards, output=str(tmp_path / "checked")))
    assert "0.input.png: a key ends at the first dot of a name, so these are read as no image; rename them\n" in screen
    assert "3 members .json with a field `caption`: set limits.caption.field to caption" in screen
    details = [row["detail"] for row in findings(ward / "checked") if row["kind"] == "no_image"]
    assert details.count("but .input.png: keys end at the first dot of a name, so this is no image's suffix") == 3
    [detail] = [row["detail"] for row in findings(ward / "checked") if row["kind"] == "image_of_other_format"]
    assert detail == "but .gif, which is not read"


def test_what_stands_in_an_images_place_is_named(ward):
    [detail] = [row["detail"] for row in findings(ward / "checked") if row["kind"] == "image_unreadable"]
    assert "web page" in detail


def test_what_a_stranger_wrote_is_shown_but_not_obeyed(ward):
    printed = yaml.safe_dump(read_json(ward / "checked" / "run.json", "run")["result"]["summary"])
    details = [row["detail"] for row in findings(ward / "checked")]
    assert all(detail.isprintable() for detail in details)
    assert not {"\x1b", "\u202e"} & set(printed)
    assert any("\\x1b[2J" in detail for detail in details)


def test_the_summary_counts_everything_and_fits_on_a_screen(ward):
    summary = read_json(ward / "checked" / "summary.json", "summary")
    rows = findings(ward / "checked")
    assert {kind: found["count"] for kind, found in summary["findings"].items()} == {
        kind: sum(row["kind"] == kind for row in rows) for kind in {row["kind"] for row in rows}
    }
    everything = samples(ward / "checked")
    assert summary["samples"] == len(everything)
    assert summary["usable"] == sum(row["error"] is None for row in everything.values())
    assert summary["width_px"]["max"] == max(row["width"] or 0 for row in everything.values()) == 400
    text = read_json(ward / "checked" / "run.json", "run")["result"]["summary"]
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines())) <= 180


def test_good_shards_have_no_findings(local_ray, tmp_path):
    rng = np.random.default_rng(0)
    mosaics = [rng.integers(0, 256, (16, 16, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1) for _ in range(60)]
    samples = (Sample(f"{i:02d}", i, saved(m), "png", caption=f"picture {i}", label=i) for i, m in enumerate(mosaics))
    write_shards(tmp_path / "shards", "train", samples, 20)
    text = check(CheckConfig(shards=str(tmp_path / "shards"), output=str(tmp_path / "checked")))
    assert findings(tmp_path / "checked") == []
    assert text.startswith("60 samples in 3 shards: 60 can be used, 0 cannot\n")


def test_a_job_over_rubbish_ends_with_a_report(local_ray, tmp_path):
    (tmp_path / "shards").mkdir()
    for number, content in enumerate((b"", b"rubbish" * 1000, b"\x1f\x8b rubbish", b"\0" * 10240, os.urandom(5000))):
        (tmp_path / "shards" / f"{number}.tar").write_bytes(content)
    (tmp_path / "shards" / "classes.json").write_text("[" * 10_000)
    text = check(CheckConfig(shards=str(tmp_path / "shards"), output=str(tmp_path / "checked")))
    assert "0 samples in 5 shards" in text
    kinds = [row["kind"] for row in findings(tmp_path / "checked")]
    assert (kinds.count("shard_unreadable"), kinds.count("shard_empty")) == (3, 2)
    assert "classes_unreadable" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow has something to say about most of them
def test_hostile_shards_end_as_they_do_in_every_other_job(local_ray, tmp_path):
    import hostile

    (tmp_path / "shards").mkdir()
    expected, cut = {}, set()
    for number, case in enumerate(hostile.SHARDS):
        name, end = f"{number:03d}.{case.suffix}", ShardEnd()
        content = case.build()
        (tmp_path / "shards" / name).write_bytes(content)
        for sample in iter_samples(io.BytesIO(content), Limits(), end=end):
            expected[sample_id(name, sample.key)] = sample.error or why_undecoded(sample.image)
        if not end.is_complete:
            cut.add(name)
    check(CheckConfig(shards=str(tmp_path / "shards"), output=str(tmp_path / "checked"), near_distance=None))
    assert {name: row["error"] for name, row in samples(tmp_path / "checked").items()} == expected
    kinds = {"shard_unreadable", "shard_ends_early", "shard_without_end"}
    assert {row["shard"] for row in findings(tmp_path / "checked") if row["kind"] in kinds} >= cut
    assert len(cut) > 5
    assert not hostile.SENTINEL.exists()


def why_undecoded(content: bytes) -> str | None:
    try:
        decode_image(content, Limits(), size_px=32)
    except BadSample as bad:
        return bad.reason


# --- look-alikes


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """24 different views cut from scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    return [
        image[top : top + 200, left : left + 200]
        for image in load_sample_images().images
        for top in (0, 105, 210)
        for left in (0, 140, 280, 420)
    ]


def variants(image_HWC: np.ndarray) -> dict[str, np.ndarray]:
    image = Image.fromarray(image_HWC)
    coarse = Image.open(io.BytesIO(saved(image, "JPEG", quality=30)))
    return {
        "encoded anew": np.asarray(coarse),
        "scaled": np.asarray(image.resize((77, 77), Image.Resampling.LANCZOS)),
        "brighter": np.minimum(image_HWC.astype(int) + 20, 255).astype(np.uint8),
        "less contrast": (image_HWC * 0.8 + 20).astype(np.uint8),
        "cropped": image_HWC[1:-1, 1:-1],
        "grey": np.repeat(np.asarray(image.convert("L"))[:, :, None], 3, axis=2),
    }


def test_variants_of_a_photograph_hash_alike_and_others_do_not(photographs):
    hash_N = np.array([perceptual_hash(image) for image in photographs], np.uint64)
    for name in variants(photographs[0]):
        changed_N = np.array([perceptual_hash(variants(image)[name]) for image in photographs], np.uint64)
        assert (hamming(hash_N, changed_N) <= 4).mean() >= 0.9, name
    one, other = np.triu_indices(len(hash_N), 1)
    assert hamming(hash_N[one], hash_N[other]).min() > 10


def test_groups_hold_the_variants_of_one_picture(photographs, write_tar, local_ray, tmp_path):
    originals = [(f"a{i:02d}.png", saved(image)) for i, image in enumerate(photographs)]
    write_tar("shards/a.tar", [m for name, image in originals for m in ((name, image), (name[:3] + ".cls", b"1"))])
    again = [m for i in range(4) for m in ((f"b{i:02d}.png", originals[i][1]), (f"b{i:02d}.cls", b"1" if i else b"2"))]
    write_tar("shards/b.tar", [*again, ("b09.jpg", saved(photographs[0], "JPEG", quality=50))])
    output = tmp_path / "checked"
    check(CheckConfig(shards=str(tmp_path / "shards"), output=str(output), captions=False))
    expected = {f"a.tar/a{i:02d}": {f"a.tar/a{i:02d}", f"b.tar/b{i:02d}"} for i in range(4)}
    expected["a.tar/a00"].add("b.tar/b09")
    assert groups(output) == expected
    found = {(row["kind"], row["sample_id"]) for row in findings(output)}
    assert found == {
        *(("exact_duplicate", f"b.tar/b{i:02d}") for i in range(4)),
        ("near_duplicate", "b.tar/b09"),
        ("duplicate_relabelled", "b.tar/b00"),
    }
    assert read_json(output / "summary.json", "summary")["look_alikes"]["largest"][0]["first"] == "a.tar/a00"


def test_nearly_uniform_pictures_are_no_group(write_tar, local_ray, tmp_path):
    rng = np.random.default_rng(0)
    white = [(f"k{i}.jpg", saved((250 + rng.integers(0, 4, (64, 64, 3))).astype(np.uint8), "JPEG")) for i in range(9)]
    write_tar("shards/s.tar", white)
    check(CheckConfig(shards=str(tmp_path / "shards"), output=str(tmp_path / "checked"), captions=False))
    assert groups(tmp_path / "checked") == {}
    assert [row["kind"] for row in findings(tmp_path / "checked")] == ["image_uniform"] * 9


def clustered(num: int, seed: int) -> np.ndarray:
    """Random hashes, each second one made of an earlier one by turning over up to six bits."""
    rng = np.random.default_rng(seed)
    hash_N = rng.integers(0, 2**64, num, np.uint64, endpoint=False)
    for i in range(1, num, 2):
        bits = rng.choice(64, rng.integers(0, 7), replace=False).astype(np.uint64)
        hash_N[i] = hash_N[rng.integers(i)] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    return hash_N


@pytest.mark.parametrize(("num", "distance"), [(1, 4), (500, 0), (500, 1), (500, 4), (3000, 8)])
def test_near_hashes_are_found_as_if_all_had_been_compared(num, distance):
    hash_N = clustered(num, seed=distance)
    leaders: list[int] = []
    expected = []
    for i in range(num):
        near = np.flatnonzero(hamming(hash_N[leaders], np.full(len(leaders), hash_N[i])) <= distance)
        expected.append(leaders[near[0]] if len(near) else i)
        if not len(near):
            leaders.append(i)
    assert len(leaders) < num or num == 1
    first_N, num_cut = first_near(hash_N, distance)
    assert (first_N.tolist(), num_cut) == (expected, 0)


def test_made_up_hashes_cost_little_and_what_was_left_out_is_counted():
    crowd = np.arange(20_000, dtype=np.uint64)  # they differ in 15 bits only: all agree in most blocks
    started = time.monotonic()
    _, num_cut = first_near(crowd, 4, most_neighbours=100, most_pairs=100_000)
    assert num_cut > 10_000
    assert time.monotonic() - started < 10
    assert first_near(np.zeros(100_000, np.uint64), 4) == (pytest.approx(0), 0)  # equal ones are one


def test_a_capped_search_is_said(local_ray, write_pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(first_near, "__defaults__", (0, 0))
    write_pictures(tmp_path / "shards", range(60))
    text = check(CheckConfig(shards=str(tmp_path / "shards"), output=str(tmp_path / "checked"), near_distance=10))
    assert "search_capped" in text


# --- across shards


def test_keys_captions_and_sizes_are_compared_across_shards(write_tar, png, local_ray, tmp_path):
    for shard, num in enumerate((8, 8, 1)):
        members = [(f"k{i}.png", png(10 * shard + i)) for i in range(num)]
        captions = [(f"k{i}.txt", f"caption {i % 4} of {shard}".encode()) for i in range(num)]
        write_tar(f"shards/{shard}.tar", [m for pair in zip(members, captions, strict=True) for m in pair])
    (tmp_path / "shards" / "classes.json").write_text('{"labels": []}')
    check(CheckConfig(shards=str(tmp_path / "shards"), output=str(tmp_path / "checked")))
    found = [(row["kind"], row["sample_id"] or row["shard"], row["detail"]) for row in findings(tmp_path / "checked")]
    assert ("shard_size_odd", "2.tar", "1 samples; the median is 8") in found
    assert ("key_in_other_shard", "0.tar/k0", "in 3 shards") in found
    assert ("caption_repeated", "1.tar/k2", "2 samples: caption 2 of 1") in found
    kinds = [kind for kind, *_ in found]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "classes_unreadable": 1, "shard_size_odd": 1, "key_in_other_shard": 8, "caption_repeated": 8,
    }  # fmt: skip


# --- again and again


def test_the_number_of_workers_changes_no_byte(ward):
    output = ward / "checked_alone"
    check(CheckConfig(shards=str(ward / "shards"), output=str(output), limits=LIMITS, workers=1))
    one, two = contents(output), contents(ward / "checked")
    for files in (one, two):
        files.pop("run.json")  # names its own folder
    assert one == two


def test_a_killed_job_run_again_gives_the_same_bytes_and_redoes_nothing(write_pictures, local_ray, tmp_path):
    shards, output = tmp_path / "shards", tmp_path / "checked"
    write_pictures(shards, range(1200), per_shard=100)
    settings = {"shards": str(shards), "output": str(output), "workers": 1}
    (tmp_path / "check.yaml").write_text(yaml.safe_dump(settings))
    job = subprocess.Popen([sys.executable, str(ROOT / "jobs" / "check.py"), str(tmp_path / "check.yaml")])
    while len(list(output.glob("shards/*.json"))) < 2 and job.poll() is None:
        time.sleep(0.005)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    while True:  # the driver's death ends its Ray, a moment later
        finished = {path: path.stat().st_mtime_ns for path in output.glob("shards/*.json")}
        time.sleep(1)
        if {path: path.stat().st_mtime_ns for path in output.glob("shards/*.json")} == finished:
            break
    assert 2 <= len(finished) < 12
    (output / "samples" / ".train-00011.tar.parquet.0123abcd.tmp").write_bytes(b"half a file")
    check(CheckConfig(**settings))
    check(CheckConfig(**{**settings, "output": str(tmp_path / "undisturbed")}))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    one, two = contents(output), contents(tmp_path / "undisturbed")
    for files in (one, two):
        files.pop("run.json")
    assert one == two


def test_only_what_has_changed_since_is_examined_again(write_pictures, write_tar, png, local_ray, tmp_path):
    write_pictures(tmp_path / "shards", range(60))
    config = CheckConfig(shards=str(tmp_path / "shards"), output=str(tmp_path / "checked"))
    first = check(config)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checked" / "samples").iterdir()}
    assert check(config) == first
    write_tar("shards/train-00001.tar", [("k.png", png(90)), ("k.txt", b"\xff")])
    (tmp_path / "shards" / "train-00002.tar").unlink()
    assert "caption_unreadable" in check(config)
    later = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checked" / "samples").iterdir()}
    assert later.keys() == {"train-00000.tar.parquet", "train-00001.tar.parquet"}
    assert [name for name in later if later[name] != times[name]] == ["train-00001.tar.parquet"]


# --- mistakes


def test_fail_on_makes_the_job_fail_once_all_is_written(write_tar, png, local_ray, tmp_path):
    write_tar("shards/s.tar", [("k.png", png()), ("k.txt", b"\xff")])
    settings = {"shards": str(tmp_path / "shards"), "output": str(tmp_path / "checked")}
    for fail_on in (["caption_unreadable"], ["warning"], ["warning", "error"]):
        with pytest.raises(Mistake, match=r"(?s)1 samples in 1 shards.*fail_on names .*: caption_unreadable$"):
            check(CheckConfig(**settings, fail_on=fail_on))
    assert (tmp_path / "checked" / "summary.json").is_file()
    assert "caption_unreadable" in check(CheckConfig(**settings, fail_on=["error", "near_duplicate"]))
    with pytest.raises(ValueError, match=r"no finding is called .near_duplicates.; did you mean near_duplicate"):
        CheckConfig(**settings, fail_on=["near_duplicates"])


@pytest.mark.ray
def test_nothing_to_check_a_shard_named_twice_and_an_output_among_the_shards_are_mistakes(write_tar, png, tmp_path):
    output = str(tmp_path / "checked")
    with pytest.raises(Mistake, match=r"no shards at .*train-\*\.tar"):
        check(CheckConfig(shards=str(tmp_path / "train-*.tar"), output=output))
    for folder in ("one", "two"):
        write_tar(f"{folder}/s.tar", [("k.png", png())])
    with pytest.raises(Mistake, match=r"1 shards are named twice, such as .*s\.tar"):
        check(CheckConfig(shards=[str(tmp_path / "one"), str(tmp_path / "one" / "*.tar")], output=output))
    with pytest.raises(Mistake, match="is the folder of the shards"):
        check(CheckConfig(shards=str(tmp_path / "one"), output=str(tmp_path / "one")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_the_config_loads_and_opens_with_its_command():
    path = ROOT / "configs" / "digits" / "check.yaml"
    load(CheckConfig, [str(path)])
    assert path.read_text().startswith("# dede-ray check configs/digits/check.yaml\n")


# --- real data


def test_photographs_of_coco_are_sound_and_all_different(shared_data, local_ray, tmp_path):
    shards = str(shared_data / "coco_captions" / "test-00000.tar")
    before = hashlib.sha256(Path(shards).read_bytes()).hexdigest()
    check(CheckConfig(shards=shards, output=str(tmp_path / "checked")))
    assert hashlib.sha256(Path(shards).read_bytes()).hexdigest() == before
    summary = read_json(tmp_path / "checked" / "summary.json", "summary")
    assert (summary["samples"], summary["usable"], summary["formats"]) == (300, 300, {"JPEG": 300})
    assert set(summary["findings"]) <= {"ignored_members", "caption_not_nfc", "caption_repeated"}
