"""Sifting, on tars written here: what goes, what stays as it is, and who can read the lists."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import dede_ray.scan.sift
from dede_ray.data.ledger import BASE_SCHEMA
from dede_ray.data.shards import Limits, Sample, Shard, ShardEnd, iter_samples, list_shards, sample_id, why_unreadable
from dede_ray.runtime.config import Mistake
from dede_ray.scan.decisions import AssumedPoisonRate, FixedThreshold
from dede_ray.scan.manifest import DECISION_COLUMNS, write_manifest
from dede_ray.scan.sift import Flagged, Listed, SiftConfig, sift, sift_shard

ROOT = Path(__file__).parents[2]
SCHEMA = pa.schema([*BASE_SCHEMA, ("score", pa.float32()), *(pa.field(*column) for column in DECISION_COLUMNS)])


def samples_of(path: Path, end: ShardEnd | None = None) -> list[Sample]:
    """What a reader finds in a shard, unknown members included."""
    with open(path, "rb") as stream:
        return list(iter_samples(stream, Limits(), end=end, keep_others=True))


def scored(folder: Path, flagged: set[str], *, certified: bool = True) -> Path:
    """Write the manifest of a folder of shards, as scoring would; scores grow with the place in the shard."""
    shards = list_shards(str(folder))
    found = {shard.name: samples_of(Path(shard.url)) for shard in shards}
    hashes = Counter(sample.content_hash() for samples in found.values() for sample in samples)
    tables = []
    for name, samples in found.items():
        rows = [
            {
                "sample_id": sample_id(name, sample.key),
                "content_hash": sample.content_hash(),
                "shard": name,
                "index": sample.index,
                "notes": sample.notes or None,
                "error": sample.error,
                "score": None if sample.error else float(sample.index),
                "flagged": sample_id(name, sample.key) in flagged,
                "group_id": sample.content_hash() if hashes[sample.content_hash()] > 1 else None,
            }
            for sample in samples
        ]
        tables.append((name, pa.Table.from_pylist(rows, SCHEMA)))
    info = {
        "settings": {"limits": Limits().model_dump()},
        "victim": {},
        "score_columns": ["score"],
        "decision": {"certified": certified, "message": "cannot certify: need more" if not certified else "holds"},
        "counts": {"flagged": len(flagged)},
    }
    write_manifest(folder.parent / "scores", tables, info)
    return folder.parent / "scores"


def config(tmp_path: Path, **changes: object) -> SiftConfig:
    """Sift the shards of `<tmp_path>/shards` by their manifest."""
    given = {"shards": "shards", "manifest": "scores", "output": "out"}
    return SiftConfig.model_validate({**{name: str(tmp_path / path) for name, path in given.items()}, **changes})


@pytest.fixture
def corpus(tmp_path: Path, write_pictures: Callable[..., list[Path]]) -> Path:
    """Three shards of ten pictures, three of them flagged."""
    write_pictures(tmp_path / "shards", range(30), per_shard=10)
    scored(tmp_path / "shards", {"train-00000.tar/0003", "train-00001.tar/0010", "train-00001.tar/0019"})
    return tmp_path


def kept(folder: Path) -> list[str]:
    """Ids of the samples in the sifted shards."""
    return [sample_id(shard.name, s.key) for shard in list_shards(str(folder)) for s in samples_of(Path(shard.url))]


def sift_one(path: Path, places: set[int], verify: bool = True) -> Path:
    """Sift a single shard, in this process, of the samples at these places."""
    settings = config(path.parent, verify=verify)
    rows = [
        {"sample_id": sample_id(path.name, s.key), "index": s.index, "content_hash": s.content_hash()}
        for s in samples_of(path)
    ]
    columns = pa.schema([SCHEMA.field(name) for name in ("sample_id", "index", "content_hash")])
    pq.write_table(pa.Table.from_pylist(rows, columns), path.parent / "rows.parquet")
    shard = Shard(path.name, str(path), path.stat().st_size)
    sift_shard(shard, path.parent / "rows.parquet", sorted(places), Limits(), settings)
    return path.parent / "out" / path.name


def unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


# ------------------------------------------------------------------------------------------------ bytes


def raw_members(path: Path) -> list[tuple[str, bytes]]:
    """Each member's name and all its blocks, extended headers included."""
    content = unpacked(path)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    ends = [*(member.offset for member in members[1:]), members[-1].offset_data + -(-members[-1].size // 512) * 512]
    return [(m.name, content[m.offset : end]) for m, end in zip(members, ends, strict=True)]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_kept_members_keep_every_byte_and_their_order(tmp_path, png, form, name):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number in range(6):
            key = f"folder/{'very-long-' * 12 if number % 2 and form != tarfile.USTAR_FORMAT else ''}ü{number}"
            for suffix, content in {"jpg": png(number), "json": b"{}", "weird.npy": b"?" * 700, "txt": b"x"}.items():
                header = tarfile.TarInfo(f"{key}.{suffix}")
                header.size, header.mode, header.uid, header.uname = len(content), 0o640, number, "somebody"
                header.mtime = 1.5e9 + (0.25 if form == tarfile.PAX_FORMAT else 0)
                if form == tarfile.PAX_FORMAT:
                    header.pax_headers = {"comment": "kept"}
                tar.addfile(header, io.BytesIO(content))
    content = buffer.getvalue()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    sifted = sift_one(tmp_path / name, {1, 2, 5})
    expected = [member for place, member in enumerate(raw_members(tmp_path / name)) if place // 4 in {0, 3, 4}]
    assert raw_members(sifted) == expected
    assert len(unpacked(sifted)) % 10240 == 0
    assert sifted.read_bytes()[:2] == (tmp_path / name).read_bytes()[:2], "gzipped if it was"


def test_without_anything_to_drop_the_copy_is_the_same_file(tmp_path, write_pictures):
    (path,) = write_pictures(tmp_path, range(5))
    assert sift_one(path, set()).read_bytes() == path.read_bytes()


def test_what_strayed_from_a_dropped_sample_goes_with_it(corpus, local_ray, write_tar_in, png):
    mixed = [("a.png", png(1)), ("b.png", png(2)), ("a.txt", b"of a"), ("b.txt", b"of b")]
    members = [*mixed, ("c.npy", b"?"), ("c.png", png(3))]
    write_tar_in(corpus / "shards" / "train-00000.tar", members)
    scored(corpus / "shards", {"train-00000.tar/a"})
    sift(config(corpus))
    assert [name for name, _ in raw_members(corpus / "out" / "train-00000.tar")] == ["b.png", "b.txt", "c.npy", "c.png"]


def test_a_repeated_key_is_dropped_by_its_own_id(corpus, local_ray, write_tar_in, png):
    write_tar_in(corpus / "shards" / "train-00000.tar", [("a.png", png(1)), ("b.png", png(2)), ("a.png", png(3))])
    scored(corpus / "shards", {"train-00000.tar/a#2"})
    sift(config(corpus))
    found = samples_of(corpus / "out" / "train-00000.tar")
    assert [(s.key, s.image) for s in found] == [("a", png(1)), ("b", png(2))]


@pytest.mark.parametrize("gone", ["a", "a#1"])
def test_of_a_name_that_comes_twice_in_a_row_either_sample_is_dropped(corpus, local_ray, write_tar_in, png, gone):
    members = [("a.png", png(1)), ("a.txt", b"one"), ("a.png", png(2)), ("a.txt", b"two"), ("b.png", png(3))]
    write_tar_in(corpus / "shards" / "train-00000.tar", members)
    scored(corpus / "shards", {f"train-00000.tar/{gone}"})
    sift(config(corpus))
    found = samples_of(corpus / "out" / "train-00000.tar")
    left = ("a", png(2), "two") if gone == "a" else ("a", png(1), "one")
    assert [(s.key, s.image, s.caption) for s in found] == [left, ("b", png(3), None)]
    assert json.loads((corpus / "out" / "exclude" / "keys.json").read_text())["train-00000.tar"] == ["a"]


def test_a_tar_is_copied_up_to_its_end_and_no_further(tmp_path, write_pictures):
    (path,) = write_pictures(tmp_path, range(3))
    content = path.read_bytes()
    path.write_bytes(content + content)
    assert sift_one(path, set()).read_bytes() == content


class Tar(bytes):
    def __repr__(self) -> str:
        return f"<tar of {len(self):,} bytes>"  # a failure should not print pages of zeros


def test_files_of_no_sample_stay_and_end_none(tmp_path, write_tar, png):
    strays = ["LICENSE", "._k.png", ".DS_Store"]
    members = [(strays[0], b"free"), ("k.png", png(0)), (strays[1], b"mac"), ("k.txt", b"a"), (strays[2], b"mac")]
    path = write_tar("a.tar", [*members, ("m.png", png(1)), ("m.txt", b"b")])
    with tarfile.open(sift_one(path, {0})) as sifted:
        assert sifted.getnames() == [*strays, "m.png", "m.txt"]


@st.composite
def odd_tar(draw: st.DrawFn) -> Tar:
    """A tar of few keys in any order: images, captions, unknown members, folders, links and global headers."""
    buffer = io.BytesIO()
    form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        names = st.sampled_from(["a.jpg", "a.png", "a.txt", "b.jpg", "b.x.y", "c.jpg", "d/é.jpg", "d/é.cls", "e", ".f"])
        for number in range(draw(st.integers(1, 8))):
            header = tarfile.TarInfo(draw(names))
            kinds = [tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.AREGTYPE]
            header.type = draw(st.sampled_from(kinds))
            content = bytes([number]) * draw(st.sampled_from([0, 1, 511, 512, 513, 3000]))
            header.size = len(content) if header.isfile() else 0
            if form == tarfile.PAX_FORMAT and draw(st.booleans()):
                header.pax_headers = {"mtime": "1.5"}
            tar.addfile(header, io.BytesIO(content))
    return Tar(buffer.getvalue())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_samples_left_are_those_not_dropped_whatever_the_tar(tmp_path, data):
    """Also where it is cut off, or a byte is wrong; and a gzipped tar gives the same as a plain one."""
    content = bytearray(data.draw(odd_tar()))
    if data.draw(st.booleans()):
        content[data.draw(st.integers(512, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(600, len(content)))]
    plain, zipped = tmp_path / "a.tar", tmp_path / "b.tar"  # the reader looks at the content, not at the name
    plain.write_bytes(content)
    zipped.write_bytes(gzip.compress(content))
    assume(why_unreadable(Shard("a.tar", str(plain), 0)) is None)  # others are refused as a whole
    before, end = samples_of(plain), ShardEnd()
    assume(before)
    places = data.draw(st.sets(st.integers(0, len(before) - 1), max_size=len(before) - 1))
    sifted = sift_one(plain, places)
    after = samples_of(sifted, end)

    def seen(samples: list[Sample]) -> list[tuple]:
        return [(s.key.partition("#")[0], s.image, s.caption, s.label, s.others) for s in samples]

    left = seen([sample for sample in before if sample.index not in places])
    if len({key for key, *_ in left}) == len(left):  # pieces of one sample that meet again become one
        assert seen(after) == left
    whole = ShardEnd()
    samples_of(plain, whole)
    assert end.is_complete == whole.is_complete
    assert unpacked(sift_one(zipped, places)) == sifted.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in hostile.SHARDS if not case.is_refused], ids=lambda case: case.name)
def test_a_hostile_shard_loses_its_first_sample_and_nothing_else(tmp_path, case):
    path = tmp_path / "a.tar"
    path.write_bytes(case.build())
    before = samples_of(path)
    after = samples_of(sift_one(path, {0})) if len(before) > 1 else before[1:]
    assert [(s.image, s.caption, s.label) for s in after] == [(s.image, s.caption, s.label) for s in before[1:]]


# ------------------------------------------------------------------------------------------------ what goes


def test_flagged_samples_go_and_the_rest_stays_in_order(corpus, local_ray):
    summary = sift(config(corpus))
    gone = {"train-00000.tar/0003", "train-00001.tar/0010", "train-00001.tar/0019"}
    assert kept(corpus / "out") == [each for each in kept(corpus / "shards") if each not in gone]
    assert summary == f"27 of 30 samples kept, dropped: 3 flagged -> {corpus / 'out'}"
    counts = json.loads((corpus / "out" / "sift.json").read_text())["counts"]
    assert (counts["samples"], counts["kept"], counts["dropped"]) == (30, 27, {"flagged": 3})
    assert counts["bytes"] > counts["bytes_kept"] > 0


@pytest.mark.parametrize(
    ("drop", "places"),
    [
        (AssumedPoisonRate(score="score", rate=0.1), {9}),
        (FixedThreshold(score="score", threshold=8), {8, 9}),
        (Listed(path="list.txt"), {0, 4}),
        (Flagged(), set()),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_other_rules_pick_other_samples(tmp_path, local_ray, write_pictures, monkeypatch, drop, places):
    write_pictures(tmp_path / "shards", range(10), per_shard=10)
    scored(tmp_path / "shards", set())
    (tmp_path / "list.txt").write_text("train-00000.tar/0000\ntrain-00000.tar/0004\n")
    monkeypatch.chdir(tmp_path)
    sift(config(tmp_path, drop=drop))
    assert kept(tmp_path / "out") == [f"train-00000.tar/{n:04d}" for n in range(10) if n not in places]


def test_copies_and_unreadable_samples_go_when_asked(corpus, local_ray, write_tar_in, png):
    write_tar_in(
        corpus / "shards" / "train-00002.tar",
        [("x.png", png(3)), ("y.png", png(77)), ("z.txt", b"no image"), ("w.png", png(7)), ("w.jpg", b"?")],
    )
    scored(corpus / "shards", {"train-00000.tar/0003"})
    sift(config(corpus, duplicates=True, unreadable=True))
    assert [s.key for s in samples_of(corpus / "out" / "train-00002.tar")] == ["y"]
    reasons = json.loads((corpus / "out" / "sift.json").read_text())["counts"]["dropped"]
    assert reasons == {"duplicate": 1, "flagged": 1, "several_images": 1, "unreadable": 1}


def test_a_shard_with_nothing_left_is_not_written(corpus, local_ray):
    scored(corpus / "shards", {f"train-00001.tar/{n:04d}" for n in range(10, 20)})
    assert "1 of 3 shards have no sample left" in sift(config(corpus))
    assert [shard.name for shard in list_shards(str(corpus / "out"))] == ["train-00000.tar", "train-00002.tar"]


def test_a_decision_that_promises_nothing_is_said(corpus, local_ray):
    scored(corpus / "shards", set(), certified=False)
    assert "certifies nothing: cannot certify: need more" in sift(config(corpus))
    scored(corpus / "shards", set())
    assert sift(config(corpus, output=str(corpus / "out2"))).endswith("\nthe manifest flags nothing")


# ------------------------------------------------------------------------------------------------ mistakes


def test_shards_that_were_not_scored_are_refused(corpus, local_ray, write_pictures):
    write_pictures(corpus / "shards", [*range(12), 99, *range(13, 30)], per_shard=10)  # another picture 12
    with pytest.raises(Mistake, match=r"train-00001.tar is not the shard .* sample 2 is train-00001.tar/0099"):
        sift(config(corpus))
    with tarfile.open(corpus / "shards" / "train-00001.tar", "w") as tar:
        for number in range(10, 20):
            header = tarfile.TarInfo(f"{number:04d}.png")
            tar.addfile(header)
    with pytest.raises(Mistake, match=r"image of train-00001.tar/0010 has the SHA-256 e3b0c44298fc, the one scored"):
        sift(config(corpus, output=str(corpus / "out2"), verify=True))
    with pytest.raises(Mistake, match=r"image of train-00001.tar/0010"):
        sift(config(corpus, output=str(corpus / "out3")))
    scored_ones = Listed(path=str(corpus / "list.txt"))
    (corpus / "list.txt").write_text("train-00000.tar/0003\n")
    assert "29 of 30" in sift(config(corpus, output=str(corpus / "out4"), drop=scored_ones))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "shards"}, "the folder of the shards themselves"),
        ({"shards": ["shards/train-00000.tar"]}, "train-00001.tar, train-00002.tar in it, but not given"),
        ({"drop": {"kind": "fixed", "score": "dede", "threshold": 1}}, "the manifest has score"),
        ({"drop": {"kind": "listed", "path": "list.txt"}}, "first of them 'train-00000.tar/x'"),
        ({"drop": {"kind": "listed", "path": "nowhere.txt"}}, "nowhere.txt should list sample ids"),
        ({"manifest": "shards"}, "no manifest"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_said(corpus, local_ray, monkeypatch, changes, message):
    (corpus / "list.txt").write_text("train-00000.tar/x\n")
    monkeypatch.chdir(corpus)
    with pytest.raises(Mistake, match=re.escape(message)):
        sift(config(corpus, **changes))
    assert not list(corpus.glob("shards/*.json"))


def test_shards_that_moved_are_known_again_and_others_in_their_place_are_not(corpus, local_ray):
    sift(config(corpus))
    (corpus / "shards").rename(corpus / "moved")
    before, moved = content_of(corpus / "out"), config(corpus, shards=str(corpus / "moved"))
    assert "27 of 30 samples kept" in sift(moved)
    assert content_of(corpus / "out") == before
    run = json.loads((corpus / "out" / "run.json").read_text())
    (corpus / "out" / "run.json").write_text(json.dumps({"settings": run["settings"]}))
    (corpus / "out" / "parts" / "train-00001.tar.json").unlink()
    sift(moved)
    now = content_of(corpus / "out")
    assert [name for name in before if now[name] != before[name]] == ["run.json", "sift.json"]  # which say where it was
    shard = corpus / "moved" / "train-00001.tar"
    shard.write_bytes((corpus / "moved" / "train-00000.tar").read_bytes())
    with pytest.raises(Mistake, match=r"1 have changed since they were read:\n  train-00001\.tar: "):
        sift(moved)


def test_another_manifest_does_not_continue_in_the_same_folder(corpus, local_ray):
    sift(config(corpus))
    scored(corpus / "shards", {"train-00000.tar/0004"})
    with pytest.raises(Mistake, match="made with another manifest"):
        sift(config(corpus))


# ------------------------------------------------------------------------------------------------ resuming


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_rerun_makes_only_what_is_not_there(corpus, local_ray):
    sift(config(corpus))
    out, whole = corpus / "out", content_of(corpus / "out")
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    run = json.loads((out / "run.json").read_text())
    del run["result"]
    (out / "run.json").write_text(json.dumps(run))
    (out / "parts" / "train-00001.tar.json").unlink()  # as if killed between the shard and its receipt
    (out / ".train-00001.tar.tmp-123").write_bytes(b"half a shard")
    sift(config(corpus))
    assert content_of(out) == whole
    assert [p.name for p, t in times.items() if p.stat().st_mtime_ns != t] == ["train-00001.tar"]


@pytest.mark.slow
def test_a_killed_job_run_again_gives_the_same_bytes(tmp_path):
    """kill -9 in the middle of 60 shards of 2 MB."""
    content = np.random.default_rng(0).bytes(40_000)
    for number in range(60):
        (tmp_path / "shards").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "shards" / f"train-{number:05d}.tar", "w") as tar:
            for place in range(50):
                header = tarfile.TarInfo(f"{place:04d}.jpg")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    scored(tmp_path / "shards", {f"train-{number:05d}.tar/0007" for number in range(60)})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(output: str) -> subprocess.Popen[bytes]:
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump(config(tmp_path, output=output).model_dump(mode="json")))
        command = [sys.executable, str(ROOT / "jobs" / "sift.py"), str(path)]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)

    job = start("killed")
    while job.poll() is None and len(list(tmp_path.glob("killed/parts/*.json"))) < 5:
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/*.tar")}
    receipts = {path.stem for path in tmp_path.glob("killed/parts/*.json")}
    assert 5 <= len(receipts) < 60, "it was killed in the middle"
    assert start("killed").wait() == 0
    assert start("undisturbed").wait() == 0
    assert {p.name for p in before if p.name in receipts and p.stat().st_mtime_ns != before[p]} == set()
    killed, undisturbed = content_of(tmp_path / "killed"), content_of(tmp_path / "undisturbed")
    assert killed.pop("run.json") != undisturbed.pop("run.json"), "they name their folders"
    assert killed == undisturbed


# ------------------------------------------------------------------------------------------------ lists


def snippet(word: str) -> str:
    """The code with this word in the module's documentation."""
    blocks = re.findall(r"\n\n((?: {4}.*\n)+)", dede_ray.scan.sift.__doc__)
    (code,) = [block for block in blocks if word in block and "=" in block]
    return "\n".join(line[4:] for line in code.splitlines())


@pytest.fixture
def lists(corpus, local_ray, write_tar_in, png, monkeypatch) -> Path:
    """A folder with the lists of a corpus that has urls; no shards."""
    members = []
    for number in range(5):
        note = json.dumps({"url": f"http://localhost/{number}.png", "width": 32}).encode()
        members += [(f"k {number}é.png", png(number)), (f"k {number}é.json", note)]
    members += [("deep.png", png(9)), ("deep.json", b"[" * 100_000)]
    write_tar_in(corpus / "shards" / "train-00000.tar", members)
    flagged = {"train-00000.tar/k 1é", "train-00000.tar/k 3é", "train-00000.tar/deep", "train-00001.tar/0012"}
    scored(corpus / "shards", flagged)
    sift(config(corpus, lists_only=True))
    monkeypatch.chdir(corpus / "out")
    assert not list((corpus / "out").glob("*.tar"))
    return corpus


def test_the_lists_say_the_same_in_three_formats(lists):
    rows = pq.read_table("exclude/samples.parquet")
    assert Path("exclude/samples.txt").read_text() == (lists / "scores" / "flagged.txt").read_text()
    assert json.loads(Path("exclude/keys.json").read_text()) == {
        "train-00000.tar": ["deep", "k 1é", "k 3é"],
        "train-00001.tar": ["0012"],
    }
    assert rows["key"].to_pylist() == ["deep", "k 1é", "k 3é", "0012"]
    assert rows["url"].to_pylist() == [None, "http://localhost/1.png", "http://localhost/3.png", None]
    assert rows["reason"].to_pylist() == ["flagged"] * 4
    assert {*rows.column_names} > {"sample_id", "shard", "index", "score", "p_value", "content_hash"}


def test_a_list_can_be_sifted_by(lists):
    sift(config(lists, output=str(lists / "out2"), drop=Listed(path=str(lists / "out" / "exclude" / "samples.txt"))))
    assert len(kept(lists / "out2")) == 6 + 20 - 4


def test_webdataset_leaves_out_what_is_listed(lists):
    wds = pytest.importorskip("webdataset")
    data = wds.WebDataset(sorted(map(str, (lists / "shards").glob("*.tar"))), shardshuffle=False)
    assert len(list(data)) == 26
    found = {"json": json, "data": data}
    exec(snippet("keys.json"), found)
    expected = ["k 0é", "k 2é", "k 4é", *(f"{n:04d}" for n in range(10, 30) if n != 12)]
    assert [sample["__key__"] for sample in found["data"]] == expected


def test_links_without_the_listed_ones_are_what_img2dataset_gets(lists):
    pandas = pytest.importorskip("pandas")
    links = pandas.DataFrame({"url": [f"http://localhost/{n}.png" for n in range(7)], "caption": "x"})
    found = {"pandas": pandas, "links": links}
    exec(snippet("samples.parquet"), found)
    assert [*found["links"]["url"]] == [f"http://localhost/{n}.png" for n in (0, 2, 4, 5, 6)]


def test_open_clips_trainer_reads_the_sifted_shards(corpus, local_ray):
    pytest.importorskip("webdataset")
    importlib.import_module("dede_ray.runtime.libraries")  # repairs torchvision for the next line
    data = pytest.importorskip("open_clip_train.data")
    sift(config(corpus))
    shards = [{"url": str(path)} for path in sorted((corpus / "out").glob("*.tar"))]
    read = [s["__key__"] for s in data.tarfile_to_samples_nothrow(shards) if data.filter_no_caption_or_no_image(s)]
    assert read == [f"{n:04d}" for n in range(30) if n not in {3, 10, 19}]
