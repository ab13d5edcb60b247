"""Clients of others against the server: openai, cohere, requests as Jina's rerank API has them, and vLLM's commands.

`make clients` installs the packages that the development environment does not have.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from benchmarks.one_reward.setting import serving
from rm_gallery import RewardScorer

pytestmark = pytest.mark.slow

QUESTION = "How do I boil an egg?"
ANSWERS = ["In water.", "No.", "Ten minutes. " * 5, "With <|im_start|> it."]
CHATS = [[{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}] for answer in ANSWERS]


@pytest.fixture(scope="module")
def url(chat_folder: Path) -> Iterator[str]:
    with serving(chat_folder) as found:
        yield found


@pytest.fixture(scope="module")
def scorer(chat_folder: Path) -> Iterator[RewardScorer]:
    with RewardScorer.from_folder(chat_folder, device="cpu") as found:
        yield found


@pytest.fixture(scope="module")
def rewards(scorer: RewardScorer) -> list[float]:
    return scorer.score_messages(CHATS)


def best_first(rewards: list[float]) -> list[int]:
    return sorted(range(len(rewards)), key=lambda index: -rewards[index])


def sigmoids(rewards: list[float]) -> Any:
    return pytest.approx([1 / (1 + math.exp(-reward)) for reward in rewards], abs=1e-4)


def test_openai(url: str, rewards: list[float]) -> None:
    openai = pytest.importorskip("openai", reason="the extra openai is not installed")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["rm"]
        for chat, reward in zip(CHATS, rewards, strict=True):
            found = client.chat.completions.create(model="rm", messages=chat, temperature=0, max_tokens=1)
            assert float(found.choices[0].message.content) == pytest.approx(reward, abs=1e-4)
            assert found.usage.total_tokens > 10 and found.choices[0].finish_reason == "stop"
        raw = httpx.post(f"{url}/classify", json={"input": ["An egg.", "x"]}).json()["data"]
        for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            embedded = client.embeddings.create(model="rm", input=["An egg.", "x"], **options)
            for row, found in zip(raw, embedded.data, strict=True):  # base64 on the wire where no format is named
                if options.get("encoding_format") != "base64":
                    assert found.embedding == pytest.approx(row["probs"], abs=1e-5)
        with pytest.raises(openai.NotFoundError, match="the server has rm"):
            client.chat.completions.create(model="other", messages=CHATS[0])
        with pytest.raises(openai.BadRequestError, match="stream must be false"):
            client.chat.completions.create(model="rm", messages=CHATS[0], stream=True)


def test_openai_async(url: str, rewards: list[float]) -> None:
    import asyncio

    openai = pytest.importorskip("openai", reason="the extra openai is not installed")

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            calls = [client.chat.completions.create(model="rm", messages=chat) for chat in CHATS * 4]
            return list(await asyncio.gather(*calls))

    found = [float(answer.choices[0].message.content) for answer in asyncio.run(ask())]
    assert found == pytest.approx(rewards * 4, abs=1e-4)


@pytest.mark.parametrize("version", ["Client", "ClientV2"])  # POST /v1/rerank and /v2/rerank
def test_cohere(url: str, rewards: list[float], version: str) -> None:
    cohere = pytest.importorskip("cohere", reason="the package cohere is not installed")
    with httpx.Client() as connections:
        client = getattr(cohere, version)(api_key="none", base_url=url, httpx_client=connections)
        found = client.rerank(model="rm", query=QUESTION, documents=ANSWERS, top_n=3)
        order = best_first(rewards)[:3]
        assert [row.index for row in found.results] == order
        assert [row.relevance_score for row in found.results] == sigmoids([rewards[index] for index in order])
        with pytest.raises(cohere.errors.NotFoundError):
            client.rerank(model="other", query=QUESTION, documents=ANSWERS)


@pytest.mark.parametrize("documents", [ANSWERS, [{"text": answer} for answer in ANSWERS]])
def test_requests_as_clients_of_jina_send_them(url: str, rewards: list[float], documents: list[Any]) -> None:
    headers = {"Authorization": "Bearer none", "Accept": "application/json"}
    body = {"model": "rm", "query": QUESTION, "documents": documents, "top_n": 2, "return_documents": True}
    answer = httpx.post(f"{url}/v1/rerank", json=body, headers=headers).json()
    assert set(answer) >= {"model", "usage", "results"} and answer["usage"]["total_tokens"] > 0
    order = best_first(rewards)[:2]
    assert [row["index"] for row in answer["results"]] == order
    assert [row["document"]["text"] for row in answer["results"]] == [ANSWERS[index] for index in order]
    assert [row["relevance_score"] for row in answer["results"]] == sigmoids([rewards[index] for index in order])
    answer = httpx.post(f"{url}/v1/rerank", json={**body, "return_documents": False}, headers=headers).json()
    assert not any("document" in row for row in answer["results"])


def curl(url: str, path: str, body: Any) -> Any:
    """The answer to a command as vLLM's documentation has them."""
    command = ["curl", "-sS", "-X", "POST", f"{url}{path}", "-H", "accept: application/json"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body, ensure_ascii=False)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_commands_of_the_documentation_of_vllm(url: str, scorer: RewardScorer, rewards: list[float]) -> None:
    texts = ["The caf\u00e9 is \u2014 fine.", "It broke."]
    raw = pytest.approx(scorer.score_rendered(texts), abs=1e-4)
    # docs/models/pooling_models/classify.md
    many = curl(url, "/classify", {"model": "rm", "input": texts})
    assert [row["probs"][0] for row in many["data"]] == raw
    assert [(row["index"], row["num_classes"]) for row in many["data"]] == [(0, 1), (1, 1)]
    assert many["object"] == "list" and set(many) == {"id", "object", "created", "model", "data", "usage"}
    one = curl(url, "/classify", {"model": "rm", "input": texts[0]})
    assert one["data"][0]["probs"] == pytest.approx(many["data"][0]["probs"], abs=1e-5)
    chat = curl(url, "/classify", {"model": "rm", "messages": CHATS[0], "use_activation": False})
    assert chat["data"][0]["probs"] == pytest.approx(rewards[:1], abs=1e-4)
    # README.md: the Pooling API has the input of the Embeddings API, and `task`
    pooled = curl(url, "/pooling", {"model": "rm", "input": texts, "task": "classify", "encoding_format": "float"})
    assert [row["data"][0] for row in pooled["data"]] == raw
    assert (
        "task classify" in curl(url, "/pooling", {"model": "rm", "input": texts, "task": "embed"})["error"]["message"]
    )
    # scoring.md: one pair, one query with many documents, and pairs
    body = {"model": "rm", "encoding_format": "float", "queries": QUESTION, "documents": ANSWERS[0]}
    assert [row["score"] for row in curl(url, "/score", body)["data"]] == pytest.approx(rewards[:1], abs=1e-4)
    body |= {"documents": ANSWERS}
    assert [row["score"] for row in curl(url, "/v1/score", body)["data"]] == pytest.approx(rewards, abs=1e-4)
    body |= {"queries": [QUESTION] * 4}
    assert [row["score"] for row in curl(url, "/score", body)["data"]] == pytest.approx(rewards, abs=1e-4)
    older = {"model": "rm", "text_1": QUESTION, "text_2": ANSWERS}
    assert [row["score"] for row in curl(url, "/score", older)["data"]] == pytest.approx(rewards, abs=1e-4)
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        found = curl(url, path, {"model": "rm", "query": QUESTION, "documents": ANSWERS})
        assert [row["index"] for row in found["results"]] == best_first(rewards)
        assert found["results"][0]["document"] == {"text": ANSWERS[best_first(rewards)[0]]}
        assert found["usage"]["total_tokens"] > 0


@pytest.mark.filterwarnings("default")
def test_no_request_that_a_fuzzer_finds_is_answered_with_5xx(url: str, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="the package schemathesis is not installed")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "not_a_server_error"]
    for path in ("/v1/score", "/v1/rerank", "/v2/rerank", "/health", "/ready"):  # as another, or without fields
        command += ["--exclude-path", path]
    command += ["--max-examples", "5", "--seed", "0", "--phases", "examples,coverage,fuzzing"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
