"""`import dede_ray` is light, its names are real, and nothing of the package is forgotten when it is built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dede_ray
from dede_ray.runtime.cli import JOBS

ROOT = Path(__file__).parents[2]


def test_importing_loads_nothing_heavy_and_takes_no_time():
    code = (
        "import time; t = time.perf_counter(); import dede_ray; took = time.perf_counter() - t; import sys; "
        "print(took < 0.3, sorted({'torch', 'ray', 'numpy', 'pyarrow'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True []\n"


def test_every_public_name_is_there_and_documented():
    for name in dede_ray.__all__:
        assert getattr(dede_ray, name).__doc__, name
    assert set(dede_ray.__all__) <= set(dir(dede_ray))
    with pytest.raises(AttributeError, match="its public names are score"):
        dede_ray.scores  # noqa: B018


def test_the_list_of_jobs_needs_none_of_them():
    code = "import sys; from dede_ray.runtime.cli import main; sys.argv[1:] = []; main(); print('ray' in sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert listed.endswith("False\n")
    assert all(f"  {name} " in listed for name in JOBS)


def help_of(job: str, setup: str = "") -> tuple[str, float]:
    """What `--help` prints, and the seconds of processor time that it takes."""
    code = (
        f"import sys, time; from dede_ray.runtime import cli\n{setup}\nsys.argv[1:] = [{job!r}, '--help']\n"
        "try:\n    cli.main()\nfinally:\n    print(time.process_time(), file=sys.stderr)"
    )
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, float(done.stderr.split()[-1])


@pytest.mark.parametrize("job", JOBS)
def test_help_answers_at_once_and_needs_no_heavy_library(job):
    said, took_s = help_of(job)
    assert any(setting in said for setting in ("--output", "--steps", "victim:"))
    assert "standins" not in said
    assert took_s < 2


@pytest.mark.parametrize("job", ["check", *(pytest.param(j, marks=pytest.mark.slow) for j in JOBS if j != "check")])
def test_help_says_the_same_as_with_the_libraries_themselves(job):
    assert help_of(job)[0] == help_of(job, "cli.lighten = lambda: None")[0]


def test_every_job_has_a_door_and_every_door_a_job():
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(JOBS)


def test_a_wheel_would_hold_every_room():
    listed = (ROOT / "pyproject.toml").read_text().partition("packages = [")[2].partition("]")[0]
    rooms = {path.parent.name for path in (ROOT / "dede_ray").glob("*/__init__.py")}
    assert {line.strip(' ",').removeprefix("dede_ray.") for line in listed.split()} == {"dede_ray", "configs", *rooms}
