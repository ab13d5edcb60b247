"""Control tokens: those with which a chat template marks turns, and how content that spells one stays plain text.

A message that holds the text `<|im_end|>` must not end its turn. So control tokens in message contents are exchanged
for stand-ins before the template is rendered, and what is rendered is tokenized so that the template's own control
tokens become their ids while those of the contents become the tokens of ordinary text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from rm_gallery.errors import BadRow

# Private-use characters around the stand-ins, which hold a number that nobody who writes a text can know.
_OPEN, _CLOSE, _ALIAS = "\U000f6a10", "\U000f6a11", "\U000f6a12"
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})


def control_tokens(tokenizer: Any) -> list[str]:
    """Texts of the tokens that only a template may write, in the order of their ids.

    All special tokens, and the added tokens that the chat template writes around turns in the middle of a
    conversation although they are not flagged as special. Others (`<think>`, say) belong to contents.
    """
    added = sorted(tokenizer.added_tokens_decoder.items())
    around_turns = _around_turns(tokenizer)
    named = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    return [
        token.content
        for _, token in added
        if token.content and (token.special or token.content in named or token.content in around_turns)
    ]


def _around_turns(tokenizer: Any) -> str:
    if tokenizer.chat_template is None:
        return ""
    try:
        return str(tokenizer.apply_chat_template(list(_PROBE), tokenize=False))
    except Exception:  # a template that takes no such conversation, or a broken one: the first row says so
        return ""


class ControlTokens:
    """The control tokens of a tokenizer: found in contents, hidden from the template, and kept out of their ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts = control_tokens(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        self._unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id  # any text may hold it
        longest_first = sorted(self.texts, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._number = {text: number for number, text in enumerate(self.texts)}
        secret = secrets.randbelow(10**12)
        self._open, self._alias = f"{_OPEN}{secret}:", f"{_ALIAS}{secret}:"
        self._stand_in = re.compile(f"{self._open}([0-9]+){_CLOSE}")
        self._plain: Any = None
        self._forbidden = np.zeros(0, np.int64)  # ids of the control tokens themselves
        self._ids: np.ndarray | None = None  # [size of the plain tokenizer's vocabulary] -> id of the tokenizer

    def occur_in(self, value: Any) -> bool:
        """Whether a text in this value (messages, say; keys of mappings count too) spells a control token."""
        if isinstance(value, str):
            return self._pattern.search(value) is not None
        if isinstance(value, Mapping):
            return any(self.occur_in(key) or self.occur_in(item) for key, item in value.items())
        if isinstance(value, list | tuple):
            return any(map(self.occur_in, value))
        return False

    def hide(self, value: Any) -> Any:
        """A copy of the value with a stand-in for each control token in its texts."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: f"{self._open}{self._number[found[0]]}{_CLOSE}", value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def show(self, text: str) -> str:
        """The text with every stand-in replaced by what it stands for."""
        return self._stand_in.sub(lambda found: self.texts[int(found[1])], text)

    def encode_rendered(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered text: its stand-ins as ordinary text, every other control token as its id."""
        aliased = self._pattern.sub(lambda found: self._alias_of(self._number[found[0]]), text)
        return self.encode_plain(self.show(aliased), add_special_tokens=add_special_tokens)

    def _alias_of(self, number: int) -> str:
        """A name for a control token of the template's own that contents cannot spell."""
        return f"{self._alias}{number}{_CLOSE}"

    def encode_plain(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text in which no control token is read as one; those that are added around it are ids.

        Raises BadRow when the tokenizer's model itself makes a control token out of ordinary text.
        """
        plain, ids = self._plain_tokenizer()
        encoding = plain.encode(text, add_special_tokens=add_special_tokens)
        found = np.asarray(encoding.ids, np.int64)
        written = np.asarray(encoding.special_tokens_mask, bool)  # by the tokenizer, around the text
        if np.isin(found[~written], self._forbidden).any():
            raise BadRow("control token in a text, which this tokenizer cannot read as plain text")
        return ids[found].tolist()

    def _plain_tokenizer(self) -> tuple[Any, np.ndarray]:
        """A copy of the tokenizer that reads no control token in a text, but aliases of them; and ids as they were.

        Aliases are matched as the tokens themselves would be (spaces that a token swallows included), so a text
        without control tokens in its contents gets the very tokens of the tokenizer itself.
        """
        if self._plain is None:
            from tokenizers import AddedToken, Tokenizer

            state = json.loads(self._backend.to_str())
            for token in state["added_tokens"]:
                token["special"] = token["special"] or token["content"] in self._number
            flags = {token["content"]: token for token in state["added_tokens"]}
            plain = Tokenizer.from_str(json.dumps(state))
            plain.encode_special_tokens = True  # special tokens in a text are not read as such; the aliases are
            plain.no_truncation()
            plain.no_padding()
            aliases = {
                self._alias_of(number): AddedToken(
                    self._alias_of(number),
                    special=False,
                    normalized=False,
                    **{flag: flags[text][flag] for flag in ("lstrip", "rstrip", "single_word")},
                )
                for number, text in enumerate(self.texts)
            }
            plain.add_tokens(list(aliases.values()))
            vocabulary = plain.get_vocab(with_added_tokens=True)
            numbers = [vocabulary[alias] for alias in aliases]
            ids = np.arange(max(vocabulary.values()) + 1)
            ids[numbers] = [vocabulary[text] for text in self.texts]
            self._forbidden = np.setdiff1d(ids[numbers], [self._unknown])
            self._plain, self._ids = plain, ids
        assert self._ids is not None
        return self._plain, self._ids
