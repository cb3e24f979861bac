"""Trackers: they see each step once, whatever is killed, and training never depends on them."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from dede_ray.runtime.config import Mistake, load
from dede_ray.training import tracking
from dede_ray.training.tracking import Follower, Tracking

SETTINGS = {"seed": 3, "clip": {"model": "RN50", "learning_rate": 1e-3}}
TENSORBOARD = Tracking(trackers=["tensorboard"])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(tracking, "POLL_S", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A section's folder, before its first step."""
    (tmp_path / "small" / "clip").mkdir(parents=True)
    return tmp_path / "small" / "clip"


def line(step: int, **more: float | str) -> str:
    return json.dumps({"step": step, "loss": 100.0 - step, **more}) + "\n"


def write(folder: Path, steps: Iterable[int], tail: str = "") -> None:
    """The metrics.jsonl of a run that has got so far, in place of what is there."""
    (folder / "metrics.jsonl").write_text("".join(map(line, steps)) + tail)


def follow(folder: Path, to: Tracking = TENSORBOARD) -> None:
    with Follower(folder, to, SETTINGS):
        pass


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.01)


def told_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All (step, value) pairs of all event files, by tag: records of length, checksum, event, checksum."""
    values: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("tensorboard/*")):
        content = path.read_bytes()
        while len(content) >= 8 and len(content) >= 16 + (length := struct.unpack("Q", content[:8])[0]):
            event = Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    values.setdefault(value.tag, []).append((event.step, value.simple_value))
            content = content[16 + length :]
    return values


def losses(steps: Iterable[int]) -> list[tuple[int, float]]:
    return [(step, 100.0 - step) for step in steps]


def test_every_number_of_every_step_is_forwarded_and_nothing_else(folder):
    with Follower(folder, TENSORBOARD, SETTINGS):  # the files come later
        write(folder, [0], line(1, note="warm", learning_rate=0.5) + '{"step": 2, "loss": 9')
        (folder / "validation.jsonl").write_text('{"step": 1, "zero_shot_top1": 0.25}\n')
    assert told_tensorboard(folder) == {
        "train/loss": losses([0, 1]),
        "train/learning_rate": [(1, 0.5)],
        "validation/zero_shot_top1": [(1, 0.25)],
    }


def test_a_half_written_line_is_forwarded_when_it_is_whole(folder):
    with Follower(folder, TENSORBOARD, SETTINGS):
        write(folder, [0, 1], line(2)[:-3])
        wait_until(lambda: told_tensorboard(folder) == {"train/loss": losses([0, 1])})
        write(folder, [0, 1, 2])
    assert told_tensorboard(folder)["train/loss"] == losses([0, 1, 2])


def test_a_line_that_a_killed_writer_left_unfinished_is_passed_over(folder):
    write(folder, [0], '{"step": 1, "lo' + line(2) + "\0\0\n[4]\n" + line(3))
    follow(folder)
    assert told_tensorboard(folder)["train/loss"] == losses([0, 3])


def test_nan_is_shown_as_nan(folder):
    write(folder, [0], '{"step": 1, "loss": NaN, "scale": null}\n')
    follow(folder)
    told = told_tensorboard(folder)
    assert told.keys() == {"train/loss"}
    assert [step for step, _ in told["train/loss"]] == [0, 1]
    assert math.isnan(told["train/loss"][1][1])


def test_steps_done_again_after_a_worker_failed_are_not_told_again(folder):
    seen = [-1]
    with Follower(folder, TENSORBOARD, SETTINGS, lambda newest: seen.append(newest["step"])):
        for num_steps in (10, 4, 7, 12):
            write(folder, range(num_steps))
            wait_until(lambda: seen[-1] == num_steps - 1)  # noqa: B023
    assert told_tensorboard(folder)["train/loss"] == losses(range(12))


@pytest.mark.ray
def test_a_killed_driver_goes_on_with_each_step_told_once(folder):
    """The driver dies without a word while metrics.jsonl grows; the next run begins again from an older step."""
    write(folder, range(6))
    (folder / "validation.jsonl").write_text('{"step": 4, "top1": 0.5}\n')
    script = f"""
import os, pathlib, time
from dede_ray.training.tracking import Follower, Tracking
folder = pathlib.Path({str(folder)!r})
Follower(folder, Tracking(trackers=["tensorboard"]), {{}}).__enter__()
while not (folder / "tracking.json").exists():
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert told_tensorboard(folder)["train/loss"] == losses(range(6))
    write(folder, range(3))
    with Follower(folder, TENSORBOARD, SETTINGS):
        write(folder, range(9))
        (folder / "validation.jsonl").write_text('{"step": 4, "top1": 0.5}\n{"step": 8, "top1": 0.75}\n')
    assert told_tensorboard(folder) == {
        "train/loss": losses(range(9)),
        "validation/top1": [(4, 0.5), (8, 0.75)],
    }


def test_tensorboard_itself_reads_what_was_told(folder):
    loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs pip install 'dede_ray[track]'"
    )
    write(folder, range(5))
    follow(folder)
    write(folder, range(8))
    follow(folder)
    shown = loader.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("train/loss")] == losses(range(8))
    (settings,) = shown.Tensors("settings/text_summary")
    assert b'"RN50"' in settings.tensor_proto.string_val[0]


def test_the_driver_is_shown_the_newest_line_also_of_steps_done_again(folder):
    write(folder, range(6))  # by the run that is now resumed
    seen: list[int] = []
    with Follower(folder, Tracking(), SETTINGS, lambda newest: seen.append(newest["step"])):
        write(folder, range(3))
        wait_until(lambda: seen == [2])
        write(folder, range(5))
        wait_until(lambda: seen == [2, 4])
        write(folder, range(7))
    assert seen == [2, 4, 6]


def test_nothing_is_written_without_trackers(folder):
    write(folder, range(3))
    follow(folder, Tracking())
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_tracker_that_fails_is_warned_about_once_and_caught_up_with(folder, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "RETRY_S", 0.0)
    write(folder, range(3))
    (folder / "tensorboard").write_text("a file where the folder should be")
    seen: list[int] = []
    with Follower(folder, TENSORBOARD, SETTINGS, lambda newest: seen.append(newest["step"])):
        wait_until(lambda: bool(caplog.messages))
        for num_steps in (4, 5, 6):  # it goes on failing while training goes on
            write(folder, range(num_steps))
            wait_until(lambda: seen[-1:] == [num_steps - 1])  # noqa: B023
        (warning,) = caplog.messages
        assert "tensorboard failed: FileExistsError" in warning
        (folder / "tensorboard").unlink()
        wait_until(lambda: told_tensorboard(folder) == {"train/loss": losses(range(6))})
        write(folder, range(7))
    assert told_tensorboard(folder)["train/loss"] == losses(range(7))
    assert len(caplog.messages) == 1


def test_a_tracker_that_is_chosen_later_is_told_everything(folder):
    write(folder, range(3))
    follow(folder, Tracking())
    write(folder, range(6))
    follow(folder)
    assert told_tensorboard(folder)["train/loss"] == losses(range(6))


@pytest.mark.parametrize("leftover", [False, True], ids=["absent", "only a folder of its name"])
def test_a_missing_package_is_a_mistake_before_anything_is_done(folder, tmp_path, monkeypatch, leftover):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # where nothing is installed
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    if leftover:
        (tmp_path / "wandb").mkdir()
    with pytest.raises(Mistake, match=r"wandb is not installed; pip install 'dede_ray\[track\]'"):
        Follower(folder, Tracking(trackers=["wandb"]), SETTINGS)
    assert not list(folder.iterdir())


def test_trackers_can_be_chosen_on_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("project: one\n")
    chosen = load(Tracking, [str(tmp_path / "run.yaml"), "--trackers", "tensorboard", "wandb", "--project", "two"])
    assert chosen == Tracking(trackers=["tensorboard", "wandb"], project="two")


# ------------------------------------------------------------------------------------------------ the real ones


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return pytest.importorskip("mlflow.tracking", reason="needs pip install 'dede_ray[track]'")


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    if os.path.isdir("wandb"):
        pytest.skip("a folder named wandb is in the way")
    return pytest.importorskip("wandb", reason="needs pip install 'dede_ray[track]'")


def test_mlflow_continues_its_run_and_has_each_step_once(mlflow, folder):
    chosen = Tracking(trackers=["mlflow"], project="ours", run_name="first")
    write(folder, range(3), '{"step": 3, "loss": NaN}\n')
    with pytest.raises(KeyboardInterrupt), Follower(folder, chosen, SETTINGS):
        raise KeyboardInterrupt
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("ours")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"

    write(folder, range(2))
    with Follower(folder, chosen, SETTINGS):
        write(folder, range(1100))  # more metrics than one request may carry, with those of validation
        (folder / "validation.jsonl").write_text(line(5, top1=0.5))
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first/clip", "FINISHED")
    assert run.data.params == {"seed": "3", "clip.model": "RN50", "clip.learning_rate": "0.001"}
    with sqlite3.connect(folder / "mlruns" / "mlflow.db") as store:
        rows = store.execute("select key, step, value, is_nan from metrics order by key, step").fetchall()
    assert [row[:3] for row in rows if not row[3]] == [
        *(("train/loss", step, value) for step, value in losses(range(1100)) if step != 3),
        ("validation/loss", 5, 95.0),
        ("validation/top1", 5, 0.5),
    ]
    assert [row[1] for row in rows if row[3]] == [3]


@pytest.mark.ray
def test_wandb_continues_its_run_and_has_each_step_once(wandb, folder):
    chosen = Tracking(trackers=["wandb"], project="ours")
    write(folder, range(3))
    follow(folder, chosen)
    write(folder, range(2))
    with Follower(folder, chosen, SETTINGS):
        write(folder, range(6))
        wait_until(lambda: json.loads((folder / "tracking.json").read_text())["wandb"]["train"] == 5)
        (folder / "validation.jsonl").write_text('{"step": 2, "top1": 0.5}\n')  # behind training, and not lost
    wait_until(lambda: all(run["is_over"] for run in told_wandb(folder)))  # its own process writes on for a moment
    runs = told_wandb(folder)
    told = json.loads((folder / "tracking.json").read_text())
    assert [run["id"] for run in runs] == [told["wandb"]["id"]] * 2
    assert [run["name"] for run in runs] == ["small/clip"] * 2
    rows = [row for run in runs for row in run["rows"]]
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == losses(range(6))
    assert [(row["step"], row["validation/top1"]) for row in rows if "validation/top1" in row] == [(2, 0.5)]


def told_wandb(folder: Path) -> list[dict]:
    """What the offline runs hold for a later `wandb sync`, in the order they were made."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        run: dict = {"rows": [], "is_over": False}
        for record in map(Record.FromString, leveldb_records(path.read_bytes())):
            if record.WhichOneof("record_type") == "run":
                run.update(id=record.run.run_id, name=record.run.display_name)
            run["is_over"] |= record.WhichOneof("record_type") == "exit"
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                run["rows"].append(
                    {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
                )
        runs.append(run)
    return runs


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log behind W&B's seven bytes: checksum, length, kind, piece; no piece crosses 32 KiB."""
    position, record = 7, b""
    while position + 7 < len(content):
        if position % 2**15 > 2**15 - 7:  # the rest of a block that no header fits into
            position += -position % 2**15
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        if position + 7 + length > len(content):
            return
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in {1, 4}:  # a whole one, or the last piece of one
            yield record
            record = b""
