"""Sources become captioned shards: nothing is lost unseen, splits are disjoint, and each class has its share."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from dede_ray.data.captions import read_classes
from dede_ray.data.images import decode_image
from dede_ray.data.shards import Limits, Sample, iter_samples, list_shards
from dede_ray.ingest.ingest import IngestConfig, ingest
from dede_ray.runtime.config import Mistake

LIMITS = Limits()


def read(folder) -> dict[str, list[Sample]]:
    """All samples, by split."""
    splits: dict[str, list[Sample]] = {}
    for shard in list_shards(str(folder)):
        with open(shard.url, "rb") as stream:
            splits.setdefault(shard.name.split("-")[0], []).extend(iter_samples(stream, LIMITS))
    return splits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    config = IngestConfig.model_validate(
        {"source": {"kind": "digits"}, "output": str(folder), "templates": ["a {}", "the {}"], "samples_per_shard": 500}
    )
    return ingest(config), folder, config


def test_all_1797_digits_arrive_once(digits):
    summary, folder, _ = digits
    assert summary == f"train 1,200, calibration 300, test 297 samples in {folder}; left out: none"
    splits = read(folder)
    assert {split: len(samples) for split, samples in splits.items()} == {
        "train": 1200,
        "calibration": 300,
        "test": 297,
    }
    assert len({sample.key for samples in splits.values() for sample in samples}) == 1797
    assert [shard.name for shard in list_shards(f"{folder}/train-*.tar")] == [f"train-0000{i}.tar" for i in range(3)]


def test_each_split_holds_each_digit_by_its_share(digits):
    splits = read(digits[1])
    whole = Counter(sample.label for samples in splits.values() for sample in samples)
    for samples in splits.values():
        share = Counter(sample.label for sample in samples)
        for digit in range(10):
            assert abs(share[digit] - whole[digit] * len(samples) / 1797) <= 1.5


def test_digits_are_readable_pictures_with_captions_from_all_templates(digits):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    samples = read(digits[1])["train"]
    for sample in samples:
        assert sample.caption in (f"a {names[sample.label]}", f"the {names[sample.label]}")
    assert 0.4 < np.mean([sample.caption.startswith("a ") for sample in samples]) < 0.6
    images = np.stack([decode_image(sample.image, LIMITS) for sample in samples])
    assert images.shape == (1200, 32, 32, 3)
    assert (images.min(), images.max()) == (0, 255)
    assert (images[..., :1] == images).all()  # grey
    zero, one = (images[[s.label == digit for s in samples]].mean(axis=0) for digit in (0, 1))
    assert zero[16, 16, 0] < 60 < 160 < one[16, 16, 0]  # the hole of the zero, the stroke of the one


def test_classes_json_names_the_classes_and_the_templates(digits):
    _, folder, config = digits
    classes = read_classes(list_shards(str(folder)))
    assert classes.names[:2] == ["zero", "one"]
    assert classes.templates == config.templates
    assert json.loads((folder / "classes.json").read_text()) == classes.model_dump()


def test_equal_settings_give_equal_bytes_and_a_second_run_nothing_to_do(digits, tmp_path):
    summary, folder, config = digits
    ingest(config.model_copy(update={"output": str(tmp_path)}))
    for shard in list_shards(str(folder)):
        assert (folder / shard.name).read_bytes() == (tmp_path / shard.name).read_bytes()
    stamp = (folder / "train-00000.tar").stat().st_mtime_ns
    assert ingest(config) == summary
    assert (folder / "train-00000.tar").stat().st_mtime_ns == stamp


def test_another_seed_draws_other_splits(digits, tmp_path):
    _, folder, config = digits
    ingest(config.model_copy(update={"output": str(tmp_path), "seed": 1}))
    for split in ("train", "calibration", "test"):
        one, other = ({sample.key for sample in read(f)[split]} for f in (folder, tmp_path))
        assert one != other


def test_asking_for_more_digits_than_there_are_is_a_mistake(tmp_path):
    source = {"kind": "digits", "calibration": 1000, "test": 797}
    with pytest.raises(Mistake, match="leaves nothing to train on"):
        ingest(IngestConfig.model_validate({"source": source, "output": str(tmp_path)}))


# --- labelled shards


@pytest.fixture
def labelled(write_tar, png, tmp_path):
    def members(split, numbers):
        return [
            m for i in numbers for m in ((f"{split}_{i:02d}.png", png(i)), (f"{split}_{i:02d}.cls", b"%d" % (i % 2)))
        ]

    write_tar("in/train-0.tar", members("train", range(10)))
    write_tar("in/train-1.tar.gz", [*members("train", range(10, 20)), ("bad.png", b"?"), ("bad.cls", b"0")])
    write_tar("in/test-0.tar", [*members("test", range(12)), ("nolabel.png", png(50)), ("noimage.cls", b"1")])
    return {
        "source": {
            "kind": "webdataset",
            "splits": {"train": str(tmp_path / "in" / "train-*"), "test": str(tmp_path / "in" / "test-*")},
            "class_names": ["cat", "dog"],
        },
        "output": str(tmp_path / "out"),
    }


def with_source(settings, **changes) -> IngestConfig:
    return IngestConfig.model_validate(settings | {"source": settings["source"] | changes})


def test_labelled_shards_keep_keys_order_and_image_bytes_and_gain_captions(labelled, png):
    summary = ingest(with_source(labelled))
    assert summary == f"train 20, test 13 samples in {labelled['output']}; left out: image_unreadable 1, no_image 1"
    train = read(labelled["output"])["train"]
    assert [(s.key, s.image) for s in train] == [(f"train_{i:02d}", png(i)) for i in range(20)]
    assert [s.caption for s in train] == ["a photo of a cat", "a photo of a dog"] * 10


@pytest.mark.parametrize("giver", ["train", "test"])
def test_calibration_is_taken_class_by_class_out_of_the_split_that_gives_it(labelled, giver):
    ingest(with_source(labelled, calibration=4, calibration_from=giver))
    splits = read(labelled["output"])
    whole = {"train": 20, "test": 13}
    assert {split: len(samples) for split, samples in splits.items()} == whole | {
        "calibration": 4,
        giver: whole[giver] - 4,
    }
    assert Counter(sample.label for sample in splits["calibration"]) == {0: 2, 1: 2}
    assert all(sample.key.startswith(giver) for sample in splits["calibration"])
    assert len({sample.key for samples in splits.values() for sample in samples}) == 33


def test_a_samples_own_caption_stands_and_without_caption_and_class_it_stays_without(write_tar, png, tmp_path):
    write_tar("in.tar", [
        ("a.png", png(0)), ("a.txt", "Großer Hund".encode()), ("a.cls", b"1"),
        ("b.png", png(1)), ("b.cls", b"1"),
        ("c.png", png(2)), ("c.txt", b" \n"),
        ("d.png", png(3)),
        ("e.png", png(4)), ("e.pickle", b"cos\nsystem\n(S'touch /tmp/x'\ntR."),
    ])  # fmt: skip
    source = {"kind": "webdataset", "splits": {"train": str(tmp_path / "in.tar")}, "class_names": ["cat", "dog"]}
    ingest(IngestConfig.model_validate({"source": source, "output": str(tmp_path / "named")}))
    samples = read(tmp_path / "named")["train"]
    assert [s.caption for s in samples] == ["Großer Hund", "a photo of a dog", None, None, None]
    assert [s.label for s in samples] == [1, 1, None, None, None]

    source.pop("class_names")  # labels without names stay labels
    ingest(IngestConfig.model_validate({"source": source, "output": str(tmp_path / "plain")}))
    samples = read(tmp_path / "plain")["train"]
    assert [s.caption for s in samples] == ["Großer Hund", None, None, None, None]
    assert [s.label for s in samples] == [1, 1, None, None, None]
    assert not (tmp_path / "plain" / "classes.json").exists()


def test_a_bad_caption_or_label_is_left_aside_and_the_image_kept(write_tar, png, tmp_path):
    members = [
        ("a.png", png(0)), ("a.txt", b"caf\xe9"), ("b.png", png(1)), ("b.cls", b"dog"), ("b.txt", b"a dog"),
        ("c.png", png(2)), ("c.txt", b"word " * 3000), ("d.txt", b"no image"),
    ]  # fmt: skip
    write_tar("in/train-00000.tar", members)
    source = {"kind": "webdataset", "splits": {"train": str(tmp_path / "in")}}
    config = IngestConfig.model_validate({"source": source, "output": str(tmp_path / "out")})
    said = ingest(config)
    assert "; notes: caption_too_long 1, caption_unreadable 1, label_unreadable 1; left out: no_image 1" in said
    found = [(s.key, s.image, s.label, (s.caption or "")[:5]) for s in read(tmp_path / "out")["train"]]
    assert found == [("a", png(0), None, ""), ("b", png(1), None, "a dog"), ("c", png(2), None, "word ")]


def test_captions_that_are_elsewhere_are_told_of(write_tar, png, tmp_path):
    write_tar(
        "in/train-00000.tar", [m for i in "ab" for m in ((f"{i}.png", png()), (f"{i}.json", b'{"caption": "a"}'))]
    )
    source = {"kind": "webdataset", "splits": {"train": str(tmp_path / "in")}}
    said = ingest(IngestConfig.model_validate({"source": source, "output": str(tmp_path / "out")}))
    assert "train-00000.tar has 2 members .json with a field `caption`: set limits.caption.field to caption; " in said


def test_limit_takes_the_first_of_each_split(labelled):
    ingest(with_source(labelled, limit=5))
    assert [s.key for s in read(labelled["output"])["train"]] == [f"train_{i:02d}" for i in range(5)]


def test_a_key_that_two_shards_share_stays_two_samples(write_tar, png, labelled, tmp_path):
    for i in range(2):
        write_tar(f"same/s{i}.tar", [("k.png", png(i)), ("k.cls", b"0")])
    ingest(with_source(labelled, splits={"train": str(tmp_path / "same")}))
    train = read(labelled["output"])["train"]
    assert [(s.key, s.image, s.error) for s in train] == [("k", png(0), None), ("k@s1", png(1), None)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ["cat"]}, "holds label 1 .* complete class_names"),
        ({"calibration": 20}, "calibration is to get 20 samples of `train`, which has 20 usable"),
        ({"splits": {"train": "nowhere/*.tar"}}, "no shards at nowhere"),
        ({"calibration": 2, "calibration_from": "val"}, "from the split 'val', but the splits are train, test"),
    ],
)
def test_settings_that_do_not_fit_the_shards_are_a_mistake(labelled, changes, message):
    with pytest.raises(Mistake, match=message):
        ingest(with_source(labelled, **changes))


def test_real_cifar10_shards_are_captioned_and_calibrated_out_of_test(shared_data, tmp_path):
    folder = shared_data / "cifar10"
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    source = {
        "kind": "webdataset",
        "splits": {"train": str(folder / "train-0000[01].tar.gz"), "test": str(folder / "test-*.tar.gz")},
        "class_names": names,
        "calibration": 100,
        "calibration_from": "test",
        "limit": 200,
    }
    summary = ingest(IngestConfig.model_validate({"source": source, "output": str(tmp_path)}))
    assert summary == f"train 200, test 100, calibration 100 samples in {tmp_path}; left out: none"
    for split, samples in read(tmp_path).items():
        for sample in samples:  # CIFAR's keys name the split and the class
            assert sample.key.startswith(f"{'test' if split == 'calibration' else split}_{names[sample.label]}_")
            assert sample.caption == f"a photo of a {names[sample.label]}"
            assert decode_image(sample.image, LIMITS).shape == (32, 32, 3)
