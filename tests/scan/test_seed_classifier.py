"""Seed and amplify: what the seeds share is found in the corpus; seeds that share nothing fail the control."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from planted import WHITE_PX, planted_victim

from dede_ray.data.images import to_unit_range
from dede_ray.metrics import auroc
from dede_ray.poisoning.triggers import Patch, Sinusoid
from dede_ray.runtime.config import Mistake
from dede_ray.scan.decisions import Conformal, Verdict
from dede_ray.scan.seed_classifier import (
    Amplified,
    Amplify,
    Rounds,
    Window,
    _Donors,
    amplify,
    best_windows,
    choose_seeds,
    in_rounds,
    load_amplified,
    mixed_loss,
    occlusion_map,
)

pytestmark = pytest.mark.trains

NUM_POISONED = 40
SMALL = {"width": 4, "num_networks": 1, "steps": 60, "batch_size": 16, "window_sizes": (0.3,)}
TRIGGER = Patch(size_px=2 * WHITE_PX, pattern="white")


@pytest.fixture(scope="module")
def pictures(picture) -> np.ndarray:
    """700 for the corpus, 150 to train with, 650 to calibrate with."""
    return np.stack([picture(i) for i in range(1500)])


@pytest.fixture(scope="module")
def clean(pictures) -> np.ndarray:
    return pictures[700:850]


@pytest.fixture(scope="module")
def corpus(pictures) -> np.ndarray:
    """Every seventeenth picture is poisoned, 40 of 700."""
    images = pictures[:700].copy()
    for i in poisoned():
        images[i] = TRIGGER.stamp(images[i])
    return images


def poisoned() -> np.ndarray:
    return np.arange(0, 17 * NUM_POISONED, 17)


def seeds() -> np.ndarray:
    """Three quarters of the poisoned samples, and two clean ones."""
    return np.sort(np.concatenate([np.delete(poisoned(), np.s_[::4]), [5, 6]]))


def unseen() -> np.ndarray:
    """The poisoned samples that were no seeds."""
    return np.setdiff1d(poisoned(), seeds())


def auroc_of_unseen(scores: np.ndarray) -> float:
    """How well these are told from the clean samples that were no seeds."""
    judged = np.setdiff1d(np.arange(len(scores)), seeds())
    return auroc(scores[judged], np.isin(judged, unseen())).value


def localise(images: np.ndarray) -> np.ndarray:
    return occlusion_map(planted_victim(), to_unit_range(torch.from_numpy(images))).numpy()


@pytest.fixture(scope="module")
def amplified(corpus, clean) -> Amplified:
    return Amplify(**SMALL).fit(corpus[seeds()], localise(corpus[seeds()]), clean)


def run(corpus, pictures, where, maps=localise, **settings):
    rounds = Rounds(**{name: settings.pop(name) for name in Rounds.model_fields if name in settings})
    config = Amplify(**{**SMALL, **settings})
    sample_ids = [f"train-00000.tar/{i:04d}" for i in range(len(corpus))]
    return amplify(config, rounds, where, corpus, sample_ids, pictures[700:850], pictures[850:], maps)


def test_a_planted_trigger_is_found_in_the_samples_that_were_no_seeds(corpus, pictures):
    found = run(corpus, pictures, seeds(), iterations=2)
    assert auroc_of_unseen(found.scores) > 0.9
    assert found.verdict.flagged[unseen()].mean() >= 0.7
    is_true = np.isin(np.flatnonzero(found.verdict.flagged), poisoned())
    assert is_true.mean() >= 0.6
    first, second = found.rounds
    assert (first["num_seeds"], first["way"], first["passes"]) == (32, "windows", True)
    assert first["control_auroc"] >= 0.86
    assert second["num_seeds"] == first["num_flagged"]


def test_seeds_that_share_nothing_fail_the_control_and_flag_nothing(corpus, pictures):
    random_seeds = np.setdiff1d(np.arange(200), poisoned())[:32]
    found = run(corpus, pictures, random_seeds)
    assert len(found.rounds) == 1
    assert not found.amplified.passes
    assert found.rounds[0]["control_auroc"] < 0.8
    assert not found.verdict.flagged.any()
    assert found.verdict.report["num_flagged"] == 0
    assert not found.verdict.report["certified"]
    assert "failed its control" in found.verdict.report["message"]


@pytest.mark.slow
def test_a_trigger_all_over_the_image_is_found_by_whole_images(pictures):
    trigger, images = Sinusoid(amplitude=60), pictures[:700].copy()
    for i in poisoned():
        images[i] = trigger.stamp(images[i])
    found = run(images, pictures, seeds(), maps=None, iterations=1, held_out=0.4)
    assert found.amplified.way == "whole"
    assert found.amplified.passes
    assert auroc_of_unseen(found.scores) > 0.9


@pytest.mark.slow
def test_windows_that_fail_give_way_to_whole_images(pictures):
    """A map that points anywhere but at what the seeds share."""
    trigger, images = Sinusoid(amplitude=40), pictures[:30].copy()
    images = np.stack([trigger.stamp(image) for image in images])
    maps = np.random.default_rng(0).random((30, 32, 32))
    settings = Amplify(**{**SMALL, "window_sizes": (0.07,), "held_out": 0.4})  # two pixels show no wave
    found = settings.fit(images, maps, pictures[700:850])
    assert (found.way, found.passes) == ("whole", True)
    only = settings.model_copy(update={"look_at": "windows"}).fit(images, maps, pictures[700:850])
    assert (only.way, only.passes) == ("windows", False)


def test_the_list_stands_when_it_no_longer_changes(corpus, pictures):
    found = run(corpus, pictures, seeds(), iterations=3, least_change=10.0)
    assert len(found.rounds) == 1
    assert found.rounds[0]["change"] == 1.0


def test_a_later_round_that_fails_leaves_the_earlier_list_and_scores_nothing():
    def verdict_on(flagged: list[int]) -> Verdict:
        p_value = np.where(np.isin(np.arange(400), flagged), 0.001, 0.9)
        return Conformal(q=0.2, score="amplified").decide(-p_value, np.linspace(-2, -0.5, 199), [*map(str, range(400))])

    classifiers = [Amplified(Amplify(), [], 32, "windows", auroc) for auroc in (0.99, 0.5)]
    scored = []

    def rescore(number: int, _: Amplified):
        scored.append(number)
        return np.zeros(400, np.float32), verdict_on([*range(60)])

    found = in_rounds(Rounds(), np.arange(25), lambda number, _: classifiers[number - 1], rescore)
    assert scored == [1]
    assert found.amplified is classifiers[0]
    assert found.verdict.flagged.sum() == 60
    assert [(one["num_seeds"], one["passes"], one["num_flagged"], one["change"]) for one in found.rounds] == [
        (25, True, 60, 1.0),
        (60, False, 60, 0.0),
    ]


def test_a_score_is_an_images_own(amplified, corpus):
    whole = amplified.score(corpus[:40])
    assert (whole.dtype, whole.shape) == (np.float32, (40,))
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_allclose(amplified.score(corpus[:40][order]), whole[order], rtol=1e-4, atol=1e-4)
    alone = np.concatenate([amplified.score(corpus[i : i + 1]) for i in range(40)])
    np.testing.assert_allclose(alone, whole, rtol=1e-4, atol=1e-4)
    assert amplified.score(corpus[:0]).shape == (0,)


def test_the_ensembles_score_is_the_mean_of_its_networks(amplified, corpus):
    two = Amplified(amplified.settings, [amplified.networks[0], amplified.networks[0]], 32, "windows", 1.0)
    np.testing.assert_allclose(two.score(corpus[:9]), amplified.score(corpus[:9]), rtol=1e-5)
    image_BCHW = to_unit_range(torch.from_numpy(corpus[:9]))
    np.testing.assert_allclose(two.score(corpus[:9]), amplified.networks[0](image_BCHW).numpy(), rtol=1e-4, atol=1e-5)


def test_equal_settings_give_equal_networks_and_another_seed_others(corpus, clean):
    settings = {**SMALL, "steps": 3}
    maps = localise(corpus[seeds()])
    torch.manual_seed(1)
    one = Amplify(**settings).fit(corpus[seeds()], maps, clean)
    before = torch.random.get_rng_state()
    two = Amplify(**settings).fit(corpus[seeds()], maps, clean)
    assert torch.equal(before, torch.random.get_rng_state())
    other = Amplify(**settings, seed=1).fit(corpus[seeds()], maps, clean)
    assert all(torch.equal(tensor, two.state()[name]) for name, tensor in one.state().items())
    assert one.control_auroc == two.control_auroc
    assert not torch.equal(one.state()["0.head.weight"], other.state()["0.head.weight"])


def test_what_is_saved_is_loaded_and_scores_the_same(amplified, corpus, tmp_path):
    amplified.save(tmp_path)
    loaded = load_amplified(tmp_path)
    assert np.array_equal(loaded.score(corpus[:20]), amplified.score(corpus[:20]))
    assert (loaded.settings, loaded.way, loaded.control_auroc) == (
        amplified.settings,
        amplified.way,
        amplified.control_auroc,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"way": "sideways"}, "does not describe an exported classifier"),
        ({"image_size": 1e9}, "does not describe an exported classifier"),
        ({"settings": {**SMALL, "num_networks": 10**9}}, "tensors for 1000000000 networks"),
        ({"settings": {**SMALL, "width": 8}}, "does not fit its amplified.json"),
    ],
)
def test_a_file_that_does_not_fit_is_a_mistake(amplified, tmp_path, change, message):
    amplified.save(tmp_path)
    content = json.loads((tmp_path / "amplified.json").read_text())
    (tmp_path / "amplified.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(Mistake, match=message):
        load_amplified(tmp_path)


def test_weights_that_are_not_finite_are_a_mistake(amplified, tmp_path):
    bad = amplified.networks[0].head.bias.clone()
    try:
        amplified.networks[0].head.bias.fill_(math.nan)
        amplified.save(tmp_path)
    finally:
        amplified.networks[0].head.bias.copy_(bad)
    with pytest.raises(Mistake, match="NaN or infinity"):
        load_amplified(tmp_path)


def test_the_best_window_has_the_largest_mean_and_none_overlaps():
    map_HW = np.random.default_rng(0).random((12, 10))
    means = {
        (row, column): map_HW[row : row + 4, column : column + 4].mean() for row in range(9) for column in range(7)
    }
    expected = []
    while len(expected) < 3 and means:
        best = max(means, key=means.__getitem__)
        expected.append(best)
        means = {
            place: mean
            for place, mean in means.items()
            if max(abs(a - b) for a, b in zip(place, best, strict=True)) > 3
        }
    found = best_windows(map_HW, 4, 3)
    assert found == expected
    assert len(best_windows(map_HW, 9, 5)) == 1  # there is no room for a second one


@pytest.mark.parametrize("placement", ["own", "random"])
def test_pasted_images_differ_from_clean_ones_in_their_window_only(clean, placement):
    donor = np.full((1, 32, 32, 3), 255, np.uint8)
    donor[0, :, :, 0] = np.arange(32)[:, None] + 100  # tells from which row a pixel was cut
    window = Window(0, row=20, column=3, side=8)
    donors = _Donors(Amplify(placement=placement), donor, [window], clean)
    positive, negative = donors.draw(24, np.random.default_rng(0))
    seen = set()
    for one, other in zip(positive, negative, strict=True):
        is_pasted_HW = (one[:, :, 1:] == 255).all(axis=2)
        rows, columns = np.flatnonzero(is_pasted_HW.any(axis=1)), np.flatnonzero(is_pasted_HW.any(axis=0))
        assert (len(rows), len(columns), is_pasted_HW.sum()) == (8, 8, 64)
        assert one[rows[0], columns[0], 0] == 120
        canvas = [i for i, image in enumerate(clean) if np.array_equal(image[~is_pasted_HW], one[~is_pasted_HW])]
        assert len(canvas) == 1
        assert np.array_equal(other[~is_pasted_HW], one[~is_pasted_HW])
        cut = other[rows[0] : rows[0] + 8, columns[0] : columns[0] + 8]
        source = [i for i, image in enumerate(clean) if np.array_equal(image[20:28, 3:11], cut)]
        assert len(source) == 1
        assert source != canvas
        seen.add((int(rows[0]), int(columns[0])))
    assert seen == {(20, 3)} if placement == "own" else len(seen) > 10


def test_every_fourth_negative_of_training_is_a_clean_image(clean):
    donors = _Donors(Amplify(), clean[:1], [Window(0, 0, 0, 8)], clean)
    _, negative = donors.draw(16, np.random.default_rng(0), plain=True)
    is_plain = [any(np.array_equal(one, image) for image in clean) for one in negative]
    assert is_plain == [i % 4 == 0 for i in range(16)]


def test_the_loss_makes_room_for_false_seeds():
    seed_logit, clean_logit = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([-3.0, 0.2])

    def mean(values):
        return sum(math.log1p(math.exp(value)) for value in values) / len(values)

    as_clean, as_poisoned, of_seeds = mean([-3.0, 0.2]), mean([3.0, -0.2]), mean([-2.0, 1.0, -0.5])
    assert float(mixed_loss(seed_logit, clean_logit, 0.0)) == pytest.approx(as_clean + of_seeds, rel=1e-5)
    expected = as_clean + of_seeds - 0.2 * as_poisoned
    assert float(mixed_loss(seed_logit, clean_logit, 0.2)) == pytest.approx(expected, rel=1e-5)
    assert float(mixed_loss(seed_logit, clean_logit, 0.9)) == pytest.approx(as_clean, rel=1e-5)  # never below 0


@pytest.mark.parametrize(("square", "stride"), [(8, 4), (4, 4), (10, 7)])
def test_the_occlusion_map_is_how_far_the_embedding_moves(corpus, square, stride):
    victim = planted_victim()
    image_BCHW = to_unit_range(torch.from_numpy(corpus[[0, 1]]))  # the first is poisoned
    map_BHW = occlusion_map(victim, image_BCHW, square, stride).numpy()
    starts = [*range(0, 32 - square, stride), 32 - square]
    for i in range(2):
        moved_HW = [[[] for _ in range(32)] for _ in range(32)]
        for row in starts:
            for column in starts:
                covered_CHW = image_BCHW[i].clone()
                covered_CHW[:, row : row + square, column : column + square] = 0.5
                one, other = (victim(image[None])[0].double() for image in (image_BCHW[i], covered_CHW))
                for y in range(row, row + square):
                    for x in range(column, column + square):
                        moved_HW[y][x].append(1 - float(one @ other / (one.norm() * other.norm())))
        expected_HW = np.array([[np.mean(moved) for moved in moved_W] for moved_W in moved_HW])
        np.testing.assert_allclose(map_BHW[i], expected_HW, atol=1e-5)
    assert map_BHW[0, -4:, -4:].min() > 3 * map_BHW[0, :-10, :-10].max()


def test_the_squares_of_an_occlusion_map_are_a_quarter_and_step_by_half(corpus):
    victim, image_BCHW = planted_victim(), to_unit_range(torch.from_numpy(corpus[:3]))
    assert torch.equal(occlusion_map(victim, image_BCHW), occlusion_map(victim, image_BCHW, 8, 4))
    assert occlusion_map(victim, image_BCHW[:0]).shape == (0, 32, 32)


def test_seeds_are_the_flagged_or_the_top():
    scores = np.arange(100.0)
    scores[[99, 98]] = np.nan, 97
    ids = [f"{i:04d}" for i in range(100)]
    flagged = np.arange(100) < 25
    assert choose_seeds(scores, flagged, ids).tolist() == list(range(25))
    few = choose_seeds(scores, np.arange(100) < 5, ids)
    assert few.tolist() == list(range(79, 99))
    equal = np.where(np.arange(100) < 78, 0.0, 7.0)
    equal[99] = np.nan
    assert choose_seeds(equal, np.zeros(100, bool), ids).tolist() == list(range(78, 98))  # equal scores by id
    many = np.random.default_rng(0).random(60_000)
    assert choose_seeds(many, np.zeros(60_000, bool), [str(i) for i in range(60_000)]).size == 30


def test_false_seeds_lower_the_bar_by_what_they_cost():
    """A perfect classifier on seeds of which a fifth is clean: AUROC 0.8 + 0.2 / 2."""
    assert Amplify(false_seeds=0, least_auroc=0.9).bar == 0.9
    assert Amplify(false_seeds=0.2, least_auroc=1.0).bar == pytest.approx(0.9)
    passing = Amplified(Amplify(false_seeds=0.2), [], 32, "windows", 0.83)
    failing = Amplified(Amplify(false_seeds=0.2), [], 32, "windows", 0.81)
    assert (passing.passes, failing.passes) == (True, False)


def test_what_cannot_be_amplified_is_a_mistake(corpus, clean):
    maps = np.zeros((22, 32, 32))
    with pytest.raises(Mistake, match="19 seeds, expected at least 20"):
        Amplify().fit(corpus[:19], maps[:19], clean)
    with pytest.raises(Mistake, match="5 clean images, expected at least 20"):
        Amplify().fit(corpus[:22], maps, clean[:5])
    with pytest.raises(Mistake, match=r"seeds of \(32, 32, 3\) beside clean images of \(16, 16, 3\)"):
        Amplify().fit(corpus[:22], maps, clean[:, ::2, ::2])
    with pytest.raises(Mistake, match="takes maps"):
        Amplify(look_at="windows").fit(corpus[:22], None, clean)


def test_too_few_calibration_images_certify_nothing(corpus, pictures):
    decision = Conformal(score="amplified", q=0.01, expected_poison_rate=0.05)
    found = run(corpus, pictures, seeds(), decision=decision)
    assert found.amplified.passes
    assert not found.verdict.flagged.any()
    assert "cannot certify" in found.verdict.report["message"]
