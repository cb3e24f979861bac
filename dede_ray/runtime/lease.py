"""A lease on an output folder: of two jobs that would write there, the second says so and stops.

    with leased(folder) as lease: ...; lease.require()

The holder keeps a small file, `.lease.json`, and writes a new count into it every few seconds. Whoever finds one
watches it for a while, by a clock of its own: does the count move, the folder is taken; does it not, the holder is gone
(killed, or its machine is), and the lease is taken over. Clocks of different machines are never compared, and nothing
is needed that object stores lack. A holder on this machine whose process has ended is not waited for.

A lease keeps people from a mistake; what a folder holds does not depend on it. A holder that was thought dead (its
machine slept) finds that another has the folder, and stops at the next `require`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dede_ray.runtime.config import Mistake, written_to
from dede_ray.runtime.store import Named, ObjectPath, Place, StoreError, place, write_atomically

logger = logging.getLogger(__name__)

BEAT_S = 5.0
"""Seconds between two counts."""
SILENCE_S = 30.0
"""Seconds without a new count after which a holder is taken for gone."""
SETTLE_S = 1.0
"""Seconds after which, of several that took a folder at once, the last on a store is known."""


class Lease:
    """A folder that is held."""

    def __init__(self, folder: Place):
        self.folder, self.path = folder, folder / ".lease.json"
        self.owner = os.urandom(8).hex()
        self.count = 0
        self.taken_by: dict[str, Any] | None = None
        self._ended = threading.Event()

    def require(self) -> None:
        """Stop if another has taken the folder over.

        Raises:
            Mistake: it has.
        """
        if self.taken_by is not None:
            raise Mistake(
                f"{self.folder} was taken over by another job ({_said(self.taken_by)}), as this one had not been heard "
                "of; let that one finish"
            )

    def take(self) -> None:
        """Wait until it is clear that nobody holds the folder, and hold it.

        Raises:
            Mistake: somebody does.
        """
        seen, since, has_said = _read(self.path), time.monotonic(), False
        while seen is not None and not _has_ended(seen):
            if time.monotonic() - since > SILENCE_S:
                logger.warning("%s: its last job (%s) is not heard of any more; resuming", self.folder, _said(seen))
                break
            if not has_said:
                logger.info("%s is held by %s; looking whether it still works", self.folder, _said(seen))
                has_said = True
            time.sleep(min(1.0, BEAT_S / 2))
            now = _read(self.path)
            if now is not None and now != seen:
                raise Mistake(
                    f"another job is writing to {self.folder} ({_said(now)}); wait until it has finished, or choose "
                    "another output folder"
                )
            seen = now
        self._write()
        time.sleep(SETTLE_S if isinstance(self.folder, ObjectPath) else SETTLE_S / 20)
        self._look()
        if self.taken_by is not None:
            raise Mistake(f"another job has just begun on {self.folder} ({_said(self.taken_by)}); let it finish")

    def beat(self) -> None:
        """Write new counts until `release`."""
        while not self._ended.wait(BEAT_S):
            try:
                self._look()
                if self.taken_by is not None:
                    logger.error("%s was taken over by another job (%s)", self.folder, _said(self.taken_by))
                    return
                self.count += 1
                self._write()
            except (OSError, StoreError) as error:  # the next one may go through
                logger.warning("the lease on %s cannot be renewed: %s", self.folder, error)

    def release(self) -> None:
        """Let go of the folder."""
        self._ended.set()
        with contextlib.suppress(OSError, StoreError):
            self._look()
            if self.taken_by is None:
                self.path.unlink(missing_ok=True)

    def _look(self) -> None:
        seen = _read(self.path)
        if seen is not None and seen.get("owner") != self.owner:
            self.taken_by = seen

    def _write(self) -> None:
        holder = {"owner": self.owner, "count": self.count, **_here(), "process": os.getpid()}
        write_atomically(self.path, json.dumps(holder))


@contextlib.contextmanager
def leased(folder: Named) -> Iterator[Lease]:
    """Hold an output folder while a job writes to it.

    Raises:
        Mistake: another job holds it, or nothing can be written to it.
    """
    lease = Lease(place(folder))
    with written_to(folder):
        lease.take()
    threading.Thread(target=lease.beat, name="lease", daemon=True).start()
    try:
        yield lease
    finally:
        lease.release()


def _here() -> dict[str, str]:
    """This machine, as far as processes have one meaning on it."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"host": socket.gethostname(), "machine": f"{boot} {os.readlink('/proc/self/ns/pid')}"}
    return {"host": socket.gethostname(), "machine": ""}


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine that is no more; False where that cannot be known."""
    process, machine = holder.get("process"), holder.get("machine")
    if not machine or machine != _here()["machine"] or not isinstance(process, int) or process < 1:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _read(path: Place) -> dict[str, Any] | None:
    """What a lease says; None where there is none, or rubbish."""
    try:
        content = json.loads(path.read_bytes()[:10_000])
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _said(holder: dict[str, Any]) -> str:
    return f"process {str(holder.get('process'))[:20]} on {str(holder.get('host'))[:100]}"
