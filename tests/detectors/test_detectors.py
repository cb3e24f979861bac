"""Detectors: a score belongs to the sample, the models and the seed; higher is more suspicious."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dede_ray.data.images import encode_image, to_unit_range
from dede_ray.data.sampling import sample_keys
from dede_ray.detectors.dede import DeDe
from dede_ray.detectors.image_statistics import ImageStatistics
from dede_ray.models.decoder import DecoderShape, MaskedDecoder, load_decoder, random_mask, save_decoder
from dede_ray.models.embedding import Batch
from dede_ray.models.victims import OpenClipVictim, Victim, load_victim
from dede_ray.runtime.config import Mistake

RATIOS = [0.75, 0.97, 0.99]  # 16, 1 and 0 of 64 patches visible


@pytest.fixture(scope="module")
def victim(victim_folder) -> Victim:
    return load_victim(OpenClipVictim(path=str(victim_folder)))


@pytest.fixture(scope="module")
def batch(victim, picture) -> Batch:
    image_BCHW = to_unit_range(torch.from_numpy(np.stack([picture(i) for i in range(12)])))
    return Batch([f"train-00000.tar/{i:04d}" for i in range(12)], victim(image_BCHW), image_BCHW)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_score_is_the_same_in_any_batch_and_order(victim, decoder_folder, batch, ratio):
    dede = DeDe(decoder=str(decoder_folder), score_mask_ratio=ratio)
    for detector in (dede, dede.model_copy(update={"precision": "bf16"}), ImageStatistics()):
        scorer = detector.open(victim, {})
        whole = scorer.score(batch)
        assert tuple(whole) == scorer.columns
        order = [7, 0, 11, 3, 1, 2, 10, 9, 8, 4, 6, 5]
        shuffled = scorer.score(batch.part(order))
        alone = [scorer.score(batch.part([i])) for i in range(12)]
        for name, score_B in whole.items():
            assert (score_B.dtype, score_B.shape) == (np.float32, (12,))
            np.testing.assert_allclose(shuffled[name], score_B[order], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(np.concatenate([one[name] for one in alone]), score_B, rtol=1e-6, atol=1e-6)


def test_a_decoder_in_bf16_says_nearly_the_same(victim, decoder_folder, batch):
    exact, rounded = (
        DeDe(decoder=str(decoder_folder), precision=precision).open(victim, {}).score(batch)
        for precision in ("fp32", "bf16")
    )
    for name, score_B in exact.items():
        assert not np.array_equal(rounded[name], score_B), name
        np.testing.assert_allclose(rounded[name], score_B, rtol=0.02, atol=0.005)


@pytest.mark.parametrize("ratio", RATIOS)
def test_dede_scores_are_errors_averaged_over_masks(victim, decoder_folder, batch, ratio):
    """Recomputed from patches, one sample at a time."""
    decoder = load_decoder(decoder_folder)
    scores = (
        DeDe(decoder=str(decoder_folder), score_mask_ratio=ratio, num_masks=3, seed=5).open(victim, {}).score(batch)
    )
    for i in range(12):
        image_BCHW, target_LP = batch.image_BCHW[i : i + 1], decoder.patchify(batch.image_BCHW[i : i + 1])[0]
        sums: dict[bool, list[float]] = {True: [], False: []}
        for repeat in range(3):
            mask_BL = random_mask(sample_keys([batch.sample_ids[i]], 5, repeat), 64, ratio)
            for is_null, embedding_BE in ((False, batch.embedding_BE[i : i + 1]), (True, decoder.null(1))):
                with torch.inference_mode():
                    patches_LP = decoder(image_BCHW, embedding_BE, mask_BL)[0]
                sums[is_null].append(float((patches_LP - target_LP)[mask_BL[0]].square().sum()))
        num_pixels = int(mask_BL.sum()) * 48
        total, null = np.mean(sums[False]), np.mean(sums[True])
        assert scores["dede_sum"][i] == pytest.approx(total, rel=1e-4)
        assert scores["dede_mean"][i] == pytest.approx(total / num_pixels, rel=1e-4)
        assert scores["dede_null"][i] == pytest.approx(null / num_pixels, rel=1e-4)
        assert scores["dede_null_ratio"][i] == pytest.approx(np.log(total / null), abs=1e-4)


def test_what_is_rebuilt_worse_scores_higher(victim, decoder_folder, batch):
    """A picture and its negative, with one embedding: the one further from what the decoder draws scores higher."""
    decoder = load_decoder(decoder_folder)
    drawn_BCHW, _ = decoder.reconstruct(batch.image_BCHW, batch.embedding_BE, sample_keys(batch.sample_ids, 0), 0.99)
    scorer = DeDe(decoder=str(decoder_folder), score_mask_ratio=0.99).open(victim, {})
    near = scorer.score(Batch(batch.sample_ids, batch.embedding_BE, 0.9 * drawn_BCHW + 0.1 * batch.image_BCHW))
    far = scorer.score(batch)
    for name in ("dede_sum", "dede_mean"):
        assert (near[name] < far[name]).all()


def test_controls_never_look_at_the_embedding(victim, decoder_folder, batch):
    other = replace(batch, embedding_BE=batch.embedding_BE.flip(0) + 1)
    seen = {}
    for detector in (DeDe(decoder=str(decoder_folder), score_mask_ratio=0.9), ImageStatistics()):
        scorer = detector.open(victim, {})
        one, two = scorer.score(batch), scorer.score(other)
        seen.update({name: not np.array_equal(one[name], two[name]) for name in one})
    statistics = ImageStatistics().open(victim, {}).controls
    assert {name for name, looks in seen.items() if not looks} == {"dede_null", *statistics}


def in_numpy(image_HWC: np.ndarray) -> dict[str, float]:
    """The statistics of one uint8 picture, in plain words."""
    image_HWC = image_HWC.astype(np.float64) / 255
    grey = image_HWC.mean(axis=2)
    size = min(8, len(grey))
    tiles = [
        grey[row : row + size, column : column + size].var()
        for row in range(0, len(grey) - size + 1, size)
        for column in range(0, len(grey) - size + 1, size)
    ]
    power = np.abs(np.fft.rfft2(grey)).ravel()[1:] ** 2
    share = power / max(power.sum(), 1e-12)
    entropy = -sum(one * np.log(one) for one in share if one > 0) / np.log(len(power))
    return {
        "stat_contrast": grey.std(ddof=1),
        "stat_edges": np.mean((grey[1:] - grey[:-1]) ** 2) + np.mean((grey[:, 1:] - grey[:, :-1]) ** 2),
        "stat_texture": np.mean(tiles),
        "stat_texture_spread": np.std(tiles),
        "stat_range": np.quantile(grey, 0.95) - np.quantile(grey, 0.05),
        "stat_bright": np.mean(grey > 0.9),
        "stat_dark": np.mean(grey < 0.1),
        "stat_entropy": entropy,
        "stat_colour": np.sqrt(np.mean((image_HWC - grey[:, :, None]) ** 2)),
        "stat_bytes": np.log(len(encode_image(np.rint(255 * image_HWC).astype(np.uint8), "jpg", quality=75))),
    }


def test_image_statistics_are_what_numpy_says(victim, picture):
    rng = np.random.default_rng(0)
    dark, bright = picture(1) // 8, 255 - picture(2) // 8
    odd = [np.zeros((32, 32, 3), np.uint8), rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), dark, bright]
    images = np.stack([*(picture(i) for i in range(8)), *odd])
    batch = Batch(
        [str(i) for i in range(len(images))], torch.zeros(len(images), 16), to_unit_range(torch.from_numpy(images))
    )
    scores = ImageStatistics(reencode=True).open(victim, {}).score(batch)
    for i, image_HWC in enumerate(images):
        for name, value in in_numpy(image_HWC).items():
            assert scores[name][i] == pytest.approx(value, rel=1e-3, abs=1e-5), (name, i)
    assert list(in_numpy(images[0])) == list(scores)
    assert all(np.ptp(score_B) > 0 for score_B in scores.values())
    assert "stat_bytes" not in ImageStatistics().open(victim, {}).columns


def test_the_seed_and_the_ratio_are_part_of_a_detectors_fingerprint(victim, decoder_folder):
    variants = [{}, {"seed": 1}, {"score_mask_ratio": 0.9}, {"num_masks": 2}]
    prints = [DeDe(decoder=str(decoder_folder), **variant).open(victim, {}).fingerprint for variant in variants]
    assert len(set(prints)) == 4
    assert prints[0] == DeDe(decoder=str(decoder_folder)).open(victim, {}).fingerprint


def test_a_decoder_without_a_null_embedding_gives_no_null_scores(victim, decoder_folder, batch, tmp_path):
    decoder = load_decoder(decoder_folder)
    decoder.has_null = False
    save_decoder(tmp_path, decoder, {})
    scores = DeDe(decoder=str(tmp_path)).open(victim, {}).score(batch)
    assert set(scores) == {"dede_sum", "dede_mean", "dede_reverse"}


def test_a_decoder_of_another_victim_is_a_mistake_that_names_the_widths(victim, decoder_folder, tmp_path):
    wide = MaskedDecoder(load_decoder(decoder_folder).shape, image_size=32, embedding_dim=24)
    wide.victim = victim.fingerprint
    save_decoder(tmp_path / "wide", wide, {})
    with pytest.raises(Mistake, match=r"embeddings of width 24 of 32-px images, victim .* gives 16 of 32 px"):
        DeDe(decoder=str(tmp_path / "wide")).open(victim, {})
    other = load_decoder(decoder_folder)
    other.victim = "0123456789abcdef"
    save_decoder(tmp_path / "other", other, {})
    with pytest.raises(Mistake, match="trained against another victim"):
        DeDe(decoder=str(tmp_path / "other")).open(victim, {})


@pytest.fixture(scope="module")
def two_way_folder(victim, tmp_path_factory):
    torch.manual_seed(4)
    shape = DecoderShape(patch_px=4, width=32, heads=2, encoder_depth=1, decoder_depth=1)
    decoder = MaskedDecoder(shape, victim.image_size, victim.embedding_dim, has_reverse=True)
    decoder.victim = victim.fingerprint
    decoder.embedding_mean.fill_(0.5)
    decoder.embedding_std.fill_(2.0)
    save_decoder(tmp_path_factory.mktemp("two_way"), decoder, {})
    return tmp_path_factory.getbasetemp() / "two_way0"


def test_the_reverse_score_is_the_distance_from_the_mean_prediction(victim, two_way_folder, batch):
    decoder = load_decoder(two_way_folder)
    settings = DeDe(decoder=str(two_way_folder), num_masks=3, seed=5, reverse_mask_ratio=0.9)
    scores = settings.open(victim, {}).score(batch)["dede_reverse"]
    for i in range(12):
        masks = [random_mask(sample_keys([batch.sample_ids[i]], 5, repeat, 1), 64, 0.9) for repeat in range(3)]
        with torch.inference_mode():
            predicted = np.mean(
                [decoder.predict(batch.image_BCHW[i : i + 1], mask)[0].numpy() for mask in masks], axis=0
            )
        expected = np.mean((predicted - (batch.embedding_BE[i].numpy() - 0.5) / 2) ** 2)
        assert scores[i] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(Mistake, match="leaves none of 64 patches visible"):
        DeDe(decoder=str(two_way_folder), reverse_mask_ratio=0.99).open(victim, {})


def test_the_swap_rank_counts_embeddings_that_rebuild_better(victim, decoder_folder, batch):
    settings = DeDe(decoder=str(decoder_folder), num_swaps=5)
    state = settings.fit(replace(batch, image_BCHW=None), None)
    assert state["swap"].shape == (5, victim.embedding_dim)
    ranks = settings.open(victim, state).score(batch)["dede_swap_rank"]
    plain = DeDe(decoder=str(decoder_folder)).open(victim, {})
    own = plain.score(batch)["dede_mean"]
    others = [plain.score(replace(batch, embedding_BE=swap_E.expand(12, -1)))["dede_mean"] for swap_E in state["swap"]]
    np.testing.assert_allclose(ranks, (np.stack(others) < own).mean(axis=0))


@pytest.mark.slow
def test_what_five_detectors_cost_is_reported_beside_embedding_alone(clip_config):
    from tests.benchmarks.speed import DetectorSpeed, SpeedConfig, measure_speed

    small = DecoderShape(patch_px=8, width=32, heads=2, encoder_depth=1, decoder_depth=1)
    measured = DetectorSpeed(
        model=str(clip_config), reference="mobilenetv3_small_050", decoder=small, num_samples=6, chunk_size=4, repeats=1
    )
    table = measure_speed(SpeedConfig(detectors=[measured]))
    assert "with five detectors ratio" in table
    shares = table.splitlines()[-1]
    for name in ("dede", "density", "isolation_forest", "consistency", "clip_score", "reference encoder", "text tower"):
        assert f"{name} " in shares
