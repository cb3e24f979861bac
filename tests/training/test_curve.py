"""The curve is drawn from what a run has logged, whatever of it there is."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from dede_ray.training.tracking import draw_curve


def log(folder, name, lines) -> None:
    (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_a_curve_shows_loss_and_validation(tmp_path):
    assert draw_curve(tmp_path) is None
    lines = [
        {"step": s, "loss": 5 / (1 + s), "learning_rate": 1e-3, "samples_per_s": 900.0, "input_wait_share": 0.1,
         "samples_seen": 64 * (s + 1)} for s in range(9, 100, 10)
    ]  # fmt: skip
    log(tmp_path, "metrics.jsonl", lines)
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 1')  # being written
    bare = np.asarray(Image.open(draw_curve(tmp_path)))
    log(tmp_path, "validation.jsonl", [{"step": s, "zero_shot_top1": s / 200} for s in (49, 99)])
    whole = np.asarray(Image.open(draw_curve(tmp_path)))
    changed = (bare != whole).any(axis=2).mean(axis=0)
    assert changed[2 * whole.shape[1] // 3 + 40 :].max() > 0.05  # the right-hand panel
