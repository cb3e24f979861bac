"""Strangers' checkpoints: which of the published layouts a file has is seen in the names of its tensors.

The papers of this field wrote the same few networks under many names, and normalise pixels each in its own way.
`LAYOUTS` is the table: the first row whose `has` are all among a file's tensors says where the encoder is, what it is
and what pixels it expects. What is taken must then fit exactly: a loose loading can leave a random encoder behind.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dede_ray.models.encoders import (
    Architecture,
    CifarResNet,
    ClipResNet,
    Described,
    Layers,
    PreActResNet,
    ResNet,
    Timm,
    Vgg,
    WideResNet,
    build_encoder,
    encoder_of,
    load_strictly,
)
from dede_ray.models.weights import origin, read_tensors, unwrapped
from dede_ray.runtime.config import Mistake, explain
from dede_ray.runtime.libraries import timm

logger = logging.getLogger(__name__)

Channels = tuple[float, float, float]
Normaliser = Literal["cifar", "stl", "imagenet", "clip", "none"]

NORMALISERS: dict[str, tuple[Channels, Channels]] = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "stl": ((0.44087798, 0.42790666, 0.38678814), (0.25507198, 0.24801506, 0.25641308)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and standard deviation per RGB channel of pixels in [0, 1]."""


@dataclass(frozen=True)
class Layout:
    """One row of the table."""

    name: str
    has: tuple[str, ...]
    """Tensors that it is recognised by, once what wrappers put before every name is gone."""
    network: Literal[
        "cifar stem", "imagenet stem", "clip tower", "whole clip", "option a", "wide", "pre-activation", "vgg"
    ]
    image_size: int
    normaliser: Normaliser | None
    """What its first users fed it; None where two did differently, so that a person has to choose."""
    prefix: str = ""
    """Prefix of the encoder's tensors; all others (heads, momentum encoders, queues) are left out."""
    classifier: str | None = None
    """Prefix of the linear layer on top, within the encoder's."""
    dropped: str | None = None
    """Prefix of a head that is no linear layer, within the encoder's."""
    is_sequence: bool = False
    """The modules bear numbers for names."""
    lacks: tuple[str, ...] = ()
    """Tensors of other rows' networks that has all of the above, and that it does not have."""

    def fits(self, names: Mapping[str, Tensor]) -> bool:
        return all(name in names for name in self.has) and not any(name in names for name in self.lacks)


LAYOUTS = (
    # BadEncoder, DRUPE, DECREE; on STL-10 with the normaliser `stl`.
    Layout("SimCLR, with its head", ("f.f.0.weight",), "cifar stem", 32, "cifar", "f.f.", is_sequence=True),
    Layout("SimCLR, the encoder alone", ("f.0.weight",), "cifar stem", 32, "cifar", "f.", is_sequence=True),
    Layout("CTRL", ("backbone.conv1.weight",), "cifar stem", 32, "none", "backbone."),
    Layout("MoCo", ("encoder_q.conv1.weight",), "imagenet stem", 224, "imagenet", "encoder_q.", dropped="fc"),
    # BadCLIP normalises as CLIP does, the CC3M victims of Detect-CLIP-Backdoor-Samples not at all.
    Layout("CLIP", ("visual.conv1.weight", "token_embedding.weight"), "whole clip", 224, None),
    Layout("CLIP's image tower, wrapped", ("visual.attnpool.c_proj.weight",), "clip tower", 224, "clip", "visual.",
           lacks=("token_embedding.weight",)),
    Layout("ImageNet SimCLR, wrapped", ("visual.fc.weight",), "imagenet stem", 224, "none", "visual.", "fc."),
    # BadEncoder's clean tower is normalised as CLIP is, DECREE's victims as ImageNet.
    Layout("CLIP's image tower", ("attnpool.c_proj.weight",), "clip tower", 224, None),
    Layout("ImageNet SimCLR", ("fc.weight", "layer4.2.bn3.weight"), "imagenet stem", 224, "none", "", "fc."),
    # Networks of supervised learning: the CIFAR ResNets of He et al.; those of four stages that most repositories of
    # attacks and defences have, some of which normalise otherwise, or not at all; VGGs; and the wide ones of NAD's.
    Layout("CIFAR ResNet", ("linear.weight", "layer3.0.conv1.weight"), "option a", 32, "imagenet", "", "linear.",
           lacks=("layer4.0.conv1.weight",)),
    Layout("CIFAR ResNet of four stages", ("linear.weight", "layer4.0.conv1.weight", "bn1.weight"), "cifar stem", 32,
           "cifar", "", "linear."),
    Layout("pre-activation CIFAR ResNet", ("linear.weight", "layer4.0.conv1.weight", "layer1.0.bn1.weight"),
           "pre-activation", 32, "cifar", "", "linear.", lacks=("bn1.weight",)),
    Layout("VGG", ("features.0.weight",), "vgg", 32, None, "", "classifier."),  # 224 px where it pools to 7 x 7
    Layout("Wide ResNet", ("block1.layer.0.conv1.weight", "fc.weight"), "wide", 32, "none", "", "fc."),
)  # fmt: skip

NUM_PARAMETERS: dict[Architecture, int] = {
    ResNet(depth=18): 11_168_832,
    ResNet(depth=34): 21_276_992,
    ResNet(depth=50): 23_500_352,
    ResNet(depth=18, stem="imagenet"): 11_176_512,
    ResNet(depth=34, stem="imagenet"): 21_284_672,
    ResNet(depth=50, stem="imagenet"): 23_508_032,
    ClipResNet(): 38_316_896,
}
"""Parameters of the published networks, without classifier."""


@dataclass(frozen=True)
class Published:
    """A stranger's encoder."""

    layout: str
    model: nn.Module
    described: Described
    classifier: nn.Linear | None
    """The linear layer on top of the embedding, where there was one."""


def read_published(
    path: str | Path,
    architecture: Timm | Layers | None = None,
    image_size: int | None = None,
    normaliser: Normaliser | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    entry: str | None = None,
) -> Published:
    """Read an image encoder out of a published checkpoint, executing nothing in it.

    Args:
        path: the file, tensor-only.
        architecture: for tensors that bear the names of timm's own, or of the layers of a plain network; None finds
            the network by `LAYOUTS`.
        image_size: instead of the layout's.
        normaliser: instead of the layout's.
        mean: instead of the normaliser's.
        std: instead of the normaliser's.
        entry: which state dict of the file, where it has several.

    Raises:
        Mistake: no layout fits, tensors are missing, left over or of another shape, the file would have to be
            unpickled, or its author's normaliser cannot be known.
    """
    path = origin(path).weights("model.safetensors", "pytorch_model.bin")
    state = read_tensors(path, entry)
    found: Architecture
    if architecture is not None:
        if image_size is None:
            raise Mistake(f"set image_size, the side in pixels of the images that {path} was trained on")
        found = architecture
        name = architecture.name if isinstance(architecture, Timm) else "layers"
        with torch.device("meta"):
            own = {n for n in build_encoder(architecture).state_dict() if not n.endswith(".num_batches_tracked")}
        state = unwrapped(state, lambda names: names.keys() >= own, path)
        classifier_name = (
            timm.get_pretrained_cfg_value(architecture.name, "classifier")
            if isinstance(architecture, Timm)
            else architecture.classifier
        )
        classifier_prefix = f"{classifier_name}." if isinstance(classifier_name, str) else None
    else:
        state = unwrapped(state, lambda names: _layout_of(names) is not None, path)
        layout = find_layout(state, path)
        if layout.network == "whole clip":
            raise Mistake(
                f"{path} is a whole CLIP; set `clip` to its architecture, such as RN50 or, where OpenAI's weights "
                "were the beginning, RN50-quickgelu, and the normaliser that its author used"
            )
        state = _taken(state, layout)
        name, found, classifier_prefix = layout.name, _architecture(state, layout, path), layout.classifier
        if isinstance(found, ClipResNet) and image_size not in (None, found.image_size):
            raise Mistake(f"image_size is {image_size}, but {path} is a CLIP tower for {found.image_size} px")
        own_size = found.image_size if isinstance(found, ClipResNet) else layout.image_size
        if isinstance(found, Vgg) and found.grid == 7:
            own_size = 224
        normaliser, image_size = normaliser or layout.normaliser, image_size or own_size
    described = Described(found, image_size, *pixel_statistics(path, name, normaliser, mean, std))
    head_state = {n: t for n, t in state.items() if classifier_prefix and n.startswith(classifier_prefix)}
    model: Any = encoder_of(found, {n: t for n, t in state.items() if n not in head_state}, path)
    if isinstance(found, Layers):
        model.embedding_dim = _width(model, image_size, path)
    num = sum(parameter.numel() for parameter in model.parameters())
    assert num == NUM_PARAMETERS.get(found, num), (found, num)
    logger.info("%s: %s, %s", path, name, described)
    classifier = _classifier(head_state, classifier_prefix or "", model.embedding_dim, path) if head_state else None
    return Published(name, model, described, classifier)


def _width(model: nn.Module, image_size: int, path: Path) -> int:
    """Numbers that a network gives for an image, found by trying."""
    try:
        with torch.inference_mode():
            return model.eval()(torch.zeros(1, 3, image_size, image_size)).shape[1]
    except RuntimeError as error:
        raise Mistake(f"the layers described for {path} do not fit images of {image_size} px: {error}") from None


def _layout_of(names: Mapping[str, Tensor]) -> Layout | None:
    """The first layout of the table that fits."""
    return next((layout for layout in LAYOUTS if layout.fits(names)), None)


def find_layout(state: dict[str, Tensor], path: Path) -> Layout:
    """The first layout of the table that fits."""
    if (layout := _layout_of(state)) is not None:
        return layout
    raise Mistake(
        f"{path} has none of the published layouts ({', '.join(layout.name for layout in LAYOUTS)}); its tensors are "
        f"{sorted(state)[:4]} ... If they bear the names of a network of timm's (torchvision's ResNets among them), "
        "set `architecture`"
    )


def _taken(state: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The encoder's tensors, under our names."""
    taken = {name.removeprefix(layout.prefix): state[name] for name in state if name.startswith(layout.prefix)}
    if layout.dropped:
        taken = {name: tensor for name, tensor in taken.items() if not name.startswith(layout.dropped)}
    if layout.is_sequence:
        taken = {_SEQUENCE.get(name[:2], name[:2]) + name[2:]: tensor for name, tensor in taken.items()}
    if layout.network == "vgg":
        linear = sorted({int(name.split(".")[1]) for name in taken if re.match(r"classifier\.\d{1,3}\.", name)})
        places = {f"classifier.{number}.": f"hidden.{i}." for i, number in enumerate(linear[:-1])}
        places |= {f"classifier.{number}.": "classifier." for number in linear[-1:]}
        for old, new in places.items():
            taken = {new + name[len(old) :] if name.startswith(old) else name: t for name, t in taken.items()}
    if layout.network == "pre-activation":
        return {name.replace(".shortcut.0.", ".convShortcut."): tensor for name, tensor in taken.items()}
    return {name.replace(".shortcut.", ".downsample."): tensor for name, tensor in taken.items()}  # CTRL's word


# Modules by their places; the ReLU, the third, and the pooling, the last, have no tensors.
_SEQUENCE = {"0.": "conv1.", "1.": "bn1.", "3.": "layer1.", "4.": "layer2.", "5.": "layer3.", "6.": "layer4."}


def _architecture(state: dict[str, Tensor], layout: Layout, path: Path) -> Architecture:
    def size(name: str, axis: int = 0) -> int:
        if name not in state or state[name].ndim <= axis:
            raise Mistake(f"{path} looks like {layout.name}, but has no tensor {name} of {axis + 1} dimensions or more")
        return state[name].shape[axis]

    def depth(stage: str) -> int:
        return len({name.split(".")[1] for name in state if name.startswith(f"{stage}.")})

    try:
        if layout.network == "clip tower":
            tokens = size("attnpool.positional_embedding")
            layers = depth("layer1"), depth("layer2"), depth("layer3"), depth("layer4")
            side = round(max(0, tokens - 1) ** 0.5) * 32
            return ClipResNet(
                layers=layers,
                width=size("layer1.0.conv1.weight"),
                embed_dim=size("attnpool.c_proj.weight"),
                image_size=side,
            )
        if layout.network == "option a":
            return CifarResNet(depth=6 * depth("layer3") + 2)
        if layout.network == "wide":
            blocks = {name.split(".")[2] for name in state if name.startswith("block1.layer.")}
            return WideResNet(depth=6 * len(blocks) + 4, widen=size("block1.layer.0.conv1.weight") // 16)
        if layout.network == "vgg":
            return _vgg(state, size)
        if layout.network == "pre-activation":
            return PreActResNet(depth=34 if depth("layer3") == 6 else 18, width=size("conv1.weight"))
        num_layers = 50 if "layer1.0.conv3.weight" in state else 34 if depth("layer3") == 6 else 18
        stem = "cifar" if layout.network == "cifar stem" else "imagenet"
        return ResNet(depth=num_layers, stem=stem, width=size("conv1.weight"))  # type: ignore[arg-type]
    except ValidationError as error:
        raise Mistake(
            f"{path} looks like {layout.name}, but no such network is known:\n{explain(error, ResNet)}"
        ) from None


def _vgg(state: dict[str, Tensor], size: Callable[..., int]) -> Vgg:
    """A VGG's plan, from the places of its convolutions: a max-pool takes one, as do BatchNorm and ReLU."""
    places = sorted(
        int(name.split(".")[1])
        for name, tensor in state.items()
        if re.fullmatch(r"features\.\d{1,3}\.weight", name) and tensor.ndim == 4
    )
    has_norm = "features.1.running_mean" in state
    plan: list[int] = []
    for here, after in itertools.zip_longest(places, places[1:]):
        plan.append(size(f"features.{here}.weight"))
        if after is None or after - here > 2 + has_norm:
            plan.append(0)
    hidden = [size(f"hidden.{i}.weight") for i in range(sum(n.startswith("hidden.") for n in state) // 2)]
    inputs = size("hidden.0.weight" if hidden else "classifier.weight", 1)
    grid = round((inputs / max(1, plan[-2])) ** 0.5) if len(plan) > 1 else 1
    return Vgg(plan=plan, batch_norm=has_norm, bias="features.0.bias" in state, grid=grid, hidden=hidden)  # type: ignore[arg-type]


def pixel_statistics(
    path: Path, layout: str, normaliser: Normaliser | None, mean: Channels | None, std: Channels | None
) -> tuple[Channels, Channels]:
    if normaliser is None and (mean is None or std is None):
        raise Mistake(
            f"{path} ({layout}) was published with more than one way of normalising pixels, and nothing in the file "
            f"says which; set normaliser to one of {', '.join(NORMALISERS)}, or mean and std"
        )
    known = NORMALISERS[normaliser or "none"]
    return mean or known[0], std or known[1]


def _classifier(state: dict[str, Tensor], prefix: str, embedding_dim: int, path: Path) -> nn.Linear:
    weight = state.get(f"{prefix}weight")
    if weight is None or weight.ndim != 2 or not 1 <= len(weight) <= 100_000:
        raise Mistake(f"{path}: {prefix}weight should be a classifier's (classes, {embedding_dim})")
    classifier = nn.Linear(embedding_dim, len(weight))
    load_strictly(classifier, {name.removeprefix(prefix): tensor for name, tensor in state.items()}, path)
    return classifier.requires_grad_(False)
