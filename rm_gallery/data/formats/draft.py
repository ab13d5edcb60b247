"""What a reader makes of a row, and what a format is: its reader and the columns that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rm_gallery.data.formats.cells import Cell
from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.schema import Comparison


@dataclass(frozen=True, slots=True)
class Draft:
    """A row as its reader understood it, before messages and texts are put together."""

    prompt: Cell
    """'' for none."""
    responses: Sequence[Cell]
    comparisons: Sequence[Comparison]
    names: Sequence[str]
    """What reasons call each response."""
    bare: bool = False
    """Texts stay bare texts even where a chat template could make a chat of prompt and response."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column that a format reads."""

    key: str
    """Configuration key below `data` that names it."""
    name: str | None
    """Its name; None when it is not to be read."""
    holds: Literal["cell", "list", "number", "name"]
    """text or messages, a list or its JSON, a number, or text."""
    needed: bool = False
    """A file without it is not in this format."""


@dataclass(frozen=True)
class Format:
    """A format: what rows look like, and the reader that understands them."""

    looks: str
    """For messages to people."""
    read: Callable[[Mapping[str, Any], FormatConfig], Draft]
    """Columns of a row -> what it says. Raises BadRow for a row that cannot be used."""
    columns: Callable[[FormatConfig], list[Column]]
    """The columns that `read` reads, those that every format reads apart."""


def common_columns(config: FormatConfig) -> list[Column]:
    """The columns that are read in every format, where a file has them."""
    return [
        Column("weight_key", config.weight_key, "number"),
        Column("source_key", config.source_key, "name"),
        Column("tools_key", config.tools_key, "list"),
    ]
