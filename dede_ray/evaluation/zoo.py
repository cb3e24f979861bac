"""A zoo of victims: many jobs, side by side where possible, and one table of the victims that they made.

A branch of the zoo is a row of jobs that ends in a victim, and names the branches that it needs: all tampered victims
start from the honest encoder. Every job runs in a process of its own, with the Ray cluster of RAY_ADDRESS or a small
Ray of its own, and resumes, or does nothing where it is finished; so the zoo, stopped or killed, resumes when it is run
again. The output of each branch is in `<output>/logs`, the table in `<output>/zoo.md`, the records of all victims in
`<output>/zoo.json`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any

from pydantic import Field, model_validator

from dede_ray.evaluation.measure import VictimRecord, record_in
from dede_ray.metrics import Interval
from dede_ray.runtime.cli import Steps, parse_steps
from dede_ray.runtime.config import Config, Mistake, read_json, write_atomically, write_json

logger = logging.getLogger(__name__)


class Branch(Config):
    """Jobs in a row."""

    after: tuple[str, ...] = ()
    """Branches that have to be finished before."""
    steps: list[str] = Field(min_length=1)
    """Command lines of jobs, such as `poison configs/cifar10/poison/ctrl.yaml`."""
    victim: str | None = None
    """Folder whose victim.json the last step writes; its row in the table."""


class ZooConfig(Config):
    """Settings of `dede-ray zoo`."""

    output: str
    """Folder for the table, the records and the logs; the victims are where their jobs put them."""
    at_once: int = Field(4, ge=1)
    """Branches that run at the same time; the machine's cores are divided among them."""
    branches: dict[str, Branch] = Field(min_length=1)
    """By name; the table has their order."""

    @model_validator(mode="after")
    def _can_be_ordered(self) -> ZooConfig:
        finished: set[str] = set()
        while len(finished) < len(self.branches):
            ready = {name for name, one in self.branches.items() if set(one.after) <= finished} - finished
            if not ready:
                stuck = sorted(self.branches.keys() - finished)
                raise ValueError(
                    f"{', '.join(stuck)}: `after` names a branch that does not exist, or that waits for it"
                )
            finished |= ready
        return self


def build_zoo(config: ZooConfig) -> str:
    """Run every branch, and report what the victims do.

    Returns:
        The table.

    Raises:
        Mistake: a step is wrong (nothing has run then), another process is using the same folder, or steps failed;
            branches that do not depend on them are finished all the same.
    """
    for branch in config.branches.values():
        parse_steps(Steps(steps=branch.steps))
    folder = Path(config.output)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Mistake(
                f"another run, or a job that it left behind, is using {folder}; wait for it or stop it"
            ) from None
        failed = _Crew(config, folder, lock).run()
    table = _write_table(config, folder)
    if failed:
        listing = "\n  ".join(f"{name}: {why}" for name, why in failed.items())
        raise Mistake(f"{len(failed)} of {len(config.branches)} branches did not finish:\n  {listing}\n\n{table}")
    return table


class _Crew:
    """The running processes. They hold the lock, too: it is free when the last of them has ended."""

    def __init__(self, config: ZooConfig, folder: Path, lock: IO[str]):
        self.config, self.folder, self.lock = config, folder, lock
        self.processes: set[subprocess.Popen[str]] = set()
        self.guard = threading.Lock()  # of `processes`, `is_stopping` and the file of times
        self.is_stopping = False
        self.before = _read_times(folder)
        self.started = time.monotonic()

    def run(self) -> dict[str, str]:
        """Run all branches; returns those that failed, or never began, and why."""
        failed: dict[str, str] = {}
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if _is_main_thread() else None
        try:
            with ThreadPoolExecutor(self.config.at_once) as pool:
                try:
                    self._schedule(pool, failed)
                except BaseException:
                    self._stop()
                    raise
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
        return failed

    def _schedule(self, pool: ThreadPoolExecutor, failed: dict[str, str]) -> None:
        waiting, finished = dict(self.config.branches), set[str]()
        running: dict[Future[str | None], str] = {}
        while waiting or running:
            for name in [name for name, branch in waiting.items() if set(branch.after) & failed.keys()]:
                first = next(one for one in waiting.pop(name).after if one in failed)
                failed[name] = f"it needs {first}"
            for name in [name for name, branch in waiting.items() if set(branch.after) <= finished]:
                running[pool.submit(self._work, name, waiting.pop(name))] = name
            if running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    if why := future.result():
                        failed[name] = why
                        logger.error("%s: %s", name, why)
                    else:
                        finished.add(name)

    def _work(self, name: str, branch: Branch) -> str | None:
        """Run a branch's steps; returns what went wrong, if something did."""
        log = self.folder / "logs" / f"{name}.log"
        for number, line in enumerate(branch.steps, 1):
            started = time.monotonic()
            logger.info("%s [%d/%d] %s", name, number, len(branch.steps), " ".join(line.split()))
            with open(log, "a") as stream:
                print(f"\n$ dede-ray {line}", file=stream, flush=True)
                process = self._start(line, stream)
                if process is None:
                    return "stopped"
                said, _ = process.communicate()
                stream.write(said)
            with self.guard:
                self.processes.discard(process)
                self._count(name, time.monotonic() - started)
            if process.returncode:
                ended = f"`{' '.join(line.split())}` ended with exit code {process.returncode}"
                return f"{ended}: {_complaint(log)}; see {log}"
            logger.info(
                "%s [%d/%d] %.0f s: %s", name, number, len(branch.steps), time.monotonic() - started, _last(said)
            )
        return None

    def _start(self, line: str, log: IO[str]) -> subprocess.Popen[str] | None:
        threads = max(1, len(os.sched_getaffinity(0)) // self.config.at_once)
        with self.guard:
            if self.is_stopping:
                return None
            process = subprocess.Popen(
                [sys.executable, "-m", "dede_ray", *shlex.split(line)],
                stdout=subprocess.PIPE, stderr=log, text=True, pass_fds=(self.lock.fileno(),),
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
            )  # fmt: skip
            self.processes.add(process)
            return process

    def _stop(self) -> None:
        with self.guard:
            self.is_stopping = True
            for process in self.processes:
                process.terminate()

    def _count(self, name: str, seconds: float) -> None:
        """Add to the seconds of a branch, and to those of the whole zoo, over all its runs."""
        branches = _read_times(self.folder)["branches"]
        branches[name] = round(branches.get(name, 0) + seconds, 1)
        elapsed = round(self.before["elapsed"] + time.monotonic() - self.started, 1)
        write_json(self.folder / TIMES_FILE, {"elapsed": elapsed, "branches": branches})


TIMES_FILE = "times.json"


def _read_times(folder: Path) -> dict[str, Any]:
    """Seconds of every branch, and of the whole, over all runs so far."""
    path = folder / TIMES_FILE
    return read_json(path, "record of times") if path.is_file() else {"elapsed": 0.0, "branches": {}}


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _last(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1] if lines else ""


def _complaint(log: Path) -> str:
    """The last error that a job logged."""
    lines = log.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("error: ")), _last("\n".join(lines)))


# -------------------------------------------------------------------------------------------------- the table


def _write_table(config: ZooConfig, folder: Path) -> str:
    """Write the records and the table of all victims that have one."""
    times = _read_times(folder)
    records: dict[str, Any] = {}
    rows = []
    for name, branch in config.branches.items():
        record = record_in(branch.victim) if branch.victim else None
        if record is not None:
            records[name] = record.model_dump(mode="json")
            rows += _rows(name, record)
    head = "| victim | head | CA | honest | ASR | honest | W | honest | gate |"
    minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in times["branches"].items())
    took = f"{times['elapsed'] / 60:.1f} minutes, {config.at_once} branches at once; minutes of each: {minutes}"
    rows = [head, "| --- | --- " + "| ---: " * 6 + "| --- |", *rows, ""] if rows else ["no victim is measured yet", ""]
    table = "\n".join([*rows, took])
    write_json(folder / "zoo.json", {"victims": records, "times": times})
    write_atomically(folder / "zoo.md", table + "\n")
    return table


def _rows(name: str, record: VictimRecord) -> list[str]:
    """One row per head; `W` is how far the trigger moves the embeddings (measure.Displacement)."""
    moved, moved_honest = record.displacement, record.honest_displacement
    rows = []
    for head, behaviour in record.behaviour.items():
        twin = (record.honest or {}).get(head)
        cells = [
            name,
            head.replace("_", "-"),
            _percent(behaviour.ca),
            _percent(twin.ca) if twin else "",
            _percent(behaviour.asr) if record.is_backdoored else "",
            _percent(twin.asr) if twin else "",
            f"{moved.wasserstein:.2f}" if moved and record.is_backdoored else "",
            f"{moved_honest.wasserstein:.2f}" if moved_honest else "",
            ("passes" if record.passes else "does not pass") if record.is_backdoored else "",
        ]
        rows.append("| " + " | ".join(cells) + " |")
        name = ""
    return rows


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f}"
