"""Rows written in a test, read as the pipeline reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rm_gallery.data.formats import FormatConfig, PublishedColumns, Readers, RowCounts, read_groups
from rm_gallery.data.sources import Row
from rm_gallery.errors import Dropped
from rm_gallery.schema import Comparison, Message, PreferenceGroup


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def numbered(*rows: dict[str, Any], file: str = "a.parquet") -> list[Row]:
    return [Row(values, file, number) for number, values in enumerate(rows)]


def configured(**options: Any) -> FormatConfig:
    """A configuration; names of PublishedColumns are its columns."""
    columns = {key: options.pop(key) for key in list(options) if key in PublishedColumns.__dataclass_fields__}
    return FormatConfig(columns=PublishedColumns(**columns), **options)


def read_all(
    rows: Iterable[Row], config: FormatConfig, *, template: bool = True
) -> tuple[list[PreferenceGroup], Dropped]:
    """Groups of the rows of several files, and the rows that were dropped."""
    counts = RowCounts()
    by_file = Readers(config, has_chat_template=template).by_file(rows)
    groups = [
        group for reader, some in by_file for _, group, _ in read_groups(some, reader, counts, bad_rows=config.bad_rows)
    ]
    assert counts.num_rows == len(groups) + counts.dropped.total
    return groups, counts.dropped


def read(*rows: dict[str, Any], template: bool = True, **options: Any) -> tuple[list[PreferenceGroup], Dropped]:
    return read_all(numbered(*rows), configured(**options), template=template)


def read_one(row: dict[str, Any], **options: Any) -> PreferenceGroup:
    groups, dropped = read(row, **options)
    assert not dropped.counts
    return groups[0]


def conversations(row: dict[str, Any], **options: Any) -> list[list[Message]]:
    """All whole conversations of a row."""
    group = read_one(row, **options)
    assert group.style == "chat"
    return [[*group.prompt, *response] for response in group.responses]  # type: ignore[list-item]


def why(row: dict[str, Any], **options: Any) -> str:
    """The reason for which a row is left out."""
    groups, dropped = read(row, **options)
    assert not groups
    assert dropped.total == 1
    assert list(dropped.examples.values()) == ["a.parquet:0"]
    return next(iter(dropped.counts))


def order(group: PreferenceGroup) -> list[tuple[int, int]]:
    """(better, worse) of each comparison."""
    return [(each.better, each.worse) for each in group.comparisons]


def only(group: PreferenceGroup) -> Comparison:
    """The one comparison of a pair."""
    assert len(group.comparisons) == 1
    return group.comparisons[0]
