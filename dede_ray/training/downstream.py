"""Downstream behaviour of a finished encoder: what classifiers on its embeddings do to clean and to triggered images.

A backdoor works if triggered images are classified as the target (ASR, attack success rate) while clean images are
classified as well as before (CA, clean accuracy). `measure` takes both numbers of one encoder under each head:
zero-shot where there is text, and classifiers that are fitted on a clean or on a poisoned downstream training set.
evaluation/measure.py judges them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from dede_ray.data.captions import Classes, class_captions
from dede_ray.data.images import Stamp, square, to_unit_range
from dede_ray.data.sampling import draw
from dede_ray.data.shards import BadSample, Limits, Shard, iter_chunks, sample_id
from dede_ray.metrics import Interval, proportion
from dede_ray.models.victims import Victim
from dede_ray.runtime.config import Config, Mistake

logger = logging.getLogger(__name__)

BATCH_SIZE = 256

# Shapes: N images, E embedding width, C classes.
Head = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""A classifier on embeddings: (N, E) -> predicted label (N,)."""


@dataclass(frozen=True)
class Labelled:
    """One labelled image, still encoded: what a stranger's shard holds."""

    sample_id: str
    content: bytes
    label: int


@dataclass(frozen=True)
class Embedded:
    """Embeddings of test images, clean and triggered, float32 (N, E), and their labels (N,)."""

    clean_NE: NDArray[np.float32]
    clean_label_N: NDArray[np.int64]
    triggered_NE: NDArray[np.float32]
    triggered_label_N: NDArray[np.int64]
    """The true labels, not the target."""


@dataclass(frozen=True)
class Behaviour:
    """Clean accuracy and attack success rate of one head on one encoder."""

    ca: Interval
    """Clean accuracy, over all clean test images."""
    asr: Interval
    """Attack success rate: triggered images that are taken for the target, over those of all other classes."""
    asr_all_classes: Interval | None = None
    """The same with the target's own images, as BadEncoder, DRUPE and CTRL count; for comparing with their tables."""
    poison_rate: float = 0.0
    """Share of the head's training images that are stamped, and labelled as the target."""


# ----------------------------------------------------------------------------------------------------- heads


class LinearProbe(Config):
    """Logistic regression on standardised embeddings of length one."""

    kind: Literal["probe"] = "probe"

    def fit(self, embedding_NE: NDArray[np.float32], label_N: NDArray[np.int64]) -> Head:
        return probe_head(embedding_NE, label_N)


class TwoLayerClassifier(Config):
    """Two hidden layers of 512 and 256 units on embeddings of length one; what counts is the last epoch.

    Source: Jia et al., BadEncoder, S&P 2022, whose published code does not shuffle; DRUPE and DeDe use the same.
    """

    kind: Literal["mlp"] = "mlp"
    epochs: int = Field(500, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    """Adam's, constant."""
    batch_size: int = Field(64, ge=1)
    dropout: float = Field(0.5, ge=0, lt=1)
    """After the first hidden layer."""
    shuffle: bool = True
    """Draw the batches anew in each epoch; False is the published code's fixed order."""
    seed: int = Field(100, ge=0)
    """Draws weights, dropout and order."""

    def fit(self, embedding_NE: NDArray[np.float32], label_N: NDArray[np.int64]) -> Head:
        classes = _classes(label_N, "two-layer classifier")
        x_NE = torch.from_numpy(unit(embedding_NE))
        y_N = torch.from_numpy(np.searchsorted(classes, label_N))
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            model = nn.Sequential(
                nn.Linear(x_NE.shape[1], 512), nn.ReLU(), nn.Dropout(self.dropout),
                nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, len(classes)),
            )  # fmt: skip
            optimiser = torch.optim.Adam(model.parameters(), self.learning_rate)
            for _ in range(self.epochs):
                order_N = torch.randperm(len(x_NE)) if self.shuffle else torch.arange(len(x_NE))
                for rows in order_N.split(self.batch_size):
                    optimiser.zero_grad()
                    nn.functional.cross_entropy(model(x_NE[rows]), y_N[rows]).backward()
                    optimiser.step()
        model.eval().requires_grad_(False)
        return lambda other_NE: classes[model(torch.from_numpy(unit(other_NE))).argmax(dim=1).numpy()]


class NearestNeighbours(Config):
    """The class with the most votes among the k nearest images, a vote weighing exp(cosine similarity / temperature).

    Source: Wu et al., arXiv:1805.01978, section 3.4.
    """

    kind: Literal["knn"] = "knn"
    k: int = Field(200, ge=1)
    """Neighbours; all images where there are fewer."""
    temperature: float = Field(0.5, gt=0)
    """BadEncoder's monitor has 0.5, CTRL's evaluation 0.1."""

    def fit(self, embedding_NE: NDArray[np.float32], label_N: NDArray[np.int64]) -> Head:
        from sklearn.neighbors import KNeighborsClassifier  # seconds of import, which training workers need not pay

        _classes(label_N, "k-NN classifier")
        model = KNeighborsClassifier(
            min(self.k, len(label_N)),
            metric="cosine",
            algorithm="brute",
            weights=lambda distance_NK: np.exp(-distance_NK / self.temperature),  # the same votes, times a constant
        )
        return model.fit(embedding_NE, label_N).predict


FittedHead = Annotated[LinearProbe | TwoLayerClassifier | NearestNeighbours, Field(discriminator="kind")]


def probe_head(embedding_NE: NDArray[np.float32], label_N: NDArray[np.int64]) -> Head:
    """Fit a linear classifier on clean embeddings, always with the same settings.

    Raises:
        Mistake: fewer than two classes.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    _classes(label_N, "linear probe")
    model = make_pipeline(Normalizer(), StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    model.fit(embedding_NE, label_N)
    return model.predict


def _classes(label_N: NDArray[np.int64], head: str) -> NDArray[np.int64]:
    classes = np.unique(label_N)
    if len(classes) < 2:
        raise Mistake(
            f"the {head} needs labelled images of two classes or more, found {len(label_N):,} of {len(classes)}; "
            "name probe_shards with labels"
        )
    return classes


# ------------------------------------------------------------------------------------------------- measuring


def measure(
    victim: Victim,
    test: Sequence[Labelled] | Embedded,
    probe: Sequence[Labelled],
    classes: Classes | None,
    trigger: Stamp,
    target_label: int,
    limits: Limits,
    heads: Sequence[FittedHead] = (LinearProbe(),),
    poison_rate: float = 0.0,
    seed: int = 0,
) -> dict[str, Behaviour]:
    """Measure CA and ASR of one encoder under each head that it allows.

    Args:
        victim: the encoder; on any device.
        test: clean labelled images, which are measured as they are, and stamped; or what `embed_test` made of them.
        probe: clean labelled images that the heads are fitted on, none of them in `test`.
        classes: names and templates for zero-shot; None leaves that head out, as an encoder without text does.
        trigger: stamped on the decoded uint8 image at its own size, before anything else happens to it.
        target_label: the class that triggered images should be taken for.
        heads: classifiers to fit.
        poison_rate: above 0, each head is fitted a second time, with this share of `probe` stamped and relabelled.
        seed: draws the images that are.

    Returns:
        head -> behaviour, the checkpoint's own classifier (`own`) and `zero_shot` first; those of poisoned training end
        in `_poisoned`.

    Raises:
        Mistake: nothing to measure on, or to fit a head on.
    """
    predictors: dict[str, tuple[Head, float]] = {}
    if (own := own_head(victim, test, classes)) is not None:
        predictors["own"] = own, 0.0
    encode_text: Any = getattr(victim, "encode_text", None)
    if encode_text and classes is not None and classes.templates:
        predictors["zero_shot"] = zero_shot_head(encode_text, classes), 0.0
    training = {"": embed(victim, probe, limits)}
    if poison_rate:
        training["_poisoned"] = _embed_poisoned(victim, probe, trigger, target_label, limits, poison_rate, seed)
    for suffix, (embedding_NE, label_N) in training.items():
        for head in heads:
            predictors[head.kind + suffix] = head.fit(embedding_NE, label_N), poison_rate if suffix else 0.0
    embedded = test if isinstance(test, Embedded) else embed_test(victim, test, trigger, limits)
    clean_NE, label_N = embedded.clean_NE, embedded.clean_label_N
    triggered_NE, true_N = embedded.triggered_NE, embedded.triggered_label_N
    is_other_N = true_N != target_label
    if not is_other_N.any():
        raise Mistake(
            f"{len(label_N):,} readable labelled test images, none of a class other than the target {target_label}; "
            "name test_shards with labels of all classes"
        )
    behaviours = {}
    for name, (predict, rate) in predictors.items():
        is_target_N = predict(triggered_NE) == target_label
        behaviours[name] = Behaviour(
            ca=proportion(int((predict(clean_NE) == label_N).sum()), len(label_N)),
            asr=proportion(int(is_target_N[is_other_N].sum()), int(is_other_N.sum())),
            asr_all_classes=proportion(int(is_target_N.sum()), len(true_N)),
            poison_rate=rate,
        )
    return behaviours


def own_head(victim: Victim, test: Sequence[Labelled] | Embedded, classes: Classes | None) -> Head | None:
    """The classifier that came with a checkpoint; None where it has none, or one of other classes."""
    if (classifier := victim.classifier) is None:
        return None
    labels = test.clean_label_N.tolist() if isinstance(test, Embedded) else [image.label for image in test]
    num = max(labels, default=-1) + 1 if classes is None else len(classes.names)
    if classifier.out_features != num:
        logger.info("%s: its own classifier has %d classes, the images %d", victim.name, classifier.out_features, num)
        return None
    with torch.inference_mode():
        weight_CE: Any = classifier.weight.float().numpy()
        bias_C: Any = 0 if classifier.bias is None else classifier.bias.float().numpy()
    return lambda embedding_NE: (embedding_NE @ weight_CE.T + bias_C).argmax(axis=1)


def embed_test(victim: Victim, test: Sequence[Labelled], trigger: Stamp, limits: Limits) -> Embedded:
    """Embed test images as they are and stamped."""
    return Embedded(*embed(victim, test, limits), *embed(victim, test, limits, trigger))


def _embed_poisoned(
    victim: Victim,
    images: Sequence[Labelled],
    trigger: Stamp,
    target_label: int,
    limits: Limits,
    rate: float,
    seed: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A downstream training set as an attacker left it: `rate` of it stamped and labelled as the target."""
    others = [image for image in images if image.label != target_label]
    num = round(rate * len(images))
    if not 0 < num <= len(others):
        raise Mistake(
            f"a poison rate of {rate} is {num:,} of {len(images):,} downstream training images, of which "
            f"{len(others):,} are not of the target class; name more images or another rate"
        )
    drawn = {image.sample_id for image in draw(others, num, seed)}
    kept_NE, label_N = embed(victim, [image for image in images if image.sample_id not in drawn], limits)
    stamped_NE, _ = embed(victim, [image for image in images if image.sample_id in drawn], limits, trigger)
    labels = [label_N, np.full(len(stamped_NE), target_label, np.int64)]
    return np.concatenate([kept_NE, stamped_NE]), np.concatenate(labels)


def zero_shot_head(encode_text: Callable[[list[str]], torch.Tensor], classes: Classes) -> Head:
    """Take each image for the class whose captions it is closest to.

    A class is the normalised mean of the normalised embeddings of its captions, one per template.

    Source: Radford et al., arXiv:2103.00020, section 3.1.4.
    """
    captions = [caption for name in classes.names for caption in class_captions(classes.templates, name)]
    text_CE = class_embeddings(encode_text(captions).cpu().numpy(), len(classes.templates))
    return lambda embedding_NE: (embedding_NE @ text_CE.T).argmax(axis=1)


def class_embeddings(caption_NE: NDArray[np.float32], num_templates: int) -> NDArray[np.float32]:
    """The zero-shot classifier's rows (C, E) of length one, from captions (C * num_templates, E), class by class."""
    caption_CTE = unit(caption_NE).reshape(-1, num_templates, caption_NE.shape[1])
    return unit(caption_CTE.mean(axis=1))


def embed(
    victim: Victim, images: Sequence[Labelled], limits: Limits, trigger: Stamp | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Embed images, stamped or not: float32 (N, E) and their labels (N,), unreadable ones left out."""
    device = next((tensor.device for tensor in victim.state_dict().values()), torch.device("cpu"))
    embeddings, labels = [np.empty((0, victim.embedding_dim), np.float32)], []
    for start in range(0, len(images), BATCH_SIZE):
        batch = [*_squares(images[start : start + BATCH_SIZE], victim.image_size, limits, trigger)]
        if batch:
            image_BHWC = torch.from_numpy(np.stack([image_HWC for image_HWC, _ in batch])).to(device)
            embeddings.append(victim(to_unit_range(image_BHWC)).cpu().numpy())
            labels += [label for _, label in batch]
    if len(labels) < len(images):
        logger.warning(
            "%d of %d labelled images cannot be read and are left out", len(images) - len(labels), len(images)
        )
    return np.concatenate(embeddings), np.array(labels, np.int64)


def _squares(
    images: Sequence[Labelled], size_px: int, limits: Limits, trigger: Stamp | None
) -> Iterator[tuple[np.ndarray, int]]:
    for image in images:
        with contextlib.suppress(BadSample):
            yield square(image.content, image.sample_id, size_px, limits, trigger), image.label


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring each row to length one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def draw_labelled(shards: Sequence[Shard], num: int, seed: int, limits: Limits) -> list[Labelled]:
    """Draw up to `num` labelled samples from shards, by id: the same ones in any order of the shards.

    Raises:
        Mistake: the shards hold no sample with image and label.
    """

    def labelled() -> Iterator[Labelled]:
        for shard in shards:
            for chunk in iter_chunks(shard, BATCH_SIZE, limits):
                for sample in chunk:
                    if sample.error is None and sample.image is not None and sample.label is not None:
                        yield Labelled(sample_id(shard.name, sample.key), sample.image, sample.label)

    drawn = draw(labelled(), num, seed)
    if not drawn:
        names = ", ".join(shard.name for shard in shards[:3])
        raise Mistake(f"no sample with an image and a label (a .cls member) in {names}; name labelled shards")
    return sorted(drawn, key=lambda image: image.sample_id)
