"""Classes with few hooks, and the row they read."""

from __future__ import annotations

from typing import Any

from rm_gallery.data.custom import CustomReader
from rm_gallery.data.formats import FormatConfig
from rm_gallery.data.sources import Row
from rm_gallery.schema import Comparison, Message, PreferenceGroup
from tests.small import make_tokenizer

ROW = {"query": "Why?", "chosen": "So.", "rejected": "No."}
PAIR = (Comparison(0, 1),)
USER = {"role": "user", "content": "Why?"}


def said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


class Plain:
    """The least that a class needs; no base class."""

    def __init__(self, data_files: Any, tokenizer: Any, config: Any) -> None:
        self.tokenizer, self.config = tokenizer, config

    def _build_messages(self, example: dict[str, Any]) -> Any:
        return [{"role": "user", "content": example.get("query", "")}]


class Templated(Plain):
    def _apply_chat_template(self, messages: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


class Own(Plain):
    """A format of its own, which no template writes."""

    def _apply_chat_template(self, messages: Any) -> Any:
        return "".join(f"{message['role'].title()}: {message['content']}\n" for message in messages) + "Bot: "


def with_hook(name: str, hook: Any, base: type = Plain) -> type:
    """A class whose hook is this function of its argument."""
    return type("Made", (base,), {name: lambda self, argument: hook(argument)})


def reader_of(dataset_class: type = Plain, tokenizer: Any = None, **options: Any) -> CustomReader:
    return CustomReader(dataset_class, FormatConfig(**options), tokenizer or make_tokenizer())


def read(dataset_class: type, row: dict[str, Any] | None = None, **options: Any) -> PreferenceGroup:
    return reader_of(dataset_class, **options).read(Row(dict(ROW if row is None else row), "a.parquet", 3))


def raising(_: Any) -> Any:
    raise RuntimeError("first line\nsecond line")
