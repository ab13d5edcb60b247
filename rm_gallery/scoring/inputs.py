"""Inputs: a query with responses, a pair or a conversation becomes a group, as the model was trained to read it.

Needs no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rm_gallery.data.formats import as_messages, without_repeats
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import InputStyle, Message, PreferenceGroup

log = logging.getLogger(__name__)

Text: TypeAlias = str | Sequence[Message]
"""Text, or chat messages."""
Pair: TypeAlias = Mapping[str, Any] | tuple[Text, Text]
"""`{"chosen": ..., "rejected": ..., "prompt": ...}` (the prompt may be missing), or (chosen, rejected)."""


class InputBuilder:
    """Builds groups in the style that the model was trained in; says once what it does with turns in bare text."""

    def __init__(self, style: InputStyle, separator: str = "\n\n") -> None:
        """separator: between the turns that a model of bare text is given, as in the chat template of its folder."""
        self.style, self.separator = style, separator
        self._said: set[str] = set()

    def group(self, query: Text | None, responses: Sequence[Text]) -> PreferenceGroup:
        """A query, as text or messages, with its responses; None or "" for no query.

        Raises UserError for what is neither text nor messages.
        """
        if isinstance(responses, str):
            raise UserError("responses is one text; give a list of responses")
        prompt = as_messages(_checked(query or "", "query"), "user")
        answers = [_answer(_checked(value, f"response {number}")) for number, value in enumerate(responses)]
        turns, answers = without_repeats(prompt, answers)
        return self.fit(PreferenceGroup(turns, answers, style="chat"))

    def pair(self, pair: Pair) -> PreferenceGroup:
        """Chosen and rejected, read as in training: a model of bare text gets the prompt right before the response."""
        if isinstance(pair, Mapping):
            lost = [name for name in ("chosen", "rejected") if name not in pair]
            if lost:
                raise UserError(f"a pair has no {lost[0]!r} (it has: {', '.join(map(str, pair)) or 'nothing'})")
            prompt, sides = pair.get("prompt") or "", [pair["chosen"], pair["rejected"]]
        else:
            if isinstance(pair, str) or len(pair) != 2:
                raise UserError("a pair is (chosen, rejected), or a mapping with these keys and perhaps prompt")
            prompt, sides = "", list(pair)
        if self.style == "text" and all(isinstance(value, str) for value in (prompt, *sides)):
            return PreferenceGroup(prompt, sides, style="text")
        return self.group(prompt, sides)

    def conversation(self, messages: Sequence[Message]) -> PreferenceGroup:
        """One conversation, whose last turn is scored."""
        checked = _checked(messages, "conversation")
        if isinstance(checked, str) or not checked:
            raise UserError("a conversation is a list of messages; this one is " + ("text" if checked else "empty"))
        return self.fit(PreferenceGroup((), [checked], style="chat"))

    def fit(self, group: PreferenceGroup) -> PreferenceGroup:
        """The group as this model can read it: a model of bare text gets the turns of a chat joined by its separator.

        A group of bare text stays as it is: it may hold what the chat template would write.
        """
        if group.style == "text":
            if self.style == "chat":
                self._say_once("the model was trained on chats, and is given bare text; see RewardScorer.build_group")
            return group
        if self.style == "chat":
            return group
        prompt = self._joined(group.prompt)
        responses = [self._joined(response) for response in group.responses]
        if group.prompt or any(len(response) > 1 for response in group.responses):
            how = "by a blank line" if self.separator == "\n\n" else "directly, as in training"
            self._say_once(
                f"the model was trained on bare text: the query and the response are joined {how}, "
                "without names of roles"
            )
        return PreferenceGroup(prompt + self.separator if group.prompt else "", responses, group.comparisons, "text")

    def _joined(self, turns: str | Sequence[Message]) -> str:
        return turns if isinstance(turns, str) else self.separator.join(_content(message) for message in turns)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning(text)


def check_group(group: PreferenceGroup) -> None:
    """Raise BadRow for parts that do not fit the group's style: a text that is None must not be scored as 'None'."""
    for part in (group.prompt, *group.responses):
        if group.style == "text":
            if not isinstance(part, str):
                raise BadRow(f"{type(part).__name__} instead of text")
        elif isinstance(part, str) or not isinstance(part, Sequence):
            raise BadRow(f"{'text' if isinstance(part, str) else type(part).__name__} instead of messages")


def _checked(value: Any, name: str) -> str | list[Message]:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        raise UserError(f"{name} is {type(value).__name__}, not text or a list of messages")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{name} holds a message without a role; give mappings with role and content")
    return [_with_text(message) for message in value]


def _answer(value: str | list[Message]) -> list[Message]:
    """Messages of a response; empty text is an answer too."""
    return as_messages(value, "assistant") or [{"role": "assistant", "content": ""}]


def _with_text(message: Message) -> Message:
    """The message, with parts of text (as in the chat API) as one text: most chat templates print a list as it is."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return {**message, "content": "".join(map(str, texts))}
    return dict(message)


def _content(message: Message) -> str:
    content = _with_text(message).get("content")
    if not isinstance(content, str):
        raise UserError("a message holds something else than text, and the model was trained on bare text")
    return content
