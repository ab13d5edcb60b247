"""Bradley-Terry, scaled by the strength of the preference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.pairwise import PairObjective


@dataclass(frozen=True)
class Scaled(PairObjective):
    """Clear preferences count more than slight ones.

    loss = -m log sigmoid(r_better - r_worse), m the margin of the comparison (Wang et al. 2024, "HelpSteer2-Preference:
    Complementing Ratings with Preferences").

    Needs a margin of each comparison, 0 or more; HelpSteer2 and HelpSteer3 have 1 to 3. Use it where annotators said
    how much better a response is. Margins above 1 act as a higher learning rate where the optimizer does not normalize.

    Example: difference 1, m = 2: 2 x 0.313 = 0.627.
    """

    uses: ClassVar[tuple[str, ...]] = ("margin",)
    needs = ("margin",)
    scales: ClassVar[bool] = True

    def losses(self, differences: Tensor, batch: PackedBatch) -> Tensor:
        # Validation data may lack margins.
        return -F.logsigmoid(differences) * batch.margin.where(batch.margin >= 0, 1.0)
