"""The curve of a training run: loss, learning rate, speed and validation over the samples seen, as one picture.

Drawn from `metrics.jsonl` and `validation.jsonl` alone, so it can be drawn anew at any time, also while training.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dede_ray.config import write_atomically

STYLE: Any = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SHOWN = {  # of a validation: what is drawn, and what it is called
    "zero_shot_top1": "zero-shot accuracy",
    "attack_success_rate": "attack success rate",
    "image_to_text_r5": "image to text, R@5",
    "text_to_image_r5": "text to image, R@5",
}


def draw_curve(folder: Path) -> Path | None:
    """Draw `<folder>/curve.png`; None where nothing has been logged yet."""
    lines, validations = _lines(folder / "metrics.jsonl"), _lines(folder / "validation.jsonl")
    if not lines:
        return None
    per_step = lines[-1]["samples_seen"] / (lines[-1]["step"] + 1)
    seen = np.array([line["samples_seen"] for line in lines])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3), layout="constrained")
        loss, speed, quality = figure.subplots(1, 3)
        loss.plot(seen, [line["loss"] for line in lines], color="C0")
        loss.set(title="loss", ylim=(0, None))
        rate = loss.twinx()
        rate.plot(seen, [line["learning_rate"] for line in lines], color="C7", linewidth=0.8, linestyle="--")
        rate.set(ylabel="learning rate (dashed)", ylim=(0, None))
        rate.grid(False)
        speed.plot(seen, [line["samples_per_s"] for line in lines], color="C2")
        speed.set(title="samples per second", ylim=(0, None))
        wait = speed.twinx()
        wait.plot(seen, [100 * line["input_wait_share"] for line in lines], color="C3", linewidth=0.8, linestyle="--")
        wait.set(ylabel="waiting for input, % (dashed)", ylim=(0, 100))
        wait.grid(False)
        _draw_quality(quality, validations, per_step)
        for axes in (loss, speed, quality):
            axes.set_xlabel("samples seen")
            axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    write_atomically(folder / "curve.png", buffer.getvalue())
    return folder / "curve.png"


def _draw_quality(axes: Axes, validations: list[dict[str, Any]], per_step: float) -> None:
    axes.set(title="validation, %", ylim=(0, 100))
    shown = [name for name in SHOWN if any(name in line for line in validations)]
    for name in shown:
        points = [((line["step"] + 1) * per_step, 100 * line[name]) for line in validations if name in line]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=SHOWN[name])
        axes.annotate(f"{points[-1][1]:.1f}", points[-1], textcoords="offset points", xytext=(-4, 6), ha="right")
    if shown:
        axes.legend(loc="best")
    else:
        axes.text(0.5, 0.5, "none asked for", ha="center", va="center", transform=axes.transAxes)


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in text if line.endswith("}")]
