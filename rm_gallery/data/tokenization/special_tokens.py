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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rm_gallery.data.tokenization.chats import Chat
from rm_gallery.data.tokenization.turn_tokens import one_of
from rm_gallery.errors import BadRow

# Private-use characters around the placeholders, which contain a random nonce, so that no text can spell one.
_OPEN, _CLOSE, _ALIAS = "\U000f6a10", "\U000f6a11", "\U000f6a12"
_NAMES = ("role", "type", "id", "tool_call_id")  # keys whose values templates compare, if they are plain words
_WORD = re.compile(r"[\w.-]{1,64}")

_USUAL_KEYS = frozenset(["role", "content"])  # of messages; no control token

Substitute = Callable[[re.Match[str]], str]


class ControlTokens:
    """Finds control tokens in contents, hides them from the chat template, and encodes them as plain text."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        """texts: the control tokens; see `turn_tokens`. Other added tokens may be part of contents."""
        self.texts = list(texts)
        self._backend = tokenizer.backend_tokenizer
        self._unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id  # allowed in any text
        self.ids = frozenset(tokenizer.convert_tokens_to_ids(self.texts)) - {self._unknown}
        self._pattern = one_of(self.texts)
        characters = sorted({each for text in self.texts for each in text if not each.isspace()})
        others = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content not in self.texts]
        self._pieces = [
            re.compile(f"{self._pattern.pattern}|(?P<kept>{one_of(others).pattern})|{one_of(some).pattern}")
            for some in (characters, [each for each in characters if not each.isalnum()])
        ]
        self._shown = [*self.texts, *characters]
        self._number = {text: number for number, text in reversed(list(enumerate(self._shown)))}
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
        if isinstance(value, dict | Mapping):
            for key, item in value.items():
                if self.occur_in(item) or (key not in _USUAL_KEYS and self.occur_in(key)):
                    return True
        elif isinstance(value, list | tuple):
            for item in value:
                if self.occur_in(item):
                    return True
        return False

    def count(self, ids: Sequence[int]) -> int:
        """Number of control tokens among these ids."""
        return sum(map(ids.count, self.ids.intersection(ids)))

    def find(self, text: str) -> list[str]:
        """The control tokens in a text, and what is between them: between, token, between, ..."""
        return re.split(f"({self._pattern.pattern})", text)

    def placeholder(self, found: re.Match[str]) -> str:
        """Replaces a match in contents."""
        return f"{self._open}{self._number[found[0]]}{_CLOSE}"

    def hide(self, chat: Chat, substitute: Substitute | None = None) -> Chat:
        """A copy with a placeholder for each control token in contents.

        substitute: decides for each of them, in a fixed order.
        """
        return chat.map(lambda value: _replaced(value, self._pattern, self._pattern, substitute or self.placeholder))

    def hide_pieces(self, chat: Chat, *, words: bool) -> Chat:
        """A copy with a placeholder for each character of contents that a control token has too.

        No control token that the template then writes has a part from contents. Other added tokens stay, since
        templates look for them. words: hide letters and digits too, not only the other characters.
        """
        pattern = self._pieces[0 if words else 1]

        def substitute(found: re.Match[str]) -> str:
            return found[0] if found["kept"] else self.placeholder(found)

        return chat.map(lambda value: _replaced(value, pattern, self._pattern, substitute))

    def show(self, text: str) -> str:
        """The text with every placeholder replaced by what it hides."""
        return self._placeholder.sub(lambda found: self._shown[int(found[1])], text)

    def hides(self, text: str) -> bool:
        """Whether the text has a placeholder."""
        return self._placeholder.search(text) is not None

    def encode_rendered(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered text: placeholders as plain text, every other control token as its id."""
        aliased = self._pattern.sub(lambda found: self._alias_of(self._number[found[0]]), text)
        return self.encode_plain(self.show(aliased), add_special_tokens=add_special_tokens)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_rendered`, and the characters of each token in `text`.

        A token of a part of what a placeholder hides has all characters of the placeholder.
        """
        parts, bounds = [], list[tuple[int, int]]()  # of each character of the text that is encoded, those of `text`
        pieces = re.compile(f"{self._pattern.pattern}|{self._placeholder.pattern}")
        for start, end, part in _pieces(pieces, text):
            if self._pattern.fullmatch(part):
                part = self._alias_of(self._number[part])
            elif self._placeholder.fullmatch(part):
                part = self.show(part)
            else:
                bounds += [(place, place + 1) for place in range(start, end)]
                parts.append(part)
                continue
            bounds += [(start, end)] * len(part)
            parts.append(part)
        ids, offsets = self.plain_tokens("".join(parts))
        bounds.append((len(text), len(text)))
        return ids, [
            (bounds[first][0], bounds[last - 1][1] if last > first else bounds[first][0]) for first, last in offsets
        ]

    def _alias_of(self, number: int) -> str:
        """Replaces a control token of the template; contains the nonce, so contents cannot spell it."""
        return f"{self._alias}{number}{_CLOSE}"

    def encode_plain(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text with its control tokens as plain text.

        add_special_tokens: add those of the tokenizer around the text, as ids.
        Raises BadRow if the tokenizer's model itself produces a control token from plain text.
        """
        return self.plain_tokens(text, add_special_tokens=add_special_tokens)[0]

    def plain_tokens(self, text: str, *, add_special_tokens: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_plain`, and the characters of each token."""
        plain, ids = self._plain_tokenizer()
        encoding = plain.encode(text, add_special_tokens=add_special_tokens)
        found = np.asarray(encoding.ids, np.int64)
        added = np.asarray(encoding.special_tokens_mask, bool)
        if np.isin(found[~added], self._forbidden).any():
            raise BadRow("control token in a text, which this tokenizer cannot read as plain text")
        return ids[found].tolist(), encoding.offsets

    def _plain_tokenizer(self) -> tuple[Any, np.ndarray]:
        """A copy of the tokenizer that recognizes aliases instead of control tokens, and the map back to its ids.

        Aliases inherit the matching flags of their tokens (e.g. `lstrip`), so a text without control tokens in its
        contents gets exactly the ids of the tokenizer itself.
        """
        if self._plain is None:
            from tokenizers import AddedToken, Tokenizer

            state = json.loads(self._backend.to_str())
            for token in state["added_tokens"]:
                token["special"] = token["content"] in self.texts
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


def _pieces(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, text) of the matches of a pattern, and of what is between them."""
    done = 0
    for found in pattern.finditer(text):
        yield done, found.start(), text[done : found.start()]
        yield found.start(), found.end(), found[0]
        done = found.end()
    yield done, len(text), text[done:]


def _replaced(value: Any, pattern: re.Pattern[str], in_keys: re.Pattern[str], substitute: Substitute) -> Any:
    """A copy of a nested value with the matches in its texts replaced. The arguments of a call are contents, keys too.

    in_keys: the pattern for other keys, which templates know by name.
    """
    if isinstance(value, str):
        return pattern.sub(substitute, value)
    if isinstance(value, Mapping):
        return {
            in_keys.sub(substitute, key) if isinstance(key, str) else key: item
            if key in _NAMES and isinstance(item, str) and _WORD.fullmatch(item)
            else _replaced(item, pattern, pattern if key == "arguments" else in_keys, substitute)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_replaced(item, pattern, in_keys, substitute) for item in value]
    return value


def neutral(value: Any, *, content: bool = False) -> Any:
    """A copy with the same structure and roles, whose texts hold nothing. content: keys are contents too."""
    if isinstance(value, str):
        return "a" if value.strip() else value
    if isinstance(value, Mapping):
        return {
            f"a{number}" if content else key: item
            if not content and key in _NAMES and isinstance(item, str) and _WORD.fullmatch(item)
            else neutral(item, content=content or key == "arguments")
            for number, (key, item) in enumerate(value.items())
        }
    if isinstance(value, list | tuple):
        return [neutral(item, content=content) for item in value]
    return value
