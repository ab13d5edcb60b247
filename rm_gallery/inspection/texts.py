"""Texts of a group: plain contents with their words and hashes, and the pieces that a sample is displayed in.

With a tokenizer, lengths are in tokens; without one, `WordEncoder` takes its place and lengths are in words.
"""

from __future__ import annotations

import json
import re
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rm_gallery.data.sources import Row
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


@dataclass(frozen=True)
class ExampleText:
    """The text of a row that a finding names."""

    where: str
    parts: tuple[tuple[str, str], ...]
    """Label (prompt, chosen, rejected, or the column of a dropped row) and text, shortened."""


MAX_RESPONSES = 8
_HEAD_CHARS, _TAIL_CHARS = 400, 200


def shorten(text: str) -> str:
    """The beginning and the end of a long text."""
    hidden = len(text) - _HEAD_CHARS - _TAIL_CHARS
    return text if hidden <= 0 else f"{text[:_HEAD_CHARS]} ... {hidden:,} characters hidden ... {text[-_TAIL_CHARS:]}"


def labels_of(group: PreferenceGroup) -> list[str]:
    """chosen and rejected for a pair; `response 1` and so on with wins and losses for a ranking."""
    if len(group.responses) == 2 and len(group.comparisons) == 1:
        return ["chosen" if index == group.comparisons[0].better else "rejected" for index in range(2)]
    wins = [sum(each.better == index for each in group.comparisons) for index in range(len(group.responses))]
    losses = [sum(each.worse == index for each in group.comparisons) for index in range(len(group.responses))]
    return [f"response {index + 1}, +{wins[index]} -{losses[index]}" for index in range(len(group.responses))]


class TextStore:
    """The texts of groups, shortened, in a file; it can be deleted after `finish`, and is read from memory pages."""

    _BUFFER = 1 << 20

    def __init__(self, path: Path) -> None:
        self._path, self._buffer = path, bytearray()
        self._starts = array("q", [0])
        self._data = np.zeros(0, np.uint8)

    def add(self, group: PreferenceGroup, texts: GroupTexts) -> None:
        responses = list(zip(labels_of(group), texts.responses, strict=True))[:MAX_RESPONSES]
        if responses[0][0] == "rejected":
            responses.reverse()
        parts = [("prompt", texts.prompt), *responses] if texts.prompt.strip() else responses
        line = json.dumps([(label, shorten(text)) for label, text in parts]).encode()
        self._buffer += line
        self._starts.append(self._starts[-1] + len(line))
        if len(self._buffer) > self._BUFFER:
            self._flush()

    def finish(self) -> None:
        """Write what is left and map the file."""
        self._flush()
        if self._starts[-1]:
            self._data = np.memmap(self._path, np.uint8, "r")

    def _flush(self) -> None:
        with self._path.open("ab") as file:
            file.write(self._buffer)
        self._buffer.clear()

    def get(self, index: int) -> tuple[tuple[str, str], ...]:
        """Label and text of the prompt and of the responses of a group."""
        parts = json.loads(self._data[self._starts[index] : self._starts[index + 1]].tobytes())
        return tuple((label, text) for label, text in parts)


def text_of_row(row: Row) -> ExampleText:
    """The columns of a row that is not used."""
    columns = islice(row.values.items(), MAX_RESPONSES)
    values = (
        (name, each if isinstance(each, str) else json.dumps(each, ensure_ascii=False, default=str))
        for name, each in columns
    )
    return ExampleText(row.where, tuple((name, shorten(value)) for name, value in values))


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

    def pieces(self, ids: Sequence[int], group: PreferenceGroup | None = None) -> list[Piece]:
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
