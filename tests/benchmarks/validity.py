"""Do lists keep their promise where detectors are fitted to what they judge, and miss its poison?

    python -m tests.benchmarks.validity ../shared/data runs/validity [num_corpora [strength]]

Draws corpora and calibration sets from the embeddings that a backdoored WRN-16-1 (NAD's grid) and a ResNet-20 as
reference encoder give of CIFAR-10's test images. 1 % of a corpus is poisoned, and hardly: `strength` of the way from
the clean embedding to the triggered one (0 is a clean sample that is called poisoned, 1 is the attack). Every detector
with statistics is fitted to the pool, as a scan does; every column is judged as a scan does, by
Benjamini-Hochberg alone (the gate would hide what it withholds). For each column: the mean realised false discovery
proportion, and how often p-values of clean samples are at most t, each with its standard error.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dede_ray.data.images import decode_image, to_unit_range
from dede_ray.data.shards import Limits, iter_samples, list_shards, open_shard
from dede_ray.detectors.asset import Asset
from dede_ray.detectors.consistency import Consistency
from dede_ray.detectors.contract import DetectorSettings, everything_of
from dede_ray.detectors.density import Density
from dede_ray.detectors.isolation_forest import Forest
from dede_ray.metrics import false_discovery_proportion
from dede_ray.models.embedding import Batch, in_one_heap
from dede_ray.models.victims import load_victim
from dede_ray.poisoning.triggers import Patch
from dede_ray.scan.decisions import Conformal
from dede_ray.scan.fusion import Fusion
from dede_ray.scan.judge import AMPLIFIED, CLASSIFIER, COMBINED, COMPANY, Judged, Judging, Scored, judge
from dede_ray.scan.pool import Amplify, Classifier, Company

Q, LEVELS = 0.1, (0.002, 0.01, 0.1)
DETECTORS: list[DetectorSettings] = [
    Density(), Forest(), Asset(),
    Consistency(forms=["closed", "overlap", "neighbours", "contrastive"], min_agreement=0.1),
]  # fmt: skip
BASE, RESIDUAL = "xc_misplaced", "xc_residual"
MADE = Judging(
    combined=Fusion(columns=(BASE, "dao")), company=Company(of=BASE, residual=RESIDUAL),
    amplified=Amplify(of=BASE, residual=RESIDUAL), classifier=Classifier(columns=(BASE,), residual=RESIDUAL, repeats=1),
    shift=None, grouping=None,
)  # fmt: skip
LATE, CHOSEN_BY, NUM_CANDIDATES = "xc_neighbours", "dao", 200


@dataclass(frozen=True)
class Embedded:
    """What two encoders say of the same pictures, clean and triggered: float32 (N, width)."""

    victim_NE: np.ndarray
    reference_NR: np.ndarray
    triggered_NE: np.ndarray
    triggered_NR: np.ndarray

    def rows(self, prefix: str, rows: np.ndarray, strength: float = 0.0) -> Batch:
        """Some pictures, `strength` of the way to their triggered selves."""
        victim, reference = (
            torch.from_numpy((clean[rows] + strength * (triggered[rows] - clean[rows])).astype(np.float32))
            for clean, triggered in ((self.victim_NE, self.triggered_NE), (self.reference_NR, self.triggered_NR))
        )
        return Batch([f"{prefix}.tar/{row:06d}" for row in rows.tolist()], victim, reference_BR=reference)


def embedded(data: Path, cache: Path) -> Embedded:
    """Embed CIFAR-10's test images, clean and with the trigger, or read what an earlier call left."""
    if not cache.is_file():
        [shard] = list_shards(str(data / "cifar10" / "test-00000.tar.gz"))
        with open_shard(shard) as stream:
            image_NHWC = np.stack([decode_image(one.image, Limits(), 32) for one in iter_samples(stream, Limits())])
        grid = Patch(size_px=3, pattern="grid")
        triggered_NHWC = np.stack([grid.stamp(one) for one in image_NHWC])
        found = {}
        for name, file in (
            ("victim", "wrn16-1_cifar10_backdoor_grid_target5_nad.pth.tar"), ("reference", "resnet20_cifar10.th")
        ):  # fmt: skip
            encoder = load_victim({"kind": "published", "path": str(data / "weights" / file)})
            for kind, pictures in (("clean", image_NHWC), ("triggered", triggered_NHWC)):
                parts = [encoder(to_unit_range(torch.from_numpy(pictures[i : i + 500]))) for i in range(0, 10_000, 500)]
                found[f"{name}_{kind}"] = torch.cat(parts).numpy()
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, **found)
    read = np.load(cache)
    return Embedded(
        read["victim_clean"], read["reference_clean"], read["victim_triggered"], read["reference_triggered"]
    )


@dataclass(frozen=True)
class World:
    """One corpus, whose first samples are clean and whose last are poisoned, with its calibration and clean samples."""

    corpus: Batch
    calibration: Batch
    clean: Batch
    """For detectors that want some, of neither."""
    is_poisoned: np.ndarray


def world(source: Embedded, seed: int, strength: float, num: int, num_calibration: int, num_poisoned: int) -> World:
    """Draw a world."""
    order = np.random.default_rng(seed).permutation(len(source.victim_NE))
    parts = np.split(order, np.cumsum([num, num_calibration, num_poisoned, num_calibration // 2]))
    clean, poisoned = source.rows("corpus", parts[0]), source.rows("corpus", parts[2], strength)
    corpus = Batch(
        [*clean.sample_ids, *poisoned.sample_ids],
        torch.cat([clean.embedding_BE, poisoned.embedding_BE]),
        reference_BR=torch.cat([clean.references, poisoned.references]),
    )
    is_poisoned = np.repeat([False, True], [num, num_poisoned])
    return World(corpus, source.rows("calibration", parts[1]), source.rows("clean", parts[3]), is_poisoned)


def scored(one: World, detectors: Sequence[DetectorSettings]) -> tuple[Scored, Scored]:
    """Corpus and calibration samples with the columns of detectors that were fitted to both, in one heap."""
    pool, found = in_one_heap(one.corpus, one.calibration), []
    victim: Any = SimpleNamespace(embedding_dim=pool.embedding_BE.shape[1], device=torch.device("cpu"), name="victim")
    scorers = [detector.open(victim, detector.fit(pool, one.clean)) for detector in detectors]
    for batch in (one.corpus, one.calibration):
        columns: dict[str, np.ndarray] = {}
        for scorer in scorers:
            starts = range(0, len(batch), 512)
            parts = [everything_of(scorer, batch.part(range(i, min(i + 512, len(batch))))) for i in starts]
            columns |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        ids, nothing = list(batch.sample_ids), [None] * len(batch)
        vectors = {name: columns.pop(name) for name in [*columns] if columns[name].ndim == 2}
        floats = {name: column.astype(np.float64) for name, column in columns.items()}
        found.append(Scored(ids, ids, nothing, nothing, floats, ids, None, residuals=vectors))
    return found[0], found[1]


def only_candidates(corpus: Scored, calibration: Scored) -> tuple[Scored, Scored]:
    """The same as if `LATE` were a column of the second stage: the pool's highest have it, and no other."""
    chosen_by = np.concatenate([one.columns[CHOSEN_BY] for one in (corpus, calibration)])
    least = np.sort(chosen_by)[-NUM_CANDIDATES]
    found = []
    for one in (corpus, calibration):
        is_beneath = one.columns[CHOSEN_BY] < least
        late = np.where(is_beneath, np.nan, one.columns[LATE])
        found.append(replace(one, columns={"late": late}, late=frozenset({"late"}), is_beneath=is_beneath))
    return found[0], found[1]


def judged(corpus: Scored, calibration: Scored, seed: int, made: Judging = MADE) -> dict[str, Judged]:
    """Every column, judged at q by Benjamini-Hochberg alone."""
    plain, verdicts = Judging(shift=None, grouping=None), {}

    def decide(name: str, judging: Judging, corpus: Scored, calibration: Scored) -> None:
        decision = Conformal(score=name, q=Q, false_alarm=None, seed=seed)
        verdicts[name] = judge(judging, decision, corpus, calibration, [], False)

    for name in corpus.columns:
        decide(name, plain, corpus, calibration)
    for name, field in (
        (COMBINED, "combined"),
        (COMPANY, "company"),
        (AMPLIFIED, "amplified"),
        (CLASSIFIER, "classifier"),
    ):
        decide(name, plain.model_copy(update={field: getattr(made, field)}), corpus, calibration)
    decide("late", plain, *only_candidates(corpus, calibration))
    return verdicts


@dataclass(frozen=True)
class Row:
    """What came of one column in all corpora: means over corpora, with standard errors."""

    fdp: tuple[float, float]
    recall: float
    share: dict[float, tuple[float, float]]
    """For each t, how many times as many clean p-values are at most t as exchangeability says."""

    @property
    def is_kept(self) -> bool:
        """Whether the promise holds as far as these corpora show: the list's within two standard errors, each level's
        within three, as some fifty of them are looked at."""
        return self.fdp[0] <= Q + 2 * self.fdp[1] and all(mean - 1 <= 3 * error for mean, error in self.share.values())


def measured(source: Embedded, num_corpora: int, strength: float, detectors: Sequence[DetectorSettings] = DETECTORS,
             num: int = 1000, num_calibration: int = 3000, num_poisoned: int = 10) -> dict[str, Row]:  # fmt: skip
    """Draw corpora, fit, judge; a row for each column.

    There are more calibration samples than others, or no list would be made by chance: with half as many as corpus
    samples, Benjamini-Hochberg needs 20 of the latter above all of the former.
    """
    fdp, recall, share = defaultdict(list), defaultdict(list), defaultdict(lambda: defaultdict(list))
    for seed in range(num_corpora):
        one = world(source, seed, strength, num, num_calibration, num_poisoned)
        for name, found in judged(*scored(one, detectors), seed).items():
            flagged, p_value = found.verdict.flagged, found.verdict.p_value[~one.is_poisoned]
            fdp[name].append(false_discovery_proportion(flagged, one.is_poisoned))
            recall[name].append(flagged[one.is_poisoned].mean())
            num_ranks = found.report["num_calibration"] + 1
            for t in LEVELS:
                expected = math.floor(t * num_ranks * (1 + 1e-9)) / num_ranks
                share[name][t].append((p_value <= t).mean() / expected if expected else 1.0)
    return {
        name: Row(_mean(fdp[name]), float(np.mean(recall[name])), {t: _mean(share[name][t]) for t in LEVELS})
        for name in fdp
    }


def _mean(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def table(rows: dict[str, Row]) -> str:
    """The rows in Markdown."""
    lines = [
        f"| column | FDP at q = {Q} | recall | " + " | ".join(f"P(p <= {t}) / t" for t in LEVELS) + " | kept |",
        "| --- " * (len(LEVELS) + 4) + "|",
    ]
    for name, row in rows.items():
        shares = " | ".join(f"{mean:.2f} ± {error:.2f}" for mean, error in row.share.values())
        kept = "yes" if row.is_kept else "**no**"
        lines.append(f"| `{name}` | {row.fdp[0]:.3f} ± {row.fdp[1]:.3f} | {row.recall:.2f} | {shares} | {kept} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, folder, *more = sys.argv[1:]
    num_corpora, strength = int(more[0]) if more else 50, float(more[1]) if more[1:] else 0.2
    rows = measured(embedded(Path(data), Path(folder) / "embeddings.npz"), num_corpora, strength)
    print(table(rows))
    (Path(folder) / f"validity_{strength:g}.json").write_text(
        json.dumps({name: vars(row) for name, row in rows.items()})
    )
