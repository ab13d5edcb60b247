"""Regression of several attributes of a response, each by its own output of the reward head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.base import Objective

# R responses, A attributes, S ratings


@dataclass(frozen=True)
class Attributes(Objective):
    """Squared error between each output and the number that the data have for its attribute.

    loss = sum over ratings and known attributes of weight x (output - label)^2, divided by the number of known
    attributes of the step (Wang et al. 2024, "HelpSteer2: Open-source dataset for training top-performing reward
    models", section 4, with one output per attribute). A label that is missing has no loss and no gradient.

    Needs numbers per response, as of HelpSteer2; single responses are enough. Use it where responses are graded, and
    the grades of several aspects are wanted. Example: outputs [1, 3], labels [2, missing]: loss 1, divided by 1.

    Each known number adds center_coefficient x (2 x output)^2 and reward_l2 x output^2, as a comparison of two equal
    rewards does; both pull outputs towards 0, away from the labels.
    """

    count: ClassVar[Literal["comparisons", "values", "rankings"]] = "values"
    uses: ClassVar[tuple[str, ...]] = ("attributes",)
    needs = ("attributes",)
    divisible: ClassVar[bool] = False  # pairs of the responses of a prompt are counted in a micro-batch
    names: tuple[str, ...] = ()
    """Of the outputs; a prefix of their metrics."""
    center_coefficient: float = 0.0
    reward_l2: float = 0.0

    def loss(self, rewards: Tensor, batch: PackedBatch) -> Tensor:
        outputs, labels = rated(rewards, batch)
        losses = self.losses(outputs, labels.nan_to_num())
        if self.center_coefficient or self.reward_l2:
            losses = losses + (4 * self.center_coefficient + self.reward_l2) * outputs.square()
        return (losses.where(~labels.isnan(), 0.0) * batch.rating_weight.unsqueeze(1)).sum()

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """[S, A] loss of each output. labels: [S, A], anything finite where they are missing."""
        return (outputs - labels).square()

    def predicted(self, outputs: Tensor) -> Tensor:
        """[S, A] the numbers that outputs stand for, in the unit of the labels."""
        return outputs

    def sums(self, rewards: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        """By attribute: the moments of outputs and labels, and the pairs of a prompt in the order of their labels."""
        outputs, labels = (each.double() for each in rated(rewards, batch))
        outputs = self.predicted(outputs).detach()
        known = ~labels.isnan()
        labels, outputs = labels.nan_to_num() * known, outputs * known
        same = batch.rated_group.unsqueeze(0) == batch.rated_group.unsqueeze(1)  # [S, S]
        found: dict[str, Tensor] = {}
        for place, name in enumerate(self.names):
            y, x = labels[:, place], outputs[:, place]
            above = same & known[:, place].unsqueeze(0) & known[:, place].unsqueeze(1)
            above = above & (y.unsqueeze(1) > y.unsqueeze(0))
            values = {
                "n": known[:, place].sum(), "x": x.sum(), "y": y.sum(), "xx": x.square().sum(),
                "yy": y.square().sum(), "xy": (x * y).sum(), "pairs": above.sum(),
                "correct": (above & (x.unsqueeze(1) > x.unsqueeze(0))).sum(),
            }  # fmt: skip
            found |= {f"{name}:{kind}": value for kind, value in values.items()}
        return found

    def means(self, sums: Mapping[str, float], prefix: str) -> dict[str, float]:
        """The loss, and mse, pearson and accuracy of each attribute, the latter over pairs of responses to a prompt."""
        count = sum(sums.get(f"{name}:n", 0.0) for name in self.names)
        if not count:
            return {}
        metrics, accuracies = {f"{prefix}/loss": sums["loss"] / count}, []
        if "router_aux_loss" in sums:
            metrics[f"{prefix}/router_aux_loss"] = sums["router_aux_loss"] / count
        for name in self.names:
            n, x, y, xx, yy, xy, pairs, correct = (
                sums[f"{name}:{kind}"] for kind in ("n", "x", "y", "xx", "yy", "xy", "pairs", "correct")
            )
            if not n:
                continue
            metrics[f"{prefix}/mse_{name}"] = (xx - 2 * xy + yy) / n
            spread = (xx - x * x / n) * (yy - y * y / n)
            if spread > 0:
                metrics[f"{prefix}/pearson_{name}"] = (xy - x * y / n) / math.sqrt(spread)
            if pairs:
                metrics[f"{prefix}/accuracy_{name}"] = correct / pairs
                accuracies.append(correct / pairs)
        if accuracies:
            metrics[f"{prefix}/accuracy"] = sum(accuracies) / len(accuracies)
        return metrics


def rated(rewards: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """The outputs and the labels of each rating, both [S, A]."""
    outputs = rewards if rewards.ndim == 2 else rewards.unsqueeze(1)
    outputs = outputs[batch.rated]
    return outputs, batch.attributes.reshape(-1, outputs.shape[1]).to(outputs.dtype)
