"""The detectors that a score pass can attach, by their `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dede_ray.detectors.dede import DeDe
from dede_ray.detectors.density import Density
from dede_ray.detectors.statistics import ImageStatistics

Detector = Annotated[DeDe | Density | ImageStatistics, Field(discriminator="kind")]
