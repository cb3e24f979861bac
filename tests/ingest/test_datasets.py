"""Files written exactly as the official distributions arrive as shards: pixels, labels, names and splits right.

And what is made to do harm, or is damaged, does none and is reported.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from PIL import Image

from dede_ray.data.captions import read_classes
from dede_ray.data.images import decode_image
from dede_ray.data.shards import Limits, Sample, iter_samples, list_shards
from dede_ray.ingest.ingest import IngestConfig, ingest
from dede_ray.runtime.config import Mistake

LIMITS = Limits()
TEMPLATE = "this is {}"


@pytest.fixture
def shards_of(tmp_path):
    """Ingest a source; return its samples by split and key, and its class names."""

    def run(limits=None, **source) -> tuple[dict[str, dict[str, Sample]], list[str] | None]:
        output = tmp_path / f"shards {len(list(tmp_path.iterdir()))}"
        settings = {"source": source, "output": str(output), "templates": [TEMPLATE], "samples_per_shard": 4}
        run.summary = ingest(IngestConfig.model_validate(settings | {"limits": limits or {}}))
        assert not (output / ".ingest").exists()
        splits: dict[str, dict[str, Sample]] = {}
        for shard in list_shards(str(output)):
            with open(shard.url, "rb") as stream:
                for sample in iter_samples(stream, LIMITS):
                    assert sample.error is None
                    samples = splits.setdefault(shard.name.split("-")[0], {})
                    assert sample.key not in samples
                    samples[sample.key] = sample
        classes = read_classes(list_shards(str(output)))
        return splits, classes and classes.names

    return run


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def write(folder: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def image_in(picture, format: str, number: int = 0, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(number)).save(buffer, format, **options)
    return buffer.getvalue()


def same(sample: Sample, image_HWC: np.ndarray) -> bool:
    return np.array_equal(decode_image(sample.image, LIMITS), image_HWC)


# --- CIFAR


def python2_pickle(value) -> bytes:
    """As Python 2 wrote it, protocol 2: strings of bytes, arrays as numpy takes itself apart."""

    def put(value) -> bytes:
        if isinstance(value, bytes):
            return b"T" + struct.pack("<i", len(value)) + value
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(put, value)) + b"e"
        if isinstance(value, dict):
            return b"}(" + b"".join(put(k) + put(v) for k, v in value.items()) + b"u"
        assert value.dtype == np.uint8
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + put(b"b") + b"tR(K\x01("
            + b"".join(map(put, value.shape)) + b"tcnumpy\ndtype\n(" + put(b"u1") + b"K\x00K\x01tR(K\x03" + put(b"|")
            + b"NNN" + put(-1) + put(-1) + b"K\x00tb\x89" + put(value.tobytes()) + b"tb"
        )  # fmt: skip

    return b"\x80\x02" + put(value) + b"."


@pytest.fixture
def batches(picture):
    """Six batches of two images, their labels 0 to 11 and rows as CIFAR stores them."""
    images = [[picture(10 * b + i) for i in range(2)] for b in range(6)]
    rows = [np.stack([image.transpose(2, 0, 1).ravel() for image in pair]) for pair in images]
    return images, rows


NAMES10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar10(rows, is_binary: bool) -> dict[str, bytes]:
    files = {}
    for b, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        labels = [b, 9 - b]
        if is_binary:
            files[f"cifar-10-batches-bin/{name}.bin"] = b"".join(
                bytes([label]) + row.tobytes() for label, row in zip(labels, rows[b], strict=True)
            )
        else:
            batch = {b"batch_label": b"batch", b"labels": labels, b"data": rows[b], b"filenames": [b"a.png", b"b.png"]}
            files[f"cifar-10-batches-py/{name}"] = python2_pickle(batch)
    return files


def test_the_pickles_of_these_tests_are_what_numpy_reads(batches):
    _, rows = batches
    content = pickle.loads(python2_pickle({b"data": rows[0], b"labels": [1, 2]}), encoding="bytes")
    np.testing.assert_array_equal(content[b"data"], rows[0])
    assert content[b"labels"] == [1, 2]


@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize("place", ["archive", "beside", "unpacked"])
def test_cifar10(shards_of, batches, tmp_path, is_binary, place):
    images, rows = batches
    files = cifar10(rows, is_binary)
    name = f"cifar-10-{'binary' if is_binary else 'python'}.tar.gz"
    if place == "unpacked":
        path = write(tmp_path / "in", files)
    else:
        path = write(tmp_path / "in", {name: gzip.compress(tar_of(files))})
        path = path / name if place == "archive" else path
    splits, names = shards_of(kind="cifar10", path=str(path))
    assert names == NAMES10
    assert (len(splits["train"]), len(splits["test"])) == (10, 2)
    for i, sample in enumerate(splits["train"].values()):
        assert sample.key == f"train_{i:06d}"
        assert sample.label == (i // 2 if i % 2 == 0 else 9 - i // 2)
        assert sample.caption == f"this is {NAMES10[sample.label]}"
        assert sample.image_suffix == "png"
        assert same(sample, images[i // 2][i % 2])
    assert [s.label for s in splits["test"].values()] == [5, 4]
    assert all(same(s, image) for s, image in zip(splits["test"].values(), images[5], strict=True))


@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize("labels", ["fine", "coarse"])
def test_cifar100(shards_of, batches, tmp_path, is_binary, labels):
    images, rows = batches
    words = {"fine": [f"fine_{i}".encode() for i in range(100)], "coarse": [f"coarse_{i}".encode() for i in range(20)]}
    if is_binary:
        files = {
            f"cifar-100-binary/{split}.bin": b"".join(bytes([3 + i, 97 + i]) + rows[b][i].tobytes() for i in range(2))
            for b, split in enumerate(("train", "test"))
        } | {f"cifar-100-binary/{kind}_label_names.txt": b"\n".join(words[kind]) + b"\n" for kind in words}  # fmt: skip
    else:
        files = {
            f"cifar-100-python/{split}": python2_pickle(
                {b"data": rows[b], b"fine_labels": [97, 98], b"coarse_labels": [3, 4], b"filenames": [b"a", b"b"]}
            )
            for b, split in enumerate(("train", "test"))
        } | {"cifar-100-python/meta": python2_pickle({f"{kind}_label_names".encode(): words[kind] for kind in words})}
    write(tmp_path, {f"cifar-100-{'binary' if is_binary else 'python'}.tar.gz": gzip.compress(tar_of(files))})
    splits, names = shards_of(kind="cifar100", path=str(tmp_path), labels=labels)
    assert names == [word.decode().replace("_", " ") for word in words[labels]]
    for b, split in enumerate(("train", "test")):
        assert [s.label for s in splits[split].values()] == ([97, 98] if labels == "fine" else [3, 4])
        assert all(same(s, image) for s, image in zip(splits[split].values(), images[b], strict=True))


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(6))
def test_a_cifar_pickle_that_would_create_a_file_never_does(shards_of, batches, tmp_path, protocol):
    mark = tmp_path / "mark"
    files = cifar10(batches[1], is_binary=False)
    pickle.loads(pickle.dumps(Harm(mark), protocol)).close()
    assert mark.exists()
    mark.unlink()
    files["cifar-10-batches-py/data_batch_3"] = pickle.dumps({"data": Harm(mark), "labels": [1, 2]}, protocol)
    write(tmp_path / "in", files)
    with pytest.raises(Mistake, match=r"data_batch_3 .* names `\w+\.open`, which loading it would run"):
        shards_of(kind="cifar10", path=str(tmp_path / "in"))
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}q",  # ends early
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({b"labels": [1, 2]}),
        b"\x80\x04r\xff\xff\xff\xff.",  # a memo of 32 GB, were it an array
        b"\x80\x02cnumpy\ndtype\ncnumpy\ndtype\n(K\x01K\x02K\x03tb.",
        b"\x80\x02cbuiltins\neval\n(U\x011tR.",
        b"\x80\x02cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02U\x01aQ.",  # a persistent id
        python2_pickle({b"data": np.zeros((2, 3000), np.uint8), b"labels": [0, 1]}),
        python2_pickle({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}),
        python2_pickle({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}),
        python2_pickle({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}),
        python2_pickle({b"data": b"no array", b"labels": [0, 1]}),
    ],
)
def test_a_cifar_pickle_that_is_not_the_official_one_is_a_mistake(shards_of, batches, tmp_path, content):
    files = cifar10(batches[1], is_binary=False)
    files["cifar-10-batches-py/test_batch"] = content
    write(tmp_path / "in", files)
    with pytest.raises(Mistake, match="test_batch"):
        shards_of(kind="cifar10", path=str(tmp_path / "in"))


# --- STL-10, SVHN


def stl10(picture) -> tuple[dict[str, bytes], dict[str, list[np.ndarray]]]:
    images = {
        split: [picture(100 * s + i, 96, 96) for i in range(3)]
        for s, split in enumerate(("train", "test", "unlabeled"))
    }
    files = {
        f"stl10_binary/{split}_X.bin": b"".join(image.transpose(2, 1, 0).tobytes() for image in images[split])
        for split in images
    }
    files |= {f"stl10_binary/{split}_y.bin": bytes([1, 10, 5]) for split in ("train", "test")}
    return files | {"stl10_binary/class_names.txt": b"airplane\nbird\n"}, images


def test_stl10_and_its_unlabelled_images(shards_of, picture, tmp_path):
    files, images = stl10(picture)
    write(tmp_path, {"stl10_binary.tar.gz": gzip.compress(tar_of(files))})
    splits, names = shards_of(kind="stl10", path=str(tmp_path))
    assert (names[0], names[9]) == ("airplane", "truck")
    for split, samples in splits.items():
        is_labelled = split != "unlabeled"
        assert [s.label for s in samples.values()] == ([0, 9, 4] if is_labelled else [None] * 3)
        assert next(iter(samples.values())).caption == ("this is airplane" if is_labelled else None)
        assert all(same(s, image) for s, image in zip(samples.values(), images[split], strict=True))
    assert set(splits) == {"train", "test", "unlabeled"}


@pytest.mark.parametrize("is_compressed", [False, True])
def test_svhn_whose_label_10_is_the_digit_0(shards_of, picture, tmp_path, is_compressed):
    for s, split in enumerate(("train", "test", "extra")):
        content = {
            "X": np.stack([picture(10 * s + i) for i in range(3)], axis=3),
            "y": np.array([[1], [10], [9]], np.uint8),
        }
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", content, do_compression=is_compressed)
    splits, names = shards_of(kind="svhn", path=str(tmp_path))
    assert (names[0], names[9]) == ("zero", "nine")
    assert set(splits) == {"train", "test", "extra"}
    for s, samples in enumerate([splits["train"], splits["test"], splits["extra"]]):
        assert [sample.label for sample in samples.values()] == [1, 0, 9]
        assert all(same(sample, picture(10 * s + i)) for i, sample in enumerate(samples.values()))


@pytest.mark.parametrize(
    "content", [{"X": np.zeros((32, 32, 3, 2), np.uint8)}, {"X": np.zeros((2, 2)), "y": [1]}, {"X": {"a": 1}, "y": [1]}]
)
def test_a_mat_file_of_something_else_is_a_mistake(shards_of, tmp_path, content):
    for split in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", content)
    with pytest.raises(Mistake, match=r"train_32x32\.mat is damaged, or not the file it should be"):
        shards_of(kind="svhn", path=str(tmp_path))


# --- GTSRB, Caltech-101


def test_gtsrb_from_its_zips(shards_of, picture, tmp_path):
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    train = {}
    for label in (0, 14, 42):
        folder = f"GTSRB/Final_Training/Images/{label:05d}"
        train |= {f"{folder}/0000{i}_00000.ppm": image_in(picture, "PPM", 10 * label + i) for i in range(2)}
        train[f"{folder}/GT-{label:05d}.csv"] = f"{head}00000_00000.ppm;32;32;5;5;25;25;{label}\r\n".encode()
    test = {f"GTSRB/Final_Test/Images/0000{i}.ppm": image_in(picture, "PPM", 900 + i) for i in range(2)}
    test["GTSRB/Final_Test/Images/GT-final_test.test.csv"] = b"Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2\n"
    truth = f"{head}00000.ppm;32;32;5;5;25;25;16\r\n00001.ppm;32;32;5;5;25;25;1\r\n".encode()
    zips = {
        "GTSRB_Final_Training_Images.zip": zip_of(train),
        "GTSRB_Final_Test_Images.zip": zip_of(test),
        "GTSRB_Final_Test_GT.zip": zip_of({"GT-final_test.csv": truth}),
    }
    write(tmp_path / "zips", zips)
    write(tmp_path / "folders", train | test | {"GT-final_test.csv": truth})
    splits, names = shards_of(kind="gtsrb", path=str(tmp_path / "zips"))
    assert shards_of(kind="gtsrb", path=str(tmp_path / "folders")) == (splits, names)
    assert (len(names), names[14], names[42]) == (43, "stop", "end of no overtaking by trucks")
    for label in (0, 14, 42):
        for i in range(2):
            sample = splits["train"][f"{label:05d}_0000{i}_00000"]
            assert (sample.label, sample.caption) == (label, f"this is {names[label]}")
            assert same(sample, picture(10 * label + i))
    assert {key: s.label for key, s in splits["test"].items()} == {"00000": 16, "00001": 1}
    assert same(splits["test"]["00001"], picture(901))

    (tmp_path / "zips" / "GTSRB_Final_Test_GT.zip").unlink()
    with pytest.raises(Mistake, match=r"lacks GT-final_test\.csv; get .*GTSRB_Final_Test_GT\.zip from https://sid"):
        shards_of(kind="gtsrb", path=str(tmp_path / "zips"))


@pytest.mark.parametrize("place", ["zip", "tar.gz", "folder"])
def test_caltech101_without_its_clutter(shards_of, picture, tmp_path, place):
    files = {
        f"101_ObjectCategories/{name}/image_000{i}.jpg": image_in(picture, "JPEG", i + len(name))
        for name in ("accordion", "Faces_easy", "BACKGROUND_Google")
        for i in range(1, 4)
    }
    inner = gzip.compress(tar_of(files))
    if place == "zip":
        outer = {"caltech-101/Annotations.tar": tar_of({"a.mat": b""}), "__MACOSX/caltech-101/._x.jpg": b"?"}
        path = write(
            tmp_path / "in", {"caltech-101.zip": zip_of(outer | {"caltech-101/101_ObjectCategories.tar.gz": inner})}
        )
    elif place == "tar.gz":
        path = write(tmp_path / "in", {"101_ObjectCategories.tar.gz": inner})
    else:
        path = write(tmp_path / "in", files)
    splits, names = shards_of(kind="caltech101", path=str(path))
    assert names == ["Faces easy", "accordion"]
    assert {s.key: s.label for s in splits["train"].values()} == {
        **{f"Faces_easy_image_000{i}": 0 for i in range(1, 4)},
        **{f"accordion_image_000{i}": 1 for i in range(1, 4)},
    }
    for name in ("accordion", "Faces_easy"):  # the JPEGs as they were
        assert splits["train"][f"{name}_image_0002"].image == files[f"101_ObjectCategories/{name}/image_0002.jpg"]


# --- ImageNet


WNIDS = ["n01440764", "n01443537", "n02086240"]


@pytest.fixture
def devkit():
    """The devkit's archive, with three classes and one above them, numbered unlike their sorted ids."""
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    synsets = np.zeros((4, 1), [(name, "O") for name, _ in kinds])
    rows = [
        (1, "n02086240", "Shih-Tzu", 0), (2, "n01440764", "tench, Tinca tinca", 0),
        (3, "n01443537", "goldfish, Carassius auratus", 0), (4, "n00001740", "entity", 3),
    ]  # fmt: skip
    for i, (number, wnid, words, children) in enumerate(rows):
        synsets[i, 0] = (float(number), wnid, words, "what it is", float(children))
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets})
    return {
        "ILSVRC2012_devkit_t12/data/meta.mat": buffer.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"3\n1\n2\n1\n",
        "ILSVRC2012_devkit_t12/readme.txt": b"",
    }


def imagenet_train(picture) -> dict[str, dict[str, bytes]]:
    return {
        wnid: {f"{wnid}_{i}.JPEG": image_in(picture, "JPEG", 10 * w + i) for i in range(2)}
        for w, wnid in enumerate(WNIDS)
    }


@pytest.mark.parametrize("place", ["tars", "class tars", "folders"])
def test_imagenet_from_tars_and_folders(shards_of, picture, devkit, tmp_path, place):
    train = imagenet_train(picture)
    val = {f"ILSVRC2012_val_0000000{i}.JPEG": image_in(picture, "JPEG", 100 + i) for i in range(1, 5)}
    in_folders = {f"train/{wnid}/{name}": content for wnid, files in train.items() for name, content in files.items()}
    class_tars = {f"{wnid}.tar": tar_of(files) for wnid, files in train.items()}
    if place == "tars":
        members = {"ILSVRC2012_img_train.tar": tar_of(class_tars), "ILSVRC2012_img_val.tar": tar_of(val)}
        members["ILSVRC2012_devkit_t12.tar.gz"] = gzip.compress(tar_of(devkit))
    elif place == "class tars":
        members = {f"train/{name}": content for name, content in class_tars.items()} | devkit
        members |= {f"val/{name}": content for name, content in val.items()}
    else:
        truth = [WNIDS[1], WNIDS[2], WNIDS[0], WNIDS[2]]
        members = (
            in_folders | {f"val/{w}/{n}": content for w, (n, content) in zip(truth, val.items(), strict=True)} | devkit
        )
    splits, names = shards_of(kind="imagenet", path=str(write(tmp_path / "in", members)))
    assert names == ["tench", "goldfish", "Shih-Tzu"]
    assert {key: (s.label, s.image) for key, s in splits["train"].items()} == {
        f"{wnid}_{i}": (w, train[wnid][f"{wnid}_{i}.JPEG"]) for w, wnid in enumerate(WNIDS) for i in range(2)
    }
    assert {key[-1]: s.label for key, s in splits["val"].items()} == {"1": 1, "2": 2, "3": 0, "4": 2}
    assert all(s.caption == f"this is {names[s.label]}" for s in splits["val"].values())


def test_all_1000_classes_of_imagenet_have_the_names_clip_was_tested_with(shards_of, picture, tmp_path):
    content = image_in(picture, "JPEG")
    wnids = ["n01440764", *(f"n0200{i:04d}" for i in range(998)), "n15075141"]
    write(tmp_path / "in", {f"train/{wnid}/{wnid}_1.JPEG": content for wnid in wnids})
    splits, names = shards_of(kind="imagenet", path=str(tmp_path / "in"))
    assert (len(names), names[0], names[1], names[999]) == (1000, "tench", "goldfish", "toilet paper")
    assert splits["train"]["n15075141_1"].label == 999


def test_what_imagenet_lacks_is_named_with_its_place(shards_of, picture, devkit, tmp_path):
    with pytest.raises(Mistake, match=r"neither ILSVRC2012_img_train\.tar nor .* from https://image-net\.org"):
        shards_of(kind="imagenet", path=str(tmp_path))
    write(
        tmp_path / "a", {f"train/{w}/{n}": c for w, files in imagenet_train(picture).items() for n, c in files.items()}
    )
    with pytest.raises(Mistake, match=r"holds 3 classes .* put ILSVRC2012_devkit_t12\.tar\.gz"):
        shards_of(kind="imagenet", path=str(tmp_path / "a"))
    val = {"val/ILSVRC2012_val_00000009.JPEG": image_in(picture, "JPEG")}
    with pytest.raises(Mistake, match=r"labels of ILSVRC2012_val_00000009\.JPEG and its like are in the devkit"):
        shards_of(kind="imagenet", path=str(write(tmp_path / "b", val)))
    with pytest.raises(Mistake, match="has no line among the 4 labels of the devkit"):
        shards_of(kind="imagenet", path=str(write(tmp_path / "c", val | devkit)))


# --- folders


def test_folders_with_classes_and_captions_of_their_own(shards_of, picture, png, tmp_path):
    files = {
        "train/grey cat/a.jpg": image_in(picture, "JPEG", 1),
        "train/grey cat/a.txt": "Kater Söhnke\n".encode(),
        "train/grey cat/deep/b.v2.PNG": png(2),
        "train/snow_dog/a.webp": image_in(picture, "WEBP", 3),
        "train/snow_dog/a.bmp": image_in(picture, "BMP", 4),
        "train/flat.gif": image_in(picture, "GIF", 5),
        "train/.hidden.jpg": b"",
        "train/notes.md": b"",
        "test/snow_dog/x.tiff": image_in(picture, "TIFF", 6),
    }
    write(tmp_path, files)
    source = {"kind": "folders", "splits": {split: str(tmp_path / split) for split in ("train", "test")}}
    splits, names = shards_of(**source)
    assert names == ["grey cat", "snow dog"]
    found = {s.key: (s.label, s.caption, s.image_suffix) for s in splits["train"].values()}
    assert found == {
        "grey_cat_a": (0, "Kater Söhnke", "jpg"),
        "grey_cat_deep_b_v2": (0, "this is grey cat", "png"),
        "snow_dog_a": (1, "this is snow dog", "bmp"),
        "snow_dog_a@2": (1, "this is snow dog", "webp"),
        "flat": (None, None, "png"),
    }
    train = splits["train"]
    assert train["grey_cat_a"].image == files["train/grey cat/a.jpg"]
    assert train["grey_cat_deep_b_v2"].image == files["train/grey cat/deep/b.v2.PNG"]
    assert train["snow_dog_a@2"].image == files["train/snow_dog/a.webp"]
    assert same(splits["test"]["snow_dog_x"], picture(6))

    splits, names = shards_of(**source, classes=False)
    assert names is None
    assert {s.caption for s in splits["train"].values()} == {"Kater Söhnke", None}


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_flat_folder_with_a_file_of_captions(shards_of, png, tmp_path, separator):
    lines = ["image,caption", '"a.png","a cat, asleep"', "a.png,another", "b.png,a dog"]
    text = "\n".join(line.replace('"', "").replace(",", separator, 1) if separator == "\t" else line for line in lines)
    write(tmp_path / "in", {"a.png": png(1), "b.png": png(2), "c.png": png(3), "captions.txt": text.encode()})
    splits, names = shards_of(kind="folders", splits={"train": str(tmp_path / "in")}, captions="captions.txt")
    assert names is None
    assert {s.key: s.caption for s in splits["train"].values()} == {"a": "a cat, asleep", "b": "a dog", "c": None}


def test_each_unusable_picture_or_caption_is_counted_by_its_reason(shards_of, picture, png, tmp_path):
    bomb = image_in(picture, "PPM").replace(b"32 32", b"90000 90000")
    files = {
        "ok.png": png(), "half.tiff": image_in(picture, "TIFF")[:2000], "bomb.ppm": bomb, "empty.jpg": b"",
        "html.jpg": b"<html>", "big.bmp": bytes(200_000), "latin.png": png(1), "latin.txt": "é".encode("latin-1"),
        "long.png": png(2), "long.txt": b"x" * 101, "longer.png": png(3), "longer.txt": b"x" * 100_000,
        "svg.png": b"<svg/>", "eps.tiff": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }  # fmt: skip
    write(tmp_path / "in", files)
    limits = {"max_caption_chars": 100, "max_member_bytes": 100_000}
    splits, _ = shards_of(limits, kind="folders", splits={"train": str(tmp_path / "in")})
    assert list(splits["train"]) == ["ok"]
    left_out = dict(part.rsplit(" ", 1) for part in shards_of.summary.split("left out: ")[1].split(", "))
    unreadable = int(left_out.pop("image_unreadable")) + int(left_out.pop("image_truncated", "0"))
    assert unreadable == 5  # html, svg, eps, empty, half a TIFF
    assert left_out == {
        "image_too_large": "1", "member_too_large": "1", "caption_unreadable": "1", "caption_too_long": "2",
    }  # fmt: skip


def test_links_into_circles_end_and_links_to_classes_are_followed(shards_of, png, tmp_path):
    write(tmp_path / "elsewhere", {"cat/a.png": png(1)})
    write(tmp_path / "in", {"dog/b.png": png(2)})
    (tmp_path / "in" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "in" / "dog" / "loop").symlink_to(tmp_path / "in")
    splits, names = shards_of(kind="folders", splits={"train": str(tmp_path / "in")})
    assert names == ["cat", "dog"]
    assert set(splits["train"]) == {"cat_a", "dog_b"}


# --- tables


def features(names: list[str] | None = None, **columns) -> dict[str, object]:
    label = {"label": {"names": names, "_type": "ClassLabel"}} if names else {}
    return {"image": {"_type": "Image"}, **label, **columns}


def table(png, numbers, columns: dict, notes: dict) -> pa.Table:
    image = [{"bytes": png(n), "path": f"{n}.png"} for n in numbers]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    whole = pa.table({"image": pa.array(image, kind), **columns})
    return whole.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": notes}})})


def save_to_disk(folder: Path, tables: list[pa.Table]) -> None:
    """As `datasets.Dataset.save_to_disk` does: Arrow streams, and JSON beside them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, one in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, one.schema) as stream:
            stream.write_table(one, max_chunksize=2)
    notes = json.loads(tables[0].schema.metadata[b"huggingface"])["info"]
    (folder / "dataset_info.json").write_text(json.dumps({"description": "", **notes}))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": folder.name}
    (folder / "state.json").write_text(json.dumps(state))


def test_hugging_face_data_sets_on_disk(shards_of, png, tmp_path):
    names = ["cat", "dog"]
    train = [
        table(png, range(5 * t, 5 * t + 5), {"label": pa.array([0, 1, -1, 0, 7])}, features(names)) for t in range(2)
    ]
    captions = {"label": pa.array([1, None]), "text": pa.array(["a dog on a wall", None])}
    save_to_disk(tmp_path / "in" / "train", train)
    save_to_disk(tmp_path / "in" / "test", [table(png, [20, 21], captions, features(names))])
    (tmp_path / "in" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    splits, found = shards_of(kind="hugging_face", path=str(tmp_path / "in"))
    assert found == names
    assert shards_of.summary.endswith("left out: label_unreadable 2")
    assert [(s.key, s.label, s.caption) for s in splits["train"].values()][:4] == [
        ("train_00000000", 0, "this is cat"), ("train_00000001", 1, "this is dog"),
        ("train_00000002", None, None), ("train_00000003", 0, "this is cat"),
    ]  # fmt: skip
    assert all(s.image == png(int(key[-8:])) for key, s in splits["train"].items())
    assert [(s.label, s.caption, s.image) for s in splits["test"].values()] == [
        (1, "a dog on a wall", png(20)), (None, None, png(21)),
    ]  # fmt: skip

    splits, _ = shards_of(kind="hugging_face", path=str(tmp_path / "in" / "train"))  # without a list of splits
    assert set(splits) == {"train"}


def test_a_row_that_only_names_a_file_is_not_followed_there(shards_of, png, tmp_path):
    secret = write(tmp_path, {"secret.png": png(1)}) / "secret.png"
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": None, "path": str(secret)}, {"bytes": png(2), "path": None}, None], kind)
    note = {"huggingface": json.dumps({"info": {"features": features()}})}
    save_to_disk(tmp_path / "in", [pa.table({"image": rows}).replace_schema_metadata(note)])
    splits, _ = shards_of(kind="hugging_face", path=str(tmp_path / "in"))
    assert [s.image for s in splits["train"].values()] == [png(2)]
    assert shards_of.summary.endswith("left out: no_image 2")


@pytest.mark.parametrize("name", ["../out.arrow", "/etc/passwd", "a/b.arrow", ".", "", None, 3])
def test_a_data_set_that_names_files_elsewhere_is_a_mistake(shards_of, png, tmp_path, name):
    save_to_disk(tmp_path / "in", [table(png, [0], {}, features())])
    (tmp_path / "out.arrow").write_bytes((tmp_path / "in" / "data-00000-of-00001.arrow").read_bytes())
    (tmp_path / "in" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(Mistake, match="should list plain names of what lies beside it"):
        shards_of(kind="hugging_face", path=str(tmp_path / "in"))
    (tmp_path / "in" / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(Mistake, match="should list plain names of what lies beside it"):
        shards_of(kind="hugging_face", path=str(tmp_path / "in"))


def test_parquet_with_bytes_captions_and_labels_in_columns_of_any_name(shards_of, png, tmp_path):
    for part, numbers in enumerate([range(5), range(5, 9)]):
        columns = {
            "jpg": [png(n) for n in numbers],
            "words": [[f"caption {n}", "another"] if n % 2 else [] for n in numbers],
            "y": [n % 3 for n in numbers],
        }
        pq.write_table(pa.table(columns), tmp_path / f"part-{part}.parquet", row_group_size=3)
    source = {"kind": "parquet", "splits": {"train": str(tmp_path / "part-*.parquet")}}
    splits, names = shards_of(**source, caption="words", label="y", class_names=["a", "b", "c"])
    assert names == ["a", "b", "c"]
    for n, sample in enumerate(splits["train"].values()):
        assert (sample.image, sample.label) == (png(n), n % 3)
        assert sample.caption == (f"caption {n}" if n % 2 else f"this is {names[n % 3]}")
    splits, names = shards_of(**source)
    assert names is None
    assert {(s.label, s.caption) for s in splits["train"].values()} == {(None, None)}
    with pytest.raises(Mistake, match="has no column 'words2'; it has jpg, words, y"):
        shards_of(**source, caption="words2")
    with pytest.raises(Mistake, match=r"'words' holds list.*, expected integers"):
        shards_of(**source, label="words")


def test_hugging_faces_note_in_parquet_names_the_classes(shards_of, png, tmp_path):
    pq.write_table(
        table(png, range(3), {"label": pa.array([0, 1, 0])}, features(["cat", "dog"])), tmp_path / "a.parquet"
    )
    splits, names = shards_of(kind="parquet", splits={"val": str(tmp_path)})
    assert names == ["cat", "dog"]
    assert [s.caption for s in splits["val"].values()] == ["this is cat", "this is dog", "this is cat"]


def one_table(png, tmp_path, columns: dict, **source) -> dict:
    """The settings of a Parquet file with these columns beside three pictures."""
    pq.write_table(pa.table({"image": [png(n) for n in range(3)]} | columns), tmp_path / "a.parquet")
    return {"kind": "parquet", "splits": {"train": str(tmp_path / "a.parquet")}, **source}


def captions_of(splits) -> list[str | None]:
    return [sample.caption for sample in splits["train"].values()]


WORDS = ["a cat", "naïve", "a third"]
STRUCT = pa.struct([("path", pa.string()), ("raw", pa.string()), ("n", pa.int8())])
TEXT_COLUMNS = {
    "string": pa.array(WORDS),
    "large": pa.array(WORDS, pa.large_string()),
    "view": pa.array(WORDS, pa.string_view()),
    "bytes": pa.array([word.encode() for word in WORDS], pa.binary()),
    "large bytes": pa.array([word.encode() for word in WORDS], pa.large_binary()),
    "view of bytes": pa.array([word.encode() for word in WORDS], pa.binary_view()),
    "dictionary": pa.array(WORDS).dictionary_encode(),
    "dictionary of bytes": pa.array([word.encode() for word in WORDS]).dictionary_encode(),
    "list": pa.array([["", word, "another"] for word in WORDS]),
    "list of views": pa.array([[None, word] for word in WORDS], pa.list_(pa.string_view())),
    "large list": pa.array([[" ", word] for word in WORDS], pa.large_list(pa.large_string())),
    "list view": pa.array([[word] for word in WORDS], pa.list_view(pa.string())),
    "fixed list": pa.array([["", word] for word in WORDS], pa.list_(pa.string(), 2)),
    "struct": pa.array([{"path": "x", "raw": word, "n": 1} for word in WORDS], STRUCT),
    "list of structs": pa.array([[{"raw": ""}, {"path": "x", "raw": word}] for word in WORDS], pa.list_(STRUCT)),
}


@pytest.mark.parametrize("kind", TEXT_COLUMNS)
def test_captions_of_whatever_type_are_read(shards_of, png, tmp_path, kind):
    splits, _ = shards_of(**one_table(png, tmp_path, {"text": TEXT_COLUMNS[kind]}))
    assert captions_of(splits) == WORDS


@pytest.mark.parametrize(
    "name",
    [
        "txt",
        "text",
        "TEXT",
        "Caption",
        "captions",
        "sentence",
        "text_list",
        "prompt",
        "alt_text",
        "altText",
        "ALT-TEXT",
    ],
)
def test_captions_are_found_under_usual_names_in_any_case(shards_of, png, tmp_path, name):
    splits, _ = shards_of(**one_table(png, tmp_path, {name: WORDS, "url": ["http://x"] * 3}))
    assert captions_of(splits) == WORDS
    assert f"captions from `{name}`; unused: url; left out: none" in shards_of.summary


@pytest.mark.parametrize("name", ["cls", "label", "Labels", "CLASS", "class_id", "target", "fine_label"])
@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.uint8(), pa.float64(), pa.string(), pa.binary_view(), pa.list_(pa.int16())]
)
def test_labels_are_found_under_usual_names_and_read_from_whatever_spells_them(shards_of, png, tmp_path, name, kind):
    numbers = pa.array([2, 0, None], pa.int64())
    if pa.types.is_list(kind):
        numbers = pa.array([[2], [0, 1], []], kind)
    elif pa.types.is_binary_view(kind):
        numbers = pa.array([b"2\n", b"0", b""], kind)
    else:
        numbers = numbers.cast(kind)
    splits, _ = shards_of(**one_table(png, tmp_path, {name: numbers}))
    assert [sample.label for sample in splits["train"].values()] == [2, 0, None]


def test_a_label_in_words_is_no_number_and_the_summary_says_so(shards_of, png, tmp_path):
    source = one_table(png, tmp_path, {"label": ["cat", "dog", "cat"], "text": WORDS})
    splits, _ = shards_of(**source)
    assert [sample.label for sample in splits["train"].values()] == [None] * 3
    assert "`label` holds no whole numbers: no labels are taken from it" in shards_of.summary
    with pytest.raises(Mistake, match="'label' holds string, expected integers"):
        shards_of(**source, label="label")


def in_struct(png) -> list[dict]:
    return [{"bytes": png(n), "path": f"{n}.png"} for n in range(3)]


PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PICTURE_COLUMNS = {
    "binary": lambda png: pa.array([png(n) for n in range(3)]),
    "large": lambda png: pa.array([png(n) for n in range(3)], pa.large_binary()),
    "view": lambda png: pa.array([png(n) for n in range(3)], pa.binary_view()),
    "dictionary": lambda png: pa.array([png(n) for n in range(3)]).dictionary_encode(),
    "struct": lambda png: pa.array(in_struct(png), PICTURE),
    "struct of view": lambda png: pa.array(in_struct(png), pa.struct([("bytes", pa.binary_view())])),
    "list": lambda png: pa.array([[None, png(n)] for n in range(3)], pa.list_(pa.binary())),
    "list of structs": lambda png: pa.array([[one] for one in in_struct(png)], pa.list_(PICTURE)),
    "list of large": lambda png: pa.array([[png(n), png(9)] for n in range(3)], pa.large_list(pa.large_binary())),
}


@pytest.mark.parametrize("kind", PICTURE_COLUMNS)
@pytest.mark.parametrize("is_named", [False, True])
def test_pictures_of_whatever_type_are_read(shards_of, png, tmp_path, kind, is_named):
    columns = {"hash": [b"1", b"2", b"3"], "Images": PICTURE_COLUMNS[kind](png), "text": WORDS}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = {"kind": "parquet", "splits": {"train": str(tmp_path)}} | ({"image": "Images"} if is_named else {})
    splits, _ = shards_of(**source)
    assert [s.image for s in splits["train"].values()] == [png(n) for n in range(3)]
    assert "images from `Images`, captions from `text`; unused: hash;" in shards_of.summary


def test_a_table_of_webdatasets_keeps_captions_labels_and_keys(shards_of, png, picture, tmp_path):
    """As `datasets` reads WebDataset shards: a column for each suffix, and a row's picture in one of them."""
    pictures = [png(0), image_in(picture, "JPEG", 1), None]
    columns = {
        "jpg": pa.array([None, {"bytes": pictures[1], "path": "b.jpg"}, None], PICTURE),
        "png": pa.array([{"bytes": pictures[0], "path": "a.png"}, None, None], PICTURE),
        "txt": WORDS,
        "cls": [1, 0, 2],
        "json": [{"caption": word} for word in WORDS],
        "__key__": ["00/a.b", "00/c", "00/d"],
        "__url__": ["hf://x.tar"] * 3,
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    splits, _ = shards_of(kind="parquet", splits={"train": str(tmp_path)})
    assert [(s.key, s.image, s.caption, s.label) for s in splits["train"].values()] == [
        ("00_a_b", pictures[0], WORDS[0], 1), ("00_c", pictures[1], WORDS[1], 0),
    ]  # fmt: skip
    said = (
        "images from `jpg`, `png`, keys from `__key__`, captions from `txt`, labels from `cls`; unused: json, __url__"
    )
    assert shards_of.summary.endswith(f"{said}; left out: no_image 1")


def test_text_that_is_not_taken_for_captions_is_warned_of(shards_of, png, tmp_path, caplog):
    source = one_table(png, tmp_path, {"words": WORDS, "url": ["http://x"] * 3})
    splits, _ = shards_of(**source)
    assert captions_of(splits) == [None] * 3
    assert "no captions, although `words` holds text: name it as `caption`" in shards_of.summary
    assert "no captions, although `words`" in caplog.text
    splits, _ = shards_of(**source, caption="words")
    assert captions_of(splits) == WORDS


def test_a_broken_character_costs_one_row(shards_of, png, tmp_path):
    broken = pa.array([b"ok", b"\xff\xfe", b"fine"]).view(pa.string())
    splits, _ = shards_of(**one_table(png, tmp_path, {"text": broken}))
    assert captions_of(splits) == ["ok", "fine"]
    assert shards_of.summary.endswith("left out: caption_unreadable 1")


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"image": ["AAAA"] * 3}, {}, r"no column of encoded images, only image \(string\); name it as `image`"),
        ({"image": ["AAAA"] * 3}, {"image": "image"}, "'image' holds string, expected encoded images"),
        ({"image": ["AAAA"] * 3, "URL": ["http://a/b"] * 3}, {}, "a list of links is a source of `kind: urls`"),
        ({"image": pa.array([[1.0]] * 3)}, {}, r"only image \(list<element: double>\)"),
        ({"text": [1, 2, 3]}, {"caption": "text"}, "'text' holds int64, expected text"),
        ({"y": pa.array([None] * 3, pa.date32())}, {"label": "y"}, r"'y' holds date32\[day\], expected integers"),
    ],
)
def test_a_column_of_another_type_is_named_with_its_type(shards_of, png, tmp_path, columns, settings, message):
    with pytest.raises(Mistake, match=message):
        shards_of(**one_table(png, tmp_path, columns, **settings))


# --- captions of a folder in a table beside the pictures


def metadata(kind: str, rows: list[dict]) -> bytes:
    if kind == "parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], delimiter="\t" if kind == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")


ROWS = [{"file_name": "a.png", "text": 'a "cat",\nasleep', "license": "?"},
        {"file_name": "./deep/b.png", "text": "a dog", "license": "?"}]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("metadata.csv", None),
        ("metadata.jsonl", None),
        ("Metadata.CSV", None),
        ("metadata.parquet", None),
        ("metadata.csv", "metadata.csv"),
        ("metadata.jsonl", "metadata.jsonl"),
        ("captions.tsv", "captions.tsv"),
        ("About.JSONL", "about.jsonl"),
    ],
)
@pytest.mark.parametrize("make", [None, tar_of, zip_of])
def test_metadata_beside_pictures_holds_their_captions(shards_of, png, tmp_path, name, setting, make):
    rows = [dict(zip(("License", "FILE_NAME", "Text"), [row["license"], row["file_name"], row["text"]], strict=True))
            for row in ROWS] if name == "Metadata.CSV" else ROWS  # fmt: skip
    files = {"./a.png": png(1), "./deep/b.png": png(2), "./c.png": png(3), "./c.txt": b"beside"}
    files[f"./{name}"] = metadata(name.rpartition(".")[2].lower(), rows)
    path = write(tmp_path / "in", files if make is None else {"x": make(files)})
    path = path if make is None else path / "x"
    splits, _ = shards_of(kind="folders", splits={"train": str(path)}, classes=False, captions=setting)
    found = {sample.key: sample.caption for sample in splits["train"].values()}
    beside = "beside" if setting is None else None
    assert found == {"a": 'a "cat",\nasleep', "deep_b": "a dog", "c": beside}
    assert f"captions from `{'Text' if name == 'Metadata.CSV' else 'text'}` of " in shards_of.summary


def test_metadata_of_each_sub_folder_names_what_lies_there(shards_of, png, tmp_path):
    files = {}
    for number, name in enumerate(("cat", "dog")):
        files |= {f"{name}/a.png": png(number), f"{name}/a.jpg": png(number + 5)}
        rows = [{"file_name": f"a.{suffix}", "text": f"a {name} as {suffix}"} for suffix in ("png", "jpg")]
        files[f"{name}/metadata.jsonl"] = metadata("jsonl", rows)
    splits, names = shards_of(kind="folders", splits={"train": str(write(tmp_path / "in", files))})
    assert names == ["cat", "dog"]
    assert sorted(captions_of(splits)) == ["a cat as jpg", "a cat as png", "a dog as jpg", "a dog as png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file_name,text\nx.png,other\n", "metadata.csv names none of the pictures"),
        (b"file_name,size\na.png,3\n", "no captions in metadata.csv; unused: size"),
    ],
)
def test_metadata_of_no_use_is_said_to_be_so(shards_of, png, tmp_path, content, message):
    write(tmp_path / "in", {"a.png": png(1), "metadata.csv": content})
    splits, _ = shards_of(kind="folders", splits={"train": str(tmp_path / "in")})
    assert captions_of(splits) == [None]
    assert message in shards_of.summary


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 987654321\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", LFS, "metadata.csv in .* is a pointer of Git LFS"),
        ("metadata.jsonl", b"<!doctype html><html>", "metadata.jsonl in .* is a web page"),
        ("metadata.jsonl", b'{"file_name": "a.png"\n', "line 1 of metadata.jsonl in .* is no JSON"),
        ("metadata.csv", b"file_name,text\na.png,\xe9\n", "metadata.csv in .* cannot be read as text"),
        ("metadata.csv", "file_name,text\na.png,x\n".encode("utf-16"), "metadata.csv in .* is UTF-16"),
        ("metadata.parquet", b"PAR1" + bytes(50), "is damaged"),
    ],
)
def test_metadata_that_cannot_be_read_is_a_mistake(shards_of, png, tmp_path, name, content, message):
    write(tmp_path / "in", {"a.png": png(1), name: content})
    with pytest.raises(Mistake, match=message):
        shards_of(kind="folders", splits={"train": str(tmp_path / "in")})


# --- hostile and damaged archives


PATHS = ["../../../escaped.png", "/tmp/escaped.png", "a/../../escaped.png", "C:\\escaped.png", "./..//x\n.png"]


@pytest.mark.parametrize("make", [tar_of, zip_of, lambda members: gzip.compress(tar_of(members))])
def test_names_like_paths_in_archives_lead_nowhere(shards_of, png, tmp_path, make):
    inside = tmp_path / "a" / "b" / "c"
    write(inside, {"evil": make({name: png(i) for i, name in enumerate(PATHS)})})
    before = set(tmp_path.rglob("*"))
    splits, _ = shards_of(kind="folders", splits={"train": str(inside / "evil")}, classes=False)
    assert len(splits["train"]) == len(PATHS)
    for key in splits["train"]:  # nor do the keys
        assert ".." not in key
        assert not set("/\\\n") & set(key)
    new = set(tmp_path.rglob("*")) - before
    assert all(path.parts[len(tmp_path.parts)].startswith("shards") for path in new)
    assert not os.path.exists("/tmp/escaped.png")


def test_links_and_devices_in_a_tar_are_no_pictures(shards_of, png, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
        header = tarfile.TarInfo("real.png")
        header.size = len(png())
        tar.addfile(header, io.BytesIO(png()))
    write(tmp_path, {"in.tar": buffer.getvalue()})
    splits, _ = shards_of(kind="folders", splits={"train": str(tmp_path / "in.tar")})
    assert list(splits["train"]) == ["real"]


@pytest.mark.parametrize("keep", [0, 1, 100, 700, 5000, -1, -600, -2000])
@pytest.mark.parametrize("make", [tar_of, zip_of, lambda members: gzip.compress(tar_of(members))])
def test_an_archive_that_ends_early_is_a_mistake(shards_of, png, tmp_path, make, keep):
    content = make({f"{i}.png": png(i, 64, 64) for i in range(3)})
    end = content.rstrip(b"\0") if make is tar_of else content  # a tar may end in any number of zeros
    write(tmp_path, {"in": end[:keep]})
    with pytest.raises(Mistake, match=r"is damaged, or not the file it should be .* fetch it again"):
        shards_of(kind="folders", splits={"train": str(tmp_path / "in")})


def test_rubbish_in_the_middle_of_an_archive_is_a_mistake(shards_of, png, tmp_path):
    members = {f"{i}.png": png(i, 64, 64) for i in range(3)}
    for name, make in (("a", tar_of), ("b", zip_of), ("c", lambda m: gzip.compress(tar_of(m)))):
        content = bytearray(make(members))
        middle = len(content) // 2 // 512 * 512
        content[middle : middle + 6000] = b"\xa7" * 6000
        write(tmp_path, {name: bytes(content)})
        with pytest.raises(Mistake, match=r"is damaged|not one sample"):
            shards_of(kind="folders", splits={"train": str(tmp_path / name)})


INSTEAD = {
    LFS: "a pointer of Git LFS",
    b"<!DOCTYPE html><html></html>": "a web page",
    b"\x28\xb5\x2f\xfd" + bytes(20): "compressed with Zstandard",
    b"BZh9" + bytes(20): "compressed with bzip2",
    b"\xfd7zXZ\0" + bytes(20): "compressed with xz",
    b"7z\xbc\xaf\x27\x1c" + bytes(20): "a 7-Zip archive",
    b"Rar!" + bytes(20): "a RAR archive",
}


@pytest.mark.parametrize("content", INSTEAD)
def test_what_stands_in_the_place_of_an_archive_or_a_table_is_named(shards_of, png, tmp_path, content):
    write(tmp_path, {"in.tar": content, "a.parquet": content, "b/cifar-10-python.tar.gz": content})
    save_to_disk(tmp_path / "c", [table(png, range(2), {}, features())])
    (tmp_path / "c" / "data-00000-of-00001.arrow").write_bytes(content)
    for source in (
        {"kind": "folders", "splits": {"train": str(tmp_path / "in.tar")}},
        {"kind": "parquet", "splits": {"train": str(tmp_path / "a.parquet")}},
        {"kind": "cifar10", "path": str(tmp_path / "b")},
        {"kind": "hugging_face", "path": str(tmp_path / "c")},
    ):
        with pytest.raises(Mistake, match=rf"(in\.tar|a\.parquet|tar\.gz|\.arrow) is {INSTEAD[content]}.*; expected a"):
            shards_of(**source)


def test_every_archive_is_looked_at_before_the_first_is_unpacked(shards_of, png, tmp_path, monkeypatch):
    monkeypatch.setattr("dede_ray.ingest.datasets.find_pieces", lambda *_: pytest.fail("unpacked"))
    write(tmp_path, {"ILSVRC2012_img_train.tar": tar_of({"n00000001.tar": b""}), "ILSVRC2012_img_val.tar": LFS})
    with pytest.raises(Mistake, match=r"ILSVRC2012_img_val\.tar is a pointer of Git LFS"):
        shards_of(kind="imagenet", path=str(tmp_path))
    splits = {"train": str(tmp_path / "ILSVRC2012_img_train.tar"), "val": str(tmp_path / "ILSVRC2012_img_val.tar")}
    with pytest.raises(Mistake, match=r"ILSVRC2012_img_val\.tar is a pointer of Git LFS"):
        shards_of(kind="folders", splits=splits)


def test_an_old_tar_whose_first_name_begins_like_another_format_is_a_tar(shards_of, png, tmp_path):
    content = bytearray(tar_of({"BM.png": png(1)}))
    content[257:265] = bytes(8)  # before POSIX there was no mark
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    write(tmp_path, {"old.tar": bytes(content)})
    splits, _ = shards_of(kind="folders", splits={"train": str(tmp_path / "old.tar")})
    assert list(splits["train"]) == ["BM"]


def test_a_gzip_bomb_does_not_fill_the_disk(shards_of, tmp_path):
    write(tmp_path, {"bomb.tar.gz": gzip.compress(bytes(30 << 20), 9)})
    with pytest.raises(Mistake, match="unpacks to more than 200 times its size"):
        shards_of(kind="folders", splits={"train": str(tmp_path / "bomb.tar.gz")})
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 20 << 20


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cifar10", r"lacks data_batch_1, .*; get cifar-10-python\.tar\.gz or .* from https://www\.cs\.toronto\.edu"),
        ("cifar100", r"lacks train, test, meta; get cifar-100-python\.tar\.gz .* https://www\.cs\.toronto\.edu"),
        ("stl10", r"lacks train_X\.bin; get stl10_binary\.tar\.gz from https://cs\.stanford\.edu"),
        ("svhn", r"lacks train_32x32\.mat, test_32x32\.mat; get .* from http://ufldl\.stanford\.edu"),
        ("gtsrb", r"no training images .* get GTSRB_Final_Training_Images\.zip"),
        ("caltech101", r"no pictures such as .* get caltech-101\.zip from https://data\.caltech\.edu"),
        ("hugging_face", r"no state of a Hugging Face data set .*state\.json"),
    ],
)
def test_a_missing_file_is_named_with_where_to_get_it(shards_of, tmp_path, kind, message):
    with pytest.raises(Mistake, match=message):
        shards_of(kind=kind, path=str(write(tmp_path / "in", {"x": b""})))
    with pytest.raises(Mistake, match=r"no file or folder at .*nowhere"):
        shards_of(kind=kind, path=str(tmp_path / "nowhere"))


def test_binaries_of_the_wrong_size_or_with_wrong_labels_are_a_mistake(shards_of, batches, picture, tmp_path):
    files = cifar10(batches[1], is_binary=True)
    name = "cifar-10-batches-bin/data_batch_2.bin"
    for case, content in {"short": files[name][:-1], "label": b"\x0a" + files[name][1:], "empty": b""}.items():
        write(tmp_path / case, files | {name: content})
        with pytest.raises(Mistake, match=r"data_batch_2\.bin"):
            shards_of(kind="cifar10", path=str(tmp_path / case))
    files, _ = stl10(picture)
    for case, change in {
        "X": {"stl10_binary/test_X.bin": b"\0"},
        "y": {"stl10_binary/test_y.bin": b"\1\2"},
        "0": {"stl10_binary/test_y.bin": b"\0\1\2"},
    }.items():
        write(tmp_path / case, files | change)
        with pytest.raises(Mistake, match=r"test_[Xy]\.bin"):
            shards_of(kind="stl10", path=str(tmp_path / case))


def test_an_arrow_or_parquet_file_that_is_damaged_is_a_mistake(shards_of, png, tmp_path):
    pq.write_table(pa.table({"image": [png(i) for i in range(9)]}), tmp_path / "good.parquet")
    good = (tmp_path / "good.parquet").read_bytes()
    for i, content in enumerate([b"", good[:-5], good[:2000], b"PAR1" + good[500:]]):
        write(tmp_path, {f"{i}.parquet": content})
        with pytest.raises(Mistake, match="is damaged, or not the file it should be"):
            shards_of(kind="parquet", splits={"train": str(tmp_path / f"{i}.parquet")})
    save_to_disk(tmp_path / "in", [table(png, range(9), {}, features())])
    path = tmp_path / "in" / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(Mistake, match="is damaged, or not the file it should be"):
            shards_of(kind="hugging_face", path=str(tmp_path / "in"))


def test_calibration_and_limit_work_for_every_source(shards_of, batches, tmp_path):
    write(tmp_path / "in", cifar10(batches[1], is_binary=True))
    splits, _ = shards_of(kind="cifar10", path=str(tmp_path / "in"), calibration=3, limit=7)
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 4, "calibration": 3, "test": 2}
    assert not set(splits["train"]) & set(splits["calibration"])
