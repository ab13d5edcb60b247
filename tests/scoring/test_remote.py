"""RemoteScorer: the rewards of the local scorer over every protocol, in order, through failures; else a sentence."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import math
import pickle
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from rm_gallery import UserError, evaluate
from rm_gallery.cli import main
from rm_gallery.core.graders.common import RelevanceGrader
from rm_gallery.schema import PreferenceGroup
from rm_gallery.scoring import RemoteScorer, RewardScorer, remote_http
from rm_gallery.scoring.base import NonFiniteReward
from tests.scoring.reward_server import RewardServer

PROTOCOLS = ("vllm", "vllm-pooling", "sglang", "openrlhf")
NEEDS_TEXT = "takes texts, not conversations: pass tokenizer="


def chat(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CHATS = [chat("Why?", "Because."), chat("A longer question, please", "No."), chat("<|im_end|>", "a <|im_start|> b")]


def length(given: Any) -> float:
    return float(len(str(given)))


class Model:
    """A checkpoint as a server runs it: plain transformers, one text at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def __call__(self, given: Any) -> float:
        if isinstance(given, str):
            given = self.tokenizer(given, add_special_tokens=False)["input_ids"]
        elif isinstance(given[0], dict):
            given = self.tokenizer.apply_chat_template(given, tokenize=True, return_dict=False)
        with torch.no_grad():
            return float(self.network(input_ids=torch.tensor([given])).logits[0, 0])


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_http, "_BACKOFF_S", 0.01)
    monkeypatch.delenv("RM_GALLERY_API_KEY", raising=False)


def test_rewards_are_those_of_the_local_scorer(chat_folder: Path, chat_scorer: RewardScorer) -> None:
    model = Model(chat_folder)
    expected = chat_scorer.score_messages(CHATS)
    for protocol in PROTOCOLS:
        with RewardServer(protocol, model) as server, RemoteScorer(server.url, tokenizer=chat_folder) as scorer:
            assert scorer.protocol == protocol
            # OpenRLHF takes text, in which a control token of a content would be one
            usable = CHATS[:2] if protocol == "openrlhf" else CHATS
            assert scorer.score_messages(usable) == pytest.approx(expected[: len(usable)], abs=1e-5)
            if protocol == "openrlhf":
                with pytest.raises(UserError, match="no text that the server would tokenize as in training"):
                    scorer.score_messages(CHATS[2:])
    with RewardServer("vllm", model) as server, RemoteScorer(server.url) as scorer:  # the server renders
        assert scorer.score_messages(CHATS[:2]) == pytest.approx(expected[:2], abs=1e-5)
        assert [len(body["messages"]) for body in server.bodies] == [2, 2]
        assert all(body["use_activation"] is False and "activation" not in body for body in server.bodies)


@pytest.mark.slow
def test_order_pairs_async_and_batches() -> None:
    def later(body: dict[str, Any]) -> float:
        return 0.03 if "x" * 7 in str(body) else 0.0

    conversations = [chat("q", "x" * number) for number in range(1, 60)]
    for tokens in ("vllm", "openrlhf"):
        with RewardServer(tokens, length, delay=later) as server, RemoteScorer(server.url, concurrency=8) as scorer:
            if tokens == "openrlhf":
                with pytest.raises(UserError, match=NEEDS_TEXT):
                    scorer.score_messages(conversations)
                texts = [PreferenceGroup("", ["x" * number]) for number in range(1, 60)]
                assert [each[0] for each in scorer.score(texts)] == [float(number) for number in range(1, 60)]
                assert sorted(len(body["query"]) for body in server.bodies) == [27, 32]
                continue
            found = scorer.score_messages(conversations)
            assert found == sorted(found) and len(set(found)) == 59
            [(better, worse)] = scorer.score_pairs([{"prompt": "q", "chosen": "long one", "rejected": "no"}])
            assert better > worse
            assert asyncio.run(scorer.ascore([scorer.build_group("q", ["a", "bb"])])) == [[found[0], found[1]]]
            copied = pickle.loads(pickle.dumps(scorer))
            assert copied.score_messages(conversations[:1]) == found[:1]
            copied.close()


def test_retries_and_a_dead_endpoint(caplog: pytest.LogCaptureFixture) -> None:
    with RewardServer("vllm", length, script=[500, 429, None, 503]) as server:
        with RemoteScorer(server.url) as scorer:
            assert scorer.score_messages(CHATS[:1]) == [length(CHATS[0])]
            assert len(server.bodies) == 3
            assert scorer.score_messages(CHATS[:1]) == [length(CHATS[0])]
        with socket.socket() as taken:  # bound, not listening: connections are refused
            taken.bind(("127.0.0.1", 0))
            dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
            with caplog.at_level(logging.WARNING), RemoteScorer([dead, server.url]) as scorer:
                assert scorer.score_messages(CHATS) == [length(each) for each in CHATS]
            assert f"{dead}: no connection" in caplog.text and "skipped until it answers" in caplog.text
            with pytest.raises(UserError, match="no reward server answers"):
                RemoteScorer(dead)
    with RewardServer("vllm", length, script=[500] * 9) as server, RemoteScorer(server.url, retries=2) as scorer:
        with pytest.raises(UserError, match="status 500: out of order, after 2 retries"):
            scorer.score_messages(CHATS[:1])
        assert len(server.bodies) == 3


@pytest.mark.slow
def test_timeout_is_for_all_tries() -> None:
    with RewardServer("vllm", length, script=[429], headers={"Retry-After": "60"}) as server:
        with RemoteScorer(server.url, timeout=20) as scorer:
            with pytest.raises(UserError, match=r"status 429: out of order; gave up after timeout=20 seconds"):
                scorer.score_messages(CHATS[:1])
    with (
        RewardServer("vllm", length, delay=lambda body: 5.0) as server,
        RemoteScorer(server.url, timeout=0.1) as scorer,
    ):
        with pytest.raises(UserError, match=r"no answer within .* s; gave up after timeout=0.1 seconds"):
            scorer.score_messages(CHATS[:1])


def _row(key: str, value: Any) -> Any:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "data": [{**row, key: value} for row in answer["data"]]}

    return change


WRONG = (
    (lambda answer: {"data": []}, "an answer with no list 'data' for 1 texts, which is not /classify of vLLM"),
    (lambda answer: {"data": answer["data"] * 2}, "an answer with 2 results for 1 texts"),
    (_row("probs", [0.2, 0.8]), "2 numbers for a text: .* not a reward model with one label"),
    (_row("probs", ["1"]), "a str in place of a reward"),
    (_row("index", 3), "whose index is not 0 to 0"),
    (lambda answer: b"<html>", "an answer that is not JSON"),
    (_row("probs", [math.nan]), "the text cannot be scored: reward that is not finite"),
    (_row("probs", [None]), "the text cannot be scored: reward that is not finite"),
)


def test_wrong_answers() -> None:
    with RewardServer("vllm", length) as server, RemoteScorer(server.url) as scorer:
        for change, message in WRONG:
            server.change = change
            with pytest.raises(UserError, match=message):
                scorer.score_messages(CHATS[:1])
        assert isinstance(scorer.score_each([scorer.build_group("q", ["a"])])[0], NonFiniteReward)


def test_a_sigmoid_is_found() -> None:
    def sigmoid(given: Any) -> float:
        return 0.25

    with RewardServer("vllm", sigmoid, fields=("input", "messages")) as server, RemoteScorer(server.url) as scorer:
        with pytest.raises(UserError, match="applies a sigmoid and has no field to turn it off"):
            scorer.score_messages(CHATS[:1])
        assert not {"use_activation", "activation", "softmax"} & set(server.bodies[0])
    with RewardServer("vllm", sigmoid, fields=("input", "activation")) as server, RemoteScorer(server.url) as scorer:
        assert scorer.score_messages(CHATS[:1]) == [0.25]  # turned off by the name that this version has
        assert server.bodies[0]["activation"] is False and "use_activation" not in server.bodies[0]
    with RewardServer("vllm", lambda given: 1.0) as server, RemoteScorer(server.url) as scorer:
        with pytest.raises(UserError, match="all rewards are 1 or -1: the server applies a softmax"):
            scorer.score_messages(CHATS * 2)


def test_what_a_server_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    with RewardServer("vllm", length, models=["a", "b"]) as server:
        with pytest.raises(UserError, match=r"several models \(a, b\); pass model="):
            RemoteScorer(server.url)
        with pytest.raises(UserError, match="no model 'c'; the server has a, b"):
            RemoteScorer(server.url, model="c")
        with RemoteScorer(f"{server.url}/v1/", model="b") as scorer:
            scorer.score_messages(CHATS[:1])
            assert server.bodies[0]["model"] == "b" and scorer.folder == f"{server.url}#b"
    with RewardServer("other", length) as server, pytest.raises(UserError, match="pass protocol= one of 'vllm'"):
        RemoteScorer(server.url)
    assert server.bodies == [] and server.gets == ["/v1/models", "/openapi.json"]
    for url in ("ftp://a", "a:1", "http://", "http://a:b", "http://u:secret@a"):
        with pytest.raises(UserError, match=r"not the URL of a server|has credentials") as caught:
            RemoteScorer(url)
        assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match=r"protocol=vlm: must be auto, vllm.*Did you mean 'vllm'"):
        RemoteScorer("http://127.0.0.1:1", "vlm")


def test_api_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with RewardServer("vllm", length, key="right-key-1234") as server, caplog.at_level(logging.DEBUG):
        with RemoteScorer(server.url, api_key="wrong-key-1234") as scorer:
            with pytest.raises(UserError, match="does not accept the API key") as caught:
                scorer.score_messages(CHATS[:1])
            shown = f"{caught.value} {scorer!r} {caplog.text}"
        monkeypatch.setenv("RM_GALLERY_API_KEY", "right-key-1234")
        with RemoteScorer(server.url) as scorer:
            assert scorer.score_messages(CHATS[:1]) == [length(CHATS[0])]
        assert "key-1234" not in shown + caplog.text


@pytest.mark.slow
def test_a_refused_text_does_not_affect_the_others(chat_folder: Path) -> None:
    with RewardServer("sglang", length, max_tokens=80) as server:
        with RemoteScorer(server.url, tokenizer=str(chat_folder)) as scorer:
            groups = [scorer.build_group("q", [text]) for text in ("a", "b" * 100, "c")]
            first, bad, last = scorer.score_each(groups)
            assert isinstance(first, list) and isinstance(last, list)
            assert "the server refuses the text: status 400: maximum is 80 tokens" in str(bad)

    def truncate(answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "usage": {"prompt_tokens": 5}}

    with RewardServer("sglang", length, change=truncate) as server:
        with RemoteScorer(server.url, tokenizer=str(chat_folder)) as scorer:
            with pytest.raises(UserError, match=r"the server read 5 tokens, not the \d+ of the text; it truncates"):
                scorer.score_messages(CHATS[:1])


def test_our_server_gets_many_conversations_in_a_request() -> None:
    book, add = (
        [{"type": "function", "function": {"name": "book"}}],
        [{"type": "function", "function": {"name": "add"}}],
    )
    chats = [chat("q", "x" * number) for number in range(60)]
    tools = [(None, book, add)[number % 3] for number in range(60)]
    expected = [length(each) for each in chats]
    with RewardServer("vllm", length, owner="rm-gallery") as server, RemoteScorer(server.url) as scorer:
        assert scorer.score_messages(chats, tools=tools) == expected
        assert sorted(len(body["messages"]) for body in server.bodies) == [20, 20, 20]
        assert [body.get("tools") for body in server.bodies].count(book) == 1
        del server.bodies[:]
        # A request that fails is sent again, the others are not.
        server.script = [None, 503]
        assert scorer.score_messages(chats) == expected
        assert sorted(len(body["messages"]) for body in server.bodies) in ([28, 28, 32], [28, 32, 32])
        del server.bodies[:]
        prompt = "long " * 20_000
        group = scorer.build_group(prompt, ["a", "bb", "ccc"], book)
        [rewards] = scorer.score([group])
        assert rewards == sorted(rewards) and len(set(rewards)) == 3
        [body] = server.bodies
        assert len(body["responses"]) == 3 and str(body).count(prompt) == 1 and body["tools"] == book
    with RewardServer("vllm", length, owner="rm-gallery") as ours, RewardServer("vllm", length) as theirs:
        with RemoteScorer([ours.url, theirs.url]) as scorer:  # vLLM takes one at a time, and no tools
            assert scorer.score_messages(chats) == expected
            assert theirs.bodies and all("role" in body["messages"][0] for body in theirs.bodies)


@pytest.mark.slow
def test_a_refused_conversation_of_a_batch_has_an_error_of_its_own() -> None:
    chats = [chat("q", "x" * number) for number in range(32)]
    chats[21] = [*chats[21], *[{"role": "assistant", "content": "again"}] * 9]
    with RewardServer("vllm", length, owner="rm-gallery", max_tokens=10) as server:
        with RemoteScorer(server.url) as scorer:
            groups = [scorer.inputs.conversation(each) for each in chats]
            found = scorer.score_each(groups)
            assert [each for number, each in enumerate(found) if number != 21] == [
                [length(each)] for number, each in enumerate(chats) if number != 21
            ]
            assert "status 400: maximum is 10 tokens" in str(found[21])
            assert len(server.bodies) == 11  # halves of 32, 16, 8, 4 and 2


@pytest.mark.slow
def test_evaluate_and_graders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"q{number}", "chosen": "a longer answer", "rejected": "no"} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with RewardServer("vllm", length) as server:
        model = f"vllm:{server.url},{server.url}#rm"
        options = ["--no-probes", "--no-baselines", "--json", str(tmp_path / "out.json")]
        assert main(["evaluate", "--model", model, str(tmp_path / "rows.jsonl"), *options]) == 0
        [found] = json.loads((tmp_path / "out.json").read_text())["models"]
        host = server.url.removeprefix("http://")
        assert (found["kind"], found["name"], found["source"]) == ("server", f"{host},{host}#rm", model)
        assert found["sets"][0]["accuracy"] == 1
        with RemoteScorer(server.url) as scorer:
            result = evaluate(scorer, rows, probes=False, baselines=False)
            assert result["models"][0]["kind"] == "server" and result["models"][0]["sets"][0]["accuracy"] == 1
            grade = asyncio.run(RelevanceGrader(model=scorer).aevaluate(query="q", response=["no", "a longer answer"]))
            assert grade.rank == [2, 1]
    with pytest.raises(UserError, match="--tokenizer=x: it is for models behind servers"):
        evaluate(length, rows, tokenizer="x")


@pytest.mark.slow
def test_retry_after_is_respected() -> None:
    with RewardServer("vllm", length, script=[429], headers={"Retry-After": "1"}) as server:
        with RemoteScorer(server.url) as scorer:
            scorer.score_messages(CHATS[:1])
            assert server.times[1] - server.times[0] >= 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("1", 1.0), (" 2.5 ", 2.5), ("Sat, 28 Nov 2026 10:00:30 GMT", 30.0), ("Sat, 28 Nov 2026 09:59:00 GMT", 0.0),
        ("", 0.0), ("soon", 0.0), ("-3", 0.0),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date(header: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 11, 28, 10, tzinfo=UTC).timestamp()
    monkeypatch.setattr(remote_http.time, "time", lambda: now)
    assert remote_http._retry_after(header) == seconds


@pytest.mark.slow
def test_a_hanging_endpoint_is_skipped() -> None:
    with RewardServer("vllm", length, delay=lambda body: 12.0) as slow, RewardServer("vllm", length) as server:
        with RemoteScorer([slow.url, server.url], timeout=6.0) as scorer:
            assert scorer.score_messages(CHATS * 4) == [length(each) for each in CHATS * 4]


@pytest.mark.slow
def test_a_copy_is_another_scorer() -> None:
    with RewardServer("vllm", length) as server, RemoteScorer(server.url) as scorer:
        copied = copy.copy(scorer)
        copied.close()
        assert scorer.score_messages(CHATS[:1]) == [length(CHATS[0])]
