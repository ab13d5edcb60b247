"""Tokenizing: groups become token ids, under a length policy, with the common prefix split off.

Each whole text is tokenized by itself and the prefix is found on the tokens, so a packed group holds exactly the
tokens that any server makes of the same text. Needs a tokenizer, never torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from rm_gallery.data.dropped import BadRow, Dropped
from rm_gallery.data.length import LengthConfig, fit_length
from rm_gallery.data.token_data import TokenData, TokenGroup, split_prefix
from rm_gallery.errors import UserError
from rm_gallery.schema import InputStyle, PreferenceGroup

_CHUNK_GROUPS = 512

RenderChat: TypeAlias = Callable[..., str]
"""`render(prompt_messages, response_messages, where="file:row")` -> whole text, in place of the chat template."""


@dataclass(frozen=True)
class TokenizeConfig(LengthConfig):
    """Part of `data`: from text to tokens."""

    append_eos: bool = False
    """Close texts in style `text` with the end-of-sequence token; servers that read the model must do the same."""
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


def encode(
    group: PreferenceGroup, tokenizer: Any, config: TokenizeConfig, render_chat: RenderChat | None = None
) -> list[list[int]]:
    """Token ids of each whole text of the group; see `encode_many`."""
    return encode_many([group], tokenizer, config, render_chat)[0]


def encode_many(
    groups: Sequence[PreferenceGroup], tokenizer: Any, config: TokenizeConfig, render_chat: RenderChat | None = None
) -> list[list[list[int]]]:
    """Token ids of every whole text, as `[group][response]`, before any length policy.

    Chats are rendered by the template, which writes the special tokens itself, but for the CLS that an encoder's
    head reads; bare texts get those that the tokenizer adds by itself, but no second BOS where the text already
    begins with one.
    """
    plain: list[str] = []  # texts that get the tokenizer's special tokens
    rendered: list[str] = []  # texts that hold them already
    place: list[list[tuple[bool, int]]] = []
    bos, cls = tokenizer.bos_token or "", tokenizer.cls_token or ""
    for group in groups:
        places = []
        for text in render(group, tokenizer, config, render_chat):
            if group.style == "chat":
                target = plain if cls and not text.startswith(cls) else rendered
            else:
                target = rendered if bos and text.startswith(bos) else plain
            places.append((target is rendered, len(target)))
            target.append(text)
        place.append(places)
    ids = {False: _encode_texts(plain, tokenizer, True), True: _encode_texts(rendered, tokenizer, False)}
    return [[ids[kind][index] for kind, index in places] for places in place]


def _encode_texts(texts: list[str], tokenizer: Any, add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: the library would warn about texts longer than the model; the length policy comes after.
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def render(
    group: PreferenceGroup, tokenizer: Any, config: TokenizeConfig, render_chat: RenderChat | None = None
) -> list[str]:
    """The K whole texts of a group, as they are tokenized.

    Raises BadRow for a conversation that the chat template refuses and for half a character (a lone surrogate,
    which JSON can spell), UserError when there is no template or a broken one.
    """
    if group.style == "text":
        texts = _render_texts(group, tokenizer, config)
    elif render_chat is not None:
        texts = [render_chat(group.prompt, response, where=group.where) for response in group.responses]
    else:
        texts = _render_chats(group, tokenizer)
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise BadRow("half a character (a lone surrogate) in a text") from None
    return texts


def _render_texts(group: PreferenceGroup, tokenizer: Any, config: TokenizeConfig) -> list[str]:
    assert isinstance(group.prompt, str)
    eos = tokenizer.eos_token or tokenizer.sep_token or ""
    texts = [f"{group.prompt}{response}" for response in group.responses]
    return [text + eos if config.append_eos and not text.endswith(eos) else text for text in texts]


def _render_chats(group: PreferenceGroup, tokenizer: Any) -> list[str]:
    from jinja2 import TemplateSyntaxError

    if tokenizer.chat_template is None:
        raise UserError(
            f"{group.where}: the data are chat messages but the tokenizer has no chat template; "
            "set data.chat_template to one, or give bare texts"
        )
    assert not isinstance(group.prompt, str)
    try:
        conversations = [[*group.prompt, *response] for response in group.responses]
        return [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    except TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); "
            "mend it, or set data.chat_template to another"
        ) from error
    except Exception as error:
        # Templates end in jinja's exceptions or in plain TypeErrors; either way this row does not fit the template.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadRow(f"chat template refuses the conversation: {reason[:200]}") from error


def tokenize_groups(
    groups: Iterable[PreferenceGroup],
    tokenizer: Any,
    config: TokenizeConfig,
    *,
    dropped: Dropped,
    bad_rows: str = "drop",
    render_chat: RenderChat | None = None,
) -> TokenData:
    """Token arrays of all usable groups; the others are added to `dropped`.

    Raises UserError for data that mix chats with bare texts, for a text that is too long under
    `truncation=error`, and at the first bad row under `bad_rows=error`.
    """
    styles: dict[InputStyle, str] = {}
    prompted: set[bool] = set()

    def produce() -> Iterator[tuple[TokenGroup, str]]:
        source = iter(groups)
        while chunk := list(islice(source, _CHUNK_GROUPS)):
            for group in chunk:
                styles.setdefault(group.style, group.where)
                if group.style == "text" and group.prompt:
                    prompted.add(True)
            if len(styles) > 1:
                raise UserError(
                    f"the data mix chat messages ({styles['chat']}) with bare texts ({styles['text']}); "
                    "set data.input_style=chat to read all as chats, or split the files"
                )
            for group, texts in _encode_chunk(chunk, tokenizer, config, dropped, bad_rows, render_chat):
                try:
                    yield split_prefix(fit_length(texts, group, tokenizer, config), group.comparisons), group.where
                except BadRow as error:
                    _drop(error, group.where, dropped, bad_rows)

    data = TokenData(produce(), "text")
    data.style = next(iter(styles), "text")
    data.has_text_prompts = bool(prompted)
    return data


def _encode_chunk(
    chunk: list[PreferenceGroup],
    tokenizer: Any,
    config: TokenizeConfig,
    dropped: Dropped,
    bad_rows: str,
    render_chat: RenderChat | None,
) -> Iterator[tuple[PreferenceGroup, list[list[int]]]]:
    try:
        yield from zip(chunk, encode_many(chunk, tokenizer, config, render_chat), strict=True)
        return
    except BadRow:
        pass  # one of them cannot be rendered: find out which, one by one
    for group in chunk:
        try:
            yield group, encode(group, tokenizer, config, render_chat)
        except BadRow as error:
            _drop(error, group.where, dropped, bad_rows)


def _drop(error: BadRow, where: str, dropped: Dropped, bad_rows: str) -> None:
    if bad_rows == "error":
        raise UserError(f"{where}: {error}; mend the row, or set data.bad_rows=drop to leave it out") from None
    dropped.add(str(error), where)
