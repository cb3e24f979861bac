"""The contrastive objective over the global batch, whatever the number of workers and micro-batches.

Every worker holds its share of the batch, and with accumulation each share is cut into micro-batches; loss and
gradients equal those of one process that holds the whole batch at once. The objective has two halves for that purpose:
`encode` turns a micro-batch into embeddings, `loss` compares the embeddings of the whole batch. `backward` strings them
together (embed everything without gradients, then once more micro-batch by micro-batch, each among the others' cached
embeddings: the gradient cache of Gao et al., arXiv:2101.06983).

The robust training methods of robust.py are other `encode` and `loss` halves in the same frame.

Shapes: B samples of a micro-batch, N samples of a worker's share, E embedding width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dede_ray.data import images
from dede_ray.models import clip
from dede_ray.runtime.libraries import open_clip

Batch = dict[str, Tensor]
Embeddings = dict[str, Tensor]

MAX_LOGIT_SCALE = math.log(100)  # Radford et al., arXiv:2103.00020, section 2.5

LossKind = Literal["info_nce", "siglip"]


def with_loss(described: dict[str, Any], loss: LossKind) -> dict[str, Any]:
    """The model description with what the loss needs: SigLIP has a bias, and starts at scale 10, bias -10.

    Source: Zhai et al., arXiv:2303.15343, section 3.2.
    """
    if loss == "info_nce":
        return described
    start = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    return {**described, "model_cfg": {**start, **described["model_cfg"]}}


class Contrastive(nn.Module):
    """InfoNCE (Radford et al., arXiv:2103.00020, figure 3) or the sigmoid loss (Zhai et al., arXiv:2303.15343).

    Args:
        model: an open_clip model, prepared for training.
        described: its description, for the normaliser.
        loss: info_nce, or siglip, for which the model needs a logit bias (see `with_loss`).
        rank, world: this worker and the number of workers.
    """

    def __init__(
        self, model: nn.Module, described: dict[str, Any], loss: LossKind = "info_nce", rank: int = 0, world: int = 1
    ):
        super().__init__()
        self.model: Any = model
        self.normalise = clip.normaliser(described)
        self.rank, self.world = rank, world
        # Both keep memory at (share x whole batch) logits or less: local loss over gathered embeddings, and texts that
        # travel from neighbour to neighbour. Both hand gradients back to the workers that the embeddings came from.
        self.compare = (
            open_clip.loss.SigLipLoss(rank=rank, world_size=world)
            if loss == "siglip"
            else open_clip.ClipLoss(
                local_loss=world > 1, gather_with_grad=world > 1, cache_labels=True, rank=rank, world_size=world
            )
        )

    def encode(self, batch: Batch) -> tuple[Embeddings, Tensor, Tensor | None]:
        """Embed a micro-batch.

        Args:
            batch: image uint8 (B, H, W, 3), tokens int64 (B, context length).

        Returns:
            What `loss` compares, rows in the batch's order: float32 (B, E), of length one; then the logit scale, at
            most 100, and the logit bias if there is one, float32 ().
        """
        return self.embed(batch["image"], batch["tokens"])

    def embed(self, image_BHWC: Tensor, tokens_BT: Tensor) -> tuple[Embeddings, Tensor, Tensor | None]:
        """Both towers, through the model's own `forward`: where ZeRO-3 fetches parameters, only that fetches all."""
        image_BCHW = self.normalise(images.to_unit_range(image_BHWC)).to(self.model.logit_scale.dtype)
        image_BE, text_BE, scale, *bias = self.model(image_BCHW, tokens_BT)
        # The stored logit scale is clamped after each step; this clamps the rounding of a 16-bit copy as well.
        log_scale = scale.float().squeeze().log()
        log_scale = log_scale + (log_scale.clamp(0, MAX_LOGIT_SCALE) - log_scale).detach()
        embeddings = {"image": image_BE.float(), "text": text_BE.float()}
        return embeddings, log_scale.exp(), bias[0].float().squeeze() if bias else None

    def loss(self, embeddings: Embeddings, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of a worker's whole share (N, E) against all workers', and metrics.

        The mean over the workers is the loss of the global batch.
        """
        image_NE, text_NE = embeddings["image"], embeddings["text"]
        loss = self.compare(image_NE, text_NE, scale, *([] if bias is None else [bias]))
        return loss, {"cosine": (image_NE * text_NE).detach().sum(dim=-1).mean()}

    def forward(
        self, batch: Batch, cached: list[Embeddings] | None = None, piece: int = 0, only_encode: bool = False
    ) -> Any:
        """Loss and metrics of a batch; see `backward` for the other arguments."""
        embeddings, scale, bias = self.encode(batch)
        if only_encode:
            return embeddings
        if cached is not None:
            embeddings = {
                name: torch.cat([own if i == piece else other[name] for i, other in enumerate(cached)])
                for name, own in embeddings.items()
            }
            scale, bias = _share_gradient(scale, len(cached)), _share_gradient(bias, len(cached))
        with torch.autocast("cuda" if scale.is_cuda else "cpu", enabled=False):  # products of float32 embeddings
            loss, metrics = self.loss(embeddings, scale, bias)
        return loss, {**metrics, "logit_scale": scale.detach().log()}

    def begin_step(self, step: int) -> None:
        """Told before each step, for methods whose loss depends on it."""

    def after_step(self) -> None:
        """Clamp the logit scale to [0, ln 100], as CLIP does."""
        clamp_parameter(self.model.logit_scale, 0, MAX_LOGIT_SCALE)

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold beside weights and optimiser; the same on every worker."""
        return {}

    def load_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take up what `arrays` gave."""


def backward(
    engine: Any, batch: Batch, accumulation: int = 1, reseed: Callable[[int], object] = lambda piece: None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of one worker's share of a step through a DeepSpeed engine.

    Args:
        engine: wraps an objective, `Contrastive` where `accumulation` is above 1; its `gradient_accumulation_steps`
            must be `accumulation`.
        batch: the share, every tensor N rows.
        accumulation: number of micro-batches; divides N. The batch that is compared stays the whole one.
        reseed: called before each micro-batch is embedded, so that both times dropout drops the same.

    Returns:
        This worker's loss () and metrics, detached.
    """
    if accumulation == 1:
        reseed(0)
        loss, metrics = engine(batch)
        engine.backward(loss)
        return loss.detach(), metrics
    size = len(next(iter(batch.values()))) // accumulation
    pieces = [{name: rows[i * size : (i + 1) * size] for name, rows in batch.items()} for i in range(accumulation)]
    cached: list[Embeddings] = []
    with torch.no_grad(), _batch_norms_unmoved(engine.module):
        for i, piece in enumerate(pieces):
            reseed(i)
            cached.append(engine(piece, only_encode=True))
    for i, piece in enumerate(pieces):
        reseed(i)
        loss, metrics = engine(piece, cached=cached, piece=i)
        engine.backward(loss * accumulation)  # DeepSpeed divides by it; the loss is the whole batch's already
        if i + 1 < accumulation:
            engine.step()  # counts the micro-batch; DeepSpeed moves the weights at the last one
    return loss.detach(), metrics


def _share_gradient(value: Any, count: int) -> Any:
    """The same value with a gradient `count` times smaller: each micro-batch gives it that of the whole batch."""
    return None if value is None else value.detach() + (value - value.detach()) / count


@contextlib.contextmanager
def _batch_norms_unmoved(model: nn.Module) -> Iterator[None]:
    """Normalise by the batch's statistics, but do not count them twice into the running ones."""
    moved = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for module in moved:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in moved:
            module.track_running_stats = True


@torch.no_grad()
def clamp_parameter(parameter: nn.Parameter, low: float, high: float) -> None:
    """Clamp a parameter and the float32 master copy that DeepSpeed may keep of it, or of this worker's part of it."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3: the parameter itself is empty between the steps
        master = parameter._z3_optimizer.get_local_fp32_param(parameter)  # type: ignore[attr-defined]
        if master is not None:
            master.clamp_(low, high)
        parameter.ds_tensor.clamp_(low, high)  # type: ignore[attr-defined]
        return
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None:
        mapping.get_hp_fragment().clamp_(low, high)
    parameter.clamp_(low, high)
