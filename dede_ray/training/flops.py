"""Utilisation: the arithmetic that a training step needs, compared with what the device can do in the same time.

`flop_per_sample` counts the operations on a copy of the model, so that nothing of the run is touched; `matmul_rate`
measures the device while it does nothing but multiply matrices. Operations per second of a step's time, divided by that
rate, are the utilisation that metrics.jsonl reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


def flop_per_sample(build: Callable[[], nn.Module], batch: dict[str, np.ndarray]) -> float:
    """Floating-point operations of forward and backward pass; what is computed twice to save memory counts once.

    Args:
        build: makes an objective, forward(batch) -> (loss, metrics), as a single worker has it.
        batch: arrays with a row per sample, of which only shapes and types matter.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            return _count(build().to("meta"), batch, "meta")
        except RuntimeError:  # what is computed depends on the numbers: masks, safe sets
            return _count(build(), batch, "cpu")


def _count(objective: Any, batch: dict[str, np.ndarray], device: str, num: int = 2) -> float:
    for module in objective.modules():
        if hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = False
    objective.begin_step(0)
    rows = {
        name: torch.from_numpy(np.zeros((num, *column.shape[1:]), column.dtype)).to(device)
        for name, column in batch.items()
    }
    with torch.compiler.set_stance("force_eager"), counted() as counter:  # it sees no compiled code
        loss, _ = objective(rows)
        loss.backward()
    return counter.get_total_flops() / num


@contextmanager
def counted() -> Iterator[Any]:
    """Counts floating-point operations; attention is the plain one, as the counter knows fused kernels on some devices
    only."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def matmul_rate(device: torch.device | str, precision: str, limit_s: float = 0.3) -> float:
    """FLOP/s of products of two square matrices, with the threads and settings of this process; the best of several.

    Args:
        precision: fp32, bf16 or fp16.
        limit_s: how long to measure, at least twice in any case.
    """
    is_cuda = torch.device(device).type == "cuda"
    size, at_once = (8192, 4) if is_cuda else (1024, 1)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    # Random numbers cost a GPU more power than equal ones; they are drawn by a generator of their own.
    rng = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, generator=rng).to(dtype)
    best, began, num = 0.0, time.monotonic(), 0
    while num < 2 or time.monotonic() - began < limit_s:
        started = time.monotonic()
        for _ in range(at_once):
            c = a @ b
        float(c[0, 0])  # waits for it
        best, num = max(best, at_once * 2 * size**3 / (time.monotonic() - started)), num + 1
    return best
