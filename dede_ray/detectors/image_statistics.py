"""What the pixels alone give away: controls that never look at the victim, and covariates of how hard an image is.

On 150,000 images of CC3M, such numbers explained half of the variance of a squared reconstruction error (DEFUSE, ACM MM
2026), so a detector has to beat them, and scan/fusion.py takes out of a score what they explain.
"""

from __future__ import annotations

import io
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dede_ray.detectors.contract import DetectorSettings, Scorer, State, as_scores
from dede_ray.models.embedding import Batch, Need
from dede_ray.models.victims import Victim


class ImageStatistics(DetectorSettings):
    """Trivial image statistics, of grey levels in [0, 1] unless said otherwise.

    `stat_contrast` their standard deviation; `stat_edges` the mean squared difference of neighbouring ones;
    `stat_texture` and `stat_texture_spread` mean and standard deviation of the variance in tiles of 8 px;
    `stat_range` from their 5th to their 95th percentile; `stat_bright` and `stat_dark` the share above 0.9 and below
    0.1; `stat_entropy` of the spectrum's powers, 1 for white noise; `stat_colour` how far channels lie from grey;
    `stat_bytes` the logarithm of the JPEG file's size at quality 75, where `reencode` is set.
    """

    kind: Literal["image_statistics"] = "image_statistics"
    needs: ClassVar[frozenset[Need]] = frozenset({"image"})
    reencode: bool = False
    """Also compress every image, which takes longer than all the others."""

    @property
    def gives(self) -> tuple[str, ...]:
        names = ("contrast", "edges", "texture", "texture_spread", "range", "bright", "dark", "entropy", "colour")
        return tuple(f"stat_{name}" for name in (*names, *(["bytes"] * self.reencode)))

    @property
    def gives_controls(self) -> tuple[str, ...]:
        return self.gives

    def open(self, victim: Victim, state: State) -> Scorer:
        return _ImageStatisticsScorer(self)


class _ImageStatisticsScorer:
    def __init__(self, config: ImageStatistics):
        self.reencode = config.reencode
        self.columns = self.controls = config.gives
        self.fingerprint = f"image_statistics 2 {config.reencode}"

    @torch.inference_mode()
    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        image_BCHW = batch.images
        grey_BHW = image_BCHW.mean(dim=1)
        flat_BP = grey_BHW.flatten(1)
        tile = min(8, grey_BHW.shape[-1])
        mean_BT, square_BT = (
            functional.avg_pool2d(power_BHW.unsqueeze(1), tile).flatten(1)
            for power_BHW in (grey_BHW, grey_BHW.square())
        )
        variance_BT = (square_BT - mean_BT.square()).clamp_min(0)
        low_B, high_B = torch.quantile(flat_BP, torch.tensor([0.05, 0.95], device=batch.device), dim=1)
        columns = {
            "stat_contrast": flat_BP.std(dim=1),
            "stat_edges": sum(grey_BHW.diff(dim=side).square().mean(dim=(1, 2)) for side in (1, 2)),
            "stat_texture": variance_BT.mean(dim=1),
            "stat_texture_spread": variance_BT.std(dim=1, correction=0),
            "stat_range": high_B - low_B,
            "stat_bright": (flat_BP > 0.9).float().mean(dim=1),
            "stat_dark": (flat_BP < 0.1).float().mean(dim=1),
            "stat_entropy": _spectral_entropy(grey_BHW),
            "stat_colour": (image_BCHW - grey_BHW.unsqueeze(1)).square().mean(dim=(1, 2, 3)).sqrt(),
        }
        if self.reencode:
            columns["stat_bytes"] = torch.tensor([_log_bytes(image_CHW) for image_CHW in image_BCHW])
        return as_scores(columns)  # type: ignore[arg-type]


def _spectral_entropy(grey_BHW: Tensor) -> Tensor:
    """Entropy of the powers of all frequencies but the mean, over its largest possible value."""
    power_BF = torch.fft.rfft2(grey_BHW).abs().square().flatten(1)[:, 1:]
    share_BF = power_BF / power_BF.sum(dim=1, keepdim=True).clamp_min(1e-12)
    return -(share_BF * (share_BF + 1e-12).log()).sum(dim=1) / float(np.log(share_BF.shape[1]))


def _log_bytes(image_CHW: Tensor) -> float:
    file = io.BytesIO()
    pixels = (image_CHW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=75)
    return float(np.log(file.tell()))
