"""From scores to a verdict: what is made is made of the pool; copies count once; a shift refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dede_ray.runtime.config import Mistake
from dede_ray.scan.decisions import Conformal, FixedThreshold
from dede_ray.scan.fusion import Fusion
from dede_ray.scan.judge import Judging, Scored, choose, judge
from dede_ray.scan.pool import Amplify, Classifier, Company
from dede_ray.scan.shift import ShiftCheck

NUM, STATS = 2000, ["stat_texture"]


def scored(prefix: str, seed: int, num: int = NUM, poison: int = 0, moved: float = 0.0, **about) -> Scored:
    """Samples whose score `hard` is mostly how hard the image is, and `seen` sees poison, the first ones."""
    rng = np.random.default_rng(seed)
    texture = rng.normal(size=num)
    is_poisoned = np.arange(num) < poison
    ids = [f"{prefix}/{i:05d}" for i in range(num)]
    columns = {
        "hard": np.exp(texture + 0.3 * rng.normal(size=num)),
        "seen": rng.normal(size=num) + 6 * is_poisoned,
        "stat_texture": texture,
    }
    known = {"content_hash": [f"{prefix} {i}" for i in range(num)], "captions": [None] * num}
    known |= {"perceptual_hash": [None] * num, "embedding_ids": ids}
    return Scored(ids, columns=columns, embedding_ME=rng.normal(size=(num, 8)) + moved, **{**known, **about})


@pytest.fixture(scope="module")
def calibration() -> Scored:
    return scored("calibration", 1)


def test_poison_is_flagged_and_everything_is_reported(calibration):
    judged = judge(Judging(), Conformal(score="seen"), scored("corpus", 2, poison=60), calibration, STATS, False)
    assert judged.verdict.flagged[:60].mean() > 0.9
    assert judged.verdict.flagged[60:].sum() <= 15
    assert judged.report["shift"]["value"] == pytest.approx(0.5, abs=0.05)
    assert [one.kind for one in judged.findings] == ["single"] * int(judged.verdict.flagged.sum())
    assert judged.verdict.poisoned_at_least[judged.verdict.flagged].max() >= 40
    assert judged.made == {}


def test_a_fair_score_forgets_how_hard_images_are(calibration):
    corpus = scored("corpus", 3)
    judged = judge(Judging(fair=["hard"]), Conformal(score="hard_fair"), corpus, calibration, STATS, False)
    before = np.corrcoef(np.log(corpus.columns["hard"]), corpus.columns["stat_texture"])[0, 1]
    after = np.corrcoef(judged.made["hard_fair"], corpus.columns["stat_texture"])[0, 1]
    assert before > 0.9
    assert abs(after) < 0.1
    assert judged.report["made"]["hard_fair"]["r2_before"] > 0.8
    assert judged.report["made"]["hard_fair"]["r2_after"] < 0.05
    assert not judged.verdict.flagged.any()


def test_what_is_made_of_the_pool_leaves_all_calibration_samples_to_give_p_values(calibration):
    judging = Judging(combined=Fusion(columns=("hard", "seen")))
    corpus = scored("corpus", 4, poison=60)
    judged = judge(judging, Conformal(score="combined"), corpus, calibration, STATS, False)
    assert judged.verdict.flagged[:60].mean() > 0.8
    assert judged.report["num_calibration"] == NUM
    assert judged.report["made"]["fitted_on"] == 2 * NUM


def test_a_direction_that_many_share_is_found_where_no_score_alone_finds_it():
    rng = np.random.default_rng(5)
    corpus, calibration = scored("corpus", 6, poison=40), scored("calibration", 7)
    for one, num in ((corpus, 40), (calibration, 0)):
        one.residuals["residual"] = rng.normal(size=(NUM, 16)) + 1.5 * (np.arange(NUM) < num)[:, None]
        one.columns["seen"][:num] -= 4.5  # a little above the others
    company = Company(of="seen", residual="residual", share=0.2)
    classifier = Classifier(columns=("seen",), residual="residual", repeats=1)
    judging = Judging(company=company, classifier=classifier)
    found = {
        name: judge(judging, Conformal(score=name), corpus, calibration, STATS, False)
        for name in ("seen", "company", "classifier")
    }
    share = {name: one.verdict.flagged[:40].mean() for name, one in found.items()}
    assert share["seen"] < 0.2
    assert share["company"] > 0.5
    assert share["classifier"] > 0.5
    learners = found["classifier"].report["made"]["classifier"]["num_learners"]
    assert 900 < learners < 1100
    assert found["classifier"].report["num_calibration"] == NUM - learners  # they give no p-values
    assert found["company"].report["num_calibration"] == NUM


@pytest.mark.parametrize("score", ["hard_fair", "combined", "company", "classifier", "amplified"])
def test_p_values_of_made_columns_are_as_rare_as_they_say(score):
    """Clean samples beside poison that the columns miss: whatever they were fitted to, they are not told apart."""
    share = {0.002: [], 0.01: [], 0.1: []}
    for trial in range(20):
        rng = np.random.default_rng(trial)
        corpus, calibration = scored("corpus", 100 + trial, num=600), scored("calibration", 200 + trial, num=600)
        for one in (corpus, calibration):
            one.residuals["residual"] = rng.normal(size=(600, 8))
        judging = Judging(
            fair=["hard"], num_knots=3, combined=Fusion(columns=("hard_fair", "seen")),
            company=Company(of="seen", residual="residual"),
            classifier=Classifier(columns=("hard", "seen"), residual="residual", repeats=1),
            amplified=Amplify(of="seen", residual="residual"), shift=None, grouping=None,
        )  # fmt: skip
        p_value = judge(judging, Conformal(score=score, seed=trial), corpus, calibration, STATS, False).verdict.p_value
        for t, found in share.items():
            found.append((p_value <= t).mean())
    for t, found in share.items():
        assert np.mean(found) <= t + 3 * max(np.std(found), t) / np.sqrt(20), (t, found)


@pytest.mark.parametrize("num_poisoned", [0, 30])
def test_p_values_of_what_candidates_alone_have_are_as_rare_as_they_say(num_poisoned):
    """Candidates are the highest of the pool; the late column misses the poison, and many of its values are equal."""
    share = {0.002: [], 0.01: [], 0.1: []}
    for trial in range(40):
        rng = np.random.default_rng(trial)
        parts = [scored("corpus", 300 + trial, 600, num_poisoned), scored("calibration", 400 + trial, 600)]
        least = np.sort(np.concatenate([one.columns["seen"] for one in parts]))[-240]
        late = []
        for one in parts:
            is_beneath = one.columns["seen"] < least
            column = np.where(is_beneath, np.nan, rng.normal(size=600).round(1))
            late.append(replace(one, columns={"late": column}, late=frozenset({"late"}), is_beneath=is_beneath))
        decision = Conformal(score="late", q=0.1, false_alarm=None, seed=trial)
        judging = Judging(shift=None, grouping=None)
        p_value = judge(judging, decision, *late, STATS, False).verdict.p_value[num_poisoned:]
        for t, found in share.items():
            found.append((p_value <= t).mean())
    for t, found in share.items():
        assert np.mean(found) <= t + 3 * np.std(found) / np.sqrt(40), (t, found)
    assert np.mean(share[0.1]) > 0.06  # and they are no larger than they must


def test_a_list_may_rest_on_several_divisions_of_the_calibration():
    rng = np.random.default_rng(9)
    corpus, calibration = scored("corpus", 10, 800, 40), scored("calibration", 11, 800)
    for one, num in ((corpus, 40), (calibration, 0)):
        one.residuals["residual"] = rng.normal(size=(800, 8)) + 3 * (np.arange(800) < num)[:, None]
    classifier = Classifier(columns=("seen",), residual="residual", repeats=1, splits=3)
    once = Judging(classifier=classifier.model_copy(update={"splits": 1}), grouping=None)
    several = judge(
        Judging(classifier=classifier, grouping=None), Conformal(score="classifier"), corpus, calibration, STATS, False
    )
    one = judge(once, Conformal(score="classifier"), corpus, calibration, STATS, False)
    assert several.verdict.flagged[:40].mean() > 0.9
    assert several.verdict.flagged[40:].sum() <= 6
    assert "averaged over 3 divisions" in several.report["how"]
    np.testing.assert_array_equal(several.verdict.p_value, one.verdict.p_value)  # of the first division
    assert several.report["certified"]


def test_of_several_scores_the_one_is_chosen_that_finds_most_whoever_calibrates(calibration):
    corpus = scored("corpus", 5, poison=60)
    candidates = {"hard": Judging(), "seen": Judging(), "both": Judging(combined=Fusion(columns=("hard", "seen")))}
    name, judging, others = choose(candidates, Conformal(), corpus, calibration, STATS)
    assert (name, judging) == ("seen", Judging())
    assert 0.4 * NUM < len(others) < 0.6 * NUM  # the scouts calibrate no more
    judged = judge(judging, Conformal(score=name), corpus, others, STATS, False)
    assert judged.verdict.flagged[:60].mean() > 0.9
    everyone = corpus.with_others(others)
    is_corpus = np.random.default_rng(0).permutation(len(everyone)) < NUM
    scouts = calibration.part(~np.isin(calibration.sample_ids, others.sample_ids))
    others = everyone.part(~is_corpus).with_others(scouts)
    assert choose(candidates, Conformal(), everyone.part(is_corpus), others, STATS)[0] == name


def test_a_classifier_that_is_chosen_learns_from_those_who_chose_it():
    rng = np.random.default_rng(6)
    residual_NR = rng.normal(size=(3000, 8))
    residual_NR[:60] += 2
    whole = scored("corpus", 6, num=3000)
    whole = replace(whole, residuals={"xc_residual": residual_NR}, embedding_ME=None, embedding_ids=[])
    corpus, calibration = whole.part(np.arange(3000) < 1000), whole.part(np.arange(3000) >= 1000)
    candidates = {
        "hard": Judging(),
        "learnt": Judging(classifier=Classifier(columns=("seen",), residual="xc_residual")),
    }
    name, judging, teachers = choose(candidates, Conformal(), corpus, calibration, STATS)
    assert name == "learnt"
    judged = judge(judging, Conformal(score="classifier"), corpus, teachers, STATS, False)
    left = choose({"hard": Judging()}, Conformal(), corpus, calibration, STATS)[2]
    assert judged.report["num_calibration"] == len(left)
    assert judged.verdict.flagged[:60].mean() > 0.8


def test_copies_count_once_unless_their_captions_differ_where_a_score_reads_them(calibration):
    num = 400
    hashes = ["cake"] * 50 + [f"h{i}" for i in range(num - 50)]
    captions = ["a cake"] * 49 + ["an airplane"] + ["other"] * (num - 50)
    corpus = scored("corpus", 5, num=num, content_hash=hashes, captions=captions)
    blind, reads = (
        judge(Judging(), Conformal(score="seen"), corpus, calibration, STATS, looks) for looks in (False, True)
    )
    assert blind.report["num_distinct"] == num - 49
    assert reads.report["num_distinct"] == num - 48
    assert blind.group_id[:51] == ["cake"] * 50 + [None]
    assert (blind.findings[0].kind, blind.findings[0].size) in {("exact", 50), ("clump", 50)}


def test_bins_are_made_of_the_column_that_says_how_hard_an_image_is(calibration):
    decision, corpus = Conformal(score="hard", mondrian_bins=3), scored("corpus", 6)
    judged = judge(Judging(difficulty="stat_texture"), decision, corpus, calibration, STATS, False)
    assert len(judged.report["bins"]) == 3
    with pytest.raises(Mistake, match="name a column to make the bins of"):
        judge(Judging(), decision, corpus, calibration, STATS, False)


def test_a_corpus_from_elsewhere_is_not_certified(calibration):
    corpus = scored("corpus", 7, poison=60, moved=1.0)
    judged = judge(Judging(), Conformal(score="seen"), corpus, calibration, STATS, False)
    assert not judged.verdict.flagged.any()
    assert not judged.report["certified"]
    assert judged.report["message"].startswith("cannot certify: a classifier tells")
    assert judged.report["shift"]["value"] > 0.9
    for judging, decision in (
        (Judging(shift=None), Conformal(score="seen")),
        (Judging(shift=ShiftCheck(max_auroc=1)), Conformal(score="seen")),
        (Judging(), FixedThreshold(score="seen", threshold=4)),
    ):
        assert judge(judging, decision, corpus, calibration, STATS, False).verdict.flagged[:60].mean() > 0.8


def test_what_lacks_its_ground_is_refused(calibration):
    corpus = scored("corpus", 8)
    with pytest.raises(Mistake, match=r"attach .*image_statistics"):
        judge(Judging(fair=["hard"]), Conformal(score="hard_fair"), corpus, calibration, [], False)
    with pytest.raises(Mistake, match="no column soft"):
        judge(Judging(fair=["soft"]), Conformal(score="seen"), corpus, calibration, STATS, False)
    without = judge(Judging(fair=["hard"]), FixedThreshold(score="hard_fair", threshold=9), corpus, None, STATS, False)
    assert np.isfinite(without.made["hard_fair"]).all()  # the pool is then the corpus alone
