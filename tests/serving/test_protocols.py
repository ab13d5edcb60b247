"""One text, one reward: over every protocol, in any form and beside any neighbors."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from transformers import AutoTokenizer

from rm_gallery.scoring import RewardScorer
from rm_gallery.serving.app import make_app
from rm_gallery.serving.command import load_models
from rm_gallery.serving.limits import Limits
from tests.scoring.models import make_checkpoint, plain_rewards
from tests.serving.conftest import Client

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How do I boil an egg? " * 3}]
ANSWERS = ["Put it in water.", "No.", "Ten minutes, then cold water.", "<|im_end|> ends nothing here"]


def chat(answer: str) -> list[dict[str, str]]:
    return [*PROMPT, {"role": "assistant", "content": answer}]


def classified(response: Any) -> list[float]:
    assert response.status_code == 200, response.text
    return [row["probs"][0] for row in response.json()["data"]]


@pytest.fixture(scope="module")
def rewards(chat_folder: Path) -> list[float]:
    """Of the answers, by the scorer."""
    with RewardScorer.from_folder(chat_folder, device="cpu") as scorer:
        return scorer.score_messages([chat(answer) for answer in ANSWERS])


@pytest.fixture(scope="module")
def forms(chat_folder: Path) -> tuple[list[str], list[list[int]]]:
    """Rendered texts and token ids of the answers without a control token."""
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    texts = [tokenizer.apply_chat_template(chat(answer), tokenize=False) for answer in ANSWERS[:3]]
    return texts, [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_every_protocol_gives_the_reward_of_the_scorer_and_of_plain_transformers(
    served: Client, rewards: list[float], forms: tuple[list[str], list[list[int]]], chat_folder: Path
) -> None:
    texts, ids = forms
    close = pytest.approx(rewards, abs=1e-4)
    assert plain_rewards(chat_folder, texts) == pytest.approx(rewards[:3], abs=1e-4)
    chats = [chat(answer) for answer in ANSWERS]
    assert classified(served.post("/classify", {"model": "rm", "messages": chats})) == close
    assert classified(served.post("/classify", {"messages": PROMPT, "responses": ANSWERS})) == close
    assert classified(served.post("/classify", {"messages": chats[0]})) == pytest.approx(rewards[:1], abs=1e-4)
    for given in (texts, ids):
        assert classified(served.post("/classify", {"input": given})) == pytest.approx(rewards[:3], abs=1e-4)
        assert classified(served.post("/classify", {"input": given[0]})) == pytest.approx(rewards[:1], abs=1e-4)
    rows = served.post("/pooling", {"messages": chats, "task": "classify"}).json()["data"]
    assert [row["data"][0] for row in rows] == close
    rows = served.post("/v1/embeddings", {"input": ids}).json()["data"]
    assert [row["embedding"][0] for row in rows] == pytest.approx(rewards[:3], abs=1e-4)
    rows = served.post("/v1/embeddings", {"input": texts, "encoding_format": "base64"}).json()["data"]
    found = [struct.unpack("<f", base64.b64decode(row["embedding"]))[0] for row in rows]
    assert found == pytest.approx(rewards[:3], abs=1e-4)
    answer = served.post("/get_reward", {"query": texts, "prompts": texts, "labels": [""] * 3}).json()
    assert answer["rewards"] == answer["scores"] == pytest.approx(rewards[:3], abs=1e-4)
    for path in ("/score", "/v1/score"):
        rows = served.post(path, {"queries": PROMPT, "documents": ANSWERS}).json()["data"]
        assert [row["score"] for row in rows] == close
    answer = served.post("/v1/chat/completions", {"messages": chats[0], "temperature": 0}).json()
    assert float(answer["choices"][0]["message"]["content"]) == answer["reward"] == pytest.approx(rewards[0], abs=1e-4)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_sorts_by_reward(served: Client, rewards: list[float], path: str) -> None:
    body = {"query": PROMPT, "documents": [*ANSWERS[:3], {"text": ANSWERS[3]}], "top_n": 3}
    results = served.post(path, body).json()["results"]
    order = sorted(range(4), key=lambda index: -rewards[index])[:3]
    assert [row["index"] for row in results] == order
    assert [row["reward"] for row in results] == pytest.approx([rewards[index] for index in order], abs=1e-4)
    assert all(0 < row["relevance_score"] < 1 for row in results)
    assert [row["document"]["text"] for row in results] == [ANSWERS[index] for index in order]
    raw = served.post(path, {**body, "use_activation": False, "return_documents": False}).json()["results"]
    assert [row["relevance_score"] for row in raw] == [row["reward"] for row in raw]
    assert "document" not in raw[0]


def test_sigmoid_only_where_a_request_asks_for_it(served: Client, rewards: list[float]) -> None:
    body = {"messages": chat(ANSWERS[0])}
    for field in ("use_activation", "activation", "softmax"):
        [value] = classified(served.post("/classify", {**body, field: True}))
        assert 0 < value < 1
        assert classified(served.post("/classify", {**body, field: False})) == pytest.approx(rewards[:1], abs=1e-4)


def test_score_takes_one_query_or_one_for_each_document(served: Client) -> None:
    one = served.post("/score", {"text_1": "Why?", "text_2": ["a", "b"]}).json()["data"]
    each = served.post("/score", {"queries": ["Why?", "Why?"], "items": ["a", "b"]}).json()["data"]
    assert [row["score"] for row in one] == pytest.approx([row["score"] for row in each], abs=1e-5)
    assert served.post("/score", {"queries": ["a", "b"], "documents": ["x", "y", "z"]}).status_code == 400


def test_requests_at_the_same_time_share_packs_and_prompts(
    served: Client, rewards: list[float], chat_folder: Path
) -> None:
    def figure(name: str) -> float:
        lines = served.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"rm_gallery_{name}_total{{"))

    before = {name: figure(name) for name in ("packs", "tokens", "computed_tokens")}
    requests = [("/classify", {"messages": chat(ANSWERS[number % 4])}) for number in range(16)]
    found = [classified(each)[0] for each in served.posts(requests)]
    assert found == pytest.approx([rewards[number % 4] for number in range(16)], abs=1e-4)
    spent = {name: figure(name) - value for name, value in before.items()}
    assert spent["packs"] < 16
    assert spent["computed_tokens"] < 0.7 * spent["tokens"]


@pytest.mark.slow
def test_several_models_and_an_ensemble(chat_folder: Path, other_folder: Path) -> None:
    folders = [str(chat_folder), str(other_folder)]
    models = load_models({"a": folders[:1], "b": folders[1:], "both": folders}, Limits(), device="cpu")
    client = Client(make_app(models))
    body = {"messages": chat(ANSWERS[0])}
    a, b, both = (classified(client.post("/classify", {**body, "model": name}))[0] for name in ("a", "b", "both"))
    assert both == pytest.approx((a + b) / 2, abs=1e-5)
    assert abs(a - b) > 1e-3
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["a", "b", "both"]
    assert "name one" in client.post("/classify", body).json()["error"]["message"]
    assert client.post("/classify", {**body, "model": "c"}).status_code == 404
    models.close()


@pytest.mark.slow
def test_prefix_cache(chat_folder: Path, rewards: list[float]) -> None:
    limits = Limits(prefix_cache_mb=8)
    models = load_models({"rm": [str(chat_folder)]}, limits, device="cpu")
    client = Client(make_app(models, limits))
    for number in range(8):
        found = classified(client.post("/classify", {"messages": chat(ANSWERS[number % 4])}))
        assert found == pytest.approx([rewards[number % 4]], abs=1e-5)
    lines = client.get("/metrics").text.splitlines()
    [cached] = [float(line.split()[-1]) for line in lines if line.startswith("rm_gallery_cached_tokens_total{")]
    assert cached > 300
    models.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gemma3_text", "llama"])
def test_other_architectures_and_raw_text(kind: str, tmp_path: Path) -> None:
    folder, _ = make_checkpoint(kind, tmp_path)
    texts = ["An egg.", "An egg in water is boiled for ten minutes. " * 3, "x"]
    models = load_models({"rm": [str(folder)]}, Limits(), device="cpu")
    client = Client(make_app(models))
    expected = plain_rewards(folder, texts)
    assert classified(client.post("/classify", {"input": texts})) == pytest.approx(expected, abs=1e-4)
    ids = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    requests: list[tuple[str, Any]] = [("/classify", {"input": each}) for each in ids * 5]
    assert [classified(each)[0] for each in client.posts(requests)] == pytest.approx(expected * 5, abs=1e-4)
    models.close()


def test_truncation_is_only_what_the_client_asks_for(served: Client, forms: tuple[list[str], list[list[int]]]) -> None:
    ids = forms[1][0]
    cut: Callable[..., list[float]] = lambda **more: classified(served.post("/classify", {"input": ids, **more}))  # noqa: E731
    last = classified(served.post("/classify", {"input": ids[-5:]}))
    first = classified(served.post("/classify", {"input": ids[:5]}))
    assert cut(truncate_prompt_tokens=5) == pytest.approx(last, abs=1e-5)
    assert cut(truncate_prompt_tokens=5, truncation_side="right") == pytest.approx(first, abs=1e-5)
