"""Formats: one row of a file becomes a `PreferenceGroup`, or a counted reason why it cannot.

    choose_format(first rows, config) -> Choice(name, why)     once per file; `data.format` names one, or is `auto`
    RowReader(config, name).read(row) -> PreferenceGroup       or BadRow(reason)
    read_groups(rows, config, dropped=...)                     both, over all rows of several files

A format is one entry of `READERS` (readers.py): a function from a row's columns to a `Draft` (draft.py), and the
columns that it needs. What all formats share lies around it: cells.py reads text and messages, values.py numbers and
lists, turns.py puts conversations together, row_reader.py makes the group. prompt_key.py says which groups have the
same prompt.
"""

from __future__ import annotations

from rm_gallery.data.formats.cells import read_cell
from rm_gallery.data.formats.choose import SAMPLE_ROWS, Choice, choose_format
from rm_gallery.data.formats.config import (
    ColumnNames,
    CustomClassConfig,
    FormatConfig,
    PublishedColumns,
)
from rm_gallery.data.formats.prompt_key import prompt_key
from rm_gallery.data.formats.readers import READERS
from rm_gallery.data.formats.row_reader import RowReader, read_groups
from rm_gallery.data.formats.turns import as_messages, without_repeats

__all__ = [
    "FormatConfig",
    "ColumnNames",
    "PublishedColumns",
    "CustomClassConfig",
    "READERS",
    "SAMPLE_ROWS",
    "Choice",
    "choose_format",
    "RowReader",
    "read_groups",
    "prompt_key",
    "read_cell",
    "as_messages",
    "without_repeats",
]
