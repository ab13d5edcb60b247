"""How runs end before their time: cancelled, interrupted or failed, they leave no task behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from rm_gallery.core.graders.base_grader import GraderScore
from rm_gallery.core.runner import GradingRunner
from tests.core.graders_for_runs import HangingGrader, LengthGrader, RaisingGrader, scores, texts


def cancelled_after_start(work: Coroutine[Any, Any, Any], hanging: HangingGrader, num_waiting: int) -> int:
    """Cancel once so many calls hang; return how many tasks are left then."""

    async def main() -> int:
        task = asyncio.create_task(work)
        while hanging.num_waiting < num_waiting:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(asyncio.all_tasks()) - 1

    return asyncio.run(main())


def test_a_grader_that_cancels_itself_costs_its_sample_only() -> None:
    results = GradingRunner({"r": RaisingGrader()}).run([{"error": asyncio.CancelledError()}, {}])["r"]
    assert results[0].error == "the grader cancelled itself"
    assert scores(results[1:]) == [1]


def test_what_a_dataset_raises_passes_through_and_leaves_no_task() -> None:
    hanging = HangingGrader()

    def dataset() -> Iterator[dict[str, Any]]:
        yield from texts(4)
        raise OSError("the file ends here")

    async def main() -> int:
        with pytest.raises(OSError, match="the file ends here"):
            await GradingRunner({"a": hanging}).arun(dataset())
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(main()) == 0
    assert (hanging.num_waiting, hanging.num_cancelled) == (4, 4)


def test_cancelling_leaves_no_task_behind() -> None:
    hanging = HangingGrader()
    left = cancelled_after_start(GradingRunner({"a": hanging}, max_concurrency=7).arun(texts(100)), hanging, 7)
    assert left == 0
    assert hanging.num_cancelled == 7


@pytest.mark.parametrize("in_notebook", [False, True])
def test_ctrl_c_ends_a_run_and_its_calls(in_notebook: bool) -> None:
    class Interrupting(HangingGrader):
        async def aevaluate(self, **kwargs: Any) -> Any:
            if self.num_waiting == 2:
                signal.pthread_kill(main_thread, signal.SIGINT)
            return await super().aevaluate(**kwargs)

    interrupting, main_thread = Interrupting(), threading.get_ident()
    runner = GradingRunner({"a": interrupting}, max_concurrency=3)

    async def notebook() -> Any:
        return runner.run(texts(9))

    with pytest.raises(KeyboardInterrupt):
        if in_notebook:
            with contextlib.closing(asyncio.new_event_loop()) as loop:
                loop.run_until_complete(notebook())
        else:
            runner.run(texts(9))
    assert interrupting.num_waiting == interrupting.num_cancelled == 3


def test_a_runner_is_as_before_after_it_was_cancelled() -> None:
    hanging, grader = HangingGrader(), LengthGrader(delay=0.001)
    runner = GradingRunner({"a": hanging}, max_concurrency=2)
    for _ in range(2):
        cancelled_after_start(runner.arun(texts(10)), hanging, hanging.num_waiting + 2)
    assert not runner._limits
    GradingRunner({"a": grader}, max_concurrency=2).run(texts(10))
    assert grader.most_active == 2


def test_a_grader_that_never_waits_can_be_cancelled() -> None:
    class Busy(LengthGrader):
        async def aevaluate(self, text: str) -> GraderScore:
            self.num_calls += 1
            return GraderScore(score=0)

    busy = Busy()

    async def main() -> bool:
        without_end = itertools.repeat({"text": ""})
        task = asyncio.create_task(GradingRunner({"a": busy}).arun(without_end))
        while busy.num_calls < 100:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(main())
