"""Limits of chat templates: what one rendering may build, and the checks of everything that can grow a value.

Operators, methods and filters are checked before they run if a small argument can give a large result, and results are
counted.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, wraps
from typing import Any

from rm_gallery.errors import UserError

MAX_CHARACTERS = 2**25
"""Longest text that a template may build (33,554,432 characters)."""
MAX_TOTAL = 2**28
"""Characters of all texts that one rendering builds (268,435,456)."""
MAX_VALUES = 2**18
"""Values in the largest list that a template may build, with those of the lists in it (262,144)."""
MAX_STEPS = 5_000_000
"""Loop iterations and calls of one rendering."""
MAX_SECONDS = 30.0
"""Time of one rendering."""
_MAX_BITS = 100_000  # of an integer


class TemplateTooLarge(Exception):
    """A template builds a value above `MAX_CHARACTERS` or `MAX_VALUES`."""


class TemplateTooSlow(UserError):
    """A template exceeds `MAX_STEPS` or `MAX_SECONDS`."""


class Meter:
    """What is left of the limits of one rendering."""

    __slots__ = ("characters", "deadline", "steps")

    def __init__(self) -> None:
        self.steps, self.characters = MAX_STEPS, MAX_TOTAL
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        """Count a loop iteration or a call."""
        self.steps -= 1
        if self.steps < 0:
            raise TemplateTooSlow(
                f"the chat template needs more than {MAX_STEPS:,} loop iterations for one conversation; "
                "fix it, or set data.chat_template to another"
            )
        if time.monotonic() > self.deadline:
            raise TemplateTooSlow(
                f"the chat template runs for more than {MAX_SECONDS:g} seconds for one conversation; "
                "fix it, or set data.chat_template to another"
            )

    def build(self, characters: int) -> None:
        """Count a text that is built."""
        if characters > MAX_CHARACTERS:
            _check(characters)
        self.characters -= characters
        if self.characters < 0:
            raise TemplateTooLarge(f"it builds texts of more than {MAX_TOTAL:,} characters")


class _Current(threading.local):
    """The rendering of this thread."""

    def __init__(self) -> None:
        self.meter = Meter()


current = _Current()


def start_rendering() -> None:
    """Begin with the whole limits."""
    current.meter = Meter()


def _check(characters: float) -> None:
    if characters > MAX_CHARACTERS:
        raise TemplateTooLarge(f"it builds a text of more than {MAX_CHARACTERS:,} characters")


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise TemplateTooLarge(f"it computes a number of more than {_MAX_BITS:,} bits")


def size_of(value: Any) -> int:
    """Characters of a value when it is written, about; raises TemplateTooLarge above the limits.

    A value that occurs several times in a list counts several times, since each of them is written.
    """
    total, count, waiting = 0, 0, [value]
    namespace = namespace_type()
    while waiting:
        each = waiting.pop()
        count += 1
        if isinstance(each, str | bytes):
            total += len(each)
        elif isinstance(each, Mapping):
            waiting += [*each, *each.values()]
        elif isinstance(each, list | tuple | set | frozenset):
            waiting += each
        elif isinstance(each, namespace):
            raise TemplateTooLarge("it stores a namespace in a value")
        if count + len(waiting) > MAX_VALUES:
            raise TemplateTooLarge(f"it builds a list of more than {MAX_VALUES:,} values")
    _check(total)
    return total if isinstance(value, str) else total + count


@cache
def namespace_type() -> type:
    from jinja2.utils import Namespace

    return Namespace


def attributes_of(namespace: Any) -> dict[str, Any]:
    found: dict[str, Any] = object.__getattribute__(namespace, "_Namespace__attrs")
    return found


def sized(value: Any) -> Any:
    """The value, unless it is too large."""
    if isinstance(value, str):
        current.meter.build(len(value))
    elif isinstance(value, list | tuple | Mapping):
        size_of(value)
    return value


def stored(value: Any) -> Any:
    """The value that a namespace stores. Namespaces in namespaces could grow after they are checked."""
    if isinstance(value, namespace_type()):
        size_of(value)
    return value


def concat(parts: Iterable[str]) -> str:
    found = list(parts)
    current.meter.build(sum(map(len, found)))
    return "".join(found)


def joined(parts: Iterable[Any]) -> str:
    """The operator `~`."""
    return concat(map(str, parts))


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """The values of a loop, with their number and their characters counted as they are read."""
    for value in values:
        current.meter.step()
        if isinstance(value, str):
            current.meter.build(len(value))
        yield value


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Raise if the result of an operator would be too large. The operator `+` is checked by its result."""
    if operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        else:
            count, repeated = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and isinstance(repeated, str | bytes | list | tuple):
                _check(max(count, 0) * size_of(repeated))
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
    elif operator == "%" and isinstance(left, str):
        _check_format(left, right if isinstance(right, tuple) else (right,))


def _check_format(text: str, values: Iterable[Any]) -> None:
    """A format can pad to any width, written in it or given as a value."""
    found = list(values)
    numbers = [int(digits[:20]) for digits in re.findall("[0-9]+", text)]
    numbers += [value for value in found if isinstance(value, int)]
    fields = text.count("%") + text.count("{")
    _check(fields * (max(map(abs, numbers), default=0) + max(map(size_of, found), default=0)) + len(text))


# Filters and methods that can write more than they are given: at most each character as often as a number says, or with
# another argument beside it.
_GROWING = frozenset(
    ["center", "ljust", "rjust", "zfill", "expandtabs", "translate", "join", "indent", "batch", "slice"]
)
_GROWING |= {"tojson", "wordwrap", "urlize", "generate_lorem_ipsum"}
CHECKED = _GROWING | {"replace", "format", "format_map"}
"""Filters and methods to check before they run."""


def check_growth(name: str, values: list[Any], named: Mapping[str, Any]) -> list[Any]:
    """The arguments of a filter or method, the text first; raises if the result could be too large."""
    if name == "replace" and len(values) > 2 and all(isinstance(each, str) for each in values[:3]):
        text, old, new = values[:3]
        _check(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    elif name in ("format", "format_map") and values:
        given = values[1:] if name == "format" else values[1].values()
        _check_format(str(values[0]), [*given, *named.values()])
    elif name in _GROWING:
        values = [list(each) if isinstance(each, Iterator) and name == "join" else each for each in values]
        sizes = [
            abs(each) if isinstance(each, int) else size_of(each)
            for each in (*values, *named.values())
            if each is not None
        ]
        if len(sizes) > 1:
            _check((1 + sizes[0]) * (1 + max(sizes[1:])))
    return values


def limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks its arguments and its result, and counts as one step."""
    first = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0  # a context before the value

    @wraps(function)  # keeps jinja_pass_arg
    def limited(*args: Any, **kwargs: Any) -> Any:
        current.meter.step()
        if name in CHECKED:
            args = (*args[:first], *check_growth(name, list(args[first:]), kwargs))
        found = function(*args, **kwargs)
        return counted(found) if isinstance(found, Iterator) else sized(found)

    return limited
