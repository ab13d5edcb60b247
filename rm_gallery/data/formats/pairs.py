"""Pairs: a chosen and a rejected response, as texts or conversations, with or without a separate prompt.

Also what every format is made of: `Draft` (what a reader finds in a row), `Column` and `Format`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal

from rm_gallery.data.formats.cells import Cell, optional_number, read_cell
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.prompts import read_column, read_prompt
from rm_gallery.errors import BadRow
from rm_gallery.schema import Comparison, Rating

MAX_RESPONSES = 256
"""Per row: every two are compared, and 256 responses make 32,640 comparisons."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Prompt and responses of a row as its columns hold them, before texts and messages are joined."""

    prompt: Cell
    """'' for none."""
    responses: Sequence[Cell]
    names: Sequence[str]
    """Name of each response in reasons."""
    prompt_name: str | None = None
    """Column of the prompt; None where the format does not require one."""
    bare: bool = False
    """Whether texts stay raw texts even if a chat template could turn prompt and response into a chat."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column that a format reads; its name is the value of a configuration key."""

    key: str
    """Configuration key below `data`."""
    holds: Literal["cell", "responses", "list", "record", "number", "index", "name"]
    """text or messages, these or a list of them, a list or its JSON, an object, a number, one that counts from 0, or
    text."""
    needed: bool = False
    """Whether a file without it is not in this format."""
    is_label: bool = False
    """Whether it says which response is better; not read where no preferences are wanted."""
    may_be_null: bool = False
    """Whether a needed column may be turned off by a null name."""
    name: str | None = None
    """Its name under the configuration at hand, from `bind`; None if it is not read."""

    def bind(self, config: FormatConfig) -> Column:
        """The column with its name."""
        name = attrgetter(self.key)(config)
        return replace(self, name=name, needed=self.needed and not (self.may_be_null and name is None))


@dataclass(frozen=True)
class Format:
    """A dataset layout. To add one: write `read` and `compare`, and add an entry to `READERS`."""

    looks: str
    """What rows look like, for messages."""
    read: Callable[[Mapping[str, Any], FormatConfig], Draft]
    """Prompt and responses of a row. Raises BadRow."""
    compare: Callable[[Mapping[str, Any], FormatConfig, int], list[Comparison]] | None
    """Comparisons between the given number of responses; None for a layout without preferences. Raises BadRow."""
    columns: tuple[Column, ...]
    """The columns of the layout, without `COMMON_COLUMNS`."""
    rate: Callable[[Mapping[str, Any], FormatConfig, int], list[Rating]] | None = None
    """What rows say about the given number of responses by themselves; None for nothing. Raises BadRow."""
    joins_rows: bool = False
    """Whether consecutive rows with the same prompt are one group; see joined.py."""


COMMON_COLUMNS = (
    Column("system_key", "cell"),
    Column("history_key", "list"),
    Column("weight_key", "number", is_label=True),
    Column("source_key", "name"),
    Column("tools_key", "list"),
)
"""Read by every format where a file has them."""


def read_texts(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `text`: both responses are raw texts; a prompt, which few rows have, precedes them directly."""
    responses, names = _responses(values, config, config.chosen_key, config.rejected_key)
    prompt = read_column(values, config.prompt_key)
    for part, name in ((prompt, config.prompt_key), *zip(responses, names, strict=True)):
        if not isinstance(part, str):
            raise BadRow(f"{name} with messages in a file of texts")
    return Draft(prompt, responses, names, bare=True)


def read_conversations(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Formats `messages` and `json`: both responses are conversations, as lists of messages or as JSON of such lists.

    Text is rejected even if the other response is a conversation: the turns before it are unknown.
    """
    draft = read_prompted(values, config)
    for response, name in zip(draft.responses, draft.names, strict=True):
        if isinstance(response, str) and response:
            raise BadRow(f"{name} with text in a file of messages")
    return draft


def read_prompted(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `prompt`: a prompt, as text or messages, with responses that are texts or messages.

    A row without a prompt is valid if both responses are conversations, which then contain it.
    """
    return read_two(values, config, config.chosen_key, config.rejected_key)


def read_two(values: Mapping[str, Any], config: FormatConfig, *keys: str | None) -> Draft:
    """A prompt with the responses in these columns."""
    return prompted(values, config, *_responses(values, config, *keys))


def _responses(values: Mapping[str, Any], config: FormatConfig, *keys: str | None) -> tuple[list[Cell], list[str]]:
    names = [key or "" for key in keys]
    return [read_response(values.get(name), name, config) for name in names], names


def prompted(
    values: Mapping[str, Any],
    config: FormatConfig,
    responses: Sequence[Cell],
    names: Sequence[str],
    *,
    first: str | None = None,
) -> Draft:
    """These responses with the prompt of the row. first: see `read_prompt`."""
    prompt, name = read_prompt(values, config, responses, first=first)
    return Draft(prompt, responses, names, name)


def compare_pair(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """Chosen is better than rejected; margin and share of annotators where a row has them."""
    margin = optional_number(values, config.margin_key)
    return [Comparison(0, 1, margin=margin, p_better=read_share(values, config.p_chosen_key))]


def read_lists(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `lists`: several chosen and several rejected responses to one prompt, as in RewardBench 2."""
    sides = _sides(values, config)
    names = [name for name, side in sides for _ in side]
    return prompted(values, config, [read_response(item, name, config) for name, side in sides for item in side], names)


def compare_lists(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """Every chosen response is better than every rejected one."""
    if count > MAX_RESPONSES:
        raise BadRow(f"more than {MAX_RESPONSES} responses")
    (name, chosen), (other, rejected) = _sides(values, config)
    for key, side in ((name, chosen), (other, rejected)):
        if not side:
            raise BadRow(f"empty {key}")
    return [Comparison(better, worse) for better in range(len(chosen)) for worse in range(len(chosen), count)]


def _sides(values: Mapping[str, Any], config: FormatConfig) -> list[tuple[str, Sequence[Any]]]:
    names = [config.chosen_key or "", config.rejected_key or ""]
    return [(name, list_of_responses(values.get(name)) or [values.get(name)]) for name in names]


def list_of_responses(value: Any) -> Sequence[Any] | None:
    """A list of texts or of conversations, or the JSON of a list of texts; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith('["'):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    is_list = isinstance(value, list) and bool(value) and all(isinstance(item, str | list) for item in value)
    return value if is_list else None


def read_share(values: Mapping[str, Any], name: str | None) -> float | None:
    """The share of annotators who prefer the chosen response, or None."""
    share = optional_number(values, name)
    if share is not None and not 0 <= share <= 1:
        raise BadRow(f"{name} outside 0 to 1")
    return share


def read_weight(values: Mapping[str, Any], name: str | None) -> float:
    """The factor on the loss of a row; 1 if it has none."""
    weight = optional_number(values, name)
    if weight is not None and weight < 0:
        raise BadRow(f"negative {name}")
    return 1.0 if weight is None else weight


def read_response(value: Any, name: str, config: FormatConfig) -> Cell:
    """Text or messages of a response. Raises BadRow for null, and for an empty one where preferences are read."""
    if value is None:
        raise BadRow(f"null {name}")
    return read_cell(value, name, required=config.has_preferences)
