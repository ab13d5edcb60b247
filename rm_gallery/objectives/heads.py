"""Several reward heads on one backbone, each trained with the same objective: an ensemble for the cost of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.data.token_cache.arrays import TokenData
from rm_gallery.objectives.base import Objective

# R responses, M heads, C comparisons


@dataclass(frozen=True)
class Heads(Objective):
    """The mean over M heads of the loss of an objective; metrics are those of the mean reward.

    The heads differ by their random initialization alone (Lakshminarayanan et al. 2017, NeurIPS, arXiv 1612.01474,
    with a shared backbone): what they were trained on they come to agree on. margin_std is the standard deviation
    over the heads of the difference of a comparison's rewards, averaged over the comparisons.

    Needs what its objective needs. Example: losses 0.2 and 0.4 of two heads: 0.3.
    """

    of: Objective

    def __post_init__(self) -> None:
        for name in ("count", "uses", "needs", "scales", "divisible", "reads"):
            object.__setattr__(self, name, getattr(self.of, name))

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.of.parameters()

    def start(self, data: TokenData) -> None:
        self.of.start(data)

    def record(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        return self.of.record(values)

    def loss(self, rewards: Tensor, batch: PackedBatch) -> Tensor:
        heads = rewards.unbind(1) if rewards.ndim == 2 else (rewards,)  # an empty batch gives [0]
        losses = [self.of.loss(each, batch) for each in heads]
        return sum(losses[1:], start=losses[0]) / len(losses)

    def sums(self, rewards: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        outputs = rewards if rewards.ndim == 2 else rewards.unsqueeze(1)
        margins = outputs[batch.better] - outputs[batch.worse]  # [C, M]
        variance = (margins - margins.mean(dim=1, keepdim=True)).square().mean(dim=1)
        return {**self.of.sums(outputs.mean(dim=1), batch), "margin_std": variance.sqrt().sum()}

    def means(self, sums: Mapping[str, float], prefix: str) -> dict[str, float]:
        metrics = self.of.means(sums, prefix)
        if sums.get("comparisons"):
            metrics[f"{prefix}/margin_std"] = sums["margin_std"] / sums["comparisons"]
        return metrics
