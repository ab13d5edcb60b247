"""BaseGrader and its results: what users' own graders rely on."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from pydantic import ValidationError

from rm_gallery.core.graders import BaseGrader, GraderError, GraderMode, GraderRank, GraderScore


class LengthGrader(BaseGrader):
    """A rule: the longer the better."""

    async def aevaluate(self, response: str = "", **kwargs: Any) -> GraderScore | GraderRank | GraderError:
        await asyncio.sleep(0)
        return GraderScore(name=self.name, score=len(response), metadata={"thread": threading.get_ident()})


def test_a_grader_has_a_name_a_mode_and_a_description() -> None:
    grader = LengthGrader()
    assert (grader.name, grader.mode, grader.description) == ("LengthGrader", GraderMode.POINTWISE, "")
    named = LengthGrader("length", "listwise", "counts characters")
    assert (named.name, named.mode, named.description) == ("length", GraderMode.LISTWISE, "counts characters")
    assert repr(named) == "LengthGrader(name='length', mode='listwise')"
    with pytest.raises(ValueError, match="'setwise' is not a valid GraderMode"):
        LengthGrader(mode="setwise")


def test_evaluate_works_outside_and_inside_an_event_loop() -> None:
    async def inside() -> Any:
        return LengthGrader().evaluate(response="four")

    assert LengthGrader().evaluate(response="four").score == 4  # type: ignore[union-attr]
    result = asyncio.run(inside())
    assert result.score == 4 and result.metadata["thread"] != threading.get_ident()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("grader")]


def test_results_are_records_that_go_to_json_and_back() -> None:
    results = [
        GraderScore(name="a", score=1, reason="r", metadata={"reward": 1.5}),
        GraderRank(name="a", rank=[2, 1]),
        GraderError(name="a", error="no answer"),
    ]
    for result in results:
        assert type(result).model_validate_json(result.model_dump_json()) == result


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "much", None])
def test_a_score_is_a_finite_number(score: Any) -> None:
    with pytest.raises(ValidationError):
        GraderScore(name="a", score=score)


def test_places_count_from_one() -> None:
    with pytest.raises(ValidationError):
        GraderRank(name="a", rank=[0, 1])
