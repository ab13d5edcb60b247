"""Texts of a group: plain contents with their words and hashes, and the pieces that a sample is displayed in.

With a tokenizer, lengths are in tokens; without one, `WordEncoder` takes its place and lengths are in words.
"""

from __future__ import annotations

import json
import re
import unicodedata
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from rm_gallery.data.tokenization.encoder import Encoder, Render
from rm_gallery.data.tokenization.tokenizer import TokenizeConfig
from rm_gallery.errors import BadRow
from rm_gallery.schema import Comparison, Message, PreferenceGroup

# Kana and Han are written without spaces: every character counts as a word.
WORD_PATTERN = r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+"
_WORD = re.compile(WORD_PATTERN)


@dataclass(frozen=True, slots=True)
class GroupTexts:
    """Plain text of a group: contents of messages without roles and chat template."""

    prompt: str
    """Turns that all responses begin with are included."""
    responses: tuple[str, ...]


def texts_of(group: PreferenceGroup) -> GroupTexts:
    """The group's texts. Turns that all responses begin with are part of the prompt."""
    if group.style == "text":
        return GroupTexts(_text(group.prompt), tuple(_text(response) for response in group.responses))
    before = group.prompt if not isinstance(group.prompt, str) else []
    answers = [[response] if isinstance(response, str) else list(response) for response in group.responses]
    shared = 0
    while all(len(answer) > shared + 1 and answer[shared] == answers[0][shared] for answer in answers):
        shared += 1
    return GroupTexts(
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
    """31-bit hashes of words, `ids[word]`. Frequent words are cached, which is faster than hashing them again."""

    _MAX_CACHED = 300_000

    def __missing__(self, word: str) -> int:
        number = zlib.crc32(word.encode("utf-8", "surrogatepass")) >> 1
        if len(self) < self._MAX_CACHED and len(word) < 40:
            self[word] = number
        return number


def hash_text(text: str) -> int:
    """64-bit hash, the same in every process; lone surrogates are hashed too."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


# C0 and C1 controls (terminal escape sequences), lone surrogates, and marks that change the reading direction.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def visible(text: str) -> str:
    """The text with control characters escaped (`\\x1b`); tabs and line breaks stay."""
    return _CONTROL.sub(lambda found: _escape(found.group()), text)


def one_line(text: str) -> str:
    """The same with tabs and line breaks escaped too."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _escape(character: str) -> str:
    is_control = unicodedata.category(character) == "Cc" and ord(character) < 256
    return f"\\x{ord(character):02x}" if is_control else f"\\u{ord(character):04x}"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one token, or of the tokens of one character; a word with the space before it."""

    text: str
    ids: tuple[int, ...]
    special: bool = False
    """A special token, written by the chat template or the tokenizer."""


class InspectionEncoder(Protocol):
    """What the report needs besides the ids that `RowProcessor` asks for."""

    unit: str
    """`tokens` or `words`."""
    max_length: int | None
    """`data.max_length`; None when the unit is words."""
    longest: array[int]
    """Length of the longest text of every encoded group, before the length policy drops or truncates it."""

    def pieces(self, ids: Sequence[int], group: PreferenceGroup) -> list[Piece]:
        """Some ids of a text of this group as text."""
        ...


class TokenEncoder(Encoder):
    """The encoder of training. Records lengths before the length policy, and never stops at a text that is too long."""

    unit = "tokens"

    def __init__(self, tokenizer: Any, config: TokenizeConfig, *, render: Render | None = None) -> None:
        super().__init__(tokenizer, config, render=render)
        self.max_length: int | None = config.max_length
        self.longest = array("q")
        self._special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}

    def fit(self, texts: list[list[int]], group: PreferenceGroup) -> tuple[list[list[int]], Sequence[Comparison]]:
        """Under `truncation=error`, where training stops, a text that is too long is kept and counted."""
        self.longest.append(max(map(len, texts)))
        too_long = self.longest[-1] > self.config.max_length
        if too_long and not self.config.filter_overlong_prompts and self.config.truncation == "error":
            return texts, group.comparisons
        return super().fit(texts, group)

    def pieces(self, ids: Sequence[int], group: PreferenceGroup) -> list[Piece]:
        """Each piece is what one more token adds to the decoded text, so spaces and split characters are right."""
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
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


_WORD_WITH_SPACE = re.compile(r"\s*\S+|\s+$")


class WordEncoder:
    """Takes the place of a tokenizer: words with the space before them, chats as `role: content`, no length policy."""

    unit = "words"
    max_length: int | None = None

    def __init__(self, tokenizer: Any, config: TokenizeConfig, *, render: Render | None = None) -> None:
        """Same signature as `Encoder`; the arguments are not used."""
        self.longest = array("q")
        self._ids = WordIds()

    def encode_many(self, groups: Sequence[PreferenceGroup]) -> list[list[list[int]] | BadRow]:
        return [self._encode(group) for group in groups]

    def _encode(self, group: PreferenceGroup) -> list[list[int]]:
        prompt, *responses = ([self._ids[word] for word in words] for words in _words(group))
        return [prompt + response for response in responses]

    def fit(self, texts: list[list[int]], group: PreferenceGroup) -> tuple[list[list[int]], Sequence[Comparison]]:
        self.longest.append(max(map(len, texts)))
        return texts, group.comparisons

    def pieces(self, ids: Sequence[int], group: PreferenceGroup) -> list[Piece]:
        known = {self._ids[word]: word for words in _words(group) for word in words}
        return [Piece(known[each], (each,)) for each in ids]


def _words(group: PreferenceGroup) -> list[list[str]]:
    """Words of the prompt, then of each response."""
    return [_WORD_WITH_SPACE.findall(_with_roles(part)) for part in (group.prompt, *group.responses)]


def _with_roles(part: str | Sequence[Message]) -> str:
    if isinstance(part, str):
        return part
    return "".join(f"{message.get('role')}: {message.get('content') or ''}\n" for message in part)
