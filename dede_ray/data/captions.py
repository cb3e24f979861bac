"""Class names, caption templates, and the one caption that is drawn for each sample.

A labelled corpus has a `classes.json` beside its shards, written by `ingest`:

    {"names": ["cat", ...], "templates": ["a photo of a {}.", ...]}
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from dede_ray.data.sampling import keyed_generator
from dede_ray.data.shards import Shard, open_shard
from dede_ray.runtime.config import Config, Mistake, explain, parse_json


class Classes(Config):
    """The content of `classes.json`."""

    names: list[str]
    """Class names in the order of their labels."""
    templates: list[str]
    """Captions with `{}` in the place of the class name."""


def read_classes(shards: Sequence[Shard]) -> Classes | None:
    """Read the `classes.json` beside the first of the shards, local or remote; None where there is none.

    Raises:
        Mistake: it is not what `ingest` writes.
    """
    url = shards[0].url.rpartition("/")[0] + "/classes.json"
    try:
        with open_shard(Shard("classes.json", url, 0)) as stream:
            content = parse_json(stream)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Mistake(f"{url} should be JSON, but cannot be read: {error}") from None
    try:
        return Classes.model_validate(content)
    except ValidationError as error:
        raise Mistake(f"{url} does not describe classes:\n{explain(error, Classes)}") from None


def class_captions(templates: Sequence[str], name: str) -> list[str]:
    """Fill each template with a class name; a plain replacement, as templates may come from strangers."""
    return [template.replace("{}", name) for template in templates]


def pick_caption(captions: Sequence[str], seed: int, name: str) -> str:
    """Pick one caption for the sample called `name`."""
    return captions[int(keyed_generator(seed, name).integers(len(captions)))]
