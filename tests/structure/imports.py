"""Every import of a Python file: lazy ones, typing-only ones, and modules imported by a literal name."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.structure.tree import at, module_name, parse, python_files


@dataclass(frozen=True)
class Import:
    """`source` imports `target`; both are dotted names, and a target of ours is the module that is meant."""

    source: str
    target: str
    path: Path
    line: int
    wildcard: bool = False

    @property
    def where(self) -> str:
        """file:line of the statement."""
        return at(self.path, self.line)

    def of(self, *packages: str) -> bool:
        """Whether the target is one of `packages` or lies inside one."""
        return any(within(self.target, package) for package in packages)


def within(module: str, package: str) -> bool:
    """Whether `module` is `package` or a part of it."""
    return module == package or module.startswith(package + ".")


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, for every Python file of ours."""
    return {module_name(path): path for path in python_files()}


def imports_of(*folders: str) -> list[Import]:
    """All imports written in the Python files below `folders`."""
    return [found for path in python_files(*folders) for found in _imports_in(path)]


def _imports_in(path: Path) -> Iterator[Import]:
    source = module_name(path)
    package = source if path.name == "__init__.py" else source.rpartition(".")[0]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(source, alias.name, path, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            for alias in node.names:
                # `from rm_gallery.data import sources` means the module; `... import Row` the file it is written in
                inner = f"{base}.{alias.name}"
                target = inner if inner in modules() else base
                yield Import(source, target, path, node.lineno, wildcard=alias.name == "*")
        elif isinstance(node, ast.Call) and (name := _imported_by_call(node)):
            yield Import(source, name, path, node.lineno)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if node.level == 0:
        return node.module or ""
    parts = package.split(".")
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


def _imported_by_call(node: ast.Call) -> str | None:
    """The name in `importlib.import_module("name")`, `import_module("name")` or `__import__("name")`."""
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name not in {"import_module", "__import__"} or not node.args:
        return None
    first = node.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None
