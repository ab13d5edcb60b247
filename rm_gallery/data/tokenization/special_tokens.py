"""Special tokens in user text: content that spells a control token of the chat template is tokenized as plain text.

A message that contains `<|im_end|>` must not end its turn. Example with the content `a<|im_end|>`:

    hide              a{0}                                placeholders with a random nonce replace control tokens
    chat template     <|im_start|>user\na{0}<|im_end|>
    encode_rendered   the template's own tokens become aliases, {0} becomes `<|im_end|>` again, and a copy of the
                      tokenizer that knows only the aliases encodes the text; alias ids map back to the real ids
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from rm_gallery.errors import BadRow

# Private-use characters around the placeholders, which contain a random nonce, so that no text can spell one.
_OPEN, _CLOSE, _ALIAS = "\U000f6a10", "\U000f6a11", "\U000f6a12"
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})


def control_tokens(tokenizer: Any) -> list[str]:
    """Control tokens: tokens that only the chat template may produce, ordered by id.

    All special tokens, and added tokens that the chat template writes around turns without being flagged as special.
    Other added tokens, such as `<think>`, may be part of contents.
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
    except Exception:  # the template rejects this conversation or is broken; the first row reports it
        return ""


class ControlTokens:
    """Finds control tokens in contents, hides them from the chat template, and encodes them as plain text."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts = control_tokens(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        self._unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id  # allowed in any text
        longest_first = sorted(self.texts, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._number = {text: number for number, text in enumerate(self.texts)}
        nonce = secrets.randbelow(10**12)
        self._open, self._alias = f"{_OPEN}{nonce}:", f"{_ALIAS}{nonce}:"
        self._placeholder = re.compile(f"{self._open}([0-9]+){_CLOSE}")
        self._plain: Any = None
        self._forbidden = np.zeros(0, np.int64)  # ids of the control tokens themselves
        self._ids: np.ndarray | None = None  # id of the plain tokenizer -> id of the tokenizer

    def occur_in(self, value: Any) -> bool:
        """Whether any text in a nested value, mapping keys included, spells a control token."""
        if isinstance(value, str):
            return self._pattern.search(value) is not None
        if isinstance(value, Mapping):
            return any(self.occur_in(key) or self.occur_in(item) for key, item in value.items())
        if isinstance(value, list | tuple):
            return any(map(self.occur_in, value))
        return False

    def hide(self, value: Any) -> Any:
        """A copy of a nested value with a placeholder for each control token in its texts."""
        if isinstance(value, str):
            return self._pattern.sub(lambda found: f"{self._open}{self._number[found[0]]}{_CLOSE}", value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def show(self, text: str) -> str:
        """The text with every placeholder replaced by its control token."""
        return self._placeholder.sub(lambda found: self.texts[int(found[1])], text)

    def encode_rendered(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered text: placeholders as plain text, every other control token as its id."""
        aliased = self._pattern.sub(lambda found: self._alias_of(self._number[found[0]]), text)
        return self.encode_plain(self.show(aliased), add_special_tokens=add_special_tokens)

    def _alias_of(self, number: int) -> str:
        """Replaces a control token of the template; contains the nonce, so contents cannot spell it."""
        return f"{self._alias}{number}{_CLOSE}"

    def encode_plain(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text with its control tokens as plain text.

        add_special_tokens: add those of the tokenizer around the text, as ids.
        Raises BadRow if the tokenizer's model itself produces a control token from plain text.
        """
        plain, ids = self._plain_tokenizer()
        encoding = plain.encode(text, add_special_tokens=add_special_tokens)
        found = np.asarray(encoding.ids, np.int64)
        added = np.asarray(encoding.special_tokens_mask, bool)
        if np.isin(found[~added], self._forbidden).any():
            raise BadRow("control token in a text, which this tokenizer cannot read as plain text")
        return ids[found].tolist()

    def _plain_tokenizer(self) -> tuple[Any, np.ndarray]:
        """A copy of the tokenizer that recognizes aliases instead of control tokens, and the map back to its ids.

        Aliases inherit the matching flags of their tokens (e.g. `lstrip`), so a text without control tokens in its
        contents gets exactly the ids of the tokenizer itself.
        """
        if self._plain is None:
            from tokenizers import AddedToken, Tokenizer

            state = json.loads(self._backend.to_str())
            for token in state["added_tokens"]:
                token["special"] = token["special"] or token["content"] in self._number
            flags = {token["content"]: token for token in state["added_tokens"]}
            plain = Tokenizer.from_str(json.dumps(state))
            plain.encode_special_tokens = True  # special tokens in a text are split; aliases are not special
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
