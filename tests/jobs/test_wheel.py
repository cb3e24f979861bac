"""A wheel, installed where no checkout is, has the commands, the smallest configs and the Python surface."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel in it; what the wheel depends on is borrowed from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    done = run(*build, cwd=folder)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("dede_ray-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_the_demo_and_the_examples_run_from_an_empty_folder(installed, tmp_path):
    where = run(installed / "python", "-c", "import dede_ray; print(dede_ray.__file__)", cwd=tmp_path).stdout
    assert where.startswith(str(installed.parent))
    listed = run(installed / "dede-ray", "--help", cwd=tmp_path)
    assert listed.returncode == 0
    assert listed.stdout == run(installed / "python", "-m", "dede_ray", "--help", cwd=tmp_path).stdout
    demo = run(installed / "dede-ray", "demo", "configs/smoke.yaml", cwd=tmp_path)
    assert demo.returncode == 0, demo.stderr
    assert demo.stdout.endswith("page: runs/smoke/report/report.html\n")
    (tmp_path / "runs" / "digits").symlink_to("smoke")
    done = run(installed / "python", ROOT / "tests" / "fixtures" / "examples.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
