"""Guarded chats: contents that could forge a turn are tokenized as plain text, and all others as the library does.

Whether a content forges a turn is decided by comparing renderings. `hide` and `hide_pieces` replace what could be, or
become, a control token by placeholders. If the template writes the same text with them, then it only copied those
places, and every control token it wrote beside them is its own. A template may also look for a control token in
contents, for example to drop it; such a token has to reach it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from rm_gallery.data.tokenization.chats import Chat, ChatRenderer
from rm_gallery.data.tokenization.special_tokens import ControlTokens, neutral
from rm_gallery.errors import BadRow, UserError
from rm_gallery.schema import Message, PreferenceGroup

_MAX_HIDDEN = 64  # control tokens of one conversation that are hidden one by one
_MAX_SHAPES = 4096


class EncodeChat(Protocol):
    """Ids of one rendered text. hidden: it has placeholders."""

    def __call__(self, text: str, *, hidden: bool) -> list[int]: ...


class GuardedChats:
    """Renders and encodes chats so that no content forges a turn."""

    def __init__(self, renderer: ChatRenderer, control: ControlTokens, encode: EncodeChat) -> None:
        self._renderer, self._control, self._encode = renderer, control, encode
        self._own_counts: dict[Any, int | None] = {}  # by shape of the chat

    def rendered(self, group: PreferenceGroup) -> list[tuple[Chat, str]] | None:
        """The chats of a group with their texts; None if the template rejects them but for a control token in them."""
        try:
            return self._renderer.render_group(group)
        except BadRow:
            if not self._control.occur_in((group.prompt, group.responses)):
                raise
        return None

    def checked(self, texts: list[list[int]], chats: Sequence[tuple[Chat, str]], where: str) -> list[list[int]]:
        """The ids of chats without control tokens in contents. They are encoded again where the template made one."""
        for index, (chat, text) in enumerate(chats):
            ids = texts[index]
            count = self._control.count(ids)
            if count:
                own = self._own_count(chat, where)
                if own is None or count > own:
                    texts[index] = self._encode_one(chat, text, where)
        return texts

    def encode(self, group: PreferenceGroup, chats: list[tuple[Chat, str]] | None) -> list[list[int]]:
        """Ids of the chats of a group with control tokens in contents.

        chats: see `rendered`. Raises BadRow for a control token that cannot be separated from those of the template.
        """
        if chats is not None:
            return [self._encode_one(chat, text, group.where) for chat, text in chats]
        tools = group.metadata.get("tools")
        hidden = [self._control.hide(Chat(group.prompt, response, tools)) for response in group.responses]  # type: ignore[arg-type]
        return [self._encode(self._renderer.render(chat, group.where), hidden=True) for chat in hidden]

    def _own_count(self, chat: Chat, where: str) -> int | None:
        """Number of control tokens that the template writes for a chat of this shape; None if unknown."""
        shape = _roles([*chat.prompt, *chat.response]) if chat.tools is None else None
        if shape is None:
            shape = _shape([chat.prompt, chat.response, chat.tools])
        if shape not in self._own_counts:
            if len(self._own_counts) >= _MAX_SHAPES:
                self._own_counts.clear()
            try:
                text = self._renderer.render(chat.map(neutral), where)
                self._own_counts[shape] = self._control.count(self._encode(text, hidden=False))
            except (BadRow, UserError):
                self._own_counts[shape] = None
        return self._own_counts[shape]

    def _encode_one(self, chat: Chat, text: str, where: str) -> list[int]:
        control = self._control
        for words in (True, False):
            hidden = self._try_render(control.hide_pieces(chat, words=words), where)
            if hidden is not None and control.show(hidden) == text:
                if words or self._is_own(hidden, chat, where):
                    return self._encode(hidden, hidden=True)
                break
        hidden = self._try_render(control.hide(chat), where)
        if hidden is not None:
            if control.show(hidden) != text:
                hidden = self._reaching(chat, text, hidden, where)
            if hidden is not None and self._is_own(hidden, chat, where):
                return self._encode(hidden, hidden=True)
        raise BadRow("control token in a text, which the chat template looks for or puts together")

    def _is_own(self, hidden: str, chat: Chat, where: str) -> bool:
        """Whether the template writes no more control tokens than for a chat of this shape that holds nothing."""
        own = self._own_count(chat, where)
        return own is None or self._control.count(self._encode(hidden, hidden=True)) <= own

    def _try_render(self, chat: Chat, where: str) -> str | None:
        try:
            return self._renderer.render(chat, where)
        except BadRow:
            return None

    def _reaching(self, chat: Chat, text: str, all_hidden: str, where: str) -> str | None:
        """The text with every control token hidden that the template does not look for; None if that is not safe.

        It is safe if the control tokens that are left are those that the template writes when all are hidden, and if
        what is between them differs only where contents are.
        """
        hidden: set[int] = set()
        found = text
        for number in range(_MAX_HIDDEN):
            rendered, total = self._render_hiding(chat, {*hidden, number}, where)
            if number >= total:
                break
            if rendered is not None and self._control.show(rendered) == text:
                hidden.add(number)
                found = rendered
        else:
            return None
        left, own = self._control.find(found), self._control.find(all_hidden)
        same = len(left) == len(own) and all(
            a == b or (place % 2 == 0 and self._control.hides(b))
            for place, (a, b) in enumerate(zip(left, own, strict=True))
        )
        return found if same else None

    def _render_hiding(self, chat: Chat, numbers: set[int], where: str) -> tuple[str | None, int]:
        """(the text with these control tokens of contents hidden, number of all)."""
        seen = 0

        def substitute(match: re.Match[str]) -> str:
            nonlocal seen
            seen += 1
            return self._control.placeholder(match) if seen - 1 in numbers else match[0]

        return self._try_render(self._control.hide(chat, substitute), where), seen


def _roles(messages: Sequence[Message]) -> tuple[str, ...] | None:
    """The shape of a chat whose messages are only a role and a text each; None for others."""
    found = []
    for message in messages:
        text = message.get("content")
        if len(message) != 2 or type(text) is not str or not text or text.isspace() or "role" not in message:
            return None
        found.append(message["role"])
    return tuple(found)


def _shape(value: Any) -> Any:
    """What `neutral` keeps of a nested value, hashable."""
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, dict):
        return *value, value.get("role"), *map(_shape, value.values())
    if isinstance(value, list | tuple):
        return len(value), *map(_shape, value)
    return str(value)
