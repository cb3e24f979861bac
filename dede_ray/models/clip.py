"""CLIP: building open_clip models from a description, loading any CLIP's weights, and the tensor-only export.

What open_clip's users name can be named here: an open_clip architecture, a JSON model config, an exported folder, a
repository of the Hugging Face hub. The export is open_clip's own folder layout (`open_clip_config.json`,
`open_clip_model.safetensors`), so that plain `open_clip.create_model("local-dir:<folder>")` loads what we trained.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dede_ray.models.weights import (
    CONFIG_FILE,
    HUB,
    WEIGHTS_FILE,
    Budget,
    origin,
    other_layout,
    read_config,
    read_tensors,
    refuse_not_finite,
    resolve_weights,
    unlike,
    unwrapped,
    write_export,
)
from dede_ray.runtime.config import Config, Mistake, config_file
from dede_ray.runtime.libraries import open_clip

logger = logging.getLogger(__name__)

TOKENIZER_OPTIONS = {"additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token"}

# ---------------------------------------------------------------------------------------------- building


def model_description(architecture: str) -> dict[str, Any]:
    """The open_clip model config behind a name.

    Args:
        architecture: a name that open_clip knows (`RN50`, `ViT-B-32` ...), the path of a JSON model config in
            open_clip's format, a folder exported by `save_clip`, or `hf-hub:<org>/<name>`.

    Returns:
        `{"model_cfg": ..., "preprocess_cfg": ...}`; the second may be empty.
    """
    place = origin(architecture)
    if place.is_folder:
        try:
            described = read_config(place.file(CONFIG_FILE), "exported CLIP (open_clip_config.json)")
        except FileNotFoundError as error:
            raise Mistake(f"no exported CLIP: {error}{other_layout(place)}") from None
    elif place.path is not None and place.path.suffix == ".json":
        described = read_config(config_file(place.path), "CLIP model config")
        described = described if "model_cfg" in described else {"model_cfg": described, "preprocess_cfg": {}}
    else:
        known = open_clip.get_model_config(architecture.replace("/", "-"))  # OpenAI wrote ViT-B/32
        if known is None:
            raise Mistake(
                f"no CLIP architecture {architecture!r}{_nearest(architecture)}; expected an open_clip name such as "
                f"RN50 or ViT-B-32 ({len(open_clip.list_models())} are known), a JSON model config, an exported "
                f"folder, or {HUB}<org>/<name>"
            )
        described = {"model_cfg": known, "preprocess_cfg": {}}
    model = described.get("model_cfg")
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise Mistake(f"{architecture} is no open_clip model config: embed_dim, vision_cfg and text_cfg are needed")
    sections = {"vision_cfg": model["vision_cfg"], "text_cfg": model["text_cfg"]}
    sections["preprocess_cfg"] = described.setdefault("preprocess_cfg", {})
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise Mistake(f"{architecture} is no open_clip model config: its {name} is no JSON object")
    if ":" in str(
        model["vision_cfg"].get("timm_model_name")
    ):  # hf-hub: or local-dir:, which a config could point anywhere
        raise Mistake(f"{architecture} names an image tower elsewhere, {model['vision_cfg']['timm_model_name']!r}")
    options = model["text_cfg"].get("tokenizer_kwargs") or {}
    if not isinstance(options, dict) or not options.keys() <= TOKENIZER_OPTIONS:
        raise Mistake(
            f"{architecture}: tokenizer_kwargs {options!r} may set {', '.join(sorted(TOKENIZER_OPTIONS))} only; others "
            "could load code or files of its author's choice"
        )
    return described


def _nearest(architecture: str) -> str:
    by_lower = {name.lower(): name for name in open_clip.list_models()}
    near = difflib.get_close_matches(architecture.replace("/", "-").lower(), by_lower, 3)
    return f"; did you mean {' or '.join(by_lower[name] for name in near)}?" if near else ""


def build_clip(described: dict[str, Any], patch_dropout: float | None = None, weights: Path | None = None) -> nn.Module:
    """Build the model with random weights from torch's generator; no weights are downloaded.

    A text tower of Hugging Face's needs the package `transformers`, and its config from the hub or its cache.

    Args:
        described: what `model_description` gave; it is not changed.
        patch_dropout: share of an image's patches that a ViT image tower leaves out of each training step (FLIP, Li et
            al., arXiv:2212.00794), in [0, 1); None does as the config says. The export knows nothing of it.
        weights: the file it will be filled from; a description of a far larger model is refused before it takes memory.

    Raises:
        Mistake: open_clip cannot build that.
    """
    described = copy.deepcopy(described)
    model_cfg = described["model_cfg"]
    # DeepSpeed cannot broadcast a 0-dimensional bf16 parameter over gloo.
    model_cfg["nonscalar_logit_scale"] = True
    if patch_dropout is not None:
        model_cfg["vision_cfg"]["patch_dropout"] = patch_dropout
    budget = Budget.for_weights(weights) if weights is not None else contextlib.nullcontext()
    try:
        with budget:
            model = _create(described)
    # open_clip checks nothing: whatever a config of the wrong kinds of values makes it meet
    except (
        TypeError, RuntimeError, AssertionError, LookupError, ValueError, OSError, ImportError, ArithmeticError,
        AttributeError,
    ) as error:  # fmt: skip
        if patch_dropout and "patch_drop_rate" in str(error):  # timm's name for it
            raise _no_patches(model_cfg) from None
        raise Mistake(f"open_clip cannot build a model from this config: {error}") from None
    # open_clip's ResNets ignore the setting.
    if patch_dropout and not any(type(module).__name__.startswith("PatchDropout") for module in model.modules()):
        raise _no_patches(model_cfg)
    return model


def _create(described: dict[str, Any]) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(described))
        logging.disable(logging.WARNING)  # open_clip warns that the weights are random; here they are meant to be
        try:
            return open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, pretrained_image=False, pretrained_text=False
            )
        finally:
            logging.disable(logging.NOTSET)


def _no_patches(model_cfg: dict[str, Any]) -> Mistake:
    tower = model_cfg["vision_cfg"].get("timm_model_name", "ResNet")
    return Mistake(
        f"patch_dropout needs a ViT image tower; this one ({tower}) has no patches to leave out, so set it to 0"
    )


# ------------------------------------------------------------------------------------ preparing for training


class ImageLock(Config):
    """Keep the image tower as it was loaded and train the rest (LiT, Zhai et al., arXiv:2111.07991)."""

    unlocked_groups: int = Field(0, ge=0)
    """Layer groups that still train, counted from the output; open_clip's own ResNets know only 0."""
    freeze_batch_norm: bool = True
    """Keep the running statistics of locked BatchNorm layers as well."""


class TextLock(Config):
    """Keep the text tower as it was loaded and train the rest."""

    unlocked_layers: int = Field(0, ge=0)
    """Layer groups that still train, counted from the output."""
    freeze_layer_norm: bool = True
    """Lock the LayerNorms, too; only text towers of Hugging Face's can leave them free."""


def lock_towers(model: Any, image: ImageLock | None, text: TextLock | None) -> None:
    """Freeze parameters of a loaded model in place, as open_clip's trainer does; None leaves a tower free.

    Raises:
        Mistake: the tower cannot be locked that way.
    """
    for tower, lock in (("image", image), ("text", text)):
        if lock is None:
            continue
        before = _num_frozen(model)
        try:
            if isinstance(lock, ImageLock):
                if lock.freeze_batch_norm:
                    _refuse_fused_batch_norm(model.visual)
                model.lock_image_tower(lock.unlocked_groups, freeze_bn_stats=lock.freeze_batch_norm)
            else:
                model.lock_text_tower(lock.unlocked_layers, lock.freeze_layer_norm)
        except (AssertionError, AttributeError, NotImplementedError, RuntimeError, KeyError) as error:
            raise Mistake(f"this model's {tower} tower cannot be locked with {lock!r}: {error}") from None
        if _num_frozen(model) == before:
            raise Mistake(f"{lock!r} leaves nothing of the {tower} tower locked; unlock fewer, or set no lock")


def _num_frozen(model: nn.Module) -> int:
    return sum(not parameter.requires_grad for parameter in model.parameters())


def _refuse_fused_batch_norm(tower: nn.Module) -> None:
    # open_clip would put a plain frozen BatchNorm in their place, and the activation inside them would be lost.
    fused = {type(m).__name__ for m in tower.modules() if isinstance(m, nn.BatchNorm2d) and hasattr(m, "act")}
    if fused:
        raise Mistake(
            f"this image tower's {', '.join(sorted(fused))} layers cannot be frozen by open_clip; "
            "lock it with freeze_batch_norm: false"
        )


def prepare_for_training(model: Any, gradient_checkpointing: bool = False, compile: bool = False) -> None:
    """Trade time for memory, or compilation for speed, in place; neither changes values or state dict names.

    Args:
        model: an open_clip model.
        gradient_checkpointing: forget activations inside transformer blocks and compute them again on the way back.
        compile: `torch.compile` each tower; needs a C++ compiler, and minutes at the first step of a large model.
    """
    if gradient_checkpointing:
        model.set_grad_checkpointing()
        if isinstance(model.visual, open_clip.modified_resnet.ModifiedResNet):
            logger.warning("gradient checkpointing: open_clip's ResNets have none, so only the text tower uses it")
    if compile:  # the towers, not the model: `encode_image` and `encode_text` use them as well as `forward`
        model.visual.compile()
        (model.text if hasattr(model, "text") else model.transformer).compile()


# --------------------------------------------------------------------------------------- export and weights


def save_clip(folder: str | Path, model: nn.Module, described: dict[str, Any]) -> None:
    """Write the model as open_clip's folder layout: JSON and tensors, nothing that could be executed."""
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for name in ("logit_scale", "logit_bias"):
        if name in state:  # the scalar shape that every other reader of open_clip models expects
            state[name] = state[name].reshape(())
    preprocess = {**open_clip.get_model_preprocess_cfg(model), **described.get("preprocess_cfg", {})}
    content = {"model_cfg": described["model_cfg"], "preprocess_cfg": preprocess}
    write_export(folder, WEIGHTS_FILE, state, CONFIG_FILE, content)


def load_clip_weights(model: nn.Module, init: str | Path, entry: str | None = None) -> None:
    """Load a whole CLIP's weights, strictly, with the adaptations that open_clip makes when it loads.

    Position embeddings of another image size or context length are interpolated; the text tower's names may be of
    either of open_clip's layouts; a checkpoint without logit bias gives a model that has one a bias of 0.

    Args:
        model: as `build_clip` made it, of the checkpoint's architecture.
        init: whatever `resolve_weights` takes.
        entry: which state dict of it, where there are several.

    Raises:
        Mistake: nothing there, a file that only unpickling could open, or the weights of another architecture.
    """
    path = resolve_weights(init)
    own = model.state_dict()
    tower = {name for name in own if name.startswith("visual.") and not name.endswith(".num_batches_tracked")}
    state = unwrapped(read_tensors(path, entry), lambda names: names.keys() >= tower, path)
    if any(name.startswith(("text_model.", "vision_model.")) for name in state):
        raise Mistake(
            f"{path} has the names of transformers' CLIP, not of open_clip's; name the folder that has its "
            "config.json, and set victim.kind to transformers"
        )
    state = _adapted(state, model)
    # Frozen BatchNorm layers do not count batches, others do; nothing is computed from the count.
    missing, unexpected = (
        sorted(name for name in names if not name.endswith(".num_batches_tracked"))
        for names in (own.keys() - state.keys(), state.keys() - own.keys())
    )
    shared = own.keys() & state.keys()
    wrong = unlike({name: state[name] for name in shared}, {name: own[name] for name in shared})
    if missing or unexpected or wrong:
        raise Mistake(
            f"{path} does not fit the model: {_unlike(state, own)}{len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape or kind {wrong[:3]}; "
            f"name the architecture that the checkpoint was trained with{_architectures_like(state)}"
        )
    model.load_state_dict(state)
    refuse_not_finite(model, path)


def _adapted(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names and in the shapes of this model, as far as open_clip would go."""
    state = dict(state)
    for name in ("input_resolution", "context_length", "vocab_size"):  # OpenAI's
        state.pop(name, None)
    state.pop("text.transformer.embeddings.position_ids", None)  # transformers < 4.31; the only buffer it had
    own = model.state_dict()
    if "text_projection" in state and "positional_embedding" not in own:
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    if "logit_bias" in own and "logit_bias" not in state and "logit_scale" in state:
        state["logit_bias"] = torch.zeros_like(state["logit_scale"])
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own and state[name].numel() == 1:
            state[name] = state[name].reshape(own[name].shape)
    for name, resize in (
        ("visual.positional_embedding", open_clip.model.resize_pos_embed),
        ("positional_embedding", open_clip.model.resize_text_pos_embed),
        ("text.positional_embedding", open_clip.model.resize_text_pos_embed),
    ):
        there, here = state.get(name), own.get(name)
        if there is None or here is None or there.shape == here.shape:
            continue
        if there.ndim != here.ndim or there.shape[1:] != here.shape[1:] or len(there) < 2:
            continue  # another architecture
        if name.startswith("visual.") and math.isqrt(len(there) - 1) ** 2 + 1 != len(there):
            continue  # not a class token and a square grid
        logger.info("%s: interpolated from %d to %d positions", name, len(there), len(here))
        state[name] = there.float()  # torch interpolates no float16 on CPUs
        resize(state, model)
    return state


def _traits(state: dict[str, Tensor]) -> dict[str, Any]:
    """What distinguishes one architecture from another, as far as open_clip's own towers show it in their tensors."""
    text = "text." if "text.ln_final.weight" in state else ""
    traits: dict[str, Any] = {}
    for trait, name, axis in (
        ("embed_dim", f"{text}text_projection", 1),
        ("embed_dim", f"{text}text_projection.weight", 0),
        ("text width", f"{text}ln_final.weight", 0),
        ("image width", "visual.class_embedding", 0),  # ViT
        ("patch size", "visual.conv1.weight", 3),
        ("image width", "visual.layer1.0.conv1.weight", 0),  # ResNet
    ):
        if name in state and state[name].ndim > axis:
            traits[trait] = state[name].shape[axis]
    for trait, tower in (("text layers", text), ("image layers", "visual.")):
        if depth := _depth(state, f"{tower}transformer.resblocks."):
            traits[trait] = depth
    if "visual.layer1.0.conv1.weight" in state:
        traits.pop("patch size", None)  # the stem's convolution, always 3
        traits["image layers"] = [_depth(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
    return traits


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def _unlike(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    there, here = _traits(state), _traits(own)
    return "".join(
        f"the checkpoint's {trait} is {there[trait]}, the model's {here[trait]}; "
        for trait in there
        if trait in here and there[trait] != here[trait]
    )


def _architectures_like(state: dict[str, Tensor]) -> str:
    """The open_clip architectures whose tensors would have these shapes, up to image size and context length."""
    there, fitting = _traits(state), []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        if "timm_model_name" in vision or "hf_model_name" in text or "multimodal_cfg" in config:
            continue
        vision, text = open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)
        here = {"embed_dim": config["embed_dim"], "text width": text.width, "text layers": text.layers}
        here |= {"image width": vision.width, "image layers": vision.layers, "patch size": vision.patch_size}
        if isinstance(vision.layers, list):
            del here["patch size"]
        if here == there:
            fitting.append(name)
    return f" ({' or '.join(fitting)} would fit)" if fitting else ""


# ---------------------------------------------------------------------------------------- pixels and tokens


def pixel_statistics(described: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per RGB channel that the model's normaliser uses."""
    preprocess = described.get("preprocess_cfg") or {}
    mean = preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = preprocess.get("std") or open_clip.OPENAI_DATASET_STD
    for name, values in (("mean", mean), ("std", std)):
        numbers = values if isinstance(values, list | tuple) else []
        numbers = [value for value in numbers if isinstance(value, int | float) and abs(value) < 1e6]
        if len(numbers) != 3 or len(values) != 3 or (name == "std" and min(numbers) <= 0):
            raise Mistake(f"preprocess_cfg: {name} {values!r} should be three numbers, those of std above 0")
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
    """The model's tokenizer: open_clip's byte pairs, whose vocabulary ships with it, or one of Hugging Face's.

    Raises:
        Mistake: a Hugging Face tokenizer without the package `transformers`, or without its files in reach.
    """
    text = described["model_cfg"]["text_cfg"]
    name, options = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs") or {}
    context_length = text.get("context_length", 77)
    if not name:
        return open_clip.SimpleTokenizer(context_length=context_length, **options)
    try:
        return open_clip.tokenizer.HFTokenizer(
            name, context_length=context_length, tokenizer_mode=text.get("tokenizer_mode"), **options
        )
    except ImportError:
        raise Mistake(
            f"this model's tokenizer {name} needs the package transformers; pip install transformers"
        ) from None
    except (OSError, ValueError) as error:
        raise Mistake(
            f"the tokenizer {name} is neither local nor to be had from the Hugging Face hub: {error}"
        ) from None


def tokenizer_of(described: dict[str, Any]) -> Any:
    """The same, one per process and model; it keeps what it has learnt about words."""
    return _tokenizer(json.dumps(described["model_cfg"]))


@functools.lru_cache(maxsize=4)
def _tokenizer(model_cfg: str) -> Any:
    return tokenizer({"model_cfg": json.loads(model_cfg)})


def tokenise(tokenize: Any, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Turn captions into the text tower's input.

    Args:
        tokenize: what `tokenizer` gave.
        captions: N of them.

    Returns:
        Tokens, int64 (N, context length), and bool (N,), True where the caption is longer than the context, so that
        its end was cut off.
    """
    if not captions:
        return np.empty((0, tokenize.context_length), np.int64), np.empty(0, bool)
    tokens_NT = tokenize(captions).numpy()
    is_truncated = np.zeros(len(captions), bool)
    if isinstance(tokenize, open_clip.tokenizer.HFTokenizer):
        is_clips = tokenize.tokenizer_mode == "clips"  # adds its three special tokens itself
        rows = tokenize.tokenizer([tokenize.clean_fn(caption) for caption in captions], add_special_tokens=not is_clips)
        room = tokenize.context_length - 3 * is_clips
        is_truncated[:] = [len(row) > room for row in rows["input_ids"]]
    else:
        for i in np.flatnonzero(tokens_NT[:, -1]):  # full to the last place: cut off, or just fitting
            is_truncated[i] = len(tokenize.encode(captions[i])) + 2 > tokenize.context_length
    return tokens_NT, is_truncated


def image_size_px(described: dict[str, Any]) -> int:
    size = described["model_cfg"]["vision_cfg"].get("image_size", 224)
    return int(size[0] if isinstance(size, list | tuple) else size)


TOKENS_APART = 8  # captions are computed at their length, rounded up to a multiple of this


@torch.no_grad()
def encode_captions(model: Any, tokenize: Any, captions: list[str], batch_size: int = 256) -> Tensor:
    """Embed captions with the text tower: float32 (N, E), not normalised.

    Equal captions are embedded once. Where the tower looks back only, as CLIP's own does, what pads a caption to the
    context length cannot change its embedding, and is most of the work: it is left out. How much is left out depends
    on the caption alone, so that its embedding does not depend on its company.
    """
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    tokens_NT = tokenize(list(distinct)).to(next(model.parameters()).device)
    context = tokens_NT.shape[1]
    length_N = torch.full((len(tokens_NT),), context)
    if _looks_back_only(model):
        ends_N = tokens_NT.argmax(dim=1).cpu() + 1  # the end of text has the highest number
        length_N = (-(-ends_N // TOKENS_APART) * TOKENS_APART).clamp_max(context)
    embedding_NE = torch.empty(0)
    for length in length_N.unique().tolist():
        for rows in (length_N == length).nonzero()[:, 0].split(batch_size):
            tokens_BT = tokens_NT[rows.to(tokens_NT.device), :length]
            part_BE = (model.encode_text(tokens_BT) if length == context else _encode_short(model, tokens_BT)).float()
            if not len(embedding_NE):
                embedding_NE = part_BE.new_empty(len(tokens_NT), part_BE.shape[1])
            embedding_NE[rows.to(part_BE.device)] = part_BE
    return embedding_NE[torch.tensor([distinct[caption] for caption in captions], device=embedding_NE.device)]


def _looks_back_only(model: Any) -> bool:
    """Whether it is open_clip's plain CLIP, which takes a caption's embedding from its last token."""
    return type(model) is open_clip.model.CLIP and model.text_pool_type == "argmax" and model.attn_mask is not None


def _encode_short(model: Any, tokens_BT: Tensor) -> Tensor:
    """`encode_text` of a plain CLIP for fewer tokens than its context has places."""
    length, dtype = tokens_BT.shape[1], model.transformer.get_cast_dtype()
    x = model.token_embedding(tokens_BT).to(dtype) + model.positional_embedding[:length].to(dtype)
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(x), device=x.device), tokens_BT.argmax(dim=1)]
    if isinstance(model.text_projection, nn.Linear):
        return model.text_projection(x)
    return x if model.text_projection is None else x @ model.text_projection
