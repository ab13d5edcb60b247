"""Grading through an API that fails now and then: throughput, memory, and what a kill costs.

    python -m benchmarks.grading [--samples 20000] [--concurrency 32] [--seed 0] [--output FILE.json]

A stand-in on 127.0.0.1, in a process of its own, answers 5% of requests with 429 and lets 1% hang; RelevanceGrader
asks it through OpenAIChatModel and the openai package, one process per measurement:
1. a quarter of the samples and all of them: every one graded or reported, samples a second, peak memory;
2. a run that is killed at a random moment and resumed: how many samples are answered a second time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHARE_429, SHARE_HANG = 0.05, 0.01
TIMEOUT = 2.0  # seconds that the client waits for an answer
QUERY = "Question number {}: what are the benefits of regular exercise?"
NUMBER = re.compile(rb"Question number (\d+):")


class StandIn:
    """Chat completions, and on GET what was asked so far."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kinds: Counter[str] = Counter()
        self.answered: Counter[int] = Counter()

    async def serve(self) -> None:
        """Until the process is ended; prints the port."""
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = re.search(rb"content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                writer.write(self.stats() if head.startswith(b"get") else await self.answer(body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def answer(self, body: bytes) -> bytes:
        chance = self.random.random()
        kind = "429" if chance < SHARE_429 else "hang" if chance < SHARE_429 + SHARE_HANG else "answer"
        self.kinds[kind] += 1
        if kind == "429":
            return http("429 Too Many Requests", {"error": {"message": "slow down"}}, "Retry-After: 0.2\r\n")
        await asyncio.sleep(30 * TIMEOUT if kind == "hang" else 0.005)
        found = NUMBER.search(body)
        number = int(found[1]) if found else -1
        if kind == "answer":
            self.answered[number] += 1
        content = json.dumps({"reason": "it deals with the question", "score": 1 + number % 5})
        message = {"role": "assistant", "content": content}
        completion = {
            "id": "c", "object": "chat.completion", "created": 0, "model": "judge",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }  # fmt: skip
        return http("200 OK", completion)

    def stats(self) -> bytes:
        twice = sum(times > 1 for times in self.answered.values())
        return http("200 OK", {**self.kinds, "samples_answered": len(self.answered), "answered_twice": twice})


def http(status: str, content: Any, headers: str = "") -> bytes:
    body = json.dumps(content).encode()
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


def grade(url: str, num_samples: int, concurrency: int, output_path: str | None) -> None:
    """One measurement, printed as JSON: the child process."""
    from rm_gallery.core.graders.base_grader import GraderScore
    from rm_gallery.core.graders.common import RelevanceGrader
    from rm_gallery.core.models import OpenAIChatModel
    from rm_gallery.core.runner import GradingRunner

    def dataset() -> Iterator[dict[str, str]]:
        for number in range(num_samples):
            yield {"query": QUERY.format(number), "response": f"Answer {number}: it improves health and mood. " * 4}

    model = OpenAIChatModel("judge", base_url=url, api_key="none", timeout=TIMEOUT)
    runner = GradingRunner({"relevance": RelevanceGrader(model=model)}, concurrency, output_path=output_path)
    before, start = peak_mib(), time.perf_counter()
    results = runner.run(dataset())["relevance"]
    seconds = time.perf_counter() - start
    right = sum(isinstance(r, GraderScore) and r.score == 1 + n % 5 for n, r in enumerate(results))
    report = {
        "samples": len(results), "right": right, "errors": sum(not isinstance(r, GraderScore) for r in results),
        "seconds": round(seconds, 1), "samples_per_second": round(len(results) / seconds, 1),
        "peak_mib": round(peak_mib(), 1), "peak_mib_before": round(before, 1),
    }  # fmt: skip
    print(json.dumps(report))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def stand_in(seed: int) -> Iterator[str]:
    """Its address; ends it afterwards."""
    command = [sys.executable, __file__, "--serve", "--seed", str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.terminate()


def stats_of(url: str) -> dict[str, int]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return dict(json.load(answer))


def client(url: str, num_samples: int, concurrency: int, output: Path | None = None) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.grading", "--client", url, "--samples", str(num_samples)]
    return [*command, "--concurrency", str(concurrency), *(["--results", str(output)] if output else [])]


def measure(num_samples: int, concurrency: int, seed: int) -> dict[str, Any]:
    with stand_in(seed) as url:
        done = subprocess.run(client(url, num_samples, concurrency), check=True, stdout=subprocess.PIPE, text=True)
        return {**json.loads(done.stdout), "requests": stats_of(url)}


def kill_and_resume(num_samples: int, concurrency: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill once a random number of samples is answered, then resume."""
    killed_at = random.Random(seed).randrange(num_samples // 10, num_samples * 9 // 10)
    results = folder / "results.jsonl"
    with stand_in(seed) as url:
        with subprocess.Popen(client(url, num_samples, concurrency, results), stdout=subprocess.DEVNULL) as process:
            while stats_of(url)["samples_answered"] < killed_at and process.poll() is None:
                time.sleep(0.02)
            process.kill()
        answered, saved = stats_of(url)["samples_answered"], results.read_bytes().count(b"\n")
        command = client(url, num_samples, concurrency, results)
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return {
            "answered_before_kill": answered,
            "saved_before_kill": saved,
            "answered_twice": stats_of(url)["answered_twice"],
            "in_flight_at_most": concurrency,
            **json.loads(done.stdout),
            "requests": stats_of(url),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(StandIn(options.seed).serve())
        return
    if options.client:
        grade(options.client, options.samples, options.concurrency, options.results)
        return
    report: dict[str, Any] = {"machine": platform.platform(), "python": platform.python_version()}
    for num_samples in (options.samples // 4, options.samples):
        report[f"{num_samples} samples"] = measure(num_samples, options.concurrency, options.seed)
        print(f"{num_samples} samples: {report[f'{num_samples} samples']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report["kill"] = kill_and_resume(options.samples, options.concurrency, options.seed, Path(folder))
        print(f"killed and resumed: {report['kill']}")
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
