"""Models that are served in this process, behind an HTTP client without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.scoring.models import make_checkpoint


class Client:
    """Requests to an ASGI application, each in an event loop of its own or many in one."""

    def __init__(self, app: Any, headers: dict[str, str] | None = None) -> None:
        self.app, self.headers = app, headers or {}

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        [found] = self.posts([(path, body)], **options)
        return found

    def posts(self, requests: list[tuple[str, Any]], **options: Any) -> list[httpx.Response]:
        """Several at the same time. A body of bytes is sent as it is."""

        async def send(client: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(path, content=content, **options)

        async def run(client: httpx.AsyncClient) -> list[httpx.Response]:
            return list(await asyncio.gather(*(send(client, *each) for each in requests)))

        return self.run(run)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.run(lambda client: client.get(path, **options))

    def run(self, act: Callable[[httpx.AsyncClient], Any]) -> Any:
        async def go() -> Any:
            transport = httpx.ASGITransport(app=self.app)
            headers = {"Content-Type": "application/json", **self.headers}
            async with httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers) as client:
                return await act(client)

        return asyncio.run(go())


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a decoder trained on chats."""
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("chat"), style="chat", seed=1)[0]


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, with other rewards."""
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("other"), style="chat", seed=2)[0]


@pytest.fixture(scope="session")
def served(chat_folder: Path) -> Iterator[Client]:
    """One model, rm."""
    from rm_gallery.serving.app import make_app  # needs the extra serve, without which modules are skipped
    from rm_gallery.serving.command import load_models
    from rm_gallery.serving.limits import Limits

    models = load_models({"rm": [str(chat_folder)]}, Limits(max_texts=100), device="cpu")
    yield Client(make_app(models, Limits(max_texts=100, max_body_mb=0.25)))
    models.close()
