"""Objectives: what a model is trained on, from its rewards and the labels of a batch; see `base.Objective`."""

from __future__ import annotations

from rm_gallery.objectives.base import Objective
from rm_gallery.objectives.bradley_terry import bradley_terry

OBJECTIVES: dict[str, Objective] = {"bradley_terry": bradley_terry}
"""By `objective.name`."""
