"""Results of the parts: a line of JSON each as they come, and one table at the end."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

OK, FAILED, MISSED, SKIPPED, INFO = "ok", "FAILED", "missed", "skip", ""
"""`missed`: a goal for speed that was not reached, which is no failure. INFO: a figure without a bound."""


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    part: str
    what: str
    result: str
    figure: str = ""
    bound: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    """Everything measured; in the JSON file only."""


@dataclass
class Report:
    """Takes the results of one part."""

    part: str
    device: torch.device
    deadline: float = float("inf")
    """`time.monotonic()` after which no further measurement starts."""
    minutes: float = 9.0
    """Scales what is measured: seconds and repetitions."""
    tiny: bool = False
    """Smallest sizes, as the tests of this package run them."""
    file: Path | None = None
    """A line of JSON is appended for each result, and for each check that starts."""
    earlier: Sequence[Result] = ()
    """Results of the parts before."""
    results: list[Result] = field(default_factory=list)

    def add(
        self, what: str, ok: bool | None, figure: str = "", bound: str = "", *, goal: bool = False, **details: Any
    ) -> None:
        """ok: None for a figure without a bound. goal: missing the bound is not a failure."""
        name = INFO if ok is None else OK if ok else MISSED if goal else FAILED
        self._put(Result(self.part, what, name, figure, bound, details))

    def skip(self, what: str, why: str) -> None:
        self._put(Result(self.part, what, SKIPPED, why))

    @contextmanager
    def check(self, what: str) -> Iterator[None]:
        """The block adds its results; if it raises, the check has failed and the part continues."""
        self._write({"started": what})
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            self._put(
                Result(self.part, what, FAILED, f"{type(error).__name__}: {text}"[:200], "",
                       {"traceback": traceback.format_exc()[-4000:]})
            )  # fmt: skip

    def has_time(self, seconds: float = 0.0) -> bool:
        return time.monotonic() + seconds < self.deadline

    def seconds(self, at_nine_minutes: float) -> float:
        """How long to measure, in proportion to the minutes."""
        return 0.05 if self.tiny else at_nine_minutes * self.minutes / 9

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _put(self, result: Result) -> None:
        self.results.append(result)
        self._write(asdict(result))

    def _write(self, values: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(values, default=str) + "\n")


def read_results(file: Path) -> tuple[list[Result], str]:
    """The results in a file of a part, and the check that started last."""
    results, started = [], ""
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        values = json.loads(line)
        if "started" in values:
            started = values["started"]
        else:
            results.append(Result(**values))
    return results, started


def table(results: Sequence[Result]) -> str:
    """At most 80 columns; the name of a part in its first row only."""
    lines = [_row("part", "what", "result", "figure", "bound"), "-" * 80]
    part = ""
    for each in results:
        name, part = ("" if each.part == part else each.part), each.part
        lines.append(_row(name, each.what, each.result, each.figure, each.bound))
    return "\n".join(lines)


def _row(part: str, what: str, result: str, figure: str, bound: str) -> str:
    width = 37 - len(bound)  # of the figure, with a space before the bound
    return f"{part:10} {_cut(what, 23):23} {result:6} {_cut(figure, width):{width}} {bound}".rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."
