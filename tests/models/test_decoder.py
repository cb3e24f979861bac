"""The DeDe decoder: what it may see, which patches are hidden, and that a planted backdoor shows in its errors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import stats

from dede_ray.data.sampling import keyed_uniform, sample_keys
from dede_ray.metrics import auroc
from dede_ray.models.decoder import (
    DecoderShape,
    MaskedDecoder,
    load_decoder,
    num_visible_patches,
    random_mask,
    reconstruction_error,
    save_decoder,
)
from dede_ray.runtime.config import Mistake, read_json, write_json
from dede_ray.training.reconstruction import (
    PRESETS,
    REVERSE,
    Reconstruction,
    embedding_use,
    fit_decoder,
    noise_images,
    ood_split,
)

pytestmark = pytest.mark.trains

SMALL = DecoderShape(patch_px=4, width=32, heads=2, encoder_depth=1, decoder_depth=1)
IDS = [f"train-00000.tar/{i:04d}" for i in range(40)]


@pytest.fixture
def decoder() -> MaskedDecoder:
    """Random weights, 8-px images of four patches."""
    torch.manual_seed(0)
    return MaskedDecoder(SMALL, image_size=8, embedding_dim=6).requires_grad_(False).eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Five images, embeddings, and masks that hide three of the four patches."""
    rng = torch.Generator().manual_seed(1)
    image_BCHW, embedding_BE = torch.rand(5, 3, 8, 8, generator=rng), torch.randn(5, 6, generator=rng)
    return image_BCHW, embedding_BE, random_mask(sample_keys(IDS[:5], seed=0), 4, 0.75)


# --- patches and masks


def test_patches_are_numbered_row_by_row_and_put_together_again(decoder):
    image_BCHW = torch.arange(2 * 3 * 8 * 8).float().reshape(2, 3, 8, 8)
    patches_BLP = decoder.patchify(image_BCHW)
    second_of_first_row = image_BCHW[0, :, 0:4, 4:8].permute(1, 2, 0).flatten()
    assert torch.equal(patches_BLP[0, 1], second_of_first_row)
    assert torch.equal(decoder.unpatchify(patches_BLP), image_BCHW)


@pytest.mark.parametrize(("mask_ratio", "num_visible"), [(0.75, 16), (0.9, 6), (0.97, 1), (0.99, 0)])
def test_a_mask_ratio_leaves_the_floor_of_its_complement_visible(mask_ratio, num_visible):
    mask_BL = random_mask(sample_keys(IDS, seed=0), 64, mask_ratio)
    assert num_visible_patches(64, mask_ratio) == num_visible
    assert mask_BL.dtype == torch.bool
    assert torch.equal((~mask_BL).sum(dim=1), torch.full((len(IDS),), num_visible))


def test_a_ratio_that_divides_evenly_is_not_rounded_down_by_floating_point():
    assert [num_visible_patches(10, tenths / 10) for tenths in range(1, 10)] == list(range(9, 0, -1))


def test_a_sample_has_the_same_mask_in_any_batch_and_order():
    together = random_mask(sample_keys(IDS, seed=3), 64, 0.9)
    backwards = random_mask(sample_keys(IDS[::-1], seed=3), 64, 0.9).flip(0)
    alone = torch.cat([random_mask(sample_keys([name], seed=3), 64, 0.9) for name in IDS])
    assert torch.equal(together, backwards)
    assert torch.equal(together, alone)


def test_masks_differ_between_samples_seeds_and_repeats():
    masks = [random_mask(sample_keys(IDS, *seeds), 64, 0.9) for seeds in [(0,), (1,), (0, 1), (0, 2)]]
    assert len({tuple(row.tolist()) for mask_BL in masks for row in mask_BL}) == 4 * len(IDS)


def test_every_patch_is_hidden_equally_often():
    keys_B = sample_keys([str(i) for i in range(20_000)], seed=0)
    visible_L = (~random_mask(keys_B, 64, 0.75)).sum(dim=0).numpy()
    assert stats.chisquare(visible_L).pvalue > 1e-4


# --- what may influence what


def test_the_encoder_never_sees_the_embedding_and_the_output_does(decoder, batch):
    image_BCHW, embedding_BE, mask_BL = batch
    features = []
    decoder.encoder_norm.register_forward_hook(lambda module, inputs, output: features.append(output))
    outputs = [decoder(image_BCHW, embedding, mask_BL) for embedding in (embedding_BE, embedding_BE + 1)]
    assert torch.equal(features[0], features[1])
    assert (outputs[0] - outputs[1]).abs().amax(dim=(1, 2)).min() > 1e-4


def test_hidden_pixels_do_not_leak_into_the_output(decoder, batch):
    image_BCHW, embedding_BE, mask_BL = batch
    patches_BLP = decoder.patchify(image_BCHW)
    other_BCHW = decoder.unpatchify(torch.where(mask_BL.unsqueeze(-1), 1 - patches_BLP, patches_BLP))
    assert torch.equal(decoder(image_BCHW, embedding_BE, mask_BL), decoder(other_BCHW, embedding_BE, mask_BL))
    seen_BCHW = decoder.unpatchify(torch.where(mask_BL.unsqueeze(-1), patches_BLP, 1 - patches_BLP))
    assert not torch.equal(decoder(image_BCHW, embedding_BE, mask_BL), decoder(seen_BCHW, embedding_BE, mask_BL))


def test_with_every_patch_hidden_the_image_does_not_matter(decoder, batch):
    image_BCHW, embedding_BE, mask_BL = batch
    everything_BL = torch.ones_like(mask_BL)
    assert torch.equal(
        decoder(image_BCHW, embedding_BE, everything_BL), decoder(image_BCHW.flip(0), embedding_BE, everything_BL)
    )


def test_a_visible_patch_keeps_its_place(decoder, batch):
    """Whichever patch is visible, its own features go to its own position of the decoder."""
    image_BCHW, embedding_BE, _ = batch
    seen, put = [], []
    decoder.encoder_norm.register_forward_hook(lambda module, inputs, output: seen.append(output[0, 1]))
    decoder.decoder[0].register_forward_pre_hook(lambda module, inputs: put.append(inputs[0][0]))
    for place in range(4):
        mask_BL = torch.ones(1, 4, dtype=torch.bool)
        mask_BL[0, place] = False
        decoder(image_BCHW[:1], embedding_BE[:1], mask_BL)
        token_LD = put[place] - decoder.decoder_position[0]
        torch.testing.assert_close(token_LD[1 + place], seen[place])
        hidden = [1 + other for other in range(4) if other != place]
        torch.testing.assert_close(token_LD[hidden], decoder.mask_token[0].expand(3, -1))


def test_a_sample_is_rebuilt_alike_in_any_batch(decoder, batch):
    image_BCHW, embedding_BE, mask_BL = batch
    together = decoder(image_BCHW, embedding_BE, mask_BL)
    alone = [decoder(image_BCHW[i : i + 1], embedding_BE[i : i + 1], mask_BL[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-6, atol=1e-6)


def test_plain_and_fused_attention_differ_by_rounding_only(decoder, batch, monkeypatch):
    """In bf16 on CPUs one takes the other's place, for few tokens."""
    image_BCHW, embedding_BE, mask_BL = batch
    found = []
    for most_tokens in (256, 0):
        monkeypatch.setattr("dede_ray.models.decoder.MOST_PLAIN_TOKENS", most_tokens)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(decoder(image_BCHW, embedding_BE, mask_BL).float())
        assert decoder.decoder[0].attn.fused_attn == (most_tokens == 0)
    exact = decoder(image_BCHW, embedding_BE, mask_BL)
    assert decoder.decoder[0].attn.fused_attn
    for one in found:
        torch.testing.assert_close(one, exact, rtol=0, atol=0.02)


def test_a_reconstruction_shows_visible_patches_as_they_are(decoder, batch):
    image_BCHW, embedding_BE, _ = batch
    keys_B = sample_keys(IDS[:5], seed=0)
    rebuilt_BCHW, mask_BL = decoder.reconstruct(image_BCHW, embedding_BE, keys_B, mask_ratio=0.5)
    is_same_BL = (decoder.patchify(rebuilt_BCHW) == decoder.patchify(image_BCHW)).all(dim=2)
    assert torch.equal(is_same_BL, ~mask_BL)
    assert 0 <= rebuilt_BCHW.min() <= rebuilt_BCHW.max() <= 1


def test_no_embedding_means_the_learned_null_embedding(decoder, batch):
    image_BCHW, embedding_BE, _ = batch
    keys_B = sample_keys(IDS[:5], seed=0)
    nothing, _ = decoder.reconstruct(image_BCHW, None, keys_B, mask_ratio=0.75)
    null_BE = decoder.null_embedding.expand(5, -1)
    assert torch.equal(nothing, decoder.reconstruct(image_BCHW, null_BE, keys_B, mask_ratio=0.75)[0])
    assert not torch.equal(nothing, decoder.reconstruct(image_BCHW, embedding_BE, keys_B, mask_ratio=0.75)[0])


def test_a_fixed_scale_of_the_embeddings_changes_nothing_but_their_unit(decoder, batch):
    image_BCHW, embedding_BE, mask_BL = batch
    scaled = MaskedDecoder(SMALL, image_size=8, embedding_dim=6, embedding_scale=0.25)
    scaled.load_state_dict({**decoder.state_dict(), "embedding_scale": torch.tensor(0.25)})
    with torch.no_grad():
        torch.testing.assert_close(
            scaled(image_BCHW, 4 * embedding_BE, mask_BL), decoder(image_BCHW, embedding_BE, mask_BL)
        )
        torch.testing.assert_close(
            scaled(image_BCHW, scaled.null(5), mask_BL), decoder(image_BCHW, decoder.null(5), mask_BL)
        )


# --- errors


def test_the_error_is_the_mean_square_over_hidden_pixels(decoder, batch):
    image_BCHW, embedding_BE, mask_BL = batch
    patches, target = (x.numpy() for x in (decoder(image_BCHW, embedding_BE, mask_BL), decoder.patchify(image_BCHW)))
    for b in range(5):
        squares = [
            (float(patches[b, patch, pixel]) - float(target[b, patch, pixel])) ** 2
            for patch in range(4)
            if mask_BL[b, patch]
            for pixel in range(48)
        ]
        error_B = reconstruction_error(torch.tensor(patches), torch.tensor(target), mask_BL)
        assert float(error_B[b]) == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_a_sample_with_somebody_elses_embedding_is_rebuilt_worse():
    """Eight kinds of images, whose embeddings name the kind; triggered samples carry another kind's embedding."""
    torch.manual_seed(0)
    kind_N, pattern_KCHW, code_KE = torch.arange(512) % 8, torch.rand(8, 3, 8, 8), torch.randn(8, 6)
    image_NCHW = (pattern_KCHW[kind_N] + 0.1 * torch.randn(512, 3, 8, 8)).clamp(0, 1)
    embedding_NE = code_KE[kind_N] + 0.1 * torch.randn(512, 6)
    names = [f"s.tar/{i}" for i in range(512)]
    image_NHWC = (255 * image_NCHW).round().to(torch.uint8).permute(0, 2, 3, 1)
    decoder = MaskedDecoder(SMALL, image_size=8, embedding_dim=6)
    decoder.has_null = True
    objective = Reconstruction(decoder, mask_ratio=0.99, null_rate=0.1)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for epoch in range(75):
        keys_N = sample_keys(names, 0, epoch)
        for rows in torch.randperm(384).split(96):
            loss, _ = objective({"key": keys_N[rows], "image": image_NHWC[rows], "embedding": embedding_NE[rows]})
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]

    held = {"image": image_NHWC[384:], "embedding": embedding_NE[384:], "key": sample_keys(names[384:], 0)}
    use = embedding_use(decoder.eval(), held, mask_ratio=0.99)
    assert use["error_true"] < 0.5 * use["error_shuffled"]
    assert use["error_true"] < 0.5 * use["error_null"]

    is_triggered = np.arange(128) % 16 == 0
    embedding_BE = held["embedding"].clone()
    embedding_BE[is_triggered] = code_KE[5]  # all triggered samples claim to be of one kind, not theirs
    mask_BL = random_mask(held["key"], 4, 0.99)
    with torch.no_grad():
        patches_BLP = decoder(image_NCHW[384:], embedding_BE, mask_BL)
    error_B = reconstruction_error(patches_BLP, decoder.patchify(image_NCHW[384:]), mask_BL)
    assert auroc(error_B.numpy(), is_triggered).value > 0.95


def test_the_null_rate_is_the_share_of_samples_trained_without_embedding(decoder):
    objective = Reconstruction(copy.deepcopy(decoder).requires_grad_(True), mask_ratio=0.75, null_rate=0.25)
    seen: list[torch.Tensor] = []
    objective.decoder.embed_embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    names = [str(i) for i in range(2000)]
    batch = {
        "image": torch.zeros(2000, 8, 8, 3, dtype=torch.uint8),
        "embedding": torch.randn(2000, 6),
        "key": sample_keys(names, 0),
    }
    objective(batch)[0].backward()
    is_null_B = (seen[0] == objective.decoder.null_embedding).all(dim=1)
    assert abs(float(is_null_B.float().mean()) - 0.25) < 0.04
    assert objective.decoder.null_embedding.grad.abs().sum() > 0


@pytest.mark.parametrize("null_rate", [0.0, 0.3])
def test_trimming_leaves_the_worst_rebuilt_out_of_the_loss_but_none_without_embedding(decoder, null_rate):
    torch.manual_seed(0)
    keys_B = sample_keys([str(i) for i in range(40)], 0)
    batch = {"image": torch.randint(256, (40, 8, 8, 3), dtype=torch.uint8), "key": keys_B}
    batch["embedding"] = torch.randn(40, 6)
    one_by_one = Reconstruction(decoder, mask_ratio=0.75, null_rate=null_rate)
    errors = [one_by_one({name: column[i : i + 1] for name, column in batch.items()})[0].item() for i in range(40)]
    is_null = keyed_uniform(~keys_B, 1)[:, 0].numpy() < null_rate
    with_embedding = sorted(error for error, null in zip(errors, is_null, strict=True) if not null)
    num_kept = int(0.75 * (len(with_embedding) - 1)) + 1  # those up to the quantile
    kept = with_embedding[:num_kept] + [error for error, null in zip(errors, is_null, strict=True) if null]
    loss, metrics = Reconstruction(decoder, mask_ratio=0.75, null_rate=null_rate, trim_rate=0.25)(batch)
    assert loss.item() == pytest.approx(np.mean(kept), rel=1e-5)
    assert float(metrics["trimmed"]) == pytest.approx(1 - len(kept) / 40)


# --- presets and files


def test_the_papers_preset_is_the_papers_network():
    shape = PRESETS["paper"].shape
    decoder = MaskedDecoder(shape, image_size=32, embedding_dim=512)
    assert (len(decoder.encoder), len(decoder.decoder), shape.width, decoder.num_patches) == (12, 4, 192, 64)
    in_blocks = sum(p.numel() for blocks in (decoder.encoder, decoder.decoder) for p in blocks.parameters())
    assert in_blocks == 16 * (12 * 192**2 + 13 * 192)  # 7.1 M


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds_a_decoder_for_its_image_size(name):
    preset, image_size = PRESETS[name], 224 if name == "vit_b16" else 32
    with torch.device("meta"):
        decoder = MaskedDecoder(preset.shape, image_size, embedding_dim=512)
    assert decoder.num_patches == (image_size // preset.shape.patch_px) ** 2


def test_patches_that_do_not_tile_the_image_are_a_mistake():
    with pytest.raises(Mistake, match="patch_px 4 must divide the victim's image size 30"):
        MaskedDecoder(SMALL, image_size=30, embedding_dim=6)


def test_a_decoder_read_from_its_files_is_the_one_that_was_saved(decoder, batch, tmp_path):
    decoder.victim, decoder.has_null = "abc", True
    save_decoder(tmp_path, decoder, {"preset": "by hand"})
    loaded = load_decoder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"decoder.json", "decoder.safetensors"}
    assert torch.equal(loaded(*batch), decoder(*batch))
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.victim, loaded.has_null, loaded.image_size, loaded.patch_px) == ("abc", True, 8, 4)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_folder_without_a_decoder_or_with_a_damaged_one_is_a_mistake(decoder, tmp_path):
    with pytest.raises(Mistake, match="no exported decoder"):
        load_decoder(tmp_path)
    save_decoder(tmp_path, decoder, {})
    description = read_json(tmp_path / "decoder.json", "decoder")
    write_json(tmp_path / "decoder.json", {**description, "embedding_dim": 7})
    with pytest.raises(Mistake, match="does not fit its decoder"):
        load_decoder(tmp_path)
    write_json(tmp_path / "decoder.json", {"image_size": 8})
    with pytest.raises(Mistake, match="does not describe an exported decoder"):
        load_decoder(tmp_path)
    write_json(tmp_path / "decoder.json", description)
    (tmp_path / "decoder.safetensors").write_bytes(b"rubbish")
    with pytest.raises(Mistake, match="no readable checkpoint"):
        load_decoder(tmp_path)


# --- the reverse direction


@pytest.fixture
def two_way() -> MaskedDecoder:
    torch.manual_seed(3)
    decoder = MaskedDecoder(SMALL, image_size=8, embedding_dim=6, has_reverse=True).requires_grad_(False).eval()
    decoder.embedding_mean.copy_(torch.arange(6.0))
    decoder.embedding_std.copy_(torch.arange(1.0, 7.0))
    return decoder


def test_predictions_look_at_visible_patches_only(two_way):
    torch.manual_seed(0)
    image_BCHW = torch.rand(4, 3, 8, 8)
    mask_BL = random_mask(sample_keys(["a", "b", "c", "d"], 0), two_way.num_patches, 0.5)
    hidden_BLP = torch.where(mask_BL.unsqueeze(-1), torch.rand(1), two_way.patchify(image_BCHW))
    predicted_BE = two_way.predict(image_BCHW, mask_BL)
    assert predicted_BE.shape == (4, 6)
    torch.testing.assert_close(two_way.predict(two_way.unpatchify(hidden_BLP), mask_BL), predicted_BE)
    seen_BLP = torch.where(mask_BL.unsqueeze(-1), two_way.patchify(image_BCHW), torch.rand(1))
    assert (two_way.predict(two_way.unpatchify(seen_BLP), mask_BL) - predicted_BE).abs().max() > 1e-4


def test_the_reverse_loss_is_the_trimmed_error_per_standardised_dimension(two_way):
    torch.manual_seed(0)
    batch = {
        "image": torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8),
        "embedding": torch.randn(8, 6),
        "key": sample_keys([str(i) for i in range(8)], 0),
    }
    alone, _ = Reconstruction(two_way, 0.75, 0.0, 0.25)(batch)
    both, metrics = Reconstruction(two_way, 0.75, 0.0, 0.25, reverse_weight=0.5, reverse_mask_ratio=0.5)(batch)
    mask_BL = random_mask(batch["key"] ^ REVERSE, two_way.num_patches, 0.5)
    image_BCHW = batch["image"].permute(0, 3, 1, 2) / 255
    predicted = two_way.predict(image_BCHW, mask_BL).numpy()
    target = (batch["embedding"].numpy() - np.arange(6)) / np.arange(1, 7)
    error = np.sort(((predicted - target) ** 2).mean(axis=1))
    assert float(metrics["reverse"]) == pytest.approx(error[:6].mean(), rel=1e-5)  # the worst two of eight are left out
    assert float(both) == pytest.approx(float(alone) + 0.5 * error[:6].mean(), rel=1e-5)


def test_a_decoder_with_a_reverse_head_is_stored_whole_and_one_without_still_loads(two_way, tmp_path):
    for decoder in (two_way, MaskedDecoder(SMALL, image_size=8, embedding_dim=6)):
        save_decoder(tmp_path, decoder, {})
        again = load_decoder(tmp_path)
        assert again.has_reverse == decoder.has_reverse
        for name, tensor in decoder.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], tensor)


# --- what long embeddings become


def test_the_longest_embeddings_are_outside_of_the_ball_as_many_as_the_quantile_leaves():
    direction_NE = np.random.default_rng(0).normal(size=(200, 6))
    direction_NE /= np.linalg.norm(direction_NE, axis=1, keepdims=True)
    length_N = np.random.default_rng(1).permutation(200) + 1.0
    is_outside_N = ood_split((length_N[:, None] * direction_NE).astype(np.float32), 0.95)
    np.testing.assert_array_equal(is_outside_N, length_N > 190)


def test_embeddings_of_one_length_are_all_inside():
    assert not ood_split(np.eye(6, dtype=np.float32), 0.99).any()


def test_noise_images_have_their_own_pixels_whatever_their_number():
    few, many = dict(noise_images(3, 8, seed=0)), dict(noise_images(1200, 8, seed=0))
    assert all((many[name] == image_HWC).all() for name, image_HWC in few.items())
    assert len({image_HWC.tobytes() for image_HWC in many.values()}) == len(many) == 1200
    assert {name.split("/")[0] for name in many} == {"ood-noise-00000.tar", "ood-noise-00001.tar"}
    assert stats.kstest(np.concatenate([*many.values()]).ravel() / 255.5 + 1e-3, "uniform").statistic < 0.01
    others = dict(noise_images(3, 8, seed=1))
    assert not [name for name, image_HWC in few.items() if (others[name] == image_HWC).all()]


def seen_while_fitting(monkeypatch, **changes) -> list[np.ndarray]:
    """Embeddings of every batch, in order, of a decoder fitted to 100 images of which the last five are long."""
    seen: list[np.ndarray] = []
    forward = Reconstruction.forward

    def spy(self, batch):
        seen.append(batch["embedding"].numpy().copy())
        return forward(self, batch)

    monkeypatch.setattr(Reconstruction, "forward", spy)
    rng = np.random.default_rng(0)
    image_NHWC = rng.integers(0, 256, (100, 8, 8, 3), np.uint8)
    embedding_NE = rng.normal(size=(100, 6)).astype(np.float32)
    embedding_NE[:95] *= 1 / np.linalg.norm(embedding_NE[:95], axis=1, keepdims=True)
    embedding_NE[95:] *= 9 / np.linalg.norm(embedding_NE[95:], axis=1, keepdims=True)
    preset = PRESETS["tiny"].model_copy(
        update={"shape": SMALL, "batch_size": 10, "epochs": 2, "ood_quantile": 0.95, "null_rate": 0.0, **changes}
    )
    fit_decoder(image_NHWC, embedding_NE, [f"s.tar/{i}" for i in range(100)], preset, "victim", 0, lambda image_NHWC: (
        np.full((len(image_NHWC), 6), 7, np.float32)
    ))  # fmt: skip
    return seen


def test_splitting_trains_on_the_long_ones_in_a_pass_of_their_own(monkeypatch):
    batches = seen_while_fitting(monkeypatch, ood_fill="split")
    is_long = [np.linalg.norm(embedding_BE, axis=1) > 2 for embedding_BE in batches]
    assert [bool(long_B.all()) for long_B in is_long] == 2 * (9 * [False] + [True])
    assert [bool(long_B.any()) for long_B in is_long] == 2 * (9 * [False] + [True])
    assert [len(long_B) for long_B in is_long] == 2 * (9 * [10] + [5])


def test_filling_with_noise_replaces_the_long_ones_one_by_one(monkeypatch):
    rows_NE = np.concatenate(seen_while_fitting(monkeypatch, ood_fill="noise"))
    length_N = np.linalg.norm(rows_NE, axis=1)
    assert len(rows_NE) == 200
    assert not (np.abs(length_N - 9) < 0.1).any()
    assert (rows_NE == 7).all(axis=1).sum() == 10  # five in each epoch


def test_without_a_fill_everything_is_trained_on_in_batches_as_before(monkeypatch):
    rows_NE = np.concatenate(seen_while_fitting(monkeypatch))
    assert (np.linalg.norm(rows_NE, axis=1) > 2).sum() == 10
    with pytest.raises(Mistake, match="give `embed`"):
        fit_decoder(
            np.zeros((20, 8, 8, 3), np.uint8), np.diag(np.arange(20, dtype=np.float32)), [str(i) for i in range(20)],
            PRESETS["tiny"].model_copy(update={"shape": SMALL, "batch_size": 10, "ood_fill": "noise"}), "victim", 0,
        )  # fmt: skip
