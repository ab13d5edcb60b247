"""Results of a run by sample: ResultsFile writes them and resumes, GradingResults reads them for an export."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from rm_gallery.core.graders.base_grader import GraderError, GraderRank, GraderScore
from rm_gallery.core.runner import fingerprint
from rm_gallery.errors import UserError, nearest
from rm_gallery.files import lock

log = logging.getLogger(__name__)

KINDS: dict[str, type[GraderScore | GraderRank | GraderError]] = {
    "score": GraderScore,
    "rank": GraderRank,
    "error": GraderError,
}
WAY_OUT = "choose another output_path, or remove that file"
PAIR = ("response_a", "response_b")
GraderChoice: TypeAlias = str | Mapping[str, str] | None
"""Name of a grader or aggregator, or one for each of `response_a` and `response_b`; None when there is only one."""


class SavedResult(NamedTuple):
    """One line of a results file."""

    line: int
    """Counts from 1."""
    end: int
    """Bytes of the file up to the end of the line."""
    grader: str
    sample_index: int
    """Counts from 0."""
    sample: str
    """Fingerprint of the sample."""
    setup: str
    """Fingerprint of the grader and its mapper."""
    result: GraderScore | GraderRank | GraderError


def read_results(file: Iterable[bytes], path: str | Path, *, hint: str) -> Iterator[SavedResult]:
    """The results in the lines of a file. A last line that a killed process left incomplete is ignored.

    Raises UserError, which ends with `hint`, for a line that holds anything else.
    """
    end = 0
    for line, text in enumerate(file, start=1):
        end += len(text)
        if not text.strip():
            continue
        try:
            saved = _read_line(text, line, end)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            # Only what this class wrote may be dropped: the file could be another one, named by mistake.
            if not text.endswith(b"\n") and (text.startswith(_LINE_START) or _LINE_START.startswith(text)):
                log.warning("%s:%d: the last line is incomplete; ignoring it", path, line)
                return
            why = f" ({error})" if isinstance(error, _WrongField) else ""
            raise UserError(f"{path}:{line}: not a result of a GradingRunner{why}; {hint}") from None
        yield saved


_LINE_START = b'{"index": '


class _WrongField(ValueError):
    """A field of a line has a value that no run writes."""


def _read_line(text: bytes, line: int, end: int) -> SavedResult:
    content = json.loads(text)
    index, kind = content["index"], content["kind"]
    if type(index) is not int or index < 0:
        raise _WrongField(f"its index is {str(index)[:40]}, must be a whole number from 0")
    texts = {name: content.get(name, "" if name == "setup" else None) for name in ("grader", "sample", "setup")}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise _WrongField(f"its {name} is not a text")
    if not isinstance(kind, str) or kind not in KINDS:
        raise _WrongField(f"its kind is not one of {', '.join(KINDS)}")
    result = KINDS[kind].model_validate(content["result"], strict=True)
    return SavedResult(line, end, texts["grader"], index, texts["sample"], texts["setup"], result)


class ResultsFile:
    """JSON lines, one per result:
    {"index": 0, "grader": "relevance", "sample": fingerprint, "setup": fingerprint, "kind": "score", "result": {...}}

    Each line is flushed before the next call, so that a killed process loses no result. An incomplete last line is
    removed; of two lines for one result the later counts. A lock rejects a second run on the same file.
    """

    def __init__(self, path: str | Path, setups: Mapping[str, str], *, retry_errors: bool = False) -> None:
        """setups: grader name -> fingerprint; lines of other graders are kept and ignored.

        retry_errors: treat saved errors as missing. Raises UserError for a file that cannot be written, is in use or
        is not a results file, and for results of a grader with another setup.
        """
        self.path, self._setups = Path(path), setups
        self._saved: dict[str, dict[int, SavedResult]] = {name: {} for name in setups}
        try:
            if self.path.exists() and not self.path.is_file():
                raise UserError(f"output_path {self.path}: not a regular file; choose another")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(self.path, "a+b")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise UserError(
                f"output_path {self.path}: cannot be written ({error.strerror}); give the path of a file"
            ) from error
        self._held = contextlib.ExitStack()
        try:
            self._lock()
            self._load(retry_errors)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_saved(self) -> int:
        """Number of saved results that are not taken yet."""
        return sum(map(len, self._saved.values()))

    def take(self, grader: str, index: int, sample: str) -> GraderScore | GraderRank | GraderError | None:
        """Remove and return the saved result for a sample; None if there is none.

        Raises UserError if it was written for another sample.
        """
        saved = self._saved[grader].pop(index, None)
        if saved is None:
            return None
        if saved.sample != sample:
            raise UserError(
                f"{self.path}:{saved.line}: this result of grader {grader!r} is for another sample {index} than the "
                f"dataset has now, so the dataset has changed; {WAY_OUT}"
            )
        return saved.result

    def check_length(self, num_samples: int) -> None:
        """Raise UserError for results of samples past the end of the dataset."""
        for grader, saved in self._saved.items():
            if (last := max(saved, default=-1)) >= num_samples:
                raise UserError(
                    f"{self.path}:{saved[last].line}: this result of grader {grader!r} is for sample {last}, but the "
                    f"dataset has {num_samples} samples (counted from 0), so it has changed; {WAY_OUT}"
                )

    def append(self, grader: str, index: int, sample: str, result: GraderScore | GraderRank | GraderError) -> None:
        """Append one result. Raises UserError if it cannot be written."""
        kind = next(kind for kind, owner in KINDS.items() if isinstance(result, owner))
        line = {"index": index, "grader": grader, "sample": sample, "setup": self._setups[grader], "kind": kind}
        try:
            self._file.write(_as_line({**line, "result": dict(result)}))
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"output_path {self.path}: cannot be written ({error.strerror}); earlier results are saved: "
                "free disk space, then rerun to resume"
            ) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # append() has reported it
            self._file.close()
        self._held.close()

    def _lock(self) -> None:
        try:
            self._held.enter_context(lock(self.path.with_name(f".{self.path.name}.lock"), timeout=0))
        except TimeoutError as error:
            raise UserError(
                f"output_path {self.path}: another run is writing to it ({error}); wait for it, or choose another file"
            ) from None
        except OSError:  # the folder is not writable: run without a lock
            return

    def _load(self, retry_errors: bool) -> None:
        self._file.seek(0)
        end = 0
        hint = "choose another output_path, or remove that line to grade the sample again"
        for saved in read_results(self._file, self.path, hint=hint):
            end = saved.end
            if saved.grader not in self._setups:
                continue
            if saved.setup != self._setups[saved.grader]:
                raise UserError(
                    f"{self.path}:{saved.line}: this result of grader {saved.grader!r} comes from another class, "
                    f"model, prompt, setting or mapper; {WAY_OUT}. (A grader's fingerprint() can return what its "
                    "results depend on.)"
                )
            if retry_errors and isinstance(saved.result, GraderError):
                self._saved[saved.grader].pop(saved.sample_index, None)
            else:
                self._saved[saved.grader][saved.sample_index] = saved
        if self._file.tell() > end:
            self._file.truncate(end)
        elif end:
            self._file.seek(end - 1)
            if self._file.read(1) != b"\n":  # a line that another program wrote
                self._file.write(b"\n")
        self._file.seek(0, os.SEEK_END)


def _as_line(content: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(content, default=_plain_or_text)
    except (TypeError, ValueError):  # keys that are not strings, or circular metadata
        content["result"]["metadata"] = {"text": repr(content["result"]["metadata"])}
        text = json.dumps(content, default=_plain_or_text)
    return text.encode() + b"\n"


def _plain_or_text(value: Any) -> Any:
    try:
        return fingerprint.to_plain(value)
    except TypeError:
        return repr(value)


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
        raise UserError(f"{path}: the file has no results; name the output_path of a GradingRunner")
    return by_name


def _slim(result: GraderScore | GraderRank | GraderError) -> GraderScore | GraderRank | GraderError:
    """Without the judge's reasons and responses, which would use most of the memory."""
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
