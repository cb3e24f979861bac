"""An encoder from anywhere serves as victim and as reference: a decoder is trained, shards are scored and sifted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dede_ray.data.shards import count_samples, list_shards
from dede_ray.models.victims import load_victim
from dede_ray.models.weights import CONFIG_FILE, WEIGHTS_FILE
from dede_ray.runtime.libraries import timm
from dede_ray.scan.score import ScoreConfig, score
from dede_ray.scan.sift import SiftConfig, sift
from dede_ray.training.clip import TrainConfig, train

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}

NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(4 * 16, 12))
"""


def of_the_hub(folder: Path, victim_folder: Path) -> dict[str, Any]:
    """The hub's local cache of one repository, as huggingface_hub lays it out."""
    home = folder / "hub" / "models--somebody--clip_backdoor"
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        there = home / "snapshots" / ("0" * 40) / name
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(victim_folder / name, there)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    return {"path": "hf-hub:somebody/clip_backdoor"}


def of_transformers(name: str) -> Callable[[Path, Path], dict[str, Any]]:
    def make(folder: Path, victim_folder: Path) -> dict[str, Any]:
        transformers = pytest.importorskip("transformers")
        kind = getattr(transformers, name)
        text = {**SMALL, "vocab_size": 600, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
        about = {"vision_config": VISION, "text_config": text, "projection_dim": 24} if name == "CLIPModel" else VISION
        torch.manual_seed(0)
        kind(kind.config_class(**about)).save_pretrained(folder / "model")
        (folder / "model" / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": HALF["mean"], "image_std": HALF["std"]})
        )
        return {"kind": "transformers", "path": str(folder / "model")}

    return make


def of_timm(folder: Path, victim_folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), folder / "network.safetensors")
    return {
        "kind": "timm", "path": str(folder / "network.safetensors"), "name": "resnet10t", "image_size": 32, **HALF
    }  # fmt: skip


def of_onnx(folder: Path, victim_folder: Path) -> dict[str, Any]:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, draw = onnx.helper, torch.Generator().manual_seed(0)
    weight = torch.randn(12, 3, 8, 8, generator=draw).numpy()
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["a"], strides=[8, 8]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["embedding"]),
    ]
    kinds = [("image", ["n", 3, 32, 32]), ("embedding", ["n", 12])]
    given, gives = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in kinds)
    graph = helper.make_graph(nodes, "g", [given], [gives], [onnx.numpy_helper.from_array(weight, "weight")])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "network.onnx"
    )
    return {"kind": "onnx", "path": str(folder / "network.onnx"), "normaliser": "none"}


def of_python(folder: Path, victim_folder: Path) -> dict[str, Any]:
    (folder / "network_of_a_stranger.py").write_text(
        NETWORK.replace("def build():\n", "def build():\n    import torch\n    torch.manual_seed(0)\n")
    )
    return {
        "kind": "python", "path": "network_of_a_stranger:build", "folder": str(folder), "image_size": 32, **HALF
    }  # fmt: skip


KINDS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "hub": of_the_hub, "clip of transformers": of_transformers("CLIPModel"), "dinov2": of_transformers("Dinov2Model"),
    "timm": of_timm, "onnx": of_onnx, "python": of_python,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_from_anywhere_is_scanned(kind, local_ray, write_pictures, victim_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    victim = KINDS[kind](tmp_path, victim_folder)
    write_pictures(tmp_path / "shards", range(48), per_shard=24)
    write_pictures(tmp_path / "clean", range(100, 140), "calibration", per_shard=40)
    workers = {"cpus_per_worker": 0.5, "read_cpus": 0.5, "threads_per_worker": 1, "max_failures": 0}
    training = {
        "output": str(tmp_path / "run"), "workers": workers,
        "decoder": {"victim": victim, "shards": str(tmp_path / "shards"), "batch_size": 16, "epochs": 1},
        "embedding": {"min_actors": 1, "cpus_per_actor": 0.5, "decode_cpus": 0.5},
    }  # fmt: skip
    train(TrainConfig.model_validate(training))
    settings = {
        "shards": str(tmp_path / "shards"), "calibration": str(tmp_path / "clean"), "output": str(tmp_path / "scores"),
        "victim": victim, "reference": victim,
        "detectors": [
            {"kind": "dede", "decoder": str(tmp_path / "run" / "decoder")},
            {"kind": "density", "k": 3, "lid_k": 4},
        ],
        "decision": {"kind": "assumed_rate", "rate": 0.25},
        "resources": {"min_actors": 1, "cpus_per_actor": 0.5, "decode_cpus": 0.5},
    }  # fmt: skip
    manifest = score(ScoreConfig.model_validate(settings))
    assert manifest.info["victim"]["fingerprint"] == load_victim(victim).fingerprint
    assert manifest.info["counts"]["scored"] == 48
    assert len(manifest.flagged) == 12
    sift(SiftConfig(shards=settings["shards"], manifest=settings["output"], output=str(tmp_path / "kept")))
    assert count_samples(list_shards(str(tmp_path / "kept" / "*.tar"))) == 36
    if kind == "hub":
        assert manifest.info["victim"]["fingerprint"] == load_victim(victim_folder).fingerprint
