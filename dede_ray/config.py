"""Settings: strict, frozen, one YAML per run, and one way for a job to start, to resume and to fail.

`Config` is the base of every settings class, `load` reads a YAML file and applies dotted command-line overrides,
`main` is the body of every file in jobs/. `claim` and `finish` stand at the two ends of a job: they record in the
output folder which settings made it, and what came out. `Mistake` is the exception for people: whatever raises it
says what was found, what was expected and what to do, and the job ends with that message instead of a traceback.
"""

from __future__ import annotations

import difflib
import json
import logging
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, TypeVar, get_origin

import tyro
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from dede_ray.store import Named, StoreError, place, write_atomically

logger = logging.getLogger(__name__)

C = TypeVar("C", bound="Config")

MAX_JSON_BYTES = 64_000_000  # as objects in memory JSON may take 25 times its bytes

_short = reprlib.Repr()  # of what was found: enough to recognise it, however large or deep it is
_short.maxlevel = 3
_short.maxstring = _short.maxlong = _short.maxother = 200


class Mistake(ValueError):
    """A person's mistake. The message says what we got, what we expected and what to do."""


def _are_seeds(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError("seeds must be different, and 0 or more")
    return seeds


Seeds = Annotated[list[int], Field(min_length=1), AfterValidator(_are_seeds)]
"""What is repeated with other draws."""


class Config(BaseModel):
    """Frozen settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    writes_to_stores: ClassVar[bool] = False
    """Of a job's settings: `output` may be a URL."""


def load(kind: type[C], argv: list[str]) -> C:
    """Read `run.yaml`, then apply overrides such as `--decoder.mask-ratio 0.75`.

    Args:
        kind: the settings class.
        argv: the YAML path, then the overrides.

    Raises:
        Mistake: no such file, not YAML, an unknown key, a wrong type or a value out of range.
    """
    path, *overrides = argv
    content = _read_yaml(path)
    try:
        base = kind.model_validate(content)
        if not overrides:
            return base
        return tyro.cli(tyro.conf.AvoidSubcommands[kind], default=base, args=overrides, prog=path)  # type: ignore[valid-type, misc]
    except ValidationError as error:
        raise Mistake(f"{path} does not describe a {kind.__name__}:\n{explain(error, kind)}") from None


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        near = difflib.get_close_matches(Path(path).name, [p.name for p in Path("configs").glob("*.yaml")], 1)
        hint = f"; did you mean configs/{near[0]}?" if near else ""
        raise Mistake(f"no config file at {path} (looked from {Path.cwd()}){hint}")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except RecursionError:
        raise Mistake(f"{path} is not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # PyYAML's own errors, and what its constructors meet in `2024-13-45` or `!!bool maybe`
        raise Mistake(f"{path} is not valid YAML: {error or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise Mistake(f"{path} must hold `key: value` settings, found {type(content).__name__}")
    return content


def explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """Say each validation error in one line: the field, what was found, what was expected."""
    lines = []
    for problem in error.errors():
        parts, names = _place(kind, problem["loc"])
        field = ".".join(parts) or kind.__name__
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), names, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"known settings: {', '.join(names)}"
            lines.append(f"  {field}: unknown setting; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"  {field}: required, but not given")
        else:
            found = f", found {_short.repr(problem['input'])}" if parts else ""  # not the whole of the settings
            lines.append(f"  {field}: {problem['msg']}{found}")
    return "\n".join(lines)


def _place(kind: type[BaseModel], location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """Say a place of the tree as people write it, without the tags of unions; and the names of the settings beside it.

    Where a union makes it ambiguous, these are all candidates.
    """
    kinds, parts, names = [kind], list[str](), list[str]()
    for part in location:
        names = sorted({name for one in kinds for name in one.model_fields})
        fields = [k.model_fields[part].annotation for k in kinds if part in k.model_fields]
        tagged = [k for k in kinds if part == getattr(k.model_fields.get("kind"), "default", None)]
        if fields:
            kinds = [inner for field in fields for inner in _models_in(field)]
        elif tagged:
            kinds = tagged
            continue
        parts.append(str(part))
    return parts, names


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]


def write_json(path: Named, content: Any) -> None:
    """Write JSON atomically, keys in the order given, the same bytes for equal content."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(stream: IO[bytes]) -> Any:
    """Read strict JSON, as strangers may have written it, from a file.

    Raises:
        ValueError: it is damaged, nested too deeply, longer than `MAX_JSON_BYTES`, or holds NaN, Infinity or half a
            character (a lone surrogate).
    """
    content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"longer than {MAX_JSON_BYTES:,} bytes")
    try:
        value = json.loads(content, parse_constant=_no_number)
        if b"\\ud" in content.lower():  # half a character could be read, and never written
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def read_json(path: Named, what: str) -> dict[str, Any]:
    """Read a JSON object that one of our jobs wrote; `what` names it in the error message."""
    try:
        with place(path).open("rb") as stream:
            content = parse_json(stream)
    except FileNotFoundError:
        raise Mistake(f"no {what} at {path}; run the job that writes it, or correct the path") from None
    except StoreError:
        raise
    except (OSError, ValueError) as error:
        raise Mistake(f"{path} should be a {what} in JSON, but cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise Mistake(f"{path} should be a {what}, a JSON object; found {type(content).__name__}")
    return content


def claim(folder: Named, config: Config) -> dict[str, Any] | None:
    """Take an output folder for a run, or find that this very run has already been there.

    The folder's `run.json` holds the settings that made it and, once the job is through, its result. A job
    calls this first and `finish` last, so that the same command, run again, resumes or has nothing to do.

    Returns:
        The result of the finished run; None where work remains.

    Raises:
        Mistake: the folder belongs to a run with other settings, which has left something in it.
    """
    path = place(folder) / "run.json"
    settings = config.model_dump(mode="json")
    if not path.is_file():
        write_json(path, {"settings": settings})
        return None
    run = read_json(path, "record of a run")
    if run.get("settings") != settings:
        if "result" not in run and not _has_output(folder):  # it stopped at a mistake, now corrected
            write_json(path, {"settings": settings})
            return None
        lines = _differences(run.get("settings"), settings)
        more = [f"and {len(lines) - 20:,} more"] if len(lines) > 20 else []
        listing = "\n  ".join([*lines[:20], *more])
        raise Mistake(
            f"{folder} was made with other settings:\n  {listing}\n"
            "choose another output folder, or delete this one to start afresh"
        )
    result = run.get("result")
    if result is not None and not isinstance(result, dict):
        raise Mistake(f"{path} is damaged: its result is no JSON object; delete {folder} to start afresh")
    return result


def _has_output(folder: Named) -> bool:
    return any(not path.name.startswith(".") and path.name != "run.json" for path in place(folder).iterdir())


def finish(folder: Named, config: Config, result: dict[str, Any]) -> dict[str, Any]:
    """Record the result of a finished run in its folder, and return it."""
    write_json(place(folder) / "run.json", {"settings": config.model_dump(mode="json"), "result": result})
    return result


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        return [line for k in keys for line in _differences(there.get(k), here.get(k), f"{name}.{k}".lstrip("."))]
    return [] if there == here else [f"{name or 'settings'}: {_short.repr(there)} there, {_short.repr(here)} here"]


def main(kind: type[C], job: Callable[[C], Any], in_demo: Callable[[str | None], Any] | None = None) -> None:
    """Run a job from the command line: `python jobs/<job>.py <config.yaml> [--setting value ...]`.

    Prints what the job returns, if it returns something. A `Mistake` ends the process with its message and
    exit code 2; anything else is a bug of ours and keeps its traceback.

    Args:
        kind: the job's settings class.
        job: the one function of dede_ray that does the work.
        in_demo: runs a demo (a config of `steps:`) up to this job; called with the demo's path, or with None when no
            config is given at all. An error where a job has no such thing.
    """
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("dede_ray").setLevel(logging.INFO)
    argv = sys.argv[1:]
    try:
        if argv and argv[0] in {"-h", "--help"}:
            print(f"usage: {sys.argv[0]} <config.yaml> [--setting value ...]\n")
            # tyro wants a default for collections of settings, which the YAML gives; their help comes with it.
            empty: dict[str, Any] = {
                name: (field.annotation, origin())
                for name, field in kind.model_fields.items()
                if (origin := get_origin(field.annotation)) in (list, dict)
            }
            helped = create_model(kind.__name__, __base__=kind, **empty)  # type: ignore[call-overload]
            tyro.cli(tyro.conf.AvoidSubcommands[helped], args=["--help"], prog=sys.argv[0])  # type: ignore[valid-type, misc]
        if in_demo is not None and (not argv or (len(argv) == 1 and "steps" in _read_yaml(argv[0]))):
            outcome = in_demo(argv[0] if argv else None)
        elif argv:
            outcome = job(load(kind, argv))
        else:
            raise Mistake(f"no config given; run: python {sys.argv[0]} <config.yaml> (see configs/)")
    except (Mistake, StoreError) as mistake:
        sys.exit(_one_message(mistake))
    if outcome is not None:
        print(outcome)


def _one_message(mistake: Exception) -> int:
    # One that was made in a Ray task arrives wrapped in an error whose text is the task's traceback.
    print(f"error: {getattr(mistake, 'cause', mistake)}", file=sys.stderr)
    return 2
