"""Results of a GradingRunner, as it returned or wrote them: what a grader said of each sample."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from rm_gallery.core.graders.schema import GraderError, GraderRank, GraderScore
from rm_gallery.core.runner import fingerprint
from rm_gallery.core.runner.results_file import KINDS
from rm_gallery.errors import UserError, nearest

log = logging.getLogger(__name__)

PAIR = ("response_a", "response_b")
GraderChoice: TypeAlias = str | Mapping[str, str] | None
"""Name of a grader or aggregator, or one for each of `response_a` and `response_b`; None when there is only one."""


class Saved(NamedTuple):
    """A result of a file, without what is not needed here."""

    line: int
    """Counts from 1."""
    sample: str
    """Fingerprint of the sample."""
    result: GraderScore | GraderRank | GraderError


class RunnerResults:
    """The results of the chosen grader, to be taken sample by sample."""

    def __init__(self, results: Any, grader: GraderChoice) -> None:
        """results: what `GradingRunner.run` returned, or the path of its results file.

        Raises UserError for anything else, and when the grader is not in it or has to be chosen.
        """
        self._file = os.fspath(results) if isinstance(results, str | os.PathLike) else None
        if self._file is not None:
            self._by_name: Mapping[str, Any] = _load(self._file, grader)
        else:
            self._by_name = _checked(results)
        self._names = _choose(grader, list(self._by_name), self._file or "results")

    def take(self, index: int, sample: Any) -> Any:
        """What was said of a sample: a result, or {"response_a": result, "response_b": result}; None for nothing.

        Raises UserError when a results file has the result of another sample there.
        """
        if isinstance(self._names, str):
            return self._take(self._names, index, sample)
        return {field: self._take(name, index, sample) for field, name in self._names.items()}

    def _take(self, name: str, index: int, sample: Any) -> Any:
        results = self._by_name[name]
        if self._file is None:
            return results[index] if index < len(results) else None
        saved = results.get(index)
        if saved is None:
            return None
        if saved.sample != fingerprint.of_sample(sample, index):
            raise UserError(
                f"{self._file}:{saved.line}: this result of grader {name!r} is for another sample {index} than the "
                "cases have; give the samples that were graded, all of them, in their order"
            )
        return saved.result

    def check_length(self, num_samples: int) -> None:
        """Raise UserError when the samples cannot be those that were graded."""
        for name in [self._names] if isinstance(self._names, str) else self._names.values():
            results = self._by_name[name]
            wrong = max(results, default=-1) >= num_samples if self._file is not None else len(results) != num_samples
            if wrong:
                count = max(results) + 1 if self._file is not None else len(results)
                raise UserError(
                    f"{self._file or 'results'}: {name!r} has results for {count} samples, but there are {num_samples} "
                    "cases; give the samples that were graded, all of them, in their order"
                )


def _checked(results: Any) -> Mapping[str, Any]:
    is_known = isinstance(results, Mapping) and results
    if not is_known or any(isinstance(v, str) or not isinstance(v, Sequence) for v in results.values()):
        raise UserError(
            f"results is {type(results).__name__}: give what GradingRunner.run returned, "
            "{grader: [result per sample]}, or the path of its results file"
        )
    return results


def _choose(grader: GraderChoice, known: list[str], where: str) -> str | dict[str, str]:
    names = ", ".join(map(repr, sorted(known, key=str)))
    if grader is None:
        if len(known) != 1:
            raise UserError(f"{where}: there are results of {names}; choose a grader")
        return known[0]
    if isinstance(grader, Mapping):
        if set(grader) != set(PAIR):
            raise UserError(f"grader is {dict(grader)}: it must name one for response_a and one for response_b")
        chosen: str | dict[str, str] = dict(grader)
    else:
        chosen = grader
    for name in [chosen] if isinstance(chosen, str) else chosen.values():
        if name not in known:
            raise UserError(f"{where}: there are no results of {name!r}, only of {names}.{nearest(str(name), known)}")
    return chosen


def _load(path: str, grader: GraderChoice) -> dict[str, dict[int, Saved]]:
    """The lines of a results file by grader and sample; of two lines for one result the later holds."""
    wanted = {grader} if isinstance(grader, str) else set(grader.values()) if isinstance(grader, Mapping) else None
    by_name: dict[str, dict[int, Saved]] = {}
    for line, text in _lines(path):
        try:
            content = json.loads(text)
            name, index, sample = str(content["grader"]), int(content["index"]), str(content["sample"])
            found = by_name.setdefault(name, {})
            if wanted is None or name in wanted:
                found[index] = Saved(line, sample, _slim(KINDS[content["kind"]].model_validate(content["result"])))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path}:{line}: this is no result of a GradingRunner; name its results file") from None
    if not by_name:
        raise UserError(f"{path}: the file holds no results; name the output_path of a GradingRunner")
    return by_name


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    try:
        with Path(path).expanduser().open("rb") as file:
            for line, text in enumerate(file, start=1):
                if not text.endswith(b"\n"):
                    log.warning("%s:%d: the last line was cut off while it was written; leaving it out", path, line)
                elif text.strip():
                    yield line, text
    except OSError as error:
        raise UserError(f"results {path}: cannot be read ({error.strerror}); name a results file") from error


def _slim(result: GraderScore | GraderRank | GraderError) -> GraderScore | GraderRank | GraderError:
    """Only what becomes a score: reasons and answers of the judge would be most of the memory."""
    if isinstance(result, GraderRank):
        kept: dict[str, Any] = {
            name: result.metadata[name] for name in ("scores", "rewards") if name in result.metadata
        }
        return GraderRank(rank=result.rank, metadata=kept)
    return GraderScore(score=result.score) if isinstance(result, GraderScore) else GraderError(error=result.error)
