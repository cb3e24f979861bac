"""Domain shift: whether a corpus looks like the calibration samples that its conformal p-values come from.

P-values mean what they say only if the clean samples of the corpus resemble the calibration samples. Here a classifier
tries to separate the two by their embeddings; if it can, no error rate that is declared can be trusted.
Poison moves the AUROC by no more than half its rate, so a few per cent of it are no shift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dede_ray.data.sampling import sample_keys
from dede_ray.metrics import Interval, auroc
from dede_ray.runtime.config import Config, Mistake

# Shapes: N samples of the corpus, M of the calibration set, E width of the embedding.

LEAST_SAMPLES = 50
"""On either side; with fewer the AUROC says nothing, and no judgement is made."""


@dataclass(frozen=True)
class Shift:
    """How well a classifier separates a corpus from the calibration samples."""

    auroc: Interval
    """0.5: not at all; 1: always. NaN where there were too few samples."""
    num_samples: int
    """Samples of the corpus that were looked at."""
    num_calibration: int
    limit: float
    """The AUROC above which p-values are refused."""

    @property
    def is_refused(self) -> bool:
        return self.auroc.value > self.limit

    def __str__(self) -> str:
        compared = f"{self.num_samples:,} samples and {self.num_calibration:,} calibration samples"
        if math.isnan(self.auroc.value):
            return f"domain shift was not judged: {compared}, which takes {LEAST_SAMPLES} of each"
        said = (
            "the calibration does not speak for this corpus, and error rates declared from it would not hold"
            if self.is_refused
            else "the calibration may speak for this corpus"
        )
        return f"a classifier tells {compared} apart with AUROC {self.auroc} (limit {self.limit:g}): {said}"

    def require(self) -> None:
        """Stop where the shift is too large.

        Raises:
            Mistake: the AUROC is above the limit.
        """
        if self.is_refused:
            raise Mistake(
                f"{self}; choose clean samples from where the corpus comes from, or a decision that needs none, or "
                "raise max_auroc and take the p-values as a ranking only"
            )


class ShiftCheck(Config):
    """Compare a corpus with the calibration samples.

    Source: Lopez-Paz & Oquab, Revisiting classifier two-sample tests, ICLR 2017, arXiv:1610.06545.
    """

    max_auroc: float = Field(0.7, ge=0.5, le=1)
    """Above it, p-values are refused."""
    num_samples: int = Field(5000, ge=LEAST_SAMPLES)
    """Drawn from the corpus and from the calibration set, at most so many each."""
    num_folds: int = Field(5, ge=2)
    """Each part is judged by a classifier that was trained on the others."""
    seed: int = 0
    """Draws the samples and the parts."""

    def compare(
        self,
        embedding_NE: NDArray[np.floating],
        sample_ids: Sequence[str],
        calibration_ME: NDArray[np.floating],
        calibration_ids: Sequence[str],
    ) -> Shift:
        """Train a logistic regression on standardised embeddings, and judge each sample by one that never saw it.

        Of equal embeddings on one side one is kept: a copy among the training samples would give the other away.

        Args:
            embedding_NE: finite.
            sample_ids: N of them; they decide who is drawn, so the order of the samples does not matter.
            calibration_ME: finite, of the same victim.
            calibration_ids: M of them.
        """
        corpus, corpus_fold = self._draw(embedding_NE, sample_ids)
        calibration, calibration_fold = self._draw(calibration_ME, calibration_ids)
        if min(len(corpus), len(calibration)) < LEAST_SAMPLES:
            nothing = Interval(math.nan, math.nan, math.nan)
            return Shift(nothing, len(corpus), len(calibration), self.max_auroc)
        from sklearn.linear_model import LogisticRegression  # seconds of import, which scoring actors need not pay
        from sklearn.preprocessing import StandardScaler

        both_BE, fold_B = np.concatenate([corpus, calibration]), np.concatenate([corpus_fold, calibration_fold])
        is_corpus_B = np.arange(len(both_BE)) < len(corpus)
        logit_B = np.empty(len(both_BE))
        for fold in range(self.num_folds):
            train_B = fold_B != fold
            scaler = StandardScaler().fit(both_BE[train_B])
            classifier = LogisticRegression(C=0.01, class_weight="balanced", max_iter=300)
            classifier.fit(scaler.transform(both_BE[train_B]), is_corpus_B[train_B])
            logit_B[~train_B] = classifier.decision_function(scaler.transform(both_BE[~train_B]))
        return Shift(auroc(logit_B, is_corpus_B), len(corpus), len(calibration), self.max_auroc)

    def _draw(
        self, embedding_NE: NDArray[np.floating], sample_ids: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Some of the samples in the order of their keys, copies once, and the fold of each."""
        assert len(embedding_NE) == len(sample_ids), (len(embedding_NE), len(sample_ids))
        order = np.argsort(sample_keys(sample_ids, self.seed).numpy(), kind="stable")
        # Twice as many as are needed: what remains once copies are gone is usually enough.
        drawn = np.asarray(embedding_NE[order[: 2 * self.num_samples]], np.float64)
        first = np.unique(drawn, axis=0, return_index=True)[1] if len(drawn) else np.empty(0, np.int64)
        kept = drawn[np.sort(first)[: self.num_samples]]
        return kept, np.arange(len(kept)) % self.num_folds
