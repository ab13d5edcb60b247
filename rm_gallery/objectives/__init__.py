"""Objectives: what a model is trained on, from its rewards and the labels of a batch; see `base.Objective`."""

from __future__ import annotations

from collections.abc import Sequence

from rm_gallery.objectives.attributes import Attributes
from rm_gallery.objectives.base import Objective
from rm_gallery.objectives.bradley_terry import bradley_terry

OBJECTIVES: dict[str, Objective] = {"bradley_terry": bradley_terry, "attributes": Attributes()}
"""By `objective.name`."""


def build_objective(name: str, attributes: Sequence[str] = ()) -> Objective:
    """The objective of this name. attributes: names of the outputs (`model.attributes`)."""
    return Attributes(attributes) if name == "attributes" else OBJECTIVES[name]
