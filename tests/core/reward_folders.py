"""Checkpoint folders as the trainer exports them, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rm_gallery.modeling.export import InputRecord, set_pad_token
from rm_gallery.modeling.reward_model import load_reward_model
from tests.small import export_model, make_model, make_tokenizer


def make_reward_folder(folder: Path, style: Any = "chat", kind: str = "qwen2") -> Path:
    """A random reward model that was "trained" on chats or raw text; returns folder/global_step_1."""
    base = make_model(kind, folder / "base", seed=3)
    torch.manual_seed(3)
    model = load_reward_model(str(base)).model
    torch.nn.init.normal_(model.head.weight)  # type: ignore[arg-type]
    tokenizer = make_tokenizer()
    set_pad_token(model, tokenizer)
    return export_model(folder / "global_step_1", model, tokenizer, InputRecord(style, max_length=512))


def plain_rewards(folder: Path, conversations: list[list[dict[str, str]]]) -> list[float]:
    """What transformers by itself gives, one conversation at a time, through the tokenizer's chat template."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rewards = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            rewards.append(network(**inputs).logits[0, 0].item())
    return rewards
