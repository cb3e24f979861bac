"""Files are named as what their first bytes say."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save

from dede_ray.data.first_bytes import NUM_BYTES, what_is


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return buffer.getvalue()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "a")
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "Git LFS"),
        (b"\n <!DOCTYPE HTML>\n<html>", "web page"),
        (b"\xef\xbb\xbf<html lang=en>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "store answers"),
        (gzip.compress(b"a", mtime=0), "gzip"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "Zstandard"),
        (_tar(), "a tar"),
        (_zip(), "ZIP"),
        (save({"a": torch.zeros(3)}), "safetensors"),
        (b"", "empty"),
        (bytes(100), "100 bytes of zero"),
        (b"\0\0\0\x1cftypavif", "AVIF"),
        (b'{"a": 1}', "JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_familiar_files_are_named(content: bytes, said: str) -> None:
    assert said in (what_is(content[:NUM_BYTES]) or "")


def test_an_unfamiliar_file_is_not_named() -> None:
    assert what_is(b"\x07\x08 something") is None
