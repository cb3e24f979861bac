"""Without clean samples: the corpus calibrates itself, and looks decide what may be claimed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from dede_ray.runtime.config import override
from dede_ray.scan.calibration import FromCorpus, drawn_by_content, judge_by_itself, most_share
from dede_ray.scan.decisions import AssumedPoisonRate, CleanQuantile, Conformal, EmpiricalNull
from dede_ray.scan.judge import Judged, Judging, Scored
from dede_ray.scan.pool import Company
from dede_ray.scan.reviews import Reviews
from dede_ray.scan.score import ScoreConfig
from tests.benchmarks import trimmed

NUM, POISONED = 2000, 60
FROM_CORPUS = FromCorpus(from_corpus=1000)


def scored(seed: int, num: int = NUM, poisoned: int = POISONED, moved: float = 5.0, **about) -> Scored:
    """Samples of which the first are poisoned: their score is higher, and their residuals point one way."""
    rng = np.random.default_rng(seed)
    is_poisoned = np.arange(num) < poisoned
    known = {
        "sample_ids": [f"s.tar/{i:05d}" for i in range(num)],
        "content_hash": [f"{seed} {i}" for i in range(num)],
        "captions": [None] * num,
    }
    return Scored(
        **{**known, **about},
        perceptual_hash=[None] * num,
        columns={"seen": rng.normal(size=num) + moved * is_poisoned},
        embedding_ids=[],
        embedding_ME=None,
        residuals={"residual": rng.normal(size=(num, 16)) + 2 * is_poisoned[:, None]},
    )


def judged(corpus: Scored, said: dict[str, str] | None = None, settings=FROM_CORPUS, decision=None, judging=None):
    reviews = Reviews(said or {}, len(said or {}))
    decision = decision or Conformal(score="seen")
    return judge_by_itself(judging or Judging(), decision, corpus, settings, reviews, [], False)


def to_look(found: Judged, why: str) -> list[str]:
    return [row["sample_id"] for row in found.to_review or () if row["why"] == why]


def truly(names, flipped=(), poisoned: int = POISONED) -> dict[str, str]:
    """What a person says who knows the truth, but for some."""
    is_poisoned = {name: (int(name[-5:]) < poisoned) != (name in flipped) for name in names}
    return {name: "poisoned" if yes else "clean" for name, yes in is_poisoned.items()}


def looked_at(corpus: Scored, **about) -> tuple[Judged, dict[str, str]]:
    """Judged after a person looked at what should be looked at before anything is certified."""
    said = truly(to_look(judged(corpus, **about), "calibration"))
    return judged(corpus, said, **about), said


# --- the draw


def test_the_draw_is_by_content_whatever_the_order_and_copies_stay_together():
    rng = np.random.default_rng(0)
    names = [f"picture {i}" for i in rng.integers(700, size=1000)]
    drawn = drawn_by_content(names, 200, 3)
    assert len({name for name, yes in zip(names, drawn, strict=True) if yes}) == 200
    for _ in range(5):
        order = rng.permutation(1000)
        np.testing.assert_array_equal(drawn_by_content([names[i] for i in order], 200, 3), drawn[order])
    chosen = {name for name, yes in zip(names, drawn, strict=True) if yes}
    assert all((name in chosen) == yes for name, yes in zip(names, drawn, strict=True))
    assert not (drawn == drawn_by_content(names, 200, 4)).all()
    part = drawn_by_content(names[:600], 200, 3)  # a corpus that grows displaces some, and draws none anew
    assert not (drawn[:600] & ~part).any()


def test_half_of_the_pictures_is_left_to_judge_and_what_has_no_score_is_not_drawn():
    drawn = drawn_by_content(["a", "a", "b", "c", "d", None], 5000, 0)
    assert len({"aabcd"[i] for i in np.flatnonzero(drawn)}) == 2
    assert not drawn[5]
    assert not drawn_by_content(["a", None], 5000, 0).any()
    assert not drawn_by_content([], 5000, 0).any()


def test_each_sample_is_drawn_as_often_as_any_other():
    names = [f"picture {i}" for i in range(50)]
    times = sum(drawn_by_content(names, 10, seed).astype(int) for seed in range(2000))
    assert np.abs(times / 2000 - 0.2).max() < 5 * math.sqrt(0.16 / 2000)


# --- bounds


def at_most_so_many(num_found: int, num_looks: int, share: float) -> float:
    """P(num_found or fewer of num_looks), by enumeration of all outcomes."""
    outcomes = itertools.product((0, 1), repeat=num_looks)
    return sum(share ** sum(one) * (1 - share) ** (num_looks - sum(one)) for one in outcomes if sum(one) <= num_found)


@pytest.mark.parametrize("num_looks", [1, 2, 5, 9])
def test_the_bound_is_the_share_at_which_so_few_would_be_a_surprise(num_looks):
    for num_found in range(num_looks):
        for confidence in (0.9, 0.95):
            share = brentq(lambda p, x=num_found, c=confidence: at_most_so_many(x, num_looks, p) - (1 - c), 0, 1)
            assert most_share(num_found, num_looks, confidence) == pytest.approx(share, abs=1e-9)
    assert most_share(num_looks, num_looks) == 1
    assert most_share(0, 0) == 1


def test_thirty_looks_without_a_clean_one_give_nine_and_a_half_percent():
    assert most_share(0, 30) == pytest.approx(1 - 0.05 ** (1 / 30))
    assert round(most_share(0, 30), 3) == 0.095


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_the_bound_holds_in_at_least_95_of_100_draws_without_replacement(share):
    rng = np.random.default_rng(0)
    found = rng.hypergeometric(round(200 * share), 200 - round(200 * share), 30, size=4000)
    holds = np.mean([most_share(int(one), 30) >= share for one in found])
    assert holds >= 0.95 - 3 * math.sqrt(0.0475 / 4000)


# --- trimmed


def test_once_the_highest_are_looked_at_the_list_is_certified_and_says_that_it_is_trimmed():
    corpus = scored(1)
    found, said = looked_at(corpus)
    report, flagged = found.report, found.verdict.flagged
    assert (report["mode"], report["certified"]) == ("trimmed", True)
    struck = [name for name, verdict in said.items() if verdict == "poisoned"]
    assert report["calibration"]["struck"] == len(struck) > 20
    assert report["num_calibration"] == 1000 - len(struck)
    assert "trimmed: calibrated by" in report["message"]
    assert flagged[:POISONED].mean() > 0.9
    assert flagged[POISONED:].sum() < 10
    calibrates = found.extra["calibrates"].to_numpy(zero_copy_only=False)
    assert calibrates.sum() == report["num_calibration"]
    assert np.isnan(found.verdict.p_value[calibrates]).all()
    assert not found.verdict.rank[calibrates].any()
    assert all(flagged[int(name[-5:])] for name in struck)  # reviewed as poisoned
    assert report["num_flagged"] == flagged.sum()


def test_nothing_is_certified_until_all_of_the_highest_are_looked_at_and_unsure_ones_stay():
    corpus = scored(1)
    names = to_look(judged(corpus), "calibration")
    assert len(names) == 100
    score = dict(zip(corpus.sample_ids, corpus.columns["seen"], strict=True))
    assert [score[name] for name in names] == sorted((score[name] for name in names), reverse=True)
    most = judged(corpus, truly(names[:-1]))
    assert (most.report["mode"], most.report["certified"]) == ("ranked", False)
    assert "look at 1 more of the 100 calibration samples" in most.report["message"]
    assert to_look(most, "calibration") == names  # looks change neither who is drawn nor the order
    unsure = judged(corpus, {**truly(names[:-1]), names[-1]: "unsure"})
    assert unsure.report["mode"] == "trimmed"
    assert unsure.extra["calibrates"].to_pylist()[int(names[-1][-5:])]


def test_where_all_that_were_drawn_are_looked_at_the_list_is_certified_as_with_clean_samples():
    corpus, settings = scored(2), FromCorpus(from_corpus=300, looks=300)
    found, _ = looked_at(corpus, settings=settings)
    assert found.report["mode"] == "certified"


def test_nothing_depends_on_the_order_of_the_samples():
    corpus = scored(3)
    found, said = looked_at(corpus, judging=Judging(company=Company(of="seen", residual="residual")))
    order = np.random.default_rng(0).permutation(NUM)
    some = {name: [getattr(corpus, name)[i] for i in order] for name in ("sample_ids", "content_hash")}
    moved = scored(3, **some)
    moved.columns["seen"] = corpus.columns["seen"][order]
    moved.residuals["residual"] = corpus.residuals["residual"][order]
    again = judged(moved, said, judging=Judging(company=Company(of="seen", residual="residual")))
    np.testing.assert_array_equal(again.verdict.flagged, found.verdict.flagged[order])
    np.testing.assert_array_equal(again.verdict.rank, found.verdict.rank[order])
    assert again.to_review == found.to_review


def test_scores_do_not_depend_on_reviews():
    corpus, judging = scored(4), Judging(company=Company(of="seen", residual="residual", share=0.1))
    decision = Conformal(score="company")
    before = judged(corpus, decision=decision, judging=judging)
    after, _ = looked_at(corpus, decision=decision, judging=judging)
    np.testing.assert_array_equal(before.made["company"], after.made["company"])
    assert after.verdict.flagged[:POISONED].mean() > 0.9


@pytest.mark.parametrize("moved", [1.0, 3.0, 6.0])
def test_p_values_of_clean_samples_are_as_rare_as_they_say_once_the_poison_is_struck(moved):
    rare: dict[float, list[float]] = {0.01: [], 0.1: []}
    for trial in range(40):
        corpus = scored(100 + trial, num=1000, poisoned=20, moved=moved)
        settings = FromCorpus(from_corpus=500, looks=50, seed=trial)
        names = to_look(judged(corpus, settings=settings), "calibration")
        found = judged(corpus, truly(names, poisoned=20), settings, Conformal(score="seen", seed=trial))
        p_value = found.verdict.p_value[20:]
        for t, shares in rare.items():
            shares.append(float((p_value[~np.isnan(p_value)] <= t).mean()))
    for t, shares in rare.items():
        error = np.std(shares) / math.sqrt(len(shares))
        assert np.mean(shares) <= t * (1 + 0.02) + 3 * error, (t, np.mean(shares), error)
        if moved == 6:  # all of it is found and struck: exact
            assert np.mean(shares) >= t - 3 * error - 1 / 480, (t, np.mean(shares), error)


def test_the_share_of_clean_samples_on_trimmed_lists_is_what_was_declared():
    shares = []
    for trial in range(20):
        found, _ = looked_at(scored(300 + trial, moved=4.0), settings=FromCorpus(from_corpus=1000, seed=trial))
        on_list = found.verdict.flagged & ~np.isnan(found.verdict.p_value)
        shares.append(on_list[POISONED:].sum() / max(1, on_list.sum()))
    assert np.mean(shares) <= 0.1 + 2 * np.std(shares) / math.sqrt(20)


# --- warnings


@pytest.mark.parametrize("seed", range(5))
def test_striking_out_clean_samples_is_warned_about_and_striking_out_poison_is_not(seed):
    corpus = scored(10 + seed)
    found, said = looked_at(corpus)
    assert found.report["calibration"]["warnings"] == []
    clean = [name for name, verdict in said.items() if verdict == "clean"]
    for wrong in (clean[:10], clean[-10:], clean):
        warned = judged(corpus, truly(said, flipped=wrong)).report
        assert "struck out" in " ".join(warned["calibration"]["warnings"])
        assert "warning: " in warned["message"]


@pytest.mark.parametrize("seed", range(5))
def test_on_a_clean_corpus_striking_out_the_highest_is_warned_about(seed):
    corpus = scored(20 + seed, poisoned=0)
    names = to_look(judged(corpus), "calibration")
    assert judged(corpus, dict.fromkeys(names, "clean")).report["calibration"]["warnings"] == []
    struck = {**dict.fromkeys(names, "clean"), **dict.fromkeys(names[:15], "poisoned")}
    assert "explain about" in judged(corpus, struck).report["calibration"]["warnings"][0]


def test_poison_that_is_put_where_it_is_not_judged_is_warned_about():
    corpus = scored(30)
    drawn = np.flatnonzero(drawn_by_content(corpus.content_hash, 1000, 0))
    corpus.columns["seen"][:] = np.random.default_rng(0).normal(size=NUM)
    corpus.columns["seen"][drawn[:80]] += 6
    warnings = judged(corpus).report["calibration"]["warnings"]
    assert "set another calibration.seed" in warnings[0]
    assert judged(corpus, settings=FromCorpus(from_corpus=1000, seed=1)).report["calibration"]["warnings"] == []


# --- audited and ranked


@pytest.mark.parametrize("drawn", [0, 1000])
def test_where_nobody_looks_there_is_a_ranking_an_estimate_and_no_certificate(drawn):
    corpus = scored(5, moved=7.0)
    found = judged(corpus, settings=FromCorpus(from_corpus=drawn))
    report = found.report
    assert (report["mode"], report["certified"]) == ("ranked", False)
    assert "certified" not in report["message"]
    assert found.verdict.flagged[:POISONED].mean() > 0.9
    assert found.verdict.flagged[POISONED:].sum() < 15
    assert sorted(found.verdict.rank) == list(range(1, NUM + 1))  # all of them, drawn or not
    local_fdr = found.extra["local_fdr"].to_numpy()
    assert local_fdr[:POISONED].mean() < 0.2
    assert local_fdr[POISONED:].mean() > 0.95
    assert (np.diff(local_fdr[np.argsort(corpus.columns["seen"])]) <= 0).all()
    assert len(to_look(found, "calibration")) == min(100, drawn)


def test_looks_at_a_sample_of_the_list_bound_how_much_of_it_is_clean():
    corpus, settings = scored(6, moved=7.0), FromCorpus(from_corpus=0)
    before = judged(corpus, settings=settings)
    names = to_look(before, "list")
    assert len(names) == 30
    half = judged(corpus, truly(names[:15]), settings)
    assert half.report["mode"] == "ranked"
    done = judged(corpus, truly(names), settings)
    audit = done.report["audit"]["list"]
    num_clean = sum(verdict == "clean" for verdict in truly(names).values())
    assert done.report["mode"] == "audited"
    assert audit["at_most"] == pytest.approx(most_share(num_clean, 30))
    assert f"at most {audit['at_most']:.1%} of this list" in done.report["message"]
    assert "certified" not in done.report["message"]
    assert half.report["audit"]["list"]["at_most"] == pytest.approx(
        most_share(15 + sum(verdict == "clean" for verdict in truly(names[:15]).values()), 30)
    )
    below = judged(corpus, dict.fromkeys(to_look(before, "below"), "clean"), settings).report["audit"]["below"]
    assert below["at_most"] == pytest.approx(most_share(0, 30))
    assert "poisoned" in below["said"]


def test_selective_looks_neither_change_the_sample_nor_help_the_bound():
    corpus, settings = scored(7, moved=7.0), FromCorpus(from_corpus=0)
    before = judged(corpus, settings=settings)
    names = to_look(before, "list")
    elsewhere = [name for name in corpus.sample_ids[:POISONED] if name not in names]
    after = judged(corpus, dict.fromkeys(elsewhere, "poisoned"), settings)
    assert to_look(after, "list") == names
    assert after.report["audit"] == before.report["audit"]
    steps = [judged(corpus, dict.fromkeys(names[:k], "poisoned"), settings) for k in (5, 20, 30)]
    bounds = [one.report["audit"]["list"]["at_most"] for one in steps]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == pytest.approx(most_share(0, 30))  # what is left counts against the list until it is looked at


def test_a_clean_look_outside_the_draw_calibrates_nothing_and_takes_a_sample_off_the_list():
    corpus = scored(8)
    found, said = looked_at(corpus)
    calibrates = found.extra["calibrates"].to_pylist()
    spared = int(np.flatnonzero(found.verdict.flagged & ~np.isnan(found.verdict.p_value))[0])
    added = int(np.flatnonzero(~found.verdict.flagged & ~np.array(calibrates))[0])
    more = {**said, corpus.sample_ids[spared]: "clean", corpus.sample_ids[added]: "poisoned"}
    after = judged(corpus, more)
    assert after.extra["calibrates"].to_pylist() == calibrates
    assert not after.verdict.flagged[spared]
    assert after.verdict.flagged[added]
    assert (after.report["reviews"]["added_to_list"], after.report["reviews"]["taken_off_list"]) == (
        found.report["reviews"]["added_to_list"] + 1, 1,
    )  # fmt: skip
    assert after.extra["reviewed"].to_pylist()[spared] == "clean"
    assert after.report["audit"]["list"]["size"] == found.report["audit"]["list"]["size"]  # the rule's own


def test_a_look_at_one_copy_is_a_look_at_all():
    hashes = [f"9 {i}" for i in range(NUM)]
    hashes[1] = hashes[0]
    corpus = scored(9, content_hash=hashes)
    corpus.columns["seen"][1] = corpus.columns["seen"][0]
    found = judged(corpus, {corpus.sample_ids[1]: "poisoned"})
    assert found.verdict.flagged[:2].all()
    assert found.extra["reviewed"].to_pylist()[:2] == ["poisoned"] * 2
    differ = judged(corpus, {corpus.sample_ids[0]: "poisoned", corpus.sample_ids[1]: "clean"})
    assert differ.extra["reviewed"].to_pylist()[:2] == ["unsure"] * 2


def test_other_rules_take_the_drawn_samples_too_and_claim_no_more_than_they_do():
    corpus = scored(11, moved=7.0)
    for rule in (CleanQuantile(score="seen"), AssumedPoisonRate(score="seen", rate=0.03), EmpiricalNull(score="seen")):
        found, _ = looked_at(corpus, decision=rule)
        assert found.report["rule"] == rule.kind
        assert (found.report["mode"], found.report["certified"]) == ("ranked", False)
        assert found.verdict.flagged[:POISONED].mean() > 0.7


def test_samples_without_a_score_are_neither_drawn_nor_flagged():
    corpus = scored(12)
    corpus.columns["seen"][:10] = np.nan
    found = judged(corpus, {corpus.sample_ids[0]: "poisoned"})
    assert not found.verdict.flagged[:10].any()
    assert not any(found.extra["calibrates"].to_pylist()[:10])
    assert found.extra["local_fdr"].to_pylist()[:10] == [None] * 10


def test_the_empirical_null_takes_candidates_for_the_whole_of_a_column_that_only_they_have():
    corpus, judging = scored(13, moved=3.0), Judging(company=Company(of="seen", residual="residual", share=0.1))
    found = judged(corpus, settings=FromCorpus(from_corpus=0), decision=Conformal(score="company"), judging=judging)
    assert found.verdict.flagged[:POISONED].mean() > 0.8
    assert found.verdict.flagged[POISONED:].sum() < 20


@pytest.mark.parametrize("num", [0, 1, 3, 40])
def test_tiny_corpora_have_an_answer(num):
    found = judged(scored(14, num=num, poisoned=0))
    assert found.report["mode"] == "ranked"
    assert len(found.verdict.flagged) == num
    assert not found.verdict.flagged.any()


# --- settings


def test_the_command_line_takes_shards_and_yaml():
    settings = ScoreConfig(shards="s.tar", output="o", victim={"path": "v"}, detectors=[{"kind": "density"}])
    for words, expected in (
        (["clean.tar"], "clean.tar"),
        (["a.tar", "b.tar"], ["a.tar", "b.tar"]),
        (["{from_corpus: 7, reviewed: r.jsonl}"], FromCorpus(from_corpus=7, reviewed="r.jsonl")),
        (["None"], None),
    ):
        given = override(settings, ["--calibration", *words], "score")
        assert given.calibration == expected
        assert override(given, ["--output", "p"], "score").calibration == expected
        assert ScoreConfig.model_validate(given.model_dump(mode="json")) == given


# --- a real backdoored network


@pytest.mark.slow
def test_with_a_hundred_looks_nearly_as_much_is_found_as_with_verified_clean_samples(shared_data):
    """Published weights, backdoored with a grid; an honest ResNet-20 beside it. Prints what it measured."""
    torch.set_num_threads(1)
    for row in trimmed.measure(trimmed.embedded(shared_data), num_draws=6, strengths=(0.6,)):
        print(row)
        assert row["trimmed"] >= row["verified"] - 0.1
        assert row["trimmed_fdp"] <= 0.1 + 2 * row["trimmed_fdp_error"]
        assert row["warned_of_wrong"] > 0.5
