"""Rows become groups: a row by the reader of its format, a file by the format that its rows are in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Literal, Protocol

from rm_gallery.data.formats.cells import own_values, read_name, read_tools
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.conversations import (
    HoldOut,
    as_messages,
    check_answer,
    hash_prompt,
    is_wanted,
    prompt_key,
    without_repeats,
)
from rm_gallery.data.formats.detect import SAMPLE_ROWS, choose_format
from rm_gallery.data.formats.joined import join_chunks, join_rows
from rm_gallery.data.formats.names import with_found_names
from rm_gallery.data.formats.pairs import Draft, read_weight
from rm_gallery.data.formats.prompts import read_before
from rm_gallery.data.formats.registry import find_format
from rm_gallery.data.sources import Chunk, DataFile, FileEntry, Row, read_chunks
from rm_gallery.data.sources.records import without_query
from rm_gallery.errors import BadRow, Dropped, UserError
from rm_gallery.safe_text import redact
from rm_gallery.schema import Comparison, Message, PreferenceGroup, Rating


class Reader(Protocol):
    """Turns a row into a group: `RowReader`, or the custom class of `data.custom_cls`."""

    def read(self, row: Row) -> PreferenceGroup:
        """Raises BadRow with a reason, the same text for all rows with the same fault."""
        ...


@dataclass
class RowCounts:
    """Counts of the rows of one or several files, by outcome."""

    num_rows: int = 0
    held_out: int = 0
    """Usable rows that belong to the other side of the hold-out."""
    dropped: Dropped = field(default_factory=Dropped)

    def drop(self, error: BadRow, where: str, bad_rows: Literal["drop", "error"]) -> None:
        """Count a dropped row; under `data.bad_rows=error` raise UserError instead."""
        if bad_rows == "error":
            raise UserError(f"{where}: {error}; fix the row, or set data.bad_rows=drop to drop it") from None
        self.dropped.add(str(error), where)


def read_groups(
    rows: Iterable[Row],
    reader: Reader,
    counts: RowCounts,
    *,
    bad_rows: Literal["drop", "error"] = "drop",
    hold_out: HoldOut | None = None,
) -> Iterator[tuple[Row, PreferenceGroup, int]]:
    """The usable rows in order, each with its group and the hash of its prompt; the others are added to `counts`.

    hold_out: the wanted side of the hold-out by prompt; None for all rows.
    Raises UserError at the first bad row under `bad_rows="error"`.
    """
    for row in rows:
        counts.num_rows += 1
        try:
            group = reader.read(row)
            prompt = hash_prompt(prompt_key(group))
        except BadRow as error:
            counts.drop(error, row.where, bad_rows)
            continue
        if hold_out is None or is_wanted(prompt, hold_out):
            yield row, group, prompt
        else:
            counts.held_out += 1


class Readers:
    """One reader per format, made when a file first needs it; the custom class, if there is one, reads every file."""

    def __init__(self, config: FormatConfig, *, has_chat_template: bool, custom: Reader | None = None) -> None:
        self._config, self._has_template, self._custom = config, has_chat_template, custom
        self._by_format: dict[str, Reader] = {}

    def get(self, format_name: str) -> Reader:
        """format_name: as `choose_format` returns it; any text with a custom class."""
        if self._custom is not None:
            return self._custom
        if format_name not in self._by_format:
            reader = RowReader(self._config, format_name, has_chat_template=self._has_template)
            self._by_format[format_name] = reader
        return self._by_format[format_name]

    def by_file(self, rows: Iterable[Row]) -> Iterator[tuple[Reader, Iterable[Row]]]:
        """Rows of several files, which follow each other file by file, with the reader of each file.

        Raises UserError for a file that is in no format, or not in the one that the configuration names.
        """
        logged: set[str] = set()
        for _, rows_of_file in groupby(rows, key=lambda row: row.file):
            of_file = iter(rows_of_file)
            head = list(islice(of_file, SAMPLE_ROWS))
            name = "" if self._custom is not None else choose_format(head, self._config, logged=logged).name
            all_rows: Iterable[Row] = chain(head, of_file)
            joins = bool(name) and find_format(name, self._config).joins_rows
            yield self.get(name), join_rows(all_rows, self._config) if joins else all_rows


@dataclass(frozen=True)
class Task:
    """A chunk of a file that a worker reads."""

    chunk: Chunk
    format_name: str
    """'' with a custom class."""
    source: str
    """Name of the dataset for rows that name none."""


def iter_tasks(
    files: Sequence[DataFile], entries: Sequence[FileEntry], config: FormatConfig, key: str, logged: set[str], *,
    detect: bool = True,
) -> Iterator[Task]:  # fmt: skip
    """The chunks of all files in order, with the format of each file.

    entries: what `DataFile.entry` counts. key: configuration key of the files, for messages.
    logged: format choices already logged; new ones are added (see `choose_format`). detect: False if another reader
    than that of a format reads the rows.
    """
    for file in files:
        chunks = read_chunks(file, key=key)
        head: list[Chunk] = []
        sample: list[Row] = []
        while len(sample) < SAMPLE_ROWS and all(row.fault for row in sample) and (chunk := next(chunks, None)):
            head.append(chunk)
            sample += islice(chunk.rows(), SAMPLE_ROWS - len(sample))
        if not head:
            continue
        name, entry = "", entries[file.entry]
        if detect and config.custom_cls.path is None:
            wanted = config if entry.format is None else replace(config, format=entry.format)  # type: ignore[arg-type]
            name = choose_format(sample, wanted, logged=logged).name
        of_file: Iterable[Chunk] = chain(head, chunks)
        if name and find_format(name, config).joins_rows:
            of_file = join_chunks(of_file, config)
        for chunk in of_file:
            yield Task(chunk, name, source_of(entry, entries))


def source_of(entry: FileEntry, entries: Sequence[FileEntry]) -> str:
    """Name of the dataset for rows that name none: with several entries the last part of their path."""
    if entry.name is not None:
        return redact(entry.name)
    return Path(without_query(entry.path).rstrip("/")).stem if len(entries) > 1 else ""


_MAX_COLUMN_SETS = 256  # rows of JSON lines may each have columns of their own


class RowReader:
    """Reads rows of one format.

    With a `ResponsesConfig`, groups have no comparisons and the checks that concern training alone are off: empty
    responses, turns of other roles at the end, equal responses and missing prompts are accepted, and so is any number
    of responses. `group.responses` has the order of the row.
    """

    def __init__(self, config: FormatConfig, format_name: str, *, has_chat_template: bool) -> None:
        """format_name: as `choose_format` returns it; UserError for an unknown one.

        has_chat_template: whether a text prompt with text responses can become a chat.
        """
        self._config, self._has_template = config, has_chat_template
        self._format = find_format(format_name, config)
        self._by_columns: dict[tuple[str, ...], FormatConfig] = {}

    def read(self, row: Row) -> PreferenceGroup:
        """The group of a row; raises BadRow with a reason, the same text for all rows with the same fault."""
        if row.fault:
            raise BadRow(row.fault)
        try:
            row = replace(row, values=own_values(row, self._config.tools_key))
            config = self._config_for(row)
            return self._group(self._format.read(row.values, config), row, config)
        except RecursionError:
            raise BadRow("values nested too deeply") from None

    def _config_for(self, row: Row) -> FormatConfig:
        """The configuration with the names of this row's columns, which most rows of a file share."""
        columns = tuple(row.values)
        if columns not in self._by_columns:
            if len(self._by_columns) >= _MAX_COLUMN_SETS:
                self._by_columns.clear()
            self._by_columns[columns] = with_found_names(self._config, columns)
        return self._by_columns[columns]

    def _group(self, draft: Draft, row: Row, config: FormatConfig) -> PreferenceGroup:
        comparisons = self._compare(draft, row, config) if config.compares else []
        before = [] if draft.bare else read_before(row.values, config, draft.prompt_name)
        tools = read_tools(row.values, config.tools_key) or _tools_in(row.values.get(draft.prompt_name or ""))
        about: dict[str, Any] = {
            "where": row.where,
            "source": read_name(row.values, config.source_key),
            "metadata": {"tools": tools} if tools else {},
        }
        if config.has_preferences and self._format.rate is not None:
            about["ratings"] = self._format.rate(row.values, config, len(draft.responses))
        elif config.lm_targets == "assistant":
            about["ratings"] = [Rating(0, weight=read_weight(row.values, config.weight_key))]
        if not self._is_chat(draft, before):
            if before:
                raise BadRow("turns before the prompt under data.input_style=text")
            if not all(isinstance(part, str) for part in (draft.prompt, *draft.responses)):
                raise BadRow("messages under data.input_style=text")
            return PreferenceGroup(draft.prompt, draft.responses, self._kept(comparisons, draft.responses, draft),
                                   "text", **about)  # fmt: skip
        answers = [as_messages(response, "assistant") for response in draft.responses]
        if config.has_preferences:
            for answer, name in zip(answers, draft.names, strict=True):
                check_answer(answer, name)
        answers = [answer or [{"role": "assistant", "content": ""}] for answer in answers]
        is_blank = isinstance(draft.prompt, str) and not draft.prompt.strip()
        turns = [] if is_blank else as_messages(draft.prompt, "user")
        repeated = len(before) if turns[: len(before)] == before else int(turns[:1] == before[:1])
        turns, answers = without_repeats([*before, *turns[repeated:]], answers)
        if before and any(_has_second_system_turn([*turns, *answer]) for answer in answers):
            raise BadRow(f"{config.system_key} that differs from the system turn of the conversation")
        return PreferenceGroup(turns, answers, self._kept(comparisons, answers, draft), "chat", **about)

    def _compare(self, draft: Draft, row: Row, config: FormatConfig) -> list[Comparison]:
        """The comparisons of a row that training can use."""
        assert self._format.compare is not None, "find_format refuses a layout without preferences"
        comparisons = self._format.compare(row.values, config, len(draft.responses))
        # A text response without a prompt among chats would be a raw text, in another style than the rest of its file.
        # Where a dataset has no prompts, `prompt_key: null` declares that.
        has_prompt = bool(draft.prompt.strip() if isinstance(draft.prompt, str) else draft.prompt)
        if draft.prompt_name and not has_prompt and any(isinstance(response, str) for response in draft.responses):
            raise BadRow(f"text responses without {draft.prompt_name}")
        weight = read_weight(row.values, config.weight_key)
        return [replace(each, weight=weight) for each in comparisons]

    def _is_chat(self, draft: Draft, before: list[Message]) -> bool:
        wanted = self._config.input_style
        if wanted != "auto":
            return wanted == "chat"
        if before or not all(isinstance(part, str) for part in (draft.prompt, *draft.responses)):
            return True
        return bool(draft.prompt) and self._has_template and not draft.bare

    def _kept(self, comparisons: list[Comparison], responses: Any, draft: Draft) -> tuple[Comparison, ...]:
        """The comparisons between responses that differ: equal ones have equal rewards, whatever the labels say."""
        kept = [each for each in comparisons if responses[each.better] != responses[each.worse]]
        if self._config.compares and not kept:
            first, second = draft.names[:2]
            raise BadRow(f"{first} equal to {second}" if first != second else "responses that are compared are equal")
        return tuple(kept)


def _tools_in(prompt: Any) -> list[Any]:
    """The tools of a prompt that is an object with messages and tools, as OpenAI's `input`."""
    return read_tools(prompt, "tools") if isinstance(prompt, Mapping) else []


def _has_second_system_turn(turns: Sequence[Message]) -> bool:
    return sum(turn["role"] == "system" for turn in turns) > 1
