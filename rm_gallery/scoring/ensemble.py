"""EnsembleScorer: one reward from several scorers. Does not load torch unless it loads a folder.

Coste et al. 2024 (ICLR, arXiv 2310.02743), "Reward Model Ensembles Help Mitigate Overoptimization": policies exploit
the errors of a single reward model, and the mean, a lower bound or the minimum of several is harder to exploit.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.base import BaseScorer, Rewards, raise_first
from rm_gallery.scoring.inputs import InputBuilder

log = logging.getLogger(__name__)

STD, ENSEMBLE = "std", "ensemble"
_FORMS = "mean, lower, lower:K or min"


class Reduction:
    """How the rewards of the members become one: `mean`, `lower` (mean - K std, K = 1 unless `lower:K`) or `min`."""

    def __init__(self, text: str, *, key: str = "reduce") -> None:
        """key: of the option, for messages. Raises UserError for another text."""
        name, _, factor = text.partition(":")
        try:
            self.factor = float(factor) if factor else 1.0
        except ValueError:
            self.factor = math.nan
        is_known = name == "lower" if factor else name in ("mean", "lower", "min") and text == name
        if not is_known or not 0 <= self.factor < math.inf:
            raise UserError(f"{key}={text}: must be {_FORMS}, with K at least 0")
        self.name, self.text = name, text

    def of(
        self, rewards: Sequence[Sequence[float]], scale: Sequence[tuple[float, float]] | None = None
    ) -> list[tuple[float, float]]:
        """(reward, standard deviation over the members) of each of R responses from the members' rewards [M, R].

        scale: mean and standard deviation of each member, by which its rewards are normalized first.
        """
        if scale is not None:
            rewards = [[(x - mean) / std for x in row] for row, (mean, std) in zip(rewards, scale, strict=True)]
        return [self._of_one(values) for values in zip(*rewards, strict=True)]

    def _of_one(self, values: Sequence[float]) -> tuple[float, float]:
        mean, variance = _moments(values)
        std = math.sqrt(variance)
        if self.name == "min":
            return min(values), std
        return mean - self.factor * std if self.name == "lower" else mean, std


class EnsembleScorer(BaseScorer):
    """The rewards of several scorers, combined; `attributes` has their standard deviation and each member's reward.

    All members are in memory, and each tokenizes texts with its own tokenizer and chat template.
    """

    def __init__(
        self, members: Sequence[BaseScorer], *, reduce: str = "mean", names: Sequence[str] | None = None
    ) -> None:
        """members: their rewards need a common scale (see `RewardScorer.from_folders`). names: of the members.

        Raises UserError for members that read texts in another way: raw text and chats, or with other separators.
        """
        if not members:
            raise UserError("an ensemble needs at least one model")
        self.members, self.reduction = list(members), Reduction(reduce)
        self.attributes = (STD, *(names or (each.folder for each in members)))
        self.folder = "+".join(each.folder for each in members) + f" ({self.reduction.text})"
        forms = {(each.inputs.style, each.inputs.separator if each.inputs.style == "text" else "") for each in members}
        if len(forms) > 1:
            styles = {style for style, _ in forms}
            how = "one was trained on raw text and one on chats" if len(styles) > 1 else "they join prompts differently"
            raise UserError(
                f"{self.folder}: not an ensemble: {how}, so they do not read the same texts; use them apart"
            )
        first = members[0].inputs
        self.inputs = InputBuilder(first.style, first.separator)  # members warn of tools that they do not read
        self._spread = [0.0] * len(members)

    def score(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """One list of K rewards per group; raises UserError for a group that a member cannot score."""
        groups = self.fitted(groups)
        return raise_first(self.score_each(groups), groups)

    def score_each(self, groups: Sequence[PreferenceGroup], *, attributes: bool = False) -> list[list[Any] | Exception]:
        """Like `score`, with an exception in place of the rewards of a group that a member cannot score.

        attributes: in place of each reward a list of it, the standard deviation and the reward of each member.
        """
        groups = self.fitted(groups)
        found = [member.score_each(groups) for member in self.members]
        self._spread = [spread + _variance(each) for spread, each in zip(self._spread, found, strict=True)]
        combined: list[list[Any] | Exception] = []
        for results in zip(*found, strict=True):
            bad = [(index, each) for index, each in enumerate(results) if isinstance(each, Exception)]
            rewards = [each for each in results if not isinstance(each, Exception)]
            combined.append(self._name(*bad[0]) if bad else self._combine(rewards, attributes))
        return combined

    async def ascore(self, groups: Sequence[PreferenceGroup]) -> Rewards:
        """Async `score`."""
        groups = self.fitted(groups)
        found = await asyncio.gather(*(member.ascore(groups) for member in self.members))
        return [self._combine(results, False) for results in zip(*found, strict=True)]

    def close(self) -> None:
        """Close the members. Warns if the rewards of one spread so much more that it decides alone."""
        low, high = (self._spread.index(limit(self._spread)) for limit in (min, max))
        ratio = math.sqrt(self._spread[high] / max(self._spread[low], 1e-24))
        if ratio > 3:
            log.warning(
                "%s: the rewards of %s spread %.3g times as much as those of %s, so it decides almost alone",
                self.folder, self.attributes[1 + high], ratio, self.attributes[1 + low],
            )  # fmt: skip
        self._spread = [0.0] * len(self.members)
        for member in self.members:
            member.close()

    def _combine(self, rewards: Sequence[Sequence[float]], attributes: bool) -> list[Any]:
        found = self.reduction.of(rewards)
        if not attributes:
            return [reward for reward, _ in found]
        return [[*each, *own] for each, own in zip(found, zip(*rewards, strict=True), strict=True)]

    def _name(self, index: int, error: Exception) -> Exception:
        """The error of a member with its name."""
        return type(error)(f"{self.attributes[1 + index]}: {error}") if isinstance(error, BadRow) else error


def _variance(results: Sequence[list[Any] | Exception]) -> float:
    values = [reward for each in results if not isinstance(each, Exception) for reward in each]
    return _moments(values)[1] if values else 0.0


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """(mean, variance, divided by the number of values)."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((value - mean) ** 2 for value in values) / len(values)


def members_of(model: str) -> list[str]:
    """The folders or servers of an ensemble `a+b`; a path that exists, or has no `+`, stands alone."""
    if "+" not in model or Path(model).expanduser().exists():
        return [model]
    parts = [part.strip() for part in model.split("+")]
    if not all(parts):
        raise UserError(f"model={model}: an ensemble is two or more models joined by +, e.g. runs/a+runs/b")
    twice = next((part for part in parts if parts.count(part) > 1), None)
    if twice is not None:
        raise UserError(f"model={model}: {twice} is in the ensemble twice; name it once")
    return parts


def shared_scale(
    models: Sequence[str], normalize: bool | None, weights: Mapping[str, float] | None = None
) -> list[tuple[float, float]] | None:
    """Mean and standard deviation of each model's validation rewards, for a common scale; None to use rewards as they
    are.

    models: folders, hub names or servers. normalize: None normalizes if every model has these figures, which is logged.
    weights: see `RewardScorer.from_folder`; the figures are not those of other weights.
    Raises UserError for True and a model without them.
    """
    if normalize is False or (weights is not None and not normalize):
        return None
    from rm_gallery.modeling.export import read_statistics
    from rm_gallery.scoring.loading import no_statistics
    from rm_gallery.scoring.model_folder import file_of
    from rm_gallery.scoring.remote import names_servers

    found = []
    for model in models:
        config = None if names_servers(model) else file_of(model, "config.json")
        statistics = None if config is None else read_statistics(config.parent)
        if statistics is not None:
            found.append(statistics)
        elif normalize:
            raise no_statistics(model)
        else:
            log.warning(
                "ensemble: rewards are combined as they are, since %s has no mean and standard deviation of validation "
                "rewards (trainer.test_freq): members should come from the same recipe",
                model,
            )
            return None
    log.info("ensemble: rewards are normalized by each model's validation rewards before they are combined")
    return found
