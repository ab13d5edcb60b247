"""Saved rewards of consecutive rows, in parts that are bound to their rows, their model and their settings.

A part is `START.parquet` in a folder of its model: per row the rewards, the reason of a missing reward, and a hash of
the row. Its metadata has a digest of all of that, of the first row's number, and of the fingerprint of the command. A
part that is damaged, edited, renamed or of another command is therefore not used, and rewards reach the output next to
the rows that they were computed from, or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from rm_gallery import files
from rm_gallery.data.sources import Row
from rm_gallery.errors import UserError

log = logging.getLogger(__name__)

REASON = "reason"
_HASH, _DIGEST = "row", b"digest"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

Result: TypeAlias = tuple[list[Any] | None, str | None]
"""Rewards of a row and None, or the reason why it has none, with None or for a row without responses [].

Of a model with attributes, each reward is a list of it and these."""


class Block(NamedTuple):
    """Consecutive rows that are scored and saved together."""

    start: int
    """Number of the first row."""
    rows: list[Row]
    hashes: list[int]
    """Of each row; see `hash_row`."""


def hash_row(row: Row) -> tuple[int, int]:
    """(hash of the content of a row, its length in characters)."""
    text = repr((row.values, row.fault))
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True), len(text)


def blocks(rows: Iterable[Row], *, max_rows: int, max_chars: int) -> Iterator[Block]:
    """Cut rows into blocks, each of which ends at the row that reaches a limit.

    The blocks are a function of the rows alone. A run that was killed and resumed therefore packs the same rows
    together as an undisturbed one, and computes the same rewards to the last bit.
    """
    block, num_chars = Block(0, [], []), 0
    for row in rows:
        row_hash, length = hash_row(row)
        block.rows.append(row)
        block.hashes.append(row_hash)
        num_chars += length
        if len(block.rows) >= max_rows or num_chars >= max_chars:
            yield block
            block, num_chars = Block(block.start + len(block.rows), [], []), 0
    if block.rows:
        yield block


class Parts:
    """The parts of one input and one model."""

    def __init__(self, folder: Path, fingerprint: str, columns: Sequence[str], num_attributes: int = 0) -> None:
        """fingerprint: of the input, the weights and the settings. columns: of rewards, see `InputTable`."""
        self.folder, self.columns, self._fingerprint = folder, tuple(columns), fingerprint
        self._num_outputs = 1 + num_attributes

    def write(self, block: Block, results: Sequence[Result]) -> None:
        """Save a part. Raises UserError when it cannot be written."""
        columns: dict[str, pa.Array] = {}
        per_output = len(self.columns) // self._num_outputs  # columns of the reward come first, then of each attribute
        for place, column in enumerate(self.columns):
            output, index = divmod(place, per_output)
            values = [rewards and [_output(reward, output) for reward in rewards] for rewards, _ in results]
            if column.startswith("rewards"):
                columns[column] = pa.array(values, pa.list_(pa.float32()))
            else:
                columns[column] = pa.array([each and each[index] for each in values], pa.float32())
        columns[REASON] = pa.array([reason for _, reason in results], pa.string())
        columns[_HASH] = pa.array(block.hashes, pa.int64())
        table = pa.table(columns)
        table = table.replace_schema_metadata({_DIGEST: self._digest(block.start, table)})
        path = self._path(block.start)
        try:
            with files.atomic_write(path) as temporary:
                pq.write_table(table, temporary)
        except OSError as error:
            raise cannot_write(path, error) from error

    def hold(self, block: Block) -> bool:
        """Whether the rewards of these rows are saved."""
        table = self._read(block.start)
        if table is not None and table[_HASH].to_pylist() == block.hashes:
            return True
        if self._path(block.start).exists():
            log.warning(
                "%s: damaged, or of other rows; %d rows are scored again", self._path(block.start), len(block.rows)
            )
        return False

    def read(self) -> Iterator[pa.Table]:
        """The parts in order, adjacent from row 0 on, each with its reward columns, reasons and hashes of rows.

        Raises UserError for a part that is damaged, and for parts that overlap or leave a gap.
        """
        expected = 0
        for start in self._starts():
            if start != expected:
                break
            table = self._read(start)
            if table is None:
                raise UserError(f"{self._path(start)}: damaged; rerun the command to score its rows again")
            expected += len(table)
            yield table
        else:
            return
        raise UserError(f"{self.folder}: no part begins at row {expected}; rerun the command to score these rows")

    def keep_only(self, starts: Container[int]) -> None:
        """Delete the parts that begin at other rows: of an earlier content of the file."""
        for start in self._starts():
            if start not in starts:
                files.remove(self._path(start))

    def _starts(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.parquet") if path.stem.isdecimal())

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:012d}.parquet"

    def _read(self, start: int) -> pa.Table | None:
        """A part; None if there is none, or if it is not what was written."""
        try:
            table = pq.read_table(self._path(start), partitioning=None)
        except (OSError, pa.ArrowException):
            return None
        if table.column_names != [*self.columns, REASON, _HASH]:
            return None
        is_intact = (table.schema.metadata or {}).get(_DIGEST) == self._digest(start, table)
        return table if is_intact else None

    def _digest(self, start: int, table: pa.Table) -> bytes:
        content = repr((self._fingerprint, start, table.to_pydict()))
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest().encode()


def row_rewards(part: pa.Table, columns: Sequence[str]) -> list[list[float] | None]:
    """The rewards of each row of a part in the order of its responses; None for a row without.

    columns: of rewards; see `InputTable.base_columns`.
    """
    values = [part[column].to_pylist() for column in columns]
    if tuple(columns) == ("rewards",):
        return values[0]
    return [None if each[0] is None else list(each) for each in zip(*values, strict=True)]


def combine_parts(
    members: Sequence[Parts], target: Parts, columns: Sequence[str], combine: Callable[[list[Any]], list[Any]]
) -> None:
    """Write the parts of an ensemble from those of its members, which hold the same rows.

    columns: see `row_rewards`. combine: from the rewards of a row by member to the results of its responses.
    """
    shutil.rmtree(target.folder, ignore_errors=True)
    target.folder.mkdir(parents=True)
    start = 0
    for tables in zip(*(each.read() for each in members), strict=True):
        results: list[Result] = []
        rewards = [row_rewards(table, columns) for table in tables]
        reasons = [table[REASON].to_pylist() for table in tables]
        for found, why in zip(zip(*rewards, strict=True), zip(*reasons, strict=True), strict=True):
            reason = next((each for each in why if each is not None), None)
            results.append((None, reason) if reason is not None else (combine(list(found)), None))
        target.write(Block(start, [], tables[0][_HASH].to_pylist()), results)
        start += len(results)


def _output(reward: Any, place: int) -> float:
    """The reward (0) or an attribute of a response."""
    return float(reward[place] if isinstance(reward, list) else reward)


def check_rows(taken: Sequence[pa.Table], rows: Iterable[Row], name: str, first: int) -> None:
    """Raise UserError unless the saved rewards of each model were computed from exactly these rows.

    name: of the file. first: number of the first row.
    """
    now = [hash_row(row)[0] for row in rows]
    for table in taken:
        saved = table[_HASH].to_pylist() if len(table) else []
        if saved != now:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(saved, now, strict=False)))
            raise changed(name, first + same)


def changed(name: str, row: int) -> UserError:
    """The error for an input that is not the one that was scored."""
    return UserError(f"{name}:{row}: the file changed while it was scored; rerun the command once it is complete")


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error for a file or folder that cannot be written, with what to do."""
    if error.errno in _NO_SPACE:
        hint = "free disk space and rerun the command to resume"
    elif error.errno == errno.ENOENT:
        hint = "its folder was removed while the command ran; rerun the command"
    else:
        hint = "choose another --output"
    reason = os.strerror(error.errno) if error.errno else str(error)
    return UserError(f"{path}: cannot be written to ({reason}); {hint}")
