"""GraderConfig: the accepted forms, the others refused in words, and the arguments of a grader."""

from __future__ import annotations

from typing import Any

import pytest

from rm_gallery.core.runner import GraderConfig, GradingRunner
from rm_gallery.errors import UserError
from tests.core.graders_for_runs import HangingGrader, LengthGrader, scores

GRADER = LengthGrader()


@pytest.mark.parametrize(
    "config",
    [
        GraderConfig(GRADER, {"text": "t"}),
        GraderConfig(grader=GRADER, mapper=lambda sample: {"text": sample["t"]}),
        (GRADER, {"text": "t"}),
        {"grader": GRADER, "mapper": {"text": "t"}},
    ],
)
def test_every_form_of_a_configuration_works(config: Any) -> None:
    results = GradingRunner({"length": config}).run([{"t": "abc"}])
    assert scores(results["length"]) == [3]


@pytest.mark.parametrize("config", [GRADER, GraderConfig(GRADER), {"grader": GRADER}, (GRADER, None)])
def test_without_a_mapper_the_grader_is_given_the_fields_that_it_names(config: Any) -> None:
    results = GradingRunner({"length": config}).run([{"text": "abc", "id": 7}])
    assert scores(results["length"]) == [3]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("length", "grader 'mine' is of type str, which is not a grader: give a grader, GraderConfig"),
        (LengthGrader, r"grader 'mine' is the class LengthGrader: create an instance, LengthGrader\(...\)"),
        ((GRADER,), "grader 'mine' is of type tuple"),
        ({"grader": GRADER, "maper": {}}, "grader 'mine' has the key 'maper'.*Did you mean 'mapper'"),
        ({"mapper": {}}, "grader 'mine' has no key 'grader'"),
        ((GRADER, "text"), "grader 'mine': the mapper is a string"),
        ((GRADER, {"txt": "t"}), r"the mapper gives 'txt', but LengthGrader takes 'text'. Did you mean 'text'\?"),
    ],
)
def test_other_forms_are_refused_with_the_name_and_what_is_accepted(config: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        GradingRunner({"mine": config})


def test_a_missing_parameter_is_named_with_what_there_is() -> None:
    said = r"LengthGrader needs 'text', but gets 'txt', 'id'. Did you mean 'txt'\? \(A mapper gives"
    with pytest.raises(UserError, match=said):
        GraderConfig(GRADER).arguments({"txt": "abc", "id": 0})


def test_a_grader_that_takes_anything_is_given_the_whole_sample() -> None:
    assert GraderConfig(HangingGrader()).arguments({"a": 1, "b": 2}) == {"a": 1, "b": 2}


def test_a_reward_model_in_this_process_is_seen_wherever_a_grader_keeps_it() -> None:
    class Scorer:
        async def ascore(self) -> None: ...

    class ChatModel:
        def __init__(self, is_reward_model: bool) -> None:
            self.is_reward_model = is_reward_model

    def with_attributes(**attributes: Any) -> GraderConfig:
        grader = LengthGrader()
        vars(grader).update(attributes)
        return GraderConfig(grader)

    assert with_attributes(model=ChatModel(True)).is_local
    assert with_attributes(model=Scorer()).is_local
    assert with_attributes(scorer=Scorer()).is_local
    assert not with_attributes(model=ChatModel(False)).is_local
    assert not with_attributes().is_local
