"""A throw-away Ray cluster: one head on ports of its own, ended with all that it started and nothing else."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class Head:
    """What clients need to know of it."""

    address: str
    dashboard: str
    temp_dir: Path

    def environment(self, **variables: str) -> dict[str, str]:
        """Of a process that talks to it."""
        return os.environ | {"RAY_ADDRESS": self.address, **variables}


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, and that Ray does not give to its workers (10002 to 19999)."""
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < number:
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            if not 10002 <= one.getsockname()[1] <= 19999:
                ports.append(one.getsockname()[1])
        return ports


@contextmanager
def head(*options: str, gcs_port: int | None = None, **variables: str) -> Iterator[Head]:
    """`ray start --head --block <options>`; the temporary folder has a short name, for Unix sockets."""
    port, dashboard, agent, client = free_ports(4)
    port = gcs_port or port
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    log = folder / "head.log"
    command = [
        RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        f"--object-store-memory={150 * 2**20}", "--disable-usage-stats", *options,
    ]  # fmt: skip
    with log.open("w") as stream:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "1"
        # Ray would kill our jobs for the memory that others on this machine take.
        environment["RAY_memory_monitor_refresh_ms"] = "0"
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment | variables, start_new_session=True,
            preexec_fn=_end_with_parent,
        )  # fmt: skip
    try:
        _wait_for("Ray runtime started", log, process)
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", folder)
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _end_with_parent() -> None:
    """A test run that is killed cannot tidy up: then the kernel sends SIGTERM, on which `ray start --block` ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait_for(words: str, log: Path, process: subprocess.Popen[bytes], limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while words not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that we started and everything that came from it."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)
    process.wait(10)
