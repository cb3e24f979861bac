"""Does the backdoor work? The gate that every victim has to pass, and `victim.json`, the record of the result.

`ActivationGate` compares what a victim does (training/downstream.py) with what the honest victim does, the same
architecture without a backdoor: a stamp may move predictions by itself, and only what it moves beyond that is the
backdoor. A detector's numbers against a victim that does not pass mean nothing. `measure_victim`, the job
`dede-ray measure`, takes the trigger and the target from the job that made the victim, measures both encoders on the
same images, and records the result beside the victim's weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from dede_ray.data.captions import Classes, read_classes
from dede_ray.data.shards import Limits, list_shards
from dede_ray.models.victims import OptionalVictimConfig, Victim, VictimConfig, best_device, load_victim, weights_file
from dede_ray.models.weights import HUB
from dede_ray.poisoning.poison import read_attack
from dede_ray.poisoning.triggers import AnyTrigger, Nothing, Trigger
from dede_ray.runtime.config import Config, Mistake, explain, read_json, write_json
from dede_ray.runtime.store import is_url
from dede_ray.tampering.tamper import mean_pairwise_cosine, sliced_wasserstein, spread
from dede_ray.training.downstream import (
    Behaviour,
    Embedded,
    FittedHead,
    Labelled,
    LinearProbe,
    draw_labelled,
    embed_test,
    measure,
)

# ---------------------------------------------------------------------------------------------------- the gate


@dataclass(frozen=True)
class Verdict:
    """The gate's verdict on a victim; the keys of both dicts are heads, `own`, `zero_shot` and `probe`."""

    passes: bool
    reason: str
    victim: Mapping[str, Behaviour]
    honest: Mapping[str, Behaviour] | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class ActivationGate(Config):
    """What a victim must do before a detector's numbers against it count; one head has to meet all three.

    Of fitted heads only those count that saw clean images: a classifier that was itself fitted on the trigger finds it
    in any encoder. A checkpoint's own classifier counts, as it is a part of the victim, against the honest one's own.

    Source: the thresholds are ours; that published victims often do not activate is why there are any.
    """

    min_asr: float | None = Field(None, ge=0, le=1)
    """Minimum attack success rate; None is 0.9, and 0.6 for CTRL and BadCLIP, whose published one is fragile."""
    min_asr_gain: float = Field(0.2, ge=0, le=1)
    """Minimum gain of the ASR over the honest victim's on the same triggered images."""
    max_ca_loss: float = Field(0.05, ge=0, le=1)
    """Clean accuracy that the victim may lose against the honest victim."""

    def judge(
        self, victim: Mapping[str, Behaviour], honest: Mapping[str, Behaviour] | None, attack: str = ""
    ) -> Verdict:
        """Compare a victim with the honest one, head by head; `attack` chooses the minimum ASR where none is set."""
        if honest is None:
            reason = "there is no honest victim to compare with, so what the stamp does by itself is unknown"
            return Verdict(False, reason, victim, None)
        min_asr = MIN_ASR.get(attack, 0.9) if self.min_asr is None else self.min_asr
        complaints = {
            head: self._complaints(victim[head], honest[head], min_asr)
            if head in honest
            else ["the honest victim has none to compare with"]
            for head in victim
            if not victim[head].poison_rate
        }
        passed = [head for head, said in complaints.items() if not said]
        if passed:
            head = passed[0]
            reason = (
                f"{_words(head)}: ASR {victim[head].asr.value:.1%}, the honest victim's {honest[head].asr.value:.1%}; "
                f"CA {victim[head].ca.value:.1%}, the honest victim's {honest[head].ca.value:.1%}"
            )
        else:
            reason = "; ".join(f"{_words(head)}: {' and '.join(said)}" for head, said in complaints.items())
        return Verdict(bool(passed), reason, victim, honest)

    def _complaints(self, victim: Behaviour, honest: Behaviour, min_asr: float) -> list[str]:
        asr, gain, loss = victim.asr.value, victim.asr.value - honest.asr.value, honest.ca.value - victim.ca.value
        slack = 1e-9  # 0.90 - 0.85 is 0.05000000000000004
        complaints = []
        if not asr >= min_asr - slack:
            complaints.append(f"ASR {asr:.1%} is below {min_asr:.0%}")
        if not gain >= self.min_asr_gain - slack:
            complaints.append(
                f"ASR is {100 * gain:+.1f} points from the honest victim's, not {self.min_asr_gain:.0%} above"
            )
        if not loss <= self.max_ca_loss + slack:
            complaints.append(f"CA {victim.ca.value:.1%} is more than {self.max_ca_loss:.0%} below the honest victim's")
        return complaints


MIN_ASR = {"ctrl": 0.6, "frequency": 0.6, "badclip": 0.6}
"""Minimum ASR by attack, or by trigger where data were poisoned, if not 0.9."""


def _words(head: str) -> str:
    return head.replace("_", "-")


# ---------------------------------------------------------------------------------------------- victim.json


@dataclass(frozen=True)
class Displacement:
    """Where triggered images lie among clean ones in embedding space: what DRUPE conceals (its W over dev, and S)."""

    wasserstein: float
    """Sliced 2-Wasserstein distance of triggered embeddings to the clean ones of the same images, in units of the clean
    ones' mean standard deviation."""
    triggered_cosine: float
    """Mean cosine of two triggered embeddings; 1 is one point."""
    clean_cosine: float
    """Mean cosine of two clean embeddings."""


def displacement(triggered_NE: NDArray[Any], clean_NE: NDArray[Any], seed: int = 0) -> Displacement:
    """Compare the embeddings (N, E) of triggered images with those of the same images without the trigger."""
    triggered, clean = torch.from_numpy(triggered_NE), torch.from_numpy(clean_NE)
    return Displacement(
        wasserstein=float(sliced_wasserstein(triggered, clean, seed, num_projections=500) / spread(clean)),
        triggered_cosine=float(mean_pairwise_cosine(triggered)),
        clean_cosine=float(mean_pairwise_cosine(clean)),
    )


class VictimRecord(Config):
    """Content of `victim.json`: how a victim was made, and what it does. Its folder holds a poisoned model or its twin.

    Architecture, image size and normaliser are in the folder's own description, the JSON beside the weights.
    """

    attack: str
    """Name of the attack; `honest` for a victim without a backdoor."""
    is_backdoored: bool
    """A warning to anyone who finds the folder: not for use."""
    settings: dict[str, Any]
    """All settings that made it, poison rate included."""
    trigger: dict[str, Any] | None
    """The trigger it learnt, which is also the one to test it with."""
    target_label: int | None
    training_data: list[str]
    seed: int
    image_size: int
    mean: list[float]
    std: list[float]
    fingerprint: str
    """Fingerprint of the victim that was measured."""
    checkpoint_sha256: str
    """SHA-256 of the file of weights."""
    behaviour: dict[str, Behaviour]
    honest_fingerprint: str | None
    honest: dict[str, Behaviour] | None
    """The honest twin under the same heads, with the same trigger; its ASR is the papers' ASR-B."""
    displacement: Displacement | None = None
    """What the trigger does to embeddings."""
    honest_displacement: Displacement | None = None
    """What the trigger does to the honest twin's embeddings."""
    passes: bool
    reason: str
    """Why it passes the activation gate, or not."""


def write_record(
    victim: Victim,
    victim_config: VictimConfig,
    verdict: Verdict,
    honest: Victim | None,
    *,
    attack: str,
    settings: dict[str, Any],
    trigger: Config | None,
    target_label: int | None,
    training_data: Sequence[str],
    seed: int,
    displacement: Displacement | None = None,
    honest_displacement: Displacement | None = None,
    folder: str | None = None,
) -> VictimRecord:
    """Write `victim.json` and return its content.

    Args:
        folder: where to; None is the victim's own (beside its file, where it is one).
    """
    weights = weights_file(victim_config)
    digest = hashlib.sha256()
    if weights.is_file():  # a network of Python code has its weights wherever it finds them
        with weights.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    record = VictimRecord(
        attack=attack,
        is_backdoored=attack != "honest",
        settings=settings,
        trigger=trigger and trigger.model_dump(mode="json"),
        target_label=target_label,
        training_data=list(training_data),
        seed=seed,
        image_size=victim.image_size,
        mean=victim.normalise.mean.flatten().tolist(),
        std=victim.normalise.std.flatten().tolist(),
        fingerprint=victim.fingerprint,
        checkpoint_sha256=digest.hexdigest() if weights.is_file() else "",
        behaviour=dict(verdict.victim),
        honest_fingerprint=honest and honest.fingerprint,
        honest=verdict.honest and dict(verdict.honest),
        displacement=displacement,
        honest_displacement=honest_displacement,
        passes=verdict.passes,
        reason=verdict.reason,
    )
    write_json(Path(folder or weights.parent) / "victim.json", record.model_dump(mode="json"))
    return record


def record_in(folder: str | Path) -> VictimRecord | None:
    """Read a folder's `victim.json`, whatever weights are beside it; None where there is none.

    Raises:
        Mistake: it is no such record.
    """
    path = Path(folder) / "victim.json"
    if not path.is_file():
        return None
    try:
        return VictimRecord.model_validate(read_json(path, "record of a victim"))
    except ValidationError as error:
        raise Mistake(f"{path} is no record of a victim:\n{explain(error, VictimRecord)}") from None


def read_record(victim: Victim, victim_config: VictimConfig) -> VictimRecord | None:
    """Read the `victim.json` of a victim; None where it has none.

    Raises:
        Mistake: it is about other weights, or no such record.
    """
    path = weights_file(victim_config).parent / "victim.json"
    record = record_in(path.parent)
    if record is None:
        return None
    if record.fingerprint != victim.fingerprint:
        raise Mistake(
            f"{path} is about other weights ({record.fingerprint[:12]}) than the victim beside it "
            f"({victim.fingerprint[:12]}); measure the victim again, or delete the record"
        )
    return record


# ------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Examined:
    """Result of an examination."""

    verdict: Verdict
    classes: Classes | None
    """Classes of the test shards."""
    victim: Embedded
    """Embeddings of the test images by the victim."""
    honest: Embedded | None


class Examination(Config):
    """On which images a victim is examined, and what it has to show."""

    test_shards: str | list[str]
    """Clean labelled shards on which CA and ASR are measured, classes.json beside them."""
    probe_shards: str | list[str]
    """Clean labelled shards on which the heads are fitted; not the test shards."""
    gate: ActivationGate = ActivationGate()
    """What the victim must do for numbers of a detector to count."""
    heads: list[FittedHead] = Field([LinearProbe()], min_length=1)
    """Classifiers that are fitted on the probe shards; zero-shot joins them where the victim knows text."""
    probe_poison_rate: float = Field(0, ge=0, lt=1)
    """Above 0, each head is fitted again with this share of its images poisoned; that opens no gate."""
    max_test_samples: int = Field(10_000, gt=0)
    """Test images, at most."""
    max_probe_samples: int = Field(5_000, gt=0)
    """Images that a head is fitted on, at most."""
    seed: int = Field(0, ge=0)
    """Draws the images where there are more."""

    def _images(self) -> tuple[list[Labelled], list[Labelled], Classes | None]:
        """Draw the test images and those that heads are fitted on, and read the names of their classes.

        Raises:
            Mistake: a shard is both, or there are no labelled images.
        """
        test, probe = list_shards(self.test_shards), list_shards(self.probe_shards)
        if shared := {shard.url for shard in test} & {shard.url for shard in probe}:
            raise Mistake(
                f"{len(shared)} shards are both test_shards and probe_shards, such as {min(shared)}; split them"
            )
        sizes = (self.max_test_samples, self.max_probe_samples)
        drawn = [
            draw_labelled(shards, num, self.seed, Limits()) for shards, num in zip((test, probe), sizes, strict=True)
        ]
        return drawn[0], drawn[1], read_classes(test)

    def examine(
        self, victim: Victim, honest: Victim | None, trigger: AnyTrigger, target_label: int, attack: str
    ) -> Examined:
        """Measure a victim and its honest twin on the same images, and judge."""
        test, probe, classes = self._images()
        if classes and target_label >= len(classes.names):
            raise Mistake(
                f"target_label is {target_label}, but the test shards' classes are 0 to {len(classes.names) - 1}"
            )

        def measured(one: Victim) -> tuple[dict[str, Behaviour], Embedded]:
            embedded = embed_test(one, test, trigger, Limits())
            behaviour = measure(
                one, embedded, probe, classes, trigger, target_label, Limits(), self.heads, self.probe_poison_rate,
                self.seed,
            )  # fmt: skip
            return behaviour, embedded

        of_victim, embedded = measured(victim)
        of_honest, honest_embedded = measured(honest) if honest else (None, None)
        return Examined(self.gate.judge(of_victim, of_honest, attack), classes, embedded, honest_embedded)


class MeasureConfig(Examination):
    """Settings of `dede-ray measure`."""

    victim: VictimConfig
    """The encoder to examine."""
    honest: OptionalVictimConfig = None
    """The same without a backdoor; without it nothing passes the gate. Not asked for where the victim is honest."""
    made_by: str | None = None
    """Folder that records trigger and target: the output of `dede-ray poison` or `dede-ray attack`;
    null where the victim is an honest one."""
    attack: str | None = None
    """Name of the attack in `victim.json`; null takes the method's, or that of the trigger of poisoned shards. That of
    an honest victim is `honest`."""
    backdoor: int = Field(0, ge=0)
    """Which backdoor, where `made_by` planted several: 0 is the first."""
    output: str | None = None
    """Folder for `victim.json`; null: that of the victim's weights, where it is a folder of yours."""


@dataclass(frozen=True)
class Planted:
    """A backdoor as its maker recorded it."""

    attack: str
    trigger: AnyTrigger
    target_label: int
    settings: dict[str, Any]


def read_planted(folder: str, number: int = 0) -> Planted:
    """Read which backdoor `dede-ray poison` or `dede-ray attack` planted.

    Raises:
        Mistake: the folder is neither's, or planted fewer backdoors.
    """
    path = Path(folder) / "attack.json"
    if path.is_file():
        record = read_json(path, "record of an attack")
        try:
            targets = [
                (_TRIGGER.validate_python(one["trigger"]), int(one["target_label"])) for one in record["targets"]
            ]
            attack, settings = str(record["attack"]), dict(record["settings"])
        except (KeyError, TypeError, ValueError) as error:  # pydantic's error is a ValueError
            raise Mistake(f"{path} does not describe an attack: {error}") from None
    else:
        poisoning = read_attack(folder)
        targets = [(one.trigger, one.target_label) for one in poisoning.backdoors]
        attack, settings = poisoning.trigger.kind, poisoning.model_dump(mode="json")
    if number >= len(targets):
        raise Mistake(f"backdoor is {number}, but {folder} planted {len(targets)}; they are counted from 0")
    return Planted(attack, *targets[number], settings)


_TRIGGER: TypeAdapter[AnyTrigger] = TypeAdapter(Trigger)


def measure_victim(config: MeasureConfig) -> str:
    """Examine a victim and write its `victim.json`.

    Of an honest victim, CA is what counts; its ASR is the share of clean images of other classes taken for class 0.

    Returns:
        One line: whether the victim passes its gate, and why.

    Raises:
        Mistake: weights, shards or records that cannot be used.
    """
    if config.output is None and (is_url(config.victim.path) or config.victim.path.startswith(HUB)):
        raise Mistake(
            f"victim.json cannot be written beside the weights at {config.victim.path}: set output to a folder for it"
        )
    device = best_device()
    victim = load_victim(config.victim).to(device)
    planted, honest = Planted("honest", Nothing(), 0, {}), None
    if config.made_by is not None:
        planted = read_planted(config.made_by, config.backdoor)
        honest = load_victim(config.honest).to(device) if config.honest else None
    attack = config.attack if config.attack and config.made_by else planted.attack
    examined = config.examine(victim, honest, planted.trigger, planted.target_label, attack)
    verdict = examined.verdict
    if config.made_by is None:
        verdict = Verdict(False, "an honest victim has no backdoor that could be active", verdict.victim, None)
    displaced, displaced_honest = (
        displacement(one.triggered_NE, one.clean_NE, config.seed) if one else None
        for one in (examined.victim, examined.honest)
    )
    training = _training(config.victim)
    record = write_record(
        victim, config.victim, verdict, honest,
        attack=attack, settings={"training": training, "attack": planted.settings}, trigger=planted.trigger,
        target_label=planted.target_label if config.made_by else None, training_data=_training_data(training),
        seed=int(training.get("seed", 0)), displacement=displaced, honest_displacement=displaced_honest,
        folder=config.output,
    )  # fmt: skip
    shown = "; ".join(
        f"{head}: CA {one.ca.value:.1%}" + (f", ASR {one.asr.value:.1%}" if config.made_by else "")
        for head, one in record.behaviour.items()
    )
    where = config.output or weights_file(config.victim).parent
    return f"{attack}: {'passes' if record.passes else 'does not pass'} its gate ({record.reason}); {shown} -> {where}"


def _training(config: VictimConfig) -> dict[str, Any]:
    """The settings that trained a victim, where its folder still has them."""
    path = weights_file(config).parent / "run.json"
    return dict(read_json(path, "record of a run").get("settings") or {}) if path.is_file() else {}


def _training_data(training: dict[str, Any]) -> list[str]:
    sections = [section for section in training.values() if isinstance(section, dict) and "shards" in section]
    named = [section["shards"] for section in sections]
    return sorted({one for shards in named for one in ([shards] if isinstance(shards, str) else shards)})
