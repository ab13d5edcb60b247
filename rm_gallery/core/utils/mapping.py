"""Mappers: from a sample of any form to the arguments that a grader takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from rm_gallery.errors import UserError, nearest

Mapper: TypeAlias = Mapping[str, str] | Callable[[Any], Mapping[str, Any]]
"""`{grader parameter: dot-separated path in the sample}`, or a function from a sample to the grader's arguments."""

NUMBER = re.compile(r"-?[0-9]+")
MAX_SHOWN = 12  # keys that an error lists


def get_value_by_path(sample: Any, path: str) -> Any:
    """The value at a dot-separated path.

    A name is a key of a dictionary. Over a list a number is a position (-1 is the last), and a name collects: the rest
    of the path is followed in each item. A key with dots in it is found when the rest of the path is that key.

        get_value_by_path({"messages": [{"role": "user", "content": "Hi"}]}, "messages.0.content")   # "Hi"
        get_value_by_path({"messages": [{"role": "user", "content": "Hi"}]}, "messages.content")     # ["Hi"]

    Raises UserError that names the path, the part that is missing and what there is instead.
    """
    return _follow(sample, path.split("."), path, "")


def get_value_by_mapping(sample: Any, mapping: Mapping[str, str]) -> dict[str, Any]:
    """The value at the path of each parameter. Raises UserError as `get_value_by_path` does."""
    arguments = {}
    for parameter, path in mapping.items():
        try:
            arguments[parameter] = get_value_by_path(sample, path)
        except UserError as error:
            raise UserError(f"mapper for {parameter!r}: {error}") from None
    return arguments


def parse_data_with_mapper(sample: Any, mapper: Mapper | None = None) -> dict[str, Any]:
    """The arguments that a mapper makes of a sample; without a mapper they are the sample.

    Raises UserError for a path that is not in the sample and for anything that gives no dictionary; what a mapper
    function raises passes through.
    """
    if isinstance(mapper, Mapping):
        return get_value_by_mapping(sample, mapper)
    arguments = sample if mapper is None else mapper(sample)
    if not isinstance(arguments, Mapping):
        what = "the sample" if mapper is None else "what the mapper function returns"
        raise UserError(f"{what} is {_kind(arguments)}: it must be a dictionary from the grader's parameters to values")
    return dict(arguments)


def check_mapper(mapper: Any, where: str) -> None:
    """Raise UserError, opening with `where`, for what can be no mapper; None is the sample as it is."""
    if mapper is None or (callable(mapper) and not isinstance(mapper, type)):
        return
    if not isinstance(mapper, Mapping):
        raise UserError(
            f"{where}: the mapper is {_kind(mapper)}: give a function, or a dictionary "
            "{grader parameter: dot-separated path in the sample}"
        )
    for parameter, path in mapper.items():
        if not isinstance(parameter, str) or not isinstance(path, str) or not all(path.split(".")):
            raise UserError(
                f"{where}: the mapper has {parameter!r}: {path!r}; both must be texts, the second a path "
                "such as 'messages.0.content'"
            )


def _follow(value: Any, parts: Sequence[str], path: str, walked: str) -> Any:
    if not parts:
        return value
    rest = ".".join(parts)
    here = f"at {walked!r}" if walked else "in the sample"
    if isinstance(value, Mapping):
        name = rest if rest in value else parts[0]
        if name not in value:
            raise UserError(
                f"path {path!r}: there is no {name!r} {here}; {_keys(value)}{nearest(name, map(str, value))}"
            )
        return _follow(value[name], () if name == rest else parts[1:], path, _join(walked, name))
    if hasattr(value, "tolist") and not isinstance(value, str):
        value = value.tolist()  # an array, as parquet files read with pandas hold them
    if not isinstance(value, list | tuple):
        raise UserError(f"path {path!r}: there is no {parts[0]!r} {here}: that is {_kind(value)}")
    if not NUMBER.fullmatch(parts[0]):
        return [_follow(item, parts, path, _join(walked, str(index))) for index, item in enumerate(value)]
    index = int(parts[0])
    if not -len(value) <= index < len(value):
        raise UserError(f"path {path!r}: there is no item {index} {here}: that list has {len(value)} items")
    return _follow(value[index], parts[1:], path, _join(walked, parts[0]))


def _join(walked: str, part: str) -> str:
    return f"{walked}.{part}" if walked else part


def _keys(value: Mapping[Any, Any]) -> str:
    if not value:
        return "it is empty"
    names = [repr(str(key)) for key in value]
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return f"the keys are {', '.join(names[:MAX_SHOWN])}{more}."


def _kind(value: Any) -> str:
    """What a value is, in words for a person."""
    if value is None:
        return "empty (None)"
    names = {str: "a text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "a dict"}
    return names.get(type(value), f"of type {type(value).__name__}")
