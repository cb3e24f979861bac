"""Reaching Ray: the cluster that a job was submitted to, or a small Ray of its own on this machine.

`start_ray` is called once by each job before it works. Under `ray job submit`, or with RAY_ADDRESS set, it joins that
cluster; otherwise it starts Ray in this process with what the machine has. A submitted job runs in a copy of the
working folder, where outputs would be lost: `check_output` looks. Ray is imported when it is needed, as it takes a
second.

A Ray of our own may take its time on a machine that is busy: `DEDE_RAY_START_S`, 120 by default, is how long we wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dede_ray.runtime.config import Config, Mistake
from dede_ray.runtime.store import is_url

# Read by Ray Train's controller, which otherwise looks after its workers every two seconds only.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray would run its workers at the lowest priority, so that whatever else the machine does slows down our jobs first.
os.environ.setdefault("RAY_worker_niceness", "0")
# Idle arithmetic threads sleep instead of spinning: on a machine that does anything else besides, spinning threads
# slow each other down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

LEVEL = "RAY_BACKEND_LOG_LEVEL"
START_S = 120.0
"""How long Ray may take to start, in seconds; DEDE_RAY_START_S in the environment changes it."""

logger = logging.getLogger(__name__)


def start_ray(*settings: Config) -> None:
    """Join or start Ray, once; later calls do nothing.

    Args:
        settings: the jobs', for `check_output`.

    Raises:
        Mistake: Ray does not start, RAY_ADDRESS names a cluster that does not answer, or an output would be lost.
    """
    import ray

    if ray.is_initialized():
        return
    address, wait_s = os.environ.get("RAY_ADDRESS"), _start_s()
    _quiet_loggers()
    quiet: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"]}},
    }
    own: dict[str, Any] = {} if address else {"address": "local", "include_dashboard": False}
    started = time.monotonic()
    try:
        with _quiet_core(), contextlib.nullcontext() if address else _patience(wait_s):
            ray.init(**own, **quiet)
    except Exception as error:  # of many kinds, the plain Exception among them
        with contextlib.suppress(Exception):
            ray.shutdown()
        why = " ".join(str(error).split())[:300] or type(error).__name__
        if address:
            raise Mistake(f"no Ray cluster answers at RAY_ADDRESS={address}: {why}; start it or unset it") from None
        raise Mistake(
            f"Ray did not start on this machine, after {time.monotonic() - started:.0f} s: {why} (its logs are in "
            f"/tmp/ray/session_latest/logs). If the machine is only busy, set DEDE_RAY_START_S above {wait_s:g}"
        ) from None
    _quiet_ray_data()
    resources = ray.cluster_resources()
    logger.info("Ray with %d CPUs and %d GPUs", resources.get("CPU", 0), resources.get("GPU", 0))
    check_output(*settings)


def _start_s() -> float:
    given = os.environ.get("DEDE_RAY_START_S", str(START_S))
    try:
        if 0 < (wait_s := float(given)) < float("inf"):
            return wait_s
    except ValueError:
        pass
    raise Mistake(f"DEDE_RAY_START_S={given!r} is no number of seconds; expected one such as 120")


@contextlib.contextmanager
def _quiet_core() -> Iterator[None]:
    """Keep what Ray's core says to itself (`core_worker.cc:1234: ...`) out of this process's error output.

    What its errors come to is raised, and they are in its logs. The core asks for its level when this process connects;
    by then the other processes of our own Ray have been started, and write their logs as ever.
    """
    if LEVEL in os.environ:
        yield
        return
    from ray._private import worker

    connect = worker.connect

    def connect_quietly(*args: Any, **settings: Any) -> Any:
        os.environ[LEVEL] = "fatal"
        try:
            with _dropping(re.compile(rb"logging\.cc:\d+: Set ray log level")):
                return connect(*args, **settings)
        finally:
            del os.environ[LEVEL]

    worker.connect = connect_quietly
    try:
        yield
    finally:
        worker.connect = connect


@contextlib.contextmanager
def _dropping(unwanted: re.Pattern[bytes]) -> Iterator[None]:
    """Write to the error output without the lines of a pattern, once the block is left."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            os.write(2, b"".join(line for line in file if not unwanted.search(line)))


@contextlib.contextmanager
def _patience(wait_s: float) -> Iterator[None]:
    """Have Ray wait so long for its own processes: for one of them it would give up after a fixed 30 s."""
    for name in ("RAY_gcs_server_port_wait_time_s", "RAY_raylet_client_num_connect_attempts"):  # one attempt a second
        os.environ.setdefault(name, str(max(1, int(wait_s))))
    from ray._private import services

    ask, deadline_s = services.get_node, time.monotonic() + wait_s
    told_s = time.monotonic() + 20

    def ask_patiently(*args: Any, **settings: Any) -> Any:
        nonlocal told_s
        while True:
            try:
                return ask(*args, **settings)
            except RuntimeError:  # not there yet
                if time.monotonic() > deadline_s:
                    raise
            if time.monotonic() > told_s:
                told_s = float("inf")
                logger.info("Ray is slow to start; it has up to %.0f s (DEDE_RAY_START_S)", wait_s)
            time.sleep(0.2)

    services.get_node = ask_patiently
    try:
        yield
    finally:
        services.get_node = ask


def check_output(*settings: Config) -> None:
    """Look where a job writes: not on a store, unless it can, and not into Ray's copy of the working folder.

    Under `ray job submit --working-dir` a job runs in a folder that Ray unpacked: each machine has its own, it goes
    with the cluster, and a submission in which any file has changed gets another one and would start afresh. On one
    machine that is worth a warning, with several the job cannot work.

    Raises:
        Mistake: an output is a URL that the job cannot write to, or a relative path, and other machines work for the
            job, or may come to.
    """
    outputs = {output: one for one in settings if isinstance(output := getattr(one, "output", None), str)}
    for output, one in outputs.items():
        if is_url(output) and not one.writes_to_stores:
            raise Mistake(
                f"output {output!r} is on an object store, and this job writes to file systems only; name a folder "
                "that all machines see. (jobs/score.py writes to stores, and training puts its checkpoints there by "
                "workers.storage_path)"
            )
    if not any(part.startswith("_ray_pkg_") for part in Path.cwd().parts):
        return
    relative = [output for output in outputs if not Path(output).is_absolute() and not is_url(output)]
    if not relative:
        return
    advice = (
        f"output {relative[0]!r} is relative, and a submitted job runs in Ray's copy of the working folder: each "
        f"machine has its own, and it goes with the cluster (here {Path.cwd()}). Name a path that all machines see, "
        f"such as --output /shared/{relative[0]}, or a URL where the job takes one"
    )
    import ray

    if ray.is_initialized() and _works_elsewhere():
        raise Mistake(advice)
    logger.warning("%s", advice)


def _works_elsewhere() -> bool:
    """Are there machines beside this one, or has this one no CPUs, so that they will be asked for?"""
    import ray

    own = ray.util.get_node_ip_address()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return any(node["NodeManagerAddress"] != own for node in nodes) or not ray.cluster_resources().get("CPU")


def _quiet_ray_data() -> None:
    """One line a second of our own says more than Ray Data's bars and plans."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _quiet_loggers() -> None:
    """Two remarks that every job would print: that our Ray asks for a token, and that Ray Data draws no bars."""
    for name in ("ray._private.authentication.authentication_token_setup", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)
