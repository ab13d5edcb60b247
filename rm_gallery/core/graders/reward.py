"""Rewards as results of a grader: how any grader scores with a reward model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from rm_gallery.core.graders.base_grader import GraderRank, GraderScore
from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup


def is_reward_model(model: Any) -> bool:
    """Whether the model gives rewards: a chat model of such a folder, or any object with `ascore`."""
    return getattr(model, "is_reward_model", False) is True or callable(getattr(model, "ascore", None))


async def find_scorer(model: Any) -> Any:
    """The object with `ascore` behind a reward model; its folder is loaded without blocking the event loop."""
    return model if callable(getattr(model, "ascore", None)) else await asyncio.to_thread(lambda: model.reward_scorer)


async def score_responses(scorer: Any, query: Any, responses: Sequence[Any]) -> list[float]:
    """One reward per response. Raises UserError when one is not a finite number."""
    if callable(getattr(scorer, "build_group", None)):
        group = scorer.build_group(query, list(responses))
    else:
        group = PreferenceGroup(_turns(query, "user"), [_turns(r, "assistant") for r in responses], style="chat")
    [rewards] = await scorer.ascore([group])
    for reward in rewards:
        if not math.isfinite(reward):
            raise UserError(f"the model gave the reward {reward}; check its weights and dtype")
    return [float(reward) for reward in rewards]


def _turns(value: Any, role: str) -> Any:
    if value is None:
        return ()
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def as_score(name: str, reward: float, metadata: dict[str, Any]) -> GraderScore:
    """The reward of one response, unchanged."""
    return GraderScore(name=name, score=reward, metadata={"reward": reward, **metadata})


def as_rank(name: str, rewards: Sequence[float], metadata: dict[str, Any]) -> GraderRank:
    """The places of several responses, with `rewards` and `win_probabilities` in the metadata."""
    found = {"rewards": list(rewards), "win_probabilities": win_probabilities(rewards)}
    return GraderRank(name=name, rank=places(rewards), metadata={**found, **metadata})


def win_probabilities(rewards: Sequence[float]) -> list[float]:
    """The probability of each response to be the best of all, by the softmax of the rewards; they add up to 1.

    This is the first place in the Plackett-Luce model, which is Bradley-Terry's when there are two responses.
    """
    top = max(rewards)
    weights = [math.exp(reward - top) for reward in rewards]
    return [weight / sum(weights) for weight in weights]


def places(values: Sequence[float]) -> list[int]:
    """The place of each value, 1 for the highest; equal values share the better place (1, 1, 3)."""
    return [1 + sum(other > value for other in values) for value in values]
