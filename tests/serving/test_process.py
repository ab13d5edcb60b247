"""A server with a socket: our own client over every protocol, signals, and connections that end early."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from rm_gallery import RemoteScorer, RewardScorer
from rm_gallery.scoring.remote_protocols import PROTOCOLS
from rm_gallery.serving.app import make_app
from rm_gallery.serving.command import load_models, open_socket
from rm_gallery.serving.limits import Limits

CHATS = [
    [{"role": "user", "content": "How do I boil an egg?"}, {"role": "assistant", "content": answer}]
    for answer in ("In water.", "No.", "Ten minutes. " * 5, "With <|im_start|> it.")
]


@contextmanager
def server(folder: Path, limits: Limits | None = None, keys: tuple[str, ...] = ()) -> Iterator[str]:
    """A server in a thread of this process; the URL."""
    import uvicorn

    limits = limits or Limits()
    with open_socket("127.0.0.1", 0) as listener:
        listener.listen()
        app = make_app(load_models({"rm": [str(folder)]}, limits, device="cpu"), limits, keys)
        running = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(chat_folder: Path) -> Iterator[str]:
    with server(chat_folder) as found:
        yield found


@pytest.fixture(scope="module")
def rewards(chat_folder: Path) -> list[float]:
    with RewardScorer.from_folder(chat_folder, device="cpu") as scorer:
        return scorer.score_messages(CHATS)


def test_answers_are_not_held_back_by_the_socket() -> None:
    """Nagle's algorithm is off on accepted connections: it holds the second write of an answer for up to 40 ms."""

    async def flags() -> list[int]:
        found: list[int] = []

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with open_socket("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(accept, sock=listener):
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                await reader.read()
                writer.close()
        return found

    assert asyncio.run(flags()) == [1]


@pytest.mark.slow
def test_remote_scorer_over_every_protocol(url: str, chat_folder: Path, rewards: list[float]) -> None:
    with RemoteScorer(url) as scorer:
        assert (scorer.protocol, scorer.model) == ("vllm", "rm")
        assert scorer.score_messages(CHATS) == pytest.approx(rewards, abs=1e-4)
    for protocol in PROTOCOLS:
        count = 3 if protocol == "openrlhf" else 4  # no text forges what the last one has as plain text
        with RemoteScorer(url, protocol, tokenizer=str(chat_folder)) as scorer:
            assert scorer.score_messages(CHATS[:count]) == pytest.approx(rewards[:count], abs=1e-4)


def test_snippets_of_the_page(url: str, rewards: list[float]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(snippet.replace("http://127.0.0.1:8000", url), names)
    assert len(names["rewards"]) == 2
    assert names["best"] == names["answers"][names["rewards"].index(max(names["rewards"]))]
    [body] = re.findall(r"-d '(\{.*?\})'", page, re.DOTALL)
    found = httpx.post(f"{url}/classify", content=body, headers={"Content-Type": "application/json"}).json()
    assert found["data"][0]["probs"] == pytest.approx(rewards[:1], abs=1e-4)


@pytest.mark.slow
def test_a_long_body_is_refused_after_it_was_sent(url: str) -> None:
    """The connection stays in order for clients that read the answer only after the whole body is sent."""
    with httpx.Client(base_url=url, timeout=60) as client:
        answer = client.post("/classify", content=b'{"input": "' + b"a" * (50 << 20) + b'"}')
        assert answer.status_code == 413
        assert "--max-body-mb" in answer.json()["error"]["message"]
        chunks = (b"a" * (1 << 20) for _ in range(20))  # without a length
        assert client.post("/classify", content=chunks).status_code == 413
        assert client.post("/classify", json={"messages": CHATS[0]}).status_code == 200


@pytest.mark.slow
def test_clients_that_leave_and_clients_that_read_slowly(url: str) -> None:
    host, port = re.findall(r"//(.*):(\d+)", url)[0]
    body = b'{"input": ["' + b'", "'.join([b"a" * 3000] * 200) + b'"]}'
    head = (
        f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    for sent in (head.encode()[:30], head.encode() + body[:100], head.encode() + body):
        with socket.create_connection((host, int(port))) as left:
            left.sendall(sent)
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(head.encode() + body)
        assert httpx.post(f"{url}/classify", json={"messages": CHATS[0]}, timeout=60).status_code == 200
        read = b""
        while len(read) < 100:
            read += slow.recv(10)
        assert read.startswith(b"HTTP/1.1 200")
    waiting = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if "waiting_texts{" in line]
    deadline = time.monotonic() + 60
    while float(waiting[0].split()[-1]) and time.monotonic() < deadline:
        time.sleep(0.05)
        waiting = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if "waiting_texts{" in line]
    assert float(waiting[0].split()[-1]) == 0


@pytest.mark.slow
def test_the_command_finishes_accepted_requests_at_sigterm(
    chat_folder: Path, tmp_path: Path, rewards: list[float]
) -> None:
    (tmp_path / "keys").write_text("key-of-the-test\n")
    command = [sys.executable, "-m", "rm_gallery.cli", "serve", f"rm={chat_folder}", "--port", "0", "--device", "cpu"]
    command += ["--api-key-file", str(tmp_path / "keys")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("serving rm at http://127.0.0.1:"), line + process.stderr.read()
        url = line.split()[-1]
        while _status(f"{url}/ready") != 200:
            time.sleep(0.05)
        assert httpx.post(f"{url}/classify", json={}).status_code == 401
        found: list[Any] = []
        headers = {"Authorization": "Bearer key-of-the-test"}
        body = {"messages": CHATS * 20}

        def ask() -> None:
            found.append(httpx.post(f"{url}/classify", json=body, headers=headers, timeout=120))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while "open_requests 4.0" not in httpx.get(f"{url}/metrics", headers=headers).text and len(found) < 4:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(60) == 0
        said, log = process.communicate()
        assert "stopped" in said
        assert "boil" not in log and "key-of" not in log
    assert len(found) == 4
    for answer in found:
        assert [row["probs"][0] for row in answer.json()["data"]] == pytest.approx(rewards * 20, abs=1e-4)


def _status(url: str) -> int:
    try:
        return httpx.get(url).status_code
    except httpx.TransportError:
        return 0
