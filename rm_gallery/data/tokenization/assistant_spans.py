"""Assistant tokens: which tokens of a rendered conversation the assistant wrote, exactly, or a reason why not.

A template with `{% generation %}` marks says it. Otherwise each assistant turn is found by rendering the turns before
it with the header of an answer, and the turns up to it: both are beginnings of the whole text. Where a later turn
changes how an earlier one is rendered, the turn ends at the token that ends answers. Example, ChatML:

    <|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\n ...
                                                           ^^^^^^^^^^^^

The header is no target; the token that ends the answer is one, and the line break after it is none: a model stops
there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from rm_gallery.data.tokenization.chats import Chat, ChatRenderer
from rm_gallery.data.tokenization.special_tokens import ControlTokens
from rm_gallery.errors import BadRow
from rm_gallery.schema import Message

Bounds: TypeAlias = list[tuple[int, int]]
"""(first, last) of each span, the last exclusive: in characters of a text, or in tokens."""
Encode: TypeAlias = Callable[[str], tuple[list[int], list[tuple[int, int]]]]
"""The ids of a text, and the characters of each."""

_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARK = "Marka"
_NOT_FOUND = "assistant turn that is not found in the rendering of the chat template"


class AssistantSpans:
    """Finds the assistant tokens of chats by one chat template."""

    def __init__(self, tokenizer: Any, renderer: ChatRenderer, control: ControlTokens) -> None:
        self._tokenizer, self._renderer, self._control = tokenizer, renderer, control

    @cached_property
    def _is_marked(self) -> bool:
        template = self._tokenizer.chat_template
        return isinstance(template, str) and _MARKED.search(template) is not None

    @cached_property
    def _closing(self) -> str:
        """The first control token after an answer; "" if the template writes none."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        found = self._control.find((self._renderer.try_messages(turns) or "").partition(_MARK)[2])
        return found[1] if len(found) > 1 else ""

    def find(self, chat: Chat, text: str, ids: list[int], encode: Encode, *, only_response: bool) -> Bounds:
        """The tokens of the assistant turns of a chat. text, ids: its rendering.

        only_response: not those of the prompt. Raises BadRow where they are not found exactly.
        """
        if self._control.occur_in([chat.prompt, chat.response, chat.tools]):
            return self._hidden(chat, text, ids, only_response=only_response)
        if self._is_marked:
            return self._marked(chat, ids, only_response=only_response)
        return tokens_of(text, self._characters(chat, text, only_response=only_response), ids, encode)

    def _hidden(self, chat: Chat, text: str, ids: list[int], *, only_response: bool) -> Bounds:
        """The same where contents have control tokens, which are plain text: with placeholders for them."""
        hidden = self._control.hide(chat)
        rendered, spans = self._rendered_marks(hidden) if self._is_marked else (self._renderer.render(hidden), None)
        if self._control.show(rendered) != text:
            raise BadRow("control token in a conversation, which the chat template looks for")
        if spans is None:
            spans = self._characters(hidden, rendered, only_response=only_response)
        elif only_response:
            spans = spans[-_count_answers(chat.response) :]
        return tokens_of(rendered, spans, ids, self._control.encode_with_offsets)

    def _rendered_marks(self, chat: Chat) -> tuple[str, Bounds]:
        """The text of a chat, and the characters that a template with marks says are generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        [text], [spans] = render_jinja_template(
            [[*chat.prompt, *chat.response]], tools=chat.tools, chat_template=self._tokenizer.chat_template,
            return_assistant_tokens_mask=True, **self._tokenizer.special_tokens_map,
        )  # fmt: skip
        return text, [(start, end) for start, end in spans]

    def _marked(self, chat: Chat, ids: list[int], *, only_response: bool) -> Bounds:
        found = self._tokenizer.apply_chat_template(
            [*chat.prompt, *chat.response], tools=chat.tools, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        if list(found["input_ids"]) != ids:
            raise BadRow("generation marks of the chat template on other tokens than those of the conversation")
        mask = [0, *found["assistant_masks"], 0]
        edges = [place for place in range(len(mask) - 1) if mask[place] != mask[place + 1]]
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        wanted = _count_answers(chat.response) + (0 if only_response else _count_answers(chat.prompt))
        if not spans:
            raise BadRow("conversation without a token that the chat template marks as generated")
        return spans[-wanted:] if only_response else spans

    def _characters(self, chat: Chat, text: str, *, only_response: bool) -> Bounds:
        messages = [*chat.prompt, *chat.response]
        first = len(chat.prompt) if only_response else 0
        spans: Bounds = []
        for place in range(first, len(messages)):
            if messages[place].get("role") != "assistant":
                continue
            start = self._start(messages[: place + 1], chat.tools, text)
            end = self._end(messages[: place + 1], chat.tools, text, start, is_last=place == len(messages) - 1)
            if _text_of(messages[place]) not in text[start:end] or (spans and start < spans[-1][1]):
                raise BadRow(_NOT_FOUND)
            spans.append((start, end))
        return spans

    def _start(self, turns: Sequence[Message], tools: Any, text: str) -> int:
        """Where the answer that is the last of these turns starts: after its header."""
        before, answer = turns[:-1], turns[-1]
        header = self._renderer.try_part(before, tools, starts_answer=True)
        plain = self._renderer.try_part(before, tools) if before else ""
        if header is not None and header != plain and text.startswith(header):
            return len(header)
        # A template without a header of its own, or whose header begins with reasoning that this answer lacks.
        if plain is None or not text.startswith(plain) or not _text_of(answer):
            raise BadRow(_NOT_FOUND)
        marked = self._renderer.try_part([*before, {**answer, "content": _MARK}], tools) or ""
        start, found, _ = marked.partition(_MARK)
        if not found or not text.startswith(start) or len(start) < len(plain):
            raise BadRow(_NOT_FOUND)
        if not start[len(plain) :].strip():
            return len(plain)
        common = next(
            (at for at, pair in enumerate(zip(start, header or "", strict=False)) if pair[0] != pair[1]), None
        )
        shared = min(len(start), len(header or "")) if common is None else common
        return shared if shared > len(plain) else len(start)

    def _end(self, turns: Sequence[Message], tools: Any, text: str, start: int, *, is_last: bool) -> int:
        """Where the last of these turns ends: after the token that ends answers, without white space behind it."""
        through = text if is_last else self._renderer.try_part(turns, tools)
        if through is None or not text.startswith(through):
            at = text.find(self._closing, start) if self._closing else -1
            if at < 0:
                raise BadRow(_NOT_FOUND)
            return at + len(self._closing)
        answer = text[start : len(through)].rstrip()
        found = self._control.find(answer)
        closes = len(found) > 1 and not found[-1]
        return start + len(answer) if closes else len(through)


def _count_answers(messages: Sequence[Message]) -> int:
    return sum(message.get("role") == "assistant" for message in messages)


def _text_of(message: Message) -> str:
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def tokens_of(text: str, spans: Bounds, ids: list[int], encode: Encode) -> Bounds:
    """The tokens of spans of characters. Raises BadRow for a token that is only partly in a span.

    White space beside a span may be part of its first or last token.
    """
    found, characters = encode(text)
    if found != ids:
        raise BadRow("control token in a conversation, so its turns cannot be separated")
    bounds: Bounds = []
    for start, end in spans:
        inside = [
            place
            for place, (first, last) in enumerate(characters)
            if (last > start and first < end and last > first) or (first == last and start < first <= end)
        ]
        if not inside:
            continue
        first, last = characters[inside[0]][0], characters[inside[-1]][1]
        if text[min(first, start) : start].strip() or text[end : max(last, end)].strip():
            raise BadRow("token that is partly of an assistant turn")
        bounds.append((inside[0], inside[-1] + 1))
    return bounds
