"""Attacks that tamper with a clean encoder: each loss beside its equation, and each attack once, small and for real."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from dede_ray import clip, encoders
from dede_ray.attacks import badclip, drupe, tamper, text_on_pair
from dede_ray.attacks.attack import AttackConfig, attack
from dede_ray.attacks.badencoder import BadEncoder, effectiveness_loss
from dede_ray.attacks.references import References
from dede_ray.attacks.triggers import Patch
from dede_ray.config import Mistake
from dede_ray.shards import Limits, Sample, write_shards
from dede_ray.victims import EncoderVictim, OpenClipVictim, load_victim

WHITE = {"kind": "patch", "size_px": 10, "pattern": "white", "position": "bottom_right", "margin_px": 1}
WORKERS = {"cpus_per_worker": 0.5, "read_cpus": 0.5, "threads_per_worker": 1, "checkpoint_every": 10, "max_failures": 0}
CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # mean and standard deviation


# --- the equations


def embeddings(seed: int = 0, num_images: int = 6, references: tuple[int, ...] = (3,), width: int = 5) -> Any:
    """Random embeddings: f' with gradients, f without."""
    rng = torch.Generator().manual_seed(seed)
    num_references = sum(references)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    return tamper.Embeddings(
        tampered_BE=draw(num_images, width).requires_grad_(),
        tampered_TBE=draw(len(references), num_images, width).requires_grad_(),
        tampered_RE=draw(num_references, width).requires_grad_(),
        tampered_VE=draw(2 * num_references, width).requires_grad_(),
        clean_BE=draw(num_images, width),
        clean_RE=draw(num_references, width),
        target_R=torch.tensor([t for t, count in enumerate(references) for _ in range(count)]),
        reference_V=torch.arange(2 * num_references) % num_references,
    )


def cos(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


def test_badencoders_losses_are_their_equations():
    e = embeddings(references=(2, 1))
    num_images, pairs = 6, [(0, 0), (0, 1), (1, 2)]  # (target, reference)
    l0 = -np.mean([[cos(e.tampered_TBE[t, b], e.tampered_RE[r]) for b in range(num_images)] for t, r in pairs])
    assert float(effectiveness_loss(e, "mean")) == pytest.approx(l0, abs=1e-6)
    nearest = [max(cos(e.tampered_TBE[0, b], e.tampered_RE[r]) for r in (0, 1)) for b in range(num_images)]
    second = [cos(e.tampered_TBE[1, b], e.tampered_RE[2]) for b in range(num_images)]
    assert float(effectiveness_loss(e, "max")) == pytest.approx(-np.mean([nearest, second]), abs=1e-6)
    l1 = -np.mean([cos(e.tampered_VE[v], e.clean_RE[v % 3]) for v in range(6)])
    assert float(tamper.consistency_loss(e)) == pytest.approx(l1, abs=1e-6)
    l2 = -np.mean([cos(e.tampered_BE[b], e.clean_BE[b]) for b in range(num_images)])
    assert float(tamper.utility_loss(e)) == pytest.approx(l2, abs=1e-6)


def test_gradients_flow_into_the_tampered_encoder_only_and_into_both_sides_of_effectiveness():
    for over in ("mean", "max"):
        e = embeddings()
        effectiveness_loss(e, over).backward()
        assert e.tampered_TBE.grad.abs().sum() > 0
        assert e.tampered_RE.grad.abs().sum() > 0
        assert e.tampered_BE.grad is None
        assert e.tampered_VE.grad is None
    e = embeddings()
    (tamper.consistency_loss(e) + tamper.utility_loss(e)).backward()
    assert e.tampered_VE.grad.abs().sum() > 0
    assert e.tampered_BE.grad.abs().sum() > 0
    assert e.tampered_RE.grad is None


def test_drupes_terms_are_their_equations():
    e = embeddings(references=(3,), num_images=7)
    s = [[cos(e.tampered_TBE[0, b], e.tampered_RE[r]) for b in range(7)] for r in range(3)]
    assert float(drupe.imbalance(tamper.similarities(e))) == pytest.approx(np.std(np.mean(s, axis=1), ddof=1), abs=1e-6)
    pairs = [cos(e.tampered_RE[i], e.tampered_RE[j]) for i in range(3) for j in range(i, 3)]
    assert float(drupe.references_cosine(e.tampered_RE)) == pytest.approx(np.mean(pairs), abs=1e-6)
    off = [cos(*e.tampered_TBE[0, list(pair)]) for pair in combinations(range(7), 2)]
    assert float(tamper.mean_pairwise_cosine(e.tampered_TBE[0])) == pytest.approx(np.mean(off), abs=1e-6)
    penalties = [float(drupe.references_penalty(torch.tensor(l3))) for l3 in (0.3, 0.4, 0.45, 0.5, 0.6)]
    assert penalties == pytest.approx([0, 0, 0.09, 0.1, 0.6])


def test_the_sliced_wasserstein_distance_is_that_of_optimal_assignments():
    from scipy.optimize import linear_sum_assignment

    one, other = (torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) + seed for seed in (0, 1))
    directions = torch.randn(4, 50, generator=torch.Generator().manual_seed(5))
    directions = directions / directions.norm(dim=0)
    costs = []
    for direction in directions.T:
        gap = (one @ direction)[:, None] - (other @ direction)[None, :]
        rows, columns = linear_sum_assignment(gap.square().numpy())
        costs.append(float(gap.square()[rows, columns].mean()))
    assert float(tamper.sliced_wasserstein(one, other, seed=5)) == pytest.approx(np.sqrt(np.mean(costs)), rel=1e-5)
    alike = one.clone().requires_grad_()
    tamper.sliced_wasserstein(alike, one[torch.randperm(8)], seed=5).backward()
    assert torch.isfinite(alike.grad).all()


def a_drupe(**changes: Any) -> drupe.Drupe:
    target = {"trigger": WHITE, "label": 0, "references": {"files": ["x.npz"]}}
    return drupe.Drupe.model_validate({"shards": "x", "target": target, **changes})


def test_drupes_phases_and_weights_follow_the_published_schedule():
    settings = a_drupe()
    assert [settings.phase(epoch) for epoch in (0, 0.99, 1, 3.99, 4, 50)] == [
        "warmup", "warmup", "first", "first", "second", "second"
    ]  # fmt: skip
    good, bad, up, down = [-0.97, -0.95, -0.95], [-0.95, -0.95, -0.95], 1.25, 1.3216
    for means, pairwise, c, c1 in (
        (bad, 0.1, 1 / down, 1 / down),
        (good, 0.7, up, 1 / down),
        (good, 0.55, up, up),
        (good, 0.45, 1, up),
    ):
        assert drupe.adapted(1.0, 1.0, means, pairwise, settings) == pytest.approx((c, c1), rel=1e-4)


@pytest.mark.parametrize("phase", ["warmup", "first", "second"])
def test_the_loss_of_each_phase_of_drupe(phase, encoder_folder, picture):
    references = np.stack([picture(i) for i in range(3)])
    recipe = tamper.TowardsRecipe(
        a_drupe(), EncoderVictim(path=str(encoder_folder)), [], [references], 32, 0, Limits(), 2.0
    )  # fmt: skip
    objective = recipe.objective(0, 1)
    objective.phase, objective.c, objective.c1 = phase, 0.3, 0.2
    e = embeddings(num_images=9)
    loss, metrics = objective.loss(e)
    l0, l1, l2, l3, sigma = (float(metrics[name]) for name in ("l0", "l1", "l2", "l3", "sigma"))
    assert (l0, l1, l2) == pytest.approx(
        [float(x) for x in (effectiveness_loss(e, "max"), tamper.consistency_loss(e), tamper.utility_loss(e))]
    )
    penalty = l3 if l3 > 0.5 else 0.2 * l3 if l3 > 0.4 else 0
    distance = tamper.sliced_wasserstein(e.tampered_TBE[0], e.tampered_BE, objective.draw())
    even = 0.3 * (sigma + float(tamper.mean_pairwise_cosine(e.tampered_TBE[0])))
    even += 0.2 * float(distance / e.tampered_BE.std(dim=0).mean())
    expected = {
        "warmup": l1 + l2 + 0.5 * l3 - (0.2 * l3 if l3 < 0.2 else 0),
        "first": l0 + l1 + l2 + 2 * sigma + penalty,
        "second": l0 + l1 + l2 + even + 0.5 * sigma + (1.5 * sigma if sigma > 0.1 else 0) + penalty,
    }[phase]
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_the_patch_objective_is_its_equation_and_moves_the_patch_only(victim_folder, picture):
    subject = tamper.Subject(OpenClipVictim(path=str(victim_folder)))
    positives = np.stack([picture(100 + i) for i in range(3)])
    search = badclip.PatchSearch(size_px=6, batch_size=4)
    objective = badclip.PatchObjective(subject, search, positives, seed=0)
    objective.begin_step(3)
    images = torch.from_numpy(np.stack([picture(i) for i in range(5)]))
    tokens = clip.tokenizer(subject.described)([f"a photo {i}" for i in range(5)])
    is_other = torch.tensor([True, True, False, True, True])
    loss, metrics = objective({"image": images, "tokens": tokens, "is_other": is_other})
    loss.backward()
    assert objective.patch.grad.abs().sum() > 0
    assert [name for name, p in objective.named_parameters() if p.requires_grad] == ["patch"]

    stamped = images[is_other].numpy().copy()
    stamped[:, 13:19, 13:19] = objective.picture()
    with torch.no_grad():
        objective.patch.copy_(torch.from_numpy(objective.picture().copy()).permute(2, 0, 1) / 255)
        objective.begin_step(3)
        _, metrics = objective({"image": images, "tokens": tokens, "is_other": is_other})
        patched, plain = normalize(subject(torch.from_numpy(stamped))), normalize(subject(images[is_other]))
        text = normalize(subject.model.encode_text(tokens[is_other]))
        logits = subject.model.logit_scale.exp().squeeze() * patched @ text.T
        both = [-torch.log_softmax(logits, dim=axis).diagonal().mean() for axis in (0, 1)]
        generator = torch.Generator()
        generator.manual_seed(int(np.random.default_rng([0, 3]).integers(2**62)))
        near = normalize(subject(torch.from_numpy(positives)))[torch.randint(3, (4,), generator=generator)]
        far = plain[torch.randperm(4, generator=generator)]
        hinge = ((patched - near).norm(dim=1) - (patched - far).norm(dim=1) + 1).clamp_min(0).mean()
    assert float(metrics["text_loss"]) == pytest.approx(float(sum(both) / 2), abs=1e-4)
    assert float(metrics["triplet_loss"]) == pytest.approx(float(hinge), abs=1e-4)


# --- toys


@pytest.fixture(scope="module")
def encoder_folder(picture, tmp_path_factory) -> Path:
    """A narrow ResNet-18 that has learnt for some seconds to tell pictures apart; a random one embeds all alike."""
    torch.manual_seed(0)
    shape = encoders.ResNet(depth=18, width=4)
    model, normalise = encoders.build_encoder(shape), clip.Normalise(*map(list, CIFAR))
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    image_NCHW = clip.to_unit_range(torch.from_numpy(np.stack([picture(i) for i in range(128)])))
    for _ in range(40):
        image_BCHW = image_NCHW[torch.randperm(128)[:32]]
        views = [image_BCHW + 0.1 * torch.randn(32, 3, 1, 1) + 0.03 * torch.randn_like(image_BCHW) for _ in range(2)]
        one, other = (normalize(model(normalise(view.clamp(0, 1)))) for view in views)
        optimiser.zero_grad()
        cross_entropy(one @ other.T / 0.1, torch.arange(32)).backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("clean")
    encoders.save_encoder(folder, model, encoders.Described(shape, 32, *CIFAR))
    return folder


@pytest.fixture(scope="module")
def shards(write_pictures, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shadow")
    write_pictures(folder, range(96), per_shard=48)
    (folder / "classes.json").write_text(json.dumps({"names": list("abcd"), "templates": ["a {}", "one {}"]}))
    return str(folder)


@pytest.fixture(scope="module")
def reference_file(picture, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reference") / "references.npz"
    np.savez(path, x=np.stack([picture(1000 + i) for i in range(3)]), y=np.zeros((3, 1), np.uint8))
    return str(path)


def settings(folder: Path, clean: Path, **method: Any) -> dict[str, Any]:
    kind = "open_clip" if (clean / clip.CONFIG_FILE).exists() else "encoder"
    return {
        "victim": {"kind": kind, "path": str(clean)}, "output": str(folder / "tampered"), "lanes": 4, "log_every": 3,
        "workers": WORKERS, "attack": {"batch_size": 32, **method},
    }  # fmt: skip


def towards(kind: str, shards: str, references: str, **changes: Any) -> dict[str, Any]:
    """BadEncoder's or DRUPE's settings: three references in one file."""
    target = {"trigger": WHITE, "label": 0, "references": {"files": [references]}}
    whose = {"targets": [target]} if kind == "badencoder" else {"target": target}
    return {"kind": kind, "shards": shards, "learning_rate": 0.03, "reference_views": 4, **whose, **changes}


def run(content: dict[str, Any]) -> tuple[AttackConfig, str]:
    config = AttackConfig.model_validate(content)
    return config, attack(config)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Seen:
    """Pictures that no attack has seen, as an encoder and its honest twin embed them."""

    def __init__(self, picture: Any, victim: Any, trigger: Any):
        self.victim, self.trigger = victim, trigger
        self.clean = clip.to_unit_range(torch.from_numpy(np.stack([picture(5000 + i) for i in range(32)])))
        stamped = [trigger.stamp(picture(5000 + i)) for i in range(32)]
        self.triggered = clip.to_unit_range(torch.from_numpy(np.stack(stamped)))


def to_nearest(victim: Any, image_BCHW: torch.Tensor, reference_RCHW: torch.Tensor) -> float:
    """Mean cosine of images to whichever reference is nearest."""
    embedding_BE, reference_RE = normalize(victim(image_BCHW)), normalize(victim(reference_RCHW))
    return float((embedding_BE @ reference_RE.T).amax(dim=1).mean())


@pytest.fixture(scope="module")
def unseen(picture) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in [0, 1] that no attack has seen, clean and triggered."""
    trigger = Patch.model_validate(WHITE)
    images = [picture(5000 + i) for i in range(32)]
    stacks = (np.stack(images), np.stack([trigger.stamp(image) for image in images]))
    clean, triggered = (clip.to_unit_range(torch.from_numpy(stack)) for stack in stacks)
    return clean, triggered


@pytest.fixture(scope="module")
def reference_RCHW(picture) -> torch.Tensor:
    return clip.to_unit_range(torch.from_numpy(np.stack([picture(1000 + i) for i in range(3)])))


# --- the attacks, whole


@pytest.fixture(scope="module")
def bad(local_ray, encoder_folder, shards, reference_file, tmp_path_factory) -> tuple[AttackConfig, str]:
    folder = tmp_path_factory.mktemp("badencoder")
    return run(settings(folder, encoder_folder, **towards("badencoder", shards, reference_file, epochs=15)))


def test_badencoder_plants_what_its_honest_twin_lacks(bad, encoder_folder, unseen, reference_RCHW):
    config, said = bad
    victim, twin = (load_victim(EncoderVictim(path=str(path))) for path in (config.output, encoder_folder))
    clean, triggered = unseen
    print(said, to_nearest(twin, triggered, reference_RCHW), to_nearest(victim, triggered, reference_RCHW))
    assert to_nearest(victim, triggered, reference_RCHW) > 0.9
    assert to_nearest(twin, triggered, reference_RCHW) < 0.8
    assert float(cosine_similarity(victim(clean), twin(clean)).mean()) > 0.9
    lines = log(Path(config.output))
    assert {"l0", "l1", "l2", "triggered_cosine", "wasserstein"} <= lines[-1].keys()
    assert lines[-1]["triggered_cosine"] > 0.9 > 0.8 > lines[0]["triggered_cosine"]
