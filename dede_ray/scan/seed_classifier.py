"""Seed and amplify: what a few sure finds have in common is looked for in the whole corpus.

A detector that is precise at its very top has low recall. Its top samples, the seeds, share a trigger, which a small
network learns to see: windows cut from the seeds where a map says that the victim looks, pasted into clean images,
against windows cut at the same places from other clean images and pasted at the same places (PatchSearch, Tejankar et
al., CVPR 2023; DEFUSE's classifier step). The latter are what keeps the network from learning what a pasted edge looks
like. Where the seeds have no window in common, or there is no map, whole images are compared.

One control decides whether to believe it: the network must also separate seeds that it was not trained on from clean
images (AUROC, `passes`). Seeds that have nothing in common, because the detector found nothing, fail it.

Shapes: N images, H and W their sides, S seeds, K windows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cosine_similarity, relu, softplus

from dede_ray.data.images import to_unit_range
from dede_ray.metrics import auroc
from dede_ray.models.encoders import ResNet, build_encoder
from dede_ray.models.victims import Victim
from dede_ray.models.weights import read_export, refuse_not_finite, refuse_unlike, write_export
from dede_ray.runtime.config import Config, Mistake
from dede_ray.scan.decisions import Conformal, Verdict

logger = logging.getLogger(__name__)

Images = NDArray[np.uint8]
"""(N, H, W, 3) RGB, all of the victim's size."""
Localise = Callable[[Images], NDArray[np.float32]]
"""Images to maps (N, H, W), higher where the trigger may be."""

COLUMN = "amplified"
"""Column of the classifier's scores."""
LEAST_SEEDS, TOP_SHARE = 20, 0.0005
LARGE_PX = 64
"""Above it, the networks begin as ImageNet's do: a stride and a pool."""
SCORE_BATCH = 256
WEIGHTS_FILE, DESCRIPTION_FILE = "amplified.safetensors", "amplified.json"


class Amplify(Config):
    """How a few seeds become a classifier."""

    look_at: Literal["windows_or_whole", "windows", "whole"] = "windows_or_whole"
    """Windows of the seeds, whole seeds, or windows and, where they fail the control, whole seeds."""
    window_sizes: tuple[float, ...] = Field((0.25, 0.4), min_length=1)
    """Sides of the windows / side of the image."""
    windows_per_seed: int = Field(1, ge=1)
    """Windows of each size that are cut from one seed; they do not overlap."""
    placement: Literal["own", "random", "both"] = "both"
    """Where a window is pasted: where it was cut, as most triggers sit at one place; anywhere; or either in turn."""
    false_seeds: float = Field(0.1, ge=0, lt=1)
    """Share of the seeds that may be clean; the loss makes room for them."""
    width: int = Field(8, ge=4)
    """Channels of the first stage of each network."""
    num_networks: int = Field(3, ge=1)
    """Networks of the ensemble."""
    steps: int = Field(200, ge=1)
    """Training steps of each."""
    batch_size: int = Field(32, ge=2)
    """Pasted windows, and as many negatives, per step."""
    learning_rate: float = Field(0.003, gt=0)
    """Adam's, annealed to zero by a cosine."""
    weight_decay: float = Field(1e-4, ge=0)
    """Adam's (decoupled)."""
    held_out: float = Field(0.25, gt=0, lt=1)
    """Share of the seeds and of the clean images that the control keeps for itself."""
    least_auroc: float = Field(0.9, ge=0.5, le=1)
    """AUROC of true seeds in the control; with less, the classifier learnt nothing that they share."""
    seed: int = Field(0, ge=0)
    """Draws weights, windows and places."""

    @property
    def bar(self) -> float:
        """The control's AUROC that passes. False seeds are separated from clean images at 0.5, which lowers it."""
        return 0.5 + (1 - self.false_seeds) * (self.least_auroc - 0.5)

    def fit(self, seeds: Images, maps: NDArray[Any] | None, clean: Images) -> Amplified:
        """Train the classifier and put it to the control.

        Args:
            seeds: (S, H, W, 3), at least 20; samples that a detector is sure of.
            maps: (S, H, W), higher where the trigger may be; None compares whole images.
            clean: (N, H, W, 3), verified clean, of the corpus's own kind: of whole images from another source the
                network would learn the source. They may not serve to calibrate the scores.

        Raises:
            Mistake: too few images, or of other sizes.
        """
        self._check(seeds, maps, clean)
        ways: list[Literal["windows", "whole"]] = []
        if maps is not None and self.look_at != "whole":
            ways.append("windows")
        if self.look_at != "windows":
            ways.append("whole")
        fitted: list[Amplified] = []
        for way in ways:
            fitted.append(self._fit(way, seeds, maps, clean))
            if fitted[-1].passes:
                break
        return max(fitted, key=lambda one: one.control_auroc)

    def _check(self, seeds: Images, maps: NDArray[Any] | None, clean: Images) -> None:
        for name, images in (("seeds", seeds), ("clean images", clean)):
            assert images.dtype == np.uint8, images.dtype
            if len(images) < LEAST_SEEDS:
                raise Mistake(f"amplify: {len(images)} {name}, expected at least {LEAST_SEEDS}")
        if seeds.shape[1:] != clean.shape[1:]:
            raise Mistake(f"amplify: seeds of {seeds.shape[1:]} beside clean images of {clean.shape[1:]}")
        if maps is None and self.look_at == "windows":
            raise Mistake("amplify: look_at is windows, which takes maps that say where they are")
        if maps is not None:
            assert maps.shape == seeds.shape[:3], (maps.shape, seeds.shape)
            assert np.isfinite(maps).all(), "a map says of every pixel how suspicious it is"

    def _fit(
        self, way: Literal["windows", "whole"], seeds: Images, maps: NDArray[Any] | None, clean: Images
    ) -> Amplified:
        chance = np.random.default_rng(self.seed)
        seed_parts, clean_parts = _split(len(seeds), self.held_out, chance), _split(len(clean), self.held_out, chance)
        train, control = (
            _Donors.of(self, seeds[s], maps[s] if way == "windows" and maps is not None else None, clean[c])
            for s, c in zip(seed_parts, clean_parts, strict=True)
        )
        networks = [self._train(train, number) for number in range(self.num_networks)]
        made = Amplified(self, networks, seeds.shape[1], way, float("nan"))
        # As many as there are held-out windows or, where these are few, each of them pasted several times.
        positive, negative = control.draw(max(200, len(control.windows)), np.random.default_rng((self.seed, 1)))
        scores = made.score(np.concatenate([positive, negative]))
        labels = np.repeat([True, False], [len(positive), len(negative)])
        made.control_auroc = auroc(scores, labels).value
        logger.info("amplify: %s of %d seeds, AUROC of the control %.3f", way, len(seeds), made.control_auroc)
        return made

    def _train(self, donors: _Donors, number: int) -> _Classifier:
        chance = np.random.default_rng((self.seed, 2, number))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(chance.integers(2**62)))
            network = _Classifier(self.width, donors.clean.shape[1]).train()
        adam = torch.optim.AdamW(network.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        for step in range(self.steps):
            positive, negative = donors.draw(self.batch_size, chance, plain=True)
            logit_B = network(to_unit_range(torch.from_numpy(np.concatenate([positive, negative]))))
            loss = mixed_loss(logit_B[: self.batch_size], logit_B[self.batch_size :], self.false_seeds)
            if not torch.isfinite(loss):
                raise Mistake(f"amplify: the loss is {float(loss)} at step {step}; lower learning_rate")
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
        return network.requires_grad_(False).eval()


def mixed_loss(seed_logit_B: Tensor, clean_logit_B: Tensor, false_seeds: float) -> Tensor:
    """The logistic loss for seeds of which a share is clean: the clean side is known, the seeds are a mixture.

    The non-negative positive-unlabelled risk of Kiryo et al. (NeurIPS 2017, arXiv:1703.00593) with the sides swapped:
    E_seeds[loss as poisoned] - share E_clean[loss as poisoned], not below 0, is what the true seeds among them cost.
    """
    as_clean, as_poisoned = softplus(clean_logit_B).mean(), softplus(-clean_logit_B).mean()
    true_seeds = softplus(-seed_logit_B).mean() - false_seeds * as_poisoned
    return as_clean + true_seeds.clamp_min(0)


# ------------------------------------------------------------------------------------------------ windows


@dataclass(frozen=True)
class Window:
    """A square of a seed."""

    seed: int
    """Place of the seed among the seeds."""
    row: int
    column: int
    side: int

    @property
    def place(self) -> tuple[slice, slice]:
        return slice(self.row, self.row + self.side), slice(self.column, self.column + self.side)


def best_windows(map_HW: NDArray[Any], side: int, count: int) -> list[tuple[int, int]]:
    """Rows and columns of the squares with the largest mean of the map, none overlapping another, best first."""
    mean_HW = avg_pool2d(torch.as_tensor(np.asarray(map_HW, np.float64))[None], side, stride=1)[0].numpy().copy()
    found: list[tuple[int, int]] = []
    while len(found) < count and np.isfinite(mean_HW).any():
        row, column = (int(place) for place in np.unravel_index(np.nanargmax(mean_HW), mean_HW.shape))
        found.append((row, column))
        mean_HW[max(0, row - side + 1) : row + side, max(0, column - side + 1) : column + side] = np.nan
    return found


@dataclass(frozen=True, eq=False)
class _Donors:
    """What training batches are drawn from: seeds or their windows, and clean images."""

    config: Amplify
    seeds: Images
    windows: list[Window]
    """Empty where whole images are compared."""
    clean: Images

    @classmethod
    def of(cls, config: Amplify, seeds: Images, maps: NDArray[Any] | None, clean: Images) -> _Donors:
        windows = []
        for number, map_HW in enumerate([] if maps is None else maps):
            for size in config.window_sizes:
                side = min(map_HW.shape[0] - 1, max(2, round(size * map_HW.shape[0])))
                places = best_windows(map_HW, side, config.windows_per_seed)
                windows += [Window(number, row, column, side) for row, column in places]
        return cls(config, seeds, windows, clean)

    def draw(self, count: int, chance: np.random.Generator, plain: bool = False) -> tuple[Images, Images]:
        """`count` positives and as many negatives; `plain` leaves every fourth negative unpasted, as corpora are."""
        if not self.windows:
            return self.seeds[chance.integers(len(self.seeds), size=count)], self.clean[
                chance.integers(len(self.clean), size=count)
            ]
        canvas_N, other_N = chance.integers(len(self.clean), size=(2, count))
        other_N = np.where(other_N == canvas_N, (other_N + 1) % len(self.clean), other_N)
        positive, negative = self.clean[canvas_N], self.clean[canvas_N]  # two copies
        height, width = self.clean.shape[1:3]
        for i, number in enumerate(chance.integers(len(self.windows), size=count).tolist()):
            window = self.windows[number]
            row, column = window.row, window.column
            if self.config.placement == "random" or (self.config.placement == "both" and chance.random() < 0.5):
                row = int(chance.integers(height - window.side + 1))
                column = int(chance.integers(width - window.side + 1))
            target = slice(row, row + window.side), slice(column, column + window.side)
            positive[i][target] = self.seeds[window.seed][window.place]
            if not plain or i % 4:
                negative[i][target] = self.clean[other_N[i]][window.place]
        return positive, negative


def _split(num: int, held_out: float, chance: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    order = chance.permutation(num)
    num_held_out = min(num - 1, max(1, round(held_out * num)))
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


@torch.inference_mode()
def occlusion_map(
    victim: Victim, image_BCHW: Tensor, square_px: int | None = None, stride_px: int | None = None
) -> Tensor:
    """Where the victim looks: how far its embedding moves when a square is covered by grey.

    Args:
        image_BCHW: float, in [0, 1].
        square_px: side of a square; a quarter of the image's, if it is not said. A smaller one leaves enough of a
            trigger that the victim still responds, and the map misses it.
        stride_px: from one square to the next; half a square, if it is not said.

    Returns:
        float32 (B, H, W), 1 - cosine, the mean over the squares that cover a pixel.

    Source: Zeiler & Fergus, ECCV 2014, arXiv:1311.2901, with the embedding in place of a class.
    """
    size = image_BCHW.shape[-1]
    square_px = square_px or max(1, size // 4)
    stride_px = stride_px or max(1, square_px // 2)
    starts = sorted({*range(0, size - square_px, stride_px), size - square_px})  # the last one ends at the border
    embedding_BE = victim(image_BCHW).double()
    moved_BHW = torch.zeros_like(image_BCHW[:, 0])
    num_HW = image_BCHW.new_zeros(size, size)
    for top in starts:
        for left in starts:
            rows, columns = slice(top, top + square_px), slice(left, left + square_px)
            covered_BCHW = image_BCHW.clone()
            covered_BCHW[:, :, rows, columns] = 0.5
            moved_B = 1 - cosine_similarity(victim(covered_BCHW).double(), embedding_BE, dim=1)
            moved_BHW[:, rows, columns] += moved_B.to(moved_BHW.dtype)[:, None, None]
            num_HW[rows, columns] += 1
    return moved_BHW / num_HW


# ------------------------------------------------------------------------------------------------ the classifier


class _Classifier(nn.Module):
    """A small ResNet that takes, of each feature, the strongest place: a trigger is somewhere, not everywhere."""

    def __init__(self, width: int, image_size: int):
        super().__init__()
        stem: Literal["cifar", "imagenet"] = "imagenet" if image_size > LARGE_PX else "cifar"
        trunk: Any = build_encoder(ResNet(depth=18, stem=stem, width=width))
        self.trunk, self.head = trunk, nn.Linear(trunk.embedding_dim, 1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        trunk: Any = self.trunk
        x_BCHW = trunk.maxpool(relu(trunk.bn1(trunk.conv1((image_BCHW - 0.5) / 0.25))))
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
            x_BCHW = stage(x_BCHW)
        return self.head(x_BCHW.amax(dim=(2, 3)))[:, 0]


class Amplified:
    """What the seeds have in common, as a classifier.

    Attributes:
        settings: which made it.
        image_size: side of the images, in pixels.
        way: windows or whole images.
        control_auroc: of held-out seeds, or their windows, against clean ones.
    """

    def __init__(
        self,
        settings: Amplify,
        networks: list[_Classifier],
        image_size: int,
        way: Literal["windows", "whole"],
        control_auroc: float,
    ):
        self.settings, self.networks, self.image_size = settings, networks, image_size
        self.way: Literal["windows", "whole"] = way
        self.control_auroc = control_auroc

    @property
    def passes(self) -> bool:
        """Whether what was learnt holds on seeds that were held out; its scores mean nothing otherwise."""
        return self.control_auroc >= self.settings.bar

    def to(self, device: torch.device) -> Amplified:
        """Move the networks."""
        for network in self.networks:
            network.to(device)
        return self

    @torch.inference_mode()
    def score(self, images: Images) -> NDArray[np.float32]:
        """Mean logit of the networks, float32 (N,); higher looks more like the seeds."""
        assert images.shape[1:] == (self.image_size, self.image_size, 3), images.shape
        device = self.networks[0].head.weight.device
        parts = [
            torch.stack([network(image_BCHW) for network in self.networks]).mean(dim=0).cpu().numpy()
            for start in range(0, len(images), SCORE_BATCH)
            for image_BCHW in [to_unit_range(torch.tensor(images[start : start + SCORE_BATCH]).to(device))]
        ]
        return np.concatenate([np.empty(0, np.float32), *parts])

    def state(self) -> dict[str, Tensor]:
        """All tensors of all networks."""
        return {
            f"{number}.{name}": tensor.contiguous()
            for number, network in enumerate(self.networks)
            for name, tensor in network.state_dict().items()
        }

    def save(self, folder: str | Path) -> None:
        """Write `amplified.safetensors` and `amplified.json`: tensors and settings, nothing executable."""
        description = {"settings": self.settings.model_dump(mode="json"), "image_size": self.image_size}
        description |= {"way": self.way, "control_auroc": self.control_auroc}
        write_export(folder, WEIGHTS_FILE, self.state(), DESCRIPTION_FILE, description)


class _Description(Config):
    settings: Amplify
    image_size: int = Field(ge=8, le=1024)
    way: Literal["windows", "whole"]
    control_auroc: float = Field(ge=0, le=1)


def load_amplified(folder: str | Path) -> Amplified:
    """Load what `Amplified.save` wrote.

    Raises:
        Mistake: nothing there, not ours, or damaged.
    """
    described, state = read_export(folder, WEIGHTS_FILE, DESCRIPTION_FILE, _Description, "classifier of seeds")
    settings, path = described.settings, Path(folder) / WEIGHTS_FILE
    if settings.num_networks > len(state):
        raise Mistake(f"{path} holds {len(state)} tensors for {settings.num_networks} networks")
    with torch.device("meta"):  # no memory yet: numbers in a JSON file may ask for any amount
        one = _Classifier(settings.width, described.image_size).state_dict()
    wanted = {f"{number}.{name}": tensor for number in range(settings.num_networks) for name, tensor in one.items()}
    refuse_unlike(state, wanted, path, DESCRIPTION_FILE)
    networks = []
    for number in range(settings.num_networks):
        network = _Classifier(settings.width, described.image_size)
        network.load_state_dict({name: state[f"{number}.{name}"] for name in one})
        refuse_not_finite(network, path)
        networks.append(network.requires_grad_(False).eval())
    return Amplified(settings, networks, described.image_size, described.way, described.control_auroc)


# ------------------------------------------------------------------------------------------------ the rounds


def _of_amplified(content: Any) -> Any:
    return {"score": COLUMN, **content} if isinstance(content, dict) else content


class Rounds(Config):
    """How a classifier becomes a list, and the list the next round's seeds."""

    decision: Annotated[Conformal, BeforeValidator(_of_amplified)] = Conformal(score=COLUMN)
    """Flags samples by their calibrated scores; its `score` is `amplified`."""
    iterations: int = Field(3, ge=1, le=3)
    """Rounds of fitting, scoring and deciding, at most."""
    least_change: float = Field(0.01, ge=0)
    """Changed samples / flagged samples below which another round is not worth it."""


@dataclass(frozen=True, eq=False)
class Amplification:
    """The classifier that the seeds led to, and what it found."""

    amplified: Amplified
    """The classifier of the last round that passed its control, or of the first one."""
    scores: NDArray[np.floating]
    """(N,): that classifier's scores of the corpus."""
    verdict: Verdict
    """The decision on these scores; where the control fails it flags nothing, and its report says so."""
    rounds: list[dict[str, Any]]
    """For each round: num_seeds, way, control_auroc, bar, passes, num_flagged, change."""


def choose_seeds(scores: NDArray[Any], flagged: NDArray[np.bool_], sample_ids: Sequence[str]) -> NDArray[np.intp]:
    """The flagged samples or, where they are fewer than 20, the top 0.05 % of all scores, 20 at least.

    Returns:
        Their places, sorted. Equal scores go by sample id; samples without a score (NaN) are never taken.
    """
    if flagged.sum() >= LEAST_SEEDS:
        return np.flatnonzero(flagged)
    scored = np.flatnonzero(~np.isnan(scores)).tolist()
    count = max(LEAST_SEEDS, round(TOP_SHARE * len(scored)))
    return np.sort(np.array(sorted(scored, key=lambda i: (-scores[i], sample_ids[i]))[:count], dtype=np.intp))


def in_rounds(
    rounds: Rounds,
    seeds: NDArray[np.intp],
    fit: Callable[[int, NDArray[np.intp]], Amplified],
    rescore: Callable[[int, Amplified], tuple[NDArray[np.floating], Verdict]],
    choose: Callable[[NDArray[np.bool_]], NDArray[np.intp]] = np.flatnonzero,
) -> Amplification:
    """Fit on the seeds, rescore the corpus, decide; what is flagged are the next round's seeds.

    It ends after `iterations`, when the list hardly changes, or when the control fails: a first round that fails
    flags nothing, a later one leaves the list of the round before and scores nothing.

    Args:
        rounds: the settings.
        seeds: places in the corpus, such as `choose_seeds` gives.
        fit: the number of the round, from 1, and the seeds to a classifier.
        rescore: the number of the round and its classifier to the scores of the corpus and a decision on them.
        choose: the flagged to the next seeds.
    """
    best: tuple[Amplified, NDArray[np.floating], Verdict] | None = None
    history: list[dict[str, Any]] = []
    for number in range(1, rounds.iterations + 1):
        amplified = fit(number, seeds)
        change = 0.0
        if amplified.passes or best is None:
            scores, verdict = rescore(number, amplified)
            if not amplified.passes:
                verdict = verdict.refused(_failure(amplified))
            before = best[2].flagged if best else np.zeros_like(verdict.flagged)
            change = int((verdict.flagged != before).sum()) / max(1, int(verdict.flagged.sum()))
            best = amplified, scores, verdict
        flagged = best[2].flagged
        history.append(
            {
                "num_seeds": len(seeds),
                "way": amplified.way,
                "control_auroc": amplified.control_auroc,
                "bar": amplified.settings.bar,
                "passes": amplified.passes,
                "num_flagged": int(flagged.sum()),
                "change": change,
            }
        )
        seeds = choose(flagged)
        if not amplified.passes or change < rounds.least_change or len(seeds) < LEAST_SEEDS:
            break
    assert best is not None
    return Amplification(*best, history)


def amplify(
    config: Amplify,
    rounds: Rounds,
    seeds: NDArray[np.intp],
    corpus: Images,
    sample_ids: Sequence[str],
    clean: Images,
    calibration: Images,
    localise: Localise | None,
) -> Amplification:
    """`in_rounds` for a corpus in memory; amplify.py does it for shards.

    Seeds are scored by networks that were trained on them, so a false seed can stay on the list.

    Args:
        config: of the fits.
        rounds: of the rounds.
        seeds: places in the corpus, such as `choose_seeds` gives.
        corpus: (N, H, W, 3) uint8; a memory map will do.
        sample_ids: N of them.
        clean: verified clean images to train with.
        calibration: other clean images, which nothing is fitted on.
        localise: where triggers may be, such as `occlusion_map` says; None compares whole images.

    Raises:
        Mistake: too few images, or of other sizes.
    """
    assert len(corpus) == len(sample_ids), (len(corpus), len(sample_ids))

    def fit(_: int, places: NDArray[np.intp]) -> Amplified:
        images = corpus[places]
        return config.fit(images, None if localise is None else localise(images), clean)

    def rescore(_: int, amplified: Amplified) -> tuple[NDArray[np.floating], Verdict]:
        scores = amplified.score(corpus)
        return scores, rounds.decision.decide(scores, amplified.score(calibration), sample_ids)

    return in_rounds(rounds, seeds, fit, rescore)


def _failure(amplified: Amplified) -> str:
    return (
        f"amplification failed its control: held-out seeds are told from clean images with an AUROC of "
        f"{amplified.control_auroc:.3f}, expected {amplified.settings.bar:.3g} or more; the seeds have nothing "
        "in common that the classifier could learn"
    )
