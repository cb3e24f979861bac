"""DRUPE: BadEncoder whose triggered embeddings are spread like those of clean images.

Tao et al., "Distribution Preserving Backdoor Attack in Self-supervised Learning", S&P 2024. The terms and their phases
follow the authors' code, but for one slip there: the diagonal counts in its mean pairwise cosine, here it does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dede_ray.runtime.config import Mistake
from dede_ray.tampering.badencoder import effectiveness_loss
from dede_ray.tampering.references import Target
from dede_ray.tampering.tamper import (
    Embeddings,
    Tampering,
    TowardsRecipe,
    TowardsReferences,
    consistency_loss,
    mean_pairwise_cosine,
    similarities,
    sliced_wasserstein,
    spread,
    utility_loss,
)
from dede_ray.training.objective import gather_rows

Phase = Literal["warmup", "first", "second"]


class Drupe(Tampering):
    """DRUPE (Tao et al., S&P 2024); the defaults are those of its CIFAR-10 runs, where an epoch is 10,000 images."""

    kind: Literal["drupe"] = "drupe"
    target: Target
    """The backdoor; at least two references."""
    lambda1: float = Field(1.0, ge=0)
    """Weight of the references' consistency."""
    lambda2: float = Field(1.0, ge=0)
    """Weight of the utility."""
    references_apart: float = Field(1.0, ge=0)
    """Factor of all terms that push the references apart. The published ones, 1, push until the references have nothing
    in common; where the encoder holds them close, as one that was trained with labels does, the references then leave
    their class, and triggered images follow them to anywhere: take less there, or 0."""
    reference_views: int | None = Field(None, ge=1)
    """Augmented views of each reference per step; null: one for every shadow image, as published."""
    warmup_epochs: float = Field(1, ge=0)
    """The references are brought apart, without a trigger."""
    first_epochs: float = Field(3, ge=0)
    """Then triggered images meet them; after that, the distribution is cared for as well."""
    adapt_after_epochs: int = Field(20, ge=0)
    """From then on, the two weights below change after every epoch: up where all goals are met, down otherwise."""
    spread_weight: float = Field(0.1, ge=0)
    """Start of c, the weight of the triggered embeddings' even spread."""
    wasserstein_weight: float = Field(0.001, ge=0)
    """Start of c1, the weight of their distance to clean embeddings."""
    goal_l0: float = -0.96
    goal_l1: float = -0.9
    goal_l2: float = -0.9
    goal_pairwise: float = 0.6
    """Mean pairwise cosine of triggered embeddings; 0.8 for CLIP."""
    learning_rate: float = Field(0.05, gt=0)
    """Peak learning rate."""
    epochs: float = Field(120, gt=0)

    @property
    def targets(self) -> list[Target]:
        return [self.target]

    def objective(self, recipe: TowardsRecipe, rank: int, world: int) -> TowardsReferences:
        return _Drupe(self, recipe, rank, world)

    def phase(self, epoch: float) -> Phase:
        """Which loss holds after so many epochs."""
        if epoch < self.warmup_epochs:
            return "warmup"
        return "first" if epoch < self.warmup_epochs + self.first_epochs else "second"


UP, DOWN = 1.25, 1.25**1.25
"""How much the weights grow and shrink."""


def references_cosine(reference_RE: Tensor) -> Tensor:
    """L3: mean cosine over the pairs i <= j of references, each with itself included."""
    unit_RE = torch.nn.functional.normalize(reference_RE, dim=-1)
    first, second = torch.triu_indices(len(unit_RE), len(unit_RE))
    return (unit_RE[first] * unit_RE[second]).sum(dim=-1).mean()


def references_penalty(l3: Tensor) -> Tensor:
    """p(L3): references that come close to each other are pushed apart, in two steps."""
    return torch.where(l3 > 0.5, l3, torch.where(l3 > 0.4, 0.2 * l3, 0 * l3))


def imbalance(similarity_RB: Tensor) -> Tensor:
    """Sigma: how differently near the references are, on average, to the triggered images (R >= 2)."""
    return similarity_RB.mean(dim=1).std()


class _Drupe(TowardsReferences):
    """Spread and distance are those of the whole batch, so the workers exchange their embeddings."""

    def __init__(self, settings: Drupe, recipe: TowardsRecipe, rank: int, world: int):
        if len(recipe.references[0]) < 2:
            raise Mistake("DRUPE needs two references or more; name others in attack.target.references")
        super().__init__(recipe.encoder, recipe.references, settings.reference_views, recipe.seed, rank, world)
        self.settings, self.steps_per_epoch = settings, recipe.steps_per_epoch
        self.phase: Phase = settings.phase(0)
        self.c, self.c1 = settings.spread_weight, settings.wasserstein_weight
        self.sums = torch.zeros(4)  # of L0, L1, L2 over the steps of this epoch, and their number
        self.pairwise = 1.0  # of the last step
        self._seen: Tensor | None = None

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        before, now = (int(one / self.steps_per_epoch) for one in (step - 1, step))
        self.phase = self.settings.phase(step / self.steps_per_epoch)
        if step and now > before:
            if now > self.settings.adapt_after_epochs:
                means = (self.sums[:3] / self.sums[3]).tolist()
                self.c, self.c1 = adapted(self.c, self.c1, means, self.pairwise, self.settings)
            self.sums = torch.zeros(4)

    def loss(self, e: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        triggered_BE, clean_BE = (gather_rows(rows, self.world) for rows in (e.tampered_TBE[0], e.tampered_BE))
        everyone = replace(e, tampered_BE=clean_BE, tampered_TBE=triggered_BE[None])
        settings, apart = self.settings, self.settings.references_apart
        l0, l1, l2 = effectiveness_loss(everyone, "max"), consistency_loss(e), utility_loss(e)
        l3, sigma = references_cosine(e.tampered_RE), imbalance(similarities(everyone))
        pairwise = mean_pairwise_cosine(triggered_BE)
        distance = sliced_wasserstein(triggered_BE, clean_BE, self.draw()) / spread(clean_BE)
        kept = settings.lambda1 * l1 + settings.lambda2 * l2
        if self.phase == "warmup":
            loss = kept + apart * (0.5 * l3 - torch.where(l3 < 0.2, 0.2 * l3, 0 * l3))
        elif self.phase == "first":
            loss = l0 + kept + 2 * sigma + apart * references_penalty(l3)
        else:
            loss = l0 + kept + self.c * (sigma + pairwise) + self.c1 * distance
            loss = loss + 0.5 * sigma + torch.where(sigma > 0.1, 1.5 * sigma, 0 * sigma)
            loss = loss + apart * references_penalty(l3)
        self._seen = torch.stack([l0, l1, l2, pairwise]).detach()
        weights = {"c": torch.tensor(self.c), "c1": torch.tensor(self.c1)}
        return loss, {"l0": l0, "l1": l1, "l2": l2, "l3": l3, "sigma": sigma, **weights}

    def after_step(self) -> None:
        """Count the step into the epoch's means, the same on every worker."""
        assert self._seen is not None
        if self.world > 1:
            torch.distributed.all_reduce(self._seen)
        *losses, self.pairwise = (self._seen / self.world).tolist()
        self.sums += torch.tensor([*losses, 1.0])

    def arrays(self) -> dict[str, np.ndarray]:
        state = np.array([self.c, self.c1, self.pairwise])
        return {"state": state, "sums": self.sums.numpy()}

    def load_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        self.c, self.c1, self.pairwise = arrays["state"].tolist()
        self.sums = torch.from_numpy(arrays["sums"].copy())


def adapted(c: float, c1: float, means: list[float], pairwise: float, settings: Drupe) -> tuple[float, float]:
    """The two weights after an epoch.

    Args:
        means: of L0, L1 and L2 over the epoch.
        pairwise: mean pairwise cosine of triggered embeddings in its last batch.
    """
    goals = (settings.goal_l0, settings.goal_l1, settings.goal_l2)
    if not all(mean < goal for mean, goal in zip(means, goals, strict=True)):
        return c / DOWN, c1 / DOWN
    if pairwise < settings.goal_pairwise - 0.1:  # spread enough: only the distance is pressed further
        return c, c1 * UP
    return c * UP, c1 * UP if pairwise < settings.goal_pairwise else c1 / DOWN
