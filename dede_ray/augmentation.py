"""What training does to an image before the model sees it; scoring never augments.

A view is cut from the decoded original, not from a square made of it, so that a small crop keeps the original's detail.
Crop, resizing and colours are Pillow's, and what happens to an image depends on the generator that it is given only.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from pydantic import Field

from dede_ray.config import Config
from dede_ray.shards import to_square


class Augmentation(Config):
    """Random views of training images: crop, mirror, colours."""

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
