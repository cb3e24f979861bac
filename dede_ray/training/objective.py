"""What a trainer trains: the interface between loop.py and the methods, and one step's forward and backward pass.

Every worker holds its share of the global batch, and with accumulation each share is cut into micro-batches. Where the
loss compares all samples of the batch with each other (CLIP, SimCLR), `backward` embeds everything without gradients,
then once more micro-batch by micro-batch, each among the others' cached embeddings (the gradient cache of Gao et al.,
arXiv:2101.06983).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

Batch = dict[str, Tensor]
Embeddings = dict[str, Tensor]


class Objective(nn.Module):
    """The thing that DeepSpeed wraps: forward(batch) -> (loss, metrics).

    The loss () is that of this worker's share, so that the mean over the workers is that of the global batch. An
    objective that allows accumulation also takes `cached`, `piece` and `only_encode`, as `backward` gives them.
    """

    def begin_step(self, step: int) -> None:
        """Called before each step, for methods whose loss depends on it."""

    def after_step(self) -> None:
        """Called after each step, for what the optimiser does not do."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold beside weights and optimiser; the same on every worker."""
        return {}

    def load_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take up what `arrays` gave."""


class InEvalMode(Objective):
    """An objective whose networks stay in eval mode, so that BatchNorm keeps its statistics."""

    def train(self, mode: bool = True) -> InEvalMode:
        """Stay in eval mode."""
        return super().train(False)


def gather_rows(rows: Tensor, world: int) -> Tensor:
    """All workers' rows, in order of rank; gradients go back to where the rows came from."""
    return rows if world == 1 else torch.cat(all_gather(rows))


def among_all(own: Embeddings, cached: list[Embeddings], piece: int) -> Embeddings:
    """A micro-batch's embeddings, with gradients, among the cached ones of the other micro-batches of the share."""
    return {
        name: torch.cat([rows if i == piece else other[name] for i, other in enumerate(cached)])
        for name, rows in own.items()
    }


def backward(
    engine: Any, batch: Batch, accumulation: int = 1, reseed: Callable[[int], object] = lambda piece: None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward of one worker's share of a step through a DeepSpeed engine.

    Args:
        engine: wraps an `Objective`; its `gradient_accumulation_steps` must be `accumulation`.
        batch: the share, every tensor N rows.
        accumulation: number of micro-batches; divides N. The batch that is compared stays the whole one.
        reseed: called before each micro-batch is embedded, so that both times dropout drops the same.

    Returns:
        This worker's loss () and metrics, detached.
    """
    if accumulation == 1:
        reseed(0)
        loss, metrics = engine(batch)
        engine.backward(loss)
        return loss.detach(), metrics
    size = len(next(iter(batch.values()))) // accumulation
    pieces = [{name: rows[i * size : (i + 1) * size] for name, rows in batch.items()} for i in range(accumulation)]
    cached: list[Embeddings] = []
    with torch.no_grad(), _batch_norms_unmoved(engine.module):
        for i, piece in enumerate(pieces):
            reseed(i)
            cached.append(engine(piece, only_encode=True))
    for i, piece in enumerate(pieces):
        reseed(i)
        loss, metrics = engine(piece, cached=cached, piece=i)
        engine.backward(loss * accumulation)  # DeepSpeed divides by it; the loss is the whole batch's already
        if i + 1 < accumulation:
            engine.step()  # counts the micro-batch; DeepSpeed moves the weights at the last one
    return loss.detach(), metrics


def share_gradient(value: Any, count: int) -> Any:
    """The same value with a gradient `count` times smaller: each micro-batch gives it that of the whole batch."""
    return None if value is None else value.detach() + (value - value.detach()) / count


@contextlib.contextmanager
def _batch_norms_unmoved(model: nn.Module) -> Iterator[None]:
    """Normalise by the batch's statistics, but do not count them twice into the running ones."""
    moved = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for module in moved:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in moved:
            module.track_running_stats = True
