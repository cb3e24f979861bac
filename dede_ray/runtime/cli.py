"""The command line: `dede-ray <job> <config.yaml> [--setting value ...]`, and several jobs in a row.

Every job is named here by the place of its settings and of its function, and imported only when it runs: the list of
jobs appears at once, and this room needs none of those above it. `python -m dede_ray` and the files in jobs/ are the
same command.

A step is such a command line without `dede-ray`: `score configs/digits/score.yaml --decision.q 0.05`. Steps meet in
files, and each does only what its output folder still lacks, so a row of them can be stopped and run again.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import shlex
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_origin

import tyro
from pydantic import Field, create_model

from dede_ray.runtime.config import Config, Mistake, load, override, read_yaml
from dede_ray.runtime.standins import lighten
from dede_ray.runtime.store import StoreError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One entry of the command line."""

    line: str
    """What it does, for `dede-ray --help`."""
    module: str
    """Where its settings class and the one function that does the work are, below dede_ray."""
    settings: str
    function: str
    default: str | None = None
    """Config of a job that is started without one."""

    def settings_class(self) -> type[Config]:
        return self._find(self.settings)

    def run(self, settings: Config) -> str:
        """Do the work; returns what the job says at its end."""
        return str(self._find(self.function)(settings))

    def _find(self, name: str) -> Any:
        return getattr(importlib.import_module(f"dede_ray.{self.module}"), name)


DEMO, SMOKE = "configs/digits/demo.yaml", "configs/smoke.yaml"
GROUPS: dict[str, dict[str, Job]] = {
    "start here": {
        "demo": Job("handwritten digits, no download: poison, train, score, evaluate, a page to look at",
                    "runtime.cli", "Steps", "run_steps", DEMO),
    },
    "data": {
        "ingest": Job("a source of images -> captioned WebDataset shards", "ingest.ingest", "IngestConfig", "run"),
        "check": Job("what is odd about shards, before somebody trains or scores on them",
                     "ingest.check", "CheckConfig", "check"),
    },
    "train": {
        "train_clip": Job("CLIP on image-caption shards, then the DeDe decoder against it (or against any victim)",
                          "training.clip", "TrainConfig", "train", SMOKE),
        "train_simclr": Job("an image encoder without text by SimCLR, then the decoder against it",
                            "training.simclr", "SimclrConfig", "train"),
    },
    "scan": {
        "score": Job("shards x victim x detectors -> a manifest of suspected samples",
                     "scan.score", "ScoreConfig", "score", SMOKE),
        "sift": Job("shards without the samples that a manifest flags, and exclusion lists",
                    "scan.sift", "SiftConfig", "sift"),
        "decree": Job("is this encoder backdoored? the smallest stamp that makes all images look alike to it",
                      "detectors.decree", "DecreeConfig", "run"),
    },
    "attack (for research on defences)": {
        "poison": Job("clean shards -> poisoned shards and the truth about them",
                      "poisoning.poison", "PoisonConfig", "poison"),
        "attack": Job("a clean encoder -> a tampered one: BadEncoder, DRUPE, CLIP text-on-pair, BadCLIP",
                      "tampering.attack", "AttackConfig", "attack"),
        "zoo": Job("every attack: jobs side by side, each victim with its honest twin",
                   "evaluation.zoo", "ZooConfig", "build_zoo"),
    },
    "evaluate": {
        "measure": Job("does the backdoor work? clean accuracy and attack success rate beside an honest twin",
                       "evaluation.measure", "MeasureConfig", "measure_victim"),
        "evaluate": Job("a manifest against the truth: numbers, a table, figures, a page",
                        "evaluation.evaluate", "EvaluateConfig", "evaluate"),
        "benchmark": Job("attack x victim x detector over several seeds, every number beside its controls",
                         "evaluation.benchmark", "BenchmarkConfig", "benchmark"),
    },
}  # fmt: skip
JOBS: dict[str, Job] = {name: job for group in GROUPS.values() for name, job in group.items()}


# ------------------------------------------------------------------------------------------------ one job


def main(job: str | None = None) -> None:
    """Run the job that the command line names, or the given one.

    Prints what the job says at its end. A `Mistake` ends the process with its message and exit code 2; anything else is
    a bug of ours and keeps its traceback.

    Args:
        job: whose door this is (jobs/<job>.py); None takes the first argument.
    """
    program, arguments = f"python {sys.argv[0]}", sys.argv[1:]
    if job is None:
        if not arguments or arguments[0] in {"-h", "--help"}:
            print(_overview())
            return
        job, *arguments = arguments
        program = f"dede-ray {job}"
    if job not in JOBS:
        near = difflib.get_close_matches(job, JOBS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(JOBS)}"
        sys.exit(_one_message(Mistake(f"no job is called {job!r}; {hint} (see dede-ray --help)")))
    if arguments and arguments[0] in {"-h", "--help"}:
        lighten()
    run_job(JOBS[job].settings_class(), lambda settings: _run(job, settings), program, arguments, JOBS[job].default)


def _run(name: str, settings: Config) -> str:
    """Run a job; given the steps of a demo, run that demo up to this job."""
    if isinstance(settings, Steps) and name != "demo":
        return run_steps(settings, until=name)
    return JOBS[name].run(settings)


def run_job(
    kind: type[Config],
    function: Callable[[Any], Any],
    program: str,
    arguments: list[str],
    default: str | Config | None = None,
) -> None:
    """Read a job's settings, run it and print what it returns.

    Args:
        kind: the job's settings class; a config that holds `steps:` is read as `Steps` instead.
        function: does the work.
        program: what a person typed before the arguments.
        arguments: path of a config, then overrides.
        default: path of a config for a command without arguments; or settings, to which overrides may follow directly.
    """
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("dede_ray").setLevel(logging.INFO)
    try:
        if arguments and arguments[0] in {"-h", "--help"}:
            _explain_settings(kind, program)
        begins_with_override = bool(arguments) and arguments[0].startswith("--")
        if isinstance(default, Config) and (not arguments or begins_with_override):
            settings = override(default, arguments, program)
        elif begins_with_override or (not arguments and default is None):
            command = " ".join([program, "<config.yaml>", *map(shlex.quote, arguments)])
            raise Mistake(f"no config given; run: {command} (see configs/)")
        else:
            arguments = arguments or [str(default)]
            is_demo = "steps" in read_yaml(arguments[0])
            if is_demo and kind is not Steps and len(arguments) > 1:
                raise Mistake(
                    f"{arguments[0]} holds the steps of a demo, which take no further settings; change the file"
                )
            settings = load(Steps if is_demo else kind, arguments, program)
        outcome = function(settings)
    except (Mistake, StoreError) as mistake:
        sys.exit(_one_message(mistake))
    if outcome is not None:
        print(outcome)


def _explain_settings(kind: type[Config], program: str) -> None:
    # tyro wants a default for collections of settings, which the YAML gives; their help comes with it.
    empty: dict[str, Any] = {
        name: (field.annotation, origin())
        for name, field in kind.model_fields.items()
        if (origin := get_origin(field.annotation)) in (list, dict)
    }
    helped = create_model(kind.__name__, __base__=kind, **empty)  # type: ignore[call-overload]
    tyro.cli(tyro.conf.AvoidSubcommands[helped], args=["--help"], prog=f"{program} <config.yaml>")  # type: ignore[valid-type, misc]


def _one_message(mistake: Exception) -> int:
    # One that was made in a Ray task arrives wrapped in an error whose text is the task's traceback.
    print(f"error: {getattr(mistake, 'cause', mistake)}", file=sys.stderr)
    return 2


def _overview() -> str:
    lines = ["usage: dede-ray <job> <config.yaml> [--setting value ...]", ""]
    for group, jobs in GROUPS.items():
        lines.append(f"{group}:")
        for name, job in jobs.items():
            lines += textwrap.wrap(job.line, 100, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16)
        lines.append("")
    lines.append("dede-ray <job> --help lists a job's settings. A command that is run again does what remains.")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ jobs in a row


class Steps(Config):
    """Settings of `dede-ray demo`: command lines of jobs, in order."""

    steps: list[str] = Field(min_length=1)
    """Such as `poison configs/digits/poison.yaml --rate 0.05`."""


@dataclass(frozen=True)
class Step:
    """One job with its settings, ready to run."""

    line: str
    name: str
    settings: Config


def parse_steps(config: Steps) -> list[Step]:
    """Read every step's config and overrides; nothing runs.

    Raises:
        Mistake: a step is no job's command line, or its settings are wrong.
    """
    steps = []
    for line in config.steps:
        name, *arguments = shlex.split(line)
        if name not in JOBS or not arguments:
            raise Mistake(f"step {line!r} is no job's command line; expected one of {', '.join(JOBS)} and a config")
        steps.append(Step(line, name, load(JOBS[name].settings_class(), arguments)))
    return steps


def run_steps(config: Steps, until: str | None = None) -> str:
    """Run the steps, or those up to the first one of the job `until`; returns what the last one says.

    Raises:
        Mistake: whatever the jobs raise; a wrong step is found before the first one runs.
    """
    from dede_ray.runtime.session import start_ray  # a second of import that `--help` need not pay

    steps = parse_steps(config)
    if until is not None:
        if until not in [step.name for step in steps]:
            raise Mistake(f"none of these steps is a {until} job; run them with `dede-ray demo`")
        steps = steps[: [step.name for step in steps].index(until) + 1]
    start_ray(*(step.settings for step in steps))
    said = ""
    for number, step in enumerate(steps, 1):
        logger.info("[%d/%d] %s", number, len(steps), step.line)
        started = time.monotonic()
        said = JOBS[step.name].run(step.settings)
        logger.info("[%d/%d] %.0f s: %s", number, len(steps), time.monotonic() - started, said.splitlines()[0])
    return said
