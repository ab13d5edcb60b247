"""Hooks: calling the methods of a custom class on a row, and checking the `PreferenceGroup` that they return.

An incomplete row is a BadRow, counted like any other. A hook that raises, or returns a wrong type, is a mistake in the
code: a UserError that names hook, file and row. The class gets the `data` section as `config.max_length`,
`config["max_length"]` or `config.get(...)`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from numbers import Integral, Real
from typing import Any

from rm_gallery.data.custom.loading import describe_error
from rm_gallery.data.formats import FormatConfig, as_messages, read_cell, without_repeats
from rm_gallery.data.formats.cells import check_text, optional_number, own_values, read_name
from rm_gallery.data.formats.conversations import check_answer
from rm_gallery.data.formats.pairs import read_share, read_weight
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import Comparison, Message, PreferenceGroup

_TOO_DEEP = "values nested too deeply"
_DROPPED = "dropped by build_group"


class HookError(UserError):
    """A mistake in the code of a hook, without the row, which the caller adds."""


def call_hook(dataset: Any, hook: str, argument: Any) -> Any:
    """Return `dataset.hook(argument)`.

    Raises HookError from the exception of the hook; BadRow passes, since a hook may drop its row.
    """
    try:
        return getattr(dataset, hook)(argument)
    except (BadRow, HookError):
        raise
    except (Exception, SystemExit) as error:
        advice = "fix the hook"
        if isinstance(error, KeyError) and isinstance(argument, Mapping):
            advice += f" (columns of the row: {', '.join(map(str, argument)) or 'none'})"
        elif isinstance(error, ModuleNotFoundError):
            advice = "import it at the top of the file: its folder is searched only while the file is loaded"
        raise HookError(f"{_name(dataset, hook)} raised {describe_error(error)}; {advice}") from error


def wrong_type(dataset: Any, hook: str, value: Any, wanted: str) -> HookError:
    """The error for a hook that returned `value`."""
    return _returned(dataset, hook, type(value).__name__, wanted)


def _returned(dataset: Any, hook: str, what: str, wanted: str) -> HookError:
    return HookError(f"{_name(dataset, hook)} returned {what} instead of {wanted}; fix the hook")


def _name(dataset: Any, hook: str) -> str:
    return f"{type(dataset).__name__}.{hook}"


def read_row(dataset: Any, row: Row, config: DataSection) -> PreferenceGroup:
    """The group of a row, from `build_group` if the class has it, else from the other hooks.

    Raises BadRow, and UserError that names hook, file and row.
    """
    if row.fault:
        raise BadRow(row.fault)
    try:
        values = own_values(row, config.tools_key)
        if callable(getattr(dataset, "build_group", None)):
            group = _built(dataset, call_hook(dataset, "build_group", values))
        else:
            group = build_pair(dataset, values, config)
        source, metadata = _source(dataset, group, values, config), _metadata(dataset, group, values)
    except HookError as error:
        raise UserError(f"{row.where}: {error}") from (error.__cause__ or error)
    except RecursionError:
        raise BadRow(_TOO_DEEP) from None
    comparisons = [each for each in group.comparisons if config["ties"] or not each.tied]
    if not comparisons:
        raise BadRow("a tie")
    return replace(group, comparisons=tuple(comparisons), where=row.where, source=source, metadata=metadata)


def build_pair(dataset: Any, row: dict[str, Any], config: DataSection) -> PreferenceGroup:
    """Chat group of a pair: the messages of `_build_messages`, then the `chosen` and the `rejected` column.

    A column holds text (an assistant turn), one message, a list of messages, or such a list as JSON; repeated turns of
    the prompt are dropped. The columns for weight, margin and share of annotators are read as in other formats.
    """
    messages = call_hook(dataset, "_build_messages", row)
    try:
        return _pair(_prompt(dataset, "_build_messages", messages), row, config)
    except RecursionError:
        raise BadRow(_TOO_DEEP) from None


def _pair(prompt: list[Message], row: dict[str, Any], config: DataSection) -> PreferenceGroup:
    answers = []
    for option in ("chosen_key", "rejected_key"):
        if config[option] not in row:
            raise BadRow(f"no column {config[option]!r} (data.{option})")
        answers.append(_answer(row[config[option]], config[option]))
    if answers[0] == answers[1]:
        raise BadRow(f"{config.chosen_key} equal to {config.rejected_key}")
    turns, answers = without_repeats(prompt, answers)
    margin = optional_number(row, config.margin_key)
    comparison = Comparison(0, 1, read_weight(row, config.weight_key), margin, read_share(row, config.p_chosen_key))
    return PreferenceGroup(turns, answers, (comparison,), "chat")


def _prompt(dataset: Any, hook: str, messages: Any) -> list[Message]:
    """The messages before the responses, from a hook."""
    wanted = "a list of messages (mappings with role and content)"
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise wrong_type(dataset, hook, messages, wanted)
    odd = [message for message in messages if not isinstance(message, Mapping)]
    if odd:
        raise _returned(dataset, hook, f"a list with {type(odd[0]).__name__} in it", wanted)
    return as_messages(read_cell(list(messages), "prompt", required=False), "user")


def _answer(value: Any, name: str) -> list[Message]:
    """Messages of a response, which ends with an assistant turn."""
    turns = as_messages(read_cell(list(value) if isinstance(value, tuple) else value, name), "assistant")
    check_answer(turns, name)
    return turns


def _built(dataset: Any, made: Any) -> PreferenceGroup:
    """The result of `build_group`, checked and converted."""
    hook = "build_group"
    if made is None:
        raise BadRow(_DROPPED)
    if isinstance(made, tuple) and len(made) == 2 and made[0] is None and isinstance(made[1], str):
        raise BadRow(" ".join(made[1].split()) or _DROPPED)
    if not isinstance(made, PreferenceGroup):
        raise wrong_type(dataset, hook, made, "a PreferenceGroup, None or (None, reason)")
    for values, wanted in ((made.responses, "a list of responses"), (made.comparisons, "a list of comparisons")):
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise wrong_type(dataset, hook, values, wanted)
    made = replace(made, comparisons=_checked_comparisons(dataset, made))
    prompt, responses = made.prompt, made.responses
    if made.style == "text" and all(isinstance(part, str) for part in (prompt, *responses)):
        for part in responses:
            if not check_text(str(part)).strip():
                raise BadRow("empty response")
        check_text(str(prompt))
        return made
    if not isinstance(prompt, str):
        prompt = _prompt(dataset, hook, prompt)
    answers = [_answer(response, "response") for response in responses]
    return replace(made, prompt=as_messages(prompt, "user"), responses=answers, style="chat")


def _checked_comparisons(dataset: Any, group: PreferenceGroup) -> tuple[Comparison, ...]:
    """The comparisons of a group, with numbers of any library converted to float."""
    count = len(group.responses)
    checked = []
    for each in group.comparisons:
        if not isinstance(each, Comparison):
            raise wrong_type(dataset, "build_group", each, "a Comparison in comparisons")
        better, worse = each.better, each.worse
        if not _is_place(better, count) or not _is_place(worse, count) or better == worse:
            raise HookError(
                f"{_name(dataset, 'build_group')} compares response {better!r} with {worse!r} of {count} (the first is "
                "0); fix the hook"
            )
        if not _is_within(each.weight, 0, math.inf):
            raise BadRow("a weight that is not a finite number of at least 0")
        if each.margin is not None and not _is_within(each.margin, -math.inf, math.inf):
            raise BadRow("a margin that is not a finite number")
        if each.p_better is not None and not _is_within(each.p_better, 0, 1):
            raise BadRow("a share of annotators outside 0 to 1")
        margin, share = (None if value is None else float(value) for value in (each.margin, each.p_better))
        checked.append(Comparison(int(better), int(worse), float(each.weight), margin, share, bool(each.tied)))
    if not checked:
        raise BadRow("no comparison between its responses")
    return tuple(checked)


def _is_place(value: Any, count: int) -> bool:
    return isinstance(value, Integral) and int(value) in range(count)


def _is_within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and low <= float(value) <= high


def _source(dataset: Any, group: PreferenceGroup, row: dict[str, Any], config: DataSection) -> str:
    source: Any = group.source
    hook = "build_group"
    if not source:
        hook = "_get_data_source"
        if not callable(getattr(dataset, hook, None)):
            return read_name(row, config.source_key)
        source = call_hook(dataset, hook, row)
    if source is not None and not isinstance(source, str):
        raise wrong_type(dataset, hook, source, "text for the source")
    return check_text(source or "")


def _metadata(dataset: Any, group: PreferenceGroup, row: dict[str, Any]) -> Mapping[str, Any]:
    hook = "build_group"
    if not isinstance(group.metadata, Mapping):
        raise wrong_type(dataset, hook, group.metadata, "a mapping as metadata")
    metadata = dict(group.metadata)
    if "ground_truth" not in metadata and callable(getattr(dataset, "_extract_ground_truth", None)):
        hook = "_extract_ground_truth"
        truth = call_hook(dataset, hook, row)
        if truth is not None and not (isinstance(truth, float) and math.isnan(truth)):  # a missing value in a column
            metadata["ground_truth"] = truth
    for key, value in metadata.items():
        if not isinstance(value, str | int | float | bool | None):
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise wrong_type(dataset, hook, value, f"a plain JSON value as {key}") from None
    return metadata


class DataSection(Mapping[str, Any]):
    """The `data` section for a custom class: read-only, and nested sections are read the same way."""

    def __init__(self, values: Any = None) -> None:
        """values: a mapping, a configuration dataclass, or None; missing keys of `FormatConfig` get their defaults."""
        given = asdict(values) if is_dataclass(values) and not isinstance(values, type) else dict(values or {})
        self._values: dict[str, Any] = {**asdict(FormatConfig()), **given}

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if not isinstance(value, Mapping):
            return value
        section = DataSection()
        section._values = dict(value)
        return section

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"the data section has no key {name!r}")
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"DataSection({self._values})"
