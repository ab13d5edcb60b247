"""The tokenizer of a run: from a model folder, with the chat template and the settings of the configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rm_gallery.data.length import LengthConfig
from rm_gallery.errors import UserError


@dataclass(frozen=True)
class TokenizeConfig(LengthConfig):
    """Part of `data`: from text to tokens."""

    append_eos: bool = False
    """Close texts in style `text` with the end-of-sequence token; servers that read the model must do the same."""
    text_special_tokens: Literal["parse", "plain"] = "parse"
    """Control tokens that bare texts spell (`<|im_end|>`, say): `parse` reads them as such, since such texts may be
    rendered chats; `plain` as ordinary text. In the contents of chat messages they are always ordinary text."""
    chat_template: str | None = None
    """A Jinja chat template or the file that holds one, instead of the tokenizer's own."""


def load_tokenizer(
    path: str, *, key: str = "model.partial_pretrain", trust_remote_code: bool = False, chat_template: str | None = None
) -> Any:
    """A fast tokenizer from a model folder, with the chat template from the configuration if one is given.

    key: configuration key that `path` came from, for messages.
    Raises UserError when the folder has no tokenizer or only a slow one, or the template cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if not os.path.isdir(os.path.expanduser(path)):
            raise UserError(
                f"{key}={path}: neither a folder (working directory {os.getcwd()}) nor a model that the hub gives "
                f"({reason}); name a model folder"
            ) from error
        raise UserError(
            f"{key}={path}: no tokenizer can be loaded from there ({reason}); "
            "the folder needs tokenizer.json and tokenizer_config.json"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{key}={path}: only a slow tokenizer is there; save it with a tokenizer.json")
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # For a folder without tokenizer files the library makes an empty tokenizer of the model's class.
        raise UserError(f"{key}={path}: there is no tokenizer; copy tokenizer.json and tokenizer_config.json there")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    return tokenizer


def _read_template(text: str) -> str:
    """The template itself, from `data.chat_template`: Jinja text or the name of a file."""
    if "{{" in text or "{%" in text:
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template={text[:100]}: neither a Jinja template nor a file that holds one ({error})"
        ) from error
