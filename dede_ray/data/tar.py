"""Tars that strangers made, read front to back at a bounded cost; and writing them whole.

    why_no_tar(start)              what is wrong with it, by its first 512 bytes
    open_tar(stream) -> Tar        plain or gzipped; iterate over its members, `read` those you want
    write_whole(path, is_gzipped)  a file that is absent or complete, whatever is killed
    add_member(tar, name, content)

`tarfile` trusts what it reads: a header may ask for terabytes of memory, an extension for quadratic time, gzip data for
a thousand times their size. Here each is bounded by a constant, and any damage raises `tarfile.ReadError`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from dede_ray.data.first_bytes import what_is

MAX_MEMBER_SPAN = 2**40  # a member that claims more bytes is rubbish; no file system would let us step over it
MAX_UNFOLDING = 50  # where a gzipped shard exceeds 64 MB and this many times its own bytes, it ends, as rubbish
MAX_EXTENSION_BYTES = 16_384  # a member's long name or pax header: tarfile needs the square of it, in time and memory
MAX_EXTENSIONS = 8  # such headers before one member


# -------------------------------------------------------------------------------------------------------------- reading


class Tar(tarfile.TarFile):
    """A tar of a stranger's, read front to back: forgets the members behind it, and fails in one way, by ReadError.

    `is_closed`: whether its end was a real one; `tarfile` takes a file that stops without the closing zero block for
    a complete one.
    """

    is_closed = False
    num_extensions = 0

    def next(self) -> tarfile.TarInfo | None:
        try:
            member = super().next()
        except OSError as error:
            raise _of_shard(error) from None
        except (ValueError, LookupError, ArithmeticError, struct.error) as error:  # whatever a damaged header gives
            raise tarfile.ReadError(f"bad header: {error!r}") from None
        self.members.clear()  # type: ignore[attr-defined]
        return member

    def read(self, member: tarfile.TarInfo, most: int = MAX_MEMBER_SPAN) -> bytes:
        """The content of a member that is not sparse, or its first `most` bytes; ReadError where they are not there."""
        stream: Any = self.fileobj
        size = min(member.size, most)
        try:
            stream.seek(member.offset_data)
            content: bytes = stream.read(size)
        except OSError as error:
            raise _of_shard(error) from None
        if len(content) < size:
            raise tarfile.ReadError("unexpected end of data")
        return content

    @property
    def is_gzipped(self) -> bool:
        return isinstance(self.fileobj, _Unfolding)


def _of_shard(error: OSError) -> Exception:
    """What to raise: the error itself where it is the disk's or the network's, not the shard's."""
    return error if error.errno is not None else tarfile.ReadError(str(error))


def open_tar(stream: IO[bytes], tap: Callable[[Any], Any] = lambda source: source) -> Tar:
    """Open a tar, plain or gzipped, at the stream's place.

    Args:
        stream: can seek back what was read of it first.
        tap: wraps the unfolded stream, for a caller that wants to see the bytes that the tar reads.

    Raises:
        tarfile.ReadError: something else begins there.
    """
    start = stream.read(tarfile.BLOCKSIZE)
    stream.seek(-len(start), os.SEEK_CUR)
    source: Any = _Unfolding(stream) if _is_gzip(start) else stream
    return Tar(fileobj=tap(source), tarinfo=TarHeader, encoding="utf-8", errors="surrogateescape")


EMPTY = "holds no members"


def why_no_tar(start: bytes) -> str | None:
    """What is wrong with a tar that begins with these bytes: its first 512, or all; None where nothing is to be seen.

    Where it is closed before its first member, or has no bytes, that is `EMPTY`. What is wrong further in is for the
    reader to count.
    """
    kind = what_is(start)
    if _is_gzip(start):
        try:
            unfolded = zlib.decompressobj(31).decompress(start, tarfile.BLOCKSIZE)
        except zlib.error as error:
            return f"bad gzip data: {error}"
        if len(unfolded) < tarfile.BLOCKSIZE < len(start) + 1:
            return None  # what is there of it says nothing yet
        start, kind = unfolded, None
    if not start.strip(b"\0"):
        return EMPTY
    try:
        header = TarHeader.frombuf(start, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:  # type: ignore[attr-defined]
        return f"no tar: {error}" if kind in (None, "a tar") else f"no tar, but {kind}"
    return None if 0 <= header.size <= MAX_MEMBER_SPAN else f"bad header: a member of {header.size} bytes"


def _is_gzip(start: bytes) -> bool:
    if not start.startswith(b"\x1f\x8b"):
        return False
    try:  # a member's name may begin so, too
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:  # type: ignore[attr-defined]
        return True
    return False


class TarHeader(tarfile.TarInfo):
    """A tar header that asks for no more than a bounded number of bytes, and never to go back.

    Global pax headers are stepped over: what a member is must not depend on where reading began.
    """

    @classmethod
    def fromtarfile(cls, tar: Any) -> TarHeader:
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.is_closed = True
            raise
        if not 0 <= member.size <= MAX_MEMBER_SPAN:
            raise tarfile.ReadError(f"bad header: a member of {member.size} bytes")
        return member  # type: ignore[return-value]

    def _proc_member(self, tar: Any) -> Any:
        if self.type not in _EXTENSIONS:
            tar.num_extensions = 0
            return super()._proc_member(tar)  # type: ignore[misc]
        tar.num_extensions += 1
        if not 0 <= self.size <= MAX_EXTENSION_BYTES or tar.num_extensions > MAX_EXTENSIONS:
            raise tarfile.ReadError(f"bad header: {tar.num_extensions}. extension, {self.size:,} bytes")
        if self.type != tarfile.XGLTYPE:
            return super()._proc_member(tar)  # type: ignore[misc]
        tar.fileobj.read(self._block(self.size))  # type: ignore[attr-defined]
        try:
            return self.fromtarfile(tar)
        except tarfile.HeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None

    def _proc_sparse(self, tar: Any) -> TarHeader:
        """Step over the map of a file with holes."""
        _, is_extended, _ = self._sparse_structs  # type: ignore[attr-defined]
        while is_extended:
            block = tar.fileobj.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("unexpected end of data")
            is_extended = block[504]
        self.offset_data = tar.fileobj.tell()
        tar.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        self._mark_sparse(self)
        return self

    def _mark_sparse(self, member: Any, *_: Any) -> None:
        member.sparse = []

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _mark_sparse


_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Unfolding:
    """The content of a gzipped stream, front to back; a cut simply ends it, rubbish and bombs raise ReadError."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self._start = stream, stream.tell()
        self._inflate, self._pending = zlib.decompressobj(31), b""
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("bad header: points backwards")
        while position > self._position and self.read(min(position - self._position, 1 << 20)):
            pass

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        missing = size
        while missing > 0:
            if self._inflate.eof:  # several gzip files in a row are one stream
                self._inflate, self._pending = zlib.decompressobj(31), self._inflate.unused_data
            folded = self._pending or self._stream.read(1 << 14)
            if not folded:
                break
            try:
                parts.append(self._inflate.decompress(folded, missing))
            except zlib.error as error:
                if not any(parts):
                    raise tarfile.ReadError(f"bad gzip data: {error}") from None
                self._pending = folded  # for the next call to fail on
                break
            self._pending = self._inflate.unconsumed_tail
            missing -= len(parts[-1])
        content = b"".join(parts)
        self._position += len(content)
        if self._position > max(64_000_000, MAX_UNFOLDING * (self._stream.tell() - self._start)):
            raise tarfile.ReadError(f"gzip data unfold to more than {MAX_UNFOLDING} times their size")
        return content


# -------------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def write_whole(path: Path, is_gzipped: bool, buffering: int = -1) -> Iterator[IO[bytes]]:
    """Open a file for writing that is absent or whole, whatever is killed; the same bytes for the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb", buffering) as file:
        if is_gzipped:
            with gzip.GzipFile("", "wb", 6, file, mtime=0) as zipped:  # neither clock time nor name in the header
                yield cast(IO[bytes], zipped)
        else:
            yield file
    temporary.replace(path)


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file to a tar, under a header without owner and clock time."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    header.mode = 0o644
    tar.addfile(header, io.BytesIO(content))
