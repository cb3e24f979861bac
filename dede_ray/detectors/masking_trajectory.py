"""The masking trajectory: cover an image bit by bit, and watch whether its embedding drifts or jumps.

After BackdoorIDS (arXiv:2603.11664, 2026), of which hyper-parameters were not public; these are ours. While a trigger
is visible it decides the embedding; once it is covered, the embedding jumps to where the rest of the picture belongs.
Nothing is trained. It costs J - 1 forward passes an image: a second stage, for the top of a list.

Shapes: B samples, L patches, J pictures of a trajectory, E embedding width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from dede_ray.data.sampling import keyed_uniform
from dede_ray.detectors.contract import DetectorSettings, Scorer, State, as_scores, state_fingerprint
from dede_ray.models.embedding import Batch, Need
from dede_ray.models.victims import Victim
from dede_ray.runtime.config import Mistake

GREY = 0.5
"""What covers a patch, in [0, 1] pixels."""
FLOOR = 1e-6
"""Steps shorter than this are rounding, not movement."""
MIN_POINTS = 3
"""Pictures of a trajectory that make a cluster."""
CLEAN_QUANTILE = 0.95
"""Quantile of the lengths of clean steps that is the published radius of a cluster."""


class MaskingTrajectory(DetectorSettings):
    """Three looks at the embeddings of an image that is covered patch by patch, in an order drawn from its id.

    `mt_jump` is the longest step over the median step, a step being 1 - cosine of successive embeddings. `mt_clusters`
    is the number of clusters that DBSCAN finds on the trajectory: one for a drift, more for a jump. `mt_stability` is
    the mean cosine between the image and its covered versions. That one goes one way only, higher is more suspicious,
    as a trigger holds the embedding while it is visible; victims are known in which triggered images are the less
    stable ones, and there the column ranks backwards.
    """

    kind: Literal["masking_trajectory"] = "masking_trajectory"
    needs: ClassVar[frozenset[Need]] = frozenset({"image"})
    num_pictures: int = Field(20, ge=4)
    """J, from the image itself to the most covered one."""
    last_mask_ratio: float = Field(0.95, gt=0, le=1)
    """Covered patches / patches at the end."""
    patch_px: int | None = Field(None, ge=1)
    """Side of a patch; null: an eighth of the image's side."""
    radius: float | None = Field(None, gt=0)
    """Radius of DBSCAN, in 1 - cosine. The publication takes the 95th percentile of clean steps, which `clean_radius`
    finds; null: `radius_in_steps` of the image's own median step, which needs no clean set."""
    radius_in_steps: float = Field(6.0, gt=0)
    """Without `radius`: the radius in median steps of the same trajectory. At 6 a clean image mostly makes one cluster,
    at 3 often two."""
    seed: int = 0
    """Draws the order in which patches are covered."""

    @property
    def gives(self) -> tuple[str, ...]:
        return _TrajectoryScorer.columns

    def open(self, victim: Victim, state: State) -> Scorer:
        patch_px = self.patch_px or max(1, victim.image_size // 8)
        if victim.image_size % patch_px:
            raise Mistake(
                f"masking_trajectory: patch_px {patch_px} does not divide the {victim.image_size} px of victim "
                f"{victim.name}; choose one that does"
            )
        return _TrajectoryScorer(self, victim, patch_px)


class _TrajectoryScorer:
    columns: tuple[str, ...] = ("mt_jump", "mt_clusters", "mt_stability")
    controls: tuple[str, ...] = ()

    def __init__(self, config: MaskingTrajectory, victim: Victim, patch_px: int):
        self.config, self.victim, self.patch_px = config, victim, patch_px
        self.fingerprint = state_fingerprint(config, {})

    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        path_BJE = self.trajectories(batch)
        step_BS = step_lengths(path_BJE)
        median_B = step_BS.median(dim=1).values.clamp_min(FLOOR)
        radius_B = self.config.radius_in_steps * median_B
        if self.config.radius is not None:
            radius_B = torch.full_like(median_B, self.config.radius)
        cosine_BJ = (path_BJE[:, 1:] * path_BJE[:, :1]).sum(dim=2)
        clusters = [num_clusters(path_JE, float(radius)) for path_JE, radius in zip(path_BJE, radius_B, strict=True)]
        return as_scores(
            {
                "mt_jump": step_BS.amax(dim=1) / median_B,
                "mt_clusters": torch.tensor(clusters),
                "mt_stability": cosine_BJ.mean(dim=1),
            }
        )

    @torch.inference_mode()
    def trajectories(self, batch: Batch) -> Tensor:
        """Embeddings of length one, float64 (B, J, E): of the image, then of ever more covered versions of it."""
        config, image_BCHW = self.config, batch.images
        side = image_BCHW.shape[-1] // self.patch_px
        masks = nested_masks(batch.keys(config.seed), side**2, config)
        path = [batch.embedding_BE]
        for mask_BL in masks[1:]:
            is_hidden_B1HW = interpolate(mask_BL.reshape(-1, 1, side, side).float(), scale_factor=self.patch_px) > 0
            path.append(self.victim(image_BCHW.masked_fill(is_hidden_B1HW.to(image_BCHW.device), GREY)))
        return normalize(torch.stack(path, dim=1).double(), dim=2)


def nested_masks(keys_B: Tensor, num_patches: int, config: MaskingTrajectory) -> list[Tensor]:
    """J boolean masks (B, L), True = hidden, each part of the next: from none hidden to `last_mask_ratio`."""
    rank_BL = keyed_uniform(keys_B, num_patches).argsort(dim=1).argsort(dim=1)
    shares = torch.linspace(0, config.last_mask_ratio, config.num_pictures, dtype=torch.float64)
    return [rank_BL < round(share * num_patches) for share in shares.tolist()]


def step_lengths(path_BJE: Tensor) -> Tensor:
    """1 - cosine of successive embeddings, which are of length one: (B, J - 1)."""
    return 1 - (path_BJE[:, 1:] * path_BJE[:, :-1]).sum(dim=2)


def num_clusters(path_JE: Tensor, radius: float) -> int:
    """Clusters of a trajectory by DBSCAN (Ester et al., KDD 1996) on 1 - cosine; strays belong to none."""
    distance_JJ = (1 - path_JE @ path_JE.T).clamp_min(0).cpu().numpy()
    from sklearn.cluster import DBSCAN  # seconds of import, which other detectors need not pay

    label_J = DBSCAN(eps=radius, min_samples=MIN_POINTS, metric="precomputed").fit_predict(distance_JJ)
    return len(set(label_J.tolist()) - {-1})


def clean_radius(config: MaskingTrajectory, victim: Victim, clean: Batch) -> float:
    """The published radius, for the setting of that name: the 95th percentile of the steps of clean images.

    Fitting sets carry no pictures, so a detector cannot find it for itself.
    """
    scorer = config.open(victim, {})
    assert isinstance(scorer, _TrajectoryScorer)
    return float(step_lengths(scorer.trajectories(clean)).quantile(CLEAN_QUANTILE))
