"""Results of a GradingRunner, as returned or as written to its file: what a grader gave for each sample."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rm_gallery.core.graders.schema import GraderError, GraderRank, GraderScore
from rm_gallery.core.runner import fingerprint
from rm_gallery.core.runner.results_file import SavedResult, read_results
from rm_gallery.errors import UserError, nearest

PAIR = ("response_a", "response_b")
GraderChoice: TypeAlias = str | Mapping[str, str] | None
"""Name of a grader or aggregator, or one for each of `response_a` and `response_b`; None when there is only one."""


class GradingResults:
    """The results of the chosen grader, taken sample by sample."""

    def __init__(self, results: Any, grader: GraderChoice) -> None:
        """results: what `GradingRunner.run` returned, or the path of its results file.

        Raises UserError for anything else, for a grader that has no results, and when one must be chosen.
        """
        self._file = os.fspath(results) if isinstance(results, str | os.PathLike) else None
        self._by_name: Mapping[str, Any] = _checked(results) if self._file is None else _load(self._file, grader)
        self._names = _choose(grader, list(self._by_name), self._file or "results")

    def take(self, index: int, sample: Any) -> tuple[Any, ...]:
        """The result of a sample, or two results when there is a grader for each response; None for a missing one.

        Raises UserError when a results file has the result of another sample there.
        """
        return tuple(self._take(name, index, sample) for name in self._names)

    def _take(self, name: str, index: int, sample: Any) -> Any:
        results = self._by_name[name]
        if self._file is None:
            return results[index] if index < len(results) else None
        saved: SavedResult | None = results.get(index)
        if saved is not None and saved.sample != fingerprint.of_sample(sample, index):
            raise UserError(
                f"{self._file}:{saved.line}: this result of grader {name!r} is for another sample {index} than the "
                "cases have; give the samples that were graded, all of them, in their order"
            )
        return saved and saved.result

    def check_length(self, num_samples: int) -> None:
        """Raise UserError when the cases cannot be the samples that were graded."""
        for name in self._names:
            results = self._by_name[name]
            count = len(results) if self._file is None else max(results, default=-1) + 1
            if count > num_samples or (self._file is None and count != num_samples):
                raise UserError(
                    f"{self._file or 'results'}: {name!r} has results for {count} samples, but there are {num_samples} "
                    "cases; give the samples that were graded, all of them, in their order"
                )


def _checked(results: Any) -> Mapping[str, Any]:
    is_known = isinstance(results, Mapping) and results
    if not is_known or any(isinstance(each, str) or not isinstance(each, Sequence) for each in results.values()):
        raise UserError(
            f"results is {type(results).__name__}: give what GradingRunner.run returned, "
            "{grader: [result per sample]}, or the path of its results file"
        )
    return results


def _load(path: str, grader: GraderChoice) -> dict[str, dict[int, SavedResult]]:
    """The results of a file by grader and sample; of two results for one sample the later counts."""
    wanted = {grader} if isinstance(grader, str) else set(grader.values()) if isinstance(grader, Mapping) else None
    by_name: dict[str, dict[int, SavedResult]] = {}
    try:
        with open(os.path.expanduser(path), "rb") as file:
            for saved in read_results(file, path, hint="name the results file of a GradingRunner"):
                results = by_name.setdefault(saved.grader, {})
                if wanted is None or saved.grader in wanted:
                    results[saved.sample_index] = saved._replace(result=_slim(saved.result))
    except OSError as error:
        raise UserError(f"results {path}: cannot be read ({error.strerror}); name a results file") from error
    if not by_name:
        raise UserError(f"{path}: the file holds no results; name the output_path of a GradingRunner")
    return by_name


def _slim(result: GraderScore | GraderRank | GraderError) -> GraderScore | GraderRank | GraderError:
    """Without the judge's reasons and answers, which would be most of the memory."""
    if isinstance(result, GraderRank):
        kept: dict[str, Any] = {
            name: result.metadata[name] for name in ("scores", "rewards") if name in result.metadata
        }
        return GraderRank(rank=result.rank, metadata=kept)
    return GraderScore(score=result.score) if isinstance(result, GraderScore) else GraderError(error=result.error)


def _choose(grader: GraderChoice, known: list[str], where: str) -> tuple[str, ...]:
    names = ", ".join(map(repr, sorted(known, key=str)))
    if grader is None:
        if len(known) != 1:
            raise UserError(f"{where}: there are results of {names}; choose a grader")
        return (known[0],)
    if isinstance(grader, Mapping) and set(grader) != set(PAIR):
        raise UserError(f"grader is {dict(grader)}: it must name one for response_a and one for response_b")
    chosen = tuple(grader[field] for field in PAIR) if isinstance(grader, Mapping) else (grader,)
    for name in chosen:
        if name not in known:
            raise UserError(f"{where}: there are no results of {name!r}, only of {names}.{nearest(str(name), known)}")
    return chosen
