"""The files that the structure tests look at, and their syntax trees."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("rm_gallery", "tutorials", "benchmarks", "tests")
_NOT_OURS = {
    "__pycache__",
    "build",
    "dist",
    "node_modules",
    "site-packages",
    "wandb",
    "swanlog",
    "checkpoints",
    "results",
}


@functools.cache
def project_files() -> tuple[Path, ...]:
    """Every file that is committed, or would be: tracked ones and new ones that git does not ignore."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive: no git, or no repository
        paths = [Path(folder) / name for folder, name in _walk(ROOT)]
    return tuple(sorted({path for path in paths if path.is_file()}))


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    for folder, subfolders, names in os.walk(root):
        is_environment = (Path(folder) / "pyvenv.cfg").exists()
        subfolders[:] = [n for n in subfolders if n not in _NOT_OURS and n != ".git" and not n.endswith("_cache")]
        if is_environment:
            subfolders.clear()
        else:
            yield from ((folder, name) for name in names)


def files_under(folders: Iterable[str], *suffixes: str) -> list[Path]:
    """Project files with one of `suffixes` below the given top folders."""
    tops = set(folders)
    return [path for path in project_files() if path.relative_to(ROOT).parts[0] in tops and path.suffix in suffixes]


def python_files(*folders: str) -> list[Path]:
    """Python files below the given top folders; below all of ours when none is given."""
    return files_under(folders or CODE_FOLDERS, ".py")


@functools.cache
def parse(path: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def at(path: Path, line: int = 1) -> str:
    """`file:line`, relative to the repository, as editors and terminals make it a link."""
    return f"{path.relative_to(ROOT).as_posix()}:{line}"


def module_name(path: Path) -> str:
    """rm_gallery/data/sources/hub.py -> rm_gallery.data.sources.hub; a folder's __init__.py is the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def fail_on(problems: Iterable[str]) -> None:
    """Fail the test with these problems, one a line, if there are any."""
    if lines := list(problems):
        pytest.fail("\n".join(lines), pytrace=False)
