"""Text for users has the field's words: phrases that describe a standard term, or sound translated, are refused.

Checked are names, docstrings and other string literals of the package, tutorials and benchmarks, and the pages but
docs/log.md, which quotes what was.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.structure.tree import ROOT, at, fail_on, files_under, parse, python_files

PHRASES = {
    r"(?:go|goes|going|went) on": "resume, continue",
    r"left out|leaves out": "dropped, omitted",
    r"whole or not there": "atomic",
    r"mend(?:s|ed|ing)?": "fix",
    r"nobody": "no user, or name the component",
    r"so many": "n, the given number of",
    r"once more|anew": "again",
    r"stands? there twice": "duplicate",
    r"(?:left|leaves?) behind": "outputs",
    r"behind the prefix": "after the prefix",
    r"of like (?:lengths?|shapes?|costs?)": "of similar length, same-shaped",
    r"cut over|cut weights": "sharded across",
    r"dearest": "most expensive",
    r"a coin": "chance",
    r"told|said so|says so": "logged, reported",
    r"beside the training": "in the background, asynchronously",
    r"from nothing": "from scratch",
    r"roll call": "barrier",
    r"wait for each other": "load imbalance",
    r"talks? to people": "main process",
}
"""phrase -> what to write"""
NAME = re.compile(r"(?:^|_)(?:MOST|LEAST)_", re.IGNORECASE)
DATA = {"dialogues.py", "phrases.py"}
"""Files of the quick start whose literals are texts of its data set."""
_PATTERN = re.compile(
    "|".join(rf"(?P<p{number}>\b(?:{phrase})\b)" for number, phrase in enumerate(PHRASES)).replace(" ", r"\s+"), re.I
)


def test_text_has_the_words_of_the_field() -> None:
    instead = list(PHRASES.values())
    fail_on(
        f"{at(path, line + text.count(chr(10), 0, found.start()))} has {found.group()!r}: "
        f"write {instead[int(str(found.lastgroup)[1:])]}"
        for path, line, text in _texts()
        for found in _PATTERN.finditer(text)
    )


def test_limits_are_named_max_and_min() -> None:
    fail_on(
        f"{at(path, node.lineno)} is named {name}: write MAX_ or MIN_"
        for path in python_files("rm_gallery", "tutorials", "benchmarks")
        for node in ast.walk(parse(path))
        for name in _bound_names(node)
        if name.isupper() and NAME.search(name)
    )


def _texts() -> Iterator[tuple[Path, int, str]]:
    """(file, line number, text) of every literal and page."""
    for path in python_files("rm_gallery", "tutorials", "benchmarks"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name not in DATA:
                yield path, node.lineno, node.value
    pages = [path for path in files_under(["docs"], ".md") if path.name != "log.md"]
    pages += files_under(["tutorials", "benchmarks"], ".md", ".yaml", ".sh", ".sbatch")
    for path in [*pages, ROOT / "README.md", ROOT / "Makefile"]:
        yield path, 1, path.read_text(encoding="utf-8")
    changelog = ROOT / "CHANGELOG.md"
    before, _, rest = changelog.read_text(encoding="utf-8").partition("## Unreleased")
    yield changelog, before.count("\n") + 1, rest.partition("\n## ")[0]


def _bound_names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
