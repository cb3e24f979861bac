"""How lonely an embedding is: k-distance, LID, SLOF and DAO against a frozen reference set.

Rare poison sits where a victim's embedding space is sparse (Huang et al., "Detecting Backdoor Samples in Contrastive
Language Image Pretraining", ICLR 2025, arXiv:2502.01385). They compare each sample with its batch; here everything is
compared with one set of M embeddings, drawn once by the samples' keys, so that no score depends on who else is scored.
A sample that is in the set does not count as its own neighbour.

Poison in the set makes neighbours of its own for the poison that is scored, which turns all four scores around: on a
backdoored WRN-16-1, 1 % of triggered images among 2,048 references gives AUROCs of .25 (DAO), .33 (SLOF) and .03 (LID)
where clean references give 1.00, .99 at least. So the set is trimmed, by a rule that knows no labels: a cluster of
poison is lonely when one looks beyond it, at neighbours a sixteenth of the set away or, where it is large, a quarter,
and the loneliest fifth is left out. With it all are .99 or more at 0, 1, 3 and 10 %. (By the sixteenth alone, 10 % are
company to each other: .66, .71 and .00; by more than it alone, weak attacks lose half of what is above all clean ones.)

Shapes: B samples, M references, E embedding width, k neighbours.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dede_ray.detectors.contract import DetectorSettings, DrawnFrom, Scorer, State, as_scores, state_fingerprint
from dede_ray.models.embedding import Batch
from dede_ray.models.victims import Victim
from dede_ray.runtime.config import Mistake

EPSILON = 1e-4
"""Added to ratios of distances before the logarithm, as the publication does."""
ROUNDING = 1e-13  # of squared distances, in units of the squared lengths: float64 rounds at 2e-16 a step
FAR = (16, 4)  # parts of the reference set, as large as what lies between a reference and where one looks at it from
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
    """References that are drawn; M are left of them."""
    trim: float = Field(0.2, ge=0, le=0.5)
    """Share of the references that is left out: those with the largest distance to neighbour number `num_references` /
    16, or / 4. Twice as much as may be poisoned."""
    k: int = Field(16, ge=1)
    """Neighbours of k-distance, SLOF and DAO."""
    lid_k: int = Field(64, ge=1)
    """Neighbours of LID."""
    drawn_from: DrawnFrom = "pool"
    """Corpus and calibration samples in one heap, or other samples, which are clean."""
    seed: int = 0
    """Draws the reference set."""

    @property
    def gives(self) -> tuple[str, ...]:
        return _DensityScorer.columns

    def fit(self, pool: Batch, clean: Batch | None) -> State:
        """Draw the reference set; where fewer samples are given, it is all of them."""
        source = self.drawn(self.drawn_from, pool, clean)
        order = source.keys(self.seed).argsort()[: self.num_references].sort().values
        drawn = source.part(order.tolist())
        drawn = drawn.part(_least_lonely(drawn.embedding_BE, drawn.keys(0), self.trim))
        if len(drawn) <= max(self.k, self.lid_k):
            raise Mistake(
                f"density: {len(drawn):,} reference embeddings for k = {max(self.k, self.lid_k)} neighbours; fit on "
                "more samples, or lower k and lid_k"
            )
        return {"reference": drawn.embedding_BE.cpu(), "key": drawn.keys(0)}

    def open(self, victim: Victim, state: State) -> Scorer:
        return _DensityScorer(self, victim, state)


class _DensityScorer:
    columns: tuple[str, ...] = ("k_distance", "lid", "slof", "dao")
    controls: tuple[str, ...] = ()

    def __init__(self, config: Density, victim: Victim, state: State):
        self.fingerprint = state_fingerprint(config, state)
        reference_ME, key_M = state["reference"].to(victim.device), state["key"]
        self.near, self.lid_k = Neighbourhood(reference_ME, key_M, config.k), config.lid_k

    @torch.inference_mode()
    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        distance_BM = self.near.distances(batch.embedding_BE, batch.keys(0))
        scores = self.near.score_at(distance_BM)
        if self.lid_k != self.near.k:
            scores["lid"] = local_dimension(distance_BM.topk(self.lid_k, dim=1, largest=False).values)
        return as_scores(scores)


def _least_lonely(embedding_ME: Tensor, key_M: Tensor, trim: float) -> list[int]:
    """Places of all but the share `trim` of references that are loneliest, by the higher of their two ranks."""
    num, rank_M = len(embedding_ME), torch.zeros(len(embedding_ME), dtype=torch.long)
    keep = num - round(trim * num)
    for part in FAR if 1 < num != keep else ():
        lonely_M = Neighbourhood(embedding_ME.cpu(), key_M, max(1, num // part)).k_distance_M
        rank_M = rank_M.maximum(lonely_M.argsort(stable=True).argsort())
    return rank_M.argsort(stable=True)[:keep].sort().values.tolist()


class References:
    """A frozen set of embeddings, and the nearest of them; a sample that is in the set leaves itself out.

    Args:
        reference_ME: float, finite.
        key_M: int64, `Batch.keys(0)` of the references.
        k: neighbours that count.
    """

    def __init__(self, reference_ME: Tensor, key_M: Tensor, k: int):
        assert len(reference_ME) > k, (len(reference_ME), k)
        self.k = k
        self.centre_E = reference_ME.double().mean(dim=0)
        self.reference_ME = reference_ME.double() - self.centre_E
        self.norm_M = self.reference_ME.square().sum(dim=1)
        self.place = {key: place for place, key in enumerate(key_M.tolist())}

    def nearest(self, embedding_BE: Tensor, key_B: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted distances (B, k) to the nearest references other than oneself, and which those are."""
        return self._nearest(self.distances(embedding_BE, key_B))

    def distances(self, embedding_BE: Tensor, key_B: Tensor) -> Tensor:
        """Distances (B, M) to all references, float64; infinite to oneself."""
        own_B = torch.tensor([self.place.get(key, -1) for key in key_B.tolist()], dtype=torch.long)
        return self._distances(embedding_BE.double() - self.centre_E, own_B)

    def _distances(self, query_BE: Tensor, own_B: Tensor) -> Tensor:
        """`own_B` is left out, -1 is none.

        In float64: products of matrices round differently for batches of different sizes, and a float32 score must
        not show it. For the same reason copies are at no distance, instead of at that of their rounding.
        """
        both_BM = query_BE.square().sum(dim=1, keepdim=True) + self.norm_M
        square_BM = both_BM - 2 * query_BE @ self.reference_ME.T
        square_BM[square_BM < ROUNDING * both_BM] = 0
        is_own_B = own_B >= 0
        square_BM[is_own_B.nonzero()[:, 0], own_B[is_own_B]] = torch.inf
        return square_BM.sqrt_()

    def _nearest(self, distance_BM: Tensor) -> tuple[Tensor, Tensor]:
        found = distance_BM.topk(self.k, dim=1, largest=False)
        return found.values, found.indices


class Neighbourhood(References):
    """Distances to a reference set, and what they say of a sample's density beside its neighbours' own."""

    def __init__(self, reference_ME: Tensor, key_M: Tensor, k: int):
        super().__init__(reference_ME, key_M, k)
        own_distance_MM = self._distances(self.reference_ME, torch.arange(len(reference_ME)))
        distance_Mk, _ = self._nearest(own_distance_MM)
        self.k_distance_M = distance_Mk[:, -1]
        self.lid_M = local_dimension(distance_Mk)

    def score(self, embedding_BE: Tensor, key_B: Tensor) -> dict[str, Tensor]:
        """The four scores of each sample, float64 (B,); higher is lonelier."""
        return self.score_at(self.distances(embedding_BE, key_B))

    def score_at(self, distance_BM: Tensor) -> dict[str, Tensor]:
        """`score`, from the distances to all references."""
        distance_Bk, index_Bk = self._nearest(distance_BM)
        ratio_Bk = distance_Bk[:, -1:] / self.k_distance_M[index_Bk].clamp_min(TINY)
        return {
            "k_distance": distance_Bk[:, -1],
            "lid": local_dimension(distance_Bk),
            "slof": ratio_Bk.mean(dim=1),
            "dao": (self.lid_M[index_Bk] * ratio_Bk.clamp_min(TINY).log()).mean(dim=1),
        }


def local_dimension(distance_Bk: Tensor) -> Tensor:
    """Local intrinsic dimension (B,) from sorted distances to the k nearest: -k / sum ln(a_i / a_k + EPSILON)."""
    ratio_Bk = distance_Bk / distance_Bk[:, -1:].clamp_min(TINY)
    return -distance_Bk.shape[1] / (ratio_Bk + EPSILON).log().sum(dim=1).clamp_max(-TINY)


# -------------------------------------------------------------------------------------------------------- compat

COMPAT_COLUMNS = ("k_distance", "lid", "lid_mom", "slof", "dao")
COMPAT_NOT_FINITE = 1000.0  # what NaN and +inf become; -inf becomes 0


def compat_scores(
    embedding_NE: np.ndarray,
    batch_size: int = 2048,
    k: int = 16,
    lid_k: int = 64,
    caption_NE: np.ndarray | None = None,
    compat_index: bool = True,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The publication's protocol with its quirks, for `compat` rows of a benchmark; no detector of ours.

    Samples are shuffled, and each is compared with its batch; so a score depends on who else is in it. The k-distance
    is the distance a_{k+1} to neighbour k + 1, of a reference o the k-th. A reference's own LID, inside DAO, counts its
    distance of zero to itself among the k. With captions, a batch has two references per sample. Of the neighbours'
    indices, those behind the own column are one too small, as the own column was dropped before they were counted.
    NaN and +inf become 1000, -inf becomes 0.

    Args:
        embedding_NE: float, the victim's embeddings as they come.
        batch_size: the last batch may be smaller; it needs more than max(k, lid_k) + 1 samples.
        k: neighbours of k-distance, SLOF and DAO.
        lid_k: neighbours of the two LIDs.
        caption_NE: float, the embeddings of the captions.
        compat_index: False looks neighbours up in the right rows.
        seed: of the shuffling.

    Returns:
        float32 (N,) by column; higher is lonelier. `lid` is maximum likelihood, `lid_mom` the method of moments.

    Raises:
        Mistake: a batch too small for its neighbours.

    Source: Huang et al., ICLR 2025, arXiv:2502.01385, and their published code.
    """
    num = len(embedding_NE)
    smallest = num % batch_size or batch_size
    if min(smallest, num) <= max(k, lid_k) + 1:
        raise Mistake(
            f"compat density: a batch of {min(smallest, num):,} samples for {max(k, lid_k)} neighbours; take another "
            "batch_size, which leaves no small rest"
        )
    order_N = np.random.default_rng(seed).permutation(num)
    scores = {name: np.empty(num, np.float32) for name in COMPAT_COLUMNS}
    for start in range(0, num, batch_size):
        rows = order_N[start : start + batch_size]
        parts = [embedding_NE[rows]] if caption_NE is None else [embedding_NE[rows], caption_NE[rows]]
        for name, score_B in _compat_batch([torch.from_numpy(part).double() for part in parts], k, lid_k, compat_index):
            kept_B = torch.nan_to_num(score_B, nan=COMPAT_NOT_FINITE, posinf=COMPAT_NOT_FINITE, neginf=0.0)
            scores[name][rows] = kept_B.float().numpy()
    return scores


def _compat_batch(parts: list[Tensor], k: int, lid_k: int, compat_index: bool) -> list[tuple[str, Tensor]]:
    """The scores of one batch: `parts` are its images' embeddings and, where there are any, its captions'."""
    size, reference_ME = len(parts[0]), torch.cat(parts)
    distance_MM = torch.cdist(reference_ME, reference_ME, compute_mode="donot_use_mm_for_euclid_dist")
    sorted_MM = distance_MM.sort(dim=1).values  # column 0 is the distance to oneself
    k_distance_M = sorted_MM[:, k]
    lid_M = _compat_lid(sorted_MM[:, :k], sorted_MM[:, k])
    own_B = torch.arange(size)
    is_other_BM = torch.ones(size, len(reference_ME), dtype=torch.bool)
    for part in range(len(parts)):  # the own image, and the own caption
        is_other_BM[own_B, own_B + part * size] = False
    column_BM = torch.arange(len(reference_ME)).expand(size, -1)[is_other_BM].reshape(size, -1)
    found = distance_MM[:size][is_other_BM].reshape(size, -1).sort(dim=1, stable=True)
    index_Bk = found.indices[:, :k]
    if not compat_index:
        index_Bk = column_BM.gather(1, index_Bk)
    ratio_Bk = found.values[:, k : k + 1] / k_distance_M[index_Bk]
    near_Bk, far_B = found.values[:, :lid_k], found.values[:, lid_k]
    mean_B = near_Bk.mean(dim=1)
    return [
        ("k_distance", found.values[:, k]),
        ("lid", _compat_lid(near_Bk, far_B)),
        ("lid_mom", mean_B / (far_B - mean_B)),
        ("slof", ratio_Bk.mean(dim=1)),
        ("dao", (lid_M[index_Bk] * ratio_Bk.log()).mean(dim=1)),
    ]


def _compat_lid(distance_Bk: Tensor, last_B: Tensor) -> Tensor:
    return -distance_Bk.shape[1] / (distance_Bk / last_B.unsqueeze(1) + EPSILON).log().sum(dim=1)
