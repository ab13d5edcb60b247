"""The repository stands alone: nothing of one machine in it, nothing left open without a name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.structure.tree import ROOT, at, fail_on, parse, project_files, python_files

# Home folders of any machine, and where this checkout happens to lie. A path starts a word: example.org/home/ is none.
_HERE = [str(ROOT), *([f"{ROOT.parent}/"] if ROOT.parent not in (Path("/"), Path("/tmp")) else [])]
MACHINE_PATH = re.compile(r"(?<![\w.~-])(?:/(?:root|home|Users)/|" + "|".join(map(re.escape, _HERE)) + ")|file:" + "//")
OPEN_MARK = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b(?!\([a-z0-9][a-z0-9-]*\): \S)")
EXACT_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9A-Za-z.]*")


def _text_lines() -> Iterator[tuple[Path, int, str]]:
    """(file, line number, line) of every text file; a file with a NUL byte or foreign encoding is data."""
    for path in project_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            yield path, number, line


def test_no_file_names_a_path_of_one_machine() -> None:
    problems = [
        f"{at(path, number)} contains {found.group()!r}: use a path relative to the repository, or an argument"
        for path, number, line in _text_lines()
        if (found := MACHINE_PATH.search(line))
    ]
    fail_on(problems)


def test_every_open_mark_has_a_topic() -> None:
    problems = [
        f"{at(path, number)} has a {found.group()} without a topic: write {found.group()}(topic): what is missing"
        for path, number, line in _text_lines()
        if path.name != "LICENSE" and (found := OPEN_MARK.search(line))
    ]
    fail_on(problems)


def test_nothing_raises_not_implemented() -> None:
    problems = []
    for path in python_files():
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(raised, ast.Name) and raised.id == "NotImplemented" + "Error":
                problems.append(
                    f"{at(path, node.lineno)} raises {raised.id}: write it, delete it, "
                    "or declare the method in a Protocol or with @abstractmethod"
                )
    fail_on(problems)


def test_constraints_are_exact_and_fit_any_machine() -> None:
    path = ROOT / "constraints.txt"
    problems = [
        f"{at(path, number)} reads {line!r}: write name==version, without a local part such as +cpu"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if line and not line.startswith("#") and not EXACT_VERSION.fullmatch(line)
    ]
    fail_on(problems)
