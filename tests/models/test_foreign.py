"""A network of another library embeds as that does, is known by a fingerprint, and runs no code of its files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dede_ray.data.images import square, to_unit_range
from dede_ray.data.passes import PassResources
from dede_ray.data.shards import Limits, list_shards
from dede_ray.detectors.cognitive_distillation import CognitiveDistillation
from dede_ray.models import foreign
from dede_ray.models.embedding import Encoding, _resized, fitting_set
from dede_ray.models.victims import (
    ClipVictim,
    OnnxVictim,
    OpenClipVictim,
    PublishedVictim,
    PythonVictim,
    TimmVictim,
    TransformersVictim,
    Victim,
    VictimConfig,
    load_victim,
    weights_file,
)
from dede_ray.models.weights import read_tensors
from dede_ray.runtime.config import Config, Mistake, read_json, write_json
from dede_ray.runtime.libraries import timm

PASS = PassResources(min_actors=1, cpus_per_actor=0.5, decode_cpus=0.5)
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]


def pixels(size: int, num: int = 5) -> torch.Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(1))


def normalised(image_BCHW: torch.Tensor) -> torch.Tensor:
    return (image_BCHW - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    assert float(theirs.std()) > 1e-4, "a test of nothing"
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)


# --- transformers

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 600, "max_position_embeddings": 16}
WITHOUT_TEXT = {
    "Dinov2Model": {**VISION, "image_size": 48},
    "Dinov2WithRegistersModel": {**VISION, "num_register_tokens": 2},
    "DINOv3ViTModel": {**VISION, "num_register_tokens": 2},
    "CLIPVisionModel": VISION,
    "CLIPVisionModelWithProjection": {**VISION, "projection_dim": 24},
    "SiglipVisionModel": VISION,
    "ViTModel": VISION,
    "ConvNextModel": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "image_size": 32},
}


def saved(folder: Path, name: str, **processor: object) -> torch.nn.Module:
    """A random network of transformers' as it saves itself, with the config of an image processor."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    if name in foreign.WITH_TEXT.values():
        more = {"projection_dim": 24} if name == "CLIPModel" else {}
        vision = {**SMALL, "patch_size": 8, "num_patches": 16} if name == "Siglip2Model" else VISION
        text = {**TEXT, "projection_size": 32} if name == "Siglip2Model" else TEXT
        if name == "CLIPModel":
            text = {**text, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        config = kind.config_class(vision_config=vision, text_config=text, **more)
    else:
        config = kind.config_class(**WITHOUT_TEXT[name])
    model = kind(config, **({"add_pooling_layer": False} if name == "ViTModel" else {})).eval()
    for parameter in model.parameters():  # some start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", {"image_mean": MEAN, "image_std": STD, **processor})
    return model


def with_tokenizer(folder: Path) -> None:
    """CLIP's byte pairs, of which it has learnt only the letters."""
    letters = [chr(i) for i in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *[f"{letter}</w>" for letter in letters]]
    write_json(folder / "vocab.json", {word: number for number, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16})


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_a_clip_of_transformers_embeds_images_and_captions_as_the_library_does(name, tmp_path):
    model = saved(tmp_path, name)
    with_tokenizer(tmp_path)
    victim = load_victim(TransformersVictim(path=str(tmp_path)))
    assert isinstance(victim, ClipVictim)
    assert victim.image_size == 32
    from transformers import AutoTokenizer

    image_BCHW, captions = pixels(32), ["a dog", "cats", "a dog", "x " * 40]
    tokens = AutoTokenizer.from_pretrained(tmp_path)(
        captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )["input_ids"]
    with torch.inference_mode():
        theirs = model(pixel_values=normalised(image_BCHW), input_ids=tokens)
        for ours_NE, theirs_NE in (
            (victim(image_BCHW), theirs.image_embeds), (victim.encode_text(captions), theirs.text_embeds)
        ):  # fmt: skip
            same(torch.nn.functional.normalize(ours_NE, dim=-1), theirs_NE)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    silent = load_victim(TransformersVictim(path=str(tmp_path)))
    assert type(silent) is Victim
    assert silent.fingerprint == victim.fingerprint


@pytest.mark.parametrize("name", WITHOUT_TEXT)
def test_an_image_network_of_transformers_embeds_as_the_library_does(name, tmp_path):
    model = saved(tmp_path, name)
    victim = load_victim(TransformersVictim(path=str(tmp_path)))
    assert victim.image_size == {"Dinov2Model": 48}.get(name, 32)
    image_BCHW = pixels(victim.image_size)
    with torch.inference_mode():
        theirs = model(pixel_values=normalised(image_BCHW))
        embedding_BE = getattr(theirs, "image_embeds", None)
        if embedding_BE is None:
            embedding_BE = theirs.last_hidden_state[:, 0] if name == "ViTModel" else theirs.pooler_output
        same(victim(image_BCHW), embedding_BE)
    grown = victim.embed_with_gradient(image_BCHW.requires_grad_())
    assert torch.autograd.grad(grown.sum(), image_BCHW)[0].abs().max() > 0


def test_a_siglip_2_takes_patches(tmp_path):
    model = saved(tmp_path, "Siglip2Model")
    victim = load_victim(TransformersVictim(path=str(tmp_path)))
    assert victim.image_size == 32
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    image_BCHW = pixels(32, 2)
    patches = torch.stack([convert_image_to_patches(one, 8) for one in normalised(image_BCHW)])
    mask, shapes = torch.ones(2, 16, dtype=torch.int64), torch.tensor([[4, 4]] * 2)
    with torch.inference_mode():
        theirs = model.get_image_features(
            pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes
        ).pooler_output
    same(victim(image_BCHW), theirs)


def test_what_completes_a_network_of_transformers_is_part_of_its_fingerprint_and_the_folder_is_not(tmp_path):
    saved(tmp_path / "a", "Dinov2Model", size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32})
    victim = load_victim(TransformersVictim(path=str(tmp_path / "a")))
    assert victim.image_size == 32, "the processor's crop, not the 48 px of the positions"
    copied = shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = read_json(copied / "config.json", "config")
    for changed in ({"transformers_version": "4.0"}, {"dtype": "float16"}, {"architectures": ["X"]}, {"auto_map": {}}):
        write_json(copied / "config.json", {**config, **changed})
        assert load_victim(TransformersVictim(path=str(copied))).fingerprint == victim.fingerprint
    prints = {victim.fingerprint}
    for settings in (HALF, {"image_size": 48}, {"precision": "bf16"}):
        prints.add(load_victim(TransformersVictim(path=str(copied), **settings)).fingerprint)
    write_json(copied / "config.json", {**config, "layer_norm_eps": 1e-3})
    prints.add(load_victim(TransformersVictim(path=str(copied))).fingerprint)
    assert len(prints) == 5


def test_weights_of_transformers_may_be_split_or_a_bin_and_a_classifier_is_kept(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**VISION, num_labels=3)
    whole = transformers.ViTForImageClassification(config).eval()
    torch.nn.init.normal_(whole.classifier.weight)
    prints = set()
    for i, size in enumerate(("1GB", "20KB")):
        whole.save_pretrained(tmp_path / str(i), max_shard_size=size)
        prints.add(load_victim(TransformersVictim(path=str(tmp_path / str(i)), **HALF)).fingerprint)
    assert (tmp_path / "1" / "model.safetensors.index.json").is_file()
    (tmp_path / "2").mkdir()
    shutil.copy(tmp_path / "0" / "config.json", tmp_path / "2")
    torch.save(whole.state_dict(), tmp_path / "2" / "pytorch_model.bin")
    victim = load_victim(TransformersVictim(path=str(tmp_path / "2"), **HALF))
    assert prints == {victim.fingerprint}
    image_BCHW = pixels(32)
    with torch.inference_mode():
        same(victim.classifier(victim(image_BCHW)), whole(pixel_values=2 * image_BCHW - 1).logits)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "bert"}, "of the kind 'bert'; known of transformers' are clip"),
        ({"model_type": None}, "of the kind None"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1,000,000,000, more than any network has"),
        ({"num_hidden_layers": 900}, "far larger model than the weights"),
        ({"hidden_size": 10**7}, "far larger model than the weights"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1, "out_features": None, "out_indices": None, "stage_names": None}, "unexpected"),
        ({"hidden_size": "wide"}, "transformers cannot build"),
        ({"hidden_size": 64}, "transformers cannot build|of another shape"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_a_config_that_does_not_describe_the_weights_is_a_mistake(changed, said, tmp_path):
    saved(tmp_path, "Dinov2Model")
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json", "config"), **changed})
    with pytest.raises(Mistake, match=said):
        load_victim(TransformersVictim(path=str(tmp_path)))


def test_a_folder_without_statistics_of_pixels_asks_for_them_and_other_layouts_name_their_kind(tmp_path, clip_config):
    saved(tmp_path / "a", "CLIPModel")
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    with pytest.raises(Mistake, match="set mean and std"):
        load_victim(TransformersVictim(path=str(tmp_path / "a")))
    load_victim(TransformersVictim(path=str(tmp_path / "a"), **HALF))
    write_json(tmp_path / "a" / "processor_config.json", {"image_processor": {"image_mean": MEAN, "image_std": STD}})
    assert load_victim(TransformersVictim(path=str(tmp_path / "a"))).normalise.std.flatten().tolist() == pytest.approx(
        STD
    )
    with pytest.raises(Mistake, match=r"network of transformers's \(clip\): set victim.kind to transformers"):
        load_victim(OpenClipVictim(path=str(tmp_path / "a")))
    with pytest.raises(Mistake, match="names of transformers' CLIP"):
        load_victim(OpenClipVictim(path=str(tmp_path / "a" / "model.safetensors"), architecture=str(clip_config)))
    with pytest.raises(Mistake, match=r"expected a folder or repository with config\.json"):
        load_victim(TransformersVictim(path=str(tmp_path / "absent")))


def test_nothing_that_a_folder_of_transformers_names_is_executed(tmp_path, monkeypatch):
    """Remote code in config and tokenizer, a module of that name beside it, an attention kernel from the hub."""
    saved(tmp_path, "CLIPModel")
    with_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'exploded')!r}).touch()")
    config = read_json(tmp_path / "config.json", "config")
    auto = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
    kernel = {"attn_implementation": "somebody/kernel", "_attn_implementation": "somebody/kernel"}
    vision = {**config["vision_config"], **auto, **kernel}
    write_json(tmp_path / "config.json", {**config, **auto, **kernel, "vision_config": vision})
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, **auto})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    victim = load_victim(TransformersVictim(path=str(tmp_path)))
    assert victim.encode_text(["a"]).shape == (1, 24)
    assert not (tmp_path / "exploded").exists()
    assert "evil" not in sys.modules


# --- timm


def timm_folder(folder: Path, name: str, num_classes: int = 4, size: int = 32, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    given = {"img_size": size} if "vit" in name else {}
    model = timm.create_model(name, num_classes=num_classes, **given, **options).eval()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, size, size], "mean": MEAN, "std": STD, "classifier": model.default_cfg["classifier"]}
    cfg["fixed_input_size"] = "vit" in name
    content = {"architecture": name, "num_classes": num_classes, "pretrained_cfg": cfg, "model_args": options}
    write_json(folder / "config.json", content)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_tiny_patch16_224", {"depth": 2}), ("vit_tiny_patch16_224", {"depth": 1, "global_pool": "avg"}),
     ("resnet10t", {}), ("convnext_atto", {}), ("mobilenetv3_small_050", {})],
)  # fmt: skip
def test_a_folder_of_timms_embeds_as_the_library_does_and_keeps_its_classifier(name, options, tmp_path):
    model = timm_folder(tmp_path / "a", name, **options)
    victim = load_victim(TimmVictim(path=str(tmp_path / "a")))
    image_BCHW = pixels(32)
    with torch.inference_mode():
        embedding_BE = model.forward_head(model.forward_features(normalised(image_BCHW)), pre_logits=True)
        same(victim(image_BCHW), embedding_BE)
        same(victim.classifier(victim(image_BCHW)), model(normalised(image_BCHW)))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load_victim(TimmVictim(path=f"local-dir:{tmp_path / 'b'}")).fingerprint == victim.fingerprint
    if not options:
        by_name = TimmVictim(
            path=str(tmp_path / "a" / "model.safetensors"), name=name, image_size=32, mean=MEAN, std=STD
        )
        assert load_victim(by_name).fingerprint == victim.fingerprint


def test_timm_adapts_positions_to_another_size_of_image(tmp_path):
    timm_folder(tmp_path, "vit_tiny_patch16_224", size=64, depth=1)
    victim = load_victim(TimmVictim(path=str(tmp_path), image_size=32))
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, img_size=32).eval()
    state = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if not n.startswith("head.")}
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], (2, 2))
    theirs.load_state_dict(state)
    with torch.inference_mode():
        same(victim(pixels(32)), theirs(normalised(pixels(32))))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architecture": "no_such_net"}, "timm knows no network 'no_such_net'"),
        ({"architecture": None}, "set name"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, r"model_args \['checkpoint_path'\] cannot be set"),
        ({"model_args": {"pretrained": True}}, "cannot be set"),
        ({"model_args": {"block_fn": {"a": 1}}}, "cannot be set"),
        ({"model_args": {"depth": 10**7}}, "cannot be set"),
        ({"model_args": {"depth": 2**16}}, "far larger model than the weights"),
        ({"model_args": {"depth": 3}}, "does not fit the encoder"),
        ({"model_args": {"no_such_option": 1}}, "timm cannot build"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "mean": "x", "std": STD}}, "three numbers"),
    ],
)
def test_an_absurd_config_of_timms_is_a_mistake(changed, said, tmp_path):
    timm_folder(tmp_path, "vit_tiny_patch16_224", depth=1)
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json", "config"), **changed})
    with pytest.raises(Mistake, match=said):
        load_victim(TimmVictim(path=str(tmp_path)))


# --- ONNX


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Linear(8, 6)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(image_BCHW).relu().mean(dim=(2, 3)))


def onnx_file(path: Path, batch: int | str = "batch", side: int | str = 16, layout: str = "NCHW", domain: str = "",
              more: tuple[str, ...] = (), kind: str = "float") -> Path:  # fmt: skip
    """`Small` as ONNX, written by hand."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper, proto = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    model = Small()
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    elements = {"float": proto.FLOAT, "uint8": proto.UINT8}[kind]
    shape = [batch, 3, side, side] if layout == "NCHW" else [batch, side, side, 3]
    nodes = [] if layout == "NCHW" else [helper.make_node("Transpose", ["image"], ["nchw"], perm=[0, 3, 1, 2])]
    nodes += [
        helper.make_node("Conv", ["image" if layout == "NCHW" else "nchw", "conv.weight", "conv.bias"], ["a"],
                         strides=[4, 4]),
        helper.make_node("Relu", ["a"], ["b"], domain=domain),
        helper.make_node("GlobalAveragePool", ["b"], ["map"]),
        helper.make_node("Flatten", ["map"], ["flat"]),
        helper.make_node("Gemm", ["flat", "linear.weight", "linear.bias"], ["embedding"], transB=1),
    ]  # fmt: skip
    outputs = [helper.make_tensor_value_info(name, proto.FLOAT, None) for name in ("embedding", *more)]
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info("image", elements, shape)], outputs,
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


@pytest.mark.parametrize("settings", [{}, {"batch": 1}, {"batch": 3}, {"layout": "NHWC"}, {"side": "side"}], ids=str)
def test_an_onnx_file_embeds_as_its_network_does_whatever_batch_it_is_for(settings, tmp_path):
    pytest.importorskip("onnxruntime")
    path = onnx_file(tmp_path / "small.onnx", **settings)
    config = OnnxVictim(path=str(path), mean=MEAN, std=STD, **({"image_size": 16} if "side" in settings else {}))
    victim = load_victim(config)
    assert (victim.image_size, victim.embedding_dim, victim.device.type) == (16, 6, "cpu")
    with torch.inference_mode():
        for num in (1, 3, 5):
            same(victim(pixels(16, num)), Small().eval()(normalised(pixels(16, num))))
    copied = shutil.copy(path, tmp_path / "copy.onnx")
    assert load_victim(config.model_copy(update={"path": str(copied)})).fingerprint == victim.fingerprint
    assert load_victim(config.model_copy(update={"mean": (0, 0, 0)})).fingerprint != victim.fingerprint
    assert weights_file(config) == path


def test_without_a_gradient_an_onnx_file_is_refused_by_what_needs_one(tmp_path):
    pytest.importorskip("onnxruntime")
    victim = load_victim(OnnxVictim(path=str(onnx_file(tmp_path / "small.onnx")), normaliser="none"))
    with pytest.raises(Mistake, match=r"gives no gradient; .*cognitive_distillation, decree"):
        victim.embed_with_gradient(pixels(16))
    with pytest.raises(Mistake, match="gives no gradient"):
        CognitiveDistillation().open(victim, {})


def test_what_is_no_onnx_network_of_images_is_a_mistake(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "small.onnx"

    def refused(said: str, **settings: object) -> None:
        with pytest.raises(Mistake, match=said):
            load_victim(OnnxVictim(path=str(path), **{"normaliser": "none", **settings}))

    path.write_bytes(b"rubbish")
    refused("no readable ONNX file")
    with pytest.raises(Mistake, match=r"set victim\.kind to onnx"):
        read_tensors(path)
    onnx_file(path, domain="somebody.custom")
    refused("onnxruntime does not compute")
    onnx_file(path, kind="uint8")
    refused("onnxruntime does not compute|should take floats")
    onnx_file(path, more=("map",))
    refused("2 outputs, embedding .*, map .*; set output")
    refused("2 outputs", output="absent")
    refused("image_size is 32, but", image_size=32, output="map")
    refused("set normaliser to one of", normaliser=None)
    assert load_victim(OnnxVictim(path=str(path), normaliser="none", output="map")).embedding_dim == 8
    onnx_file(path, side="side")
    refused("set image_size")
    path.unlink()
    refused("no checkpoint at")


@pytest.mark.parametrize("place", ["weights.bin", "../weights.bin", "absolute", "link", "snapshots/link", "sub/link"])
def test_an_onnx_file_reads_data_from_its_own_folder_only(place, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = onnx_file(tmp_path / "inside" / "small.onnx")
    own = load_victim(OnnxVictim(path=str(path), normaliser="none"))
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    if place != "weights.bin":
        shutil.move(path.parent / "weights.bin", tmp_path / "weights.bin")
        target = str(tmp_path / "weights.bin") if place == "absolute" else place
        if place == "sub/link":  # a link in the middle of the way
            target = "sub/weights.bin"
            (path.parent / "sub").symlink_to(tmp_path)
        elif place.endswith("link"):
            (path.parent / place).parent.mkdir(exist_ok=True)
            (path.parent / place).symlink_to(tmp_path / "weights.bin")
        outer = onnx.load(path, load_external_data=False)
        for tensor in outer.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = target
        path.write_bytes(outer.SerializeToString())
        with pytest.raises(Mistake, match="expected a file in the folder of the ONNX file"):
            load_victim(OnnxVictim(path=str(path), normaliser="none"))
        return
    victim = load_victim(OnnxVictim(path=str(path), normaliser="none"))
    with torch.inference_mode():
        same(victim(pixels(16)), own(pixels(16)))
    data = bytearray((path.parent / "weights.bin").read_bytes())
    data[3] ^= 1
    (path.parent / "weights.bin").write_bytes(data)
    assert load_victim(OnnxVictim(path=str(path), normaliser="none")).fingerprint != victim.fingerprint


def test_onnx_data_in_the_hubs_cache_are_links_to_its_blobs(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    commit = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    path = onnx_file(commit / "onnx" / "model.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    shutil.move(path.parent / "weights.bin", tmp_path / "models--a--b" / "blobs" / "1")
    (path.parent / "weights.bin").symlink_to("../../../blobs/1")
    assert foreign._stays_inside(path.parent / "weights.bin", path.parent)
    (path.parent / "weights.bin").unlink()
    (path.parent / "weights.bin").symlink_to("/etc/passwd")
    with pytest.raises(Mistake, match="expected a file in the folder of the ONNX file"):
        load_victim(OnnxVictim(path=str(path), normaliser="none"))


# --- pickles


class Bomb:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("kind", ["transformers", "timm", "onnx", "open_clip", "published"])
@pytest.mark.parametrize("how", ["torch", "legacy", "pickle", "as safetensors", "split"])
def test_nothing_pickled_in_a_folder_runs_whatever_its_kind(kind, how, clip_config, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    if kind == "transformers":
        saved(folder, "Dinov2Model")
    elif kind == "timm":
        timm_folder(folder, "resnet10t")
    elif kind == "open_clip":
        shutil.copy(clip_config, folder / "open_clip_config.json")
    (folder / "model.safetensors").unlink(missing_ok=True)
    content = {"state_dict": {"a.weight": torch.zeros(3)}, "bomb": Bomb(tmp_path / "exploded")}
    safe, unsafe = {
        "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"), "onnx": ("model.onnx",) * 2,
    }.get(kind, ("model.safetensors", "pytorch_model.bin"))  # fmt: skip
    path = folder / (safe if how == "as safetensors" else unsafe)
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    if how == "split":
        write_json(folder / f"{unsafe}.index.json", {"weight_map": {"a.weight": "part.bin"}})
        path.rename(folder / "part.bin")
    more = {"published": {"path": str(path if how != "split" else folder / "part.bin")}, "onnx": {"normaliser": "none"}}
    settings = {"kind": kind, "path": str(folder), **more.get(kind, {})}
    with pytest.raises(Mistake):
        load_victim(settings)
    assert not (tmp_path / "exploded").exists()


# --- the user's own network


NETWORK = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(4 * 16, 5))

def wrong():
    return 3

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def own_network(tmp_path, monkeypatch) -> PythonVictim:
    monkeypatch.delitem(sys.modules, "own_network_of_a_test", raising=False)
    (tmp_path / "own_network_of_a_test.py").write_text(NETWORK)
    return PythonVictim(path="own_network_of_a_test:build", folder=str(tmp_path), image_size=16, mean=MEAN, std=STD)


def test_a_function_of_the_users_gives_the_network_and_the_log_says_that_it_ran(own_network, caplog):
    victim = load_victim(own_network)
    assert "this runs the code of own_network_of_a_test" in caplog.text
    assert (victim.image_size, victim.embedding_dim) == (16, 5)
    import own_network_of_a_test  # type: ignore[import-not-found]

    network = own_network_of_a_test.build().eval()
    network.load_state_dict(victim.model.state_dict())
    with torch.inference_mode():
        same(victim(pixels(16)), network(normalised(pixels(16))))
    assert load_victim(own_network).fingerprint == victim.fingerprint, "drawn weights are the same in every process"
    assert str(own_network.folder) not in sys.path
    assert own_network.located().folder == own_network.folder


def test_what_is_no_function_that_gives_a_network_is_a_mistake(own_network):
    for path, said in (
        ("own_network_of_a_test", "expected module:function"),
        ("own_network_of_a_test:", "expected module:function"),
        ("../own_network_of_a_test:build", "expected module:function"),
        ("own_network_of_a_test:absent", "AttributeError"),
        ("own_network_of_a_test:wrong", "should give a torch.nn.Module, not int"),
        ("own_network_of_a_test:broken", "RuntimeError: no weights here"),
        ("no_such_module_of_a_test:build", "ModuleNotFoundError"),
    ):
        with pytest.raises(Mistake, match=said):
            load_victim(own_network.model_copy(update={"path": path}))
    with pytest.raises(Mistake, match="cannot embed images of 32 px"):
        load_victim(own_network.model_copy(update={"image_size": 32}))


def test_on_a_cluster_code_is_refused_unless_it_is_trusted(own_network, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    for refused in (own_network.located, lambda: load_victim(own_network)):
        with pytest.raises(Mistake, match=r"every machine of this Ray cluster would run; .*trust: true"):
            refused()
    assert "own_network_of_a_test" not in sys.modules, "it was not even imported"
    trusted = own_network.model_copy(update={"trust": True})
    assert load_victim(trusted.located()).embedding_dim == 5


# --- real weights


def test_the_real_mobilenet_is_a_timm_victim_with_a_classifier(shared_data):
    """TensorFlow's padding is an option of timm's, so that it takes the published kind."""
    path = str(shared_data / "weights" / "mobilenet_v2_imagenet_fp16.pt")
    same_padding = {"kind": "timm", "name": "mobilenetv2_100", "pad_type": "same"}
    victim = load_victim(PublishedVictim(path=path, architecture=same_padding, image_size=224, **HALF))
    assert victim.classifier is not None
    assert victim.classifier.out_features == 1001
    own = timm.create_model("mobilenetv2_100", num_classes=1001).eval()
    own.load_state_dict(
        {n: t.float() if t.is_floating_point() else t for n, t in torch.load(path, weights_only=True).items()}
    )
    symmetric = load_victim(TimmVictim(path=path, name="mobilenetv2_100", image_size=96, **HALF))
    image_BCHW = pixels(96, 2)
    with torch.inference_mode():
        features = own.forward_head(own.forward_features(2 * image_BCHW - 1), pre_logits=True)
        same(symmetric(image_BCHW), features)


def test_the_real_vit_is_the_same_by_timm_and_as_onnx(shared_data, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript", reason="torch's exporter needs it")
    path = shared_data / "weights" / "vit_s14_dinov2_saliency_fp16.safetensors"
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    theirs = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=98).eval()
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], (7, 7))
    theirs.load_state_dict(state)
    image_BCHW = pixels(98, 2)
    imagenet = timm.get_pretrained_cfg("vit_small_patch14_dinov2")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (imagenet.mean, imagenet.std))
    with torch.inference_mode():
        expected = theirs((image_BCHW - mean) / std)
    by_timm = load_victim(TimmVictim(path=str(path), name="vit_small_patch14_dinov2", image_size=98))
    same(by_timm(image_BCHW), expected)
    torch.onnx.export(theirs, (image_BCHW,), tmp_path / "vit.onnx", dynamo=True, external_data=False, verbose=False)
    by_onnx = load_victim(OnnxVictim(path=str(tmp_path / "vit.onnx"), normaliser="imagenet"))
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    by_the_runtime = session.run(None, {session.get_inputs()[0].name: ((image_BCHW - mean) / std).numpy()})[0]
    same(by_onnx(image_BCHW), torch.from_numpy(by_the_runtime))
    torch.testing.assert_close(by_onnx(image_BCHW), expected, rtol=1e-4, atol=1e-4)  # two libraries' kernels
    assert by_onnx.embedding_dim == by_timm.embedding_dim == 384


class Holder(Config):
    victim: VictimConfig


def test_settings_of_every_kind_survive_being_written_down():
    for content in (
        {"kind": "transformers", "path": "a"}, {"kind": "timm", "path": "a", "name": "resnet18"},
        {"kind": "onnx", "path": "a.onnx", "pool": "first"}, {"kind": "python", "path": "a:b", "trust": True},
        {"kind": "published", "path": "a", "architecture": {"kind": "layers", "layers": ["ReLU"]}},
    ):  # fmt: skip
        holder = Holder.model_validate({"victim": content})
        assert Holder.model_validate(json.loads(json.dumps(holder.model_dump(mode="json")))) == holder


# --- in Ray's actors


@pytest.mark.slow
def test_every_kind_embeds_in_actors_as_here_as_victim_and_as_reference(
    local_ray, write_pictures, png, own_network, tmp_path
):
    """One pass each, of two kinds: what its actors load by the located settings is what the driver loads."""
    pytest.importorskip("onnxruntime")
    saved(tmp_path / "clip", "CLIPModel")
    saved(tmp_path / "dinov2", "Dinov2Model")
    timm_folder(tmp_path / "timm", "vit_tiny_patch16_224", depth=1)
    of_timm = TimmVictim(path=str(tmp_path / "timm"))
    onnx = OnnxVictim(path=str(onnx_file(tmp_path / "small.onnx", batch=3)), normaliser="none")
    write_pictures(tmp_path / "shards", range(7))
    shards = list_shards(str(tmp_path / "shards"))
    pairs = [(TransformersVictim(path=str(tmp_path / "clip")), onnx), (own_network, of_timm),
             (onnx, TransformersVictim(path=str(tmp_path / "dinov2")))]  # fmt: skip
    for i, (victim, reference) in enumerate(pairs):
        encoding = Encoding(victim.located(), reference.located(), frozenset({"reference"}))
        drawn = fitting_set(
            shards, tmp_path / str(i), encoding, 7, 0, chunk_size=4, limits=Limits(), resources=PASS,
            max_error_fraction=0, name="test",
        )  # fmt: skip
        for embedding_BE, config in ((drawn.embedding_BE, victim), (drawn.references, reference)):
            here, size = load_victim(config), load_victim(victim).image_size
            image_BHWC = torch.from_numpy(np.stack([square(png(n), str(n), size, Limits()) for n in range(7)]))
            image_BCHW = to_unit_range(image_BHWC)
            torch.testing.assert_close(embedding_BE, here(_resized(image_BCHW, here.image_size)), rtol=1e-4, atol=1e-5)


JOB = """
shards: {shards}
output: {output}
victim: {{path: 'hf-hub:somebody/clip'}}
reference: {{path: 'hf-hub:somebody/clip'}}
detectors:
  - {{kind: density, num_references: 20, k: 4, lid_k: 8}}
  - {{kind: consistency, num_references: 20, k: 4, min_agreement: 0}}
decision: {{kind: assumed_rate, rate: 0.1, score: k_distance}}
resources: {{min_actors: 1, cpus_per_actor: 0.5, decode_cpus: 0.5}}
"""


@pytest.mark.slow
@pytest.mark.ray
def test_the_score_job_takes_a_repository_of_the_hub_by_its_name_alone_without_a_network(
    victim_folder, write_pictures, tmp_path
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home" / "hub" / "models--somebody--clip"
    shutil.copytree(victim_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    write_pictures(tmp_path / "shards", range(40))
    (tmp_path / "score.yaml").write_text(JOB.format(shards=tmp_path / "shards", output=tmp_path / "scores"))
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dede_ray", "score", "score.yaml"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = read_json(tmp_path / "scores" / "manifest.json", "manifest")["victim"]
    own = load_victim(OpenClipVictim(path=str(victim_folder)))
    assert written == {"path": f"hf-hub:somebody/clip@{commit}", "fingerprint": own.fingerprint}
