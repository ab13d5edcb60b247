"""Small models and batches whose memory can be counted, and their shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rm_gallery.data.batching.packed_batch import PackedBatch, collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.modeling.reward_model import RewardModel, load_reward_model
from rm_gallery.planning.memory import Pack
from rm_gallery.planning.model_shape import ModelShape, load_shape
from rm_gallery.schema import Comparison
from tests.small import make_model

PREFIX, TAIL = 20, 20  # tokens


def model_and_shape(kind: str, folder: Path, **extra: Any) -> tuple[RewardModel, ModelShape]:
    """A model large enough that what a layer keeps stands out, without weights of its backbone worth naming."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "initializer_range": 0.02}
    if kind == "deberta-v2":
        sizes["pooler_hidden_size"] = 64
    make_model(kind, folder, **{**sizes, **extra})
    return load_reward_model(str(folder)).model, load_shape(str(folder))


def batch_and_pack(shape: ModelShape, groups: int) -> tuple[PackedBatch, Pack]:
    """Pairs that are all alike, and the same as the planner sees them."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(groups):
        parts = [draw.integers(7, 264, size).astype(np.int32) for size in (PREFIX, TAIL, TAIL)]
        made.append(TokenGroup(parts[0], parts[1:], [Comparison(0, 1)]))
    length, texts = (PREFIX + TAIL, 2 * groups) if shape.padded else (PREFIX + 2 * TAIL, groups)
    tokens = length * texts
    return collate(made), Pack(tokens, tokens, tokens * length)


def bytes_kept(model: RewardModel, batch: PackedBatch) -> int:
    """Bytes of all memory that the backward pass will need, weights apart; each piece once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rewards = model(batch)
    assert rewards.requires_grad
    return sum(storage.nbytes() for storage in kept.values())
