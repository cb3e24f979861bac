"""What `jobs/train_simclr.py` trains: an image encoder by SimCLR, without labels, then the DeDe decoder against it.

Two random views of an image should have like embeddings, and the views of all other images of the global batch unlike
ones (Chen et al., arXiv:2002.05709). Read tasks decode the images (dataloader.py), views are made a batch at a time
where the encoder is (augmentation.py), loop.py trains, and now and then a k-NN classifier on labelled images measures
how good the embedding has become. `<output>/simclr` is then a victim of kind `encoder`.

Shapes: B images of a micro-batch, N images of a worker's share, E embedding width, P width of a projection.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.functional import cross_entropy, normalize

from dede_ray.data.images import decode_image
from dede_ray.data.sampling import keyed_uniform, sample_keys
from dede_ray.data.shards import Limits, Sample, list_shards
from dede_ray.models.clip import Normalise
from dede_ray.models.encoders import (
    Architecture,
    Described,
    ResNet,
    build_encoder,
    load_encoder,
    load_strictly,
    save_encoder,
)
from dede_ray.models.victims import EncoderVictim
from dede_ray.runtime.config import Config, Mistake
from dede_ray.training import dataloader
from dede_ray.training.augmentation import NUM_DRAWS, Augmentation, random_views
from dede_ray.training.decoder import SectionSettings
from dede_ray.training.eval_images import find_pictures
from dede_ray.training.loop import Recipe
from dede_ray.training.objective import Batch, Embeddings, Objective, among_all, gather_rows
from dede_ray.training.optimiser import PlainAdam
from dede_ray.training.sections import EncoderSection, refuse_unfit, train_sections
from dede_ray.training.validation import SEED, Backdoor, Crew, Floats, Measurement, SetName, to_be_stamped

logger = logging.getLogger(__name__)

PROJECTION_FILE = "projection.safetensors"

# ------------------------------------------------------------------------------------------------ settings


class Projection(Config):
    """The network between embedding and loss; it is not part of the encoder."""

    hidden: int | None = Field(None, ge=1)
    """Width of the hidden layer; None takes the embedding's."""
    width: int = Field(128, ge=2)
    """P, the width of what is compared."""
    batch_norm: bool = True
    """Normalise the hidden layer, as BadEncoder's has it; CTRL's does not."""


class KnnMonitor(Config):
    """Classify labelled images by the nearest ones of others (Wu et al., arXiv:1805.01978, section 3.4)."""

    every: int = Field(500, ge=0)
    """Steps between measurements; 0: only at the end."""
    memory: str | list[str]
    """Clean shards with labels, among which neighbours are looked for; plain .tar files."""
    test: str | list[str]
    """Clean shards with labels, of other images, which are classified."""
    num_memory: int | None = Field(5_000, ge=1)
    """Images of `memory`, at most, drawn by their ids; null: all."""
    num_test: int | None = Field(1_000, ge=1)
    """Images of `test`, at most, drawn by their ids; null: all."""
    neighbours: int = Field(200, ge=1)
    """Nearest images that vote, with the weight exp(cosine / temperature)."""
    temperature: float = Field(0.5, gt=0)
    """0.5 is BadEncoder's, 0.1 CTRL's."""
    batch_size: int = Field(256, ge=1)
    """Images that each worker embeds at once."""
    backdoor: Backdoor | None = None
    """Attack success rate on the images of `test`; null: not measured."""


class SimclrTrain(PlainAdam):
    """SimCLR; where nothing is set, as BadEncoder's clean encoder was trained (Jia et al., arXiv:2108.00352)."""

    shards: str | list[str]
    """Shards with images: a path, a pattern, or a list of them. Labels and captions are not looked at."""
    architecture: Architecture = Field(ResNet(), discriminator="kind")
    init: str | None = None
    """Folder of a saved encoder of the same architecture to start from; None starts at random."""
    image_size: int = Field(32, ge=8, le=1024)
    """Side of a view in pixels, and of the encoder's input."""
    source_px: int | None = Field(None, ge=8, le=2048)
    """Side of the centre squares that views are cut from; None takes image_size, which is right where the images have
    that size. For 224 px, 320 keeps the detail of small crops."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """The normaliser's mean per RGB channel of pixels in [0, 1]; it stays part of the encoder."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """The normaliser's standard deviation per RGB channel; 0 and 1 are no normaliser, as CTRL has it."""
    projection: Projection = Projection()
    temperature: float = Field(0.5, gt=0)
    """Cosines are divided by it."""
    augmentation: Augmentation = Augmentation(
        min_scale=0.08, max_aspect=4 / 3, flip=True, jitter_probability=0.8, grey_probability=0.2
    )
    """How views are made; default: as SimCLR's for CIFAR-10, without blur."""
    batch_size: int = Field(256, ge=2)
    """Global batch, in images: each view is compared with the 2 * batch_size - 2 views of other images."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per step, for batches that do not fit into memory; each is compared with the whole batch, but
    batch normalisation sees the micro-batch only."""
    shuffle_buffer: int = Field(8192, ge=1)
    """Images that are mixed with each other, beside the shuffling of chunks; read and decoded together."""
    epochs: float = Field(10, gt=0)
    monitor: KnnMonitor | None = None
    """Accuracy, and what a backdoor does, while it trains. Changing it does not make it another run."""

    weight_decay: float = Field(1e-6, ge=0)


class SimclrConfig(SectionSettings):
    """Settings of jobs/train_simclr.py."""

    simclr: SimclrTrain | None = None
    """The encoder, in <output>/simclr."""


# ------------------------------------------------------------------------------------------------ the job


def train(config: SimclrConfig) -> str:
    """Train the encoder, then the decoder against it: see `train_sections`."""
    kind = EncoderSection(
        "simclr", "monitor", _prepare, lambda folder: EncoderVictim(path=folder), "images",
        shown=("knn_accuracy", "attack_success_rate"),
    )  # fmt: skip
    return train_sections(config, kind)


def _prepare(config: SimclrConfig) -> tuple[Recipe, dataloader.Plan]:
    section, limits = config.simclr, config.limits
    assert section is not None
    index = dataloader.index_of(section.shards)
    refuse_unfit(index, limits)
    plan = config.plan(index, section.batch_size, section.epochs, section.shuffle_buffer)
    init = None if section.init is None else str(Path(section.init).absolute())
    monitor = None if section.monitor is None else _Neighbours(section.monitor, section, limits)
    section, on_gpu = section.model_copy(update={"init": init}), config.workers.gpus_per_worker > 0
    return _Recipe(section, limits, config.seed, on_gpu, monitor), plan


@dataclass(frozen=True)
class _Recipe(Recipe):
    section: SimclrTrain
    limits: Limits
    seed: int
    on_gpu: bool
    monitor: _Neighbours | None

    def objective(self, rank: int, world: int) -> Simclr:
        encoder = build_encoder(self.section.architecture)
        if self.section.init is not None:
            started, _ = load_encoder(self.section.init)
            load_strictly(encoder, started.state_dict(), Path(self.section.init))
        objective = Simclr(encoder, self.section, rank, world)
        return synchronise_batch_norms(objective, world, self.on_gpu)

    def decode(self, ref: dataloader.ChunkRef, epoch: int, start: int, samples: list[Sample]) -> dataloader.Decoded:
        size = self.section.source_px or self.section.image_size
        kept, errors = dataloader.decode_samples(
            ref, samples, lambda sample, content, name: {"image": decode_image(content, self.limits, size)}
        )
        columns = {
            "image": dataloader.stacked(kept["image"], (size, size, 3)),
            "key": sample_keys(kept["name"], self.seed, epoch).numpy(),
            "sample_id": dataloader.id_column(kept["name"]),
        }
        return columns, errors

    def reader(self) -> dataloader.Decode:
        return replace(self, monitor=None).decode

    def validate(self, objective: Any, device: torch.device, rank: int, world: int) -> dict[str, float]:
        return {} if self.monitor is None else self.monitor.run(objective.encoder, device, torch.float32, rank, world)

    def export(self, folder: Path, objective: Any) -> dict[str, Any]:
        """The encoder; and beside it the projection, which attacks on the loss itself need."""
        section = self.section
        described = Described(section.architecture, section.image_size, section.mean, section.std)
        save_encoder(folder, objective.encoder, described)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in objective.projection.state_dict().items()}
        save_file(state, folder / PROJECTION_FILE)
        return {}


# ------------------------------------------------------------------------------------------------ the objective


class Simclr(Objective):
    """NT-Xent over the global batch (Chen et al., arXiv:2002.05709, equation 1).

    Loss and gradients equal those of one process that holds the whole batch, whatever the number of workers and
    micro-batches (see objective.py).

    Args:
        encoder: normalised pixels (B, 3, S, S) -> embeddings (B, E); has `embedding_dim`.
        section: views, projection and temperature.
        rank, world: this worker and the number of workers.
    """

    def __init__(self, encoder: nn.Module, section: SimclrTrain, rank: int = 0, world: int = 1):
        super().__init__()
        self.encoder, self.section, self.rank, self.world = encoder, section, rank, world
        self.normalise = Normalise(list(section.mean), list(section.std))
        shape, width = section.projection, int(encoder.embedding_dim)  # type: ignore[arg-type]
        hidden = shape.hidden or width
        self.projection = nn.Sequential(
            nn.Linear(width, hidden, bias=not shape.batch_norm),
            *([nn.BatchNorm1d(hidden)] if shape.batch_norm else []),
            nn.ReLU(),
            nn.Linear(hidden, shape.width),
        )

    def views(self, batch: Batch) -> Tensor:
        """Two views of each image, by its key alone: float32 (2B, 3, S, S) in [0, 1], first all first ones."""
        draw_BK = keyed_uniform(batch["key"], 2 * NUM_DRAWS)
        size, settings = self.section.image_size, self.section.augmentation
        return torch.cat([random_views(settings, batch["image"], size, draw) for draw in draw_BK.split(NUM_DRAWS, 1)])

    def encode(self, batch: Batch) -> Embeddings:
        """Project both views of a micro-batch.

        Args:
            batch: image uint8 (B, H, H, 3), key int64 (B,).

        Returns:
            float32 (B, P) of length one for either view.
        """
        image_BCHW = self.normalise(self.views(batch)).to(next(self.projection.parameters()).dtype)
        embedding_BE = self.encoder(image_BCHW.contiguous(memory_format=torch.channels_last))
        first_BP, second_BP = normalize(_at_least_float32(self.projection(embedding_BE))).chunk(2)
        return {"first": first_BP, "second": second_BP}

    def loss(self, views: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of a worker's whole share (N, P) against all workers', and metrics.

        The mean over the workers is the loss of the global batch.
        """
        mine_MP = torch.cat([views["first"], views["second"]])
        count, device = len(mine_MP), mine_MP.device
        everyone_GP = gather_rows(mine_MP, self.world)
        own_M = torch.arange(count, device=device)
        partner_M = self.rank * count + (own_M + count // 2) % count
        cosine_MG = mine_MP @ everyone_GP.T
        logits_MG = cosine_MG / self.section.temperature
        logits_MG = logits_MG.index_put((own_M, self.rank * count + own_M), logits_MG.new_tensor(-torch.inf))
        with torch.no_grad():
            found = (logits_MG.argmax(dim=1) == partner_M).float().mean()
            cosine = cosine_MG.gather(1, partner_M.unsqueeze(1)).mean()
        return cross_entropy(logits_MG, partner_M), {"partner_found": found, "cosine": cosine}

    def forward(
        self, batch: Batch, cached: list[Embeddings] | None = None, piece: int = 0, only_encode: bool = False
    ) -> Any:
        """Loss and metrics of a batch; see `backward` for the other arguments."""
        views = self.encode(batch)
        if only_encode:
            return views
        if cached is not None:
            views = among_all(views, cached, piece)
        with torch.autocast(views["first"].device.type, enabled=False):
            return self.loss(views)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def synchronise_batch_norms(model: Any, world: int, on_gpu: bool) -> Any:
    """Let batch normalisation see all workers' images, as SimCLR needs: a worker's own would give partners away.

    torch's SyncBatchNorm is for GPUs only; on CPUs `_WholeBatchNorm` does the same.
    """
    if world == 1:
        return model
    if on_gpu:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = _WholeBatchNorm  # same parameters, same buffers, same names
    return model


class _WholeBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation by the statistics of all workers' shares, which are of one size."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        world = torch.distributed.get_world_size()
        dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        mean_C = all_reduce(_at_least_float32(x).mean(dim=dims)) / world
        centred = x - mean_C.view(shape)
        variance_C = all_reduce(centred.square().mean(dim=dims)) / world
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            count, share = world * x.numel() / x.shape[1], self.momentum or 0.1
            with torch.no_grad():
                self.running_mean.lerp_(mean_C, share)
                self.running_var.lerp_(variance_C * count / (count - 1), share)
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        scaled = centred * (self.weight * (variance_C + self.eps).rsqrt()).view(shape) + self.bias.view(shape)
        return scaled.to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        pass


# ------------------------------------------------------------------------------------------------ the monitor


class _Neighbours(Measurement):
    """Measures an encoder: `run` returns knn_accuracy and, with a backdoor, clean_accuracy and attack_success_rate."""

    def __init__(self, config: KnnMonitor, section: SimclrTrain, limits: Limits):
        self.config = config
        pictures = {
            name: find_pictures(list_shards(shards), "label", num, SEED, limits)
            for name, shards, num in (
                ("memory", config.memory, config.num_memory),
                ("clean", config.test, config.num_test),
            )
        }
        labels = [picture.label or 0 for some in pictures.values() for picture in some]
        if min(labels) < 0:
            raise Mistake(f"label {min(labels)} in the shards of simclr.monitor; labels count from 0")
        self.num_classes, trigger = max(labels) + 1, None
        if config.backdoor is not None:
            trigger, self.target, stamped = to_be_stamped(config.backdoor, pictures["clean"], self.num_classes)
            pictures["triggered"] = stamped
        normalise = Normalise(list(section.mean), list(section.std))
        super().__init__(pictures, trigger, section.image_size, normalise, config.batch_size, limits)  # type: ignore[arg-type]

    def forward(self, model: Any, image_BCHW: Tensor) -> Tensor:
        return model(image_BCHW)

    def measure(self, crew: Crew) -> dict[str, float]:
        memory = self.pictures["memory"]
        memory_NE, readable_N = self.embed(crew, "memory")
        memory_NE = crew.gather(memory_NE, len(memory))
        readable_N = crew.gather(readable_N[:, None].astype(np.float32), len(memory))[:, 0] > 0
        label_N = np.array([picture.label for picture in memory])
        known = memory_NE[readable_N], label_N[readable_N]
        accuracy = self._share(crew, "clean", known)
        if self.trigger is None:
            return {"knn_accuracy": accuracy}
        success = self._share(crew, "triggered", known)
        return {"knn_accuracy": accuracy, "clean_accuracy": accuracy, "attack_success_rate": success}

    def _share(self, crew: Crew, name: SetName, known: tuple[Floats, NDArray[np.int64]]) -> float:
        """Share of the images that are taken for their class, or for the target."""
        embedding_NE, readable_N = self.embed(crew, name)
        pictures = self.pictures[name]
        mine = [pictures[i].label for i in crew.share(len(pictures))]
        wanted_N = np.array([self.target] * len(mine) if name == "triggered" else mine, np.int64)
        config = self.config
        found_N = knn_classify(embedding_NE, *known, self.num_classes, config.neighbours, config.temperature)
        num, hits = crew.sums(int(readable_N.sum()), int((found_N == wanted_N)[readable_N].sum()))
        return hits / num


def knn_classify(
    query_NE: Floats,
    memory_ME: Floats,
    label_M: NDArray[np.int64],
    num_classes: int,
    neighbours: int = 200,
    temperature: float = 0.5,
) -> NDArray[np.int64]:
    """Take each query for the class that its nearest neighbours by cosine vote for with weights exp(cosine / t): (N,).

    Source: Wu et al., arXiv:1805.01978, section 3.4.
    """
    memory_EM = normalize(torch.from_numpy(memory_ME)).T
    votes_MC = torch.nn.functional.one_hot(torch.from_numpy(label_M), num_classes).float()
    found = [torch.empty(0, dtype=torch.int64)]
    for query_BE in torch.from_numpy(query_NE).split(1024):
        cosine_BK, place_BK = (normalize(query_BE) @ memory_EM).topk(min(neighbours, len(label_M)), dim=1)
        weight_BK1 = ((cosine_BK - 1) / temperature).exp().unsqueeze(2)
        found.append((weight_BK1 * votes_MC[place_BK]).sum(dim=1).argmax(dim=1))
    return torch.cat(found).numpy()
