"""Checkpoints: `global_step_N` folders of a run."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rm_gallery.data.batch import collate
from rm_gallery.data.token_group import TokenGroup
from rm_gallery.errors import UserError
from rm_gallery.modeling.export import InputRecord, check_manifest, check_rewards, export_folder
from rm_gallery.modeling.parallel import DTYPES, MasterWeights
from rm_gallery.modeling.reward_model import RewardModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointConfig:
    """Part of `trainer`: where and what to save."""

    __pydantic_config__ = {"extra": "forbid"}

    default_local_dir: str = "./checkpoints/bt"
    """Run folder; `experiment_name` is appended unless it ends with it already."""
    save_freq: int = -1
    """Steps between checkpoints; one is always written at the end. 0 or less: only that one."""
    export_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the saved weights; `auto` is `model.fsdp_config.model_dtype`."""


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("global_step_*") if re.fullmatch(r"global_step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))


def refuse_earlier_run(run_dir: Path) -> None:
    """Raise UserError when the folder holds checkpoints of an earlier run: they must not mix."""
    earlier = list_checkpoints(run_dir)
    if earlier:
        raise UserError(
            f"{run_dir}: holds an earlier run (newest checkpoint {earlier[-1].name}); set another "
            "trainer.experiment_name or trainer.default_local_dir, or move the folder away"
        )


class Checkpoints:
    """Saves the model of a run; the first and the last save are checked by rescoring, the others by their hashes."""

    def __init__(
        self, run_dir: Path, model: RewardModel, weights: MasterWeights, tokenizer: Any, record: InputRecord,
        *, dtype: torch.dtype, probes: Sequence[TokenGroup],
    ) -> None:  # fmt: skip
        """probes: a few short groups that are rescored."""
        self.run_dir, self.model, self.weights, self.tokenizer, self.record = run_dir, model, weights, tokenizer, record
        self.dtype, self.probes = dtype, probes
        self.saved: list[Path] = []

    def save(self, step: int, *, is_last: bool = False) -> Path:
        """Write `global_step_N` and check it.

        Raises UserError when it cannot be written or does not give the trainer's rewards; earlier ones stay whole.
        """
        folder = self.run_dir / f"global_step_{step}"
        try:
            export_folder(
                folder, self.model, self.weights.state_dict(self.model), self.tokenizer, self.dtype, self.record
            )
            damaged = check_manifest(folder)
        except OSError as error:
            raise UserError(
                f"{folder}: the checkpoint could not be written ({error}); earlier ones are whole"
            ) from error
        if damaged:
            raise UserError(f"{folder}: {damaged[0]} came out damaged; check the disk (earlier checkpoints are whole)")
        if not self.saved or is_last:
            self._check(folder)
        self.saved.append(folder)
        log.info("saved %s", folder)
        return folder

    def _check(self, folder: Path) -> None:
        device = next(self.model.parameters()).device
        texts = [[*group.prefix.tolist(), *tail.tolist()] for group in self.probes for tail in group.tails]
        with self.model.inference():
            expected = self.model(collate(self.probes).to(device)).tolist()
        computes = next(getattr(self.model.network, self.model.network.base_model_prefix).parameters()).dtype
        check_rewards(folder, texts, expected, exact=self.dtype == computes == DTYPES["fp32"])
