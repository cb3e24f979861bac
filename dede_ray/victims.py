"""Victim encoders: frozen, in eval mode whatever is called, normalising inside, known by a fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dede_ray import clip
from dede_ray.config import Config, Mistake


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
        is_file = self.architecture is not None and Path(self.architecture).exists()
        architecture = str(Path(self.architecture).absolute()) if self.architecture and is_file else self.architecture
        return self.model_copy(update={"path": str(Path(self.path).absolute()), "architecture": architecture})


VictimConfig = OpenClipVictim  # becomes a tagged union when the second kind lands


class Victim(nn.Module):
    """A frozen image encoder.

    Attributes:
        name: for people.
        image_size: side of the square input, in pixels.
        embedding_dim: E, the width of its embeddings.
        fingerprint: SHA-256 over weights and transform; equal fingerprints give equal embeddings.
    """

    def __init__(self, model: nn.Module, described: dict[str, Any], name: str, precision: str = "fp32"):
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.normalise = clip.normaliser(described)
        self.tokenize = clip.tokenizer(described)
        self.name = name
        self.image_size = clip.image_size_px(described)
        self.embedding_dim = int(described["model_cfg"]["embed_dim"])
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        transform = {"statistics": clip.pixel_statistics(described), "size": self.image_size, "precision": precision}
        self.fingerprint = fingerprint(model, transform)
        self.model.to(dtype=self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train(self, mode: bool = True) -> Victim:
        """Stay in eval mode: a victim in train mode would rewrite its BatchNorm statistics."""
        return super().train(False)

    @torch.inference_mode()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Embed images: float (B, 3, S, S) in [0, 1] -> float32 (B, E), projected, not normalised."""
        return self.model.encode_image(self.normalise(image_BCHW).to(self.dtype)).float()

    @torch.inference_mode()
    def encode_text(self, captions: list[str]) -> Tensor:
        """Embed captions: float32 (N, E), not normalised."""
        return clip.encode_captions(self.model, self.tokenize, captions)


def load_victim(config: VictimConfig) -> Victim:
    """Load a victim without executing anything from its files.

    Raises:
        Mistake: nothing there, a checkpoint that needs unpickling, or weights that do not fit the architecture.
    """
    path = Path(config.path)
    if path.is_dir():
        described, weights = clip.model_description(config.path), path / clip.WEIGHTS_FILE
    elif config.architecture is None:
        if not path.exists():
            raise Mistake(f"no victim at {path}; expected a folder exported by train_clip, or a checkpoint file")
        raise Mistake(f"{path} is a bare checkpoint; set victim.architecture to the open_clip model it belongs to")
    else:
        described, weights = clip.model_description(config.architecture), path
    if config.mean is not None or config.std is not None:
        mean, std = clip.pixel_statistics(described)
        described["preprocess_cfg"] = {"mean": config.mean or mean, "std": config.std or std}
    model = clip.build_clip(described, weights=clip.resolve_weights(weights))
    clip.load_clip_weights(model, weights)
    return Victim(
        model, described, name=path.name if not path.is_dir() else "/".join(path.parts[-2:]), precision=config.precision
    )


def fingerprint(model: nn.Module, settings: dict[str, Any]) -> str:
    """SHA-256 over every tensor of a model, in name order, and the settings that complete it."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
