"""OpenRLHF: its reward function from a file, and requests as its client sends them against our server."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rm_gallery.scoring import RewardScorer

EXAMPLE = Path(__file__).parents[2] / "examples/openrlhf_reward_func.py"
CHATS = [
    [{"role": "user", "content": "One?"}, {"role": "assistant", "content": text}] for text in ("a", "b c", "d e f")
]

pytestmark = pytest.mark.slow


def queries_of(folder: Path) -> list[str]:
    """Prompt and response as the policy's tokenizer decodes them, special tokens included."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    return [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def test_the_file_of_the_examples_gives_the_rewards_of_conversations(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_MODEL", str(chat_folder))
    monkeypatch.setenv("REWARD_DEVICE", "cpu")
    spec = importlib.util.spec_from_file_location("reward_func", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def rollout() -> list[Any]:  # one query per call, from threads
        calls = [asyncio.to_thread(module.reward_func, [query], ["p"], [None]) for query in queries_of(chat_folder)]
        return await asyncio.gather(*calls)

    found = asyncio.run(rollout())
    with RewardScorer.from_folder(chat_folder, device="cpu") as scorer:
        expected = scorer.score_messages(CHATS)
    assert [each["rewards"].item() for each in found] == pytest.approx(expected, abs=1e-4)
    assert torch.tensor([found[0]["rewards"]]).shape == (1,)  # what its sampler makes of it
    assert found[0]["scores"].item() == found[0]["extra_logs"]["reward_model"].item() == found[0]["rewards"].item()


async def rewards_of_its_client(urls: list[str], query: str) -> Any:
    """What OpenRLHF reads of the answers to one query: a part of the queries for each server, and the first answer."""
    import aiohttp

    async def post(url: str, queries: list[str]) -> Any:
        data = {"query": queries, "prompts": ["p"] * len(queries), "labels": [None] * len(queries)}
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session:
            async with session.post(url, json=data) as response:
                response.raise_for_status()
                return await response.json()

    parts = [[query], *([[]] * (len(urls) - 1))]
    return (await asyncio.gather(*map(post, urls, parts)))[0]


def test_its_client_and_the_file_with_servers(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason="the package aiohttp is not installed")
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from benchmarks.one_reward.setting import serving
    from rm_gallery.integrations.openrlhf import reward_function

    queries = queries_of(chat_folder)
    with RewardScorer.from_folder(chat_folder, device="cpu") as scorer:
        expected = scorer.score_messages(CHATS)
    with serving(chat_folder) as first, serving(chat_folder) as second:
        for query, reward in zip(queries, expected, strict=True):
            urls = [f"{url}/get_reward" for url in (first, second)]
            found = asyncio.run(rewards_of_its_client(urls, query))
            assert found["rewards"] == found["scores"] == pytest.approx([reward], abs=1e-4)
        found = reward_function(f"{first},{second}/get_reward")(queries, ["p"] * 3, [None] * 3)
        assert found["rewards"].tolist() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="no reward server answers"):
        reward_function([first], timeout=1.0)(queries[:1], ["p"], [None])


def test_requests_of_its_client_against_the_server(chat_folder: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    import httpx

    from rm_gallery.serving.app import make_app
    from rm_gallery.serving.command import load_models
    from rm_gallery.serving.limits import Limits

    models = load_models({"rm": [str(chat_folder)]}, Limits(), device="cpu")

    async def post() -> list[Any]:
        transport = httpx.ASGITransport(app=make_app(models, Limits(), []))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            bodies = [{"query": [query], "prompts": ["p"], "labels": [None]} for query in queries_of(chat_folder)]
            return [response.json() for response in [await client.post("/get_reward", json=each) for each in bodies]]

    found = asyncio.run(post())
    with RewardScorer.from_folder(chat_folder, device="cpu") as scorer:
        expected = scorer.score_messages(CHATS)
    assert [each["rewards"][0] for each in found] == pytest.approx(expected, abs=1e-4)
    assert all(each["scores"] == each["rewards"] and isinstance(each["extra_logs"], dict) for each in found)
