"""The tokenizer of a run: from a model folder, with the chat template and the settings of the configuration.

The length policy stands here too: what happens to texts with more tokens than `data.max_length`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rm_gallery.errors import BadRow, UserError, one_line
from rm_gallery.schema import Comparison, PreferenceGroup


@dataclass(frozen=True)
class LengthConfig:
    """Part of `data`: what happens to texts that are too long."""

    __pydantic_config__ = {"extra": "forbid"}

    max_length: int = 4096
    """Most tokens of one prompt with one response."""
    filter_overlong_prompts: bool = True
    """Leave out, and count, a group with a text longer than `max_length`; nothing is ever cut then."""
    truncation: Literal["error", "left", "right"] = "error"
    """Without that filter: stop at the first such text, or keep its last (`left` is cut) or first tokens."""


def fit_length(
    texts: list[list[int]], group: PreferenceGroup, tokenizer: Any, config: LengthConfig
) -> tuple[list[list[int]], Sequence[Comparison]]:
    """The same texts under the length policy, and the comparisons whose sides still differ.

    Raises BadRow for a group that the policy leaves out, and for one whose comparisons all have equal sides.
    """
    longest = max(map(len, texts), default=0)
    if longest <= config.max_length:
        fitted = texts
    elif config.filter_overlong_prompts:
        raise BadRow(f"longer than data.max_length={config.max_length}")
    elif config.truncation == "error":
        raise UserError(
            f"{group.where}: a text of {longest} tokens is longer than data.max_length={config.max_length}; raise it, "
            "set data.filter_overlong_prompts=true to leave such rows out, or data.truncation=left|right to cut them"
        )
    else:
        fitted = [_cut(ids, tokenizer, config) for ids in texts]
    differing = [each for each in group.comparisons if fitted[each.better] != fitted[each.worse]]
    if group.comparisons and not differing:
        cut = " after truncation" if longest > config.max_length else " as tokens"
        raise BadRow(f"chosen equal to rejected{cut}")
    return fitted, differing


def _cut(ids: list[int], tokenizer: Any, config: LengthConfig) -> list[int]:
    """At most `max_length` tokens; the special tokens that open and close a bare text stay where they are."""
    excess = len(ids) - config.max_length
    if excess <= 0:
        return ids
    special = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    head = 1 if ids[0] in special else 0
    tail = 1 if ids[-1] in closing and config.max_length > head + 1 else 0
    body = ids[head : len(ids) - tail]
    body = body[excess:] if config.truncation == "left" else body[: len(body) - excess]
    return ids[:head] + body + ids[len(ids) - tail :]


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
        reason = one_line(error)
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
