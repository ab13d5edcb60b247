"""The Hugging Face files of a checkpoint: written from the training state, and checked by rescoring."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rm_gallery.data.batching.packed_batch import collate
from rm_gallery.data.tokenization.token_group import TokenGroup
from rm_gallery.modeling.export import InputRecord, check_manifest, check_rewards, write_folder
from rm_gallery.modeling.reward_model import RewardModel
from rm_gallery.training.checkpoint.tensors import SavedWeights


@dataclass(frozen=True)
class WeightsFolder:
    """How a run writes its Hugging Face folders."""

    model: RewardModel
    tokenizer: Any
    record: InputRecord
    dtype: torch.dtype
    """Of the written weights."""
    device: torch.device
    """Where the model computes."""
    exact: bool
    """Whether the model computes in float32 and the files hold it, so that no rounding hides a difference."""
    probes: Sequence[TokenGroup]
    """A few short groups, which are rescored."""

    def write(self, folder: Path, state: Path) -> list[str]:
        """Write the files into a folder that is there already, from a `training_state`; returns their names.

        Raises OSError when the disk is full or a file came out damaged.
        """
        inner = folder / "model"
        saved = SavedWeights(state)
        write_folder(inner, self.model, saved.outline(), self.tokenizer, self.dtype, self.record, read=saved.read)
        damaged = check_manifest(inner)
        if damaged:
            raise OSError(f"{damaged[0]} came out damaged; check the disk")
        names = sorted(path.name for path in inner.iterdir())
        for name in names:
            os.replace(inner / name, folder / name)
        inner.rmdir()
        return names

    def expected(self) -> list[float]:
        """What the model gives the probes now. Every rank calls it at the same place."""
        with self.model.inference():
            rewards: list[float] = self.model(collate(self.probes).to(self.device)).tolist()
        return rewards

    def check(self, folder: Path, expected: Sequence[float]) -> None:
        """Compare with what the files give. Raises UserError that names the largest difference."""
        texts = [[*group.prefix.tolist(), *tail.tolist()] for group in self.probes for tail in group.tails]
        check_rewards(folder, texts, expected, exact=self.exact)
