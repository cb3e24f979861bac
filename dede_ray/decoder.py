"""The DeDe decoder: rebuild an image from the victim's embedding and a few visible patches.

After Hou et al., "DeDe: Detecting Backdoor Samples for SSL Encoders via Decoders" (CVPR 2025, arXiv:2411.16154). A
masked autoencoder whose decoder reads the victim's embedding in place of the class token: the patch features never
see the embedding, the decoder has to. A triggered image carries somebody else's embedding, so it is rebuilt badly.

The same network run backwards is ours: from some visible patches, its encoder predicts the embedding. Wherever the
trigger is not among them, what they show belongs to the image and the embedding to somebody else. The error is
measured where the victim's information is, in embedding space, and not in pixels, of which an embedding says little.

Shapes: B images, L patches, P = 3 * patch_px**2 pixels of one patch, V visible patches, E embedding width, D width.
Masks are boolean, True = hidden. Pixels are in [0, 1], before and after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from dede_ray.clip import to_unit_range
from dede_ray.config import Config, Mistake, read_json, write_json
from dede_ray.optimisation import Optimisation
from dede_ray.vision_libraries import timm
from dede_ray.weights import read_tensors, refuse_not_finite, refuse_unlike

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
        """The learned embedding that stands for "no embedding": (batch, E)."""
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


# ------------------------------------------------------------------------------------------------ masks and errors


def sample_keys(sample_ids: Sequence[str], seed: int, *more: int) -> Tensor:
    """One 64-bit key per sample, int64 (B,), for everything random about it: never worker state, never the batch."""
    salt = ("/".join(str(number) for number in (seed, *more)) + "/").encode()
    digests = b"".join(hashlib.blake2b(salt + name.encode(), digest_size=8).digest() for name in sample_ids)
    return torch.frombuffer(bytearray(digests), dtype=torch.int64) if digests else torch.zeros(0, dtype=torch.int64)


def keyed_uniform(keys_B: Tensor, count: int) -> Tensor:
    """`count` numbers in [0, 1) per key, float64 (B, count), by a counter-based generator (SplitMix64)."""
    counter = torch.arange(1, count + 1, device=keys_B.device, dtype=torch.int64)
    x = keys_B.unsqueeze(1) + counter * -7046029254386353131  # 0x9E3779B97F4A7C15; int64 wraps around
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() * 2.0**-53


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 as if unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


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
        float32 (B,), squared pixel units. Higher means worse, so it is the DeDe score as it stands.

    Source: Hou et al., arXiv:2411.16154; their code sums in normalised pixel units, we divide so that sizes compare.
    """
    error_BL = (patches_BLP.float() - target_BLP.float()).square().mean(dim=-1)
    return (error_BL * mask_BL).sum(dim=1) / mask_BL.sum(dim=1)


def embedding_error(predicted_BE: Tensor, standardised_BE: Tensor) -> Tensor:
    """Mean squared error of each predicted embedding, float32 (B,): 1 is what predicting the mean would cost.

    Ours; the squared distance separated better than the cosine, by 0.06 to 0.1 of AUROC on each of four victims.
    """
    return (predicted_BE.float() - standardised_BE.float()).square().mean(dim=1)


# ------------------------------------------------------------------------------------------------ presets


OodFill = Literal["none", "split", "noise"]
"""What becomes of samples whose embeddings are longer than most: where few samples lie, a decoder learns little else
than them, and a poison that makes embeddings long (CTRL) is then rebuilt well. Publication and code disagree.

none: nothing. noise, after the publication's text: they are left out, and as many images of random noise take their
place. split, after the published code, where the noise is commented out: they are kept apart, and every epoch is a pass
over the others, then one over them."""


class DecoderPreset(Optimisation):
    """Network and optimisation of one published or tried setting."""

    shape: DecoderShape
    mask_ratio: float
    null_rate: float
    trim_rate: float
    reverse_weight: float
    reverse_mask_ratio: float
    batch_size: int
    epochs: float
    shuffle: bool
    ood_fill: OodFill = "none"
    ood_quantile: float = 0.99


PRESETS: dict[str, DecoderPreset] = {
    # For laptops and tests: the paper's construction at a tenth of its size. One visible patch of 64, where the others
    # leave six: a decoder this small otherwise copies its surroundings and hardly reads the embedding.
    "tiny": DecoderPreset(
        shape=DecoderShape(patch_px=4, width=96, heads=3, encoder_depth=2, decoder_depth=2),
        mask_ratio=0.97, null_rate=0.1, trim_rate=0.1, reverse_weight=0.1, reverse_mask_ratio=0.75,
        batch_size=256, epochs=20, optimiser="adamw", learning_rate=2e-3,
        weight_decay=0.01, warmup_steps=100, schedule="cosine", clip_norm=1.0, shuffle=True,
    ),
    # Hou et al. as released, for 32-px victims: 12 + 4 blocks, Adam, no shuffling, no null embedding.
    "paper": DecoderPreset(
        shape=DecoderShape(patch_px=4, width=192, heads=3, encoder_depth=12, decoder_depth=4),
        mask_ratio=0.9, null_rate=0.0, trim_rate=0.0, reverse_weight=0.0, reverse_mask_ratio=0.75,
        batch_size=256, epochs=200, optimiser="adam", learning_rate=1e-3,
        beta2=0.999, epsilon=1e-8, weight_decay=1e-6, warmup_steps=0, schedule="constant", clip_norm=0.0, shuffle=False,
    ),
    # The same network trained to convergence sooner, with null embedding and trimming.
    "fast": DecoderPreset(
        shape=DecoderShape(patch_px=4, width=192, heads=3, encoder_depth=12, decoder_depth=4),
        mask_ratio=0.9, null_rate=0.1, trim_rate=0.1, reverse_weight=0.1, reverse_mask_ratio=0.75,
        batch_size=1024, epochs=100, optimiser="adamw",
        learning_rate=1e-3, weight_decay=0.05, warmup_steps=1000, schedule="cosine", clip_norm=1.0, shuffle=True,
    ),
    # For 224-px victims: ViT-B/16 blocks over the visible patches, MAE's light decoder.
    "vit_b16": DecoderPreset(
        shape=DecoderShape(patch_px=16, width=768, heads=12, encoder_depth=12, decoder_depth=4),
        mask_ratio=0.9, null_rate=0.1, trim_rate=0.1, reverse_weight=0.1, reverse_mask_ratio=0.75,
        batch_size=1024, epochs=40, optimiser="adamw", learning_rate=5e-4,
        weight_decay=0.05, warmup_steps=1000, schedule="cosine", clip_norm=1.0, shuffle=True,
    ),
}  # fmt: skip


def changed_preset(name: str, own: Mapping[str, Any]) -> DecoderPreset:
    """A preset with the settings that are not None in their place."""
    return PRESETS[name].model_copy(update={key: value for key, value in own.items() if value is not None})


# ------------------------------------------------------------------------------------------------ training

REVERSE = 0x5DEECE66D  # mixed into the keys of the masks that `predict` looks through


class Reconstruction(nn.Module):
    """The decoder's training objective: the error over hidden patches, a share of embeddings nulled.

    With `reverse_weight`, the error of the embedding that is predicted from visible patches is added to it, per
    dimension and in units of its variance.

    Trimming is ours. The suspected data contains the poisoned samples, and a decoder that sees them often enough learns
    to rebuild them too: their embeddings then explain their images, and the detector is blind. Leaving the worst
    share of each global batch out of the loss keeps it from ever learning them, without knowing which they are. Each
    direction leaves out its own.
    """

    def __init__(
        self,
        decoder: MaskedDecoder,
        mask_ratio: float,
        null_rate: float,
        trim_rate: float = 0.0,
        reverse_weight: float = 0.0,
        reverse_mask_ratio: float = 0.75,
    ):
        super().__init__()
        self.decoder, self.mask_ratio, self.null_rate, self.trim_rate = decoder, mask_ratio, null_rate, trim_rate
        self.reverse_weight, self.reverse_mask_ratio = reverse_weight, reverse_mask_ratio

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Shapes: image uint8 (B, H, W, 3), embedding float (B, E), key int64 (B,); returns loss () and metrics."""
        decoder, keys_B = self.decoder, batch["key"]
        image_BCHW = to_unit_range(batch["image"])
        pixels_BCHW = image_BCHW.to(decoder.class_token.dtype)
        mask_BL = random_mask(keys_B, decoder.num_patches, self.mask_ratio)
        is_null_B = keyed_uniform(~keys_B, 1).squeeze(1) < self.null_rate
        embedding_BE = true_BE = batch["embedding"].float()
        if self.null_rate > 0:
            embedding_BE = torch.where(is_null_B.unsqueeze(1), decoder.null(len(true_BE)).float(), true_BE)
        patches_BLP = decoder(pixels_BCHW, embedding_BE, mask_BL)
        error_B = reconstruction_error(patches_BLP, decoder.patchify(image_BCHW), mask_BL)
        # The null embedding says nothing about a sample, so samples that carry it are never trimmed.
        loss, trimmed = self._trimmed_mean(error_B, is_null_B)
        metrics = {} if self.trim_rate == 0 else {"trimmed": trimmed}
        if self.reverse_weight == 0:
            return loss, metrics
        mask_BL = random_mask(keys_B ^ REVERSE, decoder.num_patches, self.reverse_mask_ratio)
        error_B = embedding_error(decoder.predict(pixels_BCHW, mask_BL), decoder.standardise(true_BE))
        reverse, _ = self._trimmed_mean(error_B, torch.zeros_like(is_null_B))
        return loss + self.reverse_weight * reverse, {**metrics, "reverse": reverse.detach()}

    def _trimmed_mean(self, error_B: Tensor, is_exempt_B: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over what is not among the worst of the global batch, and the share that is."""
        if self.trim_rate == 0:
            return error_B.mean(), torch.zeros_like(error_B[0])
        is_kept_B = is_exempt_B | (error_B <= self._threshold(error_B.detach(), is_exempt_B))
        share = is_kept_B.float().mean()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(share, op=torch.distributed.ReduceOp.SUM)
            share /= torch.distributed.get_world_size()
        return (error_B * is_kept_B).mean() / share, 1 - share

    def _threshold(self, error_B: Tensor, is_exempt_B: Tensor) -> Tensor:
        """Error above which a sample is trimmed, over the global batch, so that it does not depend on the workers."""
        error_B = error_B.masked_fill(is_exempt_B, torch.nan)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            gathered = [torch.empty_like(error_B) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(gathered, error_B)
            error_B = torch.cat(gathered)
        return error_B.nanquantile(1 - self.trim_rate)

    def begin_step(self, step: int) -> None:
        pass

    def after_step(self) -> None:
        pass

    def arrays(self) -> dict[str, Any]:
        return {}

    def load_arrays(self, arrays: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Spread:
    """Where the embeddings of the training data lie."""

    scale: float
    """One over their root mean square."""
    mean_E: np.ndarray
    std_E: np.ndarray

    @classmethod
    def of(cls, embedding_NE: np.ndarray) -> Spread:
        values_NE = embedding_NE.astype(np.float64)
        std_E = values_NE.std(axis=0)
        # A dimension that hardly moves would count as much as the others, on noise alone.
        std_E = np.maximum(std_E, 0.01 * np.sqrt(np.mean(std_E**2)) + 1e-12)
        scale = 1 / max(float(np.sqrt(np.mean(values_NE**2))), 1e-6)
        return cls(scale, values_NE.mean(axis=0).astype(np.float32), std_E.astype(np.float32))


def reconstruction(preset: DecoderPreset, image_size: int, spread: Spread, victim: str) -> Reconstruction:
    """A preset's objective with a fresh decoder, for a victim of this fingerprint."""
    has_reverse = preset.reverse_weight > 0
    decoder = MaskedDecoder(preset.shape, image_size, len(spread.mean_E), spread.scale, has_reverse)
    decoder.victim, decoder.has_null = victim, preset.null_rate > 0
    if has_reverse:
        decoder.embedding_mean.copy_(torch.from_numpy(spread.mean_E))
        decoder.embedding_std.copy_(torch.from_numpy(spread.std_E))
    return Reconstruction(
        decoder, preset.mask_ratio, preset.null_rate, preset.trim_rate, preset.reverse_weight, preset.reverse_mask_ratio
    )


# What `ood_fill` does. The rule is here alone: embeddings longer than a quantile of the corpus' lengths are outside.

NOISE_SPLIT, NOISE_PER_SHARD = "ood-noise", 1000


def lengths(embedding_NE: NDArray[np.floating]) -> NDArray[np.float64]:
    """Euclidean length of each embedding (N,)."""
    return np.sqrt(np.square(embedding_NE, dtype=np.float64).sum(axis=1))


def ball_radius(length_N: ArrayLike, quantile: float) -> float:
    """Radius of the ball around zero that holds this share of the corpus."""
    return float(np.quantile(np.asarray(length_N, np.float64), quantile))


def ood_split(embedding_NE: NDArray[np.floating], quantile: float) -> NDArray[np.bool_]:
    """(N,), True where an embedding lies outside of the ball that holds `quantile` of all."""
    length_N = lengths(embedding_NE)
    return length_N > ball_radius(length_N, quantile)


def noise_images(num: int, image_size: int, seed: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Images of uniform noise, each by its own name: (sample id, uint8 HWC)."""
    for number in range(num):
        name = f"{NOISE_SPLIT}-{number // NOISE_PER_SHARD:05d}.tar/{number:08d}"
        rng = np.random.default_rng(sample_keys([name], seed).numpy().view(np.uint64))
        yield name, rng.integers(0, 256, (image_size, image_size, 3), np.uint8)


def fit_decoder(
    image_NHWC: np.ndarray,
    embedding_NE: np.ndarray,
    sample_ids: Sequence[str],
    preset: DecoderPreset,
    victim: str,
    seed: int,
    embed: Callable[[np.ndarray], np.ndarray] | None = None,
) -> MaskedDecoder:
    """Train a decoder on images that are in memory, by a plain loop: for benchmarks and small sets.

    The same objective, optimiser and masks as `jobs/train_clip.py`, whose batches are other draws.

    Args:
        image_NHWC: uint8, at the victim's size.
        embedding_NE: float32, the victim's embeddings of them.
        sample_ids: N of them; masks are drawn from (id, seed, epoch).
        preset: network and optimisation; an epoch's last batch, if it is short, is left out.
        victim: fingerprint.
        embed: the victim itself, uint8 (N, H, W, 3) -> float32 (N, E), where the preset fills with noise.

    Raises:
        Mistake: fewer images than a batch, or noise to embed and nobody to do it.
    """
    passes = [np.arange(len(image_NHWC))]
    if preset.ood_fill != "none":
        is_outside_N = ood_split(embedding_NE, preset.ood_quantile)
        inside, outside = np.flatnonzero(~is_outside_N), np.flatnonzero(is_outside_N)
        if preset.ood_fill == "split":
            passes = [inside, outside] if len(outside) else [inside]
        elif len(outside):
            if embed is None:
                raise Mistake("ood_fill is noise, and there is no victim to embed the noise; give `embed`")
            noise = dict(noise_images(len(outside), image_NHWC.shape[1], seed))
            sample_ids = [*(sample_ids[row] for row in inside.tolist()), *noise]
            noise_NHWC = np.stack(list(noise.values()))
            image_NHWC = np.concatenate([image_NHWC[inside], noise_NHWC])
            embedding_NE = np.concatenate([embedding_NE[inside], embed(noise_NHWC)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective = reconstruction(preset, image_NHWC.shape[1], Spread.of(embedding_NE), victim)
    optimiser = preset.build(objective)
    if len(passes[0]) < preset.batch_size:
        raise Mistake(f"{len(passes[0]):,} images to train the decoder on, fewer than a batch of {preset.batch_size}")
    per_epoch = sum(1 for part in passes for _ in _batches(part, preset.batch_size))
    num_steps = max(1, round(preset.epochs * per_epoch))
    image, embedding = torch.from_numpy(image_NHWC), torch.from_numpy(embedding_NE)
    batches: list[np.ndarray] = []
    keys_N = torch.empty(0)
    for step in range(num_steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            keys_N, rng = sample_keys(sample_ids, seed, epoch), np.random.default_rng([seed, epoch])
            mixed = [rng.permutation(part) if preset.shuffle else part for part in passes]
            batches = [rows for part in mixed for rows in _batches(part, preset.batch_size)]
        rows = torch.from_numpy(batches[place])
        for group in optimiser.param_groups:
            group["lr"] = preset.rate(step, num_steps)
        loss, _ = objective({"image": image[rows], "embedding": embedding[rows], "key": keys_N[rows]})
        optimiser.zero_grad()
        loss.backward()
        if preset.clip_norm:
            nn.utils.clip_grad_norm_(objective.parameters(), preset.clip_norm)
        optimiser.step()
    return objective.decoder.requires_grad_(False).eval()


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Rows in batches of one size; what is left over at the end is left out, unless it is all there is."""
    size = min(size, len(rows))
    return (rows[start : start + size] for start in range(0, len(rows) - size + 1, size))


@torch.inference_mode()
def embedding_use(decoder: MaskedDecoder, batch: dict[str, Tensor], mask_ratio: float) -> dict[str, float]:
    """Does the decoder read the embedding? Its error with the true, a neighbour's and the null embedding.

    A decoder whose error hardly grows with somebody else's embedding ignores it, and its scores mean nothing.
    """
    image_BCHW, embedding_BE = to_unit_range(batch["image"]), batch["embedding"].float()
    target_BLP = decoder.patchify(image_BCHW)
    mask_BL = random_mask(batch["key"], decoder.num_patches, mask_ratio)

    def error(embedding: Tensor) -> float:
        return float(reconstruction_error(decoder(image_BCHW, embedding, mask_BL), target_BLP, mask_BL).mean())

    errors = {"error_true": error(embedding_BE), "error_shuffled": error(embedding_BE.roll(1, dims=0))}
    return {**errors, "error_null": error(decoder.null(len(image_BCHW)))} if decoder.has_null else errors


# ------------------------------------------------------------------------------------------------ files


def save_decoder(folder: str | Path, decoder: MaskedDecoder, about: dict[str, Any]) -> None:
    """Write `decoder.json` and `decoder.safetensors`: tensors and settings, nothing executable."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().float().contiguous().cpu() for name, tensor in decoder.state_dict().items()}
    save_file(state, folder / ".decoder.safetensors")
    (folder / ".decoder.safetensors").replace(folder / "decoder.safetensors")
    description = {
        "shape": decoder.shape.model_dump(),
        "image_size": decoder.image_size,
        "embedding_dim": decoder.embedding_dim,
        "has_null": decoder.has_null,
        "has_reverse": decoder.has_reverse,
        "victim": decoder.victim,
        **about,
    }
    write_json(folder / "decoder.json", description)


def load_decoder(folder: str | Path) -> MaskedDecoder:
    """Load an exported decoder, frozen.

    Raises:
        Mistake: nothing there, not ours, or damaged.
    """
    folder = Path(folder)
    description = read_json(folder / "decoder.json", "exported decoder (decoder.json)")
    state = read_tensors(folder / "decoder.safetensors")
    try:
        shape = DecoderShape.model_validate(description["shape"])
        sizes = int(description["image_size"]), int(description["embedding_dim"])
        victim, has_null = str(description["victim"]), bool(description["has_null"])
        has_reverse = bool(description.get("has_reverse", False))
        if min(sizes) < 1 or shape.encoder_depth + shape.decoder_depth > len(state):
            raise ValueError(f"sizes {sizes}, {shape!r} for {len(state)} tensors")
        with torch.device("meta"):  # no memory yet: numbers in a JSON file may ask for any amount
            wanted = MaskedDecoder(shape, *sizes, has_reverse=has_reverse).state_dict()
    except (KeyError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise Mistake(f"{folder / 'decoder.json'} does not describe a decoder: {error!r}") from None
    refuse_unlike(state, wanted, folder / "decoder.safetensors", "decoder.json")
    decoder = MaskedDecoder(shape, *sizes, has_reverse=has_reverse)
    decoder.victim, decoder.has_null = victim, has_null
    decoder.load_state_dict(state)
    refuse_not_finite(decoder, folder / "decoder.safetensors")
    return decoder.requires_grad_(False).eval()
