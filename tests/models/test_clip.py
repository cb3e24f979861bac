"""CLIP models: what open_clip can name, load and read, ours can; and training options change what they say, no more."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dede_ray.models import clip
from dede_ray.runtime.config import Mistake, write_json
from dede_ray.runtime.libraries import open_clip

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TIMM_RESNET = {"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
SIGLIP = {
    "embed_dim": 192,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
}


def described(vision: dict[str, Any] = VIT, text: dict[str, Any] = TEXT, **others: Any) -> dict[str, Any]:
    return {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **others}, "preprocess_cfg": {}}


def build(seed: int = 0, about: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(seed)
    return clip.build_clip(about or described(), **options)


def batch_for(model: Any, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    image_px = model.visual.image_size
    side = image_px if isinstance(image_px, int) else image_px[0]
    image_BCHW = torch.randn(size, 3, side, side, generator=rng)
    return image_BCHW, open_clip.SimpleTokenizer(context_length=8)([f"picture {i}" for i in range(size)])


def embeddings(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    image_BCHW, tokens_BT = batch_for(model.eval())
    with torch.inference_mode():
        return model.encode_image(image_BCHW), model.encode_text(tokens_BT)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name].reshape(-1), other[name].reshape(-1), rtol=0, atol=0, msg=name)


# --- names


def test_every_open_clip_name_is_a_description():
    for name in open_clip.list_models():
        assert clip.model_description(name)["model_cfg"] == open_clip.get_model_config(name), name
    assert clip.model_description("ViT-B/32") == clip.model_description("ViT-B-32")  # OpenAI's way to write it


@pytest.mark.parametrize(
    ("wrong", "meant"), [("vit-b-32", "ViT-B-32"), ("vit_l_14", "ViT-L-14"), ("RN5O", "RN50"), ("siglip-vit", "")]
)
def test_the_nearest_names_are_offered_for_an_unknown_one(wrong, meant):
    with pytest.raises(Mistake, match=f"no CLIP architecture '{wrong}'") as mistake:
        clip.model_description(wrong)
    assert f"did you mean {meant}" in str(mistake.value) if meant else "did you mean" not in str(mistake.value)


def test_a_model_config_may_stand_alone_or_in_an_exported_one(tmp_path):
    write_json(tmp_path / "alone.json", described()["model_cfg"])
    write_json(tmp_path / "open_clip_config.json", described())
    for name in ("alone.json", "open_clip_config.json", ""):
        assert clip.model_description(str(tmp_path / name)) == described()
    assert clip.model_description(f"local-dir:{tmp_path}") == described()


def test_what_open_clip_cannot_build_is_a_mistake():
    for vision in ({**VIT, "patches": 3}, {**TIMM_RESNET, "timm_model_name": "resnet19"}):
        with pytest.raises(Mistake, match="open_clip cannot build a model"):
            build(about=described(vision))


# --- weights


def test_the_same_weights_load_from_every_kind_of_file(tmp_path):
    model = build()
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    clip.save_clip(tmp_path / "export", model, described())
    save_file(state, tmp_path / "bare.safetensors")
    torch.save(state, tmp_path / "bare.pt")
    openai = {"input_resolution": 32, "context_length": 8, "vocab_size": 49408}
    torch.save({**state, **{k: torch.tensor(v) for k, v in openai.items()}}, tmp_path / "openai.pt")
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": optimizer, "scaler": {"scale": 65536.0}},
        tmp_path / "epoch_3.pt",
    )
    names = ["export", "export/open_clip_model.safetensors", "bare.safetensors", "bare.pt", "openai.pt", "epoch_3.pt"]
    for init in [*(tmp_path / name for name in names), f"local-dir:{tmp_path / 'export'}"]:
        other = build(seed=1)
        clip.load_clip_weights(other, init)
        assert_same(other.state_dict(), state)


def test_position_embeddings_of_another_size_are_interpolated_as_open_clip_does(tmp_path):
    larger = described({**VIT, "image_size": 64}, {**TEXT, "context_length": 12})
    state = {name: tensor.detach() for name, tensor in build().state_dict().items()}
    torch.save(state, tmp_path / "small.pt")
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.pt")
    theirs, ours, half = build(1, larger), build(2, larger), build(3, larger)
    open_clip.load_checkpoint(theirs, str(tmp_path / "small.pt"))
    clip.load_clip_weights(ours, tmp_path / "small.pt")
    assert_same(ours.state_dict(), theirs.state_dict())
    assert ours.visual.positional_embedding.shape == (65, 32)
    assert ours.positional_embedding.shape == (12, 16)
    clip.load_clip_weights(half, tmp_path / "half.pt")
    torch.testing.assert_close(half.visual.positional_embedding, ours.visual.positional_embedding, rtol=0, atol=2e-3)


@pytest.mark.parametrize("more", [{"custom_text": True}, {"custom_text": True, "init_logit_bias": -10}])
def test_a_plain_clip_loads_into_other_layouts_as_open_clip_does(more, tmp_path):
    clip.save_clip(tmp_path, build(), described())
    theirs, ours = build(1, described(**more)), build(2, described(**more))
    open_clip.load_checkpoint(theirs, str(tmp_path / clip.WEIGHTS_FILE))
    clip.load_clip_weights(ours, tmp_path)
    assert_same(ours.state_dict(), theirs.state_dict())


def test_a_checkpoint_of_another_model_is_told_apart_and_its_architecture_offered(tmp_path):
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, tmp_path / "b32.pt")
    with pytest.raises(Mistake) as mistake:
        clip.load_clip_weights(build(), tmp_path / "b32.pt")
    message = str(mistake.value)
    assert "the checkpoint's embed_dim is 512, the model's 16; " in message
    assert "the checkpoint's patch size is 32, the model's 8; " in message
    assert "'transformer.resblocks.10.attn.in_proj_bias'" in message
    assert "trained with (ViT-B-32 or ViT-B-32-256 or ViT-B-32-quickgelu would fit)" in message
    clip.save_clip(tmp_path / "resnet", build(about=described(RESNET)), described(RESNET))
    with pytest.raises(Mistake, match=r"image layers is \[1, 1, 1, 1\], the model's 2;") as mistake:
        clip.load_clip_weights(build(), tmp_path / "resnet")
    assert "would fit" not in str(mistake.value)


# --- export


@pytest.mark.parametrize(
    "about", [described(RESNET), described(VIT), {"model_cfg": SIGLIP}], ids=["rn", "vit", "siglip"]
)
def test_plain_open_clip_loads_an_export_by_folder_and_by_name(about, tmp_path, monkeypatch):
    model = build(about=about)
    with torch.no_grad():
        model.logit_scale.fill_(3.5)
        model(*batch_for(model.train()))  # BatchNorm statistics of its own
    clip.save_clip(tmp_path, model, about)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    (tmp_path / "configs").mkdir()
    write_json(tmp_path / "configs" / "mine.json", about["model_cfg"])
    open_clip.add_model_config(tmp_path / "configs")
    theirs = [
        open_clip.create_model(f"local-dir:{tmp_path}"),
        open_clip.create_model("mine", pretrained=str(tmp_path / clip.WEIGHTS_FILE)),
    ]
    ours = clip.build_clip(clip.model_description(str(tmp_path)))
    clip.load_clip_weights(ours, tmp_path)
    for other in [*theirs, ours]:
        torch.testing.assert_close(embeddings(other), embeddings(model), rtol=1e-5, atol=1e-5)
        assert float(other.logit_scale.detach()) == 3.5
        assert (other.logit_bias is None) == (model.logit_bias is None)
    assert theirs[0].logit_scale.shape == ()


# --- locked towers


@pytest.mark.parametrize(
    ("vision", "free"),
    [(VIT, []), (RESNET, []), (TIMM_RESNET, ["head.proj.weight"])],  # open_clip trains the projection it adds to timm's
    ids=["vit", "resnet", "timm_resnet"],
)
@pytest.mark.parametrize("custom_text", [False, True])
def test_a_training_step_leaves_locked_towers_as_they_were(vision, free, custom_text, tmp_path):
    model = build(about=described(vision, custom_text=custom_text)).train()
    clip.lock_towers(model, clip.ImageLock(), clip.TextLock(unlocked_layers=1))
    learn = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.removeprefix("text.") for name in learn} == {
        "logit_scale", "text_projection", *(f"visual.{name}" for name in free)
    }  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image_BE, text_BE, scale = model(*batch_for(model))
    (scale * (image_BE * text_BE).sum()).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == learn
    # Frozen BatchNorm layers are other modules with fewer buffers: the export must still load everywhere.
    about = described(vision, custom_text=custom_text)
    clip.save_clip(tmp_path, model, about)
    ours = build(1, about)
    clip.load_clip_weights(ours, tmp_path)
    for other in (ours, open_clip.create_model(f"local-dir:{tmp_path}")):
        torch.testing.assert_close(embeddings(other), embeddings(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vision", [RESNET, TIMM_RESNET], ids=["resnet", "timm_resnet"])
def test_batch_norm_of_a_locked_tower_goes_on_counting_where_it_is_not_frozen(vision):
    model = build(about=described(vision)).train()
    clip.lock_towers(model, clip.ImageLock(freeze_batch_norm=False), None)
    before = {name: tensor.clone() for name, tensor in model.named_buffers() if name.endswith("running_mean")}
    model(*batch_for(model))
    assert before
    assert not any(torch.equal(dict(model.named_buffers())[name], tensor) for name, tensor in before.items())


def test_a_locked_models_weights_load_into_a_locked_model(tmp_path):
    model, other = build(about=described(RESNET)), build(1, described(RESNET))
    clip.save_clip(tmp_path, model, described(RESNET))
    clip.lock_towers(other, clip.ImageLock(), None)
    clip.load_clip_weights(other, tmp_path)
    torch.testing.assert_close(embeddings(other), embeddings(model), rtol=1e-5, atol=1e-5)


def test_unlocked_groups_are_the_last_ones():
    vit, resnet = build(about=described(VIT)), build(about=described(TIMM_RESNET))
    clip.lock_towers(vit, clip.ImageLock(unlocked_groups=2), None)
    clip.lock_towers(resnet, clip.ImageLock(unlocked_groups=1), None)
    learn = [{n.split(".")[0] for n, p in vit.visual.named_parameters() if p.requires_grad}, set()]
    learn[1] = {".".join(n.split(".")[:3]) for n, p in resnet.visual.named_parameters() if p.requires_grad}
    assert learn == [{"proj", "transformer", "ln_post"}, {"trunk.layer4.1", "head.proj.weight"}]
    assert all(p.requires_grad for p in vit.transformer.parameters())  # the text tower was not named


@pytest.mark.parametrize(
    ("vision", "image", "text", "why"),
    [
        (RESNET, clip.ImageLock(unlocked_groups=1), None, "partial locking not currently supported"),
        (VIT, clip.ImageLock(unlocked_groups=50), None, "leaves nothing of the image tower locked"),
        (VIT, None, clip.TextLock(unlocked_layers=50), "leaves nothing of the text tower locked"),
        (VIT, None, clip.TextLock(freeze_layer_norm=False), "Unfreezing LayerNorm is not supported"),
        ({**TIMM_RESNET, "timm_model_name": "efficientnet_lite0"}, clip.ImageLock(), None, "freeze_batch_norm: false"),
    ],
)
def test_a_lock_that_a_tower_does_not_support_is_a_mistake(vision, image, text, why):
    with pytest.raises(Mistake, match=why):
        clip.lock_towers(build(about=described(vision)), image, text)


# --- patch dropout, gradient checkpointing, compilation


def gradients(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    image_BE, text_BE, scale = model(*batch_for(model.train()))
    torch.nn.functional.cross_entropy(scale * image_BE @ text_BE.T, torch.arange(len(image_BE))).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_patch_dropout_leaves_out_patches_in_training_only_and_is_not_exported(tmp_path):
    about = described()
    model = build(about=about, patch_dropout=0.75)
    lengths: list[int] = []
    model.visual.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    image_BCHW, _ = batch_for(model)
    one, other = model.train().encode_image(image_BCHW), model.encode_image(image_BCHW)
    assert not torch.allclose(one, other)
    model.eval().encode_image(image_BCHW)
    assert lengths == [1 + 4, 1 + 4, 1 + 16]
    torch.testing.assert_close(embeddings(model), embeddings(build(about=about)), rtol=0, atol=0)
    clip.save_clip(tmp_path, model, about)
    assert "patch_drop" not in (tmp_path / clip.CONFIG_FILE).read_text()
    assert about == described()


def test_patch_dropout_reaches_timms_vision_transformers_too():
    model = build(about={"model_cfg": SIGLIP}, patch_dropout=0.5)
    lengths: list[int] = []
    model.visual.trunk.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    model.train().encode_image(batch_for(model)[0])
    assert lengths == [1 + 98]  # of 196


@pytest.mark.parametrize("vision", [RESNET, TIMM_RESNET])
def test_patch_dropout_needs_patches(vision):
    build(about=described(vision), patch_dropout=0.0)
    with pytest.raises(Mistake, match="patch_dropout needs a ViT image tower"):
        build(about=described(vision), patch_dropout=0.5)
    with pytest.raises(Mistake, match="cannot build"):
        build(patch_dropout=1.5)


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("patch_dropout", [None, 0.5])
def test_gradient_checkpointing_computes_blocks_twice_and_gives_the_same_gradients(custom_text, patch_dropout):
    about = described(custom_text=custom_text)
    plain, saving = build(about=about, patch_dropout=patch_dropout), build(about=about, patch_dropout=patch_dropout)
    clip.prepare_for_training(saving, gradient_checkpointing=True)
    calls: list[str] = []
    for model, name in ((plain, "plain"), (saving, "saving")):
        for tower in (model.visual, model.text if custom_text else model):
            tower.transformer.resblocks[0].mlp.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    expected = gradients(plain)
    for name, gradient in gradients(saving).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert (calls.count("plain"), calls.count("saving")) == (2, 4)


def test_gradient_checkpointing_reaches_what_a_lock_leaves_free():
    plain, saving = build(), build()
    for model in (plain, saving):
        clip.lock_towers(model, clip.ImageLock(unlocked_groups=2), clip.TextLock(unlocked_layers=2))
    clip.prepare_for_training(saving, gradient_checkpointing=True)
    expected = gradients(plain)
    assert any(gradient is None for gradient in expected.values())
    for name, gradient in gradients(saving).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("custom_text", [False, True])
def test_a_compiled_model_computes_the_same_under_the_same_names(custom_text):
    about = described(custom_text=custom_text)
    plain, compiled = build(about=about), build(about=about)
    clip.prepare_for_training(compiled, gradient_checkpointing=True, compile=True)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(embeddings(compiled), embeddings(plain), rtol=1e-4, atol=1e-5)
    expected = gradients(plain)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled.state_dict().keys() == plain.state_dict().keys()


# --- captions


@pytest.mark.parametrize("custom_text", [False, True])
def test_a_caption_is_embedded_as_with_all_its_padding_in_any_company(custom_text):
    about = described(text={**TEXT, "context_length": 40}, custom_text=custom_text)
    model, tokenize = build(about=about).eval(), clip.tokenizer(about)
    captions = ["", "a", *("dog " * count for count in (3, 6, 7, 20, 38, 39, 60)), "a", "dog " * 6]
    with torch.inference_mode():
        expected_NE = model.encode_text(tokenize(captions))
    found_NE = clip.encode_captions(model, tokenize, captions, batch_size=2)
    torch.testing.assert_close(found_NE, expected_NE, rtol=1e-5, atol=1e-5)
    alone_NE = torch.cat([clip.encode_captions(model, tokenize, [caption]) for caption in captions])
    torch.testing.assert_close(alone_NE, found_NE, rtol=1e-5, atol=2e-6)
    assert torch.equal(found_NE[1], found_NE[-2])


def test_a_tower_that_looks_ahead_reads_all_padding():
    about = described(text={**TEXT, "no_causal_mask": True})
    model, tokenize = build(about=about).eval(), clip.tokenizer(about)
    with torch.inference_mode():
        expected_NE = model.encode_text(tokenize(["a", "dog"]))
    torch.testing.assert_close(clip.encode_captions(model, tokenize, ["a", "dog"]), expected_NE)


# --- tokens


def test_captions_that_are_cut_off_are_counted_exactly():
    captions = ["", "a", "a " * 5, "a " * 6, "a " * 7, "! " * 6, "! " * 7, "internationalisation " * 3, "a" * 99]
    tokenize = clip.tokenizer(described())
    tokens_NT, is_truncated = clip.tokenise(tokenize, captions)
    assert (tokens_NT.dtype, tokens_NT.shape, is_truncated.dtype) == (np.int64, (9, 8), bool)
    np.testing.assert_array_equal(tokens_NT, tokenize(captions).numpy())
    long = open_clip.SimpleTokenizer(context_length=200)(captions)
    expected = (long == long.max()).int().argmax(dim=1).numpy() >= 8  # where the end-of-text token would stand
    np.testing.assert_array_equal(is_truncated, expected)
    assert list(is_truncated[:7]) == [False, False, False, False, True, False, True]
    empty, none = clip.tokenise(tokenize, [])
    assert (empty.shape, none.shape) == ((0, 8), (0,))


def test_a_tokenizers_options_are_those_of_the_config(tmp_path):
    about = described(text={**TEXT, "tokenizer_kwargs": {"clean": "canonicalize"}})
    write_json(tmp_path / clip.CONFIG_FILE, about)
    tokens = clip.tokenizer(about)(["A dog, a cat!"])
    assert torch.equal(tokens, open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["A dog, a cat!"]))
    assert torch.equal(tokens, clip.tokenizer(described())(["a dog a cat"]))


def test_hugging_face_tokenizers_count_cut_off_captions_by_their_own_length(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        bos_token="[CLS]", eos_token="[SEP]",
    ).save_pretrained(tmp_path)  # fmt: skip
    captions = ["a " * n for n in range(10)]
    for mode, room in ((None, 6), ("clips", 5)):
        text = {**TEXT, "hf_tokenizer_name": str(tmp_path), "tokenizer_mode": mode}
        tokens_NT, is_truncated = clip.tokenise(clip.tokenizer(described(text=text)), captions)
        assert (tokens_NT.dtype, tokens_NT.shape) == (np.int64, (10, 8))
        assert list(is_truncated) == [n > room for n in range(10)], mode


def test_a_hugging_face_tokenizer_out_of_reach_is_a_mistake(tmp_path):
    text = {**TEXT, "hf_tokenizer_name": str(tmp_path / "absent")}
    with pytest.raises(Mistake, match=r"transformers|neither local nor"):
        clip.tokenizer(described(text=text))
