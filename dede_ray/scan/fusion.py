"""From the columns of several detectors to one score: difficulty taken out, then combined.

    Difficulty().fit(score, covariates) -> state        how a clean score depends on how difficult a picture is
    Fusion(columns=...).fit(columns) -> state           the rank among clean samples of each column's numbers

A combined score depends on the sample and the states alone, and the states on corpus and calibration samples in one
heap, so the clean samples of both stay exchangeable, and the p-values keep their promise. P-values of detectors are
never multiplied: they share a victim. Where the docstrings say clean, a small share of poison does little harm.

Shapes: N samples, C covariates, F functions of the covariates, m samples fitted on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator
from scipy import special

from dede_ray.runtime.config import Config, Mistake

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
State = dict[str, np.ndarray]
"""What fitting leaves behind."""

DEGREE = 3  # degree of the splines
NUM_FOLDS = 5  # folds of clean samples, for what is measured on held-out ones
HUBER = 1.345  # residuals beyond so many standard deviations count less; 95 % efficient for normal ones
MAD_TO_STD = 1 / special.ndtri(0.75)


# ------------------------------------------------------------------------------------------------ difficulty


class Difficulty(Config):
    """How far a score lies above what is usual for pictures as difficult as this one, in its usual spread.

    Location and scale are sums of cubic splines of the covariates, fitted to clean samples by ridge regression with
    Huber's weights. Scores that are all positive are taken as logarithms.

    Why: over 150,000 images of CC3M, statistics of low level explain half of the variance of a squared reconstruction
    error (DEFUSE, ACM MM 2026), so that what is flagged without this is largely what is detailed.
    """

    num_knots: int = Field(5, ge=2)
    """Quantiles of each covariate between which a spline bends."""
    ridge: float = Field(1.0, gt=0)
    """Weight of the squared coefficients; a sample's squared residual weighs 1."""

    def fit(self, score_N: ArrayLike, covariate_NC: ArrayLike) -> State:
        """Learn location and scale from clean samples; those without a score or a covariate are left out.

        The state also holds `r2_before` and `r2_after`: the share of the variance of held-out clean scores that the
        covariates explain, as they are and once normalised. After should be below 0.05; a few hundred samples are too
        few to show it (with 11 covariates 700 gave 0.00, where 20,000 new samples gave 0.07; from 2,000 on it was below
        0.03).

        Raises:
            Mistake: fewer clean samples than a fit takes, or all of the same score.
        """
        score_N, covariate_NC = _checked(score_N, covariate_NC)
        usable_N = ~np.isnan(score_N) & np.isfinite(covariate_NC).all(axis=1)
        score_N, covariate_NC = score_N[usable_N], covariate_NC[usable_N]
        least = 10 * (1 + covariate_NC.shape[1] * (self.num_knots + DEGREE - 2))
        if len(score_N) < least:
            raise Mistake(
                f"difficulty: {len(score_N):,} clean samples with a score and all covariates, and "
                f"{covariate_NC.shape[1]} covariates take at least {least:,}; score more clean samples, or lower "
                "num_knots"
            )
        if np.ptp(score_N) == 0:
            raise Mistake("difficulty: all clean samples have the same score, so there is nothing to normalise")
        is_log = bool((score_N > 0).all())
        value_N = np.log(score_N) if is_log else score_N
        held_out_N, normal_N = np.empty(len(value_N)), np.empty(len(value_N))
        for fold in range(NUM_FOLDS):
            test_N = np.arange(len(value_N)) % NUM_FOLDS == fold
            location_N, scale_N = self._predict(self._fit(value_N[~test_N], covariate_NC[~test_N]), covariate_NC)
            held_out_N[test_N] = location_N[test_N]
            normal_N[test_N] = ((value_N - location_N) / scale_N)[test_N]
        state = self._fit(value_N, covariate_NC)
        state["is_log"], state["lowest"] = np.array(is_log), np.array(score_N.min())
        state["r2_before"] = np.array(self.explained(value_N, covariate_NC))
        state["r2_after"] = np.array(self.explained(normal_N, covariate_NC))
        logger.info(
            "difficulty explains %.3f of the variance of held-out clean scores, %.3f once normalised (%s samples)",
            state["r2_before"],
            state["r2_after"],
            f"{len(value_N):,}",
        )
        return state

    def apply(self, state: State, score_N: ArrayLike, covariate_NC: ArrayLike) -> Array:
        """Normalise scores, (N,): NaN without a score or a covariate. Covariates beyond those fitted count as the last
        of them, and so do lower scores where logarithms are taken."""
        score_N, covariate_NC = _checked(score_N, covariate_NC)
        value_N = np.log(np.maximum(score_N, state["lowest"])) if state["is_log"] else score_N
        location_N, scale_N = self._predict(state, covariate_NC)
        return np.where(np.isfinite(covariate_NC).all(axis=1), (value_N - location_N) / scale_N, np.nan)

    def explained(self, value_N: ArrayLike, covariate_NC: ArrayLike) -> float:
        """Share of the variance of held-out values that splines of the covariates explain, at least 0."""
        value_N, covariate_NC = _checked(value_N, covariate_NC)
        residual_N = np.empty(len(value_N))
        for fold in range(NUM_FOLDS):
            test_N = np.arange(len(value_N)) % NUM_FOLDS == fold
            knots = self._knots(covariate_NC[~test_N])
            weight_F = _ridge(_basis(covariate_NC[~test_N], knots), value_N[~test_N], self.ridge)
            residual_N[test_N] = value_N[test_N] - _basis(covariate_NC[test_N], knots) @ weight_F
        return float(max(0.0, 1 - residual_N.var() / value_N.var()))

    def _fit(self, value_N: Array, covariate_NC: Array) -> State:
        knots_CK = self._knots(covariate_NC)
        basis_NF = _basis(covariate_NC, knots_CK)
        location_F = _robust_ridge(basis_NF, value_N, self.ridge)
        residual_N = np.abs(value_N - basis_NF @ location_F)
        floor = 1e-3 * np.median(residual_N) + np.finfo(np.float64).tiny  # what was fitted exactly has a logarithm, too
        scale_F = _robust_ridge(basis_NF, np.log(np.maximum(residual_N, floor)), self.ridge)
        typical = np.median(residual_N / np.exp(basis_NF @ scale_F))
        scale_F[0] += np.log(typical * MAD_TO_STD)  # the first function is the constant
        return {"knots": knots_CK, "location": location_F, "scale": scale_F}

    def _knots(self, covariate_NC: Array) -> Array:
        """Quantiles of each covariate, float64 (C, num_knots)."""
        return np.quantile(covariate_NC, np.linspace(0, 1, self.num_knots), axis=0).T

    def _predict(self, state: State, covariate_NC: Array) -> tuple[Array, Array]:
        """Location and scale of each sample."""
        basis_NF = _basis(np.nan_to_num(covariate_NC), state["knots"])
        return basis_NF @ state["location"], np.exp(basis_NF @ state["scale"])


def _checked(score_N: ArrayLike, covariate_NC: ArrayLike) -> tuple[Array, Array]:
    score_N, covariate_NC = np.asarray(score_N, np.float64), np.asarray(covariate_NC, np.float64)
    assert score_N.ndim == 1, score_N.shape
    assert covariate_NC.ndim == 2, covariate_NC.shape
    assert len(score_N) == len(covariate_NC), (score_N.shape, covariate_NC.shape)
    return score_N, covariate_NC


def _basis(covariate_NC: Array, knots_CK: Array) -> Array:
    """A constant, and the B-splines of each covariate but one, as they sum to the constant: float64 (N, F)."""
    columns = [np.ones((len(covariate_NC), 1))]
    for value_N, knots_K in zip(covariate_NC.T, knots_CK, strict=True):
        inner = np.unique(knots_K)  # a covariate of few values has equal quantiles
        if inner.size > 1:
            padded = np.r_[[inner[0]] * DEGREE, inner, [inner[-1]] * DEGREE]
            splines = scipy.interpolate.BSpline.design_matrix(np.clip(value_N, inner[0], inner[-1]), padded, DEGREE)
            columns.append(splines.toarray()[:, 1:])
    return np.concatenate(columns, axis=1)


def _ridge(basis_NF: Array, value_N: Array, ridge: float, weight_N: Array | None = None) -> Array:
    """Weighted ridge regression; the constant is not drawn to zero. Only the weights' ratios to `ridge` matter."""
    weighted_NF = basis_NF if weight_N is None else basis_NF * weight_N[:, None]
    penalty = np.full(basis_NF.shape[1], ridge)
    penalty[0] = 0
    return np.linalg.solve(weighted_NF.T @ basis_NF + np.diag(penalty), weighted_NF.T @ value_N)


def _robust_ridge(basis_NF: Array, value_N: Array, ridge: float, num_rounds: int = 20) -> Array:
    """Ridge regression with Huber's weights, by reweighting; a few odd samples among the clean ones hardly matter.

    Source: Huber & Ronchetti, Robust Statistics, 2009, section 7.8.
    """
    weight_F = _ridge(basis_NF, value_N, ridge)
    for _ in range(num_rounds):
        residual_N = np.abs(value_N - basis_NF @ weight_F)
        reach = HUBER * MAD_TO_STD * np.median(residual_N)
        if reach == 0:
            break
        weight_F = _ridge(basis_NF, value_N, ridge, np.minimum(1, reach / np.maximum(residual_N, reach)))
    return weight_F


# ------------------------------------------------------------------------------------------------ combination


class Fusion(Config):
    """One score from several columns: each as the normal score of its rank in the pool, then combined.

    The highest ranks are not learnt from, as poison may hold them in one column and clean samples in another, which
    would make them equal: beyond the share `trim` the logarithm of the share above falls on as it did before, as a
    power of the distance to the median (a Weibull tail, which follows light and heavy ones).
    """

    columns: tuple[str, ...] = Field(min_length=1)
    """Score columns to combine; `dede_ray.detectors` says which there are."""
    rule: Literal["max", "mean_top2"] = "max"
    """The highest normal score, or the mean of the two highest, which takes two detectors to agree."""
    tail: float = Field(0.25, gt=0, le=0.5)
    """Share of the scores that says, but for the highest, how far apart these are."""
    trim: float = Field(0.05, gt=0, lt=0.25)
    """Share of the scores, the highest, that may be poison."""

    @model_validator(mode="after")
    def _learns_from_something(self) -> Fusion:
        if self.trim >= self.tail:
            raise ValueError(f"trim {self.trim:g} leaves nothing of tail {self.tail:g}; keep it below")
        return self

    def fit(self, columns: Mapping[str, ArrayLike]) -> State:
        """Learn the ranks from the pool; NaN are left out.

        Raises:
            Mistake: a column that is missing, or has fewer than two different scores.
        """
        state = {}
        for name in self.columns:
            if name not in columns:
                raise Mistake(f"fusion: no column {name}; there are {', '.join(sorted(columns))}")
            clean = np.asarray(columns[name], np.float64)
            clean = clean[~np.isnan(clean)]
            if np.unique(clean).size < 2:
                raise Mistake(
                    f"fusion: column {name} has {np.unique(clean).size} different scores among {clean.size:,} clean "
                    "samples, so none can be ranked above another; leave it out, or score more clean samples"
                )
            value, log_share = _log_share_above(clean)
            low = log_share >= np.log(self.trim)
            low[0] = True
            value, log_share = value[low], log_share[low]
            state[f"{name}/value"], state[f"{name}/log_share"] = value, log_share
            state[f"{name}/median"] = np.array(np.median(clean))
            state[f"{name}/power"] = np.array(_tail_power(value, log_share, np.median(clean), self.tail))
        return state

    def apply(self, state: State, columns: Mapping[str, ArrayLike]) -> Array:
        """Combine, float64 (N,). A column that a sample lacks says nothing of it, which is a normal score of 0; a
        sample that lacks all has NaN."""
        normal_CN = np.stack([self.normal_score(state, name, columns[name]) for name in self.columns])
        known_CN = np.sort(np.nan_to_num(normal_CN), axis=0)
        combined_N = known_CN[-1] if self.rule == "max" else known_CN[-2:].mean(axis=0)
        return np.where(np.isnan(normal_CN).all(axis=0), np.nan, combined_N)

    def normal_score(self, state: State, name: str, score_N: ArrayLike) -> Array:
        """A column as normal scores, float64 (N,): rising with the score, about N(0, 1) for clean samples."""
        score_N = np.asarray(score_N, np.float64)
        value, log_share = state[f"{name}/value"], state[f"{name}/log_share"]
        share_N = np.interp(score_N, value, log_share)
        reach = max(float(value[-1] - state[f"{name}/median"]), 1e-12 * max(1.0, abs(float(value[-1]))))
        beyond_N = np.maximum(score_N - value[-1], 0) / reach
        return -special.ndtri_exp(share_N * (1 + beyond_N) ** state[f"{name}/power"])


def _log_share_above(clean: Array) -> tuple[Array, Array]:
    """Different scores, rising, and the logarithm of the share of samples at or above each."""
    value, first = np.unique(clean, return_index=True)
    rank = clean.size + 1 - scipy.stats.rankdata(clean)[first]  # equal scores share the mean of their ranks
    return value, np.log(rank / (clean.size + 1))


def _tail_power(value: Array, log_share: Array, median: float, tail: float) -> float:
    """The power of the distance to the median with which the logarithm of the share above falls, between those that
    the share `tail` is above and the last; 1, an exponential tail, where these are not apart."""
    first = min(int(np.searchsorted(-log_share, -np.log(tail))), value.size - 1)
    near, far = float(value[first] - median), float(value[-1] - median)
    if not 0 < near < far:
        return 1.0
    return float(np.log(log_share[-1] / log_share[first]) / np.log(far / near))
