"""What the integrations share: the scorer of a model, and rewards of samples that share prompts. Loads torch only for
folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring.base import BaseScorer
from rm_gallery.scoring.ensemble import members_of
from rm_gallery.scoring.remote import RemoteScorer, names_servers, open_servers


@dataclass(frozen=True)
class Sample:
    """A prompt and a response, each text or messages."""

    prompt: Any
    response: Any
    tools: Any = None


def open_scorer(source: Any, *, tokenizer: Any = None, **settings: Any) -> BaseScorer:
    """The scorer of a folder, a run, a hub model, an ensemble `A+B`, servers (a URL or a list), or of a scorer itself.

    tokenizer: of the model behind a server; see `RemoteScorer`. settings: of `RewardScorer.from_folder` (or
    `from_folders`), or of `RemoteScorer`. Raises UserError for anything else, and for a model that cannot be loaded.
    """
    if isinstance(source, BaseScorer):
        return source
    if isinstance(source, Sequence) and not isinstance(source, str):
        return RemoteScorer(list(source), tokenizer=tokenizer, **settings)
    if not isinstance(source, str | Path):
        raise UserError(f"a reward model is a folder, a URL or a scorer, not {type(source).__name__}")
    text = str(source)
    if names_servers(text):
        return open_servers(text, tokenizer=tokenizer, **settings)
    if tokenizer is not None:
        raise UserError(f"tokenizer is for models behind servers, and {text} is none; remove it")
    from rm_gallery.scoring.scorer import RewardScorer

    members = members_of(text)
    return RewardScorer.from_folder(text, **settings) if len(members) == 1 else RewardScorer.from_folders(
        members, **settings
    )  # fmt: skip


def score_samples(scorer: BaseScorer, samples: Sequence[Sample]) -> list[float | Exception]:
    """The reward of each sample, or why it has none. A prompt is computed once for all its responses."""
    places: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        places.setdefault(repr((sample.prompt, sample.tools)), []).append(index)
    found: list[float | Exception] = [UserError("not scored")] * len(samples)
    groups: list[PreferenceGroup] = []
    members: list[list[int]] = []
    for each in places.values():
        try:
            groups.append(build_group(scorer, [samples[index] for index in each]))
            members.append(each)
        except ValueError as error:
            for index in each:
                found[index] = error
    for group, indices, rewards in zip(groups, members, scorer.score_each(groups), strict=True):
        if not isinstance(rewards, Exception):
            for index, reward in zip(indices, rewards, strict=True):
                found[index] = float(reward)
        elif len(indices) == 1:
            found[indices[0]] = rewards
        else:  # one response of several is at fault
            for index, response in zip(indices, group.responses, strict=True):
                found[index] = _alone(scorer, group, response)
    return found


def build_group(scorer: BaseScorer, samples: Sequence[Sample]) -> PreferenceGroup:
    """The group of samples with one prompt.

    Texts for a model of raw texts are joined as they are, as a policy continues its prompt. For a model of chats, a
    text is a user turn and its response an assistant turn.
    """
    prompt, responses = samples[0].prompt, [sample.response for sample in samples]
    if scorer.inputs.style == "text" and all(isinstance(part, str) for part in (prompt, *responses)):
        return PreferenceGroup(prompt, responses, style="text")
    return scorer.build_group(prompt, responses, samples[0].tools)


def _alone(scorer: BaseScorer, group: PreferenceGroup, response: Any) -> float | Exception:
    [rewards] = scorer.score_each([replace(group, responses=[response])])
    return rewards if isinstance(rewards, Exception) else float(rewards[0])
