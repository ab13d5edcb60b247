"""Pairs: a chosen and a rejected response, as texts or conversations, perhaps with a prompt of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rm_gallery.data.dropped import BadRow
from rm_gallery.data.formats.cells import Cell, read_cell
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.draft import Column, Draft
from rm_gallery.data.formats.values import optional_number
from rm_gallery.schema import Comparison


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
