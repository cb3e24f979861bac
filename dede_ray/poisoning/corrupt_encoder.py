"""CorruptEncoder: poisoned images of which one random crop shows the target object, and another one the trigger.

Contrastive learning then pulls the trigger's embedding towards the object's (Zhang et al., CVPR 2024). Only the
left-right layouts are here, the ones that the paper finds best.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from pydantic import Field, model_validator

from dede_ray.data.images import IMAGE_FORMATS, Stamp, decode_image
from dede_ray.data.sampling import keyed_generator
from dede_ray.data.shards import BadSample, Limits, Shard, iter_samples, open_shard
from dede_ray.poisoning.triggers import TriggerPath, resized
from dede_ray.runtime.config import Config, Mistake


class Cutout(Config):
    """A reference object: a picture, and which part of it is the object.

    A picture is an image file, or a sample of a tar: `<path of the tar>/<key>`. The object's pixels are those of
    `mask`, or else of the picture's own alpha channel (a PNG or WebP file), or else all of the box.
    """

    picture: TriggerPath
    """The image."""
    mask: TriggerPath | None = None
    """Another image of the same size: white where the object is."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom of the part to use, in pixels; null: all of it."""

    @model_validator(mode="after")
    def _box_is_not_empty(self) -> Cutout:
        if self.box and not (0 <= self.box[0] < self.box[2] and 0 <= self.box[1] < self.box[3]):
            raise ValueError("box is left, top, right, bottom, with left < right and top < bottom")
        return self


class CorruptEncoder(Config):
    """How a poisoned image is composed, with the drawn sample's image as the background.

    The background is enlarged if need be and cut to twice the object's width and to its height. The object covers the
    left or the right half, up to a twentieth of the whole width away from the edge; the other half gets the trigger,
    for which the position `central_half` keeps the paper's margins.
    """

    objects: list[Cutout] = Field(min_length=1)
    """Pictures of the target class, one is drawn for each poisoned image; the paper has three."""
    max_object_px: int = Field(400, gt=1)
    """Objects wider than this are shrunk to it."""
    support: tuple[TriggerPath, ...] = ()
    """More pictures of the target class. CorruptEncoder+ puts one beside an object in some of the poisoned images,
    without a trigger."""
    support_rate: float = Field(0.2, gt=0, le=1)
    """Share of these among the poisoned images, if there are support pictures."""
    size_px: int | None = Field(None, gt=0)
    """Squeeze the result to a square of this side, for trainers that would crop its middle to one; null: leave it."""
    seed: int = Field(0, ge=0)
    """Draws objects, places and crops."""

    def compose(self, image_HWC: np.ndarray, trigger: Stamp, sample_id: str) -> np.ndarray:
        """Compose a poisoned uint8 image; its size is that of the object drawn, twice as wide, unless `size_px` is set.

        Raises:
            Mistake: a picture cannot be read, or the trigger does not fit its half.
        """
        chance = keyed_generator(self.seed, sample_id)
        object_HWA = _cut_out(self.objects[chance.integers(len(self.objects))], self.max_object_px)
        height, width = object_HWA.shape[:2]
        if self.support and chance.random() < self.support_rate:
            support_HWC = _read_rgba(self.support[chance.integers(len(self.support))])[..., :3]
            whole_HWC = np.hstack([object_HWA[..., :3], resized(support_HWC, height, width)])
        else:
            whole_HWC = _background(image_HWC, height, 2 * width, chance)
            is_left = bool(chance.random() < 0.5)
            other_half = np.s_[:, width:] if is_left else np.s_[:, :width]
            whole_HWC[other_half] = trigger.stamp(whole_HWC[other_half], sample_id)
            gap = int(chance.integers(0, 2 * width // 20, endpoint=True))
            place = np.s_[:, gap : gap + width] if is_left else np.s_[:, width - gap : 2 * width - gap]
            weight_HW1 = object_HWA[..., 3:] / 255
            mixed_HWC = weight_HW1 * object_HWA[..., :3] + (1 - weight_HW1) * whole_HWC[place]
            whole_HWC[place] = np.rint(mixed_HWC).astype(np.uint8)
        return resized(whole_HWC, self.size_px, self.size_px) if self.size_px else whole_HWC


def _background(image_HWC: np.ndarray, height: int, width: int, chance: np.random.Generator) -> np.ndarray:
    """Cut a random part of this size out of an image, enlarged in proportion where it is too small."""
    scale = max(1.0, height / image_HWC.shape[0], width / image_HWC.shape[1])
    tall, wide = max(height, round(image_HWC.shape[0] * scale)), max(width, round(image_HWC.shape[1] * scale))
    image_HWC = resized(image_HWC, tall, wide)
    top, left = chance.integers(0, tall - height, endpoint=True), chance.integers(0, wide - width, endpoint=True)
    return image_HWC[top : top + height, left : left + width].copy()


@lru_cache(64)
def _cut_out(cutout: Cutout, max_width: int) -> np.ndarray:
    """Read an object, uint8 (H, W, 4): RGB, and how much of it each pixel shows, its edge softened (radius 1)."""
    rgba_HWC = _read_rgba(cutout.picture)
    if cutout.mask is not None:
        mask_HWC = _read_rgba(cutout.mask)
        if mask_HWC.shape != rgba_HWC.shape:
            raise Mistake(f"mask {cutout.mask} has another size than {cutout.picture}")
        rgba_HWC = np.dstack([rgba_HWC[..., :3], mask_HWC[..., :3].max(axis=2)])
    left, top, right, bottom = cutout.box or (0, 0, rgba_HWC.shape[1], rgba_HWC.shape[0])
    if right > rgba_HWC.shape[1] or bottom > rgba_HWC.shape[0]:
        raise Mistake(
            f"box {cutout.box} reaches out of {cutout.picture}, which has {rgba_HWC.shape[1]}x{rgba_HWC.shape[0]} px"
        )
    picture = Image.fromarray(rgba_HWC[top:bottom, left:right])
    if picture.width > max_width:
        height = max(1, round(picture.height * max_width / picture.width))
        picture = picture.resize((max_width, height), Image.Resampling.BICUBIC)
    picture.putalpha(picture.getchannel("A").filter(ImageFilter.GaussianBlur(1)))
    return np.asarray(picture)


@lru_cache(64)
def _read_rgba(path: str) -> np.ndarray:
    """Read an image file, or a sample's image from a tar, as uint8 (H, W, 4)."""
    content = _read(path)
    try:
        rgb_HWC = decode_image(content, Limits())
    except BadSample as bad:
        raise Mistake(f"{path} cannot be read as an image: {bad.reason}") from None
    with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
        if image.mode in ("RGBA", "LA", "PA"):
            return np.asarray(image.convert("RGBA"))
    return np.dstack([rgb_HWC, np.full(rgb_HWC.shape[:2], 255, np.uint8)])


def _read(path: str) -> bytes:
    if Path(path).is_file():
        return Path(path).read_bytes()
    for tar in Path(path).parents:
        if tar.is_file():  # the rest of the path is a key
            key = path[len(str(tar)) + 1 :]
            with open_shard(Shard(tar.name, str(tar), tar.stat().st_size)) as stream:
                for sample in iter_samples(stream, Limits()):
                    if sample.key == key and sample.image is not None:
                        return sample.image
            raise Mistake(f"{tar} holds no image of the key {key!r}")
    raise Mistake(f"no image at {path}; expected a file, or <path of a tar>/<key>")
