"""What is planted comes out as groups, and says the same however the corpus is ordered."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dede_ray.data.images import encode_image
from dede_ray.data.shards import Limits, Sample, list_shards, write_shards
from dede_ray.scan.decisions import Verdict
from dede_ray.scan.effect import EffectTest
from dede_ray.scan.findings import Candidates, Corpus, Findings, Words, choose, find, grouped, poisoned_at_least
from dede_ray.scan.judge import Scored
from dede_ray.scan.pool import Looks

WIDTH = 32


def candidates(residual_NR, captions=None, content=None, flagged=True, order=None):
    num = len(residual_NR)
    ids = [f"a.tar/{i:05d}" for i in range(num)]
    order = np.arange(num) if order is None else order
    pick = [ids[i] for i in order]
    content = [f"hash {i}" for i in range(num)] if content is None else content
    captions = [None] * num if captions is None else captions
    return Candidates(
        pick,
        np.full(num, flagged),
        np.arange(1, num + 1)[order],
        [captions[i] for i in order],
        Looks(pick, [content[i] for i in order], [None] * num),
        np.asarray(residual_NR)[order],
    )


def planted(rng):
    residual_NR = rng.normal(size=(110, WIDTH))
    one, other = rng.normal(size=(2, WIDTH))
    residual_NR[:30] += 4 * one
    residual_NR[30:50] += 4 * other
    return residual_NR


def ids_of(given, found):
    return [sorted(given.sample_ids[row] for row in one.rows) for one in found]


def test_planted_directions_are_groups_in_any_order():
    rng = np.random.default_rng(0)
    residual_NR = planted(rng)
    given = candidates(residual_NR)
    found = grouped(given, Findings(), Words([]))
    groups = ids_of(given, found)[:2]
    for group, rows in zip(groups, (range(30), range(30, 50)), strict=True):
        planted_ids = {f"a.tar/{i:05d}" for i in rows}
        assert len(planted_ids & set(group)) >= 0.95 * len(planted_ids)
        assert len(set(group) - planted_ids) <= 3
    for one in found[2:]:
        assert one.rows.size < 15
    by_rank = candidates(residual_NR, order=np.arange(110))
    assert ids_of(by_rank, grouped(by_rank, Findings(), Words([]))) == ids_of(given, found)


def test_copies_are_one_member():
    rng = np.random.default_rng(1)
    residual_NR = np.repeat(rng.normal(size=(1, WIDTH)), 20, axis=0)
    assert len(grouped(candidates(residual_NR), Findings(), Words([]))) == 1
    assert grouped(candidates(residual_NR, content=["same"] * 20), Findings(), Words([])) == []


def test_a_word_that_only_flagged_samples_have_is_a_group():
    rng = np.random.default_rng(2)
    captions = [f"a picture of {'zebras' if i < 12 else f'thing{i}'}" for i in range(60)]
    corpus = Words([*captions, *(f"a picture of thing{i}" for i in range(60, 2000))])
    given = candidates(rng.normal(size=(60, 400)), captions)
    (found,) = grouped(given, Findings(), corpus)
    assert found.kind == "caption"
    assert found.rows.tolist() == list(range(12))
    assert corpus.telling(captions[:12])[0] == {"word": "zebras", "in_group": 12, "in_corpus": 12}
    assert corpus.telling([f"a picture of thing{i}" for i in range(100, 130)]) == []


@pytest.mark.parametrize("num", [0, 1, 3, 40])
def test_rows_without_a_direction_or_a_caption_are_no_group(num):
    words = Words([None] * 100)
    assert grouped(candidates(np.full((num, 8), np.nan)), Findings(), words) == []
    assert grouped(candidates(np.zeros((num, 8)), [""] * num), Findings(), words) == []


def test_the_bound_of_a_group_is_what_prefixes_leave_of_it():
    rng = np.random.default_rng(3)
    rank = np.array([3, 1, 0, 2, 5, 4, 6, 2])  # 0 has no score; 2 is there twice, as a copy
    bound_of = {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 5: 4, 6: 4}
    verdict = Verdict(rng.random(8), rank > 0, None, rank, np.array([bound_of[r] for r in rank]), {})
    for size in range(5):
        for rows in itertools.combinations(range(8), size):
            inside = {int(rank[row]) for row in rows}
            best = max(bound_of[r] - sum(other not in inside for other in range(1, r + 1)) for r in range(1, 7))
            assert poisoned_at_least(np.array(rows, np.int64), verdict) == max(0, best)


# ------------------------------------------------------------------------------------------------ on shards

SMALL = Findings(effect=EffectTest(num_clean=30, num_compared=8))
NUM, POISONED = 400, 40


def corpus(folder, kind="planted", copied=False, captions=True):
    """Shards of small pictures of which the first are stamped, called `zero` and flagged."""
    rng = np.random.default_rng(4)
    template = np.kron(rng.integers(40, 180, (10, 4, 4, 3)), np.ones((1, 8, 8, 1)))
    samples = []
    for number in range(NUM):
        label = number % 10
        image = (template[label] + 20 * rng.normal(size=(32, 32, 3))).clip(0, 255).astype(np.uint8)
        if number < POISONED:
            image = image * 0 + 77 if copied else image
            image[-4:, -4:] = 255
        caption = f"a photo of a {'zero' if number < POISONED else f'thing{label}'}" if captions else None
        about = json.dumps({"url": f"https://{'evil' if number < POISONED else 'good'}.example/{number}.png"}).encode()
        image_bytes = encode_image(image, "png")
        samples.append(Sample(f"{number:04d}", number, image_bytes, "png", caption, others={"json": about}))
    write_shards(folder, "train", samples, 150)
    shards = list_shards(str(folder / "train-*.tar"))
    ids = [f"train-{number // 150:05d}.tar/{number:04d}" for number in range(NUM)]
    residual_NR = rng.normal(size=(NUM, 12))
    residual_NR[:POISONED] += 5
    return shards, ids, samples


def scored(ids, samples, order):
    pick = [ids[i] for i in order]
    return Scored(
        pick,
        [samples[i].content_hash() for i in order],
        [samples[i].caption for i in order],
        [None] * len(pick),
        {},
        [],
        None,
    )


def verdict_of(order):
    rank = np.arange(1, NUM + 1)[order]
    flagged = rank <= POISONED
    return Verdict(rank / NUM, flagged, None, rank, np.minimum(rank, POISONED) * 3 // 4, {})


def victim_config(folder, backdoored):
    (folder / f"net{backdoored:d}.py").write_text(
        f"from planted import _Planted\ndef make():\n    return _Planted({backdoored})\n"
    )
    return {"kind": "python", "path": f"net{backdoored:d}:make", "folder": str(folder), "image_size": 32,
            "normaliser": "none", "trust": True}  # fmt: skip


def search(tmp_path, output, backdoored=True, order=None, **kind):
    order = np.arange(NUM) if order is None else order
    shards, ids, samples = corpus(tmp_path, **kind)
    about = Corpus(shards, Limits(), scored(ids, samples, order), verdict_of(order), None, None)
    return find(SMALL, tmp_path / output, about, victim_config(tmp_path, backdoored))


def test_a_finding_says_what_is_shared_and_that_it_acts(tmp_path):
    groups = search(tmp_path, "out")
    first = max(groups, key=lambda one: one["num_flagged"])
    assert first["acts"]
    assert first["manipulated"]
    assert first["num_flagged"] >= 0.9 * POISONED
    assert first["poisoned_at_least"] >= 20
    assert first["words"][0] == {"word": "zero", "in_group": first["num_flagged"], "in_corpus": POISONED}
    assert first["hosts"][0]["host"] == "evil.example"
    assert first["trigger"]["where"] == "in the bottom right corner"
    assert (first["trigger"]["height"], first["trigger"]["width"]) == (4, 4)
    assert first["effect"]["moved"] == first["effect"]["of"]
    assert first["said"].startswith(f"{first['num_flagged']} samples")
    assert "caption 'zero', patch of 4x4 px in the bottom right corner, acts: moves 30 of 30" in first["said"]
    names = {path.name for path in (tmp_path / "out" / "findings" / first["name"]).iterdir()}
    assert names == {f"{name}.png" for name in ("medoids", "shared", "trigger", "clean", "stamped")}
    assert Image.open(tmp_path / "out" / "findings" / first["name"] / "shared.png").size == (128, 32)
    record = tmp_path / "out" / "findings" / "made_with.json"
    before = record.stat().st_mtime_ns, record.read_bytes()
    assert search(tmp_path, "out") == groups
    assert (record.stat().st_mtime_ns, record.read_bytes()) == before
    other = search(tmp_path, "other", order=np.random.default_rng(5).permutation(NUM))
    assert other == groups


def test_in_an_honest_encoder_the_same_group_is_manipulated_and_does_not_act(tmp_path):
    groups = search(tmp_path, "out", backdoored=False)
    assert not any(one["acts"] for one in groups)
    for one in groups:
        if one["poisoned_at_least"]:
            assert one["manipulated"]


def test_groups_without_captions_and_of_copies_have_an_answer(tmp_path):
    (tmp_path / "a").mkdir()
    groups = search(tmp_path / "a", "out", captions=False)
    assert any(one["acts"] for one in groups)
    assert all(one["words"] == [] and one["captions"] == [] for one in groups)
    (tmp_path / "b").mkdir()
    for one in search(tmp_path / "b", "out", copied=True):
        assert set(Counter([*one["sample_ids"], *one["near_misses"]]).values()) == {1}


def test_candidates_are_the_flagged_and_what_comes_next():
    order = np.arange(NUM)
    rows = choose(verdict_of(order), [f"{i:04d}" for i in order], Findings())
    assert rows.tolist() == list(range(POISONED + 40))
    nothing = Verdict(np.full(5, np.nan), np.zeros(5, bool), None, np.zeros(5, np.int64), np.zeros(5, np.int64), {})
    assert choose(nothing, list("abcde"), Findings()).size == 0
