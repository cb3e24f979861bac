"""CLIP: building open_clip models from a description, the contrastive objective, and the tensor-only export.

The export is open_clip's own folder layout (`open_clip_config.json`, `open_clip_model.safetensors`), so that plain
`open_clip.create_model("local-dir:<folder>")` loads what was trained here.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dede_ray.config import Config, Mistake, read_json, write_json
from dede_ray.vision_libraries import open_clip

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"


def model_description(architecture: str) -> dict[str, Any]:
    """The open_clip model config behind a name.

    Args:
        architecture: a name that open_clip knows (`RN50`, `ViT-B-32` ...), the path of a JSON model config in
            open_clip's format, or a folder exported by `save_clip`.

    Returns:
        `{"model_cfg": ..., "preprocess_cfg": ...}`; the second may be empty.
    """
    path = Path(architecture)
    if path.is_dir():
        described = read_json(path / CONFIG_FILE, "exported CLIP (open_clip_config.json)")
    elif path.suffix == ".json":
        described = {"model_cfg": read_json(path, "CLIP model config"), "preprocess_cfg": {}}
    else:
        known = open_clip.get_model_config(architecture)
        if known is None:
            raise Mistake(
                f"no CLIP architecture {architecture!r}; expected an open_clip name such as RN50 or ViT-B-32 "
                f"({len(open_clip.list_models())} are known), a JSON model config, or an exported folder"
            )
        described = {"model_cfg": known, "preprocess_cfg": {}}
    model = described.get("model_cfg")
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise Mistake(f"{architecture} is no open_clip model config: embed_dim, vision_cfg and text_cfg are needed")
    return described


def build_clip(described: dict[str, Any]) -> nn.Module:
    """Build the model with random weights from torch's generator; nothing is downloaded."""
    described = copy.deepcopy(described)
    # DeepSpeed cannot broadcast a 0-dimensional bf16 parameter over gloo.
    described["model_cfg"]["nonscalar_logit_scale"] = True
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(described))
        logging.disable(logging.WARNING)  # open_clip warns that the weights are random; here they are meant to be
        try:
            return open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, pretrained_image=False, pretrained_text=False
            )
        except (TypeError, RuntimeError, AssertionError, KeyError) as error:
            raise Mistake(f"open_clip cannot build a model from this config: {error}") from None
        finally:
            logging.disable(logging.NOTSET)


def save_clip(folder: str | Path, model: nn.Module, described: dict[str, Any]) -> None:
    """Write the model as open_clip's folder layout: JSON and tensors, nothing that could be executed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().float().contiguous().cpu() for name, tensor in model.state_dict().items()}
    for name in ("logit_scale", "logit_bias"):
        if name in state:  # the scalar shape that every other reader of open_clip models expects
            state[name] = state[name].reshape(())
    save_file(state, folder / f".{WEIGHTS_FILE}")
    (folder / f".{WEIGHTS_FILE}").replace(folder / WEIGHTS_FILE)
    preprocess = {**open_clip.get_model_preprocess_cfg(model), **described.get("preprocess_cfg", {})}
    write_json(folder / CONFIG_FILE, {"model_cfg": described["model_cfg"], "preprocess_cfg": preprocess})


def load_clip_weights(model: nn.Module, path: str | Path) -> None:
    """Load a whole CLIP's weights, strictly."""
    state = read_tensors(path)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    for name in ("input_resolution", "context_length", "vocab_size"):
        state.pop(name, None)
    own = model.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own:
            state[name] = state[name].reshape(own[name].shape)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or unexpected or wrong:
        raise Mistake(
            f"{path} does not fit the model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {sorted(wrong)[:3]}; "
            "name the architecture that the checkpoint was trained with"
        )
    model.load_state_dict(state)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors without executing anything in it.

    Accepts safetensors and tensor-only `.pt` files, the latter bare or under the key `state_dict`.

    Raises:
        Mistake: no such file, damaged, or a file that only unpickling could open.
    """
    path = Path(path)
    if not path.is_file():
        raise Mistake(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, just before it refuses them
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise Mistake(
            f"{path} holds more than tensors: opening it would execute code from whoever made it, so we do not. "
            "Ask for safetensors, or convert it where you trust it: torch.save(model.state_dict(), path)"
        ) from None
    except Exception as error:  # the readers raise whatever damage makes them meet: IndexError, KeyError, struct.error
        raise Mistake(f"{path} is no readable checkpoint: {error!r}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise Mistake(f"{path} is no state dict of tensors; found {type(state).__name__}")
    return state


def pixel_statistics(described: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per RGB channel that the model's normaliser uses."""
    preprocess = described.get("preprocess_cfg") or {}
    mean = preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = preprocess.get("std") or open_clip.OPENAI_DATASET_STD
    return list(mean), list(std)


def normaliser(described: dict[str, Any]) -> Normalise:
    return Normalise(*pixel_statistics(described))


class Normalise(nn.Module):
    """Pixels in [0, 1] -> the model's normalised pixels; the only place where that happens."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return (image_BCHW - self.mean) / self.std


def tokenizer(described: dict[str, Any]) -> Any:
    """open_clip's byte-pair tokenizer, whose vocabulary ships with it; Hugging Face tokenizers need their files."""
    text = described["model_cfg"]["text_cfg"]
    if text.get("hf_tokenizer_name"):
        return open_clip.tokenizer.HFTokenizer(text["hf_tokenizer_name"], context_length=text.get("context_length", 77))
    return open_clip.SimpleTokenizer(context_length=text.get("context_length", 77))


def image_size_px(described: dict[str, Any]) -> int:
    size = described["model_cfg"]["vision_cfg"].get("image_size", 224)
    return int(size[0] if isinstance(size, list | tuple) else size)


def to_unit_range(image_BHWC: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [0, 1], stored channels last."""
    return image_BHWC.permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def encode_captions(model: Any, tokenize: Any, captions: list[str], batch_size: int = 256) -> Tensor:
    """Embed captions with the text tower: float32 (N, E), not normalised."""
    parts = [
        model.encode_text(tokenize(captions[i : i + batch_size])).float() for i in range(0, len(captions), batch_size)
    ]
    return torch.cat(parts)


class Augmentation(Config):
    """What CLIP training does to an image; scoring never augments."""

    min_scale: float = 0.9
    """Smallest share of the image's area that a random crop keeps; 1 switches cropping off."""
    flip: bool = False
    """Mirror half of the images."""

    def apply(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random square crop, resized back (bicubic), and a random flip: uint8 -> uint8, same shape."""
        scale, left, top, coin = rng.random(4)
        if self.min_scale < 1:
            height, width = image_HWC.shape[:2]
            share = np.sqrt(self.min_scale + (1 - self.min_scale) * scale)
            x, y = left * (1 - share) * width, top * (1 - share) * height
            box = (x, y, x + share * width, y + share * height)
            image_HWC = np.asarray(
                Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC, box=box)
            )
        return image_HWC[:, ::-1] if self.flip and coin < 0.5 else image_HWC
