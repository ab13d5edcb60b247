"""The quickstart's data is honest and its model folder complete: what a newcomer's first run rests on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from tutorials.cookbooks.training_reward_model.quickstart.make_data import write_data
from tutorials.cookbooks.training_reward_model.quickstart.make_model import IM_END, PAD, write_model

pytestmark = pytest.mark.slow

Row = dict[str, Any]
CHAT = [
    {"role": "system", "content": "Talk like a pirate."},
    {"role": "user", "content": "Name three fruits."},
    {"role": "assistant", "content": "- apples\n- pears\n- plums"},
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_data(tmp_path_factory.mktemp("quickstart"), seed=0)


@pytest.fixture(scope="module")
def train(paths: dict[str, Path]) -> list[Row]:
    return pq.read_table(paths["train"]).to_pylist()


@pytest.fixture(scope="module")
def val(paths: dict[str, Path]) -> list[Row]:
    return pq.read_table(paths["val"]).to_pylist()


@pytest.fixture(scope="module")
def model_folder(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), paths["train"], seed=0)


def prompts(rows: list[Row]) -> set[str]:
    return {json.dumps(row["prompt"]) for row in rows}


def accuracy(margins: np.ndarray) -> float:
    """Share of positive margins; a tie counts one half."""
    return float((np.sign(margins) / 2 + 0.5).mean())


def test_there_are_enough_pairs_in_both_parts(train: list[Row], val: list[Row]) -> None:
    assert len(train) >= 2000
    assert len(val) >= 400


def test_no_prompt_occurs_twice_or_in_both_parts(train: list[Row], val: list[Row]) -> None:
    assert len(prompts(train)) == len(train)
    assert len(prompts(val)) == len(val)
    assert not prompts(train) & prompts(val)


def test_every_skill_is_in_both_parts_equally_often(train: list[Row], val: list[Row]) -> None:
    counts = Counter(row["skill"] for row in train)
    assert len(counts) >= 5
    assert len(set(counts.values())) == 1
    assert counts.keys() == {row["skill"] for row in val}


def test_prompts_end_with_the_user_and_some_have_several_turns_or_a_system_turn(train: list[Row]) -> None:
    assert {row["prompt"][-1]["role"] for row in train} == {"user"}
    assert {row["skill"] for row in train if len(row["prompt"]) >= 3} == {"memory", "change_of_mind"}
    assert {row["skill"] for row in train if row["prompt"][0]["role"] == "system"} == {"persona"}


def test_texts_are_clean(train: list[Row], val: list[Row]) -> None:
    for row in train + val:
        for text in [row["chosen"], row["rejected"], *(message["content"] for message in row["prompt"])]:
            assert text.isascii() and text == text.strip() and text and "{" not in text and "  " not in text
        assert row["chosen"] != row["rejected"]


def test_the_seed_decides_every_row(paths: dict[str, Path], tmp_path: Path) -> None:
    again, other = write_data(tmp_path / "again", seed=0), write_data(tmp_path / "other", seed=1)
    for part, path in paths.items():
        assert pq.read_table(again[part]).equals(pq.read_table(path))
        assert not pq.read_table(other[part]).equals(pq.read_table(path))


def test_every_answer_is_chosen_as_often_as_rejected(train: list[Row], val: list[Row]) -> None:
    for rows in (train, val):
        assert Counter(row["chosen"] for row in rows) == Counter(row["rejected"] for row in rows)


def test_neighbouring_rows_are_twins(train: list[Row]) -> None:
    for first, second in zip(train[::2], train[1::2], strict=True):
        assert (first["chosen"], first["rejected"]) == (second["rejected"], second["chosen"])


def test_length_alone_stays_under_60_percent(val: list[Row]) -> None:
    margins = np.array([len(row["chosen"]) - len(row["rejected"]) for row in val])
    assert max(accuracy(margins), accuracy(-margins)) < 0.60


def test_words_of_the_answers_alone_stay_under_75_percent(train: list[Row], val: list[Row]) -> None:
    words = TfidfVectorizer(ngram_range=(1, 2)).fit([row["chosen"] for row in train])

    def differences(rows: list[Row]) -> csr_matrix:
        return words.transform([row["chosen"] for row in rows]) - words.transform([row["rejected"] for row in rows])

    # Every other row is turned round, since a classifier needs both labels.
    signs = np.where(np.arange(len(train)) % 4 < 2, 1, -1)
    classifier = LogisticRegression(fit_intercept=False).fit(differences(train).multiply(signs[:, None]), signs)
    assert accuracy(classifier.decision_function(differences(val))) < 0.75


def test_the_folder_opens_with_as_many_weights_as_tokens(model_folder: Path) -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(model_folder), AutoConfig.from_pretrained(model_folder)
    assert len(tokenizer) == config.vocab_size
    assert (tokenizer.eos_token, tokenizer.pad_token) == (IM_END, PAD)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    assert model.score.weight.shape == (1, config.hidden_size)
    assert sum(weight.numel() for weight in model.parameters()) < 2_000_000


def test_the_template_is_chatml_and_a_prompt_is_a_prefix_of_its_conversation(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    conversation = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert conversation == "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in CHAT)
    prompt = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    assert conversation.startswith(prompt) and prompt.endswith("<|im_start|>assistant\n")
    prompt_ids, conversation_ids = tokenizer(prompt)["input_ids"], tokenizer(conversation)["input_ids"]
    assert conversation_ids[: len(prompt_ids)] == prompt_ids


def test_any_text_survives_the_tokenizer(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = "Ahoy, \u00e9l\u00e8ve!  42 \u732b\n\n\t<tag> \U0001f600"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_seed_decides_the_weights(paths: dict[str, Path], model_folder: Path, tmp_path: Path) -> None:
    again = write_model(tmp_path / "again", paths["train"], seed=0)
    other = write_model(tmp_path / "other", ["A few words."], seed=1)
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (model_folder / weights).read_bytes()
    assert (other / weights).read_bytes() != (model_folder / weights).read_bytes()
