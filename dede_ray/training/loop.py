"""The training loop: Ray Train places workers and restarts them, DeepSpeed owns optimiser, precision and ZeRO.

`fit(run)` takes one complete description of a run to its end, or resumes it where it was killed. Batches are a
function of the step (dataloader.py), so is all randomness, and checkpoints hold the rest; hence a run that loses a
worker, its driver, its controller or a node ends with the weights of an undisturbed one, bit for bit while the number
of workers stays, up to rounding where it changes. That holds on machines of one kind: another type of CPU or GPU,
number of threads or version of a library rounds otherwise, and training multiplies the difference.

A trainer brings three things: settings (`TrainingSettings`, with its own beside them), a `Recipe` (what is trained, and
on what), and the order of its samples (`dataloader.Plan`). Together they are a `Run`.

The run's folder gets `metrics.jsonl` and `validation.jsonl` (one JSON object per logged step), `curve.png`,
`checkpoints/` (what resuming needs; DeepSpeed writes pickles, so keep it to yourself) and what the recipe exports.

Four numbers of `metrics.jsonl` are about speed: `samples_per_s`, with everything; `input_wait_share`, the share of that
time spent waiting for samples; `step_s`, the mean step once its batch is there; `utilisation`, the share of those
seconds that the step's arithmetic would take if rank 0's device did it as fast as it multiplies matrices in the same
precision.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import ray
import torch
from pyarrow import fs
from pydantic import Field
from ray.exceptions import RayActorError
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from torch import nn

from dede_ray.data.shards import Limits, Sample
from dede_ray.runtime.config import Config, Mistake, read_json, write_atomically, write_json
from dede_ray.runtime.store import Place, filesystem_of, place
from dede_ray.training import dataloader
from dede_ray.training.flops import flop_per_sample, matmul_rate
from dede_ray.training.objective import Objective, backward
from dede_ray.training.optimiser import Optimisation
from dede_ray.training.tracking import Follower, Tracking, draw_curve

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
S = TypeVar("S", bound="TrainingSettings")


class Workers(Config):
    """On what training runs, and how it is spread and saved. Changing it does not make it another run."""

    num_workers: int = Field(1, ge=1)
    """Data-parallel workers; must divide `lanes`."""
    min_workers: int | None = Field(None, ge=1)
    """Continue with as few as this many when nodes are lost, and grow back when they return; None waits for all."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs each worker reserves; the rest is free for reading and decoding."""
    threads_per_worker: int | None = Field(None, ge=1)
    """Threads of a worker's arithmetic; None takes the machine's cores divided by the workers on it."""
    gpus_per_worker: float = Field(0, ge=0)
    readers: int = Field(2, ge=1)
    """Windows of samples that each worker has read and decoded at once."""
    read_cpus: float = Field(1, gt=0)
    """CPUs that each reader reserves."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO. CLIP at scale needs it; the decoder's 7 M parameters do not."""
    offload: Literal["none", "optimiser", "all"] = "none"
    """Keep the optimiser's state (ZeRO 1 to 3), or parameters too (ZeRO 3), in the machine's memory."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints; a restart repeats what came after the last one."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints that are kept, the latest ones."""
    storage_path: str | None = None
    """Where checkpoints go: a shared folder or s3://, gs://; each run takes a folder of its own there, named by its
    settings. None is the run's own folder."""
    max_failures: int = Field(3, ge=0)
    """Failures that a run survives, each time from the last checkpoint; preemptions announced are not counted."""
    resize_check_s: float = Field(60, gt=0)
    """Seconds between looks whether an elastic run can grow."""


class TrainingSettings(Config):
    """Settings that all trainers share."""

    output: str
    """Folder for what is trained."""
    precision: Precision = "fp32"
    """Arithmetic of training; with bf16 and fp16 the weights stay float32 (torch's autocast)."""
    lanes: int = Field(8, ge=1)
    """Parts that a global batch is cut into; fixes which sample is in which batch (see dataloader.py)."""
    log_every: int = Field(20, ge=1)
    """Steps between lines of metrics.jsonl."""
    seed: int = Field(0, ge=0)
    limits: Limits = Limits()
    max_error_fraction: float = Field(0.1, ge=0, le=1)
    """Stop when more than this share of the samples cannot be used."""
    workers: Workers = Workers()
    tracking: Tracking = Tracking()

    def identity(self: S, **changes: Any) -> S:
        """The settings that make a run what it is: not where it runs, nor where it can be watched."""
        return self.model_copy(update={"workers": Workers(), "tracking": Tracking(), **changes})

    def plan(
        self,
        index: list[dataloader.ChunkRef],
        batch_size: int,
        epochs: float,
        shuffle_buffer: int = 4096,
        shuffle: bool = True,
        weights: list[float] | None = None,
    ) -> dataloader.Plan:
        """The order in which a run sees the samples of these chunks, windows of `shuffle_buffer` mixed."""
        steps_per_window = max(1, shuffle_buffer // batch_size)
        return dataloader.Plan(index, batch_size, self.lanes, self.seed, shuffle, steps_per_window, epochs, weights)


class Recipe(ABC):
    """What a run trains, and on what: the part that trainers do not share. Travels to the workers."""

    @abstractmethod
    def objective(self, rank: int, world: int) -> Objective:
        """What is trained, with its initial weights."""

    @abstractmethod
    def decode(self, ref: dataloader.ChunkRef, epoch: int, start: int, samples: list[Sample]) -> dataloader.Decoded:
        """Samples to columns; see `dataloader.Decode`."""

    def reader(self) -> dataloader.Decode:
        """`decode` without what read tasks do not need: every one of them gets a copy."""
        return self.decode

    @abstractmethod
    def export(self, folder: Path, objective: Any) -> dict[str, Any]:
        """Rank 0, at the end: write what other jobs read."""

    def validate(self, objective: Any, device: torch.device, rank: int, world: int) -> dict[str, float]:
        """Collective: how good is it so far."""
        return {}

    def lr_scale(self, step: int) -> float:
        """What the schedule's learning rate of a step is multiplied with."""
        return 1.0


@dataclass(frozen=True)
class Run:
    """One complete description of a training run, as the workers get it."""

    settings: TrainingSettings
    recipe: Recipe
    optimisation: Optimisation
    plan: dataloader.Plan
    folder: Path
    accumulation: int = 1
    validate_every: int | None = None
    """Steps between validations; 0 validates at the end only, None never."""
    flop_per_sample: float = math.nan
    """Arithmetic of a sample's forward and backward pass; `fit` counts it."""

    @property
    def workers(self) -> Workers:
        return self.settings.workers

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return self.optimisation.rate(step, self.plan.num_steps) * self.recipe.lr_scale(step)


def check_workers(run_lanes: int, batch_size: int, accumulation: int, workers: Workers) -> None:
    """Settings that do not divide are found here, before anything is computed.

    Raises:
        Mistake: which number does not divide which, and one that would.
    """
    most, least = workers.num_workers, workers.min_workers or workers.num_workers
    if least > most:
        raise Mistake(f"workers.min_workers {least} is more than workers.num_workers {most}")
    if batch_size < most:
        raise Mistake(f"batch_size {batch_size} is smaller than workers.num_workers {most}: not one sample for each")
    for world in range(least, most + 1):
        if run_lanes % world:
            fitting = math.lcm(*range(least, most + 1))
            raise Mistake(
                f"lanes {run_lanes} must be a multiple of workers.num_workers {world}; set lanes to {fitting} (or a "
                f"multiple) and batch_size to a multiple of it"
            )
        if batch_size // world % accumulation:
            raise Mistake(
                f"each of {world} workers has {batch_size // world} samples of a batch, which accumulation "
                f"{accumulation} does not divide"
            )


# ------------------------------------------------------------------------------------------------ the driver's side


def fit(run: Run) -> dict[str, Any]:
    """Train to the end; resumes from the last checkpoint of the run's folder. Ray must be running.

    Returns:
        loss: mean of the last logged steps; steps; num_samples; samples: see `dataloader.Seen.report`; export: what the
        recipe's export returned; validation: the last one, if there was one.

    Raises:
        Mistake: settings or data that do not fit, a loss that is not finite.
    """
    about, workers = run.settings.model_dump(mode="json"), _fitted(run.workers)
    environment = {"OMP_NUM_THREADS": str(workers.threads_per_worker)}
    if not workers.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"  # before deepspeed is imported; its backend is then gloo
    run.folder.mkdir(parents=True, exist_ok=True)
    _mistake_file(run.folder).unlink(missing_ok=True)
    settings = run.settings.model_copy(update={"workers": workers})
    run = replace(run, settings=settings, flop_per_sample=_flop_per_sample(run))
    filesystem, storage = filesystem_of(_stored_in(run))
    num_workers: Any = (workers.min_workers, workers.num_workers) if workers.min_workers else workers.num_workers
    resources = {"CPU": workers.cpus_per_worker} | ({"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {})
    elastic: Any = {"elastic_resize_monitor_interval_s": workers.resize_check_s} if workers.min_workers else {}

    def train() -> dict[str, Any]:
        trainer = TorchTrainer(
            functools.partial(_train_loop, run),  # type: ignore[arg-type]  # Ray's hint forgets return values
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=workers.gpus_per_worker > 0,
                resources_per_worker=resources,
                **elastic,
            ),
            torch_config=TorchConfig(backend="nccl" if workers.gpus_per_worker else "gloo"),
            run_config=RunConfig(  # type: ignore[call-arg]  # typed as the former RunConfig
                name="checkpoints",
                storage_path=storage,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=workers.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=workers.keep_checkpoints),
                worker_runtime_env={"env_vars": environment},
            ),
        )
        return trainer.fit().return_value  # type: ignore[attr-defined]

    logger.info("%s: %d steps", run.folder.name, run.plan.num_steps)
    _sweep(filesystem, f"{storage}/checkpoints")
    with Follower(run.folder, settings.tracking, about, _Progress(run)):
        outcome = _persist(train, run)
    draw_curve(run.folder)
    if "mistake" in outcome:
        raise Mistake(outcome["mistake"])
    return {**outcome, "num_samples": run.plan.num_samples, "steps": run.plan.num_steps}


def _flop_per_sample(run: Run) -> float:
    ref = run.plan.index[0]
    columns, _ = run.recipe.decode(ref, 0, 0, dataloader.read_samples(ref, 0, 1, run.settings.limits))
    batch = {**columns, "place": np.zeros(0, np.int64)}  # which the data loader adds
    return flop_per_sample(
        lambda: run.recipe.objective(0, 1), {name: batch[name] for name in batch.keys() - _FOR_THE_HOST}
    )


def _stored_in(run: Run) -> Place:
    """Folder of the run's checkpoints: its own, or one in the storage that runs share."""
    if run.workers.storage_path is None:
        return run.folder
    record = run.folder / "run.json"
    settings = json.dumps(read_json(record, "record of a run")["settings"]) if record.is_file() else ""
    own = hashlib.sha256(settings.encode()).hexdigest()[:8]
    return place(run.workers.storage_path) / f"{run.folder.parent.name}-{run.folder.name}-{own}"


def _sweep(filesystem: fs.FileSystem, folder: str) -> None:
    """Remove what a killed run left half uploaded: checkpoints that Ray's own record of them does not name."""
    record, known = f"{folder}/checkpoint_manager_snapshot.json", set()
    try:
        with filesystem.open_input_stream(record) as stream:
            known = {result["checkpoint_dir_name"] for result in json.loads(stream.read())["checkpoint_results"]}
    except FileNotFoundError:
        pass
    except ValueError:  # killed while Ray wrote it, which it does in place
        logger.warning("%s is damaged; the run starts afresh", record)
        filesystem.delete_file(record)
    for found in filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
        if found.base_name.startswith("checkpoint_2") and found.base_name not in known:
            filesystem.delete_dir(found.path)


def _persist(train: Any, run: Run) -> dict[str, Any]:
    """Run `train` until it ends: Ray Train restarts workers, but nothing restarts its own controller."""
    failures, reached, others = 0, -1, _reserved()
    while True:
        try:
            return train()
        except (RayActorError, TrainingFailedError) as error:
            # Ray Train gives up for good over an error of its own, say a worker that was killed for memory and that it
            # cannot stop properly. That is no failure of the run.
            if not isinstance(error, RayActorError | ControllerError) or _mistake_behind(error):
                raise _mistake_behind(error) or error from None
            last = _last_step(run.folder)
            failures = failures + 1 if last <= reached else 0
            reached = max(last, reached)
            if failures > run.workers.max_failures:
                raise
            logger.warning("%s: Ray Train's controller failed; resuming from the last checkpoint", run.folder.name)
            # What it had reserved stays reserved while this driver lives: Ray Train's own helper for this asks Ray's
            # dashboard, which a small Ray does not run.
            for group in _reserved() - others:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def _reserved() -> set[str]:
    """Placement groups of this driver that hold, or wait for, something; the last four bytes of a name are the job."""
    own = ray.get_runtime_context().get_job_id()
    table = placement_group_table().items()
    return {name for name, group in table if name.endswith(own) and group["state"] != "REMOVED"}


def _last_step(folder: Path) -> int:
    try:
        return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return -1


def _fitted(workers: Workers) -> Workers:
    """The workers as this cluster can have them; one without any CPU so far grows, and is asked for what it lacks."""
    threads = workers.threads_per_worker or max(1, (os.cpu_count() or 1) // workers.num_workers)
    workers = workers.model_copy(update={"threads_per_worker": threads})
    cpus, least = ray.cluster_resources().get("CPU", 0), workers.min_workers or workers.num_workers
    if _grows():
        return workers
    if cpus < 2 and workers.num_workers == 1:  # a single CPU is shared by the worker and its reader
        return workers.model_copy(update={"cpus_per_worker": 0.5, "read_cpus": 0.5})
    if cpus < least * workers.cpus_per_worker + workers.read_cpus:
        raise Mistake(
            f"workers: {least} workers with {workers.cpus_per_worker:g} CPUs each and a reader with "
            f"{workers.read_cpus:g} do not fit into the cluster's {cpus:g} CPUs"
        )
    return workers


def _grows() -> bool:
    """A head that has no CPUs hands all work to machines that come when they are asked for."""
    return any(
        node["Alive"] and "node:__internal_head__" in node["Resources"] and not node["Resources"].get("CPU")
        for node in ray.nodes()
    )


class _Progress:
    """Logs a line now and then: step, loss, samples/s, time left."""

    def __init__(self, run: Run):
        self.name, self.num_steps = run.folder.name, run.plan.num_steps

    def __call__(self, last: dict[str, Any]) -> None:
        if "samples_per_s" not in last:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "step")
            logger.info("%s: after step %d: %s", self.name, last["step"] + 1, numbers)
            return
        done = last["step"] + 1
        left_s = (self.num_steps - done) * last["samples_seen"] / done / last["samples_per_s"]
        logger.info(
            "%s: step %d/%d, loss %.4f, %s samples/s, waiting for input %.0f %%, %.3g s a step, utilisation %.0f %%, "
            "%s left",
            self.name, done, self.num_steps, last["loss"], f"{last['samples_per_s']:,.0f}",
            100 * last["input_wait_share"], last["step_s"], 100 * last["utilisation"],
            f"{left_s / 60:.1f} min" if left_s > 90 else f"{left_s:.0f} s",
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ mistakes


def _mistake_file(folder: Path) -> Path:
    """Where a worker leaves a person's mistake that only it could find; the restarted workers then end in order."""
    return folder / "mistake.json"


def _mistake_behind(error: BaseException | None) -> Mistake | None:
    """The mistake that an exception of Ray's wraps, at any depth."""
    if error is None or isinstance(error, Mistake):
        # Ray Data adds advice of its own to what a reader raised.
        return Mistake(str(getattr(error, "cause", error)).split("\nFailed to apply UDF")[0]) if error else None
    inner = [*getattr(error, "worker_failures", {}).values(), getattr(error, "cause", None), error.__cause__]
    return next((found for found in map(_mistake_behind, inner) if found), None)


# ------------------------------------------------------------------------------------------------ the workers' side


def _train_loop(run: Run) -> dict[str, Any]:
    """Runs in every worker. Rank 0's return value is the result."""
    if _mistake_file(run.folder).is_file():
        return read_json(_mistake_file(run.folder), "note of a mistake")
    try:
        return _train(run)
    except Exception as error:
        mistake = _mistake_behind(error)
        if mistake:
            write_json(_mistake_file(run.folder), {"mistake": str(mistake)})
        raise


def _train(run: Run) -> dict[str, Any]:
    """Batches in, optimiser steps, checkpoints out."""
    import deepspeed

    # Its one C++ operator on CPU serves inference; without this line every machine would need a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    settings, context = run.settings, ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(run.workers.threads_per_worker or 1)
    torch.manual_seed(settings.seed)
    deepspeed.init_distributed()
    objective = run.recipe.objective(rank, world)
    checkpoint = _Checkpoints(run, rank, world)
    engine, optimiser, *_ = deepspeed.initialize(
        model=objective,
        optimizer=run.optimisation.build(objective),
        config={**_deepspeed_config(run, world), **checkpoint.deepspeed_config()},
    )
    if run.workers.zero_stage == 0:
        engine.enable_backward_allreduce = world > 1  # a single worker would copy its gradients about for nothing
        if sum(isinstance(module, nn.Conv2d) for module in engine.module.modules()) > 1:
            engine.module.to(memory_format=torch.channels_last)  # faster; the other stages' flat buffers forbid it
    seen = dataloader.Seen(run.plan.num_samples)
    first_step = checkpoint.restore(engine, seen)
    num_steps = run.plan.num_steps
    outcome: dict[str, Any] = {"loss": math.nan}
    log = _MetricsLog(run, world, first_step, engine.device) if rank == 0 else None
    look = _Lookout(rank, world)
    rows = dataloader.batches(
        run.plan, first_step, rank, world, settings.limits, run.recipe.reader(), run.workers.read_cpus,
        run.workers.readers,
    )  # fmt: skip
    waited = time.monotonic()
    for step, columns in rows:
        got = time.monotonic()
        engine.module.begin_step(step)
        # All randomness of a step, dropout say, follows from seed, step, rank and micro-batch: resuming repeats it.
        loss, metrics = backward(
            engine,
            {name: _to_device(columns[name], engine.device) for name in columns.keys() - _FOR_THE_HOST},
            run.accumulation,
            functools.partial(_reseed, settings.seed, step, rank),
        )
        mean, is_time = look.agree(loss)
        if not math.isfinite(mean):
            return {"mistake": _non_finite(run, step, loss, columns, rank, world)}
        for group in optimiser.param_groups:
            group["lr"] = run.rate(step)
        engine.step()
        norm = engine.get_global_grad_norm()
        if settings.precision != "fp16" and norm is not None and not math.isfinite(norm):  # fp16 leaves such steps out
            return {"mistake": _non_finite(run, step, torch.tensor(float(norm)), columns, rank, world, "gradient")}
        engine.module.after_step()
        seen.add(columns)
        if log is not None:
            metrics = metrics if norm is None else {**metrics, "gradient_norm": norm}
            log.step(step, mean, metrics, columns, got - waited, time.monotonic() - got)
            _refuse_too_many_unusable(run, seen)
            outcome["loss"] = log.loss
        done, is_last = step + 1, step + 1 == num_steps
        if run.validate_every is not None and (is_last or (run.validate_every and done % run.validate_every == 0)):
            outcome["validation"] = run.recipe.validate(engine.module, engine.device, rank, world)
            if log is not None:
                log.validation(step, outcome["validation"])
        if (done % run.workers.checkpoint_every == 0 or (is_time and look.preemption())) and not is_last:
            checkpoint.save(engine, seen, done)
        waited = time.monotonic()
    seen.fold(rank, world, run.plan.open_epoch(num_steps))
    outcome["export"] = _export(engine, run, rank)
    ray.train.get_all_reported_checkpoints()  # waits for what is still being uploaded
    return {**outcome, "samples": seen.report()}


def _reseed(seed: int, step: int, rank: int, piece: int) -> None:
    torch.manual_seed(hash((seed, step, rank, piece)))


_FOR_THE_HOST = {"sample_id", "unusable", "is_truncated"}


def _to_device(column: Any, device: torch.device) -> torch.Tensor:
    """Copy what Ray's object store lends for reading only; through pinned memory to a GPU."""
    if device.type == "cpu":
        return torch.from_numpy(column.copy())
    return torch.from_numpy(column.copy()).pin_memory().to(device, non_blocking=True)


def _deepspeed_config(run: Run, world: int) -> dict[str, Any]:
    stage, offload = run.workers.zero_stage, run.workers.offload
    zero: dict[str, Any] = {"stage": stage}
    if offload != "none" and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": run.workers.gpus_per_worker > 0}
    if offload == "all" and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": run.workers.gpus_per_worker > 0}
    return {
        "train_batch_size": run.plan.batch_size,
        "train_micro_batch_size_per_gpu": run.plan.batch_size // world // run.accumulation,
        "gradient_accumulation_steps": run.accumulation,
        "gradient_clipping": run.optimisation.clip_norm,  # written out: DeepSpeed's own default is 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused one needs no compiler
        # Weights and sums stay float32, as with open_clip's amp. DeepSpeed's own 16-bit modes would round the weights,
        # and at stage 0 begin with a step that no gradient asked for.
        "torch_autocast": {
            "enabled": run.settings.precision != "fp32",
            "dtype": {"bf16": "bfloat16", "fp16": "float16"}.get(run.settings.precision, "bfloat16"),
        },
        "steps_per_print": 10**9,
    }


class _Lookout:
    """One small all-reduce per step: is the loss finite everywhere, and is it time to ask about preemption?"""

    def __init__(self, rank: int, world: int, every_s: float = 1.0):
        self.rank, self.world, self.every_s = rank, world, every_s
        self.looked, self.saved = time.monotonic(), False

    def agree(self, loss: torch.Tensor) -> tuple[float, bool]:
        """The mean loss of the workers, and whether rank 0's clock says that it is time."""
        is_time = self.rank == 0 and time.monotonic() - self.looked > self.every_s
        both = torch.stack([loss.detach().float(), torch.tensor(float(is_time), device=loss.device)])
        if self.world > 1:
            torch.distributed.all_reduce(both)
        total, times = both.tolist()
        if times > 0:
            self.looked = time.monotonic()
        return total / self.world, times > 0

    def preemption(self) -> bool:
        """Collective: is a node about to be taken away, and nothing been saved since? Then save, and train on."""
        if self.saved or ray.train.get_preemption_info() is None:
            return False
        self.saved = True
        return True


class _Checkpoints:
    """Saving, and resuming from what was saved, at this or another number of workers."""

    def __init__(self, run: Run, rank: int, world: int):
        self.run, self.rank, self.world = run, rank, world
        # Node-local, one per run: what a killed worker left behind is swept up by its successor.
        own = hashlib.sha256(str(run.folder).encode()).hexdigest()[:16]
        self.scratch = Path(tempfile.gettempdir()) / f"dede_ray-{own}"
        shutil.rmtree(self.scratch / f"rank{rank}", ignore_errors=True)
        self.latest = ray.train.get_checkpoint()
        self.meta: dict[str, Any] = {}
        if self.latest is not None:
            with self.latest.filesystem.open_input_stream(f"{self.latest.path}/meta.json") as stream:
                self.meta = json.loads(stream.read())
            for name, here in (("zero_stage", run.workers.zero_stage), ("precision", run.settings.precision)):
                if self.meta[name] != here:
                    raise Mistake(
                        f"the checkpoint was written with {name} {self.meta[name]}, this run has {here}; resume with "
                        f"{self.meta[name]}, or start afresh in another output folder"
                    )

    @property
    def _is_split(self) -> bool:
        """Does each worker's part of the checkpoint depend on how many workers wrote it?"""
        return self.run.workers.zero_stage > 0 and bool(self.meta) and self.meta["world"] != self.world

    def deepspeed_config(self) -> dict[str, Any]:
        return {"checkpoint": {"load_universal": True}} if self._is_split else {}

    def restore(self, engine: Any, seen: dataloader.Seen) -> int:
        """Load the last checkpoint, if there is one; returns the next step."""
        if self.latest is None:
            return 0
        with self.latest.as_directory() as folder:
            source = Path(folder) / "engine"
            if self._is_split:
                with self._universal(source, Path(folder).name) as converted, _kept_apart(engine.optimizer):
                    engine.load_checkpoint(str(converted), tag="state")
            else:
                engine.load_checkpoint(str(source), tag="state")
            if self.rank == 0:
                seen.load(Path(folder) / "seen.npz")
            arrays = Path(folder) / "arrays.npz"
            if arrays.is_file():
                with np.load(arrays, allow_pickle=False) as stored:
                    engine.module.load_arrays({name: stored[name] for name in stored.files})
        return self.meta["step"]

    @contextmanager
    def _universal(self, source: Path, name: str) -> Iterator[Path]:
        """DeepSpeed's form that any number of workers can load, made once per node."""
        from deepspeed.checkpoint import ds_to_universal

        target = self.scratch / f"universal-{name}-{os.environ.get('MASTER_PORT', '')}"
        if ray.train.get_context().get_local_rank() == 0:
            ds_to_universal.main(
                Namespace(
                    input_folder=f"{source}/state", output_folder=f"{target}/state", num_extract_workers=1,
                    num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
                )  # its process pools hang inside a Ray worker, hence 1
            )  # fmt: skip
        torch.distributed.barrier()
        yield target
        torch.distributed.barrier()
        if ray.train.get_context().get_local_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)

    def save(self, engine: Any, seen: dataloader.Seen, step: int) -> None:
        """Collective: every rank saves and reports; Ray Train uploads, and commits when all have arrived."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        folder = self.scratch / f"rank{self.rank}" / str(step)
        folder.mkdir(parents=True)
        engine.save_checkpoint(f"{folder}/engine", tag="state")
        seen.fold(self.rank, self.world, self.run.plan.open_epoch(step))
        if self.rank == 0:
            meta = {"step": step, "world": self.world, "zero_stage": self.run.workers.zero_stage}
            (folder / "meta.json").write_text(json.dumps({**meta, "precision": self.run.settings.precision}))
            seen.save(folder / "seen.npz")
            if arrays := engine.module.arrays():
                np.savez(folder / "arrays.npz", **arrays)
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,  # Ray deletes the folder afterwards
        )


@contextmanager
def _kept_apart(optimiser: Any) -> Iterator[None]:
    """ZeRO 3's universal loading gives all groups the first one's settings, and all parameters one counter of steps."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimiser.param_groups]
    yield
    for group, own in zip(optimiser.param_groups, settings, strict=True):
        group.update(own)
    for state in optimiser.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _non_finite(
    run: Run, step: int, loss: torch.Tensor, columns: dataloader.Columns, rank: int, world: int, what: str = "loss"
) -> str:
    """Name the samples of all ranks whose loss, or gradient, is not finite; called by every rank."""
    mine = (float(loss), [name.decode() for name in columns["sample_id"].tolist()])
    everyone: list[Any] = [mine] * world
    if world > 1:
        torch.distributed.all_gather_object(everyone, mine)
    bad = [(value, ids) for value, ids in everyone if not math.isfinite(value)]
    path, ids = run.folder / f"non_finite_step_{step}.json", [name for _, names in bad for name in names]
    if rank == 0:
        write_json(path, {"step": step, "sample_ids": ids})
    return (
        f"the {what} of step {step} is {bad[0][0]}; stopped {'before' if what == 'loss' else 'at'} the step. The batch "
        f"began with {ids[:3]}, all its sample ids are in {path}. Lower learning_rate, or train in fp32"
    )


def _refuse_too_many_unusable(run: Run, seen: dataloader.Seen) -> None:
    """Raise when too many samples cannot be used, judged by rank 0's share."""
    unusable = Counter({key: n for key, n in seen.unusable.items() if key[1] not in dataloader.SET_ASIDE})
    bad, used = sum(unusable.values()), seen.counts["samples"]
    used = max(used, run.plan.batch_size * min(run.plan.steps_per_window, run.plan.num_steps))  # a window's at once
    most = run.settings.max_error_fraction
    if bad > most * used:
        raise Mistake(
            f"{bad:,} of the first {used:,} samples cannot be used ({dataloader.in_words(unusable)}), more than "
            f"max_error_fraction {most:g} allows; repair the shards or raise it"
        )


def _export(engine: Any, run: Run, rank: int) -> dict[str, Any]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=run.workers.zero_stage == 3):
        if rank == 0:
            return run.recipe.export(run.folder, engine.module)
    return {}


class _MetricsLog:
    """Rank 0's metrics.jsonl and validation.jsonl; steps done again replace what they wrote."""

    def __init__(self, run: Run, world: int, first_step: int, device: torch.device):
        self.run, self.world, self.loss = run, world, math.nan
        # What this worker's share of a step would take if all of it were matrix products.
        flop = run.flop_per_sample * run.plan.batch_size / world
        self.least_s = flop / matmul_rate(device, run.settings.precision)
        for name in ("metrics.jsonl", "validation.jsonl"):
            path = run.folder / name
            lines = path.read_text().splitlines() if first_step and path.is_file() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < first_step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
        self._reset()

    def _reset(self) -> None:
        self.losses: list[float] = []
        self.since, self.wait_s, self.step_s, self.unusable = time.monotonic(), 0.0, 0.0, 0

    def step(
        self, step: int, loss: float, metrics: dict[str, Any], columns: dataloader.Columns, wait_s: float, step_s: float
    ) -> None:
        self.losses.append(loss)
        self.wait_s += wait_s
        self.step_s += step_s
        self.unusable += sum(n for _, _, n in json.loads(columns["unusable"].tobytes()))
        if (step + 1) % self.run.settings.log_every and step + 1 != self.run.plan.num_steps:
            return
        elapsed = time.monotonic() - self.since
        self.loss = math.fsum(self.losses) / len(self.losses)
        self._write("metrics.jsonl", {
            "step": step,
            "loss": self.loss,
            "learning_rate": self.run.rate(step),
            "samples_per_s": len(self.losses) * self.run.plan.batch_size / elapsed,
            "input_wait_share": self.wait_s / elapsed,
            "step_s": self.step_s / len(self.losses),
            "utilisation": self.least_s * len(self.losses) / self.step_s,
            "num_workers": self.world,
            "num_unusable": self.unusable,
            "samples_seen": (step + 1) * self.run.plan.batch_size,
            **{name: float(value) for name, value in metrics.items()},
        })  # fmt: skip
        self._reset()

    def validation(self, step: int, results: dict[str, float]) -> None:
        self._write("validation.jsonl", {"step": step, **results})
        self.since += results.get("validation_s", 0.0)  # throughput is that of training

    def _write(self, name: str, line: dict[str, Any]) -> None:
        with (self.run.folder / name).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
