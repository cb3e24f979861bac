"""DeDe: rebuild the image from the victim's embedding; a triggered image carries somebody else's (decoder.py).

Hou et al., "DeDe: Detecting Backdoor Samples for SSL Encoders via Decoders", CVPR 2025, arXiv:2411.16154.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from dede_ray.config import Mistake
from dede_ray.decoder import (
    MaskedDecoder,
    load_decoder,
    num_visible_patches,
    random_mask,
    reconstruction_error,
    sample_keys,
)
from dede_ray.detectors.contract import Batch, DetectorSettings, Need, Scorer, State, as_scores
from dede_ray.victims import Victim, fingerprint


class DeDe(DetectorSettings):
    """Reconstruction error of the DeDe decoder (Hou et al., CVPR 2025, arXiv:2411.16154).

    `dede_sum` is the published score: squared error summed over the hidden pixels, here in [0, 1] pixel units (the
    published code sums in normalised units, a constant factor). `dede_mean` divides by their number. `dede_null_ratio`
    is ours: log E(x | embedding) - log E(x | null embedding), which cancels how hard the image is to draw: a clean
    image gains from its own embedding, a triggered one should not. `dede_null`, a control, is the error without the
    victim: whatever it separates is visible in the pixels, no backdoor needed.
    """

    kind: Literal["dede"] = "dede"
    needs: ClassVar[frozenset[Need]] = frozenset({"image"})
    decoder: str
    """Folder that train_clip's decoder section exported."""
    score_mask_ratio: float = Field(0.99, gt=0, lt=1)
    """Hidden patches / patches while scoring; with 64 patches 0.99 leaves none visible."""
    num_masks: int = Field(4, ge=1)
    """Masks averaged where patches are visible; without visible patches one is exact."""
    seed: int = 0

    def open(self, victim: Victim, state: State) -> Scorer:
        return _DeDeScorer(self, victim)

    def located(self) -> DeDe:
        """The same with absolute paths, for Ray's workers, whose working folder may be another."""
        return self.model_copy(update={"decoder": str(Path(self.decoder).absolute())})


class _DeDeScorer:
    def __init__(self, config: DeDe, victim: Victim):
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
        self.num_masks = config.num_masks if num_visible_patches(decoder.num_patches, config.score_mask_ratio) else 1
        self.num_hidden = decoder.num_patches - num_visible_patches(decoder.num_patches, config.score_mask_ratio)
        self.fingerprint = fingerprint(decoder, config.model_dump(exclude={"decoder"}))
        null = ("dede_null_ratio", "dede_null") if decoder.has_null else ()
        self.columns: tuple[str, ...] = ("dede_sum", "dede_mean", *null)
        self.controls: tuple[str, ...] = null[1:]

    @torch.inference_mode()
    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        decoder, image_BCHW = self.decoder, batch.images
        target_BLP = decoder.patchify(image_BCHW)
        error_B = torch.zeros(len(image_BCHW), device=image_BCHW.device)
        null_B = torch.zeros_like(error_B)
        for repeat in range(self.num_masks):
            keys_B = sample_keys(batch.sample_ids, self.config.seed, repeat).to(image_BCHW.device)
            mask_BL = random_mask(keys_B, decoder.num_patches, self.config.score_mask_ratio)
            patches_BLP = decoder(image_BCHW, batch.embedding_BE, mask_BL)
            error_B += reconstruction_error(patches_BLP, target_BLP, mask_BL)
            if decoder.has_null:
                patches_BLP = decoder(image_BCHW, decoder.null(len(image_BCHW)), mask_BL)
                null_B += reconstruction_error(patches_BLP, target_BLP, mask_BL)
        mean_B, null_B = error_B / self.num_masks, null_B / self.num_masks
        scores = {"dede_sum": mean_B * self.num_hidden * target_BLP.shape[-1], "dede_mean": mean_B}
        if decoder.has_null:
            scores["dede_null_ratio"] = (mean_B + 1e-8).log() - (null_B + 1e-8).log()
            scores["dede_null"] = null_B
        return as_scores(scores)
