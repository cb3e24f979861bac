"""How the DeDe decoder learns: presets, the training objective, and what becomes of samples with long embeddings.

`PRESETS` are complete settings; `Reconstruction` is the objective, error over hidden patches with trimming and the
reverse direction. decoder.py trains it on shards; `fit_decoder` does the same in memory, by a plain loop.

Shapes: as in models/decoder.py; N images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from dede_ray.data.images import to_unit_range
from dede_ray.data.sampling import keyed_uniform, sample_generator, sample_keys
from dede_ray.models.decoder import DecoderShape, MaskedDecoder, embedding_error, random_mask, reconstruction_error
from dede_ray.runtime.config import Mistake
from dede_ray.training.objective import Objective
from dede_ray.training.optimiser import Optimisation

# ------------------------------------------------------------------------------------------------ presets


OodFill = Literal["none", "split", "noise"]
"""What becomes of samples whose embeddings are longer than most. Where few samples lie, a decoder learns hardly
anything but these, and then rebuilds a poison well that makes embeddings long (CTRL). Publication and code disagree.

- none: nothing.
- noise, after the publication's text: they are left out, and as many images of random noise take their place.
- split, after the published code, where the noise is commented out: they are kept apart, and every epoch is a pass over
  the others, then one over them."""


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


class Reconstruction(Objective):
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


@dataclass(frozen=True)
class Spread:
    """Scale, mean and spread of the training data's embeddings."""

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
        rng = sample_generator(name, seed)
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

    The same objective, optimiser and masks as decoder.py has, but other batches.

    Args:
        image_NHWC: uint8, at the victim's size.
        embedding_NE: float32, the victim's embeddings of them.
        sample_ids: N of them; masks are drawn from (id, seed, epoch).
        preset: network and optimisation; an epoch's last batch, if it is short, is left out.
        victim: fingerprint.
        embed: the victim itself, uint8 (N, H, W, 3) -> float32 (N, E), where the preset fills with noise.

    Raises:
        Mistake: fewer images than a batch, or noise to embed and no victim to do it.
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

    A decoder whose error hardly grows with another image's embedding ignores it, and its scores mean nothing.
    """
    image_BCHW, embedding_BE = to_unit_range(batch["image"]), batch["embedding"].float()
    target_BLP = decoder.patchify(image_BCHW)
    mask_BL = random_mask(batch["key"], decoder.num_patches, mask_ratio)

    def error(embedding: Tensor) -> float:
        return float(reconstruction_error(decoder(image_BCHW, embedding, mask_BL), target_BLP, mask_BL).mean())

    errors = {"error_true": error(embedding_BE), "error_shuffled": error(embedding_BE.roll(1, dims=0))}
    return {**errors, "error_null": error(decoder.null(len(image_BCHW)))} if decoder.has_null else errors
