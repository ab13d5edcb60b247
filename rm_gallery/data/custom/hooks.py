"""Hooks: what a custom class makes of one row becomes a checked `PreferenceGroup`.

A row that holds too little is a BadRow, counted like any other. A hook that raises, or gives something else than it
should, is a mistake in the code: a UserError that names hook, file and row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rm_gallery.data.custom.section import DataSection
from rm_gallery.data.custom.sources import describe_error
from rm_gallery.data.dropped import BadRow
from rm_gallery.data.formats import as_messages, read_cell, without_repeats
from rm_gallery.data.formats.turns import check_answer
from rm_gallery.data.formats.values import check_text, optional_number, read_name
from rm_gallery.data.source import Row
from rm_gallery.errors import UserError
from rm_gallery.schema import Comparison, Message, PreferenceGroup


class HookError(UserError):
    """A mistake in the code of a hook; whoever knows the row puts it in front."""


def call_hook(dataset: Any, hook: str, argument: Any) -> Any:
    """What `dataset.hook(argument)` gives.

    Raises HookError, from the hook's own exception; BadRow passes, since it says that the row holds too little.
    """
    try:
        return getattr(dataset, hook)(argument)
    except (BadRow, HookError):
        raise
    except Exception as error:
        advice = "correct the hook"
        if isinstance(error, KeyError) and isinstance(argument, Mapping):
            advice += f" (columns of the row: {', '.join(map(str, argument)) or 'none'})"
        elif isinstance(error, ModuleNotFoundError):
            advice = "import it at the top of the file: its folder is searched only while the file is loaded"
        raise HookError(f"{_name(dataset, hook)} raised {describe_error(error)}; {advice}") from error


def wrong_type(dataset: Any, hook: str, value: Any, wanted: str) -> HookError:
    """The error for a hook that gave `value` instead of what is `wanted`."""
    return _gave(dataset, hook, type(value).__name__, wanted)


def _gave(dataset: Any, hook: str, what: str, wanted: str) -> HookError:
    return HookError(f"{_name(dataset, hook)} gave {what} instead of {wanted}; correct the hook")


def _name(dataset: Any, hook: str) -> str:
    return f"{type(dataset).__name__}.{hook}"


def read_row(dataset: Any, row: Row, config: DataSection) -> PreferenceGroup:
    """The group of a row: from `build_group` if the class has it, else from the other hooks.

    Raises BadRow, and UserError that names hook, file and row.
    """
    if row.fault:
        raise BadRow(row.fault)
    try:
        if callable(getattr(dataset, "build_group", None)):
            group = _built(dataset, call_hook(dataset, "build_group", row.values))
        else:
            group = build_pair(dataset, row.values, config)
        source, metadata = _source(dataset, group, row.values, config), _metadata(dataset, group, row.values)
    except HookError as error:
        raise UserError(f"{row.where}: {error}") from (error.__cause__ or error)
    return replace(group, where=row.where, source=source, metadata=metadata)


def build_pair(dataset: Any, row: dict[str, Any], config: DataSection) -> PreferenceGroup:
    """Chat group of a pair: the messages of `_build_messages`, then the `chosen` and the `rejected` column.

    A column holds text (an assistant turn), one message, a list of messages, or such a list as JSON; turns of the
    prompt that it repeats count once. Columns of a weight, a margin and a share of people count as in other formats.
    """
    prompt = _prompt(dataset, "_build_messages", call_hook(dataset, "_build_messages", row))
    answers = []
    for option in ("chosen_key", "rejected_key"):
        if config[option] not in row:
            raise BadRow(f"no column {config[option]!r} (data.{option})")
        answers.append(_answer(row[config[option]], config[option]))
    if answers[0] == answers[1]:
        raise BadRow(f"{config.chosen_key} equal to {config.rejected_key}")
    turns, answers = without_repeats(prompt, answers)
    return PreferenceGroup(turns, answers, (_comparison(row, config),), "chat")


def _comparison(row: dict[str, Any], config: DataSection) -> Comparison:
    weight, share = optional_number(row, config.weight_key), optional_number(row, config.p_chosen_key)
    if weight is not None and weight < 0:
        raise BadRow(f"negative {config.weight_key}")
    if share is not None and not 0 <= share <= 1:
        raise BadRow(f"{config.p_chosen_key} outside 0 to 1")
    margin = optional_number(row, config.margin_key)
    return Comparison(0, 1, 1.0 if weight is None else weight, margin, share)


def _prompt(dataset: Any, hook: str, messages: Any) -> list[Message]:
    """The messages before the responses, as a hook gave them."""
    wanted = "a list of messages (mappings with role and content)"
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise wrong_type(dataset, hook, messages, wanted)
    odd = [message for message in messages if not isinstance(message, Mapping)]
    if odd:
        raise _gave(dataset, hook, f"a list with {type(odd[0]).__name__} in it", wanted)
    return as_messages(read_cell(list(messages), "prompt", required=False), "user")


def _answer(value: Any, name: str) -> list[Message]:
    """Messages of a response, which ends with what the assistant said or called."""
    turns = as_messages(read_cell(list(value) if isinstance(value, tuple) else value, name), "assistant")
    check_answer(turns[-1], name)
    return turns


def _built(dataset: Any, made: Any) -> PreferenceGroup:
    """What `build_group` gave, checked and in the form of the pipeline."""
    if made is None:
        raise BadRow("left out by build_group")
    if isinstance(made, tuple) and len(made) == 2 and made[0] is None and isinstance(made[1], str):
        raise BadRow(made[1])
    if not isinstance(made, PreferenceGroup):
        raise wrong_type(dataset, "build_group", made, "a PreferenceGroup, None or (None, reason)")
    if isinstance(made.responses, str) or not isinstance(made.responses, Sequence):
        raise wrong_type(dataset, "build_group", made.responses, "a list of responses")
    _check_comparisons(dataset, made)
    if all(isinstance(part, str) for part in (made.prompt, *made.responses)) and made.style == "text":
        if not all(str(response).strip() for response in made.responses):
            raise BadRow("empty response")
        return made
    prompt = made.prompt
    if not isinstance(prompt, str):
        prompt = _prompt(dataset, "build_group", prompt)
    answers = [_answer(response, "response") for response in made.responses]
    return replace(made, prompt=as_messages(prompt, "user"), responses=answers, style="chat")


def _check_comparisons(dataset: Any, group: PreferenceGroup) -> None:
    known = range(len(group.responses))
    for each in group.comparisons:
        if not isinstance(each, Comparison):
            raise wrong_type(dataset, "build_group", each, "a Comparison in comparisons")
        if each.better not in known or each.worse not in known or each.better == each.worse:
            raise HookError(
                f"{_name(dataset, 'build_group')} compares response {each.better} with {each.worse}, of {len(known)} "
                "that count from 0; correct the hook"
            )
        if not _is_within(each.weight, 0, math.inf):
            raise BadRow("a weight that is not a finite number of at least 0")
        if each.margin is not None and not _is_within(each.margin, -math.inf, math.inf):
            raise BadRow("a margin that is not a finite number")
        if each.p_better is not None and not _is_within(each.p_better, 0, 1):
            raise BadRow("a share of people outside 0 to 1")
    if not group.comparisons:
        raise BadRow("no comparison between its responses")


def _is_within(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and low <= value <= high


def _source(dataset: Any, group: PreferenceGroup, row: dict[str, Any], config: DataSection) -> str:
    if group.source:
        return check_text(group.source)
    if not callable(getattr(dataset, "_get_data_source", None)):
        return read_name(row, config.source_key)
    source = call_hook(dataset, "_get_data_source", row)
    if source is not None and not isinstance(source, str):
        raise wrong_type(dataset, "_get_data_source", source, "text")
    return check_text(source or "")


def _metadata(dataset: Any, group: PreferenceGroup, row: dict[str, Any]) -> Mapping[str, Any]:
    metadata, hook = dict(group.metadata), "build_group"
    if "ground_truth" not in metadata and callable(getattr(dataset, "_extract_ground_truth", None)):
        hook = "_extract_ground_truth"
        truth = call_hook(dataset, hook, row)
        if truth is not None and truth == truth:  # NaN is what a column of numbers has for none
            metadata["ground_truth"] = truth
    for key, value in metadata.items():
        if not isinstance(value, str | int | float | bool | None):
            try:
                json.dumps(value)
            except (TypeError, ValueError, RecursionError):
                raise wrong_type(dataset, hook, value, f"a plain JSON value as {key}") from None
    return metadata
