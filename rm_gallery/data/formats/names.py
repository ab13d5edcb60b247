"""Names of columns in published layouts, used where a file does not have the usual ones.

A name that the configuration sets is never replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any, TypeVar

from rm_gallery.data.formats.config import FormatConfig

_Config = TypeVar("_Config", bound=FormatConfig)

# Each is used if a file has all its columns, and not all of the usual ones.
_SETS: tuple[Mapping[str, str], ...] = (
    {"chosen_key": "chosen_response", "rejected_key": "rejected_response"},  # UltraFeedback by Argilla
    {"chosen_key": "response", "rejected_key": "rejected_response"},  # ms-swift: query, response
    {"chosen_key": "preferred_output", "rejected_key": "non_preferred_output"},  # OpenAI
    {"columns.rejected_response": "rejected_messages"},  # ms-swift
    {"columns.conversation_a": "response_a", "columns.conversation_b": "response_b", "columns.winner": "winner"},
    # LMSYS on Kaggle: a column of 0 and 1 for each outcome
    {
        "columns.conversation_a": "response_a",
        "columns.conversation_b": "response_b",
        "columns.winner": "winner_model_a",
    },
    {"columns.winner": "winner_model_a"},
    {
        "columns.context": "prompt",
        "columns.response1": "response_1",
        "columns.response2": "response_2",
        "columns.overall_preference": "preference_strength",
    },  # the preferences of HelpSteer2
    {"columns.input": "prompt", "columns.output": "answers"},  # Nectar
    {"responses_key": "generations", "scores_key": "ratings"},  # distilabel
    {"responses_key": "generations", "scores_key": "rating"},
    {"messages_key": "conversations"},
    {"messages_key": "conversation"},
)
_OF_CONVERSATIONS: tuple[Mapping[str, str], ...] = (
    {"columns.messages": "conversations"},  # ShareGPT
    {"columns.messages": "conversation"},
    {"columns.response": "completion"},  # TRL
    {"columns.response": "output"},  # Alpaca: instruction, input, output
    {"columns.response": "answer"},
)
"""The same for supervised fine-tuning."""
_LABELS = ("scores_key", "columns.winner", "columns.overall_preference")
_PROMPTS = ("question", "query", "context", "messages", "conversations", "conversation", "trajectory", "history")


def with_found_names(config: _Config, columns: Collection[str]) -> _Config:
    """The configuration with the names that these columns have; itself where they have the usual ones."""
    found = config
    for names in _OF_CONVERSATIONS if config.lm_targets == "assistant" else _SETS:
        if not config.has_preferences:
            names = {key: name for key, name in names.items() if key not in _LABELS}
        keys = [key for key in names if _has(config, key)]
        if len(keys) < len(names) or not all(name in columns for name in names.values()):
            continue
        now = {key: attrgetter(key)(found) for key in keys}
        usual = type(config)()
        if any(now[key] != attrgetter(key)(usual) for key in keys) or all(name in columns for name in now.values()):
            continue
        found = _renamed(found, names)
    return found


def _has(config: FormatConfig, key: str) -> bool:
    return hasattr(config.columns if key.startswith("columns.") else config, key.removeprefix("columns."))


def _renamed(config: _Config, names: Mapping[str, str]) -> _Config:
    inner = {key.removeprefix("columns."): name for key, name in names.items() if key.startswith("columns.")}
    outer: dict[str, Any] = {key: name for key, name in names.items() if not key.startswith("columns.")}
    return replace(config, columns=replace(config.columns, **inner), **outer)


def prompt_names(config: FormatConfig) -> tuple[str, ...]:
    """Columns that may hold the prompt, the first first: `data.prompt_key`, or the usual one and those of others."""
    if config.prompt_key is None:
        return ()
    if config.prompt_key != FormatConfig.prompt_key:
        return (config.prompt_key,)
    of_alpaca = [name for name in (config.columns.instruction, config.columns.input) if name is not None]
    first, second, *others = _PROMPTS
    return tuple(dict.fromkeys((config.prompt_key, *of_alpaca[:1], first, second, *of_alpaca[1:], *others)))
