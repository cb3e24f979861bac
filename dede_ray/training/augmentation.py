"""What training does to an image before the model sees it: random crop, mirror, colours, blur. Scoring never augments.

The settings (`Augmentation`) are carried out in two ways that do the same:

- `Augmentation.apply`, one image at a time, by Pillow, where images are decoded: for CLIP. A view is cut from the
  decoded original, not from a square made of it, so that a small crop keeps the original's detail.
- `random_views`, a batch of squares at once, on the device that trains: for SimCLR, whose many views would hold up a
  GPU with Pillow. Crop, antialiased resizing and mirror are two small matrices per image.

What happens to an image depends only on the generator, or the numbers, that it is given.

Shapes: B images, H pixels of a source's side, S pixels of a view's side, K draws per view.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from pydantic import Field
from torch import Tensor

from dede_ray.data.images import to_square
from dede_ray.runtime.config import Config


class Augmentation(Config):
    """Random views of training images: crop, mirror, colours, blur."""

    min_scale: float = Field(0.9, gt=0, le=1)
    """Smallest share of the area that a random crop keeps, of the largest crop of its shape; 1 (with max_aspect 1)
    takes the centre square, as scoring does."""
    max_aspect: float = Field(1.0, ge=1)
    """Largest width / height, and height / width, of a crop, which is then squeezed to a square; 1 crops squares."""
    flip: bool = False
    """Mirror half of the images."""
    jitter_probability: float = Field(0.0, ge=0, le=1)
    """Share of the images whose colours change by the next four settings, in random order."""
    brightness: float = Field(0.4, ge=0)
    """Brightness is multiplied by a number in 1 ± this, but never by less than 0; so for the next two."""
    contrast: float = Field(0.4, ge=0)
    """Contrast about the mean grey."""
    saturation: float = Field(0.4, ge=0)
    """Distance from grey."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Largest turn of the colour wheel, in whole turns."""
    grey_probability: float = Field(0.0, ge=0, le=1)
    """Share of the images that lose their colours."""
    blur_probability: float = Field(0.0, ge=0, le=1)
    """Share of the images that are blurred, by a Gaussian of 0.1 to 2 px for a view of 224 px."""

    def decode_px(self, size_px: int) -> int:
        """The `enough_px` for `decode_image`: the shorter side from which even the smallest crop is no enlargement."""
        return math.ceil(size_px * self.max_aspect / math.sqrt(self.min_scale))

    def apply(self, image_HWC: np.ndarray, size_px: int, rng: np.random.Generator) -> np.ndarray:
        """Make a random view of an image.

        Args:
            image_HWC: the decoded image, uint8, at its own size (or reduced to `decode_px`).
            size_px: side of the view.
            rng: decides everything.

        Returns:
            uint8 (size_px, size_px, 3).
        """
        # Always drawn, in this order, whether needed or not: a setting does not change what the others do.
        scale, left, top, coin = rng.random(4)
        aspect, jitter_coin, grey_coin = rng.random(3)
        strengths, order = rng.random(4), rng.permutation(4)
        blur_coin, blur = rng.random(2)
        if self.min_scale < 1 or self.max_aspect > 1:
            image_HWC = self._crop(image_HWC, size_px, scale, aspect, left, top)
        else:
            image_HWC = to_square(image_HWC, size_px)
        if self.flip and coin < 0.5:
            image_HWC = image_HWC[:, ::-1]
        if jitter_coin < self.jitter_probability:
            image_HWC = self._jitter(image_HWC, strengths, order)
        if grey_coin < self.grey_probability:
            image_HWC = np.asarray(Image.fromarray(image_HWC).convert("L").convert("RGB"))
        if blur_coin < self.blur_probability:
            gaussian = ImageFilter.GaussianBlur(float(0.1 + 1.9 * blur) * size_px / 224)
            image_HWC = np.asarray(Image.fromarray(image_HWC).filter(gaussian))
        return image_HWC

    def _crop(
        self, image_HWC: np.ndarray, size_px: int, scale: float, aspect: float, left: float, top: float
    ) -> np.ndarray:
        """Cut a crop out of the image, wherever it fits, and resize it (bicubic, antialiased); draws are in [0, 1)."""
        height, width = image_HWC.shape[:2]
        ratio = self.max_aspect ** (2 * aspect - 1)  # of width to height; as likely to be r as 1 / r
        largest_width, largest_height = min(width, height * ratio), min(height, width / ratio)
        share = np.sqrt(self.min_scale + (1 - self.min_scale) * scale)  # of each side
        x = left * (1 - share) * largest_width + left * (width - largest_width)
        y = top * (1 - share) * largest_height + top * (height - largest_height)
        right, bottom = min(x + share * largest_width, width), min(y + share * largest_height, height)
        image = Image.fromarray(image_HWC)
        return np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=(x, y, right, bottom)))

    def _jitter(self, image_HWC: np.ndarray, strengths: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Change brightness, contrast, saturation and hue, as torchvision's ColorJitter does; draws are in [0, 1)."""
        image = Image.fromarray(image_HWC)
        ways = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, None)
        for i in order:
            way, most = ways[i], (self.brightness, self.contrast, self.saturation, self.hue)[i]
            if most == 0:
                continue
            if way is None:
                image = _turn_hue(image, most * (2 * strengths[i] - 1))
            else:
                least = max(0.0, 1 - most)
                image = way(image).enhance(least + (1 + most - least) * strengths[i])
        return np.asarray(image)


def _turn_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(step + int(turns * 255)) % 256 for step in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


# ------------------------------------------------------------------------------------------------ a batch at once

NUM_DRAWS = 17  # random numbers that decide a view

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision weigh red, green and blue


@torch.no_grad()
def random_views(settings: Augmentation, image_BHHC: Tensor, size_px: int, draw_BK: Tensor) -> Tensor:
    """Make one random view of each image.

    Args:
        settings: what may happen.
        image_BHHC: uint8 (B, H, H, 3), squares.
        size_px: side S of the views.
        draw_BK: numbers in [0, 1), (B, NUM_DRAWS), on the images' device: they decide everything about the view.

    Returns:
        float32 (B, 3, S, S) in [0, 1].
    """
    with torch.autocast(image_BHHC.device.type, enabled=False):
        scale, left, top, coin, aspect, jitter_coin, grey_coin, *_ = draw_BK.float().unbind(1)
        strength_B4, order_B4 = draw_BK[:, 7:11].float(), draw_BK[:, 11:15].argsort(dim=1)
        blur_coin, blur = draw_BK[:, 15].float(), draw_BK[:, 16].float()
        view_BCSS = _crop(settings, image_BHHC, size_px, scale, aspect, left, top, coin)
        _for_some(view_BCSS, jitter_coin < settings.jitter_probability, _jitter, settings, strength_B4, order_B4)
        _for_some(view_BCSS, grey_coin < settings.grey_probability, lambda some: _grey(some).expand_as(some))
        _for_some(view_BCSS, blur_coin < settings.blur_probability, _blur, (0.1 + 1.9 * blur) * size_px / 224)
        return view_BCSS


def _for_some(image_BCSS: Tensor, is_changed_B: Tensor, change: Callable[..., Tensor], *arguments: object) -> None:
    """Change some images of a batch in place; tensors among the arguments have a row per image."""
    rows = is_changed_B.nonzero().squeeze(1)
    if len(rows):
        some = [argument[rows] if isinstance(argument, Tensor) else argument for argument in arguments]
        image_BCSS[rows] = change(image_BCSS[rows], *some)


def _crop(
    settings: Augmentation,
    image_BHHC: Tensor,
    size_px: int,
    scale: Tensor,
    aspect: Tensor,
    left: Tensor,
    top: Tensor,
    coin: Tensor,
) -> Tensor:
    """Crop, resize and mirror, as Augmentation does, by one matrix per image and axis."""
    batch, side = image_BHHC.shape[:2]
    ratio = settings.max_aspect ** (2 * aspect - 1)
    largest_width, largest_height = side * ratio.clamp(max=1), side / ratio.clamp(min=1)
    share = (settings.min_scale + (1 - settings.min_scale) * scale).sqrt()
    x = left * ((1 - share) * largest_width + side - largest_width)
    y = top * ((1 - share) * largest_height + side - largest_height)
    rows_BSH = _resampling(y, share * largest_height, side, size_px)
    columns_BSH = _resampling(x, share * largest_width, side, size_px)
    if settings.flip:
        columns_BSH = torch.where((coin < 0.5).view(-1, 1, 1), columns_BSH.flip(1), columns_BSH)
    strips_BSX = rows_BSH @ (image_BHHC.reshape(batch, side, side * 3).float() / 255)
    strips_BCSH = strips_BSX.view(batch, size_px, side, 3).permute(0, 3, 1, 2)
    view_BXS = strips_BCSH.reshape(batch, 3 * size_px, side) @ columns_BSH.transpose(1, 2)
    return view_BXS.view(batch, 3, size_px, size_px).clamp_(0, 1)


def _resampling(start_B: Tensor, length_B: Tensor, num_in: int, num_out: int) -> Tensor:
    """Weights (B, num_out, num_in) of Pillow's bicubic filter, antialiased, for the part `start ... start + length`."""
    step_B11 = (length_B / num_out).view(-1, 1, 1)
    out_S1 = torch.arange(num_out, device=start_B.device).view(-1, 1) + 0.5
    centre_BS1 = start_B.view(-1, 1, 1) + out_S1 * step_B11
    x = ((torch.arange(num_in, device=start_B.device) + 0.5 - centre_BS1) / step_B11.clamp(min=1)).abs_()
    # The cubic convolution kernel with a = -1/2 (Keys, IEEE TASSP 29(6), 1981).
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, far).masked_fill_(x >= 2, 0)
    return weights / weights.sum(dim=2, keepdim=True)


def _blur(image_BCSS: Tensor, sigma_B: Tensor) -> Tensor:
    """Blur by a Gaussian of `sigma` pixels; the images' edges are not mixed with anything beyond them."""
    place = torch.arange(image_BCSS.shape[-1], device=image_BCSS.device, dtype=torch.float32)
    weights = torch.exp(-(place - place.view(-1, 1)).square() / (2 * sigma_B.square().view(-1, 1, 1)))
    weights = (weights / weights.sum(dim=2, keepdim=True)).unsqueeze(1)
    return weights @ image_BCSS @ weights.transpose(2, 3)


def _jitter(image_BCSS: Tensor, settings: Augmentation, strength_B4: Tensor, order_B4: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue, each image's in its own order."""
    changes = (
        (settings.brightness, _brightness),
        (settings.contrast, _contrast),
        (settings.saturation, _saturation),
        (settings.hue, _hue),
    )
    for turn_B in order_B4.unbind(1):
        for i, (most, change) in enumerate(changes):
            if most > 0:
                least = -most if change is _hue else max(0.0, 1 - most)
                most = most if change is _hue else 1 + most
                factor_B = least + (most - least) * strength_B4[:, i]
                _for_some(image_BCSS, turn_B == i, change, factor_B.view(-1, 1, 1, 1))
    return image_BCSS


def _grey(image_BCSS: Tensor) -> Tensor:
    return sum(weight * image_BCSS[:, i : i + 1] for i, weight in enumerate(_LUMA))  # type: ignore[return-value]


def _brightness(image_BCSS: Tensor, factor: Tensor) -> Tensor:
    return (image_BCSS * factor).clamp_(0, 1)


def _contrast(image_BCSS: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(image_BCSS).mean(dim=(1, 2, 3), keepdim=True), image_BCSS, factor).clamp_(0, 1)


def _saturation(image_BCSS: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(image_BCSS), image_BCSS, factor).clamp_(0, 1)


def _hue(image_BCSS: Tensor, turns: Tensor) -> Tensor:
    """Turn the colour wheel, keeping value and saturation of the HSV cone."""
    red, green, blue = image_BCSS.split(1, dim=1)
    value = image_BCSS.amax(dim=1, keepdim=True)
    chroma = value - image_BCSS.amin(dim=1, keepdim=True)
    safe = chroma.clamp(min=1e-6)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sixth = sixth + 6 * turns
    start = torch.tensor([5.0, 3.0, 1.0], device=image_BCSS.device).view(1, 3, 1, 1)
    place = (start + sixth).remainder(6)
    return value - chroma * torch.minimum(place, 4 - place).clamp_(0, 1)
