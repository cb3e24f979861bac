"""What a file is, by its first bytes, whatever its name says: for messages where something else is in its place.

what_is(b"version https://git-lfs...") -> "a pointer of Git LFS, not the file itself: run `git lfs pull` there"
"""

from __future__ import annotations

import re

NUM_BYTES = 512
"""So many first bytes are enough for `what_is`."""

_MAGIC = {
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard: unpack it first (`unzstd`)",
    b"BZh": "compressed with bzip2: unpack it first (`bunzip2`)",
    b"\xfd7zXZ\x00": "compressed with xz: unpack it first (`unxz`)",
    b"\x04\x22\x4d\x18": "compressed with LZ4: unpack it first (`unlz4`)",
    b"\x1f\x8b": "compressed with gzip: unpack it first (`gunzip`)",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"PK\x03\x04": "a ZIP archive",
    b"PK\x05\x06": "an empty ZIP archive",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"ORC": "an ORC file",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF": "a PDF",
    b"GIF8": "a GIF",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"\0\0\0\x0cjP  ": "a JPEG 2000",
    b"\xff\x0a": "a JPEG XL",
    b"\0\0\0\x0cJXL ": "a JPEG XL",
    b"\xff\xd8\xff": "a JPEG",
    b"\x89PNG": "a PNG",
    b"BM": "a BMP",
    b"\x7fELF": "a program",
    b"\x80": "a Python pickle",
}
_PAGE = re.compile(rb"<(!doctype html|html|head|body)\b", re.IGNORECASE)


def what_is(start: bytes) -> str | None:
    """Name a file by its first `NUM_BYTES` bytes, with what to do about it where that is clear; None if unfamiliar."""
    if not start.strip(b"\0"):
        return f"{len(start):,} bytes of zero" if start else "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: run `git lfs pull` where it came from"
    if start[8:10] in (b'{"', b"{ ", b"{}") and int.from_bytes(start[:8], "little") < 2**32:
        return "safetensors"
    if start[4:8] == b"ftyp":
        return "an AVIF" if start[8:12] in (b"avif", b"avis") else "a HEIC picture, or a film"
    if start[:4] == b"RIFF":
        return "a WebP" if start[8:12] == b"WEBP" else "a RIFF file (sound or film)"
    if start[257:262] == b"ustar":
        return "a tar"
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            return name
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _PAGE.match(text) or (text.startswith(b"<!--") and _PAGE.search(text)):
        return "a web page, as servers give in place of a file that they refuse: download it again, perhaps logged in"
    if text.startswith(b"<svg"):
        return "an SVG drawing"
    if text.startswith(b"<"):
        return "XML, as a store answers in place of a file that it refuses" if b"<Error>" in text else "XML"
    if text.startswith((b"{", b"[")):
        return "JSON"
    return None
