"""Networks of other libraries: transformers, timm, ONNX, and the user's own Python function.

Each reader gives a `Foreign`: a torch module that maps normalised pixels to embeddings, and what completes it. What a
stranger's folder says is data: configs are stripped of everything that could name code or files elsewhere, weights are
read as tensors, ONNX is computed by onnxruntime without custom operators. Only `read_python` runs code, its user's.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dede_ray.data.first_bytes import NUM_BYTES, what_is
from dede_ray.models.encoders import load_strictly
from dede_ray.models.weights import (
    Budget,
    Origin,
    origin,
    read_config,
    read_tensors,
    refuse_not_finite,
    unlike,
    unwrapped,
)
from dede_ray.runtime.config import Mistake, to_install
from dede_ray.runtime.libraries import timm

logger = logging.getLogger(__name__)

Statistics = tuple[Sequence[float], Sequence[float]]
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Foreign:
    """A network, and what completes it."""

    model: nn.Module
    """Normalised float images (B, 3, S, S) -> embeddings (B, E); with text also `encode_image` and `encode_text`."""
    image_size: int
    width: int
    """E."""
    statistics: Statistics
    """Mean and standard deviation per RGB channel."""
    identity: dict[str, Any]
    """What its embeddings depend on beside tensors and transform."""
    tokenize: Callable[[list[str]], Tensor] | None = None
    """Captions -> tokens (N, T), where it knows text."""
    classifier: nn.Linear | None = None
    """Its own linear layer on top of the embedding, where it has one."""


def width_of(model: nn.Module, image_size: int, what: str) -> int:
    """Numbers that a network gives for an image, found by trying it on one.

    Raises:
        Mistake: it cannot be computed, or gives anything but rows of numbers.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with torch.inference_mode():
            given = model.eval()(torch.zeros(2, 3, image_size, image_size, device=device))
    except Mistake:
        raise
    except Exception as error:  # whatever a stranger's network meets
        raise Mistake(f"{what} cannot embed images of {image_size} px: {type(error).__name__}: {error}") from None
    if not isinstance(given, Tensor) or given.ndim != 2 or len(given) != 2 or not given.is_floating_point():
        found = f"a tensor {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise Mistake(f"{what} should give embeddings (B, E) for images (B, 3, S, S); for 2 it gives {found}")
    return given.shape[1]


def _config(place: Origin, name: str = "config.json") -> dict[str, Any]:
    try:
        return read_config(place.file(name), "config of a network")
    except FileNotFoundError as error:
        raise Mistake(f"{place.name}: {error}; expected a folder or repository with {name} and weights") from None


def _head(state: dict[str, Tensor], prefix: str, width: int) -> nn.Linear | None:
    """The linear classifier among a checkpoint's tensors; None where there is none on the embedding itself."""
    weight = state.get(f"{prefix}.weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] != width or not 1 <= len(weight) <= 100_000:
        return None
    bias = state.get(f"{prefix}.bias")
    linear = nn.Linear(width, len(weight), bias=bias is not None)
    linear.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})})
    return linear.requires_grad_(False)


# ------------------------------------------------------------------------------------------- transformers

WITH_TEXT = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}
IMAGE_ONLY = {
    "clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel", "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel", "dinov3_vit": "DINOv3ViTModel",
    "dinov3_convnext": "DINOv3ConvNextModel", "vit": "ViTModel", "vit_msn": "ViTMSNModel", "convnext": "ConvNextModel",
    "convnextv2": "ConvNextV2Model", "swin": "SwinModel", "swinv2": "Swinv2Model", "resnet": "ResNetModel",
}  # fmt: skip
_ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext", "convnext", "convnextv2", "resnet")
"""Networks that take images of another size than their config's as they are."""
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "merges.txt", "tokenizer_config.json",
                    "special_tokens_map.json", "added_tokens.json")  # fmt: skip
_CODE = {"auto_map", "custom_pipelines", "quantization_config", "fusion_config", "experts_implementation"}
_UNIMPORTANT = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def read_transformers(
    path: str, entry: str | None, image_size: int | None, mean: Any = None, std: Any = None
) -> Foreign:
    """Read a folder as `save_pretrained` writes it, or such a repository: config.json and weights.

    The embedding is what the library itself gives for an image: the projected one of a CLIP, else the pooler's, else
    the class token.

    Raises:
        Mistake: no such folder, a network that is not known here, weights that do not fit, or transformers is missing.
    """
    try:
        import transformers
    except ImportError:
        raise Mistake(f"{path} needs the package transformers; {to_install('transformers')}") from None
    place = origin(path)
    config = _harmless(_config(place))
    kind = config.get("model_type")
    known = {**WITH_TEXT, **IMAGE_ONLY}
    if kind not in known:
        raise Mistake(f"{path} is a network of the kind {kind!r}; known of transformers' are {', '.join(known)}")
    weights = place.weights(*WEIGHTS)
    state = read_tensors(weights, entry)
    name = known[kind]
    if kind == "clip_vision_model" and "visual_projection.weight" in state:
        name = "CLIPVisionModelWithProjection"
    network = _pretrained(transformers, name, kind, config, state, weights)
    vision = network.config.vision_config if kind in WITH_TEXT else network.config
    statistics, size = _preprocessing(place, mean, std)
    own = _own_size(vision)
    if image_size is None:
        image_size = (size or own) if kind in _ANY_SIZE else own
    if not image_size:
        raise Mistake(f"set image_size, the side in pixels of the images that {path} takes")
    patch_size = vision.patch_size if kind.startswith("siglip2") else None
    resizes = image_size != own and patch_size is None and kind not in _ANY_SIZE
    model = _Transformers(network, patch_size, resizes).eval()
    width = width_of(model, image_size, f"{path} ({name})")
    identity = {"library": "transformers", "class": name, "config": _compared(config)}
    tokenize = _tokenizer(transformers, place, network.config) if kind in WITH_TEXT else None
    classifier = _head(state, "classifier", width)
    return Foreign(model, image_size, width, statistics, identity, tokenize, classifier)


def _harmless(config: Any) -> Any:
    """A config without what could name code, kernels or files elsewhere."""
    if isinstance(config, list):
        return [_harmless(one) for one in config]
    if not isinstance(config, dict):
        return config
    left_out = {key for key in config if key in _CODE or key.startswith("_") or "attn_impl" in key}
    for key, value in config.items():
        # Some configs make a list of as many names before any tensor is made.
        most = 1000 if "layer" in key or "depth" in key else 10**7
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > most:
                raise Mistake(f"its config says {key}: {number:,}, more than any network has")
    if "quantization_config" in left_out and config["quantization_config"]:
        raise Mistake("its weights are quantised, which is not read; name the network's unquantised weights")
    return {key: _harmless(value) for key, value in config.items() if key not in left_out}


def _compared(config: Any) -> Any:
    """A config without what changes nothing, such as the version that wrote it."""
    if not isinstance(config, dict):
        return config
    return {key: _compared(value) for key, value in config.items() if key not in _UNIMPORTANT}


def _pretrained(
    transformers: Any, name: str, kind: str, config: dict[str, Any], state: dict[str, Tensor], weights: Path
) -> Any:
    """Build the network and load its weights by the library, which knows the names of its older versions; strictly."""
    kind_of_network: Any = getattr(transformers, name, None)
    if kind_of_network is None:
        raise Mistake(f"this version of transformers has no {name}; {to_install('transformers')}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"add_pooling_layer": False} if kind == "vit" else {}
    try:
        settings = transformers.CONFIG_MAPPING[kind].from_dict(config)
        with torch.random.fork_rng(devices=[]):
            with Budget.for_weights(weights):
                kind_of_network(settings, **options)
            network, found = kind_of_network.from_pretrained(
                None, config=settings, state_dict=dict(state), dtype=torch.float32, output_loading_info=True,
                attn_implementation="sdpa" if kind_of_network._supports_sdpa else "eager", **options,
            )  # fmt: skip
    except Exception as error:  # whatever a config of the wrong kinds of values makes it meet
        raise Mistake(f"{weights.parent}: transformers cannot build {name} from it: {error}") from None
    beside = ("position_ids", "num_batches_tracked")
    heads = ("classifier.", "head.", "pooler.") if kind in IMAGE_ONLY else ()
    missing = sorted(one for one in found["missing_keys"] if not one.endswith(beside))
    unexpected = sorted(one for one in found["unexpected_keys"] if not one.endswith(beside) | one.startswith(heads))
    wrong = sorted(str(one) for one in found.get("mismatched_keys", ()))
    if missing or unexpected or wrong:
        raise Mistake(
            f"{weights} does not fit {name} of the config.json beside it: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    refuse_not_finite(network, weights)
    return network


def _preprocessing(place: Origin, mean: Any, std: Any) -> tuple[Statistics, int | None]:
    """What the image processor beside the weights says: how to normalise, and the side of the images, in pixels."""
    file = place.find("preprocessor_config.json", "processor_config.json")
    said = read_config(file, "config of an image processor") if file else {}
    said = said.get("image_processor", said)
    if not isinstance(said, dict) or (not said.get("image_mean") and said.get("do_normalize") is not False):
        said = {}
    size = said.get("crop_size") if said.get("do_center_crop") and said.get("crop_size") else said.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if mean is None or std is None:
        scale = said.get("rescale_factor", 1 / 255)
        if not said or not isinstance(scale, float) or abs(255 * scale - 1) > 1e-6:
            raise Mistake(
                f"{place.name}: no preprocessor_config.json says how its pixels in [0, 1] are normalised; "
                "set mean and std"
            )
        if said.get("do_normalize") is False:
            said = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        mean, std = mean or said["image_mean"], std or said["image_std"]
    return _statistics(mean, std, place.name), size if isinstance(size, int) and 8 <= size <= 1024 else None


def _statistics(mean: Any, std: Any, what: str) -> Statistics:
    for values in (mean, std):
        are_numbers = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
        if not are_numbers or len(values) != 3 or not all(abs(value) < 1e6 for value in values):
            raise Mistake(f"{what}: mean {mean!r} and std {std!r} should be three numbers each; set them")
    if min(std) <= 0:
        raise Mistake(f"{what}: std {std!r} should be above 0; set it")
    return [float(value) for value in mean], [float(value) for value in std]


def _own_size(config: Any) -> int | None:
    """The side of the images that a network was built for, in pixels."""
    size = getattr(config, "image_size", None)
    if size is None and getattr(config, "num_patches", None):  # SigLIP 2
        return int(config.num_patches**0.5) * int(config.patch_size)
    size = size[0] if isinstance(size, list | tuple) and size else size
    return size if isinstance(size, int) else None


class _Transformers(nn.Module):
    """A network of transformers' as ours are: pixels in, embeddings out."""

    def __init__(self, network: Any, patch_size: int | None, resizes: bool):
        super().__init__()
        self.network, self.patch_size = network, patch_size
        self.options = {"interpolate_pos_encoding": True} if resizes else {}

    def forward(self, image_BCHW: Tensor) -> Tensor:
        given: dict[str, Any] = {"pixel_values": image_BCHW, **self.options}
        if self.patch_size is not None:
            given = _in_patches(image_BCHW, self.patch_size)
        look = getattr(self.network, "get_image_features", self.network)
        return _pooled(look(**given))

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return self(image_BCHW)

    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        return _pooled(self.network.get_text_features(input_ids=tokens_BT))


def _pooled(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("image_embeds", "pooler_output"):
        if (tensor := getattr(output, name, None)) is not None:
            return tensor.flatten(1)
    return output.last_hidden_state[:, 0]


def _in_patches(image_BCHW: Tensor, side: int) -> dict[str, Tensor]:
    """SigLIP 2's input: rows of patches, pixel by pixel, and how many there are down and across."""
    B, C, height, width = image_BCHW.shape
    down, across = height // side, width // side
    patches = image_BCHW.reshape(B, C, down, side, across, side).permute(0, 2, 4, 3, 5, 1).reshape(B, down * across, -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=patches.device)
    shapes = torch.tensor([[down, across]] * B, device=patches.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _tokenizer(transformers: Any, place: Origin, config: Any) -> Callable[[list[str]], Tensor] | None:
    """The tokenizer whose files lie beside the weights; None where there are none."""
    files = [found for name in _TOKENIZER_FILES if (found := place.find(name))]
    if not files or files[0].name not in _TOKENIZER_FILES[:3]:
        logger.info("%s: no tokenizer is beside the weights, so it embeds images only", place.name)
        return None
    length = int(config.text_config.max_position_embeddings)
    try:
        own = transformers.AutoTokenizer.from_pretrained(
            files[0].parent, local_files_only=True, trust_remote_code=False
        )
        assert own.pad_token_id is not None, "it has no padding token"
    except Exception as error:  # whatever the files make it meet
        raise Mistake(f"{place.name}: its tokenizer cannot be read: {error}") from None

    def tokenize(captions: list[str]) -> Tensor:
        return own(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")["input_ids"]

    return tokenize


# --------------------------------------------------------------------------------------------------- timm

LARGEST_OPTION = 2**16
"""Of whole numbers in a config of timm's, such as widths; larger ones keep it busy before any tensor is made."""
_LIBRARYS_OWN = {*inspect.signature(timm.create_model).parameters, "features_only", "out_indices", "pretrained_strict",
                 "pretrained_filter_fn", "pretrained_custom_load", "model_cfg", "feature_cfg", "kwargs_filter",
                 "num_classes"}  # fmt: skip


def read_timm(
    path: str, name: str | None, entry: str | None, image_size: int | None, mean: Any = None, std: Any = None
) -> Foreign:
    """Read a network of timm's: a folder or repository with config.json and weights, or a file and its name.

    Raises:
        Mistake: no such name, options that are not for a config to choose, or weights that do not fit.
    """
    place = origin(path)
    config = _config(place) if place.is_folder and (name is None or place.find("config.json")) else {}
    name = name or config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name.partition(".")[0]):
        missing = "set name, such as vit_small_patch16_224" if name is None else f"timm knows no network {name!r}"
        raise Mistake(f"{path}: {missing}; see timm.list_models()")
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    said = {**(known.to_dict() if known else {}), **(config.get("pretrained_cfg") or config)}
    options = config.get("model_args") or {}
    if not isinstance(options, dict) or (refused := options.keys() & _LIBRARYS_OWN) or not _are_plain(options.values()):
        raise Mistake(f"{path}: model_args {sorted(refused) if isinstance(options, dict) else options!r} cannot be set")
    size = said.get("input_size")
    image_size = image_size or (size[1] if isinstance(size, list | tuple) and len(size) == 3 else None)
    if not isinstance(image_size, int) or not 8 <= image_size <= 1024:
        raise Mistake(f"{path}: set image_size, the side in pixels of the images that it takes")
    if said.get("fixed_input_size"):
        options = {**options, "img_size": image_size}
    statistics = _statistics(mean or said.get("mean"), std or said.get("std"), path)
    weights = place.weights(*WEIGHTS)
    model = _timm_network(name, options, weights)
    state = unwrapped(read_tensors(weights, entry), lambda names: _names(model) <= names.keys(), weights)
    heads = said.get("classifier") or ()
    heads = [heads] if isinstance(heads, str) else list(heads)
    head_state = {n: state.pop(n) for n in [*state] if any(n.startswith(f"{head}.") for head in heads)}
    load_strictly(model, _in_timms_names(model, state, weights), weights)
    refuse_not_finite(model, weights)
    width = width_of(model, image_size, f"{path} ({name})")
    classifier = _head(head_state, heads[0], width) if len(heads) == 1 else None
    identity = {"library": "timm", "name": name.partition(".")[0], "options": options}
    return Foreign(model, image_size, width, statistics, identity, None, classifier)


def _are_plain(values: Any) -> bool:
    return all(
        isinstance(value, str | float | bool | None)
        or (isinstance(value, int) and abs(value) <= LARGEST_OPTION)
        or (isinstance(value, list) and _are_plain(value))
        for value in values
    )


def _timm_network(name: str, options: dict[str, Any], weights: Path) -> nn.Module:
    try:
        with Budget.for_weights(weights), torch.random.fork_rng(devices=[]):
            return timm.create_model(name.partition(".")[0], pretrained=False, num_classes=0, **options)
    except Exception as error:  # whatever options of the wrong kinds make it meet
        raise Mistake(f"{weights}: timm cannot build {name} with {options or 'no options'}: {error}") from None


def _names(model: nn.Module) -> set[str]:
    return {name for name in model.state_dict() if not name.endswith(".num_batches_tracked")}


def _in_timms_names(model: nn.Module, state: dict[str, Tensor], weights: Path) -> dict[str, Tensor]:
    """The tensors as they are where they fit, or else as timm adapts those of original repositories and other sizes."""
    own = model.state_dict()
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None or not any(not name.endswith(".num_batches_tracked") for name in unlike(state, own)):
        return state
    try:
        adapted = adapt({name: t.float() if t.is_floating_point() else t for name, t in state.items()}, model)
    except Exception as error:  # it is written for the checkpoints of one paper
        logger.info("%s: timm's own adaptation does not fit: %r", weights, error)
        return state
    return adapted if isinstance(adapted, dict) else state


# --------------------------------------------------------------------------------------------------- ONNX


def read_onnx(
    path: str, output: str | None, pool: str | None, image_size: int | None, statistics: Statistics
) -> Foreign:
    """Read an ONNX file, which onnxruntime computes: built-in operators only, so that no code of its author's runs.

    Args:
        path: the file; data outside of it only from the same folder.
        output: which of its outputs, where there are several.
        pool: `first` or `mean` of the tokens, where the output is (B, tokens, E).
        image_size: side of the images in pixels, where the file leaves it open.
        statistics: mean and standard deviation per RGB channel that it expects.

    Raises:
        Mistake: damaged, custom operators, data elsewhere, no network of images, or onnxruntime is missing.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise Mistake(f"{path} needs the packages onnx and onnxruntime; {to_install('onnx')}") from None
    file = origin(path).weights("model.onnx", "onnx/model.onnx")
    try:
        content = onnx.load(file, load_external_data=False)
        beside = sorted(set(_external(content)))
    except Exception as error:  # protobuf's own errors
        with file.open("rb") as stream:
            what = what_is(stream.read(NUM_BYTES))
        raise Mistake(f"{file} is no readable ONNX file{f', but {what}' if what else f': {error!r}'}") from None
    digest = hashlib.sha256(file.read_bytes())
    for location in beside:
        data = file.parent / location
        is_inside = not Path(location).is_absolute() and ".." not in Path(location).parts
        if not is_inside or not data.is_file() or not _stays_inside(data, file.parent):
            raise Mistake(f"{file} wants data from {location!r}; expected a file in the folder of the ONNX file")
        with data.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    available = onnxruntime.get_available_providers()
    providers = [one for one in ("CUDAExecutionProvider", "CPUExecutionProvider") if one in available]
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # its own kinds of errors, one for each
        raise Mistake(f"onnxruntime does not compute {file}: {error}") from None
    model = _Onnx(session, file, output, pool, digest.digest())
    if image_size is not None and model.image_size not in (None, image_size):
        raise Mistake(f"image_size is {image_size}, but {file} takes images of {model.image_size} px")
    image_size = model.image_size or image_size
    if image_size is None:
        raise Mistake(f"{file} takes images of any size; set image_size, the side in pixels of those it was trained on")
    width = width_of(model, image_size, str(file))
    return Foreign(model, image_size, width, statistics, {"library": "onnx", "output": model.output, "pool": pool})


def _stays_inside(data: Path, folder: Path) -> bool:
    """Whether no link leads a file out of its folder; in the hub's cache, which is made of links, out of its blobs."""
    real = data.resolve()
    commits = [one for one in (folder, *folder.parents) if one.parent.name == "snapshots"]
    places = [folder.resolve(), *(one.parents[1].resolve() / "blobs" for one in commits)]
    return any(real.is_relative_to(place) for place in places)


def _external(message: Any) -> Iterator[str]:
    """Places of all tensors of an ONNX message that are not in the file, in whatever graph or attribute."""
    if type(message).__name__ == "TensorProto":
        if message.data_location == 1:  # EXTERNAL
            yield from (entry.value for entry in message.external_data if entry.key == "location")
        return
    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for inner in value if not hasattr(value, "ListFields") else [value]:
                if hasattr(inner, "ListFields"):
                    yield from _external(inner)


class _Onnx(nn.Module):
    """An ONNX file as a torch module. Its only tensor is the file's SHA-256, by which it is known."""

    has_gradient = False
    sha256: Tensor

    def __init__(self, session: Any, file: Path, output: str | None, pool: str | None, digest: bytes):
        super().__init__()
        self.register_buffer("sha256", torch.frombuffer(bytearray(digest), dtype=torch.uint8).clone())
        self.session, self.file, self.pool = session, file, pool
        inputs, outputs = session.get_inputs(), session.get_outputs()
        listed = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        shape = inputs[0].shape if len(inputs) == 1 else []
        self.is_channels_last = len(shape) == 4 and shape[1] != 3 and shape[3] == 3
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
        if len(shape) != 4 or (shape[1] != 3 and not self.is_channels_last and isinstance(shape[1], int)):
            raise Mistake(f"{file} should take images (B, 3, S, S) and nothing else; it takes {listed}")
        if inputs[0].type not in kinds:
            raise Mistake(f"{file} should take floats, as normalised pixels are; it takes {listed}")
        self.input, self.dtype = inputs[0].name, kinds[inputs[0].type]
        sides = shape[1:3] if self.is_channels_last else shape[2:]
        fixed = {side for side in sides if isinstance(side, int)}
        if len(fixed) > 1:
            raise Mistake(f"{file} takes images of {sides} px; only square ones can be embedded")
        self.image_size: int | None = min(fixed, default=None)
        self.batch: int | None = shape[0] if isinstance(shape[0], int) else None
        names = [one.name for one in outputs]
        if output not in names and (output is not None or len(names) != 1):
            shapes = ", ".join(f"{one.name} {one.shape}" for one in outputs[:10])
            raise Mistake(f"{file} has {len(names)} outputs, {shapes}; set output to the one that is the embedding")
        self.output: str = output or names[0]

    def forward(self, image_BCHW: Tensor) -> Tensor:
        image = image_BCHW.permute(0, 2, 3, 1) if self.is_channels_last else image_BCHW
        images = image.detach().cpu().numpy().astype(self.dtype)
        num, parts = len(images), []
        for start in range(0, num, self.batch or max(1, num)):
            part = images[start : start + (self.batch or num)]
            lacking = (self.batch or len(part)) - len(part)
            part = np.concatenate([part, np.zeros((lacking, *part.shape[1:]), self.dtype)]) if lacking else part
            try:
                given = self.session.run([self.output], {self.input: np.ascontiguousarray(part)})[0]
            except Exception as error:
                raise Mistake(f"{self.file} cannot be computed for images {part.shape}: {error}") from None
            parts.append(given)
        return self._pooled(torch.from_numpy(np.concatenate(parts)[:num])).to(image_BCHW.device, torch.float32)

    def _pooled(self, given: Tensor) -> Tensor:
        if given.ndim == 4:  # a map of features: (B, E, H, W)
            return given.mean(dim=(2, 3))
        if given.ndim == 3 and self.pool is None:
            raise Mistake(
                f"{self.file}: output {self.output} is {tuple(given.shape)}, an embedding for each token; set pool to "
                "first (the class token) or mean"
            )
        return given if given.ndim != 3 else given[:, 0] if self.pool == "first" else given.mean(dim=1)


# ------------------------------------------------------------------------------------------------- Python


def on_cluster() -> bool:
    """Whether other machines work for this process, or may come to."""
    if os.environ.get("RAY_ADDRESS"):
        return True
    ray: Any = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and sum(node["Alive"] for node in ray.nodes()) > 1)


def read_python(path: str, folder: str, trust: bool, image_size: int, statistics: Statistics) -> Foreign:
    """Call the user's function, which gives a torch.nn.Module. This runs their code.

    Args:
        path: `module:function`; the function takes no arguments.
        folder: searched for the module first.
        trust: also where other machines work for the job.

    Raises:
        Mistake: a cluster without `trust`, no such function, or it gives no network of images.
    """
    refuse_untrusted(path, trust)
    module_name, colon, name = path.partition(":")
    if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise Mistake(f"{path!r} names no function; expected module:function, such as my_network:build")
    logger.warning("%s: this runs the code of %s, found from %s", path, module_name, folder)
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # weights that it draws are the same in every process
            model = getattr(module, name)()
    except Exception as error:  # the user's own
        raise Mistake(f"{path}, looked for in {folder}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    if not isinstance(model, nn.Module):
        raise Mistake(f"{path} should give a torch.nn.Module, not {type(model).__name__}")
    source = Path(module.__file__).read_bytes() if module.__file__ else b""
    width = width_of(model, image_size, path)
    identity = {"library": "python", "function": path, "source": hashlib.sha256(source).hexdigest()}
    return Foreign(model, image_size, width, statistics, identity)


def refuse_untrusted(path: str, trust: bool) -> None:
    """Raise a Mistake where a cluster would run code that its user did not say to trust."""
    if not trust and on_cluster():
        raise Mistake(
            f"{path} is code that every machine of this Ray cluster would run; if you wrote it, or trust who did, set "
            "trust: true"
        )
