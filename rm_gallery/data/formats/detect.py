"""Detection: the format of a file, from its columns and first rows, and a check of what the columns hold."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from rm_gallery.data.formats.cells import as_record, is_number, kind_of, read_cell
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.names import with_found_names
from rm_gallery.data.formats.pairs import COMMON_COLUMNS, Column, Format, list_of_responses, read_prompted
from rm_gallery.data.formats.prompts import find_prompt
from rm_gallery.data.formats.registry import READERS, UNLABELED_READERS
from rm_gallery.data.formats.unread import are_sides, find_labels, find_unread_inputs
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow, UserError, nearest

log = logging.getLogger(__name__)

_Config = TypeVar("_Config", bound=FormatConfig)

SAMPLE_ROWS = 32
"""Rows from the start of a file that detection needs."""
WARNING = "warning: "
"""Start of what `choose_format` adds to `logged` for a warning."""
_PAIRS = ("text", "messages", "json", "prompt", "lists")
_DOCS = "docs/custom-datasets.md"
_KINDS = {"text": "text", "messages": "lists of messages", "json": "JSON strings of lists of messages"}
_HOLDS = {
    "cell": "text or messages",
    "responses": "text, messages or lists of these",
    "record": "objects",
    "list": "lists or their JSON",
    "number": "numbers",
    "name": "names",
}


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
    named = _with_names_of(readable, found, config)
    if name == "auto":
        choice = _choose(file, readable, found, named)
    else:
        _check_needed(file, found, _columns(name, named))
        choice = Choice(name, f"data.format={name}")
    columns = _columns(choice.name, named)
    for column in columns:
        _check_values(readable, column)
    if config.has_preferences:
        _check_labels(readable, choice.name, columns, named)
        _check_joined(readable, choice.name, named)
    said = set[str]() if logged is None else logged
    if name == "auto" and f"{choice}" not in said:
        log.info("%s: detected data.format=%s: %s", file, choice.name, choice.why)
        said.add(f"{choice}")
    for warning in _warnings(readable, choice.name, columns, named):
        if not any(each.endswith(warning) for each in said):
            log.warning("%s: %s", file, warning)
            said.add(f"{WARNING}{file}: {warning}")
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
    bound = [column.bind(config) for column in columns if config.has_preferences or not column.is_label]
    # A text `history` may be the prompt; raw texts have no turns before them.
    skipped = (
        ("system_key", "history_key")
        if name == "text"
        else ("history_key",) * (config.prompt_key == config.history_key)
    )
    return [column for column in bound if column.key not in skipped]


def _with_names_of(rows: Sequence[Row], found: Mapping[str, None], config: _Config) -> _Config:
    """The configuration with the names of the columns that are read, the prompt of most rows included."""
    named = with_found_names(config, found)
    prompts = Counter(name for row in rows if (name := find_prompt(row.values, config)) is not None)
    return replace(named, prompt_key=prompts.most_common(1)[0][0]) if prompts else named


def _choose(file: str, rows: Sequence[Row], found: Mapping[str, None], config: FormatConfig) -> Choice:
    fitting = [name for name in _formats(config) if all(column.name in found for column in _needed(name, config))]
    if not fitting:
        raise _no_format(rows, found, config)
    chosen = Choice(fitting[0], "")
    if fitting[0] in _PAIRS:
        chosen = _choose_pairs(rows, config)
    elif (
        fitting[0] == "conversation"
        and {"response", "responses"} & set(fitting)
        and not _end_with_answers(rows, config)
    ):
        chosen = Choice("responses" if "responses" in fitting else "response", "")
    why = chosen.why or f"it has {_listed(column.name for column in _needed(chosen.name, config))}"
    optional = [column.name for column in _columns(chosen.name, config) if not column.needed and column.name in found]
    if config.prompt_key == config.columns.instruction and config.columns.input in found:
        optional.append(config.columns.input)
    if optional:
        why += f"; read too: {_listed(dict.fromkeys(optional))}"
    others = [name for name in fitting if name not in _PAIRS and name != chosen.name]
    if others:
        why += f"; {_listed(others)} would fit too"
    return Choice(chosen.name, why)


def _choose_pairs(rows: Sequence[Row], config: FormatConfig) -> Choice:
    """By what most responses in these rows hold, and by whether any row has a prompt."""
    names = [name for name in (config.chosen_key, config.rejected_key) if name is not None]
    kinds = Counter(kind for row in rows for name in names if (kind := _kind_of(row.values.get(name))))
    if kinds["lists"] * 2 >= kinds.total() > 0:
        return Choice("lists", f"{_listed(names)} hold lists of responses")
    chats = kinds["messages"] + kinds["json"]
    kind = "text" if kinds["text"] > chats or not chats else "json" if kinds["json"] > kinds["messages"] else "messages"
    what = f"{_listed(names)} hold {_KINDS[kind]}"
    if len(kinds) > 1:
        what += f" in {kinds[kind]} of {kinds.total()} cells"
    prompt = next((value for row in rows if (value := _prompt_of(row, config)) is not None), None)
    if prompt is None or _repeat_prompts(rows, config):
        return Choice(kind, f"{what}, and there is no prompt")
    kind_of_prompt = _KINDS.get(kind_of(prompt) or "", "something else")
    return Choice("prompt", f"{_shown(config.prompt_key)} holds {kind_of_prompt}, and {what}")


def _kind_of(value: Any) -> str | None:
    return "lists" if list_of_responses(value) is not None else kind_of(value)


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
    ends = Counter(_last_role(row.values.get(getattr(config, "messages_key", None) or "")) for row in rows)
    return ends["assistant"] * 2 >= ends.total()


def _last_role(value: Any) -> str:
    try:
        cell = read_cell(value, "messages")
    except BadRow:
        return ""
    return "" if isinstance(cell, str) else str(cell[-1]["role"])


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
    if column.holds == "responses":
        return _kind_of(value) is not None
    if column.holds == "record":
        return as_record(value) is not None
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


def _check_labels(rows: Sequence[Row], name: str, columns: Sequence[Column], config: FormatConfig) -> None:
    """Raise UserError if chosen and rejected are sides, and another column says which of them is better."""
    first, second = config.chosen_key or "", config.rejected_key or ""
    if name not in _PAIRS or not are_sides(first, second):
        return
    labels = find_labels(rows, [column.name or "" for column in columns])
    if labels:
        fitting = [each for each in READERS if each not in _PAIRS and _has_needed(rows, each)]
        advice = f"remove both keys: data.format={fitting[0]} reads it" if fitting else f"see {_DOCS}"
        raise UserError(
            f"{rows[0].file}: data.chosen_key={_shown(first)} and data.rejected_key={_shown(second)} are the two sides "
            f"of a comparison, and {_listed(labels)} looks like the label that says which side is better: training "
            f"would ignore it; {advice}, or drop that column if it is no label"
        )


def _has_needed(rows: Sequence[Row], name: str) -> bool:
    found = dict.fromkeys(column for row in rows for column in row.values)
    return all(column.name in found for column in _needed(name, _with_names_of(rows, found, FormatConfig())))


def _check_joined(rows: Sequence[Row], name: str, config: FormatConfig) -> None:
    """Raise UserError if no two consecutive rows have the same prompt, in a format that joins such rows."""
    if not find_format(name, config).joins_rows or len(rows) < 2:
        return
    prompts = [row.values.get(config.prompt_key or "") for row in rows]
    if not any(prompt and prompt == following for prompt, following in pairwise(prompts)):
        raise UserError(
            f"{rows[0].file}: each row has one response with {_shown(config.columns.helpfulness)}, and no two "
            f"consecutive rows have the same {_shown(config.prompt_key)}; sort the rows by prompt, or compare them "
            f"with rm-gallery export-data (docs/exporting.md, {_DOCS})"
        )


def _warnings(rows: Sequence[Row], name: str, columns: Sequence[Column], config: FormatConfig) -> Iterator[str]:
    """Warnings about columns that look like input and are not read."""
    read = {column.name for column in columns if column.name is not None}
    if config.prompt_key == config.columns.instruction and config.columns.input is not None:
        read.add(config.columns.input)
    drafts = []
    for row in rows:
        try:
            drafts.append((row, find_format(name, config).read(row.values, config)))
        except (BadRow, RecursionError):
            continue
    prompt = next((draft.prompt_name for _, draft in drafts if draft.prompt), None)
    for column, held, key in find_unread_inputs(drafts, read, config):
        instead = f" instead of {_shown(prompt)}" if prompt is not None and key == "prompt_key" else ""
        yield (
            f"column {_shown(column)!r} holds {held}, looks like input and is not read; set "
            f"data.{key}={_shown(column)} to read it{instead}, or see {_DOCS}"
        )


def _no_format(rows: Sequence[Row], found: Mapping[str, None], config: FormatConfig) -> UserError:
    """Names the missing column of the format that fits best; all formats if no column is known."""
    file = rows[0].file
    labels = find_labels(rows) if config.has_preferences else []
    if labels:
        return UserError(
            f"{file}: no known format in the columns {_listed(found)}; {_listed(labels)} looks like a label that says "
            f"which response is better, so no two columns are always chosen and rejected; write these columns, or read "
            f"the rows with a class ({_DOCS})"
        )
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
