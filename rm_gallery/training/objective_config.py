"""The section `objective` of a training run's configuration, and its checks. Loads no torch, as config.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from rm_gallery.data.config import DataConfig
from rm_gallery.errors import Problem
from rm_gallery.modeling.config import ModelConfig
from rm_gallery.training.trainer_config import TrainerConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """`objective`: what is trained."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    name: Literal[
        "bradley_terry", "margin", "scaled", "soft", "focal", "hinge", "plackett_luce", "regression", "attributes"
    ] = "bradley_terry"  # fmt: skip
    """Objective: `bradley_terry`, `margin`, `scaled`, `soft`, `focal` or `hinge` on comparisons; `plackett_luce` on
    rankings; `regression` or `attributes` (`model.attributes`) on graded responses. See docs/objectives.md."""
    center_coefficient: Annotated[float, Ge(0)] = 0.0
    """On comparisons: adds this times the square of the sum of both rewards to the loss of each; 0.01 keeps rewards
    around 0."""
    reward_l2: Annotated[float, Ge(0)] = 0.0
    """On comparisons: adds this times the mean square of both rewards to the loss of each."""
    score_column: str = "score"
    """`regression`: column of the score of a response, or of a list of one score per response."""
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
    "score_column": ("regression",),
    "center_coefficient": _ON_PAIRS, "reward_l2": _ON_PAIRS, "margin_form": ("margin",),
    "label_smoothing": ("soft",), "focal_gamma": ("focal",), "hinge_margin": ("hinge",),
}  # fmt: skip
"""The objectives that have each option."""


def _option_problems(config: ObjectiveConfig) -> Iterator[Problem]:
    """Options that the objective does not have."""
    for each in fields(config):
        value, names = getattr(config, each.name), OPTIONS_OF.get(each.name, (config.name,))
        if value != each.default and config.name not in names:
            key = f"objective.{each.name}"
            yield Problem(key, f"{key}={value} with objective.name={config.name}: it belongs to {', '.join(names)}")


def rated_columns(config: ObjectiveConfig, model: ModelConfig) -> list[str]:
    """Columns of the numbers that responses are trained on; none for an objective on comparisons."""
    return [config.score_column] if config.name == "regression" else model.attributes


def objective_problems(
    config: ObjectiveConfig, model: ModelConfig, data: DataConfig, trainer: TrainerConfig
) -> Iterator[Problem]:
    """Of `objective` and `model.attributes`."""
    yield from _option_problems(config)
    names, weights = model.attributes, model.attribute_weights
    key, is_named = "model.attributes", bool(names)
    if is_named != (config.name == "attributes"):
        fix = "set objective.name=attributes" if is_named else "name the columns, e.g. model.attributes=[helpfulness]"
        yield Problem(key, f"objective.name={config.name} with model.attributes={names}: {fix}")
    if len(set(names)) < len(names) or not all(name and name.isprintable() and ":" not in name for name in names):
        yield Problem(key, f"{key}={names}: the names must differ, and be printable and without ':'")
    unknown = [name for name in weights if name not in names]
    if unknown or (weights and not any(weights.values())) or not all(map(math.isfinite, weights.values())):
        what = f"{unknown[0]!r} is not in model.attributes" if unknown else "they must be finite, and not all 0"
        yield Problem("model.attribute_weights", f"model.attribute_weights={weights}: {what}")
    rated = rated_columns(config, model)
    if data.attributes and data.attributes != rated:
        yield Problem("data.attributes", f"data.attributes={data.attributes}: set model.attributes instead")
    cause = key if is_named else "objective.name=regression"
    if rated and data.custom_cls.name:
        yield Problem(
            "data.custom_cls", f"data.custom_cls with {cause}: a class builds preferences; remove one of them"
        )
    if rated and data.format not in ("auto", "helpsteer2", "scored"):
        yield Problem("data.format", f"data.format={data.format} with {cause}: set auto, helpsteer2 or scored")
    if len(names) > 1 and trainer.reward_statistics == "normalize":
        yield Problem(
            "trainer.reward_statistics",
            f"trainer.reward_statistics=normalize with {len(names)} attributes: other programs have one mean per "
            "model; set record",
        )
