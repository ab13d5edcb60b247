"""The report on conversations: counts, targets and plan are those of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_gallery.cli import main
from rm_gallery.data.batching.bin_packing import Packer, attention_length
from rm_gallery.data.batching.plan import Plan
from rm_gallery.data.batching.prompt_sharing import sizes_of
from rm_gallery.data.config import Side
from rm_gallery.data.tokenization.tokenizer import load_tokenizer
from rm_gallery.training.config import load_config
from rm_gallery.training.data_setup import load_side


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(turns)]}


@pytest.fixture
def words(in_tmp: Path, qwen2_folder: Path) -> list[str]:
    train = [chat(f"Question {number % 7}?", f"Answer {number}.", "And?", "No more.") for number in range(40)]
    train += [train[0], train[1], chat("No answer."), {"messages": "text"}]
    val = [train[2], chat("Question 3?", "Another."), chat("New?", "Yes.")]
    for name, rows in (("train", train), ("val", val)):
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [
        "objective.name=sft", f"model.partial_pretrain={qwen2_folder}", "data.train_files=train.jsonl",
        "data.val_files=val.jsonl", "data.max_length=128", "data.train_batch_size=16",
        "data.max_tokens_per_micro_batch=300",
    ]  # fmt: skip


def test_figures_are_those_of_training(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-data", *words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    train, val = report["splits"]
    config = load_config(None, words)
    data = load_side(Side("data.train_files"), config.data, load_tokenizer(words[1].partition("=")[2])).data
    assert data.target_counts is not None
    assert (train["num_rows"], train["num_conversations"], train["num_beginnings"]) == (44, 42, 7)
    assert (train["num_tokens"], train["num_targets"]) == (data.num_tokens, int(data.target_counts.sum()))
    assert train["num_answers"] == 84
    assert train["repeated"]["examples"] == ["train.jsonl:0 = train.jsonl:40", "train.jsonl:1 = train.jsonl:41"]
    assert {each["examples"][0] for each in train["dropped"]} == {"train.jsonl:42", "train.jsonl:43"}
    assert [each["count"] for each in report["leakage"]] == [1, 2]
    assert val["num_conversations"] == 3
    plan = Plan(
        data.sizes, config.data, Packer(300, attention_length=attention_length(32)), seed=0, prompts=data.prompt_hashes
    )
    steps = [plan.step(data, step) for step in plan.epoch_steps(0)]
    packer = Packer(300, attention_length=attention_length(32))
    shared = sum(int(packer.pack_tokens(step.packs[0], sizes_of(step.units)).sum()) for step in steps)
    assert train["cost"]["shared"] == shared < train["cost"]["packed"] == data.num_tokens
    assert train["cost"]["micro_batches"] == pytest.approx(np.mean([len(step.packs[0]) for step in steps]))


@pytest.mark.slow
def test_pages_show_which_tokens_are_predicted(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-data", *words, "--samples", "50"]) == 0
    printed = capsys.readouterr().out
    assert "Conversation data report" in printed and "predicted (" in printed
    sample = printed[printed.index("  train.jsonl:3\n") : printed.index("  train.jsonl:4\n")]
    labels = [line.split()[0] for line in sample.splitlines() if line.endswith("tokens)")]
    assert labels == ["read", "predicted", "read", "predicted", "read"]
    read, first, between, second, _ = sample.split("tokens)")[1:]
    assert "?" in read and "." not in read
    assert "." in first and "[[<|im_end|>]]" in first and "user" not in first.replace("|", "")
    assert "user" in between.replace("|", "") and "[[<|im_end|>]]" in second
    assert main(["show-data", *words, "--html", "report.html"]) == 0
    page = Path("report.html").read_text()
    assert "predicted tokens" in page and '<div class="segment chosen">' in page


def test_it_needs_the_tokenizer_of_a_model(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-data", words[0], words[2]]) == 2
    assert "set model.partial_pretrain" in capsys.readouterr().err
