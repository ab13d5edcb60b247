"""CustomReader: reads rows and renders conversations with a custom class. Each worker process makes its own.

If the hook `_apply_chat_template` returns the same text as the chat template of the tokenizer, the template renders the
whole conversation, so the text equals the one that scoring the messages gives. If not, the text of the hook is followed
by the response and by what the template writes after the content of an assistant turn.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rm_gallery.data.custom.hooks import DataSection, HookError, call_hook, read_row, wrong_type
from rm_gallery.data.custom.loading import describe_error, load_custom_class
from rm_gallery.data.formats import FormatConfig
from rm_gallery.data.sources import Row
from rm_gallery.errors import BadRow, UserError, one_line
from rm_gallery.schema import InputStyle, Message, PreferenceGroup


@dataclass
class CustomFacts:
    """Statistics of a custom class; those of several processes are added."""

    num_prompts: int = 0
    """Prompts that have messages."""
    num_empty_prompts: int = 0
    """Prompts with nothing but white space in all messages."""
    num_off_template: int = 0
    """Conversations that the class renders differently from the chat template of the tokenizer."""

    def add(self, other: CustomFacts) -> None:
        self.num_prompts += other.num_prompts
        self.num_empty_prompts += other.num_empty_prompts
        self.num_off_template += other.num_off_template

    @property
    def matches_template(self) -> bool:
        """Whether scoring the messages of every conversation so far gives the same tokens as training."""
        return not self.num_off_template

    def warnings(self) -> list[str]:
        """Messages about likely mistakes."""
        found = []
        if self.num_prompts and self.num_prompts == self.num_empty_prompts:
            found.append(
                f"data.custom_cls: every prompt is empty ({self.num_prompts} rows); "
                "check that _build_messages reads an existing column"
            )
        if not self.matches_template:
            found.append(
                "data.custom_cls: _apply_chat_template differs from the chat template of the tokenizer for some "
                "conversations, so the trained model needs text rendered by the class, not messages; a template in "
                "data.chat_template is saved with the checkpoint"
            )
        return found


class CustomReader:
    """Reads rows as chat groups and renders their conversations to text."""

    def __init__(self, dataset_class: type, config: FormatConfig, tokenizer: Any) -> None:
        """config: the `data` section, passed to the class, which gets no files.

        Raises UserError if the constructor does not accept (data_files, tokenizer, config).
        """
        self._facts = CustomFacts()
        self._config = DataSection(config)
        tokenizer = with_template(tokenizer)
        self.dataset = _construct(dataset_class, tokenizer, self._config)
        self._renderer = Renderer(self.dataset, tokenizer)
        adds_eos = tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]
        self.style: InputStyle = "chat" if self._renderer.has_own_template else "text"
        """Input style of the trained model: `text`, with `separator`, for a tokenizer without a chat template."""
        self.append_eos = self.style == "text" and bool(tokenizer.eos_token) and not adds_eos
        """Style `text`: whether the EOS token must be appended, because the tokenizer does not append it."""
        self.separator = SEPARATOR
        """Style `text`: the text between turns."""

    @classmethod
    def from_config(cls, config: FormatConfig, tokenizer: Any) -> CustomReader:
        """The reader for `data.custom_cls`, which is loaded."""
        return cls(load_custom_class(config.custom_cls), config, tokenizer)

    def take_facts(self) -> CustomFacts:
        """The statistics since the last call, which are reset."""
        found, self._facts = self.facts, CustomFacts()
        self._renderer.num_off_template = 0
        return found

    @property
    def facts(self) -> CustomFacts:
        """A copy of the statistics so far."""
        return CustomFacts(self._facts.num_prompts, self._facts.num_empty_prompts, self._renderer.num_off_template)

    @property
    def matches_template(self) -> bool:
        """See `CustomFacts.matches_template`."""
        return self.facts.matches_template

    def read(self, row: Row) -> PreferenceGroup:
        """The group of a row, in style `chat` unless `build_group` returns raw text.

        Raises BadRow for a bad row, and UserError that names hook, file and row for a hook that fails.
        """
        group = read_row(self.dataset, row, self._config)
        if group.style == "chat" and group.prompt:
            self._facts.num_prompts += 1
            self._facts.num_empty_prompts += not any(
                (message.get("content") or "").strip() for message in group.prompt if isinstance(message, dict)
            )
        return group

    def render(self, prompt: Sequence[Message], response: Sequence[Message], *, where: str = "") -> str:
        """The full text of a prompt with one response.

        where: `file:row`, for the error of a hook that fails.
        Raises BadRow for a conversation that the chat template rejects, and UserError for a hook that fails.
        """
        try:
            return self._renderer.render(prompt, response)
        except HookError as error:
            raise UserError(f"{where}: {error}" if where else str(error)) from (error.__cause__ or error)


def _construct(dataset_class: type, tokenizer: Any, config: DataSection) -> Any:
    name = dataset_class.__name__
    try:
        return dataset_class((), tokenizer, config)
    except Exception as error:
        raise UserError(
            f"data.custom_cls.name={name}: {name}(data_files, tokenizer, config) raised {describe_error(error)}; "
            "fix its constructor, which must accept these three"
        ) from error


_MARKER = "MARKEROFTHERESPONSE"
SEPARATOR = "\n\n"


def plain_template(tokenizer: Any) -> str:
    """The chat template for a tokenizer without one: contents separated by a blank line, then the EOS token.

    Scoring renders messages the same way for a model that was trained on raw text.
    """
    closing = "" if tokenizer.cls_token else tokenizer.eos_token or ""
    return (
        "{% for message in messages %}{{ message['content'] }}"
        f"{{% if not loop.last or add_generation_prompt %}}{{{{ {SEPARATOR!r} }}}}"
        f"{{% elif message['role'] == 'assistant' and not message['content'].endswith({closing!r}) %}}"
        f"{{{{ {closing!r} }}}}{{% endif %}}{{% endfor %}}"
    )


def with_template(tokenizer: Any) -> Any:
    """The tokenizer, or a copy with `plain_template` if it has no chat template, so that every hook can render."""
    if tokenizer is None or tokenizer.chat_template is not None:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = plain_template(tokenizer)
    return tokenizer


class Renderer:
    """Renders conversations for an instance of a custom class; counts those that differ from the chat template."""

    def __init__(self, dataset: Any, tokenizer: Any) -> None:
        """tokenizer: from `with_template`, the one of the instance."""
        self.num_off_template = 0
        self._dataset, self._tokenizer = dataset, tokenizer
        self._has_hook = callable(getattr(dataset, "_apply_chat_template", None))
        self.has_own_template = tokenizer.chat_template != plain_template(tokenizer)
        self._closing: str | None = None
        self._last: tuple[list[Message], str | None] | None = None

    def render(self, prompt: Sequence[Message], response: Sequence[Message]) -> str:
        """The full text of a prompt with one response.

        Raises HookError for a hook that fails, BadRow for a conversation that the chat template rejects, and UserError
        for a template that is not valid Jinja.
        """
        turns, last = [*prompt, *response[:-1]], response[-1]
        rendered = self._by_hook(turns) if self._has_hook else None
        if rendered is None:
            try:
                text = self._by_template([*turns, last])
            except Exception as error:
                raise _template_fault(error) from error
            return text if self.has_own_template else self._add_bos(text)
        if not isinstance(last.get("content"), str):
            raise BadRow("response without text, which only the chat template can write")
        text = rendered + last["content"] + self._find_closing()
        is_off = text != self._try_template([*turns, last])  # a reasoning block may be in the prompt or the response
        self.num_off_template += is_off
        return self._add_bos(text) if is_off or not self.has_own_template else text

    def _by_hook(self, turns: list[Message]) -> str | None:
        """The text of the hook for the turns before a response; None if the chat template renders the same text.

        The last result is cached, since the responses of a prompt come one after the other.
        """
        if self._last is None or self._last[0] != turns:
            self._last = (turns, self._call_hook(turns))
        return self._last[1]

    def _call_hook(self, turns: list[Message]) -> str | None:
        try:
            text = call_hook(self._dataset, "_apply_chat_template", [dict(message) for message in turns])
        except HookError as error:
            fault = self._find_fault(turns, error.__cause__)
            if fault is None:
                raise
            if not turns:  # no messages cannot be rendered; with the response there is one
                return None
            raise fault from error
        if not isinstance(text, str):
            raise wrong_type(self._dataset, "_apply_chat_template", text, "text (tokenize=False gives it)")
        is_template = text in (self._try_template(turns, True), self._try_template(turns))
        return None if is_template else text

    def _find_fault(self, turns: list[Message], cause: BaseException | None) -> BadRow | UserError | None:
        """The fault of the row or the template, if the template raised the error in a hook."""
        try:
            self._by_template(turns, True)
        except Exception as error:
            return _template_fault(error) if type(error) is type(cause) else None
        return None

    def _by_template(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _try_template(self, messages: list[Message], add_generation_prompt: bool = False) -> str | None:
        """The same, or None if the template rejects these messages."""
        try:
            return self._by_template(messages, add_generation_prompt)
        except Exception:
            return None

    def _find_closing(self) -> str:
        """What the chat template writes after the content of an assistant turn; the EOS token if that is unknown."""
        if self._closing is None:
            probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARKER}]
            _, found, after = (self._try_template(probe) or "").rpartition(_MARKER)
            self._closing = after if found else self._tokenizer.eos_token or ""
        return self._closing

    def _add_bos(self, text: str) -> str:
        """The text with the BOS token in front, if the tokenizer adds one to raw text."""
        bos = self._tokenizer.bos_token
        adds_bos = bos and self._tokenizer("")["input_ids"][:1] == [self._tokenizer.bos_token_id]
        return bos + text if adds_bos and not self._tokenizer.cls_token and not text.startswith(bos) else text


def _template_fault(error: Exception) -> BadRow | UserError:
    from jinja2 import TemplateSyntaxError

    if isinstance(error, UserError):
        return error
    if isinstance(error, TemplateSyntaxError):
        return UserError(
            f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); "
            "fix it, or set data.chat_template to another"
        )
    return BadRow(f"chat template rejects the conversation: {one_line(error)}")
