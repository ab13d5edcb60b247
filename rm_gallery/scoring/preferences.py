"""Accuracy of rewards on rows that say which response is better: the figures that validation has for the same rows.

Rows are read a second time as training reads them, and its comparisons are made between the saved rewards. Needs no
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from rm_gallery.data.formats import RowReader
from rm_gallery.data.formats.joined import join_rows
from rm_gallery.data.formats.registry import find_format
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow, Dropped
from rm_gallery.scoring.parts import Parts, row_rewards
from rm_gallery.scoring.tables import InputTable


@dataclass
class Agreement:
    """How often the preferred response of a comparison has the higher reward."""

    comparisons: int = 0
    correct: int = 0
    """A tie counts as wrong, as in training."""
    ties: int = 0
    margin: float = 0.0
    """Sum over comparisons: reward of the preferred response minus reward of the other."""
    unused: Dropped = field(default_factory=Dropped)
    """Rows without a comparison, though they have rewards."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Agreement:
        """From what `as_record` gives."""
        return cls(**{**record, "unused": Dropped(**record["unused"])})

    def as_record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def merge(self, other: Agreement) -> None:
        """Add the comparisons of another file."""
        self.comparisons += other.comparisons
        self.correct += other.correct
        self.ties += other.ties
        self.margin += other.margin
        self.unused.merge(other.unused)

    def __str__(self) -> str:
        """`accuracy 0.7500 (3 of 4 comparisons), mean margin 1.25`."""
        if not self.comparisons:
            return f"no comparisons: {self.unused.describe() or 'no rewards'}"
        count = self.comparisons
        ties = f", {self.ties} tied" if self.ties else ""
        unused = f"; rows not compared: {self.unused.describe()}" if self.unused.total else ""
        return (
            f"accuracy {self.correct / count:.4f} ({self.correct} of {count} comparisons{ties}), "
            f"mean margin {self.margin / count:.4g}{unused}"
        )


def measure(table: InputTable, parts: Parts) -> Agreement | None:
    """The comparisons of a file between the rewards of one model; None if its rows have no preferences."""
    if not table.label_format:
        return None
    reader = RowReader(table.label_config, table.label_format, has_chat_template=True)
    rewards, found = _rewards(table, parts), Agreement()
    for row, count in _rows(table):
        taken = list(islice(rewards, count))
        if None in taken:
            continue  # counted as rows without a reward
        scores = [reward for some in taken if some is not None for reward in some]
        try:
            group = reader.read(row)
            if len(group.responses) != len(scores):
                raise BadRow("labels of another number of responses")
        except BadRow as error:
            found.unused.add(str(error), row.where)
            continue
        for comparison in group.comparisons:
            margin = scores[comparison.better] - scores[comparison.worse]
            found.comparisons += 1
            found.correct += margin > 0
            found.ties += margin == 0
            found.margin += margin
    return found


def _rows(table: InputTable) -> Iterator[tuple[Row, int]]:
    """Rows as training reads them, each with the number of rows of the file that it is made of."""
    rows: Iterable[Row] = table.rows()
    if not find_format(table.label_format, table.label_config).joins_rows:
        yield from ((row, 1) for row in rows)
        return
    name = table.label_config.columns.response or ""
    for row in join_rows(rows, table.label_config):
        yield row, 1 if row.fault else len(row.values[name])


def _rewards(table: InputTable, parts: Parts) -> Iterator[list[float] | None]:
    """The rewards of each row, in the order of its responses."""
    for part in parts.read():
        yield from row_rewards(part, table.base_columns)
