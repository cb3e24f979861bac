"""Watching a training run: a picture of its curve, and TensorBoard, MLflow and W&B as views of it.

The truth is the JSON lines in the run's folder, `metrics.jsonl` and `validation.jsonl`; everything here reads them.
`draw_curve` draws `curve.png` from them, at any time, also while training.

A `Follower` lives in the driver while a section trains. Every few seconds it reads the lines and forwards the steps
that are new to each tracker. Training never waits for a tracker: one that fails is warned about once and tried again,
from where it stopped. Only the end of the job waits for a last try.

`tracking.json` keeps, for each tracker, the id of its run and the last step that was forwarded, so that a killed job
continues the same runs. Steps that training does again repeat what they did, so trackers keep the values they have:
only later steps are forwarded, and no step appears twice. (A driver killed between forwarding steps and noting it
repeats those lines, a poll's worth, with the same values.)
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field

from dede_ray.runtime.config import Config, Mistake, read_json, write_atomically, write_json

logger = logging.getLogger(__name__)

STREAMS = {"train": "metrics.jsonl", "validation": "validation.jsonl"}  # a metric is forwarded as <stream>/<name>
PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}  # tensorboardX comes with ray[train]
POLL_S = 5.0
RETRY_S = 300.0

Steps = list[tuple[int, dict[str, float]]]  # metrics by step, ascending


class Tracking(Config):
    """Where a run can be watched besides its own metrics.jsonl. Changing it does not make it another run."""

    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(default_factory=list)
    """TensorBoard writes <output>/<section>/tensorboard; MLflow and W&B follow their own environment variables."""
    project: str = "dede_ray"
    """W&B project, MLflow experiment."""
    run_name: str | None = None
    """Name in MLflow and W&B, before the section's; None takes the name of the output folder."""

    def check(self) -> None:
        """Raise a Mistake if a tracker's package is missing; cheap, so that a job can begin with it."""
        for tracker in self.trackers:
            spec = importlib.util.find_spec(PACKAGES[tracker])
            # A folder ./wandb, as W&B leaves it anywhere, passes for a package, too, but has no origin.
            if spec is None or spec.origin is None:
                raise Mistake(f"tracking: {PACKAGES[tracker]} is not installed; pip install 'dede_ray[track]'")


class Follower:
    """Follows the JSON lines of one section's folder for as long as its `with` block lasts, and once more at its end.

    Args:
        folder: the section's folder, with `metrics.jsonl` and `validation.jsonl` now or later. Each line is an object
            of numbers with `step` among them; what is not a number is left out. Steps ascend.
        tracking: which trackers to forward to.
        settings: the run's settings as JSON values, shown by the trackers.
        on_metrics: called with the newest line of either file when it has changed, steps done again included;
            from the follower's own thread, so what it raises stops the following, not the training.

    Raises:
        Mistake: a tracker's package is missing.
    """

    def __init__(
        self,
        folder: Path,
        tracking: Tracking,
        settings: dict[str, Any],
        on_metrics: Callable[[dict[str, Any]], None] | None = None,
    ):
        tracking.check()
        self.folder, self.on_metrics = folder.absolute(), on_metrics
        name = f"{tracking.run_name or self.folder.parent.name}/{self.folder.name}"
        self._record = self.folder / "tracking.json"
        self._forwarded = read_json(self._record, "record of trackers") if self._record.is_file() else {}
        self._noted = json.dumps(self._forwarded)
        run = _Run(self.folder, tracking.project, name, settings)
        self._views = [
            _View(kind, run, self._forwarded.setdefault(kind, {})) for kind in dict.fromkeys(tracking.trackers)
        ]
        self._shown: dict[str, bytes | None] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        for stream, name in STREAMS.items():  # the last lines of the run to be resumed
            self._shown[stream] = next(reversed(_whole_lines(self.folder / name)), None)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for view in self._views:
            view.retry_at = 0.0
        self._poll()
        for view in self._views:
            view.close(kind is None)

    def _follow(self) -> None:
        self._poll()
        while not self._stop.wait(POLL_S):
            self._poll()

    def _poll(self) -> None:
        lines = {stream: _whole_lines(self.folder / name) for stream, name in STREAMS.items()}
        for stream in STREAMS:
            newest = next(reversed(lines[stream]), None)
            if newest is not None and newest != self._shown[stream] and _parsed(newest):
                self._shown[stream] = newest
                if self.on_metrics:
                    self.on_metrics(json.loads(newest))
        for view in self._views:
            view.forward(lines)
        if json.dumps(self._forwarded) != self._noted:
            with contextlib.suppress(OSError):  # then the next poll notes it
                write_json(self._record, self._forwarded)
                self._noted = json.dumps(self._forwarded)


# ------------------------------------------------------------------------------------------------ the lines


def _whole_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")[:-1]  # behind the last newline: nothing, or a line being written
    except OSError:
        return []  # not there yet, or being replaced; the next poll sees it


def _parsed(line: bytes) -> tuple[int, dict[str, float]] | None:
    try:
        content = json.loads(line)
        step = int(content["step"])
    except (ValueError, TypeError, KeyError):
        return None  # cut short by a killed writer that another one followed
    return step, {k: float(v) for k, v in content.items() if type(v) in (int, float) and k != "step"}


def _steps_after(step: int, lines: list[bytes]) -> Steps:
    """Read backwards until `step`: the file may have been replaced, so only its end says what is new."""
    new: dict[int, dict[str, float]] = {}
    for parsed in filter(None, map(_parsed, reversed(lines))):
        if parsed[0] <= step:
            break
        new.setdefault(*parsed)
    return sorted(new.items())


# ------------------------------------------------------------------------------------------------ trackers


@dataclass(frozen=True)
class _Run:
    folder: Path
    project: str
    name: str
    settings: dict[str, Any]


class _View:
    """A tracker and what was forwarded to it: the `id` it gave its run, and the last step of each stream."""

    def __init__(self, kind: str, run: _Run, state: dict[str, Any]):
        self.kind, self.run, self.state = kind, run, state
        self.tracker: _TensorBoard | _MLflow | _WandB | None = None
        self.is_warned, self.retry_at = False, 0.0

    def forward(self, lines: dict[str, list[bytes]]) -> None:
        if time.monotonic() < self.retry_at:
            return
        try:
            if self.tracker is None:
                self.tracker = _open(self.kind, self.run, self.state)
            for stream in STREAMS:
                new = _steps_after(self.state.get(stream, -1), lines[stream])
                if new:
                    self.tracker.log([(step, {f"{stream}/{k}": v for k, v in row.items()}) for step, row in new])
                    self.state[stream] = new[-1][0]
        except Exception as error:  # whatever a server, a disk or a login can do: training continues
            self._warn(error)
            self.retry_at = time.monotonic() + RETRY_S

    def close(self, is_success: bool) -> None:
        try:
            if self.tracker is not None and not self.retry_at:  # else the last try has just failed
                self.tracker.close(is_success)
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self.is_warned:
            logger.warning(
                "%s failed: %s: %s. Training continues, metrics.jsonl has everything; tried again every %.0f min "
                "from here on, without further warnings", self.kind, type(error).__name__, error, RETRY_S / 60,
            )  # fmt: skip
        self.is_warned = True


def _open(kind: str, run: _Run, state: dict[str, Any]) -> _TensorBoard | _MLflow | _WandB:
    if kind == "tensorboard":
        return _TensorBoard(run, state)
    return _MLflow(run, state) if kind == "mlflow" else _WandB(run, state)


class _TensorBoard:
    """One event file per driver. Written without tensorboardX's queue, so that what was forwarded is on the disk."""

    def __init__(self, run: _Run, state: dict[str, Any]):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.summary import text

        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Its file names count seconds; a name that comes twice would empty the first file.
        self.writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if "id" not in state:
            state["id"] = run.name
            settings = json.dumps(run.settings, indent=2).replace("\n", "\n    ")
            self._write(0, text("settings", f"    {settings}"))  # indented: Markdown for code

    def _write(self, step: int, summary: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.writer.write_event(Event(step=step, wall_time=time.time(), summary=summary))

    def log(self, steps: Steps) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        for step, row in steps:
            self._write(step, Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in row.items()]))
        self.writer.flush()

    def close(self, is_success: bool) -> None:
        self.writer.close()


class _MLflow:
    def __init__(self, run: _Run, state: dict[str, Any]):
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = artifacts = None
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            store = run.folder / "mlruns"
            store.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{store}/mlflow.db", f"{store}/artifacts"
        self.client = MlflowClient(tracking_uri=uri)
        if "id" in state:
            self.id = state["id"]
            self.client.update_run(self.id, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(run.project)
        place = experiment.experiment_id if experiment else self.client.create_experiment(run.project, artifacts)
        self.id = state["id"] = self.client.create_run(place, run_name=run.name).info.run_id
        params = [Param(name, str(value)[:500]) for name, value in _flat(run.settings)]
        for part in _chunks(params, 100):  # limits of the server's interface
            self.client.log_batch(self.id, params=part)

    def log(self, steps: Steps) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for step, row in steps for name, value in row.items()]
        for part in _chunks(metrics, 1000):
            self.client.log_batch(self.id, metrics=part)

    def close(self, is_success: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if is_success else "FAILED")


class _WandB:
    def __init__(self, run: _Run, state: dict[str, Any]):
        import wandb

        state.setdefault("id", uuid.uuid4().hex[:8])
        self.run = wandb.init(
            project=run.project, name=run.name, dir=str(run.folder), config=run.settings, allow_val_change=True,
            id=state["id"], resume="allow", reinit="create_new",
            settings=wandb.Settings(console="off", login_timeout=60),
        )  # fmt: skip
        # Validation lags behind training, so W&B's own counter, which only goes up, cannot be the axis.
        for stream in STREAMS:
            self.run.define_metric(f"{stream}/*", step_metric="step")

    def log(self, steps: Steps) -> None:
        for step, row in steps:
            self.run.log({"step": step, **row})

    def close(self, is_success: bool) -> None:
        self.run.finish(exit_code=0 if is_success else 1)


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _chunks(things: list[Any], size: int) -> list[list[Any]]:
    return [things[start : start + size] for start in range(0, len(things), size)]


# ------------------------------------------------------------------------------------------------ the curve


STYLE: Any = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SHOWN = {  # of a validation: what is drawn, under which name
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
    return [json.loads(line) for line in _whole_lines(path) if line.endswith(b"}")]
