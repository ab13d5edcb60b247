"""GraderConfig: a grader with its mapper. Mapper: from a sample to the arguments of a grader."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rm_gallery.errors import UserError, nearest

Mapper: TypeAlias = Mapping[str, str] | Callable[[Any], Mapping[str, Any]]
"""`{grader parameter: dot-separated path in the sample}`, or a function from a sample to the grader's arguments."""

NUMBER = re.compile(r"-?[0-9]+")
MAX_SHOWN = 12  # keys listed in an error

FORMS = (
    "give a grader, GraderConfig(grader=..., mapper=...), the pair (grader, mapper), "
    "or the dictionary {'grader': ..., 'mapper': ...}"
)


@dataclass(frozen=True)
class GraderConfig:
    """A grader with its mapper."""

    grader: Any
    """A BaseGrader, or any object with `async aevaluate(**kwargs)`."""
    mapper: Mapper | None = None
    """A function, or `{grader parameter: dot-separated path in the sample}`; None passes the fields of the sample."""

    @classmethod
    def create(cls, config: Any, name: str = "") -> GraderConfig:
        """Build from any accepted form. Raises UserError, which lists the forms, for anything else."""
        where = f"grader {name!r}" if name else "grader"
        if isinstance(config, cls):
            made = config
        elif isinstance(config, tuple) and len(config) == 2:
            made = cls(*config)
        elif isinstance(config, Mapping):
            for key in config:
                if key not in ("grader", "mapper"):
                    raise UserError(f"{where} has the key {key!r}: {FORMS}.{nearest(str(key), ('grader', 'mapper'))}")
            if "grader" not in config:
                raise UserError(f"{where} has no key 'grader': {FORMS}")
            made = cls(config["grader"], config.get("mapper"))
        else:
            made = cls(config)
        made._check(where)
        return made

    def _check(self, where: str) -> None:
        if isinstance(self.grader, type):
            raise UserError(
                f"{where} is the class {self.grader.__name__}: create an instance, {self.grader.__name__}(...)"
            )
        if not callable(getattr(self.grader, "aevaluate", None)):
            raise UserError(f"{where} is of type {type(self.grader).__name__}, which is not a grader: {FORMS}")
        check_mapper(self.mapper, where)
        accepted = self._parameters[1]
        for parameter in self.mapper if accepted is not None and isinstance(self.mapper, Mapping) else ():
            if accepted is not None and parameter not in accepted:
                raise UserError(
                    f"{where}: the mapper gives {parameter!r}, but {type(self.grader).__name__} takes "
                    f"{', '.join(map(repr, accepted))}.{nearest(parameter, accepted)}"
                )

    @functools.cached_property
    def _parameters(self) -> tuple[list[str], list[str] | None]:
        """(required parameters of `aevaluate`, all parameters); the latter is None if it accepts any."""
        try:
            parameters = inspect.signature(self.grader.aevaluate).parameters.values()
        except (TypeError, ValueError):
            return [], None
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return [p.name for p in named if p.default is p.empty], None if takes_any else [p.name for p in named]

    def arguments(self, sample: Any) -> dict[str, Any]:
        """The arguments of `aevaluate` for a sample.

        Without a mapper these are the fields of the sample that are parameters of the grader, or all fields if it
        accepts any. Raises UserError for a missing path or parameter; exceptions of a mapper function are not caught.
        """
        arguments = parse_data_with_mapper(sample, self.mapper)
        needed, accepted = self._parameters
        for parameter in needed:
            if parameter not in arguments:
                raise UserError(
                    f"{type(self.grader).__name__} needs {parameter!r}, but gets {_listed(arguments)}"
                    f"{nearest(parameter, map(str, arguments))} (A mapper gives its path in the sample: "
                    f"{{{parameter!r}: 'path.to.it'}})"
                )
        if self.mapper is not None or accepted is None:
            return arguments
        return {name: arguments[name] for name in accepted if name in arguments}

    @property
    def is_local(self) -> bool:
        """Whether the grader scores with a reward model in this process, which batches concurrent calls."""
        for owner in (self.grader, getattr(self.grader, "model", None)):
            if owner is None:
                continue
            if getattr(owner, "is_reward_model", False) is True or hasattr(owner, "ascore"):
                return True
        return hasattr(getattr(self.grader, "scorer", None), "ascore")


def _listed(names: Iterable[Any]) -> str:
    return (", ".join(repr(name) for name in names) or "nothing") + "."


def get_value_by_path(sample: Any, path: str) -> Any:
    """The value at a dot-separated path.

    A name is a key of a dictionary. For a list, a number is an index (-1 is the last), and a name maps: the rest of the
    path is applied to each item. A key that contains dots is found if the rest of the path is that key.

        get_value_by_path({"messages": [{"role": "user", "content": "Hi"}]}, "messages.0.content")   # "Hi"
        get_value_by_path({"messages": [{"role": "user", "content": "Hi"}]}, "messages.content")     # ["Hi"]

    Raises UserError, which names the missing part of the path and the available keys.
    """
    return _follow(sample, path.split("."), path, "")


def get_value_by_mapping(sample: Any, mapping: Mapping[str, str]) -> dict[str, Any]:
    """The value at the path of each parameter. Raises UserError as `get_value_by_path`."""
    arguments = {}
    for parameter, path in mapping.items():
        try:
            arguments[parameter] = get_value_by_path(sample, path)
        except UserError as error:
            raise UserError(f"mapper for {parameter!r}: {error}") from None
    return arguments


def parse_data_with_mapper(sample: Any, mapper: Mapper | None = None) -> dict[str, Any]:
    """Apply a mapper to a sample; without a mapper, return the sample.

    Raises UserError for a missing path and for a result that is not a dictionary; exceptions of a mapper function are
    not caught.
    """
    if isinstance(mapper, Mapping):
        return get_value_by_mapping(sample, mapper)
    arguments = sample if mapper is None else mapper(sample)
    if not isinstance(arguments, Mapping):
        what = "the sample" if mapper is None else "the result of the mapper function"
        raise UserError(f"{what} is {_kind(arguments)}: it must be a dictionary of the grader's parameters")
    return dict(arguments)


def check_mapper(mapper: Any, where: str) -> None:
    """Raise UserError, which begins with `where`, for an invalid mapper; None is valid."""
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
                f"{where}: the mapper has {parameter!r}: {path!r}; both must be strings, the second a path "
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
        value = value.tolist()  # an array, as pandas has it for lists in parquet
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
    """The type of a value, for error messages."""
    if value is None:
        return "empty (None)"
    names = {str: "a string", bool: "a bool", int: "a number", float: "a number", list: "a list", dict: "a dict"}
    return names.get(type(value), f"of type {type(value).__name__}")
