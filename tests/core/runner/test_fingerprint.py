"""Fingerprints: the same for the same content, another for any change that matters."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_gallery.core.graders.base_grader import BaseGrader
from rm_gallery.core.runner.fingerprint import of_grader, of_sample


class Model:
    def __init__(self, model: str, **attributes: Any) -> None:
        self.model = model
        vars(self).update(attributes)


class Grader(BaseGrader):
    def __init__(self, **attributes: Any) -> None:
        super().__init__("grader")
        vars(self).update(attributes)

    async def aevaluate(self, **kwargs: Any) -> Any: ...


def test_a_sample_is_known_by_its_content() -> None:
    sample = {"text": "a", "day": datetime.date(2024, 1, 2), "ids": np.arange(3), "path": Path("a"), "raw": b"\0"}
    same = {"raw": b"\0", "path": Path("a"), "ids": np.arange(3), "day": datetime.date(2024, 1, 2), "text": "a"}
    assert of_sample(sample, 0) == of_sample(same, 5)
    for key, value in {"text": "b", "ids": np.arange(4), "day": datetime.date(2024, 1, 3), "new": None}.items():
        assert of_sample({**sample, key: value}, 0) != of_sample(sample, 0)


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    assert of_sample({"text": "a", "numbers": [1, 2.5, None]}, 0) == "6e0bd9ba795f8726"


@pytest.mark.parametrize(
    "other",
    [
        Grader(template="Judge well"),
        Grader(model=Model("b")),
        Grader(model=Model("a", options={"temperature": 1})),
        Grader(rubrics=["one"]),
    ],
)
def test_a_grader_is_known_by_its_settings(other: Grader) -> None:
    base = Grader(template="Judge", model=Model("a"), rubrics=[])
    vars(other).update({name: value for name, value in vars(base).items() if name not in vars(other)})
    assert of_grader(other, None) != of_grader(base, None)


def test_address_key_timeout_and_private_state_do_not_make_another_grader() -> None:
    first = Grader(model=Model("a", base_url="one", options={"extra_headers": {"key": "k1"}}), _calls=3)
    second = Grader(model=Model("a", base_url="two", options={"extra_headers": {"key": "k2"}}), _calls=4)
    assert of_grader(first, None) == of_grader(second, None)


def test_a_function_is_known_by_its_code() -> None:
    def mapper(sample: Any) -> Any:
        return {"text": sample["a"]}

    def with_comment(sample: Any) -> Any:
        # the same
        return {"text": sample["a"]}

    with_comment.__qualname__ = mapper.__qualname__
    assert of_grader(Grader(), mapper) == of_grader(Grader(), with_comment)
    assert of_grader(Grader(), lambda s: {"text": s["a"]}) != of_grader(Grader(), lambda s: {"text": s["b"]})


def test_a_grader_may_say_itself_what_it_depends_on() -> None:
    class Own(Grader):
        def fingerprint(self) -> Any:
            return {"rules": 3}

    assert of_grader(Own(seen=1), None) == of_grader(Own(seen=2), None)
