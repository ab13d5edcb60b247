"""Objectives: what a model is trained on, from its rewards and the labels of a batch; see `base.Objective`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from rm_gallery.objectives.attributes import Attributes
from rm_gallery.objectives.base import Objective
from rm_gallery.objectives.binned import BinnedRegression
from rm_gallery.objectives.bradley_terry import bradley_terry
from rm_gallery.objectives.davidson import Davidson
from rm_gallery.objectives.focal import Focal
from rm_gallery.objectives.hinge import Hinge
from rm_gallery.objectives.margin import Margin
from rm_gallery.objectives.plackett_luce import PlackettLuce
from rm_gallery.objectives.rao_kupper import RaoKupper
from rm_gallery.objectives.regression import Regression
from rm_gallery.objectives.regression_then_bt import RegressionThenBT
from rm_gallery.objectives.scaled import Scaled
from rm_gallery.objectives.sft import Sft
from rm_gallery.objectives.soft import Soft

OBJECTIVES: dict[str, Objective] = {
    "bradley_terry": bradley_terry,
    "margin": Margin(),
    "scaled": Scaled(),
    "soft": Soft(),
    "focal": Focal(),
    "hinge": Hinge(),
    "rao_kupper": RaoKupper(),
    "davidson": Davidson(),
    "plackett_luce": PlackettLuce(),
    "regression": Regression(),
    "regression_then_bt": RegressionThenBT(),
    "attributes": Attributes(),
    "sft": Sft(),
}
"""By `objective.name`, with the default options."""


def build_objective(name: str, attributes: Sequence[str] = (), options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of this name.

    attributes: names of the outputs (`model.attributes`). options: values of keys of `objective`; those that are fields
    of the objective are used.
    """
    objective: Any = OBJECTIVES[name]  # a dataclass
    if name == "regression" and (options or {}).get("bins"):
        objective = BinnedRegression()
    own = {each.name for each in fields(objective) if each.init} - {"names", "first"}
    chosen = {key: value for key, value in (options or {}).items() if key in own}
    if name == "regression_then_bt":
        chosen["first"] = build_objective("regression", (), options)
    if name == "attributes":
        chosen["names"] = tuple(attributes)
    built: Objective = replace(objective, **chosen)
    return built
