"""What every detector sees, and what it promises.

A detector is a frozen settings class. `fit` learns from the pool, a keyed sample of corpus and calibration samples in
one heap (and, where there is one, from a clean set), and returns tensors, which become a state file; `open` makes a
scorer from them. A detector never learns which samples of the pool calibrate: on that the p-values of its scores rest.

A scorer names its columns and turns a batch into one float32 number per sample and column: **higher always means more
likely poisoned**. A score depends on the sample, the models, the state, the settings and the seed; never on the other
samples of the batch. Machines of one kind give equal scores; those of two kinds round otherwise, and training
multiplies that. Columns named in `controls` are no detectors but what detectors must beat.

Shapes: B samples, E width of the victim's embedding, R width of the reference encoder's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dede_ray.models.embedding import Batch, Need
from dede_ray.models.victims import Victim
from dede_ray.runtime.config import Config, Mistake

DrawnFrom = Literal["pool", "clean"]
"""What a detector is fitted on: corpus and calibration samples in one heap, or other samples, which are clean."""

State = dict[str, Tensor]
"""What fitting leaves behind; empty where there is nothing to fit."""


class Scorer(Protocol):
    """A detector ready to score."""

    columns: tuple[str, ...]
    controls: tuple[str, ...]
    """Those of the columns that no decision may be made on."""
    fingerprint: str
    """Equal fingerprints give equal scores."""

    def score(self, batch: Batch) -> dict[str, np.ndarray]:
        """One float32 number (B,) for each column. Scorers that have `vectors_of` them give rows (B, width) of these,
        too, where a second argument says so."""
        ...


def vectors_of(scorer: Scorer) -> Mapping[str, int]:
    """Columns of vectors that a scorer gives beside its scores, and their widths; most give none.

    They are residuals, what the victim says less what was expected, for what looks at several samples together
    (scan/pool.py). A scorer that has some names them in an attribute `vectors`.
    """
    return getattr(scorer, "vectors", {})


def everything_of(scorer: Scorer, batch: Batch) -> dict[str, np.ndarray]:
    """A scorer's columns, and its vectors where it has some."""
    ask: Any = scorer.score
    return ask(batch, True) if vectors_of(scorer) else ask(batch)


class DetectorSettings(Config):
    """What the settings of all detectors share."""

    name: str = Field("", pattern="^[a-z0-9_]*$")
    """Ends the columns, as in `dao_far`, where one kind is attached more than once."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    fits: ClassVar[bool] = False
    """Whether `fit` has something to learn."""

    @property
    def gives(self) -> tuple[str, ...]:
        """Columns that its scorer may have, known without any model; those that the victim or a file rules out are
        missing later. Without `name`."""
        raise NotImplementedError

    @property
    def gives_controls(self) -> tuple[str, ...]:
        """Those of them that are controls."""
        return ()

    @property
    def takes_clean(self) -> bool:
        """Whether `fit` needs clean samples."""
        return getattr(self, "drawn_from", None) == "clean"

    def named(self, columns: Iterable[str]) -> list[str]:
        """Columns as the run calls them, ending in `name` where there is one."""
        return [f"{column}_{self.name}" if self.name else column for column in columns]

    @property
    def label(self) -> str:
        """Its name within a run: the kind, and `name` where there is one."""
        return f"{self.kind}_{self.name}" if self.name else self.kind  # type: ignore[attr-defined]

    def fit(self, pool: Batch, clean: Batch | None) -> State:
        """Learn from a keyed sample of corpus and calibration (`in_one_heap`), and from clean samples if given.

        Raises:
            Mistake: it cannot be fitted to these: too few samples, too little that they explain. A run leaves the
                detector out then, and says so.
        """
        return {}

    def drawn(self, drawn_from: DrawnFrom, pool: Batch, clean: Batch | None) -> Batch:
        """The one of the two that the settings name for fitting.

        Raises:
            Mistake: clean samples are wanted, and there are none.
        """
        source = pool if drawn_from == "pool" else clean
        if source is None:
            raise Mistake(
                f"{self.kind}: drawn_from is clean, and the run has no clean samples; name some, or leave it out"  # type: ignore[attr-defined]
            )
        return source

    def open(self, victim: Victim, state: State) -> Scorer:
        """Make the scorer, on the victim's device.

        Raises:
            Mistake: a state or a file that does not fit the victim.
        """
        raise NotImplementedError

    def located(self) -> DetectorSettings:
        """The same with absolute paths, for Ray's workers, whose working folder may be another."""
        return self


def state_fingerprint(settings: Config | None, state: State) -> str:
    """SHA-256 over settings and tensors: what a fitted detector's scores depend on, beside the victim."""
    digest = hashlib.sha256(settings.model_dump_json().encode() if settings else b"")
    for name, tensor in sorted(state.items()):
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def as_scores(columns: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Columns of numbers as the score pass wants them: float32 on the CPU."""
    return {name: column_B.float().cpu().numpy() for name, column_B in columns.items()}


WIDEST_RESIDUAL = 128
"""Components that are kept of a residual; a random projection keeps cosines to within a tenth."""


def residual_projection(width: int) -> Tensor:
    """What brings residuals to `WIDEST_RESIDUAL` components at most: float64 (width, R), always the same."""
    if width <= WIDEST_RESIDUAL:
        return torch.eye(width, dtype=torch.float64)
    drawn = torch.randn(width, WIDEST_RESIDUAL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q * math.sqrt(width / WIDEST_RESIDUAL)


class Renamed:
    """A scorer whose columns end in the name that its settings gave it."""

    def __init__(self, scorer: Scorer, name: str):
        self._scorer, self._name = scorer, name
        self.fingerprint = scorer.fingerprint
        self.columns = tuple(f"{column}_{name}" for column in scorer.columns)
        self.controls = tuple(f"{column}_{name}" for column in scorer.controls)
        self.vectors = {f"{column}_{name}": width for column, width in vectors_of(scorer).items()}

    def score(self, batch: Batch, with_vectors: bool = False) -> dict[str, np.ndarray]:
        found = everything_of(self._scorer, batch) if with_vectors else self._scorer.score(batch)
        return {f"{column}_{self._name}": score_B for column, score_B in found.items()}


def open_scorer(detector: DetectorSettings, victim: Victim, state: State) -> Scorer:
    """`detector.open`, with the columns' names ending as the settings want it."""
    scorer = detector.open(victim, state)
    return Renamed(scorer, detector.name) if detector.name else scorer
