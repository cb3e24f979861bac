"""ASSET: train a small network to be indifferent on clean samples and excited by what looks poisoned.

Pan et al., "ASSET: Robust Backdoor Data Detection Across a Multiplicity of Deep Learning Paradigms", USENIX Security
2023. Each mini-batch of the suspected set takes four steps:

1. offset down: on as many clean (base) samples, minimise the variance of the network's logits;
2. nested concentration: a new network learns to separate this mini-batch from these base samples. Clean ones
   cannot be separated and stay in the middle, poisoned ones can;
3. select what lies out, by the adjusted outlyingness of that network's outputs;
4. offset up: on the selected samples, undo what the first step did.

Two users of these steps are here, and only the second is the publication:

- `Asset`, a **variant** for corpora without labels and for scoring in one pass: a two-layer network on frozen
  embeddings, whose logits' variance is what goes up, and is the score. It is no published method.
- `asset_published`, for labelled images: a fresh image classifier, whose cross-entropy goes up on selected samples and
  is the score.

Shapes: N suspected samples, P of them in a mini-batch, B base samples or any batch, D feature width, K logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dede_ray.detectors.contract import DetectorSettings, Scorer, State, as_scores, state_fingerprint
from dede_ray.models.embedding import Batch
from dede_ray.models.encoders import ResNet, build_encoder
from dede_ray.models.victims import Victim
from dede_ray.runtime.config import Config, Mistake

MIN_BASE = 16
"""Clean samples without which nothing is trained; the publication takes 1,000, its adaptation to CLIP 100."""
TINY = 1e-12  # a fence without extent
CONSTANT = 1e-6  # a dimension whose deviation is this share of its mean is rounding

ThresholdRule = Literal["intent", "compat"]
"""What the publication means, and what its public code computes."""

# ---------------------------------------------------------------------------------- what lies out of a mini-batch


def medcouple(values: ArrayLike) -> float:
    """Skewness in [-1, 1] from medians, 0 for symmetric values (Brys, Hubert & Struyf, J. Comput. Graph. Stat. 2004).

    The median, over all pairs of a value above (or at) the median and one below (or at) it, of how much further the
    first is: ((upper - median) - (median - lower)) / (upper - lower). In O(n**2): for mini-batches.
    """
    from_median = np.sort(np.asarray(values, np.float64))
    from_median = from_median - np.median(from_median)
    upper, lower = from_median[from_median >= 0], from_median[from_median <= 0]
    distance = upper[:, None] - lower[None, :]
    kernel = (upper[:, None] + lower[None, :]) / np.where(distance > 0, distance, 1)
    # Pairs of values that equal the median: the k * k of them are counted as if those in front were a little lower.
    num_tied = int((from_median == 0).sum())
    place = np.arange(num_tied)
    kernel[:num_tied, lower.size - num_tied :] = np.sign(place[:, None] + place[None, :] - (num_tied - 1))
    return float(np.median(kernel))


def adjusted_outlyingness(values: ArrayLike) -> NDArray[np.float64]:
    """How far each value lies from the median, in units of the fence on its side; above 1 is outside.

    The fences are those of the boxplot for skewed values (Hubert & Vandervieren, Comput. Stat. Data Anal. 2008).
    """
    values = np.asarray(values, np.float64)
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    skew, reach = medcouple(values), 1.5 * (high - low)
    down, up = (-4, 3) if skew >= 0 else (-3, 4)
    below = median - (low - math.exp(down * skew) * reach)
    above = (high + math.exp(up * skew) * reach) - median
    return np.where(values >= median, (values - median) / max(above, TINY), (median - values) / max(below, TINY))


class Nested(Config):
    """Steps 2 and 3: the network made anew for each mini-batch, and who is selected by it."""

    hidden: int = Field(128, ge=1, le=8192)
    """Units of its two hidden layers; 128 in the publication's demonstration, 512 in DeDe's adaptation."""
    rounds: int = Field(100, ge=1)
    """Its gradient steps; 100 in the demonstration, 10 in the adaptation."""
    learning_rate: float = Field(1e-4, gt=0)
    """Learning rate of its Adam."""
    loss: Literal["cross_entropy", "squared"] = "cross_entropy"
    """What pushes outputs to 1 and 0: the paper writes the binary cross-entropy, its code takes the squared error."""
    outlyingness: float = Field(2.0, gt=0)
    """Adjusted outlyingness above which a sample is selected, on either side."""

    def select(self, suspected_PD: Tensor, base_BD: Tensor, generator: torch.Generator) -> Tensor:
        """Train the network and name the samples that lie out, bool (P,)."""
        outlyingness_P = adjusted_outlyingness(self.concentrate(suspected_PD, base_BD, generator).cpu().numpy())
        return torch.from_numpy(outlyingness_P > self.outlyingness).to(suspected_PD.device)

    def concentrate(self, suspected_PD: Tensor, base_BD: Tensor, generator: torch.Generator) -> Tensor:
        """How sure a new network is that each suspected sample is one, float32 (P,) in [0, 1]."""
        widths = (suspected_PD.shape[1], self.hidden, self.hidden, 1)
        layers = random_layers(widths, generator, suspected_PD.device)
        optimiser = torch.optim.Adam(layers, lr=self.learning_rate)
        both_D = torch.cat([suspected_PD, base_BD])
        target = torch.cat([torch.ones(len(suspected_PD)), torch.zeros(len(base_BD))]).to(both_D)
        # Each side weighs the same, however many there are.
        weight = torch.where(target == 1, 0.5 / len(suspected_PD), 0.5 / len(base_BD))
        for _ in range(self.rounds):
            logit = apply_layers(layers, both_D)[:, 0]
            if self.loss == "squared":
                loss = (weight * (logit.sigmoid() - target).square()).sum()
            else:
                loss = functional.binary_cross_entropy_with_logits(logit, target, weight, reduction="sum")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return apply_layers(layers, suspected_PD)[:, 0].sigmoid().detach()


def random_layers(widths: Sequence[int], generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """Weights and biases of a fully connected network, as nn.Linear draws them, from a generator of one's own."""
    layers = []
    for inputs, outputs in pairwise(widths):
        for shape in ((outputs, inputs), (outputs,)):
            uniform = 2 * torch.rand(shape, generator=generator) - 1
            layers.append((uniform / math.sqrt(inputs)).to(device).requires_grad_())
    return layers


def apply_layers(layers: Sequence[Tensor], input_BD: Tensor) -> Tensor:
    """Outputs of that network, with ReLUs between its layers."""
    x = input_BD
    for i in range(0, len(layers), 2):
        x = functional.linear(x.relu() if i else x, layers[i], layers[i + 1])
    return x


# ------------------------------------------------------------------------------------------- the loop of both forms


def push_apart(
    parameters: Sequence[Tensor],
    lower: Callable[[Tensor], Tensor],
    higher: Callable[[Tensor], Tensor],
    suspected_ND: Tensor,
    base_BD: Tensor,
    settings: Asset | PublishedAsset,
    generator: torch.Generator,
) -> None:
    """Take the four steps for each mini-batch of each epoch.

    Args:
        parameters: of the network to train, in place.
        lower: rows of the base set -> the number that step 1 minimises.
        higher: rows of the suspected set -> the number that step 4 maximises.
        suspected_ND, base_BD: the features that the nested network sees.
        settings: epochs, batch size, learning rate, the nested network.
        generator: draws mini-batches and nested networks.
    """
    down = torch.optim.Adam(parameters, lr=settings.learning_rate)
    up = torch.optim.Adam(parameters, lr=settings.learning_rate)
    num = len(suspected_ND)
    for _ in range(settings.epochs):
        order_N = torch.randperm(num, generator=generator).to(suspected_ND.device)
        for row_P in order_N.tensor_split(max(1, round(num / settings.batch_size))):
            base_P = torch.randint(len(base_BD), (len(row_P),), generator=generator).to(row_P.device)
            _step(down, lower(base_P))
            is_out_P = settings.nested.select(suspected_ND[row_P], base_BD[base_P], generator)
            if is_out_P.any():
                _step(up, -higher(row_P[is_out_P]))


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def logit_variance(logit_BK: Tensor) -> Tensor:
    """How far from indifferent the network is, (B,)."""
    return logit_BK.var(dim=1, unbiased=False)


# ---------------------------------------------------------------------------------------- the variant without labels


class QuickNested(Nested):
    """The nested network with fewer and larger steps; it selects from the fence on, which suits embeddings."""

    rounds: int = Field(10, ge=1)
    """Its gradient steps."""
    learning_rate: float = Field(3e-3, gt=0)
    """Learning rate of its Adam."""
    outlyingness: float = Field(1.0, gt=0)
    """Adjusted outlyingness above which a sample is selected, on either side; 1 is the fence of the boxplot."""


class Asset(DetectorSettings):
    """A label-free variant of ASSET, on the victim's embeddings; not the published method, which needs labels.

    `asset` is the variance of the logits of a two-layer network, trained on the fitting set to have none on clean
    samples and much on what looks poisoned. It takes clean samples, and a fitting set that has poison in it, more than
    one or two per mini-batch: of compact clusters planted among 8,192 embeddings it found 0.5 % in every trial, and
    0.2 % in most.
    """

    kind: Literal["asset"] = "asset"
    fits: ClassVar[bool] = True
    hidden: int = Field(256, ge=1, le=8192)
    """Units of the hidden layer."""
    num_logits: int = Field(16, ge=2, le=1024)
    """K, the outputs whose variance counts."""
    epochs: int = Field(20, ge=0)
    """Passes over the fitting set; 20 over 8,192 embeddings of width 1,024 take about a minute on one core."""
    batch_size: int = Field(512, ge=16, le=2048)
    """P, suspected samples of a mini-batch; the medcouple costs its square."""
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of both Adams, the one that goes down and the one that goes up."""
    nested: QuickNested = QuickNested()
    """Who is selected."""
    seed: int = 0
    """Draws weights and mini-batches."""

    @property
    def gives(self) -> tuple[str, ...]:
        return _AssetScorer.columns

    @property
    def takes_clean(self) -> bool:
        return True

    def fit(self, pool: Batch, clean: Batch | None) -> State:
        """Train the network; equal samples and seeds train the same one, on one kind of machine."""
        _check_base(None if clean is None else len(clean), len(pool))
        assert clean is not None
        with torch.inference_mode(False), torch.enable_grad():
            return self._train(pool.embedding_BE.clone(), clean.embedding_BE.to(pool.device, copy=True))

    def _train(self, suspected_ND: Tensor, base_BD: Tensor) -> State:
        generator = torch.Generator().manual_seed(self.seed)
        centre_D, scale_D = _centre_and_scale(suspected_ND)
        suspected_ND, base_BD = (_standardised(one, centre_D, scale_D).float() for one in (suspected_ND, base_BD))
        layers = random_layers((suspected_ND.shape[1], self.hidden, self.num_logits), generator, suspected_ND.device)

        def lower(row_P: Tensor) -> Tensor:
            return logit_variance(apply_layers(layers, base_BD[row_P])).mean()

        def higher(row_P: Tensor) -> Tensor:
            return logit_variance(apply_layers(layers, suspected_ND[row_P])).mean()

        push_apart(layers, lower, higher, suspected_ND, base_BD, self, generator)
        named = {f"layer{i}": layer.detach() for i, layer in enumerate(layers)}
        return {name: one.cpu() for name, one in {"centre": centre_D, "scale": scale_D, **named}.items()}

    def open(self, victim: Victim, state: State) -> Scorer:
        return _AssetScorer(self, victim, state)


class _AssetScorer:
    columns: tuple[str, ...] = ("asset",)
    controls: tuple[str, ...] = ()

    def __init__(self, config: Asset, victim: Victim, state: State):
        self.fingerprint = state_fingerprint(config, state)
        # In float64: products of matrices round differently in batches of different sizes.
        state = {name: tensor.to(victim.device).double() for name, tensor in state.items()}
        self.centre_D, self.scale_D = state["centre"], state["scale"]
        self.layers = [state[f"layer{i}"] for i in range(4)]

    @torch.inference_mode()
    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        input_BD = _standardised(batch.embedding_BE, self.centre_D, self.scale_D)
        return as_scores({"asset": logit_variance(apply_layers(self.layers, input_BD))})


def _centre_and_scale(embedding_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each dimension, float64 (D,); the latter 1 where a dimension is constant."""
    embedding_ND = embedding_ND.double()
    centre_D, scale_D = embedding_ND.mean(dim=0), embedding_ND.std(dim=0, unbiased=False)
    is_constant_D = scale_D <= CONSTANT * centre_D.abs().clamp_min(TINY)
    return centre_D, torch.where(is_constant_D, 1.0, scale_D)


def _standardised(embedding_BD: Tensor, centre_D: Tensor, scale_D: Tensor) -> Tensor:
    return (embedding_BD.double() - centre_D) / scale_D


# ---------------------------------------------------------------------------------------------- as it was published


class PublishedAsset(Config):
    """ASSET for labelled images, with the numbers of its public demonstration."""

    num_classes: int = Field(10, ge=2)
    """K, the labels."""
    width: int = Field(64, ge=4, le=256)
    """Channels of the first stage of the ResNet-18; 64 is the published one."""
    epochs: int = Field(10, ge=0)
    """Passes over the suspected set, as many whatever test sets say; DeDe's adaptation reports the best of 10 to 30."""
    batch_size: int = Field(512, ge=16, le=2048)
    """P, suspected samples of a mini-batch; DeDe's adaptation takes 128 at 32 px."""
    learning_rate: float = Field(1e-4, gt=0)
    """Learning rate of both Adams."""
    nested: Nested = Nested()
    """Who is selected."""
    epsilon: float = Field(1e-6, gt=0, lt=1)
    """Density of the scores of clean samples at the threshold; the code's functions default to 1e-3."""
    rule: ThresholdRule = "intent"
    """The density's own quantile, or where the public code puts it."""
    seed: int = 0
    """Draws weights and mini-batches."""


@dataclass(frozen=True, eq=False)
class AssetScores:
    """What the published form says of the suspected set."""

    score_N: NDArray[np.float32]
    """Cross-entropy with the label; higher is more suspicious."""
    threshold: float

    @property
    def flagged_N(self) -> NDArray[np.bool_]:
        return self.score_N > self.threshold


def asset_published(
    image_NHWC: NDArray[np.uint8],
    label_N: ArrayLike,
    feature_ND: ArrayLike,
    base_image_BHWC: NDArray[np.uint8],
    base_feature_BD: ArrayLike,
    settings: PublishedAsset,
    device: torch.device | str = "cpu",
) -> AssetScores:
    """Judge a labelled set of images as ASSET does: serial, over the whole set, and only as good as its labels.

    Where, as in DeDe's adaptation, triggered *test* images are given the attacker's target as their label, the label
    gives them away: all poison shares one label that its picture does not deserve, and the score is a cross-entropy
    with that label. Such numbers flatter ASSET, and say nothing about corpora without labels.

    Args:
        image_NHWC: the suspected images, as stored.
        label_N: their labels, 0 to num_classes - 1.
        feature_ND: the poisoned model's features of them, as the nested network shall see them.
        base_image_BHWC, base_feature_BD: the same of clean images, whose labels are not needed.
        settings: of the loop and the threshold.
        device: where the networks live.

    Raises:
        Mistake: too few clean images, or labels out of range.

    Source: Pan et al., USENIX Security 2023.
    """
    label = torch.as_tensor(np.asarray(label_N, np.int64), device=device)
    _check_base(len(base_image_BHWC), len(image_NHWC))
    if int(label.min()) < 0 or int(label.max()) >= settings.num_classes:
        raise Mistake(
            f"asset: labels go from {int(label.min())} to {int(label.max())}, num_classes is {settings.num_classes}"
        )
    image, base_image = (
        torch.from_numpy(np.ascontiguousarray(one)).to(device) for one in (image_NHWC, base_image_BHWC)
    )
    feature, base_feature = (
        torch.as_tensor(np.asarray(one, np.float32), device=device) for one in (feature_ND, base_feature_BD)
    )
    assert len(image) == len(label) == len(feature), (len(image), len(label), len(feature))
    assert len(base_image) == len(base_feature), (len(base_image), len(base_feature))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(settings.seed)
        network = _Classifier(settings).to(device)

        def lower(row_P: Tensor) -> Tensor:
            return logit_variance(network(base_image[row_P])).mean()

        def higher(row_P: Tensor) -> Tensor:
            return functional.cross_entropy(network(image[row_P]), label[row_P])

        generator = torch.Generator().manual_seed(settings.seed)
        push_apart(list(network.parameters()), lower, higher, feature, base_feature, settings, generator)
    network.eval()
    with torch.inference_mode():
        score_N = torch.cat(
            [
                functional.cross_entropy(network(image[row_P]), label[row_P], reduction="none")
                for row_P in torch.arange(len(image), device=device).split(settings.batch_size)
            ]
        )
    scores = score_N.float().cpu().numpy()
    return AssetScores(scores, asset_threshold(scores, settings.epsilon, settings.rule))


class _Classifier(nn.Module):
    """A fresh ResNet-18 with the stem for CIFAR: uint8 (B, H, W, 3) -> logits (B, K)."""

    def __init__(self, settings: PublishedAsset):
        super().__init__()
        encoder: Any = build_encoder(ResNet(depth=18, stem="cifar", width=settings.width))
        self.encoder = encoder
        self.head = nn.Linear(encoder.embedding_dim, settings.num_classes)

    def forward(self, image_BHWC: Tensor) -> Tensor:
        return self.head(self.encoder(image_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1))


def asset_threshold(scores: ArrayLike, epsilon: float, rule: ThresholdRule = "intent") -> float:
    """Where clean scores end: a normal is fitted to the lower half of all scores.

    `intent` is the score above the mean at which the normal's density is epsilon (the mean, if it is nowhere so
    dense); `compat` what the public code computes, with sigma * sqrt(2 pi) outside the logarithm.
    """
    scores = np.sort(np.asarray(scores, np.float64))
    lower = scores[: max(1, scores.size // 2)]
    mean, sigma = float(lower.mean()), max(float(lower.std()), TINY)
    peak = sigma * math.sqrt(2 * math.pi)
    if rule == "compat":
        return mean + sigma * math.sqrt(-2 * math.log(epsilon) * peak)
    return mean + sigma * math.sqrt(max(0.0, -2 * math.log(epsilon * peak)))


def _check_base(num_base: int | None, num_suspected: int) -> None:
    if num_base is None:
        raise Mistake("asset: it takes clean samples, and the run has none; name some, or leave asset out")
    if min(num_base, num_suspected) < MIN_BASE:
        raise Mistake(
            f"asset: {num_suspected:,} suspected and {num_base:,} clean samples to train on, it takes {MIN_BASE} of "
            "each; give more, or leave asset out"
        )
