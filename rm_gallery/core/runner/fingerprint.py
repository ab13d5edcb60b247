"""Fingerprints: hashes of samples and graders, to detect changes when a run is resumed."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError


def of_sample(sample: Any, index: int) -> str:
    """Hash of the content of a sample, 16 hexadecimal digits, the same in every process.

    Raises UserError for a sample with objects that cannot be serialized.
    """
    try:
        return _digest(json.dumps(sample, sort_keys=True, default=to_plain))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"sample {index} cannot be serialized ({error}): with output_path, samples may contain text, numbers, "
            "lists and dictionaries"
        ) from None


def of_grader(grader: Any, mapper: Any) -> str:
    """Hash of a grader and its mapper, 16 hexadecimal digits.

    Covers what the grader's method `fingerprint()` returns, if it has one, else its class and its public attributes.
    Of a model only its name (or folder) and options count: another API key, timeout or URL is the same grader. Of a
    mapper function the code counts.
    """
    own = getattr(grader, "fingerprint", None)
    public = {
        name: value
        for name, value in getattr(grader, "__dict__", {}).items()
        if not name.startswith("_") and not _is_secret(name)
    }
    seen = own() if callable(own) else _seen(public)
    return _digest(json.dumps([_class_name(grader), seen, _seen(mapper)], sort_keys=True, default=_seen))


def to_plain(value: Any) -> Any:
    """A JSON-serializable form of a value, for `json.dumps(default=...)`. Raises TypeError if there is none."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    for method in ("model_dump", "tolist", "isoformat", "__fspath__"):  # pydantic, arrays, dates, paths
        if callable(getattr(value, method, None)) and not isinstance(value, type):
            return getattr(value, method)()
    raise TypeError(f"a value of type {type(value).__name__}")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _class_name(value: Any) -> str:
    return type(value).__qualname__  # without the module, which is __main__ when run as a script


def _seen(value: Any) -> Any:
    """The part of a setting that is hashed: its content if it can be serialized, else its class."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _seen(item) for key, item in value.items() if not _is_secret(key)}
    if isinstance(value, list | tuple):
        return [_seen(item) for item in value]
    if isinstance(value, types.FunctionType):
        return [value.__qualname__, *_code(value.__code__)]
    for name in ("model", "folder"):  # a chat model, a scorer
        if isinstance(getattr(value, name, None), str | Path):
            options = _seen(getattr(value, "options", None))
            form = getattr(value, "reward_form", "")
            return [_class_name(value), str(getattr(value, name)), options, *([form] if form else [])]
    try:
        return [_class_name(value), json.loads(json.dumps(to_plain(value), default=_class_name))]
    except (TypeError, ValueError):
        return _class_name(value)


_SECRET = re.compile(
    r"extra_headers|extra_query|authorization|(\w+[_-])?(api[_-]?key|password|secret)|(access|api|auth|bearer|hf)_token",
    re.IGNORECASE,
)


def _is_secret(name: Any) -> bool:
    """Whether a setting may hold an API key: it is not hashed, and another key is the same grader."""
    return _SECRET.fullmatch(str(name)) is not None


def _code(code: types.CodeType) -> list[Any]:
    """The bytecode, names and constants of a function, without comments and line numbers."""
    constants = [_code(item) if isinstance(item, types.CodeType) else repr(item) for item in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]
