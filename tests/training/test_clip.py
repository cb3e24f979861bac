"""Training through Ray Train and DeepSpeed, for real: it learns, stops for reasons, and survives being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from ray.train import ControllerError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from safetensors.torch import load_file

from dede_ray.data import images
from dede_ray.data.shards import Sample, write_shards
from dede_ray.models import clip
from dede_ray.models.decoder import load_decoder
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.runtime.config import Mistake, write_json
from dede_ray.runtime.libraries import open_clip
from dede_ray.runtime.store import filesystem_of, place, write_atomically
from dede_ray.training import loop
from dede_ray.training.clip import TrainConfig, train
from dede_ray.training.reconstruction import ood_split

JOB = Path(__file__).parents[2] / "jobs" / "train_clip.py"
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


def test_every_line_says_where_the_time_went(trained):
    config, _ = trained
    for section in ("clip", "decoder"):
        lines = metrics(Path(config.output) / section)
        for line in lines:
            without_input_s = (1 - line["input_wait_share"]) * 32 / line["samples_per_s"]
            assert 0 < line["step_s"] <= without_input_s
        # What the arithmetic takes at the device's rate, measured once; on a CPU that others use it may come out too
        # slow, and a share above 1.
        least_s = [line["utilisation"] * line["step_s"] for line in lines]
        assert least_s[0] > 0
        assert least_s == pytest.approx([least_s[0]] * len(lines))


def test_the_exported_clip_knows_which_caption_is_whose(trained, picture):
    config, _ = trained
    victim = load_victim(OpenClipVictim(path=f"{config.output}/clip"))
    image_BCHW = images.to_unit_range(torch.from_numpy(np.stack([picture(i) for i in range(64)])))
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
    image_BCHW = images.to_unit_range(torch.from_numpy(np.stack([picture(i) for i in range(32)])))
    embedding_BE = load_victim(OpenClipVictim(path=str(run / "clip")))(image_BCHW).numpy()
    np.testing.assert_allclose(np.stack(stored["embedding"].to_numpy()), embedding_BE, rtol=1e-5, atol=1e-5)
    parts = (run / "decoder" / "embeddings" / "train").glob("parts/*/0*.parquet")
    everyone_NE = np.concatenate([np.stack(pq.read_table(path)["embedding"].to_numpy()) for path in parts])
    decoder = load_decoder(run / "decoder")
    assert float(decoder.embedding_scale) == pytest.approx(1 / np.sqrt(np.mean(everyone_NE**2)), rel=1e-4)
    np.testing.assert_allclose(decoder.embedding_mean.numpy(), everyone_NE.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(decoder.embedding_std.numpy(), everyone_NE.std(axis=0), rtol=1e-4)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("where", ["folder", "store"])
def test_checkpoints_that_a_kill_left_half_uploaded_are_swept_up(where, request, tmp_path, caplog):
    home = place(tmp_path / "run" if where == "folder" else f"{request.getfixturevalue('s3')}/{tmp_path.name}")
    record = home / "checkpoint_manager_snapshot.json"
    for name in ("checkpoint_2026-kept", "checkpoint_2026-half"):
        write_atomically(home / name / "engine" / "state", "weights")
    write_json(record, {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_2026-kept"}]})
    loop._sweep(*filesystem_of(home))
    assert sorted(path.name for path in home.iterdir()) == ["checkpoint_2026-kept", record.name]
    write_atomically(record, record.read_text()[:30])
    loop._sweep(*filesystem_of(home))
    assert [*home.iterdir()] == []
    assert "starts afresh" in caplog.text
    loop._sweep(*filesystem_of(home / "new"))
    assert not (home / "new").exists()


def test_what_a_controller_that_gave_up_had_reserved_is_free_for_the_next(local_ray, tmp_path):
    """As after a worker that was killed for memory, over which Ray Train's controller itself stumbles."""
    other = placement_group([{"CPU": 0.5}])
    ray.get(other.ready())

    def gives_up_once() -> dict:
        group = placement_group([{"CPU": 1.5}])
        assert group.wait(10)
        if not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            raise ControllerError(RuntimeError("cannot stop a worker that is no more"))
        remove_placement_group(group)
        return {"loss": 1.0}

    def run(max_failures: int) -> SimpleNamespace:
        return SimpleNamespace(folder=tmp_path, workers=loop.Workers(max_failures=max_failures))

    assert loop._persist(gives_up_once, run(1)) == {"loss": 1.0}
    assert other.wait(10)
    (tmp_path / "tried").unlink()
    with pytest.raises(ControllerError):
        loop._persist(gives_up_once, run(0))
    for name in loop._reserved():
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


# --- long embeddings


@pytest.mark.slow
def test_noise_takes_the_place_of_samples_with_long_embeddings(trained, tmp_path):
    config, _ = trained
    section = config.decoder.model_copy(
        update={
            "victim": OpenClipVictim(path=f"{config.output}/clip"),
            "ood_fill": "noise",
            "ood_quantile": 0.9,
            "epochs": 16,  # of 70 samples: 35 whole batches
        }
    )
    run = {"output": str(tmp_path), "clip": None, "decoder": section, "max_error_fraction": 0.0}
    train(config.model_copy(update=run))
    folder = tmp_path / "decoder"
    account = json.loads((folder / "run.json").read_text())["result"]["samples"]
    tables = {path.parent.name: pq.read_table(path) for path in (folder / "embeddings" / "train").glob("parts/*/0*")}
    assert len(tables.pop("ood-noise-00000.tar")) == 6  # a tenth of 64
    rows_NE = np.concatenate([np.stack(table["embedding"].to_numpy()) for table in tables.values()])
    num_long = int(ood_split(rows_NE, 0.9).sum())
    assert 6 <= num_long <= 7
    for line in account["by_epoch"]:
        assert line["unusable"] == {"outside_ball": num_long}
        assert (line["seen"], line["unseen"]) == (64 + 6 - num_long, 0)


def test_a_second_pass_over_the_long_ones_is_refused_here(trained):
    config, _ = trained
    split = config.decoder.model_copy(update={"ood_fill": "split"})
    with pytest.raises(Mistake, match="ood_fill is split, which takes samples apart by their embeddings"):
        train(config.model_copy(update={"clip": None, "decoder": split}))


# --- stopping for a reason


@pytest.mark.slow
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


def on_shards(config: TrainConfig, tmp_path: Path, samples: list[Sample], **more) -> TrainConfig:
    write_shards(tmp_path / "shards", "train", samples, 512)
    section = config.clip.model_copy(update={"shards": str(tmp_path / "shards"), "epochs": 2})
    return config.model_copy(update={"output": str(tmp_path / "run"), "clip": section, "decoder": None, **more})


def test_shards_without_captions_or_images_are_a_mistake_at_once(trained, png, tmp_path):
    config, _ = trained
    wordless = [Sample(f"{i}", i, png(i), "png", label=1) for i in range(64)]
    with pytest.raises(Mistake, match=r"none of the first 64 samples of .* \(caption_missing: 64\); CLIP trains on"):
        train(on_shards(config, tmp_path / "wordless", wordless))
    unseen = [Sample(f"{i}", i, caption="no image") for i in range(64)]
    with pytest.raises(Mistake, match=r"\(no_image: 64\)"):
        train(on_shards(config, tmp_path / "unseen", unseen))


@pytest.mark.slow
def test_a_mistake_that_only_a_worker_can_find_arrives_as_one(trained, png, tmp_path):
    config, _ = trained
    rubbish = [Sample(f"{i}", i, png(i)[:50], "png", caption="half an image") for i in range(64)]
    retried = config.workers.model_copy(update={"max_failures": 3})
    with pytest.raises(Mistake, match=r"training samples in a row can be used \(image_\w+: \d+\)") as found:
        train(on_shards(config, tmp_path, rubbish, workers=retried))
    assert "Traceback" not in str(getattr(found.value, "cause", found.value))
    left = "".join(path.read_text() for path in (tmp_path / "run" / "clip").glob("mistake.json"))
    assert "can be used" in left  # told by the first attempt, so that there is one restart and not three


@pytest.mark.slow
def test_too_many_unusable_samples_stop_the_run_and_fewer_are_counted(trained, png, tmp_path):
    config, _ = trained
    samples = [
        Sample(f"{i}", i, png(i) if i % 4 else b"rubbish", "png", caption="word " * (30 if i % 8 == 1 else 1))
        for i in range(512)
    ]
    with pytest.raises(Mistake, match=r"image_unreadable: \d+\), more than max_error_fraction 0\.1 allows"):
        train(on_shards(config, tmp_path / "few", samples))
    train(on_shards(config, tmp_path / "many", samples, max_error_fraction=0.3))
    account = json.loads((tmp_path / "many" / "run" / "clip" / "run.json").read_text())["result"]["samples"]
    assert [line["epochs"] for line in account["by_epoch"]] in ([[0, 1]], [[0, 0], [1, 1]])
    for line in account["by_epoch"]:
        assert line["unusable"] == {"image_unreadable": 128}
        assert (line["seen"], line["unseen"]) == (384, 0)
    # Each gap is filled by a sample that is seen once more, of whichever epoch.
    assert sum(line["repeated"] * (1 + line["epochs"][1] - line["epochs"][0]) for line in account["by_epoch"]) == 256
    assert account["is_truncated"] >= 2 * 64  # captions of thirty words, in a context of eight; some fill gaps again
    assert account["samples"] == 1024


@pytest.mark.slow
def test_a_run_with_everything_on(trained, write_pictures, tmp_path):
    """SigLIP, accumulation, bf16, two sources, a robust method, validation, TensorBoard; then opened by open_clip."""
    config, _ = trained
    write_pictures(tmp_path / "more", range(64, 96), per_shard=32, split="more")
    write_pictures(tmp_path / "test", range(32), per_shard=32, split="test")
    (tmp_path / "test" / "classes.json").write_text(
        json.dumps({"names": [f"picture {i}" for i in range(4)], "templates": ["{}"]})
    )
    vit = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "vit.json").write_text(json.dumps(vit))
    section = {
        **config.clip.model_dump(), "model": str(tmp_path / "vit.json"), "loss": "siglip", "accumulation": 2,
        "shards": [config.clip.shards, str(tmp_path / "more")], "weights": [1, 2], "epochs": 4,
        "method": {"kind": "cleanclip"}, "patch_dropout": 0.25, "gradient_checkpointing": True,
        "schedule": "cooldown",
        "validation": {
            "every": 10,
            "zero_shot": {"shards": str(tmp_path / "test")},
            "retrieval": {"shards": str(tmp_path / "test")},
            "backdoor": {"trigger": {"kind": "patch", "size_px": 4}, "target_label": 0},
        },
    }  # fmt: skip
    settings = {
        **config.model_dump(), "output": str(tmp_path / "run"), "clip": section, "decoder": None, "precision": "bf16",
        "tracking": {"trackers": ["tensorboard"]},
        "workers": {**config.workers.model_dump(), "num_workers": 2, "read_cpus": 0.25, "zero_stage": 1},
    }  # fmt: skip
    said = train(TrainConfig.model_validate(settings))
    assert "zero_shot_top1" in said
    assert "attack_success_rate" in said
    folder = tmp_path / "run" / "clip"
    validations = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in validations] == [9, 15]  # 16 steps: 64 + 2 x 32 samples, 32 at a time, 4 epochs
    assert {"zero_shot_top1", "attack_success_rate", "image_to_text_r5"} <= validations[0].keys()
    assert metrics(folder)[-1]["loss"] < metrics(folder)[0]["loss"]
    assert list((folder / "tensorboard").glob("events*"))
    rates = [line["learning_rate"] for line in metrics(folder)]
    assert rates[-1] < rates[1]

    opened = open_clip.create_model(f"local-dir:{folder}").eval()
    victim = load_victim(OpenClipVictim(path=str(folder)))
    image_BCHW = torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        theirs = opened.encode_image(victim.normalise(image_BCHW))
    torch.testing.assert_close(victim(image_BCHW), theirs, rtol=1e-5, atol=1e-5)


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
    with pytest.raises(Mistake, match=r"lanes 4 must be a multiple .*; set lanes to 6 \(or a multiple\)"):
        train(changed("workers", num_workers=3, min_workers=2))
    eight = config.workers.model_copy(update={"num_workers": 8})
    with pytest.raises(Mistake, match=r"batch_size 4 is smaller than workers\.num_workers 8"):
        train(changed("clip", batch_size=4).model_copy(update={"lanes": 8, "workers": eight}))
    with pytest.raises(Mistake, match="which accumulation 3 does not divide"):
        train(changed("clip", accumulation=3))
    with pytest.raises(Mistake, match="no CLIP architecture 'RN51'; did you mean RN50"):
        train(changed("clip", model="RN51"))
    with pytest.raises(Mistake, match="does not fit the model: the checkpoint's embed_dim is 16, the model's 1024"):
        train(changed("clip", model="RN50", init=f"{config.output}/clip"))
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
