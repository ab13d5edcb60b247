"""Layouts of supervised fine-tuning: a conversation, or one response to a prompt; no preferences are read.

A row is a prompt, the turns before the first answer, and one response, all turns after it up to the last answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rm_gallery.data.formats.config import FormatConfig
from rm_gallery.data.formats.pairs import Draft, prompted, read_response
from rm_gallery.errors import BadRow


def read_turns(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `conversation`: messages, also as `from` and `value`. Turns after the last answer are not read."""
    name = config.columns.messages or ""
    turns = read_response(values.get(name), name, config)
    if isinstance(turns, str):
        raise BadRow(f"{name} that are text")
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise BadRow(f"{name} without an assistant turn")
    return Draft(turns[: answers[0]], [turns[answers[0] : answers[-1] + 1]], [name])


def read_one_response(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `response`: one response to a prompt."""
    name = config.columns.response or ""
    return prompted(values, config, [read_response(values.get(name), name, config)], [name])


def read_preferred(values: Mapping[str, Any], config: FormatConfig) -> Draft:
    """Format `chosen`: the preferred response of a pair; the other one is not read."""
    name = config.chosen_key or ""
    return prompted(values, config, [read_response(values.get(name), name, config)], [name])
