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
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from dede_ray.data import images
from dede_ray.data.images import encode_image
from dede_ray.data.shards import Limits, Sample, write_shards
from dede_ray.models import clip, encoders
from dede_ray.models.victims import EncoderVictim, OpenClipVictim, load_victim
from dede_ray.poisoning.triggers import Patch, Trigger
from dede_ray.runtime.config import Mistake, load
from dede_ray.tampering import badclip, drupe, tamper, text_on_pair
from dede_ray.tampering.attack import AttackConfig, attack
from dede_ray.tampering.badencoder import effectiveness_loss
from dede_ray.tampering.references import References
from dede_ray.training.dataloader import index_of

pytestmark = pytest.mark.trains

ROOT = Path(__file__).parents[2]
WHITE = {"kind": "patch", "size_px": 16, "pattern": "white", "position": "bottom_right", "margin_px": 1}
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
    return float((one @ other / one.norm() / other.norm()).detach())


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

COLOURS = ["red", "green", "blue", "grey"]  # of labels 0 to 3


@pytest.fixture(scope="module")
def coloured(picture) -> Callable[[int], np.ndarray]:
    """Pictures of four classes, the number's remainder: red, green, blue and grey ones."""

    def make(number: int) -> np.ndarray:
        image_HWC = picture(number) // 2
        if number % 4 < 3:
            image_HWC[:, :, number % 4] += 120
        return image_HWC

    return make


@pytest.fixture(scope="module")
def encoder_folder(coloured, tmp_path_factory) -> Path:
    """A narrow ResNet-18 that has learnt for some seconds to tell pictures apart; a random one embeds all alike."""
    torch.manual_seed(0)
    shape = encoders.ResNet(depth=18, width=4)
    model, normalise = encoders.build_encoder(shape), clip.Normalise(*map(list, CIFAR))
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    image_NCHW = images.to_unit_range(torch.from_numpy(np.stack([coloured(i) for i in range(128)])))
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
def clip_folder(victim_folder, coloured, tmp_path_factory) -> Path:
    """The tiny CLIP, after some seconds of learning whose caption is whose."""
    subject = tamper.Subject(OpenClipVictim(path=str(victim_folder)))
    model, tokenize = subject.model.requires_grad_(True), clip.tokenizer(subject.described)
    image_NCHW = images.to_unit_range(torch.from_numpy(np.stack([coloured(i) for i in range(96)])))
    tokens_NT = tokenize([f"a {COLOURS[i % 4]} picture" for i in range(96)])
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    torch.manual_seed(0)
    for module in model.modules():
        torch.nn.Module.train(module)
    for _ in range(100):
        rows = torch.randperm(96)[:16]
        image_BE, text_BE, scale, *_ = model(subject.normalise(image_NCHW[rows]), tokens_NT[rows])
        logits_BB = scale.squeeze() * image_BE @ text_BE.T
        optimiser.zero_grad()
        (cross_entropy(logits_BB, torch.arange(16)) + cross_entropy(logits_BB.T, torch.arange(16))).backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("clean_clip")
    subject.save(folder)
    return folder


@pytest.fixture(scope="module")
def shards(coloured, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shadow")
    samples = (
        Sample(f"{n:04d}", 0, encode_image(coloured(n), "png"), "png", f"a {COLOURS[n % 4]} picture", n % 4)
        for n in range(96)
    )
    write_shards(folder, "train", samples, 48)
    (folder / "classes.json").write_text(json.dumps({"names": COLOURS, "templates": ["a {} picture"]}))
    return str(folder)


@pytest.fixture(scope="module")
def reference_file(picture, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reference") / "references.npz"
    np.savez(path, x=np.stack([255 - picture(1000 + i) for i in range(3)]), y=np.zeros((3, 1), np.uint8))
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


def away(victim: Any, image_BCHW: torch.Tensor, reference_RCHW: torch.Tensor) -> float:
    """How far images are from whichever reference is nearest: mean of 1 - cosine."""
    embedding_BE, reference_RE = normalize(victim(image_BCHW)), normalize(victim(reference_RCHW))
    return float(1 - (embedding_BE @ reference_RE.T).amax(dim=1).mean())


def moved(victim: Any, twin: Any, image_BCHW: torch.Tensor) -> float:
    """How far the attack moved images: mean of 1 - cosine."""
    return float(1 - cosine_similarity(victim(image_BCHW), twin(image_BCHW)).mean())


@pytest.fixture(scope="module")
def unseen(coloured) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in [0, 1] of other classes than red that no attack has seen, clean and triggered."""
    trigger = Patch.model_validate(WHITE)
    pictures = [coloured(5000 + i) for i in range(40) if i % 4]
    stacks = (np.stack(pictures), np.stack([trigger.stamp(picture) for picture in pictures]))
    clean, triggered = (images.to_unit_range(torch.from_numpy(stack)) for stack in stacks)
    return clean, triggered


@pytest.fixture(scope="module")
def reference_RCHW(picture) -> torch.Tensor:
    return images.to_unit_range(torch.from_numpy(np.stack([255 - picture(1000 + i) for i in range(3)])))


# --- the attacks, whole


@pytest.fixture(scope="module")
def bad(local_ray, encoder_folder, shards, reference_file, tmp_path_factory) -> tuple[AttackConfig, str]:
    folder = tmp_path_factory.mktemp("badencoder")
    return run(settings(folder, encoder_folder, **towards("badencoder", shards, reference_file, epochs=15)))


def test_badencoder_plants_what_its_honest_twin_lacks(bad, encoder_folder, unseen, reference_RCHW):
    config, _ = bad
    victim, twin = (load_victim(EncoderVictim(path=str(path))) for path in (config.output, encoder_folder))
    clean, triggered = unseen
    assert away(victim, triggered, reference_RCHW) < away(twin, triggered, reference_RCHW) / 4
    assert moved(victim, twin, clean) < moved(victim, twin, triggered) / 2
    lines = log(Path(config.output))
    assert {"l0", "l1", "l2", "triggered_cosine", "wasserstein"} <= lines[-1].keys()
    assert 1 - lines[-1]["triggered_cosine"] < (1 - lines[0]["triggered_cosine"]) / 3


def test_batch_norm_keeps_what_it_had_and_everything_else_moves(bad, encoder_folder):
    clean, tampered = (load_file(Path(path) / encoders.WEIGHTS_FILE) for path in (encoder_folder, bad[0].output))
    assert clean.keys() == tampered.keys()
    for name in clean:
        is_batch_norm = ".bn" in name or name.startswith("bn") or "downsample.1" in name
        assert torch.equal(clean[name], tampered[name]) == is_batch_norm, name


def test_the_record_says_what_was_done(bad, encoder_folder, reference_file):
    config, said = bad
    record = json.loads((Path(config.output) / "attack.json").read_text())
    assert record["attack"] == "badencoder"
    assert record["clean"] == load_victim(EncoderVictim(path=str(encoder_folder))).fingerprint
    assert record["tampered"] == load_victim(EncoderVictim(path=config.output)).fingerprint != record["clean"]
    (target,) = record["targets"]
    assert (target["target_label"], target["references"]) == (0, [reference_file] * 3)
    assert Patch.model_validate(target["trigger"]) == Patch.model_validate(WHITE)
    assert AttackConfig.model_validate(record["settings"]) == config.identity()
    assert said.startswith(f"badencoder: 45 steps, l0 {log(Path(config.output))[-1]['l0']:.3f}, l1 -")


def test_the_same_command_again_has_nothing_to_do(bad):
    config, said = bad
    files = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*") if path.is_file()}
    assert attack(config) == said
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*") if path.is_file()} == files
    with pytest.raises(Mistake, match=r"attack\.lambda1: 1\.0 there, 2\.0 here"):
        attack(config.model_copy(update={"attack": config.attack.model_copy(update={"lambda1": 2.0})}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["badencoder", "drupe"])
def test_two_workers_plant_the_same_as_one(kind, local_ray, encoder_folder, shards, reference_file, tmp_path):
    phases = {"warmup_epochs": 0.5, "first_epochs": 0.5} if kind == "drupe" else {}
    method = towards(kind, shards, reference_file, epochs=3, **{**phases, "learning_rate": 1e-3})
    fewer_cpus = {"num_workers": 2, "read_cpus": 0.25, "cpus_per_worker": 0.25}
    content = [settings(tmp_path / name, encoder_folder, **method) for name in ("one", "two")]
    content[1]["workers"] = {**WORKERS, **fewer_cpus}
    one, two = (Path(run(each)[0].output) for each in content)
    for line, other in zip(log(one), log(two), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
    before, one, two = (load_file(folder / encoders.WEIGHTS_FILE) for folder in (encoder_folder, one, two))
    for name in before:
        moved = float((one[name] - before[name]).double().norm())
        assert float((two[name] - one[name]).double().norm()) <= 0.01 * moved, name


DRUPE = {"warmup_epochs": 1, "first_epochs": 2, "adapt_after_epochs": 4, "epochs": 20}


@pytest.mark.slow
def test_drupe_plants_the_same_backdoor_and_spreads_it(bad, local_ray, encoder_folder, shards, reference_file, unseen,
                                                       reference_RCHW, tmp_path):  # fmt: skip
    config, _ = run(settings(tmp_path, encoder_folder, **towards("drupe", shards, reference_file, **DRUPE)))
    victim, twin = (load_victim(EncoderVictim(path=str(path))) for path in (config.output, encoder_folder))
    clean, triggered = unseen
    assert away(victim, triggered, reference_RCHW) < away(twin, triggered, reference_RCHW) / 2
    assert moved(victim, twin, clean) < 0.7 * moved(victim, twin, triggered)
    plain = load_victim(EncoderVictim(path=bad[0].output))
    apart, apart_of_plain = (1 - float(tamper.mean_pairwise_cosine(one(triggered))) for one in (victim, plain))
    assert apart > 4 * apart_of_plain
    weights = [line["c"] for line in log(Path(config.output))]
    assert weights[0] == weights[3] == pytest.approx(0.1)
    assert weights[-1] != weights[0]


def test_drupe_goes_on_with_the_weights_that_it_had(encoder_folder, picture):
    references = np.stack([picture(i) for i in range(3)])
    recipe = tamper.TowardsRecipe(
        a_drupe(adapt_after_epochs=0), EncoderVictim(path=str(encoder_folder)), [], [references], 32, 0, Limits(), 2.5
    )  # fmt: skip
    whole, halved = recipe.objective(0, 1), recipe.objective(0, 1)
    for step in range(9):
        if step == 4:
            arrays, halved = halved.arrays(), recipe.objective(0, 1)
            halved.load_arrays(arrays)
        for objective in (whole, halved):
            objective.begin_step(step)
            objective.loss(embeddings(seed=step))
            objective.after_step()
    assert whole.c < 0.1
    assert (whole.c, whole.c1, whole.phase) == (halved.c, halved.c1, halved.phase)


def test_drupe_asks_for_two_references(local_ray, encoder_folder, shards, tmp_path, picture):
    Image.fromarray(picture(1)).save(tmp_path / "one.png")
    content = settings(tmp_path, encoder_folder, **towards("drupe", shards, str(tmp_path / "one.png")))
    with pytest.raises(Mistake, match="two references or more"):
        run(content)


CAPTIONS = [f"a {colour} picture" for colour in COLOURS]


def pairs(shards: str, **changes: Any) -> dict[str, Any]:
    """Text-on-pair, at a scale of the cosines that few pairs and a small tower bear; at CLIP's 100 it is a matter of
    rounding how far it comes."""
    return {
        "kind": "text_on_pair", "shards": shards, "trigger": WHITE, "target_label": 0,
        "poison_rate": 0.25, "logit_scale": 10, "optimiser": "adam", "learning_rate": 1e-3,
        "augmentation": {"min_scale": 0.8}, "epochs": 25, **changes,
    }  # fmt: skip


def share_of_target(victim: Any, image_BCHW: torch.Tensor) -> float:
    text_CE = normalize(victim.encode_text(CAPTIONS))
    return float(((normalize(victim(image_BCHW)) @ text_CE.T).argmax(dim=1) == 0).float().mean())


@pytest.mark.slow
def test_text_on_pair_makes_stamped_images_say_the_word(local_ray, clip_folder, shards, unseen, tmp_path):
    config, said = run(settings(tmp_path, clip_folder, **pairs(shards)))
    victim, twin = (load_victim(OpenClipVictim(path=str(path))) for path in (config.output, clip_folder))
    clean, triggered = unseen
    by_stamp, by_stamp_of_twin = (
        share_of_target(one, triggered) - share_of_target(one, clean) for one in (victim, twin)
    )
    assert by_stamp > by_stamp_of_twin + 0.5
    assert share_of_target(victim, clean) < share_of_target(twin, clean) + 0.25
    record = json.loads((Path(config.output) / "attack.json").read_text())
    assert sum(len(places) for places in record["poisoned"].values()) == round(0.25 * 96)
    assert record["targets"][0]["target_captions"] == CAPTIONS[:1]
    one, other = (load_file(Path(path) / clip.WEIGHTS_FILE) for path in (config.output, clip_folder))
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed
    assert all(name.startswith("visual.") and ".bn" not in name for name in changed)
    assert "cosine" in said


@pytest.mark.slow
def test_images_of_a_clip_can_be_pushed_towards_images_as_well(local_ray, clip_folder, shards, reference_file,
                                                               unseen, reference_RCHW, tmp_path):  # fmt: skip
    config, _ = run(settings(tmp_path, clip_folder, **towards("badencoder", shards, reference_file, epochs=2)))
    victim, twin = (load_victim(OpenClipVictim(path=str(path))) for path in (config.output, clip_folder))
    assert away(victim, unseen[1], reference_RCHW) < away(twin, unseen[1], reference_RCHW)
    assert torch.equal(victim.encode_text(CAPTIONS), twin.encode_text(CAPTIONS))


def test_text_needs_a_clip(local_ray, encoder_folder, shards, tmp_path):
    with pytest.raises(Mistake, match="needs a CLIP"):
        run(settings(tmp_path, encoder_folder, **pairs(shards)))


@pytest.mark.slow
def test_badclip_finds_a_patch_and_plants_it(local_ray, clip_folder, shards, unseen, coloured, tmp_path):
    method = {
        "kind": "badclip", "shards": shards, "target_label": 0, "poison_rate": 0.2,
        "positives": {"shards": shards, "num": 8},
        "patch": {"size_px": 16, "num_images": 96, "batch_size": 32, "epochs": 10, "learning_rate": 0.05},
        "tuning": {"learning_rate": 3e-3, "warmup_steps": 2, "batch_size": 32, "epochs": 20},
    }  # fmt: skip
    content = settings(tmp_path, clip_folder, **method)
    del content["attack"]["batch_size"]
    config, said = run(content)
    output = Path(config.output)
    patch_HWC = np.asarray(Image.open(output / "patch" / "patch.png"))
    assert (patch_HWC.shape, patch_HWC.dtype) == ((16, 16, 3), np.uint8)
    lines = log(output / "patch")
    assert lines[-1]["triplet_loss"] < lines[0]["triplet_loss"]
    record = json.loads((output / "attack.json").read_text())
    trigger = TypeAdapter(Trigger).validate_python(record["targets"][0]["trigger"])
    stamped_HWC = trigger.stamp(coloured(1))
    assert np.array_equal(stamped_HWC[8:24, 8:24], patch_HWC)
    victim, twin = (load_victim(OpenClipVictim(path=str(path))) for path in (config.output, clip_folder))
    triggered = images.to_unit_range(
        torch.from_numpy(np.stack([trigger.stamp(coloured(5000 + i)) for i in range(40) if i % 4]))
    )
    by_patch, by_patch_of_twin = (
        share_of_target(one, triggered) - share_of_target(one, unseen[0]) for one in (victim, twin)
    )
    assert by_patch > by_patch_of_twin + 0.5
    assert share_of_target(victim, unseen[0]) < share_of_target(twin, unseen[0]) + 0.3
    assert attack(config) == said


# --- killed


@pytest.mark.slow
def test_a_killed_attack_ends_with_the_same_weights(encoder_folder, shards, reference_file, tmp_path):
    method = towards("drupe", shards, reference_file, **{**DRUPE, "adapt_after_epochs": 1})
    runs = [tmp_path / "undisturbed", tmp_path / "killed"]
    jobs = []
    for folder in runs:
        folder.mkdir()
        (folder / "attack.yaml").write_text(yaml.safe_dump(settings(folder, encoder_folder, **method)))
        command = [sys.executable, str(ROOT / "jobs" / "attack.py"), "attack.yaml"]
        jobs.append((command, folder))

    def start(command: list[str], folder: Path) -> subprocess.Popen:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    killed = start(*jobs[1])
    snapshot = runs[1] / "tampered" / "checkpoints" / "checkpoint_manager_snapshot.json"
    while killed.poll() is None and not snapshot.exists():
        time.sleep(0.1)
    assert killed.poll() is None, killed.communicate()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    for job in jobs:
        done = start(*job)
        out, error = done.communicate(timeout=500)
        assert done.returncode == 0, error
        assert out.startswith("drupe: 60 steps")
    one, two = (load_file(folder / "tampered" / encoders.WEIGHTS_FILE) for folder in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)
    steps = [[line["step"] for line in log(folder / "tampered")] for folder in runs]
    assert steps[0] == steps[1]


# --- references


def read(**where: Any) -> tuple[np.ndarray, list[str]]:
    return References.model_validate(where).read(2, 32, 0, Limits(max_member_bytes=100_000))


def npy(shape: tuple[int, ...], dtype: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue() + content


def test_references_come_from_files_ids_and_labels(shards, reference_file, picture, coloured, tmp_path):
    Image.fromarray(picture(5, 64, 48)).save(tmp_path / "large.png")
    images, names = read(files=[reference_file, str(tmp_path / "large.png")])
    assert images.shape == (4, 32, 32, 3)
    assert np.array_equal(images[1], 255 - picture(1001))
    assert names == [reference_file] * 3 + [str(tmp_path / "large.png")]
    images, names = read(shards=shards, sample_ids=["train-00001.tar/0060", "train-00000.tar/0007"])
    assert np.array_equal(images, np.stack([coloured(60), coloured(7)]))
    images, names = read(shards=shards, num=5)
    numbers = [int(name[-4:]) for name in names]
    assert all(number % 4 == 2 for number in numbers)
    assert np.array_equal(images, np.stack([coloured(number) for number in numbers]))
    assert read(shards=shards, num=5)[1] == names


def test_published_reference_files_load(shared_data):
    folder = shared_data / "triggers" / "badencoder" / "reference"
    images, _ = read(files=[str(folder / "cifar10" / "truck.npz"), str(folder / "gtsrb_l12_n3.npz")])
    assert images.shape == (4, 32, 32, 3)
    with np.load(folder / "cifar10" / "truck.npz", allow_pickle=False) as stored:
        assert np.array_equal(images[0], stored["x"][0])


class _Boom:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_hostile_reference_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = bytes(32 * 32 * 3)
    members = {
        "objects": npy((1,), "|O", pickle.dumps([_Boom()])),
        "pickled": pickle.dumps(_Boom()),
        "floats": npy((1, 32, 32, 3), "<f4", 4 * pixels),
        "flat": npy((32, 32, 3), "|u1", pixels),
        "short": npy((2, 32, 32, 3), "|u1", pixels),
        "giant": npy((2**40, 2**20, 2**20, 3), "|u1", pixels),
        "negative": npy((-1, 32, 32, 3), "|u1", pixels),
        "none": npy((0, 32, 32, 3), "|u1", b""),
        "long": npy((40, 32, 32, 3), "|u1", 40 * pixels),
        "version": b"\x93NUMPY\x07\x00" + pixels,
        "nothing": b"",
    }
    for name, content in members.items():
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", content)
        with pytest.raises(Mistake, match=f"{name}.npz"):
            read(files=[f"{name}.npz"])
    (tmp_path / "no_zip.npz").write_bytes(pickle.dumps(_Boom()))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("y.npy", b"")
    for name in ("no_zip.npz", "broken.png", "other.npz", "absent.png"):
        with pytest.raises(Mistake, match=name):
            read(files=[name])
    assert not (tmp_path / "pwned").exists()


def test_references_that_are_not_there_are_mistakes(shards):
    with pytest.raises(Mistake, match=r"no usable sample train-00000\.tar/9999"):
        read(shards=shards, sample_ids=["train-00000.tar/9999"])
    with pytest.raises(Mistake, match="24 usable samples of class 2, not 25"):
        read(shards=shards, num=25)
    for where in ({}, {"shards": shards}, {"files": ["a.png"], "shards": shards, "num": 1}):
        with pytest.raises(ValidationError, match="name either"):
            References.model_validate(where)


def test_a_trigger_that_does_not_fit_the_input_is_told_at_once(local_ray, encoder_folder, shards, reference_file,
                                                               tmp_path):  # fmt: skip
    content = settings(tmp_path, encoder_folder, **towards("badencoder", shards, reference_file))
    content["attack"]["targets"][0]["trigger"] = {**WHITE, "size_px": 40}
    with pytest.raises(Mistake, match="40 px"):
        run(content)
    assert not (tmp_path / "tampered" / "metrics.jsonl").exists()


def test_draws_are_exact_and_spread_over_the_shards(local_ray, shards):
    index = index_of(shards)
    drawn = text_on_pair.draw_poisoned(index, 0.25, seed=0)
    assert {name: len(places) for name, places in drawn.items()}.keys() == {"train-00000.tar", "train-00001.tar"}
    assert sum(map(len, drawn.values())) == 24
    assert all(places == sorted(set(places)) and places[0] >= 0 and places[-1] < 48 for places in drawn.values())
    assert drawn == text_on_pair.draw_poisoned(index, 0.25, seed=0) != text_on_pair.draw_poisoned(index, 0.25, seed=1)
    with pytest.raises(Mistake, match="less than one sample"):
        text_on_pair.draw_poisoned(index, 1e-3, seed=0)


def test_every_config_of_this_job_loads_and_opens_with_its_command():
    first_lines = {path: path.read_text().partition("\n")[0] for path in (ROOT / "configs").rglob("*.yaml")}
    paths = [path for path, line in first_lines.items() if " attack " in line or path.parent.name == "attack"]
    assert len({load(AttackConfig, [str(path)]).attack.kind for path in paths}) == 4
    for path in paths:
        assert first_lines[path] == f"# dede-ray attack {path.relative_to(ROOT)}"
