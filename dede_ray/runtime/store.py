"""Where our files are: on a file system, or on an object store (s3://, gs://) by the same words.

`place` turns what a person writes into a `pathlib.Path` or, for a URL, an `ObjectPath`, which has the methods of a
`Path` that our code uses. `write_atomically` is the one way in which anything is committed: on a file system a
temporary name is renamed, on an object store one request puts the whole object. Neither needs the other's means, and
in both a file is absent or whole, whatever is killed.

Credentials and endpoint come from where each store's own tools look for them; for S3-compatible servers set
AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl, urlsplit

from pyarrow import fs


class StoreError(OSError):
    """An object store refuses, or does not answer; the message names the object and what the store said."""


@functools.lru_cache(maxsize=64)
def _filesystem(scheme: str, host: str, query: str) -> fs.FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3":
        # Delayed opening puts a small object in one request; without it an object that was begun and not finished
        # would be committed as far as it got when its stream is let go of.
        options: dict[str, Any] = {"allow_delayed_open": True, "retry_strategy": fs.AwsStandardS3RetryStrategy(8)}
        if endpoint:
            parts = urlsplit(endpoint)
            options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
        options |= dict(parse_qsl(query))  # as in pyarrow's URIs: region, endpoint_override, scheme
        given = {"endpoint_override", "region"} & options.keys()
        if not given | ({"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys()):
            options["region"] = fs.resolve_s3_region(host)
        return fs.S3FileSystem(**options)
    return fs.FileSystem.from_uri(f"{scheme}://{host}/{'?' + query if query else ''}")[0]


def filesystem_of(where: Named) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system or store that a place is on, and the place's name there.

    Raises:
        StoreError: no store of that kind, or no such bucket.
    """
    if not is_url(where):
        return fs.LocalFileSystem(), str(place(where))
    there = ObjectPath(str(where))
    scheme, _, path = there.base.partition("://")  # not by urlsplit: a key may hold `#` and `?`
    try:
        return _filesystem(scheme, path.partition("/")[0], there.query), path.rstrip("/")
    except Exception as error:  # some come from libraries that raise errors of their own: httpx, huggingface_hub
        raise StoreError(f"{where}: {_in_words(error)}") from None


def _in_words(error: Exception) -> str:
    return str(error) or type(error).__name__


_QUERY = re.compile(r"\?(?=\w+=)")  # any other question mark is part of a name


class ObjectPath:
    """A place on an object store; folders exist as far as something is in them."""

    def __init__(self, url: str, info: fs.FileInfo | None = None):
        """`info` is what a listing said of it."""
        base, query, _ = [*_QUERY.split(url, 1), "", ""][:3]
        self._base, self._query, self._listed = base.rstrip("/"), query, info

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectPath, (str(self),)

    def __str__(self) -> str:
        return self._base + (f"?{self._query}" if self._query else "")

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: object) -> ObjectPath:
        return self._like(f"{self._base}/{name}")

    def _like(self, base: str, info: fs.FileInfo | None = None) -> ObjectPath:
        return ObjectPath(base + (f"?{self._query}" if self._query else ""), info)

    def at(self, base: str) -> ObjectPath:
        """Another place on the same store."""
        return self._like(base)

    @property
    def base(self) -> str:
        """The URL without its query."""
        return self._base

    @property
    def query(self) -> str:
        """How the store is to be asked: `region=eu-west-1`."""
        return self._query

    @property
    def name(self) -> str:
        return self._base.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0] or self.name

    @property
    def parent(self) -> ObjectPath:
        return self._like(self._base.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name

    def with_suffix(self, suffix: str) -> ObjectPath:
        return self.with_name(self.stem + suffix)

    def _info(self) -> fs.FileInfo:
        return self._listed or self._ask(lambda store, name: store.get_file_info([name])[0])

    def _ask(self, question: Any) -> Any:
        try:
            return question(*filesystem_of(str(self)))
        except FileNotFoundError:
            raise FileNotFoundError(f"nothing at {self}") from None
        except StoreError:
            raise
        except Exception as error:  # pyarrow's are OSErrors, those of other makers' stores are not
            raise StoreError(f"{self}: {_in_words(error)}") from None

    def is_file(self) -> bool:
        return self._info().type == fs.FileType.File

    def is_dir(self) -> bool:
        return self._info().type == fs.FileType.Directory

    def exists(self) -> bool:
        return self._info().type != fs.FileType.NotFound

    def num_bytes(self) -> int:
        """The object's size."""
        return self._info().size

    def version(self) -> str:
        """What changes when another object is put there."""
        return f"{self._info().size} bytes, {self._info().mtime_ns}"

    def etag(self) -> str | None:
        """By what the store names the content, where it says so."""
        described = self._ask(lambda store, name: store.open_input_file(name).metadata())
        for name, value in (described or {}).items():
            if name.lower() == "etag" and value:
                return (value.decode() if isinstance(value, bytes) else str(value)).strip('"')
        return None

    def iterdir(self) -> Iterator[ObjectPath]:
        """What is directly in a folder; nothing where there is no folder."""
        found = self._ask(lambda store, name: store.get_file_info(fs.FileSelector(name, allow_not_found=True)))
        return (
            self._like(f"{self._base}/{info.base_name}", info)
            for info in sorted(found, key=lambda info: info.base_name)
        )

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Those directly in the folder whose names match."""
        assert "/" not in pattern, pattern
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def read_bytes(self) -> bytes:
        with self.open() as stream:
            return stream.read()

    def read_start(self, num_bytes: int) -> bytes:
        """The first bytes, in one small request."""

        def read(store: fs.FileSystem, name: str) -> bytes:
            with store.open_input_file(name) as stream:
                return stream.read(num_bytes)

        content: bytes = self._ask(read)
        return content

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def open(self, mode: str = "rb") -> IO[bytes]:
        """A seekable stream for reading; small reads are gathered, as each would be a request."""
        assert mode == "rb", mode
        return io.BufferedReader(self._ask(lambda store, name: store.open_input_file(name)), 1 << 20)

    def write_bytes(self, content: bytes) -> None:
        """Put an object, whole: `write_atomically` says so in one word for all places."""

        def put(store: fs.FileSystem, name: str) -> None:
            stream = store.open_output_stream(name)
            stream.write(content)
            stream.close()

        self._ask(put)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask(lambda store, name: store.delete_file(name))
        except FileNotFoundError:
            if not missing_ok:
                raise


Place = Path | ObjectPath
"""A file or folder of ours."""
Named = str | os.PathLike[str] | ObjectPath
"""How one is named."""


def is_url(where: object) -> bool:
    """Whether it names an object on a store, and no file here."""
    return "://" in str(where) and not str(where).startswith("file://")


def place(where: Named) -> Place:
    """The place of that name, absolute."""
    if isinstance(where, ObjectPath):
        return where
    return ObjectPath(str(where)) if is_url(where) else Path(str(where).removeprefix("file://")).absolute()


def write_atomically(where: Named, content: bytes | str) -> None:
    """Write a file so that it is either absent or whole, whatever is killed, by however many writers of equal bytes."""
    path, content = place(where), content.encode() if isinstance(content, str) else content
    if isinstance(path, ObjectPath):
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def local_copy(where: Named) -> Path:
    """A file that libraries can open by its name: itself, or a copy on this machine of what is on a store now."""
    path = place(where)
    if isinstance(path, Path) or not path.is_file():
        return Path(str(path))
    key = hashlib.sha256(f"{path}, {path.version()}".encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"dede_ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StoreError(f"{folder} belongs to another user, who could exchange what is copied there; set TMPDIR")
    copy = folder / f"{key}-{path.name}"
    if not copy.is_file():
        write_atomically(copy, path.read_bytes())
    return copy
