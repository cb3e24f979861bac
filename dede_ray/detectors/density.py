"""How lonely an embedding is: k-distance, LID, SLOF and DAO against a frozen reference set.

Rare poison sits where a victim's embedding space is sparse (Huang et al., "Detecting Backdoor Samples in Contrastive
Language Image Pretraining", ICLR 2025, arXiv:2502.01385). They compare each sample with its batch; here everything is
compared with one set of M embeddings, drawn once by the samples' keys, so that no score depends on who else is scored.
A sample that is in the set does not count as its own neighbour. The poison in the set must be too rare to make
neighbours of its own: keep `rate * M` below a quarter of k, or draw from clean samples.

Shapes: B samples, M references, E embedding width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dede_ray.config import Mistake
from dede_ray.decoder import sample_keys
from dede_ray.detectors.contract import Batch, DetectorSettings, Scorer, State, as_scores, state_fingerprint
from dede_ray.victims import Victim

EPSILON = 1e-4
"""Added to ratios of distances before the logarithm, as the publication does."""
TINY = 1e-12  # two equal references are at no distance


class Density(DetectorSettings):
    """Four scores of local density, of the victim's embeddings as they come, not of length one.

    `k_distance` is the distance to the k-th neighbour; `lid` the local intrinsic dimension (Amsaleg et al., KDD 2015,
    maximum likelihood); `slof`, the simplified local outlier factor, the k-distance over the neighbours' own; `dao`,
    the dimension-aware outlier score, the logarithms of these ratios weighted by the neighbours' local dimension.
    """

    kind: Literal["density"] = "density"
    fits: ClassVar[bool] = True
    num_references: int = Field(2048, ge=2)
    """M, the size of the reference set. Poison is invisible once k of it lie in the set."""
    k: int = Field(16, ge=1)
    """Neighbours of k-distance, SLOF and DAO."""
    lid_k: int = Field(64, ge=1)
    """Neighbours of LID."""
    drawn_from: Literal["suspected", "clean"] = "suspected"
    """The corpus itself, or clean samples."""
    seed: int = 0
    """Draws the reference set."""

    def fit(self, suspected: Batch, clean: Batch | None) -> State:
        """Draw the reference set; where fewer samples are given, it is all of them."""
        source = suspected if self.drawn_from == "suspected" else clean
        if source is None:
            raise Mistake("density: drawn_from is clean, and the run has no clean samples; name some, or leave it out")
        order = sample_keys(source.sample_ids, self.seed).argsort()[: self.num_references].sort().values
        drawn = source.part(order.tolist())
        if len(drawn) <= max(self.k, self.lid_k):
            raise Mistake(
                f"density: {len(drawn):,} reference embeddings for k = {max(self.k, self.lid_k)} neighbours; fit on "
                "more samples, or lower k and lid_k"
            )
        return {"reference": drawn.embedding_BE.cpu(), "key": sample_keys(drawn.sample_ids, 0)}

    def open(self, victim: Victim, state: State) -> Scorer:
        return _DensityScorer(self, victim, state)


class _DensityScorer:
    columns: tuple[str, ...] = ("k_distance", "lid", "slof", "dao")
    controls: tuple[str, ...] = ()

    def __init__(self, config: Density, victim: Victim, state: State):
        self.fingerprint = state_fingerprint(config, state)
        reference_ME, key_M = state["reference"].to(victim.device), state["key"]
        self.near = Neighbourhood(reference_ME, key_M, config.k)
        self.far = self.near if config.lid_k == config.k else Neighbourhood(reference_ME, key_M, config.lid_k)

    @torch.inference_mode()
    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        scores = self.near.score(batch.embedding_BE, batch.sample_ids)
        if self.far is not self.near:
            distance_Bk, _ = self.far.nearest(batch.embedding_BE, batch.sample_ids)
            scores["lid"] = local_dimension(distance_Bk)
        return as_scores(scores)


class Neighbourhood:
    """Distances to a reference set, and what they say.

    Args:
        reference_ME: float, finite.
        key_M: int64, `sample_keys(ids, 0)` of the references; these samples leave themselves out when scored.
        k: neighbours that count.
    """

    def __init__(self, reference_ME: Tensor, key_M: Tensor, k: int):
        assert len(reference_ME) > k, (len(reference_ME), k)
        self.k = k
        self.centre_E = reference_ME.double().mean(dim=0)
        self.reference_ME = reference_ME.double() - self.centre_E
        self.norm_M = self.reference_ME.square().sum(dim=1)
        self.place = {key: place for place, key in enumerate(key_M.tolist())}
        distance_Mk, _ = self._nearest(self.reference_ME, torch.arange(len(reference_ME)))
        self.k_distance_M = distance_Mk[:, -1]
        self.lid_M = local_dimension(distance_Mk)

    def score(self, embedding_BE: Tensor, sample_ids: Sequence[str]) -> dict[str, Tensor]:
        """The four scores of each sample, float64 (B,); higher is lonelier."""
        distance_Bk, index_Bk = self.nearest(embedding_BE, sample_ids)
        ratio_Bk = distance_Bk[:, -1:] / self.k_distance_M[index_Bk].clamp_min(TINY)
        return {
            "k_distance": distance_Bk[:, -1],
            "lid": local_dimension(distance_Bk),
            "slof": ratio_Bk.mean(dim=1),
            "dao": (self.lid_M[index_Bk] * ratio_Bk.clamp_min(TINY).log()).mean(dim=1),
        }

    def nearest(self, embedding_BE: Tensor, sample_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Sorted distances (B, k) to the nearest references other than oneself, and which those are."""
        keys = sample_keys(sample_ids, 0).tolist()
        own_B = torch.tensor([self.place.get(key, -1) for key in keys], dtype=torch.long)
        return self._nearest(embedding_BE.double() - self.centre_E, own_B)

    def _nearest(self, query_BE: Tensor, own_B: Tensor) -> tuple[Tensor, Tensor]:
        """`own_B` is left out, -1 is nobody.

        In float64: products of matrices round differently for batches of different sizes, and a float32 score must
        not show it.
        """
        square_BM = query_BE.square().sum(dim=1, keepdim=True) + self.norm_M - 2 * query_BE @ self.reference_ME.T
        is_own_B = own_B >= 0
        square_BM[is_own_B.nonzero()[:, 0], own_B[is_own_B]] = torch.inf
        square_Bk, index_Bk = square_BM.topk(self.k, dim=1, largest=False)
        return square_Bk.clamp_min(0).sqrt(), index_Bk


def local_dimension(distance_Bk: Tensor) -> Tensor:
    """Local intrinsic dimension (B,) from sorted distances to the k nearest: -k / sum ln(a_i / a_k + EPSILON)."""
    ratio_Bk = distance_Bk / distance_Bk[:, -1:].clamp_min(TINY)
    return -distance_Bk.shape[1] / (ratio_Bk + EPSILON).log().sum(dim=1).clamp_max(-TINY)
