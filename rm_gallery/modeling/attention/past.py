"""Keys and values of common prefixes that an earlier forward pass computed. Inference only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

# T tokens of the batch, N of them computed in this pass, G groups, C tokens of a prefix
# H_kv key heads, D head dimension

Layer: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values [C, H_kv, D] of a prefix in one layer, with their rotary embedding."""


@dataclass
class PastKeys:
    """What is known of the prefixes of a batch before its forward pass, and what is to be kept of it."""

    known: Sequence[dict[int, Layer] | None]
    """[G] by layer: keys and values of the first tokens of the common prefix."""
    sizes: Sequence[int]
    """[G] the number of these tokens."""
    keep: Sequence[int]
    """[G] first tokens of each group whose keys and values are collected."""
    kept: list[dict[int, Layer]] = field(default_factory=list)
    """[G] the collected ones, by layer; empty where none are wanted."""

    def __post_init__(self) -> None:
        self.kept = [{} for _ in self.sizes]

    def extend(
        self, layer: int, key: Tensor, value: Tensor, starts: np.ndarray, computed: Tensor, known: Tensor
    ) -> Layer:
        """Keys and values [T, H_kv, D] of all tokens from those of the N computed ones.

        starts: [G] the first token of each group. computed, known: the rows of the computed and of the other tokens.
        """
        count = len(computed) + len(known)
        found = [each[layer] for each in self.known if each is not None]
        whole = []
        for number, part in enumerate((key, value)):
            rows = part.new_empty(count, *part.shape[1:])
            rows.index_copy_(0, computed, part)
            if found:
                rows.index_copy_(0, known, torch.cat([each[number] for each in found]))
            whole.append(rows)
        for kept, start, size in zip(self.kept, starts.tolist(), self.keep, strict=True):
            if size:
                kept[layer] = (whole[0][start : start + size].clone(), whole[1][start : start + size].clone())
        return whole[0], whole[1]
