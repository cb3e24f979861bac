"""The samples that `check` and `score` find in a stranger's well-formed shards are those of webdataset's own reader."""

from __future__ import annotations

import importlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tars import packed, saved

from dede_ray.data.shards import find_shards, sample_id
from dede_ray.ingest.check import CheckConfig, check
from dede_ray.scan.manifest import read_manifest
from dede_ray.scan.score import ScoreConfig, score

Members = list[tuple[str, bytes]]
KINDS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "webp": "WEBP", "gif": "GIF", "JPG": "JPEG"}
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(46)


def picture(number: int, suffix: str = "png", **options) -> bytes:
    noise_HWC = np.random.default_rng(number).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    return saved(Image.fromarray(noise_HWC), KINDS[suffix], **options)


def pairs(key: str = "{:04d}", image: str = "png", text: str = "txt", content: bytes = b"a thing") -> Members:
    """Three samples."""
    names = [key.format(number) for number in range(3)]
    return [m for i, k in enumerate(names) for m in ((f"{k}.{image}", picture(i, image)), (f"{k}.{text}", content))]


def with_twins() -> Members:
    """As macOS packs a folder."""
    return [m for name, content in pairs("./{:04d}") for m in ((f"./._{name[2:]}", APPLE_DOUBLE), (name, content))]


def with_strays() -> Members:
    found = pairs()
    return [("LICENSE", b"free"), *found[:3], ("MANIFEST", b"x"), (".DS_Store", b"x"), *found[3:], ("__info__", b"x")]


def by_type() -> Members:
    return pairs()[::2] + pairs()[1::2]


def links_and_folders() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for kind, name in ((tarfile.DIRTYPE, "a.b"), (tarfile.SYMTYPE, "a.b/k.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return buffer.getvalue()[:1024] + packed(pairs("a.b/" + "deep/" * 30 + "{}"))


LABELS = [b"3", b"dog", b"3.0", b"3 5", b"[3]", b'{"label": 3}', b"", b"n02084071"]
CASES: dict[str, Callable[[], Members | bytes]] = {
    "plain": pairs,
    "labels": lambda: [
        m for i, text in enumerate(LABELS) for m in ((f"{i}.png", picture(i)), (f"{i}.txt", b"a"), (f"{i}.cls", text))
    ],
    "long_captions": lambda: pairs(content=b"a photo of a thing. " * 600),
    "latin_1_captions": lambda: pairs(content="caf\u00e9".encode("latin-1")),
    "apple_double": with_twins,
    "strays": with_strays,
    "unpacked_pax_headers": lambda: [("PaxHeaders.123/0000", b"30 mtime=1\n"), *pairs(), ("PaxHeaders/._x.png", b"x")],
    "compound_names": lambda: pairs(image="png", text="output.txt"),
    "dots_in_keys": lambda: [("22.05.png", picture(0)), ("22.10.png", picture(1)), *pairs("shots.v1/{}")],
    "captions_in_json": lambda: pairs(text="json", content=json.dumps({"caption": "a thing"}).encode()),
    "no_captions_here": lambda: pairs(text="tags"),
    "by_type": by_type,
    "keys_again_later": lambda: [*pairs(), *pairs()],
    "several_images": lambda: [m for i in "012" for m in ((f"{i}.png", picture(9)), (f"{i}.JPG", picture(9, "JPG")))],
    "other_formats": lambda: [*pairs("a{}", "gif"), *pairs("b{}", "jfif"), *pairs("c{}", "webp"), *pairs("d{}", "JPG")],
    "names_of_other_scripts": lambda: pairs("\u732b/\u00e9 {}"),
    "links_and_folders": links_and_folders,
    "masks_beside": lambda: [m for i in range(3) for m in ((f"{i}.seg.png", picture(9)), (f"{i}.png", picture(i)))],
}  # fmt: skip


def content_of(case: str) -> bytes:
    made = CASES[case]()
    return made if isinstance(made, bytes) else packed(made)


def by_webdataset(content: bytes) -> Iterator[tuple[str, set[str]]]:
    importlib.import_module("dede_ray.runtime.libraries")  # repairs torchvision for the next line
    tars = pytest.importorskip("webdataset.tariterators")
    for sample in tars.group_by_keys(tars.tar_file_expander([{"url": "s.tar", "stream": io.BytesIO(content)}])):
        yield sample["__key__"], {name for name in sample if not name.startswith("__")}


@pytest.fixture(scope="module")
def done(local_ray, victim_folder, tmp_path_factory) -> Path:
    """All cases, checked and scored by the jobs; every shard under a name that another has, too."""
    folder = tmp_path_factory.mktemp("strangers")
    for case in CASES:
        place = folder / "shards" / f"[{case}]" / "00000.tar"
        place.parent.mkdir(parents=True)
        place.write_bytes(content_of(case))
    shards = str(folder / "shards" / "*" / "*.tar")
    check(CheckConfig(shards=shards, output=str(folder / "checked")))
    settings = {
        "shards": shards, "output": str(folder / "scores"), "victim": {"path": str(victim_folder)},
        "detectors": [{"kind": "density", "k": 5, "lid_k": 5}], "max_error_fraction": 1, "findings": None,
        "decision": {"kind": "assumed_rate", "rate": 0.1, "score": "dao"},
        "resources": {"min_actors": 1, "cpus_per_actor": 0.5, "decode_cpus": 0.5},
    }  # fmt: skip
    score(ScoreConfig.model_validate(settings))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_check_and_score_find_the_samples_of_webdatasets_reader(done, case):
    [name] = [one.name for one in find_shards(str(done / "shards" / "*" / "*.tar")) if f"[{case}]" in one.url]
    table = read_manifest(done / "scores").table.to_pylist()
    scored = sorted((row for row in table if row["shard"] == name), key=lambda row: row["index"])
    checked = pq.read_table(done / "checked" / "samples" / f"{name}.parquet").to_pylist()
    assert [(row["sample_id"], row["error"]) for row in checked] == [(r["sample_id"], r["error"]) for r in scored]
    expected = [*by_webdataset(content_of(case))]
    assert expected
    ids = [row["sample_id"].removesuffix(f"#{row['index']}") for row in scored]
    assert ids == [sample_id(name, key) for key, _ in expected]
    images = {"png", "jpg", "jpeg", "jfif", "webp"}
    assert [row["error"] is None for row in scored] == [bool(suffixes & images) for _, suffixes in expected]
