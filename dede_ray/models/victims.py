"""Victim encoders: frozen, always in eval mode, normalising inside, identified by a fingerprint.

`VictimConfig` names one in settings, `load_victim` loads it. A `Victim` maps pixels in [0, 1] to embeddings; a
`ClipVictim` also embeds captions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from dede_ray.models import clip, foreign
from dede_ray.models.encoders import WEIGHTS_FILE as ENCODER_WEIGHTS
from dede_ray.models.encoders import Layers, Timm, load_encoder
from dede_ray.models.published import Normaliser, pixel_statistics, read_published
from dede_ray.models.weights import CONFIG_FILE, HUB, OPEN_CLIP_WEIGHTS, origin, pinned
from dede_ray.runtime.config import Config, Mistake, explain

V = TypeVar("V", bound="_AtPath")


def _timm_unless_said(content: Any) -> Any:
    return {"kind": "timm", **content} if isinstance(content, dict) else content


_Network = Annotated[Timm | Layers | None, Field(discriminator="kind"), BeforeValidator(_timm_unless_said)]


class _AtPath(Config):
    """Settings of a victim with a `path`: a file, a folder, or a repository of the hub."""

    def located(self: V) -> V:
        """The same with absolute paths, for Ray's workers, whose working folder may be another."""
        return self.model_copy(update={"path": origin(self.path).located()})  # type: ignore[attr-defined]


class OpenClipVictim(_AtPath):
    """A CLIP of open_clip's: a folder or a repository of the hub, or an open_clip name with a local checkpoint."""

    kind: Literal["open_clip"] = "open_clip"
    path: str
    """Folder with open_clip_config.json and weights, as train_clip exports it, hf-hub:<org>/<name>, or the checkpoint
    of `architecture`."""
    architecture: str | None = None
    """open_clip name or JSON model config, when `path` is a bare checkpoint (.safetensors or tensor-only .pt)."""
    entry: str | None = None
    """Which state dict of the checkpoint, where it has several, such as `teacher`."""
    mean: list[float] | None = None
    """Overrides the normaliser's mean per RGB channel (published victims differ)."""
    std: list[float] | None = None
    """Overrides the normaliser's standard deviation per RGB channel."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; embeddings are float32 either way."""

    def located(self) -> OpenClipVictim:
        return super().located().model_copy(update={"architecture": _located_if_there(self.architecture)})


class EncoderVictim(_AtPath):
    """An image-only encoder: a folder that train_simclr or attack wrote."""

    kind: Literal["encoder"] = "encoder"
    path: str
    """Folder with encoder.json and encoder.safetensors."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; embeddings are float32 either way."""


class PublishedVictim(_AtPath):
    """A stranger's checkpoint, tensor-only; the names of its tensors show which published layout it has."""

    kind: Literal["published"] = "published"
    path: str
    """The file."""
    clip: str | None = None
    """For a whole CLIP: its open_clip name. Tensors cannot distinguish RN50 (Detect-CLIP-Backdoor-Samples) from
    RN50-quickgelu (OpenAI's, and what was fine-tuned from it, such as BadCLIP's)."""
    entry: str | None = None
    """Which state dict of the checkpoint, where it has several, such as `teacher`."""
    architecture: _Network = None
    """For none of the published layouts: the network of timm's whose own names the tensors bear, or the layers of a
    plain one."""
    image_size: int | None = Field(None, ge=8, le=1024)
    """Side of the input in pixels, where it is not the layout's."""
    normaliser: Normaliser | None = None
    """Statistics of pixels that the author used, where they are not the layout's, or the layout has none."""
    mean: tuple[float, float, float] | None = None
    """Overrides the normaliser's mean per RGB channel."""
    std: tuple[float, float, float] | None = None
    """Overrides the normaliser's standard deviation per RGB channel."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; embeddings are float32 either way."""

    def located(self) -> PublishedVictim:
        return super().located().model_copy(update={"clip": _located_if_there(self.clip)})


class TransformersVictim(_AtPath):
    """A network of transformers': CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3, ViT ..., as `save_pretrained` writes it."""

    kind: Literal["transformers"] = "transformers"
    path: str
    """Folder with config.json and weights, or hf-hub:<org>/<name>."""
    entry: str | None = None
    """Which state dict of a .bin file, where it has several."""
    image_size: int | None = Field(None, ge=8, le=1024)
    """Side of the input in pixels, where it is not the folder's."""
    mean: tuple[float, float, float] | None = None
    """Normaliser's mean per RGB channel, instead of preprocessor_config.json's."""
    std: tuple[float, float, float] | None = None
    """Normaliser's standard deviation per RGB channel, instead of preprocessor_config.json's."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; embeddings are float32 either way."""


class TimmVictim(_AtPath):
    """A network of timm's with a file of weights, normalised as timm does it for that name."""

    kind: Literal["timm"] = "timm"
    path: str
    """Folder with config.json and weights, hf-hub:<org>/<name>, or the file of the network `name`."""
    name: str | None = None
    """timm's name of the network, with the tag of its weights or without: vit_small_patch16_224.augreg_in21k."""
    entry: str | None = None
    """Which state dict of a .pt file, where it has several."""
    image_size: int | None = Field(None, ge=8, le=1024)
    """Side of the input in pixels, where it is not that of config.json or of the name."""
    mean: tuple[float, float, float] | None = None
    """Normaliser's mean per RGB channel, instead of that of config.json or of the name."""
    std: tuple[float, float, float] | None = None
    """Normaliser's standard deviation per RGB channel, instead of that of config.json or of the name."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; embeddings are float32 either way."""


class OnnxVictim(_AtPath):
    """Any network as ONNX file, computed by onnxruntime: without a gradient, which a few detectors need."""

    kind: Literal["onnx"] = "onnx"
    path: str
    """The file, or hf-hub:<org>/<name> with a model.onnx."""
    output: str | None = None
    """Name of the output that is the embedding, where there are several."""
    pool: Literal["first", "mean"] | None = None
    """Of an output of tokens: the first, which is the class token, or their mean."""
    image_size: int | None = Field(None, ge=8, le=1024)
    """Side of the input in pixels, where the file leaves it open."""
    normaliser: Normaliser | None = None
    """Statistics of pixels that its author used; or name mean and std. `none` where the file normalises itself."""
    mean: tuple[float, float, float] | None = None
    """Overrides the normaliser's mean per RGB channel."""
    std: tuple[float, float, float] | None = None
    """Overrides the normaliser's standard deviation per RGB channel."""


class PythonVictim(Config):
    """Your own network: a function of yours that gives a torch.nn.Module. The one kind that runs code."""

    kind: Literal["python"] = "python"
    path: str
    """`module:function`; the function takes no arguments and gives a module: (B, 3, S, S) -> embeddings (B, E)."""
    folder: str = "."
    """Searched for the module before what is installed."""
    trust: bool = False
    """Let all machines of a Ray cluster run it; one machine alone does so with a warning."""
    image_size: int = Field(224, ge=8, le=1024)
    """Side of the input in pixels."""
    normaliser: Normaliser | None = None
    """Statistics of pixels that it expects; or name mean and std. `none` where it normalises itself."""
    mean: tuple[float, float, float] | None = None
    """Overrides the normaliser's mean per RGB channel."""
    std: tuple[float, float, float] | None = None
    """Overrides the normaliser's standard deviation per RGB channel."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; embeddings are float32 either way."""

    def located(self) -> PythonVictim:
        """The same with an absolute folder, for Ray's workers.

        Raises:
            Mistake: they are other machines, and `trust` is not set.
        """
        foreign.refuse_untrusted(self.path, self.trust)
        return self.model_copy(update={"folder": str(Path(self.folder).expanduser().absolute())})


def _located_if_there(name: str | None) -> str | None:
    return origin(name).located() if name and origin(name).exists else name


def _with_kind(content: Any) -> Any:
    return {"kind": "open_clip", **content} if isinstance(content, dict) else content


_Known = OpenClipVictim | EncoderVictim | PublishedVictim | TransformersVictim | TimmVictim | OnnxVictim | PythonVictim
VictimConfig = Annotated[_Known, Field(discriminator="kind"), BeforeValidator(_with_kind)]
"""Without a `kind` it is an open_clip one."""
OptionalVictimConfig = Annotated[_Known | None, Field(discriminator="kind"), BeforeValidator(_with_kind)]
"""The same or None; written out because tyro sees no union inside a union."""


class Victim(nn.Module):
    """A frozen image encoder.

    Attributes:
        model: the network behind it.
        normalise: pixels in [0, 1] -> what the network expects.
        name: for logs and messages.
        image_size: side of the square input, in pixels.
        embedding_dim: E, the width of its embeddings.
        fingerprint: SHA-256 over weights and transform; equal fingerprints give equal embeddings.
        classifier: the linear layer that its maker trained on the embedding, where there is one; on the CPU.
    """

    classifier: nn.Linear | None

    def __init__(
        self,
        model: nn.Module,
        name: str,
        image_size: int,
        embedding_dim: int,
        statistics: tuple[Sequence[float], Sequence[float]],
        precision: str,
        identity: dict[str, Any] | None = None,
        classifier: nn.Linear | None = None,
    ):
        super().__init__()
        self.__dict__["classifier"] = classifier  # beside the encoder, not a part of it
        self.model: Any = model.requires_grad_(False).eval()
        self.normalise = clip.Normalise(*map(list, statistics))
        self.name, self.image_size, self.embedding_dim = name, image_size, embedding_dim
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        transform = {"statistics": statistics, "size": image_size, "precision": precision, **(identity or {})}
        self.fingerprint = fingerprint(model, transform)
        self.model.to(dtype=self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def device(self) -> torch.device:
        return self.normalise.mean.device

    def train(self, mode: bool = True) -> Victim:
        """Stay in eval mode: a victim in train mode would rewrite its BatchNorm statistics."""
        return super().train(False)

    @torch.inference_mode()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Embed images: float (B, 3, S, S) in [0, 1] -> float32 (B, E), pooled or projected, not of length one."""
        return self.embed_with_gradient(image_BCHW)

    def embed_with_gradient(self, image_BCHW: Tensor) -> Tensor:
        """The same embeddings with a graph back to the pixels, for searches over pixels; weights stay frozen.

        Raises:
            Mistake: what computes them gives no gradient.
        """
        if torch.is_grad_enabled():
            self.refuse_without_gradient()
        return self._embed(self.normalise(image_BCHW).to(self.dtype)).float()

    def refuse_without_gradient(self) -> None:
        """Raise a Mistake where the victim cannot be searched over pixels."""
        if not getattr(self.model, "has_gradient", True):
            raise Mistake(
                f"victim {self.name} is computed by onnxruntime, which gives no gradient; detectors that search over "
                "pixels (cognitive_distillation, decree) need the network as torch's. Leave them out, or name its "
                "checkpoint"
            )

    def _embed(self, normalised_BCHW: Tensor) -> Tensor:
        return self.model(normalised_BCHW)


class ClipVictim(Victim):
    """A CLIP, which also embeds text."""

    def __init__(self, tokenize: Callable[[list[str]], Tensor], *arguments: Any):
        super().__init__(*arguments)
        self.tokenize = tokenize

    def _embed(self, normalised_BCHW: Tensor) -> Tensor:
        return self.model.encode_image(normalised_BCHW)

    @torch.inference_mode()
    def encode_text(self, captions: list[str]) -> Tensor:
        """Embed captions: float32 (N, E), not normalised."""
        return clip.encode_captions(self.model, self.tokenize, captions)


def load_victim(config: VictimConfig | dict[str, Any] | str | Path) -> Victim:
    """Load a victim without executing anything from its files.

    Args:
        config: settings, a dict of them, or the path (or hub id) of a CLIP.

    Raises:
        Mistake: nothing there, a checkpoint that needs unpickling, or weights that do not fit the architecture.

    Example:
        >>> import dede_ray, torch
        >>> victim = dede_ray.load_victim("runs/digits/victim/clip")
        >>> victim(torch.rand(2, 3, victim.image_size, victim.image_size)).shape[0]
        2
    """
    if not isinstance(config, _Known):
        given = config if isinstance(config, dict) else {"path": str(config)}
        try:
            config = TypeAdapter(VictimConfig).validate_python(given)
        except ValidationError as error:
            raise Mistake(f"these settings do not describe a victim:\n{explain(error, OpenClipVictim)}") from None
    if isinstance(config, OpenClipVictim):
        return _load_clip(config)
    if isinstance(config, PublishedVictim) and config.clip is not None:
        return _load_clip(_as_open_clip(config, config.clip))
    if not isinstance(config, PublishedVictim | EncoderVictim):
        return _load_foreign(config)
    classifier = None
    if isinstance(config, PublishedVictim):
        published = read_published(
            config.path,
            config.architecture,
            config.image_size,
            config.normaliser,
            config.mean,
            config.std,
            config.entry,
        )
        model, described, classifier = published.model, published.described, published.classifier
    else:
        model, described = load_encoder(config.path)
    # The same tensors with another stem or padding are another encoder.
    identity = {"architecture": described.architecture.model_dump(mode="json")}
    statistics = described.mean, described.std
    width = int(model.embedding_dim)  # type: ignore[arg-type]
    return Victim(
        model, _name(config.path), described.image_size, width, statistics, config.precision, identity, classifier
    )


def _load_foreign(config: TransformersVictim | TimmVictim | OnnxVictim | PythonVictim) -> Victim:
    given = config.image_size, config.mean, config.std
    precision = "fp32" if isinstance(config, OnnxVictim) else config.precision
    if isinstance(config, TransformersVictim):
        read = foreign.read_transformers(config.path, config.entry, *given)
    elif isinstance(config, TimmVictim):
        read = foreign.read_timm(config.path, config.name, config.entry, *given)
    else:
        mean, std = pixel_statistics(Path(config.path), config.kind, config.normaliser, config.mean, config.std)
        if isinstance(config, OnnxVictim):
            read = foreign.read_onnx(config.path, config.output, config.pool, config.image_size, (mean, std))
        else:
            folder = str(Path(config.folder).expanduser().absolute())
            read = foreign.read_python(config.path, folder, config.trust, config.image_size, (mean, std))
    arguments = (
        read.model, _name(config.path), read.image_size, read.width, read.statistics, precision, read.identity,
        read.classifier,
    )  # fmt: skip
    return Victim(*arguments) if read.tokenize is None else ClipVictim(read.tokenize, *arguments)


def _as_open_clip(config: PublishedVictim, architecture: str) -> OpenClipVictim:
    if config.architecture is not None or config.image_size is not None:
        raise Mistake("a whole CLIP has its image size from its open_clip name; leave architecture and image_size out")
    mean, std = pixel_statistics(Path(config.path), "CLIP", config.normaliser, config.mean, config.std)
    return OpenClipVictim(
        path=config.path, architecture=architecture, entry=config.entry, mean=list(mean), std=list(std),
        precision=config.precision,
    )  # fmt: skip


def _load_clip(config: OpenClipVictim) -> Victim:
    place = origin(config.path)
    is_described = place.is_folder and (config.architecture is None or place.find(CONFIG_FILE) is not None)
    if not is_described and config.architecture is None:
        if not place.exists:
            raise Mistake(
                f"no victim at {config.path}{place.hint()}; expected a folder exported by train_clip, a checkpoint "
                f"file, or {HUB}<org>/<name>"
            )
        raise Mistake(
            f"{config.path} is a bare checkpoint; set victim.architecture to the open_clip model it belongs to, or "
            "victim.kind to published"
        )
    described = clip.model_description(config.path if is_described else str(config.architecture))
    weights = place.weights(*OPEN_CLIP_WEIGHTS)
    if config.mean is not None or config.std is not None:
        mean, std = clip.pixel_statistics(described)
        described["preprocess_cfg"] = {"mean": config.mean or mean, "std": config.std or std}
    mean, std = clip.pixel_statistics(described)
    model = clip.build_clip(described, weights=weights)
    clip.load_clip_weights(model, weights, config.entry)
    size, width, statistics = clip.image_size_px(described), int(described["model_cfg"]["embed_dim"]), (mean, std)
    return ClipVictim(clip.tokenizer(described), model, _name(config.path), size, width, statistics, config.precision)


def weights_file(config: VictimConfig) -> Path:
    """The file of weights behind a victim's settings, an index where they are split; of `python`, its folder's."""
    if isinstance(config, PythonVictim):
        return Path(config.folder).expanduser() / config.path.partition(":")[0]
    names = {
        "open_clip": OPEN_CLIP_WEIGHTS, "encoder": (ENCODER_WEIGHTS,), "onnx": ("model.onnx", "onnx/model.onnx")
    }.get(config.kind, foreign.WEIGHTS)  # fmt: skip
    return origin(config.path).weights(*names)


def best_device() -> torch.device:
    """The device that this process computes on: the GPU that it was given, if any."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _name(path: str) -> str:
    if path.startswith(HUB):
        repository, at, commit = pinned(path).removeprefix(HUB).partition("@")
        return f"{repository}{at}{commit[:12]}"
    return "/".join(Path(path).parts[-2:]) if Path(path).is_dir() else Path(path).name


def fingerprint(model: nn.Module, settings: dict[str, Any]) -> str:
    """SHA-256 over every tensor of a model, in name order, and the settings that complete it."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
