"""The detectors that a score pass can attach, by their `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dede_ray.detectors.asset import Asset
from dede_ray.detectors.clip_score import CaptionScore
from dede_ray.detectors.cognitive_distillation import CognitiveDistillation
from dede_ray.detectors.consistency import Consistency
from dede_ray.detectors.decree import Decree
from dede_ray.detectors.dede import DeDe
from dede_ray.detectors.density import Density
from dede_ray.detectors.image_statistics import ImageStatistics
from dede_ray.detectors.isolation_forest import Forest
from dede_ray.detectors.masking_trajectory import MaskingTrajectory

Detector = Annotated[
    DeDe
    | Density
    | Consistency
    | Forest
    | CaptionScore
    | Asset
    | Decree
    | CognitiveDistillation
    | MaskingTrajectory
    | ImageStatistics,
    Field(discriminator="kind"),
]
"""Cognitive distillation and the masking trajectory take dozens of forward passes: for the second stage."""
