"""Processing rows: a chunk of a file becomes token arrays, in this process or in a worker.

Everything between a file's rows and the token store happens here, for one chunk at a time: format or custom class,
hold-out by prompt, template and tokenizer, length policy, common prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol, TypeAlias

from rm_gallery.data.custom import CustomFacts, CustomReader
from rm_gallery.data.dropped import BadRow, Dropped
from rm_gallery.data.encode import Encoder
from rm_gallery.data.formats import FormatConfig, RowReader, prompt_key
from rm_gallery.data.length import fit_length
from rm_gallery.data.source import Row
from rm_gallery.data.token_arrays import TokenChunk, make_chunk
from rm_gallery.data.token_group import Origin, TokenGroup, hash_prompt, split_prefix
from rm_gallery.data.tokenize import TokenizeConfig
from rm_gallery.errors import UserError
from rm_gallery.schema import InputStyle, PreferenceGroup

_GROUPS_AT_ONCE = 512  # tokenized in one call

Share: TypeAlias = tuple[Literal["train", "val"], float]
"""Which side of the hold-out is wanted, and the fraction of the prompts that is held out for validation."""


class Reader(Protocol):
    """A row as a group; raises BadRow with the reason why there is none."""

    def read(self, row: Row) -> PreferenceGroup: ...


@dataclass(frozen=True)
class RowsConfig(FormatConfig, TokenizeConfig):
    """Part of `data`: all that decides what a row becomes."""


@dataclass(frozen=True)
class Work:
    """What a worker needs to know; the same for every chunk."""

    config: RowsConfig
    tokenizer: Any
    share: Share | None = None


@dataclass
class Processed:
    """What became of a chunk."""

    chunk: TokenChunk
    dropped: Dropped = field(default_factory=Dropped)
    styles: dict[InputStyle, str] = field(default_factory=dict)
    """Each style that occurs, with `file:row` of the first group that has it."""
    has_text_prompts: bool = False
    num_rows: int = 0
    held_out: int = 0
    custom: CustomFacts = field(default_factory=CustomFacts)


class RowProcessor:
    """Turns chunks into token arrays; one of them for each process."""

    def __init__(self, work: Work) -> None:
        self.work, self.config = work, work.config
        self._readers: dict[str, Reader] = {}
        self._custom: CustomReader | None = None
        if self.config.custom_cls.path is not None:
            self._custom = CustomReader.from_config(self.config, work.tokenizer)
        render = None if self._custom is None else self._custom.render
        self.encoder = Encoder(work.tokenizer, self.config, render=render)

    def reader(self, format_name: str) -> Reader:
        """The custom class, or the reader of a format."""
        if self._custom is not None:
            return self._custom
        if format_name not in self._readers:
            has_template = self.work.tokenizer.chat_template is not None
            self._readers[format_name] = RowReader(self.config, format_name, has_chat_template=has_template)
        return self._readers[format_name]

    def process(self, rows: Iterable[Row], reader: Reader, source: str) -> Processed:
        """Token arrays of the usable rows, in order; the others are counted.

        source: name of the data set for rows that name none.
        Raises UserError at the first bad row under `bad_rows=error`, for a text that is too long under
        `truncation=error`, and for a custom class that fails.
        """
        result = Processed(TokenChunk({}, [], []))
        groups = self._read(rows, reader, result)
        result.chunk = make_chunk(self._tokenize(groups, source, result))
        if self._custom is not None:
            result.custom = self._custom.take_facts()
        return result

    def _read(
        self, rows: Iterable[Row], reader: Reader, result: Processed
    ) -> Iterator[tuple[Row, PreferenceGroup, int]]:
        for row in rows:
            result.num_rows += 1
            try:
                group = reader.read(row)
                prompt = hash_prompt(prompt_key(group))
            except BadRow as error:
                self._drop(error, row.where, result)
                continue
            if self.work.share is None or is_wanted(prompt, self.work.share):
                yield row, group, prompt
            else:
                result.held_out += 1

    def _tokenize(
        self, groups: Iterator[tuple[Row, PreferenceGroup, int]], source: str, result: Processed
    ) -> Iterator[tuple[TokenGroup, Origin]]:
        while some := list(islice(groups, _GROUPS_AT_ONCE)):
            encoded = self.encoder.encode_many([group for _, group, _ in some])
            for (row, group, prompt), texts in zip(some, encoded, strict=True):
                try:
                    if isinstance(texts, BadRow):
                        raise texts
                    fitted, comparisons = fit_length(texts, group, self.work.tokenizer, self.config)
                    tokens = split_prefix(fitted, comparisons)
                except BadRow as error:
                    self._drop(error, row.where, result)
                    continue
                result.styles.setdefault(group.style, row.where)
                result.has_text_prompts |= group.style == "text" and bool(group.prompt)
                yield tokens, Origin(row.file, row.index, group.source or source, prompt, group.metadata)

    def _drop(self, error: BadRow, where: str, result: Processed) -> None:
        if self.config.bad_rows == "error":
            raise UserError(f"{where}: {error}; mend the row, or set data.bad_rows=drop to leave it out") from None
        result.dropped.add(str(error), where)


def is_wanted(prompt_hash: int, share: Share) -> bool:
    """Whether a prompt belongs to this side: the same prompts are held out whatever the order and size of the data."""
    side, fraction = share
    return (prompt_hash / 2**64 < fraction) == (side == "val")
