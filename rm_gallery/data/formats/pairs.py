"""Pairs: a chosen and a rejected response, as texts or conversations, with or without a separate prompt.

Also what every format is made of: `Draft` (what a reader finds in a row), `Column` and `Format`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rm_gallery.data.formats.cells import Cell, optional_number, read_cell
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.errors import BadRow
from rm_gallery.schema import Comparison


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
    """Whether texts stay bare texts even if a chat template could turn prompt and response into a chat."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column that a format reads."""

    key: str
    """Configuration key below `data` that names it."""
    name: str | None
    """Its name; None if it is not read."""
    holds: Literal["cell", "list", "number", "name"]
    """text or messages, a list or its JSON, a number, or text."""
    needed: bool = False
    """Whether a file without it is not in this format."""
    is_label: bool = False
    """Whether it says which response is better; not read where no preferences are wanted."""


@dataclass(frozen=True)
class Format:
    """A dataset layout. To add one: write `read`, `compare` and `columns`, and add an entry to `READERS`."""

    looks: str
    """What rows look like, for messages."""
    read: Callable[[Mapping[str, Any], FormatConfig], Draft]
    """Prompt and responses of a row. Raises BadRow."""
    compare: Callable[[Mapping[str, Any], FormatConfig, int], list[Comparison]] | None
    """Comparisons between the given number of responses; None for a layout without preferences. Raises BadRow."""
    columns: Callable[[FormatConfig], list[Column]]
    """The columns of the layout, without `common_columns`."""


def common_columns(config: FormatConfig) -> list[Column]:
    """The columns that every format reads where a file has them."""
    return [
        Column("weight_key", config.weight_key, "number", is_label=True),
        Column("source_key", config.source_key, "name"),
        Column("tools_key", config.tools_key, "list"),
    ]


def read_texts(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `text`: both responses are bare texts; a prompt, which few rows have, precedes them directly."""
    draft = _read(values, config, bare=True)
    for part, name in ((draft.prompt, config.prompt_key), *zip(draft.responses, draft.names, strict=True)):
        if not isinstance(part, str):
            raise BadRow(f"{name} with messages in a file of texts")
    return draft


def read_conversations(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Formats `messages` and `json`: both responses are conversations, as lists of messages or as JSON of such lists.

    A text is refused even if the other response is a conversation: nothing says which turns precede it.
    """
    draft = _read(values, config)
    for response, name in zip(draft.responses, draft.names, strict=True):
        if isinstance(response, str) and response:
            raise BadRow(f"{name} with text in a file of messages")
    return draft


def read_prompted(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `prompt`: a prompt, as text or messages, with responses that are texts or messages.

    A row without a prompt is valid if both responses are conversations, which then contain it.
    """
    return _read(values, config)


def _read(values: Mapping[str, Any], config: FormatConfig, *, bare: bool = False) -> Draft:
    names = (config.chosen_key or "", config.rejected_key or "")
    responses = [read_response(values.get(name), name, config) for name in names]
    prompt = read_prompt(values, config.prompt_key)
    return Draft(prompt, responses, names, None if bare else config.prompt_key, bare)


def compare_pair(values: Mapping[str, Any], config: FormatConfig, count: int) -> list[Comparison]:
    """Chosen is better than rejected; margin and share of annotators where a row has them."""
    margin = optional_number(values, config.margin_key)
    return [Comparison(0, 1, margin=margin, p_better=read_share(values, config.p_chosen_key))]


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


def read_prompt(values: Mapping[str, Any], name: str | None) -> Cell:
    """Text or messages of the prompt column; '' where the row has none."""
    return "" if name is None else read_cell(values.get(name), name, required=False)


def pair_columns(config: FormatConfig) -> list[Column]:
    """Columns of the formats `text`, `messages` and `json`."""
    return [
        Column("chosen_key", config.chosen_key, "cell", needed=True),
        Column("rejected_key", config.rejected_key, "cell", needed=True),
        Column("prompt_key", config.prompt_key, "cell"),
        Column("margin_key", config.margin_key, "number", is_label=True),
        Column("p_chosen_key", config.p_chosen_key, "number", is_label=True),
    ]


def prompted_columns(config: FormatConfig) -> list[Column]:
    """Columns of the format `prompt`."""
    return [
        Column("prompt_key", config.prompt_key, "cell", needed=True),
        *(column for column in pair_columns(config) if column.key != "prompt_key"),
    ]
