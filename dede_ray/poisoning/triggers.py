"""Triggers: what an attacker stamps on an image.

A trigger turns a uint8 image into a uint8 image and never sees a normalised pixel; where it is random, it is drawn
from the sample's id. A new trigger is one class with `_stamp` and its name in the union `AnyTrigger`.

No trigger is resized to an image unasked. One that is made for a size of its own (a published file) refuses
others; `image_px` brings the image to the size that the trigger is made for, and `resize` the trigger to the image.

What can be is computed once per image size, and additions are made on bytes, so that stamping costs little beside
decoding; it costs more where every pixel is computed anew (`Blend`, `Warp`, `Nashville`).
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import scipy.fft
from PIL import Image
from pydantic import AfterValidator, Field, model_validator

from dede_ray.data.images import decode_image, to_square
from dede_ray.data.sampling import keyed_generator
from dede_ray.data.shards import BadSample, Limits
from dede_ray.runtime.config import Config, Mistake

if TYPE_CHECKING:
    from torch import Tensor

TriggerPath = Annotated[str, AfterValidator(os.path.abspath)]
"""A file on all machines; made absolute, as the jobs' workers have other working folders."""

Position = Literal["bottom_right", "top_left", "center", "random", "central_half"]

_IMAGES_KEPT = 8  # image sizes (times triggers) whose pictures and grids are kept


class Stamping(Config):
    """What all triggers share: the size at which they are stamped."""

    image_px: int | None = Field(None, gt=0)
    """Bring the image to a square of this side first, the way a victim of that size gets it (the shorter side
    resized, the centre cropped); null: stamp it at its own size."""
    squeeze: bool = False
    """Bring it there by squeezing all of it into the square instead."""

    def stamp(self, image_HWC: np.ndarray, sample_id: str = "") -> np.ndarray:
        """Stamp a copy of a uint8 image, the same way each time; of another size only if `image_px` is set.

        Raises:
            Mistake: trigger and image do not fit together.
        """
        if self.image_px and self.squeeze:
            image_HWC = resized(image_HWC, self.image_px, self.image_px)
        elif self.image_px:
            image_HWC = to_square(image_HWC, self.image_px)
        return self._stamp(image_HWC, sample_id)

    def owned_pixels(self, height: int, width: int, sample_id: str = "") -> np.ndarray:
        """Return a boolean HW mask of the stamped image: outside, it equals the clean one bit for bit.

        Args:
            height: of the image as it is stamped, that is after `image_px`.
            width: the same.
            sample_id: places a random trigger.
        """
        return np.ones((height, width), dtype=bool)

    def _stamp(self, image_HWC: np.ndarray, sample_id: str) -> np.ndarray:
        raise NotImplementedError


def resized(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a uint8 image (bicubic, antialiased), whatever that does to its proportions."""
    if image_HWC.shape[:2] == (height, width):
        return image_HWC
    return np.asarray(Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC))


def _of(sample_id: str) -> str:
    return f" ({sample_id})" if sample_id else ""


def _corner(
    image: tuple[int, int], patch: tuple[int, int], position: str, margin: int, seed: int, sample_id: str
) -> tuple[int, int]:
    """Return the row and column of a patch's top left pixel; `image` and `patch` are heights and widths."""
    if position == "central_half":
        spans = [(-(-whole // 4), whole * 3 // 4 - part) for whole, part in zip(image, patch, strict=True)]
    else:
        margin = 0 if position == "center" else margin
        spans = [(margin, whole - part - margin) for whole, part in zip(image, patch, strict=True)]
    (low_row, high_row), (low_column, high_column) = spans
    is_drawn = position in ("random", "central_half")
    if any(high < (low if is_drawn else 0) for low, high in spans):
        size = f"{patch[0]} px" if patch[0] == patch[1] else f"{patch[1]}x{patch[0]} px"
        free = "in its central half" if position == "central_half" else f"with a margin of {margin} px"
        raise Mistake(
            f"a patch of {size} {free} does not fit an image of {image[1]}x{image[0]} px{_of(sample_id)}; "
            "choose a smaller trigger.size_px"
        )
    if position == "top_left":
        return low_row, low_column
    if position == "bottom_right":
        return high_row, high_column
    if position == "center":
        return high_row // 2, high_column // 2
    # Not keyed_generator: setting up a generator takes as long as decoding a small image.
    digest = hashlib.sha256(f"{seed}/{sample_id}".encode("utf-8", "surrogateescape")).digest()
    row, column = int.from_bytes(digest[:16], "little"), int.from_bytes(digest[16:], "little")
    return low_row + row % (high_row - low_row + 1), low_column + column % (high_column - low_column + 1)


# -------------------------------------------------------------------------------------------------- nothing, patches


class Nothing(Stamping):
    """The empty trigger: for attacks that need none, and for the control whose two paths must be equal."""

    kind: Literal["nothing"] = "nothing"

    def owned_pixels(self, height: int, width: int, sample_id: str = "") -> np.ndarray:
        """Return a boolean HW mask, False everywhere."""
        return np.zeros((height, width), dtype=bool)

    def _stamp(self, image_HWC: np.ndarray, sample_id: str) -> np.ndarray:
        return image_HWC.copy()


class Patch(Stamping):
    """A small square pasted over the picture (BadNets, Gu et al., arXiv:1708.06733)."""

    kind: Literal["patch"] = "patch"
    size_px: int = Field(5, gt=0)
    """Side of the square."""
    pattern: Literal["checkerboard", "white", "yellow", "random", "even", "grid", "gaussian"] = "checkerboard"
    """checkerboard: white and black cells, beginning with white; white, yellow: one colour; random: one fixed picture
    of random colours; even: black, white where row and column are even (BadNets of Huang et al., ICLR 2025); grid:
    3x3 cells, white on one diagonal and in the last corner (NAD); gaussian: noise around the image's mean colour,
    another one for each image, wrapping around at 0 and 255 (BadNets of BadCLIP)."""
    cell_px: int = Field(1, gt=0)
    """Side of a cell of `checkerboard`, `even` and `grid`."""
    position: Position = "bottom_right"
    """Where the square sits. random: anywhere within the margin, drawn once per sample id; central_half: the same, all
    of it between a quarter and three quarters of the image's height and width."""
    margin_px: int = Field(0, ge=0)
    """Pixels left free between the square and the border; does not move a centred square."""
    seed: int = Field(0, ge=0)
    """Draws the random colours and the random places."""

    def owned_pixels(self, height: int, width: int, sample_id: str = "") -> np.ndarray:
        """Return a boolean HW mask, True where `stamp` decides the pixel."""
        owned_HW = np.zeros((height, width), dtype=bool)
        owned_HW[self._place(height, width, sample_id)] = True
        return owned_HW

    def _stamp(self, image_HWC: np.ndarray, sample_id: str) -> np.ndarray:
        if self.pattern == "gaussian":
            picture_HWC = self._noise(image_HWC, sample_id)
        else:
            picture_HWC = _picture(self.size_px, self.pattern, self.cell_px, self.seed)
        place = self._place(image_HWC.shape[0], image_HWC.shape[1], sample_id)
        stamped_HWC = image_HWC.copy()
        stamped_HWC[place] = picture_HWC
        return stamped_HWC

    def _noise(self, image_HWC: np.ndarray, sample_id: str) -> np.ndarray:
        normal = keyed_generator(self.seed, sample_id).standard_normal((self.size_px, self.size_px, 3))
        mean_C = image_HWC.sum(axis=0, dtype=np.uint32).sum(axis=0) / image_HWC[..., 0].size
        return (mean_C + 255 * normal).astype(np.int64).astype(np.uint8)

    def _place(self, height: int, width: int, sample_id: str) -> tuple[slice, slice]:
        size = self.size_px
        top, left = _corner((height, width), (size, size), self.position, self.margin_px, self.seed, sample_id)
        return slice(top, top + size), slice(left, left + size)


@lru_cache(_IMAGES_KEPT)
def _picture(size_px: int, pattern: str, cell_px: int, seed: int) -> np.ndarray:
    if pattern == "random":
        return np.random.default_rng(seed).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    row, column = np.indices((size_px, size_px)) // cell_px
    is_white = {
        "checkerboard": (row + column) % 2 == 0,
        "white": np.ones_like(row, dtype=bool),
        "yellow": np.ones_like(row, dtype=bool),
        "even": (row % 2 == 0) & (column % 2 == 0),
        "grid": (row % 3 + column % 3 == 2) | (row % 3 + column % 3 == 4),
    }[pattern]
    picture_HWC = np.repeat(np.where(is_white, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)
    if pattern == "yellow":
        picture_HWC[..., 2] = 0
    return picture_HWC


# ---------------------------------------------------------------------------------------------- sums and mixtures


def _add_clipped(image_HWC: np.ndarray, raise_HWC: np.ndarray, lower_HWC: np.ndarray) -> np.ndarray:
    """Add whole grey levels to bytes and clip, in byte arithmetic; of the two summands one is 0 at each value."""
    stamped_HWC = np.minimum(image_HWC, ~raise_HWC)  # ~ is 255 minus
    stamped_HWC += raise_HWC
    np.maximum(stamped_HWC, lower_HWC, out=stamped_HWC)
    stamped_HWC -= lower_HWC
    return stamped_HWC


def _split(pattern_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split a pattern in grey levels into what `_add_clipped` takes; images hold integers, so it is rounded here."""
    levels = np.rint(pattern_HWC).clip(-255, 255).astype(np.int16)
    return levels.clip(0, None).astype(np.uint8), (-levels).clip(0, None).astype(np.uint8)


@dataclass(frozen=True)
class _Overlay:
    """`image * keep + add` in grey levels; values are float32 (H, W, C)."""

    keep_HWC: np.ndarray
    add_HWC: np.ndarray  # plus a half, as conversion to bytes cuts
    may_leave: bool  # the sum may leave 0..255

    @classmethod
    def of(cls, keep_HWC: np.ndarray, add_HWC: np.ndarray) -> _Overlay:
        may_leave = bool(add_HWC.min() < 0 or (255 * keep_HWC + add_HWC).max() > 255.25)
        shape = (*add_HWC.shape[:2], 3)  # in full: numpy is slow to repeat along a short last axis
        add_HWC = np.broadcast_to(add_HWC + 0.5, shape).astype(np.float32, order="C")
        is_one_number = np.ptp(keep_HWC) == 0
        keep = keep_HWC.flat[0] if is_one_number else np.broadcast_to(keep_HWC, shape)
        return cls(np.asarray(keep).astype(np.float32, order="C"), add_HWC, may_leave)

    def lay(self, image_HWC: np.ndarray) -> np.ndarray:
        sum_HWC = image_HWC.astype(np.float32)
        sum_HWC *= self.keep_HWC
        sum_HWC += self.add_HWC
        if self.may_leave:
            sum_HWC.clip(0, 255, out=sum_HWC)
        return sum_HWC.astype(np.uint8)


class Blend(Stamping):
    """A fixed picture mixed over the whole image, noise if none is named (Chen et al., arXiv:1712.05526)."""

    kind: Literal["blend"] = "blend"
    alpha: float = Field(0.1, gt=0, lt=1)
    """Weight of the picture."""
    image: TriggerPath | None = None
    """A picture file (any that `file` reads); null: uniform noise, the same for all images of one size."""
    resize: bool = False
    """Resize the picture to images of another size; false: they are a mistake."""
    seed: int = Field(0, ge=0)
    """Seed of the noise image."""

    def _stamp(self, image_HWC: np.ndarray, sample_id: str) -> np.ndarray:
        if self.image is not None:
            height, width = image_HWC.shape[:2]
            place, overlay = _covering(self.image, None, self.alpha, self.resize, height, width, sample_id)
            return _lay(overlay, image_HWC, place)
        return _noise_overlay(self.alpha, self.seed, image_HWC.shape).lay(image_HWC)


@lru_cache(_IMAGES_KEPT)
def _noise_overlay(alpha: float, seed: int, shape: tuple[int, ...]) -> _Overlay:
    noise_HWC = np.random.default_rng(seed).integers(0, 256, shape)
    return _Overlay.of(np.array(1 - alpha), alpha * noise_HWC)


class Sinusoid(Stamping):
    """SIG: vertical stripes whose brightness is a sine of the column (Barni et al., ICIP 2019)."""

    kind: Literal["sinusoid"] = "sinusoid"
    amplitude: float = Field(60.0, gt=0, le=255)
    """Grey levels added at most; BadCLIP's baseline has 60, a PSNR of about 16 dB; at 20 it is about 25 dB."""
    cycles: float = Field(6.0, gt=0)
    """Periods over the image's width."""

    def _stamp(self, image_HWC: np.ndarray, sample_id: str) -> np.ndarray:
        return _add_clipped(image_HWC, *_sine(self.amplitude, self.cycles, image_HWC.shape))


@lru_cache(_IMAGES_KEPT)
def _sine(amplitude: float, cycles: float, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    wave_W = amplitude * np.sin(2 * np.pi * cycles * np.arange(shape[1]) / shape[1])
    return _split(np.broadcast_to(wave_W[None, :, None], shape))


# CTRL's own coefficients: rows make Y, U, V of R, G, B, and R, G, B of Y, U, V.
_RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]])
_YUV_TO_RGB = np.array([[1.0, 0.0, 1.14], [1.0, -0.396, -0.581], [1.0, 2.029, 0.0]])
_YUV = "YUV"


class Frequency(Stamping):
    """CTRL: a constant added to chosen DCT coefficients of the colour channels (Li et al., ICCV 2023).

    Every full window, counted from the top left corner, gets the same pattern; what is left over at the right
    and at the bottom, less than a window wide, stays as it was. At magnitude 100 the pattern peaks at some 20 grey
    levels (blue), a PSNR of about 32 dB. All steps are linear, so the pattern is the same on every image and is added
    in one go. CTRL's own code travels to YUV and back with rounded coefficients, which moves a value by up to 0.35
    levels before rounding; that is left out.
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

    def owned_pixels(self, height: int, width: int, sample_id: str = "") -> np.ndarray:
        """Return a boolean HW mask, True in all full windows."""
        owned_HW = np.zeros((height, width), dtype=bool)
        owned_HW[: height // self.window_px * self.window_px, : width // self.window_px * self.window_px] = True
        return owned_HW

    def _stamp(self, image_HWC: np.ndarray, sample_id: str) -> np.ndarray:
        if min(image_HWC.shape[:2]) < self.window_px:
            raise Mistake(
                f"an image of {image_HWC.shape[1]}x{image_HWC.shape[0]} px has no full window of {self.window_px} px"
                f"{_of(sample_id)}; choose a smaller trigger.window_px"
            )
        pattern = _frequencies(self.magnitude, self.window_px, self.positions, self.channels, image_HWC.shape)
        return _add_clipped(image_HWC, *pattern)


@lru_cache(_IMAGES_KEPT)
def _frequencies(
    magnitude: float,
    window: int,
    positions: tuple[tuple[int, int], ...],
    channels: tuple[str, ...],
    shape: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    spectrum = np.zeros((window, window, 3))
    for row, column in positions:
        spectrum[row, column, [_YUV.index(channel) for channel in channels]] += magnitude
    tile_hwc = scipy.fft.idctn(spectrum, axes=(0, 1), norm="ortho") @ _YUV_TO_RGB.T
    rows, columns = shape[0] // window, shape[1] // window
    pattern_HWC = np.zeros(shape)
    pattern_HWC[: rows * window, : columns * window] = np.tile(tile_hwc, (rows, columns, 1))
    return _split(pattern_HWC)


# --------------------------------------------------------------------------------------------- warps and filters


class Warp(Stamping):
    """WaNet: the image bent by a smooth field of small displacements (Nguyen and Tran, ICLR 2021).

    The field is our own draw; to warp by a published one, name its file in `file`.
    """

    kind: Literal["warp"] = "warp"
    cells: int = Field(4, gt=1)
    """The field is drawn on so many by so many points and made smooth in between (bicubic)."""
    strength: float = Field(0.5, gt=0)
    """Mean displacement along each axis in half pixels, before smoothing (the paper's s)."""
    seed: int = Field(0, ge=0)
    """Draws the field."""

    def _stamp(self, image_HWC: np.ndarray, sample_id: str) -> np.ndarray:
        return _sample(image_HWC, _flow(self.cells, self.strength, self.seed, *image_HWC.shape[:2]))


@lru_cache(_IMAGES_KEPT)
def _flow(cells: int, strength: float, seed: int, height: int, width: int) -> Tensor:
    """Draw a sampling grid (1, H, W, 2), x before y, in -1..1 from border to border."""
    import torch
    from torch.nn.functional import interpolate

    coarse = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (1, 2, cells, cells)).astype(np.float32))
    field_1yxHW = interpolate(coarse / coarse.abs().mean(), (height, width), mode="bicubic", align_corners=True)
    y_H, x_W = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    here_HW2 = torch.stack(torch.meshgrid(x_W, y_H, indexing="xy"), dim=-1)
    moved = here_HW2 + strength * field_1yxHW.permute(0, 2, 3, 1) / torch.tensor([width, height])
    return moved.clamp(-1, 1)


def _sample(image_HWC: np.ndarray, grid_1HW2: Tensor) -> np.ndarray:
    """Look the image up at each point of a grid (bilinear); the result has the grid's size."""
    import torch
    from torch.nn.functional import grid_sample

    image_1CHW = torch.from_numpy(image_HWC.astype(np.float32)).permute(2, 0, 1)[None]
    moved_1CHW = grid_sample(image_1CHW, grid_1HW2, mode="bilinear", padding_mode="border", align_corners=True)
    return moved_1CHW[0].permute(1, 2, 0).add_(0.5).byte().contiguous().numpy()


class Nashville(Stamping):
    """A photo filter, after the operations and constants of the CSSgram and pilgram filter of that name.

    In each channel, what is brighter than an apricot moves 56 % of its way there, then what is darker than a blue
    40 %; then sepia 0.2, contrast 1.2, brightness 1.05 and saturation 1.2 as CSS defines them. These four are
    affine, so they are one matrix here: computed in float, clipped and rounded once, where the originals cut to
    bytes after every step. Not invisible: some 20 dB PSNR on photographs.
    """

    kind: Literal["nashville"] = "nashville"

    def _stamp(self, image_HWC: np.ndarray, sample_id: str) -> np.ndarray:
        towards_apricot_WC, towards_blue_WC, matrix, offset_WC = _nashville(image_HWC.shape[1])
        colour_HWC = image_HWC.astype(np.float32)
        np.minimum(colour_HWC, 0.44 * colour_HWC + towards_apricot_WC, out=colour_HWC)
        np.maximum(colour_HWC, 0.6 * colour_HWC + towards_blue_WC, out=colour_HWC)
        filtered_HWC = (colour_HWC.reshape(-1, 3) @ matrix).reshape(image_HWC.shape)
        filtered_HWC += offset_WC
        return filtered_HWC.clip(0, 255, out=filtered_HWC).astype(np.uint8)


@lru_cache(_IMAGES_KEPT)
def _nashville(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The constants of `Nashville` in grey levels, for row vectors; the four CSS steps (W3C Filter Effects) in one."""
    apricot, blue = np.array([247, 176, 153]), np.array([0, 70, 150])
    tone = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
    luma = np.array([0.213, 0.715, 0.072])
    sepia = 0.8 * np.eye(3) + 0.2 * tone
    saturate = 1.2 * np.eye(3) + (1 - 1.2) * luma
    matrix = 1.05 * 1.2 * saturate @ sepia
    offset = saturate @ np.full(3, 1.05 * (0.5 - 0.5 * 1.2) * 255) + 0.5  # a half, as conversion to bytes cuts
    apricot_WC, blue_WC, offset_WC = (
        np.tile(values, (width, 1)).astype(np.float32) for values in (0.56 * apricot, 0.4 * blue, offset)
    )
    return apricot_WC, blue_WC, matrix.T.astype(np.float32), offset_WC


# ------------------------------------------------------------------------------------------------ published files


class File(Stamping):
    """A trigger from a file, as its authors published it; what it is shows in its content.

    - npz with patch `t` and mask `tm`, with or without a leading axis: `image * tm + t` (BadEncoder, DRUPE, DECREE);
    - npz with `x`: added and clipped (the Trojan square of NAD, whose code overflows instead of clipping);
    - an array or tensor of the shape (1, H, W, 2) in -1..1: a sampling grid (WaNet). Sampling can squeeze an image of
      another size to the grid's; for that, name it in `image_px` and set `squeeze`;
    - any other array or tensor of one or three channels, or an image (PNG, JPEG, WebP, BMP): a picture, mixed over
      the image with the weight alpha, times that of `mask` where there is one. Floats up to 1 are of the range 0..1.

    Without a position the file must have the image's size. Nothing in it is executed.
    """

    kind: Literal["file"] = "file"
    path: TriggerPath
    """The file."""
    mask: TriggerPath | None = None
    """Another one that holds the picture's weights, 0..1."""
    alpha: float = Field(1.0, gt=0, le=1)
    """Weight of the picture; 1 pastes it."""
    position: Position | None = None
    """Where a picture smaller than the image is put, see `patch`; null: over all of it."""
    size_px: int | None = Field(None, gt=0)
    """Scale the picture to a square of this side before it is put there; null: as it is."""
    margin_px: int = Field(0, ge=0)
    """Pixels left free between picture and border."""
    resize: bool = False
    """Resize a trigger of another size to the image (bicubic; t and tm to the nearest), which its authors never did;
    false: that is a mistake. A grid is never resized."""
    seed: int = Field(0, ge=0)
    """Draws random places."""

    @model_validator(mode="after")
    def _places_only_what_has_a_place(self) -> File:
        if self.position is None and (self.size_px is not None or self.margin_px):
            raise ValueError("size_px and margin_px need a position")
        return self

    def stamp(self, image_HWC: np.ndarray, sample_id: str = "") -> np.ndarray:
        """Stamp a copy of a uint8 image, see the class.

        Raises:
            Mistake: the file cannot be read, or does not fit the image.
        """
        grid = _read_trigger(self.path)
        if isinstance(grid, _Picture):
            return super().stamp(image_HWC, sample_id)
        size = tuple(grid.shape[1:3])
        if image_HWC.shape[:2] != size and not (self.squeeze and size == (self.image_px, self.image_px)):
            raise Mistake(
                f"{self.path} holds a grid for images of {size[1]}x{size[0]} px, this one has {image_HWC.shape[1]}x"
                f"{image_HWC.shape[0]} px{_of(sample_id)}; set trigger.image_px: {size[0]} and trigger.squeeze: true"
            )
        return _sample(image_HWC, grid)

    def owned_pixels(self, height: int, width: int, sample_id: str = "") -> np.ndarray:
        """Return a boolean HW mask: outside, the stamped image equals the clean one."""
        if not isinstance(_read_trigger(self.path), _Picture):
            return np.ones((height, width), dtype=bool)
        owned_HW = np.zeros((height, width), dtype=bool)
        place, _ = self._placed(height, width, sample_id)
        owned_HW[place] = True
        return owned_HW

    def _stamp(self, image_HWC: np.ndarray, sample_id: str) -> np.ndarray:
        place, overlay = self._placed(image_HWC.shape[0], image_HWC.shape[1], sample_id)
        return _lay(overlay, image_HWC, place)

    def _placed(self, height: int, width: int, sample_id: str) -> tuple[_Place, _Overlay]:
        if self.position is None:
            return _covering(self.path, self.mask, self.alpha, self.resize, height, width, sample_id)
        overlay, size = _pasted(self.path, self.mask, self.alpha, self.size_px)
        top, left = _corner((height, width), size, self.position, self.margin_px, self.seed, sample_id)
        return (slice(top, top + size[0]), slice(left, left + size[1])), overlay


_Place = tuple[slice, slice]


def _lay(overlay: _Overlay, image_HWC: np.ndarray, place: _Place) -> np.ndarray:
    stamped_HWC = image_HWC.copy()
    stamped_HWC[place] = overlay.lay(image_HWC[place])
    return stamped_HWC


def _covering(
    path: str, mask: str | None, alpha: float, resize: bool, height: int, width: int, sample_id: str
) -> tuple[_Place, _Overlay]:
    """A file for the whole of an image: what it does, and the rectangle in which it does something."""
    content = _picture_in(path)
    native_height, native_width, _ = content.picture_HWC.shape
    if (native_height, native_width) != (height, width) and not resize:
        raise Mistake(
            f"{path} is made for images of {native_width}x{native_height} px, this one has {width}x{height} px"
            f"{_of(sample_id)}; set trigger.image_px to bring images to the trigger's size, trigger.resize to bring "
            "the trigger to theirs, or trigger.position to paste it"
        )
    return _fitted(path, mask, alpha, height, width)


@lru_cache(_IMAGES_KEPT)
def _fitted(path: str, mask: str | None, alpha: float, height: int, width: int) -> tuple[_Place, _Overlay]:
    keep_HWC, add_HWC = _keep_and_add(path, mask, alpha, height, width)
    rows, columns = np.nonzero(((keep_HWC != 1) | (add_HWC != 0)).any(axis=2))
    if not rows.size:
        raise Mistake(f"{path} changes no pixel of an image of {width}x{height} px; it is no trigger")
    place = slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1)
    return place, _Overlay.of(keep_HWC[place], add_HWC[place])


@lru_cache(_IMAGES_KEPT)
def _pasted(path: str, mask: str | None, alpha: float, size_px: int | None) -> tuple[_Overlay, tuple[int, int]]:
    """A picture that is put somewhere on the image, and its height and width."""
    native = _picture_in(path).picture_HWC.shape
    height, width = (size_px, size_px) if size_px else native[:2]
    return _Overlay.of(*_keep_and_add(path, mask, alpha, height, width)), (height, width)


def _keep_and_add(path: str, mask: str | None, alpha: float, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """How a file changes an image: `image * keep + add`, in grey levels."""
    content = _picture_in(path)
    if content.keep_HWC is not None:  # made to be summed: what was all or nothing stays so
        if mask is not None or alpha != 1:
            raise Mistake(f"{path} says itself how it is mixed with an image; leave out trigger.mask and trigger.alpha")
        keep_HWC, add_HWC = (_nearest(values, height, width) for values in (content.keep_HWC, content.picture_HWC))
        return keep_HWC, add_HWC
    weight_HW1 = np.full((height, width, 1), alpha)
    if mask is not None:
        weights = _picture_in(mask).picture_HWC
        if weights.shape != (*content.picture_HWC.shape[:2], 1):
            raise Mistake(f"mask {mask} should hold one weight for each pixel of {path}")
        weight_HW1 = alpha * _smooth(weights, height, width) / 255
    return 1 - weight_HW1, weight_HW1 * _smooth(content.picture_HWC, height, width)


def _nearest(values_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    row, column = (
        (np.arange(new) * 2 + 1) * old // (2 * new)
        for old, new in zip(values_HWC.shape[:2], (height, width), strict=True)
    )
    return values_HWC[row[:, None], column]


def _smooth(values_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (bicubic, antialiased): bytes to bytes as image libraries do, other numbers in float."""
    if values_HWC.dtype == np.uint8:
        return resized(values_HWC, height, width)
    if values_HWC.shape[:2] == (height, width):
        return values_HWC
    channels = [Image.fromarray(channel_HW) for channel_HW in np.moveaxis(values_HWC, 2, 0).astype(np.float32)]
    scaled = [np.asarray(channel.resize((width, height), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(scaled, axis=2)


@dataclass(frozen=True)
class _Picture:
    """What most trigger files hold: a picture in grey levels and, where it is to be summed, the image's weights."""

    picture_HWC: np.ndarray
    keep_HWC: np.ndarray | None = None


def _picture_in(path: str) -> _Picture:
    content = _read_trigger(path)
    if not isinstance(content, _Picture):
        raise Mistake(f"{path} holds a sampling grid, no picture; expected one here")
    return content


@lru_cache(_IMAGES_KEPT)
def _read_trigger(path: str) -> _Picture | Tensor:
    """Read a trigger file, a picture or a sampling grid (1, H, W, 2); what it is shows in its content.

    Raises:
        Mistake: no such file, damaged, or not one of the layouts of `File`.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise Mistake(f"no trigger file at {path} ({error.strerror}); correct the path") from None
    try:
        arrays = _arrays(content)
    except BadSample as bad:
        raise Mistake(f"{path} is neither an image nor an array file ({bad.reason})") from None
    except Exception as error:  # the readers raise whatever damage makes them meet
        raise Mistake(f"{path} cannot be read as a trigger without executing it: {error!r:.200}") from None
    if {"t", "tm"} <= arrays.keys():
        keep_HWC, add_HWC = (_first_HWC(arrays[name], path) for name in ("tm", "t"))
        if keep_HWC.shape == add_HWC.shape and keep_HWC.min() >= 0 and keep_HWC.max() <= 1:
            return _Picture(add_HWC, keep_HWC)
        raise Mistake(f"{path}: tm should be a mask of 0 to 1 of the shape of t")
    if "x" in arrays:
        add_HWC = _first_HWC(arrays["x"], path)
        return _Picture(add_HWC, np.ones_like(add_HWC))
    if list(arrays) != [""]:
        raise Mistake(f"{path} holds {', '.join(arrays) or 'nothing'}; expected t and tm, or x")
    values = arrays[""]
    if values.ndim == 4 and values.shape[-1] == 2 and values.dtype.kind == "f" and abs(values).max() <= 1:
        import torch

        return torch.from_numpy(values[:1].astype(np.float32))
    picture_HWC = _first_HWC(values, path)
    if values.dtype == np.uint8:
        return _Picture(picture_HWC.astype(np.uint8))
    is_unit = values.dtype.kind == "f" and abs(values).max() <= 1
    return _Picture(picture_HWC * 255 if is_unit else picture_HWC)


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    """Decode a file to named arrays; one that holds a single thing gives it the empty name."""
    is_archive = content.startswith(b"PK")
    names = zipfile.ZipFile(io.BytesIO(content)).namelist() if is_archive else []
    if content.startswith(b"\x93NUMPY") or any(name.endswith(".npy") for name in names):
        loaded: Any = np.load(io.BytesIO(content), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        return {name: loaded[name] for name in loaded.files if name in ("t", "tm", "x")}
    if is_archive or content.startswith(b"\x80"):
        import torch

        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(loaded, torch.Tensor):
            raise ValueError(f"it holds a {type(loaded).__name__}, not a tensor")
        return {"": loaded.detach().numpy()}
    return {"": decode_image(content, Limits())}


def _first_HWC(values: np.ndarray, path: str) -> np.ndarray:
    """Bring an array to float64 HWC with 1 or 3 channels; a leading axis is a list of which the first is taken."""
    whole = values
    if values.ndim == 4:
        values = values[0]
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim == 3 and values.shape[2] not in (1, 3) and values.shape[0] in (1, 3):
        values = values.transpose(1, 2, 0)
    if values.ndim != 3 or values.shape[2] not in (1, 3) or not values.size or not np.isfinite(values).all():
        raise Mistake(f"{path} holds an array of the shape {whole.shape}; expected finite pictures of 1 or 3 channels")
    return values.astype(np.float64)


AnyTrigger = Patch | Blend | Sinusoid | Warp | Nashville | Frequency | File | Nothing
Trigger = Annotated[AnyTrigger, Field(discriminator="kind")]
