"""Regression of the absolute score of a response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rm_gallery.objectives.attributes import Attributes


@dataclass(frozen=True)
class Regression(Attributes):
    """Squared error between the reward and the score that the data have for the response.

    loss = sum over responses of weight x (r - score)^2, divided by the number of responses with a score: `attributes`
    with one output (Wang et al. 2024, "HelpSteer2"). The reward is in the unit of the scores.

    Needs a score of each response; single responses are enough. Use it where responses are graded on one scale, and the
    grade itself matters, not only the order: a threshold, prompts with one response. Where the order matters, compare
    it with the objectives on comparisons, which ignore that some prompts have better responses than others.

    Example: rewards [1, 3], scores [2, 3]: (1 + 0) / 2 = 0.5.
    """

    names: tuple[str, ...] = ("score",)

    def means(self, sums: Mapping[str, float], prefix: str) -> dict[str, float]:
        """The loss, mse and pearson over responses, and accuracy over pairs of a prompt whose scores differ."""
        return {name.removesuffix("_score"): value for name, value in super().means(sums, prefix).items()}
