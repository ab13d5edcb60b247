"""Structured responses: the requested JSON schema, and parsing and validation of the model's text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError

from rm_gallery.schema import Message

ResponseFormat: TypeAlias = type[BaseModel] | Mapping[str, Any]
"""A pydantic class, a JSON schema, or the API's own {"type": "json_schema" | "json_object", ...}."""

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "number": (int, float), "integer": int, "boolean": bool,
    "null": type(None),
}  # fmt: skip


class ParseError(ValueError):
    """The response does not match the format; the message names the first mismatch."""


def json_schema(response_format: ResponseFormat) -> dict[str, Any]:
    """The JSON schema of the format; {} if any JSON object is valid."""
    if isinstance(response_format, type):
        return response_format.model_json_schema()
    if response_format.get("type") == "json_object":
        return {}
    if response_format.get("type") == "json_schema":
        return dict(response_format["json_schema"].get("schema", {}))
    return dict(response_format)


def request_format(response_format: ResponseFormat) -> dict[str, Any]:
    """The `response_format` of an OpenAI-compatible request."""
    if not isinstance(response_format, type) and response_format.get("type") in ("json_object", "json_schema"):
        return dict(response_format)
    name = response_format.__name__ if isinstance(response_format, type) else "answer"
    return {"type": "json_schema", "json_schema": {"name": name, "schema": json_schema(response_format)}}


def with_instruction(messages: list[Message], response_format: ResponseFormat) -> list[Message]:
    """The conversation with the schema appended to its last message, for models without `response_format`."""
    schema = json_schema(response_format)
    shape = f" that follows this JSON schema:\n{json.dumps(schema, ensure_ascii=False)}" if schema else "."
    instruction = f"\n\nAnswer with one JSON object and nothing else{shape}"
    last = messages[-1]
    content = last.get("content") or ""
    if isinstance(content, list):
        return [*messages[:-1], {**last, "content": [*content, {"type": "text", "text": instruction.strip()}]}]
    return [*messages[:-1], {**last, "content": content + instruction}]


def parse_answer(text: str, response_format: ResponseFormat) -> Any:
    """Parse a response: an instance of the pydantic class, or decoded JSON that matches the schema.

    Text around the JSON (`<think>`, a code fence, prose) is ignored, and malformed JSON is repaired where possible.
    Raises ParseError when there is no JSON or it does not match.
    """
    value = _decode(text)
    if isinstance(response_format, type):
        try:
            return response_format.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the response"
            raise ParseError(f"{where}: {first['msg']}") from None
    return _fit(value, json_schema(response_format), "the response")


def _decode(text: str) -> Any:
    text = _THINKING.sub("", text).strip()
    fenced = _FENCE.findall(text)
    start, end = text.find("{"), text.rfind("}")
    candidates = [text, *fenced[-1:], *([text[start : end + 1]] if 0 <= start < end else [])]
    for candidate in candidates:
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    if start < 0:
        raise ParseError(f"no JSON in the response: {text[:60]!r}")
    try:
        import json_repair
    except ImportError:
        raise ParseError("malformed JSON in the response; pip install 'rm-gallery[openai]' to repair it") from None
    broken = fenced[-1] if fenced else text[start : end + 1] if end > start else text[start:]
    value = json_repair.loads(broken)
    if not isinstance(value, dict | list):
        raise ParseError(f"no JSON in the response: {text[:60]!r}")
    return value


def _fit(value: Any, schema: Mapping[str, Any], where: str) -> Any:
    """Validate type, required, enum, minimum and maximum; a quoted number becomes a number.

    Other keywords of JSON Schema are not checked.
    """
    kinds = schema.get("type")
    if kinds is not None:
        names = [kinds] if isinstance(kinds, str) else list(kinds)
        if isinstance(value, str) and "string" not in names:
            value = _unquote(value)
        if not any(_is_of(value, name) for name in names):
            raise ParseError(f"{where}: {type(value).__name__}, expected {' or '.join(names)}")
    if "enum" in schema and value not in schema["enum"]:
        raise ParseError(f"{where}: {value!r} is not one of {schema['enum']}")
    if _is_of(value, "number"):
        low, high = schema.get("minimum"), schema.get("maximum")
        if (low is not None and value < low) or (high is not None and value > high):
            raise ParseError(f"{where}: {value} is outside {low}..{high}")
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                raise ParseError(f"{where}: {name!r} is missing")
        inner = schema.get("properties", {})
        return {name: _fit(item, inner.get(name, {}), name) for name, item in value.items()}
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        return [_fit(item, schema["items"], f"{where}[{index}]") for index, item in enumerate(value)]
    return value


def _unquote(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _is_of(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES.get(name, object))
