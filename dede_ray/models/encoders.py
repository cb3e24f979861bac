"""Image-only encoders: what SimCLR trains, what BadEncoder and DRUPE tamper with, and what strangers published.

An architecture is a settings class whose `build()` gives a network with random weights; all of them map normalised
pixels to one embedding per image, taken after pooling, not of length one. Blocks come from timm and open_clip, so that
tensors bear the names of the published checkpoints (published.py reads those).

`save_encoder` writes a folder: tensors, and a description that names architecture, image size and normaliser, without
which the same weights are another encoder.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d, pad, relu

from dede_ray.models.weights import read_export, write_export
from dede_ray.runtime.config import Config, Mistake
from dede_ray.runtime.libraries import open_clip, timm

BasicBlock: Any = timm.models.resnet.BasicBlock
Bottleneck: Any = timm.models.resnet.Bottleneck
downsample_conv = timm.models.resnet.downsample_conv
WEIGHTS_FILE, DESCRIPTION_FILE = "encoder.safetensors", "encoder.json"
NUM_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Blocks of each stage of a ResNet by its depth."""
NARROW = 16
"""Channels of the largest block that oneDNN computes at once (AVX-512; AVX2 has 8)."""

# ------------------------------------------------------------------------------------------- architectures


class ResNet(Config):
    """A residual network without its classifier (He et al., arXiv:1512.03385), in torchvision's layout of names."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50] = 18
    stem: Literal["cifar", "imagenet"] = "cifar"
    """cifar: a 3x3 convolution of stride 1 and no max-pool, for 32 px; imagenet: 7x7 of stride 2 and a max-pool."""
    width: int = Field(64, ge=4, le=256)
    """Channels of the first stage; 64 is the published network, 16 makes one that trains on CPUs."""

    def build(self) -> nn.Module:
        return _ResNet(self)


class CifarResNet(Config):
    """The 6n+2-layer network of He et al. for CIFAR-10: three stages of 16, 32, 64 channels, shortcuts of option A."""

    kind: Literal["cifar_resnet"] = "cifar_resnet"
    depth: int = Field(20, ge=8, le=1202)

    @field_validator("depth")
    @classmethod
    def _is_6n_plus_2(cls, depth: int) -> int:
        if depth % 6 != 2:
            raise ValueError("depth must be 6n + 2: 20, 32, 44, 56, 110 ...")
        return depth

    def build(self) -> nn.Module:
        return _CifarResNet(self.depth)


class WideResNet(Config):
    """A pre-activation WRN-depth-widen (Zagoruyko & Komodakis, arXiv:1605.07146), named as in many repositories."""

    kind: Literal["wide_resnet"] = "wide_resnet"
    depth: int = Field(16, ge=10, le=100)
    widen: int = Field(1, ge=1, le=20)

    @field_validator("depth")
    @classmethod
    def _is_6n_plus_4(cls, depth: int) -> int:
        if depth % 6 != 4:
            raise ValueError("depth must be 6n + 4: 16, 22, 28, 40 ...")
        return depth

    def build(self) -> nn.Module:
        return _WideResNet(self.depth, self.widen)


class PreActResNet(Config):
    """The pre-activation ResNet for CIFAR (He et al., arXiv:1603.05027) as most repositories of attacks have it: four
    stages, and neither normalisation nor ReLU after the last."""

    kind: Literal["preact_resnet"] = "preact_resnet"
    depth: Literal[18, 34] = 18
    width: int = Field(64, ge=4, le=256)
    """Channels of the first stage."""

    def build(self) -> nn.Module:
        return _PreActResNet(self)


class Vgg(Config):
    """A VGG (Simonyan & Zisserman, arXiv:1409.1556) without its last linear layer, in torchvision's layout of names."""

    kind: Literal["vgg"] = "vgg"
    plan: tuple[Annotated[int, Field(ge=0, le=4096)], ...] = Field(min_length=2, max_length=64)
    """Channels of each 3x3 convolution, in order; 0 is a max-pool."""
    batch_norm: bool = True
    """Whether a BatchNorm follows each convolution."""
    bias: bool = True
    """Whether convolutions have one."""
    grid: int = Field(1, ge=1, le=16)
    """Side of the average pooling after the last stage: 7 for ImageNet, 1 for CIFAR."""
    hidden: tuple[Annotated[int, Field(ge=1, le=16_384)], ...] = Field((), max_length=4)
    """Widths of the linear layers before the last: 4096, 4096 for ImageNet."""

    def build(self) -> nn.Module:
        return _Vgg(self)


_LAYER = re.compile(r"(?:(?P<name>[\w.]+)\s*:\s*)?(?P<word>\w+)(?P<numbers>(?:\s+(?:\w+=)?\d{1,6}(?:\.\d{1,6})?)*)\s*")
_WITH_TENSORS = ("Conv2d", "Linear", "BatchNorm1d", "BatchNorm2d")
_WITHOUT = ("ReLU", "LeakyReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d",
            "Flatten", "Dropout")  # fmt: skip


def _as_lines(layers: Any) -> Any:
    """YAML reads `conv1: Conv2d 3 16 5` in a list as a mapping of one key."""
    if not isinstance(layers, list | tuple):
        return layers
    return [": ".join(map(str, *one.items())) if isinstance(one, dict) and len(one) == 1 else one for one in layers]


class Layers(Config):
    """A plain network, layer after layer, in torch.nn's words, up to its embedding."""

    kind: Literal["layers"] = "layers"
    layers: Annotated[tuple[str, ...], BeforeValidator(_as_lines)] = Field(min_length=1, max_length=200)
    """Such as [`conv1: Conv2d 3 16 5 padding=2`, ReLU, MaxPool2d 2, Flatten, `fc1: Linear 4096 120`, ReLU]; a layer
    with weights has the name that its tensors have in the file."""
    classifier: str | None = None
    """Name of the linear layer on top of the embedding, where the file has one, such as fc2."""

    @field_validator("layers")
    @classmethod
    def _are_layers(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        for line in layers:
            match = _LAYER.fullmatch(line)
            if match is None or match["word"] not in _WITH_TENSORS + _WITHOUT:
                known = ", ".join(_WITH_TENSORS + _WITHOUT)
                raise ValueError(f"{line!r} is no layer; expected such as `conv1: Conv2d 3 16 5`, of {known}")
            if (match["name"] is None) == (match["word"] in _WITH_TENSORS):
                raise ValueError(f"{line!r}: {', '.join(_WITH_TENSORS)} have a name before them, others have none")
        return layers

    def build(self) -> nn.Module:
        return _Layers(self)


class ClipResNet(Config):
    """The image tower of a CLIP ResNet, with its attention pooling, without the text tower beside it."""

    kind: Literal["clip_resnet"] = "clip_resnet"
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = Field(64, ge=8, le=256, multiple_of=2)
    embed_dim: int = Field(1024, ge=1, le=8192)
    image_size: int = Field(224, ge=32, le=1024, multiple_of=32)

    @field_validator("layers")
    @classmethod
    def _has_blocks(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if not all(1 <= number <= 100 for number in layers):
            raise ValueError("each stage has 1 to 100 blocks")
        return layers

    def build(self) -> nn.Module:
        heads = max(1, self.width * 32 // 64)  # as open_clip and OpenAI count them
        tower: Any = open_clip.modified_resnet.ModifiedResNet(
            list(self.layers), self.embed_dim, heads, self.image_size, self.width
        )
        tower.embedding_dim = self.embed_dim
        return tower


class Timm(Config):
    """Any image network of timm's without its classifier."""

    kind: Literal["timm"] = "timm"
    name: str
    """As in timm.list_models(); no hub address, no weights are downloaded."""
    image_size: int | None = Field(None, ge=8, le=1024)
    """For networks that are built for one size, such as ViTs; None leaves the network's own."""
    pad_type: Literal["same"] | None = None
    """`same` is TensorFlow's padding, for weights that come from there."""

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in timm.list_models():
            raise ValueError("timm knows no such network; see timm.list_models()")
        return name

    def build(self) -> nn.Module:
        options = {"img_size": self.image_size, "pad_type": self.pad_type}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        try:
            model: Any = timm.create_model(self.name, pretrained=False, num_classes=0, **given)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise Mistake(f"timm cannot build {self.name} with {given or 'no options'}: {error}") from None
        model.embedding_dim = int(getattr(model, "head_hidden_size", None) or model.num_features)
        return model


Architecture = Annotated[
    ResNet | CifarResNet | WideResNet | PreActResNet | Vgg | Layers | ClipResNet | Timm, Field(discriminator="kind")
]


def build_encoder(architecture: Architecture) -> nn.Module:
    """Build a network with random weights from torch's generator.

    Returns:
        A module with the attribute `embedding_dim`; forward maps normalised float images (B, 3, S, S) to embeddings
        (B, E), pooled, not of length one.
    """
    return architecture.build()


class _ResNet(nn.Module):
    """A ResNet of timm's blocks, of any width."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, shape: ResNet):
        super().__init__()
        block: Any = Bottleneck if shape.depth == 50 else BasicBlock
        self.embedding_dim = 8 * shape.width * block.expansion
        if shape.stem == "cifar":
            self.conv1 = nn.Conv2d(3, shape.width, 3, stride=1, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, shape.width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(shape.width)
        channels = shape.width
        for stage, num_blocks in enumerate(NUM_BLOCKS[shape.depth]):
            blocks = []
            for i in range(num_blocks):
                planes, stride = shape.width * 2**stage, 2 if stage and not i else 1
                out = planes * block.expansion
                changes = stride != 1 or channels != out
                shortcut: Any = downsample_conv(channels, out, kernel_size=1, stride=stride) if changes else None
                if shortcut is not None and stride > 1 and channels < NARROW:
                    shortcut[0] = _PickThenMix(channels, out, 1, stride, bias=False)
                blocks.append(block(channels, planes, stride, shortcut))
                channels = out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        _initialise(self)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = self.maxpool(relu(self.bn1(self.conv1(image_BCHW))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x_BCHW = stage(x_BCHW)
        return x_BCHW.mean(dim=(2, 3))


class _PickThenMix(nn.Conv2d):
    """A 1x1 convolution that takes every `stride`th pixel first and mixes channels then: the same function.

    oneDNN's weight gradient of a strided 1x1 convolution writes past its buffer where the pixels are stored channels
    last and the channels are fewer than one block: wrong gradients, or a process that dies (oneDNN issue 6035).
    """

    weight: Tensor
    stride: tuple[int, int]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        step = self.stride[0]
        return conv2d(x_BCHW[:, :, ::step, ::step], self.weight)


class _CifarResNet(nn.Module):
    embedding_dim = 64
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(self, depth: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage in (1, 2, 3):
            blocks = []
            for i in range((depth - 2) // 6):
                planes, stride = 2 ** (3 + stage), 2 if stage > 1 and not i else 1
                blocks.append(BasicBlock(channels, planes, stride, _OptionA() if stride > 1 else None))
                channels = planes
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        _initialise(self)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = relu(self.bn1(self.conv1(image_BCHW)))
        return self.layer3(self.layer2(self.layer1(x_BCHW))).mean(dim=(2, 3))


class _OptionA(nn.Module):
    """The shortcut without parameters: every second pixel, and new channels of zeros on either side."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        half = x_BCHW.shape[1] // 2
        return pad(x_BCHW[:, :, ::2, ::2], (0, 0, 0, 0, half, half))


class _WideResNet(nn.Module):
    block1: nn.ModuleDict
    block2: nn.ModuleDict
    block3: nn.ModuleDict

    def __init__(self, depth: int, widen: int):
        super().__init__()
        self.embedding_dim = 64 * widen
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        channels = 16
        for stage in (1, 2, 3):
            planes, blocks = widen * 2 ** (3 + stage), []
            for i in range((depth - 4) // 6):
                blocks.append(_PreActivation(channels, planes, 2 if stage > 1 and not i else 1))
                channels = planes
            setattr(self, f"block{stage}", nn.ModuleDict({"layer": nn.Sequential(*blocks)}))
        self.bn1 = nn.BatchNorm2d(channels)
        _initialise(self)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv1(image_BCHW)
        for block in (self.block1, self.block2, self.block3):
            x_BCHW = block["layer"](x_BCHW)
        return relu(self.bn1(x_BCHW)).mean(dim=(2, 3))


class _PreActivation(nn.Module):
    def __init__(self, channels: int, planes: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(planes)
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(channels, planes, 1, stride, bias=False) if channels != planes else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = relu(self.bn1(x_BCHW))
        shortcut_BCHW = x_BCHW if self.convShortcut is None else self.convShortcut(active_BCHW)
        return shortcut_BCHW + self.conv2(relu(self.bn2(self.conv1(active_BCHW))))


class _PreActResNet(nn.Module):
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, shape: PreActResNet):
        super().__init__()
        self.embedding_dim = 8 * shape.width
        self.conv1 = nn.Conv2d(3, shape.width, 3, padding=1, bias=False)
        channels = shape.width
        for stage, num_blocks in enumerate(NUM_BLOCKS[shape.depth]):
            planes, blocks = shape.width * 2**stage, []
            for i in range(num_blocks):
                blocks.append(_PreActivation(channels, planes, 2 if stage and not i else 1))
                channels = planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        _initialise(self)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv1(image_BCHW)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x_BCHW = stage(x_BCHW)
        return x_BCHW.mean(dim=(2, 3))


class _Vgg(nn.Module):
    def __init__(self, shape: Vgg):
        super().__init__()
        channels, modules = 3, list[nn.Module]()
        for planes in shape.plan:
            if planes == 0:
                modules.append(nn.MaxPool2d(2))
                continue
            modules.append(nn.Conv2d(channels, planes, 3, padding=1, bias=shape.bias))
            modules += [nn.BatchNorm2d(planes)] * shape.batch_norm + [nn.ReLU()]
            channels = planes
        self.features, self.grid = nn.Sequential(*modules), shape.grid
        widths = [channels * shape.grid**2, *shape.hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.embedding_dim = widths[-1]
        _initialise(self)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BE = adaptive_avg_pool2d(self.features(image_BCHW), self.grid).flatten(1)
        for linear in self.hidden:
            x_BE = relu(linear(x_BE))
        return x_BE


class _Layers(nn.Module):
    def __init__(self, shape: Layers):
        super().__init__()
        self._order: list[nn.Module] = []  # not registered twice: what has a name is found by it
        self.embedding_dim = 0
        for line in shape.layers:
            match = _LAYER.fullmatch(line)
            assert match is not None, line
            given = [word.rpartition("=") for word in match["numbers"].split()]
            numbers = [(key, float(value) if "." in value else int(value)) for key, _, value in given]
            arguments = [value for key, value in numbers if not key]
            try:
                layer = getattr(nn, match["word"])(*arguments, **{key: value for key, value in numbers if key})
            except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
                raise Mistake(f"torch cannot make the layer {line!r}: {error}") from None
            self._order += [layer]
            if match["name"]:
                *parents, last = match["name"].split(".")
                place: nn.Module = self
                for parent in parents:
                    if not hasattr(place, parent):
                        place.add_module(parent, nn.Module())
                    place = getattr(place, parent)
                place.add_module(last, layer)
            self.embedding_dim = getattr(layer, "out_features", getattr(layer, "out_channels", self.embedding_dim))

    def train(self, mode: bool = True) -> _Layers:
        for layer in self._order:  # those without a name, too
            layer.train(mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._order:
            x = layer(x)
        return x.flatten(1)


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# --------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Described:
    """An encoder's architecture, input size and normaliser, which its weights do not contain."""

    architecture: Architecture
    image_size: int
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """The normaliser's, per RGB channel of pixels in [0, 1]; 0 and 1 are no normaliser. Each victim has its own."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)


class _Description(Config):
    """encoder.json, as a stranger may have written it."""

    architecture: Architecture
    image_size: int = Field(ge=8, le=1024)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @field_validator("mean", "std")
    @classmethod
    def _is_finite(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not all(math.isfinite(value) for value in values):
            raise ValueError("must be finite numbers")
        return values

    @field_validator("std")
    @classmethod
    def _is_positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not all(value > 0 for value in values):
            raise ValueError("must be above 0")
        return values


def save_encoder(folder: str | Path, model: nn.Module, described: Described) -> None:
    """Write `encoder.safetensors` and `encoder.json`: tensors and settings, nothing executable."""
    state = model.state_dict()
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    description = _Description(
        architecture=described.architecture, image_size=described.image_size, mean=described.mean, std=described.std
    )
    write_export(folder, WEIGHTS_FILE, state, DESCRIPTION_FILE, description.model_dump(mode="json"))


def load_encoder(folder: str | Path) -> tuple[nn.Module, Described]:
    """Load what `save_encoder` wrote; the model's parameters can be trained.

    Raises:
        Mistake: nothing there, damaged, absurd settings, or weights of another architecture.
    """
    read, state = read_export(folder, WEIGHTS_FILE, DESCRIPTION_FILE, _Description, "encoder")
    described = Described(read.architecture, read.image_size, read.mean, read.std)
    return encoder_of(described.architecture, state, Path(folder) / WEIGHTS_FILE), described


def encoder_of(architecture: Architecture, state: dict[str, Tensor], path: Path) -> nn.Module:
    """Build the network that these weights, read from `path`, belong to.

    Raises:
        Mistake: they belong to another one.
    """
    with torch.device("meta"):  # a small file that asks for a giant is refused before the giant is built
        _check_fit(build_encoder(architecture), state, path)
    model = build_encoder(architecture)
    load_strictly(model, state, path)
    return model


def load_strictly(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put every tensor of a state dict in its place; the counters of BatchNorm may be absent.

    Raises:
        Mistake: a tensor is missing, unexpected or of another shape.
    """
    _check_fit(model, state, path)
    model.load_state_dict({**_counters(model), **state})


def _check_fit(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    state = {**_counters(model), **state}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if missing or unexpected or wrong:
        num_shared = len(own.keys() & state.keys() - _counters(model).keys())
        if missing or unexpected:
            what = f"the weights of another architecture ({num_shared} of this one's {len(own)} names occur)"
        else:
            what = "the weights of this architecture in another size"
        raise Mistake(
            f"{path} does not fit the encoder, {type(model).__name__}; it holds {what}: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}; "
            "name the architecture that it was trained with"
        )


def _counters(model: nn.Module) -> dict[str, Tensor]:
    # Nothing is computed from the number of batches that a BatchNorm saw, and old files have none.
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".num_batches_tracked")}
