"""A manifest's rows and its description are of one decision, whatever was killed when."""

from __future__ import annotations

import pyarrow as pa
import pytest

from dede_ray.runtime.config import Mistake
from dede_ray.scan import manifest as manifests
from dede_ray.scan.manifest import read_manifest, write_manifest

INFO = {
    "settings": {}, "victim": {}, "decision": {"score": "a", "rule": "fixed", "message": ""}, "score_columns": ["a"],
}  # fmt: skip


def decided(folder, threshold: float, shards=("x.tar", "y.tar"), findings=()) -> None:
    def rows():
        for name in shards:
            ids, score = [f"{name}/{i}" for i in range(4)], pa.array([0.1, 0.2, 0.3, 0.4], pa.float32())
            flagged = [bool(one >= threshold) for one in score.to_pylist()]
            yield name, pa.table({"sample_id": ids, "a": score, "flagged": flagged, "error": pa.nulls(4, pa.string())})

    decision = {**INFO["decision"], "threshold": threshold}
    write_manifest(folder, rows(), {**INFO, "decision": decision}, {"findings": list(findings)})


def agrees(folder) -> bool:
    found = read_manifest(folder)
    threshold, listed = found.info["decision"]["threshold"], (folder / "flagged.txt").read_text().split()
    above = [f"{shard}/{i}" for shard in found.info["shards"] for i in range(4) if (i + 1) / 10 >= threshold]
    return listed == found.flagged == above


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(5))  # two shards, flagged.txt, findings.json, manifest.json
def test_a_decision_killed_anywhere_leaves_no_manifest_and_a_rerun_writes_it(tmp_path, monkeypatch, at):
    decided(tmp_path, 0.35)
    writes: list[str] = []

    def write(path, content):
        if len(writes) == at:
            raise Killed
        writes.append(str(path))
        usual(path, content)

    usual = manifests.write_atomically
    monkeypatch.setattr(manifests, "write_atomically", write)
    monkeypatch.setattr(manifests, "write_json", lambda path, content: write(path, manifests.json.dumps(content)))
    with pytest.raises(Killed):
        decided(tmp_path, 0.15)
    monkeypatch.undo()
    if (tmp_path / "manifest.json").exists():
        assert agrees(tmp_path)
    else:
        with pytest.raises(Mistake, match=r"no manifest \(manifest\.json\) at"):
            read_manifest(tmp_path)
    decided(tmp_path, 0.15)
    assert agrees(tmp_path)


def test_rows_of_two_decisions_are_not_read(tmp_path):
    decided(tmp_path / "one", 0.35)
    decided(tmp_path / "two", 0.15)
    (tmp_path / "two" / "manifest" / "x.tar.parquet").replace(tmp_path / "one" / "manifest" / "x.tar.parquet")
    mixed = read_manifest(tmp_path / "one")
    for look in (lambda: mixed.table, mixed.fingerprint, lambda: mixed.flagged):
        with pytest.raises(Mistake, match=r"damaged: the rows of x\.tar are not those of manifest"):
            look()


def test_the_same_decision_again_changes_no_byte_and_shards_left_out_leave_no_rows(tmp_path):
    decided(tmp_path, 0.35)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    decided(tmp_path, 0.35)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    decided(tmp_path, 0.35, shards=("y.tar",))
    assert [path.name for path in (tmp_path / "manifest").iterdir()] == ["y.tar.parquet"]
    assert agrees(tmp_path)


def test_a_manifest_of_an_earlier_version_without_digests_is_read(tmp_path):
    decided(tmp_path, 0.35)
    info = manifests.read_json(tmp_path / "manifest.json", "manifest")
    del info["rows"]
    manifests.write_json(tmp_path / "manifest.json", info)
    assert agrees(tmp_path)
