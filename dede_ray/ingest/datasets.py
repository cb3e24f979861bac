"""The standard data sets, each read from its official distribution as it was downloaded.

Archives need not be unpacked: `path` is the folder that holds the official files, or the archive itself. JPEG, PNG,
WEBP and BMP files keep their bytes; arrays, and pictures of other formats, become PNG, which loses nothing. Nothing is
downloaded: where a file is missing, the message says which one and from where.
"""

from __future__ import annotations

import csv
import glob
import importlib.util
import io
import json
import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from pydantic import Field

from dede_ray.data.first_bytes import NUM_BYTES
from dede_ray.data.images import encode_image
from dede_ray.data.shards import BadSample, Limits, Sample
from dede_ray.ingest.archives import (
    Piece,
    copy_out,
    damage_is_a_mistake,
    find_pieces,
    kept,
    look,
    not_text,
    read_pickled_arrays,
    tar_pieces,
)
from dede_ray.ingest.columns import (
    CAPTIONS,
    FILES,
    LABELS,
    LINKS,
    NO_CAPTIONS,
    PICTURES,
    SUFFIXES,
    as_bytes,
    holds_bytes,
    holds_numbers,
    holds_text,
    is_text,
    number_of,
    picture_of,
    plain,
    text_of,
    texts,
    usual,
)
from dede_ray.ingest.sources import Dataset, Digits, Each, Item, Listing
from dede_ray.runtime.config import Mistake, read_json

logger = logging.getLogger(__name__)

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".pbm", ".gif", ".tif", ".tiff")
SIGNATURES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"BM", "bmp"))  # and WEBP, in two parts
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLES = ("a Parquet file", "an Arrow file")  # as `what_is` names them
OTHER_FORMATS = ("PPM", "GIF", "TIFF")  # what Pillow may try before it is written anew as PNG

# ------------------------------------------------------------------------------------------------ pictures


class _Pictures(Dataset):
    """Sources whose items are image files, which lie sorted by class."""

    shuffle: bool = True
    """Mix the classes, which lie one after the other, so that each shard has something of all."""

    def _mixed(self, splits: dict[str, list[Item]], seed: int) -> dict[str, list[Item]]:
        if not self.shuffle:
            return splits
        return {
            split: [items[i] for i in np.random.default_rng(seed).permutation(len(items))]
            for split, items in splits.items()
        }

    def load(self, items: Sequence[Item], limits: Limits) -> Iterator[Sample]:
        """Yield each picture, with its caption where a file of its own holds it."""
        for item in items:
            sample = Sample(item.key, 0, label=item.label)
            caption = item.caption
            if isinstance(caption, Piece) and caption.num_bytes > 4 * limits.max_caption_chars:
                sample.error = "caption_too_long"
            else:
                _set_caption(sample, caption.read() if isinstance(caption, Piece) else caption, limits)
            if sample.error is None and item.num_bytes > limits.max_member_bytes:
                sample.error = "member_too_large"
            if sample.error is None:
                _set_image(sample, Piece("", item.file, item.place, item.num_bytes).read(), limits)
            yield sample


def _set_image(sample: Sample, content: bytes | None, limits: Limits) -> None:
    """Take a picture's bytes as they are if shards may hold them, or as PNG."""
    if content is None:
        sample.error = "no_image"
    elif len(content) > limits.max_member_bytes:
        sample.error = "member_too_large"
    elif content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        sample.image, sample.image_suffix = content, "webp"
    elif suffix := next((suffix for start, suffix in SIGNATURES if content.startswith(start)), None):
        sample.image, sample.image_suffix = content, suffix
    else:
        try:
            sample.image, sample.image_suffix = _as_png(content, limits), "png"
        except BadSample as bad:
            sample.error = bad.reason


def _as_png(content: bytes, limits: Limits) -> bytes:
    """The first frame, upright, pixel for pixel."""
    try:
        with Image.open(io.BytesIO(content), formats=OTHER_FORMATS) as image:
            if image.width * image.height > limits.max_pixels:
                raise BadSample("image_too_large")
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):  # not a mode of PNG
                upright = upright.convert("RGB")
            buffer = io.BytesIO()
            upright.save(buffer, "PNG")
            return buffer.getvalue()
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample("image_too_large") from None
    except Exception as error:  # as in `decode_image`
        raise BadSample("image_truncated" if "truncated" in str(error).lower() else "image_unreadable") from None


def _set_caption(sample: Sample, caption: bytes | str | None, limits: Limits) -> None:
    try:
        text = caption.decode("utf-8").strip() if isinstance(caption, bytes) else caption
        if text is not None:
            text.encode()  # a lone surrogate would not survive the way into a file
    except UnicodeError:
        sample.error = "caption_unreadable"
        return
    if text is not None and len(text) > limits.max_caption_chars:
        sample.error = "caption_too_long"
    else:
        sample.caption = text


def _items(found: Iterable[tuple[str, Piece, int | None, str | Piece | None]]) -> list[Item]:
    """Make items of (name, piece, label, caption); their keys are the names without dots, slashes and the like."""
    used: Counter[str] = Counter()  # `a.jpg` beside `a.png`
    return [
        Item(_plain_key(_stem(name), used), piece.file, piece.offset, piece.num_bytes, label, caption)
        for name, piece, label, caption in found
    ]


def _is_image(piece: Piece) -> bool:
    return piece.name.lower().endswith(IMAGE_FILES) and not piece.base.startswith(".") and "__MACOSX" not in piece.name


class Folders(_Pictures):
    """Folders, tars or zips of pictures: with a sub-folder for each class, or flat, or both.

    A picture's class is the first sub-folder it lies in. Its caption is the text file beside it (`x.jpg`, `x.txt`), or
    the line for it in a file of captions: the named one, or as in Hugging Face's ImageFolder any metadata.csv,
    metadata.jsonl or metadata.parquet, with columns such as `file_name` (seen from there) and `text`. Pictures may have
    class and caption, one of them or neither.
    """

    kind: Literal["folders"] = "folders"
    splits: dict[str, str] = Field(min_length=1)
    """Split name -> its folder, tar or zip."""
    classes: bool = True
    """Whether sub-folders are classes; false: they mean nothing."""
    captions: str | None = None
    """A file in each split's folder: .csv, .tsv or any other name, .jsonl or .parquet, with columns as above or lines
    `file,caption` or `file<tab>caption` (as of Flickr8k); of several captions for one picture the first is taken."""

    def _find(self, seed: int, limits: Limits, scratch: Path, each: Each) -> Listing:
        look(*self.splits.values())
        found = {split: find_pieces(_existing(path), scratch) for split, path in self.splits.items()}
        pictures = {split: [piece for piece in pieces if _is_image(piece)] for split, pieces in found.items()}
        for split, path in self.splits.items():
            if not pictures[split]:
                raise Mistake(f"no pictures in {path} (split {split}); expected files named *{', *'.join(IMAGE_FILES)}")
        classes = sorted({c for pieces in pictures.values() for c in map(self._class_of, pieces) if c is not None})
        label_of = {name: label for label, name in enumerate(classes)}
        splits, notes = {}, Counter[str]()
        for split, pieces in pictures.items():
            captions, said = self._captions(split, found[split])
            notes.update(said)
            splits[split] = _items(
                (p.name, p, label_of.get(self._class_of(p) or ""), captions.get(name, captions.get(_stem(name))))
                for p in pieces
                for name in [posixpath.normpath(p.name)]
            )
        return Listing(self._mixed(splits, seed), [_spaced(name) for name in classes] or None, [*notes])

    def _class_of(self, piece: Piece) -> str | None:
        parts = [part for part in piece.name.split("/") if part not in (".", "")]
        return parts[0] if self.classes and len(parts) > 1 else None

    def _captions(self, split: str, pieces: list[Piece]) -> tuple[dict[str, str | Piece], list[str]]:
        """Captions by the picture's name, or by its name without the suffix; and what to say of them."""
        named = {posixpath.normpath(piece.name): piece for piece in pieces}
        beside: dict[str, str | Piece] = {}
        if self.captions is None:
            beside = {_stem(name): piece for name, piece in named.items() if name.lower().endswith(".txt")}
            tables = [p for p in pieces if p.base.lower() in METADATA and "__MACOSX" not in p.name]
        elif self.captions in named:
            tables = [named[self.captions]]
        else:
            tables = [piece for name, piece in named.items() if name.lower() == self.captions.lower()][:1]
            if not tables:
                raise Mistake(f"no {self.captions} in {self.splits[split]}; correct `captions`, or set it to null")
        names = {one for name, piece in named.items() if _is_image(piece) for one in (name, _stem(name))}
        captions, notes = dict[str, str | Piece](), list[str]()
        for table in tables:
            folder, num_before = table.name[: -len(table.base)], len(captions)
            where = f"{table.name} in {self.splits[split]}"
            lines, said = _caption_lines(table, where, has_header=self.captions is None)
            for file, caption in lines:
                name = posixpath.normpath(folder + file.replace("\\", "/"))
                for one in {name, _stem(name)} & names:
                    captions.setdefault(one, caption)
            notes.append(said)
            if len(captions) == num_before and self.captions is not None:
                raise Mistake(
                    f"{self.captions} in {self.splits[split]} has no line for any picture; expected `file,caption`, or "
                    "columns such as `file_name` and `text`"
                )
            if lines and len(captions) == num_before:
                notes[-1] = f"{table.name} names none of the pictures: no captions are taken from it"
                logger.warning("%s", notes[-1])
        return beside | captions, notes


def _caption_lines(table: Piece, where: str, has_header: bool) -> tuple[list[tuple[str, str]], str]:
    """File and caption of each line of a table that has both, and what to say of its columns.

    Raises:
        Mistake: the table cannot be read.
    """
    content = table.read()
    if what := not_text(content[:NUM_BYTES]):
        if what not in TABLES or not content.startswith(b"PAR1"):
            raise Mistake(f"{where} is {what}; expected lines of text")
        with damage_is_a_mistake(table.file, *TABLES):
            wanted = [n for n in pq.read_schema(pa.BufferReader(content)).names if plain(n) in (*FILES, *CAPTIONS)]
            rows = pq.read_table(pa.BufferReader(content), columns=wanted).to_pylist()
    else:
        try:
            lines = list(io.StringIO(content.decode("utf-8-sig"), newline=""))
            rows = _lines_of(lines, table.name, where, has_header)
        except (UnicodeDecodeError, csv.Error) as error:
            raise Mistake(f"{where} cannot be read as text: {error}") from None
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = []
    files = usual(names, FILES) + [name for name in names if plain(name).endswith("filename")]
    captions = [name for name in usual(names, CAPTIONS) if any(text_of(row.get(name)) for row in rows)]
    for row in rows if files and captions else []:
        caption = text_of(row.get(captions[0]))
        if isinstance(row.get(files[0]), str) and caption is not None:
            found.append((row[files[0]], caption.decode("utf-8", "surrogateescape").strip()))
    unused = [name for name in names if name not in (*files[:1], *captions[:1])]
    said = f"captions from `{captions[0]}` of {table.name}" if found else f"no captions in {table.name}"
    return found, f"{said}; unused: {', '.join(unused)}" if unused else said


def _lines_of(lines: list[str], name: str, where: str, has_header: bool) -> list[dict[str, Any]]:
    """The rows of JSON lines, or of CSV or TSV; where there need be no header, lines are `file,caption`."""
    if name.lower().endswith((".json", ".jsonl")):
        return list(_json_lines(lines, where))
    fields = [row for row in csv.reader(lines, delimiter="\t" if lines and "\t" in lines[0] else ",") if row]
    header = fields[0] if fields else []
    if not (has_header or (usual(header, FILES) and usual(header, CAPTIONS))):
        return [{"file": row[0], "caption": row[1]} for row in fields if len(row) > 1]
    return [dict(zip(header, row, strict=False)) for row in fields[1:]]


def _json_lines(lines: list[str], where: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise Mistake(
                    f"line {number} of {where} is no JSON: {error}; expected one object in each line"
                ) from None
            if isinstance(row, dict):
                yield row


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _existing(path: str) -> str:
    if not os.path.exists(path):
        raise Mistake(f"no file or folder at {path} (looked from {Path.cwd()}); correct the path")
    return path


class ImageNet(_Pictures):
    """ImageNet, ILSVRC 2012: `train` and `val`.

    Official: ILSVRC2012_img_train.tar (a tar of one tar per class), ILSVRC2012_img_val.tar and
    ILSVRC2012_devkit_t12.tar.gz, from https://image-net.org/download. Instead of a tar there may be a folder `train` or
    `val` of `<wnid>/*.JPEG` or `<wnid>.tar`, and instead of the devkit's archive its folder. Labels number the sorted
    WordNet ids. The devkit gives the labels of a flat `val` and the names of a subset of classes; all 1,000 have the
    names that CLIP's authors gave them.
    """

    kind: Literal["imagenet"] = "imagenet"
    path: str
    """Folder with the official files, or with the folders train/ and val/; one of the two splits may be absent."""

    official: ClassVar[str] = "ILSVRC2012_devkit_t12.tar.gz from https://image-net.org/download"

    def _find(self, seed: int, limits: Limits, scratch: Path, each: Each) -> Listing:
        folder = Path(_existing(self.path))
        look(*(folder / f"ILSVRC2012_{name}" for name in ("devkit_t12.tar.gz", "img_train.tar", "img_val.tar")))
        devkit = _read_devkit(folder, scratch)
        splits: dict[str, list[tuple[str, Piece]]] = {}
        for split in ("train", "val"):
            for place in (folder / f"ILSVRC2012_img_{split}.tar", folder / split):
                if place.exists() and split not in splits:
                    splits[split] = list(self._by_wnid(find_pieces(place, scratch), devkit))
        if not any(splits.values()):
            raise Mistake(
                f"{folder} has neither ILSVRC2012_img_train.tar nor ILSVRC2012_img_val.tar, nor folders train/ or val/ "
                "with pictures; get them from https://image-net.org/download"
            )
        wnids = sorted({wnid for found in splits.values() for wnid, _ in found})
        label_of = {wnid: label for label, wnid in enumerate(wnids)}
        items = {split: _items((p.base, p, label_of[w], None) for w, p in found) for split, found in splits.items()}
        return Listing(self._mixed(items, seed), _imagenet_names(wnids, devkit, folder))

    def _by_wnid(self, pieces: list[Piece], devkit: _Devkit | None) -> Iterator[tuple[str, Piece]]:
        for piece in pieces:
            if match := re.fullmatch(r"(?:.*/)?(n\d{8})\.tar", piece.name):
                for inner in tar_pieces(piece.file, piece.offset, piece.num_bytes):
                    if _is_image(inner):
                        yield match[1], inner
            elif not _is_image(piece):
                continue
            elif match := re.fullmatch(r"(?:.*/)?(n\d{8})/[^/]+", piece.name):
                yield match[1], piece
            elif match := re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", piece.name):
                if devkit is None:
                    raise Mistake(
                        f"the labels of {piece.base} and its like are in the devkit, which is not in {self.path}; get "
                        f"{self.official}"
                    )
                if not 1 <= int(match[1]) <= len(devkit.truth):
                    raise Mistake(f"{piece.name} has no line among the {len(devkit.truth):,} labels of the devkit")
                yield devkit.truth[int(match[1]) - 1], piece


class _Devkit:
    """Content of the development kit: the ids of the classes, their words, and the class of each validation image."""

    def __init__(self, meta: IO[bytes], truth: str):
        synsets = _read_mat(meta, "synsets")["synsets"].ravel()
        number_of = [int(np.ravel(row["ILSVRC2012_ID"])[0]) for row in synsets]
        wnid_of = {n: str(np.ravel(row["WNID"])[0]) for n, row in zip(number_of, synsets, strict=True)}
        leaves = [row for row in synsets if int(np.ravel(row["num_children"])[0]) == 0]
        self.words = {str(np.ravel(r["WNID"])[0]): str(np.ravel(r["words"])[0]).partition(",")[0] for r in leaves}
        self.truth = [wnid_of[int(line)] for line in truth.split()]


def _read_devkit(folder: Path, scratch: Path) -> _Devkit | None:
    for name in ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12"):
        if (folder / name).exists():
            where = str(folder / name)
            found = {piece.base: piece for piece in find_pieces(where, scratch)}
            meta, truth = _needed(found, ["meta.mat", "ILSVRC2012_validation_ground_truth.txt"], where, ImageNet)
            with damage_is_a_mistake(where):
                return _Devkit(io.BytesIO(meta.read()), truth.read().decode("ascii"))
    return None


def _imagenet_names(wnids: list[str], devkit: _Devkit | None, folder: Path) -> list[str]:
    """CLIP's names, by the rank of the id among all 1,000; for other sets of classes the words of the devkit."""
    known = sorted(devkit.words) if devkit is not None else wnids
    if len(known) == 1000 and set(wnids) <= set(known):
        names = dict(zip(known, _clip_imagenet_names(), strict=True))
    elif devkit is not None and set(wnids) <= set(known):
        names = devkit.words
    else:
        raise Mistake(
            f"{folder} holds {len(wnids):,} classes ({wnids[0]} ...), and only the names of all 1,000 are known by "
            "their order; put ILSVRC2012_devkit_t12.tar.gz from https://image-net.org/download beside them"
        )
    return [names[wnid] for wnid in wnids]


def _clip_imagenet_names() -> Sequence[str]:
    """open_clip ships them in the order of the sorted ids; its one module without torch is loaded alone."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None, "open_clip is a requirement"
    assert package.submodule_search_locations is not None
    path = os.path.join(package.submodule_search_locations[0], "zero_shot_metadata.py")
    spec = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.IMAGENET_CLASSNAMES


class Caltech101(_Pictures):
    """Caltech-101: one split, `train`, of the 101 classes; the clutter class BACKGROUND_Google is left out.

    Official: caltech-101.zip from https://data.caltech.edu/records/mzrjq-6wc02, the 101_ObjectCategories.tar.gz within
    it, or its folder 101_ObjectCategories of `<class>/image_0001.jpg`.
    """

    kind: Literal["caltech101"] = "caltech101"
    path: str
    """One of the official archives, or the folder that holds one, or 101_ObjectCategories unpacked."""

    official: ClassVar[str] = "caltech-101.zip from https://data.caltech.edu/records/mzrjq-6wc02"

    def _find(self, seed: int, limits: Limits, scratch: Path, each: Each) -> Listing:
        pieces = find_pieces(_archive(self.path, "caltech-101.zip", "101_ObjectCategories.tar.gz"), scratch)
        if inner := next((piece for piece in pieces if piece.base == "101_ObjectCategories.tar.gz"), None):
            pieces = find_pieces(copy_out(inner, scratch), scratch)
        found = [
            (piece.name.split("/")[-2], piece)
            for piece in pieces
            if re.search(r"[^/]/image_\d+\.jpg$", piece.name) and _is_image(piece)
        ]
        classes = sorted({name for name, _ in found} - {"BACKGROUND_Google"})
        if not classes:
            raise Mistake(f"{self.path} has no pictures such as accordion/image_0001.jpg; get {self.official}")
        label_of = {name: label for label, name in enumerate(classes)}
        items = _items((f"{c}/{p.base}", p, label_of[c], None) for c, p in found if c in label_of)
        return Listing(self._mixed({"train": items}, seed), [_spaced(name) for name in classes])


class GTSRB(_Pictures):
    """The German Traffic Sign Recognition Benchmark: `train`, and `test` where it is there. PPM becomes PNG.

    Official, from https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/published-archive.html:
    GTSRB_Final_Training_Images.zip or GTSRB-Training_fixed.zip (`00014/00003_00029.ppm`, and a csv for each class,
    whose ClassId is the folder's number), GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip (GT-final_test.csv).
    """

    kind: Literal["gtsrb"] = "gtsrb"
    path: str
    """Folder with the official zips, or with what they hold."""

    official: ClassVar[str] = (
        "GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip from "
        "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/published-archive.html"
    )
    class_names: ClassVar[list[str]] = [
        *(f"{limit} km/h speed limit" for limit in (20, 30, 50, 60, 70, 80)),
        "end of 80 km/h speed limit", "100 km/h speed limit", "120 km/h speed limit", "no overtaking",
        "no overtaking by trucks", "right of way at the next crossing", "priority road", "give way", "stop",
        "no vehicles", "no trucks", "no entry", "danger", "dangerous bend to the left", "dangerous bend to the right",
        "double bend", "bumpy road", "slippery road", "road narrowing on the right", "road works", "traffic lights",
        "pedestrians", "children crossing", "bicycles crossing", "ice or snow", "wild animals crossing",
        "end of all restrictions", "turn right ahead", "turn left ahead", "ahead only", "ahead or right",
        "ahead or left", "keep right", "keep left", "roundabout", "end of no overtaking",
        "end of no overtaking by trucks",
    ]  # fmt: skip

    def _find(self, seed: int, limits: Limits, scratch: Path, each: Each) -> Listing:
        pieces = find_pieces(_existing(self.path), scratch)
        if not any(piece.base.endswith(".ppm") for piece in pieces):
            zips = {piece.base: piece.file for piece in pieces if piece.base.endswith(".zip")}
            look(*zips.values())
            training = zips.get("GTSRB_Final_Training_Images.zip") or zips.get("GTSRB-Training_fixed.zip")
            for file in (training, zips.get("GTSRB_Final_Test_Images.zip"), zips.get("GTSRB_Final_Test_GT.zip")):
                pieces += find_pieces(file, scratch) if file else []
        train = [
            (f"{match[1]}_{match[2]}", piece, self._label(match[1], piece), None)
            for piece in pieces
            if (match := re.search(r"(?:^|/)(\d{5})/(\d{5}_\d{5}\.ppm)$", piece.name))
        ]
        if not train:
            raise Mistake(f"{self.path} has no training images such as 00000/00000_00000.ppm; get {self.official}")
        splits = {"train": _items(train)}
        if test := [piece for piece in pieces if re.search(r"(?:^|/)\d{5}\.ppm$", piece.name)]:
            (truth,) = _needed({p.base: p for p in pieces}, ["GT-final_test.csv"], self.path, GTSRB)
            with damage_is_a_mistake(truth.file):
                rows = csv.DictReader(io.StringIO(truth.read().decode("ascii")), delimiter=";")
                label_of = {row["Filename"]: self._label(row["ClassId"], truth) for row in rows}
                splits["test"] = _items((piece.base, piece, label_of[piece.base], None) for piece in test)
        return Listing(self._mixed(splits, seed), self.class_names)

    def _label(self, text: str, piece: Piece) -> int:
        if not text.isdecimal() or int(text) >= len(self.class_names):
            raise Mistake(f"{piece.name} in {self.path} is of class {text}; GTSRB has the classes 0 to 42")
        return int(text)


# -------------------------------------------------------------------------------------------------- arrays


class _Pixels(Dataset):
    """Sources whose items are the pixels of one image, somewhere in a large file."""

    path: str
    """The official archive, or the folder that holds it or its files."""

    def load(self, items: Sequence[Item], limits: Limits) -> Iterator[Sample]:
        """Yield each image as PNG."""
        for file, group in groupby(items, key=lambda item: item.file):
            with open(file, "rb") as stream:
                for item in group:
                    stream.seek(item.place)
                    pixels = np.frombuffer(stream.read(item.num_bytes), np.uint8)
                    yield Sample(item.key, 0, encode_image(self._image(pixels), "png"), "png", label=item.label)

    @staticmethod
    def _image(pixels: np.ndarray) -> np.ndarray:
        """CIFAR's order: all red values, row by row, then green, then blue."""
        return np.ascontiguousarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0))


def _archive(path: str, *names: str) -> str:
    """The official archive where a folder holds it, or the path itself."""
    for name in names:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    return _existing(path)


def _needed(found: dict[str, Piece], names: list[str], where: str, kind: type[Dataset]) -> list[Piece]:
    if lacking := [name for name in names if name not in found]:
        official = getattr(kind, "official", "the official files (see its docstring)")
        raise Mistake(f"{where} lacks {', '.join(lacking)}; get {official}")
    return [found[name] for name in names]


def _numbered(split: str, records: Iterable[tuple[str, int, int | None]], num_bytes: int) -> list[Item]:
    """Items of (file, byte, label)."""
    return [Item(f"{split}_{i:06d}", file, at, num_bytes, label) for i, (file, at, label) in enumerate(records)]


def _records(piece: Piece, size: int, label_at: int, num_classes: int) -> Iterator[tuple[str, int, int]]:
    """Yield (file, byte, label) of a file of records of `size` bytes: labels, then the values of 32x32 pixels."""
    content = np.frombuffer(piece.read(), np.uint8)
    if len(content) == 0 or len(content) % size:
        raise Mistake(f"{piece.name} in {piece.file} has {len(content):,} bytes, no multiple of {size}; fetch it again")
    labels = content[label_at::size]
    if labels.max() >= num_classes:
        raise Mistake(f"{piece.name} in {piece.file} holds label {labels.max()}, expected 0 to {num_classes - 1}")
    for i, label in enumerate(labels.tolist()):
        yield piece.file, piece.offset + (i + 1) * size - 3072, label


def _pickled(piece: Piece, key: bytes, num_classes: int) -> Iterator[tuple[str, int, int]]:
    """Yield (file, byte, label) of CIFAR's Python version: the pickle holds the array's bytes unchanged."""
    content = read_pickled_arrays(piece)
    array: Any = content.get(b"data") if isinstance(content, dict) else None
    labels: Any = content.get(key) if isinstance(content, dict) else None
    is_official = (
        isinstance(labels, list)
        and all(isinstance(label, int) and 0 <= label < num_classes for label in labels)
        and getattr(array, "shape", None) == (len(labels), 3072)
        and (array.dtype, bool(array.is_fortran)) == ("u1", False)
        and isinstance(array.raw, bytes)
        and len(array.raw) == 3072 * len(labels) > 0
    )
    start = piece.read().find(array.raw) if is_official else -1
    if start < 0:
        raise Mistake(
            f"{piece.name} in {piece.file} is not as the official file: expected `data` of 3,072 bytes a row and "
            f"`{key.decode()}` from 0 to {num_classes - 1}; fetch it again"
        )
    for i, label in enumerate(labels):
        yield piece.file, piece.offset + start + 3072 * i, label


class Cifar10(_Pixels):
    """CIFAR-10 (Krizhevsky, 2009): `train` 50,000 and `test` 10,000 images of 32x32.

    Official, from https://www.cs.toronto.edu/~kriz/cifar.html: cifar-10-python.tar.gz (data_batch_1 to 5, test_batch;
    pickles, of which only arrays, lists and strings are read) or cifar-10-binary.tar.gz (the same with .bin).
    """

    kind: Literal["cifar10"] = "cifar10"
    official: ClassVar[str] = (
        "cifar-10-python.tar.gz or cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"
    )
    class_names: ClassVar[list[str]] = [
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ]  # fmt: skip

    def _find(self, seed: int, limits: Limits, scratch: Path, each: Each) -> Listing:
        archive = _archive(self.path, "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
        found = {piece.base: piece for piece in find_pieces(archive, scratch)}
        suffix = ".bin" if "test_batch.bin" in found else ""
        files = {"train": [f"data_batch_{n}{suffix}" for n in range(1, 6)], "test": [f"test_batch{suffix}"]}
        splits = {}
        for split, names in files.items():
            pieces = _needed(found, names, archive, Cifar10)
            read = (_records(p, 3073, 0, 10) if suffix else _pickled(p, b"labels", 10) for p in pieces)
            splits[split] = _numbered(split, (record for records in read for record in records), 3072)
        return Listing(splits, self.class_names)


class Cifar100(_Pixels):
    """CIFAR-100 (Krizhevsky, 2009): `train` 50,000 and `test` 10,000 images of 32x32.

    Official, from https://www.cs.toronto.edu/~kriz/cifar.html: cifar-100-python.tar.gz (train, test, meta; pickles, of
    which only arrays, lists and strings are read) or cifar-100-binary.tar.gz (train.bin, test.bin, *_label_names.txt).
    """

    kind: Literal["cifar100"] = "cifar100"
    labels: Literal["fine", "coarse"] = "fine"
    """The 100 classes, or the 20 superclasses."""

    official: ClassVar[str] = (
        "cifar-100-python.tar.gz or cifar-100-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"
    )

    def _find(self, seed: int, limits: Limits, scratch: Path, each: Each) -> Listing:
        archive = _archive(self.path, "cifar-100-python.tar.gz", "cifar-100-binary.tar.gz")
        found = {piece.base: piece for piece in find_pieces(archive, scratch)}
        is_fine, splits = self.labels == "fine", {}
        num_classes = 100 if is_fine else 20
        if "train.bin" in found:
            *pieces, words = _needed(
                found, ["train.bin", "test.bin", f"{self.labels}_label_names.txt"], archive, Cifar100
            )
            names: Any = words.read().split()
        else:
            *pieces, meta = _needed(found, ["train", "test", "meta"], archive, Cifar100)
            content = read_pickled_arrays(meta)
            names = content.get(f"{self.labels}_label_names".encode()) if isinstance(content, dict) else None
        if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(n, bytes) for n in names):
            raise Mistake(f"{archive} does not name {num_classes} {self.labels} classes; get {self.official}")
        for split, piece in zip(("train", "test"), pieces, strict=True):
            records = (
                _records(piece, 3074, int(is_fine), num_classes)
                if piece.base.endswith(".bin")
                else _pickled(piece, f"{self.labels}_labels".encode(), num_classes)
            )
            splits[split] = _numbered(split, records, 3072)
        return Listing(splits, [_spaced(name.decode("utf-8", "backslashreplace")) for name in names])


class STL10(_Pixels):
    """STL-10 (Coates, Ng and Lee, 2011): `train` 5,000, `test` 8,000 and `unlabeled` 100,000 images of 96x96.

    Official: stl10_binary.tar.gz from https://cs.stanford.edu/~acoates/stl10/ (train_X.bin, train_y.bin, test_X.bin,
    test_y.bin, unlabeled_X.bin). Unlabelled images get neither label nor caption. `unlabeled` may be absent.
    """

    kind: Literal["stl10"] = "stl10"
    official: ClassVar[str] = "stl10_binary.tar.gz from https://cs.stanford.edu/~acoates/stl10/"
    class_names: ClassVar[list[str]] = [
        "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
    ]  # fmt: skip

    def _find(self, seed: int, limits: Limits, scratch: Path, each: Each) -> Listing:
        archive = _archive(self.path, "stl10_binary.tar.gz")
        found = {piece.base: piece for piece in find_pieces(archive, scratch)}
        size, splits = 3 * 96 * 96, {}
        for split in ("train", "test", "unlabeled"):
            if split == "unlabeled" and "unlabeled_X.bin" not in found:
                continue
            (images,) = _needed(found, [f"{split}_X.bin"], archive, STL10)
            num, rest = divmod(images.num_bytes, size)
            if rest or not num:
                raise Mistake(f"{images.name} in {archive} has {images.num_bytes:,} bytes, no multiple of {size:,}")
            labels: list[int | None] = [None] * num
            if split != "unlabeled":
                (truth,) = _needed(found, [f"{split}_y.bin"], archive, STL10)
                labels = [value - 1 for value in truth.read()]
                if len(labels) != num or not {*labels} <= {*range(10)}:
                    raise Mistake(f"{truth.name} in {archive} should hold {num:,} labels from 1 to 10; fetch it again")
            records = ((images.file, images.offset + i * size, label) for i, label in enumerate(labels))
            splits[split] = _numbered(split, records, size)
        return Listing(splits, self.class_names)

    @staticmethod
    def _image(pixels: np.ndarray) -> np.ndarray:
        """Column by column, one colour after the other."""
        return np.ascontiguousarray(pixels.reshape(3, 96, 96).transpose(2, 1, 0))


class SVHN(_Pixels):
    """Street View House Numbers (Netzer et al., 2011), cropped digits of 32x32: `train`, `test`, and `extra` if there.

    Official: train_32x32.mat, test_32x32.mat and extra_32x32.mat from http://ufldl.stanford.edu/housenumbers/. Their
    label 10 is the digit zero, here class 0. A file's images are all in memory once, before the shards are made.
    """

    kind: Literal["svhn"] = "svhn"
    official: ClassVar[str] = "train_32x32.mat and test_32x32.mat from http://ufldl.stanford.edu/housenumbers/"

    def _find(self, seed: int, limits: Limits, scratch: Path, each: Each) -> Listing:
        found = {piece.base: piece for piece in find_pieces(_existing(self.path), scratch)}
        _needed(found, ["train_32x32.mat", "test_32x32.mat"], self.path, SVHN)
        splits = {}
        for split in ("train", "test", "extra"):
            if piece := found.get(f"{split}_32x32.mat"):
                flat = kept(piece.file, scratch, _svhn_records, expected="a MATLAB 5 file")
                records = _records(Piece(piece.name, flat, 0, os.path.getsize(flat)), 3073, 0, 10)
                splits[split] = _numbered(split, records, 3072)
        return Listing(splits, Digits.class_names)

    @staticmethod
    def _image(pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(32, 32, 3)


def _svhn_records(source: IO[bytes], target: IO[bytes]) -> None:
    """Write what scipy reads as records of a label and the pixels of one image, row by row."""
    content = _read_mat(source, "X", "y")
    image_HWCB, label_B = content["X"], content["y"].ravel()
    if image_HWCB.dtype != np.uint8 or image_HWCB.shape != (32, 32, 3, len(label_B)):
        raise ValueError(f"X is {image_HWCB.dtype} {image_HWCB.shape}, expected uint8 (32, 32, 3, {len(label_B)})")
    if label_B.dtype.kind not in "uif" or not np.isin(label_B, np.arange(1, 11)).all():
        raise ValueError("y should hold labels from 1 to 10")
    for start in range(0, len(label_B), 1000):
        part = slice(start, start + 1000)
        pixels = image_HWCB[..., part].transpose(3, 0, 1, 2).reshape(-1, 3072)
        target.write(np.hstack([(label_B[part, None] % 10).astype(np.uint8), pixels]).tobytes())


def _read_mat(stream: IO[bytes], *names: str) -> dict[str, np.ndarray]:
    import scipy.io

    try:
        content = scipy.io.loadmat(stream, variable_names=names)
    except Exception as error:  # scipy raises whatever its parser meets
        raise ValueError(f"not a MATLAB 5 file: {error}") from None
    if lacking := [name for name in names if not isinstance(content.get(name), np.ndarray)]:
        raise ValueError(f"it has no {lacking[0]}")
    return content


# -------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class _Columns:
    """Which columns of a table are used, and for what."""

    images: list[str]
    caption: str | None
    label: str | None
    key: str | None
    said: str
    """Of these and the others, for the summary."""
    warned: str | None


class _Table(Dataset):
    """Sources whose items are rows: encoded images in one column, captions and labels in others."""

    image: str | None = None
    """Column of encoded images (bytes, or `bytes` within a struct); null: the first of a usual name, or the first that
    holds such. Of several named as files are (jpg, png) a row has one."""
    caption: str | None = None
    """Column of captions; null: one of a usual name (caption, text, TXT, alt_text, prompt ...), if there is one. Of a
    list the first that is not empty is taken."""
    label: str | None = None
    """Column of labels, whole numbers; null: the first of Hugging Face's type ClassLabel, or one of a usual name
    (label, cls, class, target, fine_label ...), if any."""

    def _rows(self, splits: dict[str, list[str]], names: list[str] | None) -> Listing:
        """List the rows of the files of each split; class names are what the files say, unless given."""
        columns: dict[str, _Columns] = {}
        for file in (file for files in splits.values() for file in files):  # all, before the first row is read
            with damage_is_a_mistake(file, *TABLES):
                schema = _schema(file)
                columns[file] = self._columns(schema, file)
                names = names or _class_names(schema, columns[file].label)
        notes = Counter(note for one in columns.values() for note in (one.said, one.warned) if note is not None)
        for warning in {one.warned for one in columns.values()} - {None}:
            logger.warning("%s", warning)
        found: dict[str, list[Item]] = {}
        for split, files in splits.items():
            found[split] = []
            keys: Counter[str] = Counter()
            for file in files:
                with damage_is_a_mistake(file, *TABLES):
                    labels, row_keys = _listed(file, columns[file])
                if columns[file].label is not None and labels and set(labels) <= {None, _NO_NUMBER}:
                    if self.label is not None and _NO_NUMBER in labels:
                        kind = _short(_schema(file).field(self.label).type)
                        raise Mistake(
                            f"{file}: the column {self.label!r} holds {kind}, expected integers; no row has one"
                        )
                    if _NO_NUMBER in labels:
                        notes[f"`{columns[file].label}` holds no whole numbers: no labels are taken from it"] += 1
                        labels = [None] * len(labels)
                for row, (label, row_key) in enumerate(zip(labels, row_keys, strict=True)):
                    label = None if label == -1 else label  # Hugging Face's "no label"
                    is_bad = label is not None and not 0 <= label < (2**31 if names is None else len(names))
                    key = _plain_key(row_key, keys) if row_key else f"{split}_{len(found[split]):08d}"
                    item = Item(key, file, row, label=None if is_bad else label)
                    found[split].append(item._replace(error="label_unreadable") if is_bad else item)
        several = len({one.said for one in columns.values()}) > 1
        return Listing(found, names, [f"{note} ({n:,} files)" if several else note for note, n in notes.items()])

    def _columns(self, schema: pa.Schema, file: str) -> _Columns:
        """The columns of image, caption, label and key."""
        kinds = dict(zip(schema.names, schema.types, strict=True))
        for name in (self.image, self.caption, self.label):
            if name is not None and name not in kinds:
                raise Mistake(f"{file} has no column {name!r}; it has {', '.join(schema.names)}")
        features = _features(schema)
        images = self._images(kinds, features, file)
        rest = {name: kind for name, kind in kinds.items() if name not in images}
        caption = self.caption or next((n for n in usual(rest, CAPTIONS) if holds_text(rest[n])), None)
        if caption is not None and not holds_text(kinds[caption]):
            raise Mistake(f"{file}: the column {caption!r} holds {_short(kinds[caption])}, expected text")
        labels = [name for name in schema.names if features.get(name) == "ClassLabel"] + usual(rest, LABELS)
        label = self.label or next((n for n in labels if n != caption and holds_numbers(kinds[n])), None)
        if label is not None and not holds_numbers(kinds[label]):
            raise Mistake(f"{file}: the column {label!r} holds {_short(kinds[label])}, expected integers")
        key = next((name for name in rest if name.lower() == "__key__" and is_text(rest[name])), None)
        used: dict[str, list[Any]] = {"images": images, "keys": [key], "captions": [caption], "labels": [label]}
        said = ", ".join(f"{what} from `{'`, `'.join(map(str, n))}`" for what, n in used.items() if n != [None])
        taken = {name for columns in used.values() for name in columns}
        if unused := [name for name in schema.names if name not in taken]:
            said += f"; unused: {', '.join(unused)}"
        with_text = [n for n in unused if is_text(kinds[n]) and plain(n) not in NO_CAPTIONS and not n.startswith("__")]
        warned = f"no captions, although `{'`, `'.join(with_text)}` holds text: name it as `caption`"
        for name in taken - {None}:
            if schema.names.count(str(name)) > 1:
                raise Mistake(f"{file} has several columns named {name!r}; rename them, or name another")
        return _Columns(images, caption, label, key, said, warned if caption is None and with_text else None)

    def _images(self, kinds: dict[str, pa.DataType], features: dict[str, Any], file: str) -> list[str]:
        """The column of pictures; several where each is named as a file's suffix."""
        listing = ", ".join(f"{name} ({_short(kind)})" for name, kind in kinds.items())
        if self.image is not None:
            if not holds_bytes(kinds[self.image]):
                kind = _short(kinds[self.image])
                raise Mistake(
                    f"{file}: the column {self.image!r} holds {kind}, expected encoded images; it has {listing}"
                )
            return [self.image]
        noted = [name for name in kinds if features.get(name) == "Image"]
        found = [n for n in dict.fromkeys([*noted, *usual(kinds, PICTURES), *kinds]) if holds_bytes(kinds[n])]
        if not found:
            links = "" if not usual(kinds, LINKS) else "; a list of links is a source of `kind: urls`"
            raise Mistake(f"{file} has no column of encoded images, only {listing}; name it as `image`{links}")
        return [name for name in found if plain(name) in SUFFIXES] if plain(found[0]) in SUFFIXES else found[:1]

    def load(self, items: Sequence[Item], limits: Limits) -> Iterator[Sample]:
        """Yield the rows' images and captions."""
        for file, group in groupby(items, key=lambda item: item.file):
            wanted = {item.place: item for item in group}
            with damage_is_a_mistake(file, *TABLES):
                columns = self._columns(_schema(file), file)
                names = [*columns.images, *([columns.caption] if columns.caption is not None else [])]
                for start, batch in _batches(file, names, min(wanted), max(wanted) + 1):
                    for row in range(len(batch)):
                        if item := wanted.get(start + row):
                            values = {name: batch[name][row].as_py() for name in names}
                            yield self._sample(item, values, columns, limits)

    def _sample(self, item: Item, values: dict[str, Any], columns: _Columns, limits: Limits) -> Sample:
        sample = Sample(item.key, 0, label=item.label, error=item.error)
        if sample.error is None:
            _set_caption(sample, text_of(values.get(columns.caption or "")), limits)
        if sample.error is None:
            found = (picture_of(values[name]) for name in columns.images)
            _set_image(sample, next((content for content in found if content is not None), None), limits)
        return sample


_NO_NUMBER = -2
"""In place of a label that is none."""


def _short(kind: pa.DataType) -> str:
    return text if len(text := str(kind)) < 80 else text[:77] + "..."


def _plain_key(text: str, used: Counter[str]) -> str:
    """A key without dots, slashes and the like; one that is there already is numbered."""
    key = re.sub(r"[^\w-]+", "_", text).strip("_") or "image"
    used[key] += 1
    return key if used[key] == 1 else f"{key}@{used[key]}"


def _is_parquet(file: str) -> bool:
    return file.endswith(".parquet")


def _schema(file: str) -> pa.Schema:
    if _is_parquet(file):
        return pq.read_schema(file)
    with pa.memory_map(file) as source, pa.ipc.open_stream(source) as reader:
        return reader.schema


def _batches(file: str, columns: list[str], start: int, stop: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield (first row, batch), a few rows at a time, for all rows from `start` to `stop`, perhaps some around them."""
    first = 0
    if _is_parquet(file):
        with pq.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(group).num_rows
                if first < stop and first + num_rows > start:
                    at = first
                    for batch in table.iter_batches(64, [group], columns, use_threads=False):
                        yield at, _checked(batch)
                        at += len(batch)
                first += num_rows
        return
    with pa.memory_map(file) as source, pa.ipc.open_stream(source) as reader:
        for whole in reader:
            if first >= stop:
                return
            if first + len(whole) > start:
                yield first, _checked(whole.select(columns))
            first += len(whole)


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """With text as bytes; offsets of a hostile file may point anywhere."""
    if not batch.num_columns:  # made anew it would forget how many rows it has
        return batch
    return pa.RecordBatch.from_arrays([as_bytes(column) for column in batch.columns], names=batch.schema.names)


def _listed(file: str, columns: _Columns) -> tuple[list[int | None], list[str | None]]:
    """Labels and keys of all rows; `_NO_NUMBER` for a label that is none."""
    names = [name for name in (columns.label, columns.key) if name is not None]
    labels: list[int | None] = []
    keys: list[str | None] = []
    if not names and _is_parquet(file):
        num_rows = pq.read_metadata(file).num_rows
        return [None] * num_rows, [None] * num_rows
    for _, batch in _batches(file, names, 0, 2**63):
        nothing = [None] * batch.num_rows
        labels += nothing if columns.label is None else map(_label_of, batch[columns.label].to_pylist())
        keys += nothing if columns.key is None else texts(batch[columns.key])
    return labels, keys


def _label_of(value: Any) -> int | None:
    try:
        return number_of(value)
    except (ValueError, TypeError):
        return _NO_NUMBER


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Hugging Face's note on the columns: name -> `_type`, such as Image or ClassLabel."""
    return {name: feature.get("_type") for name, feature in _hugging_face(schema).items() if isinstance(feature, dict)}


def _hugging_face(schema: pa.Schema) -> dict[str, Any]:
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(schema: pa.Schema, column: str | None) -> list[str] | None:
    feature = _hugging_face(schema).get(column or "")
    names = feature.get("names") if isinstance(feature, dict) else None
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None


class HuggingFace(_Table):
    """A data set of Hugging Face `datasets`, saved by `save_to_disk`: its splits, or `train` where it has none.

    Layout: dataset_dict.json naming the splits, in each one's folder state.json naming its Arrow files. Pictures must
    be in the files (as `save_to_disk` puts them there); a row that only names a path counts as `no_image`.
    """

    kind: Literal["hugging_face"] = "hugging_face"
    path: str
    """The folder given to `save_to_disk`."""

    def _find(self, seed: int, limits: Limits, scratch: Path, each: Each) -> Listing:
        folder = Path(_existing(self.path))
        splits = {"train": folder}
        if (folder / "dataset_dict.json").is_file():
            names = read_json(folder / "dataset_dict.json", "list of splits").get("splits")
            splits = {name: folder / name for name in _plain_names(names, folder / "dataset_dict.json")}
        files = {}
        for split, place in splits.items():
            state = read_json(place / "state.json", "state of a Hugging Face data set (see save_to_disk)")
            listed = state.get("_data_files")
            listed = listed if isinstance(listed, list) else []
            named = [file.get("filename") if isinstance(file, dict) else file for file in listed]
            files[split] = [str((place / name).absolute()) for name in _plain_names(named, place / "state.json")]
            if lacking := [file for file in files[split] if not os.path.isfile(file)]:
                raise Mistake(f"{place / 'state.json'} names {lacking[0]}, which is not there; save the data set again")
        return self._rows(files, None)


def _plain_names(names: Any, where: Path) -> list[str]:
    """Names of files or folders right here; a data set has no business elsewhere."""
    are_plain = isinstance(names, list) and all(isinstance(n, str) and re.fullmatch(r"\w[\w.-]*", n) for n in names)
    if not are_plain or not names:
        raise Mistake(f"{where} should list plain names of what lies beside it, found {str(names)[:200]}")
    return names


class Parquet(_Table):
    """Parquet files with a column of encoded images, as many data sets on the Hugging Face hub are."""

    kind: Literal["parquet"] = "parquet"
    splits: dict[str, str] = Field(min_length=1)
    """Split name -> its file, or a pattern of files."""
    class_names: list[str] | None = Field(None, min_length=1)
    """Name of class 0, 1, 2 ...; null: as Hugging Face's note in the files has it, if there is one."""

    def _find(self, seed: int, limits: Limits, scratch: Path, each: Each) -> Listing:
        files = {}
        for split, pattern in self.splits.items():
            paths = glob.glob(os.path.join(glob.escape(pattern), "*") if os.path.isdir(pattern) else pattern)
            files[split] = sorted(os.path.abspath(path) for path in paths if _is_parquet(path))
            if not files[split]:
                raise Mistake(f"no .parquet files at {pattern} (split {split}; looked from {Path.cwd()})")
        return self._rows(files, self.class_names)
