"""The arithmetic of a step, counted, and the device's rate, measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from dede_ray.models import clip
from dede_ray.training.contrastive import Contrastive
from dede_ray.training.flops import flop_per_sample, matmul_rate

pytestmark = pytest.mark.trains


class Choosy(nn.Module):
    """Two products, the second of those rows only that a number picks: shapes alone do not say how many."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 20, bias=False), nn.Linear(20, 30, bias=False)

    def begin_step(self, step: int) -> None:
        pass

    def forward(self, batch):
        hidden_BH = self.first(batch["x"])
        return self.second(hidden_BH[batch["y"] == 0]).sum(), {}


def test_each_product_counts_once_forward_and_once_for_every_gradient():
    batch = {"x": np.ones((5, 10), np.float32), "y": np.ones(5, np.int64)}
    # The first product needs no gradient of its input.
    assert flop_per_sample(Choosy, batch) == 2 * (2 * 10 * 20 + 3 * 20 * 30)


def test_counting_sees_through_checkpointing_and_compilation_and_draws_nothing(clip_config, tmp_path):
    model = json.loads(clip_config.read_text())
    model["vision_cfg"] = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    (tmp_path / "vit.json").write_text(json.dumps(model))
    described, counted = clip.model_description(str(tmp_path / "vit.json")), []
    for is_prepared in (False, True):

        def build(is_prepared: bool = is_prepared) -> Contrastive:
            model = clip.build_clip(described)
            clip.prepare_for_training(model, gradient_checkpointing=is_prepared, compile=is_prepared)
            return Contrastive(model, described)

        batch = {"image": np.zeros((0, 32, 32, 3), np.uint8), "tokens": np.zeros((0, 8), np.int64)}
        before = torch.get_rng_state()
        counted.append(flop_per_sample(build, batch))
        assert torch.equal(torch.get_rng_state(), before)
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_devices_rate_is_that_of_a_computer(precision):
    assert 1e8 < matmul_rate("cpu", precision, limit_s=0.05) < 1e14
