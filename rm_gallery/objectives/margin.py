"""Bradley-Terry with a margin per comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.pairwise import PairObjective


@dataclass(frozen=True)
class Margin(PairObjective):
    """Clear preferences must have larger differences of reward than slight ones.

    With d = r_better - r_worse and m the margin of the comparison:

    - `shift`: -log sigmoid(d - m) (Touvron et al. 2023, "Llama 2", section 3.2.2; TRL's loss for a column `margin`)
    - `hinge`: max(0, m - d), zero once the difference exceeds the margin (with one margin for all: `hinge`)

    Needs a margin of each comparison, in the unit that rewards shall have: Llama 2 uses 1, 2/3, 1/3, 0 or 3, 2, 1, 0.
    Use it where annotators said how much better a response is, and the sizes of rewards matter.

    Example: d = 1, m = 2: `shift` -log sigmoid(-1) = 1.313, `hinge` 1.
    """

    uses: ClassVar[tuple[str, ...]] = ("margin",)
    needs = ("margin",)
    margin_form: Literal["shift", "hinge"] = "shift"

    def losses(self, differences: Tensor, batch: PackedBatch) -> Tensor:
        margins = batch.margin.nan_to_num(0.0)  # unknown in validation data
        return -F.logsigmoid(differences - margins) if self.margin_form == "shift" else F.relu(margins - differences)
