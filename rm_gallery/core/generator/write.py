"""export_data: scored responses become training files, written atomically.

    from rm_gallery.core.generator import export_data

    summary = export_data(cases, "data", formats=["parquet", "jsonl"], split_ratio={"train": 0.8, "test": 0.2})

The command line is `rm-gallery export-data --input cases.jsonl --output-dir data`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rm_gallery.core.generator.cases import ScoredGroup, check_case_mapper, read_cases, rows_of
from rm_gallery.core.generator.pairs import Unit, make_units
from rm_gallery.core.generator.summary import DEFAULT_SPLIT, ExportOptions, ExportSummary, Side
from rm_gallery.core.runner.grader_config import Mapper
from rm_gallery.core.runner.results_file import GraderChoice, GradingResults
from rm_gallery.data.formats import as_messages
from rm_gallery.data.formats.cells import Cell
from rm_gallery.data.sources import DataFile, read_rows, resolve_entries
from rm_gallery.errors import UserError, nearest, one_line
from rm_gallery.files import sync, temporary_path

log = logging.getLogger(__name__)

_MAX_REASONS = 5  # in an error

__all__ = ["ExportSummary", "export_data"]


def export_data(
    cases: Iterable[Any] | str | os.PathLike[str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    eval_cases: Iterable[Any] | str | os.PathLike[str] | None = None,
    results: Mapping[str, Sequence[Any]] | str | os.PathLike[str] | None = None,
    grader: GraderChoice = None,
    mapper: Mapper | None = None,
    formats: Sequence[str] | str = ("parquet",),
    split_ratio: Mapping[str, float] = DEFAULT_SPLIT,
    seed: int = 0,
    layout: Literal["pairs", "groups"] = "pairs",
    pairs: Literal["all", "best_worst"] = "all",
    min_difference: float = 0.0,
    max_pairs_per_prompt: int | None = None,
    contradictions: Literal["keep", "drop"] = "keep",
    source: str | None = None,
    overwrite: bool = False,
) -> ExportSummary:
    """Write `<side>.<format>` for every side and format; returns what was written and what was dropped and why.

    cases: dictionaries (a list, an iterator, a DataFrame), or one or more paths as training takes them: files, folders,
    globs, URLs and datasets of the Hugging Face hub. A case has one of
        response_a, response_b, score_a, score_b
        responses with scores (or ranks, 1 is best), or responses as [{"response": ..., "score": ...}]
        response with score, or messages with score; all responses to one prompt are compared with each other
    and, where there is one, its prompt (or query, or messages), text or chat messages; `source` names its data set.
    eval_cases: another name of `cases`.
    results: what a GradingRunner returned for these cases, or its results file; replaces scores in the cases.
    grader: whose results, when there are several; {"response_a": name, "response_b": name} for one each.
    mapper: where in a case the fields named above are, as for a GradingRunner: {"prompt": "input.question"}, or a
    function from a case to a dictionary with these fields.
    split_ratio: share of the rows for each side. All rows of a prompt are on one side, chosen by the prompt's hash;
    without prompts, rows that share a response are.
    seed: of the split, of `max_pairs_per_prompt` and of the order of the rows.
    layout: `pairs` writes prompt, chosen, rejected, margin and source; `groups` writes all responses to a prompt in one
    row, with their scores.
    pairs: of several responses `all` pairs, or only the best against the worst.
    min_difference: of the scores of a pair (of ranks, where there are only ranks); equal scores never make a pair.
    max_pairs_per_prompt: keeps a random sample; for a case without a prompt the limit is per case.
    contradictions: `drop` drops both of two pairs that prefer opposite responses.
    overwrite: replace the files of an earlier export.

    Raises UserError, and writes nothing, for invalid options, files and results, when no case gives a pair, and when a
    file cannot be written. Memory: all texts once, and about 2 kB for each case.
    """
    if (cases is None) == (eval_cases is None):
        how = "both set, and mean the same" if eval_cases is not None else "not set"
        raise UserError(f"cases and eval_cases are {how}; give the cases as one of them")
    cases = eval_cases if cases is None else cases
    options = ExportOptions.create(
        formats=formats, split_ratio=split_ratio, seed=seed, layout=layout, pairs=pairs, min_difference=min_difference,
        max_pairs_per_prompt=max_pairs_per_prompt, contradictions=contradictions, source=source, overwrite=overwrite,
    )  # fmt: skip
    if grader is not None and results is None:
        raise UserError(f"grader is {grader!r}, but there are no results to choose from; pass results=... too")
    judged = None if results is None else GradingResults(results, grader)
    check_case_mapper(mapper)
    inputs = _resolve(cases)
    outputs = _plan_files(output_dir, options)
    read = [file.path for file in inputs or ()]
    _refuse_inputs(outputs, [*read, os.fspath(results)] if isinstance(results, str | os.PathLike) else read)

    summary = ExportSummary(layout=options.layout, contradictions_dropped=options.contradictions == "drop")
    rows = rows_of(cases) if inputs is None else read_rows(inputs, key="cases")
    groups = read_cases(rows, summary, mapper=mapper, results=judged, source=options.source)
    units = make_units(groups, options, summary)
    if not units:
        why = "; ".join(summary.dropped()[:_MAX_REASONS])
        raise UserError(f"{summary.num_cases:,} cases give no pair: {why}" if summary.num_cases else "no cases given")
    files = _split(units, options, outputs, summary)
    columns = Columns.of([row for unit in units for row in unit.rows], options.layout)
    write_files(files, columns, overwrite=options.overwrite)
    for name in summary.empty_sides:
        log.warning("split_ratio: %r has no rows and no file; there are too few prompts for this split", name)
    return summary


DATASETS: dict[str, tuple[str, dict[str, str]]] = {"helpsteer2": ("nvidia/HelpSteer2", {"score": "helpfulness"})}
"""Short name of a dataset -> its name on the hub, and the paths of the fields that it names differently."""


def known_dataset(name: str) -> tuple[str, dict[str, str]]:
    """Hub name and mapper of a dataset by its short name or its hub name.

    Raises UserError for a name that is neither.
    """
    for short, (path, mapper) in DATASETS.items():
        if name.lower() in (short, path.lower()):
            return path, mapper
    if "/" in name:
        return name, {}
    known = ", ".join(DATASETS)
    raise UserError(
        f"--dataset {name}: must be one of {known} or a hub name such as org/name.{nearest(name.lower(), DATASETS)} "
        "(--input reads files)"
    )


def _resolve(cases: Any) -> list[DataFile] | None:
    """The files that `cases` names; None when it holds the cases themselves."""
    paths = [cases] if isinstance(cases, str | os.PathLike) else cases
    if not isinstance(paths, Sequence) or not paths or not all(isinstance(path, str | os.PathLike) for path in paths):
        return None
    return resolve_entries([os.fspath(path) or " " for path in paths], key="cases")


def _refuse_inputs(outputs: Mapping[str, Sequence[Path]], inputs: Iterable[str]) -> None:
    inputs = [path for path in inputs if os.path.exists(path)]
    for file in (file for files in outputs.values() for file in files if file.exists()):
        if any(file.samefile(path) for path in inputs):
            raise UserError(f"{file}: this file is also an input; choose another output_dir")


def _split(
    units: Sequence[Unit], options: ExportOptions, outputs: Mapping[str, Sequence[Path]], summary: ExportSummary
) -> dict[Path, list[ScoredGroup]]:
    """The rows of each file; fills in `summary.sides`.

    The units come in the order of their hashes, and each side gets consecutive ones, cut where the number of rows is
    nearest to its share. The last side has the lowest hashes: with seed 0 these are the prompts that
    `data.val_fraction` holds out. Example: units of 2, 3, 4 and 1 rows, train 0.8, test 0.2 -> the first is test.
    """
    ends = [0, *accumulate(len(unit.rows) for unit in units)]  # rows of the first n units
    files: dict[Path, list[ScoredGroup]] = {file: [] for paths in outputs.values() for file in paths}
    begin, share_before = 0, 0.0
    for name, share in reversed(list(options.split_ratio.items())):
        share_before += share
        end = min(range(len(ends)), key=lambda n: abs(ends[n] - share_before * ends[-1]))
        own = units[begin:end]
        rows = [row for unit in own for row in unit.rows]
        files.update(dict.fromkeys(outputs[name], rows))
        summary.sides[name] = Side(share, len(rows), len(own), tuple(outputs[name]) if rows else ())
        begin = end
    summary.sides = {name: summary.sides[name] for name in options.split_ratio}
    return files


_BATCH_ROWS, _BATCH_CHARACTERS = 1024, 16_000_000


@dataclass(frozen=True)
class _TextColumn:
    """How the texts of a column are written: as texts, or all as messages where one of them is messages."""

    role: str | None = None
    """Role of a text that is written as a message; None in a column of texts."""
    fields: tuple[str, ...] = ()
    """Fields of messages in parquet; empty when messages are JSON there, since a field holds more than text."""

    @classmethod
    def of(cls, values: Iterable[Cell], role: str) -> _TextColumn:
        fields, has_messages, is_flat = {"role": None, "content": None}, False, True
        for message in (message for value in values if isinstance(value, list) for message in value):
            has_messages = True
            fields.update(dict.fromkeys(message))
            is_flat = is_flat and all(isinstance(content, str) for content in message.values())
        return cls(role if has_messages else None, tuple(fields) if is_flat else ())

    @property
    def type(self) -> pa.DataType:
        if self.role is None or not self.fields:
            return pa.string()
        return pa.list_(pa.struct([pa.field(name, pa.string()) for name in self.fields]))

    def value(self, text: Cell, suffix: str) -> Any:
        """The text as a file with this suffix holds it."""
        if self.role is None:
            return text
        messages = as_messages(text, self.role)
        return json.dumps(messages, ensure_ascii=False) if suffix == ".parquet" and not self.fields else messages


@dataclass(frozen=True)
class Columns:
    """The columns of all files of one export."""

    prompt: _TextColumn | None
    response: _TextColumn
    layout: Literal["pairs", "groups"]
    score: Literal["scores", "ranks"]
    """Of groups: the column of the scores."""
    has_source: bool

    @classmethod
    def of(cls, rows: Sequence[ScoredGroup], layout: Literal["pairs", "groups"]) -> Columns:
        """Columns that hold all these rows. Raises UserError for groups with scores among groups with ranks."""
        is_rank = {row.is_rank for row in rows}
        if layout == "groups" and len(is_rank) > 1:
            raise UserError(
                "layout='groups': some cases have scores and others only ranks, which are different columns; "
                "export them separately, or set layout='pairs'"
            )
        has_prompt = any(row.prompt for row in rows)
        return cls(
            _TextColumn.of((row.prompt for row in rows), "user") if has_prompt else None,
            _TextColumn.of((each.text for row in rows for each in row.responses), "assistant"),
            layout,
            "ranks" if True in is_rank else "scores",
            any(row.source is not None for row in rows),
        )

    @property
    def schema(self) -> pa.Schema:
        fields = [("prompt", self.prompt.type)] if self.prompt else []
        if self.layout == "pairs":
            fields += [("chosen", self.response.type), ("rejected", self.response.type), ("margin", pa.float64())]
        else:
            fields += [("responses", pa.list_(self.response.type)), (self.score, pa.list_(pa.float64()))]
        return pa.schema(fields + ([("source", pa.string())] if self.has_source else []))

    def values(self, row: ScoredGroup, suffix: str) -> dict[str, Any]:
        """A row as a file with this suffix holds it."""
        values: dict[str, Any] = {}
        if self.prompt:
            values["prompt"] = self.prompt.value(row.prompt, suffix) if row.prompt else None
        texts = [self.response.value(each.text, suffix) for each in row.responses]
        if self.layout == "pairs":
            values.update(chosen=texts[0], rejected=texts[1], margin=row.margin)
        else:
            sign = -1 if self.score == "ranks" else 1
            values.update({"responses": texts, self.score: [sign * each.score for each in row.responses]})
        if self.has_source:
            values["source"] = row.source
        return values

    def tables(self, rows: Iterable[ScoredGroup]) -> Iterator[pa.Table]:
        """The rows as parquet holds them, in tables of limited size."""
        batch: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            batch.append(self.values(row, ".parquet"))
            size += sum(_length(text) for text in (row.prompt, *(each.text for each in row.responses)))
            if len(batch) == _BATCH_ROWS or size > _BATCH_CHARACTERS:
                yield pa.Table.from_pylist(batch, schema=self.schema)
                batch, size = [], 0
        if batch:
            yield pa.Table.from_pylist(batch, schema=self.schema)


def _length(value: Cell) -> int:
    return len(value) if isinstance(value, str) else sum(len(str(message.get("content") or "")) for message in value)


def _plan_files(output_dir: Any, options: ExportOptions) -> dict[str, list[Path]]:
    """Side -> its files. Raises UserError for a folder that cannot be written to, and for files that exist."""
    if not isinstance(output_dir, str | os.PathLike) or not os.fspath(output_dir):
        raise UserError(f"output_dir is {output_dir!r}: it must be the path of a folder")
    folder = Path(output_dir).expanduser()
    try:
        parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long, a folder without search permission
        raise UserError(f"output_dir {str(folder)[:100]}: {error.strerror}; choose another folder") from error
    if not parent.is_dir():
        raise UserError(f"output_dir {folder}: {parent} is not a folder; choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {folder}: no permission to write to {parent}; choose another folder")
    outputs = {side: [folder / f"{side}.{suffix}" for suffix in options.formats] for side in options.split_ratio}
    for file in (file for files in outputs.values() for file in files if os.path.lexists(file)):
        if not options.overwrite:
            raise UserError(f"{file} exists; set overwrite=True (--overwrite), or choose another output_dir")
        if not file.is_file():
            raise UserError(f"{file}: not a regular file; move it away, or choose another output_dir")
    return outputs


def write_files(rows: Mapping[Path, Sequence[ScoredGroup]], columns: Columns, *, overwrite: bool) -> None:
    """Write all files under temporary names, then rename them.

    rows: of each file; a file without rows is not written, and removed if it exists. Raises UserError when a file
    cannot be written, or was created in the meantime and may not be replaced; then no new file remains.
    """
    folder = next(iter(rows)).parent
    written: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in rows.items():
            if content:
                written[file] = temporary_path(file)
                _write(written[file], file.suffix, content, columns)
        _publish(rows, written, overwrite)
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"output_dir {folder}: cannot be written ({reason}); free disk space or choose another folder"
        ) from error
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def _write(path: Path, suffix: str, rows: Sequence[ScoredGroup], columns: Columns) -> None:
    with path.open("wb") as file:
        if suffix == ".parquet":
            with pq.ParquetWriter(file, columns.schema, compression="zstd") as writer:
                for table in columns.tables(rows):
                    writer.write_table(table)
        else:
            for row in rows:
                file.write(json.dumps(columns.values(row, suffix), ensure_ascii=False).encode() + b"\n")
    sync(path)


def _publish(files: Iterable[Path], written: Mapping[Path, Path], overwrite: bool) -> None:
    """Rename the temporary files. Old files are removed first: files of two exports split prompts in two ways."""
    for file in files if overwrite else ():
        file.unlink(missing_ok=True)
    done: list[Path] = []
    try:
        for file, temporary in written.items():
            if os.path.lexists(file):
                raise UserError(f"{file}: another process wrote this file during the export; choose another output_dir")
            os.replace(temporary, file)
            done.append(file)
    except BaseException:
        for file in done:
            file.unlink(missing_ok=True)
        raise
