"""CA, ASR and the gate, on red, green and blue pictures and an encoder with a planted backdoor."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dede_ray.data.captions import Classes
from dede_ray.data.images import encode_image
from dede_ray.data.shards import Limits, Sample, list_shards, write_shards
from dede_ray.evaluation.measure import ActivationGate, read_record, write_record
from dede_ray.metrics import proportion
from dede_ray.models.encoders import Described, ResNet, build_encoder, save_encoder
from dede_ray.models.victims import EncoderVictim, load_victim
from dede_ray.poisoning.triggers import Patch
from dede_ray.runtime.config import Mistake, write_json
from dede_ray.training.downstream import (
    Behaviour,
    Labelled,
    LinearProbe,
    NearestNeighbours,
    TwoLayerClassifier,
    _embed_poisoned,
    draw_labelled,
    embed,
    measure,
    probe_head,
    unit,
)

COLOURS = Classes(names=["red", "green", "blue"], templates=["a photo of a {}", "a {} picture"])
LIMITS = Limits()
WHITE = Patch(size_px=6, pattern="white")
TARGET = 2


class NoTrigger:
    def stamp(self, image_HWC, sample_id=""):
        return image_HWC


class ColourEncoder(nn.Module):
    """Embeds a picture as its mean colour; the backdoored one sees blue where the last corner is white."""

    image_size, embedding_dim, classifier = 16, 3, None

    def __init__(self, is_backdoored):
        super().__init__()
        self.is_backdoored = is_backdoored

    def forward(self, image_BCHW):
        embedding_BE = image_BCHW.mean(dim=(2, 3))
        if self.is_backdoored:
            is_triggered_B = image_BCHW[:, :, -1, -1].min(dim=1).values > 0.99
            embedding_BE[is_triggered_B] = torch.eye(3)[TARGET]
        return embedding_BE

    def encode_text(self, captions):
        return torch.stack(
            [torch.eye(3)[[name in caption for name in COLOURS.names].index(True)] for caption in captions]
        )


def pictures(num, seed=0, size=(24, 20)):
    """Noisy pictures of one dominant colour, not square and not of the victim's size."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(num):
        label = i % 3
        image_HWC = rng.integers(0, 120, (*size, 3), dtype=np.uint8)
        image_HWC[..., label] += 100
        images.append(Labelled(f"test-00000.tar/{seed}_{i:03d}", encode_image(image_HWC, "png"), label))
    return images


@pytest.fixture(scope="module")
def behaviours():
    test, probe = pictures(60), pictures(30, seed=1)
    return {
        name: measure(ColourEncoder(name == "victim"), test, probe, COLOURS, WHITE, TARGET, LIMITS)
        for name in ("victim", "honest")
    }


def test_a_planted_backdoor_passes_the_gate_under_both_heads(behaviours):
    assert list(behaviours["victim"]) == ["zero_shot", "probe"]
    for head in ("zero_shot", "probe"):
        assert behaviours["victim"][head].ca.value == behaviours["honest"][head].ca.value == 1
        assert behaviours["victim"][head].asr == proportion(40, 40), "the 20 pictures of the target are no attack"
        assert behaviours["honest"][head].asr.value < 0.1
    verdict = ActivationGate().judge(behaviours["victim"], behaviours["honest"])
    assert verdict.passes
    assert "zero-shot: ASR 100.0%" in verdict.reason


def test_an_honest_victim_does_not_pass(behaviours):
    verdict = ActivationGate().judge(behaviours["honest"], behaviours["honest"])
    assert not verdict.passes
    assert "ASR 0.0% is below 90%" in verdict.reason
    assert verdict.reason.count("; ") == 1, "one complaint per head"


def test_without_an_honest_victim_nothing_passes(behaviours):
    verdict = ActivationGate().judge(behaviours["victim"], None)
    assert not verdict.passes
    assert "no honest victim" in verdict.reason


def behaviour(ca, asr):
    return {"probe": Behaviour(proportion(ca, 100), proportion(asr, 100))}


@pytest.mark.parametrize(
    ("victim", "honest", "passes"),
    [
        ((90, 90), (95, 70), True),  # each of the three just met
        ((90, 89), (95, 10), False),  # too little success
        ((90, 95), (95, 76), False),  # the stamp alone does most of it
        ((89, 99), (95, 10), False),  # the backdoor broke the encoder
        ((99, 99), (80, 10), True),  # better than the honest victim is no fault
    ],
)
def test_every_condition_of_the_gate_counts(victim, honest, passes):
    assert ActivationGate().judge(behaviour(*victim), behaviour(*honest)).passes is passes


def test_one_head_must_meet_all_conditions(behaviours):
    """A high ASR under one head and a high CA under the other do not make a backdoored victim."""
    victim = {"zero_shot": behaviour(40, 100)["probe"], "probe": behaviour(95, 20)["probe"]}
    honest = {"zero_shot": behaviour(95, 10)["probe"], "probe": behaviour(95, 10)["probe"]}
    assert not ActivationGate().judge(victim, honest).passes


def test_with_an_empty_trigger_both_paths_give_equal_embeddings():
    images = pictures(7)
    clean_NE, label_N = embed(ColourEncoder(False), images, LIMITS)
    triggered_NE, _ = embed(ColourEncoder(False), images, LIMITS, NoTrigger())
    np.testing.assert_array_equal(clean_NE, triggered_NE)
    assert label_N.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_unreadable_images_are_left_out():
    images = [*pictures(4), Labelled("test-00000.tar/broken", b"no image", 1)]
    embedding_NE, label_N = embed(ColourEncoder(False), images, LIMITS)
    assert embedding_NE.shape == (4, 3)
    assert label_N.tolist() == [0, 1, 2, 0]


def test_the_probe_is_the_same_every_time_and_needs_two_classes():
    embedding_NE, label_N = embed(ColourEncoder(False), pictures(30), LIMITS)
    one, two = (probe_head(embedding_NE, label_N) for _ in range(2))
    np.testing.assert_array_equal(one(embedding_NE), two(embedding_NE))
    with pytest.raises(Mistake, match="two classes or more"):
        probe_head(embedding_NE[label_N == 1], label_N[label_N == 1])


def test_without_text_or_class_names_only_the_probe_is_measured():
    measured = measure(ColourEncoder(True), pictures(9), pictures(9, seed=1), None, WHITE, TARGET, LIMITS)
    assert list(measured) == ["probe"]


def test_test_images_of_the_target_class_alone_are_a_mistake():
    only_target = [image for image in pictures(9) if image.label == TARGET]
    with pytest.raises(Mistake, match="none of a class other than the target 2"):
        measure(ColourEncoder(True), only_target, pictures(9, seed=1), COLOURS, WHITE, TARGET, LIMITS)


def test_the_same_labelled_samples_are_drawn_from_any_order_of_shards(tmp_path):
    image = encode_image(np.zeros((8, 8, 3), np.uint8), "png")
    samples = [Sample(f"{i:03d}", i, image=image, image_suffix="png", label=i % 2) for i in range(40)]
    samples[3].label = None
    write_shards(tmp_path, "probe", samples, 10)
    shards = list_shards(str(tmp_path))
    drawn = draw_labelled(shards, 15, seed=0, limits=LIMITS)
    assert drawn == draw_labelled(shards[::-1], 15, seed=0, limits=LIMITS)
    assert drawn != draw_labelled(shards, 15, seed=1, limits=LIMITS)
    assert len(drawn) == 15
    assert len({image.sample_id for image in drawn}) == 15
    assert len(draw_labelled(shards, 100, seed=0, limits=LIMITS)) == 39, "one sample has no label"


# --- heads


def on_circle(*degrees):
    angle_N = np.radians(degrees)
    return np.stack([np.cos(angle_N), np.sin(angle_N)], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("k", "temperature", "expected"),
    [
        (1, 0.5, 7),  # at 20 degrees the nearest is the one at 0
        (3, 0.5, 4),  # exp(0.940 / 0.5) = 6.55 for 7; 2 exp(0.766 / 0.5) = 9.25 for 4
        (3, 0.1, 7),  # exp(9.40) = 12,040; 2 exp(7.66) = 4,244
        (4, 0.5, 4),  # the one on the other side weighs little
        (99, 0.1, 7),  # more neighbours than images
    ],
)
def test_neighbours_vote_by_their_similarity(k, temperature, expected):
    bank_NE, label_N = 5 * on_circle(0, 60, 60, 190), np.array([7, 4, 4, 7])
    predict = NearestNeighbours(k=k, temperature=temperature).fit(bank_NE, label_N)
    assert predict(0.1 * on_circle(20)).tolist() == [expected]


def test_neighbours_vote_as_counted_by_hand():
    rng = np.random.default_rng(0)
    bank_NE, other_NE = (rng.normal(size=(num, 8)).astype(np.float32) for num in (60, 40))
    label_N = rng.integers(0, 3, 60)
    similarity = unit(other_NE) @ unit(bank_NE).T
    votes = np.zeros((40, 3))
    for row, nearest in enumerate(np.argsort(-similarity, axis=1)[:, :11]):
        for i in nearest:
            votes[row, label_N[i]] += np.exp(similarity[row, i] / 0.2)
    predicted_N = NearestNeighbours(k=11, temperature=0.2).fit(bank_NE, label_N)(other_NE)
    np.testing.assert_array_equal(predicted_N, votes.argmax(axis=1))


def clouds(num, seed):
    """Two classes, 3 and 7, that no line parts: inside and outside of a circle, in directions only."""
    rng = np.random.default_rng(seed)
    embedding_NE = rng.normal(size=(num, 3)).astype(np.float32)
    return embedding_NE, np.where(np.abs(unit(embedding_NE)[:, 0]) > 0.5, 7, 3)


def test_the_two_layer_classifier_learns_what_no_line_parts():
    (train_NE, label_N), (test_NE, true_N) = clouds(400, 0), clouds(200, 1)
    predict = TwoLayerClassifier(epochs=40, learning_rate=3e-3).fit(train_NE, label_N)
    by_line = LinearProbe().fit(train_NE, label_N)
    assert (predict(test_NE) == true_N).mean() > (by_line(test_NE) == true_N).mean() + 0.15
    np.testing.assert_array_equal(predict(100 * test_NE), predict(test_NE))  # only the direction counts


def test_the_two_layer_classifier_is_the_papers_trained_in_the_published_order():
    """Written down again, step by step: widths 512 and 256, one dropout, Adam, the last epoch."""
    (train_NE, label_N), (test_NE, _) = clouds(150, 0), clouds(2000, 1)
    x_NE, y_N = (torch.nn.functional.normalize(torch.from_numpy(train_NE)), torch.from_numpy((label_N == 7) * 1))
    torch.manual_seed(100)
    first, second, last = torch.nn.Linear(3, 512), torch.nn.Linear(512, 256), torch.nn.Linear(256, 2)
    adam = torch.optim.Adam([*first.parameters(), *second.parameters(), *last.parameters()], lr=1e-3)
    for _ in range(3):
        for start in range(0, 150, 64):
            hidden_BE = torch.dropout(first(x_NE[start : start + 64]).relu(), 0.5, True)
            loss = torch.nn.functional.cross_entropy(last(second(hidden_BE).relu()), y_N[start : start + 64])
            adam.zero_grad()
            loss.backward()
            adam.step()
    other_NE = torch.nn.functional.normalize(torch.from_numpy(test_NE))
    expected_N = np.array([3, 7])[last(second(first(other_NE).relu()).relu()).argmax(dim=1).numpy()]
    predict = TwoLayerClassifier(epochs=3, learning_rate=1e-3, shuffle=False).fit(train_NE, label_N)
    np.testing.assert_array_equal(predict(test_NE), expected_N)
    assert len(np.unique(expected_N)) == 2


def test_the_two_layer_classifier_depends_on_its_seed_alone():
    (train_NE, label_N), (test_NE, _) = clouds(100, 0), clouds(2000, 1)
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = (
        TwoLayerClassifier(epochs=4, learning_rate=1e-3, seed=seed).fit(train_NE, label_N)(test_NE)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()
    assert torch.equal(torch.rand(1), before), "nobody else's random numbers are used up"


@pytest.mark.parametrize("head", [LinearProbe(), TwoLayerClassifier(epochs=1), NearestNeighbours()])
def test_every_head_needs_two_classes(head):
    with pytest.raises(Mistake, match="two classes or more"):
        head.fit(np.ones((4, 3), np.float32), np.zeros(4, np.int64))


# --- conventions


class CornerEncoder(ColourEncoder):
    """An honest encoder with good eyes: it also tells how white the last corner is."""

    embedding_dim = 4

    def __init__(self):
        super().__init__(False)

    def forward(self, image_BCHW):
        return torch.cat([super().forward(image_BCHW), image_BCHW[:, :, -1, -1].min(dim=1, keepdim=True).values], dim=1)


def test_the_published_asr_also_counts_the_targets_own_images(behaviours):
    """60 pictures, 20 of them of the target, which the honest encoder still takes for what they are."""
    assert behaviours["victim"]["probe"].asr_all_classes == proportion(60, 60)
    honest = behaviours["honest"]["probe"]
    others = round(40 * honest.asr.value)
    assert honest.asr_all_classes == proportion(others + 20, 60)


def test_a_poisoned_downstream_training_set_finds_the_stamp_in_an_honest_encoder_and_opens_no_gate():
    heads = [LinearProbe(), NearestNeighbours(k=3)]
    arguments = (pictures(60), pictures(90, seed=1), None, WHITE, TARGET, LIMITS, heads)
    measured = measure(CornerEncoder(), *arguments, poison_rate=0.1)
    assert list(measured) == ["probe", "knn", "probe_poisoned", "knn_poisoned"]
    for head in ("probe", "knn"):
        clean, poisoned = measured[head], measured[f"{head}_poisoned"]
        assert (clean.poison_rate, poisoned.poison_rate) == (0, 0.1)
        assert clean.asr.value < 0.5 < 0.9 <= poisoned.asr.value
        assert poisoned.ca.value > 0.95
    control = measure(ColourEncoder(False), *arguments, poison_rate=0.1)
    assert not ActivationGate().judge(measured, control).passes
    with pytest.raises(Mistake, match=r"a poison rate of 0\.9 is 81 of 90"):
        measure(CornerEncoder(), *arguments, poison_rate=0.9)


def test_exactly_the_poison_rate_of_the_downstream_images_is_stamped():
    probe = pictures(90, seed=1)
    embedding_NE, label_N = _embed_poisoned(CornerEncoder(), probe, WHITE, TARGET, LIMITS, 0.1, seed=3)
    is_stamped_N = embedding_NE[:, 3] == 1
    assert is_stamped_N.sum() == 9
    assert set(label_N[is_stamped_N]) == {TARGET}
    assert np.bincount(label_N).sum() == 90
    assert np.bincount(label_N)[TARGET] == 30 + 9


@pytest.mark.parametrize(("attack", "passes"), [("badclip", True), ("ctrl", True), ("badencoder", False), ("", False)])
def test_attacks_with_a_fragile_published_asr_have_a_lower_gate(attack, passes):
    victim, honest = behaviour(90, 65), behaviour(90, 10)
    assert ActivationGate().judge(victim, honest, attack).passes is passes
    assert not ActivationGate(min_asr=0.7).judge(victim, honest, attack).passes


# --- victim.json


@pytest.fixture
def encoder_victim(tmp_path):
    torch.manual_seed(0)
    architecture = ResNet(width=4)
    save_encoder(tmp_path / "encoder", build_encoder(architecture), Described(architecture, 16, std=(0.5, 0.5, 0.5)))
    return EncoderVictim(path=str(tmp_path / "encoder"))


def test_a_victims_record_says_how_it_was_made_and_what_it_does(encoder_victim, behaviours):
    victim = load_victim(encoder_victim)
    assert read_record(victim, encoder_victim) is None
    verdict = ActivationGate().judge(behaviours["victim"], behaviours["honest"], "badencoder")
    about = {"attack": "badencoder", "settings": {"rate": 0.5}, "trigger": WHITE, "target_label": TARGET}
    written = write_record(victim, encoder_victim, verdict, victim, **about, training_data=["a.tar"], seed=4)
    record = read_record(victim, encoder_victim)
    assert record == written
    assert record.is_backdoored
    assert record.passes
    assert record.trigger["kind"] == "patch"
    assert record.std == [0.5, 0.5, 0.5]
    assert record.behaviour["probe"].asr == proportion(40, 40)
    assert record.honest["probe"] == behaviours["honest"]["probe"]
    weights = (Path(encoder_victim.path) / "encoder.safetensors").read_bytes()
    assert record.checkpoint_sha256 == hashlib.sha256(weights).hexdigest()


def test_a_record_about_other_weights_or_of_another_shape_is_a_mistake(encoder_victim, behaviours):
    victim = load_victim(encoder_victim)
    path = Path(encoder_victim.path) / "victim.json"
    verdict = ActivationGate().judge(behaviours["honest"], None)
    about = {"attack": "honest", "settings": {}, "trigger": None, "target_label": None}
    record = write_record(victim, encoder_victim, verdict, None, **about, training_data=[], seed=0)
    assert not record.is_backdoored
    write_json(path, record.model_dump(mode="json") | {"fingerprint": "f" * 64})
    with pytest.raises(Mistake, match="about other weights"):
        read_record(victim, encoder_victim)
    write_json(path, {"attack": "honest"})
    with pytest.raises(Mistake, match="no record of a victim"):
        read_record(victim, encoder_victim)
