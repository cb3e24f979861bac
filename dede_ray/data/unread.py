"""What looks like an image or a caption in a shard, and is read as neither: for findings, and for messages.

`Unread` is given the members of one sample after the other; `hint` looks at the beginning of a shard.
"""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from dede_ray.data.shards import CAPTION_SUFFIXES, IMAGE_SUFFIXES, Grouping, Limits, Shard, open_shard
from dede_ray.data.tar import open_tar
from dede_ray.runtime.config import parse_json

Part = Literal["image", "caption"]

_TEXT_SUFFIXES = ("text", "captions", "alt", "title", "description", "desc", "prompt")
_TEXT_FIELDS = re.compile("caption|text|title|description|prompt|alt")
_MAX_JSON_BYTES = 65_536  # of a member that is searched for captions
_MAX_PER_SAMPLE = 8  # members that may be meant
_MAX_SUFFIXES = 1000  # different ones that are counted
_MAX_MEMBERS = 2000  # that `hint` looks at


@dataclass
class Unread:
    """Counts members of samples that have no image (no caption), which may have been meant to be it."""

    limits: Limits
    counts: Counter[tuple[Part, str, str]] = field(default_factory=Counter)
    """(what it might be, suffix, field of its JSON) -> members"""
    first: dict[tuple[Part, str, str], str] = field(default_factory=dict)
    """The name of the first of them."""
    _has: set[Part] = field(default_factory=set)
    _found: list[tuple[Part, str, str, bytes]] = field(default_factory=list)

    def add(self, name: str, suffix: str, size: int, read: Callable[[], bytes]) -> None:
        """The next member of the sample."""
        last = suffix.rpartition(".")[2]
        if suffix in IMAGE_SUFFIXES:
            self._has.add("image")
        elif suffix in self.limits.caption.suffixes:
            self._has.add("caption")
        elif len(self._found) == _MAX_PER_SAMPLE:
            pass
        elif last in IMAGE_SUFFIXES:
            self._found.append(("image", suffix, name, b""))
        elif last in (*CAPTION_SUFFIXES, *_TEXT_SUFFIXES):
            self._found.append(("caption", suffix, name, b""))
        elif suffix == "json" and size <= _MAX_JSON_BYTES:
            with contextlib.suppress(tarfile.ReadError):  # for the reader to count
                self._found.append(("caption", suffix, name, read()))

    def end(self) -> None:
        """The sample is over."""
        for part, suffix, name, content in self._found:
            where = _text_field(content) if suffix == "json" else ""
            if part not in self._has and where is not None:
                what = (part, suffix, where)
                if what in self.counts or len(self.counts) < _MAX_SUFFIXES:
                    self.counts[what] += 1
                    self.first.setdefault(what, name)
        self._has.clear()
        self._found.clear()

    def sentences(self) -> Iterator[tuple[Part, str]]:
        """What was found, the most frequent first, and what to do about it."""
        for (part, suffix, where), num in self.counts.most_common():
            such = f"{num:,} members .{suffix}, such as {self.first[part, suffix, where]}"
            if part == "image":
                yield part, f"{such}: a key ends at the first dot of a name, so these are read as no image; rename them"
            elif where:
                yield part, f"{num:,} members .json with a field `{where}`: set limits.caption.field to {where}"
            else:
                yield part, f"{such}: if that is the caption, set limits.caption.member to {suffix}"


def hint(shard: Shard, limits: Limits, *parts: Part) -> str:
    """A sentence on the commonest of those members at a shard's beginning, to end a message with; or nothing."""
    found, grouping = Unread(limits), Grouping()
    try:
        with open_shard(shard) as stream:
            tar = open_tar(stream)
            for _ in range(_MAX_MEMBERS):
                member = tar.next()
                if member is None:
                    break
                place = grouping.place(member.name) if member.isfile() and not member.issparse() else None
                if place is not None:
                    if place.is_first:
                        found.end()
                    found.add(member.name, place.suffix, member.size, partial(tar.read, member))
    except (OSError, tarfile.ReadError):  # it is only a hint
        pass
    found.end()
    return next((f"; {shard.name} has {sentence}" for part, sentence in found.sentences() if part in parts), "")


def why_no_image(shards: list[Shard], limits: Limits, reasons: Counter[str]) -> str:
    """A sentence that leads on where many samples of a pass have no image; or nothing."""
    if reasons["duplicate_key"] > reasons["no_image"]:
        return "; the members of one sample are not neighbours there: sort the tar by name"
    return hint(shards[0], limits, "image") if reasons["no_image"] else ""


def _text_field(content: bytes) -> str | None:
    """The field of a JSON object that seems to hold a caption; None where there is none."""
    try:
        value = parse_json(io.BytesIO(content), nan=True)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    within = [(f"{name}.", inner) for name, inner in value.items() if isinstance(inner, dict)]
    ranks = _TEXT_FIELDS.pattern.split("|")
    texts = [
        (name.lower() not in ranks, bool(outer), outer + name)
        for outer, fields in [("", value), *within]
        for name, text in fields.items()
        if _TEXT_FIELDS.search(name.lower()) and "url" not in name.lower()
        if (isinstance(text, str) and text.strip()) or (isinstance(text, list) and text and isinstance(text[0], str))
    ]
    return min(texts)[-1] if texts else None
