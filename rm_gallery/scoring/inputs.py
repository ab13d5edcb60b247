"""Inputs of a scorer: a query with responses, a pair or a conversation becomes a group in the style of the model.

Does not load torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from rm_gallery.data.formats import as_messages, read_tools, without_repeats
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import InputStyle, Message, PreferenceGroup

log = logging.getLogger(__name__)

Text: TypeAlias = str | Message | Sequence[Message]
"""Text, one chat message, or several."""
Pair: TypeAlias = Mapping[str, Any] | tuple[Text, Text]
"""(chosen, rejected), or a mapping with these keys and optionally `prompt` and `tools`."""
Tools: TypeAlias = Sequence[Mapping[str, Any]] | str
"""Tool definitions, as the chat template takes them, or their JSON text."""


class InputBuilder:
    """Builds groups in the style that the model was trained on; logs once how it joins turns for a text model."""

    def __init__(self, style: InputStyle, separator: str = "\n\n", *, reads_tools: bool = True) -> None:
        """separator: between turns for a text model, as in the chat template of its folder.

        reads_tools: whether the chat template writes tool definitions.
        """
        self.style, self.separator, self._reads_tools = style, separator, reads_tools
        self._warned: set[str] = set()

    def group(self, query: Text | None, responses: Sequence[Text], tools: Tools | None = None) -> PreferenceGroup:
        """A query (text or messages; None or "" for none) with responses.

        Raises UserError for values that are neither text nor messages.
        """
        if isinstance(responses, str | Mapping):
            what = "a text" if isinstance(responses, str) else "one message"
            raise UserError(f"responses is {what}; pass a list of responses")
        prompt = as_messages(_checked(query or "", "query"), "user")
        answers = [_answer(_checked(value, f"response {number}")) for number, value in enumerate(responses)]
        turns, answers = without_repeats(prompt, answers)
        return self.fit(PreferenceGroup(turns, answers, style="chat", metadata=with_tools(tools)))

    def pair(self, pair: Pair, tools: Tools | None = None) -> PreferenceGroup:
        """Chosen and rejected, as in training: a text model gets the prompt directly before the response.

        tools: for a pair without tools of its own.
        """
        if isinstance(pair, Mapping):
            missing = [name for name in ("chosen", "rejected") if name not in pair]
            if missing:
                raise UserError(f"a pair has no {missing[0]!r} (keys: {', '.join(map(str, pair)) or 'none'})")
            prompt, sides = pair.get("prompt") or "", [pair["chosen"], pair["rejected"]]
            tools = pair.get("tools") or tools
        else:
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise UserError("a pair is (chosen, rejected), or a mapping with these keys and optionally prompt")
            prompt, sides = "", list(pair)
        if self.style == "text" and all(isinstance(value, str) for value in (prompt, *sides)):
            return self.fit(PreferenceGroup(prompt, sides, style="text", metadata=with_tools(tools)))
        return self.group(prompt, sides, tools)

    def conversation(self, messages: Sequence[Message], tools: Tools | None = None) -> PreferenceGroup:
        """One conversation, whose last turn is scored."""
        checked = _checked(messages, "conversation")
        if isinstance(checked, str) or not checked:
            raise UserError("a conversation is a list of messages; this one is " + ("text" if checked else "empty"))
        return self.fit(PreferenceGroup((), [checked], style="chat", metadata=with_tools(tools)))

    def fit(self, group: PreferenceGroup) -> PreferenceGroup:
        """The group in the style of this model: for a text model, the turns of a chat are joined by the separator.

        A group of raw text stays as it is: it may hold what the chat template would write.
        """
        if group.metadata.get("tools") and not (self._reads_tools and group.style == self.style == "chat"):
            self._warn_once("tools are given, but the model's input has none: the rewards do not depend on them")
        if group.style == "text":
            if self.style == "chat":
                self._warn_once("the model was trained on chats but got raw text; see RewardScorer.build_group")
            return group
        if self.style == "chat":
            return group
        prompt = self._joined(group.prompt)
        responses = [self._joined(response) for response in group.responses]
        if group.prompt or any(len(response) > 1 for response in group.responses):
            how = "by a blank line" if self.separator == "\n\n" else "directly, as in training"
            self._warn_once(
                f"the model was trained on raw text: the query and the response are joined {how}, without role names"
            )
        return replace(group, prompt=prompt + self.separator if group.prompt else "", responses=responses, style="text")

    def _joined(self, turns: str | Sequence[Message]) -> str:
        return turns if isinstance(turns, str) else self.separator.join(_content(message) for message in turns)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning(text)


def spread_tools(tools: Tools | Sequence[Tools | None] | None, count: int, what: str) -> list[Tools | None]:
    """The tools of each item of a call: one list for all of them, or one per item.

    what: name of an item, for the message. Raises UserError for anything else.
    """
    if isinstance(tools, Sequence) and not isinstance(tools, str) and tools and not isinstance(tools[0], Mapping):
        if callable(tools[0]):
            raise UserError("tools has a function; pass its definition: transformers.utils.get_json_schema(function)")
        if len(tools) != count:
            raise UserError(
                f"tools has {len(tools)} lists for {count} {what}s; pass one list of tools, or one per {what} "
                "(None for none)"
            )
        return list(tools)  # type: ignore[arg-type]  # each is checked when its group is built
    return [tools] * count  # type: ignore[list-item]


def with_tools(tools: Tools | None) -> dict[str, Any]:
    """The metadata of a group with these tools. Raises UserError for values that are not tool definitions."""
    if isinstance(tools, Mapping) or not isinstance(tools, str | Sequence | None):
        raise UserError(f"tools is {type(tools).__name__}; pass a list of tool definitions")
    try:
        # As JSON text, in which null is a value: a definition from Python has the fields that the caller gave it.
        text = tools if isinstance(tools, str) or not tools else json.dumps(list(tools), allow_nan=False)
        read = read_tools({"tools": text}, "tools")
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"tools cannot be read ({error}); pass a list of tool definitions") from error
    return {"tools": read} if read else {}


def check_group(group: PreferenceGroup) -> None:
    """Raise BadRow for a prompt or response of the wrong type; None, for example, must not be scored as 'None'."""
    for part in (group.prompt, *group.responses):
        if group.style == "text":
            if not isinstance(part, str):
                raise BadRow(f"{type(part).__name__} instead of text")
        elif isinstance(part, str) or not isinstance(part, Sequence):
            raise BadRow(f"{'text' if isinstance(part, str) else type(part).__name__} instead of messages")


def _checked(value: Any, name: str) -> str | list[Message]:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and "role" in value:
        if name.startswith("response") and value["role"] != "assistant":  # turns of one response, passed as responses
            raise UserError(f"{name} is a message of role {value['role']!r}; pass each response as a list of messages")
        value = [value]
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        raise UserError(f"{name} is {type(value).__name__}, not text or messages")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{name} has a message without a role; pass mappings with role and content")
    return [_with_text(message) for message in value]


def _answer(value: str | list[Message]) -> list[Message]:
    """Messages of a response, which may be empty text."""
    return as_messages(value, "assistant") or [{"role": "assistant", "content": ""}]


def _with_text(message: Message) -> Message:
    """The message with text parts (as in the chat API) joined: most chat templates would print the list."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return {**message, "content": "".join(map(str, texts))}
    return dict(message)


def _content(message: Message) -> str:
    content = _with_text(message).get("content")
    if not isinstance(content, str):
        raise UserError("a message has content other than text, but the model was trained on raw text")
    return content
