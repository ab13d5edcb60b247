"""GradingRunner: order, bounds, errors in their places, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from rm_gallery.core.graders.base_grader import GraderError, GraderScore
from rm_gallery.core.runner import GradingRunner
from rm_gallery.core.runner.grading_runner import LOCAL_IN_FLIGHT
from rm_gallery.errors import UserError
from tests.core.graders_for_runs import LengthGrader, RaisingGrader, scores, texts


class BatchScorer:
    """Answers once as many calls wait as fit, or no more come; as a reward model does with its packs."""

    def __init__(self) -> None:
        self.most_waiting = self._waiting = 0

    async def ascore(self, text: str) -> float:
        self._waiting += 1
        self.most_waiting = max(self.most_waiting, self._waiting)
        await asyncio.sleep(0.01)
        self._waiting -= 1
        return float(len(text))


class BatchGrader(LengthGrader):
    def __init__(self) -> None:
        super().__init__("batch")
        self.scorer = BatchScorer()

    async def aevaluate(self, text: str) -> GraderScore:
        return GraderScore(name=self.name, score=await self.scorer.ascore(text))


def test_results_are_in_the_order_of_the_samples_whoever_answers_first() -> None:
    grader = LengthGrader(delay=0.02)
    results = GradingRunner({"length": grader}, max_concurrency=8).run(texts(40))
    assert scores(results["length"]) == list(range(40))


def test_every_grader_has_a_list_with_a_result_per_sample() -> None:
    graders = {"plain": LengthGrader(), "mapped": (LengthGrader(), lambda sample: {"text": sample["text"] * 2})}
    results = GradingRunner(graders).run(texts(5))
    assert list(results) == ["plain", "mapped"]
    assert scores(results["mapped"]) == [0, 2, 4, 6, 8]


def test_an_empty_dataset_gives_empty_lists() -> None:
    runner = GradingRunner({"a": LengthGrader(), "b": LengthGrader()}, aggregators=lambda results: 0)
    assert runner.run([]) == {"a": [], "b": [], "<lambda>": []}


def test_conversations_reach_graders_through_mappers() -> None:
    dataset = [
        {"turns": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x" * n}]} for n in (3, 4)
    ]
    results = GradingRunner({"last": (LengthGrader(), {"text": "turns.-1.content"})}).run(dataset)
    assert scores(results["last"]) == [3, 4]


@pytest.mark.parametrize("bound", [1, 3, 32])
def test_as_many_calls_are_under_way_as_the_bound_says_and_no_more(bound: int) -> None:
    grader = LengthGrader(delay=0.002)
    GradingRunner({"a": grader, "b": grader}, max_concurrency=bound).run(texts(60))
    assert grader.most_active == bound


def test_two_runners_do_not_share_a_bound() -> None:
    graders = [LengthGrader(delay=0.01), LengthGrader(delay=0.01)]

    async def main() -> None:
        runners = [GradingRunner({"a": grader}, max_concurrency=n) for grader, n in zip(graders, (2, 5), strict=True)]
        await asyncio.gather(*(runner.arun(texts(30)) for runner in runners))

    asyncio.run(main())
    assert [grader.most_active for grader in graders] == [2, 5]


def test_a_runner_used_twice_at_once_keeps_its_bound_and_its_results_apart() -> None:
    grader = LengthGrader(delay=0.005)
    runner = GradingRunner({"a": grader}, max_concurrency=3)

    async def main() -> list[Any]:
        return await asyncio.gather(runner.arun(texts(20)), runner.arun(texts(30)))

    first, second = asyncio.run(main())
    assert (scores(first["a"]), scores(second["a"])) == (list(range(20)), list(range(30)))
    assert grader.most_active == 3


def test_a_runner_works_in_several_threads_and_event_loops() -> None:
    runner = GradingRunner({"a": LengthGrader(delay=0.001)}, max_concurrency=2)
    found: list[list[float]] = []
    threads = [threading.Thread(target=lambda: found.append(scores(runner.run(texts(20))["a"]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [list(range(20))] * 3


def test_run_works_where_an_event_loop_runs_already() -> None:
    async def notebook() -> Any:
        return GradingRunner({"a": LengthGrader()}).run(texts(3))

    assert scores(asyncio.run(notebook())["a"]) == [0, 1, 2]


def test_a_grader_that_raises_costs_its_sample_only(caplog: pytest.LogCaptureFixture) -> None:
    dataset = [{}, {"error": ValueError("bad")}, {}, {"error": UserError("one sentence")}, {}]
    with caplog.at_level(logging.WARNING):
        results = GradingRunner({"r": RaisingGrader("raising")}, max_concurrency=2).run(dataset)["r"]
    assert [isinstance(result, GraderError) for result in results] == [False, True, False, True, False]
    assert [results[1].error, results[3].error, results[1].name] == ["ValueError: bad", "one sentence", "raising"]
    assert caplog.messages == ["grader 'r': 2 of 5 samples failed, the first is sample 1: ValueError: bad"]


def test_a_result_that_is_none_is_an_error() -> None:
    class Careless(LengthGrader):
        async def aevaluate(self, text: str) -> Any:
            return 0.5

    assert (
        "the grader returned float, not a GraderScore" in GradingRunner({"c": Careless()}).run(texts(1))["c"][0].error
    )


def test_a_mapper_that_fails_costs_its_sample_only() -> None:
    dataset = [{"q": {"text": "abc"}}, {"q": {}}, "no dictionary"]
    graders = {
        "path": (LengthGrader(), {"text": "q.text"}),
        "code": (LengthGrader(), lambda s: {"text": s["q"]["text"]}),
    }
    results = GradingRunner(graders).run(dataset)
    assert [results["path"][0].score, results["code"][0].score] == [3, 3]
    assert "path 'q.text': there is no 'text' at 'q'; it is empty" in results["path"][1].error
    assert "there is no 'q' in the sample: that is a string" in results["path"][2].error
    assert results["code"][1].error == "the mapper failed with KeyError: 'text'"
    assert results["code"][2].error.startswith("the mapper failed with TypeError")


@pytest.mark.parametrize("dataset", [None, 3, "text", {"text": "a"}, LengthGrader()])
def test_what_is_no_dataset_is_refused(dataset: Any) -> None:
    with pytest.raises(UserError, match=r"the dataset is of type .*: give a list"):
        GradingRunner({"a": LengthGrader()}).run(dataset)


def test_a_data_frame_is_told_how_to_become_a_dataset() -> None:
    class DataFrame(list[Any]):
        columns = ("text",)

        def to_dict(self) -> None: ...

    with pytest.raises(UserError, match=r"for a DataFrame, df.to_dict\('records'\)"):
        GradingRunner({"a": LengthGrader()}).run(DataFrame())


@pytest.mark.parametrize("bound", [0, -1, 2.5, True, "8"])
def test_a_bound_that_is_none_is_refused(bound: Any) -> None:
    with pytest.raises(UserError, match=r"max_concurrency=.*: must be an integer of at least 1"):
        GradingRunner({"a": LengthGrader()}, max_concurrency=bound)


@pytest.mark.parametrize("graders", [{}, [LengthGrader()], None])
def test_graders_come_as_a_dictionary(graders: Any) -> None:
    with pytest.raises(UserError, match="grader_configs must be a dictionary"):
        GradingRunner(graders)


def test_a_long_dataset_is_read_as_it_is_needed() -> None:
    class Sample(dict[str, Any]):
        pass

    alive: weakref.WeakSet[Sample] = weakref.WeakSet()
    most_samples = most_tasks = 0

    def dataset() -> Iterator[Sample]:
        nonlocal most_samples, most_tasks
        for index in range(20_000):
            sample = Sample(text=str(index))
            alive.add(sample)
            if index % 50 == 0:
                most_samples = max(most_samples, len(alive))
                most_tasks = max(most_tasks, len(asyncio.all_tasks()))
            yield sample

    Sample.__hash__ = object.__hash__  # type: ignore[assignment]
    results = GradingRunner({"a": LengthGrader()}, max_concurrency=16).run(dataset())
    gc.collect()
    assert len(results["a"]) == 20_000 and scores(results["a"][-3:]) == [5, 5, 5]
    assert most_samples <= 16 + 3 and most_tasks <= 16 + 2
    assert not alive


def test_calls_to_a_reward_model_wait_together_past_the_bound_on_api_calls() -> None:
    batch, api = BatchGrader(), LengthGrader(delay=0.001)
    results = GradingRunner({"reward": batch, "api": api}, max_concurrency=4).run([{"text": "abc"}] * 1500)
    assert set(scores(results["reward"])) == set(scores(results["api"])) == {3.0}
    assert api.most_active == 4
    assert 300 < batch.scorer.most_waiting <= LOCAL_IN_FLIGHT + 4
