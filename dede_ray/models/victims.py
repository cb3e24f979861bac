"""Victim encoders: frozen, always in eval mode, normalising inside, identified by a fingerprint.

`VictimConfig` names one in settings, `load_victim` loads it. A `Victim` maps pixels in [0, 1] to embeddings; a
`ClipVictim` also embeds captions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from dede_ray.models import clip
from dede_ray.models.encoders import Timm, load_encoder
from dede_ray.models.published import Normaliser, pixel_statistics, read_published
from dede_ray.runtime.config import Config, Mistake, explain


class OpenClipVictim(Config):
    """A CLIP image tower: a folder that train_clip exported, or an open_clip name with a local checkpoint."""

    kind: Literal["open_clip"] = "open_clip"
    path: str
    """Exported folder (open_clip_config.json + open_clip_model.safetensors), or the checkpoint of `architecture`."""
    architecture: str | None = None
    """open_clip name or JSON model config, when `path` is a bare checkpoint (.safetensors or tensor-only .pt)."""
    mean: list[float] | None = None
    """Overrides the normaliser's mean per RGB channel (published victims differ)."""
    std: list[float] | None = None
    """Overrides the normaliser's standard deviation per RGB channel."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; embeddings are float32 either way."""

    def located(self) -> OpenClipVictim:
        """The same with absolute paths, for Ray's workers, whose working folder may be another."""
        return self.model_copy(
            update={"path": _absolute(self.path), "architecture": _absolute_if_file(self.architecture)}
        )


class EncoderVictim(Config):
    """An image-only encoder: a folder that train_simclr or attack wrote."""

    kind: Literal["encoder"] = "encoder"
    path: str
    """Folder with encoder.json and encoder.safetensors."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; embeddings are float32 either way."""

    def located(self) -> EncoderVictim:
        """The same with an absolute path, for Ray's workers."""
        return self.model_copy(update={"path": _absolute(self.path)})


class PublishedVictim(Config):
    """A stranger's checkpoint, tensor-only; the names of its tensors show which published layout it has."""

    kind: Literal["published"] = "published"
    path: str
    """The file."""
    clip: str | None = None
    """For a whole CLIP: its open_clip name. Tensors cannot distinguish RN50 (Detect-CLIP-Backdoor-Samples) from
    RN50-quickgelu (OpenAI's, and what was fine-tuned from it, such as BadCLIP's)."""
    architecture: Timm | None = None
    """For none of the published layouts: the network of timm's whose own names the tensors bear."""
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
        """The same with an absolute path, for Ray's workers."""
        return self.model_copy(update={"path": _absolute(self.path), "clip": _absolute_if_file(self.clip)})


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _absolute_if_file(name: str | None) -> str | None:
    return _absolute(name) if name and Path(name).exists() else name


def _with_kind(content: Any) -> Any:
    return {"kind": "open_clip", **content} if isinstance(content, dict) else content


_Known = OpenClipVictim | EncoderVictim | PublishedVictim
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
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        image_size: int,
        embedding_dim: int,
        statistics: tuple[Sequence[float], Sequence[float]],
        precision: str,
        identity: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.normalise = clip.Normalise(*map(list, statistics))
        self.name, self.image_size, self.embedding_dim = name, image_size, embedding_dim
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        transform = {"statistics": statistics, "size": image_size, "precision": precision, **(identity or {})}
        self.fingerprint = fingerprint(model, transform)
        self.model.to(dtype=self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> Victim:
        """Stay in eval mode: a victim in train mode would rewrite its BatchNorm statistics."""
        return super().train(False)

    @torch.inference_mode()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Embed images: float (B, 3, S, S) in [0, 1] -> float32 (B, E), pooled or projected, not of length one."""
        return self.embed_with_gradient(image_BCHW)

    def embed_with_gradient(self, image_BCHW: Tensor) -> Tensor:
        """The same embeddings with a graph back to the pixels, for searches over pixels; weights stay frozen."""
        return self._embed(self.normalise(image_BCHW).to(self.dtype)).float()

    def _embed(self, normalised_BCHW: Tensor) -> Tensor:
        return self.model(normalised_BCHW)


class ClipVictim(Victim):
    """A CLIP, which also embeds text."""

    def __init__(self, model: nn.Module, described: dict[str, Any], name: str, precision: str):
        size, width = clip.image_size_px(described), int(described["model_cfg"]["embed_dim"])
        super().__init__(model, name, size, width, clip.pixel_statistics(described), precision)
        self.tokenize = clip.tokenizer(described)

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
    if isinstance(config, PublishedVictim):
        published = read_published(
            config.path, config.architecture, config.image_size, config.normaliser, config.mean, config.std
        )
        model, described = published.model, published.described
    else:
        model, described = load_encoder(config.path)
    # The same tensors with another stem or padding are another encoder.
    identity = {"architecture": described.architecture.model_dump(mode="json")}
    statistics = described.mean, described.std
    width = int(model.embedding_dim)  # type: ignore[arg-type]
    return Victim(model, _name(config.path), described.image_size, width, statistics, config.precision, identity)


def _as_open_clip(config: PublishedVictim, architecture: str) -> OpenClipVictim:
    if config.architecture is not None or config.image_size is not None:
        raise Mistake("a whole CLIP has its image size from its open_clip name; leave architecture and image_size out")
    mean, std = pixel_statistics(Path(config.path), "CLIP", config.normaliser, config.mean, config.std)
    return OpenClipVictim(
        path=config.path, architecture=architecture, mean=list(mean), std=list(std), precision=config.precision
    )


def _load_clip(config: OpenClipVictim) -> Victim:
    path = Path(config.path)
    if path.is_dir():
        described, weights = clip.model_description(config.path), path / clip.WEIGHTS_FILE
    elif config.architecture is None:
        if not path.exists():
            raise Mistake(f"no victim at {path}; expected a folder exported by train_clip, or a checkpoint file")
        raise Mistake(
            f"{path} is a bare checkpoint; set victim.architecture to the open_clip model it belongs to, or "
            "victim.kind to published"
        )
    else:
        described, weights = clip.model_description(config.architecture), path
    if config.mean is not None or config.std is not None:
        mean, std = clip.pixel_statistics(described)
        described["preprocess_cfg"] = {"mean": config.mean or mean, "std": config.std or std}
    model = clip.build_clip(described, weights=clip.resolve_weights(weights))
    clip.load_clip_weights(model, weights)
    return ClipVictim(model, described, _name(config.path), config.precision)


def best_device() -> torch.device:
    """The device that this process computes on: the GPU that it was given, if any."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _name(path: str) -> str:
    return "/".join(Path(path).parts[-2:]) if Path(path).is_dir() else Path(path).name


def fingerprint(model: nn.Module, settings: dict[str, Any]) -> str:
    """SHA-256 over every tensor of a model, in name order, and the settings that complete it."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
