"""Checks of a file whose format is chosen: what its columns hold, labels, order; errors and warnings about columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from rm_gallery.data.formats.cells import as_record, is_number, kind_of, read_number
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.pairs import Column, list_of_responses
from rm_gallery.data.formats.prompts import with_names_of
from rm_gallery.data.formats.registry import READERS, columns_of, find_format, formats_for, needed_columns
from rm_gallery.data.formats.unread import are_sides, find_labels, find_unread_inputs
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow, UserError, nearest

PAIRS = ("text", "messages", "json", "prompt", "lists")
"""Formats of columns of chosen and rejected responses."""
_DOCS = "docs/custom-datasets.md"
_HOLDS = {
    "cell": "text or messages", "responses": "text, messages or lists of these", "record": "objects",
    "list": "lists or their JSON", "number": "numbers", "index": "numbers", "name": "names",
}  # fmt: skip


def check_renamed(file: str, found: Mapping[str, None], config: FormatConfig, names: Iterable[str]) -> None:
    """Raise UserError for a missing column that the configuration names in place of the usual one."""
    usual = replace(type(config)(), attributes=config.attributes, lm_targets=config.lm_targets)
    defaults = {column.key: column.name for name in formats_for(usual) for column in columns_of(name, usual)}
    for column in (column for name in names for column in columns_of(name, config)):
        if column.name is not None and column.name != defaults[column.key] and column.name not in found:
            raise _no_columns(file, found, [column])


def check_needed(file: str, found: Mapping[str, None], columns: Iterable[Column]) -> None:
    needed = [column for column in columns if column.needed]
    for column in needed:
        if column.name is None:
            raise UserError(f"data.{column.key}=null: data.format needs this column; set its name, or another format")
    if missing := [column for column in needed if column.name not in found]:
        raise _no_columns(file, found, missing)


def check_values(rows: Sequence[Row], column: Column) -> None:
    """Raise UserError for a column in which no row holds what is read from it: the file is wrong, not a row."""
    values = [(row, row.values.get(column.name or "")) for row in rows]
    filled = [(row, value) for row, value in values if value not in (None, "", "null")]
    if not filled or any(_fits(value, column) for _, value in filled):
        return
    row, value = filled[0]
    must = column.needed and column.key != "prompt_key"  # without a prompt, pairs are in another format
    unless = "" if must else "; null reads no such column"
    raise UserError(
        f"{row.where}: column {shown(column.name)!r} contains {_held(value)}, not {_HOLDS[column.holds]}; "
        f"convert it, or choose another column with data.{column.key}{unless}"
    )


def _fits(value: Any, column: Column) -> bool:
    if column.holds == "responses":
        return kind_of_response(value) is not None
    if column.holds == "record":
        return as_record(value) is not None
    if column.holds == "cell":
        return kind_of(value) is not None
    if column.holds == "list":
        return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))
    if column.holds in ("number", "index"):
        return is_number(value)
    return isinstance(value, str | int | float)


def _held(value: Any) -> str:
    if isinstance(value, list):
        items = [item for item in value if item is not None]
        return f"lists of {type(items[0]).__name__}" if items else "lists"
    return "text" if isinstance(value, str) else type(value).__name__


def check_labels(rows: Sequence[Row], name: str, columns: Sequence[Column], config: FormatConfig) -> None:
    """Raise UserError if chosen and rejected are sides and a label says which is better, or if they name columns."""
    first, second = config.chosen_key or "", config.rejected_key or ""
    if name not in PAIRS:
        return
    cells = [(row.values, row.values.get(key)) for row in rows for key in (first, second) if row.values.get(key)]
    if cells and all(isinstance(cell, str) and cell in values for values, cell in cells):
        raise UserError(
            f"{rows[0].file}: {shown(first)} and {shown(second)} hold names of columns, not responses; see {_DOCS}"
        )
    labels = find_labels(rows, [column.name for column in columns if not column.is_label])
    if labels and are_sides(first, second):
        fitting = [each for each in READERS if each not in PAIRS and _has_needed(rows, each)]
        advice = f"remove both keys: data.format={fitting[0]} reads it" if fitting else f"see {_DOCS}"
        raise UserError(
            f"{rows[0].file}: data.chosen_key={shown(first)} and data.rejected_key={shown(second)} are the two sides "
            f"of a comparison, and which side is better seems to be in {listed(labels)}, which training would ignore; "
            f"{advice}, or drop that column if it is no label"
        )


def _has_needed(rows: Sequence[Row], name: str) -> bool:
    found = dict.fromkeys(column for row in rows for column in row.values)
    return all(column.name in found for column in needed_columns(name, with_names_of(rows, FormatConfig())))


def check_indices(rows: Sequence[Row], name: str, columns: Sequence[Column], config: FormatConfig) -> None:
    """Raise UserError for labels that count from 1, whose 1 would be read as the second response."""
    for column in (each for each in columns if each.holds == "index"):
        found = [pair for row in rows if (pair := _index_of(row, name, column, config)) is not None]
        if all(1 <= number <= count for number, count in found) and any(number == count for number, count in found):
            raise UserError(
                f"{rows[0].file}: {shown(column.name)} counts from 0, but here from 1 to the number of responses; "
                f"subtract 1, or see {_DOCS}"
            )


def _index_of(row: Row, name: str, column: Column, config: FormatConfig) -> tuple[float, int] | None:
    """The index in a row and the number of its responses; None for a bad row."""
    try:
        count = len(find_format(name, config).read(row.values, config).responses)
        number = read_number(row.values.get(column.name or ""), "")
    except (BadRow, RecursionError):
        return None
    return (number, count) if count > 1 else None


def check_joined(rows: Sequence[Row], name: str, config: FormatConfig) -> None:
    """Raise UserError if no two consecutive rows have the same prompt, in a format that joins such rows."""
    if not find_format(name, config).joins_rows or len(rows) < 2 or config.attributes:
        return
    prompts = [row.values.get(config.prompt_key or "") for row in rows]
    if not any(prompt and prompt == following for prompt, following in pairwise(prompts)):
        raise UserError(
            f"{rows[0].file}: each row has one response with {shown(config.columns.helpfulness)}, and no two "
            f"consecutive rows have the same {shown(config.prompt_key)}; sort the rows by prompt, or compare them "
            f"with rm-gallery export-data (docs/exporting.md, {_DOCS})"
        )


def check_attributes(rows: Sequence[Row], config: FormatConfig) -> None:
    """Raise UserError for a name of `model.attributes` that no row has, as a column or in the object of attributes."""
    columns = dict.fromkeys(name for row in rows for name in row.values)
    records = [as_record(row.values.get(config.attributes_key or "")) or {} for row in rows]
    for name in config.attributes:
        if name not in columns and not any(name in record for record in records):
            raise UserError(
                f"{rows[0].file}: no column {shown(name)!r} of model.attributes or objective.score_column "
                f"(columns: {listed(columns)}) and no "
                f"such field in {shown(config.attributes_key)!r}; rename the column, or remove the name."
                + nearest(name, columns)
            )


def warnings_of(rows: Sequence[Row], name: str, columns: Sequence[Column], config: FormatConfig) -> Iterator[str]:
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
        if column == getattr(config, key):  # a system turn or a history beside raw texts
            yield f"column {shown(column)!r} is not read before raw texts; set data.prompt_key, or see {_DOCS}"
            continue
        instead = f" instead of {shown(prompt)}" if prompt is not None and key == "prompt_key" else ""
        yield (
            f"column {shown(column)!r} holds {held}, looks like input and is not read; set "
            f"data.{key}={shown(column)} to read it{instead}, or see {_DOCS}"
        )


def no_format(rows: Sequence[Row], found: Mapping[str, None], config: FormatConfig) -> UserError:
    """Names the missing column of the format that fits best; all formats if no column is known."""
    file = rows[0].file
    pair = (config.chosen_key, config.rejected_key)
    labels = find_labels(rows, pair) if config.has_preferences and not config.attributes else []
    if labels:
        return UserError(
            f"{file}: no known format in the columns {listed(found)}; which response is better seems to be in "
            f"{listed(labels)}, so no two columns are always chosen and rejected; write these columns, or "
            f"read the rows with a class ({_DOCS})"
        )
    best: list[Column] = []
    share = 0.0
    for name in formats_for(config):
        needed = [column for column in needed_columns(name, config) if column.name is not None]
        missing = [column for column in needed if column.name not in found]
        fit = 1 - len(missing) / len(needed) if needed else 0.0
        if fit > share:
            best, share = missing, fit
    if best:
        return _no_columns(file, found, best)
    looks = "; ".join(f"{name}: {each.looks}" for name, each in formats_for(config).items())
    close = next((hint for name in ("chosen", "rejected", "responses") if (hint := nearest(name, found))), "")
    return UserError(
        f"{file}: no known format in the columns {listed(found)}; rename them, or set data.chosen_key, "
        f"data.rejected_key or another data.*_key ({looks}).{close}"
    )


def _no_columns(file: str, found: Mapping[str, None], missing: Sequence[Column]) -> UserError:
    names = " and no column ".join(repr(shown(column.name)) for column in missing)
    keys = " and ".join(f"data.{column.key}" for column in missing)
    return UserError(
        f"{file}: no column {names} (columns: {listed(found)}); rename {'it' if len(missing) == 1 else 'them'} "
        f"or set {keys}." + nearest(missing[0].name or "", found)
    )


def listed(names: Iterable[str | None], limit: int = 20) -> str:
    """'a, b and 3 more'; 'none' for none."""
    every = [shown(name) for name in names]
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return (", ".join(every[:limit]) or "none") + more


def shown(name: str | None) -> str:
    """The name of a column for a message: short, and on one line."""
    text = name or ""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 40 else f"{text[:40]}..."


def kind_of_response(value: Any) -> str | None:
    """`lists` for a list of responses, else as `kind_of`."""
    return "lists" if list_of_responses(value) is not None else kind_of(value)
