"""Ray that is slow to start is waited for, Ray that does not start is one line, and its core keeps to its logs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dede_ray.runtime.config import Mistake
from dede_ray.runtime.session import _dropping, _patience, _quiet_core, _start_s, start_ray

ROOT = Path(__file__).parents[2]


@pytest.fixture
def services(monkeypatch):
    from ray._private import services

    for name in ("RAY_gcs_server_port_wait_time_s", "RAY_raylet_client_num_connect_attempts"):
        monkeypatch.setenv(name, "30")
    return services


def test_a_ray_that_is_slow_to_start_is_waited_for_beyond_what_ray_itself_would(services, monkeypatch):
    asked = []

    def answer(address: str) -> str:
        asked.append(address)
        if len(asked) < 4:
            raise RuntimeError("no such node")
        return "the node"

    monkeypatch.setattr(services, "get_node", answer)
    with _patience(30):
        assert services.get_node("here") == "the node"
    assert asked == ["here"] * 4
    assert services.get_node is answer


def test_a_ray_that_never_starts_is_given_up_after_the_time_given(services, monkeypatch):
    def answer() -> None:
        raise RuntimeError("no such node")

    monkeypatch.setattr(services, "get_node", answer)
    with pytest.raises(RuntimeError), _patience(0.3):
        services.get_node()


def test_ray_waits_120_seconds_or_what_the_environment_says(monkeypatch):
    monkeypatch.delenv("DEDE_RAY_START_S", raising=False)
    assert _start_s() == 120
    monkeypatch.setenv("DEDE_RAY_START_S", "300")
    assert _start_s() == 300
    for wrong in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("DEDE_RAY_START_S", wrong)
        with pytest.raises(Mistake, match=r"DEDE_RAY_START_S=.* is no number of seconds; expected one such as 120"):
            _start_s()


@pytest.mark.parametrize("error", [Exception("timed out\n\nduring startup"), RuntimeError("no GCS"), ValueError()])
def test_a_ray_that_does_not_start_is_one_line_whatever_it_raises(monkeypatch, error):
    import ray

    def init(**settings):
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(
        Mistake, match=r"Ray did not start on this machine, after 0 s: .* set DEDE_RAY_START_S"
    ) as caught:
        start_ray()
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(
        Mistake, match=r"no Ray cluster answers at RAY_ADDRESS=10\.0\.0\.1:6379: .*; start it or unset it"
    ):
        start_ray()


@pytest.mark.ray
def test_a_job_whose_ray_does_not_start_ends_with_that_line_and_no_traceback(tmp_path, write_pictures):
    write_pictures(tmp_path / "in", range(4))
    (tmp_path / "file").touch()
    config = tmp_path / "check.yaml"
    config.write_text(f"shards: {tmp_path / 'in'}\noutput: {tmp_path / 'out'}\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(tmp_path / "file")}
    command = [sys.executable, str(ROOT / "jobs" / "check.py"), str(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: Ray did not start on this machine, after ")
    assert "Traceback" not in done.stderr


def test_the_core_is_told_to_be_quiet_when_it_connects_and_nobody_else_is(monkeypatch, capfd):
    from ray._private import worker

    levels = []

    def connect(mode: str) -> str:
        levels.append(os.environ.get("RAY_BACKEND_LOG_LEVEL"))
        os.write(2, b"[2026-12-01 I 1 1] logging.cc:303: Set ray log level from environment variable\nsomething else\n")
        return mode

    monkeypatch.setattr(worker, "connect", connect)
    monkeypatch.delenv("RAY_BACKEND_LOG_LEVEL", raising=False)
    with _quiet_core():
        assert "RAY_BACKEND_LOG_LEVEL" not in os.environ  # as Ray's other processes start
        assert worker.connect("driver") == "driver"
    assert levels == ["fatal"]
    assert "RAY_BACKEND_LOG_LEVEL" not in os.environ
    assert worker.connect is connect
    assert capfd.readouterr().err == "something else\n"
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "debug")  # a person who asks for it gets it
    with _quiet_core():
        worker.connect("driver")
    assert levels[1:] == ["debug"]


def test_what_is_said_before_an_error_is_not_lost(capfd):
    def fail() -> None:
        with _dropping(re.compile(b"unwanted")):
            os.write(2, b"why\nunwanted\n")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert capfd.readouterr().err == "why\n"
