"""The score pass: shards x victim x detectors -> manifest.

One decode, one victim forward, then every detector (ledger.py does the passing, and the recovery). Calibration shards
go through the same pass; the decision then turns scores into a list with a declared error rate.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from dede_ray.clip import to_unit_range
from dede_ray.config import Config, Mistake
from dede_ray.decisions import Conformal, Decision
from dede_ray.detectors.contract import Batch
from dede_ray.detectors.detector import Detector
from dede_ray.ledger import Chunk, PassResources, PassSummary, read_parts, run_pass
from dede_ray.manifest import DECISION_COLUMNS, Manifest, write_manifest
from dede_ray.shards import Limits, Shard, list_shards
from dede_ray.victims import VictimConfig, load_victim

VERSIONS_OF = ("torch", "open_clip_torch", "timm", "numpy", "pillow", "pyarrow")


class ScoreConfig(Config):
    """Settings of jobs/score.py."""

    shards: str | list[str]
    """What to score: paths, folders, patterns or URLs."""
    output: str
    victim: VictimConfig
    detectors: list[Detector] = Field(min_length=1)
    calibration: str | list[str] | None = None
    """Clean shards that nothing was fitted on; conformal decisions need them."""
    decision: Decision = Field(Conformal(), discriminator="kind")
    chunk_size: int = Field(256, ge=1)
    """Samples that are scored, written and recovered together."""
    limits: Limits = Limits()
    max_error_fraction: float = Field(0.1, ge=0, le=1)
    """Stop when more than this share of the samples cannot be used."""
    resources: PassResources = PassResources()


def score(config: ScoreConfig) -> Manifest:
    """Score every sample and write the manifest; Ray must be running. A rerun does what remains.

    Raises:
        Mistake: settings, shards, victim, decoder or output folder that do not fit.
    """
    output = Path(config.output).absolute()
    victim = load_victim(config.victim)
    scorers = [detector.open(victim, {}) for detector in config.detectors]
    controls = [column for scorer in scorers for column in scorer.controls]
    columns = [column for scorer in scorers for column in scorer.columns]
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise Mistake(f"two detectors give the column {twice[0]}; name each kind once")
    if config.decision.score not in columns or config.decision.score in controls:
        judged = [column for column in columns if column not in controls]
        raise Mistake(
            f"decision.score is {config.decision.score!r}; the detectors of this run give {', '.join(judged)}"
        )
    shards = list_shards(config.shards)
    calibration_shards = list_shards(config.calibration) if config.calibration else []
    made_with = {
        "victim": victim.fingerprint,
        "detectors": {
            detector.kind: scorer.fingerprint for detector, scorer in zip(config.detectors, scorers, strict=True)
        },
        "versions": _versions(),
    }
    summaries = [
        run_pass(
            pass_shards, output / name, ScoreWork,
            {"victim_config": config.victim.located(), "detectors": [each.located() for each in config.detectors]},
            image_size=victim.image_size, made_with=made_with, chunk_size=config.chunk_size, limits=config.limits,
            resources=config.resources, max_error_fraction=config.max_error_fraction, name=name,
        )
        for name, pass_shards in (("calibration", calibration_shards), ("scores", shards))
        if pass_shards
    ]  # fmt: skip
    calibration = _column(output / "calibration", calibration_shards, config.decision.score)
    return _decide(config, output, shards, calibration, columns, controls, summaries[-1], made_with)


class ScoreWork:
    """What a scoring actor does with a chunk: one forward of the victim, then every detector."""

    def __init__(self, victim_config: VictimConfig, detectors: list[Detector]):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.victim = load_victim(victim_config).to(self.device)
        self.scorers = [detector.open(self.victim, {}) for detector in detectors]
        self.image_size = self.victim.image_size
        self.columns = {column: pa.float32() for scorer in self.scorers for column in scorer.columns}

    def __call__(self, chunk: Chunk) -> dict[str, np.ndarray]:
        image_BCHW = to_unit_range(torch.tensor(chunk.image_BHWC).to(self.device))
        batch = Batch(chunk.sample_ids, self.victim(image_BCHW), image_BCHW)
        return {name: column for scorer in self.scorers for name, column in scorer.score(batch).items()}


def _column(folder: Path, shards: list[Shard], name: str) -> np.ndarray | None:
    if not shards:
        return None
    parts = [read_parts(folder, shard.name, [name])[name] for shard in shards]
    return pa.chunked_array([c for p in parts for c in p.chunks]).to_numpy(zero_copy_only=False)


def _decide(
    config: ScoreConfig,
    output: Path,
    shards: list[Shard],
    calibration: np.ndarray | None,
    columns: list[str],
    controls: list[str],
    summary: PassSummary,
    made_with: dict[str, Any],
) -> Manifest:
    scores = output / "scores"
    ids = [i for shard in shards for i in read_parts(scores, shard.name, ["sample_id"])["sample_id"].to_pylist()]
    judged = _column(scores, shards, config.decision.score)
    assert judged is not None
    verdict = config.decision.decide(judged.astype(np.float32), calibration, ids)
    hashes = Counter(
        h for shard in shards for h in read_parts(scores, shard.name, ["content_hash"])["content_hash"].to_pylist()
    )
    repeated = {name for name, count in hashes.items() if count > 1 and name}

    def rows() -> Iterator[tuple[str, pa.Table]]:
        start = 0
        for shard in shards:
            table = read_parts(scores, shard.name)
            here = slice(start, start + len(table))
            start += len(table)
            error = table["error"]
            p_value = verdict.p_value[here]
            group = [name if name in repeated else None for name in table["content_hash"].to_pylist()]
            values = (judged[here], p_value, verdict.flagged[here], group)
            table = table.drop_columns(["error"])
            for (name, kind), value in zip(DECISION_COLUMNS, values, strict=True):
                table = table.append_column(pa.field(name, kind), pa.array(value, kind, from_pandas=True))
            yield shard.name, table.append_column("error", error)

    info = {
        "settings": config.model_dump(mode="json", exclude={"resources"}),
        "victim": {"path": config.victim.path, "fingerprint": made_with["victim"]},
        "detectors": made_with["detectors"],
        "versions": made_with["versions"],
        "score_columns": columns,
        "controls": controls,
        "decision": verdict.report,
        "counts": {
            "samples": summary.num_samples,
            "scored": summary.num_samples - sum(summary.errors.values()),
            "unreadable": summary.errors,
            "flagged": int(verdict.flagged.sum()),
            "truncated_shards": summary.truncated_shards,
            "duplicated_images": sum(hashes[name] for name in repeated),
        },
    }
    return write_manifest(output, rows(), info)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONS_OF}
