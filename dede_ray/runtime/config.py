"""Settings: strict, frozen, one YAML per run, and one way for a job to start, to resume and to fail.

`Config` is the base of every settings class, `load` reads a YAML file and applies dotted command-line overrides.
`claim` and `finish` are the two ends of a job: they record in the output folder which settings made it, and what came
out. `Mistake` is the exception for people: whatever raises it says what was found, what was expected and what to do,
and the job ends with that message instead of a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import re
import reprlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, TypeVar

import tyro
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dede_ray.runtime.store import Named, StoreError, place, write_atomically

logger = logging.getLogger(__name__)

C = TypeVar("C", bound="Config")

MAX_JSON_BYTES = 64_000_000  # as objects in memory JSON may take 25 times its bytes

_short = reprlib.Repr()  # of what was found: enough to recognise it, however large or deep it is
_short.maxlevel = 3
_short.maxstring = _short.maxlong = _short.maxother = 200


_PACKAGE = Path(__file__).parents[1]
_BUNDLED = [folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()]
"""The wheel holds the smallest configs, a checkout all of them beside the package."""


class Mistake(ValueError):
    """A person's mistake. The message says what we got, what we expected and what to do.

    Example:
        >>> import dede_ray
        >>> try:
        ...     dede_ray.list_shards([])
        ... except dede_ray.Mistake as mistake:
        ...     print(mistake)
        the list of shards is empty; name .tar files, a folder of them, or a pattern
    """


def _are_seeds(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError("seeds must be different, and 0 or more")
    return seeds


Seeds = Annotated[list[int], Field(min_length=1), AfterValidator(_are_seeds)]
"""Seeds of repetitions, each with draws of its own."""


class Config(BaseModel):
    """Frozen settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    writes_to_stores: ClassVar[bool] = False
    """Whether a job with these settings can write to a store: `output` may be a URL."""

    @model_validator(mode="before")
    @classmethod
    def _at_home(cls, values: Any) -> Any:
        """`~/shards` means what a shell makes of it, in every setting."""
        return {name: _expanded(value) for name, value in values.items()} if isinstance(values, dict) else values


def _expanded(value: Any, seen: dict[int, Any] | None = None) -> Any:
    seen = {} if seen is None else seen  # what YAML repeats by reference is expanded once: it may unfold without end
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~") else value
    if type(value) not in (dict, list):
        return value
    if id(value) not in seen:
        if type(value) is dict:
            seen[id(value)] = {name: _expanded(one, seen) for name, one in value.items()}
        else:
            seen[id(value)] = [_expanded(one, seen) for one in value]
    return seen[id(value)]


def load(kind: type[C], argv: list[str], program: str = "") -> C:
    """Read `run.yaml`, then apply overrides such as `--decoder.mask-ratio 0.75`.

    Args:
        kind: the settings class.
        argv: the YAML path, then the overrides.
        program: what a person typed before them, for messages.

    Raises:
        Mistake: no such file, not YAML, an unknown key, a wrong type or a value out of range.
    """
    path, *overrides = argv
    content = read_yaml(path)
    try:
        settings = kind.model_validate(content)
    except ValidationError as error:
        raise Mistake(f"{path} does not describe a {kind.__name__}:\n{explain(error, kind)}") from None
    return override(settings, overrides, f"{program} {path}".lstrip())


def override(settings: C, overrides: list[str], name: str) -> C:
    """Change settings by the words of a command line, such as `--decoder.mask-ratio 0.75`.

    Args:
        settings: those to begin with.
        overrides: the words.
        name: what a person typed before them, for messages.

    Raises:
        Mistake: a value out of range. An unknown setting ends the process with a message and exit code 2.
    """
    kind = type(settings)
    if not overrides:
        return settings
    try:
        return tyro.cli(tyro.conf.AvoidSubcommands[kind], default=settings, args=overrides, prog=name)  # type: ignore[valid-type, misc]
    except ValidationError as error:
        raise Mistake(f"{name} with {shlex.join(overrides)} is no {kind.__name__}:\n{explain(error, kind)}") from None


def config_file(path: str | Path) -> Path:
    """Where a file of `configs/` is: at the path as given, or else among those that came with the package."""
    path = Path(path)
    if path.is_file() or path.parts[:1] != ("configs",):
        return path
    bundled = [folder.joinpath(*path.parts[1:]) for folder in _BUNDLED]
    return next((candidate for candidate in bundled if candidate.is_file()), path)


def read_yaml(path: str) -> dict[str, Any]:
    """The content of a config, not yet checked.

    Raises:
        Mistake: no such file, not YAML, or no settings.
    """
    file = config_file(path)
    if not file.is_file():
        near = _similar_configs(path)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise Mistake(f"no config file at {path} (looked from {Path.cwd()}){hint}")
    try:
        content = yaml.safe_load(file.read_text())
    except RecursionError:
        raise Mistake(f"{path} is not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # PyYAML's own errors, and what its constructors meet in `2024-13-45` or `!!bool maybe`
        raise Mistake(f"{path} is not valid YAML: {error or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise Mistake(f"{path} must hold `key: value` settings, found {type(content).__name__}")
    return content


def _similar_configs(path: str) -> list[str]:
    """Configs that may have been meant: the one of nearly the same words in any order, or those of the same file name.

    So configs/score_digits.yaml and configs/digits/scor.yaml both lead to configs/digits/score.yaml.
    """

    folder = Path(path).parent

    def words(name: str) -> str:
        parts = Path(name).with_suffix("").parts
        shared = parts.index("configs") + 1 if "configs" in parts else len(folder.parts) * folder.is_dir()
        return " ".join(sorted(re.findall(r"[^\W_]+", " ".join(parts[shared:]))))

    bundled = [Path("configs", p.relative_to(folder)) for folder in _BUNDLED for p in folder.rglob("*.yaml")]
    known = sorted({p.as_posix() for p in [*bundled, *folder.glob("*.yaml")]})
    by_words = {words(name): name for name in known}
    close = [by_words[name] for name in difflib.get_close_matches(words(path), by_words, 1, 0.75)]
    named = [name for name in known if Path(name).name == Path(path).name]
    return close or named[:3] or [by_words[name] for name in difflib.get_close_matches(words(path), by_words, 1, 0.65)]


def to_install(extra: str) -> str:
    """What to type to get an optional extra: from the checkout, as the bare name is registered on no index of ours."""
    return f"in the checkout: pip install --constraint constraints.txt '.[{extra}]'"


def as_settings(kind: type[C], given: C | dict[str, Any] | str | Path) -> C:
    """Settings as people give them in Python: ready ones, a dict of them, or the path of a YAML file.

    Raises:
        Mistake: as `load`.
    """
    if isinstance(given, kind):
        return given
    if isinstance(given, str | Path):
        return load(kind, [str(given)])
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise Mistake(f"these settings do not describe a {kind.__name__}:\n{explain(error, kind)}") from None


def explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """Say each validation error in one line: the field, what was found, what was expected."""
    lines: list[str] = []
    for problem in error.errors():
        parts, names = _place(kind, problem["loc"])
        field = ".".join(parts) or kind.__name__
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), names, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"known settings: {', '.join(names)}"
            is_repeated = any(line.endswith(hint) for line in lines)
            lines.append(f"  {field}: unknown setting" + ("" if is_repeated else f"; {hint}"))
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


def parse_json(stream: IO[bytes], *, nan: bool = False) -> Any:
    """Read strict JSON, as strangers may have written it, from a file.

    Args:
        nan: read NaN and Infinity, which Python writes, as None.

    Raises:
        ValueError: it is damaged, nested too deeply, longer than `MAX_JSON_BYTES`, or holds half a character (a lone
            surrogate), NaN or Infinity.
    """
    content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"longer than {MAX_JSON_BYTES:,} bytes")
    try:
        value = json.loads(content, parse_constant=_none if nan else _no_number)
        if b"\\ud" in content.lower():  # half a character could be read, and never written
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _none(name: str) -> None:
    return None


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


def claim(folder: Named, config: Config, places: Sequence[str] = ()) -> dict[str, Any] | None:
    """Take an output folder for a run, or find that this very run has already been there.

    The folder's `run.json` holds the settings that made it and, once the job is finished, its result. A job
    calls this first and `finish` last, so that the same command, run again, resumes or has nothing to do.

    Args:
        places: settings that say where something is, and may differ; the caller looks at what is there.

    Returns:
        The result of the finished run; None where work remains.

    Raises:
        Mistake: the folder belongs to a run with other settings, which has left something in it, or cannot be written.
    """
    path = place(folder) / "run.json"
    settings = config.model_dump(mode="json")
    if not path.is_file():
        with written_to(folder):
            write_json(path, {"settings": settings})
        return None
    run = read_json(path, "record of a run")
    there = run.get("settings")
    if isinstance(there, dict) and places:
        there = {**there, **{name: settings[name] for name in places}}
    if there != settings:
        if "result" not in run and not _has_output(folder):  # it stopped at a mistake, now corrected
            write_json(path, {"settings": settings})
            return None
        lines = _differences(there, settings)
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


@contextlib.contextmanager
def written_to(folder: Named) -> Iterator[None]:
    """Where nothing can be written to an output folder, say so: there is a file, no permission, no room."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise Mistake(f"nothing can be written to the output {folder}: {error}; choose another folder") from None


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
