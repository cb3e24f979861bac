"""Victims: frozen whatever is called, known by a fingerprint, loaded without executing anything."""

from __future__ import annotations

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from dede_ray.data import images
from dede_ray.evaluation.evaluate import EvaluateConfig, evaluate
from dede_ray.models import clip
from dede_ray.models.decoder import load_decoder
from dede_ray.models.encoders import Described, ResNet, build_encoder, load_encoder, save_encoder
from dede_ray.models.victims import (
    EncoderVictim,
    OpenClipVictim,
    OptionalVictimConfig,
    PublishedVictim,
    Victim,
    VictimConfig,
    load_victim,
)
from dede_ray.poisoning.poison import PoisonConfig, poison
from dede_ray.runtime.config import Config, Mistake, read_json, write_json
from dede_ray.runtime.libraries import open_clip
from dede_ray.scan.score import ScoreConfig, score
from dede_ray.training.clip import TrainConfig, train


@pytest.fixture
def victim(victim_folder) -> Victim:
    return load_victim(OpenClipVictim(path=str(victim_folder)))


@pytest.fixture(scope="module")
def image_BCHW(picture) -> torch.Tensor:
    return images.to_unit_range(torch.from_numpy(np.stack([picture(i) for i in range(24)])))


@pytest.fixture
def copied(victim_folder, tmp_path):
    """The exported victim in a folder of the test's own."""
    return shutil.copytree(victim_folder, tmp_path / "victim")


# --- what a victim promises


def test_a_victim_stays_frozen_and_in_eval_mode_whatever_is_called(victim, image_BCHW):
    before = {name: tensor.clone() for name, tensor in victim.state_dict().items()}
    embedding_BE = victim(image_BCHW)
    assert victim.train() is victim
    victim.train(True)
    assert not any(module.training for module in victim.modules())
    assert torch.equal(victim(image_BCHW), embedding_BE)
    assert not any(parameter.requires_grad for parameter in victim.parameters())
    assert not embedding_BE.requires_grad
    for name, tensor in victim.state_dict().items():  # BatchNorm's running statistics are among them
        assert torch.equal(tensor, before[name]), name


def test_an_embedding_is_the_same_in_any_batch(victim, image_BCHW):
    together = victim(image_BCHW)
    assert (together.dtype, tuple(together.shape)) == (torch.float32, (24, victim.embedding_dim))
    for size in (1, 5, 8):
        in_parts = torch.cat([victim(part) for part in image_BCHW.split(size)])
        torch.testing.assert_close(in_parts, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(victim(image_BCHW.flip(0)).flip(0), together, rtol=1e-5, atol=1e-5)


def test_a_victim_normalises_pixels_itself(victim, victim_folder, image_BCHW):
    """Its own mean and standard deviation, then the model: as one does by hand."""
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    other = load_victim(OpenClipVictim(path=str(victim_folder), mean=mean, std=std))
    normalised_BCHW = (image_BCHW - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(other(image_BCHW), other.model.encode_image(normalised_BCHW))
    assert not torch.allclose(other(image_BCHW), victim(image_BCHW), atol=1e-3)


def test_captions_are_embedded_one_by_one(victim):
    captions = [f"picture {i}" for i in range(7)]
    text_BE = victim.encode_text(captions)
    assert tuple(text_BE.shape) == (7, victim.embedding_dim)
    torch.testing.assert_close(torch.cat([victim.encode_text([c]) for c in captions]), text_BE, rtol=1e-5, atol=1e-5)


# --- fingerprints


def test_a_fingerprint_is_the_same_at_every_loading_and_in_every_folder(victim, copied):
    assert load_victim(OpenClipVictim(path=str(copied))).fingerprint == victim.fingerprint
    weights = OpenClipVictim(path=str(copied / clip.WEIGHTS_FILE), architecture=str(copied))
    assert load_victim(weights).fingerprint == victim.fingerprint


def test_one_changed_weight_changes_the_fingerprint(victim, copied):
    state = load_file(copied / clip.WEIGHTS_FILE)
    name = next(name for name, tensor in state.items() if tensor.numel() > 1 and tensor.is_floating_point())
    state[name].view(-1)[0] += 1e-3
    save_file(state, copied / clip.WEIGHTS_FILE)
    assert load_victim(OpenClipVictim(path=str(copied))).fingerprint != victim.fingerprint


def test_the_normaliser_and_the_precision_are_part_of_the_fingerprint(victim, victim_folder):
    variants = [{"mean": [0.5, 0.5, 0.5]}, {"std": [0.5, 0.5, 0.5]}, {"precision": "bf16"}]
    prints = {load_victim(OpenClipVictim(path=str(victim_folder), **variant)).fingerprint for variant in variants}
    assert len(prints | {victim.fingerprint}) == 4


# --- files


def test_plain_open_clip_loads_an_export_and_gives_the_same_embeddings(victim, victim_folder, image_BCHW):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{victim_folder}")
    model.eval()
    normalise = preprocess.transforms[-1]
    tokens = open_clip.get_tokenizer(f"local-dir:{victim_folder}")(["picture 1", "picture 2"])
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_image(normalise(image_BCHW)), victim(image_BCHW), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            model.encode_text(tokens), victim.encode_text(["picture 1", "picture 2"]), rtol=1e-5, atol=1e-5
        )
    assert model.logit_scale.shape == ()


def test_a_tensor_only_checkpoint_is_the_same_victim_as_the_export(victim, victim_folder, clip_config, tmp_path):
    state = load_file(victim_folder / clip.WEIGHTS_FILE)
    for name, content in (("bare.pt", state), ("nested.pt", {"epoch": 3, "state_dict": state})):
        torch.save(content, tmp_path / name)
        loaded = load_victim(OpenClipVictim(path=str(tmp_path / name), architecture=str(clip_config)))
        assert loaded.fingerprint == victim.fingerprint, name


def test_a_checkpoint_that_must_be_unpickled_is_refused_and_nothing_in_it_runs(clip_config, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"state_dict": {"weight": torch.zeros(1)}, "extra": Bomb()}, tmp_path / "zip.pt")
    torch.save({"extra": Bomb()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    shutil.copy(tmp_path / "plain.pt", tmp_path / "disguised.safetensors")
    for name in ("zip.pt", "old.pt", "plain.pt", "disguised.safetensors"):
        with pytest.raises(Mistake, match="execute code" if name.endswith(".pt") else "no readable checkpoint"):
            load_victim(OpenClipVictim(path=str(tmp_path / name), architecture=str(clip_config)))
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_checkpoint_is_a_mistake(copied, clip_config, tmp_path):
    (tmp_path / "rubbish.pt").write_bytes(b"rubbish")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"state_dict": [1, 2]}, tmp_path / "list.pt")
    for name in ("rubbish.pt", "empty.pt", "list.pt", "absent.pt"):
        with pytest.raises(Mistake, match=name):
            load_victim(OpenClipVictim(path=str(tmp_path / name), architecture=str(clip_config)))
    with pytest.raises(Mistake, match="no victim at"):
        load_victim(OpenClipVictim(path=str(tmp_path / "absent")))
    with pytest.raises(Mistake, match=r"set victim\.architecture"):
        load_victim(OpenClipVictim(path=str(tmp_path / "list.pt")))
    with pytest.raises(Mistake, match="no CLIP architecture 'RN51'"):
        load_victim(OpenClipVictim(path=str(tmp_path / "list.pt"), architecture="RN51"))


def test_weights_of_another_architecture_are_a_mistake(copied, clip_config, tmp_path):
    narrow = read_json(clip_config, "config")
    write_json(tmp_path / "wide.json", {**narrow, "embed_dim": 20})
    weights = copied / clip.WEIGHTS_FILE
    with pytest.raises(Mistake, match="of another shape"):
        load_victim(OpenClipVictim(path=str(weights), architecture=str(tmp_path / "wide.json")))
    state = load_file(weights)
    del state["logit_scale"]
    save_file({**state, "more": torch.zeros(1)}, weights)
    with pytest.raises(Mistake, match=r"1 tensors missing \['logit_scale'\], 1 unexpected \['more'\]"):
        load_victim(OpenClipVictim(path=str(copied)))


def test_a_model_config_that_describes_no_clip_is_a_mistake(copied, tmp_path):
    write_json(tmp_path / "odd.json", {"embed_dim": 16})
    with pytest.raises(Mistake, match="embed_dim, vision_cfg and text_cfg are needed"):
        clip.model_description(str(tmp_path / "odd.json"))
    write_json(copied / clip.CONFIG_FILE, {"model_cfg": None})
    with pytest.raises(Mistake, match="embed_dim, vision_cfg and text_cfg are needed"):
        load_victim(OpenClipVictim(path=str(copied)))
    (copied / clip.CONFIG_FILE).write_text("{")
    with pytest.raises(Mistake, match="cannot be read"):
        load_victim(OpenClipVictim(path=str(copied)))


# --- victims of other kinds


class Holder(Config):
    victim: VictimConfig
    other: OptionalVictimConfig = None


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A narrow ResNet-18 of random weights, whose pixels go from -1 to 1."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder") / "narrow"
    architecture = ResNet(width=4)
    save_encoder(folder, build_encoder(architecture), Described(architecture, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    return folder


def simclr_checkpoint(encoder_folder, path):
    """The same weights as BadEncoder would publish them."""
    places = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5, "layer4": 6}
    state = load_file(encoder_folder / "encoder.safetensors")
    state = {f"f.f.{places[name.split('.')[0]]}.{name.split('.', 1)[1]}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 200, "state_dict": {**state, "g.0.weight": torch.zeros(2, 2)}}, path)


def test_a_victim_without_a_kind_is_a_clip_and_every_kind_survives_its_settings():
    clip_victim = {"path": "a", "precision": "bf16"}
    encoder = {"kind": "encoder", "path": "b"}
    network = {"kind": "timm", "name": "vit_tiny_patch16_224"}
    published = {"kind": "published", "path": "c", "normaliser": "stl", "architecture": network}
    for content, kind in ((clip_victim, OpenClipVictim), (encoder, EncoderVictim), (published, PublishedVictim)):
        holder = Holder.model_validate({"victim": content, "other": content})
        assert type(holder.victim) is type(holder.other) is kind
        assert Holder.model_validate(holder.model_dump(mode="json")) == holder
        assert holder.victim.located().path == os.path.abspath(content["path"])
    assert Holder.model_validate({"victim": clip_victim}).other is None
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        Holder.model_validate({"victim": {"kind": "resnet50", "path": "a"}})


def test_an_encoder_victim_embeds_normalised_pixels_and_knows_no_text(encoder_folder, image_BCHW):
    victim = load_victim(EncoderVictim(path=str(encoder_folder)))
    model, _ = load_encoder(encoder_folder)
    with torch.inference_mode():
        torch.testing.assert_close(victim(image_BCHW), model.eval()(2 * image_BCHW - 1))
    assert (victim.image_size, victim.embedding_dim) == (32, 32)
    assert victim(image_BCHW).dtype == torch.float32
    assert not hasattr(victim, "encode_text")
    assert not any(module.training for module in victim.train(True).modules())
    assert not any(parameter.requires_grad for parameter in victim.parameters())


def test_what_completes_an_encoder_is_part_of_its_fingerprint(encoder_folder, tmp_path):
    prints = {load_victim(EncoderVictim(path=str(encoder_folder), precision=p)).fingerprint for p in ("fp32", "bf16")}
    description = read_json(encoder_folder / "encoder.json", "description")
    for i, changed in enumerate([{}, {"mean": [0, 0, 0]}, {"image_size": 64}]):
        copy = shutil.copytree(encoder_folder, tmp_path / str(i))
        write_json(copy / "encoder.json", {**description, **changed})
        prints.add(load_victim(EncoderVictim(path=str(copy))).fingerprint)
    assert len(prints) == 4, "a copy is the same victim"


def test_a_published_encoder_is_the_victim_that_its_weights_are(encoder_folder, tmp_path, image_BCHW):
    simclr_checkpoint(encoder_folder, tmp_path / "model.pth")
    ours = load_victim(EncoderVictim(path=str(encoder_folder)))
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    theirs = load_victim(PublishedVictim(path=str(tmp_path / "model.pth"), **half))
    assert theirs.fingerprint == ours.fingerprint
    own = load_victim(PublishedVictim(path=str(tmp_path / "model.pth")))
    assert own.normalise.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert not torch.allclose(own(image_BCHW), ours(image_BCHW), atol=1e-3)


def test_a_published_clip_is_the_open_clip_victim_that_its_weights_are(victim_folder, clip_config, tmp_path):
    """As BadCLIP writes it, distributed, with OpenAI's normaliser; as Detect-CLIP does, bare and with none."""
    state = load_file(victim_folder / clip.WEIGHTS_FILE)
    wrapped = {"epoch": 10, "name": "x", "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save(wrapped, tmp_path / "badclip.pt")
    torch.save(state, tmp_path / "model_state_dict.pt")
    settings = {"path": str(tmp_path / "badclip.pt"), "clip": str(clip_config)}
    like_openai = load_victim(PublishedVictim(**settings, normaliser="clip"))
    assert like_openai.fingerprint == load_victim(OpenClipVictim(path=str(victim_folder))).fingerprint
    assert like_openai.encode_text(["a"]).shape == (1, 16)
    bare = load_victim(
        PublishedVictim(**{**settings, "path": str(tmp_path / "model_state_dict.pt")}, normaliser="none")
    )
    assert bare.normalise.std.flatten().tolist() == [1, 1, 1]
    with pytest.raises(Mistake, match="set normaliser to one of"):
        load_victim(PublishedVictim(**settings))
    with pytest.raises(Mistake, match="whole CLIP; set `clip`"):
        load_victim(PublishedVictim(path=settings["path"], normaliser="clip"))
    with pytest.raises(Mistake, match="leave architecture and image_size out"):
        load_victim(PublishedVictim(**settings, normaliser="clip", image_size=64))


@pytest.mark.slow
def test_a_decoder_is_trained_against_an_encoder_that_then_scores_and_is_evaluated(
    local_ray, encoder_folder, write_pictures, tmp_path
):
    """Every job that takes a victim takes this one; without text, the probe alone is measured."""
    write_pictures(tmp_path / "shards", range(32), per_shard=16)
    for split in ("test", "probe"):
        write_pictures(tmp_path / split, range(24), split=split)
    few = {"min_actors": 1, "cpus_per_actor": 0.5, "decode_cpus": 0.5}
    workers = {"cpus_per_worker": 0.5, "read_cpus": 0.5, "threads_per_worker": 1, "max_failures": 0}
    decoder = {"shards": str(tmp_path / "shards"), "batch_size": 32, "epochs": 1}
    encoder = {"kind": "encoder", "path": str(encoder_folder)}
    run = {"output": str(tmp_path / "run"), "lanes": 4, "workers": workers, "embedding": few}
    train(TrainConfig.model_validate({**run, "decoder": {**decoder, "victim": encoder}}))
    victim = load_victim(EncoderVictim(path=str(encoder_folder)))
    assert load_decoder(tmp_path / "run" / "decoder").victim == victim.fingerprint

    detector = {"kind": "dede", "decoder": str(tmp_path / "run" / "decoder"), "score_mask_ratio": 0.9}
    rule = {"kind": "assumed_rate", "rate": 0.1, "score": "dede_sum"}
    scoring = {"shards": str(tmp_path / "shards"), "output": str(tmp_path / "scores"), "victim": encoder}
    manifest = score(
        ScoreConfig.model_validate({**scoring, "detectors": [detector], "decision": rule, "resources": few})
    )
    assert manifest.info["victim"]["fingerprint"] == victim.fingerprint
    assert np.isfinite(manifest.table["dede_sum"].to_numpy()).all()

    poisoned = tmp_path / "poisoned"
    attack = {"shards": str(tmp_path / "shards"), "rate": 0.1, "target_label": 1, "trigger": {"kind": "patch"}}
    poison(PoisonConfig.model_validate({**attack, "output": str(poisoned), "target_captions": ["one"]}))
    places = {"truth": str(poisoned / "truth.parquet"), "attack": str(poisoned), "output": str(tmp_path / "report")}
    shards = {"test_shards": str(tmp_path / "test"), "probe_shards": str(tmp_path / "probe")}
    text = evaluate(EvaluateConfig(manifest=str(tmp_path / "scores"), **places, **shards, num_gallery=2))
    assert "VOID: there is no honest victim" in text
    gate = read_json(tmp_path / "report" / "metrics.json", "metrics")["gate"]
    assert list(gate["victim"]) == ["probe"]
