"""The DeDe decoder: rebuild an image from the victim's embedding and a few visible patches.

After Hou et al., "DeDe: Detecting Backdoor Samples for SSL Encoders via Decoders" (CVPR 2025, arXiv:2411.16154). A
masked autoencoder whose decoder reads the victim's embedding in place of the class token: the patch features never
see the embedding, the decoder has to. A triggered image has an embedding that does not belong to what it shows, so it
is rebuilt badly.

The same network run backwards is ours: from some visible patches, its encoder predicts the embedding. Wherever the
trigger is not among them, what they show belongs to the image, but the embedding does not. The error is measured where
the victim's information is, in embedding space, and not in pixels, of which an embedding says little.

Shapes: B images, L patches, P = 3 * patch_px**2 pixels of one patch, V visible patches, E embedding width, D width.
Masks are boolean, True = hidden. Pixels are in [0, 1], before and after.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from dede_ray.data.sampling import keyed_uniform
from dede_ray.models.weights import read_export, refuse_not_finite, refuse_unlike, write_export
from dede_ray.runtime.config import Config, Mistake
from dede_ray.runtime.libraries import timm

MOST_PLAIN_TOKENS = 256
"""Above it, the matrix of all pairs of tokens would cost more memory than the fused kernel costs time."""


class DecoderShape(Config):
    """The network, apart from the image size and the embedding width, which the victim decides."""

    patch_px: int = Field(4, ge=1)
    """Side of one square patch."""
    width: int = Field(192, ge=8)
    """Token width D."""
    heads: int = Field(3, ge=1)
    """Attention heads; must divide the width."""
    encoder_depth: int = Field(12, ge=1)
    """Blocks over the visible patches."""
    decoder_depth: int = Field(4, ge=1)
    """Blocks over all patches and the embedding."""


class MaskedDecoder(nn.Module):
    """Rebuilds images from embeddings; see the module's first paragraph.

    Attributes:
        image_size, patch_px, num_patches, embedding_dim: what it expects.
        victim: fingerprint of the victim whose embeddings it was trained on; empty while untrained.
        has_null: whether a null embedding was trained (`null_rate` > 0).
        has_reverse: whether it has the head that `predict` needs.
    """

    def __init__(
        self,
        shape: DecoderShape,
        image_size: int,
        embedding_dim: int,
        embedding_scale: float = 1.0,
        has_reverse: bool = False,
    ):
        super().__init__()
        if image_size % shape.patch_px or shape.width % shape.heads:
            raise Mistake(
                f"decoder: patch_px {shape.patch_px} must divide the victim's image size {image_size}, "
                f"and heads {shape.heads} the width {shape.width}"
            )
        self.shape, self.image_size, self.patch_px = shape, image_size, shape.patch_px
        self.embedding_dim = embedding_dim
        self.num_patches = (image_size // shape.patch_px) ** 2
        self.victim, self.has_null, self.has_reverse = "", False, has_reverse
        width, pixels = shape.width, 3 * shape.patch_px**2
        block = timm.models.vision_transformer.Block

        self.embed_patch = nn.Linear(pixels, width)  # a convolution with kernel = stride = patch_px
        self.encoder_position = nn.Parameter(torch.empty(1, self.num_patches, width))
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.encoder = nn.ModuleList(
            block(width, shape.heads, mlp_ratio=4, qkv_bias=True) for _ in range(shape.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(width)
        self.embed_embedding = nn.Linear(embedding_dim, width, bias=False)
        self.null_embedding = nn.Parameter(torch.empty(embedding_dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_position = nn.Parameter(torch.empty(1, 1 + self.num_patches, width))
        self.decoder = nn.ModuleList(
            block(width, shape.heads, mlp_ratio=4, qkv_bias=True) for _ in range(shape.decoder_depth)
        )
        self.to_pixels = nn.Linear(width, pixels)
        # Linear in z, so a fixed scale only makes victims of different embedding norms start alike.
        self.embedding_scale: Tensor
        self.register_buffer("embedding_scale", torch.tensor(float(embedding_scale)))
        for parameter in (self.encoder_position, self.class_token, self.mask_token, self.decoder_position):
            nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.normal_(self.null_embedding)
        self.embedding_mean: Tensor
        self.embedding_std: Tensor
        if has_reverse:
            self.to_embedding = nn.Sequential(
                nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, embedding_dim)
            )
            self.register_buffer("embedding_mean", torch.zeros(embedding_dim))
            self.register_buffer("embedding_std", torch.ones(embedding_dim))

    def forward(self, image_BCHW: Tensor, embedding_BE: Tensor, mask_BL: Tensor) -> Tensor:
        """Predict every patch's pixels.

        Args:
            image_BCHW: float, in [0, 1].
            embedding_BE: the victim's embeddings, or rows of `null()`.
            mask_BL: True where hidden; the same number of hidden patches in every image.

        Returns:
            (B, L, P), pixels around [0, 1], not clipped.
        """
        return self.decode(self.see(image_BCHW, mask_BL), embedding_BE)

    def see(self, image_BCHW: Tensor, mask_BL: Tensor) -> Tensor:
        """The half of `forward` that no embedding enters: features of visible patches in their places (B, L, D).

        Where no patch is visible, they are the same for every image.
        """
        all_BLD = self.mask_token.expand(len(image_BCHW), self.num_patches, -1)
        if not self.training and not bool((~mask_BL[:1]).any()):
            return all_BLD  # in training every parameter takes part in every step, for whoever adds gradients up
        x, visible_BV = self._encode(image_BCHW, mask_BL)
        return all_BLD.to(x.dtype).scatter(1, visible_BV.unsqueeze(-1).expand(-1, -1, x.shape[-1]), x[:, 1:])

    def decode(self, seen_BLD: Tensor, embedding_BE: Tensor) -> Tensor:
        """The other half: every patch's pixels (B, L, P) from what `see` gave and embeddings."""
        dtype = seen_BLD.dtype
        embedding_B1D = self.embed_embedding(embedding_BE.to(dtype) * self.embedding_scale.to(dtype)).unsqueeze(1)
        x = torch.cat([embedding_B1D, seen_BLD], dim=1) + self.decoder_position  # the embedding replaces token 0
        return 0.5 + 0.25 * self.to_pixels(_through(self.decoder, x)[:, 1:])

    def predict(self, image_BCHW: Tensor, mask_BL: Tensor) -> Tensor:
        """Run backwards: the victim's embeddings, standardised (B, E), from the patches that the mask leaves visible.

        At least one patch has to be visible.
        """
        x, _ = self._encode(image_BCHW, mask_BL)
        return self.to_embedding(torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1))

    def standardise(self, embedding_BE: Tensor) -> Tensor:
        """Embeddings (B, E) in units of each dimension's spread over the training data, around their mean there."""
        return (embedding_BE - self.embedding_mean) / self.embedding_std

    def _encode(self, image_BCHW: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Features of class token and visible patches (B, 1 + V, D), and which patches those are (B, V)."""
        patches_BLP = self.patchify(image_BCHW)
        num_visible = int((~mask_BL[0]).sum())
        visible_BV = mask_BL.int().argsort(dim=1, stable=True)[:, :num_visible]
        patches_BVP = patches_BLP.gather(1, visible_BV.unsqueeze(-1).expand(-1, -1, patches_BLP.shape[-1]))
        position_BLD = self.encoder_position.expand(len(image_BCHW), -1, -1)
        position_BVD = position_BLD.gather(1, visible_BV.unsqueeze(-1).expand(-1, -1, position_BLD.shape[-1]))
        token_BVD = self.embed_patch((patches_BVP - 0.5) / 0.25) + position_BVD
        x = torch.cat([self.class_token.expand(len(image_BCHW), -1, -1), token_BVD], dim=1)
        return self.encoder_norm(_through(self.encoder, x)), visible_BV

    def null(self, batch: int) -> Tensor:
        """The learned embedding that means "no embedding": (batch, E)."""
        return (self.null_embedding / self.embedding_scale).expand(batch, -1)

    def patchify(self, image_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, L, P), patches numbered row by row."""
        batch, channels, height, width = image_BCHW.shape
        side = self.patch_px
        x = image_BCHW.reshape(batch, channels, height // side, side, width // side, side)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, side * side * channels)

    def unpatchify(self, patches_BLP: Tensor) -> Tensor:
        """(B, L, P) -> (B, 3, H, W)."""
        batch, side, rows = len(patches_BLP), self.patch_px, self.image_size // self.patch_px
        x = patches_BLP.reshape(batch, rows, rows, side, side, 3)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, self.image_size, self.image_size)

    @torch.inference_mode()
    def reconstruct(
        self, image_BCHW: Tensor, embedding_BE: Tensor | None, keys_B: Tensor, mask_ratio: float
    ) -> tuple[Tensor, Tensor]:
        """Rebuild images, the visible patches pasted back: (B, 3, H, W) in [0, 1], and the mask (B, L)."""
        mask_BL = random_mask(keys_B, self.num_patches, mask_ratio)
        embedding_BE = self.null(len(image_BCHW)) if embedding_BE is None else embedding_BE
        patches_BLP = self(image_BCHW, embedding_BE, mask_BL).float()
        patches_BLP = torch.where(mask_BL.unsqueeze(-1), patches_BLP, self.patchify(image_BCHW))
        return self.unpatchify(patches_BLP).clamp(0, 1), mask_BL


def _through(blocks: nn.ModuleList, x_BTD: Tensor) -> Tensor:
    """Tokens through blocks of attention."""
    # On CPUs torch's fused attention is slow in bf16 for so few tokens: its backward alone took a third of a step.
    is_reduced = torch.is_autocast_enabled(x_BTD.device.type) or x_BTD.dtype != torch.float32
    is_plain = x_BTD.device.type == "cpu" and is_reduced and x_BTD.shape[1] <= MOST_PLAIN_TOKENS
    for block in blocks:
        block.attn.fused_attn = not is_plain  # type: ignore[union-attr]
        x_BTD = block(x_BTD)
    return x_BTD


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """floor(L * (1 - ratio)); at 32 px, 4-px patches and ratio 0.99 that is 0: the embedding alone must do."""
    return int(num_patches * (1 - mask_ratio) + 1e-9)


def random_mask(keys_B: Tensor, num_patches: int, mask_ratio: float) -> Tensor:
    """Hide patches at random, each image by its own key: bool (B, L), True = hidden."""
    num_visible = num_visible_patches(num_patches, mask_ratio)
    order_BL = keyed_uniform(keys_B, num_patches).argsort(dim=1)
    mask_BL = torch.ones(len(keys_B), num_patches, dtype=torch.bool, device=keys_B.device)
    return mask_BL.scatter(1, order_BL[:, :num_visible], False)


def reconstruction_error(patches_BLP: Tensor, target_BLP: Tensor, mask_BL: Tensor) -> Tensor:
    """Average each image's squared error over the patches the decoder did not see.

    Args:
        patches_BLP: predicted pixels, in [0, 1].
        target_BLP: true pixels, in [0, 1].
        mask_BL: True where hidden; at least one per image.

    Returns:
        float32 (B,), squared pixel units. Higher means worse: this is the DeDe score.

    Source: Hou et al., arXiv:2411.16154; their code sums in normalised pixel units, we divide so that sizes compare.
    """
    error_BL = (patches_BLP.float() - target_BLP.float()).square().mean(dim=-1)
    return (error_BL * mask_BL).sum(dim=1) / mask_BL.sum(dim=1)


def embedding_error(predicted_BE: Tensor, standardised_BE: Tensor) -> Tensor:
    """Mean squared error of each predicted embedding, float32 (B,): 1 is what predicting the mean would cost.

    Ours; the squared distance separated better than the cosine, by 0.06 to 0.1 of AUROC on each of four victims.
    """
    return (predicted_BE.float() - standardised_BE.float()).square().mean(dim=1)


# ------------------------------------------------------------------------------------------------ files


WEIGHTS_FILE, DESCRIPTION_FILE = "decoder.safetensors", "decoder.json"


class _Description(Config):
    """decoder.json, as a stranger may have written it; what else a trainer recorded there is not read."""

    model_config = ConfigDict(extra="ignore")

    shape: DecoderShape
    image_size: int = Field(ge=1)
    embedding_dim: int = Field(ge=1)
    has_null: bool
    has_reverse: bool = False
    victim: str

    def build(self) -> MaskedDecoder:
        decoder = MaskedDecoder(self.shape, self.image_size, self.embedding_dim, has_reverse=self.has_reverse)
        decoder.victim, decoder.has_null = self.victim, self.has_null
        return decoder


def save_decoder(folder: str | Path, decoder: MaskedDecoder, about: dict[str, Any]) -> None:
    """Write `decoder.json` and `decoder.safetensors`: tensors and settings, nothing executable."""
    state = {name: tensor.float() for name, tensor in decoder.state_dict().items()}
    description = {
        "shape": decoder.shape.model_dump(),
        "image_size": decoder.image_size,
        "embedding_dim": decoder.embedding_dim,
        "has_null": decoder.has_null,
        "has_reverse": decoder.has_reverse,
        "victim": decoder.victim,
        **about,
    }
    write_export(folder, WEIGHTS_FILE, state, DESCRIPTION_FILE, description)


def load_decoder(folder: str | Path) -> MaskedDecoder:
    """Load an exported decoder, frozen.

    Raises:
        Mistake: nothing there, not ours, or damaged.
    """
    described, state = read_export(folder, WEIGHTS_FILE, DESCRIPTION_FILE, _Description, "decoder")
    path, shape = Path(folder) / WEIGHTS_FILE, described.shape
    if shape.encoder_depth + shape.decoder_depth > len(state):
        raise Mistake(
            f"{path} holds {len(state)} tensors, too few for the decoder that decoder.json describes: {shape!r}"
        )
    try:
        with torch.device("meta"):  # no memory yet: numbers in a JSON file may ask for any amount
            wanted = described.build().state_dict()
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise Mistake(f"{Path(folder) / DESCRIPTION_FILE} does not describe an exported decoder: {error!r}") from None
    refuse_unlike(state, wanted, path, DESCRIPTION_FILE)
    decoder = described.build()
    decoder.load_state_dict(state)
    refuse_not_finite(decoder, path)
    return decoder.requires_grad_(False).eval()
