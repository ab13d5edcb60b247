"""CustomReader: reads rows, and renders conversations, as a custom class says. Made anew in each worker process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rm_gallery.data.custom.hooks import HookError, read_row
from rm_gallery.data.custom.load import load_custom_class
from rm_gallery.data.custom.render import SEPARATOR, Renderer, with_template
from rm_gallery.data.custom.section import DataSection
from rm_gallery.data.custom.sources import describe_error
from rm_gallery.data.formats import FormatConfig
from rm_gallery.data.source import Row
from rm_gallery.errors import UserError
from rm_gallery.schema import InputStyle, Message, PreferenceGroup


@dataclass
class CustomFacts:
    """What readers found out about a class; those of several processes are added up."""

    num_prompts: int = 0
    """Prompts that have messages."""
    num_empty_prompts: int = 0
    """Those of them with nothing but white space in all messages."""
    num_off_template: int = 0
    """Conversations that the class renders otherwise than the tokenizer's chat template does."""

    def add(self, other: CustomFacts) -> None:
        self.num_prompts += other.num_prompts
        self.num_empty_prompts += other.num_empty_prompts
        self.num_off_template += other.num_off_template

    @property
    def matches_template(self) -> bool:
        """Whether scoring the messages of every conversation so far gives the tokens that training saw."""
        return not self.num_off_template

    def warnings(self) -> list[str]:
        """What a person should know of it, one sentence each."""
        found = []
        if self.num_prompts and self.num_prompts == self.num_empty_prompts:
            found.append(
                f"data.custom_cls: every prompt is empty ({self.num_prompts} rows); "
                "does _build_messages read a column that is there?"
            )
        if not self.matches_template:
            found.append(
                "data.custom_cls: _apply_chat_template writes something else than the tokenizer's chat template "
                "for some conversations, so the trained model must be given text rendered by the class, not messages; "
                "a template in data.chat_template would go with the checkpoint"
            )
        return found


class CustomReader:
    """Rows to chat groups, and their conversations to text; picklable parts make it: class or config, and tokenizer."""

    def __init__(self, dataset_class: type, config: FormatConfig, tokenizer: Any) -> None:
        """config: the `data` section, which the class gets as its `config`; it gets no files.

        Raises UserError when the constructor does not take (data_files, tokenizer, config).
        """
        self._facts = CustomFacts()
        self._config = DataSection(config)
        tokenizer = with_template(tokenizer)
        self.dataset = _construct(dataset_class, tokenizer, self._config)
        self._renderer = Renderer(self.dataset, tokenizer)
        adds_eos = tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]
        self.style: InputStyle = "chat" if self._renderer.has_own_template else "text"
        """How the trained model is given its texts: `text`, with `separator`, for a tokenizer without chat template."""
        self.append_eos = self.style == "text" and bool(tokenizer.eos_token) and not adds_eos
        """Style `text`: whether the EOS token closes a text without the tokenizer's doing."""
        self.separator = SEPARATOR
        """Style `text`: what stands between the turns."""

    @classmethod
    def from_config(cls, config: FormatConfig, tokenizer: Any) -> CustomReader:
        """The reader for `data.custom_cls`; its class is loaded in this process."""
        return cls(load_custom_class(config.custom_cls), config, tokenizer)

    def take_facts(self) -> CustomFacts:
        """What was found out since the last call."""
        found, self._facts = self.facts, CustomFacts()
        self._renderer.num_off_template = 0
        return found

    @property
    def facts(self) -> CustomFacts:
        """What was found out so far; a copy."""
        return CustomFacts(self._facts.num_prompts, self._facts.num_empty_prompts, self._renderer.num_off_template)

    @property
    def matches_template(self) -> bool:
        """Whether every conversation so far was rendered as the tokenizer's chat template does it."""
        return self.facts.matches_template

    def read(self, row: Row) -> PreferenceGroup:
        """The group of a row, in style `chat` unless `build_group` gave bare text.

        Raises BadRow for a row that cannot be used, and UserError that names hook, file and row for a hook that fails.
        """
        group = read_row(self.dataset, row, self._config)
        if group.style == "chat" and group.prompt:
            self._facts.num_prompts += 1
            self._facts.num_empty_prompts += not any(
                (message.get("content") or "").strip() for message in group.prompt if isinstance(message, dict)
            )
        return group

    def render(self, prompt: Sequence[Message], response: Sequence[Message], *, where: str = "") -> str:
        """The whole text of a prompt with one response.

        where: `file:row`, for the message of a hook that fails.
        Raises BadRow for a conversation that the chat template refuses, and UserError for a hook that fails.
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
            "correct its constructor, which must take these three"
        ) from error
