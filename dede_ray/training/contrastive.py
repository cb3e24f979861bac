"""The contrastive objective of CLIP over the global batch, whatever the number of workers and micro-batches.

Loss and gradients equal those of one process that holds the whole batch at once. The objective has two halves for that
purpose: `encode` turns a micro-batch into embeddings, `loss` compares the embeddings of the whole batch; objective.py
puts them together. The robust training methods of robust.py are other `encode` and `loss` halves in the same frame.

Shapes: B samples of a micro-batch, N samples of a worker's share, E embedding width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dede_ray.data import images
from dede_ray.models import clip
from dede_ray.runtime.libraries import open_clip
from dede_ray.training.objective import Batch, Embeddings, Objective, among_all, share_gradient

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


class Contrastive(Objective):
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
            embeddings = among_all(embeddings, cached, piece)
            scale, bias = share_gradient(scale, len(cached)), share_gradient(bias, len(cached))
        with torch.autocast("cuda" if scale.is_cuda else "cpu", enabled=False):  # products of float32 embeddings
            loss, metrics = self.loss(embeddings, scale, bias)
        return loss, {**metrics, "logit_scale": scale.detach().log()}

    def after_step(self) -> None:
        """Clamp the logit scale to [0, ln 100], as CLIP does."""
        clamp_parameter(self.model.logit_scale, 0, MAX_LOGIT_SCALE)


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
