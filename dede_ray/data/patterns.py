"""What one string of the settings names: files here or on a store, by name, folder, pattern, range or list.

    expand("shards/train-{00000..00099}.tar") -> [File(url, num_bytes, is_named), ...]

    a.tar, folder, s3://bucket/prefix    the file, or the files directly in the folder
    train-*.tar, data/[ab]/*.tar         a pattern; whatever matches
    train-{00000..00099}.tar, {a,b}.tar  names, all of which must exist; also nested, and together with patterns
    a.tar::b.tar                         both
    list.txt                             a text file that names shards, one a line

What exists on a disk is taken as it is before anything in it is taken for a pattern, so folders may be called `[v2]`,
`{x}` or `a::b`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

from braceexpand import braceexpand

from dede_ray.runtime.config import Mistake
from dede_ray.runtime.store import ObjectPath, StoreError, is_url, place

T = TypeVar("T")
U = TypeVar("U")

MAX_NAMES = 1_000_000
"""So many names one string may give."""
MAX_LIST_BYTES = 64_000_000
"""Longest text file that lists shards."""


class File(NamedTuple):
    """A file that was found; `is_named`: the settings name this very file."""

    url: str
    num_bytes: int
    is_named: bool


def expand(pattern: str) -> list[File]:
    """Find the files that a string of the settings names; perhaps none.

    Raises:
        Mistake: some names of a range or a list do not exist, or it is an address that is not read.
        StoreError: a store refuses, or does not answer.
    """
    return [file for part in _split(_local(pattern)) for file in _expand(part)]


def at_once(ask: Callable[[T], U], things: Iterable[T]) -> Iterator[U]:
    """Ask about several things, 16 at a time, in their order: each answer may take a store's round trip."""
    with ThreadPoolExecutor(16) as threads:
        yield from threads.map(ask, things)


def _local(name: str) -> str:
    return os.path.expanduser(name.removeprefix("file://"))


def _split(pattern: str) -> list[str]:
    """Part a pattern at `::`, unless that is within a name that exists."""
    if os.path.exists(pattern):
        return [pattern]
    start = len(_folder_of(pattern))
    first, *others = pattern[start:].split("::")
    return [pattern[:start] + first, *map(_local, filter(None, others))]


def _folder_of(path: str) -> str:
    """The longest leading part of a path that is a folder here, with the slash behind it."""
    ends = [match.end() for match in re.finditer("/", path)]
    return next((path[:end] for end in reversed(ends) if os.path.isdir(path[:end])), "")


_NOT_READ = re.compile(r"(https?|ftps?)://")


def _expand(pattern: str) -> list[File]:
    if pattern.startswith("pipe:"):
        inside = re.search(r"\b(?:s3|gs|gcs|hf)://[^\s'\"|]+", pattern)
        do = f"name {inside[0]} itself" if inside else "name the files themselves, on a disk or a store (s3://, gs://)"
        raise Mistake(f"{pattern}: no command is run to read shards; {do}")
    if _NOT_READ.match(pattern):
        raise Mistake(
            f"{pattern}: shards are read from disks and stores (s3://, gs://, hf://), not from web servers; download "
            "them first"
        )
    if pattern.endswith(".txt") and place(pattern).is_file():
        return _listed(pattern)
    names = _names(pattern)
    found = [*at_once(_find, names)] if is_url(pattern) else [*map(_find, names)]
    missing = [name for name, files in zip(names, found, strict=True) if not files]
    if missing and len(missing) < len(names):
        listing = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise Mistake(
            f"{len(missing):,} of the {len(names):,} names that {pattern} stands for do not exist: {listing}; name "
            "those that do, or write a pattern (*.tar), which takes what is there"
        )
    return [file for files in found for file in files]


def _names(pattern: str) -> list[str]:
    """All names that braces give, in order."""
    start = 0 if is_url(pattern) else len(pattern if os.path.exists(pattern) else _folder_of(pattern))
    rest = pattern[start:]
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", rest)
    names = None  # braceexpand would make all of a range at once
    if not any(abs(int(last) - int(first)) > MAX_NAMES for first, last in ranges):
        try:
            names = [pattern[:start] + name for name in islice(braceexpand(rest, escape=False), MAX_NAMES + 1)]
        except ValueError:  # braces that are none
            return [pattern]
    if names is None or len(names) > MAX_NAMES:
        raise Mistake(f"{pattern} stands for more than {MAX_NAMES:,} names; name a part of them")
    return names


def _find(name: str) -> list[File]:
    """The file of that name, the files in the folder of that name, or those that match it."""
    if is_url(name):
        there = ObjectPath(name)
        if there.is_file():
            return [File(name, there.num_bytes(), True)]
        scheme, _, path = there.base.partition("://")
        first, *others = path.split("/")
        is_pattern = glob.has_magic(path)
        found = _walk(there.at(f"{scheme}://{first}"), others) if is_pattern else there.iterdir()
        shown = (path for path in found if path.is_file() and not path.name.startswith("."))  # as on a disk
        return [File(str(path), path.num_bytes(), False) for path in shown]
    if os.path.isfile(name):
        return [File(os.path.abspath(name), os.path.getsize(name), True)]
    if os.path.isdir(name):
        folder, pattern = name, "*"
    else:
        folder = _folder_of(name)
        pattern = name[len(folder) :]
    paths = [os.path.join(folder, path) for path in glob.glob(pattern, root_dir=folder or None)]
    return [File(os.path.abspath(path), os.path.getsize(path), False) for path in paths if os.path.isfile(path)]


def _walk(folder: ObjectPath, names: list[str]) -> Iterator[ObjectPath]:
    """What is at these names, one folder after the other, below a folder of a store; each may be a pattern."""
    for at, name in enumerate(names):
        if glob.has_magic(name):
            for found in folder.glob(name):
                yield from _walk(found, names[at + 1 :])
            return
        folder = folder / name
    yield folder


def _listed(path: str) -> list[File]:
    """What a text file lists: one name, pattern or range a line, as settings would give it."""
    try:
        with place(path).open("rb") as stream:
            content = stream.read(MAX_LIST_BYTES + 1)
        lines = content.decode("utf-8-sig").splitlines()
    except StoreError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(f"{path} should list shards, one a line, but cannot be read: {error}") from None
    if len(content) > MAX_LIST_BYTES:
        raise Mistake(f"{path} should list shards, one a line, but is longer than {MAX_LIST_BYTES:,} bytes")
    named = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    files: list[File] = []
    missing = []
    for number, line in named:
        if line.endswith(".txt"):
            raise Mistake(f"{path} names another list, {line}, in line {number}; name shards there")
        found = expand(line)
        files += found
        missing += [] if found else [f"{line} (line {number})"]
    if missing:
        listing = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise Mistake(f"{len(missing):,} of the {len(named):,} shards that {path} lists do not exist: {listing}")
    return files
