"""Graders that ask a chat model, through the real openai package, at an endpoint that misbehaves."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest

from rm_gallery.core.graders import BaseGrader, GraderError, GraderMode, GraderRank, GraderScore, LLMGrader
from rm_gallery.core.graders.common import (
    CorrectnessGrader,
    HallucinationGrader,
    HarmfulnessGrader,
    InstructionFollowingGrader,
    RelevanceGrader,
    RewardModelGrader,
)
from rm_gallery.core.models import OpenAIChatModel
from rm_gallery.errors import UserError
from tests.core.stand_in import StandIn

pytestmark = pytest.mark.slow

JUDGES = [CorrectnessGrader, HallucinationGrader, HarmfulnessGrader, InstructionFollowingGrader, RelevanceGrader]
SAMPLE = {"query": "What is 2 + 2?", "response": "It is 4.", "reference_response": "4"}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with StandIn() as stand_in:
        yield stand_in


def model_at(endpoint: StandIn, name: str = "judge", timeout: float = 20.0) -> OpenAIChatModel:
    return OpenAIChatModel(name, api_key="k", base_url=endpoint.url, timeout=timeout, max_retries=2)


def prompt_of(endpoint: StandIn) -> str:
    """The last request's messages as one text."""
    return "\n".join(message["content"] for message in endpoint.requests[-1]["messages"])


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", JUDGES)
def test_every_judge_gives_score_and_reason(kind: type[LLMGrader], language: str, endpoint: StandIn) -> None:
    grader = kind(model_at(endpoint), language=language)
    result = grader.evaluate(**SAMPLE, context="Sums.", unrelated=3)
    assert isinstance(result, GraderScore)
    assert (result.name, result.score, result.reason) == (kind.prompt_name, 4, "it fits")
    assert result.metadata["raw"] == '{"reason": "it fits", "score": 4}'
    prompt = prompt_of(endpoint)
    for tag, text in {**SAMPLE, "context": "Sums."}.items():
        assert f"<{tag}>\n{text}\n</{tag}>" in prompt
    assert any("\u4e00" <= letter <= "\u9fff" for letter in prompt) == (language == "zh")


@pytest.mark.parametrize(
    ("trouble", "what", "requests"),
    [
        ("hopeless", r"the model's response cannot be parsed \(no JSON in the response: 'I would say", 1),
        ("truncated", "'score' is missing; cut off at max_tokens", 1),
        ("out_of_range", "the model returned the score 11, outside 1..5", 1),
        ("rate_limit", r"HTTP 429 \(too many requests\) after 3 tries", 3),
        ("server_error", r"HTTP 500 \(the server stumbled\) after 3 tries", 3),
        ("hang", "no response within 0.2 s after 3 tries", 3),
        ("empty", "a response without choices", 1),
        ("refusal", "refused", 1),
        ("unauthorized", "HTTP 401", 1),
    ],
)
def test_what_fails_is_a_grader_error(trouble: str, what: str, requests: int, endpoint: StandIn) -> None:
    model = model_at(endpoint, f"judge:{trouble}", timeout=0.2 if trouble == "hang" else 20.0)
    result = RelevanceGrader(model).evaluate(**SAMPLE)
    assert isinstance(result, GraderError)
    assert re.search(what, result.error), result.error
    assert result.name == "relevance" and "\n" not in result.error
    assert endpoint.num_requests == requests


@pytest.mark.parametrize("trouble", ["malformed", "no_format"])
def test_malformed_json_and_missing_formats_are_mended(trouble: str, endpoint: StandIn) -> None:
    result = RelevanceGrader(model_at(endpoint, f"judge:{trouble}")).evaluate(**SAMPLE)
    assert isinstance(result, GraderScore) and result.score == 4


def test_trouble_that_passes_is_waited_out(endpoint: StandIn) -> None:
    endpoint.script.extend(["rate_limit", "server_error"])
    assert isinstance(RelevanceGrader(model_at(endpoint)).evaluate(**SAMPLE), GraderScore)
    assert endpoint.num_requests == 3


@pytest.mark.parametrize(
    ("kind", "sample", "what"),
    [
        (RelevanceGrader, {"response": "r"}, "query is missing"),
        (RelevanceGrader, {"query": "", "response": "r"}, "query is missing"),
        (RelevanceGrader, {"query": "q"}, "response is missing"),
        (RelevanceGrader, {"query": "q", "response": []}, "response is missing"),
        (CorrectnessGrader, {"query": "q", "response": "r"}, "reference_response is missing"),
    ],
)
def test_a_missing_argument_is_one_sentence(
    kind: type[LLMGrader], sample: dict[str, Any], what: str, endpoint: StandIn
) -> None:
    result = kind(model_at(endpoint)).evaluate(**sample)
    assert isinstance(result, GraderError) and result.error.startswith(what)
    assert endpoint.num_requests == 0


def test_an_empty_response_is_judged(endpoint: StandIn) -> None:
    assert isinstance(RelevanceGrader(model_at(endpoint)).evaluate(query="q", response=""), GraderScore)
    assert "<response>\n\n</response>" in prompt_of(endpoint)


def test_listwise_compares_in_one_request(endpoint: StandIn) -> None:
    grader = RelevanceGrader(model_at(endpoint), mode=GraderMode.LISTWISE)
    result = grader.evaluate(query="q", response=["one", "two", "three"])
    assert isinstance(result, GraderRank)
    assert (result.rank, result.reason) == ([3, 2, 1], "later is better")
    assert endpoint.num_requests == 1 and "<response_3>\nthree\n</response_3>" in prompt_of(endpoint)


@pytest.mark.parametrize("rank", ["[1, 1]", "[1]", "[0, 1]", "[1, 2, 3]", '"first"'])
def test_a_rank_that_is_none_is_a_grader_error(rank: str, endpoint: StandIn) -> None:
    endpoint.answer = lambda body: f'{{"reason": "r", "rank": {rank}}}'
    grader = RelevanceGrader(model_at(endpoint), mode="listwise")
    assert isinstance(grader.evaluate(query="q", response=["one", "two"]), GraderError)


def test_pointwise_judges_several_responses_each_by_itself(endpoint: StandIn) -> None:
    grader = RelevanceGrader(model_at(endpoint))
    endpoint.answer = lambda body: f'{{"reason": "r", "score": {5 if "two" in body["messages"][1]["content"] else 2}}}'
    result = grader.evaluate(query="q", response=["one", "two", "three"])
    assert isinstance(result, GraderRank)
    assert result.rank == [2, 1, 2] and result.metadata["scores"] == [2, 5, 2]
    endpoint.answer = lambda body: '{"reason": "r", "score": 6}'
    failed = grader.evaluate(query="q", response=["one", "two"])
    assert isinstance(failed, GraderError) and failed.error.startswith("response 0: the model returned the score 6")


def test_a_criterion_of_ones_own_has_its_own_scale(endpoint: StandIn) -> None:
    endpoint.answer = lambda body: '{"reason": "r", "score": 0.5}'
    grader = LLMGrader(model_at(endpoint), "wit", criterion="Is it {funny}?", min_score=0, max_score=1, temperature=0)
    result = grader.evaluate(query="q", response="r")
    assert isinstance(result, GraderScore) and result.score == 0.5
    assert "Is it {funny}?" in prompt_of(endpoint) and "from 0 (worst) to 1 (best)" in prompt_of(endpoint)
    assert endpoint.requests[0]["temperature"] == 0


@pytest.mark.parametrize(
    "template",
    [
        'Rate {response} for {audience}: {"score": 1}',
        [{"role": "user", "content": 'Rate {response} for {audience}: {{"score": 1}}'}],
        {"en": 'Rate {response} for {audience}: {"score": 1}', "zh": "{response}"},
    ],
)
def test_a_template_of_ones_own_takes_any_field(template: Any, endpoint: StandIn) -> None:
    grader = LLMGrader(model_at(endpoint), template=template)
    assert isinstance(grader.evaluate(query="q", response="f(x) = {x}", audience="children"), GraderScore)
    assert prompt_of(endpoint) == 'Rate f(x) = {x} for children: {"score": 1}'
    lost = grader.evaluate(query="q", response="r")
    assert isinstance(lost, GraderError) and "needs the field {audience}" in lost.error


def test_a_grader_that_cannot_work_is_refused_when_it_is_made(endpoint: StandIn) -> None:
    model = model_at(endpoint)
    for wrong, what in (
        (lambda: RelevanceGrader("gpt-4o"), "model is str; give a chat or reward model"),
        (lambda: RelevanceGrader(model, language="fr"), "language=fr: must be en or zh"),
        (lambda: LLMGrader(model), "give either criterion or template"),
        (lambda: LLMGrader(model, criterion="c", template="t"), "give either criterion or template"),
        (lambda: RelevanceGrader(model, min_score=5, max_score=1), "the scale 5..1 is empty"),
        (lambda: RewardModelGrader(model), "model is a chat model; give a reward model's folder"),
    ):
        with pytest.raises(UserError, match=what):
            wrong()  # type: ignore[no-untyped-call]


def test_a_model_that_raises_anything_gives_a_grader_error(endpoint: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_at(endpoint)

    async def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(model, "achat", fail)
    for response in ("one", ["one", "two"]):
        result = RelevanceGrader(model).evaluate(query="q", response=response)
        assert isinstance(result, GraderError) and result.error == "ZeroDivisionError: by zero"


def test_a_cancelled_evaluation_is_cancelled_not_an_error(endpoint: StandIn) -> None:
    grader: BaseGrader = RelevanceGrader(model_at(endpoint, "judge:hang"))

    async def stop() -> None:
        task = asyncio.create_task(grader.aevaluate(**SAMPLE))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(stop())


def test_a_model_may_be_given_as_a_dict(endpoint: StandIn) -> None:
    grader = RelevanceGrader({"model": "judge", "api_key": "k", "base_url": endpoint.url})
    assert isinstance(grader.evaluate(**SAMPLE), GraderScore)
