"""DeDe: rebuild the image from the victim's embedding; a triggered image carries another one's (models/decoder.py).

Hou et al., "DeDe: Detecting Backdoor Samples for SSL Encoders via Decoders", CVPR 2025, arXiv:2411.16154.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dede_ray.detectors.contract import (
    DetectorSettings,
    Scorer,
    State,
    as_scores,
    residual_projection,
    state_fingerprint,
)
from dede_ray.models.decoder import (
    MaskedDecoder,
    embedding_error,
    load_decoder,
    num_visible_patches,
    random_mask,
    reconstruction_error,
)
from dede_ray.models.embedding import Batch, Need
from dede_ray.models.victims import Victim, fingerprint
from dede_ray.runtime.config import Mistake

NULL = ("dede_null_ratio", "dede_null")


class DeDe(DetectorSettings):
    """Reconstruction error of the DeDe decoder, and what else the same network says.

    `dede_sum` is the published score: squared error summed over the hidden pixels, here in [0, 1] pixel units (the
    published code sums in normalised units, a constant factor). `dede_mean` divides by their number.

    The others are ours. `dede_reverse` runs the network backwards: from some visible patches its encoder predicts the
    embedding, and the score is how far the true one is from the mean of `num_masks` predictions (the difference
    is `dede_residual`, a vector). `dede_null_ratio`: log E(x | embedding) - log E(x | null embedding), which cancels
    how hard the image is to draw: a clean image gains from its own embedding, a triggered one should not.
    `dede_swap_rank`: the share of other samples' embeddings that would rebuild the image better than its own.
    `dede_null`, a control, is the error without the victim: whatever it separates is visible in the pixels, no backdoor
    needed.
    """

    kind: Literal["dede"] = "dede"
    needs: ClassVar[frozenset[Need]] = frozenset({"image"})
    decoder: str
    """Folder that train_clip's decoder section exported."""
    score_mask_ratio: float = Field(0.99, gt=0, lt=1)
    """Hidden patches / patches while scoring; with 64 patches 0.99 leaves none visible."""
    reverse_mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Hidden patches / patches in the reverse direction; at least one has to be visible."""
    num_masks: int = Field(4, ge=1)
    """Masks averaged where patches are visible; without visible patches one is exact."""
    num_swaps: int = Field(0, ge=0)
    """Embeddings of other samples for the swap rank, each one more pass of the decoder; 0 leaves it out."""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the decoder; images, masks and errors are float32 either way."""

    @property
    def gives(self) -> tuple[str, ...]:
        swap = ("dede_swap_rank",) if self.num_swaps else ()
        return ("dede_sum", "dede_mean", "dede_reverse", *swap, *NULL)

    @property
    def gives_controls(self) -> tuple[str, ...]:
        return NULL[1:]

    @property
    def fits(self) -> bool:  # type: ignore[override]
        return self.num_swaps > 0

    def fit(self, pool: Batch, clean: Batch | None) -> State:
        """Draw the other samples' embeddings, where a swap rank is wanted."""
        if not self.num_swaps:
            return {}
        drawn = pool.keys(self.seed).argsort()[: self.num_swaps]
        if len(drawn) < self.num_swaps:
            raise Mistake(f"dede: {len(drawn)} samples to fit on, fewer than num_swaps {self.num_swaps}")
        return {"swap": pool.part(drawn.tolist()).embedding_BE}

    def open(self, victim: Victim, state: State) -> Scorer:
        return _DeDeScorer(self, victim, state)

    def located(self) -> DeDe:
        return self.model_copy(update={"decoder": str(Path(self.decoder).absolute())})


class _DeDeScorer:
    def __init__(self, config: DeDe, victim: Victim, state: State):
        self.decoder: MaskedDecoder = load_decoder(config.decoder).to(victim.device)
        decoder, self.config = self.decoder, config
        if (decoder.embedding_dim, decoder.image_size) != (victim.embedding_dim, victim.image_size):
            raise Mistake(
                f"the decoder at {config.decoder} expects embeddings of width {decoder.embedding_dim} of "
                f"{decoder.image_size}-px images, victim {victim.name} gives {victim.embedding_dim} of "
                f"{victim.image_size} px; train a decoder for this victim, or name the victim it was trained on"
            )
        if decoder.victim != victim.fingerprint:
            raise Mistake(
                f"the decoder at {config.decoder} was trained against another victim (fingerprint "
                f"{decoder.victim[:12]}) than {victim.name} ({victim.fingerprint[:12]}), so its errors would mean "
                "nothing; train a decoder for this victim"
            )
        if decoder.has_reverse and not num_visible_patches(decoder.num_patches, config.reverse_mask_ratio):
            raise Mistake(
                f"dede: reverse_mask_ratio {config.reverse_mask_ratio:g} leaves none of {decoder.num_patches} patches "
                "visible, so there is nothing to predict an embedding from; lower it"
            )
        num_visible = num_visible_patches(decoder.num_patches, config.score_mask_ratio)
        self.num_masks = config.num_masks if num_visible else 1
        self.num_hidden = decoder.num_patches - num_visible
        self.swap_JE = state["swap"].to(victim.device) if config.num_swaps else torch.empty(0, decoder.embedding_dim)
        self.fingerprint = fingerprint(
            decoder, {**config.model_dump(exclude={"decoder"}), "state": state_fingerprint(None, state)}
        )
        lacking = {*(() if decoder.has_reverse else ("dede_reverse",)), *(() if decoder.has_null else NULL)}
        self.columns = tuple(column for column in config.gives if column not in lacking)
        self.controls = tuple(column for column in config.gives_controls if column not in lacking)
        self.projection_ER = residual_projection(victim.embedding_dim).to(victim.device)
        self.vectors = {"dede_residual": self.projection_ER.shape[1]} if decoder.has_reverse else {}

    @torch.inference_mode()
    def score(self, batch: Batch, with_vectors: bool = False) -> dict[str, np.ndarray]:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return as_scores(self._score(batch, with_vectors))

    def _score(self, batch: Batch, with_vectors: bool) -> dict[str, Tensor]:
        image_BCHW, decoder = batch.images, self.decoder
        others = [swap_E.expand(len(batch), -1) for swap_E in self.swap_JE]
        null = [decoder.null(len(batch))] if decoder.has_null else []
        error_B, *others_JB = self._errors(batch, [batch.embedding_BE, *others, *null])
        null_B = others_JB.pop() if decoder.has_null else None
        scores = {"dede_sum": error_B * self.num_hidden * 3 * decoder.patch_px**2, "dede_mean": error_B}
        if decoder.has_reverse:
            predicted_BE = torch.stack([decoder.predict(image_BCHW, mask_BL) for mask_BL in self._reverse_masks(batch)])
            true_BE = decoder.standardise(batch.embedding_BE)
            expected_BE = predicted_BE.mean(dim=0)
            scores["dede_reverse"] = embedding_error(expected_BE, true_BE)
            if with_vectors:
                scores["dede_residual"] = (true_BE - expected_BE).double() @ self.projection_ER
        if others_JB:
            scores["dede_swap_rank"] = (torch.stack(others_JB) < error_B).float().mean(dim=0)
        if null_B is not None:
            scores["dede_null_ratio"] = (error_B + 1e-8).log() - (null_B + 1e-8).log()
            scores["dede_null"] = null_B
        return scores

    def _errors(self, batch: Batch, embeddings: list[Tensor]) -> list[Tensor]:
        """Reconstruction error (B,) with each of these embeddings, averaged over the masks.

        What is the same for several of them is computed once: what the decoder sees of the image, and, where it sees
        nothing of it, what it draws from an embedding that all samples share.
        """
        decoder, target_BLP = self.decoder, self.decoder.patchify(batch.images)
        errors = [torch.zeros(len(batch), device=batch.device) for _ in embeddings]
        is_blind = self.num_hidden == decoder.num_patches
        for repeat in range(self.num_masks):
            mask_BL = self._mask(batch, self.config.score_mask_ratio, repeat)
            seen_BLD = decoder.see(batch.images, mask_BL)
            for error_B, embedding_BE in zip(errors, embeddings, strict=True):
                is_shared = is_blind and embedding_BE.stride(0) == 0
                rows = slice(0, 1) if is_shared else slice(None)
                patches_BLP = decoder.decode(seen_BLD[rows], embedding_BE[rows])
                error_B += reconstruction_error(patches_BLP, target_BLP, mask_BL)
        return [error_B / self.num_masks for error_B in errors]

    def _reverse_masks(self, batch: Batch) -> Iterator[Tensor]:
        for repeat in range(self.config.num_masks):
            yield self._mask(batch, self.config.reverse_mask_ratio, repeat, 1)

    def _mask(self, batch: Batch, ratio: float, *repeat: int) -> Tensor:
        keys_B = batch.keys(self.config.seed, *repeat).to(batch.device)
        return random_mask(keys_B, self.decoder.num_patches, ratio)
