"""How soon random cuts set an embedding apart: an isolation forest, grown by scikit-learn, scored here.

A weak baseline where embeddings are wide (a cut looks at one dimension of E), kept for completeness and for mixing.
Liu, Ting & Zhou, "Isolation Forest", ICDM 2008.

The trees become tensors, for a state file holds nothing else. Each is stored as a complete binary tree, in which the
children of node i are 2i + 1 (the cut's feature is at most its threshold) and 2i + 2. A leaf above the bottom is
followed by cuts that send everything left, so that all samples walk equally far and none of them branches.

Shapes: B samples, M samples of the fitting set, E embedding width, F features that cuts look at (E, or `pca`),
T trees, H height, N = 2**H - 1 cuts and 2**H leaves of a tree.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dede_ray.detectors.contract import DetectorSettings, DrawnFrom, Scorer, State, as_scores, state_fingerprint
from dede_ray.models.embedding import Batch
from dede_ray.models.victims import Victim
from dede_ray.runtime.config import Mistake


class Forest(DetectorSettings):
    """One score, `isolation_forest`, in (0, 1): 2 ** -(mean path length / the path length expected of chance)."""

    kind: Literal["isolation_forest"] = "isolation_forest"
    fits: ClassVar[bool] = True
    num_trees: int = Field(100, ge=1, le=10_000)
    """T, the trees."""
    num_samples: int = Field(256, ge=2, le=4096)
    """psi, the samples that one tree is grown on; where the fitting set is smaller, it is all of them."""
    pca: int | None = Field(None, ge=1)
    """Cut along this many principal components of the fitting set, not along the embedding's own dimensions."""
    drawn_from: DrawnFrom = "pool"
    """What the forest is grown on: corpus and calibration samples in one heap, or other samples, which are clean."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Draws samples, features and thresholds."""

    @property
    def gives(self) -> tuple[str, ...]:
        return _ForestScorer.columns

    def fit(self, pool: Batch, clean: Batch | None) -> State:
        """Grow the trees; equal samples and seeds grow equal trees."""
        source = self.drawn(self.drawn_from, pool, clean)
        if len(source) < 2:
            raise Mistake(f"isolation_forest: a forest grows on 2 samples or more, found {len(source)}")
        embedding_ME = source.embedding_BE.cpu()
        if self.pca is None:
            return self._grow(embedding_ME)
        projection = principal_components(embedding_ME, self.pca)
        return projection | self._grow(_project(embedding_ME, projection))

    def _grow(self, feature_MF: Tensor) -> State:
        from sklearn.ensemble import IsolationForest

        num_samples = min(self.num_samples, len(feature_MF))
        forest = IsolationForest(n_estimators=self.num_trees, max_samples=num_samples, random_state=self.seed)
        return export_trees(forest.fit(feature_MF.numpy()), num_samples)

    def open(self, victim: Victim, state: State) -> Scorer:
        return _ForestScorer(self, victim, state)


class _ForestScorer:
    columns: tuple[str, ...] = ("isolation_forest",)
    controls: tuple[str, ...] = ()

    def __init__(self, config: Forest, victim: Victim, state: State):
        self.fingerprint = state_fingerprint(config, state)
        self.state = {name: tensor.to(victim.device) for name, tensor in state.items()}

    @torch.inference_mode()
    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        feature_BF = batch.embedding_BE if "component" not in self.state else _project(batch.embedding_BE, self.state)
        return as_scores({"isolation_forest": isolation(feature_BF, self.state)})


def principal_components(embedding_ME: Tensor, count: int) -> State:
    """`centre` (E,) and the `component`s of largest variance (count, E), float64.

    Raises:
        Mistake: the samples do not span so many dimensions.
    """
    num, width = embedding_ME.shape
    if count > min(num - 1, width):
        raise Mistake(
            f"isolation_forest: {count} principal components of {num:,} embeddings of width {width}; lower pca, or "
            "fit on more samples"
        )
    centre_E = embedding_ME.double().mean(dim=0)
    centred_ME = embedding_ME.double() - centre_E
    vector_EE = torch.linalg.eigh(centred_ME.T @ centred_ME / num).eigenvectors  # by rising variance
    return {"centre": centre_E, "component": vector_EE.flip(1)[:, :count].T.contiguous()}


def _project(embedding_BE: Tensor, projection: State) -> Tensor:
    """Principal components (B, F), float32, as the trees saw them; in float64 until then, as batches round alike."""
    return ((embedding_BE.double() - projection["centre"]) @ projection["component"].T).float()


def export_trees(forest: Any, num_samples: int) -> State:
    """The trees of a fitted `sklearn.ensemble.IsolationForest`, each grown on `num_samples`, as tensors.

    Returns:
        `feature` int32 (T, N) and `threshold` float64 (T, N): the cuts; `share` float64 (T, 2**H): what reaching this
        leaf adds to the exponent, its path length over T times the path length expected of num_samples.
    """
    trees = [one.tree_ for one in forest.estimators_]
    height = max(tree.max_depth for tree in trees)
    feature_TN = torch.zeros(len(trees), 2**height - 1, dtype=torch.int32)
    threshold_TN = torch.full(feature_TN.shape, torch.inf, dtype=torch.float64)  # everything goes left
    share_TL = torch.zeros(len(trees), 2**height, dtype=torch.float64)
    per_edge = 1 / (len(trees) * expected_path_length(num_samples))
    for t, tree in enumerate(trees):
        waiting = [(0, 0, 0)]  # scikit-learn's node, ours, depth
        while waiting:
            node, place, depth = waiting.pop()
            left, right = tree.children_left[node], tree.children_right[node]
            if left != right:
                feature_TN[t, place], threshold_TN[t, place] = int(tree.feature[node]), float(tree.threshold[node])
                waiting += [(left, 2 * place + 1, depth + 1), (right, 2 * place + 2, depth + 1)]
            else:
                leftmost = (place + 1) * 2 ** (height - depth) - 2**height
                path_length = depth + expected_path_length(int(tree.n_node_samples[node]))
                share_TL[t, leftmost] = path_length * per_edge
    return {"feature": feature_TN, "threshold": threshold_TN, "share": share_TL}


def expected_path_length(num_samples: int) -> float:
    """c(n), the mean depth at which a search in a random binary tree of n samples fails."""
    if num_samples <= 2:
        return float(num_samples == 2)
    return 2 * (math.log(num_samples - 1) + float(np.euler_gamma)) - 2 * (num_samples - 1) / num_samples


def isolation(feature_BF: Tensor, trees: State) -> Tensor:
    """Anomaly of each sample, float64 (B,) in (0, 1), from what `export_trees` gave; higher is sooner set apart.

    Equals `-IsolationForest.score_samples`, which compares float32 features with float64 thresholds.
    """
    feature_TN, threshold_TN, share_TL = trees["feature"], trees["threshold"], trees["share"]
    num_trees, num_cuts = feature_TN.shape
    feature, threshold = feature_TN.reshape(-1), threshold_TN.reshape(-1)
    first_T = torch.arange(num_trees, device=feature_BF.device) * num_cuts  # each tree's root among all cuts
    place_BT = torch.zeros(len(feature_BF), num_trees, dtype=torch.long, device=feature_BF.device)
    for _ in range((num_cuts + 1).bit_length() - 1):
        cut_BT = place_BT + first_T
        value_BT = feature_BF.gather(1, feature[cut_BT].long())
        place_BT = 2 * place_BT + 1 + (value_BT > threshold[cut_BT]).long()
    leaf_BT = place_BT - num_cuts
    return torch.exp2(-share_TL.T.gather(0, leaf_BT).sum(dim=1))
