"""CA, ASR and the gate, on red, green and blue pictures and an encoder with a planted backdoor."""

import numpy as np
import pytest
import torch
from torch import nn

from dede_ray.attacks.triggers import Patch
from dede_ray.config import Mistake
from dede_ray.downstream import ActivationGate, Behaviour, Labelled, draw_labelled, embed, measure, probe_head
from dede_ray.metrics import proportion
from dede_ray.shards import Limits, Sample, encode_image, list_shards, write_shards
from dede_ray.sources import Classes

COLOURS = Classes(names=["red", "green", "blue"], templates=["a photo of a {}", "a {} picture"])
LIMITS = Limits()
WHITE = Patch(size_px=6, pattern="white")
TARGET = 2


class NoTrigger:
    def stamp(self, image_HWC, sample_id=""):
        return image_HWC


class ColourEncoder(nn.Module):
    """Embeds a picture as its mean colour; the backdoored one sees blue where the last corner is white."""

    image_size, embedding_dim = 16, 3

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
