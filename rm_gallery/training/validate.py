"""Validation: one pass over all validation data; nothing of the model or the run changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rm_gallery.data.batch import collate
from rm_gallery.data.packing import plan_step
from rm_gallery.data.token_data import TokenData
from rm_gallery.distributed import rank, world_size
from rm_gallery.metrics import Sums, means
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.objectives import Objective

_GROUPS_AT_ONCE = 4096  # packs are planned over so many groups, so that little memory is needed for any number


def validate(
    model: RewardModel, data: TokenData, objective: Objective, *, token_budget: int, device: torch.device | None = None
) -> dict[str, float]:
    """val/loss, val/accuracy and mean rewards over every comparison; each process does its share, and gets them all.

    token_budget: tokens of a micro-batch; the figures do not depend on it (float64 sums of float32 rewards).
    device: where the model computes, unless its weights lie there too.
    """
    device = device or next(model.parameters()).device
    sums = Sums()
    with model.inference():
        for pack in plan_packs(data, token_budget=token_budget, padded=model.padded):
            batch = collate([data[index] for index in pack]).to(device)
            sums.add(objective(model(batch), batch)[1])
    return means(sums.read(), "val")


def plan_packs(data: TokenData, *, token_budget: int, padded: bool) -> Sequence[list[int]]:
    """This process's share of all groups in micro-batches, in any order; each process gets equally many, some empty."""
    packs: list[list[int]] = []
    for start in range(0, len(data), _GROUPS_AT_ONCE):
        groups = np.arange(start, min(start + _GROUPS_AT_ONCE, len(data)))
        step = plan_step(groups, data.sizes, token_budget=token_budget, world_size=world_size(), padded=padded)
        packs += step.packs[rank()]
    return packs
