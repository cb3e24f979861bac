"""How weights move: the optimiser, its learning rate over the steps, and which parameters decay.

`Optimisation` holds the settings, and whatever is trained inherits them, so that a YAML says `clip.learning_rate`;
`PlainAdam` and `PlainSgd` are the same with the defaults that papers on encoders and on attacks have. The learning rate
is a function of the step alone: a run that resumes at step t has the rate of step t.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from dede_ray.runtime.config import Config


class Optimisation(Config):
    """Optimiser and schedule."""

    optimiser: Literal["adam", "adamw", "sgd"] = "adamw"
    """`adam` decays everything as L2 (DeDe's released setting), and so does `sgd`; `adamw` decays matrices only."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.2, ge=0)
    """Not applied by adamw to gains, biases and the logit scale."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Share of the mean gradient that stays from step to step; of sgd the momentum."""
    beta2: float = Field(0.98, ge=0, lt=1)
    epsilon: float = Field(1e-6, gt=0)
    """Added to Adam's denominator."""
    warmup_steps: int = Field(100, ge=0)
    """Linear warm-up."""
    schedule: Literal["constant", "cosine", "cooldown"] = "cosine"
    """After the warm-up: constant; a cosine to zero; constant with a straight line to zero at the end."""
    cooldown_share: float = Field(0.2, gt=0, le=1)
    """Share of all steps that the line to zero of `cooldown` takes."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 switches clipping off."""

    def rate(self, step: int, num_steps: int) -> float:
        """Learning rate of a step, counted from 0; open_clip's curves."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "cosine":
            done = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "cooldown":
            length = max(1, round(self.cooldown_share * num_steps))
            return self.learning_rate * min(1.0, (num_steps - step) / length)
        return self.learning_rate

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser over what is to be trained, with the fused kernels that every torch device has."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings: Any = {
            "lr": self.learning_rate,
            "betas": (self.beta1, self.beta2),
            "eps": self.epsilon,
            "fused": True,
        }
        if self.optimiser == "sgd":
            return torch.optim.SGD(
                trained, lr=self.learning_rate, momentum=self.beta1, weight_decay=self.weight_decay, fused=True
            )
        if self.optimiser == "adam":
            return torch.optim.Adam(trained, weight_decay=self.weight_decay, **settings)
        decayed = [parameter for parameter in trained if parameter.ndim >= 2]
        spared = [parameter for parameter in trained if parameter.ndim < 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        return torch.optim.AdamW([group for group in groups if group["params"]], **settings)


class PlainAdam(Optimisation):
    """Adam with torch's own constants, without warm-up and clipping."""

    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    """`adam` and `sgd` decay everything as L2; `adamw` decays matrices only."""
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    """Added to Adam's denominator."""
    warmup_steps: int = Field(0, ge=0)
    """Linear warm-up."""
    clip_norm: float = Field(0.0, ge=0)
    """Largest gradient norm; 0 switches clipping off."""


class PlainSgd(Optimisation):
    """SGD at a constant rate, without warm-up and clipping."""

    optimiser: Literal["adam", "adamw", "sgd"] = "sgd"
    """`adam` and `sgd` decay everything as L2; `adamw` decays matrices only."""
    weight_decay: float = Field(5e-4, ge=0)
    warmup_steps: int = Field(0, ge=0)
    """Linear warm-up."""
    schedule: Literal["constant", "cosine", "cooldown"] = "constant"
    """After the warm-up: constant; a cosine to zero; constant with a straight line to zero at the end."""
    clip_norm: float = Field(0.0, ge=0)
    """Largest gradient norm; 0 switches clipping off."""
