"""Formats: a row becomes a `PreferenceGroup`, or a counted reason why it cannot.

    choose_format(first rows, config) -> Choice(name, why)       once per file; `data.format` names one, or is `auto`
    RowReader(config, name).read(row) -> PreferenceGroup         or raises BadRow(reason)
    read_groups(rows, reader, counts) -> row, group, prompt hash the usable rows; the others are counted by reason
    iter_tasks(files, entries, config, key, logged) -> Task        chunks of all files with their format, for workers
    Readers(config).by_file(rows) -> reader, rows                decoded rows of several files

A format is one entry of `READERS` (registry.py): a function from a row's columns to a `Draft` (pairs.py), one to its
comparisons, and the columns. cells.py reads text, messages, numbers and lists; prompts.py the prompt and the turns
before it; conversations.py joins turns and identifies prompts; row_reader.py makes the group. names.py knows the
columns of published layouts, unread.py finds input and labels that no format reads, checks.py tells the user.

Scoring reads every layout that training accepts, without labels, and three more (`responses`, `response`,
`conversation`): with `ResponsesConfig` in place of `FormatConfig`, `choose_format` and `RowReader` need no
preferences, and groups keep all responses of the row in order. To keep a bad row in place, call `reader.read(row)` and
catch BadRow. `input_style="chat"` makes every row a chat, as a model that was trained on chats needs it.
"""

from __future__ import annotations

from rm_gallery.data.formats.cells import read_cell, read_tools
from rm_gallery.data.formats.config import (
    ColumnNames,
    CustomClassConfig,
    FormatConfig,
    PublishedColumns,
    ResponsesConfig,
)
from rm_gallery.data.formats.conversations import (
    HoldOut,
    as_messages,
    hash_prompt,
    is_wanted,
    prompt_key,
    without_repeats,
)
from rm_gallery.data.formats.detect import SAMPLE_ROWS, WARNING, Choice, choose_format, has_labels
from rm_gallery.data.formats.registry import READERS
from rm_gallery.data.formats.row_reader import (
    Reader,
    Readers,
    RowCounts,
    RowReader,
    Task,
    iter_tasks,
    read_groups,
    source_of,
)

__all__ = [
    "FormatConfig", "ColumnNames", "PublishedColumns", "CustomClassConfig", "ResponsesConfig",
    "READERS", "SAMPLE_ROWS", "WARNING", "Choice", "choose_format", "has_labels",
    "Reader", "RowReader", "Readers", "RowCounts", "read_groups", "Task", "iter_tasks", "source_of",
    "HoldOut", "is_wanted", "prompt_key", "hash_prompt", "read_cell", "read_tools", "as_messages", "without_repeats",
]  # fmt: skip
