"""Cognitive distillation: masks are each image's own, beside Adam written out and plain loops."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from planted import WHITE_PX, planted_victim

from dede_ray.data.images import to_unit_range
from dede_ray.data.sampling import keyed_uniform, sample_keys
from dede_ray.detectors.cognitive_distillation import CognitiveDistillation, mask_cost
from dede_ray.models.embedding import Batch
from dede_ray.models.encoders import ResNet, build_encoder
from dede_ray.models.victims import Victim

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def victim() -> Victim:
    """A ResNet with random weights, whose rounding depends on the size of the batch."""
    torch.manual_seed(0)
    model = build_encoder(ResNet(width=4))
    return Victim(model, "random", 32, 32, ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), "fp32")


@pytest.fixture(scope="module")
def batch(victim, picture) -> Batch:
    image_BCHW = to_unit_range(torch.from_numpy(np.stack([picture(i) for i in range(6)])))
    return Batch([f"train-00000.tar/{i:04d}" for i in range(6)], victim(image_BCHW), image_BCHW)


def test_gradients_flow_through_the_same_embedding_that_forward_gives(victim, batch):
    image_BCHW = batch.image_BCHW.clone().requires_grad_()
    embedding_BE = victim.embed_with_gradient(image_BCHW)
    assert torch.equal(embedding_BE.detach(), victim(batch.image_BCHW))
    embedding_BE[0].sum().backward()
    assert image_BCHW.grad[0].abs().max() > 0
    assert not image_BCHW.grad[1:].any()
    assert not victim(image_BCHW).requires_grad


def test_a_mask_costs_its_norm_and_its_squared_differences():
    mask_BHW = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mask_HW, cost in zip(mask_BHW.numpy(), mask_cost(mask_BHW, 0.3, 7.0).numpy(), strict=True):
        variation = 0.0
        for y in range(4):
            for x in range(5):
                variation += (mask_HW[y + 1, x] - mask_HW[y, x]) ** 2 if y < 3 else 0
                variation += (mask_HW[y, x + 1] - mask_HW[y, x]) ** 2 if x < 4 else 0
        assert cost == pytest.approx(0.3 * np.abs(mask_HW).sum() + 7.0 * variation / 20, rel=1e-12)


def test_masks_are_what_adam_makes_of_them(victim, batch):
    """Adam's formulas written out, one image, its noise drawn from its id."""
    settings = CognitiveDistillation(steps=4, norm_weight=0.01, smoothness_weight=1.0, seed=3)
    exact = copy.deepcopy(victim)
    exact.dtype = torch.float64
    exact.model.double()
    image_1CHW = batch.image_BCHW[2:3].double()
    noise_TC = keyed_uniform(sample_keys(batch.sample_ids[2:3], 3), 12).reshape(4, 3)
    target_1E = exact.embed_with_gradient(image_1CHW)
    raw, first, second = torch.ones(32, 32, dtype=torch.float64), 0.0, 0.0
    for step in range(1, 5):
        raw = raw.detach().requires_grad_()
        mask_HW = (torch.tanh(raw) + 1) / 2
        noise_CHW = noise_TC[step - 1].reshape(1, 3, 1, 1)
        seen_1E = exact.embed_with_gradient(image_1CHW * mask_HW + (1 - mask_HW) * noise_CHW)
        variation = ((mask_HW[1:] - mask_HW[:-1]) ** 2).sum() + ((mask_HW[:, 1:] - mask_HW[:, :-1]) ** 2).sum()
        loss = (seen_1E - target_1E).abs().mean() + 0.01 * mask_HW.sum() + 1.0 * variation / 1024
        (slope,) = torch.autograd.grad(loss, raw)
        first, second = 0.1 * first + 0.9 * slope, 0.1 * second + 0.9 * slope**2
        step_HW = (first / (1 - 0.1**step)) / ((second / (1 - 0.1**step)).sqrt() + 1e-8)
        raw = raw - 0.1 * step_HW
    expected_HW = ((torch.tanh(raw) + 1) / 2).detach()
    scorer = settings.open(victim, {})
    np.testing.assert_allclose(scorer.masks(batch)[2].numpy(), expected_HW.numpy(), rtol=1e-5)
    scores = scorer.score(batch)
    assert tuple(scores) == scorer.columns
    assert scores["cd_mask"][2] == pytest.approx(float(expected_HW.sum()), rel=1e-5)
    assert np.array_equal(scores["cd_small_mask"], -scores["cd_mask"])


def test_a_mask_is_the_same_in_any_batch_and_order(victim, batch):
    settings = CognitiveDistillation(steps=30, norm_weight=0.01, smoothness_weight=1.0)
    whole = settings.open(victim, {}).score(batch)["cd_mask"]
    order = [4, 0, 5, 2, 1, 3]
    shuffled = settings.open(victim, {}).score(batch.part(order))["cd_mask"]
    by_two = settings.model_copy(update={"images_at_once": 2}).open(victim, {}).score(batch)["cd_mask"]
    alone = [settings.open(victim, {}).score(batch.part([i]))["cd_mask"] for i in range(6)]
    np.testing.assert_allclose(shuffled, whole[order], rtol=1e-6)
    np.testing.assert_allclose(by_two, whole, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(alone), whole, rtol=1e-6)
    assert len(set(whole.tolist())) == 6


def test_masks_can_be_made_of_what_inference_mode_made(batch):
    """The score pass embeds in inference mode, and may score in it."""
    victim = planted_victim()
    settings = CognitiveDistillation(steps=2)
    expected = settings.open(victim, {}).score(batch)
    with torch.inference_mode():
        made = Batch(batch.sample_ids, victim(batch.image_BCHW), batch.image_BCHW + 0)
        assert made.images.is_inference()
        scores = settings.open(victim, {}).score(made)
    assert np.array_equal(scores["cd_mask"], expected["cd_mask"])
    fast = settings.model_copy(update={"is_exact": False}).open(victim, {}).score(made)
    np.testing.assert_allclose(fast["cd_mask"], expected["cd_mask"], rtol=1e-2)


def test_the_mask_shows_the_trigger_to_which_the_victim_responds(batch):
    image_BCHW = batch.image_BCHW.clone()
    image_BCHW[:, :, -WHITE_PX:, -WHITE_PX:] = 1
    settings = CognitiveDistillation(steps=60, norm_weight=0.01, smoothness_weight=1.0)
    share = {}
    for backdoored in (True, False):
        victim = planted_victim(backdoored)
        triggered = Batch(batch.sample_ids, victim(image_BCHW), image_BCHW)
        mask_BHW = settings.open(victim, {}).masks(triggered)
        share[backdoored] = mask_BHW[:, -WHITE_PX:, -WHITE_PX:].mean(dim=(1, 2)) / mask_BHW.mean(dim=(1, 2))
    assert (share[True] > 1.5).all()
    assert (share[False] < share[True] / 1.3).all()


def test_an_empty_batch_has_no_scores(victim, batch):
    empty = CognitiveDistillation().open(victim, {}).score(batch.part([]))
    assert {name: score_B.shape for name, score_B in empty.items()} == {"cd_mask": (0,), "cd_small_mask": (0,)}


def test_all_but_the_memory_setting_is_part_of_the_fingerprint(victim):
    changes = [{}, {"steps": 50}, {"norm_weight": 0.01}, {"smoothness_weight": 1.0}, {"seed": 1}, {"is_exact": False}]
    prints = [CognitiveDistillation(**change).open(victim, {}).fingerprint for change in changes]
    assert len(set(prints)) == len(changes)
    assert CognitiveDistillation(images_at_once=3).open(victim, {}).fingerprint == prints[0]
