"""What belongs together is one finding, and nothing else is."""

import time

import numpy as np
import pytest

from dede_ray.scan.decisions import Conformal
from dede_ray.scan.groups import Grouping, Rows, copies, findings


def names(count, shard="train-00000.tar"):
    return [f"{shard}/{i:06d}" for i in range(count)]


def make(count, **columns):
    """Rows of different pictures with different captions, of which nothing is flagged."""
    rng = np.random.default_rng(count)
    rows = {
        "sample_ids": names(count),
        "flagged": np.zeros(count, bool),
        "p_value": np.linspace(0.1, 1, count),
        "content_hash": [f"hash {i}" for i in range(count)],
        "perceptual_hash": rng.integers(0, 2**63, count).tolist(),
        "captions": [f"caption {i}" for i in range(count)],
    }
    return Rows(**{**rows, **columns})


def sizes(found):
    return [(one.kind, one.size) for one in found]


def cakes(rng):
    """798 equal pictures with one caption, at random places among 5,000 others."""
    rows = make(5798)
    where = np.sort(rng.permutation(5798)[:798])
    for i in where.tolist():
        rows.content_hash[i], rows.perceptual_hash[i], rows.captions[i] = "cake", 2**40 + 77, "birthday cake"
    rows.flagged[where] = True
    rows.p_value[where] = 0.001
    return rows, where


def test_the_birthday_cakes_are_one_finding():
    rows, where = cakes(np.random.default_rng(0))
    start = time.process_time()
    (found,) = findings(rows)
    assert time.process_time() - start < 3  # 0.2 s
    assert found.sample_ids == tuple(rows.sample_ids[i] for i in where)
    assert (found.kind, found.size, found.caption) == ("clump", 798, "birthday cake")
    assert (
        found.why == "798 of 798 samples have one caption, and their pictures are near each other (1 different files)"
    )
    assert (found.share_flagged, found.smallest_p) == (1.0, 0.001)


def test_the_birthday_cakes_are_one_hypothesis():
    rows, where = cakes(np.random.default_rng(1))
    rng = np.random.default_rng(2)
    scores = rng.normal(size=5798)
    scores[where] = 6.0
    calibration, groups = rng.normal(size=9999), copies(rows.content_hash, rows.captions)
    alone = Conformal().decide(scores, calibration, rows.sample_ids)
    together = Conformal().decide(scores, calibration, rows.sample_ids, groups=groups)
    assert alone.flagged[where].all()
    assert together.report["num_distinct"] == 5001
    assert together.report["poisoned_at_least"] <= 1 < 500 < alone.report["poisoned_at_least"]


def test_singles_stay_singles_and_are_listed_if_flagged():
    rows = make(50, flagged=np.arange(50) % 25 == 3)
    found = findings(rows)
    assert sizes(found) == [("single", 1), ("single", 1)]
    assert [one.sample_ids for one in found] == [(rows.sample_ids[3],), (rows.sample_ids[28],)]
    assert found[0].caption == "caption 3"
    assert found[0].smallest_p == pytest.approx(rows.p_value[3])


def test_equal_bytes_almost_equal_pictures_and_clumps_are_distinguished():
    rows = make(30)
    rows.content_hash[1] = rows.content_hash[0]  # equal, other captions
    rows.perceptual_hash[5] = rows.perceptual_hash[4] ^ 0b1111  # almost equal
    rows.perceptual_hash[7] = rows.perceptual_hash[6] ^ 0b11111  # not any more
    for i in (10, 11, 12):  # almost equal with one caption
        rows.captions[i], rows.perceptual_hash[i] = "a cake", rows.perceptual_hash[10] ^ (i - 10)
    for i in (20, 21, 22):  # one caption, different pictures
        rows.captions[i] = "a photo"
    found = {one.kind: one for one in findings(rows)}
    assert {kind: one.size for kind, one in found.items()} == {"exact": 2, "near": 2, "clump": 3}
    assert found["exact"].why == "2 samples of the same picture, byte for byte, under 2 captions"
    assert "in 2 different files" in found["near"].why
    assert found["clump"].sample_ids == tuple(rows.sample_ids[10:13])
    assert found["clump"].share_flagged == 0


def test_two_of_one_caption_are_no_clump_and_three_are():
    rows = make(10)
    embedding = np.random.default_rng(3).normal(size=(10, 64))
    embedding[1:4] = embedding[0] + 0.05 * embedding[1:4]
    for i in range(4):
        rows.captions[i] = "a cake"
    near = make(10, captions=rows.captions, embedding_NE=embedding)
    assert sizes(findings(near)) == [("clump", 4)]
    assert sizes(findings(near, Grouping(min_clump=5))) == []
    assert sizes(findings(near, Grouping(min_cosine=1))) == []
    assert sizes(findings(make(10, captions=rows.captions))) == []  # their pictures are not near
    assert sizes(findings(make(10, embedding_NE=embedding))) == []  # near, but not of one caption
    scaled = make(10, captions=rows.captions, embedding_NE=embedding * np.arange(1, 11)[:, None])
    assert sizes(findings(scaled)) == [("clump", 4)]


def test_pictures_without_a_hash_are_near_nothing():
    seen = [1, None, None, 3, None, 2**40 - 1]
    (found,) = findings(make(6, captions=["a wall"] * 6, perceptual_hash=seen))
    assert (found.kind, found.sample_ids) == ("near", ("train-00000.tar/000000", "train-00000.tar/000003"))


def test_one_caption_of_several_kinds_of_picture_is_as_many_clumps():
    rng = np.random.default_rng(4)
    kind = np.repeat([0, 1, 2, 3, 4], [5, 4, 3, 2, 1])[rng.permutation(15)]  # two of a kind are no clump
    embedding = np.eye(5, 16)[kind] + 0.01 * rng.normal(size=(15, 16))
    found = findings(make(15, captions=["logo"] * 15, embedding_NE=embedding))
    assert sorted(sizes(found)) == [("clump", 3), ("clump", 4), ("clump", 5)]


def test_what_shares_a_picture_with_a_clump_is_part_of_it():
    rows = make(10)
    for i in range(4):
        rows.content_hash[i] = "cake"
        rows.captions[i] = "birthday cake" if i < 3 else "another caption"
    (found,) = findings(rows)
    assert (found.kind, found.size, found.caption) == ("clump", 4, "birthday cake")
    assert found.why.startswith("3 of 4 samples have one caption")


def test_no_caption_makes_no_clump_and_no_hash_no_copy():
    nothing = make(6, captions=["", " ", None, "", "", None], content_hash=[None] * 6, perceptual_hash=[None] * 6)
    assert findings(nothing) == []
    everything = np.ones((6, 4))
    assert findings(make(6, captions=["", "", None, "", "", None], embedding_NE=everything)) == []
    assert findings(make(0)) == []


def test_the_worst_comes_first_and_the_order_given_does_not_matter():
    rows = make(40)
    for first, size in ((0, 2), (10, 4), (20, 3)):
        for i in range(first, first + size):
            rows.content_hash[i] = f"copy {first}"
    rows.p_value[0:2], rows.p_value[10:14], rows.p_value[20:23] = np.nan, [0.5, 0.01, 0.5, np.nan], 0.01
    found = findings(rows)
    assert [one.size for one in found] == [4, 3, 2]
    assert [one.smallest_p for one in found] == [0.01, 0.01, None]
    order = np.random.default_rng(5).permutation(40)
    columns = {
        name: [column[i] for i in order] if isinstance(column, list) else column[order]
        for name, column in vars(rows).items()
        if column is not None
    }
    assert findings(Rows(**columns)) == found


def test_a_caption_of_many_different_pictures_costs_no_more_than_its_bound(monkeypatch, caplog):
    monkeypatch.setattr("dede_ray.scan.groups.MOST_LEADERS", 20)
    rows = make(100, captions=["photo"] * 100)
    assert findings(rows) == []
    assert "80 samples of very common captions" in caplog.text


def test_copies_are_equal_pictures_and_with_captions_equal_pairs():
    content = ["a", "a", "b", None, None, "a"]
    assert copies(content) == ["a", "a", None, None, None, "a"]
    with_captions = copies(content, ["x", "x", "x", "x", "x", "poisoned"])
    assert with_captions[0] == with_captions[1] is not None
    assert with_captions[2:] == [None] * 4
