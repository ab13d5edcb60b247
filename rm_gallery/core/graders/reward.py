"""Grading with a reward model: rewards as scores and ranks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from rm_gallery.core.graders.base_grader import GraderRank, GraderScore
from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup


def is_reward_model(model: Any) -> bool:
    """Whether the model outputs rewards: a chat model of a reward model folder, or any object with `ascore`."""
    return getattr(model, "is_reward_model", False) is True or callable(getattr(model, "ascore", None))


async def find_scorer(model: Any) -> Any:
    """The object with `ascore` of a reward model; loads its folder without blocking the event loop."""
    return model if callable(getattr(model, "ascore", None)) else await asyncio.to_thread(lambda: model.reward_scorer)


async def score_responses(scorer: Any, query: Any, responses: Sequence[Any], tools: Any = None) -> list[float]:
    """One reward per response. Raises UserError for a reward that is not finite.

    tools: tool definitions of the conversation, or their JSON text.
    """
    if callable(getattr(scorer, "build_group", None)):
        given = {"tools": tools} if tools else {}  # a scorer of other make may not take tools
        group = scorer.build_group(query, list(responses), **given)
    else:
        from rm_gallery.scoring.inputs import with_tools

        turns = [_turns(response, "assistant") for response in responses]
        group = PreferenceGroup(_turns(query, "user"), turns, style="chat", metadata=with_tools(tools))
    [rewards] = await scorer.ascore([group])
    for reward in rewards:
        if not math.isfinite(reward):
            raise UserError(f"the model returned the reward {reward}; check its weights and dtype")
    return [float(reward) for reward in rewards]


def _turns(value: Any, role: str) -> Any:
    if value is None:
        return ()
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def as_score(name: str, reward: float, metadata: dict[str, Any]) -> GraderScore:
    """The reward of one response as a result."""
    return GraderScore(name=name, score=reward, metadata={"reward": reward, **metadata})


def as_rank(name: str, rewards: Sequence[float], metadata: dict[str, Any]) -> GraderRank:
    """The ranks of several responses, with `rewards` and `win_probabilities` in the metadata."""
    found = {"rewards": list(rewards), "win_probabilities": win_probabilities(rewards)}
    return GraderRank(name=name, rank=places(rewards), metadata={**found, **metadata})


def win_probabilities(rewards: Sequence[float]) -> list[float]:
    """The probability that each response is the best: the softmax of the rewards.

    This is the distribution of the first rank in the Plackett-Luce model, which for two responses is Bradley-Terry.
    """
    top = max(rewards)
    weights = [math.exp(reward - top) for reward in rewards]
    return [weight / sum(weights) for weight in weights]


def places(values: Sequence[float]) -> list[int]:
    """The rank of each value, 1 for the highest; ties share the better rank (1, 1, 3)."""
    return [1 + sum(other > value for other in values) for value in values]
