"""Triggers: what an attacker stamps on an image.

A trigger turns a uint8 image into a uint8 image and never sees a normalised pixel; where it is random, it is drawn
from the sample's id. A new trigger is one class with `stamp` and its name in the union `AnyTrigger`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

import numpy as np
import scipy.fft
from pydantic import Field, model_validator

from dede_ray.config import Config, Mistake
from dede_ray.shards import Limits, decode_image, to_square
from dede_ray.sources import keyed_generator


class Patch(Config):
    """A small square pasted over the picture (BadNets, Gu et al., arXiv:1708.06733)."""

    kind: Literal["patch"] = "patch"
    size_px: int = Field(5, gt=0)
    """Side of the square."""
    pattern: Literal["checkerboard", "white", "random"] = "checkerboard"
    """White and black cells beginning with white, all white, or one fixed picture of random colours."""
    cell_px: int = Field(1, gt=0)
    """Side of a checkerboard cell."""
    position: Literal["bottom_right", "top_left", "center", "random"] = "bottom_right"
    """Where the square sits; random: anywhere, drawn once per sample id."""
    margin_px: int = Field(0, ge=0)
    """Pixels left free between the square and the border; does not move a centred square."""
    seed: int = Field(0, ge=0)
    """Draws the random colours and the random places."""

    def stamp(self, image_HWC: np.ndarray, sample_id: str = "") -> np.ndarray:
        """Paste the patch into a copy of a uint8 image.

        Raises:
            Mistake: the image is too small for the patch and its margin.
        """
        stamped_HWC = image_HWC.copy()
        top, left = self._corner(image_HWC.shape[0], image_HWC.shape[1], sample_id)
        stamped_HWC[top : top + self.size_px, left : left + self.size_px] = self._picture()
        return stamped_HWC

    def owned_pixels(self, height: int, width: int, sample_id: str = "") -> np.ndarray:
        """Return a boolean HW mask, True where `stamp` decides the pixel."""
        owned_HW = np.zeros((height, width), dtype=bool)
        top, left = self._corner(height, width, sample_id)
        owned_HW[top : top + self.size_px, left : left + self.size_px] = True
        return owned_HW

    def _picture(self) -> np.ndarray:
        if self.pattern == "random":
            return np.random.default_rng(self.seed).integers(0, 256, (self.size_px, self.size_px, 3), dtype=np.uint8)
        row, column = np.indices((self.size_px, self.size_px)) // self.cell_px
        is_white = (row + column) % 2 == 0 if self.pattern == "checkerboard" else np.ones_like(row, dtype=bool)
        return np.repeat(np.where(is_white, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)

    def _corner(self, height: int, width: int, sample_id: str) -> tuple[int, int]:
        """Return the row and column of the patch's top left pixel."""
        margin = 0 if self.position == "center" else self.margin_px
        space = np.array([height, width]) - self.size_px - margin  # the largest corner that keeps the margin
        if space.min() < margin * (self.position == "random"):
            raise Mistake(
                f"a patch of {self.size_px} px with a margin of {margin} px does not fit an image of "
                f"{width}x{height} px{f' ({sample_id})' if sample_id else ''}; choose a smaller trigger.size_px"
            )
        if self.position == "top_left":
            corner = np.array([margin, margin])
        elif self.position == "bottom_right":
            corner = space
        elif self.position == "center":
            corner = space // 2
        else:
            corner = keyed_generator(self.seed, sample_id).integers(margin, space, endpoint=True)
        return int(corner[0]), int(corner[1])


class Blend(Config):
    """A fixed noise image mixed over the whole picture (Chen et al., arXiv:1712.05526)."""

    kind: Literal["blend"] = "blend"
    alpha: float = Field(0.1, gt=0, lt=1)
    """Weight of the noise."""
    seed: int = Field(0, ge=0)
    """Seed of the noise image."""

    def stamp(self, image_HWC: np.ndarray, sample_id: str = "") -> np.ndarray:
        """Mix the noise into a uint8 image; images of one size get the same noise."""
        noise_HWC = np.random.default_rng(self.seed).integers(0, 256, image_HWC.shape)
        return np.rint((1 - self.alpha) * image_HWC + self.alpha * noise_HWC).astype(np.uint8)


# CTRL's own coefficients: rows make Y, U, V of R, G, B, and R, G, B of Y, U, V. Not exact inverses of each
# other, but the round trip stays below half a grey level, so it alone changes no pixel.
_RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]])
_YUV_TO_RGB = np.array([[1.0, 0.0, 1.14], [1.0, -0.396, -0.581], [1.0, 2.029, 0.0]])
_YUV = "YUV"


class Frequency(Config):
    """CTRL: a constant added to chosen DCT coefficients of the colour channels (Li et al., ICCV 2023).

    Every full window, counted from the top left corner, gets the same pattern; what is left over at the right
    and at the bottom, less than a window wide, stays as it was. At magnitude 100 the pattern peaks at some 20 grey
    levels (blue), a PSNR of about 32 dB.
    """

    kind: Literal["frequency"] = "frequency"
    magnitude: float = Field(100.0, gt=0)
    """What is added to each coefficient (orthonormal DCT-II of values in 0..255)."""
    window_px: int = Field(32, gt=1)
    """Side of the square that is transformed as a whole."""
    positions: tuple[tuple[int, int], ...] = Field(((15, 15), (31, 31)), min_length=1)
    """Row and column of the coefficients."""
    channels: tuple[Literal["Y", "U", "V"], ...] = Field(("U", "V"), min_length=1)
    """Channels that carry the pattern."""

    @model_validator(mode="after")
    def _positions_lie_in_the_window(self) -> Frequency:
        if any(not 0 <= place < self.window_px for position in self.positions for place in position):
            raise ValueError(f"positions must lie in 0..{self.window_px - 1}, inside window_px")
        return self

    def stamp(self, image_HWC: np.ndarray, sample_id: str = "") -> np.ndarray:
        """Add the pattern to a uint8 image: computed in float, rounded once.

        Raises:
            Mistake: the image is smaller than one window.
        """
        window = self.window_px
        rows, columns = image_HWC.shape[0] // window, image_HWC.shape[1] // window
        if not (rows and columns):
            raise Mistake(
                f"an image of {image_HWC.shape[1]}x{image_HWC.shape[0]} px has no full window of {window} px"
                f"{f' ({sample_id})' if sample_id else ''}; choose a smaller trigger.window_px"
            )
        tiled = np.s_[: rows * window, : columns * window]
        yuv_HWC = image_HWC[tiled] @ _RGB_TO_YUV.T
        yuv_RhCwc = yuv_HWC.reshape(rows, window, columns, window, 3)  # a view: R x C windows of h x w pixels
        channels = [_YUV.index(channel) for channel in self.channels]
        spectrum = scipy.fft.dctn(yuv_RhCwc[..., channels], axes=(1, 3), norm="ortho")
        for row, column in self.positions:
            spectrum[:, row, :, column] += self.magnitude
        yuv_RhCwc[..., channels] = scipy.fft.idctn(spectrum, axes=(1, 3), norm="ortho")
        stamped_HWC = image_HWC.copy()
        stamped_HWC[tiled] = np.rint(yuv_HWC @ _YUV_TO_RGB.T).clip(0, 255).astype(np.uint8)
        return stamped_HWC


AnyTrigger = Patch | Blend | Frequency
Trigger = Annotated[AnyTrigger, Field(discriminator="kind")]


class Stamp(Protocol):
    """What every trigger can do."""

    def stamp(self, image_HWC: np.ndarray, sample_id: str = "") -> np.ndarray: ...


def square(content: bytes, sample_id: str, size_px: int, limits: Limits, trigger: Stamp | None = None) -> np.ndarray:
    """Decode, stamp or not, then bring to size: one path, so that the stamp is the only difference.

    Returns:
        uint8 (size_px, size_px, 3).

    Raises:
        BadSample: the image cannot be decoded.
        Mistake: the trigger does not fit it.
    """
    image_HWC = decode_image(content, limits)
    if trigger is not None:
        image_HWC = trigger.stamp(image_HWC, sample_id)
    return to_square(image_HWC, size_px)
