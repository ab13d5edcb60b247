"""Small graders for the tests of the runner, and the datasets that they grade."""

from __future__ import annotations

import asyncio
from typing import Any

from rm_gallery.core.graders.base_grader import BaseGrader, GraderError, GraderRank, GraderScore


class LengthGrader(BaseGrader):
    """The number of characters of the text; later samples answer first. Watches how many calls are under way."""

    def __init__(self, name: str = "length", *, delay: float = 0.0) -> None:
        super().__init__(name)
        self._delay, self._active = delay, 0
        self.most_active = self.num_calls = 0

    async def aevaluate(self, text: str) -> GraderScore | GraderRank | GraderError:
        self.num_calls += 1
        self._active += 1
        self.most_active = max(self.most_active, self._active)
        try:
            await asyncio.sleep(self._delay / (1 + len(text)))
            return GraderScore(name=self.name, score=len(text))
        finally:
            self._active -= 1


class HangingGrader(BaseGrader):
    """Never answers; counts who was cancelled while waiting."""

    def __init__(self) -> None:
        super().__init__("hanging")
        self.num_waiting = self.num_cancelled = 0

    async def aevaluate(self, **kwargs: Any) -> GraderScore | GraderRank | GraderError:
        self.num_waiting += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        raise AssertionError("an event that nobody sets")


class RaisingGrader(BaseGrader):
    """Raises what it is given, and scores 1 for None."""

    async def aevaluate(self, error: BaseException | None = None) -> GraderScore | GraderRank | GraderError:
        await asyncio.sleep(0)
        if error is not None:
            raise error
        return GraderScore(name=self.name, score=1)


def texts(count: int) -> list[dict[str, Any]]:
    """Samples with texts of 0, 1, 2, ... characters."""
    return [{"id": index, "text": "x" * index} for index in range(count)]


def scores(results: list[Any]) -> list[float]:
    return [result.score for result in results]
