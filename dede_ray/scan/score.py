"""The score pass: shards x victim x detectors -> manifest.

First, detectors that learn are fitted on a keyed sample of corpus and calibration in one heap. Then one decode, one
forward of the victim, and every detector, in a resumable pass (passes.py); calibration shards go through the same pass.
Costly detectors look at the worst candidates only, in a second stage. The decision turns scores into a list with a
declared error rate.

    resolve(settings) -> Inputs           what is wrong with the settings is said before any model is loaded
    _Run(inputs).fit(), .score()          states of detectors, then the passes
    _Run(inputs).decide() -> Manifest

    <output>/fitting/       embeddings of the fitting sets, one state file per detector
    <output>/calibration/   parts of the calibration shards
    <output>/scores/        parts of the shards
    <output>/second_stage/  parts of the candidates; second_stage_calibration/ of those among the calibration samples
    <output>/findings.json  groups, what they share and whether it acts (findings.py); copies and clumps (groups.py)
    <output>/findings/      pictures of the groups
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from pydantic import Field, ValidationError
from ray.exceptions import RayTaskError
from safetensors.torch import save

from dede_ray.data.identity import identified
from dede_ray.data.ledger import (
    BASE_SCHEMA,
    Chosen,
    KeyedShare,
    PassSummary,
    forget_changed,
    forget_pass,
    read_end,
    read_parts,
    shards_of_pass,
)
from dede_ray.data.near_duplicates import perceptual_hash
from dede_ray.data.passes import PassResources, run_over_parts, run_pass
from dede_ray.data.sampling import sample_keys
from dede_ray.data.shards import Limits, Shard, count_samples, list_shards
from dede_ray.data.workers import Chunk, Laps
from dede_ray.detectors.contract import DetectorSettings, Scorer, State, everything_of, open_scorer, vectors_of
from dede_ray.detectors.kinds import Detector
from dede_ray.models.embedding import (
    Batch,
    Encoders,
    Encoding,
    Need,
    fitting_set,
    gathered,
    in_one_heap,
    matrix,
    restored,
    stored,
    with_embeddings,
)
from dede_ray.models.victims import OptionalVictimConfig, Victim, VictimConfig, load_victim
from dede_ray.models.weights import pinned, read_tensors
from dede_ray.runtime.config import Config, Mistake, as_settings, explain, read_json, write_json
from dede_ray.runtime.lease import leased
from dede_ray.runtime.session import start_ray
from dede_ray.runtime.store import Place, place, write_atomically
from dede_ray.scan.calibration import CalibrationConfig, FromCorpus, judge_by_itself
from dede_ray.scan.decisions import NO_BINS, CleanMean, Conformal, Decision, PoolMedian, lacks_calibration
from dede_ray.scan.findings import Corpus, Findings, find
from dede_ray.scan.judge import AMPLIFIED, CLASSIFIER, COMBINED, COMPANY, FAIR, Judged, Judging, Scored, judge
from dede_ray.scan.manifest import DECISION_COLUMNS, Manifest, write_manifest
from dede_ray.scan.overlap import (
    known_pictures,
    picture,
    pictures,
    refuse_common,
    require_apart,
    require_other_shards,
)
from dede_ray.scan.reviews import read_reviews

logger = logging.getLogger(__name__)

BYTES_PER_DECIDED = 500
"""Memory that deciding takes for each sample: its id, hashes, caption, scores."""
NUM_KEPT = 10_000
"""About so many samples keep their embeddings in any case; two domains are compared on them."""

EMBEDDING_OF: dict[Need, str] = {"reference": "reference", "caption": "caption_embedding"}
"""The column that stored embeddings must have for what a detector needs."""
VERSIONS_OF = ("torch", "open_clip_torch", "timm", "numpy", "pillow", "pyarrow")


class Fitting(Config):
    """What detectors with statistics learn from, before anything is scored."""

    clean: str | list[str] | None = None
    """Clean samples for detectors that want some; neither the victim's training data nor the calibration set."""
    num_samples: int = Field(20_000, ge=1)
    """About so many are drawn from corpus and calibration together, blindly, and from `clean`: each by its own key."""
    seed: int = 0


class SecondStage(Config):
    """Detectors that take many forward passes for each sample, for those that look worst.

    Where the decision looks at their columns, the candidates are the highest of corpus and calibration samples
    together, blindly: a clean sample of either is as likely to be one, so that p-values keep their promise. All others
    count as less suspicious than any candidate.
    """

    detectors: list[Detector] = Field(min_length=1)
    num_candidates: int = Field(1000, ge=1)
    """Samples with the highest scores."""
    by: str | None = None
    """Column of the first stage that chooses them. None takes the decision's own, or else the first that goes into it,
    or the first there is."""


class ScoreConfig(Config):
    """Settings of `dede-ray score`.

    Example:
        >>> import dede_ray
        >>> config = dede_ray.ScoreConfig(
        ...     shards="shards/*.tar", output="runs/mine", victim={"path": "my/clip"}, detectors=[{"kind": "density"}]
        ... )
        >>> config.decision.kind, config.decision.q
        ('conformal', 0.1)
    """

    writes_to_stores: ClassVar[bool] = True
    shards: str | list[str] = Field([])
    """What to score: paths, folders, patterns or URLs."""
    embeddings: str | None = None
    """The output of an earlier run with `store_embeddings`, whose shards and calibration are then scored in the place
    of `shards` and `calibration`. No image is read again, so only detectors that need none can score; scores differ by
    the rounding to float16."""
    output: str
    """A folder that all machines see, or a URL."""
    victim: VictimConfig
    reference: OptionalVictimConfig = None
    """An encoder that the user trusts, from other hands and other data, for the detectors that compare."""
    detectors: list[Detector] = Field(min_length=1)
    fitting: Fitting = Fitting()
    second_stage: SecondStage | None = None
    calibration: CalibrationConfig = None
    """Clean shards for conformal decisions. What has seen the corpus must have seen them alike: where the victim and
    the decoder learnt the corpus, they learnt these too, unmarked; where they did not, they did not. Who has none
    draws them from the corpus, and looks at some: {from_corpus: 5000, reviewed: reviews.jsonl}."""
    overlap: Literal["refuse", "leave_out"] = "refuse"
    """What to do where calibration samples show pictures of the corpus, byte for byte: stop, or calibrate without
    these."""
    decision: Decision = Field(Conformal(), discriminator="kind")
    judging: Judging = Judging()
    findings: Findings | None = Findings()
    """What groups of suspicious samples share, and whether it acts in the victim; None does not look."""
    known_embeddings: str | None = None
    """Folder of a decoder that this victim's train_clip or train_simclr run trained on some of these shards
    (<output>/decoder): what the victim embedded then is read there. Nothing but the time changes."""
    store_embeddings: bool = False
    """Keep each sample's embeddings as float16 beside its scores, to score it again without its image."""
    rescore_changed: bool = False
    """Score those shards again whose content has changed since an earlier run here; False stops and names them."""
    full_digest: bool = False
    """Know shards again by all of their bytes, which are read for it, and not by some. Stores are asked anyhow."""
    chunk_size: int = Field(256, ge=1)
    """Samples that are scored, written and recovered together."""
    limits: Limits = Limits()
    max_error_fraction: float = Field(0.1, ge=0, le=1)
    """Stop when more than this share of the samples cannot be used."""
    resources: PassResources = PassResources()


def score(config: ScoreConfig | dict[str, Any] | str | Path) -> Manifest:
    """Score every sample and write the manifest. Joins Ray, or starts it; a rerun does what remains.

    Args:
        config: settings, a dict of them, or the path of a YAML file.

    Raises:
        Mistake: settings, shards, victim, decoder or output folder that do not fit.

    Example:
        >>> import dede_ray
        >>> manifest = dede_ray.score({
        ...     "shards": "runs/digits/poisoned/train-*.tar",
        ...     "calibration": "runs/digits/clean/calibration-*.tar",
        ...     "victim": {"path": "runs/digits/victim/clip"},
        ...     "detectors": [{"kind": "dede", "decoder": "runs/digits/victim/decoder"}],
        ...     "output": "runs/mine",
        ... })
        >>> "dede_reverse" in manifest.score_columns
        True
    """
    config = as_settings(ScoreConfig, config)
    inputs = resolve(config)
    start_ray(config)
    run = _Run(inputs)
    with leased(inputs.output) as lease:
        run.check_overlap()
        if config.rescore_changed:
            run.forget_changed()
        run.fit()
        summary = run.score()
        lease.require()
        return run.decide(summary)


@dataclass(frozen=True)
class Inputs:
    """What a run of the score job is made of, checked as far as that takes no victim. Shards have their digests."""

    config: ScoreConfig
    output: Place
    source: Place | None
    """The earlier run whose embeddings are scored; None reads the shards."""
    shards: list[Shard]
    calibration: list[Shard]
    clean: list[Shard]
    """Clean samples for detectors that want some."""
    detectors: list[DetectorSettings]
    second: list[DetectorSettings]
    """The detectors of the second stage."""
    judging: Judging
    """As in the settings, but for columns of detectors that could not be fitted."""

    @property
    def all_detectors(self) -> list[DetectorSettings]:
        return [*self.detectors, *self.second]

    @property
    def sources(self) -> frozenset[str]:
        """Columns that the decision is made of, as detectors give them."""
        judging, decision = self.judging, self.config.decision
        made_of = [*judging.made_of(decision.score)]
        if judging.difficulty and getattr(decision, "mondrian_bins", 1) > 1:
            made_of += judging.made_of(judging.difficulty)
        return frozenset(made_of)

    @property
    def decides_late(self) -> bool:
        """Whether the decision looks at the second stage."""
        return bool(self.sources & {*_given(self.second)})

    @property
    def chosen_by(self) -> str:
        """The column of the first stage that chooses the second one's candidates.

        Raises:
            Mistake: there is none.
        """
        first, controls = _given(self.detectors), _given_controls(self.detectors)
        wanted = self.config.second_stage.by if self.config.second_stage else None
        if wanted is not None:
            if wanted not in first:
                raise Mistake(f"second_stage.by is {wanted!r}; the first stage gives {', '.join(first)}")
            return wanted
        judged = [column for column in first if column not in controls]
        candidates = [*(column for column in judged if column in self.sources), *judged]
        if not candidates:
            raise Mistake(
                "second_stage: its candidates are the samples with the highest scores, and the first stage gives "
                f"controls only ({', '.join(first)}); attach a detector to `detectors`, or name a control as "
                "second_stage.by"
            )
        return candidates[0]

    @property
    def needs(self) -> frozenset[Need]:
        """What the detectors look at beside the victim's embedding."""
        return frozenset().union(*(one.needs for one in self.all_detectors))


def resolve(config: ScoreConfig) -> Inputs:
    """Find the shards that the settings name, and check what can be checked before a model is loaded.

    Raises:
        Mistake: two detectors of one name, nothing to score, detectors that need what the run lacks, shards that cannot
            be found or that are in two places at once, a decision on what nothing gives or without the calibration
            that it takes.
    """
    detectors: list[DetectorSettings] = [*config.detectors]
    second: list[DetectorSettings] = [*(config.second_stage.detectors if config.second_stage else [])]
    twice = [label for label, count in Counter(one.label for one in [*detectors, *second]).items() if count > 1]
    if twice:  # they would share a state file
        raise Mistake(f"two detectors of this run are called {twice[0]}; set `name` of one, which ends its columns")
    source = place(config.embeddings) if config.embeddings else None
    if source is None:
        if not config.shards:
            raise Mistake("nothing to score: name `shards` to read, or `embeddings` of an earlier run")
        shards = _found(config.shards, config)
        calibration = [] if isinstance(config.calibration, FromCorpus) else _found(config.calibration, config)
    else:
        lacking = [one.label for one in [*detectors, *second] if "image" in one.needs]
        if lacking:
            raise Mistake(f"{', '.join(lacking)} look at images, and stored embeddings have none; name shards instead")
        shards = shards_of_pass(source / "scores")
        is_calibrated = (source / "calibration" / "pass.json").is_file()
        is_calibrated &= not isinstance(config.calibration, FromCorpus)
        calibration = shards_of_pass(source / "calibration") if is_calibrated else []
    fits = any(one.fits for one in [*detectors, *second])
    clean = _found(config.fitting.clean, config) if fits else []
    inputs = Inputs(config, place(config.output), source, shards, calibration, clean, detectors, second, config.judging)
    _check_clean(inputs)
    _check_decision(inputs)
    if source is None:
        require_other_shards({"shards": shards, "calibration": calibration, "fitting.clean": clean}, config.overlap)
    return inputs


def _given(detectors: Sequence[DetectorSettings]) -> list[str]:
    """Columns that detectors may give, as the run calls them."""
    return [column for one in detectors for column in one.named(one.gives)]


def _given_controls(detectors: Sequence[DetectorSettings]) -> set[str]:
    """Those of them that are controls."""
    return {column for one in detectors for column in one.named(one.gives_controls)}


def _found(patterns: str | list[str] | None, config: ScoreConfig) -> list[Shard]:
    return identified(list_shards(patterns), config.full_digest) if patterns else []


def _check_clean(inputs: Inputs) -> None:
    """Check that detectors which learn from clean samples have some."""
    wanting = [one.label for one in inputs.all_detectors if one.takes_clean]
    if wanting and not inputs.clean:
        raise Mistake(
            f"{', '.join(wanting)} takes clean samples, and the run has none; name some as fitting.clean, or leave "
            f"{wanting[0]} out"
        )


def _check_decision(inputs: Inputs) -> None:
    """Check that what the decision looks at may be given, and that there is what it compares with.

    Raises:
        Mistake: a column that nothing gives, or no calibration where it takes some.
    """
    judging, decision = inputs.judging, inputs.config.decision
    given, controls = _given(inputs.all_detectors), _given_controls(inputs.all_detectors)
    fused = [*(name + FAIR for name in judging.fair), *([COMBINED] if judging.combined else [])]
    first = [*_given(inputs.detectors), *fused]
    _check_score(decision.score, [name for name in [*given, *judging.made] if name not in controls])
    for role, names, known in (
        ("judging.fair", judging.fair, given),
        ("judging.combined", judging.combined.columns if judging.combined else (), [*given, *fused]),
        ("judging.difficulty", [judging.difficulty] if judging.difficulty else (), [*given, *judging.made]),
        ("judging.company.of", [judging.company.of] if judging.company else (), first),
        ("judging.amplified.of", [judging.amplified.of] if judging.amplified else (), first),
        ("judging.classifier.columns", judging.classifier.columns if judging.classifier else (), first),
    ):
        if unknown := [name for name in names if name not in known]:
            raise Mistake(f"{role} names {unknown[0]}; the detectors of this run give {', '.join(known)}")
    if isinstance(decision, CleanMean | PoolMedian) and decision.score in _given(inputs.second):
        raise Mistake(
            f"decision.kind {decision.kind} averages all scores, and only candidates of the second stage have "
            f"{decision.score}; decide by a column of the first stage, or by another rule"
        )
    divides = judging.classifier and judging.classifier.splits > 1 and decision.score == CLASSIFIER
    if divides and isinstance(decision, Conformal) and (decision.mondrian_bins > 1 or decision.storey):
        raise Mistake(NO_BINS)
    if inputs.second:
        _ = inputs.chosen_by
    by_itself = inputs.config.calibration
    if inputs.calibration or (isinstance(by_itself, FromCorpus) and by_itself.from_corpus):
        return
    if decision.needs_calibration and not (isinstance(by_itself, FromCorpus) and isinstance(decision, Conformal)):
        raise lacks_calibration(decision.score)
    if judging.classifier:
        raise Mistake(
            "judging.classifier: it tells the pool from clean samples, half of the calibration samples, and there are "
            "none; name some as calibration"
        )


def _check_score(score: str, judged: Sequence[str]) -> None:
    if score not in judged:
        raise Mistake(f"decision.score is {score!r}; the detectors of this run give {', '.join(judged)}")


class _Run:
    """One run of the score job: its models, and its three steps."""

    def __init__(self, inputs: Inputs):
        config = inputs.config
        self.inputs, self.config, self.output = inputs, config, inputs.output
        self.victim = load_victim(config.victim)
        reference = config.reference and config.reference.located()
        self.encoding = Encoding(config.victim.located(), reference, inputs.needs, self._known())
        self.encoding.check(self.victim)
        self.encoded_with = self.encoding.made_with(self.victim)
        if inputs.source is not None:
            self._check_source(inputs.source / "scores")
        self.opened = {one.label: open_scorer(one, self.victim, {}) for one in inputs.all_detectors if not one.fits}
        self.dropped: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        plain = [
            column for scorer in self.opened.values() for column in scorer.columns if column not in scorer.controls
        ]
        later = _given([one for one in inputs.all_detectors if one.fits])
        _check_score(config.decision.score, [*plain, *later, *inputs.judging.made])

    def _known(self) -> str | None:
        """The folder of the pass whose embeddings are used, if there is one.

        Raises:
            Mistake: it is of another victim, or was written in chunks of another size.
        """
        if self.config.known_embeddings is None:
            return None
        folder = place(self.config.known_embeddings) / "embeddings" / "train"
        made_with = read_json(folder / "pass.json", "record of the pass that embedded a decoder's training data")
        if made_with.get("victim") != self.victim.fingerprint:
            raise Mistake(
                f"known_embeddings: {folder} holds embeddings of another victim: {made_with.get('victim')!r} there, "
                f"{self.victim.fingerprint!r} now; name the folder of a decoder of this victim, or leave it out"
            )
        if made_with.get("chunk_size") != self.config.chunk_size:
            raise Mistake(
                f"known_embeddings: {folder} was written in chunks of {made_with.get('chunk_size')} samples, this run "
                f"scores chunks of {self.config.chunk_size}; set chunk_size to {made_with.get('chunk_size')}"
            )
        return str(folder)

    def _check_source(self, folder: Place) -> None:
        """Check that stored embeddings are those of this run's encoders, and all that its detectors need.

        Raises:
            Mistake: they are not.
        """
        made_with, now = read_json(folder / "pass.json", "record of a pass"), self.encoded_with
        for role in ("victim", "reference"):
            there = made_with.get(role)
            if there != now[role] and (role == "victim" or "reference" in self.encoding.needs):
                raise Mistake(
                    f"{folder} holds embeddings of another {role} encoder: {there!r} there, {now[role]!r} now; name "
                    "the one that made them, or score the shards"
                )
        needed = {"embedding", *(EMBEDDING_OF[need] for need in self.encoding.needs if need != "image")}
        share = made_with.get("embeddings_kept", 0)
        lacking = sorted(needed - set(read_parts(folder, self.inputs.shards[0].name).column_names))
        if share != 1:
            raise Mistake(
                f"{folder} keeps the embeddings of {share:.0%} of its samples only; score the shards with "
                "store_embeddings: true, or name shards instead of embeddings"
            )
        if lacking:
            raise Mistake(
                f"{folder} holds no {', '.join(lacking)} of its samples; score the shards with store_embeddings: "
                "true, and with a detector that needs the same, or name shards instead of embeddings"
            )

    # ---------------------------------------------------------------------------------------------- fitting

    def fit(self) -> None:
        """Let every detector that fits something leave its state; then open them all, which checks them.

        Raises:
            Mistake: the decision needs a detector that cannot be fitted.
        """
        fits = [one for one in self.inputs.all_detectors if one.fits]
        if fits:
            pool, clean = self._pool(), None
            if self.inputs.clean:
                share = min(1.0, self.config.fitting.num_samples / max(1, count_samples(self.inputs.clean)))
                clean = self._fitting_set("clean", self.inputs.clean, share)
                if not len(clean):
                    raise Mistake("not one sample of fitting.clean could be embedded; check these shards")
            inputs = _digest(pool) + (_digest(clean) if clean else "")
            for detector in fits:
                try:
                    fit_state(detector, pool, clean, inputs, self._state_path(detector))
                except (Mistake, np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:
                    logger.warning("%s cannot be fitted, and is left out: %s", detector.label, error)
                    self.dropped[detector.label] = str(error)
                else:
                    self.opened[detector.label] = open_scorer(detector, self.victim, self._state(detector))
        if self.dropped:
            self.inputs = _without(self.inputs, self.dropped)
        self.scorers = [self.opened[one.label] for one in self.inputs.detectors]
        self.second_scorers = [self.opened[one.label] for one in self.inputs.second]
        self.columns = [column for scorer in self.scorers for column in scorer.columns]
        self.second_columns = [column for scorer in self.second_scorers for column in scorer.columns]
        self.controls = [column for scorer in self.scorers for column in scorer.controls]
        everything = [*self.columns, *self.second_columns]
        twice = [name for name, count in Counter(everything).items() if count > 1]
        if twice:
            raise Mistake(f"two detectors give the column {twice[0]}; set `name` of one")
        vectors = [name for scorer in self.scorers for name in vectors_of(scorer)]
        if lacking := [name for name in self.inputs.judging.residuals if name not in vectors]:
            raise Mistake(
                f"judging looks at residuals {lacking[0]}, and the detectors of this run give "
                f"{', '.join(vectors) or 'none'}; attach dede (dede_residual) or consistency (xc_residual)"
            )
        kin = self.config.decision.score.partition("_")[0]
        self.residual = next((name for name in vectors if name.partition("_")[0] == kin), [*vectors, None][0])
        self.vectors = sorted({*self.inputs.judging.residuals, *([self.residual] if self.residual else [])})
        late = self.second_columns if self.inputs.decides_late else []
        made = self.inputs.judging.made
        _check_score(self.config.decision.score, [c for c in [*self.columns, *late, *made] if c not in self.controls])
        if self.inputs.second and self.inputs.chosen_by not in self.columns:
            raise Mistake(
                f"second_stage: its candidates are chosen by {self.inputs.chosen_by}, which this run does not give; "
                f"set second_stage.by to one of {', '.join(self.columns)}"
            )

    def check_overlap(self) -> None:
        """Stop where one picture is in two of corpus, calibration and clean fitting data, as far as that is cheap."""
        inputs, config = self.inputs, self.config
        roles = {"shards": inputs.shards, "calibration": inputs.calibration, "fitting.clean": inputs.clean}
        source = {"shards": "scores", "calibration": "calibration"} if inputs.source is not None else {}
        folders = {role: inputs.source / name for role, name in source.items() if inputs.source is not None}
        require_apart(roles, folders, config.overlap, config.limits, self.output / "overlap.json")

    def forget_changed(self) -> None:
        """Let go of what came of shards that have changed since."""
        inputs = self.inputs
        for name, shards in (
            ("fitting/scores", inputs.shards), ("fitting/calibration", inputs.calibration),
            ("fitting/clean", inputs.clean), ("calibration", inputs.calibration), ("scores", inputs.shards),
            ("second_stage", inputs.shards), ("second_stage_calibration", inputs.calibration),
        ):  # fmt: skip
            forget_changed(self.output / name, shards)

    def _pool(self) -> Batch:
        """A keyed draw of corpus and calibration samples in one heap: no detector learns which of them calibrate."""
        fitting, inputs = self.config.fitting, self.inputs
        passes = [("scores", inputs.shards), *([("calibration", inputs.calibration)] if inputs.calibration else [])]
        if inputs.source is None:
            share = min(
                1.0, fitting.num_samples / max(1, sum(self._num_samples(name, shards) for name, shards in passes))
            )
            heap = in_one_heap(*(self._fitting_set(name, shards, share) for name, shards in passes))
        else:
            source = inputs.source
            num_samples = sum(
                read_end(source / name, one.name).num_samples for name, shards in passes for one in shards
            )
            drawn = KeyedShare(min(1.0, fitting.num_samples / max(1, num_samples)), fitting.seed)
            heap = in_one_heap(*(gathered(source / name, shards, drawn) for name, shards in passes))
        if not len(heap):
            raise Mistake("not one sample could be embedded, so there is nothing to fit detectors to; check the shards")
        return heap

    def _fitting_set(self, name: str, shards: list[Shard], share: float) -> Batch:
        config = self.config
        return fitting_set(
            shards, self.output / "fitting" / name, self.encoding, share, config.fitting.seed,
            chunk_size=config.chunk_size, limits=config.limits, resources=config.resources,
            max_error_fraction=config.max_error_fraction, name=f"fitting, {name}",
        )  # fmt: skip

    def _state_path(self, detector: DetectorSettings) -> Place:
        return self.output / "fitting" / f"{detector.label}.safetensors"

    def _state(self, detector: DetectorSettings) -> State:
        return read_tensors(self._state_path(detector)) if detector.fits else {}

    # ---------------------------------------------------------------------------------------------- scoring

    def score(self) -> PassSummary:
        """Pass over calibration shards and shards; then the second stage over what looks worst."""
        passes = [("calibration", self.inputs.calibration), ("scores", self.inputs.shards)]
        summary = [self._pass(name, shards) for name, shards in passes if shards][-1]
        if self.inputs.second:
            stages = {"scores": ("second_stage", self.inputs.shards)}
            if self.inputs.decides_late and self.inputs.calibration:
                stages["calibration"] = ("second_stage_calibration", self.inputs.calibration)
            chosen = self._candidates([*stages])
            for name, (folder, shards) in stages.items():
                self._second_pass(self.output / folder, shards, chosen[name])
        return summary

    def _second_pass(self, folder: Place, shards: list[Shard], chosen: list[str]) -> None:
        config = self.config
        made_with = self.made_with(self.inputs.second, self.second_scorers) | {"candidates": hash_of_ids(chosen)}
        if (folder / "pass.json").is_file():  # which other candidates do not resume
            there = read_json(folder / "pass.json", "record of a pass")
            if there.get("candidates") != made_with["candidates"]:
                forget_pass(folder)
        run_pass(
            shards, folder, ScoreWork, self._work(self.inputs.second), image_size=self.victim.image_size,
            chunk_size=config.chunk_size, limits=config.limits, made_with=made_with, resources=config.resources,
            max_error_fraction=config.max_error_fraction, name=folder.name.replace("_", " "),
            select=Chosen(frozenset(chosen)),
        )  # fmt: skip

    def _pass(self, name: str, shards: list[Shard]) -> PassSummary:
        config, vectors = self.config, self.vectors
        work = {**self._work(self.inputs.detectors), "vectors": vectors}
        common: dict[str, Any] = {
            "made_with": self.made_with(self.inputs.detectors, self.scorers)
            | ({"vectors": vectors} if vectors else {}),
            "resources": config.resources,
            "max_error_fraction": config.max_error_fraction,
            "name": name,
        }
        if self.inputs.source is not None:
            return run_over_parts(shards, self.inputs.source / name, self.output / name, RescoreWork, work, **common)
        keep = self._kept(name, shards)
        common["made_with"] |= {"embeddings_kept": keep.share}
        if name == "scores" and self.config.overlap == "refuse":
            work["known"] = known_pictures(self.output / "calibration", self.inputs.calibration)
        return run_pass(
            shards, self.output / name, ScoreWork, {**work, "keep": keep},
            image_size=self.victim.image_size, chunk_size=config.chunk_size, limits=config.limits, **common,
        )  # fmt: skip

    def _num_samples(self, name: str, shards: list[Shard]) -> int:
        """How many samples these shards have, counted once: it takes a walk over all of them."""
        if name not in self.counts:
            self.counts[name] = count_samples(shards)
        return self.counts[name]

    def _kept(self, name: str, shards: list[Shard]) -> KeyedShare:
        """Whose embeddings are written beside the scores: all, or as many as comparing two domains takes."""
        if self.config.store_embeddings:
            return KeyedShare(1.0, 0)
        return KeyedShare(min(1.0, NUM_KEPT / max(1, self._num_samples(name, shards))), 0)

    def _work(self, detectors: list[DetectorSettings]) -> dict[str, Any]:
        states = [str(self._state_path(one)) if one.fits else None for one in detectors]
        return {"encoding": self.encoding, "detectors": [one.located() for one in detectors], "states": states}

    def made_with(self, detectors: Sequence[DetectorSettings], scorers: Sequence[Scorer]) -> dict[str, Any]:
        """What scores depend on."""
        return {
            **self.encoded_with,
            "detectors": {one.label: scorer.fingerprint for one, scorer in zip(detectors, scorers, strict=True)},
            "versions": versions(),
        }

    def _candidates(self, passes: list[str]) -> dict[str, list[str]]:
        """Of each pass the ids of the samples with the highest scores of all these passes; no more than those are kept
        in memory."""
        assert self.config.second_stage is not None
        name, best = self.inputs.chosen_by, None
        for number, one in enumerate(passes):
            for shard in self.inputs.shards if one == "scores" else self.inputs.calibration:
                table = read_parts(self.output / one, shard.name, ["sample_id", name]).drop_null()
                table = table.append_column("pass", pa.array([number] * len(table), pa.int64()))
                table = table if best is None else pa.concat_tables([best, table])
                best = highest(table, name, self.config.second_stage.num_candidates)
        assert best is not None
        found = [*zip(best["pass"].to_pylist(), best["sample_id"].to_pylist(), strict=True)]
        return {one: sorted(name for at, name in found if at == number) for number, one in enumerate(passes)}

    # ---------------------------------------------------------------------------------------------- deciding

    def decide(self, summary: PassSummary) -> Manifest:
        """Turn scores into a list, and write the manifest: in a task, as it takes memory for every sample."""
        work = _Deciding(
            config=self.config, output=self.output, source=self.inputs.source, shards=self.inputs.shards,
            calibration=self.inputs.calibration, clean=self.inputs.clean, judging=self.inputs.judging,
            columns=self.columns, controls=self.controls, second_columns=self.second_columns,
            decides_late=self.inputs.decides_late, dropped=self.dropped, victim=self.encoding.victim,
            residual=self.residual,
            looks_at_captions="caption" in self.encoding.needs,
            made_with=self.made_with(self.inputs.detectors, self.scorers), summary=summary,
        )  # fmt: skip
        memory = summary.num_samples * BYTES_PER_DECIDED
        largest = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if memory > largest:
            logger.warning("deciding takes about %.1f GB, no node has more than %.1f", memory / 1e9, largest / 1e9)
        decide = ray.remote(_Deciding.manifest).options(num_cpus=1, memory=min(memory, int(largest)))
        try:
            return Manifest(self.output, ray.get(decide.remote(work)))
        except RayTaskError as error:
            raise error.cause from None


def highest(table: pa.Table, name: str, num: int) -> pa.Table:
    """The rows with the highest numbers in a column; equal ones by random keys, as ids know who calibrates.

    Args:
        table: with the columns sample_id and pass.
    """
    rows = zip(table["pass"].to_pylist(), table["sample_id"].to_pylist(), strict=True)
    keys = sample_keys([f"{number} {sample_id}" for number, sample_id in rows], 0)
    order = pa.table({"score": table[name], "key": pa.array(keys.numpy())})
    return table.take(pc.sort_indices(order, [("score", "descending"), ("key", "ascending")])[:num])


def settings_of(manifest: Manifest) -> ScoreConfig:
    """The settings that a manifest was scored with.

    Raises:
        Mistake: another version wrote it, with settings that this one does not know.
    """
    try:
        return ScoreConfig.model_validate(manifest.settings)
    except ValidationError as error:
        where = manifest.folder / "manifest.json"
        raise Mistake(f"{where} was written with other settings than these:\n{explain(error, ScoreConfig)}") from None


def victim_of(manifest: Manifest) -> Victim:
    """Load the victim that made a manifest, and no other.

    Raises:
        Mistake: it is gone, or has changed since.
    """
    victim = load_victim(settings_of(manifest).victim)
    scored = manifest.info["victim"]["fingerprint"]
    if victim.fingerprint != scored:
        raise Mistake(
            f"victim {victim.name} has changed since it scored: its fingerprint is {victim.fingerprint[:12]}, the "
            f"manifest has {scored[:12]}; score again, or put the old weights back"
        )
    return victim


def fit_state(detector: DetectorSettings, pool: Batch, clean: Batch | None, inputs: str, path: Place) -> None:
    """Fit one detector and write its state, unless the folder holds the same one already."""
    fitted_with = hashlib.sha256(f"{detector.label}{detector.model_dump_json()}{inputs}".encode()).hexdigest()
    record = path.with_suffix(".json")
    if record.is_file() and path.is_file() and read_json(record, "record of a fit").get("fitted_with") == fitted_with:
        return
    logger.info("fitting %s on %s samples", detector.label, f"{len(pool):,}")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in detector.fit(pool, clean).items()}
    record.unlink(missing_ok=True)
    write_atomically(path, save(state))
    write_json(record, {"fitted_with": fitted_with, "num_samples": len(pool)})


def _digest(batch: Batch) -> str:
    digest = hashlib.sha256(batch.keys(0).numpy().tobytes())
    for tensor in (batch.embedding_BE, batch.reference_BR, batch.caption_BE, batch.reference_caption_BR):
        digest.update(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def hash_of_ids(sample_ids: Sequence[str]) -> str:
    """SHA-256 of ids, in this order."""
    return hashlib.sha256("\n".join(sample_ids).encode("utf-8", "surrogateescape")).hexdigest()


class _Scoring:
    """What a scoring actor holds: every detector, opened."""

    def __init__(
        self, victim: Victim, detectors: list[DetectorSettings], states: list[str | None], vectors: Sequence[str] = ()
    ):
        """`vectors` says which columns of vectors are written beside the scores."""
        self.scorers = [
            open_scorer(detector, victim, read_tensors(state) if state else {})
            for detector, state in zip(detectors, states, strict=True)
        ]
        self.columns: dict[str, pa.DataType] = {
            column: pa.float32() for scorer in self.scorers for column in scorer.columns
        }
        for scorer in self.scorers:
            for name, width in vectors_of(scorer).items():
                if name in vectors:
                    self.columns[name] = pa.list_(pa.float16(), width)
        self.laps = Laps()

    def lap(self, stage: str) -> None:
        """Book a stage; what a device still computes belongs to it."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.laps.mark(stage)

    def score(self, batch: Batch) -> dict[str, Any]:
        found = {name: column for scorer in self.scorers for name, column in everything_of(scorer, batch).items()}
        return {
            name: [*found[name].astype(np.float16)] if pa.types.is_fixed_size_list(kind) else found[name]
            for name, kind in self.columns.items()
            if name in found
        }


class ScoreWork(_Scoring):
    """What a scoring actor does with a chunk: one forward of each encoder, then every detector."""

    def __init__(
        self,
        encoding: Encoding,
        detectors: list[DetectorSettings],
        states: list[str | None],
        keep: KeyedShare | None = None,
        known: frozenset[bytes] = frozenset(),
        vectors: Sequence[str] = (),
    ):
        """`keep` says whose embeddings are written; None writes nothing but the scores. `known` pictures may not be."""
        self.encoders = Encoders(encoding)
        super().__init__(self.encoders.victim, detectors, states, vectors)
        self.image_size, self.keep, self.known = self.encoders.image_size, keep, known
        if keep is not None:
            self.columns |= {**self.encoders.columns("float16"), **LOOKS}

    def __call__(self, chunk: Chunk) -> dict[str, Any]:
        if self.known:
            refuse_common({"shards": pictures(chunk.content_hashes), "calibration": set(self.known)}, "refuse")
        batch = self.encoders(chunk)
        self.lap("encode")
        columns = self.score(batch)
        self.lap("score")
        if self.keep is not None:
            is_kept = [self.keep(name) for name in chunk.sample_ids]
            for name, rows in stored(batch, "float16").items():
                columns[name] = [row if keep else None for row, keep in zip(rows, is_kept, strict=True)]
            columns["caption"] = chunk.captions
            columns["perceptual_hash"] = [perceptual_hash(image_HWC) for image_HWC in chunk.image_BHWC]
        return columns


class RescoreWork(_Scoring):
    """What an actor does with a part of stored embeddings; what else was stored is carried over."""

    def __init__(
        self,
        encoding: Encoding,
        detectors: list[DetectorSettings],
        states: list[str | None],
        vectors: Sequence[str] = (),
    ):
        super().__init__(load_victim(encoding.victim), detectors, states, vectors)
        self.columns |= LOOKS

    def __call__(self, table: pa.Table) -> dict[str, Any]:
        missing = [None] * len(table)
        looks = {name: table[name].to_pylist() if name in table.column_names else missing for name in LOOKS}
        columns = self.score(restored(table))
        self.lap("score")
        return {**columns, **looks}


LOOKS: dict[str, pa.DataType] = {"caption": pa.string(), "perceptual_hash": pa.uint64()}
"""Columns that findings are made of."""


@dataclass(frozen=True)
class _Deciding:
    """What turns the parts of a finished pass into a manifest; runs wherever the cluster has the memory."""

    config: ScoreConfig
    output: Place
    source: Place | None
    shards: list[Shard]
    calibration: list[Shard]
    clean: list[Shard]
    judging: Judging
    columns: list[str]
    controls: list[str]
    second_columns: list[str]
    decides_late: bool
    dropped: dict[str, str]
    victim: VictimConfig
    residual: str | None
    looks_at_captions: bool
    made_with: dict[str, Any]
    summary: PassSummary

    def manifest(self) -> dict[str, Any]:
        """Judge, and write the findings and the manifest; the manifest's description."""
        config = self.config
        corpus = self._scored("scores", self.shards)
        calibration = self._scored("calibration", self.calibration) if self.calibration else None
        calibration, num_left_out = self._apart(calibration)
        covariates = [name for name in self.controls if name.startswith("stat_")]
        asked = (self.judging, config.decision, corpus)
        if isinstance(config.calibration, FromCorpus):
            reviews = read_reviews(config.calibration.reviewed)
            judged = judge_by_itself(*asked, config.calibration, reviews, covariates, self.looks_at_captions)
        else:
            judged = judge(*asked, calibration, covariates, self.looks_at_captions)
        if num_left_out:
            judged.report["num_calibration_in_corpus"] = num_left_out
        made_with, groups = self.made_with, self._groups(corpus, judged)
        info = {
            "settings": config.model_dump(mode="json", exclude={"resources", "rescore_changed", "full_digest"}),
            "victim": {"path": pinned(config.victim.path), "fingerprint": made_with["victim"]},
            "reference": made_with["reference"],
            "detectors": made_with["detectors"],
            "versions": made_with["versions"],
            "score_columns": [*self.columns, *judged.made],
            "second_stage_columns": self.second_columns,
            "controls": self.controls,
            **({"left_out": self.dropped} if self.dropped else {}),
            "decision": judged.report,
            "counts": {
                "samples": self.summary.num_samples,
                "scored": self.summary.num_samples - sum(self.summary.errors.values()),
                "unreadable": self.summary.errors,
                "flagged": int(judged.verdict.flagged.sum()),
                "notes": self.summary.notes,
                "truncated_shards": self.summary.truncated_shards,
                "duplicated_images": sum(name is not None for name in judged.group_id),
                "findings": len(judged.findings),
                "flagged_findings": sum(one.share_flagged > 0 for one in judged.findings),
                "groups": len(groups),
                "acting_groups": sum(bool(one["acts"]) for one in groups),
            },
            "groups": [one["said"] for one in groups if one["num_flagged"] or one["acts"]],
        }
        findings = {"groups": groups, "findings": [asdict(one) for one in judged.findings]}
        return write_manifest(self.output, self._rows(judged), info, findings, judged.to_review).info

    def _groups(self, corpus: Scored, judged: Judged) -> list[dict[str, Any]]:
        """What groups of suspicious samples share; computed where the victim was, if that is a GPU."""
        config = self.config
        if config.findings is None:
            return []
        about = Corpus(
            self.shards, config.limits, corpus, judged.verdict, self.output / "scores", self.residual,
            has_pictures=self.source is None,
        )  # fmt: skip
        gpus = config.resources.gpus_per_actor
        try:
            if not gpus:
                return find(config.findings, self.output, about, self.victim)
            remote = ray.remote(find).options(num_cpus=1, num_gpus=gpus)
            return ray.get(remote.remote(config.findings, self.output, about, self.victim))
        except (Mistake, OSError, RayTaskError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if not isinstance(cause, Mistake | OSError):
                raise
            logger.warning("findings: groups are left out: %s", cause)
            return []

    def _apart(self, calibration: Scored | None) -> tuple[Scored | None, int]:
        """The calibration samples, without those whose picture is in the corpus if the settings want that; how many
        were.

        Raises:
            Mistake: one picture is in two of corpus, calibration and clean fitting data.
        """
        passes = (
            ("shards", "scores", self.shards),
            ("calibration", "calibration", self.calibration),
            ("fitting.clean", "fitting/clean", self.clean),
        )
        seen = {role: known_pictures(self.output / name, shards) for role, name, shards in passes}
        refuse_common(seen, self.config.overlap)
        if calibration is None or not (both := seen["shards"] & seen["calibration"]):
            return calibration, 0
        kept = np.array([picture(name) not in both for name in calibration.content_hash], bool)
        return calibration.part(kept), int((~kept).sum())

    def _scored(self, name: str, shards: list[Shard]) -> Scored:
        """All that a pass wrote, but for the embeddings of those that were not drawn."""
        folder = self.output / name
        texts: dict[str, list[Any]] = {column: [] for column in ("sample_id", "content_hash", *LOOKS)}
        scores: dict[str, list[np.ndarray]] = {column: [] for column in self.columns}
        vectors: dict[str, list[np.ndarray]] = {column: [] for column in self.judging.residuals}
        kept: list[pa.Table] = []
        errors: list[Any] = []
        for shard in shards:
            table = read_parts(folder, shard.name)
            for column, found in texts.items():
                found += table[column].to_pylist() if column in table.column_names else [None] * len(table)
            errors += table["error"].to_pylist()
            for column, values in scores.items():
                values.append(table[column].to_numpy(zero_copy_only=False).astype(np.float64))
            for column, values in vectors.items():
                values.append(matrix(table[column]).numpy())
            if self.source is None and "embedding" in table.column_names:
                kept.append(with_embeddings(table))
        batch = None
        if self.source is not None:
            batch = gathered(self.source / name, shards)
        elif kept and sum(map(len, kept)):
            batch = restored(pa.concat_tables(kept))
        seen = None if batch is None else batch.embedding_BE if batch.reference_BR is None else batch.reference_BR
        columns = {column: np.concatenate(values) for column, values in scores.items()}
        residuals = {column: np.concatenate(values) for column, values in vectors.items()}
        late: dict[str, np.ndarray] = {}
        is_beneath = np.zeros(len(errors), bool)
        if self.decides_late:
            second, candidates = self._second_scores(name, shards)
            for column in self.second_columns:
                late[column] = np.array([second.get((one, column), np.nan) for one in texts["sample_id"]], np.float64)
            rows = zip(texts["sample_id"], errors, strict=True)
            is_beneath = np.array([error is None and one not in candidates for one, error in rows], bool)
        return Scored(
            sample_ids=texts["sample_id"],
            content_hash=texts["content_hash"],
            captions=texts["caption"],
            perceptual_hash=texts["perceptual_hash"],
            columns={**columns, **late},
            late=frozenset(late),
            residuals=residuals,
            is_beneath=is_beneath,
            embedding_ids=batch.sample_ids if batch else [],
            embedding_ME=None if seen is None else seen.numpy(),
        )

    def _rows(self, judged: Judged) -> Iterator[tuple[str, pa.Table]]:
        verdict, (second, _), start = judged.verdict, self._second_scores("scores", self.shards), 0
        for shard in self.shards:
            table = read_parts(self.output / "scores", shard.name).select([*BASE_SCHEMA.names, *self.columns])
            here = slice(start, start + len(table))
            start += len(table)
            error = table["error"]
            values = (
                judged.score_N[here], verdict.p_value[here], verdict.rank[here], verdict.poisoned_at_least[here],
                verdict.flagged[here], judged.group_id[here],
            )  # fmt: skip
            table = table.drop_columns(["error"])
            for column, made_N in judged.made.items():
                table = table.append_column(
                    pa.field(column, pa.float32()), pa.array(made_N[here], pa.float32(), from_pandas=True)
                )
            for column in self.second_columns:
                found = [second.get((name, column)) for name in table["sample_id"].to_pylist()]
                table = table.append_column(pa.field(column, pa.float32()), pa.array(found, pa.float32()))
            for (name, kind), value in zip(DECISION_COLUMNS, values, strict=True):
                table = table.append_column(pa.field(name, kind), pa.array(value, kind, from_pandas=True))
            for name, column in judged.extra.items():
                table = table.append_column(pa.field(name, column.type), column[here])
            yield shard.name, table.append_column("error", error)

    def _second_scores(self, name: str, shards: list[Shard]) -> tuple[dict[tuple[str, str], float], set[str]]:
        """(sample id, column) -> score of the candidates of one pass; and their ids."""
        found: dict[tuple[str, str], float] = {}
        candidates: set[str] = set()
        folder = self.output / ("second_stage" if name == "scores" else "second_stage_calibration")
        for shard in shards if self.second_columns else ():
            for row in read_parts(folder, shard.name, ["sample_id", *self.second_columns]).to_pylist():
                candidates.add(row["sample_id"])
                scored = {(row["sample_id"], column): row[column] for column in self.second_columns}
                found |= {key: value for key, value in scored.items() if value is not None}
        return found, candidates


def _without(inputs: Inputs, dropped: dict[str, str]) -> Inputs:
    """The inputs without detectors that cannot be fitted.

    Raises:
        Mistake: then nothing gives what the decision looks at.
    """
    gone = {c: one.label for one in inputs.all_detectors if one.label in dropped for c in one.named(one.gives)}
    judging, decision = inputs.judging, inputs.config.decision
    judging = judging.model_copy(update={"fair": [name for name in judging.fair if name not in gone]})
    if judging.combined:
        lost = {*gone, *(name + FAIR for name in gone)}
        kept = tuple(name for name in judging.combined.columns if name not in lost)
        combined = judging.combined.model_copy(update={"columns": kept}) if kept else None
        judging = judging.model_copy(update={"combined": combined})
    for name in (COMPANY, CLASSIFIER, AMPLIFIED):
        if {*judging.made_of(name)} & gone.keys():
            judging = judging.model_copy(update={name: None})
    left = replace(
        inputs,
        judging=judging,
        detectors=[one for one in inputs.detectors if one.label not in dropped],
        second=[one for one in inputs.second if one.label not in dropped],
    )
    needed = {decision.score.removesuffix(FAIR), *([judging.difficulty] if judging.difficulty else [])}
    culprits = {gone[name] for name in needed if name in gone}
    if decision.score in inputs.judging.made and decision.score not in judging.made:
        culprits |= {gone[name] for name in inputs.sources if name in gone}
    if culprits or not left.detectors:
        why = "; ".join(f"{label}: {dropped[label]}" for label in sorted(culprits or dropped))
        raise Mistake(f"decision.score is {decision.score!r}, and what gives it cannot be fitted: {why}")
    return left


def versions() -> dict[str, str]:
    """Versions of the libraries that scores depend on."""
    return {name: importlib.metadata.version(name) for name in VERSIONS_OF}
