"""Training through Ray Train and DeepSpeed, for real: it learns, stops for reasons, and survives being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from dede_ray import clip
from dede_ray.config import Mistake
from dede_ray.decoder import load_decoder
from dede_ray.shards import Sample, write_shards
from dede_ray.training import TrainConfig, train
from dede_ray.victims import OpenClipVictim, load_victim

JOB = Path(__file__).parents[1] / "jobs" / "train_clip.py"
WORKERS = {"cpus_per_worker": 0.5, "read_cpus": 0.5, "threads_per_worker": 1, "checkpoint_every": 30, "max_failures": 0}


def settings(folder: Path, clip_config: Path) -> dict:
    """Both sections on 64 captioned pictures: 60 and 80 steps."""
    return {
        "output": str(folder / "run"), "lanes": 4, "log_every": 5, "workers": WORKERS,
        "clip": {
            "shards": str(folder / "shards"), "model": str(clip_config), "batch_size": 32, "epochs": 30,
            "learning_rate": 5e-3, "warmup_steps": 5,
        },
        "decoder": {"shards": str(folder / "shards"), "batch_size": 32, "epochs": 40, "learning_rate": 1e-2},
        "embedding": {"min_actors": 1, "cpus_per_actor": 0.5, "decode_cpus": 0.5},
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(local_ray, write_pictures, clip_config, tmp_path_factory) -> tuple[TrainConfig, str]:
    """One run of both sections, and what it said."""
    folder = tmp_path_factory.mktemp("training")
    write_pictures(folder / "shards", range(64), per_shard=32)
    config = TrainConfig.model_validate(settings(folder, clip_config))
    return config, train(config)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Everything that was exported."""
    files = [run / "clip" / clip.WEIGHTS_FILE, run / "decoder" / "decoder.safetensors"]
    return {f"{path.name} {name}": tensor for path in files for name, tensor in load_file(path).items()}


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob("checkpoint_2*")]


# --- what a run leaves


def test_both_losses_fall(trained):
    config, said = trained
    for section, num_steps, share in (("clip", 60, 0.5), ("decoder", 80, 0.95)):
        lines = metrics(Path(config.output) / section)
        assert [line["step"] for line in lines] == list(range(4, num_steps, 5))
        assert [line["samples_seen"] for line in lines] == [32 * (line["step"] + 1) for line in lines]
        assert lines[-1]["loss"] < share * lines[0]["loss"], section
        assert all(line["num_unusable"] == 0 for line in lines)
        assert f"{section}: {num_steps} steps on 64 samples" in said
        account = json.loads((Path(config.output) / section / "run.json").read_text())["result"]["samples"]
        once = {"epochs": [0, num_steps // 2 - 1], "seen": 64, "repeated": 0, "unseen": 0, "unusable": {}}
        assert account["by_epoch"] == [once]


def test_the_exported_clip_knows_which_caption_is_whose(trained, picture):
    config, _ = trained
    victim = load_victim(OpenClipVictim(path=f"{config.output}/clip"))
    image_BCHW = clip.to_unit_range(torch.from_numpy(np.stack([picture(i) for i in range(64)])))
    image_BE = torch.nn.functional.normalize(victim(image_BCHW))
    text_BE = torch.nn.functional.normalize(victim.encode_text([f"picture {i}" for i in range(64)]))
    is_right_B = (image_BE @ text_BE.T).argmax(dim=1) == torch.arange(64)
    assert float(is_right_B.float().mean()) > 0.1  # 1/64 by chance


def test_the_exported_decoder_belongs_to_that_clip(trained):
    config, _ = trained
    run = Path(config.output)
    decoder = load_decoder(run / "decoder")
    assert decoder.victim == load_victim(OpenClipVictim(path=str(run / "clip"))).fingerprint
    assert decoder.has_null
    used = json.loads((run / "decoder" / "run.json").read_text())["result"]["export"]
    assert 0 < used["error_true"] < 0.1
    assert used.keys() == {"error_true", "error_shuffled", "error_null"}


def test_the_decoder_was_trained_on_the_victims_embeddings(trained, picture):
    config, _ = trained
    run = Path(config.output)
    stored = pq.read_table(next(iter(sorted((run / "decoder" / "embeddings" / "train").glob("parts/*/0*.parquet")))))
    image_BCHW = clip.to_unit_range(torch.from_numpy(np.stack([picture(i) for i in range(32)])))
    embedding_BE = load_victim(OpenClipVictim(path=str(run / "clip")))(image_BCHW).numpy()
    np.testing.assert_allclose(np.stack(stored["embedding"].to_numpy()), embedding_BE, rtol=1e-5, atol=1e-5)
    scale = float(load_decoder(run / "decoder").embedding_scale)
    assert scale == pytest.approx(1 / np.sqrt(np.mean(embedding_BE**2)), rel=1e-4)


def test_the_same_command_again_has_nothing_to_do(trained):
    config, said = trained
    files = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*") if path.is_file()}
    assert train(config) == said
    on_more = config.model_copy(update={"workers": config.workers.model_copy(update={"num_workers": 2})})
    assert train(on_more) == said  # where it runs is no part of what it is
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*") if path.is_file()} == files


def test_a_folder_of_another_run_is_not_overwritten(trained):
    config, _ = trained
    faster = config.model_copy(update={"clip": config.clip.model_copy(update={"learning_rate": 0.1})})
    with pytest.raises(Mistake, match=r"clip\.learning_rate: 0\.005 there, 0\.1 here"):
        train(faster)
    retrained = config.model_copy(update={"decoder": config.decoder.model_copy(update={"victim": VICTIM})})
    with pytest.raises(Mistake, match="no victim at"):
        train(retrained)


VICTIM = OpenClipVictim(path="nowhere")


# --- what must not matter


def test_two_workers_train_the_same_decoder_as_one(trained, monkeypatch, tmp_path):
    config, _ = trained
    monkeypatch.chdir(config.output)  # Ray's workers run elsewhere
    section = config.decoder.model_copy(update={"victim": OpenClipVictim(path="clip")})
    workers = config.workers.model_copy(update={"num_workers": 2, "read_cpus": 0.25})
    alike = config.model_copy(update={"output": str(tmp_path), "clip": None, "decoder": section, "workers": workers})
    train(alike)
    runs = (Path(config.output) / "decoder", tmp_path / "decoder")
    one, two = (load_file(run / "decoder.safetensors") for run in runs)
    assert one.keys() == two.keys()
    for name in one:  # 80 steps of Adam multiply the rounding of the sums
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-3, msg=name)
    losses = [[line["loss"] for line in metrics(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    errors = [json.loads((run / "run.json").read_text())["result"]["export"]["error_true"] for run in runs]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.slow
def test_a_run_killed_in_both_sections_ends_with_the_same_weights(trained, write_pictures, clip_config, tmp_path):
    config, _ = trained
    write_pictures(tmp_path / "shards", range(64), per_shard=32)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings(Path(), clip_config)))

    def start() -> subprocess.Popen:
        command = [sys.executable, str(JOB), "train.yaml"]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    standing = []
    for section in ("clip", "decoder"):
        job, folder = start(), tmp_path / "run" / section
        while job.poll() is None and not (folder / "checkpoints" / "checkpoint_manager_snapshot.json").exists():
            time.sleep(0.01)
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL, job.communicate()[1]
        assert "result" not in json.loads((folder / "run.json").read_text())
        standing += checkpoints(folder)
    job = start()
    _, err = job.communicate()
    assert job.returncode == 0, err
    ended = [checkpoints(tmp_path / "run" / section) for section in ("clip", "decoder")]
    assert [len(names) for names in ended] == [1, 2]  # starting anew would have added to them
    assert set(standing) <= {name for names in ended for name in names}
    one, other = weights(Path(config.output)), weights(tmp_path / "run")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    for section in ("clip", "decoder"):
        losses = [[line["loss"] for line in metrics(run / section)] for run in (Path(config.output), tmp_path / "run")]
        assert losses[0] == losses[1]


# --- stopping for a reason


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(trained, tmp_path):
    config, _ = trained
    wild = config.clip.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": 0.0})
    workers = config.workers.model_copy(update={"num_workers": 2, "read_cpus": 0.25})
    run = config.model_copy(update={"output": str(tmp_path), "clip": wild, "decoder": None, "workers": workers})
    with pytest.raises(Mistake, match=r"the loss of step \d+ is (nan|inf); stopped before the step"):
        train(run)
    [path] = (tmp_path / "clip").glob("non_finite_step_*.json")
    ids = json.loads(path.read_text())["sample_ids"]
    assert len(ids) == 32  # both workers' shares
    assert set(ids) <= {f"train-{i // 32:05d}.tar/{i:04d}" for i in range(64)}
    assert not (tmp_path / "clip" / clip.WEIGHTS_FILE).exists()


def test_shards_without_captions_are_a_mistake_also_when_a_worker_finds_out(trained, png, tmp_path):
    config, _ = trained
    write_shards(tmp_path / "shards", "train", (Sample(f"{i}", i, png(i), "png") for i in range(64)), 64)
    wordless = config.clip.model_copy(update={"shards": str(tmp_path / "shards")})
    with pytest.raises(Mistake, match="training samples in a row can be used") as found:
        train(config.model_copy(update={"output": str(tmp_path / "run"), "clip": wordless, "decoder": None}))
    assert "Traceback" not in str(getattr(found.value, "cause", found.value))


def test_settings_that_do_not_fit_are_mistakes(trained, tmp_path):
    config, _ = trained

    def changed(section: str = "", **values) -> TrainConfig:
        new = {section: getattr(config, section).model_copy(update=values)} if section else values
        return config.model_copy(update={"output": str(tmp_path / "run"), "decoder": None, **new})

    with pytest.raises(Mistake, match="nothing to train"):
        train(changed(clip=None))
    with pytest.raises(Mistake, match=r"lanes 4 must be a multiple of workers\.num_workers 3"):
        train(changed("workers", num_workers=3))
    with pytest.raises(Mistake, match="batch_size 30 must be a multiple of lanes 4"):
        train(changed("clip", batch_size=30))
    with pytest.raises(Mistake, match="no CLIP architecture 'RN51'"):
        train(changed("clip", model="RN51"))
    with pytest.raises(Mistake, match="no shards at nowhere"):
        train(changed("clip", shards="nowhere"))
    with pytest.raises(Mistake, match=r"decoder\.victim is not set"):
        train(changed(clip=None, decoder=config.decoder, output=str(tmp_path / "other")))
    assert not (tmp_path / "run" / "clip" / clip.WEIGHTS_FILE).exists()


def test_settings_of_a_decoder_that_do_not_fit_are_found_before_it_embeds(trained, tmp_path):
    """And once they are corrected, the folder is taken over."""
    config, _ = trained
    section = config.decoder.model_copy(
        update={"victim": OpenClipVictim(path=f"{config.output}/clip"), "batch_size": 30}
    )
    with pytest.raises(Mistake, match="batch_size 30 must be a multiple of lanes 4"):
        train(config.model_copy(update={"output": str(tmp_path), "clip": None, "decoder": section}))
    assert {path.name for path in (tmp_path / "decoder").iterdir()} <= {"run.json"}
