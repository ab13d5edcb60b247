"""The section `objective` of a training run's configuration, and its checks. Loads no torch, as config.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from rm_gallery.errors import Problem


@dataclass(frozen=True)
class ObjectiveConfig:
    """`objective`: what is trained."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    name: Literal["bradley_terry", "margin", "scaled", "soft", "focal", "hinge", "attributes"] = "bradley_terry"
    """Objective: `bradley_terry`, `margin`, `scaled`, `soft`, `focal` or `hinge` on comparisons, or `attributes`
    (`model.attributes`) on graded responses. See docs/objectives.md."""
    center_coefficient: Annotated[float, Ge(0)] = 0.0
    """On comparisons: adds this times the square of the sum of both rewards to the loss of each; 0.01 keeps rewards
    around 0."""
    reward_l2: Annotated[float, Ge(0)] = 0.0
    """On comparisons: adds this times the mean square of both rewards to the loss of each."""
    margin_form: Literal["shift", "hinge"] = "shift"
    """`margin`: `shift` is -log sigmoid(difference - margin), as in Llama 2; `hinge` is max(0, margin - difference)."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """`soft`: probability that a label is wrong."""
    focal_gamma: Annotated[float, Ge(0)] = 2.0
    """`focal`: how fast the loss of comparisons that the model has right vanishes."""
    hinge_margin: Annotated[float, Gt(0)] = 1.0
    """`hinge`: the difference of reward beyond which a comparison has no loss."""


_ON_PAIRS = ("bradley_terry", "margin", "scaled", "soft", "focal", "hinge")
OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "center_coefficient": _ON_PAIRS, "reward_l2": _ON_PAIRS, "margin_form": ("margin",),
    "label_smoothing": ("soft",), "focal_gamma": ("focal",), "hinge_margin": ("hinge",),
}  # fmt: skip
"""The objectives that have each option."""


def option_problems(config: ObjectiveConfig) -> Iterator[Problem]:
    """Options that the objective does not have."""
    for each in fields(config):
        value, names = getattr(config, each.name), OPTIONS_OF.get(each.name, (config.name,))
        if value != each.default and config.name not in names:
            key = f"objective.{each.name}"
            yield Problem(key, f"{key}={value} with objective.name={config.name}: it belongs to {', '.join(names)}")
