"""ASSET's pieces by their definitions; its two forms on planted poison."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from scipy import stats

from dede_ray.detectors.asset import (
    Asset,
    Nested,
    PublishedAsset,
    QuickNested,
    adjusted_outlyingness,
    apply_layers,
    asset_published,
    asset_threshold,
    medcouple,
    random_layers,
)
from dede_ray.metrics import auroc
from dede_ray.models.embedding import Batch
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.runtime.config import Mistake

pytestmark = pytest.mark.trains

N, D = 1536, 32

# ----------------------------------------------------------------------------------------------------------- the pieces


def medcouple_by_hand(values):
    """The definition of Brys, Hubert & Struyf, with their signs for pairs that equal the median."""
    values, median = sorted(values), np.median(values)
    tied = [i for i, value in enumerate(values) if value == median]
    kernel = []
    for j, upper in enumerate(values):
        for i, lower in enumerate(values):
            if upper < median or lower > median:
                continue
            if upper == lower == median:
                # 1-based places among the tied: -1, 0, 1 as their sum less 1 is below, at, above how many there are
                kernel.append(np.sign((i - tied[0] + 1) + (j - tied[0] + 1) - 1 - len(tied)))
            else:
                kernel.append(((upper - median) - (median - lower)) / (upper - lower))
    return np.median(kernel)


def test_the_medcouple_has_known_values():
    assert medcouple([1, 2, 7, 9, 10]) == pytest.approx(-1 / 3)
    assert medcouple([-3, -1, 0, 1, 3]) == 0
    assert medcouple([1, 2, 4, 8]) == pytest.approx(3 / 14)  # of -1/3, 0, 3/7, 2/3
    assert medcouple([5, 5, 5, 5]) == 0
    exponential = stats.expon.ppf((np.arange(512) + 0.5) / 512)
    assert medcouple(exponential) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("seed", range(12))
def test_the_medcouple_is_its_definition_with_and_without_ties(seed):
    rng = np.random.default_rng(seed)
    values = rng.exponential(2, rng.integers(3, 40))
    for given in (values, np.round(values), -np.round(values), np.minimum(values, np.median(values))):
        assert medcouple(rng.permutation(given)) == pytest.approx(medcouple_by_hand(given), abs=1e-12)
        assert medcouple(3 * given - 7) == pytest.approx(medcouple(given), abs=1e-9)


def test_outlyingness_counts_fences_from_the_median():
    for values in (np.random.default_rng(0).exponential(1, 101), -np.random.default_rng(1).exponential(1, 101)):
        q1, median, q3 = np.percentile(values, [25, 50, 75])
        mc, iqr = medcouple_by_hand(values), q3 - q1
        if mc >= 0:
            w1, w2 = q1 - 1.5 * math.exp(-4 * mc) * iqr, q3 + 1.5 * math.exp(3 * mc) * iqr
        else:
            w1, w2 = q1 - 1.5 * math.exp(-3 * mc) * iqr, q3 + 1.5 * math.exp(4 * mc) * iqr
        expected = [(y - median) / (w2 - median) if y >= median else (median - y) / (median - w1) for y in values]
        np.testing.assert_allclose(adjusted_outlyingness(values), expected, rtol=1e-9)
    outlyingness = adjusted_outlyingness([1.0] * 20 + [2.0])
    assert outlyingness[:20].max() == 0 < 1e6 < outlyingness[20] < np.inf


def test_thresholds_are_where_the_density_falls_to_epsilon_or_where_the_code_puts_them():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(2, 0.1, 900), rng.normal(5, 1, 100)])
    lower = np.sort(scores)[:500]
    mean, sigma = lower.mean(), lower.std()
    threshold = asset_threshold(scores, 1e-3)
    assert threshold > mean
    assert stats.norm.pdf(threshold, mean, sigma) == pytest.approx(1e-3)
    compat = asset_threshold(scores, 1e-3, "compat")
    assert compat == pytest.approx(mean + sigma * math.sqrt(-2 * math.log(1e-3) * sigma * math.sqrt(2 * math.pi)))
    assert asset_threshold(1e6 * scores, 1e-3) == pytest.approx(1e6 * mean)  # nowhere so dense


def test_random_layers_are_nn_linears_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    layers = random_layers((6, 5, 3), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    network.load_state_dict(dict(zip(network.state_dict(), layers, strict=True)))
    input_BD = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(apply_layers(layers, input_BD), network(input_BD))
    assert layers[0].abs().max() <= 1 / math.sqrt(6) < 2 * layers[0].abs().max()


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_the_nested_network_tells_apart_only_what_base_samples_do_not_resemble(loss):
    rng = np.random.default_rng(0)
    clean_PD, base_BD = (torch.from_numpy(rng.normal(0, 1, (300, D)).astype(np.float32)) for _ in range(2))
    odd_PD = torch.from_numpy(rng.normal(3, 0.3, (15, D)).astype(np.float32))
    nested, generator = Nested(loss=loss), torch.Generator().manual_seed(0)
    output_P = nested.concentrate(torch.cat([clean_PD, odd_PD]), base_BD, generator).numpy()
    assert output_P.min() >= 0
    assert output_P.max() <= 1
    assert output_P[300:].min() > output_P[:300].max()
    is_out_P = QuickNested(loss=loss).select(torch.cat([clean_PD, odd_PD]), base_BD, generator)
    assert is_out_P[300:].all()
    assert is_out_P[:300].float().mean() < 0.05


# ------------------------------------------------------------------------------------------- the variant without labels


@pytest.fixture(scope="module")
def victim(victim_folder):
    return load_victim(OpenClipVictim(path=str(victim_folder)))


def batch_of(embedding_BD, name="s"):
    return Batch(
        [f"{name}{i:05d}" for i in range(len(embedding_BD))], torch.from_numpy(embedding_BD.astype(np.float32))
    )


@pytest.fixture(scope="module")
def planted():
    """Ten clusters; 5 % of the corpus are moved, nine tenths of the way, to one place among them.

    Returns: the corpus, which of it is poisoned, clean samples, further samples and which of these are poisoned.
    """
    rng = np.random.default_rng(0)
    centre_KD, place_D = rng.normal(0, 1.5, (10, D)), rng.normal(0, 1.3, D)

    def draw(num, rate):
        embedding_ND = centre_KD[rng.integers(0, 10, num)] + rng.normal(0, 1, (num, D))
        is_poisoned_N = rng.random(num) < rate
        embedding_ND[is_poisoned_N] = place_D + 0.2 * embedding_ND[is_poisoned_N]
        return batch_of(3 + embedding_ND * np.linspace(0.1, 10, D)), is_poisoned_N

    corpus, is_poisoned_N = draw(N, 0.05)
    further, is_further_poisoned = draw(N, 0.05)
    return corpus, is_poisoned_N, draw(400, 0)[0], further, is_further_poisoned


def test_planted_poison_is_found_in_the_corpus_and_in_samples_not_trained_on(victim, planted):
    corpus, is_poisoned_N, clean, further, is_further_poisoned = planted
    scorer = Asset().open(victim, Asset().fit(corpus, clean))
    assert auroc(scorer.score(corpus)["asset"], is_poisoned_N).value > 0.97
    assert auroc(scorer.score(further)["asset"], is_further_poisoned).value > 0.97
    # It is the selection that finds it: poison in the midst of the clusters excites neither an untrained network ...
    untrained = Asset(epochs=0)
    scores = untrained.open(victim, untrained.fit(corpus, clean)).score(corpus)["asset"]
    assert auroc(scores, is_poisoned_N).value < 0.6
    # ... nor one that only learns to be indifferent on clean samples.
    indifferent = Asset(nested=QuickNested(outlyingness=1e9))
    scores = indifferent.open(victim, indifferent.fit(corpus, clean)).score(corpus)["asset"]
    assert auroc(scores, is_poisoned_N).value < 0.9


def test_a_clean_corpus_has_nothing_to_find(victim, planted):
    """Any 5 % of it: chance. And clean samples of the base set's kind score as the corpus does."""
    corpus, is_poisoned_N, clean, further, is_further_poisoned = planted
    corpus = corpus.part(np.flatnonzero(~is_poisoned_N).tolist())
    further = further.part(np.flatnonzero(~is_further_poisoned).tolist())
    scorer = Asset().open(victim, Asset().fit(corpus, clean))
    scores = scorer.score(corpus)["asset"]
    chosen = np.random.default_rng(1).permutation(len(scores)) < len(scores) // 20
    found = auroc(scores, chosen)
    assert found.low < 0.5 < found.high
    both = np.concatenate([scores, scorer.score(further)["asset"]])
    assert auroc(both, np.arange(len(both)) < len(scores)).value == pytest.approx(0.5, abs=0.06)


def test_scores_do_not_depend_on_batch_or_order(victim, planted):
    corpus, _, clean, further, _ = planted
    settings = Asset(epochs=1)
    scorer = settings.open(victim, settings.fit(corpus, clean))
    whole = scorer.score(further)
    assert tuple(whole) == scorer.columns
    order = np.random.default_rng(2).permutation(len(further))
    for start in range(0, len(further), 61):
        rows = order[start : start + 61].tolist()
        assert np.array_equal(scorer.score(further.part(rows))["asset"], whole["asset"][rows])


def test_equal_seeds_train_equal_networks_whatever_the_global_generator(victim, planted):
    corpus, _, clean, further, _ = planted
    settings = Asset(epochs=2)
    state = settings.fit(corpus, clean)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    with torch.inference_mode():  # a caller's business
        again = settings.fit(corpus, clean)
    assert torch.equal(before, torch.get_rng_state())
    assert settings.open(victim, state).fingerprint == settings.open(victim, again).fingerprint
    other = Asset(epochs=2, seed=1)
    assert not torch.equal(other.fit(corpus, clean)["layer0"], state["layer0"])
    read = settings.open(victim, load(save(state)))
    np.testing.assert_array_equal(read.score(further)["asset"], settings.open(victim, state).score(further)["asset"])


def test_a_score_is_the_variance_of_the_networks_logits(victim, planted):
    corpus, _, clean, further, _ = planted
    settings = Asset(epochs=1, hidden=20, num_logits=5)
    state = {name: one.double().numpy() for name, one in settings.fit(corpus, clean).items()}
    embedding_ND = corpus.embedding_BE.double().numpy()
    np.testing.assert_allclose(state["centre"], embedding_ND.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(state["scale"], embedding_ND.std(axis=0), rtol=1e-9)
    input_ND = (further.embedding_BE.double().numpy() - state["centre"]) / state["scale"]
    hidden_NH = np.maximum(input_ND @ state["layer0"].T + state["layer1"], 0)
    logit_NK = hidden_NH @ state["layer2"].T + state["layer3"]
    assert logit_NK.shape == (len(further), 5)
    scores = settings.open(victim, settings.fit(corpus, clean)).score(further)["asset"]
    np.testing.assert_allclose(scores, logit_NK.var(axis=1), rtol=1e-5)


def test_a_dimension_that_never_varies_is_not_blown_up(victim, planted):
    corpus, _, clean, further, _ = planted
    settings = Asset(epochs=1)
    constant, base, judged = (
        batch_of(np.concatenate([one.embedding_BE.numpy(), np.full((len(one), 1), value)], axis=1))
        for one, value in ((corpus, 0.1), (clean, 0.1), (further, 0.1 + 1e-6))
    )
    plain = settings.open(victim, settings.fit(constant, base)).score(constant)["asset"]
    scores = settings.open(victim, settings.fit(constant, base)).score(judged)["asset"]
    assert np.isfinite(scores).all()
    assert scores.max() < 3 * plain.max()


def test_clean_samples_are_needed(planted):
    corpus, _, clean, _, _ = planted
    with pytest.raises(Mistake, match="it takes clean samples, and the run has none"):
        Asset().fit(corpus, None)
    with pytest.raises(Mistake, match="1,536 suspected and 15 clean samples to train on, it takes 16"):
        Asset().fit(corpus, clean.part(range(15)))


# -------------------------------------------------------------------------------------------------- as it was published


@pytest.fixture(scope="module")
def labelled():
    """16-px pictures of four classes by hue; 6 % of the corpus bear a bright corner and label 0, and odd features."""
    rng = np.random.default_rng(0)

    def draw(num):
        label_N = rng.integers(0, 4, num)
        hue_KC = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [160, 160, 60]])
        image_NHWC = hue_KC[label_N][:, None, None, :] + rng.normal(0, 25, (num, 16, 16, 3))
        return np.clip(image_NHWC, 0, 255).astype(np.uint8), label_N, np.eye(8)[label_N] + rng.normal(0, 0.5, (num, 8))

    image, label, feature = draw(384)
    is_poisoned = np.arange(384) % 16 == 3
    image[is_poisoned, :6, :6] = 255
    label[is_poisoned], feature[is_poisoned] = 0, rng.normal(4, 0.1, (24, 8))
    base_image, _, base_feature = draw(128)
    return (image, label, feature, base_image, base_feature), is_poisoned


TINY_ASSET = PublishedAsset(
    num_classes=4, width=8, epochs=10, batch_size=64, learning_rate=1e-3, nested=Nested(learning_rate=1e-3, rounds=20)
)


def test_the_published_form_separates_planted_poison(labelled):
    given, is_poisoned = labelled
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = asset_published(*given, TINY_ASSET)
    assert torch.equal(before, torch.get_rng_state())
    assert (found.score_N.dtype, found.score_N.shape) == (np.float32, (384,))
    assert auroc(found.score_N, is_poisoned).value > 0.9
    assert found.threshold == asset_threshold(found.score_N, 1e-6)
    np.testing.assert_array_equal(found.flagged_N, found.score_N > found.threshold)
    assert found.flagged_N[is_poisoned].mean() > found.flagged_N[~is_poisoned].mean() + 0.4


def test_the_published_form_finds_nothing_by_the_picture_alone(labelled):
    """Features like anybody's: nothing is selected that the triggers have in common, and only the label is odd."""
    (image, label, feature, *base), is_poisoned = labelled
    rng = np.random.default_rng(1)
    usual = np.where(is_poisoned[:, None], np.eye(8)[label] + rng.normal(0, 0.5, feature.shape), feature)
    assert auroc(asset_published(image, label, usual, *base, TINY_ASSET).score_N, is_poisoned).value < 0.85


def test_the_published_form_is_its_seed(labelled):
    given, _ = labelled
    short = TINY_ASSET.model_copy(update={"epochs": 1})
    one, two = asset_published(*given, short), asset_published(*given, short)
    np.testing.assert_array_equal(one.score_N, two.score_N)
    other = asset_published(*given, short.model_copy(update={"seed": 1, "rule": "compat"}))
    assert not np.allclose(one.score_N, other.score_N)
    assert other.threshold == asset_threshold(other.score_N, 1e-6, "compat")


def test_the_published_form_needs_its_labels_and_base(labelled):
    (image, label, feature, base_image, base_feature), _ = labelled
    with pytest.raises(Mistake, match="labels go from 0 to 3, num_classes is 3"):
        asset_published(image, label, feature, base_image, base_feature, PublishedAsset(num_classes=3, width=4))
    with pytest.raises(Mistake, match="384 suspected and 4 clean samples"):
        asset_published(image, label, feature, base_image[:4], base_feature[:4], TINY_ASSET)
