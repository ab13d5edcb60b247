"""What an objective is: a loss summed over the items of a step, and the labels and metrics that belong to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.data.token_cache.arrays import TokenData

# R responses, A outputs of the reward head


class Objective(ABC):
    """Computes the loss of a micro-batch as a sum, so that no result depends on micro-batches, sharing or ranks.

    The trainer divides by the count of the whole optimizer step, over all ranks, which the plan knows before the first
    forward pass. To add an objective: a class in a file of this folder, and an entry in `OBJECTIVES`.
    """

    reads: ClassVar[Literal["last_token", "tokens"]] = "last_token"
    """Which outputs of the model it reads: the reward at the last token of each response, or the `TokenLosses` of a
    language model."""
    count: ClassVar[Literal["comparisons", "values", "rankings", "tokens"]] = "comparisons"
    """What the loss is summed over, and divided by: comparisons, values of rated responses, whole groups, or tokens."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Labels that it reads: fields of `Comparison` and `Rating`. Others in the data are reported as unused."""
    needs: tuple[str, ...] = ()
    """Those of them that each item of the training data must have. Validation takes a neutral value where they lack."""
    scales: ClassVar[bool] = False
    """Whether these labels are factors of the loss, so that they must not be negative."""
    divisible: ClassVar[bool] = True
    """Whether the items of one group may be computed in several micro-batches."""

    @property
    def phases(self) -> tuple[Objective, ...]:
        """The objectives of the phases of a run, in order; validation is that of the last."""
        return (self,)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters beside those of the model, by name: float32, on every rank, trained at `objective.threshold_lr`.

        The loss of a micro-batch without items must depend on them too, so that they have a gradient on every rank.
        """
        return {}

    def start(self, data: TokenData) -> None:  # noqa: B027 (most have no parameters)
        """Set the parameters to where training starts. data: the training data."""

    def record(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Plain values for config.json and model card of a checkpoint whose parameters have these values."""
        return {}

    def __call__(self, rewards: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss sum of a micro-batch, and detached metric sums by name, `loss` among them.

        rewards: [R] float32, or [R, A] with `model.attributes`. Without items the loss is 0 and part of the graph, so
        that `backward` works.
        """
        loss = self.loss(rewards, batch)
        return loss, {"loss": loss.detach(), **self.sums(rewards.detach(), batch)}

    @abstractmethod
    def loss(self, rewards: Tensor, batch: PackedBatch) -> Tensor:
        """The loss, summed over the items of the micro-batch."""

    @abstractmethod
    def sums(self, rewards: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        """Sums over the items of the micro-batch, from which `means` computes metrics. Each is 0-dimensional."""

    @abstractmethod
    def means(self, sums: Mapping[str, float], prefix: str) -> dict[str, float]:
        """Metrics from sums over all ranks, as `train/loss`; {} if nothing was counted."""
