"""A small OpenAI-compatible endpoint on 127.0.0.1 that misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

BEHAVIOURS = (
    "ok", "malformed", "hopeless", "out_of_range", "rate_limit", "server_error", "hang", "empty", "no_text", "refusal",
    "truncated", "html", "unauthorized", "no_quota", "no_format", "too_long",
)  # fmt: skip


class StandIn:
    """Answers chat completions; use it as a context manager.

    How a request is treated is said by the model's name (`any:malformed`), else by `choose(body)`, else by the next of
    `script`, else it is `ok`. `no_format` refuses response_format and answers without it.
    """

    def __init__(
        self,
        script: Iterable[str] = (),
        *,
        choose: Callable[[dict[str, Any]], str] | None = None,
        answer: Callable[[dict[str, Any]], str] | None = None,
        retry_after: str = "0.05",
        delay: float = 0.0,
        keep_requests: bool = True,
    ) -> None:
        """answer: the text of an `ok` answer, by default a judgement that fits the request.

        retry_after: the header of a 429, in seconds. delay: seconds before each answer.
        keep_requests: whether bodies are kept in `requests`; turn it off for thousands of them.
        """
        self.script, self.choose, self.answer = deque(script), choose, answer
        self.retry_after, self.delay, self.keep_requests = retry_after, delay, keep_requests
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.most_at_once = 0
        self._at_once = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="stand-in")
        self._ready = threading.Event()
        self.port = 0

    @property
    def url(self) -> str:
        """For `base_url`."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def num_requests(self) -> int:
        return self.counts.total()

    def __enter__(self) -> StandIn:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self._connections: set[asyncio.Task[Any]] = set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")[1:]
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines) if k}
                body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))))
                writer.write(await self._respond(body, headers))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _respond(self, body: dict[str, Any], headers: dict[str, str]) -> bytes:
        behaviour = self._behaviour(body)
        assert behaviour in BEHAVIOURS, behaviour
        self.counts[behaviour] += 1
        if self.keep_requests:
            self.requests.append(body)
            self.headers.append(headers)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(3600 if behaviour == "hang" else self.delay)
            return self._answer(behaviour, body)
        finally:
            self._at_once -= 1

    def _behaviour(self, body: dict[str, Any]) -> str:
        name = body["model"].rpartition(":")[2]
        if name in BEHAVIOURS:
            return name
        if self.choose is not None:
            return self.choose(body)
        return self.script.popleft() if self.script else "ok"

    def _answer(self, behaviour: str, body: dict[str, Any]) -> bytes:
        if behaviour == "html":
            return _http(200, b"<html>gateway</html>", "text/html")
        if behaviour == "rate_limit":
            extra = f"Retry-After: {self.retry_after}\r\n"
            return _error(429, "too many requests", extra=extra)
        if behaviour == "no_format" and "response_format" in body:
            return _error(400, "response_format is not supported here")
        errors = {
            "server_error": (500, "the server stumbled", None),
            "unauthorized": (401, "Incorrect API key provided: sk-secret-key", None),
            "no_quota": (429, "you exceeded your quota", "insufficient_quota"),
            "too_long": (400, "the prompt is longer than the context", None),
        }
        if behaviour in errors:
            return _error(*errors[behaviour])
        message: dict[str, Any] = {"role": "assistant", "content": self._text(behaviour, body)}
        if behaviour == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I would rather not."}
        reason = "length" if behaviour in ("truncated", "no_text") else "stop"
        choices = [{"index": 0, "message": message, "finish_reason": reason}] if behaviour != "empty" else []
        completion = {
            "id": "c", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices,
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        }  # fmt: skip
        return _http(200, json.dumps(completion).encode())

    def _text(self, behaviour: str, body: dict[str, Any]) -> str:
        odd = {
            "malformed": "Here you are:\n```json\n{'reason': 'fits', 'score': 4,}\n```",
            "hopeless": "I would say it is quite good.",
            "out_of_range": '{"reason": "splendid", "score": 11}',
            "no_text": "",
            "truncated": '{"reason": "it fits beca',
        }
        if behaviour in odd:
            return odd[behaviour]
        if self.answer is not None:
            return self.answer(body)
        prompt = "\n".join(str(message["content"]) for message in body["messages"])
        numbers = {int(found) for found in re.findall(r"^<response_(\d+)>$", prompt, re.MULTILINE)}
        if numbers:
            return json.dumps({"reason": "later is better", "rank": sorted(numbers, reverse=True)})
        return json.dumps({"reason": "it fits", "score": 4})


def _error(status: int, message: str, code: str | None = None, *, extra: str = "") -> bytes:
    error = {"error": {"message": message, "type": "error", "code": code}}
    return _http(status, json.dumps(error).encode(), extra=extra)


def _http(status: int, body: bytes, kind: str = "application/json", *, extra: str = "") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body
