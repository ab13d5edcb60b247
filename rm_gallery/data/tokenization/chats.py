"""Chats: conversations rendered by the chat template, with tool-call arguments in the form that servers pass.

OpenAI's wire format has the arguments of a tool call as a JSON string. vLLM and SGLang parse it before they render, so
templates are written for objects, and trained and served texts agree only if the same is done here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from rm_gallery.data.tokenization.sandbox import limited_template
from rm_gallery.data.tokenization.template_limits import TemplateTooSlow
from rm_gallery.errors import BadRow, UserError, one_line
from rm_gallery.schema import Message, PreferenceGroup

Render: TypeAlias = Callable[..., str]
"""`render(prompt messages, response messages, where="file:row")` -> the whole text, in place of the chat template."""


class Chat(NamedTuple):
    """One whole conversation: everything that the chat template is given."""

    prompt: Sequence[Message]
    response: Sequence[Message]
    tools: Any = None

    def map(self, change: Callable[[Any], Any]) -> Chat:
        """The chat with every part changed."""
        return Chat(change(self.prompt), change(self.response), change(self.tools))


class ChatRenderer:
    """Renders chats with the chat template, within the limits of `sandbox`, or with a custom class."""

    def __init__(self, tokenizer: Any, render: Render | None = None) -> None:
        """render: takes the place of the chat template."""
        self._tokenizer, self._render = tokenizer, render

    @cached_property
    def _template(self) -> Callable[..., Any]:
        return limited_template(self._tokenizer)

    def render(self, chat: Chat, where: str = "") -> str:
        """The text of a chat.

        Raises BadRow for a conversation that the template rejects, and UserError if there is no template, if it is not
        valid Jinja, or if it runs for too long.
        """
        if self._render is None and self._tokenizer.chat_template is None:
            raise UserError(
                f"{where}: the data are chat messages but the tokenizer has no chat template; "
                "set data.chat_template, or use raw texts"
            )
        try:
            if self._render is not None:
                return self._render(chat.prompt, chat.response, where=where)
            return self._template([*chat.prompt, *chat.response], tools=chat.tools, tokenize=False)
        except TemplateTooSlow as error:
            raise UserError(f"{where}: {error}") from error
        except (UserError, BadRow):
            raise
        except Exception as error:
            from jinja2 import TemplateSyntaxError

            if isinstance(error, TemplateSyntaxError):
                raise UserError(
                    f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); "
                    "fix it, or set data.chat_template to another"
                ) from error
            # Templates raise jinja exceptions or plain TypeErrors; either way this row does not fit the template.
            raise BadRow(f"chat template rejects the conversation: {one_line(error)}") from error

    def try_part(self, messages: Sequence[Message], tools: Any, *, starts_answer: bool = False) -> str | None:
        """The text of the first turns of a chat, with the header of an answer if `starts_answer`.

        None if the template rejects them. Raises UserError if it runs too long.
        """
        try:
            return str(self._template([*messages], tools=tools, tokenize=False, add_generation_prompt=starts_answer))
        except TemplateTooSlow:
            raise
        except Exception:  # which the caller counts the row for
            return None

    def try_messages(self, messages: Sequence[Message]) -> str | None:
        """The text of messages by the chat template; None if it rejects them. Raises UserError if it runs too long."""
        try:
            return str(self._template(list(messages), tokenize=False))
        except TemplateTooSlow:
            raise
        except Exception:  # the first row reports it
            return None

    def render_group(self, group: PreferenceGroup) -> list[tuple[Chat, str]]:
        """The chat of each response, in the form that the template takes, with its text.

        Arguments of tool calls are objects; for a template that takes them as text only, JSON strings.
        Raises as `render`; of both forms, the error is that of the objects.
        """
        assert not isinstance(group.prompt, str)
        tools = group.metadata.get("tools")
        chats = [Chat(group.prompt, response, tools) for response in group.responses if not isinstance(response, str)]
        responses = [message for chat in chats for message in chat.response]
        if not any(["tool_calls" in message for message in (*group.prompt, *responses)]):  # noqa: C419 (faster)
            return [(chat, self.render(chat, group.where)) for chat in chats]
        parsed = [_with_arguments(chat, _parsed) for chat in chats]
        try:
            return [(chat, self.render(chat, group.where)) for chat in parsed]
        except (BadRow, UserError) as error:
            try:
                as_text = [_with_arguments(chat, _as_text) for chat in chats]
                return [(chat, self.render(chat, group.where)) for chat in as_text]
            except (BadRow, UserError):
                raise error from None


def _has_calls(message: Message) -> bool:
    return isinstance(message.get("tool_calls"), list | tuple)


def _with_arguments(chat: Chat, form: Callable[[Any], Any]) -> Chat:
    """The chat with the arguments of its tool calls in this form."""

    def convert(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": convert(call["function"])}
        return {**call, "arguments": form(call["arguments"])} if "arguments" in call else call

    def messages(some: Sequence[Message]) -> list[Message]:
        return [
            {**message, "tool_calls": [convert(call) for call in message["tool_calls"]]}
            if _has_calls(message)
            else message
            for message in some
        ]

    return Chat(messages(chat.prompt), messages(chat.response), chat.tools)


def _parsed(arguments: Any) -> Any:
    """As vLLM passes them: an empty string or null as no arguments. A string that is not JSON stays."""
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _as_text(arguments: Any) -> Any:
    """A JSON string as it is; an object as the `tojson` filter of transformers writes it."""
    if isinstance(arguments, str):
        return arguments
    return json.dumps({} if arguments is None else arguments, ensure_ascii=False)
