"""The budgets that keep files readable: lines, function lines, plain text, honest names."""

from __future__ import annotations

import ast

from tests.structure.tree import ROOT, at, fail_on, parse, project_files, python_files

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
SOURCE_SUFFIXES = {".py", ".sh", ".yaml", ".yml", ".toml", ".cfg", ".ini"}
SOURCE_NAMES = {"Makefile", "run", "constraints.txt"}


def test_no_file_passes_450_lines() -> None:
    problems = []
    for path in python_files():
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_FILE_LINES:
            problems.append(
                f"{at(path, MAX_FILE_LINES + 1)} has {num_lines} lines, at most {MAX_FILE_LINES}: "
                "split it by subject, keeping the import path"
            )
    fail_on(problems)


def test_no_function_passes_80_lines() -> None:
    problems = []
    for path in python_files("rm_gallery", "tutorials", "benchmarks"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    problems.append(
                        f"{at(path, node.lineno)} {node.name} has {num_lines} lines, at most {MAX_FUNCTION_LINES}: "
                        "give its parts names of their own"
                    )
    fail_on(problems)


def test_source_is_ascii() -> None:
    problems = []
    for path in project_files():
        if path.suffix not in SOURCE_SUFFIXES and path.name not in SOURCE_NAMES:
            continue
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if not line.isascii():
                shown = (
                    line.decode("utf-8", errors="replace").encode("ascii", errors="backslashreplace").decode().strip()
                )
                problems.append(f"{at(path, number)} is not ASCII: {shown[:60]!r}; write an escape such as \\u00e9")
    fail_on(problems)


def test_no_file_is_called_utils() -> None:
    problems = []
    for path in python_files():
        if "utils" in path.relative_to(ROOT).with_suffix("").parts:
            problems.append(f"{at(path)} is called utils: name it by its subject")
    fail_on(problems)
