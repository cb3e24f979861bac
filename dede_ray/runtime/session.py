"""Reaching Ray: the cluster that a job was submitted to, or a small Ray of its own on this machine.

`start_ray` is called once by each job before it works. Under `ray job submit`, or with RAY_ADDRESS set, it joins that
cluster; otherwise it starts Ray in this process with what the machine has. A submitted job runs in a copy of the
working folder, where outputs would be lost: `check_output` looks.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import ray

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

logger = logging.getLogger(__name__)


def start_ray(*settings: Config) -> None:
    """Join or start Ray, once; later calls do nothing.

    Args:
        settings: the jobs', for `check_output`.

    Raises:
        Mistake: RAY_ADDRESS names a cluster that does not answer, or an output would be lost.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    _quiet_loggers()
    quiet: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"]}},
    }
    if address:
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise Mistake(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}; start it or unset it") from None
    else:
        ray.init(address="local", include_dashboard=False, **quiet)
    _quiet_ray_data()
    resources = ray.cluster_resources()
    logger.info("Ray with %d CPUs and %d GPUs", resources.get("CPU", 0), resources.get("GPU", 0))
    check_output(*settings)


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
    if ray.is_initialized() and _works_elsewhere():
        raise Mistake(advice)
    logger.warning("%s", advice)


def _works_elsewhere() -> bool:
    """Are there machines beside this one, or has this one no CPUs, so that they will be asked for?"""
    own = ray.util.get_node_ip_address()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return any(node["NodeManagerAddress"] != own for node in nodes) or not ray.cluster_resources().get("CPU")


def _quiet_ray_data() -> None:
    """One line a second of our own says more than Ray Data's bars and plans."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _quiet_loggers() -> None:
    """Two remarks that every job would print: that our Ray asks for a token, and that Ray Data draws no bars."""
    for name in ("ray._private.authentication.authentication_token_setup", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)
