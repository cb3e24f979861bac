"""The comparison with open_clip's trainer: it measures both, and what it counts is what others counted."""

from __future__ import annotations

import io
import re

import pytest
from PIL import Image

from dede_ray.models import clip
from dede_ray.runtime.config import Mistake
from dede_ray.training.loop import Workers
from tests.benchmarks.baseline import TrainerSpeed, Variant, _flop_per_image, compare_trainers, photographs

pytestmark = pytest.mark.trains


@pytest.mark.parametrize(("model", "forward_gflop"), [("ViT-B-32", 14.78), ("RN50", 18.18)])
def test_the_arithmetic_of_a_pair_is_three_times_the_forward_pass_that_open_clip_publishes(model, forward_gflop):
    """Figures of docs/model_profile.csv in open_clip's repository."""
    counted = _flop_per_image(clip.model_description(model))
    assert counted == pytest.approx(3e9 * forward_gflop, rel=0.01)


def test_made_photographs_cost_as_much_to_decode_as_real_ones():
    """Of a photograph's size in pixels and bytes: COCO's at 256 pixels have 10 to 40 kB."""
    for sample in photographs(count=3):
        with Image.open(io.BytesIO(sample.image)) as image:
            assert (image.format, image.size) == ("JPEG", (341, 256))
        assert 10_000 < len(sample.image) < 60_000


@pytest.mark.slow
def test_both_trainers_are_measured_on_the_same_shards(local_ray, clip_config, tmp_path):
    pytest.importorskip("webdataset", reason="open_clip's trainer needs it: pip install .[baseline]")
    workers = Workers(cpus_per_worker=0.5, read_cpus=0.5, threads_per_worker=1)
    speed = TrainerSpeed(
        model=str(clip_config), batch_size=32, steps=8, skipped_steps=4, log_every=2, repeats=2, workers=workers,
        variants=[Variant(workers=1)],
    )  # fmt: skip
    table = compare_trainers(speed, tmp_path)
    turns = re.findall(r"turn \d: ([\d.,]+) images/s, open_clip ([\d.,]+), ratio ([\d.]+)", table)
    assert len(turns) == 2
    for ours, theirs, ratio in turns:
        assert float(ours.replace(",", "")) / float(theirs.replace(",", "")) == pytest.approx(float(ratio), rel=0.05)
    assert str(next(tmp_path.glob("*/ours.yaml"))) in table
    assert "--batch-size 32" in table


@pytest.mark.slow
def test_a_baseline_that_does_not_train_says_why(local_ray, clip_config, tmp_path):
    speed = TrainerSpeed(model=str(clip_config), batch_size=32, steps=2, skipped_steps=1,
                         variants=[Variant(precision="fp8"), Variant()])  # fmt: skip
    with pytest.raises(Mistake, match="invalid choice: 'fp8'"):
        compare_trainers(speed, tmp_path)
