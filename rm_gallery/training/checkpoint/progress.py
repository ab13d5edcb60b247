"""How far a run has come: all that a checkpoint keeps of it but tensors and random states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

BEST_METRIC = "val/accuracy"


@dataclass
class Progress:
    """Counted by the trainer; the position in the plan is `step`."""

    step: int = 0
    """Optimizer steps that are done, those that were skipped included."""
    bad_steps: int = 0
    """Steps that were skipped since something was not finite."""
    bad_in_a_row: int = 0
    validation_pending: bool = False
    """The validation of this step is due and was not made, since the run had to stop."""
    last_val: dict[str, float] = field(default_factory=dict)
    """Metrics of the last validation."""
    best_step: int | None = None
    """Step of the highest `val/accuracy` so far; of equals the first."""
    best_accuracy: float | None = None

    def note_accuracy(self, metrics: Mapping[str, float]) -> bool:
        """Remember the accuracy of this step if it is the best so far; whether it is."""
        accuracy = metrics.get(BEST_METRIC, math.nan)
        if not accuracy > (-math.inf if self.best_accuracy is None else self.best_accuracy):
            return False
        self.best_step, self.best_accuracy = self.step, accuracy
        return True

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
