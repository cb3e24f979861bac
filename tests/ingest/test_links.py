"""Lists of links become shards: whatever strangers' servers answer, every link is accounted for, once."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from website import Website

from dede_ray.data.images import decode_image, encode_image
from dede_ray.data.shards import Limits, Sample, iter_samples, list_shards, open_shard
from dede_ray.ingest import links
from dede_ray.ingest.ingest import IngestConfig, ingest
from dede_ray.runtime.config import Mistake, load

ROOT = Path(__file__).parents[2]
IMG2DATASET = importlib.util.find_spec("img2dataset")
needs_img2dataset = pytest.mark.skipif(IMG2DATASET is None, reason="img2dataset is absent: pip install -e '.[ingest]'")
LIMITS = {"max_pixels": 2_000_000, "max_member_bytes": 3_000_000, "max_caption_chars": 1000}
BOMB = encode_image(np.zeros((2000, 2000, 3), np.uint8), "png")  # 4 megapixels in a few kilobytes


@pytest.fixture
def website() -> Iterator[Website]:
    website = Website()
    yield website
    website.close()


@pytest.fixture
def photo(picture) -> Callable[..., bytes]:
    """Small pictures as JPEG files."""
    return lambda number=0, height=48, width=64: encode_image(picture(number, height, width), "jpg")


def settings(output: Path, path: Path | list[Path], **source) -> IngestConfig:
    """Two processes of four threads on a server of this machine; ten links per shard."""
    web = {"threads": 4, "timeout_s": 2, "link_timeout_s": 4, "retries": 1, "allow_private_addresses": True}
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    source = {"kind": "urls", "path": paths, "num_processes": 2, **source, "web": web | source.get("web", {})}
    described = {"source": source, "output": str(output), "samples_per_shard": 10, "limits": LIMITS}
    return IngestConfig.model_validate(described)


def account(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("train-*.parquet")) for row in pq.read_table(path).to_pylist()]


def samples(folder: Path) -> list[Sample]:
    found = []
    for shard in list_shards(str(folder)):
        with open_shard(shard) as stream:
            found += iter_samples(stream, Limits(), keep_others=True)
    return found


def output_bytes(folder: Path) -> dict[str, bytes]:
    """All files but the record of the run, which names the folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


# --- acceptance: a list as Conceptual Captions has it, 15 % of it bad


def conceptual_captions(website: Website, images: list[bytes]) -> list[tuple[str, str, str, str | None]]:
    """Put images on the website, some badly; return caption, link, hash and expected error of each row."""
    rows: list[tuple[str, str, str, str | None]] = []
    for number, image in enumerate(images):
        path, sha256 = f"/{number}.jpg", hashlib.sha256(image).hexdigest()
        website.files[path] = image
        link, error = path, None
        if number % 20 in (3, 9, 16):  # 15 %
            website.files[f"/half{path}"] = image[: len(image) * 3 // 4]
            website.files["/bomb.png"] = BOMB
            kinds = [
                (f"/missing{path}", "not_found"),
                (f"/silent{path}", "timeout"),
                (f"/loop{path}", "bad_redirect"),
                (f"/page{path}", "image_unreadable"),
                (f"/half{path}", "image_truncated"),
                (f"/cut{path}", "image_truncated"),
                ("/0.jpg", "duplicate"),
                ("/bomb.png", "image_too_large"),
                ("/endless", "image_too_large"),
                (path, "hash_mismatch"),
                (f"/optout{path}", "opted_out"),
                (f"/status/500{path}", "http_error"),
            ]
            link, error = kinds[(number // 20 * 3 + [3, 9, 16].index(number % 20)) % len(kinds)]
            sha256 = "0" * 64 if error == "hash_mismatch" else "" if error != "not_found" else sha256
        elif number % 20 == 11:
            link = f"/redirect{path}"
        rows.append((f'a "photo" of {number}, naïve', website.url + link, sha256, error))
    return rows


def write_list(path: Path, rows: list[tuple]) -> Path:
    path.write_text("".join("\t".join(map(str, row[:3])) + "\n" for row in rows))
    return path


def job(config: IngestConfig, folder: Path) -> subprocess.Popen:
    path = folder / "ingest.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, str(ROOT / "jobs" / "ingest.py"), str(path)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_when(process: subprocess.Popen, is_time: Callable[[], bool]) -> None:
    """Kill -9 the job alone, and wait until the processes that worked for it are gone too."""
    deadline_s = time.monotonic() + 240
    while not is_time() and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
    children = [one for one in psutil.Process(process.pid).children(recursive=True) if "Agent" not in one.name()]
    assert any("fetch" in child.name() for child in children), children
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def check_accounted_for(folder: Path, rows: list[tuple], images: list[bytes], counted: dict) -> None:
    """Every link has its line in the account, the good ones are in the shards, and the job has counted them so."""
    lines = account(folder)
    assert [line["key"] for line in lines] == [f"{number:010d}" for number in range(len(rows))]
    assert [(line["caption"], line["url"], line["error"]) for line in lines] == [(r[0], r[1], r[3]) for r in rows]
    good = [number for number, row in enumerate(rows) if row[3] is None]
    found = samples(folder)
    assert [int(sample.key) for sample in found] == good
    for number, sample in zip(good, found, strict=True):
        assert (sample.error, sample.caption, sample.image) == (None, rows[number][0], images[number])
        about = json.loads(sample.others["json"])
        assert (about["url"], about["caption"], about["sha256"]) == (*rows[number][1::-1], sample.content_hash())
        with Image.open(io.BytesIO(images[number])) as image:
            assert (about["original_width"], about["original_height"]) == image.size
    errors = Counter(row[3] for row in rows if row[3])
    assert counted["left_out"] == errors
    assert counted["counts"] == {"train": len(good)}
    assert counted["num_links"] == len(rows)


@pytest.mark.slow
@needs_img2dataset
def test_a_list_with_bad_links_is_ingested_and_a_killed_job_run_again_gives_the_same_bytes(
    local_ray, website, photo, tmp_path
):
    images = [photo(number) for number in range(80)]
    rows = conceptual_captions(website, images)
    listing = write_list(tmp_path / "Train_GCC-training.tsv", rows)
    chosen = {"columns": ["caption", "url", "sha256"], "hash_column": "sha256", "duplicates": "leave_out"}
    ingest(settings(tmp_path / "calm", listing, **chosen))
    counted = json.loads((tmp_path / "calm" / "run.json").read_text())["result"]
    check_accounted_for(tmp_path / "calm", rows, images, counted)

    website.delay_s = 0.1
    config = settings(tmp_path / "killed", listing, **chosen)
    kill_when(job(config, tmp_path), lambda: len([*(tmp_path / "killed").glob("*.parquet")]) >= 2)
    done = [int(path.stem[-5:]) for path in (tmp_path / "killed").glob("*.parquet")]
    assert len(done) < 8
    website.delay_s = 0
    website.asked.clear()
    again = job(config, tmp_path)
    said, warned = again.communicate()
    assert again.returncode == 0, warned[-4000:]
    assert "train 68 samples" in said
    assert not {f"/{10 * number + 1}.jpg" for number in done} & {*website.asked}
    assert output_bytes(tmp_path / "killed") == output_bytes(tmp_path / "calm")


@pytest.mark.slow
@needs_img2dataset
def test_two_thousand_real_images_are_ingested_killed_resumed_and_scored(
    local_ray, website, shared_data, victim_folder, decoder_folder, tmp_path
):
    images = real_images(shared_data, 2000)
    rows = conceptual_captions(website, images)
    listing = write_list(tmp_path / "Train_GCC-training.tsv", rows)
    chosen = {"columns": ["caption", "url", "sha256"], "hash_column": "sha256", "duplicates": "leave_out"}
    chosen |= {"resize": "original", "web": {"threads": 16}}

    def config(name: str) -> IngestConfig:
        return settings(tmp_path / name, listing, **chosen).model_copy(update={"samples_per_shard": 250})

    calm = job(config("calm"), tmp_path)
    _, warned = calm.communicate()
    assert calm.returncode == 0, warned[-4000:]
    counted = json.loads((tmp_path / "calm" / "run.json").read_text())["result"]
    check_accounted_for(tmp_path / "calm", rows, images, counted)
    for num_done in (1, 4):  # killed twice
        kill_when(
            job(config("killed"), tmp_path), lambda n=num_done: len([*(tmp_path / "killed").glob("*.parquet")]) >= n
        )
    again = job(config("killed"), tmp_path)
    _, warned = again.communicate()
    assert again.returncode == 0, warned[-4000:]
    assert output_bytes(tmp_path / "killed") == output_bytes(tmp_path / "calm")

    from dede_ray.data.passes import PassResources
    from dede_ray.detectors.dede import DeDe
    from dede_ray.models.victims import OpenClipVictim
    from dede_ray.scan.decisions import FixedThreshold
    from dede_ray.scan.score import ScoreConfig, score

    manifest = score(
        ScoreConfig(
            shards=str(tmp_path / "killed"),
            output=str(tmp_path / "scores"),
            victim=OpenClipVictim(path=str(victim_folder)),
            detectors=[DeDe(decoder=str(decoder_folder), score_mask_ratio=0.9)],
            decision=FixedThreshold(threshold=1e9),
            resources=PassResources(min_actors=1, cpus_per_actor=0.5, decode_cpus=0.5),
        )
    )
    assert manifest.table.num_rows == counted["counts"]["train"]
    assert manifest.table["error"].null_count == manifest.table.num_rows


def real_images(shared_data: Path, num: int) -> list[bytes]:
    """Different JPEGs, half of them from either data set, none kept twice."""
    images: dict[str, bytes] = {}
    for name in ("coco_captions", "ood_caltech101"):
        of_these = 0
        for shard in list_shards(str(shared_data / name)):
            with open_shard(shard) as stream:
                for sample in iter_samples(stream, Limits()):
                    if of_these < num // 2 and sample.image is not None and sample.content_hash() not in images:
                        images[sample.content_hash()] = sample.image
                        of_these += 1
    assert len(images) == num
    return [*images.values()]


# --- lists


@needs_img2dataset
def test_tsv_csv_and_parquet_are_read_one_after_the_other_with_their_bad_rows(local_ray, website, photo, tmp_path):
    for number in range(9):
        website.files[f"/{number}.jpg"] = photo(number)
    link = [f"{website.url}/{number}.jpg" for number in range(9)]
    tsv = f'TEXT\tURL\n"an open quote\t{link[0]}\none column\n\na caption\t{link[1]}\nnot \xff text\t{link[2]}\n'
    (tmp_path / "1.tsv.gz").write_bytes(gzip.compress(tsv.encode("latin-1")))
    with open(tmp_path / "2.csv", "w", newline="") as stream:
        csv.writer(stream).writerows(
            [("URL", "extra", "TEXT"), (link[3], 0, 'with, "quotes"\nand lines'), ("file:///etc/hostname", 0, "a file")]
        )
    urls = pa.array([link[4], None, link[5], link[6].replace("http:", "ftp:")]).dictionary_encode()
    texts = pa.array(["four", "no link", " ", "ftp"], pa.large_string())
    pq.write_table(pa.table({"SAMPLE_ID": [1, 2, 3, 4], "TEXT": texts, "URL": urls}), tmp_path / "3.parquet")
    paths = [tmp_path / "1.tsv.gz", tmp_path / "[2].csv", tmp_path / "3.parquet"]
    config = settings(tmp_path / "out", paths, url_column="URL", caption_column="TEXT")
    summary = ingest(config)
    assert [(line["caption"], line["error"]) for line in account(tmp_path / "out")] == [
        ('"an open quote', None),
        (None, "bad_row"),
        ("a caption", None),
        ("not \\xff text", "bad_row"),
        ('with, "quotes"\nand lines', None),
        ("a file", "bad_row"),
        ("four", None),
        ("no link", "bad_row"),
        (" ", "caption_missing"),
        ("ftp", "bad_row"),
    ]
    assert summary.startswith(
        f"train 4 samples in {tmp_path / 'out'}, of 10 links; links from `URL`, captions from `TEXT`"
    )
    assert "; quotes: no, by the first 6 lines of the TSV (1 of 3 lists)" in summary
    assert "captions from `TEXT`; unused: extra (1 of 3 lists)" in summary
    assert summary.endswith("; left out: bad_row 5, caption_missing 1")
    assert set(website.asked) == {"/0.jpg", "/1.jpg", "/3.jpg", "/4.jpg"}


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 987654321\n"


@pytest.mark.parametrize(
    ("name", "text", "changed", "message"),
    [
        (
            "list.tsv",
            "a cat\thttp://x/1.jpg\n",
            {},
            r"has no column 'url'; it has 'a cat', 'http://x/1.jpg'.*`columns`",
        ),
        ("list.tsv", "caption\turl\n", {"hash_column": "md5"}, "has no column 'md5'; it has 'caption', 'url'"),
        ("list.tsv", "caption\turl\n", {}, "has no rows"),
        ("list.json", "{}", {}, r"list\.json is no list of links by its name; expected one that ends in \.tsv"),
        ("list.parquet", "caption\turl\n", {}, "cannot be read: Parquet magic bytes not found"),
        ("list.csv.gz", "caption,url\n", {}, "has no rows"),
        ("list.tsv", LFS, {"columns": ["caption", "url"]}, r"list\.tsv is a pointer of Git LFS"),
        ("list.parquet", LFS, {}, r"list\.parquet is a pointer of Git LFS"),
        ("list.csv", "<!DOCTYPE html>\n<html>", {"columns": ["caption", "url"]}, r"list\.csv is a web page"),
        ("list.csv", gzip.compress(b"<html>"), {"columns": ["caption", "url"]}, r"list\.csv is a web page"),
        ("list.tsv", b"\x28\xb5\x2f\xfd\0\0\0", {}, r"list\.tsv is compressed with Zstandard"),
        ("list.tsv", b"PAR1\x15\0\0", {}, r"list\.tsv is a Parquet file; expected lines of text"),
        ("list.parquet", gzip.compress(b"x"), {}, r"list\.parquet is compressed with gzip"),
        ("list.csv", "caption,url\n".encode("utf-16"), {}, r"list\.csv is UTF-16"),
        ("list.tsv", '{"url": "http://x"}\n', {"columns": ["caption", "url"]}, r"list\.tsv is JSON"),
        ("list.tsv", "caption\turl\turl\n", {}, "has several columns 'url'"),
        ("other.tsv", None, {}, r"no list of links at .*other\.tsv"),
    ],
)
@needs_img2dataset
def test_a_list_that_cannot_be_read_is_a_mistake(tmp_path, name, text, changed, message):
    if text is not None:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(Mistake, match=message):
        ingest(settings(tmp_path / "out", tmp_path / name, **changed))


def rows_of(path: Path, **source) -> tuple[list[tuple[str | None, str | None]], str]:
    """Link and caption of each row as the job reads them, and what it says of the file."""
    one = links._look(str(path), links.UrlList(path=str(path), **source))
    rows = [(url, caption) for url, caption, _ in links._read_rows([one])]
    return rows, "; ".join([*one.notes, one.warning])


LINK = "http://example.com/{}.jpg"
CAPTIONS = [
    "a plain one", 'a sign that reads "stop"', "left\tright", "two\nlines", '"quoted as a whole"', 'a 5" screen', "",
    'one "and\nanother"\n\n', "the last",
]  # fmt: skip


@pytest.mark.parametrize("order", [("caption", "url"), ("url", "caption"), ("caption", "url", "size")])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("has_header", [True, False])
def test_a_quoted_tsv_is_known_by_its_rows(tmp_path, order, quoting, end, has_header):
    rows = [{"caption": text, "url": LINK.format(n), "size": n} for n, text in enumerate(CAPTIONS)]
    with open(tmp_path / "list.tsv", "w", newline="") as stream:
        writer = csv.DictWriter(
            stream, order, extrasaction="ignore", delimiter="\t", quoting=quoting, lineterminator=end
        )
        if has_header:
            writer.writeheader()
        writer.writerows(rows)
    found, said = rows_of(tmp_path / "list.tsv", columns=None if has_header else list(order))
    assert found == [(row["url"], row["caption"]) for row in rows]
    assert "quotes: yes" in said


RAW = [
    '"quoted as a whole"', '"an open quote', 'it says "no', '"a" and "b"', 'a 5" screen', "plain", 'closed"', '""', '"',
    'half a "word', '"another', "[a] <person> is 6' 2\"",
]  # fmt: skip


@pytest.mark.parametrize("order", [("caption", "url"), ("url", "caption")])
@pytest.mark.parametrize("has_header", [True, False])
def test_a_raw_tsv_stays_as_it_is(tmp_path, order, has_header):
    """As Conceptual Captions: quotes are text, wherever they stand."""
    rows = [{"caption": text, "url": LINK.format(n)} for n, text in enumerate(RAW)]
    lines = ["\t".join(order)] * has_header + ["\t".join(row[name] for name in order) for row in rows]
    (tmp_path / "list.tsv").write_text("\n".join(lines) + "\n")
    found, said = rows_of(tmp_path / "list.tsv", columns=None if has_header else list(order))
    assert found == [(row["url"], row["caption"]) for row in rows]
    assert "quotes: no" in said


@pytest.mark.parametrize(("setting", "expected"), [(True, "a"), ("yes", "a"), (False, '"a"'), ("no", '"a"')])
def test_the_setting_decides_about_quotes_also_as_yaml_reads_it(tmp_path, setting, expected):
    (tmp_path / "list.tsv").write_text(f'caption\turl\n"a"\t{LINK}\n')
    assert rows_of(tmp_path / "list.tsv", quotes=setting)[0] == [(LINK, expected)]


def test_a_stray_quote_costs_its_own_row_at_most_and_swallows_no_file(tmp_path):
    plain = [f"caption {n}\t{LINK.format(n)}\n" for n in range(3000)]
    quoted = [f'"""{n}"""\t{LINK.format(n)}\n' for n in range(10)]
    for number, stray in enumerate([f'"open\t{LINK}\n', f'"\t{LINK}\n', '"no link, open\n']):
        path = tmp_path / f"{number}.tsv"
        path.write_text("".join(["caption\turl\n", *quoted, *plain[:2000], stray, *plain[2000:], stray, *quoted]))
        found, said = rows_of(path)
        assert "quotes: yes" in said
        assert len(found) == 3022
        assert [row for row in found if row[0] not in (LINK, None)] == [
            *((LINK.format(n), f'"{n}"') for n in range(10)),
            *((LINK.format(n), f"caption {n}") for n in range(3000)),
            *((LINK.format(n), f'"{n}"') for n in range(10)),
        ]
        assert [row for row in found if row[0] in (LINK, None)] == (
            [(None, None)] * 2 if number == 2 else [(LINK, stray.split("\t")[0])] * 2
        )


def test_quotes_that_come_late_are_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(links, "SAMPLE_CHARS", 1000)
    lines = [f"caption {n}\t{LINK.format(n)}\n" for n in range(100)]
    (tmp_path / "list.tsv").write_text("".join(["caption\turl\n", *lines, f'"a ""sign"""\t{LINK}\n']))
    _, said = rows_of(tmp_path / "list.tsv")
    assert "quotes: no" in said
    assert "1 captions look quoted, and were taken as they stand: `quotes: yes` reads them" in said


@pytest.mark.parametrize("names", [("url", "caption"), ("URL", "TEXT"), ("Image_URL", "alt_text"), ("link", "txt")])
@pytest.mark.parametrize("suffix", ["tsv", "csv", "parquet"])
def test_columns_of_a_list_are_found_under_usual_names_in_any_case(tmp_path, names, suffix):
    rows, path = [(LINK.format(n), f"caption {n}", "x") for n in range(3)], tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table(dict(zip([*names, "other"], zip(*rows, strict=True), strict=True))), path)
    else:
        with open(path, "w", newline="") as stream:
            csv.writer(stream, delimiter="\t" if suffix == "tsv" else ",").writerows([(*names, "other"), *rows])
    found, said = rows_of(path)
    assert found == [row[:2] for row in rows]
    assert said.startswith(f"links from `{names[0]}`, captions from `{names[1]}`; unused: other")
    with pytest.raises(Mistake, match="has no column 'captions2'"):
        rows_of(path, caption_column="captions2")


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.string()), pa.list_(pa.string_view()),
        pa.struct([("text", pa.string())]),
    ],
)  # fmt: skip
def test_parquet_lists_of_whatever_type_are_read(tmp_path, kind):
    def column(values: list[str]) -> pa.Array:
        if pa.types.is_list(kind):
            return pa.array([["", value] for value in values], kind)
        if pa.types.is_struct(kind):
            return pa.array([{"text": value} for value in values], kind)
        if pa.types.is_dictionary(kind):
            return pa.array(values).dictionary_encode()
        return pa.array([value.encode() for value in values]).view(pa.string()).cast(kind)

    rows = [(LINK.format(n), f"naïve {n}, longer than a view holds inline") for n in range(3)]
    urls, captions = zip(*rows, strict=True)
    pq.write_table(pa.table({"url": column(urls), "caption": column(captions)}), tmp_path / "list.parquet")
    assert rows_of(tmp_path / "list.parquet")[0] == rows
    pq.write_table(pa.table({"url": column(urls), "caption": [1, 2, 3]}), tmp_path / "list.parquet")
    with pytest.raises(Mistake, match="the column 'caption' holds int64, expected text"):
        rows_of(tmp_path / "list.parquet")


def test_without_img2dataset_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "img2dataset", None)
    with pytest.raises(Mistake, match=re.escape("pip install --constraint constraints.txt '.[ingest]'")):
        ingest(settings(tmp_path / "out", tmp_path / "list.tsv"))


@needs_img2dataset
def test_a_list_that_has_changed_is_not_continued_and_one_that_leads_nowhere_is_a_mistake(local_ray, website, tmp_path):
    listing = tmp_path / "list.tsv"
    rows = [f"picture {number}\t{website.url}/{number}.jpg\n" for number in range(30)]
    listing.write_text("caption\turl\n" + "".join(rows))
    config = settings(tmp_path / "out", listing)
    with pytest.raises(Mistake, match="not one of 30 links gave an image that can be used: not_found 30"):
        ingest(config)
    for changed in (["another picture\n", *rows[1:]], rows[:20]):
        listing.write_text("caption\turl\n" + "".join(changed))
        with pytest.raises(Mistake, match=r"the list has changed since .*train-0000"):
            ingest(config)


# --- what becomes of images


@pytest.mark.parametrize(
    ("resize", "size"),
    [
        ("keep_ratio", (133, 100)),
        ("keep_ratio_largest", (100, 75)),
        ("center_crop", (100, 100)),
        ("border", (100, 100)),
        ("original", (400, 300)),
    ],
)
@needs_img2dataset
def test_images_are_shrunk_as_asked_and_small_ones_keep_their_bytes(
    local_ray, website, picture, photo, png, tmp_path, resize, size
):
    website.files |= {"/large.jpg": photo(1, 300, 400), "/small.png": png(2, 60, 80)}
    frames, file = [Image.fromarray(picture(number, 300, 400)) for number in (3, 4)], io.BytesIO()
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])  # as cameras write two views
    website.files["/burst.jpg"] = file.getvalue()
    listing = tmp_path / "list.tsv"
    listing.write_text(
        f"caption\turl\nlarge\t{website.url}/large.jpg\nsmall\t{website.url}/small.png\nburst\t{website.url}/burst.jpg\n"
    )
    ingest(settings(tmp_path / "out", listing, resize=resize, image_size_px=100))
    large, small, burst = samples(tmp_path / "out")
    pixels_HWC = decode_image(large.image, Limits())
    assert (large.image_suffix, pixels_HWC.shape) == ("jpg", (size[1], size[0], 3))
    assert (burst.image_suffix, decode_image(burst.image, Limits()).shape) == ("jpg", pixels_HWC.shape)
    if resize in ("center_crop", "border"):
        assert (small.image_suffix, decode_image(small.image, Limits()).shape) == ("jpg", (100, 100, 3))
    else:
        assert (small.image_suffix, small.image) == ("png", website.files["/small.png"])
    if resize == "border":
        assert pixels_HWC[:10].min() > 240
        assert pixels_HWC[50].mean() < 200
    for sample, path, shape in ((large, "/large.jpg", (400, 300)), (small, "/small.png", (80, 60))):
        about = json.loads(sample.others["json"])
        assert (about["original_width"], about["original_height"]) == shape
        assert about["original_hash"] == hashlib.sha256(website.files[path]).hexdigest()


@needs_img2dataset
def test_duplicates_are_counted_and_marked_whichever_came_first_and_stay_unless_told_otherwise(
    local_ray, website, photo, tmp_path, monkeypatch
):
    website.files |= {f"/{number}.jpg": photo(number % 12) for number in range(25)}
    listing = tmp_path / "list.tsv"
    rows = "".join(f"picture {number}\t{website.url}/{number}.jpg\n" for number in range(25))
    listing.write_text("caption\turl\n" + rows)
    summary = ingest(settings(tmp_path / "kept", listing))
    assert summary.endswith("left out: none; 13 samples repeat the image of an earlier one")
    monkeypatch.setattr(links, "HASHES_PER_PASS", 4)  # compared in seven passes
    ingest(settings(tmp_path / "left", listing, duplicates="leave_out"))
    first = [None] * 12 + [f"{number % 12:010d}" for number in range(12, 25)]
    assert [line["duplicate_of"] for line in account(tmp_path / "kept")] == first
    assert [line["duplicate_of"] for line in account(tmp_path / "left")] == first
    assert [int(sample.key) for sample in samples(tmp_path / "kept")] == [*range(25)]
    assert [int(sample.key) for sample in samples(tmp_path / "left")] == [*range(12)]
    assert sorted(path.name for path in (tmp_path / "left").glob("*.tar")) == ["train-00000.tar", "train-00001.tar"]


@needs_img2dataset
def test_links_that_failed_are_followed_once_more_when_asked_and_the_others_are_left_alone(
    local_ray, website, photo, tmp_path
):
    images = {f"/{number}.jpg": photo(number) for number in range(20)}
    listing = tmp_path / "list.tsv"
    listing.write_text("caption\turl\n" + "".join(f"picture\t{website.url}{path}\n" for path in images))
    website.files = {path: image for path, image in images.items() if path not in ("/3.jpg", "/15.jpg", "/16.jpg")}
    config = settings(tmp_path / "out", listing)
    ingest(config)
    before = output_bytes(tmp_path / "out")
    website.files = {path: images[path] for path in ("/3.jpg", "/15.jpg")}  # the others are gone by now
    website.asked.clear()
    ingest(config)
    assert not website.asked
    assert output_bytes(tmp_path / "out") == before
    again = config.model_copy(update={"source": config.source.model_copy(update={"retry_failed": True})})
    assert "train 19 samples" in ingest(again)
    assert set(website.asked) == {"/3.jpg", "/15.jpg", "/16.jpg"}
    website.files = images
    assert "train 19 samples" in ingest(config)  # finished, as it is now
    assert "train 20 samples" in ingest(again)
    ingest(settings(tmp_path / "at once", listing))
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "at once")


@needs_img2dataset
def test_a_piece_killed_while_its_files_were_being_replaced_is_completed_and_what_was_half_written_goes(
    local_ray, website, photo, tmp_path
):
    website.files = {f"/{number}.jpg": photo(number) for number in range(20)}
    listing = tmp_path / "list.tsv"
    listing.write_text("caption\turl\n" + "".join(f"picture\t{website.url}{path}\n" for path in website.files))
    config = settings(tmp_path / "out", listing)
    ingest(config)
    before = output_bytes(tmp_path / "out")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    for name in ("train-00000.parquet", "train-00000.tar", "train-00001.parquet"):  # the second tar is in place already
        (tmp_path / "out" / name).rename(tmp_path / "out" / f"{name}.new")
    (tmp_path / "out" / "train-00000.tar").write_bytes(b"the shard as it was before")
    (tmp_path / "out" / "train-00002.tar.new").write_bytes(b"half")
    (tmp_path / "out" / ".train-00002.tmp-1").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps({"settings": run["settings"]}))
    website.asked.clear()
    ingest(config)
    assert output_bytes(tmp_path / "out") == before
    assert not website.asked


# --- packaging


def test_the_core_installs_without_what_img2dataset_needs():
    text = (ROOT / "pyproject.toml").read_text()
    core = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert core is not None
    to_see, seen = re.findall(r'^ *"([\w.-]+)', core[1], re.MULTILINE), set()
    assert "torch" in to_see
    while to_see:
        name = re.sub(r"[-_.]+", "-", to_see.pop().lower())
        if name in seen:
            continue
        seen.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        to_see += [re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in required if "extra ==" not in one]
    assert seen > {"torch", "ray", "deepspeed", "open-clip-torch", "numpy"}
    assert not seen & {"img2dataset", "wandb", "albumentations", "opencv-python-headless", "webdataset"}


def test_the_settings_of_conceptual_captions_are_those_of_the_file_as_google_publishes_it():
    source = load(IngestConfig, [str(ROOT / "configs" / "ingest" / "cc3m.yaml")]).source
    assert source.columns == ["caption", "url"]
    assert not source.web.allow_private_addresses
