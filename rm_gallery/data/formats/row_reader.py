"""Rows become groups: one row by the reader of its format, and all rows of several files with their faults counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, groupby, islice
from typing import Any

from rm_gallery.data.formats.cells import optional_number, read_name, read_tools
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.conversations import as_messages, check_answer, without_repeats
from rm_gallery.data.formats.detect import SAMPLE_ROWS, choose_format, find_format
from rm_gallery.data.formats.pairs import Draft
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow, Dropped, UserError
from rm_gallery.schema import Comparison, PreferenceGroup


class RowReader:
    """Reads rows of one format."""

    def __init__(self, config: FormatConfig, format_name: str, *, has_chat_template: bool) -> None:
        """format_name: one of READERS, as `choose_format` gives it; UserError for any other.

        has_chat_template: whether a text prompt with text responses can be made a chat.
        """
        self._config, self._has_template = config, has_chat_template
        self._format = find_format(format_name)

    def read(self, row: Row) -> PreferenceGroup:
        """The group of a row; raises BadRow with a reason that is the same text for all rows with the same fault."""
        if row.fault:
            raise BadRow(row.fault)
        try:
            return self._group(self._format.read(row.values, self._config), row)
        except RecursionError:
            raise BadRow("values nested too deeply") from None

    def _group(self, draft: Draft, row: Row) -> PreferenceGroup:
        config = self._config
        weight = optional_number(row.values, config.weight_key)
        if weight is not None and weight < 0:
            raise BadRow(f"negative {config.weight_key}")
        comparisons = [each if weight is None else replace(each, weight=weight) for each in draft.comparisons]
        tools = read_tools(row.values, config.tools_key)
        about: dict[str, Any] = {
            "where": row.where,
            "source": read_name(row.values, config.source_key),
            "metadata": {"tools": tools} if tools else {},
        }
        if not self._is_chat(draft):
            if not all(isinstance(part, str) for part in (draft.prompt, *draft.responses)):
                raise BadRow("messages under data.input_style=text")
            comparisons = _between_different(comparisons, draft.responses, draft)
            return PreferenceGroup(draft.prompt, draft.responses, tuple(comparisons), "text", **about)
        answers = [as_messages(response, "assistant") for response in draft.responses]
        for answer, name in zip(answers, draft.names, strict=True):
            check_answer(answer[-1], name)
        is_blank = isinstance(draft.prompt, str) and not draft.prompt.strip()
        turns, answers = without_repeats([] if is_blank else as_messages(draft.prompt, "user"), answers)
        comparisons = _between_different(comparisons, answers, draft)
        return PreferenceGroup(turns, answers, tuple(comparisons), "chat", **about)

    def _is_chat(self, draft: Draft) -> bool:
        wanted = self._config.input_style
        if wanted != "auto":
            return wanted == "chat"
        if not all(isinstance(part, str) for part in (draft.prompt, *draft.responses)):
            return True
        return bool(draft.prompt) and self._has_template and not draft.bare


def _between_different(comparisons: list[Comparison], responses: Any, draft: Draft) -> list[Comparison]:
    """The comparisons between responses that differ: equal ones have equal rewards, whatever the labels say."""
    kept = [each for each in comparisons if responses[each.better] != responses[each.worse]]
    if not kept:
        first, second = draft.names[:2]
        raise BadRow(f"{first} equal to {second}" if first != second else "responses that are compared are equal")
    return kept


def read_groups(
    rows: Iterable[Row], config: FormatConfig, *, has_chat_template: bool, dropped: Dropped
) -> Iterator[PreferenceGroup]:
    """Groups of the usable rows, in order; the others are added to `dropped`. The format is chosen for each file.

    Raises UserError for a file that is in no format (or not in the one that `config` names), and at the first bad
    row under `bad_rows=error`.
    """
    said: set[str] = set()
    for _, rows_of_file in groupby(rows, key=lambda row: row.file):
        head = list(islice(rows_of_file, SAMPLE_ROWS))
        choice = choose_format(head, config, said=said)
        reader = RowReader(config, choice.name, has_chat_template=has_chat_template)
        for row in chain(head, rows_of_file):
            try:
                yield reader.read(row)
            except BadRow as error:
                if config.bad_rows == "error":
                    raise UserError(
                        f"{row.where}: {error}; mend the row, or set data.bad_rows=drop to leave it out"
                    ) from None
                dropped.add(str(error), row.where)
