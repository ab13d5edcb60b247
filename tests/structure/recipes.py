"""What recipes set and what the configuration offers: YAML keys, shell overrides, dataclass fields, reads."""

from __future__ import annotations

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.structure.tree import at, parse, python_files

_HYDRA_KEYS = {"defaults", "hydra"}  # top-level keys that belong to Hydra, not to us
# A read in one of these only checks the value; a setting that is merely checked does nothing.
_CHECKING = re.compile(r"__post_init__|(^|_)(check|problems?|refuse)(_|$)")


@dataclass(frozen=True)
class Key:
    """One key that a recipe sets: its path from the top and where it stands."""

    path: tuple[str, ...]
    where: str

    def __str__(self) -> str:
        return ".".join(self.path)


def nested_dataclass(annotation: object) -> type | None:
    """The dataclass in `X`, `X | None` or `list[X]`; None for a plain value or a free mapping."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        found = (nested_dataclass(part) for part in typing.get_args(annotation))
        return next((part for part in found if part), None)
    return None


def fields_of(config: type) -> dict[str, object]:
    """Field name -> annotation."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def all_fields(config: type, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """(dotted key, owning dataclass, field name) of a config and everything nested in it."""
    for name, annotation in fields_of(config).items():
        yield f"{prefix}{name}", config, name
        if inner := nested_dataclass(annotation):
            yield from all_fields(inner, f"{prefix}{name}.")


def unknown_part(key: Key, config: type) -> str | None:
    """The part of `key` that is no field, or None when all of it is known or lies in a free mapping."""
    current: type | None = config
    for part in key.path:
        if current is None:
            return None
        fields = fields_of(current)
        if part not in fields:
            return part
        current = nested_dataclass(fields[part])
    return None


def yaml_keys(path: Path) -> list[Key]:
    """Every key of a YAML file, without Hydra's own."""
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return [key for key in _keys_below(root, (), path) if key.path[0] not in _HYDRA_KEYS]


def _keys_below(node: yaml.Node | None, above: tuple[str, ...], path: Path) -> Iterator[Key]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _keys_below(item, above, path)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            trail = (*above, str(key.value))
            yield Key(trail, at(path, key.start_mark.line + 1))
            yield from _keys_below(value, trail, path)


def shell_keys(path: Path, sections: set[str]) -> list[Key]:
    """Every override such as `optim.lr=1e-6` in a shell script or Makefile, for the given top sections."""
    pattern = re.compile(rf"(?<![\w./$-])(?:\+\+|\+|~)?((?:{'|'.join(sorted(sections))})(?:\.\w+)+)=")
    return [
        Key(tuple(found.group(1).split(".")), at(path, number))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if not line.lstrip().startswith("#")
        for found in pattern.finditer(line)
    ]


def names_read(*folders: str) -> set[str]:
    """Attribute names that the code reads from a value: `x.name`, but not `module.name`, and not in a mere check."""
    names: set[str] = set()
    for path in python_files(*folders):
        tree = parse(path)
        imported = _imported_names(tree)
        names |= set(_reads(tree, imported))
    return names


def _imported_names(tree: ast.Module) -> set[str]:
    """Names bound by `import x`: reading an attribute of those reads no configuration."""
    return {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }


def _reads(node: ast.AST, imported: set[str]) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and _CHECKING.search(child.name):
            continue
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
            owner = child.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if not (isinstance(owner, ast.Name) and owner.id in imported):
                yield child.attr
        yield from _reads(child, imported)
