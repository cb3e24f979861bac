"""DECREE: a planted stamp is found again, an honest encoder has none so small, and a stamp belongs to its encoder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import nn

from dede_ray.data.images import to_unit_range
from dede_ray.detectors.decree import (
    Decree,
    DecreeConfig,
    Inversion,
    InvertedStamp,
    SizeWeight,
    decide,
    invert,
    load_stamp,
    mean_other_cosine,
    run,
    save_stamp,
)
from dede_ray.models.embedding import Batch
from dede_ray.models.encoders import Described, ResNet, build_encoder, save_encoder
from dede_ray.models.victims import Victim
from dede_ray.runtime.config import Mistake

pytestmark = pytest.mark.trains

ROOT = Path(__file__).parents[2]


class Coarse(nn.Module):
    """Embeds 4-px tiles by a random projection; with a backdoor, a 3x3 pattern in the last corner overrules them."""

    def __init__(self, has_backdoor: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.has_backdoor = has_backdoor
        self.project = nn.Linear(192, 16, bias=False)
        self.project.weight.data = torch.randn((16, 192), generator=generator) / 192**0.5
        self.target = nn.Parameter(torch.randn(16, generator=generator))
        self.pattern = nn.Parameter(torch.randint(0, 2, (3, 3, 3), generator=generator) * 2.0 - 1)

    def forward(self, image_BCHW):
        embedding_BE = self.project(nn.functional.avg_pool2d(image_BCHW, 4).flatten(1))
        if self.has_backdoor:
            likeness_B = 1 - (image_BCHW[:, :, -3:, -3:] - self.pattern).abs().mean(dim=(1, 2, 3)) / 2
            embedding_BE = embedding_BE + 30 * torch.sigmoid(20 * (likeness_B - 0.8))[:, None] * self.target
        return embedding_BE


def coarse(has_backdoor: bool) -> Victim:
    statistics = [0.5] * 3, [0.5] * 3
    return Victim(Coarse(has_backdoor), "coarse", 32, 16, statistics, "fp32", {"has_backdoor": has_backdoor})


@pytest.fixture(scope="module")
def victim() -> Victim:
    return coarse(has_backdoor=True)


@pytest.fixture(scope="module")
def honest() -> Victim:
    return coarse(has_backdoor=False)


@pytest.fixture(scope="module")
def image_NHWC(picture) -> np.ndarray:
    return np.stack([picture(i) for i in range(256)])


@pytest.fixture(scope="module")
def found(victim, image_NHWC) -> InvertedStamp:
    return invert(victim, image_NHWC, Inversion(epochs=300), seed=0)


@pytest.fixture(scope="module")
def folder(found, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stamp")
    save_stamp(folder, found)
    return folder


@pytest.fixture(scope="module")
def batch(victim, image_NHWC) -> Batch:
    image_BCHW = to_unit_range(torch.from_numpy(image_NHWC[:12]))
    return Batch([f"train-00000.tar/{i:04d}" for i in range(12)], victim(image_BCHW), image_BCHW)


# -------------------------------------------------------------------------------------------------- the search


def test_a_planted_stamp_is_found_where_it_was_planted(found, victim, image_NHWC):
    assert decide(found).word == "backdoored"
    assert found.pl1 < 0.03  # the pattern is 9 of 1,024 pixels
    assert found.mask_HW[-3:, -3:].sum() > 0.8 * found.mask_HW.sum()
    assert found.cosine > 0.99
    assert found.cosine_before < 0.5, "it is the stamp that makes images alike"
    embedding_BE = victim(found.stamp(to_unit_range(torch.from_numpy(image_NHWC[:64]))))
    cosine_B = torch.cosine_similarity(embedding_BE, victim.model.target[None])
    assert cosine_B.min() > 0.95, "stamped images go where the backdoor leads"


def test_nothing_as_small_is_found_in_the_honest_twin(honest, image_NHWC, found):
    stamp = invert(honest, image_NHWC, Inversion(epochs=300), seed=0)
    assert decide(stamp).word != "backdoored"
    assert stamp.pl1 > 0.2 > 5 * found.pl1
    assert stamp.mask_HW[-3:, -3:].sum() < 0.1 * stamp.mask_HW.sum()


def test_a_stamp_that_never_collapses_is_not_called_clean(honest, image_NHWC):
    stamp = invert(honest, image_NHWC, Inversion(epochs=1), seed=0)
    assert not stamp.is_collapsing
    assert stamp.num_steps == len(stamp.trace) == 2
    assert stamp.cosine == max(step["cosine"] for step in stamp.trace) < 0.99
    assert stamp.pl1 == 1
    assert decide(stamp).word == "no small collapsing stamp found"


def test_the_smallest_success_is_kept_and_weighed_by_the_schedule(found):
    assert found.norm == min(step["norm"] for step in found.trace if step["cosine"] > 0.99)
    assert found.norm == pytest.approx(3 * float(found.mask_HW.sum()), rel=1e-5)
    assert found.pl1 == pytest.approx(found.norm / 3072)
    weight = SizeWeight(1e-5)
    for step in found.trace:
        assert step["weight"] == weight.value
        weight.update(step["cosine"] > 0.99)


def test_it_stops_once_the_stamp_has_not_shrunk_for_a_while(victim, image_NHWC):
    stamp = invert(victim, image_NHWC, Inversion(epochs=300, patience=3), seed=0)
    smallest = [step["norm"] for step in stamp.trace].index(stamp.norm) + 1
    assert stamp.num_steps < 600
    assert 3 < stamp.num_steps - smallest <= 5, "epochs are of two steps"
    mean = np.mean([step["cosine"] for step in stamp.trace[-2:]])
    assert mean > 0.99, "of the last epoch"


def test_equal_seeds_give_equal_stamps(victim, image_NHWC):
    one, again, other = (invert(victim, image_NHWC, Inversion(epochs=3), seed) for seed in (3, 3, 4))
    assert one.trace == again.trace
    for name in ("mask_HW", "patch_CHW", "direction_E"):
        assert torch.equal(getattr(one, name), getattr(again, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


def test_the_weight_of_the_size_follows_its_rules():
    """Written out by hand, with a least weight of 1e-4."""
    weight, values = SizeWeight(1e-4), []
    for is_success, num in ((0, 12), (0, 20), (1, 10), (0, 1), (1, 11), (1, 5), (0, 5), (1, 5), (1, 1), (1, 6), (0, 6)):
        for _ in range(num):
            weight.update(bool(is_success))
        values.append(weight.value)
    expected = [
        4e-5,  # twelve failures divide twice
        4e-5,  # below the least it falls no more
        4e-5,  # ten successes are not more than ten
        4e-5,  # and a failure between them begins the count again
        1e-3,  # eleven bring it back to where it began
        1e-3,  # five successes are not more than five
        1e-3,  # nor five failures
        1e-3,  # nor five successes again
        5e-3,  # six are
        25e-3,  # the count has begun anew: it takes six more
        5e-3,
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    for _ in range(120):
        weight.update(True)
    assert weight.value == 1e5, "and no more"


def test_numbers_that_are_not_given_are_those_of_the_image_size():
    small, large = Inversion(patience=7).of_size(32), Inversion(drops=(1, 2)).of_size(224)
    assert (small.drops, small.min_weight, small.patience) == ((30, 50), 1e-5, 7)
    assert (large.drops, large.min_weight, large.patience) == ((1, 2), 1e-7, 35)


def test_the_learning_rate_falls_at_its_epochs(victim, image_NHWC):
    """With a rate of zero after the first epoch nothing moves any more."""
    rates = (0.5, 0.0, 0.0)
    stamp = invert(victim, image_NHWC, Inversion(epochs=4, drops=(1, 2), learning_rates=rates), seed=0)
    norms = [step["norm"] for step in stamp.trace]
    assert norms[0] != norms[1] != norms[2]
    assert len(set(norms[2:])) == 1


def test_an_image_left_alone_at_the_end_of_an_epoch_is_left_out(victim, image_NHWC):
    assert invert(victim, image_NHWC[:9], Inversion(epochs=2, batch_size=8), seed=0).num_steps == 2
    assert invert(victim, image_NHWC[:10], Inversion(epochs=2, batch_size=8), seed=0).num_steps == 4


def test_the_mean_cosine_leaves_out_each_image_with_itself():
    embedding_BE = np.random.default_rng(0).normal(1, 2, (9, 5)).astype(np.float32)
    cosines = [
        np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        for i, a in enumerate(embedding_BE)
        for j, b in enumerate(embedding_BE)
        if i != j
    ]
    assert float(mean_other_cosine(torch.from_numpy(embedding_BE))) == pytest.approx(np.mean(cosines), abs=1e-6)


def test_embeddings_with_a_gradient_are_the_same_and_leave_the_weights_alone(victim, batch):
    image_BCHW = batch.image_BCHW.clone().requires_grad_()
    embedding_BE = victim.embed_with_gradient(image_BCHW)
    assert torch.equal(embedding_BE.detach(), victim(batch.image_BCHW))
    embedding_BE.sum().backward()
    assert image_BCHW.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in victim.parameters())


@pytest.mark.parametrize(
    ("images", "said"), [(1, "1 shadow images; the search compares two or more"), (9, "gives NaN")]
)
def test_what_cannot_be_inverted_is_a_mistake(image_NHWC, images, said):
    broken = coarse(has_backdoor=False)
    broken.model.project.weight.data[0, 0] = torch.nan
    with pytest.raises(Mistake, match=said):
        invert(broken, image_NHWC[:images], Inversion(), seed=0)


# ------------------------------------------------------------------------------------------------ the decision


def test_a_bank_of_clean_encoders_tells_what_is_unusual(found):
    """Median 500, median absolute deviation 20."""
    bank = [460, 480, 500, 520, 900]
    for norm, index, is_outlier in ((440, 60 / 29.652, True), (445, 55 / 29.652, False), (800, -300 / 29.652, False)):
        verdict = decide(replace(found, norm=norm), bank)
        assert verdict.anomaly_index == pytest.approx(index)
        assert verdict.is_outlier is is_outlier
    assert decide(found).is_outlier is None
    never = decide(replace(found, is_collapsing=False, norm=1), bank)
    assert never.is_outlier is False, "a small mask that collapses nothing is no small stamp"
    with pytest.raises(Mistake, match="a bank of 2 clean encoders has no spread"):
        decide(found, bank[:2])


def test_the_threshold_itself_is_not_below_it(found):
    assert decide(found, threshold=found.pl1).word == "clean"
    assert decide(replace(found, norm=0.0999 * 3072)).word == "backdoored"
    assert decide(replace(found, norm=0.1 * 3072), threshold=0.2).word == "backdoored"


# ------------------------------------------------------------------------------------------------ the detector


def test_every_column_is_its_definition(victim, found, folder, batch):
    scores = Decree(stamp=str(folder), displacement=True).open(victim, {}).score(batch)
    parts = found.mask_HW, found.patch_CHW, found.direction_E
    mask_HW, patch_CHW, direction_E = (part.numpy().astype(np.float64) for part in parts)
    for i in range(12):
        image_CHW = batch.image_BCHW[i].numpy().astype(np.float64)
        total = weight = 0.0
        stamped_CHW = np.empty((3, 32, 32), np.float32)
        for c, y, x in np.ndindex(3, 32, 32):
            m, t = mask_HW[y, x], patch_CHW[c, y, x]
            total += m * (image_CHW[c, y, x] - t) ** 2
            weight += m
            stamped_CHW[c, y, x] = min(max((1 - m) * image_CHW[c, y, x] + m * t, 0), 1)
        assert scores["decree_stamp"][i] == pytest.approx(-np.sqrt(total / weight), abs=1e-5)
        embedding_E = batch.embedding_BE[i].numpy().astype(np.float64)
        cosine = embedding_E @ direction_E / np.linalg.norm(embedding_E) / np.linalg.norm(direction_E)
        assert scores["decree_direction"][i] == pytest.approx(cosine, abs=1e-5)
        moved_E = victim(torch.from_numpy(stamped_CHW)[None])[0].numpy() - embedding_E
        assert scores["decree_displacement"][i] == pytest.approx(-np.linalg.norm(moved_E), rel=1e-5)
    assert Decree(stamp=str(folder)).open(victim, {}).columns == ("decree_stamp", "decree_direction")


def test_the_direction_is_the_mean_of_stamped_embeddings(victim, found, image_NHWC):
    embeddings = victim(found.stamp(to_unit_range(torch.from_numpy(image_NHWC)))).numpy().astype(np.float64)
    mean_E = np.mean([one / np.linalg.norm(one) for one in embeddings], axis=0)
    np.testing.assert_allclose(found.direction_E.numpy(), mean_E, atol=1e-5)


def test_images_with_the_trigger_score_higher(victim, folder, batch):
    """With the planted pattern, not the one that was found."""
    image_BCHW = batch.image_BCHW.clone()
    image_BCHW[:, :, -3:, -3:] = victim.model.pattern * 0.5 + 0.5
    scorer = Decree(stamp=str(folder), displacement=True).open(victim, {})
    clean, triggered = scorer.score(batch), scorer.score(Batch(batch.sample_ids, victim(image_BCHW), image_BCHW))
    for name in scorer.columns:
        assert clean[name].max() < triggered[name].min(), name


def test_a_score_is_the_same_in_any_batch_and_order(victim, folder, batch):
    scorer = Decree(stamp=str(folder), displacement=True).open(victim, {})
    whole = scorer.score(batch)
    assert tuple(whole) == scorer.columns
    order = [7, 0, 11, 3, 1, 2, 10, 9, 8, 4, 6, 5]
    shuffled = scorer.score(batch.part(order))
    alone = [scorer.score(batch.part([i])) for i in range(12)]
    for name, score_B in whole.items():
        assert (score_B.dtype, score_B.shape) == (np.float32, (12,))
        np.testing.assert_allclose(shuffled[name], score_B[order], rtol=1e-5)
        np.testing.assert_allclose(np.concatenate([one[name] for one in alone]), score_B, rtol=1e-5)


def test_equal_fingerprints_are_equal_stamps_wherever_they_lie(victim, found, folder, tmp_path):
    save_stamp(tmp_path / "copy", found)
    save_stamp(tmp_path / "other", replace(found, patch_CHW=1 - found.patch_CHW))
    here, copy, other = (
        Decree(stamp=str(one)).open(victim, {}) for one in (folder, tmp_path / "copy", tmp_path / "other")
    )
    assert here.fingerprint == copy.fingerprint != other.fingerprint
    assert here.fingerprint != Decree(stamp=str(folder), displacement=True).open(victim, {}).fingerprint


def test_a_stamp_of_another_victim_is_refused(honest, folder):
    with pytest.raises(Mistake, match=r"was inverted from another victim .* run jobs/decree.py on this victim"):
        Decree(stamp=str(folder)).open(honest, {})


def test_a_stamp_is_read_as_it_was_written(found, folder):
    read = load_stamp(folder)
    assert {k: v for k, v in vars(read).items() if not torch.is_tensor(v) and k != "trace"} == {
        k: v for k, v in vars(found).items() if not torch.is_tensor(v) and k != "trace"
    }
    assert torch.equal(read.patch_CHW, found.patch_CHW)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.pop("direction"),
        lambda tensors: tensors.update(patch=tensors["patch"] * 2 + 1),
        lambda tensors: tensors.update(mask=tensors["mask"] * torch.nan),
        lambda tensors: tensors.update(mask=tensors["mask"].double()),
        lambda tensors: tensors.update(patch=tensors["patch"][:, :8]),
        lambda tensors: tensors.update(mask=tensors["mask"][:8, :8], patch=tensors["patch"][:, :8, :8]),
        lambda tensors: tensors.update(mask=tensors["mask"] * 0),
        lambda tensors: tensors.update(direction=tensors["direction"][:5]),
    ],
    ids=["missing", "range", "nan", "double", "shape", "small", "empty", "narrow"],
)
def test_a_damaged_stamp_is_a_mistake(victim, found, tmp_path, damage):
    save_stamp(tmp_path, found)
    tensors = load_file(tmp_path / "stamp.safetensors")
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "stamp.safetensors")
    with pytest.raises(Mistake, match=r"damaged|holds no inverted stamp"):
        Decree(stamp=str(tmp_path)).open(victim, {})


def test_a_folder_that_holds_no_stamp_is_a_mistake(victim, tmp_path):
    with pytest.raises(Mistake, match="no inverted stamp"):
        Decree(stamp=str(tmp_path)).open(victim, {})


def test_located_settings_name_the_same_stamp_from_everywhere(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert Decree(stamp=folder.name).located() == Decree(stamp=str(folder))


# ----------------------------------------------------------------------------------------------------- the job


@pytest.fixture(scope="module")
def world(write_pictures, tmp_path_factory) -> Path:
    """Unlabelled use of labelled pictures, and two random encoders for 16 px."""
    folder = tmp_path_factory.mktemp("decree")
    write_pictures(folder / "shards")
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        architecture = ResNet(width=4)
        save_encoder(folder / name, build_encoder(architecture), Described(architecture, 16))
    return folder


def settings(world: Path, output: Path, **changes) -> DecreeConfig:
    return DecreeConfig.model_validate(
        {
            "victims": [{"kind": "encoder", "path": str(world / name)} for name in ("a", "b")],
            "shards": str(world / "shards"),
            "output": str(output),
            "num_images": 24,
            "seeds": [0, 1],
            "inversion": {"epochs": 3, "batch_size": 8},
            "resources": {"cpus": 2},  # all there are: one inversion after the other
            **changes,
        }
    )


def content_of(output: Path) -> dict[str, bytes]:
    """All but what tells times and paths."""
    paths = [path for path in output.rglob("[!.]*") if path.is_file() and path.name not in ("time.json", "run.json")]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def undisturbed(world, local_ray) -> Path:
    run(settings(world, world / "undisturbed"))
    return world / "undisturbed"


def test_the_job_leaves_a_row_a_stamp_and_a_picture_per_encoder(world, undisturbed):
    rows = json.loads((undisturbed / "decree.json").read_text())["encoders"]
    folders = [undisturbed / row["encoder"] for row in rows]
    assert [folder.name[-2:] for folder in folders] == ["_a", "_b"]
    for row, folder in zip(rows, folders, strict=True):
        each = [load_stamp(folder / f"seed_{seed}") for seed in (0, 1)]
        assert row["pl1_of_seeds"] == [stamp.pl1 for stamp in each]
        assert row["pl1"] == load_stamp(folder).pl1 == min(stamp.pl1 for stamp in each)
        assert [len((folder / f"seed_{seed}/metrics.jsonl").read_text().splitlines()) for seed in (0, 1)] == [9, 9]
        with Image.open(folder / "stamp.png") as picture:
            assert picture.size == (512, 128)
    table = run(settings(world, undisturbed))
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {folder.name}" for folder in folders]


def test_an_interrupted_run_goes_on_and_ends_as_an_undisturbed_one(world, undisturbed, tmp_path):
    """The second encoder's first seed finds a file where its folder should be."""
    config = settings(world, tmp_path / "out")
    blocked = tmp_path / "out" / next(path.name for path in undisturbed.glob("*_b"))
    (tmp_path / "out").mkdir()
    blocked.write_text("in the way")
    with pytest.raises(OSError, match=r"exists|directory"):
        run(config)
    standing = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/seed_*/*")}
    assert {path.parent.name for path in standing} == {"seed_0", "seed_1"}
    blocked.unlink()
    run(config)
    assert {path: path.stat().st_mtime_ns for path in standing} == standing, "what stands is not made again"
    assert content_of(tmp_path / "out") == content_of(undisturbed)


@pytest.mark.slow
def test_a_killed_job_goes_on_and_ends_as_an_undisturbed_one(world, undisturbed, tmp_path):
    path = tmp_path / "decree.yaml"
    path.write_text(yaml.safe_dump(settings(world, tmp_path / "out").model_dump(mode="json")))
    all_of_them = str(os.cpu_count())  # one inversion after the other
    command = [sys.executable, str(ROOT / "jobs" / "decree.py"), str(path), "--resources.cpus", all_of_them]
    job = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    while job.poll() is None and not list(tmp_path.glob("out/*/seed_0/stamp.json")):
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    standing = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/seed_*/stamp.json")}
    assert 1 <= len(standing) < 4, "it was killed in the middle"
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in standing} == standing
    assert content_of(tmp_path / "out") == content_of(undisturbed)


def test_other_weights_or_images_at_the_old_path_are_refused(world, undisturbed, write_pictures, tmp_path, local_ray):
    """What stands in the output folder would not be about them."""
    one = {"seeds": [0], "victims": [{"kind": "encoder", "path": str(tmp_path / "a")}], "shards": str(tmp_path / "s")}
    architecture = ResNet(width=4)
    save_encoder(tmp_path / "a", build_encoder(architecture), Described(architecture, 16))
    write_pictures(tmp_path / "s", range(20))
    config = settings(world, tmp_path / "out", **one)
    run(config)
    (tmp_path / "out" / "run.json").unlink()
    write_pictures(tmp_path / "s", range(5, 25))
    with pytest.raises(Mistake, match=r"seed_0 was made with other images; delete it"):
        run(config)
    write_pictures(tmp_path / "s", range(20))
    save_encoder(tmp_path / "a", build_encoder(architecture), Described(architecture, 16))
    with pytest.raises(Mistake, match=r"seed_0 was made with other weights; delete it"):
        run(config)


def test_one_encoder_that_is_not_there_does_not_stop_the_others(world, tmp_path, local_ray):
    victims = [{"kind": "encoder", "path": str(world / name)} for name in ("nowhere", "b")]
    with pytest.raises(
        Mistake, match=r"1 inversions were not made, the others are:\n  .*_nowhere, seed 0: no exported"
    ):
        run(settings(world, tmp_path / "out", victims=victims, seeds=[0]))
    assert [path.parts[-3][-2:] for path in tmp_path.glob("out/*/*/stamp.json")] == ["_b"]


def test_a_bank_is_inverted_too_and_judges_the_others(world, tmp_path, local_ray):
    bank = []
    for seed in range(3):
        torch.manual_seed(10 + seed)
        architecture = ResNet(width=4)
        save_encoder(tmp_path / f"clean{seed}", build_encoder(architecture), Described(architecture, 16))
        bank.append({"kind": "encoder", "path": str(tmp_path / f"clean{seed}")})
    run(settings(world, tmp_path / "out", bank=bank, seeds=[0], inversion={"epochs": 1, "batch_size": 12}))
    rows = json.loads((tmp_path / "out" / "decree.json").read_text())["encoders"]
    assert [row["is_bank"] for row in rows] == [False, False, True, True, True]
    norms = [row["pl1"] * 3 * 256 for row in rows]
    for row, norm in zip(rows[:2], norms, strict=False):
        deviation, distance = 1.4826 * stats.median_abs_deviation(norms[2:]), np.median(norms[2:]) - norm
        if deviation == 0 == distance:  # one epoch found no stamp, on a machine that rounds like this
            assert row["anomaly_index"] == 0
        else:
            assert row["anomaly_index"] == pytest.approx(distance / deviation, rel=1e-6)
    assert [row["anomaly_index"] for row in rows[2:]] == [None] * 3


def test_encoders_of_one_name_get_folders_of_their_own(world, tmp_path, local_ray):
    victims = [{"kind": "encoder", "path": str(world / "a"), "precision": one} for one in ("fp32", "bf16")]
    run(settings(world, tmp_path / "out", victims=victims, seeds=[0], inversion={"epochs": 1}))
    rows = json.loads((tmp_path / "out" / "decree.json").read_text())["encoders"]
    assert rows[1]["encoder"] == rows[0]["encoder"] + "~2"
    assert rows[1]["victim"] != rows[0]["victim"]


@pytest.mark.parametrize(
    "change", [{"seeds": [1, 1]}, {"seeds": []}, {"seeds": [-1]}, {"bank": "two"}, {"victims": []}]
)
def test_settings_that_make_no_sense_are_refused(world, tmp_path, change):
    if "bank" in change:
        change = {"bank": [{"kind": "encoder", "path": "x"}] * 2}
    with pytest.raises(ValueError, match=next(iter(change))):
        settings(world, tmp_path, **change)
