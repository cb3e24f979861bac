"""From scores to a verdict: half of the calibration fits, the other half judges; copies count once; shift refuses."""

from __future__ import annotations

import numpy as np
import pytest

from dede_ray.runtime.config import Mistake
from dede_ray.scan.decisions import Conformal, FixedThreshold
from dede_ray.scan.fusion import Fusion, split_calibration
from dede_ray.scan.judge import Judging, Scored, judge
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


def test_what_is_fitted_on_gives_no_p_values(calibration):
    half = split_calibration(calibration.sample_ids, 0)
    judging = Judging(combined=Fusion(columns=("hard", "seen")))
    judged = judge(judging, Conformal(score="combined"), scored("corpus", 4, poison=60), calibration, STATS, False)
    assert judged.verdict.flagged[:60].mean() > 0.8
    assert judged.report["num_calibration"] == int((~half).sum())
    assert judged.report["made"]["fitted_on"] == int(half.sum())
    plain = judge(judging, Conformal(score="seen"), scored("corpus", 4, poison=60), calibration, STATS, False)
    assert plain.report["num_calibration"] == NUM, "a plain column was not fitted on anything"


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
    with pytest.raises(Mistake, match="brought to a common scale by calibration samples"):
        judge(Judging(fair=["hard"]), FixedThreshold(score="hard_fair", threshold=1), corpus, None, STATS, False)
