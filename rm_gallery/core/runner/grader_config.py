"""GraderConfig: a grader with the mapper that makes its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rm_gallery.core.utils.mapping import Mapper, check_mapper, parse_data_with_mapper
from rm_gallery.errors import UserError, nearest

FORMS = (
    "give a grader, GraderConfig(grader=..., mapper=...), the pair (grader, mapper), "
    "or the dictionary {'grader': ..., 'mapper': ...}"
)


@dataclass(frozen=True)
class GraderConfig:
    """A grader, and how its arguments are made of a sample."""

    grader: Any
    """A BaseGrader, or any object with `async aevaluate(**kwargs)`."""
    mapper: Mapper | None = None
    """A function, or `{grader parameter: dot-separated path in the sample}`; None hands the sample itself over."""

    @classmethod
    def create(cls, config: Any, name: str = "") -> GraderConfig:
        """From any accepted form. Raises UserError, naming the grader and the forms, for anything else."""
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
            raise UserError(f"{where} is the class {self.grader.__name__}: make one, {self.grader.__name__}(...)")
        if not callable(getattr(self.grader, "aevaluate", None)):
            raise UserError(f"{where} is of type {type(self.grader).__name__}, which is no grader: {FORMS}")
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
        """(names that `aevaluate` needs, names that it takes); for the latter None when it takes any."""
        try:
            parameters = inspect.signature(self.grader.aevaluate).parameters.values()
        except (TypeError, ValueError):
            return [], None
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return [p.name for p in named if p.default is p.empty], None if takes_any else [p.name for p in named]

    def arguments(self, sample: Any) -> dict[str, Any]:
        """What `aevaluate` is called with.

        Without a mapper the fields of the sample that the grader names are handed over, all of them to a grader that
        takes any. Raises UserError for a path or a parameter that is not there; what a mapper function raises passes
        through.
        """
        arguments = parse_data_with_mapper(sample, self.mapper)
        needed, accepted = self._parameters
        for parameter in needed:
            if parameter not in arguments:
                raise UserError(
                    f"{type(self.grader).__name__} needs {parameter!r}, but it is given {_listed(arguments)}"
                    f"{nearest(parameter, map(str, arguments))} (A mapper says where in a sample it is: "
                    f"{{{parameter!r}: 'path.to.it'}})"
                )
        if self.mapper is not None or accepted is None:
            return arguments
        return {name: arguments[name] for name in accepted if name in arguments}

    @property
    def is_local(self) -> bool:
        """Whether the grader scores with a reward model in this process, which takes many calls in one batch."""
        for owner in (self.grader, getattr(self.grader, "model", None)):
            if owner is None:
                continue
            if getattr(owner, "is_reward_model", False) is True or hasattr(owner, "ascore"):
                return True
        return hasattr(getattr(self.grader, "scorer", None), "ascore")


def _listed(names: Iterable[Any]) -> str:
    return (", ".join(repr(name) for name in names) or "nothing") + "."
