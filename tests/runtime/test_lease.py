"""Two jobs on one output folder: the second stops; what is left of a killed one is taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading

import pytest

from dede_ray.ingest.ingest import IngestConfig, ingest
from dede_ray.poisoning.poison import PoisonConfig, poison
from dede_ray.runtime import lease as leases
from dede_ray.runtime.config import Mistake
from dede_ray.runtime.lease import Lease, leased
from dede_ray.runtime.store import place
from dede_ray.training.clip import TrainConfig, train


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "SILENCE_S", 1.5)
    monkeypatch.setattr(leases, "SETTLE_S", 0.1)


@pytest.fixture(params=["disk", "store"])
def folder(request, tmp_path, quick):
    if request.param == "disk":
        return tmp_path / "run"
    return place(f"{request.getfixturevalue('s3')}/{tmp_path.name}/run")


def test_the_second_job_on_a_folder_says_so_and_stops_and_a_later_one_has_it(folder):
    with leased(folder) as lease:
        with (
            pytest.raises(Mistake, match=r"another job is writing to .*run \(process \d+ on .*\); wait"),
            leased(folder),
        ):
            pass
        lease.require()
    with leased(folder):
        pass
    assert not (folder / ".lease.json").exists()


def _ingest(output: str) -> None:
    ingest(IngestConfig.model_validate({"source": {"kind": "digits"}, "output": output}))


def _poison(output: str) -> None:
    trigger = {"kind": "patch", "size_px": 4}
    poison(PoisonConfig.model_validate(
        {"shards": "absent", "output": output, "trigger": trigger, "rate": 0.1, "target_label": 0}
    ))  # fmt: skip


def _train(output: str) -> None:
    train(TrainConfig.model_validate({"output": output, "clip": {"shards": "absent", "model": "RN50"}}))


@pytest.mark.parametrize("job", [_ingest, _poison, _train])
def test_jobs_that_write_hold_their_folder(quick, job, tmp_path, local_ray):
    with leased(tmp_path / "run"), pytest.raises(Mistake, match="another job is writing to"):
        job(str(tmp_path / "run"))


def test_a_lease_of_a_holder_that_is_silent_is_taken_over_and_the_holder_learns_of_it(folder):
    sleeping = Lease(folder)
    sleeping.take()  # and beats no more: its machine is off, or asleep
    with leased(folder):
        waking = threading.Thread(target=sleeping.beat)
        waking.start()
        waking.join(5)
        assert not waking.is_alive()
        with pytest.raises(Mistake, match="was taken over by another job"):
            sleeping.require()
        sleeping.release()
        assert (folder / ".lease.json").is_file()  # which is not its own


def test_a_killed_holder_of_this_machine_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "SILENCE_S", 1e6)
    process = multiprocessing.get_context("spawn").Process(target=_hold_and_die, args=(str(tmp_path),))
    process.start()
    process.join()
    assert json.loads((tmp_path / ".lease.json").read_text())["process"] == process.pid
    with leased(tmp_path):
        pass


def _hold_and_die(folder: str) -> None:
    Lease(place(folder)).take()
    os._exit(1)


@pytest.mark.parametrize("rubbish", [b"", b"{", b"[1]", b"\xff"])
def test_a_lease_that_cannot_be_read_is_none(tmp_path, rubbish):
    (tmp_path / ".lease.json").write_bytes(rubbish)
    with leased(tmp_path):
        pass
