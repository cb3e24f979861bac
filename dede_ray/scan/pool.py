"""Scores that the pool of corpus and calibration samples teaches: company, seeds that are amplified, a classifier.

    Company().score(base_N, residual_NR, looks)         are the highest of the pool led astray in one direction?
    Amplify().score(base_N, residual_NR, looks)         who else of the pool is led astray as its very highest are?
    Classifier().score(feature_NF, learner_MF, names)   what tells the pool from clean samples that calibrate nothing?

All see corpus and calibration samples in one heap and do not know which is which: whoever exchanges a clean corpus
sample for a calibration sample changes nothing but whose score is whose. So p-values of such scores keep their promise
however hard they were fitted (Marandon, Lei, Mary & Roquain, "Adaptive novelty detection with false discovery rate
guarantee", Ann. Stat. 2024, arXiv:2208.06685).

Shapes: N samples of the pool, R width of a residual, F features, M clean learners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.stats import rankdata

from dede_ray.data.sampling import sample_keys
from dede_ray.runtime.config import Config
from dede_ray.scan.groups import NEAR_DISTANCE, first_copy, first_near_copy

Scores = NDArray[np.float64]
BLOCK = 1024
"""Candidates compared with all others at once."""
LEAST_SEEDS, MOST_SEEDS = 20, 2000
"""Seeds that are amplified."""
NO_COMPANY = -1.5
"""Company below it is that of no candidate."""
MOST_FITTED = 20_000
"""Samples of the pool, and clean learners, that one classifier is fitted to at most."""


@dataclass(frozen=True, eq=False)
class Looks:
    """Which of N samples are one picture, or almost; None where a sample lacks a hash."""

    sample_ids: Sequence[str]
    content_hash: Sequence[str | None]
    perceptual_hash: Sequence[int | None]

    def __len__(self) -> int:
        return len(self.sample_ids)

    def part(self, rows: NDArray[np.int64]) -> Looks:
        """Some of the samples."""
        return Looks(*([values[row] for row in rows.tolist()] for values in vars(self).values()))

    def groups(self) -> NDArray[np.int64]:
        """For each sample the place of the one that represents its picture: drawn by id."""
        order = sample_keys(self.sample_ids, 0).argsort().numpy()
        near_N = first_near_copy(self.perceptual_hash, order, NEAR_DISTANCE)
        return near_N[first_copy(self.content_hash, order)]


class Company(Config):
    """Whether a suspicious sample is led astray in the direction in which other suspicious ones are.

    The samples of one attack share a target, so what the victim says beyond what was expected of them, the residual,
    points one way; clean samples that are merely odd are odd each in its own way. Of the pool's highest by another
    score, the candidates, each is scored by the mean cosine of its residual to the `k` nearest of the other candidates,
    copies and almost equal pictures counted once. All others score below, in the order that they had.
    """

    of: str = "dede_reverse"
    """Score column whose highest are the candidates."""
    residual: str = "dede_residual"
    """Column of residuals: vectors, one a sample."""
    share: float = Field(0.05, gt=0, le=1)
    """Candidates / samples of the pool; poison that is not among them is not found."""
    k: int = Field(10, ge=1)
    """Nearest candidates that count; fewer poisoned samples than that are no company."""

    def score(self, base_N: ArrayLike, residual_NR: ArrayLike, looks: Looks) -> Scores:
        """Score a pool, float64 (N,): in [-1, 1] for candidates, below -2 for others, NaN without a base score."""
        base_N, residual_NR = np.asarray(base_N, np.float64), np.asarray(residual_NR, np.float64)
        scored = np.flatnonzero(~np.isnan(base_N))
        score_N = np.full(base_N.size, np.nan)
        if not scored.size:
            return score_N
        score_N[scored] = rankdata(base_N[scored]) / (scored.size + 1) - 3
        least = np.sort(base_N[scored])[-max(1, round(self.share * scored.size))]
        is_candidate = (base_N >= least) & np.isfinite(residual_NR).all(axis=1)
        rows = np.flatnonzero(is_candidate)
        group = looks.part(rows).groups()
        unit_CR = _unit(residual_NR[rows]).astype(np.float32)
        leaders = np.flatnonzero(group == np.arange(rows.size))
        score_N[rows] = _reach(unit_CR, unit_CR[leaders], np.searchsorted(leaders, group), self.k)
        return score_N


class Amplify(Config):
    """Seed and amplify: who of the whole pool is led astray in the direction in which the surest samples are?

    The pool's highest by another score are the seeds. Every sample is scored by how far its residual goes in the
    directions of the `k` nearest seeds, on average, itself not among them; seeds that show one picture count once.
    `Company` asks candidates alone, and for the direction alone; this finds poison that is not among the highest by the
    first score, too.
    """

    of: str = "dede_reverse"
    """Score column whose highest are the seeds."""
    residual: str = "dede_residual"
    """Column of residuals: vectors, one a sample."""
    share: float = Field(0.01, gt=0, le=1)
    """Seeds / samples of the pool; 20 at least, and 2,000 at most."""
    k: int = Field(10, ge=1)
    """Nearest seeds that count; poison of which fewer are seeds is not found."""

    def score(self, base_N: ArrayLike, residual_NR: ArrayLike, looks: Looks) -> Scores:
        """Score a pool, float64 (N,), in units of the residual; NaN without a base score or a residual."""
        base_N, residual_NR = np.asarray(base_N, np.float64), np.asarray(residual_NR, np.float32)
        usable = np.flatnonzero(~np.isnan(base_N) & np.isfinite(residual_NR).all(axis=1))
        residual_UR = residual_NR[usable]
        num_seeds = min(max(LEAST_SEEDS, round(self.share * usable.size)), MOST_SEEDS, usable.size)
        by_lot = sample_keys([looks.sample_ids[row] for row in usable.tolist()], 0, 5).numpy()
        seeds = np.lexsort((by_lot, -base_N[usable]))[:num_seeds]
        group = looks.part(usable[seeds]).groups()
        is_leader, place_U = group == np.arange(num_seeds), np.full(usable.size, -1)
        place_U[seeds] = (np.cumsum(is_leader) - 1)[group]  # of a seed's picture among the leaders
        score_N = np.full(base_N.size, np.nan)
        score_N[usable] = _reach(residual_UR, _unit(residual_UR[seeds[is_leader]]), place_U, self.k)
        return score_N


def _unit(rows_NR: NDArray[np.floating]) -> NDArray[np.floating]:
    """Rows of length one; a row of zeros stays."""
    return rows_NR / np.maximum(np.linalg.norm(rows_NR, axis=1, keepdims=True), 1e-30)


def _reach(rows_NR: NDArray[np.floating], unit_LR: NDArray[np.floating], own_N: NDArray[np.int64], k: int) -> Scores:
    """How far rows go in the `k` nearest of L directions, on average: float64 (N,); too few count as zeros.

    Args:
        own_N: the direction that is a row's own, which is no company to it; -1 for none.
    """
    num, reach_N = min(k, len(unit_LR)), np.empty(len(rows_NR))
    for start in range(0, len(rows_NR), BLOCK):
        block = slice(start, start + BLOCK)
        reach_BL = rows_NR[block] @ unit_LR.T
        reach_BL[own_N[block, None] == np.arange(len(unit_LR))] = -np.inf
        nearest = np.partition(reach_BL, -num, axis=1)[:, -num:]
        reach_N[block] = np.where(np.isfinite(nearest), nearest, 0).sum(axis=1, dtype=np.float64) / k
    return reach_N


class Classifier(Config):
    """A linear classifier that tells the pool from clean learners; what it is surest of is unlike anything clean.

    Logistic regression on standardised features, strongly regularised, learners against pool: poison is in the pool
    only, so it is what the classifier can learn. Each sample is scored by classifiers that were not fitted on it (its
    fold, by key), and `repeats` divisions into folds are averaged before anything is calibrated.
    Trees and weak regularisation find less: what counts is a direction that many share, not a memory.
    """

    columns: tuple[str, ...] = ("dede_reverse",)
    """Score columns that are features, as normal scores of their ranks in the pool."""
    residual: str | None = "dede_residual"
    """Column of residuals whose components are features, too."""
    inverse_penalty: float = Field(0.01, gt=0)
    """scikit-learn's C."""
    folds: int = Field(5, ge=2)
    repeats: int = Field(3, ge=1)
    seed: int = 0
    """Divides into folds, and the calibration samples into learners and the others."""
    splits: int = Field(1, ge=1)
    """Divisions of the calibration samples: a list depends on who happens to learn. With more than one, a conformal
    decision averages e-values over them (decisions.py), which is steadier, finds less, and takes as often longer."""

    def score(self, feature_NF: ArrayLike, learner_MF: ArrayLike, looks: Looks) -> Scores:
        """Score a pool, float64 (N,): log odds of being of the pool; NaN where a feature is missing."""
        from sklearn.linear_model import LogisticRegression

        pool_NF, clean_MF = np.asarray(feature_NF, np.float64), np.asarray(learner_MF, np.float64)
        usable = np.flatnonzero(np.isfinite(pool_NF).all(axis=1))
        clean_MF = clean_MF[np.isfinite(clean_MF).all(axis=1)]
        score_N = np.full(len(pool_NF), np.nan)
        if usable.size < self.folds or len(clean_MF) < 2:
            return score_N
        pool_UF = pool_NF[usable]
        centre_F, scale_F = pool_UF.mean(axis=0), pool_UF.std(axis=0)
        scale_F[scale_F == 0] = 1
        pool_UF, clean_MF = (
            ((some - centre_F) / scale_F).astype(np.float32)
            for some in (pool_UF, clean_MF[:: -(-len(clean_MF) // MOST_FITTED)])
        )
        names = [looks.content_hash[i] or looks.sample_ids[i] for i in usable.tolist()]  # copies share a fold
        key_U, last = sample_keys(names, self.seed, 4).numpy(), min(MOST_FITTED, usable.size) - 1
        is_drawn_U = key_U <= np.partition(key_U, last)[last]
        total_U = np.zeros(usable.size)
        for repeat in range(self.repeats):
            fold_U = sample_keys(names, self.seed, 3, repeat).numpy() % self.folds
            for fold in range(self.folds):
                out = fold_U == fold
                if not out.any() or out.all():
                    continue
                fitted = LogisticRegression(
                    C=self.inverse_penalty, class_weight="balanced", solver="newton-cholesky", tol=1e-6
                )
                taught = is_drawn_U & ~out
                fitted.fit(
                    np.concatenate([clean_MF, pool_UF[taught]]), np.repeat([0, 1], [len(clean_MF), int(taught.sum())])
                )
                total_U[out] += fitted.decision_function(pool_UF[out])
        score_N[usable] = total_U / self.repeats
        return score_N

    def features(self, columns: Sequence[ArrayLike], residual_NR: ArrayLike | None) -> NDArray[np.float64]:
        """(N, F): normal scores of each column's ranks among these N, and each residual with its length's logarithm.

        Give pool and learners together, so that both are ranked among the same samples.
        """
        from scipy.special import ndtri

        parts = []
        for column in columns:
            value_N = np.asarray(column, np.float64)
            known = ~np.isnan(value_N)
            normal_N = np.full(value_N.size, np.nan)
            normal_N[known] = ndtri(rankdata(value_N[known]) / (known.sum() + 1))
            parts.append(normal_N[:, None])
        if residual_NR is not None:
            residual_NR = np.asarray(residual_NR, np.float64)
            square_N = np.square(residual_NR).mean(axis=1, keepdims=True)
            parts += [residual_NR, square_N, np.log(np.maximum(square_N, 1e-30))]
        return np.concatenate(parts, axis=1)
