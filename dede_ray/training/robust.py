"""Robust CLIP training: the published methods that filtering is compared with, as objectives of contrastive.py.

`Method` is the setting `clip.method`; each of its classes builds its objective. Where `num_views` is 2, a batch has a
second view of each sample beside the first: `image_view` (cut by `STRONG`) and `tokens_view` (`augment_caption`).

Some methods remember things from step to step: a pool of captions, every sample's similarity. They are the same on
every worker, change once per step (in `after_step`) and travel in checkpoints through `arrays`. They are no module
buffers, which DeepSpeed would round to 16 bits.

Shapes: B samples of a micro-batch, N samples of a worker's share, G samples of the global batch, S samples of the
corpus, P texts of the pool, E embedding width, K embeddings of one sample.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dede_ray.runtime.config import Config, Mistake
from dede_ray.runtime.libraries import open_clip
from dede_ray.training.augmentation import Augmentation
from dede_ray.training.contrastive import Contrastive, LossKind
from dede_ray.training.objective import Batch, Embeddings, gather_rows

# -------------------------------------------------------------------------------------------- settings


class _Method(Config):
    num_views: ClassVar[int] = 1

    def objective(
        self,
        model: nn.Module,
        described: dict[str, Any],
        loss_kind: LossKind = "info_nce",
        rank: int = 0,
        world: int = 1,
        num_samples: int = 0,
        steps_per_epoch: float = math.inf,
    ) -> Contrastive:
        """Build what DeepSpeed wraps.

        Args:
            model, described, loss_kind, rank, world: see `Contrastive`.
            num_samples: of the corpus; `place` of every batch counts them from 0.
            steps_per_epoch: samples of the corpus / samples of the global batch.

        Raises:
            Mistake: settings that do not fit the corpus.
        """
        return self._objective()(self, model, described, loss_kind, rank, world, num_samples, steps_per_epoch)

    def lr_scale(self, step: int, steps_per_epoch: float) -> float:
        """What the learning rate of a step is multiplied with."""
        return 1.0

    def _objective(self) -> type[_Robust]:
        return _Robust


class Plain(_Method):
    """CLIP as it is (Radford et al., arXiv:2103.00020)."""

    kind: Literal["plain"] = "plain"


class CleanCLIP(_Method):
    """Fine-tune on clean pairs, images and texts also among themselves (Bansal et al., arXiv:2303.03323).

    Meant for a CLIP that may carry a backdoor (`clip.init`) and pairs that do not; in the paper 10 epochs on 100,000
    pairs, with batch 64 and a learning rate around 1e-5.
    """

    kind: Literal["cleanclip"] = "cleanclip"
    num_views: ClassVar[int] = 2
    clip_weight: float = Field(1.0, ge=0)
    """Weight of the CLIP loss."""
    in_modal_weight: float = Field(1.0, ge=0)
    """Weight of the mean of the image-image and the text-text loss."""

    def _objective(self) -> type[_Robust]:
        return _WithViews


class RoCLIP(_Method):
    """Every few epochs, give each image the most similar text of a pool (Yang et al., arXiv:2303.06854)."""

    kind: Literal["roclip"] = "roclip"
    num_views: ClassVar[int] = 2
    every: int = Field(2, ge=1)
    """Captions are replaced in the last of so many epochs; the others are CLIP's."""
    pool_size: int = Field(44_032, ge=1)
    """Texts to choose from, the most recent ones of training; a few per cent of the corpus, or an image finds its own
    caption there."""

    def _objective(self) -> type[_Robust]:
        return _WithPool


class SafeCLIP(_Method):
    """CLIP loss for pairs that agree, in-modal losses for the others (Yang et al., arXiv:2310.05862).

    Images and texts are first trained among themselves, then an epoch as pairs at a low learning rate. From then on a
    mixture of two Gaussians divides the corpus at the beginning of every epoch by the cosine similarity of the pairs.
    """

    kind: Literal["safeclip"] = "safeclip"
    num_views: ClassVar[int] = 2
    warmup_epochs: int = Field(5, ge=0)
    """Epochs of in-modal losses only."""
    cross_epochs: int = Field(1, ge=1)
    """Epochs of the CLIP loss on everything, at the low learning rate."""
    cross_lr_scale: float = Field(0.01, gt=0, le=1)
    """What the learning rate is multiplied with in those epochs. Too low for the number of steps in them, and the first
    division is drawn by chance; too high, and poisoned pairs agree as well."""
    min_posterior: float = Field(0.9, gt=0, lt=1)
    """Posterior of the more similar component above which a pair is safe, at the first division."""
    growth: float = Field(0.01, ge=0)
    """Share of the corpus by which the safe set grows at each later division."""
    max_safe_share: float = Field(0.85, gt=0, le=1)
    """Share of the corpus at which the safe set stops growing."""

    def lr_scale(self, step: int, steps_per_epoch: float) -> float:
        """Low while pairs meet for the first time: learnt too fast, poisoned pairs would agree like the others."""
        return self.cross_lr_scale if self.phase(_epoch(step, steps_per_epoch)) == "cross" else 1.0

    def phase(self, epoch: int) -> Literal["warmup", "cross", "divided"]:
        """What is trained in an epoch, counted from 0."""
        if epoch < self.warmup_epochs:
            return "warmup"
        return "cross" if epoch < self.warmup_epochs + self.cross_epochs else "divided"

    def _objective(self) -> type[_Robust]:
        return _WithSafeSet


Method = Annotated[Plain | CleanCLIP | RoCLIP | SafeCLIP, Field(discriminator="kind")]


def _epoch(step: int, steps_per_epoch: float) -> int:
    """The epoch, counted from 0, that a step falls in; one that begins within a batch begins with the next step."""
    return math.floor(step / steps_per_epoch + 1e-9)


class _Robust(Contrastive):
    """An objective that knows its method's settings, the corpus and where in it training is."""

    def __init__(
        self,
        settings: Any,
        model: nn.Module,
        described: dict[str, Any],
        loss_kind: LossKind,
        rank: int,
        world: int,
        num_samples: int,
        steps_per_epoch: float,
    ):
        super().__init__(model, described, loss_kind, rank, world)
        self.settings, self.loss_kind = settings, loss_kind
        self.num_samples, self.steps_per_epoch = num_samples, steps_per_epoch


# -------------------------------------------------------------------------------------------- CleanCLIP


class _WithViews(_Robust):
    def __init__(self, *args: Any):
        super().__init__(*args)
        rank, world = self.rank, self.world
        self.compare_views = open_clip.ClipLoss(
            local_loss=world > 1, gather_with_grad=world > 1, cache_labels=True, rank=rank, world_size=world
        )

    def encode(self, batch: Batch) -> tuple[Embeddings, Tensor, Tensor | None]:
        return _embed_both(self, batch)

    def loss(self, embeddings: Embeddings, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        pairs, metrics = super().loss(embeddings, scale, bias)
        image = self.compare_views(embeddings["image"], embeddings["image_view"], scale)
        text = self.compare_views(embeddings["text"], embeddings["text_view"], scale)
        total = self.settings.clip_weight * pairs + self.settings.in_modal_weight * (image + text) / 2
        return total, {**metrics, "in_modal_image": image.detach(), "in_modal_text": text.detach()}


def _embed_both(objective: Contrastive, batch: Batch) -> tuple[Embeddings, Tensor, Tensor | None]:
    """Both views in one forward pass, where ZeRO-3 fetches each parameter once."""
    image_BHWC = torch.cat([batch["image"], batch["image_view"]])
    found, scale, bias = objective.embed(image_BHWC, torch.cat([batch["tokens"], batch["tokens_view"]]))
    image, image_view = found["image"].chunk(2)
    text, text_view = found["text"].chunk(2)
    return {"image": image, "text": text, "image_view": image_view, "text_view": text_view}, scale, bias


# -------------------------------------------------------------------------------------------- RoCLIP


class _WithPool(_Robust):
    """Looks texts up by the image, as the paper (since its second version) and the released code do.

    A caption's own nearest neighbour would be the same target caption of another poisoned sample. The image, before the
    backdoor is learnt, still resembles what it shows.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        if self.settings.pool_size >= self.num_samples:
            raise Mistake(
                f"roclip: pool_size {self.settings.pool_size:,} holds the whole corpus of {self.num_samples:,}, "
                "so that each image may find its own caption again; choose about 2 % of it, "
                f"{max(1, self.num_samples // 50):,}"
            )
        self.is_matching = False
        self.pool_PE: Tensor | None = None  # oldest first
        self._seen: tuple[Tensor, Tensor] | None = None

    def begin_step(self, step: int) -> None:
        self.is_matching = (_epoch(step, self.steps_per_epoch) + 1) % self.settings.every == 0

    def encode(self, batch: Batch) -> tuple[Embeddings, Tensor, Tensor | None]:
        """The second views only: the paper augments whatever it trains on."""
        embeddings, scale, bias = self.embed(batch["image_view"], batch["tokens_view"])
        embeddings["place"] = batch["place"]
        if self.is_matching and self.pool_PE is not None:  # empty in a run's very first step
            self.pool_PE = self.pool_PE.to(scale.device)
            embeddings["match"] = nearest(embeddings["image"].detach(), self.pool_PE)
        return embeddings, scale, bias

    def loss(self, embeddings: Embeddings, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if torch.is_grad_enabled():
            self._seen = embeddings["place"], embeddings["text"].detach()
        if "match" not in embeddings:
            return super().loss(embeddings, scale, bias)
        image_NE, match_NE = embeddings["image"], embeddings["match"]
        loss = self.compare(image_NE, match_NE, scale, *([] if bias is None else [bias]))
        # The pool gives no gradient; zeros keep the text tower in the graph, where DeepSpeed expects it.
        loss = loss + 0 * embeddings["text"].sum()
        return loss, {
            "cosine": (image_NE * embeddings["text"]).detach().sum(dim=-1).mean(),
            "match_cosine": (image_NE * match_NE).detach().sum(dim=-1).mean(),
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Take the batch's texts into the pool; only now, so that no image finds its own."""
        super().after_step()
        if self._seen is None:
            return
        place_G, text_GE = (gather_rows(rows, self.world) for rows in self._seen)
        text_GE = text_GE[place_G.argsort(stable=True)]  # the same order for any number of workers
        older = [] if self.pool_PE is None else [self.pool_PE.to(text_GE.device)]
        self.pool_PE = torch.cat([*older, text_GE])[-self.settings.pool_size :]
        self._seen = None

    def arrays(self) -> dict[str, np.ndarray]:
        return {} if self.pool_PE is None else {"pool": self.pool_PE.cpu().numpy()}

    def load_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        self.pool_PE = torch.from_numpy(arrays["pool"].copy()) if "pool" in arrays else None


def nearest(query_NE: Tensor, pool_PE: Tensor) -> Tensor:
    """The pool's row of largest dot product for each query, (N, E); in pieces, as N x P may not fit in memory."""
    return torch.cat([pool_PE[(rows_ME @ pool_PE.T).argmax(dim=1)] for rows_ME in query_NE.split(512)])


# -------------------------------------------------------------------------------------------- SafeCLIP


class _WithSafeSet(_Robust):
    """Similarities are those of training, the last time that each pair was seen, so that no extra pass is needed.

    A pair that has not been seen yet is not safe.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.phase = self.settings.phase(0)
        self.similarity_S = np.full(self.num_samples, np.nan, np.float32)
        self.is_safe_S = np.zeros(self.num_samples, bool)
        self.safe_share = 0.0
        self._seen: tuple[Tensor, Tensor] | None = None

    def begin_step(self, step: int) -> None:
        """Divide the corpus when an epoch begins."""
        epoch = _epoch(step, self.steps_per_epoch)
        self.phase = self.settings.phase(epoch)
        if self.phase == "divided" and epoch > _epoch(step - 1, self.steps_per_epoch):
            self._divide()

    def _divide(self) -> None:
        if self.rank == 0:
            self.is_safe_S, self.safe_share = divide(self.similarity_S, self.safe_share, self.settings)
        if self.world > 1:  # not fitted by everyone: rounding may differ from machine to machine
            packed = torch.from_numpy(np.append(self.is_safe_S, self.safe_share))  # float64
            packed = packed.to(self.model.logit_scale.device)
            torch.distributed.broadcast(packed, 0)
            self.is_safe_S, self.safe_share = packed[:-1].cpu().numpy() > 0, float(packed[-1])

    def encode(self, batch: Batch) -> tuple[Embeddings, Tensor, Tensor | None]:
        if self.phase == "cross":
            embeddings, scale, bias = self.embed(batch["image"], batch["tokens"])
        else:
            embeddings, scale, bias = _embed_both(self, batch)
        return {**embeddings, "place": batch["place"]}, scale, bias

    def loss(self, embeddings: Embeddings, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Every sample weighs the same: safe ones by the CLIP loss among safe ones, the others in-modal among others.

        So the global loss is the mean over the workers, although each has its own number of safe samples.
        """
        names = [name for name in embeddings if name != "place"]
        everyone_GKE = gather_rows(torch.stack([embeddings[name] for name in names], dim=1), self.world)
        everyone = dict(zip(names, everyone_GKE.unbind(dim=1), strict=True))
        place_G = gather_rows(embeddings["place"], self.world)
        similarity_G = (everyone["image"] * everyone["text"]).detach().sum(dim=1)
        if torch.is_grad_enabled() and self.phase != "warmup":
            self._seen = place_G, similarity_G
        num_own = len(embeddings["place"])
        is_own_G = torch.arange(len(place_G), device=scale.device) // num_own == self.rank
        is_safe_G = self._is_safe(place_G)

        def among(member_G: Tensor, one: str, other: str, kind: LossKind = "info_nce") -> Tensor:
            """Sum, over our members, of the loss of `one` that has to find its `other` among all members'."""
            logits_MM = scale * everyone[one][member_G & is_own_G] @ everyone[other][member_G].T
            own_M = (member_G.cumsum(dim=0) - 1)[member_G & is_own_G]  # where ours are among all members
            if kind == "info_nce":
                return functional.cross_entropy(logits_MM, own_M, reduction="sum")
            assert bias is not None
            is_own_MM = own_M[:, None] == torch.arange(logits_MM.shape[1], device=scale.device)
            return -functional.logsigmoid(torch.where(is_own_MM, 1, -1) * (logits_MM + bias)).sum()

        if self.loss_kind == "siglip":  # symmetric in itself
            loss = among(is_safe_G, "image", "text", "siglip")
        else:
            loss = (among(is_safe_G, "image", "text") + among(is_safe_G, "text", "image")) / 2
        if self.phase != "cross":
            for one, other in (("image", "image_view"), ("text", "text_view")):
                views = among(~is_safe_G, one, other) + among(~is_safe_G, other, one)
                loss = loss + views / 4  # the mean of both directions, and of images and texts
        cosine = similarity_G[is_own_G].mean()
        return loss / num_own, {"cosine": cosine, "safe_share": is_safe_G.float().mean()}

    def _is_safe(self, place_G: Tensor) -> Tensor:
        if self.phase == "divided":
            return torch.from_numpy(self.is_safe_S[place_G.cpu().numpy()]).to(place_G.device)
        return torch.full_like(place_G, self.phase == "cross", dtype=torch.bool)

    def after_step(self) -> None:
        """Remember the batch's similarities."""
        super().after_step()
        if self._seen is None:
            return
        place_G, similarity_G = (rows.cpu().numpy() for rows in self._seen)
        order = similarity_G.argsort()  # of a sample that is twice in the batch, the larger: independent of their order
        self.similarity_S[place_G[order]] = similarity_G[order]
        self._seen = None

    def arrays(self) -> dict[str, np.ndarray]:
        share = np.array([self.safe_share])
        return {"similarity": self.similarity_S.copy(), "is_safe": self.is_safe_S.copy(), "safe_share": share}

    def load_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        assert arrays["similarity"].shape == self.similarity_S.shape, "a checkpoint of another corpus"
        self.similarity_S, self.is_safe_S = arrays["similarity"].copy(), arrays["is_safe"].copy()
        self.safe_share = float(arrays["safe_share"][0])


def divide(similarity_S: np.ndarray, safe_share: float, settings: SafeCLIP) -> tuple[np.ndarray, float]:
    """Divide the corpus into safe pairs and others.

    Args:
        similarity_S: float32, NaN where unknown.
        safe_share: safe pairs / pairs at the last division; 0 at the first.

    Returns:
        bool (S,), True where safe, and the new share.
    """
    posterior_S = clean_posterior(similarity_S)
    if safe_share == 0:
        is_safe_S = posterior_S > settings.min_posterior
        return is_safe_S, float(is_safe_S.mean())
    share = min(safe_share + settings.growth, settings.max_safe_share)
    best_first = np.lexsort((-np.nan_to_num(similarity_S, nan=-2), -posterior_S))
    is_safe_S = np.zeros(len(similarity_S), bool)
    is_safe_S[best_first[: int(share * len(similarity_S))]] = True
    return is_safe_S & np.isfinite(similarity_S), share


def clean_posterior(similarity_S: np.ndarray) -> np.ndarray:
    """Probability of each pair to belong to the more similar of two Gaussians, float64 (S,) in [0, 1]; 0 if unknown."""
    from sklearn.mixture import GaussianMixture  # seconds of import, which other methods need not pay

    is_known_S = np.isfinite(similarity_S)
    known_M1 = similarity_S[is_known_S].astype(np.float64)[:, None]
    # The fit adds 1e-6 to variances.
    known_M1 = (known_M1 - known_M1.mean()) / max(known_M1.std(), 1e-12)
    stride = max(1, len(known_M1) // 1_000_000)  # a million fix two Gaussians
    mixture = GaussianMixture(2, random_state=0).fit(known_M1[::stride])
    posterior_M = mixture.predict_proba(known_M1)[:, mixture.means_.argmax()]
    # Far below both means, the wider Gaussian wins whichever it is.
    posterior_M[known_M1[:, 0] < mixture.means_.min()] = 0
    posterior_S = np.zeros(len(similarity_S))
    posterior_S[is_known_S] = posterior_M
    return posterior_S


# -------------------------------------------------------------------------------------------- second views


STRONG = Augmentation(
    min_scale=0.2, max_aspect=4 / 3, flip=True, jitter_probability=0.8, grey_probability=0.2, blur_probability=0.5
)
"""SimCLR's augmentation with colours of strength 0.5 (Chen et al., arXiv:2002.05709, appendix A)."""


def augment_caption(caption: str, rng: np.random.Generator) -> str:
    """Delete, swap or duplicate a tenth of the words, one at least; at least one word stays.

    Like EDA (Wei and Zou, arXiv:1901.11196), whose other two operations need WordNet's synonyms, which we do without.
    A caption without words comes back as it is.
    """
    words = caption.split()
    if not words:
        return caption
    operation = rng.integers(3)
    for _ in range(max(1, round(len(words) / 10))):
        one, other = rng.integers(len(words), size=2)
        if operation == 0 and len(words) > 1:
            del words[one]
        elif operation == 1:
            words[one], words[other] = words[other], words[one]
        elif operation == 2:
            words.insert(other, words[one])
    return " ".join(words)
