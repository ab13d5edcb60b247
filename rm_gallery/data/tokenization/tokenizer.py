"""Loads the tokenizer with its chat template, and applies the length policy `data.max_length`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rm_gallery.data.formats.config import TargetsConfig
from rm_gallery.data.sources.hub import go_offline_if_unreachable, model_not_found
from rm_gallery.errors import BadRow, UserError, one_line
from rm_gallery.schema import Comparison, PreferenceGroup


@dataclass(frozen=True)
class LengthConfig(TargetsConfig):
    """Part of `data`: the length policy."""

    __pydantic_config__ = {"extra": "forbid"}

    max_length: int = 4096
    """Maximum tokens of a prompt with one response."""
    filter_overlong_prompts: bool = True
    """Drop and count groups with a text longer than `max_length`; nothing is truncated then."""
    truncation: Literal["error", "left", "right"] = "error"
    """Without that filter: `error` stops at the first such text; `left` and `right` truncate it on that side."""


_CLOSING = "rm_gallery_closing"


def read_at(tokenizer: Any, token: int | None, *, what: str) -> None:
    """Note the token at which the model reads its reward, if it is a token: each text then has to have exactly one.

    Raises UserError, which begins with `what`, if the tokenizer does not end texts with it.
    """
    setattr(tokenizer, _CLOSING, token)
    if token is not None and list(tokenizer("A text.")["input_ids"]).count(token) != 1:
        raise UserError(
            f"{what}: the model reads the reward at its EOS token (id {token}), and the tokenizer writes none at "
            "the end of a text; use the model's own tokenizer"
        )


def closing_of(tokenizer: Any) -> int | None:
    """The token that `read_at` noted."""
    found: int | None = getattr(tokenizer, _CLOSING, None)
    return found


def check_closing(texts: Sequence[Sequence[int]], tokenizer: Any) -> None:
    """Raise BadRow for a text in which the token that the model reads at does not occur exactly once."""
    token = closing_of(tokenizer)
    if token is not None and any(list(ids).count(token) != 1 for ids in texts):
        raise BadRow("not exactly one EOS token, at which the model reads the reward")


def too_long(config: LengthConfig) -> str:
    """Reason of a group that is dropped for its length."""
    return f"longer than data.max_length={config.max_length}"


def fit_length(
    texts: list[list[int]], group: PreferenceGroup, tokenizer: Any, config: LengthConfig
) -> tuple[list[list[int]], Sequence[Comparison]]:
    """Texts as token ids under the length policy, and the comparisons whose sides still differ.

    Raises BadRow for a group that is dropped for its length, and for one whose comparisons all have equal sides.
    Raises UserError under `truncation=error`.
    """
    longest = max(map(len, texts), default=0)
    if longest <= config.max_length:
        fitted = texts
    elif config.filter_overlong_prompts:
        raise BadRow(too_long(config))
    elif config.truncation == "error":
        raise UserError(
            f"{group.where}: a text of {longest} tokens is longer than data.max_length={config.max_length}; raise it, "
            "set data.filter_overlong_prompts=true to drop such rows, or data.truncation=left|right to truncate them"
        )
    else:
        fitted = [_truncate(ids, tokenizer, config) for ids in texts]
        check_closing(fitted, tokenizer)
    differing = [each for each in group.comparisons if fitted[each.better] != fitted[each.worse]]
    if group.comparisons and not differing:
        when = " after truncation" if longest > config.max_length else " as tokens"
        raise BadRow(f"chosen equal to rejected{when}")
    return fitted, differing


def _truncate(ids: list[int], tokenizer: Any, config: LengthConfig) -> list[int]:
    """At most `max_length` tokens; BOS or CLS at the start and EOS or SEP at the end are kept, except in conversations.

    Example, max_length 4, truncation left: [BOS 1 2 3 4 EOS] gives [BOS 3 4 EOS].
    """
    excess = len(ids) - config.max_length
    if excess <= 0:
        return ids
    if config.lm_targets == "assistant":  # no EOS where the text goes on
        return ids[: config.max_length]
    special = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    head = 1 if ids[0] in special else 0
    tail = 1 if ids[-1] in closing and config.max_length > head + 1 else 0
    body = ids[head : len(ids) - tail]
    body = body[excess:] if config.truncation == "left" else body[: len(body) - excess]
    return ids[:head] + body + ids[len(ids) - tail :]


@dataclass(frozen=True)
class TokenizeConfig(LengthConfig):
    """Part of `data`: tokenization."""

    append_eos: bool = False
    """Append the EOS token to raw texts; servers of the model must do the same."""
    text_special_tokens: Literal["parse", "plain"] = "parse"
    """Control tokens such as `<|im_end|>` in raw texts: `parse` reads them as tokens, since the texts may be rendered
    chats; `plain` as plain text. In contents of chat messages they are always plain text."""
    chat_template: str | None = None
    """A Jinja chat template, or a file with one, instead of that of the tokenizer."""
    template_date: str | None = None
    """Date (YYYY-MM-DD) that a chat template writes as today's; default: the day of the run, kept when it is resumed.
    Checkpoints write the same date."""


def load_tokenizer(
    path: str, *, key: str = "model.partial_pretrain", trust_remote_code: bool = False, chat_template: str | None = None
) -> Any:
    """Load a fast tokenizer from a model folder or the hub.

    key: configuration key of `path`, for messages. chat_template: replaces that of the tokenizer.
    Raises UserError if there is no fast tokenizer or the template cannot be read.
    """
    from transformers import AutoTokenizer

    is_folder = os.path.isdir(os.path.expanduser(path))
    if not is_folder:
        go_offline_if_unreachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        if not is_folder:
            raise model_not_found(path, error, key=key) from error
        found = [each.parent for each in Path(path).expanduser().glob("global_step_*/tokenizer_config.json")]
        steps = {int(each.name[12:]): each for each in found if each.name[12:].isdecimal()}
        if steps:
            newest = steps[max(steps)]
            raise UserError(f"{key}={path}: the folder of a run; name one of its checkpoints, e.g. {newest}") from error
        raise UserError(
            f"{key}={path}: no tokenizer can be loaded from there ({one_line(error)}); "
            "the folder needs tokenizer.json and tokenizer_config.json"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{key}={path}: only a slow tokenizer found; save it with a tokenizer.json")
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # Without tokenizer files, transformers creates an empty tokenizer of the model's class.
        raise UserError(f"{key}={path}: there is no tokenizer; copy tokenizer.json and tokenizer_config.json there")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(path)
    return tokenizer


def _processor_template(path: str) -> str | None:
    """The template that older processors of multimodal models have in a file of their own."""
    from transformers.utils import cached_file

    try:
        file = cached_file(os.path.expanduser(path), "chat_template.json", _raise_exceptions_for_missing_entries=False)
        values = json.loads(Path(file).read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return None
    found = values.get("chat_template") if isinstance(values, dict) else None
    return found if isinstance(found, str) else None


def _read_template(text: str) -> str:
    """The template from `data.chat_template`: Jinja text, or a file."""
    if "{{" in text or "{%" in text:
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template={text[:100]}: neither a Jinja template nor a file with one ({error})"
        ) from error
