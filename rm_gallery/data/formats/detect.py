"""Detection: the format of a file, from its columns and first rows, and a check of what the columns hold.

`READERS` has the formats by name.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rm_gallery.data.formats.cells import is_number, kind_of
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.pairs import (
    COMMON_COLUMNS,
    Column,
    Format,
    compare_pair,
    read_conversations,
    read_prompted,
    read_texts,
)
from rm_gallery.data.formats.rankings import (
    compare_completions,
    compare_helpsteer3,
    compare_nested,
    compare_ranks,
    compare_scores,
    read_completions,
    read_conversation,
    read_helpsteer3,
    read_nested,
    read_responses,
    read_single,
)
from rm_gallery.data.sources import Row
from rm_gallery.errors import UserError, nearest

log = logging.getLogger(__name__)

SAMPLE_ROWS = 32
"""Rows from the start of a file that detection needs."""
_PAIRS = ("text", "messages", "json", "prompt")
_KINDS = {"text": "text", "messages": "lists of messages", "json": "JSON strings of lists of messages"}
_HOLDS = {"cell": "text or messages", "list": "lists or their JSON", "number": "numbers", "name": "names"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A format, and the reason for it."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}, since {self.why}"


def choose_format(rows: Sequence[Row], config: FormatConfig, *, logged: set[str] | None = None) -> Choice:
    """The format of a file: the one that `config` names, or under `auto` the first whose columns it has.

    rows: the first rows of the file, at least one; SAMPLE_ROWS are enough. A column exists if any of them has it.
    config: a `ResponsesConfig` ignores labels and also accepts layouts without preferences.
    logged: choices already logged, so that a thousand files in one format give one line; None logs each.
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
    _check_renamed(file, found, config, _formats(config) if name == "auto" else [name])
    if name == "auto":
        choice = _choose(file, readable, found, config)
    else:
        _check_needed(file, found, _columns(name, config))
        choice = Choice(name, f"data.format={name}")
    for column in _columns(choice.name, config):
        _check_values(readable, column)
    if name == "auto" and (logged is None or f"{choice}" not in logged):
        log.info("%s: detected data.format=%s: %s", file, choice.name, choice.why)
        if logged is not None:
            logged.add(f"{choice}")
    return choice


def find_format(name: str, config: FormatConfig) -> Format:
    """The format of this name; UserError for one that does not exist."""
    known = _formats(config)
    if name not in known:
        raise UserError(f"data.format={name}: must be auto or one of {', '.join(known)}.{nearest(name, known)}")
    return known[name]


def _formats(config: FormatConfig) -> dict[str, Format]:
    return READERS if config.has_preferences else UNLABELED_READERS


def _columns(name: str, config: FormatConfig, *, common: bool = True) -> list[Column]:
    """The columns of a format; without labels where no preferences are read."""
    columns = find_format(name, config).columns + (COMMON_COLUMNS if common else ())
    return [column.bind(config) for column in columns if config.has_preferences or not column.is_label]


def _choose(file: str, rows: Sequence[Row], found: Mapping[str, None], config: FormatConfig) -> Choice:
    fitting = [name for name in _formats(config) if all(column.name in found for column in _needed(name, config))]
    if not fitting:
        raise _no_format(file, found, config)
    chosen = Choice(fitting[0], "")
    if fitting[0] in _PAIRS:
        chosen = _choose_pairs(rows, config)
    why = chosen.why or f"it has {_listed(column.name for column in _needed(chosen.name, config))}"
    optional = [column.name for column in _columns(chosen.name, config) if not column.needed and column.name in found]
    if optional:
        why += f"; read too: {_listed(optional)}"
    others = [name for name in fitting if name not in _PAIRS and name != chosen.name]
    if others:
        why += f"; {_listed(others)} would fit too"
    return Choice(chosen.name, why)


def _choose_pairs(rows: Sequence[Row], config: FormatConfig) -> Choice:
    """By what most responses in these rows hold, and by whether any row has a prompt."""
    names = [name for name in (config.chosen_key, config.rejected_key) if name is not None]
    kinds = Counter(kind for row in rows for name in names if (kind := kind_of(row.values.get(name))))
    chats = kinds["messages"] + kinds["json"]
    kind = "text" if kinds["text"] > chats or not chats else "json" if kinds["json"] > kinds["messages"] else "messages"
    what = f"{_listed(names)} hold {_KINDS[kind]}"
    if len(kinds) > 1:
        what += f" in {kinds[kind]} of {kinds.total()} cells"
    prompts = [row.values.get(config.prompt_key) for row in rows] if config.prompt_key is not None else []
    prompt = next((value for value in prompts if value and (not isinstance(value, str) or value.strip())), None)
    if prompt is not None:
        kind_of_prompt = _KINDS.get(kind_of(prompt) or "", "something else")
        return Choice("prompt", f"{_shown(config.prompt_key)} holds {kind_of_prompt}, and {what}")
    return Choice(kind, f"{what}, and there is no prompt")


def _needed(name: str, config: FormatConfig) -> list[Column]:
    return [column for column in _columns(name, config, common=False) if column.needed]


def _check_renamed(file: str, found: Mapping[str, None], config: FormatConfig, names: Iterable[str]) -> None:
    """Raise UserError for a missing column that the configuration names in place of the usual one."""
    usual = type(config)()
    defaults = {column.key: column.name for name in _formats(usual) for column in _columns(name, usual)}
    for column in (column for name in names for column in _columns(name, config)):
        if column.name is not None and column.name != defaults[column.key] and column.name not in found:
            raise _no_column(file, found, column)


def _check_needed(file: str, found: Mapping[str, None], columns: Iterable[Column]) -> None:
    for column in columns:
        if column.needed and column.name is None:
            raise UserError(f"data.{column.key}=null: data.format needs this column; set its name, or another format")
        if column.needed and column.name not in found:
            raise _no_column(file, found, column)


def _check_values(rows: Sequence[Row], column: Column) -> None:
    """Raise UserError for a column in which no row holds what is read from it: the file is wrong, not a row."""
    values = [(row, row.values.get(column.name or "")) for row in rows]
    filled = [(row, value) for row, value in values if value not in (None, "", "null")]
    if not filled or any(_fits(value, column) for _, value in filled):
        return
    row, value = filled[0]
    must = column.needed and column.key != "prompt_key"  # without a prompt, pairs are in another format
    unless = "" if must else "; null reads no such column"
    raise UserError(
        f"{row.where}: column {_shown(column.name)!r} contains {_held(value)}, not {_HOLDS[column.holds]}; "
        f"convert it, or choose another column with data.{column.key}{unless}"
    )


def _fits(value: Any, column: Column) -> bool:
    if column.holds == "cell":
        return kind_of(value) is not None
    if column.holds == "list":
        return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))
    if column.holds == "number":
        return is_number(value)
    return isinstance(value, str | int | float)


def _held(value: Any) -> str:
    if isinstance(value, list):
        items = [item for item in value if item is not None]
        return f"lists of {type(items[0]).__name__}" if items else "lists"
    return "text" if isinstance(value, str) else type(value).__name__


def _no_format(file: str, found: Mapping[str, None], config: FormatConfig) -> UserError:
    """Names the missing column of the format that fits best; all formats if no column is known."""
    best: list[Column] = []
    share = 0.0
    for name in _formats(config):
        needed = [column for column in _needed(name, config) if column.name is not None]
        missing = [column for column in needed if column.name not in found]
        fit = 1 - len(missing) / len(needed) if needed else 0.0
        if fit > share:
            best, share = missing, fit
    if best:
        return _no_column(file, found, best[0])
    looks = "; ".join(f"{name}: {each.looks}" for name, each in _formats(config).items())
    close = next((hint for name in ("chosen", "rejected", "responses") if (hint := nearest(name, found))), "")
    return UserError(
        f"{file}: no known format in the columns {_listed(found)}; rename them, or set data.chosen_key, "
        f"data.rejected_key or another data.*_key ({looks}).{close}"
    )


def _no_column(file: str, found: Mapping[str, None], column: Column) -> UserError:
    name = column.name or ""
    return UserError(
        f"{file}: no column {_shown(name)!r} (columns: {_listed(found)}); rename it or set data.{column.key}."
        + nearest(name, found)
    )


def _listed(names: Iterable[str | None], limit: int = 20) -> str:
    """'a, b and 3 more'; 'none' for none."""
    shown = [_shown(name) for name in names]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return (", ".join(shown[:limit]) or "none") + more


def _shown(name: str | None) -> str:
    """The name of a column for a message: short, and on one line."""
    text = name or ""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 40 else f"{text[:40]}..."


_PROMPT = Column("prompt_key", "cell")
_PAIR = (Column("chosen_key", "cell", needed=True), Column("rejected_key", "cell", needed=True))
_PAIR_LABELS = (Column("margin_key", "number", is_label=True), Column("p_chosen_key", "number", is_label=True))
_RESPONSES = (Column("responses_key", "list", needed=True), _PROMPT)

_PAIR_READERS: dict[str, Format] = {
    "text": Format("chosen and rejected as raw texts", read_texts, compare_pair, (*_PAIR, _PROMPT, *_PAIR_LABELS)),
    "messages": Format(
        "chosen and rejected as lists of messages", read_conversations, compare_pair, (*_PAIR, _PROMPT, *_PAIR_LABELS)
    ),
    "json": Format(
        "chosen and rejected as JSON strings of lists of messages",
        read_conversations,
        compare_pair,
        (*_PAIR, _PROMPT, *_PAIR_LABELS),
    ),
    "prompt": Format(
        "a prompt with chosen and rejected",
        read_prompted,
        compare_pair,
        (Column("prompt_key", "cell", needed=True), *_PAIR, *_PAIR_LABELS),
    ),
}
_PUBLISHED_READERS: dict[str, Format] = {
    "helpsteer3": Format(
        "two responses with an overall preference",
        read_helpsteer3,
        compare_helpsteer3,
        (
            Column("columns.context", "cell", needed=True, may_be_null=True),
            Column("columns.response1", "cell", needed=True),
            Column("columns.response2", "cell", needed=True),
            Column("columns.overall_preference", "number", needed=True, is_label=True),
            Column("columns.individual_preference", "list", is_label=True),
        ),
    ),
    "nested": Format(
        "input, and output with a label or score for each response",
        read_nested,
        compare_nested,
        (Column("columns.input", "cell", needed=True), Column("columns.output", "list", needed=True)),
    ),
    "completions": Format(
        "completions with scores",
        read_completions,
        compare_completions,
        (Column("columns.completions", "list", needed=True), Column("columns.instruction", "cell"), _PROMPT),
    ),
}
READERS: dict[str, Format] = {
    **_PAIR_READERS,
    "scored": Format(
        "responses with scores",
        read_responses,
        compare_scores,
        (*_RESPONSES, Column("scores_key", "list", needed=True, is_label=True)),
    ),
    "ranked": Format(
        "responses with ranks",
        read_responses,
        compare_ranks,
        (*_RESPONSES, Column("ranks_key", "list", needed=True, is_label=True)),
    ),
    **_PUBLISHED_READERS,
}
"""`auto` takes the first in this order whose columns a file has; the first three differ by what these hold."""
UNLABELED_READERS: dict[str, Format] = {
    **_PAIR_READERS,
    "conversation": Format(
        "messages that end with the response", read_conversation, None, (Column("messages_key", "cell", needed=True),)
    ),
    "responses": Format("a list of responses", read_responses, None, _RESPONSES),
    "response": Format("one response", read_single, None, (Column("response_key", "cell", needed=True), _PROMPT)),
    **_PUBLISHED_READERS,
}
"""The same for a `ResponsesConfig`."""
