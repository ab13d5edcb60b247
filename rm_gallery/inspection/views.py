"""Views: a group as plain texts, the shared turns apart from each response, and hashes and words of texts."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from rm_gallery.schema import Message, PreferenceGroup

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
