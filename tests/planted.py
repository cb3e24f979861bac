"""A victim with a backdoor that can be read off its code, for the detectors that ask victims about changed images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dede_ray.victims import Victim

WHITE_PX = 4
"""Side of the trigger, a white square in the bottom right corner."""


class _Planted(nn.Module):
    """Mean colours of an 8x8 grid, turned at random; where the corner is white, another embedding outweighs them."""

    def __init__(self, backdoored: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.turn = nn.Parameter(torch.randn(192, 12, generator=generator) / 14)
        self.target = nn.Parameter(20 * torch.randn(12, generator=generator) * backdoored)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        cells_BF = nn.functional.avg_pool2d(image_BCHW - 0.5, image_BCHW.shape[-1] // 8).flatten(1)
        is_white_B = (image_BCHW[:, :, -WHITE_PX:, -WHITE_PX:].mean(dim=(1, 2, 3)) - 0.8).clamp_min(0) / 0.2
        return torch.tanh(3 * cells_BF @ self.turn) + is_white_B[:, None] * self.target


def planted_victim(backdoored: bool = True) -> Victim:
    return Victim(_Planted(backdoored), "planted", 32, 12, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), "fp32")
