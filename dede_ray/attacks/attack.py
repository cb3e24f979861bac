"""`attack`: from a clean encoder to a tampered one, by whichever method the settings name."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from dede_ray.attacks.badencoder import BadEncoder
from dede_ray.attacks.drupe import Drupe
from dede_ray.attacks.tamper import CHUNK_SIZE, Subject, TamperConfig, TowardsRecipe, index_of, read_targets
from dede_ray.attacks.text_on_pair import PairRecipe, TextOnPair, captions_of_target, draw_poisoned
from dede_ray.config import Mistake, claim, finish, write_json
from dede_ray.loop import Recipe, Workers, fit
from dede_ray.tracking import Tracking
from dede_ray.victims import load_victim

logger = logging.getLogger(__name__)

Attack = Annotated[BadEncoder | Drupe | TextOnPair, Field(discriminator="kind")]


class AttackConfig(TamperConfig):
    """Settings of jobs/attack.py."""

    attack: Attack

    def identity(self) -> AttackConfig:
        """The settings that make an attack what it is: not where it runs, nor where it can be watched."""
        return self.model_copy(update={"workers": Workers(), "tracking": Tracking()})


def attack(config: AttackConfig) -> str:
    """Tamper with the clean encoder; Ray must be running. The same command, run again, resumes.

    The output folder becomes a victim of the clean one's kind, with `attack.json` beside it: what was done to it, the
    triggers, targets and references, and the fingerprints of both.

    Returns:
        One line: what was planted and how close triggered images come.

    Raises:
        Mistake: settings, references, shards or weights that do not fit.
    """
    config.tracking.check()
    output = Path(config.output).absolute()
    if output == Path(config.victim.path).absolute():
        raise Mistake(f"output {config.output} is the clean encoder's own folder; choose another one")
    done = claim(output, config.identity())
    if done is None:
        clean = load_victim(config.victim).fingerprint
        done, record = _plant(config, output)
        tampered = load_victim(_at(config.victim, output)).fingerprint
        about = {"attack": config.attack.kind, "settings": config.identity().model_dump(mode="json"), "seed": config.seed}
        write_json(output / "attack.json", {**about, **record, "clean": clean, "tampered": tampered})
        last = _last_metrics(output)
        done = finish(output, config.identity(), {**done, "metrics": last, "clean": clean, "tampered": tampered})
    told = [f"{name} {done['metrics'][name]:.3f}" for name in ("l0", "l1", "l2") if name in done["metrics"]]
    cosine = done["metrics"].get("triggered_cosine")
    told += [] if cosine is None else [f"triggered images at cosine {cosine:.3f} to the target"]
    return f"{config.attack.kind}: {done['steps']:,} steps, {', '.join(told)} -> {config.output}"
