"""Aggregators: one more list of results, made of one sample's results at a time."""

from __future__ import annotations

from typing import Any

import pytest

from rm_gallery.core.graders.base_grader import GraderError, GraderRank, GraderScore
from rm_gallery.core.runner import BaseAggregator, GradingRunner, WeightedSumAggregator
from rm_gallery.errors import UserError
from tests.core.graders_for_runs import LengthGrader, RaisingGrader, scores, texts

TWO = {"a": LengthGrader("a"), "b": LengthGrader("b")}


def test_a_weighted_sum_adds_a_list_under_its_name() -> None:
    total = WeightedSumAggregator(name="total", weights={"a": 0.25, "b": 0.75})
    results = GradingRunner({"a": LengthGrader(), "b": (LengthGrader(), {"text": "other"})}, aggregators=total).run(
        [{"text": "xx", "other": "xxxx"}, {"text": "", "other": "x"}]
    )
    assert list(results) == ["a", "b", "total"]
    assert scores(results["total"]) == pytest.approx([3.5, 0.75])
    assert results["total"][0].metadata == {"weights": {"a": 0.25, "b": 0.75}, "scores": {"a": 2, "b": 4}}


def test_several_aggregators_functions_too_add_their_lists() -> None:
    def longest(results: dict[str, Any]) -> float:
        return max(result.score for result in results.values())

    results = GradingRunner(TWO, aggregators=[WeightedSumAggregator("mean"), longest]).run(texts(3))
    assert scores(results["mean"]) == pytest.approx([0, 1, 2])
    assert results["longest"] == [0, 1, 2]


def test_weights_may_be_negative_and_graders_without_one_do_not_count() -> None:
    given = {"a": GraderScore(score=4), "b": GraderScore(score=1), "c": GraderError(error="not asked for")}
    result = WeightedSumAggregator("w", {"a": 1, "b": -2})(given)
    assert isinstance(result, GraderScore) and result.score == 2


def test_a_missing_score_gives_an_error_and_no_sum_on_another_scale() -> None:
    total = WeightedSumAggregator("total", {"a": 0.5, "b": 0.5})
    failed = total({"a": GraderScore(score=4), "b": GraderError(error="timed out")})
    ranked = total({"a": GraderScore(score=4), "b": GraderRank(rank=[2, 1])})
    assert isinstance(failed, GraderError) and failed.error == "no score of 'b': timed out"
    assert isinstance(ranked, GraderError) and "its result is GraderRank" in ranked.error


def test_an_aggregator_that_raises_gives_errors_in_its_own_list_only() -> None:
    def broken(results: dict[str, Any]) -> float:
        return results["a"].score / results["a"].score

    results = GradingRunner({"a": LengthGrader()}, aggregators=broken).run(texts(3))
    assert scores(results["a"]) == [0, 1, 2]
    assert results["broken"][0].error == "aggregator 'broken' failed with ZeroDivisionError: float division by zero"
    assert results["broken"][1:] == [1, 1]


def test_a_grader_that_fails_reaches_the_aggregator_as_an_error() -> None:
    results = GradingRunner({"a": RaisingGrader()}, aggregators=WeightedSumAggregator("w")).run(
        [{}, {"error": OSError("gone")}]
    )
    assert scores(results["w"][:1]) == [1]
    assert results["w"][1].error == "no score of 'a': OSError: gone"


@pytest.mark.parametrize(
    ("aggregators", "said"),
    [
        (WeightedSumAggregator("w", {"aa": 1.0}), "'w' has a weight for 'aa', but the graders are 'a', 'b'"),
        (WeightedSumAggregator("a"), "the name 'a' is used twice"),
        ([WeightedSumAggregator("w"), WeightedSumAggregator("w")], "the name 'w' is used twice"),
        (["w"], "aggregators: 'w' is not an aggregator; give WeightedSumAggregator"),
        ([WeightedSumAggregator], "is not an aggregator; give WeightedSumAggregator"),
    ],
)
def test_an_aggregator_that_cannot_work_is_refused_before_anything_is_graded(aggregators: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        GradingRunner(TWO, aggregators=aggregators)


@pytest.mark.parametrize("weight", [float("nan"), "1", None, True])
def test_a_weight_is_a_number(weight: Any) -> None:
    with pytest.raises(UserError, match="the weight of 'a' is"):
        WeightedSumAggregator("w", {"a": weight})


def test_a_subclass_of_the_base_is_an_aggregator() -> None:
    class First(BaseAggregator):
        def __call__(self, results: Any) -> Any:
            return results["a"]

    results = GradingRunner(TWO, aggregators=First("first")).run(texts(2))
    assert results["first"] == results["a"]
