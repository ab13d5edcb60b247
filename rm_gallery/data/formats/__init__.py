"""Formats: one row of a file becomes a `PreferenceGroup`, or a counted reason why it cannot.

    choose_format(first rows, config) -> Choice(name, why)     once per file; `data.format` names one, or is `auto`
    RowReader(config, name).read(row) -> PreferenceGroup       or BadRow(reason)
    read_groups(rows, config, dropped=...)                     both, over all rows of several files

A format is one entry of `READERS` (detect.py): a function from a row's columns to a `Draft` (pairs.py), and the
columns that it needs. What all formats share lies around it: cells.py reads text, messages, numbers and lists,
conversations.py puts turns together and says which groups have the same prompt, row_reader.py makes the group.
"""

from __future__ import annotations

from rm_gallery.data.formats.cells import read_cell
from rm_gallery.data.formats.config import (
    ColumnNames,
    CustomClassConfig,
    FormatConfig,
    PublishedColumns,
)
from rm_gallery.data.formats.conversations import as_messages, prompt_key, without_repeats
from rm_gallery.data.formats.detect import READERS, SAMPLE_ROWS, Choice, choose_format
from rm_gallery.data.formats.row_reader import RowReader, read_groups

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
