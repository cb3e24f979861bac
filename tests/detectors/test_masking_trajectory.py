"""The masking trajectory, beside plain loops and scikit-learn's DBSCAN."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from planted import WHITE_PX, planted_victim
from sklearn.cluster import DBSCAN

from dede_ray.data.images import to_unit_range
from dede_ray.data.sampling import keyed_uniform, sample_keys
from dede_ray.detectors.masking_trajectory import MaskingTrajectory, clean_radius, nested_masks
from dede_ray.metrics import auroc
from dede_ray.models.embedding import Batch
from dede_ray.models.victims import Victim
from dede_ray.runtime.config import Mistake


@pytest.fixture(scope="module")
def victim() -> Victim:
    return planted_victim()


def embedded(victim: Victim, image_BCHW: torch.Tensor) -> Batch:
    return Batch([f"train-00000.tar/{i:04d}" for i in range(len(image_BCHW))], victim(image_BCHW), image_BCHW)


@pytest.fixture(scope="module")
def image_BCHW(picture) -> torch.Tensor:
    return to_unit_range(torch.from_numpy(np.stack([picture(i) for i in range(60)])))


def test_masks_grow_from_nothing_to_the_last_ratio_and_never_uncover():
    keys_B = sample_keys(["a", "b"], 0)
    masks = nested_masks(keys_B, 64, MaskingTrajectory())
    assert [mask_BL.sum(dim=1).tolist() for mask_BL in masks] == [[round(0.05 * j * 64)] * 2 for j in range(20)]
    assert all(bool((later | ~mask).all()) for mask, later in pairwise(masks))
    assert not torch.equal(masks[10][0], masks[10][1])
    for mask_BL, alone_BL in zip(masks, nested_masks(keys_B[1:], 64, MaskingTrajectory()), strict=True):
        assert torch.equal(mask_BL[1:], alone_BL)


def by_hand(victim, image_CHW, sample_id, settings, patch_px):
    """Embeddings of one image, covered patch by patch."""
    side = 32 // patch_px
    order = np.argsort(keyed_uniform(sample_keys([sample_id], settings.seed), side**2)[0].numpy())
    path = []
    for j in range(settings.num_pictures):
        covered_CHW = image_CHW.clone()
        share = settings.last_mask_ratio * j / (settings.num_pictures - 1)
        for patch in order[: round(share * side**2)]:
            row, column = divmod(int(patch), side)
            covered_CHW[:, row * patch_px : (row + 1) * patch_px, column * patch_px : (column + 1) * patch_px] = 0.5
        path.append(victim(covered_CHW[None])[0].double().numpy())
    return np.stack(path)


def cosine(one, other):
    return one @ other / np.sqrt((one @ one) * (other @ other))


@pytest.mark.parametrize(("radius", "patch_px"), [(None, None), (0.15, 8)])
def test_scores_are_steps_clusters_and_cosines(victim, image_BCHW, radius, patch_px):
    settings = MaskingTrajectory(radius=radius, patch_px=patch_px, num_pictures=12, radius_in_steps=2.0, seed=4)
    batch = embedded(victim, image_BCHW[:8])
    scorer = settings.open(victim, {})
    scores = scorer.score(batch)
    assert tuple(scores) == scorer.columns
    for i in range(8):
        path = by_hand(victim, image_BCHW[i], batch.sample_ids[i], settings, patch_px or 4)
        steps = [1 - cosine(path[j], path[j + 1]) for j in range(11)]
        assert scores["mt_jump"][i] == pytest.approx(max(steps) / np.median(steps), rel=1e-3)
        stability = np.mean([cosine(path[0], path[j]) for j in range(1, 12)])
        assert scores["mt_stability"][i] == pytest.approx(stability, abs=1e-5)
        eps = radius or 2 * np.median(steps)
        labels = DBSCAN(eps=eps, min_samples=3, metric="cosine").fit(path).labels_
        assert scores["mt_clusters"][i] == len({label for label in labels if label >= 0})
    assert len(set(scores["mt_clusters"].tolist())) > 1


def test_a_score_is_the_same_in_any_batch_and_order(victim, image_BCHW):
    batch = embedded(victim, image_BCHW[:10])
    scorer = MaskingTrajectory().open(victim, {})
    whole = scorer.score(batch)
    order = [7, 0, 3, 1, 2, 9, 8, 4, 6, 5]
    shuffled = scorer.score(batch.part(order))
    alone = [scorer.score(batch.part([i])) for i in range(10)]
    for name, score_B in whole.items():
        assert (score_B.dtype, score_B.shape) == (np.float32, (10,))
        np.testing.assert_allclose(shuffled[name], score_B[order], rtol=1e-4)
        np.testing.assert_allclose(np.concatenate([one[name] for one in alone]), score_B, rtol=1e-4)


def test_a_trigger_makes_the_trajectory_jump_and_an_honest_victim_sees_none(image_BCHW):
    triggered_BCHW = image_BCHW.clone()
    triggered_BCHW[:, :, -WHITE_PX:, -WHITE_PX:] = 1
    found = {}
    for backdoored in (True, False):
        victim = planted_victim(backdoored)
        scorer = MaskingTrajectory().open(victim, {})
        clean, triggered = (scorer.score(embedded(victim, images)) for images in (image_BCHW, triggered_BCHW))
        for name in scorer.columns:
            scores = np.concatenate([triggered[name], clean[name]])
            found[name, backdoored] = auroc(scores, np.repeat([True, False], 60)).value
    assert found["mt_jump", True] > 0.9
    assert abs(found["mt_jump", False] - 0.5) < 0.15
    assert abs(found["mt_stability", False] - 0.5) < 0.15


def test_a_wide_radius_makes_one_cluster_and_a_narrow_one_none(victim, image_BCHW):
    batch = embedded(victim, image_BCHW[:6])
    wide = MaskingTrajectory(radius=2.0).open(victim, {}).score(batch)["mt_clusters"]
    narrow = MaskingTrajectory(radius=1e-12).open(victim, {}).score(batch)["mt_clusters"]
    assert wide.tolist() == [1] * 6
    assert narrow.tolist() == [0] * 6


def test_the_clean_radius_is_the_95th_percentile_of_clean_steps(victim, image_BCHW):
    settings, batch = MaskingTrajectory(num_pictures=6), embedded(victim, image_BCHW[:5])
    steps = []
    for i in range(5):
        path = by_hand(victim, image_BCHW[i], batch.sample_ids[i], settings, 4)
        steps += [1 - cosine(path[j], path[j + 1]) for j in range(5)]
    assert clean_radius(settings, victim, batch) == pytest.approx(np.quantile(steps, 0.95), rel=1e-3)


def test_a_picture_without_content_has_a_finite_score(victim):
    grey = embedded(victim, torch.full((2, 3, 32, 32), 0.5))
    scores = MaskingTrajectory().open(victim, {}).score(grey)
    assert all(np.isfinite(score_B).all() for score_B in scores.values())


def test_patches_must_tile_the_image(victim):
    with pytest.raises(Mistake, match="patch_px 5 does not divide the 32 px"):
        MaskingTrajectory(patch_px=5).open(victim, {})
