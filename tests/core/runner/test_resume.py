"""A run that is killed at any moment asks again, when it is resumed, for what was in flight and nothing else."""

from __future__ import annotations

import contextlib
import json
import random
import socketserver
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.runner import killed_run
from tests.structure.tree import ROOT

pytestmark = pytest.mark.slow

NUM_SAMPLES, MAX_CONCURRENCY = 400, 8


class AskedServer(socketserver.ThreadingTCPServer):
    """Answers a number with itself, and knows how often it was asked for each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: Counter[int] = Counter()
        self.enough = threading.Event()
        self.enough_at = NUM_SAMPLES
        self.lock = threading.Lock()

    def note(self, number: int) -> None:
        with self.lock:
            self.asked[number] += 1
            if self.asked.total() >= self.enough_at:
                self.enough.set()


class Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, AskedServer)
        if not (line := self.rfile.readline()):
            return  # killed before it asked
        self.server.note(int(line))
        with contextlib.suppress(ConnectionError):  # the run was killed meanwhile
            self.wfile.write(line)


@pytest.fixture
def server() -> Iterator[AskedServer]:
    with AskedServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_asks_again_only_for_what_was_in_flight(server: AskedServer, tmp_path: Path, seed: int) -> None:
    path = tmp_path / "results.jsonl"
    server.enough_at = random.Random(seed).randrange(20, NUM_SAMPLES - 20)
    arguments = [str(server.server_address[1]), str(path), str(NUM_SAMPLES), str(MAX_CONCURRENCY)]
    with subprocess.Popen([sys.executable, "-m", "tests.core.runner.killed_run", *arguments], cwd=ROOT) as process:
        assert server.enough.wait(60)
        process.kill()
    saved = {json.loads(line)["index"] for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")}
    assert server.enough_at - MAX_CONCURRENCY <= len(saved) < NUM_SAMPLES

    results = killed_run.run(server.server_address[1], str(path), NUM_SAMPLES, MAX_CONCURRENCY)["asking"]
    assert [result.score for result in results] == list(range(NUM_SAMPLES))
    again = {number for number, times in server.asked.items() if times > 1}
    assert len(again) <= MAX_CONCURRENCY and not again & saved
    assert server.asked.total() == NUM_SAMPLES + len(again)
