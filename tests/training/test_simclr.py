"""SimCLR: its loss, whatever a batch is spread over; that it learns without labels; that a run is one run."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import workers
import yaml
from safetensors.torch import load_file

from dede_ray.data.images import decode_image, encode_image, to_unit_range
from dede_ray.data.shards import Limits, Sample, list_shards, write_shards
from dede_ray.models.encoders import WEIGHTS_FILE, Described, ResNet, Timm, build_encoder, load_encoder, save_encoder
from dede_ray.models.victims import EncoderVictim, load_victim
from dede_ray.runtime.config import Mistake
from dede_ray.training import dataloader
from dede_ray.training.objective import backward
from dede_ray.training.simclr import (
    PROJECTION_FILE,
    Projection,
    Simclr,
    SimclrConfig,
    SimclrTrain,
    knn_classify,
    synchronise_batch_norms,
    train,
)

JOB = Path(__file__).parents[2] / "jobs" / "train_simclr.py"
BATCH = 32

# --- the loss


def nt_xent(view_NP: np.ndarray, temperature: float) -> float:
    """Slowly: rows 2i and 2i + 1 are the views of image i."""
    total = 0.0
    for i in range(len(view_NP)):
        likeness = [
            math.exp(float(view_NP[i] @ view_NP[k]) / temperature) if k != i else 0.0 for k in range(len(view_NP))
        ]
        total -= math.log(likeness[i ^ 1] / sum(likeness))
    return total / len(view_NP)


def objective_of(with_batch_norm: bool, rank: int = 0, world: int = 1, **settings) -> Simclr:
    """With batch normalisation in float64: of few images it multiplies rounding by ten thousand."""
    torch.manual_seed(0)
    architecture = ResNet(width=4) if with_batch_norm else Timm(name="test_vit", image_size=32)
    section = SimclrTrain(
        shards="", architecture=architecture, projection=Projection(width=16, batch_norm=with_batch_norm), **settings
    )
    objective = Simclr(build_encoder(architecture), section, rank, world)
    objective.to(torch.float64 if with_batch_norm else torch.float32)
    return synchronise_batch_norms(objective, world, on_gpu=False)


def batch_of() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    image_BHWC = torch.from_numpy(rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8))
    return {"image": image_BHWC, "key": torch.from_numpy(rng.integers(0, 2**63, BATCH))}


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_the_papers(temperature):
    first, second = torch.nn.functional.normalize(torch.randn(2, 12, 8, dtype=torch.float64), dim=2)
    value, metrics = objective_of(False, temperature=temperature).loss({"first": first, "second": second})
    expected = nt_xent(torch.stack([first, second], dim=1).reshape(24, 8).numpy(), temperature)
    assert float(value) == pytest.approx(expected, rel=1e-9)
    assert float(metrics["cosine"]) == pytest.approx(float((first * second).sum(dim=1).mean()))
    _, metrics = objective_of(False).loss({"first": first, "second": first})
    assert float(metrics["partner_found"]) == 1


def spread(rank: int, world: int, folder: str) -> None:
    """One worker: networks with and without batch normalisation; rank 0 writes what it got."""
    workers.meet(rank, world, folder)
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    share = {name: rows[rank::world] for name, rows in batch_of().items()}
    for with_batch_norm, accumulation in ((True, 1), (False, 1), (False, 2)):
        objective = objective_of(with_batch_norm, rank, world)
        if with_batch_norm:  # DeepSpeed sums no float64
            value, _ = objective(share)
            value.backward()
            value = value.detach()
            gradients = {name: parameter.grad / world for name, parameter in objective.named_parameters()}
            for gradient in gradients.values():
                torch.distributed.all_reduce(gradient)
        else:
            settings = {
                "train_batch_size": BATCH,
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
            }
            optimiser = torch.optim.SGD(objective.parameters(), lr=0.0)
            engine, *_ = deepspeed.initialize(model=objective, optimizer=optimiser, config=settings)
            value, _ = backward(engine, share, accumulation)
            gradients = {name: safe_get_full_grad(p).clone() for name, p in objective.named_parameters()}
            engine.destroy()
        torch.distributed.all_reduce(value)
        statistics = {name: buffer for name, buffer in objective.named_buffers() if "running" in name}
        if rank == 0:
            told = {"loss": value / world, "gradients": gradients, "statistics": statistics}
            torch.save(told, Path(folder) / f"{with_batch_norm} {world}x{accumulation}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_no_way_of_spreading_a_batch_changes_loss_gradients_or_statistics(tmp_path):
    for world in (1, 2):
        torch.multiprocessing.spawn(spread, (world, str(tmp_path)), nprocs=world)
    assert len([*tmp_path.glob("*.pt")]) == 6
    for with_batch_norm in (True, False):
        objective = objective_of(with_batch_norm)
        value, _ = objective(batch_of())
        value.backward()
        statistics = {name: buffer for name, buffer in objective.named_buffers() if "running" in name}
        for path in tmp_path.glob(f"{with_batch_norm} *.pt"):
            one = torch.load(path, weights_only=True)
            assert float(one["loss"]) == pytest.approx(value.item(), rel=1e-5), path.name
            for name, parameter in objective.named_parameters():
                gradient = parameter.grad
                error = float((one["gradients"][name] - gradient).norm() / gradient.norm())
                assert error < (1e-6 if with_batch_norm else 1e-4), f"{path.stem}: {name} differs by {error:.2e}"
            torch.testing.assert_close(one["statistics"], statistics)


def test_the_two_views_of_an_image_follow_from_its_key():
    objective, batch = objective_of(False), batch_of()
    views = objective.views(batch)
    assert views.shape == (2 * BATCH, 3, 32, 32)
    assert not torch.equal(views[:BATCH], views[BATCH:])
    some = {name: rows[[5, 3]] for name, rows in batch.items()}
    assert torch.equal(objective.views(some), views[[5, 3, BATCH + 5, BATCH + 3]])


# --- the monitor


def test_the_nearest_neighbours_vote_by_their_likeness():
    rng = np.random.default_rng(0)
    centre_CE = np.eye(3, 8, dtype=np.float32)
    label_N = np.arange(90) % 3
    embedding_NE = (centre_CE[label_N] + 0.1 * rng.normal(size=(90, 8))).astype(np.float32)
    embedding_NE *= rng.uniform(0.1, 10, (90, 1)).astype(np.float32)  # only the direction counts
    assert (knn_classify(embedding_NE[:30], embedding_NE[30:], label_N[30:], 3, 10) == label_N[:30]).all()
    # One near neighbour outvotes two far ones at a low temperature, and not at a high one.
    memory, label = np.array([[1, 0.1], [0.2, 1], [0.2, 1]], np.float32), np.array([0, 1, 1])
    query = np.array([[1, 0]], np.float32)
    assert knn_classify(query, memory, label, 2, 3, 0.1).tolist() == [0]
    assert knn_classify(query, memory, label, 2, 3, 10).tolist() == [1]
    assert knn_classify(query[:0], memory, label, 2).tolist() == []


# --- runs


def textures(folder: Path, split: str, number: int, seed: int) -> None:
    """Labelled images of four textures; place and colours, of which there is the most to see, say nothing."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    samples = []
    for i in range(number):
        label = i % 4
        u, v = x + rng.uniform(0, 32), y + rng.uniform(0, 32)
        wave = [np.sin(u), np.sin(v), np.sin(u) * np.sin(v), np.sin((u + v) / 5)][label]
        low, high = rng.uniform(0, 255, (2, 3))
        image = low + (high - low) * (0.5 + 0.5 * wave[..., None]) + rng.normal(0, 10, (32, 32, 3))
        pixels = np.clip(image, 0, 255).astype(np.uint8)
        samples.append(Sample(f"{i:04d}", i, encode_image(pixels, "png"), "png", label=label))
    write_shards(folder, split, samples, 128)


def settings(folder: Path) -> dict:
    """80 steps of 64 images, an encoder of 8 channels; then a decoder against it."""
    return {
        "output": str(folder / "run"), "lanes": 4, "log_every": 5,
        "workers": {
            "cpus_per_worker": 0.5, "read_cpus": 0.5, "threads_per_worker": 1, "checkpoint_every": 20, "max_failures": 0
        },
        "simclr": {
            "shards": str(folder / "train-*.tar"), "architecture": {"kind": "resnet", "width": 4}, "batch_size": 64,
            "epochs": 20, "learning_rate": 1e-2, "schedule": "constant",
            "augmentation": {"min_scale": 0.5, "jitter_probability": 1, "hue": 0.5, "grey_probability": 0.5},
            "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25],
            "monitor": {
                "every": 40, "memory": str(folder / "train-*.tar"), "test": str(folder / "test-*.tar"),
                "neighbours": 20, "temperature": 0.1,
                "backdoor": {"trigger": {"kind": "patch", "size_px": 4}, "target_label": 0},
            },
        },
        "decoder": {"shards": str(folder / "train-*.tar"), "batch_size": 64, "epochs": 5},
        "embedding": {"min_actors": 1, "cpus_per_actor": 0.5, "decode_cpus": 0.5},
    }  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SimclrConfig:
    """Of a run over textures that are there."""
    folder = tmp_path_factory.mktemp("simclr")
    textures(folder, "train", 256, 0)
    textures(folder, "test", 128, 1)
    return SimclrConfig.model_validate(settings(folder))


@pytest.fixture(scope="module")
def trained(local_ray, config) -> tuple[SimclrConfig, str]:
    """That run, and what it said."""
    return config, train(config)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def knn_accuracy(encoder: torch.nn.Module, folder: Path) -> float:
    """Of the test textures, among those of training."""
    shards = {split: list_shards(str(folder / f"{split}-*.tar")) for split in ("train", "test")}
    found = {}
    for split, some in shards.items():
        samples = [
            sample
            for ref in dataloader.index_shards(some, 256)
            for sample in dataloader.read_samples(ref, 0, 256, Limits())
        ]
        image_BHWC = torch.from_numpy(np.stack([decode_image(sample.image, Limits()) for sample in samples]))
        with torch.inference_mode():
            embedding_BE = encoder((to_unit_range(image_BHWC) - 0.5) / 0.25).numpy()
        found[split] = embedding_BE, np.array([sample.label for sample in samples])
    (memory_ME, label_M), (query_NE, label_N) = found["train"], found["test"]
    return float((knn_classify(query_NE, memory_ME, label_M, 4, 20, 0.1) == label_N).mean())


@pytest.mark.slow
def test_it_learns_without_labels_what_labels_mean(trained):
    config, said = trained
    folder = Path(config.output) / "simclr"
    logged, found = lines(folder / "metrics.jsonl"), lines(folder / "validation.jsonl")
    assert logged[-1]["loss"] < 0.95 * logged[0]["loss"]
    assert [line["step"] for line in found] == [39, 79]
    torch.manual_seed(0)
    untrained = knn_accuracy(build_encoder(ResNet(width=4)).eval(), folder.parents[1])
    assert found[-1]["knn_accuracy"] > untrained + 0.08
    assert {"clean_accuracy", "attack_success_rate"} <= found[-1].keys()
    assert f"80 steps on 256 images, loss {logged[-1]['loss']:.3f}, knn_accuracy" in said
    account = json.loads((folder / "run.json").read_text())["result"]["samples"]
    assert account["by_epoch"] == [{"epochs": [0, 19], "seen": 256, "repeated": 0, "unseen": 0, "unusable": {}}]


@pytest.mark.slow
def test_what_it_exports_is_a_victim(trained):
    config, _ = trained
    folder = Path(config.output) / "simclr"
    victim = load_victim(EncoderVictim(path=str(folder)))
    assert (victim.image_size, victim.embedding_dim) == (32, 32)
    encoder, described = load_encoder(folder)
    assert (described.mean, described.std) == ((0.5,) * 3, (0.25,) * 3)
    image_BCHW = torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(victim(image_BCHW), encoder.eval()((image_BCHW - 0.5) / 0.25))
    measured = lines(folder / "validation.jsonl")[-1]["knn_accuracy"]
    assert knn_accuracy(encoder, folder.parents[1]) == pytest.approx(measured, abs=0.04)  # five of 128 pictures
    assert {"0.weight", "1.running_mean", "3.bias"} <= load_file(folder / PROJECTION_FILE).keys()


@pytest.mark.slow
def test_a_decoder_is_trained_against_it(trained):
    config, said = trained
    about = json.loads((Path(config.output) / "decoder" / "run.json").read_text())["result"]
    assert about["victim"] == load_victim(EncoderVictim(path=f"{config.output}/simclr")).fingerprint
    assert "decoder: " in said


@pytest.mark.slow
def test_the_same_command_again_has_nothing_to_do(trained):
    config, said = trained
    files = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*") if path.is_file()}
    unwatched = config.model_copy(update={"simclr": config.simclr.model_copy(update={"monitor": None})})
    assert train(config) == train(unwatched) == said  # who watches is no part of what it is
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_two_workers_begin_as_one_does(trained, tmp_path):
    """The first steps; rounding grows quickly, as images that look alike leave many activations at the edge of ReLU."""
    config, _ = trained
    section = config.simclr.model_copy(update={"epochs": 2.5, "monitor": None})
    both = config.workers.model_copy(update={"num_workers": 2, "read_cpus": 0.25})
    train(config.model_copy(update={"output": str(tmp_path), "simclr": section, "decoder": None, "workers": both}))
    one, two = (lines(Path(run) / "simclr" / "metrics.jsonl") for run in (config.output, tmp_path))
    assert len(two) == 2
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one[:2]], rel=0.01)


@pytest.mark.slow
def test_it_goes_on_from_an_encoder_in_16_bits_with_sgd_and_damaged_images(trained, tmp_path):
    config, _ = trained
    write_shards(tmp_path, "damaged", [Sample(f"{i}", i, b"rubbish", "png") for i in range(8)], 8)
    section = {
        **config.simclr.model_dump(), "shards": [config.simclr.shards, str(tmp_path / "damaged-*.tar")],
        "optimiser": "sgd", "learning_rate": 1e-3, "epochs": 1, "init": f"{config.output}/simclr",
    }  # fmt: skip
    more = {"output": str(tmp_path / "run"), "simclr": section, "decoder": None, "precision": "bf16"}
    train(SimclrConfig.model_validate({**config.model_dump(), **more}))
    run = tmp_path / "run" / "simclr"
    before, after = (lines(folder / "validation.jsonl")[-1] for folder in (Path(config.output) / "simclr", run))
    assert after["knn_accuracy"] == pytest.approx(before["knn_accuracy"], abs=0.1)
    account = json.loads((run / "run.json").read_text())["result"]["samples"]["by_epoch"][0]
    assert (account["seen"], account["unusable"]) == (256, {"image_unreadable": 8})


def test_settings_that_do_not_fit_are_mistakes(config, local_ray, tmp_path):
    def changed(**values) -> SimclrConfig:
        section = {**config.simclr.model_dump(), **values}
        whole = {**config.model_dump(), "output": str(tmp_path / "run"), "decoder": None, "simclr": section}
        return SimclrConfig.model_validate(whole)

    with pytest.raises(Mistake, match="nothing to train"):
        train(config.model_copy(update={"simclr": None, "decoder": None}))
    narrow = ResNet(width=4)
    save_encoder(tmp_path / "narrow", build_encoder(narrow), Described(narrow, 32, (0.5,) * 3, (0.25,) * 3))
    with pytest.raises(Mistake, match="does not fit the encoder"):
        train(changed(init=str(tmp_path / "narrow"), architecture={"kind": "resnet", "width": 8}))
    with pytest.raises(Mistake, match="batch_size 30 must be a multiple of lanes 4"):
        train(changed(batch_size=30))
    with pytest.raises(Mistake, match="no shards at nowhere"):
        train(changed(shards="nowhere"))
    write_shards(tmp_path / "wordy", "train", [Sample(f"{i}", i, caption="no image") for i in range(64)], 64)
    with pytest.raises(Mistake, match=r"none of the first 64 samples of .* has an image \(no_image: 64\)"):
        train(changed(shards=str(tmp_path / "wordy")))
    monitor = {**config.simclr.monitor.model_dump(), "backdoor": {"trigger": {"kind": "patch"}, "target_label": 4}}
    with pytest.raises(Mistake, match="target_label is 4, but the classes are 0 to 3"):
        train(changed(monitor=monitor))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(trained, tmp_path):
    config, _ = trained
    content = {**config.model_dump(mode="json"), "output": str(tmp_path / "run"), "decoder": None}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, str(JOB), "train.yaml"]
    job, folder = subprocess.Popen(command, cwd=tmp_path), tmp_path / "run" / "simclr"
    while job.poll() is None and not (folder / "checkpoints" / "checkpoint_manager_snapshot.json").exists():
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert not (folder / WEIGHTS_FILE).exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in (WEIGHTS_FILE, PROJECTION_FILE):
        one, other = load_file(Path(config.output) / "simclr" / name), load_file(folder / name)
        assert one.keys() == other.keys()
        assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert (Path(config.output) / "simclr" / "validation.jsonl").is_file()
    losses = [
        [line["loss"] for line in lines(Path(run) / "metrics.jsonl")] for run in (f"{config.output}/simclr", folder)
    ]
    assert losses[0] == losses[1]
