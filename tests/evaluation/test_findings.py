"""Findings beyond the three planted biases: each is reported where it is planted, with its figures."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from rm_gallery import evaluate
from rm_gallery.core.graders.base_grader import BaseGrader, GraderRank
from rm_gallery.evaluation.probes import STYLE_PROBES
from tests.evaluation.conftest import honest, honest_rows

Conversation = list[dict[str, Any]]


def _noise(conversation: Conversation) -> float:
    """From 0 to 1, of the text alone."""
    return zlib.crc32(str(conversation[-1]["content"]).encode()) / 2**32


def _often_right(scale: float) -> Callable[[list[Conversation]], list[float]]:
    """Right in about 82% of the pairs, with margins of about `scale`."""
    return lambda found: [
        scale * (reward + 4 * _noise(each)) for reward, each in zip(honest(found), found, strict=True)
    ]


@pytest.mark.parametrize(
    ("model", "key", "text"),
    [
        (lambda found: [0.0] * len(found), "constant", "every pair is a tie"),
        (lambda found: [-reward for reward in honest(found)], "below_chance", "is below chance"),
        (lambda found: [_noise(each) for each in found], "chance", "is not distinguishable from chance"),
        (lambda found: [round(_noise(each)) for each in found], "ties", "of 300 pairs are ties, which count as wrong"),
        (_often_right(20.0), "overconfident", "overconfident: probabilities are right after rewards are divided by"),
        (
            _often_right(0.1),
            "underconfident",
            "underconfident: probabilities are right after rewards are multiplied by",
        ),
    ],
)
def test_a_planted_fault_is_reported(model: Any, key: str, text: str) -> None:
    result = evaluate(model, honest_rows(300, seed=3), probes=False, baselines=False)
    [finding] = [each for each in result["models"][0]["sets"][0]["findings"] if each["key"] == key]
    assert text in finding["text"] and finding["advice"]


def test_a_set_whose_longer_response_is_always_better_is_named() -> None:
    rows = [{**row, "chosen": row["chosen"] + " and more" * 12} for row in honest_rows(100)]
    result = evaluate(honest, rows, probes=False, baselines=False)
    [finding] = [each for each in result["models"][0]["sets"][0]["findings"] if each["key"] == "one_sided"]
    assert finding["text"].startswith("the longer response is better in almost every pair (100 of 100)")


class _FirstWins(BaseGrader):
    async def aevaluate(self, **given: Any) -> GraderRank:
        return GraderRank(name=self.name, rank=list(range(1, len(given["response"]) + 1)))


def test_a_judge_that_prefers_the_first_response_is_found() -> None:
    result = evaluate(_FirstWins("first"), honest_rows(60), probes=40, baselines=False)
    [finding] = [each for each in result["models"][0]["sets"][0]["findings"] if each["key"] == "order"]
    assert finding["text"] == "100.0% of the verdicts depend on the order of the responses"


def test_style_probes_change_the_form_alone() -> None:
    change = {probe.key: probe.change for probe in STYLE_PROBES}
    assert change["markdown_added"]("One two. Three!") == "## Answer\n\n- **One** two.\n- **Three!**"
    plain = change["markdown_removed"]("# Title\n\n- **bold** and *soft* `code`\n```py\nx = 2 * 3 * 4\n```")
    assert plain == "Title\n\nbold and soft code\n\nx = 2 * 3 * 4\n"
    assert change["repeated"]("One. Two.") == "One. Two. Two."
    assert change["repeated"]("\u4e00\u3002\u4e8c\u3002") == "\u4e00\u3002\u4e8c\u3002 \u4e8c\u3002"
    assert change["markdown_removed"]("2 * 3 * 4 is 24") == "2 * 3 * 4 is 24"


def test_a_sample_of_the_probes_does_not_depend_on_chance() -> None:
    rows = honest_rows(100)
    random.Random(1).shuffle(rows)
    first, second = (evaluate(honest, rows, probes=30, baselines=False)["models"][0]["sets"][0] for _ in range(2))
    assert first["probes"] == second["probes"] and first["interval"] == second["interval"]
