"""Pairs: a chosen and a rejected response, as texts or conversations, perhaps with a prompt of their own.

What every format is made of stands here too: what a reader makes of a row (`Draft`), and what a format is, its reader
and the columns that it needs.
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
    """A row as its reader understood it, before messages and texts are put together."""

    prompt: Cell
    """'' for none."""
    responses: Sequence[Cell]
    comparisons: Sequence[Comparison]
    names: Sequence[str]
    """What reasons call each response."""
    bare: bool = False
    """Texts stay bare texts even where a chat template could make a chat of prompt and response."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column that a format reads."""

    key: str
    """Configuration key below `data` that names it."""
    name: str | None
    """Its name; None when it is not to be read."""
    holds: Literal["cell", "list", "number", "name"]
    """text or messages, a list or its JSON, a number, or text."""
    needed: bool = False
    """A file without it is not in this format."""


@dataclass(frozen=True)
class Format:
    """A format: what rows look like, and the reader that understands them."""

    looks: str
    """For messages to people."""
    read: Callable[[Mapping[str, Any], FormatConfig], Draft]
    """Columns of a row -> what it says. Raises BadRow for a row that cannot be used."""
    columns: Callable[[FormatConfig], list[Column]]
    """The columns that `read` reads, those that every format reads apart."""


def common_columns(config: FormatConfig) -> list[Column]:
    """The columns that are read in every format, where a file has them."""
    return [
        Column("weight_key", config.weight_key, "number"),
        Column("source_key", config.source_key, "name"),
        Column("tools_key", config.tools_key, "list"),
    ]


def read_texts(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `text`: both responses are bare texts; a prompt, which few rows have, stands directly before them."""
    draft = _read(values, config, bare=True)
    for part, name in ((draft.prompt, config.prompt_key), *zip(draft.responses, draft.names, strict=True)):
        if not isinstance(part, str):
            raise BadRow(f"{name} with messages in a file of texts")
    return draft


def read_conversations(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Formats `messages` and `json`: both responses are conversations, as lists of messages or as JSON of such lists.

    A text is refused even where the other response is a conversation: nothing says which turns stand before it.
    """
    draft = _read(values, config)
    for response, name in zip(draft.responses, draft.names, strict=True):
        if isinstance(response, str):
            raise BadRow(f"{name} with text in a file of messages")
    return draft


def read_prompted(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `prompt`: a prompt, as text or messages, before responses that are texts or messages.

    A row without a prompt can be used when both responses are conversations, which then hold it.
    """
    draft = _read(values, config)
    check_prompted(draft.prompt, draft.responses, config.prompt_key)
    return draft


def _read(values: Mapping[str, Any], config: FormatConfig, *, bare: bool = False) -> Draft:
    names = (config.chosen_key or "", config.rejected_key or "")
    responses = [read_cell(values.get(name), name) for name in names]
    share = optional_number(values, config.p_chosen_key)
    if share is not None and not 0 <= share <= 1:
        raise BadRow(f"{config.p_chosen_key} outside 0 to 1")
    margin = optional_number(values, config.margin_key)
    comparison = Comparison(0, 1, margin=margin, p_better=share)
    return Draft(read_prompt(values, config.prompt_key), responses, (comparison,), names, bare)


def read_prompt(values: Mapping[str, Any], name: str | None) -> Cell:
    """Text or messages of the prompt column; '' where the row has none."""
    return "" if name is None else read_cell(values.get(name), name, required=False)


def check_prompted(prompt: Cell, responses: Sequence[Cell], name: str | None) -> None:
    """Raise BadRow for responses that are texts without the prompt that they answer, from the column of this name.

    Such a row among chats would be a bare text, in another style than the rest of its file. Where there are no prompts
    at all, the configuration says so with a null name.
    """
    has_prompt = bool(prompt.strip() if isinstance(prompt, str) else prompt)
    if name is not None and not has_prompt and any(isinstance(response, str) for response in responses):
        raise BadRow(f"text responses without {name}")


def pair_columns(config: FormatConfig) -> list[Column]:
    """Columns of the formats `text`, `messages` and `json`."""
    return [
        Column("chosen_key", config.chosen_key, "cell", needed=True),
        Column("rejected_key", config.rejected_key, "cell", needed=True),
        Column("prompt_key", config.prompt_key, "cell"),
        Column("margin_key", config.margin_key, "number"),
        Column("p_chosen_key", config.p_chosen_key, "number"),
    ]


def prompted_columns(config: FormatConfig) -> list[Column]:
    """Columns of the format `prompt`."""
    return [
        Column("prompt_key", config.prompt_key, "cell", needed=True),
        *(column for column in pair_columns(config) if column.key != "prompt_key"),
    ]
