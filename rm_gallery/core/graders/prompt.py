"""Prompts: reading them, and filling their fields with texts that may hold anything."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from rm_gallery.errors import UserError

LANGUAGES = ("en", "zh")
_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
_TAG = re.compile(r"<(?=/?(?:query|context|reference_response|response(?:_\d+)?)>)")


@functools.cache
def load_prompt(name: str, language: str) -> str:
    """The text of prompts/NAME.LANGUAGE.md. Raises UserError for a language other than en and zh."""
    if language not in LANGUAGES:
        raise UserError(f"language={language}: prompts are there in {' and '.join(LANGUAGES)}")
    files = resources.files("rm_gallery.core.graders.prompts")
    return files.joinpath(f"{name}.{language}.md").read_text(encoding="utf-8").strip()


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """The template with each `{name}` replaced by that field's text, in one pass; `{{` and `}}` are braces.

    Fields are never read as templates, so braces in them stay as they are, and so do braces around anything else
    than a name in the template (JSON). Raises UserError for a name without a field.
    """

    def put(match: re.Match[str]) -> str:
        name = match.group(1)
        if name is None:
            return match.group()[0]
        if fields.get(name) is None:
            raise UserError(f"the prompt's field {{{name}}} is not given (given: {', '.join(_given(fields))})")
        return as_text(fields[name])

    return _FIELD.sub(put, template)


def _given(fields: Mapping[str, Any]) -> list[str]:
    return [name for name, value in fields.items() if value is not None] or ["nothing"]


def as_text(value: Any) -> str:
    """How a prompt shows a value: text as it is, messages with their roles, anything else as JSON."""
    if isinstance(value, str):
        return value
    if is_messages(value):
        if len(value) == 1:
            return as_text(value[0].get("content") or "")
        return "\n\n".join(f"{turn['role']}: {as_text(turn.get('content') or '')}" for turn in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def is_messages(value: Any) -> bool:
    """Whether the value is a conversation: a list of dicts with a role."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(turn, Mapping) and "role" in turn for turn in value)


def show_material(parts: Mapping[str, Any]) -> str:
    """Each part between tags of its name; a tag of ours inside a part is broken, so that no text can leave its own."""
    texts = {name: _TAG.sub("< ", as_text(value)) for name, value in parts.items()}
    return "\n\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in texts.items())
