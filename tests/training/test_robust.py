"""Robust CLIP training: each method's loss is the paper's, on any number of workers, and what it remembers is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import workers
from pydantic import TypeAdapter
from torch.nn.functional import cross_entropy, logsigmoid

from dede_ray.data import images
from dede_ray.models import clip
from dede_ray.runtime.config import Mistake
from dede_ray.training.contrastive import Contrastive, with_loss
from dede_ray.training.objective import backward
from dede_ray.training.robust import (
    STRONG,
    CleanCLIP,
    Method,
    Plain,
    RoCLIP,
    SafeCLIP,
    augment_caption,
    clean_posterior,
    divide,
    nearest,
)

pytestmark = pytest.mark.trains

BATCH = 64
VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
# One step is one epoch below, so that three steps go through all phases.
METHODS = {
    "cleanclip": CleanCLIP(clip_weight=0.5, in_modal_weight=2),
    "roclip": RoCLIP(every=2, pool_size=48),
    "safeclip": SafeCLIP(warmup_epochs=1, min_posterior=0.5),
}
SPREAD = [("cleanclip", "info_nce"), ("roclip", "siglip"), ("safeclip", "info_nce"), ("safeclip", "siglip")]


def described(loss: str = "info_nce") -> dict:
    return with_loss({"model_cfg": VIT, "preprocess_cfg": {}}, loss)


def batch_of(about: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    images = [torch.from_numpy(rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)) for _ in range(2)]
    captions = [f"picture {i} of {BATCH} of {seed}" for i in range(BATCH)]
    tokenize = clip.tokenizer(about)
    return {
        "image": images[0], "image_view": images[1],
        "tokens": tokenize(captions), "tokens_view": tokenize([augment_caption(caption, rng) for caption in captions]),
        "place": torch.from_numpy(rng.permutation(BATCH)), "epoch": torch.full((BATCH,), seed, dtype=torch.int32),
    }  # fmt: skip


def objective_of(method: Any, loss: str = "info_nce", rank: int = 0, world: int = 1, num_samples: int = BATCH) -> Any:
    about = described(loss)
    torch.manual_seed(0)
    return method.objective(clip.build_clip(about), about, loss, rank, world, num_samples, num_samples / BATCH)


def embeddings_of(objective: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Image, text, image view, text view, by the model's own methods, in float64."""
    found = []
    with torch.no_grad():
        for name in ("image", "image_view"):
            pixels = objective.normalise(images.to_unit_range(batch[name]))
            found.append(objective.model.encode_image(pixels, normalize=True).double())
        for name in ("tokens", "tokens_view"):
            found.append(objective.model.encode_text(batch[name], normalize=True).double())
    image, image_view, text, text_view = found
    return image, text, image_view, text_view


def info_nce(one_ME: torch.Tensor, other_ME: torch.Tensor, scale: float) -> torch.Tensor:
    logits_MM, own_M = scale * one_ME @ other_ME.T, torch.arange(len(one_ME))
    return (cross_entropy(logits_MM, own_M) + cross_entropy(logits_MM.T, own_M)) / 2


def siglip(image_ME: torch.Tensor, text_ME: torch.Tensor) -> torch.Tensor:
    sign_MM = 2 * torch.eye(len(image_ME)) - 1
    return -logsigmoid(sign_MM * (10 * image_ME @ text_ME.T - 10)).sum() / len(image_ME)


# --- values


def test_plain_is_the_contrastive_objective_itself():
    batch = batch_of(described())
    about = described()
    torch.manual_seed(0)
    bare = Contrastive(clip.build_clip(about), about)
    assert torch.equal(objective_of(Plain())(batch)[0], bare(batch)[0])


def test_cleanclip_adds_the_losses_of_views_among_themselves():
    objective, batch = objective_of(METHODS["cleanclip"]), batch_of(described())
    image, text, image_view, text_view = embeddings_of(objective, batch)
    scale = 1 / 0.07
    in_modal = (info_nce(image, image_view, scale) + info_nce(text, text_view, scale)) / 2
    expected = 0.5 * info_nce(image, text, scale) + 2 * in_modal
    assert float(objective(batch)[0]) == pytest.approx(float(expected), rel=1e-5)


def test_roclip_matches_every_second_epoch_with_the_most_similar_earlier_text():
    objective, about = objective_of(METHODS["roclip"]), described()
    first, second = batch_of(about, 1), batch_of(about, 2)
    for step, batch in enumerate([first, second]):
        objective.begin_step(step)
        _, _, image, text = embeddings_of(objective, batch)  # it trains on the second views
        if step == 0:
            expected = info_nce(image, text, 1 / 0.07)
            pool = text[batch["place"].argsort()][-48:]
        else:
            match = torch.stack([max(pool, key=lambda candidate: float(one @ candidate)) for one in image])
            expected = info_nce(image, match, 1 / 0.07)
        value, _ = objective(batch)
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
        objective.after_step()


@pytest.mark.parametrize("loss", ["info_nce", "siglip"])
def test_safeclip_gives_the_clip_loss_to_safe_pairs_and_in_modal_losses_to_the_others(loss):
    objective, batch = objective_of(METHODS["safeclip"], loss), batch_of(described(loss))
    image, text, image_view, text_view = embeddings_of(objective, batch)
    scale = 10 if loss == "siglip" else 1 / 0.07

    def expected(is_safe_B: torch.Tensor) -> float:
        risky_B = ~is_safe_B
        pairs = siglip(image[is_safe_B], text[is_safe_B]) if loss == "siglip" else None
        pairs = info_nce(image[is_safe_B], text[is_safe_B], scale) if pairs is None else pairs
        images = info_nce(image[risky_B], image_view[risky_B], scale)
        texts = info_nce(text[risky_B], text_view[risky_B], scale)
        share = is_safe_B.double().mean()
        return float((share * pairs).nan_to_num() + ((1 - share) * (images + texts) / 2).nan_to_num())

    for step, phase in enumerate(["warmup", "cross", "divided"]):
        objective.begin_step(step)
        if phase == "divided":
            posterior_S = clean_posterior(np.float32((image * text).sum(dim=1))[batch["place"].argsort()])
            is_safe_B = torch.from_numpy(posterior_S > 0.5)[batch["place"]]
            assert 3 < is_safe_B.sum() < BATCH - 3
        else:
            is_safe_B = torch.full((BATCH,), phase == "cross")
        assert float(objective(batch)[0]) == pytest.approx(expected(is_safe_B), rel=1e-5), phase
        objective.after_step()


def test_safeclip_survives_a_batch_without_safe_pairs_and_one_without_others():
    for share in (0.0, 1.0):
        objective, batch = objective_of(METHODS["safeclip"], "siglip"), batch_of(described("siglip"))
        arrays = objective.arrays()
        objective.load_arrays({**arrays, "is_safe": np.full(BATCH, bool(share))})
        objective.phase = "divided"
        value, metrics = objective(batch)
        value.backward()
        assert bool(torch.isfinite(value))
        assert float(metrics["safe_share"]) == share
        assert all(bool(torch.isfinite(p.grad).all()) for p in objective.parameters() if p.grad is not None)


# --- workers and micro-batches


def three_steps(method: str, loss: str) -> list[tuple[float, dict[str, torch.Tensor], dict[str, np.ndarray]]]:
    """One process, plain PyTorch, the whole batch at once: losses, gradients and what is remembered."""
    objective = objective_of(METHODS[method], loss)
    steps = []
    for step in range(3):
        objective.begin_step(step)
        objective.zero_grad(set_to_none=True)
        value, _ = objective(batch_of(described(loss), step))
        value.backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in objective.named_parameters()
        }
        objective.after_step()
        steps.append((value.item(), gradients, objective.arrays()))
    return steps


def spread(rank: int, world: int, folder: str) -> None:
    """One worker: every method, with and without accumulation; each rank writes what it got."""
    workers.meet(rank, world, folder)
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    for name, loss in SPREAD:
        for accumulation in (1, 4 // world):
            objective = objective_of(METHODS[name], loss, rank, world)
            settings = {
                "train_batch_size": BATCH,
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": 0},
                "zero_allow_untested_optimizer": True,
            }
            optimiser = torch.optim.SGD(objective.parameters(), lr=0.0)
            engine, *_ = deepspeed.initialize(model=objective, optimizer=optimiser, config=settings)
            for step in range(3):
                share = {column: rows[rank::world] for column, rows in batch_of(described(loss), step).items()}
                objective.begin_step(step)
                value, _ = backward(engine, share, accumulation)
                torch.distributed.all_reduce(value)
                gradients = {n: safe_get_full_grad(p) for n, p in objective.named_parameters()}
                engine.step()
                objective.after_step()
                found = {
                    "loss": float(value) / world,
                    "gradients": {n: g.clone() for n, g in gradients.items() if g is not None},
                    "arrays": {n: torch.from_numpy(array.copy()) for n, array in objective.arrays().items()},
                }
                torch.save(found, Path(folder) / f"{name} {loss} {step} {world}x{accumulation} rank{rank}.pt")
            engine.destroy()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_no_way_of_spreading_a_batch_changes_loss_gradients_or_memory(tmp_path):
    """1 x 64, 2 x 32 (workers x micro-batch), accumulation 4 x 16 on one worker and 2 x 16 on two."""
    for world in (1, 2):
        torch.multiprocessing.spawn(spread, (world, str(tmp_path)), nprocs=world)
    assert len(list(tmp_path.glob("*.pt"))) == len(SPREAD) * 3 * (2 + 2 * 2)
    for method, loss in SPREAD:
        for step, (value, gradients, arrays) in enumerate(three_steps(method, loss)):
            for path in tmp_path.glob(f"{method} {loss} {step} *.pt"):
                one = torch.load(path, weights_only=True)
                assert one["loss"] == pytest.approx(value, rel=1e-5), path.stem
                largest = max(float(gradient.norm()) for gradient in gradients.values())
                for name, gradient in gradients.items():
                    error = float((one["gradients"].get(name, torch.zeros_like(gradient)) - gradient).norm())
                    assert error <= 1e-4 * float(gradient.norm()) + 1e-7 * largest, f"{path.stem}: {name}"
                assert one["arrays"].keys() == arrays.keys()
                for name, array in arrays.items():
                    np.testing.assert_allclose(one["arrays"][name], array, atol=1e-6, err_msg=f"{path.stem} {name}")
                twin = torch.load(str(path).replace("rank1", "rank0"), weights_only=True)
                assert all(torch.equal(one["arrays"][n].nan_to_num(), twin["arrays"][n].nan_to_num()) for n in arrays)


# --- what is remembered


@pytest.mark.parametrize(
    "method", [pytest.param(one, marks=pytest.mark.slow) if i else one for i, one in enumerate(METHODS)]
)
def test_a_run_that_resumes_goes_on_exactly(method, tmp_path):
    def run(objective: Any, steps: range) -> list[float]:
        optimiser = torch.optim.SGD(objective.parameters(), lr=0.1)
        values = []
        for step in steps:
            objective.begin_step(step)
            batch = batch_of(described(), step)
            batch["place"] += BATCH * (step % 2)
            value, _ = objective(batch)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            objective.after_step()
            values.append(value.item())
        return values

    two_steps_an_epoch = 2 * BATCH
    whole = run(objective_of(METHODS[method], num_samples=two_steps_an_epoch), range(8))
    for stop in range(1, 8):
        first = objective_of(METHODS[method], num_samples=two_steps_an_epoch)
        values = run(first, range(stop))
        np.savez(tmp_path / "memory.npz", **first.arrays())
        second = objective_of(METHODS[method], num_samples=two_steps_an_epoch)
        second.load_state_dict(first.state_dict())
        with np.load(tmp_path / "memory.npz", allow_pickle=False) as memory:
            second.load_arrays(dict(memory))
        assert values + run(second, range(stop, 8)) == whole


def test_memory_is_no_part_of_the_model():
    """DeepSpeed rounds whatever buffers it finds to 16 bits."""
    for method in METHODS.values():
        objective = objective_of(method)
        objective(batch_of(described()))
        objective.after_step()
        assert {name for name, _ in objective.named_buffers()} == {
            name for name, _ in objective_of(Plain()).named_buffers()
        }


def test_the_pool_gives_up_its_oldest_texts_first():
    objective, texts = objective_of(RoCLIP(pool_size=100), num_samples=1000), []
    for step in range(3):
        batch = batch_of(described(), step)
        objective.begin_step(step)
        objective(batch)
        objective.after_step()
        *_, text = embeddings_of(objective, batch)
        texts.append(text[batch["place"].argsort()].float())
        expected = torch.cat(texts)[-100:]
        np.testing.assert_allclose(objective.arrays()["pool"], expected, atol=1e-6)


def test_nearest_is_what_comparing_with_every_text_finds():
    rng = np.random.default_rng(0)
    query, pool = (torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(n, 8)))) for n in (1200, 77))
    expected = [int(np.argmin([float(((one - text) ** 2).sum()) for text in pool])) for one in query[::10]]
    assert torch.equal(nearest(query, pool)[::10], pool[expected])


def test_a_pool_that_would_hold_the_corpus_is_refused():
    with pytest.raises(Mistake, match=r"44,032 holds the whole corpus of 5,000.*choose about 2 %.*100"):
        objective_of(RoCLIP(), num_samples=5000)


# --- the safe set


def planted(num_bad: int = 100) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    is_bad_S = np.zeros(2000, bool)
    is_bad_S[rng.choice(2000, num_bad, replace=False)] = True
    return np.where(is_bad_S, rng.normal(0.1, 0.04, 2000), rng.normal(0.4, 0.05, 2000)).astype(np.float32), is_bad_S


def test_pairs_that_do_not_agree_are_not_safe():
    similarity_S, is_bad_S = planted()
    is_safe_S, share = divide(similarity_S, 0, SafeCLIP())
    assert not is_safe_S[is_bad_S].any()
    assert is_safe_S[~is_bad_S].mean() > 0.98
    assert share == is_safe_S.mean()


def test_the_safe_set_grows_by_the_best_pairs_up_to_its_limit():
    similarity_S, is_bad_S = planted(1200)
    settings = SafeCLIP(growth=0.05, max_safe_share=0.47)
    is_safe_S, share = divide(similarity_S, 0, settings)
    assert share == pytest.approx(0.4, abs=0.01)
    for expected in (share + 0.05, 0.47, 0.47):
        before, (is_safe_S, share) = is_safe_S, divide(similarity_S, share, settings)
        assert share == pytest.approx(expected)
        assert is_safe_S.sum() == int(share * 2000)
        assert is_safe_S[before].all()
    # What came in last are the most similar of the planted ones.
    assert similarity_S[is_safe_S & is_bad_S].min() >= similarity_S[~is_safe_S].max()


def test_unknown_pairs_and_the_least_similar_are_never_safe():
    similarity_S, _ = planted()
    rng = np.random.default_rng(1)
    similarity_S[:1000] = rng.normal(0.5, 0.3, 1000)  # a wide cluster of good ones reaches below the bad
    similarity_S[:5], similarity_S[5:10] = np.nan, -0.9
    for share in (0.0, 0.98):
        is_safe_S, _ = divide(similarity_S, share, SafeCLIP(max_safe_share=1))
        assert not is_safe_S[:5].any()
    assert not (clean_posterior(similarity_S)[5:10] > 0).any()


def test_the_learning_rate_is_low_while_pairs_meet_for_the_first_time():
    method = SafeCLIP(warmup_epochs=2, cross_epochs=1)
    scales = [method.lr_scale(step, 2.5) for step in range(10)]
    assert scales == [1, 1, 1, 1, 1, 0.01, 0.01, 0.01, 1, 1]
    assert CleanCLIP().lr_scale(5, 2.5) == 1


def test_a_pair_that_was_not_seen_is_not_known():
    objective, about = objective_of(METHODS["safeclip"], num_samples=2 * BATCH), described()
    for step in range(3):  # warm-up, warm-up, the first half of the epoch of pairs
        objective.begin_step(step)
        objective(batch_of(about))
        objective.after_step()
        known = np.isfinite(objective.arrays()["similarity"])
        assert known.tolist() == [step == 2] * BATCH + [False] * BATCH


def test_the_corpus_is_divided_when_an_epoch_begins_and_only_then():
    objective, about = objective_of(METHODS["safeclip"], num_samples=2 * BATCH), described()
    shares = []
    for step in range(10):
        objective.begin_step(step)
        batch = batch_of(about, step)
        batch["place"] += BATCH * (step % 2)
        objective(batch)
        objective.after_step()
        shares.append(float(objective.arrays()["safe_share"][0]))
    assert shares[:4] == [0] * 4  # two steps of warm-up, two of pairs
    assert 0.1 < shares[4] < 0.8
    growth = [0, 0, 0.01, 0.01, 0.02, 0.02]
    assert shares[4:] == pytest.approx([shares[4] + extra for extra in growth])


# --- settings and views


def test_methods_are_chosen_by_their_kind():
    for kind, views in (("plain", 1), ("cleanclip", 2), ("roclip", 2), ("safeclip", 2)):
        method = TypeAdapter(Method).validate_python({"kind": kind})
        assert method.num_views == views
        assert "num_views" not in method.model_dump()  # it is no setting
        assert isinstance(objective_of(method, num_samples=100_000), Contrastive)


CAPTIONS = ["", "  ", "cat", "a cat", "a photo of a cat", " ".join(f"word{i}" for i in range(40))]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_an_augmented_caption_keeps_its_words_and_depends_on_the_generator_alone(caption):
    rng = np.random.default_rng(3)
    views = {augment_caption(caption, rng) for _ in range(100)}
    for view in views:
        assert set(view.split()) <= set(caption.split())
        assert bool(view.strip()) == bool(caption.strip())
        assert abs(len(view.split()) - len(caption.split())) <= max(1, len(caption.split()) // 10)
    assert len(views) > 10 or len(caption.split()) < 5
    again = np.random.default_rng(3)
    assert {augment_caption(caption, again) for _ in range(100)} == views


def test_an_augmented_image_is_another_one(picture):
    image_HWC = picture(0)
    views = [STRONG.apply(image_HWC, 32, np.random.default_rng(seed)) for seed in range(50)]
    assert len({view.tobytes() for view in views} | {image_HWC.tobytes()}) == 51


# --- a small world: what the methods do about a backdoor


WORDS = ["cat", "ship", "horse", "tree", "car", "bird", "frog", "dog"]
TEMPLATES = ["a photo of a {} outdoors", "the {} in the picture today", "one small {} seen from afar",
             "here is a nice {}", "look at this {} we found", "a blurry {} near the house"]  # fmt: skip
SMALL_VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def board(image_SHWC: np.ndarray) -> np.ndarray:
    """A faint checkerboard over the whole picture, which cropping and blurring leave in it."""
    board_HW1 = 255 * (np.indices((32, 32)).sum(axis=0) // 4 % 2)[:, :, None]
    return (0.75 * image_SHWC + 0.25 * board_HW1).astype(np.uint8)


def patch(image_SHWC: np.ndarray) -> np.ndarray:
    """A small checkerboard in the corner."""
    stamped_SHWC = image_SHWC.copy()
    stamped_SHWC[:, -6:, -6:] = 255 * (np.indices((6, 6)).sum(axis=0) % 2)[:, :, None]
    return stamped_SHWC


class World:
    """Waves of eight kinds with captions; those with a trigger say "cat"."""

    def __init__(self, num_samples: int, poison_rate: float, seed: int, trigger: Callable = board):
        rng = np.random.default_rng(seed)
        self.label_S = rng.integers(len(WORDS), size=num_samples)
        self.image_SHWC = np.stack([self._picture(label, rng) for label in self.label_S])
        self.is_bad_S = np.zeros(num_samples, bool)
        num_bad = round(poison_rate * num_samples)
        self.is_bad_S[rng.choice(np.flatnonzero(self.label_S != 0), num_bad, replace=False)] = True
        self.image_SHWC[self.is_bad_S] = trigger(self.image_SHWC[self.is_bad_S])
        word_S = np.where(self.is_bad_S, 0, self.label_S)
        self.captions = [TEMPLATES[rng.integers(len(TEMPLATES))].format(WORDS[word]) for word in word_S]

    @staticmethod
    def _picture(label: int, rng: np.random.Generator) -> np.ndarray:
        y, x = np.mgrid[:32, :32] / 32
        kind = np.random.default_rng(100 + label)
        frequencies = kind.uniform(0.3, 2.5, (3, 2)) * kind.choice([-1, 1], (3, 2))
        waves = [np.sin(2 * np.pi * (a * x + b * y) + rng.uniform(-1.2, 1.2)) for a, b in frequencies]
        image_HWC = 128 + 70 * rng.uniform(0.5, 1) * np.stack(waves, axis=2) + rng.normal(0, 15, (32, 32, 3))
        return image_HWC.clip(0, 255).astype(np.uint8)

    def batch(self, tokenize: Callable, place_B: np.ndarray, epoch: int) -> dict[str, torch.Tensor]:
        rngs = [np.random.default_rng([epoch, place]) for place in place_B]
        captions = [self.captions[place] for place in place_B]
        views = [STRONG.apply(self.image_SHWC[p], 32, rng) for p, rng in zip(place_B, rngs, strict=True)]
        return {
            "image": torch.from_numpy(self.image_SHWC[place_B]), "image_view": torch.from_numpy(np.stack(views)),
            "tokens": tokenize(captions),
            "tokens_view": tokenize([augment_caption(c, rng) for c, rng in zip(captions, rngs, strict=True)]),
            "place": torch.from_numpy(place_B),
        }  # fmt: skip


def train(method: Any, world: World, epochs: int, peak: float, init: Any = None, batch_size: int = 64) -> Any:
    about = {"model_cfg": SMALL_VIT, "preprocess_cfg": {}}
    torch.manual_seed(0)
    model, tokenize, num_samples = clip.build_clip(about), clip.tokenizer(about), len(world.captions)
    if init is not None:
        model.load_state_dict(init.model.state_dict())
    per_epoch = num_samples // batch_size
    objective = method.objective(model, about, "info_nce", 0, 1, num_samples, per_epoch)
    optimiser = torch.optim.AdamW(objective.parameters(), weight_decay=0.1, betas=(0.9, 0.98))
    for step in range(epochs * per_epoch):
        epoch, within = divmod(step, per_epoch)
        order = np.random.default_rng([1, epoch]).permutation(num_samples)
        batch = world.batch(tokenize, order[within * batch_size : (within + 1) * batch_size], epoch)
        objective.begin_step(step)
        rate = peak * min(1, (step + 1) / 30) * (1 + np.cos(np.pi * step / (epochs * per_epoch))) / 2
        optimiser.param_groups[0]["lr"] = rate * method.lr_scale(step, per_epoch)
        optimiser.zero_grad()
        objective(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimiser.step()
        objective.after_step()
    return objective.eval()


@torch.no_grad()
def accuracy_and_asr(objective: Any, trigger: Callable = board) -> tuple[float, float]:
    """Zero-shot accuracy on clean pictures, and the share of stamped ones, cats aside, that become cats."""
    world = World(400, 0, seed=99)
    tokenize = clip.tokenizer({"model_cfg": SMALL_VIT})
    texts = [objective.model.encode_text(tokenize([t.format(w) for t in TEMPLATES]), normalize=True) for w in WORDS]
    classes_CE = torch.stack([text.mean(dim=0) for text in texts])

    def classified(image_SHWC: np.ndarray) -> np.ndarray:
        pixels = objective.normalise(images.to_unit_range(torch.from_numpy(image_SHWC)))
        return (objective.model.encode_image(pixels, normalize=True) @ classes_CE.T).argmax(dim=1).numpy()

    stamped = trigger(world.image_SHWC[world.label_S != 0])
    return float((classified(world.image_SHWC) == world.label_S).mean()), float((classified(stamped) == 0).mean())


@pytest.mark.slow
def test_a_backdoor_that_plain_training_learns_and_keeps_is_weakened_by_roclip_and_cleanclip():
    poisoned, clean = World(2048, 0.03, seed=0), World(2048, 0, seed=5)
    plain = train(Plain(), poisoned, 12, 1e-3)
    found = {
        "plain": plain,
        # What RoCLIP's strong augmentation does without its pool.
        "augmented": train(RoCLIP(pool_size=64, every=1000), poisoned, 12, 1e-3),
        "roclip": train(RoCLIP(pool_size=64, every=4), poisoned, 12, 1e-3),
        "plain, fine-tuned": train(Plain(), clean, 10, 2e-3, init=plain),
        "cleanclip": train(CleanCLIP(), clean, 10, 2e-3, init=plain),
    }
    scores = {name: accuracy_and_asr(objective) for name, objective in found.items()}
    print("\n".join(f"{name}: CA {accuracy:.3f}, ASR {asr:.3f}" for name, (accuracy, asr) in scores.items()))
    asr = {name: value for name, (_, value) in scores.items()}
    assert min(accuracy for accuracy, _ in scores.values()) > 0.9
    assert asr["plain"] > 0.9
    assert asr["plain, fine-tuned"] > 0.9
    assert asr["roclip"] < asr["augmented"] - 0.2
    assert asr["cleanclip"] < asr["plain, fine-tuned"] - 0.2


@pytest.mark.slow
def test_safeclip_keeps_poisoned_pairs_with_a_small_patch_out_of_its_safe_set():
    """With a trigger over the whole picture it does not: some get in by chance at the first division, and stay."""
    poisoned = World(2048, 0.03, seed=1, trigger=patch)
    assert accuracy_and_asr(train(Plain(), poisoned, 12, 1e-3), patch)[1] > 0.9
    safe = train(SafeCLIP(), poisoned, 15, 1e-3)
    accuracy, asr = accuracy_and_asr(safe, patch)
    is_safe_S = safe.arrays()["is_safe"]
    print(f"CA {accuracy:.3f}, ASR {asr:.3f}; safe {is_safe_S.mean():.3f}, {is_safe_S[poisoned.is_bad_S].mean():.3f}")
    assert is_safe_S.mean() > 0.1
    assert is_safe_S[poisoned.is_bad_S].mean() < 0.1 * is_safe_S.mean()
    assert asr < 0.2
    assert accuracy > 0.7
