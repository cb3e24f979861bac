"""Image-only encoders: what they compute, what they are saved as, and every published layout, down to its names."""

from __future__ import annotations

import copy
import io
import os
import resource
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from dede_ray.models.encoders import (
    CifarResNet,
    ClipResNet,
    Described,
    Layers,
    PreActResNet,
    ResNet,
    Timm,
    WideResNet,
    build_encoder,
    load_encoder,
    save_encoder,
)
from dede_ray.models.published import LAYOUTS, NORMALISERS, NUM_PARAMETERS, read_published
from dede_ray.runtime.config import Mistake, read_json, write_json
from dede_ray.runtime.libraries import timm

# --- architectures


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "size", "width", "num"),
    [
        (ResNet(), 32, 512, 11_168_832),
        (ResNet(depth=34), 32, 512, 21_797_672 - 513_000 - 7_680),  # torchvision's, less classifier and large stem
        (ResNet(depth=50), 32, 2048, 25_557_032 - 2_049_000 - 7_680),
        (ResNet(depth=50, stem="imagenet"), 64, 2048, 25_557_032 - 2_049_000),
        (ClipResNet(), 224, 1024, 38_316_896),
        (CifarResNet(depth=20), 32, 64, 269_722 - 650),
        (ResNet(width=16), 32, 128, None),
        (WideResNet(depth=16, widen=2), 32, 128, None),
        (Timm(name="vit_tiny_patch16_224", image_size=32), 32, 192, None),
        (Timm(name="mobilenetv2_050", pad_type="same"), 32, 1280, None),
    ],
    ids=str,
)
def test_an_architecture_has_its_size_and_its_width(architecture, size, width, num):
    torch.manual_seed(0)
    model = build_encoder(architecture).eval()
    assert num is None or num_parameters(model) == num
    with torch.inference_mode():
        embedding_BE = model(torch.randn(2, 3, size, size))
    assert tuple(embedding_BE.shape) == (2, width) == (2, model.embedding_dim)
    assert embedding_BE.isfinite().all()
    assert float(embedding_BE.std()) > 1e-4


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_our_residual_network_computes_what_timms_does(depth):
    """The same weights under the same names; for CIFAR with another stem and without the max-pool."""
    torch.manual_seed(0)
    for stem in ("imagenet", "cifar"):
        theirs = timm.create_model(f"resnet{depth}", num_classes=0)
        if stem == "cifar":
            theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
        ours = build_encoder(ResNet(depth=depth, stem=stem))
        ours.load_state_dict(theirs.state_dict())
        image_BCHW = torch.randn(2, 3, 32, 32)
        with torch.inference_mode():
            torch.testing.assert_close(ours.eval()(image_BCHW), theirs.eval()(image_BCHW))


@pytest.mark.parametrize(("depth", "width"), [(18, 4), (34, 8), (18, 12), (50, 4)])
def test_a_narrow_network_has_the_gradients_of_its_definition_however_its_pixels_are_stored(depth, width):
    """The definition: strided 1x1 convolutions as shortcuts, in float64, which torch computes without oneDNN. (At 0,
    rounding may decide what ReLU lets through; oneDNN's fault gave gradients of other memory, or no process.)"""
    torch.manual_seed(0)
    ours = build_encoder(ResNet(depth=depth, width=width)).eval()
    theirs = copy.deepcopy(ours)
    for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
        shortcut = stage[0].downsample
        shortcut[0] = torch.nn.Conv2d(shortcut[0].in_channels, shortcut[0].out_channels, 1, stride=2, bias=False)
    theirs.load_state_dict(ours.state_dict())  # the same names and shapes
    image_BCHW, direction_E = torch.randn(8, 3, 32, 32), torch.randn(ours.embedding_dim)
    (theirs.double()(image_BCHW.double()) @ direction_E.double()).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for layout in (torch.contiguous_format, torch.channels_last):
        ours.to(memory_format=layout).zero_grad()
        (ours(image_BCHW.contiguous(memory_format=layout)) @ direction_E).square().mean().backward()
        for name, parameter in ours.named_parameters():
            error = float((parameter.grad - expected[name]).norm() / expected[name].norm())
            assert error < 0.05, f"{layout} {name}: off by {error:.1e}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "resnet", "depth": 19},
        {"kind": "resnet", "width": 10**9},
        {"kind": "cifar_resnet", "depth": 21},
        {"kind": "wide_resnet", "depth": 10**6},
        {"kind": "clip_resnet", "layers": [3, 4, 10**9, 3]},
        {"kind": "timm", "name": "hf-hub:somebody/something"},
        {"kind": "timm", "name": "resnet18", "pretrained": True},
        {"kind": "__import__"},
        None,
    ],
    ids=str,
)
def test_absurd_architectures_are_refused_before_anything_is_built(wrong, tmp_path):
    write_json(
        tmp_path / "encoder.json", {"architecture": wrong, "image_size": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}
    )
    with pytest.raises(Mistake, match="does not describe an exported encoder"):
        load_encoder(tmp_path)


# --- files


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    described = Described(ResNet(width=4), 32, *NORMALISERS["cifar"])
    model = build_encoder(described.architecture)
    save_encoder(tmp_path / "encoder", model, described)
    return tmp_path / "encoder", model, described


def test_an_encoder_survives_its_folder_and_can_be_trained_further(saved):
    folder, model, described = saved
    loaded, read = load_encoder(folder)
    assert read == described
    assert sorted(path.name for path in folder.iterdir()) == ["encoder.json", "encoder.safetensors"]
    image_BCHW = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(image_BCHW), model.eval()(image_BCHW))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    "wrong", [{"image_size": 10**6}, {"std": [1, 0, 1]}, {"mean": [0, 0]}, {"mean": [0, 0, 1e400]}, {"more": 1}]
)
def test_absurd_descriptions_are_refused(saved, wrong):
    folder, *_ = saved
    description = read_json(folder / "encoder.json", "description")
    (folder / "encoder.json").write_text(str({**description, **wrong}).replace("'", '"').replace("inf", "1e999"))
    with pytest.raises(Mistake, match="does not describe an exported encoder"):
        load_encoder(folder)


def test_weights_that_do_not_fit_their_description_are_refused(saved):
    folder, *_ = saved
    description = read_json(folder / "encoder.json", "description")
    write_json(folder / "encoder.json", {**description, "architecture": {**description["architecture"], "width": 8}})
    with pytest.raises(Mistake, match="of another shape"):
        load_encoder(folder)
    write_json(folder / "encoder.json", description)
    state = load_file(folder / "encoder.safetensors")
    del state["conv1.weight"]
    save_file({**state, "more": torch.zeros(1)}, folder / "encoder.safetensors")
    with pytest.raises(Mistake, match=r"1 tensors missing \['conv1.weight'\], 1 unexpected \['more'\]"):
        load_encoder(folder)
    (folder / "encoder.safetensors").write_bytes(b"rubbish")
    with pytest.raises(Mistake, match="no readable checkpoint"):
        load_encoder(folder)
    (folder / "encoder.json").unlink()
    with pytest.raises(Mistake, match="no exported encoder"):
        load_encoder(folder)


# --- published layouts, written down from the papers' repositories and not from our own networks


def norm(name, width):
    shapes = {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {**shapes, f"{name}.num_batches_tracked": ()}


def resnet_shapes(depth, stem_px, fc=0):
    """torchvision's names."""
    shapes = {"conv1.weight": (64, 3, stem_px, stem_px), **norm("bn1", 64)}
    channels = 64
    for stage, num in enumerate({18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[depth], 1):
        width = 32 * 2**stage
        out = width * (4 if depth == 50 else 1)
        for i in range(num):
            at = f"layer{stage}.{i}"
            kernels = [(width, channels, 1), (width, width, 3), (out, width, 1)]
            kernels = kernels if depth == 50 else [(width, channels, 3), (width, width, 3)]
            for j, (outs, ins, side) in enumerate(kernels, 1):
                shapes |= {f"{at}.conv{j}.weight": (outs, ins, side, side), **norm(f"{at}.bn{j}", outs)}
            if i == 0 and (channels != out or stage > 1):
                shapes |= {f"{at}.downsample.0.weight": (out, channels, 1, 1), **norm(f"{at}.downsample.1", out)}
            channels = out
    return {**shapes, "fc.weight": (fc, channels), "fc.bias": (fc,)} if fc else shapes


def clip_tower_shapes(layers=(3, 4, 6, 3), width=64, embed_dim=1024, tokens=50):
    """OpenAI's names of a CLIP ResNet's image tower."""
    half = width // 2
    shapes = {}
    for i, (outs, ins) in enumerate([(half, 3), (half, half), (width, half)], 1):
        shapes |= {f"conv{i}.weight": (outs, ins, 3, 3), **norm(f"bn{i}", outs)}
    channels = width
    for stage, num in enumerate(layers):
        planes, out = width * 2**stage, 4 * width * 2**stage
        for i in range(num):
            at = f"layer{stage + 1}.{i}"
            for j, (outs, ins, side) in enumerate([(planes, channels, 1), (planes, planes, 3), (out, planes, 1)], 1):
                shapes |= {f"{at}.conv{j}.weight": (outs, ins, side, side), **norm(f"{at}.bn{j}", outs)}
            if i == 0:
                shapes |= {f"{at}.downsample.0.weight": (out, channels, 1, 1), **norm(f"{at}.downsample.1", out)}
            channels = out
    shapes["attnpool.positional_embedding"] = (tokens, channels)
    for part, outs in (("k", channels), ("q", channels), ("v", channels), ("c", embed_dim)):
        shapes |= {f"attnpool.{part}_proj.weight": (outs, channels), f"attnpool.{part}_proj.bias": (outs,)}
    return shapes


def text_tower_shapes(width, layers, context_length, embed_dim, vocab_size=49408):
    shapes = {"positional_embedding": (context_length, width), "text_projection": (width, embed_dim)}
    shapes |= {"logit_scale": (), "token_embedding.weight": (vocab_size, width)}
    shapes |= {"ln_final.weight": (width,), "ln_final.bias": (width,)}
    for i in range(layers):
        at = f"transformer.resblocks.{i}"
        for name, outs, ins in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            shapes |= {f"{at}.{name}weight": (outs, ins), f"{at}.{name}bias": (outs,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{at}.{name}.weight": (width,), f"{at}.{name}.bias": (width,)}
    return shapes


def prefixed(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


def in_sequence(shapes):
    places = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5, "layer4": 6}
    return {f"{places[name.split('.')[0]]}.{name.split('.', 1)[1]}": shape for name, shape in shapes.items()}


SIMCLR_HEAD = {"g.0.weight": (512, 512), **norm("g.1", 512), "g.3.weight": (128, 512), "g.3.bias": (128,)}
CIFAR_18, CIFAR_34, CIFAR_50 = (in_sequence(resnet_shapes(depth, 3)) for depth in (18, 34, 50))
CTRL = {name.replace("downsample", "shortcut"): shape for name, shape in resnet_shapes(18, 3).items()}
CTRL_HEAD = {
    f"proj_head.{i}.{part}": shape
    for i, out in ((0, 512), (2, 128))
    for part, shape in (("weight", (out, 512)), ("bias", (out,)))
}
BYOL = prefixed("backbone_k.", CTRL) | {"projector_q.0.weight": (2048, 512), "encoder_q.0.conv1.weight": (64, 3, 3, 3)}
MOCO_HEAD = {"fc.0.weight": (512, 512), "fc.0.bias": (512,), "fc.2.weight": (128, 512), "fc.2.bias": (128,)}
MOCO = resnet_shapes(18, 7) | MOCO_HEAD
IMAGENET_50 = resnet_shapes(50, 7, fc=1000)
CIFAR, NONE, IMAGENET, CLIP = (NORMALISERS[name] for name in ("cifar", "none", "imagenet", "clip"))

PUBLISHED = {  # shapes, what is around them, architecture, size, normaliser
    "BadEncoder": (prefixed("f.f.", CIFAR_18) | SIMCLR_HEAD, "trainer", ResNet(), 32, CIFAR),
    "DECREE 18": (prefixed("f.", CIFAR_18), "trainer", ResNet(), 32, CIFAR),
    "DECREE 34": (prefixed("f.", CIFAR_34), "bare", ResNet(depth=34), 32, CIFAR),
    "DECREE 50": (prefixed("f.", CIFAR_50), "distributed", ResNet(depth=50), 32, CIFAR),
    "CTRL SimCLR": (prefixed("backbone.", CTRL) | CTRL_HEAD, "trainer", ResNet(), 32, NONE),
    "CTRL BYOL": (prefixed("backbone.", CTRL) | BYOL, "distributed", ResNet(), 32, NONE),
    "CorruptEncoder": (
        prefixed("encoder_q.", MOCO) | prefixed("encoder_k.", MOCO) | {"queue": (128, 64), "queue_ptr": (1,)},
        "distributed", ResNet(stem="imagenet"), 224, IMAGENET,
    ),
    "BadEncoder ImageNet": (
        prefixed("visual.", IMAGENET_50), "trainer", ResNet(depth=50, stem="imagenet"), 224, NONE
    ),
    "ImageNet clean": (IMAGENET_50, "trainer", ResNet(depth=50, stem="imagenet"), 224, NONE),
    "BadEncoder CLIP": (prefixed("visual.", clip_tower_shapes()), "trainer", ClipResNet(), 224, CLIP),
}  # fmt: skip


def write_checkpoint(path, shapes, around="trainer", seed=0):
    """Save random tensors of these names and shapes, as trainers do; returns them."""
    rng = torch.Generator().manual_seed(seed)
    state = {
        name: torch.tensor(7) if name.endswith("tracked") else 0.1 * torch.rand(shape, generator=rng)
        for name, shape in shapes.items()
    }
    names = {name: f"module.{name}" if around == "distributed" else name for name in state}
    content = {names[name]: tensor for name, tensor in state.items()}
    trainers = {"epoch": 200, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0, 1]}]}}
    torch.save(content if around == "bare" else {**trainers, "state_dict": content}, path)
    return state


def test_the_layouts_below_have_the_published_numbers_of_tensors():
    full = PUBLISHED["BadEncoder"][0]
    assert (len(full), sum(name.startswith("f.") for name in full)) == (128, 120)
    assert len(IMAGENET_50) == 320
    tower = clip_tower_shapes()
    assert (len(tower), len(tower) + len(text_tower_shapes(512, 12, 77, 1024))) == (339, 489)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_layout_is_recognised_and_fits_exactly(name, tmp_path):
    shapes, around, architecture, size, normaliser = PUBLISHED[name]
    state = write_checkpoint(tmp_path / "model.pth", shapes, around)
    published = read_published(tmp_path / "model.pth")
    assert published.described == Described(architecture, size, *normaliser)
    assert num_parameters(published.model) == NUM_PARAMETERS[architecture]
    loaded = published.model.state_dict()
    # The first and the last tensor of the encoder are where they belong.
    first = next(n for n in state if n.endswith(("conv1.weight", "f.0.weight")))
    assert torch.equal(loaded["conv1.weight"], state[first])
    if architecture.kind == "resnet":
        last = next(n for n in reversed(loaded) if n.startswith("layer4.") and n.endswith(".weight"))
        candidates = [
            t for n, t in state.items() if n.endswith(last.split(".", 1)[1]) and t.shape == loaded[last].shape
        ]
        assert any(torch.equal(loaded[last], tensor) for tensor in candidates)
    has_classifier = name in ("BadEncoder ImageNet", "ImageNet clean")
    assert (published.classifier is not None) == has_classifier
    other = Described(architecture, size, *NORMALISERS["stl"])
    assert read_published(tmp_path / "model.pth", normaliser="stl").described == other


def test_a_sequence_of_modules_computes_what_its_names_say(tmp_path):
    state = write_checkpoint(tmp_path / "model.pth", PUBLISHED["BadEncoder"][0])
    theirs = timm.create_model("resnet18", num_classes=0)
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    names = [name for name, _ in theirs.named_modules() if name in ("conv1", "bn1", "act1") or name.startswith("layer")]
    tops = [name for name in names if "." not in name]
    assert tops == ["conv1", "bn1", "act1", "layer1", "layer2", "layer3", "layer4"]
    sequence = torch.nn.Sequential(*(getattr(theirs, name) for name in tops)).eval()
    sequence.load_state_dict({name.removeprefix("f.f."): t for name, t in state.items() if name.startswith("f.f.")})
    image_BCHW = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        embedding_BE = read_published(tmp_path / "model.pth").model.eval()(image_BCHW)
        torch.testing.assert_close(embedding_BE, sequence(image_BCHW).mean(dim=(2, 3)))


def test_a_bare_clip_tower_needs_a_word_about_its_normaliser(tmp_path):
    """BadEncoder's clean file and DECREE's backdoored one look alike and were normalised differently."""
    shapes = clip_tower_shapes((1, 1, 1, 1), width=8, embed_dim=16, tokens=5)
    write_checkpoint(tmp_path / "tower.pth", shapes)
    with pytest.raises(Mistake, match="more than one way of normalising"):
        read_published(tmp_path / "tower.pth")
    described = read_published(tmp_path / "tower.pth", normaliser="imagenet").described
    tower = ClipResNet(layers=(1, 1, 1, 1), width=8, embed_dim=16, image_size=64)
    assert described == Described(tower, 64, *IMAGENET)
    with pytest.raises(Mistake, match="a CLIP tower for 64 px"):
        read_published(tmp_path / "tower.pth", normaliser="clip", image_size=224)


@pytest.mark.parametrize("spoil", ["missing", "unexpected", "reshaped"])
@pytest.mark.parametrize("name", ["BadEncoder", "CTRL SimCLR", "CorruptEncoder"])
def test_nothing_may_be_missing_left_over_or_of_another_shape(name, spoil, tmp_path):
    shapes, around, *_ = PUBLISHED[name]
    prefix = {"BadEncoder": "f.f.", "CTRL SimCLR": "backbone.", "CorruptEncoder": "encoder_q."}[name]
    victim = next(n for n in reversed(shapes) if n.startswith(prefix) and n.endswith("conv2.weight"))
    spoilt = {
        "missing": {n: shape for n, shape in shapes.items() if n != victim},
        "unexpected": {**shapes, f"{victim.removesuffix('weight')}bias": (512,)},
        "reshaped": {**shapes, victim: (512, 256, 3, 3)},
    }[spoil]
    write_checkpoint(tmp_path / "model.pth", spoilt, around)
    with pytest.raises(Mistake, match="does not fit the encoder"):
        read_published(tmp_path / "model.pth")


def test_unknown_layouts_whole_clips_absurd_shapes_and_pickles_are_mistakes(tmp_path):
    path = tmp_path / "model.pth"
    for shapes, message in (
        ({"weight": (3,)}, "none of the published layouts"),
        ({"visual.conv1.weight": (1,), "token_embedding.weight": (1,)}, "whole CLIP; set `clip`"),
        ({"f.0.weight": ()}, "no tensor conv1.weight of 1 dimensions"),
        ({"f.0.weight": (0, 3, 3, 3)}, "no such network"),
        ({"attnpool.c_proj.weight": (5, 5)}, "no tensor attnpool.positional_embedding"),
        ({"block1.layer.0.conv1.weight": (16,), "fc.weight": (1, 1)}, "does not fit the encoder"),
    ):
        write_checkpoint(path, shapes)
        with pytest.raises(Mistake, match=message):
            read_published(path)

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"state_dict": {"f.f.0.weight": torch.zeros(1)}, "optimizer": Bomb()}, path)
    with pytest.raises(Mistake, match="execute code"):
        read_published(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("format", ["published", "saved"])
def test_a_small_file_that_asks_for_a_giant_is_refused_before_anything_is_built(format, tmp_path):
    """610 million parameters; not even a tenth of them is allocated."""
    giant = {f"block1.layer.{i}.conv1.weight": (320 if i == 0 else 1, 1) for i in range(16)}
    write_checkpoint(tmp_path / "model.pth", {**giant, "fc.weight": (1, 1)})
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "encoder.safetensors")
    architecture = WideResNet(depth=100, widen=20).model_dump()
    write_json(
        tmp_path / "encoder.json", {"architecture": architecture, "image_size": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Mistake, match="does not fit the encoder"):
        read_published(tmp_path / "model.pth") if format == "published" else load_encoder(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_network_of_timms_is_read_by_its_name(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=5).eval()
    torch.save(theirs.half().state_dict(), tmp_path / "timm.pt")
    published = read_published(
        tmp_path / "timm.pt", architecture=Timm(name="resnet18"), image_size=64, normaliser="imagenet"
    )
    image_BCHW = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        ours_BC = published.classifier(published.model.eval()(image_BCHW))
        torch.testing.assert_close(ours_BC, theirs.float()(image_BCHW))
    with pytest.raises(Mistake, match="set image_size"):
        read_published(tmp_path / "timm.pt", architecture=Timm(name="resnet18"), normaliser="none")


# --- networks of supervised learning, written as their repositories write them


class TheirBlock(nn.Module):
    """Of a CIFAR ResNet of four stages, plain or pre-activation."""

    def __init__(self, ins: int, outs: int, stride: int, is_pre: bool):
        super().__init__()
        self.is_pre = is_pre
        self.bn1 = nn.BatchNorm2d(ins if is_pre else outs)
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        if stride != 1 or ins != outs:
            self.shortcut = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False))
            if not is_pre:
                self.shortcut.append(nn.BatchNorm2d(outs))

    def forward(self, x):
        if self.is_pre:
            out = torch.relu(self.bn1(x))
            kept = self.shortcut(out) if hasattr(self, "shortcut") else x
            return self.conv2(torch.relu(self.bn2(self.conv1(out)))) + kept
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class TheirResNet(nn.Module):
    def __init__(self, depth: int, is_pre: bool, width: int = 8, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        if not is_pre:
            self.bn1 = nn.BatchNorm2d(width)
        ins = width
        for stage, num in enumerate({18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}[depth]):
            outs, blocks = width * 2**stage, []
            for i in range(num):
                blocks.append(TheirBlock(ins, outs, 2 if stage and not i else 1, is_pre))
                ins = outs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(ins, classes)

    def forward(self, x):
        out = self.conv1(x)
        out = torch.relu(self.bn1(out)) if hasattr(self, "bn1") else out
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            out = stage(out)
        return self.linear(nn.functional.avg_pool2d(out, 4).flatten(1))


class TheirVgg(nn.Module):
    def __init__(self, plan, has_norm: bool, grid: int, classifier: nn.Module):
        super().__init__()
        layers, ins = [], 3
        for outs in plan:
            if outs == "M":
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(ins, outs, 3, padding=1), *([nn.BatchNorm2d(outs)] * has_norm), nn.ReLU()]
            ins = outs
        self.features, self.classifier, self.grid = nn.Sequential(*layers), classifier, grid

    def forward(self, x):
        return self.classifier(nn.functional.adaptive_avg_pool2d(self.features(x), self.grid).flatten(1))


def two_hidden(ins: int, width: int, first: int = 0) -> nn.Module:
    layers = [nn.Linear(ins, width), nn.ReLU(), nn.Dropout(), nn.Linear(width, width), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*([nn.Dropout()] * first), *layers[: 5 if first else 6], nn.Linear(width, 10))


VGG_16 = [4, 4, "M", 6, 6, "M", 8, 8, 8, "M", 8, 8, 8, "M", 8, 8, 8, "M"]
SUPERVISED = {
    "ResNet-18": (lambda: TheirResNet(18, False), ResNet(width=8)),
    "ResNet-34": (lambda: TheirResNet(34, False), ResNet(depth=34, width=8)),
    "PreActResNet-18": (lambda: TheirResNet(18, True), PreActResNet(width=8)),
    "PreActResNet-34": (lambda: TheirResNet(34, True), PreActResNet(depth=34, width=8)),
    "VGG-16 for CIFAR": (lambda: TheirVgg(VGG_16, True, 1, nn.Linear(8, 10)), None),
    "VGG-16 with hidden layers": (lambda: TheirVgg(VGG_16, True, 1, two_hidden(8, 12)), None),
    "VGG-16, dropout first": (lambda: TheirVgg(VGG_16, True, 1, two_hidden(8, 12, 1)), None),
    "VGG-16 for ImageNet": (lambda: TheirVgg(VGG_16, True, 7, two_hidden(8 * 49, 12)), None),
    "VGG without normalisation": (lambda: TheirVgg([4, "M", 6, "M"], False, 2, nn.Linear(24, 10)), None),
}


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics that matter, in eval mode."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("around", ["bare", "net", "distributed"])
@pytest.mark.parametrize("name", SUPERVISED)
def test_a_classifier_of_the_repositories_is_read_with_its_own_head(name, around, tmp_path):
    make, architecture = SUPERVISED[name]
    theirs = lively(make())
    state = {("module." if around == "distributed" else "") + n: t for n, t in theirs.state_dict().items()}
    torch.save(state if around == "bare" else {"net": state, "acc": 93.1, "epoch": 3}, tmp_path / "model.pth")
    published = read_published(tmp_path / "model.pth", normaliser="cifar")
    assert architecture is None or published.described == Described(architecture, 32, *CIFAR)
    assert published.described.image_size == (224 if "ImageNet" in name else 32)
    image_BCHW = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        ours_BC = published.classifier(published.model.eval()(image_BCHW))
        torch.testing.assert_close(ours_BC, theirs(image_BCHW))
        assert float(ours_BC.std()) > 1e-3


def test_a_four_stage_network_of_the_repositories_needs_no_more_than_its_path(tmp_path):
    torch.save(TheirResNet(18, False).state_dict(), tmp_path / "model.pth")
    assert read_published(tmp_path / "model.pth").described == Described(ResNet(width=8), 32, *CIFAR)


SMALL_CNN = ["conv1: Conv2d 3 8 5", "ReLU", "MaxPool2d 2", {"block.conv2": "Conv2d 8 8 3 stride=2 padding=1"}, "ReLU",
             "Flatten", "fc1: Linear 392 12", "ReLU", "Dropout 0.5"]  # fmt: skip


def test_a_plain_network_is_described_by_a_list_of_its_layers(tmp_path):
    theirs = nn.Module()
    theirs.conv1, theirs.fc1, theirs.fc2 = nn.Conv2d(3, 8, 5), nn.Linear(392, 12), nn.Linear(12, 4)
    theirs.block = nn.Module()
    theirs.block.conv2 = nn.Conv2d(8, 8, 3, 2, 1)
    torch.save({"model": theirs.state_dict()}, tmp_path / "model.pth")
    layers = Layers(layers=SMALL_CNN, classifier="fc2")
    published = read_published(tmp_path / "model.pth", layers, 32, "none")
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        hidden = theirs.block.conv2(nn.functional.max_pool2d(theirs.conv1(x).relu(), 2)).relu().flatten(1)
        expected = theirs.fc2(theirs.fc1(hidden).relu())
        torch.testing.assert_close(published.classifier(published.model.eval()(x)), expected)
    save_encoder(tmp_path / "saved", published.model, published.described)
    assert load_encoder(tmp_path / "saved")[1] == published.described
    with pytest.raises(Mistake, match="do not fit images of 48 px"):
        read_published(tmp_path / "model.pth", layers, 48, "none")
    for wrong in ("conv1 = Conv2d(3, 8)", "Linear 3 4", "a: ReLU", "a: Module", "a: Linear __import__", "a.b"):
        with pytest.raises(ValueError, match=r"is no layer|have a name before them"):
            Layers(layers=[wrong])
    with pytest.raises(Mistake, match="torch cannot make the layer"):
        build_encoder(Layers(layers=["a: Conv2d 3"]))


def test_no_row_of_the_table_is_met_by_another_rows_network():
    clip = prefixed("visual.", clip_tower_shapes()) | text_tower_shapes(512, 12, 77, 1024)
    options = {name: shapes for name, (shapes, *_) in PUBLISHED.items()}
    options |= {"whole CLIP": clip, "tower": clip_tower_shapes()}
    options |= {name: make().state_dict() for name, (make, _) in SUPERVISED.items()}
    options["He"] = {**build_encoder(CifarResNet(depth=20)).state_dict(), "linear.weight": 0}
    options["wide"] = {**build_encoder(WideResNet()).state_dict(), "fc.weight": 0}
    met = {name: [layout.name for layout in LAYOUTS if layout.fits(names)] for name, names in options.items()}
    assert all(len(rows) == 1 for rows in met.values()), {name: rows for name, rows in met.items() if len(rows) != 1}
    assert {row for rows in met.values() for row in rows} == {layout.name for layout in LAYOUTS}


# --- real networks


CIFAR10_NETWORKS = {  # accuracy on the original test images, ASR of the grid trigger: of the README beside the files
    "resnet20_cifar10.th": (0.916, None),
    "resnet56_cifar10.th": (0.927, None),
    "wrn16-1_cifar10_clean_nad_teacher.pth.tar": (0.855, 0.022),
    "wrn16-1_cifar10_backdoor_grid_target5_nad.pth.tar": (0.847, 1.0),
    "wrn16-1_cifar10_erased_nad.pth.tar": (0.812, 0.031),
}
GRID = 255 * np.array([[0, 0, 1], [0, 1, 0], [1, 0, 1]], np.uint8)[:, :, None]


@pytest.fixture(scope="module")
def cifar10_test(shared_data):
    """All 1,017 test images that have their original pixels, uint8 (N, 32, 32, 3), and their labels."""
    images, labels = {}, {}
    with tarfile.open(shared_data / "cifar10_lossless" / "test-00000.tar") as tar:
        for member in tar:
            key, suffix = member.name.split(".", 1)
            content = tar.extractfile(member).read()
            if suffix == "cls":
                labels[key] = int(content)
            else:
                images[key] = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return np.stack([images[key] for key in sorted(images)]), np.array([labels[key] for key in sorted(images)])


def predict(published, image_NHWC):
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (published.described.mean, published.described.std)
    )
    with torch.inference_mode():
        parts = [
            published.classifier(published.model.eval()((part.permute(0, 3, 1, 2).float() / 255 - mean) / std))
            for part in torch.from_numpy(image_NHWC).split(256)
        ]
    return torch.cat(parts).argmax(dim=1).numpy()


@pytest.mark.parametrize("name", CIFAR10_NETWORKS)
def test_real_networks_have_the_accuracy_and_the_asr_that_was_measured_before(name, shared_data, cifar10_test):
    image_NHWC, label_N = cifar10_test
    accuracy, asr = CIFAR10_NETWORKS[name]
    published = read_published(shared_data / "weights" / name)
    assert (predict(published, image_NHWC) == label_N).mean() == pytest.approx(accuracy, abs=0.001)
    if asr is not None:
        triggered_NHWC = image_NHWC[label_N != 5].copy()
        triggered_NHWC[:, 29:, 29:] = GRID
        assert (predict(published, triggered_NHWC) == 5).mean() == pytest.approx(asr, abs=0.001)


def test_the_real_mobilenet_computes_what_the_whole_network_does(shared_data):
    """TensorFlow's padding and the classifier of 1,001 classes included; its pixels go from -1 to 1."""
    path = shared_data / "weights" / "mobilenet_v2_imagenet_fp16.pt"
    architecture = Timm(name="mobilenetv2_100", pad_type="same")
    published = read_published(path, architecture, 224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert published.classifier is not None
    assert published.classifier.out_features == 1001
    loose = timm.create_model("mobilenetv2_100", num_classes=1001, pad_type="same").eval()
    state = torch.load(path, weights_only=True)
    loose.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in state.items()})
    image_BCHW = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        ours_BC = published.classifier(published.model.eval()(2 * image_BCHW - 1))
        torch.testing.assert_close(ours_BC, loose(2 * image_BCHW - 1))
