"""docs/architecture.md and README.md name files and folders that exist."""

from __future__ import annotations

import re

import pytest

from tests.structure.tree import ROOT, at, fail_on

_PATH = re.compile(
    r"`((?:rm_gallery|data|modeling|training|inspection|planning|scoring|core|distributed|objectives|evaluation|serving"
    r"|integrations)/[\w/.]*)"
)


@pytest.mark.parametrize("page", ["docs/architecture.md", "README.md"])
def test_paths_on_a_page_exist(page: str) -> None:
    problems = []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        for path in _PATH.findall(line):
            inside = path.removeprefix("rm_gallery/").rstrip("./")
            if not (ROOT / "rm_gallery" / inside).exists() and not (ROOT / path).exists():
                problems.append(f"{at(ROOT / page, number)} names {path}, which does not exist")
    fail_on(problems)
