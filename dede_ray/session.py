"""Reaching Ray: the cluster that a job was submitted to, or a small Ray of its own on this machine.

`start_ray` is called once by each job before it works. Under `ray job submit`, or with RAY_ADDRESS set, it joins that
cluster; otherwise it starts Ray in this process with what the machine has.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from dede_ray.config import Mistake

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


def start_ray() -> None:
    """Join or start Ray, once; later calls do nothing.

    Raises:
        Mistake: RAY_ADDRESS names a cluster that does not answer.
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
    logger.info("Ray with %d CPUs and %d GPUs", resources.get("CPU", 1), resources.get("GPU", 0))


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
