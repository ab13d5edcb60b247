"""Views: a group as plain texts, the shared turns apart from each response, with hashes and words; and as ids.

Ids are tokens where there is a tokenizer, else words; encoders turn them back into pieces of text.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from rm_gallery.data.tokenization.encoder import Encoder as GroupEncoder
from rm_gallery.data.tokenization.encoder import Render
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig, fit_length
from rm_gallery.errors import BadRow
from rm_gallery.schema import Comparison, Message, PreferenceGroup

# Scripts that are written without spaces count by the character: kana and Han.
WORD_PATTERN = r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+"
_WORD = re.compile(WORD_PATTERN)


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group as people read it: contents without roles and without a template."""

    prompt: str
    """What stands before every response, turns that all responses begin with included."""
    responses: tuple[str, ...]


def view_of(group: PreferenceGroup) -> GroupView:
    """The group's texts. A conversation that stands in every response is counted to the prompt."""
    if group.style == "text":
        return GroupView(_text(group.prompt), tuple(_text(response) for response in group.responses))
    before = group.prompt if not isinstance(group.prompt, str) else []
    answers = [[response] if isinstance(response, str) else list(response) for response in group.responses]
    shared = 0
    while all(len(answer) > shared + 1 and answer[shared] == answers[0][shared] for answer in answers):
        shared += 1
    return GroupView(
        _text([*before, *answers[0][:shared]] if answers else before),
        tuple(_text(answer[shared:]) for answer in answers),
    )


def _text(part: str | Sequence[str | Message]) -> str:
    if isinstance(part, str):
        return part
    texts = []
    for message in part:
        content = message if isinstance(message, str) else message.get("content") or ""
        calls = None if isinstance(message, str) else message.get("tool_calls")
        texts.append(content if isinstance(content, str) else json.dumps(content, default=str))
        if calls:
            texts.append(json.dumps(calls, sort_keys=True, default=str))
    return "\n".join(text for text in texts if text)


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


class WordIds(dict[str, int]):
    """31-bit numbers of words, `ids[word]`; the frequent words are remembered, which is faster than hashing them."""

    _MOST = 300_000

    def __missing__(self, word: str) -> int:
        number = zlib.crc32(word.encode("utf-8", "surrogatepass")) >> 1
        if len(self) < self._MOST and len(word) < 40:
            self[word] = number
        return number


def hash_text(text: str) -> int:
    """64 bits that are the same in every process; half a character (a lone surrogate) is hashed too."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that belongs together: a token, or the tokens of one character."""

    text: str
    ids: tuple[int, ...]
    special: bool = False
    """A control token: written by the template or the tokenizer, not by the data."""


class Encoder(Protocol):
    """What lengths and samples need."""

    unit: str
    """`tokens` or `words`."""
    max_length: int | None
    """Most units of one prompt with one response, or None when the limit cannot be applied to this unit."""

    def encode(self, groups: Sequence[PreferenceGroup]) -> Sequence[list[list[int]] | BadRow]:
        """Ids of every whole text as [group][response]; a group that cannot be rendered has the reason there."""
        ...

    def fit(self, texts: list[list[int]], group: PreferenceGroup) -> tuple[list[list[int]], Sequence[Comparison]]:
        """The texts under the length policy, and what is compared; raises BadRow for a group that it leaves out."""
        ...

    def pieces(self, ids: Sequence[int], group: PreferenceGroup) -> list[Piece]:
        """Some of the ids of a text of this group as text."""
        ...


class TokenEncoder:
    """As training encodes: the chat template, then the tokenizer."""

    unit = "tokens"

    def __init__(self, tokenizer: Any, config: TokenizeConfig, *, render: Render | None = None) -> None:
        """render: of a custom class, in place of the chat template."""
        self.max_length: int | None = config.max_length
        self._tokenizer, self._config = tokenizer, config
        self._encoder = GroupEncoder(tokenizer, config, render=render)
        self._special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}

    def encode(self, groups: Sequence[PreferenceGroup]) -> Sequence[list[list[int]] | BadRow]:
        return self._encoder.encode_many(groups)

    def fit(self, texts: list[list[int]], group: PreferenceGroup) -> tuple[list[list[int]], Sequence[Comparison]]:
        """Training stops at a text that is too long under `truncation=error`; here it stays, and is counted."""
        too_long = max(len(ids) for ids in texts) > self._config.max_length
        if too_long and not self._config.filter_overlong_prompts and self._config.truncation == "error":
            return texts, group.comparisons
        return fit_length(texts, group, self._tokenizer, self._config)

    def pieces(self, ids: Sequence[int], group: PreferenceGroup) -> list[Piece]:
        """Grown token by token: what one more token adds to the text, so that spaces and split characters are right."""
        found: list[Piece] = []
        start = read = 0
        for end in range(1, len(ids) + 1):
            text = self._decode(ids[start:end])
            if text.endswith("\ufffd") and end < len(ids) and end - read < 4:
                continue  # part of a character; the next token has the rest
            added = text[len(self._decode(ids[start:read])) :]
            found.append(Piece(added, tuple(ids[read:end]), any(each in self._special for each in ids[read:end])))
            start, read = read, end
        return found

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


_WORD_WITH_SPACE = re.compile(r"\s*\S+|\s+$")


class WordEncoder:
    """Stands in for a tokenizer: words with the space before them, chats as `role: content`."""

    unit = "words"
    max_length: int | None = None

    def __init__(self) -> None:
        self._ids = WordIds()

    def encode(self, groups: Sequence[PreferenceGroup]) -> Sequence[list[list[int]] | BadRow]:
        return [self._encode(group) for group in groups]

    def _encode(self, group: PreferenceGroup) -> list[list[int]]:
        prompt, *responses = ([self._ids[word] for word in words] for words in _words(group))
        return [prompt + response for response in responses]

    def fit(self, texts: list[list[int]], group: PreferenceGroup) -> tuple[list[list[int]], Sequence[Comparison]]:
        return texts, group.comparisons

    def pieces(self, ids: Sequence[int], group: PreferenceGroup) -> list[Piece]:
        known = {self._ids[word]: word for words in _words(group) for word in words}
        return [Piece(known[each], (each,)) for each in ids]


def _words(group: PreferenceGroup) -> list[list[str]]:
    """Words of the prompt, then of each response."""
    return [_WORD_WITH_SPACE.findall(_plain(part)) for part in (group.prompt, *group.responses)]


def _plain(part: str | Sequence[Message]) -> str:
    if isinstance(part, str):
        return part
    return "".join(f"{message.get('role')}: {message.get('content') or ''}\n" for message in part)
