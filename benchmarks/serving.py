"""Load on loopback: `rm-gallery serve` against a plain FastAPI server around the library's pipeline.

    python -m benchmarks.serving [--model quickstart/run] [--hidden 384 --layers 12] [--clients 1 8 64] [--seconds 8]
                                 [--prompt-words 120] [--workloads pairs best-of-16 stream] [--cache-mb 256]
                                 [--soak SECONDS] [--json FILE]

Each client sends its next request when it has the answer to the last one. `pairs` has two responses to a prompt in a
request, `best-of-16` has sixteen, `stream` has one: sixteen requests for a prompt, one after another, against our
server with and without a prefix cache. Prompts and responses are made of the quick start's; prompts differ. The plain
server renders chats and calls the pipeline with all texts of a request in one batch; requests come one at a time, since
a pipeline is not thread-safe. Servers run one after another, with the same number of threads. Rewards of all are
compared. --hidden, --layers: random weights of this size, with the tokenizer of the model. --soak: seconds of full load
on our server, whose memory is printed after each fifth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import BaseModel

SIZES = {"pairs": 2, "best-of-16": 16, "stream": 1}


class Body(BaseModel):
    messages: list[dict[str, str]]
    responses: list[str]


def plain_app(folder: str) -> Any:
    """The server that a few lines make."""
    import torch
    from fastapi import FastAPI
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder)
    classify = pipeline("text-classification", model=folder, tokenizer=tokenizer, device="cpu", dtype=torch.float32)

    app = FastAPI()

    @app.post("/classify")
    async def rewards(body: Body) -> dict[str, Any]:
        chats = [[*body.messages, {"role": "assistant", "content": each}] for each in body.responses]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        found = classify(texts, function_to_apply="none", batch_size=len(texts), padding=True)
        return {"data": [{"probs": [each["score"]]} for each in found]}

    return app


def make_model(source: str, folder: Path, hidden: int, layers: int) -> str:
    """A folder with random weights of this size."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    config = AutoConfig.from_pretrained(source)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = hidden, 3 * hidden, layers
    config.num_attention_heads = config.num_key_value_heads = hidden // 64
    config.head_dim, config.layer_types = 64, ["full_attention"] * layers
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def serve_plain(folder: str) -> None:
    import uvicorn

    from rm_gallery.serving.command import open_socket

    with open_socket("127.0.0.1", 0) as listener:
        app = plain_app(folder)
        listener.listen(2048)
        print(f"serving at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


@contextmanager
def running(command: list[str]) -> Iterator[tuple[str, int]]:
    """The URL of a server that a command starts, and its process id."""
    with subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1], process.pid
        finally:
            process.terminate()
            process.communicate()


class Requests:
    """Bodies of a workload."""

    def __init__(self, workload: str, prompt_words: int, seed: int) -> None:
        import pyarrow.parquet as pq

        rows = pq.read_table("quickstart/data/val.parquet").to_pylist()
        self._prompts = [row["prompt"][0]["content"] for row in rows]
        self._answers = [row[side] for row in rows for side in ("chosen", "rejected")]
        self.workload, self._words, self._draw = workload, prompt_words, random.Random(seed)
        self._numbers = count(seed * 10**6)
        self._prompt, self._left = "", 0

    def next(self) -> dict[str, Any]:
        if not self._left:
            self._left = 16 if self.workload == "stream" else 1
            words: list[str] = [f"Number {next(self._numbers)}."]  # no two prompts begin alike
            while len(words) < self._words:
                words += self._draw.choice(self._prompts).split()
            self._prompt = " ".join(words)
        self._left -= 1
        answers = [" ".join(self._draw.sample(self._answers, 4)) for _ in range(SIZES[self.workload])]
        return {"messages": [{"role": "user", "content": self._prompt}], "responses": answers}


async def load(url: str, make: Callable[[int], Requests], clients: int, seconds: float) -> dict[str, float]:
    """Requests per second and latencies in milliseconds, after a warm-up of a second."""
    import aiohttp

    times: list[float] = []
    start = time.perf_counter() + 1
    end = start + seconds

    async def client(number: int) -> None:
        requests = make(number)
        while (begun := time.perf_counter()) < end:
            async with session.post(f"{url}/classify", json=requests.next()) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            if begun >= start:
                times.append(time.perf_counter() - begun)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*map(client, range(clients)))
    spent = time.perf_counter() - start
    cuts = statistics.quantiles(times, n=100) if len(times) > 1 else [times[0]] * 99
    return {"per_second": len(times) / spent, "p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3}


def rewards_of(url: str, body: dict[str, Any]) -> list[float]:
    import httpx

    rows = httpx.post(f"{url}/classify", json=body, timeout=600).json()["data"]
    return [row["probs"][0] for row in rows]


def resident_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/run")
    parser.add_argument("--hidden", type=int, default=0)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--prompt-words", type=int, default=120)
    parser.add_argument("--workloads", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--cache-mb", type=int, default=256)
    parser.add_argument("--soak", type=float, default=0.0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from rm_gallery.scoring.model_folder import choose_checkpoint

    folder = choose_checkpoint(options.model, key="model")
    if options.plain:
        serve_plain(folder)
        return
    with tempfile.TemporaryDirectory() as name:
        if options.hidden:
            folder = make_model(folder, Path(name), options.hidden, options.layers)
        measure(folder, options)


def measure(folder: str, options: argparse.Namespace) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ours = ["rm_gallery.cli", "serve", folder, "--port", "0", "--device", "cpu"]
    systems = {"plain": ["benchmarks.serving", "--plain", "--model", folder], "serve": ours}
    if "stream" in options.workloads:
        systems["serve, cache"] = [*ours, "--prefix-cache-mb", str(options.cache_mb)]
    found: dict[str, Any] = {"rewards": {}}
    probe = Requests("best-of-16", options.prompt_words, 10**6).next()
    for system, command in systems.items():
        with running(command) as (url, process):
            found["rewards"][system] = rewards_of(url, probe)
            for workload in options.workloads:
                if (workload == "stream") != (system == "serve, cache") and not (
                    workload == "stream" and system == "serve"
                ):
                    continue
                for clients in options.clients:
                    result = asyncio.run(
                        load(url, lambda n, w=workload: Requests(w, options.prompt_words, n), clients, options.seconds)
                    )
                    found[f"{workload}, {clients} clients, {system}"] = result
                    print(
                        f"{workload:11} {clients:3} clients  {system:13} {result['per_second']:8.1f} requests/s  "
                        f"p50 {result['p50_ms']:8.1f} ms  p99 {result['p99_ms']:8.1f} ms",
                        flush=True,
                    )
            if options.soak and system == "serve":
                found["soak_mb"] = []
                for part in range(5):
                    make = partial(Requests, "best-of-16", options.prompt_words)
                    asyncio.run(load(url, lambda n, m=make, p=part: m(n + 1000 * p), 64, options.soak / 5))
                    found["soak_mb"].append(resident_mb(process))
                shown = ", ".join(f"{each:.0f}" for each in found["soak_mb"])
                print(f"soak of {options.soak:g} s at 64 clients: {shown} MB after each fifth", flush=True)
    base = found["rewards"]["plain"]
    worst = max(abs(a - b) for each in found["rewards"].values() for a, b in zip(each, base, strict=True))
    print(f"largest difference of a reward: {worst:.2e}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
