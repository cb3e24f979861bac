"""The job that measures a victim: where it takes the backdoor from, what it finds, what it writes down."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dede_ray.data.images import encode_image
from dede_ray.data.shards import Sample, write_shards
from dede_ray.evaluation.measure import MeasureConfig, displacement, measure_victim, read_planted, read_record
from dede_ray.models.encoders import Described, ResNet, build_encoder, save_encoder
from dede_ray.models.victims import EncoderVictim, load_victim
from dede_ray.poisoning.poison import PoisonConfig
from dede_ray.poisoning.triggers import Nashville, Patch
from dede_ray.runtime.config import Mistake, write_json

PATCH = Patch(size_px=6, pattern="white")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Labelled pictures of three colours, and two random encoders."""
    folder = tmp_path_factory.mktemp("activation")
    rng = np.random.default_rng(0)
    for split, num in (("test", 45), ("probe", 60)):
        samples = []
        for i in range(num):
            image_HWC = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            image_HWC[..., i % 3] += 100
            samples.append(Sample(f"{i:03d}", i, encode_image(image_HWC, "png"), "png", label=i % 3))
        write_shards(folder / "clean", split, samples, 100)
    write_json(folder / "clean" / "classes.json", {"names": ["red", "green", "blue"], "templates": []})
    architecture = ResNet(width=4)
    for seed, name in enumerate(("victim", "honest")):
        torch.manual_seed(seed)
        save_encoder(folder / name, build_encoder(architecture), Described(architecture, 16))
    settings = {"seed": 7, "simclr": {"shards": ["b.tar", "a.tar"]}}
    write_json(folder / "victim" / "run.json", {"settings": settings})
    poisoning = PoisonConfig(
        shards="clean", output="poisoned", trigger=PATCH, rate=0.2, target_label=1,
        also=[{"trigger": Nashville(), "target_label": 2}],
    )  # fmt: skip
    write_json(folder / "poisoned" / "run.json", {"settings": poisoning.model_dump(mode="json")})
    return folder


def config(world, **changes):
    settings = {
        "victim": {"kind": "encoder", "path": str(world / "victim")},
        "honest": {"kind": "encoder", "path": str(world / "honest")},
        "made_by": str(world / "poisoned"),
        "test_shards": str(world / "clean" / "test-*.tar"),
        "probe_shards": str(world / "clean" / "probe-*.tar"),
        "heads": [{"kind": "probe"}, {"kind": "knn", "k": 5}],
    }
    return MeasureConfig.model_validate(settings | changes)


def test_a_victim_that_is_not_backdoored_is_recorded_and_does_not_pass(world):
    said = measure_victim(config(world))
    assert said.startswith("patch: does not pass its gate (probe: ASR ")
    settings = EncoderVictim(path=str(world / "victim"))
    record = read_record(load_victim(settings), settings)
    assert record.is_backdoored  # the mark is about what was done to it, not about what it does
    assert not record.passes
    assert (record.attack, record.target_label, record.trigger["size_px"], record.seed) == ("patch", 1, 6, 7)
    assert record.training_data == ["a.tar", "b.tar"]
    assert record.settings["attack"]["rate"] == 0.2
    assert record.behaviour.keys() == record.honest.keys() == {"probe", "knn"}
    assert record.displacement.wasserstein > 0
    assert record.honest_displacement != record.displacement


def test_an_honest_victim_has_no_backdoor_that_could_be_active(world):
    said = measure_victim(config(world, made_by=None, attack="ctrl", victim=config(world).honest))
    assert said.startswith("honest: does not pass its gate (an honest victim has no backdoor")
    record = json.loads((world / "honest" / "victim.json").read_text())
    assert not record["is_backdoored"]
    assert record["target_label"] is None
    assert record["trigger"]["kind"] == "nothing"
    assert record["displacement"]["wasserstein"] < 1e-5


def test_what_was_not_found_in_a_folder_of_ones_own_needs_an_output(world, tmp_path, monkeypatch):
    with pytest.raises(Mistake, match="hf-hub:somebody/encoder: set output to a folder"):
        measure_victim(config(world, victim={"kind": "encoder", "path": "hf-hub:somebody/encoder"}))
    beside = (world / "honest" / "victim.json").exists()
    said = measure_victim(config(world, made_by=None, victim=config(world).honest, output=str(tmp_path / "about")))
    assert said.endswith(f"-> {tmp_path / 'about'}")
    assert json.loads((tmp_path / "about" / "victim.json").read_text())["checkpoint_sha256"]
    assert (world / "honest" / "victim.json").exists() == beside


def test_each_of_several_backdoors_can_be_measured(world):
    assert read_planted(str(world / "poisoned"), 1).trigger == Nashville()
    assert measure_victim(config(world, backdoor=1, attack="photo")).startswith("photo: ")
    assert json.loads((world / "victim" / "victim.json").read_text())["target_label"] == 2
    with pytest.raises(Mistake, match="planted 2; they are counted from 0"):
        measure_victim(config(world, backdoor=2))


def test_a_tampered_encoder_brings_its_own_record(tmp_path):
    target = {"trigger": PATCH.model_dump(mode="json"), "target_label": 3, "references": ["a", "b"]}
    write_json(tmp_path / "attack.json", {"attack": "drupe", "targets": [target], "settings": {"seed": 1}})
    planted = read_planted(str(tmp_path))
    assert (planted.attack, planted.trigger, planted.target_label) == ("drupe", PATCH, 3)
    for targets in (None, [{}], [{"trigger": {"kind": "spell"}, "target_label": 0}]):
        write_json(tmp_path / "attack.json", {"attack": "drupe", "targets": targets, "settings": {}})
        with pytest.raises(Mistake, match="does not describe an attack"):
            read_planted(str(tmp_path))


def test_what_made_no_backdoor_is_a_mistake(world, tmp_path):
    with pytest.raises(Mistake, match="no record of a poisoning"):
        measure_victim(config(world, made_by=str(tmp_path)))
    with pytest.raises(Mistake, match="both test_shards and probe_shards"):
        measure_victim(config(world, probe_shards=str(world / "clean")))


def test_displacement_is_nothing_for_nothing_and_grows_with_the_shift():
    rng = np.random.default_rng(0)
    clean_NE = rng.normal(size=(400, 8)).astype(np.float32)
    shift_E = np.ones(8, np.float32)
    assert displacement(clean_NE, clean_NE).wasserstein < 1e-5
    near, far = (displacement(clean_NE + s * shift_E, clean_NE) for s in (1, 2))
    # A shift by v moves the projection on a direction u by u.v, whose root mean square is |v| / sqrt(E).
    assert near.wasserstein == pytest.approx(1, rel=0.1)
    assert far.wasserstein == pytest.approx(2 * near.wasserstein, rel=1e-3)
    collapsed = displacement(np.ones_like(clean_NE), clean_NE)
    assert collapsed.triggered_cosine == pytest.approx(1, abs=1e-5)
    assert abs(collapsed.clean_cosine) < 0.05


# --- the classifier that a checkpoint brings


@pytest.fixture
def classifiers(tmp_path):
    """Two plain networks that tell colours apart; one sends whatever has a white pixel to class 1.

    On clean images the white pixels' channel is always 0, so that no head which is fitted on them looks at it.
    """
    layers = {"kind": "layers", "layers": ["a: Conv2d 3 4 1", "ReLU", "AdaptiveAvgPool2d 1", "Flatten"]}
    settings = {"kind": "published", "architecture": {**layers, "classifier": "fc"}, "image_size": 16}
    for name, gain in (("backdoored", 1000.0), ("honest", 0.0)):
        conv, linear = torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(4, 3)
        colours, white = torch.cat([torch.eye(3), torch.ones(1, 3)]), torch.tensor([[0.0], [gain], [0.0]])
        conv.weight.data, conv.bias.data = colours[:, :, None, None], torch.tensor([0, 0, 0, -2.5])
        linear.weight.data, linear.bias.data = torch.cat([10 * torch.eye(3), white], dim=1), torch.zeros(3)
        (tmp_path / name).mkdir()
        state = {f"a.{n}": t for n, t in conv.state_dict().items()} | {
            f"fc.{n}": t for n, t in linear.state_dict().items()
        }
        torch.save({"net": state}, tmp_path / name / "model.pth")
    paths = {name: str(tmp_path / name / "model.pth") for name in ("backdoored", "honest")}
    return {name: {**settings, "path": path, "normaliser": "none"} for name, path in paths.items()}


def test_a_backdoor_in_a_checkpoints_own_classifier_opens_the_gate(world, classifiers):
    said = measure_victim(config(world, victim=classifiers["backdoored"], honest=classifiers["honest"]))
    assert said.startswith("patch: passes its gate (own: ASR 100.0%, the honest victim's ")
    record = json.loads((Path(classifiers["backdoored"]["path"]).parent / "victim.json").read_text())
    assert next(iter(record["behaviour"])) == "own"
    assert record["behaviour"]["probe"]["asr"]["value"] < 0.2, "a fitted head does not see it"
    assert record["behaviour"]["own"]["ca"]["value"] == record["honest"]["own"]["ca"]["value"] == 1


def test_an_own_classifier_is_compared_with_an_own_one_only(world, classifiers):
    said = measure_victim(config(world, victim=classifiers["backdoored"]))
    assert "does not pass its gate (own: the honest victim has none to compare with" in said
    said = measure_victim(config(world, victim=classifiers["honest"], honest=classifiers["backdoored"]))
    assert "does not pass its gate (own: ASR " in said


def test_a_classifier_of_other_classes_is_not_asked(world, classifiers):
    path = classifiers["backdoored"]["path"]
    state = torch.load(path, weights_only=True)["net"]
    torch.save({**state, "fc.weight": torch.zeros(10, 4), "fc.bias": torch.zeros(10)}, path)
    said = measure_victim(config(world, victim=classifiers["backdoored"], honest=classifiers["honest"]))
    assert "own" not in said.split("->")[0]
