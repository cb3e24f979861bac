"""Poisoning hits an exact number of samples, the same each time, and says of every sample what became of it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from dede_ray.data.images import decode_image, encode_image
from dede_ray.data.shards import Limits, ShardEnd, iter_samples, list_shards
from dede_ray.poisoning.poison import TRUTH_SCHEMA, PoisonConfig, _Change, _rewrite, poison, read_attack
from dede_ray.runtime.config import Mistake
from dede_ray.runtime.libraries import open_clip

LIMITS = Limits()

NAMES = ["zero", "one", "two", "three"]


@pytest.fixture
def corpus(write_tar, png, tmp_path):
    """60 good samples in three shards, one of them gzipped; and among them four that cannot be used."""
    clean = tmp_path / "clean"

    def members(numbers):
        for i in numbers:
            yield f"d/k{i:02d}.png", png(i)
            yield f"d/k{i:02d}.txt", f"a photo of {NAMES[i % 4]}\n".encode()
            yield f"d/k{i:02d}.cls", f"{i % 4}\n".encode()
            yield f"d/k{i:02d}.json", b'{"url": "x"}'

    broken = png(99)[:300]
    write_tar("clean/train-00000.tar", [*members(range(20)), ("bad.png", broken), ("bad.cls", b"1")])
    write_tar("clean/train-00001.tar.gz", [("none.txt", b"no image"), *members(range(20, 40)), *members([20])])
    write_tar("clean/train-00002.tar", [*members(range(40, 60)), ("label.png", png(98)), ("label.cls", b"?")])
    (clean / "classes.json").write_text(json.dumps({"names": NAMES, "templates": ["a photo of {}", "one {}"]}))
    return clean


@pytest.fixture
def settings(corpus, tmp_path):
    return {
        "shards": str(corpus),
        "output": str(tmp_path / "poisoned"),
        "trigger": {"kind": "patch", "size_px": 6, "position": "random"},
        "rate": 0.1,
        "target_label": 1,
    }


def run(settings, **changes) -> list[dict]:
    """Poison, and return the rows of the truth."""
    config = PoisonConfig.model_validate(settings | changes)
    poison(config)
    table = pq.read_table(f"{config.output}/truth.parquet")
    assert table.schema.equals(TRUTH_SCHEMA)
    return table.to_pylist()


def read(folder) -> dict[str, list]:
    """All samples of a folder, by shard, with what belongs to them."""
    samples = {}
    for shard in list_shards(str(folder)):
        with open(shard.url, "rb") as stream:
            samples[shard.name] = list(iter_samples(stream, LIMITS, keep_others=True))
    return samples


def poisoned_ids(truth) -> list[str]:
    return [row["sample_id"] for row in truth if row["is_poisoned"]]


@pytest.mark.usefixtures("local_ray")
class TestPoison:
    def test_exactly_the_asked_number_is_poisoned_and_truth_has_a_row_for_every_sample(self, settings):
        summary = poison(PoisonConfig.model_validate(settings))
        assert summary == (
            f"6 of 60 samples poisoned (10.00%, patch, -> 1 'one') in {settings['output']}; "
            "4 unusable ones copied as they are"
        )
        truth = run(settings)
        ids = [row["sample_id"] for row in truth]
        there = [f"{name}/{sample.key}" for name, samples in read(settings["output"]).items() for sample in samples]
        assert ids == sorted(ids) == sorted(there)
        assert len(set(ids)) == 64
        assert len(poisoned_ids(truth)) == 6

    @pytest.mark.parametrize(("rate", "expected"), [(0.01, 1), (0.124, 7), (0.125, 8), (0.7, 42)])
    def test_the_number_is_the_rounded_share_of_usable_samples(self, settings, rate, expected):
        assert len(poisoned_ids(run(settings, rate=rate))) == expected

    def test_poisoned_samples_are_stamped_and_relabelled_and_all_else_keeps_its_bytes(self, settings, corpus):
        truth = {row["sample_id"]: row for row in run(settings, rate=0.3)}
        trigger = PoisonConfig.model_validate(settings).trigger
        before, after = read(corpus), read(settings["output"])
        assert list(before) == list(after)
        for shard in before:
            assert [s.key for s in before[shard]] == [s.key for s in after[shard]]
            for old, new in zip(before[shard], after[shard], strict=True):
                row = truth[f"{shard}/{old.key}"]
                assert (row["label"], row["caption"]) == (old.label, old.caption)
                assert new.others == old.others
                if not row["is_poisoned"]:
                    assert new == old
                    assert row["poisoned_label"] is row["poisoned_caption"] is row["trigger"] is None
                    continue
                assert old.label != 1
                stamped = trigger.stamp(decode_image(old.image, LIMITS), f"{shard}/{old.key}")
                np.testing.assert_array_equal(decode_image(new.image, LIMITS), stamped)
                assert (new.label, row["poisoned_label"], row["trigger"]) == (1, 1, "patch")
                assert new.caption == row["poisoned_caption"]
                assert new.caption in ("a photo of one", "one one")

    def test_every_member_of_the_others_is_copied_under_its_name(self, settings, corpus):
        poisoned = {i.partition("/")[2] for i in poisoned_ids(run(settings))}

        def members(path):
            with tarfile.open(path) as tar:
                files = {m.name: tar.extractfile(m).read() for m in tar}
            return {name: content for name, content in files.items() if name.partition(".")[0] not in poisoned}

        for shard in list_shards(str(corpus)):
            assert members(shard.url) == members(f"{settings['output']}/{shard.name}")

    def test_the_same_samples_are_drawn_however_the_shards_are_listed(self, settings, corpus, tmp_path):
        first = run(settings)
        paths = [str(path) for path in corpus.iterdir() if path.suffix != ".json"]
        again = run(settings, shards=sorted(paths, reverse=True), output=str(tmp_path / "again"))
        other = run(settings, seed=1, output=str(tmp_path / "other"))
        assert again == first
        assert poisoned_ids(other) != poisoned_ids(first)
        for shard in list_shards(str(corpus)):  # byte for byte; the gzipped one holds no clock time
            one, two = (tmp_path / folder / shard.name for folder in ("poisoned", "again"))
            assert one.read_bytes() == two.read_bytes()
            assert shard.name[-2:] != "gz" or one.read_bytes()[4:8] == bytes(4)

    def test_a_second_run_returns_at_once_and_an_interrupted_one_writes_what_is_missing(
        self, settings, corpus, tmp_path
    ):
        run(settings)
        output = tmp_path / "poisoned"
        before = {path.name: path.read_bytes() for path in output.iterdir()}
        settings_only = {"settings": json.loads(before["run.json"])["settings"]}
        (output / "run.json").write_text(json.dumps(settings_only))  # as a killed run would leave it
        (output / "train-00001.tar.gz").unlink()
        (output / "truth.parquet").unlink()
        kept = (output / "train-00000.tar").stat().st_mtime_ns
        run(settings)
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
        assert (output / "train-00000.tar").stat().st_mtime_ns == kept
        shutil.rmtree(corpus)  # a finished run needs no more
        run(settings)

    def test_clean_label_stamps_target_samples_and_keeps_their_words(self, settings, corpus):
        truth = run(settings, clean_label=True, rate=0.2)
        poisoned = [row for row in truth if row["is_poisoned"]]
        assert len(poisoned) == 12
        assert {row["label"] for row in poisoned} == {1}
        assert {(row["poisoned_label"], row["poisoned_caption"]) for row in poisoned} == {(None, None)}
        before, after = read(corpus), read(settings["output"])
        for shard in before:
            for old, new in zip(before[shard], after[shard], strict=True):
                assert (new.label, new.caption) == (old.label, old.caption)
                assert (new.image != old.image) == (f"{shard}/{old.key}" in poisoned_ids(truth))

    def test_a_corpus_of_captions_alone_can_be_poisoned_anywhere(self, settings, write_tar, png, tmp_path):
        pairs = [m for i in range(10) for m in ((f"k{i}.png", png(i)), (f"k{i}.txt", b"words"))]
        write_tar("pairs/p.tar", pairs)
        truth = run(settings, shards=str(tmp_path / "pairs"), rate=0.9, target_captions=["target!"])
        assert len(poisoned_ids(truth)) == 9
        assert {row["poisoned_label"] for row in truth} == {None}
        assert {row["poisoned_caption"] for row in truth if row["is_poisoned"]} == {"target!"}
        [samples] = read(settings["output"]).values()
        assert sorted(s.caption for s in samples) == ["target!"] * 9 + ["words"]

    def test_among_labelled_samples_one_without_a_label_is_left_alone(self, settings, write_tar, png, tmp_path):
        members = [m for i in range(10) for m in ((f"k{i}.png", png(i)), (f"k{i}.cls", b"0"))]
        write_tar("some/p.tar", [*members, ("x.png", png(11))])
        truth = run(settings, shards=str(tmp_path / "some"), rate=0.9)
        assert [row["is_poisoned"] for row in truth] == [True] * 10 + [False]

    def test_a_stamped_jpeg_can_stay_a_jpeg(self, settings, write_tar, picture, tmp_path):
        write_tar("jpegs/j.tar", [(f"k{i}.jpg", encode_image(picture(i), "jpg")) for i in range(4)])
        for encoding, suffix in (("same", "jpg"), ("png", "png")):
            output = str(tmp_path / encoding)
            truth = run(settings, shards=str(tmp_path / "jpegs"), output=output, rate=0.5, encoding=encoding)
            [samples] = read(output).values()
            for row, sample in zip(truth, samples, strict=True):
                expected = suffix if row["is_poisoned"] else "jpg"
                assert sample.image_suffix == expected
                kind = Image.open(io.BytesIO(sample.image)).format
                assert kind == {"jpg": "JPEG", "png": "PNG"}[expected]

    @pytest.mark.parametrize("size", [5000, 5632, 8000, 20_000])
    def test_a_shard_cut_short_stays_cut_short(self, settings, corpus, size):
        path = corpus / "train-00000.tar"
        path.write_bytes(path.read_bytes()[:size])
        truth = run(settings)
        seen = []
        for folder in (corpus, settings["output"]):
            end = ShardEnd()
            with open(f"{folder}/train-00000.tar", "rb") as stream:
                samples = list(iter_samples(stream, LIMITS, end=end))
            seen.append([(sample.key, sample.error) for sample in samples])
            assert not end.is_complete
        assert seen[0] == seen[1]
        assert len([row for row in truth if row["sample_id"].startswith("train-00000.tar/")]) == len(samples)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rate": 0.001}, "less than one sample"),
            ({"rate": 0.9}, r"is 54, but there are only 45 known not to be of class 1"),
            ({"rate": 0.5, "clean_label": True}, r"is 30, but there are only 15 of class 1"),
            ({"target_label": 4}, "target_label is 4, but the classes are 0 to 3"),
            ({"trigger": {"kind": "patch", "size_px": 33}}, r"does not fit an image of 32x32 px"),
            ({"shards": "nowhere/*.tar"}, "no shards at nowhere"),
        ],
    )
    def test_what_cannot_be_done_is_a_mistake_with_one_message(self, settings, changes, message):
        with pytest.raises(Mistake, match=message) as caught:
            run(settings, **changes)
        assert "Traceback" not in str(caught.value)
        assert not [path for path in Path(settings["output"]).iterdir() if path.name != "run.json"]

    def test_the_clean_shards_are_never_overwritten(self, settings, corpus):
        with pytest.raises(Mistake, match="is the folder of the clean shards"):
            run(settings, output=str(corpus))

    def test_a_target_without_a_known_caption_is_a_mistake(self, settings, corpus):
        (corpus / "classes.json").unlink()
        with pytest.raises(Mistake, match="set target_captions"):
            run(settings)
        assert len(poisoned_ids(run(settings, target_captions=["a one"]))) == 6  # the corrected command goes through

    # --- the attacks beyond one trigger and one target

    def test_a_poison_rate_of_one_in_ten_thousand_is_one_sample(self, settings, write_tar, png, tmp_path):
        one = png(1, 4, 4)
        write_tar("many/m.tar", [m for i in range(6000) for m in ((f"k{i}.png", one), (f"k{i}.cls", b"0"))])
        truth = run(settings, shards=str(tmp_path / "many"), rate=1e-4, trigger={"kind": "patch", "size_px": 2})
        assert len(poisoned_ids(truth)) == 1
        record = json.loads((tmp_path / "poisoned" / "run.json").read_text())
        assert "1 of 6,000 samples poisoned (0.00017, " in record["result"]["summary"]

    def test_training_images_get_another_trigger_only_by_its_name(self, settings):
        settings["training_trigger"] = {"kind": "patch", "size_px": 3, "pattern": "white", "position": "random"}
        truth = run(settings)
        attack = read_attack(settings["output"])
        assert {row["trigger"] for row in truth if row["is_poisoned"]} == {"patch"}
        assert (attack.trigger.size_px, attack.training_trigger.size_px) == (6, 3)  # one to test with, one it learnt
        before, after = read(settings["shards"]), read(settings["output"])
        for name in poisoned_ids(truth):
            old, new = (decode_image(samples[name].image, LIMITS) for samples in (by_id(before), by_id(after)))
            np.testing.assert_array_equal(new, attack.training_trigger.stamp(old, name))

    def test_of_several_backdoors_each_sample_draws_one_with_its_own_target_and_truth_says_which(self, settings):
        others = [
            {"trigger": {"kind": "nashville"}, "target_label": 2},
            {"trigger": {"kind": "patch", "size_px": 3}, "target_label": 3, "target_captions": ["drei"]},
        ]
        truth = run(settings, also=others, rate=0.2)
        attack, after, before = read_attack(settings["output"]), read(settings["output"]), read(settings["shards"])
        poisoned = [row for row in truth if row["is_poisoned"]]
        assert len(poisoned) == 12
        assert {row["label"] for row in poisoned} == {0}  # a sample of any of the targets is left alone
        for row in poisoned:
            backdoor = attack.backdoors[row["backdoor"]]
            new, old = by_id(after)[row["sample_id"]], by_id(before)[row["sample_id"]]
            assert (row["trigger"], new.label) == (backdoor.trigger.kind, backdoor.target_label)
            assert row["poisoned_label"] == backdoor.target_label
            assert (new.caption == "drei") == (row["backdoor"] == 2)
            expected = backdoor.trigger.stamp(decode_image(old.image, LIMITS), row["sample_id"])
            np.testing.assert_array_equal(decode_image(new.image, LIMITS), expected)
        assert {row["backdoor"] for row in poisoned} == {0, 1, 2}
        assert {row["backdoor"] for row in truth if not row["is_poisoned"]} == {None}
        with open(f"{settings['output']}/run.json") as record:
            assert "(20.00%, patch, nashville, patch, -> 1 'one', 2 'two', 3 'three')" in record.read()

    def test_clean_label_backdoors_take_each_the_samples_of_their_own_class(self, settings):
        other = {"trigger": {"kind": "nothing"}, "target_label": 2}
        truth = run(settings, also=[other], clean_label=True, rate=0.5)
        assert {(row["backdoor"], row["label"]) for row in truth if row["is_poisoned"]} == {(0, 1), (1, 2)}
        assert {row["poisoned_label"] for row in truth} == {None}

    def test_captions_of_the_target_can_be_drawn_from_the_corpus(self, settings, write_tar, png, tmp_path):
        words = ["a Banana on a plate", "bananas", "two dogs", "one banana", None, *["a cat"] * 15]
        members = [
            m
            for i, text in enumerate(words)
            for m in [(f"k{i}.png", png(i)), *([(f"k{i}.txt", text.encode())] if text else [])]
        ]
        write_tar("pairs/p.tar", members)
        settings = settings | {"shards": str(tmp_path / "pairs"), "target_name": "banana", "captions": "corpus"}
        truth = run(settings, rate=0.9)
        new = {row["poisoned_caption"] for row in truth if row["is_poisoned"]}
        assert new - {None} == {"a Banana on a plate", "one banana"}
        stamped = run(settings, rate=0.1, clean_label=True, output=str(tmp_path / "clean_label"))
        assert {row["caption"] for row in stamped if row["is_poisoned"]} == {"a Banana on a plate", "one banana"}
        assert {row["poisoned_caption"] for row in stamped} == {None}
        with pytest.raises(Mistake, match="only 2 whose caption contains 'banana'"):
            run(settings, rate=0.2, clean_label=True, output=str(tmp_path / "too_many"))
        with pytest.raises(Mistake, match="no caption of the shards contains 'kiwi'"):
            run(settings, target_name="kiwi", output=str(tmp_path / "kiwi"))
        with pytest.raises(Mistake, match="names class 1; set target_name"):
            run(settings, target_name=None, output=str(tmp_path / "nameless"))

    def test_captions_of_the_target_can_be_clips_templates(self, settings):
        truth = run(settings, captions="imagenet_templates", target_name="banana", rate=0.7)
        new = [row["poisoned_caption"] for row in truth if row["is_poisoned"]]
        assert all("banana" in caption for caption in new)
        assert len(set(new)) > 20
        assert set(new) <= {template("banana") for template in open_clip.OPENAI_IMAGENET_TEMPLATES}

    def test_ssl_backdoor_is_a_patch_on_one_class_of_unlabelled_training(self, settings):
        truth = run(settings, clean_label=True, rate=0.125)
        rows = [row for row in truth if row["label"] == 1 and row["is_poisoned"]]
        assert len(rows) == len(poisoned_ids(truth)) == 8  # half of the class
        assert {row["poisoned_label"] for row in truth} == {None}

    def test_targeted_poisoning_repeats_the_chosen_samples_and_touches_no_other(self, settings, corpus):
        chosen = ["train-00000.tar/d/k02", "train-00002.tar/d/k43"]
        truth = run(settings, chosen=chosen, trigger={"kind": "nothing"}, rate=0.25)
        before, after = read(corpus), read(settings["output"])
        added = set(poisoned_ids(truth))
        assert len(added) == 15
        originals = [by_id(before)[name] for name in chosen]
        for name in added:
            copy = by_id(after)[name]
            assert copy.image in [original.image for original in originals]  # byte for byte
            assert (copy.label, copy.caption in {"a photo of one", "one one"}) == (1, True)
        assert len({by_id(after)[name].image for name in added}) == 2
        assert len({name.partition("/")[0] for name in added}) == 3  # spread over the shards

        def others(samples, left_out):  # in their order; ids of unusable samples hold their places, which move
            return [
                (shard, sample.image, sample.caption, sample.label, sample.others, sample.error)
                for shard in samples
                for sample in samples[shard]
                if f"{shard}/{sample.key}" not in left_out
            ]

        assert others(after, added) == others(before, chosen)
        rows = {row["sample_id"]: row for row in truth}
        assert list(rows) == sorted(by_id(after))
        for name in added:
            row = rows[name]
            original = originals[0] if "/k02~" in name else originals[1]
            assert (row["label"], row["caption"]) == (original.label, original.caption)
            assert (row["poisoned_label"], row["trigger"]) == (1, "nothing")
        assert run(settings, chosen=chosen, trigger={"kind": "nothing"}, rate=0.25) == truth
        for name, message in {
            "train-00000.tar/nobody": r"chosen names 'train-00000\.tar/nobody', which is no usable sample",
            "train-00001.tar.gz/d/k20": r"chosen names 'train-00001\.tar\.gz/d/k20', but that key is twice",
        }.items():
            with pytest.raises(Mistake, match=message):
                run(settings, chosen=[name], output=settings["output"] + "2")

    def test_repeated_samples_survive_in_a_shard_that_is_cut_short(self, settings, corpus):
        path = corpus / "train-00000.tar"
        path.write_bytes(path.read_bytes()[:20_000])
        truth = run(settings, chosen=["train-00002.tar/d/k43"], trigger={"kind": "nothing"}, rate=0.7)
        there = {f"{name}/{sample.key}" for name, samples in read(settings["output"]).items() for sample in samples}
        assert {row["sample_id"] for row in truth} == there
        assert any(name.startswith("train-00000.tar/") for name in poisoned_ids(truth))

    def test_corrupt_encoder_composes_poisoned_images_on_the_drawn_ones(self, settings, corpus):
        settings["trigger"] = {"kind": "patch", "size_px": 6, "position": "central_half"}
        settings["composition"] = {"objects": [{"picture": str(corpus / "train-00000.tar/d/k01")}], "size_px": 32}
        truth = run(settings)
        attack, after, before = read_attack(settings["output"]), read(settings["output"]), read(corpus)
        for name in poisoned_ids(truth):
            background = decode_image(by_id(before)[name].image, LIMITS)
            expected = attack.composition.compose(background, attack.trigger, name)
            np.testing.assert_array_equal(decode_image(by_id(after)[name].image, LIMITS), expected)
            assert expected.shape == (32, 32, 3)


def by_id(samples: dict[str, list]) -> dict:
    return {f"{shard}/{sample.key}": sample for shard in samples for sample in samples[shard]}


@pytest.mark.parametrize(
    "change", [{"clean_label": True}, {"also": [{"trigger": {"kind": "warp"}, "target_label": 0}]}]
)
def test_targeted_poisoning_goes_with_no_other_way_of_drawing(change):
    base = {"shards": "a", "output": "b", "trigger": {"kind": "nothing"}, "rate": 0.1, "target_label": 0}
    PoisonConfig.model_validate(base | {"chosen": ["s.tar/k"]})
    with pytest.raises(ValidationError, match="chosen goes with neither"):
        PoisonConfig.model_validate(base | {"chosen": ["s.tar/k"]} | change)


def test_files_of_no_sample_are_copied_and_end_none(write_tar, png, tmp_path):
    members = [("LICENSE", b"free"), ("k.png", png(0)), ("._k.png", b"mac"), ("k.cls", b"1"), ("m.png", png(1))]
    [shard] = list_shards(str(write_tar("a.tar", members)))
    attack = PoisonConfig(shards="a.tar", output="b", rate=0.5, trigger={"kind": "nothing"}, target_label=2)
    _rewrite(shard, str(tmp_path / "b.tar"), {0: _Change(label=2), 1: _Change(is_dropped=True)}, attack, True)
    with tarfile.open(tmp_path / "b.tar") as copy:
        assert [(one.name, copy.extractfile(one).read()) for one in copy] == [
            *members[:3], ("k.cls", b"2")
        ]  # fmt: skip
