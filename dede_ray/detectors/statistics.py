"""What the pixels alone give away: controls that never look at the victim."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch

from dede_ray.detectors.contract import Batch, DetectorSettings, Need, Scorer, State, as_scores
from dede_ray.victims import Victim


class ImageStatistics(DetectorSettings):
    """Controls that never look at the victim: what the pixels alone give away."""

    kind: Literal["image_statistics"] = "image_statistics"
    needs: ClassVar[frozenset[Need]] = frozenset({"image"})

    def open(self, victim: Victim, state: State) -> Scorer:
        return _ImageStatisticsScorer()


class _ImageStatisticsScorer:
    columns: tuple[str, ...] = ("stat_contrast", "stat_edges")
    controls = columns
    fingerprint = "image_statistics"

    @torch.inference_mode()
    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        """Standard deviation of the grey levels, and mean squared difference of neighbouring ones."""
        grey_BHW = batch.images.mean(dim=1)
        edges_B = grey_BHW.diff(dim=1).square().mean(dim=(1, 2)) + grey_BHW.diff(dim=2).square().mean(dim=(1, 2))
        contrast_B = grey_BHW.flatten(1).std(dim=1)
        return as_scores({"stat_contrast": contrast_B, "stat_edges": edges_B})
