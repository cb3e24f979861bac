"""Cognitive distillation: the smallest part of an image that the victim needs to see to say what it says.

Huang et al., "Distilling Cognitive Backdoor Patterns within an Image", ICLR 2023. For each image a mask m in [0, 1] is
optimised so that x m + (1 - m) noise keeps its embedding while m stays small and smooth. The mask also shows where the
victim looks.

It costs some 300 forward passes an image: a second stage, for the top of a list that a cheaper detector made.

Shapes: B samples, T steps, H and W sides of the image, E embedding width.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dede_ray.data.sampling import keyed_uniform
from dede_ray.detectors.contract import DetectorSettings, Scorer, State, as_scores, state_fingerprint
from dede_ray.models.embedding import Batch, Need
from dede_ray.models.victims import Victim

BETAS = (0.1, 0.1)
"""Adam's, as published: hardly any memory, as the noise is another one at each step."""
RAW_START = 1.0
"""Where each mask starts, before the tanh: m = (tanh(1) + 1) / 2 = 0.88."""


class CognitiveDistillation(DetectorSettings):
    """The L1 norm of the optimised mask, with either sign, for the literature knows both.

    `cd_mask` is the norm, as the evaluation suite of Huang et al. (ICLR 2025, arXiv:2502.01385) judges CLIP by: large
    masks are suspicious. `cd_small_mask` is its negative, the sign of the publication, whose victims are supervised: a
    trigger is a small shortcut, so small masks are suspicious. Which one fits a victim must be decided beforehand; the
    better of the two, chosen by labels, is an oracle.
    """

    kind: Literal["cognitive_distillation"] = "cognitive_distillation"
    needs: ClassVar[frozenset[Need]] = frozenset({"image"})
    steps: int = Field(100, ge=1)
    """Steps of Adam."""
    learning_rate: float = Field(0.1, gt=0)
    """Adam's."""
    norm_weight: float = Field(0.001, ge=0)
    """Weight of the mask's L1 norm, a sum over pixels (gamma). Both weights are the evaluation suite's; the
    publication's are 0.01 and 1. They are weighed against the embedding, so what suits depends on its scale: at
    0.001 and 100 a mask may hardly leave its start, and then says little."""
    smoothness_weight: float = Field(100.0, ge=0)
    """Weight of the mask's total variation, a mean over pixels (beta)."""
    is_exact: bool = True
    """Compute in float64. The optimisation is chaotic: in float32, about twice as fast, rounding that depends on the
    batch grows to some 0.5 % of a score, so that a rerun in other batches ranks the same samples a little otherwise."""
    images_at_once: int = Field(64, ge=1)
    """Images optimised side by side; what the memory allows. Exact scores do not depend on it."""
    seed: int = 0
    """Draws the noise, per sample and step."""

    @property
    def gives(self) -> tuple[str, ...]:
        return CognitiveDistillationScorer.columns

    def open(self, victim: Victim, state: State) -> CognitiveDistillationScorer:
        return CognitiveDistillationScorer(self, victim)


class CognitiveDistillationScorer(Scorer):
    """Optimises masks; `masks` gives them, `score` their norms."""

    columns: tuple[str, ...] = ("cd_mask", "cd_small_mask")
    controls: tuple[str, ...] = ()

    def __init__(self, config: CognitiveDistillation, victim: Victim):
        victim.refuse_without_gradient()
        self.config, self.victim = config, _in_float64(victim) if config.is_exact else victim
        self.fingerprint = state_fingerprint(config.model_copy(update={"images_at_once": 1}), {})

    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        norm_B = self.masks(batch).flatten(1).sum(dim=1)
        return as_scores({"cd_mask": norm_B, "cd_small_mask": -norm_B})

    def masks(self, batch: Batch) -> Tensor:
        """What the victim needs to see of each image: float32 (B, H, W) in [0, 1]; 1 is needed."""
        at_once, rows = self.config.images_at_once, range(len(batch))
        parts = [batch.part(rows[start : start + at_once]) for start in rows[::at_once]]
        height, width = batch.images.shape[2:]
        return torch.cat([batch.images.new_empty(0, height, width), *map(self._optimise, parts)])

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _optimise(self, batch: Batch) -> Tensor:
        config = self.config
        # What was made in inference mode cannot be part of a graph; a copy can.
        image_BCHW = batch.images.to(torch.float64 if config.is_exact else torch.float32, copy=True)
        num, channels = image_BCHW.shape[:2]
        with torch.no_grad():  # not the batch's, whose rounding depends on the batch
            embedding_BE = self.victim.embed_with_gradient(image_BCHW)
        keys_B = batch.keys(config.seed)
        noise_BTC = keyed_uniform(keys_B, config.steps * channels).reshape(num, config.steps, channels)
        noise_BTC = noise_BTC.to(image_BCHW)
        raw_B1HW = torch.full_like(image_BCHW[:, :1], RAW_START).requires_grad_()
        adam = torch.optim.Adam([raw_B1HW], lr=config.learning_rate, betas=BETAS)
        for step in range(config.steps):
            mask_B1HW = to_mask(raw_B1HW)
            noise_BC11 = noise_BTC[:, step, :, None, None]
            seen_BE = self.victim.embed_with_gradient(image_BCHW * mask_B1HW + (1 - mask_B1HW) * noise_BC11)
            change_B = (seen_BE - embedding_BE).abs().mean(dim=1)
            # Summed, not averaged: an image's gradient is its own, whatever the size of the batch.
            loss = (change_B + mask_cost(mask_B1HW[:, 0], config.norm_weight, config.smoothness_weight)).sum()
            (raw_B1HW.grad,) = torch.autograd.grad(loss, raw_B1HW)
            adam.step()
        return to_mask(raw_B1HW.detach())[:, 0].float()


@torch.inference_mode(False)
def _in_float64(victim: Victim) -> Victim:
    victim = copy.deepcopy(victim)
    victim.dtype = torch.float64
    victim.model.to(torch.float64)
    return victim


def to_mask(raw: Tensor) -> Tensor:
    """What is optimised may be any number; a mask is in [0, 1]."""
    return (raw.tanh() + 1) / 2


def mask_cost(mask_BHW: Tensor, norm_weight: float, smoothness_weight: float) -> Tensor:
    """What a mask costs, (B,): its weighted L1 norm and total variation, squared differences of neighbours / (H W)."""
    height, width = mask_BHW.shape[1:]
    norm_B = mask_BHW.abs().sum(dim=(1, 2))
    variation_B = mask_BHW.diff(dim=1).square().sum(dim=(1, 2)) + mask_BHW.diff(dim=2).square().sum(dim=(1, 2))
    return norm_weight * norm_B + smoothness_weight * variation_B / (height * width)
