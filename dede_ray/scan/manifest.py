"""The manifest: one row per sample, and everything that says what the rows mean.

    <folder>/manifest.json            settings, fingerprints, versions, decision, counts, digests of the rows' files; no
                                      clock time
    <folder>/manifest/<shard>.parquet rows in the order of their sample ids; the files' order is theirs too
    <folder>/flagged.txt              sample ids of the flagged, one a line
    <folder>/to_review.jsonl          samples to look at, in order, where the corpus calibrates itself (calibration.py)
    <folder>/findings.json            groups of suspicious samples, and copies (findings.py)

Equal runs give equal bytes. There is a manifest where there is a manifest.json, and rows whose digests it does not name
are none of its own: a decision that was stopped half-way, or made by two at once, is not read. The manifest is the
interface to all other jobs and tools.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, ValidationError

from dede_ray.data.identity import recorded_shards, require_same
from dede_ray.data.ledger import at_once, parquet_bytes, shards_of_pass
from dede_ray.data.shards import Shard
from dede_ray.runtime.config import Mistake, explain, read_json, write_atomically, write_json
from dede_ray.runtime.store import Named, Place, place

if TYPE_CHECKING:
    import pandas

DECISION_COLUMNS = (
    ("combined_score", pa.float32()),
    ("p_value", pa.float64()),
    ("rank", pa.int64()),
    ("poisoned_at_least", pa.int64()),
    ("flagged", pa.bool_()),
    ("group_id", pa.string()),
)


@dataclass(frozen=True)
class Manifest:
    """A written manifest; rows are read when they are first asked for.

    Example:
        >>> import dede_ray
        >>> manifest = dede_ray.read_manifest("runs/digits/scores")
        >>> frame = manifest.to_pandas()
        >>> frame.columns[:4].tolist()
        ['sample_id', 'content_hash', 'shard', 'index']
        >>> frame.query("flagged").sample_id.tolist() == manifest.flagged
        True
    """

    folder: Place
    info: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        return self.info["settings"]

    @property
    def score_columns(self) -> list[str]:
        return self.info["score_columns"]

    @cached_property
    def table(self) -> pa.Table:
        """All rows, sorted by sample id."""
        kinds = {name: pa.float32() for name in self.score_columns}
        kinds |= {"sample_id": pa.string(), "flagged": pa.bool_(), "error": pa.string()}
        try:
            table = pa.concat_tables(at_once(self.folder, self._rows, self.info["shards"]))
            for name, kind in kinds.items():
                if table.column(name).type != kind:
                    raise ValueError(f"column {name} is of type {table.column(name).type}, not {kind}")
        except (OSError, ValueError, LookupError, pa.ArrowException) as error:
            raise Mistake(f"the manifest at {self.folder} is damaged: {error}; run the scoring job again") from None
        return table

    def rows_path(self, shard_name: str) -> Place:
        """Where the rows of one shard are."""
        return self.folder / "manifest" / f"{shard_name}.parquet"

    def _rows(self, shard_name: str) -> pa.Table:
        return pq.read_table(pa.BufferReader(self._content(shard_name)))

    def _content(self, shard_name: str) -> bytes:
        content = self.rows_path(shard_name).read_bytes()
        expected = self.info.get("rows", {}).get(shard_name)  # which manifests of earlier versions lack
        if expected is not None and hashlib.sha256(content).hexdigest() != expected:
            raise ValueError(
                f"the rows of {shard_name} are not those of manifest.json (damaged, or of another decision)"
            )
        return content

    @property
    def flagged(self) -> list[str]:
        """Ids of the samples on the list, sorted."""
        return self.table.filter(pc.fill_null(self.table["flagged"], False))["sample_id"].to_pylist()

    def to_pandas(self) -> pandas.DataFrame:
        """All rows as a data frame, one for each sample: its scores, p-value, whether it is flagged, or its error.

        `flagged` is False where a sample could not be scored.
        """
        flagged = pc.fill_null(self.table["flagged"], False)
        return self.table.set_column(self.table.column_names.index("flagged"), "flagged", flagged).to_pandas()

    def fingerprint(self) -> str:
        """SHA-256 over the description and all rows."""
        digest = hashlib.sha256((self.folder / "manifest.json").read_bytes())
        try:
            for name in self.info["shards"]:
                digest.update(self._content(name))
        except (FileNotFoundError, ValueError) as error:
            raise Mistake(f"the manifest at {self.folder} is damaged: {error}; run the scoring job again") from None
        return digest.hexdigest()

    def require_same_shards(self, shards: list[Shard]) -> None:
        """Stop where shards are not those that were scored, as far as their digests show.

        Raises:
            Mistake: size or content of some is another.
        """
        folder = self.folder / "scores"
        if (folder / "pass.json").is_file():  # else the samples alone are compared, one by one
            remedy = "score these (rescore_changed: true does just them), and take the new manifest"
            require_same({shard.name: shard for shard in shards_of_pass(folder)}, shards, str(folder), remedy)

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """The one line that a person came for, what it promises, and a line for each group with flagged samples."""
        counts, decision = self.info["counts"], self.info["decision"]
        unreadable = sum(counts["unreadable"].values())
        cut = f", {len(counts['truncated_shards']):,} shards end early" if counts["truncated_shards"] else ""
        dropped = ", ".join(self.info.get("left_out", ()))
        left_out = f"; left out, as they could not be fitted: {dropped}" if dropped else ""
        rule = decision["rule"] + (f", {decision['mode']}" if decision.get("mode") else "")
        return (
            f"{counts['flagged']:,} of {counts['scored']:,} samples flagged by {decision['score']} "
            f"({rule}); {unreadable:,} unreadable{cut}{left_out} -> {self.folder}\n{decision['message']}"
            + "".join(f"\nfinding: {one}" for one in self.info.get("groups", ()))
        )


def write_manifest(
    folder: Place,
    shards: Iterable[tuple[str, pa.Table]],
    info: dict[str, Any],
    findings: dict[str, Any] | None = None,
    to_review: list[dict[str, Any]] | None = None,
) -> Manifest:
    """Write rows, findings and description; `shards` gives each shard's rows, in the order of the shards' sample ids.

    An earlier description is taken away before the first of its rows is touched, and the new one comes last, with the
    digests of all rows: killed anywhere, there is no manifest, and a rerun writes it.
    """
    earlier = _earlier_digests(folder / "manifest.json")
    names, flagged, digests = [], [], dict[str, str]()
    for name, table in shards:
        table = table.sort_by("sample_id")
        content = parquet_bytes(table)
        digests[name] = hashlib.sha256(content).hexdigest()
        if earlier.get(name) != digests[name]:
            (folder / "manifest.json").unlink(missing_ok=True)
        write_atomically(folder / "manifest" / f"{name}.parquet", content)
        flagged += table.filter(pc.fill_null(table["flagged"], False))["sample_id"].to_pylist()
        names.append(name)
    info = {"manifest": 1, **info, "shards": names, "rows": digests}
    if earlier != digests or read_json(folder / "manifest.json", "manifest") != info:
        (folder / "manifest.json").unlink(missing_ok=True)
    there: list[Place] = [*(folder / "manifest").glob("*.parquet")]
    for path in there:  # some may be of shards that were left out since
        if path.name.removesuffix(".parquet") not in digests:
            path.unlink(missing_ok=True)
    write_atomically(folder / "flagged.txt", "".join(f"{json.dumps(i)[1:-1]}\n" for i in flagged))
    if findings is not None:
        write_json(folder / "findings.json", findings)
    if to_review is not None:
        write_atomically(folder / "to_review.jsonl", "".join(f"{json.dumps(one)}\n" for one in to_review))
    else:
        (folder / "to_review.jsonl").unlink(missing_ok=True)  # of another decision
    write_json(folder / "manifest.json", info)
    return Manifest(folder, info)


def _earlier_digests(path: Place) -> dict[str, Any]:
    """The digests of the rows that a folder's manifest is about; none where there is none, or an unreadable one."""
    try:
        rows = read_json(path, "manifest").get("rows") if path.is_file() else None
    except Mistake:
        rows = None
    return rows if isinstance(rows, dict) else {}


def read_manifest(folder: Named) -> Manifest:
    """Open a manifest.

    Raises:
        Mistake: nothing there, or not a manifest of ours.

    Example:
        >>> import dede_ray
        >>> manifest = dede_ray.read_manifest("runs/digits/scores")
        >>> manifest.table.num_rows
        1000
    """
    folder = place(folder)
    info = read_json(folder / "manifest.json", "manifest (manifest.json)")
    if info.get("manifest") != 1:
        raise Mistake(f"{folder / 'manifest.json'} is no manifest that this version reads")
    try:
        _Info.model_validate(info)
    except ValidationError as error:
        raise Mistake(f"{folder / 'manifest.json'} is damaged:\n{explain(error, _Info)}") from None
    return Manifest(folder, info)


class _Info(BaseModel):
    """What every reader of a manifest.json relies on."""

    shards: list[Annotated[str, Field(pattern="^[^/]+$")]] = Field(min_length=1)
    settings: dict[str, Any]
    victim: dict[str, str]
    decision: dict[str, Any]
    rows: dict[str, str] = {}
    score_columns: list[str]


def require_made_of(
    recorded: dict[str, Any], now: dict[str, Any], shards: dict[str, list[Shard]], output: Place
) -> None:
    """Compare what a folder was made of with what it is to be made of now, wherever that is.

    Args:
        shards: those of now, by the names under which they are recorded.

    Raises:
        Mistake: another manifest, or other shards.
    """
    remedy = f"delete {output}, or choose another output folder"
    there = recorded.get("manifest")
    if not isinstance(there, dict) or there.get("fingerprint") != now["manifest"]["fingerprint"]:
        raise Mistake(f"{output} was made with another manifest; {remedy}")
    for role, given in shards.items():
        try:
            found = recorded_shards(recorded[role])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Mistake(f"{output} was made with {role} that its record does not name; {remedy}") from None
        if found.keys() != {shard.name for shard in given}:
            raise Mistake(f"{output} was made with other {role}; {remedy}")
        require_same(found, given, str(output), remedy)
