"""One step of each objective on a rank of several: its loss, gradient norm and metrics."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rm_gallery.data.batching.bin_packing import Packer
from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.batching.prompt_sharing import plan_step
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.data.tokenization.token_group import Origin, TokenGroup, split_prefix
from rm_gallery.distributed.process_group import World, processes
from rm_gallery.objectives import OBJECTIVES, build_objective
from rm_gallery.objectives.metrics import Sums
from rm_gallery.schema import Comparison, Rating
from tests.training.process_checks import Built, build

BOUNDED = {"center_coefficient": 0.05, "reward_l2": 0.05}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, BOUNDED) for name in OBJECTIVES if name not in ("attributes", "sft")},
    "margin hinge": ("margin", {"margin_form": "hinge"}), "smoothed": ("soft", {"label_smoothing": 0.1}),
    "efron": ("plackett_luce", {"ties": "efron"}), "bins": ("regression", {"bins": 3}),
}  # fmt: skip


def make_data(kind: str) -> TokenData:
    """Rankings of two to five responses with labels, or the scores of such; every prompt occurs several times."""
    draw, found = random.Random(0), list[tuple[TokenGroup, Origin]]()
    for number in range(12):
        prompt = [9] * 12 + [10 + number % 4] * 8
        texts = [[*prompt, 20 + place, *(30 + draw.randrange(2) for _ in range(3))] for place in range(2 + number % 4)]
        level = [2, 0, *(draw.randrange(3) for _ in texts[2:])]
        pairs = [(i, j) for i in range(len(texts)) for j in range(len(texts)) if level[i] > level[j]]
        comparisons = [
            Comparison(i, j, 1.0 + number % 2, float(level[i] - level[j]), 0.5 + (level[i] - level[j]) / 4)
            for i, j in pairs
        ]
        if kind in ("rao_kupper", "davidson"):
            comparisons = [replace(each, tied=place % 3 == 1) for place, each in enumerate(comparisons)]
        ratings: list[Rating] = []
        if KINDS[kind][0].startswith("regression"):
            comparisons = []
            ratings = [Rating(place, attributes=(float(each),)) for place, each in enumerate(level)]
        found.append((split_prefix(texts, comparisons, ratings), Origin("a", number, "", number % 4)))
    return TokenData.from_groups(found)


def step_of(built: Built, world: World, kind: str, *, budget: int, share: bool) -> list[dict[str, float]]:
    """Of each phase: loss, gradient norm, metrics, and `own`, the norm of gradients of the objective's parameters."""
    model, weights = built
    name, options = KINDS[kind]
    objective, data, found = build_objective(name, (), options), make_data(kind), list[dict[str, float]]()
    objective.start(data)
    weights._added = {}
    weights.add(objective.parameters())
    if objective.count == "rankings":
        data.as_rankings()
    for number, phase in enumerate(objective.phases):
        of_phase = data.by_pairs() if number else data
        packer = Packer(budget, world.world_size, attention_length=50)
        step = plan_step(of_phase, np.arange(len(data)), packer, share_prompts=share)
        loss, sums = torch.zeros((), dtype=torch.float64), Sums()
        for _, parameter in weights.named_parameters():
            parameter.grad = None
        packs = step.packs[world.rank]
        for place, pack in enumerate(packs):
            batch = collate(step.load(of_phase, pack))
            part, more = phase(model(batch), batch)
            weights.backward(part / step.num_comparisons, is_last=place == len(packs) - 1)
            loss += part.detach()
            sums.add(more)
        value, norm = weights.gather_gradients(loss / step.num_comparisons, math.inf)
        own = [float(each.grad.norm()) for each in objective.parameters().values() if each.grad is not None]
        found.append({"loss": value, "norm": norm, "own": sum(own), **phase.means(sums.read(), "val")})
    return found


def be_rank(model: Path, target: Path) -> int:
    """What a forked rank does: a step of every objective under every strategy, in small shared micro-batches."""
    with processes("cpu", timeout_seconds=120) as world:
        found: dict[str, Mapping[str, Any]] = {}
        for strategy in ("ddp", "fsdp2"):
            built = build(model, world, strategy)
            found[strategy] = {kind: step_of(built, world, kind, budget=60, share=True) for kind in KINDS}
        if world.is_main:
            target.write_text(json.dumps(found))
    return 0
