"""What a server refuses: an answer in words with a status of 4xx, and the next request works."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from rm_gallery.errors import UserError
from rm_gallery.serving.app import make_app
from rm_gallery.serving.command import check_address, check_extra, name_served, open_socket, read_keys
from rm_gallery.serving.guard import Guard
from rm_gallery.serving.limits import Limits
from rm_gallery.serving.served import Models
from tests.serving.conftest import Client

GOOD = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}
SECRET = "a text that no log may have"
DEEP: Any = json.loads("[" * 400 + "]" * 400)

CASES: list[tuple[str, Any, int, str]] = [
    ("/classify", b"", 400, "JSON"),
    ("/classify", b"{", 400, "not JSON"),
    ("/classify", b'{"input": "\xff"}', 400, "not JSON"),
    ("/classify", b"[" * 100_000, 400, "nested too deeply"),
    ("/classify", b'"text"', 400, ""),
    ("/classify", b'{"input": "\\ud800"}', 400, "surrogate"),
    ("/classify", b'{"input": "a", "model": "\\ud800"}', 404, "no model"),
    ("/classify", b'{"input": [' + b"9" * 5000 + b"]}", 400, "not JSON"),
    ("/classify", {}, 400, "either input or messages"),
    ("/classify", {"input": "a", **GOOD}, 400, "either input or messages"),
    ("/classify", {"input": 1}, 400, "input: must be a text"),
    ("/classify", {"input": [True]}, 400, "not a boolean"),
    ("/classify", {"input": ["a", 1]}, 400, "input[1]: must be a text, not a number"),
    ("/classify", {"input": [1, "a"]}, 400, "input[1]: must be a token id"),
    ("/classify", {"input": [-1]}, 400, "the model has 0 to 263"),
    ("/classify", {"input": [1000]}, 400, "the model has 0 to 263"),
    ("/classify", {"input": [[]]}, 400, "no token"),
    ("/classify", {"input": ["a"] * 101}, 400, "more than the 100 of --max-texts"),
    ("/classify", {"input": "a" * 5000}, 400, "more than the 4096 of --max-length"),
    ("/classify", {"input": "a" * 140_000}, 400, "characters, more than 131072"),
    ("/classify", b'{"input": "' + b"a" * 300_000 + b'"}', 413, "more than the 262144 of --max-body-mb"),
    ("/classify", {"messages": "Why?"}, 400, "must be a list of messages"),
    ("/classify", {"messages": [{"content": "a"}]}, 400, "must be a list of messages"),
    ("/classify", {"messages": [{"role": "user", "content": DEEP}]}, 400, "messages[0].content: must be a text"),
    ("/classify", {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content: must be"),
    ("/classify", {**GOOD, "responses": "a"}, 400, "must be a list"),
    ("/classify", {**GOOD, "tools": "x"}, 400, "tools"),
    ("/classify", {**GOOD, "chat_template": "{{ 1 }}"}, 400, "rendered as in training"),
    ("/classify", {**GOOD, "add_generation_prompt": True}, 400, "rendered as in training"),
    ("/classify", {**GOOD, "model": "other"}, 404, "the server has rm"),
    ("/classify", {**GOOD, "use_activation": "perhaps"}, 400, "use_activation"),
    ("/classify", {**GOOD, "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
    ("/pooling", {**GOOD, "task": "token_classify"}, 400, "one reward"),
    ("/v1/embeddings", {**GOOD, "dimensions": 64}, 400, "dimension 1"),
    ("/get_reward", {"query": [1]}, 400, "query[0]: must be a text"),
    ("/get_reward", {"query": [""]}, 400, "no token"),
    ("/score", {"queries": "a"}, 400, "one of documents"),
    ("/score", {"queries": 1, "documents": ["a"]}, 400, "queries: must be"),
    ("/rerank", {"query": "a", "documents": [{"title": "x"}]}, 400, "documents[0]: must be a text"),
    ("/rerank", {"query": "a", "documents": ["x"], "top_n": -1}, 400, "top_n"),
    ("/v1/chat/completions", {**GOOD, "stream": True}, 400, "stream must be false"),
    ("/v1/chat/completions", {"messages": []}, 400, "list of messages"),
    ("/nothing", {}, 404, "no such path"),
    ("/health", {}, 405, "another method"),
]  # fmt: skip


def test_a_refused_request_has_a_reason_and_the_next_one_works(
    served: Client, caplog: pytest.LogCaptureFixture
) -> None:
    for path, body, status, words in CASES:
        answer = served.post(path, body)
        assert "error" in answer.json(), (path, body, answer.text)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, status), (path, body, error)
        assert words in error["message"], (body, error)
        assert len(error["message"]) < 500
    assert served.post("/classify", GOOD).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_empty_requests_have_no_rewards(served: Client) -> None:
    assert served.post("/classify", {"input": []}).json()["data"] == []
    assert served.post("/get_reward", {"query": []}).json()["rewards"] == []
    assert served.post("/rerank", {"query": "a", "documents": []}).json()["results"] == []


def test_keys(served: Client, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nkey-of-one-team\n\nkey-of-another\n")
    keys = read_keys([], str(file))
    app = make_app(Models([]), keys=keys)
    assert Client(app).get("/v1/models").status_code == 401
    assert Client(app).get("/openapi.json").status_code == 401
    assert Client(app).get("/metrics").status_code == 401
    assert Client(app).get("/health").status_code == 200
    for header, status in (
        ("Bearer key-of-one-team", 200), ("Bearer key-of-another", 200), ("bearer key-of-another", 200),
        ("Bearer key-of-anothe", 401), ("Bearer ", 401), ("Basic key-of-another", 401), ("Bearer \u00e9", 401),
    ):  # fmt: skip
        answer = Client(app).get("/v1/models", headers={"Authorization": header.encode()})
        assert answer.status_code == status, header
        assert "key-of" not in answer.text


def test_options_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_address("127.0.0.1", [])
    check_address("::1", [])
    check_address("0.0.0.0", ["key"])
    for host in ("0.0.0.0", "192.168.0.1", "::", "example.org"):
        with pytest.raises(UserError, match="--api-key-file"):
            check_address(host, [])
    (tmp_path / "empty").write_text("# nothing\n")
    for given, file in ((["a b"], None), ([""], None), ([], str(tmp_path / "empty")), ([], str(tmp_path / "none"))):
        with pytest.raises(UserError, match="--api-key"):
            read_keys(given, file)
    assert name_served(["a=x", "b", "y/c+y/d"]) == {"a": ["x"], "b": ["b"], "c+d": ["y/c", "y/d"]}
    with pytest.raises(UserError, match="another model has the name x"):
        name_served(["a/x", "b/x"])
    with open_socket("127.0.0.1", 0) as listener:
        listener.listen()
        with pytest.raises(UserError, match="another port"):
            open_socket("127.0.0.1", listener.getsockname()[1])
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"pip install 'rm-gallery\[serve\]'"):
        patch.setattr("importlib.util.find_spec", lambda name: None)
        check_extra()
    with pytest.raises(UserError, match="never fits"):
        Limits(max_texts=10, max_waiting=5).check()


def test_an_error_of_ours_is_logged_without_its_message(
    served: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError(SECRET)

    monkeypatch.setattr("rm_gallery.serving.served.Member._prepare", fail)
    answer = served.post("/classify", {"input": SECRET})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, 500)
    assert "KeyError" in caplog.text and "served.py" in caplog.text
    assert SECRET not in caplog.text + answer.text


def test_a_client_that_leaves_is_not_waited_for(served: Client) -> None:
    """The application is cancelled, and nothing is sent."""
    started, cancelled, sent = asyncio.Event(), [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    guard: Guard = served.app
    slow = Guard(app, keys=guard.keys, limits=guard.limits, metrics=guard.metrics, paths=set())
    messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await started.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(slow({"type": "http", "path": "/classify", "headers": [], "client": ("x", 1)}, receive, send))
    assert (cancelled, sent) == ([True], [])


def test_a_body_that_does_not_arrive(served: Client) -> None:
    guard: Guard = served.app
    limits = Limits(body_timeout=0.01)
    app = Guard(guard.app, keys=guard.keys, limits=limits, metrics=guard.metrics, paths=set())
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({"type": "http", "path": "/classify", "headers": [], "client": ("x", 1)}, receive, send))
    assert sent[0]["status"] == 408
