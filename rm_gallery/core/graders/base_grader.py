"""BaseGrader: what every grader is, ours and users' own."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rm_gallery.core.graders.schema import GraderError, GraderMode, GraderRank, GraderScore


class BaseGrader(ABC):
    """Judges one sample at a time. A subclass writes `aevaluate`; everything else follows from it."""

    def __init__(self, name: str = "", mode: GraderMode | str = GraderMode.POINTWISE, description: str = "") -> None:
        """name: what results carry, by default the class's name. Raises ValueError for an unknown mode."""
        self.name = name or type(self).__name__
        self.mode = GraderMode(mode)
        self.description = description

    @abstractmethod
    async def aevaluate(self, **kwargs: Any) -> GraderScore | GraderRank | GraderError:
        """Judge one sample. A judgement that fails is a GraderError, so that a batch goes on without it."""

    def evaluate(self, **kwargs: Any) -> GraderScore | GraderRank | GraderError:
        """`aevaluate` for code that does not await; in a running event loop (a notebook) it blocks that loop."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.aevaluate(**kwargs))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="grader") as thread:
            return thread.submit(lambda: asyncio.run(self.aevaluate(**kwargs))).result()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, mode={self.mode.value!r})"
