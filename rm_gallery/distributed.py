"""Where this process runs: rank facts, device, seeds. The only file that asks the environment for them."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import numpy as np
import torch

from rm_gallery.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `world_size` data-parallel processes, and its device."""

    rank: int
    world_size: int
    device: torch.device


def start(device: str = "auto") -> World:
    """Read rank facts and choose a device: `auto` takes a GPU when there is one, else the CPU.

    Raises UserError under more than one process (several ranks are not supported yet), and for `cuda` without a GPU.
    """
    # Schedulers set WORLD_SIZE for other purposes too; a launcher of ours is known by LOCAL_RANK.
    world_size = _number("WORLD_SIZE", 1) if "LOCAL_RANK" in os.environ else 1
    rank = _number("RANK", 0) if world_size > 1 else 0
    if world_size > 1:
        raise UserError(
            f"training on {world_size} processes is not supported yet: start one process "
            "(N_GPUS_PER_NODE=1 and NNODES=1 for run_bt.sh, --nproc_per_node=1 for torchrun)"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device=cuda, but torch finds no GPU; set trainer.device=auto or cpu")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda:
        local_rank = _number("LOCAL_RANK", 0)
        torch.cuda.set_device(local_rank)
        return World(rank, world_size, torch.device("cuda", local_rank))
    return World(rank, world_size, torch.device("cpu"))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"environment variable {name}={text!r} is not a number; unset it, or start with torchrun")
    return int(text)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on all devices; parts of ours that shuffle take generators of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
