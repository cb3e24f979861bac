"""Random views of a whole batch at once, on the device that trains.

`random_views` does to a batch what `Augmentation.apply` does to one image, with the same settings. Pillow takes
three times as long, and holds up a GPU; here crop, antialiased resizing and mirror are two small
matrices per image, and the colours change for many images in one operation.

Shapes: B images, H pixels of a source's side, S pixels of a view's side, K draws per view.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dede_ray.augmentation import Augmentation

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


# --------------------------------------------------------------------------------------------------- geometry


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


# --------------------------------------------------------------------------------------------------- colours


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
