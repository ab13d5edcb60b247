"""The reward after each token of a response: that of the text up to it."""

from __future__ import annotations

import base64
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from rm_gallery.scoring import RewardScorer
from rm_gallery.serving.app import make_app
from rm_gallery.serving.command import load_models
from rm_gallery.serving.limits import Limits
from tests.scoring.models import make_checkpoint, make_classifier
from tests.serving.conftest import Client
from tests.small import DECODERS

PROMPT = [{"role": "user", "content": "How do I boil an egg?"}]
ANSWERS = ["In w\u00e4ter.", "No.", "\U0001f95a ten minutes"]


def traced(client: Client, body: Any) -> list[dict[str, Any]]:
    response = client.post("/trace", body)
    assert response.status_code == 200, response.text
    return response.json()["data"]


def rewards_of_starts(client: Client, ids: Sequence[int], start: int) -> list[float]:
    """Of the text up to each token, by the protocol for token ids."""
    starts = [list(ids[: end + 1]) for end in range(start, len(ids))]
    return [row["probs"][0] for row in client.post("/classify", {"input": starts}).json()["data"]]


def check_traces(client: Client, folder: Path) -> None:
    """Every value is the reward of the text up to its token, and the last one that of the text."""
    body = {"messages": PROMPT, "responses": ANSWERS}
    whole = [row["probs"][0] for row in client.post("/classify", body).json()["data"]]
    rows = traced(client, body)
    with RewardScorer.from_folder(folder, device="cpu") as scorer:
        [texts] = scorer.engine.tokenize([scorer.build_group(PROMPT, ANSWERS)])
    assert [row["reward"] for row in rows] == pytest.approx(whole, abs=1e-5)
    for row, ids, answer in zip(rows, texts, ANSWERS, strict=True):
        assert row["start"] + len(row["tokens"]) == len(ids)
        assert "".join(row["tokens"]).startswith(answer)
        assert row["rewards"] == pytest.approx(rewards_of_starts(client, ids, row["start"]), abs=1e-5)
        assert row["before"] == pytest.approx(
            rewards_of_starts(client, ids[: row["start"]], row["start"] - 1)[0], abs=1e-5
        )
        assert row["rewards"][-1] == row["reward"]


def test_every_value_is_the_reward_of_the_text_up_to_its_token(served: Client, chat_folder: Path) -> None:
    check_traces(served, chat_folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECODERS)
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(kind, tmp_path, style="chat")[0]
    models = load_models({"rm": [str(folder)]}, Limits(), device="cpu")
    check_traces(Client(make_app(models)), folder)
    models.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2"])
def test_layers_of_the_library(kind: str, tmp_path: Path) -> None:
    extra = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512} if kind == "gpt2" else {}
    folder = make_classifier(kind, tmp_path, chat=True, **{"max_position_embeddings": 512, **extra})
    models = load_models({"rm": [str(folder)]}, Limits(), device="cpu")
    check_traces(Client(make_app(models)), folder)
    models.close()


def test_a_conversation_and_its_last_turn_are_traced_alike(served: Client) -> None:
    answer = {"role": "assistant", "content": ANSWERS[0]}
    [one] = traced(served, {"messages": [*PROMPT, answer]})
    [other] = traced(served, {"messages": PROMPT, "responses": [ANSWERS[0]]})
    assert one["tokens"] == other["tokens"]
    assert one["rewards"] == pytest.approx(other["rewards"], abs=1e-5)


def test_a_text_without_a_known_prompt_is_traced_from_its_first_token(served: Client) -> None:
    [row] = traced(served, {"input": "How?\n\nSo."})
    assert (row["start"], row["before"], "".join(row["tokens"])) == (0, None, "How?\n\nSo.")


def test_traces_beside_rewards_change_neither(served: Client) -> None:
    """Both kinds of requests share the queue."""
    body = {"messages": PROMPT, "responses": ANSWERS}
    alone = served.post("/classify", body).json()["data"], traced(served, body)
    answers = served.posts([("/classify", body), ("/trace", body)] * 4)
    for place, each in enumerate(answers):
        for row, expected in zip(each.json()["data"], alone[place % 2], strict=True):
            key = "rewards" if place % 2 else "probs"
            assert row[key] == pytest.approx(expected[key], abs=1e-5)


@pytest.mark.slow
def test_refused_in_words(served: Client, chat_folder: Path, tmp_path: Path) -> None:
    response = served.post("/trace", {"messages": PROMPT, "responses": ["x"], "truncate_prompt_tokens": 4})
    assert response.status_code == 400 and "whole texts" in response.json()["error"]["message"]
    shutil.copytree(chat_folder, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    tokenizer.chat_template = "Chat: " + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "other", save_jinja_files=False)
    both = [str(chat_folder), str(tmp_path / "other")]
    models = load_models({"both": both}, Limits(), device="cpu", normalize=False)
    response = Client(make_app(models)).post("/trace", {"messages": PROMPT, "responses": ["x"]})
    assert response.status_code == 400 and "different tokens" in response.json()["error"]["message"]
    models.close()


@pytest.mark.slow
@pytest.mark.parametrize(("style", "kind"), [("text", "bert"), ("text", "deberta-v2")])
def test_encoders_score_the_text_cut_after_each_token(
    style: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(kind, tmp_path, style=style)[0]
    models = load_models({"rm": [str(folder)]}, Limits(), device="cpu")
    client = Client(make_app(models))
    body = {"messages": PROMPT, "responses": ["In water.", "No. Never, of course."]}
    whole = [row["probs"][0] for row in client.post("/classify", body).json()["data"]]
    rows = traced(client, body)
    with RewardScorer.from_folder(folder, device="cpu") as scorer:
        [texts] = scorer.engine.tokenize([scorer.build_group(PROMPT, body["responses"])])
        closing = [scorer.engine.tokenizer.sep_token_id]
    for row, ids, reward in zip(rows, texts, whole, strict=True):
        assert ids[-1:] == closing and 0 < row["start"] < len(ids)
        cuts = [[*ids[:end], *closing] for end in range(row["start"], len(ids))]
        expected = [each["probs"][0] for each in client.post("/classify", {"input": cuts}).json()["data"]]
        assert [row["before"], *row["rewards"]] == pytest.approx(expected, abs=1e-5)
        assert row["rewards"][-1] == row["reward"] == pytest.approx(reward, abs=1e-5)
        assert len(set(row["rewards"])) > 1
    # Where that would be too many texts, several tokens are one item.
    monkeypatch.setattr("rm_gallery.serving.traces._MAX_CUTS", 8)
    fewer = traced(client, body)
    assert sum(len(row["tokens"]) for row in fewer) <= 8 < sum(len(row["tokens"]) for row in rows)
    for few, row in zip(fewer, rows, strict=True):
        assert "".join(few["tokens"]) == "".join(row["tokens"])
        assert few["rewards"][-1] == pytest.approx(row["rewards"][-1], abs=1e-5)
        assert set(np.round(few["rewards"], 4)) <= set(np.round(row["rewards"], 4))
    models.close()


@pytest.mark.slow
def test_an_ensemble_combines_the_values_of_its_models(chat_folder: Path, other_folder: Path) -> None:
    names = {"one": [str(chat_folder)], "two": [str(other_folder)], "both": [str(chat_folder), str(other_folder)]}
    models = load_models(names, Limits(), device="cpu", normalize=False)
    client = Client(make_app(models))
    body = {"messages": PROMPT, "responses": ANSWERS}
    one, two, both = (traced(client, body | {"model": name}) for name in names)
    for first, second, mean in zip(one, two, both, strict=True):
        assert mean["tokens"] == first["tokens"]
        assert mean["rewards"] == pytest.approx(
            [(a + b) / 2 for a, b in zip(first["rewards"], second["rewards"], strict=True)], abs=1e-5
        )
        assert mean["before"] == pytest.approx((first["before"] + second["before"]) / 2, abs=1e-5)
    models.close()


def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(served: Client) -> None:
    page = served.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe-inline'; script" in policy
    script = page.text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in script and "http://" not in page.text and "https://" not in page.text
