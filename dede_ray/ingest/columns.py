"""Columns of strangers' tables: which one holds the captions, labels, keys or pictures, and what is in it.

Names are found in any case and spelling (`TEXT`, `alt-text`, `Fine_Label`). What a column holds is asked of its Arrow
type: *text-like* and *bytes-like* are the string and binary types of any width and their views, dictionaries, lists and
structs of them. `as_bytes` turns text into its bytes without looking at them, so that one broken character costs one
row; `text_of`, `picture_of` and `number_of` take a row's value, whatever it is wrapped in.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa

CAPTIONS = (
    "caption", "captions", "text", "texts", "txt", "textlist", "captionlist", "sentence", "sentences", "raw", "prompt",
    "prompts", "alttext", "alt", "captiontext", "imagecaption", "description", "descriptions", "comment", "title",
)  # fmt: skip
LABELS = ("label", "labels", "cls", "class", "classid", "classindex", "classlabel", "target", "targets", "finelabel",
          "category", "categoryid", "coarselabel")  # fmt: skip
SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
PICTURES = ("image", "images", "img", *SUFFIXES, "picture", "photo", "imagebytes", "imgbytes", "bytes", "content")
KEYS = ("key",)  # webdataset's `__key__`
LINKS = ("url", "urls", "imageurl", "imgurl", "link", "imagelink", "src")
FILES = ("filename", "file", "files", "image", "imagename", "imagefile", "imagefilename", "path", "filepath",
         "imagepath")  # fmt: skip
NO_CAPTIONS = {*LINKS, *FILES, *KEYS, *LABELS, "id", "uid", "sampleid", "imageid", "hash", "md5", "sha256", "language",
               "license", "split", "source", "exif"}  # fmt: skip
"""Names of columns whose text is hardly a caption."""


def plain(name: str) -> str:
    """A column's name without case and punctuation: `Alt-Text` -> `alttext`, `__key__` -> `key`."""
    return re.sub(r"[\W_]+", "", name).lower()


def usual(names: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """Those of the names that are among the wanted ones, whatever their case, in the order of the latter."""
    return sorted((name for name in names if plain(name) in wanted), key=lambda name: wanted.index(plain(name)))


# ---------------------------------------------------------------------------------------------------- types


def holds_text(kind: pa.DataType) -> bool:
    """Text, or bytes that may be text."""
    return _holds(kind, lambda one: _is_text(one) or _is_binary(one), None)


def holds_bytes(kind: pa.DataType) -> bool:
    """Encoded files: bytes, or a struct's field `bytes`, as Hugging Face's type Image has it."""
    return _holds(kind, _is_binary, "bytes")


def holds_numbers(kind: pa.DataType) -> bool:
    """Whole numbers, or what may spell them: 3, 3.0, "3", [3]."""
    return not pa.types.is_struct(kind) and _holds(
        kind, lambda one: pa.types.is_integer(one) or pa.types.is_floating(one) or _is_text(one) or _is_binary(one), ""
    )


def is_text(kind: pa.DataType) -> bool:
    """Text alone, as `holds_text` without bytes."""
    return _holds(kind, _is_text, None)


def _holds(kind: pa.DataType, is_one: Callable[[pa.DataType], bool], field: str | None) -> bool:
    """Whether a type is one, or has one inside; of a struct, in this field (None: in any)."""
    if pa.types.is_dictionary(kind):
        return _holds(kind.value_type, is_one, field)
    if _is_list(kind):
        return _holds(kind.value_type, is_one, field)
    if pa.types.is_struct(kind):
        inner = [kind.field(i) for i in range(kind.num_fields)]
        return any(_holds(one.type, is_one, field) for one in inner if field is None or one.name == field)
    return is_one(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- values


def as_bytes(column: pa.Array) -> pa.Array:
    """The same column with its text as bytes, which may be anything; nothing is copied.

    Raises:
        pyarrow.ArrowInvalid: the column's parts do not fit each other, as a damaged or hostile file may have it.
    """
    column.validate()
    with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):  # kinds of lists that have no view yet
        column = column.view(_of_bytes(column.type))
    column.validate(full=True)
    return column


def _of_bytes(kind: pa.DataType) -> pa.DataType:
    if _is_text(kind):
        pairs = ((pa.types.is_string, pa.binary), (pa.types.is_large_string, pa.large_binary))
        return next((make() for is_it, make in pairs if is_it(kind)), pa.binary_view())
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _of_bytes(kind.value_type), kind.ordered)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make_list = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make_list(kind.value_field.with_type(_of_bytes(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(_of_bytes(kind.field(i).type)) for i in range(kind.num_fields)])
    return kind


def text_of(value: Any) -> bytes | None:
    """The text of a row, not decoded: of a list the first that is not empty, of a struct the field of a usual name."""
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    return value if isinstance(value, bytes) else _first(text_of, value, CAPTIONS)


def picture_of(value: Any) -> bytes | None:
    """The encoded picture of a row: of a list the first, of a struct its `bytes`. A path is nothing that we follow."""
    if isinstance(value, bytes):
        return value or None
    return picture_of(value.get("bytes")) if isinstance(value, dict) else _first(picture_of, value, ())


def _first(take: Callable[[Any], bytes | None], value: Any, fields: Sequence[str]) -> bytes | None:
    if isinstance(value, dict):
        named = usual(value, fields)
        value = [value[name] for name in [*named, *(name for name in value if name not in named)]]
    return (
        next((one for one in map(take, value) if one and not one.isspace()), None) if isinstance(value, list) else None
    )


def number_of(value: Any) -> int | None:
    """The number of a row, None where it has none; of a list the first.

    Raises:
        ValueError, TypeError: it is no whole number.
    """
    if isinstance(value, list):
        return number_of(value[0]) if value else None
    if isinstance(value, bytes | str) and not value.strip():
        return None
    if isinstance(value, float):
        if value != value:  # what pandas makes of a missing number
            return None
        if not value.is_integer():
            raise ValueError(f"{value} is no whole number")
    return None if value is None else int(value)


def texts(column: pa.Array) -> list[str | None]:
    """The text of all rows; bytes that are not UTF-8 become lone surrogates, which no file will take."""
    found = map(text_of, as_bytes(column).to_pylist())
    return [None if text is None else text.decode("utf-8", "surrogateescape") for text in found]
