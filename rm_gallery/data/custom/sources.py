"""Which code is the user's own: neither Python's, nor installed, nor of this package."""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import rm_gallery

_STDLIB = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib"))
_PACKAGE = f"{Path(rm_gallery.__file__).parent}/"
_INSTALLED = {"site-packages", "dist-packages"}


def is_user_code(file: str | None) -> bool:
    """Whether a file name, as modules and tracebacks give it, is Python code of the user's own."""
    if file is None or not file.endswith(".py") or file.startswith((*_STDLIB, _PACKAGE)):
        return False
    return _INSTALLED.isdisjoint(Path(file).parts)


def describe_error(error: BaseException) -> str:
    """`KeyError: 'query' (custom_bt_dataset.py:9)`: what was raised, and the last line of the user's own code."""
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    if isinstance(error, SyntaxError):
        what, place = f"{type(error).__name__}: {error.msg}", (error.filename, error.lineno)
        return f"{what} ({Path(place[0]).name}:{place[1]})" if place[0] else what
    frames = [each for each in traceback.extract_tb(error.__traceback__) if is_user_code(each.filename)]
    return f"{what} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else what


def sources_of(file: Path) -> tuple[Path, ...]:
    """The file and every module of the user's own that it imports and that is loaded now, also through others.

    Read from the import statements, since what a process had loaded before must not change the answer.
    """
    found = {file: ""}
    queue = [file]
    while queue:
        path = queue.pop()
        for name in _imports_in(path, found[path]):
            module = sys.modules.get(name)
            file_name = getattr(module, "__file__", None) or ""
            source = Path(file_name)
            if is_user_code(file_name) and source not in found and source.is_file():
                found[source] = getattr(module, "__package__", None) or ""
                queue.append(source)
    return tuple(found)


def _imports_in(path: Path, package: str) -> Iterator[str]:
    """Every module that the statements of a file load; `from a.b import c` loads a, a.b and perhaps a.b.c."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:size]) for size in range(1, len(parts) + 1))


def hash_files(files: Iterable[Path]) -> str:
    """Hash of the names and contents, wherever the files lie; raises OSError for one that is gone."""
    parts = sorted(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
