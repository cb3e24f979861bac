"""How badly a caption fits its image: the CLIP-score, of the suspect itself and of a reference CLIP.

The two say different things. A reference CLIP that never saw the poison finds a picture with the attacker's caption a
plain mismatch: strong against poison of dirty labels, blind to clean labels, and shared with the merely noisy captions
that the web is full of. The suspect has *learned* the poisoned pairs, so that they fit it well: its own score is
informative only early in training, and afterwards the sign may turn. `clip_score_difference` is large where the suspect
finds a fit that the reference does not.

Shapes: B samples, M of the fitting set; similarities are cosines.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dede_ray.detectors.contract import DetectorSettings, Scorer, State, as_scores, state_fingerprint
from dede_ray.models.embedding import Batch, Need
from dede_ray.models.victims import ClipVictim, Victim
from dede_ray.runtime.config import Mistake

MIN_PAIRS = 10
"""Captioned samples without which no mixture is fitted."""
TINY = 1e-12  # an embedding of length 0 is similar to nothing


class CaptionScore(DetectorSettings):
    """Mismatch of image and caption.

    `clip_score` is minus the cosine of the two embeddings; `clip_score_gmm` the probability of belonging to the lower
    of two Gaussians fitted to the corpus's cosines (SafeCLIP: Yang, Xu & Mirzasoleiman, arXiv:2310.05862, who keep
    what is in the upper one by more than 0.9). With `reference` there are `clip_score_reference`, the same as
    clip_score by the reference CLIP, and `clip_score_difference`, the suspect's cosine minus the reference's.

    A sample without a caption gets what a pair gets of which nothing is known: the corpus's mean cosine, the lower
    Gaussian's weight. A cosine of 0 would put it among the worst fits, and NaN would lose it for all detectors.
    """

    kind: Literal["clip_score"] = "clip_score"
    fits: ClassVar[bool] = True
    reference: bool = False
    """Also ask the reference encoder, which must be a CLIP."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Starts the mixture's fit."""

    @property
    def gives(self) -> tuple[str, ...]:
        more = ("clip_score_reference", "clip_score_difference") if self.reference else ()
        return ("clip_score", "clip_score_gmm", *more)

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # the base has a constant
        return frozenset({"caption", "reference"}) if self.reference else frozenset({"caption"})

    def fit(self, pool: Batch, clean: Batch | None) -> State:
        """Fit the two Gaussians, and note the mean cosines, on the samples that have a caption."""
        similarity_B, has_caption_B = _own_similarity(pool), _has_caption(pool)
        if int(has_caption_B.sum()) < MIN_PAIRS:
            raise Mistake(
                f"clip_score: {int(has_caption_B.sum())} of the {len(pool):,} samples to fit on have a caption, "
                f"it takes {MIN_PAIRS}; fit on more samples, or leave clip_score out"
            )
        state = lower_and_upper(similarity_B[has_caption_B], self.seed)
        if self.reference:
            if pool.reference_caption_BR is None:
                raise Mistake(
                    "clip_score: reference is true, and the reference encoder has no text tower; name a CLIP as the "
                    "reference, or set reference to false"
                )
            state["reference_mean"] = _reference_similarity(pool)[has_caption_B].mean().reshape(1).cpu()
        return state

    def open(self, victim: Victim, state: State) -> Scorer:
        if not isinstance(victim, ClipVictim):
            raise Mistake(
                f"clip_score compares images with captions, and victim {victim.name} has no text tower; leave "
                "clip_score out"
            )
        return _CaptionScorer(self, victim, state)


class _CaptionScorer:
    controls: tuple[str, ...] = ()

    def __init__(self, config: CaptionScore, victim: Victim, state: State):
        self.columns = config.gives
        self.fingerprint = state_fingerprint(config, state)
        self.has_reference = config.reference
        self.state = {name: tensor.to(victim.device) for name, tensor in state.items()}
        self.mean = self.state["weight"] @ self.state["mean"]  # a fitted mixture has its samples' mean

    @torch.inference_mode()
    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        has_caption_B = _has_caption(batch)
        own_B = torch.where(has_caption_B, _own_similarity(batch), self.mean)
        posterior_B = posterior_of_lower(own_B, self.state)
        scores = {
            "clip_score": -own_B,
            "clip_score_gmm": torch.where(has_caption_B, posterior_B, self.state["weight"][0]),
        }
        if self.has_reference:
            other_B = torch.where(has_caption_B, _reference_similarity(batch), self.state["reference_mean"])
            scores |= {"clip_score_reference": -other_B, "clip_score_difference": own_B - other_B}
        return as_scores(scores)


def lower_and_upper(similarity_M: Tensor, seed: int) -> State:
    """Fit two Gaussians: `weight`, `mean` and `variance`, float64 (2,), the one of lower mean first."""
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(2, tol=1e-9, max_iter=10_000, random_state=seed)
    mixture.fit(similarity_M.double().cpu().numpy()[:, None])
    order = mixture.means_[:, 0].argsort(kind="stable")
    found = {"weight": mixture.weights_, "mean": mixture.means_[:, 0], "variance": mixture.covariances_[:, 0, 0]}
    return {name: torch.from_numpy(value_2[order]).double() for name, value_2 in found.items()}


def posterior_of_lower(similarity_B: Tensor, mixture: State) -> Tensor:
    """Probability of the Gaussian of lower mean, float64 (B,).

    Where it is also the wider one, it owns both tails: far above the upper mean the probability rises again.
    """
    square_B2 = (similarity_B.double().unsqueeze(1) - mixture["mean"]).square()
    log_B2 = mixture["weight"].log() - mixture["variance"].log() / 2 - square_B2 / (2 * mixture["variance"])
    return log_B2.softmax(dim=1)[:, 0]


def _has_caption(batch: Batch) -> Tensor:
    assert batch.caption_BE is not None, "needs caption"
    return ~batch.caption_BE.isnan().all(dim=1)


def _own_similarity(batch: Batch) -> Tensor:
    assert batch.caption_BE is not None, "needs caption"
    return _cosine(batch.embedding_BE, batch.caption_BE)


def _reference_similarity(batch: Batch) -> Tensor:
    assert batch.reference_caption_BR is not None, "needs reference and caption"
    return _cosine(batch.references, batch.reference_caption_BR)


def _cosine(image_BE: Tensor, caption_BE: Tensor) -> Tensor:
    """float64 (B,): sums of products round differently in batches of different sizes, and float32 must not show it."""
    image_BE, caption_BE = image_BE.double(), caption_BE.double()
    length_B = image_BE.square().sum(dim=1).sqrt() * caption_BE.square().sum(dim=1).sqrt()
    return (image_BE * caption_BE).sum(dim=1) / length_B.clamp_min(TINY)
