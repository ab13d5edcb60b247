"""Detection: the format of a file, from its columns and first rows; checks.py checks the choice."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rm_gallery.data.formats.cells import kind_of, read_cell
from rm_gallery.data.formats.checks import (
    PAIRS,
    check_attributes,
    check_indices,
    check_joined,
    check_labels,
    check_needed,
    check_renamed,
    check_values,
    kind_of_response,
    listed,
    no_format,
    shown,
    warnings_of,
)
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.pairs import read_prompted
from rm_gallery.data.formats.prompts import with_names_of
from rm_gallery.data.formats.registry import columns_of, formats_for, needed_columns
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow, UserError

log = logging.getLogger(__name__)

SAMPLE_ROWS = 32
"""Rows from the start of a file that detection needs."""
WARNING = "warning: "
"""Start of what `choose_format` adds to `logged` for a warning."""
_KINDS = {"text": "text", "messages": "lists of messages", "json": "JSON strings of lists of messages"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A format, and the reason for it."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}, since {self.why}"


def choose_format(
    rows: Sequence[Row], config: FormatConfig, *, logged: set[str] | None = None, quiet: bool = False
) -> Choice:
    """The format of a file: the one that `config` names, or under `auto` the first whose columns it has.

    rows: the first rows of the file, at least one; SAMPLE_ROWS are enough. A column exists if any of them has it.
    config: a `ResponsesConfig` ignores labels and also accepts layouts without preferences.
    logged: choices already logged, so that a thousand files in one format give one line; None logs each. quiet: log
    nothing.
    Raises UserError, naming the file and its columns, if it is in no format or not in the named one, if a column that
    the configuration renames is missing, and if a column holds nothing of the kind that is read from it.
    """
    assert rows, "a format is chosen from at least one row"
    file, readable = rows[0].file, [row for row in rows if not row.fault]
    if not readable:
        raise UserError(
            f"{rows[0].where}: {rows[0].fault}; no row of the first {len(rows)} can be read; recreate the file"
        )
    found = dict.fromkeys(name for row in readable for name in row.values)
    name = config.format
    check_renamed(file, found, config, formats_for(config) if name == "auto" else [name])
    named = with_names_of(readable, config)
    if name == "auto":
        choice = _choose(file, readable, found, named)
    else:
        check_needed(file, found, columns_of(name, named))
        choice = Choice(name, f"data.format={name}")
    columns = columns_of(choice.name, named)
    if config.has_preferences and config.attributes:
        check_attributes(readable, named)
    for column in columns:
        check_values(readable, column)
    if config.has_preferences:
        check_labels(readable, choice.name, columns, named)
        check_joined(readable, choice.name, named)
        check_indices(readable, choice.name, columns, named)
    if quiet:
        return choice
    said = set[str]() if logged is None else logged
    if name == "auto" and f"{choice}" not in said:
        log.info("%s: detected data.format=%s: %s", file, choice.name, choice.why)
        said.add(f"{choice}")
    for warning in warnings_of(readable, choice.name, columns, named):
        if not any(each.endswith(warning) for each in said):
            log.warning("%s: %s", file, warning)
            said.add(f"{WARNING}{file}: {warning}")
    return choice


def has_labels(rows: Sequence[Row], config: FormatConfig) -> bool:
    """Whether rows with these columns can say which response is better.

    rows: as in `choose_format`. config: one that reads preferences.
    """
    readable = [row for row in rows if not row.fault]
    return bool(_fitting({name for row in readable for name in row.values}, with_names_of(readable, config)))


def _fitting(found: Container[str | None], config: FormatConfig) -> list[str]:
    """The formats whose columns are among those found."""
    known = formats_for(config)
    return [name for name in known if all(column.name in found for column in needed_columns(name, config))]


def _choose(file: str, rows: Sequence[Row], found: Mapping[str, None], config: FormatConfig) -> Choice:
    fitting = _fitting(found, config)
    if not fitting:
        raise no_format(rows, found, config)
    chosen = Choice(fitting[0], "")
    if fitting[0] in PAIRS:
        chosen = _choose_pairs(rows, config)
    elif (
        fitting[0] == "conversation"
        and {"response", "responses"} & set(fitting)
        and not _end_with_answers(rows, config)
    ):
        chosen = Choice("responses" if "responses" in fitting else "response", "")
    why = chosen.why or f"it has {listed(column.name for column in needed_columns(chosen.name, config))}"
    optional = [column.name for column in columns_of(chosen.name, config) if not column.needed and column.name in found]
    if config.prompt_key == config.columns.instruction and config.columns.input in found:
        optional.append(config.columns.input)
    if optional:
        why += f"; read too: {listed(dict.fromkeys(optional))}"
    others = [name for name in fitting if name not in PAIRS and name != chosen.name]
    if others:
        why += f"; {listed(others)} would fit too"
    return Choice(chosen.name, why)


def _choose_pairs(rows: Sequence[Row], config: FormatConfig) -> Choice:
    """By what most responses in these rows hold, and by whether any row has a prompt."""
    names = [name for name in (config.chosen_key, config.rejected_key) if name is not None]
    kinds = Counter(kind for row in rows for name in names if (kind := kind_of_response(row.values.get(name))))
    if kinds["lists"] * 2 >= kinds.total() > 0:
        return Choice("lists", f"{listed(names)} hold lists of responses")
    chats = kinds["messages"] + kinds["json"]
    kind = "text" if kinds["text"] > chats or not chats else "json" if kinds["json"] > kinds["messages"] else "messages"
    what = f"{listed(names)} hold {_KINDS[kind]}"
    if len(kinds) > 1:
        what += f" in {kinds[kind]} of {kinds.total()} cells"
    prompt = next((value for row in rows if (value := _prompt_of(row, config)) is not None), None)
    if prompt is None or _repeat_prompts(rows, config):
        return Choice(kind, f"{what}, and there is no prompt")
    kind_of_prompt = _KINDS.get(kind_of(prompt) or "", "something else")
    return Choice("prompt", f"{shown(config.prompt_key)} holds {kind_of_prompt}, and {what}")


def _prompt_of(row: Row, config: FormatConfig) -> Any:
    """The cell of the prompt that the format `prompt` reads; None for none."""
    try:
        if not read_prompted(row.values, config).prompt:
            return None
    except BadRow:  # which the row is counted for later
        pass
    return row.values.get(config.prompt_key or "") or None


def _repeat_prompts(rows: Sequence[Row], config: FormatConfig) -> bool:
    """Whether responses are texts that contain the prompt, in a column that is not named as such."""
    if config.prompt_key == FormatConfig.prompt_key:
        return False
    texts = [
        [row.values.get(key or "") for key in (config.prompt_key, config.chosen_key, config.rejected_key)]
        for row in rows
    ]
    full = [list(map(str, cells)) for cells in texts if all(isinstance(cell, str) and cell.strip() for cell in cells)]
    repeated = [cells for cells in full if all(cells[0].strip() in cell for cell in cells[1:])]
    return bool(full) and len(repeated) == len(full) and sum(len(cells[0]) for cells in full) >= 12 * len(full)


def _end_with_answers(rows: Sequence[Row], config: FormatConfig) -> bool:
    """Whether most conversations end with an assistant turn."""
    ends = Counter(
        _last_role(row.values.get(getattr(config, "messages_key", None) or config.columns.messages or ""))
        for row in rows
    )
    return ends["assistant"] * 2 >= ends.total()


def _last_role(value: Any) -> str:
    try:
        cell = read_cell(value, "messages")
    except BadRow:
        return ""
    return "" if isinstance(cell, str) else str(cell[-1]["role"])
