"""Scorers: merged prompts cost less and change nothing; graders and ensembles are scorers too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rm_gallery import UserError, evaluate
from rm_gallery.cli import main
from rm_gallery.core.graders.base_grader import BaseGrader, GraderError, GraderRank, GraderScore
from rm_gallery.errors import BadRow
from rm_gallery.evaluation.scorers import name_scorers, score_merged
from rm_gallery.schema import PreferenceGroup
from tests.core.stand_in import StandIn
from tests.evaluation.conftest import honest_rows, write_rows


def _group(prompt: str, *responses: str) -> PreferenceGroup:
    turns = [{"role": "user", "content": prompt}] if prompt else []
    return PreferenceGroup(turns, [[{"role": "assistant", "content": each}] for each in responses], style="chat")


def test_a_prompt_and_its_responses_are_scored_once() -> None:
    calls: list[list[int]] = []

    def score(groups: Sequence[PreferenceGroup]) -> list[list[float] | Exception]:
        calls.append([len(group.responses) for group in groups])
        return [[float(len(str(response))) for response in group.responses] for group in groups]

    groups = [_group("a", "x", "yy"), _group("b", "x"), _group("a", "yy", "zzz"), _group("", "x"), _group("", "x")]
    found = score_merged(score, groups)
    assert calls == [[3, 1, 1, 1]]
    assert found == score(groups)


def test_a_row_that_cannot_be_scored_does_not_affect_those_with_its_prompt() -> None:
    def score(groups: Sequence[PreferenceGroup]) -> list[list[float] | Exception]:
        return [
            BadRow("too long") if "long" in str(group.responses) else [1.0] * len(group.responses) for group in groups
        ]

    found = score_merged(score, [_group("a", "x", "y"), _group("a", "x", "long"), _group("b", "z")])
    assert found[0] == [1.0, 1.0] and isinstance(found[1], BadRow) and found[2] == [1.0]


class _Judge(BaseGrader):
    async def aevaluate(self, **given: Any) -> GraderScore | GraderRank | GraderError:
        lengths = [len(each) for each in given["response"]]
        if max(lengths) > 60:
            return GraderError(name=self.name, error="timed out")
        return GraderRank(name=self.name, rank=[1 + sum(other > each for other in lengths) for each in lengths])


def test_a_grader_is_a_scorer() -> None:
    result = evaluate(_Judge("judge"), honest_rows(60), probes=False, baselines=False)
    [model] = result["models"]
    row = model["sets"][0]
    assert (model["name"], model["kind"]) == ("judge", "grader")
    assert row["unscored"]["grader error: timed out"]["n"] + row["n"] == 60
    assert "rows without a reward: grader error: timed out (first: " in " ".join(str(result).split())
    assert row["length"]["when_longer_is_better"]["accuracy"] == 1


@pytest.mark.slow
def test_a_judge_behind_an_api(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> None:
    def longer_is_better(body: dict[str, Any]) -> str:
        text = str(body["messages"][-1]["content"])
        return json.dumps({"reason": "length", "score": min(5, 1 + len(text.partition("<response>")[2]) // 20)})

    write_rows(in_tmp / "rows.jsonl", honest_rows(30))
    with StandIn(answer=longer_is_better) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        assert main(["evaluate", "--model", "grader:relevance:any", "rows.jsonl", "--json", "out.json"]) == 0
        assert endpoint.num_requests == 60, "one request per response, and none for probes"
    [model] = json.loads(Path("out.json").read_text())["models"]
    assert (model["name"], model["kind"]) == ("grader:relevance:any", "grader") and "probes" not in model["sets"][0]
    length = model["sets"][0]["length"]
    assert length["when_longer_is_better"]["accuracy"] > 0.5 and length["when_shorter_is_better"]["accuracy"] == 0


def test_wrong_models_are_answered() -> None:
    with pytest.raises(UserError, match=r"grader:NAME:MODEL with NAME one of .*Did you mean 'relevance'\?"):
        evaluate("grader:relevence:gpt", honest_rows(2))
    with pytest.raises(UserError, match="an ensemble is two or more models joined by"):
        evaluate("a+", honest_rows(2))
    with pytest.raises(UserError, match="model is a int; pass a model folder"):
        evaluate(3, honest_rows(2))
    with pytest.raises(UserError, match="model=a is named twice"):
        evaluate(["a", "a"], honest_rows(2))
    assert name_scorers(["x/a", "y/a+x/a"]) == ["x/a", "y/a+x/a"]
