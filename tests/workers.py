"""A worker of a test that trains on several processes: they meet over a file, on CPU, and compile nothing."""

from __future__ import annotations

import os

import torch


def meet(rank: int, world: int, folder: object) -> None:
    """Make this process worker `rank` of `world`; `folder` is empty at first and the same for all of them."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"
    )
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would want a compiler
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world
    )
    deepspeed.init_distributed()
