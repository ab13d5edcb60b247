"""Fingerprints: whether a sample or a grader is the one that an earlier run had."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rm_gallery.errors import UserError


def of_sample(sample: Any, index: int) -> str:
    """16 hexadecimal digits that depend on the sample's content alone, in any process.

    Raises UserError for a sample that holds objects without a written form.
    """
    try:
        return _digest(json.dumps(sample, sort_keys=True, default=to_plain))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"sample {index} cannot be recognised again on resume ({error}): with output_path, "
            "samples hold texts, numbers, lists and dictionaries"
        ) from None


def of_grader(grader: Any, mapper: Any) -> str:
    """16 hexadecimal digits for what a grader's judgement depends on, as far as it can be seen.

    That is what the grader's method `fingerprint()` returns, where it has one. Else its class and its public
    attributes: names, numbers, texts, templates; of a model its name (or folder) and options, so that another key,
    timeout or address is the same grader. With the mapper, for a function its code.
    """
    own = getattr(grader, "fingerprint", None)
    public = {name: value for name, value in getattr(grader, "__dict__", {}).items() if not name.startswith("_")}
    seen = own() if callable(own) else _seen(public)
    return _digest(json.dumps([_class_name(grader), seen, _seen(mapper)], sort_keys=True, default=_seen))


def to_plain(value: Any) -> Any:
    """JSON's form of a value that json does not know. Raises TypeError where there is none."""
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
    return type(value).__qualname__  # without its module, which is __main__ in the script that is run


def _seen(value: Any) -> Any:
    """What of a setting goes into a fingerprint: its content where it is plain, else its class."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _seen(item) for key, item in value.items() if key != "extra_headers"}  # may hold keys
    if isinstance(value, list | tuple):
        return [_seen(item) for item in value]
    if isinstance(value, types.FunctionType):
        return [value.__qualname__, *_code(value.__code__)]
    for name in ("model", "folder"):  # a chat model, a scorer
        if isinstance(getattr(value, name, None), str | Path):
            options = _seen(getattr(value, "options", None))
            return [_class_name(value), str(getattr(value, name)), options]
    try:
        return [_class_name(value), json.loads(json.dumps(to_plain(value), default=_class_name))]
    except (TypeError, ValueError):
        return _class_name(value)


def _code(code: types.CodeType) -> list[Any]:
    """What a function does, whatever its comments and place."""
    constants = [_code(item) if isinstance(item, types.CodeType) else repr(item) for item in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]
