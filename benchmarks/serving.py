"""Load on loopback: `rm-gallery serve` against a plain FastAPI server around the library's pipeline.

    python -m benchmarks.serving [--model quickstart/run] [--hidden 384 --layers 12] [--clients 1 8 64] [--seconds 4]
                                 [--repeats 3] [--prompt-words 120] [--workloads pairs best-of-16 stream]
                                 [--cache-mb 256] [--soak SECONDS] [--json FILE]

`pairs` has two responses to a prompt in a request, `best-of-16` has sixteen, `stream` has one: sixteen requests for a
prompt, one after another, against our server with and without a prefix cache. Prompts and responses are made of the
quick start's; prompts differ. Each client sends its next request when it has the answer to the last one.

The plain server renders chats and calls the pipeline with all texts of a request in one batch; requests come one at a
time, since a pipeline is not thread-safe. `one at a time` is our server with one request in flight for all clients.
All servers are started with the same settings for threads, the load is on one of them at a time, and rounds alternate
between them. Requests count that are finished within the seconds, or until there are twice as many as clients, after a
warm-up of a second or of one request for each client. A row has the median of the rounds and their range, and the CPU
milliseconds of the server's process by request.

Before the servers, the models alone on the tokens of the same requests: padded batches of one request for the library's
model, full packs for ours. Rewards of all servers are compared. --hidden, --layers: random weights of this size, with
the tokenizer of the model. --soak: seconds of full load on our server alone, whose memory is printed after each fifth.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count, product
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


async def load(
    url: str,
    make: Callable[[int], Requests],
    clients: int,
    seconds: float,
    process: int,
    *,
    first: int = 0,
    in_flight: int = 0,
) -> dict[str, float]:
    """Requests per second, latencies and CPU time of the server's process by request, in milliseconds.

    first: number of the first client's requests. in_flight: requests that are sent at a time; 0 for one of each client.
    """
    import aiohttp

    ends: list[tuple[float, float]] = []
    used: list[float] = []
    free = asyncio.Semaphore(in_flight or clients)
    begun = time.perf_counter()
    start = end = 0.0
    is_over = False

    async def client(number: int) -> None:
        nonlocal start, end, is_over
        requests = make(first + number)
        while not is_over:
            sent = time.perf_counter()
            async with free, session.post(f"{url}/classify", json=requests.next()) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            now = time.perf_counter()
            ends.append((now, now - sent))
            if not start and (now > begun + 1 or in_flight) and len(ends) >= clients:
                ends.clear()
                start = now
                used.append(cpu_seconds(process))
            elif start and not is_over and now > start + seconds and len(ends) >= 2 * clients:
                is_over, end = True, now
                used.append(cpu_seconds(process))

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(600)
    ) as session:
        await asyncio.gather(*map(client, range(clients)))
    times = [spent for at, spent in ends if start < at <= end]
    cuts = statistics.quantiles(times, n=100)
    return {
        "per_second": len(times) / (end - start), "p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3,
        "cpu_ms": (used[1] - used[0]) * 1e3 / len(times),
    }  # fmt: skip


def cpu_seconds(process: int) -> float:
    """Of all threads of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def models_alone(folder: str, workload: str, prompt_words: int, seconds: float) -> dict[str, float]:
    """Requests per second of the forward passes alone, without tokenization and HTTP."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from rm_gallery.data.batching.packed_batch import collate
    from rm_gallery.scoring import RewardScorer

    requests = Requests(workload, prompt_words, 0)
    bodies = [requests.next() for _ in range(32)]
    with RewardScorer.from_folder(folder, device="cpu") as scorer:
        engine = scorer.engine
        groups = [scorer.build_group(body["messages"], body["responses"]) for body in bodies]
        parts = [part for found in engine.encode(groups) for part in found]  # type: ignore[union-attr]
        packs = [collate([parts[index] for index in pack]) for pack in engine.plan(parts)]
        texts = engine.tokenize(groups)
        pad = int(engine.tokenizer.pad_token_id)
        found = {"packs": rate(partial(run_all, engine.model, [(pack,) for pack in packs]), len(bodies), seconds)}
    batches = []
    for request in texts:
        rows = [torch.tensor(ids) for ids in request]  # type: ignore[union-attr]
        mask = [torch.ones_like(row) for row in rows]
        batches.append(
            (
                torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad),
                torch.nn.utils.rnn.pad_sequence(mask, batch_first=True),
            )
        )
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    found["padded"] = rate(partial(run_all, model, batches), len(bodies), seconds)
    return found


def run_all(model: Any, batches: Sequence[tuple[Any, ...]]) -> None:
    import torch

    with torch.inference_mode():
        for batch in batches:
            model(*batch)


def rate(call: Callable[[], None], count: int, seconds: float) -> float:
    """Requests per second of a call for `count` requests."""
    call()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        call()
        calls += 1
    return calls * count / (time.perf_counter() - start)


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
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-words", type=int, default=120)
    parser.add_argument("--workloads", nargs="+", choices=SIZES, default=["pairs", "best-of-16"])
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
    if options.soak:
        with running(ours) as (url, process):
            soak(url, process, options)
        return
    found: dict[str, Any] = {}
    for workload in options.workloads:
        alone = found[f"{workload}, models alone"] = models_alone(folder, workload, options.prompt_words, 2.0)
        print(f"{workload:11} models alone: padded {alone['padded']:.1f}, packs {alone['packs']:.1f} requests/s")
    systems = {"plain": ["benchmarks.serving", "--plain", "--model", folder], "serve": ours}
    if "stream" in options.workloads:
        systems["serve, cache"] = [*ours, "--prefix-cache-mb", str(options.cache_mb)]
    with ExitStack() as stack:
        servers = {name: stack.enter_context(running(command)) for name, command in systems.items()}
        probe = Requests("best-of-16", options.prompt_words, 10**6).next()
        rewards = {name: rewards_of(url, probe) for name, (url, _) in servers.items()}
        cells = list(product(options.workloads, options.clients, [*servers, "one at a time"]))
        rounds: dict[tuple[str, int, str], list[dict[str, float]]] = {cell: [] for cell in cells if is_measured(*cell)}
        for number, (cell, results) in product(range(options.repeats), rounds.items()):
            workload, clients, system = cell
            url, process = servers.get(system, servers["serve"])
            in_flight = int(system == "one at a time")
            make = partial(Requests, workload, options.prompt_words)
            run = load(url, make, clients, options.seconds, process, first=number * 10**4, in_flight=in_flight)
            results.append(asyncio.run(run))
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for (workload, clients, system), results in rounds.items():
        found[f"{workload}, {clients} clients, {system}"] = results
        print(f"{workload:11} {clients:3} clients  {system:13} " + "  ".join(in_words(results)))
    worst = max(abs(a - b) for each in rewards.values() for a, b in zip(each, rewards["plain"], strict=True))
    print(f"largest difference of a reward: {worst:.2e}")
    found["largest_difference"] = worst
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2))


def is_measured(workload: str, clients: int, system: str) -> bool:
    """Streams compare our server with and without a cache; one client has one request in flight anyway."""
    if workload == "stream":
        return system in ("serve", "serve, cache")
    return system in ("plain", "serve") or (system == "one at a time" and clients > 1)


def in_words(results: Sequence[dict[str, float]]) -> Iterator[str]:
    """The median of each figure, and the range of the first."""
    rates = [each["per_second"] for each in results]
    yield f"{statistics.median(rates):7.1f} ({min(rates):.1f} to {max(rates):.1f}) requests/s"
    for name, key in (("p50", "p50_ms"), ("p99", "p99_ms"), ("CPU", "cpu_ms")):
        yield f"{name} {statistics.median(each[key] for each in results):8.1f} ms"


def soak(url: str, process: int, options: argparse.Namespace) -> None:
    """Memory of the server under full load."""
    sizes = [resident_mb(process)]
    for part in range(5):
        make = partial(Requests, "best-of-16", options.prompt_words)
        result = asyncio.run(load(url, make, 64, options.soak / 5, process, first=1000 * part))
        sizes.append(resident_mb(process))
        print(f"{sizes[-1]:.0f} MB  " + "  ".join(in_words([result])), flush=True)
    print(f"soak of {options.soak:g} s at 64 clients: {', '.join(f'{each:.0f}' for each in sizes)} MB")


if __name__ == "__main__":
    main()
