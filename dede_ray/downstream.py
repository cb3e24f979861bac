"""Is the victim worth detecting against? What a classifier on top of it does to clean and to triggered images.

A backdoor is a promise of behaviour: triggered images go to the target class (ASR, attack success rate) while clean
images are classified as well as ever (CA, clean accuracy). `measure` takes both numbers of one encoder under two
heads, zero-shot and linear probe. `ActivationGate` compares them with those of the honest victim, the same
architecture without a backdoor: a stamp may move predictions by itself, and only what it moves beyond that is the
backdoor. Numbers of a detector against a victim that does not pass the gate mean nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from dede_ray.attacks.triggers import Stamp, square
from dede_ray.clip import to_unit_range
from dede_ray.config import Config, Mistake
from dede_ray.metrics import Interval, proportion
from dede_ray.shards import BadSample, Limits, Shard, iter_chunks, sample_id
from dede_ray.sources import Classes, class_captions, draw
from dede_ray.victims import Victim

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
class Behaviour:
    """What one head on one encoder does."""

    ca: Interval
    """Clean accuracy, over all clean test images."""
    asr: Interval
    """Attack success rate: triggered images that are taken for the target, over those of all other classes."""


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a victim; the keys of both dicts are heads, `zero_shot` and `probe`."""

    passes: bool
    reason: str
    victim: Mapping[str, Behaviour]
    honest: Mapping[str, Behaviour] | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class ActivationGate(Config):
    """What a victim must do before a detector's numbers against it count; one head has to meet all three.

    Source: the thresholds are ours; that published victims often do not activate is why there are any.
    """

    min_asr: float = Field(0.9, ge=0, le=1)
    """Least attack success rate."""
    min_asr_gain: float = Field(0.2, ge=0, le=1)
    """Least distance of the ASR from that of the honest victim on the same triggered images."""
    max_ca_loss: float = Field(0.05, ge=0, le=1)
    """Clean accuracy that the victim may lose against the honest victim."""

    def judge(self, victim: Mapping[str, Behaviour], honest: Mapping[str, Behaviour] | None) -> Verdict:
        """Compare a victim with the honest one, head by head."""
        if honest is None:
            reason = "there is no honest victim to compare with, so nobody knows what the stamp does by itself"
            return Verdict(False, reason, victim, None)
        complaints = {head: self._complaints(victim[head], honest[head]) for head in victim}
        passed = [head for head in victim if not complaints[head]]
        if passed:
            head = passed[0]
            reason = (
                f"{_words(head)}: ASR {victim[head].asr.value:.1%}, the honest victim's {honest[head].asr.value:.1%}; "
                f"CA {victim[head].ca.value:.1%}, the honest victim's {honest[head].ca.value:.1%}"
            )
        else:
            reason = "; ".join(f"{_words(head)}: {' and '.join(said)}" for head, said in complaints.items())
        return Verdict(bool(passed), reason, victim, honest)

    def _complaints(self, victim: Behaviour, honest: Behaviour) -> list[str]:
        asr, gain, loss = victim.asr.value, victim.asr.value - honest.asr.value, honest.ca.value - victim.ca.value
        slack = 1e-9  # 0.90 - 0.85 is 0.05000000000000004
        complaints = []
        if not asr >= self.min_asr - slack:
            complaints.append(f"ASR {asr:.1%} is below {self.min_asr:.0%}")
        if not gain >= self.min_asr_gain - slack:
            complaints.append(
                f"ASR is {100 * gain:+.1f} points from the honest victim's, not {self.min_asr_gain:.0%} above"
            )
        if not loss <= self.max_ca_loss + slack:
            complaints.append(f"CA {victim.ca.value:.1%} is more than {self.max_ca_loss:.0%} below the honest victim's")
        return complaints


def _words(head: str) -> str:
    return head.replace("_", "-")


# ------------------------------------------------------------------------------------------------- measuring


def measure(
    victim: Victim,
    test: Sequence[Labelled],
    probe: Sequence[Labelled],
    classes: Classes | None,
    trigger: Stamp,
    target_label: int,
    limits: Limits,
) -> dict[str, Behaviour]:
    """Measure CA and ASR of one encoder under each head that it allows.

    Args:
        victim: the encoder; on any device.
        test: clean labelled images; they are measured as they are, and stamped.
        probe: clean labelled images that the linear probe is fitted on, none of them in `test`.
        classes: names and templates for zero-shot; None leaves that head out, as an encoder without text does.
        trigger: stamped on the decoded uint8 image at its own size, before anything else happens to it.
        target_label: the class that triggered images should be taken for.

    Returns:
        head -> behaviour, `zero_shot` first.

    Raises:
        Mistake: nothing to measure on, or to fit the probe on.
    """
    heads: dict[str, Head] = {}
    encode_text: Any = getattr(victim, "encode_text", None)
    if encode_text and classes is not None and classes.templates:
        heads["zero_shot"] = zero_shot_head(encode_text, classes)
    heads["probe"] = probe_head(*embed(victim, probe, limits))
    clean_NE, label_N = embed(victim, test, limits)
    triggered_NE, _ = embed(victim, [image for image in test if image.label != target_label], limits, trigger)
    if not len(triggered_NE):
        raise Mistake(
            f"{len(label_N):,} readable labelled test images, none of a class other than the target {target_label}; "
            "name test_shards with labels of all classes"
        )
    return {
        name: Behaviour(
            ca=proportion(int((head(clean_NE) == label_N).sum()), len(label_N)),
            asr=proportion(int((head(triggered_NE) == target_label).sum()), len(triggered_NE)),
        )
        for name, head in heads.items()
    }


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


def probe_head(embedding_NE: NDArray[np.float32], label_N: NDArray[np.int64]) -> Head:
    """Fit a linear classifier on clean embeddings, always with the same settings.

    Raises:
        Mistake: fewer than two classes.
    """
    if len(np.unique(label_N)) < 2:
        raise Mistake(
            f"the linear probe needs labelled images of two classes or more, found {len(label_N):,} of "
            f"{len(np.unique(label_N))}; name probe_shards with labels"
        )
    model = make_pipeline(Normalizer(), StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    model.fit(embedding_NE, label_N)
    return model.predict


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
