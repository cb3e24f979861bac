"""Do two encoders agree about an image? Cross-encoder consistency (XC): a backdoor breaks the agreement in one only.

What the victim f says of a clean image can be predicted, up to a residual, from what an independent encoder g says of
it; of a triggered image it cannot, because g never learnt the backdoor. Conditioning on g also cancels how hard or how
unusual the image is. After the Platonic Representation Defense (arXiv:2606.29451, 2026), of which only the abstract
was public: the closed form, the neighbours and the contrastive form here are ours.

g must be trusted: other data, another owner. Where its domain is another than the corpus', residuals are large for
all samples; `fit` measures how much of f the map explains, and refuses where that is too little.

Shapes: B samples, N samples of the fitting set, M references, E width of the victim's embedding, R of the reference
encoder's, k neighbours. All embeddings are brought to length one; all arithmetic of scores is float64, so that float32
scores do not depend on the batch.
"""

from __future__ import annotations

import logging
import math
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dede_ray.detectors.contract import (
    DetectorSettings,
    DrawnFrom,
    Scorer,
    State,
    as_scores,
    residual_projection,
    state_fingerprint,
)
from dede_ray.detectors.density import References
from dede_ray.models.embedding import Batch, Need
from dede_ray.models.victims import Victim
from dede_ray.runtime.config import Config, Mistake

logger = logging.getLogger(__name__)

Form = Literal["closed", "overlap", "neighbours", "contrastive"]

COLUMNS: dict[Form, tuple[str, ...]] = {
    "closed": ("xc_misplaced", "xc", "xc_whitened"),
    "overlap": ("xc_overlap", "xc_gap"),
    "neighbours": ("xc_neighbours",),
    "contrastive": ("xc_contrastive",),
}

FITTED: dict[Form, str] = {"closed": "map", "contrastive": "victim.0.weight"}
"""A tensor of the state that only this form has."""

TIE = 1e-6
"""Distances, of embeddings of length one, that differ by less are equal: those of copies differ by rounding."""

HELD_OUT = 0.2
"""Share of the fitting set that the agreement is measured on."""


class Heads(Config):
    """The contrastive form's two MLP heads, and how they are trained."""

    width: int = Field(256, ge=1)
    """Width of the hidden layer and of the space in which the encoders are compared."""
    temperature: float = Field(0.07, gt=0)
    epochs: int = Field(5, ge=1)
    batch_size: int = Field(512, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW's at the beginning; falls to 0 along a cosine."""


class Consistency(DetectorSettings):
    """How far the victim's embedding v is from what the reference encoder's u makes one expect.

    `closed`: a ridge map u -> v, fitted without the samples that look most misplaced, because poison in the fitting
    set bends it. `xc` is the squared length of the residual e, `xc_whitened` e' S^-1 e (S: the residuals'
    covariance after Ledoit & Wolf, 2004), and `xc_misplaced` the length of e less `company_weight` times the mean
    distance of v to its nearest references: a poisoned sample is far from where it belongs and yet in company, an odd
    clean one is far from all others. Both lengths are halfway between the plain and the whitened one.
    `overlap`: how few of the k nearest references in one space are so in the other (`xc_overlap`, in [0, 1]), and how
    much further v is from the k nearest in u's space than from its own k nearest (`xc_gap`).
    `neighbours`: squared distance of v to the mean of the victim's embeddings of the k nearest in u's space; a map
    that is not linear.
    `contrastive`: two heads trained to match each v to its u; the logarithm of p(v) / p(v | u) as they see
    it, against the references.

    Where only one column is wanted, it is `xc_misplaced`. The defaults were chosen on the images that they were
    measured on: six CIFAR-10 victims (NAD's grid, BadEncoder, DRUPE, BadNets, a CLIP's patch, BadCLIP; 10,000 images to
    fit on, of which 0, 0.1 or 1 % are triggered) with ResNet-56 as the reference encoder, AUROC 0.92 to 1.00; the
    stiff maps on ResNet-20 as well. With a small self-supervised reference encoder BadCLIP falls to 0.73. On
    BadEncoder and DRUPE `xc_whitened` has no sample above the 99th percentile of clean ones. A trigger that upsets
    the reference encoder too (a large checkerboard, ResNet-20) makes an honest victim look guilty: look at the same
    images under an honest twin.
    """

    kind: Literal["consistency"] = "consistency"
    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})
    fits: ClassVar[bool] = True
    forms: list[Form] = Field(["closed"], min_length=1)
    """Which columns there are."""
    drawn_from: DrawnFrom = "pool"
    """What is fitted on: corpus and calibration samples in one heap, or other samples, which are clean."""
    ridge: float = Field(1e-3, gt=0)
    """Ridge penalty of the map, in units of the mean variance of u's components."""
    stiff_ridge: float = Field(1.0, gt=0)
    """Ridge penalty of the maps that choose what the last one is fitted on."""
    trim: float = Field(0.1, ge=0, le=0.5)
    """Share of the fitting set, that which looks most misplaced, that the next fit leaves out: several times the
    poison."""
    rounds: int = Field(5, ge=0)
    """How often what is left out is chosen again."""
    min_agreement: float = Field(0.3, ge=0, le=1)
    """Share of v's variance (R^2, on held-out samples of the fitting set) that the map has to explain."""
    num_references: int = Field(4096, ge=2)
    """M, the size of the frozen set that neighbours are looked for in; of the fitting set."""
    k: int = Field(32, ge=1)
    """Neighbours that count."""
    company_weight: float = Field(1.0, ge=0)
    """What the distance to neighbours counts in `xc_misplaced`, and in what is left out."""
    softness: float = Field(1.0, ge=0)
    """Lengths of `xc_misplaced` are whitened by S + softness * mean variance: 0 is whitened, very large plain."""
    heads: Heads = Heads()
    """Settings of the contrastive form."""
    seed: int = 0
    """Draws the references and the held-out samples, and trains the heads."""

    @property
    def gives(self) -> tuple[str, ...]:
        return tuple(name for form, names in COLUMNS.items() if form in self.forms for name in names)

    def fit(self, pool: Batch, clean: Batch | None) -> State:
        """Fit the map, measure the agreement, draw the references; train the heads where they are asked for."""
        source = self.drawn(self.drawn_from, pool, clean)
        victim_NE, reference_NR = (_unit(part.cpu()) for part in (source.embedding_BE, source.references))
        needed = max(self.k + 1, 2 * reference_NR.shape[1])
        if self.num_references <= self.k:
            raise Mistake(f"consistency: num_references is {self.num_references}, and has to be more than k = {self.k}")
        if len(source) < needed:
            raise Mistake(
                f"consistency: {len(source):,} samples to fit on; a reference encoder of width "
                f"{reference_NR.shape[1]} and k = {self.k} take at least {needed:,}"
            )
        order_N = source.keys(self.seed).argsort()
        agreement = self._agreement(victim_NE[order_N], reference_NR[order_N])
        if not agreement >= self.min_agreement:
            raise Mistake(
                f"consistency: the reference encoder explains {agreement:.0%} of what the victim says of samples that "
                f"the map was not fitted on, less than min_agreement = {self.min_agreement:.0%}; their residuals "
                "would mean little. Take a reference encoder that is closer to these images, or fit on more samples"
            )
        logger.info("consistency: the reference encoder explains %.0f %% of what the victim says", 100 * agreement)
        drawn = source.part(order_N[: self.num_references].sort().values.tolist())
        company = References(_unit(drawn.embedding_BE.cpu()), drawn.keys(0), self.k)
        key_N = source.keys(0)
        isolation_N = torch.cat(
            [
                company.nearest(victim_NE[rows], key_N[rows])[0].mean(dim=1)
                for rows in (slice(start, start + 1024) for start in range(0, len(source), 1024))
            ]
        )
        found = _robust_map(
            victim_NE,
            reference_NR,
            self.company_weight * isolation_N,
            self.ridge,
            self.stiff_ridge,
            self.trim,
            self.rounds,
        )
        state = {
            "agreement": torch.tensor([agreement], dtype=torch.float64),
            "victim_mean": found.victim_mean_E,
            "reference_mean": found.reference_mean_R,
            "victim_references": drawn.embedding_BE.cpu(),
            "trusted_references": drawn.references.cpu(),
            "key": drawn.keys(0),
        }
        if "closed" in self.forms:
            residual_NE = found.residual(victim_NE, reference_NR)[found.kept_N]
            state |= {"map": found.map_RE, **_metrics(residual_NE, self.softness)}
        if "contrastive" in self.forms:
            state |= _train_heads(
                self.heads,
                self.seed,
                (victim_NE - found.victim_mean_E)[found.kept_N],
                (reference_NR - found.reference_mean_R)[found.kept_N],
            )
        return {name: tensor.contiguous() for name, tensor in state.items()}

    def _agreement(self, victim_NE: Tensor, reference_NR: Tensor) -> float:
        """R^2 of the map on the first fifth, fitted on the rest; all components together."""
        held = max(1, round(HELD_OUT * len(victim_NE)))
        found = _Map(victim_NE[held:], reference_NR[held:], self.ridge, torch.arange(len(victim_NE) - held))
        residual_NE = found.residual(victim_NE[:held], reference_NR[:held])
        spread = float((victim_NE[:held] - victim_NE[:held].mean(dim=0)).square().mean())
        is_constant = spread < 1e-12  # says the same of every image: there is nothing to explain
        return 0.0 if is_constant else 1 - float(residual_NE.square().mean()) / spread

    def open(self, victim: Victim, state: State) -> Scorer:
        width = state["victim_mean"].shape[0]
        if width != victim.embedding_dim:
            raise Mistake(
                f"consistency was fitted to embeddings of width {width}, victim {victim.name} gives "
                f"{victim.embedding_dim}; fit it to this victim"
            )
        missing = [form for form, name in FITTED.items() if form in self.forms and name not in state]
        if missing:
            raise Mistake(f"consistency was fitted without the form {missing[0]}; fit it again, or leave the form out")
        return _ConsistencyScorer(self, victim.device, state)


class _ConsistencyScorer:
    controls: tuple[str, ...] = ()

    def __init__(self, config: Consistency, device: torch.device, state: State):
        self.columns = config.gives
        self.fingerprint = state_fingerprint(config, state)
        self.config, self.forms = config, config.forms
        self.state = {name: tensor.to(device) for name, tensor in state.items() if name != "key"}
        victim_ME, reference_MR = (_unit(self.state[f"{name}_references"]) for name in ("victim", "trusted"))
        self.vectors: dict[str, int] = {}
        if "closed" in self.forms:
            self.company = References(victim_ME @ self.state["soft_root"], state["key"], config.k)
            self.projection_ER = residual_projection(victim_ME.shape[1]).to(device)
            self.vectors = {"xc_residual": self.projection_ER.shape[1]}
        if {"overlap", "neighbours"} & set(self.forms):
            self.near_f, self.near_g = (References(part, state["key"], config.k) for part in (victim_ME, reference_MR))
        if "contrastive" in self.forms:
            self.bank_MH = _head(self.state, "victim", victim_ME - self.state["victim_mean"])

    @torch.inference_mode()
    def score(self, batch: Batch, with_vectors: bool = False) -> dict[str, np.ndarray]:
        victim_BE, reference_BR, config = _unit(batch.embedding_BE), _unit(batch.references), self.config
        key_B = batch.keys(0)
        scores: dict[str, Tensor] = {}
        if "closed" in self.forms:
            expected_BE = (reference_BR - self.state["reference_mean"]) @ self.state["map"] + self.state["victim_mean"]
            residual_BE = victim_BE - expected_BE
            scores["xc"] = residual_BE.square().sum(dim=1)
            scores["xc_whitened"] = (residual_BE @ self.state["precision"] * residual_BE).sum(dim=1)
            distance_Bk, _ = self.company.nearest(victim_BE @ self.state["soft_root"], key_B)
            whitened_BE = residual_BE @ self.state["soft_root"]
            if with_vectors:
                scores["xc_residual"] = whitened_BE @ self.projection_ER
            length_B = whitened_BE.norm(dim=1)
            scores["xc_misplaced"] = length_B - config.company_weight * distance_Bk.mean(dim=1)
        if "overlap" in self.forms:
            distance_BM = self.near_f.distances(victim_BE, key_B)
            own_Bk = distance_BM.topk(config.k, dim=1, largest=False).values
            there_Bk = distance_BM.gather(1, self.near_g.nearest(reference_BR, key_B)[1])
            # By distance and not by index: which of several equal references is the k-th would depend on rounding.
            is_shared_Bk = there_Bk <= own_Bk[:, -1:] + TIE
            scores["xc_overlap"] = 1 - is_shared_Bk.double().mean(dim=1)
            scores["xc_gap"] = there_Bk.mean(dim=1) - own_Bk.mean(dim=1)
        if "neighbours" in self.forms:
            _, trusted_Bk = self.near_g.nearest(reference_BR, key_B)
            expected_BE = functional.embedding_bag(trusted_Bk, self.near_f.reference_ME, mode="mean")
            scores["xc_neighbours"] = (victim_BE - self.near_f.centre_E - expected_BE).square().sum(dim=1)
        if "contrastive" in self.forms:
            victim_BH = _head(self.state, "victim", victim_BE - self.state["victim_mean"])
            reference_BH = _head(self.state, "trusted", reference_BR - self.state["reference_mean"])
            others_B = (reference_BH @ self.bank_MH.T / config.heads.temperature).logsumexp(dim=1)
            scores["xc_contrastive"] = others_B - (victim_BH * reference_BH).sum(dim=1) / config.heads.temperature
        return as_scores({name: scores[name] for name in (*self.columns, *self.vectors) if name in scores})


def _unit(rows: Tensor) -> Tensor:
    """float64, each row of length one."""
    return functional.normalize(rows.double(), dim=1)


# ------------------------------------------------------------------------------------------------ the closed form


class _Map:
    """An affine map u -> v.

    Args:
        victim_NE: v, float64.
        reference_NR: u, float64.
        ridge: in units of the mean variance of u's components.
        kept_N: indices of the samples to fit on.
    """

    def __init__(self, victim_NE: Tensor, reference_NR: Tensor, ridge: float, kept_N: Tensor):
        self.kept_N = kept_N
        self.victim_mean_E, self.reference_mean_R = victim_NE[kept_N].mean(dim=0), reference_NR[kept_N].mean(dim=0)
        centred_NE, centred_NR = victim_NE[kept_N] - self.victim_mean_E, reference_NR[kept_N] - self.reference_mean_R
        gram_RR = centred_NR.T @ centred_NR
        gram_RR.diagonal().add_(ridge * gram_RR.diagonal().mean().clamp_min(1e-12))
        self.map_RE = torch.linalg.solve(gram_RR, centred_NR.T @ centred_NE)

    def residual(self, victim_NE: Tensor, reference_NR: Tensor) -> Tensor:
        """What of v the map does not explain."""
        return victim_NE - self.victim_mean_E - (reference_NR - self.reference_mean_R) @ self.map_RE


def _metrics(residual_NE: Tensor, softness: float) -> State:
    """The inverse of the residuals' covariance, and a root of the inverse of the softened one."""
    from sklearn.covariance import ledoit_wolf  # seconds of import, which scoring actors need not pay

    covariance_EE = torch.from_numpy(ledoit_wolf(residual_NE.numpy())[0])
    softened_EE = covariance_EE.clone()
    softened_EE.diagonal().add_(softness * covariance_EE.diagonal().mean())
    root_EE = torch.linalg.cholesky(torch.linalg.inv(softened_EE))
    return {"precision": torch.linalg.inv(covariance_EE), "soft_root": root_EE}


def _robust_map(
    victim_NE: Tensor,
    reference_NR: Tensor,
    credit_N: Tensor,
    ridge: float,
    stiff_ridge: float,
    trim: float,
    rounds: int,
) -> _Map:
    """Trimmed least squares: fit stiffly, leave out the share `trim` with the largest residuals, again; then fit.

    Poison that the reference encoder sees well bends a map towards itself and has small residuals: trimming by those
    alone keeps it. So the maps that choose are stiff, too stiff to follow a rare direction, and `credit_N` is taken
    off the residual's length.

    Source: the concentration steps of Rousseeuw & Van Driessen, Data Mining and Knowledge Discovery 2006, from the
    fit to everything instead of from random subsets; stiffness and credit are ours.
    """
    kept_N = torch.arange(len(victim_NE))
    num_kept = len(victim_NE) - math.floor(trim * len(victim_NE))
    for _ in range(rounds):
        residual_NE = _Map(victim_NE, reference_NR, stiff_ridge, kept_N).residual(victim_NE, reference_NR)
        chosen_N = (residual_NE.norm(dim=1) - credit_N).argsort(stable=True)[:num_kept].sort().values
        if torch.equal(chosen_N, kept_N):
            break
        kept_N = chosen_N
    return _Map(victim_NE, reference_NR, ridge, kept_N)


# ------------------------------------------------------------------------------------------- the contrastive form


def _train_heads(config: Heads, seed: int, victim_NE: Tensor, reference_NR: Tensor) -> State:
    """Train two heads on the centred embeddings that the map kept: each sample's two against its batch's (InfoNCE).

    The scale of the inputs is multiplied into the first layers, which then read centred embeddings as they are.
    """
    parts = {"victim": victim_NE, "trusted": reference_NR}
    scales = {name: float(part.square().mean().sqrt().clamp_min(1e-12)) for name, part in parts.items()}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(part.shape[1], config.width), nn.ReLU(), nn.Linear(config.width, config.width)
                )
                for name, part in parts.items()
            }
        )
        inputs = {name: (part / scales[name]).float() for name, part in parts.items()}
        num = len(victim_NE)
        batch_size = min(config.batch_size, num)
        num_steps = config.epochs * (num // batch_size)
        optimiser = torch.optim.AdamW(heads.parameters(), config.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
        for _ in range(config.epochs):
            for rows in torch.randperm(num)[: num - num % batch_size].split(batch_size):
                out = {name: functional.normalize(heads[name](inputs[name][rows]), dim=1) for name in parts}
                logits_BB = out["trusted"] @ out["victim"].T / config.temperature
                own_B = torch.arange(len(rows))
                loss = functional.cross_entropy(logits_BB, own_B) + functional.cross_entropy(logits_BB.T, own_B)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    state = {name: tensor.detach() for name, tensor in heads.state_dict().items()}
    for name in parts:
        state[f"{name}.0.weight"] = state[f"{name}.0.weight"] / scales[name]
    return state


def _head(state: State, name: str, centred_BX: Tensor) -> Tensor:
    """What a head makes of centred embeddings: float64 (B, H), of length one."""
    first, last = ({part: state[f"{name}.{layer}.{part}"].double() for part in ("weight", "bias")} for layer in (0, 2))
    hidden_BH = functional.linear(centred_BX, **first).relu()
    return functional.normalize(functional.linear(hidden_BH, **last), dim=1)
