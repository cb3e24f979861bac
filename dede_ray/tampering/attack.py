"""What `jobs/attack.py` runs: from a clean encoder to a tampered one, by the method that the settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from dede_ray.models.victims import load_victim
from dede_ray.runtime.config import Mistake, claim, finish, write_json
from dede_ray.runtime.session import start_ray
from dede_ray.tampering.badclip import BadClip, plant_badclip
from dede_ray.tampering.badencoder import BadEncoder
from dede_ray.tampering.drupe import Drupe
from dede_ray.tampering.tamper import (
    Subject,
    TamperSettings,
    TowardsRecipe,
    last_metrics,
    read_targets,
    tampered_victim,
)
from dede_ray.tampering.text_on_pair import PairRecipe, TextOnPair, captions_of_target, draw_poisoned
from dede_ray.training.dataloader import index_of
from dede_ray.training.loop import Recipe, Run, check_workers, fit

Attack = Annotated[BadEncoder | Drupe | TextOnPair | BadClip, Field(discriminator="kind")]


class AttackConfig(TamperSettings):
    """Settings of jobs/attack.py."""

    attack: Attack


def attack(config: AttackConfig) -> str:
    """Tamper with the clean encoder. The same command, run again, resumes.

    The output folder becomes a victim of the clean one's kind, with `attack.json` beside it: what was done to it, the
    triggers, targets and references, and the fingerprints of both.

    Returns:
        One line: what was planted and how close triggered images come.

    Raises:
        Mistake: settings, references, shards or weights that do not fit.
    """
    start_ray(config)
    config.tracking.check()
    output = Path(config.output).absolute()
    if output == Path(config.victim.path).absolute():
        raise Mistake(f"output {config.output} is the clean encoder's own folder; choose another one")
    done = claim(output, config.identity())
    if done is None:
        clean = load_victim(config.victim).fingerprint
        done, record = _plant(config, output)
        tampered = load_victim(tampered_victim(config.victim, output)).fingerprint
        prints = {"clean": clean, "tampered": tampered}
        settings = config.identity().model_dump(mode="json")
        about = {"attack": config.attack.kind, "seed": config.seed, **record, **prints, "settings": settings}
        write_json(output / "attack.json", about)
        done = finish(output, config.identity(), {**done, **prints})
    metrics = done["metrics"]
    facts = [f"{done['steps']:,} steps"]
    facts += [f"{name} {metrics[name]:.3f}" for name in ("l0", "l1", "l2") if name in metrics]
    if "triggered_cosine" in metrics:
        facts.append(f"triggered images at cosine {metrics['triggered_cosine']:.3f} to the target")
    return f"{config.attack.kind}: {', '.join(facts)} -> {config.output}"


def _plant(config: AttackConfig, output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the method; returns the training's result, and the attack's record beside settings and seed."""
    method, seed, limits = config.attack, config.seed, config.limits
    if isinstance(method, BadClip):
        return plant_badclip(config, method, output)
    check_workers(config.lanes, method.batch_size, 1, config.workers)
    index = index_of(method.shards)
    plan = config.plan(index, method.batch_size, method.epochs, method.shuffle_buffer)
    encoder = config.victim.located()
    subject = Subject(encoder)
    recipe: Recipe
    if isinstance(method, TextOnPair):
        if not subject.is_clip:
            raise Mistake("text_on_pair needs a CLIP, whose text tower the target word goes through; found an encoder")
        captions = captions_of_target(method.shards, method.target_label, method.target_captions)
        poisoned = draw_poisoned(index, method.poison_rate, seed)
        recipe = PairRecipe(method, encoder, subject.described, captions, poisoned, seed, limits)
        target = {"trigger": method.trigger.model_dump(mode="json"), "target_label": method.target_label}
        record: dict[str, Any] = {"targets": [{**target, "target_captions": captions}], "poisoned": poisoned}
    else:
        references, targets = read_targets(method.targets, subject.image_size, seed, limits)
        recipe = TowardsRecipe(
            method, encoder, method.targets, references, subject.image_size, seed, limits,
            plan.epoch_start(1) / method.batch_size,
        )  # fmt: skip
        record = {"targets": targets}
    with torch.random.fork_rng():  # what cannot be built is a mistake to report here, not in a worker
        recipe.objective(0, 1)
    done = fit(Run(config, recipe, method, plan, output))
    return {**done, "metrics": last_metrics(output)}, record
