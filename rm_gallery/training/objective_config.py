"""The section `objective` of a training run's configuration, and its checks. Loads no torch, as config.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from rm_gallery.data.config import DataConfig
from rm_gallery.data.formats.config import MultiturnConfig
from rm_gallery.errors import Problem
from rm_gallery.modeling.config import ModelConfig
from rm_gallery.training.trainer_config import TrainerConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """`objective`: what is trained."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    name: Literal[
        "bradley_terry", "margin", "scaled", "soft", "focal", "hinge", "rao_kupper", "davidson", "plackett_luce",
        "regression", "regression_then_bt", "attributes", "sft",
    ] = "bradley_terry"  # fmt: skip
    """Objective: `bradley_terry`, `margin`, `scaled`, `soft`, `focal` or `hinge` on comparisons; `rao_kupper` or
    `davidson` on comparisons with ties; `plackett_luce` on rankings; `regression`, `regression_then_bt` or `attributes`
    (`model.attributes`) on graded responses; `sft` on conversations, which trains a language model. See
    docs/objectives.md and docs/sft.md."""
    center_coefficient: Annotated[float, Ge(0)] = 0.0
    """Adds this times the square of the sum of both rewards to the loss of each comparison; 0.01 keeps rewards around
    0. Of a ranking or a graded response: times the square of twice its mean reward."""
    lm_coefficient: Annotated[float, Ge(0)] = 0.0
    """On comparisons: adds this times the language-model loss per token of the preferred responses (GRM); 0.01 keeps
    hidden states close to those of the language model. See docs/sft.md."""
    reward_l2: Annotated[float, Ge(0)] = 0.0
    """Adds this times the mean square of its rewards to the loss of each comparison, ranking or graded response."""
    ties: Literal["auto", "exact", "efron"] = "auto"
    """`plackett_luce`: likelihood of tied responses: summed over all orders (`exact`), Efron's approximation (`efron`),
    or exact up to 6 tied responses and Efron's beyond (`auto`)."""
    score_column: str = "score"
    """`regression`, `regression_then_bt`: column of the score of a response, or of a list of one score per response."""
    bins: Annotated[int, Ge(0)] = 0
    """`regression`, `regression_then_bt`: cross-entropy over this number of bins, 2 or more, from the lowest to the
    highest score; 0 is the squared error."""
    regression_steps: Annotated[int, Ge(1)] | None = None
    """`regression_then_bt`: optimizer steps of the first phase; default: `regression_ratio`."""
    regression_ratio: Annotated[float, Gt(0), Lt(1)] = 0.5
    """`regression_then_bt`: share of the first phase in `trainer.total_training_steps`, or in the epochs."""
    margin_form: Literal["shift", "hinge"] = "shift"
    """`margin`: `shift` is -log sigmoid(difference - margin), as in Llama 2; `hinge` is max(0, margin - difference)."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """`soft`: probability that a label is wrong."""
    focal_gamma: Annotated[float, Ge(0)] = 2.0
    """`focal`: how fast the loss of comparisons that the model has right vanishes."""
    hinge_margin: Annotated[float, Gt(0)] = 1.0
    """`hinge`: the difference of reward beyond which a comparison has no loss."""
    threshold_lr: Annotated[float, Ge(0)] = 0.01
    """`rao_kupper`, `davidson`: peak learning rate of the logarithm of the threshold of ties; `regression`: that of the
    cut points between `bins`. 0 keeps where they start."""


_SCORED = ("regression", "regression_then_bt")
_TIES = ("rao_kupper", "davidson")
_ALL = (
    "bradley_terry", "margin", "scaled", "soft", "focal", "hinge", *_TIES, "plackett_luce", *_SCORED,
    "attributes",
)  # fmt: skip
_ON_COMPARISONS = ("bradley_terry", "margin", "scaled", "soft", "focal", "hinge", *_TIES, "plackett_luce")
OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "score_column": _SCORED, "regression_steps": ("regression_then_bt",), "regression_ratio": ("regression_then_bt",),
    "lm_coefficient": _ON_COMPARISONS,
    "center_coefficient": _ALL, "reward_l2": _ALL, "margin_form": ("margin",), "ties": ("plackett_luce",),
    "label_smoothing": ("soft",), "focal_gamma": ("focal",), "hinge_margin": ("hinge",),
    "threshold_lr": (*_TIES, *_SCORED), "bins": _SCORED,
}  # fmt: skip
"""The objectives that have each option."""


def _option_problems(config: ObjectiveConfig) -> Iterator[Problem]:
    """Options that the objective does not have."""
    for each in fields(config):
        value, names = getattr(config, each.name), OPTIONS_OF.get(each.name, (config.name,))
        if value != each.default and config.name not in names:
            key = f"objective.{each.name}"
            yield Problem(key, f"{key}={value} with objective.name={config.name}: it belongs to {', '.join(names)}")
    if config.bins == 1:
        yield Problem("objective.bins", "objective.bins=1: set 2 or more, or 0 for the squared error")
    if config.regression_steps is not None and config.regression_ratio != ObjectiveConfig.regression_ratio:
        yield Problem("objective.regression_ratio", "objective.regression_steps and regression_ratio: set one of them")
    is_squared = config.name in _SCORED and not config.bins
    if is_squared and config.threshold_lr != ObjectiveConfig.threshold_lr:
        key = "objective.threshold_lr"
        yield Problem(key, f"{key}={config.threshold_lr} with objective.bins=0: the squared error has no cut points")


_HEADS = ("bradley_terry", "margin", "scaled", "soft", "focal", "hinge", *_TIES, "plackett_luce")
"""Objectives on comparisons, which `model.heads` can be trained with."""


def data_of(config: ObjectiveConfig, model: ModelConfig, data: DataConfig) -> DataConfig:
    """The section `data`, with what its rows are read for."""
    data = replace(data, attributes=rated_columns(config, model), ties=config.name in _TIES)
    if config.lm_coefficient:
        data = replace(data, lm_targets="chosen")
    if config.name != "sft":
        return data
    names = data.multiturn
    is_conversation = names.enable and data.format == "auto"
    return replace(
        data,
        lm_targets="assistant",
        format="conversation" if is_conversation else data.format,
        tools_key=names.tools_key or data.tools_key,
        columns=replace(data.columns, messages=names.messages_key or data.columns.messages),
    )


def rated_columns(config: ObjectiveConfig, model: ModelConfig) -> list[str]:
    """Columns of the numbers that responses are trained on; none for an objective on comparisons."""
    return [config.score_column] if config.name in _SCORED else model.attributes


def metrics_of(config: ObjectiveConfig, model: ModelConfig) -> list[str]:
    """Metrics of the objective that say which of two checkpoints is better, `loss` and `accuracy` aside."""
    if model.attributes:
        return [f"{kind}_{each}" for each in model.attributes for kind in ("accuracy", "mse", "pearson")]
    if config.name in _SCORED:
        return ["mse", "pearson"]
    if config.name == "sft":
        return ["perplexity", "token_accuracy"]
    return ["margin", *(["accuracy_with_ties", "tie_log_likelihood"] if config.name in _TIES else [])]


def _head_problems(config: ObjectiveConfig, model: ModelConfig) -> Iterator[Problem]:
    if model.heads == 1:
        return
    key, value = "model.heads", f"model.heads={model.heads}"
    if config.name not in _HEADS:
        yield Problem(key, f"{value} with objective.name={config.name}: set one of {', '.join(_HEADS)}")
    if model.head_init != "normal":
        yield Problem(
            key, f"{value} with model.head_init={model.head_init}: the heads would be equal; set model.head_init=normal"
        )


def objective_problems(
    config: ObjectiveConfig, model: ModelConfig, data: DataConfig, trainer: TrainerConfig
) -> Iterator[Problem]:
    """Of `objective` and `model.attributes`."""
    yield from _option_problems(config)
    yield from _sft_problems(config, model, data, trainer)
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
    if data.ties and config.name not in _TIES:
        yield Problem("data.ties", f"data.ties=true with objective.name={config.name}: set one of {', '.join(_TIES)}")
    cause = key if is_named else f"objective.name={config.name}"
    if rated and data.custom_cls.name:
        yield Problem(
            "data.custom_cls", f"data.custom_cls with {cause}: a class builds preferences; remove one of them"
        )
    if rated and data.format not in ("auto", "helpsteer2", "scored"):
        yield Problem("data.format", f"data.format={data.format} with {cause}: set auto, helpsteer2 or scored")
    yield from _head_problems(config, model)
    if len(model.outputs) > 1 and trainer.reward_statistics == "normalize":
        yield Problem(
            "trainer.reward_statistics",
            f"trainer.reward_statistics=normalize with {len(model.outputs)} outputs: other programs have one mean per "
            "model; set record",
        )


_OF_CONVERSATIONS = ("conversation", "response", "chosen")
"""Formats that `sft` alone reads."""


def _sft_problems(
    config: ObjectiveConfig, model: ModelConfig, data: DataConfig, trainer: TrainerConfig
) -> Iterator[Problem]:
    """Settings that belong to `sft` alone, and those that it has no use for."""
    if config.lm_coefficient and data.custom_cls.name:
        yield Problem(
            "data.custom_cls",
            "data.custom_cls with objective.lm_coefficient: the response's tokens are not known; set 0",
        )
    if config.lm_coefficient and data.truncation == "left":
        yield Problem("data.truncation", "data.truncation=left with objective.lm_coefficient: set right")
    if data.lm_targets != "none":
        yield Problem("data.lm_targets", f"data.lm_targets={data.lm_targets}: set objective.name=sft instead")
    if config.name != "sft":
        if data.format in _OF_CONVERSATIONS:
            yield Problem(
                "data.format", f"data.format={data.format} with objective.name={config.name}: it belongs to sft"
            )
        if data.multiturn != MultiturnConfig():
            yield Problem(
                "data.multiturn",
                f"data.multiturn with objective.name={config.name}: it names the columns of objective.name=sft; remove "
                "it, or set objective.name=sft",
            )
        return
    if data.format not in ("auto", *_OF_CONVERSATIONS):
        yield Problem(
            "data.format",
            f"data.format={data.format} with objective.name=sft: set auto, {', '.join(_OF_CONVERSATIONS)}",
        )
    if data.custom_cls.name:
        yield Problem("data.custom_cls", "data.custom_cls with objective.name=sft: a class builds preferences")
    if data.truncation == "left":
        yield Problem(
            "data.truncation",
            "data.truncation=left with objective.name=sft: answers would lose what they answer; set right",
        )
    no_head = "a language model has no reward head; remove it"
    for key, is_set in {
        "model.new_head": model.new_head, "model.head_init": model.head_init != "normal",
        "trainer.reward_statistics": trainer.reward_statistics != "record",
    }.items():  # fmt: skip
        if is_set:
            yield Problem(key, f"{key} with objective.name=sft: {no_head}")
