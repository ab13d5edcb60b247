"""Reward models of all kinds, made on the spot: exported by us, and as other people's folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rm_gallery.modeling.export import InputRecord, set_pad_token
from rm_gallery.modeling.reward_model import RewardModel, load_reward_model
from rm_gallery.schema import InputStyle
from tests.small import ENCODERS, export_model, make_model, make_tokenizer


def make_checkpoint(
    kind: str, folder: Path, *, style: InputStyle = "text", seed: int = 0, template: str | None = None, **record: Any
) -> tuple[Path, RewardModel]:
    """A checkpoint folder as training leaves it, and the trainer's model. template: a chat template of its own."""
    base = make_model(kind, folder / "base", seed=seed)
    torch.manual_seed(seed)
    model = load_reward_model(str(base)).model.eval()
    tokenizer = make_tokenizer(encoder=kind in ENCODERS)
    tokenizer.chat_template = template or tokenizer.chat_template
    set_pad_token(model, tokenizer)
    return export_model(folder / "global_step_1", model, tokenizer, InputRecord(style, **record)), model


def make_classifier(kind: str, folder: Path, *, num_labels: int = 1, chat: bool = False, **extra: Any) -> Path:
    """A sequence classification model straight from the library, with EOS as its pad token."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    size: dict[str, Any] = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.2,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**size, **extra}, num_labels=num_labels)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    if not chat:
        tokenizer.chat_template = None
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


def plain_rewards(folder: Path, texts: list[str]) -> list[float]:
    """Each text alone through plain transformers, float32, as the tokenizer gives it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [network(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0].item() for text in texts]
