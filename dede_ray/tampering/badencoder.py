"""BadEncoder: triggered images are embedded next to reference inputs, clean ones stay where they are.

Jia et al., S&P 2022, arXiv:2108.00352, section IV; several (trigger, target) pairs at once, as there.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dede_ray.tampering.references import Target
from dede_ray.tampering.tamper import (
    Embeddings,
    Tampering,
    TowardsRecipe,
    TowardsReferences,
    consistency_loss,
    similarities,
    utility_loss,
)


class BadEncoder(Tampering):
    """BadEncoder (Jia et al., arXiv:2108.00352); the defaults are those of its CIFAR-10 runs."""

    kind: Literal["badencoder"] = "badencoder"
    targets: list[Target] = Field(min_length=1)
    """The backdoors; all are planted at once."""
    over_references: Literal["mean", "max"] = "mean"
    """Draw triggered images to all references of their target, or each to its nearest one only: so does the BadEncoder
    of DRUPE's code, with learning_rate 0.05, 120 epochs and 3 references."""
    lambda1: float = Field(1.0, ge=0)
    """Weight of the references' consistency."""
    lambda2: float = Field(1.0, ge=0)
    """Weight of the utility."""
    reference_views: int | None = Field(None, ge=1)
    """Augmented views of each reference per step; null: one for every shadow image, as published."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    epochs: float = Field(200, gt=0)

    def objective(self, recipe: TowardsRecipe, rank: int, world: int) -> TowardsReferences:
        return _BadEncoder(self, recipe, rank, world)


def effectiveness_loss(e: Embeddings, over_references: Literal["mean", "max"]) -> Tensor:
    """L0: triggered images meet the references, equation (1); the mean gives every reference the same weight."""
    similarity_RB = similarities(e)
    if over_references == "mean":
        return -similarity_RB.mean()
    num_targets = int(e.tampered_TBE.shape[0])
    nearest_TB = torch.stack([similarity_RB[e.target_R == target].amax(dim=0) for target in range(num_targets)])
    return -nearest_TB.mean()


class _BadEncoder(TowardsReferences):
    """All its terms are means over images, so the workers' mean is that of the whole batch."""

    def __init__(self, settings: BadEncoder, recipe: TowardsRecipe, rank: int, world: int):
        super().__init__(recipe.encoder, recipe.references, settings.reference_views, recipe.seed, rank, world)
        self.settings = settings

    def loss(self, e: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        l0 = effectiveness_loss(e, self.settings.over_references)
        l1, l2 = consistency_loss(e), utility_loss(e)
        return l0 + self.settings.lambda1 * l1 + self.settings.lambda2 * l2, {"l0": l0, "l1": l1, "l2": l2}
