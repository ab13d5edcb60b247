"""OpenAIChatModel over HTTP: the real openai package against an endpoint that misbehaves."""

from __future__ import annotations

import asyncio
import base64
import gc
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from rm_gallery.core.models import ChatError, OpenAIChatModel
from rm_gallery.core.models.base_chat_model import ChatMessage
from rm_gallery.errors import UserError
from tests.core.stand_in import StandIn

pytestmark = pytest.mark.slow


class Judgement(BaseModel):
    reason: str
    score: float


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with StandIn() as stand_in:
        yield stand_in


def model_at(endpoint: StandIn, name: str = "judge", **options: Any) -> OpenAIChatModel:
    given = {"api_key": "sk-secret-key", "base_url": endpoint.url, "timeout": 20.0}
    return OpenAIChatModel(name, **{**given, **options})


def test_an_answer_comes_with_its_usage(endpoint: StandIn) -> None:
    endpoint.answer = lambda body: f"{len(body['messages'])} turns"
    turns = [ChatMessage(role="system", content="Be brief."), {"role": "user", "content": "Hello {name}"}]
    response = model_at(endpoint, temperature=0).chat(turns, max_tokens=5)
    assert (response.content, response.parsed) == ("2 turns", None)
    assert response.usage is not None and response.usage.total_tokens == 10
    assert response.metadata == {"model": "judge", "finish_reason": "stop", "attempts": 1}
    [sent] = endpoint.requests
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello {name}"}]
    assert (sent["temperature"], sent["max_tokens"]) == (0, 5)
    assert endpoint.headers[0]["authorization"] == "Bearer sk-secret-key"


def test_credentials_of_the_address_authorize_and_are_in_no_log_error_or_repr(
    endpoint: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    address = endpoint.url.replace("://", "://us%40er:pass-word-1@")
    model = model_at(endpoint, base_url=address, max_retries=0)
    assert model.chat("hello").content
    assert endpoint.headers[0]["authorization"] == "Basic " + base64.b64encode(b"us@er:pass-word-1").decode()
    with pytest.raises(ChatError) as refused:
        model_at(endpoint, "judge:unauthorized", base_url=address, max_retries=0).chat("hello")
    closed = "http://u:pass-word-2@127.0.0.1:9/v1?token=abc"
    with pytest.raises(ChatError) as unreachable:
        model_at(endpoint, base_url=closed, max_retries=0).chat("hello")
    trace = "".join(traceback.format_exception(refused.value) + traceback.format_exception(unreachable.value))
    for text in (caplog.text, trace, repr(model), str(unreachable.value)):
        assert not re.search("pass-word|sk-secret|token=abc", text)


def test_key_and_address_come_from_the_environment(endpoint: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-environment")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    OpenAIChatModel("judge", timeout=20).chat("hello")
    assert endpoint.headers[0]["authorization"] == "Bearer sk-from-environment"


def test_a_missing_key_or_package_is_said_when_the_model_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="no API key; set OPENAI_API_KEY"):
        OpenAIChatModel("judge")
    OpenAIChatModel("judge", base_url="http://127.0.0.1:9/v1")  # a server of one's own may ask for none
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rm-gallery\[openai\]'"):
        OpenAIChatModel("judge", api_key="k")


@pytest.mark.parametrize("trouble", ["rate_limit", "server_error", "hang"])
def test_passing_trouble_is_waited_out(trouble: str, endpoint: StandIn) -> None:
    model_at(endpoint).chat("hello")  # what the package does on first use must not count as silence
    endpoint.script.extend([trouble, trouble])
    response = model_at(endpoint, timeout=1.0 if trouble == "hang" else 20.0).chat("hello")
    assert response.content and response.metadata["attempts"] == 3
    assert endpoint.num_requests == 1 + 3


@pytest.mark.parametrize(
    ("trouble", "what"),
    [
        ("rate_limit", r"HTTP 429 \(too many requests\) after 3 tries$"),
        ("server_error", r"HTTP 500 \(the server stumbled\) after 3 tries$"),
        ("hang", r"no response within 0.2 s after 3 tries$"),
    ],
)
def test_lasting_trouble_is_one_sentence(trouble: str, what: str, endpoint: StandIn) -> None:
    model = model_at(endpoint, f"judge:{trouble}", max_retries=2, timeout=0.2 if trouble == "hang" else 20.0)
    with pytest.raises(ChatError, match=f"^model=judge:{trouble} at {endpoint.url}: {what}"):
        model.chat("hello")
    assert endpoint.num_requests == 3


@pytest.mark.parametrize(
    ("trouble", "what", "requests"),
    [
        ("unauthorized", r"HTTP 401 .*\*\*\*.*; set OPENAI_API_KEY", 1),
        ("no_quota", "you exceeded your quota", 1),
        ("empty", "a response without choices$", 1),
        ("html", "a response without choices$", 1),
        ("too_long", r"HTTP 400 \(the prompt is longer than the context\)$", 1),
        ("no_text", r"without text \(finish_reason=length\); raise max_tokens$", 1),
        ("refusal", r"refused \(I would rather not.\)$", 1),
    ],
)
def test_what_would_fail_again_is_not_asked_again(trouble: str, what: str, requests: int, endpoint: StandIn) -> None:
    with pytest.raises(ChatError, match=what) as caught:
        model_at(endpoint, f"judge:{trouble}").chat("hello")
    assert endpoint.num_requests == requests
    assert "sk-secret-key" not in str(caught.value)


def test_an_endpoint_that_is_not_there_is_named() -> None:
    with StandIn() as gone:
        url = gone.url
    model = OpenAIChatModel("judge", api_key="k", base_url=url, max_retries=1)
    with pytest.raises(ChatError, match=r"no connection \(.*\) after 2 tries"):
        model.chat("hello")


def test_a_wait_that_is_too_long_is_not_waited_for(endpoint: StandIn) -> None:
    endpoint.retry_after = "3600"
    with pytest.raises(ChatError, match="it asks to retry after 3600 s"):
        model_at(endpoint, "judge:rate_limit").chat("hello")
    assert endpoint.num_requests == 1


def test_a_server_that_sends_slowly_is_given_up(endpoint: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    # 20 s without data stand for bytes that keep coming; the total of all tries is 1 * (20 - 19.8) s.
    monkeypatch.setattr("rm_gallery.core.models.openai_chat_model._MAX_BACKOFF_S", -19.8)
    endpoint.delay = 5
    with pytest.raises(ChatError, match=r"no complete response within 0.2 s, retries included"):
        model_at(endpoint, max_retries=0).chat("hello")


def test_a_format_is_sent_and_the_answer_checked(endpoint: StandIn) -> None:
    response = model_at(endpoint).chat("judge", response_format=Judgement)
    assert response.parsed == Judgement(reason="it fits", score=4)
    assert endpoint.requests[0]["response_format"]["json_schema"]["schema"] == Judgement.model_json_schema()


def test_an_endpoint_without_formats_is_told_the_schema_and_asked_so_from_then_on(endpoint: StandIn) -> None:
    model = model_at(endpoint, "judge:no_format")
    for _ in range(2):
        assert model.chat("judge", response_format=Judgement).parsed == Judgement(reason="it fits", score=4)
    assert ["response_format" in sent for sent in endpoint.requests] == [True, False, False]
    assert "JSON schema" in endpoint.requests[1]["messages"][0]["content"]


def test_an_unreadable_answer_keeps_its_text(endpoint: StandIn) -> None:
    response = model_at(endpoint, "judge:hopeless").chat("judge", response_format=Judgement)
    assert response.parsed is None and "no JSON" in response.metadata["parse_error"]
    assert response.content == "I would say it is quite good."
    cut = model_at(endpoint, "judge:truncated").chat("judge", response_format=Judgement)
    assert cut.parsed is None and cut.metadata["parse_error"].endswith("cut off at max_tokens")


def test_an_option_that_the_package_does_not_know_is_said(endpoint: StandIn) -> None:
    with pytest.raises(UserError, match=r"top_k.*go into extra_body"):
        model_at(endpoint, top_k=5).chat("hello")
    model_at(endpoint, extra_body={"top_k": 5}).chat("hello")
    assert endpoint.requests[-1]["top_k"] == 5


@pytest.mark.parametrize("messages", ["", [], [{"content": "x"}], ["x"], None])
def test_a_conversation_without_turns_is_refused(messages: Any, endpoint: StandIn) -> None:
    if messages == "":
        assert model_at(endpoint).chat(messages).content, "empty text is a turn"
        return
    with pytest.raises(UserError, match=r"turns|role"):
        model_at(endpoint).chat(messages)


def test_one_model_serves_many_tasks_and_several_event_loops(endpoint: StandIn) -> None:
    model = model_at(endpoint)
    endpoint.delay = 0.1

    async def ask_many() -> int:
        return len(await asyncio.gather(*(model.achat(str(number)) for number in range(20))))

    async def inside() -> str:
        return model.chat("from a running loop").content

    assert asyncio.run(ask_many()) == asyncio.run(ask_many()) == 20
    assert asyncio.run(inside())
    assert endpoint.most_at_once > 1
    gc.collect()  # a connection that was left open would warn here, and a warning fails the test
