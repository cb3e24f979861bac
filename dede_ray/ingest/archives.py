"""Files inside archives and folders, found without unpacking and read at their place.

A *piece* is a file's name and where its bytes lie. Names are only ever names: nothing is written to a path that an
archive chose, so `../../x` in a tar or zip is as harmless as any other. Bytes in an uncompressed tar are read where
they lie; a gzipped tar, and a zip, are first copied out into one flat file of the `scratch` folder.

Pickles (the official CIFAR files) are read by an unpickler that knows the parts of a numpy array and nothing else.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

from dede_ray.data.first_bytes import NUM_BYTES, what_is
from dede_ray.runtime.config import Mistake

# Archives of images shrink little; one that grows more than this was made to fill a disk.
MAX_EXPANSION = 200
MAX_PICKLE_BYTES = 2**30
ARCHIVES = ("a tar", "a ZIP archive", "compressed with gzip")
"""What holds files, as `what_is` names it."""


class Piece(NamedTuple):
    """One file: its name inside the archive or folder, and its bytes' place in a file of this machine."""

    name: str
    file: str
    offset: int
    num_bytes: int

    @property
    def base(self) -> str:
        return self.name.rpartition("/")[2]

    def read(self) -> bytes:
        with open(self.file, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.num_bytes)


def find_pieces(path: str | os.PathLike[str], scratch: Path) -> list[Piece]:
    """List the files of a folder (sorted, links followed) or of a tar, tar.gz or zip (in its order).

    Raises:
        Mistake: the archive is damaged, or expands like a bomb.
    """
    path = os.path.abspath(path)
    if os.path.isdir(path):
        return sorted(_walk(path, "", set()))
    with open(path, "rb") as stream, damage_is_a_mistake(path):
        magic = stream.read(4)
        if magic[:2] == b"\x1f\x8b":
            return list(tar_pieces(kept(path, scratch, _gunzip)))
        if magic[:2] == b"PK":
            with zipfile.ZipFile(stream) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
            flat, offset, pieces = kept(path, scratch, _unzip), 0, []
            for member in members:
                pieces.append(Piece(member.filename, flat, offset, member.file_size))
                offset += member.file_size
            return pieces
    return list(tar_pieces(path))


def look(*paths: str | os.PathLike[str]) -> None:
    """Look at the first bytes of archives, where there are such files, before hours are spent on the first of them.

    Raises:
        Mistake: one is something else.
    """
    for path in map(os.path.abspath, paths):
        if os.path.isfile(path) and (found := _something_else(path, ARCHIVES)):
            raise Mistake(found)


def _walk(folder: str, name: str, seen: set[str]) -> Iterator[Piece]:
    real = os.path.realpath(folder)
    if real in seen:  # a link back to where we are
        return
    seen.add(real)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, f"{name}{entry.name}/", seen)
            elif entry.is_file():
                yield Piece(f"{name}{entry.name}", entry.path, 0, entry.stat().st_size)


def tar_pieces(file: str, offset: int = 0, num_bytes: int | None = None) -> Iterator[Piece]:
    """Yield the files of an uncompressed tar, which may itself lie within a file (ImageNet's tar of tars)."""
    end = os.path.getsize(file) if num_bytes is None else offset + num_bytes
    with open(file, "rb") as stream, damage_is_a_mistake(file):
        stream.seek(offset)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name!r} claims to extend past the end")
                if member.isreg() and not member.issparse():
                    yield Piece(member.name, file, member.offset_data, member.size)
                tar.members.clear()  # type: ignore[attr-defined]  # which would otherwise hold a million headers
            # `tarfile` takes a file that just stops, or turns into rubbish, for one that is complete.
            stream.seek(tar.offset)
            if stream.read(512) != bytes(512):
                raise tarfile.ReadError("the closing block is missing")


def copy_out(piece: Piece, scratch: Path) -> str:
    """Copy one piece to a file of its own: an archive within an archive. Returns its path."""

    def copy(source: IO[bytes], target: IO[bytes]) -> None:
        source.seek(piece.offset)
        _copy(source, target, piece.num_bytes, piece.num_bytes)

    return kept(piece.file, scratch, copy, str(piece.offset))


def kept(
    path: str, scratch: Path, make: Callable[[IO[bytes], IO[bytes]], None], part: str = "", expected: str = ""
) -> str:
    """Make a flat copy of a file, or of a part of it, where there is none yet; absent or whole. Returns its path.

    Raises:
        Mistake: the file is damaged, as far as `make` can tell.
    """
    stat = os.stat(path)
    name = f"{path}\n{stat.st_size}\n{stat.st_mtime_ns}\n{part}\n{make.__name__}"
    kept = scratch / hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    if not kept.is_file():
        scratch.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".tmp-{os.getpid()}")
        is_damage = damage_is_a_mistake(path, *filter(None, [expected]))
        with open(path, "rb") as source, open(temporary, "wb") as target, is_damage:
            make(source, target)
        temporary.replace(kept)
    return str(kept)


def _gunzip(source: IO[bytes], target: IO[bytes]) -> None:
    with gzip.GzipFile(fileobj=source) as unpacked:
        _copy(unpacked, target, _allowed(source))


def _unzip(source: IO[bytes], target: IO[bytes]) -> None:
    left = _allowed(source)
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                with archive.open(member) as unpacked:
                    left -= _copy(unpacked, target, left, member.file_size)


def _allowed(source: IO[bytes]) -> int:
    return MAX_EXPANSION * os.fstat(source.fileno()).st_size


def _copy(source: IO[bytes] | gzip.GzipFile, target: IO[bytes], allowed: int, expected: int | None = None) -> int:
    copied = 0
    while block := source.read(1 << 20 if expected is None else min(1 << 20, expected - copied)):
        copied += len(block)
        if copied > allowed:
            raise ValueError(f"it unpacks to more than {MAX_EXPANSION} times its size")
        target.write(block)
    if expected is not None and copied != expected:
        raise EOFError(f"a member has {copied:,} bytes instead of {expected:,}")
    return copied


@contextmanager
def damage_is_a_mistake(path: str, *expected: str) -> Iterator[None]:
    """Turn what readers of archives raise at damaged bytes into a `Mistake`; errors of the disk stay what they are.

    Args:
        path: the file, which is named by its first bytes if it is something else altogether.
        expected: what it should be, as `what_is` says it; nothing: one of `ARCHIVES`.
    """
    try:
        yield
    except Mistake:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise Mistake(_damaged(path, error, expected)) from None
    except (
        tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError, RuntimeError, LookupError
    ) as error:  # fmt: skip
        raise Mistake(_damaged(path, error, expected)) from None


def _damaged(path: str, error: Exception, expected: Sequence[str] = ()) -> str:
    if found := _something_else(path, expected or ARCHIVES):
        return found
    return f"{path} is damaged, or not the file it should be ({type(error).__name__}: {error}); fetch it again"


def not_text(start: bytes) -> str | None:
    """Say what a file is that should be lines of text, by its first bytes; None if it may be.

    Text may begin like many a format (`BMW ...`, `<person> ...`, `[a`): it counts where it could be no text.
    """
    what = what_is(start)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16: save it as UTF-8"
    is_binary = re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", start) is not None
    is_page = what is not None and ("web page" in what or "Git LFS" in what or start.lstrip().startswith(b"<?xml"))
    return what if is_page or is_binary else None


def _something_else(path: str, expected: Sequence[str]) -> str | None:
    """Say what is in the place of a file, by its first bytes; None if it may be damaged, or is unfamiliar."""
    try:
        with open(path, "rb") as stream:
            start = stream.read(NUM_BYTES)
        what = what_is(start)
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")  # an old tar begins with a name, such as `BM.jpg`
        return None if ARCHIVES[0] in expected else f"{path} is {ARCHIVES[0]}; expected {' or '.join(expected)}"
    except OSError:
        return None
    except tarfile.TarError:
        pass
    if what is None or what == "empty" or what.endswith("of zero") or what.startswith(tuple(expected)):
        return None
    return f"{path} is {what}; expected {' or '.join(expected)}"


# ---------------------------------------------------------------------------------------------- pickles


def read_pickled_arrays(piece: Piece) -> Any:
    """Read a pickle of dicts, lists, numbers, strings and numpy arrays; anything else in it is refused.

    Nothing that the file names is imported or called. Arrays come as objects with `shape`, `dtype` (a name such as
    `u1`) and `raw` (their bytes); strings of Python 2 come as bytes.

    Raises:
        Mistake: the pickle names anything but the parts of an array, or is damaged.
    """
    if piece.num_bytes > MAX_PICKLE_BYTES:
        raise Mistake(f"{piece.name} has {piece.num_bytes:,} bytes, far more than the official file; fetch it again")
    try:
        return _Unpickler(io.BytesIO(piece.read()), encoding="bytes").load()
    except Mistake as mistake:
        raise Mistake(f"{piece.name} in {piece.file} {mistake}") from None
    except Exception as error:  # a pickle is a program for a small machine; a damaged one may raise anything
        raise Mistake(_damaged(f"{piece.name} in {piece.file}", error)) from None


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """The unpickler written in Python: the one in C can be made to allocate memory without bound."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "ndarray":
                return None  # only ever handed to _reconstruct
            if name == "_reconstruct":
                return lambda *_: _Array()  # made anew each time: a pickle may set attributes of what it is given
            if name == "dtype":
                return lambda name, *_: _Dtype(name=name.decode("ascii") if isinstance(name, bytes) else str(name))
        raise Mistake(
            f"names `{module}.{name}`, which loading it would run; the official file holds arrays, lists and strings "
            "only. Delete it and fetch the official file"
        )


class _Array(SimpleNamespace):
    """Where the official file would make an array."""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, dtype, self.is_fortran, self.raw = state
        self.dtype = dtype.name


class _Dtype(SimpleNamespace):
    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment, which single bytes have not."""
