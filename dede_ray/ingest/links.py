"""Lists of links (Conceptual Captions, CC12M, LAION ...) become shards, every link accounted for.

    piece       the next `links_per_shard` rows of the list: one Ray task, one shard, the unit of recovery
    account     `<split>-00000.parquet` beside the shard: one row per link, `error` null where its image is in the shard

A piece is fetched by img2dataset into a temporary folder, in order of completion; the images are then written in the
list's order, the account last, so that a piece with an account is done. Two parts of img2dataset 1.47 are replaced,
both through its own arguments or urllib's. It fetches with `Browser` (web.py), as its own way bounds neither bytes nor
time nor addresses. It resizes with `_Fit`, as OpenCV looks at an image's size only after decoding it, completes a
truncated JPEG with grey, and ignores the camera's orientation.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import tarfile
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from pydantic import Field, field_validator

from dede_ray.data.first_bytes import NUM_BYTES
from dede_ray.data.images import IMAGE_FORMATS, decode_image, encode_image
from dede_ray.data.shards import IMAGE_SUFFIXES, BadSample, Limits, Sample, split_name, write_shard
from dede_ray.ingest.archives import not_text
from dede_ray.ingest.columns import CAPTIONS, LINKS, holds_text, plain, texts, usual
from dede_ray.ingest.web import Browser, Failure, Web
from dede_ray.runtime.config import Config, Mistake, read_json, to_install, write_json
from dede_ray.runtime.store import filesystem_of

logger = logging.getLogger(__name__)

LinkError = Literal[
    Failure,  # following the link failed
    "bad_row",  # not a row of the list's columns, not UTF-8, or its link is not one of http(s)
    "caption_missing",  # the list has captions, this row has none; its link is not followed
    "caption_too_long",  # longer than `max_caption_chars`; its link is not followed
    "image_unreadable",  # a page instead of an image, a format that we do not read, or damaged
    "image_truncated",  # the image data ends early
    "image_too_large",  # more bytes or pixels than the limits allow
    "hash_mismatch",  # a good image, but not the one that the list was made from
    "duplicate",  # an earlier link gave the same image, and `duplicates` is `leave_out`
]
LINK_ERRORS: tuple[LinkError, ...] = get_args(LinkError)

ACCOUNT = pa.schema(
    [
        ("key", pa.string()),  # row in the list, from 0; also the sample's key
        ("url", pa.string()),
        ("caption", pa.string()),
        ("error", pa.string()),  # a LinkError; null: the sample is in the shard
        ("http_status", pa.int32()),  # where a server answered with an error
        ("original_width", pa.int32()),  # of the image that was fetched, before resizing
        ("original_height", pa.int32()),
        ("original_hash", pa.string()),  # of what was fetched, by `hash_kind`
        ("sha256", pa.string()),  # of the image as it is in the shard
        ("duplicate_of", pa.string()),  # key of the first link that gave the same image
    ]
)
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}  # MPO: a JPEG with more behind it
FORMATS = (".tsv", ".tsv.gz", ".csv", ".csv.gz", ".parquet")
SAMPLE_CHARS = 1_000_000  # how much of a text file is looked at before it is read
LINES_PER_ROW = 100  # as far as a quote that opens is followed
QUOTED = re.compile(r'"(?:[^"]|"")*"')
HASHES_PER_PASS = 10_000_000  # how many images are compared at once: about 1 GB of memory

Row = tuple[str | None, str | None, str | None]
"""Link, caption and hash, as the list has them; bytes that are not UTF-8 are lone surrogates."""


class UrlList(Config):
    """A list of links with captions: TSV, CSV or Parquet, fetched with img2dataset.

    Text is UTF-8, and may be gzipped. In a CSV, fields with commas, quotes or line ends stand in quotes; a TSV may have
    quotes or be raw (`quotes`).
    """

    kind: Literal["urls"] = "urls"
    path: str | list[str]
    """Files, folders of them or patterns, local or as URLs that pyarrow opens (s3://...); rows count through them."""
    columns: list[str] | None = None
    """Names of the columns where the first line does not name them: [caption, url] for Train_GCC-training.tsv."""
    url_column: str = "url"
    """Column of the links, in any case; where there is no `url`, one of a usual name (image_url, link ...) is taken."""
    caption_column: str | None = "caption"
    """Column of the captions, in any case; where there is no `caption`, one of a usual name (TEXT, alt_text ...) is
    taken. null: images without captions."""
    quotes: Literal["auto", "yes", "no"] = "auto"
    """Whether quotes hold a field with tabs, quotes (doubled) or line ends together, as pandas and spreadsheets write
    it, or are text like any other, as in Conceptual Captions. `auto`: a CSV has quotes, of a TSV the first rows decide,
    and the summary says what they were taken for."""
    hash_column: str | None = None
    """Column of hashes (hexadecimal) of the files behind the links. What has since changed is left out: a buyer of a
    link's expired domain can put other images there (Carlini et al., arXiv:2302.10149). Empty ones are not checked."""
    hash_kind: Literal["md5", "sha256", "sha512"] = "sha256"
    """Kind of those hashes."""
    split: str = Field("train", pattern=r"^[\w-]+$")
    """Shards are called `<split>-00000.tar` ..."""
    resize: Literal["original", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = "keep_ratio"
    """`original` keeps each file as it came. The others shrink to `image_size_px` and write JPEG: the shorter side, the
    longer side, a square cut from the centre, a square with white borders; the first two never enlarge, and keep the
    file of an image that is small enough."""
    image_size_px: int = Field(256, gt=0)
    """What images are shrunk to."""
    jpeg_quality: int = Field(95, ge=1, le=100)
    """JPEG quality of images that are shrunk."""
    duplicates: Literal["keep", "leave_out"] = "keep"
    """Whether an image that an earlier link gave too stays in the shards; it is counted and marked in any case."""
    num_processes: int | None = Field(None, gt=0)
    """Pieces fetched at once, each by one process; null: one per CPU. Memory: at worst 2 * `web.threads` *
    `limits.max_member_bytes` each."""
    web: Web = Web()
    """How links are followed."""
    retry_failed: bool = Field(False, exclude=True)
    """Follow once more the links that failed, of a run that is finished; its good samples stay."""

    @field_validator("quotes", mode="before")
    @classmethod
    def _yes_is_a_word(cls, value: Any) -> Any:
        """YAML takes a bare `yes` for true."""
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


@dataclass(frozen=True)
class _Piece:
    """Where the shard and the account of one piece are."""

    folder: str
    name: str

    def path(self, suffix: str) -> Path:
        return Path(self.folder) / f"{self.name}.{suffix}"


def ingest_urls(source: UrlList, output: Path, limits: Limits, links_per_shard: int) -> dict[str, Any]:
    """Fetch a list's links and write the shards and accounts; pieces that have an account are done already.

    Returns:
        `counts` (samples by split), `left_out` (links by LinkError), `num_links`, `num_duplicates`, and a `summary`.

    Raises:
        Mistake: img2dataset is not installed, there is no such list or column, the list has changed since an
            interrupted run, or not one link gave an image.
    """
    if importlib.util.find_spec("img2dataset") is None:
        raise Mistake("lists of links are fetched with img2dataset, which is not installed; " + to_install("ingest"))
    _recover(output, source.split)
    if source.retry_failed and "result" in (run := read_json(output / "run.json", "record of a run")):
        write_json(output / "run.json", {"settings": run["settings"]})  # no longer finished
    lists = [_look(path, source) for path in _list_files(source.path)]  # all, before the first link is followed
    notes = Counter(note for one in lists for note in one.notes)
    for note in notes:
        logger.info("%s", note)
    accounts = _fetch(source, lists, output, limits, links_per_shard)
    num_duplicates = _mark_duplicates(source, accounts)
    counts: Counter[str] = Counter()
    for path in accounts:
        for value in pq.read_table(path, columns=["error"])["error"].value_counts().to_pylist():
            counts[value["values"] or "ok"] += value["counts"]
    num_links, num_good = counts.total(), counts.pop("ok", 0)
    left_out = {error: counts[error] for error in LINK_ERRORS if error in counts}
    listing = ", ".join(f"{error} {count:,}" for error, count in left_out.items()) or "none"
    if not num_good:
        raise Mistake(f"not one of {num_links:,} links gave an image that can be used: {listing}")
    notes |= Counter(one.warning for one in lists if one.warning)
    said = "".join(f"; {note}" + f" ({n:,} of {len(lists):,} lists)" * (n < len(lists)) for note, n in notes.items())
    summary = f"{source.split} {num_good:,} samples in {output}, of {num_links:,} links{said}; left out: {listing}"
    if num_duplicates and source.duplicates == "keep":
        summary += f"; {num_duplicates:,} samples repeat the image of an earlier one"
    return {
        "counts": {source.split: num_good},
        "left_out": left_out,
        "num_links": num_links,
        "num_duplicates": num_duplicates,
        "summary": summary,
    }


def _fetch(source: UrlList, lists: list[_List], output: Path, limits: Limits, links_per_shard: int) -> list[Path]:
    """Have Ray tasks fetch the pieces that remain, a few at a time as the list is read; return all accounts."""
    import ray  # here and below: importing ray or img2dataset takes seconds that other sources need not pay

    from dede_ray.runtime.session import start_ray

    fetch_piece = ray.remote(num_cpus=1)(_fetch_piece)
    pending: list[Any] = []
    accounts: list[Path] = []

    folder = str(output.absolute())  # workers may run elsewhere

    def collect(num_allowed: int) -> None:
        nonlocal pending
        while len(pending) > num_allowed:
            ready, pending = ray.wait(pending, num_returns=1)
            logger.info("%s", ray.get(ready[0]))

    rows = _read_rows(lists)
    while chunk := list(itertools.islice(rows, links_per_shard)):
        piece, first = _Piece(folder, f"{source.split}-{len(accounts):05d}"), len(accounts) * links_per_shard
        digest = hashlib.sha256(repr(chunk).encode()).hexdigest()
        if not _has_account(piece, digest) or source.retry_failed:
            start_ray()
            collect((source.num_processes or 2 * int(ray.cluster_resources().get("CPU", 1))) - 1)
            pending.append(fetch_piece.remote(source, limits, piece, first, chunk, digest))
        accounts.append(piece.path("parquet"))
    collect(0)
    if not accounts:
        raise Mistake(f"the list {source.path} has no rows")
    _has_account(_Piece(folder, f"{source.split}-{len(accounts):05d}"), "the list ends before it")
    return accounts


def _has_account(piece: _Piece, digest: str) -> bool:
    """Say whether a piece is done; it must have been made from the same rows."""
    if not piece.path("parquet").exists():
        return False
    if pq.read_schema(piece.path("parquet")).metadata[b"rows"].decode() != digest:
        raise Mistake(
            f"the list has changed since {piece.path('parquet')} was made from it; choose another output folder, or "
            "delete this one to start afresh"
        )
    return True


# ------------------------------------------------------------------------------------------- reading lists


@dataclass
class _List:
    """One file of a list, and how it is read."""

    path: str
    names: list[str]
    places: list[int | None]
    """Of link, caption and hash among the columns."""
    has_header: bool = False
    delimiter: str = ""
    """What parts the fields of a line; empty: a Parquet file."""
    has_quotes: bool = False
    num_stray: int = 0
    """Quotes that were read and hold nothing together: rows that would have to be read as they stand."""
    notes: list[str] = field(default_factory=list)
    warning: str = ""
    """What turned out while it was read."""

    def is_row(self, fields: list[str]) -> bool:
        return len(fields) == len(self.names) and _is_link(fields[self.places[0] or 0])

    def split(self, line: str) -> list[str]:
        return line.rstrip("\r\n").split(self.delimiter)

    def records(self, lines: Iterator[str]) -> Iterator[list[str]]:
        """Yield the fields of each row, header and all; a stray quote costs its own row at most.

        A quote that opens is followed over at most `LINES_PER_ROW` lines. Where it does not close as quotes do, or
        holds what are rows of their own, it is text: its line is read as it stands, the lines behind it once more.
        """
        back: deque[str] = deque()
        while (line := back.popleft() if back else next(lines, None)) is not None:
            if not line.strip("\r\n"):
                continue
            if not self.has_quotes or '"' not in line:
                yield self.split(line)
                continue
            taken = [line]
            try:
                fields = next(csv.reader(_taking(taken, back, lines), delimiter=self.delimiter, strict=True))
                is_stray = len(taken) > 1 and sum(self.is_row(self.split(one)) for one in taken) > 1
            except csv.Error:
                is_stray = True
            if is_stray:
                self.num_stray += 1
                back.extendleft(reversed(taken[1:]))
                fields = self._read_alone(line, is_alone=len(taken) == 1)
            yield fields

    def _read_alone(self, line: str, is_alone: bool) -> list[str]:
        """A line with a stray quote: as lenient readers take it (`"a" b` is `a b`), or as it stands, or nothing."""
        with contextlib.suppress(csv.Error):
            if is_alone and self.is_row(fields := next(csv.reader([line], delimiter=self.delimiter))):
                return fields
        return fields if self.is_row(fields := self.split(line)) else []


def _taking(taken: list[str], back: deque[str], lines: Iterator[str]) -> Iterator[str]:
    yield taken[0]
    while len(taken) < LINES_PER_ROW and (line := back.popleft() if back else next(lines, None)) is not None:
        taken.append(line)
        yield line


def _read_rows(lists: list[_List]) -> Iterator[Row]:
    """Yield the rows of all files, in order, however many there are; a malformed row holds only None."""
    for one in lists:
        with _is_readable(one.path):
            yield from _text_rows(one) if one.delimiter else _parquet_rows(one)


@contextlib.contextmanager
def _is_readable(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        raise Mistake(f"the list {path} cannot be read: {error}") from None


def _list_files(patterns: str | list[str]) -> list[str]:
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if "://" in pattern:
            paths = [pattern]
        elif os.path.isdir(pattern):
            paths = sorted(str(path) for path in Path(pattern).iterdir() if path.name.endswith(FORMATS))
        else:
            paths = sorted(glob.glob(pattern))
        if not paths:
            raise Mistake(f"no list of links at {pattern} (looked from {Path.cwd()}); expected {', '.join(FORMATS)}")
        found += paths
    if unknown := [path for path in found if not path.endswith(FORMATS)]:
        raise Mistake(f"{unknown[0]} is no list of links by its name; expected one that ends in {', '.join(FORMATS)}")
    return found


def _look(path: str, source: UrlList) -> _List:
    """Look at the beginning of a file: is it what its name says, has it the columns, has it quotes?

    Raises:
        Mistake: one of the former two is not so.
    """
    filesystem, inner = filesystem_of(path)
    with _is_readable(path):
        with filesystem.open_input_stream(inner, compression=None) as stream:
            start = stream.read(NUM_BYTES)
        if path.endswith(".parquet"):
            if (what := not_text(start)) and not what.startswith("a Parquet file"):
                raise Mistake(f"the list {path} is {what}; expected a Parquet file")
            return _look_at_parquet(path, source)
        with _lines(path) as lines:
            sample, num_chars = [], 0
            while num_chars < SAMPLE_CHARS and (line := next(lines, "")):
                sample.append(line)
                num_chars += len(line)
    start = "".join(sample[:20]).encode("utf-8", "surrogateescape")[:NUM_BYTES]
    if what := not_text(start) or ("JSON" if re.match(rb'\s*(\{\s*"|\[\s*[{"\[])', start) else None):
        raise Mistake(f"the list {path} is {what}; expected lines of text, as its name says")
    return _look_at_text(path, source, sample)


def _look_at_parquet(path: str, source: UrlList) -> _List:
    filesystem, inner = filesystem_of(path)
    with filesystem.open_input_file(inner) as stream:
        schema = pq.ParquetFile(stream).schema_arrow
    places = _places(source, schema.names, path)
    for place in places:
        if place is not None and not holds_text(schema.field(place).type):
            kind = str(schema.field(place).type)[:80]
            raise Mistake(
                f"{path}: the column {schema.names[place]!r} holds {kind}, expected text; name another column"
            )
    return _List(path, schema.names, places, notes=[_columns_said(schema.names, places)])


def _look_at_text(path: str, source: UrlList, sample: list[str]) -> _List:
    is_csv = path.removesuffix(".gz").endswith(".csv")
    first = next((line for line in sample if line.strip("\r\n")), "")
    readings: dict[bool, _List] = {}
    problem: Mistake | None = None
    for has_quotes in (False, True):
        one = _List(path, [], [], source.columns is None, "," if is_csv else "\t", has_quotes)
        with contextlib.suppress(csv.Error):
            header = next(csv.reader([first], delimiter=one.delimiter), []) if has_quotes else one.split(first)
            one.names = source.columns or header
        try:
            one.places = _places(source, one.names, path)
            readings[has_quotes] = one
        except Mistake as mistake:
            problem = problem or mistake
    wanted = {"yes": True, "no": False, "auto": is_csv}[source.quotes]
    is_open = source.quotes == "auto" and not is_csv
    if is_open and len(readings) == 2:
        wanted = _are_quoted(readings[False], readings[True], sample)
    elif is_open and readings:
        (wanted,) = readings
    if wanted not in readings:
        assert problem is not None
        raise problem
    chosen = replace(readings[wanted], num_stray=0)
    chosen.notes = [_columns_said(chosen.names, chosen.places)] if chosen.has_header else []
    if is_open:
        chosen.notes.append(f"quotes: {'yes' if wanted else 'no'}, by the first {len(sample):,} lines of the TSV")
    return chosen


def _are_quoted(raw: _List, quoted: _List, sample: list[str]) -> bool:
    """Whether quotes hold the fields of a TSV together: by the rows that are whole only so, and by doubled quotes.

    A sign against it is a quote that opens and does not close; a caption within quotes does not say.
    """
    rows = [fields for fields in raw.records(iter(sample)) if raw.is_row(fields)]
    with_quotes = [fields for fields in rows if any(QUOTED.fullmatch(text) for text in fields)]
    num_doubled = sum(any(QUOTED.fullmatch(text) and '""' in text[1:-1] for text in row) for row in with_quotes)
    num_lines = sum(
        1 + sum(text.count("\n") for text in fields) for fields in quoted.records(iter(sample)) if quoted.is_row(fields)
    )
    gained = num_lines - len(rows)
    return gained + num_doubled > quoted.num_stray or 2 * len(with_quotes) > len(rows)


def _places(source: UrlList, names: list[str], path: str) -> list[int | None]:
    """Find the columns of link, caption and hash; a default name stands for the usual ones."""
    usually = {"url_column": LINKS, "caption_column": CAPTIONS, "hash_column": ()}
    places: list[int | None] = []
    for setting, others in usually.items():
        wanted = getattr(source, setting)
        if wanted is None:
            places.append(None)
            continue
        found = [name for name in names if name == wanted] or usual(names, [plain(wanted)])
        if not found and wanted == UrlList.model_fields[setting].default:
            found = usual(names, others)
        if not found:
            raise Mistake(
                f"{path} has no column {wanted!r}; it has {', '.join(map(repr, names))}. Correct url_column, "
                "caption_column or hash_column, or name the columns in `columns` if the first line does not"
            )
        if names.count(found[0]) > 1:
            raise Mistake(f"{path} has several columns {found[0]!r}; rename them, or name another as {setting}")
        places.append(names.index(found[0]))
    return places


def _columns_said(names: list[str], places: list[int | None]) -> str:
    names = [str(_printable(name)) for name in names]
    used = zip(("links", "captions", "hashes"), places, strict=True)
    said = ", ".join(f"{what} from `{names[place]}`" for what, place in used if place is not None)
    unused = [name for place, name in enumerate(names) if place not in places]
    return f"{said}; unused: {', '.join(unused)}" if unused else said


@contextlib.contextmanager
def _lines(path: str) -> Iterator[Iterator[str]]:
    """The lines of a text file, gzipped or not, whatever its name says; bytes that are not UTF-8 as lone surrogates."""
    filesystem, inner = filesystem_of(path)
    with filesystem.open_input_stream(inner, compression=None) as stream:
        compression = "gzip" if stream.read(2) == b"\x1f\x8b" else None
    with filesystem.open_input_stream(inner, compression=compression) as stream:
        text = io.TextIOWrapper(io.BufferedReader(stream), "utf-8-sig", "surrogateescape", newline="\n")
        yield iter(lambda: text.readline(2**20), "")  # a file without line ends does not fill the memory


def _text_rows(one: _List) -> Iterator[Row]:
    url, caption, hash_ = one.places
    assert url is not None
    num_doubled = 0
    with _lines(one.path) as lines:
        records = one.records(lines)
        if one.has_header:
            next(records, None)
        for fields in records:
            if len(fields) != len(one.names):
                yield None, None, None
                continue
            text = None if caption is None else fields[caption]
            yield fields[url], text, None if hash_ is None else fields[hash_]
            if not one.has_quotes and text and text[0] == '"' and '""' in text[1:-1] and QUOTED.fullmatch(text):
                num_doubled += 1
    if num_doubled:
        one.warning = f"{num_doubled:,} captions look quoted, and were taken as they stand: `quotes: yes` reads them"
        logger.warning("%s: %s", one.path, one.warning)


def _parquet_rows(one: _List) -> Iterator[Row]:
    filesystem, inner = filesystem_of(one.path)
    with filesystem.open_input_file(inner) as stream:
        names = [one.names[place] for place in one.places if place is not None]
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=8192, columns=names):
            columns = [
                itertools.repeat(None) if place is None else texts(batch[one.names[place]]) for place in one.places
            ]
            yield from zip(*columns, strict=False)


# ------------------------------------------------------------------------------------------------ one piece


def _fetch_piece(source: UrlList, limits: Limits, piece: _Piece, first: int, rows: list[Row], digest: str) -> str:
    """Fetch the links of one piece, or those that failed before; write its shard and account."""
    _recover(Path(piece.folder), piece.name)  # what a task that died here may have left
    before = pq.read_table(piece.path("parquet")).to_pylist() if piece.path("parquet").exists() else None
    account, links = [], {}
    for number, row in enumerate(rows):
        entry = _entry(first + number, row, source, limits)
        if entry["error"] is None and (before is None or before[number]["error"] not in (None, "duplicate")):
            links[number] = str(row[0])
        account.append(entry if before is None or number in links else before[number])
    if links or before is None:
        temporary = Path(piece.folder) / f".{piece.name}.tmp-{os.getpid()}"
        with contextlib.ExitStack() as stack:
            kept = _images(piece.path("tar"), stack)
            names = {}
            for number, (name, found) in _download(links, temporary, source, limits).items():
                expected = (rows[number][2] or "").strip().lower()
                if expected and found["error"] is None and found["original_hash"] != expected:
                    found["error"] = "hash_mismatch"
                account[number].update(found)
                names[account[number]["key"]] = name
            fetched = _images(temporary / "00000.tar", stack)

            def image_of(key: str) -> bytes:
                return fetched(names[key]) if key in names else kept(key)

            _write_piece(piece, account, image_of, digest)
        shutil.rmtree(temporary, ignore_errors=True)
    errors = Counter(entry["error"] for entry in account if entry["error"])
    listing = ", ".join(f"{error} {count:,}" for error, count in errors.most_common()) or "none"
    return f"{piece.name}: {len(rows) - errors.total():,} of {len(rows):,} links gave an image; left out: {listing}"


def _entry(number: int, row: Row, source: UrlList, limits: Limits) -> dict[str, Any]:
    """Begin a link's line in the account; with an error where the list alone shows that it cannot be used."""
    url, caption, _ = row
    entry: dict[str, Any] = dict.fromkeys(ACCOUNT.names)
    entry |= {"key": f"{number:010d}", "url": _printable(url), "caption": _printable(caption)}
    if not _is_link(url) or entry["url"] != url or entry["caption"] != caption:
        entry["error"] = "bad_row"
    elif source.caption_column is not None and not (caption and caption.strip()):
        entry["error"] = "caption_missing"
    elif caption is not None and len(caption) > limits.max_caption_chars:
        entry["error"] = "caption_too_long"
        entry["caption"] = None
    return entry


def _printable(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_link(url: str | None) -> bool:
    try:
        parts = urlsplit((url or "").strip())
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 80) > 0
    except ValueError:
        return False


def _images(path: Path, stack: contextlib.ExitStack) -> Callable[[str], bytes]:
    """Open a tar that we or img2dataset wrote; return what reads the image of a key."""
    if not path.exists():
        return lambda key: b""
    tar = stack.enter_context(tarfile.open(path))
    members = {key: member for member in tar for key, suffix in [split_name(member.name)] if suffix in IMAGE_SUFFIXES}

    def read(key: str) -> bytes:
        reader = tar.extractfile(members[key])
        assert reader is not None, key
        return reader.read()

    return read


def _download(
    links: dict[int, str], folder: Path, source: UrlList, limits: Limits
) -> dict[int, tuple[str, dict[str, Any]]]:
    """Have img2dataset fetch links into `folder`; return the key of each in 00000.tar, and its account."""
    if not links:
        return {}
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask PyPI for its newest version when imported
    from img2dataset.downloader import Downloader, is_disallowed
    from img2dataset.writer import WebDatasetSampleWriter

    folder.mkdir()
    quoted = [quote(url.strip(), safe="!#$%&'()*+,/:;=?@[]~") for url in links.values()]  # spaces, accents ...
    table = pa.table({"url": quoted})
    with pa.ipc.new_file(str(folder / "0.feather"), table.schema) as writer:
        writer.write_table(table)
    urllib.request.install_opener(Browser(source.web, limits.max_member_bytes, is_disallowed))  # type: ignore[arg-type]
    Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=_Fit(source, limits),
        thread_count=source.web.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url"],
        timeout=source.web.timeout_s,
        number_sample_per_shard=len(links),
        oom_shard_count=5,
        compute_hash=source.hash_kind,
        verify_hash_type=None,  # it would refuse rows without a hash
        encode_format="jpg",
        retries=source.web.retries,
        user_agent_token=source.web.user_agent_token,
        disallowed_header_directives=None,  # Browser asks first, and only once
    ).download_shard((0, str(folder / "0.feather")))
    fetched = sorted(pq.read_table(folder / "00000.parquet").to_pylist(), key=lambda row: row["key"])
    if len(fetched) != len(links):  # it passes over samples that it cannot write, and only prints why
        raise RuntimeError(
            f"img2dataset accounts for {len(fetched)} of {len(links)} links in {folder}; is the disk full?"
        )
    found = {}
    for number, row in zip(links, fetched, strict=True):
        error, _, status = (row["error_message"] or "").partition(" ")
        assert not error or error in LINK_ERRORS, row
        found[number] = (
            row["key"],
            {
                "error": error or None,
                "http_status": int(status) if status else None,
                "original_width": row["original_width"],
                "original_height": row["original_height"],
                "original_hash": row[source.hash_kind],
            },
        )
    return found


class _Fit:
    """Replaces img2dataset's resizer: checks that an image can be used, and shrinks it if asked to."""

    def __init__(self, source: UrlList, limits: Limits):
        self.source, self.limits = source, limits

    def __call__(self, stream: io.BytesIO, _boxes: None = None) -> tuple[Any, ...]:
        """Return bytes, width and height, original width and height, error, as img2dataset expects."""
        content = stream.read()
        try:
            image, width, height = self._fit(content)
        except BadSample as bad:
            return None, None, None, None, None, bad.reason
        return image, None, None, width, height, None

    def _fit(self, content: bytes) -> tuple[bytes, int, int]:
        resize, size = self.source.resize, self.source.image_size_px
        image_HWC = decode_image(content, self.limits, enough_px=32 if resize == "original" else size)
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as header:
            width, height = header.size
        deciding = {"keep_ratio": min(width, height), "keep_ratio_largest": max(width, height)}
        if resize == "original" or deciding.get(resize, math.inf) <= size:
            return content, width, height
        image, box, filtering = Image.fromarray(image_HWC), (size, size), Image.Resampling.BICUBIC
        if resize == "keep_ratio":
            image = ImageOps.cover(image, box, filtering)
        elif resize == "keep_ratio_largest":
            image = ImageOps.contain(image, box, filtering)
        elif resize == "center_crop":
            image = ImageOps.fit(image, box, filtering)
        else:
            image = ImageOps.pad(image, box, filtering, color="white")
        return encode_image(np.asarray(image), "jpg", self.source.jpeg_quality), width, height


# ------------------------------------------------------------------------------------- writing, recovering


def _write_piece(
    piece: _Piece, account: list[dict[str, Any]], image_of: Callable[[str], bytes] | None, digest: str
) -> None:
    """Replace a piece's shard and account, both or none, whatever is killed; without `image_of`, the account only.

    The new ones are whole beside the old when `.parquet.new` is there; `_recover` completes what is then interrupted.
    """
    new_tar, new_account = piece.path("tar.new"), piece.path("parquet.new")
    good = [entry for entry in account if entry["error"] is None]
    if image_of is not None and good:
        write_shard(new_tar, (_sample(place, entry, image_of(entry["key"])) for place, entry in enumerate(good)))
    metadata = {"rows": digest, "num_samples": str(len(good))}
    temporary = new_account.with_name(f".{new_account.name}.tmp-{os.getpid()}")
    pq.write_table(pa.Table.from_pylist(account, ACCOUNT.with_metadata(metadata)), temporary)
    temporary.replace(new_account)
    _recover(Path(piece.folder), piece.name)


def _sample(place: int, entry: dict[str, Any], image: bytes) -> Sample:
    with Image.open(io.BytesIO(image), formats=IMAGE_FORMATS) as header:
        suffix = SUFFIXES[str(header.format)]
    sample = Sample(entry["key"], place, image, suffix, entry["caption"])
    entry["sha256"] = sample.content_hash()
    names = ("url", "caption", "sha256", "original_width", "original_height", "original_hash")
    about = {name: entry[name] for name in names}
    sample.others["json"] = json.dumps(about, ensure_ascii=False).encode()
    return sample


def _recover(folder: Path, name: str) -> None:
    """Complete what was being written to `<name>...`, or remove it."""
    for new_account in folder.glob(f"{name}*.parquet.new"):
        tar = new_account.with_name(new_account.name.replace(".parquet.new", ".tar"))
        new_tar = tar.with_name(tar.name + ".new")
        if pq.read_schema(new_account).metadata[b"num_samples"] == b"0":
            tar.unlink(missing_ok=True)
        elif new_tar.exists():
            new_tar.replace(tar)
        new_account.replace(new_account.with_suffix(""))
    for path in [*folder.glob(f"{name}*.tar.new"), *folder.glob(f".{name}*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------- duplicates


def _mark_duplicates(source: UrlList, accounts: list[Path]) -> int:
    """Find the images that an earlier link gave too, mark them, leave them out if asked to; return their number.

    The earlier one is the one that is earlier in the list, whichever was fetched first. Memory: `HASHES_PER_PASS`
    hashes, and 16 bytes per duplicate.
    """
    starts = np.cumsum([0, *(pq.read_metadata(path).num_rows for path in accounts)])
    num_passes = math.ceil(starts[-1] / HASHES_PER_PASS)
    found = np.concatenate([_find_duplicates(accounts, number, num_passes) for number in range(num_passes)])
    found = found[np.argsort(found[:, 0])]
    for path, (start, end) in zip(accounts, itertools.pairwise(np.searchsorted(found[:, 0], starts)), strict=True):
        if start < end:
            _mark_piece(source, path, {f"{key:010d}": f"{first:010d}" for key, first in found[start:end]})
    return len(found)


def _find_duplicates(accounts: list[Path], number: int, num_passes: int) -> np.ndarray:
    """Compare the images whose hash falls into this pass; return int64 (N, 2): row of a duplicate, row of its first."""
    keys, hashes = [np.empty(0, np.int64)], [np.empty(0, "S32")]
    for path in accounts:
        table = pq.read_table(path, columns=["key", "sha256"])
        table = table.filter(pc.is_valid(table["sha256"]))
        hashes_here = np.array(table["sha256"].to_pylist(), "S32")  # half of SHA-256: 128 bits
        chosen = hashes_here.view("<u4")[::8] % 65_521 % num_passes == number
        keys.append(np.array(table["key"].to_pylist(), "S10").astype(np.int64)[chosen])
        hashes.append(hashes_here[chosen])
    key = np.concatenate(keys)
    _, first, which = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    first_key = key[first][which]  # keys ascend, and `first` is the first
    return np.stack([key, first_key], axis=1)[key != first_key]


def _mark_piece(source: UrlList, path: Path, first_of: dict[str, str]) -> None:
    """Mark the duplicates of one piece; their number never shrinks from run to run."""
    table = pq.read_table(path)
    account = table.to_pylist()
    error = "duplicate" if source.duplicates == "leave_out" else None
    changed = [entry for entry in account if entry["duplicate_of"] != first_of.get(entry["key"])]
    for entry in changed:
        entry |= {"duplicate_of": first_of[entry["key"]], "error": error}
    if changed:
        piece = _Piece(str(path.parent), path.stem)
        with contextlib.ExitStack() as stack:
            image_of = _images(piece.path("tar"), stack) if source.duplicates == "leave_out" else None
            _write_piece(piece, account, image_of, table.schema.metadata[b"rows"].decode())
