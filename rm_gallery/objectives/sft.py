"""Supervised fine-tuning of a language model on the assistant tokens of conversations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rm_gallery.data.batching.packed_batch import PackedBatch
from rm_gallery.objectives.base import Objective


@dataclass(frozen=True)
class Sft(Objective):
    """Cross-entropy of the next token, summed over assistant tokens and divided by their number in the whole step.

    loss = sum over assistant tokens of -log p(token | all tokens before it), so each token weighs the same, whatever
    the length of its conversation (Ouyang et al. 2022, "Training language models to follow instructions with human
    feedback", section 3.5). Tokens of the system and user turns, and headers, are read and not predicted.

    With `data.weight_key` the losses of a conversation's tokens are multiplied by its weight; the divisor stays the
    number of tokens.

    Needs conversations. The model keeps its output layer and has no reward head. Use it before a reward model is
    trained from a base model, and for models that judge in words.

    Example: two conversations with losses [1, 3] and [2] of their assistant tokens: (1 + 3 + 2) / 3 = 2.
    """

    reads = "tokens"
    count = "tokens"

    def loss(self, rewards: Any, batch: PackedBatch) -> Tensor:
        """rewards: the `TokenLosses` of the batch."""
        total: Tensor = rewards.total
        return total

    def __call__(self, rewards: Any, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return rewards.total, {"loss": rewards.total.detach(), **self.sums(rewards, batch)}

    def sums(self, rewards: Any, batch: PackedBatch) -> dict[str, Tensor]:
        times = batch.target_times.double()
        return {
            "tokens": times.sum(),
            "correct": (times * rewards.correct).sum(),
            "unweighted": (times * rewards.each).sum(),
        }

    def means(self, sums: Mapping[str, float], prefix: str) -> dict[str, float]:
        """The loss per token, the perplexity, and how often the target is the most likely token.

        Perplexity and accuracy are of all tokens alike, whatever the weights of their conversations.
        """
        count = sums.get("tokens", 0.0)
        if not count:
            return {}
        return {
            f"{prefix}/loss": sums["loss"] / count,
            f"{prefix}/perplexity": math.exp(min(sums["unweighted"] / count, 700.0)),
            f"{prefix}/token_accuracy": sums["correct"] / count,
            **({f"{prefix}/router_aux_loss": sums["router_aux_loss"] / count} if "router_aux_loss" in sums else {}),
        }
