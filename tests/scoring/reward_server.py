"""A small reward server on 127.0.0.1 with the shapes of vLLM, SGLang and OpenRLHF, which fails on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Score = Callable[[Any], float]
"""The reward of a text, of token ids, or of a conversation."""


class RewardServer:
    """Use it as a context manager. It speaks one protocol; `script` has the status of the next POSTs, None for 200."""

    def __init__(
        self,
        protocol: str,
        score: Score,
        *,
        script: Iterable[int | None] = (),
        headers: dict[str, str] | None = None,
        key: str | None = None,
        models: Iterable[str] = ("rm",),
        owner: str = "",
        fields: Iterable[str] = ("input", "messages", "use_activation"),
        change: Callable[[dict[str, Any]], Any] = lambda answer: answer,
        delay: Callable[[dict[str, Any]], float] = lambda body: 0.0,
        max_tokens: int = 10**9,
    ) -> None:
        """headers: of answers that fail. fields: of /classify in the OpenAPI description. change: of an answer."""
        self.protocol, self.score, self.script = protocol, score, list(script)
        self.headers, self.key, self.models, self.fields = headers or {}, key, list(models), list(fields)
        self.owner = owner or {"vllm": "vllm", "vllm-pooling": "vllm", "sglang": "sglang"}.get(protocol, "")
        self.change, self.delay, self.max_tokens = change, delay, max_tokens
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.gets: list[str] = []
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                server.gets.append(self.path)
                self._answer(*server._describe(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(*server._post(self.path, body, self.headers.get("Authorization")))

            def _answer(self, status: int, answer: Any) -> None:
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                for name, value in server.headers.items() if status != 200 else ():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> RewardServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _describe(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models" and self.owner:
            return 200, {"object": "list", "data": [{"id": each, "owned_by": self.owner} for each in self.models]}
        if path == "/openapi.json" and self.protocol != "sglang":
            reference = {"anyOf": [{"$ref": "#/components/schemas/Request"}]}
            operation = {"post": {"requestBody": {"content": {"application/json": {"schema": reference}}}}}
            name = {"vllm": "/classify", "vllm-pooling": "/pooling", "openrlhf": "/get_reward"}.get(self.protocol, "/x")
            schema = {"properties": {field: {} for field in self.fields}}
            return 200, {"paths": {name: operation}, "components": {"schemas": {"Request": schema}}}
        return 404, {"detail": "Not Found"}

    def _conversations(self, body: dict[str, Any]) -> list[Any]:
        """One; of our server also many, or several responses to a prompt."""
        if self.owner == "rm-gallery" and "responses" in body:
            return [[*body["messages"], *each] for each in body["responses"]]
        return body["messages"] if self.owner == "rm-gallery" else [body["messages"]]

    def _post(self, path: str, body: dict[str, Any], authorization: str | None) -> tuple[int, Any]:
        with self._lock:
            self.bodies.append(body)
            self.times.append(time.monotonic())
            status = self.script.pop(0) if self.script else None
        if self.key is not None and authorization != f"Bearer {self.key}":
            return 401, {"error": {"message": f"wrong key {authorization}"}}
        if status is not None:
            return status, {"error": {"message": "out of order"}}
        time.sleep(self.delay(body))
        if path == "/get_reward":
            rewards = [self.score(each) for each in body["query"]]
            return 200, self.change({"rewards": rewards, "scores": rewards, "extra_logs": {}})
        inputs = self._conversations(body) if "messages" in body else body["input"]
        if max(map(len, inputs)) > self.max_tokens:
            return 400, {"object": "error", "message": f"maximum is {self.max_tokens} tokens", "code": 400}
        read = sum(len(each) for each in inputs if isinstance(each, list))
        key = {"/classify": "probs", "/pooling": "data", "/v1/embeddings": "embedding"}[path]
        rows = [{"index": index, key: [self.score(each)]} for index, each in enumerate(inputs)]
        return 200, self.change({"object": "list", "data": rows, "usage": {"prompt_tokens": read}})
