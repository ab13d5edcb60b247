"""README.md tells the truth about the tree, and names the commands that a newcomer needs."""

from __future__ import annotations

import re

import pytest

from tests.structure.tree import ROOT, at, fail_on, project_files

README = ROOT / "README.md"


@pytest.fixture
def readme_lines() -> list[str]:
    return README.read_text(encoding="utf-8").splitlines()


def _layout(lines: list[str]) -> dict[str, int]:
    """Path -> line number: the first word of each line in the first fenced block below the heading 'Layout'."""
    headings = [i for i, line in enumerate(lines) if re.fullmatch(r"#+\s+Layout\s*", line)]
    if not headings:
        return {}
    fences = [i for i, line in enumerate(lines) if i > headings[0] and line.lstrip().startswith("```")]
    if len(fences) < 2:
        return {}
    block = range(fences[0] + 1, fences[1])
    return {lines[i].split()[0]: i + 1 for i in block if lines[i].strip()}


def test_readme_has_a_layout(readme_lines: list[str]) -> None:
    assert _layout(readme_lines), (
        f"{at(README)} has no tree: under a heading 'Layout', write a ```text block, one path a line "
        "(`rm_gallery/data/   what it is`), from the root of the repository"
    )


def test_layout_names_only_what_exists(readme_lines: list[str]) -> None:
    problems = []
    for name, line in _layout(readme_lines).items():
        path = ROOT / name
        if not path.exists():
            problems.append(f"{at(README, line)} names {name}, which does not exist: correct or delete the line")
        elif path.is_dir() != name.endswith("/"):
            problems.append(f"{at(README, line)} names {name}: write a / at the end of a folder, none after a file")
    fail_on(problems)


def test_layout_names_every_main_folder(readme_lines: list[str]) -> None:
    files = [path.relative_to(ROOT) for path in project_files()]
    top_folders = {f"{path.parts[0]}/" for path in files if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    packages = {
        f"rm_gallery/{path.parts[1]}/" for path in files if path.parts[0] == "rm_gallery" and len(path.parts) > 2
    }
    named = list(_layout(readme_lines))
    problems = [
        f"{at(README)} does not name {folder} under 'Layout': add a line that says what it is"
        for folder in sorted(top_folders | packages)
        if not any(path.startswith(folder) for path in named)
    ]
    fail_on(problems)


def test_readme_names_the_first_commands(readme_lines: list[str]) -> None:
    text = "\n".join(readme_lines)
    problems = [
        f"{at(README)} does not name `{command}`: tell the newcomer what to type"
        for command in ("make quickstart", "make test")
        if command not in text
    ]
    fail_on(problems)
